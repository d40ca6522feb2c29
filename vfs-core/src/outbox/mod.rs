//! Writes to other devices' files: accepted here, durable here, delivered later.
//!
//! | module | what it is |
//! |---|---|
//! | `names`, `attributes` | what programs ask for, checked against what they see, and accepted |
//! | `written` | bytes of one file that is being written, shared by its handles |
//! | `record` | the form of the journal's records |
//! | `queue`, `order` | the accepted operations, and which waits for which |
//! | `arrival` | who waits until the owner has it |
//! | `deliver` | what to send, and what becomes of the answers |
//! | `tend` | what happens by itself: syncing, letting go, what is seen in the index by now |
//! | `adopt` | delivered bytes stay readable here, in the cache |
//! | `recover` | taking up the journal of the last run |
//! | `people` | what waits and why, conflicts |
//! | `export` | the bytes of writes that no owner takes, for people |
//! | `whole` | bytes whose base the owner has no more |
//!
//! **An operation's way.** A program's call is checked against the merged view
//! and appended to the journal: from then on it survives the end of this
//! process. It is shown at once ([`crate::overlay`]). `close` and `fsync` wait for
//! the journal's disk, and so does everything before it is sent. Its owner
//! answers; the answer is journaled. When the index has the rows of the answer,
//! the overlay goes, and the bytes in staging with it.
//!
//! **What may be lost.** Nothing that `close` or `fsync` returned for. A power
//! failure may take the last 50 ms of what was only accepted, from the end.
//!
//! **Locks**, in this order: a file's [`Written`], `state`, `overlay`; a file's base is a leaf.
//! None is held over the network; `state` is held over appends to the journal, which do not
//! wait for the disk, and over its rare checkpoints.

mod adopt;
mod arrival;
mod attributes;
mod deliver;
mod export;
mod names;
mod order;
mod people;
mod queue;
mod record;
mod recover;
mod tend;
mod types;
mod whole;
mod written;

#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;

pub use names::{Made, MoveFlags};
pub use types::{
    Backlog, ConflictRecord, Exported, Lane, OutboxConfig, OutboxError, Pending, PendingState,
    Report, Usage,
};
pub use written::{Offset, Written};

pub(crate) use attributes::Attributes;

use crate::changes;
use crate::content::Content;
use crate::error::{FsError, FsResult, Kind};
use crate::failpoint::fail_point;
use crate::index::Index;
use crate::journal::{Journal, Lsn};
use crate::model::{DeviceId, Entry, FileId, Location, LocationNo, Name, Time};
use crate::ops::Change;
use crate::overlay::{self, Merged, Overlay};
use crate::staging::{Snapshot, Staging};
use bytes::Bytes;
use dashmap::DashMap;
use queue::{OpBytes, Progress, Queued, State, files_mut};
use record::{OpRecord, Record};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Instant;
use tend::Tender;
use tokio::sync::watch;
use written::OpenFile;

/// How far a version is moved that gets another number. An inode number has the lowest byte of it:
/// far from what the owner's next versions get, and all values before one comes again. The highest
/// byte tells a kernel that it is another inode all the same.
const RENUMBERED_BY: u32 = 0x0100_0053;

/// The writes of this device to others' files.
pub struct Outbox {
    dir: PathBuf,
    index: Index,
    journal: Journal,
    staging: Arc<Staging>,
    config: OutboxConfig,
    state: Mutex<State>,
    overlay: RwLock<Overlay>,
    files: DashMap<(LocationNo, FileId), OpenFile>,
    /// Where bytes of bases come from; there once the drive is.
    content: OnceLock<Arc<Content>>,
    changed: watch::Sender<u64>,
    settled: watch::Sender<u64>,
    tender: Arc<Tender>,
}

/// An operation to be accepted.
struct NewOp {
    location: Arc<Location>,
    change: Change,
    is_directory: bool,
    path: Vec<Name>,
    bytes: Option<NewBytes>,
    /// A new file that is still being written.
    is_held: bool,
    /// Under which number this device shows the file, when the operation makes it another version.
    generation: Option<u32>,
}

/// The bytes of an operation to be accepted.
struct NewBytes {
    bytes: OpBytes,
    snapshot: Option<Snapshot>,
    fill: Vec<(u64, Bytes)>,
}

impl Outbox {
    /// What programs of this device see.
    pub fn view(&self) -> Merged<'_> {
        Merged::new(&self.index, &self.overlay)
    }

    /// Where the bytes of bases are read from; said once, before anything is delivered.
    pub fn attach(&self, content: &Arc<Content>) {
        // A second drive over the same parts has the same content.
        let _ = self.content.set(Arc::clone(content));
    }

    /// Whether bytes of a file are shown that its owner's row does not have.
    pub(crate) fn has_bytes(&self, location: LocationNo, file: FileId) -> bool {
        self.overlay_ref().bytes(location, file).is_some()
    }

    /// The version of a file gets another inode number on this device.
    pub(crate) fn renumber(&self, location: LocationNo, shown: &Entry) -> FsResult<()> {
        let row = self.index.view()?.node(location, shown.file_id)?;
        if let Some(row) = row {
            let other = shown.generation.wrapping_add(RENUMBERED_BY);
            self.overlay().keep(location, shown.file_id, row.entry.generation, other);
        }
        Ok(())
    }

    /// Kernels look up the names of a file again, and ask for its attributes.
    pub(crate) fn look_again(&self, location: LocationNo, file: FileId) -> FsResult<()> {
        use changes::Change::{Attributes, Entry};
        let names = self.view().names(location, file)?.into_iter();
        let look = |(parent, name)| Entry { location, parent, name, was: None, now: None };
        let attributes = Attributes { location, file, generation: 0, noticed: None, grew: None };
        self.publish(names.map(look).chain([attributes]).collect());
        Ok(())
    }

    /// How much more can be accepted.
    pub(crate) fn free_bytes(&self) -> u64 {
        let Ok(disk) = rustix::fs::statvfs(&self.dir) else { return 0 };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        free.saturating_sub(self.config.min_free_bytes)
    }

    /// Ticks when there may be something to send.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Drawn when the journal was made; part of every operation's id.
    pub fn epoch(&self) -> u64 {
        self.state().epoch
    }

    /// Everything that was accepted until now survives a power failure when this returns.
    pub fn sync(&self) -> FsResult<()> {
        let last = self.state().last;
        self.sync_upto(last)
    }

    fn sync_upto(&self, lsn: Lsn) -> FsResult<()> {
        if self.journal.durable() < lsn {
            self.journal.sync(lsn)?;
            self.tick();
        }
        Ok(())
    }

    /// There may be something to send: only then, because it wakes whoever delivers. What is not
    /// durable yet is not sent.
    fn tick(&self) {
        self.changed.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed only after what may fail: a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn overlay(&self) -> RwLockWriteGuard<'_, Overlay> {
        self.overlay.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn overlay_ref(&self) -> std::sync::RwLockReadGuard<'_, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts an operation: it is in the journal and shown when this returns.
    fn accept(&self, state: &mut State, new: NewOp) -> FsResult<u64> {
        let NewOp { location, mut change, is_directory, path, bytes, is_held, generation } = new;
        for file in files_mut(&mut change) {
            *file = self.now(location.no, *file);
        }
        let (shown, snapshot, fill) = match bytes {
            Some(NewBytes { bytes, snapshot, fill }) => (Some(bytes), snapshot, fill),
            None => (None, None, Vec::new()),
        };
        let record = OpRecord {
            no: state.next_no,
            owner: location.owner,
            location: location.id,
            log_id: self.index.log_id(location.no),
            change,
            is_directory,
            generation: match &shown {
                Some(bytes) => bytes.shown.generation,
                None => generation.unwrap_or(0),
            },
            snapshot,
            at: Time::now(),
            path,
        };
        fail_point("outbox::accept");
        let lsn = self.note_op(state, &record, fill)?;
        fail_point("outbox::accepted");
        state.next_no += 1;
        state.locations.insert(location.id, location.no);
        let no = record.no;
        self.show(location.no, &record, shown.as_ref());
        let progress = match is_held {
            true => Progress::Held(Instant::now() + self.config.hold_back),
            false => Progress::Waiting(None),
        };
        state.add(Queued {
            record,
            bytes: shown,
            lsn,
            progress,
            attempts: 0,
            may_be_sent: false,
            digest: None,
            obstacle: None,
            answered: None,
            is_damaged: false,
            late: None,
        });
        Ok(no)
    }

    /// Writes an operation, and the bytes that only the journal has, into the journal.
    fn note_op(
        &self,
        state: &mut State,
        record: &OpRecord,
        fill: Vec<(u64, Bytes)>,
    ) -> FsResult<Lsn> {
        let draft = record.snapshot.as_ref().map_or(0, |s| s.draft.0);
        // Before the operation that needs them: a journal that ends between them has bytes that
        // nobody asks for, never the reverse.
        for (at, bytes) in fill {
            self.note(state, &Record::Fill { draft, at, bytes })?;
        }
        self.note(state, &Record::Op(std::borrow::Cow::Borrowed(record)))
    }

    fn note(&self, state: &mut State, record: &Record<'_>) -> FsResult<Lsn> {
        let lsn = self.journal.append(&record.encode())?;
        self.noted(state, lsn);
        Ok(lsn)
    }

    /// For what lets space be freed: a full disk takes it too.
    fn note_reserved(&self, state: &mut State, record: &Record<'_>) -> FsResult<Lsn> {
        let lsn = self.journal.append_reserved(&record.encode())?;
        self.noted(state, lsn);
        Ok(lsn)
    }

    fn noted(&self, state: &mut State, lsn: Lsn) {
        state.last = state.last.max(lsn);
        if !std::mem::replace(&mut state.unsynced, true) {
            self.tender.wake();
        }
    }

    fn show(&self, location: LocationNo, record: &OpRecord, bytes: Option<&OpBytes>) {
        self.overlay().apply(location, shown(record, bytes));
    }

    /// A location of another device that may be written to.
    fn writable(&self, no: LocationNo) -> FsResult<Arc<Location>> {
        let location = self.index.location(no);
        let location = location
            .ok_or_else(|| FsError::new(Kind::Stale, "change a location that was removed"))?;
        if location.read_only {
            return Err(FsError::new(Kind::ReadOnly, "change a read-only location"));
        }
        if location.owner == self.index.me() {
            return Err(FsError::new(Kind::ReadOnly, "change an own location that is not there"));
        }
        Ok(location)
    }

    /// What the owner calls the file that this device once called so.
    fn now(&self, location: LocationNo, file: FileId) -> FileId {
        self.overlay_ref().now(location, file)
    }

    fn publish(&self, changes: Vec<changes::Change>) {
        self.index.feed().publish(changes);
    }

    /// Those for whom something is pending.
    pub fn owners(&self) -> Vec<DeviceId> {
        self.state().owed.keys().copied().collect()
    }
}

/// What a record and its bytes look like.
fn shown<'a>(record: &'a OpRecord, bytes: Option<&OpBytes>) -> overlay::Shown<'a> {
    overlay::Shown {
        no: record.no,
        at: record.at,
        change: &record.change,
        bytes: bytes.map(|b| b.shown.clone()),
        is_directory: record.is_directory,
        generation: record.generation,
    }
}
