//! Loads an index with synthetic entries and prints what that cost, for docs/decisions/0001-store.md.
//!
//! `cargo run --release -p vfs-core --features sled --example index_load -- redb 1000000`

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use vfs_core::index::{Index, NewLocation, Observed, RedbStore, Store};
use vfs_core::model::{
    Attr, ContentId, DeviceId, FileId, FileType, LocationId, LocationNo, Name, Time,
};

const FILES_A_DIRECTORY: u64 = 20;
const DIRECTORIES_A_DIRECTORY: u64 = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kind, entries] = args.as_slice() else {
        return Err("usage: index_load redb|sled ENTRIES".into());
    };
    let entries: u64 = entries.parse()?;
    let folder = tempfile::tempdir()?;
    let me = DeviceId([1; 32]);
    let index = Index::open(open(kind, folder.path())?, me)?;
    let no = add_location(&index, me)?;

    let directories = entries / (FILES_A_DIRECTORY + 1);
    let loaded = timed("load", entries, || scan(&index, no, directories))?;
    index.flush()?;
    println!("entries: {}", index.counts(no).entries);
    println!("bytes on disk an entry: {}", index.size_bytes() / entries);
    timed("scan again, nothing changed", entries, || scan(&index, no, directories))?;
    timed("hash", entries / 10, || hash(&index, no, entries / 10))?;
    timed("lookup", 100_000, || lookup(&index, no, &loaded))?;
    println!("bytes on disk an entry, a tenth hashed: {}", index.size_bytes() / entries);
    drop(index);
    let index = timed("open", 1, || Ok(Index::open(open(kind, folder.path())?, me)?))?;
    timed("remove", entries, || Ok(index.remove_location(no)?))?;
    println!("{}", peak_memory()?);
    Ok(())
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn open(kind: &str, folder: &Path) -> Outcome<Arc<dyn Store>> {
    match kind {
        "redb" => Ok(Arc::new(RedbStore::open(&folder.join("redb"))?)),
        #[cfg(feature = "sled")]
        "sled" => Ok(Arc::new(vfs_core::index::SledStore::open(&folder.join("sled"))?)),
        other => Err(format!("this build has no store {other:?}").into()),
    }
}

fn add_location(index: &Index, owner: DeviceId) -> Outcome<LocationNo> {
    let location = NewLocation {
        id: LocationId([1; 16]),
        owner,
        name: "load".into(),
        root: None,
        read_only: false,
        shared_with: None,
    };
    let no = index.put_location(location)?.no;
    index.observe_root(no, &observed("root".into(), 1, FileType::Directory))?;
    Ok(no)
}

/// Two levels of directories, one listing each, as a scan gives them.
fn scan(index: &Index, no: LocationNo, directories: u64) -> Outcome<Vec<FileId>> {
    let tops = directories.div_ceil(DIRECTORIES_A_DIRECTORY);
    let dir = |n: u64| observed(format!("directory {n:06}"), 2 + n, FileType::Directory);
    let found = index.observe_directory(no, FileId::ROOT, (0..tops).map(dir).collect())?;
    let mut all = Vec::new();
    for (n, (_, top)) in (0..).zip(found) {
        let first = tops + n * DIRECTORIES_A_DIRECTORY;
        let below = (first..(first + DIRECTORIES_A_DIRECTORY).min(directories)).map(dir).collect();
        for (name, id) in index.observe_directory(no, top, below)? {
            let number: u64 = name.display()["directory ".len()..].parse()?;
            index.observe_directory(no, id, files(number))?;
            all.push(id);
        }
    }
    Ok(all)
}

fn files(directory: u64) -> Vec<Observed> {
    let first = 10_000_000 + directory * FILES_A_DIRECTORY;
    let file = |ino| observed(format!("IMG_{ino:012}.jpeg"), ino, FileType::File);
    (first..first + FILES_A_DIRECTORY).map(file).collect()
}

fn observed(name: String, disk_ino: u64, file_type: FileType) -> Observed {
    let secs = 1_600_000_000 + (disk_ino % 100_000_000) as i64;
    let time = Time { secs, nanos: (disk_ino * 7919 % 1_000_000_000) as u32 };
    let attr = Attr {
        file_type,
        perm: 0o644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        size: disk_ino * 31 % 8_000_000,
        blocks: 1000,
        mtime: time,
        ctime: time,
        btime: Some(time),
        rdev: 0,
    };
    let name = Name::new(name.into_bytes()).expect("a valid name");
    Observed { name, attr, disk_ino, target: None }
}

fn hash(index: &Index, no: LocationNo, count: u64) -> Outcome<()> {
    let mut left = count as usize;
    while left > 0 {
        let queue = index.next_unhashed(no, left.min(256))?;
        if queue.is_empty() {
            break;
        }
        left -= queue.len();
        for file in queue {
            let node = index.view()?.node(no, file)?.ok_or("a queued file without a name")?;
            let content = ContentId::of(&file.0.to_le_bytes());
            index.set_content(no, file, &node.entry.stamp(), content)?;
        }
    }
    Ok(())
}

fn lookup(index: &Index, no: LocationNo, directories: &[FileId]) -> Outcome<()> {
    for n in 0..100_000 {
        // Spread over the index, so that not every lookup finds its page in the cache.
        let at = (n * 7919) % directories.len();
        index.view()?.entry(no, directories[at], b"IMG_000010000000.jpeg")?;
    }
    Ok(())
}

fn timed<T>(what: &str, times: u64, work: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let begin = Instant::now();
    let done = work()?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("{what}: {seconds:.3} s, {:.0} a second", times as f64 / seconds);
    Ok(done)
}

fn peak_memory() -> Outcome<String> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|l| l.starts_with("VmHWM")).ok_or("no VmHWM")?;
    Ok(format!("peak memory: {}", line["VmHWM:".len()..].trim()))
}
