//! Who is there: one connection for each pair of members, kept alive.
//!
//! Both sides dial. When both dials succeed, the connection dialled by the device with
//! the smaller id stays ([`Peer::install`]), unless it is silent or of an earlier life
//! of the peer. A connection that stays silent longer than [`Link::patience`] is closed
//! and dialled anew, because QUIC alone notices a killed peer or a dead path only after
//! many seconds.

use crate::members::Newcomers;
use crate::node::{Path, PeerStatus, Replica, Shared};
use crate::wire::{
    self, ALPN_MEMBER, Hello, LocationList, NEWEST, OLDEST, Refusal, Request, Response,
    StatementList, WireError, close,
};
use crate::{accept, deliver, members, node, pass_on, replicate, serve};
use backon::{BackoffBuilder, ExponentialBuilder};
use iroh::endpoint::{Connection, ConnectionError, SendStream};
use iroh::{EndpointAddr, PublicKey, TransportAddr};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use vfs_core::model::{DeviceId, LocationId, Seq};

/// How often a peer is asked whether it is there.
const PING_EVERY: Duration = Duration::from_secs(1);
/// Silence that is always forgiven: two missed answers and some slack.
const MIN_PATIENCE: Duration = Duration::from_millis(2500);
/// Silence that is never forgiven.
const MAX_PATIENCE: Duration = Duration::from_secs(8);
/// One attempt to connect, `Hello` included.
const DIAL: Duration = Duration::from_secs(4);
/// A connection that lived no longer counts as one that failed: a peer that hangs up each time
/// is not dialled without pause.
const FLEETING: Duration = Duration::from_millis(300);
/// For so long after a connection broke off its peer may well be reached by a fresh dial.
pub(crate) const HOPE: Duration = Duration::from_millis(1500);
/// How long a peer that connected may take to say `Hello`.
const HELLO: Duration = Duration::from_secs(3);
/// Fetches of one peer served at once; each holds at most 1 MiB.
const MAX_FETCHES: usize = 16;
/// Questions of one peer for what is lent that are answered at once.
const MAX_QUESTIONS: usize = 2;
/// Requests for staged bytes served at once, and made; each is for at most 1 MiB.
const MAX_STAGED: usize = 8;
/// Streams that bring operations, at once.
const MAX_DELIVERIES: usize = 8;
/// Lists and batches of rows of one peer in memory at once, in each direction; each is at
/// most 1 MiB on the wire.
const MAX_BATCHES: usize = 4;

/// Another member.
pub(crate) struct Peer {
    pub(crate) id: DeviceId,
    /// The connection there is now.
    links: watch::Sender<Option<Arc<Link>>>,
    /// A reason to dial at once: a new address.
    pub(crate) wake: Notify,
    /// Content received.
    pub(crate) bytes_in: AtomicU64,
    /// Content sent.
    pub(crate) bytes_out: AtomicU64,
    /// Ranges that are read for it, whatever connection asked for them.
    pub(crate) fetches: Arc<Semaphore>,
    /// Questions of it for what is lent, which wait for the index.
    pub(crate) questions: Arc<Semaphore>,
    /// Held while its replicas are changed, so that an old connection's last batch and a new
    /// connection's first cannot mix.
    pub(crate) applying: Mutex<()>,
    /// Held by the session that delivers operations to it.
    pub(crate) delivering: Arc<AsyncMutex<()>>,
    /// The session that delivers operations of it.
    pub(crate) turns: accept::Turns,
    /// Held while a list of members of it is taken: one at a time, and not too many.
    pub(crate) newcomers: tokio::sync::Mutex<Newcomers>,
    knowledge: Mutex<Knowledge>,
}

/// What is known of it beside the connection.
#[derive(Default)]
pub(crate) struct Knowledge {
    /// Until when a dial under way may well succeed.
    hope: Option<Instant>,
    pub(crate) last_error: Option<String>,
    /// Why operations do not reach it; gone as soon as it answers one.
    pub(crate) delivery_error: Option<String>,
    last_seen_ms: Option<u64>,
    pub(crate) heads: HashMap<LocationId, Seq>,
}

/// One connection of a pair of members, after both said `Hello`.
pub(crate) struct Link {
    /// Of this node's connections; no two have the same.
    pub(crate) no: u64,
    pub(crate) connection: Connection,
    /// The version both speak.
    pub(crate) version: u16,
    /// Which device dialled.
    dialler: DeviceId,
    /// The peer's life.
    session: u64,
    born: Instant,
    /// Milliseconds after `born` at which anything arrived last.
    heard_ms: AtomicU64,
    /// What the peer announced last.
    pub(crate) announced: watch::Sender<Option<Arc<LocationList>>>,
    /// What owners said of what the peer has rows of.
    pub(crate) offered: watch::Sender<Option<Arc<StatementList>>>,
    /// Held while rows of a third device are on their way to it.
    pub(crate) passing_on: Semaphore,
    /// Staged bytes on their way to the peer.
    pub(crate) staged: Semaphore,
    /// Staged bytes on their way from it.
    pub(crate) pulls: Arc<Semaphore>,
    /// Streams that bring its operations.
    pub(crate) deliveries: Semaphore,
    /// The one operation of it that may be longer than a frame.
    pub(crate) long_op: Arc<Semaphore>,
    /// Its requests for locks are answered one after the other.
    pub(crate) locking: AsyncMutex<()>,
    /// Room for what the peer sends, beside answers to fetches, and operations.
    pub(crate) inbound: Semaphore,
    /// Room for rows on their way to it.
    pub(crate) outbound: Semaphore,
}

impl Link {
    fn new(connection: Connection, dialler: DeviceId, hello: &Hello, version: u16) -> Arc<Self> {
        static LINKS: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            no: LINKS.fetch_add(1, Ordering::Relaxed),
            connection,
            version,
            dialler,
            session: hello.session,
            born: Instant::now(),
            heard_ms: AtomicU64::new(0),
            announced: watch::Sender::new(None),
            offered: watch::Sender::new(None),
            passing_on: Semaphore::new(1),
            staged: Semaphore::new(MAX_STAGED),
            pulls: Arc::new(Semaphore::new(MAX_STAGED)),
            deliveries: Semaphore::new(MAX_DELIVERIES),
            long_op: Arc::new(Semaphore::new(1)),
            locking: AsyncMutex::default(),
            inbound: Semaphore::new(MAX_BATCHES),
            outbound: Semaphore::new(MAX_BATCHES),
        })
    }

    /// Something arrived just now.
    pub(crate) fn heard(&self) {
        let now_ms = self.born.elapsed().as_millis() as u64;
        self.heard_ms.fetch_max(now_ms, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.born.elapsed().saturating_sub(heard)
    }

    /// How long it may stay silent: longer on a slow path.
    pub(crate) fn patience(&self) -> Duration {
        (MIN_PATIENCE + 4 * self.rtt()).min(MAX_PATIENCE)
    }

    /// Of the path in use.
    pub(crate) fn rtt(&self) -> Duration {
        let paths = self.connection.paths();
        paths.iter().find(|p| p.is_selected()).map_or(Duration::ZERO, |p| p.rtt())
    }

    fn is_alive(&self) -> bool {
        self.connection.close_reason().is_none() && self.silence() < self.patience()
    }

    /// A request on a stream of its own, with its answer.
    pub(crate) async fn ask(&self, request: &Request) -> Result<Response, WireError> {
        let (mut send, mut recv) = self.connection.open_bi().await?;
        wire::send_request(&mut send, self.version, request).await?;
        let _ = send.finish();
        self.answer(&mut recv).await
    }

    /// The answer that begins the other direction of a stream.
    pub(crate) async fn answer(
        &self,
        recv: &mut iroh::endpoint::RecvStream,
    ) -> Result<Response, WireError> {
        let answer = wire::receive_frame(recv).await?;
        self.heard();
        Ok(answer)
    }

    fn path(&self) -> Option<Path> {
        let paths = self.connection.paths();
        let path = paths.iter().find(|p| p.is_selected())?;
        let address = match path.remote_addr() {
            TransportAddr::Ip(address) => address.to_string(),
            TransportAddr::Relay(url) => url.to_string(),
            other => format!("{other:?}"),
        };
        Some(Path { direct: path.is_ip(), address, rtt: path.rtt() })
    }
}

impl Peer {
    pub(crate) fn new(id: DeviceId) -> Arc<Self> {
        Arc::new(Self {
            id,
            links: watch::Sender::new(None),
            wake: Notify::new(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            fetches: Arc::new(Semaphore::new(MAX_FETCHES)),
            questions: Arc::new(Semaphore::new(MAX_QUESTIONS)),
            applying: Mutex::new(()),
            delivering: Arc::default(),
            turns: accept::Turns::default(),
            newcomers: tokio::sync::Mutex::default(),
            knowledge: Mutex::new(Knowledge {
                hope: Some(Instant::now() + HOPE),
                ..Knowledge::default()
            }),
        })
    }

    pub(crate) fn knowledge(&self) -> MutexGuard<'_, Knowledge> {
        self.knowledge.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection there is, dead or alive.
    pub(crate) fn link(&self) -> Option<Arc<Link>> {
        self.links.borrow().clone()
    }

    pub(crate) fn is_online(&self) -> bool {
        self.link().is_some_and(|l| l.is_alive())
    }

    /// The connection there is, if it is alive and speaks this version or a later one.
    pub(crate) fn link_since(&self, version: u16) -> Option<Arc<Link>> {
        self.link().filter(|link| link.is_alive() && link.version >= version)
    }

    /// How much longer a dial may well succeed.
    fn hope(&self) -> Option<Duration> {
        self.knowledge().hope?.checked_duration_since(Instant::now())
    }

    pub(crate) fn is_reachable(&self) -> bool {
        self.is_online() || self.hope().is_some()
    }

    /// A connection other than `not`, at once or as soon as the dial under way succeeds.
    pub(crate) async fn reach(&self, not: Option<&Arc<Link>>) -> Option<Arc<Link>> {
        let usable = |link: &Option<Arc<Link>>| {
            link.as_ref().is_some_and(|l| {
                l.connection.close_reason().is_none() && not.is_none_or(|n| !Arc::ptr_eq(n, l))
            })
        };
        let mut links = self.links.subscribe();
        let limit = match &*links.borrow_and_update() {
            link if usable(link) => return link.clone(),
            // It broke off just now, and its task has not seen it yet.
            Some(_) => HOPE,
            None => self.hope()?,
        };
        let found = timeout(limit, links.wait_for(usable)).await.ok()?.ok()?;
        found.clone()
    }

    /// Takes a new connection, unless the one there is should stay.
    fn install(&self, me: DeviceId, link: &Arc<Link>) -> bool {
        let preferred = me.min(self.id);
        let mut replaced = None;
        let taken = self.links.send_if_modified(|current| {
            let stays = current.as_ref().is_some_and(|old| {
                old.is_alive()
                    && old.session == link.session
                    && old.dialler == preferred
                    && link.dialler != preferred
                    && old.silence() < PING_EVERY + Duration::from_millis(500)
            });
            if !stays {
                replaced = current.replace(link.clone());
            }
            !stays
        });
        if let Some(old) = replaced {
            old.connection.close(close::DUPLICATE.into(), b"");
        }
        taken
    }

    /// The connection is over.
    fn uninstall(&self, link: &Arc<Link>, may_come_back: bool) {
        let mut knowledge = self.knowledge();
        knowledge.last_seen_ms = Some(now_ms());
        self.links.send_if_modified(|current| {
            let is_current = current.as_ref().is_some_and(|c| Arc::ptr_eq(c, link));
            if is_current {
                knowledge.hope = may_come_back.then(|| Instant::now() + HOPE + 4 * link.rtt());
                *current = None;
            }
            is_current
        });
    }

    fn failed(&self, reason: impl ToString) {
        self.knowledge().last_error = Some(reason.to_string());
    }
}

/// The code with which the other side closed the connection.
pub(crate) fn close_code(error: &ConnectionError) -> Option<u32> {
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            u32::try_from(closed.error_code.into_inner()).ok()
        }
        _ => None,
    }
}

/// What becomes of an attempt to connect.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("no address is known")]
    NoAddress,
    #[error("no answer within {DIAL:?}")]
    NoAnswer,
    #[error("its id is not a key")]
    NoKey,
    #[error("{0}")]
    Connect(String),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(
        "it speaks protocol {oldest} to {newest}, this device {OLDEST} to {NEWEST}: update the older one"
    )]
    Version { oldest: u16, newest: u16 },
    #[error("it is in another library")]
    OtherLibrary,
    #[error("it does not take this device for a member")]
    NotMember,
    #[error("another connection stays")]
    Duplicate,
    #[error("it broke the protocol")]
    Breach,
}

/// Keeps a connection to a peer for as long as it is a member.
pub(crate) async fn keep(shared: Arc<Shared>, peer: Arc<Peer>) {
    let mut links = peer.links.subscribe();
    loop {
        if links.wait_for(Option::is_none).await.is_err() {
            return;
        }
        let backoff = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(5))
            .with_jitter()
            .without_max_times()
            .build();
        for delay in backoff {
            match dial(&shared, &peer).await {
                Ok((link, hello)) => {
                    let begun = Instant::now();
                    live(&shared, &peer, &link, hello).await;
                    keep_rows(&shared, &peer);
                    if begun.elapsed() > FLEETING {
                        break;
                    }
                }
                Err(DialError::Duplicate) => {}
                Err(error) => peer.failed(error),
            }
            tokio::select! {
                () = sleep(delay) => {}
                () = peer.wake.notified() => {}
                _ = links.wait_for(Option::is_some) => break,
            }
        }
    }
}

async fn dial(shared: &Arc<Shared>, peer: &Arc<Peer>) -> Result<(Arc<Link>, Hello), DialError> {
    let connection =
        timeout(DIAL, connect(shared, peer)).await.map_err(|_| DialError::NoAnswer)??;
    let greeted = timeout(DIAL, greet(shared, peer, &connection)).await;
    match greeted.unwrap_or(Err(DialError::NoAnswer)) {
        Ok(done) => Ok(done),
        Err(error) => Err(judge(shared, &connection, error).await),
    }
}

async fn connect(shared: &Shared, peer: &Peer) -> Result<Connection, DialError> {
    let key = PublicKey::from_bytes(&peer.id.0).map_err(|_| DialError::NoKey)?;
    let known = shared.library.with(|s| s.member(peer.id).map(|m| m.addresses.clone()));
    let direct = known.unwrap_or_default().into_iter().map(TransportAddr::Ip);
    let relay = shared.relay.clone().map(TransportAddr::Relay);
    let address = EndpointAddr::new(key).with_addrs(direct.chain(relay));
    let connected = shared.endpoint.connect(address.clone(), ALPN_MEMBER).await;
    connected.map_err(|e| match address.is_empty() {
        true => DialError::NoAddress,
        false => DialError::Connect(e.to_string()),
    })
}

/// Says `Hello` on a connection this side dialled.
async fn greet(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    connection: &Connection,
) -> Result<(Arc<Link>, Hello), DialError> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(WireError::from)?;
    wire::send_request(&mut send, OLDEST, &Request::Hello(hello(shared))).await?;
    let _ = send.finish();
    match wire::receive_frame(&mut recv).await? {
        Response::Hello(hello) => {
            let (oldest, newest) = (hello.oldest, hello.newest);
            let version = wire::common_version(oldest, newest)
                .ok_or(DialError::Version { oldest, newest })?;
            let link = Link::new(connection.clone(), shared.me, &hello, version);
            if !peer.install(shared.me, &link) {
                connection.close(close::DUPLICATE.into(), b"");
                return Err(DialError::Duplicate);
            }
            Ok((link, hello))
        }
        Response::Refused(Refusal::Version { oldest, newest }) => {
            Err(DialError::Version { oldest, newest })
        }
        Response::Refused(Refusal::OtherLibrary) => Err(DialError::OtherLibrary),
        Response::Refused(Refusal::Duplicate) => Err(DialError::Duplicate),
        _ => Err(DialError::Breach),
    }
}

/// What the way a connection was closed says about a failed `Hello`.
async fn judge(shared: &Arc<Shared>, connection: &Connection, error: DialError) -> DialError {
    let closed = connection.close_reason();
    connection.close(close::BYE.into(), b"");
    let Some(closed) = closed else { return error };
    members::told(shared, &closed).await;
    match close_code(&closed) {
        Some(close::NOT_MEMBER | close::REMOVED) => DialError::NotMember,
        Some(close::DUPLICATE) => DialError::Duplicate,
        Some(close::OTHER_LIBRARY) => DialError::OtherLibrary,
        _ => error,
    }
}

fn hello(shared: &Shared) -> Hello {
    let library = shared.library.with(|s| s.library.as_ref().map(|l| l.id.clone()));
    Hello {
        oldest: OLDEST,
        newest: NEWEST,
        library: library.unwrap_or_default(),
        session: shared.session,
        addresses: shared.addresses(),
    }
}

/// A device connected and claims to be a member.
pub(crate) async fn accepted(shared: Arc<Shared>, connection: Connection) {
    let id = DeviceId(*connection.remote_id().as_bytes());
    let Some(peer) = shared.member_peer(id) else {
        return members::turn_away(&shared, id, &connection);
    };
    match timeout(HELLO, welcome(&shared, &peer, &connection)).await {
        Ok(Ok((link, hello))) => {
            live(&shared, &peer, &link, hello).await;
            keep_rows(&shared, &peer);
        }
        Ok(Err(refusal)) => {
            // The peer reads the refusal and closes; closing first could overtake it.
            let _ = timeout(HELLO, connection.closed()).await;
            connection.close(close::PROTOCOL.into(), b"");
            tracing::debug!(peer = %id, ?refusal, "turned away");
        }
        Err(_) => connection.close(close::SILENT.into(), b""),
    }
}

/// Answers the `Hello` of the side that dialled.
async fn welcome(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    connection: &Connection,
) -> Result<(Arc<Link>, Hello), Refusal> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(|_| Refusal::Failed)?;
    let judged = match wire::receive_request(&mut recv).await {
        Ok(Request::Hello(theirs)) => admit(shared, peer, connection, theirs),
        Err(WireError::Version(_)) => Err(Refusal::Version { oldest: OLDEST, newest: NEWEST }),
        Ok(_) | Err(_) => Err(Refusal::Malformed),
    };
    let answer = match &judged {
        Ok(_) => Response::Hello(hello(shared)),
        Err(refusal) => Response::Refused(refusal.clone()),
    };
    reply(&mut send, &answer).await.map_err(|_| Refusal::Failed).or_else(|e| match &judged {
        // The connection is installed already: its end is noticed there.
        Ok(_) => Ok(()),
        Err(_) => Err(e),
    })?;
    judged
}

fn admit(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    connection: &Connection,
    theirs: Hello,
) -> Result<(Arc<Link>, Hello), Refusal> {
    let ours = hello(shared);
    let Some(version) = wire::common_version(theirs.oldest, theirs.newest) else {
        peer.failed(DialError::Version { oldest: theirs.oldest, newest: theirs.newest });
        return Err(Refusal::Version { oldest: OLDEST, newest: NEWEST });
    };
    if theirs.library != ours.library {
        peer.failed(DialError::OtherLibrary);
        return Err(Refusal::OtherLibrary);
    }
    let link = Link::new(connection.clone(), peer.id, &theirs, version);
    match peer.install(shared.me, &link) {
        true => Ok((link, theirs)),
        false => Err(Refusal::Duplicate),
    }
}

/// Sends the last frame of a stream.
pub(crate) async fn reply(send: &mut SendStream, answer: &Response) -> Result<(), WireError> {
    wire::send_frame(send, answer).await?;
    let _ = send.finish();
    Ok(())
}

/// Everything that goes on while a connection lives.
async fn live(shared: &Arc<Shared>, peer: &Arc<Peer>, link: &Arc<Link>, hello: Hello) {
    /// The connection is given up even when this task is aborted.
    struct Installed<'a>(&'a Shared, &'a Peer, &'a Arc<Link>);
    impl Drop for Installed<'_> {
        fn drop(&mut self) {
            let Self(shared, peer, link) = self;
            let closed = link.connection.close_reason();
            let bye = closed.as_ref().and_then(close_code) == Some(close::BYE);
            link.connection.close(close::BYE.into(), b"");
            peer.uninstall(link, !bye);
            shared.statements.links_changed();
        }
    }
    let _installed = Installed(shared, peer, link);
    shared.statements.links_changed();
    // Removed between the check at the door and the installation.
    if !shared.is_peer(peer.id) {
        return members::turn_away(shared, peer.id, &link.connection);
    }
    node::trust(&link.connection);
    peer.knowledge().last_error = None;
    let mut tasks = JoinSet::new();
    tasks.spawn(members::remember(shared.clone(), peer.clone(), link.clone(), hello));
    tasks.spawn(serve::streams(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(members::announce(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(replicate::announce(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(replicate::follow(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(pass_on::offer(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(pass_on::note_sharing(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(pass_on::take(shared.clone(), peer.clone(), link.clone()));
    tasks.spawn(deliver::keep(shared.clone(), peer.clone(), link.clone()));
    let closed = tokio::select! {
        closed = link.connection.closed() => closed,
        () = until_silent(link) => {
            peer.failed("it stopped answering");
            link.connection.close(close::SILENT.into(), b"");
            return;
        }
    };
    members::told(shared, &closed).await;
    members::last_seen(shared, peer).await;
}

/// Makes durable what is known of a device that has just gone: it cannot be asked again. Nobody
/// waits for that: the next dial may find it.
fn keep_rows(shared: &Shared, peer: &Arc<Peer>) {
    let (index, peer) = (shared.index.clone(), peer.clone());
    tokio::task::spawn_blocking(move || {
        // After the last batch that came.
        let _applying = peer.applying.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = index.flush() {
            tracing::warn!(%error, "the last rows of a device that went are not on the disk");
        }
    });
}

/// Asks whether the peer is there, until it is not.
async fn until_silent(link: &Arc<Link>) {
    let mut pings = JoinSet::new();
    while link.silence() < link.patience() {
        // A late answer still counts, so the pings are not waited for one by one.
        while pings.try_join_next().is_some() {}
        let asked = link.clone();
        pings.spawn(async move { timeout(MAX_PATIENCE, asked.ask(&Request::Ping)).await });
        sleep(PING_EVERY.min(link.patience().saturating_sub(link.silence()))).await;
    }
}

/// What is known of the other members.
pub(crate) fn status(shared: &Shared) -> Vec<PeerStatus> {
    let members = shared.library.state();
    let locations = shared.index.locations();
    let others = members.active().filter(|m| m.id != shared.me);
    others
        .map(|member| {
            let peer = shared.peer(member.id);
            let online = shared.is_peer(member.id) && peer.as_ref().is_some_and(|p| p.is_online());
            let link = peer.as_ref().and_then(|p| p.link());
            let knowledge = peer.as_ref().map(|p| p.knowledge());
            let heads = knowledge.as_ref().map(|k| &k.heads);
            let of_peer = locations.iter().filter(|l| l.owner == member.id);
            let replicas = of_peer.map(|l| Replica {
                location: l.id,
                applied: shared.index.head(l.no),
                head: heads.and_then(|h| h.get(&l.id).copied()),
            });
            let seen = knowledge.as_ref().and_then(|k| k.last_seen_ms);
            let count = |f: fn(&Peer) -> &AtomicU64| {
                peer.as_ref().map_or(0, |p| f(p).load(Ordering::Relaxed))
            };
            PeerStatus {
                id: member.id,
                online,
                path: link.filter(|_| online).and_then(|l| l.path()),
                last_seen_ms: if online { Some(now_ms()) } else { seen.max(member.last_seen_ms) },
                bytes_in: count(|p| &p.bytes_in),
                bytes_out: count(|p| &p.bytes_out),
                replicas: replicas.collect(),
                last_error: knowledge
                    .as_ref()
                    .and_then(|k| k.delivery_error.clone().or_else(|| k.last_error.clone())),
            }
        })
        .collect()
}

pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
