//! The kernel's requests as calls of the drive: translate, call once, reply.
//!
//! No request waits for a network here. The only operations of the drive that
//! may are `read`, which is first tried at once ([`Drive::try_read`]), locks, and
//! what is written with `O_SYNC` ([`Drive::arrived`]); they go on as tasks of the runtime, which reply themselves, so that the few
//! threads that serve the kernel stay free for everything else.
//!
//! **Interruption.** `fuser` 0.18 does not pass `INTERRUPT` on, so a request
//! that has reached the daemon is over only when it is answered. Programs that
//! wait for bytes can be killed nonetheless, because remote files are read
//! through the page cache (`FOPEN_DIRECT_IO` is for handles that only write): the program then does not
//! wait for the request but, killably, for the page that the request fills.
//! A program that opened a file with `O_DIRECT` itself waits for the drive's
//! own deadline. Who waits for a lock, or for an owner to have what was written
//! with `O_SYNC`, is looked after by [`signals`].
//! Everything else is answered without waiting.
//!
//! **Panics.** A bug that panics in one request is traced and answered with
//! `EIO`; the thread goes on with the next one. A panic in a read's task is
//! caught by the runtime, and its reply answers `EIO` when it is dropped.

use crate::convert;
use crate::io_mode::{IoMode, IoModes};
use crate::linger::Linger;
use crate::listings::Listings;
use crate::locking;
use crate::negotiate::Negotiated;
use crate::programs::Programs;
use crate::signals;
use crate::stage::{Act, Look, Stage};
use fuser::{
    AccessFlags, BackingId, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem,
    FopenFlags, Generation, INodeNo, KernelConfig, LockOwner, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;
use vfs_core::drive::{
    Caller, Detail, DirItem, Drive, Found, HandleId, InodeNo, Io, OpenFlags, Opened, SetAttr,
};
use vfs_core::error::{FsError, FsResult, Kind};
use vfs_core::locks::Holder;

/// A directory whose missing names may be remembered at least this long has its changes
/// announced, so its listing may be remembered too. This device's own directories change
/// behind the drive's back and are listed anew each time.
const LISTING_CACHED_FROM: Duration = Duration::from_secs(60);

/// What `fuser` calls.
pub(crate) struct Adapter {
    drive: Arc<Drive>,
    runtime: Handle,
    negotiated: Arc<Negotiated>,
    modes: IoModes<BackingId>,
    listings: Arc<Listings>,
    stage: Arc<Stage>,
    linger: Linger<Arc<OwnedFd>>,
    programs: Programs,
}

/// What the helper opens, only to close it.
const NO_HANDLE: FileHandle = FileHandle(u64::MAX);

/// The call's result as the kernel wants it; a panic is `EIO`.
fn run<T>(operation: &'static str, call: impl FnOnce() -> FsResult<T>) -> Result<T, Errno> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| convert::errno(operation, &error)),
        Err(_) => {
            tracing::error!(operation, "a request panicked");
            Err(Errno::EIO)
        }
    }
}

fn ino(ino: INodeNo) -> InodeNo {
    InodeNo(ino.0)
}

fn handle(handle: FileHandle) -> HandleId {
    HandleId(handle.0)
}

fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

fn invalid(attempted: &'static str) -> FsError {
    FsError::new(Kind::Invalid, attempted)
}

impl Adapter {
    pub(crate) fn new(
        drive: Arc<Drive>,
        runtime: Handle,
        negotiated: Arc<Negotiated>,
        listings: Arc<Listings>,
        stage: Arc<Stage>,
        linger: Linger<Arc<OwnedFd>>,
    ) -> Self {
        let (modes, programs) = Default::default();
        Self { drive, runtime, negotiated, modes, listings, stage, linger, programs }
    }

    /// The helper makes a name that is there.
    fn play_make(&self, dir: INodeNo, name: &OsStr) -> Result<Found, Errno> {
        let (dir, name) = (ino(dir), name.as_bytes());
        self.stage.play(|act| matches!(act, Act::Make(at) if (at.0, &at.1[..]) == (dir, name)))?;
        run("lookup", || self.drive.lookup(dir, name))
    }

    /// The helper removes a name that is gone.
    fn play_remove(&self, dir: INodeNo, name: &OsStr) -> Result<(), Errno> {
        let (dir, name) = (ino(dir), name.as_bytes());
        self.stage.play(|act| matches!(act, Act::Remove(at, _) if (at.0, &at.1[..]) == (dir, name)))
    }

    /// The helper moves what has moved.
    fn play_move(&self, from: (INodeNo, &OsStr), to: (INodeNo, &OsStr)) -> Result<(), Errno> {
        let spot = |(dir, name): (INodeNo, &OsStr)| (ino(dir), name.as_bytes().to_owned());
        let (from, to) = (spot(from), spot(to));
        self.stage.play(|act| matches!(act, Act::Move(a, b, _) if (a, b) == (&from, &to)))
    }

    fn reply_entry(&self, reply: ReplyEntry, found: Result<Found, Errno>) {
        match found {
            Ok(found) => {
                let valid = self.negotiated.valid_for(found.valid_for);
                reply.entry(&valid, &convert::attr(&found), Generation(found.generation));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn reply_attr(&self, reply: ReplyAttr, found: Result<Found, Errno>) {
        match found {
            Ok(found) => {
                let valid = self.negotiated.valid_for(found.valid_for);
                reply.attr(&valid, &convert::attr(&found));
            }
            Err(errno) => reply.error(errno),
        }
    }

    /// The mode of one more handle; `register` asks the kernel for a backing id.
    fn io_mode(
        &self,
        ino: InodeNo,
        opened: &Opened,
        register: impl FnOnce(&std::fs::File) -> io::Result<BackingId>,
    ) -> IoMode<BackingId> {
        self.modes.open(ino.0, opened.generation, opened.handle, || match &opened.io {
            Io::Backing(file) if self.negotiated.may_pass_through() => {
                register(file).inspect_err(|error| self.negotiated.refused_passthrough(error)).ok()
            }
            _ => None,
        })
    }

    /// What is written through the handle that made a file, and only writes, is a request for each
    /// `write` either way: past the page cache without a copy, and without one more request for
    /// the attribute that would hold a new file's capabilities. With `O_SYNC` it is the page
    /// cache's way that ends with an FSYNC.
    fn past_the_page_cache(&self, flags: OpenFlags) -> FopenFlags {
        let only_writes = flags.write && !flags.read && !flags.sync && !flags.data_sync;
        match only_writes && self.negotiated.drops_written_pages() {
            true => FopenFlags::FOPEN_DIRECT_IO,
            false => FopenFlags::empty(),
        }
    }

    /// With `HANDLE_KILLPRIV_V2` set-id bits are the daemon's to take off a file that changes.
    /// The daemon's own write has that effect, unless it is privileged: then they go here, when
    /// a caller who is not root opens the file for writing or sets its size. Taking them off at
    /// the open, not at the first write, covers the writes that the kernel passes through.
    fn strip_set_id_bits(&self, caller: &Caller, ino: InodeNo) -> FsResult<()> {
        const SET_UID: u16 = 0o4000;
        const SET_GID: u16 = 0o2000;
        const GROUP_EXECUTE: u16 = 0o0010;
        if caller.uid == 0 || !self.negotiated.strips_set_id_bits() {
            return Ok(());
        }
        let perm = self.drive.getattr(ino, None)?.attr.perm;
        // Set-gid without group-execute means mandatory locking, no privilege.
        let gone = match perm & (SET_GID | GROUP_EXECUTE) {
            both if both == SET_GID | GROUP_EXECUTE => SET_UID | SET_GID,
            _ => SET_UID,
        };
        if perm & gone != 0 {
            let set = SetAttr { perm: Some(perm & !gone), ..SetAttr::default() };
            self.drive.setattr(caller, ino, None, set)?;
        }
        Ok(())
    }

    /// Lets a disk work long elsewhere than on the few threads that serve the kernel.
    fn aside(
        &self,
        handle: HandleId,
        reply: ReplyEmpty,
        call: impl FnOnce(&Drive) -> Result<(), Errno> + Send + 'static,
    ) {
        if !self.drive.may_flush_long(handle) {
            return reply_empty(reply, call(&self.drive));
        }
        let drive = Arc::clone(&self.drive);
        self.runtime.spawn_blocking(move || reply_empty(reply, call(&drive)));
    }

    /// Until the owner has what the program has written, or the program is to end.
    fn arrived(
        &self,
        handle: HandleId,
        request: &Request,
    ) -> impl Future<Output = Result<(), Errno>> + Send + use<> {
        let (drive, thread) = (Arc::clone(&self.drive), request.pid());
        async move {
            let arrived = drive.arrived(handle, || signals::ends(thread)).await;
            arrived.map_err(|error| convert::errno("write", &error))
        }
    }

    /// The kernel does not get this handle.
    fn give_back(&self, ino: InodeNo, opened: &Opened) {
        self.stage.closes(ino, opened.handle);
        self.modes.close(ino.0, opened.handle);
        self.drive.release(opened.handle);
    }

    fn listing_flags(&self, dir: InodeNo, opened: HandleId) -> FopenFlags {
        if self.drive.negative_valid_for(dir) < LISTING_CACHED_FROM {
            return FopenFlags::empty();
        }
        match self.listings.open(dir.0, opened.0, self.drive.listing_epoch()) {
            true => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::FOPEN_CACHE_DIR,
        }
    }

    fn open_file(&self, caller: &Caller, ino: InodeNo, flags: OpenFlags) -> FsResult<Opened> {
        let opened = self.drive.open_for(ino, flags, &|| self.programs.of(caller.pid))?;
        if flags.may_change()
            && let Err(error) = self.strip_set_id_bits(caller, ino)
        {
            self.drive.release(opened.handle);
            return Err(error);
        }
        Ok(opened)
    }
}

/// Whether what is written goes into staging. Such a handle must never follow another into
/// passthrough, where the kernel would write into the cache's file: the kernel looks the name
/// up again, and finds another inode ([`Drive::open`] sees to it).
fn is_staged(opened: &Opened, flags: OpenFlags) -> bool {
    flags.may_change() && matches!(opened.io, Io::Calls { .. })
}

/// FLUSH, a request at each `close`, is for those who have something to report then, or record
/// locks to give back: readers are spared it, and give theirs back with the open file.
fn cached_flags(opened: &Opened, flags: OpenFlags) -> FopenFlags {
    let mut fopen = FopenFlags::empty();
    fopen.set(FopenFlags::FOPEN_KEEP_CACHE, matches!(opened.io, Io::Calls { keep_cache: true }));
    fopen.set(FopenFlags::FOPEN_NOFLUSH, !flags.may_change());
    fopen
}

/// Never with `FOPEN_KEEP_CACHE`, which the kernel answers with `EIO`. What the kernel wrote by
/// itself has nothing to report at `close`, unless the disk's file system may have; but FLUSH is
/// all that tells of the end of a process's record locks, which the kernel does not note where
/// the daemon keeps them. Who reads and writes, as databases do, may have set such; those that
/// only write, as most that make files, are spared the round trip.
fn passthrough_flags(opened: &Opened, flags: OpenFlags) -> FopenFlags {
    match opened.is_flushed || (flags.read && flags.write) {
        true => FopenFlags::empty(),
        false => FopenFlags::FOPEN_NOFLUSH,
    }
}

fn reply_empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn reply_xattr(reply: ReplyXattr, buffer_bytes: u32, value: Result<Vec<u8>, Errno>) {
    match value {
        Err(errno) => reply.error(errno),
        Ok(value) if buffer_bytes == 0 => match u32::try_from(value.len()) {
            Ok(size) => reply.size(size),
            Err(_) => reply.error(Errno::E2BIG),
        },
        Ok(value) if value.len() > buffer_bytes as usize => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.negotiated.init(config)
    }

    fn lookup(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _serving = self.linger.serve();
        let (mut parent, mut name) = (ino(parent), name.as_bytes().to_owned());
        let longest = match self.stage.look(request, parent, &name) {
            Look::Plain => Duration::MAX,
            Look::Briefly => Duration::ZERO,
            Look::As(other) => {
                (parent, name) = other;
                Duration::ZERO
            }
            Look::Absent => return reply.error(Errno::ENOENT),
            Look::Ghost(ghost) => return self.reply_entry(reply, Ok(ghost)),
        };
        let found = run("lookup", || match self.drive.lookup(parent, &name) {
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            result => result.map(|f| Some(Found { valid_for: f.valid_for.min(longest), ..f })),
        });
        match found.transpose() {
            Some(found) => self.reply_entry(reply, found),
            None => {
                let valid = self.drive.negative_valid_for(parent).min(longest);
                let valid = self.negotiated.valid_for(valid);
                reply.entry(&valid, &convert::negative(), Generation(0));
            }
        }
    }

    fn forget(&self, _: &Request, node: INodeNo, lookups: u64) {
        let _ = run("forget", || {
            self.drive.forget(ino(node), lookups);
            Ok(())
        });
    }

    fn getattr(&self, _: &Request, node: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let _serving = self.linger.serve();
        let found = run("getattr", || self.drive.getattr(ino(node), fh.map(handle)));
        self.reply_attr(reply, found);
    }

    fn setattr(
        &self,
        request: &Request,
        node: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<fuser::TimeOrNow>,
        mtime: Option<fuser::TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _serving = self.linger.serve();
        let set = SetAttr {
            perm: mode.map(convert::perm),
            uid,
            gid,
            size,
            atime: atime.map(convert::time_or_now),
            mtime: mtime.map(convert::time_or_now),
        };
        if self.stage.is_helper(request) {
            let found = self.stage.touch();
            let found = found.and_then(|()| run("getattr", || self.drive.getattr(ino(node), None)));
            return self.reply_attr(reply, found);
        }
        self.stage.did_to(ino(node));
        let caller = caller(request);
        let found = run("setattr", || {
            if set.size.is_some() && set.perm.is_none() {
                self.strip_set_id_bits(&caller, ino(node))?;
            }
            self.drive.setattr(&caller, ino(node), fh.map(handle), set)
        });
        self.reply_attr(reply, found);
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        let _serving = self.linger.serve();
        match run("readlink", || self.drive.readlink(ino(node))) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return self.reply_entry(reply, self.play_make(parent, name));
        }
        self.stage.did(ino(parent), name.as_bytes());
        let caller = caller(request);
        let found = run("mknod", || {
            let file_type = convert::type_of_mode(mode).ok_or_else(|| invalid("mknod"))?;
            let (perm, rdev) = (convert::perm(mode), convert::stat_rdev(rdev));
            self.drive.mknod(&caller, ino(parent), name.as_bytes(), file_type, perm, rdev)
        });
        self.reply_entry(reply, found);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return self.reply_entry(reply, self.play_make(parent, name));
        }
        self.stage.did(ino(parent), name.as_bytes());
        let caller = caller(request);
        let found = run("mkdir", || {
            self.drive.mkdir(&caller, ino(parent), name.as_bytes(), convert::perm(mode))
        });
        self.reply_entry(reply, found);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply_empty(reply, self.play_remove(parent, name));
        }
        self.stage.did(ino(parent), name.as_bytes());
        reply_empty(reply, run("unlink", || self.drive.unlink(ino(parent), name.as_bytes())));
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply_empty(reply, self.play_remove(parent, name));
        }
        self.stage.did(ino(parent), name.as_bytes());
        reply_empty(reply, run("rmdir", || self.drive.rmdir(ino(parent), name.as_bytes())));
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return self.reply_entry(reply, self.play_make(parent, name));
        }
        self.stage.did(ino(parent), name.as_bytes());
        let target = target.as_os_str().as_bytes();
        let found = run("symlink", || {
            self.drive.symlink(&caller(request), ino(parent), name.as_bytes(), target)
        });
        self.reply_entry(reply, found);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            let played = self.play_move((parent, name), (new_parent, new_name));
            return reply_empty(reply, played);
        }
        self.stage.did(ino(parent), name.as_bytes());
        self.stage.did(ino(new_parent), new_name.as_bytes());
        let result = run("rename", || {
            let flags = convert::rename_flags(flags).ok_or_else(|| invalid("rename"))?;
            let (name, new_name) = (name.as_bytes(), new_name.as_bytes());
            self.drive.rename(ino(parent), name, ino(new_parent), new_name, flags)
        });
        reply_empty(reply, result);
    }

    fn link(
        &self,
        request: &Request,
        node: INodeNo,
        new_parent: INodeNo,
        new_name: &OsStr,
        reply: ReplyEntry,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply.error(Errno::EPERM);
        }
        self.stage.did(ino(new_parent), new_name.as_bytes());
        let found =
            run("link", || self.drive.link(ino(node), ino(new_parent), new_name.as_bytes()));
        self.reply_entry(reply, found);
    }

    fn open(&self, request: &Request, node: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let _serving = self.linger.serve();
        let flags = convert::open_flags(flags.0);
        let node = ino(node);
        if self.stage.is_helper(request) {
            return match self.stage.touch() {
                // What the kernel has of the file stays: others may be reading it, and the helper
                // would wait for them, as it would for what they have written at its close.
                Ok(()) => reply.opened(
                    NO_HANDLE,
                    FopenFlags::FOPEN_DIRECT_IO
                        | FopenFlags::FOPEN_KEEP_CACHE
                        | FopenFlags::FOPEN_NOFLUSH,
                ),
                Err(errno) => reply.error(errno),
            };
        }
        if flags.may_change() {
            self.stage.did_to(node);
        }
        let opened = match run("open", || self.open_file(&caller(request), node, flags)) {
            Ok(opened) => opened,
            Err(errno) => return reply.error(errno),
        };
        if flags.may_change() {
            self.stage.begins_to_write(node, opened.handle);
        }
        let fh = FileHandle(opened.handle.0);
        match self.io_mode(node, &opened, |file| reply.open_backing(file)) {
            IoMode::Passthrough(_) if is_staged(&opened, flags) => {
                self.give_back(node, &opened);
                reply.error(Errno::ESTALE);
            }
            IoMode::Passthrough(id) => {
                reply.opened_passthrough(fh, passthrough_flags(&opened, flags), &id)
            }
            IoMode::Cached => reply.opened(fh, cached_flags(&opened, flags)),
        }
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply.error(Errno::EPERM);
        }
        self.stage.did(ino(parent), name.as_bytes());
        let flags = convert::open_flags(flags);
        let created = run("create", || {
            let (caller, perm) = (caller(request), convert::perm(mode));
            self.drive.create(&caller, ino(parent), name.as_bytes(), perm, flags)
        });
        let (found, opened) = match created {
            Ok(created) => created,
            Err(errno) => return reply.error(errno),
        };
        if flags.may_change() {
            self.stage.begins_to_write(found.ino, opened.handle);
        }
        let valid = self.negotiated.valid_for(found.valid_for);
        let attr = convert::attr(&found);
        let generation = Generation(found.generation);
        let fh = FileHandle(opened.handle.0);
        match self.io_mode(found.ino, &opened, |file| reply.open_backing(file)) {
            IoMode::Passthrough(_) if is_staged(&opened, flags) => {
                self.give_back(found.ino, &opened);
                reply.error(Errno::ESTALE);
            }
            IoMode::Passthrough(id) => {
                let flags = passthrough_flags(&opened, flags);
                reply.created_passthrough(&valid, &attr, generation, fh, flags, &id);
            }
            IoMode::Cached => {
                let flags = cached_flags(&opened, flags) | self.past_the_page_cache(flags);
                reply.created(&valid, &attr, generation, fh, flags);
            }
        }
    }

    fn read(
        &self,
        _: &Request,
        _node: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _serving = self.linger.serve();
        let (fh, len) = (handle(fh), size as usize);
        match run("read", || self.drive.try_read(fh, offset, len).transpose()) {
            Ok(Some(bytes)) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
            Ok(None) => {
                let drive = Arc::clone(&self.drive);
                self.runtime.spawn(async move {
                    match drive.read(fh, offset, len).await {
                        Ok(bytes) => reply.data(&bytes),
                        Err(error) => reply.error(convert::errno("read", &error)),
                    }
                });
            }
        }
    }

    fn write(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _serving = self.linger.serve();
        let fh = handle(fh);
        self.stage.did_to(ino(node));
        let written = run("write", || {
            if write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID) {
                self.strip_set_id_bits(&caller(request), ino(node))?;
            }
            self.drive.write(fh, offset, data)
        });
        // No longer than `data`, which is at most MAX_WRITE_BYTES.
        let answer = |reply: ReplyWrite, written| match written {
            Ok(written) => reply.written(written as u32),
            Err(errno) => reply.error(errno),
        };
        match written {
            Ok(written) if self.drive.waits_for_owner(fh) => {
                let arrived = self.arrived(fh, request);
                self.runtime.spawn(async move { answer(reply, arrived.await.map(|()| written)) });
            }
            written => answer(reply, written),
        }
    }

    /// Also the end of a process's record locks, whatever the bytes come to.
    fn flush(&self, _: &Request, _: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty) {
        let _serving = self.linger.serve();
        if fh == NO_HANDLE {
            return reply.ok();
        }
        let fh = handle(fh);
        if !self.drive.may_be_locked(fh) {
            return self.aside(fh, reply, move |drive| run("flush", || drive.flush(fh)));
        }
        let drive = Arc::clone(&self.drive);
        self.runtime.spawn(async move {
            // First the bytes: who is given the lock next may look for them.
            let flushing = Arc::clone(&drive);
            let flushing = tokio::task::spawn_blocking(move || run("flush", || flushing.flush(fh)));
            let flushed = flushing.await.unwrap_or(Err(Errno::EIO));
            drive.unlock_closed(fh, Holder(owner.0)).await;
            reply_empty(reply, flushed);
        });
    }

    fn getlk(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let asked = run("getlk", || {
            let mode = locking::mode(typ)?.ok_or_else(|| invalid("look for no lock"))?;
            let range = (start, end);
            Ok((locking::lock_of(handle(fh), owner, range, None, pid)?, mode))
        });
        let (lock, mode) = match asked {
            Ok(asked) => asked,
            Err(errno) => return reply.error(errno),
        };
        let drive = Arc::clone(&self.drive);
        self.runtime.spawn(async move {
            match drive.test_lock(lock, mode).await {
                Ok(Some(held)) => {
                    let typ = locking::l_type(Some(held.mode));
                    reply.locked(held.span.first(), held.span.last(), typ, held.pid);
                }
                Ok(None) => reply.locked(start, end, locking::l_type(None), 0),
                Err(error) => reply.error(convert::errno("getlk", &error)),
            }
        });
    }

    fn setlk(
        &self,
        request: &Request,
        _: INodeNo,
        fh: FileHandle,
        owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let lock = run("setlk", || {
            let mode = locking::mode(typ)?;
            locking::lock_of(handle(fh), owner, (start, end), mode, pid)
        });
        let lock = match lock {
            Ok(lock) => lock,
            Err(errno) => return reply.error(errno),
        };
        let (drive, thread) = (Arc::clone(&self.drive), request.pid());
        self.runtime.spawn(async move {
            let locked = match sleep {
                true => drive.lock_waiting(lock, || signals::is_signalled(thread)).await,
                false => drive.lock(lock).await,
            };
            reply_empty(reply, locked.map_err(|error| convert::errno("setlk", &error)));
        });
    }

    fn release(
        &self,
        _: &Request,
        node: INodeNo,
        fh: FileHandle,
        flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let _serving = self.linger.serve();
        if fh == NO_HANDLE {
            return reply.ok();
        }
        let fh = handle(fh);
        if convert::open_flags(flags.0).may_change() {
            self.stage.did_to(ino(node));
        }
        self.stage.closes(ino(node), fh);
        self.modes.close(node.0, fh);
        let released = run("release", || {
            self.drive.release(fh);
            Ok(())
        });
        if !self.drive.has_locked(fh) {
            return reply_empty(reply, released);
        }
        let drive = Arc::clone(&self.drive);
        self.runtime.spawn(async move {
            drive.unlock_released(fh).await;
            reply_empty(reply, released);
        });
    }

    fn fsync(
        &self,
        request: &Request,
        _: INodeNo,
        fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        let fh = handle(fh);
        if !self.drive.waits_for_owner(fh) {
            return self.aside(fh, reply, move |drive| run("fsync", || drive.fsync(fh, data_only)));
        }
        let drive = Arc::clone(&self.drive);
        let arrived = self.arrived(fh, request);
        self.runtime.spawn(async move {
            let syncing = move || run("fsync", || drive.fsync(fh, data_only));
            let synced = tokio::task::spawn_blocking(syncing).await.unwrap_or(Err(Errno::EIO));
            reply_empty(
                reply,
                match synced {
                    Ok(()) => arrived.await,
                    Err(errno) => Err(errno),
                },
            );
        });
    }

    fn opendir(&self, _: &Request, node: INodeNo, _: fuser::OpenFlags, reply: ReplyOpen) {
        let _serving = self.linger.serve();
        match run("opendir", || self.drive.opendir(ino(node))) {
            Ok(opened) => {
                reply.opened(FileHandle(opened.0), self.listing_flags(ino(node), opened));
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _node: INodeNo,
        fh: FileHandle,
        cookie: u64,
        mut reply: ReplyDirectory,
    ) {
        let _serving = self.linger.serve();
        let mut add = |item: DirItem<'_>| {
            let (name, kind) = (OsStr::from_bytes(item.name), convert::file_type(item.file_type));
            stop_if(reply.add(INodeNo(item.ino.0), item.next_cookie, kind, name))
        };
        let listed =
            run("readdir", || self.drive.readdir(handle(fh), cookie, Detail::Names, &mut add));
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        _node: INodeNo,
        fh: FileHandle,
        cookie: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _serving = self.linger.serve();
        let mut add = |item: DirItem<'_>| {
            let (valid, attr, generation) = match item.found {
                Some(found) => (
                    self.negotiated.valid_for(found.valid_for),
                    convert::attr(&found),
                    Generation(found.generation),
                ),
                // `.` and `..`, of which the kernel takes only number and type.
                None => (Duration::ZERO, convert::bare(item.ino, item.file_type), Generation(0)),
            };
            let name = OsStr::from_bytes(item.name);
            let ino = INodeNo(item.ino.0);
            stop_if(reply.add(ino, item.next_cookie, name, &valid, &attr, generation))
        };
        let listed = run("readdirplus", || {
            self.drive.readdir(handle(fh), cookie, Detail::Attributes, &mut add)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn releasedir(
        &self,
        _: &Request,
        node: INodeNo,
        fh: FileHandle,
        _: fuser::OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _serving = self.linger.serve();
        self.listings.close(node.0, fh.0);
        let released = run("releasedir", || {
            self.drive.releasedir(handle(fh));
            Ok(())
        });
        reply_empty(reply, released);
    }

    fn fsyncdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        data_only: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(reply, run("fsyncdir", || self.drive.fsyncdir(handle(fh), data_only)));
    }

    fn statfs(&self, _: &Request, node: INodeNo, reply: ReplyStatfs) {
        let _serving = self.linger.serve();
        match run("statfs", || self.drive.statfs(ino(node))) {
            Ok(s) => reply.statfs(
                s.blocks,
                s.blocks_free,
                s.blocks_available,
                s.files,
                s.files_free,
                s.block_bytes,
                s.name_max,
                s.block_bytes,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply.error(Errno::EPERM);
        }
        let result = run("setxattr", || {
            let mode = convert::xattr_mode(flags).ok_or_else(|| invalid("setxattr"))?;
            self.drive.setxattr(ino(node), name.as_bytes(), value, mode)
        });
        reply_empty(reply, result);
    }

    fn getxattr(
        &self,
        request: &Request,
        node: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let _serving = self.linger.serve();
        let value = match self.stage.prove(request, name.as_bytes()) {
            Some(proof) => Ok(proof),
            None => run("getxattr", || self.drive.getxattr(ino(node), name.as_bytes())),
        };
        reply_xattr(reply, size, value);
    }

    fn listxattr(&self, _: &Request, node: INodeNo, size: u32, reply: ReplyXattr) {
        let _serving = self.linger.serve();
        reply_xattr(reply, size, run("listxattr", || self.drive.listxattr(ino(node))));
    }

    fn removexattr(&self, request: &Request, node: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _serving = self.linger.serve();
        if self.stage.is_helper(request) {
            return reply.error(Errno::EPERM);
        }
        let removed = run("removexattr", || self.drive.removexattr(ino(node), name.as_bytes()));
        reply_empty(reply, removed);
    }

    /// The kernel checks permissions itself (`default_permissions`) and does not ask.
    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fallocate(
        &self,
        request: &Request,
        node: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let result = run("fallocate", || {
            let mode = convert::fallocate_mode(mode)
                .ok_or_else(|| FsError::new(Kind::NotSupported, "fallocate"))?;
            self.strip_set_id_bits(&caller(request), ino(node))?;
            self.drive.fallocate(handle(fh), offset, length, mode)
        });
        reply_empty(reply, result);
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = run("lseek", || {
            let whence = convert::whence(whence).ok_or_else(|| invalid("lseek"))?;
            let from = u64::try_from(offset)
                .map_err(|_| FsError::new(Kind::NoSuchAddress, "lseek before the file"))?;
            let found = self.drive.seek(handle(fh), from, whence)?;
            i64::try_from(found).map_err(|_| FsError::new(Kind::Overflow, "lseek"))
        });
        match found {
            Ok(offset) => reply.offset(offset),
            Err(errno) => reply.error(errno),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _from_node: INodeNo,
        from: FileHandle,
        from_offset: u64,
        _to_node: INodeNo,
        to: FileHandle,
        to_offset: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The reply has 32 bits, and a copy that takes long cannot be interrupted.
        const LONGEST_BYTES: u64 = 64 << 20;
        let copied = run("copy_file_range", || {
            let len = len.min(LONGEST_BYTES);
            self.drive.copy_range(handle(from), from_offset, handle(to), to_offset, len)
        });
        match copied {
            Ok(copied) => reply.written(copied as u32),
            Err(errno) => reply.error(errno),
        }
    }
}

/// The kernel has let go of the mount, and gives no lock back any more.
impl Drop for Adapter {
    fn drop(&mut self) {
        let drive = Arc::clone(&self.drive);
        self.runtime.spawn(async move { drive.unlock_all().await });
    }
}

fn stop_if(full: bool) -> ControlFlow<()> {
    match full {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_may_report_at_close_is_asked_also_by_a_kernel_that_writes_itself() {
        let opened = |is_flushed| {
            let io = Io::Calls { keep_cache: false };
            Opened { handle: HandleId(1), generation: 0, is_flushed, io }
        };
        let both = OpenFlags { write: true, ..OpenFlags::READ };
        let writes = OpenFlags { read: false, ..both };
        assert_eq!(passthrough_flags(&opened(true), OpenFlags::READ), FopenFlags::empty());
        assert_eq!(passthrough_flags(&opened(false), OpenFlags::READ), FopenFlags::FOPEN_NOFLUSH);
        assert_eq!(passthrough_flags(&opened(false), writes), FopenFlags::FOPEN_NOFLUSH);
        assert_eq!(passthrough_flags(&opened(false), both), FopenFlags::empty());
    }
}
