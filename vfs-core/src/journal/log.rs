//! Writing: one log of segments, and the spare segments it grows by.

use super::disk::{LogDisk, LogFile};
use super::record::{self, Kind, RecordHeader, SEGMENT_HEADER, SegmentHeader};
use super::{Lsn, segment_name, spare_name};
use crate::failpoint::fail_point;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io;
use std::sync::Arc;

/// A file being made; one that is left over from a crash is removed.
pub(super) const UNFINISHED: &str = "unfinished";
/// More are removed instead of kept for use again.
const MAX_SPARES: usize = 4;
/// Segments for one long record are a multiple of this.
const BLOCK_BYTES: u64 = 4096;

/// Whose space a record may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Space {
    /// One spare segment must stay.
    Ordinary,
    /// The last spare segment too.
    Reserve,
}

/// Segments that are in no log, zeroed or used before.
#[derive(Debug)]
pub(super) struct Pool {
    pub disk: Arc<dyn LogDisk>,
    pub segment_bytes: u64,
    /// By the number in their name.
    pub spares: Vec<u64>,
    pub next_spare: u64,
    pub next_no: u64,
}

impl Pool {
    /// Makes spare segments until there are so many.
    pub(super) fn fill(&mut self, spares: usize) -> io::Result<()> {
        while self.spares.len() < spares {
            let no = self.next_spare;
            self.disk.create(UNFINISHED, self.segment_bytes)?;
            self.disk.rename(UNFINISHED, &spare_name(no))?;
            self.next_spare += 1;
            self.spares.push(no);
        }
        Ok(())
    }

    /// Makes a file a segment that has room for a record of this many bytes.
    fn take(
        &mut self,
        base: Option<u64>,
        first: Lsn,
        record_bytes: u64,
        space: Space,
    ) -> io::Result<Segment> {
        let needed = (SEGMENT_HEADER + record_bytes).next_multiple_of(BLOCK_BYTES);
        let long = needed > self.segment_bytes;
        self.fill(if space == Space::Ordinary {
            2 - usize::from(long)
        } else {
            usize::from(!long)
        })?;
        let (from, file) = if long {
            (UNFINISHED.to_owned(), self.disk.create(UNFINISHED, needed)?)
        } else {
            let name = spare_name(self.spares[self.spares.len() - 1]);
            let file = self.disk.open(&name)?;
            (name, file)
        };
        let no = self.next_no;
        let use_id = draw_use_id();
        let header = SegmentHeader { no, base: base.unwrap_or(no), use_id, first };
        file.write_at(&header.encode(), 0)?;
        let mut first = [0; 8];
        file.read_at(&mut first, SEGMENT_HEADER)?;
        if first != [0; 8] {
            // What a killed process does not come to write is zero then, and nothing of the
            // earlier use: so damage is told from a record that was cut short.
            let rest = self.segment_bytes.saturating_sub(SEGMENT_HEADER);
            file.write_at(&vec![0; rest as usize], SEGMENT_HEADER)?;
        }
        // Durable before the name is: under its name a file never has the header, and so the
        // records, of an earlier use.
        file.sync()?;
        fail_point("journal::segment");
        self.disk.rename(&from, &segment_name(no))?;
        fail_point("journal::segment-named");
        self.next_no += 1;
        if !long {
            self.spares.pop();
        }
        let size = if long { needed } else { self.segment_bytes };
        Ok(Segment { no, size, file, use_id, at: SEGMENT_HEADER })
    }

    /// Takes a segment that no log needs any more.
    pub(super) fn recycle(&mut self, no: u64, size: u64) -> io::Result<()> {
        if size != self.segment_bytes || self.spares.len() >= MAX_SPARES {
            return self.disk.remove(&segment_name(no));
        }
        let spare = self.next_spare;
        self.disk.rename(&segment_name(no), &spare_name(spare))?;
        self.next_spare += 1;
        self.spares.push(spare);
        Ok(())
    }
}

/// A number that no use of a file had before.
pub(super) fn draw_use_id() -> u64 {
    RandomState::new().hash_one(std::time::SystemTime::now()) | 1
}

/// A segment that is written to.
#[derive(Debug)]
pub(super) struct Segment {
    pub no: u64,
    pub size: u64,
    pub file: Arc<dyn LogFile>,
    pub use_id: u64,
    /// Where the next record goes.
    pub at: u64,
}

/// The segments from one checkpoint on, at whose end records are added.
#[derive(Debug)]
pub(super) struct Log {
    pub base: u64,
    /// Number and size of those before the last.
    pub full: Vec<(u64, u64)>,
    pub last: Segment,
    /// Bytes of its records.
    pub bytes: u64,
    /// Full segments that have records which may not be on the disk yet.
    pub unsynced: Vec<Arc<dyn LogFile>>,
    /// Whether a segment's name may not be on the disk yet.
    pub unsynced_names: bool,
    /// For encoding, kept for its memory.
    buffer: Vec<u8>,
}

impl Log {
    /// Begins a log.
    pub(super) fn begin(pool: &mut Pool, first: Lsn, space: Space) -> io::Result<Self> {
        let last = pool.take(None, first, 0, space)?;
        let mut log = Self::resume(last.no, Vec::new(), last, 0);
        log.unsynced_names = true;
        Ok(log)
    }

    /// Goes on with a log that is on the disk.
    pub(super) fn resume(base: u64, full: Vec<(u64, u64)>, last: Segment, bytes: u64) -> Self {
        let (unsynced, unsynced_names, buffer) = Default::default();
        Self { base, full, last, bytes, unsynced, unsynced_names, buffer }
    }

    /// Adds a record; a failure leaves the log as it was.
    pub(super) fn add(
        &mut self,
        pool: &mut Pool,
        (kind, lsn, durable): (Kind, Lsn, Lsn),
        payload: &[u8],
        space: Space,
    ) -> io::Result<()> {
        let bytes = record::record_bytes(payload.len());
        if space == Space::Ordinary {
            pool.fill(1)?;
        }
        if self.last.at + bytes > self.last.size {
            let next = pool.take(Some(self.base), lsn, bytes, space)?;
            let full = std::mem::replace(&mut self.last, next);
            self.full.push((full.no, full.size));
            self.unsynced.push(full.file);
            self.unsynced_names = true;
        }
        let use_id = self.last.use_id;
        let len = payload.len() as u32;
        let header = RecordHeader { kind, len, lsn, durable, use_id, base: self.base };
        self.buffer.clear();
        record::encode(&header, payload, &mut self.buffer);
        let written = self.last.file.write_at(&self.buffer, self.last.at);
        if self.buffer.capacity() > 1 << 20 {
            self.buffer = Vec::new();
        }
        written?;
        self.last.at += bytes;
        self.bytes += bytes;
        Ok(())
    }

    /// What has to be synced for every record until now, which is then forgotten.
    pub(super) fn take_unsynced(&mut self) -> Unsynced {
        let mut files = std::mem::take(&mut self.unsynced);
        files.push(self.last.file.clone());
        Unsynced { files, names: std::mem::take(&mut self.unsynced_names) }
    }

    /// Number and size of each segment.
    pub(super) fn segments(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.full.iter().copied().chain([(self.last.no, self.last.size)])
    }
}

/// What has to be synced.
#[derive(Debug)]
pub(super) struct Unsynced {
    files: Vec<Arc<dyn LogFile>>,
    names: bool,
}

impl Unsynced {
    pub(super) fn sync(&self, disk: &dyn LogDisk) -> io::Result<()> {
        if self.names {
            disk.sync_dir()?;
        }
        self.files.iter().try_for_each(|file| file.sync())
    }
}
