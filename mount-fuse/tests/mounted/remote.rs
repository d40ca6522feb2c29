//! Another device's files through a real mount: what waits for the network, and what does not.

use crate::common::{DEADLINE, Rig, Standing, can_mount, drive, eventually};
use mount_fuse::MountError;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use vfs_core::changes::Change;

fn theirs(rig: &Rig, name: &str) -> PathBuf {
    drive::peer_folder(rig.mount.mountpoint()).join(name)
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).take(len).collect()
}

#[test]
fn a_file_is_read_in_part_then_whole_then_from_this_disk() {
    for rig in Rig::both("a_file_is_read_in_part_then_whole_then_from_this_disk") {
        let content = bytes(3 << 20);
        rig.parts.add_peer_file(2, "a", &content);
        let path = theirs(&rig, "a");
        let first = File::open(&path).unwrap();
        let mut part = vec![0; 5000];
        first.read_exact_at(&mut part, 1_000_000).unwrap();
        assert!(part[..] == content[1_000_000..1_005_000]);
        assert!(fs::read(&path).unwrap() == content);
        // Whole by now, but an earlier handle is still open with calls: both must read.
        let second = File::open(&path).unwrap();
        for file in [&first, &second] {
            file.read_exact_at(&mut part, 2_000_001).unwrap();
            assert!(part[..] == content[2_000_001..2_005_001]);
        }
        drop((first, second));
        // Now the kernel may read it by itself.
        assert!(fs::read(&path).unwrap() == content);
    }
}

#[test]
fn a_reader_that_waits_for_bytes_can_be_killed() {
    for rig in Rig::both("a_reader_that_waits_for_bytes_can_be_killed") {
        rig.parts.add_stalled_peer_file(2, "stalled", 10 << 20);
        let path = theirs(&rig, "stalled");
        let mut readers: Vec<_> = (0..8)
            .map(|_| Command::new("cat").arg(&path).stdout(Stdio::null()).spawn().unwrap())
            .collect();
        let is_reading = |pid: u32| {
            let stack = fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stack.contains("folio") || stack.contains("fuse") || state.contains(") D ")
        };
        for reader in &readers {
            eventually("the reader waits", || is_reading(reader.id()));
        }
        // More of them than there are threads; the rest of the drive answers nonetheless.
        let start = Instant::now();
        assert_eq!(fs::metadata(&path).unwrap().len(), 10 << 20);
        assert!(fs::read_dir(path.parent().unwrap()).unwrap().count() == 1);
        fs::write(rig.path("own"), b"own").unwrap();
        assert_eq!(fs::read(rig.path("own")).unwrap(), b"own");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        for reader in &mut readers {
            let start = Instant::now();
            reader.kill().unwrap();
            reader.wait().unwrap();
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        }
    }
}

#[test]
fn what_changes_at_the_owner_is_seen() {
    for rig in Rig::both("what_changes_at_the_owner_is_seen") {
        let folder = drive::peer_folder(rig.mount.mountpoint());
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&folder)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert!(names().is_empty() && !folder.join("a").exists());
        rig.parts.add_peer_file(2, "a", b"one");
        eventually("a new name", || folder.join("a").exists());
        eventually("the listing", || names() == ["a"]);
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"one");

        rig.parts.add_peer_file(3, "a", b"another file");
        eventually("a replaced file", || fs::read(folder.join("a")).unwrap() == b"another file");
        rig.parts.remove_peer_file("a");
        eventually("a removed name", || !folder.join("a").exists());
        eventually("the listing", || names().is_empty());
    }
}

#[test]
fn what_was_missed_is_seen_nonetheless() {
    const TOO_MANY: usize = 5_000;
    if !can_mount("what_was_missed_is_seen_nonetheless") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let folder = drive::peer_folder(rig.mount.mountpoint());
    let feed = rig.parts.index.feed().clone();
    let flood = || (0..TOO_MANY).for_each(|_| feed.publish(vec![Change::Devices]));
    // Stays where it is, whatever the kernel is told.
    let standing = Standing::in_directory(&folder);
    for id in 2..12 {
        let path = folder.join(id.to_string());
        assert!(!path.exists());
        flood();
        rig.parts.add_peer_file(id, &id.to_string(), b"content");
        flood();
        eventually("a new name", || path.exists());
        eventually("the listing", || fs::read_dir(&folder).unwrap().count() as u64 == id - 1);
    }
    let place = fs::read_link(format!("/proc/{}/cwd", standing.0.id())).unwrap();
    assert_eq!(place, folder);
}

#[test]
fn a_forced_unmount_ends_readers_that_wait() {
    for rig in Rig::both("a_forced_unmount_ends_readers_that_wait") {
        rig.parts.add_stalled_peer_file(2, "stalled", 1 << 20);
        let file = File::open(theirs(&rig, "stalled")).unwrap();
        let reader = std::thread::spawn(move || file.read_at(&mut [0; 4096], 0));
        let busy = rig.mount.unmount(false).unwrap_err();
        assert!(matches!(busy, MountError::Busy { .. }), "{busy:?}");
        let start = Instant::now();
        rig.mount.unmount(true).unwrap();
        assert!(reader.join().unwrap().is_err());
        assert!(start.elapsed() < DEADLINE);
    }
}
