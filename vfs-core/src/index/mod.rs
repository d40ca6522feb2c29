//! The rows of every location of every device, on an embedded store.
//!
//! | module | what it is |
//! |---|---|
//! | `store`, `redb`, `sled` | ordered byte keys, snapshots, atomic batches; the seam and what is below it |
//! | `key`, `row` | the form of keys and values |
//! | `read`, `tx`, `memory` | typed reads; one commit in the making; what is held in memory |
//! | `locations` | the locations themselves |
//! | `observe`, `sweep` | the owner's side: what its disk has; what nothing leads to any more |
//! | `expect` | what this device itself is about to put on its disks |
//! | `replica`, `holders` | the other devices' locations; who of them has which bytes |
//! | `digest`, `relay` | what a log adds up to; replicas from somebody else than their owner |
//! | `compact` | tombstones that nobody needs any more |
//! | `view` | queries |
//! | `audit`, `differences`, `unlike` | for whoever doubts it: rows against each other, against a disk, against their owner's |
//!
//! **Writers** (scanner, watcher, hasher, replication) are serialised by one lock; each
//! operation is one commit, or several bounded ones where its documentation says so.
//! **Readers** use snapshots and never wait for a writer.
//!
//! **Durability.** Commits are relaxed, one a second at least is durable: a crash may
//! lose the last of them, whole commits from the end, never a part of one. What is lost of
//! an own location is found again by the next scan, what is lost of a replica is asked for
//! again, because its cursor was lost with it. No row of an own location leaves this device
//! before it is durable ([`View::log_after`]): a sequence number that another device has
//! seen is never given twice.

mod audit;
mod compact;
mod differences;
mod digest;
mod expect;
mod holders;
mod key;
mod locations;
mod memory;
mod observe;
mod read;
mod redb;
mod relay;
mod replica;
mod row;
#[cfg(any(test, feature = "sled"))]
mod sled;
mod store;
mod sweep;
mod tx;
mod unlike;
mod view;

#[cfg(test)]
mod audit_tests;
#[cfg(test)]
mod disk_model;
#[cfg(test)]
mod mem;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod suite;
#[cfg(test)]
mod tests;

use crate::changes::Feed;
use crate::error::{FsError, Kind};
use crate::model::{Attr, DeviceId, Entry, FileId, LocationId, LocationNo, Name, Seq};
use expect::Expected;
use memory::Memory;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tx::Tx;

pub use audit::{Audit, Fault};
pub use compact::Seen;
pub use differences::{Difference, Differences, Differs};
pub use digest::LogDigest;
pub(crate) use key::after_prefix;
pub use observe::{BytesRead, Sighting};
pub use redb::RedbStore;
pub use relay::{AT_ONCE, Attested, Signed, Spool, Spooled, Statement, Wanted};
#[cfg(feature = "sled")]
pub use sled::SledStore;
pub use store::{
    Batch, Durability, FORMAT, OpenedStore, Snapshot, Store, StoreError, Table, Visit, open_store,
};
pub use unlike::Unlike;
pub use view::{Begin, View};

/// A relaxed commit follows a durable one for at most this long.
const DURABLE_EVERY: Duration = Duration::from_secs(1);
/// And for at most this many changed keys.
const DURABLE_KEYS: usize = 500_000;

/// The parent of a location's own folder, whose name there is `root`.
pub const ROOT_PARENT: FileId = FileId(0);

/// Why an operation on the index failed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The store below it failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A row of the store could not be understood.
    #[error("a row of the index is damaged: {0}")]
    DamagedRow(&'static str),
    /// There is no such location (any more).
    #[error("location {0:?} is not in the index")]
    NoSuchLocation(LocationNo),
    /// The directory has no name (any more).
    #[error("directory {1:?} is not in location {0:?}")]
    NoSuchDirectory(LocationNo, FileId),
    /// Only its owner observes a location, and only other devices replicate it.
    #[error("location {0:?} has another owner than this operation needs")]
    WrongOwner(LocationNo),
    /// A row of a peer, or an observation, that breaks a rule.
    #[error("an invalid row: {0}")]
    InvalidRow(&'static str),
    /// The rows are of another log than the replica's; reset the replica first.
    #[error("the replica follows another log")]
    OtherLog,
    /// Rows of another device than their owner do not add up to what the owner signed.
    #[error("the rows are not those that their owner stated")]
    NotAsStated,
    /// There are no numbers left for locations or files.
    #[error("too many {0}")]
    TooMany(&'static str),
}

impl From<IndexError> for FsError {
    fn from(error: IndexError) -> Self {
        let kind = match &error {
            IndexError::NoSuchLocation(_) | IndexError::NoSuchDirectory(..) => Kind::NotFound,
            IndexError::WrongOwner(_) => Kind::ReadOnly,
            IndexError::InvalidRow(_) | IndexError::NotAsStated => Kind::Invalid,
            IndexError::TooMany(_) => Kind::NoSpace,
            IndexError::Store(_) | IndexError::DamagedRow(_) | IndexError::OtherLog => Kind::Io,
        };
        Self::caused(kind, "index", error)
    }
}

/// A location to add, or what it should be from now on.
#[derive(Clone, Debug)]
pub struct NewLocation {
    /// The same on every device; an existing one is updated.
    pub id: LocationId,
    /// The device whose disk it is on.
    pub owner: DeviceId,
    /// Unique among the owner's locations.
    pub name: String,
    /// The folder, when this device is the owner.
    pub root: Option<PathBuf>,
    /// Nobody may write to it through the drive.
    pub read_only: bool,
    /// The devices that may see it; `None` is all members.
    pub shared_with: Option<Vec<DeviceId>>,
}

/// What the owner's disk has under one name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Observed {
    /// Its name in the directory.
    pub name: Name,
    /// `stat` data.
    pub attr: Attr,
    /// `st_ino`.
    pub disk_ino: u64,
    /// Of a symlink: its target.
    pub target: Option<Box<[u8]>>,
}

/// One change of a location, as replicas get it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogRow {
    /// Its place in the owner's log.
    pub seq: Seq,
    /// The directory.
    pub parent: FileId,
    /// The name in it.
    pub name: Name,
    /// What it refers to now; `None`: it is gone.
    pub entry: Option<Entry>,
}

/// A file with one of its names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// The directory of that name.
    pub parent: FileId,
    /// The name.
    pub name: Name,
    /// What it refers to.
    pub entry: Entry,
}

/// How much a location holds, without its own folder; hard links count once a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counts {
    /// Names.
    pub entries: u64,
    /// Names of regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Bytes of the regular files.
    pub bytes: u64,
    /// Regular files with a content id.
    pub hashed_files: u64,
    /// Bytes of these.
    pub hashed_bytes: u64,
}

/// The index of this device; a clone is the same index.
#[derive(Clone)]
pub struct Index(Arc<Inner>);

struct Inner {
    store: Arc<dyn Store>,
    me: DeviceId,
    feed: Feed,
    /// The one lock of all writers. `memory` is changed while it is held.
    writer: Mutex<Writer>,
    memory: Memory,
    expected: Expected,
    /// There are relaxed commits after the last durable one. Changed under `writer`.
    relaxed: AtomicBool,
    renumbered: replica::Renumbered,
    listing: holders::Listing,
}

/// What decides when the next commit is a durable one.
struct Writer {
    durable_at: Instant,
    keys_since: usize,
    /// Of the store, when `memory` was read from it.
    era: u64,
}

impl Writer {
    fn durability(&self, keys: usize) -> Durability {
        if self.durable_at.elapsed() >= DURABLE_EVERY || self.keys_since + keys >= DURABLE_KEYS {
            Durability::Durable
        } else {
            Durability::Relaxed
        }
    }
}

impl Index {
    /// The index in this store, for the device `me`.
    pub fn open(store: Arc<dyn Store>, me: DeviceId) -> Result<Self, IndexError> {
        let memory = Memory::default();
        let removing = locations::load(&*store.snapshot()?, &memory)?;
        let (feed, relaxed, expected, renumbered, listing) = Default::default();
        let era = store.era();
        let writer = Mutex::new(Writer { durable_at: Instant::now(), keys_since: 0, era });
        let inner = Arc::new(Inner {
            store,
            me,
            feed,
            writer,
            memory,
            expected,
            relaxed,
            renumbered,
            listing,
        });
        locations::resume_removals(&inner, removing);
        let index = Self(inner);
        for replica in index.locations().iter().filter(|l| l.owner != me) {
            if let Err(error) = index.list_holders(replica.no) {
                // Reading needs none of it, and a full disk must not keep the drive from starting.
                tracing::warn!(no = ?replica.no, %error, "cannot note now who has which bytes");
            }
        }
        Ok(index)
    }

    /// This device.
    pub fn me(&self) -> DeviceId {
        self.0.me
    }

    /// Where every commit is announced.
    pub fn feed(&self) -> &Feed {
        &self.0.feed
    }

    /// One consistent state.
    pub fn view(&self) -> Result<View<'_>, IndexError> {
        View::new(self)
    }

    /// How much a location holds, rows of lost directories included until they are swept.
    pub fn counts(&self, no: LocationNo) -> Counts {
        self.memory().state(no).map_or(Counts::default(), |s| s.counts)
    }

    /// Bytes on the disk.
    pub fn size_bytes(&self) -> u64 {
        self.0.store.size_bytes()
    }

    /// Makes every commit so far durable.
    pub fn flush(&self) -> Result<(), IndexError> {
        let mut writer = self.0.lock();
        Ok(self.0.flush(&mut writer)?)
    }

    /// Whether its disk failed and was not found to work since.
    pub fn has_failed(&self) -> bool {
        self.store().has_failed()
    }

    fn store(&self) -> &dyn Store {
        &*self.0.store
    }

    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn own_location(&self, no: LocationNo) -> Result<(), IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        if location.owner == self.me() { Ok(()) } else { Err(IndexError::WrongOwner(no)) }
    }

    /// Commits what `make` puts into a transaction; nothing of it when `make` fails.
    fn write<R>(
        &self,
        make: impl FnOnce(&mut Tx<'_>) -> Result<R, IndexError>,
    ) -> Result<R, IndexError> {
        self.commit(Durability::Relaxed, make, |_, _| ())
    }

    /// The same, durable when it returns; `then` changes the memory after the commit.
    fn write_durably<R>(
        &self,
        make: impl FnOnce(&mut Tx<'_>) -> Result<R, IndexError>,
        then: impl FnOnce(&Memory, &R),
    ) -> Result<R, IndexError> {
        self.commit(Durability::Durable, make, then)
    }

    fn commit<R>(
        &self,
        at_least: Durability,
        make: impl FnOnce(&mut Tx<'_>) -> Result<R, IndexError>,
        then: impl FnOnce(&Memory, &R),
    ) -> Result<R, IndexError> {
        let inner = &*self.0;
        let mut writer = inner.lock();
        let snapshot = inner.store.snapshot()?;
        inner.follow_store(&mut writer, &*snapshot)?;
        let mut tx = Tx::new(snapshot, &inner.memory, &inner.expected, inner.me);
        let result = make(&mut tx)?;
        let (batch, states, changes) = tx.finish();
        if batch.is_empty() {
            return Ok(result);
        }
        inner.feed.announce(&changes);
        let committed = inner.commit(&mut writer, batch, at_least);
        if committed.is_ok() {
            inner.memory.put_states(states);
            then(&inner.memory, &result);
        }
        // Under the lock, so that the feed has the order of the commits. Also when it failed: it may
        // have taken effect.
        inner.feed.publish(changes);
        committed?;
        Ok(result)
    }
}

impl Inner {
    /// A writer that panicked has left nothing behind: its transaction went with it.
    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A commit that failed may have taken effect after all: the memory has what the store has
    /// before anything is built on it.
    fn follow_store(&self, writer: &mut Writer, now: &dyn Snapshot) -> Result<(), IndexError> {
        let era = self.store.era();
        if writer.era != era {
            locations::load(now, &self.memory)?;
            writer.era = era;
            self.feed.publish(vec![crate::changes::Change::Locations]);
        }
        Ok(())
    }

    fn commit(
        &self,
        writer: &mut Writer,
        batch: Batch,
        at_least: Durability,
    ) -> Result<(), StoreError> {
        let keys = batch.len();
        let durability = match at_least {
            Durability::Durable => Durability::Durable,
            Durability::Relaxed => writer.durability(keys),
        };
        match durability {
            Durability::Relaxed => {
                // Before the commit, so that whoever sees its rows sees this too.
                self.relaxed.store(true, Ordering::Release);
                writer.keys_since += keys;
                self.store.commit(batch, durability)
            }
            Durability::Durable => {
                self.store.commit(batch, durability)?;
                (writer.durable_at, writer.keys_since) = (Instant::now(), 0);
                self.relaxed.store(false, Ordering::Release);
                Ok(())
            }
        }
    }

    fn flush(&self, writer: &mut Writer) -> Result<(), StoreError> {
        match self.relaxed.load(Ordering::Acquire) {
            true => self.commit(writer, Batch::default(), Durability::Durable),
            false => Ok(()),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let flushed = self.flush(&mut self.lock());
        if let Err(error) = flushed {
            tracing::warn!(%error, "the last changes of the index are not on the disk");
        }
    }
}
