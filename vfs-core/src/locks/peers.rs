//! At the owner: the locks of other devices' programs on this device's files.
//!
//! Each is a real lock on the real file, so that this device's kernel decides between all of
//! them and the programs of this device. It belongs to the connection on which it was asked for
//! last, and dies some time after that ([`LEASE`]): a device that comes back asks again for
//! what its programs still hold.
//!
//! When a version written elsewhere takes a file's place, its locks follow to the new file.

use super::disk::DiskLock;
use super::table::{Held, Holder, Table};
use super::{Action, LockAnswer, LockRequest, Mode};
use crate::content::OwnFiles;
use crate::model::{DeviceId, FileId, LocationId};
use crate::source::FetchError;
use rustix::fs::fstat;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a device's locks outlive its connection.
pub const LEASE: Duration = Duration::from_secs(10);
/// Holders of one device at once; each costs an open file.
pub const MAX_HOLDERS: usize = 256;
/// Ranges that one holder has of one file.
pub const MAX_RANGES: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    device: DeviceId,
    location: LocationId,
    file: FileId,
    holder: Holder,
}

struct PeerLock {
    disk: DiskLock,
    /// What it holds; of this one holder only.
    table: Table,
    connection: u64,
    /// Since when that connection is known to be over.
    over: Option<Instant>,
}

/// What other devices hold of this device's files. Its calls block on the disk.
pub struct PeerLocks {
    own: Arc<OwnFiles>,
    held: Mutex<HashMap<Key, PeerLock>>,
}

impl PeerLocks {
    /// Of these files, where the asking device may see them.
    pub fn new(own: Arc<OwnFiles>) -> Self {
        Self { own, held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Key, PeerLock>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what a device asks on a connection; never waits for a lock.
    ///
    /// # Errors
    /// As for reading: the device may not see the file, it is not there, or the disk is away.
    pub fn answer(
        &self,
        device: DeviceId,
        connection: u64,
        request: &LockRequest,
    ) -> Result<LockAnswer, FetchError> {
        let LockRequest { location, file, holder, .. } = *request;
        let key = Key { device, location, file, holder };
        let mut held = self.held();
        if request.action == Action::Clear && !held.contains_key(&key) {
            return Ok(LockAnswer::Free);
        }
        let of_device = held.keys().filter(|k| k.device == device).count();
        match held.entry(key) {
            Entry::Occupied(mut there) => {
                let answer = there.get_mut().act(request)?;
                there.get_mut().connection = connection;
                there.get_mut().over = None;
                if there.get().table.is_empty() {
                    there.remove();
                }
                Ok(answer)
            }
            Entry::Vacant(_) if of_device >= MAX_HOLDERS => Ok(LockAnswer::TooMany),
            Entry::Vacant(free) => {
                let (table, over) = Default::default();
                let disk = DiskLock::new(self.open(&key)?);
                let mut new = PeerLock { disk, table, connection, over };
                let answer = new.act(request)?;
                if !new.table.is_empty() {
                    free.insert(new);
                }
                Ok(answer)
            }
        }
    }

    /// For writing where the device may: record locks that exclude others need it.
    fn open(&self, key: &Key) -> Result<File, FetchError> {
        self.own.open_to_lock(key.device, (key.location, key.file), true)
    }

    /// Drops what connections that are over left behind, and what the device may not see any
    /// more; lets locks follow their files. To be called often.
    pub fn tend(&self, is_current: impl Fn(DeviceId, u64) -> bool) {
        let now = Instant::now();
        self.held().retain(|key, lock| {
            match is_current(key.device, lock.connection) {
                true => lock.over = None,
                false => _ = lock.over.get_or_insert(now),
            }
            let is_leased = lock.over.is_none_or(|over| now.duration_since(over) < LEASE);
            is_leased && self.follow(key, lock)
        });
    }

    /// Whether the device still may hold it.
    fn follow(&self, key: &Key, lock: &mut PeerLock) -> bool {
        // For reading: closing a file that was open for writing looks like a change of it.
        let there = self.own.open_to_lock(key.device, (key.location, key.file), false);
        let replacement = match there {
            Ok(there) if is_same(&there, lock.disk.file()) => return true,
            Ok(_) => self.open(key),
            Err(error) => Err(error),
        };
        match replacement {
            Ok(there) => {
                lock.move_to(DiskLock::new(there));
                !lock.table.is_empty()
            }
            // Deleted while it is locked, as any file may be; or its disk is away for now.
            Err(FetchError::Refused) => false,
            Err(
                FetchError::Stale
                | FetchError::Unreachable
                | FetchError::NotNow
                | FetchError::Failed(_),
            ) => true,
        }
    }

    /// How many holders there are.
    pub fn len(&self) -> usize {
        self.held().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn is_same(a: &File, b: &File) -> bool {
    matches!((fstat(a), fstat(b)), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

fn failed(error: crate::error::FsError) -> FetchError {
    FetchError::Failed(error.to_string())
}

impl PeerLock {
    fn act(&mut self, request: &LockRequest) -> Result<LockAnswer, FetchError> {
        let LockRequest { holder, span, .. } = *request;
        let mut after = self.table.clone();
        let mode = match request.action {
            Action::Test(mode) => return self.test(request, mode),
            Action::Clear => {
                after.clear(holder, span);
                None
            }
            Action::Set(mode) => {
                after.set(Held { holder, pid: 0, span, mode });
                Some(mode)
            }
        };
        // Also of what is given back: a hole makes two of one.
        if after.iter().count() > MAX_RANGES {
            return Ok(LockAnswer::TooMany);
        }
        if self.disk.set(span, mode).map_err(failed)? {
            self.table = after;
            return Ok(LockAnswer::Free);
        }
        let mode = mode.unwrap_or(Mode::Exclusive);
        match self.test(request, mode)? {
            // Given back just now; or it is a `flock`, of which the kernel does not tell.
            LockAnswer::Free => Ok(LockAnswer::Taken { span, mode }),
            found => Ok(found),
        }
    }

    fn test(&self, request: &LockRequest, mode: Mode) -> Result<LockAnswer, FetchError> {
        let found = self.disk.test(request.span, mode).map_err(failed)?;
        let taken = |h: Held| LockAnswer::Taken { span: h.span, mode: h.mode };
        Ok(found.map_or(LockAnswer::Free, taken))
    }

    /// Takes the same locks on the file that is there now. Those that somebody else was quicker
    /// to take are lost, and the device is told when it asks the next time.
    fn move_to(&mut self, mut disk: DiskLock) {
        let held: Vec<Held> = self.table.iter().copied().collect();
        for lock in held {
            if !matches!(disk.set(lock.span, Some(lock.mode)), Ok(true)) {
                tracing::warn!("a lock of another device is lost: its file was replaced");
                self.table.clear(lock.holder, lock.span);
            }
        }
        self.disk = disk;
    }
}
