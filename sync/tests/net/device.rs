//! A device of a test: everything beneath one temporary folder.

use iroh::endpoint::presets;
use iroh::{Endpoint, EndpointAddr, PublicKey, SecretKey};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sync::{Applies, Node, NodeConfig, Outgoing, Parts, PeerStatus};
use tempfile::TempDir;
use vfs_core::apply::Applier;
use vfs_core::content::cache::Key;
use vfs_core::content::{Cache, Lender, Manifests, OwnFiles};
use vfs_core::index::open_store;
use vfs_core::index::{Index, NewLocation, Observed};
use vfs_core::indexer::{Indexer, IndexerConfig};
use vfs_core::library::{Library, LibraryInfo, Member};
use vfs_core::model::{Attr, ContentId, DeviceId, FileType, Location, LocationId, Name, Time};
use vfs_core::outbox::{Outbox, OutboxConfig};

/// How long a condition may take to come true, on a slow and busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Device {
    pub node: Arc<Node>,
    pub library: Arc<Library>,
    pub index: Index,
    pub indexer: Arc<Indexer>,
    pub dir: Arc<TempDir>,
    pub key: [u8; 32],
    writing: Option<Writing>,
    config: NodeConfig,
    parts: Parts,
    cache: Arc<Cache>,
}

/// Which ways a device's writes go.
pub enum Writes {
    None,
    Out(Arc<dyn Outgoing>),
    In(Arc<dyn Applies>),
    Real,
}

/// The real outbox and applier.
pub struct Writing {
    pub outbox: Arc<Outbox>,
    pub applier: Arc<Applier>,
}

impl Writing {
    fn open(
        path: &Path,
        index: &Index,
        indexer: &Arc<Indexer>,
        manifests: &Arc<Manifests>,
    ) -> Self {
        let apply = path.join("apply");
        let applier = Applier::open(&apply, index.clone(), indexer.clone(), manifests.clone());
        let config = OutboxConfig::default();
        let (outbox, report) = Outbox::open(&path.join("outbox"), index.clone(), config).unwrap();
        assert!(report.lost.is_empty(), "{report:?}");
        Self { outbox, applier: applier.unwrap() }
    }
}

impl Device {
    /// A device without a library.
    pub async fn new() -> Self {
        Self::start(Arc::new(tempfile::tempdir().unwrap()), rand::random()).await
    }

    /// A device with a library of its own.
    pub async fn first(name: &str) -> Self {
        let device = Self::new().await;
        device.found(name);
        device
    }

    /// A device with the state that is in the folder.
    pub async fn start(dir: Arc<TempDir>, key: [u8; 32]) -> Self {
        Self::start_at(dir, key, &["127.0.0.1:0"]).await
    }

    /// The same, listening there.
    pub async fn start_at(dir: Arc<TempDir>, key: [u8; 32], bind: &[&str]) -> Self {
        Self::build(dir, key, bind, Writes::None).await
    }

    /// A device without a library, whose writes go these ways.
    pub async fn with(writes: Writes) -> Self {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Self::build(dir, rand::random(), &["127.0.0.1:0"], writes).await
    }

    /// A device on a folder whose last user may still be letting go of it.
    pub async fn restart(dir: &Arc<TempDir>, key: [u8; 32], writes: Writes) -> Self {
        let index = dir.path().join("index");
        until("the index is free again", || open_store(&index).is_ok()).await;
        Self::build(dir.clone(), key, &["127.0.0.1:0"], writes).await
    }

    async fn build(dir: Arc<TempDir>, key: [u8; 32], bind: &[&str], writes: Writes) -> Self {
        let me = id_of(&key);
        let path = dir.path();
        let library = Arc::new(Library::open(&path.join("library.json")).unwrap());
        let store = open_store(&path.join("index")).unwrap().store;
        let index = Index::open(store, me).unwrap();
        let manifests = Arc::new(Manifests::open(&path.join("manifests")).unwrap());
        let config = IndexerConfig { settle: Duration::ZERO, ..IndexerConfig::default() };
        let indexer = Indexer::start(index.clone(), manifests.clone(), config);
        let own = Arc::new(OwnFiles::new(index.clone(), indexer.clone(), manifests.clone()));
        let (mut outbox, mut applier, mut writing) = (None, None, None);
        match writes {
            Writes::None => {}
            Writes::Out(out) => outbox = Some(out),
            Writes::In(into) => applier = Some(into),
            Writes::Real => {
                let made = Writing::open(path, &index, &indexer, &manifests);
                outbox = Some(made.outbox.clone() as Arc<dyn Outgoing>);
                applier = Some(made.applier.clone() as Arc<dyn Applies>);
                writing = Some(made);
            }
        }
        let bind = bind.iter().map(|a| a.parse().unwrap()).collect();
        let config = NodeConfig { secret_key: key, bind, relay: None, mdns: false };
        let (books, rows, scratch) = (library.clone(), index.clone(), path.to_owned());
        let cache = Arc::new(Cache::open(&path.join("cache"), 1 << 30));
        let trees = Manifests::open(&path.join("lent")).unwrap();
        let lender = Some(Arc::new(Lender::new(index.clone(), cache.clone(), trees)));
        let parts = Parts { library: books, index: rows, own, lender, outbox, applier, scratch };
        let node = Node::start(config.clone(), parts.clone()).await.unwrap();
        assert_eq!(node.id(), me);
        Self { node, library, index, indexer, dir, key, writing, config, parts, cache }
    }

    /// Ends the connections without a word to the parts, and begins anew with the same ones.
    pub async fn renew_node(&mut self) {
        self.node.shutdown().await;
        self.node = Node::start(self.config.clone(), self.parts.clone()).await.unwrap();
    }

    /// Puts bytes into its cache, as if it had read them.
    pub fn has_cached(&self, bytes: &[u8]) {
        let content = ContentId::of(bytes);
        let file = self.cache.file(Key::Content(content), bytes.len() as u64);
        assert!(file.write(0, bytes) && file.whole().is_some());
    }

    pub fn own(&self) -> Arc<OwnFiles> {
        self.parts.own.clone()
    }

    pub fn writing(&self) -> &Writing {
        self.writing.as_ref().unwrap()
    }

    /// Gives it a library of its own.
    pub fn found(&self, name: &str) {
        let id = self.node.id();
        self.library
            .update(|s| {
                s.library = Some(LibraryInfo { id: "00112233".into(), name: "home".into() });
                let stamp = s.next_stamp();
                s.merge(member(id, name, stamp));
            })
            .unwrap();
        self.node.members_changed();
    }

    /// Admits a key without pairing, as a record from another member would.
    pub fn admit(&self, id: DeviceId, name: &str) {
        self.library
            .update(|s| {
                let stamp = s.next_stamp();
                s.merge(member(id, name, stamp));
            })
            .unwrap();
        self.node.members_changed();
    }

    pub fn id(&self) -> DeviceId {
        self.node.id()
    }

    /// Where a raw endpoint can dial it.
    pub fn address(&self) -> EndpointAddr {
        let key = PublicKey::from_bytes(&self.id().0).unwrap();
        EndpointAddr::new(key).with_ip_addr(self.node.addresses()[0])
    }

    /// What it knows of a peer.
    pub fn peer(&self, id: DeviceId) -> Option<PeerStatus> {
        self.node.peers().into_iter().find(|p| p.id == id)
    }

    pub fn is_online(&self, id: DeviceId) -> bool {
        self.peer(id).is_some_and(|p| p.online)
    }

    /// A location whose folder is `files` beneath the device's own.
    pub fn add_location(&self, name: &str, shared_with: Option<Vec<DeviceId>>) -> Arc<Location> {
        self.add_location_at(name, &self.folder(), shared_with)
    }

    /// A location whose folder is there.
    pub fn add_location_at(
        &self,
        name: &str,
        folder: &Path,
        shared_with: Option<Vec<DeviceId>>,
    ) -> Arc<Location> {
        fs::create_dir_all(folder).unwrap();
        self.index
            .put_location(NewLocation {
                id: LocationId::new(self.id(), rand::random()),
                owner: self.id(),
                name: name.into(),
                root: Some(folder.to_owned()),
                read_only: false,
                shared_with,
            })
            .unwrap()
    }

    pub fn folder(&self) -> PathBuf {
        self.dir.path().join("files")
    }

    /// Admits `other` by a ticket, and waits until both see each other.
    pub async fn pair(&self, other: &Self, name: &str) {
        let invitation = self.node.invite(Duration::from_secs(60)).await.unwrap();
        let pending = other.node.join(&invitation.ticket, name).await.unwrap();
        other.node.confirm(pending).await.unwrap();
        self.meet(other).await;
    }

    /// Waits until both see each other.
    pub async fn meet(&self, other: &Self) {
        until("both are online", || self.is_online(other.id()) && other.is_online(self.id())).await;
    }
}

pub fn id_of(key: &[u8; 32]) -> DeviceId {
    DeviceId(*SecretKey::from_bytes(key).public().as_bytes())
}

fn member(id: DeviceId, name: &str, stamp: vfs_core::library::Stamp) -> Member {
    let (name, addresses, last_seen_ms) = (name.into(), vec![], None);
    Member { id, name, life: 0, stamp, removed: false, addresses, last_seen_ms }
}

/// Waits for a condition; fails with its name when it does not come true in time.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An endpoint that speaks for itself, with none of this crate's rules.
pub async fn raw_endpoint(key: [u8; 32]) -> Endpoint {
    Endpoint::builder(presets::Minimal)
        .secret_key(SecretKey::from_bytes(&key))
        .alpns(vec![sync::wire::ALPN_MEMBER.to_vec()])
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")
        .unwrap()
        .bind()
        .await
        .unwrap()
}

/// An entry of a listing that was never on a disk.
pub fn observed(name: &str, disk_ino: u64, size: u64) -> Observed {
    let time = Time { secs: 1_700_000_000, nanos: 5 };
    let attr = Attr {
        file_type: FileType::File,
        perm: 0o644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        size,
        blocks: size.div_ceil(512),
        mtime: time,
        ctime: time,
        btime: Some(time),
        rdev: 0,
    };
    Observed { name: Name::new(name.as_bytes()).unwrap(), attr, disk_ino, target: None }
}
