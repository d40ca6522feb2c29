//! Fetching what pins miss.

use super::lane::{FILES, Lane};
use super::walk::Walk;
use super::{Found, Obstacle, Pin, PinKey, Pins, Progress};
use crate::content::fetch::Failure;
use crate::content::lock;
use crate::index::IndexError;
use crate::model::{DeviceId, Entry, Location, LocationNo};
use crate::source::Version;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Pins at once, so that a small one does not wait for a large one.
const PINS: usize = 8;
/// Of files above this only few come at once, so that some are whole soon.
const LARGE_BYTES: u64 = 4 << 20;
const LARGE_FILES: u32 = 2;
/// Missing files that are looked for at once, and the steps of a walk that may take.
const BATCH: usize = 256;
const STEPS: usize = 64;
/// What could not be had is asked for again after this time, or after so many times what the
/// last attempt took.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
const AGAIN_SHARE: u32 = 20;
/// How often is looked whether an owner came back.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A range for which there is no memory just now is asked for again so often, after this pause.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// What is known of an attempt at one pin.
#[derive(Default)]
struct Attempt {
    /// Nothing more comes of it now.
    is_over: AtomicBool,
    obstacle: Mutex<Option<Obstacle>>,
}

impl Attempt {
    fn meet(&self, obstacle: Obstacle) {
        lock(&self.obstacle).get_or_insert(obstacle);
    }

    fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// When a pin was thought of last.
struct Tried {
    news: u64,
    again_at: Instant,
    /// Not before, whatever has changed: an attempt goes through all that is pinned.
    rests_until: Instant,
    is_running: bool,
}

/// And not later than this, however long the attempt took: most of that may have been fetching.
const AGAIN_AT_LAST: Duration = Duration::from_secs(600);

impl Pins {
    pub(super) async fn keep_bringing(self: Arc<Self>) {
        let mut lanes: HashMap<DeviceId, Arc<Lane>> = HashMap::new();
        let mut tried: HashMap<PinKey, Tried> = HashMap::new();
        let mut reachable = HashSet::new();
        let mut attempts = JoinSet::new();
        loop {
            tokio::select! {
                Some(ended) = attempts.join_next(), if !attempts.is_empty() => {
                    if let Ok((key, began)) = ended {
                        end(&mut tried, key, began);
                    }
                    // What came is counted; that is no news.
                    lock(&self.state).is_dirty = true;
                    self.woken.notify_one();
                }
                // An owner's return is not told, so it is looked now and then.
                _ = tokio::time::timeout(LOOK_EVERY, self.passed.notified()) => {}
            }
            let now: HashSet<DeviceId> =
                self.owners().into_iter().filter(|o| self.content.is_reachable(*o)).collect();
            let came: HashSet<_> = now.difference(&reachable).copied().collect();
            reachable = now;
            let news = lock(&self.state).passed_news;
            // The newest first: somebody may be waiting for it.
            for pin in self.file.pins().into_iter().rev() {
                let last = tried.get(&pin.key());
                let is_due = last.is_none_or(|last| {
                    let is_new = last.news < news || came.contains(&pin.owner);
                    let now = Instant::now();
                    let is_due = is_new && now >= last.rests_until || now >= last.again_at;
                    !last.is_running && is_due
                });
                let may_come = is_due && reachable.contains(&pin.owner);
                if !may_come || attempts.len() >= PINS || !self.misses_some(&pin) {
                    continue;
                }
                let now = Instant::now();
                let tries = Tried { news, again_at: now, rests_until: now, is_running: true };
                tried.insert(pin.key(), tries);
                let lane = lanes.entry(pin.owner).or_default().clone();
                let (pins, began) = (self.clone(), Instant::now());
                attempts.spawn(async move {
                    pins.bring_pin(&pin, lane).await;
                    (pin.key(), began)
                });
            }
        }
    }

    fn misses_some(&self, pin: &Pin) -> bool {
        let state = lock(&self.state);
        state.progress.get(&pin.key()).is_some_and(|progress| {
            matches!(progress.found, Found::There(_)) && !progress.tally.is_complete()
        })
    }

    async fn bring_pin(self: &Arc<Self>, pin: &Pin, lane: Arc<Lane>) {
        let attempt = Arc::new(Attempt::default());
        self.put_obstacle(pin, None);
        if let Err(error) = self.bring_below(pin, lane, &attempt).await {
            attempt.meet(Obstacle::Failed(error.to_string()));
        }
        let obstacle = lock(&attempt.obstacle).take();
        self.put_obstacle(pin, obstacle);
    }

    fn put_obstacle(&self, pin: &Pin, obstacle: Option<Obstacle>) {
        if let Some(progress) = lock(&self.state).progress.get_mut(&pin.key()) {
            progress.obstacle = obstacle;
        }
    }

    /// Whether a large file came just before: one that is written to all the time comes now and
    /// then, not all the time.
    fn came_just_now(&self, entry: &Entry, no: LocationNo) -> bool {
        if entry.attr.size <= LARGE_BYTES {
            return false;
        }
        let mut recent = lock(&self.recent);
        let file = (no, entry.file_id);
        let just_now = recent.get(&file).is_some_and(|at| at.elapsed() < AGAIN_AFTER);
        if !just_now {
            recent.put(file, Instant::now());
        }
        just_now
    }

    async fn bring_below(
        self: &Arc<Self>,
        pin: &Pin,
        lane: Arc<Lane>,
        attempt: &Arc<Attempt>,
    ) -> Result<(), IndexError> {
        let index = &self.content.index;
        let Some(location) = index.location_by_id(pin.location) else { return Ok(()) };
        let Some(node) = index.view()?.node(location.no, pin.file)? else { return Ok(()) };
        let mut walk = Walk::begin(location.no, &node.entry);
        let mut under_way = JoinSet::new();
        let mut more = true;
        while more {
            let (pins, place) = (self.clone(), location.clone());
            let looking = move || {
                let found = pins.missing(&mut walk, &place);
                (walk, found)
            };
            // Its failure would be a panic, already reported.
            let Ok((back, found)) = self.content.runtime().spawn_blocking(looking).await else {
                break;
            };
            walk = back;
            let (batch, has_more) = found?;
            more = has_more;
            for entry in batch {
                let is_large = entry.attr.size > LARGE_BYTES;
                let takes = if is_large { FILES / LARGE_FILES } else { 1 };
                let Ok(permit) = lane.places.clone().acquire_many_owned(takes).await else { break };
                if attempt.is_over() || !self.file.contains(pin.key()) {
                    more = false;
                    break;
                }
                while under_way.try_join_next().is_some() {}
                let file = File {
                    passes: lock(&self.state).passes,
                    pins: self.clone(),
                    location: location.clone(),
                    pin: pin.key(),
                    lane: lane.clone(),
                    attempt: attempt.clone(),
                };
                under_way.spawn(async move {
                    file.bring(&entry).await;
                    drop(permit);
                });
            }
        }
        while under_way.join_next().await.is_some() {}
        Ok(())
    }

    /// The next files of a walk that are not here, and whether there may be more.
    fn missing(
        &self,
        walk: &mut Walk,
        location: &Location,
    ) -> Result<(Vec<Entry>, bool), IndexError> {
        let view = self.content.index.view()?;
        let mut found = Vec::new();
        for _ in 0..STEPS {
            let more = walk.step(&view, &mut |entry| {
                let is_here = entry.attr.size == 0
                    || self.content.cache.kept(&Version::of(location.id, entry)).is_whole;
                if !is_here {
                    found.push(entry.clone());
                }
            })?;
            if !more || found.len() >= BATCH {
                return Ok((found, more));
            }
        }
        Ok((found, true))
    }

    /// Adds what came of a file that was begun after so many passes. A later pass may have counted
    /// it already, and the next one does in any case: never is more told than is here.
    fn count(&self, pin: PinKey, passes: u64, files: u64, bytes: u64) {
        let mut state = lock(&self.state);
        if state.passes != passes {
            return;
        }
        if let Some(Progress { tally, .. }) = state.progress.get_mut(&pin) {
            tally.here_files = (tally.here_files + files).min(tally.files);
            tally.here_bytes = (tally.here_bytes + bytes).min(tally.bytes);
        }
    }
}

/// An attempt is over.
fn end(tried: &mut HashMap<PinKey, Tried>, key: PinKey, began: Instant) {
    if let Some(tried) = tried.get_mut(&key) {
        tried.is_running = false;
        let (now, took) = (Instant::now(), began.elapsed());
        tried.rests_until = now + took.min(AGAIN_AFTER);
        tried.again_at = now + (AGAIN_SHARE * took).clamp(AGAIN_AFTER, AGAIN_AT_LAST);
    }
}

/// A file that is being fetched for a pin.
struct File {
    pins: Arc<Pins>,
    passes: u64,
    location: Arc<Location>,
    pin: PinKey,
    lane: Arc<Lane>,
    attempt: Arc<Attempt>,
}

impl File {
    async fn bring(&self, entry: &Entry) {
        let content = &self.pins.content;
        let version = Version::of(self.location.id, entry);
        let Ok(reader) = content.open_quietly(self.location.no, entry) else { return };
        let missing = reader.missing_bytes().await;
        if missing == 0 {
            content.cache.hold_come(&version);
            return self.pins.count(self.pin, self.passes, 1, 0);
        }
        let Some(reserved) = self.reserve(missing) else { return };
        if self.pins.came_just_now(entry, self.location.no) {
            return;
        }
        content.cache.hold_coming(&version);
        let brought = self.bring_all(&reader, missing, reserved).await;
        content.cache.hold_come(&version);
        if !matches!(brought, Ok(true)) {
            lock(&self.pins.recent).pop(&(self.location.no, entry.file_id));
        }
        match brought {
            Ok(true) => self.pins.count(self.pin, self.passes, 1, 0),
            // What the cache does not take would come for nothing.
            Ok(false) => self.attempt.end(),
            Err(Failure::HostDown) => {
                self.attempt.meet(Obstacle::Failed("its owner does not answer".into()));
                self.attempt.end();
            }
            Err(Failure::Refused) => {
                self.attempt.meet(Obstacle::Failed("its owner refuses to give it".into()));
                self.attempt.end();
            }
            Err(Failure::Io) => {
                let what = "no device could give the right bytes of some files";
                self.attempt.meet(Obstacle::Failed(what.into()));
            }
            // It is another version by now, whose row comes; or there is no memory for it yet.
            Err(Failure::Stale | Failure::Postponed) => {}
        }
    }

    /// Takes room that is to stay; other files that fit are not kept from coming.
    fn reserve(&self, bytes: u64) -> Option<Reserved<'_>> {
        let reserved = &self.pins.reserved_bytes;
        let room = self.pins.content.cache.room();
        let before = reserved.fetch_add(bytes, Ordering::Relaxed);
        let taken = Reserved { all: reserved, bytes };
        if before + bytes <= room.bytes() {
            return Some(taken);
        }
        self.attempt.meet(room.into());
        None
    }

    /// `false`: the cache did not take it.
    async fn bring_all(
        &self,
        reader: &crate::content::Reader,
        mut missing: u64,
        mut reserved: Reserved<'_>,
    ) -> Result<bool, Failure> {
        let content = &self.pins.content;
        let mut tries = 0;
        while missing > 0 {
            if !self.pins.file.contains(self.pin) {
                return Ok(false);
            }
            let flight = self.lane.enter(content, missing).await;
            match reader.bring(flight.bytes(), flight.request_bytes()).await {
                Ok(true) => flight.landed(),
                Ok(false) => {
                    self.attempt.meet(self.why_not_kept());
                    return Ok(false);
                }
                Err(Failure::Postponed) if tries < TRIES => {
                    drop(flight);
                    tries += 1;
                    tokio::time::sleep(PAUSE).await;
                }
                Err(failure) => return Err(failure),
            }
            let left = reader.missing_bytes().await;
            self.pins.count(self.pin, self.passes, 0, missing.saturating_sub(left));
            reserved.keep(left);
            missing = left;
        }
        Ok(true)
    }

    fn why_not_kept(&self) -> Obstacle {
        let stats = self.pins.content.cache.stats();
        stats.problem.map_or_else(|| self.pins.content.cache.room().into(), Obstacle::Failed)
    }
}

/// Room for bytes that are still to come; those that are here are held, and count there.
struct Reserved<'a> {
    all: &'a AtomicU64,
    bytes: u64,
}

impl Reserved<'_> {
    fn keep(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        self.all.fetch_sub(less, Ordering::Relaxed);
        self.bytes -= less;
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
