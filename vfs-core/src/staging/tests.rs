//! What drafts promise, against a vector of bytes.

use super::body::MOST_IN_MEMORY;
use super::{Committed, DraftId, MEMORY_BYTES, Piece, Staging};
use crate::error::Kind;
use crate::journal::{Horizon, Lsn};
use crate::model::ContentId;
use proptest::prelude::*;
use std::collections::HashSet;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Draft;

fn staging(dir: &Path) -> Arc<Staging> {
    with_memory(dir, MEMORY_BYTES)
}

fn with_memory(dir: &Path, bytes: u64) -> Arc<Staging> {
    let staging = Staging::open(dir).unwrap();
    staging.set_min_free_bytes(0);
    staging.set_memory_bytes(bytes);
    staging
}

fn file_of(dir: &Path, draft: DraftId) -> PathBuf {
    let hex = format!("{:016x}", draft.0);
    dir.join(&hex[..2]).join(hex)
}

/// All bytes of a draft, over this base.
fn contents(draft: &Draft, base: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in draft.read(0, u64::MAX).unwrap() {
        match piece {
            Piece::Here(here) => bytes.extend_from_slice(&here),
            Piece::Base(range) => bytes.extend_from_slice(&base[to_usize(range)]),
            Piece::Zero(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
    }
    assert_eq!(bytes.len() as u64, draft.size());
    bytes
}

fn to_usize(range: Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

/// The file as its owner has it after applying a commit to what it has.
fn apply(draft: &Draft, committed: &Committed, base: &[u8]) -> Vec<u8> {
    let snapshot = &committed.snapshot;
    let mut bytes = base.to_vec();
    bytes.truncate(snapshot.kept_bytes as usize);
    assert_eq!(bytes.len() as u64, snapshot.kept_bytes, "what is kept is there");
    bytes.resize(snapshot.size as usize, 0);
    for extent in snapshot.extents.iter() {
        let range = extent.at..extent.at + extent.len;
        let part = draft.snapshot_read(snapshot, range.clone()).unwrap();
        bytes[to_usize(range)].copy_from_slice(&part);
    }
    bytes
}

/// One file, its writer and its owner.
struct Pair {
    memory_bytes: u64,
    dir: tempfile::TempDir,
    staging: Arc<Staging>,
    draft: Arc<Draft>,
    model: Vec<u8>,
    /// What the owner has.
    base: Vec<u8>,
    /// Committed and not yet settled, with what the file was then.
    journal: Vec<(Committed, Vec<u8>)>,
}

impl Pair {
    fn new(base_size: usize) -> Self {
        Self::with_memory(base_size, MEMORY_BYTES)
    }

    fn with_memory(base_size: usize, memory_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let staging = with_memory(dir.path(), memory_bytes);
        let draft = staging.create(base_size as u64).unwrap();
        let base: Vec<u8> = (0..base_size).map(|n| (n % 251) as u8 + 1).collect();
        let model = base.clone();
        Self { memory_bytes, dir, staging, draft, model, base, journal: Vec::new() }
    }

    fn check(&self) {
        assert!(contents(&self.draft, &self.base) == self.model, "the draft is not the model");
        for (committed, then) in &self.journal {
            // Each can be applied to what the owner has now.
            assert!(apply(&self.draft, committed, &self.base) == *then, "a snapshot changed");
        }
    }

    fn write(&mut self, offset: usize, len: usize, byte: u8) {
        let bytes = vec![byte; len];
        self.draft.write(offset as u64, &bytes).unwrap();
        if len > 0 {
            self.model.resize(self.model.len().max(offset + len), 0);
            self.model[offset..offset + len].copy_from_slice(&bytes);
        }
    }

    fn set_size(&mut self, size: usize) {
        self.draft.set_size(size as u64).unwrap();
        self.model.resize(size, 0);
    }

    fn zero(&mut self, range: Range<usize>) {
        self.draft.zero(range.start as u64..range.end as u64).unwrap();
        let end = range.end.min(self.model.len());
        if range.start < end {
            self.model[range.start..end].fill(0);
        }
    }

    fn commit(&mut self, inline_max: u64) {
        let committed = self.draft.commit(inline_max).unwrap();
        assert!(!self.draft.is_dirty());
        let filled: u64 = committed.fill.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        assert!(filled <= inline_max);
        let (digest, whole) = self.draft.digest(&committed.snapshot).unwrap();
        let written: Vec<u8> = committed
            .snapshot
            .extents
            .iter()
            .flat_map(|e| self.model[to_usize(e.at..e.at + e.len)].to_vec())
            .collect();
        assert_eq!(digest, *blake3::hash(&written).as_bytes());
        let is_whole = committed.snapshot.kept_bytes == 0;
        let expected = is_whole.then(|| ContentId::of(&self.model));
        assert_eq!(whole, expected);
        self.journal.push((committed, self.model.clone()));
    }

    /// The owner takes one commit; those before it are not needed any more.
    fn deliver(&mut self, n: usize) {
        if n >= self.journal.len() {
            return;
        }
        let (committed, then) = &self.journal[n];
        self.base = apply(&self.draft, committed, &self.base);
        assert!(self.base == *then);
        self.draft.delivered(&committed.snapshot);
        for (committed, _) in self.journal.drain(..=n) {
            self.draft.release(&committed.snapshot);
        }
    }

    /// The machine stops: of what was not synced anything may be lost, and is.
    fn crash(&mut self, names_too: bool) {
        let (unsynced, unnamed) = self.draft.volatile();
        let path = file_of(self.dir.path(), self.draft.id());
        if path.exists() {
            let file = fs::File::options().write(true).open(&path).unwrap();
            for range in unsynced {
                let garbage = vec![0xee; (range.end - range.start) as usize];
                file.write_all_at(&garbage, range.start).unwrap();
            }
            if unnamed && names_too {
                fs::remove_file(&path).unwrap();
            }
        }
        self.staging = with_memory(self.dir.path(), self.memory_bytes);
        let mut draft = None;
        for (committed, _) in &self.journal {
            draft = Some(self.staging.restore(&committed.snapshot, &committed.fill).unwrap());
        }
        let needed: HashSet<_> = draft.iter().map(|draft| draft.id()).collect();
        self.staging.remove_all_but(&needed).unwrap();
        self.draft = match draft {
            Some(draft) => draft,
            None => self.staging.create(self.base.len() as u64).unwrap(),
        };
        self.model = self.journal.last().map_or(&self.base, |(_, then)| then).clone();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u8),
    Append(usize, u8),
    SetSize(usize),
    Zero(usize, usize),
    Commit(u64),
    Deliver(usize),
    Crash(bool),
    SyncAll,
}

const MOST: usize = 40_000;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = || prop_oneof![0..200usize, 0..10_000usize];
    let at = || prop_oneof![(0..10usize).prop_map(|n| n * 4096), 0..MOST];
    let step = prop_oneof![
        8 => (at(), len(), 1..=255u8).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        3 => (len(), 1..=255u8).prop_map(|(len, byte)| Step::Append(len, byte)),
        3 => at().prop_map(Step::SetSize),
        3 => (at(), len()).prop_map(|(at, len)| Step::Zero(at, len)),
        5 => prop_oneof![Just(0u64), Just(1000), Just(1 << 20)].prop_map(Step::Commit),
        3 => (0..3usize).prop_map(Step::Deliver),
        1 => any::<bool>().prop_map(Step::Crash),
        1 => Just(Step::SyncAll),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    #[test]
    fn is_a_file(
        base_size in prop_oneof![Just(0usize), 0..MOST],
        memory_bytes in prop_oneof![Just(0), 1..20_000u64, Just(MEMORY_BYTES)],
        steps in steps(),
    ) {
        let mut pair = Pair::with_memory(base_size, memory_bytes);
        for step in steps {
            match step {
                Step::Write(at, len, byte) => pair.write(at, len, byte),
                Step::Append(len, byte) => pair.write(pair.model.len(), len, byte),
                Step::SetSize(size) => pair.set_size(size),
                Step::Zero(at, len) => pair.zero(at..at + len),
                Step::Commit(inline_max) => pair.commit(inline_max),
                Step::Deliver(n) => pair.deliver(n),
                Step::Crash(names_too) => pair.crash(names_too),
                Step::SyncAll => {
                    pair.staging.sync().unwrap();
                    for (committed, _) in &mut pair.journal {
                        committed.fill = pair.draft.fill(&committed.snapshot).unwrap();
                    }
                }
            }
            pair.check();
        }
        // What nobody needs takes no space.
        pair.commit(0);
        pair.deliver(pair.journal.len() - 1);
        pair.check();
        pair.staging.remove(pair.draft.id());
        prop_assert_eq!(pair.staging.used_bytes(), 0);
        prop_assert_eq!(pair.staging.free_memory_bytes(), memory_bytes);
    }
}

#[test]
fn what_was_committed_is_never_overwritten() {
    let mut pair = Pair::new(0);
    pair.write(0, 10_000, b'a');
    pair.commit(0);
    pair.write(0, 10_000, b'b');
    pair.write(100, 50, b'c');
    pair.check();
    let (committed, then) = &pair.journal[0];
    assert_eq!(apply(&pair.draft, committed, &[]), *then);
    assert_eq!(then[..], [b'a'; 10_000]);
    // What was not committed is overwritten, and takes no more space.
    let len = || fs::metadata(file_of(pair.dir.path(), pair.draft.id())).unwrap().len();
    assert_eq!(len(), 20_000);
    pair.draft.write(0, &[b'd'; 10_000]).unwrap();
    assert_eq!(len(), 20_000);
}

/// How many files there are.
fn files_in(dir: &Path) -> usize {
    let count = |at: PathBuf| fs::read_dir(at).unwrap().count();
    fs::read_dir(dir).unwrap().map(|entry| count(entry.unwrap().path())).sum()
}

#[test]
fn a_small_draft_has_no_file_until_it_grows() {
    let mut pair = Pair::new(0);
    pair.write(0, 4096, b'a');
    pair.commit(MOST_IN_MEMORY);
    pair.write(100, 4096, b'b');
    pair.zero(0..50);
    pair.commit(MOST_IN_MEMORY);
    pair.check();
    pair.crash(true);
    pair.check();
    assert_eq!(files_in(pair.dir.path()), 0);
    // What was dropped takes space in memory only.
    pair.write(8000, 20_000, b'c');
    pair.set_size(8000);
    pair.write(8000, MOST_IN_MEMORY as usize, b'd');
    assert_eq!(files_in(pair.dir.path()), 1);
    assert_eq!(pair.staging.free_memory_bytes(), MEMORY_BYTES);
    pair.check();
    let file = fs::metadata(file_of(pair.dir.path(), pair.draft.id())).unwrap();
    assert!(file.blocks() * 512 <= file.len() - 15_000, "{}", file.blocks());
    pair.commit(MOST_IN_MEMORY);
    pair.crash(true);
    pair.check();
}

#[test]
fn drafts_that_have_no_room_in_memory_have_files() {
    let dir = tempfile::tempdir().unwrap();
    let staging = with_memory(dir.path(), 10_000);
    let small = || {
        let draft = staging.create(0).unwrap();
        draft.write(0, &[7; 4096]).unwrap();
        draft
    };
    let drafts = [small(), small(), small()];
    assert_eq!(files_in(dir.path()), 1);
    assert!(file_of(dir.path(), drafts[2].id()).exists());
    staging.remove(drafts[0].id());
    assert!(drafts[0].write(0, b"late").is_err());
    let fourth = small();
    assert_eq!(files_in(dir.path()), 1);
    // One that was in memory goes on in a file.
    fourth.write(4096, &[8; 4096]).unwrap();
    assert_eq!(files_in(dir.path()), 2);
    assert_eq!(contents(&fourth, &[]), [[7; 4096], [8; 4096]].concat());
    drop(drafts);
    drop(fourth);
    assert_eq!(staging.free_memory_bytes(), 10_000);
}

#[test]
fn after_a_sync_of_all_a_journal_needs_what_is_in_memory_and_no_more() {
    for memory_bytes in [0, MEMORY_BYTES] {
        let mut pair = Pair::with_memory(0, memory_bytes);
        pair.write(0, 100, b'a');
        pair.commit(1000);
        pair.write(50, 100, b'b');
        pair.staging.sync().unwrap();
        let (committed, _) = &mut pair.journal[0];
        committed.fill = pair.draft.fill(&committed.snapshot).unwrap();
        assert_eq!(committed.fill.len(), usize::from(memory_bytes > 0));
        pair.crash(true);
        assert_eq!(pair.model, [b'a'; 100]);
        pair.check();
    }
}

#[test]
fn bytes_that_cannot_go_into_a_file_stay_in_memory() {
    let mut pair = Pair::new(0);
    pair.write(0, 5000, b'a');
    pair.commit(MOST_IN_MEMORY);
    pair.write(5000, 5000, b'b');
    let directory = file_of(pair.dir.path(), pair.draft.id()).parent().unwrap().to_owned();
    fs::write(&directory, b"in the way").unwrap();
    assert!(pair.draft.write(0, &[1; MOST_IN_MEMORY as usize]).is_err());
    assert!(pair.draft.commit(0).is_err());
    assert!(pair.draft.is_dirty());
    pair.check();
    // The journal takes them all the same.
    pair.commit(MOST_IN_MEMORY);
    fs::remove_file(&directory).unwrap();
    pair.write(0, MOST_IN_MEMORY as usize, b'c');
    pair.check();
    pair.crash(false);
    pair.check();
}

#[test]
fn few_bytes_are_given_back_and_many_are_synced() {
    let mut pair = Pair::new(100_000);
    pair.write(5000, 100, b'a');
    pair.commit(1000);
    let fill = |pair: &Pair| pair.journal.last().unwrap().0.fill.clone();
    assert_eq!(fill(&pair), [(0, vec![b'a'; 100].into())]);
    assert_eq!(pair.draft.volatile(), (vec![0..100], true));
    // What only the journal has is given back again: the earlier record may be gone by then.
    pair.write(7000, 100, b'b');
    pair.commit(1000);
    assert_eq!(fill(&pair).iter().map(|(_, bytes)| bytes.len()).sum::<usize>(), 200);
    pair.write(9000, 900, b'c');
    pair.commit(1000);
    assert_eq!(fill(&pair), []);
    assert_eq!(pair.draft.volatile(), (vec![], false));
    pair.write(9500, 10, b'd');
    pair.commit(1000);
    assert_eq!(fill(&pair).len(), 1);
    pair.check();
}

#[test]
fn a_draft_that_lost_its_bytes_says_so() {
    let mut pair = Pair::new(0);
    pair.write(0, 5000, b'a');
    pair.commit(0);
    fs::remove_file(file_of(pair.dir.path(), pair.draft.id())).unwrap();
    let again = staging(pair.dir.path());
    let error = again.restore(&pair.journal[0].0.snapshot, &[]).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
}

#[test]
fn a_snapshot_that_means_nothing_is_refused() {
    let mut pair = Pair::new(0);
    pair.write(0, 10, b'a');
    pair.write(20, 10, b'b');
    pair.commit(100);
    let (committed, _) = &pair.journal[0];
    let with = |change: &dyn Fn(&mut Vec<super::Extent>)| {
        let mut extents = committed.snapshot.extents.to_vec();
        change(&mut extents);
        let snapshot = super::Snapshot { extents: extents.into(), ..committed.snapshot.clone() };
        pair.staging.restore(&snapshot, &committed.fill).map(drop).map_err(|e| e.kind())
    };
    assert_eq!(with(&|_| {}), Ok(()));
    for wrong in [
        with(&|e| e.reverse()),
        with(&|e| e[0].len = 0),
        with(&|e| e[1].len = 11),
        with(&|e| e[0].len = 21),
        with(&|e| e[1].at = u64::MAX),
        with(&|e| e[1].stored_at = u64::MAX - 3),
    ] {
        assert_eq!(wrong, Err(Kind::Invalid));
    }
}

#[test]
fn a_huge_sparse_file_takes_the_space_of_what_was_written() {
    const HUGE: u64 = 100 << 30;
    let dir = tempfile::tempdir().unwrap();
    let staging = staging(dir.path());
    let draft = staging.create(HUGE).unwrap();
    for n in 0..100 {
        draft.write(n << 30, &[7; 1000]).unwrap();
    }
    draft.zero((1 << 30)..(99 << 30)).unwrap();
    draft.set_size(2 * HUGE).unwrap();
    let committed = draft.commit(0).unwrap();
    assert_eq!(committed.snapshot.extents.len(), 3);
    assert_eq!(committed.snapshot.kept_bytes, HUGE);
    let on_disk = fs::metadata(file_of(dir.path(), draft.id())).unwrap().blocks() * 512;
    assert!(on_disk < 1 << 20, "{on_disk}");
    let pieces = draft.read(HUGE - 10, HUGE).unwrap();
    assert_eq!(pieces, [Piece::Base(HUGE - 10..HUGE), Piece::Zero(HUGE - 10)]);
    assert_eq!(draft.read(50 << 30, 3).unwrap(), [Piece::Here(vec![0; 3].into())]);
    // A new file with as large holes is not hashed as a whole: that would take minutes.
    let new = staging.create(0).unwrap();
    new.write(HUGE, b"end").unwrap();
    let committed = new.commit(100).unwrap();
    let (digest, whole) = new.digest(&committed.snapshot).unwrap();
    assert_eq!((digest, whole), (*blake3::hash(b"end").as_bytes(), None));
}

#[test]
fn neighbours_are_one_extent() {
    let dir = tempfile::tempdir().unwrap();
    let draft = staging(dir.path()).create(0).unwrap();
    for n in 0..5000u64 {
        draft.write(n * 10, &[n as u8; 10]).unwrap();
        if n % 1000 == 0 {
            draft.commit(1 << 20).unwrap();
        }
    }
    assert_eq!(draft.commit(1 << 20).unwrap().snapshot.extents.len(), 1);
}

#[test]
fn released_space_is_given_back() {
    const LEN: usize = 1 << 20;
    let mut pair = Pair::new(0);
    for round in 1..=10u8 {
        pair.write(0, LEN, round);
        pair.commit(0);
        // Each replaces the one before, which is then not needed.
        if pair.journal.len() > 1 {
            let (committed, _) = pair.journal.remove(0);
            pair.draft.release(&committed.snapshot);
            let gone = pair.draft.snapshot_read(&committed.snapshot, 0..10).unwrap_err();
            assert_eq!(gone.kind(), std::io::ErrorKind::NotFound);
        }
        pair.check();
        let on_disk =
            fs::metadata(file_of(pair.dir.path(), pair.draft.id())).unwrap().blocks() * 512;
        assert!(on_disk <= 2 * LEN as u64, "{on_disk}");
        assert!(pair.staging.used_bytes() <= 2 * LEN as u64);
    }
    // Not committed, so cut off at once.
    pair.write(LEN, LEN, 1);
    pair.set_size(LEN);
    let on_disk = fs::metadata(file_of(pair.dir.path(), pair.draft.id())).unwrap().blocks() * 512;
    assert!(on_disk < LEN as u64 + 8192, "{on_disk}");
    pair.check();
}

#[test]
fn a_full_disk_refuses_writes_and_keeps_what_was_written() {
    let mut pair = Pair::new(1000);
    pair.write(0, 100, b'a');
    pair.commit(1000);
    pair.staging.set_min_free_bytes(u64::MAX);
    let error = pair.draft.write(50, &[b'b'; 100]).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace);
    assert!(!pair.draft.is_dirty());
    pair.check();
    // What needs no space still works, and so do restoring and delivering.
    pair.set_size(500);
    pair.commit(1000);
    pair.crash(true);
    pair.staging.set_min_free_bytes(u64::MAX);
    pair.check();
    pair.deliver(1);
    pair.check();
    pair.staging.set_min_free_bytes(0);
    pair.write(50, 100, b'b');
    pair.check();
}

#[test]
fn orphans_are_removed_and_others_stay() {
    let dir = tempfile::tempdir().unwrap();
    let first = with_memory(dir.path(), 0);
    let (kept, orphan) = (first.create(0).unwrap(), first.create(0).unwrap());
    kept.write(0, &[1; 5000]).unwrap();
    orphan.write(0, &[2; 5000]).unwrap();
    let committed = kept.commit(0).unwrap();
    let again = staging(dir.path());
    let used = again.used_bytes();
    assert!(used >= 10_000);
    let restored = again.restore(&committed.snapshot, &committed.fill).unwrap();
    assert!(again.remove_all_but(&HashSet::from([kept.id()])).unwrap() >= 5000);
    assert_eq!(contents(&restored, &[]), [1; 5000]);
    assert!((5000..used).contains(&again.used_bytes()));
    again.remove(kept.id());
    assert_eq!(again.used_bytes(), 0);
    // A handle that is still open makes no file anew.
    assert!(restored.write(0, b"late").is_err());
    assert!(!file_of(dir.path(), kept.id()).exists());
}

#[test]
fn more_drafts_than_files_may_be_open() {
    let dir = tempfile::tempdir().unwrap();
    let staging = with_memory(dir.path(), 0);
    let drafts: Vec<_> = (0..600u64)
        .map(|n| {
            let draft = staging.create(0).unwrap();
            draft.write(0, &n.to_le_bytes()).unwrap();
            draft
        })
        .collect();
    let open = fs::read_dir("/proc/self/fd").unwrap().filter(|fd| {
        fd.as_ref()
            .is_ok_and(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.starts_with(dir.path())))
    });
    assert!(open.count() < 300);
    for (n, draft) in drafts.iter().enumerate() {
        assert_eq!(contents(draft, &[]), (n as u64).to_le_bytes());
    }
}

#[test]
fn readers_and_writers_share_a_draft() {
    let dir = tempfile::tempdir().unwrap();
    let draft = staging(dir.path()).create(0).unwrap();
    draft.write(0, &[0; 1000]).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..200u8 {
                draft.write(0, &[n; 1000]).unwrap();
                let committed = draft.commit(if n % 2 == 0 { 0 } else { 2000 }).unwrap();
                draft.release(&committed.snapshot);
            }
        });
        for _ in 0..500 {
            let bytes = contents(&draft, &[]);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a mix of two writes");
        }
    });
}

#[test]
fn a_commit_is_right_over_any_base_still_under_way() {
    // An empty state is committed between two that look alike.
    let mut pair = Pair::new(4000);
    pair.commit(0);
    pair.commit(0);
    pair.set_size(0);
    pair.commit(0);
    pair.write(0, 1, 1);
    pair.deliver(0);
    pair.deliver(0);
    pair.commit(0);
    pair.deliver(0);
    pair.check();
    // A range is made zero that a commit under way has written.
    let mut pair = Pair::new(0);
    pair.write(20_000, 1, 1);
    pair.commit(0);
    pair.write(8000, 1000, 1);
    pair.commit(0);
    pair.zero(500..8200);
    pair.deliver(0);
    pair.commit(0);
    pair.deliver(0);
    pair.check();
    // After a restart what was delivered before is not known to be the same.
    let mut pair = Pair::new(0);
    pair.write(0, 1, 1);
    pair.commit(0);
    pair.commit(0);
    pair.deliver(0);
    pair.commit(0);
    pair.crash(false);
    pair.deliver(0);
    pair.check();
}

#[test]
fn what_was_delivered_is_not_told_again() {
    let mut pair = Pair::new(0);
    for n in 0..20 {
        pair.write(n * 1000, 1000, n as u8 + 1);
        pair.commit(1 << 20);
        let snapshot = &pair.journal.last().unwrap().0.snapshot;
        let extents: Vec<_> = snapshot.extents.iter().map(|e| (e.at, e.len)).collect();
        assert_eq!(extents, [(n as u64 * 1000, 1000)]);
        assert_eq!(snapshot.kept_bytes, n as u64 * 1000);
        pair.deliver(0);
        pair.check();
    }
}

#[test]
fn nothing_is_given_up_before_the_journal_is_durable() {
    let mut pair = Pair::new(0);
    let horizon = Arc::new(Horizon::default());
    pair.staging.follow(horizon.clone());
    pair.write(0, 1 << 20, 1);
    pair.commit(0);
    horizon.set(Lsn(1), Lsn(1));
    pair.write(0, 1 << 20, 2);
    pair.commit(0);
    // The record of the second commit is written, which makes the first unneeded; then the
    // power goes, and the journal ends with the first.
    horizon.set(Lsn(2), Lsn(1));
    pair.draft.release(&pair.journal[0].0.snapshot);
    let second = pair.journal.pop().unwrap();
    pair.crash(false);
    assert_eq!(pair.model, [1; 1 << 20]);
    pair.check();
    // Or it does not, and the space is given back.
    pair.staging.follow(horizon.clone());
    pair.draft = pair.staging.restore(&second.0.snapshot, &[]).unwrap();
    pair.draft.release(&pair.journal[0].0.snapshot);
    let path = file_of(pair.dir.path(), pair.draft.id());
    let on_disk = || fs::metadata(&path).unwrap().blocks() * 512;
    assert!(on_disk() >= 2 << 20);
    horizon.set(Lsn(3), Lsn(2));
    pair.draft.release(&second.0.snapshot);
    assert!(on_disk() < 2 << 20);
    pair.staging.remove(pair.draft.id());
    assert!(path.exists());
    horizon.set(Lsn(3), Lsn(3));
    assert_eq!(pair.staging.used_bytes(), 0);
    assert!(!path.exists());
}

#[test]
fn a_commit_that_could_not_be_kept_is_made_again() {
    let mut pair = Pair::new(0);
    pair.write(0, 100, 1);
    pair.commit(1000);
    pair.write(50, 100, 2);
    let lost = pair.draft.commit(1000).unwrap();
    pair.draft.take_back(&lost.snapshot);
    assert!(pair.draft.is_dirty());
    pair.commit(1000);
    assert_eq!(pair.journal[1].0.snapshot, lost.snapshot);
    assert_eq!(pair.journal[1].0.fill, lost.fill);
    pair.crash(true);
    pair.check();
}
