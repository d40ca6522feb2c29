//! Who has the bytes in a location, by what was opened and by the index.

use super::supply::Supply;
use super::{Failure, Fetcher};
use crate::content::lock;
use crate::index::IndexError;
use crate::model::{ContentId, DeviceId, FileId, LocationId};
use crate::source::{Version, Wanted};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How many holders are considered: a common small file may be in thousands of places.
pub(super) const MAX_HOLDERS: usize = 32;
/// How many of them are one other device's: one that lists the bytes often but is silent must
/// not crowd out those that answer.
const MAX_HOLDERS_EACH: usize = 2;
/// How long the holders found in the index are not looked up again.
const LOOK_UP_AFTER: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) struct Holder {
    pub(super) device: DeviceId,
    pub(super) at: Place,
    pub(super) supply: Arc<Supply>,
}

/// Where a holder has the bytes.
#[derive(Clone)]
pub(super) enum Place {
    /// In a location. `is_opened`: a handle was opened on it; that another one has the same bytes
    /// is what the index says.
    Location { version: Version, is_opened: bool },
    /// In its cache, says the device. `is_ready`: it can give a range without reading all of the
    /// file first.
    Cache { wanted: Wanted, is_ready: bool },
}

/// What tells a holder from the others: the file in a location; none is the device's cache.
pub(super) type HolderId = (DeviceId, Option<(LocationId, FileId)>);

impl Holder {
    pub(super) fn id(&self) -> HolderId {
        (self.device, self.version().map(|version| (version.location, version.file)))
    }

    /// What it has in a location.
    pub(super) fn version(&self) -> Option<&Version> {
        match &self.at {
            Place::Location { version, .. } => Some(version),
            Place::Cache { .. } => None,
        }
    }

    pub(super) fn is_opened(&self) -> bool {
        matches!(self.at, Place::Location { is_opened: true, .. })
    }

    pub(super) fn is_lender(&self) -> bool {
        matches!(self.at, Place::Cache { .. })
    }

    pub(super) fn is_ready(&self) -> bool {
        !matches!(self.at, Place::Cache { is_ready: false, .. })
    }

    /// Notes whether its tree is there. Whether that is news.
    pub(super) fn set_ready(&mut self, now: bool) -> bool {
        match &mut self.at {
            Place::Location { .. } => false,
            Place::Cache { is_ready, .. } => std::mem::replace(is_ready, now) != now,
        }
    }
}

impl Fetcher {
    pub(super) fn holder(&self, device: DeviceId, at: Place) -> Holder {
        Holder { device, at, supply: self.content.supply_of(device) }
    }

    /// The round trip to a device as it is now; none, if that is not known.
    pub(super) fn rtt(&self, device: DeviceId) -> Duration {
        self.content.source.rtt(device).unwrap_or_default()
    }

    /// Who may have the bytes: in a location, in the order of [`Self::look_up`], then in a cache.
    pub(super) async fn holders(self: &Arc<Self>) -> Result<Vec<Holder>, Failure> {
        let known = lock(&self.holders).clone();
        let known = known.filter(|(at, _)| at.elapsed() < LOOK_UP_AFTER);
        let mut holders = match known {
            Some((_, holders)) => holders,
            None => {
                let this = self.clone();
                let found = self.content.runtime.spawn_blocking(move || this.look_up()).await;
                let found = found.map_err(|_| Failure::Postponed)?;
                *lock(&self.holders) = Some((Instant::now(), found.clone()));
                found
            }
        };
        holders.extend(self.lenders.borrow().holders.iter().cloned());
        let liars = lock(&self.liars);
        holders.retain(|holder| !liars.contains(&holder.id()));
        Ok(holders)
    }

    /// Who has the bytes in a location. Blocks on the index.
    fn look_up(&self) -> Vec<Holder> {
        let me = self.content.index.me();
        let mut holders = lock(&self.versions).clone();
        match self.id.map(|id| self.indexed_holders(id)) {
            Some(Ok(indexed)) => holders.extend(indexed),
            Some(Err(e)) => tracing::warn!("holders could not be looked up: {e}"),
            None => {}
        }
        let mut seen = HashSet::new();
        holders.retain(|holder| seen.insert((holder.device, holder.version().cloned())));
        // This device's own come first, then one place of each device, as opened or else as the
        // index has it, then the second ones and so on. That decides who is left out when there
        // are too many, and who of equals is asked first.
        let mut of_device: HashMap<DeviceId, usize> = HashMap::new();
        let mut place = |holder: &Holder| {
            let count = of_device.entry(holder.device).or_default();
            *count += 1;
            (holder.device != me, *count)
        };
        let mut placed: Vec<_> = holders.into_iter().map(|h| (place(&h), h)).collect();
        placed.sort_by_key(|(place, _)| *place);
        let mut holders: Vec<_> = placed.into_iter().map(|(_, holder)| holder).collect();
        holders.truncate(MAX_HOLDERS);
        holders
    }

    fn indexed_holders(&self, id: ContentId) -> Result<Vec<Holder>, IndexError> {
        let index = &self.content.index;
        let view = index.view()?;
        let mut holders = Vec::new();
        let mut of_device: HashMap<DeviceId, usize> = HashMap::new();
        for (no, file) in view.holders(id)? {
            let Some(location) = index.location(no) else { continue };
            let count = of_device.entry(location.owner).or_default();
            *count += 1;
            if *count > MAX_HOLDERS_EACH && location.owner != index.me() {
                continue;
            }
            let Some(node) = view.node(no, file)? else { continue };
            if node.entry.has(id, self.size) {
                let version = Version::of(location.id, &node.entry);
                let at = Place::Location { version, is_opened: false };
                holders.push(self.holder(location.owner, at));
            }
        }
        Ok(holders)
    }
}
