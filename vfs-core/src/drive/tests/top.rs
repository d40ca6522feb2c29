use super::*;

#[test]
fn devices_and_their_locations_are_directories() {
    let bench = Bench::new();
    assert_eq!(bench.names(InodeNo::ROOT), [".", "..", "here", "there"]);
    assert_eq!(bench.names(bench.ino(&["here"])), [".", "..", "mine"]);
    assert_eq!(bench.names(bench.ino(&["there"])), [".", "..", "theirs"]);
    for path in [&[][..], &["here"], &["there"]] {
        let Found { attr, .. } = bench.lookup(path).unwrap();
        assert_eq!((attr.file_type, attr.perm), (FileType::Directory, 0o555));
        assert_eq!((attr.uid, attr.gid), USER);
        assert!(attr.mtime.secs == 1_600_000_000 && attr.nlink >= 3);
    }
}

#[test]
fn numbers_are_the_same_in_lookup_and_readdir_and_dots_lead_up() {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "dir", remote_entry(2, FileType::Directory, 0)),
        (2, "deeper", remote_entry(3, FileType::Directory, 0)),
    ]);
    std::fs::create_dir_all(bench.disk.join("dir/deeper")).unwrap();
    for path in [["here", "mine", "dir", "deeper"], ["there", "theirs", "dir", "deeper"]] {
        for depth in 0..path.len() {
            let dir = bench.ino(&path[..depth]);
            let parent = bench.ino(&path[..depth.saturating_sub(1)]);
            let listed: HashMap<_, _> =
                bench.list(dir, Detail::Attributes, 3).into_iter().collect();
            assert_eq!(listed["."], dir);
            assert_eq!(listed[".."], parent, "above {:?}", &path[..depth]);
            assert_eq!(listed[path[depth]], bench.ino(&path[..=depth]));
        }
    }
}

#[test]
fn unknown_names_are_not_found() {
    let bench = Bench::new();
    assert_eq!(kind(bench.lookup(&["nobody"])), Kind::NotFound);
    assert_eq!(kind(bench.lookup(&["here", "theirs"])), Kind::NotFound);
    assert_eq!(kind(bench.lookup(&["there", "theirs", "x"])), Kind::NotFound);
    assert_eq!(kind(bench.lookup(&["here", "mine", "x"])), Kind::NotFound);
    let long = "x".repeat(256);
    assert_eq!(kind(bench.lookup(&["here", "mine", &long])), Kind::NameTooLong);
    assert_eq!(kind(bench.lookup(&["there", "theirs", &long])), Kind::NameTooLong);
}

#[test]
fn the_upper_levels_cannot_be_changed() {
    let bench = Bench::new();
    let drive = &bench.drive;
    for dir in [InodeNo::ROOT, bench.ino(&["here"]), bench.ino(&["there"])] {
        assert_eq!(kind(drive.mkdir(&caller(), dir, b"x", 0o755)), Kind::ReadOnly);
        assert_eq!(kind(drive.rmdir(dir, b"mine")), Kind::ReadOnly);
        assert_eq!(kind(drive.create(&caller(), dir, b"x", 0o644, WRITE)), Kind::ReadOnly);
        let rename = drive.rename(dir, b"mine", dir, b"x", RenameFlags::default());
        assert_eq!(kind(rename), Kind::ReadOnly);
        let set = SetAttr { perm: Some(0o777), ..SetAttr::default() };
        assert_eq!(kind(drive.setattr(&caller(), dir, None, set)), Kind::ReadOnly);
        assert_eq!(kind(drive.open(dir, OpenFlags::READ)), Kind::IsADirectory);
        assert_eq!(kind(drive.readlink(dir)), Kind::Invalid);
        assert!(drive.statfs(dir).unwrap().blocks > 0);
    }
}

#[test]
fn a_device_says_its_name_in_an_attribute() {
    let bench = Bench::new();
    let device = bench.ino(&["there"]);
    assert_eq!(bench.drive.getxattr(device, b"user.spacedrive.device").unwrap(), b"there");
    assert_eq!(bench.drive.listxattr(device).unwrap(), b"user.spacedrive.device\0");
    assert_eq!(bench.drive.listxattr(InodeNo::ROOT).unwrap(), b"");
}

#[test]
fn a_removed_device_is_gone_at_once() {
    let bench = Bench::new();
    let device = bench.ino(&["there"]);
    bench
        .library
        .update(|s| s.members.iter_mut().filter(|m| m.id == PEER).for_each(|m| m.removed = true))
        .unwrap();
    assert_eq!(bench.names(InodeNo::ROOT), [".", "..", "here"]);
    assert_eq!(kind(bench.drive.getattr(device, None)), Kind::Stale);
    let told = bench.drive.invalidations(&Change::Devices);
    assert!(told.contains(&Invalidation::Directory(InodeNo::ROOT)));
}

#[test]
fn an_own_location_whose_folder_is_away_is_browsed_from_the_index() {
    let bench = Bench::new();
    bench.put("file", b"bytes");
    let child = || bench.index.view().unwrap().entry(bench.own, FileId::ROOT, b"file").unwrap();
    wait_until("it is indexed", || child().is_some());
    let (folder, file) = (bench.mine(), bench.in_mine("file").unwrap().ino);
    std::fs::rename(&bench.disk, bench.disk.with_extension("away")).unwrap();
    wait_until("it is offline", || bench.indexer.root(bench.own).is_err());
    let found = bench.lookup(&["here", "mine", "file"]).unwrap();
    assert_eq!(found.attr.size, 5);
    assert_eq!(kind(bench.drive.open(found.ino, WRITE)), Kind::ReadOnly);
    // What a kernel knows from before is not deleted: it is looked up again.
    assert_eq!(kind(bench.drive.lookup(folder, b"file")), Kind::Stale);
    assert_eq!(kind(bench.drive.unlink(folder, b"file")), Kind::Stale);
    assert_eq!(kind(bench.drive.getattr(file, None)), Kind::Stale);
    assert_eq!(kind(bench.drive.getattr(folder, None)), Kind::Stale);
    assert_eq!(kind(bench.drive.opendir(folder)), Kind::Stale);
    assert_eq!(kind(bench.drive.statfs(folder)), Kind::Stale);
}

#[test]
fn handles_that_are_not_open_are_refused() {
    let bench = Bench::new();
    let drive = &bench.drive;
    let wrong = HandleId(999);
    assert_eq!(kind(drive.try_read(wrong, 0, 1).unwrap()), Kind::BadHandle);
    assert_eq!(kind(bench.runtime.block_on(drive.read(wrong, 0, 1))), Kind::BadHandle);
    assert_eq!(kind(drive.write(wrong, 0, b"x")), Kind::BadHandle);
    assert_eq!(kind(drive.fsync(wrong, false)), Kind::BadHandle);
    assert_eq!(kind(drive.flush(wrong)), Kind::BadHandle);
    drive.release(wrong);
    let dir = drive.opendir(bench.mine()).unwrap();
    assert_eq!(kind(drive.try_read(dir, 0, 1).unwrap()), Kind::IsADirectory);
    assert_eq!(kind(drive.write(dir, 0, b"x")), Kind::IsADirectory);
    drive.releasedir(dir);
    assert_eq!(kind(drive.fsyncdir(dir, false)), Kind::BadHandle);
}
