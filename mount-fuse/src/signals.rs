//! The signals that end a program's waiting for an answer of ours.
//!
//! The kernel passes `INTERRUPT` on, `fuser` does not; and once a request has reached the daemon
//! even `SIGKILL` ends it only with an answer. So while a program waits, `/proc` is asked now and
//! then whether a signal waits for it. Then it is answered, upon which the kernel delivers the
//! signal: who waits for a lock with `EINTR`, and its call starts anew where its handler wants
//! that; who writes with what it wrote.

use rustix::process::Pid;

/// A set of signals, as `/proc` and the kernel have it: the first is bit 0.
type Set = u64;

const fn set(signals: &[i32]) -> Set {
    let (mut all, mut n) = (0, 0);
    while n < signals.len() {
        all |= 1 << (signals[n] - 1);
        n += 1;
    }
    all
}

/// What people end programs with: HUP, INT, QUIT and TERM.
const ASKS_TO_END: Set = set(&[1, 2, 3, 15]);
/// What does not end a program that has no handler for it: CHLD, CONT, STOP, TSTP, TTIN, TTOU,
/// URG and WINCH.
const HARMLESS: Set = set(&[17, 18, 19, 20, 21, 22, 23, 28]);

/// The signals of one thread.
#[derive(Debug)]
struct Signals {
    /// Wait to be delivered, to it or to its process.
    pending: Set,
    blocked: Set,
    ignored: Set,
    caught: Set,
}

impl Signals {
    fn parse(status: &str) -> Self {
        let mask = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field));
            line.and_then(|mask| Set::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
        };
        Self {
            pending: mask("SigPnd:") | mask("ShdPnd:"),
            blocked: mask("SigBlk:"),
            ignored: mask("SigIgn:"),
            caught: mask("SigCgt:"),
        }
    }

    /// The thread has something to do before it may go on.
    fn interrupt(&self) -> bool {
        self.pending & !self.blocked != 0
    }

    /// The program ends of it, or a person asks it to. A timer or a child of a program that has
    /// a handler for them is no reason.
    fn end(&self) -> bool {
        let arriving = self.pending & !self.blocked & !self.ignored;
        arriving & (ASKS_TO_END | !self.caught & !HARMLESS) != 0
    }
}

/// Whether a signal waits for this thread, which waits for an answer of ours. One of another
/// PID namespace cannot be looked at, and is answered when there is an answer.
pub(crate) fn is_signalled(thread: u32) -> bool {
    is_so(thread, Signals::interrupt)
}

/// Whether one of them is to end the program.
pub(crate) fn ends(thread: u32) -> bool {
    is_so(thread, Signals::end)
}

fn is_so(thread: u32, what: fn(&Signals) -> bool) -> bool {
    let Some(thread) = i32::try_from(thread).ok().and_then(Pid::from_raw) else { return false };
    let path = format!("/proc/{}/status", thread.as_raw_nonzero());
    match std::fs::read_to_string(path) {
        Ok(status) => what(&Signals::parse(&status)),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: &str = "0000000000000000";
    const INT: &str = "0000000000000002";
    const KILL: &str = "0000000000000100";
    const ALARM: &str = "0000000000002000";
    const CHILD: &str = "0000000000010000";

    fn signals([own, shared, blocked, ignored, caught]: [&str; 5]) -> Signals {
        Signals::parse(&format!(
            "Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t{blocked}\n\
             SigIgn:\t{ignored}\nSigCgt:\t{caught}\n"
        ))
    }

    #[test]
    fn a_pending_signal_counts_unless_it_is_blocked() {
        assert!(signals([KILL, NONE, NONE, NONE, NONE]).interrupt());
        assert!(signals([NONE, ALARM, INT, NONE, NONE]).interrupt());
        assert!(!signals([NONE, ALARM, ALARM, NONE, NONE]).interrupt());
        assert!(!is_signalled(std::process::id()) && !ends(std::process::id()));
    }

    #[test]
    fn only_a_signal_that_is_to_end_the_program_ends_a_write() {
        for ends in [
            [KILL, NONE, NONE, NONE, NONE],
            [NONE, INT, NONE, NONE, NONE],
            [NONE, INT, NONE, NONE, INT],
            [NONE, ALARM, NONE, NONE, NONE],
        ] {
            assert!(signals(ends).end(), "{ends:?}");
        }
        for goes_on in [
            [NONE, NONE, NONE, NONE, NONE],
            [NONE, INT, INT, NONE, NONE],
            [NONE, INT, NONE, INT, NONE],
            [NONE, ALARM, NONE, NONE, ALARM],
            [NONE, CHILD, NONE, NONE, NONE],
        ] {
            assert!(!signals(goes_on).end(), "{goes_on:?}");
        }
    }
}
