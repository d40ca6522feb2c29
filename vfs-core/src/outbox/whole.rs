//! Bytes that an owner needs from the first to the last, because it no longer has their base.
//!
//! A partial change of a version that the owner has replaced meanwhile cannot be
//! applied there, not even as a conflict copy. The base is fetched from whoever
//! has it, this device's cache included, and written into the draft where nothing
//! was written, so that programs see no difference; then all bytes go as one
//! operation, under the number of the first that waited. When nobody has the base, the
//! operation stays and says so; its bytes can be exported.

use super::queue::{OpBytes, Progress, Queued};
use super::record::{OpRecord, Record, content};
use super::written::{Writing, Written};
use super::{Outbox, State};
use crate::error::{FsError, FsResult, Kind};
use crate::model::Location;
use crate::ops::{Base, Change, INLINE_MAX_BYTES};
use crate::staging::{Committed, Piece};
use bytes::BytesMut;
use std::ops::Range;
use std::sync::Arc;

/// Fetched and written at a time.
const STEP_BYTES: u64 = 1 << 20;
/// Fetched and written one by one; of more in a step all that lies between is written too.
const FEW_RANGES: usize = 64;

impl Outbox {
    /// Fetches what is missing of an operation's base, and sends the whole instead.
    pub(super) fn make_whole(self: &Arc<Self>, no: u64) {
        let outbox = Arc::clone(self);
        // It may wait for the network for long, and what happens by itself must go on.
        let builder = std::thread::Builder::new().name("outbox-whole".into());
        let started = builder.spawn(move || {
            outbox.send_whole_or_say(no);
            outbox.tender.is_made(no);
        });
        if let Err(error) = started {
            tracing::error!(%error, "a thread could not be started");
            self.tender.is_made(no);
        }
    }

    /// The same at once; without the base it stays, with the reason.
    pub(super) fn send_whole_or_say(&self, no: u64) {
        let Err(error) = self.send_whole(no) else { return };
        tracing::warn!(no, %error, "an operation's base could not be had");
        let why = format!("its owner and this device no longer have its base: {error}");
        if let Some(op) = self.state().ops.get_mut(&no) {
            op.obstacle = Some(why);
        }
    }

    fn send_whole(&self, no: u64) -> FsResult<()> {
        let Some((_, written)) = self.of_op(no)? else { return Ok(()) };
        self.fill_from_base(&written)?;
        let mut writing = written.lock();
        // What an earlier operation brought to its owner is in a base that it may have no more.
        written.draft.differ_everywhere();
        let committed = written.draft.commit(INLINE_MAX_BYTES)?;
        let snapshot = committed.snapshot.clone();
        let replaced = self.replace_by_whole(no, &written, &mut writing, committed);
        if !matches!(replaced, Ok(true)) {
            // The next close or fsync commits it.
            written.draft.take_back(&snapshot);
        }
        replaced.map(|_| self.tick())
    }

    /// The operation goes again with all bytes, under its own number: what was to follow it still
    /// does. Whether it still waited for that.
    fn replace_by_whole(
        &self,
        no: u64,
        written: &Written,
        writing: &mut Writing,
        committed: Committed,
    ) -> FsResult<bool> {
        let mtime = written.live().mtime();
        if !content(Some(&committed.snapshot), mtime).is_whole() {
            return Err(FsError::new(Kind::Io, "make the bytes of a file whole"));
        }
        let mut state = self.state();
        let is_it = |op: &Queued| {
            op.progress == Progress::Blocked && matches!(op.record.change, Change::Write { .. })
        };
        if !state.ops.get(&no).is_some_and(is_it) {
            return Ok(false);
        }
        let contained = of_draft(&state, no);
        self.rewrite(&mut state, no, committed, mtime)?;
        written.build_on(no);
        writing.op = Some(no);
        for later in contained.into_iter().filter(|later| *later != no) {
            state.stand_ins.insert(later, no);
            if let Err(error) = self.drop_op(&mut state, later) {
                tracing::warn!(later, %error, "what another operation has could not be dropped");
            }
        }
        if let Some(op) = state.ops.get_mut(&no) {
            (op.obstacle, op.late) = (None, None);
        }
        state.set(no, Progress::Waiting(None));
        Ok(true)
    }

    /// The bytes of an operation, whether or not a program has them open.
    pub(super) fn of_op(&self, no: u64) -> FsResult<Option<(Arc<Location>, Arc<Written>)>> {
        let state = self.state();
        let Some(Queued { record, bytes: Some(bytes), .. }) = state.ops.get(&no) else {
            return Ok(None);
        };
        let Some(location) = self.index.location_by_id(record.location) else { return Ok(None) };
        let home = state.home(record.location, record.change.file());
        if let Some(open) = self.files.get(&(location.no, home)) {
            let mut all = open.written.iter().chain(&open.older);
            if let Some(written) = all.find(|w| Arc::ptr_eq(&w.draft, &bytes.draft)) {
                return Ok(Some((location, Arc::clone(written))));
            }
        }
        let written = unregistered(&location, record, bytes);
        Ok(written.map(|written| (location, written)))
    }

    /// Writes the base's bytes into the draft where nothing was written.
    fn fill_from_base(&self, written: &Written) -> FsResult<()> {
        let content = self.content.get();
        let content = content.ok_or_else(|| FsError::new(Kind::Io, "read before it is ready"))?;
        if written.draft.size() > self.free_bytes() {
            return Err(FsError::new(Kind::NoSpace, "fetch the rest of a file"));
        }
        let mut at = 0;
        while at < written.draft.size() {
            let missing = base_ranges(written, at)?;
            if missing.len() > FEW_RANGES {
                let all = missing[0].start..missing[missing.len() - 1].end;
                let base = content.runtime().block_on(written.read_base(self, all.clone()))?;
                fill_at_once(written, all, &base)?;
            } else {
                for range in missing {
                    let base =
                        content.runtime().block_on(written.read_base(self, range.clone()))?;
                    fill(written, range, &base)?;
                }
            }
            at += STEP_BYTES;
        }
        Ok(())
    }
}

/// Writes bytes of the base where they still show: a program may have written or cut there
/// meanwhile, and that counts.
fn fill(written: &Written, range: Range<u64>, base: &[u8]) -> FsResult<()> {
    let _writing = written.lock();
    for still in base_ranges_of(written, range.clone())? {
        let (from, to) = (still.start - range.start, still.end - range.start);
        written.draft.write(still.start, &base[from as usize..to as usize])?;
    }
    Ok(())
}

/// The same by one write, with what is there already: for what has very many parts.
fn fill_at_once(written: &Written, range: Range<u64>, base: &[u8]) -> FsResult<()> {
    let _writing = written.lock();
    let mut all = BytesMut::with_capacity(base.len());
    for piece in written.draft.read(range.start, range.end - range.start)? {
        match piece {
            Piece::Here(bytes) => all.extend_from_slice(&bytes),
            Piece::Zero(len) => all.resize(all.len() + len as usize, 0),
            Piece::Base(still) => {
                let (from, to) = (still.start - range.start, still.end - range.start);
                all.extend_from_slice(&base[from as usize..to as usize]);
            }
        }
    }
    written.draft.write(range.start, &all)
}

fn base_ranges(written: &Written, at: u64) -> FsResult<Vec<Range<u64>>> {
    base_ranges_of(written, at..at + STEP_BYTES)
}

fn base_ranges_of(written: &Written, range: Range<u64>) -> FsResult<Vec<Range<u64>>> {
    let end = range.end.min(written.draft.size());
    let pieces = written.draft.read(range.start, end.saturating_sub(range.start))?;
    Ok(pieces
        .into_iter()
        .filter_map(|piece| match piece {
            Piece::Base(range) => Some(range),
            Piece::Here(_) | Piece::Zero(_) => None,
        })
        .collect())
}

/// The operations with bytes of the same draft: what they would write is in the whole.
fn of_draft(state: &State, no: u64) -> Vec<u64> {
    let Some(draft) = state.ops.get(&no).and_then(|op| op.bytes.as_ref()).map(|b| b.draft.id())
    else {
        return Vec::new();
    };
    let same = |op: &Queued| op.bytes.as_ref().is_some_and(|b| b.draft.id() == draft);
    state.ops.range(no..).filter(|(_, op)| same(op)).map(|(no, _)| *no).collect()
}

/// Bytes that were accepted before a restart, or whose file is not open.
fn unregistered(location: &Location, record: &OpRecord, bytes: &OpBytes) -> Option<Arc<Written>> {
    let Change::Write { file, base: Base::Seen { stamp, content }, .. } = &record.change else {
        return None;
    };
    let under = super::deliver::version_row(*file, bytes.shown.generation, stamp, *content);
    let parts = (Arc::clone(&bytes.draft), bytes.shown.clone());
    let base = Base::After(record.no);
    Some(Written::new((location.no, *file), parts, base, Arc::new(under)))
}

impl Outbox {
    /// Takes back an operation that its owner never did, and never will.
    pub(super) fn drop_op(&self, state: &mut State, no: u64) -> FsResult<()> {
        self.note_reserved(state, &Record::Dropped { no })?;
        if let Some(op) = state.remove(no) {
            let Queued { record, bytes, .. } = op;
            if let Some(location) = state.locations.get(&record.location).copied() {
                self.overlay().retire(location, record.no, &record.change);
            }
            state.let_go(&record, bytes.as_ref());
        }
        Ok(())
    }
}
