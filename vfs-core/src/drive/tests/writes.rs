//! Writes to another device's location, through the drive.

use super::owner::{Owner, place};
use super::*;
use crate::ops::{Obstacle, Refusal};
use crate::outbox::{Lane, PendingState};

const ROOT: FileId = FileId::ROOT;

fn at(name: &str) -> [&str; 3] {
    ["there", "theirs", name]
}

impl Bench {
    fn make(&self, name: &str, bytes: &[u8]) -> InodeNo {
        let flags = OpenFlags { exclusive: true, ..READ_WRITE };
        let created = self.drive.create(&caller(), self.theirs(), name.as_bytes(), 0o644, flags);
        let (found, opened) = created.unwrap();
        assert_eq!(self.drive.write(opened.handle, 0, bytes).unwrap(), bytes.len());
        self.drive.flush(opened.handle).unwrap();
        self.drive.release(opened.handle);
        found.ino
    }

    fn put_remote(&self, ino: InodeNo, offset: u64, bytes: &[u8]) {
        let opened = self.drive.open(ino, WRITE).unwrap();
        self.drive.write(opened.handle, offset, bytes).unwrap();
        self.drive.flush(opened.handle).unwrap();
        self.drive.release(opened.handle);
    }

    fn content_of(&self, name: &str) -> Vec<u8> {
        self.read_all(self.ino(&at(name))).unwrap()
    }

    fn there(&self) -> Vec<String> {
        let mut names = self.names(self.theirs());
        names.retain(|n| n != "." && n != "..");
        names
    }

    /// The owner has everything, its rows came back, and nothing is kept here any more.
    fn settle_all(&self, owner: &mut Owner) {
        self.deliver(owner);
        self.owner_tells(owner);
        wait_until("the overlay is gone", || self.outbox.is_quiet());
    }
}

fn with_owner() -> (Bench, Owner) {
    let bench = Bench::new();
    bench.peer.online.store(true, Ordering::SeqCst);
    let mut owner = Owner::default();
    owner.put(ROOT, "old", 10, b"old bytes");
    owner.put_dir(ROOT, "dir", 11);
    owner.put(FileId(11), "inner", 12, b"inner");
    bench.owner_tells(&mut owner);
    (bench, owner)
}

#[test]
fn a_new_file_is_there_at_once_and_keeps_its_number() {
    let (bench, mut owner) = with_owner();
    let ino = bench.make("new", b"hello");
    assert_eq!(bench.there(), ["dir", "new", "old"]);
    assert_eq!(bench.content_of("new"), b"hello");
    let found = bench.lookup(&at("new")).unwrap();
    assert_eq!((found.ino, found.attr.size, found.attr.perm), (ino, 5, 0o644));
    assert_eq!(bench.deliver(&mut owner), 1, "it travels with its bytes");
    assert_eq!(owner.bytes_at("new"), Some(&b"hello"[..]));
    assert_eq!(bench.content_of("new"), b"hello");
    bench.settle_all(&mut owner);
    assert_eq!(bench.ino(&at("new")), ino);
    assert_eq!(bench.content_of("new"), b"hello");
}

#[test]
fn a_changed_file_is_old_bytes_and_new_ones_and_keeps_its_number() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let reader = bench.drive.open(ino, OpenFlags::READ).unwrap();
    bench.put_remote(ino, 4, b"BYTES and more");
    assert_eq!(bench.content_of("old"), b"old BYTES and more");
    let read = |b: &Bench| b.read(reader.handle, 0, 100).unwrap();
    assert_eq!(read(&bench), b"old BYTES and more", "a reader from before sees it");
    assert_eq!(bench.ino(&at("old")), ino);
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("old"), Some(&b"old BYTES and more"[..]));
    assert_eq!(bench.ino(&at("old")), ino, "the version is this device's own");
    assert_eq!(read(&bench), b"old BYTES and more");
    bench.drive.release(reader.handle);
    assert_eq!(bench.content_of("old"), b"old BYTES and more");
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 18);
    owner.overwrite(FileId(10), b"theirs");
    bench.owner_tells(&mut owner);
    assert_ne!(bench.ino(&at("old")), ino, "the owner's version is another inode");
    assert_eq!(bench.content_of("old"), b"theirs");
}

#[test]
fn a_name_is_told_although_its_file_is_written_here() {
    let (bench, _owner) = with_owner();
    let dir = bench.theirs();
    bench.put_remote(bench.ino(&at("old")), 0, b"ours");
    // As when the name comes back after it was hidden, while the bytes still wait.
    let name = Name::new(*b"old").unwrap();
    let (location, parent) = (bench.remote, ROOT);
    let change = Change::Entry { location, parent, name: name.clone(), was: None, now: None };
    let told = bench.drive.invalidations(&change);
    assert_eq!(told, [Invalidation::Entry { parent: dir, name }, Invalidation::Directory(dir)]);
}

#[test]
fn names_come_and_go_at_once_and_then_at_the_owner() {
    let (bench, mut owner) = with_owner();
    let (drive, dir, me) = (&bench.drive, bench.theirs(), caller());
    let sub = drive.mkdir(&me, dir, b"sub", 0o755).unwrap().ino;
    bench.make("a", b"a");
    drive.rename(dir, b"a", sub, b"b", RenameFlags::default()).unwrap();
    drive.rename(dir, b"dir", sub, b"moved", RenameFlags::default()).unwrap();
    drive.unlink(dir, b"old").unwrap();
    drive.symlink(&me, dir, b"link", b"sub/b").unwrap();
    let linked = drive.lookup(sub, b"b").unwrap().ino;
    drive.link(linked, dir, b"hard").unwrap();
    drive.mknod(&me, dir, b"fifo", FileType::Fifo, 0o600, 0).unwrap();
    let check = |bench: &Bench| {
        assert_eq!(bench.there(), ["fifo", "hard", "link", "sub"]);
        assert_eq!(bench.names(bench.ino(&at("sub"))), [".", "..", "b", "moved"]);
        let hard = bench.lookup(&at("hard")).unwrap();
        assert_eq!((hard.ino, hard.attr.nlink), (linked, 2));
        assert_eq!(bench.read_all(bench.ino(&["there", "theirs", "sub", "b"])).unwrap(), b"a");
        let inner = bench.ino(&["there", "theirs", "sub", "moved", "inner"]);
        assert_eq!(bench.read_all(inner).unwrap(), b"inner");
        assert_eq!(bench.drive.readlink(bench.ino(&at("link"))).unwrap(), b"sub/b");
    };
    check(&bench);
    bench.deliver(&mut owner);
    assert!(bench.outbox.pending().is_empty(), "{:?}", bench.outbox.pending());
    assert_eq!(owner.names_in(ROOT), ["fifo", "hard", "link", "sub"]);
    check(&bench);
    bench.settle_all(&mut owner);
    check(&bench);
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let (bench, _owner) = with_owner();
    let (drive, dir, me) = (&bench.drive, bench.theirs(), caller());
    let sub = bench.ino(&at("dir"));
    let old = bench.ino(&at("old"));
    let exclusive = OpenFlags { exclusive: true, ..READ_WRITE };
    let plain = RenameFlags::default();
    let no_replace = RenameFlags { no_replace: true, ..plain };
    let exchange = RenameFlags { exchange: true, ..plain };
    assert_eq!(kind(drive.create(&me, dir, b"old", 0o644, exclusive)), Kind::Exists);
    assert_eq!(kind(drive.mkdir(&me, dir, b"old", 0o755)), Kind::Exists);
    assert_eq!(kind(drive.mkdir(&me, old, b"x", 0o755)), Kind::NotADirectory);
    assert_eq!(kind(drive.unlink(dir, b"none")), Kind::NotFound);
    assert_eq!(kind(drive.unlink(dir, b"dir")), Kind::IsADirectory);
    assert_eq!(kind(drive.rmdir(dir, b"old")), Kind::NotADirectory);
    assert_eq!(kind(drive.rmdir(dir, b"dir")), Kind::NotEmpty);
    assert_eq!(kind(drive.rename(dir, b"none", dir, b"x", plain)), Kind::NotFound);
    assert_eq!(kind(drive.rename(dir, b"dir", sub, b"x", plain)), Kind::Invalid);
    assert_eq!(kind(drive.rename(dir, b"old", dir, b"dir", plain)), Kind::IsADirectory);
    assert_eq!(kind(drive.rename(dir, b"dir", dir, b"old", plain)), Kind::NotADirectory);
    assert_eq!(kind(drive.rename(sub, b"inner", dir, b"old", no_replace)), Kind::Exists);
    assert_eq!(kind(drive.rename(dir, b"old", dir, b"none", exchange)), Kind::NotFound);
    assert_eq!(kind(drive.rename(dir, b"old", bench.mine(), b"x", plain)), Kind::CrossDevice);
    assert_eq!(kind(drive.link(sub, dir, b"x")), Kind::NotPermitted);
    assert_eq!(kind(drive.mknod(&me, dir, b"x", FileType::Socket, 0o600, 0)), Kind::NotPermitted);
    assert_eq!(kind(drive.symlink(&me, dir, b"x", b"")), Kind::NotFound);
    let gift = SetAttr { uid: Some(1), ..SetAttr::default() };
    assert_eq!(kind(drive.setattr(&me, old, None, gift)), Kind::NotPermitted);
    assert_eq!(bench.there(), ["dir", "old"]);
    assert!(bench.outbox.pending().is_empty());
    drive.unlink(sub, b"inner").unwrap();
    drive.rmdir(dir, b"dir").unwrap();
    assert_eq!(bench.there(), ["old"]);
}

#[test]
fn sizes_modes_and_times() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let set = SetAttr { size: Some(3), ..SetAttr::default() };
    assert_eq!(bench.drive.setattr(&caller(), ino, None, set).unwrap().attr.size, 3);
    assert_eq!(bench.content_of("old"), b"old");
    let set = SetAttr { size: Some(5), perm: Some(0o600), ..SetAttr::default() };
    bench.drive.setattr(&caller(), ino, None, set).unwrap();
    let when = Time { secs: 1_000_000, nanos: 5 };
    let set = SetAttr { mtime: Some(TimeOrNow::At(when)), ..SetAttr::default() };
    bench.drive.setattr(&caller(), ino, None, set).unwrap();
    let attr = bench.drive.getattr(ino, None).unwrap().attr;
    assert_eq!((attr.size, attr.perm, attr.mtime), (5, 0o600, when));
    bench.settle_all(&mut owner);
    let attr = bench.drive.getattr(ino, None).unwrap().attr;
    assert_eq!((attr.size, attr.perm, attr.mtime), (5, 0o600, when));
    assert_eq!(owner.bytes_at("old"), Some(&b"old\0\0"[..]));
}

#[test]
fn a_time_set_on_bytes_that_nobody_here_saw_gives_another_number() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let touch = |secs| {
        let when = TimeOrNow::At(Time { secs, nanos: 0 });
        let set = SetAttr { mtime: Some(when), ..SetAttr::default() };
        bench.drive.setattr(&caller(), bench.ino(&at("old")), None, set).unwrap();
    };
    touch(1);
    bench.settle_all(&mut owner);
    assert_eq!(bench.ino(&at("old")), ino, "the same bytes");
    touch(2);
    owner.overwrite(FileId(10), b"OLD BYTES");
    bench.settle_all(&mut owner);
    assert_ne!(bench.ino(&at("old")), ino, "what the kernel keeps of them is of other bytes");
    assert_eq!(bench.content_of("old"), b"OLD BYTES");
}

#[test]
fn appending_truncating_and_punching() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let append = OpenFlags { append: true, ..WRITE };
    let opened = bench.drive.open(ino, append).unwrap();
    for part in [b" one", b" two"] {
        bench.drive.write(opened.handle, 0, part).unwrap();
    }
    bench.drive.flush(opened.handle).unwrap();
    bench.drive.release(opened.handle);
    assert_eq!(bench.content_of("old"), b"old bytes one two");
    let opened = bench.drive.open(ino, READ_WRITE).unwrap();
    bench.drive.fallocate(opened.handle, 0, 4, FallocateMode::PunchHole).unwrap();
    bench.drive.fsync(opened.handle, true).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 9).unwrap(), b"\0\0\0\0bytes");
    bench.drive.release(opened.handle);
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("old"), Some(&b"\0\0\0\0bytes one two"[..]));
    let truncating = OpenFlags { truncate: true, ..WRITE };
    let opened = bench.drive.open(bench.ino(&at("old")), truncating).unwrap();
    bench.drive.flush(opened.handle).unwrap();
    bench.drive.release(opened.handle);
    assert_eq!(bench.content_of("old"), b"");
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("old"), Some(&b""[..]));
}

#[test]
fn what_was_written_here_is_read_here_when_its_owner_is_gone() {
    let (bench, mut owner) = with_owner();
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 241) as u8).collect();
    bench.make("photo", &bytes);
    bench.settle_all(&mut owner);
    bench.peer.online.store(false, Ordering::SeqCst);
    assert_eq!(bench.content_of("photo"), bytes);
    let state = bench.drive.getxattr(bench.ino(&at("photo")), b"user.spacedrive.state");
    assert_eq!(state.unwrap(), b"cached");
}

#[test]
fn a_partial_change_whose_base_is_gone_goes_as_a_whole() {
    let (bench, mut owner) = with_owner();
    owner.refuses = Some(Refusal::NeedsWhole);
    bench.put_remote(bench.ino(&at("old")), 4, b"BYTES");
    let no = bench.outbox.pending()[0].no;
    assert_eq!(bench.deliver(&mut owner), 1);
    owner.refuses = None;
    wait_until("it is sent as a whole", || {
        bench.outbox.sync().unwrap();
        bench.outbox.pending().first().is_some_and(|p| p.bytes == 9)
    });
    assert_eq!(bench.outbox.pending()[0].no, no, "what was asked for after it goes after it");
    let owner = std::cell::RefCell::new(owner);
    wait_until("it is delivered", || bench.deliver(&mut owner.borrow_mut()) > 0);
    assert_eq!(owner.borrow().bytes_at("old"), Some(&b"old BYTES"[..]));
}

#[test]
fn large_files_travel_in_ranges() {
    let (bench, mut owner) = with_owner();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 249) as u8).collect();
    bench.make("large", &bytes);
    assert_eq!(bench.content_of("large"), bytes);
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("large"), Some(&bytes[..]));
    let ino = bench.ino(&at("large"));
    bench.put_remote(ino, 1_000_000, b"in the middle");
    bench.outbox.sync().unwrap();
    let op = bench.outbox.take(PEER, Lane::Small, 1, 1 << 20).pop().unwrap();
    assert_eq!(op.change.content().unwrap().written_bytes(), 13, "only what changed");
    bench.outbox.connection_lost(PEER);
    bench.settle_all(&mut owner);
    let mut expected = bytes;
    expected[1_000_000..1_000_013].copy_from_slice(b"in the middle");
    assert_eq!(owner.bytes_at("large"), Some(&expected[..]));
}

#[test]
fn a_file_deleted_before_it_left_never_leaves() {
    let (bench, mut owner) = with_owner();
    bench.make("temporary", b"x");
    bench.drive.unlink(bench.theirs(), b"temporary").unwrap();
    assert!(bench.outbox.pending().is_empty());
    assert_eq!(bench.there(), ["dir", "old"]);
    assert_eq!(bench.deliver(&mut owner), 0);
}

#[test]
fn a_deleted_file_is_still_open() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let opened = bench.drive.open(ino, READ_WRITE).unwrap();
    bench.drive.write(opened.handle, 0, b"OLD").unwrap();
    bench.drive.unlink(bench.theirs(), b"old").unwrap();
    assert_eq!(bench.read(opened.handle, 0, 20).unwrap(), b"OLD bytes");
    assert_eq!(bench.drive.getattr(ino, Some(opened.handle)).unwrap().attr.nlink, 0);
    bench.drive.flush(opened.handle).unwrap();
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("old"), None);
    bench.drive.release(opened.handle);
    assert_eq!(kind(bench.drive.getattr(ino, None)), Kind::Stale);
}

#[test]
fn an_edit_of_both_keeps_both_and_says_so() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    bench.put_remote(ino, 0, b"mine mine mine");
    owner.overwrite(FileId(10), b"theirs");
    bench.settle_all(&mut owner);
    assert_eq!(owner.bytes_at("old"), Some(&b"theirs"[..]));
    assert_eq!(bench.content_of("old"), b"theirs");
    assert_eq!(bench.content_of("old (copy)"), b"mine mine mine");
    let conflicts = bench.outbox.conflicts();
    assert_eq!(conflicts.len(), 1);
    assert_eq!(conflicts[0].what, "write");
    assert!(bench.outbox.resolve(conflicts[0].id).unwrap());
    assert!(bench.outbox.conflicts().is_empty());
}

#[test]
fn a_delete_that_met_an_edit_is_undone() {
    let (bench, mut owner) = with_owner();
    bench.drive.unlink(bench.theirs(), b"old").unwrap();
    owner.overwrite(FileId(10), b"edited");
    bench.settle_all(&mut owner);
    assert_eq!(bench.content_of("old"), b"edited");
    assert_eq!(bench.outbox.conflicts().len(), 1);
}

#[test]
fn an_obstacle_is_told_and_tried_again() {
    let (bench, mut owner) = with_owner();
    owner.obstacle = Some(Obstacle::NoSpace);
    bench.make("new", b"bytes");
    bench.deliver(&mut owner);
    let pending = bench.outbox.pending();
    assert!(matches!(&pending[0].state, PendingState::Blocked(why) if why.contains("full")));
    assert_eq!(bench.content_of("new"), b"bytes");
    owner.obstacle = None;
    let owner = std::cell::RefCell::new(owner);
    wait_until("it is tried again", || bench.deliver(&mut owner.borrow_mut()) > 0);
    assert_eq!(owner.borrow().bytes_at("new"), Some(&b"bytes"[..]));
}

#[test]
fn a_late_error_is_told_at_the_next_fsync_once() {
    let (bench, mut owner) = with_owner();
    owner.refuses = Some(Refusal::Permission);
    let opened = bench.drive.open(bench.ino(&at("old")), READ_WRITE).unwrap();
    bench.drive.write(opened.handle, 0, b"OLD").unwrap();
    bench.drive.fsync(opened.handle, false).unwrap();
    bench.deliver(&mut owner);
    // A process that was forked closes it before it becomes another program.
    assert_eq!(kind(bench.drive.flush(opened.handle)), Kind::AccessDenied);
    assert_eq!(kind(bench.drive.fsync(opened.handle, false)), Kind::AccessDenied);
    bench.drive.fsync(opened.handle, false).unwrap();
    bench.drive.flush(opened.handle).unwrap();
    assert_eq!(bench.content_of("old"), b"OLD bytes");
    bench.drive.release(opened.handle);
}

const SYNC: OpenFlags = OpenFlags { sync: true, ..READ_WRITE };

impl Bench {
    /// Writes through a handle that wants its owner to have it; `meanwhile` the program waits.
    fn write_through(
        &self,
        handle: HandleId,
        bytes: &[u8],
        meanwhile: impl FnOnce(),
    ) -> FsResult<()> {
        self.drive.write(handle, 0, bytes).unwrap();
        let mut waiting = std::pin::pin!(self.drive.arrived(handle, || false));
        let some_time =
            async { tokio::time::timeout(Duration::from_millis(250), &mut waiting).await };
        let early = self.runtime.block_on(some_time);
        assert!(early.is_err(), "its owner has not got it, and it says {early:?}");
        meanwhile();
        self.runtime.block_on(waiting)
    }

    /// The same, where there is nothing to wait for.
    fn write_here(&self, handle: HandleId, bytes: &[u8]) -> FsResult<()> {
        self.drive.write(handle, 0, bytes).unwrap();
        let began = Instant::now();
        let arrived = self.runtime.block_on(self.drive.arrived(handle, || false));
        assert!(began.elapsed() < Duration::from_millis(250), "{:?}", began.elapsed());
        arrived
    }
}

#[test]
fn a_synchronous_write_waits_for_an_owner_that_is_there() {
    let (bench, mut owner) = with_owner();
    let ino = bench.ino(&at("old"));
    let plain = bench.drive.open(ino, READ_WRITE).unwrap();
    assert!(!bench.drive.waits_for_owner(plain.handle));
    bench.drive.release(plain.handle);
    for flags in [SYNC, OpenFlags { sync: false, data_sync: true, ..SYNC }] {
        let opened = bench.drive.open(ino, flags).unwrap();
        assert!(bench.drive.waits_for_owner(opened.handle));
        let deliver = || assert_eq!(bench.deliver(&mut owner), 1);
        bench.write_through(opened.handle, b"new", deliver).unwrap();
        assert_eq!(owner.bytes_at("old"), Some(&b"new bytes"[..]));
        bench.drive.release(opened.handle);
    }
    let (_, made) = bench.drive.create(&caller(), bench.theirs(), b"made", 0o644, SYNC).unwrap();
    let deliver = || assert_eq!(bench.deliver(&mut owner), 1);
    bench.write_through(made.handle, b"made", deliver).unwrap();
    assert_eq!(owner.bytes_at("made"), Some(&b"made"[..]));
    bench.peer.online.store(false, Ordering::SeqCst);
    bench.write_here(made.handle, b"here").unwrap();
    assert!(!bench.outbox.pending().is_empty());
    bench.drive.release(made.handle);
}

#[test]
fn who_waits_for_an_owner_is_not_kept_by_one_that_goes_or_is_silent() {
    let (bench, mut owner) = with_owner();
    let opened = bench.drive.open(bench.ino(&at("old")), SYNC).unwrap();
    let handle = opened.handle;
    let goes = || bench.peer.online.store(false, Ordering::SeqCst);
    bench.write_through(handle, b"one", goes).unwrap();
    assert_eq!(bench.outbox.pending().len(), 1, "it is kept");
    bench.peer.online.store(true, Ordering::SeqCst);
    bench.drive.write(handle, 0, b"two").unwrap();
    let killed = bench.drive.arrived(handle, || true);
    bench
        .runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(1), killed).await })
        .expect("a program that is to end waits no more")
        .unwrap();
    let began = Instant::now();
    bench.write_through(handle, b"six", || {}).unwrap();
    assert!(began.elapsed() >= Duration::from_secs(2), "the deadline of this test");
    bench.write_here(handle, b"ten").expect("nobody waits twice for a silent owner");
    bench.deliver(&mut owner);
    assert_eq!(owner.bytes_at("old"), Some(&b"ten bytes"[..]));
    let deliver = || assert_eq!(bench.deliver(&mut owner), 1);
    bench.write_through(handle, b"now", deliver).expect("once it is heard it is waited for");
    bench.drive.release(handle);
}

#[test]
fn who_waits_for_an_owner_is_told_what_it_says() {
    for (refuses, obstacle, expected) in [
        (Some(Refusal::Permission), None, Err(Kind::AccessDenied)),
        (Some(Refusal::ReadOnly), None, Err(Kind::ReadOnly)),
        (None, Some(Obstacle::NoSpace), Err(Kind::NoSpace)),
        (None, Some(Obstacle::Failed("x".into())), Err(Kind::Io)),
        (None, Some(Obstacle::Offline), Ok(())),
    ] {
        let (bench, mut owner) = with_owner();
        let opened = bench.drive.open(bench.ino(&at("old")), SYNC).unwrap();
        (owner.refuses, owner.obstacle) = (refuses, obstacle);
        let deliver = || assert_eq!(bench.deliver(&mut owner), 1);
        let told = bench.write_through(opened.handle, b"one", deliver);
        assert_eq!(told.map_err(|e| e.kind()), expected);
        // So is who writes on, until the owner takes it; what was written is kept.
        let told = bench.runtime.block_on(bench.drive.arrived(opened.handle, || false));
        assert_eq!(told.map_err(|e| e.kind()), expected);
        assert_eq!(bench.content_of("old"), b"one bytes");
        assert_eq!(bench.outbox.pending().len(), 1);
        bench.drive.release(opened.handle);
    }
}

#[test]
fn what_was_refused_is_tried_again_when_asked() {
    let (bench, mut owner) = with_owner();
    owner.refuses = Some(Refusal::Permission);
    bench.put_remote(bench.ino(&at("old")), 0, b"OLD");
    bench.deliver(&mut owner);
    owner.refuses = None;
    bench.deliver(&mut owner);
    assert_eq!(bench.outbox.pending().len(), 1, "not by itself");
    bench.outbox.try_again();
    bench.deliver(&mut owner);
    assert_eq!(bench.outbox.pending().len(), 0);
}

#[test]
fn refused_bytes_stay_and_other_refusals_are_told() {
    let (bench, mut owner) = with_owner();
    owner.refuses = Some(Refusal::Permission);
    bench.put_remote(bench.ino(&at("old")), 0, b"OLD");
    bench.drive.unlink(bench.ino(&at("dir")), b"inner").unwrap();
    bench.deliver(&mut owner);
    let pending = bench.outbox.pending();
    assert_eq!(pending.len(), 1);
    assert!(matches!(&pending[0].state, PendingState::Blocked(_)));
    assert_eq!(bench.content_of("old"), b"OLD bytes", "what was written is still shown");
    assert_eq!(bench.names(bench.ino(&at("dir"))), [".", "..", "inner"]);
    assert_eq!(bench.outbox.conflicts()[0].what, "delete");
    assert!(owner.names.contains_key(&place(FileId(11), "inner")));
}

#[test]
fn what_was_written_from_its_end_to_its_beginning_is_one_part() {
    let (bench, mut owner) = with_owner();
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    for len in [2_000, bytes.len()] {
        let name = format!("backwards-{len}");
        let made =
            bench.drive.create(&caller(), bench.theirs(), name.as_bytes(), 0o644, READ_WRITE);
        let (_, opened) = made.unwrap();
        for (n, part) in bytes[..len].chunks(1_000).enumerate().rev() {
            bench.drive.write(opened.handle, n as u64 * 1_000, part).unwrap();
        }
        bench.drive.flush(opened.handle).unwrap();
        bench.drive.release(opened.handle);
        let lane = if len < 64 << 10 { Lane::Small } else { Lane::Bulk };
        let op = bench.outbox.take(PEER, lane, 1, 1 << 20).pop().unwrap();
        assert_eq!(op.change.content().unwrap().extents, [0..len as u64]);
        let across = bench.outbox.read(PEER, op.no, 500..1_500).unwrap();
        assert_eq!(across, bytes[500..1_500]);
        assert_eq!(kind(bench.outbox.read(PEER, op.no, 500..len as u64 + 1)), Kind::Invalid);
        bench.outbox.connection_lost(PEER);
        bench.deliver(&mut owner);
        assert_eq!(owner.bytes_at(&name), Some(&bytes[..len]));
    }
}

/// Every other byte of a file; this bench allows 1,000 ranges.
#[test]
fn what_was_written_in_too_many_parts_goes_whole_and_holds_up_nothing() {
    let (bench, mut owner) = with_owner();
    let parts = 40_000_u64;
    owner.put(ROOT, "image", 20, &vec![b'.'; 2 * parts as usize]);
    bench.owner_tells(&mut owner);
    let scatter = |opened: &Opened| {
        for n in 0..parts {
            bench.drive.write(opened.handle, 2 * n, b"x").unwrap();
        }
        bench.drive.flush(opened.handle).unwrap();
        bench.drive.release(opened.handle);
    };
    scatter(&bench.drive.open(bench.ino(&at("image")), WRITE).unwrap());
    let made = bench.drive.create(&caller(), bench.theirs(), b"holes", 0o644, READ_WRITE);
    scatter(&made.unwrap().1);
    bench.make("beside", b"small");
    let owner = std::cell::RefCell::new(owner);
    let arrives = |name: &str, bytes: &[u8]| {
        wait_until(name, || {
            bench.deliver(&mut owner.borrow_mut());
            owner.borrow().bytes_at(name) == Some(bytes)
        });
    };
    arrives("beside", b"small");
    // What has a base is sent as a whole; of what has holes a person is told.
    arrives("image", &b"x.".repeat(parts as usize));
    let pending = bench.outbox.pending();
    assert_eq!(pending.len(), 1);
    assert!(pending[0].stuck && pending[0].path[0].display() == "holes");
    assert!(matches!(&pending[0].state, PendingState::Blocked(why) if why.contains("parts")));
    assert_eq!(bench.read_all(bench.ino(&at("holes"))).unwrap().len() as u64, 2 * parts - 1);
}
