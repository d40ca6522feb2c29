//! What is pinned is here, whatever becomes of its owner and of the room in the cache.

use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const COMES: Duration = Duration::from_secs(60);

#[test]
fn a_pinned_folder_is_read_with_its_owner_gone_and_what_is_new_in_it_comes_unopened() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let pinned = source.join("photos/2026");
    fs::create_dir_all(&pinned).unwrap();
    (0..30).for_each(|n| random(&pinned, n, 300 << 10));
    random(&source.join("photos"), 100, 20 * MIB);
    random(&source, 101, MIB);
    let (mut owner, mut reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");

    let waited = reader.json(&["pin", "sd://owner/files/photos", "--wait"]);
    let pin = &waited["pins"][0];
    assert_eq!(pin["state"], "here", "{pin}");
    assert_eq!((&pin["files"], &pin["here_bytes"]), (&31.into(), &pin["bytes"]));
    assert_eq!(reader.json(&["info", "sd://owner/files/101"])["cached_bytes"], 0, "not pinned");
    let info = reader.json(&["info", "sd://owner/files/photos/100"]);
    assert_eq!(info["pinned"], "sd://owner/files/photos", "{info}");

    // New, changed, and the folder under another name.
    random(&pinned, 50, MIB);
    fs::write(pinned.join("7"), files::random_bytes(400 << 10, 777)).unwrap();
    fs::rename(source.join("photos"), source.join("pictures")).unwrap();
    wait_until("what is new", COMES, || {
        let pin = pins(&reader)[0].clone();
        pin["address"] == "sd://owner/files/pictures"
            && pin["files"] == 32
            && pin["state"] == "here"
            && cached_whole(&reader, "sd://owner/files/pictures/2026/50")
            && cached_whole(&reader, "sd://owner/files/pictures/2026/7")
    });
    // Hashed by now, or not: what is read with the owner gone must not depend on that.
    owner.wait_hashed("files");
    reader.wait_replicated(&owner, "files");
    wait_until("the rest", COMES, || pins(&reader)[0]["state"] == "here");

    owner.kill();
    let theirs = source.join("pictures");
    files::assert_same_bytes(&theirs, &reader.at("owner/files/pictures"));
    reader.stop();
    reader.start();
    reader.mount();
    files::drop_kernel_caches();
    files::assert_same_bytes(&theirs, &reader.at("owner/files/pictures"));
    assert_eq!(reader.status()["pinned"]["here_files"], 32);
    assert!(fs::read(reader.at("owner/files/101")).is_err(), "nobody pinned it");
}

#[test]
fn reads_of_other_files_never_evict_what_is_pinned_also_after_a_restart_and_a_kill() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    for folder in ["kept", "others"] {
        fs::create_dir(source.join(folder)).unwrap();
    }
    (0..4).for_each(|n| random(&source.join("kept"), n, 4 * MIB));
    (10..26).for_each(|n| random(&source.join("others"), n, 4 * MIB));
    let (mut owner, mut reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    reader.sd(&["cache", "limit", "24M"]).ok();
    reader.sd(&["pin", "sd://owner/files/kept", "--wait"]).ok();

    for round in 0..3 {
        files::drop_kernel_caches();
        files::assert_same_bytes(&source.join("others"), &reader.at("owner/files/others"));
        let stats = reader.json(&["cache", "stats"]);
        assert_eq!(stats["pinned_bytes"], 16 * MIB, "{stats}");
        assert!(stats["bytes"].as_u64().unwrap() <= 25 * MIB, "{stats}");
        match round {
            0 => reader.stop(),
            _ => reader.kill(),
        }
        reader.start();
        reader.mount();
        reader.wait_online("owner");
    }
    // Less than is pinned: that stays, and everything can still be read.
    let lowered = reader.sd(&["cache", "limit", "8M"]).ok();
    assert!(lowered.stderr.contains("pinned"), "{}", lowered.stderr);
    files::assert_same_bytes(&source.join("others"), &reader.at("owner/files/others"));
    reader.sd(&["cache", "clear", "--yes"]).ok();
    owner.kill();
    files::drop_kernel_caches();
    files::assert_same_bytes(&source.join("kept"), &reader.at("owner/files/kept"));
}

#[test]
fn what_does_not_fit_is_told_at_once_and_comes_when_there_is_room() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    (0..4).for_each(|n| random(&source, n, 4 * MIB));
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    reader.sd(&["cache", "limit", "10M"]).ok();

    let pinned = reader.sd(&["pin", "sd://owner/files"]).ok();
    assert!(pinned.stderr.contains("6.0 MiB of what is pinned do not fit"), "{}", pinned.stderr);
    assert!(pinned.stderr.contains("sd cache limit 16MiB"), "{}", pinned.stderr);
    let waited = reader.sd(&["pin", "--wait"]);
    assert_eq!(waited.status.code(), Some(1), "{}", waited.stderr);
    let pin = &pins(&reader)[0];
    assert_eq!((&pin["state"], &pin["here_files"]), (&"cache_full".into(), &2.into()), "{pin}");
    let problems = reader.status()["problems"].to_string();
    assert!(problems.contains("pins_full"), "{problems}");

    reader.sd(&["cache", "limit", "16MiB"]).ok();
    reader.sd(&["pin", "--wait", "--timeout", "60s"]).ok();
    assert_eq!(pins(&reader)[0]["here_files"], 4);
}

#[test]
fn evict_gives_back_what_is_neither_pinned_nor_pending() {
    let Some(lab) = Lab::lan(&[Need::Root, Need::Fuse]) else { return };
    let source = lab.folder("source");
    (0..3).for_each(|n| random(&source, n, MIB));
    let (mut owner, mut reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let address = |n: u64| format!("sd://owner/files/{n}");
    reader.sd(&["pin", &address(0), "--wait"]).ok();
    for n in [1, 2] {
        drop(fs::read(reader.at(format!("owner/files/{n}"))).unwrap());
        wait_until("it is cached", COMES, || cached_whole(&reader, &address(n)));
    }
    owner.stop();
    fs::write(reader.at("owner/files/2"), "written with the owner away").unwrap();

    reader.fails(1, &["evict", &address(1)]);
    assert!(cached_whole(&reader, &address(1)), "it was not confirmed");
    assert_eq!(reader.json(&["evict", &address(1), "--yes"])["freed_bytes"], MIB);
    assert_eq!(reader.json(&["info", &address(1)])["cached_bytes"], 0);
    // The kernel may still have its pages.
    files::drop_kernel_caches();
    assert!(fs::read(reader.at("owner/files/1")).is_err(), "it is here no more");
    let refused = reader.fails(1, &["evict", &address(0), "--yes"]);
    assert!(refused.contains("sd unpin"), "{refused}");
    let all = reader.json(&["evict", "sd://owner/files", "--yes"]);
    assert_eq!(all["pinned_bytes"], MIB, "{all}");
    assert!(cached_whole(&reader, &address(0)));

    // What waits for its owner is not in the cache.
    let written = reader.at("owner/files/2");
    assert_eq!(fs::read_to_string(&written).unwrap(), "written with the owner away");
    assert_eq!(reader.json(&["pending"])["operations"].as_u64().map(|n| n > 0), Some(true));
    owner.start();
    reader.wait_online("owner");
    reader.sd(&["sync"]).ok();
    assert_eq!(fs::read_to_string(source.join("2")).unwrap(), "written with the owner away");

    reader.sd(&["unpin", &address(0)]).ok();
    reader.fails(1, &["unpin", &address(0)]);
    assert_eq!(reader.json(&["evict", &address(0), "--yes"])["freed_bytes"], MIB);
    reader.stop();
}

#[test]
fn what_is_on_this_device_anyway_and_what_is_no_file_is_not_pinned() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    random(&source, 1, MIB);
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let own = owner.fails(1, &["pin", "sd://owner/files/1"]);
    assert!(own.contains("here anyway"), "{own}");
    reader.fails(1, &["pin", "sd://owner"]);
    reader.fails(1, &["pin", "sd://owner/files/nothing"]);
    reader.fails(1, &["unpin", "sd://owner/files/1"]);
    assert_eq!(pins(&reader).len(), 0);
    // What was pinned and is gone can still be unpinned by its address.
    reader.sd(&["pin", "sd://owner/files/1", "--wait"]).ok();
    fs::remove_file(source.join("1")).unwrap();
    wait_until("it is told", COMES, || pins(&reader)[0]["state"] == "gone");
    reader.sd(&["unpin", "sd://owner/files/1"]).ok();
    assert_eq!(pins(&reader).len(), 0);
}

/// A file named by a number.
fn random(folder: &Path, n: u64, len: u64) {
    files::random_file(&folder.join(n.to_string()), len, 4000 + n);
}

fn pins(device: &Device) -> Vec<Value> {
    device.json(&["pin"])["pins"].as_array().expect("a list").clone()
}

fn cached_whole(device: &Device, address: &str) -> bool {
    let finished = device.sd(&["info", address, "--json"]);
    let info: Value = serde_json::from_slice(&finished.stdout).unwrap_or_default();
    info["cached_bytes"].is_u64() && info["cached_bytes"] == info["size"]
}
