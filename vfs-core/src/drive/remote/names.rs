//! Changes of names in other devices' locations.

use super::{Remote, RemoteFile};
use crate::drive::inode::RemoteIno;
use crate::drive::types::{Found, Io, OpenFlags, RenameFlags};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, FileType, LocationNo, Name};
use crate::outbox::{Made, MoveFlags};

/// How often `create` tries again when others create and remove the same name meanwhile.
const CREATE_ATTEMPTS: usize = 16;

impl Remote {
    /// Whether the drive lets anything in a location be changed.
    pub fn check_writable(&self, no: LocationNo) -> FsResult<()> {
        let location = self.location(no)?;
        // Its own disk is gone: what it had is listed from the index.
        let is_own = location.owner == self.index.me();
        match self.read_only || location.read_only || is_own {
            true => Err(FsError::new(Kind::ReadOnly, "change a read-only location")),
            false => Ok(()),
        }
    }

    /// Opens a regular file, creating it unless it is there.
    pub fn create(
        &self,
        parent: RemoteIno,
        name: &Name,
        perm: u16,
        flags: OpenFlags,
    ) -> FsResult<(Found, RemoteFile, Io)> {
        self.check_writable(parent.location)?;
        for _ in 0..CREATE_ATTEMPTS {
            match self.create_new(parent, name, perm, flags) {
                Err(e) if e.kind() == Kind::Exists && !flags.exclusive => {}
                created => return created,
            }
            match self.open_existing(parent, name, flags) {
                Err(e) if matches!(e.kind(), Kind::NotFound | Kind::Stale) => {}
                opened => return opened,
            }
        }
        Err(FsError::new(Kind::Busy, "create a file that others create and remove"))
    }

    fn create_new(
        &self,
        parent: RemoteIno,
        name: &Name,
        perm: u16,
        flags: OpenFlags,
    ) -> FsResult<(Found, RemoteFile, Io)> {
        let made = Made::File { is_open: true };
        let (entry, written) =
            self.outbox.make(parent.location, (parent.file, name), made, perm)?;
        let ino = self.child(parent, &entry);
        let found = self.found(ino, &entry);
        let written = written.ok_or_else(|| FsError::new(Kind::Io, "create a file"))?;
        let (file, io) = self.opened_new(ino, entry, flags, written)?;
        Ok((found, file, io))
    }

    fn open_existing(
        &self,
        parent: RemoteIno,
        name: &Name,
        flags: OpenFlags,
    ) -> FsResult<(Found, RemoteFile, Io)> {
        let found = self.outbox.view().entry(parent.location, parent.file, name.as_bytes())?;
        let entry = found.ok_or_else(|| FsError::new(Kind::NotFound, "open a file"))?;
        // A link where the kernel believed there was nothing: it looks again, and follows it.
        if entry.attr.file_type == FileType::Symlink {
            return Err(super::stale("create a file where a link is"));
        }
        let ino = self.child(parent, &entry);
        let (file, io) = self.open(ino, flags)?;
        let found = self.found(ino, &file.entry(&self.outbox));
        Ok((found, file, io))
    }

    fn make(&self, parent: RemoteIno, name: &Name, made: Made<'_>, perm: u16) -> FsResult<Found> {
        self.check_writable(parent.location)?;
        let (entry, _) = self.outbox.make(parent.location, (parent.file, name), made, perm)?;
        Ok(self.shown(parent, &entry))
    }

    fn shown(&self, parent: RemoteIno, entry: &Entry) -> Found {
        self.found(self.child(parent, entry), entry)
    }

    pub fn mkdir(&self, parent: RemoteIno, name: &Name, perm: u16) -> FsResult<Found> {
        self.make(parent, name, Made::Directory, perm)
    }

    pub fn mknod(
        &self,
        parent: RemoteIno,
        name: &Name,
        file_type: FileType,
        perm: u16,
    ) -> FsResult<Found> {
        match file_type {
            FileType::File => self.make(parent, name, Made::File { is_open: false }, perm),
            FileType::Fifo => self.make(parent, name, Made::Fifo, perm),
            FileType::Directory | FileType::Symlink => {
                Err(FsError::new(Kind::Invalid, "mknod of a directory or link"))
            }
            FileType::Socket | FileType::CharDevice | FileType::BlockDevice => {
                Err(FsError::new(Kind::NotPermitted, "make a device or socket of another device"))
            }
        }
    }

    pub fn symlink(&self, parent: RemoteIno, name: &Name, target: &[u8]) -> FsResult<Found> {
        self.make(parent, name, Made::Symlink(target), 0o777)
    }

    pub fn link(&self, ino: RemoteIno, parent: RemoteIno, name: &Name) -> FsResult<Found> {
        self.check_writable(parent.location)?;
        let entry = self.outbox.link(parent.location, ino.file, (parent.file, name))?;
        Ok(self.shown(parent, &entry))
    }

    pub fn unlink(&self, parent: RemoteIno, name: &Name) -> FsResult<()> {
        self.check_writable(parent.location)?;
        self.outbox.unlink(parent.location, (parent.file, name))
    }

    pub fn rmdir(&self, parent: RemoteIno, name: &Name) -> FsResult<()> {
        self.check_writable(parent.location)?;
        self.outbox.rmdir(parent.location, (parent.file, name))
    }

    pub fn rename(
        &self,
        (from_dir, from): (RemoteIno, &Name),
        (to_dir, to): (RemoteIno, &Name),
        flags: RenameFlags,
    ) -> FsResult<()> {
        self.check_writable(from_dir.location)?;
        let RenameFlags { no_replace, exchange } = flags;
        let flags = MoveFlags { no_replace, exchange };
        let (from, to) = ((from_dir.file, from), (to_dir.file, to));
        self.outbox.rename(from_dir.location, from, to, flags)
    }
}
