//! Crowds of small files: the next ones are fetched before they are asked for.
//!
//! A file of a few KiB costs a round trip, however fast the link is. Programs that read one
//! after the other in the order of a tree have the next ones fetched ahead, many at once.
//!
//! | module | what it is |
//! |---|---|
//! | `order` | which files come after a place |
//! | `policy` | who walks, and how far ahead of it to fetch |
//!
//! Nothing here is waited for: an open or a read leaves a note, and one task at a time looks at
//! the notes in their order. What is fetched ahead takes the way of every fetch: it is checked,
//! goes to the cache, and whoever opens the file meanwhile waits for the same flight. It gives
//! way to what programs wait for: it takes no room that they need, and no more is under way
//! than the link brings in a quarter of a second.

mod order;
mod policy;

#[cfg(test)]
mod tests;

use super::fetch::Failure;
use super::window::Link;
use super::{Content, lock};
use crate::index::IndexError;
use crate::model::{DeviceId, Entry, FileId, FileType, Location, LocationNo};
use crate::source::Version;
use order::{Found, Rows};
use policy::{FileKey, Guessed, MAX_AHEAD_BYTES, Means, Walks};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// The largest file that is fetched ahead of being opened. A round trip of 20 ms brings this much
/// at 100 Mbit/s, so waiting is what costs up to here, and read-ahead within the file serves
/// beyond. Photos and films are larger: who looks at the beginning of each does not get them all.
const SMALL_BYTES: u64 = 256 << 10;
/// Files under way from one device. Each costs its holder a stream and a task; more than these
/// are no faster, because two processors are busy with them.
const MAX_FLYING: usize = 64;
/// On a slow link no more than this is under way, so that a read that a program waits for is not
/// behind much.
const IN_FLIGHT_TIME: Duration = Duration::from_millis(250);
/// What may be under way on the slowest link, and on one that is not known yet.
const LEAST_FLYING_BYTES: u64 = 64 << 10;
/// After a failure nothing is fetched ahead from a device for this long: its link may be another
/// one by now, or one that brings nothing in time.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(30);
/// Notes that wait to be looked at; what comes while there are more is not noted.
const MAX_NOTES: usize = 1024;

/// Files whose bytes are not the owner's, because they are written here.
pub(crate) type WrittenHere = Box<dyn Fn(LocationNo, FileId) -> bool + Send + Sync>;

/// The walks of this device's programs, and what is under way ahead of them.
pub(super) struct Crowds {
    guessed: Arc<Guessed>,
    notes: Mutex<Notes>,
    /// Of the task that looks at the notes.
    walks: Mutex<Walks>,
    lanes: Mutex<HashMap<DeviceId, Lane>>,
    pub(super) written_here: OnceLock<WrittenHere>,
}

/// What programs did, in its order.
#[derive(Default)]
struct Notes {
    waiting: VecDeque<Note>,
    /// A task looks at them.
    is_read: bool,
}

struct Note {
    file: FileKey,
    at: Instant,
    what: Did,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Did {
    /// A file was opened that is somebody's guess.
    Open,
    /// A file was read that is not here.
    Miss,
    /// Nobody gives the files of its location now.
    Fail,
}

/// What is fetched ahead from one device.
#[derive(Default)]
struct Lane {
    waiting: VecDeque<(FileKey, Entry)>,
    flying: usize,
    flying_bytes: u64,
    link: Link,
    /// What the fastest one took: no less is under way than comes in twice this time, so that a
    /// link with long round trips is kept busy.
    fastest: Option<Duration>,
    paused_until: Option<Instant>,
}

impl Default for Crowds {
    fn default() -> Self {
        let guessed = Arc::new(Guessed::default());
        Self {
            walks: Mutex::new(Walks::new(guessed.clone())),
            guessed,
            notes: Mutex::default(),
            lanes: Mutex::default(),
            written_here: OnceLock::new(),
        }
    }
}

fn is_small(size: u64) -> bool {
    (1..=SMALL_BYTES).contains(&size)
}

impl Lane {
    fn is_paused(&self) -> bool {
        self.paused_until.is_some_and(|until| Instant::now() < until)
    }

    /// What is known of the link is no longer so.
    fn fail(&mut self) {
        let (waiting, link, fastest) = Default::default();
        let paused_until = Some(Instant::now() + PAUSE_AFTER_FAILURE);
        let Self { flying, flying_bytes, .. } = *self;
        *self = Self { waiting, flying, flying_bytes, link, fastest, paused_until };
    }

    /// The next file to be fetched, if there is room for it.
    fn next(&mut self, guessed: &Guessed) -> Option<(FileKey, Entry)> {
        // Who was faster, or has turned away, needs it no more.
        while self.waiting.front().is_some_and(|(file, _)| !guessed.contains(*file)) {
            self.waiting.pop_front();
        }
        let bytes = self.waiting.front()?.1.attr.size;
        let time = IN_FLIGHT_TIME.max(2 * self.fastest.unwrap_or_default());
        let most = self.link.known_bytes_in(time).unwrap_or(0).max(LEAST_FLYING_BYTES);
        let has_room = self.flying < MAX_FLYING && self.flying_bytes + bytes <= most;
        if !has_room && self.flying > 0 {
            return None;
        }
        (self.flying, self.flying_bytes) = (self.flying + 1, self.flying_bytes + bytes);
        self.waiting.pop_front()
    }
}

impl Content {
    /// A file was opened; whether its reads need no note any more.
    pub(super) fn crowd_opened(self: &Arc<Self>, no: LocationNo, entry: &Entry) -> bool {
        let file = (no, entry.file_id);
        if !is_small(entry.attr.size) {
            return true;
        }
        let is_guess = self.crowds.guessed.contains(file);
        if is_guess {
            self.note_crowd(file, Did::Open);
        }
        is_guess
    }

    /// A small file was read that was not here.
    pub(super) fn crowd_missed(self: &Arc<Self>, file: FileKey) {
        self.note_crowd(file, Did::Miss);
    }

    fn note_crowd(self: &Arc<Self>, file: FileKey, what: Did) {
        let mut notes = lock(&self.crowds.notes);
        if notes.waiting.len() == MAX_NOTES {
            return;
        }
        notes.waiting.push_back(Note { file, at: Instant::now(), what });
        if !std::mem::replace(&mut notes.is_read, true) {
            let content = self.clone();
            self.runtime.spawn_blocking(move || content.read_notes());
        }
    }

    fn read_notes(self: &Arc<Self>) {
        let mut walks = lock(&self.crowds.walks);
        loop {
            let note = {
                let mut notes = lock(&self.crowds.notes);
                let Some(note) = notes.waiting.pop_front() else {
                    notes.is_read = false;
                    return;
                };
                note
            };
            if let Err(error) = self.read_note(&mut walks, &note) {
                tracing::debug!(%error, "nothing is fetched ahead of small files");
            }
        }
    }

    fn read_note(self: &Arc<Self>, walks: &mut Walks, note: &Note) -> Result<(), IndexError> {
        let Some(location) = self.index.location(note.file.0) else { return Ok(()) };
        let view = self.index.view()?;
        let walk = match note.what {
            Did::Fail => {
                walks.failed(location.no);
                None
            }
            Did::Open => walks.opened(note.file, note.at),
            Did::Miss if !self.may_fetch_ahead(&location) => None,
            Did::Miss => match view.names(location.no, note.file.1, 1)?.pop() {
                Some((dir, name)) => walks.missed(note.file, (dir, &name), note.at),
                None => None,
            },
        };
        let Some(walk) = walk else { return Ok(()) };
        let wanted = |entry: &Entry| self.is_wanted(&location, entry);
        let max_bytes = MAX_AHEAD_BYTES.min(self.cache.loose_limit_bytes() / 4);
        let tree = Rows(view, location.no);
        let found = walks.plan(walk, &Means { tree: &tree, wanted: &wanted, max_bytes })?;
        if !found.is_empty() && self.may_fetch_ahead(&location) {
            self.fetch_ahead(&location, found);
        }
        Ok(())
    }

    fn may_fetch_ahead(&self, location: &Location) -> bool {
        let is_there =
            location.owner != self.index.me() && self.source.is_reachable(location.owner);
        let is_paused =
            || lock(&self.crowds.lanes).get(&location.owner).is_some_and(Lane::is_paused);
        is_there && self.cache.works() && !is_paused()
    }

    fn is_wanted(&self, location: &Location, entry: &Entry) -> bool {
        if entry.attr.file_type != FileType::File || !is_small(entry.attr.size) {
            return false;
        }
        let version = Version::of(location.id, entry);
        let written_here = self.crowds.written_here.get();
        self.cache.cached_bytes(&version) < entry.attr.size
            && !written_here.is_some_and(|is| is(location.no, entry.file_id))
    }

    fn fetch_ahead(self: &Arc<Self>, location: &Location, found: Vec<Found>) {
        let files = found.into_iter().map(|f| ((location.no, f.entry.file_id), f.entry));
        lock(&self.crowds.lanes).entry(location.owner).or_default().waiting.extend(files);
        self.fill_lane(location.owner);
    }

    fn fill_lane(self: &Arc<Self>, device: DeviceId) {
        // Spawned without the lock: a runtime that ends drops them at once.
        let next = || {
            let mut lanes = lock(&self.crowds.lanes);
            let lane = lanes.get_mut(&device)?;
            let (file, entry) = lane.next(&self.crowds.guessed)?;
            Some((file, entry, lane.flying_bytes))
        };
        while let Some((file, entry, under_way)) = next() {
            let landing = Landing {
                content: self.clone(),
                device,
                bytes: entry.attr.size,
                under_way,
                began: Instant::now(),
                is_begun: false,
                brought: false,
            };
            self.runtime.spawn(landing.fly(file.0, entry));
        }
    }

    /// Whether everything that programs did was looked at, and nothing is under way.
    #[cfg(test)]
    pub(super) fn crowd_is_quiet(&self) -> bool {
        let notes = lock(&self.crowds.notes);
        let lanes = lock(&self.crowds.lanes);
        !notes.is_read && lanes.values().all(|lane| lane.flying == 0)
    }

    fn crowd_failed(self: &Arc<Self>, device: DeviceId, location: LocationNo) {
        if let Some(lane) = lock(&self.crowds.lanes).get_mut(&device) {
            lane.fail();
        }
        // Noted, as this is a thread of the network, and the walks may be looked at for long.
        self.note_crowd((location, FileId::ROOT), Did::Fail);
    }
}

/// A file that is being fetched ahead; makes room for the next when dropped.
struct Landing {
    content: Arc<Content>,
    device: DeviceId,
    bytes: u64,
    /// What was under way from the device, with this file, when it was asked for.
    under_way: u64,
    began: Instant,
    /// The runtime runs it: one that ends drops it at once.
    is_begun: bool,
    /// All of it came from another device, and just now: so it tells of the link.
    brought: bool,
}

impl Landing {
    async fn fly(mut self, location: LocationNo, entry: Entry) {
        self.is_begun = true;
        let Ok(reader) = self.content.open_quietly(location, &entry) else { return };
        match reader.fetch_all_ahead().await {
            Ok(brought) => self.brought = brought,
            // The program's own read tries longer, and says what is wrong; with this file only.
            Err(Failure::Stale | Failure::Postponed | Failure::Io) => {}
            Err(Failure::HostDown | Failure::Refused) => {
                self.content.crowd_failed(self.device, location);
            }
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        {
            let mut lanes = lock(&self.content.crowds.lanes);
            let Some(lane) = lanes.get_mut(&self.device) else { return };
            (lane.flying, lane.flying_bytes) = (lane.flying - 1, lane.flying_bytes - self.bytes);
            if self.brought {
                let took = self.began.elapsed();
                lane.link.note(self.under_way, took);
                lane.fastest = Some(lane.fastest.map_or(took, |fastest| fastest.min(took)));
            }
        }
        // Else each file that waits would be begun and dropped by the one before it.
        if self.is_begun {
            self.content.fill_lane(self.device);
        }
    }
}
