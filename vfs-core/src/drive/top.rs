//! The two upper levels: the root with one directory per device, and in each one per location.
//!
//! They are on no disk. Names come from the library and the index, which peers
//! fill: what is no file name, or stands twice in one directory, gets a name
//! that is one and stands once.

use super::inode::RemoteIno;
use super::types::{Found, InodeNo};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Index;
use crate::indexer::Indexer;
use crate::library::Library;
use crate::model::{Attr, DeviceId, FileType, Location, Name, Time};
use std::collections::HashSet;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

/// Short, so that a renamed device needs no invalidation of names that nobody remembers;
/// asking again costs one lookup a second.
pub(super) const VALID_FOR: Duration = Duration::from_secs(1);

/// Synthesized directories.
pub(super) struct Top {
    pub index: Index,
    pub indexer: Arc<Indexer>,
    pub library: Arc<Library>,
    pub uid: u32,
    pub gid: u32,
}

/// A device as its directory shows it.
struct Device {
    id: DeviceId,
    since: Time,
}

impl Top {
    /// The device directories.
    pub fn devices(&self) -> Vec<(Name, InodeNo)> {
        let members = self.library.with(|s| {
            let mut members: Vec<_> = s.active().map(|m| (m.name.clone(), m.id)).collect();
            members.sort_by_key(|(_, id)| *id);
            members
        });
        distinct(members).into_iter().map(|(name, id)| (name, InodeNo::of_device(id))).collect()
    }

    /// The location directories of a device.
    pub fn locations(&self, device: InodeNo) -> FsResult<Vec<(Name, InodeNo)>> {
        let device = self.device(device)?;
        let mut locations = self.index.locations();
        locations.retain(|l| l.owner == device.id);
        locations.sort_by_key(|l| l.id);
        let named = locations.into_iter().map(|l| (l.name.clone(), Labelled(l))).collect();
        Ok(distinct(named).into_iter().map(|(name, l)| (name, self.folder(&l.0))).collect())
    }

    /// The folder of a location: live from the disk while it is there, else from the index.
    fn folder(&self, location: &Location) -> InodeNo {
        let is_live = location.owner == self.index.me() && self.indexer.root(location.no).is_ok();
        match is_live {
            true => InodeNo::own_root(location.no),
            false => RemoteIno::root(location.no).no(),
        }
    }

    /// The names that lead from the root to a location's folder, and the folder's number.
    pub fn way_to(&self, location: &Location) -> Option<([Name; 2], InodeNo)> {
        let (folder, device) = (self.folder(location), InodeNo::of_device(location.owner));
        let named = |entries: Vec<(Name, InodeNo)>, ino| {
            entries.into_iter().find_map(|(name, n)| (n == ino).then_some(name))
        };
        let location = named(self.locations(device).ok()?, folder)?;
        Some(([named(self.devices(), device)?, location], folder))
    }

    fn device(&self, ino: InodeNo) -> FsResult<Device> {
        self.library
            .with(|s| {
                let member = s.active().find(|m| InodeNo::of_device(m.id) == ino)?;
                Some(Device { id: member.id, since: time_of(member.stamp.wall_ms) })
            })
            .ok_or_else(|| FsError::new(Kind::Stale, "use a device that is no member"))
    }

    /// The number that a name of the root has.
    pub fn device_named(&self, name: &[u8]) -> FsResult<InodeNo> {
        find(self.devices(), name)
    }

    /// The number that a name of a device's directory has.
    pub fn location_named(&self, device: InodeNo, name: &[u8]) -> FsResult<InodeNo> {
        find(self.locations(device)?, name)
    }

    pub fn getattr_root(&self) -> Found {
        let since = self.library.with(|s| s.active().map(|m| m.stamp.wall_ms).max());
        self.found(InodeNo::ROOT, time_of(since.unwrap_or(0)), self.devices().len())
    }

    pub fn getattr_device(&self, ino: InodeNo) -> FsResult<Found> {
        let since = self.device(ino)?.since;
        Ok(self.found(ino, since, self.locations(ino)?.len()))
    }

    /// A directory whose content is not known yet.
    pub fn placeholder(&self, ino: InodeNo) -> Found {
        self.found(ino, Time::default(), 0)
    }

    fn found(&self, ino: InodeNo, changed: Time, directories: usize) -> Found {
        let attr = Attr {
            file_type: FileType::Directory,
            perm: 0o555,
            uid: self.uid,
            gid: self.gid,
            nlink: u32::try_from(directories).unwrap_or(u32::MAX).saturating_add(2),
            size: 0,
            blocks: 0,
            mtime: changed,
            ctime: changed,
            btime: Some(changed),
            rdev: 0,
        };
        Found { ino, generation: 0, attr, atime: changed, valid_for: VALID_FOR }
    }

    /// The names of a location and its device, for people.
    pub fn names_of(&self, location: &Location) -> (String, String) {
        let device = self.library.with(|s| s.member(location.owner).map(|m| m.name.clone()));
        (device.unwrap_or_else(|| location.owner.to_string()), location.name.clone())
    }

    /// The name of a device.
    pub fn name_of_device(&self, ino: InodeNo) -> Option<String> {
        self.library
            .with(|s| s.active().find(|m| InodeNo::of_device(m.id) == ino).map(|m| m.name.clone()))
    }
}

fn find(entries: Vec<(Name, InodeNo)>, name: &[u8]) -> FsResult<InodeNo> {
    let found = entries.into_iter().find(|(n, _)| n.as_bytes() == name);
    found.map(|(_, ino)| ino).ok_or_else(|| FsError::new(Kind::NotFound, "look up a name"))
}

fn time_of(wall_ms: u64) -> Time {
    let secs = i64::try_from(wall_ms / 1000).unwrap_or(i64::MAX);
    Time { secs, nanos: (wall_ms % 1000) as u32 * 1_000_000 }
}

struct Labelled(Arc<Location>);

impl Display for Labelled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.id.fmt(f)
    }
}

/// Every item under a file name of its own, derived from its label and, if need be, its id.
/// The same items in the same order always get the same names.
fn distinct<T: Display>(labelled: Vec<(String, T)>) -> Vec<(Name, T)> {
    let mut taken = HashSet::new();
    let mut named = Vec::with_capacity(labelled.len());
    for (label, item) in labelled {
        let id = item.to_string();
        let candidates = [label.clone(), format!("{label} ({})", &id[..8]), id];
        let free = candidates
            .into_iter()
            .filter_map(|c| Name::new(c.into_bytes()))
            .find(|c| !taken.contains(c));
        // A full id is a file name, and nobody else's.
        let Some(name) = free else { continue };
        taken.insert(name.clone());
        named.push((name, item));
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_a_name_of_its_own() {
        let id = |byte| DeviceId([byte; 32]);
        let labelled = vec![
            ("laptop".to_owned(), id(1)),
            ("laptop".to_owned(), id(2)),
            ("a/b".to_owned(), id(3)),
            ("..".to_owned(), id(4)),
        ];
        let names: Vec<_> =
            distinct(labelled).iter().map(|(n, _)| n.display().into_owned()).collect();
        let full = |byte: u8| format!("{byte:02x}").repeat(32);
        assert_eq!(
            names,
            ["laptop".to_owned(), "laptop (02020202)".into(), full(3), ".. (04040404)".into()]
        );
    }
}
