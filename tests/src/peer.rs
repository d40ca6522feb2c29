//! A peer made by hand: an Iroh endpoint that speaks the wire format and may say anything.

use iroh::endpoint::{Connection, presets};
use iroh::{Endpoint, EndpointAddr, PublicKey, SecretKey};
use rand::RngCore;
use serde::Serialize;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;
use sync::wire::{self, Hello};

/// How long anything on loopback may take.
pub const SOON: Duration = Duration::from_secs(10);

/// An address on loopback that nobody used a moment ago.
pub fn free_address() -> SocketAddr {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    socket.local_addr().expect("its address")
}

/// A key that is nobody's yet.
pub fn new_key() -> SecretKey {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    SecretKey::from_bytes(&bytes)
}

/// The key in a data directory.
#[track_caller]
pub fn key_of(data_dir: &Path) -> SecretKey {
    let bytes = std::fs::read(data_dir.join("identity.key")).expect("the device's key");
    SecretKey::from_bytes(bytes.as_slice().try_into().expect("32 bytes"))
}

/// An endpoint with this key, at this address.
pub async fn endpoint(key: SecretKey, bind: SocketAddr, alpns: &[&[u8]]) -> Endpoint {
    let builder = Endpoint::builder(presets::Minimal).secret_key(key).clear_ip_transports();
    let builder = builder.alpns(alpns.iter().map(|alpn| alpn.to_vec()).collect());
    let builder = builder.bind_addr(bind).expect("an address");
    builder.bind().await.expect("a socket")
}

/// Connects to a device at a known address; `None` when it does not let this key in.
pub async fn connect(
    from: &Endpoint,
    to: PublicKey,
    at: SocketAddr,
    alpn: &[u8],
) -> Option<Connection> {
    let address = EndpointAddr::new(to).with_ip_addr(at);
    soon(from.connect(address, alpn)).await?.ok()
}

/// What a device answers to bytes on a stream of their own: all that it sends until it ends the
/// stream, the connection, or the patience of this test.
pub async fn ask(connection: &Connection, bytes: &[u8]) -> Vec<u8> {
    let Some(Ok((mut send, mut receive))) = soon(connection.open_bi()).await else { return vec![] };
    if send.write_all(bytes).await.is_err() {
        return vec![];
    }
    // A stream that is left open must not be answered either.
    let mut answer = Vec::new();
    let mut block = [0; 4096];
    while let Ok(Ok(Some(n))) =
        tokio::time::timeout(Duration::from_secs(2), receive.read(&mut block)).await
    {
        answer.extend_from_slice(&block[..n]);
    }
    answer
}

/// A request as bytes.
#[track_caller]
pub fn request(message: &impl Serialize) -> Vec<u8> {
    wire::encode_request(wire::NEWEST, message).expect("a request within its bound")
}

/// A `Hello` of this library.
pub fn hello(library: &str) -> Hello {
    Hello {
        oldest: wire::OLDEST,
        newest: wire::NEWEST,
        library: library.to_owned(),
        session: rand::rng().next_u64(),
        addresses: vec![],
    }
}

/// The future's value, if it comes soon.
pub async fn soon<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(SOON, work).await.ok()
}
