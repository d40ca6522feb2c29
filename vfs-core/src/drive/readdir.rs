//! Open directories.
//!
//! Cookie 0 is the beginning, 1 is after `.`, 2 after `..`; beyond that:
//!
//! - Synthesized and own directories are read whole at cookie 0, and the handle
//!   keeps that list, as POSIX wants of `rewinddir`. Cookie `2 + n` is after its
//!   `n`th entry. What goes meanwhile is left out, and counts all the same. No
//!   kernel keeps such a listing, so a cookie comes back only to its own handle.
//! - Remote ones may have millions of entries and stream from the index in the
//!   order of names. A kernel keeps these listings and goes on from one with any
//!   handle, so their cookies are made of the names: [`super::cookie`].

use super::cookie::Held;
use super::inode::RemoteIno;
use super::types::{DirItem, InodeNo};
use crate::error::{FsError, FsResult};
use crate::model::{FileType, LocationNo, Name};
use rustix::fs::RawDir;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cookies before the first entry.
const DOTS: u64 = 2;
/// Room for the directory entries of one `getdents64`.
const LISTING_BUFFER_BYTES: usize = 128 << 10;

/// What an adapter gives to be shown the items.
pub(super) type Visit<'a> = dyn FnMut(DirItem<'_>) -> ControlFlow<()> + 'a;

/// An open directory and the one above it.
pub(super) struct OpenDir {
    pub ino: InodeNo,
    pub parent: InodeNo,
    pub kind: DirKind,
}

pub(super) enum DirKind {
    Top(Snapshot<TopEntry>),
    Remote(RemoteDir),
    Own(OwnDirHandle),
}

/// An entry of a synthesized directory.
pub(super) struct TopEntry {
    pub name: Name,
    pub ino: InodeNo,
}

/// An entry of an own directory, as `getdents64` gives it.
pub(super) struct OwnEntry {
    pub name: Name,
    pub disk_ino: u64,
    /// `None` where the file system does not tell.
    pub file_type: Option<FileType>,
}

pub(super) struct OwnDirHandle {
    pub location: LocationNo,
    /// `None`: a mount point, which is empty.
    pub fd: Option<OwnedFd>,
    pub entries: Snapshot<OwnEntry>,
}

pub(super) struct RemoteDir {
    pub ino: RemoteIno,
    pub held: Held,
}

/// The entries as they were at the last rewind.
pub(super) struct Snapshot<T>(Mutex<Option<Arc<Vec<T>>>>);

impl<T> Default for Snapshot<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Snapshot<T> {
    /// The entries, read again at a rewind.
    pub fn at(
        &self,
        is_rewind: bool,
        read: impl FnOnce() -> FsResult<Vec<T>>,
    ) -> FsResult<Arc<Vec<T>>> {
        let mut entries = lock(&self.0);
        match &*entries {
            Some(entries) if !is_rewind => Ok(Arc::clone(entries)),
            _ => Ok(Arc::clone(entries.insert(Arc::new(read()?)))),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Held values are replaced whole, so a panic elsewhere leaves them right.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Shows `.` and `..` where the cookie asks for them.
pub(super) fn dots(dir: &OpenDir, cookie: u64, visit: &mut Visit<'_>) -> ControlFlow<()> {
    for (at, name, ino) in [(0, &b"."[..], dir.ino), (1, b"..", dir.parent)] {
        if cookie <= at {
            let file_type = FileType::Directory;
            visit(DirItem { name, ino, file_type, next_cookie: at + 1, found: None })?;
        }
    }
    ControlFlow::Continue(())
}

/// The entries of a snapshot after this cookie, each with its own.
pub(super) fn after<T>(entries: &[T], cookie: u64) -> impl Iterator<Item = (u64, &T)> {
    let start = usize::try_from(cookie.saturating_sub(DOTS)).unwrap_or(usize::MAX);
    let start = start.min(entries.len());
    (DOTS + 1 + start as u64..).zip(&entries[start..])
}

/// Reads a directory of the disk from its beginning.
pub(super) fn read_disk(fd: &OwnedFd) -> FsResult<Vec<OwnEntry>> {
    rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(0))
        .map_err(|e| FsError::os("rewind a directory", e))?;
    let mut buffer = Vec::with_capacity(LISTING_BUFFER_BYTES);
    let mut reading = RawDir::new(fd.as_fd(), buffer.spare_capacity_mut());
    let mut entries = Vec::new();
    while let Some(entry) = reading.next() {
        let entry = entry.map_err(|e| FsError::os("read a directory", e))?;
        // `Name::new` refuses `.` and `..`, which have positions of their own.
        let Some(name) = Name::new(entry.file_name().to_bytes()) else { continue };
        let file_type = type_of(entry.file_type());
        entries.push(OwnEntry { name, disk_ino: entry.ino(), file_type });
    }
    Ok(entries)
}

fn type_of(raw: rustix::fs::FileType) -> Option<FileType> {
    use rustix::fs::FileType as Raw;
    match raw {
        Raw::RegularFile => Some(FileType::File),
        Raw::Directory => Some(FileType::Directory),
        Raw::Symlink => Some(FileType::Symlink),
        Raw::Fifo => Some(FileType::Fifo),
        Raw::Socket => Some(FileType::Socket),
        Raw::CharacterDevice => Some(FileType::CharDevice),
        Raw::BlockDevice => Some(FileType::BlockDevice),
        Raw::Unknown => None,
    }
}
