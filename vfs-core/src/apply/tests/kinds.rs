//! Every kind of change, where nothing stands against it.

use super::*;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};

#[test]
fn a_new_file_has_the_bytes_the_mode_and_the_time_of_its_writer() {
    let mut world = World::with(&[("sub/", "")]);
    let change = world.create("sub", "a.txt", "hello");
    let drawn = change.file();
    let applied = world.done(change);
    assert_eq!(applied.file, Some(drawn), "the writer's id is taken");
    assert_eq!(world.read("sub/a.txt"), "hello");
    let meta = std::fs::metadata(world.path("sub/a.txt")).unwrap();
    assert_eq!((meta.permissions().mode() & 0o7777, meta.nlink()), (0o640, 1));
    assert_eq!((meta.mtime(), meta.mtime_nsec() as u32), (THEN.secs, THEN.nanos));
    assert_eq!(applied.version, Some(stamp_at(&world.path("sub/a.txt"))));
    let row = world.row("sub/a.txt").expect("in the index when it is answered");
    assert_eq!((row.file_id, row.generation), (drawn, 1));
    assert_eq!(row.content, Some(ContentId::of(b"hello")), "hashed on the way");
    assert_eq!(applied.log_id, world.index.log_id(world.no));
    assert!(applied.seq <= world.index.head(world.no));
    world.assert_indexed();
    assert_eq!(world.row("sub/a.txt").unwrap().file_id, drawn, "and the watcher agrees");
}

#[test]
fn directories_links_and_fifos_are_made() {
    let mut world = World::new();
    let dir = world.make("", "dir", New::Directory);
    let drawn = dir.file();
    assert_eq!(world.done(dir).file, Some(drawn));
    let link = world.make("dir", "link", New::Symlink((*b"../a b").into()));
    let linked = link.file();
    assert_eq!(world.done(link).file, Some(linked));
    let fifo = world.make("dir", "fifo", New::Fifo);
    world.done(fifo);
    assert_eq!(std::fs::read_link(world.path("dir/link")).unwrap(), Path::new("../a b"));
    assert!(std::fs::metadata(world.path("dir/fifo")).unwrap().file_type().is_fifo());
    let mode = std::fs::metadata(world.path("dir")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    world.assert_indexed();
    assert_eq!(world.row("dir").unwrap().file_id, drawn);
}

#[test]
fn a_new_tree_comes_in_one_batch() {
    let mut world = World::new();
    let top = world.make("", "top", New::Directory);
    let (dir, mut ops) = (top.file(), vec![world.op(top)]);
    for n in 0..50 {
        let (file, at) = (world.draw(), Place { dir, name: name(&format!("{n}")) });
        let what = New::File(whole(format!("file {n}").as_bytes()));
        ops.push(world.op(Change::Create { at, file, what, perm: 0o600, mtime: THEN }));
    }
    let asked: Vec<_> = ops.iter().map(|(_, op)| op.change.file()).collect();
    let ops = ops.into_iter().map(|(id, op)| (id, op, None)).collect();
    let outcomes = world.applier.apply(&world.writer, ops);
    for (outcome, file) in outcomes.iter().zip(asked) {
        assert!(
            matches!(outcome, Outcome::Applied(Applied { file: Some(id), conflict: None, .. }) if *id == file)
        );
    }
    assert_eq!(world.read("top/49"), "file 49");
    world.assert_indexed();
}

#[test]
fn a_version_replaces_the_one_before_and_keeps_all_but_bytes_and_time() {
    let mut world = World::with(&[("a.txt", "old bytes")]);
    let path = world.path("a.txt");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o604)).unwrap();
    let has_xattrs =
        rustix::fs::setxattr(&path, "user.tag", b"blue", rustix::fs::XattrFlags::empty());
    let before = world.settled("a.txt");
    let applied = world.done(world.overwrite("a.txt", world.seen("a.txt"), "new"));
    assert_eq!(applied.file, Some(before.file_id));
    assert_eq!(world.read("a.txt"), "new");
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o604);
    assert_eq!((meta.mtime(), meta.mtime_nsec() as u32), (THEN.secs, THEN.nanos));
    if has_xattrs.is_ok() {
        let mut value = [0; 16];
        let len = rustix::fs::getxattr(&path, "user.tag", &mut value[..]).unwrap();
        assert_eq!(&value[..len], b"blue");
    }
    let row = world.row("a.txt").unwrap();
    assert_eq!((row.file_id, row.generation), (before.file_id, before.generation + 1));
    assert_eq!(row.content, Some(ContentId::of(b"new")));
    assert_eq!(row.stamp(), applied.version.unwrap());
    world.assert_indexed();
    assert_eq!(world.row("a.txt").unwrap().generation, before.generation + 1, "bumped once");
}

#[test]
fn an_open_reader_keeps_the_version_that_it_opened() {
    let mut world = World::with(&[("a.txt", "old bytes")]);
    let open = File::open(world.path("a.txt")).unwrap();
    world.done(world.overwrite("a.txt", world.seen("a.txt"), "new"));
    assert_eq!(std::io::read_to_string(&open).unwrap(), "old bytes");
}

#[test]
fn parts_of_a_file_change() {
    let mut world = World::with(&[("a.txt", "0123456789")]);
    let change =
        world.change("a.txt", world.seen("a.txt"), parts(10, 12, &[(2, b"AB"), (10, b"xy")]));
    world.done(change);
    assert_eq!(world.read("a.txt"), "01AB456789xy");
    let cut = NewContent { kept_bytes: 4, ..parts(12, 8, &[(6, b"zz")]) };
    world.done(world.change("a.txt", world.seen("a.txt"), cut));
    assert_eq!(world.read("a.txt"), "01AB\0\0zz");
    let nothing = parts(8, 3, &[]);
    world.done(world.change("a.txt", world.seen("a.txt"), nothing));
    assert_eq!(world.read("a.txt"), "01A");
    world.done(world.change("a.txt", world.seen("a.txt"), whole(b"")));
    assert_eq!(world.read("a.txt"), "");
}

#[test]
fn a_writer_goes_on_from_its_own_version() {
    let mut world = World::with(&[("a.txt", "one")]);
    let base = world.seen("a.txt");
    let mut ops = vec![world.op(world.overwrite("a.txt", base, "two"))];
    for (n, bytes) in ["three", "four!"].iter().enumerate() {
        let change = world.overwrite("a.txt", Base::After(n as u64 + 1), bytes);
        ops.push(world.op(change));
    }
    let change = world.change("a.txt", Base::After(3), parts(5, 5, &[(0, b"F")]));
    ops.push(world.op(change));
    let ops = ops.into_iter().map(|(id, op)| (id, op, None)).collect();
    for outcome in world.applier.apply(&world.writer, ops) {
        assert!(matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })), "{outcome:?}");
    }
    assert_eq!(world.read("a.txt"), "Four!");
}

#[test]
fn attributes_that_the_writer_sets_do_not_make_its_next_version_a_conflict() {
    let mut world = World::with(&[("a.txt", "one")]);
    let base = world.seen("a.txt");
    let file = world.id("a.txt");
    for secs in [5, 6] {
        let mtime = Some(Time { secs, nanos: 0 });
        let set = Change::SetAttr {
            file,
            base: None,
            perm: Some(0o600),
            uid: None,
            gid: None,
            atime: None,
            mtime,
        };
        world.done(set);
    }
    let change = Change::Write { file, base, content: whole(b"two"), path: vec![name("a.txt")] };
    world.done(change);
    assert_eq!(world.read("a.txt"), "two");
}

#[test]
fn hard_linked_files_are_written_in_place() {
    let mut world = World::with(&[("a", "one"), ("sub/", "")]);
    std::fs::hard_link(world.path("a"), world.path("sub/b")).unwrap();
    let ino = std::fs::metadata(world.path("a")).unwrap().ino();
    world.settled("sub/b");
    let before = world.settled("a");
    world.done(world.overwrite("a", world.seen("a"), "second"));
    assert_eq!((world.read("a"), world.read("sub/b")), ("second".into(), "second".into()));
    assert_eq!(std::fs::metadata(world.path("sub/b")).unwrap().ino(), ino);
    let row = world.row("sub/b").unwrap();
    assert_eq!((row.file_id, row.generation), (before.file_id, before.generation + 1));
    let cut = NewContent { kept_bytes: 2, ..parts(6, 5, &[(4, b"!")]) };
    world.done(world.change("sub/b", world.seen("sub/b"), cut));
    assert_eq!(world.read("a"), "se\0\0!");
    world.assert_indexed();
}

#[test]
fn a_little_of_a_huge_file_is_changed_in_place() {
    let mut world = World::new();
    let size = 200 << 20;
    let file = File::create(world.path("huge")).unwrap();
    file.set_len(size).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"begin", 0).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"end", size - 3).unwrap();
    drop(file);
    let before = world.settled("huge");
    let change =
        world.change("huge", world.seen("huge"), parts(size, size, &[(100 << 20, b"middle")]));
    world.done(change);
    let row = world.row("huge").unwrap();
    let shares = world.index.view().is_ok() && row.disk_ino != before.disk_ino;
    assert!(row.disk_ino == before.disk_ino || shares, "in place, where nothing can be shared");
    let file = File::open(world.path("huge")).unwrap();
    let mut bytes = [0; 6];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 100 << 20).unwrap();
    assert_eq!(&bytes, b"middle");
    let mut bytes = [0; 3];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, size - 3).unwrap();
    assert_eq!(&bytes, b"end");
    assert!(std::fs::metadata(world.path("huge")).unwrap().blocks() < 1000, "holes stay holes");
}

#[test]
fn links_are_added() {
    let mut world = World::with(&[("a", "one"), ("sub/", "")]);
    let file = world.id("a");
    let at = world.place("sub", "b");
    assert_eq!(world.done(Change::Link { file, at }).file, Some(file));
    assert_eq!(std::fs::metadata(world.path("sub/b")).unwrap().nlink(), 2);
    world.assert_indexed();
    assert_eq!(world.row("sub/b").unwrap().file_id, file);
}

#[test]
fn names_move() {
    let mut world = World::with(&[("a", "one"), ("sub/", ""), ("sub/c", "in it")]);
    let file = world.id("a");
    assert_eq!(world.done(world.rename("a", "sub/b")).file, Some(file));
    assert_eq!(world.tree(), ["sub/", "sub/b", "sub/c"]);
    assert_eq!(world.row("sub/b").unwrap().file_id, file);
    let dir = world.id("sub");
    assert_eq!(world.done(world.rename("sub", "moved")).file, Some(dir));
    assert_eq!(world.tree(), ["moved/", "moved/b", "moved/c"]);
    world.assert_indexed();
    assert_eq!(world.row("moved").unwrap().file_id, dir);
}

#[test]
fn a_file_is_saved_by_renaming_over_it() {
    let mut world = World::with(&[("a.txt", "old")]);
    let change = world.create("", "a.txt.tmp", "new");
    let drawn = change.file();
    world.done(change);
    assert_eq!(world.done(world.rename("a.txt.tmp", "a.txt")).file, Some(drawn));
    assert_eq!(world.tree(), ["a.txt"]);
    assert_eq!(world.read("a.txt"), "new");
    world.assert_indexed();
    assert_eq!(world.row("a.txt").unwrap().file_id, drawn);
}

#[test]
fn a_directory_replaces_an_empty_one() {
    let mut world = World::with(&[("a/", ""), ("a/f", "f"), ("b/", "")]);
    world.done(world.rename("a", "b"));
    assert_eq!(world.tree(), ["b/", "b/f"]);
    world.assert_indexed();
}

#[test]
fn two_swap_places() {
    let mut world = World::with(&[("a", "one"), ("sub/", ""), ("sub/b", "two")]);
    let (a, b) = (world.id("a"), world.id("sub/b"));
    let (from, to) = (world.split("a"), world.split("sub/b"));
    let change = Change::Rename { file: a, from, to, replaced: Some((b, None)), exchange: true };
    world.done(change);
    assert_eq!((world.read("a"), world.read("sub/b")), ("two".into(), "one".into()));
    world.assert_indexed();
    assert_eq!((world.id("a"), world.id("sub/b")), (b, a));
}

#[test]
fn names_go() {
    let mut world = World::with(&[("a", "one"), ("sub/", "")]);
    let file = world.id("a");
    assert_eq!(world.done(world.unlink("a")).file, Some(file));
    let (dir, at) = (world.id("sub"), world.split("sub"));
    world.done(Change::Rmdir { file: dir, at });
    assert_eq!(world.tree(), [""; 0]);
    world.assert_indexed();
    let link = world.make("", "link", New::Symlink((*b"x").into()));
    world.done(link);
    let (file, at) = (world.id("link"), world.split("link"));
    world.done(Change::Unlink { file, at, base: None });
    assert_eq!(world.tree(), [""; 0]);
}

#[test]
fn attributes_name_the_version_that_their_writer_saw_and_no_other() {
    let mut world = World::with(&[("a", "one")]);
    let (file, base) = (world.id("a"), world.seen("a"));
    let set = |secs| Change::SetAttr {
        file,
        base: Some(base.clone()),
        perm: None,
        uid: None,
        gid: None,
        atime: None,
        mtime: Some(Time { secs, nanos: 0 }),
    };
    for secs in [5, 6] {
        assert_eq!(world.done(set(secs)).version, Some(world.row("a").unwrap().stamp()));
    }
    std::fs::write(world.path("a"), "two").unwrap();
    assert_eq!(world.done(set(7)).version, None);
}

#[test]
fn attributes_are_set() {
    let mut world = World::with(&[("a", "one"), ("dir/", "")]);
    let file = world.id("a");
    let set = Change::SetAttr {
        file,
        base: None,
        perm: Some(0o4711),
        uid: None,
        gid: None,
        atime: Some(Time { secs: 5, nanos: 6 }),
        mtime: Some(THEN),
    };
    let applied = world.done(set);
    let meta = std::fs::metadata(world.path("a")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o711, "nothing that runs as this user");
    assert_eq!((meta.atime(), meta.mtime()), (5, THEN.secs));
    assert_eq!(applied.version, None, "of bytes that the writer may not have seen");
    assert_eq!(world.row("a").unwrap().attr.mtime, THEN);
    let dir = world.id("dir");
    let set = Change::SetAttr {
        file: dir,
        base: None,
        perm: Some(0o2755),
        uid: None,
        gid: None,
        atime: None,
        mtime: None,
    };
    world.done(set);
    let mode = std::fs::metadata(world.path("dir")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o2755);
}

#[test]
fn extended_attributes_are_set_and_removed() {
    let mut world = World::with(&[("a", "one")]);
    let file = world.id("a");
    let xattr = |value: Option<&[u8]>| Change::Xattr {
        file,
        name: (*b"user.colour").into(),
        value: value.map(Into::into),
    };
    world.done(xattr(Some(b"blue")));
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(world.path("a"), "user.colour", &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"blue");
    world.done(xattr(None));
    assert!(rustix::fs::getxattr(world.path("a"), "user.colour", &mut value[..]).is_err());
    world.done(xattr(None));
}

#[test]
fn names_are_any_bytes_and_up_to_255_of_them() {
    let mut world = World::new();
    for bytes in [vec![0xff, 0xfe, b'\n'], vec![b'x'; 255], vec![0xc3; 255]] {
        let (file, at) =
            (world.draw(), Place { dir: FileId::ROOT, name: Name::new(bytes.clone()).unwrap() });
        let what = New::File(whole(b"bytes"));
        world.done(Change::Create { at: at.clone(), file, what, perm: 0o600, mtime: THEN });
        let path = world.folder.join(std::ffi::OsStr::from_bytes(&bytes));
        assert_eq!(std::fs::read(&path).unwrap(), b"bytes");
        let base = Base::Seen { stamp: stamp_at(&path), content: None };
        world.done(Change::Write {
            file,
            base,
            content: whole(b"more"),
            path: vec![at.name.clone()],
        });
        assert_eq!(std::fs::read(&path).unwrap(), b"more");
        // A conflict copy of such a name has one of at most 255 bytes.
        let other = Change::Create {
            at,
            file: world.draw(),
            what: New::File(whole(b"x")),
            perm: 0o600,
            mtime: THEN,
        };
        let kept = world.applied(other);
        assert!(matches!(kept.conflict, Some(Conflict::KeptAs(_))), "{kept:?}");
    }
    assert_eq!(world.tree().len(), 6);
}
