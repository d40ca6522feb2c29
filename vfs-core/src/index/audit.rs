//! Whether the rows of a location are whole in themselves.
//!
//! For whoever doubts the store: every row of one consistent state is read once, in the order of
//! the tables. What a row must have beside it ([`super::tx`]) is looked up, and what all of them
//! add up to is added up anew and compared with what was kept while they were written. So a row
//! that changed behind the index's back is told, whichever of its bytes it was, as far as the sum
//! had it already. Nothing is changed, and no more than a row is in memory.
//!
//! The state that is read stays in the store for as long as it takes, beside what is written
//! meanwhile.

use super::digest::{self, LogDigest, Sum, Summand};
use super::key;
use super::observe::root_name;
use super::read;
use super::row::{Row, State, decode};
use super::store::{Snapshot, Table};
use super::tx::{NAMES_ALIKE, Place, REPLICA_NAMES};
use super::{Counts, Index, IndexError, ROOT_PARENT};
use crate::model::{Entry, FileId, FileType, LocationNo, Name, Seq};
use std::collections::BTreeMap;
use std::ops::ControlFlow;

/// Rows between two words of how far it is.
const TOLD_EVERY: u64 = 1024;

/// What is wrong with rows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Fault {
    /// A row that cannot be understood, or that no file can have.
    Unreadable,
    /// A row of a directory that is not there, or is none.
    Astray,
    /// A row that the other tables do not lead to: by its id, its place in the log, its bytes.
    Unlisted,
    /// What other tables have is of no row.
    Extra,
    /// The location's state counts other rows than there are.
    Counts,
    /// The rows do not add up to what was kept.
    Sum,
}

/// What an audit found.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Audit {
    /// Rows and tombstones that were looked at.
    pub rows: u64,
    /// How often which fault was met.
    pub faults: BTreeMap<Fault, u64>,
    /// What the log is by its rows; `None` while a sweep has rows left to remove
    /// ([`Index::digest`]).
    pub log: Option<LogDigest>,
}

impl Index {
    /// Looks at every row of a location. `told` hears how many were looked at, and may end it,
    /// which gives `None`.
    ///
    /// # Errors
    /// The store itself could not be read.
    pub fn audit(
        &self,
        no: LocationNo,
        told: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Option<Audit>, IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        let snapshot = self.store().snapshot()?;
        let state = snapshot.get(Table::Meta, &key::state(no))?;
        let state = state.ok_or(IndexError::DamagedRow("a location without its state"))?;
        let state: State = decode(&state, "a location's state")?;
        if state.resetting {
            // Its rows are just being removed.
            return Ok(Some(Audit::default()));
        }
        let is_listed = snapshot.get(Table::Meta, &key::unlisted(no))?.is_none();
        let is_own = location.owner == self.me();
        Auditor::new(&*snapshot, no, state, (is_own, is_listed), told).run()
    }
}

struct Auditor<'a> {
    snapshot: &'a dyn Snapshot,
    no: LocationNo,
    state: State,
    is_own: bool,
    /// Content has the bytes of every row.
    is_listed: bool,
    /// What was kept, if it can be understood.
    kept: Option<Sum>,
    /// The rows that it has, and those after them up to the head.
    summed: Sum,
    later: Sum,
    counts: Counts,
    /// Rows of each table, and of all.
    entries: u64,
    tombstones: u64,
    named: u64,
    logged: u64,
    looked: u64,
    /// The directory of the last row, and whether it is one.
    directory: Option<(FileId, bool)>,
    audit: Audit,
    told: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    is_ended: bool,
}

impl<'a> Auditor<'a> {
    fn new(
        snapshot: &'a dyn Snapshot,
        no: LocationNo,
        state: State,
        (is_own, is_listed): (bool, bool),
        told: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Self {
        Self {
            snapshot,
            no,
            state,
            is_own,
            is_listed,
            kept: None,
            summed: Sum::default(),
            later: Sum::default(),
            counts: Counts::default(),
            entries: 0,
            tombstones: 0,
            named: 0,
            logged: 0,
            looked: 0,
            directory: None,
            audit: Audit::default(),
            told,
            is_ended: false,
        }
    }

    fn run(mut self) -> Result<Option<Audit>, IndexError> {
        self.read_sum()?;
        self.scan(Table::Entries, Self::entry)?;
        self.scan(Table::Tombstones, Self::tombstone)?;
        self.scan(Table::Nodes, Self::node)?;
        self.scan(Table::Log, Self::change)?;
        if self.is_own {
            self.scan(Table::Disk, |audit, _, value| audit.file(key::split_file(value)))?;
            self.scan(Table::Unhashed, |audit, key, _| audit.file(key::last_file(key)))?;
        }
        if self.is_ended {
            return Ok(None);
        }
        self.faults(Fault::Extra, self.named.saturating_sub(self.entries));
        self.faults(Fault::Extra, self.logged.saturating_sub(self.entries + self.tombstones));
        self.check_state();
        self.check_sum()?;
        self.audit.rows = self.entries + self.tombstones;
        Ok(Some(self.audit))
    }

    /// Has every row of a table looked at, unless somebody ended it.
    fn scan(
        &mut self,
        table: Table,
        look: impl Fn(&mut Self, &[u8], &[u8]) -> Result<(), IndexError>,
    ) -> Result<(), IndexError> {
        if self.is_ended {
            return Ok(());
        }
        let (snapshot, location) = (self.snapshot, key::location(self.no));
        read::scan_prefix(snapshot, table, &location, &mut |key, value| {
            look(self, key, value)?;
            Ok(self.go_on())
        })
    }

    fn go_on(&mut self) -> ControlFlow<()> {
        self.looked += 1;
        let is_time = self.looked.is_multiple_of(TOLD_EVERY);
        self.is_ended = is_time && (self.told)(self.looked).is_break();
        if self.is_ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn fault(&mut self, fault: Fault) {
        self.faults(fault, 1);
    }

    fn faults(&mut self, fault: Fault, times: u64) {
        if times > 0 {
            *self.audit.faults.entry(fault).or_default() += times;
        }
    }

    fn read_sum(&mut self) -> Result<(), IndexError> {
        let Some(bytes) = self.snapshot.get(Table::Meta, &key::sum(self.no))? else {
            return Ok(());
        };
        match Sum::from_bytes(&bytes) {
            Some(sum) if sum.upto() <= self.state.head => self.kept = Some(sum),
            // One that has more than there is was of another log.
            Some(_) => {}
            None => self.fault(Fault::Sum),
        }
        Ok(())
    }

    fn entry(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.entries += 1;
        let place = key::entry_parent(key).zip(key::entry_name(key));
        let row = decode::<Row>(value, "an entry").ok().filter(|row| row.entry.is_valid());
        let (Some((parent, name)), Some(row)) = (place, row) else {
            self.fault(Fault::Unreadable);
            return Ok(());
        };
        if parent != ROOT_PARENT {
            self.counts.change(&row.entry, true);
        }
        let place = Place { no: self.no, parent, name: &name };
        self.add(place.summand(&row));
        if !self.is_in_directory(place)? {
            self.fault(Fault::Astray);
        }
        if !self.is_led_to(place, &row)? || self.is_buried(key)? {
            self.fault(Fault::Unlisted);
        }
        Ok(())
    }

    fn add(&mut self, place: Summand<'_>) {
        let upto = self.kept.as_ref().map_or(Seq(0), Sum::upto);
        if place.seq <= upto {
            self.summed.add(place);
        } else if place.seq <= self.state.head {
            self.later.add(place);
        }
        self.check_number(place.seq);
    }

    /// Rows of a replica may be about to come again.
    fn check_number(&mut self, seq: Seq) {
        if self.is_own && seq > self.state.head {
            self.fault(Fault::Counts);
        }
    }

    fn is_in_directory(&mut self, place: Place<'_>) -> Result<bool, IndexError> {
        if place.parent == ROOT_PARENT {
            return Ok(*place.name == root_name());
        }
        if let Some((last, is_one)) = self.directory
            && last == place.parent
        {
            return Ok(is_one);
        }
        let is_one = self.is_directory(place.parent)?;
        self.directory = Some((place.parent, is_one));
        Ok(is_one)
    }

    fn is_directory(&self, file: FileId) -> Result<bool, IndexError> {
        if let Some((parent, name)) = read::names(self.snapshot, self.no, file, 1)?.pop() {
            return Ok(self.is_directory_by(parent, &name));
        }
        // Rows of a directory that lost its name stay for a while; those of a replica come in
        // any order, and its owner decides when they go.
        Ok(!self.is_own || read::orphan(self.snapshot, self.no, file)?.is_some())
    }

    fn is_directory_by(&self, parent: FileId, name: &Name) -> bool {
        let row = read::row(self.snapshot, self.no, parent, name.as_bytes());
        // What cannot be understood is a fault of its own.
        let Ok(Some(row)) = row else { return true };
        row.entry.attr.file_type == FileType::Directory
    }

    /// Whether the other tables have the row.
    fn is_led_to(&self, place: Place<'_>, row: &Row) -> Result<bool, IndexError> {
        let has = |table, key: &[u8]| self.snapshot.get(table, key);
        let log = has(Table::Log, &key::log(self.no, row.seq))?;
        Ok(has(Table::Nodes, &place.node_key(row.entry.file_id))?.is_some()
            && log.is_some_and(|log| log == logged(place.parent, place.name))
            && self.is_held(&row.entry)?)
    }

    fn is_held(&self, entry: &Entry) -> Result<bool, IndexError> {
        let Some(content) = entry.content.filter(|_| self.is_listed) else { return Ok(true) };
        let key = key::content(content, self.no, entry.file_id);
        if self.snapshot.get(Table::Content, &key)?.is_some() {
            return Ok(true);
        }
        // Of a file with more names not all are looked at.
        let limit = if self.is_own { NAMES_ALIKE } else { REPLICA_NAMES };
        let names = read::names(self.snapshot, self.no, entry.file_id, limit + 1)?;
        Ok(names.len() > limit)
    }

    fn is_buried(&self, key: &[u8]) -> Result<bool, IndexError> {
        Ok(self.snapshot.get(Table::Tombstones, key)?.is_some())
    }

    fn tombstone(&mut self, key: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.tombstones += 1;
        let place = key::entry_parent(key).zip(key::entry_name(key));
        let (Some((parent, name)), Ok(seq)) = (place, value.try_into()) else {
            self.fault(Fault::Unreadable);
            return Ok(());
        };
        let seq = Seq(u64::from_be_bytes(seq));
        self.check_number(seq);
        let log = self.snapshot.get(Table::Log, &key::log(self.no, seq))?;
        if log.is_none_or(|log| log != logged(parent, &name)) {
            self.fault(Fault::Unlisted);
        }
        Ok(())
    }

    fn node(&mut self, _: &[u8], _: &[u8]) -> Result<(), IndexError> {
        self.named += 1;
        Ok(())
    }

    fn change(&mut self, _: &[u8], _: &[u8]) -> Result<(), IndexError> {
        self.logged += 1;
        Ok(())
    }

    /// A file of which an owner's table says something.
    fn file(&mut self, file: Option<FileId>) -> Result<(), IndexError> {
        match file {
            None => self.fault(Fault::Unreadable),
            Some(file) if self.is_known(file)? => {}
            Some(_) => self.fault(Fault::Extra),
        }
        Ok(())
    }

    fn is_known(&self, file: FileId) -> Result<bool, IndexError> {
        Ok(read::has_name(self.snapshot, self.no, file)?
            || read::orphan(self.snapshot, self.no, file)?.is_some())
    }

    fn check_state(&mut self) {
        if self.state.counts != self.counts || self.state.tombstones != self.tombstones {
            self.fault(Fault::Counts);
        }
    }

    fn check_sum(&mut self) -> Result<(), IndexError> {
        if self.kept.as_ref().is_some_and(|sum| !sum.is_same(&self.summed)) {
            self.fault(Fault::Sum);
        }
        if digest::is_settled(self.snapshot, self.no)? {
            let mut all = std::mem::take(&mut self.summed);
            all.join(&self.later);
            self.audit.log = Some(all.digest(self.state.log_id, self.state.head));
        }
        Ok(())
    }
}

/// What the log has at the place of a name.
fn logged(parent: FileId, name: &Name) -> Vec<u8> {
    key::parent_and_name(parent, name.as_bytes())
}
