//! What the outbox says to people and to delivery.

use crate::model::{DeviceId, LocationId, LocationNo, Name, Time};
use crate::ops::{Conflict, MAX_EXTENTS};
use crate::staging::{MEMORY_BYTES, MIN_FREE_BYTES};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Settings of writing to other devices' files.
#[derive(Clone, Debug)]
pub struct OutboxConfig {
    /// Free bytes of the disk that staging leaves to others; less is `NoSpace` to the writer.
    pub min_free_bytes: u64,
    /// Bytes of small files that wait in memory, where the journal has them too, and not in files
    /// of their own.
    pub memory_bytes: u64,
    /// How long a new file waits for its first close before it travels without its bytes.
    pub hold_back: std::time::Duration,
    /// How long a writer that wants its owner to have everything waits for its answer.
    pub owner_deadline: std::time::Duration,
    /// How many separate ranges one operation may have, at most [`MAX_EXTENTS`].
    pub max_ranges: usize,
}

impl Default for OutboxConfig {
    fn default() -> Self {
        let seconds = std::time::Duration::from_secs;
        Self {
            min_free_bytes: MIN_FREE_BYTES,
            memory_bytes: MEMORY_BYTES,
            hold_back: seconds(2),
            owner_deadline: seconds(10),
            max_ranges: MAX_EXTENTS,
        }
    }
}

/// What was found when the outbox was opened.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Operations that still wait.
    pub pending: usize,
    /// Bytes of drafts that nothing refers to any more, removed.
    pub orphan_bytes: u64,
    /// The journal ended in a record that was never acknowledged.
    pub torn_tail: bool,
    /// Parts of the journal that were damaged and set aside, for people to look at.
    pub set_aside: Vec<PathBuf>,
    /// Operations that could not be understood or whose bytes are missing, in words.
    pub lost: Vec<String>,
}

/// Why there is no outbox.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// Its disk failed.
    #[error("cannot use the outbox in {path}: {source}")]
    Io {
        /// Its directory.
        path: PathBuf,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A newer program wrote it.
    #[error("the outbox in {path} was written by a newer version")]
    NewerFormat {
        /// Its directory.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("the outbox in {path} is in use")]
    InUse {
        /// Its directory.
        path: PathBuf,
    },
}

/// In which stream an operation travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lane {
    /// In order: operations whose bytes, if any, travel inside.
    Small,
    /// One at a time: operations whose bytes the owner pulls.
    Bulk,
}

/// An operation that its owner has not settled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pending {
    /// Its number.
    pub no: u64,
    /// Who is to do it.
    pub owner: DeviceId,
    /// In which location.
    pub location_id: LocationId,
    /// This device's number of the location; `None` once that was removed.
    pub location: Option<LocationNo>,
    /// The path when it was asked for, below the location's folder.
    pub path: Vec<Name>,
    /// What, in one word: `create`, `write`, `rename`, …
    pub what: String,
    /// Written bytes that travel.
    pub bytes: u64,
    /// When it was asked for.
    pub since: Time,
    /// How often it was sent.
    pub attempts: u32,
    /// Why it is still here.
    pub state: PendingState,
    /// It will not go by itself any more, as it stands.
    pub stuck: bool,
}

/// What waits for one owner, in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Backlog {
    /// Whose.
    pub owner: DeviceId,
    /// Operations.
    pub operations: u64,
    /// Written bytes that travel with them.
    pub bytes: u64,
    /// Those of them that will not go by themselves any more.
    pub stuck: u64,
    /// When the oldest was asked for.
    pub since: Time,
}

/// Space on this device's disk that writing to others takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Of the journal, its spare space included.
    pub journal_bytes: u64,
    /// Of staged bytes.
    pub staged_bytes: u64,
}

/// What an operation makes, for who exports it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Exported {
    /// A regular file, or new bytes of one.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Symlink(Box<[u8]>),
    /// Nothing that has bytes of its own: a rename, a delete, an attribute.
    Nothing,
}

/// Why an operation is still pending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PendingState {
    /// For its owner to be reachable, or for its turn.
    Waiting,
    /// It was sent; the answer has not come.
    Sent,
    /// A file that was made is still being written.
    Held,
    /// Its owner cannot, or will not, do it, for this reason; it can be exported.
    Blocked(String),
}

/// A meeting of two changes, for a person to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConflictRecord {
    /// Names it in [`super::Outbox::resolve`].
    pub id: u64,
    /// When it was learned.
    pub at: Time,
    /// Whose location it is.
    pub owner: DeviceId,
    /// In which location.
    pub location: LocationId,
    /// The path as the writer knew it.
    pub path: Vec<Name>,
    /// What was asked for, in one word.
    pub what: String,
    /// How it ended.
    pub ended: Conflict,
}
