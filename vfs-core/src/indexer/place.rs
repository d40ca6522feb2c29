//! What the indexer knows of one location while it runs.
//!
//! Nothing here survives a stop: rows and the queue of files to hash are the
//! index's. Sets of directories are bitmaps over file ids, which the index
//! gives in order, so that millions of directories cost a few hundred KiB.
//!
//! Locks: `opening` is held while the folder is looked for, which may take long
//! on a dead disk, and while the applier ends what a crash left there; `order`
//! while a directory is looked at. All others are held for a moment, alone, except
//! `scan`, under which a pass begins and resets them.

use super::hash::HashQueue;
use super::{IndexerConfig, State};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Index;
use crate::local::{Beside, Candidate, Mounts, Root, RootId, Search, is_absent};
use crate::model::{Entry, FileId, LocationNo};
use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// Locks that order the changes of one directory; two directories rarely share one.
const STRIPES: usize = 1024;

/// Told which folder a location has, when that was not known yet, or less of it.
pub(super) type FirstFound = Box<dyn Fn(&RootId) + Send + Sync>;

/// One location.
pub(super) struct Place {
    pub no: LocationNo,
    /// Where the folder was added; its disk may be mounted elsewhere now.
    pub path: PathBuf,
    pub config: IndexerConfig,
    opening: Mutex<()>,
    disk: Mutex<Disk>,
    /// Which folder it is, once that is known; with it another one is told also without rows.
    identity: Mutex<Option<RootId>>,
    first_found: FirstFound,
    /// The disks that are not its own although they may have all that tells it.
    beside: Mutex<Beside>,
    retry_at: Mutex<Option<Instant>>,
    look_at: Mutex<Option<Instant>>,
    pub scan: Mutex<ScanQueue>,
    pub scanned: Mutex<Scanned>,
    /// Directories that could not be read; their rows stay, and they are tried again.
    pub unread: Mutex<HashSet<FileId>>,
    /// Directories that lost their name; if they get one again, what changed below
    /// them meanwhile was not seen.
    pub lost: Mutex<HashSet<FileId>>,
    pub strays: Mutex<Strays>,
    pub sweep: Mutex<Option<Due>>,
    pub degraded: Mutex<Degraded>,
    pub hash: Mutex<HashQueue>,
    pub indexed: AtomicBool,
    pub forgotten: AtomicBool,
    /// A thread looks after it just now.
    pub tended: AtomicBool,
    pub bytes_hashed: AtomicU64,
    pub files_hashed: AtomicU64,
    order: [Mutex<()>; STRIPES],
}

/// Whether the folder is there.
enum Disk {
    /// Not looked at yet.
    Unknown,
    Online(Arc<Root>),
    Offline(String),
}

/// Directories that wait to be scanned.
#[derive(Default)]
pub(super) struct ScanQueue {
    /// Breadth first, so that the top can be browsed first.
    jobs: VecDeque<Job>,
    /// New directories, which someone is likely to look at.
    urgent: VecDeque<Job>,
    pub running: usize,
    /// A whole scan is going on: the end of the queue is its end.
    pub pass: Option<Instant>,
    /// Another one was asked for meanwhile.
    pub again: bool,
}

impl ScanQueue {
    pub fn push(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub fn push_urgent(&mut self, job: Job) {
        self.urgent.push_back(job);
    }

    pub fn pop(&mut self) -> Option<Job> {
        self.urgent.pop_front().or_else(|| self.jobs.pop_front())
    }

    pub fn queued(&self) -> usize {
        self.jobs.len() + self.urgent.len()
    }

    pub fn waiting(&self) -> usize {
        self.queued() + self.running
    }

    pub fn clear(&mut self) {
        self.jobs = VecDeque::new();
        self.urgent = VecDeque::new();
        self.pass = None;
        self.again = false;
    }
}

/// A directory to scan, in eight bytes: a file id and, above it, one flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Job(u64);

impl Job {
    const DEEP: u64 = 1 << 63;

    /// Scans the directory if it was not, and then those below it that were not.
    pub fn once(dir: FileId) -> Self {
        Self(dir.0)
    }

    /// Scans the directory and everything below it, scanned or not.
    pub fn deep(dir: FileId) -> Self {
        Self(dir.0 | Self::DEEP)
    }

    pub fn dir(self) -> FileId {
        FileId(self.0 & !Self::DEEP)
    }

    pub fn is_deep(self) -> bool {
        self.0 & Self::DEEP != 0
    }

    /// The same kind of job for another directory.
    pub fn for_subdirectory(self, dir: FileId) -> Self {
        Self(dir.0 | self.0 & Self::DEEP)
    }
}

/// The directories scanned since the last whole scan began.
#[derive(Default)]
pub(super) struct Scanned {
    chunks: BTreeMap<u64, [u64; 8]>,
    epoch: u64,
}

impl Scanned {
    /// Begins anew; what was begun before does not count any more.
    pub fn restart(&mut self) {
        self.chunks.clear();
        self.epoch += 1;
    }

    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn contains(&self, dir: FileId) -> bool {
        let (chunk, word, bit) = Self::position(dir);
        self.chunks.get(&chunk).is_some_and(|words| words[word] & bit != 0)
    }

    /// Notes a scan that began in `epoch`.
    pub fn insert(&mut self, dir: FileId, epoch: u64) {
        if epoch == self.epoch {
            let (chunk, word, bit) = Self::position(dir);
            self.chunks.entry(chunk).or_default()[word] |= bit;
        }
    }

    pub fn remove(&mut self, dir: FileId) {
        let (chunk, word, bit) = Self::position(dir);
        if let Some(words) = self.chunks.get_mut(&chunk) {
            words[word] &= !bit;
        }
    }

    fn position(dir: FileId) -> (u64, usize, u64) {
        (dir.0 / 512, (dir.0 / 64 % 8) as usize, 1 << (dir.0 % 64))
    }
}

/// Directories that were not where the index has them when someone looked: one
/// above them was just being renamed, or they are gone. They are scanned when found.
#[derive(Default)]
pub(super) struct Strays {
    dirs: HashSet<FileId>,
    /// When to look for them.
    pub at: Option<Instant>,
    looked: Option<Instant>,
    tries: u32,
}

impl Strays {
    /// A rename is seen whole within this time, mostly.
    const FIRST_LOOK: Duration = Duration::from_millis(50);
    const MOST_DOUBLINGS: u32 = 5;

    pub fn insert(&mut self, dir: FileId, now: Instant) {
        self.dirs.insert(dir);
        if self.looked.is_none_or(|at| now > at + Self::FIRST_LOOK * (2 << Self::MOST_DOUBLINGS)) {
            self.tries = 0;
        }
        self.at.get_or_insert(now + Self::FIRST_LOOK * (1 << self.tries));
    }

    /// Those to look for now; the longer they are not found, the rarer.
    pub fn take(&mut self, now: Instant) -> HashSet<FileId> {
        if self.at.is_none_or(|at| at > now) {
            return HashSet::new();
        }
        self.at = None;
        self.looked = Some(now);
        self.tries = (self.tries + 1).min(Self::MOST_DOUBLINGS);
        std::mem::take(&mut self.dirs)
    }
}

/// When something is to be done that was asked for more than once.
#[derive(Clone, Copy)]
pub(super) struct Due {
    first: Instant,
    at: Instant,
}

/// The longest that a sweep is put off.
const SWEEP_AT_LAST: Duration = Duration::from_secs(30);

/// Why changes may go unseen, and until when.
#[derive(Default)]
pub(super) struct Degraded {
    /// Events were lost; a whole scan that began later mends it.
    pub lost_events: Option<String>,
    /// Directories without a watch, and why the last of them has none.
    unwatched: Option<(u64, String)>,
    /// The same as it was before the pass that is going on.
    unwatched_before: Option<(u64, String)>,
    /// When to scan everything again, while there are such directories.
    pub rescan_at: Option<Instant>,
    /// Not before this, after the last pass.
    rests_until: Option<Instant>,
    /// Events were lost since the last pass began.
    lost_in_pass: bool,
}

impl Degraded {
    pub fn begin_pass(&mut self) {
        self.unwatched_before = self.unwatched.take();
        self.rescan_at = None;
        self.lost_in_pass = false;
    }

    /// `again`: something was lost since the pass began. `next`: when to begin one
    /// by itself, if some directories have no watch.
    pub fn end_pass(&mut self, again: bool, next: Instant) {
        if !again && !self.lost_in_pass {
            self.lost_events = None;
        }
        self.unwatched_before = None;
        self.rests_until = Some(next);
        let is_to_follow = self.lost_in_pass || self.unwatched.is_some();
        self.rescan_at = is_to_follow.then_some(next);
    }

    /// Notes that everything is to be scanned again, after a rest since the last time; whether that
    /// is news.
    pub fn lose_events(&mut self, why: String) -> bool {
        let now = Instant::now();
        let is_news = self.lost_events.is_none();
        self.lost_events = Some(why);
        self.lost_in_pass = true;
        self.rescan_at.get_or_insert(self.rests_until.map_or(now, |rest| rest.max(now)));
        is_news
    }

    /// `next`: when to begin a pass, if none is planned yet.
    pub fn add_unwatched(&mut self, why: String, next: Instant) {
        let count = self.unwatched.as_ref().map_or(0, |(n, _)| *n);
        self.unwatched = Some((count + 1, why));
        self.rescan_at.get_or_insert(next);
    }

    pub fn reason(&self) -> Option<String> {
        let unwatched = self.unwatched.as_ref().or(self.unwatched_before.as_ref());
        let unwatched = unwatched.map(|(n, why)| format!("{n} directories are not watched: {why}"));
        self.lost_events.clone().or(unwatched)
    }
}

/// Locks although a thread panicked with the lock: each update of these states is whole in itself.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    pub fn new(
        no: LocationNo,
        path: PathBuf,
        config: IndexerConfig,
        known: Option<RootId>,
        first_found: FirstFound,
    ) -> Self {
        Self {
            no,
            path,
            config,
            opening: Mutex::new(()),
            disk: Mutex::new(Disk::Unknown),
            identity: Mutex::new(known),
            first_found,
            beside: Mutex::default(),
            retry_at: Mutex::default(),
            look_at: Mutex::default(),
            scan: Mutex::default(),
            scanned: Mutex::default(),
            unread: Mutex::default(),
            lost: Mutex::default(),
            strays: Mutex::default(),
            sweep: Mutex::default(),
            degraded: Mutex::default(),
            hash: Mutex::default(),
            indexed: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
            tended: AtomicBool::new(false),
            bytes_hashed: AtomicU64::new(0),
            files_hashed: AtomicU64::new(0),
            order: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// Held from looking at a directory until the index has what was seen, so that
    /// an older look never overwrites a newer one.
    pub fn order(&self, dir: FileId) -> MutexGuard<'_, ()> {
        lock(self.stripe(dir))
    }

    /// As [`Self::order`], but `None` when someone else looks at the directory.
    pub fn try_order(&self, dir: FileId) -> Option<MutexGuard<'_, ()>> {
        match self.stripe(dir).try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The orders of several directories, each once; needs that the caller holds none.
    pub fn orders(&self, dirs: impl IntoIterator<Item = FileId>) -> Vec<MutexGuard<'_, ()>> {
        // In the order of the locks, so that two such callers never wait for each other.
        let stripes: BTreeSet<_> = dirs.into_iter().map(|dir| dir.0 % STRIPES as u64).collect();
        stripes.into_iter().map(|stripe| lock(&self.order[stripe as usize])).collect()
    }

    fn stripe(&self, dir: FileId) -> &Mutex<()> {
        &self.order[(dir.0 % STRIPES as u64) as usize]
    }

    /// The folder, if it is known to be there.
    pub fn root(&self) -> FsResult<Arc<Root>> {
        match &*lock(&self.disk) {
            Disk::Online(root) => Ok(root.clone()),
            Disk::Unknown => Err(FsError::new(Kind::NotFound, "the location was not opened yet")),
            Disk::Offline(why) => Err(FsError::new(Kind::NotFound, why.clone())),
        }
    }

    /// The folder, looked for when it was not yet, or `again` when it was gone;
    /// true when it was found just now. `found` has it before anyone else.
    pub fn open(
        &self,
        index: &Index,
        again: bool,
        found: impl FnOnce(&Root),
    ) -> FsResult<(Arc<Root>, bool)> {
        if let Some(known) = self.known(again) {
            return known;
        }
        let _opening = lock(&self.opening);
        // Someone else may have looked meanwhile.
        if let Some(known) = self.known(again) {
            return known;
        }
        let root = self.find(index).map(Arc::new);
        if let Ok(root) = &root {
            found(root);
        }
        *lock(&self.disk) = match &root {
            Ok(root) => Disk::Online(root.clone()),
            Err(e) => Disk::Offline(e.to_string()),
        };
        let offline = |e| FsError::caused(Kind::NotFound, "the location is offline", e);
        root.map(|root| (root, true)).map_err(offline)
    }

    fn known(&self, again: bool) -> Option<FsResult<(Arc<Root>, bool)>> {
        match &*lock(&self.disk) {
            Disk::Online(root) => Some(Ok((root.clone(), false))),
            Disk::Offline(why) if !again => Some(Err(FsError::new(Kind::NotFound, why.clone()))),
            _ => None,
        }
    }

    /// The folder at its path, or elsewhere if its disk is mounted there.
    fn find(&self, index: &Index) -> FsResult<Root> {
        let noted = lock(&self.identity).clone();
        let known = match &noted {
            Some(noted) => Some(noted.clone()),
            None => id_in_index(index, self.no)?,
        };
        // Read before the folder is looked at: all of it was there beside the folder's disk.
        let mounts = Mounts::now();
        let home = self.find_at_home(known.as_ref());
        let root = match &known {
            Some(known) => self.find_anywhere(known, home, &mounts)?,
            // Its person has just said which it is.
            None => home?,
        };
        let found = root.id()?;
        index.observe_root(self.no, &root.observe_root()?)?;
        let complete = noted.as_ref().map_or(found.clone(), |noted| noted.completed_by(&found));
        if noted.as_ref() != Some(&complete) {
            (self.first_found)(&complete);
            *lock(&self.identity) = Some(complete);
        }
        if mounts.has_mount_of(&root) {
            *lock(&self.beside) = mounts.beside(&root);
        }
        Ok(root)
    }

    /// What is at its own path; an error for which [`is_absent`] does not hold leaves open
    /// whether that is the folder.
    fn find_at_home(&self, known: Option<&RootId>) -> FsResult<Root> {
        let another = |why| FsError::new(Kind::NotFound, format!("{} {why}", self.path.display()));
        let root = Root::open(&self.path)?;
        if !root.is_current()? {
            return Err(another("was just replaced"));
        }
        let found = root.id()?;
        let same = known.map_or(Some(true), |known| known.is_same(&found));
        if same == Some(false) {
            return Err(another(
                "is another folder than the one that was added; is its disk mounted?",
            ));
        }
        // Fails where the folder cannot be listed: no access, or a disk that is gone.
        root.open_dir(&[])?;
        same.map(|_| root).ok_or_else(|| {
            let why = "cannot be told from other disks: its file system has neither name nor times";
            FsError::new(Kind::NotSupported, format!("{} {why}", self.path.display()))
        })
    }

    fn find_anywhere(
        &self,
        known: &RootId,
        home: FsResult<Root>,
        mounts: &Mounts,
    ) -> FsResult<Root> {
        let known = match &home {
            Ok(root) => known.completed_by(&root.id()?),
            Err(_) => known.clone(),
        };
        let beside = {
            let mut beside = lock(&self.beside);
            beside.retain(mounts);
            beside.clone()
        };
        let (home, why) = match home {
            Ok(root) => (Some(mounts.candidate(root)), None),
            Err(e) if is_absent(&e) => (None, Some(e)),
            Err(e) => (Some(Candidate::unclear(&self.path)), Some(e)),
        };
        let offline = |why| Err(FsError::new(Kind::NotFound, why));
        match mounts.search(&known, home, &beside) {
            Search::Here(root) => Ok(root),
            Search::Nowhere => why.map_or_else(|| offline("no disk has its folder".into()), Err),
            Search::Several(paths) => offline(several(&paths)),
            Search::Copy(path) => offline(format!(
                "{} is a copy: it was mounted beside the location's own disk; if it is to take \
                 its place, unmount it and mount it again",
                path.display()
            )),
        }
    }

    /// Why the folder is not to be relied on any more. As long as its disk is there, notes which
    /// others are: one that stands at its own path meanwhile is not it, either.
    pub fn check(&self, root: &Root) -> Result<(), String> {
        let mounts = Mounts::now();
        // Its disk may be mounted still, and another one over it.
        if mounts.has_mount_of(root) {
            *lock(&self.beside) = mounts.beside(root);
        }
        match root.is_current() {
            Ok(true) => {}
            Ok(false) => return Err(format!("another folder is at {}", root.path().display())),
            Err(e) => return Err(e.to_string()),
        }
        match root.path() == self.path {
            true => Ok(()),
            false => self.check_home(root),
        }
    }

    /// Elsewhere it stays only as long as nothing at its own path is or may be the folder, too.
    fn check_home(&self, root: &Root) -> Result<(), String> {
        let known = lock(&self.identity).clone();
        match self.find_at_home(known.as_ref()) {
            Err(e) if is_absent(&e) => Ok(()),
            Ok(home) if home.is_also(root) => Err("its disk is back at its own path".to_owned()),
            _ => Err(several(&[self.path.clone(), root.path().to_owned()])),
        }
    }

    /// Fails unless `root` still is the location's folder and there: what a disk that was pulled
    /// out meanwhile did not show is not deleted.
    pub fn confirm(&self, root: &Arc<Root>) -> FsResult<()> {
        match Arc::ptr_eq(&self.root()?, root) && root.is_current()? {
            true => Ok(()),
            false => Err(FsError::new(Kind::NotFound, "the location's folder is gone")),
        }
    }

    /// Notes that the folder is gone.
    pub fn set_offline(&self, why: String) {
        *lock(&self.disk) = Disk::Offline(why);
        *lock(&self.look_at) = None;
    }

    /// Whether it is time to look for a folder that is not there.
    pub fn look_due(&self, now: Instant, every: Duration) -> bool {
        let mut at = lock(&self.look_at);
        let is_due = at.is_none_or(|at| at <= now);
        if is_due {
            *at = Some(now + every);
        }
        is_due
    }

    /// Whether it is time to try again what could not be read.
    pub fn retry_due(&self, now: Instant, every: Duration) -> bool {
        let mut at = lock(&self.retry_at);
        let is_due = at.is_some_and(|at| at <= now);
        if is_due || at.is_none() {
            *at = Some(now + every);
        }
        is_due
    }

    /// What keeps the place from being idle, hashing aside.
    pub fn state(&self) -> Option<State> {
        if let Disk::Offline(why) = &*lock(&self.disk) {
            return Some(State::Offline(why.clone()));
        }
        (self.is_scanning() || !self.indexed.load(Ordering::Acquire)).then_some(State::Scanning)
    }

    /// Whether directories wait or are being scanned.
    pub fn is_scanning(&self) -> bool {
        let queue = lock(&self.scan);
        queue.waiting() > 0 || queue.pass.is_some()
    }

    /// Asks for the rows of what lost its name to be dropped, once renames had time to end, also
    /// the last of them: its halves may be seen one after the other. But steady changes do not put
    /// it off for ever.
    pub fn sweep_after(&self, delay: Duration) {
        let now = Instant::now();
        let mut sweep = lock(&self.sweep);
        let Due { first, at } = sweep.unwrap_or(Due { first: now, at: now });
        *sweep = Some(Due { first, at: at.max(now + delay).min(first + SWEEP_AT_LAST) });
    }

    /// Whether they are to be dropped now.
    pub fn is_sweep_due(&self, now: Instant) -> bool {
        lock(&self.sweep).is_some_and(|due| due.at <= now)
    }
}

fn id_in_row(known: &Entry) -> RootId {
    RootId::of_row(known.disk_ino, known.attr.btime)
}

fn id_in_index(index: &Index, no: LocationNo) -> FsResult<Option<RootId>> {
    let node = index.view()?.node(no, FileId::ROOT)?;
    Ok(node.map(|n| id_in_row(&n.entry)))
}

/// Why none of several folders is taken.
fn several(paths: &[PathBuf]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    let paths = paths.join(" and ");
    format!(
        "several disks may have its folder, as copies of each other do: {paths}; unmount the copy"
    )
}
