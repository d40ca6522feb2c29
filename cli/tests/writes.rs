//! Writes to a device that is away: what waits is shown, waited for, exported, and never dropped.

mod common;

use common::{Device, stderr, text};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A laptop that has mounted the drive, and a nas with a folder `photos` that it has seen.
struct Pair {
    laptop: Device,
    nas: Device,
    photos: PathBuf,
    drive: PathBuf,
}

impl Pair {
    fn new() -> Self {
        let (laptop, nas) = (Device::with_library("laptop"), Device::new());
        let ticket = laptop.ok(&["device", "invite", "--detach"]);
        nas.ok(&["device", "join", ticket.trim(), "--device-name", "nas", "--yes"]);
        let photos = nas.folder("photos");
        fs::write(photos.join("old.txt"), "what was there").unwrap();
        nas.ok(&["location", "add", text(&photos), "--wait"]);
        wait_until("the index of the nas", || {
            laptop.run(&["info", "sd://nas/photos/old.txt"]).status.success()
        });
        let drive = laptop.folder("drive");
        laptop.ok(&["mount", text(&drive)]);
        Self { laptop, nas, photos, drive }
    }

    /// The nas goes away; what is written from now on waits.
    fn away() -> Self {
        let pair = Self::new();
        pair.nas.ok(&["daemon", "stop"]);
        wait_until("the nas to be away", || {
            let devices = pair.laptop.json(&["device", "list"]);
            let nas = devices["devices"].as_array().unwrap().iter().find(|d| d["name"] == "nas");
            nas.is_some_and(|nas| nas["online"] == false)
        });
        pair
    }

    fn remote(&self, path: &str) -> PathBuf {
        self.drive.join("nas/photos").join(path)
    }
}

fn pending(device: &Device) -> Vec<Value> {
    device.json(&["pending"])["pending"].as_array().unwrap().clone()
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn what_waits_is_told_everywhere_and_survives_the_daemon() {
    let pair = Pair::away();
    let laptop = &pair.laptop;
    assert!(pending(laptop).is_empty());
    assert_eq!(laptop.json(&["sync"])["reached"], true, "nothing to wait for");

    fs::create_dir(pair.remote("2026")).unwrap();
    fs::write(pair.remote("2026/new.txt"), "twelve bytes").unwrap();
    let waits = pending(laptop);
    let new = waits.iter().find(|w| w["path"] == "2026/new.txt").unwrap();
    assert_eq!((&new["what"], &new["bytes"]), (&"create".into(), &12.into()), "{new}");
    assert_eq!((&new["owner"]["name"], &new["location"]), (&"nas".into(), &"photos".into()));
    assert_eq!(new["address"], "sd://nas/photos/2026/new.txt");
    assert!(new["reason"].as_str().unwrap().contains("offline"), "{new}");
    let shown = laptop.ok(&["pending"]);
    assert!(shown.contains("photos/2026/new.txt") && shown.contains("nas"), "{shown}");

    let status = laptop.json(&["status"]);
    assert_eq!(status["pending"]["operations"], waits.len());
    assert_eq!((&status["pending"]["bytes"], &status["conflicts"]), (&12.into(), &0.into()));
    assert_eq!(status["pending"]["devices"][0]["device"], "nas");
    assert!(laptop.ok(&["status"]).contains("pending"));
    let info = laptop.json(&["info", "sd://nas/photos/2026/new.txt"]);
    assert_eq!((&info["size"], &info["pending"]["operations"]), (&12.into(), &1.into()), "{info}");
    assert_eq!(laptop.ok(&["ls", "sd://nas/photos"]), "2026\nold.txt\n");
    assert_eq!(laptop.json(&["info", "sd://nas/photos/old.txt"])["pending"]["operations"], 0);

    let unmounted = laptop.run(&["unmount"]);
    let said = stderr(&unmounted);
    assert!(
        unmounted.status.success() && said.contains("wait") && said.contains("sd sync"),
        "{said}"
    );
    let stopped = laptop.run(&["daemon", "stop", "--json"]);
    let stopped: Value = serde_json::from_slice(&stopped.stdout).unwrap();
    assert_eq!(stopped["pending"]["operations"], waits.len());
    let after = pending(laptop);
    assert_eq!(after.len(), waits.len(), "after a restart: {after:?}");
    assert_eq!(laptop.json(&["doctor"])["ok"], true);
}

#[test]
fn a_sync_that_ends_in_time_says_what_is_missing_and_exits_with_1() {
    let pair = Pair::away();
    fs::write(pair.remote("new.txt"), "x").unwrap();
    let sync = |args: &[&str]| {
        let output = pair.laptop.run(&[&["sync", "--json", "--timeout", "300ms"], args].concat());
        let reply: Value = serde_json::from_slice(&output.stdout).unwrap();
        (output.status.code(), reply, stderr(&output))
    };
    for args in [&[][..], &["sd://nas"], &["sd://nas/photos"], &["sd://nas/photos/new.txt"]] {
        let (code, reply, said) = sync(args);
        assert_eq!(
            (code, &reply["reached"], &reply["operations"]),
            (Some(1), &false.into(), &1.into())
        );
        assert_eq!(reply["pending"][0]["path"], "new.txt");
        assert!(said.contains("waiting for “nas”") && said.contains("unreachable"), "{said}");
    }
    for args in
        [&["sd://nas/photos/old.txt"][..], &["sd://laptop"], &[text(&pair.remote("old.txt"))]]
    {
        let (code, reply, _) = sync(args);
        assert_eq!((code, &reply["reached"]), (Some(0), &true.into()), "{args:?}");
    }
    pair.laptop.fails(1, &["sync", "sd://nas/phtos"], &["photos"]);
    pair.laptop.fails(2, &["sync", "--timeout", "soon"], &["soon"]);
    let listed = pair.laptop.run(&["sync", "--timeout", "100ms"]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("photos/new.txt"));
}

#[test]
fn writes_for_a_removed_device_are_kept_exported_and_given_up_only_when_asked() {
    let pair = Pair::away();
    let laptop = &pair.laptop;
    fs::create_dir(pair.remote("trip")).unwrap();
    fs::write(pair.remote("trip/diary.txt"), "day one").unwrap();
    fs::write(pair.remote("trip/\x1b[2J.txt"), "odd").unwrap();
    std::os::unix::fs::symlink("diary.txt", pair.remote("trip/link")).unwrap();
    let waits = pending(laptop).len();

    laptop.fails(1, &["device", "remove", "nas"], &["--yes", "will not be delivered", "export"]);
    let removed = laptop.run(&["device", "remove", "nas", "--yes"]);
    assert!(stderr(&removed).contains("sd pending export 'nas'"), "{}", stderr(&removed));
    let orphaned = pending(laptop);
    assert_eq!(orphaned.len(), waits);
    assert!(orphaned.iter().all(|w| w["state"] == "orphaned" && w["address"].is_null()));
    assert!(!laptop.ok(&["pending"]).contains('\x1b'), "names steer no terminal");
    let (code, said) = {
        let output = laptop.run(&["sync"]);
        (output.status.code(), stderr(&output))
    };
    assert_eq!(code, Some(1), "it does not wait for what never comes: {said}");
    let problems = laptop.json(&["status"])["problems"].clone();
    assert!(problems.as_array().unwrap().iter().any(|p| p["code"] == "pending_orphaned"));

    let to = laptop.folder("kept");
    laptop.ok(&["pending", "export", "nas", text(&to)]);
    laptop.ok(&["pending", "export", "nas", text(&to)]);
    assert_eq!(pending(laptop).len(), waits, "an export gives nothing up");
    let files = files_below(&to);
    let content = |name: &str| {
        let path = files.iter().find(|p| p.file_name().unwrap() == name);
        fs::read_to_string(path.unwrap_or_else(|| panic!("no {name} in {files:?}"))).unwrap()
    };
    assert_eq!(
        (content("diary.txt"), content("diary (2).txt")),
        ("day one".into(), "day one".into())
    );
    assert_eq!(content("\x1b[2J.txt"), "odd");
    let link = files.iter().find(|p| p.file_name().unwrap() == "link").unwrap();
    assert_eq!(fs::read_link(link).unwrap(), Path::new("diary.txt"));
    let list: Value = serde_json::from_str(&content("pending.json")).unwrap();
    assert_eq!(list["pending"].as_array().unwrap().len(), waits);

    let to = laptop.folder("last");
    laptop.fails(1, &["pending", "export", "nas", text(&to), "--forget"], &["--yes", "gives up"]);
    assert_eq!(files_below(&to).len(), 0);
    laptop.ok(&["pending", "export", "nas", text(&to), "--forget", "--yes"]);
    assert!(pending(laptop).is_empty());
    assert_eq!(laptop.json(&["doctor"])["ok"], true);
    laptop.fails(1, &["pending", "export", "nas", text(&to)], &["nothing waits"]);
    laptop.ok(&["daemon", "stop"]);
    assert!(pending(laptop).is_empty(), "nor after a restart");
}

#[test]
fn an_export_gives_up_nothing_that_can_still_be_delivered() {
    let pair = Pair::away();
    fs::write(pair.remote("new.txt"), "x").unwrap();
    let to = pair.laptop.folder("kept");
    let all = ["pending", "export", "sd://nas/photos", text(&to), "--forget", "--yes"];
    assert_eq!(pair.laptop.json(&all)["forgotten"], 0);
    assert_eq!(pending(&pair.laptop).len(), 1);
    let inside = pair.drive.join("copy");
    pair.laptop.fails(1, &["pending", "export", "nas", text(&inside)], &["inside the drive"]);
    pair.laptop.fails(1, &["pending", "export", "nsa", text(&to)], &["nas"]);
    pair.laptop.fails(2, &["pending", "export", "nas", text(&to), "--yes"], &["--forget"]);
    assert_eq!(pair.photos.read_dir().unwrap().count(), 1, "the nas has not heard of it");
}

#[test]
fn conflicts_are_listed_and_those_that_are_none_are_refused() {
    let laptop = Device::with_library("laptop");
    assert_eq!(laptop.json(&["conflicts"])["conflicts"].as_array().unwrap().len(), 0);
    assert_eq!(laptop.json(&["conflicts", "list"])["conflicts"].as_array().unwrap().len(), 0);
    laptop.fails(1, &["conflicts", "resolve", "7", "--done"], &["7", "sd conflicts"]);
    for wrong in [
        &["conflicts", "resolve", "7"][..],
        &["conflicts", "resolve", "--done"],
        &["conflicts", "resolve", "7", "--keep", "nothing"],
        &["conflicts", "resolve", "7", "--done", "--keep", "mine"],
    ] {
        assert_eq!(laptop.run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn a_damaged_journal_is_told_and_loses_nothing_else() {
    let pair = Pair::away();
    let laptop = &pair.laptop;
    for name in ["first.txt", "damaged.txt", "third.txt"] {
        fs::write(pair.remote(name), name).unwrap();
    }
    laptop.ok(&["daemon", "stop"]);
    let mut flipped = 0;
    for path in files_below(&laptop.data().join("outbox/journal")) {
        let mut bytes = fs::read(&path).unwrap();
        let name = b"damaged.txt";
        let hits: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(name)).collect();
        hits.iter().for_each(|at| bytes[*at] ^= 0x20);
        flipped += hits.len();
        fs::write(&path, bytes).unwrap();
    }
    assert!(flipped > 0, "the journal has its name somewhere");

    let waits = pending(laptop);
    for name in ["first.txt", "third.txt"] {
        let write = waits.iter().find(|w| w["path"] == name).unwrap();
        assert_eq!(write["bytes"], name.len(), "{write}");
    }
    let doctor = laptop.run(&["doctor", "--json"]);
    let diagnosis: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!((doctor.status.code(), &diagnosis["ok"]), (Some(1), &false.into()));
    let aside = laptop.json(&["status"])["journal"]["set_aside"][0].as_str().unwrap().to_owned();
    let told =
        diagnosis["checks"].as_array().unwrap().iter().find(|c| c["name"] == "journal_damaged");
    assert!(told.unwrap()["message"].as_str().unwrap().contains(&aside), "{diagnosis}");
    let everything = laptop.json(&["status"])["journal"]["set_aside"].clone();
    for path in everything.as_array().unwrap() {
        fs::remove_file(path.as_str().unwrap()).unwrap();
    }
    assert_eq!(laptop.json(&["doctor"])["ok"], true, "looked at, and removed");
}

#[test]
fn a_sync_ends_when_the_owner_is_back_and_has_everything() {
    let pair = Pair::away();
    fs::create_dir(pair.remote("2026")).unwrap();
    fs::write(pair.remote("2026/new.txt"), "twelve bytes").unwrap();
    let mut sync = pair.laptop.command();
    let waiting = sync.args(["sync", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let waiting = waiting.spawn().unwrap();
    pair.nas.ok(&["status"]);
    let ended = waiting.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", stderr(&ended));
    let reply: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!((&reply["reached"], &reply["operations"]), (&true.into(), &0.into()));
    assert_eq!(fs::read_to_string(pair.photos.join("2026/new.txt")).unwrap(), "twelve bytes");
    assert!(pending(&pair.laptop).is_empty());
}

/// A file that both devices changed while they did not see each other; gives its conflict.
fn conflict(pair: &Pair) -> Value {
    fs::write(pair.remote("old.txt"), "of the laptop").unwrap();
    fs::write(pair.photos.join("old.txt"), "of the nas, longer").unwrap();
    pair.nas.ok(&["status"]);
    pair.laptop.ok(&["sync", "--timeout", "60s"]);
    let listed = pair.laptop.json(&["conflicts"]);
    let [conflict] = listed["conflicts"].as_array().unwrap().as_slice() else {
        panic!("one conflict: {listed}");
    };
    assert_eq!((&conflict["ended"], &conflict["path"]), (&"kept_as".into(), &"old.txt".into()));
    assert_eq!(pair.laptop.json(&["status"])["conflicts"], 1);
    let kept = conflict["kept_as"].as_str().unwrap().to_owned();
    wait_until("the copy to be seen", || pair.laptop.run(&["info", &kept]).status.success());
    conflict.clone()
}

fn names_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
    names.map(|n| n.to_string_lossy().into_owned()).filter(|n| !n.starts_with('.')).collect()
}

#[test]
fn a_conflict_is_resolved_for_this_devices_version() {
    let pair = Pair::away();
    let id = conflict(&pair)["id"].to_string();
    let resolve = ["conflicts", "resolve", &id, "--keep", "mine", "--yes"];
    pair.laptop.fails(1, &resolve[..5], &["--yes", "replaces"]);
    assert_eq!(names_in(&pair.photos).len(), 2, "nothing was done");
    pair.laptop.ok(&resolve);
    pair.laptop.ok(&["sync", "--timeout", "60s"]);
    assert_eq!(names_in(&pair.photos), ["old.txt"]);
    assert_eq!(fs::read_to_string(pair.photos.join("old.txt")).unwrap(), "of the laptop");
    assert_eq!(pair.laptop.json(&["status"])["conflicts"], 0);
}

#[test]
fn a_conflict_is_exported_and_resolved_for_the_owners_version() {
    let pair = Pair::away();
    let id = conflict(&pair)["id"].to_string();
    let to = pair.laptop.folder("both");
    let resolve = ["conflicts", "resolve", &id, "--keep", "theirs", "--export", text(&to), "--yes"];
    pair.laptop.ok(&resolve);
    pair.laptop.ok(&["sync", "--timeout", "60s"]);
    assert_eq!(names_in(&pair.photos), ["old.txt"]);
    assert_eq!(fs::read_to_string(pair.photos.join("old.txt")).unwrap(), "of the nas, longer");
    let mut kept: Vec<_> =
        files_below(&to).iter().map(|p| fs::read_to_string(p).unwrap()).collect();
    kept.sort();
    assert_eq!(kept, ["of the laptop", "of the nas, longer"]);
    pair.laptop.fails(1, &resolve, &["no conflict"]);
}
