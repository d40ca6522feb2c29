//! One draft: what was written to one file.

use super::body::{BLOCK_BYTES, Body};
use super::map::{self, Map, Part, Stored};
use super::store::Store;
use super::{Committed, DraftId, Extent, Piece, Snapshot};
use crate::content::ranges::RangeSet;
use crate::error::{FsError, FsResult, Kind};
use crate::failpoint::fail_point;
use crate::journal::Lsn;
use crate::model::ContentId;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bytes are hashed in parts of this.
const HASH_BYTES: u64 = 1 << 20;
/// A file is hashed as a whole when it has no more zeros that were never written than this, and
/// twice what was written.
const HASHED_HOLES_BYTES: u64 = 64 << 20;

/// The changed bytes of one file.
///
/// Calls may come from any thread. Reads are answered under a shared lock, so that what they
/// read is not overwritten or punched out meanwhile.
#[derive(Debug)]
pub struct Draft {
    store: Arc<Store>,
    id: DraftId,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    map: Map,
    body: Body,
    /// Everything below is part of a committed state, or was; new bytes go above.
    committed_end: u64,
    /// Where new bytes go.
    end: u64,
    /// Stored ranges that the disk may not have.
    unsynced: RangeSet,
    /// Zeros were stored, which is the length of the file, and that may not be on the disk.
    unsynced_zeros: bool,
    /// Stored ranges that were given back.
    freed: RangeSet,
    /// Committed and not released, in the order of their commits.
    held: Vec<Snapshot>,
    /// Released, but held until the journal is durable up to there.
    released: VecDeque<(Lsn, Snapshot)>,
    dirty: bool,
    /// Why nothing can be committed any more: what the disk dropped cannot be known.
    failed: Option<String>,
    used_bytes: u64,
}

impl Draft {
    pub(super) fn new(store: Arc<Store>, id: DraftId, base_size: u64) -> Self {
        let state = State {
            map: Map::new(base_size),
            body: Body::new(store.clone(), id),
            committed_end: 0,
            end: 0,
            unsynced: RangeSet::default(),
            unsynced_zeros: false,
            freed: RangeSet::default(),
            held: Vec::new(),
            released: VecDeque::new(),
            dirty: false,
            failed: None,
            used_bytes: 0,
        };
        Self { store, id, state: RwLock::new(state) }
    }

    /// A draft whose file may be there.
    pub(super) fn reopen(store: Arc<Store>, id: DraftId) -> FsResult<Self> {
        let failed = |e| FsError::os("open a staged file", e);
        let draft = Self::new(store.clone(), id, 0);
        if store.path(id).exists() {
            let state = &mut *draft.write_state();
            state.body = Body::in_file(store, id);
            // What an uncommitted write left there is never taken for anything.
            state.end = state.body.len().map_err(failed)?.next_multiple_of(BLOCK_BYTES);
            state.used_bytes = state.body.used_bytes().map_err(failed)?;
        }
        Ok(draft)
    }

    /// Takes a committed state for the present one.
    pub(super) fn restore(&self, snapshot: &Snapshot, fill: &[(u64, Bytes)]) -> FsResult<()> {
        let failed = |e| FsError::os("restore a staged file", e);
        let state = &mut *self.write_state();
        let durable = durable(snapshot, fill, state.body.len().map_err(failed)?)?;
        for (at, bytes) in fill {
            let range = *at..at + bytes.len() as u64;
            state.body.reserve(range.end, &state.freed).map_err(failed)?;
            state.body.write(bytes, range.start).map_err(failed)?;
            state.unsynced.insert(range);
        }
        for range in durable.iter() {
            // The file's name was durable with them.
            state.body.named();
            state.unsynced.remove(range);
        }
        state.end = state.end.max(state.body.len().map_err(failed)?.next_multiple_of(BLOCK_BYTES));
        let used = state.body.used_bytes().map_err(failed)?;
        self.store.account(state.used_bytes, used);
        state.used_bytes = used;
        state.map = Map::after(&state.map, snapshot);
        state.committed_end = state.end;
        state.held.push(snapshot.clone());
        state.dirty = false;
        Ok(())
    }

    /// Its number.
    pub fn id(&self) -> DraftId {
        self.id
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.read_state().map.size
    }

    /// Whether anything changed since the last commit.
    pub fn is_dirty(&self) -> bool {
        self.read_state().dirty
    }

    /// Writes all bytes, or fails. A failure leaves the file's state as it was, but for bytes
    /// not committed yet in the same range, which the disk may have overwritten in part.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(bytes.len() as u64).filter(|&end| i64::try_from(end).is_ok());
        let range = offset..end.ok_or_else(|| FsError::new(Kind::FileTooLarge, "stage a write"))?;
        let of = |part: &Range<u64>| {
            &bytes[(part.start - offset) as usize..(part.end - offset) as usize]
        };
        let state = &mut *self.write_state();
        let (over, new) = state.plan(range.clone());
        let new_bytes: u64 = new.iter().map(|part| part.end - part.start).sum();
        self.store.claim(new_bytes)?;
        let failed = |e| FsError::os("stage a write", e);
        let mut stored_at = state.end;
        let end = stored_at.checked_add(new_bytes).ok_or(Kind::FileTooLarge)?;
        state.body.reserve(end, &state.freed).map_err(failed)?;
        for part in &new {
            state.body.write(of(part), stored_at).map_err(failed)?;
            stored_at += part.end - part.start;
        }
        for (part, stored_at) in &over {
            state.body.write(of(part), *stored_at).map_err(failed)?;
        }
        state.dirty = true;
        for (part, stored_at) in over {
            state.unsynced.insert(stored_at..stored_at + (part.end - part.start));
        }
        for part in new {
            state.store_new(part, true);
        }
        self.store.account(0, new_bytes);
        state.used_bytes += new_bytes;
        Ok(())
    }

    /// What a range holds, in order, up to the end of the file.
    pub fn read(&self, offset: u64, len: u64) -> FsResult<Vec<Piece>> {
        let state = self.read_state();
        let parts = state.map.parts(offset..offset.saturating_add(len));
        let piece = |(range, part): (Range<u64>, Part)| {
            Ok(match part {
                Part::Base => Piece::Base(range),
                Part::Zero => Piece::Zero(range.end - range.start),
                Part::Stored(at) => {
                    let stored = at..at + (range.end - range.start);
                    let bytes = state.body.read(stored);
                    Piece::Here(bytes.map_err(|e| FsError::os("read staged bytes", e))?)
                }
            })
        };
        parts.into_iter().map(piece).collect()
    }

    /// Cuts the file, or lengthens it with zeros.
    pub fn set_size(&self, size: u64) -> FsResult<()> {
        if i64::try_from(size).is_err() {
            return Err(FsError::new(Kind::FileTooLarge, "stage a change of size"));
        }
        let mut state = self.write_state();
        // The same size, too, is a change: of the time.
        state.dirty = true;
        if size != state.map.size {
            let dropped = state.map.set_size(size);
            self.free_uncommitted(&mut state, dropped);
        }
        Ok(())
    }

    /// Makes a range zero, within the size.
    pub fn zero(&self, range: Range<u64>) -> FsResult<()> {
        let state = &mut *self.write_state();
        if range.start >= range.end.min(state.map.size) {
            return Ok(());
        }
        let zeros = state.map.needs_zeros(&range);
        let len = zeros.end - zeros.start;
        if len > 0 {
            // Never written and beyond everything, so it reads as zeros.
            let failed = |e| FsError::os("stage a hole", e);
            let end = state.end.checked_add(len).ok_or(Kind::FileTooLarge)?;
            state.body.reserve(end, &state.freed).map_err(failed)?;
            state.body.lengthen(end).map_err(failed)?;
        }
        let dropped = state.map.zero(range);
        state.dirty = true;
        if len > 0 {
            // In memory they are bytes like others; in a file they take no space.
            let are_bytes = state.body.is_in_memory();
            state.store_new(zeros, are_bytes);
            state.unsynced_zeros |= !are_bytes;
        }
        self.free_uncommitted(state, dropped);
        Ok(())
    }

    /// Makes the present state one that survives, together with what the caller keeps of it. Up
    /// to `inline_max` bytes that the disk may not have yet are given back as fill; are there
    /// more, then all are made durable here and the fill is empty.
    ///
    /// The snapshot is held until [`Draft::release`].
    pub fn commit(&self, inline_max: u64) -> FsResult<Committed> {
        let mut state = self.write_state();
        self.free_released(&mut state);
        if let Some(reason) = &state.failed {
            return Err(FsError::caused(Kind::Io, "commit staged bytes", reason.clone()));
        }
        let snapshot = state.snapshot(self.id);
        let missing = state.missing(&snapshot);
        let bytes: u64 = missing.iter().map(|range| range.end - range.start).sum();
        let end = state.end;
        let fill = if bytes <= inline_max && !state.unsynced_zeros {
            self.read_all(&state, missing)?
        } else {
            let State { body, freed, .. } = &mut *state;
            let file =
                body.move_to_file(freed).map_err(|e| FsError::os("make a staged file", e))?;
            let is_unnamed = state.body.is_unnamed();
            // Reads and writes go on meanwhile: writes go above `committed_end`.
            state.hold(&snapshot);
            drop(state);
            fail_point("staging::sync");
            let synced = file.sync_data().and_then(|()| match is_unnamed {
                true => self.store.sync_name(self.id),
                false => Ok(()),
            });
            fail_point("staging::synced");
            state = self.write_state();
            if let Err(error) = synced {
                state.let_go(&snapshot);
                state.dirty = true;
                state.failed = Some(error.to_string());
                return Err(FsError::os("sync staged bytes", error));
            }
            state.synced(end);
            return Ok(Committed { snapshot, fill: Vec::new() });
        };
        state.hold(&snapshot);
        Ok(Committed { snapshot, fill })
    }

    /// What the disk may not have of a snapshot that was not released: what is to be kept with it,
    /// where what was kept of it before goes.
    pub fn fill(&self, snapshot: &Snapshot) -> FsResult<Vec<(u64, Bytes)>> {
        let state = self.read_state();
        self.read_all(&state, state.missing(snapshot))
    }

    /// The next commit lists everything that was written, whatever was delivered of it.
    pub fn differ_everywhere(&self) {
        let mut state = self.write_state();
        state.map.extents_are_dirty();
        state.dirty = true;
    }

    /// The caller could not keep what a commit gave: nothing was committed, and it is all to be
    /// committed again.
    pub fn take_back(&self, snapshot: &Snapshot) {
        let mut state = self.write_state();
        state.let_go(snapshot);
        state.dirty = true;
    }

    fn read_all(&self, state: &State, ranges: Vec<Range<u64>>) -> FsResult<Vec<(u64, Bytes)>> {
        let failed = |e| FsError::os("read staged bytes", e);
        let read = |range: Range<u64>| Ok((range.start, state.body.read(range).map_err(failed)?));
        ranges.into_iter().map(read).collect()
    }

    /// Reads a snapshot's bytes; the range (of the file) lies within one extent.
    pub fn snapshot_read(&self, snapshot: &Snapshot, range: Range<u64>) -> io::Result<Bytes> {
        let extent = map::meeting(&snapshot.extents, range.clone()).next();
        let extent = extent.filter(|e| e.at <= range.start && range.end <= e.end());
        let Some(extent) = extent else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a range beyond an extent"));
        };
        let from = extent.stored_at + (range.start - extent.at);
        self.read_stored(from..from + (range.end - range.start))
    }

    fn read_stored(&self, stored: Range<u64>) -> io::Result<Bytes> {
        let state = self.read_state();
        if state.freed.present(stored.clone()).next().is_some() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "a snapshot that was released"));
        }
        state.body.read(stored)
    }

    /// The snapshot is the owner's version now, and so the base of what follows: later commits
    /// list only what differs from it. Its bytes stay readable here.
    pub fn delivered(&self, snapshot: &Snapshot) {
        let state = &mut *self.write_state();
        let known = state.held.iter().position(|held| same(held, snapshot));
        state.map.rebase(snapshot, &state.held[known.map_or(0, |n| n + 1)..]);
    }

    /// Nobody needs this snapshot any more, also not after a crash: once the journal is durable as
    /// it is now ([`super::Staging::follow`]), the space of what was written over since is freed.
    /// Every snapshot is kept until then.
    pub fn release(&self, snapshot: &Snapshot) {
        let mut state = self.write_state();
        state.released.push_back((self.store.written(), snapshot.clone()));
        self.free_released(&mut state);
    }

    fn free_released(&self, state: &mut State) {
        let mut freed = false;
        while state.released.front().is_some_and(|(lsn, _)| self.store.is_durable(*lsn)) {
            if let Some((_, snapshot)) = state.released.pop_front() {
                state.let_go(&snapshot);
                freed = true;
            }
        }
        if freed {
            let unneeded = state.unneeded();
            self.free(state, unneeded);
        }
    }

    /// BLAKE3 of the extents' bytes, and of all bytes of the file where that needs no base and
    /// the holes are small.
    pub fn digest(&self, snapshot: &Snapshot) -> io::Result<([u8; 32], Option<ContentId>)> {
        let written: u64 = snapshot.extents.iter().map(|e| e.len).sum();
        let holes = snapshot.size - written;
        let whole = snapshot.kept_bytes == 0
            && holes <= written.saturating_mul(2).saturating_add(HASHED_HOLES_BYTES);
        let mut bytes = blake3::Hasher::new();
        let mut file = (whole && holes > 0).then(blake3::Hasher::new);
        let mut at = 0;
        for extent in snapshot.extents.iter() {
            if let Some(file) = &mut file {
                hash_zeros(file, extent.at - at);
            }
            at = extent.end();
            let mut from = extent.stored_at;
            while from < extent.stored().end {
                let to = (from + HASH_BYTES).min(extent.stored().end);
                let part = self.read_stored(from..to)?;
                bytes.update_rayon(&part);
                if let Some(file) = &mut file {
                    file.update_rayon(&part);
                }
                from = to;
            }
        }
        let digest = *bytes.finalize().as_bytes();
        let content = file.map_or(digest, |mut file| {
            hash_zeros(&mut file, snapshot.size - at);
            *file.finalize().as_bytes()
        });
        Ok((digest, whole.then_some(ContentId(content))))
    }

    /// What is stored below is not written to any more; `None`: there is no file to be synced.
    pub(super) fn committed_end(&self) -> Option<u64> {
        let state = self.read_state();
        state.body.is_in_file().then_some(state.committed_end)
    }

    /// Everything stored below is on the disk.
    pub(super) fn synced(&self, end: u64) {
        self.write_state().synced(end);
    }

    /// Gives all its space back.
    pub(super) fn remove(&self) {
        let mut state = self.write_state();
        state.body.remove();
        self.store.account(state.used_bytes, 0);
        state.used_bytes = 0;
    }

    /// Gives back what no commit ever had.
    fn free_uncommitted(&self, state: &mut State, dropped: Vec<Range<u64>>) {
        let border = state.committed_end;
        let ours = dropped.into_iter().map(|range| range.start.max(border)..range.end);
        self.free(state, ours.filter(|range| !range.is_empty()).collect());
    }

    /// Gives the space of stored ranges back.
    fn free(&self, state: &mut State, ranges: Vec<Range<u64>>) {
        if ranges.is_empty() {
            return;
        }
        for range in &ranges {
            state.freed.insert(range.clone());
        }
        let Ok(gone) = state.body.free(ranges, &state.freed) else { return };
        let gone = gone.min(state.used_bytes);
        state.used_bytes -= gone;
        self.store.account(gone, 0);
    }

    /// What a crash of the machine may take: stored ranges, and the file's name.
    #[cfg(test)]
    pub(super) fn volatile(&self) -> (Vec<Range<u64>>, bool) {
        let state = self.read_state();
        (state.unsynced.iter().collect(), state.body.is_unnamed())
    }

    /// Its file as a crash of the machine may find it; `None`: it has none.
    #[cfg(test)]
    pub(super) fn on_disk(&self) -> Option<super::OnDisk> {
        let bytes = std::fs::read(self.store.path(self.id)).ok()?;
        let (volatile, is_unnamed) = self.volatile();
        Some(super::OnDisk { draft: self.id, bytes, volatile, is_unnamed })
    }

    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ranges of the file that are written in place, and where; ranges that go to new space.
type Plan = (Vec<(Range<u64>, u64)>, Vec<Range<u64>>);

impl State {
    /// For a write: what overwrites bytes of no commit, and where; what goes to new space.
    fn plan(&self, range: Range<u64>) -> Plan {
        let (mut over, mut new) = (Vec::new(), Vec::<Range<u64>>::new());
        let mut at = range.start;
        for (start, stored) in self.map.meeting(range.clone()) {
            if stored.stored_at < self.committed_end {
                continue;
            }
            let from = start.max(range.start);
            let to = (start + stored.len).min(range.end);
            if at < from {
                new.push(at..from);
            }
            over.push((from..to, stored.stored_at + (from - start)));
            at = to;
        }
        if at < range.end {
            new.push(at..range.end);
        }
        (over, new)
    }

    /// Says that a range is stored behind everything else.
    fn store_new(&mut self, range: Range<u64>, written: bool) {
        let stored = Stored { len: range.end - range.start, stored_at: self.end, clean: false };
        self.end += stored.len;
        if written {
            self.unsynced.insert(stored.stored_at..self.end);
        }
        // What is dropped here was committed: a snapshot may have it.
        self.map.drop_range(range.clone());
        self.map.insert(range.start, stored, self.committed_end);
    }

    fn snapshot(&self, draft: DraftId) -> Snapshot {
        let Map { size, kept, .. } = self.map;
        Snapshot { draft, size, kept_bytes: kept, extents: self.map.dirty().into() }
    }

    /// Stored ranges of a snapshot that the disk may not have, joined.
    fn missing(&self, snapshot: &Snapshot) -> Vec<Range<u64>> {
        let mut missing = RangeSet::default();
        for stored in snapshot.extents.iter().map(Extent::stored) {
            for range in self.unsynced.present(stored) {
                missing.insert(range);
            }
        }
        missing.iter().collect()
    }

    /// Makes the present state a committed one.
    fn hold(&mut self, snapshot: &Snapshot) {
        self.held.push(snapshot.clone());
        self.committed_end = self.end;
        self.dirty = false;
    }

    fn let_go(&mut self, snapshot: &Snapshot) {
        if let Some(n) = self.held.iter().position(|held| same(held, snapshot)) {
            self.held.remove(n);
        }
    }

    fn synced(&mut self, end: u64) {
        let later: Vec<_> = self.unsynced.present(end..u64::MAX).collect();
        self.unsynced = RangeSet::default();
        for range in later {
            self.unsynced.insert(range);
        }
        self.unsynced_zeros &= self.end > end;
        self.body.named();
    }

    /// Stored ranges that no state needs and that were not given back yet.
    fn unneeded(&self) -> Vec<Range<u64>> {
        let mut needed = RangeSet::default();
        let held =
            self.held.iter().flat_map(|snapshot| snapshot.extents.iter().map(Extent::stored));
        for range in self.map.stored().chain(held) {
            needed.insert(range);
        }
        let unneeded = needed.missing(0..self.committed_end);
        unneeded.flat_map(|range| self.freed.missing(range).collect::<Vec<_>>()).collect()
    }
}

/// What of a snapshot the disk had when it was committed: all but its fill. An error if the
/// file is too short to have it.
fn durable(snapshot: &Snapshot, fill: &[(u64, Bytes)], len: u64) -> FsResult<RangeSet> {
    let mut durable = RangeSet::default();
    for stored in snapshot.extents.iter().map(Extent::stored) {
        durable.insert(stored);
    }
    for (at, bytes) in fill {
        let end = at.checked_add(bytes.len() as u64).filter(|&end| i64::try_from(end).is_ok());
        durable.remove(*at..end.ok_or(Kind::Invalid)?);
    }
    if durable.end() > len {
        let what = "restore a staged file: its bytes are not there";
        return Err(FsError::new(Kind::Io, what));
    }
    Ok(durable)
}

fn same(a: &Snapshot, b: &Snapshot) -> bool {
    Arc::ptr_eq(&a.extents, &b.extents) && a.size == b.size || a == b
}

fn hash_zeros(hasher: &mut blake3::Hasher, mut bytes: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while bytes > 0 {
        let part = bytes.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..part as usize]);
        bytes -= part;
    }
}
