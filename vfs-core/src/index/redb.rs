//! The store in use: redb, a copy-on-write B-tree in one file.
//!
//! It relies on redb for the lock against a second opener and for crash safety:
//! quick-repair keeps the allocator's state in each durable commit, so that an
//! open after a crash does not walk the file.

use super::store::{Batch, Durability, Snapshot, Store, StoreError, Table, Visit, mark_damaged};
use crate::local::check_room;
use redb::{Database, ReadTransaction, ReadableDatabase, TableDefinition};
use std::path::{Path, PathBuf};

/// Of pages, read and dirty together: the part of the daemon's memory that the index may have.
const CACHE_BYTES: usize = 32 << 20;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

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
    db: Database,
    path: PathBuf,
}

impl RedbStore {
    /// Opens or creates the file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let opened = redb::Builder::new().set_cache_size(CACHE_BYTES).create(path);
        let db = opened.map_err(|e| open_failure(path, e.into()))?;
        let store = Self { db, path: path.to_owned() };
        store.create_tables().map_err(|e| open_failure(path, e))?;
        Ok(store)
    }

    /// So that a snapshot finds every table.
    fn create_tables(&self) -> Result<(), redb::Error> {
        let existing = self.db.begin_read()?.list_tables()?.count();
        if existing == Table::ALL.len() {
            return Ok(());
        }
        let mut transaction = self.db.begin_write()?;
        transaction.set_quick_repair(true);
        for table in Table::ALL {
            transaction.open_table(definition(table))?;
        }
        Ok(transaction.commit()?)
    }

    fn write(&self, batch: &Batch, durability: Durability) -> Result<(), redb::Error> {
        check_room(&self.path)?;
        let mut transaction = self.db.begin_write()?;
        match durability {
            Durability::Relaxed => transaction.set_durability(redb::Durability::None)?,
            Durability::Durable => transaction.set_quick_repair(true),
        }
        for table in Table::ALL {
            let changes = batch.changes(table);
            if changes.is_empty() {
                continue;
            }
            let mut open = transaction.open_table(definition(table))?;
            for (key, value) in changes {
                match value {
                    Some(value) => drop(open.insert(key.as_slice(), value.as_slice())?),
                    None => drop(open.remove(key.as_slice())?),
                }
            }
        }
        Ok(transaction.commit()?)
    }

    fn failure(&self, error: redb::Error) -> StoreError {
        let error = failure(&self.path, error);
        if matches!(error, StoreError::Corrupt { .. }) {
            mark_damaged(&self.path);
        }
        error
    }
}

impl Store for RedbStore {
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError> {
        let transaction = self.db.begin_read().map_err(|e| self.failure(e.into()))?;
        Ok(Box::new(RedbSnapshot { store: self, transaction }))
    }

    fn commit(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        self.write(&batch, durability).map_err(|e| self.failure(e))
    }

    fn size_bytes(&self) -> u64 {
        std::fs::metadata(&self.path).map_or(0, |m| m.len())
    }
}

struct RedbSnapshot<'a> {
    store: &'a RedbStore,
    transaction: ReadTransaction,
}

impl RedbSnapshot<'_> {
    fn read(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, redb::Error> {
        let open = self.transaction.open_table(definition(table))?;
        Ok(open.get(key)?.map(|value| value.value().to_vec()))
    }

    fn visit(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), redb::Error> {
        let open = self.transaction.open_table(definition(table))?;
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
        self.read(table, key).map_err(|e| self.store.failure(e))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        self.visit(table, from, to, visit).map_err(|e| self.store.failure(e))
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
