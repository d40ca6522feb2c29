//! Reading, with a network made up: holders that answer, lie, stall or are gone.

use super::manifest::{GROUP_BYTES, groups_of};
use super::*;
use crate::index::{Attested, LogRow, NewLocation, ROOT_PARENT, Signed, Statement, open_store};
use crate::local::Root;
use crate::model::{Attr, ContentId, FileId, Name, Seq, Stamp};
use crate::source::{BoxFuture, FetchError, Fetched, Lent, MAX_FETCH_BYTES, Wanted};
use bytes::Bytes;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;
use tokio::runtime::{Handle, Runtime};

const GROUP: usize = GROUP_BYTES as usize;
const ME: DeviceId = DeviceId([1; 32]);
const OWNER: DeviceId = DeviceId([2; 32]);
const OTHER: DeviceId = DeviceId([3; 32]);
const LENDER: DeviceId = DeviceId([4; 32]);
const FILE: FileId = FileId(2);

fn bytes_of(seed: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

#[derive(Clone, Copy, PartialEq)]
enum Behaviour {
    Serves,
    FlipsABit,
    CutsShort,
    Stalls,
    /// Says what it has, and gives nothing.
    Hangs,
    IsNotReady,
    Unreachable,
    IsStale,
    Refuses,
}

/// The made up network.
struct Net {
    files: HashMap<LocationId, (Bytes, Manifest)>,
    behaviours: Mutex<HashMap<DeviceId, Behaviour>>,
    asked: Mutex<Vec<(DeviceId, Range<u64>)>>,
    /// Who lends it, and how many questions for that there were.
    lenders: Mutex<Vec<DeviceId>>,
    questions: AtomicUsize,
    stamp: Stamp,
    /// Bytes a second on the link of a device, and until when that is busy.
    links: Mutex<HashMap<DeviceId, (f64, tokio::time::Instant)>>,
    delays: Mutex<HashMap<DeviceId, Duration>>,
    /// While shut, requests wait.
    shut: tokio::sync::watch::Sender<bool>,
    flying: AtomicUsize,
    most_flying: AtomicUsize,
    fetched_bytes: AtomicU64,
}

impl Net {
    fn behave(&self, device: DeviceId, behaviour: Behaviour) {
        lock(&self.behaviours).insert(device, behaviour);
    }

    fn behave_all(&self, behaviour: Behaviour) {
        self.behave(OWNER, behaviour);
        self.behave(OTHER, behaviour);
    }

    fn behaviour(&self, device: DeviceId) -> Behaviour {
        lock(&self.behaviours).get(&device).copied().unwrap_or(Behaviour::Serves)
    }

    /// From now on the device has a link of its own, of so many MiB a second.
    fn give_link(&self, device: DeviceId, mib: f64) {
        let link = (mib * (1 << 20) as f64, tokio::time::Instant::now());
        lock(&self.links).insert(device, link);
    }

    /// The bytes that are asked for come one after the other.
    async fn pass_link(&self, device: DeviceId, bytes: u64) {
        let until = {
            let mut links = lock(&self.links);
            let Some((rate, busy)) = links.get_mut(&device) else { return };
            let time = Duration::from_secs_f64(bytes as f64 / *rate);
            *busy = (*busy).max(tokio::time::Instant::now()) + time;
            *busy
        };
        tokio::time::sleep_until(until).await;
    }

    /// From now on its answers take so long.
    fn delay(&self, device: DeviceId, time: Duration) {
        lock(&self.delays).insert(device, time);
    }

    async fn wait_for(&self, device: DeviceId) {
        let delay = lock(&self.delays).get(&device).copied();
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
    }

    fn bytes_asked_of(&self, device: DeviceId) -> u64 {
        let asked = self.asked().into_iter().filter(|(asked, _)| *asked == device);
        asked.map(|(_, range)| range.end - range.start).sum()
    }

    fn asked(&self) -> Vec<(DeviceId, Range<u64>)> {
        lock(&self.asked).clone()
    }

    async fn answer(
        &self,
        device: DeviceId,
        version: &Version,
        range: Range<u64>,
    ) -> Result<Fetched, FetchError> {
        let (bytes, manifest) = &self.files[&version.location];
        assert!(manifest::is_fetchable(&range, version.stamp.size), "{range:?}");
        assert!(range.end - range.start <= MAX_FETCH_BYTES);
        self.pass_link(device, range.end - range.start).await;
        self.wait_for(device).await;
        match self.behaviour(device) {
            Behaviour::Stalls | Behaviour::Hangs => std::future::pending().await,
            Behaviour::IsNotReady => return Err(FetchError::NotNow),
            Behaviour::Unreachable => return Err(FetchError::Unreachable),
            Behaviour::IsStale => return Err(FetchError::Stale),
            Behaviour::Refuses => return Err(FetchError::Refused),
            Behaviour::Serves | Behaviour::FlipsABit | Behaviour::CutsShort => {}
        }
        let proof = match version.content {
            Some(_) => manifest.proof(range.clone()).unwrap(),
            None => vec![],
        };
        let mut bytes = bytes[range.start as usize..range.end as usize].to_vec();
        match self.behaviour(device) {
            Behaviour::FlipsABit => bytes[range.start as usize % 7] ^= 4,
            Behaviour::CutsShort => bytes.truncate(bytes.len() - 1),
            _ => {}
        }
        self.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(Fetched { bytes: bytes.into(), proof })
    }
}

impl ContentSource for Net {
    fn is_reachable(&self, device: DeviceId) -> bool {
        self.behaviour(device) != Behaviour::Unreachable
    }

    fn fetch<'a>(
        &'a self,
        device: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        struct Landing<'a>(&'a AtomicUsize);
        impl Drop for Landing<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        Box::pin(async move {
            lock(&self.asked).push((device, range.clone()));
            let flying = self.flying.fetch_add(1, Ordering::Relaxed) + 1;
            let _landing = Landing(&self.flying);
            self.most_flying.fetch_max(flying, Ordering::Relaxed);
            let mut shut = self.shut.subscribe();
            shut.wait_for(|shut| !shut).await.unwrap();
            self.answer(device, version, range).await
        })
    }

    /// The first lender is the nearest.
    fn rtt(&self, device: DeviceId) -> Option<Duration> {
        Some(Duration::from_millis(10 * u64::from(device.0[0].saturating_sub(LENDER.0[0]))))
    }

    fn lenders(&self) -> Vec<DeviceId> {
        let lenders = lock(&self.lenders).clone();
        lenders.into_iter().filter(|device| self.is_reachable(*device)).collect()
    }

    fn lends<'a>(
        &'a self,
        device: DeviceId,
        contents: &'a [Wanted],
    ) -> BoxFuture<'a, Result<Vec<Lent>, FetchError>> {
        self.questions.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            self.wait_for(device).await;
            let lent = |wanted: &Wanted| Lent { ranges: vec![0..wanted.size], is_ready: true };
            match self.behaviour(device) {
                Behaviour::Stalls => std::future::pending().await,
                Behaviour::Refuses => Ok(vec![Lent::default(); contents.len()]),
                _ => Ok(contents.iter().map(lent).collect()),
            }
        })
    }

    fn borrow<'a>(
        &'a self,
        device: DeviceId,
        wanted: Wanted,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        Box::pin(async move {
            lock(&self.asked).push((device, range.clone()));
            let (_, manifest) = &self.files[&location_of(OWNER)];
            assert_eq!((wanted.content, wanted.size), (manifest.content(), manifest.size()));
            let stamp = Stamp { size: wanted.size, ..self.stamp };
            let (location, content) = (location_of(OWNER), Some(wanted.content));
            let version = Version { location, file: FILE, stamp, content };
            self.answer(device, &version, range).await
        })
    }
}

fn location_of(device: DeviceId) -> LocationId {
    LocationId([device.0[0]; 16])
}

fn attr(file_type: FileType, size: u64) -> Attr {
    let time = Time { secs: 1_700_000_000, nanos: 5 };
    Attr {
        file_type,
        perm: 0o644,
        uid: 1,
        gid: 1,
        nlink: 1,
        size,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: None,
        rdev: 0,
    }
}

fn row(seq: u64, parent: FileId, name: &str, entry: Entry) -> LogRow {
    let name = Name::new(name.as_bytes()).unwrap();
    LogRow { seq: Seq(seq), parent, name, entry: Some(entry) }
}

fn entry(file_id: FileId, attr: Attr, content: Option<ContentId>) -> Entry {
    Entry { file_id, disk_ino: file_id.0 + 100, generation: 1, attr, content, target: None }
}

/// This device, with `OWNER`'s and `OTHER`'s replicas of one file.
struct World {
    runtime: Runtime,
    dir: tempfile::TempDir,
    index: Index,
    net: Arc<Net>,
    bytes: Bytes,
    entry: Entry,
    limit_bytes: u64,
    config: ContentConfig,
}

impl World {
    fn new(size: usize) -> Self {
        Self::with(size, true)
    }

    fn unhashed(size: usize) -> Self {
        Self::with(size, false)
    }

    fn with(size: usize, hashed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        fs::create_dir_all(&index).unwrap();
        let index = Index::open(open_store(&index).unwrap().store, ME).unwrap();
        let bytes = Bytes::from(bytes_of(7, size));
        let (content, manifest) = Manifest::of_bytes(&bytes);
        let entry = entry(FILE, attr(FileType::File, size as u64), hashed.then_some(content));
        let files = [OWNER, OTHER].map(|d| (location_of(d), (bytes.clone(), manifest.clone())));
        let net = Net {
            files: files.into(),
            behaviours: Mutex::default(),
            asked: Mutex::default(),
            lenders: Mutex::default(),
            questions: 0.into(),
            stamp: entry.stamp(),
            links: Mutex::default(),
            delays: Mutex::default(),
            shut: tokio::sync::watch::Sender::new(false),
            flying: 0.into(),
            most_flying: 0.into(),
            fetched_bytes: 0.into(),
        };
        let world = Self {
            runtime: tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .unwrap(),
            dir,
            index,
            net: Arc::new(net),
            bytes,
            entry,
            limit_bytes: 1 << 30,
            config: ContentConfig { read_deadline: Duration::from_secs(20), ..Default::default() },
        };
        for device in [OWNER, OTHER] {
            world.replicate(device, &world.entry);
        }
        world
    }

    fn replicate(&self, device: DeviceId, file: &Entry) -> LocationNo {
        let location = self
            .index
            .put_location(NewLocation {
                id: location_of(device),
                owner: device,
                name: format!("of-{}", device.0[0]),
                root: None,
                read_only: false,
                shared_with: None,
            })
            .unwrap();
        let root =
            Entry { disk_ino: 99, ..entry(FileId::ROOT, attr(FileType::Directory, 0), None) };
        let rows =
            vec![row(1, ROOT_PARENT, "root", root), row(2, FileId::ROOT, "film.mkv", file.clone())];
        self.index.reset_replica(location.no, 9).unwrap();
        self.index.apply_replica(location.no, 9, rows, Seq(2)).unwrap();
        location.no
    }

    /// These lend the file, which every member may see.
    fn lend(&self, devices: &[DeviceId]) {
        state(self, OWNER, None);
        lock(&self.net.lenders).extend(devices);
    }

    fn cache_dir(&self) -> std::path::PathBuf {
        self.dir.path().join("cache")
    }

    fn own(&self, root: Option<Arc<Root>>) -> Arc<OwnFiles> {
        let manifests = Manifests::open(&self.dir.path().join("manifests")).unwrap();
        let roots = Box::new(move |_| root.clone().ok_or_else(|| FsError::from(Kind::NotFound)));
        Arc::new(OwnFiles::with_roots(self.index.clone(), roots, Arc::new(manifests)))
    }

    /// As after a start of the daemon.
    fn content(&self) -> Arc<Content> {
        self.content_with(self.own(None))
    }

    fn content_with(&self, own: Arc<OwnFiles>) -> Arc<Content> {
        let cache = Arc::new(Cache::open(&self.cache_dir(), self.limit_bytes));
        let (net, config) = (self.net.clone(), self.config.clone());
        let runtime: Handle = self.runtime.handle().clone();
        Content::new(self.index.clone(), own, cache, net, config, runtime)
    }

    fn no(&self, device: DeviceId) -> LocationNo {
        self.index.location_by_id(location_of(device)).unwrap().no
    }

    fn open(&self, content: &Arc<Content>) -> Reader {
        content.open(self.no(OWNER), &self.entry).unwrap()
    }

    fn read(&self, reader: &Reader, offset: usize, len: usize) -> FsResult<Bytes> {
        match reader.try_read(offset as u64, len) {
            Some(read) => read,
            None => self.runtime.block_on(reader.read(offset as u64, len)),
        }
    }

    /// Reads the whole file in steps and compares it.
    fn read_through(&self, reader: &Reader, step: usize) {
        for at in (0..self.bytes.len()).step_by(step) {
            let read = self.read(reader, at, step).unwrap();
            let end = self.bytes.len().min(at + step);
            assert!(read == self.bytes[at..end], "wrong bytes at {at}");
        }
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_file_is_read_whole_then_comes_from_the_cache() {
    let world = World::new(5 * (1 << 20) + 77);
    let content = world.content();
    let reader = world.open(&content);
    assert!(reader.complete_file().is_none());
    world.read_through(&reader, 100_000);
    wait_until("the file is complete", || reader.complete_file().is_some());
    let fetched = world.net.fetched_bytes.load(Ordering::Relaxed);
    assert_eq!(fetched, world.bytes.len() as u64, "nothing was fetched twice");
    world.read_through(&reader, 131_072);
    world.read_through(&world.open(&content), 4096);
    assert_eq!(world.net.fetched_bytes.load(Ordering::Relaxed), fetched);
    assert_eq!(content.cache().stats().fetched_bytes, fetched);
    assert!(content.cache().stats().hits_bytes >= 2 * fetched);
}

#[test]
fn a_lone_small_read_fetches_its_group_only() {
    let world = World::new(1 << 20);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(
        world.read(&reader, 5 * GROUP + 9, 4096).unwrap(),
        world.bytes[5 * GROUP + 9..][..4096]
    );
    assert_eq!(world.net.asked(), [(OWNER, 5 * GROUP_BYTES..6 * GROUP_BYTES)]);
}

#[test]
fn reads_at_and_beyond_the_end_are_short() {
    let world = World::new(GROUP + 10);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, GROUP + 5, 100).unwrap(), world.bytes[GROUP + 5..]);
    assert!(world.read(&reader, GROUP + 10, 1).unwrap().is_empty());
    assert!(world.read(&reader, usize::MAX, usize::MAX).unwrap().is_empty());
    let empty = World::new(0);
    let content = empty.content();
    assert!(empty.read(&empty.open(&content), 0, 10).unwrap().is_empty());
    assert!(empty.net.asked().is_empty());
}

#[test]
fn wrong_bytes_are_reported_and_had_from_another_holder() {
    for wrong in [Behaviour::FlipsABit, Behaviour::CutsShort] {
        let world = World::new(3 * GROUP);
        world.net.behave(OWNER, wrong);
        let content = world.content();
        let reader = world.open(&content);
        assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
        let asked: Vec<_> = world.net.asked().into_iter().map(|(device, _)| device).collect();
        assert_eq!(asked, [OWNER, OTHER]);
        world.read_through(&reader, 1000);
        assert!(world.net.asked()[2..].iter().all(|(device, _)| *device == OTHER));
        let reports = content.reports();
        assert_eq!(reports.len(), 1);
        assert_eq!((reports[0].device, &*reports[0].path), (OWNER, "film.mkv"));
    }
}

#[test]
fn wrong_bytes_everywhere_are_an_error_and_never_kept() {
    let world = World::new(3 * GROUP);
    world.net.behave_all(Behaviour::FlipsABit);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), Kind::Io);
    assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), Kind::Io);
    assert_eq!(content.reports().len(), 2);
    assert_eq!(content.cache().stats().bytes, 0);
}

#[test]
fn holders_known_to_be_offline_fail_a_read_at_once() {
    let world = World::new(3 * GROUP);
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    let start = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), Kind::HostDown);
    assert!(start.elapsed() < world.config.read_deadline / 4);
    assert!(world.net.asked().is_empty());
    world.net.behave(OTHER, Behaviour::Serves);
    world.read_through(&reader, 1000);
}

#[test]
fn holders_that_stall_fail_a_read_at_the_deadline() {
    let mut world = World::new(3 * GROUP);
    world.config.read_deadline = Duration::from_millis(300);
    world.net.behave_all(Behaviour::Stalls);
    let content = world.content();
    let reader = world.open(&content);
    let start = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), Kind::HostDown);
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_holder_that_stalls_is_left_for_another() {
    let world = World::new(3 * GROUP);
    world.net.behave(OWNER, Behaviour::Stalls);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
}

#[test]
fn a_silent_device_that_lists_the_bytes_often_does_not_crowd_out_another() {
    let world = World::new(3 * GROUP);
    let rows = (0..10_000).map(|n| {
        let name = format!("copy-{n}");
        row(3 + n, FileId::ROOT, &name, Entry { file_id: FileId(1000 + n), ..world.entry.clone() })
    });
    assert!(world.no(OWNER) < world.no(OTHER));
    world.index.apply_replica(world.no(OWNER), 9, rows.collect(), Seq(10_002)).unwrap();
    world.net.behave(OWNER, Behaviour::Stalls);
    let content = world.content();
    let reader = world.open(&content);
    let asked = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[test]
fn what_no_location_can_give_is_borrowed_from_a_cache() {
    let world = World::new(40 * GROUP);
    world.lend(&[LENDER]);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert_eq!(world.net.questions.load(Ordering::Relaxed), 0, "nobody is asked without need");
    world.net.behave_all(Behaviour::Unreachable);
    world.read_through(&reader, 100_000);
    assert_eq!(world.net.questions.load(Ordering::Relaxed), 1, "and what was said is remembered");
    assert!(world.net.asked()[1..].iter().all(|(device, _)| *device == LENDER));
}

#[test]
fn holders_that_are_stale_or_silent_are_left_for_a_cache() {
    for gone in [Behaviour::IsStale, Behaviour::Refuses, Behaviour::Stalls] {
        let mut world = World::new(3 * GROUP);
        world.config.read_deadline = Duration::from_secs(5);
        world.lend(&[LENDER]);
        world.net.behave_all(gone);
        let content = world.content();
        let reader = world.open(&content);
        assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    }
}

#[test]
fn a_cache_that_lends_wrong_bytes_is_reported_and_left_for_another() {
    let world = World::new(3 * GROUP);
    let honest = DeviceId([5; 32]);
    world.lend(&[LENDER, honest]);
    world.net.behave_all(Behaviour::Unreachable);
    world.net.behave(LENDER, Behaviour::FlipsABit);
    let content = world.content();
    let reader = world.open(&content);
    world.read_through(&reader, 1000);
    let reports = content.reports();
    assert!(reports.iter().all(|report| report.device == LENDER) && reports.len() <= 1);
    assert!(world.net.asked().iter().filter(|(device, _)| *device == LENDER).count() <= 1);
}

#[test]
fn the_third_holder_is_asked_when_two_give_nothing() {
    for behaviour in [Behaviour::Hangs, Behaviour::IsNotReady] {
        let mut world = World::new(3 * GROUP);
        world.config.read_deadline = Duration::from_secs(12);
        let honest = DeviceId([5; 32]);
        world.lend(&[LENDER, honest]);
        world.net.behave(OWNER, Behaviour::Stalls);
        world.net.behave(OTHER, Behaviour::Unreachable);
        world.net.behave(LENDER, behaviour);
        world.net.delay(honest, Duration::from_millis(100));
        let content = world.content();
        let reader = world.open(&content);
        let asked = Instant::now();
        assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
        assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
        assert!(world.net.asked().iter().any(|(device, _)| *device == LENDER));
    }
}

#[test]
fn a_near_lender_of_no_use_does_not_hide_another_one() {
    for behaviour in [Behaviour::FlipsABit, Behaviour::IsStale] {
        let world = World::new(3 * GROUP);
        let honest = DeviceId([5; 32]);
        world.lend(&[LENDER, honest]);
        world.net.behave_all(Behaviour::Unreachable);
        world.net.behave(LENDER, behaviour);
        world.net.delay(honest, Duration::from_millis(400));
        let content = world.content();
        let reader = world.open(&content);
        world.read_through(&reader, 1000);
        assert_eq!(world.net.asked().iter().filter(|(device, _)| *device == LENDER).count(), 1);
    }
}

#[test]
fn a_late_refusal_does_not_end_the_question_for_lenders() {
    let world = World::new(3 * GROUP);
    world.lend(&[LENDER]);
    world.net.behave(OTHER, Behaviour::Unreachable);
    // It is late after one second; the lenders are asked then, and answer after it.
    world.net.behave(OWNER, Behaviour::IsStale);
    world.net.delay(OWNER, Duration::from_millis(1200));
    world.net.delay(LENDER, Duration::from_millis(600));
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert_eq!(world.net.questions.load(Ordering::Relaxed), 1);
}

#[test]
fn an_answer_is_no_silence_and_wrong_bytes_are() {
    for (behaviour, is_silent) in [(Behaviour::IsNotReady, false), (Behaviour::FlipsABit, true)] {
        let world = World::new(3 * GROUP);
        world.net.behave(OWNER, behaviour);
        let content = world.content();
        let reader = world.open(&content);
        assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
        assert_eq!(world.net.asked()[0].0, OWNER);
        assert_eq!(content.supply_of(OWNER).is_silent(), is_silent);
    }
}

#[test]
fn more_devices_are_asked_while_none_has_it() {
    let world = World::new(3 * GROUP);
    let devices: Vec<_> = (10..50).map(|n| DeviceId([n; 32])).collect();
    for device in &devices {
        world.net.behave(*device, Behaviour::Refuses);
    }
    world.net.behave(devices[39], Behaviour::Serves);
    world.lend(&devices);
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
}

#[test]
fn who_may_not_see_a_file_is_not_asked_for_it() {
    let world = World::new(3 * GROUP);
    let stranger = DeviceId([5; 32]);
    lock(&world.net.lenders).extend([stranger, LENDER]);
    state(&world, OWNER, Some(vec![ME, LENDER]));
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert_eq!(world.net.questions.load(Ordering::Relaxed), 1);
    assert!(world.net.asked().iter().all(|(device, _)| *device == LENDER));
}

#[test]
fn the_newest_word_of_an_owner_says_who_is_asked() {
    let world = World::new(3 * GROUP);
    let stranger = DeviceId([5; 32]);
    lock(&world.net.lenders).extend([stranger, LENDER]);
    // Its rows were never compared with those that are here.
    world.index.note_sharing(&statement(&world, OWNER, Some(vec![LENDER])), || true).unwrap();
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert_eq!(world.net.questions.load(Ordering::Relaxed), 1);
}

#[test]
fn a_slow_holder_is_not_given_up_for_one_that_has_nothing_to_give() {
    let mut world = World::new(3 * GROUP);
    world.config.read_deadline = Duration::from_secs(8);
    world.net.delay(OWNER, Duration::from_secs(3));
    world.net.behave(OTHER, Behaviour::IsNotReady);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
}

#[test]
fn a_silent_member_does_not_hold_up_a_read_that_nobody_can_answer() {
    let world = World::new(3 * GROUP);
    world.lend(&[LENDER]);
    world.net.behave_all(Behaviour::Unreachable);
    world.net.behave(LENDER, Behaviour::Stalls);
    let content = world.content();
    let reader = world.open(&content);
    let asked = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), Kind::HostDown);
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
}

#[test]
fn a_lender_that_is_ready_late_is_asked_again_although_the_owner_stalls() {
    let mut world = World::new(3 * GROUP);
    world.config.read_deadline = Duration::from_secs(12);
    world.lend(&[LENDER]);
    world.net.behave(OWNER, Behaviour::Stalls);
    world.net.behave(OTHER, Behaviour::Unreachable);
    world.net.behave(LENDER, Behaviour::IsNotReady);
    let net = world.net.clone();
    world.runtime.spawn(async move {
        tokio::time::sleep(Duration::from_secs(2)).await;
        net.behave(LENDER, Behaviour::Serves);
    });
    let content = world.content();
    let reader = world.open(&content);
    let asked = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
}

#[test]
fn a_lender_that_answers_late_is_waited_for() {
    let world = World::new(3 * GROUP);
    world.lend(&[LENDER]);
    world.net.behave_all(Behaviour::Unreachable);
    world.net.delay(LENDER, Duration::from_millis(1400));
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
}

#[test]
fn one_that_only_says_that_it_lends_does_not_hide_those_asked_after_it() {
    let world = World::new(3 * GROUP);
    let devices: Vec<_> = (10..40).map(|n| DeviceId([n; 32])).collect();
    for device in &devices {
        world.net.behave(*device, Behaviour::Refuses);
    }
    world.net.behave(devices[0], Behaviour::Hangs);
    world.net.behave(devices[29], Behaviour::Serves);
    world.lend(&devices);
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    let asked = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
}

#[test]
fn files_that_an_asker_may_not_see_do_not_hide_one_that_it_may() {
    let world = World::new(3 * GROUP);
    let rows = (0..1000).map(|n| {
        let name = format!("copy-{n}");
        row(3 + n, FileId::ROOT, &name, Entry { file_id: FileId(1000 + n), ..world.entry.clone() })
    });
    assert!(world.no(OWNER) < world.no(OTHER));
    world.index.apply_replica(world.no(OWNER), 9, rows.collect(), Seq(1002)).unwrap();
    let content = world.content();
    let lender = lender_with(&world, &content);
    state(&world, OWNER, Some(vec![ME]));
    state(&world, OTHER, None);
    let wanted = Wanted { content: world.entry.content.unwrap(), size: world.entry.attr.size };
    assert_eq!(lender.lends(LENDER, &[wanted])[0].ranges, [0..wanted.size]);
}

/// What a device says of its location.
fn statement(world: &World, device: DeviceId, shared_with: Option<Vec<DeviceId>>) -> Statement {
    let location = world.index.location_by_id(location_of(device)).unwrap();
    Statement {
        location: location.id,
        name: location.name.clone(),
        read_only: false,
        shared_with,
        log: world.index.digest(location.no).unwrap().unwrap(),
        made_ms: 1,
    }
}

/// Has it say so of the rows that are here.
fn state(world: &World, device: DeviceId, shared_with: Option<Vec<DeviceId>>) {
    let signed =
        Signed { statement: statement(world, device, shared_with), signature: [[0; 32]; 2] };
    assert_eq!(world.index.attest(world.no(device), &signed).unwrap(), Attested::Same);
}

fn lender(world: &World, content: &Arc<Content>) -> Lender {
    let trees = Manifests::open(&world.dir.path().join("lent")).unwrap();
    Lender::new(world.index.clone(), content.cache.clone(), trees)
}

fn lender_with(world: &World, content: &Arc<Content>) -> Lender {
    let reader = world.open(content);
    world.read_through(&reader, 1 << 20);
    wait_until("the file is complete", || reader.complete_file().is_some());
    lender(world, content)
}

#[test]
fn a_cached_content_is_lent_to_those_who_may_see_a_file_with_it() {
    let world = World::new((3 << 20) + 77);
    let content = world.content();
    let lender = lender_with(&world, &content);
    let wanted = Wanted { content: world.entry.content.unwrap(), size: world.entry.attr.size };
    let is_lent = |asker: DeviceId| {
        let read = lender.read(asker, wanted, 0..GROUP_BYTES);
        assert!(matches!(read, Ok(_) | Err(FetchError::Refused)), "{read:?}");
        let lent = &lender.lends(asker, &[wanted])[0];
        assert_eq!(lent.ranges == [0..wanted.size], read.is_ok());
        assert_eq!(lent.is_ready, read.is_ok(), "its tree was built for the first range");
        read.is_ok()
    };
    assert!(!is_lent(LENDER), "no owner has said who may see it");
    state(&world, OWNER, Some(vec![OTHER, ME]));
    assert!(!is_lent(LENDER));
    assert!(is_lent(OTHER));
    assert!(!is_lent(OWNER), "what the asker says of its own files is no reason");
    state(&world, OWNER, None);
    assert!(is_lent(LENDER));
    // Rows are on their way: what the owner states is not of those that are here.
    let mut newer = statement(&world, OWNER, Some(vec![OTHER, ME]));
    newer.log.head.0 += 1;
    newer.made_ms = 0;
    world.index.note_sharing(&newer, || false).unwrap();
    assert!(is_lent(LENDER), "it could be an old one");
    newer.made_ms = 2;
    world.index.note_sharing(&newer, || false).unwrap();
    assert!(!is_lent(LENDER) && is_lent(OTHER), "who was excluded is so at once");
    world.index.note_sharing(&statement(&world, OWNER, None), || false).unwrap();
    assert!(!is_lent(LENDER), "an older statement says nothing");
    world.index.note_sharing(&statement(&world, OWNER, None), || true).unwrap();
    assert!(is_lent(LENDER), "its owner says so itself");

    let size = wanted.size;
    for range in [0..GROUP_BYTES, GROUP_BYTES..3 * GROUP_BYTES, 3 << 20..size] {
        let fetched = lender.read(LENDER, wanted, range.clone()).unwrap();
        assert_eq!(fetched.bytes, world.bytes[range.start as usize..range.end as usize]);
        assert!(manifest::verify(wanted.content, size, range, &fetched.bytes, &fetched.proof));
    }
    for wrong in [Wanted { size: size - 1, ..wanted }, Wanted { content: ContentId([1; 32]), size }]
    {
        assert!(lender.read(LENDER, wrong, 0..GROUP_BYTES).is_err());
        let lent = Lent { ranges: vec![0..size], is_ready: true };
        let lends = lender.lends(LENDER, &[wrong, wanted, wanted]);
        assert_eq!(lends, [Lent::default(), lent.clone(), lent]);
    }
    for range in [1..GROUP_BYTES, 0..size, 3 << 20..size + 1, 0..0] {
        assert!(lender.read(LENDER, wanted, range).is_err());
    }
    world.read_through(&world.open(&content), 1 << 20);
}

#[test]
fn a_damaged_cache_lends_nothing_wrong() {
    let world = World::new(5 * GROUP);
    let content = world.content();
    let lender = lender_with(&world, &content);
    state(&world, OWNER, None);
    let wanted = Wanted { content: world.entry.content.unwrap(), size: world.entry.attr.size };
    assert!(lender.read(LENDER, wanted, 0..GROUP_BYTES).is_ok());
    let cached = &files_below(&world.cache_dir().join("content"))[0];
    let mut damaged = fs::read(cached).unwrap();
    damaged[GROUP + 3] ^= 1;
    fs::write(cached, damaged).unwrap();
    let damaged = lender.read(LENDER, wanted, GROUP_BYTES..2 * GROUP_BYTES);
    assert!(matches!(damaged, Err(FetchError::Stale)), "{damaged:?}");
    wait_until("it is found out and dropped", || {
        lender.read(LENDER, wanted, 0..GROUP_BYTES).is_err()
    });
    assert_eq!(content.cache().stats().files, 0);
}

#[test]
fn a_small_file_that_is_damaged_in_the_cache_is_dropped_when_it_is_asked_for() {
    let world = World::new(GROUP / 2);
    let content = world.content();
    let lender = lender_with(&world, &content);
    state(&world, OWNER, None);
    let wanted = Wanted { content: world.entry.content.unwrap(), size: world.entry.attr.size };
    fs::write(&files_below(&world.cache_dir().join("content"))[0], vec![1; GROUP / 2]).unwrap();
    for error in [FetchError::Stale, FetchError::Refused] {
        let failed = lender.read(LENDER, wanted, 0..wanted.size).unwrap_err();
        assert_eq!(failed.to_string(), error.to_string());
    }
    assert_eq!(lender.lends(LENDER, &[wanted]), [Lent::default()]);
}

/// How long a file takes to be read in its order, with these links to its holders.
fn time_to_read(links: &[(DeviceId, f64)]) -> (Duration, World) {
    let world = World::new(LARGE);
    for device in [OWNER, OTHER] {
        world.net.behave(device, Behaviour::Unreachable);
    }
    for (device, mib) in links {
        world.net.behave(*device, Behaviour::Serves);
        world.net.give_link(*device, *mib);
    }
    if links.iter().any(|(device, _)| *device == LENDER) {
        world.lend(&[LENDER]);
    }
    let content = world.content();
    let reader = world.open(&content);
    let start = Instant::now();
    world.read_through(&reader, 1 << 17);
    (start.elapsed(), world)
}

const LARGE: usize = 40 << 20;

#[test]
fn a_large_file_is_read_from_several_holders_at_once() {
    let (alone, _) = time_to_read(&[(OWNER, 12.0)]);
    for other in [OTHER, LENDER] {
        let (together, world) = time_to_read(&[(OWNER, 12.0), (other, 12.0)]);
        let gain = alone.as_secs_f64() / together.as_secs_f64();
        assert!(gain >= 1.6, "{alone:?} from one, {together:?} from two: {gain:.2}");
        let asked = [OWNER, other].map(|device| world.net.bytes_asked_of(device));
        assert!(asked.iter().sum::<u64>() <= LARGE as u64 * 21 / 20, "too much: {asked:?}");
    }
}

#[test]
fn a_slow_holder_does_not_slow_a_fast_one() {
    let (alone, _) = time_to_read(&[(OWNER, 16.0)]);
    let (together, world) = time_to_read(&[(OWNER, 16.0), (OTHER, 0.5)]);
    let loss = together.as_secs_f64() / alone.as_secs_f64();
    assert!(loss <= 1.1, "{alone:?} from one, {together:?} with a slow one: {loss:.2}");
    assert!(world.net.bytes_asked_of(OTHER) <= 2 << 20);
}

#[test]
fn a_read_goes_on_from_another_holder_in_the_middle_of_a_file() {
    for (other, link) in [(OTHER, 16.0), (LENDER, 16.0)] {
        let world = World::new(LARGE);
        world.net.give_link(OWNER, 16.0);
        world.net.give_link(other, link);
        if other == LENDER {
            world.net.behave(OTHER, Behaviour::Unreachable);
            world.lend(&[LENDER]);
        }
        let content = world.content();
        let reader = world.open(&content);
        let mut longest = Duration::ZERO;
        let step = 1 << 17;
        for at in (0..LARGE).step_by(step) {
            if at == LARGE / 2 {
                world.net.behave(OWNER, Behaviour::Stalls);
            }
            let asked = Instant::now();
            assert_eq!(world.read(&reader, at, step).unwrap(), world.bytes[at..at + step]);
            longest = longest.max(asked.elapsed());
        }
        assert!(longest < Duration::from_millis(1500), "a pause of {longest:?}");
        drop(reader);
        wait_until("nothing is under way", || world.net.flying.load(Ordering::Relaxed) == 0);
    }
}

#[test]
fn a_late_flight_is_asked_of_one_other_holder_only_and_then_cancelled() {
    let world = World::new(3 * GROUP);
    world.net.behave(OWNER, Behaviour::Stalls);
    let content = world.content();
    let reader = world.open(&content);
    let start = Instant::now();
    assert_eq!(world.read(&reader, 0, 10).unwrap(), world.bytes[..10]);
    assert!(start.elapsed() < Duration::from_millis(1900), "{:?}", start.elapsed());
    let asked: Vec<_> = world.net.asked().into_iter().map(|(device, _)| device).collect();
    assert_eq!(asked, [OWNER, OTHER]);
    wait_until("the late one is cancelled", || world.net.flying.load(Ordering::Relaxed) == 0);
    // It was silent: what comes next is not asked of it.
    assert_eq!(world.read(&reader, GROUP, 10).unwrap(), world.bytes[GROUP..][..10]);
    assert_eq!(world.net.asked()[2].0, OTHER);
}

#[test]
fn a_version_that_is_gone_is_stale_and_a_refusal_is_denied() {
    for (behaviour, kind) in
        [(Behaviour::IsStale, Kind::Stale), (Behaviour::Refuses, Kind::AccessDenied)]
    {
        let world = World::new(3 * GROUP);
        world.net.behave_all(behaviour);
        let content = world.content();
        let reader = world.open(&content);
        assert_eq!(world.read(&reader, 0, 10).unwrap_err().kind(), kind);
    }
}

#[test]
fn a_sequential_reader_keeps_several_requests_under_way() {
    let world = World::new(32 << 20);
    let content = world.content();
    let reader = world.open(&content);
    // Until the window is so wide that it does not matter how much of it has come.
    for at in (0..10 << 20).step_by(1 << 17) {
        assert_eq!(world.read(&reader, at, 1 << 17).unwrap(), world.bytes[at..][..1 << 17]);
    }
    world.net.shut.send_replace(true);
    let mut at = 10 << 20;
    wait_until("all requests are answered or wait", || {
        while let Some(read) = reader.try_read(at as u64, 1 << 17) {
            assert_eq!(read.unwrap(), world.bytes[at..][..1 << 17]);
            at += 1 << 17;
        }
        world.net.flying.load(Ordering::Relaxed) >= 6
    });
    assert!(world.net.most_flying.load(Ordering::Relaxed) <= 10, "and not without bounds");
    world.net.shut.send_replace(false);
    world.read_through(&reader, 1 << 17);
}

#[test]
fn closing_the_last_handle_ends_what_is_under_way() {
    let world = World::new(4 << 20);
    let content = world.content();
    let reader = world.open(&content);
    world.net.shut.send_replace(true);
    let task = world.runtime.spawn(async move { reader.read(0, 1 << 20).await });
    wait_until("it is asked for", || world.net.flying.load(Ordering::Relaxed) > 0);
    task.abort();
    wait_until("nothing is under way", || world.net.flying.load(Ordering::Relaxed) == 0);
}

#[test]
fn many_random_readers_of_one_file_fetch_each_group_once() {
    let world = World::new(24 << 20);
    let content = world.content();
    let tasks: Vec<_> = (0..500u64)
        .map(|n| {
            let (reader, bytes) = (world.open(&content), world.bytes.clone());
            world.runtime.spawn(async move {
                let mut at = n * 7_919;
                for _ in 0..20 {
                    at = (at * 6_364_136_223 + 1_442_695) % bytes.len() as u64;
                    let len = 1 + at as usize % 20_000;
                    let end = bytes.len().min(at as usize + len);
                    let read = match reader.try_read(at, len) {
                        Some(read) => read.unwrap(),
                        None => reader.read(at, len).await.unwrap(),
                    };
                    assert!(read == bytes[at as usize..end], "wrong bytes at {at}");
                }
            })
        })
        .collect();
    world.runtime.block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
    });
    let mut groups: Vec<u64> = world
        .net
        .asked()
        .into_iter()
        .flat_map(|(_, range)| range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES))
        .collect();
    let asked = groups.len();
    groups.sort_unstable();
    groups.dedup();
    assert_eq!(asked, groups.len(), "a group was fetched twice");
}

#[test]
fn a_file_larger_than_the_cache_is_read_right_and_hardly_more_than_once() {
    let mut world = World::new(12 << 20);
    world.limit_bytes = 3 << 20;
    let content = world.content();
    let reader = world.open(&content);
    world.read_through(&reader, 100_000);
    assert!(content.cache().stats().bytes <= world.limit_bytes);
    let fetched = world.net.fetched_bytes.load(Ordering::Relaxed);
    assert!(fetched <= world.bytes.len() as u64 * 5 / 4, "fetched {fetched}");
    assert!(reader.complete_file().is_none());
}

#[test]
fn what_was_fetched_is_there_after_a_restart_with_the_owner_gone() {
    let world = World::new(6 * GROUP);
    {
        let content = world.content();
        let reader = world.open(&content);
        world.read(&reader, 2 * GROUP, 2 * GROUP).unwrap();
        drop(reader);
        wait_until("the map is saved", || {
            let files = files_below(&world.cache_dir().join("content"));
            files.iter().any(|path| path.extension().is_some_and(|e| e == "map"))
        });
    }
    world.net.behave_all(Behaviour::Unreachable);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(
        world.read(&reader, 2 * GROUP, 2 * GROUP).unwrap(),
        world.bytes[2 * GROUP..4 * GROUP]
    );
    assert_eq!(world.read(&reader, 0, 1).unwrap_err().kind(), Kind::HostDown);
}

fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_byte_that_flipped_in_a_crash_of_the_machine_is_never_delivered() {
    let world = World::new(3 * GROUP);
    {
        let content = world.content();
        let reader = world.open(&content);
        world.read_through(&reader, GROUP);
        wait_until("the file is complete", || reader.complete_file().is_some());
    }
    let cached = &files_below(&world.cache_dir().join("content"))[0];
    let mut damaged = fs::read(cached).unwrap();
    damaged[GROUP + 3] ^= 1;
    fs::write(cached, damaged).unwrap();
    fs::write(world.cache_dir().join("boot"), "1\nanother boot\n").unwrap();
    let content = world.content();
    let reader = world.open(&content);
    assert!(reader.complete_file().is_none());
    world.read_through(&reader, 1000);
    let reports = content.reports();
    assert_eq!((reports.len(), reports[0].device), (1, ME));
}

#[test]
fn a_cache_directory_that_vanishes_fails_no_read() {
    let world = World::new(40 * GROUP);
    let content = world.content();
    let reader = world.open(&content);
    world.read(&reader, 0, 3 * GROUP).unwrap();
    let removed = || fs::remove_dir_all(world.cache_dir()).is_ok();
    wait_until("the directory is gone", removed);
    world.read_through(&reader, 50_000);
    drop(reader);
    // Something may still be written there.
    let replaced = || removed() && fs::write(world.cache_dir(), b"not a directory").is_ok();
    wait_until("a file is in its place", replaced);
    // What is still open needs the directory no more; what is opened afresh misses it.
    wait_until("the disk's error is told", || {
        let reader = world.open(&content);
        world.read_through(&reader, 50_000);
        world.read_through(&reader, 5_000_000);
        content.cache().stats().problem.is_some()
    });
}

#[test]
fn an_unhashed_version_streams_unproved_and_becomes_content_once_hashed() {
    let world = World::unhashed(20 * GROUP);
    let content = world.content();
    let reader = world.open(&content);
    assert_eq!(world.read(&reader, 9 * GROUP, 10).unwrap(), world.bytes[9 * GROUP..][..10]);
    assert_eq!(world.net.asked(), [(OWNER, 9 * GROUP_BYTES..10 * GROUP_BYTES)]);
    world.read_through(&reader, 50_000);
    wait_until("all groups are cached", || {
        (0..world.bytes.len()).step_by(GROUP).all(|at| reader.try_read(at as u64, 1).is_some())
    });
    assert!(reader.complete_file().is_none(), "nothing has verified it");
    drop(reader);

    let hashed = Entry { content: Some(ContentId::of(&world.bytes)), ..world.entry.clone() };
    let no = world.replicate(OWNER, &hashed);
    world.net.behave_all(Behaviour::Unreachable);
    let reader = content.open(no, &hashed).unwrap();
    world.read_through(&reader, 50_000);
    assert!(reader.complete_file().is_some());
    assert_eq!(content.cache().stats().files, 1);
}

#[test]
fn an_unhashed_version_that_proves_to_be_another_is_fetched_again() {
    let world = World::unhashed(2 * GROUP);
    world.net.behave(OWNER, Behaviour::FlipsABit);
    let content = world.content();
    let reader = world.open(&content);
    assert_ne!(world.read(&reader, 0, 2 * GROUP).unwrap(), world.bytes);
    wait_until("it is cached", || reader.try_read(0, 2 * GROUP).is_some());
    drop(reader);
    world.net.behave(OWNER, Behaviour::Serves);
    let hashed = Entry { content: Some(ContentId::of(&world.bytes)), ..world.entry.clone() };
    let no = world.replicate(OWNER, &hashed);
    let reader = content.open(no, &hashed).unwrap();
    world.read_through(&reader, 50_000);
    assert_eq!(content.reports().len(), 1);
}

#[test]
fn a_row_that_claims_a_monstrous_size_costs_nothing() {
    let world = World::new(GROUP);
    let content = world.content();
    let size = i64::MAX as u64;
    world.net.behave(OWNER, Behaviour::IsStale);
    let monster = Entry { attr: attr(FileType::File, size), ..world.entry.clone() };
    let reader = content.open(world.no(OWNER), &monster).unwrap();
    for at in [0, size / 2, size - 1] {
        assert!(reader.try_read(at, 10).is_none());
        let read = world.runtime.block_on(reader.read(at, 10));
        assert_eq!(read.unwrap_err().kind(), Kind::Stale);
    }
    assert_eq!(groups_of(size), 1 << 47);
}

/// A location of this device, with one file of two groups and a bit.
struct Own {
    world: World,
    folder: std::path::PathBuf,
    own: Arc<OwnFiles>,
    no: LocationNo,
    bytes: Vec<u8>,
}

const OWN_LOCATION: LocationId = LocationId([1; 16]);

impl Own {
    fn new() -> Self {
        let world = World::new(2 * GROUP + 100);
        let folder = world.dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let bytes = world.bytes.to_vec();
        fs::write(folder.join("film.mkv"), &bytes).unwrap();
        let own = world.own(Some(Arc::new(Root::open(&folder).unwrap())));
        let no = Self::share(&world, &folder, None);
        let own = Self { world, folder, own, no, bytes };
        own.observe();
        own
    }

    fn share(world: &World, folder: &Path, shared_with: Option<Vec<DeviceId>>) -> LocationNo {
        let location = NewLocation {
            id: OWN_LOCATION,
            owner: ME,
            name: "own".into(),
            root: Some(folder.to_owned()),
            read_only: false,
            shared_with,
        };
        world.index.put_location(location).unwrap().no
    }

    fn root(&self) -> Root {
        Root::open(&self.folder).unwrap()
    }

    fn observe(&self) {
        let (index, root) = (&self.world.index, self.root());
        index.observe_root(self.no, &root.observe_root().unwrap()).unwrap();
        index.observe_directory(self.no, FileId::ROOT, root.list(&[]).unwrap()).unwrap();
    }

    fn version(&self) -> Version {
        let view = self.world.index.view().unwrap();
        let entry = view.entry(self.no, FileId::ROOT, b"film.mkv").unwrap().unwrap();
        let (file, stamp, content) = (entry.file_id, entry.stamp(), entry.content);
        Version { location: OWN_LOCATION, file, stamp, content }
    }

    fn hashed(&self) -> Version {
        let Version { file, stamp, .. } = self.version();
        let content = ContentId::of(&self.bytes);
        assert!(self.world.index.set_content(self.no, file, &stamp, content).unwrap());
        self.version()
    }
}

fn is_stale(result: &Result<Fetched, FetchError>) -> bool {
    matches!(result, Err(FetchError::Stale))
}

#[test]
fn own_files_are_served_with_proof_also_when_their_tree_is_missing() {
    let own = Own::new();
    let version = own.version();
    let all = own.own.read(OWNER, &version, 0..version.stamp.size).unwrap();
    assert_eq!(all.bytes, own.bytes);
    assert!(all.proof.is_empty());
    let version = own.hashed();
    let (content, size) = (version.content.unwrap(), version.stamp.size);
    for range in [0..GROUP_BYTES, GROUP_BYTES..size, 2 * GROUP_BYTES..size, 0..size] {
        let fetched = own.own.read(OWNER, &version, range.clone()).unwrap();
        assert!(manifest::verify(content, size, range, &fetched.bytes, &fetched.proof));
    }
}

#[test]
fn an_asker_cannot_have_a_file_hashed_for_an_id_it_made_up() {
    let own = Own::new();
    let version = own.hashed();
    let made_up = Version { content: Some(ContentId([9; 32])), ..version.clone() };
    assert!(is_stale(&own.own.read(OWNER, &made_up, 0..GROUP_BYTES)));
    assert_eq!(own.own.rebuilt.load(Ordering::Relaxed), 0);
    assert!(own.own.read(OWNER, &version, 0..GROUP_BYTES).is_ok());
    assert_eq!(own.own.rebuilt.load(Ordering::Relaxed), 1);
}

#[test]
fn own_files_are_served_to_nobody_else_than_shared_with() {
    let own = Own::new();
    let version = own.version();
    Own::share(&own.world, &own.folder, Some(vec![OTHER]));
    assert!(matches!(own.own.read(OWNER, &version, 0..GROUP_BYTES), Err(FetchError::Refused)));
    assert!(own.own.read(OTHER, &version, 0..GROUP_BYTES).is_ok());
    assert!(own.own.read(ME, &version, 0..GROUP_BYTES).is_ok());
    let replica = Version { location: location_of(OWNER), ..version.clone() };
    assert!(matches!(own.own.read(OTHER, &replica, 0..GROUP_BYTES), Err(FetchError::Refused)));
    let unknown = Version { location: LocationId([77; 16]), ..version };
    assert!(matches!(own.own.read(OTHER, &unknown, 0..GROUP_BYTES), Err(FetchError::Refused)));
}

#[test]
fn a_range_off_the_borders_or_too_long_is_refused() {
    let own = Own::new();
    let version = own.version();
    let size = version.stamp.size;
    #[allow(clippy::reversed_empty_ranges)] // a peer may send one
    let ranges =
        [1..GROUP_BYTES, 0..GROUP_BYTES + 1, 0..size + 1, 0..0, 0..u64::MAX, GROUP_BYTES..0];
    for range in ranges {
        let read = own.own.read(OWNER, &version, range.clone());
        assert!(matches!(read, Err(FetchError::Failed(_))), "{range:?}");
    }
    let stamp = Stamp { size: u64::MAX, ..version.stamp };
    let monster = Version { stamp, ..version };
    assert!(own.own.read(OWNER, &monster, 0..MAX_FETCH_BYTES + GROUP_BYTES).is_err());
    assert!(is_stale(&own.own.read(OWNER, &monster, 0..GROUP_BYTES)));
}

#[test]
fn a_changed_file_is_stale_and_one_with_the_same_bytes_is_not() {
    let own = Own::new();
    let unhashed = own.version();
    let version = own.hashed();
    let path = own.folder.join("film.mkv");
    let read = |version: &Version| own.own.read(OWNER, version, 0..GROUP_BYTES);

    let mut permissions = fs::metadata(&path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
    fs::set_permissions(&path, permissions).unwrap();
    assert!(is_stale(&read(&unhashed)), "its stamp changed, and nothing else tells");
    assert_eq!(read(&version).unwrap().bytes, own.bytes[..GROUP]);
    own.observe();
    assert_eq!(read(&version).unwrap().bytes, own.bytes[..GROUP]);

    let mut changed = own.bytes.clone();
    changed[5] ^= 1;
    fs::write(&path, &changed).unwrap();
    assert!(is_stale(&read(&version)));
    own.observe();
    assert!(is_stale(&read(&version)));
    fs::write(&path, b"short").unwrap();
    assert!(is_stale(&read(&version)));
    fs::remove_file(&path).unwrap();
    assert!(is_stale(&read(&version)));
    own.observe();
    assert!(is_stale(&read(&version)));
}

/// The version as it was, and what can be read of it.
fn ranges_of(version: &Version) -> [Range<u64>; 4] {
    let size = version.stamp.size;
    [0..GROUP_BYTES, GROUP_BYTES..2 * GROUP_BYTES, 2 * GROUP_BYTES..size, 0..size]
}

fn append_to(path: &Path, bytes: &[u8]) {
    use std::io::Write;
    fs::OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

#[test]
fn a_version_is_served_from_the_file_that_grew_out_of_it() {
    let own = Own::new();
    let unhashed = own.version();
    let version = own.hashed();
    let (content, size) = (version.content.unwrap(), version.stamp.size);
    let path = own.folder.join("film.mkv");
    append_to(&path, &bytes_of(8, GROUP));
    assert!(is_stale(&own.own.read(OWNER, &unhashed, 0..GROUP_BYTES)), "nothing tells its bytes");
    for range in ranges_of(&version) {
        let fetched = own.own.read(OWNER, &version, range.clone()).unwrap();
        assert_eq!(fetched.bytes, own.bytes[range.start as usize..range.end as usize]);
        assert!(manifest::verify(content, size, range, &fetched.bytes, &fetched.proof));
    }
    // The index has the next version, too.
    own.observe();
    assert!(own.own.read(OWNER, &version, 0..size).is_ok());

    let mut first = fs::read(&path).unwrap();
    first[3] ^= 1;
    fs::write(&path, first).unwrap();
    let [changed, same, _, all] = ranges_of(&version);
    assert!(is_stale(&own.own.read(OWNER, &version, changed)));
    assert!(is_stale(&own.own.read(OWNER, &version, all)));
    let fetched = own.own.read(OWNER, &version, same).unwrap();
    assert_eq!(fetched.bytes, own.bytes[GROUP..2 * GROUP]);
}

#[test]
fn a_small_version_is_served_from_the_file_that_grew_out_of_it() {
    let mut own = Own::new();
    own.bytes.truncate(1000);
    let path = own.folder.join("film.mkv");
    fs::write(&path, &own.bytes).unwrap();
    own.observe();
    let version = own.hashed();
    append_to(&path, b"more");
    assert_eq!(own.own.read(OWNER, &version, 0..1000).unwrap().bytes, own.bytes);
    own.observe();
    assert_eq!(own.own.read(OWNER, &version, 0..1000).unwrap().bytes, own.bytes);
    own.bytes[0] ^= 1;
    fs::write(&path, [&own.bytes[..], b"more"].concat()).unwrap();
    assert!(is_stale(&own.own.read(OWNER, &version, 0..1000)));
}

#[test]
fn no_file_is_hashed_for_a_version_that_it_has_left() {
    let own = Own::new();
    let version = own.hashed();
    append_to(&own.folder.join("film.mkv"), b"more");
    own.observe();
    assert!(is_stale(&own.own.read(OWNER, &version, 0..GROUP_BYTES)), "its tree is gone");
    // Nor for one that never was: the hash of all bytes, said to be of a few.
    let grown = Own { bytes: fs::read(own.folder.join("film.mkv")).unwrap(), ..own };
    let version = grown.hashed();
    for size in [100, 2 * GROUP_BYTES] {
        let shorter = Version { stamp: Stamp { size, ..version.stamp }, ..version.clone() };
        let range = 0..size.min(GROUP_BYTES);
        assert!(is_stale(&grown.own.read(OWNER, &shorter, range)), "{size}");
    }
    assert_eq!(grown.own.rebuilt.load(Ordering::Relaxed), 0);
}

#[test]
fn a_version_is_served_while_the_file_grows() {
    let own = Own::new();
    let version = own.hashed();
    let size = version.stamp.size;
    assert!(own.own.read(OWNER, &version, 0..size).is_ok());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                append_to(&own.folder.join("film.mkv"), b"a line\n");
            }
        });
        let read = |_| own.own.read(OWNER, &version, 0..size).unwrap().bytes == own.bytes;
        let is_right = (0..500).all(read);
        stop.store(true, Ordering::Relaxed);
        assert!(is_right);
    });
}

#[test]
fn bytes_that_an_own_location_has_are_not_fetched() {
    let own = Own::new();
    own.hashed();
    own.world.net.behave_all(Behaviour::Unreachable);
    let content = own.world.content_with(own.own.clone());
    let reader = own.world.open(&content);
    own.world.read_through(&reader, 50_000);
    assert!(own.world.net.asked().is_empty());
}

/// Files of 4 KiB beside each other, which their owner has not hashed: the network gives the same
/// bytes for all of them, and the cache tells them apart.
struct Crowd {
    world: World,
    content: Arc<Content>,
}

impl Crowd {
    const FILES: u64 = 300;

    fn new() -> Self {
        Self::with_limit(1 << 30)
    }

    fn with_limit(limit_bytes: u64) -> Self {
        let mut world = World::unhashed(4096);
        world.limit_bytes = limit_bytes;
        let rows = (0..Self::FILES)
            .map(|n| row(3 + n, FileId::ROOT, &format!("small-{n:04}"), Self::entry(&world, n)));
        let (no, head) = (world.no(OWNER), Seq(2 + Self::FILES));
        world.index.apply_replica(no, 9, rows.collect(), head).unwrap();
        let content = world.content();
        Self { world, content }
    }

    fn entry(world: &World, n: u64) -> Entry {
        Entry { file_id: FileId(1000 + n), disk_ino: 5000 + n, ..world.entry.clone() }
    }

    fn open(&self, n: u64) -> Reader {
        let entry = Self::entry(&self.world, n);
        self.content.open(self.world.no(OWNER), &entry).unwrap()
    }

    /// As a program does: `open`, one `read`, `close`.
    fn read(&self, n: u64) {
        let read = self.world.read(&self.open(n), 0, 1 << 17).unwrap();
        assert!(read == self.world.bytes, "wrong bytes of {n}");
    }

    /// Each when what was done before is known: what is here before it is known that the one before
    /// it was read, does not count as the next.
    fn read_in_turn(&self, files: Range<u64>) {
        for n in files {
            self.settle();
            self.read(n);
        }
    }

    fn settle(&self) {
        wait_until("all that is fetched ahead has landed", || self.content.crowd_is_quiet());
    }

    fn is_here(&self, n: u64) -> bool {
        let entry = Self::entry(&self.world, n);
        let reader = self.content.open_quietly(self.world.no(OWNER), &entry).unwrap();
        reader.try_read(0, 4096).is_some()
    }

    fn here(&self) -> Vec<u64> {
        self.settle();
        let here = || -> Vec<u64> { (0..Self::FILES).filter(|n| self.is_here(*n)).collect() };
        wait_until("it is cached", || here().len() == self.world.net.asked().len());
        here()
    }
}

#[test]
fn after_three_small_files_in_order_the_next_ones_come_by_themselves() {
    let crowd = Crowd::new();
    crowd.read_in_turn(10..12);
    assert_eq!(crowd.here(), [10, 11]);
    crowd.read(12);
    assert_eq!(crowd.here(), (10..17).collect::<Vec<_>>());
    for n in 13..Crowd::FILES {
        crowd.read(n);
    }
    let asked = crowd.world.net.asked().len() as u64;
    assert_eq!(asked, Crowd::FILES - 10, "a file was fetched twice, or not at all");
    assert_eq!(crowd.content.cache().stats().fetched_bytes, asked * 4096);
}

#[test]
fn a_file_that_is_opened_while_it_is_fetched_ahead_is_not_fetched_again() {
    let crowd = Crowd::new();
    crowd.read_in_turn(0..3);
    crowd.settle();
    crowd.world.net.shut.send_replace(true);
    // Opening what came widens the window: more is asked for, and does not come.
    (3..7).for_each(|n| crowd.read(n));
    wait_until("several are under way at once", || {
        crowd.world.net.flying.load(Ordering::Relaxed) >= 4
    });
    let reader = crowd.open(7);
    assert!(reader.try_read(0, 4096).is_none());
    std::thread::scope(|scope| {
        let read = scope.spawn(|| crowd.world.read(&reader, 0, 4096).unwrap());
        crowd.world.net.shut.send_replace(false);
        assert!(read.join().unwrap() == crowd.world.bytes);
    });
    drop(reader);
    (8..Crowd::FILES).for_each(|n| crowd.read(n));
    assert_eq!(crowd.world.net.asked().len() as u64, Crowd::FILES);
}

#[test]
fn nothing_is_fetched_ahead_that_is_written_here_or_finds_no_room() {
    let crowd = Crowd::with_limit(64 << 10);
    crowd.content.attach(Box::new(|_, file| file == FileId(1003)));
    crowd.read_in_turn(0..3);
    // A quarter of the cache: four files.
    assert_eq!(crowd.here(), [0, 1, 2, 4, 5, 6, 7]);
    let tiny = Crowd::with_limit(12 << 10);
    tiny.read_in_turn(0..3);
    assert_eq!(tiny.here(), [0, 1, 2]);
}

#[test]
fn an_owner_that_fails_is_not_asked_for_more_than_is_read() {
    let crowd = Crowd::new();
    crowd.read_in_turn(0..3);
    crowd.settle();
    crowd.world.net.behave_all(Behaviour::Refuses);
    (3..7).for_each(|n| crowd.read(n));
    crowd.settle();
    let asked = crowd.world.net.asked().len();
    for n in 7..17 {
        let read = crowd.world.read(&crowd.open(n), 0, 4096);
        assert_eq!(read.unwrap_err().kind(), Kind::AccessDenied);
    }
    crowd.settle();
    assert_eq!(crowd.world.net.asked().len(), asked + 10);
    crowd.world.net.behave_all(Behaviour::Unreachable);
    (101..120).for_each(|n| {
        let read = crowd.world.read(&crowd.open(n), 0, 4096);
        assert_eq!(read.unwrap_err().kind(), Kind::HostDown);
    });
    crowd.settle();
    assert_eq!(crowd.world.net.asked().len(), asked + 10);
}
