//! Bytes of a file that is being written.
//!
//! All handles of a file share one [`Written`]: its draft holds what was written,
//! everything else is the base's. It is made by the first write, and stays as long
//! as a handle is open or its bytes are not seen in the index: so a handle reads
//! on what it read before, whatever was delivered meanwhile.
//!
//! A file that its owner changed too, and that is opened anew, gets another
//! `Written` over the newer version. Who has the older one open may go on
//! writing; the owner keeps both.

use super::queue::{OpBytes, Progress};
use super::record::{content, content_mut};
use super::{NewBytes, NewOp, Outbox, State};
use crate::content::Reader;
use crate::error::{FsError, FsResult, Kind};
use crate::journal::Lsn;
use crate::model::{Entry, FileId, LocationNo, Name, Time};
use crate::ops::{Base, Change, INLINE_MAX_BYTES};
use crate::overlay::{self, Live};
use crate::staging::{Committed, Draft, Piece};
use bytes::{Bytes, BytesMut};
use dashmap::mapref::entry::Entry as Slot;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A file that is open, or being written.
#[derive(Default)]
pub(super) struct OpenFile {
    pub handles: usize,
    /// Those of them that may write.
    pub writers: usize,
    /// Over the version that whoever opens it now gets.
    pub written: Option<Arc<Written>>,
    /// Over versions that its owner has changed since.
    pub older: Vec<Arc<Written>>,
}

/// The bytes of one file, as its writers here have made them.
pub struct Written {
    pub(super) location: LocationNo,
    pub(super) draft: Arc<Draft>,
    pub(super) shown: overlay::Bytes,
    pub(super) state: Mutex<Writing>,
    /// What the next operation is based on. A leaf among the locks.
    basis: Mutex<Basis>,
    /// Where it was last seen; `None` when a program of this device deleted it. A leaf.
    path: Mutex<Option<Vec<Name>>>,
    /// The version whose bytes are read where nothing was written. A leaf among the locks.
    entry: Mutex<Under>,
    /// The operation that somebody waited for until it took too long; 0 if there is none.
    in_vain: AtomicU64,
}

/// What the next operation is based on.
struct Basis {
    base: Base,
    /// What programs have open.
    file: FileId,
    /// What is written to: that file, or the copy that its owner made of what was written.
    target: FileId,
}

/// What changes with each commit.
pub(super) struct Writing {
    /// The last operation with its bytes.
    pub op: Option<u64>,
    /// Of that operation's record.
    pub lsn: Lsn,
}

/// A version that is written over.
struct Under {
    entry: Arc<Entry>,
    reader: Option<Arc<Reader>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Replaced whole, so a panic elsewhere leaves it right.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Written {
    pub(super) fn new(
        (location, file): (LocationNo, FileId),
        (draft, shown): (Arc<Draft>, overlay::Bytes),
        base: Base,
        entry: Arc<Entry>,
    ) -> Arc<Self> {
        let state = Writing { op: None, lsn: Lsn(0) };
        let basis = Basis { base, file, target: file };
        Arc::new(Self {
            location,
            draft,
            shown,
            state: Mutex::new(state),
            basis: Mutex::new(basis),
            path: Mutex::default(),
            entry: Mutex::new(Under { entry, reader: None }),
            in_vain: AtomicU64::new(0),
        })
    }

    /// The generation under which this device shows the file.
    pub fn generation(&self) -> u32 {
        self.shown.generation
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.shown.live.size()
    }

    /// Whether something was written that no operation has yet.
    pub fn is_dirty(&self) -> bool {
        self.draft.is_dirty()
    }

    /// Size and times, for `stat`.
    pub fn live(&self) -> &Live {
        &self.shown.live
    }

    pub(super) fn bytes(&self) -> OpBytes {
        OpBytes { draft: Arc::clone(&self.draft), shown: self.shown.clone() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Writing> {
        lock(&self.state)
    }

    /// Nobody is to wait for this operation, or what comes after it, once more.
    pub(super) fn wait_no_more_for(&self, no: u64) {
        self.in_vain.store(no, Ordering::Relaxed);
    }

    pub(super) fn waited_in_vain(&self) -> Option<u64> {
        Some(self.in_vain.load(Ordering::Relaxed)).filter(|no| *no != 0)
    }

    /// The next operation builds on this one.
    pub(super) fn build_on(&self, no: u64) {
        lock(&self.basis).base = Base::After(no);
    }

    /// The operation has become a version of the owner's, perhaps of another file; whether this
    /// builds on it.
    pub(super) fn learned(&self, no: u64, version: &Base, target: Option<FileId>) -> bool {
        let mut basis = lock(&self.basis);
        let builds_on_it = basis.base == Base::After(no);
        if builds_on_it {
            basis.base = version.clone();
            basis.target = target.unwrap_or(basis.target);
        }
        builds_on_it
    }

    /// The file that programs have open.
    pub(super) fn file(&self) -> FileId {
        lock(&self.basis).file
    }

    /// What is written to.
    pub(super) fn target(&self) -> FileId {
        lock(&self.basis).target
    }

    /// What was written went into a copy, and so does all that follows.
    pub(super) fn goes_to(&self, copy: FileId) {
        lock(&self.basis).target = copy;
    }

    /// Its owner calls the file otherwise.
    pub(super) fn renamed(&self, file: FileId) {
        let mut basis = lock(&self.basis);
        if basis.target == basis.file {
            basis.target = file;
        }
        basis.file = file;
    }

    /// What was written over has become this version of the owner.
    pub(super) fn rest_on(&self, version: Entry) {
        *lock(&self.entry) = Under { entry: Arc::new(version), reader: None };
    }

    pub(crate) fn under(&self) -> Arc<Entry> {
        Arc::clone(&lock(&self.entry).entry)
    }

    fn reader(&self, outbox: &Outbox) -> FsResult<Arc<Reader>> {
        let mut under = lock(&self.entry);
        if let Some(reader) = &under.reader {
            return Ok(Arc::clone(reader));
        }
        let reader = Arc::new(outbox.open_version(self.location, &under.entry)?);
        Ok(Arc::clone(under.reader.insert(reader)))
    }

    fn within(&self, offset: u64, len: usize) -> u64 {
        self.draft.size().saturating_sub(offset).min(len as u64)
    }

    /// The bytes, when they are at hand without a network.
    pub fn try_read(&self, outbox: &Outbox, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        let pieces = match self.draft.read(offset, self.within(offset, len)) {
            Ok(pieces) => pieces,
            Err(error) => return Some(Err(error)),
        };
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            parts.push(match piece {
                Piece::Here(bytes) => bytes,
                Piece::Zero(len) => zeros(len),
                Piece::Base(range) => match self.reader(outbox) {
                    Ok(reader) => match reader.try_read(range.start, length(&range))? {
                        Ok(bytes) => padded(bytes, &range),
                        Err(error) => return Some(Err(error)),
                    },
                    Err(error) => return Some(Err(error)),
                },
            });
        }
        Some(Ok(joined(parts)))
    }

    /// The bytes, those of the base fetched from a holder if need be.
    pub async fn read(&self, outbox: &Outbox, offset: u64, len: usize) -> FsResult<Bytes> {
        let mut parts = Vec::new();
        for piece in self.draft.read(offset, self.within(offset, len))? {
            parts.push(match piece {
                Piece::Here(bytes) => bytes,
                Piece::Zero(len) => zeros(len),
                Piece::Base(range) => self.read_base(outbox, range).await?,
            });
        }
        Ok(joined(parts))
    }

    pub(super) async fn read_base(&self, outbox: &Outbox, range: Range<u64>) -> FsResult<Bytes> {
        let read = self.reader(outbox)?.read(range.start, length(&range)).await;
        let bytes = match read {
            Err(error) if error.kind() == Kind::Stale => {
                let under = self.under();
                let times = [under.attr.mtime, self.shown.live.mtime()];
                let row = outbox.restamped(self.location, &under, times).await.ok_or(error)?;
                self.rest_on((*row).clone());
                self.reader(outbox)?.read(range.start, length(&range)).await?
            }
            read => read?,
        };
        Ok(padded(bytes, &range))
    }
}

fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

fn zeros(len: u64) -> Bytes {
    Bytes::from(vec![0; usize::try_from(len).unwrap_or(usize::MAX)])
}

/// A base is as long as its row says; what a holder has less of it reads as zeros, as after a
/// truncation there.
fn padded(bytes: Bytes, range: &Range<u64>) -> Bytes {
    if bytes.len() == length(range) {
        return bytes;
    }
    let mut all = BytesMut::from(&bytes[..]);
    all.resize(length(range), 0);
    all.freeze()
}

fn joined(mut parts: Vec<Bytes>) -> Bytes {
    match parts.len() {
        0 => Bytes::new(),
        1 => parts.swap_remove(0),
        _ => Bytes::from(parts.concat()),
    }
}

/// Where a write goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Offset {
    /// Here.
    At(u64),
    /// To the end of the file.
    End,
}

/// How far rows may be behind what their owner answers.
const ROWS_BEHIND: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

impl Outbox {
    /// Reads a version's bytes, wherever they are.
    pub(crate) fn open_version(&self, location: LocationNo, version: &Entry) -> FsResult<Reader> {
        let content = self.content.get();
        let content = content.ok_or_else(|| FsError::new(Kind::Io, "read before it is ready"))?;
        content.open(location, version)
    }

    /// The row of the same bytes under another stamp, as after a chmod, another link, or when one
    /// of these times was set; or of these and more, when the file has grown. Their owner no longer
    /// gives them under the old stamp, and its rows come a moment later than it says so. `None`:
    /// other bytes, or no such row.
    pub(crate) async fn restamped(
        &self,
        location: LocationNo,
        old: &Entry,
        times: [Time; 2],
    ) -> Option<Arc<Entry>> {
        let deadline = Instant::now() + ROWS_BEHIND;
        loop {
            let file = self.now(location, old.file_id);
            let row = self.index.view().ok()?.node(location, file).ok()??.entry;
            if row.stamp() != old.stamp() {
                let is_same = (row.disk_ino, row.attr.size) == (old.disk_ino, old.attr.size)
                    && times.contains(&row.attr.mtime);
                return (is_same || row.is_grown(old)).then(|| Arc::new(row));
            }
            if Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What is open of a file, by whatever id this device called it.
    fn open_file(
        &self,
        location: LocationNo,
        file: FileId,
    ) -> Slot<'_, (LocationNo, FileId), OpenFile> {
        loop {
            let now = self.now(location, file);
            let slot = self.files.entry((location, now));
            // Unless it was renamed in between: then it is elsewhere, or soon will be.
            if self.now(location, file) == now {
                return slot;
            }
        }
    }

    /// A handle of a file was opened.
    pub(crate) fn opened(&self, location: LocationNo, file: FileId, may_write: bool) {
        let mut open = self.open_file(location, file).or_default();
        open.handles += 1;
        open.writers += usize::from(may_write);
    }

    /// A handle of a file was closed.
    pub(crate) fn closed(&self, location: LocationNo, file: FileId, may_write: bool) {
        // Nothing is renamed meanwhile.
        let mut state = self.state();
        self.open_file(location, file).and_modify(|open| {
            open.handles = open.handles.saturating_sub(1);
            open.writers = open.writers.saturating_sub(usize::from(may_write));
        });
        self.let_go_if_unused(&mut state, location, file);
    }

    /// Whether a handle is open whose close will commit what was changed.
    pub(crate) fn has_writer(&self, location: LocationNo, file: FileId) -> bool {
        let file = self.now(location, file);
        self.files.get(&(location, file)).is_some_and(|open| open.writers > 0)
    }

    /// Whether programs of this device write a file, or its bytes are shown as they wrote them.
    pub(crate) fn is_written(&self, location: LocationNo, file: FileId) -> bool {
        let file = self.now(location, file);
        let is_open =
            self.files.get(&(location, file)).is_some_and(|o| o.writers > 0 || o.written.is_some());
        is_open || self.has_bytes(location, file)
    }

    /// The bytes of a version as this device's programs have made them, if they did.
    pub(crate) fn written(
        &self,
        location: LocationNo,
        file: FileId,
        generation: u32,
    ) -> Option<Arc<Written>> {
        if self.files.is_empty() {
            return None;
        }
        let open = self.files.get(&(location, self.now(location, file)))?;
        let mut all = open.written.iter().chain(&open.older);
        all.find(|w| w.generation() == generation).cloned()
    }

    /// The same, made when there is none. `shown` is what programs see, `row` the version that
    /// is written over.
    pub(crate) fn writing(
        &self,
        location: LocationNo,
        generation: u32,
        row: &Arc<Entry>,
    ) -> FsResult<Arc<Written>> {
        let place = self.writable(location)?;
        let mut state = self.state();
        let file = self.now(location, row.file_id);
        let mut open = self.files.entry((location, file)).or_default();
        if let Some(written) = &open.written
            && written.generation() == generation
        {
            return Ok(Arc::clone(written));
        }
        let draft = self.staging.create(row.attr.size)?;
        let live = Live::new(row.attr.size, row.attr.mtime);
        let shown = overlay::Bytes { live, generation };
        let row_base = Base::Seen { stamp: row.stamp(), content: row.content };
        let base = state.base(place.id, file).unwrap_or(row_base);
        let written =
            Written::new((location, file), (Arc::clone(&draft), shown), base, Arc::clone(row));
        state.drafts.hold(&draft);
        let before = open.written.replace(Arc::clone(&written));
        open.older.extend(before);
        drop(open);
        self.path_of(&written)?;
        Ok(written)
    }

    /// Writes; returns how many bytes, which is all.
    pub(crate) fn write(&self, to: &Written, at: Offset, bytes: &[u8]) -> FsResult<usize> {
        if bytes.is_empty() {
            // Not even the time changes.
            return Ok(0);
        }
        self.change(to, |draft| {
            let offset = match at {
                Offset::At(offset) => offset,
                Offset::End => draft.size(),
            };
            check_size(offset, bytes.len() as u64)?;
            draft.write(offset, bytes)
        })?;
        Ok(bytes.len())
    }

    /// Cuts a file, or lengthens it with zeros.
    pub(crate) fn set_size(&self, of: &Written, size: u64) -> FsResult<()> {
        check_size(size, 0)?;
        self.change(of, |draft| draft.set_size(size))
    }

    /// Makes a range zero; beyond the end it lengthens the file unless its size is kept.
    pub(crate) fn zero(&self, of: &Written, range: Range<u64>, keep_size: bool) -> FsResult<()> {
        check_size(range.end, 0)?;
        self.change(of, |draft| {
            let size = draft.size();
            let within = range.start.min(size)..range.end.min(size);
            if !within.is_empty() {
                draft.zero(within)?;
            }
            match range.end > size && !keep_size {
                true => draft.set_size(range.end),
                false => Ok(()),
            }
        })
    }

    fn change(&self, of: &Written, change: impl FnOnce(&Draft) -> FsResult<()>) -> FsResult<()> {
        // One change after the other, so that an append finds the end where it is.
        let _writing = of.lock();
        change(&of.draft)?;
        of.shown.live.changed(of.draft.size());
        let is_shown = self.overlay_ref().shows(of.location, of.file(), &of.shown.live);
        if !is_shown && self.is_current(of) {
            self.overlay().show_uncommitted(of.location, of.file(), of.shown.clone());
        }
        Ok(())
    }

    /// Whether it is what whoever opens the file gets.
    fn is_current(&self, written: &Written) -> bool {
        let open = self.files.get(&(written.location, written.file()));
        let current = open.as_ref().and_then(|o| o.written.as_ref());
        current.is_some_and(|w| std::ptr::eq(&**w, written))
    }

    /// What was written becomes an operation, or part of the one that waits; gives the record of
    /// the journal that must be durable for it to be safe.
    pub(crate) fn commit(&self, of: &Written) -> FsResult<Lsn> {
        let mut writing = of.lock();
        if !of.draft.is_dirty() {
            let mut state = self.state();
            if let Some(no) = writing.op {
                self.release_hold(&mut state, no);
            }
            return Ok(writing.lsn.max(self.lsn_of(&state, writing.op)));
        }
        let committed = of.draft.commit(INLINE_MAX_BYTES)?;
        let mut state = self.state();
        let snapshot = committed.snapshot.clone();
        match self.accept_bytes(&mut state, of, &mut writing, committed) {
            Ok(lsn) => {
                writing.lsn = lsn;
                Ok(lsn)
            }
            Err(error) => {
                // The next close or fsync tries again, and says so again if it fails.
                of.draft.take_back(&snapshot);
                Err(error)
            }
        }
    }

    fn lsn_of(&self, state: &State, op: Option<u64>) -> Lsn {
        op.and_then(|no| state.ops.get(&no)).map_or(Lsn(0), |op| op.lsn)
    }

    fn accept_bytes(
        &self,
        state: &mut State,
        of: &Written,
        writing: &mut Writing,
        committed: Committed,
    ) -> FsResult<Lsn> {
        let mtime = of.shown.live.mtime();
        if let Some(no) = writing.op.filter(|no| self.may_be_joined(state, *no)) {
            self.rewrite(state, no, committed, mtime)?;
            self.release_hold(state, no);
            return Ok(self.lsn_of(state, Some(no)));
        }
        let location = self.writable(of.location)?;
        let Some(path) = self.path_of(of)? else {
            // Deleted here while it was open: nobody will ever look for its bytes.
            of.draft.release(&committed.snapshot);
            self.overlay().hide_uncommitted(of.location, of.file());
            return Ok(state.last);
        };
        let (base, target) = {
            let basis = lock(&of.basis);
            (basis.base.clone(), basis.target)
        };
        let change = Change::Write {
            file: target,
            base,
            content: content(Some(&committed.snapshot), mtime),
            path: path.clone(),
        };
        let bytes = NewBytes {
            bytes: of.bytes(),
            snapshot: Some(committed.snapshot),
            fill: committed.fill,
        };
        let no = self.accept(
            state,
            NewOp {
                location,
                change,
                is_directory: false,
                path,
                bytes: Some(bytes),
                is_held: false,
                generation: None,
            },
        )?;
        of.build_on(no);
        writing.op = Some(no);
        if target != of.file() {
            // They are of the copy that its owner made of them, and shown there.
            self.overlay().hide_uncommitted(of.location, of.file());
        }
        Ok(self.lsn_of(state, Some(no)))
    }

    /// Where the file is, or was when it was last there; `None`: a program of this device deleted
    /// it. Its owner may have deleted it as well, or its rows may be behind what it answers: what
    /// is written counts all the same.
    fn path_of(&self, written: &Written) -> FsResult<Option<Vec<Name>>> {
        let seen = self.view().path(written.location, written.file())?;
        let mut last = lock(&written.path);
        if seen.is_some() {
            last.clone_from(&seen);
        }
        Ok(seen.or_else(|| last.clone()))
    }

    /// A program of this device removed a name of the file.
    pub(super) fn unnamed(&self, location: LocationNo, file: FileId) -> FsResult<()> {
        if self.view().path(location, file)?.is_some() {
            return Ok(());
        }
        if let Some(open) = self.files.get(&(location, self.now(location, file))) {
            let all = open.written.iter().chain(&open.older);
            all.for_each(|written| *lock(&written.path) = None);
        }
        Ok(())
    }

    /// Whether an operation was neither sent nor built upon, so that more bytes may join it.
    fn may_be_joined(&self, state: &State, no: u64) -> bool {
        state.ops.get(&no).is_some_and(|op| op.is_here_only()) && !state.order.is_needed(no)
    }

    /// Gives an operation that waits these bytes instead of those it had.
    pub(super) fn rewrite(
        &self,
        state: &mut State,
        no: u64,
        committed: Committed,
        mtime: Time,
    ) -> FsResult<()> {
        let Some(op) = state.ops.get(&no) else { return Ok(()) };
        let mut record = op.record.clone();
        let before = record.snapshot.replace(committed.snapshot);
        if let Some(old) = content_mut(&mut record.change) {
            *old = content(record.snapshot.as_ref(), mtime);
        }
        let bytes = op.bytes.clone();
        let lsn = self.note_op(state, &record, committed.fill)?;
        if let (Some(before), Some(bytes)) = (before, &bytes) {
            bytes.draft.release(&before);
        }
        if let Some(no_of) = self.index.location_by_id(record.location) {
            self.show(no_of.no, &record, bytes.as_ref());
        }
        if let Some(op) = state.ops.get_mut(&no) {
            (op.record, op.lsn, op.digest) = (record, lsn, None);
        }
        // It may be long by now, and travel apart from those that it went behind.
        state.place(no);
        Ok(())
    }

    fn release_hold(&self, state: &mut State, no: u64) {
        let held = state.ops.get(&no).map(|op| op.progress);
        if matches!(held, Some(Progress::Held(_))) {
            state.set(no, Progress::Waiting(None));
        }
    }

    /// What became of earlier bytes of this file.
    fn late_error(&self, written: &Written, is_last_time: bool) -> FsResult<()> {
        let op = written.lock().op;
        let mut state = self.state();
        let op = op.and_then(|no| state.ops.get_mut(&no));
        let late = op.and_then(|op| match is_last_time {
            true => op.late.take(),
            false => op.late,
        });
        match late {
            Some(kind) => Err(FsError::new(kind, "deliver what was written before")),
            None => Ok(()),
        }
    }

    /// A program closed the file: what it wrote, and everything accepted before, is durable when
    /// this returns. An error that its owner met with earlier bytes is told; they are kept all the
    /// same. Not for the last time: a process that starts another one closes what that one
    /// inherited, and nobody hears of it.
    pub(crate) fn flush(&self, written: &Written) -> FsResult<()> {
        self.make_durable(written)?;
        self.late_error(written, false)
    }

    /// The same for a program that asks for it: an error is told once.
    pub(crate) fn fsync(&self, written: &Written) -> FsResult<()> {
        let earlier = self.late_error(written, true);
        self.make_durable(written)?;
        earlier
    }

    fn make_durable(&self, written: &Written) -> FsResult<()> {
        self.commit(written)?;
        // Not only its own record: a rename of the file, too, is durable after an `fsync` of it.
        let last = self.state().last;
        if self.journal.durable() >= last {
            // It may have waited for this close alone.
            self.tick();
        }
        self.sync_upto(last)
    }

    /// The version of a file as its owner's row has it.
    pub(super) fn row_base(&self, location: LocationNo, file: FileId) -> Option<Base> {
        let row = self.index.view().ok()?.node(location, file).ok()??.entry;
        Some(Base::Seen { stamp: row.stamp(), content: row.content })
    }

    /// Drops what nobody has open and no operation needs.
    pub(super) fn let_go_if_unused(&self, state: &mut State, location: LocationNo, file: FileId) {
        let Slot::Occupied(mut slot) = self.open_file(location, file) else { return };
        if slot.get().handles > 0 {
            return;
        }
        for older in std::mem::take(&mut slot.get_mut().older) {
            state.drafts.let_go(&older.draft);
        }
        let is_shown = slot.get().written.as_ref().is_some_and(|w| {
            let shown = self.overlay_ref().bytes(location, file);
            shown.is_some_and(|s| Arc::ptr_eq(&s.live, &w.shown.live))
        });
        if is_shown {
            return;
        }
        if let Some(written) = slot.remove().written {
            state.drafts.let_go(&written.draft);
        }
    }
}

fn check_size(offset: u64, len: u64) -> FsResult<()> {
    let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
    end.map(drop).ok_or_else(|| FsError::new(Kind::FileTooLarge, "write"))
}
