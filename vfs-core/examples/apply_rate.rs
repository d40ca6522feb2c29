//! How fast an owner applies what another device wrote: new files, versions, deletes.
//!
//! `cargo run --release -p vfs-core --example apply_rate -- <folder on the disk to measure>`

use bytes::Bytes;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfs_core::apply::{Applier, Writer};
use vfs_core::content::Manifests;
use vfs_core::index::{Index, NewLocation, open_store};
use vfs_core::indexer::{Indexer, IndexerConfig};
use vfs_core::model::{ContentId, DeviceId, FileId, LocationId, Name, Time};
use vfs_core::ops::{Base, Change, DRAWN_FILE_ID, New, NewContent, Op, OpId, Outcome, Place};

const FILES: u64 = 2048;
const BATCH: usize = 256;
const BYTES: usize = 4096;
const LOCATION: LocationId = LocationId([7; 16]);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let base = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let base = base.join(format!("apply-rate-{}", std::process::id()));
    let folder = base.join("folder");
    std::fs::create_dir_all(&folder)?;
    let (me, writer) = (DeviceId([1; 32]), DeviceId([2; 32]));
    let index = Index::open(open_store(&base.join("index"))?.store, me)?;
    let location = NewLocation {
        id: LOCATION,
        owner: me,
        name: "folder".into(),
        root: Some(folder),
        read_only: false,
        shared_with: None,
    };
    let no = index.put_location(location)?.no;
    let manifests = Arc::new(Manifests::open(&base.join("manifests"))?);
    let indexer = Indexer::start(index.clone(), manifests.clone(), IndexerConfig::default());
    let applier = Applier::open(&base.join("apply"), index, indexer.clone(), manifests)?;
    indexer.watch(no);
    while !indexer.progress(no).indexed {
        std::thread::sleep(Duration::from_millis(5));
    }
    let writer = Writer { id: writer, name: "laptop".into() };
    let file = |n: u64| FileId(DRAWN_FILE_ID | (n + 1));
    let at = |n: u64| Place { dir: FileId::ROOT, name: name(n) };
    let mut next = 1;
    measure(&applier, &writer, "create", &mut next, &|n| Change::Create {
        at: at(n),
        file: file(n),
        what: New::File(content(n, 1)),
        perm: 0o644,
        mtime: Time::now(),
    });
    measure(&applier, &writer, "overwrite", &mut next, &|n| Change::Write {
        file: file(n),
        base: Base::After(n + 1),
        content: content(n, 2),
        path: vec![name(n)],
    });
    measure(&applier, &writer, "delete", &mut next, &|n| Change::Unlink {
        file: file(n),
        at: at(n),
        base: Some(Base::After(FILES + n + 1)),
    });
    indexer.stop();
    std::fs::remove_dir_all(base)?;
    Ok(())
}

fn measure(
    applier: &Applier,
    writer: &Writer,
    what: &str,
    next: &mut u64,
    change: &dyn Fn(u64) -> Change,
) {
    let ops: Vec<_> = (0..FILES)
        .map(|n| {
            let no = *next + n;
            let id = OpId { writer: writer.id, epoch: 1, no };
            (id, Op { no, location: LOCATION, log_id: 0, change: change(n) }, None)
        })
        .collect();
    *next += FILES;
    let began = Instant::now();
    for batch in ops.chunks(BATCH) {
        let outcomes = applier.apply(writer, batch.to_vec());
        let clean = |o: &Outcome| matches!(o, Outcome::Applied(a) if a.conflict.is_none());
        assert!(outcomes.iter().all(clean), "{outcomes:?}");
    }
    let took = began.elapsed();
    let each = took / u32::try_from(FILES).unwrap_or(u32::MAX);
    println!("{what:10} {FILES} files of {BYTES} bytes: {took:.2?}, {each:.1?} each");
}

fn name(n: u64) -> Name {
    Name::new(format!("file {n}").into_bytes()).expect("a name")
}

fn content(n: u64, version: u8) -> NewContent {
    let mut bytes = vec![version; BYTES];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    NewContent {
        size: BYTES as u64,
        mtime: Time::now(),
        kept_bytes: 0,
        extents: vec![0..BYTES as u64],
        digest: *blake3::hash(&bytes).as_bytes(),
        whole: Some(ContentId::of(&bytes)),
        inline: Some(Bytes::from(bytes)),
    }
}
