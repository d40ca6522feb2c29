//! The operations of a file system, for every kind of mount.
//!
//! The tree: the root, in it one directory per member device, in it one
//! directory per location, in it the entries. Each level has its own module:
//!
//! | module | what it answers |
//! |---|---|
//! | [`top`] | the root and the devices, from the library and the index |
//! | [`own`] | this device's own locations, live from the disk |
//! | [`remote`] | other devices' locations, from the replica of their index |
//! | [`inode`] | which of them a number belongs to |
//! | [`handle`], [`readdir`] | what is open |
//! | [`list`] | listings, of all levels |
//! | [`cookie`] | where the listing of a remote directory goes on |
//! | [`links`] | which symbolic links of peers are shown |
//! | [`xattr`] | extended attributes of remote entries |
//! | [`locks`] | locks that programs set through it |
//! | [`invalidate`] | what a kernel must drop after a change |
//! | [`shown`] | what a kernel that asks now is told |
//! | [`events`] | what programs that watch a directory are told of a change |
//!
//! This module only decides who answers. Nothing waits for a network but
//! [`Drive::read`]; everything else takes a disk's or a memory's time, and may
//! be called on any thread, many at once. What a mount promises to programs is
//! in `docs/SEMANTICS.md`.

mod cookie;
mod events;
mod handle;
mod inode;
mod invalidate;
mod links;
mod list;
mod locks;
mod own;
mod readdir;
mod remote;
mod shown;
mod top;
mod types;
mod xattr;

#[cfg(test)]
mod tests;

pub use events::{Backlog, Event, Pending, Place};
pub use links::ForeignSymlinks;
pub use locks::LockOf;
pub use shown::Shown;
pub use types::{
    Caller, Detail, DirItem, FallocateMode, Found, HandleId, InodeNo, Invalidation, Io,
    KernelCache, OpenFlags, Opened, RenameFlags, SetAttr, Statfs, TimeOrNow, Whence, XattrMode,
};

use crate::changes::{Change, Subscription};
use crate::content::Content;
use crate::error::{FsError, FsResult, Kind};
use crate::hydration::Program;
use crate::index::Index;
use crate::indexer::Indexer;
use crate::library::Library;
use crate::locks::Locks;
use crate::model::{FileId, FileType, LocationNo, NAME_MAX, Name};
use crate::outbox::Outbox;
use bytes::Bytes;
use cookie::Stems;
use handle::{Handle, Handles, OwnFile};
use inode::{Class, OwnTable, RemoteIno};
use invalidate::Translation;
use own::Own;
use remote::{Remote, read_only};
use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;
use top::Top;
use xattr::Attributes;

/// How a drive appears to its user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DriveConfig {
    /// To whom other devices' files belong: the mounting user.
    pub uid: u32,
    /// And this user's group.
    pub gid: u32,
    /// Nothing is changed through it.
    pub read_only: bool,
    /// What becomes of other devices' links that lead out of their location.
    pub foreign_symlinks: ForeignSymlinks,
}

/// A file that has grown.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GrowingFile((LocationNo, FileId));

/// A kernel that is told when other devices' files grow.
pub struct Listener(Arc<Drive>);

impl Listener {
    /// Files that have grown, and that no thread has taken up.
    pub fn growing(&self) -> Vec<GrowingFile> {
        self.0.remote.growing.waiting().into_iter().map(GrowingFile).collect()
    }

    /// Has the kernel know how far a file has grown. It may wait for readers of it, as long as
    /// their reads take, so this is not for a thread that others wait for. Of the inode that is
    /// given, the attributes are to be expired once more when answers that were being made have
    /// reached the kernel.
    ///
    /// # Errors
    /// The index cannot be read; to be called again.
    pub fn grow(&self, file: GrowingFile, kernel: &dyn KernelCache) -> FsResult<Option<InodeNo>> {
        self.0.remote.grow(file.0, kernel)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.remote.growing.unlisten();
    }
}

/// The drive; one serves any number of mounts.
pub struct Drive {
    top: Top,
    own: Own,
    remote: Remote,
    handles: Handles,
    stems: Stems,
    locks: locks::OfHandles,
}

impl Drive {
    /// The drive over this device's index, disks and cache.
    pub fn new(
        index: Index,
        indexer: Arc<Indexer>,
        content: Arc<Content>,
        library: Arc<Library>,
        outbox: Arc<Outbox>,
        locks: Arc<Locks>,
        config: DriveConfig,
    ) -> Arc<Self> {
        let DriveConfig { uid, gid, read_only, foreign_symlinks } = config;
        let own = Own {
            index: index.clone(),
            indexer: Arc::clone(&indexer),
            table: OwnTable::default(),
            read_only,
            gives_away: rustix::process::geteuid().is_root(),
        };
        let remote =
            Remote::new(index.clone(), content, outbox, (uid, gid), (foreign_symlinks, read_only));
        let top = Top { index, indexer, library, uid, gid };
        let locks = locks::OfHandles::new(locks);
        let (handles, stems) = (Handles::default(), Stems::default());
        Arc::new(Self { top, own, remote, handles, stems, locks })
    }

    /// What changes from now on, for [`Drive::invalidations`].
    pub fn subscribe(&self) -> Subscription {
        self.remote.index.feed().subscribe()
    }

    /// What a kernel must drop after this change.
    pub fn invalidations(&self, change: &Change) -> Vec<Invalidation> {
        self.invalidations_of(std::slice::from_ref(change))
    }

    /// What a kernel must drop after the changes of one commit; cheaper than one by one.
    pub fn invalidations_of(&self, changes: &[Change]) -> Vec<Invalidation> {
        Translation::new(&self.top, &self.own, &self.remote).of(changes)
    }

    /// One more kernel keeps what it is told of other devices' files, and is told when they grow,
    /// until what this gives is dropped.
    pub fn listen(self: &Arc<Self>) -> Listener {
        self.remote.growing.listen();
        Listener(Arc::clone(self))
    }

    /// Takes out of what changed the files that have become longer than kernels know, and what may
    /// stand for such: a program that hears of it looks at once.
    pub fn hold_back_growing(&self, changed: &mut Backlog) -> Backlog {
        match self.remote.growing.is_idle() {
            true => Backlog::default(),
            false => changed.split_off(|no, file| self.remote.growing.has((no, file))),
        }
    }

    /// What programs that watch these inodes are told of what has changed meanwhile, in order.
    pub fn events(&self, changed: Backlog, watched: &HashSet<InodeNo>) -> Vec<Event> {
        events::Translation::new(&self.top, &self.own, &self.remote, watched).of(changed)
    }

    /// What a name of a directory refers to. Counts one lookup, to be undone by
    /// [`Drive::forget`].
    ///
    /// `NotFound` may be remembered for [`Drive::negative_valid_for`].
    pub fn lookup(&self, parent: InodeNo, name: &[u8]) -> FsResult<Found> {
        match parent.class() {
            Class::Root => self.found_top(self.top.device_named(name)?),
            Class::Device => self.found_top(self.top.location_named(parent, name)?),
            Class::Own(location) => self.own.lookup(location, parent, &name_of(name)?),
            Class::Remote(parent) => {
                name_of(name)?;
                self.remote.lookup(parent, name)
            }
        }
    }

    /// Devices and locations come and go without an invalidation of each name.
    fn found_top(&self, ino: InodeNo) -> FsResult<Found> {
        Ok(Found { valid_for: top::VALID_FOR, ..self.getattr(ino, None)? })
    }

    /// How long a kernel may remember that a name is not in this directory.
    pub fn negative_valid_for(&self, parent: InodeNo) -> Duration {
        match parent.class() {
            Class::Root | Class::Device => top::VALID_FOR,
            Class::Own(_) => own::VALID_FOR,
            Class::Remote(_) => remote::VALID_FOR,
        }
    }

    /// Listings that a kernel kept in another epoch it must drop when the directory is opened:
    /// its cookies may be forgotten before it goes on from one of them.
    pub fn listing_epoch(&self) -> u64 {
        self.stems.epoch()
    }

    /// A kernel lets go of `lookups` of an inode.
    pub fn forget(&self, ino: InodeNo, lookups: u64) {
        if let Class::Own(_) = ino.class() {
            self.own.table.forget(ino, lookups);
        }
    }

    /// The attributes of a file; with a handle, of what is open, whatever its name is by now.
    pub fn getattr(&self, ino: InodeNo, handle: Option<HandleId>) -> FsResult<Found> {
        let handle = handle.map(|h| self.handles.get(h)).transpose()?;
        match (ino.class(), handle.as_deref()) {
            (Class::Root, _) => Ok(self.top.getattr_root()),
            (Class::Device, _) => self.top.getattr_device(ino),
            (Class::Own(location), Some(Handle::Own(open))) => {
                self.own.getattr(location, ino, Some(open))
            }
            (Class::Own(location), _) => self.own.getattr(location, ino, None),
            (Class::Remote(remote), Some(Handle::Remote(open))) => {
                self.getattr_remote(remote, Some(open))
            }
            (Class::Remote(remote), _) => self.getattr_remote(remote, None),
        }
    }

    fn getattr_remote(&self, ino: RemoteIno, open: Option<&remote::RemoteFile>) -> FsResult<Found> {
        let found = self.remote.getattr(ino, open)?;
        Ok(found.unwrap_or_else(|| self.top.placeholder(ino.no())))
    }

    /// Changes attributes; returns them as they are then.
    pub fn setattr(
        &self,
        _caller: &Caller,
        ino: InodeNo,
        handle: Option<HandleId>,
        set: SetAttr,
    ) -> FsResult<Found> {
        let handle = handle.map(|h| self.handles.get(h)).transpose()?;
        match (changeable(ino)?, handle.as_deref()) {
            (Target::Own(location), Some(Handle::Own(open))) => {
                self.own.setattr(location, ino, Some(open), &set)
            }
            (Target::Own(location), _) => self.own.setattr(location, ino, None, &set),
            (Target::Remote(remote), Some(Handle::Remote(open))) => {
                self.setattr_remote(remote, Some(open), &set)
            }
            (Target::Remote(remote), _) => self.setattr_remote(remote, None, &set),
        }
    }

    fn setattr_remote(
        &self,
        ino: RemoteIno,
        open: Option<&remote::RemoteFile>,
        set: &SetAttr,
    ) -> FsResult<Found> {
        let found = self.remote.setattr(ino, open, set)?;
        Ok(found.unwrap_or_else(|| self.top.placeholder(ino.no())))
    }

    /// The target of a symbolic link. `NotPermitted` for another device's that leads out of its
    /// location, unless [`ForeignSymlinks::AsIs`] is set.
    pub fn readlink(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        match ino.class() {
            Class::Own(location) => self.own.readlink(location, ino),
            Class::Remote(remote) => self.remote.readlink(remote),
            Class::Root | Class::Device => {
                Err(FsError::new(Kind::Invalid, "read the target of a directory"))
            }
        }
    }

    /// Opens a regular file. Never waits; a remote file is pinned at its present version.
    pub fn open(&self, ino: InodeNo, flags: OpenFlags) -> FsResult<Opened> {
        self.open_for(ino, flags, &|| None)
    }

    /// The same for a program that `who` tells, which is asked only if it matters
    /// ([`crate::hydration`]): `AccessDenied` if the file is not to be fetched for it.
    pub fn open_for(
        &self,
        ino: InodeNo,
        flags: OpenFlags,
        who: &dyn Fn() -> Option<Arc<Program>>,
    ) -> FsResult<Opened> {
        match ino.class() {
            Class::Own(location) => Ok(self.opened(self.own.open(location, ino, flags)?)),
            Class::Remote(remote) => {
                let (file, io) = self.remote.open_for(remote, flags, who)?;
                Ok(self.opened_remote(file, io))
            }
            Class::Root | Class::Device => Err(handle::is_a_directory()),
        }
    }

    fn opened(&self, open: OwnFile) -> Opened {
        let io = Io::Backing(Arc::clone(&open.file));
        let is_flushed = open.is_flushed();
        Opened { handle: self.handles.add(Handle::Own(open)), generation: 0, is_flushed, io }
    }

    fn opened_remote(&self, file: remote::RemoteFile, io: Io) -> Opened {
        let generation = file.generation();
        let is_flushed = file.may_change();
        let handle = self.handles.add(Handle::Remote(file));
        Opened { handle, generation, is_flushed, io }
    }

    /// Creates a regular file and opens it; opens it when it is there and `flags` are not
    /// exclusive. `perm` has the caller's umask applied. Counts one lookup.
    pub fn create(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        perm: u16,
        flags: OpenFlags,
    ) -> FsResult<(Found, Opened)> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => {
                let (found, open) =
                    self.own.create(caller, location, parent, &name, perm, flags)?;
                Ok((found, self.opened(open)))
            }
            Target::Remote(parent) => {
                let (found, file, io) = self.remote.create(parent, &name, perm, flags)?;
                Ok((found, self.opened_remote(file, io)))
            }
        }
    }

    /// The bytes, when they are at hand without a network: `None` means call [`Drive::read`].
    /// Fewer than asked for only at the end of the file.
    pub fn try_read(&self, handle: HandleId, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        match self.handles.get(handle).as_deref() {
            Ok(Handle::Own(open)) => Some(read_own(open, offset, len)),
            Ok(Handle::Remote(open)) => open.try_read(&self.remote.outbox, offset, len),
            Ok(Handle::Dir(_)) => Some(Err(handle::is_a_directory())),
            Err(e) => Some(Err(FsError::new(e.kind(), "read"))),
        }
    }

    /// The bytes, fetched from a holder if need be; `HostDown` when none can be reached in time.
    pub async fn read(&self, handle: HandleId, offset: u64, len: usize) -> FsResult<Bytes> {
        match &*self.handles.get(handle)? {
            Handle::Own(open) => read_own(open, offset, len),
            Handle::Remote(open) => open.read(&self.remote.outbox, offset, len).await,
            Handle::Dir(_) => Err(handle::is_a_directory()),
        }
    }

    /// Bytes written; fewer than given only when the disk took fewer. With `append` the offset
    /// is the end of the file, whatever is given. See [`Drive::waits_for_owner`].
    pub fn write(&self, handle: HandleId, offset: u64, bytes: &[u8]) -> FsResult<usize> {
        match &*self.handles.get(handle)? {
            Handle::Own(open) => write_own(open, offset, bytes),
            Handle::Remote(open) => open.write(&self.remote.outbox, offset, bytes),
            Handle::Dir(_) => Err(handle::is_a_directory()),
        }
    }

    /// A program closed one of its descriptors: what it wrote to another device's file is
    /// durable here when this returns. Own files have nothing to flush: what was written is with
    /// the disk's file system, as after a `close` there. But network file systems may say at
    /// that very close that they could not keep it.
    pub fn flush(&self, handle: HandleId) -> FsResult<()> {
        match &*self.handles.get(handle)? {
            Handle::Own(open) if open.is_flushed() => open.flush(),
            Handle::Remote(open) => open.flush(&self.remote.outbox),
            Handle::Own(_) | Handle::Dir(_) => Ok(()),
        }
    }

    /// Whether [`Drive::flush`] and [`Drive::fsync`] of this handle may keep a disk busy for long,
    /// so that a mount should not let one of a few threads wait for it.
    pub fn may_flush_long(&self, handle: HandleId) -> bool {
        match self.handles.get(handle).as_deref() {
            Ok(Handle::Remote(open)) => open.may_flush_long(&self.remote.outbox),
            _ => false,
        }
    }

    /// Makes the file durable. See [`Drive::waits_for_owner`].
    pub fn fsync(&self, handle: HandleId, data_only: bool) -> FsResult<()> {
        match &*self.handles.get(handle)? {
            Handle::Own(open) => sync(&open.file, data_only),
            Handle::Remote(open) => open.fsync(&self.remote.outbox),
            Handle::Dir(_) => Err(handle::is_a_directory()),
        }
    }

    /// Whether a write or `fsync` through this handle is over only when [`Drive::arrived`] is:
    /// it was opened with `O_SYNC` or `O_DSYNC`, and the file is another device's.
    pub fn waits_for_owner(&self, handle: HandleId) -> bool {
        match self.handles.get(handle).as_deref() {
            Ok(Handle::Remote(open)) => open.waits_for_owner(),
            _ => false,
        }
    }

    /// Waits until the owner has what was written through this handle, or says why not. Without
    /// the owner it is durable here only, as it is when the owner does not answer in time, or
    /// when the caller `gives_up`: that is no error.
    pub async fn arrived(&self, handle: HandleId, gives_up: impl Fn() -> bool) -> FsResult<()> {
        match &*self.handles.get(handle)? {
            Handle::Remote(open) => open.arrived(&self.remote.outbox, gives_up).await,
            Handle::Own(_) | Handle::Dir(_) => Ok(()),
        }
    }

    /// The last descriptor was closed.
    pub fn release(&self, handle: HandleId) {
        if let Some(handle) = self.handles.remove(handle)
            && let Handle::Remote(file) = &*handle
        {
            self.remote.release(file);
        }
    }

    /// Makes a regular file, FIFO, socket or device. Counts one lookup.
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        file_type: FileType,
        perm: u16,
        rdev: u64,
    ) -> FsResult<Found> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => {
                self.own.mknod(caller, location, parent, &name, file_type, perm, rdev)
            }
            Target::Remote(parent) => self.remote.mknod(parent, &name, file_type, perm),
        }
    }

    /// Makes a directory. Counts one lookup.
    pub fn mkdir(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        perm: u16,
    ) -> FsResult<Found> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => self.own.mkdir(caller, location, parent, &name, perm),
            Target::Remote(parent) => self.remote.mkdir(parent, &name, perm),
        }
    }

    /// Makes a symbolic link. Counts one lookup.
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: InodeNo,
        name: &[u8],
        target: &[u8],
    ) -> FsResult<Found> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => self.own.symlink(caller, location, parent, &name, target),
            Target::Remote(parent) => self.remote.symlink(parent, &name, target),
        }
    }

    /// Gives a file another name in the same location. Counts one lookup.
    pub fn link(&self, ino: InodeNo, new_parent: InodeNo, new_name: &[u8]) -> FsResult<Found> {
        let name = name_of(new_name)?;
        match same_location(ino, new_parent)? {
            (Target::Own(location), _) => self.own.link(location, ino, new_parent, &name),
            (Target::Remote(file), Target::Remote(dir)) => self.remote.link(file, dir, &name),
            (Target::Remote(_), Target::Own(_)) => Err(other_location()),
        }
    }

    /// Removes a name of anything but a directory.
    pub fn unlink(&self, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => self.own.unlink(location, parent, &name),
            Target::Remote(parent) => self.remote.unlink(parent, &name),
        }
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: InodeNo, name: &[u8]) -> FsResult<()> {
        let name = name_of(name)?;
        match changeable(parent)? {
            Target::Own(location) => self.own.rmdir(location, parent, &name),
            Target::Remote(parent) => self.remote.rmdir(parent, &name),
        }
    }

    /// Renames within a location, atomically; `CrossDevice` between two.
    pub fn rename(
        &self,
        parent: InodeNo,
        name: &[u8],
        new_parent: InodeNo,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> FsResult<()> {
        let (name, new_name) = (name_of(name)?, name_of(new_name)?);
        match same_location(parent, new_parent)? {
            (Target::Own(location), _) => {
                self.own.rename(location, (parent, &name), (new_parent, &new_name), flags)
            }
            (Target::Remote(from), Target::Remote(to)) => {
                self.remote.rename((from, &name), (to, &new_name), flags)
            }
            (Target::Remote(_), Target::Own(_)) => Err(other_location()),
        }
    }

    /// The whole value; the adapter compares it with the caller's buffer.
    pub fn getxattr(&self, ino: InodeNo, name: &[u8]) -> FsResult<Vec<u8>> {
        match ino.class() {
            Class::Own(location) => self.own.getxattr(location, ino, name),
            Class::Remote(remote) => match self.remote.xattr(remote, name) {
                Some(value) => value,
                None => self.attributes(ino)?.get(name),
            },
            Class::Root | Class::Device => self.attributes(ino)?.get(name),
        }
    }

    /// Names, each ended by a NUL, as `listxattr` returns them.
    pub fn listxattr(&self, ino: InodeNo) -> FsResult<Vec<u8>> {
        match ino.class() {
            Class::Own(location) => self.own.listxattr(location, ino),
            Class::Remote(remote) => {
                Ok([self.attributes(ino)?.list(), self.remote.xattrs(remote)].concat())
            }
            Class::Root | Class::Device => Ok(self.attributes(ino)?.list()),
        }
    }

    fn attributes(&self, ino: InodeNo) -> FsResult<Attributes> {
        let Class::Remote(remote) = ino.class() else {
            let device = self.top.name_of_device(ino);
            return Ok(device.map(Attributes::of_device).unwrap_or_default());
        };
        let location = self.remote.location(remote.location)?;
        let entry = self.remote.entry(remote)?;
        let names = self.top.names_of(&location);
        let state = |e: &_| self.remote.state(&location, e);
        Ok(Attributes::of_entry(entry.as_deref(), names, state))
    }

    /// Sets an extended attribute.
    pub fn setxattr(
        &self,
        ino: InodeNo,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> FsResult<()> {
        match changeable(ino)? {
            Target::Own(location) => self.own.setxattr(location, ino, name, value, mode),
            Target::Remote(remote) => self.remote.set_xattr(remote, name, value, mode),
        }
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, ino: InodeNo, name: &[u8]) -> FsResult<()> {
        match changeable(ino)? {
            Target::Own(location) => self.own.removexattr(location, ino, name),
            Target::Remote(remote) => self.remote.remove_xattr(remote, name),
        }
    }

    /// The disk of an own location; of anything else, how much the index knows to be there.
    pub fn statfs(&self, ino: InodeNo) -> FsResult<Statfs> {
        let mut locations = self.remote.index.locations();
        match ino.class() {
            Class::Own(location) => return self.own.statfs(location),
            Class::Remote(remote) => locations.retain(|l| l.no == remote.location),
            Class::Device => locations.retain(|l| InodeNo::of_device(l.owner) == ino),
            Class::Root => {}
        }
        Ok(self.remote.statfs(&locations))
    }

    /// Reserves, frees or zeroes a range of a file.
    pub fn fallocate(
        &self,
        handle: HandleId,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> FsResult<()> {
        use rustix::fs::FallocateFlags as Flags;
        let flags = match mode {
            FallocateMode::Allocate { keep_size: false } => Flags::empty(),
            FallocateMode::Allocate { keep_size: true } => Flags::KEEP_SIZE,
            FallocateMode::PunchHole => Flags::PUNCH_HOLE | Flags::KEEP_SIZE,
            FallocateMode::ZeroRange { keep_size: false } => Flags::ZERO_RANGE,
            FallocateMode::ZeroRange { keep_size: true } => Flags::ZERO_RANGE | Flags::KEEP_SIZE,
        };
        let handle = self.handles.get(handle)?;
        if let Handle::Remote(open) = &*handle {
            return open.fallocate(&self.remote.outbox, offset, len, mode);
        }
        rustix::fs::fallocate(&handle.own()?.file, flags, offset, len)
            .map_err(|e| FsError::os("fallocate", e))
    }

    /// Where the next data or hole begins.
    pub fn seek(&self, handle: HandleId, offset: u64, whence: Whence) -> FsResult<u64> {
        use rustix::fs::SeekFrom;
        match &*self.handles.get(handle)? {
            // The position that this moves is used by nobody: all I/O names its own.
            Handle::Own(open) => match whence {
                Whence::Data => rustix::fs::seek(&open.file, SeekFrom::Data(offset)),
                Whence::Hole => rustix::fs::seek(&open.file, SeekFrom::Hole(offset)),
            }
            .map_err(|e| FsError::os("seek", e)),
            Handle::Remote(open) => open.seek(&self.remote.outbox, offset, whence),
            Handle::Dir(_) => Err(FsError::new(Kind::Invalid, "seek data in a directory")),
        }
    }

    /// Bytes copied, by the disk's file system where it can; `CrossDevice` tells the caller to
    /// read and write instead.
    pub fn copy_range(
        &self,
        from: HandleId,
        mut from_offset: u64,
        to: HandleId,
        mut to_offset: u64,
        len: u64,
    ) -> FsResult<u64> {
        let (from, to) = (self.handles.get(from)?, self.handles.get(to)?);
        let (Handle::Own(from), Handle::Own(to)) = (&*from, &*to) else {
            return Err(FsError::new(Kind::CrossDevice, "copy between devices"));
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(COPY_BYTES_MAX);
        let (from_at, to_at) = (Some(&mut from_offset), Some(&mut to_offset));
        rustix::fs::copy_file_range(&from.file, from_at, &to.file, to_at, len)
            .map(|n| n as u64)
            .map_err(|e| FsError::os("copy", e))
    }
}

/// The most that one call copies, so that it can be interrupted between two.
const COPY_BYTES_MAX: usize = 128 << 20;

/// The name, or why it cannot be one.
fn name_of(bytes: &[u8]) -> FsResult<Name> {
    Name::new(bytes).ok_or_else(|| match bytes.len() {
        n if n > NAME_MAX => FsError::new(Kind::NameTooLong, "use a name"),
        _ => FsError::new(Kind::Invalid, "use a name"),
    })
}

/// Where a change goes.
#[derive(Clone, Copy)]
enum Target {
    /// To this device's disk.
    Own(LocationNo),
    /// To the outbox, for the owner.
    Remote(RemoteIno),
}

/// Where a change of an inode goes; the upper levels cannot be changed.
fn changeable(ino: InodeNo) -> FsResult<Target> {
    match ino.class() {
        Class::Own(location) => Ok(Target::Own(location)),
        Class::Remote(remote) => Ok(Target::Remote(remote)),
        Class::Root | Class::Device => Err(read_only()),
    }
}

fn other_location() -> FsError {
    FsError::new(Kind::CrossDevice, "move between locations")
}

/// The places of two inodes of one location, between which names move.
fn same_location(a: InodeNo, b: InodeNo) -> FsResult<(Target, Target)> {
    let places = (changeable(a)?, changeable(b)?);
    match places {
        (Target::Own(a), Target::Own(b)) if a == b => Ok(places),
        (Target::Remote(a), Target::Remote(b)) if a.location == b.location => Ok(places),
        _ => Err(other_location()),
    }
}

fn read_own(open: &OwnFile, offset: u64, len: usize) -> FsResult<Bytes> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = offset.saturating_add(bytes.len() as u64);
        let spare = rustix::buffer::spare_capacity(&mut bytes);
        match rustix::io::pread(&open.file, spare, at) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(FsError::os("read", e)),
        }
    }
    bytes.truncate(len);
    Ok(bytes.into())
}

fn write_own(open: &OwnFile, offset: u64, bytes: &[u8]) -> FsResult<usize> {
    use rustix::io::ReadWriteFlags as Flags;
    let mut flags = Flags::empty();
    flags.set(Flags::APPEND, open.flags.append);
    flags.set(Flags::DSYNC, open.flags.data_sync || open.flags.sync);
    flags.set(Flags::SYNC, open.flags.sync);
    let mut done = 0;
    while done < bytes.len() {
        let rest = [std::io::IoSlice::new(&bytes[done..])];
        let at = offset.saturating_add(done as u64);
        match rustix::io::pwritev2(&open.file, &rest, at, flags) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            // What was written counts; the next write meets the error again.
            Err(_) if done > 0 => break,
            Err(e) => return Err(FsError::os("write", e)),
        }
    }
    Ok(done)
}

fn sync(fd: impl AsFd, data_only: bool) -> FsResult<()> {
    let synced = match data_only {
        true => rustix::fs::fdatasync(fd),
        false => rustix::fs::fsync(fd),
    };
    synced.map_err(|e| FsError::os("fsync", e))
}
