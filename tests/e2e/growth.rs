//! Files that their owner appends to go on under their inode: `tail -f` of another device's log.

use e2e::wait::{wait_for, wait_until};
use e2e::{Device, Lab, Need};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is promised on a LAN.
const SOON: Duration = Duration::from_secs(1);
/// The test machine is shared by two daemons, this, and others.
const PATIENCE: Duration = Duration::from_secs(10);

struct Pair {
    lab: Lab,
    _owner: Device,
    _reader: Device,
    theirs: PathBuf,
    ours: PathBuf,
}

/// A log of some lines, hashed, on a LAN.
fn pair() -> Option<Pair> {
    let lab = Lab::lan(&[Need::Fuse])?;
    let source = lab.folder("source");
    fs::write(source.join("log"), line(0)).unwrap();
    let (owner, reader) = lab.owner_and_reader(&source);
    owner.wait_hashed("files");
    reader.wait_replicated(&owner, "files");
    let (theirs, ours) = (source.join("log"), reader.at("owner/files/log"));
    wait_until("the log", PATIENCE, || fs::read(&ours).is_ok_and(|log| log == line(0).as_bytes()));
    Some(Pair { lab, _owner: owner, _reader: reader, theirs, ours })
}

fn line(n: usize) -> String {
    format!("line {n} of a log\n")
}

fn lines(numbers: std::ops::Range<usize>) -> String {
    numbers.map(line).collect()
}

fn append(path: &Path, text: &str) {
    let mut file = File::options().append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// `tail` of a file from its beginning, as it goes on.
struct Tail {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Tail {
    fn of(pair: &Pair, name: &str, how: &str) -> Self {
        let [out, err] = ["out", "err"].map(|end| pair.lab.dir().join(format!("{name}.{end}")));
        let child = Command::new("tail")
            .args(["-n", "+1", "-s", "0.02", how])
            .arg(&pair.ours)
            .stdin(Stdio::null())
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&err).unwrap())
            .spawn()
            .unwrap();
        Self { child, out, err }
    }

    fn shows(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    fn says(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
fn tail_shows_each_line_of_another_devices_log() {
    let Some(pair) = pair() else { return };
    let ino = fs::metadata(&pair.ours).unwrap().ino();
    let tails = [Tail::of(&pair, "by-handle", "-f"), Tail::of(&pair, "by-name", "-F")];
    let mut times = Vec::new();
    for n in 1..=40 {
        // More and less often than the owner looks.
        std::thread::sleep(Duration::from_millis(n as u64 * 37 % 250));
        append(&pair.theirs, &line(n));
        let began = Instant::now();
        for tail in &tails {
            wait_until(format!("line {n}"), PATIENCE, || tail.shows() == lines(0..n + 1));
        }
        times.push(began.elapsed());
    }
    times.sort();
    println!("a line is shown after {:?}, at most {:?}", times[times.len() / 2], times.last());
    assert!(times[times.len() / 2] < SOON);
    assert_eq!(fs::metadata(&pair.ours).unwrap().ino(), ino);
    for tail in &tails {
        assert_eq!(tail.says(), "", "the file is the same one");
    }
}

#[test]
fn a_log_that_is_written_without_pause_is_followed() {
    let Some(pair) = pair() else { return };
    let ino = fs::metadata(&pair.ours).unwrap().ino();
    let tail = Tail::of(&pair, "tail", "-F");
    let mut log = File::options().append(true).open(&pair.theirs).unwrap();
    let (began, mut n) = (Instant::now(), 1);
    while began.elapsed() < Duration::from_secs(5) {
        log.write_all(line(n).as_bytes()).unwrap();
        n += 1;
        std::thread::sleep(Duration::from_micros(500));
        if n % 100 == 0 {
            // Whoever looks anew reads what it is told of, and nothing else.
            let size = fs::metadata(&pair.ours).unwrap().len();
            let read = fs::read_to_string(&pair.ours).unwrap();
            assert!(read.len() as u64 >= size, "{} of {size}", read.len());
            assert!(lines(0..n).starts_with(&read), "{}", &read[read.len() - 100..]);
        }
    }
    wait_until("the last line", PATIENCE, || tail.shows().len() == lines(0..n).len());
    assert!(tail.shows() == lines(0..n));
    assert_eq!((tail.says(), fs::metadata(&pair.ours).unwrap().ino()), (String::new(), ino));
}

#[test]
fn a_log_that_begins_empty_is_followed_from_its_first_line() {
    let Some(pair) = pair() else { return };
    let [theirs, ours] = [&pair.theirs, &pair.ours].map(|log| log.with_file_name("new"));
    File::create(&theirs).unwrap();
    wait_until("the new log", PATIENCE, || ours.exists());
    let pair = Pair { theirs, ours, ..pair };
    let tail = Tail::of(&pair, "tail", "-F");
    for n in 0..10 {
        append(&pair.theirs, &line(n));
        wait_until(format!("line {n}"), PATIENCE, || tail.shows() == lines(0..n + 1));
    }
    assert_eq!(tail.says(), "");
}

#[test]
fn a_log_that_is_cut_or_changed_is_another_file() {
    let Some(pair) = pair() else { return };
    append(&pair.theirs, &line(1));
    wait_until("more", PATIENCE, || fs::read(&pair.ours).unwrap() == lines(0..2).as_bytes());
    let before = File::open(&pair.ours).unwrap();
    let ino = before.metadata().unwrap().ino();
    let other = |what: &str, text: &str| {
        wait_for(what, PATIENCE, || (fs::read_to_string(&pair.ours).ok()? == text).then_some(()));
        fs::metadata(&pair.ours).unwrap().ino()
    };
    // As long as before and longer, with another first byte.
    let changed = lines(0..3).replacen('l', "L", 1);
    fs::write(&pair.theirs, &changed).unwrap();
    let second = other("the changed log", &changed);
    fs::write(&pair.theirs, line(7)).unwrap();
    let third = other("the cut log", &line(7));
    assert!(ino != second && second != third && third != ino, "{ino}, {second}, {third}");
    assert_eq!(before.metadata().unwrap().len(), lines(0..2).len() as u64);
}

#[test]
fn a_program_that_waits_for_a_log_finds_what_it_hears_of() {
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
    let Some(pair) = pair() else { return };
    let inotify = inotify::init(CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&inotify, &pair.ours, WatchFlags::MODIFY).unwrap();
    let mut log = lines(0..1);
    for n in 1..=20 {
        log.push_str(&line(n));
        append(&pair.theirs, &line(n));
        let mut poll = [rustix::event::PollFd::new(&inotify, rustix::event::PollFlags::IN)];
        let patience = PATIENCE.try_into().unwrap();
        assert_eq!(rustix::event::poll(&mut poll, Some(&patience)).unwrap(), 1, "line {n}");
        assert!(rustix::io::read(&inotify, &mut [0; 4096]).unwrap() > 0);
        // Once, and at once: there may be no further event.
        assert_eq!(fs::read_to_string(&pair.ours).unwrap(), log, "line {n}");
    }
}
