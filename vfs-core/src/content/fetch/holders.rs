//! Who has the bytes in a location, by what was opened and by the index.

use super::supply::Supply;
use super::{Failure, Fetcher};
use crate::content::lock;
use crate::index::IndexError;
use crate::model::{ContentId, DeviceId, FileId, LocationId};
use crate::source::Version;
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
    pub(super) version: Version,
    /// A handle was opened on it; the others have the same content, says the index.
    pub(super) opened: bool,
    /// In its cache, says the device; `version` is where this device knows it from.
    pub(super) lends: bool,
    /// It can give a range without reading all of the file first.
    pub(super) is_ready: bool,
    pub(super) supply: Arc<Supply>,
    /// The round trip to it when it was looked up; none, if that is not known.
    pub(super) rtt: Duration,
}

/// How a holder is known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Is {
    Opened,
    Indexed,
    Lender { is_ready: bool },
}

/// What tells a holder from the others: the file, and whether that is in a location.
pub(super) type HolderId = (DeviceId, LocationId, FileId, bool);

impl Holder {
    pub(super) fn id(&self) -> HolderId {
        (self.device, self.version.location, self.version.file, self.lends)
    }
}

impl Fetcher {
    pub(super) fn holder(&self, device: DeviceId, version: Version, is: Is) -> Holder {
        let rtt = self.content.source.rtt(device).unwrap_or_default();
        let supply = self.content.supply_of(device);
        let lends = matches!(is, Is::Lender { .. });
        let is_ready = is != Is::Lender { is_ready: false };
        Holder { device, version, opened: is == Is::Opened, lends, is_ready, supply, rtt }
    }

    /// Who may have the bytes, the nearest first.
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

    /// Blocks on the index.
    fn look_up(&self) -> Vec<Holder> {
        let me = self.content.index.me();
        let mut holders = lock(&self.versions).clone();
        match self.id.map(|id| self.indexed_holders(id)) {
            Some(Ok(indexed)) => holders.extend(indexed),
            Some(Err(e)) => tracing::warn!("holders could not be looked up: {e}"),
            None => {}
        }
        let mut seen = HashSet::new();
        holders.retain(|holder| seen.insert((holder.id(), holder.version.stamp)));
        // This device's own, the owners as opened, then the others; of each device one before
        // another one of any, so that a silent device costs its patience once.
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
            let entry = node.entry;
            if entry.content == Some(id) && entry.attr.size == self.size {
                let (location, device) = (location.id, location.owner);
                let version = Version { location, file, stamp: entry.stamp(), content: Some(id) };
                holders.push(self.holder(device, version, Is::Indexed));
            }
        }
        Ok(holders)
    }
}
