//! What a location's log adds up to: by this two devices tell that they have the same rows.
//!
//! Every row is hashed with its place in the log to 1,024 numbers of 16 bits, and these
//! are added up, each modulo 2^16 (LtHash: Bellare and Micciancio 1997; with this many numbers
//! nobody finds other rows of the same sum, Lewi et al. 2019). A sum needs no order and no tree:
//! a row that is replaced is taken away from it, one that is new is added.
//!
//! The sum has the places up to one of them, and is brought up to the last when somebody asks for
//! it. So rows that come in large numbers cost nothing before, and only a row that leaves what is
//! summed up already costs its hash at once.

use super::key;
use super::read;
use super::row::{Orphan, Row, decode};
use super::store::{Snapshot, Table};
use super::tx::{Place, Tx};
use super::{Index, IndexError};
use crate::model::{Entry, FileId, LocationNo, Name, Seq};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::sync::LazyLock;

/// Numbers of a sum.
const LANES: usize = 1024;
/// Bytes of a sum without what it is the sum of.
const LANE_BYTES: usize = 2 * LANES;
/// Places summed up in one commit.
const COMMIT_ROWS: usize = 4096;
/// So few are read and hashed while other writers wait.
const FEW_ROWS: usize = 128;

/// A hasher that has the purpose of the hashes in it.
static ROW: LazyLock<blake3::Hasher> =
    LazyLock::new(|| blake3::Hasher::new_derive_key("spacedrive 2026 a row of a location's log"));

/// What a whole log is: two locations of the same have the same rows. Tombstones do not count:
/// each device drops them in its own time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogDigest {
    /// The log's id.
    pub log_id: u64,
    /// Its last sequence number.
    pub head: Seq,
    /// How many rows it has.
    pub rows: u64,
    /// BLAKE3 of their sum.
    pub digest: [u8; 32],
}

/// The sum of the rows of a log up to a place.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Sum {
    upto: Seq,
    rows: u64,
    lanes: Box<[u16; LANES]>,
}

impl Default for Sum {
    fn default() -> Self {
        Self { upto: Seq(0), rows: 0, lanes: Box::new([0; LANES]) }
    }
}

/// A row of a log, as it is hashed.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Summand<'a> {
    pub(super) seq: Seq,
    pub(super) parent: FileId,
    pub(super) name: &'a Name,
    pub(super) entry: &'a Entry,
}

impl Summand<'_> {
    fn lanes(&self) -> [u8; LANE_BYTES] {
        let row = postcard::to_allocvec(self).expect("rows are of a form that postcard knows");
        let mut lanes = [0; LANE_BYTES];
        ROW.clone().update(&row).finalize_xof().fill(&mut lanes);
        lanes
    }
}

impl Sum {
    /// Up to which place it has all.
    pub(super) fn upto(&self) -> Seq {
        self.upto
    }

    /// How many rows it has.
    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    pub(super) fn add(&mut self, place: Summand<'_>) {
        self.combine(place, u16::wrapping_add);
        self.rows = self.rows.wrapping_add(1);
        self.pass(place.seq);
    }

    /// Adds a place with the row of its name. If the row has another place by now, or the name
    /// none, this place is a tombstone.
    fn add_row(&mut self, (seq, parent, name): (Seq, FileId, &Name), row: Option<Row>) {
        match row.filter(|row| row.seq == seq) {
            Some(Row { entry, .. }) => self.add(Summand { seq, parent, name, entry: &entry }),
            None => self.pass(seq),
        }
    }

    /// Goes past a tombstone.
    pub(super) fn pass(&mut self, place: Seq) {
        self.upto = self.upto.max(place);
    }

    /// Adds the sum of later places.
    pub(super) fn join(&mut self, later: &Self) {
        for (lane, more) in self.lanes.iter_mut().zip(later.lanes.iter()) {
            *lane = lane.wrapping_add(*more);
        }
        self.rows = self.rows.wrapping_add(later.rows);
        self.upto = later.upto;
    }

    pub(super) fn subtract(&mut self, place: Summand<'_>) {
        self.combine(place, u16::wrapping_sub);
        self.rows = self.rows.wrapping_sub(1);
    }

    fn combine(&mut self, place: Summand<'_>, with: fn(u16, u16) -> u16) {
        let hash = place.lanes();
        for (lane, bytes) in self.lanes.iter_mut().zip(hash.as_chunks().0) {
            *lane = with(*lane, u16::from_le_bytes(*bytes));
        }
    }

    /// Whether both are the sum of the same places.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (self.rows, &self.lanes) == (other.rows, &other.lanes)
    }

    /// What the log is, when this is the sum of all of it.
    pub(super) fn digest(&self, log_id: u64, head: Seq) -> LogDigest {
        let mut hasher = blake3::Hasher::new();
        for lane in self.lanes.iter() {
            hasher.update(&lane.to_le_bytes());
        }
        hasher.update(&self.rows.to_le_bytes());
        LogDigest { log_id, head, rows: self.rows, digest: *hasher.finalize().as_bytes() }
    }

    /// Place and number of rows (each 8 bytes, big-endian), then the numbers, little-endian.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + LANE_BYTES);
        bytes.extend_from_slice(&self.upto.0.to_be_bytes());
        bytes.extend_from_slice(&self.rows.to_be_bytes());
        self.lanes.iter().for_each(|lane| bytes.extend_from_slice(&lane.to_le_bytes()));
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (upto, rest) = bytes.split_first_chunk()?;
        let (rows, rest) = rest.split_first_chunk()?;
        let (lanes, []) = rest.as_chunks() else { return None };
        let lanes: Vec<u16> = lanes.iter().map(|b| u16::from_le_bytes(*b)).collect();
        Some(Self {
            upto: Seq(u64::from_be_bytes(*upto)),
            rows: u64::from_be_bytes(*rows),
            lanes: lanes.try_into().ok()?,
        })
    }
}

/// What a look at a log found.
enum Summed {
    /// Not all yet.
    Part,
    /// Rows are still to go of which the log says nothing any more.
    Unsettled,
    All(LogDigest),
}

/// The sum of some places after those of another sum, made while nobody waited for it.
struct Ahead {
    after: Seq,
    places: Vec<Seq>,
    sum: Sum,
}

impl Index {
    /// What the location's log is now; `None` while a sweep has rows left to remove, of which
    /// devices with the same head have removed different ones. The first call reads every row;
    /// later ones those that are new.
    pub fn digest(&self, no: LocationNo) -> Result<Option<LogDigest>, IndexError> {
        loop {
            let ahead = self.sum_ahead(no)?;
            match self.write(|tx| sum_up(tx, no, ahead))? {
                Summed::Part => {}
                Summed::Unsettled => return Ok(None),
                Summed::All(digest) => return Ok(Some(digest)),
            }
        }
    }

    /// Forgets what the log adds up to, so that it is added up anew.
    pub(super) fn forget_sum(&self, no: LocationNo) -> Result<(), IndexError> {
        self.write(|tx| {
            tx.batch.delete(Table::Meta, key::sum(no));
            Ok(())
        })
    }

    /// The next places, if they are many: their rows are read and hashed without keeping other
    /// writers from theirs.
    fn sum_ahead(&self, no: LocationNo) -> Result<Option<Ahead>, IndexError> {
        let snapshot = self.store().snapshot()?;
        let sum = snapshot.get(Table::Meta, &key::sum(no))?;
        let after = sum.and_then(|bytes| Sum::from_bytes(&bytes)).unwrap_or_default().upto;
        let head = self.head(no);
        let places = read::log_places(&*snapshot, no, after, head, COMMIT_ROWS)?;
        if places.len() <= FEW_ROWS {
            return Ok(None);
        }
        let mut sum = Sum::default();
        for (seq, parent, name) in &places {
            let row = read::row(&*snapshot, no, *parent, name.as_bytes())?;
            sum.add_row((*seq, *parent, name), row);
        }
        let places = places.into_iter().map(|(seq, ..)| seq).collect();
        Ok(Some(Ahead { after, places, sum }))
    }
}

fn sum_up(tx: &mut Tx<'_>, no: LocationNo, ahead: Option<Ahead>) -> Result<Summed, IndexError> {
    if !is_settled(tx, no)? {
        return Ok(Summed::Unsettled);
    }
    if let Some(ahead) = ahead {
        take_over(tx, no, ahead)?;
        return Ok(Summed::Part);
    }
    Ok(match sum_some(tx, no, COMMIT_ROWS)? {
        Some(digest) => Summed::All(digest),
        None => Summed::Part,
    })
}

/// Adds what was summed up ahead, if it is still so: what a place has never changes, but a place
/// may have gone.
fn take_over(tx: &mut Tx<'_>, no: LocationNo, ahead: Ahead) -> Result<(), IndexError> {
    let mut sum = tx.sum(no)?.unwrap_or_default();
    let head = tx.state(no)?.head;
    let places = read::log_places(tx, no, ahead.after, head, ahead.places.len())?;
    let is_same = sum.upto == ahead.after && places.iter().map(|(seq, ..)| seq).eq(&ahead.places);
    match is_same {
        true => {
            sum.join(&ahead.sum);
            tx.put_sum(no, sum);
        }
        // So that there is an end, however many changes there are.
        false => drop(sum_some(tx, no, FEW_ROWS)?),
    }
    Ok(())
}

/// Adds at most `limit` places to the sum; what the log is, once it has all.
pub(super) fn sum_some(
    tx: &mut Tx<'_>,
    no: LocationNo,
    limit: usize,
) -> Result<Option<LogDigest>, IndexError> {
    let state = tx.state(no)?;
    let (log_id, head) = (state.log_id, state.head);
    // One that has more than there is was of another log.
    let known = tx.sum(no)?.filter(|sum| sum.upto <= head);
    let mut sum = known.unwrap_or_default();
    if sum.upto < head {
        // After a rewind there are places beyond the head, which are about to come again.
        let places = read::log_places(tx, no, sum.upto, head, limit)?;
        for (seq, parent, name) in &places {
            let row = tx.row(Place { no, parent: *parent, name })?;
            sum.add_row((*seq, *parent, name), row);
        }
        if places.len() < limit {
            sum.upto = head;
        }
        tx.put_sum(no, sum.clone());
    }
    Ok((sum.upto == head).then(|| sum.digest(log_id, head)))
}

/// Whether no sweep has anything left to do in it, as far as that was decided.
pub(super) fn is_settled(from: &dyn Snapshot, no: LocationNo) -> Result<bool, IndexError> {
    let mut settled = true;
    read::scan_prefix(from, Table::Orphans, &key::location(no), &mut |_, value| {
        settled = !matches!(decode(value, "an orphan")?, Orphan::Doomed);
        Ok(if settled { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(settled)
}
