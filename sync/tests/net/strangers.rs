//! Who is not a member gets nothing, and who is cannot break anything.

use crate::device::{Device, id_of, raw_endpoint, until};
use iroh::Endpoint;
use iroh::endpoint::{Connection, ConnectionError, RecvStream, SendStream};
use std::time::Duration;
use sync::wire::{
    self, ALPN_MEMBER, ALPN_PAIR, Borrow, Deliver, Fetch, Follow, Hello, Knock, MAX_FRAME,
    MAX_REQUEST, MemberList, NEWEST, OLDEST, PairRefusal, PairRequest, PairResponse, PassOn,
    Refusal, Request, Response, Staged, close,
};
use tokio::time::timeout;
use vfs_core::locks::{Action, Holder, LockRequest, Mode, Span};
use vfs_core::model::{ContentId, FileId, LocationId, Seq, Stamp, Time};
use vfs_core::source::{Version, Wanted};

pub fn hello() -> Hello {
    Hello {
        oldest: OLDEST,
        newest: NEWEST,
        library: "00112233".into(),
        session: rand::random(),
        addresses: vec![],
    }
}

/// Connects as a member would.
pub async fn greet(endpoint: &Endpoint, to: &Device) -> Connection {
    let connection = endpoint.connect(to.address(), ALPN_MEMBER).await.unwrap();
    let answer = ask(&connection, &Request::Hello(hello())).await;
    assert!(matches!(answer, Some(Response::Hello(_))), "{answer:?}");
    connection
}

pub async fn open_request(connection: &Connection, request: &Request) -> (SendStream, RecvStream) {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    wire::send_request(&mut send, NEWEST, request).await.unwrap();
    (send, recv)
}

/// The answer, if there is any.
pub async fn ask(connection: &Connection, request: &Request) -> Option<Response> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    wire::send_request(&mut send, OLDEST, request).await.ok()?;
    let body = match request {
        Request::Members => wire::send_frame(&mut send, &MemberList(vec![])).await,
        Request::Locations => wire::send_frame(&mut send, &wire::LocationList(vec![])).await,
        Request::Statements => wire::send_frame(&mut send, &wire::StatementList(vec![])).await,
        _ => Ok(()),
    };
    body.ok()?;
    let _ = send.finish();
    wire::receive_frame(&mut recv).await.ok()
}

pub fn lock(location: LocationId, file: FileId) -> LockRequest {
    let action = Action::Set(Mode::Shared);
    LockRequest { location, file, holder: Holder(1), span: Span::ALL, action }
}

fn every_request(location: LocationId) -> Vec<Request> {
    let time = Time { secs: 0, nanos: 0 };
    let version = Version {
        location,
        file: FileId::ROOT,
        stamp: Stamp { disk_ino: 1, size: 1, mtime: time, ctime: time },
        content: None,
    };
    let wanted = Wanted { content: ContentId([1; 32]), size: 1 };
    vec![
        Request::Hello(hello()),
        Request::Ping,
        Request::Members,
        Request::Locations,
        Request::Rows(Follow { location, log_id: 0, after: Seq(0) }),
        Request::Fetch(Fetch { version: (&version).into(), offset: 0, len: 1 }),
        Request::Deliver(Deliver { epoch: 1, session: 1, bulk: false }),
        Request::Staged(Staged { epoch: 1, no: 1, ranges: vec![0..1] }),
        Request::Lock(lock(location, FileId::ROOT)),
        Request::Lends(vec![wanted]),
        Request::Borrow(Borrow { wanted, offset: 0, len: 1 }),
        Request::Statements,
        Request::PassOn(PassOn {
            follow: Follow { location, log_id: 0, after: Seq(0) },
            head: Seq(0),
        }),
    ]
}

fn code(reason: &ConnectionError) -> Option<u64> {
    match reason {
        ConnectionError::ApplicationClosed(closed) => Some(closed.error_code.into_inner()),
        _ => None,
    }
}

/// Tries every message on a connection of its own; gives the codes they were closed with.
async fn try_everything(endpoint: &Endpoint, at: &Device, location: LocationId) -> Vec<u64> {
    let mut codes = vec![];
    for request in every_request(location) {
        let connection = endpoint.connect(at.address(), ALPN_MEMBER).await.unwrap();
        let answer = ask(&connection, &request).await;
        assert_eq!(answer, None, "an answer to {request:?}");
        let closed = timeout(Duration::from_secs(5), connection.closed()).await.unwrap();
        codes.extend(code(&closed));
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_nothing_on_the_members_protocol() {
    let device = Device::first("desk").await;
    let location = device.add_location("photos", None);
    let stranger = raw_endpoint(rand::random()).await;
    let codes = try_everything(&stranger, &device, location.id).await;
    assert_eq!(codes, [u64::from(close::NOT_MEMBER); 13]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_device_gets_nothing_though_its_connection_lived() {
    let device = Device::first("desk").await;
    let location = device.add_location("photos", None);
    let key = rand::random();
    let removed = raw_endpoint(key).await;
    device.admit(id_of(&key), "laptop");
    let connection = greet(&removed, &device).await;
    assert_eq!(ask(&connection, &Request::Ping).await, Some(Response::Done));

    device.node.remove_device(id_of(&key)).await.unwrap();
    let closed = timeout(Duration::from_secs(5), connection.closed()).await.unwrap();
    assert_eq!(code(&closed), Some(u64::from(close::REMOVED)));
    for request in every_request(location.id) {
        assert_eq!(ask(&connection, &request).await, None);
    }
    let codes = try_everything(&removed, &device, location.id).await;
    assert_eq!(codes, [u64::from(close::REMOVED); 13]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_only_refusals_on_the_pairing_protocol() {
    let device = Device::first("desk").await;
    let invitation = device.node.invite(Duration::from_secs(60)).await.unwrap();
    let stranger = raw_endpoint(rand::random()).await;
    let knock = PairRequest::Knock(Knock {
        ticket: [0; 16],
        name: "x".into(),
        nonce: [0; 32],
        proof: [0; 32],
        addresses: vec![],
    });
    for (request, refusal) in
        [(PairRequest::Confirm, PairRefusal::Malformed), (knock, PairRefusal::Expired)]
    {
        let connection = stranger.connect(device.address(), ALPN_PAIR).await.unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        wire::send_request(&mut send, OLDEST, &request).await.unwrap();
        let answer: PairResponse = wire::receive_frame(&mut recv).await.unwrap();
        assert_eq!(answer, PairResponse::Refused(refusal));
    }
    // A member's request on the pairing protocol is not one there.
    let connection = stranger.connect(device.address(), ALPN_PAIR).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    wire::send_request(&mut send, OLDEST, &Request::Ping).await.unwrap();
    let _ = send.finish();
    let answer: PairResponse = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, PairResponse::Refused(PairRefusal::Malformed));
    assert_eq!(device.library.state().active().count(), 1);
    drop(invitation);
}

async fn member(device: &Device) -> (Endpoint, Connection) {
    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    device.admit(id_of(&key), "raw");
    let connection = greet(&endpoint, device).await;
    (endpoint, connection)
}

async fn send_raw(connection: &Connection, bytes: &[u8]) -> Option<Response> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    send.write_all(bytes).await.ok()?;
    let _ = send.finish();
    wire::receive_frame(&mut recv).await.ok()
}

fn header(version: u16, length: u32) -> Vec<u8> {
    [&version.to_le_bytes()[..], &length.to_le_bytes()].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn oversized_cut_and_senseless_messages_are_refused_and_the_connection_stays() {
    let device = Device::first("desk").await;
    let (_endpoint, connection) = member(&device).await;
    let malformed = Some(Response::Refused(Refusal::Malformed));
    let too_long = header(NEWEST, MAX_REQUEST as u32 + 1);
    assert_eq!(send_raw(&connection, &too_long).await, malformed);
    assert_eq!(send_raw(&connection, &header(NEWEST, u32::MAX)).await, malformed);
    let senseless = [header(NEWEST, 4), vec![0xff; 4]].concat();
    assert_eq!(send_raw(&connection, &senseless).await, malformed);
    let later = Some(Response::Refused(Refusal::Version { oldest: OLDEST, newest: NEWEST }));
    assert_eq!(send_raw(&connection, &header(NEWEST + 1, 0)).await, later);
    // Cut ones get no answer.
    assert_eq!(send_raw(&connection, &header(NEWEST, 100)).await, None);
    assert_eq!(send_raw(&connection, &[1]).await, None);
    assert_eq!(send_raw(&connection, &[]).await, None);
    let (mut send, mut recv) = open_request(&connection, &Request::Members).await;
    send.write_all(&(MAX_FRAME as u32 + 1).to_le_bytes()).await.unwrap();
    assert_eq!(wire::receive_frame::<Response>(&mut recv).await.ok(), malformed);

    assert_eq!(ask(&connection, &Request::Ping).await, Some(Response::Done));
    let again = ask(&connection, &Request::Hello(hello())).await;
    assert_eq!(again, malformed, "hello is said once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_out_of_bounds_is_refused() {
    let device = Device::first("desk").await;
    let location = device.add_location("photos", None);
    let (_endpoint, connection) = member(&device).await;
    let fetches = |r| if let Request::Fetch(fetch) = r { Some(fetch) } else { None };
    let fetch = every_request(location.id).into_iter().find_map(fetches).unwrap();
    for (offset, len) in [(0, 0), (0, u32::MAX), (u64::MAX, 1), (0, (1 << 20) + 1)] {
        let request = Request::Fetch(Fetch { offset, len, ..fetch.clone() });
        let answer = ask(&connection, &request).await;
        assert_eq!(answer, Some(Response::Refused(Refusal::Malformed)), "{offset}+{len}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_shared_is_not_served() {
    let device = Device::first("desk").await;
    let hidden = device.add_location("diary", Some(vec![]));
    let (_endpoint, connection) = member(&device).await;
    let asks_for_it =
        |r: &Request| matches!(r, Request::Rows(_) | Request::Fetch(_) | Request::Lock(_));
    for request in every_request(hidden.id).into_iter().filter(asks_for_it) {
        let answer = ask(&connection, &request).await;
        assert_eq!(answer, Some(Response::Refused(Refusal::NotShared)), "{request:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_library_and_another_version_are_told_apart() {
    let device = Device::first("desk").await;
    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    device.admit(id_of(&key), "raw");
    let with = |hello| {
        let (endpoint, device) = (&endpoint, &device);
        async move {
            let connection = endpoint.connect(device.address(), ALPN_MEMBER).await.unwrap();
            ask(&connection, &Request::Hello(hello)).await
        }
    };
    let elsewhere = Hello { library: "ffff".into(), ..hello() };
    assert_eq!(with(elsewhere).await, Some(Response::Refused(Refusal::OtherLibrary)));
    let later = Hello { oldest: NEWEST + 1, newest: NEWEST + 2, ..hello() };
    let refused = Refusal::Version { oldest: OLDEST, newest: NEWEST };
    assert_eq!(with(later).await, Some(Response::Refused(refused)));
    until("the person is told", || {
        let peer = device.peer(id_of(&key));
        peer.and_then(|p| p.last_error).is_some_and(|e| e.contains("update the older one"))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stranger_sends_without_end_does_not_fill_the_memory() {
    let device = Device::first("desk").await;
    let stranger = raw_endpoint(rand::random()).await;
    let connection = stranger.connect(device.address(), ALPN_PAIR).await.unwrap();
    // The first request never ends, so that the conversation goes on.
    let (mut first, _) = connection.open_bi().await.unwrap();
    first.write_all(&header(OLDEST, MAX_REQUEST as u32)).await.unwrap();
    let mut streams = vec![];
    while let Ok(Ok((mut send, recv))) =
        timeout(Duration::from_millis(500), connection.open_bi()).await
    {
        assert!(streams.len() < 8, "many streams may be open");
        let writing =
            tokio::spawn(async move { while send.write_all(&[1; 4096]).await.is_ok() {} });
        streams.push((writing, recv));
    }
    // Until it may send no more: then only what keeps the connection alive goes out.
    let mut sent = 0;
    until("it is held up", || {
        let before = std::mem::replace(&mut sent, connection.stats().udp_tx.bytes);
        assert!(sent < 512 << 10, "{sent} bytes");
        std::thread::sleep(Duration::from_millis(500));
        let now = connection.stats().udp_tx.bytes;
        before > 128 << 10 && now - before < 8 << 10
    })
    .await;
    streams.into_iter().for_each(|(writing, _)| writing.abort());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_member_sends_after_a_request_is_not_kept() {
    let device = Device::first("desk").await;
    let location = device.add_location("photos", None).id;
    let (_endpoint, connection) = member(&device).await;
    let mut streams = vec![];
    for _ in 0..600 {
        let follow = Request::Rows(Follow { location, log_id: 0, after: Seq(0) });
        let (mut send, recv) = open_request(&connection, &follow).await;
        send.write_all(&[1; 4096]).await.unwrap();
        streams.push((send, recv));
    }
    for (send, _recv) in &mut streams {
        let stopped = timeout(Duration::from_secs(30), send.stopped()).await;
        assert!(matches!(stopped, Ok(Ok(Some(_)))), "{stopped:?}");
    }
    assert_eq!(ask(&connection, &Request::Ping).await, Some(Response::Done));
}
