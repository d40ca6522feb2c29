use super::*;
use std::fs;

/// A line of the table: number, parent, folder, mount point, options, type.
fn line(id: u64, parent: u64, root: &str, at: &str, options: &str, fs_type: &str) -> String {
    format!("{id} {parent} 0:{id} {root} {at} {options} shared:1 master:2 - {fs_type} src rw")
}

fn mounts(lines: &[String]) -> Mounts {
    Mounts(lines.iter().map(|line| parse(line.as_bytes()).expect("a line")).collect())
}

fn paths(mounts: &Mounts, path: &str) -> Vec<PathBuf> {
    mounts.paths_of(Path::new(path)).into_iter().map(|(_, path)| path).collect()
}

#[test]
fn a_line_is_read_and_anything_else_is_none() {
    let text = r"36 25 8:17 /a\040b /media/my\134stick ro,nosuid - vfat /dev/sdb1 rw";
    let mount = parse(text.as_bytes()).unwrap();
    assert_eq!((mount.id, mount.parent, mount.device), (36, 25, (8, 17)));
    assert_eq!(mount.root, Path::new("/a b"));
    assert_eq!(mount.mountpoint, Path::new(r"/media/my\stick"));
    assert!(mount.read_only && mount.fs_type == "vfat");
    for text in ["", "36", "36 25 8:17 / /x rw shared:1", "x 25 8:17 / /x rw - ext4 y rw"] {
        assert_eq!(parse(text.as_bytes()), None, "{text:?}");
    }
}

#[test]
fn a_folder_is_where_the_mounts_of_its_part_of_the_disk_show_it() {
    let mounts = mounts(&[
        line(1, 0, "/", "/", "rw", "ext4"),
        line(2, 1, "/", "/z", "ro", "ext4"),
        line(3, 1, "/photos", "/bind", "rw", "ext4"),
        line(4, 1, "/other", "/o", "rw", "ext4"),
    ]);
    let found = ["/photos/2024", "/bind/2024", "/z/photos/2024"].map(PathBuf::from);
    assert_eq!(paths(&mounts, "/photos/2024"), found);
    assert_eq!(paths(&mounts, "/photos")[1], Path::new("/bind"));
    assert_eq!(paths(&mounts, "/photosynthesis").len(), 2, "whole names only");
}

#[test]
fn what_may_not_answer_is_not_touched() {
    let mounts = mounts(&[
        line(1, 0, "/", "/", "rw", "overlay"),
        line(2, 1, "/", "/nfs", "rw", "nfs4"),
        line(3, 2, "/", "/nfs/stick", "rw", "ext4"),
        line(4, 1, "/", "/drive", "rw", "fuse.spacedrive"),
        line(5, 1, "/", "/run", "rw", "tmpfs"),
        line(6, 5, "/", "/run/stick", "rw", "ext4"),
        // Covered: by what was mounted over it, and by what was mounted over a folder above it.
        line(7, 1, "/", "/a", "rw", "ext4"),
        line(8, 7, "/", "/a", "rw", "nfs4"),
        line(9, 1, "/", "/b/c", "rw", "ext4"),
        line(10, 1, "/", "/b", "rw", "cifs"),
    ]);
    assert_eq!(paths(&mounts, "/x"), [Path::new("/run/stick/x")]);
}

#[test]
fn a_table_that_leads_in_a_circle_ends() {
    let mounts = mounts(&[
        line(1, 2, "/", "/a", "rw", "ext4"),
        line(2, 1, "/", "/b", "rw", "ext4"),
        line(3, 3, "/", "/c", "rw", "ext4"),
    ]);
    assert_eq!(paths(&mounts, "/").len(), 3);
}

/// The folder below a real one, as if that were a mount of its file system's root.
fn mounted(dir: &Path) -> Mount {
    let fd = rustix::fs::open(dir, OFlags::PATH, Mode::empty()).unwrap();
    let id = mount_of(fd.as_fd()).unwrap();
    let mountpoint = dir.to_owned();
    let (device, root, fs_type) = ((0, 0), "/".into(), "ext4".into());
    Mount { id, parent: 0, device, root, mountpoint, read_only: false, fs_type }
}

/// What tells a real folder.
fn id_of(path: &Path) -> RootId {
    Root::open(path).unwrap().id().unwrap()
}

#[test]
fn only_the_folder_itself_is_opened_in_just_this_mount() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    fs::create_dir_all(dir.join("a/b")).unwrap();
    fs::create_dir(dir.join("other")).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    std::os::unix::fs::symlink("a", dir.join("link")).unwrap();
    let (mount, known) = (mounted(&dir), id_of(&dir.join("a/b")));
    let look = |known: &RootId, mount, path: &str| look(known, mount, dir.join(path));
    let found = look(&known, &mount, "a/b").expect("the folder");
    // Surely it only if its file system says which it is.
    let is_told = known.volume.is_some() || known.fs_id.is_some();
    assert_eq!(found.root.map(|root| root.path), is_told.then(|| dir.join("a/b")));
    for path in ["link/b", "link", "none", "file", "file/b", "other"] {
        assert!(look(&known, &mount, path).is_none(), "{path}");
    }
    let another = Mount { id: mount.id + 1, ..mount.clone() };
    assert!(look(&known, &another, "a/b").is_none(), "something else was mounted there meanwhile");
}

#[test]
fn what_cannot_be_looked_at_may_be_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let known = id_of(&dir);
    // As an error of the disk, here of a path that no call takes.
    let (mount, path) = (mounted(&dir), dir.join("x".repeat(300)));
    let found = look(&known, &mount, path).expect("a candidate");
    assert!(found.root.is_none() && found.disk == Some(mount.device));
    let another = RootId { volume: None, fs_id: known.fs_id.map(|id| id + 1), ..known };
    if another.fs_id.is_some() {
        let found = look(&another, &mount, dir.join("x".repeat(300)));
        assert!(found.is_none(), "a disk of another number is not asked");
    }
}

#[test]
fn the_path_on_the_disk_is_found_from_the_open_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap().join("a");
    fs::create_dir(&folder).unwrap();
    let root = Root::open(&folder).unwrap();
    let on_disk = path_on_disk(root.folder.as_fd()).unwrap();
    let id = mount_of(root.folder.as_fd()).unwrap();
    let mount = Mounts::now().0.into_iter().find(|m| m.id == id).unwrap();
    let below = Path::new(&on_disk).strip_prefix(&mount.root).unwrap();
    assert_eq!(mount.mountpoint.join(below), folder);
    assert_eq!(root.id().unwrap().path_on_disk, Some(on_disk));
}

/// Folders on disks of these numbers, each surely the one that is looked for or only maybe.
fn chosen(found: &[(u32, Maybe)], beside: &[u32]) -> Chosen {
    let dir = tempfile::tempdir().unwrap();
    let candidate = |(n, (disk, maybe)): (usize, &(u32, Maybe))| {
        let path = dir.path().join(n.to_string());
        fs::create_dir(&path).unwrap();
        let root = matches!(maybe, Surely).then(|| Root::open(&path).unwrap());
        Candidate { path, disk: Some((8, *disk)), root }
    };
    let beside = Beside(beside.iter().map(|disk| (100, (8, *disk))).collect());
    let number = |path: &Path| path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    match choose(found.iter().enumerate().map(candidate), &beside) {
        Search::Nowhere => Chosen::Nowhere,
        Search::Here(root) => Chosen::Here(number(root.path())),
        Search::Several(paths) => Chosen::Several(paths.len()),
        Search::Copy(path) => Chosen::Copy(number(&path)),
    }
}

#[derive(Clone, Copy)]
enum Maybe {
    Surely,
    Unclear,
}
use Maybe::{Surely, Unclear};

#[derive(PartialEq, Debug)]
enum Chosen {
    Nowhere,
    Here(usize),
    Several(usize),
    Copy(usize),
}

/// What is found, on which disks, which of them are beside the location's, and the choice.
type Case = (&'static [(u32, Maybe)], &'static [u32], Chosen);

#[test]
fn one_disk_is_chosen_and_of_copies_none() {
    use Chosen::{Copy, Here, Nowhere, Several};
    let cases: [Case; 11] = [
        (&[], &[], Nowhere),
        (&[(1, Surely)], &[], Here(0)),
        (&[(1, Unclear)], &[], Nowhere),
        (&[(1, Surely), (1, Surely)], &[], Here(0)),
        (&[(1, Unclear), (1, Surely)], &[], Here(1)),
        (&[(1, Surely), (2, Surely)], &[], Several(2)),
        (&[(1, Surely), (2, Unclear), (1, Surely)], &[], Several(2)),
        (&[(1, Surely)], &[2], Here(0)),
        // There beside the location's own disk: alone it is not it, also by another mount.
        (&[(2, Surely)], &[2], Copy(0)),
        (&[(2, Surely), (2, Surely)], &[2, 3], Copy(0)),
        (&[(1, Surely), (2, Surely)], &[2], Several(2)),
    ];
    for (n, (found, beside, expected)) in cases.into_iter().enumerate() {
        assert_eq!(chosen(found, beside), expected, "case {n}");
    }
}

#[test]
fn a_disk_is_beside_another_as_long_as_it_is_mounted() {
    let all = mounts(&[
        line(1, 0, "/", "/", "rw", "ext4"),
        line(2, 1, "/", "/a", "rw", "ext4"),
        line(3, 1, "/", "/b", "rw", "ext4"),
    ]);
    let mut beside = Beside(all.0.iter().skip(1).map(Mount::mark).collect());
    beside.retain(&mounts(&[]));
    assert_eq!(beside.0.len(), 2, "a table that cannot be read says nothing");
    // Unmounted, and its number given to another disk.
    let reused = "3 1 0:9 / /c rw - ext4 src rw".to_owned();
    beside.retain(&mounts(&[line(2, 1, "/", "/moved", "ro", "ext4"), reused]));
    let has = [2, 3, 9].map(|minor| beside.has(Some((0, minor))));
    assert_eq!(has, [true, false, false]);
}

#[test]
fn the_disk_of_a_folder_is_not_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let (root, now) = (Root::open(dir.path()).unwrap(), Mounts::now());
    let beside = now.beside(&root);
    assert!(!beside.has(Some(now.disk_of(&root))));
    assert!(!beside.0.is_empty(), "/proc at least is another one");
    let Search::Here(found) = now.search(&id_of(dir.path()), Some(now.candidate(root)), &beside)
    else {
        panic!("the folder at its own path")
    };
    assert_eq!(found.path(), dir.path());
}
