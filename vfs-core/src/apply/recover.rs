//! What a crash left half done, ended before anyone sees it.
//!
//! Notes of the ledger are known at once: hidden names stay hidden, inodes keep the ids they
//! were given. What is on a disk is ended when the indexer has found the location's folder, and
//! in that very folder: before it is scanned, served or written to.

use super::ledger::{Entry, Intent, Ledger, Step};
use super::lock;
use super::redo::redo_again;
use super::remove::put_back;
use super::site::{Dir, is_elsewhere};
use super::write::rescue;
use crate::error::{FsError, FsResult};
use crate::index::{Index, Observed};
use crate::local::Root;
use crate::model::{Location, LocationId, LocationNo, Name};
use crate::ops::OpId;
use rustix::fs::{AtFlags, RenameFlags};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// The device in the name of a conflict copy made while recovering, where no writer is known.
const NOBODY: &str = "another device";

/// What ends it.
pub(super) struct Recovery {
    index: Index,
    ledger: Arc<Ledger>,
    redo_dir: PathBuf,
    /// What a crash left in a location is ended once, and before anything else is done there.
    recovering: Mutex<()>,
    /// What a crash left, on disks that were not there yet.
    unfinished: Mutex<Vec<(OpId, Intent)>>,
}

impl Recovery {
    /// Reads the notes.
    pub fn open(index: Index, ledger: Arc<Ledger>, redo_dir: PathBuf) -> FsResult<Self> {
        let intents = ledger.intents()?;
        let unfinished = Mutex::new(intents.clone());
        let recovery = Self { index, ledger, redo_dir, recovering: Mutex::default(), unfinished };
        intents.iter().for_each(|(_, intent)| hide(&recovery.index, intent));
        recovery.remove_stale_redos(&intents)?;
        Ok(recovery)
    }

    /// Ends what is unfinished in a location, in its folder that was just found.
    pub fn found(&self, no: LocationNo, root: &Root) {
        if let Some(location) = self.index.location(no) {
            self.recover_location(&location, root);
        }
    }

    fn is_unfinished(&self, location: LocationId) -> bool {
        lock(&self.unfinished).iter().any(|(_, intent)| intent.location == location)
    }

    /// Ends what is unfinished in a location whose disk is there.
    pub fn recover_location(&self, location: &Location, root: &Root) {
        let _recovering = lock(&self.recovering);
        if !self.is_unfinished(location.id) {
            return;
        }
        let (here, elsewhere): (Vec<_>, Vec<_>) = std::mem::take(&mut *lock(&self.unfinished))
            .into_iter()
            .partition(|(_, intent)| intent.location == location.id);
        *lock(&self.unfinished) = elsewhere;
        let (mut ended, mut redone) = (Vec::new(), Vec::new());
        for (id, intent) in here {
            match self.end(location, root, &intent) {
                Ok(()) => {
                    self.expect_what_is_there(location, root, &intent);
                    if let Step::Redo { redo } = &intent.step {
                        redone.push(self.redo_dir.join(&redo.source));
                    }
                    ended.push(id);
                }
                Err(e) => {
                    tracing::warn!("what was interrupted could not be ended: {e}");
                    lock(&self.unfinished).push((id, intent));
                }
            }
        }
        if let Err(e) = self.ledger.commit(Entry { ended, ..Entry::default() }) {
            tracing::warn!("the end of what was interrupted could not be noted: {e}");
            return;
        }
        redone.into_iter().for_each(remove_redo);
    }

    fn end(&self, location: &Location, root: &Root, intent: &Intent) -> FsResult<()> {
        let Some(dir) = self.dir_of(location, root, intent)? else { return Ok(()) };
        match &intent.step {
            Step::Bytes { hidden, old } => match (dir.look(hidden)?, old) {
                // Ours, or the old version after the swap; but not if its owner changed it.
                (Some(seen), Some(old))
                    if seen.disk_ino == old.disk_ino
                        && !super::compare::is_unwritten(&seen, old) =>
                {
                    rescue(&dir, hidden, &intent.target, NOBODY)
                }
                _ => remove(&dir, hidden),
            },
            Step::Remove { hidden } => match dir.look(hidden)? {
                Some(_) => put_back(&dir, hidden, &intent.target, NOBODY),
                None => Ok(()),
            },
            Step::Swap { hidden, new_ino, old, .. } => {
                let Some(seen) = dir.look(hidden)? else { return Ok(()) };
                let is_old = super::compare::is_unwritten(&seen, old);
                match seen.disk_ino == *new_ino || is_old {
                    // Not swapped yet, or swapped with what was meant: either way not needed.
                    true => remove(&dir, hidden),
                    false => self.swap_back_later(&dir, hidden, &intent.target, *new_ino),
                }
            }
            Step::Redo { redo } => {
                redo_again(&self.redo_dir, root, &dir.path_of(&intent.target), redo)
            }
        }?;
        dir.sync()
    }

    /// An inode that did not get its name is free for any other file, which is not this one.
    fn expect_what_is_there(&self, location: &Location, root: &Root, intent: &Intent) {
        let Step::Swap { new_ino, .. } = intent.step else { return };
        let dir = self.dir_of(location, root, intent).ok().flatten();
        let target = dir.and_then(|dir| dir.look(&intent.target).ok().flatten());
        if target.is_none_or(|seen| seen.disk_ino != new_ino) {
            self.index.unexpect(location.no, new_ino);
        }
    }

    /// The owner's own change came out of the swap, and the crash came before it was seen.
    fn swap_back_later(
        &self,
        dir: &Dir,
        hidden: &Name,
        target: &Name,
        new_ino: u64,
    ) -> FsResult<()> {
        let is_new = |seen: &Observed| seen.disk_ino == new_ino;
        if dir.look(target)?.as_ref().is_some_and(is_new) {
            let (from, to) = (hidden.as_bytes(), target.as_bytes());
            rustix::fs::renameat_with(&dir.fd, from, &dir.fd, to, RenameFlags::EXCHANGE)
                .map_err(|e| FsError::os("swap back", e))?;
            if dir.look(hidden)?.as_ref().is_some_and(is_new) {
                return remove(dir, hidden);
            }
        }
        rescue(dir, hidden, target, NOBODY)
    }

    /// Where the note says, or where the index has the directory now.
    fn dir_of(&self, location: &Location, root: &Root, intent: &Intent) -> FsResult<Option<Dir>> {
        let indexed = self.index.view()?.path(location.no, intent.dir)?;
        let paths = [Some(intent.path.clone()), indexed];
        let mut first = None;
        for path in paths.into_iter().flatten() {
            let fd = match root.open_dir(&path) {
                Err(e) if is_elsewhere(&e) => continue,
                opened => opened?,
            };
            let dir = Dir { id: intent.dir, path, fd };
            let hidden = match &intent.step {
                Step::Bytes { hidden, .. }
                | Step::Remove { hidden }
                | Step::Swap { hidden, .. } => hidden,
                Step::Redo { .. } => return Ok(Some(dir)),
            };
            if dir.look(hidden)?.is_some() {
                return Ok(Some(dir));
            }
            first.get_or_insert(dir);
        }
        Ok(first)
    }

    /// Files of redo bytes that no note speaks of: the crash came before the note.
    fn remove_stale_redos(&self, intents: &[(OpId, Intent)]) -> FsResult<()> {
        let io = |e| FsError::os("read the folder of redo files", e);
        for entry in std::fs::read_dir(&self.redo_dir).map_err(io)? {
            let entry = entry.map_err(io)?;
            let is_noted = intents.iter().any(|(_, intent)| match &intent.step {
                Step::Redo { redo } => entry.file_name().to_str() == Some(&redo.source),
                _ => false,
            });
            if !is_noted {
                remove_redo(entry.path());
            }
        }
        Ok(())
    }
}

/// Hides the names of a note, and expects its inode.
pub(super) fn hide(index: &Index, intent: &Intent) {
    let Some(location) = index.location_by_id(intent.location) else { return };
    match &intent.step {
        Step::Bytes { hidden, .. } | Step::Remove { hidden } => {
            index.hide(location.no, hidden.clone());
        }
        Step::Swap { hidden, file, new_ino, .. } => {
            index.hide(location.no, hidden.clone());
            index.expect(location.no, *new_ino, *file);
        }
        Step::Redo { .. } => {}
    }
}

pub(super) fn remove_redo(path: PathBuf) {
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), "bytes that are not needed stay: {e}");
        }
        _ => {}
    }
}

fn remove(dir: &Dir, name: &Name) -> FsResult<()> {
    match rustix::fs::unlinkat(&dir.fd, name.as_bytes(), AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(e) => Err(FsError::os("remove what was left over", e)),
    }
}
