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
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};
use vfs_core::changes::Change;
use vfs_core::library::{Member, State};
use vfs_core::model::DeviceId;
use vfs_core::path::check_label;

/// How long to wait before a list is sent again that a peer could not take.
const AGAIN: Duration = Duration::from_secs(1);
/// After a list of a peer was taken, the next one of it waits this long: each may cost a
/// write to the disk.
const BETWEEN_LISTS: Duration = Duration::from_millis(250);
/// How many devices a peer may make known in each [`NEWCOMERS_PER`]: a member may admit
/// others, but not fill everybody's list at once.
const MAX_NEWCOMERS: usize = 32;
const NEWCOMERS_PER: Duration = Duration::from_secs(3600);
/// How old the stored time may be when a peer was last there.
const SEEN_EVERY_MS: u64 = 60_000;

/// How many devices a peer made known lately.
pub(crate) struct Newcomers {
    since: Instant,
    count: usize,
}

impl Default for Newcomers {
    fn default() -> Self {
        Self { since: Instant::now(), count: 0 }
    }
}

impl Newcomers {
    /// How many more may come.
    fn room(&mut self) -> usize {
        if self.since.elapsed() >= NEWCOMERS_PER {
            *self = Self::default();
        }
        MAX_NEWCOMERS - self.count.min(MAX_NEWCOMERS)
    }
}

/// Where a list comes from, and how many unknown devices may be in it.
struct Told {
    me: DeviceId,
    by: DeviceId,
    room: usize,
}

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
            let told = Told { me: shared.me, by: shared.me, room: 0 };
            store(shared, told, vec![record]).await;
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
            let removal = Member { stamp, removed: true, addresses: Vec::new(), ..member };
            if state.merge(removal) { Ok(()) } else { Err(SyncError::NotRemoved) }
        })
        .await??;
    shared.index.feed().publish(vec![Change::Devices]);
    shared.members_changed();
    Ok(())
}

/// Takes records from a peer; the later ones win.
pub(crate) async fn take(shared: &Arc<Shared>, peer: &Peer, records: Vec<MemberRecord>) {
    let mut newcomers = peer.newcomers.lock().await;
    let told = Told { me: shared.me, by: peer.id, room: newcomers.room() };
    newcomers.count += store(shared, told, records).await;
    tokio::time::sleep(BETWEEN_LISTS).await;
}

/// Gives how many devices were not known before.
async fn store(shared: &Arc<Shared>, told: Told, records: Vec<MemberRecord>) -> usize {
    let merged = shared.update_library(move |state| merge_all(state, &told, records)).await;
    match merged {
        Ok(Merged { changed, news, newcomers }) => {
            if changed {
                shared.index.feed().publish(vec![Change::Devices]);
                shared.members_changed();
            }
            for id in news {
                if let Some(peer) = shared.peer(id) {
                    peer.wake.notify_one();
                }
            }
            newcomers
        }
        Err(error) => {
            tracing::warn!(%error, "members could not be stored");
            0
        }
    }
}

/// What records changed.
#[derive(Default)]
struct Merged {
    changed: bool,
    /// Members of whom an address is new.
    news: Vec<DeviceId>,
    /// How many devices were not known before.
    newcomers: usize,
}

fn merge_all(state: &mut State, told: &Told, records: Vec<MemberRecord>) -> Merged {
    let mut merged = Merged::default();
    for record in records.into_iter().filter(is_acceptable) {
        let known = state.members.iter().find(|m| m.id == record.id);
        let is_unknown = known.is_none();
        // Only whoever admitted it may say that a removed device came back, not itself.
        if record.id == told.by && known.is_some_and(|m| record.life > m.life) {
            continue;
        }
        let (id, ours) = (record.id, known.map_or(Vec::new(), |m| m.addresses.clone()));
        if is_unknown && (merged.newcomers == told.room || !has_room_for(state, &record)) {
            continue;
        }
        let theirs = plausible(&record.addresses);
        let changed = state.merge(Member { addresses: ours.clone(), ..record.into() });
        merged.changed |= changed;
        merged.newcomers += usize::from(is_unknown && changed);
        if let Some(member) = state.members.iter_mut().find(|m| m.id == id && m.id != told.me) {
            // What this device found out itself comes first.
            let had_news = add_addresses(member, theirs);
            add_addresses(member, ours);
            if had_news && !member.removed {
                merged.news.push(id);
            }
        }
    }
    merged.changed |= yield_name(state, told.me);
    merged
}

/// Whether a record of a device that is not known can be kept. Of a removed one only in free
/// room: two full lists would else push out each other's records for ever.
fn has_room_for(state: &mut State, record: &MemberRecord) -> bool {
    if record.removed { state.members.len() < MAX_MEMBERS } else { make_room(state, record.id) }
}

/// Makes sure that a record of this device can be kept; `false`: there are too many members.
pub(crate) fn make_room(state: &mut State, device: DeviceId) -> bool {
    state.members.len() < MAX_MEMBERS
        || state.members.iter().any(|m| m.id == device)
        || state.forget_oldest_removed()
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
            // A peer that connects again and again must not cost a write each time.
            let is_news = addresses.iter().any(|a| !member.addresses.contains(a));
            if is_news || is_outdated(member) {
                add_addresses(member, addresses);
                member.last_seen_ms = Some(now_ms());
            }
        }
    })
    .await;
}

/// Notes when a peer was last there.
pub(crate) async fn last_seen(shared: &Arc<Shared>, peer: &Peer) {
    let id = peer.id;
    note(shared, move |state| {
        if let Some(member) = state.members.iter_mut().find(|m| m.id == id && is_outdated(m)) {
            member.last_seen_ms = Some(now_ms());
        }
    })
    .await;
}

fn is_outdated(member: &Member) -> bool {
    member.last_seen_ms.is_none_or(|seen| now_ms().abs_diff(seen) >= SEEN_EVERY_MS)
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
            life: 0,
            stamp: Stamp { wall_ms, count: 0 },
            removed: false,
            addresses: vec![],
        }
    }

    /// A list of an old friend.
    fn told(me: u8) -> Told {
        Told { me: DeviceId([me; 32]), by: DeviceId([200; 32]), room: usize::MAX }
    }

    fn many(first: usize, count: usize) -> Vec<MemberRecord> {
        let record = |n| {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(n as u64).to_le_bytes());
            MemberRecord { id: DeviceId(id), ..record(0, &format!("d{n}"), 1 + n as u64) }
        };
        (first..first + count).map(record).collect()
    }

    #[test]
    fn of_two_devices_with_one_name_the_later_yields_and_only_it() {
        let both = || vec![record(1, "laptop", 5), record(2, "laptop", 6)];
        let mut earlier = State::default();
        merge_all(&mut earlier, &told(1), both());
        assert_eq!(earlier.member(DeviceId([1; 32])).unwrap().name, "laptop");

        let mut later = State::default();
        merge_all(&mut later, &told(2), both());
        assert_eq!(later.member(DeviceId([2; 32])).unwrap().name, "laptop-2");
    }

    #[test]
    fn a_record_with_a_bad_name_is_not_taken() {
        let mut state = State::default();
        let bad = ["", "a/b", "..", "content", "line\nbreak"].map(|n| record(1, n, 1));
        assert!(!merge_all(&mut state, &told(9), bad.to_vec()).changed);
        assert!(state.members.is_empty());
    }

    #[test]
    fn a_flood_of_members_ends_at_the_bound() {
        let mut state = State::default();
        merge_all(&mut state, &told(9), many(0, 2 * MAX_MEMBERS));
        assert_eq!(state.members.len(), MAX_MEMBERS);
    }

    #[test]
    fn a_peer_makes_a_few_devices_known_at_once_and_more_later() {
        let mut newcomers = Newcomers::default();
        let mut state = State::default();
        let told = Told { room: newcomers.room(), ..told(9) };
        let merged = merge_all(&mut state, &told, many(0, 100));
        newcomers.count += merged.newcomers;
        assert_eq!((state.members.len(), merged.newcomers), (MAX_NEWCOMERS, MAX_NEWCOMERS));
        assert_eq!(newcomers.room(), 0);
        // Of those known it tells as much as it likes.
        let told = Told { room: 0, ..told };
        let removals = many(0, 5).into_iter().map(|r| MemberRecord { removed: true, ..r });
        assert!(merge_all(&mut state, &told, removals.collect()).changed);
        assert_eq!(state.active().count(), MAX_NEWCOMERS - 5);

        newcomers.since -= NEWCOMERS_PER;
        assert_eq!(newcomers.room(), MAX_NEWCOMERS);
    }

    #[test]
    fn in_a_full_list_the_oldest_removal_makes_room_for_a_member() {
        let mut state = State::default();
        merge_all(&mut state, &told(9), many(0, MAX_MEMBERS));
        let removed = [5, 3, 8].map(|n| many(n, 1).remove(0));
        for record in removed.clone() {
            let removal = Member { removed: true, ..record.into() };
            assert!(state.merge(removal));
        }
        let removal = MemberRecord { removed: true, ..many(5000, 1).remove(0) };
        assert!(!merge_all(&mut state, &told(9), vec![removal]).changed);
        let [a, b, c] = removed.map(|r| r.id);
        let is_there = |state: &State, id| state.members.iter().any(|m| m.id == id);
        assert!(merge_all(&mut state, &told(9), many(6000, 1)).changed);
        assert_eq!([a, b, c].map(|id| is_there(&state, id)), [true, false, true]);
        assert!(merge_all(&mut state, &told(9), many(7000, 9)).changed);
        assert_eq!((state.members.len(), state.active().count()), (MAX_MEMBERS, MAX_MEMBERS));
    }

    #[test]
    fn a_removed_device_does_not_say_itself_that_it_came_back() {
        let mut state = State::default();
        merge_all(&mut state, &told(9), vec![record(1, "a", 1)]);
        let removal = MemberRecord { removed: true, ..record(1, "a", 5) };
        assert!(merge_all(&mut state, &told(9), vec![removal]).changed);
        let again = || vec![MemberRecord { life: 1, ..record(1, "a", 9) }];
        let by_itself = Told { by: DeviceId([1; 32]), ..told(9) };
        assert!(!merge_all(&mut state, &by_itself, vec![record(1, "a", 9)]).changed);
        assert!(!merge_all(&mut state, &by_itself, again()).changed);
        assert!(state.member(DeviceId([1; 32])).is_none());
        assert!(merge_all(&mut state, &told(9), again()).changed);
        assert!(state.member(DeviceId([1; 32])).is_some());
    }

    #[test]
    fn addresses_found_here_stay_first_and_unknown_ones_are_news() {
        let here: SocketAddr = "10.0.0.1:1".parse().unwrap();
        let there: SocketAddr = "10.0.0.2:2".parse().unwrap();
        let mut state = State::default();
        merge_all(&mut state, &told(9), vec![record(1, "a", 1)]);
        add_addresses(&mut state.members[0], vec![here]);
        let rumour = MemberRecord { addresses: vec![there], ..record(1, "a", 1) };
        let merged = merge_all(&mut state, &told(9), vec![rumour]);
        assert!(!merged.changed);
        assert_eq!(merged.news, [DeviceId([1; 32])]);
        assert_eq!(state.members[0].addresses, [here, there]);
    }
}
