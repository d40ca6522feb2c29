//! What this device's cache lends to other members.
//!
//! A content that was read here lies in the cache, whole and verified. A member that cannot
//! reach its owner, or reads much of it, may have it from here. Nothing is announced: a member
//! asks for a content id when it needs it.
//!
//! **Who may have it.** A content id is no permission. A content is lent to a member only if
//! somebody else than that member has a file with these bytes in a location that the member may
//! see: one of this device's own that is shared with it, or one of which this device keeps a
//! statement with the owner's signature that names the member (or all members). What the asker
//! says of its own locations does not count, or it could claim any id it heard of. "Not here"
//! and "not for you" are one answer.
//!
//! **What proves it.** The cache keeps no hash trees, so that of a content is built by hashing
//! its file when it is first asked for, and stored. One thread of low priority builds them, one
//! after the other; each asker may have one waiting, and few requests wait for theirs. What is lent
//! is checked against it first: a disk that lies must not make a liar of this device.

use super::cache::{Cache, Key};
use super::disk::read_range;
use super::lock;
use super::manifest::{GROUP_BYTES, Manifest, is_fetchable, verify};
use super::manifests::Manifests;
use crate::index::{Index, IndexError};
use crate::indexer::{HASH_NICE, lower_priority};
use crate::model::{ContentId, DeviceId, Entry, Location, LocationNo};
use crate::source::{FetchError, Fetched, Lent, MAX_FETCH_BYTES, Wanted};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// How long an asker waits for a tree: it has to stay patient with the device.
const BUILD_PATIENCE: Duration = Duration::from_millis(1500);
/// How many requests wait for a tree, of all askers: each takes a thread that local reads need.
const MAX_WAITERS: usize = 4;
/// After so many trees those are removed whose contents are not in the cache any more.
const PRUNE_EVERY: usize = 64;
/// How many files with the same bytes are looked at for one that the asker may read.
const MAX_REASONS: usize = 256;

/// Lends ranges of whole cached contents. Its calls block on the disk.
pub struct Lender {
    index: Index,
    cache: Arc<Cache>,
    trees: Arc<Trees>,
}

/// The trees of what is lent.
struct Trees {
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

impl Lender {
    /// Of this cache, to those whom the index lets have it. `trees` are the lender's own.
    pub fn new(index: Index, cache: Arc<Cache>, trees: Manifests) -> Self {
        let (queue, built) = Default::default();
        let trees = Arc::new(Trees { stored: trees, cache: cache.clone(), queue, built });
        Self { index, cache, trees }
    }

    /// What of each content is here and may be lent to the asker.
    pub fn lends(&self, asker: DeviceId, contents: &[Wanted]) -> Vec<Lent> {
        let mut said: HashMap<Wanted, Lent> = HashMap::new();
        let mut say = |wanted: &Wanted| {
            said.entry(*wanted).or_insert_with(|| self.lent(asker, *wanted)).clone()
        };
        contents.iter().map(&mut say).collect()
    }

    /// How long it takes must not tell who may not have a content whether it is here: that is
    /// looked at last.
    fn lent(&self, asker: DeviceId, wanted: Wanted) -> Lent {
        let may_have = self.may_have(asker, wanted).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot find out who may have cached bytes");
            false
        });
        if !may_have || !self.cache.has_whole(wanted.content) {
            return Lent::default();
        }
        let is_ready = wanted.size <= GROUP_BYTES || self.trees.stored.has(wanted.content);
        Lent { ranges: vec![0..wanted.size], is_ready }
    }

    /// The bytes of a range, with what proves them.
    pub fn read(
        &self,
        asker: DeviceId,
        wanted: Wanted,
        range: Range<u64>,
    ) -> Result<Fetched, FetchError> {
        let Wanted { content, size } = wanted;
        if !is_fetchable(&range, size) || range.end - range.start > MAX_FETCH_BYTES {
            return Err(FetchError::Failed("the range is not one that may be asked for".into()));
        }
        if !self.may_have(asker, wanted).map_err(|e| FetchError::Failed(e.to_string()))? {
            return Err(FetchError::Refused);
        }
        // The same answer as to those who may not have it.
        let file = self.cache.whole_content(content, size).ok_or(FetchError::Refused)?;
        let bytes = read_range(&file, range.clone()).map_err(unreadable)?;
        let proof = match range == (0..size) {
            true => Vec::new(),
            false => {
                let read = &mut |near| read_range(&file, near).map(|bytes| bytes.to_vec());
                let tree = self.trees.get(asker, wanted, &file)?;
                tree.proof_with(range.clone(), read).map_err(unreadable)?
            }
        };
        if !verify(content, size, range, &bytes, &proof) {
            tracing::warn!(%content, "a cached content is damaged and is dropped");
            self.cache.file(Key::Content(content), size).discard();
            return Err(FetchError::Stale);
        }
        Ok(Fetched { bytes, proof })
    }

    fn may_have(&self, asker: DeviceId, wanted: Wanted) -> Result<bool, IndexError> {
        let view = self.index.view()?;
        let mut visible: HashMap<LocationNo, bool> = HashMap::new();
        let mut looked_at = 0;
        for (no, file) in view.holders(wanted.content)? {
            let is_visible = match visible.get(&no) {
                Some(known) => *known,
                None => {
                    let location = self.index.location(no);
                    let sees = location.map(|location| self.may_see(asker, &location));
                    *visible.entry(no).or_insert(sees.transpose()?.unwrap_or(false))
                }
            };
            if !is_visible {
                continue;
            }
            let entry = view.node(no, file)?.map(|node| node.entry);
            let has_it =
                |e: &Entry| e.content == Some(wanted.content) && e.attr.size == wanted.size;
            if entry.as_ref().is_some_and(has_it) {
                return Ok(true);
            }
            looked_at += 1;
            if looked_at == MAX_REASONS {
                break;
            }
        }
        Ok(false)
    }

    /// Whether a location of another device than the asker is shared with it.
    fn may_see(&self, asker: DeviceId, location: &Location) -> Result<bool, IndexError> {
        if location.owner == asker {
            return Ok(false);
        }
        if location.owner == self.index.me() {
            return Ok(location.shared_with.as_ref().is_none_or(|with| with.contains(&asker)));
        }
        self.index.may_be_shown(location, asker)
    }
}

impl Trees {
    /// The tree of a content. If need be it is built, for which few may wait, and not for long.
    fn get(
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

/// A file that ends early was cut beneath the cache.
fn unreadable(error: io::Error) -> FetchError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => FetchError::Stale,
        _ => FetchError::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
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
        let (queue, built) = Default::default();
        let trees = Arc::new(Trees { stored: open(), cache, queue, built });
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
