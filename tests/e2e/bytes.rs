//! Large files: every byte right, from the network once, and no more of it than needed.

use e2e::{Device, Lab, Need, files};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

#[test]
fn a_1_gib_file_crosses_the_network_once_and_stays_readable_with_its_owner_gone() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let expected = files::random_file(&source.join("big"), GIB, 1);
    let (mut owner, mut reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let path = reader.at("owner/files/big");

    assert_eq!(files::hash_file(&path).unwrap(), expected);
    let received = reader.content_bytes_in();
    assert!(received >= GIB, "{received} bytes came over the network for 1 GiB");
    assert!(received < GIB + GIB / 20, "{received} bytes came over the network for 1 GiB");

    files::drop_kernel_caches();
    assert_eq!(files::hash_file(&path).unwrap(), expected);
    assert_eq!(reader.content_bytes_in(), received, "the second read used the network");

    reader.stop();
    reader.start();
    reader.mount();
    assert_eq!(files::hash_file(&path).unwrap(), expected);
    assert_eq!(reader.content_bytes_in(), 0, "after a restart the read used the network");

    owner.kill();
    files::drop_kernel_caches();
    assert_eq!(files::hash_file(&path).unwrap(), expected);
}

/// Ranges in any order, across group and file ends, are the owner's bytes.
#[test]
fn random_ranges_are_the_owners_bytes() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let len = 40 * MIB + 12_345;
    files::random_file(&source.join("odd"), len, 2);
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");

    let theirs = File::open(source.join("odd")).unwrap();
    let ours = File::open(reader.at("owner/files/odd")).unwrap();
    let mut offset = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..300 {
        offset =
            offset.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (offset >> 16) % (len + 1000);
        let size = (offset >> 3) as usize % 200_000;
        assert_eq!(read_at(&ours, at, size), read_at(&theirs, at, size), "{size} bytes at {at}");
    }
    assert_eq!(read_at(&ours, len - 1, 10).len(), 1);
    assert_eq!(read_at(&ours, len, 10).len(), 0);
}

#[test]
fn a_10_gib_file_that_is_not_hashed_streams_at_once_and_in_small_pieces() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let marks = sparse_file_with_marks(&source.join("huge"), 10 * GIB);
    let [mut owner, reader] = lab.two_devices(["owner", "reader"]);
    owner.sd(&["config", "set", "index.hash", "false"]).ok();
    owner.stop();
    owner.start();
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    reader.join(&owner);
    reader.mount();
    owner.add_location(&source, "files");
    let path = reader.at("owner/files/huge");
    e2e::wait::wait_until("the file in the mount", Duration::from_secs(20), || path.exists());

    let read_before = owner.bytes_read_by_daemon();
    let began = Instant::now();
    let mut file = File::open(&path).unwrap();
    let mut first = [0; 1];
    file.read_exact(&mut first).unwrap();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(1), "the first byte took {took:?}");

    for (offset, mark) in &marks {
        file.seek(SeekFrom::Start(*offset)).unwrap();
        let mut bytes = vec![0; mark.len()];
        file.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, mark, "the bytes at {offset}");
    }
    let pieces = marks.len() as u64 + 1;
    let sent = owner.content_bytes_out();
    assert!(sent <= pieces * 4 * MIB, "{sent} bytes were sent for {pieces} pieces of 4 KiB");
    let read = owner.bytes_read_by_daemon() - read_before;
    assert!(read <= 2 * pieces * 4 * MIB, "the owner read {read} bytes for {pieces} pieces");
    let row = owner.location_row("owner", "files").unwrap();
    assert_eq!(row["hashed_files"], 0, "the file was to be read unhashed");
}

/// A file of holes with 4 KiB of random bytes at some offsets.
fn sparse_file_with_marks(path: &std::path::Path, len: u64) -> Vec<(u64, Vec<u8>)> {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    let offsets = [0, 3 * GIB + 4096, 7 * GIB + 123 * 4096, len - 4096];
    let marks = offsets.iter().map(|offset| (*offset, files::random_bytes(4096, *offset)));
    let marks: Vec<_> = marks.collect();
    marks.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
    marks
}

/// A version that its owner replaced while a reader has it open is never mixed with the next one.
#[test]
fn an_open_file_that_its_owner_overwrites_is_never_a_mix_of_two_versions() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let len = 64 * MIB;
    fs::write(source.join("file"), vec![b'a'; len as usize]).unwrap();
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");

    let open = File::open(reader.at("owner/files/file")).unwrap();
    assert_eq!(read_at(&open, 0, 4096), vec![b'a'; 4096]);
    fs::write(source.join("file"), vec![b'b'; len as usize]).unwrap();
    for offset in (0..len).step_by(8 << 20) {
        let mut bytes = vec![0; 4096];
        match open.read_at(&mut bytes, offset) {
            Ok(n) => assert!(bytes[..n].iter().all(|b| *b == b'a'), "another version at {offset}"),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(rustix::io::Errno::STALE.raw_os_error()), "{e}")
            }
        }
    }
    e2e::wait::wait_until("the new version", Duration::from_secs(10), || {
        fs::read(reader.at("owner/files/file")).is_ok_and(|bytes| bytes == vec![b'b'; len as usize])
    });
}

/// The cache keeps its limit, and what was evicted is fetched again.
#[test]
fn the_cache_keeps_its_limit() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    let hashes: Vec<_> = (0..8)
        .map(|n| files::random_file(&source.join(format!("{n}")), 16 * MIB, 100 + n))
        .collect();
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    reader.sd(&["cache", "limit", "48M"]).ok();
    for _ in 0..2 {
        for (n, hash) in hashes.iter().enumerate() {
            let path = reader.at(format!("owner/files/{n}"));
            assert_eq!(files::hash_file(&path).unwrap(), *hash);
            assert!(cached(&reader) <= 50 * MIB, "{} bytes are cached", cached(&reader));
        }
        files::drop_kernel_caches();
    }
}

fn cached(device: &Device) -> u64 {
    device.json(&["cache", "stats"])["bytes"].as_u64().expect("a number")
}

fn read_at(file: &File, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut have = 0;
    while have < len {
        match file.read_at(&mut bytes[have..], offset + have as u64).unwrap() {
            0 => break,
            n => have += n,
        }
    }
    bytes.truncate(have);
    bytes
}
