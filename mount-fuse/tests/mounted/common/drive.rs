//! A drive as the daemon wires it: one own location on a real disk, and one of a peer that
//! exists as rows of the index and as bytes in memory.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vfs_core::content::{Cache, Content, ContentConfig, Manifest, Manifests, OwnFiles};
use vfs_core::drive::{Drive, DriveConfig, ForeignSymlinks};
use vfs_core::index::{Index, LogRow, NewLocation, ROOT_PARENT, open_store};
use vfs_core::indexer::{Indexer, IndexerConfig};
use vfs_core::library::{Library, Member, Stamp};
use vfs_core::model::{
    Attr, DeviceId, Entry, FileId, FileType, LocationId, LocationNo, Name, Seq, Time,
};
use vfs_core::outbox::{Outbox, OutboxConfig};
use vfs_core::source::{BoxFuture, ContentSource, FetchError, Fetched, Version};

const ME: DeviceId = DeviceId([1; 32]);
const PEER: DeviceId = DeviceId([2; 32]);
/// Longer than any test waits: what ends earlier was ended by something else.
const READ_DEADLINE: Duration = Duration::from_secs(60);

/// The own location's folder, through the mount.
pub fn own_folder(mountpoint: &Path) -> PathBuf {
    mountpoint.join("here/mine")
}

/// The peer's location's folder, through the mount.
pub fn peer_folder(mountpoint: &Path) -> PathBuf {
    mountpoint.join("there/theirs")
}

/// What the drive is made of, beside itself.
pub struct Parts {
    pub index: Index,
    indexer: Arc<Indexer>,
    peer: Arc<Peer>,
    mine: LocationNo,
    theirs: LocationNo,
}

impl Drop for Parts {
    fn drop(&mut self) {
        self.indexer.stop();
    }
}

/// Bytes with their hash tree.
type PeerFile = (Vec<u8>, Manifest);

/// The peer's files. A file that is in the index and not here is never answered.
#[derive(Default)]
struct Peer {
    files: Mutex<HashMap<FileId, Arc<PeerFile>>>,
}

impl ContentSource for Peer {
    fn is_reachable(&self, device: DeviceId) -> bool {
        device == PEER
    }

    fn fetch<'a>(
        &'a self,
        _device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        let file = self.files.lock().unwrap().get(&version.file).cloned();
        Box::pin(async move {
            let Some(file) = file else { return std::future::pending().await };
            let (bytes, manifest) = &*file;
            let proof = match version.content {
                Some(_) => manifest.proof(range.clone()).unwrap_or_default(),
                None => Vec::new(),
            };
            let part = bytes[range.start as usize..range.end as usize].to_vec();
            Ok(Fetched { bytes: part.into(), proof })
        })
    }
}

/// A drive whose own location is `disk`; its state is in `data`, and is found there again.
pub fn drive_over(
    disk: &Path,
    data: &Path,
    runtime: &tokio::runtime::Handle,
) -> (Arc<Drive>, Parts) {
    let index = Index::open(open_store(&made(data, "index")).unwrap().store, ME).unwrap();
    let library = Arc::new(Library::open(&data.join("library.json")).unwrap());
    library
        .update(|state| state.members = vec![member(ME, "here"), member(PEER, "there")])
        .unwrap();
    let mine = location(&index, ME, "mine", Some(disk.canonicalize().unwrap()));
    let theirs = location(&index, PEER, "theirs", None);
    let manifests = Arc::new(Manifests::open(&made(data, "manifests")).unwrap());
    let indexer = Indexer::start(index.clone(), Arc::clone(&manifests), IndexerConfig::default());
    indexer.watch(mine);
    let own = Arc::new(OwnFiles::new(index.clone(), Arc::clone(&indexer), manifests));
    let cache = Arc::new(Cache::open(&made(data, "cache"), 1 << 30));
    let peer = Arc::new(Peer::default());
    let source: Arc<dyn ContentSource> = Arc::clone(&peer) as _;
    let limits = ContentConfig { read_deadline: READ_DEADLINE, ..ContentConfig::default() };
    let content = Content::new(index.clone(), own, cache, source, limits, runtime.clone());
    let config = DriveConfig {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        read_only: false,
        foreign_symlinks: ForeignSymlinks::default(),
    };
    let mut outbox = None;
    // The one of a drive that was just dropped may be closing still.
    crate::common::eventually("the outbox is free", || {
        let opened = Outbox::open(&made(data, "outbox"), index.clone(), OutboxConfig::default());
        outbox = opened.ok().map(|(outbox, _)| outbox);
        outbox.is_some()
    });
    let outbox = outbox.unwrap();
    let drive = Drive::new(
        index.clone(),
        Arc::clone(&indexer),
        content,
        library,
        outbox,
        Arc::default(),
        config,
    );
    crate::common::eventually("the own location is there", || indexer.root(mine).is_ok());
    let parts = Parts { index, indexer, peer, mine, theirs };
    parts.apply(vec![row(ROOT_PARENT.0, "root", entry(1, FileType::Directory, 0))]);
    (drive, parts)
}

fn made(data: &Path, name: &str) -> PathBuf {
    let path = data.join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn member(id: DeviceId, name: &str) -> Member {
    let stamp = Stamp { wall_ms: 1_600_000_000_000, count: 0 };
    let (addresses, last_seen_ms) = Default::default();
    Member { id, name: name.into(), life: 0, stamp, removed: false, addresses, last_seen_ms }
}

fn location(index: &Index, owner: DeviceId, name: &str, root: Option<PathBuf>) -> LocationNo {
    let new = NewLocation {
        id: LocationId([owner.0[0]; 16]),
        owner,
        name: name.into(),
        root,
        read_only: false,
        shared_with: None,
    };
    index.put_location(new).unwrap().no
}

fn entry(id: u64, file_type: FileType, size: u64) -> Entry {
    let then = Time { secs: 1_700_000_000, nanos: 123_456_789 };
    let attr = Attr {
        file_type,
        perm: if file_type == FileType::Directory { 0o755 } else { 0o644 },
        uid: 7,
        gid: 8,
        nlink: 1,
        size,
        blocks: size.div_ceil(512),
        mtime: then,
        ctime: then,
        btime: None,
        rdev: 0,
    };
    let file_id = FileId(id);
    Entry { file_id, disk_ino: 1000 + id, generation: 1, attr, content: None, target: None }
}

fn row(parent: u64, name: &str, entry: Entry) -> LogRow {
    let name = Name::new(name.as_bytes()).unwrap();
    LogRow { seq: Seq(0), parent: FileId(parent), name, entry: Some(entry) }
}

/// File id, generation and size.
type Numbers = (u64, u32, u64);

impl Parts {
    /// A hashed file of the peer, whose bytes it serves.
    pub fn add_peer_file(&self, id: u64, name: &str, bytes: &[u8]) {
        let (content, manifest) = Manifest::of_bytes(bytes);
        let file = Arc::new((bytes.to_vec(), manifest));
        self.peer.files.lock().unwrap().insert(FileId(id), file);
        let content = Some(content);
        let entry = Entry { content, ..entry(id, FileType::File, bytes.len() as u64) };
        self.apply(vec![row(1, name, entry)]);
    }

    /// A file of the peer, whose bytes never come.
    pub fn add_stalled_peer_file(&self, id: u64, name: &str, size: u64) {
        self.apply(vec![row(1, name, entry(id, FileType::File, size))]);
    }

    /// A name of the peer's location is gone.
    pub fn remove_peer_file(&self, name: &str) {
        let gone = LogRow { entry: None, ..row(1, name, entry(2, FileType::File, 0)) };
        self.apply(vec![gone]);
    }

    /// Rows of the peer's folder: of each name its file id, generation and size, or that it is
    /// gone. File ids from 1000 on are directories.
    pub fn change_peer(&self, names: &[(&str, Option<Numbers>)]) {
        let rows = names.iter().map(|(name, file)| {
            let (id, generation, size) = file.unwrap_or((2, 1, 0));
            let file_type = if id >= 1000 { FileType::Directory } else { FileType::File };
            let now = Entry { generation, ..entry(id, file_type, size) };
            LogRow { entry: file.map(|_| now.clone()), ..row(1, name, now) }
        });
        self.apply(rows.collect());
    }

    /// The size that the index knows of an own file.
    pub fn own_size(&self, name: &str) -> Option<u64> {
        let view = self.index.view().unwrap();
        let entry = view.entry(self.mine, FileId::ROOT, name.as_bytes()).unwrap();
        entry.map(|entry| entry.attr.size)
    }

    fn apply(&self, mut rows: Vec<LogRow>) {
        const LOG: u64 = 77;
        let Seq(head) = self.index.head(self.theirs);
        if head == 0 {
            self.index.reset_replica(self.theirs, LOG).unwrap();
        }
        for (row, seq) in rows.iter_mut().zip(head + 1..) {
            row.seq = Seq(seq);
        }
        let upto = rows.last().unwrap().seq;
        self.index.apply_replica(self.theirs, LOG, rows, upto).unwrap();
    }
}
