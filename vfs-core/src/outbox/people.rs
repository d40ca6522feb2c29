//! What waits and why, conflicts, and what becomes of writes that no owner will ever take.

use super::deliver::word_refusal;
use super::queue::{Progress, Queued, State, written_bytes};
use super::record::{Record, word};
use super::{Backlog, ConflictRecord, Outbox, Pending, PendingState, Usage};
use crate::error::FsResult;
use crate::model::{LocationNo, Name};
use crate::ops::Refusal;
use std::collections::BTreeSet;
use std::time::Duration;

impl Outbox {
    /// What waits, the oldest first.
    pub fn pending(&self) -> Vec<Pending> {
        let state = self.state();
        state.ops.values().map(|op| pending(&state, op)).collect()
    }

    /// How many operations wait, and their bytes.
    pub fn backlog(&self) -> (usize, u64) {
        let state = self.state();
        let bytes = state.ops.values().filter_map(|op| op.record.snapshot.as_ref());
        (state.ops.len(), bytes.map(written_bytes).sum())
    }

    /// The same for each owner, in the owners' order.
    pub fn backlogs(&self) -> Vec<Backlog> {
        let mut all: Vec<Backlog> = Vec::new();
        let state = self.state();
        // The oldest comes first, so it is the oldest of its owner as well.
        for op in state.ops.values() {
            let (owner, since) = (op.record.owner, op.record.at);
            let at = all.iter().position(|b| b.owner == owner).unwrap_or_else(|| {
                all.push(Backlog { owner, operations: 0, bytes: 0, stuck: 0, since });
                all.len() - 1
            });
            let backlog = &mut all[at];
            backlog.operations += 1;
            backlog.bytes += op.record.snapshot.as_ref().map_or(0, written_bytes);
            backlog.stuck += u64::from(op.progress == Progress::Blocked);
        }
        all.sort_by_key(|b| b.owner);
        all
    }

    /// What the journal and staged bytes take of this device's disk.
    pub fn usage(&self) -> Usage {
        Usage { journal_bytes: self.journal.total_bytes(), staged_bytes: self.staging.used_bytes() }
    }

    /// Whether nothing waits, for an owner or for the index to show it.
    pub fn is_quiet(&self) -> bool {
        let state = self.state();
        state.ops.is_empty() && state.retiring.is_empty()
    }

    /// Changes that met others' and were not looked at yet, the oldest first.
    pub fn conflicts(&self) -> Vec<ConflictRecord> {
        self.state().conflicts.values().cloned().collect()
    }

    /// Whether what became of an operation is what this device shows: it was settled, and its
    /// owner's rows are here.
    pub fn is_seen(&self, no: u64) -> bool {
        let state = self.state();
        !state.ops.contains_key(&no) && !state.retiring.contains_key(&no)
    }

    /// A person has dealt with this conflict; `false`: there is none of this id.
    pub fn resolve(&self, id: u64) -> FsResult<bool> {
        let mut state = self.state();
        if !state.conflicts.contains_key(&id) {
            return Ok(false);
        }
        let lsn = self.note_reserved(&mut state, &Record::Resolved { id })?;
        state.conflicts.remove(&id);
        drop(state);
        self.sync_upto(lsn)?;
        Ok(true)
    }

    /// Waits until everything that is pending now (below this place) has reached its owner.
    /// Otherwise what still waits.
    pub async fn drained(
        &self,
        below: Option<(LocationNo, Vec<Name>)>,
        timeout: Duration,
    ) -> Result<(), Vec<Pending>> {
        let wanted = |p: &Pending| match &below {
            Some((location, path)) => p.location == Some(*location) && p.path.starts_with(path),
            None => true,
        };
        let waits: BTreeSet<u64> =
            self.pending().into_iter().filter(&wanted).map(|p| p.no).collect();
        match tokio::time::timeout(timeout, self.reached(waits.clone())).await {
            Ok(()) => Ok(()),
            Err(_) => match self.left(&waits) {
                left if left.is_empty() => Ok(()),
                left => Err(left),
            },
        }
    }

    /// Those of these operations that still wait.
    pub fn left(&self, of: &BTreeSet<u64>) -> Vec<Pending> {
        let state = self.state();
        let waiting: BTreeSet<u64> = of.iter().filter_map(|no| state.waiting(*no)).collect();
        waiting.iter().filter_map(|no| state.ops.get(no)).map(|op| pending(&state, op)).collect()
    }

    /// Whether anybody waits for owners to have something.
    pub fn is_awaited(&self) -> bool {
        self.settled.receiver_count() > 0
    }

    /// Returns when none of these operations waits any more.
    pub async fn reached(&self, mut waits: BTreeSet<u64>) {
        let mut settled = self.settled.subscribe();
        while self.any_waits(&mut waits) {
            if settled.changed().await.is_err() {
                return;
            }
        }
    }

    /// Forgets those that come first and do not wait any more.
    fn any_waits(&self, of: &mut BTreeSet<u64>) -> bool {
        let state = self.state();
        while let Some(first) = of.pop_first() {
            if let Some(waiting) = state.waiting(first) {
                of.insert(waiting);
                if waiting == first {
                    return true;
                }
            }
        }
        false
    }
}

fn pending(state: &State, op: &Queued) -> Pending {
    let Queued { record, progress, obstacle, attempts, .. } = op;
    let state_of = match progress {
        Progress::Held(_) => PendingState::Held,
        Progress::Sent => PendingState::Sent,
        Progress::Waiting(_) => match obstacle {
            Some(why) => PendingState::Blocked(why.clone()),
            None => PendingState::Waiting,
        },
        Progress::Blocked => PendingState::Blocked(
            obstacle.clone().unwrap_or_else(|| word_refusal(&Refusal::Malformed)),
        ),
    };
    Pending {
        no: record.no,
        owner: record.owner,
        location_id: record.location,
        location: state.locations.get(&record.location).copied(),
        path: record.path.clone(),
        what: word(&record.change).to_owned(),
        bytes: record.snapshot.as_ref().map_or(0, written_bytes),
        since: record.at,
        attempts: *attempts,
        state: state_of,
        stuck: *progress == Progress::Blocked,
    }
}
