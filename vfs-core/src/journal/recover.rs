//! Reading a journal after whatever happened to it.
//!
//! Three things can be wrong, and each is answered otherwise:
//!
//! - **A torn tail.** The machine crashed; of what was not synced, some reached the disk, in any
//!   order. The log ends before the first record that is not whole.
//! - **Damage.** A record that had been durable is not what was written. It is set aside and
//!   told, and the records after it count: they are found by their marker.
//! - **A checkpoint that was not finished.** The log before it is still there and counts.
//!
//! Tail and damage are told apart by what later records say was durable when they were written,
//! and by the machine's boot id: without a crash of the machine nothing is torn, but for a record
//! that was being written when its process was killed.

use super::disk::{LogDisk, LogFile};
use super::log::{Log, Pool, Segment, UNFINISHED, draw_use_id};
use super::record::{self, ALIGN, Kind, RECORD_HEADER, SEGMENT_HEADER, SegmentHeader};
use super::{Damage, JournalError, Lsn, segment_name};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// A disk that cannot read a block costs what is in it.
const BLOCK_BYTES: usize = 4096;

/// A log that is on the disk, ready to go on.
pub(super) struct Found {
    pub log: Log,
    pub pool: Pool,
    pub last: Lsn,
    pub torn_tail: bool,
    pub damage: Vec<Damage>,
    pub damaged_tail: Option<Vec<u8>>,
    records: Vec<(Arc<dyn LogFile>, Record)>,
}

/// Where a whole record is.
#[derive(Clone, Copy, Debug)]
struct Record {
    at: u64,
    len: u32,
    lsn: Lsn,
    durable: Lsn,
    base: u64,
    kind: Kind,
    /// Its payload, of what is not the user's.
    checkpoint: Option<Checkpoint>,
}

/// What the journal's own records say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Checkpoint {
    /// The first record of the log.
    pub first: Lsn,
    /// Since which start of the machine the log is written.
    pub boot: [u8; 16],
}

impl Checkpoint {
    pub(super) fn encode(&self) -> Vec<u8> {
        [&self.first.0.to_le_bytes()[..], &self.boot].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (first, boot) = bytes.split_first_chunk()?;
        Some(Self { first: Lsn(u64::from_le_bytes(*first)), boot: boot.try_into().ok()? })
    }
}

/// A segment as it was found.
#[derive(Debug)]
struct Scanned {
    no: u64,
    size: u64,
    file: Arc<dyn LogFile>,
    /// `None`: damaged.
    header: Option<SegmentHeader>,
    base: u64,
    use_id: u64,
    records: Vec<Record>,
    /// Where a record seems to be that begins after the last whole one.
    begun: Option<Range<u64>>,
}

impl Scanned {
    /// After its last whole record.
    fn end(&self) -> u64 {
        self.records.last().map_or(SEGMENT_HEADER, Record::end)
    }
}

impl Record {
    fn end(&self) -> u64 {
        self.at + record::record_bytes(self.len as usize)
    }
}

/// Records that are missing before one that is there.
struct Hole {
    /// In the log's segments: the one of the record after it, and the record's place in it.
    before: (usize, usize),
    /// Where they were: segment and range in its file.
    ranges: Vec<(u64, Range<u64>)>,
}

/// Finds the log of a disk; `None` when there is none, which leaves the pool.
pub(super) fn find(
    disk: Arc<dyn LogDisk>,
    segment_bytes: u64,
) -> Result<Result<Found, Pool>, JournalError> {
    let io = |attempted| move |source| JournalError::Io { attempted, source };
    let mut pool =
        Pool { disk: disk.clone(), segment_bytes, spares: Vec::new(), next_spare: 1, next_no: 1 };
    let (mut segments, mut unnamed) = (Vec::new(), Vec::new());
    for name in disk.list().map_err(io("list the journal"))? {
        if let Some(no) = number(&name, "spare-", "") {
            pool.next_spare = pool.next_spare.max(no.saturating_add(1));
            match disk.open(&name).and_then(|file| file.size()) {
                Ok(size) if size == segment_bytes => pool.spares.push(no),
                _ => disk.remove(&name).map_err(io("remove a spare segment"))?,
            }
        } else if let Some(no) = number(&name, "", ".log") {
            pool.next_no = pool.next_no.max(no.saturating_add(1));
            match scan(&*disk, no)? {
                Ok(segment) => segments.push(segment),
                Err(size) => unnamed.push((no, size)),
            }
        } else if name == UNFINISHED {
            disk.remove(&name).map_err(io("remove an unfinished segment"))?;
        }
    }
    for (no, size) in unnamed {
        pool.recycle(no, size).map_err(io("recycle a segment"))?;
    }
    segments.sort_unstable_by_key(|s| s.no);
    place_damaged(&mut segments);
    let Some(base) = choose(&segments) else { return Ok(Err(pool)) };
    let (log, other): (Vec<_>, Vec<_>) = segments.into_iter().partition(|s| s.base == base);
    for segment in other {
        pool.recycle(segment.no, segment.size).map_err(io("recycle a segment"))?;
    }
    assemble(log, pool).map(Ok).map_err(io("mend the journal"))
}

fn number(name: &str, prefix: &str, suffix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Reads a segment. One that calls itself by another number was given another name, without that
/// having reached the disk, and before that nothing in it is durable: only its size is given.
fn scan(disk: &dyn LogDisk, no: u64) -> Result<Result<Scanned, u64>, JournalError> {
    let failed = |source| JournalError::Io { attempted: "read the journal", source };
    let file = disk.open(&segment_name(no)).map_err(failed)?;
    let size = file.size().map_err(failed)?;
    let bytes = read_what_can_be_read(&*file, size);
    let header = SegmentHeader::decode(&bytes)?;
    if header.is_some_and(|header| header.no != no) {
        return Ok(Err(size));
    }
    let use_id = header.map_or_else(|| last_use(&bytes), |header| header.use_id);
    let mut scanned =
        Scanned { no, size, file, header, base: 0, use_id, records: Vec::new(), begun: None };
    let mut at = SEGMENT_HEADER as usize;
    let mut last = Lsn(0);
    while let Some(rest) = bytes.get(at..).filter(|rest| rest.len() >= RECORD_HEADER) {
        match record::decode(rest, use_id).filter(|found| found.lsn > last) {
            Some(found) => {
                last = found.lsn;
                let payload = &rest[RECORD_HEADER..][..found.len as usize];
                scanned.records.push(Record {
                    at: at as u64,
                    len: found.len,
                    lsn: found.lsn,
                    durable: found.durable,
                    base: found.base,
                    kind: found.kind,
                    checkpoint: (found.kind != Kind::Payload)
                        .then(|| Checkpoint::decode(payload))
                        .flatten(),
                });
                at += found.record_bytes() as usize;
            }
            None => at += ALIGN,
        }
    }
    let end = scanned.end() as usize;
    let rest = bytes.get(end..).filter(|rest| record::begins(rest, use_id));
    scanned.begun = rest.map(|rest| scanned.end()..scanned.end() + record::told_bytes(rest) as u64);
    Ok(Ok(scanned))
}

/// All bytes; zeros for what the disk cannot read.
fn read_what_can_be_read(file: &dyn LogFile, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    if file.read_at(&mut bytes, 0).is_err() {
        for (n, block) in bytes.chunks_mut(BLOCK_BYTES).enumerate() {
            if file.read_at(block, (n * BLOCK_BYTES) as u64).is_err() {
                block.fill(0);
            }
        }
    }
    bytes
}

/// The last use of a file whose header is lost: that of the record with the highest number.
fn last_use(bytes: &[u8]) -> u64 {
    let places = (SEGMENT_HEADER as usize..bytes.len()).step_by(ALIGN);
    let uses = places.filter_map(|at| {
        let id = record::use_of(&bytes[at..])?;
        Some((record::decode(&bytes[at..], id)?.lsn, id))
    });
    uses.max().map_or(0, |(_, id)| id)
}

/// Drops records of an earlier use, which may seem to count where a header is lost.
fn drop_stale(segments: &mut [Scanned]) {
    let mut last = Lsn(0);
    for segment in segments {
        segment.records.retain(|record| record.lsn > last);
        last = segment.records.last().map_or(last, |record| record.lsn);
    }
}

/// Says to which log each segment belongs, also where its header is lost.
fn place_damaged(segments: &mut [Scanned]) {
    for n in 0..segments.len() {
        let told = |s: &Scanned| s.records.first().map(|r| r.base);
        let known = |s: &Scanned| s.header.map(|h| h.base).or_else(|| told(s));
        let no = segments[n].no;
        let next = segments.get(n + 1).and_then(known).filter(|&base| base <= no);
        let before = n.checked_sub(1).map(|n| segments[n].base);
        segments[n].base = known(&segments[n]).or(next).or(before).unwrap_or(no);
    }
}

/// The log that counts: the newest whose checkpoint was finished.
fn choose(segments: &[Scanned]) -> Option<u64> {
    let mut bases: Vec<u64> = segments.iter().map(|s| s.base).collect();
    bases.sort_unstable();
    bases.dedup();
    let counts = |base: u64| {
        let records = || segments.iter().filter(|s| s.base == base).flat_map(|s| &s.records);
        let ends = |r: &&Record| r.kind == Kind::Checkpoint;
        let finished = records().find(ends).is_some_and(|end| {
            let first = end.checkpoint.map_or(end.lsn, |c| c.first);
            let there = records().filter(|r| (first..=end.lsn).contains(&r.lsn)).count() as u64;
            there == end.lsn.0 - first.0 + 1
        });
        // Records after a checkpoint say so; and the log before is only given up after it.
        let went_on = records().any(|r| r.durable > Lsn(0));
        finished || went_on || !segments.iter().any(|s| s.base < base && s.no == s.base)
    };
    bases.into_iter().rev().find(|&base| counts(base))
}

/// Goes through a log's segments, in order; cuts the torn tail, sets aside what is damaged.
fn assemble(mut segments: Vec<Scanned>, mut pool: Pool) -> io::Result<Found> {
    drop_stale(&mut segments);
    let holes = holes(&segments);
    let proven = |hole: &Hole| is_proven(hole, &segments, pool.disk.boot());
    let cut = holes.iter().position(|hole| !proven(hole));
    let damage = holes[..cut.unwrap_or(holes.len())].iter().flat_map(|h| h.ranges.clone());
    let headers = segments.iter().filter(|s| s.header.is_none()).map(|s| (s.no, 0..SEGMENT_HEADER));
    let tail = match cut {
        None if written_since_boot(&segments, pool.disk.boot()) => {
            segments.last().and_then(|last| damaged_end(&*pool.disk, last))
        }
        _ => None,
    };
    let (tail, damaged_tail) = tail.unzip();
    let tail = segments.last().map(|last| last.no).zip(tail);
    let damage = headers
        .into_iter()
        .chain(damage)
        .chain(tail)
        .map(|(no, range)| set_aside(&*pool.disk, no, range))
        .collect();
    if let Some(cut) = cut {
        let (segment, record) = holes[cut].before;
        // With nothing of it left a segment goes too, but a log has one at least.
        let keep = if record == 0 { segment.max(1) } else { segment + 1 };
        segments[segment].records.truncate(record);
        for gone in segments.drain(keep..) {
            pool.recycle(gone.no, gone.size)?;
        }
    }
    let base = segments[0].base;
    let first = segments[0].header.map(|h| h.first.0.saturating_sub(1));
    let last = segments.iter().flat_map(|s| &s.records).map(|r| r.lsn).max();
    let last = last.unwrap_or(Lsn(first.unwrap_or(0)));
    mend_headers(&mut segments, last)?;
    let begun = segments.last().is_some_and(|s| s.begun.is_some());
    let torn_tail = cut.is_some() || begun;
    let records = segments
        .iter()
        .flat_map(|s| s.records.iter().map(|r| (s.file.clone(), *r)))
        .collect::<Vec<_>>();
    let bytes = records.iter().map(|(_, r)| r.end() - r.at).sum();
    let mut full: Vec<_> = segments.iter().map(|s| (s.no, s.size)).collect();
    full.pop();
    let end = segments.pop().expect("a log has a segment");
    let at = end.end();
    if torn_tail {
        zero(&*end.file, at..end.size)?;
    }
    let segment = Segment { no: end.no, size: end.size, file: end.file, use_id: end.use_id, at };
    let log = Log::resume(base, full, segment, bytes);
    for segment in &segments {
        segment.file.sync()?;
    }
    Ok(Found { log, pool, last, torn_tail, damage, damaged_tail, records })
}

/// Where numbers are missing.
fn holes(segments: &[Scanned]) -> Vec<Hole> {
    let end = |r: &&Record| r.kind == Kind::Checkpoint;
    let told = segments.iter().flat_map(|s| &s.records).find(end).and_then(|r| r.checkpoint);
    let first = segments.first().and_then(|s| s.header).map(|h| h.first).or(told.map(|c| c.first));
    let mut expected = first;
    let mut holes = Vec::new();
    // Where something may be missing since the last whole record.
    let mut since: Vec<(u64, Range<u64>)> = Vec::new();
    for (n, segment) in segments.iter().enumerate() {
        let mut at = SEGMENT_HEADER;
        if segment.header.map(|h| h.first) == expected {
            // Nothing is missing before it.
            since.clear();
        }
        for (m, record) in segment.records.iter().enumerate() {
            if at < record.at {
                since.push((segment.no, at..record.at));
            }
            if expected.is_some_and(|expected| record.lsn > expected) {
                if since.is_empty() {
                    // A whole segment is gone.
                    since.push((segment.no, record.at..record.at));
                }
                holes.push(Hole { before: (n, m), ranges: std::mem::take(&mut since) });
            }
            since.clear();
            expected = Some(Lsn(record.lsn.0 + 1));
            at = record.end();
        }
        if at < segment.size {
            since.push((segment.no, at..segment.size));
        }
    }
    holes
}

/// Whether what is missing had been durable.
fn is_proven(hole: &Hole, segments: &[Scanned], boot: [u8; 16]) -> bool {
    let place = |n: usize, m: usize| (n, m) >= hole.before;
    let records = segments.iter().enumerate();
    let records =
        records.flat_map(|(n, s)| s.records.iter().enumerate().map(move |(m, r)| (n, m, r)));
    let missing = segments[hole.before.0].records[hole.before.1].lsn.0 - 1;
    let mut written_since_boot = false;
    for (n, m, record) in records {
        if place(n, m) {
            if record.durable.0 >= missing {
                return true;
            }
        } else if let Some(told) = record.checkpoint {
            written_since_boot = told.boot == boot;
        }
    }
    written_since_boot
}

/// Whether the machine has not crashed since the log was written to.
fn written_since_boot(segments: &[Scanned], boot: [u8; 16]) -> bool {
    let mut told = segments.iter().flat_map(|s| &s.records).filter_map(|r| r.checkpoint);
    told.next_back().is_some_and(|told| told.boot == boot)
}

/// What begins after the last whole record, and its payload, unless its process was killed while
/// it wrote it: then it ends where a page of memory did.
fn damaged_end(disk: &dyn LogDisk, last: &Scanned) -> Option<(Range<u64>, Vec<u8>)> {
    let range = last.begun.clone()?;
    let bytes = copy(disk, last.no, &range).ok()?;
    let to_page = range.start.next_multiple_of(BLOCK_BYTES as u64) - range.start;
    let mut pages = (to_page as usize..bytes.len()).step_by(BLOCK_BYTES);
    let is_cut_short = pages.any(|page| bytes[page..].iter().all(|byte| *byte == 0));
    let payload = bytes.get(RECORD_HEADER..).unwrap_or_default().to_vec();
    (!is_cut_short).then_some((range, payload))
}

fn copy(disk: &dyn LogDisk, no: u64, range: &Range<u64>) -> io::Result<Vec<u8>> {
    let file = disk.open(&segment_name(no))?;
    let mut bytes = vec![0; (range.end - range.start) as usize];
    // Of what cannot be read there is nothing to keep.
    let _ = file.read_at(&mut bytes, range.start);
    Ok(bytes)
}

/// Writes damaged headers anew, so that more records can follow.
fn mend_headers(segments: &mut [Scanned], last: Lsn) -> io::Result<()> {
    for segment in segments.iter_mut().filter(|s| s.header.is_none()) {
        let first = segment.records.first().map_or(Lsn(last.0 + 1), |r| r.lsn);
        if segment.records.is_empty() {
            segment.use_id = draw_use_id();
        }
        let Scanned { no, base, use_id, .. } = *segment;
        let header = SegmentHeader { no, base, use_id, first };
        segment.file.write_at(&header.encode(), 0)?;
        segment.header = Some(header);
    }
    Ok(())
}

fn set_aside(disk: &dyn LogDisk, no: u64, range: Range<u64>) -> Damage {
    let name = format!("{no:08}-{}", range.start);
    let kept = copy(disk, no, &range).and_then(|bytes| disk.set_aside(&name, &bytes));
    let set_aside = kept.unwrap_or_else(|error| {
        tracing::warn!(segment = no, %error, "damaged range of the journal could not be copied");
        segment_name(no).into()
    });
    Damage { segment: no, offset: range.start, bytes: range.end - range.start, set_aside }
}

fn zero(file: &dyn LogFile, range: Range<u64>) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let part = (range.end - at).min(zeros.len() as u64);
        file.write_at(&zeros[..part as usize], at)?;
        at += part;
    }
    file.sync()
}

impl Found {
    /// Gives the user's records, in order.
    pub(super) fn visit(&self, visit: &mut dyn FnMut(Lsn, Vec<u8>)) -> io::Result<()> {
        for (file, record) in self.records.iter().filter(|(_, r)| r.kind == Kind::Payload) {
            let mut payload = vec![0; record.len as usize];
            file.read_at(&mut payload, record.at + RECORD_HEADER as u64)?;
            visit(record.lsn, payload);
        }
        Ok(())
    }

    /// Forgets where the records are.
    pub(super) fn into_parts(self) -> (Log, Pool) {
        (self.log, self.pool)
    }
}
