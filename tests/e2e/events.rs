//! Programs that watch a folder of another device with inotify hear what changes there.

use e2e::machine::long;
use e2e::wait::{wait_for, wait_until};
use e2e::{Device, Lab, Need, files};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What is promised of most changes.
const SOON: Duration = Duration::from_secs(1);
/// The test machine is shared by two daemons, this, and others.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a program may be held up by a daemon or a helper that was killed.
const HELD_UP: Duration = Duration::from_secs(20);

/// A program's watch of one folder.
struct Watch {
    inotify: OwnedFd,
    heard: BTreeSet<String>,
}

impl Watch {
    fn of(folder: &Path) -> Self {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
        let what = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::ATTRIB
            | WatchFlags::MOVE;
        inotify::add_watch(&inotify, folder, what).unwrap();
        Self { inotify, heard: BTreeSet::new() }
    }

    fn read(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            let name = event.file_name().map_or("".into(), |name| name.to_string_lossy());
            let flags = event.events().iter_names().map(|(name, _)| name).collect::<Vec<_>>();
            self.heard.insert(format!("{} {name}", flags.join("|")).trim().to_owned());
        }
    }

    /// Waits until all of these came, each of which is one of what `/` separates, and says how
    /// long after `since`; forgets what came.
    #[track_caller]
    fn hears(&mut self, expected: &[&str], since: Instant) -> Duration {
        while !expected.iter().all(|e| e.split('/').any(|e| self.heard.contains(e))) {
            let Self { inotify, heard } = &self;
            assert!(since.elapsed() < PATIENCE, "{expected:?} did not come, only {heard:?}");
            let mut poll = [rustix::event::PollFd::new(inotify, rustix::event::PollFlags::IN)];
            let a_while = Duration::from_millis(100).try_into().unwrap();
            rustix::event::poll(&mut poll, Some(&a_while)).unwrap();
            self.read();
        }
        self.heard.clear();
        since.elapsed()
    }
}

struct Pair {
    _lab: Lab,
    _owner: Device,
    reader: Device,
    /// The folder at its owner, and in the reader's mount.
    theirs: PathBuf,
    ours: PathBuf,
}

fn pair() -> Option<Pair> {
    pair_with(0)
}

/// With so many more files beside the folder.
fn pair_with(count: usize) -> Option<Pair> {
    let lab = Lab::lan(&[Need::Fuse])?;
    let source = lab.folder("source");
    for n in 0..count {
        let folder = source.join(format!("more/{}", n / 100));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(n.to_string()), "").unwrap();
    }
    fs::create_dir(source.join("dir")).unwrap();
    fs::write(source.join("dir/first"), "one").unwrap();
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let (theirs, ours) = (source.join("dir"), reader.at("owner/files/dir"));
    assert_eq!(fs::read(ours.join("first")).unwrap(), b"one");
    Some(Pair { _lab: lab, _owner: owner, reader, theirs, ours })
}

impl Pair {
    /// The process that makes the calls, while there is one.
    fn helper(&self) -> Option<u32> {
        let daemon = self.reader.pid();
        let tasks = fs::read_dir(format!("/proc/{daemon}/task")).ok()?;
        let children = tasks
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let pids: Vec<u32> = children
            .flat_map(|line| {
                line.split_whitespace().map(|p| p.parse().unwrap()).collect::<Vec<_>>()
            })
            .collect();
        pids.into_iter().find(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.ends_with(b"daemon\0events\0")
        })
    }

    /// What was changed on either side is on both.
    #[track_caller]
    fn assert_equal(&self) {
        self.reader.wait_online("owner");
        self.reader.sd(&["sync", "--timeout", "60s"]).ok();
        let mut both = Default::default();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            both = (files::listing(&self.theirs), files::listing(&self.ours));
            if both.0 == both.1 {
                return files::assert_same_bytes(&self.theirs, &self.ours);
            }
        }
        files::assert_same_listing(&both.0, &both.1);
    }

    fn assert_nothing_pending(&self) {
        let pending = self.reader.json(&["pending"]);
        assert_eq!(pending["pending"].as_array().map(Vec::len), Some(0), "{pending:#}");
    }
}

/// Everything of a folder that a call through the mount could have changed.
fn stamps(folder: &Path) -> BTreeSet<String> {
    let stamp = |path: PathBuf| {
        let of = fs::symlink_metadata(&path).unwrap();
        let times = [(of.mtime(), of.mtime_nsec()), (of.ctime(), of.ctime_nsec())];
        format!("{path:?} {} {:o} {} {times:?}", of.ino(), of.mode(), of.size())
    };
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.chain([folder.to_owned()]).map(stamp).collect()
}

/// One change at the owner, and what a program that watches the folder hears of it.
type Step = (&'static str, fn(&Path) -> io::Result<()>, &'static [&'static str]);

const STEPS: &[Step] = &[
    ("create", |dir| fs::write(dir.join("new"), "1"), &["CREATE new", "CLOSE_WRITE new"]),
    (
        "append",
        |dir| OpenOptions::new().append(true).open(dir.join("new"))?.write_all(b"2"),
        &["MODIFY new", "CLOSE_WRITE new"],
    ),
    ("overwrite", |dir| fs::write(dir.join("new"), "another"), &["MODIFY new", "CLOSE_WRITE new"]),
    (
        "atomic save",
        |dir| {
            fs::write(dir.join(".new.tmp"), "saved")?;
            fs::rename(dir.join(".new.tmp"), dir.join("new"))
        },
        // Whether the other name was seen meanwhile is a matter of time.
        &["MOVED_TO new/MODIFY new"],
    ),
    (
        "rename",
        |dir| fs::rename(dir.join("new"), dir.join("moved")),
        &["MOVED_FROM new", "MOVED_TO moved"],
    ),
    (
        "chmod",
        |dir| {
            let of = fs::metadata(dir.join("first"))?.permissions();
            fs::set_permissions(dir.join("first"), fs::Permissions::from_mode(of.mode() ^ 0o040))
        },
        &["ATTRIB first"],
    ),
    ("delete", |dir| fs::remove_file(dir.join("moved")), &["DELETE moved"]),
    ("mkdir", |dir| fs::create_dir(dir.join("sub")), &["CREATE|ISDIR sub"]),
    ("rmdir", |dir| fs::remove_dir(dir.join("sub")), &["DELETE|ISDIR sub"]),
];

#[test]
fn each_change_at_the_owner_is_told_to_who_watches() {
    let Some(pair) = pair_with(if long() { 20_000 } else { 200 }) else { return };
    let mut watch = Watch::of(&pair.ours);
    let mut took = Vec::new();
    for round in 0..5 {
        for (what, change, expected) in STEPS {
            let since = Instant::now();
            change(&pair.theirs).unwrap();
            let before = stamps(&pair.theirs);
            let latency = watch.hears(expected, since);
            println!("{round} {what}: {latency:?}");
            took.push(latency);
            // The folder's own times may come a moment later than what is in it.
            wait_until(format!("the listing after {what}"), SOON, || {
                files::listing(&pair.ours) == files::listing(&pair.theirs)
            });
            assert_eq!(stamps(&pair.theirs), before, "telling of {what} changed something");
        }
    }
    pair.assert_nothing_pending();
    took.sort();
    let median = took[took.len() / 2];
    println!("median {median:?}, most {:?}", took.last().unwrap());
    assert!(median < SOON, "{took:?}");
}

/// A thread that does something over and over, whatever comes of it.
struct Busy {
    what: &'static str,
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Busy {
    fn start(
        what: &'static str,
        mut round: impl FnMut() -> io::Result<()> + Send + 'static,
    ) -> Self {
        let (rounds, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, stopped) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // Without a daemon nothing succeeds; what counts is that it comes back.
                if round().is_err() {
                    thread::sleep(Duration::from_millis(1));
                }
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { what, rounds, stop, thread }
    }

    fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// It is not held up.
    #[track_caller]
    fn goes_on(&self) {
        let before = self.rounds();
        wait_until(format!("{} to go on", self.what), HELD_UP, || self.rounds() >= before + 3);
    }

    #[track_caller]
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        wait_until(format!("{} to end", self.what), HELD_UP, || self.thread.is_finished());
        self.rounds()
    }
}

/// Everything that goes on in the watched folder at once.
struct Flood(Vec<Busy>);

impl Flood {
    const CHANGES_A_ROUND: u64 = 5 * 20;

    fn start(pair: &Pair) -> Self {
        let (theirs, ours) = (pair.theirs.clone(), pair.ours.clone());
        let mut round = 0;
        let owner = Busy::start("the owner's program", move || {
            round += 1;
            (0..20).try_for_each(|n| churn(&theirs.join(format!("{n}")), round))
        });
        let folder = ours.clone();
        let reader = Busy::start("a program that reads", move || read_all(&folder));
        let folder = ours.clone();
        let another = Busy::start("another program that reads", move || read_all(&folder));
        let mut round = 0;
        let writer = Busy::start("a program that writes here", move || {
            round += 1;
            // Not much faster than it is delivered: in the end all of it must have been.
            thread::sleep(Duration::from_millis(5));
            churn(&ours.join("own"), round)
        });
        Self(vec![owner, reader, another, writer])
    }

    #[track_caller]
    fn goes_on(&self) {
        self.0.iter().for_each(Busy::goes_on);
    }

    /// Ends it; says how many changes the owner made.
    #[track_caller]
    fn stop(self) -> u64 {
        let rounds: Vec<u64> = self.0.into_iter().map(Busy::stop).collect();
        println!("rounds {rounds:?}");
        rounds[0] * Self::CHANGES_A_ROUND
    }
}

fn churn(path: &Path, round: u64) -> io::Result<()> {
    let other = path.with_extension("other");
    fs::write(path, format!("{round}"))?;
    OpenOptions::new().append(true).open(path)?.write_all(b"more")?;
    fs::rename(path, &other)?;
    fs::write(path, format!("another {round}"))?;
    match round % 3 {
        0 => fs::rename(&other, path),
        _ => fs::remove_file(&other),
    }
}

fn read_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        // Most are gone or another by now.
        let path = entry?.path();
        let _ = fs::metadata(&path).map(|of| of.len());
        let _ = fs::read(&path);
    }
    Ok(())
}

#[test]
fn a_flood_with_kills_of_the_helper_holds_up_no_program() {
    let Some(pair) = pair() else { return };
    let mut watch = Watch::of(&pair.ours);
    fs::write(pair.theirs.join("begin"), "").unwrap();
    watch.hears(&["CREATE begin"], Instant::now());
    let flood = Flood::start(&pair);
    for kill in 0..5 {
        flood.goes_on();
        watch.read();
        let helper = wait_for("a helper", HELD_UP, || pair.helper());
        let pid = Pid::from_raw(helper.cast_signed()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        wait_until(format!("another helper after kill {kill}"), HELD_UP, || {
            watch.read();
            pair.helper().is_some_and(|now| now != helper)
        });
    }
    flood.goes_on();
    let changes = flood.stop();
    println!("{changes} changes, {} kinds of events", watch.heard.len());
    assert!(changes > 2000);
    let since = Instant::now();
    fs::write(pair.theirs.join("end"), "end").unwrap();
    watch.hears(&["CREATE end"], since);
    pair.assert_equal();
    let (peak, _) = pair.reader.memory();
    println!("{} MiB at most", peak >> 20);
}

#[test]
fn a_daemon_that_is_killed_while_it_tells_leaves_no_hung_program_and_no_helper() {
    let Some(mut pair) = pair() else { return };
    for kill in 0..5 {
        let watch = Watch::of(&pair.ours);
        let flood = Flood::start(&pair);
        let helper = wait_for("a helper", HELD_UP, || pair.helper());
        flood.goes_on();
        pair.reader.kill();
        flood.goes_on();
        drop(watch);
        wait_until(format!("the end of the helper after kill {kill}"), HELD_UP, || {
            !Path::new(&format!("/proc/{helper}")).exists()
        });
        pair.reader.start();
        pair.reader.mount();
        flood.goes_on();
        flood.stop();
        let mut watch = Watch::of(&pair.ours);
        let name = format!("after {kill}");
        let since = Instant::now();
        fs::write(pair.theirs.join(&name), "").unwrap();
        watch.hears(&[&format!("CREATE {name}")], since);
    }
    pair.assert_equal();
}

/// Something is mounted on this path.
fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

/// A file system in memory, mounted inside the drive.
struct Held(PathBuf);

impl Held {
    fn on(path: PathBuf) -> Self {
        use rustix::mount::{MountFlags, mount};
        mount("none", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(path)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn what_is_mounted_inside_the_drive_stays_where_its_folder_is() {
    let Some(pair) = pair() else { return };
    let mut watch = Watch::of(&pair.ours);
    let mut hears = |change: &dyn Fn(&Path), expected: &[&str]| {
        let since = Instant::now();
        change(&pair.theirs);
        watch.hears(expected, since);
    };
    hears(&|dir| fs::create_dir_all(dir.join("held/sub")).unwrap(), &["CREATE|ISDIR held"]);
    wait_until("the folder in it", PATIENCE, || pair.ours.join("held/sub").is_dir());
    let held = Held::on(pair.ours.join("held/sub"));
    fs::write(held.0.join("here"), "only here").unwrap();
    for (what, change, expected) in STEPS {
        hears(&|dir| change(dir).unwrap(), expected);
        assert!(is_mounted(&held.0), "{what} took it away");
    }
    fs::create_dir(pair.theirs.join("held/other")).unwrap();
    wait_until("the other folder", PATIENCE, || pair.ours.join("held/other").is_dir());
    assert_eq!(fs::read(held.0.join("here")).unwrap(), b"only here");
    hears(&|dir| fs::rename(dir.join("held"), dir.join("kept")).unwrap(), &["ATTRIB|ISDIR kept"]);
    let kept = Held(pair.ours.join("kept/sub"));
    assert_eq!(fs::read(kept.0.join("here")).unwrap(), b"only here");
    drop(kept);
    pair.assert_equal();
}

#[test]
fn a_daemon_whose_parent_ignores_the_end_of_children_tells_and_takes_leave_of_its_helpers() {
    let Some(mut pair) = pair() else { return };
    pair.reader.stop();
    pair.reader.start_without_child_signals();
    pair.reader.mount();
    let status = fs::read_to_string(format!("/proc/{}/status", pair.reader.pid())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    assert_eq!(ignored & 1 << (Signal::CHILD.as_raw() - 1), 0, "{ignored:x}");
    let mut watch = Watch::of(&pair.ours);
    for round in 0..3 {
        let since = Instant::now();
        fs::write(pair.theirs.join(format!("{round}")), "").unwrap();
        // While there is no helper, all is told as one.
        watch.hears(&[&format!("CREATE {round}/ATTRIB|ISDIR")], since);
        let helper = wait_for("a helper", HELD_UP, || pair.helper());
        kill_process(Pid::from_raw(helper.cast_signed()).unwrap(), Signal::KILL).unwrap();
    }
}
