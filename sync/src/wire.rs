//! Every message, as bytes: versioned, length-prefixed, bounded.
//!
//! A stream begins with `version: u16, length: u32` (little-endian) and a postcard
//! body; every later frame is `length: u32` and a body. A length is compared with
//! its bound before anything is allocated for it, and collections stop at their own
//! bound while they are decoded, because one byte on the wire may be a hundred in
//! memory. `docs/PROTOCOL.md` describes the same from outside.

use bytes::Bytes;
use iroh::endpoint::{ReadExactError, RecvStream, SendStream, WriteError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::ops::Range;
use tokio::sync::{Semaphore, SemaphorePermit};
use vfs_core::index::{LogRow, Signed};
use vfs_core::library::{LibraryInfo, Member, Stamp as ClockStamp};
use vfs_core::locks::{LockAnswer, LockRequest};
use vfs_core::model::{DeviceId, LocationId, Seq};
use vfs_core::ops::{Op, Outcome, bounded};
use vfs_core::source::{Lent, MAX_LENT, Version, Wanted};

/// Between members.
pub const ALPN_MEMBER: &[u8] = b"spacedrive/1";
/// Between a device that was invited and the one that invited it.
pub const ALPN_PAIR: &[u8] = b"spacedrive/pair/1";

/// The newest version this program speaks.
pub const NEWEST: u16 = 5;
/// The oldest version this program speaks.
pub const OLDEST: u16 = 1;

/// The version from which on operations are delivered.
pub const DELIVERS: u16 = 2;

/// The version from which on locks are coordinated.
pub const LOCKS: u16 = 2;

/// The version from which on replicas are passed on; in version 3 statements had another form.
pub const PASSES_ON: u16 = 4;

/// The version from which on what is in a cache is lent.
pub const LENDS: u16 = 5;

/// The longest request, in bytes.
pub const MAX_REQUEST: usize = 4 << 10;
/// The longest frame after a request, in bytes.
pub const MAX_FRAME: usize = 1 << 20;
/// The most rows in one frame.
pub const MAX_ROWS: usize = 8192;
/// The most devices a library may have, and the most records of members and removed ones.
pub const MAX_MEMBERS: usize = 1024;
/// The most locations a device may announce.
pub const MAX_LOCATIONS: usize = 512;
/// The most addresses kept for a device.
pub const MAX_ADDRESSES: usize = 8;
/// The most chaining values in a proof: two for each level of the largest tree.
pub const MAX_PROOF: usize = 128;
/// The most operations in one frame, and outcomes.
pub const MAX_OPS: usize = 256;
/// The longest operation, in bytes: the extents of one, in their longest form, take 20 MiB.
pub const MAX_OP: usize = 32 << 20;
/// The most bytes asked for at once of an operation that is pulled.
pub const MAX_STAGED_BYTES: u64 = 1 << 20;
/// The most ranges asked for at once.
pub const MAX_STAGED_RANGES: usize = 128;
/// The longest reason that an outcome gives, in bytes.
pub const MAX_REASON: usize = 1 << 10;
/// The longest label, in bytes: 64 characters of 4 bytes.
pub const MAX_LABEL: usize = 256;

/// Codes with which a connection is closed.
pub mod close {
    /// In good order: the device goes offline.
    pub const BYE: u32 = 0;
    /// The peer is not a member.
    pub const NOT_MEMBER: u32 = 1;
    /// The peer was removed; the reason holds the postcard of its record.
    pub const REMOVED: u32 = 2;
    /// Another connection of the same pair is kept.
    pub const DUPLICATE: u32 = 3;
    /// The peer did not answer in time.
    pub const SILENT: u32 = 4;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 5;
    /// No common version.
    pub const VERSION: u32 = 6;
    /// The pairing is over.
    pub const PAIRED: u32 = 7;
    /// The peer is in another library.
    pub const OTHER_LIBRARY: u32 = 8;
    /// Too many connections wait to pair.
    pub const BUSY: u32 = 9;
}

/// What a stream between members may ask for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// The first on every connection, from the side that dialled. Answer: `Hello`.
    Hello(Hello),
    /// Are you there? Answer: `Done`.
    Ping,
    /// A frame with a [`MemberList`] follows. Answer: `Done`.
    Members,
    /// A frame with a [`LocationList`] follows. Answer: `Done`.
    Locations,
    /// Rows of one location after a number. Answer: `Rows`, then [`Rows`] frames without end.
    Rows(Follow),
    /// Bytes of one version. Answer: `Fetched`, then the bytes.
    Fetch(Fetch),
    /// Frames of [`Operations`] follow. Answer: `Done`, then frames of `Outcomes`.
    Deliver(Deliver),
    /// Bytes of an operation that was delivered to the asking device. Answer: `Staged`, then
    /// the bytes.
    Staged(Staged),
    /// A lock of a file of the asked device. Answer: `Lock`.
    Lock(LockRequest),
    /// A frame with a [`StatementList`] follows. Answer: `Done`.
    Statements,
    /// Rows of a location of a third device, as the asked device has them. Answer: `Rows`, then
    /// [`Rows`] frames up to the number that was asked for, then the end of the stream.
    PassOn(PassOn),
    /// What of these contents the asked device would lend from its cache. Answer: `Lends`.
    Lends(#[serde(deserialize_with = "bounded::<_, _, MAX_LENT>")] Vec<Wanted>),
    /// Bytes of a content in the cache of the asked device. Answer: `Fetched`, then the bytes.
    Borrow(Borrow),
}

/// Who speaks, and what.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest version of this protocol it speaks.
    pub oldest: u16,
    /// The newest.
    pub newest: u16,
    /// Its library's id.
    pub library: String,
    /// Drawn when the node started: tells a restarted peer from the one before.
    pub session: u64,
    /// Where it listens.
    #[serde(deserialize_with = "bounded::<_, _, MAX_ADDRESSES>")]
    pub addresses: Vec<SocketAddr>,
}

/// Which rows.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Follow {
    /// Of this location, one of the asked device's own.
    pub location: LocationId,
    /// The log the reader has rows of, 0 for none.
    pub log_id: u64,
    /// The last row it has.
    pub after: Seq,
}

/// Which rows of a third device's location.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct PassOn {
    /// The location, the log and the last row that the reader has of it; `after` 0 for all.
    pub follow: Follow,
    /// The last row of the statement that the reader has.
    pub head: Seq,
}

/// Which bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Fetch {
    /// Location, file, stamp and content id.
    pub version: WireVersion,
    /// The first byte.
    pub offset: u64,
    /// How many, at most [`vfs_core::source::MAX_FETCH_BYTES`].
    pub len: u32,
}

/// Which bytes of a content.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Borrow {
    /// The content.
    pub wanted: Wanted,
    /// The first byte.
    pub offset: u64,
    /// How many, at most [`vfs_core::source::MAX_FETCH_BYTES`].
    pub len: u32,
}

/// What a stream delivers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Deliver {
    /// Of the writer's journal.
    pub epoch: u64,
    /// Grows on a connection whenever the writer begins anew: what an earlier one left behind
    /// is over, and its operations come again.
    pub session: u64,
    /// One operation, whose bytes are pulled; otherwise any number, in their order.
    pub bulk: bool,
}

/// Operations on their way to the owner.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Operations {
    /// Whole ones.
    Whole {
        /// The writer has noted the outcomes of all operations with a smaller number.
        settled_below: u64,
        /// In their order; none, to tell the number only.
        #[serde(deserialize_with = "bounded::<_, _, MAX_OPS>")]
        ops: Vec<Op>,
    },
    /// A part of one that is longer than a frame; the parts follow one another.
    Part {
        /// Of its body.
        bytes: Bytes,
        /// Bytes still to come.
        rest: u32,
    },
}

/// Which bytes of an operation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Staged {
    /// Of the writer's journal.
    pub epoch: u64,
    /// The operation.
    pub no: u64,
    /// Ranges of the file, each within one extent; together at most [`MAX_STAGED_BYTES`].
    #[serde(deserialize_with = "bounded::<_, _, MAX_STAGED_RANGES>")]
    pub ranges: Vec<Range<u64>>,
}

/// [`Version`] on the wire.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WireVersion {
    location: LocationId,
    file: vfs_core::model::FileId,
    stamp: vfs_core::model::Stamp,
    content: Option<vfs_core::model::ContentId>,
}

impl From<&Version> for WireVersion {
    fn from(v: &Version) -> Self {
        Self { location: v.location, file: v.file, stamp: v.stamp, content: v.content }
    }
}

impl From<WireVersion> for Version {
    fn from(v: WireVersion) -> Self {
        Self { location: v.location, file: v.file, stamp: v.stamp, content: v.content }
    }
}

/// What a stream between members is answered with.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum Response {
    /// No.
    Refused(Refusal),
    /// Taken.
    Done,
    /// To `Hello`: the same from the other side.
    Hello(Hello),
    /// To `Rows`: they follow, of this log and after this number. Another log than the
    /// reader's means that its rows are to be dropped.
    Rows {
        /// The log.
        log_id: u64,
        /// The first row sent is the one after this.
        after: Seq,
    },
    /// To `Fetch`: as many bytes as were asked for follow.
    Fetched {
        /// Chaining values that lead from the bytes to the content id.
        #[serde(deserialize_with = "bounded::<_, _, MAX_PROOF>")]
        proof: Vec<[u8; 32]>,
    },
    /// To `Deliver`: what became of operations, in the order of their coming, by number. None:
    /// the owner is still at it.
    Outcomes(#[serde(deserialize_with = "bounded::<_, _, MAX_OPS>")] Vec<(u64, Outcome)>),
    /// To `Staged`: the bytes of the ranges follow, one after the other.
    Staged,
    /// To `Lock`: what became of it.
    Lock(LockAnswer),
    /// To `Lends`, of each content.
    Lends(#[serde(deserialize_with = "bounded::<_, _, MAX_LENT>")] Vec<Lent>),
}

/// Why not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// No common version; these are spoken.
    Version {
        /// From.
        oldest: u16,
        /// To.
        newest: u16,
    },
    /// It is in another library.
    OtherLibrary,
    /// It has a connection to the asking device already.
    Duplicate,
    /// The request is not one, or is out of bounds, or comes before `Hello`.
    Malformed,
    /// There is no such location, file or operation, or the asking device may not see it.
    NotShared,
    /// The version is gone.
    Stale,
    /// It cannot be had now, but may be later: the disk with the location is away, or the hash
    /// tree of what is lent is not built yet, or too many wait for one.
    Offline,
    /// Its disk or index failed.
    Failed,
}

/// All members the sender knows, the removed ones included.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemberList(
    #[serde(deserialize_with = "bounded::<_, _, MAX_MEMBERS>")] pub Vec<MemberRecord>,
);

/// A [`Member`] on the wire: without what only the sender knows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MemberRecord {
    /// Its key.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// How often it was admitted again ([`Member::life`]).
    pub life: u64,
    /// When the record was made.
    pub stamp: ClockStamp,
    /// It is no longer a member.
    pub removed: bool,
    /// Where the sender would try to reach it.
    #[serde(deserialize_with = "bounded::<_, _, MAX_ADDRESSES>")]
    pub addresses: Vec<SocketAddr>,
}

impl From<&Member> for MemberRecord {
    fn from(m: &Member) -> Self {
        Self {
            id: m.id,
            name: m.name.clone(),
            life: m.life,
            stamp: m.stamp,
            removed: m.removed,
            addresses: m.addresses.iter().take(MAX_ADDRESSES).copied().collect(),
        }
    }
}

impl From<MemberRecord> for Member {
    fn from(r: MemberRecord) -> Self {
        let MemberRecord { id, name, life, stamp, removed, addresses } = r;
        Self { id, name, life, stamp, removed, addresses, last_seen_ms: None }
    }
}

/// All locations of the sender that the receiver may see.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct LocationList(
    #[serde(deserialize_with = "bounded::<_, _, MAX_LOCATIONS>")] pub Vec<Announced>,
);

/// What owners said of locations that the sender can give rows of: its own, and replicas.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct StatementList(
    #[serde(deserialize_with = "bounded::<_, _, MAX_LOCATIONS>")] pub Vec<Signed>,
);

/// One of them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Announced {
    /// Its id.
    pub id: LocationId,
    /// Its name.
    pub name: String,
    /// Nobody may write to it.
    pub read_only: bool,
}

/// A batch of rows of one location, in the order of their numbers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rows {
    /// The rows.
    #[serde(deserialize_with = "bounded::<_, _, MAX_ROWS>")]
    pub rows: Vec<LogRow>,
    /// With these the reader has everything up to here.
    pub upto: Seq,
    /// The owner's last number.
    pub head: Seq,
}

/// What the joining device says.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum PairRequest {
    /// The first. Answer: `Welcome`.
    Knock(Knock),
    /// Its person compared the codes and agreed. Answer: `Admitted`.
    Confirm,
}

/// The proof that the joining device has the ticket, without the ticket.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Knock {
    /// Which ticket: a hash of its secret.
    pub ticket: [u8; 16],
    /// The name it wants to have.
    pub name: String,
    /// Fresh randomness.
    pub nonce: [u8; 32],
    /// Keyed hash over both ids, the name and the nonce.
    pub proof: [u8; 32],
    /// Where it listens.
    #[serde(deserialize_with = "bounded::<_, _, MAX_ADDRESSES>")]
    pub addresses: Vec<SocketAddr>,
}

/// What the inviting device answers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub enum PairResponse {
    /// No.
    Refused(PairRefusal),
    /// To `Knock`.
    Welcome {
        /// The library.
        library: LibraryInfo,
        /// The inviting device's name.
        inviter: String,
        /// Fresh randomness, drawn after the knock was checked.
        nonce: [u8; 32],
    },
    /// To `Confirm`: the joining device now is one of these.
    Admitted(MemberList),
}

/// Why not.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum PairRefusal {
    /// No common version; these are spoken.
    Version {
        /// From.
        oldest: u16,
        /// To.
        newest: u16,
    },
    /// The request is not one.
    Malformed,
    /// No such invitation any more.
    Expired,
    /// Another device used the ticket.
    Used,
    /// The secret is wrong.
    WrongSecret,
    /// A member has this name.
    NameTaken,
    /// The name cannot be a device's.
    BadName,
    /// The library has as many devices as it may.
    LibraryFull,
    /// The inviting device failed.
    Failed,
}

/// Why a message could not be received or sent.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A length beyond its bound.
    #[error("a message of {length} bytes, where {bound} is the bound")]
    TooLong {
        /// The length announced.
        length: usize,
        /// The most there may be.
        bound: usize,
    },
    /// The bytes are not such a message.
    #[error("not a message: {0}")]
    Malformed(#[from] postcard::Error),
    /// A version this program does not speak.
    #[error("version {0} of the protocol")]
    Version(u16),
    /// The stream ended or broke off, or the connection is gone.
    #[error("the connection broke off: {0}")]
    Lost(String),
}

impl WireError {
    /// Whether the peer broke the protocol, rather than the network the connection.
    pub fn is_breach(&self) -> bool {
        !matches!(self, Self::Lost(_))
    }
}

impl From<WriteError> for WireError {
    fn from(e: WriteError) -> Self {
        Self::Lost(e.to_string())
    }
}

impl From<ReadExactError> for WireError {
    fn from(e: ReadExactError) -> Self {
        Self::Lost(e.to_string())
    }
}

impl From<iroh::endpoint::ConnectionError> for WireError {
    fn from(e: iroh::endpoint::ConnectionError) -> Self {
        Self::Lost(e.to_string())
    }
}

/// The common version of two ranges, the newest there is.
pub fn common_version(oldest: u16, newest: u16) -> Option<u16> {
    let common = newest.min(NEWEST);
    (common >= oldest.max(OLDEST)).then_some(common)
}

/// One message from exactly these bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (message, []) => Ok(message),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

/// The body of a message; `None` when it is longer than `bound`.
fn encode(message: &impl Serialize, bound: usize) -> Result<Vec<u8>, WireError> {
    let body = postcard::to_stdvec(message)?;
    match body.len() {
        length if length > bound => Err(WireError::TooLong { length, bound }),
        _ => Ok(body),
    }
}

/// A request as it stands at the beginning of a stream.
///
/// `version` is [`OLDEST`] for `Hello` and pairing, so that every peer there is a common
/// version with can read it, and the common version for all others.
pub fn encode_request(version: u16, message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let body = encode(message, MAX_REQUEST)?;
    Ok([&version.to_le_bytes()[..], &(body.len() as u32).to_le_bytes(), &body].concat())
}

/// A frame as it stands after the request.
pub fn encode_frame(message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let body = encode(message, MAX_FRAME)?;
    Ok([&(body.len() as u32).to_le_bytes()[..], &body].concat())
}

/// What a frame of operations or outcomes may have beside these, in bytes.
pub(crate) const FRAME_HEAD: usize = 32;

/// Groups that fit into a frame each; one element that does not fit makes a group alone.
pub(crate) fn in_frames<T: Serialize>(elements: Vec<T>) -> Result<Vec<Vec<T>>, WireError> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut room = 0;
    for element in elements {
        let bytes = postcard::experimental::serialized_size(&element)?;
        match groups.last_mut() {
            Some(group) if bytes <= room && group.len() < MAX_OPS => group.push(element),
            _ => {
                groups.push(vec![element]);
                room = MAX_FRAME - FRAME_HEAD;
            }
        }
        room = room.saturating_sub(bytes);
    }
    Ok(groups)
}

/// Sends the request that begins a stream.
pub async fn send_request(
    to: &mut SendStream,
    version: u16,
    message: &impl Serialize,
) -> Result<(), WireError> {
    Ok(to.write_all(&encode_request(version, message)?).await?)
}

/// Sends a frame.
pub async fn send_frame(to: &mut SendStream, m: &impl Serialize) -> Result<(), WireError> {
    Ok(to.write_all(&encode_frame(m)?).await?)
}

/// Receives the request that begins a stream.
pub async fn receive_request<T: DeserializeOwned>(from: &mut RecvStream) -> Result<T, WireError> {
    let mut version = [0; 2];
    from.read_exact(&mut version).await?;
    let version = u16::from_le_bytes(version);
    if !(OLDEST..=NEWEST).contains(&version) {
        return Err(WireError::Version(version));
    }
    receive_bounded(from, MAX_REQUEST).await
}

/// Receives a frame.
pub async fn receive_frame<T: DeserializeOwned>(from: &mut RecvStream) -> Result<T, WireError> {
    receive_bounded(from, MAX_FRAME).await
}

/// Receives a frame; `None` when the stream has ended before it.
pub async fn receive_frame_or_end<T: DeserializeOwned>(
    from: &mut RecvStream,
) -> Result<Option<T>, WireError> {
    match receive_length_or_end(from).await? {
        Some(length) => receive_body(from, length).await.map(Some),
        None => Ok(None),
    }
}

/// Receives a frame when there is room for it: the permit stands for its memory, and is
/// taken only when a frame is announced.
pub async fn receive_frame_in<'a, T: DeserializeOwned>(
    from: &mut RecvStream,
    room: &'a Semaphore,
) -> Result<(T, SemaphorePermit<'a>), WireError> {
    let length = receive_length(from, MAX_FRAME).await?;
    let permit = room.acquire().await.map_err(|e| WireError::Lost(e.to_string()))?;
    Ok((receive_body(from, length).await?, permit))
}

/// The same; `None` when the stream has ended before it.
pub async fn receive_frame_or_end_in<'a, T: DeserializeOwned>(
    from: &mut RecvStream,
    room: &'a Semaphore,
) -> Result<Option<(T, SemaphorePermit<'a>)>, WireError> {
    let Some(length) = receive_length_or_end(from).await? else { return Ok(None) };
    let permit = room.acquire().await.map_err(|e| WireError::Lost(e.to_string()))?;
    Ok(Some((receive_body(from, length).await?, permit)))
}

async fn receive_length_or_end(from: &mut RecvStream) -> Result<Option<usize>, WireError> {
    let mut length = [0; 4];
    match from.read_exact(&mut length).await {
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        read => read?,
    }
    checked(u32::from_le_bytes(length), MAX_FRAME).map(Some)
}

async fn receive_bounded<T: DeserializeOwned>(
    from: &mut RecvStream,
    bound: usize,
) -> Result<T, WireError> {
    let length = receive_length(from, bound).await?;
    receive_body(from, length).await
}

async fn receive_length(from: &mut RecvStream, bound: usize) -> Result<usize, WireError> {
    let mut length = [0; 4];
    from.read_exact(&mut length).await?;
    checked(u32::from_le_bytes(length), bound)
}

fn checked(length: u32, bound: usize) -> Result<usize, WireError> {
    match length as usize {
        length if length > bound => Err(WireError::TooLong { length, bound }),
        length => Ok(length),
    }
}

async fn receive_body<T: DeserializeOwned>(
    from: &mut RecvStream,
    length: usize,
) -> Result<T, WireError> {
    let mut body = vec![0; length];
    from.read_exact(&mut body).await?;
    Ok(decode(&body)?)
}
