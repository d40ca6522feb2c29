//! A location whose owner is away, from a device that has a replica of it.

use crate::device::{Device, id_of, observed, raw_endpoint, until};
use crate::strangers::{greet, open_request};
use iroh::SecretKey;
use iroh::endpoint::{Connection, SendStream};
use std::sync::Arc;
use std::time::Duration;
use sync::wire::{self, Follow, PassOn, Refusal, Request, Response, Rows, StatementList};
use tokio::time::timeout;
use vfs_core::index::{LogDigest, LogRow, Observed, Signed, Statement};
use vfs_core::model::{DeviceId, FileId, FileType, Location, LocationId, Name, Seq};

fn listing(names: std::ops::Range<u64>) -> Vec<Observed> {
    names.map(|n| observed(&format!("{n:05}.jpg"), 100 + n, n)).collect()
}

fn fill(owner: &Device, location: &Location, rows: u64) {
    let mut root = observed("root", 1, 0);
    root.attr.file_type = FileType::Directory;
    owner.index.observe_root(location.no, &root).unwrap();
    owner.index.observe_directory(location.no, FileId::ROOT, listing(0..rows)).unwrap();
}

fn entries(device: &Device, id: LocationId) -> Option<u64> {
    device.index.location_by_id(id).map(|l| device.index.counts(l.no).entries)
}

/// Whether a device's replica is what its owner stated, so that it can pass it on.
fn is_attested(device: &Device, id: LocationId) -> bool {
    let Some(location) = device.index.location_by_id(id) else { return false };
    device.index.view().unwrap().attested(location.no).unwrap().is_some()
}

async fn three_that_met() -> (Device, Device, Device) {
    let (desk, nas, laptop) =
        (Device::first("desk").await, Device::new().await, Device::new().await);
    desk.pair(&nas, "nas").await;
    desk.pair(&laptop, "laptop").await;
    nas.meet(&laptop).await;
    (desk, nas, laptop)
}

/// A desk with a location, and a NAS that can pass it on; the desk is away.
async fn passed_on(
    rows: u64,
    shared_with: impl Fn(&Device) -> Option<Vec<DeviceId>>,
) -> (Device, Device, Arc<Location>) {
    let (desk, nas) = (Device::first("desk").await, Device::new().await);
    desk.pair(&nas, "nas").await;
    let location = desk.add_location("photos", shared_with(&nas));
    fill(&desk, &location, rows);
    until("the NAS has it", || {
        entries(&nas, location.id) == Some(rows) && is_attested(&nas, location.id)
    })
    .await;
    desk.node.shutdown().await;
    until("the desk is away", || !nas.is_online(desk.id())).await;
    (desk, nas, location)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_never_met_the_owner_sees_its_files() {
    let (desk, nas, location) = passed_on(10_000, |_| None).await;
    let laptop = Device::new().await;
    nas.pair(&laptop, "laptop").await;
    until("all rows are there", || entries(&laptop, location.id) == Some(10_000)).await;
    let here = laptop.index.location_by_id(location.id).unwrap();
    assert_eq!((here.owner, here.name.as_str()), (desk.id(), "photos"));
    assert!(!laptop.is_online(desk.id()));
    let row = |device: &Device, l: &Location| {
        device.index.view().unwrap().entry(l.no, FileId::ROOT, b"00042.jpg").unwrap()
    };
    assert_eq!(row(&laptop, &here), row(&desk, &location));
    until("it can pass it on itself", || is_attested(&laptop, location.id)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_a_device_was_away_comes_from_another_one() {
    let (desk, nas, mut laptop) = three_that_met().await;
    let location = desk.add_location("photos", None);
    fill(&desk, &location, 100);
    until("all have it", || entries(&laptop, location.id) == Some(100)).await;
    let number = laptop.index.location_by_id(location.id).unwrap().no;
    laptop.node.shutdown().await;

    desk.index.observe_directory(location.no, FileId::ROOT, listing(10..120)).unwrap();
    until("the NAS has the change", || {
        entries(&nas, location.id) == Some(110) && is_attested(&nas, location.id)
    })
    .await;
    desk.node.shutdown().await;
    laptop.renew_node().await;
    until("the laptop has it, too", || entries(&laptop, location.id) == Some(110)).await;
    assert_eq!(laptop.index.location_by_id(location.id).unwrap().no, number, "its inodes stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_owner_goes_on_where_another_device_left_off() {
    let (mut desk, nas, location) = passed_on(100, |_| None).await;
    let laptop = Device::new().await;
    nas.pair(&laptop, "laptop").await;
    until("the rows are there", || entries(&laptop, location.id) == Some(100)).await;
    let number = laptop.index.location_by_id(location.id).unwrap().no;
    desk.renew_node().await;
    laptop.meet(&desk).await;
    desk.index.observe_directory(location.no, FileId::ROOT, listing(0..130)).unwrap();
    until("its news is there", || entries(&laptop, location.id) == Some(130)).await;
    assert_eq!(laptop.index.location_by_id(location.id).unwrap().no, number);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_passed_on_to_a_device_that_may_not_see_it() {
    let (desk, nas, location) = passed_on(10, |nas| Some(vec![nas.id()])).await;
    let open = nas.add_location("music", None);
    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    nas.admit(id_of(&key), "curious");
    let connection = greet(&endpoint, &nas).await;
    // What it is offered, and what it gets when it asks all the same.
    let list = loop {
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        let request = wire::receive_request(&mut recv).await.unwrap();
        wire::send_frame(&mut send, &Response::Done).await.unwrap();
        if let Request::Statements = request {
            break wire::receive_frame::<StatementList>(&mut recv).await.unwrap().0;
        }
    };
    let offered: Vec<_> = list.iter().map(|signed| signed.statement.location).collect();
    assert_eq!(offered, [open.id]);
    let follow = Follow { location: location.id, log_id: 0, after: Seq(0) };
    let head = desk.index.head(location.no);
    let request = Request::PassOn(PassOn { follow, head });
    let (_send, mut recv) = open_request(&connection, &request).await;
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert_eq!(answer, Response::Refused(Refusal::NotShared));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_that_its_owner_removed_does_not_come_back_from_others() {
    let (desk, nas, mut laptop) = three_that_met().await;
    let location = desk.add_location("photos", None);
    fill(&desk, &location, 10);
    until("all have it", || is_attested(&nas, location.id) && is_attested(&laptop, location.id))
        .await;
    laptop.node.shutdown().await;
    desk.index.remove_location(location.no).unwrap();
    until("it is gone", || entries(&nas, location.id).is_none()).await;
    desk.node.shutdown().await;
    until("the desk is away", || !nas.is_online(desk.id())).await;
    laptop.renew_node().await;
    laptop.meet(&nas).await;
    // A list of what the laptop offers is looked at whole before the next one.
    for name in ["music", "films", "books"] {
        let other = laptop.add_location(name, None);
        until("the laptop is heard", || is_attested(&nas, other.id)).await;
    }
    assert_eq!(entries(&nas, location.id), None);
}

/// A member that passes on what it likes.
struct Liar {
    _endpoint: iroh::Endpoint,
    connection: Connection,
    /// A device that is never there.
    owner: SecretKey,
    location: LocationId,
}

impl Liar {
    async fn meet(victim: &Device) -> Self {
        let key = rand::random();
        let endpoint = raw_endpoint(key).await;
        let owner = SecretKey::from_bytes(&rand::random());
        let owner_id = DeviceId(*owner.public().as_bytes());
        victim.admit(id_of(&key), "liar");
        victim.admit(owner_id, "away");
        let connection = greet(&endpoint, victim).await;
        let location = LocationId::new(owner_id, [7; 8]);
        Self { _endpoint: endpoint, connection, owner, location }
    }

    fn sign(&self, key: &SecretKey, log: LogDigest) -> Signed {
        let statement = Statement {
            location: self.location,
            name: "photos".into(),
            read_only: false,
            shared_with: None,
            log,
            made_ms: 1,
        };
        let mut signature = [[0; 32]; 2];
        let signed = key.sign(&statement.to_bytes()).to_bytes();
        signature.as_flattened_mut().copy_from_slice(&signed);
        Signed { statement, signature }
    }

    async fn offer(&self, signed: Signed) {
        let (mut send, mut recv) = open_request(&self.connection, &Request::Statements).await;
        wire::send_frame(&mut send, &StatementList(vec![signed])).await.unwrap();
        let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
        assert_eq!(answer, Response::Done);
    }

    /// Answers every stream that the victim opens, until it asks for rows, and begins with these.
    async fn begin(&self, log: LogDigest, rows: Vec<LogRow>) -> SendStream {
        loop {
            let (mut send, mut recv) = self.connection.accept_bi().await.unwrap();
            let Request::PassOn(_) = wire::receive_request(&mut recv).await.unwrap() else {
                wire::send_frame(&mut send, &Response::Done).await.unwrap();
                continue;
            };
            let begin = Response::Rows { log_id: log.log_id, after: Seq(0) };
            wire::send_frame(&mut send, &begin).await.unwrap();
            let rows = Rows { rows, upto: log.head, head: log.head };
            wire::send_frame(&mut send, &rows).await.unwrap();
            return send;
        }
    }
}

fn error_of(victim: &Device, liar: &Liar) -> Option<String> {
    let id = liar._endpoint.id();
    victim.peer(DeviceId(*id.as_bytes())).and_then(|p| p.last_error)
}

fn gone(seq: u64) -> LogRow {
    let name = Name::new(seq.to_string().into_bytes()).unwrap();
    LogRow { seq: Seq(seq), parent: FileId::ROOT, name, entry: None }
}

/// Rows of files, with these numbers, as some device has them.
fn rows(device: &Device, numbers: std::ops::RangeInclusive<u64>) -> Vec<LogRow> {
    let location = device.add_location("own", None);
    fill(device, &location, *numbers.end());
    let view = device.index.view().unwrap();
    let (mut rows, _) = view.log_after(location.no, Seq(1), 1 << 20).unwrap();
    rows.iter_mut().zip(numbers).for_each(|(row, seq)| row.seq = Seq(seq));
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_their_owner_did_not_state_are_refused() {
    let victim = Device::first("desk").await;
    let liar = Liar::meet(&victim).await;
    let log = LogDigest { log_id: 5, head: Seq(2), rows: 2, digest: [9; 32] };
    liar.offer(liar.sign(&liar.owner, log)).await;
    liar.begin(log, vec![gone(1), gone(2)]).await.finish().unwrap();
    until("it is told", || {
        error_of(&victim, &liar).is_some_and(|e| e.contains("not those that their owner stated"))
    })
    .await;
    assert_eq!(victim.index.location_by_id(liar.location), None);

    // More rows than there can be are not waited for.
    let log = LogDigest { rows: 1, ..log };
    liar.offer(liar.sign(&liar.owner, log)).await;
    let mut send = liar.begin(log, rows(&victim, 1..=2)).await;
    until_stopped(&mut send).await;

    // Nor are no rows.
    let log = LogDigest { rows: 2, ..log };
    liar.offer(liar.sign(&liar.owner, log)).await;
    let mut send = liar.begin(log, vec![]).await;
    until_stopped(&mut send).await;
    assert_eq!(victim.index.location_by_id(liar.location), None);
}

async fn until_stopped(send: &mut SendStream) {
    timeout(Duration::from_secs(20), send.stopped()).await.expect("given up").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_its_owner_did_not_sign_is_refused() {
    let victim = Device::first("desk").await;
    let liar = Liar::meet(&victim).await;
    let log = LogDigest { log_id: 5, head: Seq(0), rows: 0, digest: [0; 32] };
    let other = SecretKey::from_bytes(&rand::random());
    liar.offer(liar.sign(&other, log)).await;
    until("it is told", || {
        error_of(&victim, &liar).is_some_and(|e| e.contains("a false signature"))
    })
    .await;
    assert_eq!(victim.index.location_by_id(liar.location), None);
}
