//! Hashing: content ids and manifests of files, behind everything else.
//!
//! The queue is the index's and durable; this module keeps only what it must not
//! try again yet. A file is hashed when it was left alone for a while, and the
//! result counts only if its stamp is the same before and after. The manifest is
//! stored before the index says that the file is hashed, so a content id in the
//! index has one, unless another file with the same content has grown since.

use super::Core;
use super::place::{Place, lock};
use super::scan::is_gone;
use crate::content::Manifest;
use crate::error::{FsError, FsResult, Kind};
use crate::local::stamp_of;
use crate::model::{ContentId, FileId, FileType, MAX_GROWTH_BYTES, Stamp, Time};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Files taken from the index at once.
const FETCH: usize = 1024;
/// The least time between two looks for newer files, while there is work.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Files recorded in one commit, and how long the first of them waits for it.
const BATCH_FILES: usize = 256;
const BATCH_TIME: Duration = Duration::from_millis(100);
/// How soon to look again when the index failed.
const LOOK_AFTER_FAILURE: Duration = Duration::from_secs(10);
/// The longest wait for a file that changes again and again.
const LONGEST_WAIT: Duration = Duration::from_secs(600);
/// A file that changes while it is hashed waits this many times as long as the hashing took.
const WAIT_FACTOR: u32 = 4;

/// Which files of a location to hash next, and which not yet.
pub(super) struct HashQueue {
    ready: VecDeque<FileId>,
    running: HashSet<FileId>,
    /// Of those, the ones that were written to, with no trace in the stamp, since they began.
    written: HashSet<FileId>,
    waiting: HashMap<FileId, Wait>,
    /// The index may have files that are not known here.
    look: bool,
    looked: Option<Instant>,
}

impl Default for HashQueue {
    fn default() -> Self {
        Self {
            ready: VecDeque::new(),
            running: HashSet::new(),
            written: HashSet::new(),
            waiting: HashMap::new(),
            look: true,
            looked: None,
        }
    }
}

/// A file that is not tried again before a time.
struct Wait {
    until: Instant,
    tries: u32,
    /// It could not be read: only a change of it, or a long time, will help.
    stuck: bool,
}

/// What became of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Done,
    /// It was written to a moment ago, or the index has not seen its last change yet.
    Unsettled(Duration),
    /// It changed while it was hashed, which took so long.
    Changed(Duration),
    Unreadable,
}

impl HashQueue {
    /// The index may have new files to hash. `forget`: also try the unreadable ones again.
    pub fn look_again(&mut self, forget: bool) {
        self.look = true;
        if forget {
            self.waiting.retain(|_, wait| !wait.stuck);
        }
    }

    /// A file changed.
    pub fn changed(&mut self, file: FileId) {
        self.look = true;
        if self.waiting.get(&file).is_some_and(|wait| wait.stuck) {
            self.waiting.remove(&file);
        }
    }

    /// A program let go of a file to which it could write.
    pub fn written(&mut self, file: FileId) {
        if self.running.contains(&file) {
            self.written.insert(file);
        }
    }

    /// Whether there is something to do soon, given whether the index has unhashed files.
    pub fn is_busy(&self, unhashed: bool) -> bool {
        !self.running.is_empty()
            || !self.ready.is_empty()
            || (unhashed && self.look)
            || self.waiting.values().any(|wait| !wait.stuck)
    }

    fn wants_look(&self, now: Instant) -> bool {
        let rested = self.looked.is_none_or(|at| now >= at + LOOK_EVERY);
        let due = || self.waiting.values().any(|wait| wait.until <= now);
        if self.ready.is_empty() { self.look && rested || due() } else { self.look && rested }
    }

    /// When to come back, if nothing is ready.
    fn due(&self) -> Option<Instant> {
        let rested = self.looked.filter(|_| self.look).map(|at| at + LOOK_EVERY);
        self.waiting.values().map(|wait| wait.until).chain(rested).min()
    }

    /// How many to ask for, so that those that wait do not hide the others.
    fn fetch_limit(&self) -> usize {
        FETCH.max(self.waiting.len()) + self.waiting.len() + self.running.len()
    }

    fn refill(&mut self, files: Vec<FileId>, limit: usize, now: Instant) {
        let is_cut = files.len() >= limit;
        self.looked = Some(now);
        if !is_cut {
            // What is not in the index's queue any more was deleted.
            let known: HashSet<_> = files.iter().copied().collect();
            self.waiting.retain(|file, _| known.contains(file));
        }
        let waits = |file: &FileId| self.waiting.get(file).is_some_and(|wait| wait.until > now);
        self.ready =
            files.into_iter().filter(|file| !waits(file) && !self.running.contains(file)).collect();
        // More than asked for, where the index has some of the running ones no more.
        self.look = is_cut || self.ready.len() > FETCH;
        self.ready.truncate(FETCH);
    }

    fn take(&mut self) -> Option<FileId> {
        let file = self.ready.pop_front()?;
        self.running.insert(file);
        Some(file)
    }

    fn end(&mut self, file: FileId, outcome: Outcome, settle: Duration) {
        self.running.remove(&file);
        self.written.remove(&file);
        let tries = self.waiting.get(&file).map_or(0, |wait| wait.tries);
        let (wait, tries, stuck) = match outcome {
            Outcome::Done => {
                self.waiting.remove(&file);
                return;
            }
            Outcome::Unsettled(wait) => (wait, tries, false),
            Outcome::Changed(took) => {
                let doubled = settle.saturating_mul(1 << tries.min(20));
                (doubled.max(took.saturating_mul(WAIT_FACTOR)), tries + 1, false)
            }
            Outcome::Unreadable => (LONGEST_WAIT, tries, true),
        };
        let until = Instant::now() + wait.min(LONGEST_WAIT);
        self.waiting.insert(file, Wait { until, tries, stuck });
    }
}

impl Core {
    /// One thread of the pool, until the stop.
    ///
    /// What is hashed is told to the index in batches, because a commit costs more than
    /// hashing a small file; but at once when there is nothing else to do.
    pub(super) fn hash_loop(&self) {
        let mut hashed = Batch::default();
        loop {
            let next = match hashed.is_due() {
                true => None,
                false if hashed.files.is_empty() => {
                    match self.hash_work.wait(self, Self::next_file) {
                        None => return,
                        found => found,
                    }
                }
                false => self.hash_work.look(self, Self::next_file),
            };
            let Some((place, file)) = next else {
                self.record_hashes(std::mem::take(&mut hashed));
                continue;
            };
            if !hashed.is_of(&place) {
                self.record_hashes(std::mem::take(&mut hashed));
            }
            match self.hash(&place, file) {
                Ok(Attempt::Hashed(done)) => hashed.push(place, done),
                Ok(Attempt::Not(outcome)) => self.end_hash(&place, file, outcome),
                Err(e) => self.hash_failed(&place, file, &e),
            }
        }
    }

    fn end_hash(&self, place: &Place, file: FileId, outcome: Outcome) {
        lock(&place.hash).end(file, outcome, place.config.settle);
    }

    fn hash_failed(&self, place: &Place, file: FileId, e: &FsError) {
        tracing::debug!(location = place.no.0, file = file.0, "not hashed: {e}");
        // It may be below a directory that is just being renamed.
        let gone = is_gone(e);
        let outcome = if gone { Outcome::Changed(Duration::ZERO) } else { Outcome::Unreadable };
        self.end_hash(place, file, outcome);
    }

    fn record_hashes(&self, batch: Batch) {
        let Some(place) = batch.place else { return };
        let rows: Vec<_> = batch.files.iter().map(|h| (h.file, h.stamp, h.content)).collect();
        match self.index.set_contents(place.no, &rows) {
            Ok(set) => {
                for (hashed, set) in batch.files.into_iter().zip(set) {
                    self.end_hashed(&place, &hashed, set);
                }
            }
            Err(e) => {
                let e = FsError::from(e);
                batch.files.iter().for_each(|h| self.hash_failed(&place, h.file, &e));
            }
        }
    }

    fn end_hashed(&self, place: &Place, hashed: &Hashed, set: bool) {
        if set {
            place.bytes_hashed.fetch_add(hashed.stamp.size, Ordering::Relaxed);
            place.files_hashed.fetch_add(1, Ordering::Relaxed);
            return self.end_recorded(place, hashed);
        }
        if hashed.stamp.size <= MAX_GROWTH_BYTES {
            // It may have grown meanwhile, and what it was needs no tree then.
            self.drop_manifest(hashed.content);
        }
        match self.hash_stale(place, hashed.file, hashed.took) {
            Ok(outcome) => self.end_hash(place, hashed.file, outcome),
            Err(e) => self.hash_failed(place, hashed.file, &e),
        }
    }

    fn end_recorded(&self, place: &Place, hashed: &Hashed) {
        // Until the end of the hash is noted, so that what is written from here on is asked for
        // by whoever sees it.
        let mut queue = lock(&place.hash);
        if !queue.written.contains(&hashed.file) {
            return queue.end(hashed.file, Outcome::Done, place.config.settle);
        }
        drop(queue);
        match self.index.hash_again(place.no, hashed.file) {
            Ok(_) => self.end_hash(place, hashed.file, Outcome::Changed(hashed.took)),
            Err(e) => self.hash_failed(place, hashed.file, &e.into()),
        }
    }

    /// The next file, or else when to look again.
    fn next_file(&self, due: &mut Option<Instant>) -> Option<(Arc<Place>, FileId)> {
        let now = Instant::now();
        self.places_in_turn().into_iter().find_map(|place| {
            if !place.indexed.load(Ordering::Acquire) || place.root().is_err() {
                return None;
            }
            let mut queue = lock(&place.hash);
            if queue.wants_look(now) {
                let limit = queue.fetch_limit();
                match self.index.next_unhashed(place.no, limit) {
                    Ok(files) => queue.refill(files, limit, now),
                    Err(e) => {
                        tracing::warn!(location = place.no.0, "no files to hash: {e}");
                        queue.looked = Some(now + LOOK_AFTER_FAILURE);
                    }
                }
            }
            let file = queue.take();
            if file.is_none() {
                *due = [*due, queue.due()].into_iter().flatten().min();
            }
            drop(queue);
            Some((place, file?))
        })
    }

    fn hash(&self, place: &Place, file: FileId) -> FsResult<Attempt> {
        let began = Instant::now();
        let stale = || self.hash_stale(place, file, began.elapsed()).map(Attempt::Not);
        let (path, known) = self.locate(place.no, file)?;
        if known.attr.file_type != FileType::File {
            return Ok(Attempt::Not(Outcome::Unreadable));
        }
        let open = match place.root()?.open_for_reading(&path) {
            Err(e) if e.kind() == Kind::NotFound => return stale(),
            opened => opened?,
        };
        let stamp = stamp_of(&open)?;
        if stamp != known.stamp() {
            return stale();
        }
        if let Some(wait) = unsettled(&stamp, place.config.settle) {
            return Ok(Attempt::Not(Outcome::Unsettled(wait)));
        }
        let hashed = Manifest::of_file(&open, stamp.size, &self.stopping);
        let hashed = hashed.map_err(|e| FsError::os("hash a file", e))?;
        let Some((content, manifest)) = hashed else { return stale() };
        if stamp_of(&open)? != stamp {
            return stale();
        }
        self.manifests.put(&manifest).map_err(|e| FsError::os("store a manifest", e))?;
        Ok(Attempt::Hashed(Hashed { file, stamp, content, took: began.elapsed() }))
    }

    /// The file is not what the index says: brings its row up to date, and waits.
    fn hash_stale(&self, place: &Place, file: FileId, took: Duration) -> FsResult<Outcome> {
        if !self.is_stopping() {
            self.refresh_own(place, file)?;
        }
        Ok(Outcome::Changed(took))
    }
}

/// What came of looking at a file.
enum Attempt {
    Hashed(Hashed),
    Not(Outcome),
}

/// A file whose hash the index does not have yet.
struct Hashed {
    file: FileId,
    stamp: Stamp,
    content: ContentId,
    took: Duration,
}

/// Hashed files of one location, to be recorded in one commit.
#[derive(Default)]
struct Batch {
    place: Option<Arc<Place>>,
    began: Option<Instant>,
    files: Vec<Hashed>,
}

impl Batch {
    fn push(&mut self, place: Arc<Place>, hashed: Hashed) {
        self.place = Some(place);
        self.began.get_or_insert_with(Instant::now);
        self.files.push(hashed);
    }

    fn is_due(&self) -> bool {
        self.files.len() >= BATCH_FILES || self.began.is_some_and(|at| at.elapsed() >= BATCH_TIME)
    }

    /// Whether a file of this location may join.
    fn is_of(&self, place: &Arc<Place>) -> bool {
        self.place.as_ref().is_none_or(|own| Arc::ptr_eq(own, place))
    }
}

/// The longest tick of a file system whose times have no fractions of a second, and a little:
/// FAT counts two seconds at once.
const WHOLE_SECONDS_SETTLE: Duration = Duration::from_millis(2_100);

/// How long the file must still be left alone.
///
/// The change time is the kernel's own clock, which a program cannot set. It
/// advances in ticks: a write within the tick of the last one leaves no trace
/// in the stamp, and after a settled tick none can. A time without fractions
/// is taken for one of a file system that has none.
pub(super) fn unsettled(stamp: &Stamp, settle: Duration) -> Option<Duration> {
    let settle = match stamp.ctime.nanos {
        0 => settle.max(WHOLE_SECONDS_SETTLE),
        _ => settle,
    };
    let nanos = |t: Time| i128::from(t.secs) * 1_000_000_000 + i128::from(t.nanos);
    let age = nanos(Time::now()) - nanos(stamp.ctime);
    let settle_nanos = settle.as_nanos() as i128;
    // A time in the future, after the clock was set back, says nothing.
    if !(0..settle_nanos).contains(&age) {
        return None;
    }
    u64::try_from(settle_nanos - age).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_while_it_is_hashed_is_noted_until_the_end() {
        let (mut queue, file) = (HashQueue::default(), FileId(7));
        queue.written(file);
        assert!(queue.written.is_empty(), "the next hash sees it");
        queue.refill(vec![file], 10, Instant::now());
        assert_eq!(queue.take(), Some(file));
        queue.written(file);
        assert!(queue.written.contains(&file));
        queue.end(file, Outcome::Changed(Duration::ZERO), Duration::ZERO);
        assert!(queue.written.is_empty());
    }

    #[test]
    fn files_that_find_no_room_are_looked_for_again() {
        let mut queue = HashQueue::default();
        let files = |numbers: std::ops::Range<usize>| numbers.map(|n| FileId(n as u64)).collect();
        queue.refill(files(0..BATCH_FILES), FETCH, Instant::now());
        while queue.take().is_some() {}
        // Their hashes were recorded, and they still count as running.
        let limit = queue.fetch_limit();
        queue.refill(files(BATCH_FILES..BATCH_FILES + limit - 1), limit, Instant::now());
        assert_eq!(queue.ready.len(), FETCH);
        assert!(queue.look, "{} of {} have no place", limit - 1 - FETCH, limit - 1);
    }

    #[test]
    fn times_without_fractions_settle_after_their_longest_tick() {
        let settle = Duration::from_millis(50);
        let changed = |secs_ago, nanos| {
            let ctime = Time { secs: Time::now().secs - secs_ago, nanos };
            unsettled(&Stamp { disk_ino: 1, size: 1, mtime: ctime, ctime }, settle)
        };
        // Between one and two seconds ago, as far as this clock tells.
        assert!(changed(1, 0).is_some_and(|wait| wait <= WHOLE_SECONDS_SETTLE));
        assert_eq!(changed(3, 0), None);
        assert_eq!(changed(2, 1), None);
    }
}
