//! Who is not a member, or no longer is, gets nothing, whatever it sends.

use e2e::peer::{self, SOON};
use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files};
use iroh::SecretKey;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use sync::wire::{
    self, Announced, Deliver, Fetch, Follow, Knock, LocationList, MemberList, MemberRecord,
    Operations, PairRequest, PairResponse, Request, Response, Staged,
};
use vfs_core::library::{Stamp as ClockStamp, State};
use vfs_core::model::{ContentId, DeviceId, FileId, LocationId, Name, Seq, Stamp, Time};
use vfs_core::ops::{Change, DRAWN_FILE_ID, New, Op, Place};
use vfs_core::source::Version;

const SECRET_TEXT: &[u8] = b"nobody outside of the library may read this";

/// An owner at a known address, that shares one file; its guest is a member.
struct House {
    source: PathBuf,
    owner: Device,
    guest: Device,
    at: SocketAddr,
    _lab: Lab,
}

fn house(needs: &[Need]) -> Option<House> {
    let lab = Lab::local(needs)?;
    let source = lab.folder("source");
    fs::write(source.join("secret"), SECRET_TEXT).unwrap();
    files::random_file(&source.join("unread"), 1 << 20, 7);
    let at = peer::free_address();
    let owner = settled(&lab, "owner", at);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&source, "files");
    let guest = settled(&lab, "guest", (Ipv4Addr::LOCALHOST, 0).into());
    guest.join(&owner);
    guest.wait_replicated(&owner, "files");
    Some(House { source, owner, guest, at, _lab: lab })
}

/// A running device that listens at this address only.
fn settled(lab: &Lab, name: &str, at: SocketAddr) -> Device {
    let mut device = lab.stopped_device(name);
    device.sd(&["config", "set", "network.discovery", "false"]).ok();
    device.sd(&["config", "set", "network.bind", &at.to_string()]).ok();
    device.start();
    device
}

fn state_of(device: &Device) -> State {
    let text = fs::read(device.data_dir().join("library.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Every request there is, as good as a peer can make it that knows everything.
/// A file that appears at the owner if this is taken.
fn planted(location: LocationId) -> Operations {
    let name = Name::new(*b"planted").unwrap();
    let change = Change::Create {
        at: Place { dir: FileId::ROOT, name },
        file: FileId(DRAWN_FILE_ID | 1),
        what: New::Directory,
        perm: 0o755,
        mtime: Time::default(),
    };
    Operations::Whole { settled_below: 1, ops: vec![Op { no: 1, location, log_id: 1, change }] }
}

fn every_request(owner: &Device, source: &std::path::Path, me: &SecretKey) -> Vec<Vec<u8>> {
    let state = state_of(owner);
    let location = state.locations[0].id;
    let library = state.library.unwrap().id;
    let metadata = fs::metadata(source.join("secret")).unwrap();
    let content = ContentId::of(SECRET_TEXT);
    let versions = (1..20).flat_map(|file| {
        let stamp = stamp(&metadata);
        let version = Version { location, file: FileId(file), stamp, content: Some(content) };
        [version.clone(), Version { content: None, ..version }]
    });
    let fetches = versions.map(|version| {
        let len = SECRET_TEXT.len() as u32;
        peer::request(&Request::Fetch(Fetch { version: (&version).into(), offset: 0, len }))
    });
    let follow = |location| Request::Rows(Follow { location, log_id: 0, after: Seq(0) });
    let records = MemberList(vec![MemberRecord {
        id: DeviceId(*me.public().as_bytes()),
        name: "intruder".into(),
        life: 0,
        stamp: ClockStamp { wall_ms: now_ms(), count: 0 },
        removed: false,
        addresses: vec![],
    }]);
    let announced = LocationList(vec![Announced {
        id: LocationId::new(DeviceId(*me.public().as_bytes()), [7; 8]),
        name: "planted".into(),
        read_only: false,
    }]);
    let deliver = |bulk| Request::Deliver(Deliver { epoch: 1, session: 1, bulk });
    let with_frame = |request: &Request, frame: Vec<u8>| [peer::request(request), frame].concat();
    let simple = [
        peer::request(&Request::Hello(peer::hello(&library))),
        peer::request(&Request::Hello(peer::hello("another"))),
        peer::request(&Request::Ping),
        peer::request(&follow(location)),
        peer::request(&follow(LocationId([0; 16]))),
        with_frame(&Request::Members, wire::encode_frame(&records).unwrap()),
        with_frame(&Request::Locations, wire::encode_frame(&announced).unwrap()),
        with_frame(&deliver(false), wire::encode_frame(&planted(location)).unwrap()),
        with_frame(&deliver(true), wire::encode_frame(&planted(location)).unwrap()),
        peer::request(&Request::Staged(Staged { epoch: 1, no: 1, ranges: vec![0..1] })),
        // Not messages at all.
        vec![],
        vec![0xff; 64],
        [&1_u16.to_le_bytes()[..], &u32::MAX.to_le_bytes()].concat(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    simple.into_iter().chain(fetches).collect()
}

fn stamp(metadata: &fs::Metadata) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    let time = |secs, nanos| Time { secs, nanos: nanos as u32 };
    Stamp {
        disk_ino: metadata.ino(),
        size: metadata.size(),
        mtime: time(metadata.mtime(), metadata.mtime_nsec()),
        ctime: time(metadata.ctime(), metadata.ctime_nsec()),
    }
}

fn now_ms() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as u64
}

/// No answer but a refusal: no rows, no names, no bytes.
#[track_caller]
fn assert_nothing(request: &[u8], answer: &[u8]) {
    let shown = || format!("{} bytes to {:02x?}", answer.len(), &request[..request.len().min(32)]);
    let secret = answer.windows(SECRET_TEXT.len()).any(|window| window == SECRET_TEXT);
    assert!(!secret, "the file's bytes were sent: {}", shown());
    let Some(body) = answer.get(4..) else { return };
    let refused = matches!(wire::decode::<Response>(body), Ok(Response::Refused(_)));
    assert!(refused, "an answer that is not a refusal: {}", shown());
}

/// Tries each message, first on a connection of its own, then all on one.
fn try_everything(house: &House, key: SecretKey) {
    let requests = every_request(&house.owner, &house.source, &key);
    let before = (state_of(&house.owner), house.owner.content_bytes_out());
    let owner = peer::key_of(&house.owner.data_dir()).public();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let me = peer::endpoint(key, (Ipv4Addr::LOCALHOST, 0).into(), &[]).await;
        for request in &requests {
            let Some(connection) = peer::connect(&me, owner, house.at, wire::ALPN_MEMBER).await
            else {
                continue;
            };
            assert_nothing(request, &peer::ask(&connection, request).await);
            connection.close(0_u32.into(), b"");
        }
        if let Some(connection) = peer::connect(&me, owner, house.at, wire::ALPN_MEMBER).await {
            for request in &requests {
                assert_nothing(request, &peer::ask(&connection, request).await);
            }
        }
        knock_everywhere(&me, owner, house.at).await;
        me.close().await;
    });
    let names = |state: &State| -> Vec<String> { state.active().map(|m| m.name.clone()).collect() };
    let now = state_of(&house.owner);
    assert_eq!(names(&now), names(&before.0), "the members changed");
    assert_eq!(house.owner.content_bytes_out(), before.1, "bytes of files were sent");
    assert!(house.owner.location_row("intruder", "planted").is_none());
    assert!(!house.source.join("planted").exists(), "an operation was carried out");
}

/// Pairing without a ticket, with guessed secrets, and out of order.
async fn knock_everywhere(me: &iroh::Endpoint, owner: iroh::PublicKey, at: SocketAddr) {
    let knock = |ticket, proof| {
        let name = "intruder".to_owned();
        PairRequest::Knock(Knock { ticket, name, nonce: [1; 32], proof, addresses: vec![] })
    };
    let requests = [
        vec![PairRequest::Confirm],
        vec![knock([0; 16], [0; 32])],
        vec![knock([0; 16], [0; 32]), PairRequest::Confirm],
        vec![knock([0xff; 16], [0xff; 32]), PairRequest::Confirm, PairRequest::Confirm],
    ];
    for sequence in requests {
        let Some(connection) = peer::connect(me, owner, at, wire::ALPN_PAIR).await else {
            continue;
        };
        for request in sequence {
            let answer = peer::ask(&connection, &peer::request(&request)).await;
            let Some(body) = answer.get(4..) else { continue };
            let response = wire::decode::<PairResponse>(body);
            let refused = matches!(response, Ok(PairResponse::Refused(_)));
            assert!(refused, "{request:?} was answered with {response:?}");
        }
        connection.close(0_u32.into(), b"");
    }
}

#[test]
fn a_stranger_gets_nothing() {
    let Some(house) = house(&[]) else { return };
    try_everything(&house, peer::new_key());
}

#[test]
fn a_removed_device_gets_nothing() {
    let Some(mut house) = house(&[]) else { return };
    house.guest.stop();
    house.owner.sd(&["device", "remove", "guest", "--yes"]).ok();
    let key = peer::key_of(&house.guest.data_dir());
    try_everything(&house, key);
}

#[test]
fn removal_takes_effect_on_an_open_connection() {
    let Some(house) = house(&[Need::Fuse]) else { return };
    house.guest.mount();
    let files = house.guest.at("owner/files");
    assert_eq!(fs::read(files.join("secret")).unwrap(), SECRET_TEXT);
    let sent = house.owner.content_bytes_out();

    house.owner.sd(&["device", "remove", "guest", "--yes"]).ok();
    let unread = files.join("unread");
    let (read, _) =
        e2e::wait::within("a read by a removed device", SOON + SOON, move || fs::read(unread));
    read.expect_err("bytes for a removed device");
    // A removed device is no longer counted.
    assert!(house.owner.content_bytes_out() <= sent, "bytes were sent after the removal");
    wait_until("the guest to be gone", Duration::from_secs(10), || {
        !house.owner.sees_online("guest")
    });
}

/// A location shared with one device is not seen by another member.
#[test]
fn a_location_is_seen_only_by_whom_it_is_shared_with() {
    let Some(house) = house(&[]) else { return };
    let third = settled(&house._lab, "third", (Ipv4Addr::LOCALHOST, 0).into());
    third.join(&house.owner);
    let folder = house._lab.folder("private");
    fs::write(folder.join("letter"), SECRET_TEXT).unwrap();
    let path = folder.to_str().unwrap();
    let add = ["location", "add", path, "--name", "private", "--share-with", "third", "--wait"];
    house.owner.sd(&add).ok();
    wait_until("the location at the third device", SOON, || {
        third.location_row("owner", "private").is_some()
    });
    // What was announced before it has arrived, so the private one would have, too.
    let marker = house._lab.folder("marker");
    house.owner.add_location(&marker, "marker");
    wait_until("a later location at the guest", SOON, || {
        house.guest.location_row("owner", "marker").is_some()
    });
    assert!(house.guest.location_row("owner", "private").is_none());
}
