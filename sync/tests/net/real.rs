//! Writes of one device to the files of another, from the drive's calls to the owner's disk.

use crate::content::pattern;
use crate::device::{Device, PATIENCE, Writes, id_of, raw_endpoint, until};
use crate::strangers::{greet, open_request};
use crate::writing::{begin, raw_writer};
use bytes::Bytes;
use iroh::endpoint::{RecvStream, SendStream};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sync::wire::{self, Operations, Refusal, Request, Response, Staged};
use vfs_core::content::{Cache, Content, ContentConfig};
use vfs_core::drive::{
    Caller, Drive, DriveConfig, ForeignSymlinks, HandleId, InodeNo, OpenFlags, RenameFlags, SetAttr,
};
use vfs_core::model::{FileId, Location, Name};
use vfs_core::ops::{self, Change, Op, Outcome};

const CALLER: Caller = Caller { uid: 0, gid: 0, pid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, ..OpenFlags::READ };

/// An owner with one location, a writer, and the drive in which the writer sees it.
struct Pair {
    owner: Device,
    writer: Device,
    location: Arc<Location>,
    drive: Arc<Drive>,
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.owner.indexer.stop();
        self.writer.indexer.stop();
    }
}

impl Pair {
    async fn new() -> Self {
        let owner = Device::with(Writes::Real).await;
        owner.found("desk");
        let location = owner.add_location("files", None);
        owner.indexer.watch(location.no);
        let writer = Device::with(Writes::Real).await;
        owner.pair(&writer, "laptop").await;
        let drive = drive_of(&writer);
        let pair = Self { owner, writer, location, drive };
        until("the writer sees the folder", || {
            let replica = pair.writer.index.location_by_id(pair.location.id);
            let is_listed = replica.is_some_and(|l| pair.writer.index.head(l.no).0 > 0);
            is_listed && pair.find("").is_some()
        })
        .await;
        pair
    }

    /// The inode of a path below the location's folder.
    fn find(&self, path: &str) -> Option<InodeNo> {
        let names = ["desk", "files"].into_iter().chain(path.split('/').filter(|n| !n.is_empty()));
        let step = |at, name: &str| self.drive.lookup(at, name.as_bytes()).ok().map(|f| f.ino);
        names.into_iter().try_fold(InodeNo::ROOT, step)
    }

    fn parent<'a>(&self, path: &'a str) -> (InodeNo, &'a [u8]) {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.find(dir).unwrap(), name.as_bytes())
    }

    fn create(&self, path: &str, bytes: &[u8]) {
        let (dir, name) = self.parent(path);
        let (_, opened) = self.drive.create(&CALLER, dir, name, 0o644, WRITE).unwrap();
        self.write_and_close(opened.handle, 0, bytes);
    }

    fn write(&self, path: &str, offset: u64, bytes: &[u8]) {
        let opened = self.drive.open(self.find(path).unwrap(), WRITE).unwrap();
        self.write_and_close(opened.handle, offset, bytes);
    }

    fn write_and_close(&self, handle: HandleId, mut offset: u64, bytes: &[u8]) {
        for part in bytes.chunks(1 << 20) {
            assert_eq!(self.drive.write(handle, offset, part).unwrap(), part.len());
            offset += part.len() as u64;
        }
        self.drive.flush(handle).unwrap();
        self.drive.release(handle);
    }

    fn mkdir(&self, path: &str) {
        let (dir, name) = self.parent(path);
        self.drive.mkdir(&CALLER, dir, name, 0o755).unwrap();
    }

    fn rename(&self, from: &str, to: &str, flags: RenameFlags) {
        let ((dir, name), (to_dir, to_name)) = (self.parent(from), self.parent(to));
        self.drive.rename(dir, name, to_dir, to_name, flags).unwrap();
    }

    fn unlink(&self, path: &str) {
        let (dir, name) = self.parent(path);
        self.drive.unlink(dir, name).unwrap();
    }

    fn outbox(&self) -> &vfs_core::outbox::Outbox {
        &self.writer.writing().outbox
    }

    async fn drained(&self) {
        let drained = self.outbox().drained(None, 2 * PATIENCE).await;
        assert!(drained.is_ok(), "{drained:?}\n{:?}", self.writer.node.peers());
        assert!(self.outbox().conflicts().is_empty(), "{:?}", self.outbox().conflicts());
    }
}

fn drive_of(device: &Device) -> Arc<Drive> {
    let cache = device.dir.path().join("cache");
    fs::create_dir_all(&cache).unwrap();
    let content = Content::new(
        device.index.clone(),
        device.own(),
        Arc::new(Cache::open(&cache, 1 << 30)),
        device.node.source(),
        ContentConfig::default(),
        tokio::runtime::Handle::current(),
    );
    let foreign_symlinks = ForeignSymlinks::default();
    let config = DriveConfig { uid: 0, gid: 0, read_only: false, foreign_symlinks };
    Drive::new(
        device.index.clone(),
        device.indexer.clone(),
        content,
        device.library.clone(),
        device.writing().outbox.clone(),
        Arc::default(),
        config,
    )
}

/// Every name beneath a folder, with the bytes of files and the targets of links.
fn tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
            let kind = path.symlink_metadata().unwrap().file_type();
            if kind.is_dir() {
                all.insert(name + "/", vec![]);
                folders.push(path);
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).unwrap();
                all.insert(name + "@", target.into_os_string().into_encoded_bytes());
            } else {
                all.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_change_reaches_the_owners_folder() {
    let pair = Pair::new().await;
    let large = pattern(3 << 20);
    pair.mkdir("dir");
    pair.create("dir/small", b"small");
    pair.create("dir/large", &large);
    pair.create("dir/gone", b"gone");
    pair.create("empty", b"");
    pair.mkdir("dir/sub");
    pair.mkdir("dir/none");
    pair.create("dir/sub/moved", b"moved");
    let (dir, name) = pair.parent("link");
    pair.drive.symlink(&CALLER, dir, name, b"dir/small").unwrap();
    pair.drained().await;
    let folder = pair.owner.folder();
    let before = tree(&folder);
    assert_eq!(before.len(), 9, "{:?}", before.keys());
    assert!(before["dir/large"] == large);

    pair.write("dir/small", 5, b" and longer");
    pair.write("dir/large", 1 << 20, &[7; 4096]);
    pair.rename("dir/sub/moved", "moved", RenameFlags::default());
    pair.rename("dir/sub", "sub", RenameFlags::default());
    pair.create("new.tmp", b"atomic");
    pair.rename("new.tmp", "empty", RenameFlags::default());
    pair.unlink("dir/gone");
    let (dir, name) = pair.parent("dir/none");
    pair.drive.rmdir(dir, name).unwrap();
    let set = SetAttr { perm: Some(0o600), ..SetAttr::default() };
    pair.drive.setattr(&CALLER, pair.find("moved").unwrap(), None, set).unwrap();
    let set = SetAttr { size: Some(2), ..SetAttr::default() };
    pair.drive.setattr(&CALLER, pair.find("moved").unwrap(), None, set).unwrap();
    pair.drained().await;

    let mut large = large;
    large[1 << 20..][..4096].fill(7);
    let expected: BTreeMap<String, Vec<u8>> = [
        ("dir/", vec![]),
        ("dir/large", large),
        ("dir/small", b"small and longer".to_vec()),
        ("empty", b"atomic".to_vec()),
        ("link@", b"dir/small".to_vec()),
        ("moved", b"mo".to_vec()),
        ("sub/", vec![]),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .into();
    let after = tree(&folder);
    assert_eq!(after.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(after == expected);
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(folder.join("moved")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let sent = pair.writer.peer(pair.owner.id()).unwrap().bytes_out;
    assert!(sent < (3 << 20) + (1 << 20), "only what changed travels: {sent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_off_goes_on_and_nobody_else_is_given_its_bytes() {
    let mut pair = Pair::new().await;
    let bytes = pattern(256 << 20);
    let begun = Instant::now();
    pair.create("large", &bytes);
    println!("256 MiB: closed after {:?}", begun.elapsed());
    let sent = |pair: &Pair| pair.writer.peer(pair.owner.id()).map_or(0, |p| p.bytes_out);
    until("a part has been sent", || sent(&pair) > 16 << 20).await;
    pair.owner.node.shutdown().await;
    until("the writer noticed", || !pair.writer.is_online(pair.owner.id())).await;
    assert!(!pair.outbox().pending().is_empty(), "it was cut off");

    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    pair.writer.admit(id_of(&key), "raw");
    let connection = greet(&endpoint, &pair.writer).await;
    let epoch = pair.outbox().epoch();
    let request = Request::Staged(Staged { epoch, no: 1, ranges: vec![0..1000] });
    let (_send, mut recv) = open_request(&connection, &request).await;
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, Response::Refused(Refusal::NotShared), "the owner only");

    pair.owner.renew_node().await;
    pair.drained().await;
    assert!(fs::read(pair.owner.folder().join("large")).unwrap() == bytes);
    let total = sent(&pair);
    assert!(total < (256 << 20) + (64 << 20), "{total} bytes were sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_arrives() {
    let pair = Pair::new().await;
    let bytes = pattern(256 << 20);
    let begun = Instant::now();
    pair.create("large", &bytes);
    let closed = begun.elapsed();
    pair.drained().await;
    println!("256 MiB: closed after {closed:?}, at the owner after {:?}", begun.elapsed());
    assert!(fs::read(pair.owner.folder().join("large")).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_files_arrive() {
    let pair = Pair::new().await;
    let begun = Instant::now();
    for n in 0..1000u32 {
        pair.create(&format!("{n}"), &n.to_le_bytes().repeat(1024));
    }
    let closed = begun.elapsed();
    pair.drained().await;
    println!("1,000 × 4 KiB: closed after {closed:?}, at the owner after {:?}", begun.elapsed());
    let all = tree(&pair.owner.folder());
    assert_eq!(all.len(), 1000);
    for n in 0..1000u32 {
        assert!(all[&n.to_string()] == n.to_le_bytes().repeat(1024));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_owner_has_already_does_not_travel() {
    let pair = Pair::new().await;
    let bytes = pattern(8 << 20);
    pair.create("first", &bytes);
    pair.drained().await;
    let no = pair.location.no;
    until("it is hashed", || {
        let view = pair.owner.index.view().unwrap();
        let entry = view.entry(no, FileId::ROOT, b"first").unwrap();
        entry.is_some_and(|e| e.content.is_some())
    })
    .await;
    let sent = || pair.writer.peer(pair.owner.id()).unwrap().bytes_out;
    let before = sent();
    pair.create("second", &bytes);
    pair.drained().await;
    assert!(fs::read(pair.owner.folder().join("second")).unwrap() == bytes);
    assert_eq!(sent(), before, "no content bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_while_the_owner_is_away_arrives_when_it_is_back() {
    let mut pair = Pair::new().await;
    pair.owner.node.shutdown().await;
    until("it is away", || !pair.writer.is_online(pair.owner.id())).await;
    for n in 0..100 {
        pair.create(&format!("{n}"), b"offline");
    }
    for n in 0..50 {
        pair.unlink(&format!("{n}"));
    }
    assert!(!pair.outbox().pending().is_empty());
    pair.owner.renew_node().await;
    pair.drained().await;
    assert_eq!(tree(&pair.owner.folder()).len(), 50);
}

/// An owner with a real applier, and a member that is no program of ours.
async fn owner_and_stream(
    change: impl FnOnce(&mut vfs_core::index::NewLocation),
) -> (Device, Arc<Location>, (iroh::Endpoint, iroh::endpoint::Connection)) {
    let owner = Device::with(Writes::Real).await;
    owner.found("desk");
    fs::create_dir_all(owner.folder()).unwrap();
    let mut location = vfs_core::index::NewLocation {
        id: vfs_core::model::LocationId(rand::random()),
        owner: owner.id(),
        name: "files".into(),
        root: Some(owner.folder()),
        read_only: false,
        shared_with: None,
    };
    change(&mut location);
    let location = owner.index.put_location(location).unwrap();
    owner.indexer.watch(location.no);
    let raw = raw_writer(&owner).await;
    (owner, location, raw)
}

fn create(no: u64, location: &Location, name: &str) -> Op {
    let bytes = Bytes::from_static(b"bytes");
    let content = crate::books::content(&bytes, Some(bytes.clone()));
    Op {
        no,
        location: location.id,
        log_id: 1,
        change: crate::books::create(FileId::ROOT, name, content),
    }
}

async fn deliver((send, recv): &mut (SendStream, RecvStream), ops: Vec<Op>) -> Vec<Outcome> {
    let count = ops.len();
    wire::send_frame(send, &Operations::Whole { settled_below: 0, ops }).await.unwrap();
    let mut outcomes = vec![];
    while outcomes.len() < count {
        let answer = tokio::time::timeout(PATIENCE, wire::receive_frame(recv)).await.unwrap();
        let Ok(Response::Outcomes(some)) = answer else { panic!("{answer:?}") };
        outcomes.extend(some.into_iter().map(|(_, outcome)| outcome));
    }
    outcomes
}

/// Delivers until the location's folder is there.
async fn deliver_ready(stream: &mut (SendStream, RecvStream), op: &Op) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match deliver(stream, vec![op.clone()]).await.remove(0) {
            Outcome::Later(_) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            outcome => return outcome,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_delivered_twice_is_applied_once() {
    let (owner, location, (_endpoint, connection)) = owner_and_stream(|_| {}).await;
    let mut stream = begin(&connection, 1).await;
    let op = create(1, &location, "file");
    let first = deliver_ready(&mut stream, &op).await;
    assert!(matches!(first, Outcome::Applied(_)), "{first:?}");
    assert_eq!(deliver(&mut stream, vec![op.clone()]).await, std::slice::from_ref(&first));
    fs::write(owner.folder().join("file"), b"changed since").unwrap();
    let mut stream = begin(&connection, 2).await;
    assert_eq!(deliver(&mut stream, vec![op]).await, [first], "in another session");
    let all = tree(&owner.folder());
    assert_eq!(all, BTreeMap::from([("file".to_owned(), b"changed since".to_vec())]));
    owner.indexer.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_written_is_refused_and_nothing_is_changed() {
    let read_only = |l: &mut vfs_core::index::NewLocation| l.read_only = true;
    let unshared = |l: &mut vfs_core::index::NewLocation| l.shared_with = Some(vec![]);
    let (owner, location, (_endpoint, connection)) = owner_and_stream(read_only).await;
    refused(&owner, &location, &connection).await;
    let (owner, location, (_endpoint, connection)) = owner_and_stream(unshared).await;
    refused(&owner, &location, &connection).await;
    let (owner, mut location, (_endpoint, connection)) = owner_and_stream(|_| {}).await;
    let unknown = Location { id: vfs_core::model::LocationId([9; 16]), ..(*location).clone() };
    location = Arc::new(unknown);
    refused(&owner, &location, &connection).await;
}

async fn refused(owner: &Device, location: &Location, connection: &iroh::endpoint::Connection) {
    let mut stream = begin(connection, 1).await;
    let mkdir = Op {
        no: 2,
        location: location.id,
        log_id: 1,
        change: Change::Create {
            at: crate::books::place(FileId::ROOT, "dir"),
            file: crate::books::drawn(),
            what: ops::New::Directory,
            perm: 0o755,
            mtime: vfs_core::model::Time::now(),
        },
    };
    let outcomes = deliver(&mut stream, vec![create(1, location, "file"), mkdir]).await;
    assert_eq!(outcomes, vec![Outcome::Refused(ops::Refusal::ReadOnly); 2]);
    assert_eq!(tree(&owner.folder()).len(), 0);
    owner.indexer.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_leads_nowhere_outside_of_its_location() {
    let (owner, location, (_endpoint, connection)) = owner_and_stream(|_| {}).await;
    let outside = owner.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, owner.folder().join("link")).unwrap();
    let mut stream = begin(&connection, 1).await;
    let outcome = deliver_ready(&mut stream, &create(1, &location, "file")).await;
    assert!(matches!(outcome, Outcome::Applied(_)));
    let mut link = None;
    until("the link is in the index", || {
        let view = owner.index.view().unwrap();
        link = view.entry(location.no, FileId::ROOT, b"link").unwrap();
        link.is_some()
    })
    .await;
    let mut op = create(2, &location, "file");
    let Change::Create { at, .. } = &mut op.change else { panic!() };
    at.dir = link.unwrap().file_id;
    let outcome = deliver(&mut stream, vec![op]).await.remove(0);
    assert!(!matches!(&outcome, Outcome::Applied(a) if a.conflict.is_none()), "{outcome:?}");
    assert_eq!(tree(&outside).len(), 0);
    assert!(Name::new(&b".."[..]).is_none() && Name::new(&b"a/b"[..]).is_none());
    owner.indexer.stop();
}
