//! Changes of attributes and extended attributes.

use super::names::{group, mode, user};
use super::{Own, Seen, path_of};
use crate::drive::handle::OwnFile;
use crate::drive::types::{Found, InodeNo, SetAttr, TimeOrNow, XattrMode};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{FileType, LocationNo, Time};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of Linux.
const XATTR_BYTES_MAX: usize = 64 << 10;

impl Own {
    pub fn setattr(
        &self,
        location: LocationNo,
        ino: InodeNo,
        open: Option<&OwnFile>,
        set: &SetAttr,
    ) -> FsResult<Found> {
        self.writable(location)?;
        let handle = self.handle_or_open(location, ino, open)?;
        let fd = handle.as_fd();
        // This order: a new length changes the times, a new owner drops set-id bits.
        if let Some(size) = set.size {
            truncate(fd, open, size)?;
        }
        if set.uid.is_some() || set.gid.is_some() {
            rustix::fs::chownat(fd, c"", user(set.uid), group(set.gid), AtFlags::EMPTY_PATH)
                .map_err(|e| FsError::os("chown", e))?;
        }
        if let Some(perm) = set.perm {
            chmod(fd, perm)?;
        }
        if set.atime.is_some() || set.mtime.is_some() {
            let times = Timestamps {
                last_access: timespec(set.atime),
                last_modification: timespec(set.mtime),
            };
            rustix::fs::utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)
                .map_err(|e| FsError::os("utimens", e))?;
        }
        Ok(Seen::of_fd(fd)?.found(ino))
    }

    fn handle_or_open(
        &self,
        location: LocationNo,
        ino: InodeNo,
        open: Option<&OwnFile>,
    ) -> FsResult<OwnedFd> {
        match open {
            Some(open) => {
                let again = open.file.try_clone();
                Ok(again.map_err(|e| FsError::os("duplicate a handle", e))?.into())
            }
            None if self.is_mount_point(ino) => {
                Err(FsError::new(Kind::ReadOnly, "change a mount point"))
            }
            None => self.handle(location, ino),
        }
    }

    pub fn getxattr(&self, location: LocationNo, ino: InodeNo, name: &[u8]) -> FsResult<Vec<u8>> {
        if self.is_mount_point(ino) {
            return Err(FsError::new(Kind::NoAttribute, "getxattr"));
        }
        let handle = self.handle(location, ino)?;
        let path = path_of(handle.as_fd());
        grown("getxattr", |buffer| rustix::fs::getxattr(path.as_str(), name, buffer))
    }

    pub fn listxattr(&self, location: LocationNo, ino: InodeNo) -> FsResult<Vec<u8>> {
        if self.is_mount_point(ino) {
            return Ok(Vec::new());
        }
        let handle = self.handle(location, ino)?;
        let path = path_of(handle.as_fd());
        grown("listxattr", |buffer| rustix::fs::listxattr(path.as_str(), buffer))
    }

    pub fn setxattr(
        &self,
        location: LocationNo,
        ino: InodeNo,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> FsResult<()> {
        self.writable(location)?;
        let flags = match mode {
            XattrMode::Any => XattrFlags::empty(),
            XattrMode::Create => XattrFlags::CREATE,
            XattrMode::Replace => XattrFlags::REPLACE,
        };
        let handle = self.handle_or_open(location, ino, None)?;
        rustix::fs::setxattr(path_of(handle.as_fd()), name, value, flags)
            .map_err(|e| FsError::os("setxattr", e))
    }

    pub fn removexattr(&self, location: LocationNo, ino: InodeNo, name: &[u8]) -> FsResult<()> {
        self.writable(location)?;
        let handle = self.handle_or_open(location, ino, None)?;
        rustix::fs::removexattr(path_of(handle.as_fd()), name)
            .map_err(|e| FsError::os("removexattr", e))
    }
}

/// Most values are small; a large one is read again into the largest buffer there can be.
fn grown(
    what: &'static str,
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> FsResult<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    let mut result = read(&mut buffer);
    if result == Err(Errno::RANGE) {
        buffer.resize(XATTR_BYTES_MAX, 0);
        result = read(&mut buffer);
    }
    buffer.truncate(result.map_err(|e| FsError::os(what, e))?);
    Ok(buffer)
}

fn truncate(handle: BorrowedFd<'_>, open: Option<&OwnFile>, size: u64) -> FsResult<()> {
    if let Some(open) = open.filter(|o| o.flags.write) {
        return rustix::fs::ftruncate(&open.file, size).map_err(|e| FsError::os("truncate", e));
    }
    match Seen::of_fd(handle)?.attr.file_type {
        FileType::File => {}
        FileType::Directory => return Err(FsError::new(Kind::IsADirectory, "truncate")),
        // To open a FIFO would wait for its reader.
        _ => return Err(FsError::new(Kind::Invalid, "truncate a special file")),
    }
    let how = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::openat(CWD, path_of(handle), how, Mode::empty())
        .and_then(|file| rustix::fs::ftruncate(file, size))
        .map_err(|e| FsError::os("truncate", e))
}

fn chmod(handle: BorrowedFd<'_>, perm: u16) -> FsResult<()> {
    // Through the handle's path this would change a link's own mode on some file systems.
    if Seen::of_fd(handle)?.attr.file_type == FileType::Symlink {
        return Err(FsError::new(Kind::NotSupported, "chmod a symbolic link"));
    }
    rustix::fs::chmod(path_of(handle), mode(perm)).map_err(|e| FsError::os("chmod", e))
}

fn timespec(set: Option<TimeOrNow>) -> Timespec {
    match set {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(TimeOrNow::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(TimeOrNow::At(Time { secs, nanos })) => {
            Timespec { tv_sec: secs, tv_nsec: nanos.into() }
        }
    }
}
