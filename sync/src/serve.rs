//! Answers what peers ask, on one stream for each request.
//!
//! The asking device is checked against the members on every stream, and only from the
//! connection's key, never from anything it says. What may be read is decided by
//! [`OwnFiles`](vfs_core::content::OwnFiles) and [`Lender`](vfs_core::content::Lender).

use crate::node::Shared;
use crate::presence::{Link, Peer, reply};
use crate::wire::{
    self, Borrow, Fetch, LocationList, MAX_PROOF, MemberList, NEWEST, OLDEST, Refusal, Request,
    Response, StatementList, WireError,
};
use crate::{accept, deliver, locks, members, pass_on, replicate};
use bytes::Bytes;
use iroh::endpoint::{RecvStream, SendStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;
use vfs_core::source::{FetchError, Fetched, Lent, MAX_FETCH_BYTES, Version, Wanted};

/// How long a peer may take to send a request it began.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a peer may take none of the bytes it asked for.
const STALL: Duration = Duration::from_secs(30);
/// Bytes are handed to the transport, and counted, in such parts.
const PART_BYTES: usize = 256 << 10;
/// Content goes after everything else, so that a bulk read delays neither pings nor rows.
const BULK: i32 = -1;

/// Serves every stream of a connection.
pub(crate) async fn streams(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut tasks = JoinSet::new();
    while let Ok((send, recv)) = link.connection.accept_bi().await {
        if !shared.is_peer(peer.id) {
            return members::turn_away(&shared, peer.id, &link.connection);
        }
        while tasks.try_join_next().is_some() {}
        tasks.spawn(stream(shared.clone(), peer.clone(), link.clone(), send, recv));
    }
}

async fn stream(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    link: Arc<Link>,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let served = async {
        let request = within(wire::receive_request(&mut recv)).await?;
        link.heard();
        answer(&shared, &peer, &link, request, &mut send, &mut recv).await
    };
    let refusal = match served.await {
        Ok(()) | Err(WireError::Lost(_)) => return,
        Err(WireError::Version(_)) => Refusal::Version { oldest: OLDEST, newest: NEWEST },
        Err(_) => Refusal::Malformed,
    };
    tracing::debug!(peer = %peer.id, ?refusal, "request refused");
    let _ = reply(&mut send, &Response::Refused(refusal)).await;
}

async fn within<T>(work: impl Future<Output = Result<T, WireError>>) -> Result<T, WireError> {
    timeout(REQUEST, work).await.unwrap_or_else(|_| Err(WireError::Lost("too slow".into())))
}

async fn answer(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    request: Request,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Result<(), WireError> {
    match request {
        Request::Ping => reply(send, &Response::Done).await,
        Request::Members => {
            let frame = wire::receive_frame_in(recv, &link.inbound);
            let (MemberList(records), _room) = within(frame).await?;
            members::take(shared, peer, records).await;
            reply(send, &Response::Done).await
        }
        Request::Locations => {
            let frame = wire::receive_frame_in(recv, &link.inbound);
            let (list, _room): (LocationList, _) = within(frame).await?;
            link.announced.send_replace(Some(Arc::new(list)));
            reply(send, &Response::Done).await
        }
        Request::Rows(follow) => {
            ignore_rest(recv);
            replicate::serve(shared, peer, link, follow, send).await
        }
        Request::Fetch(fetch) => {
            ignore_rest(recv);
            serve_fetch(shared, peer, fetch, send).await
        }
        Request::Deliver(deliver) => accept::serve(shared, peer, link, deliver, send, recv).await,
        Request::Staged(staged) => {
            ignore_rest(recv);
            deliver::serve_staged(shared, peer, link, staged, send).await
        }
        Request::Lock(request) => {
            ignore_rest(recv);
            locks::serve(shared, peer, link, request, send).await
        }
        Request::Statements => {
            let frame = wire::receive_frame_in(recv, &link.inbound);
            let (list, _room): (StatementList, _) = within(frame).await?;
            link.offered.send_replace(Some(Arc::new(list)));
            reply(send, &Response::Done).await
        }
        Request::PassOn(asked) => {
            ignore_rest(recv);
            pass_on::serve(shared, peer, link, asked, send).await
        }
        Request::Lends(contents) => {
            ignore_rest(recv);
            serve_lends(shared, peer, contents, send).await
        }
        Request::Borrow(borrow) => {
            ignore_rest(recv);
            serve_borrow(shared, peer, borrow, send).await
        }
        // Said already, when the connection began.
        Request::Hello(_) => reply(send, &Response::Refused(Refusal::Malformed)).await,
    }
}

/// Nothing follows such a request; what comes all the same must not wait in memory for as
/// long as the answer lasts.
fn ignore_rest(recv: &mut RecvStream) {
    let _ = recv.stop(0u32.into());
}

async fn serve_fetch(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    fetch: Fetch,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let (own, asker, version) = (shared.own.clone(), peer.id, Version::from(fetch.version));
    let read = move |range| own.read(asker, &version, range);
    send_range(peer, (fetch.offset, fetch.len), read, send).await
}

async fn serve_borrow(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    borrow: Borrow,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let (lender, asker) = (shared.lender.clone(), peer.id);
    let read = move |range| match lender {
        Some(lender) => lender.read(asker, borrow.wanted, range),
        None => Err(FetchError::Refused),
    };
    send_range(peer, (borrow.offset, borrow.len), read, send).await
}

async fn serve_lends(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    contents: Vec<Wanted>,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let Ok(permit) = peer.questions.clone().acquire_owned().await else { return Ok(()) };
    let (lender, asker) = (shared.lender.clone(), peer.id);
    let count = contents.len();
    let find = move || {
        // Whatever becomes of the asker, the thread is taken for as long as this runs.
        let _permit = permit;
        lender.map(|lender| lender.lends(asker, &contents))
    };
    let lent = tokio::task::spawn_blocking(find).await.unwrap_or_default();
    let lent = lent.unwrap_or_else(|| vec![Lent::default(); count]);
    reply(send, &Response::Lends(lent)).await
}

/// Answers with the bytes of a range, as `read` gives them.
async fn send_range(
    peer: &Arc<Peer>,
    (offset, len): (u64, u32),
    read: impl FnOnce(Range<u64>) -> Result<Fetched, FetchError> + Send + 'static,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let Some(range) = range_of(offset, len) else {
        return reply(send, &Response::Refused(Refusal::Malformed)).await;
    };
    // Held until the bytes are gone: it bounds the memory. A read that has begun goes on when its
    // asker gives up, or connects anew, and keeps it: it bounds the threads as well.
    let Ok(permit) = peer.fetches.clone().acquire_owned().await else { return Ok(()) };
    let _ = send.set_priority(BULK);
    let asked = range.clone();
    let work = tokio::task::spawn_blocking(move || (read(asked), permit));
    let done = tokio::select! {
        done = work => done,
        _ = send.stopped() => return Ok(()),
    };
    let Ok((fetched, _permit)) = done else {
        return reply(send, &Response::Refused(Refusal::Failed)).await;
    };
    match checked(fetched, &range) {
        Ok(Fetched { bytes, proof }) => {
            wire::send_frame(send, &Response::Fetched { proof }).await?;
            send_bytes(peer, bytes, send).await?;
            let _ = send.finish();
            Ok(())
        }
        Err(refusal) => reply(send, &Response::Refused(refusal)).await,
    }
}

/// The range asked for, when it is one.
fn range_of(offset: u64, len: u32) -> Option<Range<u64>> {
    let len = u64::from(len);
    let end = offset.checked_add(len)?;
    (1..=MAX_FETCH_BYTES).contains(&len).then_some(offset..end)
}

fn checked(fetched: Result<Fetched, FetchError>, range: &Range<u64>) -> Result<Fetched, Refusal> {
    let fetched = fetched.map_err(|error| match error {
        FetchError::Stale => Refusal::Stale,
        FetchError::Refused => Refusal::NotShared,
        FetchError::Unreachable | FetchError::NotNow => Refusal::Offline,
        FetchError::Failed(_) => {
            tracing::warn!(%error, "a peer's read failed");
            Refusal::Failed
        }
    })?;
    let is_whole = fetched.bytes.len() as u64 == range.end - range.start;
    if is_whole && fetched.proof.len() <= MAX_PROOF { Ok(fetched) } else { Err(Refusal::Failed) }
}

pub(crate) async fn send_bytes(
    peer: &Peer,
    mut bytes: Bytes,
    send: &mut SendStream,
) -> Result<(), WireError> {
    while !bytes.is_empty() {
        let part = bytes.split_to(bytes.len().min(PART_BYTES));
        let len = part.len() as u64;
        let sent = timeout(STALL, send.write_chunk(part)).await;
        sent.map_err(|_| WireError::Lost("the peer takes no bytes".into()))??;
        peer.bytes_out.fetch_add(len, Ordering::Relaxed);
    }
    Ok(())
}
