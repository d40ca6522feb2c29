//! New bytes of a file that is there.
//!
//! Mostly the new version is another inode that swaps places with the old one: whoever reads
//! the old one keeps it, and a crash leaves one or the other. What comes out of the swap is
//! looked at once more; if its owner changed it a moment ago, they swap back. Hard-linked
//! files, and small changes of huge ones, are written in place, from bytes that are durable
//! elsewhere first ([`super::redo`]).

use super::batch::{Done, Ready};
use super::body::{Body, Verified, can_share, kept_ranges};
use super::compare::{Known, is_unwritten};
use super::conflict::{Decision, Meeting, Version, decide};
use super::create::{Making, rename_new};
use super::ledger::{Intent, Step};
use super::names::{conflict_name, hidden_name};
use super::receive::Receiving;
use super::site::{Dir, Fail, Found, Site};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Observed;
use crate::model::{FileId, FileType, Name, Stamp};
use crate::ops::{Conflict, New, NewContent, Obstacle, OpId, Place, Refusal};
use rustix::fs::{AtFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsFd;

/// From this size on, what stays of a file is not copied to change little of it.
const HUGE_BYTES: u64 = 64 << 20;
/// "Little": at most this part of what stays.
const LITTLE_PART: u64 = 8;
/// Of a file that is made again, whose permissions nobody knows any more.
const PERM_AGAIN: u16 = 0o644;

/// A change whose bytes are prepared.
pub(super) struct Writing {
    pub ready: Ready,
    file: FileId,
    base: Option<Known>,
    path: Vec<Name>,
    /// Where it was found; `None`: deleted.
    at: Option<Place>,
    how: How,
    /// The version from which the bytes that stay were taken.
    taken_from: Option<Stamp>,
    hidden: Name,
}

/// How the new bytes replace the old ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum How {
    /// Another inode.
    Swap,
    /// The same inode.
    InPlace,
}

impl Site<'_> {
    /// Gets the bytes ready; `None`: there is nothing to do.
    pub fn prepare_write(
        &self,
        id: OpId,
        file: FileId,
        base: Option<Known>,
        content: &NewContent,
        path: &[Name],
        receiving: Option<Receiving>,
    ) -> Result<Option<Writing>, Fail> {
        let found = self.find_version(file, None, base.as_ref(), path)?;
        let version = match &found {
            None => Version::Gone,
            Some(found) => self.version(found, base.as_ref(), content)?,
        };
        let decision = decide(Meeting::Write { file: version, whole: content.is_whole() });
        let dir = found.as_ref().map(|f| &f.dir);
        let mut taken_from = None;
        let (how, ready) = match (decision, &found) {
            (Decision::Done, _) => return Ok(None),
            (Decision::NeedsWhole, _) => return Err(Fail::Refused(Refusal::NeedsWhole)),
            (Decision::Do, Some(found)) => {
                let base = self.open_file(found)?;
                let base = base.ok_or_else(|| Fail::from(changed()))?;
                let how = self.how(found, &base, content)?;
                let away = how == How::InPlace;
                let ready = self.ready(id, content, dir.filter(|_| !away), receiving)?;
                if how == How::Swap {
                    ready.body().complete(content, Some(&base))?;
                    taken_from = Some(found.seen.stamp()).filter(|_| !content.is_whole());
                    if !is_unwritten(&found.seen, &crate::local::stamp_of(&base)?) {
                        return Err(changed().into());
                    }
                    super::attr::keep_attributes(&base, &ready.body().file, content.mtime)?;
                }
                (how, ready)
            }
            _ => {
                let ready = self.ready(id, content, dir, receiving)?;
                ready.body().complete(content, None)?;
                let perm = found.as_ref().map_or(PERM_AGAIN, |f| f.seen.attr.perm);
                ready.dress(perm, content.mtime)?;
                (How::Swap, ready)
            }
        };
        ready.body().start_writing();
        let at = found.map(|f| Place { dir: f.dir.id, name: f.name });
        let (path, hidden) = (path.to_vec(), hidden_name());
        Ok(Some(Writing { ready, file, base, path, at, how, taken_from, hidden }))
    }

    /// The file by its id; or, where that is gone, what is at its path if it is the very version
    /// that was changed: saved again with the same bytes, or in an index that was made anew.
    fn find_version(
        &self,
        file: FileId,
        near: Option<&Place>,
        base: Option<&Known>,
        path: &[Name],
    ) -> Result<Option<Found>, Fail> {
        if let Some(found) = self.find(file, near)? {
            return Ok(Some(found));
        }
        let Some(base) = base else { return Ok(None) };
        let entry = self.applier.index.view()?.resolve(self.no(), path)?;
        let Some(entry) = entry.filter(|e| e.attr.file_type == FileType::File) else {
            return Ok(None);
        };
        let found = self.find(entry.file_id, None)?;
        Ok(match found {
            Some(found) if self.is_version(&found, base)? => Some(found),
            _ => None,
        })
    }

    fn how(&self, found: &Found, base: &File, content: &NewContent) -> FsResult<How> {
        if found.seen.attr.nlink > 1 || !super::attr::can_keep(&found.dir, base)? {
            return Ok(How::InPlace);
        }
        let stays: u64 = kept_ranges(content).iter().map(|r| r.end - r.start).sum();
        let is_little = content.written_bytes() <= stays / LITTLE_PART;
        let in_place = stays >= HUGE_BYTES && is_little && !can_share(found.dir.fd.as_fd(), base);
        Ok(if in_place { How::InPlace } else { How::Swap })
    }

    /// The bytes of a change, verified: those that travelled with it or were received, or
    /// those of a file of this device that has them. In `dir`, or elsewhere.
    pub fn ready(
        &self,
        id: OpId,
        content: &NewContent,
        dir: Option<&Dir>,
        receiving: Option<Receiving>,
    ) -> Result<Ready, Fail> {
        let receiving = receiving.or_else(|| self.applier.receptions.get(&id, content));
        let usable = |r: &Receiving| r.is_of(content) && !r.body().is_spent();
        if let Some(receiving) = receiving.filter(usable) {
            let verified = receiving.verified();
            let verified = verified.map_err(|_| Fail::Later(Obstacle::NoBytes))?;
            return Ok(Ready::received(receiving, verified));
        }
        let inline = content
            .inline
            .clone()
            .or_else(|| (content.written_bytes() == 0).then(bytes::Bytes::new));
        if let Some(bytes) = inline {
            let body = self.body(dir)?;
            body.write_extents(content, &bytes)?;
            let verified = super::body::verify_inline(content, &bytes);
            if matches!(verified, Verified::Wrong) {
                return Err(Fail::Refused(Refusal::Malformed));
            }
            return Ok(Ready::own(body, verified));
        }
        match self.copy_of(content)? {
            None => Err(Fail::Later(match self.body(dir)?.has_room(content.written_bytes()) {
                true => Obstacle::NoBytes,
                // For which they were not received.
                false => Obstacle::NoSpace,
            })),
            Some(source) => {
                let body = self.body(dir)?;
                if !body.has_room(content.size) {
                    return Err(Fail::Later(Obstacle::NoSpace));
                }
                super::body::copy_data(&source, &body.file, 0..content.size)?;
                body.complete(content, None)?;
                match body.verify(content)? {
                    Verified::Wrong => Err(Fail::Later(Obstacle::NoBytes)),
                    verified => Ok(Ready::own(body, verified)),
                }
            }
        }
    }

    pub fn body(&self, dir: Option<&Dir>) -> FsResult<Body> {
        match dir {
            Some(dir) => match Body::new(dir.fd.as_fd(), &self.applier.spare) {
                // Of a directory in which nothing can be made, files can still be written.
                Err(e) if matches!(e.kind(), Kind::AccessDenied | Kind::NotPermitted) => {
                    Body::spare(&self.applier.spare)
                }
                body => body,
            },
            None => Body::spare(&self.applier.spare),
        }
    }

    /// What is to be noted before the change: what a crash could leave.
    pub fn write_intent(&self, writing: &Writing) -> FsResult<Option<Intent>> {
        let (Some(at), Some(base), How::Swap) = (&writing.at, &writing.base, writing.how) else {
            return Ok(None);
        };
        if writing.ready.body().home.is_none() {
            return Ok(None);
        }
        let new_ino = writing.ready.body().stamp()?.disk_ino;
        let (hidden, file) = (writing.hidden.clone(), writing.file);
        let step = Step::Swap { hidden, file, new_ino, old: base.stamp };
        let path = self.applier.index.view()?.path(self.no(), at.dir)?.unwrap_or_default();
        let target = at.name.clone();
        Ok(Some(Intent { location: self.location.id, dir: at.dir, path, target, step }))
    }

    /// Carries out a change whose bytes are durable.
    pub fn write(&self, id: OpId, writing: &Writing, content: &NewContent) -> Result<Done, Fail> {
        let (near, base) = (writing.at.as_ref(), writing.base.as_ref());
        let found = self.find_version(writing.file, near, base, &writing.path)?;
        let mut version = match &found {
            None => Version::Gone,
            Some(found) => self.version(found, writing.base.as_ref(), content)?,
        };
        loop {
            let meeting = Meeting::Write { file: version, whole: content.is_whole() };
            match (decide(meeting), &found) {
                (Decision::Done, Some(found)) => {
                    let done = Done::at(&found.dir, found.name.clone());
                    return Ok(Done { version: Some(found.seen.stamp()), ..done });
                }
                (Decision::Do, Some(found)) => {
                    let is_taken = |from: Stamp| is_unwritten(&found.seen, &from);
                    if !writing.taken_from.is_none_or(is_taken) {
                        return Err(changed().into());
                    }
                    let done = match writing.how {
                        How::Swap => self.swap(found, writing)?,
                        How::InPlace => {
                            self.write_in_place(id, found, writing.base, &writing.ready, content)?
                        }
                    };
                    match done {
                        Some(done) => return Ok(done),
                        None => version = Version::Changed,
                    }
                }
                (Decision::Beside, Some(found)) => return self.beside(found, writing, content),
                (Decision::Again, None) => return self.again(writing, content),
                (Decision::NeedsWhole, _) => return Err(Fail::Refused(Refusal::NeedsWhole)),
                (other, _) => unreachable!("{other:?} of {version:?}"),
            }
        }
    }

    /// The answer to a change that was found to be there already.
    pub fn is_written(
        &self,
        file: FileId,
        base: Option<Known>,
        content: &NewContent,
    ) -> Result<Done, Fail> {
        let found = self.find(file, None)?;
        let found = found.ok_or_else(|| Fail::from(changed()))?;
        match self.version(&found, base.as_ref(), content)? {
            Version::Equal => {
                let done = Done::at(&found.dir, found.name.clone());
                Ok(Done { version: Some(found.seen.stamp()), ..done })
            }
            _ => Err(changed().into()),
        }
    }

    /// Puts the new inode in the place of the old one; `None`: the owner was quicker.
    fn swap(&self, found: &Found, writing: &Writing) -> Result<Option<Done>, Fail> {
        let (dir, target, hidden) = (&found.dir, &found.name, &writing.hidden);
        let (no, index) = (self.no(), &self.applier.index);
        index.hide(no, hidden.clone());
        let body = writing.ready.body();
        let copy = match self.is_home(dir, body)? {
            true => {
                body.link_into(&dir.fd, hidden.as_bytes())
                    .map_err(|e| FsError::os("name new bytes", e))?;
                None
            }
            false => {
                let old = Some(found.seen.stamp());
                Some(self.hidden_copy(dir, target, &writing.ready, hidden, old)?)
            }
        };
        let new = copy.as_ref().unwrap_or(&body.file);
        let disk_ino = crate::local::stamp_of(new)?.disk_ino;
        let row = self.applier.index.view()?.entry(no, dir.id, target.as_bytes())?;
        index.expect(no, disk_ino, row.map_or(writing.file, |row| row.file_id));
        super::fail_point("apply::exchange");
        let swapped = exchange(dir, hidden, target, &found.seen);
        super::fail_point("apply::exchanged");
        let out = dir.look(hidden)?;
        match (swapped, out) {
            (Ok(Exchanged::Replaced), _) => {}
            (Ok(Exchanged::Swapped), Some(out)) if is_as_found(&out, &found.seen) => {
                self.remove_hidden(dir, hidden)?;
            }
            (Ok(Exchanged::Swapped), Some(out)) => {
                self.swap_back(dir, hidden, target, disk_ino, &out, writing)?;
                index.unexpect(no, disk_ino);
                return Ok(None);
            }
            (Ok(Exchanged::Swapped), None) => {
                tracing::warn!("the old version of a file vanished from its hidden name");
            }
            (Err(e), _) => {
                index.unexpect(no, disk_ino);
                self.remove_hidden(dir, hidden)?;
                return match e {
                    Errno::NOENT => Ok(None),
                    e => Err(FsError::os("replace a file", e).into()),
                };
            }
        }
        super::fail_point("apply::swapped");
        let stamp = crate::local::stamp_of(new)?;
        let done = Done::of(dir, target.clone(), stamp, &writing.ready);
        Ok(Some(done.expecting(no, disk_ino).revealing(hidden.clone())))
    }

    /// The owner changed the file between the last look and the swap: it gets its name back.
    fn swap_back(
        &self,
        dir: &Dir,
        hidden: &Name,
        target: &Name,
        new_ino: u64,
        owners: &Observed,
        writing: &Writing,
    ) -> FsResult<()> {
        tracing::info!("a file was changed by its owner while a change of another device was made");
        let back = exchange(dir, hidden, target, owners);
        let out = dir.look(hidden)?;
        let is_new = |seen: &Observed| seen.disk_ino == new_ino;
        match (back, out) {
            // Unless somebody changed ours in this moment, its bytes are in the body still.
            (Ok(_), Some(out)) if is_new(&out) => {
                let unwritten = writing.ready.body().stamp()?;
                if is_unwritten(&out, &unwritten) {
                    return self.remove_hidden(dir, hidden);
                }
                self.rescue(dir, hidden, target)
            }
            (_, Some(_)) => self.rescue(dir, hidden, target),
            (_, None) => Ok(()),
        }
    }

    /// What has a hidden name and must not be lost gets a name of a conflict copy.
    pub fn rescue(&self, dir: &Dir, hidden: &Name, target: &Name) -> FsResult<()> {
        rescue(dir, hidden, target, &self.writer.name)
    }

    fn remove_hidden(&self, dir: &Dir, hidden: &Name) -> FsResult<()> {
        match rustix::fs::unlinkat(&dir.fd, hidden.as_bytes(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(FsError::os("remove the old version", e)),
        }
    }

    /// The new bytes as a file with a hidden name, for a disk that cannot name one later.
    pub fn hidden_copy(
        &self,
        dir: &Dir,
        target: &Name,
        ready: &Ready,
        hidden: &Name,
        old: Option<Stamp>,
    ) -> FsResult<File> {
        use rustix::fs::{Mode, OFlags};
        self.applier.index.hide(self.no(), hidden.clone());
        let intent = Intent {
            location: self.location.id,
            dir: dir.id,
            path: dir.path.clone(),
            target: target.clone(),
            step: Step::Bytes { hidden: hidden.clone(), old },
        };
        self.applier.note_leftover(intent)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let copy = rustix::fs::openat(&dir.fd, hidden.as_bytes(), flags, Mode::RUSR | Mode::WUSR);
        let copy = File::from(copy.map_err(|e| FsError::os("make a temporary file", e))?);
        let copied = ready
            .copy_to(&copy)
            .and_then(|()| copy.sync_all().map_err(|e| FsError::os("make new bytes durable", e)));
        super::fail_point("apply::hidden-copy");
        if copied.is_err() {
            self.remove_hidden(dir, hidden)?;
        }
        copied.map(|()| copy)
    }

    /// The writer's bytes, beside the owner's.
    fn beside(&self, found: &Found, writing: &Writing, content: &NewContent) -> Result<Done, Fail> {
        let what = New::File(content.clone());
        let perm = found.seen.attr.perm;
        let new = Making { file: None, what: &what, perm, mtime: content.mtime };
        self.put(&found.dir, &found.name, 1, &new, Some(&writing.ready))
    }

    /// The writer's bytes, where its owner deleted them.
    fn again(&self, writing: &Writing, content: &NewContent) -> Result<Done, Fail> {
        let (dir, name) = self.directories_again(&writing.path)?;
        let what = New::File(content.clone());
        let new = Making { file: None, what: &what, perm: PERM_AGAIN, mtime: content.mtime };
        let done = self.put(&dir, &name, 0, &new, Some(&writing.ready))?;
        if done.was_there && done.conflict.is_none() {
            return Ok(done);
        }
        let name = done.looks.first().map_or(&name, |look| &look.name);
        let path = dir.path_of(name);
        Ok(Done { conflict: Some(Conflict::MadeAgain(path)), ..done })
    }

    /// The directory of a path, made as far as it is not there.
    fn directories_again(&self, path: &[Name]) -> Result<(Dir, Name), Fail> {
        let mut dir = self.top()?;
        let (name, above) = path.split_last().ok_or(Fail::Refused(Refusal::Malformed))?;
        for step in above {
            let id = match dir.look(step)? {
                Some(seen) if seen.attr.file_type != FileType::Directory => {
                    // Something else has the name of the directory: it is kept above it.
                    break;
                }
                Some(seen) => self.id_at(&dir, step, &seen)?,
                None => {
                    let what = New::Directory;
                    let perm = 0o755;
                    let mtime = crate::model::Time::now();
                    let new = Making { file: None, what: &what, perm, mtime };
                    let done = self.put(&dir, step, 0, &new, None)?;
                    dir.sync()?;
                    let seen = self.applier.indexer.look_now(self.no(), &done.looks, || ())?;
                    seen.0.into_iter().flatten().next().map(|row| row.file_id)
                }
            };
            let next = id.map(|id| self.dir_now(id)).transpose()?.flatten();
            dir = next.ok_or_else(|| Fail::from(changed()))?;
        }
        Ok((dir, name.clone()))
    }
}

/// What [`exchange`] did.
enum Exchanged {
    /// The two swapped places.
    Swapped,
    /// The file system cannot swap: the old one is gone.
    Replaced,
}

/// Swaps two names of a directory; where the file system cannot, replaces the second if it
/// still is what was seen.
fn exchange(
    dir: &Dir,
    hidden: &Name,
    target: &Name,
    seen: &Observed,
) -> rustix::io::Result<Exchanged> {
    let (from, to) = ((&dir.fd, hidden), (&dir.fd, target));
    match super::rename_with(from, to, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(Exchanged::Swapped),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(e) => return Err(e),
    }
    match dir.look(target) {
        Ok(Some(now)) if is_as_found(&now, seen) => {
            let (from, to) = (hidden.as_bytes(), target.as_bytes());
            rustix::fs::renameat(&dir.fd, from, &dir.fd, to).map(|()| Exchanged::Replaced)
        }
        _ => Err(Errno::NOENT),
    }
}

/// Whether it still is what was seen a moment ago, but for what a rename changes.
fn is_as_found(now: &Observed, seen: &Observed) -> bool {
    is_unwritten(now, &seen.stamp()) && now.attr.nlink == seen.attr.nlink
}

/// Gives what has a hidden name one that people see.
pub(super) fn rescue(dir: &Dir, hidden: &Name, target: &Name, device: &str) -> FsResult<()> {
    let mtime = dir.look(hidden)?.map(|seen| seen.attr.mtime).unwrap_or_default();
    for nth in 1..1000 {
        let name = conflict_name(target, device, mtime, nth);
        match rename_new(dir, hidden, dir, &name) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(e) => return Err(FsError::os("keep a file", e)),
        }
    }
    Err(FsError::new(Kind::Exists, "keep a file"))
}

fn changed() -> FsError {
    FsError::new(Kind::Busy, "the file is just being changed")
}
