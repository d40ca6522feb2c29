//! The drive without a kernel, a network or a terminal.
//!
//! | module | what it is |
//! |---|---|
//! | [`model`], [`path`] | ids, names, attributes, versions; addresses |
//! | [`error`] | failures in POSIX terms |
//! | [`ops`] | changes asked of another device, and what became of them |
//! | [`outbox`] | writes to other devices' files: accepted, durable, delivered later |
//! | [`apply`] | operations of other devices, carried out on own locations |
//! | [`index`] | rows of every location of every device, on an embedded store |
//! | [`library`] | what must survive a lost index: members, own locations |
//! | [`local`] | this device's own files, beneath a location's root |
//! | [`indexer`] | scan, hash and watch of own locations |
//! | [`content`] | hash trees, the content cache, the read plan |
//! | [`journal`] | a durable, ordered log of records |
//! | [`staging`] | bytes written to other devices' files, until their owner has them |
//! | [`changes`] | one ordered feed of what changed, for mounts and replication |
//! | [`overlay`] | what is shown already, though its owner has not said so yet |
//! | [`source`] | what this crate needs from a network: bytes of a version |
//! | [`locks`] | `flock` and record locks, of this device's programs and of other devices' |
//! | [`hydration`] | which programs do not pull in a library |
//! | [`drive`] | the operations of a file system, for every kind of mount |
//!
//! Nothing here names `fuser`, `iroh` or `clap`: adapters translate.
#![forbid(unsafe_code)]

pub mod apply;
pub mod changes;
pub mod content;
pub mod drive;
pub mod error;
mod failpoint;
pub mod hydration;
pub mod index;
pub mod indexer;
pub mod journal;
pub mod library;
pub mod local;
pub mod locks;
pub mod model;
pub mod ops;
pub mod outbox;
pub mod overlay;
pub mod path;
mod reopening;
pub mod source;
pub mod staging;
#[cfg(test)]
mod two_devices;
