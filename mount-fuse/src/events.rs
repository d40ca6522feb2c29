//! Telling programs that watch a directory what changed in it elsewhere.
//!
//! A thread of its own gathers changes, looks who watches, and has the
//! [`Helper`](crate::helper) make the calls that [`Drive::events`] names, while the
//! [`Stage`](crate::stage) answers them. It waits for the kernel, for the helper and so for
//! the threads that serve the kernel; nothing ever waits for it.
//!
//! Who watches is looked up after the changes, so no watch is missed; and as seldom as keeps
//! its cost small. When too much changes for that, those are told at once of whom it is known,
//! and who is found later is told that much changed. Without a watch there is no helper.
//!
//! For the moment of a call the kernel is told that a name is gone that is there, or there that is
//! gone, and takes away what is mounted on it. So of names with a mount on them or below
//! ([`Inside`]) only the directories are told.

use crate::helper::{self, Helper, HelperCommand};
use crate::inside::Inside;
use crate::mounts::DeviceNo;
use crate::notify::Kernel;
use crate::stage::{Act, Proof, Spot, Stage};
use crate::watches;
use rustix::io::Errno;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use vfs_core::changes::Next;
use vfs_core::drive::{Backlog, Drive, Event, Found, InodeNo, Pending, Place};
use vfs_core::error::Kind;
use vfs_core::model::FileType;

/// Changes that belong together, as the two names of a move, come within this time.
const SETTLE: Duration = Duration::from_millis(20);
/// Looking who watches takes one part in so many of a processor's time, while nobody does…
const LOOK_SHARE: u32 = 100;
/// …while somebody does…
const LOOK_SHARE_WATCHED: u32 = 10;
/// …and where that would be more seldom than this, if nothing more than…
const LOOK_EVERY: Duration = Duration::from_millis(600);
/// …this part.
const LOOK_SHARE_MAX: u32 = 5;
/// How many calls are made before the helper has to find the mount again.
const BATCH: usize = 64;
/// How long who takes the mount away waits for the call that is being made.
const QUIET_PATIENCE: Duration = Duration::from_secs(2);
/// A file that has grown is told when its new size is shown; and every so often while that has to
/// wait, as it may go on growing without an end.
const GROWTH_PATIENCE: Duration = Duration::from_secs(1);
/// How often a name is made anew that a program has looked up meanwhile.
const TRIES: usize = 3;
/// The next helper is started no sooner after the last one was.
const RESTART_AFTER: Duration = Duration::from_secs(2);
/// And later and later, up to this, while none is of use.
const RESTART_AFTER_AT_LAST: Duration = Duration::from_secs(60);

/// The thread; it ends when this is dropped, after the call that it is having made.
pub(crate) struct Teller {
    _stop: oneshot::Sender<()>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Held while the helper has the mount open.
    quiet: Mutex<()>,
    /// How many wait for that to end, or have it so.
    quiet_wanted: AtomicUsize,
    /// Why nobody is told.
    trouble: Mutex<Option<String>>,
}

/// What the thread needs.
pub(crate) struct Parts {
    pub drive: Arc<Drive>,
    pub kernel: Kernel,
    pub stage: Arc<Stage>,
    pub mountpoint: PathBuf,
    pub device: DeviceNo,
    pub command: HelperCommand,
}

impl Teller {
    pub(crate) fn start(parts: Parts, runtime: &Handle) -> io::Result<Self> {
        let changes = parts.drive.subscribe();
        let (stop, stopped) = oneshot::channel();
        let (shared, runtime) = (Arc::new(Shared::default()), runtime.clone());
        helper::keep_children(&runtime)?;
        let telling = Telling {
            inside: Inside::new(parts.device),
            parts,
            shared: Arc::clone(&shared),
            helper: None,
            restart_from: Instant::now(),
            restart_pause: RESTART_AFTER,
            ending: None,
            rest_until: Instant::now(),
            growing_since: None,
            watched: HashSet::new(),
            look_from: Instant::now(),
            is_hurried: false,
        };
        let run = move || telling.run(&runtime, changes, stopped);
        thread::Builder::new().name("sd-events".into()).spawn(run)?;
        Ok(Self { _stop: stop, shared })
    }

    /// Why programs that watch are not told, if they are not.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.shared.trouble().clone()
    }

    /// While this is held, the helper does not keep the mount busy; unless a call takes very long.
    pub(crate) fn quiet(&self) -> Quiet<'_> {
        let Shared { quiet, quiet_wanted, .. } = &*self.shared;
        quiet_wanted.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        let held = loop {
            match quiet.try_lock() {
                Ok(guard) => break Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => break Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if start.elapsed() > QUIET_PATIENCE => break None,
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        };
        Quiet { wanted: quiet_wanted, _held: held }
    }
}

/// No call is made while this is there.
pub(crate) struct Quiet<'a> {
    wanted: &'a AtomicUsize,
    _held: Option<MutexGuard<'a, ()>>,
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.wanted.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_quiet_wanted(&self) -> bool {
        self.quiet_wanted.load(Ordering::SeqCst) > 0
    }
}

struct Telling {
    parts: Parts,
    inside: Inside,
    shared: Arc<Shared>,
    helper: Option<Helper>,
    restart_from: Instant,
    restart_pause: Duration,
    /// The one before, if it has not ended: there is never another beside it.
    ending: Option<thread::JoinHandle<()>>,
    /// Telling takes half of the time at most.
    rest_until: Instant,
    /// Since when something is told later because files are growing.
    growing_since: Option<Instant>,
    /// Who watched at the last look.
    watched: HashSet<InodeNo>,
    look_from: Instant,
    /// Since then something was told to these alone.
    is_hurried: bool,
}

/// Why the thread woke.
enum Wake {
    Change(Next),
    Due,
    Stop,
}

impl Telling {
    fn run(
        mut self,
        runtime: &Handle,
        mut changes: vfs_core::changes::Subscription,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let (mut pending, mut due) = (Pending::default(), None);
        loop {
            let wake = runtime.block_on(async {
                tokio::select! {
                    biased;
                    _ = &mut stopped => Wake::Stop,
                    () = at(due) => Wake::Due,
                    next = changes.next() => next.map_or(Wake::Stop, Wake::Change),
                }
            });
            match wake {
                Wake::Change(Next::Batch(batch)) => pending.add(&batch),
                Wake::Change(Next::Missed) => pending.missed(),
                Wake::Due => {
                    let start = Instant::now();
                    self.tell(&mut pending, &mut stopped);
                    self.rest_until = Instant::now() + start.elapsed();
                }
                Wake::Stop => break,
            }
            due = match due {
                // Of a hurry it is still to be seen who began to watch in it.
                _ if pending.is_empty() && !self.is_hurried => None,
                _ if pending.is_full() => Some(self.rest_until),
                Some(due) if due > Instant::now() => Some(due),
                _ => Some(self.look_from.max(self.rest_until).max(Instant::now() + SETTLE)),
            };
        }
        self.end_helper();
    }

    /// Tells who watches; what could not be told stays to be told in one.
    fn tell(&mut self, pending: &mut Pending, stopped: &mut oneshot::Receiver<()>) {
        let mut changed = pending.take();
        let growing = self.parts.drive.hold_back_growing(&mut changed);
        let growing = self.still_growing(growing, &mut changed);
        let newcomers = match Instant::now() < self.look_from {
            true => {
                self.is_hurried = true;
                HashSet::new()
            }
            false => self.look(),
        };
        if self.watched.is_empty() {
            return self.end_helper();
        }
        if self.helper.is_none() && Instant::now() < self.restart_from {
            return self.put_off(pending);
        }
        let drive = &self.parts.drive;
        let mut events = drive.events(changed, &self.watched);
        events.extend(drive.events(Backlog::of_everything(), &newcomers));
        for batch in events.chunks(BATCH) {
            if stopped.try_recv() != Err(oneshot::error::TryRecvError::Empty) {
                return;
            }
            let told = self.tell_batch(batch);
            self.note(&told);
            if !told.is_ok_and(|Told { all }| all) {
                return self.put_off(pending);
            }
        }
        pending.put_back(growing);
    }

    /// What of this is told later; from time to time it is told now as well.
    fn still_growing(&mut self, mut growing: Backlog, changed: &mut Backlog) -> Backlog {
        if growing.is_empty() {
            self.growing_since = None;
            return growing;
        }
        let since = *self.growing_since.get_or_insert_with(Instant::now);
        if since.elapsed() > GROWTH_PATIENCE {
            self.growing_since = None;
            changed.extend(&growing);
            growing.only_grown();
        }
        growing
    }

    /// When there may be a helper again, all are told that something changed.
    fn put_off(&mut self, pending: &mut Pending) {
        pending.missed();
        if self.helper.is_none() {
            self.look_from = self.look_from.max(self.restart_from);
        }
    }

    /// Looks who watches; gives those of whom it was not known when others were told.
    fn look(&mut self) -> HashSet<InodeNo> {
        let start = processor_time();
        let watched = watches::watched(self.parts.device);
        if !watched.is_empty() {
            self.inside.look_elsewhere();
        }
        let took = processor_time().saturating_sub(start);
        self.look_from = Instant::now() + pause_after(took, watched.is_empty());
        let before = std::mem::replace(&mut self.watched, watched);
        match std::mem::take(&mut self.is_hurried) {
            true => self.watched.difference(&before).copied().collect(),
            false => HashSet::new(),
        }
    }

    fn start_helper(&mut self) -> io::Result<()> {
        if self.ending.as_ref().is_some_and(|ending| !ending.is_finished()) {
            return Err(io::Error::other("the process that tells them waits in a call"));
        }
        self.restart_from = Instant::now() + self.restart_pause;
        self.restart_pause = (2 * self.restart_pause).min(RESTART_AFTER_AT_LAST);
        let proof = Proof::draw()?;
        self.helper = Some(Helper::start(&self.parts.command, &proof)?);
        self.parts.stage.expect(Some(proof));
        Ok(())
    }

    fn end_helper(&mut self) {
        if let Some(helper) = self.helper.take() {
            let stage = Arc::clone(&self.parts.stage);
            self.ending = helper.end(move || stage.expect(None));
        }
    }

    fn tell_batch(&mut self, events: &[Event]) -> io::Result<Told> {
        if self.shared.is_quiet_wanted() {
            return Ok(Told { all: false });
        }
        let shared = Arc::clone(&self.shared);
        let _busy = shared.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        // A helper that is of no use may have the mount open.
        self.tell_all(events).inspect_err(|_| self.end_helper())
    }

    fn tell_all(&mut self, events: &[Event]) -> io::Result<Told> {
        if self.helper.is_none() {
            self.start_helper()?;
        }
        let Self { parts, shared, helper: Some(helper), inside, .. } = self else {
            return Ok(Told { all: false });
        };
        helper.open(parts.mountpoint.as_os_str().as_bytes())?;
        let mut told = Told { all: true };
        for event in events {
            if shared.is_quiet_wanted() {
                told.all = false;
                break;
            }
            tell_one(parts, helper, inside, event)?;
        }
        helper.close()?;
        self.restart_pause = RESTART_AFTER;
        Ok(told)
    }

    /// Says it once when nobody can be told.
    fn note(&self, told: &io::Result<Told>) {
        let mut trouble = self.shared.trouble();
        match told {
            Ok(_) => *trouble = None,
            Err(error) => {
                if trouble.is_none() {
                    tracing::warn!(%error, "programs that watch are not told of others' changes");
                }
                *trouble = Some(error.to_string());
            }
        }
    }
}

/// What became of some events.
struct Told {
    /// Otherwise the mount is being taken away.
    all: bool,
}

/// What this thread has used of a processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// How long after a look that took so much the next one may come.
fn pause_after(look: Duration, is_unwatched: bool) -> Duration {
    let share = if is_unwatched { LOOK_SHARE } else { LOOK_SHARE_WATCHED };
    (look * share).min(LOOK_EVERY).max(look * LOOK_SHARE_MAX)
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

fn tell_one(
    parts: &Parts,
    helper: &mut Helper,
    inside: &mut Inside,
    event: &Event,
) -> io::Result<()> {
    if event.places().any(|at| inside.has_at_or_below(&path_of(at))) {
        return tell_around(parts, helper, event);
    }
    match tell(parts, helper, event)? {
        Ok(()) => Ok(()),
        // The user may not write there, but the directory is the user's.
        Err(Errno::ACCESS | Errno::PERM) => tell_directories(parts, helper, event),
        // Something was faster: a directory is gone, a name is there again.
        Err(error) => {
            tracing::debug!(%error, ?event, "a change was not told");
            Ok(())
        }
    }
}

/// What is mounted on a name or below stays. A directory that is looked up under its new name
/// before anybody looks for it under its old one takes such mounts along.
fn tell_around(parts: &Parts, helper: &mut Helper, event: &Event) -> io::Result<()> {
    if let Event::Moved(_, to, _) = event {
        let fields: [&[u8]; 3] = [b"touch", &to.path, to.name.as_bytes()];
        let _ = play(parts, helper, Act::Touch, &[to], &fields)?;
    }
    tell_directories(parts, helper, event)
}

fn tell_directories(parts: &Parts, helper: &mut Helper, event: &Event) -> io::Result<()> {
    for at in event.places() {
        let _ = play(parts, helper, Act::Touch, &[], &[b"touch", &at.path, b""])?;
    }
    Ok(())
}

fn path_of(at: &Place) -> PathBuf {
    Path::new(OsStr::from_bytes(&at.path)).join(OsStr::from_bytes(at.name.as_bytes()))
}

fn spot(place: &Place) -> Spot {
    (place.dir, place.name.as_bytes().to_owned())
}

/// The inner result is that of the call.
fn tell(parts: &Parts, helper: &mut Helper, event: &Event) -> io::Result<Result<(), Errno>> {
    match event {
        Event::Created(at) => tell_created(parts, helper, at),
        Event::Deleted(at, ghost) if !is_told(parts, at, Some(ghost)) => {
            let kind: &[u8] = if ghost.attr.file_type == FileType::Directory { b"d" } else { b"f" };
            let act = Act::Remove(spot(at), *ghost);
            play(parts, helper, act, &[at], &[b"remove", kind, &at.path, at.name.as_bytes()])
        }
        Event::Moved(from, to, over) if !is_told(parts, to, None) => {
            let act = Act::Move(spot(from), spot(to), *over);
            let names = (from.name.as_bytes(), to.name.as_bytes());
            let fields: [&[u8]; 5] = [b"move", &from.path, names.0, &to.path, names.1];
            let moved = play(parts, helper, act, &[from, to], &fields);
            // What the kernel remembers of both names is from before the call.
            for at in [from, to] {
                parts.kernel.expire_entry(at.dir.0, at.name.as_bytes());
            }
            moved
        }
        Event::Modified(at) => tell_touched(parts, helper, at, b"modify"),
        Event::Touched(at) => tell_touched(parts, helper, at, b"touch"),
        Event::Directory { path, .. } => {
            play(parts, helper, Act::Touch, &[], &[b"touch", path, b""])
        }
        Event::Deleted(..) | Event::Moved(..) => Ok(Ok(())),
    }
}

fn is_told(parts: &Parts, at: &Place, found: Option<&Found>) -> bool {
    parts.stage.is_told(at.dir, at.name.as_bytes(), found.map(|found| found.ino))
}

/// What has the name now.
fn found_at(parts: &Parts, at: &Place) -> Result<Found, Errno> {
    let found = parts
        .drive
        .lookup(at.dir, at.name.as_bytes())
        .map_err(|error| if error.kind() == Kind::NotFound { Errno::NOENT } else { Errno::IO })?;
    parts.drive.forget(found.ino, 1);
    Ok(found)
}

fn tell_created(parts: &Parts, helper: &mut Helper, at: &Place) -> io::Result<Result<(), Errno>> {
    let found = match found_at(parts, at) {
        _ if is_told(parts, at, None) => return Ok(Ok(())),
        Err(errno) => return Ok(Err(errno)),
        Ok(found) => found,
    };
    let kind: &[u8] = match found.attr.file_type {
        FileType::File => b"f",
        FileType::Directory => b"d",
        FileType::Symlink => b"l",
        FileType::Fifo => b"p",
        FileType::Socket => b"s",
        // Making one takes a privilege.
        FileType::CharDevice | FileType::BlockDevice => return Ok(Ok(())),
    };
    let fields: [&[u8]; 4] = [b"make", kind, &at.path, at.name.as_bytes()];
    let mut made = Ok(());
    for _ in 0..TRIES {
        made = play(parts, helper, Act::Make(spot(at)), &[at], &fields)?;
        // A program looked it up before, and the kernel had it still.
        if made != Err(Errno::EXIST) {
            break;
        }
    }
    match made {
        Ok(()) => tell_written(parts, helper, at, &found),
        Err(errno) => Ok(Err(errno)),
    }
}

fn tell_touched(
    parts: &Parts,
    helper: &mut Helper,
    at: &Place,
    how: &[u8],
) -> io::Result<Result<(), Errno>> {
    let found = match found_at(parts, at) {
        Err(errno) => return Ok(Err(errno)),
        Ok(found) if is_told(parts, at, Some(&found)) => return Ok(Ok(())),
        // It is told when it is closed, and a call would wait for what is just being written.
        Ok(found) if parts.stage.is_being_written(found.ino) => return Ok(Ok(())),
        Ok(found) => found,
    };
    parts.kernel.expire_attributes(found.ino.0);
    // Only another version of a file is another inode.
    let is_modified = how == b"modify";
    let names: &[&Place] = if is_modified { &[at] } else { &[] };
    match play(parts, helper, Act::Touch, names, &[how, &at.path, at.name.as_bytes()])? {
        Ok(()) if is_modified => tell_written(parts, helper, at, &found),
        touched => Ok(touched),
    }
}

/// Many programs look at a file when it was closed by who wrote to it. While it is open for
/// writing it cannot be executed, so of programs they are not told; nor of a file that a program
/// here is still writing to.
fn tell_written(
    parts: &Parts,
    helper: &mut Helper,
    at: &Place,
    found: &Found,
) -> io::Result<Result<(), Errno>> {
    let is_over = !parts.stage.is_being_written(found.ino);
    if is_over && found.attr.file_type == FileType::File && found.attr.perm & 0o111 == 0 {
        let fields: [&[u8]; 3] = [b"written", &at.path, at.name.as_bytes()];
        // Some cannot be opened: one that nobody may write to, or that is read past the daemon.
        if let Err(error) = play(parts, helper, Act::Touch, &[], &fields)? {
            tracing::debug!(%error, ?at, "that it was closed was not told");
        }
    }
    Ok(Ok(()))
}

/// Has one call made, after the kernel was told to ask anew for these names.
fn play(
    parts: &Parts,
    helper: &mut Helper,
    act: Act,
    names: &[&Place],
    fields: &[&[u8]],
) -> io::Result<Result<(), Errno>> {
    parts.stage.set(Some(act));
    names.iter().for_each(|at| parts.kernel.expire_entry(at.dir.0, at.name.as_bytes()));
    let called = helper.call(fields);
    parts.stage.set(None);
    called
}
