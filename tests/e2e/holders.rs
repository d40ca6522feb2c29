//! A file is read from whoever has its bytes: from another device's location, or its cache.

use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need, Star, files, peer};
use iroh::endpoint::Connection;
use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use sync::wire::{self, Borrow, Refusal, Request, Response};
use vfs_core::library::State;
use vfs_core::model::ContentId;
use vfs_core::source::{Lent, Wanted};

/// Fast enough for a test, slow enough to be cut in the middle of a file.
const RATE: [&str; 4] = ["--delay", "1", "--rate", "300"];
const LARGE: u64 = 96 << 20;

/// An owner at one end of the link, a reader and a third device at the other one, and a file.
struct Three {
    owner: Device,
    reader: Device,
    third: Device,
    source: PathBuf,
    hash: blake3::Hash,
    lab: Lab,
}

fn three(size: u64) -> Option<Three> {
    let lab = Lab::emulated(&[Need::Fuse], &RATE)?;
    let source = lab.folder("source");
    let hash = files::random_file(&source.join("film"), size, 5);
    let [owner, reader] = lab.two_devices(["owner", "reader"]);
    let mut third = lab.stopped_device_at(1, "third");
    third.start();
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    reader.join(&owner);
    third.join(&owner);
    reader.wait_online("third");
    owner.share(&source, "files");
    Some(Three { owner, reader, third, source, hash, lab })
}

impl Three {
    /// The third device has all of it in its cache, and knows what the owner states.
    fn third_has_cached_it(&self) {
        self.third.wait_replicated(&self.owner, "files");
        self.third.mount();
        let path = self.third.at("owner/files/film");
        assert_eq!(files::hash_file(&path).unwrap(), self.hash);
    }

    /// The third device has the same bytes in a location, under another name.
    fn third_has_a_copy(&self) {
        let copies = self.lab.folder("copies");
        fs::copy(self.source.join("film"), copies.join("the same")).unwrap();
        self.third.share(&copies, "copies");
        self.reader.wait_replicated(&self.third, "copies");
    }

    fn reader_mounts(&self) -> PathBuf {
        self.reader.wait_replicated(&self.owner, "files");
        self.reader.mount();
        self.reader.at("owner/files/film")
    }
}

/// Reads in the order of the file; gives its hash and the longest pause.
fn read_with_pauses(path: &Path, mut seen: impl FnMut(u64)) -> (blake3::Hash, Duration) {
    let (mut file, mut hasher) = (File::open(path).unwrap(), blake3::Hasher::new());
    let (mut piece, mut at, mut longest) = (vec![0; 256 << 10], 0, Duration::ZERO);
    loop {
        let asked = Instant::now();
        let n = file.read(&mut piece).unwrap();
        longest = longest.max(asked.elapsed());
        if n == 0 {
            return (hasher.finalize(), longest);
        }
        hasher.update(&piece[..n]);
        at += n as u64;
        seen(at);
    }
}

#[test]
fn a_file_whose_owner_is_off_is_read_from_another_devices_cache() {
    let Some(mut three) = three(20 << 20) else { return };
    three.third_has_cached_it();
    let path = three.reader_mounts();
    three.owner.stop();
    wait_until("the owner to be off", Duration::from_secs(20), || {
        !three.reader.sees_online("owner")
    });
    let (hash, _) =
        within("a read from a cache", Duration::from_secs(30), move || files::hash_file(&path));
    assert_eq!(hash.unwrap(), three.hash);
}

#[test]
fn a_file_whose_owner_is_off_is_read_from_where_it_has_another_name() {
    let Some(mut three) = three(20 << 20) else { return };
    three.third_has_a_copy();
    let path = three.reader_mounts();
    three.owner.stop();
    let (hash, _) =
        within("a read from another", Duration::from_secs(30), move || files::hash_file(&path));
    assert_eq!(hash.unwrap(), three.hash);
}

#[test]
fn a_cache_lends_nothing_to_a_device_that_may_not_see_the_file() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let anywhere = (Ipv4Addr::LOCALHOST, 0).into();
    let mut owner = settled(&lab, "owner", anywhere);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    let at = peer::free_address();
    let (third, mut reader) = (settled(&lab, "third", at), settled(&lab, "reader", anywhere));
    third.join(&owner);
    reader.join(&owner);
    third.wait_online("reader");
    let files = ["open", "hidden"].map(|name| {
        let folder = lab.folder(name);
        let hash = files::random_file(&folder.join("film"), 3 << 20, name.len() as u64);
        let path = folder.to_str().unwrap();
        let add = ["location", "add", path, "--name", name, "--share-with", "third", "--wait"];
        owner.sd(if name == "open" { &add[..5] } else { &add[..] }).ok();
        owner.wait_indexed(name);
        owner.wait_hashed(name);
        hash
    });
    third.mount();
    for (name, hash) in ["open", "hidden"].into_iter().zip(files) {
        third.wait_replicated(&owner, name);
        let read = files::hash_file(&third.at("owner").join(name).join("film"));
        assert_eq!(read.unwrap(), hash);
    }
    owner.stop();
    let (key, library) = (peer::key_of(&reader.data_dir()), library_of(&reader));
    reader.stop();

    let third_key = peer::key_of(&third.data_dir()).public();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let wanted = files.map(|hash| Wanted { content: ContentId(*hash.as_bytes()), size: 3 << 20 });
    runtime.block_on(async {
        let endpoint = peer::endpoint(key, peer::free_address(), &[wire::ALPN_MEMBER]).await;
        let connection =
            peer::connect(&endpoint, third_key, at, wire::ALPN_MEMBER).await.expect("a member");
        let hello = Request::Hello(peer::hello(&library));
        assert!(matches!(ask(&connection, &hello).await, Response::Hello(_)));
        let borrow = |wanted| Request::Borrow(Borrow { wanted, offset: 1 << 20, len: 1 << 20 });
        // What it may see it gets; of the rest it does not even learn that it is there.
        let lends = ask(&connection, &Request::Lends(wanted.into())).await;
        let lent = Lent { ranges: vec![0..3 << 20], is_ready: false };
        assert_eq!(lends, Response::Lends(vec![lent, Lent::default()]));
        let lent = ask(&connection, &borrow(wanted[0])).await;
        assert!(matches!(lent, Response::Fetched { .. }), "{lent:?}");
        let refused = ask(&connection, &borrow(wanted[1])).await;
        assert_eq!(refused, Response::Refused(Refusal::NotShared));
        endpoint.close().await;
    });
}

/// A running device that listens at this address only.
fn settled(lab: &Lab, name: &str, at: SocketAddr) -> Device {
    let mut device = lab.stopped_device(name);
    device.sd(&["config", "set", "network.discovery", "false"]).ok();
    device.sd(&["config", "set", "network.bind", &at.to_string()]).ok();
    device.start();
    device
}

fn library_of(device: &Device) -> String {
    let state = fs::read(device.data_dir().join("library.json")).unwrap();
    let state: State = serde_json::from_slice(&state).unwrap();
    state.library.unwrap().id
}

async fn ask(connection: &Connection, request: &Request) -> Response {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    wire::send_request(&mut send, wire::NEWEST, request).await.unwrap();
    let _ = send.finish();
    wire::receive_frame(&mut receive).await.unwrap()
}

#[test]
fn a_read_goes_on_when_its_owner_freezes_in_the_middle() {
    goes_on_when(|three| three.owner.freeze(), Three::third_has_a_copy);
}

#[test]
fn a_read_goes_on_when_its_owner_is_cut_off_in_the_middle() {
    goes_on_when(|three| three.lab.link().cut(), Three::third_has_a_copy);
}

#[test]
fn a_read_goes_on_from_a_cache_when_its_owner_freezes_in_the_middle() {
    goes_on_when(|three| three.owner.freeze(), Three::third_has_cached_it);
}

fn goes_on_when(loses_its_owner: fn(&Three), third_has_it: fn(&Three)) {
    let Some(three) = three(LARGE) else { return };
    third_has_it(&three);
    let path = three.reader_mounts();
    let mut is_lost = false;
    let (hash, longest) = read_with_pauses(&path, |at| {
        if at > LARGE / 3 && !is_lost {
            is_lost = true;
            loses_its_owner(&three);
        }
    });
    eprintln!("the longest pause was {longest:?}");
    three.owner.thaw();
    assert_eq!(hash, three.hash);
    assert!(longest < Duration::from_secs(3), "a pause of {longest:?}");
}

#[test]
fn two_links_bring_a_large_file_in_little_more_than_half_of_the_time() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::Rates]) else { return };
    let star = Star::up(&[("reader", None), ("owner", Some(100)), ("third", Some(100))]);
    let [reader, owner, third] = ["reader", "owner", "third"].map(|name| {
        let namespace = format!("sd-e2e-{name}");
        assert!(star.namespaces().contains(&namespace));
        let mut device = Device::new(name, lab.folder(name), Some(namespace));
        device.start();
        device
    });
    let source = lab.folder("source");
    let alone = files::random_file(&source.join("alone"), 128 << 20, 1);
    let together = files::random_file(&source.join("together"), 128 << 20, 2);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&source, "files");
    reader.join(&owner);
    third.join(&owner);
    reader.wait_online("third");
    let copies = lab.folder("copies");
    fs::copy(source.join("together"), copies.join("the same")).unwrap();
    third.share(&copies, "copies");
    reader.wait_replicated(&owner, "files");
    reader.wait_replicated(&third, "copies");
    reader.mount();
    let [one, two] = [("alone", alone), ("together", together)].map(|(name, hash)| {
        let path = reader.at("owner/files").join(name);
        let asked = Instant::now();
        assert_eq!(files::hash_file(&path).unwrap(), hash);
        asked.elapsed()
    });
    let gain = one.as_secs_f64() / two.as_secs_f64();
    eprintln!("{one:?} from one holder, {two:?} from two: {gain:.2}");
    assert!(gain >= 1.7, "{one:?} from one holder, {two:?} from two");
}
