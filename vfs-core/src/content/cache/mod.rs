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
//! | `rows` | what is kept of which file: what may be evicted, and what is held |
//! | `space` | how much of the disk is left to others |
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
//! **What is pinned is held.** Held files are never evicted, and count: where nothing else is
//! left, reads bypass the cache. What is held is not on the disk; whoever pins says it again
//! after a start, and until then everything that was there is ([`Limits::holds`]).
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
mod rows;
mod scan;
mod space;
#[cfg(test)]
mod tests;

pub use audit::{Audited, Hear, Thorough};
pub use file::CachedFile;

use super::{disk, lock};
use crate::model::ContentId;
use crate::source::Version;
use boot::Boot;
use rows::{Row, Rows};
use scan::{Found, scan_directory, subdirectories};
use space::{Claim, Space};
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
    /// Of these: pinned, so that they are not evicted.
    pub held_bytes: u64,
    /// The least that it leaves free on its disk.
    pub min_free_bytes: u64,
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

/// How much a cache may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most bytes that it keeps.
    pub limit_bytes: u64,
    /// The least that it leaves free on its disk.
    pub min_free_bytes: u64,
    /// What is there at the start is not evicted before [`Cache::end_round`]: something of it is
    /// pinned, and what is not known yet.
    pub holds: bool,
}

/// How much of a version is here.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(super) struct Kept {
    pub bytes: u64,
    /// All of it, and checked.
    pub is_whole: bool,
}

/// What became of files that were to be evicted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Evicted {
    /// Bytes that were freed.
    pub freed_bytes: u64,
    /// Bytes that stay because they are pinned, also by another file with the same content.
    pub pinned_bytes: u64,
    /// Bytes that stay because programs have their files open.
    pub open_bytes: u64,
}

/// For how much more there is room that is to stay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Bytes up to the limit.
    pub of_limit_bytes: u64,
    /// Bytes that the disk can give.
    pub of_disk_bytes: u64,
}

impl Room {
    /// Bytes that fit.
    pub fn bytes(&self) -> u64 {
        self.of_limit_bytes.min(self.of_disk_bytes)
    }
}

/// The cache.
#[derive(Debug)]
pub struct Cache {
    dir: PathBuf,
    state: Mutex<State>,
    space: Space,
    limit_bytes: AtomicU64,
    hits_bytes: AtomicU64,
    fetched_bytes: AtomicU64,
    evicted_bytes: AtomicU64,
    next_temporary: AtomicU64,
    problem: Mutex<Option<String>>,
}

#[derive(Debug)]
struct State {
    rows: Rows,
    open: HashMap<Key, Weak<CachedFile>>,
    /// Of all rows, and of files being removed.
    bytes: u64,
    /// Nothing is added any more, because the directory is marked as closed in order.
    closed: bool,
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
        Self::open_within(dir, Limits { limit_bytes, min_free_bytes: 0, holds: false })
    }

    /// The same, with all its limits.
    pub fn open_within(dir: &Path, limits: Limits) -> Self {
        let Limits { limit_bytes, min_free_bytes, holds } = limits;
        let cache = Self {
            dir: dir.to_owned(),
            space: Space::new(min_free_bytes),
            state: Mutex::new(State {
                rows: Rows::default(),
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
        if let Err(e) = cache.start(holds) {
            cache.report("opening the cache", &e);
            // Without the boot mark nothing written from now on could be judged later.
            cache.lock().closed = true;
        }
        cache.evict_down_to(limit_bytes);
        cache
    }

    fn start(&self, holds: bool) -> io::Result<()> {
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
        let round = if holds { state.rows.round() } else { 0 };
        for Found { key, row, .. } in found {
            let row = Row { round, ..row };
            if let Some(old) = state.rows.push(key, row) {
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

    /// Whether every byte of a content is here, verified; does no I/O.
    pub(super) fn has_whole(&self, content: ContentId) -> bool {
        let state = self.lock();
        state.rows.peek(&Key::Content(content)).is_some_and(|row| row.form == Form::Whole)
    }

    /// A whole content, to be read beside its readers. It does not count as a use: what others
    /// ask for does not drive out what programs of this device read.
    pub(super) fn whole_content(&self, content: ContentId, size: u64) -> Option<File> {
        let key = Key::Content(content);
        let file = self.has_whole(content).then(|| File::open(key.path(&self.dir)).ok())??;
        (file.metadata().ok()?.len() == size).then_some(file)
    }

    /// Figures for the status.
    pub fn stats(&self) -> CacheStats {
        let (bytes, held_bytes, files) = {
            let state = self.lock();
            (state.bytes, state.rows.held_bytes(), state.rows.len() as u64)
        };
        CacheStats {
            bytes,
            held_bytes,
            files,
            min_free_bytes: self.space.min_free_bytes(),
            limit_bytes: self.limit_bytes.load(Ordering::Relaxed),
            hits_bytes: self.hits_bytes.load(Ordering::Relaxed),
            fetched_bytes: self.fetched_bytes.load(Ordering::Relaxed),
            evicted_bytes: self.evicted_bytes.load(Ordering::Relaxed),
            problem: self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// The most it may keep that is not pinned.
    pub(super) fn loose_limit_bytes(&self) -> u64 {
        let limit = self.limit_bytes.load(Ordering::Relaxed);
        limit.saturating_sub(self.lock().rows.held_bytes())
    }

    /// For how much more that is to stay there is room, if everything else makes room for it.
    pub fn room(&self) -> Room {
        let (held_bytes, loose_bytes) = {
            let state = self.lock();
            (state.rows.held_bytes(), state.bytes.saturating_sub(state.rows.held_bytes()))
        };
        let limit = self.limit_bytes.load(Ordering::Relaxed);
        let free = self.free_bytes().map_or(u64::MAX, |free| free.saturating_add(loose_bytes));
        Room {
            of_limit_bytes: limit.saturating_sub(held_bytes),
            of_disk_bytes: free.saturating_sub(self.space.min_free_bytes()),
        }
    }

    /// Begins to say what is held.
    pub(super) fn begin_round(&self) {
        self.lock().rows.begin_round();
    }

    /// What was not held since the round began may be evicted from now on.
    pub(super) fn end_round(&self) {
        {
            let mut state = self.lock();
            if state.closed {
                return;
            }
            state.rows.end_round();
        }
        self.trim();
    }

    /// Has what is here of a version stay until a round ends without it; says how much that is.
    pub(super) fn hold(&self, version: &Version) -> Kept {
        let mut state = self.lock();
        let row = state.rows.hold(&Key::of(version));
        // From before it was hashed; it is checked when it is opened next.
        let before = version.content.and_then(|_| state.rows.hold(&Key::stamped(version)));
        kept(row, before, version)
    }

    /// Holds what will come of a version that is open.
    pub(super) fn hold_coming(&self, version: &Version) {
        let key = Key::of(version);
        let mut state = self.lock();
        if state.rows.hold(&key).is_none() {
            let round = state.rows.round();
            state.rows.push(key, Row { bytes: 0, form: Form::Part, round });
        }
    }

    /// Nothing more comes: holds what is here of it, if anything is.
    pub(super) fn hold_come(&self, version: &Version) {
        let key = Key::of(version);
        let mut state = self.lock();
        if state.rows.hold(&key).is_some_and(|row| row.bytes == 0) {
            state.rows.pop(&key);
        }
    }

    /// How much of a version is here.
    pub(super) fn kept(&self, version: &Version) -> Kept {
        let state = self.lock();
        let row = state.rows.peek(&Key::of(version)).copied();
        let before = version.content.and_then(|_| state.rows.peek(&Key::stamped(version)).copied());
        kept(row, before, version)
    }

    /// Gives back what is here of a version, unless it is held or open; or only says how much that
    /// would be.
    pub(super) fn evict(&self, version: &Version, dry_run: bool) -> Evicted {
        let mut evicted = Evicted::default();
        let mut keys = vec![Key::of(version), Key::stamped(version)];
        keys.dedup();
        for key in keys {
            let state = self.lock();
            let Some(row) = state.rows.peek(&key).copied() else { continue };
            if row.round > 0 {
                evicted.pinned_bytes += row.bytes;
            } else if state.open.contains_key(&key) {
                evicted.open_bytes += row.bytes;
            } else if dry_run {
                evicted.freed_bytes += row.bytes;
            } else {
                evicted.freed_bytes += self.evict_this(state, key);
            }
        }
        evicted
    }

    /// Evicts down to its limits, which others may have made tighter by filling the disk.
    pub(super) fn trim(&self) {
        self.evict_down_to(self.limit_bytes.load(Ordering::Relaxed));
        self.make_space(0);
    }

    /// What [`Self::clear`] would free.
    pub fn clearable_bytes(&self) -> u64 {
        let state = self.lock();
        let loose = state.rows.loose().filter(|(key, _)| !state.open.contains_key(key));
        loose.map(|(_, row)| row.bytes).sum()
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

    /// Removes every file that is neither open nor pinned; gives the number of bytes freed.
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
                break;
            }
            if bytes > limit || self.evict_one(state).is_none() {
                return false;
            }
        }
        let has_space = self.make_space(bytes);
        if !has_space {
            self.lock().give_back(key, bytes);
        }
        has_space
    }

    /// Evicts what the disk needs to have this much written to it; `false`: it has no space.
    fn make_space(&self, bytes: u64) -> bool {
        loop {
            match self.space.claim(bytes, || self.free_bytes()) {
                Claim::Granted => return true,
                Claim::Later => return false,
                Claim::Evict(_) => match self.evict_one(self.lock()) {
                    Some(freed) => self.space.note_freed(freed),
                    None => return false,
                },
            }
        }
    }

    /// What others may still write to the disk; nothing is known of one that does not say.
    fn free_bytes(&self) -> Option<u64> {
        let disk = rustix::fs::statvfs(&self.dir).ok()?;
        Some(disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn evict_down_to(&self, limit_bytes: u64) -> u64 {
        let before = self.evicted_bytes.load(Ordering::Relaxed);
        loop {
            let state = self.lock();
            if state.bytes <= limit_bytes || self.evict_one(state).is_none() {
                return self.evicted_bytes.load(Ordering::Relaxed) - before;
            }
        }
    }

    /// Removes the file not opened for the longest time; gives its bytes, or nothing when all
    /// are open or held.
    fn evict_one(&self, state: MutexGuard<'_, State>) -> Option<u64> {
        let oldest = state.rows.loose().find(|(key, _)| !state.open.contains_key(key));
        let key = *oldest?.0;
        Some(self.evict_this(state, key))
    }

    /// Removes a file; gives its bytes.
    ///
    /// The names go under the lock, so that a new opener starts afresh; the space is freed
    /// after it, and only then counted as free.
    fn evict_this(&self, mut state: MutexGuard<'_, State>, key: Key) -> u64 {
        let Some(row) = state.rows.pop(&key) else { return 0 };
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
        row.bytes
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
        lock(&self.state)
    }
}

impl State {
    fn add(&mut self, key: Key, bytes: u64) {
        self.bytes += bytes;
        self.rows.add(key, bytes);
    }

    fn give_back(&mut self, key: Key, bytes: u64) {
        self.bytes -= self.rows.take(&key, bytes);
    }

    fn set_form(&mut self, key: Key, form: Form) {
        self.rows.set_form(&key, form);
    }
}

/// Of rows with the bytes of one version.
fn kept(row: Option<Row>, before: Option<Row>, version: &Version) -> Kept {
    let bytes = row.or(before).map_or(0, |row| row.bytes.min(version.stamp.size));
    Kept { bytes, is_whole: row.is_some_and(|row| row.form == Form::Whole) }
}

fn suspect_name(n: u32) -> String {
    format!("suspect-{n}")
}

/// What bytes take on a disk of 4 KiB blocks.
fn kept_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(4096)
}
