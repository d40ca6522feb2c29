//! What every store must pass. Another store joins by a line in [`KINDS`].

use super::store::{
    Batch, Durability, FORMAT, KINDS, Snapshot, Store, StoreError, StoreKind, Table, open_kind,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

fn for_every_store(test: impl Fn(&StoreKind, &Path)) {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        test(kind, dir.path());
    }
}

fn open(kind: &StoreKind, dir: &Path) -> Arc<dyn Store> {
    let opened = open_kind(kind, dir).unwrap();
    assert_eq!(opened.set_aside, None);
    opened.store
}

fn scan(snapshot: &dyn Snapshot, table: Table, from: &[u8], to: Option<&[u8]>) -> Rows {
    let mut rows = Vec::new();
    let visit = &mut |k: &[u8], v: &[u8]| {
        rows.push((k.to_vec(), v.to_vec()));
        ControlFlow::Continue(())
    };
    snapshot.scan(table, from, to, visit).unwrap();
    rows
}

fn put(store: &dyn Store, table: Table, rows: &[(&[u8], &[u8])]) {
    let mut batch = Batch::default();
    rows.iter().for_each(|(k, v)| batch.put(table, *k, *v));
    store.commit(batch, Durability::Relaxed).unwrap();
}

fn keys(rows: &Rows) -> Vec<&[u8]> {
    rows.iter().map(|(k, _)| k.as_slice()).collect()
}

#[test]
fn scans_are_in_byte_order_and_stop_where_told() {
    for_every_store(|kind, dir| {
        let store = open(kind, dir);
        let names: [&[u8]; 6] = [b"", b"a", b"a\0", b"ab", b"b", b"\xff\xff"];
        put(&*store, Table::Log, &names.map(|n| (n, n)));
        put(&*store, Table::Disk, &[(b"a", b"of another table")]);
        let snapshot = store.snapshot().unwrap();
        assert_eq!(keys(&scan(&*snapshot, Table::Log, b"", None)), names);
        assert_eq!(keys(&scan(&*snapshot, Table::Log, b"a\0", Some(b"b"))), names[2..4]);
        assert_eq!(keys(&scan(&*snapshot, Table::Log, b"b", Some(b"a"))), [b"" as &[u8]; 0]);
        let mut seen = 0;
        let visit = &mut |_: &[u8], _: &[u8]| {
            seen += 1;
            if seen == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        snapshot.scan(Table::Log, b"", None, visit).unwrap();
        assert_eq!(seen, 2);
    });
}

#[test]
fn a_snapshot_sees_nothing_of_later_commits() {
    for_every_store(|kind, dir| {
        let store = open(kind, dir);
        put(&*store, Table::Entries, &[(b"kept", b"1"), (b"removed", b"1"), (b"set", b"1")]);
        let before = store.snapshot().unwrap();
        let seen = scan(&*before, Table::Entries, b"", None);
        let mut batch = Batch::default();
        batch.delete(Table::Entries, b"removed");
        batch.put(Table::Entries, b"set", b"2");
        batch.put(Table::Entries, b"added", b"2");
        store.commit(batch, Durability::Durable).unwrap();
        put(&*store, Table::Entries, &[(b"set", b"3")]);
        let after = store.snapshot().unwrap();
        assert_eq!(scan(&*before, Table::Entries, b"", None), seen);
        assert_eq!(before.get(Table::Entries, b"set").unwrap(), Some(b"1".to_vec()));
        assert_eq!(before.get(Table::Entries, b"added").unwrap(), None);
        let now = scan(&*after, Table::Entries, b"", None);
        assert_eq!(keys(&now), [b"added" as &[u8], b"kept", b"set"]);
        assert_eq!(after.get(Table::Entries, b"set").unwrap(), Some(b"3".to_vec()));
    });
}

#[test]
fn a_store_is_there_again_after_closing() {
    for_every_store(|kind, dir| {
        let store = open(kind, dir);
        for n in 0..1000u32 {
            put(&*store, Table::Nodes, &[(&n.to_be_bytes(), &[7; 100])]);
        }
        store.commit(Batch::default(), Durability::Durable).unwrap();
        assert!(store.size_bytes() > 100_000);
        drop(store);
        let store = open(kind, dir);
        let rows = scan(&*store.snapshot().unwrap(), Table::Nodes, b"", None);
        assert_eq!(rows.len(), 1000);
    });
}

#[test]
fn a_second_opener_is_refused_and_the_first_goes_on() {
    for_every_store(|kind, dir| {
        let store = open(kind, dir);
        let second = open_kind(kind, dir).map(|_| ());
        assert!(matches!(second, Err(StoreError::InUse { .. })), "{second:?}");
        put(&*store, Table::Meta, &[(b"k", b"v")]);
        drop(store);
        open(kind, dir);
    });
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    for_every_store(|kind, dir| {
        let store = open(kind, dir);
        put(&*store, Table::Meta, &[(b"format", &(FORMAT + 1).to_be_bytes())]);
        put(&*store, Table::Entries, &[(b"k", b"v")]);
        store.commit(Batch::default(), Durability::Durable).unwrap();
        drop(store);
        for _ in 0..2 {
            let opened = open_kind(kind, dir).map(|_| ());
            let Err(StoreError::NewerFormat { found }) = opened else { panic!("{opened:?}") };
            assert_eq!(found, FORMAT + 1);
        }
    });
}

fn files_below(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = std::fs::read_dir(path).unwrap();
    entries.flat_map(|e| files_below(&e.unwrap().path())).collect()
}

fn damage(path: &Path, how: fn(Vec<u8>) -> Vec<u8>) {
    for file in files_below(path) {
        let bytes = std::fs::read(&file).unwrap();
        std::fs::write(&file, how(bytes)).unwrap();
    }
}

#[test]
fn a_damaged_store_is_set_aside_and_an_empty_one_opened() {
    let ways: [fn(Vec<u8>) -> Vec<u8>; 2] =
        [|b| vec![0x5a; b.len()], |b| b[..b.len().min(100)].to_vec()];
    for way in ways {
        for_every_store(|kind, dir| {
            let store = open(kind, dir);
            put(&*store, Table::Entries, &[(b"k", b"v")]);
            drop(store);
            damage(&dir.join(kind.file), way);
            let opened = open_kind(kind, dir).unwrap();
            let aside = opened.set_aside.expect("set aside");
            assert!(aside.exists(), "{aside:?}");
            assert!(aside.file_name().unwrap().to_str().unwrap().contains(".corrupt-"));
            let snapshot = opened.store.snapshot().unwrap();
            assert_eq!(snapshot.get(Table::Entries, b"k").unwrap(), None);
            drop(snapshot);
            drop(opened.store);
            open(kind, dir);
        });
    }
}

#[test]
fn damage_met_in_use_has_the_store_set_aside_at_the_next_open() {
    for_every_store(|kind, dir| {
        drop(open(kind, dir));
        super::store::mark_damaged(&dir.join(kind.file));
        assert!(open_kind(kind, dir).unwrap().set_aside.is_some_and(|p| p.exists()));
        open(kind, dir);
    });
}

#[derive(Clone, Debug)]
enum Step {
    Commit(Vec<(u8, Option<u8>)>, bool),
    Snapshot,
    Release,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Also many new keys beside each other, which stores insert in another way.
    let few = prop::collection::vec((0..40u8, any::<Option<u8>>()), 0..12);
    let value = prop::option::weighted(0.9, any::<u8>());
    let many = prop::collection::vec((any::<u8>(), value), 30..120);
    let changes = prop_oneof![2 => few, 1 => many];
    let step = prop_oneof![
        6 => (changes, any::<bool>()).prop_map(|(c, d)| Step::Commit(c, d)),
        2 => Just(Step::Snapshot),
        1 => Just(Step::Release),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..40)
}

fn model_rows(model: &BTreeMap<Vec<u8>, Vec<u8>>) -> Rows {
    model.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// Runs until the store is to be opened again; every snapshot must be as its model was.
fn run(
    store: &dyn Store,
    model: &mut BTreeMap<Vec<u8>, Vec<u8>>,
    steps: &mut std::slice::Iter<'_, Step>,
) {
    let mut open = Vec::new();
    for step in steps.by_ref() {
        match step {
            Step::Commit(changes, durable) => {
                let mut batch = Batch::default();
                for (key, value) in changes {
                    let key = vec![*key; 1 + usize::from(key % 3)];
                    match value {
                        Some(v) => {
                            batch.put(Table::Log, key.clone(), vec![*v]);
                            model.insert(key, vec![*v]);
                        }
                        None => {
                            batch.delete(Table::Log, key.clone());
                            model.remove(&key);
                        }
                    }
                }
                let durability = if *durable { Durability::Durable } else { Durability::Relaxed };
                store.commit(batch, durability).unwrap();
            }
            Step::Snapshot => open.push((store.snapshot().unwrap(), model_rows(model))),
            Step::Release if !open.is_empty() => drop(open.remove(0)),
            Step::Release => {}
            Step::Reopen => break,
        }
        for (snapshot, rows) in &open {
            assert_eq!(scan(&**snapshot, Table::Log, b"", None), *rows);
        }
    }
    drop(open);
    store.commit(Batch::default(), Durability::Durable).unwrap();
    assert_eq!(scan(&*store.snapshot().unwrap(), Table::Log, b"", None), model_rows(model));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_store_is_an_ordered_map_with_snapshots(steps in steps()) {
        for_every_store(|kind, dir| {
            let mut model = BTreeMap::new();
            let mut steps = steps.iter();
            while steps.len() > 0 {
                run(&*open(kind, dir), &mut model, &mut steps);
            }
        });
    }
}

// The crash test: a child process commits and acknowledges until it is killed.

const CHILD_DIR: &str = "STORE_CRASH_DIR";
const CHILD_KIND: &str = "STORE_CRASH_KIND";
const ROUNDS: usize = 10;
const TABLES: [Table; 3] = [Table::Entries, Table::Nodes, Table::Log];

/// Commit `n` adds a row to each of three tables; only a durable one is acknowledged.
fn commit_numbered(store: &dyn Store, n: u64) -> Durability {
    let mut batch = Batch::default();
    for table in TABLES {
        batch.put(table, n.to_be_bytes(), vec![n as u8; (n % 300) as usize]);
    }
    let durability = if n.is_multiple_of(3) { Durability::Durable } else { Durability::Relaxed };
    store.commit(batch, durability).unwrap();
    durability
}

/// The last commit that is there, after checking that it and all before it are whole.
fn check_numbered(store: &dyn Store) -> u64 {
    let snapshot = store.snapshot().unwrap();
    let [entries, nodes, log] = TABLES.map(|t| scan(&*snapshot, t, b"", None));
    assert!(entries == nodes && nodes == log, "a torn batch");
    for (at, (key, value)) in entries.iter().enumerate() {
        let n = at as u64 + 1;
        assert_eq!(*key, n.to_be_bytes(), "a hole before a later commit");
        assert_eq!(*value, vec![n as u8; (n % 300) as usize]);
    }
    entries.len() as u64
}

#[test]
#[ignore = "the child process of no_acknowledged_commit_is_lost_by_a_kill"]
fn commits_until_killed() {
    let dir = PathBuf::from(std::env::var_os(CHILD_DIR).expect("started by the crash test"));
    let kind: usize = std::env::var(CHILD_KIND).unwrap().parse().unwrap();
    let store = open(&KINDS[kind], &dir);
    let begin = check_numbered(&*store) + 1;
    for n in begin.. {
        if commit_numbered(&*store, n) == Durability::Durable {
            eprintln!("{n}");
        }
    }
}

/// Runs a child, kills it a moment after its `acks`th acknowledgement, returns the last one.
fn run_and_kill(kind: usize, dir: &Path, acks: usize, moment: std::time::Duration) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "index::suite::commits_until_killed", "--nocapture"])
        .env(CHILD_DIR, dir)
        .env(CHILD_KIND, kind.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut heard = Vec::new();
    for line in lines.by_ref().take(acks) {
        heard.push(line.unwrap());
    }
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
    heard.extend(lines.map(Result::unwrap));
    let numbers: Vec<u64> = heard.iter().filter_map(|l| l.parse().ok()).collect();
    *numbers.last().unwrap_or_else(|| panic!("the child failed: {heard:?}"))
}

#[test]
fn no_acknowledged_commit_is_lost_by_a_kill() {
    for (number, kind) in KINDS.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..ROUNDS {
            let acks = rand::random_range(1..60);
            let moment = std::time::Duration::from_micros(rand::random_range(0..3000));
            let acknowledged = run_and_kill(number, dir.path(), acks, moment);
            let found = check_numbered(&*open(kind, dir.path()));
            assert!(
                found >= acknowledged,
                "{}, round {round}: {acknowledged} was acknowledged, {found} is there",
                kind.file
            );
        }
    }
}
