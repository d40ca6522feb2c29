//! Scanning: from directories on the disk to rows of the index.
//!
//! A whole scan (a *pass*) goes breadth first from the location's folder on the
//! pool's threads; a directory that someone asks for is scanned at once on the
//! asker's. Each directory is watched *before* it is listed, and its changes are
//! ordered by [`Place::order`], so that no change falls between the two.
//!
//! A directory that cannot be read keeps its rows and is tried again later.

use super::Core;
use super::place::{Job, Place, Strays, lock};
use crate::error::{FsError, FsResult, Kind};
use crate::index::{BytesRead, Observed};
use crate::local::{Listing, Root, ino_of, list_dir, observe_at, stat_of};
use crate::model::{Entry, FileId, FileType, LocationNo, Name};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// Rows dropped in one commit when a lost subtree is swept.
const SWEEP_ROWS: usize = 1000;

/// Directories, and entries of them, that go to the index in one commit.
const BATCH_DIRECTORIES: usize = 32;
const BATCH_ENTRIES: usize = 2000;

/// A pass that cannot be relied on for watching is repeated, but takes at most
/// this part of the time.
const RESCAN_SHARE: u32 = 10;

impl Core {
    /// One thread of the pool, until the stop.
    pub(super) fn scan_loop(&self) {
        while let Some((place, jobs)) = self.scan_work.wait(self, |core, _| core.next_jobs()) {
            let count = jobs.len();
            self.run_jobs(&place, jobs);
            self.end_jobs(&place, count);
        }
    }

    /// Some directories of one location; never so many that another thread has none.
    fn next_jobs(&self) -> Option<(Arc<Place>, Vec<Job>)> {
        self.places_in_turn().into_iter().find_map(|place| {
            let mut queue = lock(&place.scan);
            let share = queue.queued() / self.config.scan_threads.max(1);
            let count = share.clamp(1, BATCH_DIRECTORIES);
            let jobs: Vec<_> = std::iter::from_fn(|| queue.pop()).take(count).collect();
            queue.running += jobs.len();
            drop(queue);
            (!jobs.is_empty()).then_some((place, jobs))
        })
    }

    /// The last jobs of a pass end the pass, and run until they did.
    fn end_jobs(&self, place: &Place, count: usize) {
        let mut queue = lock(&place.scan);
        // More than once when the next pass began, and its jobs ended, meanwhile.
        while queue.waiting() == count
            && let Some(began) = queue.pass.take()
        {
            drop(queue);
            self.end_pass(place, began);
            queue = lock(&place.scan);
        }
        queue.running -= count;
    }

    /// Scans the whole location from its folder down; when a pass is going on, after it.
    pub(super) fn begin_pass(&self, place: &Place) {
        let mut queue = lock(&place.scan);
        if queue.pass.is_some() {
            queue.again = true;
            return;
        }
        queue.pass = Some(Instant::now());
        queue.again = false;
        lock(&place.scanned).restart();
        lock(&place.degraded).begin_pass();
        if let Some(watcher) = &self.watcher {
            watcher.unmark(place.no);
        }
        lock(&place.unread).clear();
        *lock(&place.strays) = Strays::default();
        queue.push(Job::once(FileId::ROOT));
        drop(queue);
        self.scan_work.notify();
    }

    fn end_pass(&self, place: &Place, began: Instant) {
        place.sweep_after(Duration::ZERO);
        self.flush();
        let again = lock(&place.scan).again;
        let pause = place.config.rescan_after.max(began.elapsed() * RESCAN_SHARE);
        lock(&place.degraded).end_pass(again, Instant::now() + pause);
        lock(&place.hash).look_again(true);
        if !place.indexed.swap(true, Ordering::AcqRel) {
            tracing::info!(location = place.no.0, took = ?began.elapsed(), "scanned");
        }
        self.hash_work.notify();
        if again {
            self.begin_pass(place);
        }
        self.tend_soon();
    }

    /// Drops the rows of what lost its name and did not get one again. Not during a
    /// scan, which may yet find the new name.
    pub(super) fn sweep(&self, place: &Place) {
        *lock(&place.sweep) = None;
        let lost = std::mem::take(&mut *lock(&place.lost));
        loop {
            match self.index.sweep_location(place.no, SWEEP_ROWS) {
                Ok(0) => break,
                Ok(_) if self.is_stopping() => break,
                Ok(_) => {}
                Err(e) => {
                    tracing::warn!("rows of deleted directories could not be dropped: {e}");
                    break;
                }
            }
        }
        if !lost.is_empty() {
            self.prune_watches(place);
        }
    }

    /// Ends the watches of directories that were moved out of the location.
    fn prune_watches(&self, place: &Place) {
        let Some(watcher) = &self.watcher else { return };
        let Ok(view) = self.index.view() else { return };
        let gone = |dir: &FileId| matches!(view.node(place.no, *dir), Ok(None));
        let gone: std::collections::HashSet<_> =
            watcher.directories(place.no).into_iter().filter(gone).collect();
        if !gone.is_empty() {
            watcher.retain(place.no, |dir| !gone.contains(&dir));
        }
    }

    fn run_jobs(&self, place: &Place, jobs: Vec<Job>) {
        let (mut listed, mut failed) = (Vec::new(), Vec::new());
        for job in jobs {
            if self.is_stopping() || place.forgotten.load(Ordering::Acquire) {
                return;
            }
            let is_full = listed.iter().map(Listed::entries).sum::<usize>() >= BATCH_ENTRIES;
            let order = place.try_order(job.dir()).filter(|_| !is_full);
            let order = order.unwrap_or_else(|| {
                // Never waits for an order while it holds others.
                self.record_all(place, std::mem::take(&mut listed));
                place.order(job.dir())
            });
            match self.list(place, job, order) {
                Ok(more) => listed.extend(more),
                Err(e) => failed.push((job.dir(), e)),
            }
        }
        self.record_all(place, listed);
        failed.into_iter().for_each(|(dir, e)| self.scan_failed(place, dir, &e));
    }

    fn record_all(&self, place: &Place, listed: Vec<Listed<'_>>) {
        let dirs: Vec<_> = listed.iter().map(|l| l.job.dir()).collect();
        if let Err(e) = self.record(place, listed) {
            dirs.into_iter().for_each(|dir| self.scan_failed(place, dir, &e));
        }
    }

    /// Scans a directory for someone who waits for it, on their thread.
    pub(super) fn scan_asked(&self, place: &Place, dir: FileId) -> FsResult<()> {
        self.list(place, Job::once(dir), place.order(dir))
            .and_then(|listed| self.record(place, listed.into_iter().collect()))
            .inspect_err(|e| self.scan_failed(place, dir, e))
    }

    fn enqueue(&self, place: &Place, job: Job, mut subdirectories: Vec<FileId>) {
        if !job.is_deep() {
            let scanned = lock(&place.scanned);
            subdirectories.retain(|dir| !scanned.contains(*dir));
        }
        if subdirectories.is_empty() || place.root().is_err() {
            return;
        }
        let mut queue = lock(&place.scan);
        for dir in subdirectories {
            queue.push(job.for_subdirectory(dir));
        }
        drop(queue);
        self.scan_work.notify();
    }

    /// Needs that no order is held.
    fn scan_failed(&self, place: &Place, dir: FileId, e: &FsError) {
        tracing::debug!(location = place.no.0, dir = dir.0, "not scanned: {e}");
        if place.root().is_err() {
            // Offline, for a reason that is known already.
        } else if dir == FileId::ROOT {
            self.go_offline(place, e.to_string());
        } else if is_gone(e) {
            self.went_astray(place, dir);
            // It may have been replaced by another one.
            if let Err(e) = self.refresh_own(place, dir) {
                tracing::debug!(location = place.no.0, dir = dir.0, "not looked at: {e}");
            }
        } else {
            lock(&place.unread).insert(dir);
            // Whoever asks for it gets the rows there are, not another failing scan.
            let mut scanned = lock(&place.scanned);
            let epoch = scanned.epoch();
            scanned.insert(dir, epoch);
        }
    }

    /// Lists one directory, whose order the caller has, unless the job is already done.
    pub(super) fn list<'p>(
        &self,
        place: &Place,
        job: Job,
        order: MutexGuard<'p, ()>,
    ) -> FsResult<Option<Listed<'p>>> {
        let dir = job.dir();
        let epoch = {
            let scanned = lock(&place.scanned);
            if !job.is_deep() && scanned.contains(dir) {
                return Ok(None);
            }
            scanned.epoch()
        };
        let root = place.root()?;
        let (path, known) = self.locate(place.no, dir)?;
        let open = match root.open_dir(&path) {
            Err(e) if e.kind() == Kind::CrossDevice => {
                // Something is mounted over it: what is below is not the location's.
                lock(&place.scanned).insert(dir, epoch);
                return Ok(None);
            }
            opened => opened?,
        };
        if !is_known(&open, dir, &known)? {
            return Err(FsError::new(Kind::NotFound, "the directory was replaced"));
        }
        self.watch_directory(place, dir, &open);
        let Listing { own, entries, .. } = list_dir(open.as_fd())?;
        let own_changed = own != known.attr;
        Ok(Some(Listed { job, epoch, root, entries, own_changed, _order: order }))
    }

    /// Tells the index what was listed, and goes on with the subdirectories.
    pub(super) fn record(&self, place: &Place, mut listed: Vec<Listed<'_>>) -> FsResult<()> {
        if listed.is_empty() {
            return Ok(());
        }
        let root = place.root()?;
        // Found anew meanwhile, it is scanned anew; a listing from before tells nothing of it.
        listed.retain(|listed| Arc::ptr_eq(&listed.root, &root));
        let (mut listings, mut rest) = (Vec::new(), Vec::new());
        for Listed { job, epoch, entries, own_changed, _order, .. } in listed {
            listings.push((job.dir(), entries));
            rest.push((job, epoch, own_changed, _order));
        }
        // After the listing: what a disk that was pulled out meanwhile did not list is not deleted.
        place.confirm(&root)?;
        let recorded = self.index.observe_directories(place.no, listings)?;
        let mut changed = Vec::new();
        for (subdirectories, (job, epoch, own_changed, order)) in recorded.into_iter().zip(rest) {
            // Without a name by now it is not this scan's any more.
            let Some(subdirectories) = subdirectories else { continue };
            lock(&place.scanned).insert(job.dir(), epoch);
            lock(&place.unread).remove(&job.dir());
            drop(order);
            changed.extend(own_changed.then_some(job.dir()));
            self.enqueue(place, job, subdirectories.into_iter().map(|(_, id)| id).collect());
        }
        lock(&place.hash).look_again(false);
        place.sweep_after(SWEEP_DELAY);
        changed.into_iter().try_for_each(|dir| self.refresh_own(place, dir))
    }

    fn watch_directory(&self, place: &Place, dir: FileId, open: &OwnedFd) {
        let watching = match &self.watcher {
            Some(watcher) => watcher.add(place.no, dir, open.as_fd()),
            None if !self.config.watch => Err("watching is switched off".to_owned()),
            None => Err("the system gives no inotify instance".to_owned()),
        };
        if let Err(why) = watching {
            let next = Instant::now() + place.config.rescan_after;
            lock(&place.degraded).add_unwatched(why, next);
        }
    }

    /// Where a file is, and its row.
    pub(super) fn locate(&self, no: LocationNo, file: FileId) -> FsResult<(Vec<Name>, Entry)> {
        let gone = || FsError::new(Kind::NotFound, "the file has no name any more");
        let view = self.index.view()?;
        let path = view.path(no, file)?.ok_or_else(gone)?;
        let node = view.node(no, file)?.ok_or_else(gone)?;
        Ok((path, node.entry))
    }

    /// Looks at one name and tells the index what is there.
    pub(super) fn refresh(&self, place: &Place, dir: FileId, name: &Name) -> FsResult<()> {
        let root = place.root()?;
        let _order = place.order(dir);
        let open = self.open_handle(place, &root, dir)?;
        match observe_at(open.as_fd(), name) {
            Ok(found) => match self.growing(place, dir, found)? {
                Ok(growing) => self.grew(place, open.as_fd(), dir, growing),
                Err(found) => self.appeared(place, dir, name, found, None).map(drop),
            },
            Err(e) if e.kind() == Kind::NotFound => self.disappeared(place, &root, dir, name),
            Err(e) => Err(e),
        }
    }

    /// A handle on a directory that the index means; `NotFound` when it is another by now.
    pub(super) fn open_handle(&self, place: &Place, root: &Root, dir: FileId) -> FsResult<OwnedFd> {
        let (path, known) = self.locate(place.no, dir)?;
        let open = root.dir(&path)?;
        if !is_known(&open, dir, &known)? {
            return Err(FsError::new(Kind::NotFound, "the directory was replaced"));
        }
        Ok(open)
    }

    /// The row of a directory itself: its times and link count change with its entries.
    pub(super) fn refresh_own(&self, place: &Place, dir: FileId) -> FsResult<()> {
        if dir == FileId::ROOT {
            let observed = place.root()?.observe_root()?;
            return Ok(self.index.observe_root(place.no, &observed)?);
        }
        let node = self.index.view()?.node(place.no, dir)?;
        let node = node.ok_or_else(|| FsError::new(Kind::NotFound, "the directory is gone"))?;
        self.refresh(place, node.parent, &node.name)
    }

    /// Tells the index what a name has, and what was read of it, and looks into what is new; gives
    /// the row. Needs the directory's order.
    pub(super) fn appeared(
        &self,
        place: &Place,
        dir: FileId,
        name: &Name,
        found: Observed,
        read: Option<BytesRead>,
    ) -> FsResult<Option<Entry>> {
        let entry = self.index.observe_entry_read(place.no, dir, name, Some(found), read)?;
        let Some(entry) = entry else { return Ok(None) };
        match entry.attr.file_type {
            FileType::Directory => self.look_into(place, entry.file_id),
            FileType::File => {
                lock(&place.hash).changed(entry.file_id);
                self.hash_work.notify();
            }
            _ => {}
        }
        Ok(Some(entry))
    }

    pub(super) fn look_into(&self, place: &Place, dir: FileId) {
        let was_lost = lock(&place.lost).remove(&dir);
        let was_unread = lock(&place.unread).remove(&dir);
        if was_unread {
            lock(&place.scanned).remove(dir);
        }
        let job = if was_lost { Job::deep(dir) } else { Job::once(dir) };
        if was_lost || !lock(&place.scanned).contains(dir) {
            lock(&place.scan).push_urgent(job);
            self.scan_work.notify();
        }
    }

    /// Tells the index that a name is gone, if the location's folder is surely there.
    /// Needs the directory's order.
    pub(super) fn disappeared(
        &self,
        place: &Place,
        root: &Arc<Root>,
        dir: FileId,
        name: &Name,
    ) -> FsResult<()> {
        place.confirm(root)?;
        let before = self.index.view()?.entry(place.no, dir, name.as_bytes())?;
        let Some(before) = before else { return Ok(()) };
        self.index.observe_entry(place.no, dir, name, None)?;
        if before.attr.file_type == FileType::Directory
            && self.locate(place.no, before.file_id).is_err()
        {
            lock(&place.lost).insert(before.file_id);
        }
        place.sweep_after(SWEEP_DELAY);
        Ok(())
    }
}

/// A directory that was listed and is not in the index yet.
pub(super) struct Listed<'p> {
    job: Job,
    /// When the listing began: see [`super::place::Scanned`].
    epoch: u64,
    /// The folder in which it was found.
    root: Arc<Root>,
    entries: Vec<Observed>,
    /// Its own row is not as it was seen now.
    own_changed: bool,
    /// Until the index has it.
    _order: MutexGuard<'p, ()>,
}

impl Listed<'_> {
    fn entries(&self) -> usize {
        self.entries.len()
    }
}

/// Whether an open directory is the one that the index means. The folder of the
/// location was compared when it was opened, by more than its inode number.
fn is_known(open: &OwnedFd, dir: FileId, known: &Entry) -> FsResult<bool> {
    Ok(dir == FileId::ROOT || ino_of(&stat_of(open.as_fd())?) == known.disk_ino)
}

/// How long what lost its name waits for its next one before its rows go.
pub(super) const SWEEP_DELAY: Duration = Duration::from_secs(2);

/// Whether the failure says that the directory itself is not there any more.
pub(super) fn is_gone(e: &FsError) -> bool {
    matches!(e.kind(), Kind::NotFound | Kind::NotADirectory | Kind::Loop)
}
