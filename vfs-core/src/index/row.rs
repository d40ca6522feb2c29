//! Values: what the store keeps under a key, encoded with postcard.
//!
//! Their form belongs to the store's format number ([`super::store::FORMAT`]):
//! whoever changes a type here raises it.

use super::{Counts, IndexError};
use crate::model::{DeviceId, Entry, FileId, LocationId, Seq};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A row of Entries.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Row {
    /// The place of its last change in the log.
    pub(super) seq: Seq,
    pub(super) entry: Entry,
}

/// A row of Locations.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LocationRecord {
    pub(super) id: LocationId,
    pub(super) owner: DeviceId,
    pub(super) name: String,
    /// Bytes of the path: a path need not be UTF-8.
    pub(super) root: Option<Vec<u8>>,
    pub(super) read_only: bool,
    pub(super) shared_with: Option<Vec<DeviceId>>,
    /// Its rows are being removed.
    pub(super) removing: bool,
}

/// What changes with every commit in a location; kept in Meta, in the same batch as the rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) log_id: u64,
    /// The last sequence number given or applied.
    pub(super) head: Seq,
    /// The last file id given; of own locations.
    pub(super) last_file: u64,
    /// How many rows Tombstones has, so that a first scan need not look there.
    pub(super) tombstones: u64,
    /// A reset of the replica was begun and not ended.
    pub(super) resetting: bool,
    pub(super) counts: Counts,
}

impl State {
    /// The state of an own location that has nothing yet. Its ids begin somewhere else than
    /// those of the log before it, should there have been one: a writer that was away for long
    /// must not mean another file by an old id.
    pub(super) fn begin(log_id: u64) -> Self {
        // Far below the ids that writers draw, with room for 2^38 files.
        let first = FileId::ROOT.0 + (log_id >> 26);
        Self { last_file: first, ..Self::new(log_id) }
    }

    /// The state of a location that has nothing yet.
    pub(super) fn new(log_id: u64) -> Self {
        Self { log_id, last_file: FileId::ROOT.0, ..Self::default() }
    }
}

/// A row of Orphans.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Orphan {
    /// It lost its last name, and gets its id back should it appear elsewhere.
    Lost(Entry),
    /// A directory that never returns: the rows in it are to be removed.
    Doomed,
}

pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("every type here is of a form that postcard knows")
}

pub(super) fn decode<T: DeserializeOwned>(
    bytes: &[u8],
    what: &'static str,
) -> Result<T, IndexError> {
    postcard::from_bytes(bytes).map_err(|_| IndexError::DamagedRow(what))
}

/// From the bytes of [`LocationRecord::root`].
pub(super) fn path_from(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(bytes).into()
}

/// For [`LocationRecord::root`].
pub(super) fn path_bytes(path: &std::path::Path) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().to_vec()
}
