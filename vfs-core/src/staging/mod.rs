//! Drafts: the bytes that programs of this device wrote to other devices' files.

use crate::error::FsResult;
use crate::model::ContentId;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// What must stay free on the disk, unless set otherwise.
pub const MIN_FREE_BYTES: u64 = 256 << 20;

/// The number of a draft, for ever.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct DraftId(pub u64);

/// A written range, and where its bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Extent {
    /// Where it is in the file.
    pub at: u64,
    /// Its bytes.
    pub len: u64,
    /// Where they are in the draft's own file.
    pub stored_at: u64,
}

/// One committed state of a draft. It never changes, and stays readable until it is released,
/// however the draft goes on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of which draft.
    pub draft: DraftId,
    /// Bytes of the file then.
    pub size: u64,
    /// Below this, what no extent covers is the base's; above it zero.
    pub kept_bytes: u64,
    /// What was written over the base: in order, disjoint, none empty, none beyond `size`.
    #[serde(with = "as_slice")]
    pub extents: Arc<[Extent]>,
}

/// A commit.
#[derive(Clone, Debug)]
pub struct Committed {
    /// The state.
    pub snapshot: Snapshot,
    /// Where in the draft's own file which bytes are that the disk may not have yet: the caller
    /// keeps them with the snapshot and gives both to [`Staging::restore`].
    pub fill: Vec<(u64, Bytes)>,
}

/// A part of a file as a program reads it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Piece {
    /// These bytes.
    Here(Bytes),
    /// The base's bytes of this range.
    Base(Range<u64>),
    /// So many zeros.
    Zero(u64),
}

/// All drafts of this device.
#[derive(Debug)]
pub struct Staging {}

/// The changed bytes of one file.
#[derive(Debug)]
pub struct Draft {}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Staging {
    /// Opens the drafts of a directory, which is made if need be.
    pub fn open(dir: &Path) -> FsResult<Arc<Self>> {
        unimplemented!()
    }

    /// Sets how much must stay free on the disk ([`MIN_FREE_BYTES`]); writes beyond fail with
    /// [`crate::error::Kind::NoSpace`].
    pub fn set_min_free_bytes(&self, bytes: u64) {
        unimplemented!()
    }

    /// A draft over a base of this size, all of which is kept.
    pub fn create(&self, base_size: u64) -> FsResult<Arc<Draft>> {
        unimplemented!()
    }

    /// A draft as it was committed. After a restart this is called for every snapshot that is
    /// still needed, those of one draft in the order of their commits: the last is its state, the
    /// earlier ones stay readable.
    pub fn restore(&self, snapshot: &Snapshot, fill: &[(u64, Bytes)]) -> FsResult<Arc<Draft>> {
        unimplemented!()
    }

    /// Removes a draft and all its bytes.
    pub fn remove(&self, id: DraftId) {
        unimplemented!()
    }

    /// Removes the drafts that nobody needs, as a crash leaves them; gives their bytes.
    pub fn remove_all_but(&self, needed: &HashSet<DraftId>) -> FsResult<u64> {
        unimplemented!()
    }

    /// Bytes on disk.
    pub fn used_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Makes every commit until now durable in the drafts' own files: no fill given until now
    /// needs to be kept any more.
    pub fn sync(&self) -> FsResult<()> {
        unimplemented!()
    }
}

#[allow(clippy::unimplemented, unused_variables, missing_docs)]
impl Draft {
    /// Its number.
    pub fn id(&self) -> DraftId {
        unimplemented!()
    }

    /// Writes all bytes, or fails and changes nothing.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()> {
        unimplemented!()
    }

    /// What a range holds, in order, up to the end of the file.
    pub fn read(&self, offset: u64, len: u64) -> FsResult<Vec<Piece>> {
        unimplemented!()
    }

    /// Cuts the file, or lengthens it with zeros.
    pub fn set_size(&self, size: u64) -> FsResult<()> {
        unimplemented!()
    }

    /// Makes a range zero, within the size.
    pub fn zero(&self, range: Range<u64>) -> FsResult<()> {
        unimplemented!()
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        unimplemented!()
    }

    /// Whether anything changed since the last commit.
    pub fn is_dirty(&self) -> bool {
        unimplemented!()
    }

    /// Makes the present state one that survives, together with what the caller keeps of it. Up
    /// to `inline_max` bytes that the disk may not have yet are given back as fill; are there
    /// more, then all are made durable here and the fill is empty.
    pub fn commit(&self, inline_max: u64) -> FsResult<Committed> {
        unimplemented!()
    }

    /// Reads a snapshot's bytes; the range (of the file) lies within one extent.
    pub fn snapshot_read(&self, snapshot: &Snapshot, range: Range<u64>) -> io::Result<Bytes> {
        unimplemented!()
    }

    /// The snapshot is the owner's version now, and so the base of what follows: later commits
    /// list only what differs from it.
    pub fn delivered(&self, snapshot: &Snapshot) {
        unimplemented!()
    }

    /// Nobody needs this snapshot any more, also not after a crash: the space of what was
    /// written over since is freed. Every snapshot is kept until then.
    pub fn release(&self, snapshot: &Snapshot) {
        unimplemented!()
    }

    /// BLAKE3 of the extents' bytes, and of all bytes of the file where that needs no base and
    /// the holes are small.
    pub fn digest(&self, snapshot: &Snapshot) -> io::Result<([u8; 32], Option<ContentId>)> {
        unimplemented!()
    }
}

/// Serde's own support of `Arc` is a feature that nothing else here needs.
mod as_slice {
    use super::{Arc, Deserialize, Extent, Serialize};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(
        extents: &Arc<[Extent]>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        extents.as_ref().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<[Extent]>, D::Error> {
        Vec::deserialize(from).map(Arc::from)
    }
}
