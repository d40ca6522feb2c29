//! Devices on loopback: real endpoints, indexes and files.

mod bench;
mod books;
mod content;
mod device;
mod locks;
mod pairing;
mod presence;
mod real;
mod replication;
mod strangers;
mod writing;
