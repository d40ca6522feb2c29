//! Disks and locations that do not let everything happen.

use super::*;
use std::process::Command;

#[test]
fn a_read_only_location_is_not_changed() {
    let mut world = World::with(&[("a", "base")]);
    let changes =
        [world.overwrite("a", world.seen("a"), "x"), world.unlink("a"), world.create("", "b", "y")];
    let location = world.index.location(world.no).unwrap();
    let refused = Outcome::Refused(Refusal::ReadOnly);
    let read_only = NewLocation { read_only: true, ..NewLocation::from((*location).clone()) };
    let others = NewLocation {
        shared_with: Some(vec![DeviceId([9; 32])]),
        ..NewLocation::from((*location).clone())
    };
    for terms in [read_only, others] {
        world.index.put_location(terms).unwrap();
        for change in &changes {
            assert_eq!(world.apply(change.clone()), refused);
        }
    }
    world.index.put_location(NewLocation::from((*location).clone())).unwrap();
    for change in changes {
        world.apply(change);
    }
    let (id, op) = world
        .op(Change::Rmdir { file: FileId(5), at: Place { dir: FileId::ROOT, name: name("x") } });
    let nowhere = Op { location: LocationId([77; 16]), ..op };
    assert_eq!(world.deliver(id, &nowhere), refused, "a location that is not there");
}

#[test]
fn while_the_folder_is_away_everything_waits() {
    let mut world = World::with(&[("a", "base")]);
    let changes = [world.overwrite("a", world.seen("a"), "x"), world.create("", "b", "y")];
    let away = world.base.path().join("away");
    std::fs::rename(&world.folder, &away).unwrap();
    let ops = changes.map(|change| world.op(change));
    for (id, op) in &ops {
        assert_eq!(world.deliver(*id, op), Outcome::Later(Obstacle::Offline));
    }
    // Another, empty one in its place is not it.
    std::fs::create_dir(&world.folder).unwrap();
    for (id, op) in &ops {
        assert_eq!(world.deliver(*id, op), Outcome::Later(Obstacle::Offline));
    }
    std::fs::remove_dir(&world.folder).unwrap();
    std::fs::rename(&away, &world.folder).unwrap();
    world.until("the folder to be back", |w| {
        ops.iter().all(|(id, op)| matches!(w.deliver(*id, op), Outcome::Applied(_)))
    });
    assert_eq!((world.read("a"), world.read("b")), ("x".into(), "y".into()));
}

#[test]
fn while_the_disk_is_mounted_read_only_everything_waits() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("memory");
    let Some(small) = Small::mount(&folder, "1m") else { return };
    let files = [("a", "base"), ("gone", "x"), ("from", "y"), ("linked", "z"), ("sub/", "")];
    let mut world = World::on(base, folder, &files);
    std::fs::hard_link(world.path("linked"), world.path("other")).unwrap();
    world.settled("other");
    let file = world.id("a");
    let (uid, gid, atime, mtime, base) = (None, None, None, None, None);
    let changes = [
        world.create("", "new", "new"),
        world.make("", "dir", New::Directory),
        world.overwrite("a", world.seen("a"), "more"),
        world.overwrite("linked", world.seen("linked"), "more"),
        world.unlink("gone"),
        world.rename("from", "to"),
        Change::Rmdir { file: world.id("sub"), at: world.split("sub") },
        Change::SetAttr { file, base, perm: Some(0o600), uid, gid, atime, mtime },
        Change::Link { file: world.id("other"), at: world.split("link") },
    ];
    let (ops, tree) = (changes.map(|change| world.op(change)), world.tree());
    small.remount("ro");
    let waits = Outcome::Later(Obstacle::Failed("the disk is mounted read-only".to_owned()));
    for (id, op) in &ops {
        assert_eq!(world.deliver(*id, op), waits, "{op:?}");
    }
    assert_eq!(world.tree(), tree);
    small.remount("rw");
    for (id, op) in &ops {
        let outcome = world.deliver(*id, op);
        assert!(matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })), "{outcome:?}");
    }
    assert_eq!(world.tree(), ["a", "dir/", "link", "linked", "new", "other", "to"]);
    assert_eq!((world.read("a"), world.read("other")), ("more".into(), "more".into()));
    world.assert_clean();
    world.indexer.stop();
    drop((world, small));
}

#[test]
fn no_link_leads_outside() {
    let mut world = World::with(&[("sub/", ""), ("sub/a", "base"), ("a", "base")]);
    let outside = world.base.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("a"), "base").unwrap();
    let changes = [
        world.create("sub", "new", "x"),
        world.overwrite("sub/a", world.seen("sub/a"), "x"),
        world.unlink("sub/a"),
        world.rename("a", "sub/b"),
        world.rename("sub/a", "c"),
        Change::SetAttr {
            file: world.id("sub/a"),
            base: None,
            perm: Some(0),
            uid: None,
            gid: None,
            atime: None,
            mtime: None,
        },
        Change::Link { file: world.id("a"), at: world.place("sub", "link") },
    ];
    std::fs::rename(world.path("sub"), world.base.path().join("sub")).unwrap();
    std::os::unix::fs::symlink(&outside, world.path("sub")).unwrap();
    for change in changes {
        let (id, op) = world.op(change);
        world.deliver(id, &op);
    }
    let listed: Vec<_> =
        std::fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(listed, ["a"]);
    assert_eq!(std::fs::read(outside.join("a")).unwrap(), b"base");
    assert_ne!(std::fs::metadata(outside.join("a")).unwrap().mode() & 0o777, 0);
}

#[test]
fn a_link_put_in_the_way_at_the_last_moment_leads_nowhere() {
    for step in ["apply::link", "apply::exchange", "apply::aside"] {
        let mut world = World::with(&[("sub/", ""), ("sub/a", "base")]);
        let outside = world.base.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("a"), "base").unwrap();
        let change = match step {
            "apply::link" => world.create("sub", "new", "x"),
            "apply::exchange" => world.overwrite("sub/a", world.seen("sub/a"), "x"),
            _ => world.unlink("sub/a"),
        };
        let (sub, moved) = (world.path("sub"), world.path("moved"));
        let link = outside.clone();
        at_step(step, move || {
            std::fs::rename(&sub, &moved).unwrap();
            std::os::unix::fs::symlink(&link, &sub).unwrap();
        });
        let (id, op) = world.op(change);
        world.deliver(id, &op);
        assert!(all_steps_came());
        let listed: Vec<_> =
            std::fs::read_dir(&outside).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(listed, ["a"], "{step}");
        assert_eq!(std::fs::read(outside.join("a")).unwrap(), b"base");
    }
}

/// A small file system in memory, if this user may mount one.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(at)
            .output();
        let is_mounted = mounted.is_ok_and(|m| m.status.success());
        if !is_mounted {
            eprintln!("skipped: only root may mount a file system");
        }
        is_mounted.then(|| Self(at.to_owned()))
    }
}

impl Small {
    fn remount(&self, how: &str) {
        let how = format!("remount,{how}");
        let mounted = Command::new("mount").args(["-o", &how]).arg(&self.0).output();
        assert!(mounted.unwrap().status.success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[test]
fn on_a_full_disk_everything_waits_and_nothing_is_half_done() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("small");
    let Some(_small) = Small::mount(&folder, "1m") else { return };
    let mut world = World::on(base, folder, &[("a", "base"), ("linked", "0123456789")]);
    std::fs::hard_link(world.path("linked"), world.path("other")).unwrap();
    world.settled("other");
    let bytes = "x".repeat(60_000);
    let changes = [
        world.create("", "new", &bytes),
        world.overwrite("a", world.seen("a"), &bytes),
        world.overwrite("linked", world.seen("linked"), &bytes),
    ];
    let filler = world.path("filler");
    let free = |world: &World| {
        let stat = rustix::fs::statvfs(&world.folder).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    std::fs::write(&filler, vec![1; free(&world) as usize - 8192]).unwrap();
    let ops = changes.map(|change| world.op(change));
    for (id, op) in &ops {
        assert_eq!(world.deliver(*id, op), Outcome::Later(Obstacle::NoSpace));
        world.assert_clean();
    }
    assert_eq!(world.tree(), ["a", "filler", "linked", "other"]);
    assert_eq!((world.read("a"), world.read("other")), ("base".into(), "0123456789".into()));
    std::fs::remove_file(&filler).unwrap();
    for (id, op) in &ops {
        let outcome = world.deliver(*id, op);
        assert!(matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })), "{outcome:?}");
    }
    assert_eq!(
        (world.read("a"), world.read("other"), world.read("new")),
        (bytes.clone(), bytes.clone(), bytes)
    );
    world.assert_clean();
    let World { base, indexer, applier, index, .. } = world;
    indexer.stop();
    drop((applier, indexer, index, _small));
    drop(base);
}

#[test]
fn bytes_that_find_no_room_leave_it_to_others() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("small");
    let Some(_small) = Small::mount(&folder, "1m") else { return };
    let mut world = World::on(base, folder, &[("a", "base")]);
    let free = |world: &World| {
        let stat = rustix::fs::statvfs(&world.folder).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let large = |world: &mut World, name: &str, len: usize| {
        let bytes = vec![3; len];
        let change = world.make("", name, New::File(whole(&bytes)));
        (world.op(change), bytes)
    };
    // Too long from the beginning: nothing is asked for.
    let ((id, op), _) = large(&mut world, "too large", 2 << 20);
    assert!(matches!(world.applier.need(LAPTOP, id, &op), Need::Nothing));
    assert_eq!(world.deliver(id, &op), Outcome::Later(Obstacle::NoSpace));
    // The disk becomes full on the way.
    let ((id, op), bytes) = large(&mut world, "large", 500_000);
    let Need::Bytes(receiving) = world.applier.need(LAPTOP, id, &op) else { panic!() };
    receiving.write(0, &bytes[..300_000]).unwrap();
    let filler = world.path("filler");
    std::fs::write(&filler, vec![1; free(&world) as usize]).unwrap();
    let full = receiving.write(300_000, &bytes[300_000..]).unwrap_err();
    assert_eq!(full.kind(), crate::error::Kind::NoSpace);
    assert!(free(&world) >= 300_000, "{} bytes are free", free(&world));
    assert_eq!(receiving.wanted(), [0..500_000]);
    let change = world.create("", "small", "a note");
    world.done(change);
    std::fs::remove_file(&filler).unwrap();
    receiving.write(0, &bytes).unwrap();
    receiving.finish().unwrap();
    let outcome = world.applier.apply(&world.writer, vec![(id, op, Some(receiving))]);
    assert!(matches!(outcome[0], Outcome::Applied(_)), "{outcome:?}");
    assert_eq!(std::fs::read(world.path("large")).unwrap(), bytes);
    let World { base, indexer, applier, index, .. } = world;
    indexer.stop();
    drop((applier, indexer, index, _small));
    drop(base);
}

#[test]
fn every_kind_of_change_on_a_disk_in_memory() {
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("memory");
    let Some(small) = Small::mount(&folder, "16m") else { return };
    let mut world = World::on(base, folder, &[("a", "one"), ("b", "two"), ("sub/", "")]);
    world.done(world.overwrite("a", world.seen("a"), "more"));
    world.done(world.change("a", world.seen("a"), parts(4, 5, &[(4, b"!")])));
    let change = world.create("sub", "new", "x");
    world.done(change);
    world.done(world.rename("a", "b"));
    world.done(world.unlink("sub/new"));
    assert_eq!(
        (world.tree(), world.read("b")),
        (vec!["b".to_owned(), "sub/".to_owned()], "more!".into())
    );
    world.assert_indexed();
    world.indexer.stop();
    drop((world, small));
}

#[test]
fn what_the_daemons_user_may_not_do_is_refused() {
    let mut world = World::with(&[("dir/", ""), ("dir/a", "base")]);
    let change = world.create("dir", "new", "x");
    let (remove, write) =
        (world.unlink("dir/a"), world.overwrite("dir/a", world.seen("dir/a"), "x"));
    let immutable = |flag: &str| {
        let done = Command::new("chattr").arg(flag).arg(world.path("dir")).output();
        done.is_ok_and(|d| d.status.success())
    };
    if !immutable("+i") {
        eprintln!("skipped: no immutable directories here");
        return;
    }
    let ops = [change, remove].map(|change| world.op(change));
    let outcomes = ops.clone().map(|(id, op)| world.deliver(id, &op));
    // A file in it can still be written, in place.
    let (id, op) = world.op(write);
    let written = world.deliver(id, &op);
    let mutable = Command::new("chattr").arg("-i").arg(world.path("dir")).output();
    assert!(mutable.is_ok_and(|d| d.status.success()));
    assert_eq!(outcomes, [(); 2].map(|()| Outcome::Refused(Refusal::Permission)));
    assert!(matches!(written, Outcome::Applied(_)), "{written:?}");
    assert_eq!(
        (world.tree(), world.read("dir/a")),
        (vec!["dir/".to_owned(), "dir/a".to_owned()], "x".into())
    );
    world.assert_clean();
}

#[test]
fn a_file_system_without_the_newer_calls_is_written_as_well() {
    for lacking in [&["O_TMPFILE"][..], &["renameat2"], &["O_TMPFILE", "renameat2"]] {
        without(lacking, || {
            let mut world = World::with(&[("a", "one"), ("b", "two"), ("c", "three")]);
            let file = world.id("a");
            let change = world.create("", "new", "x");
            let drawn = change.file();
            assert_eq!(world.done(change).file, Some(drawn), "{lacking:?}");
            let applied = world.done(world.overwrite("a", world.seen("a"), "more"));
            assert_eq!(applied.file, Some(file), "{lacking:?}");
            world.done(world.change("a", world.seen("a"), parts(4, 5, &[(4, b"!")])));
            world.done(world.rename("a", "b"));
            world.done(world.unlink("new"));
            let (base, taken) = (world.seen("c"), world.create("", "b", "other"));
            std::fs::write(world.path("c"), "owner's").unwrap();
            world.settled("c");
            kept_as(&world.applied(world.overwrite("c", base, "writer's")));
            kept_as(&world.applied(taken));
            assert_eq!((world.read("b"), world.read("c")), ("more!".into(), "owner's".into()));
            assert_eq!(world.tree().len(), 4, "{:?}", world.tree());
            world.assert_indexed();
        });
    }
}
