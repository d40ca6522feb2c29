//! A store in memory, for simulations: a crash takes what was not durable, at once.

use super::store::{Batch, Durability, Snapshot, Store, StoreError, Table, Visit};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex};

type Tables = [BTreeMap<Vec<u8>, Vec<u8>>; Table::ALL.len()];

#[derive(Clone, Default)]
struct State {
    now: Arc<Tables>,
    durable: Arc<Tables>,
}

/// A clone is the same store.
#[derive(Clone, Default)]
pub(super) struct MemStore(Arc<Mutex<State>>);

impl MemStore {
    /// What is left when the machine loses its power now.
    pub(super) fn after_crash(&self) -> Self {
        let durable = self.0.lock().unwrap().durable.clone();
        Self(Arc::new(Mutex::new(State { now: durable.clone(), durable })))
    }
}

impl Store for MemStore {
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError> {
        Ok(Box::new(MemSnapshot(self.0.lock().unwrap().now.clone())))
    }

    fn commit(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        let mut state = self.0.lock().unwrap();
        let tables = Arc::make_mut(&mut state.now);
        for table in Table::ALL {
            for (key, value) in batch.changes(table) {
                let rows = &mut tables[table as usize];
                match value {
                    Some(value) => rows.insert(key.clone(), value.clone()),
                    None => rows.remove(key),
                };
            }
        }
        if durability == Durability::Durable {
            state.durable = state.now.clone();
        }
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        0
    }
}

struct MemSnapshot(Arc<Tables>);

impl Snapshot for MemSnapshot {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.0[table as usize].get(key).cloned())
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        if to.is_some_and(|to| to <= from) {
            return Ok(());
        }
        let end = to.map_or(Bound::Unbounded, Bound::Excluded);
        let rows = self.0[table as usize].range::<[u8], _>((Bound::Included(from), end));
        for (key, value) in rows {
            if visit(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }
}
