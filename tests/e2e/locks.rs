//! Locks of programs on different devices, on one file.

use e2e::locker::Locker;
use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need};
use rustix::process::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What crosses the network, on a machine with three daemons and this test.
const SOON: Duration = Duration::from_secs(20);
/// The end of a device is noticed, and its lease runs out.
const LEASE: Duration = Duration::from_secs(45);
/// A program that waits is asked for signals all the time.
const SIGNAL: Duration = Duration::from_secs(5);

struct Pair {
    lab: Lab,
    owner: Device,
    reader: Device,
    /// The file in the owner's folder.
    theirs: PathBuf,
    /// The same in the reader's mount.
    ours: PathBuf,
}

fn pair() -> Option<Pair> {
    let lab = Lab::lan(&[Need::Fuse])?;
    let folder = lab.folder("source");
    fs::write(folder.join("file"), "text").unwrap();
    let (owner, reader) = lab.owner_and_reader(&folder);
    reader.wait_replicated(&owner, "files");
    let (theirs, ours) = (folder.join("file"), reader.at("owner/files/file"));
    Some(Pair { lab, owner, reader, theirs, ours })
}

/// Takes and gives back an exclusive lock as soon as it can be had.
#[track_caller]
fn can_lock(locker: &mut Locker, kind: &str, deadline: Duration) {
    wait_until(format!("{kind} to be free"), deadline, || {
        locker.gets(&format!("{kind} ex now")) && locker.gets(&format!("{kind} un now"))
    });
}

#[test]
fn programs_of_all_devices_exclude_each_other() {
    let Some(pair) = pair() else { return };
    pair.owner.mount();
    let mut third = pair.lab.stopped_device_at(1, "third");
    third.start();
    third.join(&pair.owner);
    third.mount();
    third.wait_replicated(&pair.owner, "files");
    let through = pair.owner.at("owner/files/file");
    let places = [&pair.theirs, &through, &pair.ours, &third.at("owner/files/file")];
    let mut all: Vec<Locker> = places.iter().map(|path| Locker::of(path)).collect();
    for kind in ["flock", "record"] {
        let [take, share, give] =
            ["ex now", "sh now", "un now"].map(|what| format!("{kind} {what}"));
        for holder in 0..all.len() {
            assert!(all[holder].gets(&take), "{kind} of {}", places[holder].display());
            for other in (0..all.len()).filter(|other| *other != holder) {
                let shown = || {
                    format!(
                        "{kind}: {} after {}",
                        places[other].display(),
                        places[holder].display()
                    )
                };
                assert!(!all[other].gets(&take) && !all[other].gets(&share), "{}", shown());
            }
            assert!(all[holder].gets(&give));
        }
        for locker in &mut all {
            assert!(locker.gets(&share), "a shared {kind}");
        }
        assert!(!all[2].gets(&take), "{kind} alone while it is shared");
        for locker in &mut all {
            assert!(locker.gets(&give));
        }
    }
    // Through the drive the kinds meet, also of one program; on the owner's disk each meets its
    // own.
    assert!(all[2].gets("flock ex now"));
    for other in &mut all[1..] {
        assert!(!other.gets("record sh now"));
    }
    assert!(!all[0].gets("flock sh now") && !all[0].gets("record sh now"));
    assert!(all[2].gets("flock un now"));
    assert!(all[0].gets("flock ex now") && all[0].gets("record ex now"), "a disk's own");
    assert!(!all[2].gets("flock sh now"));
    assert!(all[0].gets("flock un now"));
    assert!(!all[3].gets("flock sh now") && all[0].gets("record un now"));
    assert!(all[3].gets("flock sh now"));
}

/// The bytes that SQLite locks: pending, reserved, and 510 shared ones.
#[test]
fn ranges_are_locked_as_databases_do_it() {
    let Some(pair) = pair() else { return };
    let mut theirs = Locker::of(&pair.theirs);
    let mut ours = Locker::of(&pair.ours);
    let mut beside = Locker::of(&pair.ours);
    const PENDING: u64 = 0x4000_0000;
    let [shared, reserved, pending] = [(PENDING + 2, 510), (PENDING + 1, 1), (PENDING, 1)];
    let range = |mode, (start, len)| format!("record {mode} now {start} {len}");
    for reader in [&mut theirs, &mut ours, &mut beside] {
        assert!(reader.gets(&range("sh", shared)));
    }
    assert!(ours.gets(&range("ex", reserved)));
    assert!(!theirs.gets(&range("ex", reserved)) && !beside.gets(&range("ex", reserved)));
    assert!(ours.gets(&range("ex", pending)));
    assert!(!ours.gets(&range("ex", shared)), "others still read");
    assert!(theirs.gets(&range("un", shared)) && beside.gets(&range("un", shared)));
    assert!(ours.gets(&range("ex", shared)));
    assert!(!theirs.gets(&range("sh", shared)) && !beside.gets(&range("sh", shared)));
    // Who it is: of this device by its process, of another one by the bytes.
    assert_eq!(beside.ask("owner 1073741825 1"), format!("{PENDING} 512 {}", ours.pid()));
    assert!(theirs.ask("owner 1073741825 1").starts_with(&format!("{PENDING} 512")));
    assert!(ours.gets(&format!("record un now {PENDING} 2")));
    assert!(ours.gets(&range("sh", shared)), "back to reading");
    assert!(theirs.gets(&range("sh", shared)) && beside.gets(&range("ex", reserved)));
    assert!(theirs.gets("record ex now 0 10"));
    assert!(ours.ask("owner 5 1").starts_with("0 10"), "what the owner's program holds");
}

#[test]
fn a_lock_ends_with_its_handle_its_process_and_its_daemon() {
    let Some(mut pair) = pair() else { return };
    let mut theirs = Locker::of(&pair.theirs);
    for kind in ["flock", "record"] {
        let take = format!("{kind} ex now");
        let mut closes = Locker::of(&pair.ours);
        assert!(closes.gets(&take) && !theirs.gets(&take));
        assert_eq!(closes.ask("close"), "yes");
        can_lock(&mut theirs, kind, SOON);
        let mut killed = Locker::of(&pair.ours);
        assert!(killed.gets(&take) && !theirs.gets(&take));
        killed.end(Signal::KILL, SOON);
        can_lock(&mut theirs, kind, SOON);
    }
    pair.owner.mount();
    for path in [&pair.ours, &pair.owner.at("owner/files/file")] {
        ends_as_on_a_disk_where_a_child_has_the_file(path, &mut theirs);
    }
    let mut ours = Locker::of(&pair.ours);
    assert!(ours.gets("flock ex now"));
    assert!(!theirs.gets("flock ex now") && !theirs.gets("record ex now"));
    pair.reader.kill();
    can_lock(&mut theirs, "flock", LEASE);
    can_lock(&mut theirs, "record", SOON);
}

/// `fcntl` is a process's, `flock` the open file's.
#[track_caller]
fn ends_as_on_a_disk_where_a_child_has_the_file(path: &Path, theirs: &mut Locker) {
    let mut process = Locker::of(path);
    assert!(process.gets("record ex now") && process.gets("fork") && process.gets("close"));
    can_lock(theirs, "record", SOON);
    let mut open_file = Locker::of(path);
    assert!(open_file.gets("flock ex now") && open_file.gets("fork") && open_file.gets("close"));
    assert!(!theirs.gets("flock sh now") && open_file.gets("reap"));
    can_lock(theirs, "flock", SOON);
}

#[test]
fn without_the_owner_locks_are_local_and_with_it_they_are_its_own_again() {
    let Some(mut pair) = pair() else { return };
    let mut ours = Locker::of(&pair.ours);
    let mut beside = Locker::of(&pair.ours);
    let mut other = Locker::of(&pair.ours);
    let mut theirs = Locker::of(&pair.theirs);
    assert!(ours.gets("flock ex now") && !theirs.gets("flock sh now"));
    pair.owner.kill();
    wait_until("the owner to be gone", SOON, || !pair.reader.sees_online("owner"));
    let began = Instant::now();
    assert!(!beside.gets("flock sh now"), "what was held is held among the programs here");
    assert!(ours.gets("flock un now") && ours.gets("record ex now 20 10"));
    assert!(beside.gets("record ex now 0 10") && !ours.gets("record sh now 5 1"));
    assert!(other.gets("record ex now 10 10") && other.gets("record un now 10 10"));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    // Meanwhile the owner's programs have it for themselves.
    assert!(theirs.gets("record ex now 20 10"));
    pair.owner.start();
    pair.reader.wait_online("owner");
    let is_taken = |theirs: &mut Locker, byte: u8| {
        let is_taken = !theirs.gets(&format!("record sh now {byte} 1"));
        is_taken || !theirs.gets(&format!("record un now {byte} 1"))
    };
    wait_until("the one lock to be the owner's too", SOON, || is_taken(&mut theirs, 5));
    assert!(theirs.gets("record ex now 10 10"), "what was given back is free");
    // The other lock is asked for until the owner's program gives it back.
    assert!(theirs.gets("record un now 20 10"));
    wait_until("the other lock to be the owner's too", SOON, || is_taken(&mut theirs, 25));
    assert!(ours.gets("record un now 20 10") && beside.gets("record un now 0 10"));
    can_lock(&mut theirs, "record", SOON);
}

#[test]
fn a_frozen_owner_delays_a_lock_by_seconds_only() {
    let Some(pair) = pair() else { return };
    let mut ours = Locker::of(&pair.ours);
    pair.owner.freeze();
    let (mut ours, took) =
        within("a lock of a frozen owner's file", Duration::from_secs(8), move || {
            assert!(ours.gets("flock ex now"));
            ours
        });
    println!("{took:?}");
    let mut beside = Locker::of(&pair.ours);
    assert!(!beside.gets("flock ex now"));
    pair.owner.thaw();
    let mut theirs = Locker::of(&pair.theirs);
    wait_until("the owner to be told", SOON, || {
        let is_taken = !theirs.gets("flock ex now");
        is_taken || !theirs.gets("flock un now")
    });
    assert!(ours.gets("flock un now"));
}

#[test]
fn who_waits_is_given_the_lock_or_can_be_killed() {
    let Some(pair) = pair() else { return };
    for kind in ["flock", "record"] {
        let mut theirs = Locker::of(&pair.theirs);
        let mut ours: Vec<Locker> = (0..6).map(|_| Locker::of(&pair.ours)).collect();
        assert!(theirs.gets(&format!("{kind} ex now")));
        for locker in &mut ours {
            locker.tell(&format!("{kind} ex wait"));
        }
        // More than there are threads for the kernel: all else goes on meanwhile.
        let ours_path = pair.ours.clone();
        within("reading beside those who wait", SOON, move || fs::read(ours_path).unwrap());
        assert!(ours.iter().all(Locker::is_silent));
        ours.pop().unwrap().end(Signal::KILL, SIGNAL);
        ours.pop().unwrap().end(Signal::TERM, SIGNAL);
        assert!(theirs.gets(&format!("{kind} un now")));
        // One after the other has it, each when the one before gives it back.
        while !ours.is_empty() {
            let mut has = None;
            wait_until(format!("a {kind} for one of {}", ours.len()), SOON, || {
                has = ours.iter().position(|locker| !locker.is_silent());
                has.is_some()
            });
            assert!(!theirs.gets(&format!("{kind} sh now")));
            let mut has = ours.remove(has.unwrap());
            match ours.len() % 2 {
                0 => assert!(has.gets(&format!("{kind} un now"))),
                _ => has.end(Signal::KILL, SIGNAL),
            }
        }
        can_lock(&mut theirs, kind, SOON);
    }
}

#[test]
fn a_read_only_location_can_be_locked_too() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let folder = lab.folder("source");
    fs::write(folder.join("file"), "text").unwrap();
    let [owner, reader] = lab.two_devices(["owner", "reader"]);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    let path = folder.to_str().unwrap();
    owner.sd(&["location", "add", path, "--name", "files", "--read-only"]).ok();
    owner.wait_indexed("files");
    owner.wait_hashed("files");
    reader.join(&owner);
    reader.mount();
    reader.wait_replicated(&owner, "files");
    let mut theirs = Locker::of(&folder.join("file"));
    let mut ours = Locker::of(&reader.at("owner/files/file"));
    assert!(ours.gets("record sh now") && !theirs.gets("record ex now"));
    assert!(ours.gets("record un now") && theirs.gets("record ex now"));
    assert!(theirs.gets("record un now") && ours.gets("flock sh now"));
    assert!(!theirs.gets("flock ex now") && theirs.gets("flock sh now"));
    assert!(theirs.gets("flock un now") && ours.gets("flock ex now"));
    assert!(!theirs.gets("flock sh now") && !theirs.gets("record ex now"));
}

/// A version that was written elsewhere takes the file's place; its locks go with the name.
#[test]
fn a_lock_follows_the_file_when_a_new_version_takes_its_place() {
    let Some(pair) = pair() else { return };
    let mut ours = Locker::of(&pair.ours);
    assert!(ours.gets("flock ex now"));
    fs::write(&pair.ours, "written under the lock").unwrap();
    pair.reader.sd(&["sync", "--timeout", "60s"]).ok();
    assert_eq!(fs::read_to_string(&pair.theirs).unwrap(), "written under the lock");
    wait_until("the lock to be on the new file", SOON, || {
        !Locker::of(&pair.theirs).gets("flock sh now")
    });
    assert!(ours.gets("flock un now"));
    can_lock(&mut Locker::of(&pair.theirs), "flock", SOON);
}
