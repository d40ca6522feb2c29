//! Operations that wait for an earlier one.
//!
//! A writer sends on before it knows what became of an operation. One that could not be
//! carried out now holds back those that depend on it, and only those; one that made
//! something and was refused takes with it what was to be in there. Kept in memory: after a
//! restart the writer sends everything again, in order.

use super::lock;
use crate::model::{FileId, LocationId};
use crate::ops::{Change, Obstacle, Op, OpId, Outcome, Place, Refusal};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

/// Operations that are waited for, at most; beyond it the oldest is forgotten.
const MAX_WAITING: usize = 65_536;

/// What an operation changes, or needs.
#[derive(PartialEq, Eq, Hash, Debug)]
enum Thing {
    File(LocationId, FileId),
    Name(LocationId, Place),
}

/// An operation that was not carried out.
struct Waited {
    changes: HashSet<Thing>,
    outcome: Outcome,
}

/// What is waited for, by writer.
#[derive(Default)]
pub(super) struct Waiting(Mutex<HashMap<(crate::model::DeviceId, u64), BTreeMap<u64, Waited>>>);

impl Waiting {
    /// What an operation is answered because an earlier one was not carried out.
    pub fn outcome(&self, id: &OpId, op: &Op) -> Option<Outcome> {
        let waiting = lock(&self.0);
        let earlier = waiting.get(&(id.writer, id.epoch))?;
        if earlier.is_empty() {
            return None;
        }
        let needs = needs(op);
        let mut earlier = earlier.range(..id.no);
        let found = earlier.find(|(_, w)| needs.iter().any(|thing| w.changes.contains(thing)));
        found.map(|(_, waited)| waited.outcome.clone())
    }

    pub fn note(&self, id: &OpId, op: &Op, outcome: &Outcome) {
        let changes = match (outcome, &op.change) {
            (Outcome::Applied(_), _) => return,
            (Outcome::Later(_) | Outcome::Refused(Refusal::NeedsWhole), _)
            | (Outcome::Refused(_), Change::Write { .. }) => changes(op),
            // What was never made cannot have anything in it, nor be changed.
            (Outcome::Refused(_), Change::Create { file, .. }) => {
                vec![Thing::File(op.location, *file)]
            }
            (Outcome::Refused(_), _) => return,
        };
        let outcome = match outcome {
            // It comes again, with all its bytes.
            Outcome::Refused(Refusal::NeedsWhole) => {
                Outcome::Later(Obstacle::Failed("a change before it is sent again".into()))
            }
            // What builds on its bytes would be taken for a change of other ones.
            Outcome::Refused(_) if matches!(op.change, Change::Write { .. }) => {
                Outcome::Later(Obstacle::Failed("a change before it was refused".into()))
            }
            outcome => outcome.clone(),
        };
        let waited = Waited { changes: changes.into_iter().collect(), outcome };
        let mut waiting = lock(&self.0);
        let of_writer = waiting.entry((id.writer, id.epoch)).or_default();
        of_writer.insert(id.no, waited);
        if of_writer.len() > MAX_WAITING {
            of_writer.pop_first();
        }
    }

    pub fn done(&self, id: &OpId) {
        if let Some(of_writer) = lock(&self.0).get_mut(&(id.writer, id.epoch)) {
            of_writer.remove(&id.no);
        }
    }

    pub fn forget_below(&self, writer: crate::model::DeviceId, epoch: u64, no: u64) {
        let mut waiting = lock(&self.0);
        waiting.retain(|(of, at), _| *of != writer || *at == epoch);
        if let Some(of_writer) = waiting.get_mut(&(writer, epoch)) {
            // A refusal is noted by the writer, too, and still holds for what comes later.
            of_writer.retain(|at, w| *at >= no || matches!(w.outcome, Outcome::Refused(_)));
        }
    }
}

fn changes(op: &Op) -> Vec<Thing> {
    let file = Thing::File(op.location, op.change.file());
    let name = |place: &Place| Thing::Name(op.location, place.clone());
    match &op.change {
        Change::Create { at, .. } | Change::Rmdir { at, .. } => vec![file, name(at)],
        Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => vec![file],
        Change::Link { at, .. } | Change::Unlink { at, .. } => vec![name(at)],
        Change::Rename { from, to, replaced, .. } => {
            let replaced = replaced.iter().map(|(f, _)| Thing::File(op.location, *f));
            [file, name(from), name(to)].into_iter().chain(replaced).collect()
        }
    }
}

fn needs(op: &Op) -> Vec<Thing> {
    let dir = |place: &Place| Thing::File(op.location, place.dir);
    let mut needs = changes(op);
    needs.push(Thing::File(op.location, op.change.file()));
    match &op.change {
        Change::Create { at, .. }
        | Change::Rmdir { at, .. }
        | Change::Link { at, .. }
        | Change::Unlink { at, .. } => needs.push(dir(at)),
        Change::Rename { from, to, .. } => needs.extend([dir(from), dir(to)]),
        Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => {}
    }
    needs
}
