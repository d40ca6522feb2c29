//! Damage that is done behind the cache's back, and what an audit says of it.

use super::tests::{GROUP, bytes_of, crash, fill, key_of, open, read_all};
use super::*;
use crate::content::manifest::GROUP_BYTES;
use std::ops::ControlFlow;
use tempfile::TempDir;

const READ: Thorough = Thorough { hashes: true, mends: false };
const MEND: Thorough = Thorough { hashes: true, mends: true };

fn audit(cache: &Arc<Cache>, how: Thorough) -> Audited {
    cache.audit(how, &mut |_| ControlFlow::Continue(()))
}

/// A cache with one whole content of three groups, which nobody has open.
fn kept() -> (TempDir, Arc<Cache>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 64 << 20);
    let bytes = bytes_of(1, 3 * GROUP);
    fill(&cache, &bytes);
    (dir, cache, bytes)
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_cache_that_nobody_touched_is_sound() {
    let (_dir, cache, bytes) = kept();
    let sound = Audited { files: 1, bytes: 3 * GROUP_BYTES, ..Audited::default() };
    assert_eq!(audit(&cache, READ), sound);
    let quick = Thorough { hashes: false, ..READ };
    assert_eq!(audit(&cache, quick), Audited { bytes: 0, unproved: 1, ..sound });
    let part = cache.file(key_of(&bytes_of(2, 2 * GROUP)), 2 * GROUP_BYTES);
    assert!(part.write(0, &bytes_of(2, 2 * GROUP)[..GROUP]));
    let with_part = Audited { files: 2, unproved: 1, ..sound };
    assert_eq!(audit(&cache, MEND), with_part, "its map is in memory only");
    part.save();
    drop(part);
    assert_eq!(audit(&cache, MEND), with_part);
    assert_eq!(read_all(&cache.file(key_of(&bytes), 3 * GROUP_BYTES)).unwrap(), bytes);
}

#[test]
fn a_flipped_bit_is_found_dropped_and_fetched_again() {
    for is_open in [false, true] {
        let (_dir, cache, bytes) = kept();
        let key = key_of(&bytes);
        let held = is_open.then(|| cache.file(key, bytes.len() as u64));
        assert!(held.as_ref().is_none_or(|held| held.whole().is_some()));
        flip(&key.path(&cache.dir), 70_000);
        assert_eq!(audit(&cache, READ).damaged, 1);
        let Audited { damaged, mended, .. } = audit(&cache, MEND);
        assert_eq!((damaged, mended), (1, 1));
        assert_eq!(audit(&cache, READ), Audited::default());
        assert_eq!(cache.stats().bytes, 0);
        drop(held);
        assert_eq!(read_all(&fill(&cache, &bytes)).unwrap(), bytes);
        assert_eq!(audit(&cache, READ).faults(), 0);
    }
}

#[test]
fn a_file_that_is_cut_or_gone_is_found() {
    let (_dir, cache, bytes) = kept();
    let path = key_of(&bytes).path(&cache.dir);
    fs::write(&path, &bytes[..GROUP]).unwrap();
    assert_eq!(audit(&cache, READ).damaged, 1);
    fs::remove_file(&path).unwrap();
    let gone = Audited { files: 1, missing: 1, ..Audited::default() };
    assert_eq!(audit(&cache, READ), gone);
    assert_eq!(audit(&cache, MEND), Audited { mended: 1, ..gone });
    assert_eq!(audit(&cache, READ), Audited::default());
    assert_eq!((cache.stats().files, cache.stats().bytes), (0, 0));
}

#[test]
fn a_part_that_its_map_does_not_fit_is_found() {
    let (_dir, cache, _) = kept();
    let bytes = bytes_of(2, 4 * GROUP);
    let key = key_of(&bytes);
    let part = || cache.file(key, bytes.len() as u64);
    let write = || {
        let part = part();
        assert!(part.write(GROUP_BYTES, &bytes[GROUP..3 * GROUP]));
        part.save();
    };
    write();
    assert_eq!(audit(&cache, READ).faults(), 0);
    File::options().write(true).open(cache.part_path(key)).unwrap().set_len(GROUP_BYTES).unwrap();
    assert_eq!(audit(&cache, MEND).damaged, 1);
    assert_eq!(part().missing(0..4), [0..4]);
    write();
    flip(&cache.map_path(key), 30);
    assert_eq!(audit(&cache, MEND).damaged, 1);
    assert_eq!(audit(&cache, MEND).faults(), 0);
    assert_eq!(part().missing(0..4), [0..4]);
}

#[test]
fn files_that_nothing_knows_are_found_and_removed() {
    let (_dir, cache, bytes) = kept();
    let directory = key_of(&bytes).path(&cache.dir).parent().unwrap().to_owned();
    let other = key_of(&bytes_of(3, 9)).path(&cache.dir);
    fs::create_dir_all(other.parent().unwrap()).unwrap();
    for stray in [&directory.join("notes.txt"), &other, &other.with_extension("part")] {
        fs::write(stray, "whose").unwrap();
    }
    assert_eq!(audit(&cache, READ).strays, 3);
    let Audited { strays, mended, .. } = audit(&cache, MEND);
    assert_eq!((strays, mended), (3, 3));
    assert_eq!(audit(&cache, READ).faults(), 0);
    assert_eq!(read_all(&cache.file(key_of(&bytes), 3 * GROUP_BYTES)).unwrap(), bytes);
}

#[test]
fn what_a_crash_of_the_machine_left_is_judged_by_its_hash() {
    let (dir, cache, bytes) = kept();
    let damaged = bytes_of(2, GROUP);
    fill(&cache, &damaged);
    flip(&key_of(&damaged).path(&cache.dir), 5);
    drop(cache);
    crash(dir.path());
    let cache = open(dir.path(), 64 << 20);
    let found = audit(&cache, READ);
    assert_eq!((found.files, found.damaged, found.strays), (2, 1, 0));
    assert_eq!(audit(&cache, MEND).mended, 1);
    assert_eq!((audit(&cache, READ).files, audit(&cache, READ).faults()), (1, 0));
    assert!(cache.file(key_of(&bytes), 3 * GROUP_BYTES).check());
    assert_eq!((audit(&cache, READ).files, audit(&cache, READ).faults()), (1, 0));
}

/// Beside readers who fill it and evictions, nothing is ever called damaged, missing or stray.
#[test]
fn a_cache_in_use_gives_no_false_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), (40 * GROUP) as u64);
    let audited = std::thread::scope(|scope| {
        let using = scope.spawn(|| {
            for n in 0..400_u32 {
                let bytes = bytes_of((n % 97) as u8, GROUP * (1 + n as usize % 4));
                let file = cache.file(key_of(&bytes), bytes.len() as u64);
                for (at, group) in bytes.chunks(GROUP).enumerate() {
                    file.write((at * GROUP) as u64, group);
                }
                if n % 7 == 0 {
                    file.discard();
                }
            }
        });
        let mut audits = Vec::new();
        while !using.is_finished() {
            audits.push(audit(&cache, MEND));
        }
        audits
    });
    assert!(audited.iter().any(|audited| audited.files > 5), "it was audited while in use");
    for found in audited {
        assert_eq!((found.faults(), found.unread), (0, 0), "{found:?}");
    }
}

#[test]
fn whoever_listens_may_end_it() {
    let (_dir, cache, _) = kept();
    let ended = cache.audit(MEND, &mut |_| ControlFlow::Break(()));
    assert_eq!((ended.faults(), ended.mended), (0, 0));
}
