//! Changes of names: create, mkdir, mknod, symlink, link, unlink, rmdir, rename.

use super::{Own, OwnDir, Seen, access, or_stale, path_of, reopen};
use crate::drive::handle::OwnFile;
use crate::drive::types::{Caller, Found, InodeNo, OpenFlags, RenameFlags};
use crate::error::{FsError, FsResult, Kind};
use crate::local;
use crate::model::{FileType, LocationNo, Name};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, RenameFlags as Os, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

const SET_ID: u16 = 0o6000;
const SET_GID: u16 = 0o2000;

/// How often `create` tries again when others create and remove the same name meanwhile.
const CREATE_ATTEMPTS: usize = 16;

impl Own {
    fn writable_dir(&self, location: LocationNo, ino: InodeNo) -> FsResult<OwnDir> {
        self.writable(location)?;
        if self.is_mount_point(ino) {
            return Err(FsError::new(Kind::ReadOnly, "change what is beneath a mount point"));
        }
        self.dir(location, ino)
    }

    /// Opens a regular file, creating it unless it is there.
    pub fn create(
        &self,
        caller: &Caller,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        perm: u16,
        flags: OpenFlags,
    ) -> FsResult<(Found, OwnFile)> {
        let dir = self.writable_dir(location, parent)?;
        for _ in 0..CREATE_ATTEMPTS {
            match create_new(&dir, name, perm, flags) {
                Ok(file) => {
                    self.adopt(caller, &dir, file.as_fd(), perm);
                    return self.opened(&dir, name, file, flags);
                }
                Err(Errno::EXIST) if !flags.exclusive => {}
                Err(e) => return Err(FsError::os("create", e)),
            }
            match open_existing(&dir, name, flags) {
                Err(e) if e.kind() == Kind::NotFound => {}
                opened => return self.opened(&dir, name, opened?, flags),
            }
        }
        Err(FsError::new(Kind::Busy, "create a file that others create and remove"))
    }

    fn opened(
        &self,
        dir: &OwnDir,
        name: &Name,
        file: File,
        flags: OpenFlags,
    ) -> FsResult<(Found, OwnFile)> {
        let seen = Seen::of_fd(file.as_fd())?;
        let found = self.count(dir.ino, dir.location, name, &seen);
        let file = Arc::new(file);
        self.node(found.ino)?.opened(&file);
        let reports_at_close = self.root(dir.location)?.reports_at_close();
        Ok((found, OwnFile { file, flags, reports_at_close }))
    }

    pub fn mkdir(
        &self,
        caller: &Caller,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        perm: u16,
    ) -> FsResult<Found> {
        self.make(caller, location, parent, name, Some(perm), "mkdir", |dir| {
            rustix::fs::mkdirat(dir, name.as_bytes(), mode(perm))
        })
    }

    #[allow(clippy::too_many_arguments, reason = "mknod has these arguments")]
    pub fn mknod(
        &self,
        caller: &Caller,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        file_type: FileType,
        perm: u16,
        rdev: u64,
    ) -> FsResult<Found> {
        let os_type = match file_type {
            FileType::File => rustix::fs::FileType::RegularFile,
            FileType::Fifo => rustix::fs::FileType::Fifo,
            FileType::Socket => rustix::fs::FileType::Socket,
            FileType::CharDevice => rustix::fs::FileType::CharacterDevice,
            FileType::BlockDevice => rustix::fs::FileType::BlockDevice,
            FileType::Directory | FileType::Symlink => {
                return Err(FsError::new(Kind::Invalid, "mknod of a directory or link"));
            }
        };
        self.make(caller, location, parent, name, Some(perm), "mknod", |dir| {
            rustix::fs::mknodat(dir, name.as_bytes(), os_type, mode(perm), rdev)
        })
    }

    pub fn symlink(
        &self,
        caller: &Caller,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        target: &[u8],
    ) -> FsResult<Found> {
        self.make(caller, location, parent, name, None, "symlink", |dir| {
            rustix::fs::symlinkat(target, dir, name.as_bytes())
        })
    }

    /// Makes an entry, gives it to the caller, and looks it up.
    #[allow(clippy::too_many_arguments, reason = "what three operations have in common")]
    fn make(
        &self,
        caller: &Caller,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        perm: Option<u16>,
        what: &'static str,
        make: impl FnOnce(BorrowedFd<'_>) -> rustix::io::Result<()>,
    ) -> FsResult<Found> {
        let dir = self.writable_dir(location, parent)?;
        make(dir.fd.as_fd()).map_err(|e| FsError::os(what, e))?;
        let handle = local::handle_at(dir.fd.as_fd(), name)?;
        match perm {
            Some(perm) => self.adopt(caller, &dir, handle.as_fd(), perm),
            None => self.give_away(caller, &dir, handle.as_fd()),
        }
        Ok(self.count(dir.ino, location, name, &Seen::of_fd(handle.as_fd())?))
    }

    /// Gives a new entry to the caller and the mode that was asked for. It exists by now, so
    /// a failure is not one of the operation: the entry keeps the stricter mode that it has.
    fn adopt(&self, caller: &Caller, dir: &OwnDir, new: BorrowedFd<'_>, perm: u16) {
        self.give_away(caller, dir, new);
        let Ok(seen) = Seen::of_fd(new) else { return };
        // A directory inherits the set-gid bit of its parent.
        let inherited = match seen.attr.file_type {
            FileType::Directory => seen.attr.perm & SET_GID,
            _ => 0,
        };
        let wanted = perm & 0o7777 | inherited;
        // Another mode is this process's umask, or set-id bits that went with the owner; but
        // where the directory has a default ACL, that ACL decided.
        if wanted != seen.attr.perm && (perm & SET_ID != 0 || !has_default_acl(dir)) {
            let _ = rustix::fs::chmod(path_of(new), mode(wanted));
        }
    }

    fn give_away(&self, caller: &Caller, dir: &OwnDir, new: BorrowedFd<'_>) {
        if !self.gives_away || (caller.uid, caller.gid) == (0, 0) {
            return;
        }
        // In a set-gid directory the group is the directory's, and already set.
        let set_gid = Seen::of_fd(dir.fd.as_fd()).is_ok_and(|d| d.attr.perm & SET_GID != 0);
        let uid = user(Some(caller.uid));
        let gid = group((!set_gid).then_some(caller.gid));
        let _ = rustix::fs::chownat(new, c"", uid, gid, AtFlags::EMPTY_PATH);
    }

    pub fn link(
        &self,
        location: LocationNo,
        ino: InodeNo,
        parent: InodeNo,
        name: &Name,
    ) -> FsResult<Found> {
        let dir = self.writable_dir(location, parent)?;
        let file = self.handle(location, ino)?;
        // Following the handle's own link, not the file's, is how an ordinary user links a handle.
        let path = path_of(file.as_fd());
        rustix::fs::linkat(CWD, path, &dir.fd, name.as_bytes(), AtFlags::SYMLINK_FOLLOW)
            .map_err(|e| FsError::os("link", e))?;
        self.look_up_at(&dir, name)
    }

    pub fn unlink(&self, location: LocationNo, parent: InodeNo, name: &Name) -> FsResult<()> {
        self.remove(location, parent, name, AtFlags::empty(), "unlink")
    }

    pub fn rmdir(&self, location: LocationNo, parent: InodeNo, name: &Name) -> FsResult<()> {
        self.remove(location, parent, name, AtFlags::REMOVEDIR, "rmdir")
    }

    fn remove(
        &self,
        location: LocationNo,
        parent: InodeNo,
        name: &Name,
        how: AtFlags,
        what: &'static str,
    ) -> FsResult<()> {
        let dir = self.writable_dir(location, parent)?;
        let victim = Seen::at(dir.fd.as_fd(), name)?;
        rustix::fs::unlinkat(&dir.fd, name.as_bytes(), how).map_err(|e| FsError::os(what, e))?;
        self.lost_name(&dir, name, &victim);
        Ok(())
    }

    /// What was seen at this name no longer has it.
    fn lost_name(&self, dir: &OwnDir, name: &Name, victim: &Seen) {
        let Some(node) = self.table.of_disk(dir.location, victim.disk_ino) else { return };
        node.gone_from(&dir.place(name));
        if victim.attr.nlink <= 1 || victim.attr.file_type == FileType::Directory {
            self.table.lost_last_name(&node);
        }
    }

    pub fn rename(
        &self,
        location: LocationNo,
        from: (InodeNo, &Name),
        to: (InodeNo, &Name),
        flags: RenameFlags,
    ) -> FsResult<()> {
        let from_dir = self.writable_dir(location, from.0)?;
        let to_dir = self.writable_dir(location, to.0)?;
        let moved = Seen::at(from_dir.fd.as_fd(), from.1)?;
        let replaced = match Seen::at(to_dir.fd.as_fd(), to.1) {
            Ok(seen) => Some(seen),
            Err(e) if e.kind() == Kind::NotFound => None,
            Err(e) => return Err(e),
        };
        rename(&from_dir, from.1, &to_dir, to.1, flags).map_err(|e| FsError::os("rename", e))?;
        match replaced {
            // Two names of one file: rename does nothing, and both stay.
            Some(other) if other.disk_ino == moved.disk_ino => return Ok(()),
            Some(other) if flags.exchange => {
                self.moved(&other, (&to_dir, to.1), (&from_dir, from.1))
            }
            Some(other) => self.lost_name(&to_dir, to.1, &other),
            None => {}
        }
        self.moved(&moved, (&from_dir, from.1), (&to_dir, to.1));
        Ok(())
    }

    fn moved(&self, what: &Seen, from: (&OwnDir, &Name), to: (&OwnDir, &Name)) {
        if let Some(node) = self.table.of_disk(from.0.location, what.disk_ino) {
            node.gone_from(&from.0.place(from.1));
            node.seen_at(to.0.place(to.1));
        }
    }
}

fn rename(
    from_dir: &OwnDir,
    from: &Name,
    to_dir: &OwnDir,
    to: &Name,
    flags: RenameFlags,
) -> rustix::io::Result<()> {
    let (from, to) = (from.as_bytes(), to.as_bytes());
    let mut os = Os::empty();
    os.set(Os::NOREPLACE, flags.no_replace);
    os.set(Os::EXCHANGE, flags.exchange);
    if os.is_empty() {
        // Some file systems have no `renameat2`, and need none without flags.
        return rustix::fs::renameat(&from_dir.fd, from, &to_dir.fd, to);
    }
    rustix::fs::renameat_with(&from_dir.fd, from, &to_dir.fd, to, os)
}

fn create_new(dir: &OwnDir, name: &Name, perm: u16, flags: OpenFlags) -> rustix::io::Result<File> {
    let how = access(flags) | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(&dir.fd, name.as_bytes(), how, mode(perm)).map(File::from)
}

fn open_existing(dir: &OwnDir, name: &Name, flags: OpenFlags) -> FsResult<File> {
    let handle: OwnedFd = local::handle_at(dir.fd.as_fd(), name)?;
    // A link where the kernel believed there was nothing: it looks again, and follows it.
    reopen(handle.as_fd(), flags).map_err(or_stale_link)
}

fn or_stale_link(error: FsError) -> FsError {
    match error.kind() {
        Kind::Loop => or_stale(error),
        _ => error,
    }
}

fn has_default_acl(dir: &OwnDir) -> bool {
    rustix::fs::getxattr_query(path_of(dir.fd.as_fd()), c"system.posix_acl_default").is_ok()
}

pub(super) fn mode(perm: u16) -> Mode {
    Mode::from(u32::from(perm) & 0o7777)
}

/// `u32::MAX` means “no change” to the kernel as well.
pub(super) fn user(uid: Option<u32>) -> Option<Uid> {
    uid.filter(|n| *n != u32::MAX).map(Uid::from_raw)
}

pub(super) fn group(gid: Option<u32>) -> Option<Gid> {
    gid.filter(|n| *n != u32::MAX).map(Gid::from_raw)
}
