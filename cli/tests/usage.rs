//! What the command line accepts, and how it refuses: exit codes, hints, streams.

mod common;

use common::{Device, stderr, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn wrong_usage_exits_with_2_and_help_with_0() {
    let device = Device::new();
    for args in [
        &[][..],
        &["frobnicate"],
        &["status", "--frobnicate"],
        &["location", "add"],
        &["device", "invite", "--expires", "soon"],
        &["config", "get", "cache.limt"],
        &["config", "set", "cache.limit", "lots"],
        &["--set", "cache.limit", "status"],
        &["--set", "nothing=1", "status"],
        &["cache", "limit", "lots"],
    ] {
        let output = device.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
    let device = Device::new();
    for args in
        [&["--help"][..], &["help", "mount"], &["--version"], &["location", "add", "--help"]]
    {
        let output = device.run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty(), "{args:?}");
    }
    assert!(!device.data().exists(), "asking for help leaves nothing behind");
}

#[test]
fn commands_of_later_stages_are_absent() {
    let help = Device::new().ok(&["--help"]);
    for command in ["find", "cp", "mv", "rm", "mkdir", "tag", "guard"] {
        assert!(!help.lines().any(|l| l.trim_start().starts_with(&format!("{command} "))));
    }
}

#[test]
fn completions_and_man_pages_are_made() {
    let device = Device::new();
    assert!(device.ok(&["completions", "bash"]).contains("location"));
    let dir = device.folder("man");
    device.ok(&["man", text(&dir)]);
    assert!(dir.join("sd.1").exists() && dir.join("sd-location-add.1").exists());
}

#[test]
fn configuration_is_listed_set_and_overridden() {
    let device = Device::new();
    device.ok(&["config", "set", "cache.limit", "2GiB"]);
    assert_eq!(device.ok(&["config", "get", "cache.limit"]), "2GiB\n");
    let flagged = device.ok(&["--set", "cache.limit=3GiB", "config", "get", "cache.limit"]);
    assert_eq!(flagged, "3GiB\n");
    let keys = device.json(&["config", "list"]);
    let row = |name: &str| {
        keys["keys"].as_array().unwrap().iter().find(|k| k["key"] == name).unwrap().clone()
    };
    assert_eq!(row("cache.limit")["source"], "file");
    assert_eq!(row("network.bind")["source"], "environment");
    assert_eq!(row("read.deadline")["source"], "default");
    device.ok(&["config", "set", "cache.limit", "--unset"]);
    assert_eq!(device.ok(&["config", "get", "cache.limit"]), "auto\n");
    device.fails(2, &["config", "get", "cache.limt"], &["cache.limit"]);

    fs::write(device.data().join("config.toml"), "[cache]\nlimt = 3\n").unwrap();
    device.fails(1, &["status"], &["config.toml", "cache.limt", "cache.limit"]);
    fs::write(device.data().join("config.toml"), "[cache\n").unwrap();
    device.fails(1, &["status"], &["config.toml", "TOML"]);
}

#[test]
fn without_a_library_commands_say_how_to_get_one() {
    let device = Device::new();
    let folder = device.folder("photos");
    for args in [
        &["location", "add", text(&folder)][..],
        &["location", "list"],
        &["location", "remove", "x", "--yes"],
        &["device", "list"],
        &["device", "invite", "--detach"],
        &["device", "rename", "x"],
        &["library", "info"],
        &["mount", text(&folder)],
        &["ls"],
        &["tree"],
        &["info", "sd://x"],
    ] {
        device.fails(1, args, &["library create", "device join"]);
    }
    device.ok(&["status"]);
    assert_eq!(device.json(&["library", "list"])["libraries"].as_array().unwrap().len(), 0);
}

#[test]
fn names_that_do_not_exist_are_answered_with_the_nearest() {
    let device = Device::with_library("laptop");
    let photos = device.folder("photos");
    device.ok(&["location", "add", text(&photos), "--wait"]);
    device.fails(1, &["device", "remove", "latpop", "--yes"], &["latpop", "laptop"]);
    device.fails(1, &["location", "remove", "photso", "--yes"], &["photso", "photos"]);
    device.fails(1, &["location", "rescan", "photso"], &["photso", "photos"]);
    device.fails(1, &["ls", "sd://latpop"], &["laptop"]);
    device.fails(1, &["ls", "sd://laptop/photso"], &["photos"]);
    device.fails(1, &["ls", "sd://laptop/photos/gone/deep"], &["sd ls 'sd://laptop/photos'"]);
    device.fails(2, &["info", "sd://content/123"], &["64 hexadecimal"]);
    device.fails(1, &["info", "/etc/hostname"], &["neither in a mount nor in a location"]);
    let other = device.folder("other");
    let shared = ["location", "add", text(&other), "--share-with", "latpop"];
    device.fails(1, &shared, &["laptop"]);
}

#[test]
fn a_location_that_cannot_be_is_refused() {
    let device = Device::with_library("laptop");
    let photos = device.folder("photos");
    let inner = device.folder("photos/2026");
    let file = photos.join("a.jpg");
    fs::write(&file, "x").unwrap();
    device.ok(&["location", "add", text(&photos)]);
    let add = |path: &std::path::Path, words: &[&str]| {
        device.fails(1, &["location", "add", text(path)], words);
    };
    add(&photos, &["already", "photos"]);
    add(&inner, &["inside the location", "photos"]);
    add(photos.parent().unwrap(), &["contains"]);
    add(&file, &["is a file", "location add"]);
    add(&photos.join("gone"), &["does not exist"]);
    add(device.data(), &["data directory"]);
    add(std::path::Path::new("/"), &["contains"]);
    let other = device.folder("other");
    device.fails(1, &["location", "add", text(&other), "--name", "photos"], &["photos", "--name"]);
    device.fails(1, &["location", "add", text(&other), "--name", "content"], &["content"]);
    device.fails(1, &["location", "add", text(&other), "--name", "a/b"], &["a/b"]);
    let listed = device.json(&["location", "list"]);
    assert_eq!(listed["locations"].as_array().unwrap().len(), 1, "nothing was added: {listed}");

    let twin = device.folder("elsewhere/photos");
    let added = device.json(&["location", "add", text(&twin)]);
    assert_eq!(added["name"], "photos-2");
}

#[test]
fn a_mount_point_that_cannot_be_is_refused() {
    let device = Device::with_library("laptop");
    let photos = device.folder("photos/empty");
    device.ok(&["location", "add", text(photos.parent().unwrap())]);
    let full = device.folder("full");
    fs::write(full.join("file"), "x").unwrap();
    let mount = |path: &std::path::Path, words: &[&str]| {
        device.fails(1, &["mount", text(path)], words);
    };
    mount(&full.join("gone"), &["does not exist", "mkdir"]);
    mount(&full, &["not empty"]);
    mount(&full.join("file"), &["not a directory"]);
    mount(&photos, &["inside the location"]);
    mount(&device.data().join("index"), &["data directory"]);
    device.fails(1, &["unmount", text(&full)], &["mounted"]);
    device.fails(1, &["unmount"], &["not mounted"]);
}

#[test]
fn destruction_is_refused_without_a_terminal_or_yes() {
    let device = Device::with_library("laptop");
    let photos = device.folder("photos");
    device.ok(&["location", "add", text(&photos)]);
    for args in [&["location", "remove", "photos"][..], &["cache", "clear"]] {
        device.fails(1, args, &["--yes"]);
    }
    device.fails(1, &["device", "join", "nonsense"], &["--yes"]);
    assert_eq!(device.json(&["location", "list"])["locations"].as_array().unwrap().len(), 1);
    device.ok(&["location", "remove", "photos", "--yes"]);
    assert_eq!(device.json(&["location", "list"])["locations"].as_array().unwrap().len(), 0);
    assert!(photos.exists());
    device.ok(&["cache", "clear", "--yes"]);
    device.fails(1, &["device", "remove", "laptop", "--yes"], &["cannot remove itself"]);
}

#[test]
fn everything_in_the_data_directory_is_private() {
    let device = Device::with_library("laptop");
    for name in ["", "identity.key", "library.json", "sock", "daemon.lock", "sd.log", "index"] {
        let mode = fs::metadata(device.data().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
    }
}

#[test]
fn listings_come_from_the_index_and_keep_every_byte_of_a_name() {
    use std::os::unix::ffi::OsStrExt;
    let device = Device::with_library("laptop");
    let folder = device.folder("odd/deep/er");
    let odd = [&b"new\nline"[..], b"back\\slash", b"100%", b"\xff\xfe", "ä ö".as_bytes()];
    for name in odd {
        fs::write(folder.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    let top = folder.parent().unwrap().parent().unwrap();
    device.ok(&["location", "add", text(top)]);

    // Not waited for: what is looked at is scanned first.
    let listed = device.json(&["ls", "sd://laptop/odd/deep/er"]);
    let entries = listed["entries"].as_array().unwrap();
    assert_eq!(entries.len(), odd.len());
    for entry in entries {
        let info = device.json(&["info", entry["address"].as_str().unwrap()]);
        assert_eq!((&info["size"], &info["address"]), (&entry["size"], &entry["address"]));
    }
    let raw = device.run(&["ls", text(&folder)]).stdout;
    for name in odd {
        assert!(raw.windows(name.len()).any(|w| w == name), "{name:?} is not in {raw:?}");
    }

    let tree = device.json(&["tree", "sd://laptop"]);
    let depth_of = |name: &str| {
        let entries = tree["entries"].as_array().unwrap();
        entries.iter().find(|e| e["name"] == name).unwrap()["depth"].clone()
    };
    assert_eq!((depth_of("odd"), depth_of("er"), depth_of("100%")), (1.into(), 3.into(), 4.into()));
    let shallow = device.json(&["tree", "-L", "1", "sd://laptop/odd"]);
    assert_eq!(shallow["entries"].as_array().unwrap().len(), 1);
}

#[test]
fn a_listing_longer_than_a_page_is_whole() {
    let device = Device::with_library("laptop");
    let folder = device.folder("many");
    for number in 0..1203 {
        fs::write(folder.join(format!("{number:05}")), "").unwrap();
    }
    device.ok(&["location", "add", text(&folder), "--wait"]);
    let names: Vec<_> = (0..1203).map(|n| format!("{n:05}")).collect();
    assert_eq!(device.ok(&["ls", "sd://laptop/many"]).lines().collect::<Vec<_>>(), names);
    let tree = device.json(&["tree", "sd://laptop/many"]);
    let entries = tree["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 1203);
    assert_eq!(entries.iter().filter(|e| e["last"] == true).count(), 1);
    assert_eq!(entries[1202]["last"], true);
}
