use super::*;

#[test]
fn an_entry_is_as_its_owner_has_it_and_belongs_to_the_user() {
    let bench = Bench::new();
    bench.replicate(vec![(1, "file", remote_entry(2, FileType::File, 1234))]);
    let Found { attr, atime, valid_for, .. } = bench.lookup(&["there", "theirs", "file"]).unwrap();
    assert_eq!((attr.size, attr.perm, attr.mtime, attr.blocks), (1234, 0o640, MTIME, 3));
    assert_eq!(((attr.uid, attr.gid), atime), (USER, MTIME));
    assert!(valid_for >= Duration::from_secs(3600));
    assert!(bench.drive.negative_valid_for(bench.theirs()) >= Duration::from_secs(3600));
    let folder = bench.lookup(&["there", "theirs"]).unwrap();
    assert_eq!(folder.attr.perm, 0o751);
}

#[test]
fn a_location_without_rows_yet_is_an_empty_directory() {
    let bench = Bench::new();
    let folder = bench.lookup(&["there", "theirs"]).unwrap();
    assert_eq!((folder.attr.file_type, folder.attr.perm), (FileType::Directory, 0o555));
    assert_eq!(bench.names(folder.ino), [".", ".."]);
    assert!(bench.drive.statfs(folder.ino).unwrap().blocks > 0);
}

#[test]
fn numbers_are_computed_and_differ_by_version() {
    let bench = Bench::new();
    let one = Entry { generation: 1, ..remote_entry(2, FileType::File, 1) };
    bench.replicate(vec![(1, "file", one.clone())]);
    let path = ["there", "theirs", "file"];
    let old = bench.ino(&path);
    assert_eq!(bench.ino(&path), old);
    bench.replicate(vec![(1, "file", Entry { generation: 2, ..one })]);
    assert_ne!(bench.ino(&path), old);
    assert_eq!(kind(bench.drive.getattr(old, None)), Kind::Stale);
    assert_eq!(kind(bench.drive.open(old, OpenFlags::READ)), Kind::Stale);
}

#[test]
fn after_the_owner_lost_its_index_no_old_inode_is_another_file() {
    let bench = Bench::new();
    let id = bench.index.location(bench.remote).unwrap().id;
    bench.replicate(vec![(1, "a", bench.peer_file(5, b"bytes of a"))]);
    let (folder, old) = (bench.theirs(), bench.ino(&["there", "theirs", "a"]));
    // A file of another name gets the id, and the generation, that the first one had.
    let renewed = bench.index.restart_replica(bench.remote, 78).unwrap();
    let root = (ROOT_PARENT, "root", remote_entry(1, FileType::Directory, 0));
    let rows = [root, (FileId::ROOT, "b", bench.peer_file(5, b"the bytes of b"))];
    let rows = rows.into_iter().zip(1..).map(|((parent, name, entry), seq)| LogRow {
        seq: Seq(seq),
        parent,
        name: Name::new(name.as_bytes()).unwrap(),
        entry: Some(entry),
    });
    bench.index.apply_replica(renewed, 78, rows.collect(), Seq(2)).unwrap();

    assert_eq!(kind(bench.drive.open(old, OpenFlags::READ)), Kind::Stale);
    assert_eq!(kind(bench.drive.getattr(old, None)), Kind::Stale);
    // Not `NotFound`, which would be remembered.
    assert_eq!(kind(bench.drive.lookup(folder, b"b")), Kind::Stale);
    assert_eq!(bench.index.location_by_id(id).unwrap().no, renewed);
    assert_eq!(bench.read_all(bench.ino(&["there", "theirs", "b"])).unwrap(), b"the bytes of b");
}

#[test]
fn a_replica_that_begins_anew_in_place_is_told_whole() {
    let bench = Bench::new();
    assert_eq!(bench.drive.invalidations(&Change::Reset), [Invalidation::Everything]);
}

#[test]
fn an_open_file_stays_the_version_it_was() {
    let bench = Bench::new();
    let file = bench.peer_file(2, b"old bytes");
    bench.replicate(vec![(1, "file", file.clone())]);
    let ino = bench.ino(&["there", "theirs", "file"]);
    let opened = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"old bytes");
    let newer = bench.peer_file(2, b"newer bytes");
    bench.replicate(vec![(1, "file", Entry { generation: 2, ..newer })]);
    assert_eq!(bench.read(opened.handle, 4, 100).unwrap(), b"bytes");
    for handle in [None, Some(opened.handle)] {
        assert_eq!(bench.drive.getattr(ino, handle).unwrap().attr.size, 9);
    }
    bench.drive.release(opened.handle);
    assert_eq!(kind(bench.drive.getattr(ino, None)), Kind::Stale);
    assert_eq!(bench.read_all(bench.ino(&["there", "theirs", "file"])).unwrap(), b"newer bytes");
}

#[test]
fn a_number_that_comes_again_does_not_take_the_open_version_away() {
    let bench = Bench::new();
    let path = ["there", "theirs", "file"];
    let old = bench.peer_file(2, b"old bytes");
    bench.replicate(vec![(1, "file", old)]);
    let first = bench.drive.open(bench.ino(&path), OpenFlags::READ).unwrap();
    let newer = bench.peer_file(2, b"newer bytes");
    bench.replicate(vec![(1, "file", Entry { generation: 1 + 256, ..newer.clone() })]);
    let ino = bench.ino(&path);
    let second = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!((first.generation, second.generation), (1, 257), "one number, two files");
    bench.replicate(vec![(1, "file", Entry { generation: 2 + 256, ..newer })]);
    bench.drive.release(first.handle);
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 11, "the second one is open");
    bench.drive.release(second.handle);
    assert_eq!(kind(bench.drive.getattr(ino, None)), Kind::Stale);
}

#[test]
fn bytes_come_from_the_owner_and_stay_in_the_cache() {
    let bench = Bench::new();
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let file = bench.peer_file(2, &bytes);
    bench.replicate(vec![(1, "file", file), (1, "empty", bench.peer_file(3, b""))]);
    let ino = bench.ino(&["there", "theirs", "file"]);
    assert_eq!(bench.drive.getxattr(ino, b"user.spacedrive.state").unwrap(), b"remote");
    assert_eq!(bench.read_all(ino).unwrap(), bytes);
    assert_eq!(bench.read_all(bench.ino(&["there", "theirs", "empty"])).unwrap(), b"");
    let cached = || bench.drive.getxattr(ino, b"user.spacedrive.state").unwrap() == b"cached";
    wait_until("it is cached", cached);
    bench.peer.online.store(false, Ordering::SeqCst);
    assert_eq!(bench.read_all(ino).unwrap(), bytes);
}

#[test]
fn without_its_owner_everything_works_but_uncached_bytes() {
    let bench = Bench::new();
    bench.replicate(vec![(1, "file", bench.peer_file(2, b"bytes")), (1, "l", remote_link(3, "f"))]);
    bench.peer.online.store(false, Ordering::SeqCst);
    let ino = bench.ino(&["there", "theirs", "file"]);
    assert_eq!(bench.names(bench.theirs()), [".", "..", "file", "l"]);
    let opened = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(kind(bench.read(opened.handle, 0, 10)), Kind::HostDown);
    assert_eq!(bench.drive.readlink(bench.ino(&["there", "theirs", "l"])).unwrap(), b"f");
}

#[test]
fn every_change_of_a_read_only_location_is_refused() {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "file", bench.peer_file(2, b"bytes")),
        (1, "dir", remote_entry(3, FileType::Directory, 0)),
    ]);
    let location = (*bench.index.location(bench.remote).unwrap()).clone();
    bench
        .index
        .put_location(crate::model::Location { read_only: true, ..location }.into())
        .unwrap();
    let drive = &bench.drive;
    let (dir, file) = (bench.theirs(), bench.ino(&["there", "theirs", "file"]));
    let (me, no_flags) = (&caller(), RenameFlags::default());
    let truncate = OpenFlags { truncate: true, ..OpenFlags::READ };
    let refused = [
        kind(drive.open(file, WRITE)),
        kind(drive.open(file, READ_WRITE)),
        kind(drive.open(file, truncate)),
        kind(drive.create(me, dir, b"new", 0o644, READ_WRITE)),
        kind(drive.mkdir(me, dir, b"new", 0o755)),
        kind(drive.mknod(me, dir, b"new", FileType::Fifo, 0o644, 0)),
        kind(drive.symlink(me, dir, b"new", b"target")),
        kind(drive.link(file, dir, b"new")),
        kind(drive.unlink(dir, b"file")),
        kind(drive.rmdir(dir, b"dir")),
        kind(drive.rename(dir, b"file", dir, b"new", no_flags)),
        kind(drive.setattr(me, file, None, SetAttr { size: Some(0), ..SetAttr::default() })),
        kind(drive.setxattr(file, b"user.x", b"1", XattrMode::Any)),
        kind(drive.removexattr(file, b"user.spacedrive.device")),
    ];
    assert_eq!(refused, [Kind::ReadOnly; 14]);
    let opened = drive.open(file, OpenFlags::READ).unwrap();
    assert_eq!(kind(drive.write(opened.handle, 0, b"x")), Kind::BadHandle);
    let allocate = FallocateMode::Allocate { keep_size: false };
    assert_eq!(kind(drive.fallocate(opened.handle, 0, 1, allocate)), Kind::BadHandle);
}

#[test]
fn only_regular_files_are_opened() {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "dir", remote_entry(2, FileType::Directory, 0)),
        (1, "fifo", remote_entry(3, FileType::Fifo, 0)),
        (1, "socket", remote_entry(4, FileType::Socket, 0)),
        (1, "link", remote_link(5, "dir")),
        (1, "disk", remote_entry(6, FileType::BlockDevice, 0)),
    ]);
    let open =
        |name| kind(bench.drive.open(bench.ino(&["there", "theirs", name]), OpenFlags::READ));
    assert_eq!(open("dir"), Kind::IsADirectory);
    assert_eq!(open("fifo"), Kind::NotPermitted);
    assert_eq!(open("socket"), Kind::NotPermitted);
    assert_eq!(open("disk"), Kind::NotPermitted);
    assert_eq!(open("link"), Kind::Loop);
    let fifo = bench.ino(&["there", "theirs", "fifo"]);
    assert_eq!(kind(bench.drive.opendir(fifo)), Kind::NotADirectory);
}

fn links() -> Vec<(u64, &'static str, Entry)> {
    vec![
        (1, "dir", remote_entry(2, FileType::Directory, 0)),
        (2, "sub", remote_entry(3, FileType::Directory, 0)),
        (3, "inside", remote_link(4, "../../file")),
        (3, "outside", remote_link(5, "../../../file")),
        (1, "absolute", remote_link(6, "/etc/passwd")),
        (1, "plain", remote_link(7, "dir/sub")),
        (1, "winding", remote_link(8, "dir/../../x")),
    ]
}

#[test]
fn links_of_peers_that_lead_out_are_not_followed() {
    let bench = Bench::new();
    bench.replicate(links());
    let read =
        |path: &[&str]| bench.drive.readlink(bench.ino(&[&["there", "theirs"], path].concat()));
    assert_eq!(read(&["dir", "sub", "inside"]).unwrap(), b"../../file");
    assert_eq!(read(&["plain"]).unwrap(), b"dir/sub");
    assert_eq!(kind(read(&["dir", "sub", "outside"])), Kind::NotPermitted);
    assert_eq!(kind(read(&["absolute"])), Kind::NotPermitted);
    assert_eq!(kind(read(&["winding"])), Kind::NotPermitted);
    assert_eq!(kind(read(&["dir"])), Kind::Invalid);
}

#[test]
fn a_link_that_a_peer_moves_up_is_another_inode_and_checked_anew() {
    let bench = Bench::new();
    bench.replicate(links());
    let deep = bench.ino(&["there", "theirs", "dir", "sub", "inside"]);
    let sub = Some(remote_entry(3, FileType::Directory, 0));
    bench.replicate_changes(vec![(2, "sub", None), (1, "sub", sub)]);
    let shallow = bench.ino(&["there", "theirs", "sub", "inside"]);
    assert_ne!(deep, shallow);
    assert_eq!(kind(bench.drive.readlink(shallow)), Kind::NotPermitted);
}

#[test]
fn all_links_are_shown_when_asked_for() {
    let bench = Bench::with(DriveConfig { foreign_symlinks: ForeignSymlinks::AsIs, ..config() });
    bench.replicate(links());
    let absolute = bench.ino(&["there", "theirs", "absolute"]);
    assert_eq!(bench.drive.readlink(absolute).unwrap(), b"/etc/passwd");
}

#[test]
fn attributes_say_where_a_file_is_and_what_it_contains() {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "file", bench.peer_file(2, b"bytes")),
        (1, "unhashed", remote_entry(3, FileType::File, 9)),
        (1, "link", remote_link(4, "file")),
    ]);
    let ino = |name| bench.ino(&["there", "theirs", name]);
    let get = |name, attribute: &str| {
        let attribute = format!("user.spacedrive.{attribute}");
        bench.drive.getxattr(ino(name), attribute.as_bytes())
    };
    let list = |ino| String::from_utf8(bench.drive.listxattr(ino).unwrap()).unwrap();
    assert_eq!(get("file", "device").unwrap(), b"there");
    assert_eq!(get("file", "location").unwrap(), b"theirs");
    assert_eq!(get("file", "content").unwrap(), ContentId::of(b"bytes").to_string().as_bytes());
    assert_eq!(get("unhashed", "state").unwrap(), b"remote");
    assert_eq!(kind(get("unhashed", "content")), Kind::NoAttribute);
    assert_eq!(kind(get("file", "nothing")), Kind::NoAttribute);
    assert_eq!(list(ino("file")).matches('\0').count(), 4);
    assert_eq!(list(ino("unhashed")).matches('\0').count(), 3);
    assert_eq!(list(bench.theirs()).matches('\0').count(), 2);
    assert_eq!(list(ino("link")), "");
}

#[test]
fn seek_knows_only_data_and_the_end() {
    let bench = Bench::new();
    bench.replicate(vec![(1, "file", bench.peer_file(2, b"0123456789"))]);
    let ino = bench.ino(&["there", "theirs", "file"]);
    let handle = bench.drive.open(ino, OpenFlags::READ).unwrap().handle;
    assert_eq!(bench.drive.seek(handle, 3, Whence::Data).unwrap(), 3);
    assert_eq!(bench.drive.seek(handle, 3, Whence::Hole).unwrap(), 10);
    assert_eq!(kind(bench.drive.seek(handle, 10, Whence::Data)), Kind::NoSuchAddress);
}

#[test]
fn changes_name_what_a_kernel_holds() {
    let bench = Bench::new();
    bench.replicate(links());
    let mut changes = bench.drive.subscribe();
    let (dir, sub) =
        (bench.ino(&["there", "theirs", "dir"]), bench.ino(&["there", "theirs", "dir", "sub"]));
    bench.replicate(vec![(3, "new", remote_entry(20, FileType::File, 1))]);
    let name = Name::new(*b"new").unwrap();
    let told = bench.told_until(&mut changes, &Invalidation::Entry { parent: sub, name });
    assert!(told.contains(&Invalidation::Directory(sub)));
    let of = |file: u64| {
        let (location, file) = (bench.remote, FileId(file));
        let change =
            Change::Attributes { location, file, generation: 1, noticed: None, grew: None };
        bench.drive.invalidations(&change)
    };
    assert_eq!(of(2), [Invalidation::Attributes(dir)]);
    let file = bench.ino(&["there", "theirs", "dir", "sub", "new"]);
    assert_eq!(of(20), [Invalidation::Attributes(file)]);
    assert_eq!(of(999), []);
}

#[test]
fn a_file_whose_attributes_changed_is_read_under_the_stamp_that_its_owner_tells_next() {
    let bench = Bench::new();
    let entry = Entry { content: None, ..bench.peer_file(2, b"bytes") };
    bench.replicate(vec![(1, "file", entry.clone())]);
    let handle = bench.drive.open(bench.ino(&["there", "theirs", "file"]), OpenFlags::READ);
    let handle = handle.unwrap().handle;
    let mut later = Entry { generation: 2, ..entry };
    later.attr.ctime.secs += 1;
    bench.peer.stamps.lock().unwrap().insert(FileId(2), later.stamp());
    std::thread::scope(|scope| {
        let read = scope.spawn(|| bench.read(handle, 0, 5));
        // Its owner has it under another stamp before this device knows.
        bench.replicate(vec![(1, "file", later.clone())]);
        assert_eq!(read.join().unwrap().unwrap(), b"bytes");
    });
}

#[test]
fn a_handle_of_bytes_that_its_owner_has_no_more_gets_no_others() {
    let bench = Bench::new();
    let entry = Entry { content: None, ..bench.peer_file(2, b"bytes") };
    bench.replicate(vec![(1, "file", entry.clone())]);
    let handle = bench.drive.open(bench.ino(&["there", "theirs", "file"]), OpenFlags::READ);
    let mut later = Entry { generation: 2, ..entry };
    later.attr.mtime.secs += 1;
    bench.peer.stamps.lock().unwrap().insert(FileId(2), later.stamp());
    bench.replicate(vec![(1, "file", later)]);
    assert_eq!(kind(bench.read(handle.unwrap().handle, 0, 5)), Kind::Stale);
}
