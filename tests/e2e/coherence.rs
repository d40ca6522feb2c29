//! Programs of the owner write without a pause while others read the same files in the mount:
//! no reader gets a mixture of versions, or one that is older than what it had, or than what was
//! there seconds ago.

use e2e::wait::{wait_until, within};
use e2e::{Lab, Need, machine};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Every block of a version says which it is of, and where it stands.
const BLOCK: usize = 4096;
const MOST_BLOCKS: u64 = 48;
/// The design promises 1 s on a LAN; here two daemons and eight threads share two cores.
const SEEN: Duration = Duration::from_secs(5);
const FILES: usize = 8;

/// How a writer makes the next version.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    /// A temporary file takes the name.
    Replaced,
    /// In its place, in one call, as long as before.
    Overwritten,
    /// Emptied, and written anew.
    Truncated,
    /// One block more, of the next version; the others stay what they were.
    Appended,
}

const WAYS: [Way; 4] = [Way::Replaced, Way::Overwritten, Way::Truncated, Way::Appended];

fn way(file: usize) -> Way {
    WAYS[file % WAYS.len()]
}

fn block(version: u64, at: u64) -> Vec<u8> {
    let seed = blake3::hash(&[version.to_le_bytes(), at.to_le_bytes()].concat());
    let mut bytes: Vec<u8> = seed.as_bytes().iter().copied().cycle().take(BLOCK).collect();
    bytes[..8].copy_from_slice(&version.to_le_bytes());
    bytes[8..16].copy_from_slice(&at.to_le_bytes());
    bytes
}

/// Of a file that is appended to, block by block a version; of another, all of one.
fn content(way: Way, version: u64) -> Vec<u8> {
    let blocks = match way {
        Way::Appended => version,
        Way::Overwritten => MOST_BLOCKS,
        Way::Replaced | Way::Truncated => 1 + version * 7 % MOST_BLOCKS,
    };
    let of = |at| if way == Way::Appended { at + 1 } else { version };
    (0..blocks).flat_map(|at| block(of(at), at)).collect()
}

/// Which version these bytes are; `None`: an empty file, which is one that was just truncated.
///
/// What is written in place is seen at the owner itself while it is: the first blocks of a version,
/// or those before the last of the version before it. That is no mixture of the drive's.
fn version_of(way: Way, bytes: &[u8]) -> Option<u64> {
    let versions: Vec<u64> = bytes.chunks(BLOCK).map(|b| version_in(way, b)).collect();
    let (first, last) = (*versions.first()?, *versions.last()?);
    let is_whole = match way {
        Way::Replaced | Way::Appended => bytes == content(way, last),
        Way::Truncated => content(way, last).starts_with(bytes),
        Way::Overwritten => {
            let blocks = |(at, version): (usize, &u64)| block(*version, at as u64);
            let each: Vec<u8> = versions.iter().enumerate().flat_map(blocks).collect();
            let in_order = versions.is_sorted_by(|a, b| a >= b) && first - last <= 1;
            in_order && bytes == each && versions.len() as u64 == MOST_BLOCKS
        }
    };
    assert!(is_whole, "{way:?}: no version: {versions:?}");
    Some(last)
}

fn version_in(way: Way, block: &[u8]) -> u64 {
    assert!(block.len() == BLOCK, "{way:?}: a block of {} bytes", block.len());
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

fn path(folder: &Path, file: usize) -> PathBuf {
    folder.join(format!("file-{file}"))
}

/// What every thread knows.
struct Stage {
    theirs: PathBuf,
    ours: PathBuf,
    ends: AtomicBool,
    /// The last version that was whole at the owner, and since when.
    published: [Mutex<Vec<(Instant, u64)>>; FILES],
    reads: AtomicU64,
    /// Reads that were told that the version had just gone.
    stale: AtomicU64,
    /// The longest that an older version than the owner's was given, in ms.
    latest_ms: AtomicU64,
}

impl Stage {
    fn goes_on(&self) -> bool {
        !self.ends.load(Ordering::Relaxed)
    }

    fn publish(&self, file: usize, version: u64) {
        self.published[file].lock().unwrap().push((Instant::now(), version));
    }

    /// The version that everyone must see who opens the file now, and since when there was a
    /// later one than `seen`.
    fn due(&self, file: usize, seen: u64, opened: Instant) -> (u64, Option<Instant>) {
        let published = self.published[file].lock().unwrap();
        let is_due = |(at, _): &&(Instant, u64)| *at + SEEN <= opened;
        let due = published.iter().filter(is_due).map(|(_, v)| *v).max().unwrap_or(0);
        (due, published.iter().find(|(_, v)| *v > seen).map(|(at, _)| *at))
    }
}

fn write_versions(stage: &Stage, file: usize, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let (way, path) = (way(file), path(&stage.theirs, file));
    let mut version = 1;
    while stage.goes_on() {
        std::thread::sleep(Duration::from_millis(random.random_range(1..150)));
        if way == Way::Appended && version == 4 * MOST_BLOCKS {
            return;
        }
        version += 1;
        make(way, &path, version);
        stage.publish(file, version);
    }
}

fn make(way: Way, path: &Path, version: u64) {
    let bytes = content(way, version);
    match way {
        Way::Replaced => {
            let temporary = path.with_extension("tmp");
            fs::write(&temporary, bytes).unwrap();
            fs::rename(temporary, path).unwrap();
        }
        Way::Overwritten => {
            let file = File::options().write(true).create(true).truncate(false).open(path);
            file.unwrap().write_all_at(&bytes, 0).unwrap();
        }
        Way::Truncated => fs::write(path, bytes).unwrap(),
        Way::Appended => {
            let mut file = File::options().append(true).create(true).open(path).unwrap();
            file.write_all(&bytes[bytes.len() - BLOCK..]).unwrap();
        }
    }
}

fn read_versions(stage: &Stage, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut had: HashMap<usize, u64> = HashMap::new();
    while stage.goes_on() {
        let file = random.random_range(0..FILES);
        let opened = Instant::now();
        match fs::read(path(&stage.ours, file)) {
            Ok(bytes) => {
                let Some(version) = version_of(way(file), &bytes) else { continue };
                look_at(stage, file, version, opened, &mut had);
            }
            // Replaced in the middle of a read, which cannot go on with another version.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error()) => {
                stage.stale.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => panic!("file {file}, {:?}: {error}", way(file)),
        }
        if random.random_ratio(1, 16) {
            list(stage);
        }
    }
}

fn look_at(
    stage: &Stage,
    file: usize,
    version: u64,
    opened: Instant,
    had: &mut HashMap<usize, u64>,
) {
    let way = way(file);
    let before = had.insert(file, version).unwrap_or(0);
    assert!(version >= before, "{way:?}: version {version} after {before}");
    let (due, later) = stage.due(file, version, opened);
    assert!(version >= due, "{way:?}: version {version}, {due} is older than {SEEN:?}");
    let late = later.map_or(Duration::ZERO, |at| opened.saturating_duration_since(at));
    stage.latest_ms.fetch_max(late.as_millis() as u64, Ordering::Relaxed);
    stage.reads.fetch_add(1, Ordering::Relaxed);
}

/// Every file is listed, and has attributes, at any time.
fn list(stage: &Stage) {
    let names: Vec<_> = fs::read_dir(&stage.ours).unwrap().map(|e| e.unwrap().path()).collect();
    for file in 0..FILES {
        let path = path(&stage.ours, file);
        assert!(names.contains(&path), "{path:?} is not listed");
        assert!(fs::metadata(&path).unwrap().is_file());
    }
}

#[test]
fn readers_beside_writers_see_whole_versions_in_order_and_in_time() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    for file in 0..FILES {
        make(way(file), &path(&theirs, file), 1);
    }
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let length = Duration::from_secs(if machine::long() { 300 } else { 15 });
    let stage = Arc::new(Stage {
        theirs,
        ours: reader.at("owner/files"),
        ends: AtomicBool::new(false),
        published: Default::default(),
        reads: AtomicU64::new(0),
        stale: AtomicU64::new(0),
        latest_ms: AtomicU64::new(0),
    });
    let (running, patience) = (Arc::clone(&stage), length + Duration::from_secs(60));
    within("writers and readers", patience, move || run(&running, length));
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    let (reads, stale) = (count(&stage.reads), count(&stage.stale));
    println!("{reads} reads, {stale} of them stale, at most {} ms late", count(&stage.latest_ms));
    assert!(reads > 100 && stale < reads, "{reads} reads, {stale} stale");
    same_in_the_end(&stage);
}

fn run(stage: &Stage, length: Duration) {
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for file in 0..FILES {
            threads.push(scope.spawn(move || write_versions(stage, file, file as u64)));
        }
        for reader in 0..4 {
            threads.push(scope.spawn(move || read_versions(stage, 100 + reader)));
        }
        let until = Instant::now() + length;
        // A thread that fails ends the others.
        while Instant::now() < until && !threads[FILES..].iter().any(|t| t.is_finished()) {
            std::thread::sleep(Duration::from_millis(50));
        }
        stage.ends.store(true, Ordering::Relaxed);
    });
}

fn same_in_the_end(stage: &Stage) {
    for file in 0..FILES {
        let last = fs::read(path(&stage.theirs, file)).unwrap();
        wait_until(format!("the last version of file {file}"), SEEN, || {
            fs::read(path(&stage.ours, file)).is_ok_and(|bytes| bytes == last)
        });
    }
}
