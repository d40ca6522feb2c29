//! Events of the kernel for watched directories, by inotify; for locations of very many directories
//! by a [`Mark`] of their file system, where one can be set.
//!
//! A watch is set on an *open* directory, through `/proc/self/fd`, and is known
//! by the directory's file id. So no symbolic link or mount that comes between
//! can redirect it, it stays right when the directory or one above it is
//! renamed, and it costs about 20 bytes here. (The `notify` crate watches by
//! path: it follows links, keeps two copies of every path, reports stale paths
//! after a rename, and asks for an event for each file that anyone opens.)
//!
//! An event is a hint where to look, never a fact about what is there.

use super::mark::{Mark, Marked};
use super::place::lock;
use crate::model::{FileId, LocationNo, Name};
use nix::sys::fanotify::MaskFlags;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// Watches that are ended at once: each gives an event, and the queue has room for 16,384.
const ENDED_AT_ONCE: usize = 256;

/// Room for the events of one `read`.
const BUFFER_BYTES: usize = 64 << 10;

/// `IN_MODIFY` is for programs that keep a file open, `IN_CLOSE_WRITE` for those that write through
/// `mmap`: it comes when the last mapping goes, too.
const EVENTS: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::EXCL_UNLINK);

/// Where to look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Hint {
    /// A name of the directory appeared, disappeared or moved.
    Names(LocationNo, FileId, Name),
    /// The bytes or attributes of what has the name changed.
    Contents(LocationNo, FileId, Name),
    /// A program that could write to it let go of it, by whatever means it wrote.
    Written(LocationNo, FileId, Name),
    /// The directory itself was moved, deleted or unmounted.
    Directory(LocationNo, FileId),
    /// The kernel dropped events: anything may have changed.
    Overflow,
    /// The same in one location.
    OverflowIn(LocationNo),
}

/// The file of a location that has an inode number.
pub(super) type FileOf<'a> = &'a dyn Fn(LocationNo, u64) -> Option<FileId>;

/// The directory of each watch. The last number tells a watch from an ended one of the same
/// directory, which the kernel gives the same descriptor.
#[derive(Default)]
struct Watched {
    watches: HashMap<i32, (LocationNo, FileId, u64)>,
    added: u64,
}

/// The watches of all locations.
pub(super) struct Watcher {
    inotify: OwnedFd,
    wake: OwnedFd,
    watched: Mutex<Watched>,
    /// With so many directories watched, the file system of the next one is marked instead.
    most: usize,
    /// Of locations that would have more: the mark, if one could be set.
    marks: Mutex<HashMap<LocationNo, Option<Arc<Mark>>>>,
    /// Locations that are marked now, and have watches still.
    superseded: Mutex<Vec<LocationNo>>,
}

impl Watcher {
    pub fn new(most: usize) -> io::Result<Self> {
        Ok(Self {
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            watched: Mutex::default(),
            most,
            marks: Mutex::default(),
            superseded: Mutex::default(),
        })
    }

    /// Watches an open directory from now on.
    pub fn add(&self, no: LocationNo, dir: FileId, open: BorrowedFd<'_>) -> Result<(), String> {
        let mark = lock(&self.marks).get(&no).cloned().flatten();
        let is_marked = mark.is_some_and(|mark| mark.covers(open));
        let is_full = lock(&self.watched).watches.len() >= self.most;
        if is_marked || is_full && self.mark(no, open) {
            return Ok(());
        }
        self.add_watch(no, dir, open).or_else(|why| self.mark(no, open).then_some(()).ok_or(why))
    }

    /// Marks the directory's file system for the location, whose watches end then. What could not
    /// be marked is not tried again before [`Self::unmark`].
    fn mark(&self, no: LocationNo, open: BorrowedFd<'_>) -> bool {
        let mut marks = lock(&self.marks);
        if let Some(tried) = marks.get(&no) {
            return tried.as_ref().is_some_and(|mark| mark.covers(open));
        }
        let mark = Mark::set(open).map(Arc::new);
        let mark = mark.inspect_err(|e| tracing::debug!(location = no.0, "not marked: {e}")).ok();
        let is_marked = mark.is_some();
        marks.insert(no, mark);
        drop(marks);
        if is_marked {
            tracing::info!(location = no.0, "its whole file system is watched");
            // What they have told is read before they end.
            lock(&self.superseded).push(no);
            self.wake();
        }
        is_marked
    }

    fn add_watch(&self, no: LocationNo, dir: FileId, open: BorrowedFd<'_>) -> Result<(), String> {
        // Held over the call, so that the first event finds the watch known.
        let mut watched = lock(&self.watched);
        let path = format!("/proc/self/fd/{}", open.as_raw_fd());
        match inotify::add_watch(&self.inotify, path, EVENTS) {
            Ok(watch) => {
                watched.added += 1;
                let added = watched.added;
                watched.watches.insert(watch, (no, dir, added));
                Ok(())
            }
            Err(Errno::NOSPC) => Err(limit_reached(watched.watches.len())),
            Err(e) => Err(format!("watching a directory failed: {e}")),
        }
    }

    /// Nothing of the location is watched any more.
    pub fn end(&self, no: LocationNo) {
        self.unmark(no);
        self.retain(no, |_| false);
    }

    /// The location has no mark any more: all of its directories are about to be added again, maybe
    /// of another file system.
    pub fn unmark(&self, no: LocationNo) {
        lock(&self.marks).remove(&no);
    }

    /// Ends the watches of a location's directories for which `keep` is false.
    pub fn retain(&self, no: LocationNo, mut keep: impl FnMut(FileId) -> bool) {
        let watched = lock(&self.watched);
        let of_location = watched.watches.iter().filter(|(_, (location, ..))| *location == no);
        let ended = of_location.filter(|(_, (_, dir, _))| !keep(*dir));
        let ended: Vec<_> = ended.map(|(watch, of)| (*watch, *of)).collect();
        drop(watched);
        for some in ended.chunks(ENDED_AT_ONCE) {
            let mut watched = lock(&self.watched);
            for (watch, of) in some {
                if watched.watches.get(watch) == Some(of) {
                    watched.watches.remove(watch);
                    // It may have ended by itself: its directory was deleted.
                    let _ = inotify::remove_watch(&self.inotify, *watch);
                }
            }
        }
    }

    /// The watched directories of a location.
    pub fn directories(&self, no: LocationNo) -> Vec<FileId> {
        let watched = lock(&self.watched);
        let of_location = watched.watches.values().filter(|(location, ..)| *location == no);
        of_location.map(|(_, dir, _)| *dir).collect()
    }

    /// Makes [`Self::wait`] return.
    pub fn wake(&self) {
        // It fails only when it was woken 2^64 times already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for events and gives hints for each; returns after some, or when woken.
    pub fn wait(&self, file_of: FileOf<'_>, hint: &mut dyn FnMut(Hint)) -> io::Result<()> {
        let marks: Vec<_> = {
            let marks = lock(&self.marks);
            marks.iter().filter_map(|(no, mark)| Some((*no, mark.clone()?))).collect()
        };
        let mut waiting =
            vec![PollFd::new(&self.inotify, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        waiting.extend(marks.iter().map(|(_, mark)| PollFd::new(&**mark, PollFlags::IN)));
        match poll(&mut waiting, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        // Reset before anything is read, so that what is marked from now on is waited for, too.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let superseded = std::mem::take(&mut *lock(&self.superseded));
        self.read(hint)?;
        for no in superseded {
            if matches!(lock(&self.marks).get(&no), Some(Some(_))) {
                self.retain(no, |_| false);
            }
        }
        for (no, mark) in marks {
            mark.read(&mut |marked| marked_hints(no, &marked, file_of, hint))?;
        }
        Ok(())
    }

    fn read(&self, hint: &mut dyn FnMut(Hint)) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut events = Reader::new(&self.inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(event) => {
                    let name = event.file_name().map(std::ffi::CStr::to_bytes);
                    if let Some(found) = self.hint(event.wd(), event.events(), name) {
                        hint(found);
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn hint(&self, watch: i32, flags: ReadFlags, name: Option<&[u8]>) -> Option<Hint> {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return Some(Hint::Overflow);
        }
        let mut watched = lock(&self.watched);
        let (no, dir, _) = *watched.watches.get(&watch)?;
        if flags.contains(ReadFlags::IGNORED) {
            watched.watches.remove(&watch);
            return None;
        }
        let moved = ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO;
        let names = ReadFlags::CREATE | ReadFlags::DELETE | moved;
        match name.map(Name::new) {
            Some(Some(name)) if flags.intersects(names) => Some(Hint::Names(no, dir, name)),
            Some(Some(name)) if flags.contains(ReadFlags::CLOSE_WRITE) => {
                Some(Hint::Written(no, dir, name))
            }
            Some(Some(name)) => Some(Hint::Contents(no, dir, name)),
            Some(None) => None,
            None => Some(Hint::Directory(no, dir)),
        }
    }
}

/// What a mark tells of a location; nothing if it happened elsewhere on the file system.
fn marked_hints(no: LocationNo, of: &Marked<'_>, file_of: FileOf<'_>, hint: &mut dyn FnMut(Hint)) {
    let &Marked::At { mask, directory_ino, name } = of else { return hint(Hint::OverflowIn(no)) };
    let Some(dir) = file_of(no, directory_ino) else { return };
    let Some(name) = name else { return hint(Hint::Directory(no, dir)) };
    let Some(name) = Name::new(name) else { return };
    let moved = MaskFlags::FAN_MOVED_FROM | MaskFlags::FAN_MOVED_TO;
    let names = MaskFlags::FAN_CREATE | MaskFlags::FAN_DELETE | moved;
    if mask.intersects(names) {
        hint(Hint::Names(no, dir, name.clone()));
    }
    if mask.contains(MaskFlags::FAN_CLOSE_WRITE) {
        hint(Hint::Written(no, dir, name));
    } else if !mask.intersects(names) {
        hint(Hint::Contents(no, dir, name));
    }
}

fn limit_reached(watches: usize) -> String {
    // A container may have a lower limit of its own.
    let limits = ["fs.inotify.max_user_watches", "user.max_inotify_watches"].map(|name| {
        let text = std::fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/")));
        (text.ok().and_then(|text| text.trim().parse::<u64>().ok()), name)
    });
    let lowest =
        limits.into_iter().filter_map(|(limit, name)| Some((limit?, name))).min_by_key(|l| l.0);
    let allowed = match lowest {
        Some((limit, name)) => format!("{limit} watches ({name})"),
        None => "no more watches".to_owned(),
    };
    format!("the system allows {allowed}, {watches} of them are used here")
}
