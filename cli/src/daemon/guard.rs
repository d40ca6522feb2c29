//! A small process beside the daemon, which ends the drive's connections when the daemon was
//! killed.
//!
//! A thread that tells the kernel of a change waits for the lock of a directory. A program
//! that is in a call on that directory has the lock, and waits for the daemon's answer. Is the
//! daemon killed just then, nobody answers; and as that one thread cannot be killed where it
//! waits, the daemon's descriptors stay open, the kernel does not see that its server is
//! gone, and program, thread and mount wait for each other for ever. Giving up the connection
//! is the only way out, and somebody else has to do it.

use crate::failure::{Failure, Outcome};
use mount_fuse::DeviceNo;
use rustix::process::Signal;
use std::io::{self, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::signal::unix::{SignalKind, signal};

/// How long what the daemon wrote may take to be read.
const LAST_WORD: Duration = Duration::from_millis(100);

/// The daemon's end of the guard.
#[derive(Default)]
pub struct Guard(Mutex<Option<(Child, ChildStdin)>>);

impl Guard {
    /// Starts it if need be. To be called on the daemon's first thread: the kernel tells a
    /// child of the end of the thread that made it, not of the process.
    pub fn start(&self) {
        let mut running = self.lock();
        if running.is_some() {
            return;
        }
        match spawn() {
            Ok(guard) => *running = Some(guard),
            Err(error) => tracing::warn!(
                %error, "no guard: programs may hang on the drive if the daemon is killed"
            ),
        }
    }

    /// These are the mounts now.
    pub fn watch(&self, mounts: &[DeviceNo]) {
        let Some((_, pipe)) = &mut *self.lock() else { return };
        let minors: Vec<_> = mounts.iter().map(|device| device.minor.to_string()).collect();
        if let Err(error) = writeln!(pipe, "{}", minors.join(" ")) {
            tracing::warn!(%error, "the guard is gone");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Child, ChildStdin)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some((mut child, pipe)) = self.lock().take() {
            drop(pipe);
            // It ends at once: nothing is mounted any more.
            let _ = child.wait();
        }
    }
}

fn spawn() -> io::Result<(Child, ChildStdin)> {
    use std::os::unix::process::CommandExt;
    let mut child = Command::new("/proc/self/exe")
        .args(["daemon", "guard"])
        // What ends the daemon by a key must not end this first.
        .process_group(0)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let pipe = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
    Ok((child, pipe))
}

/// The guard: waits for the daemon's end, and gives up the mounts that it left.
pub fn run() -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::io("cannot start the guard", e))?;
    let left = runtime.block_on(daemons_end()).map_err(|e| Failure::io("cannot guard", e))?;
    // A thread of it still reads.
    runtime.shutdown_background();
    // What was unmounted by others may be somebody else's number by now.
    let ours = mount_fuse::mounts().into_iter().filter(|m| left.contains(&m.device.minor));
    for mount in ours {
        // There is nobody to tell.
        let _ = mount_fuse::abort(mount.device);
    }
    Ok(())
}

/// Gives the minor numbers of what the daemon had mounted when it ended.
async fn daemons_end() -> io::Result<Vec<u32>> {
    rustix::process::set_parent_process_death_signal(Some(Signal::USR1))?;
    let mut ended = signal(SignalKind::user_defined1())?;
    // What ends a whole group of processes in order ends the daemon first, and that this.
    let _ignored =
        [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut mounts = Vec::new();
    let mut has_ended = false;
    loop {
        tokio::select! {
            biased;
            line = lines.next_line() => match line? {
                Some(line) => mounts = line.split(' ').filter_map(|n| n.parse().ok()).collect(),
                None => return Ok(mounts),
            },
            _ = ended.recv(), if !has_ended => has_ended = true,
            // Its last word may be on its way; the end of the pipe may never come.
            () = tokio::time::sleep(LAST_WORD), if has_ended => return Ok(mounts),
        }
    }
}
