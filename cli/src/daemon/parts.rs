//! What a daemon is made of, and how the parts are joined.
//!
//! Order of making: identity, library, index, indexer, own files, applier, outbox, cache,
//! own locations, network, content. The own locations are there before a peer
//! can announce any. Closing goes the other way round: mounts, network, outbox,
//! indexer, index, so that nothing writes into what is closed already.

use super::applying::Applying;
use super::check::Checking;
use super::guard::Guard;
use super::mounts::Mounts;
use crate::config::Config;
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use sync::{Node, NodeConfig, Parts, SyncError};
use tokio::sync::watch;
use vfs_core::apply::Applier;
use vfs_core::content::pins::{PinError, PinFile, Pins};
use vfs_core::content::{Cache, Content, ContentConfig, Lender, Limits, Manifests, OwnFiles};
use vfs_core::index::{Index, IndexError, NewLocation, StoreError, open_store};
use vfs_core::indexer::{Indexer, IndexerConfig};
use vfs_core::library::{Library, LibraryError, OwnLocation};
use vfs_core::locks::Locks;
use vfs_core::model::{DeviceId, Location, LocationNo, Time};
use vfs_core::outbox::{Outbox, OutboxConfig, OutboxError, Report};

/// The automatic limit of the cache: a tenth of its disk, at most this.
const AUTOMATIC_CACHE_BYTES: u64 = 50 << 30;

/// What the cache leaves free by itself: a fiftieth of its disk within these, but not more than a
/// tenth of a small one. More than staging leaves, so that the cache gives way to writes.
const AUTOMATIC_MIN_FREE_BYTES: std::ops::RangeInclusive<u64> = 512 << 20..=4 << 30;

/// One device, running.
pub struct Daemon {
    pub dir: DataDir,
    pub config: Config,
    pub me: DeviceId,
    pub library: Arc<Library>,
    pub index: Index,
    pub indexer: Arc<Indexer>,
    pub node: Arc<Node>,
    pub cache: Arc<Cache>,
    pub content: Arc<Content>,
    pub pins: Arc<Pins>,
    pub manifests: Arc<Manifests>,
    pub outbox: Arc<Outbox>,
    /// What was found when it was opened.
    pub outbox_report: Report,
    pub applying: Arc<Applying>,
    /// What programs locked through any mount.
    pub locks: Arc<Locks>,
    pub mounts: Mounts,
    pub guard: Guard,
    pub checking: Checking,
    pub runtime: tokio::runtime::Handle,
    pub started: Time,
    /// Where a corrupt index was set aside at this start.
    pub set_aside: Option<PathBuf>,
    stop: watch::Sender<bool>,
}

impl Daemon {
    /// Opens everything; own locations are watched from now on.
    pub async fn open(dir: &DataDir, config: &Config) -> Outcome<Arc<Self>> {
        let secret_key = identity(dir)?;
        let me = sync::device_id(&secret_key);
        let library = Arc::new(Library::open(&dir.library()).map_err(library_failure)?);
        let opened = open_store(&dir.subdirectory(dir.index())?).map_err(store_failure)?;
        let index = Index::open(opened.store, me).map_err(index_failure)?;
        let manifests = Arc::new(open_manifests(dir, dir.manifests())?);
        let indexer = Indexer::start(index.clone(), Arc::clone(&manifests), indexer_config(config));
        let own =
            Arc::new(OwnFiles::new(index.clone(), Arc::clone(&indexer), Arc::clone(&manifests)));
        let applying = Arc::new(open_applier(dir, &index, &indexer, Arc::clone(&manifests))?);
        let (outbox, outbox_report) = open_outbox(dir, &index, config)?;
        let cache_dir = dir.subdirectory(dir.cache())?;
        let pin_file = PinFile::open(&dir.pins()).map_err(pin_failure)?;
        let limits = Limits {
            limit_bytes: config.cache_limit().unwrap_or_else(|| automatic_limit(dir)),
            min_free_bytes: config.cache_min_free().unwrap_or_else(|| automatic_min_free(dir)),
            holds: pin_file.holds(),
        };
        let cache = Arc::new(Cache::open_within(&cache_dir, limits));
        let lender =
            Lender::new(index.clone(), Arc::clone(&cache), open_manifests(dir, dir.lent())?);
        let parts = Parts {
            library: Arc::clone(&library),
            index: index.clone(),
            own: Arc::clone(&own),
            lender: Some(Arc::new(lender)),
            outbox: Some(Arc::clone(&outbox) as _),
            applier: Some(Arc::clone(&applying) as _),
            scratch: dir.index(),
        };
        adopt_locations(&library, &index, &indexer)?;
        let node = Node::start(node_config(config, secret_key), parts)
            .await
            .map_err(super::members::failure)?;
        let runtime = tokio::runtime::Handle::current();
        let content = Content::new(
            index.clone(),
            own,
            Arc::clone(&cache),
            node.source(),
            ContentConfig {
                read_deadline: config.read_deadline(),
                hydration: config.hydration(),
                ..ContentConfig::default()
            },
            runtime.clone(),
        );
        // Without a mount as well: what is delivered or exported may need the bytes beneath.
        outbox.attach(&content);
        let pins = Pins::new(pin_file, Arc::clone(&content));
        runtime.spawn(Arc::clone(&pins).tend());
        let locks = Arc::new(Locks::default());
        locks.attach(node.coordinator());
        runtime.spawn(Arc::clone(&locks).tend());
        Ok(Arc::new(Self {
            dir: dir.clone(),
            config: config.clone(),
            me,
            library,
            index,
            indexer,
            node,
            cache,
            content,
            pins,
            manifests,
            outbox,
            outbox_report,
            applying,
            locks,
            mounts: Mounts::default(),
            guard: Guard::default(),
            checking: Checking::default(),
            runtime,
            started: Time::now(),
            set_aside: opened.set_aside,
            stop: watch::Sender::new(false),
        }))
    }

    /// Has an own location indexed.
    pub fn watch(&self, own: &OwnLocation, no: LocationNo) {
        watch(&self.library, &self.indexer, own, no);
    }

    /// Where the folder of an own location is now; while it is away, where it was added.
    pub fn folder(&self, location: &Location) -> Option<PathBuf> {
        self.indexer.folder(location.no).or_else(|| location.root.clone())
    }

    /// This device's locations, each at the path where it was added and, if its disk is mounted
    /// elsewhere, also at the one where it is now.
    pub fn folders(&self) -> Vec<OwnLocation> {
        let added = self.library.with(|state| state.locations.clone());
        let now = added.iter().filter_map(|own| {
            let root = self.folder(&*self.index.location_by_id(own.id)?)?;
            (root != own.root).then(|| OwnLocation { root, ..own.clone() })
        });
        let now: Vec<_> = now.collect();
        [added, now].concat()
    }

    /// Puts an own location into the index.
    pub fn put_location(&self, own: &OwnLocation) -> Outcome<Arc<Location>> {
        put_location(&self.index, own)
    }

    /// Asks [`super::run`] to end.
    pub fn request_stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until somebody did.
    pub async fn stop_requested(&self) {
        // The sender lives as long as `self`.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends everything in good order; what cannot be undone is logged.
    pub async fn close(self: &Arc<Self>) {
        for remains in self.unmount_all().await {
            tracing::warn!("{remains}");
        }
        self.node.shutdown().await;
        let daemon = Arc::clone(self);
        let closing = tokio::task::spawn_blocking(move || {
            daemon.indexer.stop();
            if let Err(error) = daemon.outbox.close() {
                tracing::error!(%error, "the last accepted writes may not be on the disk");
            }
            daemon.cache.close();
            daemon.index.flush()
        });
        match closing.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "cannot flush the index"),
            Err(error) => tracing::error!(%error, "closing failed"),
        }
    }
}

/// Makes the index agree with the library about own locations, and watches them.
fn adopt_locations(library: &Arc<Library>, index: &Index, indexer: &Indexer) -> Outcome<()> {
    let own = library.with(|state| state.locations.clone());
    for location in index.locations() {
        if location.owner == index.me() && !own.iter().any(|o| o.id == location.id) {
            index.remove_location(location.no).map_err(index_failure)?;
        }
    }
    for location in own {
        let no = put_location(index, &location)?.no;
        watch(library, indexer, &location, no);
    }
    Ok(())
}

/// Has an own location indexed. Which folder it is, is kept in the library: the index may be
/// lost while its disk is away, and the empty mount point must not become the location.
fn watch(library: &Arc<Library>, indexer: &Indexer, own: &OwnLocation, no: LocationNo) {
    let (library, id) = (Arc::clone(library), own.id);
    indexer.watch_known(no, own.root_id.clone(), move |found| {
        let noted = library.update(|state| {
            let location = state.locations.iter_mut().find(|l| l.id == id);
            location.into_iter().for_each(|l| l.root_id = Some(found.clone()));
        });
        if let Err(error) = noted {
            tracing::warn!(%error, "which folder a location has could not be kept");
        }
    });
}

fn put_location(index: &Index, own: &OwnLocation) -> Outcome<Arc<Location>> {
    index
        .put_location(NewLocation {
            id: own.id,
            owner: index.me(),
            name: own.name.clone(),
            root: Some(own.root.clone()),
            read_only: own.read_only,
            shared_with: own.shared_with.clone(),
        })
        .map_err(index_failure)
}

/// Runs what may block on a disk, away from the runtime's thread.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Outcome<T> + Send + 'static,
) -> Outcome<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Failure::new(Code::Internal, format!("a bug: {e}")))?
}

/// This device's secret key; drawn on the first start.
fn identity(dir: &DataDir) -> Outcome<[u8; 32]> {
    let path = dir.identity();
    match fs::read(&path) {
        Ok(bytes) => bytes.try_into().map_err(|bytes: Vec<u8>| {
            Failure::new(
                Code::Invalid,
                format!("{} is damaged: {} bytes, not 32", path.display(), bytes.len()),
            )
            .hint("restore it from a backup; without it this device must be joined anew")
        }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let key: [u8; 32] = rand::random();
            dir.write_private("identity.key", &key)
                .map_err(|e| Failure::io(format!("cannot write {}", path.display()), e))?;
            Ok(key)
        }
        Err(e) => Err(Failure::io(format!("cannot read {}", path.display()), e)),
    }
}

fn node_config(config: &Config, secret_key: [u8; 32]) -> NodeConfig {
    NodeConfig { secret_key, bind: config.bind(), relay: config.relay(), mdns: config.discovery() }
}

fn indexer_config(config: &Config) -> IndexerConfig {
    let default = IndexerConfig::default();
    IndexerConfig {
        scan_threads: config.count("index.scan_threads").unwrap_or(default.scan_threads),
        hash_threads: match config.hashes() {
            true => config.count("index.hash_threads").unwrap_or(default.hash_threads),
            false => 0,
        },
        rescan_after: config.rescan_after(),
        watches: config.count("index.watches").unwrap_or(default.watches),
        ..default
    }
}

fn open_manifests(dir: &DataDir, path: PathBuf) -> Outcome<Manifests> {
    Manifests::open(&dir.subdirectory(path.clone())?)
        .map_err(|e| Failure::io(format!("cannot use {}", path.display()), e))
}

/// Before any location is watched: it ends what a crash cut off.
fn open_applier(
    dir: &DataDir,
    index: &Index,
    indexer: &Arc<Indexer>,
    manifests: Arc<Manifests>,
) -> Outcome<Applying> {
    let path = dir.subdirectory(dir.apply())?;
    let (index, indexer) = (index.clone(), Arc::clone(indexer));
    Applying::begin(Box::new(move || {
        Applier::open(&path, index.clone(), Arc::clone(&indexer), Arc::clone(&manifests))
    }))
}

fn open_outbox(dir: &DataDir, index: &Index, config: &Config) -> Outcome<(Arc<Outbox>, Report)> {
    let path = dir.subdirectory(dir.outbox())?;
    let default = OutboxConfig::default();
    let min_free_bytes = config.staging_min_free().unwrap_or(default.min_free_bytes);
    let settings =
        OutboxConfig { min_free_bytes, owner_deadline: config.read_deadline(), ..default };
    let opened = Outbox::open(&path, index.clone(), settings);
    let (outbox, report) = opened.map_err(outbox_failure)?;
    for lost in &report.lost {
        tracing::error!("a pending write is damaged: {lost}");
    }
    for aside in &report.set_aside {
        tracing::error!("a damaged part of the journal was set aside as {}", aside.display());
    }
    if report.pending > 0 {
        tracing::info!(pending = report.pending, "writes of the last run wait for their owners");
    }
    Ok((outbox, report))
}

fn outbox_failure(error: OutboxError) -> Failure {
    match &error {
        OutboxError::Io { .. } => Failure::new(Code::Io, error.to_string())
            .hint("pending writes are in that folder: do not delete it"),
        OutboxError::NewerFormat { .. } => Failure::new(Code::Version, error.to_string())
            .hint("install the newer sd that wrote it"),
        OutboxError::InUse { .. } => Failure::new(Code::Busy, error.to_string())
            .hint("another process has it open; end that one"),
    }
}

fn automatic_limit(dir: &DataDir) -> u64 {
    let tenth = rustix::fs::statvfs(dir.path()).map(|disk| disk.f_blocks * disk.f_frsize / 10);
    tenth.unwrap_or(AUTOMATIC_CACHE_BYTES).min(AUTOMATIC_CACHE_BYTES)
}

fn automatic_min_free(dir: &DataDir) -> u64 {
    let disk = rustix::fs::statvfs(dir.path()).map(|disk| disk.f_blocks * disk.f_frsize);
    let (least, most) = AUTOMATIC_MIN_FREE_BYTES.into_inner();
    disk.map_or(least, |disk| (disk / 50).clamp(least, most).min(disk / 10))
}

/// Words a failure of the list of pins.
pub fn pin_failure(error: PinError) -> Failure {
    match error {
        PinError::Io { path, source } => {
            Failure::io(format!("cannot use {}", path.display()), source)
        }
        PinError::Newer { .. } => Failure::new(Code::Version, error.to_string())
            .hint("install the newer sd that wrote it"),
        PinError::Index(error) => index_failure(error),
        PinError::Own | PinError::NotThere | PinError::NoContent | PinError::TooMany => {
            Failure::new(Code::Invalid, error.to_string())
        }
    }
}

/// Words a failure of the library file.
pub fn library_failure(error: LibraryError) -> Failure {
    match &error {
        LibraryError::Io { path, source } => {
            Failure::io(format!("cannot use {}", path.display()), io::Error::from(source.kind()))
        }
        LibraryError::Damaged { .. } => Failure::new(Code::Invalid, error.to_string())
            .hint("restore library.json from a backup, or set it aside and join the library anew"),
        LibraryError::Newer { .. } => Failure::new(Code::Version, error.to_string())
            .hint("install the newer sd that wrote it"),
    }
}

fn store_failure(error: StoreError) -> Failure {
    match error {
        StoreError::Io { path, source } => {
            Failure::io(format!("cannot use the index in {}", path.display()), source)
        }
        StoreError::NewerFormat { .. } => Failure::new(Code::Version, error.to_string())
            .hint("install the newer sd that wrote it"),
        StoreError::InUse { .. } => Failure::new(Code::Busy, error.to_string())
            .hint("another process has it open; end that one"),
        StoreError::Corrupt { .. } => Failure::new(Code::Io, error.to_string())
            .hint("move that file away; the index is rebuilt from the disks and the peers"),
    }
}

/// Words a failure of the index.
pub fn index_failure(error: IndexError) -> Failure {
    match error {
        IndexError::Store(error) => store_failure(error),
        error => Failure::new(Code::Io, error.to_string())
            .hint("`sd doctor` checks the index; it can always be rebuilt"),
    }
}

/// Words a failure of the network, wherever it appears.
impl From<SyncError> for Failure {
    fn from(error: SyncError) -> Self {
        super::members::failure(error)
    }
}
