//! The operations of a file system, for every kind of mount.
//!
//! The tree: the root, in it one directory per member device, in it one
//! directory per location, in it the entries. This device's own locations are
//! live from the disk; other devices' are answered from the replica of their
//! index and never wait for a network, except a read of bytes.

mod types;

pub use types::{
    Caller, Detail, DirItem, FallocateMode, Found, HandleId, InodeNo, Invalidation, Io, OpenFlags,
    Opened, RenameFlags, SetAttr, Statfs, TimeOrNow, Whence, XattrMode,
};

use crate::changes::{Change, Subscription};
use crate::error::FsResult;
use crate::model::FileType;
use bytes::Bytes;
use std::ops::ControlFlow;
use std::time::Duration;

/// The drive.
pub struct Drive {}

#[allow(unused_variables, clippy::unimplemented, missing_docs)]
impl Drive {
    /// What changes from now on, for [`Drive::invalidations`].
    pub fn subscribe(&self) -> Subscription {
        unimplemented!()
    }
    pub fn lookup(&self, parent: InodeNo, name: &[u8]) -> FsResult<Found> {
        unimplemented!()
    }
    /// How long a kernel may remember that a name is not in this directory.
    pub fn negative_valid_for(&self, parent: InodeNo) -> Duration {
        unimplemented!()
    }
    pub fn forget(&self, ino: InodeNo, lookups: u64) {
        unimplemented!()
    }
    pub fn getattr(&self, ino: InodeNo, handle: Option<HandleId>) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn setattr(
        &self,
        caller: &Caller,
        ino: InodeNo,
        handle: Option<HandleId>,
        set: SetAttr,
    ) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn readlink(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        unimplemented!()
    }
    pub fn open(&self, ino: InodeNo, flags: OpenFlags) -> FsResult<Opened> {
        unimplemented!()
    }
    /// `perm` has the caller's umask applied.
    pub fn create(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        perm: u16,
        flags: OpenFlags,
    ) -> FsResult<(Found, Opened)> {
        unimplemented!()
    }
    /// The bytes, when they are at hand without a network: `None` means call [`Drive::read`].
    pub fn try_read(&self, handle: HandleId, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        unimplemented!()
    }
    pub async fn read(&self, handle: HandleId, offset: u64, len: usize) -> FsResult<Bytes> {
        unimplemented!()
    }
    /// Bytes written; fewer than given only when the disk took fewer.
    pub fn write(&self, handle: HandleId, offset: u64, bytes: &[u8]) -> FsResult<usize> {
        unimplemented!()
    }
    pub fn flush(&self, handle: HandleId) -> FsResult<()> {
        unimplemented!()
    }
    pub fn fsync(&self, handle: HandleId, data_only: bool) -> FsResult<()> {
        unimplemented!()
    }
    pub fn release(&self, handle: HandleId) {
        unimplemented!()
    }
    pub fn opendir(&self, ino: InodeNo) -> FsResult<HandleId> {
        unimplemented!()
    }
    pub fn readdir(
        &self,
        handle: HandleId,
        cookie: u64,
        detail: Detail,
        visit: &mut dyn FnMut(DirItem<'_>) -> ControlFlow<()>,
    ) -> FsResult<()> {
        unimplemented!()
    }
    pub fn fsyncdir(&self, handle: HandleId, data_only: bool) -> FsResult<()> {
        unimplemented!()
    }
    pub fn releasedir(&self, handle: HandleId) {
        unimplemented!()
    }
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        file_type: FileType,
        perm: u16,
        rdev: u64,
    ) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn mkdir(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        perm: u16,
    ) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn link(&self, ino: InodeNo, new_parent: InodeNo, new_name: &[u8]) -> FsResult<Found> {
        unimplemented!()
    }
    pub fn unlink(&self, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        unimplemented!()
    }
    pub fn rmdir(&self, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        unimplemented!()
    }
    pub fn rename(
        &self,
        parent: InodeNo,
        name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> FsResult<()> {
        unimplemented!()
    }
    /// The whole value; the adapter compares it with the caller's buffer.
    pub fn getxattr(&self, ino: InodeNo, name: &[u8]) -> FsResult<Vec<u8>> {
        unimplemented!()
    }
    /// Names, each ended by a NUL, as `listxattr` returns them.
    pub fn listxattr(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        unimplemented!()
    }
    pub fn setxattr(
        &self,
        ino: InodeNo,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> FsResult<()> {
        unimplemented!()
    }
    pub fn removexattr(&self, ino: InodeNo, name: &[u8]) -> FsResult<()> {
        unimplemented!()
    }
    pub fn statfs(&self, ino: InodeNo) -> FsResult<Statfs> {
        unimplemented!()
    }
    pub fn fallocate(
        &self,
        handle: HandleId,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> FsResult<()> {
        unimplemented!()
    }
    pub fn seek(&self, handle: HandleId, offset: u64, whence: Whence) -> FsResult<u64> {
        unimplemented!()
    }
    /// Bytes copied; `CrossDevice` tells the caller to read and write instead.
    pub fn copy_range(
        &self,
        from: HandleId,
        from_offset: u64,
        to: HandleId,
        to_offset: u64,
        len: u64,
    ) -> FsResult<u64> {
        unimplemented!()
    }
    /// What a kernel must drop after this change.
    pub fn invalidations(&self, change: &Change) -> Vec<Invalidation> {
        unimplemented!()
    }
}
