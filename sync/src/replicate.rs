//! Rows of the index, out and in.
//!
//! Each device announces its own locations to each peer that may see them. The peer
//! keeps a replica of each and follows it on a stream of its own: every row after the
//! last one it has, then the live tail. The owner reads rows from its index when the
//! stream has room, so a slow peer costs no memory; small changes are gathered for a
//! moment, because thousands of tiny messages on one stream break a connection.
//!
//! A peer can announce and fill its own locations only: another device's location id is
//! never taken from it.

use crate::compact::Note;
use crate::members::push;
use crate::node::Shared;
use crate::pass_on::at_the_disk;
use crate::presence::{Link, Peer, reply};
use crate::wire::{
    self, Announced, Follow, LocationList, MAX_LOCATIONS, MAX_ROWS, Refusal, Request, Response,
    Rows, WireError,
};
use iroh::endpoint::SendStream;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use vfs_core::changes::{Change, Next};
use vfs_core::index::{Begin, Index, IndexError, LogRow, NewLocation, Unlike};
use vfs_core::model::{DeviceId, Location, LocationId, LocationNo, Seq};
use vfs_core::path::check_label;

/// About how many bytes of rows one frame has.
const BATCH_BYTES: usize = 256 << 10;
/// How long changes are gathered before they are sent.
const GATHER: Duration = Duration::from_millis(5);
/// How long to wait before a replica is followed again after a failure.
const AGAIN: Duration = Duration::from_secs(2);
/// How long all rows of a location may take that are only looked at.
const COMPARING: Duration = Duration::from_secs(300);

/// This device's location, if the peer may see it.
fn shared_location(shared: &Shared, peer: DeviceId, id: LocationId) -> Option<Arc<Location>> {
    shared.index.location_by_id(id).filter(|l| is_shared(shared, peer, l))
}

pub(crate) fn is_shared(shared: &Shared, peer: DeviceId, location: &Location) -> bool {
    location.owner == shared.me && location.is_shared_with(peer)
}

/// Tells a peer which locations it may see, now and after every change.
pub(crate) async fn announce(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut changes = shared.locations.subscribe();
    let mut sent = None;
    loop {
        changes.mark_unchanged();
        let list = own_locations(&shared, peer.id);
        if sent.as_ref() != Some(&list) {
            match push(&link, &Request::Locations, &list).await {
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

fn own_locations(shared: &Shared, peer: DeviceId) -> LocationList {
    let all = shared.index.locations();
    let visible = all.iter().filter(|l| is_shared(shared, peer, l)).take(MAX_LOCATIONS);
    LocationList(
        visible
            .map(|l| Announced { id: l.id, name: l.name.clone(), read_only: l.read_only })
            .collect(),
    )
}

/// Sends rows of one location, and its live tail, until the peer goes or may not see it.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    peer: &Peer,
    link: &Link,
    follow: Follow,
    send: &mut SendStream,
) -> Result<(), WireError> {
    let Some(location) = shared_location(shared, peer.id, follow.location) else {
        return reply(send, &Response::Refused(Refusal::NotShared)).await;
    };
    let (index, no) = (&shared.index, location.no);
    let mut note = Note::of(peer.id, no);
    let begun = at_the_disk(index, move |index| {
        let begin = index.view()?.resume_at(no, follow.log_id, follow.after)?;
        note.note(index, begin.after);
        Ok((begin, note))
    });
    let (begin, mut note) = match begun.await {
        Ok(begun) => begun,
        Err(error) => {
            tracing::error!(%error, "rows could not be read");
            return reply(send, &Response::Refused(Refusal::Failed)).await;
        }
    };
    let Begin { log_id, mut after, .. } = begin;
    wire::send_frame(send, &Response::Rows { log_id, after }).await?;
    let mut is_first = true;
    loop {
        let Ok(room) = link.outbound.acquire().await else { return Ok(()) };
        // Before each batch: there may be many, and none after it is no longer shared.
        let still = shared_location(shared, peer.id, follow.location);
        if still.is_none_or(|l| l.no != no || index.log_id(no) != log_id) {
            let _ = send.finish();
            return Ok(());
        }
        // Before the look, so that nothing falls in between; and for no longer than it takes, since
        // all that happens while rows are sent would wait in memory for a peer that is slow.
        let mut feed = index.feed().subscribe();
        let read = at_the_disk(index, move |index| {
            note.note(index, after);
            let view = index.view()?;
            let is_compacted = view.is_compacted(no, &begin, after)?;
            let rows =
                (!is_compacted).then(|| view.log_after(no, after, BATCH_BYTES)).transpose()?;
            Ok((rows, note))
        });
        let read =
            read.await.inspect_err(|error| tracing::error!(%error, "rows could not be read"));
        let Ok((Some((rows, upto)), again)) = read else {
            // Asked again, it is told where to begin anew.
            let _ = send.reset(0u32.into());
            return Ok(());
        };
        note = again;
        if upto > after || is_first {
            drop(feed);
            let head = index.head(no).max(upto);
            send_rows(send, rows, upto, head).await?;
            (after, is_first) = (upto, false);
            continue;
        }
        drop(room);
        let touched = async {
            while let Some(next) = feed.next().await {
                if concerns(&next, no) {
                    return;
                }
            }
        };
        tokio::select! {
            () = touched => {}
            _ = send.stopped() => return Ok(()),
        }
        tokio::time::sleep(GATHER).await;
    }
}

fn concerns(next: &Next, no: LocationNo) -> bool {
    let Next::Batch(changes) = next else { return true };
    changes.iter().any(|change| match change {
        Change::Entry { location, .. } | Change::Attributes { location, .. } => *location == no,
        Change::Locations => true,
        Change::Devices | Change::Reset => false,
    })
}

/// Several frames when the rows are tiny: their number is bounded too.
pub(crate) async fn send_rows(
    send: &mut SendStream,
    mut rows: Vec<LogRow>,
    upto: Seq,
    head: Seq,
) -> Result<(), WireError> {
    loop {
        let rest = rows.split_off(rows.len().min(MAX_ROWS));
        let upto = match (rest.is_empty(), rows.last()) {
            (false, Some(last)) => last.seq,
            _ => upto,
        };
        wire::send_frame(send, &Rows { rows, upto, head }).await?;
        if rest.is_empty() {
            return Ok(());
        }
        rows = rest;
    }
}

/// Keeps replicas of what the peer announces, and follows each.
pub(crate) async fn follow(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut announcements = link.announced.subscribe();
    let mut tasks = JoinSet::new();
    let mut followed: HashMap<LocationId, AbortHandle> = HashMap::new();
    loop {
        let announced = announcements.borrow_and_update().clone();
        if let Some(list) = announced {
            let (kept, error) = match take_over(&shared, &peer, list).await {
                Ok((kept, left_out)) => (kept, left_out),
                Err(error) => (HashSet::new(), Some(error)),
            };
            if error.is_some() {
                peer.knowledge().last_error = error;
            }
            peer.knowledge().heads.retain(|id, _| kept.contains(id));
            followed.retain(|id, task| {
                let stays = kept.contains(id);
                if !stays {
                    task.abort();
                }
                stays && !task.is_finished()
            });
            for id in kept {
                followed.entry(id).or_insert_with(|| {
                    tasks.spawn(keep_replica(shared.clone(), peer.clone(), link.clone(), id))
                });
            }
        }
        while tasks.try_join_next().is_some() {}
        if announcements.changed().await.is_err() {
            return;
        }
    }
}

/// The locations to be followed, and why some of those announced are not.
type Kept = (HashSet<LocationId>, Option<String>);

/// Adds and updates replicas as announced, and drops the others of this peer.
async fn take_over(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    list: Arc<LocationList>,
) -> Result<Kept, String> {
    let (shared, peer) = (shared.clone(), peer.clone());
    tokio::task::spawn_blocking(move || {
        let _applying = peer.applying.lock().unwrap_or_else(PoisonError::into_inner);
        // A peer removed meanwhile must not bring its rows back.
        if !shared.is_peer(peer.id) {
            return Err("no longer a member".to_owned());
        }
        store_announced(&shared.index, peer.id, &list.0)
    })
    .await
    .map_err(|e| e.to_string())
    .flatten()
}

fn store_announced(index: &Index, peer: DeviceId, list: &[Announced]) -> Result<Kept, String> {
    let mut accepted = acceptable(index, peer, list);
    let mut left_out = None;
    for replica in index.locations().iter().filter(|l| l.owner == peer) {
        if !accepted.contains_key(&replica.id) {
            index.withdraw_location(replica.no).map_err(|e| e.to_string())?;
        }
    }
    let mut failure = None;
    accepted.retain(|_, announced| match store_one(index, peer, announced) {
        Ok(()) => true,
        // It has had its share of numbers; what it has stays.
        Err(error @ IndexError::TooMany(_)) => {
            left_out = Some(error.to_string());
            false
        }
        Err(error) => {
            failure = Some(error.to_string());
            false
        }
    });
    match failure {
        Some(failure) => Err(failure),
        None => Ok((accepted.into_keys().collect(), left_out)),
    }
}

fn store_one(index: &Index, peer: DeviceId, announced: &Announced) -> Result<(), IndexError> {
    let known = index.location_by_id(announced.id);
    let is_same = |l: &Location| l.name == announced.name && l.read_only == announced.read_only;
    if known.is_some_and(|l| is_same(&l)) {
        return Ok(());
    }
    let location = NewLocation {
        id: announced.id,
        owner: peer,
        name: announced.name.clone(),
        root: None,
        read_only: announced.read_only,
        shared_with: None,
    };
    index.put_location(location).map(drop)
}

/// What a peer may announce: names that are labels and differ, ids that are its own. An id
/// that the index does not know may be another device's all the same.
fn acceptable<'a>(
    index: &Index,
    peer: DeviceId,
    list: &'a [Announced],
) -> HashMap<LocationId, &'a Announced> {
    let mut names = HashSet::new();
    list.iter()
        .filter(|a| check_label(&a.name).is_ok() && names.insert(a.name.as_str()))
        .filter(|a| a.id.belongs_to(peer))
        .filter(|a| index.location_by_id(a.id).is_none_or(|l| l.owner == peer))
        .map(|a| (a.id, a))
        .collect()
}

/// Why a replica is not followed any more on this connection.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("its rows are refused: {0}")]
    Rows(String),
    #[error("it no longer shares the location")]
    NotShared,
    #[error("the location is gone")]
    Gone,
    #[error("the replica was changed meanwhile")]
    Moved,
}

/// Follows one location for as long as the connection lives. A peer whose rows break the
/// rules is not asked again on this connection.
async fn keep_replica(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>, id: LocationId) {
    loop {
        let error = match follow_once(&shared, &peer, &link, id).await {
            Err(error) => error,
            Ok(never) => match never {},
        };
        let is_final = match &error {
            FollowError::Wire(e) => e.is_breach(),
            FollowError::Moved => false,
            FollowError::Rows(_) | FollowError::NotShared | FollowError::Gone => true,
        };
        if is_final || link.connection.close_reason().is_none() {
            peer.knowledge().last_error = Some(format!("location {id}: {error}"));
        }
        if is_final {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn follow_once(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    id: LocationId,
) -> Result<std::convert::Infallible, FollowError> {
    let index = &shared.index;
    let location =
        index.location_by_id(id).filter(|l| l.owner == peer.id).ok_or(FollowError::Gone)?;
    let mut no = location.no;
    let (known_log, known_head) = (index.log_id(no), index.head(no));
    let (mut send, mut recv) = link.connection.open_bi().await.map_err(WireError::from)?;
    let request = Request::Rows(Follow { location: id, log_id: known_log, after: known_head });
    wire::send_request(&mut send, link.version, &request).await?;
    let _ = send.finish();
    let (log_id, mut after) = match link.answer(&mut recv).await? {
        Response::Rows { log_id, after } => (log_id, after),
        Response::Refused(Refusal::NotShared) => return Err(FollowError::NotShared),
        other => return Err(FollowError::Rows(format!("refused: {other:?}"))),
    };
    let is_other = (log_id, after) != (known_log, known_head);
    if is_other && after != Seq(0) {
        return Err(FollowError::Rows("they begin in the middle".into()));
    }
    if after == Seq(0) {
        no = change(peer, index, move |index| {
            let is_to_be_emptied = is_other || index.has_leftovers(no)?;
            if is_to_be_emptied { index.restart_replica(no, log_id) } else { Ok(no) }
        })
        .await?;
    }
    loop {
        let frame = wire::receive_frame_in(&mut recv, &link.inbound).await?;
        let (Rows { rows, upto, head }, _room) = frame;
        link.heard();
        if upto < after || (upto == after && !rows.is_empty()) {
            return Err(FollowError::Rows("they go backwards".into()));
        }
        peer.knowledge().heads.insert(id, head.max(upto));
        if upto > after {
            let expected = (log_id, after);
            change(peer, index, move |index| {
                if (index.log_id(no), index.head(no)) != expected {
                    return Ok(Err(FollowError::Moved));
                }
                let applied = match upto < head {
                    true => index.apply_replica_part(no, log_id, rows, upto),
                    false => index.apply_replica(no, log_id, rows, upto),
                };
                applied.map(Ok)
            })
            .await??;
            after = upto;
        }
    }
}

/// Has the owner of a replica send all of its rows once more, and compares them with those that
/// are here, which stay as they are.
pub(crate) async fn compare(shared: &Shared, id: LocationId) -> Result<Unlike, String> {
    let gone = || "its owner cannot be reached".to_owned();
    let location = shared.index.location_by_id(id).ok_or_else(gone)?;
    let owner = shared.peer(location.owner).filter(|peer| peer.is_online()).ok_or_else(gone)?;
    let link = owner.link().ok_or_else(gone)?;
    let compared = compare_over(shared, &link, &location);
    tokio::time::timeout(COMPARING, compared).await.map_err(|_| "it takes too long".to_owned())?
}

async fn compare_over(shared: &Shared, link: &Link, here: &Location) -> Result<Unlike, String> {
    let (no, mut after, mut found) = (here.no, Seq(0), Unlike::default());
    let log_id = shared.index.log_id(no);
    let request = Request::Rows(Follow { location: here.id, log_id, after });
    let (mut send, mut recv) = link.connection.open_bi().await.map_err(|e| e.to_string())?;
    let lost = |e: WireError| e.to_string();
    wire::send_request(&mut send, link.version, &request).await.map_err(lost)?;
    let _ = send.finish();
    let answer = link.answer(&mut recv).await.map_err(lost)?;
    if !matches!(answer, Response::Rows { log_id: theirs, .. } if theirs == log_id) {
        return Err("its owner has another log by now".to_owned());
    }
    loop {
        let frame = wire::receive_frame_in(&mut recv, &link.inbound).await.map_err(lost)?;
        let (Rows { rows, upto, head }, _room) = frame;
        link.heard();
        if upto < after || (upto == after && upto < head) {
            return Err("its rows go backwards".to_owned());
        }
        let index = shared.index.clone();
        let compared = tokio::task::spawn_blocking(move || {
            index.compare_log(no, (after, upto), &rows, &mut found).map(|()| found)
        });
        found = compared.await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
        after = upto;
        if upto >= head {
            return Ok(found);
        }
    }
}

/// Changes a replica, off the runtime's threads, one change of a peer's replicas at a time.
async fn change<T: Send + 'static>(
    peer: &Arc<Peer>,
    index: &Index,
    work: impl FnOnce(&Index) -> Result<T, IndexError> + Send + 'static,
) -> Result<T, FollowError> {
    let (peer, index) = (peer.clone(), index.clone());
    tokio::task::spawn_blocking(move || {
        let _applying = peer.applying.lock().unwrap_or_else(PoisonError::into_inner);
        work(&index).map_err(|e| FollowError::Rows(e.to_string()))
    })
    .await
    .map_err(|e| FollowError::Rows(e.to_string()))
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfs_core::index::open_store;

    #[test]
    fn locations_beyond_a_peers_share_are_left_out_and_its_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (me, peer) = (DeviceId([1; 32]), DeviceId([2; 32]));
        let index = Index::open(open_store(dir.path()).unwrap().store, me).unwrap();
        let fresh = |n: u64| Announced {
            id: LocationId::new(peer, n.to_le_bytes()),
            name: format!("l{n}"),
            read_only: false,
        };
        (0..1023).for_each(|n| store_one(&index, peer, &fresh(n)).unwrap());
        let list: Vec<_> = (500..1025).map(fresh).collect();
        let (kept, left_out) = store_announced(&index, peer, &list).unwrap();
        assert_eq!(kept.len(), 524, "of two new ones one has a number");
        assert!(left_out.is_some_and(|e| e.contains("too many")));
        assert_eq!(index.locations().len(), 524);
    }
}
