//! Every row of the table in `docs/SEMANTICS.md`: what becomes of two changes that meet.

use super::*;

/// The owner changes a file, and the index knows.
fn owner_writes(world: &World, path: &str, bytes: &str) {
    std::fs::write(world.path(path), bytes).unwrap();
    world.settled(path);
}

/// As editors do it: another inode under the same name.
fn owner_saves(world: &World, path: &str, bytes: &str) {
    std::fs::write(world.path("saving"), bytes).unwrap();
    std::fs::rename(world.path("saving"), world.path(path)).unwrap();
}

#[test]
fn edit_and_edit_keep_both() {
    let mut world = World::with(&[("a.tar.gz", "base")]);
    let base = world.seen("a.tar.gz");
    owner_writes(&world, "a.tar.gz", "owner's");
    let applied = world.applied(world.overwrite("a.tar.gz", base, "writer's"));
    assert_eq!(world.read("a.tar.gz"), "owner's");
    let (name, bytes) = world.copy();
    assert_eq!((kept_as(&applied), bytes.as_str()), (name.clone(), "writer's"));
    assert!(name.starts_with("a (conflicted copy from laptop ") && name.ends_with(").tar.gz"));
    assert_ne!(applied.file, Some(world.id("a.tar.gz")), "the copy is another file");
    assert_eq!(applied.file, Some(world.id(&name)));
    world.assert_indexed();
}

#[test]
fn an_edit_of_parts_needs_all_bytes_when_its_base_is_gone() {
    let mut world = World::with(&[("a", "base")]);
    let base = world.seen("a");
    owner_writes(&world, "a", "owner's");
    let (id, part) = world.op(world.change("a", base.clone(), parts(4, 4, &[(0, b"B")])));
    let (next, set) = world.op(Change::SetAttr {
        file: part.change.file(),
        base: None,
        perm: Some(0o600),
        uid: None,
        gid: None,
        atime: None,
        mtime: None,
    });
    assert_eq!(world.deliver(id, &part), Outcome::Refused(Refusal::NeedsWhole));
    assert_eq!(world.tree(), ["a"]);
    // What was asked for after it waits until it comes again, under its number.
    assert!(matches!(world.deliver(next, &set), Outcome::Later(_)));
    let whole = Op { change: world.overwrite("a", base, "Base"), ..part };
    let Outcome::Applied(applied) = world.deliver(id, &whole) else { panic!("not applied") };
    assert!(matches!(world.deliver(next, &set), Outcome::Applied(_)));
    assert_eq!((world.read("a"), world.copy().1), ("owner's".into(), "Base".into()));
    kept_as(&applied);
}

#[test]
fn after_a_conflict_the_writer_goes_on_in_its_copy() {
    let mut world = World::with(&[("a", "base")]);
    let base = world.seen("a");
    owner_writes(&world, "a", "owner's");
    let first = world.op(world.overwrite("a", base, "one"));
    let second = world.op(world.overwrite("a", Base::After(first.0.no), "two!"));
    let outcomes = world
        .applier
        .apply(&world.writer, vec![(first.0, first.1, None), (second.0, second.1, None)]);
    assert!(
        matches!(&outcomes[1], Outcome::Applied(Applied { conflict: None, .. })),
        "{outcomes:?}"
    );
    assert_eq!((world.read("a"), world.copy().1), ("owner's".into(), "two!".into()));
}

#[test]
fn equal_edits_are_no_conflict() {
    let mut world = World::with(&[("a", "base")]);
    let base = world.seen("a");
    owner_saves(&world, "a", "the same");
    world.settled("a");
    world.done(world.overwrite("a", base, "the same"));
    assert_eq!(world.tree(), ["a"]);
}

#[test]
fn what_changes_no_bytes_is_no_conflict() {
    use std::os::unix::fs::PermissionsExt;
    let mut world = World::with(&[("a", "base"), ("b", "base"), ("c", "base")]);
    world.until("hashes", |w| {
        ["a", "b", "c"].iter().all(|f| w.row(f).is_some_and(|r| r.content.is_some()))
    });
    let bases = ["a", "b", "c"].map(|f| world.seen(f));
    let [a, b, c] = bases;
    std::fs::set_permissions(world.path("a"), std::fs::Permissions::from_mode(0o600)).unwrap();
    File::open(world.path("b")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    owner_saves(&world, "c", "base");
    for (file, base) in [("a", a), ("b", b), ("c", c)] {
        world.settled(file);
        world.done(world.overwrite(file, base, "writer's"));
        assert_eq!(world.read(file), "writer's");
    }
    assert_eq!(world.tree(), ["a", "b", "c"]);
}

#[test]
fn edit_and_delete_make_it_again() {
    let mut world = World::with(&[("sub/", ""), ("sub/deep/", ""), ("sub/deep/a", "base")]);
    let change = world.overwrite("sub/deep/a", world.seen("sub/deep/a"), "writer's");
    let file = change.file();
    std::fs::remove_dir_all(world.path("sub")).unwrap();
    let applied = world.applied(change);
    assert_eq!(
        applied.conflict,
        Some(Conflict::MadeAgain(vec![name("sub"), name("deep"), name("a")]))
    );
    assert_eq!(world.read("sub/deep/a"), "writer's");
    assert_eq!(applied.file, Some(world.id("sub/deep/a")));
    // The writer may name it as before.
    let set = Change::SetAttr {
        file,
        base: None,
        perm: Some(0o600),
        uid: None,
        gid: None,
        atime: None,
        mtime: None,
    };
    assert_eq!(world.done(set).file, applied.file);
    world.assert_indexed();
}

#[test]
fn an_edit_of_parts_of_a_deleted_file_needs_all_bytes() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.change("a", world.seen("a"), parts(4, 4, &[(0, b"B")]));
    std::fs::remove_file(world.path("a")).unwrap();
    assert_eq!(world.apply(change), Outcome::Refused(Refusal::NeedsWhole));
}

#[test]
fn an_edit_of_a_file_replaced_by_a_directory_is_beside_it() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.overwrite("a", world.seen("a"), "writer's");
    std::fs::remove_file(world.path("a")).unwrap();
    std::fs::create_dir(world.path("a")).unwrap();
    world.settled("a");
    let applied = world.applied(change);
    assert!(matches!(applied.conflict, Some(Conflict::MadeAgain(_))), "{applied:?}");
    assert_eq!(world.copy().1, "writer's");
    assert!(world.path("a").is_dir());
}

#[test]
fn delete_and_edit_leave_the_edit() {
    let mut world = World::with(&[("a", "base"), ("b", "base")]);
    for (file, edit) in [("a", owner_writes as fn(&World, &str, &str)), ("b", owner_saves)] {
        let change = world.unlink(file);
        edit(&world, file, "owner's");
        world.settled(file);
        assert_stands(&world.applied(change));
        assert_eq!(world.read(file), "owner's");
    }
}

#[test]
fn delete_and_delete_agree() {
    let mut world = World::with(&[("a", "base"), ("dir/", "")]);
    let (file, dir) =
        (world.unlink("a"), Change::Rmdir { file: world.id("dir"), at: world.split("dir") });
    std::fs::remove_file(world.path("a")).unwrap();
    std::fs::remove_dir(world.path("dir")).unwrap();
    world.done(file);
    world.done(dir);
}

#[test]
fn delete_and_rename_leave_the_file() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.unlink("a");
    std::fs::rename(world.path("a"), world.path("b")).unwrap();
    world.applied(change);
    assert_eq!(world.read("b"), "base");
}

#[test]
fn rename_and_rename_leave_the_owners_name() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.rename("a", "writer's");
    std::fs::rename(world.path("a"), world.path("owner's")).unwrap();
    world.until("the rename", |w| w.row("owner's").is_some());
    assert_stands(&world.applied(change));
    assert_eq!(world.tree(), ["owner's"]);
}

#[test]
fn rename_and_edit_are_both_done() {
    let mut world = World::with(&[("a", "base"), ("b", "base")]);
    let change = world.rename("a", "moved");
    owner_writes(&world, "a", "owner's");
    world.done(change);
    assert_eq!(world.read("moved"), "owner's");
    let change = world.overwrite("b", world.seen("b"), "writer's");
    std::fs::rename(world.path("b"), world.path("moved too")).unwrap();
    world.done(change);
    assert_eq!(world.read("moved too"), "writer's");
    assert_eq!(world.tree(), ["moved", "moved too"]);
}

#[test]
fn rename_and_delete_leave_it_deleted() {
    let mut world = World::with(&[("a", "base"), ("sub/", "")]);
    let (gone, into) = (world.rename("a", "b"), world.rename("a", "sub/a"));
    std::fs::remove_dir(world.path("sub")).unwrap();
    assert_stands(&world.applied(into));
    assert_eq!(world.tree(), ["a"], "not moved into a folder that is deleted");
    std::fs::remove_file(world.path("a")).unwrap();
    assert_stands(&world.applied(gone));
    assert_eq!(world.tree(), [""; 0]);
}

#[test]
fn a_rename_to_a_name_that_was_taken_is_beside_it() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.rename("a", "b");
    std::fs::write(world.path("b"), "owner's").unwrap();
    let applied = world.applied(change);
    assert_eq!(world.read("b"), "owner's");
    assert_eq!(world.copy(), (kept_as(&applied), "base".into()));
    assert!(!world.exists("a"));
    world.assert_indexed();
}

#[test]
fn a_rename_over_a_changed_file_is_beside_it() {
    let mut world = World::with(&[("a", "moved"), ("b", "base")]);
    let change = world.rename("a", "b");
    owner_writes(&world, "b", "owner's");
    let applied = world.applied(change);
    assert_eq!(world.read("b"), "owner's");
    assert_eq!(world.copy(), (kept_as(&applied), "moved".into()));
}

#[test]
fn a_rename_over_equal_bytes_is_no_conflict() {
    let mut world = World::with(&[("a", "the same"), ("b", "base")]);
    let change = world.rename("a", "b");
    owner_saves(&world, "b", "the same");
    world.settled("b");
    world.done(change);
    assert_eq!(world.tree(), ["b"]);
    let taken = world.create("", "c", "the same");
    world.done(taken);
    let change = world.rename("c", "d");
    std::fs::write(world.path("d"), "the same").unwrap();
    world.done(change);
    assert_eq!(world.tree(), ["b", "d"]);
}

#[test]
fn a_directory_renamed_over_one_with_new_entries_is_beside_it() {
    let mut world = World::with(&[("a/", ""), ("a/f", "f"), ("b/", "")]);
    let change = world.rename("a", "b");
    std::fs::write(world.path("b/new"), "owner's").unwrap();
    let applied = world.applied(change);
    assert_eq!(world.read("b/new"), "owner's");
    assert_eq!(world.read(&format!("{}/f", kept_as(&applied))), "f");
}

#[test]
fn a_directory_that_the_owner_moved_into_itself_stays() {
    let mut world = World::with(&[("a/", ""), ("b/", "")]);
    let change = world.rename("a", "b/a");
    std::fs::rename(world.path("b"), world.path("a/b")).unwrap();
    world.until("the move", |w| w.row("a/b").is_some());
    assert_stands(&world.applied(change));
    assert_eq!(world.tree(), ["a/", "a/b/"]);
}

#[test]
fn an_exchange_with_something_else_is_not_done() {
    let mut world = World::with(&[("a", "one"), ("b", "two")]);
    let (file, other) = (world.id("a"), world.id("b"));
    let (from, to) = (world.split("a"), world.split("b"));
    std::fs::rename(world.path("b"), world.path("c")).unwrap();
    std::fs::write(world.path("b"), "owner's").unwrap();
    world.until("the move", |w| w.row("c").is_some());
    world.settled("b");
    let change = Change::Rename { file, from, to, replaced: Some((other, None)), exchange: true };
    assert_stands(&world.applied(change));
    assert_eq!((world.read("a"), world.read("b")), ("one".into(), "owner's".into()));
}

#[test]
fn create_and_create_keep_both_or_are_one() {
    let mut world = World::new();
    let (other, same) = (world.create("", "a", "writer's"), world.create("", "b", "the same"));
    std::fs::write(world.path("a"), "owner's").unwrap();
    std::fs::write(world.path("b"), "the same").unwrap();
    let applied = world.applied(other);
    assert_eq!(world.copy(), (kept_as(&applied), "writer's".into()));
    assert_eq!(world.read("a"), "owner's");
    let drawn = same.file();
    let applied = world.done(same);
    assert_eq!(applied.file, Some(world.id("b")));
    assert_ne!(applied.file, Some(drawn));
    // The writer may go on with the id that it drew.
    let content = whole(b"more");
    let base = Base::Seen { stamp: applied.version.unwrap(), content: None };
    world.done(Change::Write { file: drawn, base, content, path: vec![name("b")] });
    assert_eq!(world.read("b"), "more");
    world.assert_indexed();
}

#[test]
fn directories_of_one_name_are_merged() {
    let mut world = World::new();
    let change = world.make("", "dir", New::Directory);
    let drawn = change.file();
    std::fs::create_dir(world.path("dir")).unwrap();
    std::fs::write(world.path("dir/owner's"), "").unwrap();
    let applied = world.done(change);
    assert_eq!(applied.file, Some(world.id("dir")));
    let at = Place { dir: drawn, name: name("writer's") };
    let (file, what) = (world.draw(), New::File(whole(b"x")));
    world.done(Change::Create { at, file, what, perm: 0o600, mtime: THEN });
    assert_eq!(world.tree(), ["dir/", "dir/owner's", "dir/writer's"]);
    world.assert_indexed();
}

#[test]
fn a_directory_and_a_file_of_one_name_are_both_kept() {
    let mut world = World::new();
    let (dir, file) = (world.make("", "a", New::Directory), world.create("", "b", "writer's"));
    std::fs::write(world.path("a"), "owner's").unwrap();
    std::fs::create_dir(world.path("b")).unwrap();
    let drawn = dir.file();
    let kept = kept_as(&world.applied(dir));
    let at = Place { dir: drawn, name: name("in it") };
    let (inner, what) = (world.draw(), New::File(whole(b"x")));
    world.done(Change::Create { at, file: inner, what, perm: 0o600, mtime: THEN });
    assert_eq!(world.read(&format!("{kept}/in it")), "x");
    let kept = kept_as(&world.applied(file));
    assert_eq!((world.read(&kept), world.read("a")), ("writer's".into(), "owner's".into()));
}

#[test]
fn links_of_one_name_are_kept_or_one() {
    let mut world = World::new();
    let same = world.make("", "same", New::Symlink((*b"x").into()));
    let other = world.make("", "other", New::Symlink((*b"x").into()));
    std::os::unix::fs::symlink("x", world.path("same")).unwrap();
    std::os::unix::fs::symlink("y", world.path("other")).unwrap();
    world.done(same);
    let kept = kept_as(&world.applied(other));
    assert_eq!(std::fs::read_link(world.path(&kept)).unwrap(), Path::new("x"));
    assert_eq!(std::fs::read_link(world.path("other")).unwrap(), Path::new("y"));
}

#[test]
fn what_is_made_in_a_deleted_directory_is_kept_at_the_top() {
    let mut world = World::with(&[("dir/", "")]);
    let change = world.create("dir", "a.txt", "writer's");
    std::fs::remove_dir(world.path("dir")).unwrap();
    let applied = world.applied(change);
    assert_eq!(world.copy(), (kept_as(&applied), "writer's".into()));
    assert!(kept_as(&applied).starts_with("a (conflicted copy from laptop "));
    world.assert_indexed();
}

#[test]
fn a_directory_with_new_entries_is_not_removed() {
    let mut world = World::with(&[("dir/", "")]);
    let change = Change::Rmdir { file: world.id("dir"), at: world.split("dir") };
    std::fs::write(world.path("dir/new"), "owner's").unwrap();
    assert_stands(&world.applied(change));
    assert_eq!(world.tree(), ["dir/", "dir/new"]);
}

#[test]
fn a_name_that_is_another_files_by_now_is_not_removed() {
    let mut world = World::with(&[("a", "base"), ("dir/", "")]);
    let (file, dir) =
        (world.unlink("a"), Change::Rmdir { file: world.id("dir"), at: world.split("dir") });
    std::fs::rename(world.path("a"), world.path("b")).unwrap();
    std::fs::create_dir(world.path("a")).unwrap();
    std::fs::rename(world.path("dir"), world.path("dir2")).unwrap();
    std::fs::create_dir(world.path("dir")).unwrap();
    world.until("the moves", |w| w.row("b").is_some() && w.row("dir2").is_some());
    assert_stands(&world.applied(file));
    assert_stands(&world.applied(dir));
    assert_eq!(world.tree(), ["a/", "b", "dir/", "dir2/"]);
}

#[test]
fn links_to_what_is_deleted_or_under_a_taken_name() {
    let mut world = World::with(&[("a", "one"), ("b", "two"), ("dir/", "")]);
    let link = |world: &World, file: &str, at: &str| Change::Link {
        file: world.id(file),
        at: world.split(at),
    };
    let (gone, taken, into) =
        (link(&world, "a", "c"), link(&world, "b", "d"), link(&world, "b", "dir/b"));
    std::fs::remove_file(world.path("a")).unwrap();
    std::fs::remove_dir(world.path("dir")).unwrap();
    std::fs::write(world.path("d"), "owner's").unwrap();
    assert_stands(&world.applied(gone));
    assert_stands(&world.applied(into));
    let kept = kept_as(&world.applied(taken));
    assert_eq!((world.read(&kept), world.read("d")), ("two".into(), "owner's".into()));
    let again = link(&world, "b", &kept);
    world.done(again);
}

#[test]
fn attributes_the_last_one_stands_and_none_of_a_deleted_file() {
    use std::os::unix::fs::PermissionsExt;
    let mut world = World::with(&[("a", "base")]);
    let file = world.id("a");
    let set = |perm| Change::SetAttr {
        file,
        base: None,
        perm: Some(perm),
        uid: None,
        gid: None,
        atime: None,
        mtime: None,
    };
    std::fs::set_permissions(world.path("a"), std::fs::Permissions::from_mode(0o600)).unwrap();
    world.done(set(0o644));
    let mode = std::fs::metadata(world.path("a")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o644);
    std::fs::remove_file(world.path("a")).unwrap();
    assert_stands(&world.applied(set(0o600)));
    let xattr = Change::Xattr { file, name: (*b"user.x").into(), value: Some((*b"y").into()) };
    assert_stands(&world.applied(xattr));
}

#[test]
fn what_depends_on_what_was_refused_is_refused_and_the_rest_is_done() {
    let mut world = World::new();
    // A name that no file system of Linux refuses; the location does.
    let dir = world.make("", "dir", New::Symlink((*b"x").into()));
    let file = dir.file();
    let bad = world.op(Change::Rmdir { file, at: Place { dir: FileId::ROOT, name: name("dir") } });
    let malformed = Op { no: bad.1.no + 1, ..bad.1.clone() };
    let outcomes = world.applier.apply(&world.writer, vec![(bad.0, malformed, None)]);
    assert_eq!(outcomes, [Outcome::Refused(Refusal::Malformed)]);
    world.done(dir);
}

#[test]
fn the_owner_is_quicker_than_the_swap() {
    for how in ["in place", "saved", "deleted"] {
        let mut world = World::with(&[("a", "base")]);
        let change = world.overwrite("a", world.seen("a"), "writer's");
        let (path, saving) = (world.path("a"), world.path("saving"));
        at_step("apply::exchange", move || match how {
            "in place" => std::fs::write(&path, "owner's").unwrap(),
            "saved" => {
                std::fs::write(&saving, "owner's").unwrap();
                std::fs::rename(&saving, &path).unwrap();
            }
            _ => std::fs::remove_file(&path).unwrap(),
        });
        world.applied(change);
        assert_eq!(world.copy().1, "writer's", "{how}");
        if how != "deleted" {
            assert_eq!(world.read("a"), "owner's", "{how}");
        }
        world.assert_indexed();
    }
}

#[test]
fn the_owner_is_quicker_than_a_change_in_place() {
    let mut world = World::with(&[("a", "base")]);
    std::fs::hard_link(world.path("a"), world.path("b")).unwrap();
    world.settled("b");
    let change = world.overwrite("a", world.seen("a"), "writer's");
    let path = world.path("b");
    at_step("apply::in-place-noted", move || std::fs::write(&path, "owner's").unwrap());
    world.applied(change);
    assert_eq!((world.read("a"), world.copy().1), ("owner's".into(), "writer's".into()));
}

#[test]
fn the_owner_is_quicker_than_a_new_name() {
    let mut world = World::new();
    let change = world.create("", "a", "writer's");
    let path = world.path("a");
    at_step("apply::link", move || std::fs::write(&path, "owner's").unwrap());
    world.applied(change);
    assert_eq!((world.read("a"), world.copy().1), ("owner's".into(), "writer's".into()));
}

#[test]
fn the_owner_is_quicker_than_a_rename() {
    for step in ["apply::rename", "apply::renamed"] {
        let mut world = World::with(&[("a", "moved"), ("b", "base")]);
        let change = world.rename("a", "b");
        // Through a handle, whatever name the file has just then.
        let open = std::fs::OpenOptions::new().write(true).open(world.path("b")).unwrap();
        at_step(step, move || {
            std::os::unix::fs::FileExt::write_all_at(&open, b"owner's", 0).unwrap();
        });
        world.applied(change);
        assert_eq!((world.read("b"), world.copy().1), ("owner's".into(), "moved".into()), "{step}");
        assert!(!world.exists("a"));
        world.assert_indexed();
    }
}

#[test]
fn the_owner_is_quicker_than_a_delete() {
    let mut world = World::with(&[("a", "base")]);
    let change = world.unlink("a");
    let open = std::fs::OpenOptions::new().write(true).open(world.path("a")).unwrap();
    at_step("apply::aside", move || {
        std::os::unix::fs::FileExt::write_all_at(&open, b"owner's", 0).unwrap();
    });
    assert_stands(&world.applied(change));
    assert_eq!((world.tree(), world.read("a")), (vec!["a".to_owned()], "owner's".into()));
    world.assert_indexed();
}

#[test]
fn every_row_of_the_document_has_its_test() {
    let document = include_str!("../../../../docs/SEMANTICS.md");
    let section = document.split("## Two changes that meet").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_suffix("` |")?.rsplit('`').next());
    let notes = section.split("<!-- test: ").skip(1).filter_map(|rest| rest.split(" -->").next());
    let sources = [
        include_str!("table.rs"),
        include_str!("kinds.rs"),
        include_str!("crash.rs"),
        include_str!("disks.rs"),
        include_str!("receiving.rs"),
        include_str!("../names.rs"),
    ];
    let named: Vec<_> = rows.chain(notes).collect();
    assert!(named.len() > 50, "{named:?}");
    for test in named {
        let definition = format!("#[test]\nfn {test}()");
        let indented = format!("#[test]\n    fn {test}()");
        let is_there = sources.iter().any(|s| s.contains(&definition) || s.contains(&indented));
        assert!(is_there, "{test}");
    }
}
