//! The outbox without a drive: what survives a restart, and what is sent when.

use super::attributes::Attributes;
use super::*;
use crate::index::{LogRow, NewLocation, ROOT_PARENT, open_store};
use crate::model::{Attr, ContentId, DeviceId, FileType, LocationId, Seq, Stamp};
use crate::ops::{Applied, Base, Conflict, Obstacle, Op, Outcome};
use std::time::{Duration, Instant};

const OWNER: DeviceId = DeviceId([2; 32]);
const LOCATION: LocationId = LocationId([2; 16]);
const LOG: u64 = 7;
const ROOT: FileId = FileId::ROOT;

struct Bench {
    index: Index,
    outbox: Option<Arc<Outbox>>,
    no: LocationNo,
    dir: tempfile::TempDir,
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn attr(file_type: FileType, size: u64) -> Attr {
    let time = Time { secs: 1_700_000_000, nanos: 0 };
    Attr {
        file_type,
        perm: 0o755,
        uid: 0,
        gid: 0,
        nlink: 1,
        size,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: None,
        rdev: 0,
    }
}

fn entry(id: u64, file_type: FileType, size: u64) -> Entry {
    let attr = attr(file_type, size);
    let file_id = FileId(id);
    Entry { file_id, disk_ino: id, generation: 1, attr, content: None, target: None }
}

impl Bench {
    /// A location with a file `old` of eight bytes and an empty directory `dir`.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let index_dir = dir.path().join("index");
        std::fs::create_dir(&index_dir).unwrap();
        let index = Index::open(open_store(&index_dir).unwrap().store, DeviceId([1; 32])).unwrap();
        let new = NewLocation {
            id: LOCATION,
            owner: OWNER,
            name: "theirs".into(),
            root: None,
            read_only: false,
            shared_with: None,
        };
        let no = index.put_location(new).unwrap().no;
        let row = |seq, parent, text: &str, entry| LogRow {
            seq: Seq(seq),
            parent,
            name: name(text),
            entry: Some(entry),
        };
        let rows = vec![
            row(1, ROOT_PARENT, "root", entry(1, FileType::Directory, 0)),
            row(2, ROOT, "old", entry(10, FileType::File, 8)),
            row(3, ROOT, "dir", entry(11, FileType::Directory, 0)),
        ];
        index.apply_replica(no, LOG, rows, Seq(3)).unwrap();
        let mut bench = Self { index, outbox: None, no, dir };
        bench.open();
        bench
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("outbox")
    }

    fn open(&mut self) -> Report {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let config = OutboxConfig::default();
            match Outbox::open(&self.path(), self.index.clone(), config) {
                Ok((outbox, report)) => {
                    self.outbox = Some(outbox);
                    return report;
                }
                // The last one is just being dropped by its own thread.
                Err(OutboxError::InUse { .. }) => {
                    assert!(Instant::now() < deadline, "somebody keeps the outbox");
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The daemon ends without any warning; what the kernel has of its files stays.
    fn restart(&mut self) -> Report {
        drop(self.outbox.take());
        self.open()
    }

    fn outbox(&self) -> &Arc<Outbox> {
        self.outbox.as_ref().unwrap()
    }

    fn make(&self, text: &str, bytes: &[u8]) -> Arc<Written> {
        let made = Made::File { is_open: true };
        let (_, written) = self.outbox().make(self.no, (ROOT, &name(text)), made, 0o644).unwrap();
        let written = written.unwrap();
        self.outbox().write(&written, Offset::At(0), bytes).unwrap();
        self.outbox().flush(&written).unwrap();
        written
    }

    fn change_old(&self, offset: u64, bytes: &[u8]) -> Arc<Written> {
        let row = self.outbox().view().entry(self.no, ROOT, b"old").unwrap().unwrap();
        let generation = row.generation;
        let written = match self.outbox().written(self.no, FileId(10), generation) {
            Some(written) => written,
            None => self.outbox().writing(self.no, generation, &Arc::new(row)).unwrap(),
        };
        self.outbox().write(&written, Offset::At(offset), bytes).unwrap();
        self.outbox().flush(&written).unwrap();
        written
    }

    fn take(&self) -> Vec<Op> {
        self.outbox().sync().unwrap();
        self.outbox().take(OWNER, Lane::Small, 100, 1 << 20)
    }

    fn settle(&self, no: u64, seq: u64) {
        let stamp = Stamp {
            disk_ino: 10,
            size: 8,
            mtime: Time { secs: no as i64, nanos: 0 },
            ctime: Time::default(),
        };
        self.outbox().settle(OWNER, no, applied(stamp, seq));
    }

    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.outbox()
            .view()
            .children_from(self.no, ROOT, b"", &mut |name, _| {
                names.push(name.display().into_owned());
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        names
    }

    fn read(&self, text: &str) -> Vec<u8> {
        let entry = self.outbox().view().entry(self.no, ROOT, text.as_bytes()).unwrap().unwrap();
        let written = self.outbox().written(self.no, entry.file_id, entry.generation).unwrap();
        written.try_read(self.outbox(), 0, 1 << 20).unwrap().unwrap().to_vec()
    }
}

fn applied(version: Stamp, seq: u64) -> Outcome {
    Outcome::Applied(Applied {
        file: None,
        version: Some(version),
        seq: Seq(seq),
        log_id: LOG,
        conflict: None,
    })
}

fn inline(op: &Op) -> &[u8] {
    op.change.content().unwrap().inline.as_ref().unwrap()
}

#[test]
fn everything_accepted_is_there_after_a_restart() {
    let mut bench = Bench::new();
    let dir = (ROOT, &name("dir"));
    bench.make("new", b"bytes of the new one");
    let large = vec![7; 300_000];
    bench.make("large", &large);
    bench.outbox().rename(bench.no, dir, (ROOT, &name("moved")), MoveFlags::default()).unwrap();
    bench.outbox().unlink(bench.no, (ROOT, &name("old"))).unwrap();
    let before = bench.take();
    assert_eq!(bench.names(), ["large", "moved", "new"]);
    let epoch = bench.outbox().epoch();
    let report = bench.restart();
    assert_eq!((report.pending, report.orphan_bytes), (4, 0), "{report:?}");
    assert!(report.lost.is_empty() && report.set_aside.is_empty());
    assert_eq!(bench.names(), ["large", "moved", "new"]);
    assert_eq!(bench.read("new"), b"bytes of the new one");
    assert_eq!(bench.read("large"), large);
    assert_eq!(bench.outbox().epoch(), epoch);
    assert_eq!(bench.take(), before, "what may have been sent is the same for ever");
    let bulk = bench.outbox().take(OWNER, Lane::Bulk, 9, 9).pop().unwrap();
    let range = 100_000..100_010;
    assert_eq!(bench.outbox().read(OWNER, bulk.no, range.clone()).unwrap(), [7; 10][..]);
    assert!(bench.outbox().read(DeviceId([9; 32]), bulk.no, range).is_err());
    let content = bulk.change.content().unwrap();
    assert_eq!(content.whole, Some(ContentId::of(&large)));
}

#[test]
fn numbers_go_on_after_everything_is_settled_and_forgotten() {
    let mut bench = Bench::new();
    bench.make("new", b"x");
    let first = bench.take().pop().unwrap().no;
    bench.settle(first, 3);
    bench.outbox().checkpoint().unwrap();
    let report = bench.restart();
    assert_eq!(report.pending, 0);
    assert_eq!(bench.outbox().settled_below(OWNER), first + 1);
    bench.make("another", b"y");
    assert_eq!(bench.take().pop().unwrap().no, first + 1);
}

#[test]
fn a_checkpoint_keeps_what_waits() {
    let mut bench = Bench::new();
    bench.make("one", b"first");
    bench.change_old(0, b"12345678");
    bench.outbox().checkpoint().unwrap();
    bench.make("two", b"second");
    bench.outbox().checkpoint().unwrap();
    let report = bench.restart();
    assert_eq!(report.pending, 3, "{report:?}");
    assert_eq!((bench.read("one"), bench.read("two")), (b"first".into(), b"second".into()));
    assert_eq!(bench.read("old"), b"12345678");
}

#[test]
fn writes_that_wait_are_joined_and_sent_ones_are_not() {
    let bench = Bench::new();
    let written = bench.make("new", b"one");
    bench.outbox().write(&written, Offset::End, b" two").unwrap();
    bench.outbox().flush(&written).unwrap();
    let ops = bench.take();
    assert_eq!(ops.len(), 1);
    assert_eq!(inline(&ops[0]), b"one two");
    bench.outbox().write(&written, Offset::End, b" three").unwrap();
    bench.outbox().flush(&written).unwrap();
    bench.outbox().connection_lost(OWNER);
    let again = bench.take();
    assert_eq!(again[0], ops[0], "it may have arrived");
    assert_eq!(inline(&again[1]), b"one two three");
    let Change::Write { base, .. } = &again[1].change else { panic!("{again:?}") };
    assert_eq!(*base, Base::After(ops[0].no));
    assert_eq!(bench.outbox().settled_below(OWNER), ops[0].no);
}

#[test]
fn a_write_that_becomes_long_does_not_overtake_the_one_it_builds_on() {
    let bench = Bench::new();
    let written = bench.change_old(0, b"a");
    let first = bench.take().pop().unwrap().no;
    let write = |bytes: &[u8]| {
        bench.outbox().write(&written, Offset::At(1), bytes).unwrap();
        bench.outbox().flush(&written).unwrap();
    };
    let take_long = || bench.outbox().take(OWNER, Lane::Bulk, 1, usize::MAX);
    // Short, it may go right behind the first; it is not sent yet, so more bytes join it.
    write(b"b");
    write(&[b'c'; 100_000]);
    assert_eq!(take_long(), [], "beside the first, which its owner may not have applied");
    bench.settle(first, 100);
    assert_eq!(take_long().len(), 1);
}

#[test]
fn the_owner_is_told_to_forget_nothing_that_is_relied_on() {
    let bench = Bench::new();
    let written = bench.change_old(0, b"a");
    let first = bench.take().pop().unwrap().no;
    bench.outbox().write(&written, Offset::At(1), b"b").unwrap();
    bench.outbox().flush(&written).unwrap();
    let second = bench.take().pop().unwrap().no;
    bench.settle(first, 100);
    bench.outbox().sync().unwrap();
    assert_eq!(bench.outbox().settled_below(OWNER), first);
    bench.settle(second, 100);
    bench.outbox().sync().unwrap();
    assert_eq!(bench.outbox().settled_below(OWNER), second + 1);
}

#[test]
fn what_builds_on_an_answered_operation_names_its_version() {
    let mut bench = Bench::new();
    let written = bench.change_old(0, b"a");
    let first = bench.take().pop().unwrap().no;
    bench.settle(first, 100);
    bench.outbox().write(&written, Offset::At(1), b"b").unwrap();
    bench.outbox().flush(&written).unwrap();
    let check = |op: &Op| {
        let Change::Write { base: Base::Seen { stamp, .. }, content, .. } = &op.change else {
            panic!("{op:?}")
        };
        assert_eq!(stamp.mtime.secs, first as i64);
        assert_eq!(content.extents, [1..2], "what was delivered does not travel again");
    };
    check(&bench.take()[0]);
    drop(written);
    bench.restart();
    check(&bench.take()[0]);
}

#[test]
fn a_new_file_travels_with_its_first_close_or_after_a_while() {
    let mut bench = Bench::new();
    let made = Made::File { is_open: true };
    bench.outbox().make(bench.no, (ROOT, &name("held")), made, 0o644).unwrap();
    assert!(bench.take().is_empty());
    assert_eq!(bench.outbox().pending()[0].state, PendingState::Held);
    let deadline = Instant::now() + Duration::from_secs(20);
    let op = loop {
        if let Some(op) = bench.take().pop() {
            break op;
        }
        assert!(Instant::now() < deadline, "it never went");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(op.change.content().unwrap().whole, Some(ContentId::of(b"")));
    assert_eq!(bench.restart().pending, 1);
    assert_eq!(bench.read("held"), b"");
}

#[test]
fn dependents_follow_in_the_stream_and_stay_behind_an_obstacle() {
    let bench = Bench::new();
    let outbox = bench.outbox();
    let made = outbox.make(bench.no, (ROOT, &name("d")), Made::Directory, 0o755).unwrap().0;
    let file = Made::File { is_open: false };
    outbox.make(bench.no, (made.file_id, &name("f")), file, 0o644).unwrap();
    outbox.make(bench.no, (ROOT, &name("beside")), file, 0o644).unwrap();
    let ops = bench.take();
    assert_eq!(ops.iter().map(|op| op.no).collect::<Vec<_>>(), [1, 2, 3], "all in one stream");
    let later = || Outcome::Later(Obstacle::NoSpace);
    outbox.settle(OWNER, 1, later());
    outbox.settle(OWNER, 2, later());
    bench.settle(3, 100);
    assert!(bench.take().is_empty(), "not before the pause is over");
    assert!(matches!(&outbox.pending()[0].state, PendingState::Blocked(_)));
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut again = Vec::new();
    while again.len() < 2 {
        assert!(Instant::now() < deadline, "only {again:?} was tried again");
        again.extend(bench.take().iter().map(|op| op.no));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(again, [1, 2]);
}

#[test]
fn a_settled_operation_is_shown_until_its_rows_come_also_after_a_restart() {
    let mut bench = Bench::new();
    bench.make("new", b"bytes");
    let no = bench.take().pop().unwrap().no;
    bench.settle(no, 4);
    assert!(bench.outbox().pending().is_empty());
    bench.restart();
    assert_eq!(bench.names(), ["dir", "new", "old"]);
    assert_eq!(bench.read("new"), b"bytes");
    let row = LogRow {
        seq: Seq(4),
        parent: ROOT,
        name: name("new"),
        entry: Some(entry(12, FileType::File, 5)),
    };
    bench.index.apply_replica(bench.no, LOG, vec![row], Seq(4)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !bench.outbox().is_quiet() {
        assert!(Instant::now() < deadline, "it is still shown from here");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(bench.names(), ["dir", "new", "old"]);
    assert_eq!(bench.outbox().usage().staged_bytes, 0, "its draft is gone");
}

#[test]
fn after_a_restart_a_delivered_version_lies_under_its_bytes() {
    let mut bench = Bench::new();
    bench.change_old(6, b"XY");
    let no = bench.take().pop().unwrap().no;
    bench.settle(no, 4);
    bench.restart();
    let row = bench.outbox().view().entry(bench.no, ROOT, b"old").unwrap().unwrap();
    let written = bench.outbox().written(bench.no, FileId(10), row.generation).unwrap();
    // The one before may be nowhere any more.
    assert_eq!(written.under().attr.mtime.secs, no as i64);
    bench.change_old(0, b"xy");
    let op = bench.take().pop().unwrap();
    let Change::Write { base: Base::Seen { stamp, .. }, .. } = op.change else {
        panic!("{op:?}");
    };
    assert_eq!(stamp.mtime.secs, no as i64);
}

#[test]
fn writes_to_a_location_that_was_removed_stay() {
    let mut bench = Bench::new();
    bench.make("new", b"bytes");
    bench.outbox().sync().unwrap();
    bench.index.remove_location(bench.no).unwrap();
    let report = bench.restart();
    assert_eq!(report.pending, 1);
    let pending = bench.outbox().pending();
    assert_eq!((pending[0].location, pending[0].path.len()), (None, 1));
    let taken = bench.take();
    assert_eq!(inline(&taken[0]), b"bytes", "the owner decides");
}

#[test]
fn drained_waits_for_what_is_below() {
    let bench = Bench::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    bench.make("new", b"x");
    let drained = |path: Vec<Name>| {
        let below = Some((bench.no, path));
        runtime.block_on(bench.outbox().drained(below, Duration::from_millis(50)))
    };
    assert!(drained(vec![name("elsewhere")]).is_ok());
    assert_eq!(drained(vec![]).unwrap_err().len(), 1);
    assert!(!bench.outbox().is_awaited());
    runtime.block_on(async {
        let mut waits = std::pin::pin!(bench.outbox().reached([1].into()));
        assert!(tokio::time::timeout(Duration::ZERO, &mut waits).await.is_err());
        assert!(bench.outbox().is_awaited());
    });
    assert!(!bench.outbox().is_awaited());
    let no = bench.take().pop().unwrap().no;
    bench.settle(no, 4);
    assert!(drained(vec![]).is_ok());
}

#[test]
fn a_full_disk_is_told_to_the_writer_and_costs_nothing_accepted() {
    let bench = Bench::new();
    bench.make("before", b"bytes");
    bench.outbox().staging.set_min_free_bytes(u64::MAX);
    let made = Made::File { is_open: true };
    let tried = bench.outbox().make(bench.no, (ROOT, &name("after")), made, 0o644);
    let failed = match tried {
        Err(error) => error,
        Ok((_, written)) => {
            bench.outbox().write(&written.unwrap(), Offset::At(0), &[1; 100_000]).unwrap_err()
        }
    };
    assert_eq!(failed.kind(), Kind::NoSpace);
    assert_eq!(bench.read("before"), b"bytes");
    bench.outbox().staging.set_min_free_bytes(0);
    bench.make("later", b"more");
    assert_eq!(bench.read("later"), b"more");
}

#[test]
fn a_file_that_its_owner_calls_otherwise_stays_one_file() {
    const THEIRS: FileId = FileId(77);
    let bench = Bench::new();
    let outbox = bench.outbox();
    let written = bench.make("new", b"first");
    let made = bench.take().pop().unwrap();
    let ours = made.change.file();
    let before = bench.outbox().view().node(bench.no, ours).unwrap().unwrap();
    let stamp = Stamp { disk_ino: 77, size: 5, mtime: Time::default(), ctime: Time::default() };
    let Outcome::Applied(as_made) = applied(stamp, 9) else { unreachable!() };
    let theirs = Applied { file: Some(THEIRS), ..as_made };
    outbox.settle(OWNER, made.no, Outcome::Applied(theirs.clone()));

    // Programs see the same file, by its name and by what they have open.
    let shown = outbox.view().entry(bench.no, ROOT, b"new").unwrap().unwrap();
    assert_eq!((shown.file_id, shown.generation), (THEIRS, before.entry.generation));
    assert_eq!(outbox.view().node(bench.no, ours).unwrap().unwrap().entry, shown);
    assert_eq!(outbox.view().first(bench.no, THEIRS), ours);

    // What is written now is shown at once, and whatever follows goes after it.
    outbox.write(&written, Offset::At(0), &[8; 100_000]).unwrap();
    outbox.flush(&written).unwrap();
    assert_eq!(bench.read("new"), [8; 100_000]);
    let (new, moved) = (name("new"), name("moved"));
    outbox.rename(bench.no, (ROOT, &new), (ROOT, &moved), MoveFlags::default()).unwrap();
    assert_eq!(bench.take(), [], "the bytes go first");
    let long = outbox.take(OWNER, Lane::Bulk, 9, 9).pop().unwrap();
    let Change::Write { file: THEIRS, base, .. } = &long.change else { panic!("{long:?}") };
    assert_eq!(*base, Base::Seen { stamp, content: Some(ContentId::of(b"first")) });
    let stamp = Stamp { size: 100_000, ..stamp };
    let longer = Applied { version: Some(stamp), seq: Seq(10), ..theirs };
    outbox.settle(OWNER, long.no, Outcome::Applied(longer));
    let renamed = bench.take().pop().unwrap();
    assert!(matches!(renamed.change, Change::Rename { file: THEIRS, .. }), "{renamed:?}");

    // And by the id that this device gave it, as a kernel does that holds it.
    outbox.closed(bench.no, ours, true);
    assert_eq!(bench.names(), ["dir", "moved", "old"]);
    outbox.unlink(bench.no, (ROOT, &moved)).unwrap();
    assert!(outbox.view().node(bench.no, ours).unwrap().is_none());
}

/// What a daemon leaves that is killed now: of redb's memory nothing.
fn killed(bench: &Bench) -> tempfile::TempDir {
    fn copy(from: &std::path::Path, to: &std::path::Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let (entry, to) = entry.map(|e| (e.path(), to.join(e.file_name()))).unwrap();
            match entry.is_dir() {
                true => copy(&entry, &to),
                false => drop(std::fs::copy(&entry, &to).unwrap()),
            }
        }
    }
    let left = tempfile::tempdir().unwrap();
    copy(bench.dir.path(), left.path());
    left
}

fn opened_again(left: &tempfile::TempDir) -> (Arc<Outbox>, Report) {
    let store = open_store(&left.path().join("index")).unwrap().store;
    let index = Index::open(store, DeviceId([1; 32])).unwrap();
    Outbox::open_untended(&left.path().join("outbox"), index, OutboxConfig::default()).unwrap()
}

#[test]
fn what_was_let_go_is_in_the_index_of_a_daemon_that_is_killed_then() {
    let bench = Bench::new();
    bench.make("large", &vec![7; 300_000]);
    let op = bench.outbox().take(OWNER, Lane::Bulk, 1, 1 << 20).pop().unwrap();
    let row = entry(12, FileType::File, 300_000);
    let (file, version) = (Some(row.file_id), Some(row.stamp()));
    let applied = Applied { file, version, seq: Seq(4), log_id: LOG, conflict: None };
    bench.outbox().settle(OWNER, op.no, Outcome::Applied(applied));
    // After this the rows of a second are in memory only.
    bench.index.flush().unwrap();
    let row = LogRow { seq: Seq(4), parent: ROOT, name: name("large"), entry: Some(row) };
    bench.index.apply_replica(bench.no, LOG, vec![row], Seq(4)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !bench.outbox().is_quiet() {
        assert!(Instant::now() < deadline, "it is not let go");
        std::thread::sleep(Duration::from_millis(1));
    }
    let (outbox, _) = opened_again(&killed(&bench));
    let shown = outbox.view().entry(bench.no, ROOT, b"large").unwrap();
    assert_eq!(shown.map(|shown| (shown.file_id, shown.attr.size)), Some((FileId(12), 300_000)));
}

/// The last record of the journal, with one bit of its payload another.
fn flip_a_bit_at_the_end(outbox: &std::path::Path) {
    let logs = std::fs::read_dir(outbox.join("journal")).unwrap().map(|e| e.unwrap().path());
    let logs = logs.filter(|path| path.extension().is_some_and(|e| e == "log"));
    let last = logs.max().unwrap();
    let mut bytes = std::fs::read(&last).unwrap();
    let at = bytes.windows(4).rposition(|w| w == [0xb5, b'J', b'R', 0xe2]).unwrap();
    let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap()) as usize;
    bytes[at + 64 + len / 2] ^= 1;
    std::fs::write(&last, bytes).unwrap();
}

#[test]
fn a_file_whose_last_record_is_damaged_is_not_delivered_empty() {
    let bench = Bench::new();
    bench.make("before", b"whole");
    bench.make("new", b"bytes that a program was told are kept");
    let numbers: Vec<_> = bench.outbox().pending().iter().map(|p| p.no).collect();
    let epoch = bench.outbox().epoch();
    let left = killed(&bench);
    flip_a_bit_at_the_end(&left.path().join("outbox"));
    let (outbox, report) = opened_again(&left);
    assert_eq!((report.set_aside.len(), report.pending), (1, 2), "{report:?}");
    let aside = std::fs::read(&report.set_aside[0]).unwrap();
    assert!(aside.starts_with(&[0xb5, b'J', b'R', 0xe2]), "the whole record is kept");
    let check = |outbox: &Outbox| {
        outbox.sync().unwrap();
        outbox.try_again();
        outbox.connection_lost(OWNER);
        let sent = outbox.take(OWNER, Lane::Small, 10, 1 << 20);
        assert_eq!(sent.iter().map(|op| op.no).collect::<Vec<_>>(), numbers[..1]);
        assert_eq!(inline(&sent[0]), b"whole");
        let pending = outbox.pending();
        assert!(pending[1].stuck, "{:?}", pending[1]);
        assert!(matches!(&pending[1].state, PendingState::Blocked(why) if why.contains("damaged")));
    };
    check(&outbox);
    drop(outbox);
    // So it is after the next start, and after the journal was written anew.
    for _ in 0..2 {
        let (outbox, report) = opened_again(&left);
        assert!(report.set_aside.is_empty() && !report.torn_tail, "{report:?}");
        check(&outbox);
        outbox.checkpoint().unwrap();
    }
    // It may have been sent: its number is nobody else's, and the others' are known to their owner.
    let (outbox, _) = opened_again(&left);
    assert_eq!(outbox.epoch(), epoch);
    outbox.make(bench.no, (ROOT, &name("after")), Made::Directory, 0o755).unwrap();
    assert!(outbox.pending().last().unwrap().no > numbers[1] + 1);
}

/// An answer about another file than the one that was named.
fn answered(file: u64, size: u64, seq: u64, conflict: Option<Conflict>) -> Outcome {
    let mtime = Time { secs: seq as i64, nanos: 0 };
    let version = Some(Stamp { disk_ino: file, size, mtime, ctime: mtime });
    let file = Some(FileId(file));
    Outcome::Applied(Applied { file, version, seq: Seq(seq), log_id: LOG, conflict })
}

fn kept_as() -> Option<Conflict> {
    Some(Conflict::KeptAs(vec![name("old (conflicted copy)")]))
}

fn written_file(op: &Op) -> FileId {
    assert!(matches!(op.change, Change::Write { .. }), "{op:?}");
    op.change.file()
}

#[test]
fn what_is_written_on_in_a_file_that_was_made_again_is_kept_before_its_row_comes() {
    let bench = Bench::new();
    let written = bench.change_old(0, b"one");
    let first = bench.take().pop().unwrap();
    // Its owner has deleted it, says so, and makes it again.
    let gone = LogRow { seq: Seq(4), parent: ROOT, name: name("old"), entry: None };
    bench.index.apply_replica(bench.no, LOG, vec![gone], Seq(4)).unwrap();
    let again = Some(Conflict::MadeAgain(vec![name("old")]));
    bench.outbox().settle(OWNER, first.no, answered(77, 8, 5, again));
    bench.outbox().write(&written, Offset::At(0), b"two").unwrap();
    bench.outbox().flush(&written).unwrap();
    let second = bench.take().pop().expect("it is pending");
    assert_eq!(written_file(&second), FileId(77));
    assert_eq!(inline(&second), b"two");
}

#[test]
fn what_a_program_deleted_while_it_wrote_to_it_goes() {
    let bench = Bench::new();
    let written = bench.change_old(0, b"one");
    let first = bench.take().pop().unwrap();
    bench.outbox().unlink(bench.no, (ROOT, &name("old"))).unwrap();
    bench.outbox().write(&written, Offset::At(0), b"two").unwrap();
    bench.outbox().flush(&written).unwrap();
    let pending: Vec<_> = bench.outbox().pending().into_iter().map(|p| p.what).collect();
    assert_eq!(pending, ["write", "delete"], "not the bytes that came later");
    bench.settle(first.no, 4);
}

#[test]
fn what_follows_bytes_into_a_conflict_copy_leaves_the_file_what_it_is() {
    let bench = Bench::new();
    let outbox = bench.outbox();
    bench.change_old(0, b"mine");
    let first = bench.take().pop().unwrap();
    let set = Attributes { perm: Some(0o600), ..Attributes::default() };
    outbox.set_attributes(bench.no, FileId(10), set).unwrap();
    let attributes = bench.take().pop().unwrap();
    outbox.settle(OWNER, first.no, answered(90, 8, 4, kept_as()));
    // It builds on the bytes that went into the copy.
    outbox.settle(OWNER, attributes.no, answered(90, 8, 5, None));
    assert_eq!(outbox.view().now(bench.no, FileId(10)), FileId(10));
    let shown = outbox.view().entry(bench.no, ROOT, b"old").unwrap().unwrap();
    assert_eq!(shown.file_id, FileId(10));
}

#[test]
fn all_that_a_program_writes_after_a_conflict_goes_into_one_copy() {
    let bench = Bench::new();
    let written = bench.change_old(0, b"mine");
    let outbox = bench.outbox();
    let mut last = bench.take().pop().unwrap();
    let write = |bytes: &[u8]| {
        outbox.write(&written, Offset::At(0), bytes).unwrap();
        outbox.flush(&written).unwrap();
    };
    // One is always under way when the answer to the one before comes.
    write(b"more");
    outbox.settle(OWNER, last.no, answered(90, 8, 4, kept_as()));
    for (seq, bytes) in [(5, b"abcd"), (6, b"efgh"), (7, b"ijkl")] {
        last = bench.take().pop().unwrap();
        assert_eq!(written_file(&last), FileId(90));
        write(bytes);
        outbox.settle(OWNER, last.no, answered(90, 8, seq, None));
    }
    let rest = bench.take().pop().unwrap();
    assert_eq!(written_file(&rest), FileId(90));
    let Change::Write { base: Base::Seen { stamp, .. }, .. } = rest.change else { panic!() };
    assert_eq!(stamp.disk_ino, 90);
}
