//! `kill -9` of either daemon, or both, at any moment of writing: what was acknowledged is there.
//!
//! A writer changes files through the mount and notes each change whose `close`, `rename` or
//! `unlink` had returned. Meanwhile daemons are killed. After each kill they are started again,
//! and everything noted must be at the owner, byte for byte; the one change that was under way
//! may have happened or not, but nothing between.
//!
//! `SD_TEST_SEED` repeats a run; `SD_TEST_KILLS` says how many kills.

use e2e::machine::long;
use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const FILES: u32 = 24;
pub(crate) const RECOVERY: Duration = Duration::from_secs(20);

/// What must be at the owner: names with the hash of their bytes.
type Manifest = BTreeMap<String, blake3::Hash>;

/// What is known of the owner's folder.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// Acknowledged.
    sure: Manifest,
    /// The change under way: what the states are if it got that far.
    perhaps: Vec<Manifest>,
    /// What was done since the last check, for whoever reads of a failure.
    story: Vec<String>,
}

impl Known {
    fn allows(&self, found: &Manifest) -> bool {
        *found == self.sure || self.perhaps.contains(found)
    }

    /// Where the owner's folder is none of what it may be, and what was done.
    fn difference(&self, found: &Manifest) -> String {
        let mut lines = differences(&self.sure, found);
        for (number, perhaps) in self.perhaps.iter().enumerate() {
            lines.push(format!("if the last change got to step {number}:"));
            lines.extend(differences(perhaps, found));
        }
        lines.push("what was done:".into());
        lines.extend(self.story.iter().cloned());
        lines.join("\n")
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

#[test]
fn what_was_acknowledged_survives_kills_at_any_moment() {
    let Some((lab, mut owner, mut reader)) = lab_with_two(&[Need::Fuse]) else { return };
    let seed = seed();
    let kills = number("SD_TEST_KILLS").unwrap_or(if long() { 500 } else { 50 });
    println!("SD_TEST_KILLS={kills}");
    let mut random = StdRng::seed_from_u64(seed);
    let theirs = lab.folder("source");
    let known = Arc::new(Mutex::new(Known::default()));
    for kill in 0..kills {
        let writer = Writer::start(reader.at("owner/files"), known.clone(), random.random());
        std::thread::sleep(Duration::from_micros(random.random_range(0..400_000)));
        let (reader_dies, owner_dies) = [(true, false), (true, false), (false, true), (true, true)]
            [random.random_range(0..4_usize)];
        if reader_dies {
            reader.kill();
        }
        if owner_dies {
            owner.kill();
        }
        if owner_dies && !reader_dies {
            // The writer goes on for a while without its owner.
            std::thread::sleep(Duration::from_millis(random.random_range(0..300)));
        }
        if owner_dies {
            owner.start();
        }
        let known = writer.stop();
        println!("kill {kill}: reader {reader_dies}, owner {owner_dies}");
        if reader_dies {
            reader.start();
            reader.mount();
        }
        check(&owner, &reader, &theirs, &known, format!("kill {kill}, seed {seed}"));
    }
}

/// Repeats a run.
pub(crate) fn seed() -> u64 {
    let seed = number("SD_TEST_SEED").unwrap_or_else(rand::random);
    println!("SD_TEST_SEED={seed}");
    seed
}

/// An owner whose folder `source` is the location `files`, and a reader who sees it.
#[track_caller]
pub(crate) fn lab_with_two(needs: &[Need]) -> Option<(Lab, Device, Device)> {
    let lab = Lab::local(needs)?;
    let (owner, reader) = (lab.device("owner"), lab.device("reader"));
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&lab.folder("source"), "files");
    reader.join(&owner);
    reader.mount();
    wait_until("the location", RECOVERY, || reader.at("owner/files").is_dir());
    Some((lab, owner, reader))
}

/// Everything known is at the owner, nothing else is, and the reader shows the same.
#[track_caller]
pub(crate) fn check(
    owner: &Device,
    reader: &Device,
    theirs: &Path,
    known: &Mutex<Known>,
    when: String,
) {
    reader.wait_online("owner");
    reader.sd(&["sync", "--timeout", "60s"]).ok();
    let found = manifest(theirs).expect("the owner's folder");
    let mut known = known.lock().expect("the writer is at its end");
    let conflicts = reader.json(&["conflicts"]);
    assert!(known.allows(&found), "{when}: {}\n{conflicts:#}", known.difference(&found));
    let are_none = conflicts["conflicts"].as_array().is_some_and(Vec::is_empty);
    assert!(are_none, "own versions were taken for another's: {when}: {conflicts:#}");
    if !shows(&reader.at("owner/files"), &found, RECOVERY) {
        let story = known.story.join("\n");
        panic!("{when}: {}\nwhat was done:\n{story}", views(owner, reader, &found));
    }
    owner.wait_online("reader");
    *known = Known { sure: found, ..Known::default() };
}

/// Whether a folder comes to have these files in time.
fn shows(folder: &Path, expected: &Manifest, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while !manifest(folder).is_ok_and(|found| found == *expected) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// The names that two folders do not have alike.
fn differences(expected: &Manifest, found: &Manifest) -> Vec<String> {
    let names: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let differs = names.into_iter().filter(|n| expected.get(*n) != found.get(*n));
    let line = |n| format!("  {n}: expected {:?}, found {:?}", expected.get(n), found.get(n));
    differs.map(line).collect()
}

/// What the reader shows in each way, to tell who is wrong: its index and overlay, what its
/// kernel holds of listings, of names, or of bytes.
fn views(owner: &Device, reader: &Device, expected: &Manifest) -> String {
    let ours = reader.at("owner/files");
    let mut lines = vec!["the mount:".to_owned()];
    let by_mount = |lines: &mut Vec<String>| match manifest(&ours) {
        Ok(found) => lines.extend(differences(expected, &found)),
        Err(error) => lines.push(format!("  {error}")),
    };
    by_mount(&mut lines);
    lines.push("names of the mount, one by one:".into());
    for name in (0..FILES).map(|n| format!("file-{n}")) {
        let found = ours.join(&name).symlink_metadata();
        if found.is_ok() != expected.contains_key(&name) {
            lines.push(format!("  {name}: {found:?}"));
        }
    }
    lines.push("the index with what waits:".into());
    let listed = reader.json(&["ls", "sd://owner/files"]).to_string();
    let is_listed = |name: &str| listed.contains(&format!("\"{name}\""));
    let names = (0..FILES).map(|n| format!("file-{n}"));
    let wrong = names.filter(|n| is_listed(n) != expected.contains_key(n));
    lines.extend(wrong.map(|n| format!("  {n}: listed {}", is_listed(&n))));
    lines.push(format!("pending: {}", reader.json(&["pending"])));
    for device in [owner, reader] {
        let row = device.location_row("owner", "files");
        lines.push(format!("location: {}", row.unwrap_or_default()));
    }
    let dropped = fs::write("/proc/sys/vm/drop_caches", "2");
    lines.push(format!("the mount, names and listings dropped ({dropped:?}):"));
    by_mount(&mut lines);
    lines.join("\n")
}

fn manifest(folder: &Path) -> io::Result<Manifest> {
    let entries = fs::read_dir(folder)?;
    let of = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        let name = entry.file_name().into_string().expect("a name that is text");
        Ok((name, files::hash_file(&entry.path())?))
    };
    entries.map(of).collect()
}

/// A program that changes files until it is stopped, or its mount dies.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    known: Arc<Mutex<Known>>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    pub(crate) fn start(folder: PathBuf, known: Arc<Mutex<Known>>, seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, shared) = (stop.clone(), known.clone());
        let thread = std::thread::spawn(move || {
            let mut random = StdRng::seed_from_u64(seed);
            while !asked.load(Ordering::Relaxed) {
                if !change(&folder, &shared, &mut random) {
                    break;
                }
            }
        });
        Self { stop, known, thread }
    }

    pub(crate) fn stop(self) -> Arc<Mutex<Known>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer");
        self.known
    }
}

/// One change, noted before and after; `false` when the mount refused, as a dead one does.
fn change(folder: &Path, known: &Mutex<Known>, random: &mut StdRng) -> bool {
    let sure = known.lock().expect("only this thread").sure.clone();
    let name = format!("file-{}", random.random_range(0..FILES));
    let path = folder.join(&name);
    let mut then = sure.clone();
    let made = (!sure.contains_key(&name)).then(|| name.clone());
    let words;
    let bytes = files::random_bytes(length(random), random.random());
    let done: Box<dyn FnOnce() -> io::Result<()>> =
        match (random.random_range(0..10), sure.contains_key(&name)) {
            (0..=4, _) | (_, false) => {
                words = format!("write {name}: {} bytes", bytes.len());
                then.insert(name, blake3::hash(&bytes));
                Box::new(move || fs::write(path, bytes))
            }
            (5..=6, true) => {
                // What is appended to is read first, as no byte of it is remembered here.
                let Ok(mut whole) = fs::read(&path) else { return false };
                whole.extend_from_slice(&bytes);
                words = format!("append to {name}: {} bytes", bytes.len());
                then.insert(name, blake3::hash(&whole));
                Box::new(move || append(&path, &bytes))
            }
            (7, true) => {
                let Ok(mut whole) = fs::read(&path) else { return false };
                whole.truncate(whole.len() / 2);
                words = format!("truncate {name}: {} bytes", whole.len());
                then.insert(name, blake3::hash(&whole));
                let len = whole.len() as u64;
                Box::new(move || truncate(&path, len))
            }
            (8, true) => {
                let target = format!("file-{}", random.random_range(0..FILES));
                if target == name {
                    return true;
                }
                words = format!("rename {name} to {target}");
                let hash = then.remove(&name).expect("it is there");
                then.insert(target.clone(), hash);
                let target = folder.join(target);
                Box::new(move || fs::rename(path, target))
            }
            _ => {
                words = format!("remove {name}");
                then.remove(&name);
                Box::new(move || fs::remove_file(path))
            }
        };
    let mut perhaps = vec![then.clone()];
    if let Some(made) = made {
        // A new file is there, and empty, as soon as it is opened.
        perhaps.push(sure.into_iter().chain([(made, blake3::hash(b""))]).collect());
    }
    known.lock().expect("only this thread").perhaps = perhaps;
    // A name is durable when its directory is synced, as on every file system.
    let result = done().and_then(|()| fs::File::open(folder)?.sync_all());
    let mut known = known.lock().expect("only this thread");
    known.story.push(format!("  {words}: {result:?}"));
    if result.is_ok() {
        known.sure = then;
        known.perhaps.clear();
    }
    result.is_ok()
}

/// Mostly small, sometimes beyond what travels inside an operation.
fn length(random: &mut StdRng) -> usize {
    match random.random_range(0..8) {
        0 => 0,
        1..=4 => random.random_range(1..20_000),
        5 => random.random_range(20_000..64_000),
        _ => random.random_range(20_000..600_000),
    }
}

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn truncate(path: &Path, len: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(len)?;
    file.sync_all()
}
