//! A million entries, or five: how fast they are indexed, replicated and listed, and what they take.
//!
//! Each figure is of one run: a second one would find the rows of the first.

use crate::{MIB, ROUNDS, Row, lab_or_reason, median_of, walk};
use anyhow::{Context, Result, ensure};
use e2e::{Device, Lab, Need};
use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

const FILES_IN_DIRECTORY: usize = 1000;
const CHANGES: usize = 1000;
/// How often the daemon is asked how far it is: rarely, because the answer costs it something.
const ASK_EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(900);

/// A library.
struct Scale {
    entries: usize,
    /// How the rows say that.
    words: &'static str,
    /// Each file has bytes of its own, which are hashed: 4 KiB of the disk each.
    hashed: bool,
}

const MILLION: Scale = Scale { entries: 1_000_000, words: "1,000,000", hashed: true };
const FIVE_MILLION: Scale = Scale { entries: 5_000_000, words: "5,000,000", hashed: false };

/// The rows of this part, and those of a directory of as many.
pub fn million() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::lan(&[Need::Root, Need::Fuse]))?;
    let flat = lab.folder("flat");
    (0..MILLION.entries)
        .try_for_each(|n| File::create(flat.join(format!("file-{n}"))).map(drop))?;
    let (mut rows, owner, reader) = measure(&lab, &MILLION)?;
    rows.extend(list(&owner, &reader, &flat)?);
    for (name, device) in [("owner", &owner), ("reader", &reader)] {
        rows.push(Row {
            work: format!("peak memory of the {name} since its start"),
            unit: "MiB",
            reference: None,
            drive: device.memory().0 as f64 / MIB as f64,
            must: Some(300.0),
        });
    }
    Ok(rows)
}

/// The rows of this part.
pub fn five_million() -> Result<Vec<Row>> {
    let lab = lab_or_reason(Lab::lan(&[Need::Root, Need::Fuse]))?;
    Ok(measure(&lab, &FIVE_MILLION)?.0)
}

fn measure(lab: &Lab, scale: &Scale) -> Result<(Vec<Row>, Device, Device)> {
    let source = lab.folder("source");
    scale.make_tree(&source)?;
    // What the disk still has to write would slow down what is measured.
    rustix::fs::sync();

    let mut owner = lab.stopped_device_at(0, "owner");
    let mut rows = index(&mut owner, &source, scale)?;
    let mut reader = lab.stopped_device_at(1, "reader");
    rows.push(replicate(&owner, &mut reader)?);
    rows.extend(sizes(&owner, &reader, scale)?);
    rows.push(mount(&mut reader)?);
    Ok((rows, owner, reader))
}

impl Scale {
    fn make_tree(&self, folder: &Path) -> Result<()> {
        for n in 0..self.entries {
            let file = file_of(folder, n);
            if n % FILES_IN_DIRECTORY == 0 {
                fs::create_dir_all(file.parent().context("a directory")?)?;
            }
            fs::write(file, if self.hashed { n.to_string() } else { String::new() })?;
        }
        Ok(())
    }
}

fn file_of(folder: &Path, n: usize) -> std::path::PathBuf {
    let directory = n / FILES_IN_DIRECTORY;
    folder.join(format!("{}/{}/file-{n}", directory / 20, directory % 20))
}

/// The first scan, and one that finds what changed while the daemon was off; at the end every file
/// is hashed.
fn index(owner: &mut Device, source: &Path, scale: &Scale) -> Result<Vec<Row>> {
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
    ensure!(entries >= scale.entries as f64, "{entries} entries are not all");

    owner.stop();
    for n in (0..scale.entries).step_by(scale.entries / CHANGES) {
        fs::write(file_of(source, n), "another size than before")?;
    }
    let find = median_of(ROUNDS, |_| walk(source))?;
    owner.start();
    until("the second scan", || owner_row(owner, "files")["indexed"] == true)?;
    let second = owner.last_scan().context("no scan in the log")?;

    if scale.hashed {
        hash_all(owner)?;
    }
    Ok(vec![
        Row {
            work: format!("index {} entries, warm, without hashes", scale.words),
            unit: "/s",
            reference: None,
            drive: entries / first.as_secs_f64(),
            must: Some(50_000.0),
        },
        Row {
            work: "find 1,000 changes among them at the start".into(),
            unit: "s",
            reference: Some(("find -ls", find)),
            drive: second.as_secs_f64(),
            must: Some(2.0),
        },
    ])
}

fn hash_all(owner: &mut Device) -> Result<()> {
    owner.stop();
    hash(owner, true);
    owner.start();
    let began = Instant::now();
    until("the hashes", || {
        let row = owner_row(owner, "files");
        row["indexed"] == true && row["hashed_files"] == row["files"] && row["state"] == "idle"
    })?;
    eprintln!("every file hashed after {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

fn hash(owner: &Device, on: bool) {
    owner.sd(&["config", "set", "index.hash", if on { "true" } else { "false" }]).ok();
}

fn replicate(owner: &Device, reader: &mut Device) -> Result<Row> {
    reader.start();
    let ticket = owner.invite();
    let began = Instant::now();
    reader.sd(&["device", "join", &ticket, "--device-name", "reader", "--yes"]).ok();
    let entries = count(owner, "files", "entries")?;
    until("the rows", || {
        reader.location_row("owner", "files").is_some_and(|row| row["entries"] == entries as u64)
    })?;
    Ok(Row {
        work: "first replication of them to a new device".into(),
        unit: "/s",
        reference: None,
        drive: entries / began.elapsed().as_secs_f64(),
        must: Some(100_000.0),
    })
}

fn sizes(owner: &Device, reader: &Device, scale: &Scale) -> Result<Vec<Row>> {
    reader.mount();
    fs::read_dir(reader.at("owner/files"))?.count();
    // It notes who has which bytes.
    until_idle(reader)?;
    let entries = count(owner, "files", "entries")?;
    let on_disk = |device: &Device| device.status()["index"]["bytes"].as_f64();
    let [theirs, ours] = [on_disk(owner), on_disk(reader)];
    let row = |work: String, unit, drive, must| Row {
        work,
        unit,
        reference: None,
        drive,
        must: Some(must),
    };
    let memory = |device: &Device| device.memory().1 as f64 / MIB as f64;
    Ok(vec![
        row(
            "index on the owner's disk, each entry".into(),
            "B",
            theirs.context("bytes")? / entries,
            400.0,
        ),
        row(
            "index on the reader's disk, each entry".into(),
            "B",
            ours.context("bytes")? / entries,
            400.0,
        ),
        row(
            format!("memory of the owner, {} entries, idle", scale.words),
            "MiB",
            memory(owner),
            150.0,
        ),
        row("memory of the reader, mounted, idle".into(), "MiB", memory(reader), 150.0),
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
        work: "start of the daemon, sd mount, until ls answers".into(),
        unit: "s",
        reference: None,
        drive: began.elapsed().as_secs_f64(),
        must: Some(1.0),
    })
}

fn list(owner: &Device, reader: &Device, flat: &Path) -> Result<Vec<Row>> {
    owner.add_location(flat, "flat");
    until("the scan", || owner_row(owner, "flat")["indexed"] == true)?;
    until("the rows", || {
        reader
            .location_row("owner", "flat")
            .is_some_and(|row| row["entries"] == MILLION.entries as u64)
    })?;
    until("its owner to rest", || owner_row(owner, "flat")["state"] == "idle")?;
    until_idle(reader)?;
    let began = Instant::now();
    let mut names = fs::read_dir(reader.at("owner/flat"))?;
    names.next().context("no name")??;
    let first = began.elapsed();
    let all = 1 + names.count();
    let took = began.elapsed();
    ensure!(all == MILLION.entries, "{all} names");
    let row = |work: &str, unit, drive, must| Row {
        work: work.into(),
        unit,
        reference: None,
        drive,
        must: Some(must),
    };
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
