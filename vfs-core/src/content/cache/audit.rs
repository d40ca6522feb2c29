//! Comparing what the cache keeps with the ids by which it keeps it.
//!
//! A whole content is hashed: a disk may give back other bytes than it was given. Of a part
//! nothing proves the bytes but the other bytes, so of parts, and of versions that had no id
//! when they came, only is looked whether what is noted of them can be.
//!
//! Nothing here counts as a use, and a file that is evicted meanwhile is no finding. What is
//! mended is only ever a copy of what its owner has: it is fetched again when it is read.

use super::map::bytes_in_map;
use super::rows::Row;
use super::scan::{key_of, subdirectories};
use super::{Cache, Form, Key};
use crate::model::ContentId;
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Read and hashed at once.
const READ_BYTES: usize = 1 << 20;
/// Files that nothing knows, looked at a second time.
const STRAYS: usize = 1024;

/// What an audit found.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Audited {
    /// Files that were looked at, and their bytes that were hashed.
    pub files: u64,
    /// See there.
    pub bytes: u64,
    /// Files whose bytes are not those of their id, or that are not what is noted of them.
    pub damaged: u64,
    /// Files that are noted and not there.
    pub missing: u64,
    /// Files that could not be read.
    pub unread: u64,
    /// Files whose bytes nothing here proves.
    pub unproved: u64,
    /// Files that nothing knows.
    pub strays: u64,
    /// Of all that is wrong: what is mended.
    pub mended: u64,
}

impl Audited {
    /// How much is wrong.
    pub fn faults(&self) -> u64 {
        self.damaged + self.missing + self.strays
    }
}

/// How an audit is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Thorough {
    /// Bytes are read, not only sizes.
    pub hashes: bool,
    /// What is wrong is removed.
    pub mends: bool,
}

/// Hears how far an audit is, and says whether to go on.
pub type Hear<'a> = &'a mut dyn FnMut(&Audited) -> ControlFlow<()>;

/// What one file was found to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Sound,
    Unproved,
    Damaged,
    Missing,
    Unread,
    /// It was evicted, or became whole, meanwhile.
    Gone,
}

impl Cache {
    /// Looks at everything that is kept. `hear` may end it; the result is then of what was looked
    /// at.
    pub fn audit(self: &Arc<Self>, how: Thorough, hear: Hear<'_>) -> Audited {
        let mut audit = Audit { cache: self, how, audited: Audited::default(), hear };
        let rows: Vec<Key> = self.lock().rows.keys().copied().collect();
        let files = rows.into_iter().try_for_each(|key| audit.file(key));
        if files.is_continue() {
            audit.strays();
        }
        audit.audited
    }

    fn row(&self, key: Key) -> Option<Row> {
        self.lock().rows.peek(&key).copied()
    }

    /// The file, of a row that is still the same.
    fn opened(&self, key: Key, form: Form) -> Result<File, Verdict> {
        let path = match form {
            Form::Part => self.part_path(key),
            Form::Whole => key.path(&self.dir),
            Form::Suspect(n) => self.suspect_path(key, n),
        };
        File::open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound if self.is_missing(key, form, &path) => Verdict::Missing,
            io::ErrorKind::NotFound => Verdict::Gone,
            _ => Verdict::Unread,
        })
    }

    /// Whether there should be a file. Who has it open may be about to make or to remove it, and
    /// where nothing could be written nothing is.
    fn is_missing(&self, key: Key, form: Form, path: &Path) -> bool {
        let state = self.lock();
        let is_noted = |row: &Row| row.form == form && row.bytes > 0;
        !state.open.contains_key(&key)
            && state.rows.peek(&key).is_some_and(is_noted)
            && !path.exists()
    }

    /// What is known of a part that is not open: the map, and that the bytes can be there.
    fn judge_part(&self, key: Key, file: &File) -> Verdict {
        let map = match fs::read(self.map_path(key)) {
            Ok(map) => map,
            // A daemon that was killed had none yet: nothing of the file counts as here.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Verdict::Unproved,
            Err(_) => return Verdict::Unread,
        };
        match (bytes_in_map(&map), file.metadata()) {
            (_, Err(_)) => Verdict::Unread,
            (Some(end), Ok(metadata)) if metadata.len() >= end => Verdict::Unproved,
            _ => Verdict::Damaged,
        }
    }

    fn is_open(&self, key: Key) -> bool {
        self.lock().open.get(&key).and_then(Weak::upgrade).is_some()
    }

    /// Has a damaged file fetched again by whoever reads it next.
    fn drop_damaged(self: &Arc<Self>, key: Key) {
        let Some(row) = self.row(key) else { return };
        let open = self.lock().open.get(&key).and_then(Weak::upgrade);
        let file = open.unwrap_or_else(|| self.file(key, self.size_on_disk(key, row.form)));
        match file.needs_check() {
            true => drop(file.check()),
            false => file.discard(),
        }
    }

    fn size_on_disk(&self, key: Key, form: Form) -> u64 {
        let names = self.names(key, form);
        names.filter_map(|name| fs::metadata(name).ok()).map(|m| m.len()).max().unwrap_or(0)
    }

    /// Whether nothing knows a file of the directory; if so, it goes when that is wanted. Under
    /// the lock under which a file gets its row.
    fn is_stray(&self, path: &Path, key: Option<Key>, removes: bool) -> bool {
        let state = self.lock();
        let is_stray =
            key.is_none_or(|key| !state.rows.contains(&key)) && fs::symlink_metadata(path).is_ok();
        if is_stray && removes {
            // It is found again by the next audit.
            let _ = fs::remove_file(path);
        }
        is_stray
    }
}

struct Audit<'a> {
    cache: &'a Arc<Cache>,
    how: Thorough,
    audited: Audited,
    hear: Hear<'a>,
}

impl Audit<'_> {
    fn file(&mut self, key: Key) -> ControlFlow<()> {
        let verdict = self.judge(key);
        let audited = &mut self.audited;
        match verdict {
            Verdict::Gone => return (self.hear)(&self.audited),
            Verdict::Sound => {}
            Verdict::Unproved => audited.unproved += 1,
            Verdict::Unread => audited.unread += 1,
            Verdict::Damaged => audited.damaged += 1,
            Verdict::Missing => audited.missing += 1,
        }
        audited.files += 1;
        if self.how.mends && matches!(verdict, Verdict::Damaged | Verdict::Missing) {
            self.cache.drop_damaged(key);
            self.audited.mended += 1;
        }
        (self.hear)(&self.audited)
    }

    fn judge(&mut self, key: Key) -> Verdict {
        let Some(Row { form, .. }) = self.cache.row(key) else { return Verdict::Gone };
        let file = match self.cache.opened(key, form) {
            Ok(file) => file,
            Err(verdict) => return verdict,
        };
        match (form, key) {
            // What is noted of an open one is in memory.
            (Form::Part, _) if self.cache.is_open(key) => Verdict::Unproved,
            (Form::Part, _) => self.cache.judge_part(key, &file),
            (_, Key::Stamped(_)) => Verdict::Unproved,
            (_, Key::Content(_)) if !self.how.hashes => Verdict::Unproved,
            (_, Key::Content(content)) => match self.hash(file) {
                Ok(Some(hashed)) if hashed == content => Verdict::Sound,
                Ok(Some(_)) => Verdict::Damaged,
                Ok(None) => Verdict::Gone,
                Err(_) => Verdict::Unread,
            },
        }
    }

    /// `None`: it was ended.
    fn hash(&mut self, mut file: File) -> io::Result<Option<ContentId>> {
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; READ_BYTES];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(Some(ContentId(*hasher.finalize().as_bytes()))),
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    self.audited.bytes += read as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if (self.hear)(&self.audited).is_break() {
                return Ok(None);
            }
        }
    }

    fn strays(&mut self) {
        let mut strays = Vec::new();
        if self.walk(&mut strays).is_err() {
            self.audited.unread += 1;
        }
        // Twice: a file may be between two names.
        for (path, key) in strays {
            let is_stray = self.cache.is_stray(&path, key, self.how.mends);
            self.audited.strays += u64::from(is_stray);
            self.audited.mended += u64::from(is_stray && self.how.mends);
        }
    }

    fn walk(&mut self, strays: &mut Vec<(PathBuf, Option<Key>)>) -> io::Result<()> {
        for class in subdirectories(&self.cache.dir)? {
            let Some(class_name) = class.file_name().and_then(|n| n.to_str()) else { continue };
            if class_name == "tmp" {
                continue;
            }
            for directory in subdirectories(&class)? {
                for file in fs::read_dir(directory)? {
                    let (path, name) = file.map(|file| (file.path(), file.file_name()))?;
                    let key = name.to_str().and_then(|name| key_of(class_name, name));
                    if strays.len() < STRAYS && self.cache.is_stray(&path, key, false) {
                        strays.push((path, key));
                    }
                }
                if (self.hear)(&self.audited).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
