//! Another device's files changed through a real mount, with its owner never there.

use crate::common::{Rig, drive};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use vfs_core::model::MAX_GROWTH_BYTES;

fn theirs(rig: &Rig) -> PathBuf {
    drive::peer_folder(rig.mount.mountpoint())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_made_and_changed_is_there_at_once() {
    for rig in Rig::both("what_is_made_and_changed_is_there_at_once") {
        let dir = theirs(&rig);
        fs::write(dir.join("new"), b"hello").unwrap();
        assert_eq!(fs::read(dir.join("new")).unwrap(), b"hello");
        OpenOptions::new().append(true).open(dir.join("new")).unwrap().write_all(b" you").unwrap();
        assert_eq!(fs::read(dir.join("new")).unwrap(), b"hello you");
        let inode = fs::metadata(dir.join("new")).unwrap().ino();
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::rename(dir.join("new"), dir.join("a/b/moved")).unwrap();
        fs::hard_link(dir.join("a/b/moved"), dir.join("link")).unwrap();
        symlink("a/b/moved", dir.join("symbolic")).unwrap();
        assert_eq!(names(&dir), ["a", "link", "symbolic"]);
        assert_eq!(fs::read(dir.join("symbolic")).unwrap(), b"hello you");
        let linked = fs::metadata(dir.join("link")).unwrap();
        assert_eq!((linked.ino(), linked.nlink()), (inode, 2));
        fs::set_permissions(dir.join("link"), fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(fs::metadata(dir.join("a/b/moved")).unwrap().mode() & 0o777, 0o600);
        File::options().write(true).open(dir.join("link")).unwrap().set_len(3).unwrap();
        assert_eq!(fs::read(dir.join("a/b/moved")).unwrap(), b"hel");
        assert!(fs::remove_dir(dir.join("a")).is_err(), "it is not empty");
        fs::remove_file(dir.join("link")).unwrap();
        fs::remove_dir_all(dir.join("a")).unwrap();
        assert_eq!(names(&dir), ["symbolic"]);
        assert!(!dir.join("a/b/moved").exists());
    }
}

#[test]
fn a_read_copy_and_a_written_one_are_one_file() {
    for rig in Rig::both("a_read_copy_and_a_written_one_are_one_file") {
        rig.parts.add_peer_file(2, "file", &[b'.'; 100_000]);
        let path = theirs(&rig).join("file");
        let mut reader = File::open(&path).unwrap();
        let mut start = [0; 4];
        reader.read_exact(&mut start).unwrap();
        let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        writer.write_all_at(b"new!", 50_000).unwrap();
        writer.sync_all().unwrap();
        let mut middle = [0; 6];
        reader.seek(SeekFrom::Start(49_999)).unwrap();
        reader.read_exact(&mut middle).unwrap();
        assert_eq!(&middle, b".new!.");
        drop((reader, writer));
        let mut expected = [b'.'; 100_000];
        expected[50_000..50_004].copy_from_slice(b"new!");
        assert!(fs::read(&path).unwrap() == expected);
    }
}

#[test]
fn a_file_that_the_kernel_reads_by_itself_is_written_to_as_another_inode() {
    for rig in Rig::both("a_file_that_the_kernel_reads_by_itself_is_written_to_as_another_inode") {
        let old = vec![b'o'; MAX_GROWTH_BYTES as usize + 200_000];
        rig.parts.add_peer_file(2, "file", &old);
        let path = theirs(&rig).join("file");
        assert!(fs::read(&path).unwrap() == old);
        // Whole in the cache, and too large to grow, and so handed to the kernel.
        let mut reader = File::open(&path).unwrap();
        let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
        writer.write_all(b"NEW").unwrap();
        drop(writer);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        let passes = &read[..3] == b"ooo" && read[3..] == old[3..];
        let shared = &read[..3] == b"NEW" && read[3..] == old[3..];
        assert!(passes || shared, "one version or the other, never a mix: {:?}", &read[..5]);
        drop(reader);
        let read = fs::read(&path).unwrap();
        assert!(&read[..3] == b"NEW" && read[3..] == old[3..]);
    }
}

#[test]
fn programs_that_save_in_their_ways_succeed() {
    for rig in Rig::both("programs_that_save_in_their_ways_succeed") {
        let dir = theirs(&rig);
        let path = dir.join("document");
        fs::write(&path, b"first").unwrap();
        // To the side and over it.
        fs::write(dir.join("document.tmp"), b"second").unwrap();
        fs::rename(dir.join("document.tmp"), &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        // The old one away, a new one made.
        fs::rename(&path, dir.join("document~")).unwrap();
        fs::write(&path, b"third").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"third");
        assert_eq!(fs::read(dir.join("document~")).unwrap(), b"second");
        // Over itself.
        fs::write(&path, b"4th").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"4th");
        // Deleted while it is open.
        let mut open = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        open.write_all(b"5").unwrap();
        open.rewind().unwrap();
        let mut rest = String::new();
        open.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "5th");
        assert_eq!(names(&dir), ["document~"]);
    }
}
