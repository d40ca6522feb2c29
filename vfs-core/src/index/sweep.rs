//! Removal of rows that nothing leads to any more.
//!
//! A directory that lost its name is first an orphan: its rows stay, because it may
//! have been moved to where no scan was yet. A sweep *dooms* it, which it never
//! undoes, and removes the rows in it, a bounded number a commit; its subdirectories
//! are doomed in turn. Replicas learn of it by one more tombstone, for the name
//! `<file id>` below [`ROOT_PARENT`], which says "this directory is gone for good":
//! with the rows themselves no tombstones are needed, and a replica that was told of
//! the lost name alone does not remove what may yet get another name.

use super::key;
use super::read;
use super::row::{Orphan, decode, encode};
use super::store::{Snapshot, Table};
use super::tx::{Place, Tx};
use super::{Index, IndexError, ROOT_PARENT};
use crate::model::{FileId, FileType, LocationNo, Name};
use std::ops::ControlFlow;

/// Rows removed in one commit.
const COMMIT_ROWS: usize = 2048;

impl Index {
    /// Removes at most about `limit` rows of what lost its name and did not get one again, in
    /// any location; returns how many, 0 when there are none. Call it when no scan is under
    /// way: a file that moved to a directory not yet scanned again would lose its id.
    pub fn sweep_orphans(&self, limit: usize) -> Result<usize, IndexError> {
        self.sweep(limit, b"")
    }

    /// The same for one location.
    pub fn sweep_location(&self, no: LocationNo, limit: usize) -> Result<usize, IndexError> {
        self.sweep(limit, &key::location(no))
    }

    fn sweep(&self, limit: usize, prefix: &[u8]) -> Result<usize, IndexError> {
        let mut swept = 0;
        while swept < limit {
            let budget = COMMIT_ROWS.min(limit - swept);
            let removed = self.write(|tx| self.sweep_some(tx, prefix, budget))?;
            if removed == 0 {
                break;
            }
            swept += removed;
        }
        Ok(swept)
    }

    fn sweep_some(
        &self,
        tx: &mut Tx<'_>,
        prefix: &[u8],
        budget: usize,
    ) -> Result<usize, IndexError> {
        let mut removed = 0;
        for (no, file, orphan) in self.orphans(tx, prefix, budget)? {
            if removed >= budget {
                break;
            }
            let mut sweep = Sweep { tx, no, own: self.is_own(no), left: budget - removed };
            removed += sweep.orphan(file, orphan)?;
        }
        Ok(removed)
    }

    /// The first orphans of locations that are not being removed.
    fn orphans(
        &self,
        tx: &Tx<'_>,
        prefix: &[u8],
        limit: usize,
    ) -> Result<Vec<(LocationNo, FileId, Orphan)>, IndexError> {
        let mut found = Vec::new();
        read::scan_prefix(tx, Table::Orphans, prefix, &mut |key, value| {
            let location = key::first_location(key).ok_or(IndexError::DamagedRow("an orphan"))?;
            let file = key::last_file(key).ok_or(IndexError::DamagedRow("an orphan"))?;
            if self.location(location).is_some() {
                found.push((location, file, decode(value, "an orphan")?));
            }
            Ok(if found.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok(found)
    }

    fn is_own(&self, no: LocationNo) -> bool {
        self.location(no).is_some_and(|l| l.owner == self.me())
    }
}

/// The name below [`ROOT_PARENT`] whose tombstone says that a directory is gone for good.
pub(super) fn gone_name(dir: FileId) -> Name {
    Name::new(dir.0.to_string().into_bytes()).expect("digits are a valid name")
}

/// Reads [`gone_name`].
pub(super) fn gone_directory(name: &Name) -> Option<FileId> {
    let id = std::str::from_utf8(name.as_bytes()).ok()?.parse().ok()?;
    let id = FileId(id);
    let valid = id.0 > FileId::ROOT.0 && id.0 < FileId::LIMIT && gone_name(id) == *name;
    valid.then_some(id)
}

/// What a replica does when it is told so.
pub(super) fn doom_replica(tx: &mut Tx<'_>, no: LocationNo, dir: FileId) {
    tx.batch.put(Table::Orphans, key::file(no, dir), encode(&Orphan::Doomed));
}

/// Removes at most about `limit` rows of doomed directories of a replica, in this commit.
pub(super) fn sweep_replica(
    tx: &mut Tx<'_>,
    no: LocationNo,
    limit: usize,
) -> Result<(), IndexError> {
    let mut left = limit;
    while left > 0 {
        let doomed = read::keys(tx, Table::Orphans, &key::location(no), 1)?.pop();
        let Some(dir) = doomed.and_then(|key| key::last_file(&key)) else { break };
        let removed = Sweep { tx, no, own: false, left }.doomed(dir)?;
        left = left.saturating_sub(removed);
    }
    Ok(())
}

struct Sweep<'t, 's> {
    tx: &'t mut Tx<'s>,
    no: LocationNo,
    own: bool,
    left: usize,
}

impl Sweep<'_, '_> {
    fn orphan(&mut self, file: FileId, orphan: Orphan) -> Result<usize, IndexError> {
        match orphan {
            Orphan::Lost(entry) if entry.attr.file_type == FileType::Directory => {
                self.doom(file, entry.disk_ino)?;
                self.doomed(file)
            }
            Orphan::Lost(entry) => {
                self.forget_inode(file, entry.disk_ino)?;
                self.tx.batch.delete(Table::Orphans, key::file(self.no, file));
                Ok(1)
            }
            Orphan::Doomed => self.doomed(file),
        }
    }

    /// From here on the directory never gets its id back.
    fn doom(&mut self, dir: FileId, disk_ino: u64) -> Result<(), IndexError> {
        self.forget_inode(dir, disk_ino)?;
        self.tx.batch.put(Table::Orphans, key::file(self.no, dir), encode(&Orphan::Doomed));
        let prefix = key::entry(self.no, dir, b"");
        let knows = |table| read::keys(self.tx, table, &prefix, 1).map(|k| !k.is_empty());
        // Of a directory that has neither, no replica can have rows.
        if knows(Table::Entries)? || knows(Table::Tombstones)? {
            let seq = self.tx.next_seq(self.no)?;
            let name = gone_name(dir);
            self.tx.bury(Place { no: self.no, parent: ROOT_PARENT, name: &name }, seq)?;
        }
        Ok(())
    }

    /// Another file may have the inode by now.
    fn forget_inode(&mut self, file: FileId, disk_ino: u64) -> Result<(), IndexError> {
        if read::file_on_disk(self.tx, self.no, disk_ino)? == Some(file) {
            self.tx.batch.delete(Table::Disk, key::disk(self.no, disk_ino));
        }
        Ok(())
    }

    /// Removes rows of a doomed directory, and itself once it is empty.
    fn doomed(&mut self, dir: FileId) -> Result<usize, IndexError> {
        let prefix = key::entry(self.no, dir, b"");
        let rows = read::keys(self.tx, Table::Entries, &prefix, self.left)?;
        let tombstones = read::keys(self.tx, Table::Tombstones, &prefix, self.left - rows.len())?;
        for key in &rows {
            self.erase(dir, key)?;
        }
        let removed = rows.len() + tombstones.len();
        for key in tombstones {
            let seq = self.tx.get(Table::Tombstones, &key)?;
            self.tx.erase_tombstone(self.no, key, &seq.unwrap_or_default())?;
        }
        if removed < self.left {
            self.tx.batch.delete(Table::Orphans, key::file(self.no, dir));
        }
        Ok(removed.max(1))
    }

    fn erase(&mut self, dir: FileId, key: &[u8]) -> Result<(), IndexError> {
        let name = key::entry_name(key).ok_or(IndexError::DamagedRow("a name"))?;
        let place = Place { no: self.no, parent: dir, name: &name };
        let Some(row) = self.tx.row(place)? else { return Ok(()) };
        self.tx.erase_row(place, &row)?;
        let entry = row.entry;
        if !self.own || self.tx.has_name(self.no, entry.file_id)? {
            return Ok(());
        }
        match entry.attr.file_type {
            FileType::Directory => self.doom(entry.file_id, entry.disk_ino),
            _ => self.forget_inode(entry.file_id, entry.disk_ino),
        }
    }
}
