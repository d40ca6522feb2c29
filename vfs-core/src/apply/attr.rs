//! Attributes: those that a change sets, and those that a new version keeps.

use super::batch::Done;
use super::body::{path_of, set_times};
use super::compare::Meant;
use super::conflict::{Decision, Meeting, There, decide};
use super::create::SET_ID;
use super::site::{Dir, Fail, Found, Site};
use crate::error::{FsError, FsResult, Kind};
use crate::local::{attr_of, handle_at, ino_of, stat_of};
use crate::model::{FileId, FileType, Stamp, Time};
use rustix::fs::{AtFlags, Gid, Uid, XattrFlags};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The names of a file's attributes, and the longest value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_BYTES: usize = 64 << 10;

/// What a change sets; `None` stays.
pub(super) struct Set {
    pub perm: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

impl Site<'_> {
    /// They are set whatever version there is; it is named if it is the one that was meant.
    pub fn set_attr(&self, file: FileId, set: &Set, meant: &Meant) -> Result<Done, Fail> {
        self.with_file(file, meant, |found, handle| {
            let path = path_of(handle);
            let is_link = found.seen.attr.file_type == FileType::Symlink;
            if set.uid.is_some() || set.gid.is_some() {
                let (uid, gid) = (set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw));
                rustix::fs::chownat(handle, c"", uid, gid, AtFlags::EMPTY_PATH)
                    .map_err(|e| FsError::os("set the owner", e))?;
            }
            if let Some(perm) = set.perm.filter(|_| !is_link) {
                // A directory's set-id bits are harmless, and mean who gets new entries.
                let is_dir = found.seen.attr.file_type == FileType::Directory;
                let perm = if is_dir { perm } else { perm & !SET_ID };
                rustix::fs::chmod(&path, super::mode(perm))
                    .map_err(|e| FsError::os("set permissions", e))?;
            }
            if set.atime.is_some() || set.mtime.is_some() {
                set_times(handle, set.atime, set.mtime).map_err(|e| FsError::os("set times", e))?;
            }
            Ok(())
        })
    }

    pub fn set_xattr(&self, file: FileId, name: &[u8], value: Option<&[u8]>) -> Result<Done, Fail> {
        self.with_file(file, &Meant::Any, |_, handle| {
            let path = path_of(handle);
            let set = match value {
                Some(value) => rustix::fs::setxattr(&path, name, value, XattrFlags::empty()),
                None => match rustix::fs::removexattr(&path, name) {
                    Err(Errno::NODATA) => Ok(()),
                    removed => removed,
                },
            };
            match set {
                // What the file system has no room for in an inode says so with `ENOSPC`, too.
                Err(Errno::TOOBIG | Errno::RANGE) => {
                    Err(FsError::new(Kind::NotSupported, "set so long an extended attribute"))
                }
                set => set.map_err(|e| FsError::os("set an extended attribute", e)),
            }
        })
    }

    fn with_file(
        &self,
        file: FileId,
        meant: &Meant,
        change: impl FnOnce(&Found, BorrowedFd<'_>) -> FsResult<()>,
    ) -> Result<Done, Fail> {
        let opened = match self.find(file, None)? {
            Some(found) => self.handle(&found)?.map(|handle| (found, handle)),
            None => None,
        };
        let there = if opened.is_some() { There::Yes } else { There::No };
        match (decide(Meeting::Attributes { file: there }), opened) {
            (Decision::Do, Some((found, handle))) => {
                let before = found.seen.stamp();
                let is_known =
                    matches!(meant, Meant::Version(_)) && self.is_meant(&found, meant)?;
                change(&found, handle.as_fd())?;
                let after = attr_of(&stat_of(handle.as_fd())?);
                let after = Stamp { mtime: after.mtime, ctime: after.ctime, ..before };
                self.applier.touched.note(self.no(), before, after);
                // Attributes of the file are durable with it, not with its directory.
                self.sync_file(&found)?;
                let Found { dir, name, .. } = found;
                Ok(Done { version: is_known.then_some(after), ..Done::at(&dir, name) })
            }
            (Decision::Stands(why), _) => Ok(Done::stands(file, why)),
            (other, _) => unreachable!("{other:?} of attributes"),
        }
    }

    fn handle(&self, found: &Found) -> FsResult<Option<OwnedFd>> {
        let handle = match handle_at(found.dir.fd.as_fd(), &found.name) {
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            opened => opened?,
        };
        let is_same = ino_of(&stat_of(handle.as_fd())?) == found.seen.disk_ino;
        Ok(is_same.then_some(handle))
    }

    fn sync_file(&self, found: &Found) -> FsResult<()> {
        let path = found.dir.path_of(&found.name);
        match found.seen.attr.file_type {
            FileType::File => match self.root.open_for_reading(&path) {
                Ok(file) => file.sync_all().map_err(|e| FsError::os("make a file durable", e)),
                // It may not be read by its owner: the directory's commit takes it along.
                Err(_) => found.dir.sync(),
            },
            FileType::Directory => match self.root.open_dir(&path) {
                Ok(dir) => rustix::fs::fsync(dir).map_err(|e| FsError::os("make durable", e)),
                Err(_) => found.dir.sync(),
            },
            _ => found.dir.sync(),
        }
    }
}

/// Gives the new version what the old one has: permissions, owner, extended attributes. The
/// time of the change is the writer's.
pub(super) fn keep_attributes(old: &File, new: &File, mtime: Time) -> FsResult<()> {
    copy_attributes(old, new)?;
    set_times(new.as_fd(), None, Some(mtime)).map_err(|e| FsError::os("set the time", e))
}

/// All attributes of a file, its times included.
pub(super) fn copy_attributes(from: &File, to: &File) -> FsResult<()> {
    let (old, new) = (attr_of(&stat_of(from.as_fd())?), attr_of(&stat_of(to.as_fd())?));
    if (old.uid, old.gid) != (new.uid, new.gid) {
        let (uid, gid) = (Uid::from_raw(old.uid), Gid::from_raw(old.gid));
        rustix::fs::fchown(to, Some(uid), Some(gid))
            .map_err(|e| FsError::os("keep the owner", e))?;
    }
    for name in xattrs(from)? {
        copy_xattr(from, to, &name)?;
    }
    // After the owner, whose change takes bits away. Set-id bits go, as after any write.
    rustix::fs::fchmod(to, super::mode(old.perm & !SET_ID))
        .map_err(|e| FsError::os("keep permissions", e))?;
    set_times(to.as_fd(), None, Some(old.mtime)).map_err(|e| FsError::os("keep the time", e))
}

/// Whether a new inode in this directory can have all that the old one has.
pub(super) fn can_keep(dir: &Dir, old: &File) -> FsResult<bool> {
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    if rustix::fs::accessat(&dir.fd, c".", access, AtFlags::EACCESS).is_err() {
        return Ok(false);
    }
    let me = rustix::process::geteuid();
    if me.is_root() {
        return Ok(true);
    }
    let attr = attr_of(&stat_of(old.as_fd())?);
    let gid = rustix::process::getegid().as_raw();
    let groups = rustix::process::getgroups().unwrap_or_default();
    let in_group = attr.gid == gid || groups.iter().any(|g| g.as_raw() == attr.gid);
    Ok(attr.uid == me.as_raw() && in_group)
}

fn xattrs(file: &File) -> FsResult<Vec<Vec<u8>>> {
    let mut list = vec![0; XATTR_BYTES];
    let len = match rustix::fs::flistxattr(file, &mut list[..]) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(e) => return Err(FsError::os("list extended attributes", e)),
    };
    list.truncate(len);
    let names = list.split(|b| *b == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

fn copy_xattr(from: &File, to: &File, name: &[u8]) -> FsResult<()> {
    // Of bytes that are not there any more; the kernel, too, takes them away at a write.
    if [&b"security.capability"[..], b"security.ima", b"security.evm"].contains(&name) {
        return Ok(());
    }
    let mut value = vec![0; XATTR_BYTES];
    let len = match rustix::fs::fgetxattr(from, name, &mut value[..]) {
        Ok(len) => len,
        Err(Errno::NODATA) => return Ok(()),
        Err(e) => return Err(FsError::os("read an extended attribute", e)),
    };
    match rustix::fs::fsetxattr(to, name, &value[..len], XattrFlags::empty()) {
        Ok(()) => Ok(()),
        // Labels that the system gives by itself, and that not everybody may set.
        Err(_) if !name.starts_with(b"user.") && !name.starts_with(b"system.posix_acl") => Ok(()),
        Err(e) => Err(FsError::os("keep an extended attribute", e)),
    }
}
