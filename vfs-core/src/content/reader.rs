//! Reads of a pinned version.
//!
//! All handles on one version share a [`Pinned`]: the cache's file of it, and
//! the *flights*, ranges that are being fetched. A read takes what is in the
//! cache, joins the flights that bring what is not, and starts flights for the
//! rest; a sequential handle has further ones started ahead of it. A flight's
//! bytes go to those who wait for them at once and to the cache after that.
//!
//! When the cache takes nothing (no room, a failing disk), the last few flights
//! are kept in memory instead, so that small reads of one range fetch it once.
//!
//! **Locks**: `state` is held for planning only, never across an await or I/O;
//! within it, the cached file's own short lock.

use super::cache::{CachedFile, Key};
use super::fetch::{Failure, Fetcher, RangeRequest};
use super::manifest::{GROUP_BYTES, groups_of};
use super::window::Pattern;
use super::{Content, Counted, lock};
use crate::error::{FsError, FsResult};
use crate::model::{DeviceId, FileId, LocationNo};
use crate::source::{MAX_FETCH_BYTES, Version};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Flights ahead of the readers of one version. Fewer leave the link idle between answer and
/// next request, more only queue at the holder (8 × 1 MiB already cover 40 ms at 1.6 Gbit/s).
const MAX_AHEAD: usize = 8;
/// How many landed flights are kept in memory while the cache takes nothing.
const KEPT_FLIGHTS: usize = 8;
/// How often a read plans anew when what it was promised is gone again.
const MAX_PLANS: usize = 8;

const OTHER_CONTENT: &str = "the bytes that came before the file was hashed are of another content";

/// A range being fetched, or just arrived.
struct Flight {
    range: Range<u64>,
    landed: watch::Sender<Option<Result<Bytes, Failure>>>,
    /// Whether the cache took the bytes, once that is known.
    kept: watch::Sender<Option<bool>>,
    abort: OnceLock<AbortHandle>,
    ahead: bool,
    /// A program's read waits for it, or did.
    wanted: AtomicBool,
}

impl Flight {
    /// The bytes, once they are here.
    async fn wait(&self) -> Result<Bytes, Failure> {
        let mut landed = self.landed.subscribe();
        match landed.wait_for(Option::is_some).await {
            Ok(result) => result.clone().unwrap_or(Err(Failure::Postponed)),
            Err(_) => Err(Failure::Postponed),
        }
    }

    /// Whether the cache took the bytes, once they are here.
    async fn is_kept(&self) -> Result<bool, Failure> {
        self.wait().await?;
        let mut kept = self.kept.subscribe();
        let kept = kept.wait_for(Option::is_some).await;
        Ok(kept.is_ok_and(|kept| *kept == Some(true)))
    }
}

/// A version that is open, shared by its handles.
pub(super) struct Pinned {
    content: Arc<Content>,
    key: (Key, u64),
    file: Arc<CachedFile>,
    fetcher: Arc<Fetcher>,
    /// The same version's bytes from before it was hashed, to be looked at before the first read.
    unhashed: Mutex<Option<Arc<CachedFile>>>,
    me: Weak<Self>,
    next_reader: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Disjoint, by start.
    flights: BTreeMap<u64, Arc<Flight>>,
    /// Landed, but not in the cache.
    kept: VecDeque<Arc<Flight>>,
    patterns: HashMap<u64, Pattern>,
    /// The cache took the last bytes.
    caching: Option<bool>,
}

/// Where a part of a read comes from.
enum Part {
    Cache(Range<u64>),
    Flight(Arc<Flight>, Range<u64>),
}

impl Pinned {
    pub(super) fn new(
        content: Arc<Content>,
        version: &Version,
        file: Arc<CachedFile>,
        unhashed: Option<Arc<CachedFile>>,
    ) -> Arc<Self> {
        let size = version.stamp.size;
        let fetcher = Arc::new(Fetcher::new(content.clone(), version.content, size));
        Arc::new_cyclic(|me| Self {
            content,
            key: (Key::of(version), size),
            file,
            fetcher,
            unhashed: Mutex::new(unhashed),
            me: me.clone(),
            next_reader: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    pub(super) fn add_version(&self, owner: DeviceId, version: Version) {
        self.fetcher.add_version(owner, version);
    }

    /// Where every part of a range comes from, flights for what is missing and ahead of the
    /// reader included.
    fn plan(&self, reader: u64, read: &Range<u64>) -> Vec<Part> {
        let (parts, started) = {
            let mut state = lock(&self.state);
            let mut started = Vec::new();
            let parts = self.parts(&mut state, reader, read, &mut started);
            self.plan_ahead(&mut state, reader, &mut started);
            (parts, started)
        };
        self.launch(started);
        parts
    }

    fn parts(
        &self,
        state: &mut State,
        reader: u64,
        read: &Range<u64>,
        started: &mut Vec<Arc<Flight>>,
    ) -> Vec<Part> {
        let request = state.pattern(reader).request_bytes(&self.fetcher.link());
        let mut parts = Vec::new();
        let mut at = read.start;
        for missing in self.file.missing(groups_around(read)) {
            let missing = missing.start * GROUP_BYTES..(missing.end * GROUP_BYTES).min(self.key.1);
            if at < missing.start {
                parts.push(Part::Cache(at..missing.start));
                at = missing.start;
            }
            while at < missing.end.min(read.end) {
                let start = at / GROUP_BYTES * GROUP_BYTES;
                let flight = state.flight_at(start).unwrap_or_else(|| {
                    let end = state.free_until(start, missing.end).min(start + request);
                    state.start(start..end, false, started)
                });
                let end = flight.range.end.min(read.end);
                parts.push(Part::Flight(flight, at..end));
                at = end;
            }
        }
        if at < read.end {
            parts.push(Part::Cache(at..read.end));
        }
        parts
    }

    /// Flights for what a sequential reader will want next.
    fn plan_ahead(&self, state: &mut State, reader: u64, started: &mut Vec<Arc<Flight>>) {
        let link = self.fetcher.link();
        let size = self.key.1;
        let max_window = self.max_window(state);
        let ahead = state.pattern(reader).ahead(size, max_window);
        let request = state.pattern(reader).request_bytes(&link);
        let groups = ahead.start.div_ceil(GROUP_BYTES)..ahead.end.div_ceil(GROUP_BYTES);
        for missing in self.file.missing(groups) {
            let end = (missing.end * GROUP_BYTES).min(size);
            let mut at = missing.start * GROUP_BYTES;
            while at < end {
                if let Some(flight) = state.flight_at(at) {
                    at = flight.range.end;
                    continue;
                }
                let free = at..state.free_until(at, end).min(at + request);
                // A short request at the moving edge of the window waits until it is a full one.
                let at_edge = free.end == end && free.end < size && end >= ahead.end;
                let full = free.end - free.start >= request || !at_edge;
                if !full || !state.has_room(free.end - free.start, link.in_flight_bytes()) {
                    return;
                }
                at = free.end;
                state.start(free, true, started);
            }
        }
    }

    /// Flights for what is missing, about so many bytes of it, which nobody waits for yet, and how
    /// many of them begin now.
    fn plan_missing(&self, most: u64, request: u64) -> (Vec<Arc<Flight>>, usize) {
        let (mut flights, mut started) = (Vec::new(), Vec::new());
        {
            let mut state = lock(&self.state);
            let mut planned = 0;
            for missing in self.file.missing(0..groups_of(self.key.1)) {
                let mut at = missing.start * GROUP_BYTES;
                let end = (missing.end * GROUP_BYTES).min(self.key.1);
                while at < end && planned < most {
                    let flight = state.flight_at(at).unwrap_or_else(|| {
                        let end = state.free_until(at, end).min(at + request);
                        state.start(at..end, true, &mut started)
                    });
                    planned += flight.range.end - at;
                    at = flight.range.end;
                    flights.push(flight);
                }
            }
        }
        let new = started.len();
        self.launch(started);
        (flights, new)
    }

    fn max_window(&self, state: &State) -> u64 {
        let configured = self.content.config.read_ahead_max_bytes;
        match state.caching {
            Some(false) => configured.min(KEPT_FLIGHTS as u64 / 2 * MAX_FETCH_BYTES),
            _ => configured,
        }
    }

    fn launch(&self, started: Vec<Arc<Flight>>) {
        for flight in started {
            let task = fly(self.me.clone(), self.fetcher.clone(), flight.clone());
            let task = self.content.runtime.spawn(task);
            // Set once, here only.
            let _ = flight.abort.set(task.abort_handle());
        }
    }

    /// A flight's bytes are with those who waited; keeps them for others.
    async fn landed(&self, flight: &Arc<Flight>, bytes: &Bytes) {
        let (file, kept) = (self.file.clone(), bytes.clone());
        let start = flight.range.start;
        let write = self.content.runtime.spawn_blocking(move || file.write(start, &kept));
        let cached = write.await.unwrap_or(false);
        let mut state = lock(&self.state);
        state.flights.remove(&flight.range.start);
        state.caching = Some(cached);
        if !cached {
            state.kept.push_back(flight.clone());
            if state.kept.len() > KEPT_FLIGHTS {
                state.kept.pop_front();
            }
        }
        flight.kept.send_replace(Some(cached));
    }

    fn failed(&self, flight: &Flight) {
        let mut state = lock(&self.state);
        state.flights.remove(&flight.range.start);
        if flight.ahead {
            state.patterns.values_mut().for_each(Pattern::close);
        }
    }

    /// Keeps the windows of all readers filled.
    fn top_up(&self) {
        let mut started = Vec::new();
        {
            let mut state = lock(&self.state);
            let readers: Vec<u64> = state.patterns.keys().copied().collect();
            for reader in readers {
                self.plan_ahead(&mut state, reader, &mut started);
            }
        }
        self.launch(started);
    }

    fn note(&self, reader: u64, read: &Range<u64>) {
        let max = self.content.config.read_ahead_max_bytes;
        lock(&self.state).pattern(reader).note(read.clone(), max);
    }

    /// When every byte of an unhashed version is here and its hash became known, the bytes
    /// are checked against it, and become content.
    async fn promote_if_hashed(&self) {
        if !matches!(self.key.0, Key::Stamped(_)) || !self.file.is_full() {
            return;
        }
        let Some(me) = self.me.upgrade() else { return };
        // Its failure would be a panic, already reported.
        let _ = self.content.runtime.spawn_blocking(move || me.promote()).await;
    }

    fn promote(&self) {
        let Some(version) = self.fetcher.a_version() else { return };
        let index = &self.content.index;
        let Some(location) = index.location_by_id(version.location) else { return };
        let node = index.view().and_then(|view| view.node(location.no, version.file));
        let Ok(Some(node)) = node else { return };
        let Some(content) = node.entry.content.filter(|_| node.entry.stamp() == version.stamp)
        else {
            return;
        };
        if self.file.promote(content) == Some(false) {
            self.content.report(location.owner, &version, OTHER_CONTENT.into());
        }
    }

    fn needs_check(&self) -> bool {
        self.file.needs_check() || lock(&self.unhashed).is_some()
    }

    /// What lies in the cache unverified is checked before its first use: a file from before a
    /// crash of the machine, and what came before the file was hashed.
    async fn check(&self) {
        let (file, unhashed) = (self.file.clone(), lock(&self.unhashed).clone());
        let checks = move || (file.check(), unhashed.is_none_or(|unhashed| file.adopt(&unhashed)));
        let checked = self.content.runtime.spawn_blocking(checks).await;
        lock(&self.unhashed).take();
        let Some(version) = self.fetcher.a_version() else { return };
        let me = self.content.index.me();
        if let Ok((false, _)) = checked {
            let what = "the cached copy was damaged by a crash and is fetched again";
            self.content.report(me, &version, what.into());
        }
        if let Ok((_, false)) = checked {
            self.content.report(me, &version, OTHER_CONTENT.into());
        }
    }

    async fn read_cached(&self, range: Range<u64>) -> Option<Bytes> {
        let file = self.file.clone();
        let bytes = self.content.runtime.spawn_blocking(move || file.read(range)).await.ok()??;
        self.content.cache.count_hit(bytes.len());
        Some(bytes)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for abort in state.flights.values().filter_map(|flight| flight.abort.get()) {
            abort.abort();
        }
        if self.file.unsaved_bytes() > 0 {
            let file = self.file.clone();
            self.content.runtime.spawn_blocking(move || file.save());
        }
        self.content.unpin(self.key);
    }
}

impl State {
    fn pattern(&mut self, reader: u64) -> &mut Pattern {
        self.patterns.entry(reader).or_default()
    }

    /// The flight that brings or brought this byte.
    fn flight_at(&self, at: u64) -> Option<Arc<Flight>> {
        let flying = self.flights.range(..=at).next_back().map(|(_, flight)| flight);
        let found = flying.filter(|flight| flight.range.contains(&at));
        found.or_else(|| self.kept.iter().find(|flight| flight.range.contains(&at))).cloned()
    }

    /// The end of the stretch from `at` that no flight brings, at most `end`.
    fn free_until(&self, at: u64, end: u64) -> u64 {
        let next = self.flights.range(at..end).next().map_or(end, |(&start, _)| start);
        let kept = self.kept.iter().map(|flight| flight.range.start);
        kept.filter(|start| (at..next).contains(start)).min().unwrap_or(next)
    }

    fn start(
        &mut self,
        range: Range<u64>,
        ahead: bool,
        started: &mut Vec<Arc<Flight>>,
    ) -> Arc<Flight> {
        let flight = Arc::new(Flight {
            range: range.clone(),
            landed: watch::Sender::new(None),
            kept: watch::Sender::new(None),
            abort: OnceLock::new(),
            ahead,
            wanted: AtomicBool::new(!ahead),
        });
        self.flights.insert(range.start, flight.clone());
        started.push(flight.clone());
        flight
    }

    /// Whether one more flight may start ahead of the readers.
    fn has_room(&self, bytes: u64, in_flight_bytes: u64) -> bool {
        let flying = self.flights.values().map(|flight| flight.range.end - flight.range.start);
        let under_way: u64 = flying.sum();
        self.flights.len() < MAX_AHEAD && (under_way == 0 || under_way + bytes <= in_flight_bytes)
    }
}

/// The life of a flight. It does not keep the version pinned while it flies: when the last
/// handle is closed it is aborted.
async fn fly(pinned: Weak<Pinned>, fetcher: Arc<Fetcher>, flight: Arc<Flight>) {
    // Whatever ends this task, also a panic, ends the waiting for it.
    let mut ending = Ending { flight: &flight, pinned: &pinned, failure: Failure::Postponed };
    let request = RangeRequest::new(flight.range.clone(), flight.ahead, &flight.wanted);
    match fetcher.fetch(&request).await {
        Err(failure) => ending.failure = failure,
        Ok(bytes) => {
            // Before the news: who waits may close the last handle at once, and what was
            // fetched for it shall still be cached.
            let pinned = pinned.upgrade();
            flight.landed.send_replace(Some(Ok(bytes.clone())));
            if let Some(pinned) = pinned {
                pinned.landed(&flight, &bytes).await;
                pinned.promote_if_hashed().await;
                pinned.top_up();
            }
        }
    }
}

/// Tells those who wait for a flight that it brings nothing, unless it did.
struct Ending<'a> {
    flight: &'a Flight,
    pinned: &'a Weak<Pinned>,
    failure: Failure,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if self.flight.landed.borrow().is_some() {
            return;
        }
        // First out of the plan, so that nobody plans with it who then waits in vain.
        if let Some(pinned) = self.pinned.upgrade() {
            pinned.failed(self.flight);
        }
        self.flight.landed.send_replace(Some(Err(self.failure)));
    }
}

/// One handle on a pinned version.
pub struct Reader {
    pinned: Arc<Pinned>,
    id: u64,
    /// Of a small file: its first read from the network is noted as this one's.
    noted: Mutex<Option<(LocationNo, FileId)>>,
    /// Nothing is fetched ahead of it.
    is_exact: bool,
}

impl Reader {
    pub(super) fn new(pinned: Arc<Pinned>) -> Self {
        let id = pinned.next_reader.fetch_add(1, Ordering::Relaxed);
        Self { pinned, id, noted: Mutex::default(), is_exact: false }
    }

    /// One whose first read from the network is noted, because others may follow it.
    pub(super) fn noting(mut self, file: (LocationNo, FileId)) -> Self {
        self.noted = Mutex::new(Some(file));
        self
    }

    /// One ahead of which nothing is fetched, in this file or in others.
    pub(crate) fn exactly(mut self) -> Self {
        (self.is_exact, self.noted) = (true, Mutex::default());
        self
    }

    /// The bytes of the version.
    pub fn size(&self) -> u64 {
        self.pinned.key.1
    }

    /// The bytes at `offset`, fewer at the end of the file, if they are in the cache.
    /// Reads from the local disk; never waits for the network.
    pub fn try_read(&self, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        let pinned = &self.pinned;
        let read = self.within(offset, len);
        if read.is_empty() {
            return Some(Ok(Bytes::new()));
        }
        let bytes = pinned.file.read(read.clone())?;
        pinned.content.cache.count_hit(bytes.len());
        if !self.is_exact && !pinned.file.is_full() {
            pinned.note(self.id, &read);
            let mut started = Vec::new();
            pinned.plan_ahead(&mut lock(&pinned.state), self.id, &mut started);
            pinned.launch(started);
        }
        Some(Ok(bytes))
    }

    /// The bytes at `offset`, fewer at the end of the file. Dropping the future gives up.
    pub async fn read(&self, offset: u64, len: usize) -> FsResult<Bytes> {
        let read = self.within(offset, len);
        if read.is_empty() {
            return Ok(Bytes::new());
        }
        if self.pinned.needs_check() {
            self.pinned.check().await;
        }
        if !self.is_exact {
            self.pinned.note(self.id, &read);
        }
        for _ in 0..MAX_PLANS {
            match self.gather(&read).await {
                Ok(Some(bytes)) => {
                    if let Some(file) = lock(&self.noted).take() {
                        self.pinned.content.crowd_missed(file);
                    }
                    return Ok(bytes);
                }
                Ok(None) | Err(Failure::Postponed) => {}
                Err(failure) => return Err(failure.into()),
            }
        }
        Err(FsError::from(Failure::Postponed))
    }

    /// `None`: what was in the cache is not any more.
    async fn gather(&self, read: &Range<u64>) -> Result<Option<Bytes>, Failure> {
        let mut parts = self.pinned.plan(self.id, read);
        if let [part] = &mut parts[..] {
            return self.part(part).await;
        }
        let mut bytes = BytesMut::with_capacity((read.end - read.start) as usize);
        for part in &parts {
            match self.part(part).await? {
                Some(part) => bytes.extend_from_slice(&part),
                None => return Ok(None),
            }
        }
        Ok(Some(bytes.freeze()))
    }

    async fn part(&self, part: &Part) -> Result<Option<Bytes>, Failure> {
        match part {
            Part::Cache(range) => Ok(self.pinned.read_cached(range.clone()).await),
            Part::Flight(flight, range) => {
                flight.wanted.store(true, Ordering::Relaxed);
                let bytes = flight.wait().await.map_err(|failure| match flight.ahead {
                    // It was not asked for in earnest: ask again.
                    true => Failure::Postponed,
                    false => failure,
                })?;
                let from = (range.start - flight.range.start) as usize;
                Ok(Some(bytes.slice(from..from + (range.end - range.start) as usize)))
            }
        }
    }

    /// Brings what is missing of a small file into the cache, for whoever reads it next; whether it
    /// came from another device, all of it now.
    pub(super) async fn fetch_all_ahead(&self) -> Result<bool, Failure> {
        if self.pinned.needs_check() {
            self.pinned.check().await;
        }
        let (flights, new) = self.pinned.plan_missing(u64::MAX, MAX_FETCH_BYTES);
        let are_new = new > 0 && new == flights.len();
        for flight in flights {
            flight.wait().await?;
        }
        Ok(are_new && self.pinned.fetcher.is_from_afar())
    }

    /// Bytes of the version that are not in the cache.
    pub(super) async fn missing_bytes(&self) -> u64 {
        if self.pinned.needs_check() {
            self.pinned.check().await;
        }
        let missing = self.pinned.file.missing(0..groups_of(self.size()));
        let bytes = |groups: &Range<u64>| {
            (groups.end * GROUP_BYTES).min(self.size()) - groups.start * GROUP_BYTES
        };
        missing.iter().map(bytes).sum()
    }

    /// Brings some of what is missing into the cache, about so many bytes in requests of at most
    /// `request`, which is a multiple of a group; whether the cache took them.
    pub(super) async fn bring(&self, most: u64, request: u64) -> Result<bool, Failure> {
        let (flights, new) = self.pinned.plan_missing(most, request);
        let _brought = Counted::new(&self.pinned.content.brought, new as u64);
        let mut kept = true;
        for flight in flights {
            kept &= flight.is_kept().await?;
        }
        Ok(kept)
    }

    /// The file as it lies in the cache, for a kernel to read by itself: every byte is there
    /// and was verified against the content id.
    pub fn complete_file(&self) -> Option<Arc<File>> {
        self.pinned.file.whole()
    }

    /// What is cached makes room, if these bytes are nowhere any more that is known of.
    pub(crate) fn discard_if_gone(&self) {
        let pinned = self.pinned.clone();
        self.pinned.content.runtime.spawn_blocking(move || {
            let Key::Content(content) = pinned.key.0 else { return pinned.file.discard() };
            let holders = pinned.content.index.view().and_then(|view| view.holders(content));
            if holders.is_ok_and(|holders| holders.is_empty()) {
                pinned.file.discard();
            }
        });
    }

    fn within(&self, offset: u64, len: usize) -> Range<u64> {
        let end = offset.saturating_add(len as u64).min(self.size());
        offset.min(end)..end
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.pinned.state).patterns.remove(&self.id);
    }
}

fn groups_around(range: &Range<u64>) -> Range<u64> {
    range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES)
}
