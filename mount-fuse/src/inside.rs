//! What is mounted on names inside one file system.
//!
//! When the kernel is told that a name is gone, or is another file, it takes away whatever is
//! mounted on that name or below it (`d_invalidate`), in every mount namespace. So before a name
//! is said to be gone for the moment of a call, it is looked up here whether anything would go.
//!
//! A mount's place in the file system is what its parent mount shows there, which need not be
//! beneath the drive's mount point: a bind mount shows a part of it elsewhere, and containers have
//! mounts of their own. The kernel says when this namespace's table has got or lost a mount, so
//! that looking costs a `poll` where nothing is mounted inside the drive; other namespaces are
//! read now and then, as far as this user may see them.

use crate::mounts::{self, DeviceNo, MountInfo};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// More namespaces than any machine has that a drive is used on; reading them takes time.
const NAMESPACES_MAX: usize = 64;

/// The names of one file system on which something is mounted.
pub(crate) struct Inside {
    device: DeviceNo,
    /// This namespace's table, which tells of its changes while it is open.
    table: Option<File>,
    here: HashSet<PathBuf>,
    elsewhere: HashSet<PathBuf>,
}

impl Inside {
    pub(crate) fn new(device: DeviceNo) -> Self {
        Self { device, table: None, here: HashSet::new(), elsewhere: HashSet::new() }
    }

    /// Whether something is mounted on this path of the file system, or below it; also when that
    /// cannot be known.
    pub(crate) fn has_at_or_below(&mut self, path: &Path) -> bool {
        if let Err(error) = self.refresh() {
            tracing::warn!(%error, "cannot read /proc/self/mountinfo");
            self.table = None;
            return true;
        }
        [&self.here, &self.elsewhere].iter().any(|mounted| any_at_or_below(mounted, path))
    }

    /// Reads the table, unless nothing was in it and it has not changed: of a mount that goes with
    /// its directory to another name, nothing is said.
    fn refresh(&mut self) -> io::Result<()> {
        let table = match &mut self.table {
            // First whether it changes from now on, then what is in it.
            Some(table) if !has_changed(table)? && self.here.is_empty() => return Ok(()),
            Some(table) => table,
            table => table.insert(File::open("/proc/self/mountinfo")?),
        };
        let mut text = Vec::new();
        table.rewind()?;
        table.read_to_end(&mut text)?;
        self.here = within(&mounts::parse(&text), self.device);
        Ok(())
    }

    /// Reads what is mounted in other namespaces, of which no change is told.
    pub(crate) fn look_elsewhere(&mut self) {
        self.elsewhere = foreign_processes()
            .into_iter()
            .filter_map(|process| std::fs::read(process.join("mountinfo")).ok())
            .flat_map(|text| within(&mounts::parse(&text), self.device))
            .collect();
    }
}

fn any_at_or_below(mounted: &HashSet<PathBuf>, path: &Path) -> bool {
    mounted.iter().any(|mounted| mounted.starts_with(path))
}

/// The kernel marks a table's file as soon as a mount came or went after this was asked.
fn has_changed(table: &File) -> io::Result<bool> {
    let mut polled = [PollFd::new(table, PollFlags::PRI)];
    rustix::event::poll(&mut polled, Some(&Timespec::default()))?;
    Ok(polled[0].revents().intersects(PollFlags::PRI | PollFlags::ERR))
}

/// One process of each mount namespace but this one.
fn foreign_processes() -> Vec<PathBuf> {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
    let mut known: HashSet<OsString> =
        namespace(Path::new("/proc/self")).into_iter().map(PathBuf::into_os_string).collect();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_pid = |name: &std::ffi::OsStr| name.as_bytes().iter().all(u8::is_ascii_digit);
    processes
        .filter_map(|entry| entry.ok().filter(|e| is_pid(&e.file_name())).map(|e| e.path()))
        .filter(|process| namespace(process).is_some_and(|of| known.insert(of.into_os_string())))
        .take(NAMESPACES_MAX)
        .collect()
}

/// The paths of this file system, from its root, on which others of these mounts are.
fn within(table: &[MountInfo], device: DeviceNo) -> HashSet<PathBuf> {
    let parents = || table.iter().filter(|mount| mount.device == device);
    table
        .iter()
        .filter_map(|mount| {
            let parent = parents().find(|parent| parent.id == mount.parent)?;
            let below = mount.mountpoint.strip_prefix(&parent.mountpoint).ok()?;
            let root = parent.root.strip_prefix("/").ok()?;
            Some(root.join(below))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceNo = DeviceNo { major: 0, minor: 50 };

    fn mounted(text: &str) -> HashSet<PathBuf> {
        within(&mounts::parse(text.as_bytes()), DEVICE)
    }

    #[test]
    fn a_mount_is_found_by_its_name_and_those_above_it() {
        let mounted = mounted(
            "30 1 8:1 / / rw - ext4 /dev/a rw\n\
             40 30 0:50 / /mnt/drive rw - fuse.sd spacedrive rw\n\
             41 40 0:60 / /mnt/drive/nas/a\\040b/sub rw - tmpfs none rw\n",
        );
        for path in ["nas", "nas/a b", "nas/a b/sub"] {
            assert!(any_at_or_below(&mounted, Path::new(path)), "{path}");
        }
        for path in ["nas/a", "nas/a b/su", "nas/a b/sub/further", "mnt"] {
            assert!(!any_at_or_below(&mounted, Path::new(path)), "{path}");
        }
    }

    #[test]
    fn a_mount_is_found_that_is_made_where_a_part_of_the_drive_is_shown() {
        let mounted = mounted(
            "30 1 8:1 / / rw - ext4 /dev/a rw\n\
             40 30 0:50 / /mnt/drive rw - fuse.sd spacedrive rw\n\
             42 30 0:50 /nas/films /srv/films rw - fuse.sd spacedrive rw\n\
             43 42 0:60 / /srv/films/new rw - tmpfs none rw\n\
             44 30 0:61 / /mnt/drive/nas/hidden rw - tmpfs none rw\n",
        );
        assert!(any_at_or_below(&mounted, Path::new("nas/films/new")));
        assert!(!any_at_or_below(&mounted, Path::new("nas/films/old")));
        // It is on a directory that the drive covers, not on one of the drive.
        assert!(!any_at_or_below(&mounted, Path::new("nas/hidden")));
    }

    #[test]
    fn this_namespace_is_not_read_as_another() {
        let mine = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        for process in foreign_processes() {
            // It may have ended meanwhile.
            let other = std::fs::read_link(process.join("ns/mnt"));
            assert!(other.is_err() || other.is_ok_and(|other| other != mine));
        }
    }
}
