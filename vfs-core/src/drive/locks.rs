//! Locks that programs set on open files of the drive.
//!
//! The kernel names the holder: a process (of `fcntl`) or an open file (of `flock`, and of
//! `F_OFD_SETLK`). A process's locks end when it closes any descriptor of the file
//! ([`Drive::unlock_closed`]); all end with the open file that they were set through
//! ([`Drive::unlock_released`]), and with the mount ([`Drive::unlock_all`]).

use super::Drive;
use super::handle::{Handle, is_a_directory};
use super::types::HandleId;
use crate::error::{FsError, FsResult, Kind as ErrorKind};
use crate::locks::{Ask, Held, Holder, Locks, Mode, Place};
use dashmap::DashMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A lock that a program asks for.
#[derive(Clone, Copy, Debug)]
pub struct LockOf {
    /// Through which open file.
    pub handle: HandleId,
    /// What and for whom.
    pub ask: Ask,
}

/// Which locks were set through which open file.
pub(super) struct OfHandles {
    locks: Arc<Locks>,
    set: DashMap<HandleId, (Place, HashSet<Holder>)>,
    /// The mount is gone: nobody gives back what a waiting request would get now.
    is_over: AtomicBool,
}

impl OfHandles {
    pub fn new(locks: Arc<Locks>) -> Self {
        Self { locks, set: DashMap::new(), is_over: AtomicBool::new(false) }
    }
}

impl Drive {
    fn place(&self, handle: HandleId) -> FsResult<Place> {
        // Locks that a handle has set stay where they are, whatever its file is called by now.
        if let Some(set) = self.locks.set.get(&handle) {
            return Ok(set.0.clone());
        }
        match &*self.handles.get(handle)? {
            Handle::Own(open) => {
                let stat = rustix::fs::fstat(&open.file)
                    .map_err(|e| FsError::os("look at a file to lock", e))?;
                Ok(Place::Own {
                    device: stat.st_dev,
                    inode: stat.st_ino,
                    source: Arc::clone(&open.file),
                    writes: open.flags.write || open.flags.append,
                })
            }
            Handle::Remote(open) => {
                let ino = open.ino();
                let location = self.remote.location(ino.location)?;
                let file = self.remote.outbox.view().now(ino.location, ino.file);
                Ok(Place::Remote { owner: location.owner, location: location.id, file })
            }
            Handle::Dir(_) => Err(is_a_directory()),
        }
    }

    /// Locks or unlocks, or says `WouldBlock`. May wait for an owner's answer, not for a lock.
    pub async fn lock(&self, lock: LockOf) -> FsResult<()> {
        let place = self.place(lock.handle)?;
        self.remember(&place, lock);
        match self.locks.locks.set(&place, lock.ask).await? {
            None => Ok(()),
            Some(_) => Err(FsError::new(ErrorKind::WouldBlock, "lock what is locked")),
        }
    }

    /// Waits for a lock until it is there, or `gives_up`: `Interrupted`.
    pub async fn lock_waiting(&self, lock: LockOf, gives_up: impl Fn() -> bool) -> FsResult<()> {
        let place = self.place(lock.handle)?;
        self.remember(&place, lock);
        let is_over = || self.locks.is_over.load(Ordering::Acquire);
        self.locks.locks.wait(&place, lock.ask, || is_over() || gives_up()).await
    }

    /// Before it is set: the kernel releases no file through which a request is under way.
    fn remember(&self, place: &Place, LockOf { handle, ask }: LockOf) {
        if ask.mode.is_some() {
            let new = || (place.clone(), HashSet::new());
            self.locks.set.entry(handle).or_insert_with(new).1.insert(ask.holder);
        }
    }

    /// What keeps a lock from being given.
    pub async fn test_lock(&self, lock: LockOf, mode: Mode) -> FsResult<Option<Held>> {
        let place = self.place(lock.handle)?;
        self.locks.locks.test(&place, lock.ask, mode).await
    }

    /// Whether [`Drive::unlock_closed`] may have something to do.
    pub fn may_be_locked(&self, handle: HandleId) -> bool {
        self.place(handle).is_ok_and(|place| self.locks.locks.knows(&place))
    }

    /// A process closed a descriptor: what it locked of this file, through whatever descriptor,
    /// is free.
    pub async fn unlock_closed(&self, handle: HandleId, holder: Holder) {
        if let Ok(place) = self.place(handle) {
            self.locks.locks.clear(&place, holder).await;
        }
    }

    /// Whether [`Drive::unlock_released`] has something to do.
    pub fn has_locked(&self, handle: HandleId) -> bool {
        self.locks.set.contains_key(&handle)
    }

    /// The open file is gone, with all its descriptors.
    pub async fn unlock_released(&self, handle: HandleId) {
        let Some((_, (place, set))) = self.locks.set.remove(&handle) else { return };
        for holder in set {
            self.locks.locks.clear(&place, holder).await;
        }
    }

    /// The mount is gone.
    pub async fn unlock_all(&self) {
        self.locks.is_over.store(true, Ordering::Release);
        let handles: Vec<_> = self.locks.set.iter().map(|set| *set.key()).collect();
        for handle in handles {
            self.unlock_released(handle).await;
        }
    }
}
