//! Who belongs to the library: records passed on, removals enforced at once.
//!
//! Every member may make records (admit, rename, remove); the later record wins on
//! every device ([`State::merge`]). Records are sent to each peer when it connects and
//! after every change. A device that was removed gets its record as the reason with
//! which connections are closed, so that it knows, and stops trying.

use crate::error::SyncError;
use crate::node::Shared;
use crate::presence::{self, Link, Peer, close_code, now_ms};
use crate::wire::{
    Hello, MAX_ADDRESSES, MAX_MEMBERS, MemberList, MemberRecord, Request, Response, WireError,
    close, decode,
};
use iroh::TransportAddr;
use iroh::endpoint::{Connection, ConnectionError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use vfs_core::changes::Change;
use vfs_core::library::{Member, State};
use vfs_core::model::DeviceId;
use vfs_core::path::check_label;

/// How long to wait before a list is sent again that a peer could not take.
const AGAIN: Duration = Duration::from_secs(1);

/// Whether a record keeps the rules of names.
pub(crate) fn is_acceptable(record: &MemberRecord) -> bool {
    check_label(&record.name).is_ok()
}

/// Addresses that a device could have, the first of them.
pub(crate) fn plausible(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let could_be =
        |a: &&SocketAddr| a.port() != 0 && !a.ip().is_unspecified() && !a.ip().is_multicast();
    addresses.iter().filter(could_be).take(MAX_ADDRESSES).copied().collect()
}

/// Puts addresses first, most recent first; `true` when one is new.
fn add_addresses(member: &mut Member, fresh: Vec<SocketAddr>) -> bool {
    let is_news = fresh.iter().any(|a| !member.addresses.contains(a));
    let mut all = fresh;
    for old in std::mem::take(&mut member.addresses) {
        if !all.contains(&old) {
            all.push(old);
        }
    }
    all.truncate(MAX_ADDRESSES);
    member.addresses = all;
    is_news
}

/// Closes what no longer belongs to a member; at once, before anybody else is told.
pub(crate) fn enforce(shared: &Shared) {
    let gone: Vec<_> = {
        let mut peers = shared.peers();
        let ids: Vec<_> = peers.keys().copied().filter(|id| !shared.is_peer(*id)).collect();
        ids.iter().filter_map(|id| peers.remove(id)).collect()
    };
    for peer in gone {
        if let Some(link) = peer.link() {
            turn_away(shared, peer.id, &link.connection);
        }
    }
}

/// Closes a connection of a device that is not a member, before a message of it is read.
pub(crate) fn turn_away(shared: &Shared, id: DeviceId, connection: &Connection) {
    let record = shared.library.with(|s| {
        let am_member = s.member(shared.me).is_some();
        s.members
            .iter()
            .find(|m| m.id == id && m.removed && am_member)
            .map(|m| MemberRecord { addresses: Vec::new(), ..MemberRecord::from(m) })
    });
    match record.and_then(|r| postcard::to_stdvec(&r).ok()) {
        Some(reason) => connection.close(close::REMOVED.into(), &reason),
        None => connection.close(close::NOT_MEMBER.into(), b"not a member"),
    }
}

/// A peer closed the connection: if because this device was removed, takes note of it.
pub(crate) async fn told(shared: &Arc<Shared>, closed: &ConnectionError) {
    let ConnectionError::ApplicationClosed(reason) = closed else { return };
    if close_code(closed) != Some(close::REMOVED) {
        return;
    }
    match decode::<MemberRecord>(&reason.reason) {
        Ok(record) if record.id == shared.me && record.removed && is_acceptable(&record) => {
            take(shared, vec![record]).await;
        }
        _ => {}
    }
}

/// Removes a device: here at once, elsewhere as soon as they hear of it.
pub(crate) async fn remove(shared: &Arc<Shared>, device: DeviceId) -> Result<(), SyncError> {
    if device == shared.me {
        return Err(SyncError::RemoveSelf);
    }
    shared
        .update_library(move |state| {
            let member = state.member(device).cloned().ok_or(SyncError::NoDevice)?;
            let stamp = state.next_stamp();
            state.merge(Member { stamp, removed: true, addresses: Vec::new(), ..member });
            Ok::<_, SyncError>(())
        })
        .await??;
    shared.index.feed().publish(vec![Change::Devices]);
    shared.members_changed();
    Ok(())
}

/// Takes records from a peer; the later ones win.
pub(crate) async fn take(shared: &Arc<Shared>, records: Vec<MemberRecord>) {
    let me = shared.me;
    let merged = shared.update_library(move |state| merge_all(state, me, records)).await;
    match merged {
        Ok(Merged { changed, news }) => {
            if changed {
                shared.index.feed().publish(vec![Change::Devices]);
                shared.members_changed();
            }
            for id in news {
                if let Some(peer) = shared.peer(id) {
                    peer.wake.notify_one();
                }
            }
        }
        Err(error) => tracing::warn!(%error, "members could not be stored"),
    }
}

/// What records changed.
struct Merged {
    changed: bool,
    /// Members of whom an address is new.
    news: Vec<DeviceId>,
}

fn merge_all(state: &mut State, me: DeviceId, records: Vec<MemberRecord>) -> Merged {
    let mut merged = Merged { changed: false, news: Vec::new() };
    for record in records.into_iter().filter(is_acceptable) {
        let known = state.members.iter().find(|m| m.id == record.id);
        if known.is_none() && state.members.len() >= MAX_MEMBERS {
            continue;
        }
        let id = record.id;
        let (ours, theirs) =
            (known.map_or(Vec::new(), |m| m.addresses.clone()), plausible(&record.addresses));
        merged.changed |= state.merge(Member { addresses: ours.clone(), ..record.into() });
        if let Some(member) = state.members.iter_mut().find(|m| m.id == id && m.id != me) {
            // What this device found out itself comes first.
            let had_news = add_addresses(member, theirs);
            add_addresses(member, ours);
            if had_news && !member.removed {
                merged.news.push(id);
            }
        }
    }
    merged.changed |= yield_name(state, me);
    merged
}

/// Two devices may be admitted under one name while the members that admit them cannot
/// talk to each other. The one with the later record takes another name.
fn yield_name(state: &mut State, me: DeviceId) -> bool {
    let Some(mine) = state.member(me).cloned() else { return false };
    let is_earlier = |m: &Member| m.name == mine.name && (m.stamp, m.id) < (mine.stamp, mine.id);
    if !state.active().any(is_earlier) {
        return false;
    }
    let stem: String = mine.name.chars().take(60).collect();
    let free = (2..=MAX_MEMBERS + 2)
        .map(|n| format!("{stem}-{n}"))
        .find(|name| state.member_named(name).is_none());
    let Some(name) = free else { return false };
    let stamp = state.next_stamp();
    state.merge(Member { name, stamp, ..mine })
}

/// Tells a peer who the members are, now and after every change.
pub(crate) async fn announce(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut changes = shared.members.subscribe();
    let mut sent = None;
    loop {
        changes.mark_unchanged();
        let members = shared.library.state().members;
        let list = MemberList(members.iter().map(MemberRecord::from).collect());
        if sent.as_ref() != Some(&list) {
            match push(&link, &Request::Members, &list).await {
                Ok(()) => sent = Some(list),
                Err(error) => {
                    peer.knowledge().last_error = Some(error.to_string());
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Sends a request with one frame, and waits until it was taken.
pub(crate) async fn push(
    link: &Link,
    request: &Request,
    list: &impl serde::Serialize,
) -> Result<(), WireError> {
    let (mut send, mut recv) = link.connection.open_bi().await?;
    crate::wire::send_request(&mut send, link.version, request).await?;
    crate::wire::send_frame(&mut send, list).await?;
    let _ = send.finish();
    match link.answer(&mut recv).await? {
        Response::Done => Ok(()),
        other => Err(WireError::Lost(format!("refused: {other:?}"))),
    }
}

/// Notes where and when a peer was reached.
pub(crate) async fn remember(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>, hello: Hello) {
    let mut addresses = reached_at(&link);
    addresses.extend(hello.addresses);
    let (id, addresses) = (peer.id, plausible(&addresses));
    note(&shared, move |state| {
        if let Some(member) = state.members.iter_mut().find(|m| m.id == id && !m.removed) {
            add_addresses(member, addresses);
            member.last_seen_ms = Some(now_ms());
        }
    })
    .await;
}

/// Notes when a peer was last there.
pub(crate) async fn last_seen(shared: &Arc<Shared>, peer: &Peer) {
    let id = peer.id;
    note(shared, move |state| {
        if let Some(member) = state.members.iter_mut().find(|m| m.id == id) {
            member.last_seen_ms = Some(now_ms());
        }
    })
    .await;
}

async fn note(shared: &Arc<Shared>, change: impl FnOnce(&mut State) + Send + 'static) {
    if let Err(error) = shared.update_library(change).await {
        tracing::warn!(%error, "the library could not be stored");
    }
}

fn reached_at(link: &Link) -> Vec<SocketAddr> {
    let paths = link.connection.paths();
    let selected = paths.iter().filter(|p| p.is_selected());
    selected
        .filter_map(|p| match p.remote_addr() {
            TransportAddr::Ip(address) => Some(*address),
            _ => None,
        })
        .collect()
}

/// Keeps one task for each member that dials it, and the index free of others' rows.
pub(crate) async fn keep(shared: Arc<Shared>) {
    let mut changes = shared.members.subscribe();
    let mut tasks = JoinSet::new();
    let mut diallers: HashMap<DeviceId, (Arc<Peer>, AbortHandle)> = HashMap::new();
    loop {
        changes.mark_unchanged();
        enforce(&shared);
        let members: Vec<_> = shared.library.state().active().map(|m| m.id).collect();
        let peers: HashMap<_, _> =
            members.into_iter().filter_map(|id| Some((id, shared.member_peer(id)?))).collect();
        diallers.retain(|id, (peer, task)| {
            // Removed and admitted again it is another peer.
            let stays = peers.get(id).is_some_and(|now| Arc::ptr_eq(now, peer));
            if !stays {
                task.abort();
            }
            stays
        });
        for (id, peer) in peers {
            diallers.entry(id).or_insert_with(|| {
                (peer.clone(), tasks.spawn(presence::keep(shared.clone(), peer)))
            });
        }
        while tasks.try_join_next().is_some() {}
        drop_strangers_rows(&shared).await;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Replicas of devices that are not members any more go.
async fn drop_strangers_rows(shared: &Arc<Shared>) {
    let strangers: Vec<_> = shared
        .index
        .locations()
        .into_iter()
        .filter(|l| l.owner != shared.me && !shared.is_peer(l.owner))
        .collect();
    for location in strangers {
        let index = shared.index.clone();
        let removed = tokio::task::spawn_blocking(move || index.remove_location(location.no)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%error, "the replica of a removed device could not be dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfs_core::library::Stamp;

    fn record(id: u8, name: &str, wall_ms: u64) -> MemberRecord {
        MemberRecord {
            id: DeviceId([id; 32]),
            name: name.into(),
            stamp: Stamp { wall_ms, count: 0 },
            removed: false,
            addresses: vec![],
        }
    }

    #[test]
    fn of_two_devices_with_one_name_the_later_yields_and_only_it() {
        let both = || vec![record(1, "laptop", 5), record(2, "laptop", 6)];
        let mut earlier = State::default();
        merge_all(&mut earlier, DeviceId([1; 32]), both());
        assert_eq!(earlier.member(DeviceId([1; 32])).unwrap().name, "laptop");

        let mut later = State::default();
        merge_all(&mut later, DeviceId([2; 32]), both());
        assert_eq!(later.member(DeviceId([2; 32])).unwrap().name, "laptop-2");
    }

    #[test]
    fn a_record_with_a_bad_name_is_not_taken() {
        let mut state = State::default();
        let bad = ["", "a/b", "..", "content", "line\nbreak"].map(|n| record(1, n, 1));
        assert!(!merge_all(&mut state, DeviceId([9; 32]), bad.to_vec()).changed);
        assert!(state.members.is_empty());
    }

    #[test]
    fn a_flood_of_members_ends_at_the_bound() {
        let mut state = State::default();
        let flood = (0..2 * MAX_MEMBERS).map(|n| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            MemberRecord { id: DeviceId(id), ..record(0, &format!("d{n}"), 1) }
        });
        merge_all(&mut state, DeviceId([9; 32]), flood.collect());
        assert_eq!(state.members.len(), MAX_MEMBERS);
    }

    #[test]
    fn addresses_found_here_stay_first_and_unknown_ones_are_news() {
        let here: SocketAddr = "10.0.0.1:1".parse().unwrap();
        let there: SocketAddr = "10.0.0.2:2".parse().unwrap();
        let mut state = State::default();
        merge_all(&mut state, DeviceId([9; 32]), vec![record(1, "a", 1)]);
        add_addresses(&mut state.members[0], vec![here]);
        let told = MemberRecord { addresses: vec![there], ..record(1, "a", 1) };
        let merged = merge_all(&mut state, DeviceId([9; 32]), vec![told]);
        assert!(!merged.changed);
        assert_eq!(merged.news, [DeviceId([1; 32])]);
        assert_eq!(state.members[0].addresses, [here, there]);
    }
}
