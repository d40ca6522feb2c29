//! What stands in the way of a delivery: it is told, it holds back only what it concerns, and
//! when it is gone everything arrives.

use e2e::disk::SmallDisk;
use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files, proc};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

/// An owner with a folder as the location `files`, and a reader who has it mounted.
fn pair(lab: &Lab, theirs: &Path) -> (Device, Device, PathBuf) {
    let (owner, reader) = (lab.device("owner"), lab.device("reader"));
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(theirs, "files");
    reader.join(&owner);
    reader.mount();
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    (owner, reader, ours)
}

/// Why what waits below this name waits.
fn why(reader: &Device, name: &str) -> Option<String> {
    let pending = reader.json(&["pending"]);
    let rows = pending["pending"].as_array().expect("a list").clone();
    let is_it = |address: &str| address.ends_with(&format!("/{name}"));
    let row = rows.into_iter().find(|row| row["address"].as_str().is_some_and(is_it))?;
    row["reason"].as_str().map(str::to_owned)
}

/// Waits until it is told that this name waits, and why.
#[track_caller]
fn told(reader: &Device, name: &str, word: &str) {
    let is_told = || why(reader, name).is_some_and(|why| why.contains(word));
    wait_until(format!("{name} to wait: {word}"), PATIENCE, is_told);
}

#[track_caller]
fn arrived(reader: &Device, path: &Path, bytes: &[u8]) {
    reader.sd(&["sync", "--timeout", "60s"]).ok();
    assert!(fs::read(path).unwrap() == bytes, "{}", path.display());
}

fn umount(folder: &Path) {
    // The daemon has it open, as it has a disk that is pulled out.
    proc::run(Command::new("umount").arg("-l").arg(folder), PATIENCE).ok();
}

#[test]
fn a_full_disk_of_the_owner_holds_back_only_what_it_has_no_room_for() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let theirs = lab.folder("source");
    let _disk = SmallDisk::mount(&lab.dir().join("disk.img"), &theirs, 96 << 20);
    let filler = theirs.join("filler");
    fs::write(&filler, files::random_bytes(48 << 20, 1)).unwrap();
    let (_owner, reader, ours) = pair(&lab, &theirs);
    let large: Vec<_> = (0..6).map(|n| files::random_bytes(12 << 20, n)).collect();
    for (n, bytes) in large.iter().enumerate() {
        fs::write(ours.join(format!("large-{n}")), bytes).unwrap();
    }
    let is_told = |n| why(&reader, &format!("large-{n}")).is_some_and(|why| why.contains("full"));
    wait_until("some to be too much", PATIENCE, || (0..6).any(is_told));
    fs::write(ours.join("small"), "a note").unwrap();
    let is_there = || fs::read(theirs.join("small")).is_ok_and(|found| found == b"a note");
    wait_until("the small one to arrive", PATIENCE, is_there);
    // What waits is seen here meanwhile, and makes place when it is deleted.
    for (n, bytes) in large.iter().enumerate() {
        assert!(fs::read(ours.join(format!("large-{n}"))).unwrap() == *bytes);
    }
    fs::remove_file(&filler).unwrap();
    for (n, bytes) in large.iter().enumerate() {
        arrived(&reader, &theirs.join(format!("large-{n}")), bytes);
    }
    let mut names: Vec<_> =
        fs::read_dir(&theirs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["large-0", "large-1", "large-2", "large-3", "large-4", "large-5", "small"]);
}

#[test]
fn what_the_owners_user_may_not_do_is_told_and_done_when_it_may() {
    const USER: u32 = 4243;
    let Some(lab) = Lab::local(&[Need::Fuse, Need::Root]) else { return };
    let theirs = lab.folder("source");
    let locked = theirs.join("locked");
    fs::create_dir(&locked).unwrap();
    fs::write(locked.join("file"), "as it was").unwrap();
    fs::write(theirs.join("free"), "as it was").unwrap();
    for path in [theirs.clone(), theirs.join("free")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    let (mut owner, reader) = (lab.stopped_device("owner"), lab.device("reader"));
    owner.run_as(USER);
    owner.start();
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&theirs, "files");
    reader.join(&owner);
    reader.mount();
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    let mut open = OpenOptions::new().write(true).open(ours.join("locked/file")).unwrap();
    open.write_all(b"of mine").unwrap();
    open.sync_all().unwrap();
    fs::write(ours.join("free"), "changed").unwrap();
    told(&reader, "locked/file", "may not");
    let late = open.sync_all().expect_err("a program that has it open is told");
    assert_eq!(late.kind(), ErrorKind::PermissionDenied, "{late}");
    open.sync_all().expect("once");
    drop(open);
    let is_there = || fs::read(theirs.join("free")).is_ok_and(|found| found == b"changed");
    wait_until("the other file", PATIENCE, is_there);
    assert_eq!(fs::read(locked.join("file")).unwrap(), b"as it was");
    assert_eq!(fs::read(ours.join("locked/file")).unwrap(), b"of mineas");
    for path in [locked.clone(), locked.join("file")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    arrived(&reader, &locked.join("file"), b"of mineas");
}

#[test]
fn an_unplugged_disk_gets_what_was_written_for_it_and_its_mount_point_nothing() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (theirs, image) = (lab.folder("source"), lab.dir().join("disk.img"));
    let disk = SmallDisk::mount(&image, &theirs, 64 << 20);
    fs::write(theirs.join("file"), "as it was").unwrap();
    let (_owner, reader, ours) = pair(&lab, &theirs);
    umount(&theirs);
    fs::write(ours.join("file"), "written meanwhile").unwrap();
    fs::write(ours.join("new"), "new meanwhile").unwrap();
    told(&reader, "new", "not connected");
    assert_eq!(fs::read(ours.join("file")).unwrap(), b"written meanwhile");
    assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0, "the empty mount point is no location");
    let mut mount = Command::new("mount");
    proc::run(mount.args(["-o", "loop"]).args([&image, &theirs]), PATIENCE).ok();
    wait_until("the disk to be seen", PATIENCE, || {
        reader.sd(&["sync", "--timeout", "5s"]).status.success()
    });
    assert_eq!(fs::read(theirs.join("file")).unwrap(), b"written meanwhile");
    assert_eq!(fs::read(theirs.join("new")).unwrap(), b"new meanwhile");
    drop(disk);
}

#[test]
fn another_disk_in_the_place_is_not_taken_for_the_location() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (theirs, aside) = (lab.folder("source"), lab.folder("aside"));
    let (image, other) = (lab.dir().join("disk.img"), lab.dir().join("other.img"));
    let disk = SmallDisk::mount(&image, &theirs, 64 << 20);
    fs::write(theirs.join("file"), "as it was").unwrap();
    drop(SmallDisk::mount(&other, &aside, 64 << 20));
    let (owner, reader, ours) = pair(&lab, &theirs);
    let state = || owner.location_row("owner", "files").expect("the location")["state"].clone();
    let mount = |image: &Path| {
        let mut mount = Command::new("mount");
        proc::run(mount.args(["-o", "loop"]).args([image, &theirs]), PATIENCE).ok();
    };
    umount(&theirs);
    mount(&other);
    let born = |path: &Path| fs::metadata(path).unwrap().created().unwrap();
    let birth = born(&theirs);
    owner.sd(&["location", "rescan", "files"]).ok();
    wait_until("the disk to be missed", PATIENCE, || state() == "offline");
    fs::write(ours.join("new"), "for the disk that is away").unwrap();
    told(&reader, "new", "not connected");
    assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0, "nothing is put on another disk");
    umount(&theirs);
    mount(&image);
    assert_eq!(born(&theirs), birth, "only their names tell the disks apart");
    wait_until("the disk to be seen", PATIENCE, || {
        reader.sd(&["sync", "--timeout", "5s"]).status.success()
    });
    assert_eq!(fs::read(ours.join("file")).unwrap(), b"as it was");
    assert_eq!(fs::read(theirs.join("new")).unwrap(), b"for the disk that is away");
    drop(disk);
}

#[test]
fn what_was_written_survives_what_its_owner_did_to_the_place() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    for name in ["replaced", "kept"] {
        fs::write(theirs.join(name), "as it was").unwrap();
    }
    let (mut owner, mut reader, ours) = pair(&lab, &theirs);
    owner.stop();
    wait_until("the owner to be gone", PATIENCE, || !reader.sees_online("owner"));
    fs::write(ours.join("replaced"), "of mine").unwrap();
    // A directory in the place of the file.
    fs::remove_file(theirs.join("replaced")).unwrap();
    fs::create_dir(theirs.join("replaced")).unwrap();
    fs::write(theirs.join("replaced/inside"), "of theirs").unwrap();
    owner.start();
    reader.wait_online("owner");
    reader.sd(&["sync", "--timeout", "60s"]).ok();
    assert_eq!(fs::read(theirs.join("replaced/inside")).unwrap(), b"of theirs");
    let mut all = fs::read_dir(&theirs).unwrap().map(|entry| entry.unwrap().path());
    let copy = all.find(|path| path.is_file() && path != &theirs.join("kept"));
    assert_eq!(fs::read(copy.expect("a conflict copy")).unwrap(), b"of mine");
    assert_eq!(reader.json(&["conflicts"])["conflicts"].as_array().unwrap().len(), 1);

    // The location is removed while something waits for it.
    owner.stop();
    wait_until("the owner to be gone", PATIENCE, || !reader.sees_online("owner"));
    fs::write(ours.join("kept"), "bytes that nobody else has").unwrap();
    reader.stop();
    owner.start();
    owner.sd(&["location", "remove", "files", "--yes"]).ok();
    reader.start();
    reader.wait_online("owner");
    wait_until("the location to be gone", PATIENCE, || {
        reader.location_row("owner", "files").is_none()
    });
    let sync = reader.sd(&["sync", "--timeout", "20s"]);
    assert_eq!(sync.status.code(), Some(1), "{}", sync.stderr);
    let out = lab.folder("exported");
    reader.sd(&["pending", "export", "owner", out.to_str().unwrap()]).ok();
    let mut grep = Command::new("grep");
    let found = proc::run(grep.args(["-rl", "bytes that nobody else has"]).arg(&out), PATIENCE);
    assert_eq!(found.ok().text().lines().count(), 1, "the bytes are exported");
    assert_eq!(fs::read(theirs.join("kept")).unwrap(), b"as it was");
}

#[test]
fn a_sparse_file_of_100_gb_is_written_as_what_it_holds() {
    const SIZE: u64 = 100_000_000_000;
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    let (_owner, reader, ours) = pair(&lab, &theirs);
    let places: Vec<_> = (0..5).map(|n| (n * 20_000_000_000 + 4097, n)).collect();
    let file = File::create(ours.join("disk.img")).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, seed) in &places {
        file.write_all_at(&files::random_bytes(10_000, *seed), *at).unwrap();
    }
    drop(file);
    let sent = reader.content_bytes_out();
    reader.sd(&["sync", "--timeout", "120s"]).ok();
    let arrived = File::open(theirs.join("disk.img")).unwrap();
    let seen = arrived.metadata().unwrap();
    assert_eq!(seen.len(), SIZE);
    assert!(seen.blocks() * 512 < 1 << 20, "{} bytes on the disk", seen.blocks() * 512);
    assert!(reader.content_bytes_out() - sent < 1 << 20, "holes were sent");
    for (at, seed) in &places {
        let mut there = vec![0; 10_000];
        arrived.read_exact_at(&mut there, *at).unwrap();
        assert!(there == files::random_bytes(10_000, *seed), "at {at}");
    }
}
