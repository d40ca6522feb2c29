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

use super::disk;
use super::manifest::{GROUP_BYTES, Manifest, groups_of};
use super::ranges::RangeSet;
use crate::model::ContentId;
use crate::source::{MAX_FETCH_BYTES, Version};
use bytes::Bytes;
use lru::LruCache;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::SystemTime;

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
            Some(open) if open.size == size => return open.clone(),
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

/// A file found at start.
struct Found {
    key: Key,
    row: Row,
    used: SystemTime,
}

fn scan_directory(
    directory: &Path,
    form: Form,
    key: &dyn Fn(ContentId) -> Key,
    found: &mut Vec<Found>,
) -> io::Result<()> {
    for file in fs::read_dir(directory)? {
        let file = file?;
        let name = file.file_name();
        let name = name.to_str().unwrap_or_default();
        let metadata = file.metadata()?;
        let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
        let form = match (extension, form) {
            ("", form) => form,
            // Its map is looked for when it is opened.
            ("part", Form::Whole) => Form::Part,
            ("map", Form::Whole) if file.path().with_extension("part").exists() => continue,
            _ => {
                fs::remove_file(file.path())?;
                continue;
            }
        };
        let Some(id) = ContentId::from_hex(stem) else { continue };
        let bytes = match form {
            Form::Part => metadata.blocks() * 512,
            _ => kept_bytes(metadata.len()),
        };
        found.push(Found { key: key(id), row: Row { bytes, form }, used: metadata.modified()? });
    }
    Ok(())
}

fn subdirectories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

fn suspect_name(n: u32) -> String {
    format!("suspect-{n}")
}

/// What bytes take on a disk of 4 KiB blocks.
fn kept_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096)
}

/// The `boot` file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Boot {
    /// Closed in order, everything synced.
    Closed,
    /// In use by, or killed under, the kernel that runs now.
    Running,
    /// In use when the machine crashed; or never.
    Crashed,
}

impl Boot {
    fn read(dir: &Path) -> Self {
        let text = fs::read_to_string(dir.join("boot")).unwrap_or_default();
        match text {
            text if text == Self::Closed.text() => Self::Closed,
            text if boot_id().is_some() && text == Self::Running.text() => Self::Running,
            _ => Self::Crashed,
        }
    }

    fn is_trustworthy(self) -> bool {
        self != Self::Crashed
    }

    fn text(self) -> String {
        match self {
            Self::Running => format!("1\n{}\n", boot_id().unwrap_or_default()),
            Self::Closed | Self::Crashed => "1\nclosed\n".into(),
        }
    }
}

fn boot_id() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// One open file of the cache, shared by its readers.
///
/// Present groups are read by any thread without waiting; blocking calls are
/// [`write`](Self::write), [`check`](Self::check), [`save`](Self::save) and
/// [`promote`](Self::promote).
#[derive(Debug)]
pub struct CachedFile {
    cache: Arc<Cache>,
    key: Key,
    size: u64,
    form: Option<Form>,
    /// Not the one that others share: keeps nothing.
    alone: bool,
    loaded: OnceLock<()>,
    inner: Mutex<Inner>,
    /// Held by whoever changes the file's names on disk.
    changing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    present: RangeSet,
    file: Option<Arc<File>>,
    whole: Option<Arc<File>>,
    suspect: Option<u32>,
    unsaved_bytes: u64,
    /// What is on disk could not be looked at now; it stays, and nothing is put over it.
    unreachable: bool,
}

impl Drop for CachedFile {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        // Another may have been opened between the last drop and this.
        if state.open.get(&self.key).is_some_and(|file| file.strong_count() == 0) {
            state.open.remove(&self.key);
        }
    }
}

impl CachedFile {
    fn new(cache: Arc<Cache>, key: Key, size: u64, form: Option<Form>, alone: bool) -> Self {
        Self {
            cache,
            key,
            size,
            form,
            alone,
            loaded: OnceLock::new(),
            inner: Mutex::default(),
            changing: Mutex::new(()),
        }
    }

    /// The bytes of the file, as its version says.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The groups of `range` that are not here.
    pub(super) fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        self.inner().present.missing(range).collect()
    }

    /// Whether all groups are here.
    pub fn is_full(&self) -> bool {
        self.inner().present.contains(&(0..groups_of(self.size)))
    }

    /// The bytes of a range if all of it is here. A disk that fails or is shorter than
    /// the map says makes the whole file absent, to be fetched again.
    pub fn read(&self, range: Range<u64>) -> Option<Bytes> {
        let groups = range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES);
        let file = {
            let inner = self.inner();
            inner.file.clone().filter(|_| inner.present.contains(&groups))?
        };
        match disk::read_range(&file, range) {
            Ok(bytes) => Some(bytes),
            Err(e) => {
                self.cache.report("reading from the cache", &e);
                self.discard();
                None
            }
        }
    }

    /// The file, once every byte is here and verified.
    pub fn whole(&self) -> Option<Arc<File>> {
        self.inner().whole.clone()
    }

    /// Whether the file must be [checked](Self::check) before anything of it is used.
    pub fn needs_check(&self) -> bool {
        self.inner().suspect.is_some()
    }

    /// Hashes a file from before a crash of the machine; it is whole after it, or gone.
    /// `false`: it was damaged.
    pub fn check(&self) -> bool {
        let _changing = self.changing();
        let Some(n) = self.inner().suspect else { return true };
        let intact = self.check_suspect(n);
        let is_lost = match &intact {
            Ok(intact) => !intact,
            Err(e) => is_permanent(e),
        };
        if is_lost {
            self.cache.drop_file(self.key, Form::Suspect(n));
        }
        {
            let mut inner = self.inner();
            inner.suspect = None;
            inner.unreachable = intact.is_err() && !is_lost;
        }
        match intact {
            Ok(intact) => intact,
            Err(e) => {
                self.cache.report("checking a cached file", &e);
                true
            }
        }
    }

    fn check_suspect(&self, n: u32) -> io::Result<bool> {
        let path = self.cache.suspect_path(self.key, n);
        let file = File::open(&path)?;
        let hashed = hash(&file, self.size)?;
        if file.metadata()?.len() != self.size || hashed.map(Key::Content) != Some(self.key) {
            return Ok(false);
        }
        disk::rename(&path, &self.key.path(&self.cache.dir))?;
        self.cache.lock().set_form(self.key, Form::Whole);
        self.become_whole(Arc::new(file));
        Ok(true)
    }

    /// Keeps the bytes of whole groups; `false` when they were not kept, for want of room
    /// or because the disk failed.
    pub fn write(&self, start: u64, bytes: &[u8]) -> bool {
        let end = start + bytes.len() as u64;
        let groups = start / GROUP_BYTES..end.div_ceil(GROUP_BYTES);
        if self.alone || bytes.is_empty() || self.needs_check() {
            return false;
        }
        let _changing = self.changing();
        if self.inner().unreachable {
            return false;
        }
        if self.inner().present.contains(&groups) {
            return true;
        }
        let kept = kept_bytes(bytes.len() as u64);
        if !self.cache.reserve(self.key, kept) {
            return false;
        }
        match self.write_reserved(start, bytes, groups) {
            Ok(()) => {
                self.cache.report_success();
                true
            }
            Err(e) => {
                self.cache.lock().give_back(self.key, kept);
                self.cache.report("writing to the cache", &e);
                false
            }
        }
    }

    fn write_reserved(&self, start: u64, bytes: &[u8], groups: Range<u64>) -> io::Result<()> {
        let file = self.part_file()?;
        file.write_all_at(bytes, start)?;
        let (full, unsaved_bytes) = {
            let mut inner = self.inner();
            inner.present.insert(groups);
            inner.unsaved_bytes += bytes.len() as u64;
            (inner.present.contains(&(0..groups_of(self.size))), inner.unsaved_bytes)
        };
        if full {
            self.finish(&file, bytes.len() as u64 == self.size);
        } else if unsaved_bytes >= SAVE_EVERY_BYTES {
            self.save_map();
        }
        Ok(())
    }

    fn part_file(&self) -> io::Result<Arc<File>> {
        if let Some(file) = self.inner().file.clone() {
            return Ok(file);
        }
        // A map that is left over from before would vouch for holes of the new part.
        match fs::remove_file(self.cache.map_path(self.key)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = Arc::new(disk::create(&self.cache.part_path(self.key))?);
        self.inner().file = Some(file.clone());
        Ok(file)
    }

    /// Every group is here: the part gets its final name. A file that came in one piece is
    /// not synced first: thousands of small ones would wait for the disk, and after a crash
    /// of the machine it is checked anyway.
    fn finish(&self, file: &File, in_one_piece: bool) {
        let (dir, part) = (&self.cache.dir, self.cache.part_path(self.key));
        let path = self.key.path(dir);
        let finished = (|| {
            if !in_one_piece && self.size > MAX_FETCH_BYTES {
                file.sync_data()?;
            }
            disk::rename(&part, &path)?;
            File::open(&path)
        })();
        match finished {
            Ok(file) => {
                let _ = fs::remove_file(self.cache.map_path(self.key));
                self.cache.lock().set_form(self.key, Form::Whole);
                self.become_whole(Arc::new(file));
            }
            Err(e) => self.lose_names("finishing a cached file", &e),
        }
    }

    fn become_whole(&self, file: Arc<File>) {
        let mut inner = self.inner();
        inner.present.insert(0..groups_of(self.size));
        inner.unsaved_bytes = 0;
        inner.suspect = None;
        inner.file = Some(file.clone());
        if let Key::Content(_) = self.key {
            inner.whole = Some(file);
        }
    }

    /// The directory was emptied under us, or fails: what is open stays readable until it
    /// is closed, and is then gone.
    fn lose_names(&self, attempted: &str, error: &io::Error) {
        self.cache.report(attempted, error);
        self.inner().unsaved_bytes = 0;
        self.cache.drop_file(self.key, Form::Part);
    }

    /// Writes the map, after the data, if there is anything new in it.
    pub fn save(&self) {
        let _changing = self.changing();
        if self.unsaved_bytes() > 0 {
            self.save_map();
        }
    }

    /// Bytes that a killed daemon would fetch again.
    pub fn unsaved_bytes(&self) -> u64 {
        self.inner().unsaved_bytes
    }

    fn save_map(&self) {
        let (file, map) = {
            let mut inner = self.inner();
            let Some(file) = inner.file.clone() else { return };
            inner.unsaved_bytes = 0;
            (file, encode_map(self.size, &inner.present))
        };
        let temporary = self.cache.temporary();
        let map_path = self.cache.map_path(self.key);
        let saved = file.sync_data().and_then(|()| disk::replace(&temporary, &map_path, &map));
        if let Err(e) = saved {
            self.cache.report("saving the map of a cached file", &e);
        }
    }

    /// Makes a full file of a version whose content id is known by now a whole content.
    /// `None`: not full, or the disk failed; `Some(false)`: the bytes are of another content.
    pub fn promote(&self, content: ContentId) -> Option<bool> {
        let Key::Stamped(_) = self.key else { return None };
        if !self.is_full() {
            return None;
        }
        let file = self.inner().file.clone()?;
        match hash(&file, self.size) {
            Ok(hashed) if hashed == Some(content) => {
                let _changing = self.changing();
                self.rename_to(Key::Content(content));
                self.inner().whole = Some(file);
                Some(true)
            }
            Ok(_) => {
                self.discard();
                Some(false)
            }
            Err(e) => {
                self.cache.report("hashing a cached file", &e);
                None
            }
        }
    }

    /// Takes over the bytes that came before the content id was known, if all are here and
    /// right; `false`: they are of another content.
    pub(super) fn adopt(&self, unhashed: &Self) -> bool {
        let Key::Content(content) = self.key else { return true };
        if self.alone || self.inner().unreachable || !unhashed.is_full() || self.is_full() {
            return true;
        }
        let Some(file) = unhashed.inner().file.clone() else { return true };
        match hash(&file, self.size) {
            Ok(hashed) if hashed == Some(content) => {
                let (_unhashed, _changing) = (unhashed.changing(), self.changing());
                if self.inner().file.is_none() {
                    // Its own reader may have renamed it just before; it is open either way.
                    unhashed.rename_to(self.key);
                    self.become_whole(file);
                }
                true
            }
            Ok(_) => {
                unhashed.discard();
                false
            }
            Err(e) => {
                self.cache.report("hashing a cached file", &e);
                true
            }
        }
    }

    /// Gives the file the name of its content, unless that is taken.
    fn rename_to(&self, key: Key) {
        let mut state = self.cache.lock();
        let (from, to) = (self.key.path(&self.cache.dir), key.path(&self.cache.dir));
        let renamed = !state.rows.contains(&key) && disk::rename(&from, &to).is_ok();
        let Some(row) = state.rows.pop(&self.key) else { return };
        if renamed {
            state.rows.push(key, row);
        } else {
            // Somebody has fetched it by its content id meanwhile: one copy is enough.
            state.bytes -= row.bytes;
            let _ = fs::remove_file(from);
        }
    }

    /// Forgets what is here; the next readers fetch again.
    pub fn discard(&self) {
        // Not while a writer makes the names that go here.
        let _changing = self.changing();
        let form = {
            let mut inner = self.inner();
            if inner.unreachable {
                return;
            }
            let form = if inner.whole.is_some() { Form::Whole } else { Form::Part };
            *inner = Inner::default();
            form
        };
        if !self.alone {
            self.cache.drop_file(self.key, form);
            let _ = fs::remove_file(self.key.path(&self.cache.dir));
        }
    }

    /// The state, after what is on disk was looked at once.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.loaded.get_or_init(|| {
            if let Some(form) = self.form.filter(|_| !self.alone) {
                let loaded = self.load(form);
                *self.inner.lock().unwrap_or_else(PoisonError::into_inner) = loaded;
            }
        });
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, form: Form) -> Inner {
        let loaded = match form {
            Form::Suspect(n) => Ok(Inner { suspect: Some(n), ..Inner::default() }),
            Form::Whole => self.load_whole(),
            Form::Part => self.load_part(),
        };
        loaded.unwrap_or_else(|e| {
            let unreachable = !is_permanent(&e);
            if unreachable {
                self.cache.report("opening a cached file", &e);
            } else {
                tracing::debug!(key = ?self.key, "a cached file is unusable: {e}");
                self.cache.drop_file(self.key, form);
            }
            Inner { unreachable, ..Inner::default() }
        })
    }

    fn load_whole(&self) -> io::Result<Inner> {
        let file = Arc::new(File::open(self.key.path(&self.cache.dir))?);
        if file.metadata()?.len() != self.size {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // The time of last use, by which the next start orders the files.
        let _ = file.set_modified(SystemTime::now());
        let mut inner = Inner { file: Some(file.clone()), ..Inner::default() };
        inner.present.insert(0..groups_of(self.size));
        inner.whole = matches!(self.key, Key::Content(_)).then_some(file);
        Ok(inner)
    }

    fn load_part(&self) -> io::Result<Inner> {
        let map = fs::read(self.cache.map_path(self.key))?;
        let present = decode_map(&map, self.size).ok_or(io::ErrorKind::InvalidData)?;
        let part = self.cache.part_path(self.key);
        let file = File::options().read(true).write(true).open(part)?;
        if file.metadata()?.len() < (present.end() * GROUP_BYTES).min(self.size) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Inner { present, file: Some(Arc::new(file)), ..Inner::default() })
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the error says that the file is gone or damaged; any other one, such as too many
/// open files, may pass and says nothing about it.
fn is_permanent(error: &io::Error) -> bool {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | InvalidData | UnexpectedEof)
}

fn hash(file: &File, size: u64) -> io::Result<Option<ContentId>> {
    let hashed = Manifest::of_file(file, size, &AtomicBool::new(false))?;
    Ok(hashed.map(|(content, _)| content))
}

const MAP_MAGIC: &[u8; 8] = b"sd-map\0\x01";
const MAP_HEADER_BYTES: usize = 8 + 8 + 8;

/// Magic with version, size of the file, group size, the ranges, BLAKE3 of all that.
fn encode_map(size: u64, present: &RangeSet) -> Vec<u8> {
    let mut map = Vec::with_capacity(MAP_HEADER_BYTES + present.iter().len() * 16 + 32);
    map.extend_from_slice(MAP_MAGIC);
    map.extend_from_slice(&size.to_le_bytes());
    map.extend_from_slice(&GROUP_BYTES.to_le_bytes());
    for range in present.iter() {
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&range.end.to_le_bytes());
    }
    let check = blake3::hash(&map);
    map.extend_from_slice(check.as_bytes());
    map
}

fn decode_map(map: &[u8], size: u64) -> Option<RangeSet> {
    let (map, check) = map.split_last_chunk::<32>()?;
    if blake3::hash(map) != *check {
        return None;
    }
    let (header, ranges) = map.split_at_checked(MAP_HEADER_BYTES)?;
    let (ranges, rest) = ranges.as_chunks::<8>();
    let expected = encode_map(size, &RangeSet::default());
    if header != &expected[..MAP_HEADER_BYTES] || !rest.is_empty() {
        return None;
    }
    let (pairs, rest) = ranges.as_chunks::<2>();
    let mut present = RangeSet::default();
    for [start, end] in pairs {
        let range = u64::from_le_bytes(*start)..u64::from_le_bytes(*end);
        if range.is_empty() || range.end > groups_of(size) || range.start < present.end() {
            return None;
        }
        present.insert(range);
    }
    rest.is_empty().then_some(present)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: usize = GROUP_BYTES as usize;

    fn bytes_of(seed: u8, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        blake3::Hasher::new_keyed(&[seed; 32]).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn key_of(bytes: &[u8]) -> Key {
        Key::Content(ContentId::of(bytes))
    }

    fn open(dir: &Path, limit_bytes: u64) -> Arc<Cache> {
        let cache = Cache::open(dir, limit_bytes);
        assert_eq!(cache.stats().problem, None);
        Arc::new(cache)
    }

    fn fill(cache: &Arc<Cache>, bytes: &[u8]) -> Arc<CachedFile> {
        let file = cache.file(key_of(bytes), bytes.len() as u64);
        assert!(file.write(0, bytes));
        file
    }

    fn read_all(file: &CachedFile) -> Option<Bytes> {
        file.read(0..file.size())
    }

    /// What a crash of the machine looks like at the next start.
    fn crash(dir: &Path) {
        fs::write(dir.join("boot"), "1\nanother boot\n").unwrap();
    }

    fn disk_bytes(dir: &Path) -> u64 {
        let Ok(entries) = fs::read_dir(dir) else { return 0 };
        let sizes = entries.map(|entry| {
            let entry = entry.unwrap();
            match entry.metadata().unwrap() {
                metadata if metadata.is_dir() => disk_bytes(&entry.path()),
                metadata => metadata.blocks() * 512,
            }
        });
        sizes.sum()
    }

    #[test]
    fn parts_become_a_whole_that_outlives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = bytes_of(1, 3 * GROUP + 5);
        {
            let cache = open(dir.path(), 1 << 20);
            let file = cache.file(key_of(&bytes), bytes.len() as u64);
            assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));
            assert_eq!(file.read(0..10), None);
            assert_eq!(
                file.read(GROUP_BYTES + 7..GROUP_BYTES + 9).unwrap(),
                bytes[GROUP + 7..GROUP + 9]
            );
            assert_eq!(file.missing(0..4), [0..1, 2..4]);
            assert!(file.whole().is_none());
            assert!(file.write(2 * GROUP_BYTES, &bytes[2 * GROUP..]));
            assert!(file.write(0, &bytes[..GROUP]));
            assert!(file.whole().is_some());
        }
        let cache = open(dir.path(), 1 << 20);
        let file = cache.file(key_of(&bytes), bytes.len() as u64);
        assert_eq!(read_all(&file).unwrap(), bytes);
        assert!(file.whole().is_some());
        assert_eq!(cache.stats().files, 1);
    }

    #[test]
    fn a_killed_daemon_keeps_what_its_map_says_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = bytes_of(1, 4 * GROUP);
        let cache = open(dir.path(), 1 << 20);
        let file = cache.file(key_of(&bytes), bytes.len() as u64);
        assert!(file.write(0, &bytes[..GROUP]));
        file.save();
        assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));

        let next = open(dir.path(), 1 << 20);
        let file = next.file(key_of(&bytes), bytes.len() as u64);
        assert_eq!(file.missing(0..4), [1..4]);
        assert_eq!(file.read(0..GROUP_BYTES).unwrap(), bytes[..GROUP]);
    }

    #[test]
    fn a_damaged_map_or_a_cut_part_is_dropped() {
        let bytes = bytes_of(1, 4 * GROUP);
        let damages: [fn(&Cache, Key); 4] = [
            |cache, key| {
                let mut map = fs::read(cache.map_path(key)).unwrap();
                map[30] ^= 1;
                fs::write(cache.map_path(key), map).unwrap();
            },
            |cache, key| {
                let map = fs::read(cache.map_path(key)).unwrap();
                fs::write(cache.map_path(key), &map[..map.len() - 1]).unwrap();
            },
            |cache, key| fs::write(cache.map_path(key), b"").unwrap(),
            |cache, key| {
                let part = File::options().write(true).open(cache.part_path(key)).unwrap();
                part.set_len(GROUP_BYTES).unwrap();
            },
        ];
        for damage in damages {
            let dir = tempfile::tempdir().unwrap();
            let cache = open(dir.path(), 1 << 20);
            let key = key_of(&bytes);
            let file = cache.file(key, bytes.len() as u64);
            assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));
            file.save();
            drop(file);
            damage(&cache, key);
            let cache = open(dir.path(), 1 << 20);
            let file = cache.file(key, bytes.len() as u64);
            assert_eq!(file.missing(0..4), [0..4]);
            assert_eq!(cache.stats().bytes, 0);
            assert!(file.write(0, &bytes));
            assert_eq!(read_all(&file).unwrap(), bytes);
        }
    }

    /// Makes every open of `path` fail for a while, as too many open files would.
    fn while_unreachable(path: &Path, act: impl FnOnce()) {
        let aside = path.with_extension("aside");
        fs::rename(path, &aside).unwrap();
        std::os::unix::fs::symlink(path, path).unwrap();
        act();
        fs::remove_file(path).unwrap();
        fs::rename(aside, path).unwrap();
    }

    #[test]
    fn an_error_that_passes_costs_nothing_that_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, part) = (bytes_of(1, GROUP), bytes_of(2, 2 * GROUP));
        let cache = Arc::new(Cache::open(dir.path(), 1 << 20));
        let open_whole = || cache.file(key_of(&whole), GROUP_BYTES);
        let open_part = || cache.file(key_of(&part), 2 * GROUP_BYTES);
        assert!(open_whole().write(0, &whole));
        {
            let file = open_part();
            assert!(file.write(0, &part[..GROUP]));
            file.save();
        }
        let kept = cache.stats().bytes;
        let opens: [(PathBuf, &dyn Fn() -> Arc<CachedFile>); 3] = [
            (key_of(&whole).path(dir.path()), &open_whole),
            (cache.map_path(key_of(&part)), &open_part),
            (cache.part_path(key_of(&part)), &open_part),
        ];
        for (path, open) in opens {
            while_unreachable(&path, || {
                let file = open();
                assert_eq!(read_all(&file), None);
                assert!(!file.write(0, &whole), "nothing is put over what is there");
                file.discard();
            });
            assert!(cache.stats().problem.is_some());
            assert_eq!(cache.stats().bytes, kept, "{}", path.display());
        }
        assert_eq!(read_all(&open_whole()).unwrap(), whole);
        assert_eq!(open_part().missing(0..2), [1..2]);
    }

    #[test]
    fn a_suspect_that_cannot_be_read_now_is_checked_another_time() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = bytes_of(1, GROUP);
        drop(fill(&open(dir.path(), 1 << 20), &bytes));
        crash(dir.path());
        let cache = Arc::new(Cache::open(dir.path(), 1 << 20));
        let file = || cache.file(key_of(&bytes), GROUP_BYTES);
        while_unreachable(&cache.suspect_path(key_of(&bytes), 1), || {
            let file = file();
            assert!(file.needs_check() && file.check() && !file.needs_check());
            assert_eq!(read_all(&file), None);
            assert!(!file.write(0, &bytes));
        });
        let file = file();
        assert!(file.needs_check() && file.check());
        assert_eq!(read_all(&file).unwrap(), bytes);
    }

    #[test]
    fn a_map_that_was_left_over_vouches_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = bytes_of(1, 3 * GROUP);
        let cache = open(dir.path(), 1 << 20);
        let key = key_of(&bytes);
        let file = cache.file(key, bytes.len() as u64);
        assert!(file.write(0, &bytes[..GROUP]));
        file.save();
        let map = fs::read(cache.map_path(key)).unwrap();
        file.discard();
        // Its removal had failed.
        fs::write(cache.map_path(key), map).unwrap();
        assert!(file.write(GROUP_BYTES, &bytes[GROUP..2 * GROUP]));

        let next = open(dir.path(), 1 << 20);
        let file = next.file(key, bytes.len() as u64);
        assert_eq!(file.missing(0..3), [0..3], "the first group is a hole");
    }

    #[test]
    fn what_is_being_written_is_discarded_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        let file = fill(&cache, &bytes_of(1, GROUP));
        let writing = file.changing();
        std::thread::scope(|scope| {
            let discarding = scope.spawn(|| file.discard());
            let early = std::time::Instant::now() + std::time::Duration::from_millis(100);
            while std::time::Instant::now() < early {
                assert!(file.is_full() && !discarding.is_finished());
                std::thread::yield_now();
            }
            drop(writing);
        });
        assert!(!file.is_full());
    }

    #[test]
    fn after_a_crash_of_the_machine_nothing_unchecked_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad, part) =
            (bytes_of(1, 3 * GROUP), bytes_of(2, 3 * GROUP), bytes_of(3, 3 * GROUP));
        {
            let cache = open(dir.path(), 1 << 20);
            fill(&cache, &good);
            fill(&cache, &bad);
            let file = cache.file(key_of(&part), part.len() as u64);
            assert!(file.write(0, &part[..GROUP]));
            file.save();
        }
        let path = key_of(&bad).path(dir.path());
        let mut damaged = fs::read(&path).unwrap();
        damaged[GROUP + 1] ^= 1;
        fs::write(&path, damaged).unwrap();
        crash(dir.path());

        // A second crash, before anything was checked, changes nothing.
        drop(open(dir.path(), 1 << 20));
        crash(dir.path());
        let cache = open(dir.path(), 1 << 20);
        let file = |bytes: &[u8]| cache.file(key_of(bytes), bytes.len() as u64);
        let (good_file, bad_file, part_file) = (file(&good), file(&bad), file(&part));
        assert!(read_all(&good_file).is_none() && read_all(&bad_file).is_none());
        assert!(good_file.whole().is_none() && bad_file.whole().is_none());
        assert_eq!(part_file.missing(0..3), [0..3]);
        assert!(good_file.needs_check() && bad_file.needs_check() && !part_file.needs_check());
        assert!(good_file.check());
        assert!(!bad_file.check());
        assert_eq!(read_all(&good_file).unwrap(), good);
        assert!(good_file.whole().is_some());
        assert_eq!(bad_file.missing(0..3), [0..3]);
        assert!(bad_file.write(0, &bad));
        assert_eq!(read_all(&bad_file).unwrap(), bad);
    }

    #[test]
    fn a_cache_closed_in_order_needs_no_check_after_a_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let (whole, part) = (bytes_of(1, 10), bytes_of(2, 3 * GROUP));
        let cache = open(dir.path(), 1 << 20);
        fill(&cache, &whole);
        let file = cache.file(key_of(&part), part.len() as u64);
        assert!(file.write(0, &part[..GROUP]));
        cache.close();
        assert!(!file.write(GROUP_BYTES, &part[GROUP..2 * GROUP]), "nothing after the mark");
        drop(file);
        assert!(Boot::read(dir.path()) == Boot::Closed);

        let cache = open(dir.path(), 1 << 20);
        assert!(Boot::read(dir.path()) == Boot::Running);
        assert_eq!(read_all(&cache.file(key_of(&whole), 10)).unwrap(), whole);
        assert_eq!(cache.file(key_of(&part), part.len() as u64).missing(0..3), [1..3]);
    }

    #[test]
    fn the_least_recently_opened_goes_first_and_the_limit_holds() {
        let dir = tempfile::tempdir().unwrap();
        let limit = 4 * GROUP_BYTES;
        let cache = open(dir.path(), limit);
        let files: Vec<_> = (0..4).map(|seed| bytes_of(seed, GROUP)).collect();
        files.iter().for_each(|bytes| drop(fill(&cache, bytes)));
        drop(cache.file(key_of(&files[0]), GROUP_BYTES));
        let another = bytes_of(9, GROUP);
        fill(&cache, &another);
        let is_here = |bytes: &[u8]| cache.file(key_of(bytes), GROUP_BYTES).whole().is_some();
        assert!(
            is_here(&files[0]) && !is_here(&files[1]) && is_here(&files[2]) && is_here(&another)
        );
        assert_eq!(cache.stats().evicted_bytes, GROUP_BYTES);
        for seed in 10..40 {
            fill(&cache, &bytes_of(seed, GROUP));
            assert!(cache.stats().bytes <= limit);
            assert!(disk_bytes(dir.path()) <= limit + 4096);
        }
        cache.set_limit(GROUP_BYTES);
        assert_eq!(cache.stats().bytes, GROUP_BYTES);
        assert_eq!(cache.clear(), GROUP_BYTES);
        assert_eq!((cache.stats().bytes, cache.stats().files), (0, 0));
    }

    #[test]
    fn open_files_are_not_evicted_and_what_has_no_room_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 2 * GROUP_BYTES);
        let bytes = bytes_of(1, 4 * GROUP);
        let file = cache.file(key_of(&bytes), bytes.len() as u64);
        assert!(file.write(0, &bytes[..2 * GROUP]));
        assert!(!file.write(2 * GROUP_BYTES, &bytes[2 * GROUP..]));
        assert_eq!(file.read(0..2 * GROUP_BYTES).unwrap(), bytes[..2 * GROUP]);
        assert_eq!(cache.clear(), 0);
        drop(file);
        assert_eq!(cache.clear(), 2 * GROUP_BYTES);
    }

    #[test]
    fn a_directory_that_vanishes_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        let (first, second, third) =
            (bytes_of(1, 2 * GROUP), bytes_of(2, 2 * GROUP), bytes_of(3, 9));
        drop(fill(&cache, &first));
        let half = cache.file(key_of(&second), 2 * GROUP_BYTES);
        assert!(half.write(0, &second[..GROUP]));
        fs::remove_dir_all(dir.path()).unwrap();

        let gone = cache.file(key_of(&first), 2 * GROUP_BYTES);
        assert_eq!(gone.missing(0..2), [0..2]);
        assert!(gone.write(0, &first));
        assert_eq!(read_all(&gone).unwrap(), first);
        assert!(half.write(GROUP_BYTES, &second[GROUP..]));
        assert_eq!(read_all(&half).unwrap(), second, "what is open stays readable");
        drop(half);
        let again = fill(&cache, &second);
        assert_eq!(read_all(&again).unwrap(), second);
        assert!(again.whole().is_some());
        assert!(fill(&cache, &third).whole().is_some());
        assert_eq!(cache.stats().problem, None);
    }

    #[test]
    fn a_directory_that_cannot_be_used_gives_a_cache_that_keeps_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("not a directory");
        fs::write(&path, b"").unwrap();
        let cache = Arc::new(Cache::open(&path, 1 << 20));
        assert!(cache.stats().problem.is_some());
        let bytes = bytes_of(1, 100);
        let file = cache.file(key_of(&bytes), 100);
        assert!(!file.write(0, &bytes));
        assert_eq!(read_all(&file), None);
        cache.close();
    }

    #[test]
    fn two_sizes_of_one_content_do_not_share() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        let bytes = bytes_of(1, GROUP);
        let file = fill(&cache, &bytes);
        let liar = cache.file(key_of(&bytes), GROUP_BYTES + 1);
        assert!(!liar.write(0, &bytes));
        drop(liar);
        assert_eq!(read_all(&file).unwrap(), bytes);
        assert_eq!(cache.file(key_of(&bytes), GROUP_BYTES).missing(0..1), []);
    }

    #[test]
    fn a_stamped_file_becomes_content_only_when_its_hash_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        let (bytes, other) = (bytes_of(1, 2 * GROUP), bytes_of(2, 10));
        let stamped = cache.file(Key::Stamped([7; 32]), 2 * GROUP_BYTES);
        assert!(stamped.write(0, &bytes[..GROUP]));
        assert_eq!(stamped.promote(ContentId::of(&bytes)), None);
        assert!(stamped.write(GROUP_BYTES, &bytes[GROUP..]));
        assert!(stamped.whole().is_none());
        assert_eq!(stamped.promote(ContentId::of(&bytes)), Some(true));
        assert!(stamped.whole().is_some());
        assert_eq!(read_all(&cache.file(key_of(&bytes), 2 * GROUP_BYTES)).unwrap(), bytes);

        let wrong = cache.file(Key::Stamped([8; 32]), 10);
        assert!(wrong.write(0, &other));
        let content = cache.file(key_of(&bytes_of(3, 10)), 10);
        assert!(!content.adopt(&wrong));
        assert_eq!(content.missing(0..1), [0..1]);
        assert!(wrong.write(0, &other));
        let content = cache.file(key_of(&other), 10);
        assert!(content.adopt(&wrong));
        assert_eq!(read_all(&content).unwrap(), other);
        assert!(content.whole().is_some());
        assert!(!cache.knows(Key::Stamped([8; 32])));
    }

    #[test]
    fn a_map_never_names_a_group_beyond_the_file() {
        let mut present = RangeSet::default();
        present.insert(1..3);
        let map = encode_map(3 * GROUP_BYTES, &present);
        assert_eq!(decode_map(&map, 3 * GROUP_BYTES), Some(present));
        assert_eq!(decode_map(&map, 2 * GROUP_BYTES), None);
        assert_eq!(decode_map(&map, 3 * GROUP_BYTES - 1), None);
        assert_eq!(decode_map(&[], 0), None);
    }
}
