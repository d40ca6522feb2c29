//! Replicas that are passed on, for when their owner is away.
//!
//! An owner signs what each of its locations is whenever that has come to rest, and tells its
//! peers. A peer whose replica is the same keeps the statement, and offers it, with its rows, to
//! every other device that may see the location. A device that cannot reach the owner takes them
//! from whoever has newer ones than it has itself; rows that do not add up to the statement are
//! refused ([`vfs_core::index::Index::apply_stated`]), so nobody who passes them on is trusted.

mod take;

pub(crate) use take::{fetch_anew, note_sharing, stated, take};

use crate::members::push;
use crate::node::Shared;
use crate::presence::{Link, Peer, now_ms, reply};
use crate::replicate::send_rows;
use crate::wire::{
    self, Follow, MAX_FRAME, MAX_LOCATIONS, PASSES_ON, PassOn, Refusal, Request, Response,
    StatementList, WireError,
};
use iroh::endpoint::SendStream;
use iroh::{PublicKey, Signature};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use vfs_core::changes::{Change, Next, Subscription};
use vfs_core::index::{Begin, Index, IndexError, LogRow, Signed, Statement, View};
use vfs_core::model::{DeviceId, Location, LocationId, LocationNo, Seq};

/// A location that has not changed for so long is at rest.
const REST: Duration = Duration::from_millis(100);
/// One that does not rest is stated all the same, so often.
const RESTLESS: Duration = Duration::from_secs(30);
/// How long what is offered is gathered.
const GATHER: Duration = Duration::from_millis(200);
/// How long to wait after a failure.
const AFTER_FAILURE: Duration = Duration::from_secs(2);
/// Replicas that are taken from others at once.
const TAKING: usize = 4;
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
