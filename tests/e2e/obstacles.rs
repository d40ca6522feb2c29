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
    mount(&image, &theirs);
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
    umount(&theirs);
    mount(&other, &theirs);
    let born = |path: &Path| fs::metadata(path).unwrap().created().unwrap();
    let birth = born(&theirs);
    owner.sd(&["location", "rescan", "files"]).ok();
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    fs::write(ours.join("new"), "for the disk that is away").unwrap();
    told(&reader, "new", "not connected");
    assert_eq!(fs::read_dir(&theirs).unwrap().count(), 0, "nothing is put on another disk");
    umount(&theirs);
    mount(&image, &theirs);
    assert_eq!(born(&theirs), birth, "only their names tell the disks apart");
    wait_until("the disk to be seen", PATIENCE, || {
        reader.sd(&["sync", "--timeout", "5s"]).status.success()
    });
    assert_eq!(fs::read(ours.join("file")).unwrap(), b"as it was");
    assert_eq!(fs::read(theirs.join("new")).unwrap(), b"for the disk that is away");
    drop(disk);
}

fn mount(image: &Path, folder: &Path) {
    let mut mount = Command::new("mount");
    proc::run(mount.args(["-o", "loop"]).args([image, folder]), PATIENCE).ok();
}

/// What the owner's status says of the location.
fn state(owner: &Device, field: &str) -> String {
    let row = owner.location_row("owner", "files").expect("the location");
    row[field].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_disk_that_is_back_under_another_path_is_the_location() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (stick, elsewhere) = (lab.folder("stick"), lab.folder("else where"));
    let image = lab.dir().join("disk.img");
    let disk = SmallDisk::mount(&image, &stick, 64 << 20);
    let theirs = stick.join("files");
    fs::create_dir_all(theirs.join("sub")).unwrap();
    for n in 0..50 {
        fs::write(theirs.join(format!("sub/{n}")), format!("bytes of {n}")).unwrap();
    }
    let (owner, reader, ours) = pair(&lab, &theirs);
    let applied = || {
        let replicas = reader.device_row("owner").expect("the owner")["replicas"].clone();
        replicas[0]["applied"].as_u64().expect("a number")
    };
    let inode = |name: &str| fs::symlink_metadata(ours.join(name)).unwrap().ino();
    let (rows, number) = (applied(), inode("sub/7"));

    umount(&stick);
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    fs::write(ours.join("new"), "written meanwhile").unwrap();
    told(&reader, "new", "not connected");
    assert_eq!(fs::read_dir(ours.join("sub")).unwrap().count(), 50, "browsed while it is away");
    assert_eq!(fs::read_dir(&stick).unwrap().count(), 0);

    mount(&image, &elsewhere);
    let there = elsewhere.join("files");
    let is_there = || fs::read(there.join("new")).is_ok_and(|found| found == b"written meanwhile");
    wait_until("what waited to arrive", PATIENCE, is_there);
    wait_until("where it is to be told", PATIENCE, || {
        Path::new(&state(&owner, "path")) == there && state(&owner, "state") == "idle"
    });
    let listed = owner.json(&["location", "list"]);
    assert_eq!(listed["locations"][0]["path"], there.to_str().unwrap());
    assert_eq!(fs::read(ours.join("sub/7")).unwrap(), b"bytes of 7", "an uncached read");
    // Nothing but the new file, its folder and the folder above was told of: no row was deleted
    // or made again.
    assert_eq!(inode("sub/7"), number);
    assert!(applied() < rows + 20, "{rows} rows before, {} now", applied());
    assert_eq!(fs::read_dir(ours.join("sub")).unwrap().count(), 50);
    // It is one location, however it is called.
    owner.fails(1, &["location", "add", there.to_str().unwrap(), "--name", "again"]);
    fs::write(there.join("by the owner"), "seen").unwrap();
    wait_until("a change to be seen", PATIENCE, || ours.join("by the owner").exists());

    umount(&elsewhere);
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    fs::remove_file(ours.join("sub/3")).unwrap();
    mount(&image, &stick);
    wait_until("the delete to arrive", PATIENCE, || !theirs.join("sub/3").exists());
    assert_eq!(Path::new(&state(&owner, "path")), theirs);
    assert_eq!(fs::read_dir(theirs.join("sub")).unwrap().count(), 49);
    drop(disk);
}

#[test]
fn of_two_disks_that_are_copies_neither_is_taken() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (theirs, elsewhere) = (lab.folder("source"), lab.folder("elsewhere"));
    let (image, copy) = (lab.dir().join("disk.img"), lab.dir().join("copy.img"));
    let disk = SmallDisk::mount(&image, &theirs, 64 << 20);
    fs::write(theirs.join("file"), "as it was").unwrap();
    let (owner, reader, ours) = pair(&lab, &theirs);
    umount(&theirs);
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    proc::run(Command::new("sync").arg("-f").arg(&image), PATIENCE).ok();
    fs::copy(&image, &copy).unwrap();
    // The copy is older than what happens to the disk from here on.
    mount(&image, &elsewhere);
    wait_until("the disk to be seen", PATIENCE, || state(&owner, "state") == "idle");
    fs::write(elsewhere.join("later"), "not on the copy").unwrap();
    wait_until("a change to be seen", PATIENCE, || ours.join("later").exists());
    umount(&elsewhere);
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    // The daemon looks at no moment in which one of them is there alone.
    owner.freeze();
    mount(&copy, &theirs);
    mount(&image, &elsewhere);
    owner.thaw();
    owner.sd(&["location", "rescan", "files"]).ok();
    wait_until("the copy to be told", PATIENCE, || {
        state(&owner, "state_reason").contains("copies of each other")
    });
    fs::write(ours.join("new"), "for one of them").unwrap();
    told(&reader, "new", "not connected");
    assert!(ours.join("later").exists(), "what the copy has not got is not deleted");
    assert!(!theirs.join("new").exists() && !elsewhere.join("new").exists());
    let problems = owner.status()["problems"].to_string();
    assert!(problems.contains("location_offline") && problems.contains("unmount the copy"));

    umount(&theirs);
    let arrives = || fs::read(elsewhere.join("new")).is_ok_and(|found| found == b"for one of them");
    wait_until("what waited to arrive", PATIENCE, arrives);
    assert_eq!(fs::read(ours.join("later")).unwrap(), b"not on the copy");
    umount(&elsewhere);
    drop(disk);
}

/// A disk with a copy that lacks what was written later, and an owner that has seen it there.
struct Copied {
    owner: Device,
    reader: Device,
    ours: PathBuf,
    theirs: PathBuf,
    image: PathBuf,
    copy: PathBuf,
    _disk: SmallDisk,
}

const LATER: usize = 20;

impl Copied {
    fn new(lab: &Lab) -> Self {
        let theirs = lab.folder("source");
        let (image, copy) = (lab.dir().join("disk.img"), lab.dir().join("copy.img"));
        let disk = SmallDisk::mount(&image, &theirs, 64 << 20);
        fs::write(theirs.join("file"), "as it was").unwrap();
        proc::run(Command::new("umount").arg(&theirs), PATIENCE).ok();
        fs::copy(&image, &copy).unwrap();
        mount(&image, &theirs);
        for n in 0..LATER {
            fs::write(theirs.join(format!("later-{n}")), "not on the copy").unwrap();
        }
        let (owner, reader, ours) = pair(lab, &theirs);
        Self { owner, reader, ours, theirs, image, copy, _disk: disk }
    }

    fn reason(&self) -> String {
        state(&self.owner, "state_reason")
    }

    /// Waits until the location is offline for this reason; nothing of it is gone then.
    #[track_caller]
    fn offline(&self, why: &str) {
        let reason = || format!("offline: {why}, not {}", self.reason());
        let is_told = || self.reason().contains(why);
        wait_until(reason(), PATIENCE, is_told);
        self.owner.sd(&["location", "rescan", "files"]).ok();
        assert!(is_told(), "{}", reason());
        let listed = fs::read_dir(&self.ours).unwrap();
        let later = listed.filter(|e| e.as_ref().unwrap().file_name() != "file").count();
        assert_eq!(later, LATER, "what the copy has not got is not deleted");
    }

    #[track_caller]
    fn online_at(&self, path: &Path) {
        wait_until(format!("the disk at {}", path.display()), PATIENCE, || {
            Path::new(&state(&self.owner, "path")) == path && state(&self.owner, "state") == "idle"
        });
    }
}

#[test]
fn a_copy_that_was_there_all_along_is_not_taken_when_the_disk_goes() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (beside, elsewhere) = (lab.folder("beside"), lab.folder("elsewhere"));
    let lab = Copied::new(&lab);
    mount(&lab.copy, &beside);
    // The disk is looked at while the copy is there.
    lab.owner.sd(&["location", "rescan", "files"]).ok();
    lab.online_at(&lab.theirs);
    umount(&lab.theirs);
    lab.offline("mounted beside the location's own disk");
    fs::remove_file(lab.ours.join("file")).unwrap();
    told(&lab.reader, "file", "not connected");
    // Nor by another mount of it, at the location's own path.
    let mut bind = Command::new("mount");
    proc::run(bind.arg("--bind").args([&beside, &lab.theirs]), PATIENCE).ok();
    lab.offline("mounted beside the location's own disk");
    assert!(lab.theirs.join("file").exists(), "nothing is done to the copy");
    umount(&lab.theirs);
    mount(&lab.image, &elsewhere);
    lab.offline("copies of each other");
    umount(&beside);
    lab.online_at(&elsewhere);
    wait_until("the delete", PATIENCE, || !elsewhere.join("file").exists());
    assert_eq!(fs::read_dir(&lab.ours).unwrap().count(), LATER);
    umount(&elsewhere);
}

#[test]
fn while_the_disk_is_elsewhere_its_own_path_is_watched() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let elsewhere = lab.folder("elsewhere");
    let lab = Copied::new(&lab);
    umount(&lab.theirs);
    mount(&lab.image, &elsewhere);
    lab.online_at(&elsewhere);
    // The same disk: it is taken up where it was added.
    let mut bind = Command::new("mount");
    proc::run(bind.arg("--bind").args([&elsewhere, &lab.theirs]), PATIENCE).ok();
    lab.online_at(&lab.theirs);
    umount(&lab.theirs);
    lab.online_at(&elsewhere);
    // A copy of it: no one knows which is meant.
    mount(&lab.copy, &lab.theirs);
    lab.offline("copies of each other");
    fs::write(lab.ours.join("file"), "for one of them").unwrap();
    told(&lab.reader, "file", "not connected");
    // The one that was the location's goes: the other one does not take its place.
    umount(&elsewhere);
    lab.offline("mounted beside the location's own disk");
    assert_eq!(fs::read(lab.theirs.join("file")).unwrap(), b"as it was");
    umount(&lab.theirs);
    mount(&lab.image, &elsewhere);
    lab.online_at(&elsewhere);
    arrived(&lab.reader, &elsewhere.join("file"), b"for one of them");
    umount(&elsewhere);
}

#[test]
fn a_disk_that_is_back_read_only_lets_everything_wait() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::LoopDevices]) else { return };
    let (theirs, image) = (lab.folder("source"), lab.dir().join("disk.img"));
    let disk = SmallDisk::mount(&image, &theirs, 64 << 20);
    for name in ["deleted", "written", "from"] {
        fs::write(theirs.join(name), "as it was").unwrap();
    }
    let (owner, reader, ours) = pair(&lab, &theirs);
    let unplug = || {
        umount(&theirs);
        wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    };
    unplug();
    fs::remove_file(ours.join("deleted")).unwrap();
    fs::rename(ours.join("from"), ours.join("to")).unwrap();
    fs::write(ours.join("written"), "anew").unwrap();
    // Until the kernel has let go of the mount from before.
    wait_until("the disk to be mounted read-only", PATIENCE, || {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,ro"]).args([&image, &theirs]);
        proc::run(&mut mount, PATIENCE).status.success()
    });
    for name in ["deleted", "to", "written"] {
        told(&reader, name, "read-only");
    }
    assert!(theirs.join("deleted").exists() && theirs.join("from").exists());
    assert!(!ours.join("deleted").exists() && ours.join("to").exists(), "nothing is undone");
    unplug();
    mount(&image, &theirs);
    arrived(&reader, &theirs.join("written"), b"anew");
    assert!(!theirs.join("deleted").exists() && !theirs.join("from").exists());
    assert_eq!(fs::read(theirs.join("to")).unwrap(), b"as it was");
    assert_eq!(reader.json(&["conflicts"])["conflicts"].as_array().unwrap().len(), 0);
    drop(disk);
}

#[test]
fn a_snapshot_is_not_taken_for_what_it_was_made_of() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::Btrfs]) else { return };
    let [theirs, beside, elsewhere] =
        ["source", "beside", "elsewhere"].map(|name| lab.folder(name));
    let image = lab.dir().join("disk.img");
    File::create(&image).and_then(|file| file.set_len(256 << 20)).unwrap();
    let run = |program: &str, args: &[&str]| {
        proc::run(Command::new(program).args(args).env("LC_ALL", "C"), PATIENCE).ok();
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let mount_part = |part: &str, at: &Path| {
        run("mount", &["-o", &format!("loop,subvol={part}"), &text(&image), &text(at)]);
    };
    run("mkfs.btrfs", &["-q", &text(&image)]);
    mount_part("/", &elsewhere);
    run("btrfs", &["subvolume", "create", &text(&elsewhere.join("part"))]);
    fs::write(elsewhere.join("part/file"), "as it was").unwrap();
    let [part, snapshot] = ["part", "snapshot"].map(|name| text(&elsewhere.join(name)));
    run("btrfs", &["subvolume", "snapshot", &part, &snapshot]);
    fs::write(elsewhere.join("part/later"), "not in the snapshot").unwrap();
    umount(&elsewhere);
    mount_part("/part", &theirs);
    mount_part("/snapshot", &beside);
    let (owner, reader, ours) = pair(&lab, &theirs);
    umount(&theirs);
    wait_until("the disk to be missed", PATIENCE, || state(&owner, "state") == "offline");
    mount_part("/snapshot", &theirs);
    wait_until("the snapshot to be seen", PATIENCE, || {
        state(&owner, "state_reason").contains("another folder than the one that was added")
    });
    fs::remove_file(ours.join("file")).unwrap();
    told(&reader, "file", "not connected");
    assert!(ours.join("later").exists(), "what the snapshot has not got is not deleted");
    assert!(theirs.join("file").exists() && beside.join("file").exists());
    // All of the disk, with both in it, is not where a subvolume is looked for.
    mount_part("/", &elsewhere);
    umount(&theirs);
    mount_part("/part", &theirs);
    wait_until("the delete", PATIENCE, || !theirs.join("file").exists());
    assert_eq!(Path::new(&state(&owner, "path")), theirs);
    assert!(ours.join("later").exists() && beside.join("file").exists());
    [theirs, beside, elsewhere].iter().for_each(|path| umount(path));
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
