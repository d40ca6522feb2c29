//! Operations on this device's own locations, live from the disk.
//!
//! Every operation starts from a directory or file that was resolved beneath
//! its location's folder ([`crate::local`]) and whose identity was compared
//! with the inode asked for: a path that leads to another file by now is
//! `ESTALE`, upon which a kernel looks the name up again. From there on only
//! descriptors are used, so no race leads elsewhere. Files are reached again
//! through `/proc/self/fd`, which is how Linux re-opens a handle.
//!
//! Nothing is announced here: the indexer's watch sees what changed.

mod attributes;
mod names;

use super::handle::OwnFile;
use super::inode::{Identity, OwnNode, OwnTable, Place};
use super::types::{Found, InodeNo, OpenFlags, Statfs};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Index;
use crate::indexer::Indexer;
use crate::local::{self, Root};
use crate::model::{Attr, Entry, FileType, LocationNo, Name, Time};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Statx, StatxAttributes};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How long a kernel may keep names and attributes: the owner's programs change
/// them without asking, and the watch that tells may be late.
pub(super) const VALID_FOR: Duration = Duration::from_secs(1);

/// The deepest directory that is followed upwards: a longer chain is a cycle of stale places.
const DEPTH_MAX: usize = 10_000;

/// Operations on own locations.
pub(super) struct Own {
    pub index: Index,
    pub indexer: Arc<Indexer>,
    pub table: OwnTable,
    pub read_only: bool,
    /// The daemon serves other users and must give them what they create.
    pub gives_away: bool,
}

/// What `statx` saw.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub attr: Attr,
    pub atime: Time,
    pub disk_ino: u64,
}

impl Seen {
    fn of(stat: &Statx) -> Self {
        Self {
            attr: local::attr_of(stat),
            atime: local::time_of(&stat.stx_atime),
            disk_ino: local::ino_of(stat),
        }
    }

    /// An open file or handle.
    pub fn of_fd(fd: BorrowedFd<'_>) -> FsResult<Self> {
        Ok(Self::of(&local::stat_of(fd)?))
    }

    /// An entry of an open directory; a mount point is an empty directory.
    pub fn at(dir: BorrowedFd<'_>, name: &Name) -> FsResult<Self> {
        match local::handle_at(dir, name) {
            Ok(handle) => Self::of_fd(handle.as_fd()),
            Err(e) if e.kind() == Kind::CrossDevice => Self::mount_point(dir, name),
            Err(e) => Err(e),
        }
    }

    /// An entry whose type a listing told: only directories need a handle to be told from the
    /// mount points among them, which no `statx` may touch.
    pub fn listed(dir: BorrowedFd<'_>, name: &Name, told: Option<FileType>) -> FsResult<Self> {
        if matches!(told, None | Some(FileType::Directory)) {
            return Self::at(dir, name);
        }
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let stat = rustix::fs::statx(dir, name.as_bytes(), flags, local::STATX_WANTED)
            .map_err(|e| FsError::os("stat", e))?;
        match stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            true => Self::mount_point(dir, name),
            false => Ok(Self::of(&stat)),
        }
    }

    fn mount_point(dir: BorrowedFd<'_>, name: &Name) -> FsResult<Self> {
        let stand_in = local::observe_at(dir, name)?;
        let Attr { mtime, .. } = stand_in.attr;
        Ok(Self { attr: stand_in.attr, atime: mtime, disk_ino: stand_in.disk_ino })
    }

    fn identity(&self) -> Identity {
        let Attr { file_type, btime, .. } = self.attr;
        Identity { disk_ino: self.disk_ino, btime, file_type }
    }

    pub fn found(&self, ino: InodeNo) -> Found {
        Found { ino, generation: 0, attr: self.attr, atime: self.atime, valid_for: VALID_FOR }
    }
}

/// A directory of an own location, open as a handle.
pub(super) struct OwnDir {
    pub ino: InodeNo,
    pub location: LocationNo,
    pub fd: OwnedFd,
}

impl OwnDir {
    fn place(&self, name: &Name) -> Place {
        Place { parent: self.ino, name: name.clone() }
    }
}

/// `local`'s number of a mount point, which no disk uses.
pub(super) fn is_mount_point(identity: &Identity) -> bool {
    identity.disk_ino >> 63 == 1
}

pub(super) fn stale(attempted: &'static str) -> FsError {
    FsError::new(Kind::Stale, attempted)
}

/// The path of an open descriptor, for calls that take no descriptor.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A path that no longer leads to the inode: the caller looks it up again.
fn or_stale(error: FsError) -> FsError {
    match error.kind() {
        Kind::NotFound | Kind::NotADirectory | Kind::Loop => {
            FsError::caused(Kind::Stale, "reach an inode", error)
        }
        _ => error,
    }
}

impl Own {
    /// The location's folder. While its disk is away every inode on it is `ESTALE`, never
    /// `ENOENT`: nothing was deleted, and the name, looked up again, is browsed from the index.
    pub fn root(&self, location: LocationNo) -> FsResult<Arc<Root>> {
        self.indexer.root(location).map_err(|e| match e.kind() {
            Kind::NotFound => FsError::caused(Kind::Stale, "reach a disk that is away", e),
            _ => e,
        })
    }

    /// `EROFS` unless the location may be written to.
    fn writable(&self, location: LocationNo) -> FsResult<()> {
        match self.index.location(location) {
            Some(l) if !l.read_only && !self.read_only => Ok(()),
            Some(_) => Err(FsError::new(Kind::ReadOnly, "change a read-only location")),
            None => Err(stale("change a location that was removed")),
        }
    }

    pub fn node(&self, ino: InodeNo) -> FsResult<Arc<OwnNode>> {
        self.table.get(ino).ok_or_else(|| stale("use an inode that was forgotten"))
    }

    /// The names that lead from the location's folder to this place.
    fn path(&self, location: LocationNo, place: &Place) -> FsResult<Vec<Name>> {
        let mut names = vec![place.name.clone()];
        let mut at = place.parent;
        while at != InodeNo::own_root(location) {
            if names.len() > DEPTH_MAX {
                return Err(stale("follow a directory upwards"));
            }
            let places = self.node(at)?.places();
            let place = places.first().ok_or_else(|| stale("find a removed directory"))?;
            names.push(place.name.clone());
            at = place.parent;
        }
        names.reverse();
        Ok(names)
    }

    /// The directory as a handle, after a look that it is still this inode.
    pub fn dir(&self, location: LocationNo, ino: InodeNo) -> FsResult<OwnDir> {
        let fd = self.resolve_dir(location, ino, Root::dir)?;
        Ok(OwnDir { ino, location, fd })
    }

    /// The directory, open for reading; `None` for a mount point, which is shown empty.
    pub fn open_dir(&self, location: LocationNo, ino: InodeNo) -> FsResult<Option<OwnedFd>> {
        match self.table.get(ino) {
            Some(node) if is_mount_point(&node.identity) => Ok(None),
            _ => self.resolve_dir(location, ino, Root::open_dir).map(Some),
        }
    }

    fn resolve_dir(
        &self,
        location: LocationNo,
        ino: InodeNo,
        open: impl Fn(&Root, &[Name]) -> FsResult<OwnedFd>,
    ) -> FsResult<OwnedFd> {
        let root = self.root(location)?;
        if ino == InodeNo::own_root(location) {
            return open(&root, &[]);
        }
        let node = self.node(ino)?;
        if node.identity.file_type != FileType::Directory {
            return Err(FsError::new(Kind::NotADirectory, "use a file as a directory"));
        }
        let places = node.places();
        let place = places.first().ok_or_else(|| stale("use a removed directory"))?;
        let fd = open(&root, &self.path(location, place)?).map_err(or_stale)?;
        if Seen::of_fd(fd.as_fd())?.identity() != node.identity {
            return Err(stale("use a directory that was replaced"));
        }
        Ok(fd)
    }

    /// The inode itself as a handle: by one of its names, else by one of its open files.
    pub fn handle(&self, location: LocationNo, ino: InodeNo) -> FsResult<OwnedFd> {
        if ino == InodeNo::own_root(location) {
            return Ok(self.dir(location, ino)?.fd);
        }
        let node = self.node(ino)?;
        for place in node.places() {
            if let Some(handle) = self.handle_at(&node, &place)? {
                return Ok(handle);
            }
        }
        let open = node.open_file().ok_or_else(|| stale("use a removed file"))?;
        let again = open.try_clone().map_err(|e| FsError::os("duplicate a handle", e))?;
        Ok(again.into())
    }

    /// The inode at one of its places; `None` when it is not there any more.
    fn handle_at(&self, node: &OwnNode, place: &Place) -> FsResult<Option<OwnedFd>> {
        let opened = self
            .dir(node.location, place.parent)
            .and_then(|dir| local::handle_at(dir.fd.as_fd(), &place.name).map_err(or_stale));
        let handle = match opened {
            Ok(handle) => handle,
            Err(e) if e.kind() == Kind::Stale => return Ok(None),
            Err(e) => return Err(e),
        };
        let same = Seen::of_fd(handle.as_fd())?.identity() == node.identity;
        Ok(same.then_some(handle))
    }

    /// The inode that stands at this place, with one more lookup.
    pub fn look_up_at(&self, dir: &OwnDir, name: &Name) -> FsResult<Found> {
        let seen = Seen::at(dir.fd.as_fd(), name)?;
        Ok(self.count(dir.ino, dir.location, name, &seen))
    }

    /// Counts a lookup of what was seen in this directory.
    pub fn count(&self, parent: InodeNo, location: LocationNo, name: &Name, seen: &Seen) -> Found {
        let place = Place { parent, name: name.clone() };
        seen.found(self.table.look_up(location, seen.identity(), place).no)
    }

    /// The inode that a kernel holds for this name, if it is the file that the index has there.
    pub fn known_at(
        &self,
        location: LocationNo,
        dir: InodeNo,
        name: &Name,
        entry: &Entry,
    ) -> Option<InodeNo> {
        let Entry { disk_ino, attr: Attr { file_type, btime, .. }, .. } = *entry;
        let node = self.table.of_disk(location, disk_ino)?;
        let place = Place { parent: dir, name: name.clone() };
        let is_known = node.identity == Identity { disk_ino, btime, file_type }
            && node.places().contains(&place);
        is_known.then_some(node.no)
    }

    pub fn lookup(&self, location: LocationNo, parent: InodeNo, name: &Name) -> FsResult<Found> {
        if self.is_mount_point(parent) {
            return Err(FsError::new(Kind::NotFound, "look beneath a mount point"));
        }
        self.look_up_at(&self.dir(location, parent)?, name)
    }

    fn is_mount_point(&self, ino: InodeNo) -> bool {
        self.table.get(ino).is_some_and(|n| is_mount_point(&n.identity))
    }

    pub fn getattr(
        &self,
        location: LocationNo,
        ino: InodeNo,
        open: Option<&OwnFile>,
    ) -> FsResult<Found> {
        if let Some(open) = open {
            return Ok(Seen::of_fd(open.file.as_fd())?.found(ino));
        }
        if self.is_mount_point(ino) {
            return self.getattr_of_mount_point(ino);
        }
        let handle = self.handle(location, ino)?;
        Ok(Seen::of_fd(handle.as_fd())?.found(ino))
    }

    fn getattr_of_mount_point(&self, ino: InodeNo) -> FsResult<Found> {
        let node = self.node(ino)?;
        for place in node.places() {
            let dir = self.dir(node.location, place.parent)?;
            let seen = Seen::at(dir.fd.as_fd(), &place.name).map_err(or_stale)?;
            if seen.identity() == node.identity {
                return Ok(seen.found(ino));
            }
        }
        Err(stale("look at a former mount point"))
    }

    pub fn readlink(&self, location: LocationNo, ino: InodeNo) -> FsResult<Vec<u8>> {
        let handle = self.handle(location, ino)?;
        match rustix::fs::readlinkat(&handle, c"", Vec::with_capacity(256)) {
            Ok(target) => Ok(target.into_bytes()),
            // What an empty path gives for a handle of anything but a link.
            Err(rustix::io::Errno::NOENT) => {
                Err(FsError::new(Kind::Invalid, "read the target of what is no link"))
            }
            Err(e) => Err(FsError::os("readlink", e)),
        }
    }

    pub fn open(&self, location: LocationNo, ino: InodeNo, flags: OpenFlags) -> FsResult<OwnFile> {
        if flags.may_change() {
            self.writable(location)?;
        }
        let handle = self.handle(location, ino)?;
        let file = Arc::new(reopen(handle.as_fd(), flags)?);
        self.node(ino)?.opened(&file);
        let reports_at_close = self.root(location)?.reports_at_close();
        Ok(OwnFile { file, flags, reports_at_close })
    }

    pub fn statfs(&self, location: LocationNo) -> FsResult<Statfs> {
        let folder = self.root(location)?.dir(&[])?;
        let disk = rustix::fs::fstatvfs(&folder).map_err(|e| FsError::os("statfs", e))?;
        Ok(Statfs {
            block_bytes: u32::try_from(disk.f_frsize).unwrap_or(4096),
            blocks: disk.f_blocks,
            blocks_free: disk.f_bfree,
            blocks_available: disk.f_bavail,
            files: disk.f_files,
            files_free: disk.f_ffree,
            name_max: u32::try_from(disk.f_namemax).unwrap_or(255),
        })
    }
}

/// Opens a handle's file with exactly the access asked for, so that the disk's permissions hold.
/// A kernel shares one backing file between handles, so what differs between them
/// (`O_APPEND`, `O_SYNC`, `O_DIRECT`) stays out and is added to each write.
fn reopen(handle: BorrowedFd<'_>, flags: OpenFlags) -> FsResult<File> {
    match Seen::of_fd(handle)?.attr.file_type {
        FileType::File => {}
        FileType::Directory => return Err(super::handle::is_a_directory()),
        FileType::Symlink => return Err(FsError::new(Kind::Loop, "open a symbolic link")),
        _ => return Err(FsError::new(Kind::NotPermitted, "open a special file")),
    }
    let mut how = access(flags) | OFlags::CLOEXEC | OFlags::NOCTTY;
    how.set(OFlags::TRUNC, flags.truncate);
    rustix::fs::openat(CWD, path_of(handle), how, Mode::empty())
        .map(File::from)
        .map_err(|e| FsError::os("open", e))
}

fn access(flags: OpenFlags) -> OFlags {
    match (flags.read, flags.write || flags.append) {
        (true, true) => OFlags::RDWR,
        (false, true) => OFlags::WRONLY,
        (_, false) => OFlags::RDONLY,
    }
}
