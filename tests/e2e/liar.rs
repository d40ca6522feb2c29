//! A holder that serves one wrong byte of a file whose content id is known.
//!
//! The liar has the owner's own key and address: it speaks the protocol as the owner does, with a
//! correct proof, and flips one bit of every range that it serves.

use e2e::peer;
use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need, files};
use iroh::Endpoint;
use iroh::endpoint::{Connection, RecvStream, SendStream};
use rustix::io::Errno;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use sync::wire::{self, LocationList, MemberList, Refusal, Request, Response};
use vfs_core::content::manifest::Manifest;

const LEN: usize = 3 << 20;

/// Serves ranges of one file with a flipped bit, in the name of a device.
struct Liar {
    runtime: tokio::runtime::Runtime,
    endpoint: Endpoint,
    lies: Arc<AtomicU64>,
}

struct Script {
    library: String,
    bytes: Vec<u8>,
    manifest: Manifest,
    lies: Arc<AtomicU64>,
}

impl Liar {
    fn start(owner: &Device, at: SocketAddr, bytes: Vec<u8>) -> Self {
        let state = fs::read(owner.data_dir().join("library.json")).unwrap();
        let state: vfs_core::library::State = serde_json::from_slice(&state).unwrap();
        let lies = Arc::new(AtomicU64::new(0));
        let script = Arc::new(Script {
            library: state.library.unwrap().id,
            manifest: Manifest::of_bytes(&bytes).1,
            bytes,
            lies: lies.clone(),
        });
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let key = peer::key_of(&owner.data_dir());
        let endpoint = runtime.block_on(peer::endpoint(key, at, &[wire::ALPN_MEMBER]));
        runtime.spawn(accept(endpoint.clone(), script));
        Self { runtime, endpoint, lies }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.runtime.block_on(self.endpoint.close());
    }
}

async fn accept(endpoint: Endpoint, script: Arc<Script>) {
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        tokio::spawn(serve(connection, script.clone()));
    }
}

async fn serve(connection: Connection, script: Arc<Script>) {
    while let Ok((send, receive)) = connection.accept_bi().await {
        let script = script.clone();
        tokio::spawn(async move {
            // A broken stream is the other side's decision.
            let _ = script.answer(send, receive).await;
        });
    }
}

impl Script {
    async fn answer(
        &self,
        mut send: SendStream,
        mut receive: RecvStream,
    ) -> Result<(), wire::WireError> {
        match wire::receive_request::<Request>(&mut receive).await? {
            Request::Hello(_) => {
                let hello = Response::Hello(peer::hello(&self.library));
                wire::send_frame(&mut send, &hello).await?;
            }
            Request::Ping => wire::send_frame(&mut send, &Response::Done).await?,
            Request::Members => {
                wire::receive_frame::<MemberList>(&mut receive).await?;
                wire::send_frame(&mut send, &Response::Done).await?;
            }
            Request::Locations => {
                wire::receive_frame::<LocationList>(&mut receive).await?;
                wire::send_frame(&mut send, &Response::Done).await?;
            }
            Request::Rows(follow) => {
                let rows = Response::Rows { log_id: follow.log_id, after: follow.after };
                wire::send_frame(&mut send, &rows).await?;
                // Nothing changes; the stream stays open until the reader ends it.
                let _ = send.stopped().await;
                return Ok(());
            }
            Request::Fetch(fetch) => {
                let from = fetch.offset;
                let range = from..from + u64::from(fetch.len);
                let mut bytes = self.bytes[from as usize..range.end as usize].to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                self.lies.fetch_add(1, Ordering::Relaxed);
                let proof = self.manifest.proof(range).expect("a range of the file");
                wire::send_frame(&mut send, &Response::Fetched { proof }).await?;
                send.write_all(&bytes).await?;
            }
            Request::Deliver(_)
            | Request::Staged(_)
            | Request::Lock(_)
            | Request::Statements
            | Request::PassOn(_)
            | Request::Lends(_)
            | Request::Borrow(_) => {
                let refused = Response::Refused(Refusal::Malformed);
                wire::send_frame(&mut send, &refused).await?;
            }
        }
        let _ = send.finish();
        Ok(())
    }
}

/// A reader that knows the rows of `files/file` and has none of its bytes; its owner is stopped.
struct Setting {
    owner: Device,
    reader: Device,
    at: SocketAddr,
    bytes: Vec<u8>,
    path: PathBuf,
    lab: Lab,
}

fn setting() -> Option<Setting> {
    let lab = Lab::local(&[Need::Fuse])?;
    let source = lab.folder("source");
    let bytes = files::random_bytes(LEN, 3);
    fs::write(source.join("file"), &bytes).unwrap();
    let at = peer::free_address();
    let mut owner = settled(&lab, "owner", at);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&source, "files");
    let reader = settled(&lab, "reader", (Ipv4Addr::LOCALHOST, 0).into());
    reader.join(&owner);
    reader.wait_replicated(&owner, "files");
    reader.mount();
    owner.stop();
    let path = reader.at("owner/files/file");
    Some(Setting { owner, reader, at, bytes, path, lab })
}

fn settled(lab: &Lab, name: &str, at: SocketAddr) -> Device {
    let mut device = lab.stopped_device(name);
    device.sd(&["config", "set", "network.discovery", "false"]).ok();
    device.sd(&["config", "set", "network.bind", &at.to_string()]).ok();
    device.start();
    device
}

#[track_caller]
fn assert_reported(reader: &Device) {
    let reports = reader.status()["reports"].clone();
    let report =
        reports.as_array().expect("a list").iter().find(|report| report["device"] == "owner");
    let report = report.unwrap_or_else(|| panic!("no report of the lie: {reports}"));
    assert!(report["path"].as_str().is_some_and(|path| path.contains("file")), "{report}");
}

#[test]
fn a_flipped_byte_is_never_delivered() {
    let Some(setting) = setting() else { return };
    let liar = Liar::start(&setting.owner, setting.at, setting.bytes.clone());
    setting.reader.wait_online("owner");

    for offset in [0, LEN as u64 / 2 - 1, LEN as u64 - 4096] {
        let path = setting.path.clone();
        let (read, _) = within("a read of a lie", Duration::from_secs(15), move || {
            let mut piece = vec![0; 4096];
            let file = fs::File::open(path)?;
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut piece, offset).map(|()| piece)
        });
        let error = read.expect_err("bytes that nobody served intact");
        assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{error}");
    }
    assert!(liar.lies.load(Ordering::Relaxed) > 0, "the liar was never asked");
    assert_reported(&setting.reader);
    drop(liar);

    // The honest owner comes back, and nothing of the lie was kept.
    let Setting { mut owner, reader, path, bytes, .. } = setting;
    owner.start();
    reader.wait_online("owner");
    wait_until("the true bytes", Duration::from_secs(20), || {
        fs::read(&path).is_ok_and(|read| read == bytes)
    });
}

#[test]
fn another_holder_serves_what_the_owner_garbled() {
    let Some(mut setting) = setting() else { return };
    // A third device has the same bytes under another name.
    setting.owner.start();
    let third = settled(&setting.lab, "third", (Ipv4Addr::LOCALHOST, 0).into());
    third.join(&setting.owner);
    let copies = setting.lab.folder("copies");
    fs::write(copies.join("the same"), &setting.bytes).unwrap();
    third.share(&copies, "copies");
    setting.reader.wait_online("third");
    setting.reader.wait_replicated(&third, "copies");
    setting.owner.stop();

    let liar = Liar::start(&setting.owner, setting.at, setting.bytes.clone());
    setting.reader.wait_online("owner");
    let path = setting.path.clone();
    let (read, _) =
        within("a read that finds the other holder", Duration::from_secs(20), move || {
            fs::read(path)
        });
    assert!(read.unwrap() == setting.bytes, "a wrong byte was delivered");
    if liar.lies.load(Ordering::Relaxed) > 0 {
        assert_reported(&setting.reader);
    }
}
