//! Bytes of other devices' files, one stream for each range.
//!
//! A request needs no timer against a dead peer: its connection is watched
//! ([`presence`](crate::presence)), and closed and dialled anew when it stays silent. A
//! request that broke off is tried once more, on the fresh connection. A peer that
//! answers, but not this, is given [`limit`].

use crate::node::Shared;
use crate::presence::{Link, Peer};
use crate::wire::{
    self, Borrow, Fetch, LENDS, MAX_FRAME, OLDEST, Refusal, Request, Response, WireError,
};
use bytes::{Bytes, BytesMut};
use iroh::endpoint::RecvStream;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::timeout;
use vfs_core::model::DeviceId;
use vfs_core::source::{
    BoxFuture, ContentSource, FetchError, Fetched, Lent, MAX_FETCH_BYTES, MAX_LENT, Version, Wanted,
};

/// The shortest time after which a request to a peer that is there is given up.
const MIN_LIMIT: Duration = Duration::from_secs(10);
/// The slowest rate that is waited for, in bytes a second.
const MIN_RATE: u64 = 32 << 10;

/// [`ContentSource`] over the connections of a node.
pub(crate) struct Source(pub(crate) Arc<Shared>);

impl ContentSource for Source {
    fn is_reachable(&self, device: DeviceId) -> bool {
        self.0.is_peer(device) && self.0.peer(device).is_some_and(|p| p.is_reachable())
    }

    fn fetch<'a>(
        &'a self,
        device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        let request = fetch_request(version, &range);
        Box::pin(async move { self.fetch_twice(device, &request?, OLDEST, range).await })
    }

    fn rtt(&self, device: DeviceId) -> Option<Duration> {
        Some(self.0.peer(device)?.link()?.rtt()).filter(|rtt| !rtt.is_zero())
    }

    fn lenders(&self) -> Vec<DeviceId> {
        let can_lend = |peer: &&Arc<Peer>| peer.link_since(LENDS).is_some();
        let peers: Vec<_> = self.0.peers().values().filter(can_lend).cloned().collect();
        peers.into_iter().map(|peer| peer.id).filter(|id| self.0.is_peer(*id)).collect()
    }

    fn lends<'a>(
        &'a self,
        device: DeviceId,
        contents: &'a [Wanted],
    ) -> BoxFuture<'a, Result<Vec<Lent>, FetchError>> {
        Box::pin(self.ask_what_it_lends(device, contents))
    }

    fn borrow<'a>(
        &'a self,
        device: DeviceId,
        wanted: Wanted,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        let request =
            len_of(&range).map(|len| Request::Borrow(Borrow { wanted, offset: range.start, len }));
        Box::pin(async move { self.fetch_twice(device, &request?, LENDS, range).await })
    }
}

/// Why one attempt gave no bytes.
pub(crate) enum Failure {
    /// The connection broke off: another may do.
    Lost,
    Final(FetchError),
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Lost(_) => Self::Lost,
            breach => Self::Final(FetchError::Failed(breach.to_string())),
        }
    }
}

impl Source {
    async fn fetch_twice(
        &self,
        device: DeviceId,
        request: &Request,
        since: u16,
        range: Range<u64>,
    ) -> Result<Fetched, FetchError> {
        let peer = self.0.peer(device).ok_or(FetchError::Unreachable)?;
        let mut lost: Option<Arc<Link>> = None;
        for _ in 0..2 {
            let link = peer.reach(lost.as_ref()).await.ok_or(FetchError::Unreachable)?;
            if link.version < since {
                return Err(FetchError::Refused);
            }
            let len = (range.end - range.start) as usize;
            let attempt = fetch_once(&link, request, len, &peer.bytes_in);
            match timeout(limit(&link, &range), attempt).await {
                Ok(Ok(fetched)) => return Ok(fetched),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Lost)) => lost = Some(link),
                Err(_) => return Err(FetchError::Unreachable),
            }
        }
        Err(FetchError::Unreachable)
    }

    async fn ask_what_it_lends(
        &self,
        device: DeviceId,
        contents: &[Wanted],
    ) -> Result<Vec<Lent>, FetchError> {
        let contents = &contents[..contents.len().min(MAX_LENT)];
        let peer = self.0.peer(device).ok_or(FetchError::Unreachable)?;
        let link = peer.link_since(OLDEST).ok_or(FetchError::Unreachable)?;
        if link.version < LENDS {
            return Err(FetchError::Refused);
        }
        match timeout(MIN_LIMIT, link.ask(&Request::Lends(contents.to_vec()))).await {
            Ok(Ok(Response::Lends(lent))) if lent.len() == contents.len() => Ok(lent),
            Ok(Ok(Response::Refused(refusal))) => Err(refused(refusal)),
            Ok(Ok(_)) => Err(FetchError::Failed("not an answer to what it lends".into())),
            Ok(Err(error)) if error.is_breach() => Err(FetchError::Failed(error.to_string())),
            Ok(Err(_)) | Err(_) => Err(FetchError::Unreachable),
        }
    }
}

fn limit(link: &Link, range: &Range<u64>) -> Duration {
    let len = range.end - range.start;
    MIN_LIMIT + 4 * link.rtt() + Duration::from_millis(1000 * len / MIN_RATE)
}

fn fetch_request(version: &Version, range: &Range<u64>) -> Result<Request, FetchError> {
    let len = len_of(range)?;
    Ok(Request::Fetch(Fetch { version: version.into(), offset: range.start, len }))
}

fn len_of(range: &Range<u64>) -> Result<u32, FetchError> {
    let len = range.end.checked_sub(range.start).filter(|n| (1..=MAX_FETCH_BYTES).contains(n));
    let len = len.and_then(|n| u32::try_from(n).ok());
    len.ok_or_else(|| FetchError::Failed(format!("no range to fetch: {range:?}")))
}

async fn fetch_once(
    link: &Link,
    request: &Request,
    len: usize,
    received: &AtomicU64,
) -> Result<Fetched, Failure> {
    let (mut send, mut recv) = link.connection.open_bi().await.map_err(WireError::from)?;
    wire::send_request(&mut send, link.version, request).await?;
    let _ = send.finish();
    match link.answer(&mut recv).await? {
        Response::Fetched { proof } => {
            let bytes = receive_bytes(link, &mut recv, len, received).await?;
            Ok(Fetched { bytes, proof })
        }
        Response::Refused(refusal) => Err(Failure::Final(refused(refusal))),
        _ => Err(Failure::Final(FetchError::Failed("not an answer to a fetch".into()))),
    }
}

fn refused(refusal: Refusal) -> FetchError {
    match refusal {
        Refusal::Stale => FetchError::Stale,
        Refusal::NotShared => FetchError::Refused,
        Refusal::Offline => FetchError::NotNow,
        other => FetchError::Failed(format!("refused: {other:?}")),
    }
}

/// Exactly `len` bytes, and the end of the stream.
pub(crate) async fn receive_bytes(
    link: &Link,
    recv: &mut RecvStream,
    len: usize,
    received: &AtomicU64,
) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::with_capacity(len);
    loop {
        let chunk = recv.read_chunk(MAX_FRAME).await.map_err(|e| WireError::Lost(e.to_string()))?;
        let Some(chunk) = chunk else { break };
        link.heard();
        received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        if bytes.len() + chunk.len() > len {
            return Err(Failure::Final(FetchError::Failed("more bytes than asked for".into())));
        }
        bytes.extend_from_slice(&chunk);
    }
    if bytes.len() < len {
        return Err(Failure::Final(FetchError::Failed("fewer bytes than asked for".into())));
    }
    Ok(bytes.freeze())
}
