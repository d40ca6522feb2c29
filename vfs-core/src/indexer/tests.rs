use super::place::Job;
use super::scan::is_gone;
use super::watch::Hint;
use super::*;
use crate::index::{NewLocation, ROOT_PARENT, open_store};
use crate::model::{ContentId, DeviceId, Entry, FileType, LocationId, Name};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const ME: DeviceId = DeviceId([1; 32]);
const DEADLINE: Duration = Duration::from_secs(120);

/// A device with one location, on a real disk.
pub(super) struct Device {
    base: tempfile::TempDir,
    config: IndexerConfig,
    pub(super) index: Index,
    pub(super) indexer: Arc<Indexer>,
    pub(super) no: LocationNo,
}

/// With so few watches that the file system is marked, where that can be done.
fn marked() -> IndexerConfig {
    IndexerConfig { watches: 2, ..quick() }
}

pub(super) fn quick() -> IndexerConfig {
    IndexerConfig {
        settle: Duration::from_millis(50),
        root_check: Duration::from_millis(50),
        rescan_after: Duration::from_millis(100),
        ..IndexerConfig::default()
    }
}

impl Device {
    /// With an empty folder; nothing is watched before [`Self::start`].
    pub(super) fn new(config: IndexerConfig) -> Self {
        let base = tempfile::tempdir().unwrap();
        fs::create_dir(base.path().join("folder")).unwrap();
        Self::on(base, config)
    }

    fn on(base: tempfile::TempDir, config: IndexerConfig) -> Self {
        let store = open_store(&base.path().join("index")).unwrap().store;
        let index = Index::open(store, ME).unwrap();
        let location = NewLocation {
            id: LocationId([7; 16]),
            owner: ME,
            name: "folder".into(),
            root: Some(base.path().join("folder")),
            read_only: false,
            shared_with: None,
        };
        let no = index.put_location(location).unwrap().no;
        let manifests = Manifests::open(&base.path().join("manifests")).unwrap();
        let indexer = Indexer::start(index.clone(), Arc::new(manifests), config.clone());
        Self { base, config, index, indexer, no }
    }

    /// Stops everything and starts anew on the same disk.
    fn restart(self) -> Self {
        let Self { base, config, index, indexer, .. } = self;
        indexer.stop();
        index.flush().unwrap();
        drop((indexer, index));
        Self::on(base, config)
    }

    pub(super) fn start(&self) {
        self.indexer.watch(self.no);
        self.until("a whole scan", || self.progress().indexed);
    }

    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.base.path().join("folder").join(path)
    }

    fn progress(&self) -> Progress {
        self.indexer.progress(self.no)
    }

    pub(super) fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done() {
            let progress = self.indexer.progress(self.no);
            assert!(Instant::now() < deadline, "no {what} in time: {progress:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Its directories are not watched one by one, where a mark can be set.
    fn is_marked(&self) {
        let folder = fs::File::open(self.at("")).unwrap();
        let can_be = mark::Mark::set(folder.as_fd());
        if can_be.inspect_err(|e| println!("not tested with a mark: {e}")).is_ok() {
            let watcher = self.indexer.core.watcher.as_ref().unwrap();
            assert_eq!(watcher.directories(self.no), []);
        }
    }

    pub(super) fn entry(&self, path: &str) -> Option<Entry> {
        let names: Vec<_> = path.split('/').map(|n| Name::new(n.as_bytes()).unwrap()).collect();
        self.index.view().unwrap().resolve(self.no, &names).unwrap()
    }

    fn rows(&self) -> BTreeMap<PathBuf, Row> {
        let view = self.index.view().unwrap();
        let mut rows = BTreeMap::new();
        let mut open = vec![(PathBuf::new(), FileId::ROOT)];
        if let Some(root) = view.entry(self.no, ROOT_PARENT, b"root").unwrap() {
            rows.insert(PathBuf::new(), Row::of_entry(&root));
        }
        while let Some((path, dir)) = open.pop() {
            view.children(self.no, dir, None, &mut |name, entry| {
                let path = path.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
                if entry.attr.file_type == FileType::Directory {
                    open.push((path.clone(), entry.file_id));
                }
                rows.insert(path, Row::of_entry(entry));
                ControlFlow::Continue(())
            })
            .unwrap();
        }
        rows
    }

    fn disk(&self) -> BTreeMap<PathBuf, Row> {
        let folder = self.at("");
        let mut rows = BTreeMap::from([(PathBuf::new(), Row::of_disk(&folder))]);
        let mut open = vec![PathBuf::new()];
        while let Some(path) = open.pop() {
            for entry in fs::read_dir(folder.join(&path)).unwrap() {
                let entry = entry.unwrap();
                let path = path.join(entry.file_name());
                if entry.file_type().unwrap().is_dir() {
                    open.push(path.clone());
                }
                rows.insert(path, Row::of_disk(&entry.path()));
            }
        }
        rows
    }

    /// Waits until the index has what the disk has.
    pub(super) fn follows(&self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let (rows, disk) = (self.rows(), self.disk());
            if rows == disk {
                return;
            }
            if Instant::now() > deadline {
                for path in
                    rows.keys().chain(disk.keys()).collect::<std::collections::BTreeSet<_>>()
                {
                    if rows.get(path) != disk.get(path) {
                        eprintln!("{path:?}: {:?}, on disk {:?}", rows.get(path), disk.get(path));
                    }
                }
                panic!("the index does not follow: {:?}", self.progress());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until every file is hashed, and checks each.
    pub(super) fn hashes(&self) {
        self.until("hash of everything", || {
            self.progress().state == State::Idle && self.progress().files_to_hash == 0
        });
        for (path, row) in self.rows() {
            if row.file_type == FileType::File {
                let bytes = fs::read(self.at("").join(&path)).unwrap();
                let entry = self.resolve(&path);
                assert_eq!(entry.content, Some(ContentId::of(&bytes)), "{path:?}");
            }
        }
    }

    fn resolve(&self, path: &Path) -> Entry {
        let name = |part: std::path::Component<'_>| Name::new(part.as_os_str().as_bytes()).unwrap();
        let names: Vec<_> = path.components().map(name).collect();
        self.index.view().unwrap().resolve(self.no, &names).unwrap().unwrap()
    }
}

/// What a walk of the disk and the index must agree on.
#[derive(PartialEq, Eq, Debug)]
struct Row {
    file_type: FileType,
    ino: u64,
    mode: u32,
    nlink: u64,
    size: u64,
    mtime: (i64, i64),
    target: Option<Vec<u8>>,
}

impl Row {
    fn of_entry(entry: &Entry) -> Self {
        let attr = &entry.attr;
        Self {
            file_type: attr.file_type,
            ino: entry.disk_ino,
            mode: attr.perm.into(),
            nlink: attr.nlink.into(),
            size: attr.size,
            mtime: (attr.mtime.secs, attr.mtime.nanos.into()),
            target: entry.target.as_ref().map(|t| t.to_vec()),
        }
    }

    fn of_disk(path: &Path) -> Self {
        use std::os::unix::fs::FileTypeExt;
        let meta = fs::symlink_metadata(path).unwrap();
        let kind = meta.file_type();
        let file_type = match () {
            () if kind.is_dir() => FileType::Directory,
            () if kind.is_symlink() => FileType::Symlink,
            () if kind.is_fifo() => FileType::Fifo,
            () if kind.is_socket() => FileType::Socket,
            () => FileType::File,
        };
        let target = kind.is_symlink().then(|| fs::read_link(path).unwrap());
        Self {
            file_type,
            ino: meta.ino(),
            mode: meta.mode() & 0o7777,
            nlink: meta.nlink(),
            size: meta.size(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            target: target.map(|t| t.as_os_str().as_bytes().to_vec()),
        }
    }
}

pub(super) fn populate(folder: &Path, directories: usize, files: usize) {
    for d in 0..directories {
        let dir = folder.join(format!("d{}/e{d}", d % 7));
        fs::create_dir_all(&dir).unwrap();
        for f in 0..files {
            fs::write(dir.join(format!("f{f}")), format!("{d} {f}")).unwrap();
        }
    }
}

#[test]
fn a_scan_equals_a_walk() {
    let device = Device::new(quick());
    populate(&device.at(""), 50, 20);
    fs::write(device.at("").join(std::ffi::OsStr::from_bytes(b"\xff\n\\")), b"odd").unwrap();
    symlink(".", device.at("d1/loop")).unwrap();
    symlink("/nowhere", device.at("d1/dangling")).unwrap();
    fs::hard_link(device.at("d1/e1/f1"), device.at("d2/linked")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        device.at("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    fs::create_dir_all(device.at(&vec!["deep"; 200].join("/"))).unwrap();
    device.start();
    device.follows();
    assert_eq!(device.progress().watch, Watch::Watching);
    device.hashes();
}

#[test]
fn single_changes_are_seen() {
    single_changes(&Device::new(quick()));
}

#[test]
fn single_changes_are_seen_by_a_mark() {
    let device = Device::new(marked());
    single_changes(&device);
    device.is_marked();
}

fn single_changes(device: &Device) {
    populate(&device.at(""), 3, 3);
    device.start();

    fs::write(device.at("new"), b"new").unwrap();
    device.follows();
    let id = device.entry("new").unwrap().file_id;

    fs::OpenOptions::new().append(true).open(device.at("new")).unwrap().write_all(b"er").unwrap();
    device.follows();

    fs::rename(device.at("new"), device.at("d1/e1/old")).unwrap();
    device.follows();
    assert_eq!(device.entry("d1/e1/old").unwrap().file_id, id);

    fs::set_permissions(device.at("d1/e1/old"), fs::Permissions::from_mode(0o600)).unwrap();
    device.follows();

    let dir = device.entry("d1/e1").unwrap().file_id;
    fs::rename(device.at("d1/e1"), device.at("d2/moved")).unwrap();
    device.follows();
    assert_eq!(device.entry("d2/moved").unwrap().file_id, dir);
    assert_eq!(device.entry("d2/moved/old").unwrap().file_id, id);

    // Its watches are by id, so they hold under the new name.
    fs::write(device.at("d2/moved/old"), b"rewritten").unwrap();
    fs::write(device.at("d2/moved/another"), b"").unwrap();
    device.follows();

    fs::remove_file(device.at("d2/moved/old")).unwrap();
    fs::remove_dir_all(device.at("d0")).unwrap();
    device.follows();
    fs::write(device.at("swap"), b"swapped").unwrap();
    fs::rename(device.at("swap"), device.at("d2/moved/another")).unwrap();
    device.follows();
    device.hashes();
}

#[test]
fn a_file_that_a_program_let_go_of_is_hashed_again() {
    let device = Device::new(quick());
    fs::write(device.at("f"), b"the bytes that it has now").unwrap();
    device.start();
    device.hashes();
    // As after a store through a mapping, of which the file's times tell nothing.
    let entry = device.entry("f").unwrap();
    let former = ContentId::of(b"the bytes that it had");
    assert!(device.index.set_content(device.no, entry.file_id, &entry.stamp(), former).unwrap());
    drop(fs::OpenOptions::new().write(true).open(device.at("f")).unwrap());
    let hashed = ContentId::of(b"the bytes that it has now");
    device.until("new hash", || device.entry("f").unwrap().content == Some(hashed));
    assert!(device.entry("f").unwrap().generation > entry.generation);
}

#[test]
fn bursts_are_seen() {
    bursts(&Device::new(quick()));
}

#[test]
fn bursts_are_seen_by_a_mark() {
    let device = Device::new(marked());
    bursts(&device);
    device.is_marked();
    // As after a disk that was away.
    let core = &device.indexer.core;
    core.go_offline(&core.place(device.no).unwrap(), "a test".into());
    device.follows();
    burst_in(&device, "again");
    device.is_marked();
}

fn bursts(device: &Device) {
    device.start();
    burst_in(device, "first");
}

fn burst_in(device: &Device, folder: &str) {
    for round in 0..3 {
        let name = |n: &str| device.at(&format!("{folder}/{n}{round}"));
        fs::create_dir_all(name("a").join("b/c/d/e/f")).unwrap();
        fs::write(name("a").join("b/c/d/e/f/leaf"), b"leaf").unwrap();
        populate(&name("many"), 40, 10);
        fs::create_dir(name("flat")).unwrap();
        for i in 0..1500 {
            fs::write(name("flat").join(i.to_string()), b"").unwrap();
        }
        fs::rename(name("many").join("d1"), name("a").join("b/c/d1")).unwrap();
        if round > 0 {
            fs::remove_dir_all(device.at(&format!("{folder}/many{}", round - 1))).unwrap();
        }
    }
    device.follows();
    device.hashes();
}

#[test]
fn a_directory_that_left_and_came_back_is_looked_at_again() {
    let device = Device::new(quick());
    let outside = device.base.path().join("outside");
    fs::create_dir_all(device.at("d/sub")).unwrap();
    fs::write(device.at("d/sub/f"), b"1").unwrap();
    device.start();
    device.follows();
    for round in 0..5 {
        fs::rename(device.at("d"), &outside).unwrap();
        if round % 2 == 0 {
            device.until("disappearance", || device.entry("d").is_none());
        }
        fs::write(outside.join("sub/f"), format!("changed in {round}")).unwrap();
        fs::write(outside.join(format!("sub/new{round}")), b"").unwrap();
        fs::rename(&outside, device.at("d")).unwrap();
        device.follows();
    }
}

#[test]
fn the_root_gone_is_offline_and_nothing_is_deleted() {
    let device = Device::new(quick());
    populate(&device.at(""), 10, 10);
    device.start();
    device.hashes();
    let before = device.rows();
    let (folder, away) = (device.at(""), device.base.path().join("away"));
    let offline = || matches!(device.progress().state, State::Offline(_));

    fs::rename(&folder, &away).unwrap();
    device.until("offline", offline);
    assert_eq!(device.rows(), before);
    assert_eq!(device.indexer.root(device.no).unwrap_err().kind(), Kind::NotFound);
    assert!(is_gone(&device.indexer.scan_now(device.no, FileId::ROOT).unwrap_err()));

    // An empty folder in its place is not the location either.
    fs::create_dir(&folder).unwrap();
    device.indexer.rescan(device.no);
    assert!(offline(), "{:?}", device.progress());
    assert_eq!(device.rows(), before);

    fs::remove_dir(&folder).unwrap();
    fs::write(away.join("written meanwhile"), b"x").unwrap();
    fs::remove_file(away.join("d1/e1/f1")).unwrap();
    fs::rename(&away, &folder).unwrap();
    device.until("online", || !offline());
    device.follows();
    device.hashes();
    assert_eq!(device.rows().len(), before.len());
}

/// Also after a restart, when nothing is known of the folder but its row.
#[test]
fn another_folder_is_never_taken_for_the_one_that_was_indexed() {
    let device = Device::new(quick());
    populate(&device.at(""), 3, 3);
    device.start();
    let before = device.rows();
    fs::rename(device.at(""), device.base.path().join("away")).unwrap();
    fs::create_dir(device.at("")).unwrap();
    let device = device.restart();
    device.indexer.watch(device.no);
    device.until("offline", || matches!(device.progress().state, State::Offline(_)));
    assert_eq!(device.rows(), before);
}

/// The index says nothing then: what was noted beside it does.
#[test]
fn a_lost_index_does_not_make_the_empty_mount_point_the_location() {
    let device = Device::new(quick());
    populate(&device.at(""), 3, 3);
    let noted = Arc::new(Mutex::new(None));
    let note = Arc::clone(&noted);
    device.indexer.watch_known(device.no, None, move |id| *lock(&note) = Some(id.clone()));
    device.until("a whole scan", || device.progress().indexed);
    let before = device.rows().len();
    let Device { base, config, index, indexer, .. } = device;
    indexer.stop();
    drop((indexer, index));
    fs::remove_dir_all(base.path().join("index")).unwrap();
    let (folder, away) = (base.path().join("folder"), base.path().join("away"));
    fs::rename(&folder, &away).unwrap();
    fs::create_dir(&folder).unwrap();

    let device = Device::on(base, config);
    let known = lock(&noted).take();
    assert!(known.is_some());
    device.indexer.watch_known(device.no, known, |_| panic!("it is known"));
    device.until("offline", || matches!(device.progress().state, State::Offline(_)));
    assert_eq!(device.rows(), BTreeMap::new());
    fs::remove_dir(&folder).unwrap();
    fs::rename(&away, &folder).unwrap();
    device.until("a whole scan", || device.progress().indexed);
    assert_eq!(device.rows().len(), before);
}

/// As a disk does that was pulled out: it is listed, in part, and nothing fails.
#[test]
fn what_a_folder_that_is_gone_does_not_list_is_not_deleted() {
    let config = IndexerConfig { root_check: Duration::from_secs(3600), watch: false, ..quick() };
    let device = Device::new(config);
    populate(&device.at(""), 3, 3);
    device.start();
    let before = device.rows().len();
    let dir = device.entry("d1/e1").unwrap().file_id;
    fs::remove_file(device.at("d1/e1/f2")).unwrap();
    fs::rename(device.at(""), device.base.path().join("away")).unwrap();
    fs::create_dir(device.at("")).unwrap();
    let core = &device.indexer.core;
    let place = core.place(device.no).unwrap();
    lock(&place.scanned).remove(dir);
    assert_eq!(core.scan_asked(&place, dir).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(device.rows().len(), before);
}

#[test]
fn what_was_listed_of_a_folder_is_not_recorded_when_it_was_found_anew() {
    // Nor a scan while the file is aside.
    let never = Duration::from_secs(3600);
    let config = IndexerConfig { root_check: never, rescan_after: never, watch: false, ..quick() };
    let device = Device::new(config);
    populate(&device.at(""), 3, 3);
    device.start();
    // A file that is to be hashed while it is aside would be found missing.
    device.hashes();
    let dir = device.entry("d1/e1").unwrap().file_id;
    let file = device.entry("d1/e1/f2").unwrap().file_id;
    let core = &device.indexer.core;
    let place = core.place(device.no).unwrap();
    // As of a disk that is pulled out while it is listed: not all is there.
    let aside = device.base.path().join("aside");
    fs::rename(device.at("d1/e1/f2"), &aside).unwrap();
    let listed = core.list(&place, Job::deep(dir), place.order(dir)).unwrap().unwrap();
    fs::rename(&aside, device.at("d1/e1/f2")).unwrap();
    core.go_offline(&place, "it is away".to_owned());
    // Without a scan, which would give the row back.
    place.open(&core.index, true, |_| ()).unwrap();
    core.record(&place, vec![listed]).unwrap();
    assert_eq!(device.entry("d1/e1/f2").map(|entry| entry.file_id), Some(file));
    device.indexer.rescan(device.no);
    device.follows();
}

#[test]
fn a_folder_is_given_to_the_applier_before_it_is_scanned() {
    let device = Device::new(quick());
    fs::write(device.at("f"), b"x").unwrap();
    let (index, given) = (device.index.clone(), Arc::new(Mutex::new(Vec::new())));
    let to = Arc::clone(&given);
    device.indexer.before_scan(move |no, root| {
        lock(&to).push((root.path().to_owned(), index.counts(no).files));
    });
    device.start();
    let away = device.base.path().join("away");
    fs::rename(device.at(""), &away).unwrap();
    device.until("offline", || matches!(device.progress().state, State::Offline(_)));
    fs::rename(&away, device.at("")).unwrap();
    device.until("online", || !matches!(device.progress().state, State::Offline(_)));
    let folder = device.base.path().join("folder");
    assert_eq!(*lock(&given), [(folder.clone(), 0), (folder, 1)]);
}

#[test]
fn a_directory_that_cannot_be_read_keeps_its_rows() {
    let device = Device::new(quick());
    populate(&device.at(""), 3, 3);
    device.start();
    device.hashes();
    let before = device.rows();
    let dir = device.entry("d1/e1").unwrap().file_id;
    let place = device.indexer.core.place(device.no).unwrap();
    fs::set_permissions(device.at("d1/e1"), fs::Permissions::from_mode(0o000)).unwrap();
    let failed = std::thread::scope(|scope| {
        let scan = || {
            if rustix::process::geteuid().is_root() {
                // Only of this thread: for root no directory is unreadable.
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            }
            let core = &device.indexer.core;
            lock(&place.scanned).remove(dir);
            core.scan_asked(&place, dir).unwrap_err()
        };
        scope.spawn(scan).join().unwrap()
    });
    assert_eq!(failed.kind(), Kind::AccessDenied);
    assert_eq!(device.rows().len(), before.len());
    assert!(device.entry("d1/e1/f2").is_some());
    fs::set_permissions(device.at("d1/e1"), fs::Permissions::from_mode(0o755)).unwrap();
    device.follows();
}

#[test]
fn a_file_rewritten_while_it_is_hashed_ends_with_the_right_hash() {
    let device = Device::new(IndexerConfig { settle: Duration::ZERO, ..quick() });
    device.start();
    let until = Instant::now() + Duration::from_secs(2);
    let mut round = 0u64;
    while Instant::now() < until {
        round += 1;
        let byte = (round % 251) as u8;
        fs::write(device.at("busy"), vec![byte; 8 << 20]).unwrap();
    }
    device.follows();
    device.hashes();
    // It was not hashed again and again while it was written.
    assert!(device.progress().files_hashed_now <= round / 2 + 2, "{round}");
}

#[test]
fn hashing_resumes_after_a_restart() {
    let config = IndexerConfig { hash_threads: 1, ..quick() };
    let device = Device::new(config);
    const FILES: u64 = 400;
    for i in 0..FILES {
        fs::write(device.at(&i.to_string()), vec![i as u8; 200_000]).unwrap();
    }
    device.indexer.watch(device.no);
    device.until("first hashes", || device.progress().files_hashed_now >= 5);
    device.indexer.stop();
    let first = device.progress().files_hashed_now;
    assert!((5..FILES).contains(&first), "{first}");

    let device = device.restart();
    device.start();
    device.hashes();
    assert_eq!(first + device.progress().files_hashed_now, FILES);
    let device = device.restart();
    device.start();
    device.hashes();
    assert_eq!(device.progress().files_hashed_now, 0);
}

#[test]
fn without_hashing_files_stay_queued() {
    let device = Device::new(IndexerConfig { hash_threads: 0, ..quick() });
    populate(&device.at(""), 2, 2);
    device.start();
    device.until("rest", || device.progress().state == State::Idle);
    assert_eq!(device.progress().files_to_hash, 4);
    assert_eq!(device.index.next_unhashed(device.no, 9).unwrap().len(), 4);
}

#[test]
fn changes_while_stopped_are_seen_at_the_next_start() {
    let device = Device::new(quick());
    populate(&device.at(""), 10, 10);
    device.start();
    device.hashes();
    let id = device.entry("d1/e1/f1").unwrap().file_id;
    let device = device.restart();
    fs::rename(device.at("d1/e1/f1"), device.at("d2/e2/renamed")).unwrap();
    fs::rename(device.at("d3"), device.at("d4/e4/d3")).unwrap();
    fs::write(device.at("d5/e5/f5"), b"rewritten").unwrap();
    fs::remove_dir_all(device.at("d6")).unwrap();
    device.start();
    device.follows();
    assert_eq!(device.entry("d2/e2/renamed").unwrap().file_id, id);
    device.hashes();
}

#[test]
fn without_watches_everything_is_rescanned() {
    let device = Device::new(IndexerConfig { watch: false, ..quick() });
    populate(&device.at(""), 3, 3);
    device.start();
    assert!(matches!(device.progress().watch, Watch::Degraded(_)), "{:?}", device.progress());
    fs::write(device.at("later"), b"later").unwrap();
    fs::remove_dir_all(device.at("d1")).unwrap();
    device.follows();
}

#[test]
fn lost_events_lead_to_a_scan() {
    let never = Duration::from_secs(3600);
    let device = Device::new(IndexerConfig { watch: false, rescan_after: never, ..quick() });
    populate(&device.at(""), 3, 3);
    device.start();
    fs::write(device.at("d1/e1/later"), b"later").unwrap();
    device.indexer.core.note(Hint::Overflow);
    device.follows();
    device.until("the end of the scan", || match device.progress().watch {
        Watch::Watching => true,
        Watch::Degraded(why) => !why.contains("dropped"),
    });
}

#[test]
fn a_directory_asked_for_is_scanned_at_once() {
    let config = IndexerConfig { scan_threads: 1, watch: false, ..quick() };
    let device = Device::new(config);
    populate(&device.at(""), 5, 5);
    device.indexer.watch(device.no);
    device.indexer.scan_now(device.no, FileId::ROOT).unwrap();
    let d1 = device.entry("d1").unwrap().file_id;
    device.indexer.scan_now(device.no, d1).unwrap();
    let e1 = device.entry("d1/e1").unwrap().file_id;
    device.indexer.scan_now(device.no, e1).unwrap();
    assert!(device.entry("d1/e1/f1").is_some());
    let absent = device.indexer.scan_now(device.no, FileId(1 << 39)).unwrap_err();
    assert_eq!(absent.kind(), Kind::NotFound);
}

#[test]
fn a_forgotten_location_is_left_alone() {
    let device = Device::new(quick());
    device.start();
    device.indexer.forget(device.no);
    let before = device.rows();
    assert!(matches!(device.progress().state, State::Offline(_)));
    assert!(device.indexer.root(device.no).is_err());
    fs::write(device.at("unseen"), b"").unwrap();
    // Watched again it is seen, so it would have been before.
    assert_eq!(device.rows(), before);
    device.start();
    device.follows();
}

#[test]
fn a_file_that_never_rests_does_not_stop_the_others() {
    let device = Device::new(quick());
    device.start();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut log = fs::File::create(device.at("log")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                log.write_all(b"line\n").unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        device.until("the log", || device.entry("log").is_some());
        fs::write(device.at("other"), b"other").unwrap();
        device.until("hash of the other", || {
            device.entry("other").is_some_and(|entry| entry.content.is_some())
        });
        stop.store(true, Ordering::Relaxed);
    });
    device.follows();
    device.hashes();
}

/// The halves of a rename may be looked at one after the other, with a sweep that a scan asked for
/// between them.
#[test]
fn what_has_just_lost_its_name_is_not_swept_with_what_lost_it_before() {
    let device = Device::new(IndexerConfig { root_check: Duration::from_secs(3600), ..quick() });
    device.start();
    let place = device.indexer.core.place(device.no).unwrap();
    let (delay, now) = (Duration::from_secs(2), Instant::now());
    *lock(&place.sweep) = None;
    place.sweep_after(Duration::ZERO);
    assert!(place.is_sweep_due(now + Duration::from_millis(500)));
    place.sweep_after(delay);
    assert!(!place.is_sweep_due(now + delay - Duration::from_millis(1)));
    place.sweep_after(Duration::ZERO);
    assert!(!place.is_sweep_due(now + delay - Duration::from_millis(1)));
    place.sweep_after(Duration::from_secs(3600));
    assert!(place.is_sweep_due(now + Duration::from_secs(31)), "it is not put off for ever");
}

/// What overflows the queue of a mark may lie outside the location, and go on for long.
#[test]
fn lost_events_of_a_file_system_lead_to_a_scan_after_a_rest() {
    let device = Device::new(IndexerConfig { watch: false, ..quick() });
    let place = Place::new(device.no, device.at(""), device.config.clone(), None, Box::new(|_| ()));
    let (mut degraded, now) = (lock(&place.degraded), Instant::now());
    let rest = now + Duration::from_secs(60);
    assert!(degraded.lose_events("lost".into()), "it is news");
    assert!(
        degraded.rescan_at.is_some_and(|at| at <= Instant::now()),
        "nothing was scanned lately"
    );
    degraded.begin_pass();
    assert!(!degraded.lose_events("lost again".into()));
    degraded.end_pass(false, rest);
    assert_eq!(degraded.reason().as_deref(), Some("lost again"), "that pass may have missed it");
    assert_eq!(degraded.rescan_at, Some(rest));
    degraded.begin_pass();
    degraded.end_pass(false, rest);
    assert_eq!((degraded.reason(), degraded.rescan_at), (None, None));
    degraded.lose_events("lost".into());
    assert_eq!(degraded.rescan_at, Some(rest), "not at once after a pass");
}
