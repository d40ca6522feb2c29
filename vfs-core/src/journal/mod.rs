//! A durable, ordered log of records, which are bytes to it.
//!
//! Owns its directory: segments `<number>.log` that make up the log, `spare-<n>` that it grows
//! by, `damaged/` with copies of what could not be read, `lock`. The format is in docs/FORMAT.md.
//!
//! | module | what it is |
//! |---|---|
//! | `disk` | the directory, behind a seam |
//! | `record` | how records and segments look |
//! | `log` | writing: segments, spares |
//! | `recover` | reading after a crash or with damage |
//!
//! **Speed.** Segments are allocated and zeroed before they are used, and used again after a
//! checkpoint, so that a sync writes data and nothing of the file system's own. One sync serves
//! all who wait for one.
//!
//! **What a crash may lose.** Of the process: nothing that [`Journal::append`] returned for. Of
//! the machine: what no [`Journal::sync`] returned for; and then a tail of the log, never
//! something in its middle.
//!
//! **A full disk.** One spare segment is kept for [`Journal::append_reserved`], so that what
//! lets space be freed can be written.
//!
//! **A disk that failed to sync** may have dropped what it was given and will not say so again.
//! Nothing is called durable after that, until a checkpoint has written everything anew.

mod disk;
mod log;
mod record;
mod recover;

#[cfg(test)]
pub(crate) mod sim;
#[cfg(test)]
mod tests;

use crate::error::{FsError, FsResult, Kind};
use crate::failpoint::fail_point;
use disk::{Directory, LogDisk};
use log::{Log, Pool, Space};
use recover::Checkpoint;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// The longest record, in bytes.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

/// Bytes of a segment: what a sync of a new one costs, and what a full disk leaves for
/// [`Journal::append_reserved`].
const SEGMENT_BYTES: u64 = 4 << 20;

/// The number of a record: grows by one or more from each to the next, for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Lsn(pub u64);

/// What a journal held when it was opened.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Its records, in order.
    pub records: Vec<(Lsn, Vec<u8>)>,
    /// A record at the end was not whole, as after a power failure: it and what followed it
    /// had never been called durable.
    pub torn_tail: bool,
    /// Ranges that had been durable and cannot be read any more.
    pub damage: Vec<Damage>,
    /// What is left of the payload of the last record, when the last of `damage` is that.
    pub damaged_tail: Option<Vec<u8>>,
}

/// A range of a segment that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The number of the segment.
    pub segment: u64,
    /// Where in its file.
    pub offset: u64,
    /// How much of it.
    pub bytes: u64,
    /// The file that holds a copy of it.
    pub set_aside: PathBuf,
}

/// Why a journal cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process has it.
    #[error("the journal in {} is in use by another process", dir.display())]
    InUse {
        /// Its directory.
        dir: PathBuf,
    },
    /// A newer program wrote it.
    #[error(
        "the journal has format {found}, newer than {known}: a newer version of this program wrote it"
    )]
    NewerFormat {
        /// The version met.
        found: u32,
        /// The newest that is known.
        known: u32,
    },
    /// The disk failed.
    #[error("{attempted}: {source}")]
    Io {
        /// What was attempted.
        attempted: &'static str,
        /// How it failed.
        source: io::Error,
    },
}

/// The log.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<dyn LogDisk>,
    state: Mutex<State>,
    /// A sync ended, well or not.
    synced: Condvar,
    horizon: Arc<Horizon>,
}

/// How far a journal is written and how far it is durable: for what may not happen before the
/// record that allows it is durable, such as giving up bytes that an earlier record names.
#[derive(Debug, Default)]
pub struct Horizon {
    last: AtomicU64,
    durable: AtomicU64,
}

impl Horizon {
    /// The last record.
    pub fn last(&self) -> Lsn {
        Lsn(self.last.load(Ordering::SeqCst))
    }

    /// The last record that is durable, as are all before it.
    pub fn durable(&self) -> Lsn {
        Lsn(self.durable.load(Ordering::SeqCst))
    }

    pub(crate) fn set(&self, last: Lsn, durable: Lsn) {
        self.last.store(last.0, Ordering::SeqCst);
        self.durable.store(durable.0, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct State {
    log: Log,
    pool: Pool,
    /// The last record of the log.
    last: Lsn,
    durable: Lsn,
    syncing: bool,
    /// Why nothing is called durable any more.
    not_durable: Option<String>,
    /// Why nothing is even written any more.
    broken: Option<String>,
}

impl Journal {
    /// Opens the journal of a directory, which is made if need be, and takes its lock. Where
    /// damage is reported, a checkpoint ends it.
    pub fn open(dir: &Path) -> Result<(Self, Recovered), JournalError> {
        let mut records = Vec::new();
        let (journal, mut recovered) = Self::open_with(dir, &mut |lsn, payload| {
            records.push((lsn, payload));
        })?;
        recovered.records = records;
        Ok((journal, recovered))
    }

    /// As [`Journal::open`], for a journal that may be larger than the memory: each record is
    /// given to `visit` instead of being collected.
    pub fn open_with(
        dir: &Path,
        visit: &mut dyn FnMut(Lsn, Vec<u8>),
    ) -> Result<(Self, Recovered), JournalError> {
        let directory = Directory::open(dir).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => JournalError::InUse { dir: dir.to_owned() },
            _ => JournalError::Io { attempted: "open the journal's directory", source },
        })?;
        Self::open_on(Arc::new(directory), SEGMENT_BYTES, visit)
    }

    /// The same on a disk that forgets.
    #[cfg(test)]
    pub(crate) fn open_sim(
        disk: &sim::SimDisk,
        segment_bytes: u64,
        visit: &mut dyn FnMut(Lsn, Vec<u8>),
    ) -> Result<(Self, Recovered), JournalError> {
        Self::open_on(Arc::new(disk.clone()), segment_bytes, visit)
    }

    fn open_on(
        disk: Arc<dyn LogDisk>,
        segment_bytes: u64,
        visit: &mut dyn FnMut(Lsn, Vec<u8>),
    ) -> Result<(Self, Recovered), JournalError> {
        let io = |attempted| move |source| JournalError::Io { attempted, source };
        let (state, recovered) = match recover::find(disk.clone(), segment_bytes)? {
            Ok(found) => {
                found.visit(visit).map_err(io("read the journal"))?;
                State::resume(found, &*disk).map_err(io("go on with the journal"))?
            }
            Err(pool) => State::begin(pool, &*disk).map_err(io("begin a journal"))?,
        };
        let (synced, horizon) = Default::default();
        let journal = Self { disk, state: Mutex::new(state), synced, horizon };
        journal.tell(&journal.lock());
        Ok((journal, recovered))
    }

    /// Adds a record; it survives the end of this process once this returns, and a crash of the
    /// machine once [`Journal::sync`] returned. Without space nothing is changed.
    pub fn append(&self, payload: &[u8]) -> FsResult<Lsn> {
        self.append_to(payload, Space::Ordinary)
    }

    /// As [`Journal::append`], for small records that let space be freed: a full disk takes
    /// them too, for a while.
    pub fn append_reserved(&self, payload: &[u8]) -> FsResult<Lsn> {
        self.append_to(payload, Space::Reserve)
    }

    fn append_to(&self, payload: &[u8], space: Space) -> FsResult<Lsn> {
        let mut state = self.lock();
        let added = state.add(record::Kind::Payload, payload, space);
        self.tell(&state);
        added
    }

    /// Returns when every record up to this one is durable. One write to the disk serves all
    /// that wait. Once the disk failed to do it every call fails, until a checkpoint
    /// succeeded: what it dropped cannot be known.
    pub fn sync(&self, upto: Lsn) -> FsResult<()> {
        let mut state = self.lock();
        loop {
            if state.durable >= upto.min(state.last) {
                return Ok(());
            }
            state.check_durable()?;
            if !state.syncing {
                break;
            }
            state = self.wait(state);
        }
        state.syncing = true;
        let target = state.last;
        let unsynced = state.log.take_unsynced();
        drop(state);
        fail_point("journal::sync");
        let synced = unsynced.sync(&*self.disk);
        fail_point("journal::synced");
        let mut state = self.lock();
        state.syncing = false;
        self.synced.notify_all();
        match synced {
            Ok(()) => {
                state.durable = state.durable.max(target);
                self.tell(&state);
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "the journal could not be synced");
                state.not_durable = Some(error.to_string());
                state.check_durable()
            }
        }
    }

    /// The last record that is durable, as are all before it.
    pub fn durable(&self) -> Lsn {
        self.lock().durable
    }

    /// The same, and what was written, for others to follow.
    pub fn horizon(&self) -> Arc<Horizon> {
        self.horizon.clone()
    }

    fn tell(&self, state: &State) {
        self.horizon.set(state.last, state.durable);
    }

    /// Bytes of records since the last checkpoint, its own included.
    pub fn live_bytes(&self) -> u64 {
        self.lock().log.bytes
    }

    /// Bytes on disk, spare segments included.
    pub fn total_bytes(&self) -> u64 {
        let state = self.lock();
        let spares = state.pool.spares.len() as u64 * state.pool.segment_bytes;
        state.log.segments().map(|(_, size)| size).sum::<u64>() + spares
    }

    /// Replaces all records by these, durably and atomically; after a failure the old ones
    /// stand. Appends wait meanwhile, so the iterator must neither append nor take a lock under
    /// which another thread appends.
    pub fn checkpoint(&self, live: &mut dyn Iterator<Item = Vec<u8>>) -> FsResult<()> {
        let mut state = self.lock();
        while state.syncing {
            state = self.wait(state);
        }
        let done = state.checkpoint(&*self.disk, live);
        self.tell(&state);
        self.synced.notify_all();
        done
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.synced.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closing in order says so, for the next start to know that nothing may be missing.
impl Drop for Journal {
    fn drop(&mut self) {
        let Some(last) = self.lock().mark(&*self.disk) else { return };
        if let Err(error) = self.sync(last) {
            tracing::warn!(%error, "the journal was not synced when it was closed");
        }
    }
}

impl State {
    fn begin(mut pool: Pool, disk: &dyn LogDisk) -> io::Result<(Self, Recovered)> {
        pool.fill(2)?;
        let mut log = Log::begin(&mut pool, Lsn(1), Space::Ordinary)?;
        finish(&mut log, &mut pool, Lsn(1), Lsn(1), disk)?;
        Ok((Self::new(log, pool, Lsn(1)), Recovered::default()))
    }

    fn resume(found: recover::Found, disk: &dyn LogDisk) -> io::Result<(Self, Recovered)> {
        let recovered = Recovered {
            records: Vec::new(),
            torn_tail: found.torn_tail,
            damage: found.damage.clone(),
            damaged_tail: found.damaged_tail.clone(),
        };
        let last = found.last;
        let (mut log, mut pool) = found.into_parts();
        // What a killed process left may not be on the disk yet, though it was read from there.
        disk.sync_dir()?;
        log.take_unsynced().sync(disk)?;
        if let Err(error) = pool.fill(1) {
            tracing::warn!(%error, "no spare segment for the journal");
        }
        let mut state = Self::new(log, pool, last);
        if let Some(marked) = state.mark(disk) {
            state.log.take_unsynced().sync(disk)?;
            state.durable = marked;
        }
        Ok((state, recovered))
    }

    fn new(log: Log, pool: Pool, last: Lsn) -> Self {
        Self { log, pool, last, durable: last, syncing: false, not_durable: None, broken: None }
    }

    fn add(&mut self, kind: record::Kind, payload: &[u8], space: Space) -> FsResult<Lsn> {
        if payload.len() > MAX_RECORD_BYTES {
            return Err(FsError::new(Kind::FileTooLarge, "append to the journal"));
        }
        if let Some(reason) = &self.broken {
            return Err(FsError::caused(Kind::Io, "append to the journal", reason.clone()));
        }
        let lsn = Lsn(self.last.0 + 1);
        self.log
            .add(&mut self.pool, (kind, lsn, self.durable), payload, space)
            .map_err(|e| FsError::os("append to the journal", e))?;
        self.last = lsn;
        Ok(lsn)
    }

    /// Says in the log what is durable, and since which start of the machine it is written.
    fn mark(&mut self, disk: &dyn LogDisk) -> Option<Lsn> {
        if self.not_durable.is_some() {
            return None;
        }
        let mark = Checkpoint { first: self.last, boot: disk.boot() };
        self.add(record::Kind::Mark, &mark.encode(), Space::Reserve).ok()
    }

    fn check_durable(&self) -> FsResult<()> {
        match &self.not_durable {
            Some(reason) => Err(FsError::caused(Kind::Io, "sync the journal", reason.clone())),
            None => Ok(()),
        }
    }

    fn checkpoint(
        &mut self,
        disk: &dyn LogDisk,
        live: &mut dyn Iterator<Item = Vec<u8>>,
    ) -> FsResult<()> {
        let failed = |e| FsError::os("write a checkpoint of the journal", e);
        if let Some(reason) = &self.broken {
            return Err(FsError::caused(
                Kind::Io,
                "write a checkpoint of the journal",
                reason.clone(),
            ));
        }
        let first = Lsn(self.last.0 + 1);
        let mut fresh = Log::begin(&mut self.pool, first, Space::Reserve).map_err(failed)?;
        let written = write_all(&mut fresh, &mut self.pool, first, live, disk);
        let (given_up, result) = match written {
            Ok(last) => {
                (self.last, self.durable, self.not_durable) = (last, last, None);
                (std::mem::replace(&mut self.log, fresh), Ok(()))
            }
            Err(e) => (fresh, Err(failed(e))),
        };
        let segments: Vec<_> = given_up.segments().collect();
        let recycled = segments.into_iter().try_for_each(|(no, size)| self.pool.recycle(no, size));
        match recycled.and_then(|()| disk.sync_dir()) {
            Ok(()) => {}
            // Of a checkpoint that failed nothing may be found later, when the log went on.
            Err(e) if result.is_err() => self.broken = Some(e.to_string()),
            Err(error) => tracing::warn!(%error, "old segments of the journal stay for now"),
        }
        result
    }
}

/// Writes the records of a checkpoint and its end, durably; gives the last number.
fn write_all(
    log: &mut Log,
    pool: &mut Pool,
    first: Lsn,
    live: &mut dyn Iterator<Item = Vec<u8>>,
    disk: &dyn LogDisk,
) -> io::Result<Lsn> {
    let mut next = first;
    for payload in live {
        if payload.len() > MAX_RECORD_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // No claim about what is durable: the end of the checkpoint is what makes it count.
        log.add(pool, (record::Kind::Payload, next, Lsn(0)), &payload, Space::Reserve)?;
        next = Lsn(next.0 + 1);
    }
    finish(log, pool, first, next, disk)?;
    Ok(next)
}

fn finish(
    log: &mut Log,
    pool: &mut Pool,
    first: Lsn,
    lsn: Lsn,
    disk: &dyn LogDisk,
) -> io::Result<()> {
    let end = Checkpoint { first, boot: disk.boot() };
    log.add(pool, (record::Kind::Checkpoint, lsn, Lsn(0)), &end.encode(), Space::Reserve)?;
    log.take_unsynced().sync(disk)
}

fn segment_name(no: u64) -> String {
    format!("{no:08}.log")
}

fn spare_name(no: u64) -> String {
    format!("spare-{no}")
}
