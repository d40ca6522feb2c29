//! This device's writes to others' files, on their way to the owners.
//!
//! One task for each connection. It has sessions: a session asks the outbox for what the
//! peer is to do, and ends with the first failure; the outbox is told that what was sent
//! is unsent, and after a delay the next session begins. A device has one session with a
//! peer at a time, whatever connections come and go.
//!
//! In a session, small operations travel in their order on one stream, many at once: the
//! outbox is asked for more while there is room in the [`Window`]. Operations whose bytes
//! are pulled have a stream each, so that they hold nothing up. The owner asks for their
//! bytes with [`Request::Staged`], which only the owner they are for is given.
//!
//! Reads go first: staged bytes have the lowest priority of all streams.

use crate::node::Shared;
use crate::presence::{Link, Peer, reply};
use crate::serve::send_bytes;
use crate::wire::{
    self, DELIVERS, Deliver, FRAME_HEAD, MAX_FRAME, MAX_OP, MAX_OPS, MAX_REASON, MAX_STAGED_BYTES,
    Operations, Refusal, Request, Response, Staged, WireError,
};
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use iroh::endpoint::{RecvStream, SendStream};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use vfs_core::error::FsResult;
use vfs_core::model::{DeviceId, FileId, Name, Stamp};
use vfs_core::ops::{self, Conflict, MAX_DEPTH, Obstacle, Op, Outcome};
use vfs_core::outbox::{Lane, Outbox};

/// Operations sent and not answered, at most.
const WINDOW_OPS: usize = 1024;
/// Their bytes, unless one alone has more.
const WINDOW_BYTES: usize = 4 << 20;
/// Operations whose bytes are pulled at once.
const BULK_STREAMS: usize = 4;
/// How long the owner may take to accept a stream: it first ends what it was doing for the
/// session before.
const ACCEPTED: Duration = Duration::from_secs(60);
/// How long the owner may take nothing of what is sent.
const STALL: Duration = Duration::from_secs(30);
/// How long the owner may say nothing while operations wait for its answer. It says every
/// [`BEAT`](crate::accept::BEAT) that it is at it.
const SILENCE: Duration = Duration::from_secs(60);
/// How often the outbox is asked again while it has something for the peer but gives nothing:
/// it may only wait for a time to come.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After it was sent what there was, what comes next gathers until nothing has come for this
/// long: what comes together costs both devices, and the network, much less, and nobody waits.
const GATHER: Duration = Duration::from_millis(10);
/// The longest that it gathers while a program goes on writing.
const GATHER_MOST: Duration = Duration::from_millis(400);
/// After so long without a failure the next one counts as the first.
const CALM: Duration = Duration::from_secs(60);
/// Beside rows and pings, which go first, and beside the content that a program waits for.
const SMALL: i32 = -1;
/// After everything else.
const BULK: i32 = -2;

/// What delivery needs of the [`Outbox`], whose methods say what each does.
pub trait Outgoing: Send + Sync {
    /// [`Outbox::changed`].
    fn changed(&self) -> watch::Receiver<u64>;
    /// [`Outbox::owners`].
    fn owners(&self) -> Vec<DeviceId>;
    /// [`Outbox::epoch`].
    fn epoch(&self) -> u64;
    /// [`Outbox::settled_below`].
    fn settled_below(&self, owner: DeviceId) -> u64;
    /// [`Outbox::take`].
    fn take(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Op>;
    /// [`Outbox::read`].
    fn read(&self, owner: DeviceId, no: u64, range: Range<u64>) -> FsResult<Bytes>;
    /// [`Outbox::settle`].
    fn settle(&self, owner: DeviceId, no: u64, outcome: Outcome);
    /// [`Outbox::connection_lost`].
    fn connection_lost(&self, owner: DeviceId);
    /// [`Outbox::is_awaited`].
    fn is_awaited(&self) -> bool;
}

impl Outgoing for Outbox {
    fn changed(&self) -> watch::Receiver<u64> {
        self.changed()
    }

    fn owners(&self) -> Vec<DeviceId> {
        self.owners()
    }

    fn epoch(&self) -> u64 {
        self.epoch()
    }

    fn settled_below(&self, owner: DeviceId) -> u64 {
        self.settled_below(owner)
    }

    fn take(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Op> {
        self.take(owner, lane, max_ops, max_bytes)
    }

    fn read(&self, owner: DeviceId, no: u64, range: Range<u64>) -> FsResult<Bytes> {
        self.read(owner, no, range)
    }

    fn settle(&self, owner: DeviceId, no: u64, outcome: Outcome) {
        self.settle(owner, no, outcome);
    }

    fn connection_lost(&self, owner: DeviceId) {
        self.connection_lost(owner);
    }

    fn is_awaited(&self) -> bool {
        self.is_awaited()
    }
}

/// The longest path in an answer, with a byte between two names; longer ones lose their beginning.
pub(crate) const MAX_PATH_BYTES: usize = 4096;

/// Bytes of a path.
pub(crate) fn path_bytes(path: &[Name]) -> usize {
    path.iter().map(|name| name.as_bytes().len() + 1).sum()
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum DeliverError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("it does not take them: {0:?}")]
    Refused(Refusal),
    #[error("it said nothing about them for {SILENCE:?}")]
    Silent,
    #[error("it broke the protocol: {0}")]
    Breach(&'static str),
    #[error("operation {no} has {bytes} bytes, where {MAX_OP} is the bound")]
    TooLong { no: u64, bytes: usize },
    #[error("the outbox failed")]
    Outbox,
}

/// What the tasks of one session share.
struct Session {
    outbox: Arc<dyn Outgoing>,
    peer: Arc<Peer>,
    owner: DeviceId,
    link: Arc<Link>,
    number: u64,
    /// Of the peer's sessions, this one alone.
    _only: OwnedMutexGuard<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.outbox.connection_lost(self.owner);
    }
}

/// Delivers for as long as the connection lives.
pub(crate) async fn keep(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let Some(outbox) = shared.outbox.clone() else { return };
    let delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(60))
        .with_jitter()
        .without_max_times();
    let mut delay = delays.build();
    for number in 1.. {
        until_owed(&*outbox, peer.id).await;
        if link.version < DELIVERS {
            peer.knowledge().delivery_error =
                Some("it cannot be written to: its program is older, update it".to_owned());
            return;
        }
        let session = Session {
            outbox: outbox.clone(),
            peer: peer.clone(),
            owner: peer.id,
            link: link.clone(),
            number,
            _only: peer.delivering.clone().lock_owned().await,
        };
        let begun = Instant::now();
        let Err(error) = deliver(Arc::new(session)).await;
        if link.connection.close_reason().is_some() {
            return;
        }
        tracing::warn!(peer = %peer.id, %error, "a delivery of operations broke off");
        peer.knowledge().delivery_error = Some(format!("writes to it are delayed: {error}"));
        if begun.elapsed() > CALM {
            delay = delays.build();
        }
        sleep(delay.next().unwrap_or(CALM)).await;
    }
}

/// Waits until something is pending for this device.
async fn until_owed(outbox: &dyn Outgoing, owner: DeviceId) {
    let mut changed = outbox.changed();
    while !outbox.owners().contains(&owner) {
        if changed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn deliver(session: Arc<Session>) -> Result<Infallible, DeliverError> {
    let window = Window::default();
    let small = async {
        let (send, recv) = session.open(false).await?;
        tokio::try_join!(session.send_small(&window, send), session.receive_outcomes(&window, recv))
    };
    tokio::select! {
        ended = small => ended.map(|(never, _)| never),
        ended = send_bulk(&session) => ended,
    }
}

impl Session {
    /// A stream that the owner has accepted.
    async fn open(&self, bulk: bool) -> Result<(SendStream, RecvStream), DeliverError> {
        let (mut send, mut recv) = self.link.connection.open_bi().await.map_err(WireError::from)?;
        let _ = send.set_priority(SMALL);
        let epoch = self.outbox.epoch();
        let request = Request::Deliver(Deliver { epoch, session: self.number, bulk });
        wire::send_request(&mut send, self.link.version, &request).await?;
        let answer = timeout(ACCEPTED, self.link.answer(&mut recv));
        match answer.await.map_err(|_| DeliverError::Silent)?? {
            Response::Done => Ok((send, recv)),
            Response::Refused(refusal) => Err(DeliverError::Refused(refusal)),
            _ => Err(DeliverError::Breach("not an answer to a delivery")),
        }
    }

    /// The next operations. A task that is ended meanwhile leaves them taken and unsent: the
    /// session is over only after that, and then the outbox is told.
    async fn take(
        self: &Arc<Self>,
        lane: Lane,
        max_ops: usize,
        max_bytes: usize,
    ) -> Result<Vec<Op>, DeliverError> {
        let session = self.clone();
        let take = move || {
            let ops = session.outbox.take(session.owner, lane, max_ops, max_bytes);
            // Those behind it may build on it. So this session ends, and they are sent in the
            // next one, which has not to do with this operation any more.
            ops.iter().try_for_each(|op| size_of(op).map(drop)).inspect_err(|error| {
                if let DeliverError::TooLong { no, .. } = error {
                    let why = ops::Refusal::Impossible("it is too long for a message".into());
                    session.outbox.settle(session.owner, *no, Outcome::Refused(why));
                }
            })?;
            Ok(ops)
        };
        tokio::task::spawn_blocking(take).await.map_err(|_| DeliverError::Outbox)?
    }

    async fn settle(self: &Arc<Self>, outcomes: Vec<(u64, Outcome)>) -> Result<(), DeliverError> {
        let session = self.clone();
        let settle = move || {
            for (no, outcome) in outcomes {
                session.outbox.settle(session.owner, no, outcome);
            }
            session.peer.knowledge().delivery_error = None;
        };
        tokio::task::spawn_blocking(settle).await.map_err(|_| DeliverError::Outbox)
    }

    fn settled_below(&self) -> u64 {
        self.outbox.settled_below(self.owner)
    }

    /// Waits until the outbox may have something new.
    async fn until_changed(&self, changed: &mut watch::Receiver<u64>) {
        let is_owed = self.outbox.owners().contains(&self.owner);
        let again = async {
            match is_owed {
                true => sleep(ASK_AGAIN).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = changed.changed() => {}
            () = again => {}
        }
    }

    async fn send_small(
        self: &Arc<Self>,
        window: &Window,
        mut send: SendStream,
    ) -> Result<Infallible, DeliverError> {
        let mut changed = self.outbox.changed();
        let mut told = 0;
        loop {
            changed.borrow_and_update();
            let (max_ops, max_bytes) = window.room().await;
            let max_ops = max_ops.min(MAX_OPS);
            let ops = self.take(Lane::Small, max_ops, max_bytes).await?;
            let settled_below = self.settled_below();
            if ops.is_empty() {
                if settled_below > told && window.is_empty() {
                    // So that the owner can forget: nothing else may be said for long.
                    send_frames(&mut send, settled_below, ops).await?;
                    told = settled_below;
                }
                tokio::select! {
                    () = self.until_changed(&mut changed) => {}
                    () = window.freed.notified() => {}
                }
                continue;
            }
            window.push(&ops)?;
            let is_all = ops.len() < max_ops;
            send_frames(&mut send, settled_below, ops).await?;
            told = settled_below;
            if is_all {
                gather(&mut changed, || self.outbox.is_awaited()).await;
            }
        }
    }

    async fn receive_outcomes(
        self: &Arc<Self>,
        window: &Window,
        mut recv: RecvStream,
    ) -> Result<Infallible, DeliverError> {
        loop {
            let outcomes = self.outcomes(&mut recv, || window.is_overdue()).await?;
            for (no, _) in &outcomes {
                window.pop(*no)?;
            }
            if !outcomes.is_empty() {
                self.settle(outcomes).await?;
            }
        }
    }

    /// The next frame of outcomes; fails when none comes in time although one is due.
    async fn outcomes(
        &self,
        recv: &mut RecvStream,
        is_overdue: impl Fn() -> bool,
    ) -> Result<Vec<(u64, Outcome)>, DeliverError> {
        // Not given up half received: what was read of a frame would be lost.
        let mut answer = pin!(self.link.answer(recv));
        let answer = loop {
            tokio::select! {
                answer = &mut answer => break answer?,
                () = sleep(SILENCE) => if is_overdue() {
                    return Err(DeliverError::Silent);
                }
            }
        };
        match answer {
            Response::Outcomes(outcomes) if outcomes.iter().all(|(_, o)| is_bounded(o)) => {
                Ok(outcomes)
            }
            Response::Refused(refusal) => Err(DeliverError::Refused(refusal)),
            _ => Err(DeliverError::Breach("not an outcome")),
        }
    }

    /// Delivers one operation whose bytes are pulled.
    async fn send_one(self: Arc<Self>, op: Op) -> Result<(), DeliverError> {
        let no = op.no;
        let (mut send, mut recv) = self.open(true).await?;
        send_frames(&mut send, self.settled_below(), vec![op]).await?;
        let _ = send.finish();
        loop {
            let mut outcomes = self.outcomes(&mut recv, || true).await?;
            match (outcomes.pop(), outcomes.is_empty()) {
                (None, _) => {}
                (Some((of, outcome)), true) if of == no => {
                    return self.settle(vec![(no, outcome)]).await;
                }
                _ => return Err(DeliverError::Breach("an outcome of another operation")),
            }
        }
    }
}

/// Lets what programs are just writing come together, unless somebody waits for it.
async fn gather(changed: &mut watch::Receiver<u64>, is_awaited: impl Fn() -> bool) {
    let began = Instant::now();
    while began.elapsed() < GATHER_MOST && !is_awaited() {
        changed.mark_unchanged();
        sleep(GATHER).await;
        if !changed.has_changed().unwrap_or(false) {
            return;
        }
    }
}

/// Delivers operations whose bytes are pulled, a few at once.
async fn send_bulk(session: &Arc<Session>) -> Result<Infallible, DeliverError> {
    let mut changed = session.outbox.changed();
    let mut under_way = JoinSet::new();
    loop {
        changed.borrow_and_update();
        while under_way.len() < BULK_STREAMS {
            let ops = session.take(Lane::Bulk, 1, usize::MAX).await?;
            if ops.is_empty() {
                break;
            }
            for op in ops {
                under_way.spawn(session.clone().send_one(op));
            }
        }
        let more = async {
            sleep(GATHER).await;
            session.until_changed(&mut changed).await;
        };
        tokio::select! {
            Some(ended) = under_way.join_next() => ended.map_err(|_| DeliverError::Outbox)??,
            () = more, if under_way.len() < BULK_STREAMS => {}
        }
    }
}

/// What was sent on the small stream and not answered, in order.
#[derive(Default)]
struct Window {
    sent: Mutex<VecDeque<Unanswered>>,
    /// Something was answered.
    freed: Notify,
}

struct Unanswered {
    no: u64,
    bytes: usize,
    since: Instant,
}

impl Window {
    fn sent(&self) -> MutexGuard<'_, VecDeque<Unanswered>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        self.sent().is_empty()
    }

    fn is_overdue(&self) -> bool {
        self.sent().front().is_some_and(|f| f.since.elapsed() >= SILENCE)
    }

    /// Operations and bytes that may be sent now; waits until there are any.
    async fn room(&self) -> (usize, usize) {
        loop {
            let freed = self.freed.notified();
            {
                let sent = self.sent();
                let ops = WINDOW_OPS.saturating_sub(sent.len());
                let bytes =
                    WINDOW_BYTES.saturating_sub(sent.iter().map(|u| u.bytes).sum::<usize>());
                if ops > 0 && bytes > 0 {
                    return (ops, bytes);
                }
            }
            freed.await;
        }
    }

    fn push(&self, ops: &[Op]) -> Result<(), DeliverError> {
        let since = Instant::now();
        for op in ops {
            let bytes = size_of(op)?;
            self.sent().push_back(Unanswered { no: op.no, bytes, since });
        }
        Ok(())
    }

    /// The answer to the oldest one has come.
    fn pop(&self, no: u64) -> Result<(), DeliverError> {
        match self.sent().pop_front() {
            Some(oldest) if oldest.no == no => {
                self.freed.notify_one();
                Ok(())
            }
            _ => Err(DeliverError::Breach("an outcome out of turn")),
        }
    }
}

/// Bytes of an operation on the wire.
fn size_of(op: &Op) -> Result<usize, DeliverError> {
    match postcard::experimental::serialized_size(op).map_err(WireError::from)? {
        bytes if bytes > MAX_OP => Err(DeliverError::TooLong { no: op.no, bytes }),
        bytes => Ok(bytes),
    }
}

async fn send_frames(
    send: &mut SendStream,
    settled_below: u64,
    ops: Vec<Op>,
) -> Result<(), DeliverError> {
    for frame in frames(settled_below, ops)? {
        let sent = timeout(STALL, wire::send_frame(send, &frame)).await;
        sent.map_err(|_| WireError::Lost("the peer takes no operations".into()))??;
    }
    Ok(())
}

/// As few frames as their bound allows; without operations one, for the number.
fn frames(settled_below: u64, ops: Vec<Op>) -> Result<Vec<Operations>, DeliverError> {
    if ops.is_empty() {
        return Ok(vec![Operations::Whole { settled_below, ops }]);
    }
    let mut frames = Vec::new();
    for ops in wire::in_frames(ops)? {
        match &ops[..] {
            [long] if size_of(long)? > MAX_FRAME - FRAME_HEAD => frames.extend(parts(long)?),
            _ => frames.push(Operations::Whole { settled_below, ops }),
        }
    }
    Ok(frames)
}

fn parts(op: &Op) -> Result<Vec<Operations>, DeliverError> {
    let mut body = Bytes::from(postcard::to_stdvec(op).map_err(WireError::from)?);
    let mut parts = Vec::new();
    while !body.is_empty() {
        let bytes = body.split_to(body.len().min(MAX_FRAME - FRAME_HEAD));
        parts.push(Operations::Part { bytes, rest: body.len() as u32 });
    }
    Ok(parts)
}

/// Whether an outcome from a peer keeps its bounds.
fn is_bounded(outcome: &Outcome) -> bool {
    let path = |p: &[Name]| (1..=MAX_DEPTH).contains(&p.len()) && path_bytes(p) <= MAX_PATH_BYTES;
    match outcome {
        Outcome::Applied(applied) => {
            let is_id = |file: FileId| (FileId::ROOT.0..FileId::LIMIT).contains(&file.0);
            let is_size = |version: Stamp| i64::try_from(version.size).is_ok();
            applied.file.is_none_or(is_id)
                && applied.version.is_none_or(is_size)
                && match &applied.conflict {
                    Some(Conflict::KeptAs(p) | Conflict::MadeAgain(p)) => path(p),
                    Some(Conflict::OwnerStands(reason)) => reason.len() <= MAX_REASON,
                    None => true,
                }
        }
        Outcome::Refused(ops::Refusal::Impossible(reason))
        | Outcome::Later(Obstacle::Failed(reason)) => reason.len() <= MAX_REASON,
        Outcome::Refused(_) | Outcome::Later(_) => true,
    }
}

/// Gives the owner the bytes of an operation that was delivered to it.
pub(crate) async fn serve_staged(
    shared: &Arc<Shared>,
    peer: &Peer,
    link: &Link,
    staged: Staged,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let Some(total) = total_bytes(&staged) else {
        return reply(send, &Response::Refused(Refusal::Malformed)).await;
    };
    let Some(outbox) = shared.outbox.clone().filter(|o| o.epoch() == staged.epoch) else {
        return reply(send, &Response::Refused(Refusal::NotShared)).await;
    };
    // Held until the bytes are gone: it is what bounds the memory of a connection.
    let Ok(_permit) = link.staged.acquire().await else { return Ok(()) };
    let _ = send.set_priority(BULK);
    let owner = peer.id;
    let read = tokio::task::spawn_blocking(move || read_ranges(&*outbox, owner, &staged));
    match read.await {
        Ok(Ok(bytes)) if bytes.len() as u64 == total => {
            wire::send_frame(send, &Response::Staged).await?;
            send_bytes(peer, bytes, send).await?;
            let _ = send.finish();
            Ok(())
        }
        Ok(Err(error)) => {
            tracing::debug!(peer = %owner, %error, "staged bytes were refused");
            reply(send, &Response::Refused(Refusal::NotShared)).await
        }
        _ => reply(send, &Response::Refused(Refusal::Failed)).await,
    }
}

/// Bytes asked for, when they are within the bounds.
fn total_bytes(staged: &Staged) -> Option<u64> {
    let mut total = 0u64;
    for range in &staged.ranges {
        let len = range.end.checked_sub(range.start).filter(|n| (1..=MAX_STAGED_BYTES).contains(n));
        total += len?;
    }
    (1..=MAX_STAGED_BYTES).contains(&total).then_some(total)
}

fn read_ranges(outbox: &dyn Outgoing, owner: DeviceId, staged: &Staged) -> FsResult<Bytes> {
    if let [range] = &staged.ranges[..] {
        return outbox.read(owner, staged.no, range.clone());
    }
    let mut all = BytesMut::new();
    for range in &staged.ranges {
        all.extend_from_slice(&outbox.read(owner, staged.no, range.clone())?);
    }
    Ok(all.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_gathers_until_it_is_quiet_or_takes_long() {
        let (ticks, mut changed) = watch::channel(0);
        let at_once = timeout(Duration::ZERO, gather(&mut changed, || false)).await;
        assert!(at_once.is_err());
        let awaited = timeout(Duration::ZERO, gather(&mut changed, || true)).await;
        assert!(awaited.is_ok());

        gather(&mut changed, || false).await;
        let writer = async {
            loop {
                ticks.send_modify(|n| *n += 1);
                sleep(GATHER / 4).await;
            }
        };
        tokio::select! {
            () = gather(&mut changed, || false) => {}
            () = writer => {}
        }
    }
}
