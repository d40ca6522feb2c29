//! Writes to other devices' files: accepted here, durable here, delivered later.

mod types;

pub use types::{ConflictRecord, Lane, OutboxConfig, OutboxError, Pending, PendingState, Report};

use crate::error::FsResult;
use crate::index::Index;
use crate::model::{DeviceId, LocationId, LocationNo, Name};
use crate::ops::{Op, Outcome};
use bytes::Bytes;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// The writes of this device to others' files.
pub struct Outbox {
    changed: watch::Sender<u64>,
}

#[allow(clippy::unimplemented, unused_variables)]
impl Outbox {
    /// Opens it and takes up what was pending; before anything is mounted.
    pub fn open(
        dir: &Path,
        index: Index,
        config: OutboxConfig,
    ) -> Result<(Arc<Self>, Report), OutboxError> {
        unimplemented!()
    }

    /// Ticks when there may be something to send.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Those for whom something is pending.
    pub fn owners(&self) -> Vec<DeviceId> {
        unimplemented!()
    }

    /// Drawn when the journal was made; part of every operation's id.
    pub fn epoch(&self) -> u64 {
        unimplemented!()
    }

    /// Every operation for this owner with a smaller number is settled and noted as such.
    pub fn settled_below(&self, owner: DeviceId) -> u64 {
        unimplemented!()
    }

    /// What to send next; it counts as sent from now on. May read staged bytes: not for a
    /// runtime's thread.
    ///
    /// In [`Lane::Small`] operations come in order. In [`Lane::Bulk`] at most one comes, which
    /// depends on no unsettled earlier one.
    pub fn take(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Op> {
        unimplemented!()
    }

    /// Staged bytes of an operation for this owner; the range lies within one of its extents.
    pub fn read(&self, owner: DeviceId, no: u64, range: Range<u64>) -> FsResult<Bytes> {
        unimplemented!()
    }

    /// The owner's answer. Durable when it returns, but for [`Outcome::Later`].
    pub fn settle(&self, owner: DeviceId, no: u64, outcome: Outcome) {
        unimplemented!()
    }

    /// What was sent to this owner and not settled is to be sent again.
    pub fn connection_lost(&self, owner: DeviceId) {
        unimplemented!()
    }

    /// What waits, the oldest first.
    pub fn pending(&self) -> Vec<Pending> {
        unimplemented!()
    }

    /// Changes that met others' and were not looked at yet, the oldest first.
    pub fn conflicts(&self) -> Vec<ConflictRecord> {
        unimplemented!()
    }

    /// A person has dealt with this conflict; `false`: there is none of this id.
    pub fn resolve(&self, id: u64) -> FsResult<bool> {
        unimplemented!()
    }

    /// Waits until everything that is pending now (below this place) has reached its owner.
    pub async fn drained(
        &self,
        below: Option<(LocationNo, Vec<Name>)>,
        timeout: Duration,
    ) -> Result<(), Vec<Pending>> {
        unimplemented!()
    }

    /// Writes what waits for this location, or for all of this owner's, into a folder and drops
    /// it from the outbox: for owners that are no members any more. How many were exported.
    pub fn export(
        &self,
        owner: DeviceId,
        location: Option<LocationId>,
        to: &Path,
    ) -> FsResult<u64> {
        unimplemented!()
    }
}
