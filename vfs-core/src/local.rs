//! This device's own files, beneath the folder of a location.
//!
//! Everything that reads a location's disk goes through [`Root`]. A path is a
//! list of [`Name`]s and is resolved by `openat2` with `RESOLVE_BENEATH`,
//! `RESOLVE_NO_SYMLINKS`, `RESOLVE_NO_MAGICLINKS` and `RESOLVE_NO_XDEV`, so no
//! symbolic link, `..`, mount point or race between two calls leads outside.
//!
//! A mount point beneath a location is shown as an empty directory and never
//! touched, not even by `statx`: it may be this very daemon's drive, which
//! could not answer while its thread waits here, or a dead network disk.
//! FIFOs, sockets and devices are listed and never opened.
//!
//! This module owns no state but the open folder, and knows no index rows.

mod disk;
mod mounts;

pub use disk::RootId;
pub(crate) use mounts::mount_of;
pub use mounts::{Beside, Candidate, Mounts, Search, is_absent};

use crate::error::{FsError, FsResult, Kind};
use crate::index::Observed;
use crate::model::{Attr, FileType, Name, Stamp, TARGET_MAX, Time};
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags, Statx, StatxAttributes, StatxFlags,
    StatxTimestamp,
};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What keeps every resolution inside the folder.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// The longest path given to one system call; `PATH_MAX` is 4096 with the terminator.
/// Longer ones are walked in pieces.
const PIECE_BYTES: usize = 4000;

/// Room for the directory entries of one `getdents64`; a name takes 24 bytes and itself.
const LISTING_BUFFER_BYTES: usize = 128 << 10;

/// `STATX_SUBVOL`, since Linux 6.10: inode numbers of btrfs and bcachefs are
/// unique within a subvolume only.
const STATX_SUBVOL: u32 = 0x8000;

/// What is asked of `statx`; a file system answers what it has.
pub const STATX_WANTED: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::from_bits_retain(STATX_SUBVOL));

/// The folder of a location, held open.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    folder: OwnedFd,
    identity: Identity,
    fs_type: u64,
}

/// Which folder it is: two disks may be mounted on one path, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    device: (u32, u32),
    ino: u64,
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        Self { device: (stat.stx_dev_major, stat.stx_dev_minor), ino: stat.stx_ino }
    }
}

/// What one reading of a directory saw.
#[derive(Debug)]
pub struct Listing {
    /// The directory's own attributes, from before the reading.
    pub own: Attr,
    /// The directory's own inode number, as rows carry it.
    pub own_ino: u64,
    /// Its entries, in the order of their inode numbers.
    pub entries: Vec<Observed>,
}

impl Root {
    /// Opens the folder; symbolic links on the way to it are followed, as its person wrote them.
    pub fn open(path: &Path) -> FsResult<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| FsError::os(format!("open the folder {}", path.display()), e))?;
        Self::of(path, folder)
    }

    /// Of a folder that was opened by this path.
    fn of(path: &Path, folder: OwnedFd) -> FsResult<Self> {
        let identity = Identity::of(&stat_of(folder.as_fd())?);
        let disk = rustix::fs::fstatfs(&folder)
            .map_err(|e| FsError::os(format!("ask for the disk of {}", path.display()), e))?;
        let fs_type = disk.f_type as u64;
        Ok(Self { path: path.to_owned(), folder, identity, fs_type })
    }

    /// What tells this folder from another one at its path, also after a restart.
    pub fn id(&self) -> FsResult<RootId> {
        let id = RootId::of(&stat_of(self.folder.as_fd())?, self.fs_type, self.fs_id()?);
        Ok(RootId { path_on_disk: mounts::path_on_disk(self.folder.as_fd()), ..id })
    }

    /// The number of its file system.
    fn fs_id(&self) -> FsResult<u64> {
        let disk = rustix::fs::fstatvfs(&self.folder)
            .map_err(|e| FsError::os(format!("ask for the disk of {}", self.path.display()), e))?;
        Ok(disk.f_fsid)
    }

    /// Whether both are one folder of one disk, at whichever paths.
    pub fn is_also(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    /// Whether closing a file may tell that its disk refused bytes.
    pub fn reports_at_close(&self) -> bool {
        disk::reports_at_close(self.fs_type)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path still leads to the folder that is open; an error when it leads nowhere,
    /// or to a disk that was unplugged, from which nothing can be told.
    pub fn is_current(&self) -> FsResult<bool> {
        if disk::is_unplugged(Path::new(disk::BLOCK_DEVICES), self.identity.device) {
            let what = format!("the disk of {} was unplugged", self.path.display());
            return Err(FsError::new(Kind::NotFound, what));
        }
        let stat = rustix::fs::statx(CWD, &self.path, AtFlags::NO_AUTOMOUNT, STATX_WANTED)
            .map_err(|e| FsError::os(format!("stat {}", self.path.display()), e))?;
        Ok(Identity::of(&stat) == self.identity)
    }

    /// The directory as a handle to resolve further names from (`O_PATH`).
    pub fn dir(&self, path: &[Name]) -> FsResult<OwnedFd> {
        self.resolve(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    /// The directory, open for reading its entries.
    pub fn open_dir(&self, path: &[Name]) -> FsResult<OwnedFd> {
        self.resolve_without_atime(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// All entries of a directory, special files included.
    pub fn list(&self, path: &[Name]) -> FsResult<Vec<Observed>> {
        Ok(list_dir(self.open_dir(path)?.as_fd())?.entries)
    }

    /// One entry of a directory.
    pub fn observe(&self, dir: &[Name], name: &Name) -> FsResult<Observed> {
        observe_at(self.dir(dir)?.as_fd(), name)
    }

    /// The folder itself, under the name that its row has in the index.
    pub fn observe_root(&self) -> FsResult<Observed> {
        let stat = stat_of(self.folder.as_fd())?;
        let name = Name::new(*b"root").expect("“root” is a name");
        Ok(Observed { name, attr: attr_of(&stat), disk_ino: ino_of(&stat), target: None })
    }

    /// A regular file, for reading. Anything else is refused unopened or unread:
    /// opening a FIFO must not wait for its writer, nor a device be woken.
    pub fn open_for_reading(&self, path: &[Name]) -> FsResult<File> {
        // First a handle that opens nothing: `open` of a device may act on it.
        let handle = self.resolve(path, OFlags::PATH)?;
        require_regular(&stat_of(handle.as_fd())?)?;
        let file = self.resolve_without_atime(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        require_regular(&stat_of(file.as_fd())?)?;
        Ok(File::from(file))
    }

    /// A regular file, for reading and writing; as careful as [`Self::open_for_reading`].
    pub fn open_for_writing(&self, path: &[Name]) -> FsResult<File> {
        let handle = self.resolve(path, OFlags::PATH)?;
        require_regular(&stat_of(handle.as_fd())?)?;
        let file = self.resolve(path, OFlags::RDWR | OFlags::NONBLOCK)?;
        require_regular(&stat_of(file.as_fd())?)?;
        Ok(File::from(file))
    }

    /// Reading must not change the owner's access times, where the rights suffice for that.
    fn resolve_without_atime(&self, path: &[Name], flags: OFlags) -> FsResult<OwnedFd> {
        match self.resolve(path, flags | OFlags::NOATIME) {
            Err(e) if e.kind() == Kind::NotPermitted => self.resolve(path, flags),
            opened => opened,
        }
    }

    fn resolve(&self, path: &[Name], flags: OFlags) -> FsResult<OwnedFd> {
        let mut pieces = pieces(path);
        let last = pieces.pop().unwrap_or_else(|| c".".to_owned());
        let mut from: Option<OwnedFd> = None;
        for piece in pieces {
            let start = from.as_ref().map_or(self.folder.as_fd(), OwnedFd::as_fd);
            from = Some(open_beneath(start, &piece, OFlags::PATH | OFlags::DIRECTORY)?);
        }
        let start = from.as_ref().map_or(self.folder.as_fd(), OwnedFd::as_fd);
        open_beneath(start, &last, flags)
    }
}

/// The path as texts that one system call takes.
fn pieces(path: &[Name]) -> Vec<CString> {
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    for name in path {
        match pieces.last_mut() {
            Some(piece) if piece.len() + 1 + name.as_bytes().len() <= PIECE_BYTES => {
                piece.push(b'/');
                piece.extend_from_slice(name.as_bytes());
            }
            _ => pieces.push(name.as_bytes().to_vec()),
        }
    }
    pieces.into_iter().map(c_string).collect()
}

fn c_string(name: Vec<u8>) -> CString {
    CString::new(name).expect("a Name has no NUL")
}

fn open_beneath(dir: BorrowedFd<'_>, path: &CString, flags: OFlags) -> FsResult<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), BENEATH) {
            Err(Errno::INTR) => {}
            opened => return opened.map_err(|e| failed("open", path.as_bytes(), e)),
        }
    }
}

fn failed(what: &str, name: &[u8], errno: Errno) -> FsError {
    FsError::os(format!("{what} {}", String::from_utf8_lossy(name)), errno)
}

fn require_regular(stat: &Statx) -> FsResult<()> {
    match attr_of(stat).file_type {
        FileType::File => Ok(()),
        FileType::Directory => Err(FsError::new(Kind::IsADirectory, "open a file")),
        FileType::Symlink => Err(FsError::new(Kind::Loop, "open a file")),
        _ => Err(FsError::new(Kind::NotPermitted, "open a special file")),
    }
}

/// One entry of an open directory as a handle that opens nothing (`O_PATH`), also of a
/// symbolic link itself; `CrossDevice` for a mount point.
pub fn handle_at(dir: BorrowedFd<'_>, name: &Name) -> FsResult<OwnedFd> {
    open_beneath(dir, &c_string(name.as_bytes().to_vec()), OFlags::PATH)
}

/// One entry of an open directory, by `statx` and `readlinkat`; a mount point is not entered.
pub fn observe_at(dir: BorrowedFd<'_>, name: &Name) -> FsResult<Observed> {
    match handle_at(dir, name) {
        Ok(handle) => observe_handle(handle.as_fd(), name.clone()),
        Err(e) if e.kind() == Kind::CrossDevice => mount_point(&stat_of(dir)?, name.clone()),
        Err(e) => Err(e),
    }
}

/// A regular file of an open directory, for reading; as careful as [`Root::open_for_reading`].
pub fn open_file_at(dir: BorrowedFd<'_>, name: &Name) -> FsResult<File> {
    require_regular(&stat_of(handle_at(dir, name)?.as_fd())?)?;
    let path = c_string(name.as_bytes().to_vec());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let file = match open_beneath(dir, &path, flags | OFlags::NOATIME) {
        Err(e) if e.kind() == Kind::NotPermitted => open_beneath(dir, &path, flags)?,
        opened => opened?,
    };
    require_regular(&stat_of(file.as_fd())?)?;
    Ok(File::from(file))
}

/// What has this name, seen through a file that was opened by it.
pub fn observe_file(file: &File, name: Name) -> FsResult<Observed> {
    observe_handle(file.as_fd(), name)
}

fn observe_handle(handle: BorrowedFd<'_>, name: Name) -> FsResult<Observed> {
    let stat = stat_of(handle)?;
    let target = match attr_of(&stat).file_type {
        FileType::Symlink => Some(target_of(handle, c"")?),
        _ => None,
    };
    Ok(observed(name, &stat, target))
}

fn observed(name: Name, stat: &Statx, target: Option<Box<[u8]>>) -> Observed {
    Observed { name, attr: attr_of(stat), disk_ino: ino_of(stat), target }
}

/// The target of a symbolic link; at least one byte and at most [`TARGET_MAX`], as Linux has them.
fn target_of(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> FsResult<Box<[u8]>> {
    let target = rustix::fs::readlinkat(dir, name, Vec::with_capacity(256))
        .map_err(|e| failed("read the link", name.to_bytes(), e))?
        .into_bytes();
    if target.is_empty() || target.len() > TARGET_MAX {
        return Err(failed("read the link", name.to_bytes(), Errno::NAMETOOLONG));
    }
    Ok(target.into())
}

/// A stand-in for a mount point, made without asking the file system mounted there.
///
/// Its inode number is computed from the directory's and the name, with the
/// highest bit set, which no Linux file system uses: stable, and different from
/// every other entry's.
fn mount_point(dir: &Statx, name: Name) -> FsResult<Observed> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&ino_of(dir).to_le_bytes()).update(name.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let attr = Attr {
        file_type: FileType::Directory,
        perm: 0o555,
        nlink: 2,
        size: 0,
        blocks: 0,
        mtime: Time::default(),
        ctime: Time::default(),
        btime: None,
        rdev: 0,
        ..attr_of(dir)
    };
    Ok(Observed { name, attr, disk_ino: u64::from_le_bytes(first) | 1 << 63, target: None })
}

/// Reads an open directory. An entry that vanished meanwhile is left out;
/// any other failure fails the whole listing, so that no entry is ever taken for deleted.
pub fn list_dir(dir: BorrowedFd<'_>) -> FsResult<Listing> {
    let own = stat_of(dir)?;
    let raw_entries = raw_entries(dir)?;
    let mut entries = Vec::with_capacity(raw_entries.len());
    for raw in raw_entries {
        match observe_raw(dir, &own, raw) {
            Ok(entry) => entries.push(entry),
            Err(e) if e.kind() == Kind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(Listing { own: attr_of(&own), own_ino: ino_of(&own), entries })
}

/// An entry as `getdents64` gives it.
struct RawEntry {
    ino: u64,
    may_be_directory: bool,
    name: Name,
}

/// In the order of inode numbers: on a cold disk `statx` then reads the inode tables forward.
fn raw_entries(dir: BorrowedFd<'_>) -> FsResult<Vec<RawEntry>> {
    let mut buffer = Vec::with_capacity(LISTING_BUFFER_BYTES);
    let mut reading = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut entries = Vec::new();
    while let Some(entry) = reading.next() {
        let entry = entry.map_err(|e| FsError::os("read a directory", e))?;
        // `Name::new` refuses `.` and `..`, and what no Linux file system should deliver.
        let Some(name) = Name::new(entry.file_name().to_bytes()) else { continue };
        let may_be_directory = matches!(
            entry.file_type(),
            rustix::fs::FileType::Directory | rustix::fs::FileType::Unknown
        );
        entries.push(RawEntry { ino: entry.ino(), may_be_directory, name });
    }
    entries.sort_unstable_by_key(|e| e.ino);
    Ok(entries)
}

/// Only directories need the handle of [`observe_at`], which no mount point gives.
fn observe_raw(dir: BorrowedFd<'_>, own: &Statx, raw: RawEntry) -> FsResult<Observed> {
    if raw.may_be_directory {
        return observe_at(dir, &raw.name);
    }
    let name = c_string(raw.name.as_bytes().to_vec());
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(dir, &name, flags, STATX_WANTED)
        .map_err(|e| failed("stat", name.as_bytes(), e))?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return mount_point(own, raw.name);
    }
    let target = match attr_of(&stat).file_type {
        FileType::Symlink => Some(target_of(dir, &name)?),
        _ => None,
    };
    Ok(observed(raw.name, &stat, target))
}

/// `statx` of an open file or handle.
pub fn stat_of(file: BorrowedFd<'_>) -> FsResult<Statx> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, STATX_WANTED)
        .map_err(|e| FsError::os("stat an open file", e))
}

/// The stamp of an open file's bytes.
pub fn stamp_of(file: &File) -> FsResult<Stamp> {
    let stat = stat_of(file.as_fd())?;
    let Attr { size, mtime, ctime, .. } = attr_of(&stat);
    Ok(Stamp { disk_ino: ino_of(&stat), size, mtime, ctime })
}

/// The inode number that rows carry: the disk's, told apart by subvolume where
/// numbers repeat in each of them.
pub fn ino_of(stat: &Statx) -> u64 {
    match stat.stx_mask & STATX_SUBVOL {
        0 => stat.stx_ino,
        // Subvolume ids start at 256 and inode numbers stay far below 2^44.
        _ => stat.stx_ino ^ (stat.stx_subvol.rotate_left(44) & !(1 << 63)),
    }
}

/// The attributes of a row.
pub fn attr_of(stat: &Statx) -> Attr {
    Attr {
        file_type: type_of(stat.stx_mode),
        perm: stat.stx_mode & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        nlink: stat.stx_nlink,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        mtime: time_of(&stat.stx_mtime),
        ctime: time_of(&stat.stx_ctime),
        btime: (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| time_of(&stat.stx_btime)),
        rdev: match (stat.stx_rdev_major, stat.stx_rdev_minor) {
            (0, 0) => 0,
            (major, minor) => rustix::fs::makedev(major, minor),
        },
    }
}

fn type_of(mode: u16) -> FileType {
    use rustix::fs::FileType as Raw;
    match Raw::from_raw_mode(mode.into()) {
        Raw::Directory => FileType::Directory,
        Raw::Symlink => FileType::Symlink,
        Raw::Fifo => FileType::Fifo,
        Raw::Socket => FileType::Socket,
        Raw::CharacterDevice => FileType::CharDevice,
        Raw::BlockDevice => FileType::BlockDevice,
        Raw::RegularFile | Raw::Unknown => FileType::File,
    }
}

/// A time of `statx`. A file system with a damaged inode may give any number of nanoseconds.
pub fn time_of(t: &StatxTimestamp) -> Time {
    Time { secs: t.tv_sec, nanos: t.tv_nsec.min(999_999_999) }
}

#[cfg(test)]
mod tests;

/// What must stay free on the disk of a store that refuses everything after an error of its disk
/// until it is opened anew, as redb does: a full disk is not to be met inside of it.
/// Its buffer of relaxed commits, up to 16 MiB, goes to the disk with a later one.
const STORES_RESERVE_BYTES: u64 = 32 << 20;

/// Whether a store may be written to: a full disk is told before it costs anything.
pub fn check_room(path: &Path) -> std::io::Result<()> {
    let disk = rustix::fs::statvfs(path)?;
    match disk.f_bavail.saturating_mul(disk.f_frsize) < STORES_RESERVE_BYTES {
        true => Err(Errno::NOSPC.into()),
        false => Ok(()),
    }
}
