//! What is in a cache, for members that may read it.

use crate::content::pattern;
use crate::device::{Device, until};
use crate::strangers::{ask, hello};
use std::fs;
use sync::wire::{Borrow, Hello, LENDS, Refusal, Request, Response};
use vfs_core::content::manifest::verify;
use vfs_core::model::{ContentId, FileId, Location};
use vfs_core::source::{FetchError, Lent, Wanted};

const SIZE: u64 = (2 << 20) + 99;

/// A desk with a shared and a hidden file, a NAS that may see both and has their bytes cached, and
/// a laptop; the desk is away.
async fn desk_away() -> (Device, Device, [Wanted; 2]) {
    let (desk, nas, laptop) =
        (Device::first("desk").await, Device::new().await, Device::new().await);
    desk.pair(&nas, "nas").await;
    desk.pair(&laptop, "laptop").await;
    nas.meet(&laptop).await;
    let mut wanted = Vec::new();
    for (name, seed) in [("open", 0), ("hidden", 1)] {
        let mut bytes = pattern(SIZE as usize);
        bytes[7] ^= seed;
        let shared_with = (seed == 1).then(|| vec![nas.id()]);
        let folder = desk.folder().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("file"), &bytes).unwrap();
        let location = desk.add_location_at(name, &folder, shared_with);
        desk.indexer.watch(location.no);
        let content = ContentId::of(&bytes);
        until("the NAS knows it", || knows(&nas, &location, content)).await;
        nas.has_cached(&bytes);
        wanted.push(Wanted { content, size: SIZE });
    }
    desk.node.shutdown().await;
    until("the desk is away", || !nas.is_online(desk.id())).await;
    (nas, laptop, wanted.try_into().unwrap())
}

/// Whether a device has the row of a content and what its owner stated.
fn knows(device: &Device, location: &Location, content: ContentId) -> bool {
    let Some(replica) = device.index.location_by_id(location.id) else { return false };
    let view = device.index.view().unwrap();
    let entry = view.entry(replica.no, FileId::ROOT, b"file").unwrap();
    entry.is_some_and(|entry| entry.content == Some(content))
        && device.index.last_statement(replica.no).unwrap().is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_borrows_what_it_may_read_and_nothing_else() {
    let (nas, laptop, [open, hidden]) = desk_away().await;
    let source = laptop.node.source();
    until("the NAS can be asked", || source.lenders() == [nas.id()]).await;
    let lends = source.lends(nas.id(), &[open, hidden]).await.unwrap();
    let lent = Lent { ranges: vec![0..SIZE], is_ready: false };
    assert_eq!(lends, [lent, Lent::default()], "its tree is built when it is needed");
    let range = 1 << 20..2 << 20;
    let fetched = source.borrow(nas.id(), open, range.clone()).await.unwrap();
    assert!(verify(open.content, SIZE, range.clone(), &fetched.bytes, &fetched.proof));
    let lends = source.lends(nas.id(), &[open]).await.unwrap();
    assert_eq!(lends, [Lent { ranges: vec![0..SIZE], is_ready: true }]);
    let refused = source.borrow(nas.id(), hidden, range).await;
    assert!(matches!(refused, Err(FetchError::Refused)), "{refused:?}");
    let unknown = Wanted { content: ContentId([9; 32]), size: SIZE };
    let refused = source.borrow(nas.id(), unknown, 0..1 << 20).await;
    assert!(matches!(refused, Err(FetchError::Refused)), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_what_cannot_be_lent_is_refused() {
    let (nas, laptop, [open, _]) = desk_away().await;
    let endpoint = crate::device::raw_endpoint(laptop.key).await;
    laptop.node.shutdown().await;
    until("the laptop is away", || !nas.is_online(laptop.id())).await;
    let connection = crate::strangers::greet(&endpoint, &nas).await;
    for (offset, len, refusal) in [
        (0, 0, Refusal::Malformed),
        (0, u32::MAX, Refusal::Malformed),
        (u64::MAX, 1, Refusal::Malformed),
        (1, 1 << 16, Refusal::Failed),
        (SIZE, 1 << 16, Refusal::Failed),
    ] {
        let answer = ask(&connection, &Request::Borrow(Borrow { wanted: open, offset, len })).await;
        assert_eq!(answer, Some(Response::Refused(refusal)), "{offset} {len}");
    }
    let answer = ask(&connection, &Request::Lends(vec![open; 64])).await;
    let lent = Lent { ranges: vec![0..SIZE], is_ready: false };
    assert_eq!(answer, Some(Response::Lends(vec![lent; 64])));
    let answer = ask(&connection, &Request::Lends(vec![open; 65])).await;
    assert_eq!(answer, Some(Response::Refused(Refusal::Malformed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_peer_is_not_asked() {
    let nas = Device::first("nas").await;
    let key = rand::random();
    nas.admit(crate::device::id_of(&key), "old");
    let endpoint = crate::device::raw_endpoint(key).await;
    let connection = endpoint.connect(nas.address(), sync::wire::ALPN_MEMBER).await.unwrap();
    let old = Hello { newest: LENDS - 1, ..hello() };
    let answer = ask(&connection, &Request::Hello(old)).await;
    assert!(matches!(answer, Some(Response::Hello(_))), "{answer:?}");
    let id = crate::device::id_of(&key);
    until("it is connected", || nas.is_online(id)).await;
    let source = nas.node.source();
    assert!(source.lenders().is_empty());
    let wanted = Wanted { content: ContentId([9; 32]), size: SIZE };
    assert!(matches!(source.lends(id, &[wanted]).await, Err(FetchError::Refused)));
    assert!(matches!(source.borrow(id, wanted, 0..1 << 20).await, Err(FetchError::Refused)));
}
