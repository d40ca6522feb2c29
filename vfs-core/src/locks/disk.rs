//! A holder's locks on a real file: the kernel of the device that has the file is the one table
//! in which everybody meets, also programs that know nothing of the drive.
//!
//! Each holder has an open file description of its own, because these are what the kernel takes
//! for the holder, of `flock` and of record locks (`F_OFD_SETLK`). Closing it gives all back.
//! Which of the two a program asked for is not known, so a lock of the whole file is set as
//! both, and programs on the disk are respected, and kept out, whichever they use.

use super::table::{Held, Holder, Mode, Span};
use crate::error::{FsError, FsResult};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use std::fs::File;

/// An open file description that holds the locks of one holder.
#[derive(Debug)]
pub(super) struct DiskLock {
    file: File,
    /// What it has by `flock`.
    flocked: Option<Mode>,
}

impl DiskLock {
    /// `file` must be a description that nobody else uses.
    pub fn new(file: File) -> Self {
        Self { file, flocked: None }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether exclusive record locks can be set.
    pub fn is_writable(&self) -> FsResult<bool> {
        let flags = rustix::fs::fcntl_getfl(&self.file);
        let flags = flags.map_err(|e| FsError::os("look how a file is open", e))?;
        Ok(flags.intersects(OFlags::WRONLY | OFlags::RDWR))
    }

    /// Takes what another description of the holder has; whether all was given.
    pub fn take<'a>(&mut self, held: impl Iterator<Item = &'a Held>) -> FsResult<bool> {
        for lock in held {
            if !self.set(lock.span, Some(lock.mode))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether it was given; never waits. What is not given leaves all as it was. `None` gives
    /// back.
    pub fn set(&mut self, span: Span, mode: Option<Mode>) -> FsResult<bool> {
        let done = match span == Span::ALL {
            true => self.set_whole(mode),
            false => self.set_part(span, mode),
        };
        match done {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
            Err(e) => Err(FsError::os("lock a file", e)),
        }
    }

    fn set_whole(&mut self, mode: Option<Mode>) -> Result<(), Errno> {
        let before = self.flocked;
        let done = self.flock(mode).and_then(|()| match mode {
            Some(mode) => self.record_as_far_as_open(mode),
            None => self.record(Span::ALL, None),
        });
        if done.is_err() {
            // The kernel gives back what `flock` cannot change; a program that took it since
            // has it, and the record lock is what is left.
            let _ = self.flock(before);
        }
        done
    }

    /// Who has a part in a mode of its own has not locked the whole.
    fn set_part(&mut self, span: Span, mode: Option<Mode>) -> Result<(), Errno> {
        self.record(span, mode)?;
        match self.flocked {
            Some(_) => self.flock(None),
            None => Ok(()),
        }
    }

    fn flock(&mut self, mode: Option<Mode>) -> Result<(), Errno> {
        self.flocked = None;
        rustix::fs::flock(&self.file, flock_operation(mode))?;
        self.flocked = mode;
        Ok(())
    }

    fn record(&self, span: Span, mode: Option<Mode>) -> Result<(), Errno> {
        errno(fcntl(&self.file, FcntlArg::F_OFD_SETLK(&flock_of(span, mode))))
    }

    /// Record locks of the whole file need a description that is open for it, `flock` does not:
    /// what cannot be set exclusive is shared, or left to `flock`.
    fn record_as_far_as_open(&self, mode: Mode) -> Result<(), Errno> {
        match (self.record(Span::ALL, Some(mode)), mode) {
            (Err(Errno::BADF), Mode::Exclusive) => self.record_as_far_as_open(Mode::Shared),
            (Err(Errno::BADF), Mode::Shared) => Ok(()),
            (done, _) => done,
        }
    }

    /// Whose record lock is in the way. Who holds it, the kernel does not say of locks
    /// that are set for others.
    pub fn test(&self, span: Span, mode: Mode) -> FsResult<Option<Held>> {
        let mut lock = flock_of(span, Some(mode));
        errno(fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut lock)))
            .map_err(|e| FsError::os("look for a lock", e))?;
        Ok(held_of(&lock))
    }
}

fn errno(result: nix::Result<i32>) -> Result<(), Errno> {
    result.map(drop).map_err(|e| Errno::from_raw_os_error(e as i32))
}

fn flock_operation(mode: Option<Mode>) -> FlockOperation {
    match mode {
        None => FlockOperation::Unlock,
        Some(Mode::Shared) => FlockOperation::NonBlockingLockShared,
        Some(Mode::Exclusive) => FlockOperation::NonBlockingLockExclusive,
    }
}

fn flock_of(span: Span, mode: Option<Mode>) -> libc::flock {
    let l_type = match mode {
        None => libc::F_UNLCK,
        Some(Mode::Shared) => libc::F_RDLCK,
        Some(Mode::Exclusive) => libc::F_WRLCK,
    };
    // Length 0 is to the end of all files; any other end is below it, so that nothing overflows.
    let l_len = match span.last() == Span::ALL.last() {
        true => 0,
        false => (span.last() - span.first() + 1) as i64,
    };
    libc::flock {
        l_type: l_type as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: span.first() as i64,
        l_len,
        l_pid: 0,
    }
}

fn held_of(lock: &libc::flock) -> Option<Held> {
    let mode = match i32::from(lock.l_type) {
        libc::F_RDLCK => Mode::Shared,
        libc::F_WRLCK => Mode::Exclusive,
        _ => return None,
    };
    let first = u64::try_from(lock.l_start).ok()?;
    let last = match u64::try_from(lock.l_len).ok()? {
        0 => Span::ALL.last(),
        len => first.checked_add(len - 1)?,
    };
    let pid = u32::try_from(lock.l_pid).unwrap_or(0);
    Some(Held { holder: Holder(0), pid, span: Span::new(first, last)?, mode })
}
