//! Files to test with: real ones found on the machine, and random ones.

use crate::proc;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long copying or listing a large tree may take.
const TREE: Duration = Duration::from_secs(300);

/// Bytes that no compression, deduplication or luck makes equal to others.
pub fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Writes a file of random bytes; gives its BLAKE3.
#[track_caller]
pub fn random_file(path: &Path, len: u64, seed: u64) -> blake3::Hash {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut file = File::create(path).expect("a new file");
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; 1 << 20];
    let mut left = len;
    while left > 0 {
        let part = &mut block[..left.min(1 << 20) as usize];
        rng.fill_bytes(part);
        hasher.update(part);
        file.write_all(part).expect("room on the disk");
        left -= part.len() as u64;
    }
    hasher.finalize()
}

/// BLAKE3 of a file, read from its beginning to its end as most programs do.
pub fn hash_file(path: &Path) -> io::Result<blake3::Hash> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; 256 << 10];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&block[..n]),
        };
    }
}

/// Copies real files of this machine into `target` until there are at least `count` of them:
/// unpacked crate sources, headers, documentation.
#[track_caller]
pub fn real_tree(target: &Path, count: usize) {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).unwrap_or_else(|| {
        Path::new(&std::env::var_os("HOME").expect("a home directory")).join(".cargo")
    });
    let sources = [
        home.join("registry/src"),
        "/usr/include".into(),
        "/usr/share/doc".into(),
        "/usr/share/man".into(),
        "/usr/lib/python3".into(),
        "/usr/share/perl".into(),
        "/usr/lib/gcc".into(),
    ];
    for (number, source) in sources.iter().filter(|source| source.is_dir()).enumerate() {
        let into = target.join(format!("{number}"));
        let mut cp = Command::new("cp");
        proc::run(cp.arg("-a").arg(source).arg(&into), TREE).ok();
        if files_in(target) >= count {
            return;
        }
    }
    panic!("this machine has only {} of {count} files to test with", files_in(target));
}

/// How many files a tree has.
#[track_caller]
pub fn files_in(folder: &Path) -> usize {
    let listed =
        proc::run(Command::new("find").arg(folder).args(["-type", "f", "-printf", "."]), TREE);
    listed.ok().stdout.len()
}

/// Every name of a tree with its type, mode, size, time and link target, sorted; names may hold
/// anything, so records end in NUL.
#[track_caller]
pub fn listing(folder: &Path) -> Vec<String> {
    records(&find(folder).ok().stdout)
}

/// The same of a tree that may be changing; `None` when `find` met a name that was just going.
#[track_caller]
pub fn try_listing(folder: &Path) -> Option<Vec<String>> {
    let found = find(folder);
    found.status.success().then(|| records(&found.stdout))
}

fn find(folder: &Path) -> proc::Finished {
    let format = "%P %y %m %s %T@ %l\\0";
    proc::run(Command::new("find").arg(folder).args(["-printf", format]), TREE)
}

fn records(listed: &[u8]) -> Vec<String> {
    let records = listed.split(|byte| *byte == 0).filter(|record| !record.is_empty());
    let mut records: Vec<String> =
        records.map(|record| String::from_utf8_lossy(record).into_owned()).collect();
    records.sort();
    records
}

/// Compares two listings; panics with the first differences.
#[track_caller]
pub fn assert_same_listing(theirs: &[String], ours: &[String]) {
    if theirs == ours {
        return;
    }
    let missing = theirs.iter().filter(|record| ours.binary_search(record).is_err());
    let added = ours.iter().filter(|record| theirs.binary_search(record).is_err());
    let shown: Vec<String> = missing
        .take(10)
        .map(|record| format!("- {record}"))
        .chain(added.take(10).map(|record| format!("+ {record}")))
        .collect();
    panic!("{} and {} entries differ:\n{}", theirs.len(), ours.len(), shown.join("\n"));
}

/// `diff -r` of two trees, which must find nothing.
#[track_caller]
pub fn assert_same_bytes(theirs: &Path, ours: &Path) {
    let mut diff = Command::new("diff");
    let found = proc::run(diff.args(["-r", "--no-dereference"]).arg(theirs).arg(ours), TREE);
    assert!(found.status.success(), "{}{}", found.text(), found.stderr);
}

/// Drops what the kernel has cached of files, so that a read asks the disk, or the drive.
#[track_caller]
pub fn drop_kernel_caches() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").expect("dropping caches needs root");
}
