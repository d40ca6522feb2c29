//! Programs that watch a folder in the mount are told of what changes elsewhere.

use crate::common::{Rig, Standing, can_mount, drive, eventually};
use mount_fuse::{HelperCommand, MountOptions};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Not a test: the helper, which the tests below start this program as.
#[test]
fn helper() {
    if std::env::args().any(|argument| argument == "--nocapture") {
        let is_socket = fs::read_link("/proc/self/fd/0").unwrap();
        if is_socket.as_os_str().as_encoded_bytes().starts_with(b"socket:") {
            mount_fuse::run_helper().unwrap();
        }
    }
}

fn rig(test: &str) -> Option<Rig> {
    rig_with(test, MountOptions::default())
}

fn rig_with(test: &str, options: MountOptions) -> Option<Rig> {
    let arguments = ["--exact", "events::helper", "--nocapture", "--test-threads=1"];
    let arguments = arguments.map(OsString::from).into();
    let helper = HelperCommand { program: std::env::current_exe().unwrap(), arguments };
    let options = MountOptions { helper: Some(helper), ..options };
    can_mount(test).then(|| Rig::with_options(options))
}

fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

/// A file system in memory, mounted on a directory of the drive.
struct Held(PathBuf);

impl Held {
    fn on(path: PathBuf) -> Self {
        rustix::mount::mount("none", &path, "tmpfs", MountFlags::empty(), None).unwrap();
        Self(path)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

struct Watch {
    inotify: OwnedFd,
    seen: BTreeSet<String>,
    /// It has inherited the watches.
    _program: Standing,
}

impl Watch {
    fn of(path: &Path) -> Self {
        let what = WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MODIFY
            | WatchFlags::ATTRIB
            | WatchFlags::MOVE
            | WatchFlags::DELETE_SELF;
        Self::for_these(path, what)
    }

    fn for_these(path: &Path, what: WatchFlags) -> Self {
        let inotify = inotify::init(CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&inotify, path, what).unwrap();
        // Who watches is looked for among the other processes: this one is the daemon too.
        let program = Command::new("sleep").arg("1000").spawn().unwrap();
        Self { inotify, seen: BTreeSet::new(), _program: Standing(program) }
    }

    fn read(&mut self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            let name = event.file_name().map_or("".into(), |name| name.to_string_lossy());
            let flags = event.events().iter_names().map(|(name, _)| name).collect::<Vec<_>>();
            self.seen.insert(format!("{} {name}", flags.join("|")).trim().to_owned());
        }
    }

    /// Waits for these, and forgets what came.
    #[track_caller]
    fn hears(&mut self, expected: &[&str]) {
        eventually(&format!("{expected:?}"), || {
            self.read();
            expected.iter().all(|e| self.seen.contains(*e))
        });
        println!("{expected:?}: {:?}", self.seen);
        self.seen.clear();
    }
}

impl Watch {
    /// The same, and that until then this one did not come.
    #[track_caller]
    fn hears_without(&mut self, expected: &[&str], never: &str) {
        eventually(&format!("{expected:?}"), || {
            self.read();
            expected.iter().all(|e| self.seen.contains(*e))
        });
        assert!(!self.seen.contains(never), "{:?}", self.seen);
        self.seen.clear();
    }
}

#[test]
fn a_watched_folder_tells_each_kind_of_change_and_shows_it() {
    let Some(rig) = rig("a_watched_folder_tells_each_kind_of_change_and_shows_it") else { return };
    let folder = drive::peer_folder(rig.mount.mountpoint());
    rig.parts.change_peer(&[("old", Some((2, 1, 5)))]);
    eventually("the first file", || folder.join("old").exists());
    assert!(!folder.join("new").exists() && fs::read_dir(&folder).unwrap().count() == 1);
    let mut watch = Watch::of(&folder);
    let size = |name: &str| fs::metadata(folder.join(name)).unwrap().len();

    rig.parts.change_peer(&[("new", Some((3, 1, 7)))]);
    watch.hears(&["CREATE new"]);
    assert_eq!(size("new"), 7);
    rig.parts.change_peer(&[("new", Some((3, 2, 9)))]);
    watch.hears(&["MODIFY new"]);
    assert_eq!(size("new"), 9);
    rig.parts.change_peer(&[("new", Some((3, 2, 12)))]);
    watch.hears(&["MODIFY new"]);
    assert_eq!(size("new"), 12);
    rig.parts.change_peer(&[("new", None), ("moved", Some((3, 2, 12)))]);
    watch.hears(&["MOVED_FROM new", "MOVED_TO moved"]);
    assert!(!folder.join("new").exists() && size("moved") == 12);
    // An atomic save.
    rig.parts.change_peer(&[("moved", None), ("old", Some((3, 2, 12)))]);
    watch.hears(&["MOVED_FROM moved", "MOVED_TO old"]);
    assert_eq!((size("old"), fs::read_dir(&folder).unwrap().count()), (12, 1));
    rig.parts.change_peer(&[("old", None)]);
    watch.hears(&["DELETE old"]);
    assert!(!folder.join("old").exists() && fs::read_dir(&folder).unwrap().count() == 0);
    rig.parts.change_peer(&[("dir", Some((1000, 1, 0)))]);
    watch.hears(&["CREATE|ISDIR dir"]);
    assert!(folder.join("dir").is_dir());
    rig.parts.change_peer(&[("dir", None), ("folder", Some((1000, 1, 0)))]);
    watch.hears(&["MOVED_FROM|ISDIR dir", "MOVED_TO|ISDIR folder"]);
    fs::create_dir(folder.join("folder/sub")).unwrap();
    rig.parts.change_peer(&[("folder", None)]);
    watch.hears(&["DELETE|ISDIR folder"]);
    assert!(!folder.join("folder").exists());
}

#[test]
fn who_watches_a_file_hears_that_it_was_replaced() {
    let Some(rig) = rig("who_watches_a_file_hears_that_it_was_replaced") else { return };
    let file = drive::peer_folder(rig.mount.mountpoint()).join("file");
    rig.parts.change_peer(&[("file", Some((2, 1, 5)))]);
    eventually("the file", || file.exists());
    let before = fs::metadata(&file).unwrap().ino();
    let mut watch = Watch::of(&file);
    rig.parts.change_peer(&[("file", Some((2, 1, 6)))]);
    watch.hears(&["MODIFY"]);
    rig.parts.change_peer(&[("file", Some((2, 2, 6)))]);
    watch.hears(&["DELETE_SELF"]);
    assert_ne!(fs::metadata(&file).unwrap().ino(), before);
}

#[test]
fn what_the_owners_programs_do_beside_the_mount_is_told() {
    let Some(rig) = rig("what_the_owners_programs_do_beside_the_mount_is_told") else { return };
    let mut watch = Watch::of(&rig.folder());
    fs::write(rig.disk_path("a"), b"one").unwrap();
    watch.hears(&["CREATE a"]);
    assert_eq!(fs::read(rig.path("a")).unwrap(), b"one");
    fs::write(rig.disk_path("a"), b"another").unwrap();
    watch.hears(&["MODIFY a"]);
    assert_eq!(fs::read(rig.path("a")).unwrap(), b"another");
    fs::rename(rig.disk_path("a"), rig.disk_path("b")).unwrap();
    watch.hears(&["MOVED_FROM a", "MOVED_TO b"]);
    assert!(fs::read(rig.disk_path("b")).unwrap() == b"another" && !rig.path("a").exists());
    fs::remove_file(rig.disk_path("b")).unwrap();
    watch.hears(&["DELETE b"]);
    assert_eq!(fs::read_dir(rig.disk.path()).unwrap().count(), 0);
}

#[test]
fn while_much_is_told_programs_go_on_and_nothing_is_changed() {
    let Some(rig) = rig("while_much_is_told_programs_go_on_and_nothing_is_changed") else { return };
    let folder = drive::peer_folder(rig.mount.mountpoint());
    let mut watch = Watch::of(&folder);
    for round in 0..200_u32 {
        let names: Vec<_> = (0..20).map(|n| format!("{n}")).collect();
        let file = |n: usize| match round % 4 {
            3 => None,
            kind => Some((2 + n as u64, 1 + round / 4 + kind, u64::from(round))),
        };
        let rows: Vec<_> = names.iter().enumerate().map(|(n, name)| (&**name, file(n))).collect();
        rig.parts.change_peer(&rows);
        // Programs work in the same folder meanwhile.
        let own = folder.join(format!("own {}", round % 5));
        fs::write(&own, b"own").unwrap();
        fs::rename(&own, folder.join("own")).unwrap();
        fs::read_dir(&folder).unwrap().for_each(|entry| drop(entry.unwrap().metadata()));
        fs::remove_file(folder.join("own")).unwrap();
        watch.read();
    }
    eventually("all is gone", || fs::read_dir(&folder).unwrap().count() == 0);
    rig.parts.change_peer(&[("last", Some((500, 1, 3)))]);
    watch.hears(&["CREATE last"]);
    rig.mount.unmount(false).unwrap();
}

#[test]
fn what_is_mounted_on_a_directory_stays_when_that_and_others_are_told() {
    let test = "what_is_mounted_on_a_directory_stays_when_that_and_others_are_told";
    let Some(rig) = rig(test) else { return };
    let folder = drive::peer_folder(rig.mount.mountpoint());
    let mut watch = Watch::of(&folder);
    // Mounted before it was told that the directory is there.
    rig.parts.change_peer(&[("dir", Some((1000, 1, 0)))]);
    while !folder.join("dir").is_dir() {}
    let held = Held::on(folder.join("dir"));
    rig.parts.change_peer(&[("other", Some((1001, 1, 0))), ("file", Some((2, 1, 5)))]);
    watch.hears(&["CREATE|ISDIR other", "CREATE file"]);
    assert!(is_mounted(&held.0));
    rig.parts.change_peer(&[("other", None), ("another", Some((1001, 1, 0)))]);
    watch.hears(&["MOVED_FROM|ISDIR other", "MOVED_TO|ISDIR another"]);
    rig.parts.change_peer(&[("another", None), ("file", None)]);
    watch.hears(&["DELETE|ISDIR another", "DELETE file"]);
    assert!(is_mounted(&held.0) && fs::read_dir(&held.0).unwrap().count() == 0);
    // It goes where its directory goes.
    rig.parts.change_peer(&[("dir", None), ("moved", Some((1000, 1, 0)))]);
    watch.hears(&["ATTRIB|ISDIR"]);
    let moved = Held(folder.join("moved"));
    assert!(moved.0.is_dir() && is_mounted(&moved.0) && !is_mounted(&held.0));
    rig.parts.change_peer(&[("moved", None)]);
    watch.hears(&["ATTRIB|ISDIR"]);
    assert!(is_mounted(&moved.0), "it was taken away though nobody looked for its directory");
}

#[test]
fn what_a_program_did_itself_before_anything_was_told_is_not_told_again() {
    let test = "what_a_program_did_itself_before_anything_was_told_is_not_told_again";
    let Some(rig) = rig(test) else { return };
    let mut watch = Watch::of(&rig.folder());
    fs::create_dir(rig.path("dir")).unwrap();
    fs::write(rig.path("file"), "bytes").unwrap();
    watch.hears(&["CREATE|ISDIR dir", "CREATE file", "MODIFY file"]);
    fs::write(rig.disk_path("other"), "bytes").unwrap();
    eventually("the other file", || {
        watch.read();
        watch.seen.contains("CREATE other")
    });
    let own = watch.seen.iter().find(|seen| seen.ends_with("dir") || seen.ends_with("file"));
    assert_eq!(own, None, "{:?}", watch.seen);
}

#[test]
fn a_deleted_file_that_is_open_keeps_its_size() {
    let options = MountOptions { passthrough: false, ..MountOptions::default() };
    let Some(rig) = rig_with("a_deleted_file_that_is_open_keeps_its_size", options) else {
        return;
    };
    let (path, on_disk) = (rig.path("a"), rig.disk_path("a"));
    let mut folder = Watch::of(&rig.folder());
    for round in 0..10 {
        fs::write(&on_disk, [1; 4096]).unwrap();
        folder.hears(&["CREATE a"]);
        eventually("the index has it", || rig.parts.own_size("a") == Some(4096));
        let mut watch = Watch::of(&path);
        // The index learns of this and of the end at once.
        File::options().append(true).open(&on_disk).unwrap().write_all(&[2; 4096]).unwrap();
        let opened = File::open(&path).unwrap();
        // What the kernel knows, and so what a mapping of the file has.
        let size = |sync: AtFlags| {
            let flags = AtFlags::EMPTY_PATH | sync;
            rustix::fs::statx(&opened, "", flags, StatxFlags::SIZE).unwrap().stx_size
        };
        assert_eq!(size(AtFlags::STATX_FORCE_SYNC), 8192);
        fs::remove_file(&on_disk).unwrap();
        folder.hears(&["DELETE a"]);
        watch.hears(&["ATTRIB"]);
        assert_eq!(size(AtFlags::STATX_DONT_SYNC), 8192, "round {round}");
    }
}

#[test]
fn a_file_that_a_program_is_writing_is_not_told_as_written() {
    let options = MountOptions { passthrough: false, ..MountOptions::default() };
    let name = "a_file_that_a_program_is_writing_is_not_told_as_written";
    let Some(rig) = rig_with(name, options) else { return };
    fs::write(rig.disk_path("a"), "a").unwrap();
    eventually("the index has it", || rig.parts.own_size("a") == Some(1));
    let what = WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE;
    let mut watch = Watch::for_these(&rig.folder(), what);
    let mut writer = File::options().append(true).open(rig.path("a")).unwrap();
    writer.write_all(b"b").unwrap();
    watch.hears(&["MODIFY a"]);
    // Longer than it is remembered that the program has just done something.
    std::thread::sleep(Duration::from_millis(1200));
    fs::write(rig.disk_path("a"), "longer").unwrap();
    eventually("the index has it", || rig.parts.own_size("a") == Some(6));
    fs::write(rig.disk_path("later"), "").unwrap();
    watch.hears_without(&["CLOSE_WRITE later"], "CLOSE_WRITE a");
    drop(writer);
    watch.hears(&["CLOSE_WRITE a"]);
}

#[test]
fn an_unmount_does_not_wait_until_all_is_told() {
    let Some(rig) = rig("an_unmount_does_not_wait_until_all_is_told") else { return };
    let mut watch = Watch::of(&drive::peer_folder(rig.mount.mountpoint()));
    let names: Vec<_> = (0..16_000).map(|n| format!("{n}")).collect();
    let rows = names.iter().enumerate().map(|(n, name)| (&**name, Some((2000 + n as u64, 1, 0))));
    rig.parts.change_peer(&rows.collect::<Vec<_>>());
    eventually("the first of them", || {
        watch.read();
        !watch.seen.is_empty()
    });
    let start = Instant::now();
    rig.mount.unmount(false).unwrap();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    watch.read();
    assert!(watch.seen.len() < names.len(), "everything was told before");
}
