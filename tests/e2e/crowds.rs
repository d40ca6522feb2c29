//! Many small files, far away: read one after the other they come together, read alone, alone.

use e2e::{Device, Lab, Need, files, proc};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const KIB: usize = 1 << 10;
const DIRECTORIES: usize = 40;
const FILES_EACH: usize = 50;

#[test]
fn tar_of_2_000_small_files_at_20_ms_does_not_wait_for_each_and_a_lone_read_moves_no_more() {
    let Some(lab) = Lab::emulated(&[Need::Fuse], &["--delay", "10"]) else { return };
    let source = lab.folder("source");
    for n in 0..DIRECTORIES {
        // Two levels, with files in both.
        let directory = source.join(format!("tree/{}/{n}", n / 10));
        small_files(&directory, FILES_EACH, n as u64 * 1000);
    }
    small_files(&source.join("lone"), 500, 1 << 32);
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");

    for name in ["00100", "00101", "00300"] {
        let read = fs::read(reader.at("owner/files/lone").join(name)).unwrap();
        assert_eq!(read, fs::read(source.join("lone").join(name)).unwrap());
    }
    assert_eq!(reader.content_bytes_in(), 3 * 4 * KIB as u64);

    let archive = lab.dir().join("tree.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(reader.at("owner/files")).arg("tree");
    let took = proc::run(&mut tar, Duration::from_secs(120)).ok().took;
    eprintln!("tar of {} files took {took:?}", DIRECTORIES * FILES_EACH);
    assert!(took < Duration::from_secs(10), "tar took {took:?}");

    let unpacked = lab.folder("unpacked");
    let mut tar = Command::new("tar");
    proc::run(tar.arg("-xf").arg(&archive).arg("-C").arg(&unpacked), Duration::from_secs(60)).ok();
    files::assert_same_bytes(&source.join("tree"), &unpacked.join("tree"));
    let read = DIRECTORIES * FILES_EACH + 3;
    assert_eq!(cached_files(&reader), read as u64, "other files came, too");
    assert_eq!(reader.content_bytes_in(), (read * 4 * KIB) as u64, "some came twice");
}

fn small_files(directory: &Path, count: usize, seed: u64) {
    fs::create_dir_all(directory).unwrap();
    for n in 0..count {
        let bytes = files::random_bytes(4 * KIB, seed + n as u64);
        fs::write(directory.join(format!("{n:05}")), bytes).unwrap();
    }
}

fn cached_files(device: &Device) -> u64 {
    device.json(&["cache", "stats"])["files"].as_u64().expect("a number")
}
