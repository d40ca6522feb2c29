//! From the drive's changes to the kernel's caches.
//!
//! A thread of its own waits for changes and sends what they mean for the
//! kernel. It is never a thread that serves requests: a notification may wait
//! for the lock of a directory in which a lookup is in progress, and a thread
//! that is to answer that lookup would wait for itself.

use crate::listings::Listings;
use crate::notify::Kernel;
use std::io;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use vfs_core::changes::Next;
use vfs_core::drive::{Drive, Invalidation};

/// The thread; it ends when this is dropped, after the notification it is sending.
pub(crate) struct Invalidator {
    _stop: oneshot::Sender<()>,
}

impl Invalidator {
    pub(crate) fn start(
        drive: Arc<Drive>,
        kernel: Kernel,
        listings: Arc<Listings>,
        runtime: &Handle,
    ) -> io::Result<Self> {
        // From here on nothing is missed, though the thread may start later.
        let mut changes = drive.subscribe();
        let (stop, mut stopped) = oneshot::channel::<()>();
        let runtime = runtime.clone();
        let tell = Tell { kernel, listings };
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
                    Some(Next::Batch(batch)) => {
                        drive.invalidations_of(&batch).into_iter().for_each(|i| tell.invalidate(i));
                    }
                    Some(Next::Missed) => tell.invalidate(Invalidation::Everything),
                    None => break,
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

/// Whom to tell.
struct Tell {
    kernel: Kernel,
    listings: Arc<Listings>,
}

impl Tell {
    fn invalidate(&self, invalidation: Invalidation) {
        let kernel = &self.kernel;
        match invalidation {
            Invalidation::Entry { parent, name } => kernel.expire_entry(parent.0, name.as_bytes()),
            Invalidation::Directory(ino) | Invalidation::Content(ino) => kernel.drop_pages(ino.0),
            Invalidation::Attributes(ino) => kernel.expire_attributes(ino.0),
            Invalidation::Everything => {
                self.listings.forget_all();
                kernel.expire_everything();
            }
        }
    }
}
