//! Replicas that are passed on, for when their owner is away.
//!
//! An owner signs what each of its locations is whenever that has come to rest, and tells its
//! peers. A peer whose replica is the same keeps the statement, and offers it, with its rows, to
//! every other device that may see the location. A device that cannot reach the owner takes them
//! from whoever has newer ones than it has itself; rows that do not add up to the statement are
//! refused ([`vfs_core::index::Index::apply_stated`]), so nobody who passes them on is trusted.

use crate::members::push;
use crate::node::Shared;
use crate::presence::{Link, Peer, now_ms, reply};
use crate::replicate::send_rows;
use crate::wire::{
    self, Follow, MAX_FRAME, MAX_LOCATIONS, PASSES_ON, PassOn, Refusal, Request, Response, Rows,
    StatementList, WireError, close,
};
use iroh::endpoint::{RecvStream, SendStream};
use iroh::{PublicKey, Signature};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use vfs_core::changes::{Change, Next, Subscription};
use vfs_core::index::{
    AT_ONCE, Attested, Begin, Index, IndexError, LogRow, NewLocation, Signed, Spool, Statement,
    View, Wanted,
};
use vfs_core::model::{DeviceId, Location, LocationId, LocationNo, Seq};
use vfs_core::path::check_label;

/// A location that has not changed for so long is at rest.
const REST: Duration = Duration::from_millis(100);
/// One that does not rest is stated all the same, so often.
const RESTLESS: Duration = Duration::from_secs(30);
/// How long what is offered is gathered.
const GATHER: Duration = Duration::from_millis(200);
/// How often what could not be decided is looked at again.
const AGAIN: Duration = Duration::from_millis(500);
/// And how seldom at last.
const AGAIN_AT_LAST: Duration = Duration::from_secs(60);
/// How long to wait after a failure.
const AFTER_FAILURE: Duration = Duration::from_secs(2);
/// Replicas that are taken from others at once.
const TAKING: usize = 4;
/// A peer that passes on fewer rows a second is given up.
const ROWS_PER_SECOND: u64 = 500;
/// But not before this.
const TAKE_AT_LEAST: Duration = Duration::from_secs(60);
/// About how many bytes of rows one frame has.
const LOT_BYTES: usize = 256 << 10;
/// How long one frame may take.
const STALL: Duration = Duration::from_secs(30);
/// How often a replica that is not what its owner stated is fetched anew.
const MENDED_EVERY: Duration = Duration::from_secs(24 * 3600);

/// What the node knows of statements, of all connections.
pub(crate) struct Statements {
    /// Of own locations, the last ones.
    own: Mutex<HashMap<LocationId, Arc<Signed>>>,
    /// Counts changes of what can be offered.
    changed: watch::Sender<u64>,
    /// Counts connections that begin or end.
    links: watch::Sender<u64>,
    /// Held by those who take rows of owners that are away.
    taking: Semaphore,
    /// Of these locations.
    taken: Mutex<HashSet<LocationId>>,
    /// When which replicas were fetched anew.
    mended: Mutex<HashMap<LocationId, Instant>>,
    /// Where whole logs are put until they are known to be right.
    scratch: PathBuf,
}

impl Statements {
    pub(crate) fn new(scratch: PathBuf) -> Self {
        let (own, mended, taken) = Default::default();
        let (changed, links) = (watch::Sender::new(0), watch::Sender::new(0));
        Self { own, changed, links, taking: Semaphore::new(TAKING), taken, mended, scratch }
    }

    /// A connection began or ended.
    pub(crate) fn links_changed(&self) {
        self.links.send_modify(|n| *n += 1);
    }

    fn own(&self, id: LocationId) -> Option<Arc<Signed>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    fn changed(&self) {
        self.changed.send_modify(|n| *n += 1);
    }

    /// Whether a replica may be fetched anew; if so, it is noted.
    fn may_mend(&self, id: LocationId) -> bool {
        let mut mended = self.mended.lock().unwrap_or_else(PoisonError::into_inner);
        mended.retain(|_, when| when.elapsed() < MENDED_EVERY);
        mended.insert(id, Instant::now()).is_none()
    }
}

/// Runs what waits for the disk off the runtime's threads.
pub(crate) async fn at_the_disk<T: Send + 'static>(
    index: &Index,
    work: impl FnOnce(&Index) -> Result<T, IndexError> + Send + 'static,
) -> Result<T, String> {
    let index = index.clone();
    let done = tokio::task::spawn_blocking(move || work(&index)).await;
    done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
}

/// States what the own locations are, whenever they have come to rest.
pub(crate) async fn state_own(shared: Arc<Shared>) {
    let mut feed = shared.index.feed().subscribe();
    let mut links = shared.statements.links.subscribe();
    loop {
        links.mark_unchanged();
        // With nobody to tell, no rows are added up.
        let is_alone = !shared
            .peers()
            .values()
            .any(|peer| peer.link().is_some_and(|link| link.version >= PASSES_ON));
        let is_stated = if is_alone { Ok(()) } else { state_all(&shared).await };
        if let Err(error) = &is_stated {
            tracing::debug!(%error, "own locations are not stated now");
        }
        let unstated = async {
            match is_stated {
                Ok(()) => std::future::pending().await,
                Err(_) => sleep(AFTER_FAILURE).await,
            }
        };
        let is_going_on = tokio::select! {
            is_going_on = until_own_change(&shared, &mut feed) => is_going_on,
            changed = links.changed() => changed.is_ok(),
            () = unstated => true,
        };
        if !is_going_on {
            return;
        }
        let rest = async {
            while let Ok(true) = timeout(REST, until_own_change(&shared, &mut feed)).await {}
        };
        let _ = timeout(RESTLESS, rest).await;
    }
}

/// `false`: the index is closed.
async fn until_own_change(shared: &Shared, feed: &mut Subscription) -> bool {
    while let Some(next) = feed.next().await {
        let Next::Batch(changes) = next else { return true };
        let is_own = |no| shared.index.location(no).is_some_and(|l| l.owner == shared.me);
        let concerns_own = changes.iter().any(|change| match change {
            Change::Entry { location, .. } | Change::Attributes { location, .. } => {
                is_own(*location)
            }
            Change::Locations => true,
            Change::Devices | Change::Reset => false,
        });
        if concerns_own {
            return true;
        }
    }
    false
}

/// An error: not all of them could be stated.
async fn state_all(shared: &Arc<Shared>) -> Result<(), String> {
    let own: Vec<_> =
        shared.index.locations().into_iter().filter(|l| l.owner == shared.me).collect();
    let ids: HashSet<_> = own.iter().map(|l| l.id).collect();
    let statements = &shared.statements;
    statements.own.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| ids.contains(id));
    let (mut outcome, mut is_news) = (Ok(()), false);
    for location in own {
        let last = statements.own(location.id);
        if last.is_some_and(|signed| still_says(&shared.index, &location, &signed.statement)) {
            continue;
        }
        let no = location.no;
        let stated = at_the_disk(&shared.index, move |index| index.state_of(no, now_ms())).await;
        match stated {
            Ok(Some(statement)) => {
                let signed = Arc::new(sign(shared, statement));
                let mut own = statements.own.lock().unwrap_or_else(PoisonError::into_inner);
                own.insert(location.id, signed);
                is_news = true;
            }
            Ok(None) => outcome = Err("rows are still being removed".to_owned()),
            Err(error) => outcome = Err(error),
        }
    }
    if is_news {
        statements.changed();
    }
    outcome
}

fn still_says(index: &Index, location: &Location, stated: &Statement) -> bool {
    let log = stated.log;
    (index.log_id(location.no), index.head(location.no)) == (log.log_id, log.head)
        && (&location.name, location.read_only) == (&stated.name, stated.read_only)
        && location.shared_with == stated.shared_with
}

fn sign(shared: &Shared, statement: Statement) -> Signed {
    let signature = shared.endpoint.secret_key().sign(&statement.to_bytes()).to_bytes();
    let mut halves = [[0; 32]; 2];
    halves.as_flattened_mut().copy_from_slice(&signature);
    Signed { statement, signature: halves }
}

fn is_signed_by(owner: DeviceId, signed: &Signed) -> bool {
    let Ok(key) = PublicKey::from_bytes(&owner.0) else { return false };
    let Ok(signature) = Signature::try_from(signed.signature.as_flattened()) else { return false };
    key.verify(&signed.statement.to_bytes(), &signature).is_ok()
}

/// Tells a peer of which locations there are rows here, and what their owners said of them.
pub(crate) async fn offer(shared: Arc<Shared>, peer: Arc<Peer>, link: Arc<Link>) {
    if link.version < PASSES_ON {
        return;
    }
    let mut changed = shared.statements.changed.subscribe();
    let mut sent = Vec::new();
    loop {
        changed.mark_unchanged();
        let offered = offered_to(&shared, peer.id).await;
        if offered != sent && !offered.is_empty() {
            match push(&link, &Request::Statements, &StatementList(offered.clone())).await {
                Ok(()) => sent = offered,
                Err(error) => {
                    tracing::debug!(peer = %peer.id, %error, "statements were not taken");
                    sleep(AFTER_FAILURE).await;
                    continue;
                }
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
        sleep(GATHER).await;
    }
}

async fn offered_to(shared: &Arc<Shared>, peer: DeviceId) -> Vec<Signed> {
    let shared_with_peer = |signed: &Signed| signed.statement.is_for(peer);
    let others = shared
        .index
        .locations()
        .into_iter()
        .filter(|l| l.owner != peer && l.owner != shared.me && shared.is_peer(l.owner));
    let others: Vec<_> = others.map(|l| l.no).collect();
    let attested = at_the_disk(&shared.index, move |index| {
        let view = index.view()?;
        others.into_iter().filter_map(|no| view.attested(no).transpose()).collect()
    });
    let attested: Vec<Signed> = attested.await.unwrap_or_default();
    let own = shared.statements.own.lock().unwrap_or_else(PoisonError::into_inner);
    let is_shared = |id| {
        shared
            .index
            .location_by_id(id)
            .is_some_and(|l| crate::replicate::is_shared(shared, peer, &l))
    };
    let own: Vec<_> =
        own.iter().filter(|(id, _)| is_shared(**id)).map(|(_, s)| (**s).clone()).collect();
    let mut room = MAX_FRAME - wire::FRAME_HEAD;
    let fits = |signed: &Signed| {
        let bytes = postcard::experimental::serialized_size(signed).unwrap_or(usize::MAX);
        room = room.saturating_sub(bytes);
        room > 0
    };
    let mut all: Vec<_> = own.into_iter().chain(attested).filter(shared_with_peer).collect();
    all.sort_by_key(|signed| signed.statement.location);
    all.into_iter().take(MAX_LOCATIONS).take_while(fits).collect()
}

/// Passes rows of a third device on. While their owner is away they hardly change; if they do,
/// the stream is broken off, and the statement of what they are now is offered.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    peer: &Peer,
    link: &Link,
    asked: PassOn,
    send: &mut SendStream,
) -> Result<(), WireError> {
    // One at a time: it is a lot of work for little of what was asked.
    let Ok(Ok(_turn)) = timeout(STALL, link.passing_on.acquire()).await else {
        return reply(send, &Response::Refused(Refusal::Failed)).await;
    };
    let location = shared.index.location_by_id(asked.follow.location);
    let location = location.filter(|l| l.owner != shared.me && shared.is_peer(l.owner));
    let Some(no) = location.map(|l| l.no) else {
        return reply(send, &Response::Refused(Refusal::NotShared)).await;
    };
    let begin = match begin(shared, peer.id, no, asked).await {
        Ok(begin) => begin,
        Err(refusal) => return reply(send, &Response::Refused(refusal)).await,
    };
    let Begin { log_id, mut after, .. } = begin;
    wire::send_frame(send, &Response::Rows { log_id, after }).await?;
    while after < asked.head {
        let Ok(_room) = link.outbound.acquire().await else { return Ok(()) };
        let Ok((rows, upto)) = lot(shared, peer.id, no, asked, (begin, after)).await else {
            let _ = send.reset(0u32.into());
            return Ok(());
        };
        if !rows.is_empty() {
            let sent = timeout(STALL, send_rows(send, rows, upto, asked.head)).await;
            sent.map_err(|_| WireError::Lost("the peer takes no rows".into()))??;
        }
        after = upto;
    }
    let _ = send.finish();
    Ok(())
}

/// Where the rows begin for the one who asked.
async fn begin(
    shared: &Shared,
    asker: DeviceId,
    no: LocationNo,
    asked: PassOn,
) -> Result<Begin, Refusal> {
    let Follow { log_id, after, .. } = asked.follow;
    passed_on(shared, asker, no, asked.head, move |view| view.resume_at(no, log_id, after)).await
}

/// The rows after a place, and up to where they are.
async fn lot(
    shared: &Shared,
    asker: DeviceId,
    no: LocationNo,
    asked: PassOn,
    (begin, after): (Begin, Seq),
) -> Result<(Vec<LogRow>, Seq), Refusal> {
    let read = move |view: &View<'_>| {
        let is_compacted = view.is_compacted(no, &begin, after)?;
        (!is_compacted).then(|| view.log_after(no, after, LOT_BYTES)).transpose()
    };
    passed_on(shared, asker, no, asked.head, read).await?.ok_or(Refusal::Stale)
}

/// Reads from a replica that is as its owner stated it, if the device may see that.
async fn passed_on<T: Send + 'static>(
    shared: &Shared,
    asker: DeviceId,
    no: LocationNo,
    head: Seq,
    read: impl FnOnce(&View<'_>) -> Result<T, IndexError> + Send + 'static,
) -> Result<T, Refusal> {
    let read = move |index: &Index| {
        let view = index.view()?;
        let stated = view.attested(no)?.map(|signed| signed.statement);
        let Some(stated) = stated.filter(|stated| stated.is_for(asker)) else {
            return Ok(Err(Refusal::NotShared));
        };
        if stated.log.head != head {
            return Ok(Err(Refusal::Stale));
        }
        read(&view).map(Ok)
    };
    let read = at_the_disk(&shared.index, read).await;
    read.inspect_err(|error| tracing::warn!(%error, "a replica cannot be passed on"))
        .unwrap_or(Err(Refusal::Failed))
}

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
    if index.log_id(location.no) != 0 {
        let restarted = index.restart_replica(location.no, index.log_id(location.no));
        // It may have another number although its old rows could not be cleared away.
        ask_for_all(&link);
        return restarted.map(|_| true);
    }
    ask_for_all(&link);
    Ok(true)
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
