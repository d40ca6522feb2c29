//! Open directories.
//!
//! A cookie is a position: 0 the beginning, 1 after `.`, 2 after `..`, `2 + n`
//! after the `n`th entry. What stands at a position differs by kind:
//!
//! - Synthesized and own directories are read whole at position 0 and keep that
//!   list, as POSIX wants of `rewinddir`.
//! - Remote ones may have millions of entries and stream from the index in the
//!   order of names. The handle remembers after which name each call ended, so
//!   a call that goes on from there is right whatever changed meanwhile: an
//!   entry that was there all the time comes exactly once. Memory is bounded by
//!   thinning these names out; a seek to a position between two of them counts
//!   forward from the one before.

use super::inode::RemoteIno;
use super::types::{DirItem, InodeNo};
use crate::error::{FsError, FsResult};
use crate::model::{FileType, LocationNo, Name};
use rustix::fs::RawDir;
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Cookies before the first entry.
const DOTS: u64 = 2;
/// Remembered names of one remote directory handle.
const CHECKPOINTS_MAX: usize = 4096;
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
    pub cursor: Cursor,
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

/// Shows `.` and `..` where the cookie asks for them, and says where the entries go on.
pub(super) fn dots(dir: &OpenDir, cookie: u64, visit: &mut Visit<'_>) -> ControlFlow<(), u64> {
    for (at, name, ino) in [(0, &b"."[..], dir.ino), (1, b"..", dir.parent)] {
        if cookie <= at {
            let file_type = FileType::Directory;
            visit(DirItem { name, ino, file_type, next_cookie: at + 1, found: None })?;
        }
    }
    ControlFlow::Continue(cookie.saturating_sub(DOTS))
}

/// The cookie after the entry at this position, counted from 0.
pub(super) fn cookie_after(position: u64) -> u64 {
    DOTS + position + 1
}

/// The entries of a snapshot from a position on.
pub(super) fn from_position<T>(entries: &[T], position: u64) -> impl Iterator<Item = (u64, &T)> {
    let start = usize::try_from(position).unwrap_or(usize::MAX).min(entries.len());
    entries[start..].iter().zip(start as u64..).map(|(entry, at)| (at, entry))
}

/// After which names calls on a remote directory ended.
#[derive(Debug, Default)]
pub(super) struct Cursor(Mutex<BTreeMap<u64, Name>>);

impl Cursor {
    /// The name to go on after, and how many entries to skip from there to the position.
    pub fn start(&self, position: u64) -> (Option<Name>, u64) {
        let names = lock(&self.0);
        match names.range((Bound::Unbounded, Bound::Included(position))).next_back() {
            Some((at, name)) => (Some(name.clone()), position - at),
            None => (None, position),
        }
    }

    /// A call ended at this position, after this name.
    pub fn ended(&self, position: u64, name: Name) {
        let mut names = lock(&self.0);
        names.insert(position, name);
        if names.len() > CHECKPOINTS_MAX {
            let last = position;
            let mut keep = false;
            names.retain(|at, _| {
                keep = !keep;
                keep || *at == last
            });
        }
    }

    /// A rewind: positions are counted anew.
    pub fn rewind(&self) {
        lock(&self.0).clear();
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: u64) -> Name {
        Name::new(n.to_string().into_bytes()).unwrap()
    }

    #[test]
    fn a_call_goes_on_exactly_where_the_last_one_ended() {
        let cursor = Cursor::default();
        assert_eq!(cursor.start(0), (None, 0));
        cursor.ended(100, name(100));
        assert_eq!(cursor.start(100), (Some(name(100)), 0));
        assert_eq!(cursor.start(40), (None, 40));
        assert_eq!(cursor.start(130), (Some(name(100)), 30));
    }

    #[test]
    fn memory_is_bounded_and_the_last_end_exact() {
        let cursor = Cursor::default();
        for n in 1..=50_000 {
            cursor.ended(n, name(n));
            assert_eq!(cursor.start(n), (Some(name(n)), 0));
        }
        assert!(lock(&cursor.0).len() <= CHECKPOINTS_MAX);
    }
}
