//! Taking what is passed on: what peers state and offer is judged, compared with what is here, and
//! fetched from whoever has it.

use super::{GATHER, STALL, Statements, at_the_disk, is_signed_by};
use crate::node::Shared;
use crate::presence::{Link, Peer};
use crate::wire::{self, Follow, PassOn, Refusal, Request, Response, Rows, WireError, close};
use iroh::endpoint::RecvStream;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::{sleep, timeout};
use vfs_core::index::{
    AT_ONCE, Attested, Index, IndexError, LogRow, NewLocation, Signed, Spool, Statement, Wanted,
};
use vfs_core::model::{DeviceId, LocationId, LocationNo, Seq};
use vfs_core::path::check_label;

/// How often what could not be decided is looked at again.
const AGAIN: Duration = Duration::from_millis(500);
/// And how seldom at last.
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);
/// A peer that passes on fewer rows a second is given up.
const ROWS_PER_SECOND: u64 = 500;
/// But not before this.
const TAKE_AT_LEAST: Duration = Duration::from_secs(60);

/// What becomes of a statement.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Verdict {
    /// There is nothing (more) to do with it.
    Done,
    /// To be looked at again when a connection begins or ends: its owner is there.
    WhenAway,
    /// To be looked at again in a moment.
    Later,
}

/// Looks at what a peer offers, and takes what is of use.
pub(crate) async fn take(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut offers = link.offered.subscribe();
    let mut links = shared.statements.links.subscribe();
    let mut done: HashMap<LocationId, Signed> = HashMap::new();
    let mut pause = AGAIN;
    loop {
        links.mark_unchanged();
        let offered = offers.borrow_and_update().clone();
        let offered = offered.iter().flat_map(|list| &list.0);
        let ids: HashSet<_> = offered.clone().map(|signed| signed.statement.location).collect();
        done.retain(|id, _| ids.contains(id));
        let mut verdicts = HashSet::new();
        for signed in offered {
            let location = signed.statement.location;
            if done.get(&location) == Some(signed) {
                continue;
            }
            let verdict = judge(&shared, &peer, &link, signed).await;
            if verdict == Verdict::Done {
                done.insert(location, signed.clone());
            }
            verdicts.insert(verdict);
            tokio::task::yield_now().await;
        }
        let again = async {
            match verdicts.contains(&Verdict::Later) {
                true => sleep(pause).await,
                false => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = offers.changed() => {
                if changed.is_err() {
                    return;
                }
                pause = AGAIN;
            }
            _ = links.changed() => pause = AGAIN,
            () = again => pause = (2 * pause).min(AGAIN_AT_LAST),
        }
        // Each list may cost some hundred signatures.
        sleep(GATHER).await;
    }
}

/// Notes who may see a location by what a peer offers, as soon as it is offered: who was excluded
/// is so at once, also while rows are on their way.
pub(crate) async fn note_sharing(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    let mut offers = link.offered.subscribe();
    let mut locations = shared.locations.subscribe();
    let mut noted: HashMap<LocationId, Signed> = HashMap::new();
    loop {
        locations.mark_unchanged();
        let offered = offers.borrow_and_update().clone();
        let offered = offered.iter().flat_map(|list| &list.0);
        let ids: HashSet<_> = offered.clone().map(|signed| signed.statement.location).collect();
        noted.retain(|id, _| ids.contains(id));
        for signed in offered {
            let location = signed.statement.location;
            if noted.get(&location) == Some(signed) {
                continue;
            }
            let is_known = shared.index.location_by_id(location).is_some();
            let owner = owner_of(&shared, &signed.statement).filter(|_| is_known);
            if let Some(owner) = owner.filter(|owner| is_signed_by(*owner, signed)) {
                let (peer, link, stated) = (peer.clone(), link.clone(), signed.statement.clone());
                // The last word on a connection that is over is not the owner's word of now.
                let is_owners = move || {
                    peer.id == owner && peer.link().is_some_and(|now| Arc::ptr_eq(&now, &link))
                };
                let note = move |index: &Index| index.note_sharing(&stated, is_owners);
                if let Err(error) = at_the_disk(&shared.index, note).await {
                    tracing::warn!(%error, "who may see a location is not noted");
                    continue;
                }
            }
            if is_known {
                noted.insert(location, signed.clone());
            }
            tokio::task::yield_now().await;
        }
        tokio::select! {
            changed = offers.changed() => if changed.is_err() { return },
            _ = locations.changed() => {}
        }
        sleep(GATHER).await;
    }
}

async fn judge(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    signed: &Signed,
) -> Verdict {
    let stated = &signed.statement;
    let Some(owner) = owner_of(shared, stated) else { return Verdict::Done };
    // While it can be reached it tells itself what there is.
    if owner != peer.id
        && let Some(owner) = shared.peer(owner).filter(|owner| owner.is_reachable())
    {
        return if owner.is_online() { Verdict::WhenAway } else { Verdict::Later };
    }
    if !is_signed_by(owner, signed) {
        peer.knowledge().last_error =
            Some(format!("location {}: a false signature", stated.location));
        return Verdict::Done;
    }
    if owner == peer.id {
        return compare(shared, peer, link, signed).await;
    }
    let error = match fetch(shared, owner, link, signed).await {
        Ok(verdict) => return verdict,
        Err(error) => error,
    };
    peer.knowledge().last_error =
        Some(format!("location {} as it passes it on: {error}", stated.location));
    match error {
        TakeError::NotAsStated => Verdict::Done,
        TakeError::Wire(error) if error.is_breach() => Verdict::Done,
        TakeError::Wire(_) | TakeError::Index(_) => Verdict::Later,
    }
}

/// Whose location it is, if this device may see it.
fn owner_of(shared: &Shared, stated: &Statement) -> Option<DeviceId> {
    let id = stated.location;
    let known = shared.index.location_by_id(id).map(|location| location.owner);
    let owner = known.or_else(|| {
        shared.library.with(|s| s.active().map(|m| m.id).find(|owner| id.belongs_to(*owner)))
    })?;
    let may_see = shared.is_peer(owner) && id.belongs_to(owner) && stated.is_for(shared.me);
    (may_see && check_label(&stated.name).is_ok()).then_some(owner)
}

/// Compares a replica with what its owner itself says of it.
async fn compare(
    shared: &Arc<Shared>,
    owner: &Arc<Peer>,
    link: &Arc<Link>,
    signed: &Signed,
) -> Verdict {
    let Some(here) = shared.index.location_by_id(signed.statement.location) else {
        return Verdict::Later;
    };
    let (no, log) = (here.no, signed.statement.log);
    let statement = signed.clone();
    match at_the_disk(&shared.index, move |index| index.attest(no, &statement)).await {
        Ok(Attested::Same) => {
            shared.statements.changed();
            Verdict::Done
        }
        Ok(Attested::Elsewhere) => {
            let is_behind =
                shared.index.log_id(no) != log.log_id || shared.index.head(no) < log.head;
            if is_behind { Verdict::Later } else { Verdict::Done }
        }
        Ok(Attested::Differs) => {
            if shared.statements.may_mend(signed.statement.location) {
                mend(shared, owner, link, no, signed).await;
            }
            Verdict::Done
        }
        Err(error) => {
            tracing::warn!(%error, "a replica cannot be compared with its owner");
            Verdict::Later
        }
    }
}

/// A replica that is not what its owner has is fetched anew, if it was not only added up wrongly.
async fn mend(
    shared: &Arc<Shared>,
    owner: &Arc<Peer>,
    link: &Arc<Link>,
    no: LocationNo,
    signed: &Signed,
) {
    let Statement { location, log, .. } = signed.statement;
    let (owner_of_it, statement) = (owner.clone(), signed.clone());
    let restarted = at_the_disk(&shared.index, move |index| {
        let _applying = owner_of_it.applying.lock().unwrap_or_else(PoisonError::into_inner);
        if index.attest_anew(no, &statement)? != Attested::Differs {
            return Ok(false);
        }
        index.restart_replica(no, log.log_id).map(|_| true)
    });
    match restarted.await {
        Ok(false) => {}
        Ok(true) => {
            tracing::error!(%location, "the replica differed from its owner's rows");
            owner.knowledge().last_error =
                Some(format!("location {location}: the replica differed"));
            ask_for_all(link);
        }
        Err(error) => tracing::warn!(%error, "a replica cannot be begun anew"),
    }
}

/// The rows under way are of what is no more: a fresh connection asks for all.
fn ask_for_all(link: &Link) {
    link.connection.close(close::BYE.into(), b"");
}

/// What the owner of a replica said of it last, if it can be reached.
pub(crate) fn stated(shared: &Shared, id: LocationId) -> Option<Signed> {
    let owner = shared.index.location_by_id(id)?.owner;
    let offered = shared.peer(owner)?.link()?.offered.borrow().clone()?;
    let said = offered.0.iter().find(|signed| signed.statement.location == id)?;
    let is_owners = owner_of(shared, &said.statement) == Some(owner) && is_signed_by(owner, said);
    is_owners.then(|| said.clone())
}

/// Has all rows of a replica come again; `false`: its owner cannot be reached now, and what there
/// is stays. Waits for the disk.
pub(crate) fn fetch_anew(shared: &Shared, id: LocationId) -> Result<bool, IndexError> {
    let index = &shared.index;
    let Some(owner) = index.location_by_id(id).and_then(|l| shared.peer(l.owner)) else {
        return Ok(false);
    };
    let Some(link) = owner.link().filter(|_| owner.is_online()) else { return Ok(false) };
    let _applying = owner.applying.lock().unwrap_or_else(PoisonError::into_inner);
    // Whatever was applied meanwhile, it may have another number by now.
    let Some(location) = index.location_by_id(id) else { return Ok(false) };
    let restarted = match index.log_id(location.no) {
        0 => Ok(location.no),
        log_id => index.restart_replica(location.no, log_id),
    };
    // It may have another number although its old rows could not be cleared away.
    ask_for_all(&link);
    restarted.map(|_| true)
}

/// Why rows of a third device were not taken.
#[derive(Debug, thiserror::Error)]
enum TakeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0}")]
    Index(String),
    #[error("its rows are not those that their owner stated")]
    NotAsStated,
}

/// What came of asking another device for rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Taken {
    /// They are here.
    All,
    /// They are more than can be taken at once, or do not add up.
    Unfit,
    /// The peer does not have them (any more).
    Gone,
    /// The owner is back, or somebody else is at it.
    NotNow,
}

/// Takes rows of an owner that is away from a peer that has newer ones than this device.
async fn fetch(
    shared: &Arc<Shared>,
    owner: DeviceId,
    link: &Arc<Link>,
    signed: &Signed,
) -> Result<Verdict, TakeError> {
    let Some(_turn) = Turn::take(shared, signed.statement.location) else {
        return Ok(Verdict::Later);
    };
    let stated = signed.statement.clone();
    let wanted = at_the_disk(&shared.index, move |index| index.wants(&stated)).await;
    let wanted = wanted.map_err(TakeError::Index)?;
    if wanted == Wanted::Nothing {
        return compare_passed_on(shared, signed).await;
    }
    let Ok(_place) = shared.statements.taking.acquire().await else { return Ok(Verdict::Done) };
    let rows_for = Duration::from_secs(signed.statement.log.rows / ROWS_PER_SECOND);
    let work = async {
        if let Wanted::After(no, after) = wanted {
            let taken = take_some(shared, owner, link, signed, no, after).await?;
            if taken != Taken::Unfit {
                return Ok(taken);
            }
        }
        take_all(shared, owner, link, signed).await
    };
    let taken = timeout(TAKE_AT_LEAST.saturating_add(rows_for), work).await;
    match taken.map_err(|_| too_slow())?? {
        Taken::All => {
            shared.statements.changed();
            Ok(Verdict::Done)
        }
        Taken::Unfit => Err(TakeError::NotAsStated),
        // It offers what it has then.
        Taken::Gone => Ok(Verdict::Done),
        Taken::NotNow => Ok(Verdict::Later),
    }
}

/// Of a location, one peer's rows are taken at a time.
struct Turn<'a>(&'a Statements, LocationId);

impl<'a> Turn<'a> {
    fn take(shared: &'a Shared, id: LocationId) -> Option<Self> {
        let mut taken = shared.statements.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(id).then_some(Self(&shared.statements, id))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// What is here already may be what was stated: then this device can pass it on as well.
async fn compare_passed_on(shared: &Arc<Shared>, signed: &Signed) -> Result<Verdict, TakeError> {
    let known = shared.index.location_by_id(signed.statement.location);
    let Some(no) = known.filter(|l| l.owner != shared.me).map(|l| l.no) else {
        return Ok(Verdict::Done);
    };
    let signed = signed.clone();
    let attest = move |index: &Index| match index.view()?.attested(no)? {
        // Of two of one state the later one says who may see it.
        Some(here) if here.statement.made_ms >= signed.statement.made_ms => Ok(Attested::Elsewhere),
        _ => index.attest(no, &signed),
    };
    let attested = at_the_disk(&shared.index, attest).await.map_err(TakeError::Index)?;
    if attested == Attested::Same {
        shared.statements.changed();
    }
    Ok(Verdict::Done)
}

/// What is there for who asks for rows.
enum Asked {
    Rows(RecvStream),
    /// Only the whole log: tombstones are gone since.
    FromTheBeginning,
    /// The peer does not have them (any more).
    Gone,
}

/// Asks for rows after a place.
async fn ask(
    link: &Arc<Link>,
    signed: &Signed,
    (log_id, after): (u64, Seq),
) -> Result<Asked, TakeError> {
    let Statement { location, log, .. } = signed.statement;
    let follow = Follow { location, log_id, after };
    let request = Request::PassOn(PassOn { follow, head: log.head });
    let (mut send, mut recv) = link.connection.open_bi().await.map_err(WireError::from)?;
    wire::send_request(&mut send, link.version, &request).await?;
    let _ = send.finish();
    let answer = timeout(STALL, link.answer(&mut recv)).await.map_err(|_| too_slow())??;
    match answer {
        Response::Rows { log_id, after: from } if (log_id, from) == (log.log_id, after) => {
            Ok(Asked::Rows(recv))
        }
        Response::Rows { log_id, after: Seq(0) } if log_id == log.log_id => {
            Ok(Asked::FromTheBeginning)
        }
        Response::Rows { .. } => Err(TakeError::NotAsStated),
        Response::Refused(Refusal::Failed) => {
            Err(WireError::Lost("the peer cannot pass it on now".into()).into())
        }
        _ => Ok(Asked::Gone),
    }
}

fn too_slow() -> WireError {
    WireError::Lost("too slow".into())
}

/// `None`: that was the last one.
async fn next_rows(link: &Link, recv: &mut RecvStream) -> Result<Option<Vec<LogRow>>, TakeError> {
    let frame = timeout(STALL, wire::receive_frame_or_end_in::<Rows>(recv, &link.inbound)).await;
    let frame = frame.map_err(|_| too_slow())??;
    link.heard();
    match frame {
        // Nobody sends none: they could be sent for ever.
        Some((frame, _)) if frame.rows.is_empty() => Err(TakeError::NotAsStated),
        frame => Ok(frame.map(|(frame, _room)| frame.rows)),
    }
}

/// The rows after the last one here.
async fn take_some(
    shared: &Arc<Shared>,
    owner: DeviceId,
    link: &Arc<Link>,
    signed: &Signed,
    no: LocationNo,
    after: Seq,
) -> Result<Taken, TakeError> {
    let log = signed.statement.log;
    let mut recv = match ask(link, signed, (log.log_id, after)).await? {
        Asked::Rows(recv) => recv,
        Asked::FromTheBeginning => return Ok(Taken::Unfit),
        Asked::Gone => return Ok(Taken::Gone),
    };
    let mut rows = Vec::new();
    while let Some(more) = next_rows(link, &mut recv).await? {
        rows.extend(more);
        if rows.len() > AT_ONCE {
            return Ok(Taken::Unfit);
        }
    }
    let signed = signed.clone();
    change(shared, owner, move |index| index.apply_stated(no, rows, &signed)).await
}

/// The whole log.
async fn take_all(
    shared: &Arc<Shared>,
    owner: DeviceId,
    link: &Arc<Link>,
    signed: &Signed,
) -> Result<Taken, TakeError> {
    let log = signed.statement.log;
    let asked = ask(link, signed, (log.log_id, Seq(0))).await?;
    let Asked::Rows(mut recv) = asked else { return Ok(Taken::Gone) };
    let path = shared.statements.scratch.join(format!("passed-on-{}", signed.statement.location));
    let statement = signed.clone();
    let made = at_the_disk(&shared.index, move |_| Spool::create(&path, statement)).await;
    let mut spool = made.map_err(TakeError::Index)?;
    while let Some(rows) = next_rows(link, &mut recv).await? {
        let push = move |_: &Index| Ok(spool.push(&rows).map(|()| spool));
        match at_the_disk(&shared.index, push).await.map_err(TakeError::Index)? {
            Ok(so_far) => spool = so_far,
            Err(error) if is_lie(&error) => return Ok(Taken::Unfit),
            Err(error) => return Err(TakeError::Index(error.to_string())),
        }
    }
    let statement = signed.statement.clone();
    change(shared, owner, move |index| {
        let spooled = spool.finish()?;
        let no = put_location(index, owner, &statement)?;
        index.apply_spooled(no, spooled).map(|_| true)
    })
    .await
}

/// Whether it is the rows, and not this device's disk.
fn is_lie(error: &IndexError) -> bool {
    matches!(error, IndexError::NotAsStated | IndexError::InvalidRow(_))
}

/// The location as its owner describes it; names of one device's locations differ.
fn put_location(
    index: &Index,
    owner: DeviceId,
    stated: &Statement,
) -> Result<LocationNo, IndexError> {
    if let Some(known) = index.location_by_id(stated.location) {
        return Ok(known.no);
    }
    if index.locations().iter().any(|l| l.owner == owner && l.name == stated.name) {
        return Err(IndexError::InvalidRow("two locations of one name"));
    }
    let Statement { location, name, read_only, .. } = stated.clone();
    let (root, shared_with) = (None, None);
    let new = NewLocation { id: location, owner, name, root, read_only, shared_with };
    Ok(index.put_location(new)?.no)
}

/// Changes a replica of an owner that is a member and away.
async fn change(
    shared: &Arc<Shared>,
    owner: DeviceId,
    work: impl FnOnce(&Index) -> Result<bool, IndexError> + Send + 'static,
) -> Result<Taken, TakeError> {
    let Some(peer) = shared.member_peer(owner) else { return Ok(Taken::Gone) };
    let all = shared.clone();
    let done = at_the_disk(&shared.index, move |index| {
        let _applying = peer.applying.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.is_peer(owner) {
            return Ok(Taken::Gone);
        }
        if peer.link().is_some() {
            return Ok(Taken::NotNow);
        }
        match work(index) {
            Ok(true) => Ok(Taken::All),
            Ok(false) => Ok(Taken::Unfit),
            Err(error) if is_lie(&error) => Ok(Taken::Unfit),
            Err(error) => Err(error),
        }
    });
    done.await.map_err(TakeError::Index)
}
