//! Pins, with a network made up: an owner with folders of files, that answers or is away.

use super::*;
use crate::content::cache::Limits;
use crate::content::{Cache, ContentConfig, Manifest, Manifests, OwnFiles};
use crate::error::{FsError, Kind};
use crate::index::{Index, LogRow, NewLocation, ROOT_PARENT, open_store};
use crate::model::{Attr, ContentId, Entry, Name, Seq};
use crate::source::{BoxFuture, ContentSource, FetchError, Fetched, Version};
use bytes::Bytes;
use std::fs;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::runtime::Runtime;
use tokio::sync::watch;

const ME: DeviceId = DeviceId([1; 32]);
const OWNER: DeviceId = DeviceId([2; 32]);
const LOCATION: LocationId = LocationId([2; 16]);
const DIR: FileId = FileId(2);
const OTHERS: FileId = FileId(3);
/// A file's, if nothing else is said; a multiple of a block.
const SIZE: u64 = 100 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// The made up network.
struct Net {
    contents: Mutex<HashMap<ContentId, (Bytes, Manifest)>>,
    is_away: AtomicBool,
    asked: AtomicUsize,
    /// While shut, requests for these wait.
    shut: watch::Sender<HashSet<FileId>>,
}

impl ContentSource for Net {
    fn is_reachable(&self, _: DeviceId) -> bool {
        !self.is_away.load(Ordering::Relaxed)
    }

    fn fetch<'a>(
        &'a self,
        _: DeviceId,
        version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let mut shut = self.shut.subscribe();
            shut.wait_for(|shut| !shut.contains(&version.file)).await.unwrap();
            if self.is_away.load(Ordering::Relaxed) {
                return Err(FetchError::Unreachable);
            }
            let contents = lock(&self.contents);
            let Some((bytes, manifest)) = contents.get(&version.content.unwrap()) else {
                return Err(FetchError::Stale);
            };
            let proof = manifest.proof(range.clone()).unwrap();
            let bytes = bytes.slice(range.start as usize..range.end as usize);
            Ok(Fetched { bytes, proof })
        })
    }
}

fn bytes_of(seed: u64, size: u64) -> Bytes {
    let mut bytes = vec![0; size as usize];
    blake3::Hasher::new_derive_key(&seed.to_string()).finalize_xof().fill(&mut bytes);
    bytes.into()
}

fn entry(file: FileId, file_type: FileType, size: u64, content: Option<ContentId>) -> Entry {
    let time = Time { secs: 1_700_000_000, nanos: 5 };
    let attr = Attr {
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
    };
    Entry { file_id: file, disk_ino: file.0 + 100, generation: 1, attr, content, target: None }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

/// Pins with their keeper, which ends with them.
struct Running {
    pins: Arc<Pins>,
    task: tokio::task::JoinHandle<()>,
}

impl std::ops::Deref for Running {
    type Target = Pins;

    fn deref(&self) -> &Pins {
        &self.pins
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
        wait_until("its end", || self.task.is_finished());
    }
}

/// This device, with the replica of a location with the folders `pinned` and `others`.
struct World {
    runtime: Runtime,
    dir: tempfile::TempDir,
    index: Index,
    net: Arc<Net>,
    seq: u64,
    log_id: u64,
    limits: Limits,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("index");
        fs::create_dir_all(&index).unwrap();
        let index = Index::open(open_store(&index).unwrap().store, ME).unwrap();
        let net = Net {
            contents: Mutex::default(),
            is_away: false.into(),
            asked: 0.into(),
            shut: watch::Sender::new(HashSet::new()),
        };
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let mut world = Self {
            runtime: runtime.unwrap(),
            dir,
            index,
            net: Arc::new(net),
            seq: 0,
            log_id: 9,
            limits: Limits { limit_bytes: 1 << 30, min_free_bytes: 0, holds: false },
        };
        world.announce();
        world.begin_log();
        world
    }

    fn announce(&self) {
        let location = NewLocation {
            id: LOCATION,
            owner: OWNER,
            name: "files".into(),
            root: None,
            read_only: false,
            shared_with: None,
        };
        self.index.put_location(location).unwrap();
    }

    fn begin_log(&mut self) {
        self.seq = 0;
        self.index.reset_replica(self.no(), self.log_id).unwrap();
        self.dir(ROOT_PARENT, "root", FileId::ROOT);
        self.dir(FileId::ROOT, "pinned", DIR);
        self.dir(FileId::ROOT, "others", OTHERS);
    }

    fn no(&self) -> LocationNo {
        self.index.location_by_id(LOCATION).unwrap().no
    }

    fn row(&mut self, parent: FileId, text: &str, entry: Option<Entry>) {
        self.rows(vec![(parent, text, entry)]);
    }

    fn rows(&mut self, rows: Vec<(FileId, impl AsRef<str>, Option<Entry>)>) {
        let rows = rows.into_iter().map(|(parent, text, entry)| {
            self.seq += 1;
            LogRow { seq: Seq(self.seq), parent, name: name(text.as_ref()), entry }
        });
        let rows = rows.collect();
        self.index.apply_replica(self.no(), self.log_id, rows, Seq(self.seq)).unwrap();
    }

    fn dir(&mut self, parent: FileId, text: &str, file: FileId) {
        self.row(parent, text, Some(entry(file, FileType::Directory, 0, None)));
    }

    fn entry_of(&self, file: FileId, seed: u64, size: u64) -> Entry {
        let bytes = bytes_of(seed, size);
        let (content, manifest) = Manifest::of_bytes(&bytes);
        lock(&self.net.contents).insert(content, (bytes, manifest));
        entry(file, FileType::File, size, Some(content))
    }

    /// A file, the bytes of which have this seed.
    fn file(&mut self, parent: FileId, text: &str, file: u64, seed: u64) -> Entry {
        self.file_of(parent, text, file, seed, SIZE)
    }

    fn file_of(&mut self, parent: FileId, text: &str, file: u64, seed: u64, size: u64) -> Entry {
        let entry = self.entry_of(FileId(file), seed, size);
        self.row(parent, text, Some(entry.clone()));
        entry
    }

    /// Files of a folder, from an id on.
    fn files(&mut self, parent: FileId, from: u64, count: u64) -> Vec<Entry> {
        let entries = (from..from + count).map(|n| self.entry_of(FileId(n), n, SIZE));
        let entries: Vec<_> = entries.collect();
        let row = |entry: &Entry| (parent, entry.file_id.0.to_string(), Some(entry.clone()));
        self.rows(entries.iter().map(row).collect());
        entries
    }

    fn pin_file(&self) -> PathBuf {
        self.dir.path().join("pins.json")
    }

    /// As after a start of the daemon, but nothing is looked at yet.
    fn begin(&self) -> Arc<Pins> {
        let file = PinFile::open(&self.pin_file()).unwrap();
        let limits = Limits { holds: file.holds(), ..self.limits };
        let cache = Arc::new(Cache::open_within(&self.dir.path().join("cache"), limits));
        let manifests = Manifests::open(&self.dir.path().join("manifests")).unwrap();
        let roots = Box::new(move |_| Err(FsError::from(Kind::NotFound)));
        let own = Arc::new(OwnFiles::with_roots(self.index.clone(), roots, Arc::new(manifests)));
        let (net, runtime) = (self.net.clone(), self.runtime.handle().clone());
        let config = ContentConfig { read_deadline: PATIENCE, ..ContentConfig::default() };
        Pins::new(file, Content::new(self.index.clone(), own, cache, net, config, runtime))
    }

    fn start(&self) -> Running {
        let pins = self.begin();
        let task = self.runtime.spawn(pins.clone().tend());
        Running { pins, task }
    }

    fn start_pinned(&self) -> Running {
        let pins = self.start();
        assert!(pin(&pins, self.no(), DIR).unwrap());
        pins
    }

    fn read(&self, pins: &Pins, entry: &Entry) -> Option<Bytes> {
        let reader = pins.content.open(self.no(), entry).unwrap();
        let size = entry.attr.size as usize;
        let read = || self.runtime.block_on(reader.read(0, size));
        reader.try_read(0, size).unwrap_or_else(read).ok()
    }

    fn is_here(&self, pins: &Pins, entry: &Entry) -> bool {
        pins.content.cache.kept(&Version::of(LOCATION, entry)).is_whole
    }

    /// What is read passes through the cache, twice as much as it may keep.
    fn churn(&mut self, pins: &Pins) {
        let files = 2 * pins.content.cache.stats().limit_bytes / SIZE;
        let from = self.seq * 1000 + 10_000;
        for entry in self.files(OTHERS, from, files) {
            assert_eq!(self.read(pins, &entry).unwrap().len() as u64, SIZE);
        }
    }

    fn away(&self, is_away: bool) {
        self.net.is_away.store(is_away, Ordering::Relaxed);
    }

    fn shut(&self, files: &[Entry]) {
        self.net.shut.send_replace(files.iter().map(|entry| entry.file_id).collect());
    }
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn standing(pins: &Pins) -> Standing {
    pins.list()[0].standing.clone()
}

fn wait_here(pins: &Pins) {
    wait_until("everything pinned is here", || standing(pins) == Standing::Here);
}

fn pin(pins: &Pins, no: LocationNo, file: FileId) -> Result<bool, PinError> {
    let is_new = pins.pin(no, file)?;
    pins.catch_up().unwrap();
    Ok(is_new)
}

fn unpin(pins: &Pins, location: LocationId, file: FileId) -> Result<bool, PinError> {
    let was_pinned = pins.unpin(location, file)?;
    pins.catch_up().unwrap();
    Ok(was_pinned)
}

#[test]
fn what_is_below_a_pin_comes_by_itself_and_is_never_evicted() {
    let mut world = World::new();
    world.limits.limit_bytes = 12 * SIZE;
    let deeper = FileId(4);
    world.dir(DIR, "deeper", deeper);
    let files = [world.files(DIR, 10, 4), world.files(deeper, 20, 4)].concat();
    world.file_of(DIR, "empty", 30, 0, 0);
    let pins = world.start_pinned();
    wait_here(&pins);
    let tally = pins.list()[0].tally;
    assert_eq!((tally.files, tally.here_files, tally.bytes), (9, 9, 8 * SIZE));
    assert_eq!(tally.here_bytes, tally.bytes);
    world.churn(&pins);
    assert!(pins.content.cache.stats().bytes <= 12 * SIZE + SIZE);
    world.away(true);
    for file in &files {
        assert!(world.read(&pins, file).is_some());
    }
    wait_until("others fill it", || pins.content.cache.clearable_bytes() == 4 * SIZE);
    assert_eq!(pins.content.cache.clear(), 4 * SIZE);
    files.iter().for_each(|file| assert!(world.is_here(&pins, file)));
}

#[test]
fn after_a_start_nothing_goes_before_it_is_known_what_is_pinned() {
    let mut world = World::new();
    world.limits.limit_bytes = 6 * SIZE;
    let files = world.files(DIR, 10, 4);
    let loose = world.files(OTHERS, 50, 2);
    {
        let pins = world.start_pinned();
        wait_here(&pins);
        loose.iter().for_each(|file| drop(world.read(&pins, file)));
        wait_until("they are kept", || loose.iter().all(|file| world.is_here(&pins, file)));
        pins.content.cache.close();
    }
    let pins = world.begin();
    assert!(pins.list().iter().all(|pin| pin.standing == Standing::Unknown));
    world.churn(&pins);
    files.iter().chain(&loose).for_each(|file| assert!(world.is_here(&pins, file)));
    pins.pass().unwrap();
    world.churn(&pins);
    files.iter().for_each(|file| assert!(world.is_here(&pins, file)));
    loose.iter().for_each(|file| assert!(!world.is_here(&pins, file), "was not pinned"));
}

#[test]
fn new_changed_renamed_and_moved_files_are_followed() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 3);
    let outside = world.files(OTHERS, 50, 1);
    let pins = world.start_pinned();
    wait_here(&pins);

    let new = world.file(DIR, "new", 20, 20);
    wait_until("the new file came", || world.is_here(&pins, &new));
    // Another version, under the same name.
    let changed = world.file(DIR, "10", 10, 1010);
    wait_until("the new version came", || world.is_here(&pins, &changed));
    // Into the folder, and out of it.
    world.rows(vec![(OTHERS, "50", None), (DIR, "moved", Some(outside[0].clone()))]);
    wait_until("what was moved in came", || world.is_here(&pins, &outside[0]));
    world.rows(vec![(DIR, "11", None), (OTHERS, "11", Some(files[1].clone()))]);
    // The folder itself.
    let renamed = entry(DIR, FileType::Directory, 0, None);
    world.rows(vec![(FileId::ROOT, "pinned", None), (OTHERS, "called so", Some(renamed))]);
    wait_until("the pin knows", || {
        pins.list()[0].pin.path == [name("others"), name("called so")]
            && pins.list()[0].tally.files == 4
    });
    wait_here(&pins);
    pins.catch_up().unwrap();
    pins.content.cache.clear();
    for file in [&changed, &new, &outside[0], &files[2]] {
        assert!(world.is_here(&pins, file), "pinned");
    }
    assert!(!world.is_here(&pins, &files[0]), "the old version is not pinned");
    assert!(!world.is_here(&pins, &files[1]), "what was moved away is not pinned");
}

#[test]
fn a_pinned_file_that_is_replaced_under_its_name_stays_pinned() {
    let mut world = World::new();
    world.files(DIR, 10, 1);
    let pins = world.start();
    pin(&pins, world.no(), FileId(10)).unwrap();
    wait_here(&pins);
    let other = world.file(DIR, "10", 77, 77);
    wait_until("the other file came", || world.is_here(&pins, &other));
    assert_eq!(pins.list()[0].pin.file, FileId(77));
    world.row(DIR, "10", None);
    wait_until("it is gone", || standing(&pins) == Standing::Gone);
    assert!(unpin(&pins, LOCATION, FileId(77)).unwrap());
    assert!(pins.list().is_empty() && !unpin(&pins, LOCATION, FileId(77)).unwrap());
}

#[test]
fn what_is_unpinned_may_be_evicted_unless_another_pin_wants_it() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 3);
    // The same bytes, elsewhere.
    world.file(OTHERS, "twin", 60, 11);
    let pins = world.start_pinned();
    pin(&pins, world.no(), FileId(10)).unwrap();
    pin(&pins, world.no(), FileId(60)).unwrap();
    wait_until("all is here", || pins.list().iter().all(|p| p.standing == Standing::Here));
    let evict = |file| pins.evict(world.no(), file, false).unwrap();
    let evicted = evict(DIR);
    assert_eq!((evicted.freed_bytes, evicted.pinned_bytes), (0, 3 * SIZE));
    assert!(unpin(&pins, LOCATION, DIR).unwrap());
    let evicted = evict(DIR);
    assert_eq!((evicted.freed_bytes, evicted.pinned_bytes), (SIZE, 2 * SIZE));
    let here = files.iter().map(|file| world.is_here(&pins, file)).collect::<Vec<_>>();
    assert_eq!(here, [true, true, false]);
    let above = |file| pins.covering(world.no(), file).unwrap().map(|pin| pin.file);
    assert_eq!([above(FileId(10)), above(FileId(11)), above(DIR)], [Some(FileId(10)), None, None]);
}

#[test]
fn what_is_open_is_not_evicted() {
    let mut world = World::new();
    let files = world.files(OTHERS, 10, 2);
    let pins = world.start();
    files.iter().for_each(|file| drop(world.read(&pins, file)));
    wait_until("they are kept", || files.iter().all(|file| world.is_here(&pins, file)));
    let reader = pins.content.open(world.no(), &files[0]).unwrap();
    let would = || pins.evict(world.no(), OTHERS, true).unwrap();
    wait_until("one is open", || would().open_bytes == SIZE);
    assert_eq!((would().freed_bytes, pins.content.cache.stats().bytes), (SIZE, 2 * SIZE));
    let evicted = pins.evict(world.no(), OTHERS, false).unwrap();
    assert_eq!((evicted.freed_bytes, evicted.open_bytes), (SIZE, SIZE));
    world.away(true);
    assert_eq!(reader.try_read(0, 9).unwrap().unwrap(), bytes_of(10, 9));
    assert_eq!(pins.content.cache.stats().bytes, SIZE);
}

#[test]
fn where_not_everything_fits_what_fits_is_kept_and_the_rest_comes_when_there_is_room() {
    let mut world = World::new();
    world.limits.limit_bytes = 5 * SIZE;
    let large = world.file_of(DIR, "0", 9, 9, 8 * SIZE);
    let files = world.files(DIR, 10, 3);
    let pins = world.start_pinned();
    let excess = Excess { of_limit_bytes: 6 * SIZE, of_disk_bytes: 0 };
    wait_until("it is told by how much", || pins.excess() == excess);
    wait_until("the others came", || files.iter().all(|file| world.is_here(&pins, file)));
    wait_until("it is told", || standing(&pins) == Standing::CacheFull);
    assert!(pins.content.cache.kept(&Version::of(LOCATION, &large)).bytes == 0);
    world.churn(&pins);
    assert!(pins.content.cache.stats().bytes <= 5 * SIZE);
    assert_eq!(world.read(&pins, &large).unwrap(), bytes_of(9, 8 * SIZE));
    pins.content.cache.set_limit(20 * SIZE);
    pins.try_again();
    wait_here(&pins);
    assert_eq!(pins.excess(), Excess::default());
    // Less than is pinned: nothing goes, and reads bypass.
    pins.content.cache.set_limit(SIZE);
    let other = world.files(OTHERS, 50, 1);
    assert_eq!(world.read(&pins, &other[0]).unwrap(), bytes_of(50, SIZE));
    assert!(!world.is_here(&pins, &other[0]));
    assert_eq!(pins.content.cache.stats().held_bytes, 11 * SIZE);
}

#[test]
fn the_disk_keeps_what_it_is_to_have_free() {
    let mut world = World::new();
    world.limits.min_free_bytes = 1 << 60;
    let files = world.files(DIR, 10, 2);
    let pins = world.start_pinned();
    assert!(pins.excess().of_disk_bytes > 0);
    wait_until("it is told", || standing(&pins) == Standing::DiskFull);
    assert_eq!(world.read(&pins, &files[0]).unwrap(), bytes_of(10, SIZE));
    // What is offered to the cache is so after the reader has it.
    wait_until("nothing is kept", || pins.content.cache.stats().bytes == 0);
    assert!(!world.is_here(&pins, &files[0]));
}

#[test]
fn with_its_owner_away_the_rest_waits_and_comes_when_it_is_back() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 3);
    world.away(true);
    let pins = world.start_pinned();
    assert_eq!(standing(&pins), Standing::Offline);
    wait_until("it was thought about", || lock(&pins.state).passed_news > 0);
    assert_eq!(world.net.asked.load(Ordering::Relaxed), 0);
    world.away(false);
    wait_here(&pins);
    assert!(files.iter().all(|file| world.is_here(&pins, file)));
}

#[test]
fn while_a_program_waits_for_bytes_nothing_is_fetched_for_pins() {
    let mut world = World::new();
    let waited_for = world.files(OTHERS, 50, 1);
    let files = world.files(DIR, 10, 3);
    world.shut(&waited_for);
    let pins = world.start();
    let reader = pins.content.open(world.no(), &waited_for[0]).unwrap();
    let read = world.runtime.spawn(async move { reader.read(0, 10).await });
    wait_until("it is asked for", || world.net.asked.load(Ordering::Relaxed) == 1);
    pin(&pins, world.no(), DIR).unwrap();
    // Long enough for all of it to come.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(world.net.asked.load(Ordering::Relaxed), 1);
    assert_eq!(standing(&pins), Standing::Fetching);
    world.shut(&[]);
    assert!(world.runtime.block_on(read).unwrap().is_ok());
    wait_here(&pins);
    assert!(files.iter().all(|file| world.is_here(&pins, file)));
}

#[test]
fn while_rows_are_missing_nothing_that_was_pinned_is_let_go() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 3);
    let pins = world.start_pinned();
    wait_here(&pins);
    // Its owner lost its index: the rows come again, with other ids.
    world.log_id = 10;
    world.index.reset_replica(world.no(), 10).unwrap();
    pins.pass().unwrap();
    assert_eq!(standing(&pins), Standing::Unknown);
    pins.content.cache.clear();
    assert!(files.iter().all(|file| world.is_here(&pins, file)));
    world.seq = 0;
    world.rows(vec![
        (ROOT_PARENT, "root", Some(entry(FileId::ROOT, FileType::Directory, 0, None))),
        // What was the folder's id is another one's.
        (FileId::ROOT, "others", Some(entry(DIR, FileType::Directory, 0, None))),
        (FileId::ROOT, "pinned", Some(entry(OTHERS, FileType::Directory, 0, None))),
    ]);
    world.files(OTHERS, 10, 3);
    wait_until("it was found by its path", || {
        standing(&pins) == Standing::Here && pins.list()[0].tally.files == 3
    });
    pins.content.cache.clear();
    assert!(files.iter().all(|file| world.is_here(&pins, file)));
}

#[test]
fn a_location_that_is_removed_lets_go_and_one_that_was_lost_does_not() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 2);
    {
        let pins = world.start_pinned();
        wait_here(&pins);
        pins.content.cache.close();
    }
    world.index.remove_location(world.no()).unwrap();
    let pins = world.begin();
    pins.pass().unwrap();
    assert_eq!(standing(&pins), Standing::Unknown, "its index may have been lost");
    pins.content.cache.clear();
    assert!(files.iter().all(|file| world.is_here(&pins, file)));

    world.announce();
    world.begin_log();
    world.files(DIR, 10, 2);
    pins.pass().unwrap();
    assert_eq!(standing(&pins), Standing::Here);
    world.index.remove_location(world.no()).unwrap();
    pins.pass().unwrap();
    assert_eq!(standing(&pins), Standing::Gone);
    pins.content.cache.clear();
    assert!(!files.iter().any(|file| world.is_here(&pins, file)));
    assert!(PinFile::open(&world.pin_file()).unwrap().pins()[0].gone);
}

#[test]
fn a_crash_of_the_machine_leaves_pins_and_has_their_content_checked() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 2);
    let cache = world.dir.path().join("cache");
    {
        let pins = world.start_pinned();
        wait_here(&pins);
    }
    fs::write(cache.join("boot"), "1\nanother boot\n").unwrap();
    let hex = files[0].content.unwrap().to_string();
    fs::write(cache.join("content").join(&hex[..2]).join(&hex), bytes_of(999, SIZE)).unwrap();
    let before = world.net.asked.load(Ordering::Relaxed);
    let pins = world.start();
    wait_here(&pins);
    assert!(world.net.asked.load(Ordering::Relaxed) > before, "the damaged one came again");
    world.away(true);
    for (file, seed) in files.iter().zip([10, 11]) {
        assert_eq!(world.read(&pins, file).unwrap(), bytes_of(seed, SIZE));
    }
}

#[test]
fn own_files_links_and_what_is_not_there_cannot_be_pinned() {
    let mut world = World::new();
    let mut link = entry(FileId(20), FileType::Symlink, 1, None);
    link.target = Some(b"x".to_vec().into());
    world.row(DIR, "link", Some(link));
    let pins = world.begin();
    let own = NewLocation {
        id: LocationId::new(ME, [1; 8]),
        owner: ME,
        name: "own".into(),
        root: Some(world.dir.path().to_owned()),
        read_only: false,
        shared_with: None,
    };
    let own = world.index.put_location(own).unwrap().no;
    assert!(matches!(pin(&pins, own, FileId::ROOT), Err(PinError::Own)));
    assert!(matches!(pin(&pins, world.no(), FileId(20)), Err(PinError::NoContent)));
    assert!(matches!(pin(&pins, world.no(), FileId(21)), Err(PinError::NotThere)));
    assert!(pin(&pins, world.no(), DIR).unwrap());
    assert!(!pin(&pins, world.no(), DIR).unwrap(), "it is pinned already");
    assert_eq!(pins.list().len(), 1);
}

#[test]
fn a_list_of_a_newer_program_is_refused_and_a_damaged_one_lets_nothing_go() {
    let mut world = World::new();
    let files = world.files(DIR, 10, 2);
    {
        let pins = world.start_pinned();
        wait_here(&pins);
        pins.content.cache.close();
    }
    let text = fs::read_to_string(world.pin_file()).unwrap();
    fs::write(world.pin_file(), text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    let refused = PinFile::open(&world.pin_file());
    assert!(matches!(refused, Err(PinError::Newer { found: 2, .. })));
    fs::write(world.pin_file(), &text[..text.len() / 2]).unwrap();
    let damaged = fs::read(world.pin_file()).unwrap();
    for _start in 0..2 {
        let pins = world.begin();
        assert_eq!(pins.file().damaged(), Some(world.pin_file()));
        pins.pass().unwrap();
        pins.content.cache.clear();
        assert!(files.iter().all(|file| world.is_here(&pins, file)));
        pins.content.cache.close();
    }
    let pins = world.start_pinned();
    let aside = pins.file().damaged().unwrap();
    assert_eq!(fs::read(aside).unwrap(), damaged);
    assert_eq!(PinFile::open(&world.pin_file()).unwrap().pins().len(), 1);
    pins.content.cache.clear();
    assert!(files.iter().all(|file| world.is_here(&pins, file)));
}

#[test]
fn a_walk_through_folders_that_are_in_themselves_ends() {
    let mut world = World::new();
    world.files(DIR, 10, 3000);
    let loop_in = |file| Some(entry(file, FileType::Directory, 0, None));
    world.rows(vec![
        (DIR, "a", loop_in(FileId(5))),
        (FileId(5), "b", loop_in(FileId(6))),
        (FileId(6), "up", loop_in(FileId(5))),
        (FileId(6), "top", loop_in(DIR)),
    ]);
    world.file(FileId(6), "last", 9, 9);
    let view = world.index.view().unwrap();
    let node = view.node(world.no(), DIR).unwrap().unwrap();
    let mut walk = Walk::begin(world.no(), &node.entry);
    let (mut files, mut steps) = (0, 1);
    while walk.step(&view, &mut |_| files += 1).unwrap() {
        steps += 1;
    }
    assert_eq!((files, steps), (3001, 3));
}
