//! The locations: their numbers, their properties, their removal.

use super::key;
use super::memory::Memory;
use super::row::{LocationRecord, State, decode, encode, path_bytes, path_from};
use super::store::{Snapshot, Table};
use super::tx::Tx;
use super::{Index, IndexError, Inner, NewLocation, read};
use crate::changes::Change;
use crate::model::{DeviceId, Location, LocationId, LocationNo};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Weak};

const NEXT_REPLICA: &[u8] = b"next location";
const NEXT_OWN: &[u8] = b"next own location";
/// How many numbers another device's locations may ever have been given.
const MAX_GIVEN: u16 = 1024;

impl Index {
    /// Every location, by number.
    pub fn locations(&self) -> Vec<Arc<Location>> {
        self.memory().locations()
    }

    /// The location of this number.
    pub fn location(&self, no: LocationNo) -> Option<Arc<Location>> {
        self.memory().location(no)
    }

    /// The location of this id.
    pub fn location_by_id(&self, id: LocationId) -> Option<Arc<Location>> {
        self.memory().location_by_id(id)
    }

    /// Adds a location, or updates the one with its id. The owner of a location never changes.
    pub fn put_location(&self, location: NewLocation) -> Result<Arc<Location>, IndexError> {
        let own = location.owner == self.me();
        let owner = location.owner;
        let put = self.write_durably(
            |tx| {
                let known = self.location_by_id(location.id);
                if let Some(known) = known.as_ref().filter(|k| k.owner != location.owner) {
                    return Err(IndexError::WrongOwner(known.no));
                }
                let no = match &known {
                    Some(known) => known.no,
                    None if own => begin_own(tx)?,
                    None => begin_replica(tx, owner)?,
                };
                if !own {
                    tx.batch.delete(Table::Meta, key::withdrawn(location.id));
                }
                let record = record_of(location);
                tx.batch.put(Table::Locations, key::location(no), encode(&record));
                tx.changes.push(Change::Locations);
                Ok(Arc::new(location_of(no, record)))
            },
            |memory, location| memory.put_location(location.clone()),
        )?;
        Ok(put)
    }

    /// Removes a location and all its rows; continued after the next open should it be cut off.
    pub fn remove_location(&self, no: LocationNo) -> Result<(), IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        self.write_durably(
            |tx| {
                let record = LocationRecord { removing: true, ..record_of((*location).clone()) };
                tx.batch.put(Table::Locations, key::location(no), encode(&record));
                tx.changes.push(Change::Locations);
                Ok(())
            },
            |memory, ()| memory.remove(no),
        )?;
        while self.remove_some(no)? {}
        Ok(())
    }

    /// Gives a replica a number of which no inode was ever made, and the log that it follows from
    /// now on. The rows under the old number go as those of a removed location.
    pub(super) fn renumber(&self, old: LocationNo, log_id: u64) -> Result<LocationNo, IndexError> {
        self.renew(old, |tx, location| {
            let no = begin_replica(tx, location.owner)?;
            tx.set_state(no, State::new(log_id));
            Ok(no)
        })
    }

    /// Begins an own location anew, under another number, with a log of its own and without rows:
    /// for one whose rows are damaged. Its disk is to be scanned under the new number, and every
    /// replica follows the new log.
    pub fn renew_own(&self, old: LocationNo) -> Result<LocationNo, IndexError> {
        self.own_location(old)?;
        self.renew(old, |tx, _| begin_own(tx))
    }

    /// The same location under the number that `begin` gives; the old rows go.
    fn renew(
        &self,
        old: LocationNo,
        begin: impl FnOnce(&mut Tx<'_>, &Location) -> Result<LocationNo, IndexError>,
    ) -> Result<LocationNo, IndexError> {
        let renewed = self.write_durably(
            |tx| {
                let location = self.location(old).ok_or(IndexError::NoSuchLocation(old))?;
                let record = record_of((*location).clone());
                let no = begin(tx, &location)?;
                tx.batch.put(Table::Locations, key::location(no), encode(&record));
                let gone = LocationRecord { removing: true, ..record };
                tx.batch.put(Table::Locations, key::location(old), encode(&gone));
                tx.changes.push(Change::Locations);
                Ok(Arc::new(Location { no, ..(*location).clone() }))
            },
            |memory, renewed| memory.renumber(old, renewed.clone()),
        )?;
        while self.remove_some(old)? {}
        Ok(renewed.no)
    }

    /// One commit of a removal; `false`: it is done.
    fn remove_some(&self, no: LocationNo) -> Result<bool, IndexError> {
        if self.purge_some(no)? {
            return Ok(true);
        }
        self.write(|tx| {
            tx.batch.delete(Table::Meta, key::state(no));
            for key in key::about_rows(no) {
                tx.batch.delete(Table::Meta, key);
            }
            for key in read::keys(tx, Table::Meta, &key::seen_of(no), usize::MAX)? {
                tx.batch.delete(Table::Meta, key);
            }
            tx.batch.delete(Table::Locations, key::location(no));
            Ok(false)
        })
    }
}

fn begin_own(tx: &mut Tx<'_>) -> Result<LocationNo, IndexError> {
    let no = next_number(tx, NEXT_OWN, LocationNo::FIRST_OWN..LocationNo::LIMIT)?;
    tx.set_state(no, State::begin(new_log_id()));
    Ok(no)
}

/// A peer announces what it likes: what one can use up is bounded, for ever.
fn begin_replica(tx: &mut Tx<'_>, owner: DeviceId) -> Result<LocationNo, IndexError> {
    let given = tx.get(Table::Meta, &key::given(owner))?;
    let given: u16 = given.map_or(Ok(0), |value| decode(&value, "a peer's locations"))?;
    if given >= MAX_GIVEN {
        return Err(IndexError::TooMany("locations of one device"));
    }
    tx.batch.put(Table::Meta, key::given(owner), encode(&(given + 1)));
    let no = next_number(tx, NEXT_REPLICA, 1..LocationNo::FIRST_OWN)?;
    tx.set_state(no, State::new(0));
    Ok(no)
}

/// A number never given before, so that no inode number ever means two things.
fn next_number(
    tx: &mut Tx<'_>,
    counter: &[u8],
    numbers: Range<u16>,
) -> Result<LocationNo, IndexError> {
    let next = match tx.get(Table::Meta, counter)? {
        Some(value) => decode(&value, "the next location's number")?,
        None => numbers.start,
    };
    if !numbers.contains(&next) {
        return Err(IndexError::TooMany("locations"));
    }
    tx.batch.put(Table::Meta, counter, encode(&(next + 1)));
    Ok(LocationNo(next))
}

#[cfg(test)]
thread_local! {
    static NEXT_LOG_ID: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Has this thread's logs numbered from here on, so that a simulation can be repeated.
#[cfg(test)]
pub(super) fn draw_log_ids_from(seed: u64) {
    NEXT_LOG_ID.set(((seed + 1) << 32) | 1);
}

/// Random and not 0: the keys of a [`RandomState`] come from the system's randomness.
fn new_log_id() -> u64 {
    #[cfg(test)]
    if let next @ 1.. = NEXT_LOG_ID.get() {
        NEXT_LOG_ID.set(next + 1);
        return next;
    }
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u128(std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos()));
    hasher.finish().max(1)
}

fn record_of(location: impl Into<NewLocation>) -> LocationRecord {
    let NewLocation { id, owner, name, root, read_only, shared_with } = location.into();
    let root = root.as_deref().map(path_bytes);
    LocationRecord { id, owner, name, root, read_only, shared_with, removing: false }
}

fn location_of(no: LocationNo, record: LocationRecord) -> Location {
    let LocationRecord { id, owner, name, root, read_only, shared_with, .. } = record;
    let root = root.as_deref().map(path_from);
    Location { no, id, owner, name, root, read_only, shared_with }
}

impl From<Location> for NewLocation {
    fn from(location: Location) -> Self {
        let Location { id, owner, name, root, read_only, shared_with, .. } = location;
        Self { id, owner, name, root, read_only, shared_with }
    }
}

/// Reads the locations into memory; returns those whose removal was cut off.
pub(super) fn load(
    snapshot: &dyn Snapshot,
    memory: &Memory,
) -> Result<Vec<LocationNo>, IndexError> {
    let mut removing = Vec::new();
    read::scan_prefix(snapshot, Table::Locations, b"", &mut |k, value| {
        let no = key::first_location(k).ok_or(IndexError::DamagedRow("a location"))?;
        let record: LocationRecord = decode(value, "a location")?;
        if record.removing {
            removing.push(no);
        } else {
            memory.put_location(Arc::new(location_of(no, record)));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for location in memory.locations() {
        let state = snapshot.get(Table::Meta, &key::state(location.no))?;
        let state = state.ok_or(IndexError::DamagedRow("a location without its state"))?;
        memory.put_states([(location.no, decode(&state, "a location's state")?)].into());
        if let Some(whole) = snapshot.get(Table::Meta, &key::whole(location.no))? {
            let (log_id, upto) = decode(&whole, "where a replica was whole")?;
            memory.put_whole(location.no, log_id, upto);
        }
    }
    Ok(removing)
}

/// Ends removals that were cut off, on a thread of its own: nothing waits for them. It ends
/// early when the index is closed, which it does not keep open between two commits.
pub(super) fn resume_removals(index: &Arc<Inner>, removing: Vec<LocationNo>) {
    if removing.is_empty() {
        return;
    }
    let index = Arc::downgrade(index);
    let work = move || {
        for no in removing {
            if let Err(error) = resume_removal(&index, no) {
                tracing::warn!(?no, %error, "cannot remove the rows of a removed location");
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("index-removal".into()).spawn(work) {
        tracing::warn!(%error, "cannot remove the rows of removed locations now");
    }
}

fn resume_removal(index: &Weak<Inner>, no: LocationNo) -> Result<(), IndexError> {
    while let Some(index) = index.upgrade().map(Index) {
        if !index.remove_some(no)? {
            break;
        }
    }
    Ok(())
}
