//! The process that makes calls through a mount for the sake of their events.
//!
//! It is a process, not a thread of the daemon: while it waits in a call it holds the lock of a
//! directory, and if the daemon is killed just then, it must neither keep the daemon's end of
//! the connection open nor the daemon's memory alive. It waits for nobody but the kernel and
//! the daemon, and ends when the daemon does.
//!
//! Before each batch of calls it opens the mount and asks it for an attribute whose name and value
//! the daemon drew for this helper ([`Proof`]). So the daemon learns by which number FUSE
//! knows the helper, whatever PID namespaces lie between; and the helper, that it is in the right
//! mount. It then makes every call beneath that descriptor: what is mounted elsewhere, or
//! in place of this mount later, is never touched. Calls go one at a time, over a socket
//! that is its standard input: a length, then fields joined by NUL, which no name contains.

use crate::stage::Proof;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

/// Longer than any message: two paths and two names.
const MESSAGE_MAX: usize = 64 << 10;
/// How long one call may take before the helper is ended.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long is waited for its end before a thread of its own does.
const END_PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How the helper is started: a program that calls [`run_helper`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelperCommand {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

/// From now on a child that ends keeps its number until it is waited for, also if the program that
/// started the daemon left it SIGCHLD ignored.
pub(crate) fn keep_children(runtime: &Handle) -> io::Result<()> {
    let _runtime = runtime.enter();
    signal(SignalKind::child()).map(drop)
}

/// The daemon's end of it.
pub(crate) struct Helper {
    child: Child,
    socket: UnixStream,
    proof: Proof,
}

impl Helper {
    pub(crate) fn start(command: &HelperCommand, proof: &Proof) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new(&command.program)
            .args(&command.arguments)
            // What ends the daemon by a key must not end this first.
            .process_group(0)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        ours.set_read_timeout(Some(CALL_TIMEOUT))?;
        ours.set_write_timeout(Some(CALL_TIMEOUT))?;
        Ok(Self { child, socket: ours, proof: proof.clone() })
    }

    /// Lets it into the mount; now, and only until [`Helper::close`], it can make calls.
    pub(crate) fn open(&mut self, mountpoint: &[u8]) -> io::Result<()> {
        let Proof { name, value } = self.proof.clone();
        self.call(&[b"open", mountpoint, name.as_bytes(), value.as_bytes()])?.map_err(Into::into)
    }

    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.call(&[b"close"])?.map_err(Into::into)
    }

    /// Has one call made; the outer error means that the helper is of no use any more.
    pub(crate) fn call(&mut self, fields: &[&[u8]]) -> io::Result<Result<(), Errno>> {
        send(&mut self.socket, &fields.join(&0))?;
        Ok(match receive_number(&mut self.socket)? {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno.cast_signed())),
        })
    }

    /// Ends it; when it makes no call any more `ended` is called, before its number can become
    /// another process's. A call may wait in the kernel for other programs, which nothing ends:
    /// then the thread that waits for it is given.
    pub(crate) fn end(
        mut self,
        ended: impl FnOnce() + Send + 'static,
    ) -> Option<thread::JoinHandle<()>> {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let _ = self.child.kill();
        wait_for_end(&self.child);
        let mut child = self.child;
        let wait = move || {
            keep_until_end(&child);
            ended();
            let status = child.wait().ok();
            tracing::debug!(signal = status.and_then(|s| s.signal()), "the helper ended");
        };
        thread::Builder::new().name("sd-events-end".into()).spawn(wait).ok()
    }
}

/// Waits for the end of a child for a while.
fn wait_for_end(child: &Child) {
    let process = pid_of(child).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    if let Some(process) = process {
        let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&END_PATIENCE));
    }
}

/// Waits until a child has ended; it keeps its number.
fn keep_until_end(child: &Child) {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    if let Some(pid) = pid_of(child) {
        while waitid(WaitId::Pid(pid), options).is_err_and(|e| e == Errno::INTR) {}
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    Pid::from_raw(child.id().cast_signed())
}

fn send(socket: &mut UnixStream, message: &[u8]) -> io::Result<()> {
    let len = u32::try_from(message.len()).map_err(io::Error::other)?;
    socket.write_all(&[&len.to_ne_bytes(), message].concat())
}

fn receive_number(socket: &mut UnixStream) -> io::Result<u32> {
    let mut number = [0; 4];
    socket.read_exact(&mut number)?;
    Ok(u32::from_ne_bytes(number))
}

/// The helper itself: makes the calls that come over the standard input, until it ends.
///
/// # Errors
/// When the standard input is not the daemon's.
pub fn run_helper() -> io::Result<()> {
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut mount = None;
    loop {
        let len = match receive_number(&mut socket) {
            Ok(len) => len as usize,
            Err(_) => return Ok(()),
        };
        if len > MESSAGE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut message = vec![0; len];
        socket.read_exact(&mut message)?;
        let fields: Vec<&[u8]> = message.split(|b| *b == 0).collect();
        let errno = obey(&mut mount, &fields).err().map_or(0, Errno::raw_os_error);
        socket.write_all(&errno.to_ne_bytes())?;
    }
}

fn obey(mount: &mut Option<OwnedFd>, fields: &[&[u8]]) -> Result<(), Errno> {
    match (fields, &*mount) {
        ([b"open", path, name, value], _) => {
            *mount = None;
            *mount = Some(open_mount(path, name, value)?);
            Ok(())
        }
        ([b"close"], _) => {
            *mount = None;
            Ok(())
        }
        (_, None) => Err(Errno::BADF),
        ([b"make", kind, dir, name], Some(mount)) => make(&beneath(mount, dir)?, kind, name),
        ([b"remove", kind, dir, name], Some(mount)) => {
            let flags = if *kind == b"d" { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            rustix::fs::unlinkat(beneath(mount, dir)?, *name, flags)
        }
        ([b"move", dir, name, new_dir, new_name], Some(mount)) => {
            let (dir, new_dir) = (beneath(mount, dir)?, beneath(mount, new_dir)?);
            rustix::fs::renameat(dir, *name, new_dir, *new_name)
        }
        // The time of the last change alone says that the bytes did, both times that attributes
        // did (`fsnotify_change` of the kernel). Neither needs the right to write.
        ([b"modify", dir, name], Some(mount)) => touch(mount, dir, name, rustix::fs::UTIME_OMIT),
        ([b"touch", dir, name], Some(mount)) => touch(mount, dir, name, 0),
        ([b"written", dir, name], Some(mount)) => open_and_close(mount, dir, name),
        _ => Err(Errno::INVAL),
    }
}

fn open_mount(path: &[u8], name: &[u8], value: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mount = rustix::fs::open(path, flags, Mode::empty())?;
    let mut found = [0; Proof::VALUE_LEN];
    let len = rustix::fs::fgetxattr(&mount, name, &mut found)?;
    match len == found.len() && found == value {
        true => Ok(mount),
        false => Err(Errno::STALE),
    }
}

/// A file of this mount, reached over no link and no other mount.
fn beneath(mount: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    open_beneath(mount, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC)
}

fn open_beneath(mount: &OwnedFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(mount, path, flags, Mode::empty(), resolve)
}

fn make(dir: &OwnedFd, kind: &[u8], name: &[u8]) -> Result<(), Errno> {
    let mode = Mode::RUSR | Mode::WUSR;
    let file_type = match kind {
        b"d" => return rustix::fs::mkdirat(dir, name, mode),
        b"l" => return rustix::fs::symlinkat(".", dir, name),
        b"f" => FileType::RegularFile,
        b"p" => FileType::Fifo,
        b"s" => FileType::Socket,
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::mknodat(dir, name, file_type, mode, 0)
}

/// Files that are written to and closed are looked at by most programs then.
fn open_and_close(mount: &OwnedFd, dir: &[u8], name: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open_beneath(mount, &[dir, name].join(&b'/'), flags).map(drop)
}

fn touch(mount: &OwnedFd, dir: &[u8], name: &[u8], access_nsec: i64) -> Result<(), Errno> {
    let path = match name {
        [] => dir.to_owned(),
        name => [dir, name].join(&b'/'),
    };
    let file = beneath(mount, &path)?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: access_nsec },
        last_modification: Timespec { tv_sec: 0, tv_nsec: 0 },
    };
    rustix::fs::utimensat(file, "", &times, AtFlags::EMPTY_PATH)
}
