//! How records and segments look on the disk (docs/FORMAT.md).

use super::{JournalError, Lsn, MAX_RECORD_BYTES};

/// The version of the format.
pub(super) const FORMAT: u32 = 1;
/// Bytes of a segment's header; the first record follows.
pub(super) const SEGMENT_HEADER: u64 = 80;
/// Bytes of a record before its payload.
pub(super) const RECORD_HEADER: usize = 64;
/// Where its checksum is, which covers all before it and the payload.
const CHECKSUM_AT: usize = 48;
/// Records begin at multiples of this, which is how they are found after damage.
pub(super) const ALIGN: usize = 8;

const SEGMENT_MAGIC: [u8; 8] = *b"sd-jrnl\0";
const RECORD_MARKER: [u8; 4] = [0xb5, b'J', b'R', 0xe2];

/// What begins a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SegmentHeader {
    /// Its number: its place in the log.
    pub no: u64,
    /// The first segment of the log it belongs to: a checkpoint begins another one.
    pub base: u64,
    /// Drawn whenever a file becomes a segment. Records carry it, so that those of an earlier
    /// use of the file are never taken for new ones.
    pub use_id: u64,
    /// The number of the first record in it.
    pub first: Lsn,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER as usize] {
        let mut bytes = [0; SEGMENT_HEADER as usize];
        bytes[..8].copy_from_slice(&SEGMENT_MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        for (n, number) in [self.no, self.base, self.use_id, self.first.0].into_iter().enumerate() {
            bytes[16 + 8 * n..24 + 8 * n].copy_from_slice(&number.to_le_bytes());
        }
        let sum = checksum(&[&bytes[..64]]);
        bytes[64..].copy_from_slice(&sum);
        bytes
    }

    /// `None`: damaged. The magic, the version and the checksum are where they are in every
    /// version, so that a flipped bit is not taken for a newer format.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Self>, JournalError> {
        let Some(bytes) = bytes.get(..SEGMENT_HEADER as usize) else { return Ok(None) };
        if bytes[..8] != SEGMENT_MAGIC || checksum(&[&bytes[..64]]) != bytes[64..] {
            return Ok(None);
        }
        let found = u32_at(bytes, 8);
        if found > FORMAT {
            return Err(JournalError::NewerFormat { found, known: FORMAT });
        }
        Ok(Some(Self {
            no: u64_at(bytes, 16),
            base: u64_at(bytes, 24),
            use_id: u64_at(bytes, 32),
            first: Lsn(u64_at(bytes, 40)),
        }))
    }
}

/// What a record is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The user's.
    Payload = 1,
    /// Ends the records of a checkpoint.
    Checkpoint = 2,
    /// Says that all before is durable.
    Mark = 3,
}

/// What begins a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RecordHeader {
    pub kind: Kind,
    /// Bytes of the payload.
    pub len: u32,
    pub lsn: Lsn,
    /// The last record known to be durable when this one was written: what is missing up to
    /// there was damaged, and what is missing above it may never have reached the disk.
    pub durable: Lsn,
    /// As in the segment's header, for when that is damaged.
    pub use_id: u64,
    /// As in the segment's header.
    pub base: u64,
}

impl RecordHeader {
    /// Bytes of the whole record on disk.
    pub(super) fn record_bytes(&self) -> u64 {
        record_bytes(self.len as usize)
    }
}

/// Bytes on disk of a record with a payload of this length.
pub(super) fn record_bytes(payload: usize) -> u64 {
    (RECORD_HEADER + payload).next_multiple_of(ALIGN) as u64
}

/// Appends a record to a buffer.
pub(super) fn encode(header: &RecordHeader, payload: &[u8], to: &mut Vec<u8>) {
    let mut bytes = [0; CHECKSUM_AT];
    bytes[..4].copy_from_slice(&RECORD_MARKER);
    bytes[4] = header.kind as u8;
    bytes[8..12].copy_from_slice(&header.len.to_le_bytes());
    for (n, number) in
        [header.lsn.0, header.durable.0, header.use_id, header.base].into_iter().enumerate()
    {
        bytes[16 + 8 * n..24 + 8 * n].copy_from_slice(&number.to_le_bytes());
    }
    let end = to.len() + header.record_bytes() as usize;
    to.extend_from_slice(&bytes);
    to.extend_from_slice(&checksum(&[&bytes, payload]));
    to.extend_from_slice(payload);
    to.resize(end, 0);
}

/// The record that begins here, if it is whole and of this use of the file.
pub(super) fn decode(bytes: &[u8], use_id: u64) -> Option<RecordHeader> {
    let marked = bytes.len() >= RECORD_HEADER && bytes[..4] == RECORD_MARKER;
    if !marked || u64_at(bytes, 32) != use_id {
        return None;
    }
    let header = RecordHeader {
        kind: match bytes[4] {
            1 => Kind::Payload,
            2 => Kind::Checkpoint,
            3 => Kind::Mark,
            _ => return None,
        },
        len: u32_at(bytes, 8),
        lsn: Lsn(u64_at(bytes, 16)),
        durable: Lsn(u64_at(bytes, 24)),
        use_id,
        base: u64_at(bytes, 40),
    };
    if header.len as usize > MAX_RECORD_BYTES || header.record_bytes() > bytes.len() as u64 {
        return None;
    }
    let payload = &bytes[RECORD_HEADER..][..header.len as usize];
    (checksum(&[&bytes[..CHECKSUM_AT], payload]) == bytes[CHECKSUM_AT..RECORD_HEADER])
        .then_some(header)
}

/// Whether a record of this use of the file begins here, whole or not. Half of what says so is
/// enough: the other half may be what is damaged.
pub(super) fn begins(bytes: &[u8], use_id: u64) -> bool {
    let whole_of_another = || use_of(bytes).is_some_and(|other| other != use_id);
    bytes.len() >= RECORD_HEADER
        && (u64_at(bytes, 32) == use_id || bytes[..4] == RECORD_MARKER && !whole_of_another())
}

/// How much a record that is not whole says to take, if that can be; it may be what is damaged.
pub(super) fn told_bytes(bytes: &[u8]) -> usize {
    const SOME: usize = 4096;
    let told = record_bytes(u32_at(bytes, 8) as usize) as usize;
    if told <= bytes.len() { told } else { bytes.len().min(SOME) }
}

/// The use of the file that a whole record here belongs to, when the segment's header is lost.
pub(super) fn use_of(bytes: &[u8]) -> Option<u64> {
    let marked = bytes.len() >= RECORD_HEADER && bytes[..4] == RECORD_MARKER;
    marked.then(|| u64_at(bytes, 32)).filter(|&id| decode(bytes, id).is_some())
}

fn checksum(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut sum = [0; 16];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    sum
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}
