//! A directory's rows and its disk, side by side.
//!
//! Only reads: [`super::observe`] is what makes rows follow the disk. A disk that is written to
//! is always a little ahead of its rows, so a difference counts only when it is still there
//! some time later, by its [mark](Difference::mark).

use super::key;
use super::observe::{is_directory, is_same_file};
use super::read;
use super::row::{Row, decode};
use super::store::Table;
use super::{Index, IndexError, Observed};
use crate::model::{Attr, Entry, FileId, FileType, LocationNo, Name, Seq};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::ControlFlow;

/// How a row and the disk differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Differs {
    /// The disk has it, and there is no row.
    Unindexed,
    /// The row says something else.
    Changed,
    /// There is a row, and the disk has nothing.
    Vanished,
}

/// A name whose row is not as the disk has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// The name.
    pub name: Name,
    /// What the matter is.
    pub how: Differs,
    /// Of the row and of what the disk has: the same only as long as neither changes.
    pub mark: u64,
}

impl Difference {
    fn new(name: Name, seq: Option<Seq>, now: Option<&Observed>) -> Self {
        let how = match (seq, now) {
            (None, _) => Differs::Unindexed,
            (Some(_), None) => Differs::Vanished,
            (Some(_), Some(_)) => Differs::Changed,
        };
        let mut hasher = DefaultHasher::new();
        (&name, seq, now).hash(&mut hasher);
        Self { name, how, mark: hasher.finish() }
    }
}

/// What a directory's rows and its listing have to do with each other.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Differences {
    /// The subdirectories that both know.
    pub directories: Vec<FileId>,
    /// The names that are not as the disk has them.
    pub found: Vec<Difference>,
}

impl Index {
    /// Compares a directory's rows with its listing.
    pub fn differences(
        &self,
        no: LocationNo,
        dir: FileId,
        mut listing: Vec<Observed>,
    ) -> Result<Differences, IndexError> {
        self.own_location(no)?;
        listing.retain(|found| !self.is_hidden(no, &found.name));
        listing.sort_by(|a, b| a.name.cmp(&b.name));
        let mut listing = listing.into_iter().peekable();
        let mut compared = Differences::default();
        let snapshot = self.store().snapshot()?;
        read::scan_prefix(&*snapshot, Table::Entries, &key::entry(no, dir, b""), &mut |k, v| {
            let name = key::entry_name(k).ok_or(IndexError::DamagedRow("a name"))?;
            while let Some(new) = listing.next_if(|found| found.name < name) {
                compared.found.push(Difference::new(new.name.clone(), None, Some(&new)));
            }
            let now = listing.next_if(|found| found.name == name);
            compared.add(name, &decode(v, "an entry")?, now.as_ref());
            Ok(ControlFlow::Continue(()))
        })?;
        compared
            .found
            .extend(listing.map(|new| Difference::new(new.name.clone(), None, Some(&new))));
        Ok(compared)
    }
}

impl Differences {
    fn add(&mut self, name: Name, row: &Row, now: Option<&Observed>) {
        if !now.is_some_and(|now| is_told(&row.entry, now)) {
            self.found.push(Difference::new(name, Some(row.seq), now));
        }
        if is_directory(&row.entry) && now.is_some_and(|now| is_same_file(&row.entry, now)) {
            self.directories.push(row.entry.file_id);
        }
    }
}

/// Whether the row says what the disk has, but for what no event tells: the blocks, which a file
/// system allots when it likes, and of a file with several names that one of the others came or
/// went, which sets its number of links and its time of change.
fn is_told(entry: &Entry, now: &Observed) -> bool {
    let known = &entry.attr;
    let mut attr = Attr { blocks: known.blocks, ..now.attr };
    if known.file_type != FileType::Directory && (known.nlink > 1 || attr.nlink > 1) {
        (attr.nlink, attr.ctime) = (known.nlink, known.ctime);
    }
    is_same_file(entry, now) && *known == attr && entry.target == now.target
}
