//! The rows of every location of every device.

mod store;

use crate::changes::Feed;
use crate::error::{FsError, Kind};
use crate::model::{
    Attr, ContentId, DeviceId, Entry, FileId, Location, LocationId, LocationNo, Name, Seq, Stamp,
};
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

pub use store::{
    Batch, Durability, FORMAT, OpenedStore, Snapshot, Store, StoreError, Table, Visit, open_store,
};

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
    /// There are no numbers left for locations or files.
    #[error("too many {0}")]
    TooMany(&'static str),
}

impl From<IndexError> for FsError {
    fn from(error: IndexError) -> Self {
        let kind = match &error {
            IndexError::NoSuchLocation(_) | IndexError::NoSuchDirectory(..) => Kind::NotFound,
            IndexError::WrongOwner(_) => Kind::ReadOnly,
            IndexError::InvalidRow(_) => Kind::Invalid,
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
#[derive(Clone, PartialEq, Eq, Debug)]
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
pub struct Index {
    feed: Feed,
}

/// One consistent state of the index.
pub struct View<'a>(PhantomData<&'a ()>);

impl Index {
    /// The index in this store, for the device `me`.
    pub fn open(store: Arc<dyn Store>, me: DeviceId) -> Result<Self, IndexError> {
        unimplemented!()
    }
    /// This device.
    pub fn me(&self) -> DeviceId {
        unimplemented!()
    }
    /// Where every commit is announced.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }
    /// Every location, by number.
    pub fn locations(&self) -> Vec<Arc<Location>> {
        unimplemented!()
    }
    /// The location of this number.
    pub fn location(&self, no: LocationNo) -> Option<Arc<Location>> {
        unimplemented!()
    }
    /// The location of this id.
    pub fn location_by_id(&self, id: LocationId) -> Option<Arc<Location>> {
        unimplemented!()
    }
    /// Adds a location, or updates the one with its id.
    pub fn put_location(&self, location: NewLocation) -> Result<Arc<Location>, IndexError> {
        unimplemented!()
    }
    /// Removes a location and all its rows; continued at the next open after a crash.
    pub fn remove_location(&self, no: LocationNo) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// One consistent state.
    pub fn view(&self) -> Result<View<'_>, IndexError> {
        unimplemented!()
    }
    /// How much a location holds.
    pub fn counts(&self, no: LocationNo) -> Counts {
        unimplemented!()
    }
    /// Bytes on the disk.
    pub fn size_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// The location's own folder, as it is now.
    pub fn observe_root(&self, no: LocationNo, root: &Observed) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// A directory's whole listing, as it is now; returns its subdirectories.
    pub fn observe_directory(
        &self,
        no: LocationNo,
        dir: FileId,
        listing: Vec<Observed>,
    ) -> Result<Vec<(Name, FileId)>, IndexError> {
        unimplemented!()
    }
    /// One name of a directory, as it is now; `None`: it is gone.
    pub fn observe_entry(
        &self,
        no: LocationNo,
        dir: FileId,
        name: &Name,
        now: Option<Observed>,
    ) -> Result<Option<Entry>, IndexError> {
        unimplemented!()
    }
    /// Records the hash of a version; `false`: the row is another version by now.
    pub fn set_content(
        &self,
        no: LocationNo,
        file: FileId,
        stamp: &Stamp,
        content: ContentId,
    ) -> Result<bool, IndexError> {
        unimplemented!()
    }
    /// The next files to hash, newest first; they stay queued until [`Self::set_content`]
    /// or [`Self::skip_unhashed`].
    pub fn next_unhashed(&self, no: LocationNo, limit: usize) -> Result<Vec<FileId>, IndexError> {
        unimplemented!()
    }
    /// Takes a file that cannot be hashed now off the queue, until it changes.
    pub fn skip_unhashed(&self, no: LocationNo, file: FileId) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// Removes at most about `limit` rows of what lost its name and did not get one again;
    /// returns how many. Call it when no scan is under way: a file that moved to a directory
    /// not yet scanned again would lose its id.
    pub fn sweep_orphans(&self, limit: usize) -> Result<usize, IndexError> {
        unimplemented!()
    }
    /// Makes every commit so far durable.
    pub fn flush(&self) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// The id of the location's log: drawn by its owner when the log began; 0 in a replica
    /// that has none yet.
    pub fn log_id(&self, no: LocationNo) -> u64 {
        unimplemented!()
    }
    /// The last sequence number given (own) or applied (replica).
    pub fn head(&self, no: LocationNo) -> Seq {
        unimplemented!()
    }
    /// Applies rows of the owner's log and moves the cursor to `upto`, in one commit.
    pub fn apply_replica(
        &self,
        no: LocationNo,
        log_id: u64,
        rows: Vec<LogRow>,
        upto: Seq,
    ) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// Empties a replica, to follow another log from its beginning.
    pub fn reset_replica(&self, no: LocationNo, log_id: u64) -> Result<(), IndexError> {
        unimplemented!()
    }
}

impl View<'_> {
    /// What a name refers to.
    pub fn entry(
        &self,
        no: LocationNo,
        parent: FileId,
        name: &[u8],
    ) -> Result<Option<Entry>, IndexError> {
        unimplemented!()
    }
    /// A file, with any one of its names.
    pub fn node(&self, no: LocationNo, file: FileId) -> Result<Option<Node>, IndexError> {
        unimplemented!()
    }
    /// The entries of a directory after a name, in byte order of their names.
    pub fn children(
        &self,
        no: LocationNo,
        parent: FileId,
        after: Option<&Name>,
        visit: &mut dyn FnMut(&Name, &Entry) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        unimplemented!()
    }
    /// The path of a file below the location's folder, whose own path is empty; `None` when
    /// it has no name that leads there.
    pub fn path(&self, no: LocationNo, file: FileId) -> Result<Option<Vec<Name>>, IndexError> {
        unimplemented!()
    }
    /// What a path below the location's folder refers to.
    pub fn resolve(&self, no: LocationNo, path: &[Name]) -> Result<Option<Entry>, IndexError> {
        unimplemented!()
    }
    /// Every file that has these bytes.
    pub fn holders(&self, content: ContentId) -> Result<Vec<(LocationNo, FileId)>, IndexError> {
        unimplemented!()
    }
    /// Rows of the log after a place, about `max_bytes` of them but at least one, and up to
    /// where they reach; the same place when there is nothing more.
    pub fn log_after(
        &self,
        no: LocationNo,
        after: Seq,
        max_bytes: usize,
    ) -> Result<(Vec<LogRow>, Seq), IndexError> {
        unimplemented!()
    }
}
