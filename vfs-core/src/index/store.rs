//! The seam below the index: ordered byte keys, consistent snapshots, atomic batches.
//!
//! The index needs nothing else of a database, so a store is one file that
//! implements [`Store`] and passes the suite in `suite.rs`. Keys and values mean
//! nothing here; [`super::key`] and [`super::row`] give them their meaning.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The version of the rows' format; a store with a higher one is refused.
pub const FORMAT: u32 = 2;

/// A set of ordered keys of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Table {
    /// The format's version, counters, the state of each location.
    Meta,
    /// The locations.
    Locations,
    /// (location, parent, name): the rows.
    Entries,
    /// (location, file, parent, name): the names of a file.
    Nodes,
    /// (location, sequence number): what changed, each name once.
    Log,
    /// (location, parent, name) of what is gone: its place in the log.
    Tombstones,
    /// (location, inode on the owner's disk): the file.
    Disk,
    /// (content, location, file): who has these bytes.
    Content,
    /// (location, newest first, file): what waits for hashing.
    Unhashed,
    /// (location, file): what lost its last name.
    Orphans,
}

impl Table {
    /// Every table, in the order of their numbers.
    pub const ALL: [Self; 10] = [
        Self::Meta,
        Self::Locations,
        Self::Entries,
        Self::Nodes,
        Self::Log,
        Self::Tombstones,
        Self::Disk,
        Self::Content,
        Self::Unhashed,
        Self::Orphans,
    ];
}

/// When a commit must have reached the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Before it returns; so has every relaxed commit before it.
    Durable,
    /// With the next durable one. A crash loses it whole or not at all.
    Relaxed,
}

/// Changes of one atomic commit; a later change of a key replaces an earlier one.
#[derive(Debug, Default)]
pub struct Batch {
    tables: [BTreeMap<Vec<u8>, Option<Vec<u8>>>; Table::ALL.len()],
}

impl Batch {
    /// Sets the value of a key.
    pub fn put(&mut self, table: Table, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.tables[table as usize].insert(key.into(), Some(value.into()));
    }

    /// Removes a key, present or not.
    pub fn delete(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.tables[table as usize].insert(key.into(), None);
    }

    /// The changes of one table, in the order of keys; `None` is a removal.
    pub fn changes(&self, table: Table) -> &BTreeMap<Vec<u8>, Option<Vec<u8>>> {
        &self.tables[table as usize]
    }

    /// How many keys it changes.
    pub fn len(&self) -> usize {
        self.tables.iter().map(BTreeMap::len).sum()
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.tables.iter().all(BTreeMap::is_empty)
    }
}

/// Called with each key and value of a scan, until it breaks.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

/// An open store.
pub trait Store: Send + Sync {
    /// A consistent state: no commit after this call is seen. Never waits for a writer.
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError>;

    /// All changes of the batch or none, also across a crash.
    fn commit(&self, batch: Batch, durability: Durability) -> Result<(), StoreError>;

    /// Bytes on the disk.
    fn size_bytes(&self) -> u64;

    /// Whether its disk failed and was not found to work since.
    fn has_failed(&self) -> bool {
        false
    }

    /// Another number since a commit that failed may have taken effect after all: what is known
    /// of the store is to be read again.
    fn era(&self) -> u64 {
        0
    }
}

/// One consistent state of a store.
pub trait Snapshot: Send {
    /// The value of a key.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Visits the keys in `from..to` (without `to`: to the table's end) in byte order.
    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError>;
}

/// Why a store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed or is full.
    #[error("the index at {path}: {source}")]
    Io {
        /// The store's file or folder.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// What was read is not what was written.
    #[error("the index at {path} is damaged: {reason}")]
    Corrupt {
        /// The store's file or folder.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A newer program wrote it.
    #[error("the index has format {found}; this program knows {FORMAT} and older")]
    NewerFormat {
        /// Its format.
        found: u32,
    },
    /// Another process, or this one, has it open.
    #[error("the index at {path} is in use")]
    InUse {
        /// The store's file or folder.
        path: PathBuf,
    },
}

/// What [`open_store`] found.
pub struct OpenedStore {
    /// The store, ready.
    pub store: Arc<dyn Store>,
    /// Where a damaged store was moved to; the one open now began empty.
    pub set_aside: Option<PathBuf>,
}

/// Opens or creates the store of this build in `dir`. A damaged one is set aside
/// as `<file>.corrupt-<unix time>` and an empty one takes its place.
pub fn open_store(dir: &Path) -> Result<OpenedStore, StoreError> {
    open_kind(&KINDS[0], dir)
}

/// A kind of store: where it lies below the index's folder, and how it is opened.
pub(super) struct StoreKind {
    /// Its file or folder.
    pub(super) file: &'static str,
    /// Opens or creates it at that path.
    pub(super) open: fn(&Path) -> Result<Arc<dyn Store>, StoreError>,
}

/// Every kind that this build has; the first is the one in use. Tests have them all, so that
/// one build runs the suite over each.
pub(super) const KINDS: &[StoreKind] = &[
    #[cfg(feature = "sled")]
    SLED,
    REDB,
    #[cfg(all(test, not(feature = "sled")))]
    SLED,
];

const REDB: StoreKind = StoreKind {
    file: "index.redb",
    open: |path| Ok(Arc::new(super::redb::RedbStore::open(path)?)),
};

#[cfg(any(test, feature = "sled"))]
const SLED: StoreKind = StoreKind {
    file: "index.sled",
    open: |path| Ok(Arc::new(super::sled::SledStore::open(path)?)),
};

pub(super) fn open_kind(kind: &StoreKind, dir: &Path) -> Result<OpenedStore, StoreError> {
    let path = dir.join(kind.file);
    let io = |source| StoreError::Io { path: path.clone(), source };
    std::fs::create_dir_all(dir).map_err(io)?;
    let known_damaged = damage_mark(&path).exists();
    if !known_damaged {
        match open_checked(kind, &path) {
            Ok(store) => return Ok(OpenedStore { store, set_aside: None }),
            Err(StoreError::Corrupt { reason, .. }) => {
                tracing::warn!(path = %path.display(), reason, "the index is damaged; beginning anew");
            }
            Err(other) => return Err(other),
        }
    }
    let aside = set_aside(&path).map_err(io)?;
    let store = open_checked(kind, &path)?;
    Ok(OpenedStore { store, set_aside: Some(aside) })
}

/// Opens a store and checks its format. Stores may panic over damage that they did not
/// foresee; an index is rebuildable, so that too only means to begin anew.
fn open_checked(kind: &StoreKind, path: &Path) -> Result<Arc<dyn Store>, StoreError> {
    let attempt = || {
        let is_new = !path.exists();
        let store = (kind.open)(path)?;
        match format(&*store, path)? {
            Some(FORMAT) => {}
            // Format 1 had no sums of logs, which an older program would not keep right.
            Some(1) => write_format(&*store)?,
            Some(found) => return Err(StoreError::NewerFormat { found }),
            None if is_new => write_format(&*store)?,
            // A store may mend damage by forgetting everything; that is not hidden.
            None => return Err(corrupt(path, "it has no format")),
        }
        Ok(store)
    };
    std::panic::catch_unwind(attempt).unwrap_or_else(|_| Err(corrupt(path, "the store gave up")))
}

const FORMAT_KEY: &[u8] = b"format";

fn format(store: &dyn Store, path: &Path) -> Result<Option<u32>, StoreError> {
    let Some(found) = store.snapshot()?.get(Table::Meta, FORMAT_KEY)? else { return Ok(None) };
    let found: Result<[u8; 4], _> = found.try_into();
    match found.map(u32::from_be_bytes) {
        Ok(found @ 1..) => Ok(Some(found)),
        _ => Err(corrupt(path, "its format is none")),
    }
}

fn write_format(store: &dyn Store) -> Result<(), StoreError> {
    let mut batch = Batch::default();
    batch.put(Table::Meta, FORMAT_KEY, FORMAT.to_be_bytes());
    store.commit(batch, Durability::Durable)
}

fn corrupt(path: &Path, reason: &str) -> StoreError {
    StoreError::Corrupt { path: path.to_owned(), reason: reason.to_owned() }
}

/// Beside the store; there when damage was met while it was in use.
fn damage_mark(path: &Path) -> PathBuf {
    path.with_added_extension("damaged")
}

/// Has the store set aside when it is opened next: damage in use cannot be mended in use.
pub(super) fn mark_damaged(path: &Path) {
    if let Err(error) = std::fs::write(damage_mark(path), b"") {
        tracing::error!(path = %path.display(), %error, "cannot mark the damaged index");
    }
}

fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seconds = now.map_or(0, |d| d.as_secs());
    let free = |p: &PathBuf| !p.exists();
    let aside = (seconds..)
        .map(|n| path.with_added_extension(format!("corrupt-{n}")))
        .find(free)
        .unwrap_or_else(|| path.with_added_extension("corrupt"));
    match std::fs::rename(path, &aside) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        done => done?,
    }
    match std::fs::remove_file(damage_mark(path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(aside),
        done => done.map(|()| aside),
    }
}
