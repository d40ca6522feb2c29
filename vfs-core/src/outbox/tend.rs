//! What happens by itself: a thread that makes durable what nobody waits for, sends new files
//! that stay open long, and lets go of what the index shows by now.

use super::adopt::Whole;
use super::deliver::NEVER;
use super::queue::{OpBytes, Progress, Retiring};
use super::record::{OpRecord, Record};
use super::{Outbox, RENUMBERED_BY, State};
use crate::changes::{Brief, Change as Shown};
use crate::error::FsResult;
use crate::failpoint::fail_point;
use crate::model::{Entry, FileId, LocationNo, Stamp};
use crate::ops::{Change, Place};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that an accepted operation is not yet on the disk.
const SYNC_AFTER: Duration = Duration::from_millis(50);
/// How often it looks while there is something to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Rows of the index are told to kernels in this time: while they are, what they say is
/// covered, and costs no kernel anything that it holds.
const COVERED_FOR: Duration = Duration::from_millis(300);
/// An owner whose log began anew has told everything by then.
const OTHER_LOG_AFTER: Duration = Duration::from_secs(30);
/// How often a journal is written anew whose disk failed.
const WRITE_ANEW_EVERY: Duration = Duration::from_secs(1);
/// Operations that are made whole at once: each waits for the network in a thread.
const MAKING_MAX: usize = 4;
/// A journal this long is worth a checkpoint.
const CHECKPOINT_BYTES: u64 = 16 << 20;

/// The thread, and how it is told what to do.
pub(super) struct Tender {
    signals: Mutex<Signals>,
    bell: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Signals {
    wake: bool,
    stop: bool,
    needs_whole: BTreeSet<u64>,
    /// Those that are just made whole.
    making: BTreeSet<u64>,
}

impl Default for Tender {
    fn default() -> Self {
        let (signals, bell, thread) = Default::default();
        Self { signals, bell, thread }
    }
}

impl Tender {
    fn lock(&self) -> MutexGuard<'_, Signals> {
        // Flags and numbers, whole after every statement.
        self.signals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is something to do, or to wait for.
    pub fn wake(&self) {
        self.lock().wake = true;
        self.bell.notify_one();
    }

    /// An operation's bytes are needed from the first to the last.
    pub fn needs_whole(&self, no: u64) {
        self.lock().needs_whole.insert(no);
        self.wake();
    }

    /// One that was made whole, or could not be.
    pub fn is_made(&self, no: u64) {
        self.lock().making.remove(&no);
        self.wake();
    }

    pub fn start(outbox: &Arc<Outbox>) -> std::io::Result<()> {
        let weak = Arc::downgrade(outbox);
        let builder = std::thread::Builder::new().name("outbox".into());
        let tender = Arc::clone(&outbox.tender);
        let thread = builder.spawn(move || run(&tender, &weak))?;
        *outbox.tender.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.bell.notify_one();
    }

    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // It was traced when it panicked.
            let _ = thread.join();
        }
    }

    /// Waits until there is something to do; `None`: nothing ever again.
    fn wait(&self, timeout: Option<Duration>) -> Option<Vec<u64>> {
        let signals = self.lock();
        let is_quiet = |s: &mut Signals| !s.wake && !s.stop;
        let mut signals = match timeout {
            None => self.bell.wait_while(signals, is_quiet).unwrap_or_else(PoisonError::into_inner),
            Some(timeout) => {
                let waited = self.bell.wait_timeout_while(signals, timeout, is_quiet);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        if signals.stop {
            return None;
        }
        signals.wake = false;
        let Signals { needs_whole, making, .. } = &mut *signals;
        let room = MAKING_MAX.saturating_sub(making.len());
        let next: Vec<_> =
            needs_whole.iter().filter(|no| !making.contains(no)).take(room).copied().collect();
        needs_whole.retain(|no| !next.contains(no));
        making.extend(&next);
        Some(next)
    }
}

fn run(tender: &Tender, outbox: &Weak<Outbox>) {
    let mut is_busy = true;
    while let Some(needs_whole) = tender.wait(is_busy.then_some(LOOK_EVERY)) {
        // Only while it works does the thread keep the outbox alive.
        let Some(outbox) = outbox.upgrade() else { return };
        is_busy = outbox.tend(Instant::now());
        for no in needs_whole {
            outbox.make_whole(no);
        }
    }
}

impl Outbox {
    /// Ends what happens by itself, and makes everything durable.
    pub fn close(&self) -> FsResult<()> {
        self.tender.stop();
        self.tender.join();
        self.sync()
    }

    /// One round; whether there is something to wait for.
    fn tend(&self, now: Instant) -> bool {
        self.sync_later();
        self.release_holds(now);
        self.retire_all(now);
        self.follow_locations();
        self.checkpoint_if_due();
        let state = self.state();
        state.unsynced || !state.ops.is_empty() || !state.retiring.is_empty()
    }

    /// All that happens by itself in this time, at once; for tests without a thread.
    #[cfg(test)]
    pub(crate) fn tend_for(&self, time: Duration) -> FsResult<()> {
        self.sync()?;
        // Rows are covered for a while after they were first seen.
        let then = Instant::now() + time;
        self.tend(then);
        self.tend(then + COVERED_FOR);
        let needs_whole = std::mem::take(&mut self.tender.lock().needs_whole);
        needs_whole.into_iter().for_each(|no| self.send_whole_or_say(no));
        Ok(())
    }

    /// What nobody waits for is durable soon all the same, many at a time.
    fn sync_later(&self) {
        let last = {
            let mut state = self.state();
            if !std::mem::take(&mut state.unsynced) {
                return;
            }
            state.last
        };
        if self.journal.durable() < last {
            std::thread::sleep(SYNC_AFTER);
        }
        if let Err(error) = self.sync_upto(last) {
            tracing::error!(%error, "accepted writes could not be made durable");
            self.write_anew();
        }
    }

    /// What a disk that failed to sync has kept is not known: everything that is needed is
    /// written anew, again and again until that is durable.
    fn write_anew(&self) {
        if let Err(error) = self.checkpoint() {
            tracing::error!(%error, "nor could they be written anew");
            self.state().unsynced = true;
            std::thread::sleep(WRITE_ANEW_EVERY);
        }
    }

    /// What waited for a time that has come goes.
    fn release_holds(&self, now: Instant) {
        let mut state = self.state();
        let waited = state.ops.iter().filter(|(_, op)| match op.progress {
            Progress::Held(until) | Progress::Waiting(Some(until)) => until <= now,
            _ => false,
        });
        let due: Vec<u64> = waited.map(|(no, _)| *no).collect();
        for no in &due {
            state.set(*no, Progress::Waiting(None));
        }
        drop(state);
        if !due.is_empty() {
            self.tick();
        }
    }

    /// Lets go of what the index shows.
    fn retire_all(&self, now: Instant) {
        let (mut due, mut wholes) = (Vec::new(), Vec::new());
        let mut state = self.state();
        self.note_again(&mut state);
        let State { retiring, noted, .. } = &mut *state;
        for (no, done) in retiring {
            // After a restart its bytes would be asked for again.
            if noted.get(no).is_some_and(|(_, lsn)| *lsn == NEVER) {
                continue;
            }
            let place = self.index.location_by_id(done.record.location);
            let is_there = place.is_none_or(|l| self.has_reached(l.no, done, now));
            if is_there && now >= *done.reached.get_or_insert(now) + COVERED_FOR {
                due.push(*no);
                let OpRecord { location, snapshot, .. } = &done.record;
                let Retiring { bytes, applied, whole, .. } = &done;
                let bytes = bytes.as_ref();
                wholes.extend(Whole::of(*location, applied, bytes, snapshot.as_ref(), *whole));
            }
        }
        drop(state);
        // A killed daemon forgets rows that are not on the disk, and would show again what was
        // written here, whose bytes are gone by then.
        if !due.is_empty()
            && let Err(error) = self.index.flush()
        {
            tracing::warn!(%error, "what was delivered stays shown from here");
            return;
        }
        // Only this thread retires, so the drafts are there until it does.
        wholes.iter().for_each(|whole| self.adopt(whole));
        let mut state = self.state();
        for no in due {
            self.retire(&mut state, no);
        }
    }

    /// Answers for which there was no space may have it now.
    fn note_again(&self, state: &mut State) {
        let unnoted = state.noted.iter().filter(|(_, (_, lsn))| *lsn == NEVER);
        let unnoted: Vec<u64> = unnoted.map(|(no, _)| *no).collect();
        for no in unnoted {
            let Some(done) = state.retiring.get(&no) else { continue };
            let (owner, at) = (done.record.owner, done.record.at);
            let outcome = Cow::Owned(crate::ops::Outcome::Applied(done.applied.clone()));
            let Ok(lsn) = self.note_reserved(state, &Record::Settled { no, at, outcome }) else {
                return;
            };
            state.noted.insert(no, (owner, lsn));
        }
    }

    fn has_reached(&self, no: LocationNo, done: &Retiring, now: Instant) -> bool {
        match self.index.log_id(no) == done.applied.log_id {
            true => self.index.has_all(no, done.applied.log_id, done.applied.seq),
            false => now >= done.settled + OTHER_LOG_AFTER,
        }
    }

    fn retire(&self, state: &mut State, no: u64) {
        let Some(done) = state.retiring.remove(&no) else { return };
        fail_point("outbox::retire");
        let Retiring { record, bytes, applied, .. } = done;
        let file = record.change.file();
        state.versions.retain(|_, (by, _)| *by != no);
        if let Some(location) = self.index.location_by_id(record.location) {
            let before = self.looks(location.no, &record.change);
            if record.generation != 0 && applied.file.is_none_or(|f| f == file) {
                let later = state.retiring.values().filter(|d| d.record.change.file() == file);
                let versions = later.filter_map(|d| d.applied.version).chain(applied.version);
                let versions: Vec<_> = versions.collect();
                self.keep_number(location.no, file, record.generation, &versions);
            }
            self.overlay().retire(location.no, no, &record.change);
            let after = self.looks(location.no, &record.change);
            self.publish(differences(location.no, before, after));
            state.let_go(&record, bytes.as_ref());
            self.let_go_if_unused(state, location.no, file);
        } else {
            state.let_go(&record, bytes.as_ref());
        }
    }

    /// The owner's row has the bytes that were shown here: it keeps its inode number.
    fn keep_number(&self, location: LocationNo, file: FileId, shown: u32, versions: &[Stamp]) {
        let row = self.index.view().and_then(|view| view.node(location, file));
        let Ok(Some(row)) = row else { return };
        let attr = &row.entry.attr;
        let is_ours = versions.iter().any(|stamp| {
            // A name or an attribute that was set since moves only the ctime.
            (stamp.disk_ino, stamp.size, stamp.mtime) == (row.entry.disk_ino, attr.size, attr.mtime)
        });
        let generation = row.entry.generation;
        if is_ours {
            self.overlay().keep(location, file, generation, shown);
        } else if generation == shown {
            // It has grown at its owner. Under the number that it would have, kernels have pages
            // of what was written here.
            self.overlay().keep(location, file, generation, shown.wrapping_add(RENUMBERED_BY));
        }
    }

    /// How the names and files of a change look now.
    fn looks(&self, location: LocationNo, change: &Change) -> Vec<(Place, Option<Entry>)> {
        let view = self.view();
        let mut places: Vec<Place> = places_of(change);
        if places.is_empty()
            && let Ok(Some(node)) = view.node(location, change.file())
        {
            places.push(Place { dir: node.parent, name: node.name });
        }
        let look = |p: &Place| view.entry(location, p.dir, p.name.as_bytes()).ok().flatten();
        let mut looks: Vec<_> = places.iter().map(|p| (p.clone(), look(p))).collect();
        looks.sort_by(|a, b| a.0.cmp(&b.0));
        looks
    }

    /// Locations come, go and get other numbers when an index is rebuilt.
    fn follow_locations(&self) {
        let mut state = self.state();
        let ops = state.ops.values().map(|op| op.record.location);
        let done = state.retiring.values().map(|done| done.record.location);
        let mut all: Vec<_> = ops.chain(done).collect();
        all.sort();
        all.dedup();
        for id in all {
            let there = self.index.location_by_id(id).map(|l| l.no);
            if there != state.locations.get(&id).copied() {
                self.take_over(&mut state, id);
            }
        }
    }

    /// Shows all that waits for a location anew, at once: nobody is to miss a name meanwhile.
    /// With `renamed` also a file whose owner calls the first of these the second.
    pub(super) fn show_again(
        &self,
        state: &mut State,
        id: crate::model::LocationId,
        renamed: Option<(FileId, FileId)>,
    ) {
        let now = self.index.location_by_id(id).map(|location| location.no);
        let before = state.locations.remove(&id).filter(|before| now != Some(*before));
        before.into_iter().for_each(|before| self.overlay().clear(before));
        let Some(no) = now else { return };
        state.locations.insert(id, no);
        let done = state.retiring.values().map(|done| (&done.record, done.bytes.as_ref()));
        let waiting = state.ops.values().map(|op| (&op.record, op.bytes.as_ref()));
        let mut all: Vec<_> =
            done.chain(waiting).filter(|(record, _)| record.location == id).collect();
        all.sort_by_key(|(record, _)| record.no);
        let all = all.into_iter().map(|(record, bytes)| super::shown(record, bytes));
        let mut overlay = self.overlay();
        if let Some((old, new)) = renamed {
            overlay.rename_file(no, old, new);
        }
        overlay.replace(no, all);
        drop(overlay);
        if let Some((old, new)) = renamed {
            self.renamed(no, old, new);
        }
        self.publish(vec![Shown::Locations]);
    }

    fn checkpoint_if_due(&self) {
        let live = self.journal.live_bytes();
        let is_due = live > CHECKPOINT_BYTES.max(4 * self.state().checkpoint_bytes);
        if is_due && let Err(error) = self.checkpoint() {
            tracing::warn!(%error, "the journal could not be shortened");
        }
    }

    /// Rewrites the journal to what is still needed.
    pub fn checkpoint(&self) -> FsResult<()> {
        // Most of it without the lock; what came meanwhile is little.
        self.staging.sync()?;
        let mut state = self.state();
        self.staging.sync()?;
        let records = live_records(&state)?;
        fail_point("outbox::checkpoint");
        self.journal.checkpoint(&mut records.into_iter())?;
        fail_point("outbox::checkpointed");
        state.checkpoint_bytes = self.journal.live_bytes();
        Ok(())
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.tender.stop();
    }
}

fn live_records(state: &State) -> FsResult<Vec<Vec<u8>>> {
    let mut records = vec![Record::Begin { epoch: state.epoch, next_no: state.next_no }.encode()];
    for done in state.retiring.values() {
        push_op(&mut records, &done.record, done.bytes.as_ref())?;
        let outcome = crate::ops::Outcome::Applied(done.applied.clone());
        let (no, at) = (done.record.no, done.record.at);
        records.push(Record::Settled { no, at, outcome: Cow::Owned(outcome) }.encode());
    }
    for conflict in state.conflicts.values() {
        records.push(Record::Conflict(Cow::Borrowed(conflict)).encode());
    }
    for op in state.ops.values() {
        push_op(&mut records, &op.record, op.bytes.as_ref())?;
        if op.is_damaged {
            records.push(Record::Damaged { no: op.record.no }.encode());
        }
    }
    Ok(records)
}

/// An operation, after those of its bytes that no file has.
fn push_op(records: &mut Vec<Vec<u8>>, op: &OpRecord, bytes: Option<&OpBytes>) -> FsResult<()> {
    if let (Some(snapshot), Some(bytes)) = (&op.snapshot, bytes) {
        for (at, bytes) in bytes.draft.fill(snapshot)? {
            records.push(Record::Fill { draft: snapshot.draft.0, at, bytes }.encode());
        }
    }
    records.push(Record::Op(Cow::Borrowed(op)).encode());
    Ok(())
}

fn places_of(change: &Change) -> Vec<Place> {
    match change {
        Change::Create { at, .. }
        | Change::Link { at, .. }
        | Change::Unlink { at, .. }
        | Change::Rmdir { at, .. } => vec![at.clone()],
        Change::Rename { from, to, .. } => vec![from.clone(), to.clone()],
        Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => Vec::new(),
    }
}

/// What kernels are told when a change comes to nothing.
pub(super) fn changes_of(location: LocationNo, change: &Change) -> Vec<Shown> {
    let file = change.file();
    let mut changes: Vec<_> = places_of(change)
        .into_iter()
        .map(|Place { dir: parent, name }| {
            let (was, now) = (None, None);
            Shown::Entry { location, parent, name, was, now }
        })
        .collect();
    changes.push(Shown::Attributes { location, file, generation: 0, noticed: None, grew: None });
    changes
}

/// What kernels are told when what they see changes.
fn differences(
    location: LocationNo,
    before: Vec<(Place, Option<Entry>)>,
    after: Vec<(Place, Option<Entry>)>,
) -> Vec<Shown> {
    let mut changes = Vec::new();
    for ((place, before), (_, after)) in before.into_iter().zip(after) {
        let Place { dir: parent, name } = place;
        let number = |e: &Option<Entry>| e.as_ref().map(|e| (e.file_id, e.generation));
        if number(&before) != number(&after) {
            let (was, now) = (before.as_ref().map(Brief::from), after.as_ref().map(Brief::from));
            changes.push(Shown::Entry { location, parent, name, was, now });
        } else if let (Some(before), Some(after)) = (before, after)
            && before.attr != after.attr
        {
            changes.push(Shown::of_attributes(location, (parent, &name), &before, &after));
        }
    }
    changes
}
