//! Every mistake gets a clear message, the right exit code, and loses nothing.

use e2e::device::is_mounted;
use e2e::{Device, Lab, Need, proc};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A device that made a library and shares `location`.
fn solo(lab: &Lab) -> Device {
    let device = lab.device("solo");
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    device.add_location(&lab.folder("location"), "files");
    device
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

/// The complaint names its object, and says what to do next on a line of its own.
#[track_caller]
fn assert_helpful(message: &str, names: &str) {
    assert!(message.contains(names), "names {names:?}: {message}");
    assert!(message.lines().count() > 1, "says what to do next: {message}");
}

#[test]
fn unknown_names_and_wrong_usage() {
    let Some(lab) = Lab::local(&[]) else { return };
    let device = solo(&lab);
    assert_helpful(&device.fails(1, &["ls", "sd://nobody/files"]), "nobody");
    assert_helpful(&device.fails(1, &["ls", "sd://solo/nothing"]), "nothing");
    assert_helpful(&device.fails(1, &["info", "sd://solo/files/absent"]), "absent");
    assert_helpful(&device.fails(1, &["device", "remove", "nobody", "--yes"]), "nobody");
    assert_helpful(&device.fails(1, &["location", "remove", "nothing", "--yes"]), "nothing");
    device.fails(2, &["no-such-command"]);
    device.fails(2, &["location", "add"]);
    device.fails(2, &["mount", "--no-such-option"]);
    let removed = device.sd(&["location", "remove", "files"]);
    assert!(!removed.status.success(), "no terminal to ask on and no --yes");
    assert!(device.location_row("solo", "files").is_some(), "nothing was removed");
}

#[test]
fn places_that_cannot_be_a_location() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let device = solo(&lab);
    let location = lab.dir().join("location");
    let file = lab.dir().join("a-file");
    fs::write(&file, "").unwrap();
    assert_helpful(&device.fails(1, &["location", "add", text(&file)]), "a-file");
    let absent = lab.dir().join("absent");
    assert_helpful(&device.fails(1, &["location", "add", text(&absent)]), "absent");
    let inside = lab.folder("location/inside");
    assert_helpful(&device.fails(1, &["location", "add", text(&inside)]), "files");
    device.add_location(&lab.folder("outer/inner"), "inner");
    let outer = lab.dir().join("outer");
    assert_helpful(&device.fails(1, &["location", "add", text(&outer)]), "inner");
    let again = device.fails(1, &["location", "add", text(&location), "--name", "again"]);
    assert_helpful(&again, "files");
    let other = lab.folder("other");
    let taken = device.fails(1, &["location", "add", text(&other), "--name", "files"]);
    assert_helpful(&taken, "files");
    device.fails(1, &["location", "add", text(&other), "--name", "a/b"]);
    device.fails(1, &["location", "add", text(&other), "--name", ""]);
    let mountpoint = device.mount();
    device.fails(1, &["location", "add", text(&mountpoint)]);
    device.fails(1, &["location", "add", text(&device.at("solo"))]);
    let rows = device.status()["locations"].as_array().unwrap().len();
    assert_eq!(rows, 2, "nothing else was added");
}

#[test]
fn places_that_cannot_be_a_mount_point() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let device = solo(&lab);
    let full = lab.folder("full");
    fs::write(full.join("file"), "").unwrap();
    assert_helpful(&device.fails(1, &["mount", text(&full)]), "full");
    let file = full.join("file");
    assert_helpful(&device.fails(1, &["mount", text(&file)]), "file");
    let inside = lab.folder("location/inside");
    assert_helpful(&device.fails(1, &["mount", text(&inside)]), "files");
    let location = lab.dir().join("location");
    device.fails(1, &["mount", text(&location)]);
    let other = lab.device("other");
    other.sd(&["library", "create", "elsewhere", "--device-name", "other"]).ok();
    let busy = other.mount();
    assert_helpful(&device.fails(1, &["mount", text(&busy)]), text(&busy));
    assert!(busy.join("other").is_dir(), "the drive that was there still works");
    device.fails(1, &["mount", "/proc/absent"]);
    device.fails(1, &["unmount", text(&full)]);
    assert!(!is_mounted(&full) && !is_mounted(&inside) && !is_mounted(&location));
    assert!(full.join("file").exists());
}

#[test]
fn tickets_that_are_no_good() {
    let Some(lab) = Lab::local(&[]) else { return };
    let owner = solo(&lab);
    let (one, two) = (lab.device("one"), lab.device("two"));
    let ticket = owner.invite();

    two.fails(1, &["device", "join", "rubbish", "--yes"]);
    two.fails(1, &["device", "join", &ticket[..ticket.len() / 2], "--yes"]);
    let mut mistyped = ticket.clone().into_bytes();
    let middle = mistyped.len() / 2;
    mistyped[middle] = if mistyped[middle] == b'a' { b'b' } else { b'a' };
    let mistyped = String::from_utf8(mistyped).unwrap();
    two.fails(1, &["device", "join", &mistyped, "--yes"]);

    // A name that is taken is refused, and the ticket can be used with another.
    let taken = one.fails(1, &["device", "join", &ticket, "--device-name", "solo", "--yes"]);
    assert_helpful(&taken, "solo");
    one.sd(&["device", "join", &ticket, "--device-name", "one", "--yes"]).ok();
    one.wait_online("solo");
    let used = two.fails(1, &["device", "join", &ticket, "--device-name", "two", "--yes"]);
    assert!(used.contains("invite"), "says how to get another: {used}");

    let brief = owner.sd(&["device", "invite", "--expires", "1s", "--detach"]).ok().text();
    let expired = e2e::wait::wait_for("the ticket to expire", Duration::from_secs(20), || {
        // Joining cannot succeed by accident: the name is taken.
        let args = ["device", "join", brief.trim(), "--device-name", "solo", "--yes"];
        let message = two.fails(1, &args);
        message.contains("expired").then_some(message)
    });
    assert!(expired.contains("invite"), "says how to get another: {expired}");

    // One device, one library.
    let other = lab.device("other");
    other.sd(&["library", "create", "elsewhere", "--device-name", "other"]).ok();
    let ticket = other.invite();
    one.fails(1, &["device", "join", &ticket, "--device-name", "one", "--yes"]);
    one.fails(1, &["library", "create", "second"]);
    let members = one.status()["devices"].as_array().unwrap().len();
    assert_eq!(members, 2, "the library is as it was");
}

#[test]
fn data_directories_that_cannot_be_used() {
    let Some(lab) = Lab::local(&[]) else { return };
    let mut device = solo(&lab);
    let second = proc::run(
        device.command(Device::program()).args(["daemon", "run"]),
        Duration::from_secs(20),
    );
    assert_eq!(second.status.code(), Some(1), "a second daemon: {}", second.stderr);
    assert!(second.stderr.contains(&device.pid().to_string()), "{}", second.stderr);
    assert!(!device.status()["devices"].as_array().unwrap().is_empty(), "the first one lives");

    device.stop();
    fs::write(device.data_dir().join("format"), "999\n").unwrap();
    let newer = proc::run(
        device.command(Device::program()).args(["daemon", "run"]),
        Duration::from_secs(20),
    );
    assert_eq!(newer.status.code(), Some(1));
    assert!(newer.stderr.contains("999"), "{}", newer.stderr);
    assert_eq!(fs::read_to_string(device.data_dir().join("format")).unwrap(), "999\n");
    fs::write(device.data_dir().join("format"), "1\n").unwrap();
    device.start();
    assert!(device.location_row("solo", "files").is_some(), "everything is still there");

    let mode = fs::metadata(device.data_dir()).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o700);
}

#[test]
fn a_full_and_a_read_only_data_disk() {
    let Some(lab) = Lab::local(&[Need::Root]) else { return };
    let folder = lab.folder("location");
    (0..20_000).for_each(|n| fs::write(folder.join(format!("file-{n}")), format!("{n}")).unwrap());
    let mut device = lab.stopped_device("small");
    let data = lab.folder("small/data");
    let size = "size=96m,mode=700";
    proc::run_args(
        "mount",
        &["-t", "tmpfs", "-o", size, "none", text(&data)],
        Duration::from_secs(9),
    )
    .ok();
    device.start();
    device.sd(&["library", "create", "home", "--device-name", "small"]).ok();
    fill(&data);
    // The disk is full: what cannot be kept is refused or reported, and nothing falls over.
    let added = device.sd(&["location", "add", text(&folder), "--name", "files"]);
    if !added.status.success() {
        assert_helpful(&added.stderr, "space");
    }
    assert!(!device.status()["devices"].as_array().unwrap().is_empty(), "the daemon lives");
    device.stop();
    fill(&data);
    device.start();
    assert!(!device.status()["devices"].as_array().unwrap().is_empty(), "it starts on a full disk");
    device.kill();
    fill(&data);
    device.start();
    assert!(!device.status()["devices"].as_array().unwrap().is_empty(), "after a kill, too");
    fs::remove_file(data.join("filler")).unwrap();
    if !added.status.success() {
        device.sd(&["location", "add", text(&folder), "--name", "files"]).ok();
    }
    // What could not be noted is, as soon as there is room, with nothing started anew.
    device.wait_indexed("files");
    assert_eq!(device.location_row("small", "files").expect("a row")["files"], 20_000);
    device.stop();

    proc::run_args("mount", &["-o", "remount,ro", text(&data)], Duration::from_secs(9)).ok();
    let mut daemon = device.command(Device::program());
    let refused = proc::run(daemon.args(["daemon", "run"]), Duration::from_secs(20));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    assert!(refused.stderr.to_lowercase().contains("read-only"), "{}", refused.stderr);
    proc::run_args("mount", &["-o", "remount,rw", text(&data)], Duration::from_secs(9)).ok();
    device.start();
    assert!(device.location_row("small", "files").is_some());
}

/// Leaves not a byte on the disk.
fn fill(folder: &Path) {
    let mut dd = Command::new("dd");
    let output = format!("of={}", folder.join("filler").display());
    let more = ["if=/dev/zero", &output, "bs=4k", "oflag=append", "conv=notrunc"];
    let full = proc::run(dd.args(more), Duration::from_secs(20));
    assert!(full.stderr.contains("No space left"), "{}", full.stderr);
}
