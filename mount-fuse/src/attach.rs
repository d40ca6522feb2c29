//! Attaching a FUSE device to a mount point and detaching it again.
//!
//! root does it with `mount(2)` and `umount2(2)`. Anyone else asks the set-uid
//! `fusermount3`, which hands the device back over a socket. `fuser` could do
//! this too, but it turns every unmount of an ordinary user into a lazy one,
//! so that a busy mount is never reported, and unmounts a second time when the
//! session is dropped, which may hit somebody else's mount; so it is given the
//! finished device.

use crate::error::MountError;
use crate::mounts::{FS_TYPE, SOURCE};
use crate::session::MountOptions;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::ffi::CString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Output, Stdio};

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";

/// How a mount is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detach {
    /// Only when nothing uses it.
    WhenIdle,
    /// From the tree at once; what is open stays open.
    Lazily,
}

/// Mounts on `mountpoint`, a path as [`crate::mounts::spelled`] gives it. The kernel's first
/// request is waiting in the returned device.
pub(crate) fn attach(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    if !rustix::process::geteuid().is_root() {
        return attach_by_helper(mountpoint, options);
    }
    match attach_directly(mountpoint, options) {
        // root of a container, without CAP_SYS_ADMIN
        Err(MountError::Os { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            attach_by_helper(mountpoint, options)
        }
        result => result,
    }
}

fn attach_directly(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let device = open_device().map_err(|source| MountError::NoFuse { source })?;
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        if options.allow_other { ",allow_other" } else { "" },
    );
    let data = CString::new(data).expect("numbers and words have no NUL");
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, options.read_only);
    rustix::mount::mount(SOURCE, mountpoint, FS_TYPE, flags, data.as_c_str())
        .map_err(|errno| MountError::os("cannot mount on", mountpoint, errno))?;
    Ok(device)
}

/// A new, unattached FUSE device. Also tells whether this user may open more of them.
pub(crate) fn open_device() -> io::Result<OwnedFd> {
    std::fs::OpenOptions::new().read(true).write(true).open(DEVICE).map(OwnedFd::from)
}

fn attach_by_helper(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| MountError::os("cannot make a socket for", HELPER, errno))?;
    let child = Command::new(HELPER)
        .args(["-o", &helper_options(options), "--"])
        .arg(mountpoint)
        // The helper's end of the socket is its standard input: inherited by it alone.
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(helper_did_not_start)?;
    let device = receive_device(&ours);
    let output = child
        .wait_with_output()
        .map_err(|error| MountError::os("cannot wait for", HELPER, error))?;
    device.ok().flatten().filter(|_| output.status.success()).ok_or_else(|| helper_refused(&output))
}

fn helper_options(options: &MountOptions) -> String {
    let subtype = FS_TYPE.rsplit('.').next().unwrap_or_default();
    let mut text = format!("fsname={SOURCE},subtype={subtype},nosuid,nodev,default_permissions");
    if options.read_only {
        text.push_str(",ro");
    }
    if options.allow_other {
        text.push_str(",allow_other");
    }
    text
}

/// `None` when the helper closed the socket without sending a device.
fn receive_device(socket: impl AsFd) -> io::Result<Option<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    loop {
        let received = rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        );
        match received {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
            Ok(_) => break,
        }
    }
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut devices) => devices.next(),
        _ => None,
    }))
}

fn helper_did_not_start(error: io::Error) -> MountError {
    match error.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => MountError::os("cannot run", HELPER, error),
    }
}

fn helper_refused(output: &Output) -> MountError {
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if message.contains("user_allow_other") {
        return MountError::AllowOtherForbidden;
    }
    if message.contains(&format!("open {DEVICE}")) {
        let source = io::Error::new(io::ErrorKind::PermissionDenied, message);
        return MountError::NoFuse { source };
    }
    match message.is_empty() {
        true => MountError::Helper { message: format!("{HELPER} failed: {}", output.status) },
        false => MountError::Helper { message },
    }
}

/// Takes the mount away. [`MountError::Busy`] comes without holders; the caller looks for them.
pub(crate) fn detach(mountpoint: &Path, how: Detach) -> Result<(), MountError> {
    let lazily = match how {
        Detach::WhenIdle => UnmountFlags::empty(),
        Detach::Lazily => UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW | lazily) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => detach_by_helper(mountpoint, how),
        Err(Errno::BUSY) => Err(busy(mountpoint)),
        Err(Errno::INVAL | Errno::NOENT) => {
            Err(MountError::NotMounted { path: mountpoint.to_owned() })
        }
        Err(errno) => Err(MountError::os("cannot unmount", mountpoint, errno)),
    }
}

fn busy(mountpoint: &Path) -> MountError {
    MountError::Busy { path: mountpoint.to_owned(), holders: Vec::new() }
}

fn detach_by_helper(mountpoint: &Path, how: Detach) -> Result<(), MountError> {
    let output = Command::new(HELPER)
        .arg(match how {
            Detach::WhenIdle => "-u",
            Detach::Lazily => "-uz",
        })
        .arg("--")
        .arg(mountpoint)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(helper_did_not_start)?;
    if output.status.success() {
        return Ok(());
    }
    // The helper tells its reasons apart by `strerror` only.
    let message = String::from_utf8_lossy(&output.stderr);
    if message.contains("busy") {
        Err(busy(mountpoint))
    } else if message.contains("not found in") || message.contains("not mounted") {
        Err(MountError::NotMounted { path: mountpoint.to_owned() })
    } else {
        Err(helper_refused(&output))
    }
}

/// Breaks the connection between the kernel and the daemon: every waiting request fails at
/// once, every later one with `ENOTCONN`.
///
/// root does it through `umount2`, which works where `/sys/fs/fuse/connections` is not
/// mounted; an ordinary user owns the file there.
pub(crate) fn abort(mountpoint: &Path, device: crate::mounts::DeviceNo) -> io::Result<()> {
    let file = format!("/sys/fs/fuse/connections/{}/abort", device.minor);
    std::fs::write(&file, "1").or_else(|error| {
        // Busy is the expected answer: the abort comes before the attempt to unmount.
        match rustix::mount::unmount(mountpoint, UnmountFlags::NOFOLLOW | UnmountFlags::FORCE) {
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(_) => Err(error),
        }
    })
}
