//! Drafts: the bytes that programs of this device wrote to other devices' files.
//!
//! Owns its directory: a file `<2 hex>/<16 hex>` for each draft that is not short enough to be in
//! memory. A draft is a log of bytes, and a map says which of them are where in the file that is
//! written to:
//!
//! | module | what it is |
//! |---|---|
//! | `map` | what each byte of the file is: written, the base's, or zero |
//! | `body` | the bytes themselves: in memory, or in the draft's file |
//! | `draft` | one draft: writes, commits, snapshots |
//! | `store` | all drafts: their files, the space they take |
//!
//! **What never changes.** Bytes of a committed state are not written over: what replaces them
//! goes to new space, behind all others. So a crash shows one committed state or another, never
//! a mix, and a place in the draft's file has the same bytes for ever: two states that name the
//! same place have the same bytes. Only what was written since the last commit is overwritten.
//!
//! **What is durable when.** The caller keeps [`Committed`] in its journal. Few new bytes go there
//! too and need no sync here, nor even a file; many are synced here first.
//!
//! **Space.** What no state needs any more is punched out of the draft's file. A state is needed
//! until it is released, because a journal may name it after a crash: forgetting to release costs
//! space, not bytes.

mod body;
mod draft;
mod map;
mod store;

#[cfg(test)]
mod tests;

pub use draft::Draft;
pub use store::Staging;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// What must stay free on the disk, unless set otherwise.
pub const MIN_FREE_BYTES: u64 = 256 << 20;

/// What drafts may have in memory together, unless set otherwise.
pub const MEMORY_BYTES: u64 = 16 << 20;

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

/// The file of a draft, and what of it a power failure may take.
#[cfg(test)]
#[derive(Clone, Debug)]
pub(crate) struct OnDisk {
    pub draft: DraftId,
    pub bytes: Vec<u8>,
    /// What the disk may not have.
    pub volatile: Vec<Range<u64>>,
    /// Nor the name.
    pub is_unnamed: bool,
}

impl Extent {
    /// Where it ends in the file.
    fn end(&self) -> u64 {
        self.at + self.len
    }

    /// Where its bytes are in the draft's own file.
    fn stored(&self) -> Range<u64> {
        self.stored_at..self.stored_at + self.len
    }
}

impl Snapshot {
    /// Whether it keeps the bounds that its fields tell of.
    fn is_valid(&self) -> bool {
        let sound = |e: &Extent| {
            let fits =
                |at: u64| at.checked_add(e.len).is_some_and(|end| i64::try_from(end).is_ok());
            e.len > 0 && fits(e.at) && fits(e.stored_at)
        };
        self.kept_bytes <= self.size
            && self.extents.iter().all(sound)
            && self.extents.windows(2).all(|w| w[0].end() <= w[1].at)
            && self.extents.last().is_none_or(|e| e.end() <= self.size)
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
