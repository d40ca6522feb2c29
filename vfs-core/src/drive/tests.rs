//! The drive as a mount would use it: one device with an own location on a real
//! disk, and a peer's location that exists as rows of the index and bytes of a
//! source that can be switched off.

mod events;
mod growth;
mod hydration;
mod listing;
mod own;
mod owner;
mod remote;
mod shown;
mod top;
mod writes;

use super::*;
use crate::content::{Cache, ContentConfig, Manifest, Manifests, OwnFiles};
use crate::index::{LogRow, NewLocation, ROOT_PARENT, open_store};
use crate::indexer::IndexerConfig;
use crate::library::{Member, Stamp as Clock};
use crate::model::{Attr, ContentId, DeviceId, Entry, FileId, LocationId, Seq, Time};
use crate::outbox::OutboxConfig;
use crate::source::{BoxFuture, ContentSource, FetchError, Fetched, Version};
use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const ME: DeviceId = DeviceId([1; 32]);
const PEER: DeviceId = DeviceId([2; 32]);
const USER: (u32, u32) = (4321, 8765);
const MTIME: Time = Time { secs: 1_700_000_000, nanos: 123_456_789 };

/// A peer's bytes.
#[derive(Default)]
struct Peer {
    online: AtomicBool,
    files: Mutex<HashMap<FileId, Vec<u8>>>,
    /// The stamps that it has these under now; any other one is stale.
    stamps: Mutex<HashMap<FileId, crate::model::Stamp>>,
}

impl ContentSource for Peer {
    fn is_reachable(&self, device: DeviceId) -> bool {
        device == PEER && self.online.load(Ordering::SeqCst)
    }

    fn fetch<'a>(
        &'a self,
        device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        Box::pin(async move {
            if !self.is_reachable(device) {
                return Err(FetchError::Unreachable);
            }
            let files = self.files.lock().unwrap();
            let bytes = files.get(&version.file).ok_or(FetchError::Stale)?;
            let stamps = self.stamps.lock().unwrap();
            if stamps.get(&version.file).is_some_and(|now| *now != version.stamp) {
                return Err(FetchError::Stale);
            }
            let proof = match version.content {
                Some(_) => Manifest::of_bytes(bytes).1.proof(range.clone()).unwrap_or_default(),
                None => Vec::new(),
            };
            let part = bytes[range.start as usize..range.end as usize].to_vec();
            Ok(Fetched { bytes: part.into(), proof })
        })
    }
}

struct Bench {
    drive: Arc<Drive>,
    index: Index,
    indexer: Arc<Indexer>,
    library: Arc<Library>,
    outbox: Arc<Outbox>,
    peer: Arc<Peer>,
    /// The folder of the own location.
    disk: PathBuf,
    own: LocationNo,
    remote: LocationNo,
    runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.indexer.stop();
    }
}

fn config() -> DriveConfig {
    let (uid, gid) = USER;
    DriveConfig { uid, gid, read_only: false, foreign_symlinks: ForeignSymlinks::default() }
}

fn member(id: DeviceId, name: &str) -> Member {
    let stamp = Clock { wall_ms: 1_600_000_000_000, count: 0 };
    let (addresses, last_seen_ms) = Default::default();
    Member { id, name: name.into(), life: 0, stamp, removed: false, addresses, last_seen_ms }
}

impl Bench {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: DriveConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let disk = path("disk");
        let index = Index::open(open_store(&path("index")).unwrap().store, ME).unwrap();
        let library = Arc::new(Library::open(&dir.path().join("library.json")).unwrap());
        library.update(|s| s.members.extend([member(ME, "here"), member(PEER, "there")])).unwrap();
        let own = index
            .put_location(NewLocation {
                id: LocationId([1; 16]),
                owner: ME,
                name: "mine".into(),
                root: Some(disk.clone()),
                read_only: false,
                shared_with: None,
            })
            .unwrap()
            .no;
        let remote = index
            .put_location(NewLocation {
                id: LocationId([2; 16]),
                owner: PEER,
                name: "theirs".into(),
                root: None,
                read_only: false,
                shared_with: None,
            })
            .unwrap()
            .no;
        let manifests = Arc::new(Manifests::open(&path("manifests")).unwrap());
        let indexer =
            Indexer::start(index.clone(), Arc::clone(&manifests), IndexerConfig::default());
        indexer.watch(own);
        let own_files = Arc::new(OwnFiles::new(index.clone(), Arc::clone(&indexer), manifests));
        let cache = Arc::new(Cache::open(&path("cache"), 1 << 30));
        let peer = Arc::new(Peer::default());
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let source: Arc<dyn ContentSource> = Arc::clone(&peer) as _;
        let limits =
            ContentConfig { read_deadline: Duration::from_secs(2), ..ContentConfig::default() };
        let content =
            Content::new(index.clone(), own_files, cache, source, limits, runtime.handle().clone());
        let writing = OutboxConfig {
            owner_deadline: Duration::from_secs(2),
            max_ranges: 1_000,
            ..OutboxConfig::default()
        };
        let (outbox, _) = Outbox::open(&path("outbox"), index.clone(), writing).unwrap();
        let drive = Drive::new(
            index.clone(),
            Arc::clone(&indexer),
            content,
            Arc::clone(&library),
            Arc::clone(&outbox),
            Arc::default(),
            config,
        );
        wait_until("the own location is there", || indexer.root(own).is_ok());
        Self { drive, index, indexer, library, outbox, peer, disk, own, remote, runtime, _dir: dir }
    }

    fn lookup(&self, path: &[&str]) -> FsResult<Found> {
        let mut found = self.drive.getattr(InodeNo::ROOT, None)?;
        for name in path {
            found = self.drive.lookup(found.ino, name.as_bytes())?;
        }
        Ok(found)
    }

    fn ino(&self, path: &[&str]) -> InodeNo {
        self.lookup(path).unwrap_or_else(|e| panic!("{path:?}: {e}")).ino
    }

    /// The folder of the own location.
    fn mine(&self) -> InodeNo {
        self.ino(&["here", "mine"])
    }

    /// The folder of the peer's location.
    fn theirs(&self) -> InodeNo {
        self.ino(&["there", "theirs"])
    }

    fn in_mine(&self, name: &str) -> FsResult<Found> {
        self.drive.lookup(self.mine(), name.as_bytes())
    }

    fn create(&self, name: &str, flags: OpenFlags) -> FsResult<(Found, Opened)> {
        self.drive.create(&caller(), self.mine(), name.as_bytes(), 0o644, flags)
    }

    /// A file of the own location, written by its owner's programs.
    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.disk.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn read_all(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        let opened = self.drive.open(ino, OpenFlags::READ)?;
        let read = self.read(opened.handle, 0, 1 << 24);
        self.drive.release(opened.handle);
        read
    }

    fn read(&self, handle: HandleId, offset: u64, len: usize) -> FsResult<Vec<u8>> {
        match self.drive.try_read(handle, offset, len) {
            Some(bytes) => bytes.map(Vec::from),
            None => self.runtime.block_on(self.drive.read(handle, offset, len)).map(Vec::from),
        }
    }

    /// Names and numbers of a directory, `step` items a call.
    fn list(&self, ino: InodeNo, detail: Detail, step: usize) -> Vec<(String, InodeNo)> {
        let handle = self.drive.opendir(ino).unwrap();
        let listed = self.list_from(handle, 0, detail, step);
        self.drive.releasedir(handle);
        listed
    }

    fn list_from(
        &self,
        handle: HandleId,
        mut cookie: u64,
        detail: Detail,
        step: usize,
    ) -> Vec<(String, InodeNo)> {
        let mut all = Vec::new();
        loop {
            let before = all.len();
            self.drive
                .readdir(handle, cookie, detail, &mut |item| {
                    if all.len() - before == step {
                        return ControlFlow::Break(());
                    }
                    if let Some(found) = item.found {
                        assert_eq!(found.ino, item.ino);
                        assert_eq!(found.attr.file_type, item.file_type);
                    }
                    all.push((String::from_utf8_lossy(item.name).into_owned(), item.ino));
                    cookie = item.next_cookie;
                    ControlFlow::Continue(())
                })
                .unwrap();
            if all.len() == before {
                return all;
            }
        }
    }

    fn names(&self, ino: InodeNo) -> Vec<String> {
        let mut names: Vec<_> =
            self.list(ino, Detail::Names, 100).into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    /// What the kernel is told, until it is told this.
    fn told_until(&self, changes: &mut Subscription, wanted: &Invalidation) -> Vec<Invalidation> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut told = Vec::new();
        while !told.contains(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = async { tokio::time::timeout(left, changes.next()).await };
            let Ok(Some(crate::changes::Next::Batch(batch))) = self.runtime.block_on(next) else {
                panic!("waited in vain for {wanted:?}, but was told {told:?}");
            };
            told.extend(self.drive.invalidations_of(&batch));
        }
        told
    }

    /// Rows of the peer's location, with its folder.
    fn replicate(&self, rows: Vec<(u64, &str, Entry)>) {
        let rows = rows.into_iter().map(|(parent, name, entry)| (parent, name, Some(entry)));
        self.replicate_changes(rows.collect());
    }

    fn replicate_changes(&self, rows: Vec<(u64, &str, Option<Entry>)>) {
        let Seq(head) = self.index.head(self.remote);
        let root = (ROOT_PARENT.0, "root", Some(remote_entry(1, FileType::Directory, 0)));
        let rows: Vec<_> = std::iter::once(root)
            .chain(rows)
            .zip(head + 1..)
            .map(|((parent, name, entry), seq)| LogRow {
                seq: Seq(seq),
                parent: FileId(parent),
                name: Name::new(name.as_bytes()).unwrap(),
                entry,
            })
            .collect();
        let upto = rows.last().unwrap().seq;
        if head == 0 {
            self.index.reset_replica(self.remote, 77).unwrap();
        }
        self.index.apply_replica(self.remote, 77, rows, upto).unwrap();
    }

    /// A file of the peer with these bytes, hashed.
    fn peer_file(&self, id: u64, bytes: &[u8]) -> Entry {
        self.peer.online.store(true, Ordering::SeqCst);
        self.peer.files.lock().unwrap().insert(FileId(id), bytes.to_vec());
        Entry {
            content: Some(ContentId::of(bytes)),
            ..remote_entry(id, FileType::File, bytes.len() as u64)
        }
    }
}

fn remote_entry(id: u64, file_type: FileType, size: u64) -> Entry {
    let attr = Attr {
        file_type,
        perm: if file_type == FileType::Directory { 0o751 } else { 0o640 },
        uid: 7,
        gid: 8,
        nlink: 1,
        size,
        blocks: size.div_ceil(512),
        mtime: MTIME,
        ctime: MTIME,
        btime: None,
        rdev: 0,
    };
    let file_id = FileId(id);
    Entry { file_id, disk_ino: 1000 + id, generation: 1, attr, content: None, target: None }
}

fn remote_link(id: u64, target: &str) -> Entry {
    let target = Some(target.as_bytes().into());
    Entry { target, ..remote_entry(id, FileType::Symlink, 1) }
}

/// Whoever runs the tests.
fn caller() -> Caller {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    Caller { uid: uid.as_raw(), gid: gid.as_raw(), pid: 1 }
}

fn kind<T>(result: FsResult<T>) -> Kind {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(e) => e.kind(),
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const WRITE: OpenFlags = OpenFlags { write: true, read: false, ..OpenFlags::READ };
const READ_WRITE: OpenFlags = OpenFlags { write: true, ..OpenFlags::READ };
