//! The content cache: bytes of other devices' files, on this device's disk.
//!
//! Owns its directory:
//!
//! | name | what it is |
//! |---|---|
//! | `content/ab/<hex>` | a whole content, every group of it verified |
//! | `content/ab/<hex>.part`, `.map` | a sparse file, and which groups of it are here |
//! | `stamped/ab/<hex>`… | the same for versions without a content id |
//! | `suspect-<n>/` | whole contents from before a crash of the machine |
//! | `tmp/` | half written, or being removed; cleared at start |
//! | `boot` | the kernel's boot id, and whether the cache was closed in order |
//!
//! | module | what it is |
//! |---|---|
//! | `file` | one file: read, written, completed |
//! | `map` | the form of a `.map` |
//! | `scan`, `boot` | what is there at the start, and whether it is believed |
//! | `audit` | whether the files are what their ids say, for whoever doubts it |
//!
//! **What a crash may cost.** A killed daemon loses map entries not yet written,
//! never believes a group that is not there: a map is written after the data is
//! on disk (`fdatasync`), and the kernel outlives the daemon. A crashed machine
//! may lose or mangle whatever was not synced, and most is not, for speed. So when
//! the boot id is another one and the cache was not closed in order, maps are
//! dropped and whole contents become suspect: each is hashed before its first use.
//!
//! **The disk may fail.** A cache is never needed for a read to succeed: an error
//! makes the read bypass the cache and is kept for the status ([`CacheStats`]).
//!
//! **Locks**, in this order: [`CachedFile`]'s `changing`, its `inner`, the cache's
//! `state`. None but `changing` is held during I/O on data, and only writers of one
//! file take that one.

mod audit;
#[cfg(test)]
mod audit_tests;
mod boot;
mod file;
mod map;
mod scan;
#[cfg(test)]
mod tests;

pub use audit::{Audited, Hear, Thorough};
pub use file::CachedFile;

use super::disk;
use crate::model::ContentId;
use crate::source::Version;
use boot::Boot;
use lru::LruCache;
use scan::{Found, scan_directory, subdirectories};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// After this many new bytes the map of an open file is written, so that a killed daemon
/// fetches no more than this again.
const SAVE_EVERY_BYTES: u64 = 64 << 20;

/// What the cache calls a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    /// By the hash of its bytes.
    Content(ContentId),
    /// A version not hashed yet: by the hash of location, file and stamp.
    Stamped([u8; 32]),
}

impl Key {
    /// The key of a version.
    pub fn of(version: &Version) -> Self {
        version.content.map_or_else(|| Self::stamped(version), Self::Content)
    }

    /// The key of a version as it is before it is hashed.
    pub fn stamped(version: &Version) -> Self {
        let stamp = &version.stamp;
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"sd version 1");
        hasher.update(&version.location.0);
        for number in [version.file.0, stamp.disk_ino, stamp.size] {
            hasher.update(&number.to_le_bytes());
        }
        for time in [stamp.mtime, stamp.ctime] {
            hasher.update(&time.secs.to_le_bytes()).update(&time.nanos.to_le_bytes());
        }
        Self::Stamped(*hasher.finalize().as_bytes())
    }

    fn path(&self, dir: &Path) -> PathBuf {
        let (class, hex) = match self {
            Self::Content(id) => ("content", id.to_string()),
            Self::Stamped(id) => ("stamped", ContentId(*id).to_string()),
        };
        dir.join(class).join(&hex[..2]).join(hex)
    }
}

/// Figures of the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Bytes kept now.
    pub bytes: u64,
    /// The most it may keep.
    pub limit_bytes: u64,
    /// Files of which it keeps bytes.
    pub files: u64,
    /// Bytes delivered from it since start.
    pub hits_bytes: u64,
    /// Bytes fetched for it since start, kept or not.
    pub fetched_bytes: u64,
    /// Bytes evicted since start.
    pub evicted_bytes: u64,
    /// The last error of its disk, until a write succeeds again: reads bypass the cache.
    pub problem: Option<String>,
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    state: Mutex<State>,
    limit_bytes: AtomicU64,
    hits_bytes: AtomicU64,
    fetched_bytes: AtomicU64,
    evicted_bytes: AtomicU64,
    next_temporary: AtomicU64,
    problem: Mutex<Option<String>>,
}

#[derive(Debug)]
struct State {
    /// Least recently opened last.
    rows: LruCache<Key, Row>,
    open: HashMap<Key, Weak<CachedFile>>,
    /// Of all rows, and of files being removed.
    bytes: u64,
    /// Nothing is added any more, because the directory is marked as closed in order.
    closed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Row {
    bytes: u64,
    form: Form,
}

/// How a file lies on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Part,
    Whole,
    /// In `suspect-<n>`.
    Suspect(u32),
}

impl Cache {
    /// Opens the cache in `dir`, which is made if need be. A directory that cannot be used
    /// gives a cache that keeps nothing and says why in [`Cache::stats`].
    pub fn open(dir: &Path, limit_bytes: u64) -> Self {
        let cache = Self {
            dir: dir.to_owned(),
            state: Mutex::new(State {
                rows: LruCache::unbounded(),
                open: HashMap::new(),
                bytes: 0,
                closed: false,
            }),
            limit_bytes: limit_bytes.into(),
            hits_bytes: 0.into(),
            fetched_bytes: 0.into(),
            evicted_bytes: 0.into(),
            next_temporary: 0.into(),
            problem: Mutex::new(None),
        };
        if let Err(e) = cache.start() {
            cache.report("opening the cache", &e);
            // Without the boot mark nothing written from now on could be judged later.
            cache.lock().closed = true;
        }
        cache.evict_down_to(limit_bytes);
        cache
    }

    fn start(&self) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        match fs::remove_dir_all(self.dir.join("tmp")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => fs::create_dir(self.dir.join("tmp"))?,
        }
        if !Boot::read(&self.dir).is_trustworthy() {
            self.distrust_everything()?;
        }
        self.mark(Boot::Running)?;
        let mut found = self.scan()?;
        found.sort_unstable_by_key(|f| f.used);
        let mut state = self.lock();
        for Found { key, row, .. } in found {
            if let Some((_, old)) = state.rows.push(key, row) {
                state.bytes -= old.bytes;
            }
            state.bytes += row.bytes;
        }
        Ok(())
    }

    /// Files from before a crash of the machine: whole contents are put aside until checked.
    /// Before the boot mark is renewed, so that a crash in here repeats it.
    fn distrust_everything(&self) -> io::Result<()> {
        let suspect = (1..).map(|n| self.dir.join(suspect_name(n))).find(|path| !path.exists());
        let moved = suspect.map_or(Ok(()), |path| fs::rename(self.dir.join("content"), path));
        let removed = fs::remove_dir_all(self.dir.join("stamped"));
        match moved.and(removed) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    fn scan(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for class in subdirectories(&self.dir)? {
            let Some(class_name) = class.file_name().and_then(|n| n.to_str()) else { continue };
            let form = match class_name {
                "content" | "stamped" => Form::Whole,
                other => match other.strip_prefix("suspect-").map(str::parse) {
                    Some(Ok(n)) => Form::Suspect(n),
                    _ => continue,
                },
            };
            let key = |id: ContentId| match class_name {
                "stamped" => Key::Stamped(id.0),
                _ => Key::Content(id),
            };
            for directory in subdirectories(&class)? {
                scan_directory(&directory, form, &key, &mut found)?;
            }
        }
        Ok(found)
    }

    /// The file of a version; does no I/O. Two openers of one key share it.
    pub fn file(self: &Arc<Self>, key: Key, size: u64) -> Arc<CachedFile> {
        // Declared first, to be dropped after the lock that its own drop takes.
        let open;
        let mut state = self.lock();
        open = state.open.get(&key).and_then(Weak::upgrade);
        let form = state.rows.get(&key).map(|row| row.form);
        match &open {
            Some(open) if open.size() == size => return open.clone(),
            // One content has one size: of two that claim it, the second keeps to itself.
            Some(_) => return Arc::new(CachedFile::new(self.clone(), key, size, None, true)),
            None => {}
        }
        let file = Arc::new(CachedFile::new(self.clone(), key, size, form, false));
        state.open.insert(key, Arc::downgrade(&file));
        file
    }

    /// How many bytes of a version are here; does no I/O, so that it is an estimate for
    /// a part that was not opened since start.
    pub fn cached_bytes(&self, version: &Version) -> u64 {
        let state = self.lock();
        let row = state.rows.peek(&Key::of(version));
        let row = row.or_else(|| state.rows.peek(&Key::stamped(version)));
        row.map_or(0, |row| row.bytes.min(version.stamp.size))
    }

    /// Whether anything of this key is here.
    pub(super) fn knows(&self, key: Key) -> bool {
        self.lock().rows.contains(&key)
    }

    /// Figures for the status.
    pub fn stats(&self) -> CacheStats {
        let (bytes, files) = {
            let state = self.lock();
            (state.bytes, state.rows.len() as u64)
        };
        CacheStats {
            bytes,
            files,
            limit_bytes: self.limit_bytes.load(Ordering::Relaxed),
            hits_bytes: self.hits_bytes.load(Ordering::Relaxed),
            fetched_bytes: self.fetched_bytes.load(Ordering::Relaxed),
            evicted_bytes: self.evicted_bytes.load(Ordering::Relaxed),
            problem: self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The most it may keep.
    pub(super) fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// Whether its disk took what it was given last.
    pub(super) fn works(&self) -> bool {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    pub(super) fn count_hit(&self, bytes: usize) {
        self.hits_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn count_fetched(&self, bytes: usize) {
        self.fetched_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Changes the limit and evicts what is above it.
    pub fn set_limit(&self, limit_bytes: u64) {
        self.limit_bytes.store(limit_bytes, Ordering::Relaxed);
        self.evict_down_to(limit_bytes);
    }

    /// Removes every file that is not open; gives the number of bytes freed.
    pub fn clear(&self) -> u64 {
        self.evict_down_to(0)
    }

    /// Closes in order: everything is written to the disk, so that after the next start,
    /// even of the machine, nothing needs a check. Nothing is kept after this.
    pub fn close(&self) {
        let open: Vec<_> = {
            let mut state = self.lock();
            if std::mem::replace(&mut state.closed, true) {
                return;
            }
            state.open.values().filter_map(Weak::upgrade).collect()
        };
        for file in open {
            // Waits for a write that was admitted before `closed`.
            drop(file.changing());
            file.save();
        }
        let synced = File::open(&self.dir).and_then(|dir| Ok(rustix::fs::syncfs(&dir)?));
        if let Err(e) = synced.and_then(|()| self.mark(Boot::Closed)) {
            self.report("closing the cache", &e);
        }
    }

    fn mark(&self, boot: Boot) -> io::Result<()> {
        disk::replace(&self.temporary(), &self.dir.join("boot"), boot.text().as_bytes())
    }

    /// Makes room for `bytes` more of a key and takes it; `false`: the read shall bypass.
    fn reserve(&self, key: Key, bytes: u64) -> bool {
        let limit = self.limit_bytes.load(Ordering::Relaxed);
        loop {
            let mut state = self.lock();
            if state.closed {
                return false;
            }
            if state.bytes + bytes <= limit {
                state.add(key, bytes);
                return true;
            }
            if bytes > limit || !self.evict_one(state) {
                return false;
            }
        }
    }

    fn evict_down_to(&self, limit_bytes: u64) -> u64 {
        let before = self.evicted_bytes.load(Ordering::Relaxed);
        loop {
            let state = self.lock();
            if state.bytes <= limit_bytes || !self.evict_one(state) {
                return self.evicted_bytes.load(Ordering::Relaxed) - before;
            }
        }
    }

    /// Removes the file not opened for the longest time; `false` when all are open.
    ///
    /// The names go under the lock, so that a new opener starts afresh; the space is freed
    /// after it, and only then counted as free.
    fn evict_one(&self, mut state: MutexGuard<'_, State>) -> bool {
        let oldest = state.rows.iter().rev().find(|(key, _)| !state.open.contains_key(key));
        let Some((&key, &row)) = oldest else { return false };
        state.rows.pop(&key);
        let removed: Vec<_> =
            self.names(key, row.form).map(|name| (self.temporary(), name)).collect();
        for (temporary, name) in &removed {
            // A name that is not there needs no removal.
            let _ = fs::rename(name, temporary);
        }
        drop(state);
        for (temporary, _) in &removed {
            let _ = fs::remove_file(temporary);
        }
        self.lock().bytes -= row.bytes;
        self.evicted_bytes.fetch_add(row.bytes, Ordering::Relaxed);
        true
    }

    /// Every name a file has on disk in this form.
    fn names(&self, key: Key, form: Form) -> impl Iterator<Item = PathBuf> {
        let names = match form {
            Form::Whole => vec![key.path(&self.dir)],
            Form::Part => vec![self.map_path(key), self.part_path(key)],
            Form::Suspect(n) => vec![self.suspect_path(key, n)],
        };
        names.into_iter()
    }

    fn part_path(&self, key: Key) -> PathBuf {
        key.path(&self.dir).with_extension("part")
    }

    fn map_path(&self, key: Key) -> PathBuf {
        key.path(&self.dir).with_extension("map")
    }

    fn suspect_path(&self, key: Key, n: u32) -> PathBuf {
        let path = key.path(&self.dir);
        let below = path.strip_prefix(self.dir.join("content")).unwrap_or(&path);
        self.dir.join(suspect_name(n)).join(below)
    }

    fn temporary(&self) -> PathBuf {
        let n = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.dir.join("tmp").join(n.to_string())
    }

    /// Forgets a file and removes its names: it is damaged, or another's.
    fn drop_file(&self, key: Key, form: Form) {
        for name in self.names(key, form) {
            let _ = fs::remove_file(name);
        }
        let mut state = self.lock();
        if let Some(row) = state.rows.pop(&key) {
            state.bytes -= row.bytes;
        }
    }

    fn report(&self, attempted: &str, error: &io::Error) {
        let text = format!("{attempted}: {error}");
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.as_ref() != Some(&text) {
            tracing::warn!(dir = %self.dir.display(), "{text}; reads bypass the cache");
            *problem = Some(text);
        }
    }

    fn report_success(&self) {
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        if problem.take().is_some() {
            tracing::info!(dir = %self.dir.display(), "the cache works again");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, key: Key, bytes: u64) {
        self.bytes += bytes;
        self.rows.get_or_insert_mut(key, || Row { bytes: 0, form: Form::Part }).bytes += bytes;
    }

    fn give_back(&mut self, key: Key, bytes: u64) {
        // The row may have been dropped meanwhile, with all its bytes.
        if let Some(row) = self.rows.peek_mut(&key) {
            let bytes = bytes.min(row.bytes);
            row.bytes -= bytes;
            self.bytes -= bytes;
        }
    }

    fn set_form(&mut self, key: Key, form: Form) {
        if let Some(row) = self.rows.peek_mut(&key) {
            row.form = form;
        }
    }
}

fn suspect_name(n: u32) -> String {
    format!("suspect-{n}")
}

/// What bytes take on a disk of 4 KiB blocks.
fn kept_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096)
}
