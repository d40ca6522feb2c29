use super::*;
use crate::model::Time;
use std::fs;

/// A line of the table: number, parent, folder, mount point, options, type.
fn line(id: u64, parent: u64, root: &str, at: &str, options: &str, fs_type: &str) -> String {
    format!("{id} {parent} 0:{id} {root} {at} {options} shared:1 master:2 - {fs_type} src rw")
}

fn mounts(lines: &[String]) -> Vec<Mount> {
    lines.iter().map(|line| parse(line.as_bytes()).expect("a line")).collect()
}

fn paths(mounts: &[Mount], path: &str) -> Vec<PathBuf> {
    candidates(mounts, Path::new(path)).into_iter().map(|(_, path)| path).collect()
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

#[test]
fn only_the_folder_itself_is_opened_in_just_this_mount() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    fs::create_dir_all(dir.join("a/b")).unwrap();
    fs::write(dir.join("file"), "").unwrap();
    std::os::unix::fs::symlink("a", dir.join("link")).unwrap();
    let mount = mounted(&dir);
    let open = |mount, path: &str| open_at(mount, &dir.join(path));
    assert_eq!(open(&mount, "a/b").unwrap().path(), dir.join("a/b"));
    for path in ["link/b", "link", "none", "file"] {
        open(&mount, path).expect_err(path);
    }
    let another = Mount { id: mount.id + 1, ..mount.clone() };
    assert!(open(&another, "a/b").is_err(), "something else was mounted there meanwhile");
}

#[test]
fn the_path_on_the_disk_is_found_from_the_open_folder() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap().join("a");
    fs::create_dir(&folder).unwrap();
    let root = Root::open(&folder).unwrap();
    let on_disk = path_on_disk(root.folder.as_fd()).unwrap();
    let id = mount_of(root.folder.as_fd()).unwrap();
    let table = table();
    let mount: Vec<_> = table.iter().filter(|m| m.id == id).cloned().collect();
    let below = Path::new(&on_disk).strip_prefix(&mount[0].root).unwrap();
    assert_eq!(mount[0].mountpoint.join(below), folder);
    assert_eq!(root.id().unwrap().path_on_disk, Some(on_disk));
}

/// Several real folders, of which each is to be on a disk of its own.
struct Disks {
    _dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
}

impl Disks {
    fn new(count: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..count).map(|n| dir.path().join(n.to_string())).collect();
        paths.iter().for_each(|path| fs::create_dir(path).unwrap());
        Self { _dir: dir, paths }
    }

    fn root(&self, n: usize) -> Root {
        Root::open(&self.paths[n]).unwrap()
    }
}

fn id(volume: Option<&str>, ino: u64, fs_id: Option<u64>) -> RootId {
    let volume = volume.map(str::to_owned);
    let btime = Some(Time { secs: 5, nanos: 0 });
    RootId { volume, ino: Some(ino), btime, fs_id, path_on_disk: Some("/a".into()) }
}

/// The disk that is chosen, or how many.
fn chosen(search: Search, disks: &Disks) -> Result<usize, usize> {
    match search {
        Search::Nowhere => Err(0),
        Search::Here(root) => Ok(disks.paths.iter().position(|p| p == root.path()).unwrap()),
        Search::Several(paths) => Err(paths.len()),
    }
}

#[test]
fn one_disk_is_chosen_and_of_copies_none() {
    let disks = Disks::new(3);
    let known = id(Some("A"), 2, Some(7));
    let choice = |found: &[(usize, RootId)]| {
        let found = found.iter().map(|(n, id)| (disks.root(*n), id.clone()));
        chosen(choose(&known, None, found), &disks)
    };
    let same = || known.clone();
    let another = || id(Some("B"), 2, Some(8));
    assert_eq!(choice(&[]), Err(0));
    assert_eq!(choice(&[(0, another()), (1, same()), (2, another())]), Ok(1));
    assert_eq!(choice(&[(0, another())]), Err(0));
    // Two mounts of one file system.
    assert_eq!(choice(&[(1, same()), (1, same())]), Ok(1));
    assert_eq!(choice(&[(0, same()), (1, same())]), Err(2));
    // A name that is on two disks `udev` lists for one of them.
    assert_eq!(choice(&[(0, same()), (1, id(None, 2, Some(7)))]), Err(2));
    assert_eq!(choice(&[(1, id(None, 2, Some(7)))]), Ok(1));
    assert_eq!(choice(&[(0, same()), (1, id(None, 2, None))]), Err(2));
    // The folder alone does not tell the disk, nor the disk the folder.
    assert_eq!(choice(&[(0, id(None, 2, None))]), Err(0));
    assert_eq!(choice(&[(0, id(Some("A"), 3, Some(7)))]), Err(0));
    assert_eq!(choice(&[(0, RootId { btime: None, ..same() })]), Err(0));
}

#[test]
fn a_copy_elsewhere_keeps_the_folder_at_its_own_path_from_being_taken() {
    let disks = Disks::new(2);
    let (known, home) = (id(Some("A"), 2, Some(7)), disks.root(0));
    let choice = |n| {
        let found = [(disks.root(n), known.clone())].into_iter();
        chosen(choose(&known, Some(&home), found), &disks)
    };
    assert_eq!(choice(0), Ok(0), "another mount of it is no copy");
    assert_eq!(choice(1), Err(2));
}
