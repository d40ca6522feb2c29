//! The public face of this crate: one node a device.
//!
//! [`Node`] owns one task, and that task owns every other one: dropping the node, or
//! [`Node::shutdown`], ends them all. What the tasks share is [`Shared`]. Everything a
//! caller changes in the library or the index reaches the peers by way of two counters
//! (`members`, `locations`) that the tasks of each connection watch, so that no change
//! waits for a peer and a slow peer costs no memory.
//!
//! Lock order: `Shared::peers`, then a peer's own locks, then the library's; none is
//! held over an await.

use crate::accept::Applies;
use crate::deliver::Outgoing;
use crate::error::SyncError;
use crate::pass_on::{self, Statements};
use crate::presence::{self, Peer};
use crate::wire::{ALPN_MEMBER, ALPN_PAIR, MAX_ADDRESSES};
use crate::{compact, fetch, locks, members, pair, replicate};
use iroh::endpoint::{BindOpts, Incoming, QuicTransportConfig, presets};
use iroh::{Endpoint, RelayMap, RelayMode, RelayUrl, SecretKey};
use iroh_mdns_address_lookup::MdnsAddressLookup;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::{Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use vfs_core::content::{Lender, OwnFiles};
use vfs_core::index::{Index, IndexError, Signed, Unlike};
use vfs_core::library::{Library, LibraryInfo, State};
use vfs_core::locks::Coordinator;
use vfs_core::locks::peers::PeerLocks;
use vfs_core::model::{DeviceId, LocationId, Seq};
use vfs_core::source::ContentSource;

/// After this long without a packet a connection is dead.
const IDLE: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Streams a peer may have open at once: one for each location it follows, and its fetches.
const MAX_STREAMS: u32 = 1024;
/// Bytes of a peer that may wait here to be read, over all its streams.
const MAX_WAITING: u32 = 64 << 20;
/// The same for whoever has not proved to be a member. A limit that was granted cannot be
/// taken back, so every connection begins with these.
const MAX_STREAMS_OF_STRANGER: u32 = 4;
const MAX_WAITING_OF_STRANGER: u32 = 256 << 10;
/// Handshakes under way at once; more are refused.
const MAX_HANDSHAKES: usize = 64;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a shutdown waits for peers to be told.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long an invitation waits for the endpoint to learn its own addresses.
const OWN_ADDRESSES: Duration = Duration::from_secs(2);

/// What a node is started with.
#[derive(Clone)]
pub struct NodeConfig {
    /// The device's Ed25519 key; its public half is the [`DeviceId`].
    pub secret_key: [u8; 32],
    /// Where to listen; port 0 is any free one.
    pub bind: Vec<SocketAddr>,
    /// URL of an own relay; without one only direct addresses are used.
    pub relay: Option<String>,
    /// Announce and find devices on the local network by mDNS.
    pub mdns: bool,
}

/// What a node stands on.
#[derive(Clone)]
pub struct Parts {
    /// Members and own locations.
    pub library: Arc<Library>,
    /// Rows of every location.
    pub index: Index,
    /// This device's own files.
    pub own: Arc<OwnFiles>,
    /// What its cache lends; without it nothing.
    pub lender: Option<Arc<Lender>>,
    /// This device's writes to others' files; without it none are delivered.
    pub outbox: Option<Arc<dyn Outgoing>>,
    /// Carries out others' writes to this device's files; without it they are refused.
    pub applier: Option<Arc<dyn Applies>>,
    /// A folder for what is only there for a while.
    pub scratch: PathBuf,
}

/// One single-use ticket, as made by [`Node::invite`].
#[derive(Clone, Debug)]
pub struct Invitation {
    /// This node's number for it.
    pub id: u64,
    /// What the other person types.
    pub ticket: String,
    /// From when on it is refused.
    pub expires: SystemTime,
}

/// A device that answered an invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Its id.
    pub device: DeviceId,
    /// The name it asks for.
    pub name: String,
    /// The confirmation code; the other side shows the same.
    pub code: String,
}

/// The inviting device was contacted and waits for the confirmation.
pub struct PendingJoin {
    /// The confirmation code; the other side shows the same.
    pub code: String,
    /// The library to be joined.
    pub library: LibraryInfo,
    /// The name of the inviting device.
    pub inviter: String,
    waiting: pair::Waiting,
}

/// How a peer is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Not by way of a relay.
    pub direct: bool,
    /// Socket address, or the relay's URL.
    pub address: String,
    /// Round-trip time.
    pub rtt: Duration,
}

/// A replica of one of a peer's locations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The location.
    pub location: LocationId,
    /// The owner's number of the last change applied here.
    pub applied: Seq,
    /// The owner's number of its last change, as far as it was told.
    pub head: Option<Seq>,
}

/// What is known of one other member.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// Its id.
    pub id: DeviceId,
    /// It is connected and answers.
    pub online: bool,
    /// How it is reached, when connected.
    pub path: Option<Path>,
    /// Milliseconds since 1970 when it was last connected.
    pub last_seen_ms: Option<u64>,
    /// Bytes of content received from it since this node started.
    pub bytes_in: u64,
    /// Bytes of content sent to it since this node started.
    pub bytes_out: u64,
    /// Its locations that are replicated here.
    pub replicas: Vec<Replica>,
    /// What went wrong last.
    pub last_error: Option<String>,
}

/// What all tasks share.
pub(crate) struct Shared {
    pub(crate) me: DeviceId,
    /// Drawn at the start: peers tell a restarted node by it.
    pub(crate) session: u64,
    pub(crate) endpoint: Endpoint,
    pub(crate) relay: Option<RelayUrl>,
    pub(crate) library: Arc<Library>,
    pub(crate) index: Index,
    pub(crate) own: Arc<OwnFiles>,
    pub(crate) lender: Option<Arc<Lender>>,
    /// What other devices hold of this device's files.
    pub(crate) locks: Arc<PeerLocks>,
    pub(crate) outbox: Option<Arc<dyn Outgoing>>,
    pub(crate) applier: Option<Arc<dyn Applies>>,
    pub(crate) invitations: pair::Invitations,
    pub(crate) statements: Statements,
    /// Counts changes of the members.
    pub(crate) members: watch::Sender<u64>,
    /// Counts changes of the own locations.
    pub(crate) locations: watch::Sender<u64>,
    peers: Mutex<HashMap<DeviceId, Arc<Peer>>>,
}

impl Shared {
    /// The other members, by id.
    pub(crate) fn peers(&self) -> MutexGuard<'_, HashMap<DeviceId, Arc<Peer>>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peer(&self, id: DeviceId) -> Option<Arc<Peer>> {
        self.peers().get(&id).cloned()
    }

    /// The same, made when it is a member whose task has not begun yet.
    pub(crate) fn member_peer(&self, id: DeviceId) -> Option<Arc<Peer>> {
        self.is_peer(id).then(|| self.peers().entry(id).or_insert_with(|| Peer::new(id)).clone())
    }

    /// Whether this device may talk with that one as a member: both are.
    pub(crate) fn is_peer(&self, id: DeviceId) -> bool {
        id != self.me
            && self.library.with(|s| s.member(id).is_some() && s.member(self.me).is_some())
    }

    pub(crate) fn members_changed(&self) {
        members::enforce(self);
        self.members.send_modify(|n| *n += 1);
    }

    pub(crate) fn locations_changed(&self) {
        self.locations.send_modify(|n| *n += 1);
    }

    /// Where this endpoint can be reached directly, as far as is known.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self.endpoint.addr().ip_addrs().copied().collect();
        for bound in self.endpoint.bound_sockets() {
            if !bound.ip().is_unspecified() && !all.contains(&bound) {
                all.push(bound);
            }
        }
        all.truncate(MAX_ADDRESSES);
        all
    }

    /// [`Library::update`], which waits for the disk, off the runtime's threads.
    pub(crate) async fn update_library<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut State) -> T + Send + 'static,
    ) -> Result<T, SyncError> {
        let library = self.library.clone();
        let done = tokio::task::spawn_blocking(move || library.update(change)).await;
        Ok(done.map_err(|_| SyncError::Closed)??)
    }
}

/// This device on the network.
pub struct Node {
    shared: Arc<Shared>,
    root: AbortHandle,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.root.abort();
    }
}

impl Node {
    /// Opens the endpoint and starts all tasks on the caller's runtime; waits for no network.
    pub async fn start(config: NodeConfig, parts: Parts) -> Result<Arc<Self>, SyncError> {
        let relay = config.relay.as_deref().map(parse_relay).transpose()?;
        let endpoint = bind(&config, relay.clone()).await?;
        let Parts { library, index, own, lender, outbox, applier, scratch } = parts;
        let shared = Arc::new(Shared {
            me: DeviceId(*endpoint.id().as_bytes()),
            session: rand::random(),
            endpoint,
            relay,
            library,
            index,
            locks: Arc::new(PeerLocks::new(own.clone())),
            own,
            lender,
            outbox,
            applier,
            invitations: pair::Invitations::default(),
            statements: Statements::new(scratch),
            members: watch::Sender::new(0),
            locations: watch::Sender::new(0),
            peers: Mutex::default(),
        });
        let root = tokio::spawn(run(shared.clone())).abort_handle();
        Ok(Arc::new(Self { shared, root }))
    }

    /// This device.
    pub fn id(&self) -> DeviceId {
        self.shared.me
    }

    /// Where peers may reach this device directly.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.shared.addresses()
    }

    /// Bytes of other devices' files.
    pub fn source(self: &Arc<Self>) -> Arc<dyn ContentSource> {
        Arc::new(fetch::Source(self.shared.clone()))
    }

    /// The owners of other devices' files, to be asked for locks.
    pub fn coordinator(self: &Arc<Self>) -> Arc<dyn Coordinator> {
        Arc::new(locks::Owners(self.shared.clone()))
    }

    /// Makes a single-use ticket.
    pub async fn invite(&self, valid_for: Duration) -> Result<Invitation, SyncError> {
        // Right after the start the endpoint may not have listed the interfaces yet.
        let deadline = tokio::time::Instant::now() + OWN_ADDRESSES;
        while self.addresses().is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        pair::invite(&self.shared, valid_for)
    }

    /// Waits until a device shows the ticket, and gives the code to compare; it is not yet
    /// a member.
    pub async fn asked(&self, invitation: u64) -> Result<Joined, SyncError> {
        pair::asked(&self.shared, invitation).await
    }

    /// Waits until a device joined with the ticket.
    pub async fn joined(&self, invitation: u64) -> Result<Joined, SyncError> {
        pair::joined(&self.shared, invitation).await
    }

    /// Ends an invitation that nobody has used yet: its ticket is good for nothing any more.
    pub fn withdraw(&self, invitation: u64) {
        self.shared.invitations.withdraw(invitation);
    }

    /// Contacts the inviting device; nothing is changed before [`Node::confirm`].
    pub async fn join(&self, ticket: &str, name: &str) -> Result<PendingJoin, SyncError> {
        let waiting = pair::join(&self.shared, ticket, name).await?;
        let (code, library) = (waiting.code.clone(), waiting.library.clone());
        Ok(PendingJoin { code, library, inviter: waiting.inviter.clone(), waiting })
    }

    /// Joins: from now on both devices are members.
    pub async fn confirm(&self, pending: PendingJoin) -> Result<(), SyncError> {
        pair::confirm(&self.shared, pending.waiting).await
    }

    /// Removes a device from the library, everywhere.
    pub async fn remove_device(&self, device: DeviceId) -> Result<(), SyncError> {
        members::remove(&self.shared, device).await
    }

    /// Own locations were added, removed, renamed or shared otherwise: tells the peers.
    pub fn locations_changed(&self) {
        self.shared.locations_changed();
    }

    /// Members were changed in the library: tells the peers, and drops those removed.
    pub fn members_changed(&self) {
        self.shared.members_changed();
    }

    /// The other members.
    pub fn peers(&self) -> Vec<PeerStatus> {
        presence::status(&self.shared)
    }

    /// What the owner of a replica said of it last, with its signature, which is right; `None`
    /// while it cannot be reached, or has said nothing.
    pub fn stated(&self, location: LocationId) -> Option<Signed> {
        pass_on::stated(&self.shared, location)
    }

    /// Which rows of a replica are not those that its owner sends now.
    ///
    /// # Errors
    /// Why that cannot be said.
    pub async fn compare(&self, location: LocationId) -> Result<Unlike, String> {
        replicate::compare(&self.shared, location).await
    }

    /// Has every row of a replica fetched from its owner again; `false`: that cannot be reached,
    /// and what there is stays. Waits for the disk.
    pub fn fetch_anew(&self, location: LocationId) -> Result<bool, IndexError> {
        pass_on::fetch_anew(&self.shared, location)
    }

    /// Closes every connection in good order.
    pub async fn shutdown(&self) {
        self.root.abort();
        let _ = timeout(FAREWELL, self.shared.endpoint.close()).await;
    }
}

fn parse_relay(url: &str) -> Result<RelayUrl, SyncError> {
    url.parse::<RelayUrl>()
        .map_err(|e| SyncError::Relay { url: url.to_owned(), reason: e.to_string() })
}

async fn bind(config: &NodeConfig, relay: Option<RelayUrl>) -> Result<Endpoint, SyncError> {
    let failed = |reason: String| SyncError::Bind { addresses: config.bind.clone(), reason };
    let mut builder = Endpoint::builder(presets::Minimal)
        .secret_key(SecretKey::from_bytes(&config.secret_key))
        .alpns(vec![ALPN_MEMBER.to_vec(), ALPN_PAIR.to_vec()])
        .transport_config(transport())
        .clear_ip_transports();
    for address in &config.bind {
        // A kernel without IPv6 is no reason not to start when IPv4 is asked for too.
        let is_extra = address.is_ipv6() && config.bind.iter().any(SocketAddr::is_ipv4);
        let options = BindOpts::default().set_is_required(!is_extra);
        builder =
            builder.bind_addr_with_opts(*address, options).map_err(|e| failed(e.to_string()))?;
    }
    if let Some(url) = relay {
        builder = builder.relay_mode(RelayMode::Custom(RelayMap::from(url)));
    }
    let endpoint = builder.bind().await.map_err(|e| failed(e.to_string()))?;
    if config.mdns {
        find_by_mdns(&endpoint);
    }
    Ok(endpoint)
}

/// Finding devices on the local network is a convenience: where it cannot be had, all goes
/// on without it.
fn find_by_mdns(endpoint: &Endpoint) {
    let added = MdnsAddressLookup::builder()
        .build(endpoint.id())
        .map_err(|e| e.to_string())
        .and_then(|mdns| endpoint.address_lookup().map(|l| l.add(mdns)).map_err(|e| e.to_string()));
    if let Err(error) = added {
        tracing::warn!(%error, "devices are not looked for by mDNS");
    }
}

/// Gives a connection the limits of a member's.
pub(crate) fn trust(connection: &iroh::endpoint::Connection) {
    connection.set_max_concurrent_bi_streams(MAX_STREAMS.into());
    connection.set_receive_window(MAX_WAITING.into());
}

/// Default windows of a stream: larger ones make a lossy link close the connection with
/// "too many gaps".
fn transport() -> QuicTransportConfig {
    QuicTransportConfig::builder()
        .max_idle_timeout(IDLE.try_into().ok())
        .default_path_max_idle_timeout(IDLE)
        .keep_alive_interval(KEEP_ALIVE)
        .default_path_keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_bidi_streams(MAX_STREAMS_OF_STRANGER.into())
        .receive_window(MAX_WAITING_OF_STRANGER.into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .build()
}

/// The root of all tasks.
async fn run(shared: Arc<Shared>) {
    let mut tasks = JoinSet::new();
    tasks.spawn(accept(shared.clone()));
    tasks.spawn(members::keep(shared.clone()));
    tasks.spawn(locks::keep(shared.clone()));
    tasks.spawn(pass_on::state_own(shared.clone()));
    tasks.spawn(compact::keep(shared.clone()));
    tasks.spawn(watch_index(shared));
    tasks.join_all().await;
}

/// Own locations may be changed by anyone who has the index.
async fn watch_index(shared: Arc<Shared>) {
    use vfs_core::changes::{Change, Next};
    let mut feed = shared.index.feed().subscribe();
    while let Some(next) = feed.next().await {
        let touched = match next {
            Next::Missed => true,
            Next::Batch(changes) => changes.contains(&Change::Locations),
        };
        if touched {
            shared.locations_changed();
        }
    }
}

async fn accept(shared: Arc<Shared>) {
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut connections = JoinSet::new();
    while let Some(incoming) = shared.endpoint.accept().await {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let shared = shared.clone();
        connections.spawn(async move {
            let Some(connection) = shake_hands(incoming).await else { return };
            drop(permit);
            match connection.alpn() {
                ALPN_MEMBER => presence::accepted(shared, connection).await,
                _ => pair::serve(&shared, connection).await,
            }
        });
    }
}

async fn shake_hands(incoming: Incoming) -> Option<iroh::endpoint::Connection> {
    let accepting = incoming.accept().ok()?;
    timeout(HANDSHAKE, accepting).await.ok()?.ok()
}
