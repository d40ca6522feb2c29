//! Bytes on their way from a writer, kept by the number of their operation.
//!
//! They are written where the file will be made of them, so that they are written once. A
//! connection that breaks leaves them here, and the next one goes on; a stop of the daemon
//! leaves nothing.

use super::body::{Body, Verified};
use crate::content::RangeSet;
use crate::error::{FsError, FsResult, Kind};
use crate::model::DeviceId;
use crate::ops::{NewContent, OpId};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Operations of one writer whose bytes are kept; the one that waits longest goes first.
const MAX_OF_WRITER: usize = 64;

/// How long bytes are kept of an operation of which no more come.
const KEPT_FOR: Duration = Duration::from_secs(3600);

/// What an operation needs before it can be applied.
#[derive(Debug)]
pub enum Need {
    /// No bytes from the writer; also when it will be refused, or cannot be applied now.
    Nothing,
    /// These.
    Bytes(Receiving),
}

/// The place for the bytes of one operation. Dropped, it keeps what it has for the next
/// connection; the [`Applier`](super::Applier) holds it until the operation is applied.
#[derive(Clone)]
pub struct Receiving(Arc<Reception>);

struct Reception {
    content: NewContent,
    body: Body,
    state: Mutex<State>,
}

struct State {
    here: RangeSet,
    verified: Option<Arc<Verified>>,
    used: Instant,
}

impl Receiving {
    pub(super) fn new(content: NewContent, body: Body) -> Self {
        let state = State { here: RangeSet::default(), verified: None, used: Instant::now() };
        Self(Arc::new(Reception { content, body, state: Mutex::new(state) }))
    }

    /// Ranges of the file whose bytes are still missing, in order.
    pub fn wanted(&self) -> Vec<Range<u64>> {
        let state = self.0.lock();
        self.0.content.extents.iter().flat_map(|e| state.here.missing(e.clone())).collect()
    }

    /// Bytes at this place of the file; what is outside of the operation's extents is refused.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()> {
        let range = self.0.range(offset, bytes.len())?;
        let mut state = self.0.lock();
        // From a connection that was given up: they are here already, and may have a name by now.
        if state.verified.is_some() {
            return Ok(());
        }
        if let Err(error) = self.0.body.write(offset, bytes) {
            if matches!(error.kind(), Kind::NoSpace | Kind::QuotaExceeded) {
                // Others may have room for what they bring; this comes again, all of it.
                state.here = RangeSet::default();
                self.0.body.clear()?;
            }
            return Err(error);
        }
        state.here.insert(range);
        state.used = Instant::now();
        Ok(())
    }

    /// Whether everything has come and is what the writer says it is. What is not is asked for
    /// again: [`Self::wanted`] then is everything.
    pub fn finish(&self) -> FsResult<()> {
        self.verified().map(|_| ())
    }

    pub(super) fn verified(&self) -> FsResult<Arc<Verified>> {
        // Held over the reading: what was verified does not change any more.
        let mut state = self.0.lock();
        if let Some(verified) = &state.verified {
            return Ok(verified.clone());
        }
        if !self.0.content.extents.iter().all(|e| state.here.contains(e)) {
            return Err(FsError::new(Kind::Invalid, "bytes of an operation are missing"));
        }
        let verified = Arc::new(self.0.body.verify(&self.0.content)?);
        if matches!(*verified, Verified::Wrong) {
            state.here = RangeSet::default();
            return Err(FsError::new(Kind::Invalid, "bytes are not what their digest says"));
        }
        state.verified = Some(verified.clone());
        Ok(verified)
    }

    pub(super) fn body(&self) -> &Body {
        &self.0.body
    }

    pub(super) fn is_of(&self, content: &NewContent) -> bool {
        self.0.content == *content
    }
}

impl Reception {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, offset: u64, len: usize) -> FsResult<Range<u64>> {
        let outside = || FsError::new(Kind::Invalid, "bytes outside of the operation's extents");
        let end = offset.checked_add(len as u64).ok_or_else(outside)?;
        let at = self.content.extents.partition_point(|e| e.end <= offset);
        let within =
            self.content.extents.get(at).is_some_and(|e| e.start <= offset && end <= e.end);
        if within { Ok(offset..end) } else { Err(outside()) }
    }
}

impl fmt::Debug for Receiving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiving").field("wanted", &self.wanted()).finish_non_exhaustive()
    }
}

/// What is being received.
#[derive(Default)]
pub(super) struct Receptions(Mutex<HashMap<OpId, Receiving>>);

impl Receptions {
    /// What has come of this operation so far.
    pub fn get(&self, op: &OpId, content: &NewContent) -> Option<Receiving> {
        let known = self.lock().get(op).cloned();
        known.filter(|receiving| receiving.is_of(content))
    }

    pub fn insert(&self, op: OpId, receiving: Receiving) {
        let mut receptions = self.lock();
        receptions.retain(|_, earlier| earlier.0.lock().used.elapsed() < KEPT_FOR);
        receptions.insert(op, receiving);
        let of_writer = |id: &&OpId| id.writer == op.writer && **id != op;
        if receptions.keys().filter(of_writer).count() >= MAX_OF_WRITER {
            let used = |id: &&OpId| receptions[*id].0.lock().used;
            let oldest = receptions.keys().filter(of_writer).min_by_key(used).copied();
            oldest.map(|oldest| receptions.remove(&oldest));
        }
    }

    pub fn remove(&self, op: &OpId) {
        self.lock().remove(op);
    }

    pub fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64) {
        let noted = |id: &OpId| id.writer == writer && (id.epoch != epoch || id.no < no);
        self.lock().retain(|id, _| !noted(id));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<OpId, Receiving>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
