//! One commit in the making: rows with everything that must change along with them.
//!
//! A [`Tx`] reads its own writes. It keeps these invariants, on which all reads rely:
//!
//! - every row of Entries has its key in Nodes and its place in Log, and no other place;
//! - a name is in Entries or in Tombstones, never in both, and each has one place in Log;
//! - a row with a content id has its key in Content (in a replica: unless its file has more
//!   than [`REPLICA_NAMES`] names, or it is not listed yet, see `holders`);
//! - the state of a location (counts, head) is that of its rows;
//! - the sum of a log, where there is one, has every place up to one of them, see `digest`.

use super::digest::{Sum, Summand};
use super::expect::Expected;
use super::key;
use super::memory::Memory;
use super::read;
use super::row::{Row, State, encode};
use super::store::{Batch, Snapshot, StoreError, Table, Visit};
use super::{Counts, IndexError, ROOT_PARENT};
use crate::changes::{Brief, Change};
use crate::model::{DeviceId, Entry, FileId, FileType, LocationNo, Name, Seq};
use crate::ops::DRAWN_FILE_ID;
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

/// How many names of one file are looked at, and kept alike; beyond it, scans bring the
/// others up to date.
pub(super) const NAMES_ALIKE: usize = 1024;
/// The same in a replica, whose owner may give one file a million names, in any order: what is
/// looked at for each of its rows is bounded. Beyond it, a holder of bytes may be overlooked.
pub(super) const REPLICA_NAMES: usize = 16;

/// The name of a row: its directory and its name there.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) no: LocationNo,
    pub(super) parent: FileId,
    pub(super) name: &'a Name,
}

impl Place<'_> {
    fn entry_key(&self) -> Vec<u8> {
        key::entry(self.no, self.parent, self.name.as_bytes())
    }

    /// The place in the log of what has this name.
    pub(super) fn summand<'r>(&'r self, row: &'r Row) -> Summand<'r> {
        Summand { seq: row.seq, parent: self.parent, name: self.name, entry: &row.entry }
    }

    pub(super) fn node_key(&self, file: FileId) -> Vec<u8> {
        key::node(self.no, file, self.parent, self.name.as_bytes())
    }
}

pub(super) struct Tx<'a> {
    snapshot: Box<dyn Snapshot + 'a>,
    memory: &'a Memory,
    expected: &'a Expected,
    me: DeviceId,
    pub(super) batch: Batch,
    pub(super) changes: Vec<Change>,
    states: BTreeMap<LocationNo, State>,
    sums: BTreeMap<LocationNo, LoadedSum>,
    /// Rows are written without their keys in Content, which follow later.
    pub(super) is_unlisted: bool,
}

/// The sum of a log as this commit leaves it.
#[derive(Default)]
struct LoadedSum {
    sum: Option<Sum>,
    is_changed: bool,
}

impl<'a> Tx<'a> {
    pub(super) fn new(
        snapshot: Box<dyn Snapshot + 'a>,
        memory: &'a Memory,
        expected: &'a Expected,
        me: DeviceId,
    ) -> Self {
        let (batch, changes, states, sums) = Default::default();
        let is_unlisted = false;
        Self { snapshot, memory, expected, me, batch, changes, states, sums, is_unlisted }
    }

    /// The id that an inode about to appear is to have.
    pub(super) fn expected(&self, no: LocationNo, disk_ino: u64) -> Option<FileId> {
        self.expected.file(no, disk_ino)
    }

    /// Whether a name is one that nobody is to see.
    pub(super) fn is_hidden(&self, no: LocationNo, name: &Name) -> bool {
        self.expected.is_hidden(no, name)
    }

    /// The location's state, to be written with this commit.
    pub(super) fn state(&mut self, no: LocationNo) -> Result<&mut State, IndexError> {
        if !self.states.contains_key(&no) {
            let state = self.memory.state(no).ok_or(IndexError::NoSuchLocation(no))?;
            self.states.insert(no, state);
        }
        Ok(self.states.get_mut(&no).expect("inserted above"))
    }

    /// Gives a new location its first state, or an emptied one another.
    pub(super) fn set_state(&mut self, no: LocationNo, state: State) {
        self.states.insert(no, state);
    }

    /// The batch, the states in it, and the changes to announce.
    pub(super) fn finish(mut self) -> (Batch, BTreeMap<LocationNo, State>, Vec<Change>) {
        self.states.retain(|no, state| self.memory.state(*no).as_ref() != Some(state));
        for (no, state) in &self.states {
            self.batch.put(Table::Meta, key::state(*no), encode(state));
        }
        for (no, loaded) in self.sums.iter().filter(|(_, loaded)| loaded.is_changed) {
            if let Some(sum) = &loaded.sum {
                self.batch.put(Table::Meta, key::sum(*no), sum.to_bytes());
            }
        }
        (self.batch, self.states, self.changes)
    }

    /// The sum of the location's log, as far as there is one.
    pub(super) fn sum(&mut self, no: LocationNo) -> Result<Option<Sum>, IndexError> {
        Ok(self.loaded_sum(no)?.sum.clone())
    }

    /// Has the sum of a location's log written with this commit.
    pub(super) fn put_sum(&mut self, no: LocationNo, sum: Sum) {
        self.sums.insert(no, LoadedSum { sum: Some(sum), is_changed: true });
    }

    fn loaded_sum(&mut self, no: LocationNo) -> Result<&mut LoadedSum, IndexError> {
        if !self.sums.contains_key(&no) {
            let bytes = self.get(Table::Meta, &key::sum(no))?;
            let damaged = || IndexError::DamagedRow("the sum of a log");
            let sum = bytes.map(|b| Sum::from_bytes(&b).ok_or_else(damaged)).transpose()?;
            self.sums.insert(no, LoadedSum { sum, is_changed: false });
        }
        Ok(self.sums.get_mut(&no).expect("inserted above"))
    }

    /// A row loses its place in the log.
    fn leave_log(&mut self, no: LocationNo, place: Summand<'_>) -> Result<(), IndexError> {
        self.batch.delete(Table::Log, key::log(no, place.seq));
        let loaded = self.loaded_sum(no)?;
        if let Some(sum) = loaded.sum.as_mut().filter(|sum| sum.upto() >= place.seq) {
            sum.subtract(place);
            loaded.is_changed = true;
        }
        Ok(())
    }

    pub(super) fn next_seq(&mut self, no: LocationNo) -> Result<Seq, IndexError> {
        let head = &mut self.state(no)?.head;
        *head = Seq(head.0.checked_add(1).ok_or(IndexError::TooMany("changes"))?);
        Ok(*head)
    }

    pub(super) fn next_file(&mut self, no: LocationNo) -> Result<FileId, IndexError> {
        let state = self.state(no)?;
        if state.last_file + 1 >= DRAWN_FILE_ID {
            return Err(IndexError::TooMany("files"));
        }
        state.last_file += 1;
        Ok(FileId(state.last_file))
    }

    pub(super) fn row(&self, place: Place<'_>) -> Result<Option<Row>, IndexError> {
        read::row(self, place.no, place.parent, place.name.as_bytes())
    }

    /// Writes a row over `old`, which is what the place has now.
    pub(super) fn put_row(
        &mut self,
        place: Place<'_>,
        old: Option<&Row>,
        entry: Entry,
        seq: Seq,
    ) -> Result<(), IndexError> {
        match old {
            Some(old) => self.unlink_old(place, old, &entry)?,
            None => self.drop_tombstone(place)?,
        }
        self.count(place, &entry, true)?;
        self.log_at(place, seq);
        self.batch.put(Table::Nodes, place.node_key(entry.file_id), []);
        if !self.is_unlisted {
            self.list_content(place.no, &entry);
        }
        self.announce(place, old.map(|o| &o.entry), &entry)?;
        self.batch.put(Table::Entries, place.entry_key(), encode(&Row { seq, entry }));
        Ok(())
    }

    /// Notes who has these bytes.
    pub(super) fn list_content(&mut self, no: LocationNo, entry: &Entry) {
        if let Some(content) = entry.content {
            self.batch.put(Table::Content, key::content(content, no, entry.file_id), []);
        }
    }

    /// Takes away what of the old row the new one does not overwrite.
    fn unlink_old(&mut self, place: Place<'_>, old: &Row, new: &Entry) -> Result<(), IndexError> {
        self.leave_log(place.no, place.summand(old))?;
        self.count(place, &old.entry, false)?;
        if old.entry.file_id != new.file_id {
            return self.unname(place, &old.entry);
        }
        if old.entry.content != new.content {
            self.drop_content(place, &old.entry)?;
        }
        if old.entry.attr.mtime.secs != new.attr.mtime.secs {
            self.dequeue(place.no, &old.entry);
        }
        Ok(())
    }

    /// Removes a row and leaves its tombstone in the log.
    pub(super) fn remove_row(
        &mut self,
        place: Place<'_>,
        old: &Row,
        seq: Seq,
    ) -> Result<(), IndexError> {
        self.erase_row(place, old)?;
        self.bury(place, seq)?;
        let Place { no: location, parent, name } = place;
        let was = Some(Brief::from(&old.entry));
        self.changes.push(Change::Entry { location, parent, name: name.clone(), was, now: None });
        Ok(())
    }

    /// Removes a row without a trace.
    pub(super) fn erase_row(&mut self, place: Place<'_>, old: &Row) -> Result<(), IndexError> {
        self.batch.delete(Table::Entries, place.entry_key());
        self.leave_log(place.no, place.summand(old))?;
        self.count(place, &old.entry, false)?;
        self.unname(place, &old.entry)
    }

    /// Records that a name is gone.
    pub(super) fn bury(&mut self, place: Place<'_>, seq: Seq) -> Result<(), IndexError> {
        self.drop_tombstone(place)?;
        self.log_at(place, seq);
        self.batch.put(Table::Tombstones, place.entry_key(), seq.0.to_be_bytes());
        self.state(place.no)?.tombstones += 1;
        Ok(())
    }

    fn drop_tombstone(&mut self, place: Place<'_>) -> Result<(), IndexError> {
        if self.state(place.no)?.tombstones == 0 {
            return Ok(());
        }
        let key = place.entry_key();
        match self.get(Table::Tombstones, &key)? {
            Some(seq) => self.erase_tombstone(place.no, key, &seq),
            None => Ok(()),
        }
    }

    /// Removes a tombstone and its place in the log.
    pub(super) fn erase_tombstone(
        &mut self,
        no: LocationNo,
        key: Vec<u8>,
        seq: &[u8],
    ) -> Result<(), IndexError> {
        let damaged = || IndexError::DamagedRow("a tombstone");
        let seq = Seq(u64::from_be_bytes(seq.try_into().map_err(|_| damaged())?));
        self.batch.delete(Table::Log, key::log(no, seq));
        self.batch.delete(Table::Tombstones, key);
        let tombstones = &mut self.state(no)?.tombstones;
        *tombstones = tombstones.saturating_sub(1);
        Ok(())
    }

    fn log_at(&mut self, place: Place<'_>, seq: Seq) {
        let value = key::parent_and_name(place.parent, place.name.as_bytes());
        self.batch.put(Table::Log, key::log(place.no, seq), value);
    }

    /// The file loses one name; with the last one it leaves the queue.
    fn unname(&mut self, place: Place<'_>, entry: &Entry) -> Result<(), IndexError> {
        self.batch.delete(Table::Nodes, place.node_key(entry.file_id));
        self.drop_content(place, entry)?;
        if !self.has_name(place.no, entry.file_id)? {
            self.dequeue(place.no, entry);
        }
        Ok(())
    }

    /// This name no longer has the content of its old row. Another name of the file may: a
    /// replica learns of the names of one file one after the other.
    fn drop_content(&mut self, place: Place<'_>, old: &Entry) -> Result<(), IndexError> {
        let Some(content) = old.content else { return Ok(()) };
        let is_own = self.memory.location(place.no).is_some_and(|l| l.owner == self.me);
        let limit = if is_own { NAMES_ALIKE } else { REPLICA_NAMES };
        for (parent, name) in read::names(self, place.no, old.file_id, limit)? {
            let other = Place { no: place.no, parent, name: &name };
            let is_this = parent == place.parent && name == *place.name;
            if !is_this && self.row(other)?.is_some_and(|r| r.entry.content == Some(content)) {
                return Ok(());
            }
        }
        self.batch.delete(Table::Content, key::content(content, place.no, old.file_id));
        Ok(())
    }

    pub(super) fn has_name(&self, no: LocationNo, file: FileId) -> Result<bool, IndexError> {
        read::has_name(self, no, file)
    }

    /// Queues a regular file for hashing.
    pub(super) fn enqueue(&mut self, no: LocationNo, entry: &Entry) {
        if entry.attr.file_type == FileType::File {
            self.batch.put(Table::Unhashed, unhashed_key(no, entry), []);
        }
    }

    pub(super) fn dequeue(&mut self, no: LocationNo, entry: &Entry) {
        if entry.attr.file_type == FileType::File {
            self.batch.delete(Table::Unhashed, unhashed_key(no, entry));
        }
    }

    fn count(&mut self, place: Place<'_>, entry: &Entry, add: bool) -> Result<(), IndexError> {
        if place.parent != ROOT_PARENT {
            let counts = &mut self.state(place.no)?.counts;
            counts.change(entry, add);
        }
        Ok(())
    }

    fn announce(
        &mut self,
        place: Place<'_>,
        old: Option<&Entry>,
        new: &Entry,
    ) -> Result<(), IndexError> {
        let Place { no: location, parent, name } = place;
        let same = |o: &&Entry| (o.file_id, o.generation) == (new.file_id, new.generation);
        if let Some(old) = old.filter(same) {
            let change = Change::of_attributes(location, (parent, name), old, new);
            self.changes.push(change);
            return Ok(());
        }
        let (was, now) = (old.map(Brief::from), Some(Brief::from(new)));
        self.changes.push(Change::Entry { location, parent, name: name.clone(), was, now });
        // A file may have grown before it got this name, and its former row been passed over.
        if let Some(before) = self.grown_elsewhere(location, new)? {
            let change = Change::of_attributes(location, (parent, name), &before, new);
            self.changes.push(change);
        }
        Ok(())
    }

    /// The row of a file of another device, before this commit, that is of the same version and
    /// shorter. Not of a replica that is just being made: nothing of it was seen before.
    fn grown_elsewhere(&self, no: LocationNo, new: &Entry) -> Result<Option<Entry>, IndexError> {
        let may_have_grown = new.attr.file_type == FileType::File && new.content.is_some();
        if no.is_own() || !may_have_grown || self.memory.whole(no).is_none() {
            return Ok(None);
        }
        let names = read::names(&*self.snapshot, no, new.file_id, 1)?;
        let Some((parent, name)) = names.first() else { return Ok(None) };
        let row = read::row(&*self.snapshot, no, *parent, name.as_bytes())?;
        Ok(row.map(|row| row.entry).filter(|before| new.is_grown(before)))
    }
}

fn unhashed_key(no: LocationNo, entry: &Entry) -> Vec<u8> {
    key::unhashed(no, entry.attr.mtime.secs, entry.file_id)
}

impl Counts {
    pub(super) fn change(&mut self, entry: &Entry, add: bool) {
        // Wrapping, because a peer's sizes may add up to anything; what was added is taken
        // away again, so the sum stays right where it can be right.
        let apply = |n: &mut u64, by: u64| {
            *n = if add { n.wrapping_add(by) } else { n.wrapping_sub(by) };
        };
        apply(&mut self.entries, 1);
        match entry.attr.file_type {
            FileType::Directory => apply(&mut self.directories, 1),
            FileType::File => {
                apply(&mut self.files, 1);
                apply(&mut self.bytes, entry.attr.size);
                if entry.content.is_some() {
                    apply(&mut self.hashed_files, 1);
                    apply(&mut self.hashed_bytes, entry.attr.size);
                }
            }
            _ => {}
        }
    }
}

impl Snapshot for Tx<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.batch.changes(table).get(key) {
            Some(own) => Ok(own.clone()),
            None => self.snapshot.get(table, key),
        }
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        if to.is_some_and(|to| to <= from) {
            return Ok(());
        }
        let end = to.map_or(Bound::Unbounded, Bound::Excluded);
        let mut own =
            self.batch.changes(table).range::<[u8], _>((Bound::Included(from), end)).peekable();
        let mut flow = ControlFlow::Continue(());
        self.snapshot.scan(table, from, to, &mut |key, value| {
            let mut replaced = false;
            while let Some((own_key, own_value)) = own.next_if(|(k, _)| k.as_slice() <= key) {
                replaced |= own_key.as_slice() == key;
                if let Some(own_value) = own_value {
                    flow = visit(own_key, own_value);
                    flow?;
                }
            }
            if !replaced {
                flow = visit(key, value);
            }
            flow
        })?;
        for (own_key, own_value) in own {
            if flow.is_break() {
                break;
            }
            if let Some(own_value) = own_value {
                flow = visit(own_key, own_value);
            }
        }
        Ok(())
    }
}
