//! A small disk of a test's own, to be filled.

use crate::proc;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const MAKING: Duration = Duration::from_secs(60);

/// An ext4 file system in a file, mounted; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    mountpoint: PathBuf,
}

impl SmallDisk {
    /// Makes a file system of `bytes` in `image` and mounts it at `mountpoint`.
    #[track_caller]
    pub fn mount(image: &Path, mountpoint: &Path, bytes: u64) -> Self {
        File::create(image).and_then(|file| file.set_len(bytes)).expect("the disk's image");
        let mut mkfs = Command::new("mkfs.ext4");
        // All roots are born in one second, as of disks that a script formats.
        mkfs.env("E2FSPROGS_FAKE_TIME", "1700000000").args(["-q", "-m", "0"]).arg(image);
        proc::run(&mut mkfs, MAKING).ok();
        std::fs::create_dir_all(mountpoint).expect("a mount point");
        proc::run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(mountpoint), MAKING)
            .ok();
        let _ = std::fs::remove_dir(mountpoint.join("lost+found"));
        Self { mountpoint: mountpoint.to_owned() }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.mountpoint).status();
    }
}

/// A file system in memory; unmounted when dropped. A device whose files are on one waits for no
/// disk that another device uses.
#[derive(Debug)]
pub struct MemoryDisk {
    mountpoint: PathBuf,
}

impl MemoryDisk {
    /// Mounts one that is empty.
    #[track_caller]
    pub fn mount(mountpoint: &Path) -> Self {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "mode=755", "none"]).arg(mountpoint);
        proc::run(&mut mount, MAKING).ok();
        Self { mountpoint: mountpoint.to_owned() }
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        // One below a device's folder is gone with the device.
        let _ =
            Command::new("umount").arg("-l").arg(&self.mountpoint).stderr(Stdio::null()).status();
    }
}
