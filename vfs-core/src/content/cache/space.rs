//! How much of its disk the cache leaves to others, looked at before each write.

use super::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The disk is asked again after so many written bytes: others write to it too.
const ASK_EVERY_BYTES: u64 = 16 << 20;
/// Some file systems tell of freed space only when they have committed. For so long no more is
/// evicted than was missing.
const FREES_WITHIN: Duration = Duration::from_secs(10);

/// What is left free, and what may be written until the disk is asked again.
#[derive(Debug, Default)]
pub(super) struct Space {
    min_free_bytes: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    granted_bytes: u64,
    /// Evicted for the disk's sake.
    freed: Option<(u64, Instant)>,
    /// What was free before that.
    free_before: u64,
}

/// Whether there is space.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Claim {
    Granted,
    /// There will be if so much is evicted.
    Evict(u64),
    /// So much was evicted already, and the disk does not show it yet.
    Later,
}

impl Space {
    pub fn new(min_free_bytes: u64) -> Self {
        Self { min_free_bytes: min_free_bytes.into(), state: Mutex::default() }
    }

    pub fn min_free_bytes(&self) -> u64 {
        self.min_free_bytes.load(Ordering::Relaxed)
    }

    /// Says that so many more bytes are about to be written, or with 0 has the disk asked; `free`
    /// asks it, and has nothing to say of one that does not tell.
    pub fn claim(&self, bytes: u64, free: impl Fn() -> Option<u64>) -> Claim {
        let mut state = lock(&self.state);
        let granted = state.granted_bytes.checked_sub(bytes).filter(|_| bytes > 0);
        if let Some(rest) = granted {
            state.granted_bytes = rest;
            return Claim::Granted;
        }
        let Some(free) = free() else { return Claim::Granted };
        let wanted = self.min_free_bytes().saturating_add(bytes);
        if let Some(rest) = free.checked_sub(wanted) {
            let granted_bytes = (rest / 16).min(ASK_EVERY_BYTES);
            *state = State { granted_bytes, ..State::default() };
            return Claim::Granted;
        }
        let short = wanted - free;
        let lately = state.freed.filter(|(_, at)| at.elapsed() < FREES_WITHIN);
        let hidden = match lately {
            Some((freed, _)) => freed.saturating_sub(free.saturating_sub(state.free_before)),
            None => {
                state.free_before = free;
                0
            }
        };
        match hidden {
            hidden if hidden >= short => Claim::Later,
            hidden => Claim::Evict(short - hidden),
        }
    }

    /// So much was evicted because [`Claim::Evict`] said so.
    pub fn note_freed(&self, bytes: u64) {
        let mut state = lock(&self.state);
        let before = state.freed.filter(|(_, at)| at.elapsed() < FREES_WITHIN);
        state.freed = Some((before.map_or(0, |(freed, _)| freed) + bytes, Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_leave_too_little_is_to_be_made_room_for_once() {
        let space = Space::new(1000);
        assert_eq!(space.claim(10, || Some(1010)), Claim::Granted);
        assert_eq!(space.claim(10, || Some(1009)), Claim::Evict(1));
        space.note_freed(8);
        // The disk does not show it yet: not one more file goes for that.
        assert_eq!(space.claim(10, || Some(1009)), Claim::Later);
        assert_eq!(space.claim(10, || Some(1000)), Claim::Evict(2));
        assert_eq!(space.claim(10, || Some(1017)), Claim::Granted);
        assert_eq!(space.claim(10, || Some(1007)), Claim::Evict(3));
        assert_eq!(space.claim(10, || None), Claim::Granted);
    }

    #[test]
    fn what_the_disk_shows_as_free_counts_once() {
        let space = Space::new(1000);
        assert_eq!(space.claim(16, || Some(1000)), Claim::Evict(16));
        space.note_freed(8);
        assert_eq!(space.claim(16, || Some(1008)), Claim::Evict(8));
        space.note_freed(8);
        assert_eq!(space.claim(16, || Some(1008)), Claim::Later);
        assert_eq!(space.claim(16, || Some(1016)), Claim::Granted);
    }

    #[test]
    fn the_disk_is_not_asked_for_each_write_while_much_is_free() {
        let space = Space::new(0);
        assert_eq!(space.claim(10, || Some(u64::MAX)), Claim::Granted);
        for _ in 0..1000 {
            assert_eq!(space.claim(10, || panic!("asked")), Claim::Granted);
        }
        // Who only looks does ask: others may have filled it.
        let space = Space::new(100);
        assert_eq!(space.claim(10, || Some(1 << 40)), Claim::Granted);
        assert_eq!(space.claim(0, || Some(60)), Claim::Evict(40));
    }
}
