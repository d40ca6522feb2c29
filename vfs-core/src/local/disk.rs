//! Which disk a folder is on, whether that is still there, and how it behaves.
//!
//! A folder is told from every other that may stand at its path later: two sticks may be
//! mounted in one place, one after the other, and without either the empty directory below
//! stands there. No single sign tells it: roots of file systems share inode numbers, some
//! file systems invent new ones at every mount, and not all know when a folder was born.

use crate::model::Time;
use rustix::fs::Statx;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Where the kernel lists every block device, as long as it is there.
pub(super) const BLOCK_DEVICES: &str = "/sys/dev/block";
/// Where `udev` lists file systems by the name that is written on them.
const VOLUMES: &str = "/dev/disk/by-uuid";

const EXT: u64 = 0xef53;
const XFS: u64 = 0x5846_5342;
const BTRFS: u64 = 0x9123_683e;
const F2FS: u64 = 0xf2f5_2010;
const TMPFS: u64 = 0x0102_1994;
const OVERLAY: u64 = 0x794c_7630;
const FAT: u64 = 0x4d44;
const EXFAT: u64 = 0x2011_bab0;
/// The inode number of each exFAT root.
const EXFAT_ROOT: u64 = 1;

/// What tells the folder of a location from another one; what its file system does not say,
/// or says differently at each mount, is absent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RootId {
    /// The file system, by the name that is written on it.
    pub volume: Option<String>,
    /// The inode number.
    pub ino: Option<u64>,
    /// When the folder was made.
    pub btime: Option<Time>,
    /// The number of the file system, where it is made of the name that is written on it: of
    /// disks that were formatted in one second nothing else tells which is which.
    pub fs_id: Option<u64>,
    /// Its path from the root of its file system, by which it is looked for when the disk is
    /// mounted elsewhere. No sign: disks have folders of the same names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_disk: Option<String>,
}

impl RootId {
    /// Of what `statx` says about a folder on a file system of this type and number.
    pub(super) fn of(stat: &Statx, fs_type: u64, fs_id: u64) -> Self {
        let attr = super::attr_of(stat);
        let device = rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        let mut id = Self::of_row(super::ino_of(stat), attr.btime);
        id.volume = volume_of(Path::new(VOLUMES), device);
        // Of others it is made of the device's number, which is another one at the next mount.
        id.fs_id = Some(fs_id).filter(|id| *id != 0 && matches!(fs_type, EXT | BTRFS));
        if matches!(fs_type, FAT | EXFAT) {
            id.ino = None;
        }
        if fs_type == EXFAT && stat.stx_ino == EXFAT_ROOT {
            // It is set anew at each mount.
            id.btime = None;
        }
        id
    }

    /// Of what the row of a folder says.
    pub fn of_row(disk_ino: u64, btime: Option<Time>) -> Self {
        // A root of FAT has no times on the disk; all of them were born in 1970.
        let btime = btime.filter(|t| t.secs != 0);
        Self { volume: None, ino: Some(disk_ino), btime, fs_id: None, path_on_disk: None }
    }

    /// Whether both are one folder; `None`: there is nothing that would tell.
    pub fn is_same(&self, other: &Self) -> Option<bool> {
        let signs = [
            both(self.volume.as_ref(), other.volume.as_ref()),
            both(self.ino.as_ref(), other.ino.as_ref()),
            both(self.btime.as_ref(), other.btime.as_ref()),
            both(self.fs_id.as_ref(), other.fs_id.as_ref()),
        ];
        signs.into_iter().flatten().reduce(|all, sign| all && sign)
    }

    /// Whether the other one, found at another path than this was, is this one: no sign
    /// differs, none of the folder's is missing, and the file system is told by one as well.
    pub fn is_surely(&self, other: &Self) -> bool {
        let folder = [
            self.ino.is_none_or(|ino| other.ino == Some(ino)),
            self.btime.is_none_or(|btime| other.btime == Some(btime)),
        ];
        let disk = [
            both(self.volume.as_ref(), other.volume.as_ref()),
            both(self.fs_id.as_ref(), other.fs_id.as_ref()),
        ];
        self.is_same(other) == Some(true)
            && folder == [true; 2]
            && disk.into_iter().flatten().next().is_some()
    }

    /// Whether a file system of this device, type and number is another one than the folder's:
    /// asked before anything is looked for on it.
    pub(super) fn is_of_another_disk(
        &self,
        (major, minor): (u32, u32),
        fs_type: u64,
        fs_id: u64,
    ) -> bool {
        let volume = Self::volume_of((major, minor));
        // Each subvolume of btrfs has a number of its own.
        let fs_id = Some(fs_id).filter(|id| *id != 0 && fs_type == EXT);
        both(self.volume.as_ref(), volume.as_ref()) == Some(false)
            || both(self.fs_id.as_ref(), fs_id.as_ref()) == Some(false)
    }

    /// The name that is written on the file system of a device, as `udev` lists it.
    pub(super) fn volume_of((major, minor): (u32, u32)) -> Option<String> {
        volume_of(Path::new(VOLUMES), rustix::fs::makedev(major, minor))
    }

    /// This one with what was found besides: one that was noted without `udev`, or by an
    /// earlier build, tells less. Nothing that is known is given up.
    pub fn completed_by(&self, found: &Self) -> Self {
        Self {
            volume: self.volume.clone().or_else(|| found.volume.clone()),
            ino: self.ino.or(found.ino),
            btime: self.btime.or(found.btime),
            fs_id: self.fs_id.or(found.fs_id),
            path_on_disk: found.path_on_disk.clone().or_else(|| self.path_on_disk.clone()),
        }
    }
}

fn both<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> Option<bool> {
    Some(one? == other?)
}

/// The name of the file system on a device. None of this touches the file system itself.
fn volume_of(volumes: &Path, device: u64) -> Option<String> {
    let entries = fs::read_dir(volumes).ok()?.filter_map(Result::ok);
    let mut found = entries.filter(|e| fs::metadata(e.path()).is_ok_and(|m| m.rdev() == device));
    found.next()?.file_name().into_string().ok()
}

/// Whether the device of a mounted file system is gone. Its file system then still answers from
/// memory: with parts of directories, as if the rest had been deleted.
pub(super) fn is_unplugged(block_devices: &Path, (major, minor): (u32, u32)) -> bool {
    // Network and other file systems without a device of their own have the major number 0.
    if major == 0 {
        return false;
    }
    let listed = fs::symlink_metadata(block_devices.join(format!("{major}:{minor}")));
    let is_missing = listed.is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    // A container may hide the whole list, which says nothing.
    is_missing && fs::read_dir(block_devices).is_ok_and(|mut devices| devices.next().is_some())
}

/// Whether a file system of this type may tell at `close` that bytes were refused, as network
/// file systems and those of FUSE do. The common ones of disks have nothing to say then.
pub(super) fn reports_at_close(fs_type: u64) -> bool {
    !matches!(fs_type, EXT | XFS | BTRFS | F2FS | TMPFS | OVERLAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_told_by_every_sign_that_both_have() {
        let id = |volume: Option<&str>, ino, birth: Option<i64>| RootId {
            volume: volume.map(str::to_owned),
            ino,
            btime: birth.map(|secs| Time { secs, nanos: 0 }),
            fs_id: None,
            path_on_disk: None,
        };
        let on = |fs_id| RootId { fs_id: Some(fs_id), ..id(None, Some(2), Some(5)) };
        let cases = [
            // Two sticks of FAT, mounted one after the other.
            (id(Some("A"), None, None), id(Some("B"), None, None), Some(false)),
            (id(Some("A"), None, None), id(Some("A"), None, None), Some(true)),
            (id(None, None, None), id(None, None, None), None),
            (id(Some("A"), None, None), id(None, None, None), None),
            // Another folder of the same stick.
            (id(Some("A"), None, Some(5)), id(Some("A"), None, Some(6)), Some(false)),
            // The empty mount point below.
            (id(Some("A"), Some(2), Some(5)), id(Some("B"), Some(77), Some(6)), Some(false)),
            // Roots of file systems share inode numbers.
            (id(None, Some(2), Some(5)), id(None, Some(2), Some(6)), Some(false)),
            (id(None, Some(2), Some(5)), id(None, Some(3), Some(5)), Some(false)),
            (id(None, Some(2), Some(5)), id(None, Some(2), Some(5)), Some(true)),
            (id(None, Some(2), None), id(None, Some(2), Some(5)), Some(true)),
            (id(None, Some(2), None), id(None, Some(3), None), Some(false)),
            // Formatted in the same second.
            (on(7), on(8), Some(false)),
            (on(7), on(7), Some(true)),
            (on(7), id(None, Some(2), Some(5)), Some(true)),
            // Seen without `udev` the first time.
            (id(None, Some(2), Some(5)), id(Some("A"), Some(2), Some(5)), Some(true)),
        ];
        for (known, found, same) in cases {
            assert_eq!(known.is_same(&found), same, "{known:?} {found:?}");
            assert_eq!(found.is_same(&known), same, "{found:?} {known:?}");
        }
    }

    #[test]
    fn elsewhere_it_is_the_folder_only_if_the_disk_is_told_and_nothing_is_missing() {
        let id = |volume: Option<&str>, ino, fs_id| {
            let btime = Some(Time { secs: 5, nanos: 0 });
            let volume = volume.map(str::to_owned);
            RootId { volume, ino: Some(ino), btime, fs_id, path_on_disk: Some("/a".into()) }
        };
        let known = id(Some("A"), 2, Some(7));
        let cases = [
            (known.clone(), true),
            (id(None, 2, Some(7)), true),
            (id(Some("A"), 2, None), true),
            // The folder alone does not tell the disk, nor the disk the folder.
            (id(None, 2, None), false),
            (id(Some("A"), 3, Some(7)), false),
            (id(Some("B"), 2, Some(7)), false),
            (RootId { btime: None, ..known.clone() }, false),
        ];
        for (found, is_it) in cases {
            assert_eq!(known.is_surely(&found), is_it, "{found:?}");
        }
    }

    #[test]
    fn another_disk_says_so_by_its_number() {
        let known = |fs_id| RootId { fs_id, ..RootId::of_row(2, None) };
        let is_another =
            |known: RootId, fs_type, fs_id| known.is_of_another_disk((0, 9), fs_type, fs_id);
        assert!(is_another(known(Some(7)), EXT, 8));
        for (known, fs_type, fs_id) in [
            (known(Some(7)), EXT, 7),
            (known(None), EXT, 8),
            // Of btrfs it is that of the subvolume, of others that of the device.
            (known(Some(7)), BTRFS, 8),
            (known(Some(7)), XFS, 8),
        ] {
            assert!(!is_another(known, fs_type, fs_id));
        }
    }

    #[test]
    fn a_birth_in_1970_is_none() {
        let born = |secs| RootId::of_row(1, Some(Time { secs, nanos: 0 })).btime;
        assert_eq!((born(0), born(1)), (None, Some(Time { secs: 1, nanos: 0 })));
    }

    #[test]
    fn a_device_that_is_not_listed_is_unplugged() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_unplugged(dir.path(), (8, 1)), "an empty list says nothing");
        fs::write(dir.path().join("8:1"), b"").unwrap();
        assert!(!is_unplugged(dir.path(), (8, 1)));
        assert!(is_unplugged(dir.path(), (8, 2)));
        assert!(!is_unplugged(dir.path(), (0, 33)), "it has no device");
        assert!(!is_unplugged(&dir.path().join("none"), (8, 2)));
    }

    #[test]
    fn only_file_systems_with_something_to_say_are_asked_at_close() {
        const NFS: u64 = 0x6969;
        const FUSE: u64 = 0x6573_5546;
        assert!(reports_at_close(NFS) && reports_at_close(FUSE));
        assert!(!reports_at_close(EXT) && !reports_at_close(TMPFS));
    }
}
