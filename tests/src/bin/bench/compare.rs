//! The drive beside the programs of [`peers`](crate::peers): the same work through the mount of
//! each, over the same link, from the same owner's disk.
//!
//! Of each system a run starts with a mount that has nothing cached, and the kernel has forgotten
//! what it knew of any file. Systems take turns; while one works nothing else is mounted.

use crate::peers::{KINDS, Peer};
use crate::report::{self, Comparison, Figure, Outcome};
use crate::{
    MIB, ROUNDS, cold_read_speed, first_byte, forget_content, lab_on, median_of, read_speed,
};
use anyhow::{Context, Result, anyhow, ensure};
use e2e::disk::MemoryDisk;
use e2e::{Device, Lab, files, proc};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// What the columns call the drive.
pub const DRIVE: &str = "the drive";

/// What is counted in files ends after so long, done or not: some need minutes for what others do
/// in a second, and how many they are in a second is known long before.
pub const STOP_AFTER: Duration = Duration::from_secs(12);
const WALK_WITHIN: Duration = Duration::from_secs(60);
/// How long the owner is waited for.
const DELIVERED_WITHIN: Duration = Duration::from_secs(30);
/// Nothing takes longer, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(150);
const POLL: Duration = Duration::from_millis(20);
const FOR_FIRST_BYTE: usize = 9;
const SMALL_BYTES: usize = 4 << 10;

struct Link {
    name: &'static str,
    words: &'static str,
    /// As `netlab.c` lists them.
    options: &'static [&'static str],
    big_bytes: u64,
}

const LINKS: [Link; 2] = [
    Link { name: "lan", words: "LAN", options: &[], big_bytes: 512 * MIB },
    Link {
        name: "far",
        words: "20 ms, 200 Mbit/s",
        options: &["--delay", "10", "--rate", "200"],
        big_bytes: 100 * MIB,
    },
];

impl Link {
    fn is_far(&self) -> bool {
        !self.options.is_empty()
    }
}

struct Work {
    name: &'static str,
    /// What each figure of a run is, and its unit.
    rows: &'static [(&'static str, &'static str)],
    /// Fills the owner's folder.
    make: fn(&Path, &Link) -> Result<()>,
    /// Gives a figure for each row, or only for the first ones when the others are out of reach.
    run: fn(&Site) -> Result<Vec<Figure>>,
}

const WORKS: [Work; 4] = [
    Work {
        name: "read",
        rows: &[
            ("first byte of an uncached file", "ms"),
            ("first read of a large file", "MiB/s"),
            ("the same again, page cache dropped", "MiB/s"),
        ],
        make: large_files,
        run: read,
    },
    Work {
        name: "walk",
        rows: &[("find -ls of 20,000 files, fresh mount", "s"), ("the same again", "s")],
        make: |tree, _| crate::walks::flat_directories(tree, 200),
        run: walk_twice,
    },
    Work {
        name: "crowd",
        rows: &[("read 5,000 uncached files of 4 KiB", "files/s")],
        make: |tree, _| crate::crowd::small_trees(tree),
        run: read_crowd,
    },
    Work {
        name: "write",
        rows: &[
            ("write 1,000 files of 4 KiB, each", "ms"),
            ("the same, until their owner has them all, each", "ms"),
        ],
        make: |_, _| Ok(()),
        run: write_small_files,
    },
];

/// Where a system shows the owner's files.
struct Site {
    files: PathBuf,
    /// A folder to write to, and the same one on the owner's disk.
    inbox: PathBuf,
    inbox_at_owner: PathBuf,
}

/// What [`measure`] knows, each by its name on the command line, in the order of the table.
pub fn parts() -> Vec<String> {
    all().map(|(link, work)| name_of(link, work)).collect()
}

/// Whether it stands for some of [`parts`]: `peers`, `peers-far`, `peers-far-walk`.
pub fn is_group(word: &str) -> bool {
    parts().iter().any(|part| belongs(part, word))
}

/// Those of [`parts`] that these words stand for; `done` gets the rows of each as soon as it ends.
pub fn measure(
    words: &[&str],
    mut done: impl FnMut(&[Comparison]) -> Result<()>,
) -> Result<Vec<Comparison>> {
    let is_wanted = |part: &str| words.iter().any(|word| belongs(part, word));
    let wanted: Vec<_> = all().filter(|(link, work)| is_wanted(&name_of(link, work))).collect();
    let mut rows = Vec::new();
    for (nth, (link, work)) in wanted.iter().enumerate() {
        eprintln!("{} ({} of {})", name_of(link, work), nth + 1, wanted.len());
        let new = compare(link, work)?;
        done(&new)?;
        rows.extend(new);
    }
    Ok(rows)
}

fn all() -> impl Iterator<Item = (&'static Link, &'static Work)> {
    LINKS.iter().flat_map(|link| WORKS.iter().map(move |work| (link, work)))
}

fn name_of(link: &Link, work: &Work) -> String {
    format!("peers-{}-{}", link.name, work.name)
}

fn belongs(part: &str, word: &str) -> bool {
    part.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// A system on its way through the rounds: the figures so far, or why there are none.
struct Entrant<'a> {
    name: &'static str,
    system: Result<System<'a>>,
    rounds: Vec<Vec<Figure>>,
}

enum System<'a> {
    /// Its owner and its reader.
    Drive([&'a Device; 2]),
    Peer(Box<Peer<'a>>),
}

fn compare(link: &Link, work: &'static Work) -> Result<Vec<Comparison>> {
    let lab = lab_on(link.options)?;
    let disk = lab.folder("disk");
    // Devices that are far from each other have a disk each.
    let in_memory = |folder: &PathBuf| MemoryDisk::mount(folder);
    let owners = [disk.clone(), lab.folder("owner")];
    let _owners: Vec<_> = owners.iter().filter(|_| link.is_far()).map(in_memory).collect();
    let export = lab.folder("disk/export");
    let files = lab.folder("disk/export/files");
    // The drive does not index what others write.
    lab.folder("disk/export/inbox");
    (work.make)(&files, link)?;
    let (owner, reader) = lab.owner_and_reader(&files);
    reader.wait_replicated(&owner, "files");
    let ends = [&owner, &reader];

    let drive = Entrant { name: DRIVE, system: Ok(System::Drive(ends)), rounds: vec![] };
    let mut entrants = vec![drive];
    for (nth, kind) in KINDS.iter().enumerate() {
        let copy = disk.join(format!("copy-{nth}"));
        let theirs = if kind.own_copy { copy_of(&export, &copy)? } else { &export };
        let peer = Peer::start(kind, ends, theirs, &lab.folder(&format!("peer-{nth}")));
        entrants.push(Entrant {
            name: kind.name,
            system: peer.map(|peer| System::Peer(peer.into())),
            rounds: vec![],
        });
    }
    for round in 0..ROUNDS {
        entrants.iter_mut().for_each(|entrant| entrant.take_turn(round, work, &lab));
    }
    Ok(rows(link, work, &entrants))
}

fn copy_of<'a>(export: &Path, copy: &'a Path) -> Result<&'a Path> {
    proc::run(Command::new("cp").arg("-a").arg(export).arg(copy), PATIENCE).ok();
    Ok(copy)
}

fn rows(link: &Link, work: &Work, entrants: &[Entrant]) -> Vec<Comparison> {
    let outcome = |row: usize, entrant: &Entrant| Outcome {
        system: entrant.name.to_owned(),
        runs: match entrant.system {
            Ok(_) => {
                entrant.rounds.iter().filter_map(|figures| figures.get(row).copied()).collect()
            }
            Err(_) => vec![],
        },
        not_measured: entrant.why_not(row),
    };
    let row = |(nth, (words, unit)): (usize, &(&str, &str))| Comparison {
        part: name_of(link, work),
        link: link.words.to_owned(),
        work: (*words).to_owned(),
        unit: (*unit).to_owned(),
        measured: report::today_and_here(),
        systems: entrants.iter().map(|entrant| outcome(nth, entrant)).collect(),
    };
    work.rows.iter().enumerate().map(row).collect()
}

impl Entrant<'_> {
    fn why_not(&self, row: usize) -> Option<String> {
        let too_slow = || self.rounds.iter().all(|figures| figures.len() <= row);
        match &self.system {
            Err(reason) => Some(format!("{reason:#}")),
            Ok(_) => too_slow().then(|| "what comes before takes too long".to_owned()),
        }
    }

    /// Of what takes longer than anybody waits no median is needed.
    fn is_hopeless(&self) -> bool {
        self.rounds.iter().any(|figures| figures.iter().all(|figure| figure.at_least))
    }

    fn take_turn(&mut self, round: usize, work: &'static Work, lab: &Lab) {
        if self.is_hopeless() {
            return;
        }
        let figures = match &mut self.system {
            Err(_) if round > 0 => return,
            Err(reason) => Err(anyhow!("{reason:#}")),
            Ok(system) => system.turn(&format!("{}-{round}", self.name), work, lab),
        };
        match figures {
            Ok(figures) => {
                let told: Vec<_> =
                    figures.iter().zip(work.rows).map(|(f, (_, unit))| f.told(unit)).collect();
                eprintln!("  run {} of {ROUNDS}, {}: {}", round + 1, self.name, told.join(", "));
                self.rounds.push(figures);
            }
            Err(reason) => {
                eprintln!("  {}: not measured: {reason:#}", self.name);
                self.system = Err(reason);
            }
        }
    }
}

impl System<'_> {
    /// `new` is a name that nobody has given to anything yet.
    fn turn(&mut self, new: &str, work: &'static Work, lab: &Lab) -> Result<Vec<Figure>> {
        let export = match self {
            Self::Drive(_) => lab.dir().join("disk/export/files"),
            Self::Peer(peer) => peer.export().join("inbox"),
        };
        let (files, inbox) = match self {
            Self::Drive([_, reader]) => {
                forget_content(reader);
                (reader.at("owner/files"), reader.at("owner/files"))
            }
            Self::Peer(peer) => {
                files::drop_kernel_caches();
                let mount = peer.mount()?;
                (mount.join("files"), mount.join("inbox"))
            }
        };
        let (inbox, inbox_at_owner) = (inbox.join(new), export.join(new));
        let figures = limited(work.run, Site { files, inbox, inbox_at_owner });
        match self {
            // What it indexes of what was written is not to be in the next one's way.
            Self::Drive([owner, reader]) => reader.wait_replicated(owner, "files"),
            Self::Peer(peer) => peer.unmount(),
        }
        figures
    }
}

/// A mount that hangs must not hang all: the thread ends with what hangs.
fn limited(run: fn(&Site) -> Result<Vec<Figure>>, site: Site) -> Result<Vec<Figure>> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        // Nobody listens when it took too long.
        let _ = done.send(run(&site));
    });
    match result.recv_timeout(PATIENCE) {
        Ok(figures) => figures,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(anyhow!("no end after {PATIENCE:?}")),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(anyhow!("failed; it says why above")),
    }
}

fn large_files(folder: &Path, link: &Link) -> Result<()> {
    files::random_file(&folder.join("big"), link.big_bytes, 4);
    for n in 0..FOR_FIRST_BYTE {
        files::random_file(&folder.join(format!("small-{n}")), 16 * MIB, n as u64);
    }
    Ok(())
}

fn read(site: &Site) -> Result<Vec<Figure>> {
    let file = |n| site.files.join(format!("small-{n}"));
    let first = median_of(FOR_FIRST_BYTE, |n| first_byte(&file(n)))?;
    let big = site.files.join("big");
    Ok(vec![first.into(), read_speed(&big)?.into(), cold_read_speed(&big)?.into()])
}

fn walk_twice(site: &Site) -> Result<Vec<Figure>> {
    let first = walk(&site.files)?;
    if first.at_least {
        return Ok(vec![first]);
    }
    Ok(vec![first, walk(&site.files)?])
}

/// `find -ls`, in seconds.
fn walk(folder: &Path) -> Result<Figure> {
    let mut find = Command::new("find");
    find.arg(folder).arg("-ls").stdin(Stdio::null()).stdout(Stdio::null());
    let began = Instant::now();
    let mut find = proc::spawn(&mut find);
    loop {
        let value = began.elapsed().as_secs_f64();
        if let Some(status) = find.try_wait()? {
            ensure!(status.success(), "find -ls: {status}");
            return Ok(value.into());
        }
        if value > WALK_WITHIN.as_secs_f64() {
            find.kill()?;
            find.wait()?;
            return Ok(Figure { value, at_least: true });
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// In the order of their directories, as `tar` does.
fn read_crowd(site: &Site) -> Result<Vec<Figure>> {
    let (began, mut count) = (Instant::now(), 0);
    'all: for directory in fs::read_dir(&site.files)? {
        for file in fs::read_dir(directory?.path())? {
            if began.elapsed() > STOP_AFTER {
                break 'all;
            }
            let read = fs::read(file?.path())?;
            ensure!(read.len() == SMALL_BYTES, "a file of {} bytes", read.len());
            count += 1;
        }
    }
    ensure!(count > 0, "no file was read in {STOP_AFTER:?}");
    Ok(vec![(f64::from(count) / began.elapsed().as_secs_f64()).into()])
}

/// Each closed before the next one.
fn write_small_files(site: &Site) -> Result<Vec<Figure>> {
    let all: Vec<_> = (0..1000).map(|n| files::random_bytes(SMALL_BYTES, n)).collect();
    fs::create_dir(&site.inbox).context("a new folder")?;
    let (began, mut count) = (Instant::now(), 0);
    for bytes in &all {
        if began.elapsed() > STOP_AFTER {
            break;
        }
        fs::write(site.inbox.join(count.to_string()), bytes)?;
        count += 1;
    }
    let each = |took: Duration| took.as_secs_f64() * 1e3 / count as f64;
    let written = each(began.elapsed());
    let in_time = until_there(&site.inbox_at_owner, count);
    let there = Figure { value: each(began.elapsed()), at_least: !in_time };
    Ok(vec![written.into(), there])
}

/// Whether the owner has that many files, whole, before it has been waited for too long.
fn until_there(folder: &Path, count: usize) -> bool {
    let is_there = |n: usize| {
        let file = File::open(folder.join(n.to_string())).and_then(|file| file.metadata());
        file.is_ok_and(|file| file.len() == SMALL_BYTES as u64)
    };
    let began = Instant::now();
    // The last is looked for first: mostly it comes last.
    while !(0..count).rev().all(is_there) {
        if began.elapsed() > DELIVERED_WITHIN {
            return false;
        }
        thread::sleep(POLL);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stands_for_whole_words() {
        let count = |word| parts().iter().filter(|part| belongs(part, word)).count();
        assert_eq!(count("peers"), LINKS.len() * WORKS.len());
        assert_eq!(count("peers-far"), WORKS.len());
        assert_eq!(count("peers-far-walk"), 1);
        assert!(!is_group("peers-f"));
        assert!(!is_group("walk"));
    }
}
