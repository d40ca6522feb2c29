//! Telling the kernel that other devices' files have become longer.
//!
//! Before it learns the new size of a file it must let go of the page in which that ended, and
//! for that it waits until nobody is reading the page any more. So each file is told by a thread of
//! its own: a reader that waits for a slow network holds up no other change, and no thread that
//! its read needs. What is to be told, and when it is told, [`Listener`] knows.

use crate::notify::Kernel;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use tokio::runtime::Handle;
use vfs_core::drive::{Drive, InodeNo, KernelCache, Listener};

/// So many files are told at once.
const AT_ONCE: usize = 32;
/// How soon to try again when the index could not be read, or no thread be had.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// An answer that was being made has reached the kernel long before.
const EXPIRED_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// A read(2) takes the page first and the size after that. With the page that was dropped in
/// between, and the size that was told since, it would give zeros. It takes a microsecond, unless
/// something keeps it from its processor.
const GRACE: Duration = Duration::from_millis(10);

/// Has files told. A clone is the same; what is under way ends by itself.
#[derive(Clone)]
pub(crate) struct Grower(Arc<Inner>);

struct Inner {
    listener: Listener,
    kernel: Kernel,
    runtime: Handle,
    under_way: AtomicUsize,
    /// There is more than could be begun.
    is_behind: AtomicBool,
}

impl Grower {
    /// From here on nothing is shown too early.
    pub(crate) fn new(drive: &Arc<Drive>, kernel: Kernel, runtime: &Handle) -> Self {
        let (listener, runtime) = (drive.listen(), runtime.clone());
        let (under_way, is_behind) = Default::default();
        Self(Arc::new(Inner { listener, kernel, runtime, under_way, is_behind }))
    }

    /// Something may have grown.
    pub(crate) fn look(&self) {
        for file in self.0.listener.growing() {
            if self.0.under_way.fetch_add(1, Ordering::AcqRel) >= AT_ONCE {
                self.0.is_behind.store(true, Ordering::Release);
                // Looks again, unless others are under way, which will.
                return drop(Ending(self.clone()));
            }
            let ending = Ending(self.clone());
            let tell = move || {
                let this = &ending.0;
                match this.0.listener.grow(file, &this.0.kernel) {
                    Ok(told) => told.into_iter().for_each(|ino| this.expire_again(ino)),
                    Err(error) => this.look_again(&error),
                }
            };
            if let Err(error) = thread::Builder::new().name("sd-growth".into()).spawn(tell) {
                return self.look_again(&error);
            }
        }
    }

    /// An answer with the size from before may reach the kernel when it is told of the new one, and
    /// make it know the inode only then.
    fn expire_again(&self, ino: InodeNo) {
        let this = self.clone();
        self.0.runtime.spawn(async move {
            tokio::time::sleep(EXPIRED_AGAIN_AFTER).await;
            this.0.kernel.expire_attributes(ino.0);
        });
    }

    fn look_again(&self, error: &(dyn std::error::Error + 'static)) {
        tracing::warn!(error, "the mount is told later how files have grown");
        // Not kept alive by this: it ends with the mount.
        let this = Arc::downgrade(&self.0);
        self.0.runtime.spawn(async move {
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
            if let Some(inner) = this.upgrade() {
                Self(inner).look();
            }
        });
    }
}

/// The end of one file, also when it panics.
struct Ending(Grower);

impl Drop for Ending {
    fn drop(&mut self) {
        let inner = &self.0.0;
        let others = inner.under_way.fetch_sub(1, Ordering::AcqRel) - 1;
        if others < AT_ONCE && inner.is_behind.swap(false, Ordering::AcqRel) {
            self.0.look();
        }
    }
}

impl KernelCache for Kernel {
    fn drop_pages_from(&self, ino: InodeNo, from: u64) {
        Self::drop_pages_from(self, ino.0, from);
    }

    fn wait_for_readers(&self) {
        thread::sleep(GRACE);
    }

    fn expire_attributes(&self, ino: InodeNo) {
        Self::expire_attributes(self, ino.0);
    }
}
