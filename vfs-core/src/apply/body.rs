//! The bytes of one new version, before anyone can see them.
//!
//! A [`Body`] is a file without a name (`O_TMPFILE`) in the directory where it is to appear,
//! so that a crash leaves nothing, and nothing travels between disks at the end. Where the
//! file system has no such files it is in the folder of the daemon's data, and copied later.
//! The extents of the change lie in it at their places in the file.

use crate::content::Manifest;
use crate::error::{FsError, FsResult, Kind};
use crate::local::{mount_of, stamp_of, stat_of};
use crate::model::{ContentId, Stamp, Time};
use crate::ops::NewContent;
use rustix::fs::{
    Advice, AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// What is read and hashed, or copied by hand, at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Ranges are shared between files by whole blocks, where the file system can.
const BLOCK_BYTES: u64 = 4096;

/// Of the owner's disk long new bytes leave this to others: so much, or this part of a small disk.
const RESERVED_BYTES: u64 = 64 << 20;
const RESERVED_PART: u64 = 64;

/// A directory by its mount and its inode number: a disk that was mounted anew has the same
/// directories, and a file of the former mount gets no name in them.
pub(super) type Home = (u64, u64);

/// A file without a name.
#[derive(Debug)]
pub(super) struct Body {
    pub file: File,
    /// The directory in which it can get a name; `None`: nowhere.
    pub home: Option<Home>,
    /// It has or had a name: the kernel gives it no other, and its bytes are its owner's. Or
    /// its bytes could not be made durable: the kernel may have dropped them.
    spent: AtomicBool,
    /// Bytes of a base were put into it.
    completed: AtomicBool,
}

impl Body {
    /// In this directory if its file system can, else in `spare`.
    pub fn new(dir: BorrowedFd<'_>, spare: &Path) -> FsResult<Self> {
        match unnamed_in(dir) {
            Ok(file) => Ok(Self::unnamed(file, Some(home_of(dir)?))),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {
                Ok(Self::unnamed(unnamed_spare(spare)?, None))
            }
            Err(e) => Err(FsError::os("make a file without a name", e)),
        }
    }

    /// Away from the directory: it may not be written to, or is not there yet.
    pub fn spare(spare: &Path) -> FsResult<Self> {
        Ok(Self::unnamed(unnamed_spare(spare)?, None))
    }

    fn unnamed(file: File, home: Option<Home>) -> Self {
        Self { file, home, spent: AtomicBool::new(false), completed: AtomicBool::new(false) }
    }

    /// Gives it a name, unless that is taken.
    pub fn link_into(&self, dir: &OwnedFd, name: &[u8]) -> rustix::io::Result<()> {
        let path = path_of(self.file.as_fd());
        rustix::fs::linkat(rustix::fs::CWD, path, dir, name, AtFlags::SYMLINK_FOLLOW)?;
        self.spent.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> FsResult<()> {
        self.file.write_all_at(bytes, at).map_err(|e| FsError::os("write new bytes", e))
    }

    /// Drops all bytes, and what they take of the disk.
    pub fn clear(&self) -> FsResult<()> {
        self.file.set_len(0).map_err(|e| FsError::os("drop new bytes", e))
    }

    /// Whether the disk has room for so many more bytes, and leaves some to its owner's programs.
    pub fn has_room(&self, bytes: u64) -> bool {
        let Ok(disk) = rustix::fs::fstatvfs(&self.file) else { return true };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let reserve = disk.f_blocks.saturating_mul(disk.f_frsize) / RESERVED_PART;
        bytes <= free.saturating_sub(reserve.min(RESERVED_BYTES))
    }

    /// Asks the kernel to begin writing to the disk; the `fsync` later finds most of it done.
    pub fn start_writing(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
    }

    pub fn sync(&self) -> FsResult<()> {
        self.file.sync_all().map_err(|e| {
            self.spent.store(true, Ordering::Relaxed);
            FsError::os("make new bytes durable", e)
        })
    }

    /// Puts the bytes of the extents, one after the other, at their places.
    pub fn write_extents(&self, content: &NewContent, mut bytes: &[u8]) -> FsResult<()> {
        for extent in &content.extents {
            let len = usize::try_from(extent.end - extent.start).unwrap_or(usize::MAX);
            let Some((now, rest)) = bytes.split_at_checked(len) else {
                return Err(FsError::new(Kind::Invalid, "fewer bytes than the extents have"));
            };
            self.write(extent.start, now)?;
            bytes = rest;
        }
        Ok(())
    }

    /// What lies between the extents and stays of the base; then the size.
    pub fn complete(&self, content: &NewContent, base: Option<&File>) -> FsResult<()> {
        if let Some(base) = base {
            let again = self.completed.swap(true, Ordering::Relaxed);
            for gap in kept_ranges(content) {
                if again {
                    // What an attempt before took from another version: holes are not copied.
                    self.punch(&gap)?;
                }
                copy_data(base, &self.file, gap)?;
            }
        }
        self.file.set_len(content.size).map_err(|e| FsError::os("set the size", e))
    }

    fn punch(&self, range: &Range<u64>) -> FsResult<()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, how, range.start, range.end - range.start)
            .map_err(|e| FsError::os("drop bytes of an older version", e))
    }

    /// Whether the extents have the bytes that the writer says; with the content id where
    /// they are the whole file.
    pub fn verify(&self, content: &NewContent) -> FsResult<Verified> {
        if is_one_piece(content) {
            let hashed = Manifest::of_file(&self.file, content.size, &AtomicBool::new(false));
            let hashed = hashed.map_err(|e| FsError::os("hash new bytes", e))?;
            return Ok(match hashed {
                Some((id, manifest)) if id.0 == content.digest => {
                    Verified::Whole(id, Box::new(manifest))
                }
                _ => Verified::Wrong,
            });
        }
        match digest_of(&self.file, content)? == content.digest {
            true => Ok(Verified::Parts),
            false => Ok(Verified::Wrong),
        }
    }

    /// Whether it is of no use for new bytes any more.
    pub fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }

    pub fn stamp(&self) -> FsResult<Stamp> {
        stamp_of(&self.file)
    }
}

pub(super) fn home_of(dir: BorrowedFd<'_>) -> FsResult<Home> {
    Ok((mount_of(dir)?, stat_of(dir)?.stx_ino))
}

/// What came of [`Body::verify`].
#[derive(Debug)]
pub(super) enum Verified {
    /// The bytes are all of the file and have this id and hash tree.
    Whole(ContentId, Box<Manifest>),
    /// The bytes are right.
    Parts,
    /// They are not what the writer says.
    Wrong,
}

/// Whether the extents' digest is the content's id: no bytes of a base, no holes.
pub(super) fn is_one_piece(content: &NewContent) -> bool {
    match content.extents.as_slice() {
        [] => content.size == 0,
        [all] => *all == (0..content.size),
        _ => false,
    }
}

/// Whether bytes that travelled with the operation are what the writer says.
pub(super) fn verify_inline(content: &NewContent, bytes: &[u8]) -> Verified {
    if *blake3::hash(bytes).as_bytes() != content.digest {
        return Verified::Wrong;
    }
    match is_one_piece(content) {
        true => {
            let (id, manifest) = Manifest::of_bytes(bytes);
            Verified::Whole(id, Box::new(manifest))
        }
        false => Verified::Parts,
    }
}

/// BLAKE3 of the extents' bytes in this file.
pub(super) fn digest_of(file: &File, content: &NewContent) -> FsResult<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    for extent in &content.extents {
        let mut at = extent.start;
        while at < extent.end {
            let len = (extent.end - at).min(CHUNK_BYTES as u64) as usize;
            file.read_exact_at(&mut buffer[..len], at)
                .map_err(|e| FsError::os("read bytes back", e))?;
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
    }
    Ok(*hasher.finalize().as_bytes())
}

/// The ranges of the base that stay.
pub(super) fn kept_ranges(content: &NewContent) -> Vec<Range<u64>> {
    let mut kept = Vec::new();
    let mut at = 0;
    for extent in &content.extents {
        if extent.start >= content.kept_bytes {
            break;
        }
        if at < extent.start {
            kept.push(at..extent.start);
        }
        at = extent.end;
    }
    if at < content.kept_bytes {
        kept.push(at..content.kept_bytes);
    }
    kept
}

fn unnamed_in(dir: BorrowedFd<'_>) -> rustix::io::Result<File> {
    if super::lacks("O_TMPFILE") {
        return Err(Errno::OPNOTSUPP);
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(dir, c".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// A named file whose name goes at once: for a disk without files that have none.
fn unnamed_spare(spare: &Path) -> FsResult<File> {
    let dir = File::open(spare).map_err(|e| FsError::os("open the daemon's folder", e))?;
    if let Ok(file) = unnamed_in(dir.as_fd()) {
        return Ok(file);
    }
    let name = super::names::hidden_name();
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&dir, name.as_bytes(), flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| FsError::os("make a temporary file", e))?;
    rustix::fs::unlinkat(&dir, name.as_bytes(), AtFlags::empty())
        .map_err(|e| FsError::os("make a temporary file", e))?;
    Ok(file.into())
}

/// A path that means an open file, for calls that take no file.
pub(super) fn path_of(file: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Copies what a range has of data, to the same place; holes stay holes.
pub(super) fn copy_data(from: &File, to: &File, range: Range<u64>) -> FsResult<()> {
    let mut at = range.start;
    while at < range.end {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) => data.min(range.end),
            Err(Errno::NXIO) => return Ok(()),
            Err(Errno::INVAL) => return copy(from, to, at..range.end),
            Err(e) => return Err(FsError::os("look for data", e)),
        };
        let end = match rustix::fs::seek(from, SeekFrom::Hole(data)) {
            Ok(hole) => hole.min(range.end),
            Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(FsError::os("look for a hole", e)),
        };
        copy(from, to, data..end)?;
        at = end;
    }
    Ok(())
}

/// Copies a range, holes of the source as zeros.
pub(super) fn copy_all(from: &File, to: &File, range: Range<u64>) -> FsResult<()> {
    copy(from, to, range)
}

/// In pieces of whole blocks where it can be, which some file systems share and do not copy.
fn copy(from: &File, to: &File, range: Range<u64>) -> FsResult<()> {
    let first = range.start.next_multiple_of(BLOCK_BYTES).min(range.end);
    let last = (range.end - range.end % BLOCK_BYTES).max(first);
    for part in [range.start..first, first..last, last..range.end] {
        copy_in_kernel(from, to, part)?;
    }
    Ok(())
}

fn copy_in_kernel(from: &File, to: &File, range: Range<u64>) -> FsResult<()> {
    let mut at = range.start;
    while at < range.end {
        let (mut read, mut written) = (at, at);
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), len) {
            Ok(0) => return copy_by_hand(from, to, at..range.end),
            Ok(copied) => at += copied as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                return copy_by_hand(from, to, at..range.end);
            }
            Err(e) => return Err(FsError::os("copy bytes", e)),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, range: Range<u64>) -> FsResult<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(CHUNK_BYTES as u64) as usize;
        let read = from.read_at(&mut buffer[..len], at);
        let read = read.map_err(|e| FsError::os("read bytes to copy", e))?;
        if read == 0 {
            return Err(FsError::new(Kind::Stale, "copy bytes of a file that became shorter"));
        }
        to.write_all_at(&buffer[..read], at).map_err(|e| FsError::os("copy bytes", e))?;
        at += read as u64;
    }
    Ok(())
}

/// Whether files of this file system can share bytes: a probe that leaves nothing.
pub(super) fn can_share(dir: BorrowedFd<'_>, base: &File) -> bool {
    unnamed_in(dir).is_ok_and(|probe| rustix::fs::ioctl_ficlone(&probe, base).is_ok())
}

/// Makes sure that there is room for these ranges, so that writing them cannot fail half-way.
pub(super) fn reserve(file: &File, extents: &[Range<u64>]) -> FsResult<()> {
    for extent in extents {
        let len = extent.end - extent.start;
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, extent.start, len) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
            Err(e) => return Err(FsError::os("reserve space", e)),
        }
    }
    Ok(())
}

/// Sets the times of an open file; `None` stays.
pub(super) fn set_times(
    file: BorrowedFd<'_>,
    atime: Option<Time>,
    mtime: Option<Time>,
) -> rustix::io::Result<()> {
    let spec = |t: Option<Time>| match t {
        Some(t) => Timespec { tv_sec: t.secs, tv_nsec: t.nanos.into() },
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
    rustix::fs::utimensat(rustix::fs::CWD, path_of(file), &times, AtFlags::empty())
}
