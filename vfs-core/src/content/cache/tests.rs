use super::map::{decode_map, encode_map};
use super::*;
use crate::content::manifest::GROUP_BYTES;
use crate::content::ranges::RangeSet;
use bytes::Bytes;
use std::os::unix::fs::MetadataExt;

pub(super) const GROUP: usize = GROUP_BYTES as usize;

pub(super) fn bytes_of(seed: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
    bytes
}

pub(super) fn key_of(bytes: &[u8]) -> Key {
    Key::Content(ContentId::of(bytes))
}

pub(super) fn open(dir: &Path, limit_bytes: u64) -> Arc<Cache> {
    let cache = Cache::open(dir, limit_bytes);
    assert_eq!(cache.stats().problem, None);
    Arc::new(cache)
}

pub(super) fn fill(cache: &Arc<Cache>, bytes: &[u8]) -> Arc<CachedFile> {
    let file = cache.file(key_of(bytes), bytes.len() as u64);
    assert!(file.write(0, bytes));
    file
}

pub(super) fn read_all(file: &CachedFile) -> Option<Bytes> {
    file.read(0..file.size())
}

/// What a crash of the machine looks like at the next start.
pub(super) fn crash(dir: &Path) {
    fs::write(dir.join("boot"), "1\nanother boot\n").unwrap();
}

fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.map(|entry| {
        let entry = entry.unwrap();
        match entry.metadata().unwrap() {
            metadata if metadata.is_dir() => disk_bytes(&entry.path()),
            metadata => metadata.blocks() * 512,
        }
    });
    sizes.sum()
}

#[test]
fn parts_become_a_whole_that_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytes_of(1, 3 * GROUP + 5);
    {
        let cache = open(dir.path(), 1 << 20);
        let file = cache.file(key_of(&bytes), bytes.len() as u64);
        assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));
        assert_eq!(file.read(0..10), None);
        assert_eq!(
            file.read(GROUP_BYTES + 7..GROUP_BYTES + 9).unwrap(),
            bytes[GROUP + 7..GROUP + 9]
        );
        assert_eq!(file.missing(0..4), [0..1, 2..4]);
        assert!(file.whole().is_none());
        assert!(file.write(2 * GROUP_BYTES, &bytes[2 * GROUP..]));
        assert!(file.write(0, &bytes[..GROUP]));
        assert!(file.whole().is_some());
    }
    let cache = open(dir.path(), 1 << 20);
    let file = cache.file(key_of(&bytes), bytes.len() as u64);
    assert_eq!(read_all(&file).unwrap(), bytes);
    assert!(file.whole().is_some());
    assert_eq!(cache.stats().files, 1);
}

#[test]
fn a_killed_daemon_keeps_what_its_map_says_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytes_of(1, 4 * GROUP);
    let cache = open(dir.path(), 1 << 20);
    let file = cache.file(key_of(&bytes), bytes.len() as u64);
    assert!(file.write(0, &bytes[..GROUP]));
    file.save();
    assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));

    let next = open(dir.path(), 1 << 20);
    let file = next.file(key_of(&bytes), bytes.len() as u64);
    assert_eq!(file.missing(0..4), [1..4]);
    assert_eq!(file.read(0..GROUP_BYTES).unwrap(), bytes[..GROUP]);
}

#[test]
fn a_damaged_map_or_a_cut_part_is_dropped() {
    let bytes = bytes_of(1, 4 * GROUP);
    let damages: [fn(&Cache, Key); 4] = [
        |cache, key| {
            let mut map = fs::read(cache.map_path(key)).unwrap();
            map[30] ^= 1;
            fs::write(cache.map_path(key), map).unwrap();
        },
        |cache, key| {
            let map = fs::read(cache.map_path(key)).unwrap();
            fs::write(cache.map_path(key), &map[..map.len() - 1]).unwrap();
        },
        |cache, key| fs::write(cache.map_path(key), b"").unwrap(),
        |cache, key| {
            let part = File::options().write(true).open(cache.part_path(key)).unwrap();
            part.set_len(GROUP_BYTES).unwrap();
        },
    ];
    for damage in damages {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        let key = key_of(&bytes);
        let file = cache.file(key, bytes.len() as u64);
        assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));
        file.save();
        drop(file);
        damage(&cache, key);
        let cache = open(dir.path(), 1 << 20);
        let file = cache.file(key, bytes.len() as u64);
        assert_eq!(file.missing(0..4), [0..4]);
        assert_eq!(cache.stats().bytes, 0);
        assert!(file.write(0, &bytes));
        assert_eq!(read_all(&file).unwrap(), bytes);
    }
}

/// Makes every open of `path` fail for a while, as too many open files would.
fn while_unreachable(path: &Path, act: impl FnOnce()) {
    let aside = path.with_extension("aside");
    fs::rename(path, &aside).unwrap();
    std::os::unix::fs::symlink(path, path).unwrap();
    act();
    fs::remove_file(path).unwrap();
    fs::rename(aside, path).unwrap();
}

#[test]
fn an_error_that_passes_costs_nothing_that_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, part) = (bytes_of(1, GROUP), bytes_of(2, 2 * GROUP));
    let cache = Arc::new(Cache::open(dir.path(), 1 << 20));
    let open_whole = || cache.file(key_of(&whole), GROUP_BYTES);
    let open_part = || cache.file(key_of(&part), 2 * GROUP_BYTES);
    assert!(open_whole().write(0, &whole));
    {
        let file = open_part();
        assert!(file.write(0, &part[..GROUP]));
        file.save();
    }
    let kept = cache.stats().bytes;
    let opens: [(PathBuf, &dyn Fn() -> Arc<CachedFile>); 3] = [
        (key_of(&whole).path(dir.path()), &open_whole),
        (cache.map_path(key_of(&part)), &open_part),
        (cache.part_path(key_of(&part)), &open_part),
    ];
    for (path, open) in opens {
        while_unreachable(&path, || {
            let file = open();
            assert_eq!(read_all(&file), None);
            assert!(!file.write(0, &whole), "nothing is put over what is there");
            file.discard();
        });
        assert!(cache.stats().problem.is_some());
        assert_eq!(cache.stats().bytes, kept, "{}", path.display());
    }
    assert_eq!(read_all(&open_whole()).unwrap(), whole);
    assert_eq!(open_part().missing(0..2), [1..2]);
}

#[test]
fn a_suspect_that_cannot_be_read_now_is_checked_another_time() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytes_of(1, GROUP);
    drop(fill(&open(dir.path(), 1 << 20), &bytes));
    crash(dir.path());
    let cache = Arc::new(Cache::open(dir.path(), 1 << 20));
    let file = || cache.file(key_of(&bytes), GROUP_BYTES);
    while_unreachable(&cache.suspect_path(key_of(&bytes), 1), || {
        let file = file();
        assert!(file.needs_check() && file.check() && !file.needs_check());
        assert_eq!(read_all(&file), None);
        assert!(!file.write(0, &bytes));
    });
    let file = file();
    assert!(file.needs_check() && file.check());
    assert_eq!(read_all(&file).unwrap(), bytes);
}

#[test]
fn a_map_that_was_left_over_vouches_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = bytes_of(1, 3 * GROUP);
    let cache = open(dir.path(), 1 << 20);
    let key = key_of(&bytes);
    let file = cache.file(key, bytes.len() as u64);
    assert!(file.write(0, &bytes[..GROUP]));
    file.save();
    let map = fs::read(cache.map_path(key)).unwrap();
    file.discard();
    // Its removal had failed.
    fs::write(cache.map_path(key), map).unwrap();
    assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));

    let next = open(dir.path(), 1 << 20);
    let file = next.file(key, bytes.len() as u64);
    assert_eq!(file.missing(0..3), [0..3], "the first group is a hole");
}

#[test]
fn what_is_being_written_is_discarded_after_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let file = fill(&cache, &bytes_of(1, GROUP));
    let writing = file.changing();
    std::thread::scope(|scope| {
        let discarding = scope.spawn(|| file.discard());
        let early = std::time::Instant::now() + std::time::Duration::from_millis(100);
        while std::time::Instant::now() < early {
            assert!(file.is_full() && !discarding.is_finished());
            std::thread::yield_now();
        }
        drop(writing);
    });
    assert!(!file.is_full());
}

#[test]
fn after_a_crash_of_the_machine_nothing_unchecked_is_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad, part) =
        (bytes_of(1, 3 * GROUP), bytes_of(2, 3 * GROUP), bytes_of(3, 3 * GROUP));
    {
        let cache = open(dir.path(), 1 << 20);
        fill(&cache, &good);
        fill(&cache, &bad);
        let file = cache.file(key_of(&part), part.len() as u64);
        assert!(file.write(0, &part[..GROUP]));
        file.save();
    }
    let path = key_of(&bad).path(dir.path());
    let mut damaged = fs::read(&path).unwrap();
    damaged[GROUP + 1] ^= 1;
    fs::write(&path, damaged).unwrap();
    crash(dir.path());

    // A second crash, before anything was checked, changes nothing.
    drop(open(dir.path(), 1 << 20));
    crash(dir.path());
    let cache = open(dir.path(), 1 << 20);
    let file = |bytes: &[u8]| cache.file(key_of(bytes), bytes.len() as u64);
    let (good_file, bad_file, part_file) = (file(&good), file(&bad), file(&part));
    assert!(read_all(&good_file).is_none() && read_all(&bad_file).is_none());
    assert!(good_file.whole().is_none() && bad_file.whole().is_none());
    assert_eq!(part_file.missing(0..3), [0..3]);
    assert!(good_file.needs_check() && bad_file.needs_check() && !part_file.needs_check());
    assert!(good_file.check());
    assert!(!bad_file.check());
    assert_eq!(read_all(&good_file).unwrap(), good);
    assert!(good_file.whole().is_some());
    assert_eq!(bad_file.missing(0..3), [0..3]);
    assert!(bad_file.write(0, &bad));
    assert_eq!(read_all(&bad_file).unwrap(), bad);
}

#[test]
fn a_cache_closed_in_order_needs_no_check_after_a_reboot() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, part) = (bytes_of(1, 10), bytes_of(2, 3 * GROUP));
    let cache = open(dir.path(), 1 << 20);
    fill(&cache, &whole);
    let file = cache.file(key_of(&part), part.len() as u64);
    assert!(file.write(0, &part[..GROUP]));
    cache.close();
    assert!(!file.write(GROUP_BYTES, &part[GROUP..2 * GROUP]), "nothing after the mark");
    drop(file);
    assert!(Boot::read(dir.path()) == Boot::Closed);

    let cache = open(dir.path(), 1 << 20);
    assert!(Boot::read(dir.path()) == Boot::Running);
    assert_eq!(read_all(&cache.file(key_of(&whole), 10)).unwrap(), whole);
    assert_eq!(cache.file(key_of(&part), part.len() as u64).missing(0..3), [1..3]);
}

#[test]
fn the_least_recently_opened_goes_first_and_the_limit_holds() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 4 * GROUP_BYTES;
    let cache = open(dir.path(), limit);
    let files: Vec<_> = (0..4).map(|seed| bytes_of(seed, GROUP)).collect();
    files.iter().for_each(|bytes| drop(fill(&cache, bytes)));
    drop(cache.file(key_of(&files[0]), GROUP_BYTES));
    let another = bytes_of(9, GROUP);
    fill(&cache, &another);
    let is_here = |bytes: &[u8]| cache.file(key_of(bytes), GROUP_BYTES).whole().is_some();
    assert!(is_here(&files[0]) && !is_here(&files[1]) && is_here(&files[2]) && is_here(&another));
    assert_eq!(cache.stats().evicted_bytes, GROUP_BYTES);
    for seed in 10..40 {
        fill(&cache, &bytes_of(seed, GROUP));
        assert!(cache.stats().bytes <= limit);
        assert!(disk_bytes(dir.path()) <= limit + 4096);
    }
    cache.set_limit(GROUP_BYTES);
    assert_eq!(cache.stats().bytes, GROUP_BYTES);
    assert_eq!(cache.clear(), GROUP_BYTES);
    assert_eq!((cache.stats().bytes, cache.stats().files), (0, 0));
}

#[test]
fn open_files_are_not_evicted_and_what_has_no_room_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 2 * GROUP_BYTES);
    let bytes = bytes_of(1, 4 * GROUP);
    let file = cache.file(key_of(&bytes), bytes.len() as u64);
    assert!(file.write(0, &bytes[..2 * GROUP]));
    assert!(!file.write(2 * GROUP_BYTES, &bytes[2 * GROUP..]));
    assert_eq!(file.read(0..2 * GROUP_BYTES).unwrap(), bytes[..2 * GROUP]);
    assert_eq!(cache.clear(), 0);
    drop(file);
    assert_eq!(cache.clear(), 2 * GROUP_BYTES);
}

#[test]
fn a_directory_that_vanishes_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let (first, second, third) = (bytes_of(1, 2 * GROUP), bytes_of(2, 2 * GROUP), bytes_of(3, 9));
    drop(fill(&cache, &first));
    let half = cache.file(key_of(&second), 2 * GROUP_BYTES);
    assert!(half.write(0, &second[..GROUP]));
    fs::remove_dir_all(dir.path()).unwrap();

    let gone = cache.file(key_of(&first), 2 * GROUP_BYTES);
    assert_eq!(gone.missing(0..2), [0..2]);
    assert!(gone.write(0, &first));
    assert_eq!(read_all(&gone).unwrap(), first);
    assert!(half.write(GROUP_BYTES, &second[GROUP..]));
    assert_eq!(read_all(&half).unwrap(), second, "what is open stays readable");
    drop(half);
    let again = fill(&cache, &second);
    assert_eq!(read_all(&again).unwrap(), second);
    assert!(again.whole().is_some());
    assert!(fill(&cache, &third).whole().is_some());
    assert_eq!(cache.stats().problem, None);
}

#[test]
fn a_directory_that_cannot_be_used_gives_a_cache_that_keeps_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("not a directory");
    fs::write(&path, b"").unwrap();
    let cache = Arc::new(Cache::open(&path, 1 << 20));
    assert!(cache.stats().problem.is_some());
    let bytes = bytes_of(1, 100);
    let file = cache.file(key_of(&bytes), 100);
    assert!(!file.write(0, &bytes));
    assert_eq!(read_all(&file), None);
    cache.close();
}

#[test]
fn two_sizes_of_one_content_do_not_share() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let bytes = bytes_of(1, GROUP);
    let file = fill(&cache, &bytes);
    let liar = cache.file(key_of(&bytes), GROUP_BYTES + 1);
    assert!(!liar.write(0, &bytes));
    drop(liar);
    assert_eq!(read_all(&file).unwrap(), bytes);
    assert_eq!(cache.file(key_of(&bytes), GROUP_BYTES).missing(0..1), []);
}

#[test]
fn a_stamped_file_becomes_content_only_when_its_hash_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let (bytes, other) = (bytes_of(1, 2 * GROUP), bytes_of(2, 10));
    let stamped = cache.file(Key::Stamped([7; 32]), 2 * GROUP_BYTES);
    assert!(stamped.write(0, &bytes[..GROUP]));
    assert_eq!(stamped.promote(ContentId::of(&bytes)), None);
    assert!(stamped.write(GROUP_BYTES, &bytes[GROUP..]));
    assert!(stamped.whole().is_none());
    assert_eq!(stamped.promote(ContentId::of(&bytes)), Some(true));
    assert!(stamped.whole().is_some());
    assert_eq!(read_all(&cache.file(key_of(&bytes), 2 * GROUP_BYTES)).unwrap(), bytes);

    let wrong = cache.file(Key::Stamped([8; 32]), 10);
    assert!(wrong.write(0, &other));
    let content = cache.file(key_of(&bytes_of(3, 10)), 10);
    assert!(!content.adopt(&wrong));
    assert_eq!(content.missing(0..1), [0..1]);
    assert!(wrong.write(0, &other));
    let content = cache.file(key_of(&other), 10);
    assert!(content.adopt(&wrong));
    assert_eq!(read_all(&content).unwrap(), other);
    assert!(content.whole().is_some());
    assert!(!cache.knows(Key::Stamped([8; 32])));
}

#[test]
fn a_map_never_names_a_group_beyond_the_file() {
    let mut present = RangeSet::default();
    present.insert(1..3);
    let map = encode_map(3 * GROUP_BYTES, &present);
    assert_eq!(decode_map(&map, 3 * GROUP_BYTES), Some(present));
    assert_eq!(decode_map(&map, 2 * GROUP_BYTES), None);
    assert_eq!(decode_map(&map, 3 * GROUP_BYTES - 1), None);
    assert_eq!(decode_map(&[], 0), None);
}
