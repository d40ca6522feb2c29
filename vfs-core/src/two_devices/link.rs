//! What sync does between the two devices: operations and outcomes, rows, and bytes that are read.
//!
//! As `sync/deliver` and `sync/accept` do it: small operations in their order in one stream, one
//! batch after the other; each one whose bytes are pulled by itself; outcomes in the order of the
//! operations. A session that ends leaves nothing under way at the owner when the next begins.

use super::owner::Owner;
use super::writer::Writer;
use super::{OWNER, WRITER};
use crate::apply::{Need, Receiving};
use crate::content::OwnFiles;
use crate::model::{DeviceId, Seq};
use crate::ops::{Obstacle, Op, OpId, Outcome};
use crate::outbox::Lane;
use crate::source::{BoxFuture, ContentSource, FetchError, Fetched, Version};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Between the two, for reads.
#[derive(Default)]
pub(super) struct Wire {
    owner: Mutex<Option<Arc<OwnFiles>>>,
    head: Mutex<Option<Seq>>,
}

impl Wire {
    pub fn connect(&self, owner: &Owner) {
        *self.owner.lock().unwrap() = Some(Arc::clone(&owner.running().files));
    }

    pub fn cut(&self) {
        *self.owner.lock().unwrap() = None;
    }

    pub fn is_online(&self) -> bool {
        self.owner.lock().unwrap().is_some()
    }

    /// Where the owner's log was when it was last asked.
    pub fn head_of_owner(&self) -> Option<Seq> {
        *self.head.lock().unwrap()
    }

    pub fn heard(&self, owner: &Owner) {
        let running = owner.running();
        *self.head.lock().unwrap() = Some(running.index.head(running.no));
    }
}

impl ContentSource for Wire {
    fn is_reachable(&self, device: DeviceId) -> bool {
        device == OWNER && self.is_online()
    }

    fn fetch<'a>(
        &'a self,
        _device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        Box::pin(async move {
            let owner = self.owner.lock().unwrap().clone();
            let files = owner.ok_or(FetchError::Unreachable)?;
            let version = version.clone();
            let read = move || files.read(WRITER, &version, range);
            tokio::task::spawn_blocking(read).await.unwrap()
        })
    }
}

/// How a batch ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    /// All outcomes arrive.
    Well,
    /// The connection breaks when so many operations have arrived, and no outcome comes back.
    Unheard(usize),
    /// All are applied, and the outcomes of so many come back.
    Half(usize),
}

/// Delivers one batch; how many operations were settled for good.
pub(super) fn deliver(
    writer: &Writer,
    owner: &Owner,
    lane: Lane,
    max_ops: usize,
    ending: Ending,
) -> Result<usize, String> {
    let outbox = writer.outbox();
    outbox.sync().map_err(|e| e.to_string())?;
    let mut ops = outbox.take(OWNER, lane, max_ops, 1 << 20);
    let settled_below = outbox.settled_below(OWNER);
    if let Ending::Unheard(arrived) = ending {
        ops.truncate(arrived);
    }
    let outcomes = accept(writer, owner, ops, settled_below)?;
    let heard = match ending {
        Ending::Well => outcomes.len(),
        Ending::Unheard(_) => 0,
        Ending::Half(heard) => heard,
    };
    let mut settled = 0;
    for (no, outcome) in outcomes.into_iter().take(heard) {
        settled += usize::from(matches!(outcome, Outcome::Applied(_)));
        outbox.settle(OWNER, no, outcome);
    }
    if ending != Ending::Well {
        outbox.connection_lost(OWNER);
    }
    Ok(settled)
}

/// The owner's side of a batch.
fn accept(
    writer: &Writer,
    owner: &Owner,
    ops: Vec<Op>,
    settled_below: u64,
) -> Result<Vec<(u64, Outcome)>, String> {
    let applier = &owner.running().applier;
    let epoch = writer.outbox().epoch();
    let mut arrived = Vec::new();
    for op in ops {
        if !op.is_valid() {
            return Err(format!("an operation out of bounds is sent: {op:?}"));
        }
        let id = OpId { writer: WRITER, epoch, no: op.no };
        let received = match applier.need(WRITER, id, &op) {
            Need::Nothing => None,
            Need::Bytes(receiving) => Some(pull(writer, op.no, receiving)?),
        };
        arrived.push((id, op, received));
    }
    let numbers: Vec<_> = arrived.iter().map(|(id, ..)| id.no).collect();
    let outcomes = match arrived.is_empty() {
        true => Vec::new(),
        false => applier.apply(&owner.asker, arrived),
    };
    applier.forget_below(WRITER, epoch, settled_below);
    for outcome in &outcomes {
        if let Outcome::Later(Obstacle::Failed(why)) = outcome {
            return Err(format!("the owner failed: {why}"));
        }
    }
    Ok(numbers.into_iter().zip(outcomes).collect())
}

fn pull(writer: &Writer, no: u64, receiving: Receiving) -> Result<Receiving, String> {
    for range in receiving.wanted() {
        let bytes = writer.outbox().read(OWNER, no, range.clone()).map_err(|e| e.to_string())?;
        receiving.write(range.start, &bytes).map_err(|e| e.to_string())?;
    }
    receiving.finish().map_err(|e| format!("the bytes of {no} are not what it says: {e}"))?;
    Ok(receiving)
}

/// Brings the owner's rows to the replica, at most about so many bytes of them; whether any came.
pub(super) fn replicate(writer: &Writer, owner: &Owner, max_bytes: usize) -> Result<bool, String> {
    let (index, no) = (&owner.running().index, owner.running().no);
    let after = writer.index.head(writer.no);
    let view = index.view().map_err(|e| e.to_string())?;
    let (rows, upto) = view.log_after(no, after, max_bytes).map_err(|e| e.to_string())?;
    if upto == after {
        return Ok(false);
    }
    let log_id = index.log_id(no);
    let applied = match upto < index.head(no) {
        true => writer.index.apply_replica_part(writer.no, log_id, rows, upto),
        false => writer.index.apply_replica(writer.no, log_id, rows, upto),
    };
    applied.map(|()| true).map_err(|e| e.to_string())
}
