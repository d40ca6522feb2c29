//! What a fetch costs beside a bare stream of the same transport, in one run.
//!
//! `cargo test --release -p sync --test net -- --ignored --nocapture bench`

use crate::content::{pattern, with_file};
use crate::device::raw_endpoint;
use iroh::EndpointAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sync::wire::ALPN_MEMBER;
use vfs_core::content::manifest::verify;
use vfs_core::source::{ContentSource, Version};

const FILE_BYTES: usize = 256 << 20;
const MIB: f64 = (1 << 20) as f64;

#[test]
#[ignore = "a measurement, for a release build"]
fn fetches_beside_a_bare_stream() {
    for (kind, mut builder) in [
        ("current-thread", tokio::runtime::Builder::new_current_thread()),
        ("multi-thread", tokio::runtime::Builder::new_multi_thread()),
    ] {
        println!("{kind}:");
        builder.enable_all().build().unwrap().block_on(measure());
    }
}

async fn measure() {
    for _ in 0..2 {
        println!("  bare stream: {:.0} MiB/s", bare_stream().await);
    }
    let (a, b, version) = with_file(&pattern(FILE_BYTES)).await;
    let source = b.node.source();
    let fetch = |start: u64, len: u64| {
        let (source, version, id) = (source.clone(), version.clone(), a.id());
        async move { source.fetch(id, &version, start..start + len).await.unwrap() }
    };
    let mut times = vec![];
    for n in 0..2000u64 {
        let start = (n * 7919) % (FILE_BYTES as u64 >> 16) * (64 << 10);
        let from = Instant::now();
        fetch(start, 64 << 10).await;
        times.push(from.elapsed());
    }
    times.sort();
    println!("  64 KiB fetch: p50 {:?}, p99 {:?}", times[1000], times[1980]);
    for depth in [1, 4, 8] {
        for checked in [false, true] {
            let rate = sequential(&source, a.id(), &version, depth, checked).await;
            let how = if checked { "verified" } else { "as received" };
            println!("  1 MiB fetches, depth {depth}, {how}: {rate:.0} MiB/s");
        }
    }
}

async fn sequential(
    source: &Arc<dyn ContentSource>,
    id: vfs_core::model::DeviceId,
    version: &Version,
    depth: usize,
    checked: bool,
) -> f64 {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    let from = Instant::now();
    for _ in 0..depth {
        let (source, version, next) = (source.clone(), version.clone(), next.clone());
        tasks.spawn(async move {
            loop {
                let start = next.fetch_add(1 << 20, Ordering::Relaxed);
                if start >= FILE_BYTES as u64 {
                    return;
                }
                let range = start..start + (1 << 20);
                let got = source.fetch(id, &version, range.clone()).await.unwrap();
                if checked {
                    let content = version.content.unwrap();
                    assert!(verify(content, FILE_BYTES as u64, range, &got.bytes, &got.proof));
                }
            }
        });
    }
    tasks.join_all().await;
    FILE_BYTES as f64 / MIB / from.elapsed().as_secs_f64()
}

async fn bare_stream() -> f64 {
    let (a, b) = (raw_endpoint(rand::random()).await, raw_endpoint(rand::random()).await);
    let to = EndpointAddr::new(a.id()).with_ip_addr(a.bound_sockets()[0]);
    let server = tokio::spawn(async move {
        let connection = a.accept().await.unwrap().accept().unwrap().await.unwrap();
        let (mut send, _recv) = connection.accept_bi().await.unwrap();
        let block = bytes::Bytes::from(pattern(1 << 20));
        for _ in 0..FILE_BYTES >> 20 {
            send.write_chunk(block.clone()).await.unwrap();
        }
        send.finish().unwrap();
        let _ = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
    });
    let connection = b.connect(to, ALPN_MEMBER).await.unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(b"go").await.unwrap();
    let (from, mut total) = (Instant::now(), 0);
    while let Some(chunk) = recv.read_chunk(1 << 20).await.unwrap() {
        total += chunk.len();
    }
    let took = from.elapsed();
    assert_eq!(total, FILE_BYTES);
    connection.close(0u32.into(), b"");
    server.await.unwrap();
    total as f64 / MIB / took.as_secs_f64()
}
