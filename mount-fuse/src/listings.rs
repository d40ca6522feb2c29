//! Which directories' listings the kernel may go on using.
//!
//! A listing that the kernel keeps (`FOPEN_KEEP_CACHE`) is dropped when a
//! change of that directory is announced. When it turns out that changes were
//! missed, a new epoch makes the kernel look up every name again, but it goes
//! on using the listings. So keeping one is allowed only to directories that
//! were listed since the last such event; all others are listed anew at their
//! next use.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// More than anybody walks through between two changes; 2 MiB. Beyond it all are listed anew.
const MOST: usize = 1 << 16;

/// Directories that were listed since changes were last missed.
#[derive(Default)]
pub(crate) struct Listings(Mutex<HashSet<u64>>);

impl Listings {
    /// A directory is opened: whether the listing that the kernel may have is still right.
    pub(crate) fn open(&self, ino: u64) -> bool {
        let mut listed = self.lock();
        if listed.len() >= MOST {
            listed.clear();
        }
        !listed.insert(ino)
    }

    /// Changes were missed.
    pub(crate) fn forget_all(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listing_made_since_the_last_miss_is_kept() {
        let listings = Listings::default();
        assert!(!listings.open(1));
        assert!(listings.open(1) && !listings.open(2));
        listings.forget_all();
        assert!(!listings.open(1));
        assert!(listings.open(1));
    }

    #[test]
    fn their_number_is_bounded() {
        let listings = Listings::default();
        (0..3 * MOST as u64).for_each(|ino| assert!(!listings.open(ino)));
        assert!(listings.lock().len() <= MOST);
    }
}
