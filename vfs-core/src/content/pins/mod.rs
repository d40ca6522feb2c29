//! Pins: what of other devices' files is to be here always.
//!
//! | module | what it is |
//! |---|---|
//! | `file` | the list of pins, durable |
//! | `walk` | all files below a pin, in bounded memory |
//! | `pass` | what of them is here, and is held in the cache |
//! | `bring` | fetching the rest |
//! | `lane` | how much of that may be under way |
//!
//! A pin names a file or folder by its location and file id, so it goes along when that is
//! renamed. Which contents are below it is known to nobody but the index: a *pass* walks through
//! all pins in one state of it, has the cache hold what it has of their files, counts, and in
//! the end lets the cache have what no pin wants any more. A pass follows each change below a
//! pin. So nothing about files is kept, in memory or on the disk, that could be wrong after a
//! crash: the cache holds everything until the first pass after a start has ended.
//!
//! While it is not known what a pin means, because the rows of its location are not here (yet,
//! or again, after an index was lost), no pass lets anything go.
//!
//! What is missing is fetched a few files at a time, and only while no program waits for bytes.
//! It stops where the cache has no room that would stay, and where nobody can be asked, and goes
//! on when that has changed.

mod bring;
mod file;
mod lane;
mod pass;
#[cfg(test)]
mod tests;
mod walk;

pub use file::{Pin, PinError, PinFile};

use super::cache::{Evicted, Room};
use super::{Content, lock};
use crate::changes::{Change, Next};
use crate::index::IndexError;
use crate::model::{DeviceId, FileId, FileType, LocationId, LocationNo, Time};
use crate::source::Version;
use lru::LruCache;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use walk::Walk;

/// A pass follows a change after at least this time: changes come in numbers.
const PASS_AFTER: Duration = Duration::from_millis(500);
/// Passes take at most one part of the time in so many.
const PASS_SHARE: u32 = 10;
/// Without a change there is a pass all the same: what a disk lost is fetched again.
const PASS_EVERY: Duration = Duration::from_secs(600);
/// The cache looks at its disk, which others fill too, at least this often.
const TRIM_EVERY: Duration = Duration::from_secs(30);

/// Large files of which is known when they came last.
const RECENT: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// A pin by what it names.
type PinKey = (LocationId, FileId);

/// Files below a pin, and how much of them is here.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Tally {
    /// Names of regular files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Of these files: all of it is here.
    pub here_files: u64,
    /// Of these bytes.
    pub here_bytes: u64,
}

impl Tally {
    /// Bytes that are not here.
    pub fn missing_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.here_bytes)
    }

    fn is_complete(&self) -> bool {
        self.here_files >= self.files
    }
}

/// What keeps the rest of a pin from coming.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Nothing is missing.
    Here,
    /// It comes, or has its turn soon.
    Fetching,
    /// Its owner cannot be reached.
    Offline,
    /// Pinned content is all that the cache may keep.
    CacheFull,
    /// The disk of the cache has no more space to give.
    DiskFull,
    /// What is missing could not be had; it is tried again.
    Failed(String),
    /// The rows of its location are not here yet.
    Unknown,
    /// Its owner has removed it, or the whole location.
    Gone,
}

impl Standing {
    /// Whether more may come without anybody doing anything.
    pub fn is_hopeful(&self) -> bool {
        matches!(self, Self::Fetching | Self::Offline | Self::Unknown | Self::Failed(_))
    }
}

/// A pin and how far it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pinned {
    /// The pin.
    pub pin: Pin,
    /// What is below it.
    pub tally: Tally,
    /// How it stands.
    pub standing: Standing,
}

/// By how much pinned content is more than there is room for.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Excess {
    /// Up to the limit of the cache.
    pub of_limit_bytes: u64,
    /// On its disk.
    pub of_disk_bytes: u64,
}

/// What a pass found, and what became of fetching since.
#[derive(Clone, Debug)]
struct Progress {
    found: Found,
    tally: Tally,
    obstacle: Option<Obstacle>,
}

/// What a pin is the name of now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    There(LocationNo),
    Gone,
    Unknown,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Obstacle {
    CacheFull,
    DiskFull,
    Failed(String),
}

impl From<Room> for Obstacle {
    fn from(room: Room) -> Self {
        match room.of_disk_bytes < room.of_limit_bytes {
            true => Self::DiskFull,
            false => Self::CacheFull,
        }
    }
}

/// The pins of this device, and their keeper.
pub struct Pins {
    content: Arc<Content>,
    file: PinFile,
    /// Held by the one pass.
    passing: Mutex<()>,
    state: Mutex<State>,
    /// Room that files which are being fetched will take.
    reserved_bytes: AtomicU64,
    /// Large files that were begun to be fetched, and when.
    recent: Mutex<LruCache<(LocationNo, FileId), Instant>>,
    /// Something is to be looked at.
    woken: Notify,
    /// A pass has ended.
    passed: Notify,
}

#[derive(Default)]
struct State {
    progress: HashMap<PinKey, Progress>,
    /// Locations that were there since the start: one of them that is missing was removed.
    seen: HashSet<LocationId>,
    /// There was news since the last pass began.
    is_dirty: bool,
    /// Counts what may let more be fetched, and how much of it a pass has taken in.
    news: u64,
    passed_news: u64,
    /// How many passes have ended.
    passes: u64,
}

impl Pins {
    /// The keeper of these pins; to be [tended](Self::tend).
    pub fn new(file: PinFile, content: Arc<Content>) -> Arc<Self> {
        Arc::new(Self {
            content,
            file,
            passing: Mutex::default(),
            state: Mutex::new(State { is_dirty: true, news: 1, ..State::default() }),
            reserved_bytes: 0.into(),
            recent: Mutex::new(LruCache::new(RECENT)),
            woken: Notify::new(),
            passed: Notify::new(),
        })
    }

    /// The list as it lies on the disk.
    pub fn file(&self) -> &PinFile {
        &self.file
    }

    /// Pins a file, or a folder with all below it; `false`: it was already. [`Self::catch_up`] says
    /// when it is known what that means.
    pub fn pin(&self, no: LocationNo, file: FileId) -> Result<bool, PinError> {
        let index = &self.content.index;
        let location = index.location(no).ok_or(PinError::NotThere)?;
        if location.owner == index.me() {
            return Err(PinError::Own);
        }
        let view = index.view()?;
        let node = view.node(no, file)?.ok_or(PinError::NotThere)?;
        if !matches!(node.entry.attr.file_type, FileType::File | FileType::Directory) {
            return Err(PinError::NoContent);
        }
        let pin = Pin {
            owner: location.owner,
            location: location.id,
            location_name: location.name.clone(),
            log_id: index.log_id(no),
            file,
            path: view.path(no, file)?.ok_or(PinError::NotThere)?,
            since: Time::now(),
            gone: false,
        };
        drop(view);
        let is_new = self.file.add(pin)?;
        self.try_again();
        Ok(is_new)
    }

    /// Takes a pin back; `false`: there was none. After [`Self::catch_up`], what was held for it
    /// alone may be evicted.
    pub fn unpin(&self, location: LocationId, file: FileId) -> Result<bool, PinError> {
        let was_pinned = self.file.remove((location, file))?;
        self.try_again();
        Ok(was_pinned)
    }

    /// Every pin, in the order in which they were made.
    pub fn list(&self) -> Vec<Pinned> {
        let pins = self.file.pins();
        let state = lock(&self.state);
        let pinned = pins.into_iter().map(|pin| {
            let progress = state.progress.get(&pin.key());
            Pinned {
                tally: progress.map(|p| p.tally).unwrap_or_default(),
                standing: progress.map_or(Standing::Unknown, |p| self.standing(&pin, p)),
                pin,
            }
        });
        pinned.collect()
    }

    fn standing(&self, pin: &Pin, progress: &Progress) -> Standing {
        match (progress.found, &progress.obstacle) {
            (Found::Unknown, _) => Standing::Unknown,
            (Found::Gone, _) => Standing::Gone,
            _ if progress.tally.is_complete() => Standing::Here,
            (_, Some(Obstacle::CacheFull)) => Standing::CacheFull,
            (_, Some(Obstacle::DiskFull)) => Standing::DiskFull,
            _ if !self.content.is_reachable(pin.owner) => Standing::Offline,
            (_, Some(Obstacle::Failed(why))) => Standing::Failed(why.clone()),
            _ => Standing::Fetching,
        }
    }

    /// How many bytes more are pinned than fit, at most: the same bytes in two files count twice.
    pub fn excess(&self) -> Excess {
        let missing: u64 = {
            let state = lock(&self.state);
            state.progress.values().map(|p| p.tally.missing_bytes()).sum()
        };
        let room = self.content.cache.room();
        Excess {
            of_limit_bytes: missing.saturating_sub(room.of_limit_bytes),
            of_disk_bytes: missing.saturating_sub(room.of_disk_bytes),
        }
    }

    /// The pin that a file is under: its own, or that of a folder above it.
    pub fn covering(&self, no: LocationNo, file: FileId) -> Result<Option<Pin>, IndexError> {
        let index = &self.content.index;
        let Some(location) = index.location(no) else { return Ok(None) };
        let its = self.file.pins().into_iter().filter(|pin| pin.location == location.id);
        let its: HashMap<FileId, Pin> = its.map(|pin| (pin.file, pin)).collect();
        if its.is_empty() {
            return Ok(None);
        }
        walk::first_above(&index.view()?, no, file, |file| its.get(&file).cloned())
    }

    /// Gives back what is cached of a file, or of all below a folder, and is neither pinned nor
    /// open; or only says how much that would be. Writes that wait for their owner are not in the
    /// cache.
    pub fn evict(
        &self,
        no: LocationNo,
        file: FileId,
        dry_run: bool,
    ) -> Result<Evicted, IndexError> {
        self.catch_up()?;
        let index = &self.content.index;
        let mut evicted = Evicted::default();
        let (Some(location), view) = (index.location(no), index.view()?) else {
            return Ok(evicted);
        };
        let Some(node) = view.node(no, file)? else { return Ok(evicted) };
        let mut walk = Walk::begin(no, &node.entry);
        while walk.step(&view, &mut |entry| {
            let one = self.content.cache.evict(&Version::of(location.id, entry), dry_run);
            evicted.freed_bytes += one.freed_bytes;
            evicted.pinned_bytes += one.pinned_bytes;
            evicted.open_bytes += one.open_bytes;
        })? {}
        if !dry_run {
            self.try_again();
        }
        Ok(evicted)
    }

    /// Returns when everything that was known before is taken in: what was pinned and unpinned, what
    /// is below each pin, and so what may be evicted.
    pub fn catch_up(&self) -> Result<(), IndexError> {
        // Not before a pass has ended that is under way.
        let passing = lock(&self.passing);
        let is_dirty = lock(&self.state).is_dirty;
        match is_dirty {
            true => self.pass_holding(&passing),
            false => Ok(()),
        }
    }

    /// There may be more room than there was: what did not fit is tried again.
    pub fn try_again(&self) {
        lock(&self.state).progress.values_mut().for_each(|p| p.obstacle = None);
        self.look_again();
    }

    /// Something changed below a pin.
    fn look_again(&self) {
        {
            let mut state = lock(&self.state);
            state.is_dirty = true;
            state.news += 1;
        }
        self.woken.notify_one();
    }

    /// Waits until something may have changed in [`Self::list`].
    pub async fn progressed(&self) {
        let _ = tokio::time::timeout(Duration::from_millis(250), self.passed.notified()).await;
    }

    /// Keeps what is pinned here; ends with the index.
    pub async fn tend(self: Arc<Self>) {
        tokio::select! {
            () = self.clone().keep_passing() => {}
            () = self.clone().keep_bringing() => {}
        }
    }

    async fn keep_passing(self: Arc<Self>) {
        let mut feed = self.content.index.feed().subscribe();
        let (mut last_pass, mut not_before) = (Instant::now(), Instant::now());
        let mut trimmed = Instant::now();
        loop {
            let is_dirty = lock(&self.state).is_dirty;
            let now = Instant::now();
            if trimmed.elapsed() >= TRIM_EVERY {
                trimmed = now;
                let pins = self.clone();
                let trim = move || pins.content.cache.trim();
                let _ = self.content.runtime().spawn_blocking(trim).await;
            }
            if (is_dirty && now >= not_before) || last_pass.elapsed() >= PASS_EVERY {
                let pins = self.clone();
                let pass = self.content.runtime().spawn_blocking(move || pins.pass()).await;
                if let Ok(Err(error)) = &pass {
                    tracing::warn!(%error, "what is pinned could not be looked through");
                    lock(&self.state).is_dirty = true;
                }
                last_pass = Instant::now();
                not_before = last_pass + PASS_AFTER.max(PASS_SHARE * now.elapsed());
                continue;
            }
            let wait = match is_dirty {
                true => not_before - now,
                false => TRIM_EVERY,
            };
            tokio::select! {
                next = feed.next() => match next {
                    None => return,
                    Some(next) if self.concerns(&next) => self.look_again(),
                    Some(_) => {}
                },
                () = self.woken.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Whether something below a pin may have changed.
    fn concerns(&self, next: &Next) -> bool {
        let Next::Batch(changes) = next else { return true };
        let mut pinned: Option<HashSet<LocationNo>> = None;
        changes.iter().any(|change| match change {
            Change::Locations | Change::Reset => true,
            Change::Devices => false,
            Change::Entry { location, .. } | Change::Attributes { location, .. } => {
                pinned.get_or_insert_with(|| self.pinned_locations()).contains(location)
            }
        })
    }

    fn pinned_locations(&self) -> HashSet<LocationNo> {
        let index = &self.content.index;
        let pins = self.file.pins();
        pins.iter().filter_map(|pin| Some(index.location_by_id(pin.location)?.no)).collect()
    }

    /// How much is pinned, and of how many pins.
    pub fn total(&self) -> (usize, Tally) {
        let pins = self.file.pins().len();
        let state = lock(&self.state);
        let mut total = Tally::default();
        for Progress { tally, .. } in state.progress.values() {
            total.files += tally.files;
            total.bytes += tally.bytes;
            total.here_files += tally.here_files;
            total.here_bytes += tally.here_bytes;
        }
        (pins, total)
    }

    /// The owners of what is pinned.
    fn owners(&self) -> HashSet<DeviceId> {
        self.file.pins().iter().map(|pin| pin.owner).collect()
    }
}
