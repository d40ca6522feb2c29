//! The list of pins: one small JSON file, replaced atomically and synced.

use super::PinKey;
use crate::content::lock;
use crate::index::IndexError;
use crate::library::write_durably;
use crate::model::{DeviceId, FileId, LocationId, Name, Time};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The version of the file's format; a higher one found on disk is refused.
pub const FORMAT: u32 = 1;
/// How many pins there may be: whoever wants more pins the folder above.
const MAX_PINS: usize = 10_000;

/// Why something could not be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Reading or writing the list failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A newer program wrote it.
    #[error("{path} has format {found}; this program knows {FORMAT} and older")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The file is this device's own.
    #[error("it is on this device's own disk")]
    Own,
    /// Its owner knows of no such file (yet).
    #[error("its owner has no such file")]
    NotThere,
    /// A link or the like.
    #[error("only files and folders have content to keep")]
    NoContent,
    /// The list is full.
    #[error("there are {MAX_PINS} pins already")]
    TooMany,
    /// The index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// One file or folder whose content is to be here.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pin {
    /// Whose it is.
    pub owner: DeviceId,
    /// Where it is.
    pub location: LocationId,
    /// What that was called last.
    pub location_name: String,
    /// The log in which the file id means what it did: after the owner had to build its index
    /// anew, the file is found by its path.
    pub log_id: u64,
    /// Its id.
    pub file: FileId,
    /// Where it was last, below the location's folder.
    pub path: Vec<Name>,
    /// When it was pinned.
    pub since: Time,
    /// The location was seen to be removed.
    #[serde(default)]
    pub gone: bool,
}

impl Pin {
    pub(super) fn key(&self) -> PinKey {
        (self.location, self.file)
    }
}

#[derive(Serialize, Deserialize)]
struct Document {
    format: u32,
    pins: Vec<Pin>,
}

/// The list, and its file.
#[derive(Debug)]
pub struct PinFile {
    path: PathBuf,
    pins: Mutex<Vec<Pin>>,
    /// Held by the one writer, also while it waits for the disk.
    writing: Mutex<()>,
    /// Where the list is that could not be read at the start.
    damaged: Mutex<Option<PathBuf>>,
}

impl PinFile {
    /// Reads the list; a file that does not exist is an empty one, and one that is damaged stays
    /// where it is until there is another list to write.
    pub fn open(path: &Path) -> Result<Self, PinError> {
        let failed = |source| PinError::Io { path: path.to_owned(), source };
        let (pins, damaged) = match fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => (Vec::new(), None),
            Err(e) => return Err(failed(e)),
            Ok(bytes) => match parse(path, &bytes)? {
                Some(pins) => (pins, None),
                None => (Vec::new(), Some(path.to_owned())),
            },
        };
        let (pins, damaged, writing) = (Mutex::new(pins), Mutex::new(damaged), Mutex::default());
        Ok(Self { path: path.to_owned(), pins, writing, damaged })
    }

    /// Where the list is now that was damaged at the start.
    pub fn damaged(&self) -> Option<PathBuf> {
        lock(&self.damaged).clone()
    }

    /// Whether the cache must hold what it has until it is known what of it is pinned. Of a list
    /// that was damaged that is never known.
    pub fn holds(&self) -> bool {
        self.damaged().is_some() || !lock(&self.pins).is_empty()
    }

    /// The pins, in the order in which they were made.
    pub fn pins(&self) -> Vec<Pin> {
        lock(&self.pins).clone()
    }

    /// Whether there is this one.
    pub(super) fn contains(&self, key: PinKey) -> bool {
        lock(&self.pins).iter().any(|pin| pin.key() == key)
    }

    /// Adds one; `false`: it was there.
    pub(super) fn add(&self, pin: Pin) -> Result<bool, PinError> {
        self.update(|pins| {
            if pins.iter().any(|known| known.key() == pin.key()) {
                return Ok(false);
            }
            if pins.len() >= MAX_PINS {
                return Err(PinError::TooMany);
            }
            pins.push(pin);
            Ok(true)
        })
    }

    /// Removes one; `false`: it was not there.
    pub(super) fn remove(&self, key: PinKey) -> Result<bool, PinError> {
        self.update(|pins| {
            let before = pins.len();
            pins.retain(|pin| pin.key() != key);
            Ok(pins.len() < before)
        })
    }

    /// What these pins name is called otherwise now.
    pub(super) fn replace(&self, changed: &[(PinKey, Pin)]) -> Result<(), PinError> {
        self.update(|pins| {
            for (key, new) in changed {
                pins.iter_mut().filter(|pin| pin.key() == *key).for_each(|pin| *pin = new.clone());
            }
            // Two may name one file by now.
            let mut keys = std::collections::HashSet::new();
            pins.retain(|pin| keys.insert(pin.key()));
            Ok(())
        })
    }

    /// Changes the list and makes that durable; on an error nothing is changed.
    fn update<T>(
        &self,
        change: impl FnOnce(&mut Vec<Pin>) -> Result<T, PinError>,
    ) -> Result<T, PinError> {
        let _writing = lock(&self.writing);
        let mut document = Document { format: FORMAT, pins: self.pins() };
        let result = change(&mut document.pins)?;
        if document.pins != *lock(&self.pins) {
            let failed = |source| PinError::Io { path: self.path.clone(), source };
            self.keep_damaged().map_err(failed)?;
            write_durably(&self.path, &document).map_err(failed)?;
            *lock(&self.pins) = document.pins;
        }
        Ok(result)
    }

    /// Copies a damaged list that is about to be replaced. It is not renamed: without any list,
    /// the next start would take nothing for pinned.
    fn keep_damaged(&self) -> io::Result<()> {
        let mut damaged = lock(&self.damaged);
        if damaged.as_ref().is_some_and(|place| *place == self.path) {
            let aside = unused(&self.path);
            match fs::copy(&self.path, &aside).and_then(|_| fs::File::open(&aside)?.sync_all()) {
                // Somebody has moved it away, which does not make known what is pinned.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => {
                    let _ = fs::remove_file(&aside);
                    return Err(e);
                }
                Ok(()) => {}
            }
            *damaged = Some(aside);
        }
        Ok(())
    }
}

/// `None`: it is damaged.
fn parse(path: &Path, bytes: &[u8]) -> Result<Option<Vec<Pin>>, PinError> {
    #[derive(Deserialize)]
    struct Header {
        format: u32,
    }
    match serde_json::from_slice::<Header>(bytes) {
        Ok(Header { format: found }) if found > FORMAT => {
            Err(PinError::Newer { path: path.to_owned(), found })
        }
        Ok(_) => Ok(serde_json::from_slice::<Document>(bytes).ok().map(|document| document.pins)),
        Err(_) => Ok(None),
    }
}

/// A name beside this file that nothing has.
fn unused(path: &Path) -> PathBuf {
    let name = |n: u32| path.with_extension(format!("json.damaged-{n}"));
    (1..).map(name).find(|aside| !aside.exists()).unwrap_or_else(|| name(0))
}
