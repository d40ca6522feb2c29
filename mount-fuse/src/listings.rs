//! Which directories' listings the kernel may go on using.
//!
//! A listing that the kernel keeps (`FOPEN_KEEP_CACHE`) is dropped when a
//! change of that directory is announced. When it turns out that changes were
//! missed, a new epoch makes the kernel look up every name again, but it goes
//! on using the listings. So keeping one is allowed only to directories that
//! were listed since the last such event; all others are listed anew at their
//! next use. The same goes for listings of another epoch of the drive, which may
//! have forgotten their cookies.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// More than anybody walks through between two changes; 2 MiB. Beyond it all are listed anew.
const MOST: usize = 1 << 16;

/// Directories that were listed since changes were last missed.
#[derive(Default)]
pub(crate) struct Listings(Mutex<Listed>);

#[derive(Default)]
struct Listed {
    epoch: u64,
    directories: HashSet<u64>,
}

impl Listings {
    /// A directory is opened in an epoch of the drive: whether the listing that the kernel may
    /// have is still right.
    pub(crate) fn open(&self, ino: u64, epoch: u64) -> bool {
        let mut listed = self.lock();
        if listed.epoch != epoch || listed.directories.len() >= MOST {
            listed.epoch = epoch;
            listed.directories.clear();
        }
        !listed.directories.insert(ino)
    }

    /// Changes were missed.
    pub(crate) fn forget_all(&self) {
        self.lock().directories.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listing_made_since_the_last_miss_is_kept() {
        let listings = Listings::default();
        assert!(!listings.open(1, 7));
        assert!(listings.open(1, 7) && !listings.open(2, 7));
        listings.forget_all();
        assert!(!listings.open(1, 7));
        assert!(listings.open(1, 7));
        assert!(!listings.open(1, 8), "another epoch");
        assert!(listings.open(1, 8) && !listings.open(2, 8));
    }

    #[test]
    fn their_number_is_bounded() {
        let listings = Listings::default();
        (0..3 * MOST as u64).for_each(|ino| assert!(!listings.open(ino, 0)));
        assert!(listings.lock().directories.len() <= MOST);
    }
}
