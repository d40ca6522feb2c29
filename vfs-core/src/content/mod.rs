//! Bytes of files: hash trees, this device's own files, the cache, the read plan.
//!
//! | module | what it is |
//! |---|---|
//! | [`manifest`] | the tree of a file, and the check of a range against its content id |
//! | [`manifests`] | the trees of own files and of what is lent, stored |
//! | [`serve`] | ranges of own files, for peers and for this device |
//! | [`lend`] | ranges of cached contents, for members that may read them |
//! | `answer` | what these two have in common |
//! | `trees` | the trees of what is lent, built when they are needed |
//! | [`cache`] | fetched bytes on disk, within a limit |
//! | `fetch` | one range from the first holder that has it right |
//! | `choice` | which holder to ask for it |
//! | `window` | how much to ask for, and how far ahead |
//! | [`reader`] | reads of one pinned version: what is here, what must come |
//! | [`pins`] | what is to be here always: fetched by itself, never evicted |
//! | `crowd` | small files one after the other: the next ones come before they are asked for |
//!
//! [`Content`] joins them. A read is answered from the cache when its bytes are
//! there; otherwise from a fetch, its own or one already under way, whose bytes
//! were checked against the content id before anyone sees them.

mod answer;
pub mod cache;
mod choice;
mod crowd;
pub(crate) mod disk;
mod fetch;
pub mod lend;
pub mod manifest;
pub mod manifests;
pub mod pins;
pub(crate) mod ranges;
pub mod reader;
pub mod serve;
mod trees;
mod window;

#[cfg(test)]
mod tests;

pub use cache::{Audited, Cache, CacheStats, Evicted, Limits, Room, Thorough};
pub use lend::Lender;
pub use manifest::Manifest;
pub use manifests::Manifests;
pub(crate) use ranges::RangeSet;
pub use reader::Reader;
pub use serve::OwnFiles;

use crate::error::{FsError, FsResult, Kind};
use crate::hydration::{Hydration, HydrationConfig};
use crate::index::Index;
use crate::model::{DeviceId, Entry, FileType, Location, LocationId, LocationNo, Time};
use crate::source::{ContentSource, Version};
use cache::Key;
use crowd::Crowds;
use dashmap::DashMap;
use fetch::Supply;
use reader::Pinned;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Semaphore;

/// How many reports are kept.
const REPORTS: usize = 100;
/// The most that may be under way from one device, in KiB: what reading takes of the memory.
/// By device, so that one that does not answer holds up nobody else's reads.
const UNDER_WAY_KIB: usize = 32 << 10;
/// How many ranges are read at once from this device's own locations: a disk that hangs must leave
/// threads to everything else.
const MAX_OWN_READS: usize = 16;

/// Settings of reading.
#[derive(Clone, Debug)]
pub struct ContentConfig {
    /// A read without any progress for this long fails with "Host is down".
    pub read_deadline: Duration,
    /// The most that is fetched ahead of one sequential reader.
    pub read_ahead_max_bytes: u64,
    /// What programs get that read for nobody who waits.
    pub hydration: HydrationConfig,
}

impl Default for ContentConfig {
    fn default() -> Self {
        Self {
            read_deadline: Duration::from_secs(10),
            read_ahead_max_bytes: 16 << 20,
            hydration: HydrationConfig::default(),
        }
    }
}

/// Bytes that were not what their content id says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// When it was noticed.
    pub at: Time,
    /// The device that had them; this one for its cache and its own disks.
    pub device: DeviceId,
    /// The location they were asked for in.
    pub location: LocationId,
    /// The file, below the location's folder.
    pub path: String,
    /// What was wrong.
    pub what: String,
}

/// Reading of files, whoever has them.
pub struct Content {
    index: Index,
    own: Arc<OwnFiles>,
    cache: Arc<Cache>,
    source: Arc<dyn ContentSource>,
    config: ContentConfig,
    runtime: tokio::runtime::Handle,
    pinned: Mutex<HashMap<(Key, u64), Weak<Pinned>>>,
    supplies: DashMap<DeviceId, Arc<Supply>>,
    reports: Mutex<VecDeque<Report>>,
    crowds: Crowds,
    hydration: Hydration,
    /// Ranges that are being fetched for anybody; and how many of them were begun for pins.
    flying: AtomicU64,
    brought: AtomicU64,
    /// Each is a thread that reads a range from this device's own locations.
    own_reads: Arc<Semaphore>,
}

impl Content {
    /// Joins the parts; fetches run on `runtime`.
    pub fn new(
        index: Index,
        own: Arc<OwnFiles>,
        cache: Arc<Cache>,
        source: Arc<dyn ContentSource>,
        config: ContentConfig,
        runtime: tokio::runtime::Handle,
    ) -> Arc<Self> {
        let hydration = Hydration::new(config.hydration.clone());
        Arc::new(Self {
            index,
            own,
            cache,
            source,
            config,
            runtime,
            pinned: Mutex::default(),
            supplies: DashMap::new(),
            reports: Mutex::default(),
            crowds: Crowds::default(),
            hydration,
            flying: 0.into(),
            brought: 0.into(),
            own_reads: Arc::new(Semaphore::new(MAX_OWN_READS)),
        })
    }

    /// Says which files have bytes here that are not their owner's, so that these are not
    /// fetched ahead; said once.
    pub(crate) fn attach(&self, written_here: crowd::WrittenHere) {
        // A second drive over the same parts says the same.
        let _ = self.crowds.written_here.set(written_here);
    }

    /// Pins the version that the entry names, to be read; never waits.
    pub fn open(self: &Arc<Self>, location: LocationNo, entry: &Entry) -> FsResult<Reader> {
        let reader = self.open_quietly(location, entry)?;
        Ok(match self.crowd_opened(location, entry) {
            true => reader,
            false => reader.noting((location, entry.file_id)),
        })
    }

    /// The same for a program for which nothing is fetched that it does not read.
    pub fn open_exactly(self: &Arc<Self>, location: LocationNo, entry: &Entry) -> FsResult<Reader> {
        Ok(self.open_quietly(location, entry)?.exactly())
    }

    /// How many bytes of a file are not in the cache.
    pub fn missing_bytes(&self, location: &Location, entry: &Entry) -> u64 {
        let version = Version::of(location.id, entry);
        entry.attr.size.saturating_sub(self.cache.cached_bytes(&version))
    }

    /// Whether a file of this device's own locations has the same bytes.
    pub fn has_own_copy(&self, entry: &Entry) -> bool {
        let Some(content) = entry.content else { return false };
        let is_own = |no| self.index.location(no).is_some_and(|l| l.owner == self.index.me());
        let holders = self.index.view().and_then(|view| view.holders(content));
        holders.is_ok_and(|holders| holders.iter().any(|(no, _)| is_own(*no)))
    }

    /// Who gets less than all.
    pub fn hydration(&self) -> &Hydration {
        &self.hydration
    }

    /// The same for bytes that no program has asked for.
    fn open_quietly(self: &Arc<Self>, location: LocationNo, entry: &Entry) -> FsResult<Reader> {
        if entry.attr.file_type != FileType::File {
            return Err(FsError::new(Kind::Invalid, "read what is not a regular file"));
        }
        let Some(location) = self.index.location(location) else {
            return Err(FsError::new(Kind::Stale, "open a file of a location that was removed"));
        };
        let version = Version::of(location.id, entry);
        let pinned = self.pin(&version);
        pinned.add_version(location.owner, version);
        Ok(Reader::new(pinned))
    }

    fn pin(self: &Arc<Self>, version: &Version) -> Arc<Pinned> {
        let key = (Key::of(version), version.stamp.size);
        let mut pinned = lock(&self.pinned);
        if let Some(found) = pinned.get(&key).and_then(Weak::upgrade) {
            return found;
        }
        let stamped = Key::stamped(version);
        let was_unhashed =
            key.0 != stamped && !self.cache.knows(key.0) && self.cache.knows(stamped);
        let unhashed = was_unhashed.then(|| self.cache.file(stamped, key.1));
        let new = Pinned::new(self.clone(), version, self.cache.file(key.0, key.1), unhashed);
        pinned.insert(key, Arc::downgrade(&new));
        new
    }

    fn unpin(&self, key: (Key, u64)) {
        let mut pinned = lock(&self.pinned);
        // Another may have been pinned between the last drop and this.
        if pinned.get(&key).is_some_and(|weak| weak.strong_count() == 0) {
            pinned.remove(&key);
        }
    }

    /// Where fetches run.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Whether another device can be reached right now, as far as is known.
    pub(crate) fn is_reachable(&self, device: DeviceId) -> bool {
        self.source.is_reachable(device)
    }

    /// The cache, to be shared.
    pub(crate) fn shared_cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The last reports of bytes that were wrong, oldest first.
    pub fn reports(&self) -> Vec<Report> {
        lock(&self.reports).iter().cloned().collect()
    }

    fn report(&self, device: DeviceId, version: &Version, what: String) {
        let path = self.path_of(version).unwrap_or_else(|| format!("file {}", version.file.0));
        tracing::warn!(%device, location = %version.location, path, "{what}");
        let report = Report { at: Time::now(), device, location: version.location, path, what };
        let mut reports = lock(&self.reports);
        if reports.len() == REPORTS {
            reports.pop_front();
        }
        reports.push_back(report);
    }

    fn path_of(&self, version: &Version) -> Option<String> {
        let location = self.index.location_by_id(version.location)?;
        let path = self.index.view().ok()?.path(location.no, version.file).ok()??;
        Some(path.iter().map(|name| name.display()).collect::<Vec<_>>().join("/"))
    }

    /// What is known of a device as a holder.
    fn supply_of(&self, device: DeviceId) -> Arc<Supply> {
        let new = || Arc::new(Supply::new(UNDER_WAY_KIB));
        self.supplies.entry(device).or_insert_with(new).clone()
    }
}

/// Adds to a number for as long as it lives.
struct Counted<'a> {
    number: &'a AtomicU64,
    by: u64,
    /// The number when that was added.
    with_it: u64,
}

impl<'a> Counted<'a> {
    fn new(number: &'a AtomicU64, by: u64) -> Self {
        let with_it = number.fetch_add(by, Ordering::Relaxed) + by;
        Self { number, by, with_it }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.number.fetch_sub(self.by, Ordering::Relaxed);
    }
}

/// A panic elsewhere leaves these small states as they were: it is sound to go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
