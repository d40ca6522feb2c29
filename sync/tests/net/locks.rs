//! Locks that a member asks for: real ones, bounded ones, and none where it sees nothing.

use crate::device::{Device, id_of, raw_endpoint, until};
use crate::strangers::{ask, greet, lock};
use std::fs::{self, File};
use sync::wire::{Refusal, Request, Response, close};
use vfs_core::locks::peers::{MAX_HOLDERS, MAX_RANGES};
use vfs_core::locks::{Action, Holder, LockAnswer, LockRequest, Mode, Span};
use vfs_core::model::FileId;

#[tokio::test(flavor = "multi_thread")]
async fn a_members_locks_are_real_and_bounded_and_end_after_its_connection() {
    let device = Device::first("desk").await;
    let location = device.add_location("files", None);
    fs::write(device.folder().join("a"), "text").unwrap();
    device.indexer.watch(location.no);
    let row = || device.index.view().unwrap().entry(location.no, FileId::ROOT, b"a").unwrap();
    until("the file is known", || row().is_some()).await;
    let file = row().unwrap().file_id;
    let key = rand::random();
    let endpoint = raw_endpoint(key).await;
    device.admit(id_of(&key), "raw");
    let connection = greet(&endpoint, &device).await;
    let asks = async |request| match ask(&connection, &Request::Lock(request)).await {
        Some(Response::Lock(answer)) => Ok(answer),
        Some(Response::Refused(refusal)) => Err(refusal),
        other => panic!("{other:?}"),
    };
    let base = lock(location.id, file);
    let exclusive = Action::Set(Mode::Exclusive);
    let other = Holder(2);
    let alone = LockRequest { action: exclusive, ..base };
    assert_eq!(asks(alone).await, Ok(LockAnswer::Free));
    assert_eq!(asks(alone).await, Ok(LockAnswer::Free), "repeating it changes nothing");
    let local = File::open(device.folder().join("a")).unwrap();
    assert!(local.try_lock_shared().is_err(), "a program of the owner is kept out");
    let taken = asks(LockRequest { holder: other, ..base }).await;
    assert!(matches!(taken, Ok(LockAnswer::Taken { .. })), "{taken:?}");
    assert_eq!(asks(LockRequest { action: Action::Clear, ..base }).await, Ok(LockAnswer::Free));
    local.try_lock().unwrap();
    assert!(matches!(asks(base).await, Ok(LockAnswer::Taken { .. })));
    local.unlock().unwrap();

    // A range that is none, as no sound program sends it.
    let senseless: Span =
        postcard::from_bytes(&postcard::to_stdvec(&(9_u64, 3_u64)).unwrap()).unwrap();
    assert_eq!(asks(LockRequest { span: senseless, ..base }).await, Err(Refusal::Malformed));
    let unknown = LockRequest { file: FileId(1 << 30), ..base };
    assert_eq!(asks(unknown).await, Err(Refusal::Stale));
    let of_byte = |at| LockRequest { span: Span::new(2 * at, 2 * at).unwrap(), ..base };
    for at in 0..MAX_RANGES as u64 {
        assert_eq!(asks(of_byte(at)).await, Ok(LockAnswer::Free));
    }
    assert_eq!(asks(of_byte(1 << 20)).await, Ok(LockAnswer::TooMany));
    // A hole in the middle of one range makes two.
    let hole = Span::new(1 << 21, 1 << 21).unwrap();
    let ahead = LockRequest { span: Span::new(510, 1 << 30).unwrap(), ..base };
    assert_eq!(asks(ahead).await, Ok(LockAnswer::Free));
    let gives_back = LockRequest { span: hole, action: Action::Clear, ..base };
    assert_eq!(asks(gives_back).await, Ok(LockAnswer::TooMany));
    for holder in 2..=MAX_HOLDERS as u64 {
        let request = LockRequest { holder: Holder(holder), ..base };
        assert_eq!(asks(request).await, Ok(LockAnswer::Free));
    }
    let one_more = LockRequest { holder: Holder(1 << 20), ..base };
    assert_eq!(asks(one_more).await, Ok(LockAnswer::TooMany));
    assert!(local.try_lock().is_err());

    connection.close(close::BYE.into(), b"");
    until("the lease is over", || local.try_lock().is_ok()).await;
}
