//! The device that writes: a drive over a replica, and its outbox.

use super::link::Wire;
use super::tree::{Seen, Tree, What};
use super::{DEADLINE, LOCATION, OWNER, WRITER};
use crate::content::{Cache, Content, ContentConfig, Manifests, OwnFiles};
use crate::drive::{
    Caller, Detail, Drive, DriveConfig, ForeignSymlinks, Found, HandleId, InodeNo, OpenFlags,
};
use crate::error::{FsResult, Kind};
use crate::index::{Index, NewLocation, open_store};
use crate::indexer::{Indexer, IndexerConfig};
use crate::library::{Library, Member, Stamp};
use crate::model::{DeviceId, FileType, LocationNo};
use crate::outbox::{Outbox, OutboxConfig, OutboxError};
use crate::source::ContentSource;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub(super) const WRITE: OpenFlags = OpenFlags { write: true, ..OpenFlags::READ };

/// Some drafts have room in it, and some get files.
const MEMORY_BYTES: u64 = 3000;

/// What ends with the process.
struct Running {
    drive: Arc<Drive>,
    outbox: Arc<Outbox>,
}

pub(super) struct Writer {
    running: Option<Running>,
    pub index: Index,
    indexer: Arc<Indexer>,
    library: Arc<Library>,
    manifests: Arc<Manifests>,
    cache: Arc<Cache>,
    wire: Arc<Wire>,
    pub no: LocationNo,
    dir: PathBuf,
}

/// For all histories: content is fetched on it.
pub(super) fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().unwrap()
    })
}

fn member(id: DeviceId, name: &str) -> Member {
    let stamp = Stamp { wall_ms: 1_600_000_000_000, count: 0 };
    let (addresses, last_seen_ms) = Default::default();
    Member { id, name: name.into(), life: 0, stamp, removed: false, addresses, last_seen_ms }
}

pub(super) fn caller() -> Caller {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    Caller { uid: uid.as_raw(), gid: gid.as_raw(), pid: 1 }
}

impl Writer {
    pub fn new(dir: PathBuf, wire: Arc<Wire>) -> Self {
        let path = |name: &str| {
            let path = dir.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let index = Index::open(open_store(&path("index")).unwrap().store, WRITER).unwrap();
        let library = Arc::new(Library::open(&path("library").join("library.json")).unwrap());
        let members = [member(WRITER, "here"), member(OWNER, "there")];
        library.update(|state| state.members.extend(members)).unwrap();
        let location = NewLocation {
            id: LOCATION,
            owner: OWNER,
            name: "theirs".into(),
            root: None,
            read_only: false,
            shared_with: None,
        };
        let no = index.put_location(location).unwrap().no;
        let manifests = Arc::new(Manifests::open(&path("manifests")).unwrap());
        let config = IndexerConfig::default();
        let indexer = Indexer::start(index.clone(), Arc::clone(&manifests), config);
        let cache = Arc::new(Cache::open(&path("cache"), 1 << 30));
        let running = None;
        let mut writer = Self { running, index, indexer, library, manifests, cache, wire, no, dir };
        writer.open();
        writer
    }

    /// The process ends without any warning and begins again. What it had not given to the
    /// kernel is gone; the replica stays as it was.
    pub fn restart(&mut self) {
        self.running = None;
        self.open();
    }

    fn open(&mut self) {
        let outbox = self.open_outbox();
        let own = OwnFiles::new(
            self.index.clone(),
            Arc::clone(&self.indexer),
            Arc::clone(&self.manifests),
        );
        let source: Arc<dyn ContentSource> = Arc::clone(&self.wire) as _;
        let limits =
            ContentConfig { read_deadline: Duration::from_secs(10), ..ContentConfig::default() };
        let (index, cache) = (self.index.clone(), Arc::clone(&self.cache));
        let runtime = runtime().handle().clone();
        let content = Content::new(index, Arc::new(own), cache, source, limits, runtime);
        let Caller { uid, gid, .. } = caller();
        let foreign_symlinks = ForeignSymlinks::AsIs;
        let config = DriveConfig { uid, gid, read_only: false, foreign_symlinks };
        let drive = Drive::new(
            self.index.clone(),
            Arc::clone(&self.indexer),
            content,
            Arc::clone(&self.library),
            Arc::clone(&outbox),
            Arc::default(),
            config,
        );
        self.running = Some(Running { drive, outbox });
    }

    fn open_outbox(&self) -> Arc<Outbox> {
        // New files wait for their first close and for nothing else.
        let hold_back = Duration::from_secs(1 << 20);
        let config = OutboxConfig {
            hold_back,
            min_free_bytes: 0,
            memory_bytes: MEMORY_BYTES,
            ..OutboxConfig::default()
        };
        let deadline = Instant::now() + DEADLINE;
        loop {
            let index = self.index.clone();
            match Outbox::open_untended(&self.dir.join("outbox"), index, config.clone()) {
                Ok((outbox, report)) => {
                    let sound = report.lost.is_empty() && report.set_aside.is_empty();
                    assert!(sound && !report.torn_tail, "{report:?}");
                    return outbox;
                }
                // A task of a read that nobody waits for any more has the last one still.
                Err(OutboxError::InUse { .. }) => {
                    assert!(Instant::now() < deadline, "somebody keeps the outbox");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn drive(&self) -> &Drive {
        &self.running.as_ref().unwrap().drive
    }

    pub fn outbox(&self) -> &Arc<Outbox> {
        &self.running.as_ref().unwrap().outbox
    }

    /// What happens by itself, in more time than anything waits for.
    pub fn tend(&self) {
        self.outbox().tend_for(Duration::from_secs(1 << 10)).unwrap();
    }

    pub fn root(&self) -> InodeNo {
        let device = self.drive().lookup(InodeNo::ROOT, b"there").unwrap().ino;
        self.drive().lookup(device, b"theirs").unwrap().ino
    }

    pub fn lookup(&self, path: &[&str]) -> FsResult<Found> {
        let mut found = self.drive().getattr(self.root(), None)?;
        for name in path {
            found = self.drive().lookup(found.ino, name.as_bytes())?;
        }
        Ok(found)
    }

    pub fn dir(&self, path: &[&str]) -> FsResult<InodeNo> {
        Ok(self.lookup(path)?.ino)
    }

    pub fn read(&self, handle: HandleId) -> FsResult<Vec<u8>> {
        match self.drive().try_read(handle, 0, 1 << 24) {
            Some(bytes) => bytes.map(Vec::from),
            None => runtime().block_on(self.drive().read(handle, 0, 1 << 24)).map(Vec::from),
        }
    }

    pub fn read_file(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        let opened = self.drive().open(ino, OpenFlags::READ)?;
        let read = self.read(opened.handle);
        self.drive().release(opened.handle);
        read
    }

    /// Everything that programs see.
    pub fn tree(&self) -> Result<Tree, String> {
        let mut tree = Tree::new();
        self.walk(self.root(), "", &mut tree)?;
        Ok(tree)
    }

    fn walk(&self, dir: InodeNo, prefix: &str, tree: &mut Tree) -> Result<(), String> {
        for name in self.names(dir)? {
            let path = format!("{prefix}{name}");
            let failed = |e: crate::error::FsError| format!("{path}: {e}");
            let found = self.drive().lookup(dir, name.as_bytes()).map_err(failed)?;
            let again = self.drive().getattr(found.ino, None).map_err(failed)?;
            if (again.ino, again.attr) != (found.ino, found.attr) {
                return Err(format!("{path}: lookup gives {found:?} and getattr {again:?}"));
            }
            let what = match found.attr.file_type {
                FileType::Directory => {
                    self.walk(found.ino, &format!("{path}/"), tree)?;
                    What::Dir
                }
                FileType::Symlink => {
                    let target = self.drive().readlink(found.ino).map_err(failed)?;
                    What::Link(String::from_utf8_lossy(&target).into_owned())
                }
                _ => What::File(self.read_file(found.ino).map_err(|e| e.kind())),
            };
            if let What::File(Ok(bytes)) = &what
                && bytes.len() as u64 != found.attr.size
            {
                return Err(format!("{path}: {} bytes are read of {found:?}", bytes.len()));
            }
            let attr = &found.attr;
            let (perm, mtime, nlink) = (attr.perm, attr.mtime, attr.nlink);
            tree.insert(path.clone(), Seen { what, perm, mtime, nlink, ino: found.ino.0 });
        }
        Ok(())
    }

    fn names(&self, dir: InodeNo) -> Result<Vec<String>, String> {
        let handle = self.drive().opendir(dir).map_err(|e| e.to_string())?;
        let (mut names, mut cookie) = (Vec::new(), 0);
        loop {
            let before = names.len();
            let listed = self.drive().readdir(handle, cookie, Detail::Names, &mut |item| {
                if names.len() - before == 100 {
                    return ControlFlow::Break(());
                }
                names.push(String::from_utf8_lossy(item.name).into_owned());
                cookie = item.next_cookie;
                ControlFlow::Continue(())
            });
            listed.map_err(|e| e.to_string())?;
            if names.len() == before {
                break;
            }
        }
        self.drive().releasedir(handle);
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    /// Whether bytes that this device has not got may be missing for a good reason.
    pub fn may_lack(&self, why: Kind) -> bool {
        match why {
            Kind::HostDown => !self.wire.is_online(),
            // What the owner has done already is not in the replica yet.
            Kind::Stale => self.wire.head_of_owner() != Some(self.index.head(self.no)),
            _ => false,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.running = None;
        self.indexer.stop();
    }
}
