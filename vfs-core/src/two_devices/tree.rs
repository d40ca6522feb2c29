//! Files by their paths, however they were learned.

use crate::error::Kind;
use crate::model::Time;
use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// What a file is.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum What {
    /// Its bytes, or why they cannot be read.
    File(Result<Vec<u8>, Kind>),
    Dir,
    Link(String),
}

/// A file as it is seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Seen {
    pub what: What,
    pub perm: u16,
    pub mtime: Time,
    pub nlink: u32,
    /// Its inode number there.
    pub ino: u64,
}

/// Everything below a folder.
pub(super) type Tree = BTreeMap<String, Seen>;

impl std::fmt::Debug for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(Ok(bytes)) => write!(f, "{}", short(bytes)),
            Self::File(Err(kind)) => write!(f, "unreadable: {kind:?}"),
            Self::Dir => write!(f, "directory"),
            Self::Link(to) => write!(f, "link to {to}"),
        }
    }
}

/// Bytes for a person: runs of the same one are written once.
pub(super) fn short(bytes: &[u8]) -> String {
    let runs = bytes.chunk_by(|a, b| a == b);
    let said = runs.map(|run| match run[0] {
        0 => format!("{}×0", run.len()),
        byte => format!("{}×{}", run.len(), char::from(byte)),
    });
    said.collect::<Vec<_>>().join(" ")
}

/// What a folder on a disk has.
pub(super) fn of_disk(folder: &Path) -> Tree {
    let mut tree = Tree::new();
    walk(folder, "", &mut tree);
    tree
}

/// The same of a folder that may not be there.
pub(super) fn of_disk_below(folder: &Path) -> std::io::Result<Tree> {
    std::fs::read_dir(folder).map(|_| of_disk(folder))
}

fn walk(dir: &Path, prefix: &str, tree: &mut Tree) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_string_lossy());
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let what = match () {
            () if meta.is_dir() => {
                walk(&path, &format!("{name}/"), tree);
                What::Dir
            }
            () if meta.is_symlink() => {
                What::Link(std::fs::read_link(&path).unwrap().to_string_lossy().into_owned())
            }
            () => What::File(Ok(std::fs::read(&path).unwrap())),
        };
        let mtime = Time { secs: meta.mtime(), nanos: meta.mtime_nsec() as u32 };
        let perm = (meta.permissions().mode() & 0o7777) as u16;
        let (nlink, ino) = (meta.nlink() as u32, meta.ino());
        tree.insert(name, Seen { what, perm, mtime, nlink, ino });
    }
}

/// How two trees differ in what a program would see; inode numbers are each side's own.
pub(super) fn differences(left: &Tree, right: &Tree) -> Vec<String> {
    let paths = left.keys().chain(right.keys()).collect::<std::collections::BTreeSet<_>>();
    let differs = |path: &&String| !is_alike(left.get(*path), right.get(*path));
    let said = |path: &String| format!("{path}: {:?} and {:?}", left.get(path), right.get(path));
    paths.into_iter().filter(differs).map(said).collect()
}

fn is_alike(left: Option<&Seen>, right: Option<&Seen>) -> bool {
    let (Some(left), Some(right)) = (left, right) else { return false };
    match (&left.what, &right.what) {
        (What::File(_), _) => {
            let all = |s: &Seen| (s.what.clone(), s.perm, s.mtime, s.nlink);
            all(left) == all(right)
        }
        (What::Dir, _) => (&left.what, left.perm) == (&right.what, right.perm),
        (What::Link(_), _) => left.what == right.what,
    }
}
