//! Ending a connection from outside, when nobody is left to serve it.

use crate::mounts::DeviceNo;
use rustix::mount::MountFlags;
use std::io;
use std::path::{Path, PathBuf};

/// Where the kernel has a directory for each FUSE connection, named by its minor number
/// (`Documentation/filesystems/fuse.rst`, "Control filesystem").
const CONTROL: &str = "/sys/fs/fuse/connections";

/// Has the kernel give up on a mount's server: every request that waits for it fails, as do all
/// later ones. The mount stays, dead. Nothing happens to a mount that is gone. Allowed to
/// the user who mounted it.
pub fn abort(device: DeviceNo) -> io::Result<()> {
    match write_abort(device) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && !is_control_mounted() => {
            // A service manager mounts it at the start of the machine; not all have one.
            rustix::mount::mount("fusectl", CONTROL, "fusectl", MountFlags::empty(), None)?;
            ignore_gone(write_abort(device))
        }
        written => ignore_gone(written),
    }
}

fn write_abort(device: DeviceNo) -> io::Result<()> {
    let connection: PathBuf =
        [Path::new(CONTROL), Path::new(&device.minor.to_string())].iter().collect();
    std::fs::write(connection.join("abort"), "1")
}

fn is_control_mounted() -> bool {
    crate::mounts::on(Path::new(CONTROL)).is_some()
}

fn ignore_gone(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}
