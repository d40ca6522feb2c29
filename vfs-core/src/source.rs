//! What this crate needs from a network: bytes of a version, from a holder.
//!
//! `sync` implements [`ContentSource`]; a source transports and never judges:
//! which holder is asked, and whether the bytes are right, is decided here in
//! `vfs-core` ([`crate::content`]).

use crate::model::{ContentId, DeviceId, Entry, FileId, LocationId, Stamp};
use crate::ops::bounded;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

/// A boxed future, so that the trait can be an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One version of a file at one holder.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// Where the holder has it.
    pub location: LocationId,
    /// Which file of the location.
    pub file: FileId,
    /// The version of its bytes, as the owner's disk tells them apart.
    pub stamp: Stamp,
    /// The id of its bytes, once hashed.
    pub content: Option<ContentId>,
}

impl Version {
    /// That of a file as a row of its location has it.
    pub fn of(location: LocationId, entry: &Entry) -> Self {
        let (file, stamp, content) = (entry.file_id, entry.stamp(), entry.content);
        Self { location, file, stamp, content }
    }
}

/// Bytes of a range, with what proves them.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Exactly the bytes of the range asked for.
    pub bytes: Bytes,
    /// Chaining values that lead from these bytes to the content id
    /// ([`crate::content::manifest`]); empty when the content id was not asked for.
    pub proof: Vec<[u8; 32]>,
}

/// Why a holder gave no bytes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// It is offline, or did not answer within its deadline.
    #[error("the device cannot be reached")]
    Unreachable,
    /// It is there, but cannot give it now: its disk is away, or what it would lend has to be read
    /// for it first.
    #[error("the device cannot give it now")]
    NotNow,
    /// It no longer has this version.
    #[error("the device no longer has this version")]
    Stale,
    /// It does not let this device read the location, or does not know the file.
    #[error("the device refused")]
    Refused,
    /// It could not read its own disk, has to hash a file of its own first, or broke the protocol.
    #[error("the device failed: {0}")]
    Failed(String),
}

/// Where bytes of other devices' files come from.
pub trait ContentSource: Send + Sync + 'static {
    /// Whether asking this device now may succeed; never waits.
    fn is_reachable(&self, device: DeviceId) -> bool;

    /// The bytes `range` of a version, from one device. `range` is aligned to
    /// [`crate::content::manifest::GROUP_BYTES`] or ends at the end of the file, and is at
    /// most [`MAX_FETCH_BYTES`] long. With `version.content` set the answer carries a proof.
    /// Dropping the future cancels the request at the holder.
    fn fetch<'a>(
        &'a self,
        device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>>;

    /// The round trip to a device, as far as it is known; never waits.
    fn rtt(&self, _device: DeviceId) -> Option<Duration> {
        None
    }

    /// The devices that can be asked now for what they have in their caches; never waits.
    fn lenders(&self) -> Vec<DeviceId> {
        Vec::new()
    }

    /// What of each of these contents a device would lend from its cache, at most
    /// [`MAX_LENT`] contents in one question.
    fn lends<'a>(
        &'a self,
        _device: DeviceId,
        _contents: &'a [Wanted],
    ) -> BoxFuture<'a, Result<Vec<Lent>, FetchError>> {
        Box::pin(async { Err(FetchError::Refused) })
    }

    /// As [`ContentSource::fetch`], from the cache of a device.
    fn borrow<'a>(
        &'a self,
        _device: DeviceId,
        _wanted: Wanted,
        _range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        Box::pin(async { Err(FetchError::Refused) })
    }
}

/// A content that is looked for, wherever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wanted {
    /// Its id.
    pub content: ContentId,
    /// How many bytes it has.
    pub size: u64,
}

/// What a device would lend of a content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The ranges that are there and may be had; none, if it is not there or not for the asker.
    #[serde(deserialize_with = "bounded::<_, _, MAX_LENT_RANGES>")]
    pub ranges: Vec<Range<u64>>,
    /// Its hash tree is there, or it has none because it is one group. Otherwise the whole file is
    /// read before the first range is given, unless all of it is asked for at once.
    pub is_ready: bool,
}

/// The most contents in one question for what a device would lend.
pub const MAX_LENT: usize = 64;
/// The most ranges of one content that are told.
pub const MAX_LENT_RANGES: usize = 64;

/// The longest range of one request, in bytes.
pub const MAX_FETCH_BYTES: u64 = 1 << 20;
