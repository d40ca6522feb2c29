use super::*;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn an_entry_is_as_the_disk_has_it() {
    let bench = Bench::new();
    let path = bench.put("file", b"12345");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
    let disk = fs::metadata(&path).unwrap();
    let Found { attr, atime, valid_for, .. } = bench.in_mine("file").unwrap();
    assert_eq!((attr.file_type, attr.perm, attr.size), (FileType::File, 0o4751, 5));
    assert_eq!((attr.uid, attr.gid, attr.nlink), (disk.uid(), disk.gid(), 1));
    assert_eq!((attr.mtime.secs, attr.mtime.nanos), (disk.mtime(), disk.mtime_nsec() as u32));
    assert_eq!((atime.secs, atime.nanos), (disk.atime(), disk.atime_nsec() as u32));
    assert!(valid_for <= Duration::from_secs(1));
    assert!(bench.drive.negative_valid_for(bench.mine()) <= Duration::from_secs(1));
}

#[test]
fn what_the_owners_programs_do_is_seen_at_once() {
    let bench = Bench::new();
    assert_eq!(kind(bench.in_mine("file")), Kind::NotFound);
    bench.put("file", b"one");
    let ino = bench.in_mine("file").unwrap().ino;
    assert_eq!(bench.read_all(ino).unwrap(), b"one");
    bench.put("file", b"three");
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 5);
    fs::remove_file(bench.disk.join("file")).unwrap();
    assert_eq!(kind(bench.in_mine("file")), Kind::NotFound);
    assert_eq!(kind(bench.drive.getattr(ino, None)), Kind::Stale);
}

#[test]
fn a_file_replaced_by_another_is_stale() {
    let bench = Bench::new();
    bench.put("file", b"old");
    let old = bench.in_mine("file").unwrap().ino;
    bench.put("other", b"new!");
    fs::rename(bench.disk.join("other"), bench.disk.join("file")).unwrap();
    assert_eq!(kind(bench.drive.getattr(old, None)), Kind::Stale);
    assert_eq!(kind(bench.drive.open(old, OpenFlags::READ)), Kind::Stale);
    let new = bench.in_mine("file").unwrap().ino;
    assert_ne!(old, new);
    assert_eq!(bench.read_all(new).unwrap(), b"new!");
}

#[test]
fn a_file_is_created_written_and_read() {
    let bench = Bench::new();
    let (found, opened) = bench.create("new", READ_WRITE).unwrap();
    assert_eq!((found.attr.perm, found.attr.size), (0o644, 0));
    assert!(matches!(opened.io, Io::Backing(_)));
    assert_eq!(bench.drive.write(opened.handle, 0, b"hello world").unwrap(), 11);
    assert_eq!(bench.drive.write(opened.handle, 6, b"there").unwrap(), 5);
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"hello there");
    assert_eq!(bench.read(opened.handle, 6, 2).unwrap(), b"th");
    assert_eq!(bench.read(opened.handle, 100, 2).unwrap(), b"");
    bench.drive.fsync(opened.handle, true).unwrap();
    bench.drive.fsync(opened.handle, false).unwrap();
    bench.drive.flush(opened.handle).unwrap();
    bench.drive.release(opened.handle);
    assert_eq!(kind(bench.drive.write(opened.handle, 0, b"x")), Kind::BadHandle);
    assert_eq!(fs::read(bench.disk.join("new")).unwrap(), b"hello there");
    assert_eq!(bench.in_mine("new").unwrap().ino, found.ino);
}

#[test]
fn create_opens_what_is_there_unless_exclusive() {
    let bench = Bench::new();
    bench.put("file", b"bytes");
    fs::create_dir(bench.disk.join("dir")).unwrap();
    symlink("file", bench.disk.join("link")).unwrap();
    let exclusive = OpenFlags { exclusive: true, ..READ_WRITE };
    assert_eq!(kind(bench.create("file", exclusive)), Kind::Exists);
    let (found, opened) = bench.create("file", READ_WRITE).unwrap();
    assert_eq!((found.attr.size, bench.read(opened.handle, 0, 9).unwrap()), (5, b"bytes".to_vec()));
    let truncate = OpenFlags { truncate: true, ..READ_WRITE };
    assert_eq!(bench.create("file", truncate).unwrap().0.attr.size, 0);
    assert_eq!(kind(bench.create("dir", READ_WRITE)), Kind::IsADirectory);
    assert_eq!(kind(bench.create("link", READ_WRITE)), Kind::Stale);
    assert_eq!(kind(bench.create("a/b", READ_WRITE)), Kind::Invalid);
    assert_eq!(kind(bench.create("..", READ_WRITE)), Kind::Invalid);
    assert_eq!(kind(bench.create(&"n".repeat(256), READ_WRITE)), Kind::NameTooLong);
}

#[test]
fn a_file_opens_with_the_access_asked_for() {
    let bench = Bench::new();
    bench.put("file", b"bytes");
    let ino = bench.in_mine("file").unwrap().ino;
    let read = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(kind(bench.drive.write(read.handle, 0, b"x")), Kind::BadHandle);
    let write = bench.drive.open(ino, WRITE).unwrap();
    assert_eq!(kind(bench.read(write.handle, 0, 1)), Kind::BadHandle);
    let truncate = OpenFlags { truncate: true, ..WRITE };
    bench.drive.open(ino, truncate).unwrap();
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 0);
}

#[test]
fn the_modes_of_a_write_are_each_handles_own() {
    let bench = Bench::new();
    bench.put("file", b"12345");
    let ino = bench.in_mine("file").unwrap().ino;
    let append = OpenFlags { append: true, sync: true, ..READ_WRITE };
    let end = bench.drive.open(ino, append).unwrap();
    let anywhere = bench.drive.open(ino, OpenFlags { data_sync: true, ..WRITE }).unwrap();
    bench.drive.write(end.handle, 0, b"67").unwrap();
    bench.drive.write(anywhere.handle, 0, b"A").unwrap();
    bench.drive.write(end.handle, 1, b"8").unwrap();
    assert_eq!(fs::read(bench.disk.join("file")).unwrap(), b"A2345678");
    let Io::Backing(file) = end.io else { panic!("an own file is on this disk") };
    let flags = rustix::fs::fcntl_getfl(&file).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::APPEND), "a kernel shares this file");
}

#[test]
fn only_regular_files_are_opened() {
    let bench = Bench::new();
    let (drive, mine) = (&bench.drive, bench.mine());
    let fifo = drive.mknod(&caller(), mine, b"fifo", FileType::Fifo, 0o600, 0).unwrap().ino;
    let dir = drive.mkdir(&caller(), mine, b"dir", 0o700).unwrap().ino;
    let link = drive.symlink(&caller(), mine, b"link", b"fifo").unwrap().ino;
    assert_eq!(kind(drive.open(fifo, READ_WRITE)), Kind::NotPermitted);
    assert_eq!(kind(drive.open(dir, OpenFlags::READ)), Kind::IsADirectory);
    assert_eq!(kind(drive.open(link, OpenFlags::READ)), Kind::Loop);
    assert_eq!(kind(drive.opendir(fifo)), Kind::NotADirectory);
    assert_eq!(kind(drive.lookup(fifo, b"x")), Kind::NotADirectory);
    assert_eq!(kind(drive.readlink(fifo)), Kind::Invalid);
    assert_eq!(drive.readlink(link).unwrap(), b"fifo");
}

#[test]
fn every_kind_of_entry_is_made() {
    let bench = Bench::new();
    let (drive, mine, me) = (&bench.drive, bench.mine(), &caller());
    let made = [
        drive.mkdir(me, mine, b"dir", 0o750),
        drive.mknod(me, mine, b"file", FileType::File, 0o640, 0),
        drive.mknod(me, mine, b"fifo", FileType::Fifo, 0o600, 0),
        drive.mknod(me, mine, b"socket", FileType::Socket, 0o777, 0),
    ];
    let seen: Vec<_> =
        made.into_iter().map(|f| f.map(|f| (f.attr.file_type, f.attr.perm)).unwrap()).collect();
    let expected = [
        (FileType::Directory, 0o750),
        (FileType::File, 0o640),
        (FileType::Fifo, 0o600),
        (FileType::Socket, 0o777),
    ];
    assert_eq!(seen, expected, "modes are the caller's, whatever this process's umask");
    let target = b"../any where\xff";
    let link = drive.symlink(me, mine, b"link", target).unwrap();
    assert_eq!(drive.readlink(link.ino).unwrap(), target);
    assert_eq!(link.attr.size, target.len() as u64);
    assert!(fs::metadata(bench.disk.join("fifo")).unwrap().file_type().is_fifo());
    for again in [
        kind(drive.mkdir(me, mine, b"file", 0o755)),
        kind(drive.mknod(me, mine, b"dir", FileType::File, 0o644, 0)),
        kind(drive.symlink(me, mine, b"link", b"x")),
        kind(drive.link(link.ino, mine, b"fifo")),
    ] {
        assert_eq!(again, Kind::Exists);
    }
    assert_eq!(kind(drive.mknod(me, mine, b"x", FileType::Directory, 0, 0)), Kind::Invalid);
}

#[test]
fn a_daemon_of_root_gives_entries_to_their_maker() {
    if !is_root() {
        return;
    }
    let bench = Bench::new();
    let (drive, mine) = (&bench.drive, bench.mine());
    let other = &Caller { uid: 1234, gid: 5678, pid: 1 };
    let dir = drive.mkdir(other, mine, b"dir", 0o755).unwrap();
    let (file, _) = drive.create(other, dir.ino, b"file", 0o4755, READ_WRITE).unwrap();
    let link = drive.symlink(other, dir.ino, b"link", b"x").unwrap();
    for _found in [dir, file, link] {
        let Found { attr, .. } = drive.getattr(_found.ino, None).unwrap();
        assert_eq!((attr.uid, attr.gid), (1234, 5678));
    }
    assert_eq!(drive.getattr(file.ino, None).unwrap().attr.perm, 0o4755);
    let set = SetAttr { gid: Some(42), perm: Some(0o2775), ..SetAttr::default() };
    drive.setattr(other, dir.ino, None, set).unwrap();
    let Found { attr, .. } = drive.mkdir(other, dir.ino, b"inherits", 0o755).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.perm), (1234, 42, 0o2755));
}

#[test]
fn hard_links_are_one_inode_under_each_name() {
    let bench = Bench::new();
    bench.put("a", b"bytes");
    let (drive, mine) = (&bench.drive, bench.mine());
    let a = bench.in_mine("a").unwrap().ino;
    let b = drive.link(a, mine, b"b").unwrap();
    assert_eq!((b.ino, b.attr.nlink), (a, 2));
    drive.unlink(mine, b"b").unwrap();
    assert_eq!(drive.getattr(a, None).unwrap().attr.nlink, 1, "it is still there as a");
    drive.link(a, mine, b"c").unwrap();
    drive.unlink(mine, b"a").unwrap();
    assert_eq!(bench.read_all(a).unwrap(), b"bytes");
    let dir = drive.mkdir(&caller(), mine, b"dir", 0o755).unwrap().ino;
    assert_eq!(kind(drive.link(dir, mine, b"d")), Kind::NotPermitted);
    let link = drive.symlink(&caller(), mine, b"link", b"nowhere").unwrap().ino;
    assert_eq!(drive.link(link, dir, b"link").unwrap().attr.file_type, FileType::Symlink);
}

#[test]
fn an_open_file_outlives_its_name() {
    let bench = Bench::new();
    let (found, opened) = bench.create("file", READ_WRITE).unwrap();
    bench.drive.unlink(bench.mine(), b"file").unwrap();
    assert_eq!(kind(bench.in_mine("file")), Kind::NotFound);
    bench.drive.write(opened.handle, 0, b"still here").unwrap();
    for handle in [None, Some(opened.handle)] {
        let Found { attr, .. } = bench.drive.getattr(found.ino, handle).unwrap();
        assert_eq!((attr.size, attr.nlink), (10, 0));
    }
    let set = SetAttr { size: Some(5), perm: Some(0o600), ..SetAttr::default() };
    let set = bench.drive.setattr(&caller(), found.ino, None, set).unwrap();
    assert_eq!((set.attr.size, set.attr.perm), (5, 0o600));
    let (successor, _) = bench.create("file", WRITE).unwrap();
    assert_ne!(successor.ino, found.ino, "another file, whatever its number on the disk");
    assert_eq!(bench.read(opened.handle, 0, 10).unwrap(), b"still");
    let Io::Backing(file) = opened.io else { panic!("an own file is on this disk") };
    drop(file);
    bench.drive.release(opened.handle);
    assert_eq!(kind(bench.drive.getattr(found.ino, None)), Kind::Stale);
}

#[test]
fn names_are_removed() {
    let bench = Bench::new();
    let (drive, mine) = (&bench.drive, bench.mine());
    let dir = drive.mkdir(&caller(), mine, b"dir", 0o755).unwrap().ino;
    drive.create(&caller(), dir, b"file", 0o644, WRITE).unwrap();
    assert_eq!(kind(drive.rmdir(mine, b"dir")), Kind::NotEmpty);
    assert_eq!(kind(drive.unlink(mine, b"dir")), Kind::IsADirectory);
    assert_eq!(kind(drive.rmdir(dir, b"file")), Kind::NotADirectory);
    assert_eq!(kind(drive.unlink(mine, b"nothing")), Kind::NotFound);
    drive.unlink(dir, b"file").unwrap();
    drive.rmdir(mine, b"dir").unwrap();
    assert_eq!(kind(drive.mkdir(&caller(), dir, b"x", 0o755)), Kind::Stale);
    assert_eq!(fs::read_dir(&bench.disk).unwrap().count(), 0);
}

#[test]
fn rename_is_that_of_the_disk() {
    let bench = Bench::new();
    let (drive, mine) = (&bench.drive, bench.mine());
    let flags = RenameFlags::default();
    let dir = drive.mkdir(&caller(), mine, b"dir", 0o755).unwrap().ino;
    let inner = drive.mkdir(&caller(), dir, b"inner", 0o755).unwrap().ino;
    bench.put("a", b"a");
    bench.put("b", b"bb");
    let (a, b) = (bench.in_mine("a").unwrap().ino, bench.in_mine("b").unwrap().ino);

    drive.rename(mine, b"a", inner, b"c", flags).unwrap();
    assert_eq!(drive.lookup(inner, b"c").unwrap().ino, a, "the inode stays");
    drive.rename(dir, b"inner", mine, b"outer", flags).unwrap();
    assert_eq!(drive.getattr(a, None).unwrap().attr.size, 1, "also below a moved directory");
    assert_eq!(bench.read_all(a).unwrap(), b"a");

    let no_replace = RenameFlags { no_replace: true, ..flags };
    assert_eq!(kind(drive.rename(mine, b"b", inner, b"c", no_replace)), Kind::Exists);
    let exchange = RenameFlags { exchange: true, ..flags };
    drive.rename(mine, b"b", inner, b"c", exchange).unwrap();
    assert_eq!(drive.getattr(a, None).unwrap().attr.size, 1);
    assert_eq!(drive.getattr(b, None).unwrap().attr.size, 2);
    assert_eq!(drive.lookup(inner, b"c").unwrap().ino, b);
    assert_eq!(kind(drive.rename(mine, b"b", mine, b"none", exchange)), Kind::NotFound);

    drive.rename(mine, b"b", inner, b"c", flags).unwrap();
    assert_eq!(kind(drive.getattr(b, None)), Kind::Stale, "it was replaced");
    assert_eq!(drive.lookup(inner, b"c").unwrap().ino, a);

    assert_eq!(kind(drive.rename(mine, b"none", mine, b"x", flags)), Kind::NotFound);
    assert_eq!(kind(drive.rename(mine, b"outer", inner, b"x", flags)), Kind::Invalid);
    assert_eq!(kind(drive.rename(inner, b"c", mine, b"dir", flags)), Kind::IsADirectory);
    assert_eq!(kind(drive.rename(mine, b"dir", inner, b"c", flags)), Kind::NotADirectory);
    assert_eq!(kind(drive.rename(mine, b"dir", mine, b"outer", flags)), Kind::NotEmpty);
}

#[test]
fn renaming_one_name_of_a_file_to_another_changes_nothing() {
    let bench = Bench::new();
    bench.put("a", b"bytes");
    let (drive, mine) = (&bench.drive, bench.mine());
    let a = bench.in_mine("a").unwrap().ino;
    drive.link(a, mine, b"b").unwrap();
    drive.rename(mine, b"a", mine, b"b", RenameFlags::default()).unwrap();
    assert_eq!(bench.names(mine), [".", "..", "a", "b"]);
    drive.unlink(mine, b"b").unwrap();
    assert_eq!(drive.getattr(a, None).unwrap().attr.nlink, 1);
}

#[test]
fn nothing_moves_between_locations() {
    let bench = Bench::new();
    bench.replicate(vec![(1, "file", remote_entry(2, FileType::File, 1))]);
    bench.put("a", b"");
    let (mine, theirs, flags) = (bench.mine(), bench.theirs(), RenameFlags::default());
    let drive = &bench.drive;
    assert_eq!(kind(drive.rename(mine, b"a", theirs, b"a", flags)), Kind::CrossDevice);
    assert_eq!(kind(drive.rename(theirs, b"file", mine, b"f", flags)), Kind::CrossDevice);
    let file = bench.ino(&["there", "theirs", "file"]);
    assert_eq!(kind(drive.link(file, mine, b"f")), Kind::CrossDevice);
}

#[test]
fn attributes_are_set() {
    let bench = Bench::new();
    let path = bench.put("file", b"0123456789");
    let (drive, me) = (&bench.drive, &caller());
    let ino = bench.in_mine("file").unwrap().ino;
    let set = |set: SetAttr| drive.setattr(me, ino, None, set);
    let nothing = SetAttr::default();

    assert_eq!(set(SetAttr { perm: Some(0o6711), ..nothing }).unwrap().attr.perm, 0o6711);
    assert_eq!(set(SetAttr { size: Some(4), ..nothing }).unwrap().attr.size, 4);
    assert_eq!(set(SetAttr { size: Some(8), ..nothing }).unwrap().attr.size, 8);
    assert_eq!(fs::read(&path).unwrap(), b"0123\0\0\0\0");
    assert_eq!(kind(set(SetAttr { size: Some(u64::MAX), ..nothing })), Kind::Invalid);

    let before_1970 = Time { secs: -5, nanos: 7 };
    let times = SetAttr {
        atime: Some(TimeOrNow::At(MTIME)),
        mtime: Some(TimeOrNow::At(before_1970)),
        ..nothing
    };
    let found = set(times).unwrap();
    assert_eq!((found.atime, found.attr.mtime), (MTIME, before_1970));
    let now = set(SetAttr { mtime: Some(TimeOrNow::Now), ..nothing }).unwrap();
    assert_eq!(now.atime, MTIME, "what is not set stays");
    assert!(now.attr.mtime > MTIME);

    let opened = drive.open(ino, WRITE).unwrap();
    let size = SetAttr { size: Some(1), ..nothing };
    let by_handle = drive.setattr(me, ino, Some(opened.handle), size).unwrap();
    assert_eq!(by_handle.attr.size, 1);
    let reader = drive.open(ino, OpenFlags::READ).unwrap();
    let size = SetAttr { size: Some(2), ..nothing };
    assert_eq!(drive.setattr(me, ino, Some(reader.handle), size).unwrap().attr.size, 2);
}

#[test]
fn the_times_of_a_link_are_its_own_and_it_has_no_mode() {
    let bench = Bench::new();
    let target = bench.put("target", b"");
    let before = fs::metadata(&target).unwrap().mtime();
    let link = bench.drive.symlink(&caller(), bench.mine(), b"link", b"target").unwrap().ino;
    let set = SetAttr { mtime: Some(TimeOrNow::At(MTIME)), ..SetAttr::default() };
    let found = bench.drive.setattr(&caller(), link, None, set).unwrap();
    assert_eq!(found.attr.mtime, MTIME);
    assert_eq!(fs::metadata(&target).unwrap().mtime(), before);
    let set = SetAttr { perm: Some(0o600), ..SetAttr::default() };
    assert_eq!(kind(bench.drive.setattr(&caller(), link, None, set)), Kind::NotSupported);
}

#[test]
fn owners_are_changed_as_far_as_the_disk_allows() {
    let bench = Bench::new();
    bench.put("file", b"");
    let ino = bench.in_mine("file").unwrap().ino;
    let set = SetAttr { uid: Some(1234), gid: Some(u32::MAX), ..SetAttr::default() };
    let changed = bench.drive.setattr(&caller(), ino, None, set);
    match is_root() {
        true => assert_eq!(changed.unwrap().attr.uid, 1234),
        false => assert_eq!(kind(changed), Kind::NotPermitted),
    }
}

#[test]
fn a_truncation_never_waits_for_a_fifo() {
    let bench = Bench::new();
    let (drive, mine) = (&bench.drive, bench.mine());
    let fifo = drive.mknod(&caller(), mine, b"fifo", FileType::Fifo, 0o600, 0).unwrap().ino;
    let set = SetAttr { size: Some(0), ..SetAttr::default() };
    assert_eq!(kind(drive.setattr(&caller(), fifo, None, set)), Kind::Invalid);
    assert_eq!(kind(drive.setattr(&caller(), mine, None, set)), Kind::IsADirectory);
}

#[test]
fn extended_attributes_are_the_disks() {
    let bench = Bench::new();
    bench.put("file", b"");
    let drive = &bench.drive;
    let ino = bench.in_mine("file").unwrap().ino;
    let (name, large) = (b"user.name", vec![b'x'; 3000]);
    assert_eq!(kind(drive.getxattr(ino, name)), Kind::NoAttribute);
    assert_eq!(kind(drive.setxattr(ino, name, b"1", XattrMode::Replace)), Kind::NoAttribute);
    drive.setxattr(ino, name, b"1", XattrMode::Create).unwrap();
    assert_eq!(kind(drive.setxattr(ino, name, b"2", XattrMode::Create)), Kind::Exists);
    drive.setxattr(ino, name, b"", XattrMode::Replace).unwrap();
    assert_eq!(drive.getxattr(ino, name).unwrap(), b"");
    drive.setxattr(ino, b"user.large", &large, XattrMode::Any).unwrap();
    assert_eq!(drive.getxattr(ino, b"user.large").unwrap(), large);
    let list = drive.listxattr(ino).unwrap();
    assert!(list.split(|b| *b == 0).any(|n| n == name));
    drive.removexattr(ino, name).unwrap();
    assert_eq!(kind(drive.removexattr(ino, name)), Kind::NoAttribute);
    assert!(drive.listxattr(bench.mine()).is_ok());
}

#[test]
fn a_links_attributes_are_not_its_targets() {
    let bench = Bench::new();
    bench.put("target", b"");
    let target = bench.in_mine("target").unwrap().ino;
    bench.drive.setxattr(target, b"user.name", b"1", XattrMode::Any).unwrap();
    let link = bench.drive.symlink(&caller(), bench.mine(), b"link", b"target").unwrap().ino;
    assert!(bench.drive.getxattr(link, b"user.name").is_err());
    assert!(bench.drive.setxattr(link, b"user.other", b"1", XattrMode::Any).is_err());
    assert_eq!(kind(bench.drive.getxattr(target, b"user.other")), Kind::NoAttribute);
}

#[test]
fn space_holes_and_copies_are_the_disks() {
    let bench = Bench::new();
    let drive = &bench.drive;
    let (found, opened) = bench.create("file", READ_WRITE).unwrap();
    let size = || drive.getattr(found.ino, None).unwrap().attr.size;
    let allocate = |keep_size| FallocateMode::Allocate { keep_size };
    drive.fallocate(opened.handle, 0, 4096, allocate(true)).unwrap();
    assert_eq!(size(), 0);
    drive.fallocate(opened.handle, 0, 4096, allocate(false)).unwrap();
    assert_eq!(size(), 4096);
    assert_eq!(kind(drive.fallocate(opened.handle, 0, 0, allocate(false))), Kind::Invalid);

    drive.write(opened.handle, 1 << 20, &[7; 4096]).unwrap();
    assert_eq!(drive.seek(opened.handle, 1 << 20, Whence::Hole).unwrap(), (1 << 20) + 4096);
    assert!(drive.seek(opened.handle, 1 << 19, Whence::Data).unwrap() <= 1 << 20);
    assert_eq!(kind(drive.seek(opened.handle, 1 << 30, Whence::Data)), Kind::NoSuchAddress);
    drive.fallocate(opened.handle, 1 << 20, 4096, FallocateMode::PunchHole).unwrap();
    assert_eq!(bench.read(opened.handle, 1 << 20, 4096).unwrap(), [0; 4096]);

    drive.write(opened.handle, 0, b"copy me").unwrap();
    let (_, copy) = bench.create("copy", READ_WRITE).unwrap();
    assert_eq!(drive.copy_range(opened.handle, 0, copy.handle, 2, 7).unwrap(), 7);
    assert_eq!(bench.read(copy.handle, 0, 99).unwrap(), b"\0\0copy me");

    bench.replicate(vec![(1, "theirs", bench.peer_file(2, b"bytes"))]);
    let theirs = bench.ino(&["there", "theirs", "theirs"]);
    let theirs = drive.open(theirs, OpenFlags::READ).unwrap();
    let copied = drive.copy_range(theirs.handle, 0, copy.handle, 0, 5);
    assert_eq!(kind(copied), Kind::CrossDevice, "the kernel reads and writes instead");
    let statfs = drive.statfs(bench.mine()).unwrap();
    assert!(statfs.blocks >= statfs.blocks_free && statfs.blocks > 0);
}

#[test]
fn a_read_only_location_or_drive_is_not_changed() {
    let bench = Bench::new();
    bench.put("file", b"bytes");
    let location = bench.index.location(bench.own).unwrap();
    let make_read_only = || {
        let location = NewLocation {
            id: location.id,
            owner: ME,
            name: location.name.clone(),
            root: location.root.clone(),
            read_only: true,
            shared_with: None,
        };
        bench.index.put_location(location).unwrap();
    };
    make_read_only();
    refuses_changes(&bench);
    let bench = Bench::with(DriveConfig { read_only: true, ..config() });
    bench.put("file", b"bytes");
    refuses_changes(&bench);
}

fn refuses_changes(bench: &Bench) {
    let (drive, mine, me) = (&bench.drive, bench.mine(), &caller());
    let file = bench.in_mine("file").unwrap().ino;
    let refused = [
        kind(drive.open(file, WRITE)),
        kind(drive.create(me, mine, b"file", 0o644, WRITE)),
        kind(drive.mkdir(me, mine, b"new", 0o755)),
        kind(drive.mknod(me, mine, b"new", FileType::Fifo, 0o644, 0)),
        kind(drive.symlink(me, mine, b"new", b"target")),
        kind(drive.link(file, mine, b"new")),
        kind(drive.unlink(mine, b"file")),
        kind(drive.rmdir(mine, b"file")),
        kind(drive.rename(mine, b"file", mine, b"new", RenameFlags::default())),
        kind(drive.setattr(me, file, None, SetAttr { perm: Some(0), ..SetAttr::default() })),
        kind(drive.setxattr(file, b"user.x", b"1", XattrMode::Any)),
        kind(drive.removexattr(file, b"user.x")),
    ];
    assert_eq!(refused, [Kind::ReadOnly; 12]);
    assert_eq!(bench.read_all(file).unwrap(), b"bytes");
}

#[test]
fn a_listing_is_complete_in_pieces_of_any_size() {
    let bench = Bench::new();
    let mut expected: Vec<_> = (0..500).map(|n| format!("{n:04}")).collect();
    for name in &expected {
        bench.put(name, b"");
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    expected.sort();
    for detail in [Detail::Names, Detail::Attributes] {
        for step in [1, 33, 1000] {
            let mut listed = bench.list(bench.mine(), detail, step);
            listed.sort();
            let names: Vec<_> = listed.iter().map(|(name, _)| name).collect();
            assert_eq!(names, expected.iter().collect::<Vec<_>>());
            for (name, ino) in listed.iter().skip(2).step_by(50) {
                assert_eq!(bench.in_mine(name).unwrap().ino, *ino, "d_ino is st_ino");
            }
        }
    }
}

#[test]
fn a_rewound_listing_is_fresh_and_an_unfinished_one_goes_on() {
    let bench = Bench::new();
    bench.put("a", b"");
    bench.put("b", b"");
    let handle = bench.drive.opendir(bench.mine()).unwrap();
    let first = bench.list_from(handle, 0, Detail::Attributes, 10);
    fs::remove_file(bench.disk.join("a")).unwrap();
    bench.put("c", b"");
    let rest = bench.list_from(handle, 2, Detail::Names, 10);
    assert_eq!(rest, first[2..], "names of the snapshot");
    let mut again: Vec<_> =
        bench.list_from(handle, 0, Detail::Attributes, 10).into_iter().map(|(n, _)| n).collect();
    again.sort();
    assert_eq!(again, [".", "..", "b", "c"]);
    bench.drive.fsyncdir(handle, false).unwrap();
    bench.drive.fsyncdir(handle, true).unwrap();
}

#[test]
fn lookups_are_counted_and_forgotten() {
    let bench = Bench::new();
    for name in ["a", "b", "c"] {
        bench.put(name, b"");
    }
    let mine = bench.mine();
    bench.list(mine, Detail::Names, 10);
    assert!(bench.drive.own.table.is_empty(), "plain names count nothing");
    let listed = bench.list(mine, Detail::Attributes, 2);
    assert_eq!(bench.drive.own.table.len(), 3);
    let a = bench.in_mine("a").unwrap().ino;
    let (_, opened) = bench.create("a", WRITE).unwrap();
    for (_, ino) in &listed[2..] {
        // Twice: the items that did not fit into a call were shown, and not counted, before.
        bench.drive.forget(*ino, 1);
    }
    assert_eq!(bench.drive.own.table.len(), 1);
    bench.drive.forget(a, 2);
    assert!(bench.drive.own.table.is_empty());
    assert_eq!(kind(bench.drive.getattr(a, None)), Kind::Stale);
    assert_eq!(bench.drive.write(opened.handle, 0, b"x").unwrap(), 1, "a handle is its own");
    bench.drive.forget(InodeNo::ROOT, 1);
    bench.drive.forget(bench.theirs(), 1);
}

#[test]
fn nothing_leads_outside() {
    let bench = Bench::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    fs::create_dir(bench.disk.join("dir")).unwrap();
    let dir = bench.in_mine("dir").unwrap().ino;
    fs::remove_dir(bench.disk.join("dir")).unwrap();
    symlink(outside.path(), bench.disk.join("dir")).unwrap();
    assert_eq!(kind(bench.drive.lookup(dir, b"secret")), Kind::Stale);
    assert_eq!(kind(bench.drive.create(&caller(), dir, b"new", 0o644, WRITE)), Kind::Stale);
    let link = bench.in_mine("dir").unwrap();
    assert_eq!(link.attr.file_type, FileType::Symlink);
    assert_eq!(kind(bench.drive.lookup(link.ino, b"secret")), Kind::NotADirectory);
}

#[test]
fn names_are_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let bench = Bench::new();
    let names: [&[u8]; 4] = [b"\xff\xfe", b"new\nline", b"back\\slash", &[b'n'; 255]];
    for name in names {
        let path = bench.disk.join(std::ffi::OsStr::from_bytes(name));
        fs::write(path, name).unwrap();
        let found = bench.drive.lookup(bench.mine(), name).unwrap();
        assert_eq!(bench.read_all(found.ino).unwrap(), name);
    }
    assert_eq!(bench.list(bench.mine(), Detail::Attributes, 10).len(), 2 + names.len());
}

#[test]
fn a_very_deep_path_works() {
    let bench = Bench::new();
    let mut dir = bench.mine();
    for _ in 0..60 {
        dir = bench.drive.mkdir(&caller(), dir, "d".repeat(200).as_bytes(), 0o755).unwrap().ino;
    }
    let (file, opened) = bench.drive.create(&caller(), dir, b"file", 0o644, WRITE).unwrap();
    bench.drive.write(opened.handle, 0, b"deep").unwrap();
    assert_eq!(bench.read_all(file.ino).unwrap(), b"deep");
}

#[test]
fn what_owners_change_is_told_to_the_kernel() {
    let bench = Bench::new();
    let mut changes = bench.drive.subscribe();
    bench.put("file", b"1");
    let mine = bench.mine();
    let file = bench.in_mine("file").unwrap().ino;
    let mut until = |wanted: &Invalidation| bench.told_until(&mut changes, wanted);
    bench.put("file", b"longer");
    until(&Invalidation::Content(file));
    bench.put("other", b"");
    let entry = |name: &[u8]| Invalidation::Entry { parent: mine, name: Name::new(name).unwrap() };
    until(&entry(b"other"));
    fs::remove_file(bench.disk.join("file")).unwrap();
    until(&entry(b"file"));
    fs::create_dir(bench.disk.join("dir")).unwrap();
    until(&Invalidation::Directory(mine));
}

#[test]
fn many_threads_may_call_at_once() {
    let bench = Bench::new();
    let mine = bench.mine();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let bench = &bench;
            scope.spawn(move || {
                for round in 0..50 {
                    let name = format!("{thread}-{round}");
                    let (found, opened) = bench.create(&name, READ_WRITE).unwrap();
                    bench.drive.write(opened.handle, 0, name.as_bytes()).unwrap();
                    let moved = format!("{name}-moved");
                    let (from, to) = (name.as_bytes(), moved.as_bytes());
                    bench.drive.rename(mine, from, mine, to, RenameFlags::default()).unwrap();
                    bench.list(mine, Detail::Names, 64);
                    assert_eq!(bench.read_all(found.ino).unwrap(), name.as_bytes());
                    bench.drive.unlink(mine, moved.as_bytes()).unwrap();
                    bench.drive.release(opened.handle);
                    bench.drive.forget(found.ino, 1);
                }
            });
        }
    });
    assert!(bench.drive.own.table.is_empty());
    assert_eq!(bench.names(mine), [".", ".."]);
}

#[test]
fn a_mount_point_in_a_location_is_an_empty_directory() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let mut beneath_dev = mounts.filter_map(|path| path.strip_prefix("/dev/"));
    let Some(name) = beneath_dev.find(|name| !name.contains('/')) else { return };
    let bench = Bench::new();
    let dev = NewLocation {
        id: LocationId([3; 16]),
        owner: ME,
        name: "dev".into(),
        root: Some("/dev".into()),
        read_only: false,
        shared_with: None,
    };
    let dev = bench.index.put_location(dev).unwrap().no;
    bench.indexer.watch(dev);
    wait_until("it is there", || bench.indexer.root(dev).is_ok());
    let drive = &bench.drive;
    let Found { ino, attr, .. } = bench.lookup(&["here", "dev", name]).unwrap();
    assert_eq!((attr.file_type, attr.perm), (FileType::Directory, 0o555));
    assert_eq!(drive.getattr(ino, None).unwrap().ino, ino);
    assert_eq!(bench.names(ino), [".", ".."]);
    assert_eq!(kind(drive.lookup(ino, b"0")), Kind::NotFound);
    assert_eq!(kind(drive.mkdir(&caller(), ino, b"x", 0o755)), Kind::ReadOnly);
    let set = SetAttr { perm: Some(0o777), ..SetAttr::default() };
    assert_eq!(kind(drive.setattr(&caller(), ino, None, set)), Kind::ReadOnly);
    assert_eq!(drive.listxattr(ino).unwrap(), b"");
    let listed = bench.list(bench.ino(&["here", "dev"]), Detail::Attributes, 100);
    assert!(listed.contains(&(name.to_owned(), ino)));
}
