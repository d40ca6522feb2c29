//! Which directories' listings the kernel may go on using.
//!
//! A listing that the kernel keeps (`FOPEN_KEEP_CACHE`) is dropped when a
//! change of that directory is announced. That is not enough. An answer that
//! was made before the change may reach the kernel after the announcement: the
//! kernel had nothing to drop then, keeps what the answer says, and takes it for
//! the listing until the next change. And when it turns out that changes were
//! missed, a new epoch makes the kernel look up every name again, but it goes
//! on using the listings.
//!
//! So a listing may be kept only if no answer from before the last change can
//! be in it. After a change it is dropped once more, at an open at which no other
//! handle is open: all answers to earlier handles have reached the kernel then,
//! as it releases a handle only after them. Until such an open it is dropped at
//! each. The same goes for listings of another epoch of the drive, which may have
//! forgotten their cookies.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// More than anybody walks through between two changes; a few MiB. Beyond it all are listed anew.
const MOST: usize = 1 << 16;

/// Directories that are open, or whose listings may be kept.
#[derive(Default)]
pub(crate) struct Listings(Mutex<Listed>);

#[derive(Default)]
struct Listed {
    epoch: u64,
    directories: HashMap<u64, Directory>,
}

#[derive(Default)]
struct Directory {
    handles: HashSet<u64>,
    /// Every answer that the kernel may have, or will get, is from after the last change.
    may_be_kept: bool,
}

impl Listings {
    /// A directory is opened in an epoch of the drive: whether the kernel may use the listing
    /// that it has. Otherwise it drops it now.
    pub(crate) fn open(&self, ino: u64, handle: u64, epoch: u64) -> bool {
        let mut listed = self.lock();
        if listed.epoch != epoch || listed.directories.len() >= MOST {
            listed.epoch = epoch;
            listed.forget_all();
        }
        let directory = listed.directories.entry(ino).or_default();
        let is_kept = directory.may_be_kept;
        directory.may_be_kept |= directory.handles.is_empty();
        directory.handles.insert(handle);
        is_kept
    }

    /// The kernel has released a handle: it has every answer to it.
    pub(crate) fn close(&self, ino: u64, handle: u64) {
        self.lock().update(ino, |directory| {
            directory.handles.remove(&handle);
        });
    }

    /// A directory's listing is another by now.
    pub(crate) fn forget(&self, ino: u64) {
        self.lock().update(ino, |directory| directory.may_be_kept = false);
    }

    /// Changes were missed.
    pub(crate) fn forget_all(&self) {
        self.lock().forget_all();
    }

    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listed {
    fn update(&mut self, ino: u64, update: impl FnOnce(&mut Directory)) {
        let Some(directory) = self.directories.get_mut(&ino) else { return };
        update(directory);
        if directory.is_as_new() {
            self.directories.remove(&ino);
        }
    }

    fn forget_all(&mut self) {
        self.directories.values_mut().for_each(|directory| directory.may_be_kept = false);
        self.directories.retain(|_, directory| !directory.is_as_new());
    }
}

impl Directory {
    fn is_as_new(&self) -> bool {
        self.handles.is_empty() && !self.may_be_kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens and closes a directory.
    fn list(listings: &Listings, ino: u64, epoch: u64) -> bool {
        let is_kept = listings.open(ino, u64::MAX, epoch);
        listings.close(ino, u64::MAX);
        is_kept
    }

    #[test]
    fn only_a_listing_made_since_the_last_miss_is_kept() {
        let listings = Listings::default();
        assert!(!list(&listings, 1, 7));
        assert!(list(&listings, 1, 7) && !list(&listings, 2, 7));
        listings.forget_all();
        assert!(!list(&listings, 1, 7));
        assert!(list(&listings, 1, 7));
        assert!(!list(&listings, 1, 8), "another epoch");
        assert!(list(&listings, 1, 8) && !list(&listings, 2, 8));
    }

    #[test]
    fn an_answer_from_before_a_change_is_never_kept() {
        let listings = Listings::default();
        assert!(!listings.open(1, 10, 0));
        // The answer is made; then the change comes, and then the answer reaches the kernel.
        listings.forget(1);
        assert!(!listings.open(1, 11, 0), "opened before the answer was there, or after");
        assert!(!listings.open(1, 12, 0), "it may have come after the kernel dropped the listing");
        listings.close(1, 10);
        assert!(!listings.open(1, 13, 0), "a listing of which nobody knows how old it is");
        [11, 12, 13].into_iter().for_each(|handle| listings.close(1, handle));
        assert!(!listings.open(1, 14, 0), "dropped, with no answer on its way");
        assert!(listings.open(1, 15, 0));
    }

    #[test]
    fn a_change_of_another_directory_does_no_harm() {
        let listings = Listings::default();
        list(&listings, 1, 0);
        listings.forget(2);
        assert!(list(&listings, 1, 0));
    }

    #[test]
    fn a_handle_that_is_not_known_is_none_of_those_that_are_open() {
        let listings = Listings::default();
        listings.open(1, 10, 0);
        listings.forget(1);
        listings.close(1, 11);
        listings.open(1, 12, 0);
        assert!(!listings.open(1, 13, 0));
    }

    #[test]
    fn their_number_is_bounded() {
        let listings = Listings::default();
        (0..3 * MOST as u64).for_each(|ino| assert!(!list(&listings, ino, 0)));
        assert!(listings.lock().directories.len() <= MOST);
        listings.forget_all();
        assert!(listings.lock().directories.is_empty());
    }
}
