//! Tickets: the one way in, and everything that is refused.

use crate::device::{Device, until};
use std::time::Duration;
use sync::SyncError;

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn two_devices_pair_show_one_code_and_connect() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let invitation = a.node.invite(MINUTE).await.unwrap();
    let pending = b.node.join(&invitation.ticket, "laptop").await.unwrap();
    assert_eq!((pending.library.name.as_str(), pending.inviter.as_str()), ("home", "desk"));

    let asked = a.node.asked(invitation.id).await.unwrap();
    assert_eq!((asked.code.as_str(), asked.name.as_str()), (pending.code.as_str(), "laptop"));
    assert_eq!(asked.device, b.id());
    assert!(a.library.state().member(b.id()).is_none(), "nothing changed before the confirmation");
    assert!(b.library.state().library.is_none());

    b.node.confirm(pending).await.unwrap();
    assert_eq!(a.node.joined(invitation.id).await.unwrap(), asked);
    a.meet(&b).await;
    for device in [&a, &b] {
        let state = device.library.state();
        assert_eq!(state.member_named("desk").map(|m| m.id), Some(a.id()));
        assert_eq!(state.member_named("laptop").map(|m| m.id), Some(b.id()));
    }
    let path = b.peer(a.id()).unwrap().path.unwrap();
    assert!(path.direct && path.address.starts_with("127.0.0.1:"));
}

#[tokio::test]
async fn devices_that_listen_everywhere_pair_as_well() {
    let everywhere = ["[::]:0", "0.0.0.0:0"];
    let start = || async {
        let dir = std::sync::Arc::new(tempfile::tempdir().unwrap());
        Device::start_at(dir, rand::random(), &everywhere).await
    };
    let (a, b) = (start().await, start().await);
    a.found("desk");
    a.pair(&b, "laptop").await;
}

#[tokio::test]
async fn a_join_that_is_not_confirmed_changes_nothing_and_may_be_tried_again() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let ticket = a.node.invite(MINUTE).await.unwrap().ticket;
    let first = b.node.join(&ticket, "laptop").await.unwrap();
    drop(first);
    let again = b.node.join(&ticket, "laptop").await.unwrap();
    assert_eq!(a.library.state().active().count(), 1);
    b.node.confirm(again).await.unwrap();
    a.meet(&b).await;
}

#[tokio::test]
async fn a_ticket_admits_one_device_once() {
    let (a, b, c) = (Device::first("desk").await, Device::new().await, Device::new().await);
    let ticket = a.node.invite(MINUTE).await.unwrap().ticket;
    let pending = b.node.join(&ticket, "laptop").await.unwrap();
    let beside = c.node.join(&ticket, "phone").await;
    assert!(matches!(beside, Err(SyncError::Used)), "while it is being used");
    b.node.confirm(pending).await.unwrap();
    assert!(matches!(c.node.join(&ticket, "phone").await, Err(SyncError::Used)));
    assert_eq!(a.library.state().active().count(), 2);
}

#[tokio::test]
async fn an_expired_ticket_is_told() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let invitation = a.node.invite(Duration::from_millis(1)).await.unwrap();
    assert!(matches!(a.node.joined(invitation.id).await, Err(SyncError::Expired)));
    assert!(matches!(b.node.join(&invitation.ticket, "laptop").await, Err(SyncError::Expired)));
}

#[tokio::test]
async fn a_confirmation_after_the_end_is_refused() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let invitation = a.node.invite(Duration::from_secs(3)).await.unwrap();
    let pending = b.node.join(&invitation.ticket, "laptop").await.unwrap();
    assert!(matches!(a.node.joined(invitation.id).await, Err(SyncError::Expired)));
    assert!(matches!(b.node.confirm(pending).await, Err(SyncError::Expired)));
    assert!(a.library.state().member(b.id()).is_none());
    assert!(b.library.state().library.is_none());
}

#[tokio::test]
async fn mistyped_and_bad_names_are_told_before_anything_is_sent() {
    let b = Device::new().await;
    for text in ["", "sd1", "sd1abc", "hello", "sd2mzxw6"] {
        assert!(matches!(b.node.join(text, "laptop").await, Err(SyncError::Mistyped)), "{text}");
    }
    let ticket = Device::first("desk").await.node.invite(MINUTE).await.unwrap().ticket;
    for name in ["", "a/b", "content", ".."] {
        assert!(matches!(b.node.join(&ticket, name).await, Err(SyncError::BadName { .. })));
    }
}

#[tokio::test]
async fn a_forged_secret_is_refused_and_withdraws_the_invitation_in_the_end() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let invitation = a.node.invite(MINUTE).await.unwrap();
    let mut forged = sync::pair::Ticket::from_text(&invitation.ticket).unwrap();
    forged.secret = [0; 16];
    let refused = b.node.join(&forged.to_text(), "laptop").await;
    assert!(matches!(refused, Err(SyncError::Expired)), "a secret that nobody gave out");
    assert!(b.node.join(&invitation.ticket, "laptop").await.is_ok(), "the real one still works");
}

#[tokio::test]
async fn a_name_that_is_taken_is_told_and_leaves_the_ticket_usable() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let ticket = a.node.invite(MINUTE).await.unwrap().ticket;
    let taken = b.node.join(&ticket, "desk").await;
    assert!(matches!(taken, Err(SyncError::NameTaken { name }) if name == "desk"));
    let pending = b.node.join(&ticket, "laptop").await.unwrap();
    b.node.confirm(pending).await.unwrap();
}

#[tokio::test]
async fn members_are_told_that_they_are_and_those_of_another_library_too() {
    let (a, b, other) =
        (Device::first("desk").await, Device::new().await, Device::first("nas").await);
    a.pair(&b, "laptop").await;
    let ticket = a.node.invite(MINUTE).await.unwrap().ticket;
    assert!(matches!(b.node.join(&ticket, "x").await, Err(SyncError::AlreadyMember { .. })));
    assert!(matches!(other.node.join(&ticket, "x").await, Err(SyncError::OtherLibrary { .. })));
}

#[tokio::test]
async fn an_inviter_that_is_gone_is_told() {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    let ticket = a.node.invite(MINUTE).await.unwrap().ticket;
    a.node.shutdown().await;
    assert!(matches!(b.node.join(&ticket, "laptop").await, Err(SyncError::NotReachable { .. })));
}

#[tokio::test]
async fn without_a_library_there_is_nothing_to_invite_to() {
    let a = Device::new().await;
    assert!(matches!(a.node.invite(MINUTE).await, Err(SyncError::NoLibrary)));
    assert!(matches!(a.node.joined(7).await, Err(SyncError::NoInvitation)));
}

#[tokio::test]
async fn a_third_device_is_known_to_all_and_connects_to_all() {
    let (a, b, c) = (Device::first("desk").await, Device::new().await, Device::new().await);
    a.pair(&b, "laptop").await;
    a.pair(&c, "phone").await;
    b.meet(&c).await;
    assert!(b.library.state().member_named("phone").is_some());
}

#[tokio::test]
async fn a_removed_device_is_dropped_everywhere_told_and_may_come_back_by_a_new_ticket() {
    let (a, b, c) = (Device::first("desk").await, Device::new().await, Device::new().await);
    a.pair(&b, "laptop").await;
    a.pair(&c, "phone").await;
    b.meet(&c).await;

    a.node.remove_device(c.id()).await.unwrap();
    assert!(!a.is_online(c.id()), "at once");
    until("the third hears of it", || b.library.state().member(c.id()).is_none()).await;
    until("the removed one is told", || c.library.state().member(c.id()).is_none()).await;
    assert!(c.node.peers().iter().all(|p| !p.online));
    assert!(matches!(c.node.invite(MINUTE).await, Err(SyncError::NoLibrary)));

    a.pair(&c, "phone").await;
    b.meet(&c).await;
    assert!(matches!(a.node.remove_device(a.id()).await, Err(SyncError::RemoveSelf)));
}
