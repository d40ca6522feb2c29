//! Damage that is done behind the index's back, and what an audit says of it.

use super::key;
use super::row::{Row, decode, encode};
use super::store::{Batch, Durability, Table};
use super::tests::{self, Fixture, ID, check_invariants, fixture, hashed_row, observed, replica};
use super::tx::Place;
use super::*;
use crate::model::{ContentId, FileType};
use std::ops::ControlFlow;

fn audit(f: &Fixture) -> Audit {
    let audited = f.index.audit(f.no, &mut |_| ControlFlow::Continue(())).unwrap();
    audited.expect("nobody ended it")
}

fn faults(f: &Fixture) -> Vec<(Fault, u64)> {
    audit(f).faults.into_iter().collect()
}

/// Two files, one of them hashed, the other below a directory, and a tombstone; all summed up.
fn summed() -> Fixture {
    let f = fixture();
    let file = |name, ino| observed(name, ino, FileType::File);
    let list =
        |dir, listing: &[Observed]| f.index.observe_directory(f.no, dir, listing.to_vec()).unwrap();
    let dir = observed("d", 10, FileType::Directory);
    let subdirectories = list(FileId::ROOT, &[dir, file("a", 11), file("gone", 12)]);
    list(subdirectories[0].1, &[file("b", 13)]);
    f.index.observe_entry(f.no, FileId::ROOT, &tests::name("gone"), None).unwrap();
    f.index.sweep_orphans(100).unwrap();
    let a = entry(&f, FileId::ROOT, "a");
    let content = ContentId([5; 32]);
    assert!(f.index.set_content(f.no, a.file_id, &a.stamp(), content).unwrap());
    f.index.digest(f.no).unwrap().unwrap();
    check_invariants(&f.index, f.no);
    f
}

fn entry(f: &Fixture, dir: FileId, text: &str) -> Entry {
    f.index.view().unwrap().entry(f.no, dir, text.as_bytes()).unwrap().unwrap()
}

/// Changes the store and says nothing to the index.
fn damage(f: &Fixture, damage: impl FnOnce(&mut Batch)) {
    let mut batch = Batch::default();
    damage(&mut batch);
    f.index.store().commit(batch, Durability::Durable).unwrap();
}

fn damage_row(f: &Fixture, change: impl FnOnce(&mut Row)) {
    let key = key::entry(f.no, FileId::ROOT, b"a");
    let value = f.index.store().snapshot().unwrap().get(Table::Entries, &key).unwrap().unwrap();
    let mut row: Row = decode(&value, "").unwrap();
    change(&mut row);
    damage(f, |batch| batch.put(Table::Entries, key, encode(&row)));
}

#[test]
fn rows_that_nobody_touched_are_whole() {
    let f = summed();
    let Audit { rows, faults, log } = audit(&f);
    assert_eq!((rows, faults.len()), (5, 0), "root, d, a, b and a tombstone");
    assert_eq!(log, f.index.digest(f.no).unwrap());
    // Rows that the sum has not got yet are added up as well.
    let more = observed("more", 20, FileType::File);
    f.index.observe_entry(f.no, FileId::ROOT, &tests::name("more"), Some(more)).unwrap();
    let Audit { rows, faults, log } = audit(&f);
    assert_eq!((rows, faults.len()), (6, 0));
    assert_eq!(log, f.index.digest(f.no).unwrap());
}

#[test]
fn a_changed_byte_of_a_row_is_told_by_the_sum() {
    let f = summed();
    damage_row(&f, |row| row.entry.attr.mtime.nanos ^= 1);
    assert_eq!(faults(&f), [(Fault::Sum, 1)]);
    let changed = audit(&f).log.unwrap();
    assert_ne!(changed.digest, f.index.digest(f.no).unwrap().unwrap().digest, "added up anew");
}

#[test]
fn a_sum_that_is_wrong_or_none_is_told() {
    let f = summed();
    let key = key::sum(f.no);
    let sum = f.index.store().snapshot().unwrap().get(Table::Meta, &key).unwrap().unwrap();
    let mut wrong = sum.clone();
    wrong[100] ^= 1;
    damage(&f, |batch| batch.put(Table::Meta, key.clone(), wrong));
    assert_eq!(faults(&f), [(Fault::Sum, 1)]);
    damage(&f, |batch| batch.put(Table::Meta, key.clone(), &sum[..100]));
    assert_eq!(faults(&f), [(Fault::Sum, 1)]);
    damage(&f, |batch| batch.delete(Table::Meta, key));
    assert_eq!(faults(&f), [], "without one there is nothing to compare with");
}

type Harm<'a> = &'a dyn Fn(&Fixture, &mut Batch);

#[test]
fn what_the_other_tables_lack_or_have_too_much_is_told() {
    let (a, b) = (name("a"), name("b"));
    let cases: [(Harm<'_>, &[(Fault, u64)]); 6] = [
        (
            &|f, batch| {
                let file = entry(f, FileId::ROOT, "a").file_id;
                let place = Place { no: f.no, parent: FileId::ROOT, name: &a };
                batch.delete(Table::Nodes, place.node_key(file));
            },
            // Nor is its inode's file known then.
            &[(Fault::Unlisted, 1), (Fault::Extra, 1)],
        ),
        (
            &|f, batch| {
                let file = entry(f, FileId::ROOT, "a").file_id;
                batch.delete(Table::Content, key::content(ContentId([5; 32]), f.no, file));
            },
            &[(Fault::Unlisted, 1)],
        ),
        (
            &|f, batch| {
                let place = Place { no: f.no, parent: FileId::ROOT, name: &b };
                batch.put(Table::Nodes, place.node_key(FileId(999)), []);
            },
            &[(Fault::Extra, 1)],
        ),
        (
            &|f, batch| {
                let place = key::parent_and_name(FileId::ROOT, b"x");
                batch.put(Table::Log, key::log(f.no, Seq(1_000)), place);
            },
            &[(Fault::Extra, 1)],
        ),
        (
            &|f, batch| {
                let tombstone = key::entry(f.no, FileId::ROOT, b"a");
                batch.put(Table::Tombstones, tombstone, Seq(1).0.to_be_bytes());
            },
            &[(Fault::Unlisted, 2), (Fault::Counts, 1)],
        ),
        (
            &|f, batch| batch.put(Table::Entries, key::entry(f.no, FileId::ROOT, b"a"), [0xff; 4]),
            &[(Fault::Unreadable, 1), (Fault::Counts, 1), (Fault::Sum, 1)],
        ),
    ];
    for (at, (harm, expected)) in cases.into_iter().enumerate() {
        let f = summed();
        damage(&f, |batch| harm(&f, batch));
        assert_eq!(faults(&f), expected, "case {at}");
    }
}

fn name(text: &str) -> Name {
    tests::name(text)
}

#[test]
fn rows_of_a_directory_that_is_none_are_told() {
    let f = summed();
    let dir = entry(&f, FileId::ROOT, "d").file_id;
    let key = key::entry(f.no, FileId::ROOT, b"d");
    let value = f.index.store().snapshot().unwrap().get(Table::Entries, &key).unwrap().unwrap();
    let mut row: Row = decode(&value, "").unwrap();
    row.entry.attr.file_type = FileType::Fifo;
    damage(&f, |batch| batch.put(Table::Entries, key.clone(), encode(&row)));
    assert_eq!(faults(&f), [(Fault::Astray, 1), (Fault::Counts, 1), (Fault::Sum, 1)]);
    let place = Place { no: f.no, parent: FileId::ROOT, name: &name("d") };
    damage(&f, |batch| {
        batch.delete(Table::Entries, key);
        batch.delete(Table::Nodes, place.node_key(dir));
    });
    // Its inode and its place in the log are left.
    let expected = [(Fault::Astray, 1), (Fault::Extra, 2), (Fault::Counts, 1), (Fault::Sum, 1)];
    assert_eq!(faults(&f), expected);
}

#[test]
fn rows_of_a_directory_that_lost_its_name_wait_for_the_sweep() {
    let f = summed();
    f.index.observe_entry(f.no, FileId::ROOT, &name("d"), None).unwrap();
    assert_eq!(faults(&f), []);
    f.index.sweep_orphans(100).unwrap();
    assert_eq!(faults(&f), []);
}

#[test]
fn a_replica_is_whole_while_its_rows_come_in_any_order() {
    let f = replica();
    let below = LogRow { parent: FileId(77), ..hashed_row(1) };
    f.index.apply_replica_part(f.no, 9, vec![below], Seq(1)).unwrap();
    assert_eq!(faults(&f), []);
    f.index.apply_replica(f.no, 9, vec![hashed_row(2)], Seq(2)).unwrap();
    assert_eq!(audit(&f).log, f.index.digest(f.no).unwrap());
    assert_eq!(faults(&f), []);
}

#[test]
fn whoever_listens_may_end_it() {
    let f = fixture();
    let listing: Vec<_> =
        (0..3_000).map(|n| observed(&n.to_string(), 100 + n, FileType::File)).collect();
    f.index.observe_directory(f.no, FileId::ROOT, listing).unwrap();
    let mut told = 0;
    let audited = f.index.audit(f.no, &mut |_| {
        told += 1;
        ControlFlow::Break(())
    });
    assert_eq!((audited.unwrap(), told), (None, 1));
}

#[test]
fn an_own_location_begins_anew_under_another_number() {
    let mut f = summed();
    damage_row(&f, |row| row.entry.attr.size += 1);
    let log = f.index.log_id(f.no);
    let no = f.index.renew_own(f.no).unwrap();
    assert_ne!(no, f.no);
    assert_ne!(f.index.log_id(no), log);
    let location = f.index.location_by_id(ID).unwrap();
    assert_eq!((location.no, location.root.is_some()), (no, true));
    assert!(f.index.location(f.no).is_none());
    let view = f.index.view().unwrap();
    assert_eq!(view.resolve(no, &[]).unwrap(), None);
    assert!(view.holders(ContentId([5; 32])).unwrap().is_empty());
    drop(view);
    f.index.observe_root(no, &observed("x", 1, FileType::Directory)).unwrap();
    f.no = no;
    assert_eq!(faults(&f), []);
    check_invariants(&f.index, f.no);
}

/// `sd doctor --repair` has them sent again, so they must go.
#[test]
fn rows_that_cannot_be_understood_are_cleared_away() {
    let f = replica();
    let rows = (1..=3).map(hashed_row).collect();
    f.index.apply_replica(f.no, 9, rows, Seq(3)).unwrap();
    damage(&f, |batch| batch.put(Table::Entries, key::entry(f.no, FileId::ROOT, b"2"), [0xff; 4]));
    let no = f.index.restart_replica(f.no, 9).unwrap();
    assert_ne!(no, f.no);
    let left = tests::dump(&f.index, Table::Entries, &key::location(f.no));
    assert!(left.is_empty(), "{left:?}");
}
