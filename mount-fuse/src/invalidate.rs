//! From the drive's changes to the kernel's caches.
//!
//! A thread of its own waits for changes and sends what they mean for the
//! kernel. It is never a thread that serves requests: a notification may wait
//! for the lock of a directory in which a lookup is in progress, and a thread
//! that is to answer that lookup would wait for itself.

use crate::notify::Kernel;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use vfs_core::changes::{Change, Next};
use vfs_core::drive::{Drive, InodeNo, Invalidation};

/// The thread; it ends when this is dropped, after the notification it is sending.
pub(crate) struct Invalidator {
    _stop: oneshot::Sender<()>,
}

impl Invalidator {
    pub(crate) fn start(drive: Arc<Drive>, kernel: Kernel, runtime: &Handle) -> io::Result<Self> {
        // From here on nothing is missed, though the thread may start later.
        let mut changes = drive.subscribe();
        let (stop, mut stopped) = oneshot::channel::<()>();
        let runtime = runtime.clone();
        thread::Builder::new().name("sd-invalidate".into()).spawn(move || {
            loop {
                let next = runtime.block_on(async {
                    tokio::select! {
                        biased;
                        _ = &mut stopped => None,
                        next = changes.next() => next,
                    }
                });
                match next {
                    Some(Next::Batch(batch)) => invalidate(&drive, &kernel, &batch),
                    Some(Next::Missed) => kernel.expire_everything(),
                    None => break,
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

fn invalidate(drive: &Drive, kernel: &Kernel, batch: &[Change]) {
    // Many changes in one directory are one change of its listing.
    let mut directories = HashSet::<InodeNo>::new();
    for invalidation in batch.iter().flat_map(|change| drive.invalidations(change)) {
        match invalidation {
            Invalidation::Entry { parent, name } => kernel.expire_entry(parent.0, name.as_bytes()),
            Invalidation::Directory(ino) => drop(directories.insert(ino)),
            Invalidation::Attributes(ino) => kernel.expire_attributes(ino.0),
            Invalidation::Content(ino) => kernel.drop_pages(ino.0),
            Invalidation::Everything => kernel.expire_everything(),
        }
    }
    // After the names: a listing that is read in between then has the new ones.
    directories.iter().for_each(|ino| kernel.drop_pages(ino.0));
}
