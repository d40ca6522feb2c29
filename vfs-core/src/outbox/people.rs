//! What waits and why, conflicts, and what becomes of writes that no owner will ever take.

use super::deliver::word_refusal;
use super::queue::{Progress, Queued, State, written_bytes};
use super::record::{Record, word};
use super::{ConflictRecord, Outbox, Pending, PendingState};
use crate::error::FsResult;
use crate::model::{LocationNo, Name};
use crate::ops::Refusal;
use std::collections::HashSet;
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

    /// Changes that met others' and were not looked at yet, the oldest first.
    pub fn conflicts(&self) -> Vec<ConflictRecord> {
        self.state().conflicts.values().cloned().collect()
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
        let left = |of: &HashSet<u64>| -> Vec<Pending> {
            self.pending().into_iter().filter(|p| of.contains(&p.no)).collect()
        };
        let mut settled = self.settled.subscribe();
        let waits: HashSet<u64> =
            self.pending().into_iter().filter(&wanted).map(|p| p.no).collect();
        let all_settled = async {
            while !left(&waits).is_empty() {
                if settled.changed().await.is_err() {
                    return;
                }
            }
        };
        match tokio::time::timeout(timeout, all_settled).await {
            Ok(()) => Ok(()),
            Err(_) => match left(&waits) {
                left if left.is_empty() => Ok(()),
                left => Err(left),
            },
        }
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
        location: state.locations.get(&record.location).copied(),
        path: record.path.clone(),
        what: word(&record.change).to_owned(),
        bytes: record.snapshot.as_ref().map_or(0, written_bytes),
        since: record.at,
        attempts: *attempts,
        state: state_of,
    }
}
