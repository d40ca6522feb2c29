//! Queries, on one consistent state.

use super::compact;
use super::key;
use super::observe::root_name;
use super::read;
use super::row::{Row, State, decode};
use super::store::{Snapshot, Table};
use super::{Index, IndexError, LogRow, Node, ROOT_PARENT};
use crate::model::{ContentId, Entry, FileId, LocationNo, Name, Seq};
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

/// The longest path that is followed, in components. Deeper ones exist only where somebody
/// made a point of it; a cycle from a bad peer ends here.
const DEPTH_MAX: usize = 4096;
/// Names of one file that are tried for a path.
const NAMES_TRIED: usize = 16;
/// Holders of the same bytes that are given of one location.
const HOLDERS_EACH: usize = 4;
/// What a row costs a message beside its name and target, about.
const ROW_BYTES: usize = 160;
/// Rows of one answer, whatever their size.
const LOG_ROWS_MAX: usize = 65_536;

/// Where a device begins to read a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Begin {
    /// Of this log.
    pub log_id: u64,
    /// After this place: after 0, if what the device has is another log, more than there is of
    /// it, or so old that tombstones which it does not know of are gone. What it has is to be
    /// emptied then.
    pub after: Seq,
    pub(super) floor: Seq,
}

/// One consistent state of the index.
pub struct View<'a> {
    index: &'a Index,
    snapshot: Box<dyn Snapshot + 'a>,
}

impl<'a> View<'a> {
    pub(super) fn new(index: &'a Index) -> Result<Self, IndexError> {
        Ok(Self { index, snapshot: index.store().snapshot()? })
    }

    pub(super) fn snapshot(&self) -> &dyn Snapshot {
        &*self.snapshot
    }

    /// What a name refers to.
    pub fn entry(
        &self,
        no: LocationNo,
        parent: FileId,
        name: &[u8],
    ) -> Result<Option<Entry>, IndexError> {
        Ok(read::row(&*self.snapshot, no, parent, name)?.map(|row| row.entry))
    }

    /// The file that had this inode of the owner's disk when last seen.
    pub fn file_on_disk(&self, no: LocationNo, ino: u64) -> Result<Option<FileId>, IndexError> {
        if let Some(file) = read::file_on_disk(&*self.snapshot, no, ino)? {
            return Ok(Some(file));
        }
        // Files are told from each other by their inodes; the location's folder is told by more.
        let root = self.entry(no, ROOT_PARENT, root_name().as_bytes())?;
        Ok(root.filter(|root| root.disk_ino == ino).map(|root| root.file_id))
    }

    /// A file, with any one of its names.
    pub fn node(&self, no: LocationNo, file: FileId) -> Result<Option<Node>, IndexError> {
        let name = read::names(&*self.snapshot, no, file, 1)?.pop();
        let Some((parent, name)) = name else { return Ok(None) };
        let entry = self.entry(no, parent, name.as_bytes())?;
        Ok(entry.map(|entry| Node { parent, name, entry }))
    }

    /// At most `limit` names of a file, with their directories.
    pub fn names(
        &self,
        no: LocationNo,
        file: FileId,
        limit: usize,
    ) -> Result<Vec<(FileId, Name)>, IndexError> {
        read::names(&*self.snapshot, no, file, limit)
    }

    /// The entries of a directory after a name, in byte order of their names.
    pub fn children(
        &self,
        no: LocationNo,
        parent: FileId,
        after: Option<&Name>,
        visit: &mut dyn FnMut(&Name, &Entry) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        // The first bytes after this name: names have no NUL.
        let from = after.map_or_else(Vec::new, |after| [after.as_bytes(), &[0]].concat());
        self.children_from(no, parent, &from, visit)
    }

    /// The entries of a directory whose names are not below these bytes, in byte order.
    pub fn children_from(
        &self,
        no: LocationNo,
        parent: FileId,
        from: &[u8],
        visit: &mut dyn FnMut(&Name, &Entry) -> ControlFlow<()>,
    ) -> Result<(), IndexError> {
        let end = key::after_prefix(&key::entry(no, parent, b""));
        let start = key::entry(no, parent, from);
        read::scan_range(&*self.snapshot, Table::Entries, &start, end.as_deref(), &mut |k, v| {
            let name = key::entry_name(k).ok_or(IndexError::DamagedRow("a name"))?;
            Ok(visit(&name, &decode::<Row>(v, "an entry")?.entry))
        })
    }

    /// The path of a file below the location's folder, whose own path is empty; `None` when
    /// it has no name that leads there.
    pub fn path(&self, no: LocationNo, file: FileId) -> Result<Option<Vec<Name>>, IndexError> {
        if file == FileId::ROOT {
            return Ok(Some(Vec::new()));
        }
        // A hard link may have names in a directory that was lost, and others.
        for (parent, name) in read::names(&*self.snapshot, no, file, NAMES_TRIED)? {
            if let Some(path) = self.path_of_name(no, parent, name)? {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    fn path_of_name(
        &self,
        no: LocationNo,
        mut parent: FileId,
        name: Name,
    ) -> Result<Option<Vec<Name>>, IndexError> {
        let mut path = vec![name];
        while parent != FileId::ROOT {
            if path.len() == DEPTH_MAX {
                return Ok(None);
            }
            let Some(up) = read::names(&*self.snapshot, no, parent, 1)?.pop() else {
                return Ok(None);
            };
            parent = up.0;
            path.push(up.1);
        }
        path.reverse();
        Ok(Some(path))
    }

    /// What a path below the location's folder refers to.
    pub fn resolve(&self, no: LocationNo, path: &[Name]) -> Result<Option<Entry>, IndexError> {
        let mut found = self.entry(no, ROOT_PARENT, root_name().as_bytes())?;
        for name in path {
            let Some(dir) = found else { return Ok(None) };
            found = self.entry(no, dir.file_id, name.as_bytes())?;
        }
        Ok(found)
    }

    /// Files that have these bytes, a few of each location: one owner may have listed the
    /// same bytes a million times.
    pub fn holders(&self, content: ContentId) -> Result<Vec<(LocationNo, FileId)>, IndexError> {
        let mut found = Vec::new();
        let mut from = LocationNo(0);
        loop {
            let end = key::after_prefix(&content.0);
            let mut few = self.first_holders(content, from, end)?;
            let Some((no, _)) = few.first() else { break };
            from = LocationNo(no.0 + 1);
            found.append(&mut few);
        }
        // The rows of a removed location go bit by bit.
        found.retain(|(no, _)| self.index.location(*no).is_some());
        Ok(found)
    }

    /// Files of one location that have these bytes, a few.
    pub fn holders_in(
        &self,
        no: LocationNo,
        content: ContentId,
    ) -> Result<Vec<FileId>, IndexError> {
        let end = key::after_prefix(&key::content_in(content, no));
        let few = self.first_holders(content, no, end)?;
        Ok(few.into_iter().map(|(_, file)| file).collect())
    }

    /// Of the first location from this one on that has any, before the key `end`.
    fn first_holders(
        &self,
        content: ContentId,
        from: LocationNo,
        end: Option<Vec<u8>>,
    ) -> Result<Vec<(LocationNo, FileId)>, IndexError> {
        let start = key::content(content, from, FileId(0));
        let mut few: Vec<(LocationNo, FileId)> = Vec::new();
        let mut take = |k: &[u8]| {
            let no = key::content_location(k).ok_or(IndexError::DamagedRow("a holder"))?;
            let file = key::last_file(k).ok_or(IndexError::DamagedRow("a holder"))?;
            if few.first().is_some_and(|(first, _)| *first != no) {
                return Ok(ControlFlow::Break(()));
            }
            few.push((no, file));
            let more = few.len() < HOLDERS_EACH;
            Ok(if more { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        };
        let (snapshot, end) = (&*self.snapshot, end.as_deref());
        read::scan_range(snapshot, Table::Content, &start, end, &mut |k, _| take(k))?;
        Ok(few)
    }

    /// Where the rows of this log begin for a device that has those of `log_id` up to `after`.
    pub fn resume_at(&self, no: LocationNo, log_id: u64, after: Seq) -> Result<Begin, IndexError> {
        let state = self.state(no)?;
        let floor = compact::floor(self.snapshot(), no)?;
        let is_known = log_id == state.log_id && (floor..=state.head).contains(&after);
        let after = if is_known { after } else { Seq(0) };
        Ok(Begin { log_id: state.log_id, after, floor })
    }

    /// Whether tombstones went since the log was begun to be read that belong after a place: then
    /// it is to be begun anew.
    pub fn is_compacted(
        &self,
        no: LocationNo,
        begin: &Begin,
        after: Seq,
    ) -> Result<bool, IndexError> {
        Ok(compact::floor(self.snapshot(), no)? > begin.floor.max(after))
    }

    /// Rows of the log after a place, about `max_bytes` of them but at least one, and up to
    /// where they reach; the same place when there is nothing more.
    ///
    /// Makes the rows durable here first, if they are not: what another device knows of this
    /// one must not be forgotten by a crash. So it may wait for the disk.
    pub fn log_after(
        &self,
        no: LocationNo,
        after: Seq,
        max_bytes: usize,
    ) -> Result<(Vec<LogRow>, Seq), IndexError> {
        if self.index.0.relaxed.load(Ordering::Acquire) {
            self.index.flush()?;
        }
        let limit = log_limit(max_bytes);
        let places = read::log_places(&*self.snapshot, no, after, Seq(u64::MAX), limit)?;
        let limited = places.len() == limit;
        let mut rows = Vec::with_capacity(places.len());
        let mut bytes = 0;
        for (seq, parent, name) in places {
            let row = self.log_row(no, seq, parent, name)?;
            bytes += size_estimate(&row);
            if bytes > max_bytes && !rows.is_empty() {
                let upto = rows.last().map_or(after, |row: &LogRow| row.seq);
                return Ok((rows, upto));
            }
            rows.push(row);
        }
        let last = rows.last().map_or(after, |row| row.seq);
        // What was swept has left holes, also at the end.
        let upto = if limited { last } else { last.max(self.state(no)?.head) };
        Ok((rows, upto))
    }

    fn state(&self, no: LocationNo) -> Result<State, IndexError> {
        let state = self.snapshot.get(Table::Meta, &key::state(no))?;
        state.map_or_else(|| Ok(State::default()), |state| decode(&state, "a location's state"))
    }

    /// The row of a place in the log: what has another place by now, or none, is gone here.
    fn log_row(
        &self,
        no: LocationNo,
        seq: Seq,
        parent: FileId,
        name: Name,
    ) -> Result<LogRow, IndexError> {
        let row = read::row(&*self.snapshot, no, parent, name.as_bytes())?;
        let entry = row.filter(|row| row.seq == seq).map(|row| row.entry);
        Ok(LogRow { seq, parent, name, entry })
    }
}

fn log_limit(max_bytes: usize) -> usize {
    (max_bytes / ROW_BYTES).clamp(1, LOG_ROWS_MAX)
}

fn size_estimate(row: &LogRow) -> usize {
    let target = row.entry.as_ref().and_then(|e| e.target.as_ref()).map_or(0, |t| t.len());
    ROW_BYTES + row.name.as_bytes().len() + target
}
