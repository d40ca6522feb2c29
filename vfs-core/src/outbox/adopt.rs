//! Bytes that were written here stay readable here when they are delivered.
//!
//! Before a draft goes, its bytes are put into the content cache, as those of
//! the owner's row: a file that a person has just written does not come back
//! over the network, nor goes away with its owner. Only a whole file whose staged
//! bytes still have their id; what the cache has no room for is fetched when it
//! is read.

use super::{OpBytes, Outbox};
use crate::content::cache::Key;
use crate::content::manifest::GROUP_BYTES;
use crate::model::{ContentId, LocationId};
use crate::source::Version;
use crate::staging::Snapshot;

/// Copied at a time, in whole groups.
const STEP_BYTES: u64 = 64 * GROUP_BYTES;
/// Larger files are fetched when they are read: copying one would keep a disk busy for long.
const LARGEST_BYTES: u64 = 256 << 20;

/// What goes into the cache.
pub(super) struct Whole {
    pub bytes: OpBytes,
    pub snapshot: Snapshot,
    pub version: Version,
    pub id: ContentId,
}

impl Whole {
    /// An operation's bytes, if they are a whole file that is worth keeping.
    pub fn of(
        location: LocationId,
        applied: &crate::ops::Applied,
        bytes: Option<&OpBytes>,
        snapshot: Option<&Snapshot>,
        whole: Option<ContentId>,
    ) -> Option<Self> {
        let (bytes, snapshot, id) = (bytes?.clone(), snapshot?.clone(), whole?);
        let (file, stamp) = (applied.file?, applied.version?);
        let is_fit = (1..=LARGEST_BYTES).contains(&snapshot.size) && stamp.size == snapshot.size;
        let version = Version { location, file, stamp, content: Some(id) };
        let snapshot = Snapshot { kept_bytes: 0, ..snapshot };
        is_fit.then_some(Self { bytes, snapshot, version, id })
    }
}

impl Outbox {
    /// Puts a delivered file into the cache.
    pub(super) fn adopt(&self, whole: &Whole) {
        let Some(content) = self.content.get() else { return };
        let Whole { bytes, snapshot, id, .. } = whole;
        let Some(version) = self.row_of(whole) else { return };
        let cached = content.shared_cache().file(Key::of(&version), snapshot.size);
        if cached.is_full() {
            return;
        }
        // The disk may have changed them since they were sent.
        let digest = bytes.draft.digest(snapshot);
        if digest.ok().and_then(|(_, now)| now) != Some(*id) {
            return;
        }
        let mut at = 0;
        while at < snapshot.size {
            let end = snapshot.size.min(at + STEP_BYTES);
            let Ok(step) = read(bytes, snapshot, at..end) else { return };
            if !cached.write(at, &step) {
                return;
            }
            at = end;
        }
        cached.save();
    }

    /// The version as the index has it: hashed by its owner, or not yet; `None` when the owner
    /// has another one by now.
    fn row_of(&self, whole: &Whole) -> Option<Version> {
        let Version { location, file, stamp, .. } = whole.version;
        let no = self.index.location_by_id(location)?.no;
        let row = self.index.view().ok()?.node(no, file).ok()??.entry;
        let now = row.stamp();
        let is_ours = match row.content {
            Some(content) => content == whole.id,
            None => {
                (now.disk_ino, now.size, now.mtime) == (stamp.disk_ino, stamp.size, stamp.mtime)
            }
        };
        is_ours.then_some(Version { location, file, stamp: now, content: row.content })
    }
}

/// A range of a snapshot that has no base: what no extent covers is zero.
fn read(
    bytes: &OpBytes,
    snapshot: &Snapshot,
    range: std::ops::Range<u64>,
) -> std::io::Result<Vec<u8>> {
    let mut all = vec![0; (range.end - range.start) as usize];
    let first = snapshot.extents.partition_point(|e| e.at + e.len <= range.start);
    for extent in &snapshot.extents[first..] {
        if extent.at >= range.end {
            break;
        }
        let part = extent.at.max(range.start)..(extent.at + extent.len).min(range.end);
        let to = (part.start - range.start) as usize..(part.end - range.start) as usize;
        all[to].copy_from_slice(&bytes.draft.snapshot_read(snapshot, part)?);
    }
    Ok(all)
}
