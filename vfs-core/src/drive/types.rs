//! What an adapter says to the drive and what it hears back, in no kernel's numbers.

use crate::model::{Attr, FileType, Name, Time};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

/// The number by which a mount names a file; see [`super::inode`] for how it is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InodeNo(pub u64);

impl InodeNo {
    /// The directory of all devices; the number that FUSE expects of a root.
    pub const ROOT: Self = Self(1);
}

/// An open file or directory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HandleId(pub u64);

/// A file as `lookup` or `getattr` gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// Its number.
    pub ino: InodeNo,
    /// Together with the number unique for ever: tells a reused number from its predecessor.
    pub generation: u64,
    /// What `stat` shows, ids already mapped.
    pub attr: Attr,
    /// Last access; of other devices' files, the last change of the bytes.
    pub atime: Time,
    /// How long a kernel may keep the name and the attributes without asking again.
    pub valid_for: Duration,
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id, 0 when unknown.
    pub pid: u32,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Every write goes to the end (`O_APPEND`).
    pub append: bool,
    /// Its bytes are dropped (`O_TRUNC`).
    pub truncate: bool,
    /// With `create`: it must not exist (`O_EXCL`).
    pub exclusive: bool,
    /// The caller wants no cache (`O_DIRECT`); the drive's own I/O stays buffered.
    pub direct: bool,
    /// Every write is durable with its attributes when it returns (`O_SYNC`).
    pub sync: bool,
    /// Every write is durable when it returns (`O_DSYNC`).
    pub data_sync: bool,
}

impl OpenFlags {
    /// For reading only.
    pub const READ: Self = Self {
        read: true,
        write: false,
        append: false,
        truncate: false,
        exclusive: false,
        direct: false,
        sync: false,
        data_sync: false,
    };

    /// Whether an open with these flags may change the file.
    pub fn may_change(self) -> bool {
        self.write || self.truncate || self.append
    }
}

/// How an open file's bytes are reached.
#[derive(Clone, Debug)]
pub enum Io {
    /// The whole file is on this disk, and right: a mount may hand it to its kernel.
    /// It was opened without `O_APPEND`, `O_SYNC` and `O_DIRECT`: a kernel shares one backing
    /// file between handles and adds these itself. Calls on the handle work as well.
    Backing(Arc<File>),
    /// By [`super::Drive::try_read`], [`super::Drive::read`] and [`super::Drive::write`].
    Calls {
        /// Pages that a kernel has of this inode are still right.
        keep_cache: bool,
    },
}

/// An open file.
#[derive(Clone, Debug)]
pub struct Opened {
    /// To be given back with `release`.
    pub handle: HandleId,
    /// As [`Found::generation`]: which of the files that ever had its number.
    pub generation: u64,
    /// Each `close` is to be told by [`super::Drive::flush`], which may fail: also where a kernel
    /// writes the backing file itself.
    pub is_flushed: bool,
    /// How its bytes are reached.
    pub io: Io,
}

/// How much `readdir` tells about each entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detail {
    /// Names, numbers and types: no lookup is counted.
    Names,
    /// Attributes as well. For every item whose `found` is set and for which the visitor
    /// answered `Continue`, one lookup is counted, to be undone by `forget`.
    Attributes,
}

/// One entry of an open directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirItem<'a> {
    /// Its name, or `.` or `..`.
    pub name: &'a [u8],
    /// Its number.
    pub ino: InodeNo,
    /// Its type.
    pub file_type: FileType,
    /// Where the next call goes on after this item.
    pub next_cookie: u64,
    /// With [`Detail::Attributes`], for all but `.` and `..`.
    pub found: Option<Found>,
}

/// What `setattr` changes; `None` stays as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetAttr {
    /// Permission, set-id and sticky bits.
    pub perm: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<TimeOrNow>,
    /// Last change.
    pub mtime: Option<TimeOrNow>,
}

/// A time to set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TimeOrNow {
    /// The disk's clock when it is set; needs only the right to write.
    Now,
    /// This one; needs ownership.
    At(Time),
}

/// `renameat2` flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RenameFlags {
    /// Fails with `EEXIST` rather than replace.
    pub no_replace: bool,
    /// Swaps the two.
    pub exchange: bool,
}

/// What `seek` looks for; positions need no help from the drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whence {
    /// The next bytes that are stored (`SEEK_DATA`).
    Data,
    /// The next hole, or the end (`SEEK_HOLE`).
    Hole,
}

/// What `fallocate` does with a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FallocateMode {
    /// Reserves space.
    Allocate {
        /// The file's length stays, also when the range ends beyond it.
        keep_size: bool,
    },
    /// Gives the space back; the range reads as zeros.
    PunchHole,
    /// The range reads as zeros.
    ZeroRange {
        /// The file's length stays, also when the range ends beyond it.
        keep_size: bool,
    },
}

/// Whether `setxattr` may create or replace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XattrMode {
    /// Either.
    Any,
    /// `EEXIST` when it is there (`XATTR_CREATE`).
    Create,
    /// `ENODATA` when it is not (`XATTR_REPLACE`).
    Replace,
}

/// `statvfs` of a location, a device or the library.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Statfs {
    /// Bytes of one block.
    pub block_bytes: u32,
    /// All blocks.
    pub blocks: u64,
    /// Free ones.
    pub blocks_free: u64,
    /// Free ones for an ordinary user.
    pub blocks_available: u64,
    /// All files.
    pub files: u64,
    /// Files that can still be made.
    pub files_free: u64,
    /// The longest name, in bytes.
    pub name_max: u32,
}

/// What a kernel keeps of files, as far as [`Listener::grow`](super::Listener::grow) changes it.
pub trait KernelCache {
    /// Drops the pages of a file from this byte on; may wait for those that are being read.
    fn drop_pages_from(&self, ino: InodeNo, from: u64);
    /// Waits for calls that had found a page before it was dropped: they look at the size of the
    /// file last.
    fn wait_for_readers(&self);
    /// Has the attributes of a file asked for again.
    fn expire_attributes(&self, ino: InodeNo);
}

/// What a kernel's caches must drop. Never sent from within a request on the same file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// What `name` refers to in this directory, also when that was nothing.
    Entry {
        /// The directory.
        parent: InodeNo,
        /// The name.
        name: Name,
    },
    /// The listing and the attributes of a directory.
    Directory(InodeNo),
    /// The attributes of a file; its bytes are the same.
    Attributes(InodeNo),
    /// The attributes and the pages of a file.
    Content(InodeNo),
    /// Files have become longer: [`Listener::grow`](super::Listener::grow) is to be called, by a thread
    /// that may wait.
    Growth,
    /// Everything: too much changed to name it.
    Everything,
}
