//! Waiting for a condition, never for a while.

use std::fmt::Display;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Looks until `condition` gives a value; panics with `what` when the deadline passes.
#[track_caller]
pub fn wait_for<T>(
    what: impl Display,
    deadline: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < deadline, "after {deadline:?} still waiting for: {what}");
        std::thread::sleep(POLL);
    }
}

/// [`wait_for`] a condition that is true or false.
#[track_caller]
pub fn wait_until(what: impl Display, deadline: Duration, mut condition: impl FnMut() -> bool) {
    wait_for(what, deadline, || condition().then_some(()));
}

/// Runs something that must come back in time, on a thread of its own, so that a hang is a
/// failure; says how long it took.
#[track_caller]
pub fn within<T: Send + 'static>(
    what: impl Display,
    deadline: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> (T, Duration) {
    let (done, result) = mpsc::channel();
    let began = Instant::now();
    std::thread::spawn(move || {
        let value = work();
        // Nobody listens when the deadline has passed.
        let _ = done.send((value, began.elapsed()));
    });
    match result.recv_timeout(deadline) {
        Ok((value, took)) => {
            assert!(took <= deadline, "{what} took {took:?}, more than {deadline:?}");
            (value, took)
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{what} took more than {deadline:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{what} panicked"),
    }
}
