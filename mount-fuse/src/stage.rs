//! Answers to the calls that are made for the sake of their events.
//!
//! The [`Helper`](crate::helper) makes calls whose effect is there already. The
//! kernel first asks what the names are, to see whether the call is possible: so the one that
//! is to be made is not there yet, the one that is to be removed still is. Then comes the call
//! itself, and is answered with success. Nothing that the helper asks for is ever done: what does
//! not belong to the call being made is refused.
//!
//! The helper is known by the number of its thread, which FUSE gives with each request, and which
//! it shows with the one request that only it can make ([`Proof`]). It stays known until it has
//! ended and before its number is free again: no late call of it is taken for somebody else's,
//! and nobody else's for its own.

use fuser::{Errno, Request};
use rustix::rand::GetRandomFlags;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vfs_core::drive::{Found, HandleId, InodeNo};

/// For how long what a program did through the mount is not told again.
const FRESH: Duration = Duration::from_secs(1);
/// Half of what is remembered of it.
const FRESH_MAX: usize = 4096;

/// A name of a directory.
pub(crate) type Spot = (InodeNo, Vec<u8>);

/// The call that is being made.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// The name is made.
    Make(Spot),
    /// The name is removed.
    Remove(Spot, Found),
    /// What is found now under the second name is moved to it from the first one.
    Move(Spot, Spot, Option<Found>),
    /// Nothing but attributes is set.
    Touch,
}

/// An attribute of the mount's root that only one helper knows of: who asks for it is that helper,
/// who answers is this mount.
#[derive(Clone, Debug)]
pub(crate) struct Proof {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Proof {
    const PREFIX: &str = "user.spacedrive.events.";
    pub(crate) const VALUE_LEN: usize = 32;

    pub(crate) fn draw() -> Result<Self, rustix::io::Errno> {
        let word = || -> Result<String, rustix::io::Errno> {
            let mut bytes = [0; 16];
            let drawn = rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
            (drawn == bytes.len()).then_some(()).ok_or(rustix::io::Errno::IO)?;
            Ok(format!("{:032x}", u128::from_ne_bytes(bytes)))
        };
        Ok(Self { name: format!("{}{}", Self::PREFIX, word()?), value: word()? })
    }
}

/// What the helper is told of a name.
#[derive(Debug)]
pub(crate) enum Look {
    /// That it is not there.
    Absent,
    /// That it is this.
    Ghost(Found),
    /// What is found under this one.
    As(Spot),
    /// The truth, which must not be remembered while the call is being made.
    Briefly,
    /// The truth.
    Plain,
}

/// What the adapter and the thread that tells of changes have in common.
#[derive(Debug)]
pub(crate) struct Stage {
    /// Whether there is such a thread.
    is_used: bool,
    helper: AtomicU32,
    state: Mutex<State>,
    fresh: Mutex<Recent>,
    /// The files that programs have open for writing.
    writers: Mutex<BTreeSet<(InodeNo, HandleId)>>,
}

#[derive(Debug, Default)]
struct State {
    act: Option<Act>,
    /// The call has been answered.
    is_done: bool,
    proof: Option<Proof>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Fresh {
    Name(InodeNo, Vec<u8>),
    Inode(InodeNo),
}

/// What programs did lately, in two halves: when the younger one is old or full, the older one
/// is forgotten, so that keeping it costs the same however much it is.
#[derive(Debug, Default)]
struct Recent {
    young: HashMap<Fresh, Instant>,
    old: HashMap<Fresh, Instant>,
    /// When the younger half began.
    since: Option<Instant>,
}

impl Recent {
    fn note(&mut self, what: Fresh, now: Instant) {
        let is_over = self.since.is_none_or(|since| now.duration_since(since) >= FRESH);
        if is_over || self.young.len() >= FRESH_MAX {
            self.old = std::mem::take(&mut self.young);
            self.since = Some(now);
        }
        self.young.insert(what, now);
    }

    fn has(&self, what: &Fresh, now: Instant) -> bool {
        let at = self.young.get(what).or_else(|| self.old.get(what));
        at.is_some_and(|at| now.duration_since(*at) < FRESH)
    }
}

impl Stage {
    /// Nothing is remembered for a stage that is not used.
    pub(crate) fn new(is_used: bool) -> Self {
        let (helper, state, fresh, writers) = Default::default();
        Self { is_used, helper, state, fresh, writers }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on who proves it is the helper, or nobody is any more.
    pub(crate) fn expect(&self, helper: Option<Proof>) {
        self.lock().proof = helper;
        self.helper.store(0, Ordering::SeqCst);
    }

    /// The value of the attribute that proves who asks; `None` for every other one.
    pub(crate) fn prove(&self, request: &Request, name: &[u8]) -> Option<Vec<u8>> {
        if !name.starts_with(Proof::PREFIX.as_bytes()) {
            return None;
        }
        let state = self.lock();
        let proof = state.proof.as_ref().filter(|proof| proof.name.as_bytes() == name)?;
        // 0 is everybody that the mount's PID namespace has no number for.
        (request.pid() != 0).then(|| {
            self.helper.store(request.pid(), Ordering::SeqCst);
            proof.value.clone().into_bytes()
        })
    }

    pub(crate) fn is_helper(&self, request: &Request) -> bool {
        request.pid() != 0 && request.pid() == self.helper.load(Ordering::SeqCst)
    }

    /// This call is made next; `None` when it is over.
    pub(crate) fn set(&self, act: Option<Act>) {
        let mut state = self.lock();
        (state.act, state.is_done) = (act, false);
    }

    /// How a lookup is answered.
    pub(crate) fn look(&self, request: &Request, dir: InodeNo, name: &[u8]) -> Look {
        // While no helper runs, nobody waits for a lock here.
        if self.helper.load(Ordering::SeqCst) == 0 {
            return Look::Plain;
        }
        let state = self.lock();
        let Some(act) = &state.act else { return Look::Plain };
        let is = |spot: &Spot| spot.0 == dir && spot.1 == name;
        let concerns = match act {
            Act::Make(at) | Act::Remove(at, _) => is(at),
            Act::Move(from, to, _) => is(from) || is(to),
            Act::Touch => false,
        };
        if !concerns {
            return Look::Plain;
        }
        if !self.is_helper(request) || state.is_done {
            return Look::Briefly;
        }
        match act {
            Act::Make(_) => Look::Absent,
            Act::Remove(_, ghost) => Look::Ghost(*ghost),
            Act::Move(from, to, _) if is(from) => Look::As(to.clone()),
            Act::Move(_, _, over) => over.map_or(Look::Absent, Look::Ghost),
            Act::Touch => Look::Plain,
        }
    }

    /// The helper's call has come: whether it is the one to be made.
    pub(crate) fn play(&self, is_it: impl FnOnce(&Act) -> bool) -> Result<(), Errno> {
        let mut state = self.lock();
        match state.act.as_ref().is_some_and(is_it) && !state.is_done {
            true => {
                state.is_done = true;
                Ok(())
            }
            false => Err(Errno::EPERM),
        }
    }

    /// Whether the helper may set attributes, none of which is changed, and open what it closes.
    pub(crate) fn touch(&self) -> Result<(), Errno> {
        match self.lock().act {
            Some(Act::Touch) => Ok(()),
            _ => Err(Errno::EPERM),
        }
    }

    /// A program has changed this name through the mount, and its kernel has told of it.
    pub(crate) fn did(&self, dir: InodeNo, name: &[u8]) {
        self.note(|| Fresh::Name(dir, name.to_owned()));
    }

    /// A program has changed this file through the mount.
    pub(crate) fn did_to(&self, ino: InodeNo) {
        self.note(|| Fresh::Inode(ino));
    }

    /// A program opened a file for writing.
    pub(crate) fn begins_to_write(&self, ino: InodeNo, handle: HandleId) {
        if self.is_used {
            self.writers().insert((ino, handle));
        }
    }

    /// A program closed a file, opened for writing or not.
    pub(crate) fn closes(&self, ino: InodeNo, handle: HandleId) {
        self.writers().remove(&(ino, handle));
    }

    /// Whether a program has the file open for writing: it is not closed by who wrote to it,
    /// whatever its owner has by now.
    pub(crate) fn is_being_written(&self, ino: InodeNo) -> bool {
        let all = (ino, HandleId(0))..=(ino, HandleId(u64::MAX));
        self.writers().range(all).next().is_some()
    }

    fn writers(&self) -> MutexGuard<'_, BTreeSet<(InodeNo, HandleId)>> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Also while there is no helper: the change may be found, and told, when there is one.
    fn note(&self, what: impl FnOnce() -> Fresh) {
        if self.is_used {
            self.fresh().note(what(), Instant::now());
        }
    }

    fn fresh(&self) -> MutexGuard<'_, Recent> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a program has just made this change itself.
    pub(crate) fn is_told(&self, dir: InodeNo, name: &[u8], ino: Option<InodeNo>) -> bool {
        let (fresh, now) = (self.fresh(), Instant::now());
        fresh.has(&Fresh::Name(dir, name.to_owned()), now)
            || ino.is_some_and(|ino| fresh.has(&Fresh::Inode(ino), now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_did_is_remembered_for_a_while_and_much_of_it_displaces_it() {
        let (mut recent, start) = (Recent::default(), Instant::now());
        let what = |n| Fresh::Inode(InodeNo(n));
        recent.note(what(0), start);
        recent.note(what(1), start + FRESH / 2);
        recent.note(what(2), start + FRESH);
        assert!(!recent.has(&what(0), start + FRESH));
        assert!(recent.has(&what(1), start + FRESH) && recent.has(&what(2), start + FRESH));
        (10..10 + 3 * FRESH_MAX as u64).for_each(|n| recent.note(what(n), start + FRESH));
        assert!(!recent.has(&what(2), start + FRESH));
        assert!(recent.young.len() + recent.old.len() <= 2 * FRESH_MAX);
    }

    #[test]
    fn what_a_program_did_before_there_was_a_helper_is_known_and_unused_stages_know_nothing() {
        let dir = InodeNo(5);
        for is_used in [true, false] {
            let stage = Stage::new(is_used);
            stage.did(dir, b"name");
            stage.did_to(InodeNo(6));
            assert_eq!(stage.is_told(dir, b"name", None), is_used);
            assert_eq!(stage.is_told(dir, b"another", Some(InodeNo(6))), is_used);
            assert!(!stage.is_told(dir, b"another", None));
        }
    }
}
