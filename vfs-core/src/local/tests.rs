use super::*;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn name(bytes: &[u8]) -> Name {
    Name::new(bytes).unwrap()
}

fn folder() -> (tempfile::TempDir, Root) {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::open(dir.path()).unwrap();
    (dir, root)
}

fn by_name(listing: Vec<Observed>) -> BTreeMap<Vec<u8>, Observed> {
    listing.into_iter().map(|o| (o.name.as_bytes().to_vec(), o)).collect()
}

fn make_node(path: &Path, kind: rustix::fs::FileType) {
    rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o640), 0).unwrap();
}

#[test]
fn any_name_is_listed_as_its_bytes() {
    let (dir, root) = folder();
    let long = [b'x'; 255];
    let names: [&[u8]; 6] = [b"\xff\xfe\x80", b"new\nline", b"back\\slash", &long, b" ", b"-rf"];
    for name in names {
        fs::write(dir.path().join(OsStr::from_bytes(name)), b"1").unwrap();
    }
    let listed = by_name(root.list(&[]).unwrap());
    let mut expected: Vec<_> = names.iter().map(|n| n.to_vec()).collect();
    expected.sort();
    assert_eq!(listed.keys().cloned().collect::<Vec<_>>(), expected);
    for bytes in names {
        let file = root.open_for_reading(&[name(bytes)]).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1);
    }
}

#[test]
fn every_type_is_listed_with_its_attributes() {
    let (dir, root) = folder();
    let at = |n: &str| dir.path().join(n);
    fs::write(at("empty"), b"").unwrap();
    fs::write(at("file"), b"hello").unwrap();
    fs::create_dir(at("dir")).unwrap();
    symlink("loop", at("loop")).unwrap();
    symlink("/etc/passwd", at("out")).unwrap();
    make_node(&at("fifo"), rustix::fs::FileType::Fifo);
    make_node(&at("socket"), rustix::fs::FileType::Socket);
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(10 << 30).unwrap();
    sparse.write_all_at(b"end", (10 << 30) - 3).unwrap();

    let listed = by_name(root.list(&[]).unwrap());
    assert_eq!(listed.len(), 8);
    for (bytes, observed) in &listed {
        let meta = fs::symlink_metadata(dir.path().join(OsStr::from_bytes(bytes))).unwrap();
        let Attr { perm, uid, gid, nlink, size, mtime, ctime, blocks, .. } = observed.attr;
        assert_eq!(u32::from(perm), meta.mode() & 0o7777);
        assert_eq!((uid, gid, u64::from(nlink)), (meta.uid(), meta.gid(), meta.nlink()));
        assert_eq!((size, blocks), (meta.size(), meta.blocks()));
        assert_eq!((mtime.secs, i64::from(mtime.nanos)), (meta.mtime(), meta.mtime_nsec()));
        assert_eq!((ctime.secs, i64::from(ctime.nanos)), (meta.ctime(), meta.ctime_nsec()));
        assert_eq!(observed, &root.observe(&[], &observed.name).unwrap());
    }
    let types = |n: &str| listed[n.as_bytes()].attr.file_type;
    assert_eq!(types("empty"), FileType::File);
    assert_eq!(types("dir"), FileType::Directory);
    assert_eq!(types("fifo"), FileType::Fifo);
    assert_eq!(types("socket"), FileType::Socket);
    assert_eq!(types("loop"), FileType::Symlink);
    assert_eq!(listed[&b"out"[..]].target.as_deref(), Some(&b"/etc/passwd"[..]));
    let Attr { size, blocks, .. } = listed[&b"sparse"[..]].attr;
    assert!(size == 10 << 30 && blocks * 512 < 1 << 20, "{blocks} blocks");
}

#[test]
fn only_regular_files_are_opened_and_nothing_waits() {
    let (dir, root) = folder();
    let at = |n: &str| dir.path().join(n);
    make_node(&at("fifo"), rustix::fs::FileType::Fifo);
    make_node(&at("socket"), rustix::fs::FileType::Socket);
    fs::create_dir(at("dir")).unwrap();
    symlink("fifo", at("link")).unwrap();
    let began = Instant::now();
    let kind = |n: &[u8]| root.open_for_reading(&[name(n)]).unwrap_err().kind();
    assert_eq!(kind(b"fifo"), Kind::NotPermitted);
    assert_eq!(kind(b"socket"), Kind::NotPermitted);
    assert_eq!(kind(b"dir"), Kind::IsADirectory);
    assert_eq!(kind(b"link"), Kind::Loop);
    assert_eq!(kind(b"none"), Kind::NotFound);
    assert!(began.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_path_may_be_longer_than_path_max() {
    let (_dir, root) = folder();
    let part = [b'd'; 255];
    let mut path = Vec::new();
    for _ in 0..200 {
        let parent = root.dir(&path).unwrap();
        rustix::fs::mkdirat(&parent, OsStr::from_bytes(&part), Mode::RWXU).unwrap();
        path.push(name(&part));
    }
    let deepest = root.dir(&path).unwrap();
    let flags = OFlags::CREATE | OFlags::WRONLY;
    let file = rustix::fs::openat(&deepest, "leaf", flags, Mode::RUSR).unwrap();
    rustix::io::write(&file, b"deep").unwrap();

    assert_eq!(root.list(&path).unwrap()[0].name, name(b"leaf"));
    path.push(name(b"leaf"));
    let mut bytes = [0; 8];
    let file = root.open_for_reading(&path).unwrap();
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 4);
    assert_eq!(stamp_of(&file).unwrap().size, 4);
}

#[test]
fn no_link_leads_outside() {
    let (dir, root) = folder();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), b"secret").unwrap();
    symlink(outside.path(), dir.path().join("out")).unwrap();
    symlink(outside.path().join("secret"), dir.path().join("file")).unwrap();
    symlink("/proc/self/root", dir.path().join("magic")).unwrap();
    fs::create_dir(dir.path().join("inside")).unwrap();
    symlink("inside", dir.path().join("harmless")).unwrap();

    let path = [name(b"out"), name(b"secret")];
    assert_eq!(root.open_for_reading(&path).unwrap_err().kind(), Kind::Loop);
    assert_eq!(root.open_for_reading(&[name(b"file")]).unwrap_err().kind(), Kind::Loop);
    for link in [&b"out"[..], b"magic", b"harmless"] {
        // A symbolic link is never a directory here, wherever it leads.
        assert!(root.list(&[name(link)]).is_err());
        assert!(root.observe(&[name(link)], &name(b"secret")).is_err());
    }
}

/// Many swaps of a directory with a link to the outside: every read gives the inside or fails.
#[test]
fn a_parent_swapped_for_a_link_leads_nowhere() {
    let (dir, root) = folder();
    let outside = tempfile::tempdir().unwrap();
    fs::create_dir(outside.path().join("sub")).unwrap();
    fs::write(outside.path().join("sub/file"), b"outside").unwrap();
    fs::create_dir_all(dir.path().join("a/sub")).unwrap();
    fs::write(dir.path().join("a/sub/file"), b"inside!").unwrap();
    symlink(outside.path(), dir.path().join("b")).unwrap();

    let stop = AtomicBool::new(false);
    let path = [name(b"a"), name(b"sub"), name(b"file")];
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let (a, b) = (dir.path().join("a"), dir.path().join("b"));
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &a, CWD, &b, exchange).unwrap();
            }
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while (read < 200 || refused < 200) && Instant::now() < deadline {
            match root.open_for_reading(&path) {
                Ok(file) => {
                    let mut bytes = [0; 7];
                    file.read_exact_at(&mut bytes, 0).unwrap();
                    assert_eq!(&bytes, b"inside!");
                    read += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(read >= 200 && refused >= 200, "{read} read, {refused} refused");
}

#[test]
fn a_mount_point_is_an_empty_directory() {
    // Every Linux has these; what is mounted beneath must not be seen.
    let root = Root::open(Path::new("/")).unwrap();
    let proc = by_name(root.list(&[]).unwrap()).remove(&b"proc"[..]).unwrap();
    assert_eq!(proc.attr.file_type, FileType::Directory);
    assert_eq!((proc.attr.perm, proc.attr.nlink), (0o555, 2));
    assert_eq!(proc, root.observe(&[], &name(b"proc")).unwrap());
    let real = fs::metadata("/proc").unwrap();
    assert_ne!(proc.disk_ino, real.ino());
    assert_eq!(root.list(&[name(b"proc")]).unwrap_err().kind(), Kind::CrossDevice);
    let path = [name(b"proc"), name(b"version")];
    assert_eq!(root.open_for_reading(&path).unwrap_err().kind(), Kind::CrossDevice);
}

#[test]
fn a_replaced_folder_is_noticed() {
    let base = tempfile::tempdir().unwrap();
    let (here, there) = (base.path().join("here"), base.path().join("there"));
    fs::create_dir(&here).unwrap();
    let root = Root::open(&here).unwrap();
    assert!(root.is_current().unwrap());
    fs::rename(&here, &there).unwrap();
    assert_eq!(root.is_current().unwrap_err().kind(), Kind::NotFound);
    fs::create_dir(&here).unwrap();
    assert!(!root.is_current().unwrap());
    fs::remove_dir(&here).unwrap();
    fs::rename(&there, &here).unwrap();
    assert!(root.is_current().unwrap());
}

#[test]
fn a_large_directory_is_listed_whole() {
    let (dir, root) = folder();
    let mut expected: Vec<Vec<u8>> = (0..5000)
        .map(|i| format!("{i:0>60}"))
        .inspect(|n| fs::write(dir.path().join(n), b"").unwrap())
        .map(|n| std::ffi::OsString::from(n).into_vec())
        .collect();
    expected.sort();
    assert_eq!(by_name(root.list(&[]).unwrap()).into_keys().collect::<Vec<_>>(), expected);
}
