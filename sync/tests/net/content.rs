//! Bytes of another device's files.

use crate::device::{Device, Writes, until};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfs_core::content::manifest::{GROUP_BYTES, verify};
use vfs_core::model::{ContentId, FileId, Location};
use vfs_core::source::{FetchError, MAX_FETCH_BYTES, Version};

pub fn pattern(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A pair of devices; the first has one file, which the second sees, hashed.
pub async fn with_file(bytes: &[u8]) -> (Device, Device, Version) {
    let (a, b) = (Device::first("desk").await, Device::new().await);
    fs::create_dir_all(a.folder()).unwrap();
    fs::write(a.folder().join("file"), bytes).unwrap();
    let location = a.add_location("files", None);
    a.indexer.watch(location.no);
    a.pair(&b, "laptop").await;
    let version = version_at(&b, &location, Some(ContentId::of(bytes))).await;
    (a, b, version)
}

pub async fn version_at(
    reader: &Device,
    location: &Arc<Location>,
    content: Option<ContentId>,
) -> Version {
    let mut found = None;
    until("the file is there", || {
        let Some(replica) = reader.index.location_by_id(location.id) else { return false };
        let view = reader.index.view().unwrap();
        let entry = view.entry(replica.no, FileId::ROOT, b"file").unwrap();
        found = entry.filter(|e| content.is_none() || e.content == content);
        found.is_some()
    })
    .await;
    let entry = found.unwrap();
    let (location, file) = (location.id, entry.file_id);
    Version { location, file, stamp: entry.stamp(), content: entry.content }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_arrive_with_their_proof_and_are_counted() {
    let bytes = pattern((3 << 20) + 12_345);
    let (a, b, version) = with_file(&bytes).await;
    let (source, size) = (b.node.source(), bytes.len() as u64);
    let ranges = [
        0..GROUP_BYTES,
        GROUP_BYTES..3 * GROUP_BYTES,
        0..MAX_FETCH_BYTES,
        (size / GROUP_BYTES) * GROUP_BYTES..size,
    ];
    for range in ranges.clone() {
        let fetched = source.fetch(a.id(), &version, range.clone()).await.unwrap();
        let expected = &bytes[range.start as usize..range.end as usize];
        assert_eq!(fetched.bytes, expected);
        let content = version.content.unwrap();
        assert!(verify(content, size, range, &fetched.bytes, &fetched.proof));
    }
    let total: u64 = ranges.iter().map(|r| r.end - r.start).sum();
    assert_eq!(b.peer(a.id()).unwrap().bytes_in, total);
    let sent = || a.peer(b.id()).unwrap().bytes_out;
    until("as many were sent", || sent() == total).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_gone_and_a_location_that_is_hidden_are_told() {
    let (a, b, version) = with_file(&pattern(1000)).await;
    let source = b.node.source();
    fs::write(a.folder().join("file"), b"another").unwrap();
    let gone = source.fetch(a.id(), &version, 0..1000).await;
    assert!(matches!(gone, Err(FetchError::Stale)), "{gone:?}");
    let unknown = Version { location: vfs_core::model::LocationId([0; 16]), ..version };
    let refused = source.fetch(a.id(), &unknown, 0..1000).await;
    assert!(matches!(refused, Err(FetchError::Refused)), "{refused:?}");
    let nobody = source.fetch(vfs_core::model::DeviceId([1; 32]), &unknown, 0..1000).await;
    assert!(matches!(nobody, Err(FetchError::Unreachable)));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_once_are_all_answered() {
    let bytes = pattern(4 << 20);
    let (a, b, version) = with_file(&bytes).await;
    let source = b.node.source();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..200u64 {
        let (source, version, id) = (source.clone(), version.clone(), a.id());
        let start = n % 64 * GROUP_BYTES;
        tasks.spawn(async move {
            (start, source.fetch(id, &version, start..start + GROUP_BYTES).await.unwrap())
        });
    }
    for (start, fetched) in tasks.join_all().await {
        assert_eq!(fetched.bytes, &bytes[start as usize..][..GROUP_BYTES as usize]);
    }
}

/// A device on a runtime of its own, so that it can die without a word.
struct Mortal {
    runtime: tokio::runtime::Runtime,
    device: Device,
}

impl Mortal {
    fn start(make: impl Future<Output = Device>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let device = runtime.block_on(make);
        Self { runtime, device }
    }

    /// Every task stops where it is; nothing is closed or said.
    fn kill(self) -> Device {
        self.runtime.shutdown_background();
        self.device
    }
}

#[test]
fn a_killed_owner_is_noticed_and_found_again_at_another_port() {
    let bytes = pattern(100_000);
    let owner = Mortal::start(Device::first("desk"));
    fs::create_dir_all(owner.device.folder()).unwrap();
    fs::write(owner.device.folder().join("file"), &bytes).unwrap();
    let location = owner.device.add_location("files", None);
    owner.device.indexer.watch(location.no);
    let (id, key, dir) = (owner.device.id(), owner.device.key, owner.device.dir.clone());

    let here = tokio::runtime::Runtime::new().unwrap();
    let (reader, version) = here.block_on(async {
        let reader = Device::new().await;
        owner.device.pair(&reader, "laptop").await;
        let version = version_at(&reader, &location, Some(ContentId::of(&bytes))).await;
        reader.node.source().fetch(id, &version, 0..GROUP_BYTES).await.unwrap();
        (reader, version)
    });
    let source = reader.node.source();
    assert!(source.is_reachable(id));

    let dead = owner.kill();
    here.block_on(async {
        let asked = Instant::now();
        let failed = source.fetch(id, &version, 0..GROUP_BYTES).await;
        assert!(matches!(failed, Err(FetchError::Unreachable)), "{failed:?}");
        assert!(asked.elapsed() < Duration::from_secs(9), "{:?}", asked.elapsed());
        until("it is known to be offline", || !source.is_reachable(id)).await;
        assert!(!reader.is_online(id));
        let asked = Instant::now();
        let failed = source.fetch(id, &version, 0..GROUP_BYTES).await;
        assert!(matches!(failed, Err(FetchError::Unreachable)));
        assert!(asked.elapsed() < Duration::from_millis(500), "at once");

        dead.indexer.stop();
        drop(dead);
        // The reader has none of its new addresses: the owner dials in.
        let back = Device::restart(&dir, key, Writes::None).await;
        let l = back.index.location_by_id(location.id).unwrap();
        back.indexer.watch(l.no);
        until("it is back", || reader.is_online(id)).await;
        let fetched = source.fetch(id, &version, 0..GROUP_BYTES).await.unwrap();
        assert_eq!(fetched.bytes, &bytes[..GROUP_BYTES as usize]);
    });
}
