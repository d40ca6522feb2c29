//! The measurement behind `docs/decisions/0002-range-unit.md`:
//! `cargo run --release -p vfs-core --example range_unit -- [FILE]`.
//!
//! Prints, for several sizes of the unit of verification, what hashing costs,
//! how large a tree and a proof are, and what a lone 4 KiB read takes on a
//! link of 200 Mbit/s. With a file, also how fast that is hashed, next to
//! BLAKE3's own way to hash a file.

use blake3::Hasher;
use blake3::hazmat::HasherExt;
use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use vfs_core::content::Manifest;
use vfs_core::content::manifest::{GROUP_BYTES, verify};

const SAMPLE_BYTES: usize = 64 << 20;
const LINK_BYTES_PER_SECOND: f64 = 200e6 / 8.0;

fn main() -> std::io::Result<()> {
    let sample: Vec<u8> = (0..SAMPLE_BYTES as u64 / 8).flat_map(u64::to_le_bytes).collect();
    println!("one thread, {} MiB in memory, best of 5", SAMPLE_BYTES >> 20);
    let plain = best_of(5, || {
        std::hint::black_box(blake3::hash(&sample));
    });
    println!("  blake3::hash                {:6.0} MiB/s", rate(SAMPLE_BYTES, plain));
    for kib in [1, 4, 16, 64, 256, 1024] {
        print_unit(&sample, kib << 10, plain);
    }
    print_check(&sample);
    match std::env::args_os().nth(1) {
        Some(path) => print_file(&File::open(&path)?, std::path::Path::new(&path)),
        None => Ok(()),
    }
}

fn print_unit(sample: &[u8], unit: usize, plain: Duration) {
    let took = best_of(5, || {
        for (n, part) in sample.chunks(unit).enumerate() {
            let mut hasher = Hasher::new();
            hasher.set_input_offset((n * unit) as u64).update(part);
            std::hint::black_box(hasher.finalize_non_root());
        }
    });
    let file: u64 = 10 << 30;
    let units = file / unit as u64;
    let proof = 32 * u64::from(units.next_power_of_two().ilog2());
    let fetched = unit as u64 + proof;
    println!(
        "  units of {:4} KiB: {:6.0} MiB/s ({:.2} of plain); a 10 GiB file: tree {:8} KiB, \
         proof of one unit {proof} B; 4 KiB at 200 Mbit/s: {:.2} ms + RTT",
        unit >> 10,
        rate(sample.len(), took),
        plain.as_secs_f64() / took.as_secs_f64(),
        (units * 32) >> 10,
        fetched as f64 / LINK_BYTES_PER_SECOND * 1e3,
    );
}

fn print_check(sample: &[u8]) {
    let (content, manifest) = Manifest::of_bytes(sample);
    let size = sample.len() as u64;
    for bytes in [GROUP_BYTES, 128 << 10, 1 << 20] {
        let range = size / 2..size / 2 + bytes;
        let proof = manifest.proof(range.clone()).expect("the sample is small");
        let part = &sample[range.start as usize..range.end as usize];
        let took = best_of(50, || assert!(verify(content, size, range.clone(), part, &proof)));
        println!("  checking {:4} KiB: {:.0} µs", bytes >> 10, took.as_secs_f64() * 1e6);
    }
}

fn print_file(file: &File, path: &std::path::Path) -> std::io::Result<()> {
    let size = file.metadata()?.len();
    println!("{} ({} MiB), warm page cache, best of 3", path.display(), size >> 20);
    let never = AtomicBool::new(false);
    let mut ours = None;
    let tree = best_of(3, || ours = Manifest::of_file(file, size, &never).ok().flatten());
    let mut theirs = None;
    let mmap = best_of(3, || {
        theirs = Hasher::new().update_mmap_rayon(path).ok().map(|hasher| hasher.finalize());
    });
    let ours = ours.map(|(content, _)| content.0);
    assert_eq!(ours, theirs.map(|hash| *hash.as_bytes()), "both hash the same file");
    println!("  update_mmap_rayon (b3sum)   {:6.0} MiB/s", rate(size as usize, mmap));
    println!(
        "  Manifest::of_file           {:6.0} MiB/s ({:.2} of it)",
        rate(size as usize, tree),
        mmap.as_secs_f64() / tree.as_secs_f64()
    );
    Ok(())
}

fn best_of(times: usize, mut work: impl FnMut()) -> Duration {
    let run = |_| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    (0..times).map(run).min().unwrap_or_default()
}

fn rate(bytes: usize, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64() / f64::from(1 << 20)
}
