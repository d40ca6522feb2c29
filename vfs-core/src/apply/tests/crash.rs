//! A daemon that is killed between any two steps, and one that forgets everything.

use super::super::ledger::Step;
use super::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Kills the delivery at a step, begins anew, and delivers again.
fn killed_at(step: &'static str, mut world: World, change: Change, lost: bool) -> (World, Outcome) {
    let (id, op) = world.op(change);
    at_step(step, || std::panic::panic_any("killed"));
    let killed = catch_unwind(AssertUnwindSafe(|| world.deliver(id, &op)));
    let killed = killed.expect_err("killed");
    assert_eq!(killed.downcast_ref(), Some(&"killed"), "{step}");
    let world = world.restart(lost);
    world.assert_clean_names();
    let outcome = world.deliver(id, &op);
    world.assert_clean();
    assert_eq!(world.deliver(id, &op), outcome, "and once more");
    world.assert_indexed();
    (world, outcome)
}

impl World {
    fn assert_clean_names(&self) {
        let left: Vec<_> = self.tree().into_iter().filter(|n| n.contains(".spacedrive-")).collect();
        assert!(left.is_empty(), "left after the restart: {left:?}");
    }
}

fn assert_done(outcome: &Outcome, what: &str) {
    assert!(
        matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })),
        "{what}: {outcome:?}"
    );
}

#[test]
fn a_new_file_is_made_once() {
    for step in ["apply::link", "apply::linked", "apply::done"] {
        let mut world = World::new();
        let change = world.create("", "a", "new");
        let (world, outcome) = killed_at(step, world, change, false);
        assert_done(&outcome, step);
        assert_eq!((world.tree(), world.read("a")), (vec!["a".to_owned()], "new".into()), "{step}");
    }
}

#[test]
fn a_new_directory_is_made_once() {
    let mut world = World::new();
    let change = world.make("", "dir", New::Directory);
    let drawn = change.file();
    let (mut world, outcome) = killed_at("apply::done", world, change, false);
    assert_done(&outcome, "mkdir");
    let at = Place { dir: drawn, name: name("a") };
    let (file, what) = (world.draw(), New::File(whole(b"x")));
    world.done(Change::Create { at, file, what, perm: 0o600, mtime: THEN });
    assert_eq!(world.tree(), ["dir/", "dir/a"]);
}

#[test]
fn a_version_is_the_old_or_the_new_one_and_stays_the_same_file() {
    for step in ["apply::exchange", "apply::exchanged", "apply::swapped", "apply::done"] {
        for partly in [false, true] {
            let world = World::with(&[("a", "base")]);
            let content = if partly { parts(4, 4, &[(0, b"B")]) } else { whole(b"Base") };
            let change = world.change("a", world.seen("a"), content);
            let file = change.file();
            let (world, outcome) = killed_at(step, world, change, false);
            assert_done(&outcome, step);
            assert_eq!((world.tree(), world.read("a")), (vec!["a".to_owned()], "Base".into()));
            assert_eq!(world.id("a"), file, "{step}");
        }
    }
}

#[test]
fn an_inode_that_got_no_name_is_taken_for_nothing() {
    for (step, has_it) in [("apply::exchange", false), ("apply::swapped", true)] {
        let mut world = World::with(&[("a", "base")]);
        let (id, op) = world.op(world.overwrite("a", world.seen("a"), "Base"));
        at_step(step, || std::panic::panic_any("killed"));
        catch_unwind(AssertUnwindSafe(|| world.deliver(id, &op))).expect_err("killed");
        let intents = world.applier.ledger.intents().unwrap();
        let [(_, Intent { step: Step::Swap { new_ino, file, .. }, .. })] = intents[..] else {
            panic!("{intents:?}")
        };
        let world = world.restart(false);
        let expected = world.index.expected(world.no, new_ino);
        assert_eq!(expected, has_it.then_some(file), "{step}");
    }
}

#[test]
fn the_owners_change_at_the_moment_of_a_crash_is_kept() {
    let mut world = World::with(&[("a", "base")]);
    let (id, op) = world.op(world.overwrite("a", world.seen("a"), "writer's"));
    let path = world.path("a");
    at_step("apply::exchange", move || std::fs::write(&path, "owner's").unwrap());
    at_step("apply::exchanged", || std::panic::panic_any("killed"));
    catch_unwind(AssertUnwindSafe(|| world.deliver(id, &op))).expect_err("killed");
    let world = world.restart(false);
    world.assert_clean_names();
    assert_eq!((world.tree(), world.read("a")), (vec!["a".to_owned()], "owner's".into()));
    world.deliver(id, &op);
    assert_eq!((world.read("a"), world.copy().1), ("owner's".into(), "writer's".into()));
}

#[test]
fn a_change_in_place_is_done_again_from_its_start() {
    for step in
        ["apply::in-place-noted", "apply::in-place", "apply::in-place-extent", "apply::done"]
    {
        let world = World::with(&[("a", "0123456789")]);
        std::fs::hard_link(world.path("a"), world.path("b")).unwrap();
        world.settled("b");
        let content = NewContent { kept_bytes: 6, ..parts(10, 9, &[(1, b"AB"), (7, b"xy")]) };
        let change = world.change("a", world.seen("a"), content);
        let (world, outcome) = killed_at(step, world, change, false);
        assert_done(&outcome, step);
        assert_eq!(world.read("b"), "0AB345\0xy", "{step}");
        assert_eq!(std::fs::metadata(world.path("a")).unwrap().nlink(), 2);
    }
}

#[test]
fn a_half_written_file_is_whole_before_it_is_served() {
    let mut world = World::with(&[("a", "0123456789")]);
    std::fs::hard_link(world.path("a"), world.path("b")).unwrap();
    world.settled("b");
    let content = parts(10, 10, &[(1, b"AB"), (7, b"xy")]);
    let (id, op) = world.op(world.change("a", world.seen("a"), content));
    at_step("apply::in-place-extent", || std::panic::panic_any("killed"));
    catch_unwind(AssertUnwindSafe(|| world.deliver(id, &op))).expect_err("killed");
    assert_eq!(world.read("a"), "0AB3456789", "a mix of two versions");
    let world = world.restart(false);
    assert_eq!(world.read("a"), "0AB3456xy9");
}

#[test]
fn names_move_and_go_once() {
    for step in ["apply::rename", "apply::renamed", "apply::done"] {
        let world = World::with(&[("a", "moved"), ("b", "base")]);
        let change = world.rename("a", "b");
        let (world, outcome) = killed_at(step, world, change, false);
        assert_done(&outcome, step);
        assert_eq!(
            (world.tree(), world.read("b")),
            (vec!["b".to_owned()], "moved".into()),
            "{step}"
        );
    }
    for step in ["apply::aside", "apply::done"] {
        let world = World::with(&[("a", "base")]);
        let change = world.unlink("a");
        let (world, outcome) = killed_at(step, world, change, false);
        assert_done(&outcome, step);
        assert_eq!(world.tree(), [""; 0], "{step}");
    }
    for (from, to) in [("a", "b"), ("sub", "sub2")] {
        let world = World::with(&[("a", "moved"), ("sub/", "")]);
        let change = world.rename(from, to);
        let (world, outcome) = killed_at("apply::done", world, change, false);
        assert_done(&outcome, to);
        assert!(world.exists(to) && !world.exists(from));
    }
}

/// Several operations in one batch, killed after the last was done: delivered again, each is
/// recognised, although later ones were done over it.
#[test]
fn what_was_done_over_in_the_same_batch_is_done_once() {
    let mut world = World::with(&[("a", "base"), ("b", "other")]);
    let (first, second) = (world.draw(), world.draw());
    let make = |at: Place, file, bytes: &[u8]| {
        let what = New::File(whole(bytes));
        Change::Create { at, file, what, perm: 0o600, mtime: THEN }
    };
    let file = world.id("a");
    let path = vec![name("a")];
    let (seen, replaced) = (world.seen("a"), (world.id("b"), Some(world.seen("b"))));
    let write = |base, bytes: &[u8]| {
        let content = whole(bytes);
        Change::Write { file, base, content, path: path.clone() }
    };
    let (a, b) = (world.place("", "a"), world.place("", "b"));
    let (t, u) = (world.place("", "t"), world.place("", "u"));
    let changes = [
        write(seen, b"one"),
        write(Base::After(1), b"two"),
        Change::Rename { file, from: a.clone(), to: b, replaced: Some(replaced), exchange: false },
        make(a, first, b"a again"),
        make(t.clone(), second, b"for a moment"),
        Change::Rename { file: second, from: t.clone(), to: u, replaced: None, exchange: false },
        make(t.clone(), FileId(second.0 + 1), b"gone"),
        Change::Unlink { file: FileId(second.0 + 1), at: t, base: Some(Base::After(7)) },
    ];
    let ops: Vec<_> = changes.into_iter().map(|change| world.op(change)).collect();
    // Killed the last time that answers are noted.
    for passing in 0.. {
        let batch = || ops.iter().map(|(id, op)| (*id, op.clone(), None)).collect();
        (0..passing).for_each(|_| at_step("apply::done", || {}));
        at_step("apply::done", || std::panic::panic_any("killed"));
        let applier = world.applier.clone();
        let killed = catch_unwind(AssertUnwindSafe(|| applier.apply(&world.writer, batch())));
        drop(applier);
        let Err(killed) = killed else { break };
        assert_eq!(killed.downcast_ref(), Some(&"killed"));
        world = world.restart(false);
        world.assert_clean_names();
    }
    HOOKS.with(|hooks| hooks.borrow_mut().clear());
    for (id, op) in &ops {
        assert_done(&world.deliver(*id, op), &format!("operation {}", id.no));
    }
    assert_eq!(world.tree(), ["a", "b", "u"]);
    let found = ["a", "b", "u"].map(|path| world.read(path));
    assert_eq!(found, ["a again", "two", "for a moment"]);
}

#[test]
fn with_a_lost_index_nothing_is_lost_and_no_other_file_is_meant() {
    for step in ["apply::exchange", "apply::exchanged", "apply::done"] {
        let world = World::with(&[("a", "base"), ("b", "other"), ("c", "third")]);
        let change = world.overwrite("a", world.seen("a"), "writer's");
        let (world, outcome) = killed_at(step, world, change, true);
        assert_done(&outcome, step);
        assert_eq!(world.tree(), ["a", "b", "c"], "{step}");
        assert_eq!(world.read("a"), "writer's", "{step}");
        assert_eq!((world.read("b"), world.read("c")), ("other".into(), "third".into()));
    }
    let mut world = World::with(&[("a", "base"), ("dir/", "")]);
    let (unlink, rename) = (world.unlink("a"), world.rename("a", "b"));
    let rmdir = Change::Rmdir { file: world.id("dir"), at: world.split("dir") };
    let (file, base) = (world.id("a"), Some(world.seen("a")));
    let (uid, gid, atime, mtime) = (None, None, None, None);
    let set = Change::SetAttr { file, base, perm: Some(0o600), uid, gid, atime, mtime };
    let link = Change::Link { file, at: world.split("link") };
    let by_id = [set, link].map(|change| world.op(change));
    let mut world = world.restart(true);
    for (id, op) in &by_id {
        let Outcome::Applied(applied) = world.deliver(*id, op) else { panic!("{op:?}") };
        assert_stands(&applied);
    }
    assert_stands(&world.applied(rename));
    assert_stands(&world.applied(rmdir));
    assert_eq!(world.tree(), ["a", "dir/"]);
    world.done(unlink);
    assert_eq!(world.tree(), ["dir/"], "the very version that was meant");
}

#[test]
fn a_damaged_ledger_is_set_aside_and_what_was_done_is_recognised() {
    let mut world = World::with(&[("a", "base"), ("gone", "x"), ("old", "y")]);
    let changes = [
        world.overwrite("a", world.seen("a"), "new"),
        world.unlink("gone"),
        world.rename("old", "moved"),
        world.create("", "made", "m"),
    ];
    let ops: Vec<_> = changes.into_iter().map(|change| world.op(change)).collect();
    for (id, op) in &ops {
        assert_done(&world.deliver(*id, op), "at first");
    }
    let tree = world.tree();
    let World { base, folder, index, indexer, applier, .. } = world;
    indexer.stop();
    drop((applier, indexer, index));
    let ledger = base.path().join("apply/ledger.redb");
    std::fs::write(&ledger, vec![7; 8192]).unwrap();
    let world = World::open(base, folder, 100, 100);
    for (id, op) in &ops {
        assert_done(&world.deliver(*id, op), "again");
    }
    assert_eq!(world.tree(), tree);
    let aside = std::fs::read_dir(world.base.path().join("apply")).unwrap();
    assert!(aside.flatten().any(|e| e.file_name().to_string_lossy().contains("damaged")));
}

#[test]
fn where_new_bytes_need_a_name_none_is_left_by_a_crash() {
    for step in ["apply::hidden-copy", "apply::exchange", "apply::exchanged", "apply::done"] {
        for lacking in [&["O_TMPFILE"][..], &["O_TMPFILE", "renameat2"]] {
            without(lacking, || {
                let world = World::with(&[("a", "base")]);
                let change = world.overwrite("a", world.seen("a"), "Base");
                let (world, outcome) = killed_at(step, world, change, false);
                assert!(matches!(outcome, Outcome::Applied(_)), "{step}: {outcome:?}");
                assert_eq!((world.tree(), world.read("a")), (vec!["a".to_owned()], "Base".into()));
            });
        }
    }
}
