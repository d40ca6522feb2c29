//! Others' writes to this device's files: taken in, judged, handed to the applier, answered.
//!
//! A stream brings operations, is read ahead by a little, and is worked off in batches of
//! what has arrived. For each batch the applier says what bytes are missing; they are
//! pulled from the writer; then it applies all, and the outcomes go back in order.
//!
//! Nothing is applied twice at once, and nothing out of turn: a writer that begins anew
//! announces a new session ([`Turns`]), and what was left of the one before, on whatever
//! connection, has ended before the new one's first operation is looked at.

use crate::deliver::{MAX_PATH_BYTES, path_bytes};
use crate::fetch::{Failure, receive_bytes};
use crate::node::Shared;
use crate::presence::{Link, Peer, reply};
use crate::wire::{
    self, Deliver, MAX_OP, MAX_OPS, MAX_REASON, MAX_STAGED_BYTES, MAX_STAGED_RANGES, Operations,
    Refusal, Request, Response, Staged, WireError,
};
use bytes::Bytes;
use iroh::endpoint::{RecvStream, SendStream};
use std::any::Any;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{OwnedRwLockReadGuard, OwnedSemaphorePermit, RwLock, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use vfs_core::apply::{Applier, Need, Receiving, Writer};
use vfs_core::error::{FsResult, Kind};
use vfs_core::model::DeviceId;
use vfs_core::ops::{self, Conflict, MAX_DEPTH, Obstacle, Op, OpId, Outcome};

/// How often a writer is told that its operations are still being worked on.
pub const BEAT: Duration = Duration::from_secs(10);
/// Frames of one stream that are read ahead.
const AHEAD: usize = 2;
/// How long the rest of a long operation may take to come.
const REST: Duration = Duration::from_secs(60);
/// How long the writer may take nothing of the answers.
const STALL: Duration = Duration::from_secs(30);
/// How long a request for staged bytes may take.
const PULL: Duration = Duration::from_secs(30);
/// How often bytes that are not what the operation says are pulled again.
const PULL_AGAIN: usize = 1;

/// What taking in needs of the [`Applier`], whose methods say what each does. They block.
pub trait Applies: Send + Sync {
    /// [`Applier::need`]; `None` is nothing.
    fn need(&self, writer: DeviceId, id: OpId, op: &Op) -> Option<Box<dyn Receive>>;
    /// [`Applier::apply`].
    fn apply(&self, writer: &Writer, ops: Vec<Arrived>) -> Vec<Outcome>;
    /// [`Applier::forget_below`].
    fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64);
}

/// An operation with the place that its bytes were put.
pub type Arrived = (OpId, Op, Option<Box<dyn Receive>>);

/// What taking in needs of a [`Receiving`].
pub trait Receive: Any + Send + Sync {
    /// [`Receiving::wanted`].
    fn wanted(&self) -> Vec<Range<u64>>;
    /// [`Receiving::write`].
    fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()>;
    /// [`Receiving::finish`].
    fn finish(&self) -> FsResult<()>;
}

impl Applies for Applier {
    fn need(&self, writer: DeviceId, id: OpId, op: &Op) -> Option<Box<dyn Receive>> {
        match self.need(writer, id, op) {
            Need::Nothing => None,
            Need::Bytes(receiving) => Some(Box::new(receiving)),
        }
    }

    fn apply(&self, writer: &Writer, ops: Vec<Arrived>) -> Vec<Outcome> {
        let own = |received: Box<dyn Receive>| {
            let any: Box<dyn Any> = received;
            any.downcast::<Receiving>().ok().map(|r| *r)
        };
        self.apply(writer, ops.into_iter().map(|(id, op, r)| (id, op, r.and_then(own))).collect())
    }

    fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64) {
        self.forget_below(writer, epoch, no);
    }
}

impl Receive for Receiving {
    fn wanted(&self) -> Vec<Range<u64>> {
        self.wanted()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()> {
        self.write(offset, bytes)
    }

    fn finish(&self) -> FsResult<()> {
        self.finish()
    }
}

/// Which session of a writer is served: the newest one on the connection there is now.
#[derive(Default)]
pub(crate) struct Turns {
    newest: watch::Sender<Session>,
    /// Read-locked by work under way.
    working: Arc<RwLock<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Session {
    link: u64,
    number: u64,
    /// Whatever went before it has ended.
    has_begun: bool,
}

/// Keeps the next session waiting.
type AtWork = Arc<OwnedRwLockReadGuard<()>>;

impl Turns {
    /// Waits for the session's turn; `None` when a newer one has come.
    async fn enter<'a>(&'a self, peer: &Peer, link: &Link, number: u64) -> Option<Turn<'a>> {
        let is_installed = peer.link().is_some_and(|l| l.no == link.no);
        if !is_installed {
            return None;
        }
        let mine = Session { link: link.no, number, has_begun: true };
        let is_first = self.newest.send_if_modified(|newest| {
            let is_newer = newest.link != link.no || newest.number < number;
            if is_newer {
                *newest = Session { has_begun: false, ..mine };
            }
            is_newer
        });
        let turn = Turn { turns: self, mine };
        if is_first {
            drop(self.working.write().await);
            self.newest.send_if_modified(|newest| {
                let is_mine = turn.is_of(newest);
                newest.has_begun |= is_mine;
                is_mine
            });
        }
        let mut newest = self.newest.subscribe();
        let settled = newest.wait_for(|n| n.has_begun || !turn.is_of(n)).await.ok()?;
        (*settled == mine).then_some(turn)
    }
}

/// A session whose turn it was; and still is, unless a newer one has come.
struct Turn<'a> {
    turns: &'a Turns,
    mine: Session,
}

impl Turn<'_> {
    fn is_of(&self, session: &Session) -> bool {
        (session.link, session.number) == (self.mine.link, self.mine.number)
    }

    /// Ends when a newer session comes.
    async fn over(&self) {
        let mut newest = self.turns.newest.subscribe();
        let _ = newest.wait_for(|n| !self.is_of(n)).await;
    }

    /// To be held for as long as anything is done for the session.
    async fn work(&self) -> Result<AtWork, WireError> {
        let at_work = self.turns.working.clone().read_owned().await;
        match self.is_of(&self.turns.newest.borrow()) {
            true => Ok(Arc::new(at_work)),
            false => Err(over()),
        }
    }
}

fn over() -> WireError {
    WireError::Lost("a newer session has come".into())
}

/// An operation in memory.
struct Queued {
    op: Op,
    /// When it is a long one.
    room: Option<OwnedSemaphorePermit>,
}

/// Operations of one frame, or one that came in parts.
struct Frame {
    settled_below: u64,
    ops: Vec<Queued>,
}

/// What a stream's work is done with.
struct Stream<'a> {
    shared: &'a Arc<Shared>,
    applier: Arc<dyn Applies>,
    peer: &'a Arc<Peer>,
    link: &'a Arc<Link>,
    epoch: u64,
    turn: Turn<'a>,
}

/// Takes in operations until the writer ends the stream.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    deliver: Deliver,
    send: &mut SendStream,
    recv: &mut RecvStream,
) -> Result<(), WireError> {
    let Some(applier) = shared.applier.clone() else {
        return reply(send, &Response::Refused(Refusal::NotShared)).await;
    };
    let Ok(_permit) = link.deliveries.acquire().await else { return Ok(()) };
    let Some(turn) = peer.turns.enter(peer, link, deliver.session).await else {
        return reply(send, &Response::Refused(Refusal::Stale)).await;
    };
    wire::send_frame(send, &Response::Done).await?;
    let stream = Stream { shared, applier, peer, link, epoch: deliver.epoch, turn };
    let (queue, queued) = mpsc::channel(if deliver.bulk { 1 } else { AHEAD });
    let served = async {
        tokio::try_join!(stream.read(recv, queue, deliver.bulk), stream.work_off(queued, send))
    };
    let ended = tokio::select! {
        ended = served => ended.map(|_| ()),
        () = stream.turn.over() => Err(over()),
    };
    if ended.is_ok() {
        let _ = send.finish();
    } else if matches!(ended, Err(WireError::Lost(_))) {
        let _ = send.reset(0u32.into());
    }
    ended
}

impl Stream<'_> {
    /// Reads ahead, as far as the queue takes it.
    async fn read(
        &self,
        recv: &mut RecvStream,
        queue: mpsc::Sender<Frame>,
        bulk: bool,
    ) -> Result<(), WireError> {
        let mut settled_below = 0;
        while let Some(operations) = wire::receive_frame_or_end(recv).await? {
            self.link.heard();
            let frame = match operations {
                Operations::Whole { settled_below: below, ops } => {
                    settled_below = below;
                    let ops = ops.into_iter().map(|op| Queued { op, room: None }).collect();
                    Frame { settled_below, ops }
                }
                Operations::Part { bytes, rest } => {
                    let whole = timeout(REST, self.read_rest(recv, bytes, rest)).await;
                    let whole = whole.map_err(|_| WireError::Lost("too slow".into()))??;
                    Frame { settled_below, ops: vec![whole] }
                }
            };
            if queue.send(frame).await.is_err() || bulk {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The operation that began with these bytes.
    async fn read_rest(
        &self,
        recv: &mut RecvStream,
        first: Bytes,
        rest: u32,
    ) -> Result<Queued, WireError> {
        let length = first.len() + rest as usize;
        if length > MAX_OP {
            return Err(WireError::TooLong { length, bound: MAX_OP });
        }
        let room = self.link.long_op.clone().acquire_owned().await;
        let room = room.map_err(|e| WireError::Lost(e.to_string()))?;
        let (mut body, mut missing) = (Vec::from(first), rest as usize);
        while missing > 0 {
            match wire::receive_frame(recv).await? {
                Operations::Part { bytes, rest }
                    if !bytes.is_empty() && bytes.len() + rest as usize == missing =>
                {
                    body.extend_from_slice(&bytes);
                    missing = rest as usize;
                }
                _ => return Err(postcard::Error::DeserializeUnexpectedEnd.into()),
            }
            self.link.heard();
        }
        Ok(Queued { op: wire::decode(&body)?, room: Some(room) })
    }

    /// Applies what has arrived, batch by batch, and answers.
    async fn work_off(
        &self,
        mut queued: mpsc::Receiver<Frame>,
        send: &mut SendStream,
    ) -> Result<(), WireError> {
        while let Some(Frame { mut settled_below, mut ops }) = queued.recv().await {
            while ops.len() < MAX_OPS
                && let Ok(more) = queued.try_recv()
            {
                settled_below = settled_below.max(more.settled_below);
                ops.extend(more.ops);
            }
            let outcomes = beating(send, self.apply(ops, settled_below)).await?;
            for group in wire::in_frames(outcomes)? {
                answer(send, group).await?;
            }
        }
        Ok(())
    }

    async fn apply(
        &self,
        queued: Vec<Queued>,
        settled_below: u64,
    ) -> Result<Vec<(u64, Outcome)>, WireError> {
        let at_work = self.turn.work().await?;
        let writer = self.writer()?;
        let mut judged = self.judge(queued, &at_work).await;
        for (_, verdict) in &mut judged {
            self.gather(verdict, &at_work).await;
        }
        Ok(self.carry_out(judged, settled_below, writer, at_work).await)
    }

    /// Asked for every batch: the writer may have been removed since the stream began.
    fn writer(&self) -> Result<Writer, WireError> {
        let id = self.peer.id;
        let name = self.shared.library.with(|s| s.member(id).map(|m| m.name.clone()));
        match name.filter(|_| self.shared.is_peer(id)) {
            Some(name) => Ok(Writer { id, name }),
            None => Err(WireError::Lost("no longer a member".into())),
        }
    }

    fn id_of(&self, no: u64) -> OpId {
        OpId { writer: self.peer.id, epoch: self.epoch, no }
    }

    /// Finds out what each operation needs.
    async fn judge(&self, queued: Vec<Queued>, at_work: &AtWork) -> Vec<(u64, Verdict)> {
        let numbers: Vec<_> = queued.iter().map(|q| q.op.no).collect();
        let ids: Vec<_> = numbers.iter().map(|no| self.id_of(*no)).collect();
        let (applier, writer, at_work) = (self.applier.clone(), self.peer.id, at_work.clone());
        let judge = move |(queued, id): (Queued, OpId)| match queued.op.is_valid() {
            true => Verdict::Apply { received: applier.need(writer, id, &queued.op), queued },
            false => Verdict::Is(Outcome::Refused(ops::Refusal::Malformed)),
        };
        let work = move || {
            let _at_work = at_work;
            queued.into_iter().zip(ids).map(judge).collect::<Vec<_>>()
        };
        let verdicts = tokio::task::spawn_blocking(work).await.unwrap_or_default();
        let rest = std::iter::repeat_with(|| Verdict::Is(failed()));
        numbers.into_iter().zip(verdicts.into_iter().chain(rest)).collect()
    }

    /// Pulls the bytes that an operation needs.
    async fn gather(&self, verdict: &mut Verdict, at_work: &AtWork) {
        let Verdict::Apply { queued, received } = verdict else { return };
        let Some(place) = received.take() else { return };
        let extents = queued.op.change.content().map(|c| &c.extents[..]).unwrap_or_default();
        match self.pull(queued.op.no, extents, place, at_work).await {
            Ok(place) => *received = Some(place),
            Err(obstacle) => *verdict = Verdict::Is(Outcome::Later(obstacle)),
        }
    }

    async fn pull(
        &self,
        no: u64,
        extents: &[Range<u64>],
        mut place: Box<dyn Receive>,
        at_work: &AtWork,
    ) -> Result<Box<dyn Receive>, Obstacle> {
        for _ in 0..=PULL_AGAIN {
            let wanted;
            (place, wanted) = at_disk(place, at_work, |p| Ok(p.wanted())).await?;
            place = self.pull_ranges(no, &wanted, extents, place, at_work).await?;
            let is_right;
            (place, is_right) = at_disk(place, at_work, |p| Ok(p.finish().is_ok())).await?;
            if is_right {
                return Ok(place);
            }
        }
        Err(Obstacle::NoBytes)
    }

    async fn pull_ranges(
        &self,
        no: u64,
        wanted: &[Range<u64>],
        extents: &[Range<u64>],
        mut place: Box<dyn Receive>,
        at_work: &AtWork,
    ) -> Result<Box<dyn Receive>, Obstacle> {
        let mut requests = requests(pieces(wanted, extents));
        let mut under_way = JoinSet::new();
        let mut is_asked = false;
        loop {
            while !is_asked && let Some(room) = self.room_to_pull(under_way.is_empty()).await {
                match requests.next() {
                    Some(ranges) => {
                        let staged = Staged { epoch: self.epoch, no, ranges };
                        let (link, peer) = (self.link.clone(), self.peer.clone());
                        under_way.spawn(async move {
                            let bytes = staged_bytes(&link, &peer, &staged).await;
                            (staged.ranges, bytes, room)
                        });
                    }
                    None => is_asked = true,
                }
            }
            let Some(pulled) = self.next_pulled(&mut under_way).await? else { return Ok(place) };
            let (ranges, bytes, room) = pulled;
            let mut bytes = bytes.map_err(|_| Obstacle::NoBytes)?;
            let write = move |place: &dyn Receive| {
                let _room = room;
                ranges.iter().try_for_each(|range| {
                    let part = bytes.split_to((range.end - range.start) as usize);
                    place.write(range.start, &part)
                })
            };
            (place, ()) = at_disk(place, at_work, write).await?;
        }
    }

    /// Room for one more request: what is pulled for all streams is bounded together. Waited
    /// for only when nothing else would go on.
    async fn room_to_pull(&self, is_idle: bool) -> Option<OwnedSemaphorePermit> {
        let pulls = self.link.pulls.clone();
        match is_idle {
            true => pulls.acquire_owned().await.ok(),
            false => pulls.try_acquire_owned().ok(),
        }
    }

    /// The next answer. As long as anything comes from the writer, it is waited for.
    async fn next_pulled<T: 'static>(
        &self,
        under_way: &mut JoinSet<T>,
    ) -> Result<Option<T>, Obstacle> {
        loop {
            let before = self.peer.bytes_in.load(Ordering::Relaxed);
            match timeout(PULL, under_way.join_next()).await {
                Ok(None) => return Ok(None),
                Ok(Some(pulled)) => return pulled.map(Some).map_err(|_| Obstacle::NoBytes),
                Err(_) if self.peer.bytes_in.load(Ordering::Relaxed) == before => {
                    return Err(Obstacle::NoBytes);
                }
                Err(_) => {}
            }
        }
    }

    /// Applies what is to be applied, in order.
    async fn carry_out(
        &self,
        judged: Vec<(u64, Verdict)>,
        settled_below: u64,
        writer: Writer,
        at_work: AtWork,
    ) -> Vec<(u64, Outcome)> {
        let (mut arrived, mut rooms, mut known) = (Vec::new(), Vec::new(), Vec::new());
        for (no, verdict) in judged {
            known.push((
                no,
                match verdict {
                    Verdict::Is(outcome) => Some(outcome),
                    Verdict::Apply { queued, received } => {
                        arrived.push((self.id_of(no), queued.op, received));
                        rooms.push(queued.room);
                        None
                    }
                },
            ));
        }
        let (applier, epoch) = (self.applier.clone(), self.epoch);
        let work = move || {
            let applied = match arrived.is_empty() {
                true => vec![],
                false => applier.apply(&writer, arrived),
            };
            applier.forget_below(writer.id, epoch, settled_below);
            drop((at_work, rooms));
            applied
        };
        let mut applied = tokio::task::spawn_blocking(work).await.unwrap_or_default().into_iter();
        let mut outcome = |known: Option<Outcome>| known.or_else(|| applied.next());
        known.into_iter().map(|(no, is)| (no, clip(outcome(is).unwrap_or_else(failed)))).collect()
    }
}

/// What is to be done with an operation.
// Made once for an operation and taken apart at once.
#[allow(clippy::large_enum_variant)]
enum Verdict {
    /// It is answered so.
    Is(Outcome),
    /// It is to be applied, with the bytes that it needs.
    Apply { queued: Queued, received: Option<Box<dyn Receive>> },
}

fn failed() -> Outcome {
    Outcome::Later(Obstacle::Failed("its daemon failed at it; its log says more".into()))
}

/// Does something with the place for an operation's bytes, off the runtime's threads.
async fn at_disk<T: Send + 'static>(
    place: Box<dyn Receive>,
    at_work: &AtWork,
    work: impl FnOnce(&dyn Receive) -> FsResult<T> + Send + 'static,
) -> Result<(Box<dyn Receive>, T), Obstacle> {
    let at_work = at_work.clone();
    let work = move || {
        let _at_work = at_work;
        work(&*place).map(|done| (place, done))
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(e)) if matches!(e.kind(), Kind::NoSpace | Kind::QuotaExceeded) => {
            Err(Obstacle::NoSpace)
        }
        Ok(Err(e)) => Err(Obstacle::Failed(e.to_string())),
        Err(_) => Err(Obstacle::Failed("its daemon failed at it; its log says more".into())),
    }
}

/// What is wanted, in order, no piece longer than may be asked for, nor across two extents.
fn pieces<'a>(
    wanted: &'a [Range<u64>],
    extents: &'a [Range<u64>],
) -> impl Iterator<Item = Range<u64>> + 'a {
    let within = move |wanted: &'a Range<u64>| {
        let first = extents.partition_point(|e| e.end <= wanted.start);
        let touched = extents[first..].iter().take_while(|e| e.start < wanted.end);
        touched.map(|e| e.start.max(wanted.start)..e.end.min(wanted.end))
    };
    let split = |range: Range<u64>| {
        let starts = range.clone().step_by(MAX_STAGED_BYTES as usize);
        starts.map(move |start| start..range.end.min(start + MAX_STAGED_BYTES))
    };
    wanted.iter().flat_map(within).flat_map(split)
}

/// Pieces put together to as few requests as their bounds allow.
fn requests(pieces: impl Iterator<Item = Range<u64>>) -> impl Iterator<Item = Vec<Range<u64>>> {
    let mut pieces = pieces.peekable();
    std::iter::from_fn(move || {
        let mut total = 0;
        let mut ranges = Vec::new();
        while let Some(next) = pieces.next_if(|next| {
            ranges.len() < MAX_STAGED_RANGES && total + (next.end - next.start) <= MAX_STAGED_BYTES
        }) {
            total += next.end - next.start;
            ranges.push(next);
        }
        (!ranges.is_empty()).then_some(ranges)
    })
}

/// Asks the writer for staged bytes.
async fn staged_bytes(link: &Link, peer: &Peer, staged: &Staged) -> Result<Bytes, Failure> {
    let total: u64 = staged.ranges.iter().map(|r| r.end - r.start).sum();
    let (mut send, mut recv) = link.connection.open_bi().await.map_err(WireError::from)?;
    wire::send_request(&mut send, link.version, &Request::Staged(staged.clone())).await?;
    let _ = send.finish();
    match link.answer(&mut recv).await? {
        Response::Staged => receive_bytes(link, &mut recv, total as usize, &peer.bytes_in).await,
        _ => Err(Failure::Lost),
    }
}

/// Sends that the work goes on for as long as it does.
async fn beating<T>(
    send: &mut SendStream,
    work: impl Future<Output = Result<T, WireError>>,
) -> Result<T, WireError> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = sleep(BEAT) => answer(send, vec![]).await?,
        }
    }
}

async fn answer(send: &mut SendStream, outcomes: Vec<(u64, Outcome)>) -> Result<(), WireError> {
    let response = Response::Outcomes(outcomes);
    let sent = timeout(STALL, wire::send_frame(send, &response)).await;
    sent.map_err(|_| WireError::Lost("the peer takes no answers".into()))?
}

/// Keeps the bounds of what a peer takes.
fn clip(mut outcome: Outcome) -> Outcome {
    let clip_path = |path: &mut Vec<_>| {
        path.drain(..path.len().saturating_sub(MAX_DEPTH));
        while path_bytes(path) > MAX_PATH_BYTES {
            path.remove(0);
        }
    };
    match &mut outcome {
        Outcome::Applied(applied) => match &mut applied.conflict {
            Some(Conflict::KeptAs(path) | Conflict::MadeAgain(path)) => clip_path(path),
            Some(Conflict::OwnerStands(reason)) => clip_reason(reason),
            None => {}
        },
        Outcome::Refused(ops::Refusal::Impossible(reason))
        | Outcome::Later(Obstacle::Failed(reason)) => clip_reason(reason),
        Outcome::Refused(_) | Outcome::Later(_) => {}
    }
    outcome
}

fn clip_reason(reason: &mut String) {
    let end = (0..=MAX_REASON.min(reason.len())).rev().find(|n| reason.is_char_boundary(*n));
    reason.truncate(end.unwrap_or(0));
}
