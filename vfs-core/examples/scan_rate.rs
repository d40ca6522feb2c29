//! How fast the indexer scans, hashes and rescans: `scan_rate [FOLDER]`.
//!
//! Without a folder it makes one of 100,000 files. Prints files a second for
//! the first scan, for one that finds nothing new, and for hashing; and, as the
//! yardstick on the same warm cache, for a plain walk with `std::fs`. The seconds
//! of processor time tell more than the clock on a machine that has other work.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfs_core::content::Manifests;
use vfs_core::index::{Index, NewLocation, open_store};
use vfs_core::indexer::{Indexer, IndexerConfig, Progress, State};
use vfs_core::model::{DeviceId, LocationId, LocationNo};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let base = tempfile::tempdir()?;
    let folder = match std::env::args_os().nth(1) {
        Some(folder) => PathBuf::from(folder),
        None => make_files(&base.path().join("folder"), 100_000)?,
    };
    walk(&folder)?;
    report("walk with std::fs", || walk(&folder))?;

    let me = DeviceId([1; 32]);
    let index = Index::open(open_store(&base.path().join("index"))?.store, me)?;
    let location = NewLocation {
        id: LocationId([1; 16]),
        owner: me,
        name: "folder".into(),
        root: Some(folder),
        read_only: false,
        shared_with: None,
    };
    let no = index.put_location(location)?.no;
    let manifests = Arc::new(Manifests::open(&base.path().join("manifests"))?);

    let config = IndexerConfig { hash_threads: 0, ..IndexerConfig::default() };
    let indexer = Indexer::start(index.clone(), manifests.clone(), config.clone());
    report("first scan", || {
        indexer.watch(no);
        until(&indexer, no, |progress| progress.indexed);
        Ok(index.counts(no).entries)
    })?;
    report("scan again", || {
        indexer.rescan(no);
        until(&indexer, no, |progress| progress.state != State::Scanning);
        Ok(index.counts(no).entries)
    })?;
    indexer.stop();
    println!("index: {} bytes an entry", index.size_bytes() / index.counts(no).entries.max(1));

    let indexer = Indexer::start(index.clone(), manifests, IndexerConfig::default());
    indexer.watch(no);
    until(&indexer, no, |progress| progress.indexed);
    report("hash", || {
        until(&indexer, no, |progress| progress.state == State::Idle);
        Ok(indexer.progress(no).files_hashed_now)
    })?;
    Ok(())
}

fn until(indexer: &Indexer, no: LocationNo, done: impl Fn(&Progress) -> bool) {
    while !done(&indexer.progress(no)) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn report(what: &str, work: impl FnOnce() -> Result<u64>) -> Result<()> {
    let (began, cpu_began) = (Instant::now(), cpu_seconds()?);
    let count = work()?;
    let (took, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds()? - cpu_began);
    println!("{what}: {count} in {took:.2} s, {:.0}/s; cpu {cpu:.2} s", count as f64 / took);
    Ok(())
}

/// Processor time of all threads so far, in the kernel's steps of 10 ms.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<std::result::Result<f64, _>>()? / 100.0)
}

/// A directory for every 20 files, as in source trees.
fn make_files(folder: &Path, count: usize) -> Result<PathBuf> {
    for i in 0..count {
        let dir = folder.join(format!("a{}/b{}", i / 2000, i / 20));
        if i % 20 == 0 {
            std::fs::create_dir_all(&dir)?;
        }
        std::fs::write(dir.join(format!("file-{i}.txt")), i.to_string())?;
    }
    Ok(folder.to_owned())
}

/// Lists and stats everything; the number of entries.
fn walk(folder: &Path) -> Result<u64> {
    let mut count = 0;
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            count += 1;
            if entry.metadata()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(count)
}
