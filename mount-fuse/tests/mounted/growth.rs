//! Another device's file that grows, through a real kernel with its caches.

use crate::common::{Rig, drive, eventually};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

fn log(rig: &Rig) -> PathBuf {
    drive::peer_folder(rig.mount.mountpoint()).join("log")
}

/// Bytes of which none is zero, and which tell where they belong.
fn lines(len: usize) -> Vec<u8> {
    (0..).flat_map(|n: u64| format!("line {n}\n").into_bytes()).take(len).collect()
}

#[test]
fn an_open_file_goes_on_under_its_inode() {
    for rig in Rig::both("an_open_file_goes_on_under_its_inode") {
        let content = lines(300_000);
        let mut len = 10;
        rig.parts.add_peer_file(2, "log", &content[..len]);
        let file = File::open(log(&rig)).unwrap();
        let ino = file.metadata().unwrap().ino();
        // Within a page, to its end, over it, and over many.
        for more in [1, 100, 4096 - 111, 4096, 1, 5000, 100_000, 7] {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes == content[..len]);
            len += more;
            rig.parts.add_peer_file(2, "log", &content[..len]);
            eventually("its size", || file.metadata().unwrap().len() == len as u64);
            assert!(fs::read(log(&rig)).unwrap() == content[..len], "at {len}");
            assert_eq!(fs::metadata(log(&rig)).unwrap().ino(), ino);
        }
    }
}

#[test]
fn a_file_that_grew_while_nobody_had_it_open_is_read_to_its_new_end() {
    for rig in Rig::both("a_file_that_grew_while_nobody_had_it_open_is_read_to_its_new_end") {
        let content = lines(100_000);
        rig.parts.add_peer_file(2, "log", &content[..10]);
        let ino = fs::metadata(log(&rig)).unwrap().ino();
        for len in [11, 4095, 4096, 4097, 50_000, 50_001] {
            rig.parts.add_peer_file(2, "log", &content[..len]);
            eventually("its size", || fs::metadata(log(&rig)).unwrap().len() == len as u64);
            assert!(fs::read(log(&rig)).unwrap() == content[..len], "at {len}");
            assert_eq!(fs::metadata(log(&rig)).unwrap().ino(), ino);
        }
    }
}

/// A page in which a file ended is zero behind that end. Whoever sees the new size must not see
/// these zeros, however many look.
#[test]
fn nobody_ever_sees_zeros_instead_of_what_was_appended() {
    for rig in Rig::both("nobody_ever_sees_zeros_instead_of_what_was_appended") {
        let content = lines(40_000);
        rig.parts.add_peer_file(2, "log", &content[..1]);
        let (is_over, reads) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for n in 0..4 {
                let (content, is_over, reads, path) = (&content, &is_over, &reads, log(&rig));
                scope.spawn(move || {
                    let kept = File::open(&path).unwrap();
                    let mut longest = 0;
                    while !is_over.load(Ordering::Relaxed) {
                        // By number, by name, and anew.
                        let size = match n % 2 {
                            0 => kept.metadata().unwrap().len(),
                            _ => fs::metadata(&path).unwrap().len(),
                        };
                        assert!(size >= longest, "it became shorter");
                        longest = size;
                        let from = size.saturating_sub(3000);
                        let mut bytes = vec![0; (size - from) as usize];
                        let file = if n < 2 {
                            kept.try_clone().unwrap()
                        } else {
                            File::open(&path).unwrap()
                        };
                        file.read_exact_at(&mut bytes, from).unwrap();
                        let wanted = &content[from as usize..size as usize];
                        let right = bytes.iter().zip(wanted).take_while(|(a, b)| a == b).count();
                        assert_eq!(right, wanted.len(), "of {from}..{size}");
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for len in (1..content.len()).step_by(61) {
                rig.parts.add_peer_file(2, "log", &content[..len]);
                let before = reads.load(Ordering::Relaxed);
                if len % 5 == 0 {
                    eventually("reads", || reads.load(Ordering::Relaxed) > before + 3);
                }
            }
            eventually("its size", || fs::metadata(log(&rig)).unwrap().len() > 39_900);
            is_over.store(true, Ordering::Relaxed);
        });
        assert!(reads.load(Ordering::Relaxed) > 500);
    }
}
