//! Everything that crosses the network, on Iroh: endpoint, pairing, members,
//! presence, replication of the index, transfer of content.
//!
//! | module | what it is |
//! |---|---|
//! | [`node`] | the public face: endpoint, the tasks, status |
//! | [`error`] | why an operation failed |
//!
//! `docs/PROTOCOL.md` is the wire format, `docs/SECURITY.md` what peers are trusted for.
#![forbid(unsafe_code)]

pub mod error;
pub mod node;

pub use error::SyncError;
pub use node::{
    Invitation, Joined, Node, NodeConfig, Parts, Path, PeerStatus, PendingJoin, Replica,
};
