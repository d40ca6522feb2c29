//! Names that this device itself changed: looked at now, without waiting for the watcher.

use super::place::{Place, lock};
use super::scan::SWEEP_DELAY;
use super::{Core, Indexer};
use crate::error::{FsResult, Kind};
use crate::index::Sighting;
use crate::local::observe_at;
use crate::model::{ContentId, Entry, FileId, FileType, LocationNo, Name, Seq, Stamp};
use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::os::fd::{AsFd, OwnedFd};

/// A name to look at.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    /// The directory.
    pub dir: FileId,
    /// The name in it.
    pub name: Name,
    /// The hash of the version with this stamp, where it is known.
    pub content: Option<(Stamp, ContentId)>,
}

impl Indexer {
    /// Looks at names and records what they have, together; `between` runs after the look,
    /// while nobody else looks at these directories. Gives the rows in the order of `looks`,
    /// and the number of the last change.
    pub(crate) fn look_now(
        &self,
        no: LocationNo,
        looks: &[Look],
        between: impl FnOnce(),
    ) -> FsResult<(Vec<Option<Entry>>, Seq)> {
        let place = self.core.known_place(no)?;
        self.core.look_now(&place, looks, between)
    }

    /// Brings the row of one name up to date.
    pub(crate) fn refresh(&self, no: LocationNo, dir: FileId, name: &Name) -> FsResult<()> {
        self.core.refresh(&*self.core.known_place(no)?, dir, name)
    }

    /// Runs `change` while nobody looks at the directories: nothing half done is recorded.
    pub(crate) fn unobserved<R>(
        &self,
        no: LocationNo,
        dirs: &[FileId],
        change: impl FnOnce() -> R,
    ) -> FsResult<R> {
        let place = self.core.known_place(no)?;
        let _orders = place.orders(dirs.iter().copied());
        Ok(change())
    }
}

impl Core {
    fn look_now(
        &self,
        place: &Place,
        looks: &[Look],
        between: impl FnOnce(),
    ) -> FsResult<(Vec<Option<Entry>>, Seq)> {
        let orders = place.orders(looks.iter().map(|look| look.dir));
        let mut sightings = self.sight(place, looks)?;
        between();
        // What appeared goes first, so that a rename never leaves a file without a name.
        sightings.sort_by_key(|(_, sighting)| sighting.now.is_none());
        let (places, sightings): (Vec<_>, Vec<_>) = sightings.into_iter().unzip();
        let (rows, seq) = self.index.observe_entries(place.no, sightings)?;
        drop(orders);
        let mut found = vec![None; looks.len()];
        for (at, row) in places.into_iter().zip(rows) {
            self.follow_up(place, row.as_ref());
            found[at] = row;
        }
        Ok((found, seq))
    }

    fn sight(&self, place: &Place, looks: &[Look]) -> FsResult<Vec<(usize, Sighting)>> {
        let root = place.root()?;
        let mut open: HashMap<FileId, Option<OwnedFd>> = HashMap::new();
        let mut sightings = Vec::with_capacity(looks.len());
        for (at, look) in looks.iter().enumerate() {
            let handle = match open.entry(look.dir) {
                Slot::Occupied(known) => known.into_mut(),
                Slot::Vacant(new) => new.insert(match self.open_handle(place, &root, look.dir) {
                    Err(e) if super::scan::is_gone(&e) => None,
                    opened => Some(opened?),
                }),
            };
            // A directory that moved or went meanwhile: the watcher follows it.
            let Some(handle) = handle else { continue };
            let now = match observe_at(handle.as_fd(), &look.name) {
                Ok(found) => Some(found),
                Err(e) if e.kind() == Kind::NotFound => None,
                Err(e) => return Err(e),
            };
            let Look { dir, name, content } = look.clone();
            sightings.push((at, Sighting { dir, name, now, content }));
        }
        place.confirm(&root)?;
        Ok(sightings)
    }

    fn follow_up(&self, place: &Place, row: Option<&Entry>) {
        match row {
            Some(entry) if entry.attr.file_type == FileType::Directory => {
                self.look_into(place, entry.file_id);
            }
            Some(entry) if entry.attr.file_type == FileType::File && entry.content.is_none() => {
                lock(&place.hash).changed(entry.file_id);
                self.hash_work.notify();
            }
            Some(_) => {}
            None => place.sweep_after(SWEEP_DELAY),
        }
    }
}
