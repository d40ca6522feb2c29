//! One connection for each pair of devices, whoever dials.

use crate::device::{Device, until};
use crate::strangers::hello;
use std::time::{Duration, Instant};
use sync::wire::{self, OLDEST, Request, Response};

/// Each knows the other and its address, and neither is connected.
async fn strangers_that_are_members() -> (Device, Device) {
    let (a, b) = (Device::first("desk").await, Device::first("laptop").await);
    let record = |of: &Device| {
        let mut member = of.library.state().member(of.id()).unwrap().clone();
        member.addresses = of.node.addresses();
        member
    };
    let (of_a, of_b) = (record(&a), record(&b));
    a.library.update(|s| s.merge(of_b)).unwrap();
    b.library.update(|s| s.merge(of_a)).unwrap();
    (a, b)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_dial_each_other_at_once_keep_one_connection_that_works() {
    for _ in 0..5 {
        let (a, b) = strangers_that_are_members().await;
        a.node.members_changed();
        b.node.members_changed();
        a.meet(&b).await;
        // It stays: over a whole second nobody is offline again.
        let end = Instant::now() + Duration::from_secs(1);
        let mut is_steady_since = Instant::now();
        while is_steady_since < end && Instant::now() < end {
            if !a.is_online(b.id()) || !b.is_online(a.id()) {
                is_steady_since = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        a.meet(&b).await;
        let location = a.add_location("photos", None);
        until("it carries rows", || b.index.location_by_id(location.id).is_some()).await;
        let back = b.add_location("music", None);
        until("both ways", || a.index.location_by_id(back.id).is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_says_goodbye_is_offline_at_once() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    a.pair(&b, "laptop").await;
    let source = a.node.source();
    assert!(source.is_reachable(b.id()));
    b.node.shutdown().await;
    until("it is offline", || !a.is_online(b.id()) && !source.is_reachable(b.id())).await;
    assert!(a.peer(b.id()).unwrap().last_seen_ms.is_some());
    until("when it was there is kept", || {
        a.library.state().member(b.id()).unwrap().last_seen_ms.is_some()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_does_not_answer_is_given_up_in_seconds() {
    let device = Device::first("desk").await;
    let key = rand::random();
    let mute = crate::device::raw_endpoint(key).await;
    let id = crate::device::id_of(&key);
    device.admit(id, "mute");
    let connection = mute.connect(device.address(), wire::ALPN_MEMBER).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    wire::send_request(&mut send, OLDEST, &Request::Hello(hello())).await.unwrap();
    let answer: Response = wire::receive_frame(&mut recv).await.unwrap();
    assert!(matches!(answer, Response::Hello(_)));
    until("it is online", || device.is_online(id)).await;
    // The transport keeps the connection alive; nobody answers a ping.
    let since = Instant::now();
    until("it is offline", || !device.is_online(id)).await;
    assert!(since.elapsed() < Duration::from_secs(6), "{:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_hangs_up_each_time_is_dialled_ever_more_rarely() {
    let device = Device::first("desk").await;
    let key = rand::random();
    let rude = crate::device::raw_endpoint(key).await;
    device.admit(crate::device::id_of(&key), "rude");
    let addresses = rude.bound_sockets();
    device
        .library
        .update(|s| {
            let mut member = s.member(crate::device::id_of(&key)).unwrap().clone();
            member.addresses = addresses;
            member.stamp = s.next_stamp();
            s.merge(member);
        })
        .unwrap();
    device.node.members_changed();
    let mut dials = 0;
    let hang_up = async {
        loop {
            let connection = rude.accept().await.unwrap().await.unwrap();
            let (mut send, mut recv) = connection.accept_bi().await.unwrap();
            let _: Request = wire::receive_request(&mut recv).await.unwrap();
            wire::send_frame(&mut send, &Response::Hello(hello())).await.unwrap();
            let _ = send.finish();
            let _ = send.stopped().await;
            connection.close(0_u8.into(), b"");
            dials += 1;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(3), hang_up).await.is_err());
    assert!((2..20).contains(&dials), "{dials}");
}
