//! Waiting for an owner, as `O_SYNC` and `O_DSYNC` ask for.
//!
//! What is waited for is durable here already, so the wait may end early: it does
//! when the owner cannot be reached, or does not answer in time. Only what the
//! owner says against it is an error.

use super::{Outbox, Written};
use crate::error::{FsError, FsResult, Kind};
use crate::model::DeviceId;
use std::time::{Duration, Instant};

/// How often is looked whether the owner can still be reached, and its writer still wants to wait.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How far bytes have come that somebody waits for.
enum Arrival {
    /// The owner has them, or they are of no use to it any more.
    There,
    /// They wait for this device, which may not be able to take them now.
    OnTheWay(DeviceId),
    /// The disk of the location is not connected.
    Away,
    /// Their owner said so.
    Failed(Kind),
}

impl Outbox {
    /// Waits until the owner of a file has what was written to it and flushed. It is in time also
    /// when the owner goes away, or is not heard for as long as the settings say, or `gives_up`:
    /// it is durable here, and goes on waiting. Who waited in vain does not wait again before
    /// that has arrived.
    pub(crate) async fn arrived(
        &self,
        written: &Written,
        gives_up: impl Fn() -> bool,
    ) -> FsResult<()> {
        let Some(no) = written.lock().op else { return Ok(()) };
        let mut settled = self.settled.subscribe();
        let deadline = Instant::now() + self.config.owner_deadline;
        let mut has_waited = false;
        loop {
            match self.arrival(no) {
                Arrival::There | Arrival::Away => return Ok(()),
                Arrival::Failed(kind) => {
                    return Err(FsError::new(kind, "have its owner take what was written"));
                }
                Arrival::OnTheWay(owner) if !self.is_reachable(owner) => return Ok(()),
                Arrival::OnTheWay(_) if !has_waited && self.was_in_vain(written) => return Ok(()),
                Arrival::OnTheWay(_) if has_waited && gives_up() => return Ok(()),
                Arrival::OnTheWay(_) if Instant::now() >= deadline => {
                    written.wait_no_more_for(no);
                    return Ok(());
                }
                Arrival::OnTheWay(_) => {}
            }
            // An error is a timeout: the sender is this outbox's own.
            let _ = tokio::time::timeout(LOOK_EVERY, settled.changed()).await;
            has_waited = true;
        }
    }

    fn arrival(&self, no: u64) -> Arrival {
        let state = self.state();
        let Some(waiting) = state.waiting(no).and_then(|no| state.ops.get(&no)) else {
            return Arrival::There;
        };
        // What an earlier version met with, the later ones wait for.
        let record = &waiting.record;
        let file = (record.location, record.change.file());
        let earlier = state.versioning.get(&file).into_iter().flatten();
        let earlier = earlier.filter(|earlier| **earlier < record.no);
        let answered = earlier.filter_map(|no| state.ops.get(no)?.answered).next();
        match waiting.answered.or(answered) {
            Some(Kind::HostDown) => Arrival::Away,
            Some(kind) => Arrival::Failed(kind),
            None => Arrival::OnTheWay(record.owner),
        }
    }

    fn was_in_vain(&self, written: &Written) -> bool {
        let Some(no) = written.waited_in_vain() else { return false };
        self.state().waiting(no).is_some()
    }

    fn is_reachable(&self, owner: DeviceId) -> bool {
        self.content.get().is_some_and(|content| content.is_reachable(owner))
    }
}
