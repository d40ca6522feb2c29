//! What this device must remember even when its index is lost: the library,
//! its members, and this device's own locations.
//!
//! One small JSON file, replaced atomically (temporary file, fsync, rename,
//! fsync of the directory), because the index is rebuildable and this is not.
//! Members are a last-writer-wins log: a record with the higher [`Stamp`]
//! wins, on every device alike; a removal is a record, never an absence.

use crate::local::RootId;
use crate::model::{DeviceId, LocationId};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

/// The version of the file's format; a higher one found on disk is refused.
pub const FORMAT: u32 = 1;

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LibraryError {
    /// Reading or writing it failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is not what this program wrote.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A newer program wrote it.
    #[error("{path} has format {found}; this program knows {FORMAT} and older")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
}

/// A hybrid logical clock's reading: later ones compare greater, on every device,
/// however the wall clock is set back.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Stamp {
    /// Milliseconds since 1970, never smaller than in any stamp seen before.
    pub wall_ms: u64,
    /// Orders stamps of one millisecond.
    pub count: u32,
}

/// The largest lead over this device's wall clock that a peer's stamp may have, in ms.
/// A stamp further ahead is refused, so that one wrong clock cannot win for ever.
pub const MAX_LEAD_MS: u64 = 24 * 3600 * 1000;

impl Stamp {
    /// The next stamp after every one seen.
    fn after(last: Self, now_ms: u64) -> Self {
        if now_ms > last.wall_ms {
            Self { wall_ms: now_ms, count: 0 }
        } else {
            Self { wall_ms: last.wall_ms, count: last.count.saturating_add(1) }
        }
    }
}

/// A library: the set of devices that trust each other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LibraryInfo {
    /// 128 random bits in hexadecimal.
    pub id: String,
    /// What its person calls it.
    pub name: String,
}

/// A device of the library, or one that was removed from it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    /// Its key.
    pub id: DeviceId,
    /// Its name, unique among members, a directory name in the mount.
    pub name: String,
    /// When this record was made.
    pub stamp: Stamp,
    /// It is no longer a member.
    pub removed: bool,
    /// Socket addresses at which it was last reached, most recent first.
    pub addresses: Vec<std::net::SocketAddr>,
    /// Milliseconds since 1970 when it was last connected; local knowledge, not replicated.
    pub last_seen_ms: Option<u64>,
}

/// A folder of this device that the library may see.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OwnLocation {
    /// The same on every device.
    pub id: LocationId,
    /// Unique among this device's locations.
    pub name: String,
    /// The folder, absolute and without symlinks.
    pub root: PathBuf,
    /// Nobody may write to it through the drive.
    pub read_only: bool,
    /// The devices that may see it; `None` is all members.
    pub shared_with: Option<Vec<DeviceId>>,
    /// Which folder that is, once it was found: another one at its path is not taken for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_id: Option<RootId>,
}

/// The content of the file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// The library, once one was created or joined.
    pub library: Option<LibraryInfo>,
    /// Every device ever a member, this one included.
    pub members: Vec<Member>,
    /// This device's locations.
    pub locations: Vec<OwnLocation>,
    clock: Stamp,
}

impl State {
    /// The devices that are members now.
    pub fn active(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|m| !m.removed)
    }

    /// The member with this key, unless it was removed.
    pub fn member(&self, id: DeviceId) -> Option<&Member> {
        self.active().find(|m| m.id == id)
    }

    /// The member with this name.
    pub fn member_named(&self, name: &str) -> Option<&Member> {
        self.active().find(|m| m.name == name)
    }

    /// A stamp for a record made on this device now.
    pub fn next_stamp(&mut self) -> Stamp {
        self.clock = Stamp::after(self.clock, now_ms());
        self.clock
    }

    /// Takes a record from another device; `true` when it changed anything.
    pub fn merge(&mut self, record: Member) -> bool {
        if record.stamp.wall_ms > now_ms() + MAX_LEAD_MS {
            return false;
        }
        self.clock = self.clock.max(record.stamp);
        match self.members.iter_mut().find(|m| m.id == record.id) {
            Some(known) if known.stamp >= record.stamp => false,
            Some(known) => {
                let last_seen_ms = known.last_seen_ms;
                *known = Member { last_seen_ms, ..record };
                true
            }
            None => {
                self.members.push(Member { last_seen_ms: None, ..record });
                true
            }
        }
    }
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| d.as_millis() as u64)
}

/// The file and its content in memory.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    state: Mutex<State>,
}

impl Library {
    /// Reads the file; one that does not exist is an empty state.
    pub fn open(path: &Path) -> Result<Self, LibraryError> {
        let state = match fs::read(path) {
            Ok(bytes) => parse(path, &bytes)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                State { format: FORMAT, ..State::default() }
            }
            Err(source) => return Err(LibraryError::Io { path: path.to_owned(), source }),
        };
        Ok(Self { path: path.to_owned(), state: Mutex::new(state) })
    }

    /// A copy of the state.
    pub fn state(&self) -> State {
        self.lock().clone()
    }

    /// Looks at the state without copying it; keep it short, others wait.
    pub fn with<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.lock())
    }

    /// Changes the state and makes it durable; on an error nothing is changed.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, LibraryError> {
        let mut state = self.lock();
        let mut next = state.clone();
        let result = change(&mut next);
        if next != *state {
            write_durably(&self.path, &next)
                .map_err(|source| LibraryError::Io { path: self.path.clone(), source })?;
            *state = next;
        }
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic inside `update` leaves the old state in place, so it is sound to go on.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<State, LibraryError> {
    #[derive(Deserialize)]
    struct Header {
        format: u32,
    }
    let damaged = |e: serde_json::Error| LibraryError::Damaged {
        path: path.to_owned(),
        reason: e.to_string(),
    };
    let header: Header = serde_json::from_slice(bytes).map_err(damaged)?;
    if header.format > FORMAT {
        return Err(LibraryError::Newer { path: path.to_owned(), found: header.format });
    }
    serde_json::from_slice(bytes).map_err(damaged)
}

fn write_durably(path: &Path, state: &State) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    serde_json::to_writer_pretty(&mut file, state)?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(stamp: Stamp, name: &str) -> Member {
        Member {
            id: DeviceId([7; 32]),
            name: name.into(),
            stamp,
            removed: false,
            addresses: vec![],
            last_seen_ms: None,
        }
    }

    #[test]
    fn a_clock_set_back_never_runs_backwards() {
        let last = Stamp { wall_ms: 5_000, count: 3 };
        assert!(Stamp::after(last, 1_000) > last);
        assert!(Stamp::after(last, 5_000) > last);
        assert_eq!(Stamp::after(last, 6_000), Stamp { wall_ms: 6_000, count: 0 });
    }

    #[test]
    fn the_later_record_wins_in_any_order() {
        let early = member(Stamp { wall_ms: 1, count: 0 }, "old");
        let late = member(Stamp { wall_ms: 1, count: 1 }, "new");
        for order in [[&early, &late], [&late, &early]] {
            let mut state = State::default();
            for record in order {
                state.merge(record.clone());
            }
            assert_eq!(state.members[0].name, "new");
        }
    }

    #[test]
    fn a_stamp_from_far_ahead_is_refused() {
        let mut state = State::default();
        assert!(!state.merge(member(Stamp { wall_ms: u64::MAX, count: 0 }, "x")));
        assert!(state.next_stamp().wall_ms < u64::MAX);
    }

    #[test]
    fn what_was_written_is_read_again_and_a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("library.json");
        let library = Library::open(&path).unwrap();
        library.update(|s| s.members.push(member(Stamp::default(), "a"))).unwrap();
        assert_eq!(Library::open(&path).unwrap().state(), library.state());

        let newer = fs::read_to_string(&path).unwrap().replace("\"format\": 1", "\"format\": 2");
        fs::write(&path, newer).unwrap();
        assert!(matches!(Library::open(&path), Err(LibraryError::Newer { found: 2, .. })));
    }
}
