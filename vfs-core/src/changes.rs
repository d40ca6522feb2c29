//! One ordered feed of what changed in the index.
//!
//! A mount turns it into kernel invalidations, `sync` into the live tail that
//! replicas follow. The feed carries *that* something changed, with what is
//! needed to name it in a kernel cache; whoever needs the row reads the index.
//! A subscriber that falls behind is told so ([`Next::Missed`]) and must treat
//! everything as changed: nothing is ever silently dropped. Who must know of a change before
//! anybody can see it in the index is a [`Witness`].

use crate::model::{ContentId, Entry, FileId, FileType, LocationNo, Name, Stamp};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use tokio::sync::broadcast::{self, error::RecvError};

/// How many changes a slow subscriber may lag before it is told that it missed some, in commits.
const MAX_COMMITS: usize = 256;
/// And in changes, of which a commit of a scan has thousands; the last commit is kept in any case.
const MAX_CHANGES: usize = 16 * 1024;

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
        /// What had the name before. When it neither was nor is, it is not known what changed.
        was: Option<Brief>,
        /// What has it now.
        now: Option<Brief>,
    },
    /// Attributes of a file or directory changed; of its bytes none, but for some at the end.
    Attributes {
        /// The location.
        location: LocationNo,
        /// The file.
        file: FileId,
        /// Its generation, part of its inode number.
        generation: u32,
        /// What a program that watches it may be told; `None` when nothing.
        noticed: Option<Noticed>,
        /// Bytes were appended.
        grew: Option<Grew>,
    },
    /// A location appeared, disappeared or was renamed; so may have its device.
    Locations,
    /// The members or their names changed.
    Devices,
    /// A replica began anew under its old number: what its ids meant before, they mean no more.
    Reset,
}

/// What tells one file, and one version of it, from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Brief {
    /// The file.
    pub file: FileId,
    /// Its number on its owner's disk.
    pub disk_ino: u64,
    /// The version of its bytes, part of its inode number.
    pub generation: u32,
    /// Its type.
    pub file_type: FileType,
    /// Its size in bytes.
    pub size: u64,
}

impl Change {
    /// That attributes of a file changed, seen under this name.
    pub fn of_attributes(
        location: LocationNo,
        (parent, name): (FileId, &Name),
        old: &Entry,
        new: &Entry,
    ) -> Self {
        let (file, generation) = (new.file_id, new.generation);
        let noticed = Touched::between(old, new).map(|touched| Noticed {
            parent,
            name: name.clone(),
            file: new.into(),
            touched,
        });
        Self::Attributes { location, file, generation, noticed, grew: Grew::between(old, new) }
    }
}

/// How a file has grown: its bytes are what they were, and some more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grew {
    /// Its stamp before.
    pub was: Stamp,
    /// What its bytes are now.
    pub content: ContentId,
}

impl Grew {
    /// From one state of a version to the next. An owner lets a file keep its generation only when
    /// it has read all of it, so the hash is known.
    fn between(old: &Entry, new: &Entry) -> Option<Self> {
        let has_grown = new.attr.file_type == FileType::File && new.attr.size > old.attr.size;
        let content = new.content.filter(|_| has_grown)?;
        Some(Self { was: old.stamp(), content })
    }
}

impl From<&Entry> for Brief {
    fn from(entry: &Entry) -> Self {
        Self {
            file: entry.file_id,
            disk_ino: entry.disk_ino,
            generation: entry.generation,
            file_type: entry.attr.file_type,
            size: entry.attr.size,
        }
    }
}

/// What changed of a file, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Noticed {
    /// The directory.
    pub parent: FileId,
    /// The name.
    pub name: Name,
    /// The file.
    pub file: Brief,
    /// What of it.
    pub touched: Touched,
}

/// What of a file changed, its version being the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Touched {
    /// Its mode or times.
    Attributes,
    /// Bytes were appended.
    Bytes,
}

impl Touched {
    /// What changed between two states of one version. It is nothing when only its hash became
    /// known, or entries of a directory came or went.
    pub fn between(old: &Entry, new: &Entry) -> Option<Self> {
        let is_file = new.attr.file_type == FileType::File;
        let (old, new) = (&old.attr, &new.attr);
        let is_touched = (old.perm, old.uid, old.gid) != (new.perm, new.uid, new.gid)
            || (is_file && old.mtime != new.mtime);
        match is_file && old.size != new.size {
            true => Some(Self::Bytes),
            false if is_touched => Some(Self::Attributes),
            false => None,
        }
    }
}

/// The changes of one commit, in order.
pub type Commit = Arc<Vec<Change>>;

/// What a subscriber receives.
#[derive(Clone, Debug)]
pub enum Next {
    /// What one commit changed.
    Batch(Commit),
    /// Some were lost: treat everything as changed.
    Missed,
}

/// Sees changes before they can be seen in the index.
pub trait Witness: Send + Sync {
    /// These are about to be committed; called by whoever commits, who waits for it.
    fn coming(&self, changes: &[Change]);
}

/// The sending half, shared by everything that commits to the index.
#[derive(Clone, Debug)]
pub struct Feed {
    sender: broadcast::Sender<Weak<Vec<Change>>>,
    recent: Arc<Mutex<Recent>>,
    witnesses: Arc<RwLock<Vec<Weak<dyn Witness>>>>,
}

impl Default for Feed {
    fn default() -> Self {
        let sender = broadcast::Sender::new(MAX_COMMITS);
        Self { sender, recent: Arc::default(), witnesses: Arc::default() }
    }
}

/// The commits that subscribers may still want: the channel bounds how many they are, this how
/// large.
#[derive(Debug, Default)]
struct Recent {
    commits: VecDeque<Commit>,
    changes: usize,
}

impl Recent {
    fn push(&mut self, commit: Commit) {
        self.changes += commit.len();
        self.commits.push_back(commit);
        while self.commits.len() > 1
            && (self.changes > MAX_CHANGES || self.commits.len() > MAX_COMMITS)
        {
            self.pop();
        }
    }

    fn pop(&mut self) {
        let oldest = self.commits.pop_front();
        self.changes -= oldest.map_or(0, |commit| commit.len());
    }

    /// Lets go of what every subscriber has had. The newest stays, which one may be about to take.
    fn let_go(&mut self) {
        while self.commits.len() > 1 {
            self.pop();
        }
    }
}

impl Feed {
    /// Publishes the changes of one commit.
    pub fn publish(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if self.sender.is_empty() {
            recent.let_go();
        }
        let commit = Arc::new(changes);
        // No subscriber is not an error: nothing is mounted and no peer is connected.
        match self.sender.send(Arc::downgrade(&commit)) {
            Ok(_) => recent.push(commit),
            Err(_) => *recent = Recent::default(),
        }
    }

    /// Everything published from now on.
    pub fn subscribe(&self) -> Subscription {
        Subscription(self.sender.subscribe())
    }

    /// Has the changes of every commit seen, for as long as this witness lives.
    pub(crate) fn add_witness(&self, witness: &Arc<impl Witness + 'static>) {
        let mut witnesses = self.witnesses.write().unwrap_or_else(PoisonError::into_inner);
        witnesses.retain(|w| w.strong_count() > 0);
        let witness: Weak<dyn Witness> = Arc::<_>::downgrade(witness) as _;
        witnesses.push(witness);
    }

    /// Has the witnesses see changes that are about to be committed.
    pub(crate) fn announce(&self, changes: &[Change]) {
        let witnesses = self.witnesses.read().unwrap_or_else(PoisonError::into_inner);
        witnesses.iter().filter_map(Weak::upgrade).for_each(|witness| witness.coming(changes));
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Subscription(broadcast::Receiver<Weak<Vec<Change>>>);

impl Subscription {
    /// The next batch; `None` when the index is closed.
    pub async fn next(&mut self) -> Option<Next> {
        let received = self.0.recv().await;
        self.translate(received)
    }

    /// The next batch, waiting on this thread; not for use on a runtime's thread.
    pub fn blocking_next(&mut self) -> Option<Next> {
        let received = self.0.blocking_recv();
        self.translate(received)
    }

    fn translate(&mut self, received: Result<Weak<Vec<Change>>, RecvError>) -> Option<Next> {
        let commit = match received {
            Ok(commit) => commit.upgrade(),
            Err(RecvError::Lagged(_)) => None,
            Err(RecvError::Closed) => return None,
        };
        if commit.is_none() {
            // Everything up to here is covered by saying once that some of it was missed.
            self.0 = self.0.resubscribe();
        }
        Some(commit.map_or(Next::Missed, Next::Batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locations(count: usize) -> Vec<Change> {
        vec![Change::Locations; count]
    }

    fn batch(subscription: &mut Subscription) -> Option<usize> {
        match subscription.blocking_next() {
            Some(Next::Batch(commit)) => Some(commit.len()),
            Some(Next::Missed) | None => None,
        }
    }

    #[test]
    fn who_keeps_up_gets_every_commit_of_any_size_in_order() {
        let feed = Feed::default();
        let mut subscription = feed.subscribe();
        for count in [1, 3 * MAX_CHANGES, 2, MAX_CHANGES] {
            feed.publish(locations(count));
            assert_eq!(batch(&mut subscription), Some(count));
        }
        for count in 1..=100 {
            feed.publish(locations(count));
        }
        for count in 1..=100 {
            assert_eq!(batch(&mut subscription), Some(count));
        }
    }

    #[test]
    fn who_falls_behind_is_told_once_and_costs_bounded_memory() {
        for (commits, changes) in [(20, MAX_CHANGES / 8), (2 * MAX_COMMITS, 1)] {
            let feed = Feed::default();
            let mut slow = feed.subscribe();
            for _ in 0..commits {
                feed.publish(locations(changes));
            }
            let kept = feed.recent.lock().unwrap();
            assert!(kept.changes <= MAX_CHANGES && kept.commits.len() <= MAX_COMMITS);
            assert_eq!(kept.changes, kept.commits.iter().map(|c| c.len()).sum::<usize>());
            drop(kept);
            assert_eq!(batch(&mut slow), None, "it was not told what it missed");
            feed.publish(locations(7));
            assert_eq!(batch(&mut slow), Some(7), "it was told twice, or missed what came after");
        }
    }

    #[test]
    fn nothing_is_kept_for_nobody() {
        let feed = Feed::default();
        feed.publish(locations(5));
        assert!(feed.recent.lock().unwrap().commits.is_empty());
        let mut subscription = feed.subscribe();
        feed.publish(locations(5));
        assert_eq!(batch(&mut subscription), Some(5));
        feed.publish(locations(2));
        assert_eq!(batch(&mut subscription), Some(2));
        feed.publish(locations(1));
        assert_eq!(feed.recent.lock().unwrap().changes, 3, "what everybody has had is kept");
        drop(subscription);
        feed.publish(locations(1));
        assert!(feed.recent.lock().unwrap().commits.is_empty());
    }
}
