//! The store in use: redb, a copy-on-write B-tree in one file.
//!
//! It relies on redb for the lock against a second opener and for crash safety:
//! quick-repair keeps the allocator's state in each durable commit, so that an
//! open after a crash does not walk the file.
//!
//! After a failure of the disk the file is opened anew ([`RedbFile`]). Relaxed
//! commits, which only the memory of redb had, are kept here until a durable one,
//! and are made again then.

use super::store::{Batch, Durability, Snapshot, Store, StoreError, Table, Visit, mark_damaged};
use crate::local::check_room;
use crate::reopening::{Opener, RedbFile, opener};
use redb::{
    Database, ReadOnlyTable, ReadTransaction, ReadableDatabase, TableDefinition, WriteTransaction,
};
use std::cell::OnceCell;
use std::collections::btree_map;
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Of pages, read and dirty together: the part of the daemon's memory that the index may have.
const CACHE_BYTES: usize = 32 << 20;
/// Of keys and values of relaxed commits; with more the next one is durable.
const KEPT_BYTES: usize = 16 << 20;

/// With fewer new keys beside each other than this, one after the other is quicker.
const SHORTEST_RUN: usize = 8;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;
type OpenTable = ReadOnlyTable<&'static [u8], &'static [u8]>;

fn definition(table: Table) -> Definition {
    TableDefinition::new(match table {
        Table::Meta => "meta",
        Table::Locations => "locations",
        Table::Entries => "entries",
        Table::Nodes => "nodes",
        Table::Log => "log",
        Table::Tombstones => "tombstones",
        Table::Disk => "disk",
        Table::Content => "content",
        Table::Unhashed => "unhashed",
        Table::Orphans => "orphans",
    })
}

/// An open redb file.
pub struct RedbStore {
    file: RedbFile,
    path: PathBuf,
    kept: Mutex<Kept>,
    era: AtomicU64,
}

/// The relaxed commits since the last durable one, in order.
#[derive(Default)]
struct Kept {
    batches: Vec<Batch>,
    bytes: usize,
}

impl RedbStore {
    /// Opens or creates the file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_by(path, opener(path, CACHE_BYTES))
    }

    fn open_by(path: &Path, opener: Opener) -> Result<Self, StoreError> {
        let failed = |e| open_failure(path, e);
        let file = RedbFile::open(path, opener).map_err(failed)?;
        file.with(create_tables).map_err(failed)?;
        let (path, kept, era) = (path.to_owned(), Mutex::default(), AtomicU64::new(0));
        Ok(Self { file, path, kept, era })
    }

    /// The open file, with all that was committed.
    fn db(&self) -> Result<Arc<Database>, redb::Error> {
        self.file.get(|db| {
            let mut kept = self.kept();
            let mut transaction = begin(db, Durability::Durable)?;
            kept.batches.iter().try_for_each(|batch| apply(&mut transaction, batch))?;
            transaction.commit()?;
            *kept = Kept::default();
            self.era.fetch_add(1, Ordering::Release);
            Ok(())
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Changed only after what may fail.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<(), redb::Error> {
        let db = self.db()?;
        let mut kept = self.kept();
        let bytes = kept.bytes + bytes_of(&batch);
        let durability = if bytes > KEPT_BYTES { Durability::Durable } else { durability };
        let committed = begin(&db, durability).and_then(|mut transaction| {
            apply(&mut transaction, &batch)?;
            Ok(transaction.commit()?)
        });
        match (&committed, durability) {
            // The disk may have it: then what was committed before it must not come after it.
            (Err(redb::Error::Io(_)), Durability::Durable) => {
                kept.batches.push(batch);
                kept.bytes = bytes;
            }
            (Err(_), _) => {}
            (Ok(()), Durability::Durable) => *kept = Kept::default(),
            (Ok(()), Durability::Relaxed) => {
                kept.batches.push(batch);
                kept.bytes = bytes;
            }
        }
        // It is locked within the file's lock.
        drop(kept);
        committed.inspect_err(|error| self.file.met(&db, error))
    }

    /// A transaction of this file failed.
    fn failed(&self, of: &Arc<Database>, error: redb::Error) -> StoreError {
        self.file.met(of, &error);
        self.failure(error)
    }

    fn failure(&self, error: redb::Error) -> StoreError {
        let error = failure(&self.path, error);
        if matches!(error, StoreError::Corrupt { .. }) {
            mark_damaged(&self.path);
        }
        error
    }
}

fn begin(db: &Database, durability: Durability) -> Result<WriteTransaction, redb::Error> {
    let mut transaction = db.begin_write()?;
    match durability {
        Durability::Relaxed => transaction.set_durability(redb::Durability::None)?,
        Durability::Durable => transaction.set_quick_repair(true),
    }
    Ok(transaction)
}

/// So that a snapshot finds every table.
fn create_tables(db: &Database) -> Result<(), redb::Error> {
    let existing = db.begin_read()?.list_tables()?.count();
    if existing == Table::ALL.len() {
        return Ok(());
    }
    let transaction = begin(db, Durability::Durable)?;
    for table in Table::ALL {
        transaction.open_table(definition(table))?;
    }
    Ok(transaction.commit()?)
}

fn apply(transaction: &mut WriteTransaction, batch: &Batch) -> Result<(), redb::Error> {
    for table in Table::ALL {
        let changes = batch.changes(table);
        if changes.is_empty() {
            continue;
        }
        let mut open = transaction.open_table(definition(table))?;
        let mut changes = changes.iter();
        while changes.len() > 0 {
            if !insert_run(&mut open, &mut changes)? {
                change_next(&mut open, &mut changes)?;
            }
        }
    }
    Ok(())
}

type WritableTable<'a> = redb::Table<'a, &'static [u8], &'static [u8]>;
type Changes<'a> = btree_map::Iter<'a, Vec<u8>, Option<Vec<u8>>>;

fn change_next(
    table: &mut WritableTable<'_>,
    changes: &mut Changes<'_>,
) -> Result<(), redb::Error> {
    match changes.next() {
        Some((key, Some(value))) => drop(table.insert(key.as_slice(), value.as_slice())?),
        Some((key, None)) => drop(table.remove(key.as_slice())?),
        None => {}
    }
    Ok(())
}

/// Inserts the next keys at once if many of them belong between the same two that the table has:
/// that fills pages to their end. One by one, each page would be split in halves, and only the
/// second half filled further.
fn insert_run(
    table: &mut WritableTable<'_>,
    changes: &mut Changes<'_>,
) -> Result<bool, redb::Error> {
    let mut ahead = changes.clone();
    let (Some((first, _)), Some((last, _))) = (ahead.next(), ahead.nth(SHORTEST_RUN - 2)) else {
        return Ok(false);
    };
    if changes.clone().take(SHORTEST_RUN).any(|(_, value)| value.is_none()) {
        return Ok(false);
    }
    let mut cursor = table.lower_bound_mut(Bound::Included(first.as_slice()))?;
    let end = cursor.peek_next()?.map(|(key, _)| key.value().to_vec());
    let is_before_end = |key: &[u8]| end.as_deref().is_none_or(|end| key < end);
    let is_run = is_before_end(last);
    while is_run
        && let Some((key, Some(value))) = changes.clone().next()
        && is_before_end(key)
    {
        cursor.insert_before(key.as_slice(), value.as_slice())?;
        changes.next();
    }
    cursor.close()?;
    Ok(is_run)
}

/// What a batch takes in memory, about.
fn bytes_of(batch: &Batch) -> usize {
    const OF_A_KEY: usize = 64;
    let changes = Table::ALL.into_iter().flat_map(|table| batch.changes(table));
    changes.map(|(key, value)| key.len() + value.as_ref().map_or(0, Vec::len) + OF_A_KEY).sum()
}

impl Store for RedbStore {
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError> {
        let db = self.db().map_err(|e| self.failure(e))?;
        match db.begin_read() {
            Ok(transaction) => {
                let tables = Default::default();
                Ok(Box::new(RedbSnapshot { tables, transaction, store: self, db }))
            }
            Err(error) => Err(self.failed(&db, error.into())),
        }
    }

    fn commit(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        // A full disk is no failure of it.
        check_room(&self.path).map_err(|e| self.failure(e.into()))?;
        self.write(batch, durability).map_err(|e| self.failure(e))
    }

    fn has_failed(&self) -> bool {
        self.file.has_failed()
    }

    fn era(&self) -> u64 {
        self.era.load(Ordering::Acquire)
    }

    fn size_bytes(&self) -> u64 {
        // The file has holes where redb has room yet; blocks are of 512 bytes whatever the disk has.
        std::fs::metadata(&self.path).map_or(0, |m| m.blocks() * 512)
    }
}

struct RedbSnapshot<'a> {
    /// Those that were asked for: opening one costs as much as reading from it.
    tables: [OnceCell<OpenTable>; Table::ALL.len()],
    transaction: ReadTransaction,
    store: &'a RedbStore,
    /// Longer than the transaction.
    db: Arc<Database>,
}

impl RedbSnapshot<'_> {
    fn table(&self, table: Table) -> Result<&OpenTable, redb::Error> {
        let cell = &self.tables[table as usize];
        match cell.get() {
            Some(open) => Ok(open),
            None => {
                let open = self.transaction.open_table(definition(table))?;
                Ok(cell.get_or_init(|| open))
            }
        }
    }

    fn read(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, redb::Error> {
        let open = self.table(table)?;
        Ok(open.get(key)?.map(|value| value.value().to_vec()))
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), redb::Error> {
        let open = self.table(table)?;
        let range = match to {
            Some(to) if to <= from => return Ok(()),
            Some(to) => open.range(from..to)?,
            None => open.range(from..)?,
        };
        for item in range {
            let (key, value) = item?;
            if visit(key.value(), value.value()).is_break() {
                break;
            }
        }
        Ok(())
    }
}

impl Snapshot for RedbSnapshot<'_> {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.read(table, key).map_err(|e| self.store.failed(&self.db, e))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        self.visit(table, from, to, visit).map_err(|e| self.store.failed(&self.db, e))
    }
}

/// While opening, a file that is too short or has another magic number is damage too.
fn open_failure(path: &Path, error: redb::Error) -> StoreError {
    use std::io::ErrorKind::{InvalidData, UnexpectedEof};
    match error {
        redb::Error::Io(e) if matches!(e.kind(), InvalidData | UnexpectedEof) => {
            StoreError::Corrupt { path: path.to_owned(), reason: e.to_string() }
        }
        other => failure(path, other),
    }
}

fn failure(path: &Path, error: redb::Error) -> StoreError {
    use redb::Error;
    let path = path.to_owned();
    match error {
        Error::DatabaseAlreadyOpen => StoreError::InUse { path },
        Error::Io(source) => StoreError::Io { path, source },
        Error::Corrupted(reason) => StoreError::Corrupt { path, reason },
        Error::UpgradeRequired(_)
        | Error::TableTypeMismatch { .. }
        | Error::TableIsMultimap(_)
        | Error::TableDoesNotExist(_)
        | Error::TypeDefinitionChanged { .. } => {
            StoreError::Corrupt { path, reason: error.to_string() }
        }
        other => StoreError::Io { path, source: std::io::Error::other(other.to_string()) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reopening::failing::Disk;
    use std::time::{Duration, Instant};

    fn batch(keys: impl Iterator<Item = u32>, value: &str) -> Batch {
        let mut batch = Batch::default();
        keys.for_each(|key| batch.put(Table::Entries, key.to_be_bytes(), value));
        batch
    }

    fn read(store: &RedbStore, key: u32) -> Result<Option<String>, StoreError> {
        let value = store.snapshot()?.get(Table::Entries, &key.to_be_bytes())?;
        Ok(value.map(|value| String::from_utf8(value).unwrap()))
    }

    /// As rows come to a new device: each batch in order, the batches not.
    #[test]
    fn keys_that_come_together_fill_their_pages() {
        use redb::ReadableTableMetadata;
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("index.redb")).unwrap();
        for first in [5_000, 3_000, 0, 4_000, 1_000, 2_000, 6_000] {
            let value = "about as much as a row takes".repeat(4);
            store.commit(batch(first..first + 1_000, &value), Durability::Relaxed).unwrap();
        }
        let table = store.db().unwrap().begin_read().unwrap();
        let stats = table.open_table(definition(Table::Entries)).unwrap().stats().unwrap();
        let used = stats.stored_bytes() * 100 / (stats.leaf_pages() * 4096);
        assert!(used >= 85, "{used} % of the pages are used");
    }

    fn soon<T>(mut attempt: impl FnMut() -> Result<T, StoreError>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match attempt() {
                Ok(done) => return done,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The disk fails at every moment of a commit, and works again.
    #[test]
    fn after_a_failed_disk_works_again_all_that_was_committed_is_there() {
        for durability in [Durability::Relaxed, Durability::Durable] {
            for calls in 0.. {
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("index.redb");
                let disk = Disk::default();
                let store = RedbStore::open_by(&path, disk.opener(&path)).unwrap();
                store.commit(batch(0..50, "durable"), Durability::Durable).unwrap();
                store.commit(batch(40..90, "relaxed"), Durability::Relaxed).unwrap();
                store.commit(batch(80..95, "again"), Durability::Relaxed).unwrap();
                let before = store.snapshot().unwrap();
                disk.fail_after(calls);
                let done = store.commit(batch(100..200, "late"), durability);
                disk.fail_after(0);
                let flushed = store.commit(Batch::default(), Durability::Durable);
                assert!(flushed.is_err(), "nothing is durable on a disk that fails");
                assert!(store.commit(batch(0..1, "never"), Durability::Durable).is_err());
                assert!(store.has_failed());
                disk.work();
                // Who still reads the old state keeps the file from being opened anew.
                drop(before);
                let era = store.era();
                soon(|| store.commit(batch(300..301, "after"), Durability::Relaxed));
                assert_ne!(store.era(), era);
                assert!(!store.has_failed());
                let check = |store: &RedbStore| {
                    let value = |key| read(store, key).unwrap();
                    assert_eq!(value(39).as_deref(), Some("durable"));
                    assert_eq!(value(40).as_deref(), Some("relaxed"));
                    assert_eq!(value(90).as_deref(), Some("again"), "{durability:?}, {calls}");
                    let late = [value(100), value(199)];
                    assert_eq!(late[0], late[1], "whole or not at all");
                    if done.is_ok() {
                        assert_eq!(late[0].as_deref(), Some("late"), "{durability:?}, {calls}");
                    }
                    assert_eq!(value(300).as_deref(), Some("after"));
                };
                check(&store);
                store.commit(Batch::default(), Durability::Durable).unwrap();
                drop(store);
                check(&RedbStore::open(&path).unwrap());
                if done.is_ok() {
                    assert!(calls > 0 || durability == Durability::Relaxed);
                    break;
                }
            }
        }
    }

    #[test]
    fn a_disk_that_fails_while_it_is_read_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        let disk = Disk::default();
        let open = || RedbStore::open_by(&path, disk.opener(&path)).unwrap();
        let there = "there ".repeat(500);
        open().commit(batch(0..2_000, &there), Durability::Durable).unwrap();
        // Nothing of it is in memory.
        let store = open();
        disk.fail_after(0);
        let all = |store: &RedbStore| (0..2_000).try_for_each(|key| read(store, key).map(drop));
        assert!(all(&store).is_err() && read(&store, 7).is_err());
        disk.work();
        assert_eq!(soon(|| read(&store, 7)).as_deref(), Some(&there[..]));
        all(&store).unwrap();
    }

    #[test]
    fn what_is_kept_of_relaxed_commits_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("index.redb")).unwrap();
        let value = "x".repeat(100_000);
        for n in 0..400 {
            store.commit(batch(n..n + 1, &value), Durability::Relaxed).unwrap();
            assert!(store.kept().bytes <= KEPT_BYTES);
        }
    }
}
