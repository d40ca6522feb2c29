//! What the outbox writes into the journal.
//!
//! A later record of the same operation replaces the earlier one, as when a
//! file is written again before it was sent. The bytes that only the journal
//! holds (`fill`) belong to the draft and count with every record of it.

use crate::model::{DeviceId, LocationId, Name, Time};
use crate::ops::{Change, New, NewContent, Outcome};
use crate::outbox::ConflictRecord;
use crate::staging::Snapshot;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// One record of the journal.
#[derive(Serialize, Deserialize, Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and most are the largest")]
pub(super) enum Record<'a> {
    /// The first of a journal, and of every checkpoint.
    Begin { epoch: u64, next_no: u64 },
    /// An operation was accepted, or changed before it was sent.
    Op(Cow<'a, OpRecord>),
    /// Bytes of a draft that are in no file yet.
    Fill { draft: u64, at: u64, bytes: Bytes },
    /// An operation was answered for good.
    Settled { no: u64, at: Time, outcome: Cow<'a, Outcome> },
    /// An operation was taken back, or replaced by another, before its owner did anything.
    Dropped { no: u64 },
    /// Two changes met.
    Conflict(Cow<'a, ConflictRecord>),
    /// A person has looked at it.
    Resolved { id: u64 },
    /// What an operation says is not what it last said, because that record was damaged.
    Damaged { no: u64 },
}

/// An accepted operation.
#[derive(Clone, Serialize, Deserialize, Debug)]
pub(super) struct OpRecord {
    pub no: u64,
    pub owner: DeviceId,
    pub location: LocationId,
    /// Whose file ids these are.
    pub log_id: u64,
    /// Without what `snapshot` says: extents, digest, bytes.
    pub change: Change,
    /// Of what is moved or removed.
    pub is_directory: bool,
    /// Under which generation this device shows the file; 0: the operation makes no version.
    pub generation: u32,
    /// The bytes of a new or changed file; `None` where it has none.
    pub snapshot: Option<Snapshot>,
    pub at: Time,
    /// Below the location's folder.
    pub path: Vec<Name>,
}

impl Record<'_> {
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("every type here is of a form that postcard knows")
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

/// The content of a change.
pub(super) fn content_mut(change: &mut Change) -> Option<&mut NewContent> {
    match change {
        Change::Create { what: New::File(content), .. } | Change::Write { content, .. } => {
            Some(content)
        }
        _ => None,
    }
}

/// What is journaled of a content; the rest comes from the snapshot when it is sent.
pub(super) fn content(snapshot: Option<&Snapshot>, mtime: Time) -> NewContent {
    NewContent {
        size: snapshot.map_or(0, |s| s.size),
        mtime,
        kept_bytes: snapshot.map_or(0, needed_of_base),
        extents: Vec::new(),
        digest: [0; 32],
        whole: None,
        inline: None,
    }
}

/// How much of the base is needed: nothing when all that stays of it was written over.
fn needed_of_base(snapshot: &Snapshot) -> u64 {
    let mut covered = 0;
    for extent in snapshot.extents.iter() {
        if extent.at > covered {
            break;
        }
        covered = extent.at + extent.len;
    }
    if covered >= snapshot.kept_bytes { 0 } else { snapshot.kept_bytes }
}

/// The change in one word, for people.
pub(super) fn word(change: &Change) -> &'static str {
    match change {
        Change::Create { what: New::Directory, .. } => "mkdir",
        Change::Create { what: New::Symlink(_), .. } => "symlink",
        Change::Create { .. } => "create",
        Change::Write { .. } => "write",
        Change::Link { .. } => "link",
        Change::Rename { exchange: true, .. } => "exchange",
        Change::Rename { .. } => "rename",
        Change::Unlink { .. } => "delete",
        Change::Rmdir { .. } => "rmdir",
        Change::SetAttr { .. } => "attributes",
        Change::Xattr { .. } => "attribute",
    }
}
