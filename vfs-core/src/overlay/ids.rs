//! Files that their owners call otherwise than this device did first.
//!
//! A new file has an id that this device drew, and programs have it open under the number made of
//! that id. Its owner may have the same file already, with an id of its own: from then on
//! everything here names it so, but for the inode number, which stays.

use crate::model::FileId;
use std::collections::HashMap;

/// How many are remembered; programs that still have a forgotten one open find it stale.
const MAX: usize = 65_536;

/// Of one location.
#[derive(Debug, Default)]
pub(super) struct Ids {
    now: HashMap<FileId, FileId>,
    first: HashMap<FileId, FileId>,
}

impl Ids {
    pub fn is_empty(&self) -> bool {
        self.now.is_empty()
    }

    pub fn rename(&mut self, old: FileId, new: FileId) {
        if self.now.len() >= MAX {
            *self = Self::default();
        }
        let first = self.first.remove(&old).unwrap_or(old);
        self.now.values_mut().filter(|now| **now == old).for_each(|now| *now = new);
        self.now.insert(old, new);
        self.now.remove(&new);
        if first != new {
            self.first.insert(new, first);
        }
    }

    /// What the owner calls it.
    pub fn now(&self, file: FileId) -> FileId {
        self.now.get(&file).copied().unwrap_or(file)
    }

    /// What this device called it first.
    pub fn first(&self, file: FileId) -> FileId {
        self.first.get(&file).copied().unwrap_or(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWN: FileId = FileId(9);

    #[test]
    fn a_file_has_its_first_number_whatever_its_owner_calls_it() {
        let mut ids = Ids::default();
        for (old, new) in [(9, 5), (5, 6), (6, 7)] {
            ids.rename(FileId(old), FileId(new));
            assert_eq!((ids.now(DRAWN), ids.now(FileId(old))), (FileId(new), FileId(new)));
            assert_eq!((ids.now(FileId(new)), ids.first(FileId(new))), (FileId(new), DRAWN));
            assert_eq!(ids.now(FileId(5)), FileId(new));
        }
        assert_eq!((ids.now(FileId(1)), ids.first(FileId(1))), (FileId(1), FileId(1)));
    }

    #[test]
    fn one_that_gets_its_first_id_again_is_as_it_was() {
        let mut ids = Ids::default();
        ids.rename(DRAWN, FileId(5));
        ids.rename(FileId(5), DRAWN);
        assert_eq!((ids.now(DRAWN), ids.first(DRAWN)), (DRAWN, DRAWN));
        assert_eq!(ids.now(FileId(5)), DRAWN);
    }

    #[test]
    fn as_many_as_an_owner_likes_take_no_more_than_the_bound() {
        let mut ids = Ids::default();
        (1..3 * MAX as u64).for_each(|n| ids.rename(FileId(2 * n), FileId(2 * n + 1)));
        assert!(ids.now.len() <= MAX && ids.first.len() <= MAX);
    }
}
