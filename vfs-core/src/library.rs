//! What this device must remember even when its index is lost: the library,
//! its members, and this device's own locations.
//!
//! One small JSON file, replaced atomically (temporary file, fsync, rename,
//! fsync of the directory), because the index is rebuildable and this is not.
//! Members are a last-writer-wins log: a record with the higher [`Stamp`]
//! wins, on every device alike; a removal is a record, never an absence, and
//! wins over every other record of the same [`Member::life`], whatever its stamp.

use crate::local::RootId;
use crate::model::{DeviceId, LocationId};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

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
/// The largest count of a stamp that is taken: above it there would soon be no later one.
pub const MAX_COUNT: u32 = u32::MAX / 2;
/// By how many lives a record may run ahead of the one known: far more than any device was
/// ever admitted again, far fewer than there are.
const MAX_LEAP: u64 = u32::MAX as u64;

impl Stamp {
    /// The next stamp after every one seen.
    fn after(last: Self, now_ms: u64) -> Self {
        if now_ms > last.wall_ms {
            Self { wall_ms: now_ms, count: 0 }
        } else if last.count < MAX_COUNT {
            Self { wall_ms: last.wall_ms, count: last.count + 1 }
        } else {
            Self { wall_ms: last.wall_ms.saturating_add(1), count: 0 }
        }
    }

    /// Whether there are stamps enough after this one, on this device's clock.
    fn is_credible(self, now_ms: u64) -> bool {
        self.count <= MAX_COUNT && self.wall_ms <= now_ms.saturating_add(MAX_LEAD_MS)
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
    /// How often it was admitted again after a removal. Only an admission begins another
    /// life, so that no record of the life before undoes the removal that ended it.
    #[serde(default)]
    pub life: u64,
    /// When this record was made.
    pub stamp: Stamp,
    /// It is no longer a member.
    pub removed: bool,
    /// Socket addresses at which it was last reached, most recent first.
    pub addresses: Vec<std::net::SocketAddr>,
    /// Milliseconds since 1970 when it was last connected; local knowledge, not replicated.
    pub last_seen_ms: Option<u64>,
}

impl Member {
    /// The greater of two records of one device is the one that counts.
    fn rank(&self) -> (u64, bool, Stamp) {
        (self.life, self.removed, self.stamp)
    }
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
        self.stamp_at(now_ms())
    }

    /// The same by a clock that says this.
    pub(crate) fn stamp_at(&mut self, now_ms: u64) -> Stamp {
        self.clock = Stamp::after(self.clock, now_ms);
        self.clock
    }

    /// The life that a device has when it is admitted now.
    pub fn life_of(&self, id: DeviceId) -> u64 {
        match self.members.iter().find(|m| m.id == id) {
            Some(known) if known.removed => known.life.saturating_add(1),
            Some(known) => known.life,
            None => 0,
        }
    }

    /// Takes a record from another device; `true` when it changed anything.
    ///
    /// A stamp too far ahead is refused, before the clock is moved to it. Only of a removal
    /// it is not, and does not move the clock: a device is not to become unremovable because
    /// a clock is wrong.
    pub fn merge(&mut self, record: Member) -> bool {
        self.merge_at(record, now_ms())
    }

    /// The same by a clock that says this.
    pub(crate) fn merge_at(&mut self, record: Member, now_ms: u64) -> bool {
        if record.stamp.is_credible(now_ms) {
            self.clock = self.clock.max(record.stamp);
        } else if !record.removed {
            return false;
        }
        match self.members.iter_mut().find(|m| m.id == record.id) {
            Some(known) if known.rank() >= record.rank() => false,
            Some(known) if record.life - known.life > MAX_LEAP => false,
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

    /// Forgets the removed device with the oldest record, to make room for another.
    pub fn forget_oldest_removed(&mut self) -> bool {
        let removed = self.members.iter().enumerate().filter(|(_, m)| m.removed);
        let oldest = removed.min_by_key(|(_, m)| m.stamp).map(|(at, _)| at);
        oldest.map(|at| self.members.remove(at)).is_some()
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
    state: RwLock<State>,
    /// Held by the one writer, also while it waits for the disk; readers do not wait for it.
    writing: Mutex<()>,
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
        Ok(Self { path: path.to_owned(), state: RwLock::new(state), writing: Mutex::default() })
    }

    /// A copy of the state.
    pub fn state(&self) -> State {
        self.with(State::clone)
    }

    /// Looks at the state without copying it; keep it short, a writer waits.
    pub fn with<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        // A panic in a writer leaves the old state in place, so it is sound to go on.
        look(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the state and makes it durable; on an error nothing is changed.
    pub fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> Result<T, LibraryError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = self.state();
        let result = change(&mut next);
        if self.with(|state| next != *state) {
            write_durably(&self.path, &next)
                .map_err(|source| LibraryError::Io { path: self.path.clone(), source })?;
            *self.state.write().unwrap_or_else(PoisonError::into_inner) = next;
        }
        Ok(result)
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

/// Replaces a file by a document: whole, and there after a crash, or not at all.
pub(crate) fn write_durably(path: &Path, state: &impl Serialize) -> io::Result<()> {
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
            life: 0,
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
    fn a_stamp_with_no_room_after_it_is_refused_and_does_not_move_the_clock() {
        let mut state = State::default();
        let now = now_ms();
        let last = Stamp { wall_ms: now + 1_000_000, count: u32::MAX };
        assert!(!state.merge(member(last, "x")));
        assert!(state.next_stamp().wall_ms <= now_ms());

        // The largest that is taken is followed by one that is taken, too.
        let largest = Stamp { wall_ms: now + 1_000_000, count: MAX_COUNT };
        assert!(state.merge(member(largest, "x")));
        let stamp = state.next_stamp();
        assert!(state.merge(member(stamp, "y")));
    }

    #[test]
    fn a_removal_ends_a_life_and_only_an_admission_begins_another() {
        let at = |wall_ms| Stamp { wall_ms, count: 0 };
        let removal = |stamp| Member { removed: true, ..member(stamp, "x") };
        for stamp in [at(5), at(u64::MAX), Stamp { wall_ms: 5, count: u32::MAX }] {
            let mut state = State::default();
            state.merge(member(at(7), "x"));
            assert!(state.merge(removal(stamp)), "{stamp:?}");
            assert!(!state.merge(member(at(9), "x")), "it cannot undo its removal");
            assert_eq!(state.active().count(), 0);
            assert!(state.next_stamp().wall_ms < u64::MAX);

            let life = state.life_of(DeviceId([7; 32]));
            assert!(state.merge(Member { life, ..member(at(8), "x") }));
            assert!(!state.merge(removal(at(20))), "of the life before");
            assert_eq!((life, state.life_of(DeviceId([7; 32]))), (1, 1));
        }
    }

    #[test]
    fn lives_cannot_be_used_up() {
        let mut state = State::default();
        state.merge(member(Stamp::default(), "x"));
        let removal = Member { removed: true, ..member(Stamp::default(), "x") };
        assert!(!state.merge(Member { life: u64::MAX, ..removal.clone() }));
        assert!(state.merge(Member { life: 3, ..removal }));
    }

    #[test]
    fn readers_do_not_wait_for_a_writer_that_is_at_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let library = std::sync::Arc::new(Library::open(&dir.path().join("l.json")).unwrap());
        let reader = library.clone();
        let answered = library.update(|_| {
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || tell.send(reader.with(|s| s.members.len())));
            told.recv_timeout(std::time::Duration::from_secs(10))
        });
        assert_eq!(answered.unwrap(), Ok(0));
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
