//! Steps at which tests of the whole program let it die: built in with the feature `failpoints`.
//!
//! `SD_FAIL_POINTS=apply::exchange=3,journal::synced` kills the process without a word
//! (`SIGKILL`), as a crash would, when it comes to `apply::exchange` for the third time, or to
//! `journal::synced` for the first.

/// A step, by its name.
#[cfg(not(feature = "failpoints"))]
pub(crate) fn fail_point(_step: &'static str) {}

/// A step, by its name.
#[cfg(feature = "failpoints")]
pub(crate) fn fail_point(step: &'static str) {
    use std::collections::HashMap;
    use std::sync::{Mutex, OnceLock, PoisonError};
    static LEFT: OnceLock<Mutex<HashMap<String, u64>>> = OnceLock::new();
    let left = LEFT.get_or_init(|| {
        let wanted = std::env::var("SD_FAIL_POINTS").unwrap_or_default();
        let wanted = wanted.split(',').filter(|part| !part.is_empty()).map(|part| {
            let (step, times) = part.split_once('=').unwrap_or((part, "1"));
            (step.to_owned(), times.parse().unwrap_or(1))
        });
        Mutex::new(wanted.collect())
    });
    let mut left = left.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(times) = left.get_mut(step) else { return };
    *times = times.saturating_sub(1);
    if *times == 0 {
        let me = rustix::process::getpid();
        let _ = rustix::process::kill_process(me, rustix::process::Signal::KILL);
    }
}
