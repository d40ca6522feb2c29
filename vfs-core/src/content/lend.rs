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
use crate::model::{DeviceId, LocationNo};
use crate::source::{FetchError, Fetched, Lent, Wanted};
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
        let visible = match self.visible_to(asker) {
            Ok(visible) => visible,
            Err(error) => {
                tracing::warn!(%error, "cannot find out who may have cached bytes");
                return vec![Lent::default(); contents.len()];
            }
        };
        contents.iter().map(|wanted| self.lent(&visible, *wanted)).collect()
    }

    /// How long it takes must not tell who may not have a content whether it is here: that is
    /// looked at last.
    fn lent(&self, visible: &[LocationNo], wanted: Wanted) -> Lent {
        let is_there = self.is_in(visible, wanted).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot find out who may have cached bytes");
            false
        });
        if !is_there || !self.cache.has_whole(wanted.content) {
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
        let may_have = self.visible_to(asker).and_then(|visible| self.is_in(&visible, wanted));
        if !may_have.map_err(|e| FetchError::Failed(e.to_string()))? {
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

    /// Locations of other devices than the asker that are shared with it.
    fn visible_to(&self, asker: DeviceId) -> Result<Vec<LocationNo>, IndexError> {
        let others = self.index.locations().into_iter().filter(|l| l.owner != asker);
        let shown = others.map(|l| Ok(self.index.may_be_shown(&l, asker)?.then_some(l.no)));
        shown.filter_map(Result::transpose).collect()
    }

    /// Whether a file in one of these locations has these bytes. What is in others is not looked
    /// at, and takes no time.
    fn is_in(&self, visible: &[LocationNo], wanted: Wanted) -> Result<bool, IndexError> {
        let view = self.index.view()?;
        let mut looked_at = 0;
        for no in visible {
            for file in view.holders_in(*no, wanted.content)? {
                let node = view.node(*no, file)?;
                if node.is_some_and(|node| node.entry.has(wanted.content, wanted.size)) {
                    return Ok(true);
                }
                looked_at += 1;
                if looked_at == MAX_REASONS {
                    return Ok(false);
                }
            }
        }
        Ok(false)
    }
}
