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
//! its file when it is first asked for, one at a time, and kept in memory within
//! [`TREES_BYTES`]. What is lent is checked against it first: a disk that lies must not make a
//! liar of this device.

use super::cache::{Cache, Key};
use super::disk::read_range;
use super::lock;
use super::manifest::{Manifest, is_fetchable, verify};
use crate::index::{Index, IndexError};
use crate::model::{ContentId, DeviceId, Location};
use crate::source::{FetchError, Fetched, MAX_FETCH_BYTES, Wanted};
use lru::LruCache;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much memory the trees may take, the most recent one always included.
const TREES_BYTES: usize = 16 << 20;
/// How long an asker waits for a tree: it has to stay patient with the device.
const BUILD_PATIENCE: Duration = Duration::from_millis(1500);
/// How many files with the same bytes are looked at for one that the asker may read.
const MAX_REASONS: usize = 256;

/// Lends ranges of whole cached contents. Its calls block on the disk.
pub struct Lender {
    index: Index,
    cache: Arc<Cache>,
    trees: Arc<Trees>,
}

#[derive(Default)]
struct Trees {
    state: Mutex<TreesState>,
    built: Condvar,
}

struct TreesState {
    kept: LruCache<ContentId, Arc<Manifest>>,
    bytes: usize,
    building: Option<ContentId>,
}

impl Default for TreesState {
    fn default() -> Self {
        Self { kept: LruCache::unbounded(), bytes: 0, building: None }
    }
}

impl Lender {
    /// Of this cache, to those whom the index lets have it.
    pub fn new(index: Index, cache: Arc<Cache>) -> Self {
        Self { index, cache, trees: Arc::default() }
    }

    /// Which ranges of each content are here and may be lent to the asker.
    pub fn lends(&self, asker: DeviceId, contents: &[Wanted]) -> Vec<Vec<Range<u64>>> {
        let lent = |wanted: &Wanted| {
            let is_lent = self.cache.has_whole(wanted.content)
                && self.may_have(asker, *wanted).unwrap_or_else(|error| {
                    tracing::warn!(%error, "cannot find out who may have cached bytes");
                    false
                });
            if is_lent { vec![0..wanted.size] } else { vec![] }
        };
        contents.iter().map(lent).collect()
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
                let tree = self.tree(wanted, &file)?;
                tree.proof_with(range.clone(), read).map_err(unreadable)?
            }
        };
        if !verify(content, size, range, &bytes, &proof) {
            // Hashed once more for the next one, and found to be damaged.
            self.trees.forget(content);
            return Err(FetchError::Stale);
        }
        Ok(Fetched { bytes, proof })
    }

    fn may_have(&self, asker: DeviceId, wanted: Wanted) -> Result<bool, IndexError> {
        let view = self.index.view()?;
        for (no, file) in view.holders(wanted.content)?.into_iter().take(MAX_REASONS) {
            let Some(location) = self.index.location(no) else { continue };
            if !self.may_see(asker, &location)? {
                continue;
            }
            let entry = view.node(no, file)?.map(|node| node.entry);
            let has_it = |e: &crate::model::Entry| {
                e.content == Some(wanted.content) && e.attr.size == wanted.size
            };
            if entry.as_ref().is_some_and(has_it) {
                return Ok(true);
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

    /// The tree of a content, which is built if need be.
    fn tree(&self, wanted: Wanted, file: &File) -> Result<Arc<Manifest>, FetchError> {
        let until = Instant::now() + BUILD_PATIENCE;
        let mut state = lock(&self.trees.state);
        loop {
            if let Some(tree) = state.kept.get(&wanted.content) {
                return Ok(tree.clone());
            }
            if state.building.is_none() {
                let file = file.try_clone().map_err(unreadable)?;
                self.build(wanted, file).map_err(unreadable)?;
                state.building = Some(wanted.content);
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                return Err(FetchError::Unreachable);
            };
            let waited = self.trees.built.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if self.cache.whole_content(wanted.content, wanted.size).is_none() {
                return Err(FetchError::Refused);
            }
        }
    }

    /// Hashes a file on a thread of its own, which begins when the lock is given back.
    fn build(&self, wanted: Wanted, file: File) -> io::Result<()> {
        let (trees, cache) = (self.trees.clone(), self.cache.clone());
        let Wanted { content, size } = wanted;
        let work = move || {
            // Whatever ends this thread, also a panic, lets the next one be built.
            let ended = Ended(&trees);
            match Manifest::of_file(&file, size, &AtomicBool::new(false)) {
                Ok(Some((hashed, tree))) if hashed == content => trees.keep(tree),
                Ok(_) => {
                    tracing::warn!(%content, "a cached content is damaged and is dropped");
                    cache.file(Key::Content(content), size).discard();
                }
                Err(e) => tracing::warn!(%content, "a cached content could not be hashed: {e}"),
            }
            drop(ended);
        };
        std::thread::Builder::new().name("lent-tree".into()).spawn(work).map(drop)
    }
}

impl Trees {
    fn keep(&self, tree: Manifest) {
        let mut state = lock(&self.state);
        state.bytes += tree.memory_bytes();
        if let Some((_, old)) = state.kept.push(tree.content(), Arc::new(tree)) {
            state.bytes -= old.memory_bytes();
        }
        while state.bytes > TREES_BYTES && state.kept.len() > 1 {
            let Some((_, old)) = state.kept.pop_lru() else { break };
            state.bytes -= old.memory_bytes();
        }
    }

    fn forget(&self, content: ContentId) {
        let mut state = lock(&self.state);
        if let Some(old) = state.kept.pop(&content) {
            state.bytes -= old.memory_bytes();
        }
    }
}

/// The end of a building.
struct Ended<'a>(&'a Trees);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).building = None;
        self.0.built.notify_all();
    }
}

/// A file that ends early was cut beneath the cache.
fn unreadable(error: io::Error) -> FetchError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => FetchError::Stale,
        _ => FetchError::Failed(error.to_string()),
    }
}
