//! Changes in place: of files with several names, and small ones of huge files.
//!
//! The inode stays, so that every name has the new bytes, and nothing is copied that stays.
//! A crash in the middle would leave a mix of two versions. So the new bytes are durable in
//! the daemon's own folder first, with a note in the ledger; until the note is ended, the
//! change is done again from its start, at the next attempt or the next start.

use super::Applier;
use super::batch::{Done, Ready};
use super::body::{copy_data, reserve, set_times};
use super::compare::Known;
use super::ledger::{Entry, Intent, Redo, Step};
use super::site::{Fail, Found, Site, is_elsewhere};
use crate::error::{FsError, FsResult};
use crate::local::{Root, stamp_of};
use crate::model::{FileId, Name};
use crate::ops::{NewContent, OpId};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

impl Site<'_> {
    /// `None`: the owner changed the file before the first byte was written.
    pub fn write_in_place(
        &self,
        id: OpId,
        found: &Found,
        base: Option<Known>,
        ready: &Ready,
        content: &NewContent,
    ) -> Result<Option<Done>, Fail> {
        let redo = Redo {
            source: format!("{}-{:x}-{}", id.writer, id.epoch, id.no),
            disk_ino: found.seen.disk_ino,
            size: content.size,
            kept_bytes: content.kept_bytes,
            extents: content.extents.clone(),
            mtime: content.mtime,
        };
        let target = open_to_write(&self.root, &found.dir.path_of(&found.name))?;
        self.applier.store_redo(&redo, ready)?;
        let intent = Intent {
            location: self.location.id,
            dir: found.dir.id,
            path: found.dir.path.clone(),
            target: found.name.clone(),
            step: Step::Redo { redo: redo.clone() },
        };
        self.applier.begin_redo(id, intent)?;
        let dirs = self.directories_of(found)?;
        super::fail_point("apply::in-place-noted");
        // Nobody is to see it half done; the last look is as late as it can be.
        let begun = self.applier.indexer.unobserved(self.no(), &dirs, || {
            if !self.may_write_in_place(found, base.as_ref())? {
                return Ok(Begun::Changed);
            }
            if let Err(e) = reserve(&target, &redo.extents) {
                // Reserving is a change, too.
                let _ = set_times(target.as_fd(), None, Some(found.seen.attr.mtime));
                return Ok(Begun::NoRoom(e));
            }
            redo_into(&self.applier.redo_dir, &redo, &target).map(|()| Begun::Done)
        });
        // An error leaves the note, and what may be half done is done again.
        let begun = begun.and_then(|begun| begun)?;
        self.applier.end_redo(&id, &redo);
        match begun {
            Begun::Done => {
                let stamp = stamp_of(&target)?;
                Ok(Some(Done::of(&found.dir, found.name.clone(), stamp, ready)))
            }
            Begun::Changed => Ok(None),
            Begun::NoRoom(e) => Err(e.into()),
        }
    }

    /// Those in which the file has names.
    fn directories_of(&self, found: &Found) -> FsResult<Vec<FileId>> {
        let view = self.applier.index.view()?;
        let row = view.entry(self.no(), found.dir.id, found.name.as_bytes())?;
        let names = row.map(|row| view.names(self.no(), row.file_id, MAX_NAMES)).transpose()?;
        let others = names.into_iter().flatten().map(|(dir, _)| dir);
        Ok(std::iter::once(found.dir.id).chain(others).collect())
    }

    fn may_write_in_place(&self, found: &Found, base: Option<&Known>) -> FsResult<bool> {
        let (Some(base), Some(dir)) = (base, self.dir_now(found.dir.id)?) else {
            return Ok(false);
        };
        let Some(seen) = dir.look(&found.name)? else { return Ok(false) };
        if seen.disk_ino != found.seen.disk_ino {
            return Ok(false);
        }
        self.is_version(&Found { dir, name: found.name.clone(), seen }, base)
    }
}

/// How far a change in place came.
enum Begun {
    Done,
    /// The owner changed the file before the first byte was written.
    Changed,
    /// Nothing was written.
    NoRoom(FsError),
}

/// Names of one file whose directories nobody looks at meanwhile.
const MAX_NAMES: usize = 256;

impl Applier {
    fn redo_path(&self, redo: &Redo) -> PathBuf {
        self.redo_dir.join(&redo.source)
    }

    /// The bytes, at their places in a sparse file, durable.
    fn store_redo(&self, redo: &Redo, ready: &Ready) -> FsResult<()> {
        let io = |e| FsError::os("store bytes to be written in place", e);
        let file = File::create(self.redo_path(redo)).map_err(io)?;
        for extent in &redo.extents {
            copy_data(&ready.body().file, &file, extent.clone())?;
        }
        file.set_len(redo.size).map_err(io)?;
        file.sync_all().map_err(io)?;
        let dir = File::open(&self.redo_dir).map_err(io)?;
        dir.sync_all().map_err(io)
    }

    fn begin_redo(&self, id: OpId, intent: Intent) -> FsResult<()> {
        self.ledger.commit(Entry { begun: vec![(id, intent.clone())], ..Entry::default() })?;
        super::lock(&self.redos).insert(id, intent);
        Ok(())
    }

    /// Ends a change in place of this operation that failed half-way.
    pub(super) fn finish_redo(&self, site: &Site<'_>, id: &OpId) -> FsResult<()> {
        let Some(intent) = super::lock(&self.redos).get(id).cloned() else { return Ok(()) };
        let Step::Redo { redo } = &intent.step else { return Ok(()) };
        let path = [intent.path.as_slice(), std::slice::from_ref(&intent.target)].concat();
        redo_again(&self.redo_dir, &site.root, &path, redo)?;
        self.end_redo(id, redo);
        Ok(())
    }

    /// It is done, and the note goes with the batch's answer.
    fn end_redo(&self, id: &OpId, redo: &Redo) {
        if super::lock(&self.redos).remove(id).is_some() {
            super::lock(&self.redone).push((*id, self.redo_path(redo)));
        }
    }
}

/// Writes the bytes into the file and makes it durable.
fn redo_into(redo_dir: &Path, redo: &Redo, target: &File) -> FsResult<()> {
    let io = |e| FsError::os("write in place", e);
    let source = File::open(redo_dir.join(&redo.source)).map_err(io)?;
    // What is cut off and grows again is zero.
    if redo.kept_bytes < stamp_of(target)?.size {
        target.set_len(redo.kept_bytes).map_err(io)?;
    }
    target.set_len(redo.size).map_err(io)?;
    super::fail_point("apply::in-place");
    for extent in &redo.extents {
        // Holes of the source are zeros that were written.
        super::body::copy_all(&source, target, extent.clone())?;
        super::fail_point("apply::in-place-extent");
    }
    set_times(target.as_fd(), None, Some(redo.mtime)).map_err(|e| io(e.into()))?;
    target.sync_all().map_err(io)
}

/// Ends what a crash or an error left half done.
pub(super) fn redo_again(redo_dir: &Path, root: &Root, path: &[Name], redo: &Redo) -> FsResult<()> {
    let target = match open_to_write(root, path) {
        Err(e) if is_elsewhere(&e) => return Ok(()),
        opened => opened?,
    };
    if stamp_of(&target)?.disk_ino != redo.disk_ino {
        return Ok(());
    }
    redo_into(redo_dir, redo, &target)
}

fn open_to_write(root: &Root, path: &[Name]) -> FsResult<File> {
    root.open_for_writing(path)
}
