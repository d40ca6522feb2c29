//! Another device's files, changed through the mount: seen here at once, there soon, lost never.

use e2e::disk::SmallDisk;
use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need, files, proc};
use rustix::process::Signal;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Waiting for the owner, on a machine with two daemons and this test.
const DELIVERY: Duration = Duration::from_secs(60);

/// As <asm-generic/fcntl.h> has them.
const O_DSYNC: i32 = 0o10_000;
const O_SYNC: i32 = 0o4_010_000;

/// Room for the reserve that a device keeps free, and some more.
const DISK_BYTES: u64 = 512 << 20;

struct Pair {
    lab: Lab,
    owner: Device,
    reader: Device,
    /// The owner's folder.
    theirs: PathBuf,
    /// The same in the reader's mount.
    ours: PathBuf,
}

/// A location with some files, mounted by the other device.
fn pair(lab: Option<Lab>) -> Option<Pair> {
    let lab = lab?;
    let theirs = lab.folder("source");
    fs::create_dir(theirs.join("dir")).unwrap();
    fs::write(theirs.join("dir/old"), "as it was").unwrap();
    fs::write(theirs.join("file"), "text").unwrap();
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    Some(Pair { lab, owner, reader, theirs, ours })
}

impl Pair {
    /// Waits for the owner, which must have everything then.
    #[track_caller]
    fn delivered(&self) {
        self.reader.sd(&["sync", "--timeout", "60s"]).ok();
        self.assert_same();
    }

    /// Both trees are equal, in names, attributes and bytes, once the rows have come back.
    #[track_caller]
    fn assert_same(&self) {
        files::assert_same_bytes(&self.theirs, &self.ours);
        let expected = files::listing(&self.theirs);
        wait_until("the rows to come back", DELIVERY, || files::listing(&self.ours) == expected);
        self.assert_no_droppings();
    }

    /// Nothing is in the owner's folder that nobody put there.
    #[track_caller]
    fn assert_no_droppings(&self) {
        let found = proc::run_args(
            "find",
            &[self.theirs.as_os_str(), "-name".as_ref(), ".sd-*".as_ref()],
            DELIVERY,
        );
        assert_eq!(found.ok().text(), "", "temporary names in the owner's folder");
    }
}

#[test]
fn what_is_written_is_seen_here_at_once_and_there_after_a_sync() {
    let Some(pair) = pair(Lab::lan(&[Need::Fuse])) else { return };
    let Pair { theirs, ours, .. } = &pair;
    fs::write(ours.join("new"), "from afar").unwrap();
    fs::create_dir(ours.join("made")).unwrap();
    fs::write(ours.join("made/inner"), files::random_bytes(300_000, 1)).unwrap();
    symlink("inner", ours.join("made/link")).unwrap();
    fs::write(ours.join("file"), "overwritten").unwrap();
    OpenOptions::new()
        .append(true)
        .open(ours.join("dir/old"))
        .unwrap()
        .write_all(b", and more")
        .unwrap();
    assert_eq!(fs::read_to_string(ours.join("new")).unwrap(), "from afar");
    assert_eq!(fs::read_to_string(ours.join("file")).unwrap(), "overwritten");
    assert_eq!(fs::read_to_string(ours.join("dir/old")).unwrap(), "as it was, and more");
    assert_eq!(fs::read(ours.join("made/inner")).unwrap(), files::random_bytes(300_000, 1));
    assert_eq!(fs::read_link(ours.join("made/link")).unwrap(), Path::new("inner"));
    pair.delivered();
    assert_eq!(fs::read_to_string(theirs.join("new")).unwrap(), "from afar");
    assert_eq!(fs::read_to_string(theirs.join("dir/old")).unwrap(), "as it was, and more");

    fs::rename(ours.join("new"), ours.join("made/renamed")).unwrap();
    fs::rename(ours.join("made"), ours.join("moved")).unwrap();
    fs::remove_file(ours.join("file")).unwrap();
    fs::set_permissions(ours.join("dir/old"), fs::Permissions::from_mode(0o640)).unwrap();
    OpenOptions::new().write(true).open(ours.join("moved/inner")).unwrap().set_len(1000).unwrap();
    fs::hard_link(ours.join("dir/old"), ours.join("second name")).unwrap();
    assert_eq!(fs::read_to_string(ours.join("moved/renamed")).unwrap(), "from afar");
    assert_eq!(fs::metadata(ours.join("moved/inner")).unwrap().len(), 1000);
    assert!(!ours.join("file").exists() && !ours.join("made").exists());
    pair.delivered();
    assert_eq!(fs::read_to_string(theirs.join("moved/renamed")).unwrap(), "from afar");
    assert_eq!(fs::metadata(theirs.join("second name")).unwrap().nlink(), 2);
    fs::remove_dir_all(ours.join("moved")).unwrap();
    pair.delivered();
    assert!(!theirs.join("moved").exists());
}

#[test]
fn programs_save_and_copy_as_on_a_local_disk() {
    let Some(pair) = pair(Lab::lan(&[Need::Fuse])) else { return };
    let Pair { lab, ours, .. } = &pair;
    let shell = |script: &str| {
        let mut sh = Command::new("sh");
        sh.current_dir(ours).args(["-euc", script]);
        proc::run(&mut sh, DELIVERY).ok()
    };
    // An atomic save over an existing file, as editors and browsers do it.
    shell(
        "printf new > .file.tmp && sync .file.tmp && mv .file.tmp file && [ \"$(cat file)\" = new ]",
    );
    // Copies that keep times and modes; a tar; a sort in place; a sed in place.
    let tree = lab.folder("tree").join("linux");
    proc::run(Command::new("cp").args(["-a", "/usr/include/linux"]).arg(&tree), DELIVERY).ok();
    let tree_text = tree.display();
    shell(&format!("cp -a '{tree_text}' copied && diff -r '{tree_text}' copied"));
    // A directory has its owner's times once what was made in it is there; tar would see it change.
    pair.delivered();
    shell("tar cf all.tar copied && rm -r copied && tar xf all.tar");
    files::assert_same_bytes(&tree, &ours.join("copied"));
    shell(
        "seq 1 1000 | shuf > numbers && sort -n -o numbers numbers && sed -i s/^5$/five/ numbers",
    );
    shell("dd if=/dev/urandom of=blocks bs=4096 count=64 status=none conv=fsync");
    shell("dd if=/dev/zero of=blocks bs=4096 seek=7 count=3 status=none conv=notrunc");
    pair.delivered();
}

#[test]
fn inode_numbers_and_times_stay_over_the_delivery() {
    let Some(pair) = pair(Lab::lan(&[Need::Fuse])) else { return };
    let path = pair.ours.join("new");
    fs::write(&path, "bytes").unwrap();
    let before = fs::metadata(&path).unwrap();
    pair.delivered();
    files::drop_kernel_caches();
    let after = fs::metadata(&path).unwrap();
    assert_eq!(before.ino(), after.ino(), "git would read every file again");
    assert_eq!((before.mtime(), before.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
    let there = fs::metadata(pair.theirs.join("new")).unwrap();
    assert_eq!((before.mtime(), before.mtime_nsec()), (there.mtime(), there.mtime_nsec()));
}

/// What a person does on a train: 1,000 new files, 100 edited, 50 renamed, 50 deleted.
#[test]
fn offline_work_is_kept_over_a_restart_and_arrives() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    for n in 0..200 {
        fs::write(theirs.join(format!("old-{n}")), format!("old {n}")).unwrap();
    }
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    let mut pair = Pair { lab, owner, reader, theirs, ours };
    pair.owner.stop();
    wait_until("the owner to be known as gone", DELIVERY, || !pair.reader.sees_online("owner"));
    let ours = pair.ours.clone();
    for n in 0..1000 {
        fs::write(ours.join(format!("new-{n}")), format!("new {n}")).unwrap();
    }
    for n in 0..100 {
        fs::write(ours.join(format!("old-{n}")), format!("edited {n}")).unwrap();
    }
    for n in 100..150 {
        fs::rename(ours.join(format!("old-{n}")), ours.join(format!("renamed-{n}"))).unwrap();
    }
    for n in 150..200 {
        fs::remove_file(ours.join(format!("old-{n}"))).unwrap();
    }
    let expected = names(&ours);
    assert_eq!(expected.len(), 1000 + 100 + 50);
    pair.reader.kill();
    pair.reader.start();
    pair.reader.mount();
    assert_eq!(names(&ours), expected, "what was done is gone after a restart");
    assert_eq!(fs::read_to_string(ours.join("new-999")).unwrap(), "new 999");
    assert_eq!(fs::read_to_string(ours.join("old-99")).unwrap(), "edited 99");
    let waiting = pair.reader.sd(&["sync", "--timeout", "1s"]);
    assert_eq!(waiting.status.code(), Some(1));
    assert!(waiting.text().contains("new-999"), "what waits is listed: {}", waiting.text());
    pair.owner.start();
    pair.reader.wait_online("owner");
    pair.delivered();
    assert_eq!(names(&pair.theirs), expected);
    assert_eq!(fs::read_to_string(pair.theirs.join("renamed-149")).unwrap(), "old 149");
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn making_a_thousand_files_takes_no_longer_for_the_distance() {
    let Some(pair) = pair(Lab::emulated(&[Need::Fuse], &["--delay", "10"])) else { return };
    let folder = pair.ours.join("many");
    fs::create_dir(&folder).unwrap();
    let bytes = files::random_bytes(4096, 7);
    let began = Instant::now();
    for n in 0..1000 {
        fs::write(folder.join(n.to_string()), &bytes).unwrap();
    }
    let took = began.elapsed();
    // The budget is 0.5 ms a file; a debug build on a busy machine gets ten times that, which
    // still is a quarter of the 20 ms that a single round trip for each file would cost.
    assert!(took < Duration::from_secs(5), "1,000 files took {took:?}");
    println!("{:.2} ms a file", took.as_secs_f64());
    pair.delivered();
    assert_eq!(names(&pair.theirs.join("many")).len(), 1000);
}

#[test]
fn a_small_change_in_a_large_file_sends_little() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    let large = theirs.join("large");
    // Sparse but for some places: what is sent must not depend on what lies between.
    File::create(&large).unwrap().set_len(4 << 30).unwrap();
    let file = OpenOptions::new().write(true).open(&large).unwrap();
    for n in 0..16 {
        file.write_all_at(&files::random_bytes(8192, n), n * (256 << 20)).unwrap();
    }
    drop(file);
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files/large");
    let (out, back) = (reader.content_bytes_out(), reader.content_bytes_in());
    let file = OpenOptions::new().write(true).open(&ours).unwrap();
    file.write_all_at(&files::random_bytes(4096, 99), 3 << 30).unwrap();
    drop(file);
    reader.sd(&["sync", "--timeout", "120s"]).ok();
    let mut there = vec![0; 4096];
    File::open(&large).unwrap().read_exact_at(&mut there, 3 << 30).unwrap();
    assert_eq!(there, files::random_bytes(4096, 99));
    File::open(&large).unwrap().read_exact_at(&mut there, 256 << 20).unwrap();
    assert_eq!(there, files::random_bytes(8192, 1)[..4096]);
    assert_eq!(fs::metadata(&large).unwrap().len(), 4 << 30);
    let moved = reader.content_bytes_out() - out + reader.content_bytes_in() - back;
    assert!(moved < 1 << 20, "{moved} bytes for a change of 4 KiB");
}

#[test]
fn content_that_the_owner_has_already_is_not_sent() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let theirs = lab.folder("source");
    let hash = files::random_file(&theirs.join("original"), 64 << 20, 3);
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    let before = reader.content_bytes_out();
    fs::copy(ours.join("original"), ours.join("copy")).unwrap();
    reader.sd(&["sync", "--timeout", "120s"]).ok();
    assert_eq!(files::hash_file(&theirs.join("copy")).unwrap(), hash);
    let sent = reader.content_bytes_out() - before;
    assert_eq!(sent, 0, "{sent} bytes sent of a file that the owner has");
}

#[test]
fn a_large_file_arrives_although_the_link_breaks() {
    let Some(pair) = pair(Lab::emulated(&[Need::Fuse], &["--rate", "200"])) else { return };
    let hash = files::random_file(&pair.ours.join("film"), 96 << 20, 4);
    wait_until("a part to be sent", DELIVERY, || pair.reader.content_bytes_out() > 16 << 20);
    pair.lab.link().cut();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(files::hash_file(&pair.ours.join("film")).unwrap(), hash, "offline, its own write");
    pair.lab.link().restore();
    pair.reader.sd(&["sync", "--timeout", "120s"]).ok();
    assert_eq!(files::hash_file(&pair.theirs.join("film")).unwrap(), hash);
    pair.assert_no_droppings();
}

#[test]
fn a_synchronous_write_is_with_its_owner_when_it_returns() {
    let Some(mut pair) = pair(Lab::emulated(&[Need::Fuse], &["--delay", "10"])) else { return };
    let (theirs, ours) = (pair.theirs.clone(), pair.ours.clone());
    for (name, flag) in [("sync", O_SYNC), ("data-sync", O_DSYNC)] {
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).custom_flags(flag).open(ours.join(name));
        let file = file.unwrap();
        for (n, bytes) in [&b"first"[..], &files::random_bytes(3 << 20, 5)].iter().enumerate() {
            let began = Instant::now();
            file.write_all_at(bytes, 0).unwrap();
            let took = began.elapsed();
            assert_eq!(fs::read(theirs.join(name)).unwrap(), *bytes, "{name}, write {n}");
            assert!(took > Duration::from_millis(20), "a round trip: {took:?}");
            println!("{name}: {} bytes in {took:?}", bytes.len());
        }
        file.sync_all().unwrap();
    }
    // Through another handle nothing waits, and a synchronous one waits for what that wrote.
    fs::write(ours.join("sync"), "by another").unwrap();
    let file = OpenOptions::new().write(true).custom_flags(O_SYNC).open(ours.join("sync"));
    file.unwrap().sync_all().unwrap();
    assert_eq!(fs::read(theirs.join("sync")).unwrap(), b"by another");
    pair.owner.stop();
    wait_until("the owner to be known as gone", DELIVERY, || !pair.reader.sees_online("owner"));
    let file = OpenOptions::new().write(true).custom_flags(O_SYNC).open(ours.join("sync"));
    within("a write without the owner", Duration::from_secs(2), move || {
        file.unwrap().write_all_at(b"alone", 0).unwrap();
    });
    pair.owner.start();
    pair.reader.wait_online("owner");
    pair.delivered();
    assert_eq!(fs::read(theirs.join("sync")).unwrap(), b"aloneother");
}

#[test]
fn a_synchronous_write_to_a_frozen_owner_can_be_killed_and_ends() {
    let Some(pair) = pair(Lab::lan(&[Need::Fuse])) else { return };
    let path = pair.ours.join("file");
    let writer = |path: &Path| {
        let mut dd = Command::new("dd");
        dd.args(["if=/dev/zero", "bs=4096", "count=1", "conv=notrunc", "oflag=sync"]);
        dd.arg(format!("of={}", path.display())).stderr(std::process::Stdio::null());
        proc::spawn(&mut dd)
    };
    // The kernel itself knows the size only when the write has ended.
    let waiting_writes = || {
        let pending = pair.reader.json(&["pending"]);
        let rows = pending["pending"].as_array().unwrap();
        rows.iter().filter(|row| row["bytes"] == 4096).count()
    };
    for signal in [Signal::KILL, Signal::INT, Signal::TERM] {
        let path = pair.ours.join(format!("ended-by-{}", signal.as_raw()));
        pair.owner.freeze();
        let mut child = writer(&path);
        wait_until("it to have written", DELIVERY, || waiting_writes() == 1);
        assert!(child.try_wait().unwrap().is_none(), "it waits for its owner");
        proc::signal(&child, signal);
        // Before the deadline of the write itself.
        wait_until(format!("{signal:?} to end it"), Duration::from_secs(5), || {
            child.try_wait().unwrap().is_some()
        });
        pair.owner.thaw();
        pair.reader.sd(&["sync", "--timeout", "60s"]).ok();
        assert_eq!(fs::read(&path).unwrap(), [0; 4096]);
    }
    // More than there are threads for the kernel: all else goes on meanwhile.
    fs::read(&path).unwrap();
    files::drop_kernel_caches();
    pair.owner.freeze();
    let many: Vec<PathBuf> = (0..6).map(|n| pair.ours.join(format!("made-{n}"))).collect();
    let mut waiting: Vec<_> = many.iter().map(|path| writer(path)).collect();
    wait_until("all to have written", DELIVERY, || waiting_writes() == many.len());
    within("reading beside those who wait", Duration::from_secs(2), move || {
        fs::read(path).unwrap();
    });
    let began = Instant::now();
    for child in &mut waiting {
        wait_until("the end of waiting", Duration::from_secs(20), || {
            child.try_wait().unwrap().is_some()
        });
        assert!(child.wait().unwrap().success(), "it is durable here");
    }
    println!("a frozen owner was waited for {:?}", began.elapsed());
    pair.owner.thaw();
    pair.reader.wait_online("owner");
    pair.delivered();
    assert!(many.iter().all(|path| fs::read(path).unwrap() == [0; 4096]));
}

#[test]
fn a_full_disk_refuses_the_writer_and_loses_nothing_accepted() {
    let Some(lab) = Lab::lan(&[Need::Fuse, Need::LoopDevices]) else { return };
    let theirs = lab.folder("source");
    fs::write(theirs.join("file"), "text").unwrap();
    let [mut owner, mut reader] = lab.two_devices(["owner", "reader"]);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    owner.share(&theirs, "files");
    reader.stop();
    fs::remove_dir_all(reader.data_dir()).unwrap();
    let disk = SmallDisk::mount(&lab.dir().join("disk.img"), &reader.data_dir(), DISK_BYTES);
    reader.start();
    reader.join(&owner);
    reader.mount();
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    owner.stop();
    wait_until("the owner to be known as gone", DELIVERY, || !reader.sees_online("owner"));
    let mut accepted = Vec::new();
    let full = loop {
        let name = format!("part-{}", accepted.len());
        let bytes = files::random_bytes(8 << 20, accepted.len() as u64);
        match fs::write(ours.join(&name), &bytes) {
            Ok(()) => accepted.push((name, blake3::hash(&bytes))),
            Err(error) => break error,
        }
        assert!(accepted.len() < 256, "a disk of {DISK_BYTES} bytes took everything");
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull, "{full}");
    assert!(accepted.len() > 4, "only {} parts were taken", accepted.len());
    // Reading and removing still work on the full disk.
    assert_eq!(files::hash_file(&ours.join(&accepted[0].0)).unwrap(), accepted[0].1);
    let gone = accepted.pop().unwrap().0;
    fs::remove_file(ours.join(&gone)).unwrap();
    reader.kill();
    reader.start();
    owner.start();
    reader.wait_online("owner");
    // A file that was refused half-way may be there with what was taken of it; it is not ours.
    reader.sd(&["sync", "--timeout", "120s"]).ok();
    assert!(!theirs.join(&gone).exists());
    for (name, hash) in accepted {
        assert_eq!(files::hash_file(&theirs.join(&name)).unwrap(), hash, "{name}");
    }
    drop(reader);
    drop(disk);
}
