//! From the drive's changes to the kernel's caches.
//!
//! A thread of its own waits for changes and sends what they mean for the
//! kernel. It is never a thread that serves requests: a notification may wait
//! for the lock of a directory in which a lookup is in progress, and a thread
//! that is to answer that lookup would wait for itself.
//!
//! A lookup that only asks whether a known name still holds takes no such lock. Its answer,
//! made before a change, may reach the kernel after the notification of that change, and would
//! stand for an hour. So every name is told a second time, when such answers are long there.
//! Kernels that cannot expire a name would take away what was mounted on a new one meanwhile:
//! they are not told again while anything is mounted inside the drive, and believe no answer
//! for longer than half a minute anyway.

use crate::growth::Grower;
use crate::inside::Inside;
use crate::listings::Listings;
use crate::mounts::DeviceNo;
use crate::notify::Kernel;
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use vfs_core::changes::Next;
use vfs_core::drive::{Drive, Invalidation};

/// When names are told again: an answer that was being made has reached the kernel long before.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// How many names are kept for that.
const AGAIN_AT_MOST: usize = 65_536;

/// The thread; it ends when this is dropped, after the notification it is sending.
pub(crate) struct Invalidator {
    _stop: oneshot::Sender<()>,
}

impl Invalidator {
    pub(crate) fn start(
        drive: Arc<Drive>,
        kernel: Kernel,
        grower: Grower,
        listings: Arc<Listings>,
        device: Option<DeviceNo>,
        runtime: &Handle,
    ) -> io::Result<Self> {
        // From here on nothing is missed, though the thread may start later.
        let mut changes = drive.subscribe();
        let (stop, mut stopped) = oneshot::channel::<()>();
        let runtime = runtime.clone();
        let inside = device.filter(|_| kernel.drops_names()).map(Inside::new);
        // What has grown since the kernel is told of growth was perhaps not heard of.
        grower.look();
        let mut tell = Tell { kernel, grower, listings, inside };
        thread::Builder::new().name("sd-invalidate".into()).spawn(move || {
            let mut again = Again::default();
            loop {
                let next = runtime.block_on(async {
                    tokio::select! {
                        biased;
                        _ = &mut stopped => Wake::Stop,
                        () = at(again.due()) => Wake::Again,
                        next = changes.next() => next.map_or(Wake::Stop, Wake::Change),
                    }
                });
                match next {
                    Wake::Change(Next::Batch(batch)) => {
                        for invalidation in drive.invalidations_of(&batch) {
                            again.note(&invalidation, Instant::now());
                            tell.invalidate(invalidation);
                        }
                    }
                    Wake::Change(Next::Missed) => tell.invalidate(Invalidation::Everything),
                    Wake::Again => {
                        let names = again.take(Instant::now());
                        names.into_iter().for_each(|name| tell.invalidate_again(name));
                    }
                    Wake::Stop => break,
                }
            }
        })?;
        Ok(Self { _stop: stop })
    }
}

/// Why the thread woke.
enum Wake {
    Change(Next),
    Again,
    Stop,
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// What is to be told a second time, in the order in which it was told first.
#[derive(Default)]
struct Again(VecDeque<(Instant, Invalidation)>);

impl Again {
    fn note(&mut self, invalidation: &Invalidation, now: Instant) {
        let is_name = matches!(invalidation, Invalidation::Entry { .. });
        match is_name && self.0.len() < AGAIN_AT_MOST {
            true => self.0.push_back((now + AGAIN_AFTER, invalidation.clone())),
            // A flood of them: the last one stands for all.
            false if is_name => {
                self.0.clear();
                self.0.push_back((now + AGAIN_AFTER, Invalidation::Everything));
            }
            false => {}
        }
    }

    fn due(&self) -> Option<Instant> {
        self.0.front().map(|(due, _)| *due)
    }

    fn take(&mut self, now: Instant) -> Vec<Invalidation> {
        let count = self.0.iter().take_while(|(due, _)| *due <= now).count();
        self.0.drain(..count).map(|(_, invalidation)| invalidation).collect()
    }
}

/// Whom to tell.
struct Tell {
    kernel: Kernel,
    grower: Grower,
    listings: Arc<Listings>,
    /// Where names are dropped with what is mounted on them.
    inside: Option<Inside>,
}

impl Tell {
    fn invalidate_again(&mut self, invalidation: Invalidation) {
        let all = Path::new("");
        if !self.inside.as_mut().is_some_and(|inside| inside.has_at_or_below(all)) {
            self.invalidate(invalidation);
        }
    }

    fn invalidate(&self, invalidation: Invalidation) {
        let kernel = &self.kernel;
        match invalidation {
            Invalidation::Entry { parent, name } => kernel.expire_entry(parent.0, name.as_bytes()),
            Invalidation::Directory(ino) => {
                self.listings.forget(ino.0);
                kernel.drop_pages(ino.0);
            }
            Invalidation::Content(ino) => kernel.drop_pages(ino.0),
            Invalidation::Attributes(ino) => kernel.expire_attributes(ino.0),
            Invalidation::Growth => self.grower.look(),
            Invalidation::Everything => {
                self.listings.forget_all();
                kernel.expire_everything();
                // Which files have grown is not lost with the changes that told of them.
                self.grower.look();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfs_core::drive::InodeNo;
    use vfs_core::model::Name;

    #[test]
    fn names_are_told_a_second_time_and_nothing_else_is() {
        let entry = |name: &str| Invalidation::Entry {
            parent: InodeNo(5),
            name: Name::new(name.as_bytes()).unwrap(),
        };
        let (mut again, now) = (Again::default(), Instant::now());
        assert_eq!(again.due(), None);
        again.note(&entry("a"), now);
        again.note(&Invalidation::Directory(InodeNo(5)), now);
        again.note(&entry("b"), now + AGAIN_AFTER / 2);
        assert_eq!(again.due(), Some(now + AGAIN_AFTER));
        assert_eq!(again.take(now), []);
        assert_eq!(again.take(now + AGAIN_AFTER), [entry("a")]);
        assert_eq!(again.take(now + AGAIN_AFTER * 2), [entry("b")]);
        assert_eq!(again.due(), None);
    }

    #[test]
    fn a_flood_of_names_is_told_as_one() {
        let (mut again, now) = (Again::default(), Instant::now());
        let name = Name::new(&b"a"[..]).unwrap();
        let entry = Invalidation::Entry { parent: InodeNo(5), name };
        (0..=AGAIN_AT_MOST).for_each(|_| again.note(&entry, now));
        assert_eq!(again.take(now + AGAIN_AFTER), [Invalidation::Everything]);
    }
}
