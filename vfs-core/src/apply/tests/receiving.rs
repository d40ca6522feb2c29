//! Bytes that do not travel inside an operation: pulled, resumed, or not needed at all.

use super::*;

fn big(seed: u8) -> Vec<u8> {
    (0..300_000u32).map(|n| (n % 251) as u8 ^ seed).collect()
}

fn pull(world: &World, id: OpId, op: &Op, bytes: &[u8]) -> Receiving {
    let Need::Bytes(receiving) = world.applier.need(LAPTOP, id, op) else {
        panic!("no bytes needed")
    };
    for range in receiving.wanted() {
        receiving.write(range.start, &bytes[range.start as usize..range.end as usize]).unwrap();
    }
    receiving.finish().unwrap();
    // What another connection still brings changes nothing.
    receiving.write(0, b"late").unwrap();
    receiving
}

#[test]
fn bytes_are_pulled_and_the_file_is_hashed_on_the_way() {
    let mut world = World::with(&[("a", "base")]);
    let bytes = big(1);
    let (at, file) = (world.place("", "new"), world.draw());
    let new = Change::Create { at, file, what: New::File(whole(&bytes)), perm: 0o600, mtime: THEN };
    let write = world.change("a", world.seen("a"), whole(&big(2)));
    let (new, write) = (world.op(new), world.op(write));
    let received = [pull(&world, new.0, &new.1, &bytes), pull(&world, write.0, &write.1, &big(2))];
    let [first, second] = received;
    let ops = vec![(new.0, new.1, Some(first)), (write.0, write.1, Some(second))];
    for outcome in world.applier.apply(&world.writer, ops) {
        assert!(matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })), "{outcome:?}");
    }
    assert_eq!(std::fs::read(world.path("new")).unwrap(), bytes);
    assert_eq!(std::fs::read(world.path("a")).unwrap(), big(2));
    let content = ContentId::of(&bytes);
    assert_eq!(world.row("new").unwrap().content, Some(content));
    assert!(world.applier.manifests.get(content).is_some());
    world.assert_clean();
    world.assert_indexed();
}

#[test]
fn what_came_before_the_connection_broke_is_not_asked_for_again() {
    let mut world = World::new();
    let bytes = big(3);
    let change = world.make("", "new", New::File(whole(&bytes)));
    let (id, op) = world.op(change);
    let Need::Bytes(first) = world.applier.need(LAPTOP, id, &op) else { panic!() };
    first.write(1000, &bytes[1000..50_000]).unwrap();
    drop(first);
    let Need::Bytes(again) = world.applier.need(LAPTOP, id, &op) else { panic!() };
    assert_eq!(again.wanted(), [0..1000, 50_000..300_000]);
    assert_eq!(world.deliver(id, &op), Outcome::Later(Obstacle::NoBytes));
    let receiving = pull(&world, id, &op, &bytes);
    let outcome = world.applier.apply(&world.writer, vec![(id, op.clone(), Some(receiving))]);
    assert!(matches!(outcome[0], Outcome::Applied(_)));
    assert!(matches!(world.applier.need(LAPTOP, id, &op), Need::Nothing), "it is applied");
}

#[test]
fn wrong_bytes_and_places_are_refused() {
    let mut world = World::new();
    let bytes = big(4);
    let change = world.make("", "new", New::File(whole(&bytes)));
    let (id, op) = world.op(change);
    let Need::Bytes(receiving) = world.applier.need(LAPTOP, id, &op) else { panic!() };
    assert!(receiving.write(299_999, b"xy").is_err());
    assert!(receiving.write(u64::MAX, b"xy").is_err());
    assert!(receiving.finish().is_err(), "nothing is here");
    receiving.write(0, &big(5)).unwrap();
    assert!(receiving.finish().is_err());
    assert_eq!(receiving.wanted(), [0..300_000], "everything is asked for again");
    let outcome = world.applier.apply(&world.writer, vec![(id, op, Some(receiving))]);
    assert_eq!(outcome, [Outcome::Later(Obstacle::NoBytes)]);
    assert_eq!(world.tree(), [""; 0]);
    let mut wrong = whole(b"inline");
    wrong.inline = Some(Bytes::from_static(b"others"));
    let change = world.make("", "wrong", New::File(wrong));
    assert_eq!(world.apply(change), Outcome::Refused(Refusal::Malformed));
}

#[test]
fn content_that_this_device_has_does_not_travel() {
    let mut world = World::new();
    std::fs::write(world.path("here"), big(6)).unwrap();
    world.until("its hash", |w| w.row("here").is_some_and(|row| row.content.is_some()));
    let change = world.make("", "copy", New::File(whole(&big(6))));
    let (id, op) = world.op(change);
    assert!(matches!(world.applier.need(LAPTOP, id, &op), Need::Nothing));
    let Outcome::Applied(applied) = world.deliver(id, &op) else { panic!() };
    assert_eq!(std::fs::read(world.path("copy")).unwrap(), big(6));
    assert_eq!(applied.conflict, None);
    // The source changed after the hash: nothing is made of it.
    let change = world.make("", "second", New::File(whole(&big(6))));
    let (id, op) = world.op(change);
    for file in ["here", "copy"] {
        std::fs::write(world.path(file), big(7)).unwrap();
    }
    assert_eq!(world.deliver(id, &op), Outcome::Later(Obstacle::NoBytes));
    assert!(!world.exists("second"));
}

#[test]
fn content_of_a_location_that_the_writer_may_not_see_is_not_given_away() {
    let mut world = World::new();
    let secret = world.base.path().join("secret");
    std::fs::create_dir(&secret).unwrap();
    std::fs::write(secret.join("file"), big(8)).unwrap();
    let location = NewLocation {
        id: LocationId([8; 16]),
        owner: OWNER,
        name: "secret".into(),
        root: Some(secret),
        read_only: false,
        shared_with: Some(vec![DeviceId([3; 32])]),
    };
    let no = world.index.put_location(location).unwrap().no;
    world.indexer.watch(no);
    let content = ContentId::of(&big(8));
    world.until("its hash", |w| !w.index.view().unwrap().holders(content).unwrap().is_empty());
    let change = world.make("", "copy", New::File(whole(&big(8))));
    let (id, op) = world.op(change);
    assert!(matches!(world.applier.need(LAPTOP, id, &op), Need::Bytes(_)));
    assert_eq!(world.deliver(id, &op), Outcome::Later(Obstacle::NoBytes));
    let change = world.make("", "in it", New::File(whole(b"x")));
    let (id, op) = world.op(change);
    let op = Op { location: LocationId([8; 16]), ..op };
    assert_eq!(world.deliver(id, &op), Outcome::Refused(Refusal::ReadOnly));
}

#[test]
fn an_operation_that_is_refused_anyway_asks_for_no_bytes() {
    let mut world = World::with(&[("a", "base")]);
    let base = world.seen("a");
    std::fs::write(world.path("a"), "owner's").unwrap();
    world.settled("a");
    let mut content = parts(4, 200_000, &[(4, &big(1)[..100_000])]);
    content.inline = None;
    let (id, op) = world.op(world.change("a", base, content));
    assert!(matches!(world.applier.need(LAPTOP, id, &op), Need::Nothing));
    assert_eq!(world.deliver(id, &op), Outcome::Refused(Refusal::NeedsWhole));
    assert!(matches!(world.applier.need(OWNER, id, &op), Need::Nothing), "another's operation");
}

#[test]
fn what_waits_for_bytes_holds_back_what_depends_on_it_only() {
    let mut world = World::new();
    let bytes = big(9);
    let change = world.make("", "late", New::File(whole(&bytes)));
    let file = change.file();
    let late = world.op(change);
    let set = Change::SetAttr {
        file,
        base: None,
        perm: Some(0o600),
        uid: None,
        gid: None,
        atime: None,
        mtime: None,
    };
    let set = world.op(set);
    let other = world.create("", "other", "x");
    let other = world.op(other);
    let ops = [&late, &set, &other].map(|(id, op)| (*id, op.clone(), None)).to_vec();
    let outcomes = world.applier.apply(&world.writer, ops);
    let no_bytes = Outcome::Later(Obstacle::NoBytes);
    assert_eq!(outcomes[..2], [no_bytes.clone(), no_bytes.clone()]);
    assert!(matches!(outcomes[2], Outcome::Applied(_)));
    assert_eq!(world.deliver(set.0, &set.1), no_bytes, "in a later batch, too");
    let receiving = pull(&world, late.0, &late.1, &bytes);
    let ops = vec![(late.0, late.1, Some(receiving)), (set.0, set.1, None)];
    for outcome in world.applier.apply(&world.writer, ops) {
        assert!(matches!(outcome, Outcome::Applied(Applied { conflict: None, .. })), "{outcome:?}");
    }
}

#[test]
fn answers_are_forgotten_when_the_writer_has_noted_them() {
    let mut world = World::new();
    let change = world.create("", "a", "x");
    let (id, op) = world.op(change);
    let outcome = world.deliver(id, &op);
    let far = OpId { no: 100_000, ..id };
    world.applier.forget_below(LAPTOP, EPOCH, 2);
    assert_eq!(world.deliver(id, &op), outcome, "a later one may refer to it");
    world.applier.forget_below(LAPTOP, EPOCH, far.no);
    assert_eq!(world.applier.ledger.outcome(&id).unwrap(), None);
}
