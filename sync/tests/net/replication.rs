//! Rows of one device's index on another.

use crate::device::{Device, observed, raw_endpoint, until};
use crate::strangers::{greet, open_request};
use std::ops::ControlFlow;
use std::sync::Arc;
use sync::wire::{self, Announced, LocationList, Request, Response, Rows};
use vfs_core::index::{LogRow, NewLocation};
use vfs_core::model::{DeviceId, FileId, Location, LocationId, Name, Seq};

fn names(device: &Device, location: &Location) -> Vec<String> {
    let Some(replica) = device.index.location_by_id(location.id) else { return vec![] };
    let view = device.index.view().unwrap();
    let mut names = vec![];
    view.children(replica.no, FileId::ROOT, None, &mut |name, _| {
        names.push(name.display().into_owned());
        ControlFlow::Continue(())
    })
    .unwrap();
    names
}

async fn pair() -> (Device, Device) {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    a.pair(&b, "laptop").await;
    (a, b)
}

fn root(device: &Device, location: &Arc<Location>) {
    let mut root = observed("root", 1, 0);
    root.attr.file_type = vfs_core::model::FileType::Directory;
    device.index.observe_root(location.no, &root).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_rows_then_the_live_tail() {
    let (a, b) = pair().await;
    let location = a.add_location("photos", None);
    root(&a, &location);
    let listing = (0..10_000).map(|n| observed(&format!("{n:05}.jpg"), 100 + n, n)).collect();
    a.index.observe_directory(location.no, FileId::ROOT, listing).unwrap();

    until("all rows are there", || names(&b, &location).len() == 10_000).await;
    let replica = b.index.location_by_id(location.id).unwrap();
    assert_eq!((replica.owner, replica.name.as_str()), (a.id(), "photos"));
    let row = |d: &Device, l: &Location| {
        d.index.view().unwrap().entry(l.no, FileId::ROOT, b"00042.jpg").unwrap()
    };
    assert_eq!(row(&a, &location), row(&b, &replica));

    let new = observed("new.jpg", 99, 1);
    let name = new.name.clone();
    a.index.observe_entry(location.no, FileId::ROOT, &name, Some(new)).unwrap();
    let gone = Name::new(&b"00000.jpg"[..]).unwrap();
    a.index.observe_entry(location.no, FileId::ROOT, &gone, None).unwrap();
    until("the tail is there", || {
        let names = names(&b, &location);
        names.contains(&"new.jpg".into()) && !names.contains(&"00000.jpg".into())
    })
    .await;
    let status = b.peer(a.id()).unwrap().replicas[0];
    assert_eq!((status.location, Some(status.applied)), (location.id, status.head));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_is_renamed_unshared_and_removed_on_the_replica_too() {
    let (a, b) = pair().await;
    let location = a.add_location("photos", None);
    root(&a, &location);
    until("it is there", || b.index.location_by_id(location.id).is_some()).await;

    let put = |name: &str, shared_with| {
        let known = a.index.location(location.no).unwrap();
        a.index
            .put_location(NewLocation {
                id: known.id,
                owner: known.owner,
                name: name.into(),
                root: known.root.clone(),
                read_only: true,
                shared_with,
            })
            .unwrap();
    };
    put("pictures", None);
    until("it is renamed", || {
        b.index.location_by_id(location.id).is_some_and(|l| l.name == "pictures" && l.read_only)
    })
    .await;
    put("pictures", Some(vec![]));
    until("it is unshared", || b.index.location_by_id(location.id).is_none()).await;
    put("pictures", Some(vec![b.id()]));
    until("it is shared again", || b.index.location_by_id(location.id).is_some()).await;
    a.index.remove_location(location.no).unwrap();
    until("it is removed", || b.index.location_by_id(location.id).is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_goes_on_after_a_restart_and_survives_without_its_owner() {
    let (a, b) = pair().await;
    let location = a.add_location("photos", None);
    root(&a, &location);
    let list = |names: &[&str]| {
        names.iter().enumerate().map(|(n, name)| observed(name, n as u64 + 9, 1)).collect()
    };
    a.index.observe_directory(location.no, FileId::ROOT, list(&["one"])).unwrap();
    until("the row is there", || names(&b, &location) == ["one"]).await;

    b.node.shutdown().await;
    a.index.observe_directory(location.no, FileId::ROOT, list(&["one", "two"])).unwrap();
    let (dir, key) = (b.dir.clone(), b.key);
    b.indexer.stop();
    drop(b);
    let b = Device::start(dir, key).await;
    assert_eq!(names(&b, &location), ["one"]);
    until("the missed row is there", || names(&b, &location) == ["one", "two"]).await;

    a.node.shutdown().await;
    until("the owner is offline", || !b.is_online(a.id())).await;
    assert_eq!(names(&b, &location), ["one", "two"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_removed_device_go() {
    let (a, b) = pair().await;
    let location = b.add_location("photos", None);
    until("it is there", || a.index.location_by_id(location.id).is_some()).await;
    a.node.remove_device(b.id()).await.unwrap();
    until("it is gone", || a.index.location_by_id(location.id).is_none()).await;
}

async fn announce(connection: &iroh::endpoint::Connection, list: Vec<Announced>) -> Response {
    let (mut send, mut recv) = open_request(connection, &Request::Locations).await;
    wire::send_frame(&mut send, &LocationList(list)).await.unwrap();
    wire::receive_frame(&mut recv).await.unwrap()
}

/// A device with one honest location of its own, and a dishonest member connected to it.
async fn with_liar() -> (Device, iroh::Endpoint, DeviceId, iroh::endpoint::Connection) {
    let victim = Device::first("desk").await;
    let key = rand::random();
    let liar = raw_endpoint(key).await;
    let id = crate::device::id_of(&key);
    victim.admit(id, "liar");
    let connection = greet(&liar, &victim).await;
    (victim, liar, id, connection)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_cannot_take_over_another_devices_location() {
    let (victim, _liar, id, connection) = with_liar().await;
    let own = victim.add_location("photos", None);
    let mine = LocationId::new(id, [7; 8]);
    // One that the victim does not know yet: of a device that it has not met, or its own
    // after its index was lost.
    let theirs = LocationId::new(victim.id(), [7; 8]);
    let named = |id, name: &str| Announced { id, name: name.into(), read_only: false };
    let list = vec![
        named(own.id, "stolen"),
        named(mine, "honest"),
        named(theirs, "squatted"),
        named(LocationId::new(id, [8; 8]), "../etc"),
        named(LocationId::new(id, [9; 8]), "honest"),
    ];
    assert_eq!(announce(&connection, list).await, Response::Done);
    until("the honest one is there", || victim.index.location_by_id(mine).is_some()).await;
    assert_eq!(victim.index.location_by_id(own.id), Some(own));
    let of_liar: Vec<_> =
        victim.index.locations().into_iter().filter(|l| l.owner == id).map(|l| l.id).collect();
    assert_eq!(of_liar, [mine]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_break_the_rules_stop_their_replica_and_nothing_else() {
    let (victim, _liar, id, connection) = with_liar().await;
    let mine = LocationId::new(id, [7; 8]);
    let list = vec![Announced { id: mine, name: "evil".into(), read_only: false }];
    announce(&connection, list).await;
    // Answers every stream that the victim opens, until it asks for the rows.
    let mut rows_stream = loop {
        let (mut send, mut recv) = connection.accept_bi().await.unwrap();
        if let Request::Rows(_) = wire::receive_request(&mut recv).await.unwrap() {
            break send;
        }
        wire::send_frame(&mut send, &Response::Done).await.unwrap();
    };
    let start = Response::Rows { log_id: 5, after: Seq(0) };
    wire::send_frame(&mut rows_stream, &start).await.unwrap();
    let mut entry = {
        let own = victim.add_location("own", None);
        root(&victim, &own);
        let one = observed("one", 3, 1);
        victim.index.observe_directory(own.no, FileId::ROOT, vec![one]).unwrap();
        victim.index.view().unwrap().entry(own.no, FileId::ROOT, b"one").unwrap().unwrap()
    };
    entry.file_id = FileId(u64::MAX);
    let name = Name::new(&b"bad"[..]).unwrap();
    let row = LogRow { seq: Seq(1), parent: FileId::ROOT, name, entry: Some(entry) };
    let rows = Rows { rows: vec![row], upto: Seq(1), head: Seq(1) };
    wire::send_frame(&mut rows_stream, &rows).await.unwrap();

    until("it is reported", || {
        victim.peer(id).and_then(|p| p.last_error).is_some_and(|e| e.contains("refused"))
    })
    .await;
    assert!(connection.close_reason().is_none(), "the connection stays");
    let replica = victim.index.location_by_id(mine).unwrap();
    assert_eq!(victim.index.head(replica.no), Seq(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_lost_its_index_gets_a_new_replica() {
    let (reader, _owner, owner, connection) = with_liar().await;
    let id = LocationId::new(owner, [7; 8]);
    let list = vec![Announced { id, name: "photos".into(), read_only: false }];
    announce(&connection, list).await;
    let mut numbers = vec![];
    for log_id in [5, 6] {
        let mut rows_stream = loop {
            let (mut send, mut recv) = connection.accept_bi().await.unwrap();
            if let Request::Rows(_) = wire::receive_request(&mut recv).await.unwrap() {
                break send;
            }
            wire::send_frame(&mut send, &Response::Done).await.unwrap();
        };
        wire::send_frame(&mut rows_stream, &Response::Rows { log_id, after: Seq(0) })
            .await
            .unwrap();
        let name = Name::new(&b"gone"[..]).unwrap();
        let row = LogRow { seq: Seq(1), parent: FileId::ROOT, name, entry: None };
        let rows = Rows { rows: vec![row], upto: Seq(1), head: Seq(1) };
        wire::send_frame(&mut rows_stream, &rows).await.unwrap();
        let replica = || reader.index.location_by_id(id).unwrap().no;
        until("it is followed", || {
            let no = replica();
            (reader.index.log_id(no), reader.index.head(no)) == (log_id, Seq(1))
        })
        .await;
        numbers.push(replica());
        // The owner starts anew; it is asked again.
        rows_stream.reset(0u32.into()).unwrap();
    }
    assert_ne!(numbers[0], numbers[1], "no inode number means two files");
}
