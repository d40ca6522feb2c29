//! Where the file systems of this machine are mounted, and the folder of a location among them.
//!
//! A disk may come back at another path than before. It is looked for by what the kernel's
//! table of mounts says; of these only file systems of disks are touched, and only at paths
//! that lead over nothing else: a dead network disk would keep whoever asks it. A disk that
//! says by its name or number that it is another one is not asked for the folder at all.
//!
//! A copy of a disk has everything that tells the disk: with both of them there it cannot be
//! known which is meant, and neither is taken. One that was there [`Beside`] the disk is not
//! it, also when it is left alone. A disk that cannot be looked at counts as a copy.

use super::{Root, RootId, open_beneath};
use crate::error::{FsError, FsResult, Kind};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use std::collections::{BTreeMap, BTreeSet};
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
    device: Device,
    /// Which folder of the file system is mounted.
    root: PathBuf,
    mountpoint: PathBuf,
    read_only: bool,
    fs_type: String,
}

/// The number of a file system's device, as the table has it; that of `stat` may be another one,
/// as of subvolumes. Given again when the file system is unmounted.
type Device = (u32, u32);

/// What is mounted at one time.
pub struct Mounts(Vec<Mount>);

/// The mounts of other disks when the location's own was there for sure: as long as one of them
/// is mounted, its disk is not the location's.
#[derive(Clone, Default, Debug)]
pub struct Beside(BTreeSet<(u64, Device)>);

/// A folder that is or may be the one that is looked for.
#[derive(Debug)]
pub struct Candidate {
    path: PathBuf,
    disk: Option<Device>,
    /// It, if it surely is the one.
    root: Option<Root>,
}

/// What became of looking for a folder.
#[derive(Debug)]
pub enum Search {
    /// It is on no disk that is mounted.
    Nowhere,
    /// Here, and nowhere else.
    Here(Root),
    /// Several disks have it, or may have it, at these paths.
    Several(Vec<PathBuf>),
    /// Only a disk has it that was there beside the location's own.
    Copy(PathBuf),
}

impl Beside {
    /// Forgets what is not mounted any more.
    pub fn retain(&mut self, now: &Mounts) {
        // An empty table is one that could not be read.
        if !now.0.is_empty() {
            self.0.retain(|mark| now.0.iter().any(|mount| mount.mark() == *mark));
        }
    }

    fn has(&self, disk: Option<Device>) -> bool {
        self.0.iter().any(|(_, device)| Some(*device) == disk)
    }
}

impl Candidate {
    /// A folder that could not be looked at.
    pub fn unclear(path: &Path) -> Self {
        Self { path: path.to_owned(), disk: None, root: None }
    }
}

impl Mounts {
    /// The table as it is now; empty if it cannot be read.
    pub fn now() -> Self {
        let table = std::fs::read(TABLE).unwrap_or_default();
        Self(table.split(|b| *b == b'\n').filter_map(parse).collect())
    }

    /// All of other disks than that of the folder.
    pub fn beside(&self, root: &Root) -> Beside {
        let own = [self.disk_of(root), root.identity.device];
        let others = self.0.iter().filter(|mount| !own.contains(&mount.device));
        Beside(others.map(Mount::mark).collect())
    }

    /// A folder that surely is the one.
    pub fn candidate(&self, root: Root) -> Candidate {
        Candidate { path: root.path.clone(), disk: Some(self.disk_of(&root)), root: Some(root) }
    }

    /// Looks for a folder on every disk that is mounted; `home` is what is at its own path, if
    /// that is or may be it.
    pub fn search(&self, known: &RootId, home: Option<Candidate>, beside: &Beside) -> Search {
        let path = known.path_on_disk.as_deref().map(Path::new);
        let elsewhere = path.map(|path| self.paths_of(path)).unwrap_or_default();
        let elsewhere = elsewhere.into_iter().filter(|(mount, _)| may_be_on(known, mount));
        let elsewhere = elsewhere.filter_map(|(mount, path)| look(known, mount, path));
        choose(home.into_iter().chain(elsewhere), beside)
    }

    /// Where a folder of a disk would be, with the mounts that show it: those that can be
    /// written to first, then those of most of the disk.
    fn paths_of(&self, path: &Path) -> Vec<(&Mount, PathBuf)> {
        let shows = |mount: &&Mount| is_of_disk(mount) && is_reached(mount, &self.0);
        let shown = self.0.iter().filter(shows).filter_map(|mount| {
            let below = path.strip_prefix(&mount.root).ok()?;
            Some((mount, mount.mountpoint.join(below).components().collect()))
        });
        let mut shown: Vec<_> = shown.collect();
        shown.sort_by_key(|(mount, _)| {
            (mount.read_only, mount.root.components().count(), &mount.mountpoint)
        });
        shown
    }

    /// Whether the folder's own mount is still there, whatever stands at its path.
    pub fn has_mount_of(&self, root: &Root) -> bool {
        let id = mount_of(root.folder.as_fd()).ok();
        self.0.iter().any(|mount| Some(mount.id) == id)
    }

    fn disk_of(&self, root: &Root) -> Device {
        let id = mount_of(root.folder.as_fd()).ok();
        let mount = self.0.iter().find(|mount| Some(mount.id) == id);
        mount.map_or(root.identity.device, |mount| mount.device)
    }
}

impl Mount {
    fn mark(&self) -> (u64, Device) {
        (self.id, self.device)
    }
}

/// The path of an open folder from the root of its file system, if that is text.
pub(super) fn path_on_disk(folder: BorrowedFd<'_>) -> Option<String> {
    let link = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let path = std::fs::read_link(link).ok()?;
    let id = mount_of(folder).ok()?;
    let mount = Mounts::now().0.into_iter().find(|mount| mount.id == id)?;
    let on_disk = mount.root.join(path.strip_prefix(&mount.mountpoint).ok()?);
    // Joined with nothing a path ends with a slash.
    let plain: PathBuf = on_disk.components().collect();
    plain.to_str().map(str::to_owned)
}

/// Of the folders in their order: the first that surely is the one, unless another disk has or
/// may have it as well.
fn choose(found: impl Iterator<Item = Candidate>, beside: &Beside) -> Search {
    let (mut disks, mut first) = (BTreeMap::new(), None);
    for candidate in found {
        // Further mounts of one disk show the same folder.
        disks.entry(candidate.disk).or_insert(candidate.path);
        first = first.or(candidate.root);
    }
    match first {
        None => Search::Nowhere,
        Some(_) if disks.len() > 1 => Search::Several(disks.into_values().collect()),
        Some(root) if disks.into_keys().any(|disk| beside.has(disk)) => Search::Copy(root.path),
        Some(root) => Search::Here(root),
    }
}

/// What a mount has at `path`; `None`: surely not the folder.
fn look(known: &RootId, mount: &Mount, path: PathBuf) -> Option<Candidate> {
    let root = match open_at(known, mount, &path) {
        Err(e) if is_absent(&e) => return None,
        Err(e) => {
            tracing::debug!("{} may be a location's folder: {e}", path.display());
            None
        }
        Ok(root) => root,
    };
    Some(Candidate { path, disk: Some(mount.device), root })
}

/// Whether the failure says that the folder is not there.
pub fn is_absent(e: &FsError) -> bool {
    matches!(e.kind(), Kind::NotFound | Kind::NotADirectory | Kind::Loop)
}

/// Whether a file system may have the folder, by the table alone: none is asked, and none that
/// cannot be asked stands in the way, that has another name or could never be told by its own.
///
/// A copy of a btrfs gets a number of its own while the original is mounted, and gives that
/// number to the original when it is mounted first: there nothing tells which is which.
fn may_be_on(known: &RootId, mount: &Mount) -> bool {
    let is_ext = mount.fs_type.starts_with("ext");
    match (&known.volume, RootId::volume_of(mount.device)) {
        (Some(volume), Some(other)) => *volume == other,
        // Of two disks of one name only one is listed under it.
        (Some(_), None) => is_ext || mount.fs_type == "xfs",
        (None, _) => known.fs_id.is_some() && is_ext,
    }
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

/// The folder at `path`, in just this mount, over no symbolic link and no other mount; `None`:
/// something is there of which nothing tells whether it is the one.
fn open_at(known: &RootId, mount: &Mount, path: &Path) -> FsResult<Option<Root>> {
    let another = |what| Err(FsError::new(Kind::NotFound, what));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = rustix::fs::open(&mount.mountpoint, flags, Mode::empty())
        .map_err(|e| FsError::os(format!("open {}", mount.mountpoint.display()), e))?;
    if mount_of(top.as_fd())? != mount.id {
        return another("another file system was mounted there");
    }
    let top = Root::of(&mount.mountpoint, top)?;
    if known.is_of_another_disk(mount.device, top.fs_type, top.fs_id()?) {
        return another("another disk is mounted there");
    }
    let below = path.strip_prefix(&mount.mountpoint).unwrap_or(Path::new(""));
    let folder = match CString::new(below.as_os_str().as_bytes()) {
        Ok(below) if below.is_empty() => top.folder,
        Ok(below) => open_beneath(top.folder.as_fd(), &below, OFlags::PATH | OFlags::DIRECTORY)?,
        Err(_) => return another("a path with a NUL"),
    };
    let root = Root::of(path, folder)?;
    let id = root.id()?;
    if known.is_same(&id) == Some(false) {
        return another("another folder is there");
    }
    // One that cannot be listed cannot be served, and may be the location's all the same.
    root.open_dir(&[])?;
    Ok(known.is_surely(&id).then_some(root))
}

/// The number in the table of the mount that an open file is reached by.
pub(crate) fn mount_of(file: BorrowedFd<'_>) -> FsResult<u64> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)
        .map_err(|e| FsError::os("ask for a mount", e))?;
    Ok(stat.stx_mnt_id)
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
