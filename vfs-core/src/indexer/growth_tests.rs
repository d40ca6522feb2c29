//! Files that grow, on a real disk: which rows stay one version, and what is never one.

use super::growth::FORMER_FOR;
use super::tests::{Device, quick};
use super::*;
use crate::changes::{Change, Next, Noticed, Touched};
use crate::model::{ContentId, Entry, MAX_GROWTH_BYTES, Name};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;

fn bytes_of(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn append(device: &Device, path: &str, bytes: &[u8]) {
    OpenOptions::new().append(true).open(device.at(path)).unwrap().write_all(bytes).unwrap();
}

fn write_at(device: &Device, path: &str, bytes: &[u8], at: u64) {
    let file = OpenOptions::new().write(true).open(device.at(path)).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

/// With one file of these bytes, hashed.
fn with_file(bytes: &[u8]) -> (Device, Entry) {
    let device = Device::new(quick());
    fs::write(device.at("f"), bytes).unwrap();
    device.start();
    device.hashes();
    let entry = device.entry("f").unwrap();
    (device, entry)
}

/// Nothing is looked at before all of it happened.
fn at_once(device: &Device, change: impl FnOnce()) {
    device.indexer.unobserved(device.no, &[FileId::ROOT], change).unwrap();
}

/// The first row that has the size which the file has now.
fn row_of_now(device: &Device, path: &str) -> Entry {
    let size = fs::metadata(device.at(path)).unwrap().len();
    let has_size = |entry: Option<Entry>| entry.filter(|entry| entry.attr.size == size);
    device.until("row", || has_size(device.entry(path)).is_some());
    has_size(device.entry(path)).unwrap()
}

fn manifests(device: &Device) -> usize {
    let dir = device.at("../manifests");
    let folders = fs::read_dir(dir).unwrap().map(|folder| folder.unwrap());
    let folders = folders.filter(|folder| folder.file_name() != "tmp");
    folders.map(|folder| fs::read_dir(folder.path()).unwrap().count()).sum()
}

fn is_same_version(a: &Entry, b: &Entry) -> bool {
    (a.file_id, a.generation) == (b.file_id, b.generation)
}

#[test]
fn an_append_is_the_same_version_and_has_its_hash_at_once() {
    for size in [1, 70_000, 9 << 20] {
        let mut bytes = bytes_of(1, size);
        let (device, before) = with_file(&bytes);
        let mut feed = device.index.feed().subscribe();
        let more = bytes_of(2, 100_000);
        append(&device, "f", &more);
        bytes.extend(more);
        let row = row_of_now(&device, "f");
        assert!(is_same_version(&row, &before), "{row:?}");
        assert_eq!(row.content, Some(ContentId::of(&bytes)));
        let Some(Next::Batch(changes)) = feed.blocking_next() else { panic!() };
        let is_append = |change: &Change| {
            let Change::Attributes { generation, noticed: Some(noticed), .. } = change else {
                return false;
            };
            let Noticed { touched, .. } = noticed;
            (*generation, *touched) == (before.generation, Touched::Bytes)
        };
        assert!(changes.iter().any(is_append), "{changes:?}");
        device.hashes();
        assert!(is_same_version(&device.entry("f").unwrap(), &before));
    }
}

#[test]
fn a_file_that_was_empty_grows_without_having_been_hashed() {
    let device = Device::new(IndexerConfig { hash_threads: 0, ..quick() });
    ["small", "large"].iter().for_each(|name| drop(File::create(device.at(name)).unwrap()));
    device.start();
    let before = device.entry("small").unwrap();
    assert_eq!(before.content, None);
    append(&device, "small", b"line\n");
    let row = row_of_now(&device, "small");
    assert!(is_same_version(&row, &before));
    assert_eq!(row.content, Some(ContentId::of(b"line\n")));

    let before = device.entry("large").unwrap();
    append(&device, "large", &bytes_of(1, (1 << 20) + 1));
    let row = row_of_now(&device, "large");
    assert!(!is_same_version(&row, &before));
    assert_eq!(row.content, None);
}

#[test]
fn bytes_that_changed_make_another_version_however_the_file_grew() {
    type Write = fn(&Device);
    let writes: [(&str, Write); 4] = [
        ("the first byte is another", |device| {
            write_at(device, "f", b"X", 0);
            append(device, "f", b"more");
        }),
        ("the last byte is another", |device| write_at(device, "f", b"Xmore", 69_999)),
        ("cut to nothing and written anew", |device| {
            fs::write(device.at("f"), bytes_of(2, 80_000)).unwrap();
        }),
        ("nothing is longer", |device| write_at(device, "f", b"X", 50_000)),
    ];
    for (what, write) in writes {
        let (device, before) = with_file(&bytes_of(1, 70_000));
        at_once(&device, || write(&device));
        device.until(what, || device.entry("f").unwrap().stamp() != before.stamp());
        device.follows();
        let row = device.entry("f").unwrap();
        assert_eq!(row.file_id, before.file_id, "{what}");
        assert_ne!(row.generation, before.generation, "{what}");
        device.hashes();
    }
}

#[test]
fn a_file_that_was_cut_does_not_grow_back_into_its_last_version() {
    let (device, before) = with_file(&bytes_of(1, 70_000));
    File::create(device.at("f")).unwrap();
    let empty = row_of_now(&device, "f");
    append(&device, "f", &bytes_of(1, 70_001));
    assert_ne!(empty.generation, before.generation);
    assert_ne!(row_of_now(&device, "f").generation, before.generation);
}

#[test]
fn an_atomic_save_is_another_file_however_it_begins() {
    let (device, before) = with_file(b"one\n");
    fs::write(device.at("f.new"), b"one\ntwo\n").unwrap();
    fs::rename(device.at("f.new"), device.at("f")).unwrap();
    assert_ne!(row_of_now(&device, "f").file_id, before.file_id);
}

#[test]
fn what_is_too_large_to_be_read_does_not_grow() {
    let device = Device::new(quick());
    let file = File::create(device.at("f")).unwrap();
    file.set_len(MAX_GROWTH_BYTES - 1).unwrap();
    device.start();
    device.hashes();
    let before = device.entry("f").unwrap();
    append(&device, "f", b"1");
    let full = row_of_now(&device, "f");
    assert!(is_same_version(&full, &before));
    append(&device, "f", b"2");
    let over = row_of_now(&device, "f");
    assert_eq!((over.generation, over.content), (before.generation + 1, None));
}

/// The rows of a file, each once, while something goes on.
fn rows_during(device: &Device, path: &str, goes_on: impl FnOnce() + Send) -> Vec<Entry> {
    let mut rows: Vec<Entry> = Vec::new();
    std::thread::scope(|scope| {
        let going = scope.spawn(goes_on);
        while !going.is_finished() {
            rows.extend(device.entry(path).filter(|entry| rows.last() != Some(entry)));
            std::thread::sleep(Duration::from_millis(1));
        }
        going.join().unwrap();
    });
    rows
}

#[test]
fn a_log_that_never_rests_becomes_one_version_that_grows() {
    let (device, _) = with_file(b"the first line\n");
    let rows = rows_during(&device, "f", || {
        let mut log = OpenOptions::new().append(true).open(device.at("f")).unwrap();
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            log.write_all(b"a line\n").unwrap();
        }
    });
    let bytes = fs::read(device.at("f")).unwrap();
    for row in &rows {
        if let Some(content) = row.content {
            assert_eq!(content, ContentId::of(&bytes[..row.attr.size as usize]), "{row:?}");
        }
    }
    let last = rows.last().unwrap().generation;
    let of_last = rows.iter().filter(|row| row.generation == last).count();
    assert!(of_last >= 5 && of_last * 2 >= rows.len(), "{of_last} of {}", rows.len());
    device.hashes();
    assert_eq!(device.entry("f").unwrap().generation, last);
}

/// What was read while it changed may be bytes that the file never had together.
#[test]
fn what_is_overwritten_while_it_is_read_has_no_hash() {
    const TRIES: usize = 6;
    let is_hashed = |seed| {
        const SIZE: usize = 16 << 20;
        let (device, before) = with_file(&bytes_of(seed, SIZE));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let log = OpenOptions::new().write(true).open(device.at("f")).unwrap();
                for round in 0u64.. {
                    log.write_all_at(&round.to_le_bytes(), SIZE as u64 - 8).unwrap();
                    log.write_all_at(b"x", SIZE as u64 + round % 4096).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            let mut row = before.clone();
            device.until("a row", || {
                row = device.entry("f").unwrap();
                row.generation != before.generation
            });
            stop.store(true, Ordering::Relaxed);
            row.content.is_some()
        })
    };
    // Whoever writes may stand still for as long as it is read.
    let hashed = (0..TRIES).filter(|seed| is_hashed(*seed as u64)).count();
    assert!(hashed <= TRIES / 2, "{hashed}");
}

/// A log whose beginning is overwritten now and then. Each state that it had is kept, so that rows
/// can be compared by the bytes that they stand for.
#[test]
fn a_version_never_has_other_bytes_than_it_began_with() {
    let (device, _) = with_file(&bytes_of(0, 100));
    let mut states = vec![bytes_of(0, 100)];
    let seed = u64::from(std::process::id());
    let rows = rows_during(&device, "f", || {
        let log = OpenOptions::new().write(true).open(device.at("f")).unwrap();
        // Beyond the age from which it is hashed although it never rests.
        let until = Instant::now() + Duration::from_secs(8);
        for round in 0.. {
            let random = blake3::hash(&u64::to_le_bytes(seed << 32 | round));
            let [what, how, len, wait, at, byte, ..] = *random.as_bytes();
            let mut state = states.last().unwrap().clone();
            if what < 30 {
                let at = usize::from(at) % state.len();
                state[at] = byte;
                log.write_all_at(&[byte], at as u64).unwrap();
                states.push(state.clone());
            }
            if what >= 15 {
                let more = bytes_of(round, usize::from(len) + 1);
                log.write_all_at(&more, state.len() as u64).unwrap();
                state.extend(more);
                states.push(state);
            }
            if Instant::now() > until || states.len() > 4000 {
                break;
            }
            let is_pause = how < 100;
            let pause = if is_pause { u64::from(wait) / 4 } else { 0 };
            std::thread::sleep(Duration::from_millis(pause));
        }
    });
    let begins_as = |state: &Vec<u8>, row: &Entry| {
        let begun = state.get(..row.attr.size as usize);
        begun.is_some_and(|begun| Some(ContentId::of(begun)) == row.content)
    };
    let (mut grown, mut others) = (0, 0);
    for pair in rows.windows(2) {
        let [before, after] = pair else { unreachable!() };
        if before.generation != after.generation {
            others += 1;
        } else if before.content.is_none() {
            assert_eq!(before.stamp(), after.stamp(), "seed {seed}: unhashed, it cannot grow");
        } else if let Some(state) = states.iter().find(|state| begins_as(state, after)) {
            assert!(begins_as(state, before), "seed {seed}: {before:?}, then {after:?}");
            grown += usize::from(before.attr.size < after.attr.size);
        }
    }
    assert!(grown > 5 && others > 2, "seed {seed}: {grown} grew, {others} did not");
    device.follows();
    device.hashes();
}

#[test]
fn manifests_of_a_growing_file_do_not_pile_up() {
    let (device, before) = with_file(&bytes_of(1, 300_000));
    for n in 0..10 {
        append(&device, "f", &bytes_of(n, 1000));
        assert!(is_same_version(&row_of_now(&device, "f"), &before));
    }
    // Readers may still ask for what it was; with the next state, what is older goes.
    std::thread::sleep(FORMER_FOR + Duration::from_millis(10));
    append(&device, "f", b"more");
    assert!(is_same_version(&row_of_now(&device, "f"), &before));
    device.hashes();
    device.until("the last and the one before", || manifests(&device) == 2);
    let content = device.entry("f").unwrap().content.unwrap();
    assert!(device.indexer.core.manifests.get(content).is_some());
    // Nor when it becomes another version.
    std::thread::sleep(FORMER_FOR + Duration::from_millis(10));
    at_once(&device, || {
        write_at(&device, "f", b"X", 0);
        append(&device, "f", b"more");
    });
    assert!(!is_same_version(&row_of_now(&device, "f"), &before));
    device.hashes();
    device.until("the last and the one before", || manifests(&device) == 2);
}

#[test]
fn all_names_of_a_file_grow_alike() {
    let device = Device::new(quick());
    fs::write(device.at("a"), b"one\n").unwrap();
    fs::create_dir(device.at("d")).unwrap();
    fs::hard_link(device.at("a"), device.at("d/b")).unwrap();
    device.start();
    device.hashes();
    let before = device.entry("a").unwrap();
    for name in ["a", "d/b"] {
        append(&device, name, b"more\n");
        let row = row_of_now(&device, name);
        assert!(is_same_version(&row, &before));
        assert_eq!(row.content, Some(ContentId::of(&fs::read(device.at(name)).unwrap())));
        assert_eq!(device.entry("a"), device.entry("d/b"));
    }
}

/// A row is brought up to date by whoever needs it, without waiting for its turn.
#[test]
fn who_asks_for_a_row_has_the_growth_at_once() {
    let (device, before) = with_file(&bytes_of(1, 70_000));
    lock(&device.indexer.core.duties).rest_for_long();
    append(&device, "f", b"more");
    let name = Name::new(*b"f").unwrap();
    device.indexer.refresh(device.no, FileId::ROOT, &name).unwrap();
    let row = device.entry("f").unwrap();
    assert!(is_same_version(&row, &before));
    assert!(row.attr.size > before.attr.size);
}

#[test]
fn a_change_that_does_not_come_to_its_turn_is_another_version() {
    let device = Device::new(IndexerConfig { settle: Duration::from_secs(1), ..quick() });
    fs::write(device.at("f"), b"one\n").unwrap();
    device.start();
    device.hashes();
    let before = device.entry("f").unwrap();
    lock(&device.indexer.core.duties).rest_for_long();
    let file = OpenOptions::new().append(true).open(device.at("f")).unwrap();
    let began = Instant::now();
    (&file).write_all(b"two\n").unwrap();
    // Nothing else in the directory waits for it.
    fs::write(device.at("other"), b"").unwrap();
    device.until("the other", || device.entry("other").is_some());
    assert_eq!(device.entry("f").unwrap(), before);
    // What comes later, and comes again and again, does not put it off further.
    device.until("another version", || {
        std::thread::sleep(Duration::from_millis(100));
        (&file).write_all(b"more\n").unwrap();
        device.entry("f").unwrap() != before
    });
    let row = device.entry("f").unwrap();
    assert_eq!((row.generation, row.content), (before.generation + 1, None));
    assert!(began.elapsed() > Duration::from_millis(450), "{:?}", began.elapsed());
}

#[test]
fn many_growing_files_do_not_hold_up_the_others() {
    const FILES: usize = 24;
    let device = Device::new(quick());
    fs::create_dir(device.at("logs")).unwrap();
    fs::create_dir(device.at("others")).unwrap();
    let path = |n: usize| device.at(&format!("logs/{n}"));
    // Sparse, so that they cost reading and hashing but no disk.
    (0..FILES).for_each(|n| File::create(path(n)).unwrap().set_len(32 << 20).unwrap());
    device.start();
    device.hashes();
    let stop = AtomicBool::new(false);
    let mut longest = Duration::ZERO;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let open = |n| OpenOptions::new().append(true).open(path(n)).unwrap();
            let mut logs: Vec<_> = (0..FILES).map(open).collect();
            while !stop.load(Ordering::Relaxed) {
                logs.iter_mut().for_each(|log| log.write_all(b"a line\n").unwrap());
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        for n in 0..15 {
            let name = format!("others/{n}");
            std::thread::sleep(Duration::from_millis(100));
            let began = Instant::now();
            fs::write(device.at(&name), b"").unwrap();
            device.until("the other", || device.entry(&name).is_some());
            longest = longest.max(began.elapsed());
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(longest < Duration::from_millis(700), "{longest:?}");
    device.follows();
}

/// The hasher finds the file changed, again and again, and looks at it itself.
#[test]
fn hashing_and_growing_at_once_end_with_one_right_row() {
    let device = Device::new(IndexerConfig { settle: Duration::ZERO, ..quick() });
    let mut bytes = bytes_of(1, 500_000);
    fs::write(device.at("f"), &bytes).unwrap();
    device.start();
    let rows = rows_during(&device, "f", || {
        for n in 0..400u64 {
            let more = bytes_of(n, 777);
            append(&device, "f", &more);
            bytes.extend(more);
            std::thread::sleep(Duration::from_millis(n % 7));
        }
    });
    for row in rows.iter().filter(|row| row.content.is_some()) {
        // What is written at once may be seen in parts.
        let begun = ContentId::of(&bytes[..row.attr.size as usize]);
        assert_eq!(row.content, Some(begun), "{row:?}");
    }
    device.follows();
    device.hashes();
}
