//! Something new under a name.

use super::batch::{Done, Ready};
use super::body::{Body, home_of, path_of};
use super::conflict::{AtName, Decision, Dir as DirState, Meeting, decide};
use super::names::{conflict_name, hidden_name};
use super::site::{Dir, Fail, Found, Site};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Observed;
use crate::local::{handle_at, observe_at};
use crate::model::{FileId, FileType, Name, Time};
use crate::ops::{Conflict, New, NewContent, Obstacle, Place};
use rustix::fs::{AtFlags, Mode, RenameFlags};
use rustix::io::Errno;
use std::os::fd::AsFd;

/// Names that are tried for a conflict copy, and how often others may be quicker.
const ATTEMPTS: u32 = 10_000;
/// What a peer may not give a regular file: it could run as this user.
pub(super) const SET_ID: u16 = 0o6000;

/// What is to be made, with the id that its writer drew.
pub(super) struct Making<'a> {
    pub file: Option<FileId>,
    pub what: &'a New,
    pub perm: u16,
    pub mtime: Time,
}

impl Site<'_> {
    /// Makes it at this place, or beside what is there.
    pub fn create(
        &self,
        at: &Place,
        new: &Making<'_>,
        ready: Option<&Ready>,
    ) -> Result<Done, Fail> {
        match self.dir(at.dir)? {
            Some(dir) => self.put(&dir, &at.name, 0, new, ready),
            None => match decide(Meeting::Create { dir: DirState::Gone, at: AtName::Free }) {
                // Without its directory it is kept where its owner looks first.
                Decision::Beside => self.put(&self.top()?, &at.name, 1, new, ready),
                other => unreachable!("{other:?} of something new in a deleted directory"),
            },
        }
    }

    /// The location's own folder.
    pub fn top(&self) -> Result<Dir, Fail> {
        self.dir_now(FileId::ROOT)?.ok_or(Fail::Later(Obstacle::Offline))
    }

    /// Makes it in a directory, under its name (0) or from the `nth` name of a conflict copy on.
    pub fn put(
        &self,
        dir: &Dir,
        name: &Name,
        mut nth: u32,
        new: &Making<'_>,
        ready: Option<&Ready>,
    ) -> Result<Done, Fail> {
        for _ in 0..ATTEMPTS {
            let name = match nth {
                0 => name.clone(),
                n => conflict_name(name, &self.writer.name, new.mtime, n),
            };
            let found = dir.look(&name)?.map(|seen| (name.clone(), seen));
            let at = self.at_name(dir, found.as_ref(), new)?;
            let conflict = (nth > 0).then(|| Conflict::KeptAs(dir.path_of(&name)));
            match decide(Meeting::Create { dir: DirState::There, at }) {
                Decision::Done => return self.is_made(dir, name, found, conflict),
                Decision::Do => match self.make(dir, &name, new, ready) {
                    Err(e) if e.kind() == Kind::Exists => {}
                    made => return Ok(made?.met(conflict)),
                },
                _ => nth += 1,
            }
        }
        Err(Fail::Later(Obstacle::Failed("no free name for a conflict copy".to_owned())))
    }

    fn at_name(
        &self,
        dir: &Dir,
        found: Option<&(Name, Observed)>,
        new: &Making<'_>,
    ) -> FsResult<AtName> {
        let Some((name, seen)) = found else { return Ok(AtName::Free) };
        let alike = match (new.what, seen.attr.file_type) {
            (New::Directory, FileType::Directory) | (New::Fifo, FileType::Fifo) => true,
            (New::Symlink(target), FileType::Symlink) => seen.target.as_ref() == Some(target),
            (New::File(content), FileType::File) => self.is_alike(dir, name, seen, content)?,
            _ => false,
        };
        Ok(if alike { AtName::Alike } else { AtName::Other })
    }

    fn is_alike(
        &self,
        dir: &Dir,
        name: &Name,
        seen: &Observed,
        content: &NewContent,
    ) -> FsResult<bool> {
        let Some(dir) = self.dir_now(dir.id)? else { return Ok(false) };
        self.has_bytes(&Found { dir, name: name.clone(), seen: seen.clone() }, content)
    }

    /// The same is there already: the writer's id means it from now on.
    fn is_made(
        &self,
        dir: &Dir,
        name: Name,
        found: Option<(Name, Observed)>,
        conflict: Option<Conflict>,
    ) -> Result<Done, Fail> {
        let version = found.filter(|(_, seen)| seen.attr.file_type == FileType::File);
        let version = version.map(|(_, seen)| seen.stamp());
        Ok(Done { version, was_there: true, ..Done::at(dir, name) }.met(conflict))
    }

    /// Makes it under a name that is free; [`Kind::Exists`] when it is not any more.
    fn make(
        &self,
        dir: &Dir,
        name: &Name,
        new: &Making<'_>,
        ready: Option<&Ready>,
    ) -> FsResult<Done> {
        if let New::File(_) = new.what {
            let ready = ready.expect("a file is made of bytes that were prepared");
            return self.place(dir, name, ready, new.file);
        }
        // Until its id is expected, nobody may see it.
        let made = self.applier.indexer.unobserved(self.no(), &[dir.id], || {
            self.make_plain(dir, name, new)?;
            let seen = observe_at(dir.fd.as_fd(), name)?;
            if let Some(file) = new.file {
                self.applier.index.expect(self.no(), seen.disk_ino, file);
            }
            Ok::<_, FsError>(seen)
        })??;
        Ok(Done::at(dir, name.clone()).expecting(self.no(), made.disk_ino))
    }

    fn make_plain(&self, dir: &Dir, name: &Name, new: &Making<'_>) -> FsResult<()> {
        let made = match new.what {
            New::Directory => rustix::fs::mkdirat(&dir.fd, name.as_bytes(), Mode::RWXU),
            New::Fifo => {
                let fifo = rustix::fs::FileType::Fifo;
                rustix::fs::mknodat(&dir.fd, name.as_bytes(), fifo, Mode::RUSR | Mode::WUSR, 0)
            }
            New::Symlink(target) => rustix::fs::symlinkat(&**target, &dir.fd, name.as_bytes()),
            New::File(_) => unreachable!("made of a body"),
        };
        made.map_err(|e| FsError::os("make an entry", e))?;
        let handle = handle_at(dir.fd.as_fd(), name)?;
        if !matches!(new.what, New::Symlink(_)) {
            // A directory inherits the set-gid bit of its parent.
            let seen = observe_at(dir.fd.as_fd(), name)?;
            let inherited = seen.attr.perm & 0o2000;
            let mode = Mode::from_raw_mode((new.perm & !SET_ID | inherited).into());
            rustix::fs::chmod(path_of(handle.as_fd()), mode)
                .map_err(|e| FsError::os("set permissions", e))?;
        }
        super::body::set_times(handle.as_fd(), None, Some(new.mtime))
            .map_err(|e| FsError::os("set the time", e))
    }

    /// Gives prepared bytes a name that is free.
    pub fn place(
        &self,
        dir: &Dir,
        name: &Name,
        ready: &Ready,
        file: Option<FileId>,
    ) -> FsResult<Done> {
        let rehomed = match self.is_home(dir, ready.body())? {
            true => None,
            false => Some(self.rehome(dir, ready)?),
        };
        self.place_body(dir, name, rehomed.as_ref().unwrap_or(ready.body()), ready, file)
    }

    fn place_body(
        &self,
        dir: &Dir,
        name: &Name,
        body: &Body,
        ready: &Ready,
        file: Option<FileId>,
    ) -> FsResult<Done> {
        if body.home.is_none() {
            return self.place_by_copy(dir, name, ready, file);
        }
        let disk_ino = body.stamp()?.disk_ino;
        if let Some(file) = file {
            self.applier.index.expect(self.no(), disk_ino, file);
        }
        super::fail_point("apply::link");
        match body.link_into(&dir.fd, name.as_bytes()) {
            Ok(()) => {
                super::fail_point("apply::linked");
                let stamp = body.stamp()?;
                Ok(Done::of(dir, name.clone(), stamp, ready).expecting(self.no(), disk_ino))
            }
            Err(e) => {
                self.applier.index.unexpect(self.no(), disk_ino);
                Err(FsError::os("name new bytes", e))
            }
        }
    }

    pub fn is_home(&self, dir: &Dir, body: &Body) -> FsResult<bool> {
        Ok(body.home == Some(home_of(dir.fd.as_fd())?) && !body.is_spent())
    }

    /// A copy in the directory itself: of bytes that were received elsewhere, or before the
    /// directory was made.
    fn rehome(&self, dir: &Dir, ready: &Ready) -> FsResult<Body> {
        let body = Body::new(dir.fd.as_fd(), &self.applier.spare)?;
        if body.home.is_some() {
            ready.copy_to(&body.file)?;
            body.sync()?;
        }
        Ok(body)
    }

    /// For a file system that has no files without names: under a hidden name first.
    fn place_by_copy(
        &self,
        dir: &Dir,
        name: &Name,
        ready: &Ready,
        file: Option<FileId>,
    ) -> FsResult<Done> {
        let hidden = hidden_name();
        let copy = self.hidden_copy(dir, name, ready, &hidden, None)?;
        let disk_ino = crate::local::stamp_of(&copy)?.disk_ino;
        if let Some(file) = file {
            self.applier.index.expect(self.no(), disk_ino, file);
        }
        match rename_new(dir, &hidden, dir, name) {
            Ok(()) => {
                let stamp = crate::local::stamp_of(&copy)?;
                let done = Done::of(dir, name.clone(), stamp, ready);
                Ok(done.expecting(self.no(), disk_ino).revealing(hidden))
            }
            Err(e) => {
                self.applier.index.unexpect(self.no(), disk_ino);
                let _ = rustix::fs::unlinkat(&dir.fd, hidden.as_bytes(), AtFlags::empty());
                Err(FsError::os("name new bytes", e))
            }
        }
    }
}

/// Moves to a name that is free; also where the file system cannot promise that itself.
pub(super) fn rename_new(from: &Dir, name: &Name, to: &Dir, new: &Name) -> rustix::io::Result<()> {
    match super::rename_with((&from.fd, name), (&to.fd, new), RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        renamed => return renamed,
    }
    match handle_at(to.fd.as_fd(), new) {
        Ok(_) => Err(Errno::EXIST),
        Err(_) => rustix::fs::renameat(&from.fd, name.as_bytes(), &to.fd, new.as_bytes()),
    }
}
