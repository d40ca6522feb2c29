//! What this device itself is about to put on its disks.
//!
//! Whoever sees a new inode first, the watcher, a scan or the one who made it, must give it
//! the same id; and a name that exists for a moment only is to be seen by nobody. Both are
//! known here before the disk shows them, and forgotten soon after. Nothing of it is
//! durable: [`crate::apply`] notes what a crash may leave, and says it again at the start.

use super::Index;
use crate::model::{FileId, LocationNo, Name};
use std::collections::{HashMap, HashSet};
use std::sync::{PoisonError, RwLock};

/// Inodes whose id is decided, and names that are hidden.
#[derive(Default)]
pub(super) struct Expected {
    files: RwLock<HashMap<(LocationNo, u64), FileId>>,
    hidden: RwLock<HashSet<(LocationNo, Name)>>,
}

impl Expected {
    pub(super) fn file(&self, no: LocationNo, disk_ino: u64) -> Option<FileId> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        files.get(&(no, disk_ino)).copied()
    }

    pub(super) fn is_hidden(&self, no: LocationNo, name: &Name) -> bool {
        let hidden = self.hidden.read().unwrap_or_else(PoisonError::into_inner);
        !hidden.is_empty() && hidden.contains(&(no, name.clone()))
    }
}

impl Index {
    /// The inode of the location's disk, wherever it appears, is this file: a new one, or the
    /// next version of one that has a row at the place where it appears.
    pub fn expect(&self, no: LocationNo, disk_ino: u64, file: FileId) {
        let mut files = self.0.expected.files.write().unwrap_or_else(PoisonError::into_inner);
        files.insert((no, disk_ino), file);
    }

    /// The file that the inode was said to be.
    pub fn expected(&self, no: LocationNo, disk_ino: u64) -> Option<FileId> {
        self.0.expected.file(no, disk_ino)
    }

    /// Ends [`Self::expect`].
    pub fn unexpect(&self, no: LocationNo, disk_ino: u64) {
        let mut files = self.0.expected.files.write().unwrap_or_else(PoisonError::into_inner);
        files.remove(&(no, disk_ino));
    }

    /// An entry of exactly this name, in any directory of the location, is never in the index.
    pub fn hide(&self, no: LocationNo, name: Name) {
        let mut hidden = self.0.expected.hidden.write().unwrap_or_else(PoisonError::into_inner);
        hidden.insert((no, name));
    }

    /// Ends [`Self::hide`]. What has the name then is seen by the next look at it.
    pub fn unhide(&self, no: LocationNo, name: &Name) {
        let mut hidden = self.0.expected.hidden.write().unwrap_or_else(PoisonError::into_inner);
        hidden.remove(&(no, name.clone()));
    }

    /// Whether the name is hidden.
    pub fn is_hidden(&self, no: LocationNo, name: &Name) -> bool {
        self.0.expected.is_hidden(no, name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ME, check_invariants, location, name, observed, open};
    use super::super::{Index, Sighting};
    use crate::model::{ContentId, FileId, FileType, LocationNo, Stamp, Time};
    use crate::ops::DRAWN_FILE_ID;

    const DRAWN: FileId = FileId(DRAWN_FILE_ID | 42);

    fn fixture() -> (tempfile::TempDir, Index, LocationNo) {
        let folder = tempfile::tempdir().unwrap();
        let index = open(folder.path(), ME);
        let no = index.put_location(location(ME)).unwrap().no;
        index.observe_root(no, &observed("x", 1, FileType::Directory)).unwrap();
        (folder, index, no)
    }

    #[test]
    fn whoever_sees_an_expected_inode_first_gives_it_the_same_id() {
        let (_folder, index, no) = fixture();
        index.expect(no, 10, DRAWN);
        let seen = observed("a", 10, FileType::File);
        let listed = index.observe_directory(no, FileId::ROOT, vec![seen.clone()]);
        assert_eq!(listed.unwrap(), []);
        let now = index.observe_entry(no, FileId::ROOT, &name("a"), Some(seen)).unwrap().unwrap();
        assert_eq!((now.file_id, now.generation), (DRAWN, 1));
        index.unexpect(no, 10);
        let moved = observed("b", 10, FileType::File);
        let moved = index.observe_entry(no, FileId::ROOT, &name("b"), Some(moved)).unwrap();
        assert_eq!(moved.unwrap().file_id, DRAWN, "known by its inode from now on");
        check_invariants(&index, no);
        assert!(index.is_file_known(no, DRAWN).unwrap());
    }

    #[test]
    fn an_id_that_is_taken_is_not_given_twice() {
        let (_folder, index, no) = fixture();
        for (ino, text) in [(10, "a"), (11, "b")] {
            index.expect(no, ino, DRAWN);
            let seen = observed(text, ino, FileType::File);
            index.observe_entry(no, FileId::ROOT, &name(text), Some(seen)).unwrap();
        }
        let view = index.view().unwrap();
        let id =
            |text: &str| view.entry(no, FileId::ROOT, text.as_bytes()).unwrap().unwrap().file_id;
        assert_eq!(id("a"), DRAWN);
        assert!(id("b").0 < DRAWN_FILE_ID);
        check_invariants(&index, no);
    }

    #[test]
    fn the_next_version_is_another_inode_of_the_same_file() {
        let (_folder, index, no) = fixture();
        let old = observed("a", 10, FileType::File);
        let old = index.observe_entry(no, FileId::ROOT, &name("a"), Some(old)).unwrap().unwrap();
        index.set_content(no, old.file_id, &old.stamp(), ContentId::of(b"old")).unwrap();
        index.expect(no, 11, old.file_id);
        let new = observed("a", 11, FileType::File);
        let sighting = Sighting {
            dir: FileId::ROOT,
            name: name("a"),
            content: Some((new.stamp(), ContentId::of(b"new"))),
            now: Some(new.clone()),
        };
        // The watcher first, then the one who wrote it.
        index.observe_entry(no, FileId::ROOT, &name("a"), Some(new)).unwrap();
        let (rows, seq) = index.observe_entries(no, vec![sighting]).unwrap();
        let row = rows[0].clone().unwrap();
        assert_eq!((row.file_id, row.disk_ino), (old.file_id, 11));
        assert_eq!(row.generation, old.generation + 1);
        assert_eq!(row.content, Some(ContentId::of(b"new")));
        assert_eq!(seq, index.head(no));
        assert!(index.view().unwrap().holders(ContentId::of(b"old")).unwrap().is_empty());
        check_invariants(&index, no);
        // The old inode, seen elsewhere, is another file.
        let other = observed("b", 10, FileType::File);
        let other = index.observe_entry(no, FileId::ROOT, &name("b"), Some(other)).unwrap();
        assert_ne!(other.unwrap().file_id, old.file_id);
        check_invariants(&index, no);
    }

    #[test]
    fn hidden_names_have_no_rows() {
        let (_folder, index, no) = fixture();
        let hidden = name(".hidden");
        index.hide(no, hidden.clone());
        let listing =
            vec![observed("a", 10, FileType::File), observed(".hidden", 11, FileType::File)];
        index.observe_directory(no, FileId::ROOT, listing).unwrap();
        let seen = observed(".hidden", 11, FileType::File);
        let row = index.observe_entry(no, FileId::ROOT, &hidden, Some(seen.clone())).unwrap();
        assert_eq!((row, index.counts(no).entries), (None, 1));
        index.unhide(no, &hidden);
        let row = index.observe_entry(no, FileId::ROOT, &hidden, Some(seen)).unwrap();
        assert!(row.is_some());
        check_invariants(&index, no);
    }

    #[test]
    fn a_look_into_a_directory_that_is_gone_is_passed_over() {
        let (_folder, index, no) = fixture();
        let stamp = Stamp { disk_ino: 1, size: 0, mtime: Time::default(), ctime: Time::default() };
        let sighting = Sighting {
            dir: FileId(99),
            name: name("a"),
            now: Some(observed("a", 10, FileType::File)),
            content: Some((stamp, ContentId::of(b""))),
        };
        let (rows, _) = index.observe_entries(no, vec![sighting]).unwrap();
        assert_eq!(rows, [None]);
    }

    #[test]
    fn ids_of_an_index_made_anew_are_not_those_of_the_one_before() {
        let ids = || {
            let (_folder, index, no) = fixture();
            let seen = observed("a", 10, FileType::File);
            let row = index.observe_entry(no, FileId::ROOT, &name("a"), Some(seen)).unwrap();
            row.unwrap().file_id
        };
        assert_ne!(ids(), ids());
    }
}
