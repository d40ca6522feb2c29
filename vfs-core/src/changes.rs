//! One ordered feed of what changed in the index.
//!
//! A mount turns it into kernel invalidations, `sync` into the live tail that
//! replicas follow. The feed carries *that* something changed, with what is
//! needed to name it in a kernel cache; whoever needs the row reads the index.
//! A subscriber that falls behind is told so ([`Next::Missed`]) and must treat
//! everything as changed: nothing is ever silently dropped.

use crate::model::{FileId, LocationNo, Name};
use std::sync::Arc;
use tokio::sync::broadcast;

/// How many changes a slow subscriber may lag before it is told that it missed some.
const CAPACITY: usize = 64 * 1024;

/// One change of the index, after it was committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The entry `name` of a directory appeared, disappeared or now is another file or version.
    Entry {
        /// The location.
        location: LocationNo,
        /// The directory.
        parent: FileId,
        /// The entry.
        name: Name,
    },
    /// Attributes of a file or directory changed, its bytes did not.
    Attributes {
        /// The location.
        location: LocationNo,
        /// The file.
        file: FileId,
        /// Its generation, part of its inode number.
        generation: u32,
    },
    /// A location appeared, disappeared or was renamed; so may have its device.
    Locations,
    /// The members or their names changed.
    Devices,
    /// A replica began anew under its old number: what its ids meant before, they mean no more.
    Reset,
}

/// What a subscriber receives.
#[derive(Clone, Debug)]
pub enum Next {
    /// Changes of one commit, in order.
    Batch(Arc<[Change]>),
    /// Some were lost: treat everything as changed.
    Missed,
}

/// The sending half, shared by everything that commits to the index.
#[derive(Clone, Debug)]
pub struct Feed(broadcast::Sender<Arc<[Change]>>);

impl Default for Feed {
    fn default() -> Self {
        Self(broadcast::Sender::new(CAPACITY / 256))
    }
}

impl Feed {
    /// Publishes the changes of one commit.
    pub fn publish(&self, changes: Vec<Change>) {
        if !changes.is_empty() {
            // No subscriber is not an error: nothing is mounted and no peer is connected.
            let _ = self.0.send(changes.into());
        }
    }

    /// Everything published from now on.
    pub fn subscribe(&self) -> Subscription {
        Subscription(self.0.subscribe())
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Subscription(broadcast::Receiver<Arc<[Change]>>);

impl Subscription {
    /// The next batch; `None` when the index is closed.
    pub async fn next(&mut self) -> Option<Next> {
        Self::translate(self.0.recv().await)
    }

    /// The next batch, waiting on this thread; not for use on a runtime's thread.
    pub fn blocking_next(&mut self) -> Option<Next> {
        Self::translate(self.0.blocking_recv())
    }

    fn translate(received: Result<Arc<[Change]>, broadcast::error::RecvError>) -> Option<Next> {
        match received {
            Ok(batch) => Some(Next::Batch(batch)),
            Err(broadcast::error::RecvError::Lagged(_)) => Some(Next::Missed),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}
