//! Scan, watch and hash of this device's own locations.
//!
//! | module | what it does |
//! |---|---|
//! | `scan` | directories of the disk to rows, breadth first and on demand |
//! | `watch`, `mark`, `follow` | the kernel's events, and what they make us look at |
//! | `growth` | files that only grew, and the proof of it |
//! | `hash` | content ids and manifests, behind everything else |
//! | `asked` | names that this device itself changed, looked at now |
//! | `tend` | folders that come and go, rescans, what has to be tried again |
//! | `compare` | rows and disk side by side, for whoever doubts them |
//! | `place` | what is known of one location while this runs |
//!
//! The disk is the truth and the index follows it: nothing is taken from an
//! event, a queue or an error but where to look. A row is deleted only when its
//! directory was read and the name was not there, in the folder that was indexed.
//! All state that must survive a stop is the index's.

mod asked;
mod compare;
mod follow;
mod growth;
mod hash;
mod mark;
mod place;
mod scan;
mod tend;
mod watch;

use crate::content::Manifests;
use crate::error::{FsError, FsResult, Kind};
use crate::index::Index;
use crate::local::{Root, RootId};
use crate::model::{FileId, LocationNo};
pub(crate) use asked::Look;
pub use compare::{Compared, Hear};
use follow::Hints;
use growth::{Duties, Former};
use place::{Place, lock};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use watch::Watcher;

/// How much the indexer may take of the machine, and how patient it is.
#[derive(Clone, Debug)]
pub struct IndexerConfig {
    /// Threads that scan directories.
    pub scan_threads: usize,
    /// Threads that hash files; with none, files stay in the index's queue.
    pub hash_threads: usize,
    /// A file is hashed only when it was left alone for this long.
    pub settle: Duration,
    /// Whether to watch for changes; without it they are seen by rescans only.
    pub watch: bool,
    /// How many directories are watched one by one; with more, whole file systems are watched if
    /// that is allowed.
    pub watches: usize,
    /// How often the folder of each location is looked for.
    pub root_check: Duration,
    /// How long after a whole scan a location that cannot be fully watched is scanned again, at least.
    pub rescan_after: Duration,
}

impl Default for IndexerConfig {
    fn default() -> Self {
        Self {
            scan_threads: 2,
            hash_threads: 2,
            settle: Duration::from_millis(500),
            watch: true,
            watches: 16_384,
            root_check: Duration::from_secs(1),
            rescan_after: Duration::from_secs(60),
        }
    }
}

/// What the indexer is doing with a location.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// Directories wait to be scanned.
    Scanning,
    /// Every directory was scanned; files wait to be hashed.
    Hashing,
    /// Nothing to do until something changes.
    Idle,
    /// The folder cannot be reached, and why; its rows stay as they are.
    Offline(String),
}

/// Whether changes are seen as they happen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Watch {
    /// Every directory scanned so far is watched.
    Watching,
    /// Some changes are only seen by periodic rescans, and why.
    Degraded(String),
}

/// How far a location has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Progress {
    /// What is being done.
    pub state: State,
    /// A whole scan finished since the start.
    pub indexed: bool,
    /// Directories that wait to be scanned.
    pub directories_waiting: u64,
    /// Regular files without a content id.
    pub files_to_hash: u64,
    /// Files hashed since the start.
    pub files_hashed_now: u64,
    /// Bytes hashed since the start.
    pub bytes_hashed_now: u64,
    /// Whether changes are seen as they happen.
    pub watch: Watch,
}

/// Keeps the rows of this device's locations equal to its disks.
pub struct Indexer {
    core: Arc<Core>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Told of a location's folder each time it is found.
type BeforeScan = Box<dyn Fn(LocationNo, &Root) + Send + Sync>;

/// What the threads share.
struct Core {
    index: Index,
    manifests: Arc<Manifests>,
    config: IndexerConfig,
    /// `None` when it is not wanted, or the system refuses one: everything is then seen by rescans only.
    watcher: Option<Watcher>,
    places: RwLock<BTreeMap<LocationNo, Arc<Place>>>,
    before_scan: OnceLock<BeforeScan>,
    hints: Mutex<Hints>,
    duties: Mutex<Duties>,
    former: Mutex<Former>,
    scan_work: Work,
    hash_work: Work,
    hint_work: Work,
    tend_work: Work,
    tend_now: AtomicBool,
    stopping: AtomicBool,
    /// Which location is served first, so that a large one does not starve the others.
    turn: AtomicUsize,
}

/// Where threads wait for something to do.
#[derive(Default)]
struct Work {
    /// Held while looking for work and while announcing it, so that none is overlooked.
    looking: Mutex<()>,
    announced: Condvar,
}

impl Work {
    fn notify(&self) {
        let _looking = lock(&self.looking);
        self.announced.notify_all();
    }

    /// Work that is there already; `None` also at the stop.
    fn look<T>(
        &self,
        core: &Core,
        find: impl Fn(&Core, &mut Option<Instant>) -> Option<T>,
    ) -> Option<T> {
        let _looking = lock(&self.looking);
        if core.is_stopping() { None } else { find(core, &mut None) }
    }

    /// The next work; `None` at the stop. `find` may say when to look again although
    /// nothing was announced.
    fn wait<T>(
        &self,
        core: &Core,
        find: impl Fn(&Core, &mut Option<Instant>) -> Option<T>,
    ) -> Option<T> {
        let mut looking = lock(&self.looking);
        while !core.is_stopping() {
            let mut due = None;
            if let Some(found) = find(core, &mut due) {
                return Some(found);
            }
            let pause =
                due.map_or(LONGEST_PAUSE, |at| at.saturating_duration_since(Instant::now()));
            let woken = self.announced.wait_timeout(looking, pause.min(LONGEST_PAUSE));
            looking = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }
}

/// Threads look around at least this often; it bounds the harm of a clock that jumps.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Indexer {
    /// Starts the threads; no location is looked at before [`Self::watch`].
    pub fn start(index: Index, manifests: Arc<Manifests>, config: IndexerConfig) -> Arc<Self> {
        let watcher = config.watch.then(|| Watcher::new(config.watches)).and_then(|created| {
            created.inspect_err(|e| tracing::warn!("changes cannot be watched: {e}")).ok()
        });
        let core = Arc::new(Core {
            index,
            manifests,
            config,
            watcher,
            places: RwLock::default(),
            before_scan: OnceLock::new(),
            hints: Mutex::default(),
            duties: Mutex::default(),
            former: Mutex::default(),
            scan_work: Work::default(),
            hash_work: Work::default(),
            hint_work: Work::default(),
            tend_work: Work::default(),
            tend_now: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            turn: AtomicUsize::new(0),
        });
        let threads = core.spawn_all();
        Arc::new(Self { core, threads: Mutex::new(threads) })
    }

    /// Scans, watches and hashes the location from now on; returns at once.
    ///
    /// A location that the index does not have, or that is another device's, is ignored.
    pub fn watch(&self, location: LocationNo) {
        self.watch_known(location, None, |_| ());
    }

    /// The same for a location whose folder may be known from before: no other one that stands at
    /// its path is taken for it, also when the index was lost, and it is looked for on other disks
    /// that are mounted. What was not known of it `first_found` is told; it shall remember that
    /// for as long as the location.
    pub fn watch_known(
        &self,
        location: LocationNo,
        known: Option<RootId>,
        first_found: impl Fn(&RootId) + Send + Sync + 'static,
    ) {
        let found = self.core.index.location(location);
        let Some(path) = found.and_then(|found| found.root.clone()) else { return };
        let config = self.core.config.clone();
        let place = Place::new(location, path, config, known, Box::new(first_found));
        let mut places = self.core.places.write().unwrap_or_else(PoisonError::into_inner);
        places.entry(location).or_insert_with(|| Arc::new(place));
        drop(places);
        self.core.tend_soon();
    }

    /// Lets `found` have the folder of a location each time it is found, before anything in it
    /// is looked at or given to anyone. To be set before any location is watched.
    pub(crate) fn before_scan(&self, found: impl Fn(LocationNo, &Root) + Send + Sync + 'static) {
        let is_first = self.core.before_scan.set(Box::new(found)).is_ok();
        assert!(is_first, "one applier ends what was begun in the folders of an indexer");
    }

    /// Leaves the location alone from now on; its rows stay.
    pub fn forget(&self, location: LocationNo) {
        let mut places = self.core.places.write().unwrap_or_else(PoisonError::into_inner);
        let Some(place) = places.remove(&location) else { return };
        drop(places);
        place.forgotten.store(true, Ordering::Release);
        self.core.go_offline(&place, "the location was removed".to_owned());
    }

    /// Scans every directory of the location again; waits for the disk to say that it is there.
    pub fn rescan(&self, location: LocationNo) {
        let Some(place) = self.core.place(location) else { return };
        match place.root() {
            Ok(root) if self.core.is_still_there(&place, &root) => self.core.begin_pass(&place),
            // Found again, it is scanned; why it is not shows in the progress.
            _ => drop(self.core.open(&place, true)),
        }
    }

    /// Scans a directory on this thread, unless it was scanned since the start.
    pub fn scan_now(&self, location: LocationNo, dir: FileId) -> FsResult<()> {
        let place = self.core.known_place(location)?;
        self.core.open(&place, false)?;
        self.core.scan_asked(&place, dir)
    }

    /// The location's folder; `NotFound` when it is offline.
    pub fn root(&self, location: LocationNo) -> FsResult<Arc<Root>> {
        self.core.open(&*self.core.known_place(location)?, false)
    }

    /// Where the location's folder is now; `None` while that is not known.
    pub fn folder(&self, location: LocationNo) -> Option<PathBuf> {
        Some(self.core.place(location)?.root().ok()?.path().to_owned())
    }

    /// How far the location has come; offline when it is not watched.
    pub fn progress(&self, location: LocationNo) -> Progress {
        self.core.progress(location)
    }

    /// Ends and joins all threads; what is unfinished goes on after the next start.
    pub fn stop(&self) {
        self.core.stopping.store(true, Ordering::SeqCst);
        for work in
            [&self.core.scan_work, &self.core.hash_work, &self.core.hint_work, &self.core.tend_work]
        {
            work.notify();
        }
        if let Some(watcher) = &self.core.watcher {
            watcher.wake();
        }
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("a thread of the indexer had panicked");
            }
        }
    }
}

impl Drop for Indexer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Core {
    fn spawn_all(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let mut threads = Vec::new();
        for _ in 0..self.config.scan_threads.max(1) {
            threads.extend(self.spawn("sd-scan", SCAN_NICE, Self::scan_loop));
        }
        for _ in 0..self.config.hash_threads {
            threads.extend(self.spawn("sd-hash", HASH_NICE, Self::hash_loop));
        }
        threads.extend(self.spawn("sd-follow", 0, Self::follow_loop));
        threads.extend(self.spawn("sd-tend", 0, Self::tend_loop));
        if self.watcher.is_some() {
            threads.extend(self.spawn("sd-events", 0, |core| {
                core.watcher.iter().for_each(|watcher| core.event_loop(watcher));
            }));
        }
        threads
    }

    fn spawn(self: &Arc<Self>, name: &str, nice: i32, run: fn(&Self)) -> Option<JoinHandle<()>> {
        let core = self.clone();
        let work = move || {
            lower_priority(nice);
            run(&core);
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .inspect_err(|e| tracing::error!("thread {name} could not be started: {e}"))
            .ok()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn places(&self) -> Vec<Arc<Place>> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// All locations, each time beginning with another one.
    fn places_in_turn(&self) -> Vec<Arc<Place>> {
        let mut places = self.places();
        if !places.is_empty() {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % places.len();
            places.rotate_left(turn);
        }
        places
    }

    fn place(&self, no: LocationNo) -> Option<Arc<Place>> {
        self.places.read().unwrap_or_else(PoisonError::into_inner).get(&no).cloned()
    }

    fn known_place(&self, no: LocationNo) -> FsResult<Arc<Place>> {
        self.place(no).ok_or_else(|| FsError::new(Kind::NotFound, "the location is not watched"))
    }

    fn progress(&self, no: LocationNo) -> Progress {
        let counts = self.index.counts(no);
        let files_to_hash = counts.files.saturating_sub(counts.hashed_files);
        let Some(place) = self.place(no) else {
            return Progress {
                state: State::Offline("the location is not watched".to_owned()),
                indexed: false,
                directories_waiting: 0,
                files_to_hash,
                files_hashed_now: 0,
                bytes_hashed_now: 0,
                watch: Watch::Watching,
            };
        };
        let is_hashing =
            || self.config.hash_threads > 0 && lock(&place.hash).is_busy(files_to_hash > 0);
        let idle_or_hashing = || if is_hashing() { State::Hashing } else { State::Idle };
        Progress {
            state: place.state().unwrap_or_else(idle_or_hashing),
            indexed: place.indexed.load(Ordering::Acquire),
            directories_waiting: lock(&place.scan).waiting() as u64,
            files_to_hash,
            files_hashed_now: place.files_hashed.load(Ordering::Relaxed),
            bytes_hashed_now: place.bytes_hashed.load(Ordering::Relaxed),
            watch: lock(&place.degraded).reason().map_or(Watch::Watching, Watch::Degraded),
        }
    }
}

/// Scanning yields to programs that someone waits for, hashing more so; neither so far
/// that it would stand still on a machine that is always busy, as at 19.
const SCAN_NICE: i32 = 5;
pub(crate) const HASH_NICE: i32 = 10;

/// Lowers the priority of this thread for the processor and, with it, for the disk:
/// Linux derives the I/O priority from the nice value (`ioprio_set(2)`), here the
/// lower best-effort levels.
pub(crate) fn lower_priority(nice: i32) {
    if nice > 0
        && let Err(e) = rustix::process::nice(nice)
    {
        tracing::debug!("the priority stays: {e}");
    }
}

#[cfg(test)]
mod compare_tests;
#[cfg(test)]
mod growth_tests;
#[cfg(test)]
mod tests;
