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
