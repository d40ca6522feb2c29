//! What the journal promises, on a disk that forgets and on a real one.

use super::record::{RECORD_HEADER, SEGMENT_HEADER};
use super::sim::{Kept, SimDisk};
use super::{Journal, JournalError, Lsn, Recovered, SEGMENT_BYTES};
use crate::error::Kind;
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::{fs, thread};

/// Small, so that a few records fill one.
const SEGMENT: u64 = 4096;

fn open(disk: &SimDisk) -> (Journal, Recovered) {
    let mut records = Vec::new();
    let (journal, mut recovered) =
        Journal::open_on(Arc::new(disk.clone()), SEGMENT, &mut |lsn, bytes| {
            records.push((lsn, bytes));
        })
        .unwrap();
    recovered.records = records;
    (journal, recovered)
}

fn payloads(recovered: &Recovered) -> Vec<Vec<u8>> {
    assert!(recovered.records.windows(2).all(|w| w[0].0 < w[1].0));
    recovered.records.iter().map(|(_, bytes)| bytes.clone()).collect()
}

/// A record that says its number and fills so many bytes.
fn record(n: usize, len: usize) -> Vec<u8> {
    let mut bytes = format!("{n}:").into_bytes();
    bytes.resize(len.max(bytes.len()), b'a' + (n % 26) as u8);
    bytes
}

/// A journal that leaves as a killed process does: without closing.
fn kill(journal: Journal) {
    std::mem::forget(journal);
}

/// What was done to a journal, and which states a crash may show.
struct History {
    disk: SimDisk,
    journal: Journal,
    /// Every state there was, and how many changes the disk had seen when it was begun.
    states: Vec<(usize, Vec<Vec<u8>>)>,
    /// How many changes the disk had seen when a state was known to be durable.
    acknowledged: Vec<(usize, usize)>,
    next: usize,
}

impl History {
    fn new(disk: SimDisk) -> Self {
        let (journal, recovered) = open(&disk);
        let states = vec![(0, payloads(&recovered))];
        let acknowledged = vec![(disk.changes(), 0)];
        Self { disk, journal, states, acknowledged, next: 0 }
    }

    fn append(&mut self, len: usize) {
        let bytes = record(self.next, len);
        self.next += 1;
        let mut state = self.states.last().unwrap().1.clone();
        state.push(bytes.clone());
        self.states.push((self.disk.changes(), state));
        self.journal.append(&bytes).unwrap();
    }

    fn sync(&mut self) {
        self.journal.sync(Lsn(u64::MAX)).unwrap();
        self.acknowledge();
    }

    fn acknowledge(&mut self) {
        self.acknowledged.push((self.disk.changes(), self.states.len() - 1));
    }

    fn checkpoint(&mut self, live: impl Fn(usize) -> bool) {
        let state = &self.states.last().unwrap().1;
        let keep = |(n, bytes): (usize, &Vec<u8>)| live(n).then(|| bytes.clone());
        let state: Vec<_> = state.iter().enumerate().filter_map(keep).collect();
        self.states.push((self.disk.changes(), state.clone()));
        self.journal.checkpoint(&mut state.into_iter()).unwrap();
        self.acknowledge();
    }

    /// The states that a crash after so many changes may show.
    fn allowed(&self, changes: usize) -> &[(usize, Vec<Vec<u8>>)] {
        let durable = self.acknowledged.iter().take_while(|(at, _)| *at <= changes).last();
        let begun = self.states.iter().take_while(|(at, _)| *at < changes).count();
        let from = durable.map_or(0, |(_, state)| *state);
        &self.states[from..begun.max(from + 1)]
    }

    fn check_crash(&self, changes: usize, kept: Kept) -> SimDisk {
        let disk = self.disk.after(changes, kept);
        let (journal, recovered) = open(&disk);
        kill(journal);
        let found = payloads(&recovered);
        let allowed = self.allowed(changes);
        assert!(
            allowed.iter().any(|(_, state)| *state == found),
            "after {changes} changes, {kept:?}: {} records, allowed {:?}",
            found.len(),
            allowed.iter().map(|(_, s)| s.len()).collect::<Vec<_>>()
        );
        assert_eq!(recovered.damage, [], "after {changes} changes, {kept:?}");
        disk
    }
}

fn workload() -> History {
    let mut history = History::new(SimDisk::default());
    for len in [10, 600, 1500, 40] {
        history.append(len);
    }
    history.sync();
    for len in [1200, 900, 30, 700] {
        history.append(len);
    }
    history.sync();
    history.append(5000);
    history.append(20);
    history.checkpoint(|n| n % 2 == 0);
    for len in [100, 2500, 1800] {
        history.append(len);
        history.sync();
    }
    history.append(300);
    history.checkpoint(|n| n != 1);
    history.append(3000);
    history.append(3000);
    history
}

#[test]
fn every_moment_of_a_power_failure_leaves_what_was_synced_and_a_prefix_of_the_rest() {
    let history = workload();
    let mut crashes = 0;
    for changes in 0..=history.disk.changes() {
        let unsynced = history.disk.unsynced(changes);
        let firsts = (1..unsynced).map(Kept::First);
        let one_lost = (0..unsynced).map(Kept::AllBut);
        let drawn = (0..if unsynced > 0 { 20 } else { 3 }).map(Kept::Some);
        for kept in
            [Kept::Nothing, Kept::All].into_iter().chain(firsts).chain(one_lost).chain(drawn)
        {
            history.check_crash(changes, kept);
            crashes += 1;
        }
    }
    assert!(crashes > 1000, "{crashes}");
}

#[test]
fn the_power_may_go_again_while_and_after_a_journal_is_mended() {
    let history = workload();
    for changes in 0..=history.disk.changes() {
        for kept in [Kept::Nothing, Kept::Sectors, Kept::Some(1), Kept::AllBut(0)] {
            let disk = history.disk.after(changes, kept);
            let begun = disk.changes();
            let (journal, recovered) = open(&disk);
            let found = payloads(&recovered);
            for again in begun..=disk.changes() {
                for kept in [Kept::Nothing, Kept::All, Kept::Some(3)] {
                    let (journal, recovered) = open(&disk.after(again, kept));
                    assert_eq!(payloads(&recovered), found, "{changes}, {again}, {kept:?}");
                    assert_eq!(recovered.damage, []);
                    kill(journal);
                }
            }
            let added: Vec<_> = (0..9).map(|n| record(100 + n, 500)).collect();
            for bytes in &added {
                journal.append(bytes).unwrap();
            }
            let all = [&found[..], &added].concat();
            let one_lost = (0..disk.unsynced(disk.changes())).map(Kept::AllBut);
            for kept in one_lost.chain((0..8).map(Kept::Some)) {
                let (journal, recovered) = open(&disk.after(disk.changes(), kept));
                let seen = payloads(&recovered);
                assert!(all.starts_with(&seen) && seen.len() >= found.len(), "{changes}, {kept:?}");
                kill(journal);
            }
            journal.sync(Lsn(u64::MAX)).unwrap();
            let (again, recovered) = open(&disk.after(disk.changes(), Kept::Nothing));
            assert_eq!(payloads(&recovered), [&found[..], &added].concat());
            kill(again);
            kill(journal);
        }
    }
}

#[test]
fn a_killed_process_loses_nothing_that_was_appended() {
    let mut history = History::new(SimDisk::default());
    for n in 0..40 {
        history.append(100 + 37 * n);
        if n % 7 == 6 {
            history.checkpoint(|n| n % 3 != 0);
        }
        let disk = history.disk.after_kill();
        let (journal, recovered) = open(&disk);
        kill(journal);
        assert_eq!(payloads(&recovered), history.states.last().unwrap().1);
        assert!(!recovered.torn_tail);
        assert_eq!(recovered.damage, []);
    }
}

#[test]
fn numbers_go_on_after_a_restart_and_a_checkpoint() {
    let disk = SimDisk::default();
    let (mut last, mut expected) = (Lsn(0), 0);
    for round in 0..5 {
        let (journal, recovered) = open(&disk);
        assert_eq!(recovered.records.len(), expected);
        expected += 2;
        assert_eq!(journal.durable().max(last), journal.durable());
        let lsn = journal.append(b"record").unwrap();
        assert!(lsn > last);
        journal.sync(lsn).unwrap();
        assert!(journal.durable() >= lsn);
        let horizon = journal.horizon();
        assert_eq!((horizon.last(), horizon.durable()), (lsn, lsn));
        let unsynced = journal.append(b"record").unwrap();
        assert_eq!((horizon.last(), horizon.durable()), (unsynced, lsn));
        last = unsynced;
        if round == 2 {
            journal
                .checkpoint(
                    &mut recovered.records.iter().map(|r| r.1.clone()).chain([b"x".to_vec()]),
                )
                .unwrap();
            expected = recovered.records.len() + 1;
        }
    }
}

/// Flips one bit of each byte of the log, one at a time: every record that it does not lie in is
/// there, and what is not there is told.
fn flip_every_byte(disk: &SimDisk, expected: &[Vec<u8>]) -> bool {
    let (mut damaged, mut ends_damaged) = (0, false);
    for (name, size) in disk.files().into_iter().filter(|(name, _)| name.ends_with(".log")) {
        for at in 0..size {
            let disk = disk.after_kill();
            disk.flip(&name, at, (at % 8) as u8);
            let (journal, recovered) = open(&disk);
            let found = payloads(&recovered);
            let lost: Vec<_> = expected.iter().filter(|record| !found.contains(record)).collect();
            assert!(lost.len() <= 1, "{name} at {at}: {} lost", lost.len());
            assert_eq!(found.len() + lost.len(), expected.len());
            if lost.is_empty() {
                assert!(recovered.damage.iter().all(|d| d.offset <= at && at < d.offset + d.bytes));
            } else {
                assert_eq!(recovered.torn_tail, recovered.damaged_tail.is_some());
                if recovered.torn_tail {
                    assert!(lost[0] == expected.last().unwrap());
                    ends_damaged = true;
                }
                let [damage] = &recovered.damage[..] else {
                    panic!("{name} at {at}: {:?}", recovered.damage)
                };
                assert!((damage.offset..damage.offset + damage.bytes).contains(&at));
                let aside = disk.aside(damage.set_aside.to_str().unwrap()).unwrap();
                assert_eq!(aside.len() as u64, damage.bytes);
                damaged += 1;
            }
            // It is told again until a checkpoint; after that it is gone.
            journal.checkpoint(&mut found.iter().cloned()).unwrap();
            drop(journal);
            let (_, recovered) = open(&disk);
            assert_eq!(payloads(&recovered), found);
            assert_eq!((recovered.damage.len(), recovered.torn_tail), (0, false));
        }
    }
    assert!(damaged > 100);
    ends_damaged
}

#[test]
fn a_flipped_bit_costs_the_record_it_is_in() {
    let mut history = History::new(SimDisk::default());
    for len in [10, 600, 1500, 40, 1200, 900] {
        history.append(len);
        history.sync();
    }
    let expected = history.states.last().unwrap().1.clone();
    let disk = history.disk.clone();
    assert!(flip_every_byte(&disk, &expected), "no later record tells of the last one");
    history.checkpoint(|n| n > 0);
    history.append(100);
    let expected = history.states.last().unwrap().1.clone();
    drop(history);
    assert!(!flip_every_byte(&disk, &expected), "a mark follows the last one");
}

#[test]
fn a_lost_segment_is_told() {
    let mut history = History::new(SimDisk::default());
    for _ in 0..8 {
        history.append(1500);
        history.sync();
    }
    let disk = history.disk.clone();
    let names: Vec<_> = disk.files().into_iter().filter(|(n, _)| n.ends_with(".log")).collect();
    super::LogDisk::remove(&disk, &names[1].0).unwrap();
    let (_, recovered) = open(&disk.after_kill());
    assert_eq!(recovered.records.len(), 6);
    assert_eq!(recovered.damage.len(), 1);
}

#[test]
fn a_full_disk_refuses_records_but_not_those_that_free_space() {
    let disk = SimDisk::with_capacity(4 * SEGMENT);
    let (journal, _) = open(&disk);
    let mut written = Vec::new();
    let error = loop {
        match journal.append(&record(written.len(), 500)) {
            Ok(_) => written.push(record(written.len(), 500)),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), Kind::NoSpace);
    let before = (journal.live_bytes(), disk.changes());
    assert_eq!(journal.append(&record(0, 3000)).unwrap_err().kind(), Kind::NoSpace);
    assert_eq!((journal.live_bytes(), disk.changes()), before);
    let mut reserved = 0;
    while journal.append_reserved(b"settled").is_ok() {
        written.push(b"settled".to_vec());
        reserved += 1;
    }
    assert!(reserved >= SEGMENT as usize / 2 / (RECORD_HEADER + 8), "{reserved}");
    journal.sync(Lsn(u64::MAX)).unwrap();
    let again = disk.after(disk.changes(), Kept::Nothing);
    let (again, recovered) = open(&again);
    assert_eq!(payloads(&recovered), written);
    kill(again);
    // Not even the checkpoint has room now; it changes nothing.
    assert_eq!(journal.checkpoint(&mut written.iter().cloned()).unwrap_err().kind(), Kind::NoSpace);
    assert!(journal.append(b"ordinary").is_err());
    disk.set_capacity(6 * SEGMENT);
    journal.checkpoint(&mut written[..2].iter().cloned()).unwrap();
    let lsn = journal.append(b"ordinary").unwrap();
    journal.sync(lsn).unwrap();
    drop(journal);
    let (_, recovered) = open(&disk.after(disk.changes(), Kept::Nothing));
    assert_eq!(payloads(&recovered), [&written[..2], &[b"ordinary".to_vec()]].concat());
}

#[test]
fn after_a_failed_sync_nothing_is_durable_until_a_checkpoint() {
    let disk = SimDisk::default();
    let (journal, _) = open(&disk);
    let first = journal.append(b"first").unwrap();
    journal.sync(first).unwrap();
    let second = journal.append(b"second").unwrap();
    disk.fail_syncs(true);
    assert_eq!(journal.sync(second).unwrap_err().kind(), Kind::Io);
    disk.fail_syncs(false);
    assert_eq!(journal.sync(second).unwrap_err().kind(), Kind::Io);
    assert_eq!(journal.durable(), first);
    journal.sync(first).unwrap();
    let third = journal.append(b"third").unwrap();
    assert!(journal.sync(third).is_err());
    disk.fail_syncs(true);
    let live = || [b"first".to_vec(), b"second".to_vec(), b"third".to_vec()].into_iter();
    assert!(journal.checkpoint(&mut live()).is_err());
    disk.fail_syncs(false);
    assert!(journal.sync(third).is_err());
    let (killed, recovered) = open(&disk.after_kill());
    assert_eq!(recovered.records.len(), 3);
    kill(killed);
    journal.checkpoint(&mut live()).unwrap();
    journal.sync(third).unwrap();
    let (_, recovered) = open(&disk.after(disk.changes(), Kept::Nothing));
    assert_eq!(payloads(&recovered), live().collect::<Vec<_>>());
}

#[test]
fn one_sync_serves_all_who_wait() {
    let disk = SimDisk::default();
    let (journal, _) = open(&disk);
    let before = disk.syncs();
    disk.hold_syncs(true);
    thread::scope(|scope| {
        let lsn = journal.append(b"first").unwrap();
        let journal = &journal;
        scope.spawn(move || journal.sync(lsn).unwrap());
        disk.wait_for_held_sync();
        for n in 0..20 {
            let lsn = journal.append(&record(n, 40)).unwrap();
            scope.spawn(move || {
                journal.sync(lsn).unwrap();
                assert!(journal.durable() >= lsn);
            });
        }
        disk.hold_syncs(false);
    });
    assert_eq!(disk.syncs() - before, 2);
}

#[test]
fn segments_are_used_again() {
    let disk = SimDisk::default();
    let (journal, _) = open(&disk);
    let mut total = 0;
    for round in 0..20 {
        for n in 0..10 {
            journal.append(&record(n, 1000)).unwrap();
        }
        journal.checkpoint(&mut [record(round, 100)].into_iter()).unwrap();
        if round == 2 {
            total = journal.total_bytes();
        }
    }
    assert_eq!(journal.total_bytes(), total);
    let on_disk: u64 = disk.files().iter().map(|(_, size)| size).sum();
    assert_eq!(on_disk, total);
    assert!(journal.live_bytes() < 1000);
}

#[test]
fn a_record_may_be_longer_than_a_segment_but_not_endless() {
    let disk = SimDisk::default();
    let (journal, _) = open(&disk);
    let long = record(1, 5 * SEGMENT as usize);
    journal.append(&long).unwrap();
    journal.append(b"short").unwrap();
    assert_eq!(
        journal.append(&vec![0; super::MAX_RECORD_BYTES + 1]).unwrap_err().kind(),
        Kind::FileTooLarge
    );
    drop(journal);
    let (_, recovered) = open(&disk);
    assert_eq!(payloads(&recovered), [long, b"short".to_vec()]);
}

#[derive(Clone, Debug)]
enum Step {
    Append(usize),
    Sync,
    Checkpoint(usize),
    Kill,
    PowerFailure(usize, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..2000usize).prop_map(Step::Append),
        1 => (3000..9000usize).prop_map(Step::Append),
        3 => Just(Step::Sync),
        1 => (1..4usize).prop_map(Step::Checkpoint),
        1 => Just(Step::Kill),
        1 => (0..40usize, any::<u64>()).prop_map(|(back, seed)| Step::PowerFailure(back, seed)),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..Default::default() })]

    /// Crashes upon crashes: each shows an allowed state, from which it goes on.
    #[test]
    fn is_a_log(steps in steps()) {
        let mut history = History::new(SimDisk::default());
        for step in steps {
            match step {
                Step::Append(len) => history.append(len),
                Step::Sync => history.sync(),
                Step::Checkpoint(every) => history.checkpoint(|n| n % every == 0),
                Step::Kill => {
                    let state = history.states.last().unwrap().1.clone();
                    let (disk, next) = (history.disk.after_kill(), history.next);
                    kill(history.journal);
                    history = History { next, ..History::new(disk) };
                    prop_assert_eq!(&history.states[0].1, &state);
                }
                Step::PowerFailure(back, seed) => {
                    let first = history.acknowledged[0].0;
                    let changes = history.disk.changes().saturating_sub(back).max(first);
                    let disk = history.check_crash(changes, Kept::Some(seed));
                    let next = history.next;
                    kill(history.journal);
                    history = History { next, ..History::new(disk) };
                }
            }
        }
    }

    /// Whatever lies in a directory: no panic, and nothing that was not written.
    #[test]
    fn garbage_is_no_record(
        flips in prop::collection::vec((0..3usize, 0..SEGMENT, 0..8u8), 1..200),
    ) {
        let mut history = History::new(SimDisk::default());
        for len in [10, 600, 1500, 40, 1200, 900, 2000, 100] {
            history.append(len);
        }
        let disk = history.disk.after_kill();
        let names: Vec<_> =
            disk.files().into_iter().map(|f| f.0).filter(|n| n.ends_with(".log")).collect();
        for (file, at, bit) in flips {
            disk.flip(&names[file % names.len()], at, bit);
        }
        let (journal, recovered) = open(&disk);
        let written = &history.states.last().unwrap().1;
        prop_assert!(payloads(&recovered).iter().all(|record| written.contains(record)));
        journal.append(b"it goes on").unwrap();
    }
}

#[test]
fn a_real_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let (journal, recovered) = Journal::open(&path).unwrap();
    assert!(recovered.records.is_empty() && !recovered.torn_tail);
    assert!(matches!(Journal::open(&path), Err(JournalError::InUse { .. })));
    let records: Vec<_> = (0..10).map(|n| record(n, 1000 * n)).collect();
    for bytes in &records {
        let lsn = journal.append(bytes).unwrap();
        journal.sync(lsn).unwrap();
    }
    assert_eq!(journal.total_bytes(), 2 * SEGMENT_BYTES);
    drop(journal);

    let file = fs::File::options().write(true).open(path.join("00000001.log")).unwrap();
    let first = SEGMENT_HEADER + super::record::record_bytes(24);
    file.write_all_at(b"?", first + RECORD_HEADER as u64).unwrap();
    let (journal, recovered) = Journal::open(&path).unwrap();
    assert!(payloads(&recovered) == records[1..]);
    let [damage] = &recovered.damage[..] else { panic!("{:?}", recovered.damage) };
    assert_eq!((damage.segment, damage.offset), (1, first));
    assert_eq!(fs::metadata(&damage.set_aside).unwrap().len(), damage.bytes);
    assert!(damage.set_aside.starts_with(path.join("damaged")));
    journal.checkpoint(&mut records.iter().cloned()).unwrap();
    drop(journal);

    let (_, recovered) = Journal::open(&path).unwrap();
    assert_eq!(payloads(&recovered), records);
    assert_eq!(recovered.damage, []);
}

#[test]
fn a_newer_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(Journal::open(dir.path()).unwrap());
    let path = dir.path().join("00000001.log");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] = 2;
    let sum = blake3::hash(&bytes[..64]);
    bytes[64..80].copy_from_slice(&sum.as_bytes()[..16]);
    fs::write(&path, &bytes).unwrap();
    let error = Journal::open(dir.path()).unwrap_err();
    assert!(matches!(error, JournalError::NewerFormat { found: 2, known: 1 }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
    // With a wrong checksum it is a flipped bit, not a newer format.
    bytes[70] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let (_, recovered) = Journal::open(dir.path()).unwrap();
    assert_eq!(recovered.damage.len(), 1);
}

/// What a durable record costs above what the disk itself costs:
/// `cargo test --release -p vfs-core --lib -- --ignored --nocapture cost_of_a_durable_record`,
/// with `TMPDIR` on the disk in question.
#[test]
#[ignore = "a measurement"]
fn cost_of_a_durable_record() {
    const ROUNDS: usize = 300;
    let dir = tempfile::tempdir().unwrap();
    let (journal, _) = Journal::open(&dir.path().join("journal")).unwrap();
    let path = dir.path().join("bare");
    fs::write(&path, vec![1; SEGMENT_BYTES as usize]).unwrap();
    let bare = fs::File::options().write(true).open(&path).unwrap();
    bare.sync_all().unwrap();
    let growing = fs::File::create(dir.path().join("growing")).unwrap();
    let bytes = record(1, 4608);
    let timed = |work: &mut dyn FnMut()| {
        let begun = std::time::Instant::now();
        work();
        begun.elapsed()
    };
    let mut times = [const { Vec::new() }; 3];
    for n in 0..ROUNDS {
        // Side by side, so that what else the disk does meets all of them.
        times[0].push(timed(&mut || {
            bare.write_all_at(&bytes, 8192 * (n as u64 % 500)).unwrap();
            bare.sync_data().unwrap();
        }));
        times[1].push(timed(&mut || {
            let lsn = journal.append(&bytes).unwrap();
            journal.sync(lsn).unwrap();
        }));
        times[2].push(timed(&mut || {
            growing.write_all_at(&bytes, bytes.len() as u64 * n as u64).unwrap();
            growing.sync_data().unwrap();
        }));
    }
    let appended = timed(&mut || {
        for _ in 0..1000 {
            journal.append(&bytes).unwrap();
        }
    });
    let [bare, durable, growing] = times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2]
    });
    println!("overwrite + fdatasync  {bare:?}");
    println!("append + fdatasync     {growing:?}");
    println!("journal append + sync  {durable:?}");
    println!("journal append         {:?}", appended / 1000);
    println!("ratio to overwriting   {:.2}", durable.as_secs_f64() / bare.as_secs_f64());
}
