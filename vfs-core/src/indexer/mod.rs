//! Scan, watch and hash of this device's own locations.

use crate::content::Manifests;
use crate::error::FsResult;
use crate::index::Index;
use crate::local::Root;
use crate::model::{FileId, LocationNo};
use std::sync::Arc;
use std::time::Duration;

/// How much the indexer may take of the machine, and how patient it is.
#[derive(Clone, Debug)]
pub struct IndexerConfig {
    /// Threads that scan directories.
    pub scan_threads: usize,
    /// Threads that hash files.
    pub hash_threads: usize,
    /// A file is hashed only when it was left alone for this long.
    pub settle: Duration,
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
pub struct Indexer {}

impl Indexer {
    /// Starts the threads; no location is looked at before [`Self::watch`].
    pub fn start(_index: Index, _manifests: Arc<Manifests>, _config: IndexerConfig) -> Arc<Self> {
        unimplemented!()
    }

    /// Scans, watches and hashes the location from now on; returns at once.
    pub fn watch(&self, _location: LocationNo) {
        unimplemented!()
    }

    /// Leaves the location alone from now on; its rows stay.
    pub fn forget(&self, _location: LocationNo) {
        unimplemented!()
    }

    /// Scans every directory of the location again.
    pub fn rescan(&self, _location: LocationNo) {
        unimplemented!()
    }

    /// Scans a directory on this thread, unless it was scanned since the start.
    pub fn scan_now(&self, _location: LocationNo, _dir: FileId) -> FsResult<()> {
        unimplemented!()
    }

    /// The location's folder; `NotFound` when it is offline.
    pub fn root(&self, _location: LocationNo) -> FsResult<Arc<Root>> {
        unimplemented!()
    }

    /// How far the location has come; offline when it is not watched.
    pub fn progress(&self, _location: LocationNo) -> Progress {
        unimplemented!()
    }

    /// Ends and joins all threads; what is unfinished goes on after the next start.
    pub fn stop(&self) {
        unimplemented!()
    }
}
