//! A device as a holder, of whatever file: what is under way from it, and how fast it is.

#[cfg(test)]
use crate::content::choice::Rank;
use crate::content::choice::{Landed, Pace};
use crate::content::lock;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// A device as a holder, of whatever file.
pub(in crate::content) struct Supply {
    /// Room for what is under way from it, in KiB.
    pub(super) room: Arc<Semaphore>,
    pub(super) pace: Mutex<Pace>,
}

impl Supply {
    pub(in crate::content) fn new(room_kib: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(room_kib)), pace: Mutex::default() }
    }

    /// Whether it comes last, as it brought nothing or nothing of use.
    #[cfg(test)]
    pub(in crate::content) fn is_silent(&self) -> bool {
        let rank = lock(&self.pace).rank(1, Duration::ZERO, Instant::now());
        matches!(rank, Rank::Silent(_))
    }
}

/// Bytes that are under way from a device.
pub(super) struct UnderWay<'a> {
    pace: &'a Mutex<Pace>,
    bytes: u64,
    with_others: u64,
    begun: Instant,
}

impl<'a> UnderWay<'a> {
    pub(super) fn begin(pace: &'a Mutex<Pace>, bytes: u64) -> Self {
        let with_others = lock(pace).begin(bytes);
        Self { pace, bytes, with_others, begun: Instant::now() }
    }

    pub(super) fn landed(&self, rtt: Duration) -> Landed {
        Landed { under_way_bytes: self.with_others, took: self.begun.elapsed(), rtt }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        lock(self.pace).end(self.bytes);
    }
}
