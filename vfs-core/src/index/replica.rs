//! The other devices' locations: their owners' logs, applied.
//!
//! Rows come from a peer and are checked before anything is written. They arrive in
//! the order of their *last* change, so a row may come before the row of its
//! directory, and in between two names of a renamed directory may both be there.

use super::holders;
use super::key;
use super::observe::root_name;
use super::read;
use super::row::{State, encode};
use super::store::{Snapshot, Table};
use super::sweep::{doom_replica, gone_directory};
use super::tx::{Place, Tx};
use super::{Index, IndexError, LogRow, ROOT_PARENT};
use crate::changes::Change;
use crate::model::{Entry, FileId, FileType, Location, LocationId, LocationNo, Name, Seq};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Rows removed in one commit.
const COMMIT_ROWS: usize = 4096;

/// How often a location may get a new number, and in what time. An owner loses its index now
/// and then, not many times a day.
const RENUMBERED_AT_MOST: u32 = 4;
const RENUMBERED_FOR: Duration = Duration::from_secs(24 * 3600);

impl Index {
    /// The id of the location's log: drawn by its owner when the log began; 0 in a replica
    /// that has none yet.
    pub fn log_id(&self, no: LocationNo) -> u64 {
        self.memory().state(no).map_or(0, |s| s.log_id)
    }

    /// The last sequence number given (own) or applied (replica).
    pub fn head(&self, no: LocationNo) -> Seq {
        self.memory().state(no).map_or(Seq(0), |s| s.head)
    }

    /// Whether the replica shows everything that this log had up to a number, or something
    /// newer. Its head alone does not say so: rows come in the order of their last change, so one
    /// that was changed again since comes later, and until then what it was before is missing.
    pub fn has_all(&self, no: LocationNo, log_id: u64, upto: Seq) -> bool {
        let is_whole = |(log, whole)| log == log_id && whole >= upto;
        let has_rows = || self.memory().whole(no).is_some_and(is_whole);
        self.log_id(no) == log_id && (upto == Seq(0) || has_rows())
    }

    /// Whether all rows of the log that it follows were here at once: from then on what has no row
    /// is not there.
    pub fn was_whole(&self, no: LocationNo) -> bool {
        let log_id = self.log_id(no);
        log_id != 0 && self.memory().whole(no).is_some_and(|(log, _)| log == log_id)
    }

    /// Whether a replica has rows although its log is to begin: it was about to take them again.
    pub fn has_leftovers(&self, no: LocationNo) -> Result<bool, IndexError> {
        let state = self.memory().state(no).unwrap_or_default();
        let has_rows = state.counts.entries > 0 || state.tombstones > 0;
        Ok(has_rows || beyond(&*self.store().snapshot()?, no)? > Seq(0))
    }

    /// Has rows that are newer than where the replica was last whole come again: of those between
    /// there and its head, some that have changed since may be missing here. Until they are here
    /// it is whole nowhere, for what it has of them stays, and no older state may be taken.
    pub(super) fn rewind(&self, no: LocationNo, log_id: u64) -> Result<Seq, IndexError> {
        let whole = self.memory().whole(no).filter(|(log, _)| *log == log_id);
        let whole = whole.map_or(Seq(0), |(_, upto)| upto);
        let head = self.head(no);
        self.write(|tx| {
            let state = tx.state(no)?;
            follow(state, log_id)?;
            if state.head > whole {
                let had = std::mem::replace(&mut state.head, whole);
                let beyond = beyond(tx, no)?.max(had);
                tx.batch.put(Table::Meta, key::beyond(no), beyond.0.to_be_bytes());
                for key in [key::whole(no), key::sum(no), key::statement(no)] {
                    tx.batch.delete(Table::Meta, key);
                }
                holders::list_again(tx, no, whole);
            }
            Ok(())
        })?;
        if self.head(no) < head {
            self.memory().forget_whole(no);
        }
        Ok(whole)
    }

    /// Applies the last rows that the owner's log has now, and moves the cursor to its end,
    /// `upto`, in one commit; then drops, in commits of their own, the rows of directories that
    /// are gone for good.
    ///
    /// A replica that follows no log yet takes this one; one that follows another is to be
    /// reset first ([`IndexError::OtherLog`]).
    pub fn apply_replica(
        &self,
        no: LocationNo,
        log_id: u64,
        rows: Vec<LogRow>,
        upto: Seq,
    ) -> Result<(), IndexError> {
        self.apply_rows(no, log_id, rows, upto, true)?;
        self.memory().put_whole(no, log_id, upto);
        self.list_holders(no)
    }

    /// The same of rows that more follow ([`Self::has_all`]). Whose bytes they have is noted
    /// later, see `holders`.
    pub fn apply_replica_part(
        &self,
        no: LocationNo,
        log_id: u64,
        rows: Vec<LogRow>,
        upto: Seq,
    ) -> Result<(), IndexError> {
        self.apply_rows(no, log_id, rows, upto, false)
    }

    fn apply_rows(
        &self,
        no: LocationNo,
        log_id: u64,
        rows: Vec<LogRow>,
        upto: Seq,
        is_whole: bool,
    ) -> Result<(), IndexError> {
        self.replica(no)?;
        rows.iter().try_for_each(check_row)?;
        self.write(|tx| {
            let state = tx.state(no)?;
            follow(state, log_id)?;
            check_order(state.head, &rows, upto)?;
            let head = std::mem::replace(&mut state.head, upto);
            match is_whole {
                true => note_whole(tx, no, log_id, upto),
                false => holders::put_off(tx, no, head)?,
            }
            rows.into_iter().try_for_each(|row| apply(tx, no, row))
        })?;
        // What the owner said is gone for good; nobody else tends a replica.
        while self.sweep_location(no, COMMIT_ROWS)? > 0 {}
        Ok(())
    }

    /// Makes a replica follow a log from its beginning; gives the number that the location has
    /// from now on.
    ///
    /// File ids begin again with a log, and inode numbers are made of them: under the same
    /// number, a name that a kernel still knows would lead to the bytes of another file. So a
    /// replica that followed a log before gets a new number, and every old inode is stale. The
    /// numbers have an end, and the peer says when a log begins: one that says so too often has
    /// its replica emptied in place, and kernels are told to look everything up again.
    pub fn restart_replica(&self, no: LocationNo, log_id: u64) -> Result<LocationNo, IndexError> {
        let location = self.replica(no)?;
        if log_id == 0 {
            return Err(IndexError::InvalidRow("a log without an id"));
        }
        let state = self.memory().state(no).unwrap_or_default();
        if state.log_id == 0 && !state.resetting {
            return self.write(|tx| {
                tx.set_state(no, State::new(log_id));
                Ok(no)
            });
        }
        if self.0.renumbered.admits(location.id, Instant::now()) {
            match self.renumber(no, log_id) {
                Err(IndexError::TooMany(_)) => {}
                renumbered => return renumbered,
            }
        }
        self.reset_replica(no, log_id).map(|()| no)
    }

    /// Empties a replica under the number that it has, to follow another log from its beginning;
    /// for where no kernel knows anything of it, else see [`Self::restart_replica`].
    pub fn reset_replica(&self, no: LocationNo, log_id: u64) -> Result<(), IndexError> {
        self.replica(no)?;
        self.write(|tx| {
            tx.set_state(no, State { resetting: true, ..State::default() });
            for key in key::about_rows(no) {
                tx.batch.delete(Table::Meta, key);
            }
            tx.changes.push(Change::Reset);
            Ok(())
        })?;
        self.memory().forget_whole(no);
        self.purge(no)?;
        self.write(|tx| {
            tx.set_state(no, State::new(log_id));
            // Again: a kernel may have asked while the rows went.
            tx.changes.extend([Change::Locations, Change::Reset]);
            Ok(())
        })
    }

    /// Removes every row of a location, in bounded commits; other writers go in between.
    pub(super) fn purge(&self, no: LocationNo) -> Result<(), IndexError> {
        while self.purge_some(no)? {}
        Ok(())
    }

    /// One commit of it; `false`: there was nothing left.
    pub(super) fn purge_some(&self, no: LocationNo) -> Result<bool, IndexError> {
        use Table::{Disk, Log, Nodes, Orphans, Tombstones, Unhashed};
        if self.write(|tx| purge_entries(tx, no))? {
            return Ok(true);
        }
        for table in [Nodes, Log, Tombstones, Disk, Unhashed, Orphans] {
            if self.write(|tx| purge_keys(tx, table, no))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn replica(&self, no: LocationNo) -> Result<Arc<Location>, IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        if location.owner == self.me() { Err(IndexError::WrongOwner(no)) } else { Ok(location) }
    }
}

/// When which locations got new numbers: a peer must not use all of them up.
#[derive(Default)]
pub(super) struct Renumbered(Mutex<HashMap<LocationId, (Instant, u32)>>);

impl Renumbered {
    /// Whether the location may get one more; if so, it is counted.
    fn admits(&self, id: LocationId, now: Instant) -> bool {
        let mut renumbered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        renumbered.retain(|_, (since, _)| now.duration_since(*since) < RENUMBERED_FOR);
        let (_, count) = renumbered.entry(id).or_insert((now, 0));
        *count += 1;
        *count <= RENUMBERED_AT_MOST
    }
}

/// The replica is as its owner's whole log was at a number, which is beyond all that it has had.
pub(super) fn note_whole(tx: &mut Tx<'_>, no: LocationNo, log_id: u64, upto: Seq) {
    tx.batch.put(Table::Meta, key::whole(no), encode(&(log_id, upto)));
    tx.batch.delete(Table::Meta, key::beyond(no));
}

/// The number of the last row that a replica has, if that is beyond its head.
pub(super) fn beyond(from: &dyn Snapshot, no: LocationNo) -> Result<Seq, IndexError> {
    read::noted(from, &key::beyond(no))
}

pub(super) fn follow(state: &mut State, log_id: u64) -> Result<(), IndexError> {
    if log_id == 0 {
        return Err(IndexError::InvalidRow("a log without an id"));
    }
    if state.log_id == 0 && !state.resetting {
        state.log_id = log_id;
    }
    if state.log_id == log_id && !state.resetting { Ok(()) } else { Err(IndexError::OtherLog) }
}

pub(super) fn check_order(head: Seq, rows: &[LogRow], upto: Seq) -> Result<(), IndexError> {
    let after_head = rows.first().is_none_or(|r| r.seq > head);
    let ascending = rows.windows(2).all(|w| w[0].seq < w[1].seq);
    let within = rows.last().is_none_or(|r| r.seq <= upto) && head <= upto;
    if after_head && ascending && within {
        Ok(())
    } else {
        Err(IndexError::InvalidRow("sequence numbers that do not ascend"))
    }
}

pub(super) fn check_row(row: &LogRow) -> Result<(), IndexError> {
    let valid = row.parent.0 < FileId::LIMIT
        && row.entry.as_ref().is_none_or(Entry::is_valid)
        && if row.parent == ROOT_PARENT { is_root_row(row) } else { is_child_row(row) };
    if valid { Ok(()) } else { Err(IndexError::InvalidRow("a peer's row breaks the format")) }
}

fn is_root_row(row: &LogRow) -> bool {
    match &row.entry {
        None => gone_directory(&row.name).is_some(),
        Some(entry) => {
            row.name == root_name()
                && entry.file_id == FileId::ROOT
                && entry.attr.file_type == FileType::Directory
        }
    }
}

fn is_child_row(row: &LogRow) -> bool {
    let id = row.entry.as_ref().map(|e| e.file_id);
    id.is_none_or(|id| id != FileId::ROOT && id != row.parent)
}

pub(super) fn apply(tx: &mut Tx<'_>, no: LocationNo, row: LogRow) -> Result<(), IndexError> {
    let LogRow { seq, parent, name, entry } = row;
    let place = Place { no, parent, name: &name };
    let old = tx.row(place)?;
    match (old, entry) {
        (old, Some(entry)) => tx.put_row(place, old.as_ref(), entry, seq),
        (Some(old), None) => tx.remove_row(place, &old, seq),
        (None, None) => {
            mark_gone(tx, place, &name);
            tx.bury(place, seq)
        }
    }
}

fn mark_gone(tx: &mut Tx<'_>, place: Place<'_>, name: &Name) {
    if place.parent == ROOT_PARENT
        && let Some(dir) = gone_directory(name)
    {
        doom_replica(tx, place.no, dir);
    }
}

/// Entries are removed with their keys in Content, which are not found by location.
fn purge_entries(tx: &mut Tx<'_>, no: LocationNo) -> Result<bool, IndexError> {
    let keys = read::keys(tx, Table::Entries, &key::location(no), COMMIT_ROWS)?;
    for key in &keys {
        if let Some(Entry { content: Some(content), file_id, .. }) = readable_entry(tx, no, key)? {
            tx.batch.delete(Table::Content, key::content(content, no, file_id));
        }
        tx.batch.delete(Table::Entries, key.as_slice());
    }
    Ok(!keys.is_empty())
}

/// What cannot be understood goes all the same: it may be why the rows go.
fn readable_entry(tx: &Tx<'_>, no: LocationNo, key: &[u8]) -> Result<Option<Entry>, IndexError> {
    let Some((parent, name)) = key::entry_parent(key).zip(key::entry_name(key)) else {
        return Ok(None);
    };
    match tx.row(Place { no, parent, name: &name }) {
        Ok(row) => Ok(row.map(|row| row.entry)),
        Err(IndexError::DamagedRow(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn purge_keys(tx: &mut Tx<'_>, table: Table, no: LocationNo) -> Result<bool, IndexError> {
    let keys = read::keys(tx, table, &key::location(no), COMMIT_ROWS)?;
    let more = !keys.is_empty();
    keys.into_iter().for_each(|key| tx.batch.delete(table, key));
    Ok(more)
}
