//! Operations on their way from a writer to the owner, with an outbox and an applier that do
//! as the test says.

use crate::books::{In, Out, content, create};
use crate::content::pattern;
use crate::device::{Device, Writes, id_of, raw_endpoint, until};
use crate::strangers::{greet, open_request};
use bytes::Bytes;
use iroh::endpoint::{Connection, RecvStream, SendStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sync::Outgoing;
use sync::wire::{self, Deliver, MAX_STAGED_BYTES, Operations, Refusal, Request, Response, Staged};
use vfs_core::model::{FileId, LocationId};
use vfs_core::ops::{self, Change, MAX_EXTENTS, NewContent, Obstacle, Op, Outcome};
use vfs_core::outbox::Lane;

/// An owner and a writer that see each other.
pub struct Pair {
    pub owner: Device,
    pub writer: Device,
    pub out: Arc<Out>,
    pub into: Arc<In>,
}

impl Pair {
    async fn new() -> Self {
        let into = In::new();
        let owner = Device::with(Writes::In(into.clone())).await;
        owner.found("desk");
        let out = Out::new(owner.id(), LocationId(rand::random()));
        let writer = Device::with(Writes::Out(out.clone())).await;
        owner.pair(&writer, "laptop").await;
        Self { owner, writer, out, into }
    }

    async fn until_delivered(&self) {
        until("all is delivered", || self.out.open() == 0).await;
    }
}

fn is_applied(outcome: &Option<Outcome>) -> bool {
    matches!(outcome, Some(Outcome::Applied(_)))
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_arrive_in_order_and_are_forgotten_when_their_outcomes_are_noted() {
    let pair = Pair::new().await;
    for n in 0..2000 {
        pair.out.create(&format!("{n}"), &pattern(100));
    }
    pair.until_delivered().await;
    assert_eq!(pair.into.done(), (1..=2000).collect::<Vec<_>>());
    for (id, op) in pair.into.done_ops() {
        assert_eq!((id.writer, id.epoch), (pair.writer.id(), pair.out.epoch));
        assert_eq!(op, pair.out.op(id.no));
    }
    assert!(pair.into.writers().iter().all(|w| w == "laptop"));
    until("they are forgotten", || pair.into.forgotten_below() == 2001).await;
    assert!((1..=2000).all(|no| pair.out.times_sent(no) == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_pulled_and_hold_up_no_small_operation() {
    let pair = Pair::new().await;
    let bytes = Bytes::from(pattern((40 << 20) + 12_345));
    let large: Vec<_> =
        (0..5).map(|n| pair.out.create_large(&format!("large {n}"), bytes.clone())).collect();
    until("pulling has begun", || pair.into.received() > 0).await;
    let small = pair.out.create("small", b"now");
    until("the small one is there", || is_applied(&pair.out.outcome(small))).await;
    assert!(large.iter().any(|no| pair.out.outcome(*no).is_none()), "before the large ones");
    pair.until_delivered().await;
    for no in large {
        assert!(is_applied(&pair.out.outcome(no)));
        assert!(pair.into.bytes_of(no).unwrap() == bytes);
        assert_eq!(pair.out.bytes_read(no), bytes.len() as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_ranges_of_one_operation_travel_together() {
    let pair = Pair::new().await;
    let bytes = Bytes::from(pattern(4 << 20));
    let extents: Vec<_> = (0..bytes.len() as u64 / 512).map(|n| n * 512..n * 512 + 300).collect();
    let mut hasher = blake3::Hasher::new();
    for extent in &extents {
        hasher.update(&bytes[extent.start as usize..extent.end as usize]);
    }
    let digest = *hasher.finalize().as_bytes();
    let content = NewContent { extents, digest, ..content(&bytes, None) };
    let no = pair.out.put(create(FileId::ROOT, "sparse", content), Lane::Bulk, bytes);
    pair.until_delivered().await;
    assert_eq!(blake3::hash(&pair.into.bytes_of(no).unwrap()), digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_longer_than_a_frame_arrives_whole_and_in_its_place() {
    let pair = Pair::new().await;
    pair.into.want_no_bytes();
    let extents: Vec<_> = (0..MAX_EXTENTS as u64).map(|n| n << 40..(n << 40) + 1).collect();
    let size = extents.last().unwrap().end;
    let content = NewContent { size, extents, ..content(b"", None) };
    let change = create(FileId::ROOT, "long", content);
    pair.out.create("before", b"1");
    pair.out.put(change.clone(), Lane::Small, Bytes::new());
    pair.out.create("after", b"2");
    pair.until_delivered().await;
    assert_eq!(pair.into.done(), [1, 2, 3]);
    assert_eq!(pair.into.done_ops()[1].1.change, change);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_too_long_for_a_message_holds_up_nothing_but_itself() {
    let pair = Pair::new().await;
    pair.into.want_no_bytes();
    let first = pair.out.create("before", b"1");
    // Twenty bytes for each: more than the 32 MiB that an operation may have.
    let extents: Vec<_> = (0..2 * MAX_EXTENTS as u64).map(|n| n + (1 << 62)..u64::MAX).collect();
    let change = create(FileId::ROOT, "long", NewContent { extents, ..content(b"", None) });
    let small = pair.out.put(change.clone(), Lane::Small, Bytes::new());
    let bulk = pair.out.put(change, Lane::Bulk, Bytes::new());
    let last = pair.out.create("after", b"2");
    pair.until_delivered().await;
    assert_eq!(pair.into.done(), [first, last]);
    for no in [small, bulk] {
        let outcome = pair.out.outcome(no);
        let why = Outcome::Refused(ops::Refusal::Impossible("it is too long for a message".into()));
        assert_eq!(outcome, Some(why));
        assert_eq!(pair.out.times_sent(no), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_now_is_sent_again_and_holds_up_nothing() {
    let pair = Pair::new().await;
    pair.into.obstruct(1, Some(Obstacle::NoSpace));
    let (mkdir, _) = pair.out.mkdir("dir");
    let beside = pair.out.create("beside", b"2");
    let later = Some(Outcome::Later(Obstacle::NoSpace));
    until("both are answered", || {
        pair.out.outcome(mkdir) == later && is_applied(&pair.out.outcome(beside))
    })
    .await;
    pair.into.obstruct(1, None);
    pair.out.try_again();
    pair.until_delivered().await;
    assert_eq!(pair.into.done(), [beside, mkdir]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cut_off_is_delivered_again_and_applied_once() {
    let pair = Pair::new().await;
    pair.into.stick(true);
    for n in 0..10 {
        pair.out.create(&format!("{n}"), b"bytes");
    }
    until("the owner is at it", || pair.into.entered() > 0).await;
    // The writer goes, and comes back: what the owner was doing has not ended.
    let (dir, key) = (pair.writer.dir.clone(), pair.writer.key);
    pair.writer.node.shutdown().await;
    let Pair { owner, writer, out, into } = pair;
    drop(writer);
    let writer = Device::restart(&dir, key, Writes::Out(out.clone())).await;
    owner.meet(&writer).await;
    // Nothing of the new session is looked at before what was begun has ended.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((into.entered(), into.done()), (1, vec![]));
    into.stick(false);
    until("all is delivered", || out.open() == 0).await;
    assert_eq!(into.done(), (1..=10).collect::<Vec<_>>());
    assert_eq!(out.times_sent(1), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_upload_goes_on_where_it_was_cut_off() {
    let pair = Pair::new().await;
    let bytes = Bytes::from(pattern(256 << 20));
    let total = bytes.len() as u64;
    let no = pair.out.create_large("large", bytes.clone());
    until("a third has come", || pair.into.received() > total / 3).await;
    let (dir, key) = (pair.writer.dir.clone(), pair.writer.key);
    pair.writer.node.shutdown().await;
    let Pair { owner, writer, out, into } = pair;
    drop(writer);
    assert_eq!(out.open(), 1, "it was cut off");
    let writer = Device::restart(&dir, key, Writes::Out(out.clone())).await;
    owner.meet(&writer).await;
    until("all is delivered", || out.open() == 0).await;
    assert!(into.bytes_of(no).unwrap() == bytes);
    let again = out.bytes_read(no) - total;
    assert!(again <= 16 * MAX_STAGED_BYTES, "{again} bytes were sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_takes_no_writes_is_told_of() {
    let owner = Device::first("desk").await;
    let out = Out::new(owner.id(), LocationId(rand::random()));
    let writer = Device::with(Writes::Out(out.clone())).await;
    owner.pair(&writer, "laptop").await;
    out.create("x", b"y");
    until("the person is told", || {
        let peer = writer.peer(owner.id());
        peer.and_then(|p| p.last_error).is_some_and(|e| e.contains("NotShared"))
    })
    .await;
    assert_eq!(out.open(), 1);
}

/// A member that is no program of ours.
pub async fn raw_writer(owner: &Device) -> (iroh::Endpoint, Connection) {
    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    owner.admit(id_of(&key), "raw");
    let connection = greet(&endpoint, owner).await;
    (endpoint, connection)
}

pub async fn begin(connection: &Connection, session: u64) -> (SendStream, RecvStream) {
    let deliver = Deliver { epoch: 7, session, bulk: false };
    let (send, mut recv) = open_request(connection, &Request::Deliver(deliver)).await;
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, Response::Done);
    (send, recv)
}

fn op(no: u64, name: &str) -> Op {
    let bytes = Bytes::from_static(b"bytes");
    let change = create(FileId::ROOT, name, content(&bytes, Some(bytes.clone())));
    Op { no, location: LocationId([1; 16]), log_id: 1, change }
}

async fn owner_of(into: &Arc<In>) -> Device {
    let owner = Device::with(Writes::In(into.clone())).await;
    owner.found("desk");
    owner
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_out_of_bounds_are_refused_and_the_others_are_not() {
    let into = In::new();
    let owner = owner_of(&into).await;
    let (_endpoint, connection) = raw_writer(&owner).await;
    let (mut send, mut recv) = begin(&connection, 1).await;
    let mut bad = op(2, "b");
    let Change::Create { perm, .. } = &mut bad.change else { panic!() };
    *perm = 0o10000;
    let ops = vec![op(1, "a"), bad, op(0, "zero"), op(3, "c")];
    wire::send_frame(&mut send, &Operations::Whole { settled_below: 1, ops }).await.unwrap();
    let Response::Outcomes(outcomes) = wire::receive_frame(&mut recv).await.unwrap() else {
        panic!()
    };
    assert_eq!(outcomes.iter().map(|(no, _)| *no).collect::<Vec<_>>(), [1, 2, 0, 3]);
    let malformed = Outcome::Refused(ops::Refusal::Malformed);
    assert_eq!((&outcomes[1].1, &outcomes[2].1), (&malformed, &malformed));
    assert_eq!(into.done(), [1, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_none_end_their_stream_only() {
    let into = In::new();
    let owner = owner_of(&into).await;
    let (_endpoint, connection) = raw_writer(&owner).await;
    let part = |len: usize, rest| Operations::Part { bytes: vec![0; len].into(), rest };
    let senseless: Vec<Vec<Operations>> = vec![
        vec![part(1000, wire::MAX_OP as u32)],
        vec![part(1000, 1000), part(0, 1000)],
        vec![part(1000, 1000), part(1000, 1000)],
        vec![part(1000, 1000), Operations::Whole { settled_below: 0, ops: vec![] }],
        vec![part(1000, 0)],
    ];
    for (n, frames) in senseless.into_iter().enumerate() {
        let (mut send, mut recv) = begin(&connection, n as u64 + 1).await;
        for frame in &frames {
            wire::send_frame(&mut send, frame).await.unwrap();
        }
        let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
        assert_eq!(answer, Response::Refused(Refusal::Malformed), "{n}");
    }
    let (mut send, mut recv) = begin(&connection, 100).await;
    send.write_all(&(wire::MAX_FRAME as u32 + 1).to_le_bytes()).await.unwrap();
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, Response::Refused(Refusal::Malformed));
    let (mut send, mut recv) = begin(&connection, 101).await;
    let ops = vec![op(1, "a")];
    wire::send_frame(&mut send, &Operations::Whole { settled_below: 1, ops }).await.unwrap();
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert!(matches!(answer, Response::Outcomes(_)), "the connection is good");
    assert_eq!(into.done(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_earlier_session_is_over_when_a_later_one_begins() {
    let into = In::new();
    let owner = owner_of(&into).await;
    let (_endpoint, connection) = raw_writer(&owner).await;
    let (mut first, mut answers) = begin(&connection, 1).await;
    let (mut second, mut later_answers) = begin(&connection, 2).await;
    let whole = |ops| Operations::Whole { settled_below: 0, ops };
    let _ = wire::send_frame(&mut first, &whole(vec![op(1, "of the first")])).await;
    assert!(wire::receive_frame::<Response>(&mut answers).await.is_err(), "no answer any more");
    wire::send_frame(&mut second, &whole(vec![op(2, "of the second")])).await.unwrap();
    wire::receive_frame::<Response>(&mut later_answers).await.unwrap();
    assert_eq!(into.done(), [2]);
    let deliver = Deliver { epoch: 7, session: 1, bulk: true };
    let (_send, mut recv) = open_request(&connection, &Request::Deliver(deliver)).await;
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, Response::Refused(Refusal::Stale), "it does not come back");
}

#[tokio::test(flavor = "multi_thread")]
async fn staged_bytes_are_for_the_owner_only_and_within_bounds() {
    let pair = Pair::new().await;
    let bytes = Bytes::from(pattern(3 << 20));
    pair.into.obstruct(1, Some(Obstacle::NoSpace));
    let no = pair.out.create_large("large", bytes.clone());
    until("it was delivered, and waits", || pair.out.outcome(no).is_some()).await;
    pair.out.take(pair.owner.id(), Lane::Bulk, 1, usize::MAX);

    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    pair.writer.admit(id_of(&key), "raw");
    let connection = greet_with(&endpoint, &pair.writer, &pair.owner).await;
    let ask = |epoch, no, ranges| {
        let connection = connection.clone();
        async move {
            let request = Request::Staged(Staged { epoch, no, ranges });
            let (_send, mut recv) = open_request(&connection, &request).await;
            wire::receive_frame::<Response>(&mut recv).await.unwrap()
        }
    };
    let not_shared = Response::Refused(Refusal::NotShared);
    let malformed = Response::Refused(Refusal::Malformed);
    let epoch = pair.out.epoch;
    assert_eq!(ask(epoch, no, vec![0..1000]).await, not_shared, "another member's");
    assert_eq!(ask(epoch, 77, vec![0..1000]).await, not_shared);
    assert_eq!(ask(epoch + 1, no, vec![0..1000]).await, not_shared);
    assert_eq!(ask(epoch, no, vec![]).await, malformed);
    assert_eq!(ask(epoch, no, vec![5..5]).await, malformed);
    #[allow(clippy::reversed_empty_ranges)]
    let backwards = vec![6..5];
    assert_eq!(ask(epoch, no, backwards).await, malformed);
    assert_eq!(ask(epoch, no, vec![0..MAX_STAGED_BYTES + 1]).await, malformed);
    assert_eq!(ask(epoch, no, vec![0..u64::MAX]).await, malformed);
    assert_eq!(ask(epoch, no, vec![0..MAX_STAGED_BYTES; 2]).await, malformed);
}

/// Connects as a member of the library that `founder` made.
async fn greet_with(endpoint: &iroh::Endpoint, to: &Device, founder: &Device) -> Connection {
    let library = founder.library.state().library.unwrap().id;
    assert_eq!(library, crate::strangers::hello().library);
    greet(endpoint, to).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_breaks_the_protocol_settles_nothing_it_was_not_asked() {
    let key: [u8; 32] = rand::random();
    let endpoint = raw_endpoint(key).await;
    let out = Out::new(id_of(&key), LocationId(rand::random()));
    let writer = Device::with(Writes::Out(out.clone())).await;
    writer.found("laptop");
    writer.admit(id_of(&key), "raw");
    let first = out.create("a", b"1");
    let second = out.create("b", b"2");
    let connection = greet(&endpoint, &writer).await;
    let applied = || Outcome::Refused(ops::Refusal::Permission);
    let long = Outcome::Refused(ops::Refusal::Impossible("x".repeat(wire::MAX_REASON + 1)));
    for lie in [
        Response::Outcomes(vec![(second, applied())]),
        Response::Outcomes(vec![(99, applied())]),
        Response::Outcomes(vec![(first, long)]),
        Response::Done,
    ] {
        let (mut send, mut recv) = accept_delivery(&connection).await;
        let _: Operations = wire::receive_frame(&mut recv).await.unwrap();
        wire::send_frame(&mut send, &lie).await.unwrap();
        assert!(wire::receive_frame::<Operations>(&mut recv).await.is_err(), "after {lie:?}");
        assert_eq!(out.open(), 2, "after {lie:?}");
        let error = writer.peer(id_of(&key)).unwrap().last_error;
        assert!(error.is_some_and(|e| e.contains("broke the protocol")), "after {lie:?}");
    }
    let (mut send, mut recv) = accept_delivery(&connection).await;
    let _: Operations = wire::receive_frame(&mut recv).await.unwrap();
    let both = Response::Outcomes(vec![(first, applied()), (second, applied())]);
    wire::send_frame(&mut send, &both).await.unwrap();
    until("the truth is noted", || out.open() == 0).await;
}

/// Waits for the next stream that delivers, answering whatever else is asked.
async fn accept_delivery(connection: &Connection) -> (SendStream, RecvStream) {
    loop {
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        let request = wire::receive_request::<Request>(&mut recv).await.unwrap();
        wire::send_frame(&mut send, &Response::Done).await.unwrap();
        if matches!(request, Request::Deliver(_)) {
            return (send, recv);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reads_go_on_during_an_upload() {
    // The owner reads a file of the writer, so that its bytes and the upload go one way.
    let pair = Pair::new().await;
    std::fs::create_dir_all(pair.writer.folder()).unwrap();
    std::fs::write(pair.writer.folder().join("file"), pattern(64 << 10)).unwrap();
    let location = pair.writer.add_location("files", None);
    pair.writer.indexer.watch(location.no);
    let version = crate::content::version_at(&pair.owner, &location, None).await;
    pair.out.create_large("large", Bytes::from(pattern(256 << 20)));
    until("the upload has begun", || pair.into.received() > 0).await;
    let source = pair.owner.node.source();
    let mut times = vec![];
    while pair.out.open() > 0 {
        let asked = Instant::now();
        source.fetch(pair.writer.id(), &version, 0..64 << 10).await.unwrap();
        times.push(asked.elapsed());
    }
    times.sort();
    let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{} reads during an upload: median {median:?}, slowest {slowest:?}", times.len());
    // A request that waited for the upload would be the only one.
    assert!(times.len() > 10 && median < Duration::from_secs(1));
}
