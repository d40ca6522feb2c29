//! This device's own files, as ranges of a version: for peers, and for its own reader.
//!
//! Owns no state but the trees being rebuilt. Nothing is believed about a
//! request: the location must be this device's and shared with the asker, the
//! range bounded and on group borders, and the file must be the version asked
//! for before *and* after its bytes were read, so that no answer mixes two; or
//! the bytes are checked against the content id that was asked for, and the file
//! may have changed, grown for example.

use super::answer::{check_range, prove, read, unreadable};
use super::manifest::{ChainingValue, GROUP_BYTES, Manifest, verify};
use super::manifests::Manifests;
use crate::error::{FsError, FsResult, Kind};
use crate::index::{Index, IndexError, Node};
use crate::indexer::Indexer;
use crate::local::{Root, stamp_of};
use crate::model::{
    ContentId, DeviceId, FileId, FileType, Location, LocationId, LocationNo, Name, Stamp,
};
use crate::source::{FetchError, Fetched, Version};
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

/// A missing tree of a file up to this size is rebuilt while its asker waits; of a larger one
/// in the background.
const REBUILD_AT_ONCE_BYTES: u64 = 64 << 20;

type Roots = Box<dyn Fn(LocationNo) -> FsResult<Arc<Root>> + Send + Sync>;

/// Serves ranges of this device's own files. Its calls block on the disk.
pub struct OwnFiles {
    index: Index,
    roots: Roots,
    manifests: Arc<Manifests>,
    rebuilding: Arc<Mutex<HashSet<ContentId>>>,
    /// How often a whole file was hashed while its asker waited.
    #[cfg(test)]
    pub(super) rebuilt: std::sync::atomic::AtomicUsize,
}

/// A file opened at the version that was asked for.
struct Opened {
    file: File,
    /// What it is now, to be compared after reading.
    stamp: Stamp,
    /// The index says that the file has, or lately had, the content id asked for, and its size.
    /// Anyone may ask for any id, and only for such a one is a whole file hashed.
    content_is_claimed: bool,
    /// The same of these very bytes, as long as the stamp stays.
    content_is_known: bool,
}

impl OwnFiles {
    /// Of the locations that the indexer watches.
    pub fn new(index: Index, indexer: Arc<Indexer>, manifests: Arc<Manifests>) -> Self {
        Self::with_roots(index, Box::new(move |no| indexer.root(no)), manifests)
    }

    pub(super) fn with_roots(index: Index, roots: Roots, manifests: Arc<Manifests>) -> Self {
        Self {
            index,
            roots,
            manifests,
            rebuilding: Arc::default(),
            #[cfg(test)]
            rebuilt: Default::default(),
        }
    }

    /// The bytes of a range of a version, with what proves them when its content id was asked for.
    pub fn read(
        &self,
        asker: DeviceId,
        version: &Version,
        range: Range<u64>,
    ) -> Result<Fetched, FetchError> {
        let size = version.stamp.size;
        check_range(&range, size)?;
        let location = self.location_for(asker, version.location)?;
        let opened = self.open(&location, version)?;
        let bytes = read(&opened.file, range.clone())?;
        let proof = match version.content {
            None => Vec::new(),
            Some(content) => self.proof(&opened, content, size, &range)?,
        };
        let is_right = match version.content {
            // Known to be right, unless the disk itself lies, which the asker will see.
            Some(_) if opened.content_is_known && is_unchanged(&opened)? => true,
            Some(content) => verify(content, size, range, &bytes, &proof),
            None => is_unchanged(&opened)?,
        };
        is_right.then_some(Fetched { bytes, proof }).ok_or(FetchError::Stale)
    }

    /// A file as it is now, to set locks on; `writes` as far as this device and the sharing of
    /// the location allow it, else for reading.
    pub(crate) fn open_to_lock(
        &self,
        asker: DeviceId,
        (location, file): (LocationId, FileId),
        writes: bool,
    ) -> Result<File, FetchError> {
        let location = self.location_for(asker, location)?;
        let (_, path) = self.find(location.no, file)?;
        let root = (self.roots)(location.no).map_err(|_| FetchError::NotNow)?;
        let gone = |e: FsError| match e.kind() {
            Kind::NotFound | Kind::NotADirectory | Kind::IsADirectory | Kind::Loop => {
                FetchError::Stale
            }
            _ => failed(e),
        };
        match writes && !location.read_only {
            true => root.open_for_writing(&path).or_else(|_| root.open_for_reading(&path)),
            false => root.open_for_reading(&path),
        }
        .map_err(gone)
    }

    fn location_for(
        &self,
        asker: DeviceId,
        location: LocationId,
    ) -> Result<Arc<Location>, FetchError> {
        let location = self.index.location_by_id(location).ok_or(FetchError::Refused)?;
        let own = location.owner == self.index.me();
        let may_read = own && (location.is_shared_with(asker) || asker == location.owner);
        may_read.then_some(location).ok_or(FetchError::Refused)
    }

    fn open(&self, location: &Location, version: &Version) -> Result<Opened, FetchError> {
        let (node, path) = self.find(location.no, version.file)?;
        let root = (self.roots)(location.no).map_err(|e| match e.kind() {
            // An unplugged disk: its device cannot give the bytes now, but may later.
            Kind::NotFound => FetchError::NotNow,
            _ => failed(e),
        })?;
        let file = root.open_for_reading(&path).map_err(|e| match e.kind() {
            Kind::NotFound | Kind::NotADirectory | Kind::IsADirectory | Kind::Loop => {
                FetchError::Stale
            }
            _ => failed(e),
        })?;
        let stamp = stamp_of(&file).map_err(failed)?;
        let is_indexed = node.entry.stamp() == stamp;
        let content_is_claimed =
            version.content.is_some_and(|content| node.entry.has(content, version.stamp.size));
        let content_is_known = is_indexed && content_is_claimed;
        // Another stamp may still have the same bytes (a chmod, a touch), or begin with them (a log
        // that grows): then the index says so already, or the proof will show it.
        let may_serve =
            stamp == version.stamp || stamp.size >= version.stamp.size && version.content.is_some();
        let opened = Opened { file, stamp, content_is_claimed, content_is_known };
        may_serve.then_some(opened).ok_or(FetchError::Stale)
    }

    fn find(&self, no: LocationNo, file: FileId) -> Result<(Node, Vec<Name>), FetchError> {
        let lookup = || -> Result<_, IndexError> {
            let view = self.index.view()?;
            Ok(view.node(no, file)?.zip(view.path(no, file)?))
        };
        let found = lookup().map_err(|e| FetchError::Failed(e.to_string()))?;
        let (node, path) = found.ok_or(FetchError::Stale)?;
        let is_file = node.entry.attr.file_type == FileType::File;
        is_file.then_some((node, path)).ok_or(FetchError::Stale)
    }

    fn proof(
        &self,
        opened: &Opened,
        content: ContentId,
        size: u64,
        range: &Range<u64>,
    ) -> Result<Vec<ChainingValue>, FetchError> {
        if size <= GROUP_BYTES {
            return Ok(Vec::new());
        }
        prove(&*self.manifest(opened, content, size)?, &opened.file, range.clone())
    }

    fn manifest(
        &self,
        opened: &Opened,
        content: ContentId,
        size: u64,
    ) -> Result<Arc<Manifest>, FetchError> {
        match self.manifests.get(content) {
            Some(manifest) if manifest.size() == size => Ok(manifest),
            Some(_) => Err(FetchError::Stale),
            None if opened.content_is_claimed && size <= REBUILD_AT_ONCE_BYTES => {
                self.rebuild(&opened.file, size, content)
            }
            // Not only claimed: it would be hashed in vain each time.
            None if opened.content_is_known => Err(self.rebuild_later(opened, content)),
            None => Err(FetchError::Stale),
        }
    }

    fn rebuild(
        &self,
        file: &File,
        size: u64,
        content: ContentId,
    ) -> Result<Arc<Manifest>, FetchError> {
        let never = AtomicBool::new(false);
        #[cfg(test)]
        self.rebuilt.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let rebuilt = Manifest::of_file(file, size, &never).map_err(unreadable)?;
        let (hashed, manifest) = rebuilt.ok_or(FetchError::Stale)?;
        if hashed != content {
            return Err(FetchError::Stale);
        }
        if let Err(e) = self.manifests.put(&manifest) {
            tracing::warn!(%content, "a hash tree could not be stored: {e}");
        }
        Ok(Arc::new(manifest))
    }

    fn rebuild_later(&self, opened: &Opened, content: ContentId) -> FetchError {
        let answer = FetchError::Failed("its hash tree is being rebuilt".into());
        let file = match opened.file.try_clone() {
            Ok(file) => file,
            Err(e) => return unreadable(e),
        };
        {
            let mut rebuilding = self.rebuilding.lock().unwrap_or_else(PoisonError::into_inner);
            // One at a time: more would only fight for the disk.
            if !rebuilding.is_empty() || !rebuilding.insert(content) {
                return answer;
            }
        }
        let (rebuilding, manifests) = (self.rebuilding.clone(), self.manifests.clone());
        let size = opened.stamp.size;
        let spawned = std::thread::Builder::new().name("rebuild-tree".into()).spawn(move || {
            let rebuilt = Manifest::of_file(&file, size, &AtomicBool::new(false));
            let stored = rebuilt.and_then(|rebuilt| match rebuilt {
                Some((hashed, manifest)) if hashed == content => manifests.put(&manifest),
                _ => Ok(()),
            });
            if let Err(e) = stored {
                tracing::warn!(%content, "a hash tree could not be rebuilt: {e}");
            }
            rebuilding.lock().unwrap_or_else(PoisonError::into_inner).remove(&content);
        });
        if spawned.is_err() {
            self.rebuilding.lock().unwrap_or_else(PoisonError::into_inner).remove(&content);
        }
        answer
    }
}

/// Whether the file has the stamp with which it was opened.
fn is_unchanged(opened: &Opened) -> Result<bool, FetchError> {
    Ok(stamp_of(&opened.file).map_err(failed)? == opened.stamp)
}

fn failed(error: FsError) -> FetchError {
    FetchError::Failed(error.to_string())
}
