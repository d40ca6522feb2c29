//! Devices on loopback: real endpoints, indexes and files.

mod bench;
mod books;
mod compact;
mod content;
mod device;
mod lending;
mod locks;
mod pairing;
mod pass_on;
mod presence;
mod real;
mod replication;
mod strangers;
mod writing;
