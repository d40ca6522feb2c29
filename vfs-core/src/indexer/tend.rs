//! Tending: what no event tells.
//!
//! Folders that vanish, come back or turn out to be others; directories that
//! could not be read or watched; rows of deleted directories. All of it is
//! looked after about once a second, by a thread for each location.

use super::Core;
use super::place::{Job, Place, Strays, lock};
use crate::error::FsResult;
use crate::local::Root;
use crate::model::FileId;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often the index is made durable; without changes that costs nothing.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// A folder that is not there is looked for on every disk, which is not done at each check.
const CHECKS_BETWEEN_SEARCHES: u32 = 3;
/// How often directories that could not be read are tried again.
const RETRY_EVERY: Duration = Duration::from_secs(60);

/// Ends the tending of a location when it is dropped, also by a panic.
struct Tended(Arc<Place>);

impl Drop for Tended {
    fn drop(&mut self) {
        self.0.tended.store(false, Ordering::Release);
    }
}

impl Core {
    /// The thread that tends, until the stop.
    pub(super) fn tend_loop(&self) {
        let (mut next, mut flushed) = (Instant::now(), Instant::now());
        std::thread::scope(|scope| {
            while let Some(()) = self.tend_work.wait(self, |core, due| core.tend_due(next, due)) {
                next = Instant::now() + self.config.root_check;
                self.places().into_iter().for_each(|place| self.tend_beside(scope, place));
                if flushed.elapsed() >= FLUSH_EVERY {
                    flushed = Instant::now();
                    self.flush();
                }
            }
        });
    }

    /// Tends a location on a thread of its own, unless one is still at it: its disk may be a dead
    /// network's, and the others do not wait for it.
    fn tend_beside<'s>(&'s self, scope: &'s std::thread::Scope<'s, '_>, place: Arc<Place>) {
        if place.tended.swap(true, Ordering::AcqRel) {
            return;
        }
        let tended = Tended(place);
        let tend = move || self.tend(&tended.0);
        let spawned = std::thread::Builder::new().name("sd-tend-disk".into());
        if let Err(e) = spawned.spawn_scoped(scope, tend) {
            tracing::warn!("a location is not looked after now: {e}");
        }
    }

    /// What was committed last is otherwise durable only with the next change.
    pub(super) fn flush(&self) {
        if let Err(e) = self.index.flush() {
            tracing::warn!("the index could not be written: {e}");
        }
    }

    fn tend_due(&self, next: Instant, due: &mut Option<Instant>) -> Option<()> {
        let strays = self.places().iter().filter_map(|place| lock(&place.strays).at).min();
        let at = strays.map_or(next, |at| at.min(next));
        *due = Some(at);
        (self.tend_now.swap(false, Ordering::AcqRel) || Instant::now() >= at).then_some(())
    }

    /// Notes that a directory was not found, and must be scanned once it is.
    pub(super) fn went_astray(&self, place: &Place, dir: FileId) {
        lock(&place.scanned).remove(dir);
        lock(&place.strays).insert(dir, Instant::now());
        self.tend_work.notify();
    }

    fn seek_strays(&self, place: &Place) {
        let strays = lock(&place.strays).take(Instant::now());
        if strays.is_empty() {
            return;
        }
        let Ok(view) = self.index.view() else { return };
        // Without any name it was deleted; with one it may be found below a new one.
        let exists = |dir: &FileId| !matches!(view.node(place.no, *dir), Ok(None));
        let jobs: Vec<_> = strays.into_iter().filter(exists).map(Job::once).collect();
        let mut queue = lock(&place.scan);
        jobs.into_iter().for_each(|job| queue.push_urgent(job));
        drop(queue);
        self.scan_work.notify();
    }

    /// Makes the tending thread look now.
    pub(super) fn tend_soon(&self) {
        self.tend_now.store(true, Ordering::Release);
        self.tend_work.notify();
    }

    fn tend(&self, place: &Place) {
        if !self.is_there(place) {
            // All of it is scanned when the folder is back.
            *lock(&place.strays) = Strays::default();
            return;
        }
        let now = Instant::now();
        let scanning = || self.places().iter().any(|place| place.is_scanning());
        if place.is_sweep_due(now) && !scanning() {
            self.sweep(place);
        }
        self.seek_strays(place);
        if lock(&place.degraded).rescan_at.is_some_and(|at| at <= now) && !place.is_scanning() {
            self.begin_pass(place);
        }
        if place.retry_due(now, RETRY_EVERY) {
            self.retry_unread(place);
        }
    }

    fn is_there(&self, place: &Place) -> bool {
        match place.root() {
            Ok(root) => self.is_still_there(place, &root),
            Err(_) => {
                let every = self.config.root_check * CHECKS_BETWEEN_SEARCHES;
                place.look_due(Instant::now(), every) && self.open(place, true).is_ok()
            }
        }
    }

    /// Whether the folder that was found can be relied on; if not, the location goes offline.
    pub(super) fn is_still_there(&self, place: &Place, root: &Root) -> bool {
        let checked = place.check(root);
        checked.map_err(|why| self.go_offline(place, why)).is_ok()
    }

    fn retry_unread(&self, place: &Place) {
        let unread = std::mem::take(&mut *lock(&place.unread));
        if unread.is_empty() {
            return;
        }
        for dir in unread {
            lock(&place.scanned).remove(dir);
            lock(&place.scan).push(Job::once(dir));
        }
        self.scan_work.notify();
    }

    /// The folder of a location; found for the first time, or again, it is scanned.
    pub(super) fn open(&self, place: &Place, again: bool) -> FsResult<Arc<Root>> {
        let found = |root: &Root| {
            if let Some(before_scan) = self.before_scan.get() {
                before_scan(place.no, root);
            }
        };
        let (root, is_new) = place.open(&self.index, again, found)?;
        if is_new {
            self.begin_pass(place);
        }
        Ok(root)
    }

    /// Stops everything about a location but its rows, which stay as they are.
    pub(super) fn go_offline(&self, place: &Place, why: String) {
        tracing::info!(location = place.no.0, "offline: {why}");
        place.set_offline(why);
        lock(&place.scan).clear();
        if let Some(watcher) = &self.watcher {
            watcher.end(place.no);
        }
    }
}
