//! The public face of this crate: one node a device.
#![allow(clippy::unimplemented, unused_variables, clippy::unused_async)]

use crate::error::SyncError;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use vfs_core::library::{Library, LibraryInfo};
use vfs_core::model::{DeviceId, LocationId, Seq};
use vfs_core::source::ContentSource;

/// What a node is started with.
#[derive(Clone)]
pub struct NodeConfig {
    /// The device's Ed25519 key; its public half is the [`DeviceId`].
    pub secret_key: [u8; 32],
    /// Where to listen; port 0 is any free one.
    pub bind: Vec<SocketAddr>,
    /// URL of an own relay; without one only direct addresses are used.
    pub relay: Option<String>,
    /// Announce and find devices on the local network by mDNS.
    pub mdns: bool,
}

/// What a node stands on.
#[derive(Clone)]
pub struct Parts {
    /// Members and own locations.
    pub library: Arc<Library>,
}

/// One single-use ticket, as made by [`Node::invite`].
#[derive(Clone, Debug)]
pub struct Invitation {
    /// This node's number for it.
    pub id: u64,
    /// What the other person types.
    pub ticket: String,
    /// From when on it is refused.
    pub expires: SystemTime,
}

/// A device that answered an invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// Its id.
    pub device: DeviceId,
    /// The name it asks for.
    pub name: String,
    /// The confirmation code; the other side shows the same.
    pub code: String,
}

/// The inviting device was contacted and waits for the confirmation.
pub struct PendingJoin {
    /// The confirmation code; the other side shows the same.
    pub code: String,
    /// The library to be joined.
    pub library: LibraryInfo,
    /// The name of the inviting device.
    pub inviter: String,
}

/// How a peer is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Not by way of a relay.
    pub direct: bool,
    /// Socket address, or the relay's URL.
    pub address: String,
    /// Round-trip time.
    pub rtt: Duration,
}

/// A replica of one of a peer's locations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The location.
    pub location: LocationId,
    /// The owner's number of the last change applied here.
    pub applied: Seq,
    /// The owner's number of its last change, as far as it was told.
    pub head: Option<Seq>,
}

/// What is known of one other member.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// Its id.
    pub id: DeviceId,
    /// It is connected and answers.
    pub online: bool,
    /// How it is reached, when connected.
    pub path: Option<Path>,
    /// Milliseconds since 1970 when it was last connected.
    pub last_seen_ms: Option<u64>,
    /// Bytes of content received from it since this node started.
    pub bytes_in: u64,
    /// Bytes of content sent to it since this node started.
    pub bytes_out: u64,
    /// Its locations that are replicated here.
    pub replicas: Vec<Replica>,
    /// What went wrong last.
    pub last_error: Option<String>,
}

/// This device on the network.
pub struct Node {}

impl Node {
    /// Opens the endpoint and starts all tasks on the caller's runtime; waits for no network.
    pub async fn start(config: NodeConfig, parts: Parts) -> Result<Arc<Self>, SyncError> {
        unimplemented!()
    }
    /// This device.
    pub fn id(&self) -> DeviceId {
        unimplemented!()
    }
    /// Where peers may reach this device directly.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        unimplemented!()
    }
    /// Bytes of other devices' files.
    pub fn source(self: &Arc<Self>) -> Arc<dyn ContentSource> {
        unimplemented!()
    }
    /// Makes a single-use ticket.
    pub async fn invite(&self, valid_for: Duration) -> Result<Invitation, SyncError> {
        unimplemented!()
    }
    /// Waits until a device showed the ticket, and gives the code to compare; it is not yet a member.
    pub async fn asked(&self, invitation: u64) -> Result<Joined, SyncError> {
        unimplemented!()
    }
    /// Waits until a device joined with the ticket.
    pub async fn joined(&self, invitation: u64) -> Result<Joined, SyncError> {
        unimplemented!()
    }
    /// Contacts the inviting device; nothing is changed before [`Node::confirm`].
    pub async fn join(&self, ticket: &str, name: &str) -> Result<PendingJoin, SyncError> {
        unimplemented!()
    }
    /// Joins: from now on both devices are members.
    pub async fn confirm(&self, pending: PendingJoin) -> Result<(), SyncError> {
        unimplemented!()
    }
    /// Removes a device from the library, everywhere.
    pub async fn remove_device(&self, device: DeviceId) -> Result<(), SyncError> {
        unimplemented!()
    }
    /// Own locations were added, removed, renamed or shared otherwise: tells the peers.
    pub fn locations_changed(&self) {
        unimplemented!()
    }
    /// Members were changed in the library: tells the peers, and drops those removed.
    pub fn members_changed(&self) {
        unimplemented!()
    }
    /// The other members.
    pub fn peers(&self) -> Vec<PeerStatus> {
        unimplemented!()
    }
    /// Closes every connection in good order.
    pub async fn shutdown(&self) {
        unimplemented!()
    }
}
