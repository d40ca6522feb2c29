//! What a crash left half done, ended at the next start.
//!
//! Notes of the ledger are known at once: hidden names stay hidden, inodes keep the ids they
//! were given. Disks are asked when they are there.

use super::ledger::{Entry, Intent, Step};
use super::remove::put_back;
use super::site::{Dir, is_elsewhere};
use super::write::rescue;
use super::{Applier, lock};
use crate::error::{FsError, FsResult};
use crate::index::Observed;
use crate::indexer::is_same_folder;
use crate::local::Root;
use crate::model::{FileId, Location, LocationId, Name};
use crate::ops::OpId;
use rustix::fs::{AtFlags, RenameFlags};
use std::path::PathBuf;

/// The device in the name of a conflict copy made while recovering, where no writer is known.
const NOBODY: &str = "another device";

impl Applier {
    /// Reads the notes, and ends what is on disks that are there.
    pub(super) fn recover(&self) -> FsResult<()> {
        let intents = self.ledger.intents()?;
        for (_, intent) in &intents {
            self.hide(intent);
        }
        self.remove_stale_redos(&intents)?;
        *lock(&self.unfinished) = intents;
        for location in self.index.locations() {
            let Some(path) = location.root.as_ref().filter(|_| location.owner == self.index.me())
            else {
                continue;
            };
            if !self.is_unfinished(location.id) {
                continue;
            }
            match self.folder(&location, path) {
                Ok(root) => self.recover_location(&location, &root),
                Err(e) => tracing::info!("what was interrupted waits for its disk: {e}"),
            }
        }
        Ok(())
    }

    /// The folder, if it is the one that was indexed.
    fn folder(&self, location: &Location, path: &std::path::Path) -> FsResult<Root> {
        let root = Root::open(path)?;
        let known = self.index.view()?.node(location.no, FileId::ROOT)?;
        match known {
            Some(node) if !is_same_folder(&node.entry, &root)? => {
                Err(FsError::new(crate::error::Kind::NotFound, "another folder is there"))
            }
            // In an index that was made anew nothing is known of it.
            _ => Ok(root),
        }
    }

    /// Hides the names of a note, and expects its inode.
    pub(super) fn hide(&self, intent: &Intent) {
        let Some(location) = self.index.location_by_id(intent.location) else { return };
        match &intent.step {
            Step::Bytes { hidden, .. } | Step::Remove { hidden } => {
                self.index.hide(location.no, hidden.clone());
            }
            Step::Swap { hidden, file, new_ino, .. } => {
                self.index.hide(location.no, hidden.clone());
                self.index.expect(location.no, *new_ino, *file);
            }
            Step::Redo { .. } => {}
        }
    }

    fn is_unfinished(&self, location: LocationId) -> bool {
        lock(&self.unfinished).iter().any(|(_, intent)| intent.location == location)
    }

    /// Ends what is unfinished in a location whose disk is there.
    pub(super) fn recover_location(&self, location: &Location, root: &Root) {
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
            Step::Redo { redo } => self.redo_again(root, &dir.path_of(&intent.target), redo),
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
