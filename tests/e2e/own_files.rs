//! This device's own files through its mount: read and written as if the mount were not there.
//!
//! Every case runs with passthrough and without; where the kernel or the rights do not allow
//! passthrough, both runs take the slower path.

use e2e::{Device, Lab, Need, files, proc};
use rustix::fs::{
    CWD, Mode, RenameFlags, XattrFlags, getxattr, listxattr, renameat_with, setxattr,
};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The location's folder on the disk and in the mount.
struct Own {
    disk: PathBuf,
    mount: PathBuf,
    _device: Device,
    _lab: Lab,
}

fn own(passthrough: &str) -> Option<Own> {
    let lab = Lab::local(&[Need::Fuse])?;
    let disk = lab.folder("location");
    let device = lab.device("solo");
    device.sd(&["config", "set", "mount.passthrough", passthrough]).ok();
    let mut device = device;
    device.stop();
    device.start();
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    device.add_location(&disk, "files");
    device.mount();
    let mount = device.at("solo/files");
    Some(Own { disk, mount, _device: device, _lab: lab })
}

/// Each case as two tests: `auto` and `off`.
macro_rules! in_both_modes {
    ($($case:ident),* $(,)?) => {
        mod auto { $(#[test] fn $case() { if let Some(own) = super::own("auto") { super::$case(&own) } })* }
        mod off { $(#[test] fn $case() { if let Some(own) = super::own("off") { super::$case(&own) } })* }
    };
}
in_both_modes!(
    reading_and_writing,
    appending,
    truncating,
    mapped_files,
    names_come_and_go,
    renames,
    links_and_special_files,
    attributes,
    extended_attributes,
    two_handles_see_each_other,
    deleted_while_open,
    real_programs,
    a_large_directory,
    changes_on_the_disk_are_seen,
);

fn reading_and_writing(own: &Own) {
    let bytes = files::random_bytes(5_000_001, 1);
    fs::write(own.mount.join("new"), &bytes).unwrap();
    assert!(fs::read(own.disk.join("new")).unwrap() == bytes, "what was written is on the disk");
    assert!(fs::read(own.mount.join("new")).unwrap() == bytes);
    let file = File::options().read(true).write(true).open(own.mount.join("new")).unwrap();
    for offset in [0, 4095, 4096, 131_071, 5_000_000] {
        file.write_all_at(b"!", offset).unwrap();
    }
    file.sync_all().unwrap();
    let mut expected = bytes;
    for offset in [0, 4095, 4096, 131_071, 5_000_000] {
        expected[offset] = b'!';
    }
    assert!(fs::read(own.disk.join("new")).unwrap() == expected);
    file.write_all_at(b"far", 10_000_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 10_000_003);
    assert!(fs::read(own.disk.join("new")).unwrap()[5_000_001..10_000_000].iter().all(|b| *b == 0));
    let error =
        File::options().write(true).create_new(true).open(own.mount.join("new")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
}

fn appending(own: &Own) {
    let open = || File::options().append(true).create(true).open(own.mount.join("log")).unwrap();
    let (mut one, mut two) = (open(), open());
    let mut expected = String::new();
    for n in 0..200 {
        let line = format!("line {n}\n");
        [&mut one, &mut two][n % 2].write_all(line.as_bytes()).unwrap();
        expected += &line;
        if n == 100 {
            // Another program, past the mount.
            let mut third = File::options().append(true).open(own.disk.join("log")).unwrap();
            third.write_all(b"from outside\n").unwrap();
            expected += "from outside\n";
        }
    }
    assert_eq!(fs::read_to_string(own.disk.join("log")).unwrap(), expected);
    assert_eq!(fs::read_to_string(own.mount.join("log")).unwrap(), expected);
}

fn truncating(own: &Own) {
    let path = own.mount.join("file");
    fs::write(&path, "0123456789").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.set_len(4).unwrap();
    assert_eq!(fs::read(own.disk.join("file")).unwrap(), b"0123");
    file.set_len(6).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123\0\0");
    assert_eq!(file.metadata().unwrap().len(), 6);
    File::options().write(true).truncate(true).open(&path).unwrap();
    assert_eq!(fs::metadata(own.disk.join("file")).unwrap().len(), 0);
    assert_eq!(fs::read(&path).unwrap(), b"");
}

fn mapped_files(own: &Own) {
    // Python's mmap is a map as any program makes it.
    let path = own.mount.join("map");
    fs::write(&path, vec![b'.'; 10_000]).unwrap();
    let script = "import mmap,sys\n\
        f=open(sys.argv[1],'r+b'); m=mmap.mmap(f.fileno(),0)\n\
        m[5000:5005]=b'hello'; m.flush(); m.close(); f.close()";
    let mut python = Command::new("python3");
    proc::run(python.args(["-c", script]).arg(&path), Duration::from_secs(20)).ok();
    for place in [&own.disk, &own.mount] {
        assert_eq!(&fs::read(place.join("map")).unwrap()[4999..5006], b".hello.");
    }
}

fn names_come_and_go(own: &Own) {
    fs::create_dir_all(own.mount.join("a/b/c")).unwrap();
    assert!(own.disk.join("a/b/c").is_dir());
    fs::write(own.mount.join("a/b/c/file"), "x").unwrap();
    let error = fs::remove_dir(own.mount.join("a/b/c")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::NOTEMPTY.raw_os_error()));
    let error = fs::remove_file(own.mount.join("a/b")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::ISDIR.raw_os_error()));
    let error = fs::create_dir(own.mount.join("a/b")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EXIST.raw_os_error()));
    let error = File::create(own.mount.join("x".repeat(256))).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
    fs::remove_file(own.mount.join("a/b/c/file")).unwrap();
    fs::remove_dir_all(own.mount.join("a")).unwrap();
    assert_eq!(fs::read_dir(&own.disk).unwrap().count(), 0);
}

fn renames(own: &Own) {
    let [one, two] = ["one", "two"].map(|name| own.mount.join(name));
    fs::write(&one, "1").unwrap();
    fs::write(&two, "2").unwrap();
    fs::rename(&one, &two).unwrap();
    assert!(!one.exists() && !own.disk.join("one").exists());
    assert_eq!(fs::read_to_string(&two).unwrap(), "1");
    fs::write(&one, "3").unwrap();
    let error = renameat_with(CWD, &one, CWD, &two, RenameFlags::NOREPLACE).unwrap_err();
    assert_eq!(error, Errno::EXIST);
    renameat_with(CWD, &one, CWD, &two, RenameFlags::EXCHANGE).unwrap();
    assert_eq!([&one, &two].map(|path| fs::read_to_string(path).unwrap()), ["1", "3"]);

    fs::create_dir_all(own.mount.join("dir/sub")).unwrap();
    fs::rename(own.mount.join("dir"), own.mount.join("moved")).unwrap();
    assert!(own.mount.join("moved/sub").is_dir() && !own.mount.join("dir").exists());
    let error = fs::rename(own.mount.join("moved"), own.mount.join("moved/sub/x")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
    // An editor's save: at no moment is the name gone or its content partial.
    let target = own.mount.join("saved");
    fs::write(&target, "old").unwrap();
    let open = File::open(&target).unwrap();
    fs::write(own.mount.join("saved.tmp"), "new").unwrap();
    fs::rename(own.mount.join("saved.tmp"), &target).unwrap();
    assert_eq!(std::io::read_to_string(open).unwrap(), "old");
    assert_eq!(fs::read_to_string(&target).unwrap(), "new");
}

fn links_and_special_files(own: &Own) {
    fs::write(own.mount.join("file"), "text").unwrap();
    fs::hard_link(own.mount.join("file"), own.mount.join("again")).unwrap();
    let [one, two] = ["file", "again"].map(|name| fs::metadata(own.mount.join(name)).unwrap());
    assert_eq!((one.ino(), one.nlink()), (two.ino(), 2));
    File::options().append(true).open(own.mount.join("again")).unwrap().write_all(b"!").unwrap();
    assert_eq!(fs::read_to_string(own.mount.join("file")).unwrap(), "text!");

    symlink("file", own.mount.join("link")).unwrap();
    assert_eq!(fs::read_link(own.disk.join("link")).unwrap(), Path::new("file"));
    assert_eq!(fs::read_to_string(own.mount.join("link")).unwrap(), "text!");

    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(CWD, own.mount.join("fifo"), kind, Mode::from_raw_mode(0o600), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(own.disk.join("socket")).unwrap();
    // The mount's FIFO is a real one: what goes in comes out.
    let path = own.mount.join("fifo");
    let writer = std::thread::spawn({
        let path = path.clone();
        move || fs::write(path, "through the pipe").unwrap()
    });
    let (text, _) = e2e::wait::within("reading a FIFO", Duration::from_secs(10), move || {
        fs::read_to_string(path).unwrap()
    });
    assert_eq!(text, "through the pipe");
    writer.join().unwrap();
    files::assert_same_listing(&files::listing(&own.disk), &files::listing(&own.mount));
}

fn attributes(own: &Own) {
    let path = own.mount.join("file");
    fs::write(&path, "text").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
    assert_eq!(fs::metadata(own.disk.join("file")).unwrap().mode() & 0o7777, 0o4751);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
    let when = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(when).unwrap();
    for place in [&own.disk, &own.mount] {
        assert_eq!(fs::metadata(place.join("file")).unwrap().modified().unwrap(), when);
    }
    drop(file);
    let (disk, mount) =
        (fs::metadata(own.disk.join("file")).unwrap(), fs::metadata(&path).unwrap());
    assert_eq!((disk.uid(), disk.gid(), disk.blocks()), (mount.uid(), mount.gid(), mount.blocks()));
    let statfs = |path: &Path| rustix::fs::statvfs(path).unwrap().f_blocks;
    assert_eq!(statfs(&own.disk), statfs(&own.mount), "the disk's own size");
}

fn extended_attributes(own: &Own) {
    let path = own.mount.join("file");
    fs::write(&path, "text").unwrap();
    setxattr(&path, "user.note", b"hello \xff", XattrFlags::CREATE).unwrap();
    let mut value = [0; 100];
    for place in [&own.disk, &own.mount] {
        let n = getxattr(place.join("file"), "user.note", &mut value).unwrap();
        assert_eq!(&value[..n], b"hello \xff");
    }
    let n = listxattr(&path, &mut value).unwrap();
    assert!(value[..n].split(|b| *b == 0).any(|name| name == b"user.note"));
    assert_eq!(setxattr(&path, "user.note", b"", XattrFlags::CREATE).unwrap_err(), Errno::EXIST);
    rustix::fs::removexattr(&path, "user.note").unwrap();
    assert_eq!(getxattr(&path, "user.note", &mut value).unwrap_err(), Errno::NODATA);
}

fn two_handles_see_each_other(own: &Own) {
    let path = own.mount.join("shared");
    fs::write(&path, "").unwrap();
    let writer = File::options().write(true).open(&path).unwrap();
    let reader = File::open(&path).unwrap();
    for n in 0..100_u64 {
        let text = format!("{n:08}");
        writer.write_all_at(text.as_bytes(), n * 8).unwrap();
        let mut seen = [0; 8];
        reader.read_exact_at(&mut seen, n * 8).unwrap();
        assert_eq!(seen, text.as_bytes());
        assert_eq!(fs::metadata(&path).unwrap().len(), (n + 1) * 8);
    }
}

fn deleted_while_open(own: &Own) {
    let path = own.mount.join("gone");
    fs::write(&path, "still here").unwrap();
    let mut file = File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!path.exists() && !own.disk.join("gone").exists());
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    file.write_all(b" and written").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    assert_eq!(std::io::read_to_string(&file).unwrap(), "still here and written");
    assert_eq!(fs::read_dir(&own.disk).unwrap().count(), 0, "nothing was left behind");
}

fn real_programs(own: &Own) {
    let script = "set -e\n\
        cp -a /usr/include/linux headers\n\
        tar cf headers.tar headers && mkdir again && tar xf headers.tar -C again\n\
        diff -r headers again/headers\n\
        mv headers moved && cp -a moved copied && rm -r moved\n\
        sed -i s/define/DEFINE/ copied/fuse.h && grep -q DEFINE copied/fuse.h\n\
        dd if=/dev/zero of=block bs=64k count=16 conv=fsync status=none\n\
        sort -o sorted copied/fuse.h && test -s sorted";
    let mut sh = Command::new("sh");
    proc::run(sh.args(["-c", script]).current_dir(&own.mount), Duration::from_secs(120)).ok();
    files::assert_same_bytes(&own.disk, &own.mount);
    files::assert_same_listing(&files::listing(&own.disk), &files::listing(&own.mount));
}

fn a_large_directory(own: &Own) {
    fs::create_dir(own.disk.join("many")).unwrap();
    (0..100_000).for_each(|n| drop(File::create(own.disk.join(format!("many/{n}"))).unwrap()));
    let mounted = own.mount.join("many");
    let (names, _) = e2e::wait::within("100,000 names", Duration::from_secs(30), move || {
        let names = fs::read_dir(mounted).unwrap().map(|entry| entry.unwrap().file_name());
        names.collect::<std::collections::HashSet<_>>()
    });
    assert_eq!(names.len(), 100_000);
    let mounted = own.mount.join("many");
    e2e::wait::within("removing 100,000 names", Duration::from_secs(120), move || {
        fs::remove_dir_all(mounted).unwrap();
    });
    assert_eq!(fs::read_dir(&own.disk).unwrap().count(), 0);
}

fn changes_on_the_disk_are_seen(own: &Own) {
    let soon = Duration::from_secs(5);
    fs::write(own.disk.join("file"), "one").unwrap();
    e2e::wait::wait_until("a new file", soon, || {
        fs::read_to_string(own.mount.join("file")).is_ok_and(|text| text == "one")
    });
    fs::write(own.disk.join("file"), "another").unwrap();
    e2e::wait::wait_until("new bytes", soon, || {
        fs::read_to_string(own.mount.join("file")).is_ok_and(|text| text == "another")
    });
    fs::rename(own.disk.join("file"), own.disk.join("renamed")).unwrap();
    e2e::wait::wait_until("a new name", soon, || {
        own.mount.join("renamed").exists() && !own.mount.join("file").exists()
    });
    fs::remove_file(own.disk.join("renamed")).unwrap();
    e2e::wait::wait_until("no name", soon, || !own.mount.join("renamed").exists());
}
