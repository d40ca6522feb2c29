//! What every operation needs at once and is small: the locations and their states.
//!
//! A copy of what the store has, changed after each commit under the writer's lock;
//! readers never wait for a writer that is at the disk.

use super::row::State;
use crate::model::{Location, LocationId, LocationNo, Seq};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

#[derive(Default)]
pub(super) struct Memory(RwLock<Inner>);

#[derive(Default)]
struct Inner {
    locations: BTreeMap<LocationNo, Arc<Location>>,
    states: BTreeMap<LocationNo, State>,
    /// Of replicas: the log, and up to where they were last whole.
    wholes: BTreeMap<LocationNo, (u64, Seq)>,
}

impl Memory {
    fn read<R>(&self, f: impl FnOnce(&Inner) -> R) -> R {
        f(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        f(&mut self.0.write().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn locations(&self) -> Vec<Arc<Location>> {
        self.read(|m| m.locations.values().cloned().collect())
    }

    pub(super) fn location(&self, no: LocationNo) -> Option<Arc<Location>> {
        self.read(|m| m.locations.get(&no).cloned())
    }

    pub(super) fn location_by_id(&self, id: LocationId) -> Option<Arc<Location>> {
        self.read(|m| m.locations.values().find(|l| l.id == id).cloned())
    }

    pub(super) fn state(&self, no: LocationNo) -> Option<State> {
        self.read(|m| m.states.get(&no).cloned())
    }

    pub(super) fn put_location(&self, location: Arc<Location>) {
        self.write(|m| m.locations.insert(location.no, location));
    }

    /// The location has another number from now on; at no time it has none or two.
    pub(super) fn renumber(&self, old: LocationNo, renewed: Arc<Location>) {
        self.write(|m| {
            m.locations.remove(&old);
            m.states.remove(&old);
            m.wholes.remove(&old);
            m.locations.insert(renewed.no, renewed);
        });
    }

    pub(super) fn put_states(&self, states: BTreeMap<LocationNo, State>) {
        self.write(|m| m.states.extend(states));
    }

    pub(super) fn whole(&self, no: LocationNo) -> Option<(u64, Seq)> {
        self.read(|m| m.wholes.get(&no).copied())
    }

    pub(super) fn put_whole(&self, no: LocationNo, log_id: u64, upto: Seq) {
        self.write(|m| m.wholes.insert(no, (log_id, upto)));
    }

    pub(super) fn forget_whole(&self, no: LocationNo) {
        self.write(|m| m.wholes.remove(&no));
    }

    pub(super) fn remove(&self, no: LocationNo) {
        self.write(|m| (m.locations.remove(&no), m.states.remove(&no), m.wholes.remove(&no)));
    }
}
