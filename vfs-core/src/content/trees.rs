//! The hash trees of what the cache lends.
//!
//! The cache keeps none, so that of a content is built by hashing its file when it is first asked
//! for, and stored. One thread of low priority builds them, one after the other; each asker may
//! have one waiting, and few requests wait for theirs.

use super::answer::unreadable;
use super::cache::{Cache, Key};
use super::lock;
use super::manifest::Manifest;
use super::manifests::Manifests;
use crate::indexer::{HASH_NICE, lower_priority};
use crate::model::{ContentId, DeviceId};
use crate::source::{FetchError, Wanted};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long an asker waits for a tree: it has to stay patient with the device.
const BUILD_PATIENCE: Duration = Duration::from_millis(1500);
/// How many requests wait for a tree, of all askers: each takes a thread that local reads need.
const MAX_WAITERS: usize = 4;
/// After so many trees those are removed whose contents are not in the cache any more.
const PRUNE_EVERY: usize = 64;

/// The trees of what is lent.
pub(super) struct Trees {
    stored: Manifests,
    cache: Arc<Cache>,
    queue: Mutex<Queue>,
    built: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Build>,
    building: Option<ContentId>,
    has_thread: bool,
    waiters: usize,
    begun: usize,
}

/// A file to hash.
struct Build {
    asker: DeviceId,
    wanted: Wanted,
    file: File,
}

impl Trees {
    pub(super) fn new(stored: Manifests, cache: Arc<Cache>) -> Self {
        let (queue, built) = Default::default();
        Self { stored, cache, queue, built }
    }

    /// Whether that of a content is there already.
    pub(super) fn has(&self, content: ContentId) -> bool {
        self.stored.has(content)
    }

    /// The tree of a content. If need be it is built, for which few may wait, and not for long.
    pub(super) fn get(
        self: &Arc<Self>,
        asker: DeviceId,
        wanted: Wanted,
        file: &File,
    ) -> Result<Arc<Manifest>, FetchError> {
        if let Some(tree) = self.stored.get(wanted.content) {
            return Ok(tree);
        }
        {
            let mut queue = lock(&self.queue);
            let is_queued = queue.is_queued(wanted.content);
            if !is_queued && queue.waiting.iter().any(|build| build.asker == asker) {
                return Err(FetchError::NotNow);
            }
            if !is_queued {
                let file = file.try_clone().map_err(unreadable)?;
                queue.waiting.push_back(Build { asker, wanted, file });
            }
            self.start(&mut queue).map_err(unreadable)?;
            if queue.waiters == MAX_WAITERS {
                return Err(FetchError::NotNow);
            }
            queue.waiters += 1;
            let is_queued = |queue: &mut Queue| queue.is_queued(wanted.content);
            let waited = self.built.wait_timeout_while(queue, BUILD_PATIENCE, is_queued);
            waited.unwrap_or_else(PoisonError::into_inner).0.waiters -= 1;
        }
        match self.stored.get(wanted.content) {
            Some(tree) => Ok(tree),
            None if self.cache.has_whole(wanted.content) => Err(FetchError::NotNow),
            None => Err(FetchError::Refused),
        }
    }

    fn start(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        if queue.has_thread {
            return Ok(());
        }
        let trees = self.clone();
        let spawned = std::thread::Builder::new().name("lent-trees".into()).spawn(move || {
            lower_priority(HASH_NICE);
            let _ended = Ended(&trees);
            while let Some(build) = trees.next() {
                trees.build(build);
            }
        });
        match spawned {
            Ok(_) => queue.has_thread = true,
            Err(_) => queue.waiting.clear(),
        }
        spawned.map(drop)
    }

    /// The next one for the thread, which ends when there is none.
    fn next(&self) -> Option<Build> {
        let (next, is_time) = {
            let mut queue = lock(&self.queue);
            let next = queue.waiting.pop_front();
            queue.building = next.as_ref().map(|build| build.wanted.content);
            queue.has_thread = next.is_some();
            let is_time = next.is_some() && queue.begun.is_multiple_of(PRUNE_EVERY);
            queue.begun += usize::from(next.is_some());
            (next, is_time)
        };
        self.built.notify_all();
        if is_time && let Err(e) = self.stored.prune(&mut |content| self.cache.has_whole(content)) {
            tracing::warn!("hash trees of what is not cached any more stay: {e}");
        }
        next
    }

    fn build(&self, Build { wanted, file, .. }: Build) {
        let Wanted { content, size } = wanted;
        match Manifest::of_file(&file, size, &AtomicBool::new(false)) {
            Ok(Some((hashed, tree))) if hashed == content => {
                if let Err(e) = self.stored.put_and_load(tree) {
                    tracing::warn!(%content, "a hash tree could not be stored: {e}");
                }
            }
            Ok(_) => {
                tracing::warn!(%content, "a cached content is damaged and is dropped");
                self.cache.file(Key::Content(content), size).discard();
            }
            Err(e) => tracing::warn!(%content, "a cached content could not be hashed: {e}"),
        }
    }
}

impl Queue {
    fn is_queued(&self, content: ContentId) -> bool {
        self.building == Some(content)
            || self.waiting.iter().any(|build| build.wanted.content == content)
    }
}

/// The end of the thread: also when it panics, the next one can begin.
struct Ended<'a>(&'a Trees);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut queue = lock(&self.0.queue);
            (queue.building, queue.has_thread) = (None, false);
            drop(queue);
            self.0.built.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::GROUP_BYTES;
    use super::*;
    use std::time::Instant;

    fn wanted(seed: u8) -> (Wanted, File) {
        let bytes = vec![seed; 3 * GROUP_BYTES as usize];
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &bytes).unwrap();
        (Wanted { content: ContentId::of(&bytes), size: bytes.len() as u64 }, file)
    }

    #[test]
    fn few_wait_for_trees_and_each_asker_has_one_built_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Manifests::open(&dir.path().join("lent")).unwrap();
        let cache = Arc::new(Cache::open(&dir.path().join("cache"), 1 << 30));
        let trees = Arc::new(Trees::new(open(), cache));
        let (first, file) = wanted(1);
        let (second, other) = wanted(2);
        let asker = |n: usize| DeviceId([n as u8; 32]);
        // As while a large file is hashed.
        lock(&trees.queue).has_thread = true;
        std::thread::scope(|scope| {
            for n in 0..MAX_WAITERS {
                let (trees, file) = (&trees, &file);
                scope.spawn(move || assert!(trees.get(asker(n), first, file).is_err()));
            }
            while lock(&trees.queue).waiters < MAX_WAITERS {
                std::thread::yield_now();
            }
            let asked = Instant::now();
            let refused = trees.get(asker(9), first, &file);
            assert!(matches!(refused, Err(FetchError::NotNow)));
            let first_asker = lock(&trees.queue).waiting[0].asker;
            assert!(trees.get(first_asker, second, &other).is_err());
            assert_eq!(lock(&trees.queue).waiting.len(), 1, "one for each asker");
            assert!(trees.get(asker(9), second, &other).is_err());
            assert_eq!(lock(&trees.queue).waiting.len(), 2);
            assert!(asked.elapsed() < BUILD_PATIENCE / 2, "at once");
        });
        assert_eq!(lock(&trees.queue).waiters, 0);
        lock(&trees.queue).has_thread = false;
        for (wanted, file) in [(first, &file), (second, &other), (first, &file)] {
            let tree = trees.get(asker(1), wanted, file).unwrap();
            assert_eq!(tree.content(), wanted.content);
            assert!(open().has(wanted.content), "it is stored");
        }
        assert_eq!(lock(&trees.queue).begun, 2, "each is hashed once");
    }
}
