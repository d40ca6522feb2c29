//! A redb file that outlives a failure of its disk.
//!
//! After an error of the disk redb refuses everything until the file is opened
//! anew: what it has in memory may not be what the disk has. So it is opened
//! anew here, at the next call and then with pauses that grow, for as long as
//! the disk fails. What was durable is there again; what the owner of the file
//! committed without waiting for the disk it puts in again before anybody sees
//! the file ([`RedbFile::get`]).

use redb::Database;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Opens or creates the file.
pub(crate) type Opener = Box<dyn Fn() -> Result<Database, redb::Error> + Send + Sync>;

/// A redb file.
pub(crate) struct RedbFile {
    /// For people.
    shown: String,
    opener: Opener,
    state: Mutex<State>,
}

enum State {
    Open(Arc<Database>),
    /// Its disk failed; it is tried again then.
    Failed {
        again_at: Instant,
        pause: Duration,
    },
}

/// Opens a file with so much memory for its pages.
pub(crate) fn opener(path: &Path, cache_bytes: usize) -> Opener {
    let path = path.to_owned();
    Box::new(move || Ok(redb::Builder::new().set_cache_size(cache_bytes).create(&path)?))
}

impl RedbFile {
    pub fn open(path: &Path, opener: Opener) -> Result<Self, redb::Error> {
        let open = State::Open(Arc::new(opener()?));
        Ok(Self { shown: path.display().to_string(), opener, state: Mutex::new(open) })
    }

    /// The open file, to be held for as long as a transaction of it. If it has to be opened anew,
    /// `mend` is done to it first, and it is not open before that succeeds.
    pub fn get(
        &self,
        mend: impl FnOnce(&Database) -> Result<(), redb::Error>,
    ) -> Result<Arc<Database>, redb::Error> {
        let mut state = self.lock();
        let pause = match &*state {
            State::Open(db) => return Ok(Arc::clone(db)),
            State::Failed { again_at, .. } if Instant::now() < *again_at => {
                return Err(redb::Error::PreviousIo);
            }
            State::Failed { pause, .. } => *pause,
        };
        let opened = (self.opener)().and_then(|db| mend(&db).map(|()| Arc::new(db)));
        match opened {
            Ok(db) => {
                tracing::info!(path = self.shown, "its disk works again, and it was opened anew");
                *state = State::Open(Arc::clone(&db));
                Ok(db)
            }
            Err(error) => {
                // Who is still reading what was open before keeps it locked, for a moment.
                let is_in_use = matches!(error, redb::Error::DatabaseAlreadyOpen);
                let pause = if is_in_use { pause } else { (2 * pause).min(LONGEST_PAUSE) };
                tracing::debug!(path = self.shown, %error, "it cannot be opened anew");
                *state = State::Failed { again_at: Instant::now() + pause, pause };
                Err(error)
            }
        }
    }

    /// Whether its disk failed and was not found to work since.
    pub fn has_failed(&self) -> bool {
        matches!(*self.lock(), State::Failed { .. })
    }

    /// A transaction of this file ended so; it is opened anew if its disk failed.
    pub fn met(&self, of: &Arc<Database>, error: &redb::Error) {
        if !matches!(error, redb::Error::Io(_) | redb::Error::PreviousIo) {
            return;
        }
        let mut state = self.lock();
        if matches!(&*state, State::Open(db) if Arc::ptr_eq(db, of)) {
            tracing::error!(path = self.shown, %error, "its disk failed; it is to be opened anew");
            *state = State::Failed { again_at: Instant::now(), pause: FIRST_PAUSE };
        }
    }

    /// What `work` makes of the open file.
    pub fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let db = self.get(|_| Ok(()))?;
        work(&db).inspect_err(|error| self.met(&db, error))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod failing {
    //! A disk that fails when it is told to.

    use super::Opener;
    use redb::backends::FileBackend;
    use redb::{BackendError, StorageBackend};
    use std::io;
    use std::ops::Bound;
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// How often the disk still does what it is asked for; all of it at [`WORKS`].
    #[derive(Clone, Debug)]
    pub(crate) struct Disk(Arc<AtomicU32>);

    const WORKS: u32 = u32::MAX;

    impl Default for Disk {
        fn default() -> Self {
            Self(Arc::new(AtomicU32::new(WORKS)))
        }
    }

    impl Disk {
        /// It does so many more things, and then nothing.
        pub fn fail_after(&self, calls: u32) {
            self.0.store(calls, Ordering::SeqCst);
        }

        pub fn work(&self) {
            self.fail_after(WORKS);
        }

        fn attempt(&self) -> io::Result<()> {
            let left = |left: u32| Some(if left == WORKS { left } else { left.checked_sub(1)? });
            match self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left) {
                Ok(_) => Ok(()),
                Err(_) => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
            }
        }

        pub fn opener(&self, path: &Path) -> Opener {
            let (disk, path) = (self.clone(), path.to_owned());
            Box::new(move || {
                disk.attempt()?;
                let options = std::fs::OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(&path)?;
                let backend = Backend { disk: disk.clone(), file: FileBackend::new(options)? };
                // So that what is read comes from the disk.
                Ok(redb::Builder::new().set_cache_size(64 << 10).create_with_backend(backend)?)
            })
        }
    }

    #[derive(Debug)]
    struct Backend {
        disk: Disk,
        file: FileBackend,
    }

    type Place = Bound<u64>;

    impl StorageBackend for Backend {
        fn len(&self) -> io::Result<u64> {
            self.disk.attempt()?;
            self.file.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.disk.attempt()?;
            self.file.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.disk.attempt()?;
            self.file.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.disk.attempt()?;
            self.file.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.disk.attempt()?;
            self.file.write(offset, data)
        }

        fn close(&self) -> io::Result<()> {
            self.file.close()
        }

        fn try_lock_range(&self, start: Place, end: Place) -> Result<bool, BackendError> {
            self.file.try_lock_range(start, end)
        }

        fn try_lock_shared_range(&self, start: Place, end: Place) -> Result<bool, BackendError> {
            self.file.try_lock_shared_range(start, end)
        }

        fn lock_range(&self, start: Place, end: Place) -> Result<(), BackendError> {
            self.file.lock_range(start, end)
        }

        fn lock_shared_range(&self, start: Place, end: Place) -> Result<(), BackendError> {
            self.file.lock_shared_range(start, end)
        }

        fn unlock_range(&self, start: Place, end: Place) -> Result<(), BackendError> {
            self.file.unlock_range(start, end)
        }

        fn query_lock_range(&self, start: Place, end: Place) -> Result<bool, BackendError> {
            self.file.query_lock_range(start, end)
        }
    }
}
