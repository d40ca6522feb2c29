//! One file of the cache: what is here of it, read and written.

use super::map::{decode_map, encode_map};
use super::{Cache, Form, Key, SAVE_EVERY_BYTES, kept_bytes};
use crate::content::disk;
use crate::content::manifest::{GROUP_BYTES, Manifest, groups_of};
use crate::content::ranges::RangeSet;
use crate::model::ContentId;
use crate::source::MAX_FETCH_BYTES;
use bytes::Bytes;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

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
    pub(super) fn new(
        cache: Arc<Cache>,
        key: Key,
        size: u64,
        form: Option<Form>,
        alone: bool,
    ) -> Self {
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
    pub(in crate::content) fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
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
    pub(in crate::content) fn adopt(&self, unhashed: &Self) -> bool {
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

    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
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
