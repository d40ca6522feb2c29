//! The alternative store, behind the feature `sled`: sled 0.34, one tree, a table's
//! number before each key.
//!
//! sled has atomic batches and no snapshots, so this adds them: a commit first notes
//! the values it replaces, stamped with its version, and a snapshot of an older version
//! reads those instead of the tree's. Notes live as long as a snapshot needs them.

use super::store::{Batch, Durability, Snapshot, Store, StoreError, Table, Visit, mark_damaged};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const CACHE_BYTES: u64 = 32 << 20;
/// How long a store that was closed may take to give up its lock.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);
/// Keys that a scan reads from the tree at a time.
const SCAN_KEYS: usize = 256;

/// An open sled folder.
pub struct SledStore {
    db: sled::Db,
    path: PathBuf,
    versions: Mutex<Versions>,
    /// Held by a commit; sled's batches are atomic, their order with the versions is ours.
    writer: Mutex<()>,
    /// Locked against a second opener; sled's own error for it says only "other".
    _lock: File,
}

#[derive(Default)]
struct Versions {
    /// The last whole commit.
    current: u64,
    /// How many snapshots there are of each version.
    open: BTreeMap<u64, usize>,
    /// What a key had before the commit of that version.
    replaced: BTreeMap<(Vec<u8>, u64), Option<sled::IVec>>,
}

impl Versions {
    /// What the key had in `version`, when a later commit replaced it.
    fn noted(&self, key: &[u8], version: u64) -> Option<&Option<sled::IVec>> {
        let from = (key.to_vec(), version + 1);
        let to = (key.to_vec(), u64::MAX);
        self.replaced.range(from..=to).next().map(|(_, value)| value)
    }

    fn forget_unneeded(&mut self) {
        match self.open.keys().next() {
            None => self.replaced.clear(),
            Some(&oldest) => self.replaced.retain(|(_, version), _| *version > oldest),
        }
    }
}

impl SledStore {
    /// Opens or creates the folder.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let lock = lock(path)?;
        let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES);
        let db = open_when_released(&config, path)?;
        let (versions, writer) = Default::default();
        Ok(Self { db, path: path.to_owned(), versions, writer, _lock: lock })
    }

    fn versions(&self) -> MutexGuard<'_, Versions> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, batch: &Batch) -> Result<(), sled::Error> {
        let version = self.versions().current + 1;
        let mut apply = sled::Batch::default();
        for table in Table::ALL {
            for (key, value) in batch.changes(table) {
                let key = prefixed(table, key);
                let before = self.db.get(&key)?;
                self.versions().replaced.insert((key.clone(), version), before);
                match value {
                    Some(value) => apply.insert(key, value.as_slice()),
                    None => apply.remove(key),
                }
            }
        }
        self.db.apply_batch(apply)
    }

    fn failure(&self, error: sled::Error) -> StoreError {
        let error = failure(&self.path, error);
        if matches!(error, StoreError::Corrupt { .. }) {
            mark_damaged(&self.path);
        }
        error
    }
}

impl Store for SledStore {
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError> {
        let mut versions = self.versions();
        let version = versions.current;
        *versions.open.entry(version).or_default() += 1;
        Ok(Box::new(SledSnapshot { store: self, version }))
    }

    fn commit(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(&batch).map_err(|e| self.failure(e))?;
        if durability == Durability::Durable {
            self.db.flush().map_err(|e| self.failure(e))?;
        }
        let mut versions = self.versions();
        versions.current += 1;
        versions.forget_unneeded();
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        self.db.size_on_disk().unwrap_or(0)
    }
}

struct SledSnapshot<'a> {
    store: &'a SledStore,
    version: u64,
}

impl Drop for SledSnapshot<'_> {
    fn drop(&mut self) {
        let mut versions = self.store.versions();
        if let Some(count) = versions.open.get_mut(&self.version) {
            *count -= 1;
            if *count == 0 {
                versions.open.remove(&self.version);
            }
        }
    }
}

impl SledSnapshot<'_> {
    /// The next keys of a range as they were in this version, and where to go on.
    ///
    /// The tree is read before the notes: a commit notes before it writes, so whatever of a
    /// later commit was read from the tree has its note by now.
    fn chunk(&self, from: &[u8], to: &Bound<Vec<u8>>) -> Result<Chunk, sled::Error> {
        let range = (Bound::Included(from.to_vec()), to.clone());
        let mut found = BTreeMap::new();
        for item in self.store.db.range(range).take(SCAN_KEYS) {
            let (key, value) = item?;
            found.insert(key.to_vec(), value);
        }
        let last = found.last_key_value().map(|(key, _)| key.clone());
        let next = last.filter(|_| found.len() == SCAN_KEYS).map(|mut key| {
            key.push(0);
            key
        });
        let end = next.clone().map_or_else(|| to.clone(), Bound::Excluded);
        let versions = self.store.versions();
        let noted = versions.replaced.range((from.to_vec(), 0)..);
        for (key, version) in noted.map(|(at, _)| at) {
            let past = match &end {
                Bound::Excluded(end) => key >= end,
                _ => false,
            };
            if past {
                break;
            }
            if *version <= self.version {
                continue;
            }
            match versions.noted(key, self.version) {
                Some(Some(value)) => drop(found.insert(key.clone(), value.clone())),
                _ => drop(found.remove(key)),
            }
        }
        Ok(Chunk { found, next })
    }
}

struct Chunk {
    found: BTreeMap<Vec<u8>, sled::IVec>,
    next: Option<Vec<u8>>,
}

impl Snapshot for SledSnapshot<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let key = prefixed(table, key);
        let now = self.store.db.get(&key).map_err(|e| self.store.failure(e))?;
        let versions = self.store.versions();
        let value = versions.noted(&key, self.version).unwrap_or(&now);
        Ok(value.as_ref().map(|v| v.to_vec()))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        let end = to.map_or_else(|| vec![table as u8 + 1], |to| prefixed(table, to));
        let mut from = prefixed(table, from);
        let end_bound = Bound::Excluded(end.clone());
        while from < end {
            let chunk = self.chunk(&from, &end_bound).map_err(|e| self.store.failure(e))?;
            for (key, value) in &chunk.found {
                if visit(&key[1..], value).is_break() {
                    return Ok(());
                }
            }
            let Some(next) = chunk.next else { return Ok(()) };
            from = next;
        }
        Ok(())
    }
}

fn prefixed(table: Table, key: &[u8]) -> Vec<u8> {
    let mut prefixed = Vec::with_capacity(1 + key.len());
    prefixed.push(table as u8);
    prefixed.extend_from_slice(key);
    prefixed
}

fn lock(path: &Path) -> Result<File, StoreError> {
    use rustix::fs::{FlockOperation, flock};
    let io = |source| StoreError::Io { path: path.to_owned(), source };
    let lock = File::create(path.with_added_extension("lock")).map_err(io)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::InUse { path: path.to_owned() }),
        Err(other) => Err(io(other.into())),
    }
}

/// Threads of a store that was closed hold sled's own lock for a moment longer; sled says
/// so with the same kind of error as for damage, but in its own words.
fn open_when_released(config: &sled::Config, path: &Path) -> Result<sled::Db, StoreError> {
    let deadline = Instant::now() + RELEASE_WITHIN;
    loop {
        match config.open() {
            Err(sled::Error::Io(e)) if e.to_string().contains("could not acquire lock") => {
                if Instant::now() > deadline {
                    return Err(StoreError::InUse { path: path.to_owned() });
                }
                std::thread::sleep(RELEASE_WITHIN / 500);
            }
            opened => return opened.map_err(|e| open_failure(path, e)),
        }
    }
}

/// While opening, a file that cannot be understood is damage.
fn open_failure(path: &Path, error: sled::Error) -> StoreError {
    use std::io::ErrorKind::{InvalidData, IsADirectory, NotADirectory, Other, UnexpectedEof};
    match error {
        sled::Error::Io(e)
            if matches!(
                e.kind(),
                InvalidData | UnexpectedEof | Other | NotADirectory | IsADirectory
            ) =>
        {
            StoreError::Corrupt { path: path.to_owned(), reason: e.to_string() }
        }
        other => failure(path, other),
    }
}

fn failure(path: &Path, error: sled::Error) -> StoreError {
    let path = path.to_owned();
    match error {
        sled::Error::Io(source) => StoreError::Io { path, source },
        sled::Error::Unsupported(reason) => {
            StoreError::Io { path, source: std::io::Error::other(reason) }
        }
        other => StoreError::Corrupt { path, reason: other.to_string() },
    }
}
