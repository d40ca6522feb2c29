//! Other devices' files that grow while a kernel knows them.

use super::*;
use crate::ops::Base;
use crate::outbox::Lane;

const PATH: [&str; 3] = ["there", "theirs", "log"];

/// A kernel that is told of growth.
#[derive(Default)]
struct Kernel {
    told: Mutex<Vec<Told>>,
    /// What happens while it drops its pages.
    meanwhile: Mutex<Vec<Box<dyn Fn() + Send>>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Told {
    Pages(InodeNo, u64),
    Attributes(InodeNo),
}

impl KernelCache for Kernel {
    fn drop_pages_from(&self, ino: InodeNo, from: u64) {
        self.told.lock().unwrap().push(Told::Pages(ino, from));
        let meanwhile = self.meanwhile.lock().unwrap().pop();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
    }

    fn wait_for_readers(&self) {}

    fn expire_attributes(&self, ino: InodeNo) {
        self.told.lock().unwrap().push(Told::Attributes(ino));
    }
}

impl Kernel {
    fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock().unwrap())
    }
}

fn grow(listener: &Listener, kernel: &Kernel) {
    for file in listener.growing() {
        listener.grow(file, kernel).unwrap();
    }
}

impl Bench {
    /// The owner's log has these bytes, in this generation; served under no other stamp.
    fn log(&self, generation: u32, bytes: &[u8]) -> Entry {
        let secs = MTIME.secs + bytes.len() as i64;
        let mut entry = Entry { generation, ..self.peer_file(2, bytes) };
        entry.attr.mtime = Time { secs, nanos: 0 };
        entry.attr.ctime = entry.attr.mtime;
        self.peer.stamps.lock().unwrap().insert(FileId(2), entry.stamp());
        self.replicate(vec![(1, "log", entry.clone())]);
        entry
    }

    fn size(&self) -> u64 {
        self.lookup(&PATH).unwrap().attr.size
    }
}

#[test]
fn an_open_file_goes_on_and_its_size_is_shown_when_the_pages_are_gone() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let before = bench.lookup(&PATH).unwrap();
    let opened = bench.drive.open(before.ino, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\n");
    let mut changes = bench.drive.subscribe();
    bench.log(1, b"one\ntwo\n");
    bench.told_until(&mut changes, &Invalidation::Growth);
    let shown = || {
        let by_handle = bench.drive.getattr(before.ino, Some(opened.handle)).unwrap();
        assert_eq!(by_handle.attr, bench.lookup(&PATH).unwrap().attr);
        assert_eq!(by_handle.attr, bench.drive.getattr(before.ino, None).unwrap().attr);
        (by_handle.ino, by_handle.attr.size, by_handle.attr.mtime)
    };
    let mtime = |size| Time { secs: MTIME.secs + size, nanos: 0 };
    assert_eq!(shown(), (before.ino, 4, mtime(4)), "until its pages are gone");
    assert!(!bench.drive.remote.growing.is_idle());
    grow(&listener, &kernel);
    assert_eq!(kernel.take(), [Told::Pages(before.ino, 4), Told::Attributes(before.ino)]);
    assert_eq!(shown(), (before.ino, 8, mtime(8)));
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\ntwo\n");
    assert!(bench.drive.remote.growing.is_idle());
    grow(&listener, &kernel);
    assert_eq!(kernel.take(), [], "once");
    bench.drive.release(opened.handle);
}

#[test]
fn what_is_read_before_the_size_is_shown_is_no_shorter_than_that() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let ino = bench.ino(&PATH);
    let opened = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\n");
    bench.log(1, b"one\ntwo\n");
    let (drive, handle) = (Arc::clone(&bench.drive), opened.handle);
    let runtime = bench.runtime.handle().clone();
    let read = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&read);
    kernel.meanwhile.lock().unwrap().push(Box::new(move || {
        // What a kernel reads anew of the page that it has just dropped.
        let bytes = runtime.block_on(drive.read(handle, 0, 4096)).unwrap();
        seen.lock().unwrap().extend_from_slice(&bytes);
        assert_eq!(drive.getattr(ino, None).unwrap().attr.size, 4, "not yet");
    }));
    grow(&listener, &kernel);
    assert_eq!(*read.lock().unwrap(), b"one\ntwo\n");
}

#[test]
fn what_grows_again_meanwhile_is_told_after_that() {
    let bench = Arc::new(Bench::new());
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"1\n");
    let ino = bench.ino(&PATH);
    bench.log(1, b"1\n2\n");
    let (again, looks) = (Arc::clone(&bench), Arc::clone(&bench));
    let meanwhile: [Box<dyn Fn() + Send>; 2] = [
        Box::new(move || assert_eq!(looks.size(), 4, "what is read anew of it may end here")),
        Box::new(move || drop(again.log(1, b"1\n2\n3\n"))),
    ];
    kernel.meanwhile.lock().unwrap().extend(meanwhile);
    grow(&listener, &kernel);
    assert_eq!(bench.size(), 6);
    let told = |size| [Told::Pages(ino, size), Told::Attributes(ino)];
    assert_eq!(kernel.take(), [told(2), told(4)].concat());
    assert!(bench.drive.remote.growing.is_idle());
}

#[test]
fn without_a_kernel_a_row_is_shown_at_once() {
    let bench = Bench::new();
    bench.log(1, b"one\n");
    bench.log(1, b"one\ntwo\n");
    assert_eq!(bench.size(), 8);
    drop(bench.drive.listen());
    bench.log(1, b"one\ntwo\nthree\n");
    assert_eq!(bench.size(), 14);
    assert!(bench.drive.remote.growing.is_idle());
}

#[test]
fn a_file_that_another_version_replaced_meanwhile_does_not_grow() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let ino = bench.ino(&PATH);
    let opened = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\n");
    bench.log(1, b"one\ntwo\n");
    bench.log(2, b"something else\n");
    assert_eq!(bench.size(), 15);
    assert_ne!(bench.ino(&PATH), ino);
    grow(&listener, &kernel);
    assert_eq!(kernel.take(), []);
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\n", "the version it had");
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 4);
    assert!(bench.drive.remote.growing.is_idle());
    // And the other version grows as any.
    bench.log(2, b"something else\nand more\n");
    grow(&listener, &kernel);
    assert_eq!((bench.size(), kernel.take().len()), (24, 2));
    assert_eq!(bench.drive.getattr(ino, None).unwrap().attr.size, 4);
}

#[test]
fn a_file_that_is_written_here_does_not_grow_under_its_writer() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let ino = bench.ino(&PATH);
    let writer = bench.drive.open(ino, READ_WRITE).unwrap();
    bench.drive.write(writer.handle, 4, b"mine\n").unwrap();
    bench.log(1, b"one\ntwo\n");
    let mut changes = bench.drive.subscribe();
    grow(&listener, &kernel);
    assert_eq!(kernel.take(), [], "its pages are the writer's");
    let (parent, name) = (bench.theirs(), Name::new(&b"log"[..]).unwrap());
    bench.told_until(&mut changes, &Invalidation::Entry { parent, name });
    assert_eq!(bench.read(writer.handle, 0, 100).unwrap(), b"one\nmine\n");
    assert_eq!(bench.drive.getattr(ino, Some(writer.handle)).unwrap().attr.size, 9);
    assert!(bench.drive.remote.growing.is_idle());
    bench.drive.release(writer.handle);
}

#[test]
fn who_opens_a_growing_file_for_writing_gets_it_under_another_number() {
    let bench = Bench::new();
    let (_listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let ino = bench.ino(&PATH);
    let reader = bench.drive.open(ino, OpenFlags::READ).unwrap();
    bench.log(1, b"one\ntwo\n");
    assert_eq!(kind(bench.drive.open(ino, WRITE)), Kind::Stale, "it is looked up again");
    let found = bench.lookup(&PATH).unwrap();
    assert_ne!(found.ino, ino);
    assert_eq!(found.attr.size, 8, "no kernel has its pages");
    let append = OpenFlags { append: true, ..READ_WRITE };
    let writer = bench.drive.open(found.ino, append).unwrap();
    bench.drive.write(writer.handle, 0, b"mine\n").unwrap();
    assert_eq!(bench.read(writer.handle, 0, 100).unwrap(), b"one\ntwo\nmine\n");
    assert_eq!(bench.drive.getattr(ino, Some(reader.handle)).unwrap().attr.size, 4);
    grow(&_listener, &kernel);
    assert_eq!(kernel.take(), []);
    bench.drive.release(writer.handle);
    bench.drive.release(reader.handle);
}

#[test]
fn what_is_no_longer_served_as_it_was_is_read_as_it_is_now() {
    let bench = Bench::new();
    let _listener = bench.drive.listen();
    bench.log(1, b"one\n");
    let opened = bench.drive.open(bench.ino(&PATH), OpenFlags::READ).unwrap();
    // Nothing is cached, and the owner gives it under its new stamp only.
    bench.log(1, b"one\ntwo\n");
    let read = bench.read(opened.handle, 0, 100).unwrap();
    assert!(read.starts_with(b"one\n"), "{read:?}");
    bench.drive.release(opened.handle);
}

#[test]
fn numbers_of_a_file_that_is_written_again_and_again_do_not_come_again() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    let mut bytes = b"1\n".to_vec();
    bench.log(1, &bytes);
    let writer = bench.drive.open(bench.ino(&PATH), READ_WRITE).unwrap();
    let mut seen = HashSet::new();
    for _ in 0..200 {
        let found = bench.lookup(&PATH).unwrap();
        assert!(seen.insert((found.ino, found.generation)));
        bytes.extend(b"more\n");
        bench.log(1, &bytes);
        grow(&listener, &kernel);
    }
    assert_eq!(kernel.take(), []);
    bench.drive.release(writer.handle);
}

/// What was noted is of the version that a program then wrote over, and that grew once more.
#[test]
fn what_is_noted_anew_meanwhile_is_not_taken_for_told() {
    let bench = Arc::new(Bench::new());
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"1\n");
    let ino = bench.ino(&PATH);
    bench.log(1, b"1\n2\n");
    let other = Arc::clone(&bench);
    kernel.meanwhile.lock().unwrap().push(Box::new(move || {
        assert_eq!(kind(other.drive.open(ino, WRITE)), Kind::Stale);
        // Nobody writes it after all, and its number is one that a kernel knows by now.
        assert_ne!(other.ino(&PATH), ino);
        other.log(1, b"1\n2\n3\n");
        assert_eq!(other.size(), 4);
    }));
    grow(&listener, &kernel);
    let now = bench.lookup(&PATH).unwrap();
    assert_eq!(now.attr.size, 6);
    let told = kernel.take();
    assert!(told.contains(&Told::Pages(now.ino, 4)), "{told:?}");
    assert!(bench.drive.remote.growing.is_idle());
}

#[test]
fn a_file_that_grows_while_it_is_read_is_read_however_often() {
    let bench = Arc::new(Bench::new());
    let _listener = bench.drive.listen();
    let mut bytes = b"1\n".to_vec();
    bench.log(1, &bytes);
    let opened = bench.drive.open(bench.ino(&PATH), OpenFlags::READ).unwrap();
    for _ in 0..20 {
        bytes.extend(b"more\n");
        bench.log(1, &bytes);
        assert!(bench.read(opened.handle, 0, 2).unwrap() == b"1\n");
    }
    bench.drive.release(opened.handle);
}

#[test]
fn what_grew_and_was_renamed_in_one_goes_on() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let ino = bench.ino(&PATH);
    let opened = bench.drive.open(ino, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\n");
    let mut entry = bench.peer_file(2, b"one\ntwo\n");
    entry.attr.mtime = Time { secs: MTIME.secs + 8, nanos: 0 };
    bench.peer.stamps.lock().unwrap().insert(FileId(2), entry.stamp());
    bench.replicate_changes(vec![(1, "log.1", Some(entry)), (1, "log", None)]);
    let renamed = bench.lookup(&["there", "theirs", "log.1"]).unwrap();
    assert_eq!((renamed.ino, renamed.attr.size), (ino, 4));
    grow(&listener, &kernel);
    assert_eq!(kernel.take(), [Told::Pages(ino, 4), Told::Attributes(ino)]);
    assert_eq!(bench.read(opened.handle, 0, 100).unwrap(), b"one\ntwo\n");
    assert_eq!(bench.lookup(&["there", "theirs", "log.1"]).unwrap().attr.size, 8);
    assert_eq!(kind(bench.lookup(&PATH)), Kind::NotFound);
    bench.drive.release(opened.handle);
}

/// What it reads may come from the longer version, but what it writes is written over the one that
/// it began with: else the owner would take it for knowing of what was appended.
#[test]
fn who_has_it_open_for_writing_writes_over_what_it_was() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    let before = bench.log(1, b"one\n");
    let writer = bench.drive.open(bench.ino(&PATH), READ_WRITE).unwrap();
    bench.log(1, b"one\ntwo\n");
    grow(&listener, &kernel);
    // The owner gives it under its new stamp only.
    assert!(bench.read(writer.handle, 0, 100).unwrap() == b"one\n");
    bench.drive.write(writer.handle, 4, b"mine\n").unwrap();
    assert_eq!(bench.read(writer.handle, 0, 100).unwrap(), b"one\nmine\n");
    bench.drive.flush(writer.handle).unwrap();
    let base = Base::Seen { stamp: before.stamp(), content: before.content };
    let ops = bench.outbox.take(PEER, Lane::Small, 1, 1 << 20);
    assert!(format!("{ops:?}").contains(&format!("{base:?}")), "{ops:?}");
    bench.drive.release(writer.handle);
}

#[test]
fn the_end_of_a_file_that_has_grown_is_found_by_seeking() {
    let bench = Bench::new();
    let (listener, kernel) = (bench.drive.listen(), Kernel::default());
    bench.log(1, b"one\n");
    let opened = bench.drive.open(bench.ino(&PATH), OpenFlags::READ).unwrap();
    bench.log(1, b"one\ntwo\n");
    grow(&listener, &kernel);
    assert_eq!(bench.drive.seek(opened.handle, 4, Whence::Data).unwrap(), 4);
    assert_eq!(bench.drive.seek(opened.handle, 0, Whence::Hole).unwrap(), 8);
    bench.drive.release(opened.handle);
}
