//! Own files through a real mount behave as files on the disk do, with the kernel's
//! passthrough and without it.

use crate::common::{Rig, can_mount, eventually, open_rw, skipped};
use mount_fuse::MountOptions;
use rustix::fs::{FallocateFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}

#[test]
fn bytes_written_are_on_the_disk_and_read_back() {
    for rig in Rig::both("bytes_written_are_on_the_disk_and_read_back") {
        let data = pattern(3 * (1 << 20) + 17, 1);
        fs::write(rig.path("a"), &data).unwrap();
        assert!(fs::read(rig.disk_path("a")).unwrap() == data);
        assert!(fs::read(rig.path("a")).unwrap() == data);
        assert_eq!(fs::metadata(rig.path("a")).unwrap().len(), data.len() as u64);

        fs::write(rig.disk_path("b"), &data).unwrap();
        assert!(fs::read(rig.path("b")).unwrap() == data);

        fs::write(rig.path("a"), b"short").unwrap();
        assert_eq!(fs::read(rig.disk_path("a")).unwrap(), b"short");
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"short");
    }
}

#[test]
fn passthrough_is_used_where_the_kernel_has_it() {
    if !can_mount("passthrough_is_used_where_the_kernel_has_it") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    fs::write(rig.path("a"), b"x").unwrap();
    let release = rustix::system::uname();
    let version: Vec<u32> = release
        .release()
        .to_string_lossy()
        .split(|c: char| !c.is_ascii_digit())
        .take(2)
        .filter_map(|n| n.parse().ok())
        .collect();
    if version >= vec![6, 9] {
        assert!(rig.is_passthrough(), "{:?}", rig.mount.passthrough());
    }
    assert!(!Rig::with_passthrough(false).is_passthrough());
}

#[test]
fn a_file_may_be_open_in_every_way_at_once() {
    for rig in Rig::both("a_file_may_be_open_in_every_way_at_once") {
        let path = rig.path("a");
        fs::write(&path, b"0123456789").unwrap();
        let reader = File::open(&path).unwrap();
        let writer = OpenOptions::new().write(true).open(&path).unwrap();
        let both = open_rw(&path);
        let mut appender = OpenOptions::new().append(true).open(&path).unwrap();
        writer.write_all_at(b"W", 0).unwrap();
        both.write_all_at(b"B", 1).unwrap();
        appender.write_all(b"A").unwrap();
        let mut seen = [0; 11];
        for file in [&reader, &both] {
            file.read_exact_at(&mut seen, 0).unwrap();
            assert_eq!(&seen, b"WB23456789A");
        }
        drop((writer, both, appender));
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"WB23456789A");
        assert!(reader.write_at(b"x", 0).is_err());
        drop(reader);
        assert_eq!(fs::read(&path).unwrap(), b"WB23456789A");
    }
}

#[test]
fn many_threads_open_and_close_one_file() {
    for rig in Rig::both("many_threads_open_and_close_one_file") {
        let path = rig.path("a");
        fs::write(&path, pattern(8192, 3)).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let path = &path;
                scope.spawn(move || {
                    for round in 0..200u64 {
                        let file = match (thread + round) % 2 {
                            0 => File::open(path).unwrap(),
                            _ => open_rw(path),
                        };
                        let mut seen = [0; 16];
                        file.read_exact_at(&mut seen, 4096).unwrap();
                        assert_eq!(seen[..], pattern(8192, 3)[4096..4112]);
                    }
                });
            }
        });
    }
}

#[test]
fn appends_never_overwrite() {
    for rig in Rig::both("appends_never_overwrite") {
        let path = rig.path("log");
        fs::write(&path, b"first\n").unwrap();
        let mut appender = OpenOptions::new().append(true).open(&path).unwrap();
        // Behind the mount's back: what it believes to be the size is too small now.
        OpenOptions::new()
            .append(true)
            .open(rig.disk_path("log"))
            .unwrap()
            .write_all(b"second\n")
            .unwrap();
        appender.write_all(b"third\n").unwrap();
        assert_eq!(fs::read(rig.disk_path("log")).unwrap(), b"first\nsecond\nthird\n");
    }
}

#[test]
fn an_unlinked_file_lives_until_it_is_closed() {
    for rig in Rig::both("an_unlinked_file_lives_until_it_is_closed") {
        fs::write(rig.path("a"), b"before").unwrap();
        let file = open_rw(&rig.path("a"));
        fs::remove_file(rig.path("a")).unwrap();
        assert!(!rig.path("a").exists() && !rig.disk_path("a").exists());
        file.write_all_at(b"B", 0).unwrap();
        file.set_len(5).unwrap();
        let mut text = String::new();
        (&file).read_to_string(&mut text).unwrap();
        assert_eq!(text, "Befor");
        assert_eq!(file.metadata().unwrap().nlink(), 0);

        fs::write(rig.path("a"), b"another").unwrap();
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"another");
        assert_eq!(file.metadata().unwrap().len(), 5);
    }
}

#[test]
fn a_file_replaced_by_rename_is_another_file() {
    for rig in Rig::both("a_file_replaced_by_rename_is_another_file") {
        fs::write(rig.path("a"), b"old").unwrap();
        let old = File::open(rig.path("a")).unwrap();
        for round in 0..50 {
            let new = format!("new {round}");
            fs::write(rig.path("a.tmp"), &new).unwrap();
            fs::rename(rig.path("a.tmp"), rig.path("a")).unwrap();
            assert_eq!(fs::read_to_string(rig.path("a")).unwrap(), new);
            assert_eq!(fs::read_to_string(rig.disk_path("a")).unwrap(), new);
            assert!(!rig.path("a.tmp").exists());
        }
        let mut seen = [0; 3];
        old.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"old");
    }
}

#[test]
fn rename_honours_its_flags() {
    for rig in Rig::both("rename_honours_its_flags") {
        let rename = |from: &str, to: &str, flags| {
            let (from, to) = (rig.path(from), rig.path(to));
            rustix::fs::renameat_with(rustix::fs::CWD, &from, rustix::fs::CWD, &to, flags)
        };
        fs::create_dir(rig.path("dir")).unwrap();
        fs::write(rig.path("dir/inner"), b"inner").unwrap();
        fs::write(rig.path("a"), b"a").unwrap();
        assert_eq!(rename("a", "dir", RenameFlags::NOREPLACE), Err(Errno::EXIST));
        rename("a", "dir", RenameFlags::EXCHANGE).unwrap();
        assert_eq!(fs::read(rig.path("dir")).unwrap(), b"a");
        assert_eq!(fs::read(rig.path("a/inner")).unwrap(), b"inner");
        rename("a", "b", RenameFlags::NOREPLACE).unwrap();
        assert_eq!(fs::read(rig.path("b/inner")).unwrap(), b"inner");
        assert_eq!(fs::read(rig.disk_path("b/inner")).unwrap(), b"inner");
        fs::create_dir(rig.path("full")).unwrap();
        fs::write(rig.path("full/x"), b"").unwrap();
        assert_eq!(rename("b", "full", RenameFlags::empty()), Err(Errno::NOTEMPTY));
    }
}

#[test]
fn a_shared_mapping_writes_the_file() {
    use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
    const LEN: usize = 8192;
    for rig in Rig::both("a_shared_mapping_writes_the_file") {
        fs::write(rig.path("a"), pattern(LEN, 5)).unwrap();
        let file = open_rw(&rig.path("a"));
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let map = unsafe {
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            mmap(std::ptr::null_mut(), LEN, prot, MapFlags::SHARED, &file, 0).unwrap()
        };
        drop(file);
        // SAFETY: the mapping is LEN bytes long, lives until `munmap` below, and the file is
        // not made shorter.
        let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), LEN) };
        assert!(bytes[..] == pattern(LEN, 5)[..]);
        bytes[4096..4100].copy_from_slice(b"mmap");
        // SAFETY: exactly the mapping from above; `bytes` is not used afterwards.
        unsafe {
            msync(map, LEN, MsyncFlags::SYNC).unwrap();
            munmap(map, LEN).unwrap();
        }
        for path in [rig.disk_path("a"), rig.path("a")] {
            assert_eq!(&fs::read(path).unwrap()[4096..4100], b"mmap");
        }
    }
}

#[test]
fn a_mapping_shows_what_is_written_past_the_page_cache() {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    const LEN: usize = 8192;
    for rig in Rig::both("a_mapping_shows_what_is_written_past_the_page_cache") {
        let writer = OpenOptions::new().write(true).create_new(true).open(rig.path("a")).unwrap();
        writer.write_all_at(&pattern(LEN, 5), 0).unwrap();
        let file = File::open(rig.path("a")).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses aliases nothing.
        let map = unsafe {
            mmap(std::ptr::null_mut(), LEN, ProtFlags::READ, MapFlags::SHARED, &file, 0).unwrap()
        };
        // SAFETY: within the mapping, which lives until `munmap` below.
        let byte = |at: usize| unsafe { map.cast::<u8>().add(at).read_volatile() };
        assert_eq!(byte(5000), pattern(LEN, 5)[5000]);
        writer.write_all_at(&[pattern(LEN, 5)[5000] ^ 0xff], 5000).unwrap();
        assert_eq!(byte(5000), pattern(LEN, 5)[5000] ^ 0xff);
        assert_eq!(fs::read(rig.path("a")).unwrap()[5000], byte(5000));
        // SAFETY: exactly the mapping from above; it is not read afterwards.
        unsafe { munmap(map, LEN).unwrap() };
    }
}

#[test]
fn attributes_are_set_and_seen() {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
    for rig in Rig::both("attributes_are_set_and_seen") {
        let path = rig.path("a");
        fs::write(&path, b"0123456789").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(4).unwrap();
        for (secs, nanos) in [(1_000_000_000, 123_456_789), (-2, 800_000_000), (0, 0)] {
            let time = Timespec { tv_sec: secs, tv_nsec: nanos };
            let times = Timestamps { last_access: time, last_modification: time };
            utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            for path in [&path, &rig.disk_path("a")] {
                let m = fs::metadata(path).unwrap();
                assert_eq!((m.mtime(), m.mtime_nsec()), (secs, nanos));
                assert_eq!((m.atime(), m.atime_nsec()), (secs, nanos));
                assert_eq!((m.mode() & 0o7777, m.len()), (0o640, 4));
                assert_eq!((m.uid(), m.gid()), (12, 34));
            }
        }
    }
}

#[test]
fn links_and_special_files_are_made() {
    for rig in Rig::both("links_and_special_files_are_made") {
        fs::write(rig.path("a"), b"a").unwrap();
        fs::hard_link(rig.path("a"), rig.path("hard")).unwrap();
        let (a, hard) = (fs::metadata(rig.path("a")), fs::metadata(rig.path("hard")));
        assert_eq!(a.as_ref().unwrap().ino(), hard.unwrap().ino());
        assert_eq!(a.unwrap().nlink(), 2);
        fs::write(rig.path("hard"), b"changed").unwrap();
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"changed");

        symlink("a", rig.path("soft")).unwrap();
        assert_eq!(fs::read(rig.path("soft")).unwrap(), b"changed");
        assert_eq!(fs::read_link(rig.path("soft")).unwrap().to_str(), Some("a"));

        let fifo = rustix::fs::Mode::from_bits_retain(0o600);
        let fifo_type = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, rig.path("fifo"), fifo_type, fifo, 0).unwrap();
        assert_eq!(fs::metadata(rig.path("fifo")).unwrap().mode(), 0o10600);

        fs::create_dir(rig.path("dir")).unwrap();
        assert_eq!(fs::remove_dir(rig.path("a")).unwrap_err().raw_os_error(), Some(20));
        fs::remove_dir(rig.path("dir")).unwrap();
        assert!(!rig.disk_path("dir").exists());
    }
}

#[test]
fn holes_space_and_copies() {
    for rig in Rig::both("holes_space_and_copies") {
        let file = File::create_new(rig.path("sparse")).unwrap();
        file.write_all_at(&pattern(4096, 9), 1 << 20).unwrap();
        file.sync_all().unwrap();
        let file = open_rw(&rig.path("sparse"));
        assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(0)), Ok(1 << 20));
        assert_eq!(rustix::fs::seek(&file, SeekFrom::Hole(1 << 20)), Ok((1 << 20) + 4096));
        assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(2 << 20)), Err(Errno::NXIO));

        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 2 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 2 << 20);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, 1 << 20, 4096).unwrap();
        let mut seen = [1; 4096];
        file.read_exact_at(&mut seen, 1 << 20).unwrap();
        assert!(seen == [0; 4096]);

        fs::write(rig.path("from"), pattern(300_000, 2)).unwrap();
        fs::copy(rig.path("from"), rig.path("to")).unwrap();
        assert!(fs::read(rig.disk_path("to")).unwrap() == pattern(300_000, 2));
    }
}

#[test]
fn extended_attributes_pass_through() {
    for rig in Rig::both("extended_attributes_pass_through") {
        let path = rig.path("a");
        fs::write(&path, b"").unwrap();
        let set = |value: &[u8], flags| rustix::fs::setxattr(&path, "user.test", value, flags);
        if set(b"one", XattrFlags::empty()) == Err(Errno::OPNOTSUPP) {
            skipped("extended_attributes_pass_through", "a disk that has them");
            continue;
        }
        assert_eq!(set(b"two", XattrFlags::CREATE), Err(Errno::EXIST));
        set(b"three", XattrFlags::REPLACE).unwrap();
        let mut value = [0u8; 16];
        assert_eq!(rustix::fs::getxattr(&path, "user.test", &mut value), Ok(5));
        assert_eq!(&value[..5], b"three");
        assert_eq!(rustix::fs::getxattr(&path, "user.test", &mut [0u8; 2]), Err(Errno::RANGE));
        assert_eq!(rustix::fs::getxattr(&path, "user.none", &mut value), Err(Errno::NODATA));
        let mut names = [0u8; 256];
        let len = rustix::fs::listxattr(&path, &mut names).unwrap();
        assert!(names[..len].split(|&b| b == 0).any(|name| name == b"user.test"));
        rustix::fs::removexattr(&path, "user.test").unwrap();
        assert_eq!(rustix::fs::getxattr(&path, "user.test", &mut value), Err(Errno::NODATA));
    }
}

#[test]
fn statfs_is_the_disks() {
    for rig in Rig::both("statfs_is_the_disks") {
        let (ours, disks) = (
            rustix::fs::statvfs(rig.folder()).unwrap(),
            rustix::fs::statvfs(rig.disk.path()).unwrap(),
        );
        assert_eq!(ours.f_blocks * ours.f_frsize, disks.f_blocks * disks.f_frsize);
        assert_eq!(ours.f_namemax, 255);
    }
}

#[test]
fn a_directory_of_100_000_entries_is_listed_once_each() {
    const ENTRIES: usize = 100_000;
    // Listings are the same with and without passthrough.
    if can_mount("a_directory_of_100_000_entries_is_listed_once_each") {
        let rig = Rig::with_passthrough(true);
        fs::create_dir(rig.disk_path("big")).unwrap();
        for i in 0..ENTRIES {
            File::create(rig.disk_path(&format!("big/{i:06}"))).unwrap();
        }
        let list = || {
            let mut names = HashSet::new();
            for entry in fs::read_dir(rig.path("big")).unwrap() {
                assert!(names.insert(entry.unwrap().file_name()), "listed twice");
            }
            names.len()
        };
        eventually("all entries are listed", || list() == ENTRIES);
        assert_eq!(list(), ENTRIES);
        // With attributes, as `ls -l` asks for them.
        let mut sizes = 0;
        for entry in fs::read_dir(rig.path("big")).unwrap() {
            sizes += entry.unwrap().metadata().unwrap().len() + 1;
        }
        assert_eq!(sizes, ENTRIES as u64);
        // As much is asked for at once, and comes with its attributes: with 32 KiB, a walk through
        // directories of a thousand files takes some times as long.
        assert_eq!(fs::metadata(rig.path("big")).unwrap().blksize(), 256 << 10);
        assert_eq!(fs::metadata(rig.path("big/000000")).unwrap().blksize(), 4096);
    }
}

#[test]
fn names_are_bytes() {
    use std::os::unix::ffi::OsStrExt;
    for rig in Rig::both("names_are_bytes") {
        let longest = [b'n'; 255];
        let too_long = [b'n'; 256];
        for name in [&b"new\nline"[..], b"back\\slash", b"\xff\xfe", b" ", &longest] {
            let name = std::ffi::OsStr::from_bytes(name);
            fs::write(rig.folder().join(name), b"x").unwrap();
            assert!(fs::read_dir(rig.folder()).unwrap().any(|e| e.unwrap().file_name() == name));
            assert_eq!(fs::read(rig.disk.path().join(name)).unwrap(), b"x");
        }
        let error = fs::read(rig.folder().join(std::ffi::OsStr::from_bytes(&too_long)));
        assert_eq!(error.unwrap_err().raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
    }
}

#[test]
fn what_changes_behind_the_mount_is_seen_in_it() {
    for rig in Rig::both("what_changes_behind_the_mount_is_seen_in_it") {
        fs::write(rig.path("a"), b"one").unwrap();
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"one");
        fs::write(rig.disk_path("a"), b"longer than one").unwrap();
        eventually("the new size", || fs::metadata(rig.path("a")).unwrap().len() == 15);
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"longer than one");

        assert!(!rig.path("b").exists());
        fs::write(rig.disk_path("b"), b"").unwrap();
        eventually("a new name", || rig.path("b").exists());
        fs::rename(rig.disk_path("b"), rig.disk_path("c")).unwrap();
        eventually("a renamed file", || rig.path("c").exists() && !rig.path("b").exists());
        fs::remove_file(rig.disk_path("c")).unwrap();
        eventually("a removed file", || !rig.path("c").exists());
        eventually("the listing", || fs::read_dir(rig.folder()).unwrap().count() == 1);
    }
}

#[test]
fn set_id_bits_go_when_another_user_writes() {
    let test = "set_id_bits_go_when_another_user_writes";
    if !can_mount(test) || !crate::common::has_program(test, "setpriv") {
        return;
    }
    for passthrough in [true, false] {
        let options = MountOptions { allow_other: true, passthrough, ..MountOptions::default() };
        let rig = Rig::with_options(options);
        for write in ["printf x >> a", ": > a", "truncate -s 1 a"] {
            fs::write(rig.path("a"), b"content").unwrap();
            fs::set_permissions(rig.path("a"), fs::Permissions::from_mode(0o6777)).unwrap();
            let done = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", write])
                .current_dir(rig.folder())
                .status()
                .unwrap();
            assert!(done.success(), "{write}");
            let mode = fs::metadata(rig.disk_path("a")).unwrap().mode() & 0o7777;
            assert_eq!(mode, 0o777, "{write}, passthrough {passthrough}");
        }
    }
}
