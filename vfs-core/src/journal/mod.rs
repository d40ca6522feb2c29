//! A durable, ordered log of records, which are bytes to it.

use crate::error::FsResult;
use std::io;
use std::path::{Path, PathBuf};

/// The longest record, in bytes.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

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
pub struct Journal {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Journal {
    /// Opens the journal of a directory, which is made if need be, and takes its lock.
    pub fn open(dir: &Path) -> Result<(Self, Recovered), JournalError> {
        unimplemented!()
    }

    /// As [`Journal::open`], for a journal that may be larger than the memory: each record is
    /// given to `visit` instead of being collected.
    pub fn open_with(
        dir: &Path,
        visit: &mut dyn FnMut(Lsn, Vec<u8>),
    ) -> Result<(Self, Recovered), JournalError> {
        unimplemented!()
    }

    /// Adds a record; it survives the end of this process once this returns, and a crash of the
    /// machine once [`Journal::sync`] returned. Without space nothing is changed.
    pub fn append(&self, payload: &[u8]) -> FsResult<Lsn> {
        unimplemented!()
    }

    /// As [`Journal::append`], for small records that let space be freed: a full disk takes
    /// them too, for a while.
    pub fn append_reserved(&self, payload: &[u8]) -> FsResult<Lsn> {
        unimplemented!()
    }

    /// Returns when every record up to this one is durable. One write to the disk serves all
    /// that wait. Once the disk failed to do it every call fails, until a checkpoint
    /// succeeded: what it dropped cannot be known.
    pub fn sync(&self, upto: Lsn) -> FsResult<()> {
        unimplemented!()
    }

    /// The last record that is durable, as are all before it.
    pub fn durable(&self) -> Lsn {
        unimplemented!()
    }

    /// Bytes of records since the last checkpoint, its own included.
    pub fn live_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Bytes on disk, spare segments included.
    pub fn total_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Replaces all records by these, durably and atomically. Appends wait meanwhile, so the
    /// iterator must neither append nor take a lock under which another thread appends.
    pub fn checkpoint(&self, live: &mut dyn Iterator<Item = Vec<u8>>) -> FsResult<()> {
        unimplemented!()
    }
}
