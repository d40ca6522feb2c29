//! A replica's rows beside those that its owner sends a second time.
//!
//! That a replica is not what its owner stated is told by one sum; where it differs is told only
//! by the rows. Both logs are in the order of their numbers, so they are gone through once, side
//! by side, a lot at a time.

use super::{Index, IndexError, LogRow, read};
use crate::model::{FileId, LocationNo, Name, Seq};
use std::ops::ControlFlow;

/// Rows that are named, of however many differ.
const EXAMPLES: usize = 5;

/// What differs between two logs.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Unlike {
    /// Places of the log at which they have different rows, or only one of them has one. Tombstones
    /// do not count: each device drops them in its own time.
    pub rows: u64,
    /// Some of them: the directory and the name in it.
    pub examples: Vec<(FileId, Name)>,
}

impl Unlike {
    fn add_row(&mut self, row: &LogRow) {
        if row.entry.is_some() {
            self.add(row.parent, &row.name);
        }
    }

    fn add(&mut self, parent: FileId, name: &Name) {
        self.rows += 1;
        let is_named = self.examples.iter().any(|(dir, named)| (*dir, named) == (parent, name));
        if self.examples.len() < EXAMPLES && !is_named {
            self.examples.push((parent, name.clone()));
        }
    }
}

impl Index {
    /// Compares a replica's rows in a part of the log, after one number and up to another, with
    /// those that another device has there, and adds to what was found.
    pub fn compare_log(
        &self,
        no: LocationNo,
        (after, upto): (Seq, Seq),
        theirs: &[LogRow],
        found: &mut Unlike,
    ) -> Result<(), IndexError> {
        let snapshot = self.store().snapshot()?;
        let mut theirs = theirs.iter().peekable();
        read::log_range(&*snapshot, no, after, upto, &mut |seq, parent, name| {
            while let Some(lacking) = theirs.next_if(|row| row.seq < seq) {
                found.add_row(lacking);
            }
            let other = theirs.next_if(|row| row.seq == seq);
            let here = match read::row(&*snapshot, no, parent, name.as_bytes()) {
                Ok(row) => row.filter(|row| row.seq == seq).map(|row| row.entry),
                // Whatever it was, it is not that.
                Err(IndexError::DamagedRow(_)) => {
                    found.add(parent, &name);
                    return Ok(ControlFlow::Continue(()));
                }
                Err(error) => return Err(error),
            };
            let here = here.map(|entry| LogRow { seq, parent, name, entry: Some(entry) });
            let there = other.filter(|row| row.entry.is_some());
            if there != here.as_ref()
                && let Some(row) = there.or(here.as_ref())
            {
                found.add_row(row);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        theirs.for_each(|lacking| found.add_row(lacking));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{hashed_row, log_row, name, replica};
    use super::*;

    #[test]
    fn rows_that_only_one_of_two_has_or_has_otherwise_are_found() {
        let f = replica();
        let rows: Vec<_> = (1..=6).map(hashed_row).collect();
        f.index.apply_replica(f.no, 9, rows.clone(), Seq(6)).unwrap();
        let compare = |parts: &[(u64, u64, &[LogRow])]| {
            let mut found = Unlike::default();
            for (after, upto, theirs) in parts {
                f.index.compare_log(f.no, (Seq(*after), Seq(*upto)), theirs, &mut found).unwrap();
            }
            found
        };
        assert_eq!(compare(&[(0, 3, &rows[..3]), (3, 6, &rows[3..])]), Unlike::default());
        let mut theirs = rows.clone();
        // Another version, one that is gone, one that is not here.
        theirs[1].entry = hashed_row(99).entry;
        theirs[3].entry = None;
        theirs.remove(4);
        theirs.push(log_row(7, FileId::ROOT, "more", hashed_row(7).entry));
        let found = compare(&[(0, 3, &theirs[..3]), (3, 7, &theirs[3..])]);
        let names = ["2", "4", "5", "more"].map(|text| (FileId::ROOT, name(text)));
        assert_eq!(found, Unlike { rows: 4, examples: names.into() });
        // A name that is gone, which only one of them still remembers.
        let gone = vec![log_row(7, FileId::ROOT, "gone", None)];
        assert_eq!(compare(&[(0, 6, &rows), (6, 7, &gone)]).rows, 0);
        assert_eq!(compare(&[(0, 6, &[])]).rows, 6);
        assert_eq!(compare(&[(0, 6, &[])]).examples.len(), EXAMPLES);
    }
}
