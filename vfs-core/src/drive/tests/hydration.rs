//! Programs that read for nobody who waits.

use super::*;
use crate::hydration::Program;

const PHOTO: usize = 4 << 20;
const ICON: usize = 20 << 10;

impl Bench {
    fn with_pictures() -> Self {
        let bench = Self::new();
        let bytes = |len: usize| (0..len).map(|n| (n / 7) as u8).collect::<Vec<_>>();
        bench.replicate(vec![
            (1, "photo", bench.peer_file(2, &bytes(PHOTO))),
            (1, "icon", bench.peer_file(3, &bytes(ICON))),
        ]);
        bench
    }

    fn open_for(&self, program: &str, ino: InodeNo, flags: OpenFlags) -> FsResult<Opened> {
        let program = Arc::new(Program::new([program.to_owned()]));
        self.drive.open_for(ino, flags, &|| Some(Arc::clone(&program)))
    }

    fn opened(&self, program: &str, name: &str) -> FsResult<Opened> {
        self.open_for(program, self.ino(&["there", "theirs", name]), OpenFlags::READ)
    }

    /// Reads a file; on return it is in the cache, where it comes a moment later than to its reader.
    fn hydrate(&self, name: &str) -> InodeNo {
        let ino = self.ino(&["there", "theirs", name]);
        self.read_all(ino).unwrap();
        let state = || self.drive.getxattr(ino, b"user.spacedrive.state").unwrap();
        wait_until("the file in the cache", || state() == b"cached");
        ino
    }

    fn fetched_bytes(&self) -> u64 {
        self.drive.remote.content.cache().stats().fetched_bytes
    }
}

#[test]
fn a_thumbnailer_cannot_open_a_photo_that_is_not_here_and_an_indexer_nothing() {
    let bench = Bench::with_pictures();
    assert_eq!(kind(bench.opened("tumblerd", "photo")), Kind::AccessDenied);
    assert_eq!(kind(bench.opened("baloo_file_extractor", "icon")), Kind::AccessDenied);
    assert_eq!(bench.fetched_bytes(), 0);
    let icon = bench.opened("tumblerd", "icon").unwrap();
    assert_eq!(bench.read(icon.handle, 0, ICON).unwrap().len(), ICON);
    wait_until("the icon", || bench.fetched_bytes() == ICON as u64);
    let guarded = bench.drive.remote.content.hydration().guarded();
    let guarded: Vec<_> = guarded.iter().map(|g| (&g.program[..], g.refused, g.exact)).collect();
    assert_eq!(guarded, [("baloo_file_extractor", 1, 0), ("tumblerd", 1, 1)]);
}

#[test]
fn what_is_here_is_everybodys() {
    let bench = Bench::with_pictures();
    bench.hydrate("photo");
    let read = bench.opened("updatedb", "photo").unwrap();
    assert_eq!(bench.read(read.handle, 0, PHOTO).unwrap().len(), PHOTO);
    bench.put("own", &[7; 1 << 20]);
    let own = bench.ino(&["here", "mine", "own"]);
    assert!(bench.open_for("tumblerd", own, OpenFlags::READ).is_ok());
    let same = bench.peer_file(4, &[7; 1 << 20]);
    bench.replicate(vec![(1, "same", same.clone())]);
    let content = &bench.drive.remote.content;
    wait_until("the hash of the own file", || content.has_own_copy(&same));
    assert!(bench.opened("tumblerd", "same").is_ok());
    assert!(bench.drive.remote.content.hydration().guarded().is_empty());
}

#[test]
fn what_is_opened_to_be_changed_or_was_is_everybodys() {
    const WRITE: OpenFlags = OpenFlags { write: true, ..OpenFlags::READ };
    let bench = Bench::with_pictures();
    let photo = bench.ino(&["there", "theirs", "photo"]);
    let writes = bench.open_for("tumblerd", photo, WRITE).unwrap();
    bench.drive.write(writes.handle, 0, b"new").unwrap();
    let reads = bench.open_for("tumblerd", photo, OpenFlags::READ).unwrap();
    assert_eq!(bench.read(reads.handle, 0, 3).unwrap(), b"new");
}

#[test]
fn nothing_is_fetched_ahead_of_a_backup() {
    const STEP: usize = 64 << 10;
    const STEPS: usize = 16;
    const READ: u64 = (STEPS * STEP) as u64;
    let read = |program: &str| {
        let bench = Bench::with_pictures();
        let photo = bench.opened(program, "photo").unwrap();
        for step in 0..STEPS {
            bench.read(photo.handle, (step * STEP) as u64, STEP).unwrap();
        }
        bench
    };
    let copied = read("cp");
    wait_until("what this tells the two apart by", || copied.fetched_bytes() > READ);
    let backed_up = read("restic");
    wait_until("what was read", || backed_up.fetched_bytes() >= READ);
    assert_eq!(backed_up.fetched_bytes(), READ);
}

#[test]
fn nobody_is_asked_for_where_everybody_gets_the_same() {
    let bench = Bench::with_pictures();
    let nobody = || panic!("asked who opens");
    bench.put("own", b"own");
    let own = bench.ino(&["here", "mine", "own"]);
    assert!(bench.drive.open_for(own, OpenFlags::READ, &nobody).is_ok());
    let icon = bench.hydrate("icon");
    assert!(bench.drive.open_for(icon, OpenFlags::READ, &nobody).is_ok());
    let photo = bench.ino(&["there", "theirs", "photo"]);
    assert!(bench.drive.open_for(photo, OpenFlags::READ, &|| None).is_ok());
}
