//! How fast a device takes over the rows of another one's location, every file hashed, and what
//! they take in memory and on the disk.
//!
//! `cargo run --release --workspace --example replica_rate -- <folder on the disk to measure> ENTRIES`

use std::path::Path;
use std::time::{Duration, Instant};
use vfs_core::index::{Index, LogRow, NewLocation, Observed, RedbStore};
use vfs_core::model::{
    Attr, ContentId, DeviceId, FileId, FileType, LocationId, LocationNo, Name, Seq, Time,
};

const FILES_IN_DIRECTORY: u64 = 1000;
/// As replication sends them.
const BATCH_BYTES: usize = 256 << 10;
const HASHED_TOGETHER: usize = 256;
const OWNER: DeviceId = DeviceId([1; 32]);
const READER: DeviceId = DeviceId([2; 32]);

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [base, entries] = args.as_slice() else {
        return Err("usage: replica_rate FOLDER ENTRIES".into());
    };
    let base = Path::new(base).join(format!("replica-rate-{}", std::process::id()));
    let done = measure(&base, entries.parse()?);
    std::fs::remove_dir_all(base)?;
    done
}

fn measure(base: &Path, entries: u64) -> Outcome<()> {
    let [owner_file, reader_file] = ["owner", "reader"].map(|name| base.join(name).join("redb"));
    let (owner, own) = open(&owner_file, OWNER)?;
    timed("scan", entries, || scan(&owner, own, entries / FILES_IN_DIRECTORY))?;
    timed("hash", entries, || hash(&owner, own))?;
    let (reader, no) = open(&reader_file, READER)?;
    timed("replicate", entries, || replicate(&owner, own, &reader, no))?;
    timed("note who has which bytes", entries, || wait_noted(&owner, own, &reader))?;
    [&owner, &reader].iter().try_for_each(|index| index.flush())?;
    println!("{} rows", reader.counts(no).entries);
    for (who, index) in [("owner", &owner), ("reader", &reader)] {
        println!("{who}: {} bytes an entry on the disk", index.size_bytes() / entries);
    }
    println!("{}", memory("VmRSS")?);
    drop((owner, reader));
    [owner_file, reader_file].iter().try_for_each(|file| tables(file, entries))
}

fn open(file: &Path, me: DeviceId) -> Outcome<(Index, LocationNo)> {
    std::fs::create_dir_all(file.parent().ok_or("a folder")?)?;
    let index = Index::open(std::sync::Arc::new(RedbStore::open(file)?), me)?;
    let location = NewLocation {
        id: LocationId::new(OWNER, [1; 8]),
        owner: OWNER,
        name: "files".into(),
        root: None,
        read_only: false,
        shared_with: None,
    };
    let no = index.put_location(location)?.no;
    Ok((index, no))
}

fn scan(owner: &Index, no: LocationNo, directories: u64) -> Outcome<()> {
    owner.observe_root(no, &observed("root".into(), 1, FileType::Directory))?;
    let dir = |n: u64| observed(format!("{n}"), 2 + n, FileType::Directory);
    let found = owner.observe_directory(no, FileId::ROOT, (0..directories).map(dir).collect())?;
    for (name, id) in found {
        let first = name.display().parse::<u64>()? * FILES_IN_DIRECTORY;
        let file = |n: u64| observed(format!("file-{n}"), 10_000_000 + n, FileType::File);
        let files = (first..first + FILES_IN_DIRECTORY).map(file).collect();
        owner.observe_directory(no, id, files)?;
    }
    Ok(())
}

/// Of a tree that was written in the order of its names, some 20,000 files in a second.
fn observed(name: String, disk_ino: u64, file_type: FileType) -> Observed {
    let secs = 1_600_000_000 + (disk_ino / 20_000) as i64;
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

fn hash(owner: &Index, no: LocationNo) -> Outcome<()> {
    loop {
        let queue = owner.next_unhashed(no, HASHED_TOGETHER)?;
        if queue.is_empty() {
            return Ok(());
        }
        let view = owner.view()?;
        let mut hashed = Vec::new();
        for file in queue {
            let node = view.node(no, file)?.ok_or("a queued file without a name")?;
            hashed.push((file, node.entry.stamp(), ContentId::of(&file.0.to_le_bytes())));
        }
        drop(view);
        owner.set_contents(no, &hashed)?;
    }
}

fn replicate(owner: &Index, own: LocationNo, reader: &Index, no: LocationNo) -> Outcome<()> {
    let (log_id, head) = (owner.log_id(own), owner.head(own));
    let mut after = Seq(0);
    let (mut read, mut coded, mut applied) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    while after < head {
        let (rows, upto) = add(&mut read, || owner.view()?.log_after(own, after, BATCH_BYTES))?;
        let rows = add(&mut coded, || code(&rows))?;
        add(&mut applied, || match upto < head {
            true => reader.apply_replica_part(no, log_id, rows, upto),
            false => reader.apply_replica(no, log_id, rows, upto),
        })?;
        after = upto;
    }
    println!("  of it read {read:.1?}, encoded and decoded {coded:.1?}, applied {applied:.1?}");
    Ok(())
}

fn code(rows: &[LogRow]) -> Result<Vec<LogRow>, postcard::Error> {
    postcard::from_bytes(&postcard::to_allocvec(rows)?)
}

fn add<T, E>(to: &mut Duration, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let began = Instant::now();
    let done = work();
    *to += began.elapsed();
    done
}

/// They are noted in the order of their content ids.
fn wait_noted(owner: &Index, own: LocationNo, reader: &Index) -> Outcome<()> {
    let last = last_content(owner, own)?;
    let deadline = Instant::now() + Duration::from_secs(300);
    while reader.view()?.holders(last)?.is_empty() {
        if Instant::now() > deadline {
            return Err("it is still not noted who has which bytes".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Of all but the last batch, which is noted at once.
fn last_content(owner: &Index, own: LocationNo) -> Outcome<ContentId> {
    let (view, mut after, mut last) = (owner.view()?, Seq(0), None);
    while after < owner.head(own) {
        let (rows, upto) = view.log_after(own, after, BATCH_BYTES)?;
        if upto < owner.head(own) {
            last = rows.into_iter().filter_map(|row| row.entry?.content).chain(last).max();
        }
        after = upto;
    }
    Ok(last.ok_or("too few entries for this")?)
}

/// What each table takes.
fn tables(file: &Path, entries: u64) -> Outcome<()> {
    use redb::{ReadableDatabase, ReadableTableMetadata, TableDefinition, TableHandle};
    let db = open_soon(file)?;
    let read = db.begin_read()?;
    let mut all = 0;
    println!("{} B/entry of file", std::fs::metadata(file)?.len() / entries);
    for table in read.list_tables()? {
        let definition: TableDefinition<&[u8], &[u8]> = TableDefinition::new(table.name());
        let stats = read.open_table(definition)?.stats()?;
        let pages = (stats.leaf_pages() + stats.branch_pages()) * 4096;
        all += pages;
        println!(
            "  {:10} {:4} B/entry in {} leaves and {} branches, {} % of it is data",
            table.name(),
            pages / entries,
            stats.leaf_pages(),
            stats.branch_pages(),
            100 * stats.stored_bytes() / pages.max(1)
        );
    }
    println!("  {} B/entry in all", all / entries);
    Ok(())
}

/// A thread of the index may have it for a moment after it was closed.
fn open_soon(file: &Path) -> Outcome<redb::Database> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match redb::Database::open(file) {
            Err(redb::DatabaseError::DatabaseAlreadyOpen) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return Ok(opened?),
        }
    }
}

fn timed(what: &str, times: u64, work: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let begin = Instant::now();
    work()?;
    let seconds = begin.elapsed().as_secs_f64();
    println!("{what}: {seconds:.3} s, {:.0} a second", times as f64 / seconds);
    Ok(())
}

fn memory(field: &str) -> Result<String, std::io::Error> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    Ok(status.lines().find(|l| l.starts_with(field)).unwrap_or_default().to_owned())
}
