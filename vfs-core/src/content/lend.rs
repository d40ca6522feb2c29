//! What this device's cache lends to other members.
//!
//! A content that was read here lies in the cache, whole and verified. A member that cannot
//! reach its owner, or reads much of it, may have it from here. Nothing is announced: a member
//! asks for a content id when it needs it.
//!
//! **Who may have it.** A content id is no permission. A content is lent to a member only if
//! somebody else than that member has a file with these bytes in a location that the member may
//! see: one of this device's own that is shared with it, or one of which this device keeps a
//! statement with the owner's signature that names the member (or all members), and knows of no
//! newer one that does not ([`Index::may_be_shown`]). What the asker says of its own locations does
//! not count, or it could claim any id it heard of. "Not here" and "not for you" are one answer.
//!
//! **What proves it.** The cache keeps no hash trees: that of a content is built when it is first
//! asked for (`trees`). What is lent is checked against the content id first: a disk that
//! lies must not make a liar of this device.

use super::answer::{check_range, prove, read};
use super::cache::{Cache, Key};
use super::manifest::{GROUP_BYTES, verify};
use super::manifests::Manifests;
use super::trees::Trees;
use crate::index::{Index, IndexError};
use crate::model::{DeviceId, Location, LocationNo};
use crate::source::{FetchError, Fetched, Lent, Wanted};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// How many files with the same bytes are looked at for one that the asker may read.
const MAX_REASONS: usize = 256;

/// Lends ranges of whole cached contents. Its calls block on the disk.
pub struct Lender {
    index: Index,
    cache: Arc<Cache>,
    trees: Arc<Trees>,
}

impl Lender {
    /// Of this cache, to those whom the index lets have it. `trees` are the lender's own.
    pub fn new(index: Index, cache: Arc<Cache>, trees: Manifests) -> Self {
        let trees = Arc::new(Trees::new(trees, cache.clone()));
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
        let is_ready = wanted.size <= GROUP_BYTES || self.trees.has(wanted.content);
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
        check_range(&range, size)?;
        if !self.may_have(asker, wanted).map_err(|e| FetchError::Failed(e.to_string()))? {
            return Err(FetchError::Refused);
        }
        // The same answer as to those who may not have it.
        let file = self.cache.whole_content(content, size).ok_or(FetchError::Refused)?;
        let bytes = read(&file, range.clone())?;
        let proof = match range == (0..size) {
            true => Vec::new(),
            false => prove(&*self.trees.get(asker, wanted, &file)?, &file, range.clone())?,
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
            if entry.is_some_and(|entry| entry.has(wanted.content, wanted.size)) {
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
            return Ok(location.is_shared_with(asker));
        }
        self.index.may_be_shown(location, asker)
    }
}
