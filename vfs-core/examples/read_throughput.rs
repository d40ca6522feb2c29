//! How fast the reader is when the network costs nothing:
//! `cargo run --release -p vfs-core --example read_throughput`.
//!
//! One sequential handle reads a file of 1 GiB in steps of 128 KiB, as a kernel
//! does, from a holder that answers from memory: everything else is done, that
//! is, planning, the check against the content id, writing to the cache. Then
//! it is read again from the cache, and 4 KiB at random from another.

use bytes::Bytes;
use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfs_core::content::{Cache, Content, ContentConfig, Manifest, Manifests, OwnFiles, Reader};
use vfs_core::index::{Index, LogRow, NewLocation, ROOT_PARENT, open_store};
use vfs_core::indexer::{Indexer, IndexerConfig};
use vfs_core::model::{
    Attr, DeviceId, Entry, FileId, FileType, LocationId, LocationNo, Name, Seq, Time,
};
use vfs_core::source::{BoxFuture, ContentSource, FetchError, Fetched, Version};

const SIZE: usize = 1 << 30;
const STEP: usize = 128 << 10;
const ME: DeviceId = DeviceId([1; 32]);
const OWNER: DeviceId = DeviceId([2; 32]);

struct Memory {
    bytes: Bytes,
    manifest: Manifest,
}

impl ContentSource for Memory {
    fn is_reachable(&self, _device: DeviceId) -> bool {
        true
    }

    fn fetch<'a>(
        &'a self,
        _device: DeviceId,
        _version: &'a Version,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Fetched, FetchError>> {
        let bytes = self.bytes.slice(range.start as usize..range.end as usize);
        let proof = self.manifest.proof(range).ok_or(FetchError::Unreachable);
        Box::pin(async move { Ok(Fetched { bytes, proof: proof? }) })
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut bytes = vec![0; SIZE];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let bytes = Bytes::from(bytes);
    let (id, manifest) = Manifest::of_bytes(&bytes);

    let entry = Entry { content: Some(id), ..entry(FileId(2), FileType::File, SIZE as u64) };
    let (index, location) = replica(dir.path(), &entry)?;
    let source = Arc::new(Memory { bytes: bytes.clone(), manifest });
    let content = content(dir.path(), index, source, runtime.handle().clone())?;

    let reader = content.open(location, &entry)?;
    let fetched = Instant::now();
    read_through(&runtime, &reader, &bytes);
    print("first read, 128 KiB at a time", fetched.elapsed());
    while reader.complete_file().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    print("and until the cache has it whole", fetched.elapsed());
    let cached = Instant::now();
    read_through(&runtime, &reader, &bytes);
    print("second read, from the cache", cached.elapsed());
    drop(reader);
    content.cache().clear();

    let reader = content.open(location, &entry)?;
    let (mut at, start) = (1, Instant::now());
    for _ in 0..2_000 {
        at = (at * 6_364_136_223_846_793_005_u64 + 1) % (SIZE as u64 - 4096);
        runtime.block_on(reader.read(at, 4096))?;
    }
    println!(
        "random 4 KiB, uncached: {:.0} µs each",
        start.elapsed().as_secs_f64() * 1e6 / 2_000.0
    );
    Ok(())
}

fn read_through(runtime: &tokio::runtime::Runtime, reader: &Reader, bytes: &Bytes) {
    for at in (0..SIZE).step_by(STEP) {
        let read = reader
            .try_read(at as u64, STEP)
            .unwrap_or_else(|| runtime.block_on(reader.read(at as u64, STEP)))
            .expect("the holder answers");
        assert!(read.len() == STEP && read[..64] == bytes[at..at + 64]);
    }
}

fn print(what: &str, took: Duration) {
    println!("{what}: {:.0} MiB/s", (SIZE >> 20) as f64 / took.as_secs_f64());
}

fn replica(dir: &Path, file: &Entry) -> Result<(Index, LocationNo), Box<dyn Error>> {
    let path = dir.join("index");
    std::fs::create_dir(&path)?;
    let index = Index::open(open_store(&path)?.store, ME)?;
    let location = index.put_location(NewLocation {
        id: LocationId([2; 16]),
        owner: OWNER,
        name: "films".into(),
        root: None,
        read_only: false,
        shared_with: None,
    })?;
    let root = entry(FileId::ROOT, FileType::Directory, 0);
    let rows = vec![row(1, ROOT_PARENT, "root", root), row(2, FileId::ROOT, "film", file.clone())];
    index.reset_replica(location.no, 1)?;
    index.apply_replica(location.no, 1, rows, Seq(2))?;
    Ok((index, location.no))
}

fn content(
    dir: &Path,
    index: Index,
    source: Arc<Memory>,
    runtime: tokio::runtime::Handle,
) -> Result<Arc<Content>, Box<dyn Error>> {
    let manifests = Arc::new(Manifests::open(&dir.join("manifests"))?);
    let indexer = Indexer::start(index.clone(), manifests.clone(), IndexerConfig::default());
    let own = Arc::new(OwnFiles::new(index.clone(), indexer, manifests));
    let cache = Arc::new(Cache::open(&dir.join("cache"), 4 << 30));
    Ok(Content::new(index, own, cache, source, ContentConfig::default(), runtime))
}

fn row(seq: u64, parent: FileId, name: &str, entry: Entry) -> LogRow {
    let name = Name::new(name.as_bytes()).expect("a name");
    LogRow { seq: Seq(seq), parent, name, entry: Some(entry) }
}

fn entry(file_id: FileId, file_type: FileType, size: u64) -> Entry {
    let time = Time::default();
    let attr = Attr {
        file_type,
        perm: 0o644,
        uid: 0,
        gid: 0,
        nlink: 1,
        size,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: None,
        rdev: 0,
    };
    Entry { file_id, disk_ino: file_id.0, generation: 1, attr, content: None, target: None }
}
