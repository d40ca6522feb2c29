//! What becomes of writes that no owner takes: their bytes are given to a person, as files.
//!
//! Nothing is dropped by being exported. [`Outbox::forget`] drops what a person
//! says is no longer wanted, together with what builds on it.

use super::deliver::version_row;
use super::queue::State;
use super::record::Record;
use super::{Exported, Outbox};
use crate::content::Reader;
use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, LocationId};
use crate::ops::{Base, Change, New};
use crate::staging::{Draft, Snapshot};
use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Copied at a time.
const STEP_BYTES: u64 = 1 << 20;

impl Outbox {
    /// What an operation that waits makes; `None` when it does not wait any more.
    pub fn makes(&self, no: u64) -> Option<Exported> {
        let state = self.state();
        Some(match &state.ops.get(&no)?.record.change {
            Change::Create { what: New::File(_), .. } | Change::Write { .. } => Exported::File,
            Change::Create { what: New::Directory, .. } => Exported::Directory,
            Change::Create { what: New::Symlink(target), .. } => Exported::Symlink(target.clone()),
            _ => Exported::Nothing,
        })
    }

    /// Writes the file that an operation would leave into `to`, which is empty. Gives the ranges
    /// that it does not change and that nobody has: they are holes there.
    pub async fn export(&self, no: u64, to: &File) -> FsResult<Vec<Range<u64>>> {
        let gone = || FsError::new(Kind::NotFound, "export an operation that waits no more");
        let (bytes, under) = {
            let state = self.state();
            let op = state.ops.get(&no).ok_or_else(gone)?;
            let bytes = op.bytes.as_ref().zip(op.record.snapshot.as_ref());
            let bytes = bytes.map(|(b, s)| (Arc::clone(&b.draft), s.clone()));
            (bytes, under(&state, no))
        };
        // Made, and nothing written into it yet.
        let Some((draft, snapshot)) = bytes else { return Ok(Vec::new()) };
        to.set_len(snapshot.size).map_err(|e| FsError::os("export a file", e))?;
        copy_written(&draft, &snapshot, to)?;
        let reader = under.and_then(|(location, entry)| self.reader_of(location, &entry));
        copy_kept(reader.as_ref(), &kept(&snapshot), to).await
    }

    fn reader_of(&self, location: LocationId, entry: &Entry) -> Option<Reader> {
        let location = self.index.location_by_id(location)?;
        self.content.get()?.open(location.no, entry).ok()
    }

    /// Drops operations, and those that build on them, for good; those that may be under way at
    /// this moment stay. How many were dropped.
    pub fn forget(&self, operations: &[u64]) -> FsResult<usize> {
        let mut state = self.state();
        let mut all = BTreeSet::new();
        let mut open = operations.to_vec();
        while let Some(no) = open.pop() {
            if state.ops.contains_key(&no) && all.insert(no) {
                open.extend(state.order.needed_by(no));
            }
        }
        let is_sent = |no: &u64| state.ops.get(no).is_some_and(|op| op.progress.is_sent());
        all.retain(|no| !is_sent(no));
        let mut last = None;
        // From the last to the first: what the end of this process leaves builds on nothing lost.
        for no in all.iter().rev() {
            last = Some(self.note_reserved(&mut state, &Record::Dropped { no: *no })?);
            if let Some(op) = state.remove(*no) {
                self.unshow(&mut state, op);
            }
        }
        drop(state);
        if let Some(last) = last {
            self.sync_upto(last)?;
        }
        self.settled.send_modify(|n| *n = n.wrapping_add(1));
        Ok(all.len())
    }
}

/// The version over which an operation, and those of this device before it, wrote.
fn under(state: &State, no: u64) -> Option<(LocationId, Entry)> {
    let record = &state.ops.get(&no)?.record;
    let mut at = record;
    loop {
        let Change::Write { file, base, .. } = &at.change else { return None };
        match base {
            Base::Seen { stamp, content } => {
                let row = version_row(*file, record.generation, stamp, *content);
                return Some((record.location, row));
            }
            // Numbers only get smaller on the way.
            Base::After(earlier) if *earlier < at.no => at = &state.ops.get(earlier)?.record,
            Base::After(_) => return None,
        }
    }
}

fn copy_written(draft: &Draft, snapshot: &Snapshot, to: &File) -> FsResult<()> {
    for extent in snapshot.extents.iter() {
        for step in steps(extent.at..extent.at + extent.len) {
            let bytes = draft.snapshot_read(snapshot, step.clone());
            let bytes = bytes.map_err(|e| FsError::os("read staged bytes", e))?;
            to.write_all_at(&bytes, step.start).map_err(|e| FsError::os("export a file", e))?;
        }
    }
    Ok(())
}

/// Copies what the operation leaves as it was; the first failure ends it, since the next would
/// wait as long for the same answer.
async fn copy_kept(
    reader: Option<&Reader>,
    kept: &[Range<u64>],
    to: &File,
) -> FsResult<Vec<Range<u64>>> {
    let mut missing = Vec::new();
    for range in kept {
        for step in steps(range.clone()) {
            let read = match reader {
                Some(reader) if missing.is_empty() => {
                    reader.read(step.start, (step.end - step.start) as usize).await.ok()
                }
                _ => None,
            };
            match read {
                Some(bytes) => to
                    .write_all_at(&bytes, step.start)
                    .map_err(|e| FsError::os("export a file", e))?,
                None => push_merged(&mut missing, step),
            }
        }
    }
    Ok(missing)
}

fn push_merged(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

/// The ranges of a snapshot that are the base's.
fn kept(snapshot: &Snapshot) -> Vec<Range<u64>> {
    let end = snapshot.kept_bytes.min(snapshot.size);
    let (mut kept, mut at) = (Vec::new(), 0);
    for extent in snapshot.extents.iter() {
        if at < extent.at.min(end) {
            kept.push(at..extent.at.min(end));
        }
        at = at.max(extent.at + extent.len);
    }
    if at < end {
        kept.push(at..end);
    }
    kept
}

fn steps(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let starts = (range.start..end).step_by(STEP_BYTES as usize);
    starts.map(move |start| start..end.min(start + STEP_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::staging::{DraftId, Extent};

    fn snapshot(size: u64, kept_bytes: u64, written: &[Range<u64>]) -> Snapshot {
        let extent = |r: &Range<u64>| Extent { at: r.start, len: r.end - r.start, stored_at: 0 };
        let extents: Vec<_> = written.iter().map(extent).collect();
        Snapshot { draft: DraftId(1), size, kept_bytes, extents: extents.into() }
    }

    #[test]
    fn what_was_not_written_below_the_kept_end_is_the_bases() {
        assert_eq!(kept(&snapshot(10, 10, &[])), [0..10]);
        assert_eq!(kept(&snapshot(10, 0, &[2..4])), []);
        assert_eq!(kept(&snapshot(20, 10, &[2..4, 6..15])), [0..2, 4..6]);
        assert_eq!(kept(&snapshot(20, 10, &[0..3, 12..15])), [3..10]);
        assert_eq!(kept(&snapshot(5, 10, &[])), [0..5]);
    }

    #[test]
    fn steps_cover_a_range_and_missing_neighbours_are_one() {
        let all: Vec<_> = steps(3..2 * STEP_BYTES + 5).collect();
        assert_eq!(all.len(), 3);
        let mut merged = Vec::new();
        all.into_iter().for_each(|step| push_merged(&mut merged, step));
        assert_eq!(merged, [3..2 * STEP_BYTES + 5]);
    }
}
