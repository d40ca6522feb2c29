//! A million entries: how fast they are indexed, replicated and listed, and what they take.
//!
//! Each figure is of one run: a second one would find the rows of the first.

use crate::{MIB, ROUNDS, Row, lab_or_reason, median_of, walk};
use anyhow::{Context, Result, ensure};
use e2e::{Device, Lab, Need};
use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const ENTRIES: usize = 1_000_000;
const FILES_IN_DIRECTORY: usize = 1000;
const CHANGES: usize = 1000;
/// How often the daemon is asked how far it is: rarely, because the answer costs it something.
const ASK_EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(900);

/// The rows of this part.
pub fn million() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::lan(&[Need::Root, Need::Fuse]))?;
    let [source, flat] = ["source", "flat"].map(|name| lab.folder(name));
    make_tree(&source)?;
    (0..ENTRIES).try_for_each(|n| File::create(flat.join(format!("file-{n}"))).map(drop))?;
    // What the disk still has to write would slow down what is measured.
    rustix::fs::sync();

    let mut owner = lab.stopped_device_at(0, "owner");
    let mut rows = index(&mut owner, &source)?;
    let mut reader = lab.stopped_device_at(1, "reader");
    rows.extend(replicate(&owner, &mut reader)?);
    rows.extend(sizes(&owner, &reader)?);
    rows.push(mount(&mut reader)?);
    rows.extend(list(&owner, &reader, &flat)?);
    Ok(rows)
}

fn make_tree(folder: &Path) -> Result<()> {
    for n in 0..ENTRIES {
        let file = file_of(folder, n);
        if n % FILES_IN_DIRECTORY == 0 {
            fs::create_dir_all(file.parent().context("a directory")?)?;
        }
        // Each with a hash of its own.
        fs::write(file, n.to_string())?;
    }
    Ok(())
}

fn file_of(folder: &Path, n: usize) -> std::path::PathBuf {
    let directory = n / FILES_IN_DIRECTORY;
    folder.join(format!("{}/{}/file-{n}", directory / 20, directory % 20))
}

/// The first scan, and one that finds what changed while the daemon was off; at the end every file
/// is hashed.
fn index(owner: &mut Device, source: &Path) -> Result<Vec<Row>> {
    // The budgets are those of metadata: bytes are hashed at the disk's speed.
    hash(owner, false);
    owner.start();
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    walk(source)?;
    let began = Instant::now();
    owner.add_location(source, "files");
    until("the scan", || owner_row(owner, "files")["indexed"] == true)?;
    let first = began.elapsed();
    let entries = count(owner, "files", "entries")?;
    ensure!(entries >= ENTRIES as f64, "{entries} entries are not all");

    owner.stop();
    for n in (0..ENTRIES).step_by(ENTRIES / CHANGES) {
        fs::write(file_of(source, n), "another size than before")?;
    }
    let find = median_of(ROUNDS, |_| walk(source))?;
    owner.start();
    until("the second scan", || owner_row(owner, "files")["indexed"] == true)?;
    let second = owner.last_scan().context("no scan in the log")?;

    owner.stop();
    hash(owner, true);
    owner.start();
    let began = Instant::now();
    until("the hashes", || {
        let row = owner_row(owner, "files");
        row["indexed"] == true && row["hashed_files"] == row["files"] && row["state"] == "idle"
    })?;
    eprintln!("every file hashed after {:.0} s", began.elapsed().as_secs_f64());
    Ok(vec![
        Row {
            work: "index 1,000,000 entries, warm, without hashes",
            unit: "/s",
            reference: None,
            drive: entries / first.as_secs_f64(),
            must: 50_000.0,
        },
        Row {
            work: "find 1,000 changes among them at the start",
            unit: "s",
            reference: Some(("find -ls", find)),
            drive: second.as_secs_f64(),
            must: 2.0,
        },
    ])
}

fn hash(owner: &Device, on: bool) {
    owner.sd(&["config", "set", "index.hash", if on { "true" } else { "false" }]).ok();
}

fn replicate(owner: &Device, reader: &mut Device) -> Result<Option<Row>> {
    reader.start();
    let ticket = owner.invite();
    let began = Instant::now();
    reader.sd(&["device", "join", &ticket, "--device-name", "reader", "--yes"]).ok();
    let entries = count(owner, "files", "entries")?;
    until("the rows", || {
        reader.location_row("owner", "files").is_some_and(|row| row["entries"] == entries as u64)
    })?;
    Ok(Some(Row {
        work: "first replication of them to a new device",
        unit: "/s",
        reference: None,
        drive: entries / began.elapsed().as_secs_f64(),
        must: 100_000.0,
    }))
}

fn sizes(owner: &Device, reader: &Device) -> Result<Vec<Row>> {
    reader.mount();
    fs::read_dir(reader.at("owner/files"))?.count();
    // It notes who has which bytes.
    until_idle(reader)?;
    let entries = count(owner, "files", "entries")?;
    let on_disk = |device: &Device| device.status()["index"]["bytes"].as_f64();
    let [theirs, ours] = [on_disk(owner), on_disk(reader)];
    let row = |work, unit, drive, must| Row { work, unit, reference: None, drive, must };
    let memory = |device: &Device| device.memory().1 as f64 / MIB as f64;
    Ok(vec![
        row(
            "index on the owner's disk, each entry",
            "B",
            theirs.context("bytes")? / entries,
            400.0,
        ),
        row("index on the reader's disk, each entry", "B", ours.context("bytes")? / entries, 400.0),
        row("memory of the owner, 1,000,000 entries, idle", "MiB", memory(owner), 150.0),
        row("memory of the reader, mounted, idle", "MiB", memory(reader), 150.0),
    ])
}

/// As after a restart of the machine.
fn mount(reader: &mut Device) -> Result<Row> {
    reader.stop();
    let began = Instant::now();
    reader.start();
    reader.mount();
    fs::read_dir(reader.at("owner/files"))?.count();
    Ok(Row {
        work: "start of the daemon, sd mount, until ls answers",
        unit: "s",
        reference: None,
        drive: began.elapsed().as_secs_f64(),
        must: 1.0,
    })
}

fn list(owner: &Device, reader: &Device, flat: &Path) -> Result<Vec<Row>> {
    owner.add_location(flat, "flat");
    until("the scan", || owner_row(owner, "flat")["indexed"] == true)?;
    until("the rows", || {
        reader.location_row("owner", "flat").is_some_and(|row| row["entries"] == ENTRIES as u64)
    })?;
    until("its owner to rest", || owner_row(owner, "flat")["state"] == "idle")?;
    until_idle(reader)?;
    let began = Instant::now();
    let mut names = fs::read_dir(reader.at("owner/flat"))?;
    names.next().context("no name")??;
    let first = began.elapsed();
    let all = 1 + names.count();
    let took = began.elapsed();
    ensure!(all == ENTRIES, "{all} names");
    let row = |work, unit, drive, must| Row { work, unit, reference: None, drive, must };
    Ok(vec![
        row(
            "list a directory of 1,000,000 files, the first",
            "ms",
            first.as_secs_f64() * 1e3,
            20.0,
        ),
        row("the same, all of them", "s", took.as_secs_f64(), 3.0),
    ])
}

fn owner_row(owner: &Device, location: &str) -> serde_json::Value {
    owner.location_row("owner", location).unwrap_or_default()
}

fn count(owner: &Device, location: &str, field: &str) -> Result<f64> {
    owner_row(owner, location)[field].as_f64().context("a number")
}

/// Waits until the device's daemon has hardly worked for a while.
fn until_idle(device: &Device) -> Result<()> {
    const A_WHILE: usize = 10;
    let mut used = Vec::new();
    until("the daemon to rest", || {
        used.push(device.processor_time());
        let before = used.len().checked_sub(A_WHILE).map(|n| used[n]);
        // Threads that end take their times along.
        before.is_some_and(|b| used[used.len() - 1].abs_diff(b) < ASK_EVERY / 4)
    })
}

fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let began = Instant::now();
    while !condition() {
        ensure!(began.elapsed() < PATIENCE, "after {PATIENCE:?} still waiting for {what}");
        thread::sleep(ASK_EVERY);
    }
    Ok(())
}
