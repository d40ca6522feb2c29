//! Following changes: from the kernel's hints to rows of the index.
//!
//! One thread only reads events and notes where to look, so that the kernel's
//! queue stays short; another looks and tells the index. A burst is waited for
//! a few milliseconds and looked at once; a file that is written without pause
//! is looked at a few times a second. What appeared is applied before what
//! disappeared, so that a rename never leaves a file without a name between.

use super::Core;
use super::place::{Job, Place, lock};
use super::scan::is_gone;
use super::watch::{Hint, Watcher};
use crate::error::{FsError, FsResult, Kind};
use crate::local::observe_at;
use crate::model::{FileId, LocationNo, Name};
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A burst is over after this long without another event.
const QUIET: Duration = Duration::from_millis(5);
/// The longest that a burst is waited for.
const BURST: Duration = Duration::from_millis(40);
/// The least time between two looks at a directory in which only bytes change.
const CONTENTS_EVERY: Duration = Duration::from_millis(100);
/// How soon to try again when a scan has the directory.
const BUSY: Duration = Duration::from_millis(10);
/// From so many names on, the whole directory is listed instead: one commit.
const NAMES_TO_LIST: usize = 512;
/// From so many directories on, everything is scanned instead, to keep memory bounded.
const DIRECTORIES_TO_SCAN: usize = 100_000;

/// Where to look, directory by directory.
#[derive(Default)]
pub(super) struct Hints {
    waiting: HashMap<(LocationNo, FileId), Changes>,
    /// Files that are read only when it is their turn: apart, so that nothing else waits for them.
    growing: HashMap<(LocationNo, FileId), Changes>,
    /// When directories were looked at, for [`CONTENTS_EVERY`].
    looked: HashMap<(LocationNo, FileId), Instant>,
    /// Batches that were taken, and that were looked at.
    taken: u64,
    applied: u64,
}

/// What to look at in one directory.
struct Changes {
    first: Instant,
    due: Instant,
    /// And since when; a change that is put off does not become a newer one.
    names: HashMap<Name, Instant>,
    /// Files that a program could write to until now.
    written: HashSet<Name>,
    /// List it whole.
    whole: bool,
    /// Its own row.
    own: bool,
}

impl Hints {
    fn note(&mut self, key: (LocationNo, FileId), name: Option<Name>, urgent: bool, own: bool) {
        let now = Instant::now();
        let rest = self.looked.get(&key).map_or(now, |at| *at + CONTENTS_EVERY);
        let changes = self.waiting.entry(key).or_insert_with(|| Changes::new(now));
        let soon = (now + QUIET).min(changes.first + BURST);
        changes.due = match (urgent, changes.is_noted()) {
            (true, _) => soon,
            (false, false) => soon.max(rest),
            (false, true) => changes.due,
        };
        changes.own |= own;
        if !changes.whole {
            if let Some(name) = name {
                changes.names.entry(name).or_insert(now);
            }
            if changes.names.len() > NAMES_TO_LIST {
                changes.whole = true;
                changes.names = HashMap::new();
            }
        }
    }

    /// After [`Self::note`] of the same name.
    fn note_written(&mut self, key: (LocationNo, FileId), name: Name) {
        if let Some(changes) = self.waiting.get_mut(&key) {
            changes.written.insert(name);
        }
    }

    fn put_back(&mut self, key: (LocationNo, FileId), mut changes: Changes) {
        changes.due = Instant::now() + BUSY;
        match self.waiting.get_mut(&key) {
            Some(newer) => newer.merge(changes),
            None => {
                self.waiting.insert(key, changes);
            }
        }
    }

    /// Notes files that are to be looked at again when they are due.
    fn put_off(&mut self, key: (LocationNo, FileId), later: Changes) {
        match self.growing.get_mut(&key) {
            Some(others) => {
                others.due = others.due.min(later.due);
                others.merge(later);
            }
            None => {
                self.growing.insert(key, later);
            }
        }
    }

    /// What is due, with everything that will be in a moment: the halves of a
    /// rename are events of two directories. What was noted first comes first.
    fn take(&mut self, due: &mut Option<Instant>) -> Option<Batch> {
        let now = Instant::now();
        *due = self.waiting.values().chain(self.growing.values()).map(|changes| changes.due).min();
        if due.is_none_or(|at| at > now) {
            return None;
        }
        self.looked.retain(|_, at| *at + CONTENTS_EVERY > now);
        let mut batch: Batch =
            self.waiting.extract_if(|_, changes| changes.due <= now + BURST).collect();
        batch.extend(self.growing.extract_if(|_, changes| changes.due <= now));
        batch.sort_by_key(|(_, changes)| changes.first);
        self.looked.extend(batch.iter().map(|(key, _)| (*key, now)));
        self.taken += 1;
        Some(batch)
    }

    /// For [`Self::is_applied`].
    pub(super) fn mark(&self) -> u64 {
        self.taken + 1
    }

    /// Whether everything was looked at that was due when the mark was made.
    pub(super) fn is_applied(&self, mark: u64) -> bool {
        let is_empty = || self.waiting.is_empty() && self.growing.is_empty();
        self.applied >= mark || (self.applied == self.taken && is_empty())
    }
}

type Batch = Vec<((LocationNo, FileId), Changes)>;

/// A file that has grown and is not read yet.
struct Later {
    name: Name,
    noted: Instant,
    due: Instant,
}

impl Changes {
    fn new(now: Instant) -> Self {
        let (names, written) = Default::default();
        Self { first: now, due: now, names, written, whole: false, own: false }
    }

    fn merge(&mut self, other: Self) {
        self.first = self.first.min(other.first);
        for (name, noted) in other.names {
            let known = self.names.entry(name).or_insert(noted);
            *known = noted.min(*known);
        }
        self.written.extend(other.written);
        self.whole |= other.whole;
        self.own |= other.own;
    }

    /// Takes files out that are to be looked at later, if there are any.
    fn split_off(&mut self, later: Vec<Later>) -> Option<Self> {
        let due = later.iter().map(|later| later.due).min()?;
        let first = later.iter().map(|later| later.noted).min()?;
        let mut split = Self { due, ..Self::new(first) };
        for Later { name, noted, .. } in later {
            // What is to be done after the look waits for it.
            split.written.extend(self.written.take(&name));
            split.names.insert(name, noted);
        }
        Some(split)
    }

    fn is_noted(&self) -> bool {
        self.whole || self.own || !self.names.is_empty()
    }
}

impl Core {
    /// The thread that reads events, until the stop.
    pub(super) fn event_loop(&self, watcher: &Watcher) {
        // Looked up anew for each event: what was indexed before it happened is known then.
        let file_of = |no, ino| self.index.view().ok()?.file_on_disk(no, ino).ok()?;
        while !self.is_stopping() {
            let mut noted = false;
            let read = watcher.wait(&file_of, &mut |hint| {
                self.note(hint);
                noted = true;
            });
            if let Err(e) = read {
                tracing::error!("events cannot be read any more: {e}");
                self.events_lost(&format!("events cannot be read: {e}"));
                return;
            }
            if noted {
                self.hint_work.notify();
            }
        }
    }

    pub(super) fn note(&self, hint: Hint) {
        let mut hints = lock(&self.hints);
        match hint {
            Hint::Names(no, dir, name) => hints.note((no, dir), Some(name), true, true),
            Hint::Contents(no, dir, name) => hints.note((no, dir), Some(name), false, false),
            Hint::Written(no, dir, name) => {
                hints.note((no, dir), Some(name.clone()), false, false);
                hints.note_written((no, dir), name);
            }
            Hint::Directory(no, dir) => {
                hints.note((no, dir), None, false, true);
                if dir == FileId::ROOT {
                    self.tend_soon();
                }
            }
            Hint::Overflow => {
                drop(hints);
                return self.events_lost("the kernel dropped events, too many came at once");
            }
            Hint::OverflowIn(no) => {
                drop(hints);
                return self.events_lost_in(no);
            }
        }
        if hints.waiting.len() > DIRECTORIES_TO_SCAN {
            hints.waiting.clear();
            hints.growing.clear();
            drop(hints);
            self.events_lost("too many directories changed at once");
        }
    }

    /// What overflows the queue of a mark may be elsewhere on the file system, and go on for long:
    /// so a pass is not begun at once when one has just ended.
    fn events_lost_in(&self, no: LocationNo) {
        let Some(place) = self.place(no) else { return };
        let is_first = lock(&place.degraded).lose_events(
            "the kernel dropped events of the file system; scanning everything again".to_owned(),
        );
        if is_first {
            tracing::warn!(location = no.0, "the kernel dropped events of the file system");
            self.tend_soon();
        }
    }

    fn events_lost(&self, why: &str) {
        tracing::warn!("{why}; scanning everything again");
        for place in self.places() {
            lock(&place.degraded).lost_events = Some(format!("{why}; scanning everything again"));
            if place.root().is_ok() {
                self.begin_pass(&place);
            }
        }
    }

    /// The thread that looks, until the stop.
    pub(super) fn follow_loop(&self) {
        let take = |core: &Self, due: &mut Option<Instant>| lock(&core.hints).take(due);
        while let Some(batch) = self.hint_work.wait(self, take) {
            self.apply(batch);
            lock(&self.hints).applied += 1;
        }
    }

    fn apply(&self, batch: Batch) {
        let mut gone = Vec::new();
        let mut own = Vec::new();
        for ((no, dir), mut changes) in batch {
            let Some(place) = self.place(no) else { continue };
            let Some(order) = place.try_order(dir) else {
                lock(&self.hints).put_back((no, dir), changes);
                continue;
            };
            if changes.own {
                own.push((place.clone(), dir));
            }
            if changes.whole {
                drop(order);
                self.list_again(&place, dir);
            } else {
                let (names, mut later) = (std::mem::take(&mut changes.names), Vec::new());
                if let Err(e) = self.look(&place, dir, names, &mut gone, &mut later) {
                    self.look_failed(&place, dir, &e);
                }
                if let Some(later) = changes.split_off(later) {
                    lock(&self.hints).put_off((no, dir), later);
                }
            }
            if let Err(e) = self.hash_written(&place, dir, changes.written) {
                self.look_failed(&place, dir, &e);
            }
        }
        for (no, dir, name) in gone {
            let Some(place) = self.place(no) else { continue };
            if let Err(e) = self.refresh(&place, dir, &name) {
                self.look_failed(&place, dir, &e);
            }
        }
        for (place, dir) in own {
            if let Err(e) = self.refresh_own(&place, dir) {
                self.look_failed(&place, dir, &e);
            }
        }
    }

    /// Looks at names of a directory, whose order the caller has; those without
    /// anything, and those that are not to be read yet, are left for later.
    fn look(
        &self,
        place: &Place,
        dir: FileId,
        names: HashMap<Name, Instant>,
        gone: &mut Vec<(LocationNo, FileId, Name)>,
        later: &mut Vec<Later>,
    ) -> FsResult<()> {
        if names.is_empty() {
            return Ok(());
        }
        let open = self.open_handle(place, &*place.root()?, dir)?;
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_by_key(|(_, noted)| *noted);
        for (name, noted) in names {
            match observe_at(open.as_fd(), &name) {
                Ok(found) => match self.growing(place, dir, found)? {
                    Ok(growing) => {
                        let due = self.grew_in_turn(place, open.as_fd(), dir, growing, noted)?;
                        later.extend(due.map(|due| Later { name, noted, due }));
                    }
                    Err(found) => drop(self.appeared(place, dir, &name, found, None)?),
                },
                Err(e) if e.kind() == Kind::NotFound => gone.push((place.no, dir, name)),
                Err(e) => self.look_failed(place, dir, &e),
            }
        }
        Ok(())
    }

    /// Has files hashed again that a program let go of. A store through a mapping changes no time
    /// of the file while its page is dirty already, so after the first such store only this tells.
    fn hash_written(&self, place: &Place, dir: FileId, names: HashSet<Name>) -> FsResult<()> {
        for name in names {
            let Some(entry) = self.index.view()?.entry(place.no, dir, name.as_bytes())? else {
                continue;
            };
            // First, so that a hash that is just being taken does not count as the one asked for.
            lock(&place.hash).written(entry.file_id);
            if self.index.hash_again(place.no, entry.file_id)? {
                lock(&place.hash).changed(entry.file_id);
                self.hash_work.notify();
            }
        }
        Ok(())
    }

    pub(super) fn list_again(&self, place: &Place, dir: FileId) {
        lock(&place.scanned).remove(dir);
        lock(&place.scan).push_urgent(Job::once(dir));
        self.scan_work.notify();
    }

    /// What could not be looked at keeps its row. A directory that is gone is scanned
    /// if it gets a name again; after any other failure it is listed again later.
    fn look_failed(&self, place: &Place, dir: FileId, e: &FsError) {
        if is_gone(e) {
            self.went_astray(place, dir);
        } else {
            tracing::debug!(location = place.no.0, dir = dir.0, "not looked at: {e}");
            lock(&place.unread).insert(dir);
        }
    }
}
