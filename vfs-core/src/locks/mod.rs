//! Locks of files: `flock` and record locks (`fcntl`), of the programs of this device and, by way
//! of each file's owner, of all devices.
//!
//! | module | what it is |
//! |---|---|
//! | [`table`] | the rules, as a pure table |
//! | `disk` | a holder's locks on a real file |
//! | [`peers`] | at the owner: what other devices' programs hold of its files |
//!
//! [`Locks`] is for the programs of this device. Each request is first compared with what other
//! programs of this device hold, without a round trip; then the owner is asked: for own files
//! the disk's kernel, for others the device that has them ([`Coordinator`]). An owner that is
//! away, or does not answer, is passed over: the lock then holds among the programs of this
//! device, and is asked for again when the owner is back ([`Locks::tend`]).
//!
//! One mutex a file orders what is asked of its owner, so that a lock never overtakes the
//! unlock before it. It is held while the owner is asked, which has a deadline.

mod disk;
pub mod peers;
pub mod table;

use crate::error::{FsError, FsResult, Kind as ErrorKind};
use crate::model::{DeviceId, FileId, LocationId};
use crate::source::BoxFuture;
use dashmap::DashMap;
use disk::DiskLock;
use serde::{Deserialize, Serialize};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use table::Table;
pub use table::{Held, Holder, Mode, Span};
use tokio::sync::{Mutex, Notify};
use tokio::time::{sleep, timeout};

/// What is asked of an owner.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LockRequest {
    /// A location of the owner.
    pub location: LocationId,
    /// A file in it.
    pub file: FileId,
    /// For whom; a number of the asking device's own.
    pub holder: Holder,
    /// Which bytes.
    pub span: Span,
    /// What to do.
    pub action: Action,
}

/// What a lock request does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Action {
    /// Takes or changes a lock, if it can be had now.
    Set(Mode),
    /// Gives it back.
    Clear,
    /// Only looks whether it could be had.
    Test(Mode),
}

/// What an owner answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum LockAnswer {
    /// Done; or nothing is in the way.
    Free,
    /// Somebody holds these bytes.
    Taken {
        /// Which.
        span: Span,
        /// How.
        mode: Mode,
    },
    /// The asking device has as many locks as it may.
    TooMany,
}

/// The way to the owners of other devices' files; `sync` implements it.
pub trait Coordinator: Send + Sync + 'static {
    /// Names the connection to this device; `None` while there is none. What an owner holds for
    /// this device must be asked for again on each new one.
    fn connection(&self, owner: DeviceId) -> Option<u64>;

    /// Asks, within a deadline of its own; `None`: no answer, or one that says nothing about the
    /// lock, as when the owner does not have the file yet.
    fn ask(&self, owner: DeviceId, request: LockRequest) -> BoxFuture<'_, Option<LockAnswer>>;
}

/// How soon a waiting program's lock is tried again, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause between two tries; those whose lock a program of this device gives back are
/// woken at once.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How often it is looked whether a waiting program was sent a signal.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked whether owners came back.
const TEND_EVERY: Duration = Duration::from_millis(500);

/// Whose file it is.
#[derive(Clone, Debug)]
pub enum Place {
    /// This device's, on its disk; `source` is any open handle of it.
    Own {
        /// Number of its file system.
        device: u64,
        /// Its number there.
        inode: u64,
        /// What locks are set on is opened anew from it.
        source: Arc<File>,
        /// The program may write to it.
        writes: bool,
    },
    /// Another device's.
    Remote {
        /// Which device's.
        owner: DeviceId,
        /// Where.
        location: LocationId,
        /// Which.
        file: FileId,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Key {
    Own(u64, u64),
    Remote(DeviceId, LocationId, FileId),
}

impl Place {
    fn key(&self) -> Key {
        match *self {
            Self::Own { device, inode, .. } => Key::Own(device, inode),
            Self::Remote { owner, location, file } => Key::Remote(owner, location, file),
        }
    }
}

/// A program's request.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// For whom.
    pub holder: Holder,
    /// Its process.
    pub pid: u32,
    /// Which bytes.
    pub span: Span,
    /// `None` gives back.
    pub mode: Option<Mode>,
}

/// The locks of this device's programs.
#[derive(Default)]
pub struct Locks {
    files: DashMap<Key, Arc<LockedFile>>,
    coordinator: OnceLock<Arc<dyn Coordinator>>,
}

#[derive(Default)]
struct LockedFile {
    state: Mutex<State>,
    /// Something was given back.
    freed: Notify,
}

#[derive(Default)]
struct State {
    table: Table,
    /// Own files: what is set on the disk.
    disk: HashMap<Holder, DiskLock>,
    /// Others' files: whose locks the owner may know otherwise than this table.
    unsettled: HashSet<Holder>,
    /// Others' files: the connection on which the owner was told the rest.
    connection: Option<u64>,
    /// It was logged that the owner gave a lock to somebody else.
    has_warned: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.table.is_empty() && self.unsettled.is_empty()
    }

    /// Notes what the owner agreed to, or could not be asked.
    fn note(&mut self, ask: &Ask) {
        let Ask { holder, pid, span, mode } = *ask;
        match mode {
            Some(mode) => self.table.set(Held { holder, pid, span, mode }),
            None => self.table.clear(holder, span),
        }
        if !self.table.holds(holder) {
            self.disk.remove(&holder);
        }
    }

    /// On a new connection the owner is to be told everything again.
    fn renew(&mut self, connection: u64) {
        if self.connection.replace(connection) != Some(connection) {
            self.unsettled.extend(self.table.iter().map(|h| h.holder));
        }
    }
}

impl Locks {
    /// Lets locks of other devices' files be coordinated by their owners.
    pub fn attach(&self, coordinator: Arc<dyn Coordinator>) {
        // Attached once, when the daemon is put together.
        let _ = self.coordinator.set(coordinator);
    }

    fn file(&self, key: Key) -> Arc<LockedFile> {
        Arc::clone(&self.files.entry(key).or_default())
    }

    /// Forgets files in which nothing is locked, unless somebody is at them: the map is the one
    /// way to them.
    fn sweep(&self) {
        self.files.retain(|_, file| {
            Arc::strong_count(file) > 1 || !file.state.try_lock().is_ok_and(|s| s.is_idle())
        });
    }

    /// Whether anybody holds anything of this file, or may: what a `close` asks first.
    pub fn knows(&self, place: &Place) -> bool {
        self.files.contains_key(&place.key())
    }

    /// Tries once; gives who is in the way.
    pub async fn set(&self, place: &Place, ask: Ask) -> FsResult<Option<Held>> {
        if ask.mode.is_none() && !self.knows(place) {
            return Ok(None);
        }
        let file = self.file(place.key());
        let mut state = file.state.lock().await;
        let taken = self.set_in(place, &mut state, &ask).await;
        if taken.as_ref().is_ok_and(Option::is_none) && ask.mode != Some(Mode::Exclusive) {
            file.freed.notify_waiters();
        }
        taken
    }

    async fn set_in(&self, place: &Place, state: &mut State, ask: &Ask) -> FsResult<Option<Held>> {
        if ask.mode.is_none() && !state.table.holds(ask.holder) {
            // What the owner may believe to be held is settled by `tend`.
            return Ok(None);
        }
        let in_the_way = ask.mode.and_then(|mode| state.table.conflict(ask.holder, ask.span, mode));
        if in_the_way.is_some() {
            return Ok(in_the_way);
        }
        let taken = match place {
            Place::Own { source, writes, .. } => set_on_disk(state, source, *writes, ask)?,
            Place::Remote { owner, location, file } => {
                self.set_at_owner(*owner, (*location, *file), state, ask).await?
            }
        };
        if taken.is_none() {
            state.note(ask);
        }
        Ok(taken)
    }

    async fn set_at_owner(
        &self,
        owner: DeviceId,
        (location, file): (LocationId, FileId),
        state: &mut State,
        ask: &Ask,
    ) -> FsResult<Option<Held>> {
        let Ask { holder, span, mode, .. } = *ask;
        let is_there = self.renew(owner, state);
        let action = mode.map_or(Action::Clear, Action::Set);
        let request = LockRequest { location, file, holder, span, action };
        let answer = match is_there {
            true => self.ask(owner, request).await,
            false => None,
        };
        match answer {
            Some(LockAnswer::Free) => Ok(None),
            Some(LockAnswer::Taken { span, mode }) => {
                Ok(Some(Held { holder: Holder(0), pid: 0, span, mode }))
            }
            Some(LockAnswer::TooMany) => {
                Err(FsError::new(ErrorKind::NoLocks, "lock more than the owner allows"))
            }
            None => {
                state.unsettled.insert(holder);
                Ok(None)
            }
        }
    }

    /// Whether the owner can be asked; marks what a new connection must be told.
    fn renew(&self, owner: DeviceId, state: &mut State) -> bool {
        let connection = self.coordinator.get().and_then(|c| c.connection(owner));
        connection.inspect(|connection| state.renew(*connection)).is_some()
    }

    async fn ask(&self, owner: DeviceId, request: LockRequest) -> Option<LockAnswer> {
        self.coordinator.get()?.ask(owner, request).await
    }

    /// Waits until the lock is there; `Interrupted` when `gives_up` says so, `WouldBlock` never.
    pub async fn wait(&self, place: &Place, ask: Ask, gives_up: impl Fn() -> bool) -> FsResult<()> {
        // Keeps the file, and with it whom it wakes, for as long as it waits.
        let file = self.file(place.key());
        let mut pause = FIRST_PAUSE;
        loop {
            let freed = file.freed.notified();
            tokio::pin!(freed);
            // From here on, not from the first poll on.
            freed.as_mut().enable();
            if self.set(place, ask).await?.is_none() {
                return Ok(());
            }
            let mut rest = pause;
            while !rest.is_zero() {
                if gives_up() {
                    return Err(FsError::new(ErrorKind::Interrupted, "wait for a lock"));
                }
                let look = rest.min(LOOK_EVERY);
                if timeout(look, freed.as_mut()).await.is_ok() {
                    break;
                }
                rest -= look;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// What keeps a lock from being given.
    pub async fn test(&self, place: &Place, ask: Ask, mode: Mode) -> FsResult<Option<Held>> {
        let Ask { holder, span, .. } = ask;
        let known = self.file(place.key());
        let state = known.state.lock().await;
        match (state.table.conflict(holder, span, mode), place) {
            (Some(held), _) => Ok(Some(held)),
            (None, Place::Own { source, writes, .. }) => match state.disk.get(&holder) {
                Some(disk) => disk.test(span, mode),
                None => DiskLock::new(open_again(source, *writes)?).test(span, mode),
            },
            (None, Place::Remote { owner, location, file }) => {
                let action = Action::Test(mode);
                let (location, file) = (*location, *file);
                let request = LockRequest { location, file, holder, span, action };
                Ok(match self.ask(*owner, request).await {
                    Some(LockAnswer::Taken { span, mode }) => {
                        Some(Held { holder: Holder(0), pid: 0, span, mode })
                    }
                    _ => None,
                })
            }
        }
    }

    /// Gives back everything that a holder has of a file.
    pub async fn clear(&self, place: &Place, holder: Holder) {
        let Some(file) = self.files.get(&place.key()).map(|f| Arc::clone(&f)) else { return };
        let mut state = file.state.lock().await;
        if !state.table.holds(holder) {
            return;
        }
        let ask = Ask { holder, pid: 0, span: Span::ALL, mode: None };
        if let Place::Remote { owner, location, file } = place {
            // Nothing but the table to be changed when it fails; it is told later then.
            let _ = self.set_at_owner(*owner, (*location, *file), &mut state, &ask).await;
        }
        state.note(&ask);
        file.freed.notify_waiters();
    }

    /// Tells owners that came back what this device's programs hold and what they gave back
    /// meanwhile. Runs for as long as the daemon does.
    pub async fn tend(self: Arc<Self>) {
        loop {
            sleep(TEND_EVERY).await;
            let remote = |key: &Key| match *key {
                Key::Remote(owner, location, file) => Some((owner, location, file)),
                Key::Own(..) => None,
            };
            let files: Vec<_> = self
                .files
                .iter()
                .filter_map(|f| Some((remote(f.key())?, f.value().clone())))
                .collect();
            for ((owner, location, file), locked) in files {
                let mut state = locked.state.lock().await;
                self.settle(owner, (location, file), &mut state).await;
            }
            self.sweep();
        }
    }

    async fn settle(&self, owner: DeviceId, place: (LocationId, FileId), state: &mut State) {
        if !self.renew(owner, state) {
            // What was given back meanwhile ends there with the lease of the connection.
            let State { table, unsettled, .. } = state;
            unsettled.retain(|holder| table.holds(*holder));
            return;
        }
        let unsettled: Vec<_> = state.unsettled.iter().copied().collect();
        for holder in unsettled {
            match self.tell(owner, place, state, holder).await {
                Told::All => _ = state.unsettled.remove(&holder),
                Told::Nothing => return,
                Told::Lost if state.has_warned => {}
                Told::Lost => {
                    state.has_warned = true;
                    tracing::warn!(file = place.1.0, %owner, "a lock held here was given to another device or program while its owner could not be reached");
                }
            }
        }
    }

    /// Brings what the owner holds for a holder in line with the table.
    async fn tell(
        &self,
        owner: DeviceId,
        (location, file): (LocationId, FileId),
        state: &State,
        holder: Holder,
    ) -> Told {
        let held: Vec<Held> = state.table.of(holder).copied().collect();
        let request = |span, action| LockRequest { location, file, holder, span, action };
        // What is held is asked for first and not given back in between. Only where nothing is
        // held any more is all given back.
        let mut asks: Vec<_> = held.iter().map(|h| request(h.span, Action::Set(h.mode))).collect();
        if asks.is_empty() {
            asks.push(request(Span::ALL, Action::Clear));
        }
        let mut told = Told::All;
        for ask in asks.into_iter().chain(gaps(&held).map(|gap| request(gap, Action::Clear))) {
            match self.ask(owner, ask).await {
                Some(LockAnswer::Free) => {}
                Some(_) => told = Told::Lost,
                None => return Told::Nothing,
            }
        }
        told
    }
}

enum Told {
    /// The owner knows, and agrees.
    All,
    /// Somebody else has it by now.
    Lost,
    /// No answer.
    Nothing,
}

/// The bytes between the locks of a holder, when there are any locks.
fn gaps(held: &[Held]) -> impl Iterator<Item = Span> + use<> {
    let mut spans: Vec<Span> = held.iter().map(|h| h.span).collect();
    spans.sort_by_key(|s| s.first());
    let mut gaps = Vec::new();
    let mut next = (!spans.is_empty()).then_some(0);
    for span in spans {
        let before = span.first().checked_sub(1);
        gaps.extend(next.zip(before).and_then(|(first, last)| Span::new(first, last)));
        next = span.last().checked_add(1);
    }
    gaps.extend(next.and_then(|first| Span::new(first, Span::ALL.last())));
    gaps.into_iter()
}

fn set_on_disk(
    state: &mut State,
    source: &File,
    writes: bool,
    ask: &Ask,
) -> FsResult<Option<Held>> {
    let Ask { holder, span, mode, .. } = *ask;
    let State { table, disk, .. } = state;
    let lock = match disk.entry(holder) {
        Entry::Occupied(there) => there.into_mut(),
        Entry::Vacant(free) => free.insert(DiskLock::new(open_again(source, writes)?)),
    };
    if mode == Some(Mode::Exclusive) && writes && !lock.is_writable()? {
        // The process opened the file again, now for writing.
        let mut replacement = DiskLock::new(open_again(source, writes)?);
        if !replacement.take(table.of(holder))? {
            return Err(FsError::new(ErrorKind::NoLocks, "carry locks to another open file"));
        }
        *lock = replacement;
    }
    let taken = match (lock.set(span, mode), mode) {
        (Ok(true), _) | (Ok(false), None) => Ok(None),
        (Ok(false), Some(mode)) => {
            let seen = lock.test(span, mode)?;
            Ok(Some(seen.unwrap_or(Held { holder: Holder(0), pid: 0, span, mode })))
        }
        (Err(error), _) => Err(error),
    };
    if !table.holds(holder) && !matches!(taken, Ok(None)) {
        disk.remove(&holder);
    }
    taken
}

/// A description of its own of an open file. For writing only where the program writes: a file
/// that is open for writing cannot be executed, and `flock` is used on programs, too.
fn open_again(source: &File, writes: bool) -> FsResult<File> {
    use rustix::fs::{CWD, Mode as Perm, OFlags, openat};
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", source.as_raw_fd());
    let flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let open = |access| openat(CWD, &path, flags | access, Perm::empty());
    let opened = match writes {
        true => open(OFlags::RDWR).or_else(|_| open(OFlags::WRONLY)),
        false => open(OFlags::RDONLY),
    };
    opened.map(File::from).map_err(|e| FsError::os("open a file to lock it", e))
}

#[cfg(test)]
mod tests;
