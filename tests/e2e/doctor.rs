//! Damage that nothing else notices: `sd doctor` finds it, and `--repair` mends it.

use e2e::wait::wait_until;
use e2e::{Device, Lab, Need, files};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vfs_core::index::{Batch, Durability, Table, open_store};
use vfs_core::model::ContentId;

/// How long two devices may take to be of one mind again.
const AGREED: Duration = Duration::from_secs(60);

struct Pair {
    _lab: Lab,
    owner: Device,
    reader: Device,
    theirs: PathBuf,
    bytes: Vec<u8>,
}

/// An owner of some files, and a reader that has read one of them.
fn pair() -> Option<Pair> {
    let lab = Lab::lan(&[Need::Fuse])?;
    let theirs = lab.folder("source");
    for (dir, first) in [("a", 0), ("b", 100), ("b/c", 200)] {
        fs::create_dir(theirs.join(dir)).unwrap();
        for n in 0..20 {
            let path = theirs.join(dir).join(format!("file-{n}"));
            files::random_file(&path, 100_000, first + n);
        }
    }
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let bytes = fs::read(theirs.join("a/file-7")).unwrap();
    let pair = Pair { _lab: lab, owner, reader, theirs, bytes };
    assert_eq!(fs::read(pair.ours()).unwrap(), pair.bytes);
    pair.agree();
    Some(pair)
}

impl Pair {
    fn ours(&self) -> PathBuf {
        self.reader.at("owner/files/a/file-7")
    }

    /// Waits until the owner has stated what its rows add up to, and the reader's are compared.
    fn agree(&self) {
        wait_until("one sum", AGREED, || {
            let (_, found) = doctor(&self.reader, &["--quick"]);
            let owner = check(&found, "owner owner/files");
            owner["result"] == "ok" && owner["message"].as_str().unwrap().contains("add up")
        });
    }
}

/// What it found, and its exit code.
fn doctor(device: &Device, args: &[&str]) -> (i32, Value) {
    let finished = device.sd(&[&["doctor", "--json"], args].concat());
    let found = serde_json::from_slice(&finished.stdout);
    let found = found.unwrap_or_else(|e| panic!("{e}: {}", finished.text()));
    (finished.status.code().expect("an end of its own"), found)
}

fn check(found: &Value, name: &str) -> Value {
    let all = found["checks"].as_array().expect("a list");
    let it = all.iter().find(|check| check["name"] == name);
    it.unwrap_or_else(|| panic!("no {name} in {found}")).clone()
}

#[track_caller]
fn assert_clean(device: &Device) {
    let (code, found) = doctor(device, &[]);
    assert_eq!((code, &found["ok"]), (0, &true.into()), "{found}");
    let mended = found["checks"].as_array().unwrap().iter().any(|c| c["result"] == "mended");
    assert!(!mended, "there is nothing left to mend: {found}");
}

/// Finds this damage, mends it when it is told to, and has nothing to say afterwards.
#[track_caller]
fn assert_mends(device: &Device, damaged: &[&str]) {
    let (code, found) = doctor(device, &[]);
    assert_eq!((code, &found["ok"]), (1, &false.into()), "{found}");
    for name in damaged {
        assert_eq!(check(&found, name)["result"], "problem", "{found}");
    }
    let (code, mended) = doctor(device, &["--repair"]);
    assert_eq!(code, 0, "{mended}");
    for name in damaged {
        assert_eq!(check(&mended, name)["result"], "mended", "{mended}");
    }
    assert_clean(device);
}

/// Changes a bit of a content id in a row, behind the back of the index; the daemon is not there.
fn damage_row(device: &Device, content: ContentId) {
    let store = open_store(&device.data_dir().join("index")).unwrap().store;
    let mut batch = Batch::default();
    let snapshot = store.snapshot().unwrap();
    let mut damage = |key: &[u8], value: &[u8]| {
        if let Some(at) = value.windows(32).position(|window| window == content.0) {
            let mut damaged = value.to_vec();
            damaged[at] ^= 1;
            batch.put(Table::Entries, key, damaged);
        }
        ControlFlow::Continue(())
    };
    snapshot.scan(Table::Entries, b"", None, &mut damage).unwrap();
    drop(snapshot);
    assert_eq!(batch.len(), 1, "the row of the file");
    store.commit(batch, Durability::Durable).unwrap();
}

/// The cached file of these bytes.
fn cached(device: &Device, content: ContentId) -> PathBuf {
    let hex = content.to_string();
    device.data_dir().join("cache/content").join(&hex[..2]).join(&hex)
}

#[test]
fn a_flipped_bit_of_the_cache_and_a_file_that_nothing_knows() {
    let Some(pair) = pair() else { return };
    let content = ContentId::of(&pair.bytes);
    assert_clean(&pair.reader);
    let path = cached(&pair.reader, content);
    let mut damaged = pair.bytes.clone();
    damaged[70_000] ^= 4;
    fs::write(&path, damaged).unwrap();
    fs::write(path.with_file_name("stray"), "whose").unwrap();
    let (_, quick) = doctor(&pair.reader, &["--quick"]);
    let words = check(&quick, "cache")["message"].as_str().unwrap().to_owned();
    assert!(words.contains("1 are files that nothing needs"), "bytes are not read: {quick}");
    assert!(!words.contains("ids"), "bytes are not read: {quick}");
    assert_mends(&pair.reader, &["cache"]);
    assert!(!path.with_file_name("stray").exists());
    files::drop_kernel_caches();
    assert_eq!(fs::read(pair.ours()).unwrap(), pair.bytes);
}

#[test]
fn a_row_of_a_replica_that_is_not_its_owners() {
    let Some(mut pair) = pair() else { return };
    let content = ContentId::of(&pair.bytes);
    pair.reader.stop();
    damage_row(&pair.reader, content);
    pair.reader.start();
    pair.reader.mount();
    pair.reader.wait_online("owner");
    let (_, found) = doctor(&pair.reader, &["--quick"]);
    let words = check(&found, "index owner/files")["message"].as_str().unwrap().to_owned();
    assert!(words.ends_with("1 differ from their owner's: a/file-7"), "{words}");
    assert_mends(&pair.reader, &["index owner/files"]);
    pair.agree();
    assert_eq!(fs::read(pair.ours()).unwrap(), pair.bytes);
    assert_clean(&pair.owner);
}

#[test]
fn a_row_of_an_own_location_that_the_disk_does_not_disprove() {
    let Some(mut pair) = pair() else { return };
    let content = ContentId::of(&pair.bytes);
    pair.owner.stop();
    damage_row(&pair.owner, content);
    pair.owner.start();
    pair.owner.wait_indexed("files");
    assert_mends(&pair.owner, &["index owner/files"]);
    pair.owner.wait_hashed("files");
    pair.reader.wait_online("owner");
    pair.reader.wait_replicated(&pair.owner, "files");
    pair.agree();
    assert_eq!(fs::read(pair.ours()).unwrap(), pair.bytes);
    // It goes on following its disk, and so does the reader.
    fs::write(pair.theirs.join("a/new"), "new").unwrap();
    wait_until("the new file", AGREED, || {
        fs::read(pair.reader.at("owner/files/a/new")).is_ok_and(|bytes| bytes == b"new")
    });
    assert_clean(&pair.reader);
}

/// Without its owner a damaged replica is told, and stays: it is all there is.
#[test]
fn a_damaged_replica_whose_owner_is_away_can_still_be_browsed() {
    let Some(mut pair) = pair() else { return };
    pair.reader.stop();
    pair.owner.stop();
    damage_row(&pair.reader, ContentId::of(&pair.bytes));
    pair.reader.start();
    pair.reader.mount();
    let (code, found) = doctor(&pair.reader, &["--repair"]);
    let index = check(&found, "index owner/files");
    assert_eq!((code, &index["result"]), (1, &"problem".into()), "{found}");
    assert!(index["hint"].as_str().unwrap().contains("online"), "{found}");
    let listed = fs::read_dir(pair.reader.at("owner/files/b")).unwrap().count();
    assert_eq!(listed, 21);
}

#[test]
fn busy_devices_give_no_false_alarm() {
    let Some(pair) = pair() else { return };
    let is_over = AtomicBool::new(false);
    let writers = [pair.theirs.join("a"), pair.theirs.join("b/c"), pair.reader.at("owner/files/b")];
    std::thread::scope(|scope| {
        for folder in &writers {
            scope.spawn(|| write_until(&is_over, folder));
        }
        let examined: Vec<_> =
            (0..4).flat_map(|_| [doctor(&pair.owner, &[]), doctor(&pair.reader, &[])]).collect();
        is_over.store(true, Ordering::Relaxed);
        for (code, found) in examined {
            assert_eq!((code, &found["ok"]), (0, &true.into()), "{found}");
        }
    });
    assert_clean(&pair.owner);
    assert_clean(&pair.reader);
}

fn write_until(is_over: &AtomicBool, folder: &Path) {
    for round in 0_u64.. {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        let mut log =
            fs::File::options().append(true).create(true).open(folder.join("log")).unwrap();
        log.write_all(b"one more line\n").unwrap();
        fs::write(folder.join("draft"), round.to_string()).unwrap();
        fs::rename(folder.join("draft"), folder.join(format!("saved-{}", round % 5))).unwrap();
        let dir = folder.join(format!("dir-{}", round % 3));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "text").unwrap();
        fs::remove_dir_all(&dir).unwrap();
    }
}
