//! Everything that crosses the network, on Iroh: endpoint, pairing, members,
//! presence, replication of the index, transfer of content.
//!
//! | module | what it is |
//! |---|---|
//! | [`node`] | the public face: endpoint, the root of all tasks |
//! | [`wire`] | every message, versioned and bounded |
//! | [`pair`] | tickets, the proof of one, the code that both sides show |
//! | `members` | who belongs to the library: records passed on, removals enforced |
//! | `presence` | one live connection for each pair of members |
//! | `replicate` | rows of the index, out and in |
//! | `pass_on` | the same of third devices, for when they are away |
//! | `serve`, `fetch` | content, out and in |
//! | [`deliver`], [`accept`] | writes to others' files, out and in |
//! | [`error`] | why an operation failed |
//!
//! `docs/PROTOCOL.md` is the wire format, `docs/SECURITY.md` what peers are trusted for.
#![forbid(unsafe_code)]

pub mod accept;
mod compact;
pub mod deliver;
pub mod error;
mod fetch;
mod identity;
mod locks;
mod members;
pub mod node;
pub mod pair;
mod pass_on;
mod presence;
mod replicate;
mod serve;
pub mod wire;

pub use accept::{Applies, Arrived, Receive};
pub use deliver::Outgoing;
pub use error::SyncError;
pub use identity::device_id;
pub use node::{
    Invitation, Joined, Node, NodeConfig, Parts, Path, PeerStatus, PendingJoin, Replica,
};
