//! The drive as a mounted file system, on Linux's FUSE.
//!
//! A thin translation: it turns the kernel's requests into calls of
//! [`vfs_core::drive::Drive`] and its changes into invalidations, and decides
//! nothing that another kind of mount would have to decide as well.
//!
//! | module | what it is |
//! |---|---|
//! | `session` | making, watching, taking away and mending one mount |
//! | `attach` | `mount(2)`, `umount2(2)` and `fusermount3` |
//! | `abort` | giving up a connection that nobody serves |
//! | `mounts` | what is mounted where and who uses it, from `/proc` |
//! | `negotiate` | what this mount and this kernel agreed on |
//! | `adapter` | each request as one call of the drive |
//! | `locking` | waiting for locks, and the signals that end it |
//! | `io_mode` | passthrough or cached, per open inode |
//! | `listings` | which directories' listings the kernel may go on using |
//! | `linger` | looking for the next request before sleeping |
//! | `convert` | attributes, times, errors and flags |
//! | `invalidate`, `notify` | changes, told to the kernel |
//! | `events` | changes, told to the programs that watch |
//! | `watches` | which inodes programs watch |
//! | `inside` | what is mounted on names of the drive |
//! | `helper` | the process that makes calls for the sake of their events |
//! | `programs` | which program a request comes from |
//! | `stage` | how these calls are answered |
#![forbid(unsafe_code)]

mod abort;
mod adapter;
mod attach;
mod convert;
mod error;
mod events;
mod growth;
mod helper;
mod inside;
mod invalidate;
mod io_mode;
mod linger;
mod listings;
mod locking;
mod mounts;
mod negotiate;
mod notify;
mod programs;
mod session;
mod signals;
mod stage;
mod watches;

pub use abort::abort;
pub use error::MountError;
pub use helper::{HelperCommand, run_helper};
pub use mounts::{DeviceNo, Holder, MountInfo, mounts};
pub use session::{Events, Mount, MountOptions, Passthrough, is_dead, mend, mount};
