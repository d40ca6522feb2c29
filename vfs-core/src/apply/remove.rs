//! Names that go.

use super::batch::Done;
use super::compare::{Meant, is_unwritten};
use super::conflict::{Decision, Meeting, Victim, decide};
use super::create::rename_new;
use super::site::{Dir, Fail, Found, Site};
use crate::error::{FsError, FsResult};
use crate::index::Observed;
use crate::model::{FileId, FileType, Name};
use crate::ops::Place;
use rustix::fs::AtFlags;
use rustix::io::Errno;

impl Site<'_> {
    /// Takes a name away. What has a version is first moved to `aside`, and looked at once more.
    pub fn unlink(
        &self,
        file: FileId,
        at: &Place,
        meant: Meant,
        aside: Option<&Name>,
    ) -> Result<Done, Fail> {
        let Some(dir) = self.dir(at.dir)? else { return Ok(Done::nothing(Some(file))) };
        let seen = dir.look(&at.name)?;
        let victim = self.victim(&dir, &at.name, seen.as_ref(), file, &meant)?;
        match decide(Meeting::Unlink { at: victim }) {
            Decision::Done => Ok(Done::at(&dir, at.name.clone()).of_file(file)),
            Decision::Stands(why) => Ok(Done::stands(file, why)),
            Decision::Do => {
                let removed = match (aside, &seen) {
                    (Some(aside), Some(seen)) if seen.attr.file_type == FileType::File => {
                        self.remove_aside(&dir, &at.name, seen, aside)?
                    }
                    _ => remove(&dir, &at.name, AtFlags::empty())?,
                };
                let done = Done::at(&dir, at.name.clone()).of_file(file);
                let done = aside.into_iter().fold(done, |done, name| done.revealing(name.clone()));
                Ok(match removed {
                    true => done,
                    false => Done { main: None, ..done }.met(Done::stands(file, CHANGED).conflict),
                })
            }
            other => unreachable!("{other:?} of an unlink"),
        }
    }

    fn victim(
        &self,
        dir: &Dir,
        name: &Name,
        seen: Option<&Observed>,
        file: FileId,
        meant: &Meant,
    ) -> FsResult<Victim> {
        let Some(seen) = seen else { return Ok(Victim::Nothing) };
        if seen.attr.file_type == FileType::Directory {
            return Ok(Victim::Other);
        }
        let is_file = self.id_at(dir, name, seen)? == Some(file);
        let Some(dir) = self.dir_now(dir.id)? else { return Ok(Victim::Other) };
        let found = Found { dir, name: name.clone(), seen: seen.clone() };
        Ok(match (is_file, self.is_meant(&found, meant)?) {
            (true, true) => Victim::AsSeen,
            (true, false) => Victim::Changed,
            // Saved again with the same bytes.
            (false, true) if matches!(meant, Meant::Version(_)) => Victim::AsSeen,
            (false, _) => Victim::Other,
        })
    }

    /// `false`: its owner changed it in this moment, and it has its name again.
    fn remove_aside(
        &self,
        dir: &Dir,
        name: &Name,
        seen: &Observed,
        aside: &Name,
    ) -> FsResult<bool> {
        self.applier.index.hide(self.no(), aside.clone());
        match rename_new(dir, name, dir, aside) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(true),
            Err(e) => return Err(FsError::os("remove a file", e)),
        }
        super::fail_point("apply::aside");
        let is_same = dir.look(aside)?.is_some_and(|now| is_unwritten(&now, &seen.stamp()));
        if is_same {
            return remove(dir, aside, AtFlags::empty());
        }
        put_back(dir, aside, name, &self.writer.name)?;
        Ok(false)
    }

    pub fn rmdir(&self, file: FileId, at: &Place) -> Result<Done, Fail> {
        let Some(dir) = self.dir(at.dir)? else { return Ok(Done::nothing(Some(file))) };
        let victim = match dir.look(&at.name)? {
            None => Victim::Nothing,
            Some(seen) if seen.attr.file_type != FileType::Directory => Victim::Other,
            Some(seen) if self.id_at(&dir, &at.name, &seen)? != Some(file) => Victim::Other,
            Some(_) => Victim::AsSeen,
        };
        let done = Done::at(&dir, at.name.clone()).of_file(file);
        match decide(Meeting::Rmdir { at: victim }) {
            Decision::Done => Ok(done),
            Decision::Stands(why) => Ok(Done::stands(file, why)),
            Decision::Do => {
                match rustix::fs::unlinkat(&dir.fd, at.name.as_bytes(), AtFlags::REMOVEDIR) {
                    Ok(()) | Err(Errno::NOENT) => Ok(done),
                    Err(Errno::NOTEMPTY | Errno::EXIST) => {
                        match decide(Meeting::Rmdir { at: Victim::Changed }) {
                            Decision::Stands(why) => Ok(Done::stands(file, why)),
                            other => unreachable!("{other:?} of a directory that is not empty"),
                        }
                    }
                    Err(e) => Err(FsError::os("remove a directory", e).into()),
                }
            }
            other => unreachable!("{other:?} of a directory"),
        }
    }
}

const CHANGED: &str = "it was changed on its device";

/// What was moved aside gets its name back; if that was taken meanwhile, one beside it.
pub(super) fn put_back(dir: &Dir, aside: &Name, name: &Name, device: &str) -> FsResult<()> {
    match rename_new(dir, aside, dir, name) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::EXIST) => super::write::rescue(dir, aside, name, device),
        Err(e) => Err(FsError::os("put a file back", e)),
    }
}

fn remove(dir: &Dir, name: &Name, how: AtFlags) -> FsResult<bool> {
    match rustix::fs::unlinkat(&dir.fd, name.as_bytes(), how) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(e) => Err(FsError::os("remove a file", e)),
    }
}

impl Done {
    /// The id to answer with, although the file has no row any more.
    fn of_file(self, file: FileId) -> Self {
        Self { file: Some(file), main: None, ..self }
    }
}
