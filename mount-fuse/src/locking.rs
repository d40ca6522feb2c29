//! A program's locks in the drive's words, and the signals that end its waiting.
//!
//! The kernel passes `INTERRUPT` on, `fuser` does not; and once a request has reached the daemon
//! even `SIGKILL` ends it only with an answer. So while a program waits for a lock, `/proc` is
//! asked now and then whether a signal waits for it: then the answer is `EINTR`, upon which the
//! kernel delivers the signal, and starts the call anew where its handler wants that.

use fuser::LockOwner;
use rustix::process::Pid;
use vfs_core::drive::{HandleId, LockOf};
use vfs_core::error::{FsError, FsResult, Kind as ErrorKind};
use vfs_core::locks::{Ask, Holder, Mode, Span};

/// `l_type` of `struct flock`, as `<asm-generic/fcntl.h>` numbers them.
const F_RDLCK: i32 = 0;
const F_WRLCK: i32 = 1;
const F_UNLCK: i32 = 2;

/// The mode asked for; `None` gives back.
pub(crate) fn mode(l_type: i32) -> FsResult<Option<Mode>> {
    match l_type {
        F_RDLCK => Ok(Some(Mode::Shared)),
        F_WRLCK => Ok(Some(Mode::Exclusive)),
        F_UNLCK => Ok(None),
        _ => Err(FsError::new(ErrorKind::Invalid, "lock in an unknown way")),
    }
}

/// The reverse of [`mode`].
pub(crate) fn l_type(mode: Option<Mode>) -> i32 {
    match mode {
        Some(Mode::Shared) => F_RDLCK,
        Some(Mode::Exclusive) => F_WRLCK,
        None => F_UNLCK,
    }
}

/// What a request of the kernel asks for.
pub(crate) fn lock_of(
    handle: HandleId,
    owner: LockOwner,
    (first, last): (u64, u64),
    mode: Option<Mode>,
    pid: u32,
) -> FsResult<LockOf> {
    let span = Span::new(first, last);
    let span = span.ok_or_else(|| FsError::new(ErrorKind::Invalid, "lock a senseless range"))?;
    Ok(LockOf { handle, ask: Ask { holder: Holder(owner.0), pid, span, mode } })
}

/// Whether a signal waits for this thread, which waits for an answer of ours. One of another
/// PID namespace cannot be looked at, and is answered when its lock is there.
pub(crate) fn is_signalled(thread: u32) -> bool {
    let Some(thread) = i32::try_from(thread).ok().and_then(Pid::from_raw) else { return false };
    let path = format!("/proc/{}/status", thread.as_raw_nonzero());
    match std::fs::read_to_string(path) {
        Ok(status) => has_pending(&status),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Signals that are pending for the thread or its process, and not blocked.
fn has_pending(status: &str) -> bool {
    let mask = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_signal_counts_unless_it_is_blocked() {
        let status = |own, shared, blocked| {
            format!("Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t{blocked}\n")
        };
        let none = "0000000000000000";
        assert!(!has_pending(&status(none, none, none)));
        assert!(has_pending(&status("0000000000000100", none, none)));
        assert!(has_pending(&status(none, "0000000000004000", "0000000000000001")));
        assert!(!has_pending(&status(none, "0000000000004000", "0000000000004000")));
        assert!(!is_signalled(std::process::id()));
    }

    #[test]
    fn what_the_kernel_may_send_is_taken_apart() {
        for mode_asked in [None, Some(Mode::Shared), Some(Mode::Exclusive)] {
            assert_eq!(mode(l_type(mode_asked)).unwrap(), mode_asked);
        }
        assert!(mode(3).is_err());
        let owner = LockOwner(1);
        let lock = |range| lock_of(HandleId(1), owner, range, None, 1);
        assert!(lock((0, i64::MAX as u64)).is_ok());
        assert!(lock((0, u64::MAX)).is_err() && lock((2, 1)).is_err());
    }
}
