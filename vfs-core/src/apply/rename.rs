//! Names that move, and names that are added.

use super::batch::Done;
use super::body::path_of;
use super::compare::{Meant, is_unwritten};
use super::conflict::{AtName, Decision, Dir as DirState, Meeting, Target, There, decide};
use super::create::rename_new;
use super::names::conflict_name;
use super::site::{Dir, Fail, Found, Site};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Observed;
use crate::local::handle_at;
use crate::model::{FileId, FileType, Name, Stamp, Time};
use crate::ops::{Conflict, Obstacle, Place};
use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;
use std::os::fd::AsFd;

/// Names that are tried for a conflict copy.
const ATTEMPTS: u32 = 10_000;

/// What a rename finds.
struct Ends {
    from: Dir,
    seen: Observed,
    to: Dir,
    target: Target,
    /// What is replaced, as it was looked at.
    old: Option<Stamp>,
}

impl Site<'_> {
    pub fn link(&self, file: FileId, at: &Place) -> Result<Done, Fail> {
        let found = self.find(file, Some(at))?;
        let dir = self.dir(at.dir)?;
        let there = if found.is_some() { There::Yes } else { There::No };
        let state = if dir.is_some() { DirState::There } else { DirState::Gone };
        let mut name = at.name.clone();
        for nth in 1..ATTEMPTS {
            let now = dir.as_ref().map(|dir| dir.look(&name)).transpose()?.flatten();
            let at_name = match (&now, &found) {
                (None, _) => AtName::Free,
                (Some(now), Some(found)) if now.disk_ino == found.seen.disk_ino => AtName::Alike,
                (Some(_), _) => AtName::Other,
            };
            let meeting = Meeting::Link { file: there, dir: state, at: at_name };
            let conflict = |dir: &Dir| (nth > 1).then(|| Conflict::KeptAs(dir.path_of(&name)));
            match (decide(meeting), &dir, &found) {
                (Decision::Done, Some(dir), _) => {
                    return Ok(Done::at(dir, name.clone()).met(conflict(dir)));
                }
                (Decision::Stands(why), ..) => return Ok(Done::stands(file, why)),
                (Decision::Do, Some(dir), Some(found)) => match self.link_now(found, dir, &name) {
                    Err(e) if e.kind() == Kind::Exists => {}
                    linked => {
                        linked?;
                        let done = Done::at(dir, name.clone()).met(conflict(dir));
                        return Ok(done.and(&found.dir, found.name.clone()));
                    }
                },
                _ => name = conflict_name(&at.name, &self.writer.name, Time::now(), nth),
            }
        }
        Err(Fail::Later(Obstacle::Failed("no free name for a link".to_owned())))
    }

    fn link_now(&self, found: &Found, dir: &Dir, name: &Name) -> FsResult<()> {
        let handle = handle_at(found.dir.fd.as_fd(), &found.name)?;
        let is_same =
            crate::local::ino_of(&crate::local::stat_of(handle.as_fd())?) == found.seen.disk_ino;
        if !is_same {
            return Err(FsError::new(Kind::Busy, "link a file that was just replaced"));
        }
        let path = path_of(handle.as_fd());
        rustix::fs::linkat(CWD, path, &dir.fd, name.as_bytes(), AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| FsError::os("link", e))
    }

    pub fn rename(
        &self,
        file: FileId,
        from: &Place,
        to: &Place,
        replaced: Option<(FileId, Meant)>,
    ) -> Result<Done, Fail> {
        let found = self.find(file, Some(from))?;
        let to_dir = self.dir(to.dir)?;
        let at_from = self.is_at(found.as_ref(), from)?;
        let (at_to, old) = match (&found, &to_dir) {
            (Some(found), Some(dir)) => self.target(found, dir, &to.name, replaced.as_ref())?,
            _ => (Target::Free, None),
        };
        let dir = if to_dir.is_some() { DirState::There } else { DirState::Gone };
        match (decide(Meeting::Rename { at_from, dir, at_to }), found, to_dir) {
            (Decision::Stands(why), ..) => Ok(Done::stands(file, why)),
            (Decision::Done, Some(found), Some(dir)) => {
                let left = self.dir(from.dir)?;
                if let (Some(left), Some(_)) = (&left, &replaced) {
                    // A crash may have come after the swap, and before what was replaced went.
                    let (_, old) = self.target(&found, left, &from.name, replaced.as_ref())?;
                    old.map(|old| self.drop_replaced(left, &from.name, &old)).transpose()?;
                }
                let done = Done::at(&dir, to.name.clone());
                Ok(match left {
                    Some(left) => done.and(&left, from.name.clone()),
                    None => done,
                })
            }
            (Decision::Do, Some(found), Some(to_dir)) => {
                let (from_dir, seen) = (found.dir, found.seen);
                let ends = Ends { from: from_dir, seen, to: to_dir, target: at_to, old };
                self.rename_now(file, ends, from, to)
            }
            (Decision::Beside, Some(found), Some(dir)) => {
                self.rename_beside(&found.dir, &from.name, &dir, &to.name, file)
            }
            (other, ..) => unreachable!("{other:?} of a rename"),
        }
    }

    fn is_at(&self, found: Option<&Found>, place: &Place) -> FsResult<There> {
        let dir = self.means(place.dir)?;
        let is = found.is_some_and(|f| f.dir.id == dir && f.name == place.name);
        Ok(if is { There::Yes } else { There::No })
    }

    /// What is at the target; with its stamp, where it may be replaced.
    fn target(
        &self,
        moved: &Found,
        dir: &Dir,
        name: &Name,
        replaced: Option<&(FileId, Meant)>,
    ) -> FsResult<(Target, Option<Stamp>)> {
        let Some(seen) = dir.look(name)? else { return Ok((Target::Free, None)) };
        if seen.disk_ino == moved.seen.disk_ino {
            return Ok((Target::Itself, None));
        }
        let is_as_seen = match replaced {
            None => false,
            Some((id, meant)) => {
                let is_it = matches!(meant, Meant::Version(_))
                    || self.id_at(dir, name, &seen)? == Some(*id);
                is_it && self.is_as_seen(dir, name, seen.clone(), meant)?
            }
        };
        // Equal bytes are never a conflict.
        match is_as_seen || self.is_alike_to(moved, dir, name, &seen)? {
            true => Ok((Target::AsSeen, Some(seen.stamp()))),
            false => Ok((Target::Other, None)),
        }
    }

    fn is_alike_to(
        &self,
        moved: &Found,
        dir: &Dir,
        name: &Name,
        seen: &Observed,
    ) -> FsResult<bool> {
        let (a, b) = (&moved.seen.attr, &seen.attr);
        let both_files = a.file_type == FileType::File && b.file_type == FileType::File;
        if !both_files || a.size != b.size {
            return Ok(false);
        }
        let Some(dir) = self.dir_now(dir.id)? else { return Ok(false) };
        let target = Found { dir, name: name.clone(), seen: seen.clone() };
        let ids = (self.content_of(moved)?, self.content_of(&target)?);
        Ok(ids.0.is_some() && ids.0 == ids.1)
    }

    fn is_as_seen(&self, dir: &Dir, name: &Name, seen: Observed, meant: &Meant) -> FsResult<bool> {
        let Some(dir) = self.dir_now(dir.id)? else { return Ok(false) };
        self.is_meant(&Found { dir, name: name.clone(), seen }, meant)
    }

    fn rename_now(&self, file: FileId, ends: Ends, from: &Place, to: &Place) -> Result<Done, Fail> {
        if let Some(old) = ends.old {
            return self.rename_over(file, &ends, &old, from, to);
        }
        let Ends { from: from_dir, to: to_dir, target, .. } = ends;
        let renamed = match target {
            // Two names of one file: the one goes, as after a rename to a free name.
            Target::Itself => {
                rustix::fs::unlinkat(&from_dir.fd, from.name.as_bytes(), AtFlags::empty())
            }
            _ => rename_new(&from_dir, &from.name, &to_dir, &to.name),
        };
        match renamed {
            Ok(()) => Ok(Done::at(&to_dir, to.name.clone()).and(&from_dir, from.name.clone())),
            Err(Errno::EXIST) => self.rename_beside(&from_dir, &from.name, &to_dir, &to.name, file),
            Err(e) => self.not_renamed(e, file),
        }
    }

    /// Swaps the two first: what comes out of the target's place is looked at once more, and
    /// only then removed.
    fn rename_over(
        &self,
        file: FileId,
        ends: &Ends,
        old: &Stamp,
        from: &Place,
        to: &Place,
    ) -> Result<Done, Fail> {
        let Ends { from: from_dir, seen, to: to_dir, .. } = ends;
        let done = || Done::at(to_dir, to.name.clone()).and(from_dir, from.name.clone());
        super::fail_point("apply::rename");
        let swapped = swap(from_dir, &from.name, to_dir, &to.name);
        super::fail_point("apply::renamed");
        match swapped {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                // A file system that cannot swap, or a directory into itself, which says so.
                let (old, new) = (from.name.as_bytes(), to.name.as_bytes());
                return match rustix::fs::renameat(&from_dir.fd, old, &to_dir.fd, new) {
                    Ok(()) => Ok(done()),
                    Err(e) => self.not_renamed(e, file),
                };
            }
            Err(e) => return self.not_renamed(e, file),
        }
        let arrived = to_dir.look(&to.name)?.is_some_and(|now| now.disk_ino == seen.disk_ino);
        if arrived && self.drop_replaced(from_dir, &from.name, old)? {
            return Ok(done());
        }
        swap(from_dir, &from.name, to_dir, &to.name)
            .map_err(|e| FsError::os("undo a rename", e))?;
        self.rename_beside(from_dir, &from.name, to_dir, &to.name, file)
    }

    /// Removes what a rename replaced and swapped to its own old place, if it still is what was
    /// looked at; `false`: it is not.
    fn drop_replaced(&self, dir: &Dir, name: &Name, old: &Stamp) -> FsResult<bool> {
        let Some(seen) = dir.look(name)? else { return Ok(true) };
        let is_dir = seen.attr.file_type == FileType::Directory;
        let is_it = if is_dir { seen.disk_ino == old.disk_ino } else { is_unwritten(&seen, old) };
        if !is_it {
            return Ok(false);
        }
        let how = if is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match rustix::fs::unlinkat(&dir.fd, name.as_bytes(), how) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(e) => Err(FsError::os("remove what was replaced", e)),
        }
    }

    /// The target stays, and the moved file is beside it.
    fn rename_beside(
        &self,
        from_dir: &Dir,
        from: &Name,
        to_dir: &Dir,
        to: &Name,
        file: FileId,
    ) -> Result<Done, Fail> {
        for nth in 1..ATTEMPTS {
            let name = conflict_name(to, &self.writer.name, Time::now(), nth);
            match rename_new(from_dir, from, to_dir, &name) {
                Ok(()) => {
                    let conflict = Conflict::KeptAs(to_dir.path_of(&name));
                    let done = Done::at(to_dir, name).and(from_dir, from.clone());
                    return Ok(done.met(Some(conflict)));
                }
                Err(Errno::EXIST) => {}
                Err(e) => return self.not_renamed(e, file),
            }
        }
        Err(Fail::Later(Obstacle::Failed("no free name for a conflict copy".to_owned())))
    }

    /// What fails because of what the owner did meanwhile is not a failure.
    fn not_renamed(&self, error: Errno, file: FileId) -> Result<Done, Fail> {
        match error {
            Errno::NOENT => Ok(Done::stands(file, "it was moved or deleted on its device")),
            Errno::INVAL => Ok(Done::stands(file, "the folder is inside of it on its device")),
            Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR | Errno::NOTDIR => {
                Ok(Done::stands(file, "something else has this name on its device"))
            }
            e => Err(FsError::os("rename", e).into()),
        }
    }

    pub fn exchange(
        &self,
        file: FileId,
        other: FileId,
        from: &Place,
        to: &Place,
    ) -> Result<Done, Fail> {
        let found = self.find(file, Some(from))?;
        let second = self.find(other, Some(to))?;
        let at_from = self.is_at(found.as_ref(), from)?;
        let second_at_to = self.is_at(second.as_ref(), to)?;
        let is_done = self.is_at(found.as_ref(), to)? == There::Yes;
        let at_to = match (second_at_to, is_done) {
            (There::Yes, _) => Target::AsSeen,
            (There::No, true) => Target::Itself,
            (There::No, false) => Target::Other,
        };
        match (decide(Meeting::Exchange { at_from, at_to }), found, second) {
            (Decision::Stands(why), ..) => Ok(Done::stands(file, why)),
            (Decision::Done, Some(found), _) => Ok(Done::at(&found.dir, found.name)),
            (Decision::Do, Some(found), Some(second)) => {
                match swap(&found.dir, &found.name, &second.dir, &second.name) {
                    Ok(()) => Ok(Done::at(&second.dir, second.name).and(&found.dir, found.name)),
                    Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
                        if !is_inside(&found, &second) =>
                    {
                        Err(FsError::new(Kind::NotSupported, "swap two names").into())
                    }
                    Err(e) => self.not_renamed(e, file),
                }
            }
            (other, ..) => unreachable!("{other:?} of an exchange"),
        }
    }
}

/// Whether one is above the other, which no swap can be.
fn is_inside(a: &Found, b: &Found) -> bool {
    let (a, b) = (a.dir.path_of(&a.name), b.dir.path_of(&b.name));
    a.starts_with(&b) || b.starts_with(&a)
}

fn swap(a: &Dir, a_name: &Name, b: &Dir, b_name: &Name) -> rustix::io::Result<()> {
    super::rename_with((&a.fd, a_name), (&b.fd, b_name), RenameFlags::EXCHANGE)
}
