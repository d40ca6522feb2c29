//! Replicas from somebody else than their owner.
//!
//! Rows that come from their owner are vouched for by the connection. A device that has a replica
//! passes it on as well, for when the owner is away, together with a *statement* that the owner
//! signed: what its whole log is ([`LogDigest`]), and who may see it. Rows that do not add up to
//! that are refused before any of them is taken, so whoever passes rows on can leave out, change
//! or add none; all it can do is to have an older state than the owner, as it may itself.
//!
//! A replica that is a little behind is brought up to date in one commit, which is only made when
//! its sum is right ([`Index::apply_stated`]). One that is far behind, or new, gets the whole log,
//! which is put into a file until all of it is known to be right ([`Spool`]).
//!
//! A replica may be a part of its owner's log in a way that its head does not tell: a row that has
//! changed again since comes later. So only a *whole* one is compared, and one that is not whole
//! takes again what came after it last was.

use super::digest::{self, LogDigest, Sum, Summand};
use super::key;
use super::observe::root_name;
use super::replica::{apply, beyond, check_order, check_row, follow, note_whole};
use super::row::{State, decode, encode};
use super::store::{Snapshot, StoreError, Table};
use super::sweep;
use super::tx::{Place, Tx};
use super::{Index, IndexError, LogRow, ROOT_PARENT, View};
use crate::model::{DeviceId, Location, LocationId, LocationNo, Seq, includes};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// How many rows may be applied at once, and how many may go with their directories then:
/// it is one commit, made in memory.
pub const AT_ONCE: usize = 8192;
/// Names a statement apart from everything else that a device signs. Whoever changes the form of
/// a statement, or of a row, changes this.
const PURPOSE: &[u8] = b"spacedrive 2026 statement of a location's rows\0";
/// Tombstones that a whole log may have, if it has fewer rows.
const TOMBSTONES: u64 = 1 << 20;
/// The longest lot of rows in a spool, in bytes: it is read into memory.
const MAX_LOT: usize = 16 << 20;

/// What the owner of a location says of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Statement {
    /// The location.
    pub location: LocationId,
    /// Its name.
    pub name: String,
    /// Nobody may write to it.
    pub read_only: bool,
    /// The devices that may see it; `None` is all members.
    pub shared_with: Option<Vec<DeviceId>>,
    /// All of its rows.
    pub log: LogDigest,
    /// When, in milliseconds since 1970: tells which of two logs is the newer one.
    pub made_ms: u64,
}

impl Statement {
    /// What is signed.
    pub fn to_bytes(&self) -> Vec<u8> {
        [PURPOSE, &encode(self)].concat()
    }

    /// Whether a device may see the location.
    pub fn is_for(&self, device: DeviceId) -> bool {
        includes(&self.shared_with, device)
    }
}

/// Who may see a location, by the newest word of its owner, whatever its rows are here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Sharing {
    shared_with: Option<Vec<DeviceId>>,
    made_ms: u64,
}

/// A statement with its owner's Ed25519 signature, in two halves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Signed {
    /// What was signed.
    pub statement: Statement,
    /// The signature of [`Statement::to_bytes`].
    pub signature: [[u8; 32]; 2],
}

/// How a replica compares with what its owner said.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attested {
    /// It has these rows and no others.
    Same,
    /// It is at the same number, with other rows: one of the two is damaged.
    Differs,
    /// It is somewhere else, or has just moved on.
    Elsewhere,
}

/// What a device could use of what another one passes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Nothing: what is here is as new, or nobody can say.
    Nothing,
    /// The rows of the same log after a number.
    After(LocationNo, Seq),
    /// The whole log, in place of what is here.
    All,
}

impl Index {
    /// What an own location is, to be signed; `None` while that cannot be said.
    pub fn state_of(&self, no: LocationNo, now_ms: u64) -> Result<Option<Statement>, IndexError> {
        self.own_location(no)?;
        let Some(log) = self.digest(no)? else { return Ok(None) };
        // What was signed once must not be forgotten by a crash: its numbers would be given again.
        self.flush()?;
        let Some(location) = self.location(no) else { return Ok(None) };
        let Location { id, name, read_only, shared_with, .. } = (*location).clone();
        Ok(Some(Statement { location: id, name, read_only, shared_with, log, made_ms: now_ms }))
    }

    /// Compares a replica with what its owner signed, and keeps that if it is the same: from then
    /// on, and until the next row, the replica can be passed on.
    pub fn attest(&self, no: LocationNo, signed: &Signed) -> Result<Attested, IndexError> {
        let log = signed.statement.log;
        // A replica that is not whole lacks rows that have changed since.
        let is_there = || self.has_all(no, log.log_id, log.head) && self.head(no) == log.head;
        if !is_there() {
            return Ok(Attested::Elsewhere);
        }
        while self.sweep_location(no, AT_ONCE)? > 0 {}
        let here = self.digest(no)?;
        self.write(|tx| {
            let state = tx.state(no)?;
            let has_moved = (state.log_id, state.head) != (log.log_id, log.head);
            match here {
                Some(here) if here == log && !has_moved && has_no_others(tx, no, log)? => {
                    tx.batch.put(Table::Meta, key::statement(no), encode(signed));
                    Ok(Attested::Same)
                }
                Some(here) if here.head == log.head && !has_moved => Ok(Attested::Differs),
                _ => Ok(Attested::Elsewhere),
            }
        })
    }

    /// The same once more, with everything added up anew.
    pub fn attest_anew(&self, no: LocationNo, signed: &Signed) -> Result<Attested, IndexError> {
        self.forget_sum(no)?;
        self.attest(no, signed)
    }

    /// The last statement kept of a replica, whatever became of its rows since.
    pub fn last_statement(&self, no: LocationNo) -> Result<Option<Signed>, IndexError> {
        statement(&*self.store().snapshot()?, no)
    }

    /// Keeps who may see a replica, also if its rows are not those of the statement. The signature
    /// is known to be right; `is_owners_word`: the owner itself says so at this moment, so that it
    /// counts whatever its clock has been before.
    pub fn note_sharing(
        &self,
        stated: &Statement,
        is_owners_word: impl FnOnce() -> bool,
    ) -> Result<(), IndexError> {
        let location = self.location_by_id(stated.location);
        let Some(replica) = location.filter(|l| l.owner != self.me()) else { return Ok(()) };
        let Statement { shared_with, made_ms, .. } = stated.clone();
        let new = Sharing { shared_with, made_ms };
        // Judged where it is written: two that say it at once must not overtake each other.
        self.write(|tx| {
            let last = sharing(tx, stated.location)?;
            let kept = statement(tx, replica.no)?.map(|signed| signed.statement);
            let kept = kept.filter(|kept| kept.location == stated.location);
            let newest =
                last.iter().map(|last| last.made_ms).chain(kept.map(|kept| kept.made_ms)).max();
            let is_newer = newest.is_none_or(|newest| newest < made_ms);
            if (is_newer || is_owners_word()) && last.as_ref() != Some(&new) {
                tx.batch.put(Table::Meta, key::sharing(stated.location), encode(&new));
            }
            Ok(())
        })
    }

    /// Whether a location may be shown to a device, by what its owner says: of an own one that is
    /// known; the owner of another one has said so of rows that were here, and nothing else since.
    pub fn may_be_shown(&self, location: &Location, to: DeviceId) -> Result<bool, IndexError> {
        if location.owner == self.me() || location.owner == to {
            return Ok(location.owner == to || includes(&location.shared_with, to));
        }
        let snapshot = self.store().snapshot()?;
        let was_for = statement(&*snapshot, location.no)?.is_some_and(|signed| {
            signed.statement.location == location.id && signed.statement.is_for(to)
        });
        let newest = sharing(&*snapshot, location.id)?;
        Ok(was_for && newest.is_none_or(|newest| includes(&newest.shared_with, to)))
    }

    /// Whether a device may know what is in a location, by the newest word of its owner that came
    /// here, whatever became of the rows since.
    pub fn may_know(&self, location: &Location, device: DeviceId) -> Result<bool, IndexError> {
        if location.owner == self.me() || location.owner == device {
            return self.may_be_shown(location, device);
        }
        let snapshot = self.store().snapshot()?;
        if let Some(newest) = sharing(&*snapshot, location.id)? {
            return Ok(includes(&newest.shared_with, device));
        }
        let kept = statement(&*snapshot, location.no)?.map(|signed| signed.statement);
        Ok(kept.is_some_and(|kept| kept.location == location.id && kept.is_for(device)))
    }

    /// What this device could use of a log of which there is this statement. The signature is
    /// known to be right, and the location to be the signer's.
    pub fn wants(&self, stated: &Statement) -> Result<Wanted, IndexError> {
        let Some(location) = self.location_by_id(stated.location) else {
            let is_withdrawn = self.is_withdrawn(stated.location)?;
            return Ok(if is_withdrawn { Wanted::Nothing } else { Wanted::All });
        };
        if location.owner == self.me() {
            return Ok(Wanted::Nothing);
        }
        let state = self.memory().state(location.no).unwrap_or_default();
        if state.log_id == stated.log.log_id && !state.resetting {
            let beyond = beyond(&*self.store().snapshot()?, location.no)?;
            let is_ahead = stated.log.head > state.head && stated.log.head >= beyond;
            return Ok(match is_ahead {
                true => Wanted::After(location.no, state.head),
                false => Wanted::Nothing,
            });
        }
        // Which of two logs is the newer one only their owner's statements tell.
        let last = self.last_statement(location.no)?;
        let is_newer = match last {
            Some(last) => last.statement.made_ms < stated.made_ms,
            None => state.log_id == 0,
        };
        Ok(if is_newer { Wanted::All } else { Wanted::Nothing })
    }

    /// Brings a replica up to what its owner stated, with all rows after the last one it has, in
    /// one commit. `false`, and nothing is changed: with these rows it is something else, or they
    /// are too many.
    pub fn apply_stated(
        &self,
        no: LocationNo,
        rows: Vec<LogRow>,
        signed: &Signed,
    ) -> Result<bool, IndexError> {
        self.replica(no)?;
        if rows.len() > AT_ONCE {
            return Ok(false);
        }
        rows.iter().try_for_each(check_row)?;
        let log = signed.statement.log;
        // The rows that are here already cost no more than time.
        self.digest(no)?;
        let applied = self.write(|tx| {
            is_news(tx, no, log)?;
            let state = tx.state(no)?;
            follow(state, log.log_id)?;
            check_order(state.head, &rows, log.head)?;
            state.head = log.head;
            rows.into_iter().try_for_each(|row| apply(tx, no, row))?;
            sweep::sweep_replica(tx, no, AT_ONCE)?;
            let is_as_stated = digest::is_settled(tx, no)?
                && digest::sum_some(tx, no, 2 * AT_ONCE)? == Some(log)
                && has_no_others(tx, no, log)?;
            if !is_as_stated {
                return Err(IndexError::NotAsStated);
            }
            note_whole(tx, no, log.log_id, log.head);
            tx.batch.put(Table::Meta, key::statement(no), encode(signed));
            Ok(())
        });
        match applied {
            Err(IndexError::NotAsStated) => return Ok(false),
            applied => applied?,
        }
        self.memory().put_whole(no, log.log_id, log.head);
        self.list_holders(no)?;
        Ok(true)
    }

    /// Brings a replica to what a log is that was found to be right; gives the number that the
    /// location has from now on ([`Index::restart_replica`]).
    pub fn apply_spooled(
        &self,
        no: LocationNo,
        mut spooled: Spooled,
    ) -> Result<LocationNo, IndexError> {
        let log_id = spooled.signed.statement.log.log_id;
        let is_same_log = self.log_id(no) == log_id;
        if is_same_log {
            is_news(&*self.store().snapshot()?, no, spooled.signed.statement.log)?;
        }
        let no = if is_same_log { no } else { self.restart_replica(no, log_id)? };
        if self.take_rows(no, &mut spooled, true)? != Attested::Differs {
            return Ok(no);
        }
        // What was here before was not right, or a tombstone was not, for which nobody vouches.
        // A log needs none from its beginning on.
        let no = self.restart_replica(no, log_id)?;
        self.take_rows(no, &mut spooled, false)?;
        Ok(no)
    }

    fn take_rows(
        &self,
        no: LocationNo,
        spooled: &mut Spooled,
        with_tombstones: bool,
    ) -> Result<Attested, IndexError> {
        let Spooled { signed, lots } = spooled;
        let log = signed.statement.log;
        let head = self.rewind(no, log.log_id)?;
        lots.rewind()?;
        while let Some(mut rows) = lots.next()? {
            rows.retain(|row| row.seq > head && (with_tombstones || row.entry.is_some()));
            if let Some(upto) = rows.last().map(|row| row.seq) {
                self.apply_replica_part(no, log.log_id, rows, upto)?;
            }
        }
        self.apply_replica(no, log.log_id, Vec::new(), log.head)?;
        self.attest(no, signed)
    }

    /// Its owner does not announce it any more: nobody else is believed that it is there, until
    /// its owner announces it again ([`Index::put_location`]).
    pub fn withdraw_location(&self, no: LocationNo) -> Result<(), IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        self.write(|tx| {
            tx.batch.put(Table::Meta, key::withdrawn(location.id), []);
            Ok(())
        })?;
        self.remove_location(no)
    }

    fn is_withdrawn(&self, id: LocationId) -> Result<bool, IndexError> {
        Ok(self.store().snapshot()?.get(Table::Meta, &key::withdrawn(id))?.is_some())
    }
}

impl View<'_> {
    /// What the owner stated of the replica as it is in this state; `None`: nothing that holds.
    pub fn attested(&self, no: LocationNo) -> Result<Option<Signed>, IndexError> {
        let state = self.snapshot().get(Table::Meta, &key::state(no))?;
        let Some(state) = state else { return Ok(None) };
        let state: State = decode(&state, "a location's state")?;
        let signed = statement(self.snapshot(), no)?;
        Ok(signed.filter(|signed| {
            let log = signed.statement.log;
            (log.log_id, log.head) == (state.log_id, state.head) && !state.resetting
        }))
    }
}

/// Whether there are no more rows here than those of a sum that is right. One that lost its place
/// in the log to a tombstone, which nobody vouches for, is not in the sum.
fn has_no_others(tx: &mut Tx<'_>, no: LocationNo, log: LogDigest) -> Result<bool, IndexError> {
    let root = Place { no, parent: ROOT_PARENT, name: &root_name() };
    let roots = u64::from(tx.row(root)?.is_some());
    Ok(tx.state(no)?.counts.entries.wrapping_add(roots) == log.rows)
}

/// What is older than a row that the replica has already is not taken: that row would stay.
fn is_news(from: &dyn Snapshot, no: LocationNo, log: LogDigest) -> Result<(), IndexError> {
    if log.head < beyond(from, no)? { Err(IndexError::NotAsStated) } else { Ok(()) }
}

fn sharing(from: &dyn Snapshot, id: LocationId) -> Result<Option<Sharing>, IndexError> {
    let value = from.get(Table::Meta, &key::sharing(id))?;
    value.map(|v| decode(&v, "who may see a location")).transpose()
}

fn statement(from: &dyn Snapshot, no: LocationNo) -> Result<Option<Signed>, IndexError> {
    let value = from.get(Table::Meta, &key::statement(no))?;
    value.map(|v| decode(&v, "what an owner signed")).transpose()
}

/// A whole log on its way in, in a file, until it is known to be right.
pub struct Spool {
    signed: Signed,
    file: BufWriter<File>,
    path: PathBuf,
    sum: Sum,
    places: u64,
}

impl Spool {
    /// An empty one. The file has no name any more when this returns.
    pub fn create(path: &Path, signed: Signed) -> Result<Self, IndexError> {
        let failed = |source| StoreError::Io { path: path.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(failed)?;
        std::fs::remove_file(path).map_err(failed)?;
        let (file, path) = (BufWriter::new(file), path.to_owned());
        Ok(Self { signed, file, path, sum: Sum::default(), places: 0 })
    }

    /// Adds the next rows. An error ends it: these are not the rows of the statement.
    pub fn push(&mut self, rows: &[LogRow]) -> Result<(), IndexError> {
        let log = self.signed.statement.log;
        self.places += rows.len() as u64;
        if self.places > log.rows.saturating_add(log.rows.max(TOMBSTONES)) {
            return Err(IndexError::NotAsStated);
        }
        rows.iter().try_for_each(check_row)?;
        check_order(self.sum.upto(), rows, log.head)?;
        for LogRow { seq, parent, name, entry } in rows {
            match entry {
                Some(entry) => self.sum.add(Summand { seq: *seq, parent: *parent, name, entry }),
                None => self.sum.pass(*seq),
            }
        }
        if self.sum.rows() > log.rows {
            return Err(IndexError::NotAsStated);
        }
        let lot = encode(&rows);
        let written = u32::try_from(lot.len())
            .ok()
            .filter(|len| *len as usize <= MAX_LOT)
            .ok_or_else(|| io::Error::other("a lot of rows is too long"))
            .and_then(|len| self.file.write_all(&len.to_le_bytes()))
            .and_then(|()| self.file.write_all(&lot));
        Ok(written.map_err(|source| StoreError::Io { path: self.path.clone(), source })?)
    }

    /// After the last row: what can be taken now, if it is the log that the owner stated.
    pub fn finish(self) -> Result<Spooled, IndexError> {
        let Self { signed, file, path, sum, .. } = self;
        let log = signed.statement.log;
        if sum.digest(log.log_id, log.head) != log {
            return Err(IndexError::NotAsStated);
        }
        let rewound =
            file.into_inner().map_err(io::IntoInnerError::into_error).and_then(|mut f| {
                f.rewind()?;
                Ok(f)
            });
        let file = rewound.map_err(|source| StoreError::Io { path: path.clone(), source })?;
        Ok(Spooled { signed, lots: Lots { file: BufReader::new(file), path } })
    }
}

/// A whole log as its owner stated it.
pub struct Spooled {
    signed: Signed,
    lots: Lots,
}

struct Lots {
    file: BufReader<File>,
    path: PathBuf,
}

impl Lots {
    fn rewind(&mut self) -> Result<(), IndexError> {
        let rewound = self.file.rewind();
        Ok(rewound.map_err(|source| StoreError::Io { path: self.path.clone(), source })?)
    }

    fn next(&mut self) -> Result<Option<Vec<LogRow>>, IndexError> {
        let failed = |source| StoreError::Io { path: self.path.clone(), source };
        let mut len = [0; 4];
        match self.file.read_exact(&mut len) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read.map_err(failed)?,
        }
        // Its own writing: no longer than what was pushed.
        let mut lot = vec![0; u32::from_le_bytes(len) as usize];
        self.file.read_exact(&mut lot).map_err(failed)?;
        decode(&lot, "a lot of rows").map(Some)
    }
}
