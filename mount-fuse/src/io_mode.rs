//! Which kind of I/O the kernel does on each open inode: passthrough or cached.
//!
//! The kernel keeps one mode per inode for as long as any handle of it is open
//! (`fs/fuse/iomode.c`): while it is open with passthrough, an open in another
//! mode or with another backing id fails with `EIO`, and the reverse. So the
//! first handle decides, every further one follows it, and the mode is free
//! again when the last handle was released. All handles of an inode share one
//! backing id, which lives until then.
//!
//! A handle counts here from before the kernel is answered until its RELEASE
//! is processed, which the kernel sends only after it has done its own
//! accounting; so this table never believes an inode idle that the kernel
//! holds open. RELEASE comes at `close`, even when a shared mapping of a
//! passthrough file lives on: that mapping is of the backing file and no
//! concern of this table.
//!
//! An inode is its number *and* its generation, to the kernel as here: when a number comes
//! again after many versions of a file, the old version may still be open under it.
//!
//! Generic over the backing id, so that the rule can be tested without a kernel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfs_core::drive::HandleId;

/// Opens of different inodes do not wait for each other's registration with the kernel.
const SHARDS: usize = 16;

/// What the kernel is to be told about one open.
pub(crate) enum IoMode<B> {
    /// Reads and writes come to the daemon, through the page cache.
    Cached,
    /// The kernel reads and writes the backing file itself.
    Passthrough(Arc<B>),
}

impl<B> Clone for IoMode<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Cached => Self::Cached,
            Self::Passthrough(backing) => Self::Passthrough(Arc::clone(backing)),
        }
    }
}

struct OpenInode<B> {
    mode: IoMode<B>,
    handles: usize,
}

/// Some of the inodes, by number and generation.
struct Shard<B> {
    open: HashMap<(u64, u64), OpenInode<B>>,
    /// The generation that each handle has open: the kernel does not tell it at the end.
    generations: HashMap<HandleId, u64>,
}

impl<B> Default for Shard<B> {
    fn default() -> Self {
        Self { open: HashMap::new(), generations: HashMap::new() }
    }
}

/// The modes of all open inodes.
pub(crate) struct IoModes<B> {
    shards: [Mutex<Shard<B>>; SHARDS],
}

impl<B> Default for IoModes<B> {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl<B> IoModes<B> {
    /// Counts one more handle of `ino` and says how it must be opened.
    ///
    /// `register` is asked for a backing id only when the inode is not open yet;
    /// `None` means that this open cannot be passed through.
    pub(crate) fn open(
        &self,
        ino: u64,
        generation: u64,
        handle: HandleId,
        register: impl FnOnce() -> Option<B>,
    ) -> IoMode<B> {
        let mut shard = self.shard(ino);
        let mode = match shard.open.entry((ino, generation)) {
            Entry::Occupied(mut open) => {
                let open = open.get_mut();
                open.handles += 1;
                open.mode.clone()
            }
            Entry::Vacant(idle) => {
                let mode = match register() {
                    Some(backing) => IoMode::Passthrough(Arc::new(backing)),
                    None => IoMode::Cached,
                };
                idle.insert(OpenInode { mode, handles: 1 }).mode.clone()
            }
        };
        shard.generations.insert(handle, generation);
        mode
    }

    /// Counts one handle less; after the last one the mode is free and the backing id is gone.
    pub(crate) fn close(&self, ino: u64, handle: HandleId) {
        let mut shard = self.shard(ino);
        let Some(generation) = shard.generations.remove(&handle) else { return };
        let Entry::Occupied(mut open) = shard.open.entry((ino, generation)) else { return };
        open.get_mut().handles -= 1;
        if open.get().handles == 0 {
            open.remove();
        }
    }

    fn shard(&self, ino: u64) -> MutexGuard<'_, Shard<B>> {
        // A panic while it is held is in `register`, before anything was changed.
        self.shards[ino as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(mode: &IoMode<u32>) -> Option<u32> {
        match mode {
            IoMode::Cached => None,
            IoMode::Passthrough(id) => Some(**id),
        }
    }

    fn never() -> Option<u32> {
        panic!("an open inode is not registered again")
    }

    /// One program after the other opens and closes inodes.
    struct Opens {
        modes: IoModes<u32>,
        last: u64,
    }

    impl Opens {
        fn new() -> Self {
            Self { modes: IoModes::default(), last: 0 }
        }

        fn open(&mut self, ino: u64, register: impl FnOnce() -> Option<u32>) -> Option<u32> {
            self.open_version(ino, 0, register)
        }

        fn open_version(
            &mut self,
            ino: u64,
            generation: u64,
            register: impl FnOnce() -> Option<u32>,
        ) -> Option<u32> {
            self.last += 1;
            backing(&self.modes.open(ino, generation, HandleId(self.last), register))
        }

        fn close(&self, ino: u64, handle: u64) {
            self.modes.close(ino, HandleId(handle));
        }
    }

    #[test]
    fn handles_of_one_inode_share_one_backing() {
        let mut opens = Opens::new();
        assert_eq!(opens.open(1, || Some(7)), Some(7));
        assert_eq!(opens.open(1, never), Some(7));
        assert_eq!(opens.open(2, || Some(8)), Some(8));
    }

    #[test]
    fn a_number_that_comes_again_does_not_share_with_the_old_version() {
        let mut opens = Opens::new();
        assert_eq!(opens.open_version(1, 3, || Some(7)), Some(7));
        assert_eq!(opens.open_version(1, 3 + 256, || Some(8)), Some(8));
        opens.close(1, 1);
        assert_eq!(opens.open_version(1, 3 + 256, never), Some(8));
        assert_eq!(opens.open_version(1, 3, || Some(9)), Some(9), "the old one was closed");
    }

    #[test]
    fn an_inode_open_cached_stays_cached() {
        let mut opens = Opens::new();
        assert_eq!(opens.open(1, || None), None);
        assert_eq!(opens.open(1, never), None);
        opens.close(1, 1);
        assert_eq!(opens.open(1, never), None);
    }

    #[test]
    fn the_mode_is_free_after_the_last_close() {
        let mut opens = Opens::new();
        let held = opens.modes.open(1, 0, HandleId(100), || Some(7));
        assert_eq!(opens.open(1, never), Some(7));
        opens.close(1, 100);
        assert_eq!(opens.open(1, never), Some(7));
        opens.close(1, 1);
        opens.close(1, 2);
        assert_eq!(opens.open(1, || None), None);
        opens.close(1, 3);
        assert_eq!(opens.open(1, || Some(9)), Some(9));
        assert_eq!(backing(&held), Some(7));
    }

    #[test]
    fn the_backing_is_dropped_with_the_last_handle() {
        let modes = IoModes::default();
        let token = Arc::new(());
        let kept = Arc::clone(&token);
        drop(modes.open(1, 0, HandleId(1), move || Some(kept)));
        assert_eq!(Arc::strong_count(&token), 2);
        modes.close(1, HandleId(1));
        assert_eq!(Arc::strong_count(&token), 1);
    }

    #[test]
    fn a_release_without_an_open_changes_nothing() {
        let mut opens = Opens::new();
        opens.close(1, 1);
        assert_eq!(opens.open(1, || Some(7)), Some(7));
        opens.close(1, 99);
        assert_eq!(opens.open(1, never), Some(7));
    }

    #[test]
    fn a_failed_registration_leaves_the_inode_idle() {
        let mut opens = Opens::new();
        let attempt = std::panic::AssertUnwindSafe(|| opens.open(1, || panic!("on purpose")));
        assert!(std::panic::catch_unwind(attempt).is_err());
        assert_eq!(opens.open(1, || Some(7)), Some(7));
    }
}
