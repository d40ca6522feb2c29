//! The rules of the index, one by one.

use super::key;
use super::observe::root_name;
use super::read;
use super::row::{LocationRecord, Orphan, Row, State, decode, encode};
use super::store::{Durability, Snapshot, Table, open_store};
use super::*;
use crate::changes::{Change, Next};
use crate::model::{ContentId, FileType, Stamp, Time};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Bound, ControlFlow};
use std::path::Path;
use tempfile::TempDir;

pub(super) const ME: DeviceId = DeviceId([1; 32]);
pub(super) const PEER: DeviceId = DeviceId([2; 32]);
pub(super) const ID: LocationId = LocationId([7; 16]);

pub(super) fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

pub(super) fn open(dir: &Path, me: DeviceId) -> Index {
    Index::open(open_store(dir).unwrap().store, me).unwrap()
}

pub(super) fn location(owner: DeviceId) -> NewLocation {
    NewLocation {
        id: ID,
        owner,
        name: "photos".into(),
        root: Some("/home/ada/photos".into()),
        read_only: false,
        shared_with: None,
    }
}

pub(super) fn observed(text: &str, ino: u64, file_type: FileType) -> Observed {
    let time = Time { secs: 1_700_000_000 + ino as i64, nanos: 5 };
    let attr = Attr {
        file_type,
        perm: 0o644,
        uid: 1000,
        gid: 1000,
        nlink: 1,
        size: 10,
        blocks: 8,
        mtime: time,
        ctime: time,
        btime: Some(time),
        rdev: 0,
    };
    let target = (file_type == FileType::Symlink).then(|| b"target"[..].into());
    Observed { name: name(text), attr, disk_ino: ino, target }
}

fn file(text: &str, ino: u64) -> Observed {
    observed(text, ino, FileType::File)
}

fn dir(text: &str, ino: u64) -> Observed {
    observed(text, ino, FileType::Directory)
}

/// An index with one own location that has its root.
pub(super) struct Fixture {
    folder: TempDir,
    pub(super) index: Index,
    pub(super) no: LocationNo,
}

pub(super) fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let index = open(folder.path(), ME);
    let no = index.put_location(location(ME)).unwrap().no;
    index.observe_root(no, &dir("x", 1)).unwrap();
    Fixture { folder, index, no }
}

impl Fixture {
    fn list(&self, parent: FileId, listing: &[Observed]) -> BTreeMap<String, FileId> {
        let dirs = self.index.observe_directory(self.no, parent, listing.to_vec()).unwrap();
        check_invariants(&self.index, self.no);
        dirs.into_iter().map(|(name, id)| (name.display().into_owned(), id)).collect()
    }

    fn observe(&self, parent: FileId, text: &str, now: Option<Observed>) -> Option<Entry> {
        let entry = self.index.observe_entry(self.no, parent, &name(text), now).unwrap();
        check_invariants(&self.index, self.no);
        entry
    }

    fn entry(&self, parent: FileId, text: &str) -> Option<Entry> {
        self.index.view().unwrap().entry(self.no, parent, text.as_bytes()).unwrap()
    }

    fn hash(&self, entry: &Entry, content: ContentId) -> bool {
        self.index.set_content(self.no, entry.file_id, &entry.stamp(), content).unwrap()
    }

    fn unhashed(&self) -> Vec<FileId> {
        self.index.next_unhashed(self.no, 100).unwrap()
    }
}

pub(super) fn dump(index: &Index, table: Table, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    let snapshot = index.store().snapshot().unwrap();
    read::scan_prefix(&*snapshot, table, prefix, &mut |k, v| {
        rows.push((k.to_vec(), v.to_vec()));
        Ok(ControlFlow::Continue(()))
    })
    .unwrap();
    rows
}

/// What [`super::tx`] promises, checked on the bare tables.
pub(super) fn check_invariants(index: &Index, no: LocationNo) {
    let prefix = key::location(no);
    let table = |t| dump(index, t, &prefix).into_iter().collect::<BTreeMap<_, _>>();
    let (entries, nodes, log) = (table(Table::Entries), table(Table::Nodes), table(Table::Log));
    let tombstones = table(Table::Tombstones);
    let snapshot = index.store().snapshot().unwrap();
    let (mut counts, mut contents) = (Counts::default(), BTreeSet::new());
    for (k, v) in &entries {
        let (parent, name) = (key::entry_parent(k).unwrap(), key::entry_name(k).unwrap());
        let Row { seq, entry } = decode(v, "").unwrap();
        assert!(entry.is_valid(), "{entry:?}");
        let place = key::parent_and_name(parent, name.as_bytes());
        assert_eq!(log.get(&key::log(no, seq)), Some(&place), "the place of {name:?} in the log");
        assert!(nodes.contains_key(&key::node(no, entry.file_id, parent, name.as_bytes())));
        assert!(!tombstones.contains_key(k), "{name:?} is both there and gone");
        contents.extend(entry.content.map(|c| key::content(c, no, entry.file_id).to_vec()));
        if parent != ROOT_PARENT {
            add_to(&mut counts, &entry);
        }
    }
    assert_eq!(nodes.len(), entries.len());
    assert_eq!(log.len(), entries.len() + tombstones.len(), "one place in the log for each name");
    for (k, seq) in &tombstones {
        let seq = Seq(u64::from_be_bytes(seq.as_slice().try_into().unwrap()));
        assert_eq!(log[&key::log(no, seq)], k[2..], "the place of a tombstone");
    }
    let listed = dump(index, Table::Content, b"").into_iter().map(|r| r.0);
    let found: BTreeSet<_> = listed.filter(|k| key::content_location(k) == Some(no)).collect();
    assert_eq!(found, contents);
    let state: State =
        decode(&snapshot.get(Table::Meta, &key::state(no)).unwrap().unwrap(), "").unwrap();
    assert_eq!(state.tombstones, tombstones.len() as u64);
    assert_eq!((state.counts, index.counts(no)), (counts, counts));
    assert_eq!(state.head, index.head(no));
    check_queue(&*snapshot, index, no);
}

fn add_to(counts: &mut Counts, entry: &Entry) {
    counts.entries += 1;
    counts.directories += u64::from(entry.attr.file_type == FileType::Directory);
    if entry.attr.file_type == FileType::File {
        let hashed = u64::from(entry.content.is_some());
        counts.files += 1;
        counts.bytes += entry.attr.size;
        counts.hashed_files += hashed;
        counts.hashed_bytes += hashed * entry.attr.size;
    }
}

/// Each queued file has a name, each inode a file or an orphan.
fn check_queue(snapshot: &dyn Snapshot, index: &Index, no: LocationNo) {
    let mut seen = BTreeSet::new();
    for (k, _) in dump(index, Table::Unhashed, &key::location(no)) {
        let file = key::last_file(&k).unwrap();
        assert!(read::has_name(snapshot, no, file).unwrap(), "{file:?} is queued without a name");
        assert!(seen.insert(file), "{file:?} is queued twice");
    }
    for (_, v) in dump(index, Table::Disk, &key::location(no)) {
        let file = key::split_file(&v).unwrap();
        let known = read::has_name(snapshot, no, file).unwrap()
            || matches!(read::orphan(snapshot, no, file).unwrap(), Some(Orphan::Lost(_)));
        assert!(known, "the inode of {file:?} is known, the file is not");
    }
}

#[test]
fn a_listing_that_is_as_before_costs_nothing() {
    let f = fixture();
    let listing = [dir("d", 10), file("a", 11), observed("l", 12, FileType::Symlink)];
    let first = f.list(FileId::ROOT, &listing);
    let head = f.index.head(f.no);
    let mut feed = f.index.feed().subscribe();
    assert_eq!(f.list(FileId::ROOT, &listing), first);
    assert_eq!(first.keys().collect::<Vec<_>>(), ["d"]);
    assert_eq!(f.index.head(f.no), head);
    f.observe(
        FileId::ROOT,
        "a",
        Some(Observed { attr: Attr { size: 11, ..listing[1].attr }, ..listing[1].clone() }),
    );
    let Some(Next::Batch(batch)) = feed.blocking_next() else { panic!("nothing was announced") };
    let [Change::Entry { location, parent, name, was: Some(was), now: Some(now) }] = &batch[..]
    else {
        panic!("the first change is that of the second observation: {batch:?}")
    };
    assert_eq!((*location, *parent, name.as_bytes()), (f.no, FileId::ROOT, &b"a"[..]));
    assert_eq!((was.file, was.generation + 1, now.size), (now.file, now.generation, 11));
}

#[test]
fn a_huge_directory_is_written_in_several_commits() {
    let f = fixture();
    let listing: Vec<_> = (0..10_000).map(|n| file(&format!("{n}"), 100 + n)).collect();
    f.list(FileId::ROOT, &listing);
    assert_eq!(f.index.counts(f.no).files, 10_000);
    f.list(FileId::ROOT, &listing[..1]);
    assert_eq!(f.index.counts(f.no).files, 1);
}

#[test]
fn children_are_in_byte_order_and_can_be_continued() {
    let f = fixture();
    let texts = ["a", "a.b", "a\n", "aa", "b", "ö"];
    let listing: Vec<_> = texts.iter().zip(10..).map(|(t, ino)| file(t, ino)).collect();
    f.list(FileId::ROOT, &listing);
    let mut expected: Vec<_> = texts.map(name).to_vec();
    expected.sort();
    let view = f.index.view().unwrap();
    for skip in 0..=expected.len() {
        let after = skip.checked_sub(1).map(|n| &expected[n]);
        let mut seen = Vec::new();
        view.children(f.no, FileId::ROOT, after, &mut |n, _| {
            seen.push(n.clone());
            ControlFlow::Continue(())
        })
        .unwrap();
        assert_eq!(seen, expected[skip..]);
    }
}

#[test]
fn a_renamed_file_keeps_its_id_and_its_hash_in_whatever_order_it_is_seen() {
    for source_first in [true, false] {
        let f = fixture();
        let dirs = f.list(FileId::ROOT, &[dir("from", 10), dir("to", 11)]);
        f.list(dirs["from"], &[file("a", 20)]);
        let before = f.entry(dirs["from"], "a").unwrap();
        let content = ContentId::of(b"a");
        assert!(f.hash(&before, content));
        if source_first {
            f.list(dirs["from"], &[]);
            assert_eq!(f.index.view().unwrap().holders(content).unwrap(), []);
        }
        f.list(dirs["to"], &[file("b", 20)]);
        f.list(dirs["from"], &[]);
        let after = f.entry(dirs["to"], "b").unwrap();
        assert_eq!(after, Entry { content: Some(content), ..before });
        assert_eq!(f.index.view().unwrap().holders(content).unwrap(), [(f.no, after.file_id)]);
        assert_eq!(f.index.sweep_orphans(100).unwrap(), 0);
    }
}

#[test]
fn a_renamed_directory_changes_one_row_and_its_old_name() {
    for source_first in [true, false] {
        let f = fixture();
        let dirs = f.list(FileId::ROOT, &[dir("d", 10), dir("to", 11)]);
        let below: Vec<_> = (0..50).map(|n| file(&format!("{n}"), 20 + n)).collect();
        f.list(dirs["d"], &below);
        let head = f.index.head(f.no);
        let rename = [
            || vec![dir("to", 11)], // the root without it
            || vec![dir("e", 10)],  // and the directory that now has it
        ];
        if source_first {
            f.list(FileId::ROOT, &rename[0]());
            assert_eq!(f.index.view().unwrap().path(f.no, dirs["d"]).unwrap(), None);
        }
        f.list(dirs["to"], &rename[1]());
        f.list(FileId::ROOT, &rename[0]());
        let view = f.index.view().unwrap();
        assert_eq!(f.index.head(f.no).0 - head.0, 2, "a tombstone and a row");
        assert_eq!(f.entry(dirs["to"], "e").unwrap().file_id, dirs["d"]);
        let inner = view.entry(f.no, dirs["d"], b"7").unwrap().unwrap();
        let path = view.path(f.no, inner.file_id).unwrap().unwrap();
        assert_eq!(path, ["to", "e", "7"].map(name));
        assert_eq!(view.resolve(f.no, &path).unwrap(), Some(inner));
        assert_eq!(f.index.sweep_orphans(1000).unwrap(), 0);
    }
}

#[test]
fn an_atomic_save_is_another_file_and_so_is_a_reused_inode() {
    let f = fixture();
    f.list(FileId::ROOT, &[file("a", 10)]);
    let first = f.entry(FileId::ROOT, "a").unwrap();
    f.list(FileId::ROOT, &[file("a", 11)]);
    let saved = f.entry(FileId::ROOT, "a").unwrap();
    assert_ne!(saved.file_id, first.file_id);
    let mut reused = file("b", 10);
    reused.attr.btime = Some(Time { secs: 5, nanos: 0 });
    let born = f.observe(FileId::ROOT, "b", Some(reused)).unwrap();
    assert_ne!(born.file_id, first.file_id);
    let typed = f.observe(FileId::ROOT, "c", Some(dir("c", 11))).unwrap();
    assert_ne!(typed.file_id, saved.file_id);
    f.index.sweep_orphans(10).unwrap();
    let again = f.observe(
        FileId::ROOT,
        "b2",
        Some(Observed {
            name: name("b2"),
            ..{
                let mut o = file("b", 10);
                o.attr.btime = Some(Time { secs: 5, nanos: 0 });
                o
            }
        }),
    );
    assert_eq!(again.unwrap().file_id, born.file_id, "the sweep forgot another file's inode");
}

#[test]
fn a_version_is_told_by_size_and_mtime_and_a_ctime_asks_for_a_hash() {
    let f = fixture();
    let now = file("a", 10);
    let first = f.observe(FileId::ROOT, "a", Some(now.clone())).unwrap();
    assert_eq!(f.unhashed(), [first.file_id]);

    let mut unseen = now.clone();
    unseen.attr.ctime.nanos += 1;
    let second = f.observe(FileId::ROOT, "a", Some(unseen)).unwrap();
    assert_eq!(second.generation, first.generation + 1, "no hash tells its bytes from the first");
    let first = f.observe(FileId::ROOT, "a", Some(now.clone())).unwrap();
    assert!(f.hash(&first, ContentId::of(b"1")));
    assert_eq!(f.unhashed(), []);

    let mut touched = now.clone();
    touched.attr.ctime.secs += 1;
    let touched_entry = f.observe(FileId::ROOT, "a", Some(touched.clone())).unwrap();
    assert_eq!(touched_entry.generation, first.generation);
    assert_eq!(touched_entry.content, Some(ContentId::of(b"1")));
    assert_eq!(f.unhashed(), [first.file_id]);
    assert!(!f.hash(&first, ContentId::of(b"1")), "it has another stamp by now");
    assert!(f.hash(&touched_entry, ContentId::of(b"2")), "its bytes were changed in secret");
    let rehashed = f.entry(FileId::ROOT, "a").unwrap();
    assert_eq!(rehashed.generation, first.generation + 1);

    let mut written = touched;
    written.attr.mtime.nanos += 1;
    let written = f.observe(FileId::ROOT, "a", Some(written)).unwrap();
    assert_eq!((written.generation, written.content), (rehashed.generation + 1, None));
    assert_eq!(f.unhashed(), [first.file_id]);
    assert_eq!(f.index.view().unwrap().holders(ContentId::of(b"2")).unwrap(), []);
}

/// What was read of a file that is seen, of which `size` bytes were there before.
fn read_of(now: &Observed, content: &[u8], size: u64, begun: &[u8]) -> BytesRead {
    let (content, begun) = (ContentId::of(content), ContentId::of(begun));
    BytesRead { stamp: now.stamp(), content, began: (size, begun), is_settled: true }
}

#[test]
fn a_version_grows_only_with_the_bytes_that_it_had() {
    let f = fixture();
    let mut grown = file("a", 10);
    grown.attr.size += 5;
    grown.attr.mtime.secs += 3;
    grown.attr.ctime.secs += 3;
    let right = read_of(&grown, b"more", 10, b"known");
    let other_stamp = Stamp { size: 16, ..right.stamp };
    let unread = (1, None);
    let other = (1, Some(ContentId::of(b"more")));
    let cases = [
        (right, (0, Some(ContentId::of(b"more")))),
        (BytesRead { is_settled: false, ..right }, (0, Some(ContentId::of(b"more")))),
        (BytesRead { began: (9, ContentId::of(b"known")), ..right }, other),
        (BytesRead { began: (10, ContentId::of(b"unknown")), ..right }, other),
        (BytesRead { stamp: other_stamp, ..right }, unread),
    ];
    for (read, (generations, content)) in cases {
        f.observe(FileId::ROOT, "a", None);
        f.index.sweep_location(f.no, 100).unwrap();
        let first = f.observe(FileId::ROOT, "a", Some(file("a", 10))).unwrap();
        assert!(f.hash(&first, ContentId::of(b"known")));
        f.index.hash_again(f.no, first.file_id).unwrap();
        let mut feed = f.index.feed().subscribe();
        let now = Some(grown.clone());
        let row = f.index.observe_entry_read(f.no, FileId::ROOT, &name("a"), now, Some(read));
        let row = row.unwrap().unwrap();
        check_invariants(&f.index, f.no);
        assert_eq!((row.generation - first.generation, row.content), (generations, content));
        assert_eq!((row.file_id, row.attr.size), (first.file_id, 15));
        let is_queued = !read.is_settled || content.is_none();
        assert_eq!(f.unhashed(), Vec::from_iter(is_queued.then_some(first.file_id)), "{read:?}");
        let Some(Next::Batch(changes)) = feed.blocking_next() else { panic!() };
        assert_eq!(matches!(changes[0], Change::Attributes { .. }), generations == 0);
    }
}

#[test]
fn what_is_read_of_an_unhashed_file_is_its_hash_but_only_an_empty_one_grows() {
    let f = fixture();
    for (text, ino, size, grows) in [("empty", 10, 0, true), ("unhashed", 20, 10, false)] {
        let mut first = file(text, ino);
        first.attr.size = size;
        let first = f.observe(FileId::ROOT, text, Some(first)).unwrap();
        let now = file(text, ino);
        let now = Observed { attr: Attr { size: 11, ..now.attr }, ..now };
        let read = read_of(&now, b"more", size, b"");
        let row =
            f.index.observe_entry_read(f.no, FileId::ROOT, &name(text), Some(now), Some(read));
        let row = row.unwrap().unwrap();
        check_invariants(&f.index, f.no);
        assert_eq!(row.generation == first.generation, grows, "{text}");
        assert_eq!(row.content, Some(ContentId::of(b"more")));
        assert_eq!(f.unhashed(), []);
    }
}

#[test]
fn what_is_smaller_or_as_large_has_not_grown() {
    let f = fixture();
    let first = f.observe(FileId::ROOT, "a", Some(file("a", 10))).unwrap();
    assert!(f.hash(&first, ContentId::of(b"known")));
    let mut now = file("a", 10);
    now.attr.mtime.secs += 1;
    let read = read_of(&now, b"known", 10, b"known");
    let row = f.index.observe_entry_read(f.no, FileId::ROOT, &name("a"), Some(now), Some(read));
    assert_eq!(row.unwrap().unwrap().generation, first.generation + 1);
}

#[test]
fn hard_links_have_one_row_until_the_last_name_goes() {
    let f = fixture();
    let link = |text| {
        let mut o = file(text, 20);
        o.attr.nlink = 2;
        o
    };
    f.list(FileId::ROOT, &[link("a"), link("b")]);
    let a = f.entry(FileId::ROOT, "a").unwrap();
    assert_eq!(f.entry(FileId::ROOT, "b").unwrap(), a);
    let content = ContentId::of(b"both");
    assert!(f.hash(&a, content));
    assert_eq!(f.entry(FileId::ROOT, "b").unwrap().content, Some(content));

    f.observe(FileId::ROOT, "a", None);
    let node = f.index.view().unwrap().node(f.no, a.file_id).unwrap().unwrap();
    assert_eq!(node.name, name("b"));
    assert_eq!(f.index.view().unwrap().holders(content).unwrap(), [(f.no, a.file_id)]);

    let grown = Observed { attr: Attr { size: 12, ..link("b").attr }, ..link("b") };
    f.observe(FileId::ROOT, "a", Some(link("a")));
    let read = read_of(&grown, b"more", 10, b"both");
    f.index.observe_entry_read(f.no, FileId::ROOT, &name("b"), Some(grown), Some(read)).unwrap();
    let [grown_a, grown_b] = ["a", "b"].map(|n| f.entry(FileId::ROOT, n).unwrap());
    assert_eq!(grown_a, grown_b, "both have grown");
    assert_eq!((grown_a.generation, grown_a.attr.size), (a.generation, 12));

    let mut written = link("b");
    written.attr.size += 1;
    f.observe(FileId::ROOT, "a", Some(Observed { name: name("a"), ..written }));
    let [a, b] = ["a", "b"].map(|n| f.entry(FileId::ROOT, n).unwrap());
    assert_eq!(a, b, "what was seen under one name holds for the other");
    assert_eq!(a.content, None);

    f.list(FileId::ROOT, &[]);
    assert_eq!(f.index.view().unwrap().node(f.no, a.file_id).unwrap(), None);
    assert_eq!(f.unhashed(), []);
}

#[test]
fn the_newest_files_are_hashed_first_and_a_skipped_one_waits_for_its_next_change() {
    let f = fixture();
    f.list(FileId::ROOT, &[file("old", 10), file("new", 30), file("middle", 20), dir("d", 40)]);
    let ids = ["new", "middle", "old"].map(|n| f.entry(FileId::ROOT, n).unwrap().file_id);
    assert_eq!(f.unhashed(), ids);
    assert_eq!(f.index.next_unhashed(f.no, 1).unwrap(), ids[..1]);
    f.index.skip_unhashed(f.no, ids[0]).unwrap();
    assert_eq!(f.unhashed(), ids[1..]);
    let mut changed = file("new", 30);
    changed.attr.size += 1;
    f.observe(FileId::ROOT, "new", Some(changed));
    assert_eq!(f.unhashed(), ids);
}

#[test]
fn what_lost_its_name_is_swept_with_everything_below() {
    let f = fixture();
    let dirs = f.list(FileId::ROOT, &[dir("d", 10), file("kept", 11)]);
    let inner = f.list(dirs["d"], &[dir("inner", 12), file("a", 13)]);
    f.list(inner["inner"], &(0..3000).map(|n| file(&n.to_string(), 100 + n)).collect::<Vec<_>>());
    f.list(FileId::ROOT, &[file("kept", 11)]);
    let mut swept = 0;
    loop {
        match f.index.sweep_orphans(1000).unwrap() {
            0 => break,
            n => swept += n,
        }
        check_invariants(&f.index, f.no);
    }
    assert!(swept >= 3002, "{swept}");
    assert_eq!(f.index.counts(f.no).entries, 1);
    assert_eq!(dump(&f.index, Table::Orphans, b""), []);
    assert_eq!(dump(&f.index, Table::Disk, b"").len(), 1);
    let back = f.list(FileId::ROOT, &[dir("d", 10), file("kept", 11)]);
    assert_ne!(back["d"], dirs["d"], "a swept directory begins anew");
}

#[test]
fn nothing_is_observed_in_a_directory_without_a_name() {
    let f = fixture();
    let dirs = f.list(FileId::ROOT, &[dir("d", 10)]);
    f.list(FileId::ROOT, &[]);
    let seen = f.index.observe_directory(f.no, dirs["d"], vec![file("a", 11)]);
    assert!(matches!(seen, Err(IndexError::NoSuchDirectory(..))), "{seen:?}");
}

#[test]
fn everything_is_there_again_after_reopening() {
    let f = fixture();
    f.list(FileId::ROOT, &[dir("d", 10), file("a", 11)]);
    let (a, counts) = (f.entry(FileId::ROOT, "a").unwrap(), f.index.counts(f.no));
    let (head, log_id) = (f.index.head(f.no), f.index.log_id(f.no));
    let Fixture { folder, index, no } = f;
    assert_ne!(log_id, 0);
    drop(index);
    let index = open(folder.path(), ME);
    assert_eq!(index.location_by_id(ID).unwrap().no, no);
    assert_eq!(*index.location(no).unwrap(), {
        let NewLocation { id, owner, name, root, read_only, shared_with } = location(ME);
        crate::model::Location { no, id, owner, name, root, read_only, shared_with }
    });
    let f = Fixture { folder, index, no };
    assert_eq!(f.entry(FileId::ROOT, "a").unwrap(), a);
    assert_eq!((f.index.counts(no), f.index.head(no), f.index.log_id(no)), (counts, head, log_id));
    let next = f.observe(FileId::ROOT, "b", Some(file("b", 12))).unwrap();
    assert!(next.file_id > a.file_id);
}

fn location_keys(index: &Index, no: LocationNo) -> usize {
    let of_location = |t: &Table| !matches!(t, Table::Meta | Table::Content);
    let tables = Table::ALL.into_iter().filter(of_location);
    let by_location: usize = tables.map(|t| dump(index, t, &key::location(no)).len()).sum();
    by_location + dump(index, Table::Content, b"").len()
}

#[test]
fn a_removed_location_leaves_nothing_and_its_number_is_not_given_again() {
    let f = fixture();
    f.list(FileId::ROOT, &[dir("d", 10), file("a", 11), file("gone", 12)]);
    f.list(FileId::ROOT, &[dir("d", 10), file("a", 11)]);
    f.hash(&f.entry(FileId::ROOT, "a").unwrap(), ContentId::of(b"a"));
    assert!(location_keys(&f.index, f.no) > 5);
    f.index.remove_location(f.no).unwrap();
    assert_eq!(location_keys(&f.index, f.no), 0);
    assert_eq!(dump(&f.index, Table::Meta, b"state"), []);
    assert!(f.index.location_by_id(ID).is_none());
    let observed = f.index.observe_entry(f.no, FileId::ROOT, &name("a"), None);
    assert!(matches!(observed, Err(IndexError::NoSuchLocation(_))), "{observed:?}");
    assert!(f.index.put_location(location(ME)).unwrap().no > f.no);
}

#[test]
fn a_removal_that_was_cut_off_goes_on_at_the_next_open() {
    let f = fixture();
    f.list(FileId::ROOT, &[dir("d", 10), file("a", 11)]);
    let record = dump(&f.index, Table::Locations, &key::location(f.no)).remove(0).1;
    let record = LocationRecord { removing: true, ..decode(&record, "").unwrap() };
    let Fixture { folder, index, no } = f;
    index
        .write_durably(
            |tx| {
                tx.batch.put(Table::Locations, key::location(no), encode(&record));
                Ok(())
            },
            |_, ()| (),
        )
        .unwrap();
    drop(index);
    let index = open(folder.path(), ME);
    assert!(index.location(no).is_none());
    let deadline = Instant::now() + Duration::from_secs(20);
    while location_keys(&index, no) > 0 {
        assert!(Instant::now() < deadline, "the rows are still there");
        std::thread::yield_now();
    }
}

#[test]
fn rows_leave_this_device_only_when_they_are_durable() {
    let f = fixture();
    f.list(FileId::ROOT, &[file("a", 11)]);
    f.observe(FileId::ROOT, "b", Some(file("b", 12)));
    f.index.0.relaxed.store(true, Ordering::Release);
    let (rows, upto) = f.index.view().unwrap().log_after(f.no, Seq(0), 1 << 20).unwrap();
    assert_eq!((rows.len(), upto), (3, f.index.head(f.no)));
    assert!(!f.index.0.relaxed.load(Ordering::Acquire));
}

#[test]
fn readers_and_writers_do_not_wait_for_each_other() {
    let f = fixture();
    let view = f.index.view().unwrap();
    let writer = f.index.0.lock();
    assert!(f.index.view().unwrap().entry(f.no, FileId::ROOT, b"a").unwrap().is_none());
    assert_eq!(f.index.counts(f.no).entries, 0);
    drop(writer);
    f.observe(FileId::ROOT, "a", Some(file("a", 10)));
    assert_eq!(view.entry(f.no, FileId::ROOT, b"a").unwrap(), None, "an older state");
}

// Replicas.

pub(super) fn replica() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let index = open(folder.path(), PEER);
    let no = index.put_location(location(ME)).unwrap().no;
    Fixture { folder, index, no }
}

fn entry(id: u64, file_type: FileType) -> Entry {
    let Observed { attr, disk_ino, target, .. } = observed("x", id, file_type);
    Entry { file_id: FileId(id), disk_ino, generation: 1, attr, content: None, target }
}

pub(super) fn log_row(seq: u64, parent: FileId, text: &str, entry: Option<Entry>) -> LogRow {
    LogRow { seq: Seq(seq), parent, name: name(text), entry }
}

#[test]
fn a_row_that_breaks_a_rule_is_refused_and_changes_nothing() {
    let f = replica();
    let good = || Some(entry(5, FileType::File));
    let bad = |change: fn(&mut Entry)| {
        let mut e = entry(5, FileType::File);
        change(&mut e);
        vec![log_row(1, FileId::ROOT, "a", Some(e))]
    };
    let cases = [
        bad(|e| e.file_id = FileId(0)),
        bad(|e| e.file_id = FileId(FileId::LIMIT)),
        bad(|e| e.file_id = FileId::ROOT),
        bad(|e| e.attr.mtime.nanos = 1_000_000_000),
        bad(|e| e.attr.perm = 0o10000),
        bad(|e| e.target = Some(b"of a file"[..].into())),
        bad(|e| {
            e.attr.file_type = FileType::Symlink;
            e.target = Some(b"..\0"[..].into());
        }),
        vec![log_row(1, FileId(5), "its own parent", good())],
        vec![log_row(1, FileId(FileId::LIMIT), "a", good())],
        vec![log_row(1, ROOT_PARENT, "root", good())],
        vec![log_row(1, ROOT_PARENT, "other", Some(entry(1, FileType::Directory)))],
        vec![log_row(1, ROOT_PARENT, "root", None)],
        vec![log_row(1, ROOT_PARENT, "007", None)],
        vec![log_row(1, ROOT_PARENT, "1", None)],
        vec![log_row(0, FileId::ROOT, "a", good())],
        vec![log_row(2, FileId::ROOT, "a", good()), log_row(2, FileId::ROOT, "b", None)],
        vec![log_row(10, FileId::ROOT, "a", good())],
    ];
    for rows in cases {
        let text = format!("{rows:?}");
        let applied = f.index.apply_replica(f.no, 9, rows, Seq(9));
        assert!(matches!(applied, Err(IndexError::InvalidRow(_))), "{text}: {applied:?}");
        assert_eq!(f.index.head(f.no), Seq(0), "{text}");
        assert_eq!(dump(&f.index, Table::Entries, b""), [], "{text}");
    }
    f.index.apply_replica(f.no, 9, vec![log_row(3, FileId::ROOT, "a", good())], Seq(9)).unwrap();
    let repeated =
        f.index.apply_replica(f.no, 9, vec![log_row(9, FileId::ROOT, "a", None)], Seq(9));
    assert!(matches!(repeated, Err(IndexError::InvalidRow(_))), "{repeated:?}");
    let backwards = f.index.apply_replica(f.no, 9, vec![], Seq(8));
    assert!(matches!(backwards, Err(IndexError::InvalidRow(_))), "{backwards:?}");
}

#[test]
fn only_the_owner_observes_and_only_others_replicate() {
    let (own, replica) = (fixture(), replica());
    let applied = own.index.apply_replica(own.no, 1, vec![], Seq(100));
    assert!(matches!(applied, Err(IndexError::WrongOwner(_))), "{applied:?}");
    let seen = replica.index.observe_root(replica.no, &dir("x", 1));
    assert!(matches!(seen, Err(IndexError::WrongOwner(_))), "{seen:?}");
    let taken = replica.index.put_location(NewLocation { owner: PEER, ..location(ME) });
    assert!(matches!(taken, Err(IndexError::WrongOwner(_))), "{taken:?}");
}

/// A row of a file with a name and bytes of its own.
pub(super) fn hashed_row(seq: u64) -> LogRow {
    let content = Some(ContentId::of(&seq.to_be_bytes()));
    let file = Entry { content, ..entry(1000 + seq, FileType::File) };
    log_row(seq, FileId::ROOT, &seq.to_string(), Some(file))
}

fn wait_listed(index: &Index) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !dump(index, Table::Meta, b"unlisted").is_empty() {
        assert!(Instant::now() < deadline, "holders are still not listed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn who_has_which_bytes_is_noted_when_a_replica_is_whole() {
    let f = replica();
    let last = 3 * holders::PASS_KEYS as u64 + 7;
    for from in (1..=last).step_by(20) {
        let rows = (from..(from + 20).min(last + 1)).map(hashed_row).collect();
        f.index.apply_replica_part(f.no, 9, rows, Seq((from + 19).min(last))).unwrap();
    }
    assert_eq!(dump(&f.index, Table::Content, b""), [], "it is put off");
    // A name that another file has by then, and one that is gone.
    let other = Entry { file_id: FileId(7), ..hashed_row(2).entry.unwrap() };
    let changes = [(1, None), (2, Some(other))]
        .map(|(n, entry)| log_row(last + n, FileId::ROOT, &n.to_string(), entry));
    f.index.apply_replica(f.no, 9, changes.into(), Seq(last + 2)).unwrap();
    wait_listed(&f.index);
    check_invariants(&f.index, f.no);
    assert_eq!(dump(&f.index, Table::Content, b"").len() as u64, last - 1);
    f.index.apply_replica(f.no, 9, vec![hashed_row(last + 3)], Seq(last + 3)).unwrap();
    check_invariants(&f.index, f.no);
}

#[test]
fn holders_that_were_not_noted_at_a_stop_are_noted_after_the_start() {
    let f = replica();
    let rows: Vec<_> = (1..=10).map(hashed_row).collect();
    f.index.apply_replica_part(f.no, 9, rows, Seq(10)).unwrap();
    let Fixture { folder, index, no } = f;
    drop(index);
    let index = open(folder.path(), PEER);
    wait_listed(&index);
    check_invariants(&index, no);
    // A log that begins anew has other rows at the same numbers.
    index.apply_replica_part(no, 9, vec![hashed_row(20)], Seq(20)).unwrap();
    index.reset_replica(no, 10).unwrap();
    index.apply_replica_part(no, 10, vec![hashed_row(1)], Seq(1)).unwrap();
    index.apply_replica(no, 10, vec![], Seq(2)).unwrap();
    check_invariants(&index, no);
    assert_eq!(index.view().unwrap().holders(ContentId::of(&1u64.to_be_bytes())).unwrap().len(), 1);
}

#[test]
fn another_log_needs_a_reset() {
    let f = replica();
    let row = |n| vec![log_row(1, FileId::ROOT, n, Some(entry(5, FileType::File)))];
    f.index.apply_replica(f.no, 9, row("a"), Seq(1)).unwrap();
    let other = f.index.apply_replica(f.no, 10, row("b"), Seq(1));
    assert!(matches!(other, Err(IndexError::OtherLog)), "{other:?}");
    f.index.reset_replica(f.no, 10).unwrap();
    assert_eq!((f.index.log_id(f.no), f.index.head(f.no)), (10, Seq(0)));
    assert_eq!(f.entry(FileId::ROOT, "a"), None);
    f.index.apply_replica(f.no, 10, row("b"), Seq(1)).unwrap();
    check_invariants(&f.index, f.no);
    assert_eq!(f.index.counts(f.no).entries, 1);
}

#[test]
fn a_replica_that_follows_another_log_gets_another_number_until_it_asks_too_often() {
    let f = replica();
    assert_eq!(f.index.restart_replica(f.no, 9).unwrap(), f.no, "no log was followed before");
    let row = |id| vec![log_row(1, FileId::ROOT, "a", Some(entry(id, FileType::File)))];
    f.index.apply_replica(f.no, 9, row(5), Seq(1)).unwrap();
    let mut no = f.no;
    for log_id in 10..14 {
        let renewed = f.index.restart_replica(no, log_id).unwrap();
        assert!(renewed > no, "a number is never used again");
        assert!(f.index.location(no).is_none());
        assert_eq!(f.index.location_by_id(ID).unwrap().no, renewed);
        assert_eq!((f.index.log_id(renewed), f.index.head(renewed)), (log_id, Seq(0)));
        f.index.apply_replica(renewed, log_id, row(5), Seq(1)).unwrap();
        check_invariants(&f.index, renewed);
        no = renewed;
    }
    assert_eq!(dump(&f.index, Table::Entries, &key::location(f.no)), [], "the old rows are gone");

    let mut feed = f.index.feed().subscribe();
    assert_eq!(f.index.restart_replica(no, 14).unwrap(), no, "it has used up its share");
    assert_eq!(f.index.counts(no).entries, 0);
    f.index.feed().publish(vec![Change::Devices]);
    let mut told = vec![];
    while let Some(Next::Batch(batch)) = feed.blocking_next()
        && batch[..] != [Change::Devices]
    {
        told.extend(batch.iter().cloned());
    }
    assert_eq!((told.first(), told.last()), (Some(&Change::Reset), Some(&Change::Reset)));

    let Fixture { folder, index, .. } = f;
    drop(index);
    let index = open(folder.path(), PEER);
    assert_eq!(index.location_by_id(ID).unwrap().no, no, "it survives a restart");
}

#[test]
fn a_reset_that_was_cut_off_must_be_done_again() {
    let f = replica();
    let rows = vec![log_row(1, FileId::ROOT, "a", Some(entry(5, FileType::File)))];
    f.index.apply_replica(f.no, 9, rows, Seq(1)).unwrap();
    let cut_off = State { resetting: true, ..State::default() };
    f.index
        .write(|tx| {
            tx.set_state(f.no, cut_off);
            Ok(())
        })
        .unwrap();
    for log_id in [8, 9] {
        let applied = f.index.apply_replica(f.no, log_id, vec![], Seq(1));
        assert!(matches!(applied, Err(IndexError::OtherLog)), "{applied:?}");
    }
    f.index.reset_replica(f.no, 9).unwrap();
    assert_eq!(f.entry(FileId::ROOT, "a"), None);
}

#[test]
fn a_replica_knows_a_holder_until_the_last_name_of_the_file_has_other_bytes() {
    let f = replica();
    let content = ContentId::of(b"both");
    let linked = |content| Some(Entry { content, ..entry(5, FileType::File) });
    let rows = ["a", "b"].iter().zip(1..);
    let rows = rows.map(|(n, seq)| log_row(seq, FileId::ROOT, n, linked(Some(content))));
    f.index.apply_replica(f.no, 9, rows.collect(), Seq(2)).unwrap();
    for (seq, (text, now)) in (3..).zip([("a", linked(None)), ("b", None)]) {
        let holders = f.index.view().unwrap().holders(content).unwrap();
        assert_eq!(holders, [(f.no, FileId(5))]);
        let row = log_row(seq, FileId::ROOT, text, now);
        f.index.apply_replica(f.no, 9, vec![row], Seq(seq)).unwrap();
        check_invariants(&f.index, f.no);
    }
    assert_eq!(f.index.view().unwrap().holders(content).unwrap(), []);
}

#[test]
fn a_replica_drops_the_rows_of_a_directory_once_it_is_gone_for_good() {
    let f = replica();
    let rows = vec![
        log_row(1, FileId::ROOT, "d", Some(entry(5, FileType::Directory))),
        log_row(2, FileId(5), "a", Some(entry(6, FileType::File))),
        log_row(3, FileId::ROOT, "d", None),
    ];
    f.index.apply_replica(f.no, 9, rows, Seq(3)).unwrap();
    assert!(f.entry(FileId(5), "a").is_some(), "the directory may get another name");
    f.index.apply_replica(f.no, 9, vec![log_row(4, ROOT_PARENT, "5", None)], Seq(4)).unwrap();
    assert_eq!(f.entry(FileId(5), "a"), None);
    assert_eq!(f.index.counts(f.no), Counts::default());
    check_invariants(&f.index, f.no);
}

#[test]
fn directories_in_a_circle_have_no_path() {
    let f = replica();
    let dir = |id| Some(entry(id, FileType::Directory));
    let rows = vec![
        log_row(1, FileId(5), "b", dir(6)),
        log_row(2, FileId(6), "a", dir(5)),
        log_row(3, FileId(77), "nowhere", Some(entry(8, FileType::File))),
    ];
    f.index.apply_replica(f.no, 9, rows, Seq(3)).unwrap();
    let view = f.index.view().unwrap();
    for id in [5, 6, 8, 1000] {
        assert_eq!(view.path(f.no, FileId(id)).unwrap(), None);
    }
    assert_eq!(view.path(f.no, FileId::ROOT).unwrap(), Some(vec![]));
}

#[test]
fn the_root_is_a_row_like_any_other() {
    let f = fixture();
    let view = f.index.view().unwrap();
    let root = view.node(f.no, FileId::ROOT).unwrap().unwrap();
    assert_eq!((root.parent, root.name), (ROOT_PARENT, root_name()));
    assert_eq!(view.resolve(f.no, &[]).unwrap(), Some(root.entry));
    assert_eq!(f.index.counts(f.no), Counts::default());
}

#[test]
fn a_hash_of_another_stamp_is_not_taken() {
    let f = fixture();
    let a = f.observe(FileId::ROOT, "a", Some(file("a", 10))).unwrap();
    let stamp = Stamp { size: a.attr.size + 1, ..a.stamp() };
    assert!(!f.index.set_content(f.no, a.file_id, &stamp, ContentId::of(b"")).unwrap());
    assert!(!f.index.set_content(f.no, FileId(999), &a.stamp(), ContentId::of(b"")).unwrap());
    assert_eq!(f.entry(FileId::ROOT, "a"), Some(a));
}

#[test]
fn what_was_flushed_survives_without_closing() {
    let f = fixture();
    f.observe(FileId::ROOT, "a", Some(file("a", 10)));
    f.index.flush().unwrap();
    // A copy of the file as it is on the disk now, as after a power cut.
    let copy = tempfile::tempdir().unwrap();
    let path = "index.redb";
    std::fs::copy(f.folder.path().join(path), copy.path().join(path)).unwrap();
    let index = open(copy.path(), ME);
    assert!(index.view().unwrap().entry(f.no, FileId::ROOT, b"a").unwrap().is_some());
    assert_eq!(
        index.0.store.commit(Batch::default(), Durability::Durable).map_err(|e| e.to_string()),
        Ok(())
    );
}

// What a peer may cost.

/// A store in memory that counts the keys it is asked for.
#[derive(Default)]
struct Counting {
    tables: std::sync::RwLock<Tables>,
    gets: Arc<std::sync::atomic::AtomicUsize>,
}

type Tables = Arc<BTreeMap<u8, BTreeMap<Vec<u8>, Vec<u8>>>>;

struct Counted(Tables, Arc<std::sync::atomic::AtomicUsize>);

impl Store for Counting {
    fn snapshot(&self) -> Result<Box<dyn Snapshot + '_>, StoreError> {
        Ok(Box::new(Counted(self.tables.read().unwrap().clone(), self.gets.clone())))
    }

    fn commit(&self, batch: Batch, _: Durability) -> Result<(), StoreError> {
        let mut tables = self.tables.write().unwrap();
        let tables = Arc::make_mut(&mut tables);
        for table in Table::ALL {
            let rows = tables.entry(table as u8).or_default();
            for (key, value) in batch.changes(table) {
                match value {
                    Some(value) => rows.insert(key.clone(), value.clone()),
                    None => rows.remove(key),
                };
            }
        }
        Ok(())
    }

    fn size_bytes(&self) -> u64 {
        0
    }
}

impl Snapshot for Counted {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(self.0.get(&(table as u8)).and_then(|rows| rows.get(key).cloned()))
    }

    fn scan(
        &self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        visit: Visit<'_>,
    ) -> Result<(), StoreError> {
        let Some(rows) = self.0.get(&(table as u8)) else { return Ok(()) };
        let from = rows.range::<[u8], _>((Bound::Included(from), Bound::Unbounded));
        for (key, value) in from.take_while(|(key, _)| to.is_none_or(|to| key.as_slice() < to)) {
            if visit(key, value).is_break() {
                break;
            }
        }
        Ok(())
    }
}

#[test]
fn a_peer_with_ever_new_locations_leaves_numbers_for_the_others() {
    let index = Index::open(Arc::new(Counting::default()), ME).unwrap();
    let put = |owner: DeviceId, n: u16| {
        let mut id = [owner.0[0]; 16];
        id[..2].copy_from_slice(&n.to_be_bytes());
        index.put_location(NewLocation { id: LocationId(id), ..location(owner) })
    };
    let mut given = 0;
    for n in 0..40 * 512 {
        match put(PEER, n) {
            Ok(location) => {
                given += 1;
                assert!(location.no.0 < LocationNo::FIRST_OWN);
                index.remove_location(location.no).unwrap();
            }
            Err(error) => assert!(matches!(error, IndexError::TooMany(_)), "{error:?}"),
        }
    }
    assert_eq!(given, 1024);
    assert_eq!(put(ME, 1).unwrap().no, LocationNo(LocationNo::FIRST_OWN));
    assert_eq!(put(DeviceId([3; 32]), 1).unwrap().no, LocationNo(1025));
}

#[test]
fn a_row_of_a_file_with_many_names_costs_a_peers_reader_little() {
    let store = Arc::new(Counting::default());
    let index = Index::open(store.clone(), PEER).unwrap();
    let no = index.put_location(location(ME)).unwrap().no;
    let rows = |first: u64| {
        let row = |n| {
            let content = Some(ContentId::of(&u64::to_le_bytes(first + n)));
            let entry = Entry { content, ..entry(5, FileType::File) };
            log_row(first + n, FileId::ROOT, &format!("name-{n}"), Some(entry))
        };
        (0..500).map(row).collect()
    };
    index.apply_replica(no, 9, rows(1), Seq(500)).unwrap();
    let before = store.gets.load(Ordering::Relaxed);
    index.apply_replica(no, 9, rows(501), Seq(1000)).unwrap();
    let gets = store.gets.load(Ordering::Relaxed) - before;
    assert!(gets < 500 * 20, "{gets} for 500 rows");
}

#[test]
fn a_few_holders_are_given_of_each_location() {
    let f = replica();
    let content = ContentId::of(b"popular");
    let other = NewLocation { id: LocationId([8; 16]), ..location(ME) };
    let other = f.index.put_location(other).unwrap().no;
    for no in [f.no, other] {
        let row = |id| {
            let entry = Entry { content: Some(content), ..entry(id, FileType::File) };
            log_row(id, FileId::ROOT, &format!("copy-{id}"), Some(entry))
        };
        f.index.apply_replica(no, 9, (2..1000).map(row).collect(), Seq(1000)).unwrap();
    }
    let holders = f.index.view().unwrap().holders(content).unwrap();
    let of = |no| holders.iter().filter(|(holder, _)| *holder == no).count();
    assert_eq!((of(f.no), of(other), holders.len()), (4, 4, 8));
}

// Tombstones that nobody needs.

#[test]
fn tombstones_go_when_every_member_has_seen_them() {
    const MANY: u64 = 20_000;
    const DAY_MS: u64 = 24 * 3600 * 1000;
    let f = fixture();
    let files: Vec<_> = (0..MANY).map(|n| file(&format!("f{n}"), 100 + n)).collect();
    f.list(FileId::ROOT, &files);
    let before = f.index.head(f.no);
    f.list(FileId::ROOT, &[]);
    let head = f.index.head(f.no);
    let (near, far, gone) = (DeviceId([8; 32]), DeviceId([9; 32]), DeviceId([10; 32]));
    let now = 100 * DAY_MS;
    let note = |member, upto, at_ms| f.index.note_seen(f.no, member, Seen { upto, at_ms }).unwrap();
    let compactable = || f.index.compactable(f.no, |member| member != gone, now).unwrap();
    assert_eq!(compactable(), Some(head), "nobody follows it");
    note(near, head, now - DAY_MS);
    note(far, before, now - 29 * DAY_MS);
    note(gone, Seq(1), now);
    assert_eq!(compactable(), Some(before), "one member has not seen the deletions");
    assert_eq!(f.index.compact(f.no, before).unwrap(), 0);
    note(far, before, now - 31 * DAY_MS);
    assert_eq!(compactable(), Some(head), "it is not waited for any longer");

    let digest = f.index.digest(f.no).unwrap();
    let began = f.index.view().unwrap().resume_at(f.no, f.index.log_id(f.no), before).unwrap();
    assert_eq!(began.after, before);
    assert_eq!(f.index.compact(f.no, head).unwrap(), MANY);
    check_invariants(&f.index, f.no);
    assert_eq!(f.index.digest(f.no).unwrap(), digest, "it is still the same to others");
    assert_eq!(compactable(), None);
    let view = f.index.view().unwrap();
    let resume = |after| view.resume_at(f.no, f.index.log_id(f.no), after).unwrap().after;
    assert_eq!((resume(head), resume(before)), (head, Seq(0)), "the far one begins anew");
    assert!(view.is_compacted(f.no, &began, before).unwrap(), "one under way does, too");
    assert!(!view.is_compacted(f.no, &began, head).unwrap(), "unless it has them behind it");
}

/// Nobody vouches for tombstones: one that takes the place of a row which is here already must not
/// hide that row from the sum.
#[test]
fn a_tombstone_that_was_made_up_does_not_keep_a_deleted_file() {
    let owner = fixture();
    owner.list(FileId::ROOT, &[file("a", 10)]);
    let log_id = owner.index.log_id(owner.no);
    let rows_after =
        |after| owner.index.view().unwrap().log_after(owner.no, after, 1 << 20).unwrap();
    let here = replica();
    let (rows, whole) = rows_after(Seq(0));
    here.index.apply_replica(here.no, log_id, rows, whole).unwrap();
    owner.observe(FileId::ROOT, "m", Some(file("m", 11)));
    let (rows, cut_off) = rows_after(whole);
    let m = rows.last().unwrap().seq;
    here.index.apply_replica_part(here.no, log_id, rows, cut_off).unwrap();
    owner.observe(FileId::ROOT, "m", None);
    owner.observe(FileId::ROOT, "b", Some(file("b", 12)));

    let statement = owner.index.state_of(owner.no, 1).unwrap().unwrap();
    let signed = Signed { statement, signature: [[0; 32]; 2] };
    let mut lie = rows_after(Seq(0)).0;
    lie.retain(|row| row.entry.is_some());
    let made_up = log_row(m.0, FileId::ROOT, "never there", None);
    lie.insert(lie.partition_point(|row| row.seq < m), made_up);
    let mut spool = Spool::create(&here.folder.path().join("spool"), signed).unwrap();
    spool.push(&lie).unwrap();
    let no = here.index.apply_spooled(here.no, spool.finish().unwrap()).unwrap();
    let view = here.index.view().unwrap();
    let is_there = |text: &str| view.entry(no, FileId::ROOT, text.as_bytes()).unwrap().is_some();
    assert_eq!([is_there("a"), is_there("b"), is_there("m")], [true, true, false]);
    assert!(view.attested(no).unwrap().is_some());
}
