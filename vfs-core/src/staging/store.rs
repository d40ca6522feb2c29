//! All drafts: their files, and the space they take.

use super::draft::Draft;
use super::{DraftId, MEMORY_BYTES, MIN_FREE_BYTES, Snapshot};
use crate::error::{FsError, FsResult, Kind};
use crate::journal::{Horizon, Lsn};
use bytes::Bytes;
use lru::LruCache;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File};
use std::hash::BuildHasher;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

/// Files that are kept open; there may be many more drafts than a process may have files.
const OPEN_FILES: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");
/// The disk is asked how much is free after so many bytes at most.
const ASK_EVERY_BYTES: u64 = 8 << 20;
/// Unit of [`MetadataExt::blocks`].
const BLOCK_UNIT: u64 = 512;

/// All drafts of this device.
#[derive(Debug)]
pub struct Staging {
    store: Arc<Store>,
    drafts: Mutex<HashMap<DraftId, Weak<Draft>>>,
    /// Drafts to be removed once a record is durable.
    leaving: Mutex<VecDeque<(Lsn, DraftId)>>,
}

/// The directory of drafts.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    handle: File,
    open: Mutex<LruCache<DraftId, Arc<File>>>,
    min_free_bytes: AtomicU64,
    /// What may be written before the disk is asked again.
    granted_bytes: AtomicU64,
    used_bytes: AtomicU64,
    /// What drafts may still have in memory.
    free_memory_bytes: AtomicU64,
    horizon: OnceLock<Arc<Horizon>>,
}

impl Staging {
    /// Opens the drafts of a directory, which is made if need be.
    pub fn open(dir: &Path) -> FsResult<Arc<Self>> {
        let attempted = |e| FsError::os("open the staging directory", e);
        fs::create_dir_all(dir).map_err(attempted)?;
        let store = Store {
            dir: dir.to_owned(),
            handle: File::open(dir).map_err(attempted)?,
            open: Mutex::new(LruCache::new(OPEN_FILES)),
            min_free_bytes: MIN_FREE_BYTES.into(),
            granted_bytes: 0.into(),
            used_bytes: 0.into(),
            free_memory_bytes: MEMORY_BYTES.into(),
            horizon: OnceLock::new(),
        };
        let used = store.list().map_err(attempted)?.values().sum();
        store.used_bytes.store(used, Ordering::Relaxed);
        let (drafts, leaving) = Default::default();
        Ok(Arc::new(Self { store: Arc::new(store), drafts, leaving }))
    }

    /// From now on bytes are given up only when what the journal had at that moment is durable.
    /// After a crash it may otherwise end before the record that made them unneeded, with one
    /// that names them. Said once.
    pub fn follow(&self, horizon: Arc<Horizon>) {
        let _ = self.store.horizon.set(horizon);
    }

    /// Sets how much must stay free on the disk ([`MIN_FREE_BYTES`]); writes beyond fail with
    /// [`Kind::NoSpace`].
    pub fn set_min_free_bytes(&self, bytes: u64) {
        self.store.min_free_bytes.store(bytes, Ordering::Relaxed);
        self.store.granted_bytes.store(0, Ordering::Relaxed);
    }

    /// Sets how many bytes of drafts may be in memory ([`MEMORY_BYTES`]); before there are any.
    pub fn set_memory_bytes(&self, bytes: u64) {
        self.store.free_memory_bytes.store(bytes, Ordering::Relaxed);
    }

    /// A draft over a base of this size, all of which is kept.
    pub fn create(&self, base_size: u64) -> FsResult<Arc<Draft>> {
        if i64::try_from(base_size).is_err() {
            return Err(FsError::new(Kind::FileTooLarge, "stage a file"));
        }
        self.remove_leaving();
        let mut drafts = lock(&self.drafts);
        let id = loop {
            // Drawn, not counted: a journal may name drafts of which nothing is here any more.
            let id = DraftId(RandomState::new().hash_one(drafts.len()));
            if !drafts.contains_key(&id) {
                break id;
            }
        };
        let draft = Arc::new(Draft::new(self.store.clone(), id, base_size));
        drafts.insert(id, Arc::downgrade(&draft));
        Ok(draft)
    }

    /// A draft as it was committed. After a restart this is called for every snapshot that is
    /// still needed, those of one draft in the order of their commits: the last is its state, the
    /// earlier ones stay readable. An error of kind [`Kind::Io`] says that bytes are lost.
    pub fn restore(&self, snapshot: &Snapshot, fill: &[(u64, Bytes)]) -> FsResult<Arc<Draft>> {
        if !snapshot.is_valid() {
            return Err(FsError::new(Kind::Invalid, "restore a draft"));
        }
        let mut drafts = lock(&self.drafts);
        let there = drafts.get(&snapshot.draft).and_then(Weak::upgrade);
        let draft = match there {
            Some(draft) => draft,
            None => Arc::new(Draft::reopen(self.store.clone(), snapshot.draft)?),
        };
        draft.restore(snapshot, fill)?;
        drafts.insert(snapshot.draft, Arc::downgrade(&draft));
        Ok(draft)
    }

    /// Removes a draft and all its bytes.
    pub fn remove(&self, id: DraftId) {
        lock(&self.leaving).push_back((self.store.written(), id));
        self.remove_leaving();
    }

    fn remove_leaving(&self) {
        loop {
            let id = {
                let mut leaving = lock(&self.leaving);
                match leaving.front() {
                    Some((lsn, _)) if self.store.is_durable(*lsn) => {}
                    _ => return,
                }
                leaving.pop_front()
            };
            id.into_iter().for_each(|(_, id)| self.remove_now(id));
        }
    }

    fn remove_now(&self, id: DraftId) {
        let draft = lock(&self.drafts).remove(&id).and_then(|weak| weak.upgrade());
        match draft {
            Some(draft) => draft.remove(),
            None => drop(self.store.remove_file(id)),
        }
    }

    /// Removes the drafts that nobody needs, as a crash leaves them; gives their bytes.
    pub fn remove_all_but(&self, needed: &HashSet<DraftId>) -> FsResult<u64> {
        let found = self.store.list().map_err(|e| FsError::os("list the staged files", e))?;
        let mut removed = 0;
        for (id, bytes) in found.into_iter().filter(|(id, _)| !needed.contains(id)) {
            self.remove_now(id);
            removed += bytes;
        }
        Ok(removed)
    }

    /// Bytes on disk, and in memory.
    pub fn used_bytes(&self) -> u64 {
        self.remove_leaving();
        self.store.used_bytes.load(Ordering::Relaxed)
    }

    /// What drafts may still have in memory.
    #[cfg(test)]
    pub(super) fn free_memory_bytes(&self) -> u64 {
        self.store.free_memory_bytes.load(Ordering::Relaxed)
    }

    /// Every draft's file as a crash of the machine may find it.
    #[cfg(test)]
    pub(crate) fn on_disk(&self) -> Vec<super::OnDisk> {
        let drafts: Vec<_> = lock(&self.drafts).values().filter_map(Weak::upgrade).collect();
        drafts.iter().filter_map(|draft| draft.on_disk()).collect()
    }

    /// Makes every commit until now durable as far as the drafts have files: no fill given until
    /// now needs to be kept any more, but for what [`Draft::fill`] gives.
    pub fn sync(&self) -> FsResult<()> {
        let drafts: Vec<_> = lock(&self.drafts).values().filter_map(Weak::upgrade).collect();
        let ends: Vec<_> = drafts.iter().map(|draft| draft.committed_end()).collect();
        rustix::fs::syncfs(&self.store.handle)
            .map_err(|e| FsError::os("sync the staged files", e))?;
        for (draft, end) in drafts.iter().zip(ends) {
            end.into_iter().for_each(|end| draft.synced(end));
        }
        Ok(())
    }
}

impl Store {
    /// The journal's last record.
    pub(super) fn written(&self) -> Lsn {
        self.horizon.get().map_or(Lsn(0), |horizon| horizon.last())
    }

    /// Whether the journal is durable up to there.
    pub(super) fn is_durable(&self, lsn: Lsn) -> bool {
        self.horizon.get().is_none_or(|horizon| horizon.durable() >= lsn)
    }

    pub(super) fn path(&self, id: DraftId) -> PathBuf {
        let hex = format!("{:016x}", id.0);
        self.dir.join(&hex[..2]).join(hex)
    }

    /// The file of a draft that has one.
    pub(super) fn file(&self, id: DraftId) -> io::Result<Arc<File>> {
        if let Some(file) = lock(&self.open).get(&id) {
            return Ok(file.clone());
        }
        let file = File::options().read(true).write(true).open(self.path(id))?;
        Ok(self.keep_open(id, file))
    }

    /// A new, empty file for a draft.
    pub(super) fn make_file(&self, id: DraftId) -> io::Result<Arc<File>> {
        let path = self.path(id);
        let make =
            || File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = match (make(), path.parent()) {
            (Err(e), Some(parent)) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(parent)?;
                make()
            }
            (made, _) => made,
        };
        Ok(self.keep_open(id, file?))
    }

    fn keep_open(&self, id: DraftId, file: File) -> Arc<File> {
        let file = Arc::new(file);
        lock(&self.open).push(id, file.clone());
        file
    }

    /// Removes the file of a draft, and tells that its bytes are gone.
    pub(super) fn remove_file(&self, id: DraftId) -> io::Result<()> {
        lock(&self.open).pop(&id);
        let path = self.path(id);
        let bytes = fs::metadata(&path).map(|m| m.blocks() * BLOCK_UNIT)?;
        fs::remove_file(path)?;
        self.account(bytes, 0);
        Ok(())
    }

    /// Forgets the open file of a draft that was removed.
    pub(super) fn unlink(&self, id: DraftId) {
        lock(&self.open).pop(&id);
        // A file that was never made needs no removal; one that stays is an orphan for the
        // next start.
        let _ = fs::remove_file(self.path(id));
    }

    /// Makes the name of a draft's file durable.
    pub(super) fn sync_name(&self, id: DraftId) -> io::Result<()> {
        if let Some(parent) = self.path(id).parent() {
            File::open(parent)?.sync_all()?;
        }
        self.handle.sync_all()
    }

    /// Says that so many more bytes are about to be written.
    pub(super) fn claim(&self, bytes: u64) -> FsResult<()> {
        let taken = |granted: u64| granted.checked_sub(bytes);
        let order = Ordering::Relaxed;
        if self.granted_bytes.fetch_update(order, order, taken).is_ok() {
            return Ok(());
        }
        let disk = rustix::fs::fstatvfs(&self.handle)
            .map_err(|e| FsError::os("ask for the free space of the staging disk", e))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let usable = free.saturating_sub(self.min_free_bytes.load(order));
        let Some(rest) = usable.checked_sub(bytes) else {
            return Err(FsError::new(Kind::NoSpace, "stage a write"));
        };
        // Others may write to the disk too, so only a part of what is free is granted.
        self.granted_bytes.store((rest / 16).min(ASK_EVERY_BYTES), order);
        Ok(())
    }

    /// Takes so many bytes of what drafts may have in memory; whether there were as many.
    pub(super) fn claim_memory(&self, bytes: u64) -> bool {
        let (free, order) = (&self.free_memory_bytes, Ordering::Relaxed);
        free.fetch_update(order, order, |free| free.checked_sub(bytes)).is_ok()
    }

    /// Bytes that are in memory no more.
    pub(super) fn give_back_memory(&self, bytes: u64) {
        self.free_memory_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Tells that a draft takes another number of bytes.
    pub(super) fn account(&self, before: u64, after: u64) {
        let change = |used: u64| Some(used.saturating_add(after).saturating_sub(before));
        let order = Ordering::Relaxed;
        let _ = self.used_bytes.fetch_update(order, order, change);
    }

    /// Every draft's file, and its bytes on disk.
    fn list(&self) -> io::Result<HashMap<DraftId, u64>> {
        let mut found = HashMap::new();
        for directory in fs::read_dir(&self.dir)? {
            let directory = directory?;
            if !directory.file_type()?.is_dir() {
                continue;
            }
            for file in fs::read_dir(directory.path())? {
                let file = file?;
                let name = file.file_name();
                let name = name.to_str().filter(|name| name.len() == 16);
                let id = name.and_then(|name| u64::from_str_radix(name, 16).ok());
                if let Some(id) = id {
                    found.insert(DraftId(id), file.metadata()?.blocks() * BLOCK_UNIT);
                }
            }
        }
        Ok(found)
    }
}

/// Bytes on disk of a file.
pub(super) fn bytes_on_disk(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * BLOCK_UNIT)
}

/// A panic elsewhere leaves these small states as they were: it is sound to go on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
