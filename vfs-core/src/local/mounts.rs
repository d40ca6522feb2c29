//! Where the file systems of this machine are mounted, and the folder of a location among them.
//!
//! A disk may come back at another path than before. It is looked for by what the kernel's
//! table of mounts says; of these only file systems of disks are touched, and only at paths
//! that lead over nothing else: a dead network disk would keep whoever asks it.
//!
//! A copy of a disk has everything that tells the disk: with both of them there it cannot be
//! known which is meant, and neither is taken.

use super::{Root, RootId, open_beneath};
use crate::error::{FsError, FsResult, Kind};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The mounts that this process sees; see proc(5).
const TABLE: &str = "/proc/self/mountinfo";

/// File systems of disks, which answer without a network and without another program.
const OF_DISKS: [&str; 14] = [
    "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "jfs", "nilfs2",
    "ntfs3", "reiserfs", "vfat", "xfs",
];
/// Others that a path may lead over: they answer at once.
const ON_THE_WAY: [&str; 6] = ["devtmpfs", "overlay", "ramfs", "rootfs", "squashfs", "tmpfs"];

/// One line of the table.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mount {
    id: u64,
    parent: u64,
    device: (u32, u32),
    /// Which folder of the file system is mounted.
    root: PathBuf,
    mountpoint: PathBuf,
    read_only: bool,
    fs_type: String,
}

/// What became of looking for a folder.
pub enum Search {
    /// It is on no disk that is mounted.
    Nowhere,
    /// Here, and nowhere else.
    Here(Root),
    /// Several disks have it, at these paths.
    Several(Vec<PathBuf>),
}

/// The path of an open folder from the root of its file system, if that is text.
pub(super) fn path_on_disk(folder: BorrowedFd<'_>) -> Option<String> {
    let link = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let path = std::fs::read_link(link).ok()?;
    let id = mount_of(folder).ok()?;
    let mount = table().into_iter().find(|mount| mount.id == id)?;
    let on_disk = mount.root.join(path.strip_prefix(&mount.mountpoint).ok()?);
    // Joined with nothing a path ends with a slash.
    let plain: PathBuf = on_disk.components().collect();
    plain.to_str().map(str::to_owned)
}

/// Looks for a folder on every disk that is mounted; `home` is the one at its own path, if that
/// could be it.
pub fn search(known: &RootId, home: Option<&Root>) -> Search {
    let Some(path) = known.path_on_disk.as_deref().map(Path::new) else { return Search::Nowhere };
    let mounts = table();
    let found = candidates(&mounts, path).into_iter().filter_map(|(mount, path)| {
        let root = open_at(mount, &path)
            .inspect_err(|e| tracing::trace!("not at {}: {e}", path.display()))
            .ok()?;
        let id = root.id().ok()?;
        Some((root, id))
    });
    choose(known, home, found)
}

/// Of the folders in their order: the first, unless another file system has it as well.
fn choose(
    known: &RootId,
    home: Option<&Root>,
    found: impl Iterator<Item = (Root, RootId)>,
) -> Search {
    let mut folders: BTreeSet<_> = home.iter().map(|home| home.identity).collect();
    let mut paths: Vec<_> = home.iter().map(|home| home.path.clone()).collect();
    let (mut first, mut sure) = (None, false);
    // What cannot be told from it may be a copy of its disk.
    for (root, id) in found.filter(|(_, id)| known.is_same(id) != Some(false)) {
        // Further mounts of one file system show the same folder.
        if folders.insert(root.identity) {
            paths.push(root.path.clone());
        }
        sure |= known.is_surely(&id);
        first.get_or_insert(root);
    }
    match first {
        Some(_) if folders.len() > 1 && (sure || home.is_some()) => Search::Several(paths),
        Some(root) if sure => Search::Here(root),
        _ => Search::Nowhere,
    }
}

/// Where a folder of a disk would be, with the mounts that show it: those that can be written
/// to first, then those of most of the disk.
fn candidates<'m>(mounts: &'m [Mount], path: &Path) -> Vec<(&'m Mount, PathBuf)> {
    let mut all: Vec<_> = mounts
        .iter()
        .filter(|mount| is_of_disk(mount) && is_reached(mount, mounts))
        .filter_map(|mount| {
            let below = path.strip_prefix(&mount.root).ok()?;
            Some((mount, mount.mountpoint.join(below).components().collect()))
        })
        .collect();
    all.sort_by_key(|(mount, _)| {
        (mount.read_only, mount.root.components().count(), &mount.mountpoint)
    });
    all
}

fn is_of_disk(mount: &Mount) -> bool {
    let is_there =
        || !super::disk::is_unplugged(Path::new(super::disk::BLOCK_DEVICES), mount.device);
    OF_DISKS.contains(&mount.fs_type.as_str()) && is_there()
}

/// Whether the way to a mount leads over nothing that may keep who asks, and to nothing that
/// was mounted over it.
fn is_reached(mount: &Mount, mounts: &[Mount]) -> bool {
    let above = ancestors(mount, mounts);
    let answers = |mount: &&Mount| {
        OF_DISKS.iter().chain(&ON_THE_WAY).any(|fs_type| *fs_type == mount.fs_type)
    };
    let covers = |other: &Mount| {
        mount.mountpoint.starts_with(&other.mountpoint)
            && other.id != mount.id
            && !above.iter().any(|a| a.id == other.id)
    };
    above.iter().all(answers) && !mounts.iter().any(covers)
}

/// The mounts that a mount stands on.
fn ancestors<'m>(mount: &Mount, mounts: &'m [Mount]) -> Vec<&'m Mount> {
    let mut above: Vec<&Mount> = Vec::new();
    let mut parent = mount.parent;
    // The first mount of all may be its own parent.
    while let Some(next) = mounts.iter().find(|m| m.id == parent && m.id != mount.id)
        && !above.iter().any(|known| known.id == next.id)
    {
        parent = next.parent;
        above.push(next);
    }
    above
}

/// The folder at `path`, in just this mount, over no symbolic link and no other mount.
fn open_at(mount: &Mount, path: &Path) -> FsResult<Root> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(&mount.mountpoint, flags, Mode::empty())
        .map_err(|e| FsError::os(format!("open {}", mount.mountpoint.display()), e))?;
    if mount_of(top.as_fd())? != mount.id {
        return Err(FsError::new(Kind::NotFound, "another file system was mounted there"));
    }
    let below = path.strip_prefix(&mount.mountpoint).unwrap_or(Path::new(""));
    let folder = match CString::new(below.as_os_str().as_bytes()) {
        Ok(below) if below.is_empty() => top,
        Ok(below) => open_beneath(top.as_fd(), &below, OFlags::PATH | OFlags::DIRECTORY)?,
        Err(_) => return Err(FsError::new(Kind::Invalid, "a path with a NUL")),
    };
    checked(Root::of(path, folder)?)
}

/// A folder that cannot be listed is not the location.
fn checked(root: Root) -> FsResult<Root> {
    root.open_dir(&[])?;
    Ok(root)
}

/// The number in the table of the mount that an open file is reached by.
fn mount_of(file: BorrowedFd<'_>) -> FsResult<u64> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|e| FsError::os("ask for a mount", e))?;
    Ok(stat.stx_mnt_id)
}

fn table() -> Vec<Mount> {
    let table = std::fs::read(TABLE).unwrap_or_default();
    table.split(|b| *b == b'\n').filter_map(parse).collect()
}

fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let mut next = || fields.next();
    let (id, parent) = (number(next()?)?, number(next()?)?);
    let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let (root, mountpoint) = (unescape(next()?), unescape(next()?));
    let read_only = next()?.split(|b| *b == b',').any(|option| option == b"ro");
    // Any number of optional fields, ended by one.
    fields.find(|field| *field == b"-")?;
    let fs_type = std::str::from_utf8(fields.next()?).ok()?.to_owned();
    Some(Mount { id, parent, device, root, mountpoint, read_only, fs_type })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// Spaces, tabs, newlines and backslashes are octal numbers in the table.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|_| *first == b'\\');
        let octal = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests;
