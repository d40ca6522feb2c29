//! Events of the kernel for watched directories, by inotify.
//!
//! A watch is set on an *open* directory, through `/proc/self/fd`, and is known
//! by the directory's file id. So no symbolic link or mount that comes between
//! can redirect it, it stays right when the directory or one above it is
//! renamed, and it costs about 20 bytes here. (The `notify` crate watches by
//! path: it follows links, keeps two copies of every path, reports stale paths
//! after a rename, and asks for an event for each file that anyone opens.)
//!
//! An event is a hint where to look, never a fact about what is there.

use super::place::lock;
use crate::model::{FileId, LocationNo, Name};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

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
}

/// The watches of all locations.
pub(super) struct Watcher {
    inotify: OwnedFd,
    wake: OwnedFd,
    watched: Mutex<HashMap<i32, (LocationNo, FileId)>>,
}

impl Watcher {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            watched: Mutex::default(),
        })
    }

    /// Watches an open directory from now on.
    pub fn add(&self, no: LocationNo, dir: FileId, open: BorrowedFd<'_>) -> Result<(), String> {
        // Held over the call, so that the first event finds the watch known.
        let mut watched = lock(&self.watched);
        let path = format!("/proc/self/fd/{}", open.as_raw_fd());
        match inotify::add_watch(&self.inotify, path, EVENTS) {
            Ok(watch) => {
                watched.insert(watch, (no, dir));
                Ok(())
            }
            Err(Errno::NOSPC) => Err(limit_reached(watched.len())),
            Err(e) => Err(format!("watching a directory failed: {e}")),
        }
    }

    /// Ends the watches of a location for which `keep` is false.
    pub fn retain(&self, no: LocationNo, mut keep: impl FnMut(FileId) -> bool) {
        lock(&self.watched).retain(|&watch, &mut (location, dir)| {
            let stays = location != no || keep(dir);
            if !stays {
                // It may have ended by itself: its directory was deleted.
                let _ = inotify::remove_watch(&self.inotify, watch);
            }
            stays
        });
    }

    /// The watched directories of a location.
    pub fn directories(&self, no: LocationNo) -> Vec<FileId> {
        let watched = lock(&self.watched);
        watched.values().filter(|(location, _)| *location == no).map(|(_, dir)| *dir).collect()
    }

    /// Makes [`Self::wait`] return.
    pub fn wake(&self) {
        // It fails only when it was woken 2^64 times already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Waits for events and gives a hint for each; returns after some, or when woken.
    pub fn wait(&self, hint: &mut dyn FnMut(Hint)) -> io::Result<()> {
        let mut waiting =
            [PollFd::new(&self.inotify, PollFlags::IN), PollFd::new(&self.wake, PollFlags::IN)];
        match poll(&mut waiting, None) {
            Ok(_) => self.read(hint),
            Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
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
        let (no, dir) = *watched.get(&watch)?;
        if flags.contains(ReadFlags::IGNORED) {
            watched.remove(&watch);
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
