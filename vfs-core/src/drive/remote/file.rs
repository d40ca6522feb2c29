//! Open files of other devices.
//!
//! A handle is pinned to the version that it was opened with, which may grow
//! ([`growth`](super::growth)). When somebody on this device writes to that
//! version, all its handles read what was written ([`Written`]), with the version
//! below it.

use super::growth::{Grown, Latest};
use super::{Pin, Remote, lock};
use crate::content::Reader;
use crate::drive::handle::is_a_directory;
use crate::drive::inode::RemoteIno;
use crate::drive::types::{FallocateMode, Io, OpenFlags, Whence};
use crate::error::{FsError, FsResult, Kind};
use crate::hydration::{Access, Program};
use crate::model::{Entry, FileType, MAX_GROWTH_BYTES};
use crate::outbox::{Offset, Outbox, Written};
use bytes::Bytes;
use dashmap::mapref::entry::Entry as Slot;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// An open file of another device, at the version that it was opened with.
pub(in crate::drive) struct RemoteFile {
    ino: RemoteIno,
    flags: OpenFlags,
    /// Under which it is shown.
    generation: u32,
    base: Mutex<Base>,
    /// What the version has grown to.
    latest: Arc<Latest>,
    written: OnceLock<Arc<Written>>,
    /// Nothing is fetched ahead of it.
    is_exact: bool,
    /// A kernel may read the cache's file by itself.
    is_backed: bool,
}

/// The owner's version, which is read where nothing was written.
struct Base {
    /// As it is shown.
    entry: Arc<Entry>,
    /// As its owner has it.
    row: Arc<Entry>,
    /// `None` for a file that its owner does not have yet.
    reader: Option<Arc<Reader>>,
    /// How often it had grown.
    times: usize,
}

/// How often a read begins again because its version is gone from its owner: a file that grows
/// without pause may be longer once more by then.
const RENEWALS: usize = 16;
/// Committing more than this may take a disk long.
const LONG_BYTES: u64 = 1 << 20;

/// An entry with the size and times of what is being written.
pub(super) fn as_written(entry: &Entry, written: &Written) -> Entry {
    let live = written.live();
    let mut entry = Entry { content: None, ..entry.clone() };
    entry.attr.size = live.size();
    entry.attr.blocks = entry.attr.size.div_ceil(512);
    entry.attr.mtime = live.mtime();
    entry.attr.ctime = entry.attr.ctime.max(live.ctime());
    entry
}

impl Remote {
    pub fn open(&self, ino: RemoteIno, flags: OpenFlags) -> FsResult<(RemoteFile, Io)> {
        self.open_for(ino, flags, &|| None)
    }

    /// The same for a program that `who` tells, if it is to be known.
    pub fn open_for(
        &self,
        ino: RemoteIno,
        flags: OpenFlags,
        who: &dyn Fn() -> Option<Arc<Program>>,
    ) -> FsResult<(RemoteFile, Io)> {
        let entry = Arc::new(self.node(ino)?.entry);
        match entry.attr.file_type {
            FileType::File => {}
            FileType::Directory => return Err(is_a_directory()),
            FileType::Symlink => return Err(FsError::new(Kind::Loop, "open a symbolic link")),
            _ => return Err(FsError::new(Kind::NotPermitted, "open a special file")),
        }
        if flags.may_change() {
            self.check_writable(ino.location)?;
            self.make_way(ino, &entry)?;
        }
        let written = self.outbox.written(ino.location, ino.file, entry.generation);
        let access = match flags.may_change() || written.is_some() {
            true => Access::Whole,
            false => self.access(ino, &entry, who)?,
        };
        let (file, io) = self.opened(ino, Arc::clone(&entry), flags, written, access)?;
        let prepared = self.catch_up(ino, &entry, flags).and_then(|()| match flags.truncate {
            true => file.set_size(&self.outbox, 0),
            false => Ok(()),
        });
        match prepared {
            Ok(()) => Ok((file, io)),
            Err(error) => {
                self.release(&file);
                Err(error)
            }
        }
    }

    /// What a program gets of a file. It cannot open what it is not to have: `EACCES` is what
    /// such programs know to go on from, as they meet private files everywhere.
    fn access(
        &self,
        ino: RemoteIno,
        entry: &Entry,
        who: &dyn Fn() -> Option<Arc<Program>>,
    ) -> FsResult<Access> {
        let (content, hydration) = (&self.content, self.content.hydration());
        if hydration.is_off() {
            return Ok(Access::Whole);
        }
        let missing = content.missing_bytes(&*self.location(ino.location)?, entry);
        let Some(program) = (missing > 0).then(who).flatten() else { return Ok(Access::Whole) };
        let missing = || if content.has_own_copy(entry) { 0 } else { missing };
        match hydration.access(&program, missing) {
            Access::Refused => {
                Err(FsError::new(Kind::AccessDenied, "fetch a file for a program in background"))
            }
            access => Ok(access),
        }
    }

    /// What has grown while it was being opened: from here on, growth finds the handle. The error
    /// makes the kernel look the name up again.
    fn catch_up(&self, ino: RemoteIno, entry: &Entry, flags: OpenFlags) -> FsResult<()> {
        let Some((shown, row)) = self.outbox.view().shown_and_row(ino.location, ino.file)? else {
            return Ok(());
        };
        let has_grown = shown.is_grown(entry);
        if !flags.may_change() {
            if has_grown {
                let file = (ino.location, row.file_id);
                let grown = Grown { entry: Arc::new(shown), row: Arc::new(row) };
                self.let_pins_grow(ino, &grown);
                if !self.growing.has(file) {
                    self.show_pins_grown(ino, &grown);
                }
            }
            return Ok(());
        }
        if shown.generation != entry.generation {
            return Err(super::stale("write to a file that has another number by now"));
        }
        // To a kernel that knows less of the file than what is written over, its end is elsewhere.
        if self.growing.is_behind(ino.location, &row) {
            self.part(ino.location, &shown, &row)?;
            return Err(super::stale("write to a file that is growing"));
        }
        match has_grown {
            true => Err(super::stale("write to a file that has grown")),
            false => Ok(()),
        }
    }

    /// A kernel that reads the cache's file by itself would not see what is written, and could be
    /// made to write into that file. Whoever writes gets another inode of the same file: the
    /// error makes the kernel look the name up again. The readers keep the version they have.
    fn make_way(&self, ino: RemoteIno, entry: &Entry) -> FsResult<()> {
        let pins = self.pinned.get(&ino);
        let is_backed = pins.is_some_and(|pins| pins.iter().any(|pin| pin.backed > 0));
        if !is_backed {
            return Ok(());
        }
        self.outbox.renumber(ino.location, entry)?;
        Err(super::stale("write to a file that a kernel reads by itself"))
    }

    /// A handle of a file that was just made.
    pub(super) fn opened_new(
        &self,
        ino: RemoteIno,
        entry: Entry,
        flags: OpenFlags,
        written: Arc<Written>,
    ) -> FsResult<(RemoteFile, Io)> {
        self.opened(ino, Arc::new(entry), flags, Some(written), Access::Whole)
    }

    fn opened(
        &self,
        ino: RemoteIno,
        entry: Arc<Entry>,
        flags: OpenFlags,
        written: Option<Arc<Written>>,
        access: Access,
    ) -> FsResult<(RemoteFile, Io)> {
        let row = match &written {
            Some(written) => written.under(),
            None => self.row(ino)?.map_or_else(|| Arc::clone(&entry), Arc::new),
        };
        let reader = match &written {
            Some(_) => None,
            None if access == Access::Exact => Some(self.content.open_exactly(ino.location, &row)?),
            None => Some(self.content.open(ino.location, &row)?),
        };
        // What a kernel reads by itself stays as long as it is.
        let may_grow = row.attr.size <= MAX_GROWTH_BYTES;
        let backing = match (&reader, flags.may_change() || may_grow) {
            (Some(reader), false) if !self.outbox.has_writer(ino.location, ino.file) => {
                reader.complete_file()
            }
            _ => None,
        };
        let is_backed = backing.is_some();
        let latest = self.pin(ino, &entry, is_backed);
        self.outbox.opened(ino.location, ino.file, flags.may_change());
        let written = written.map_or_else(OnceLock::new, OnceLock::from);
        let io = backing.map_or(Io::Calls { keep_cache: true }, Io::Backing);
        let generation = entry.generation;
        // Whatever it had grown to before, it may be looked at once more.
        let base = Mutex::new(Base { entry, row, reader: reader.map(Arc::new), times: 0 });
        let is_exact = access == Access::Exact;
        let file =
            RemoteFile { ino, flags, generation, base, latest, written, is_exact, is_backed };
        Ok((file, io))
    }

    /// The owner's row, whatever is shown.
    fn row(&self, ino: RemoteIno) -> FsResult<Option<Entry>> {
        let file = self.outbox.view().now(ino.location, ino.file);
        Ok(self.index.view()?.node(ino.location, file)?.map(|node| node.entry))
    }

    fn pin(&self, ino: RemoteIno, entry: &Arc<Entry>, is_backed: bool) -> Arc<Latest> {
        let mut pins = self.pinned.entry(ino).or_default();
        let backed = usize::from(is_backed);
        if let Some(pin) = pins.iter_mut().find(|pin| pin.entry.generation == entry.generation) {
            (pin.handles, pin.backed) = (pin.handles + 1, pin.backed + backed);
            return Arc::clone(&pin.latest);
        }
        let latest = Arc::<Latest>::default();
        let (entry, of_pin) = (Arc::clone(entry), Arc::clone(&latest));
        pins.push(Pin { entry, handles: 1, backed, latest: of_pin });
        latest
    }

    pub fn release(&self, file: &RemoteFile) {
        if let Slot::Occupied(mut pins) = self.pinned.entry(file.ino) {
            let pinned = |pin: &&mut Pin| pin.entry.generation == file.generation;
            for pin in pins.get_mut().iter_mut().filter(pinned) {
                pin.handles -= 1;
                pin.backed -= usize::from(file.is_backed);
            }
            pins.get_mut().retain(|pin| pin.handles > 0);
            if pins.get().is_empty() {
                pins.remove();
            }
        }
        // A mapping may have been written to after the last close.
        if file.flags.may_change()
            && let Some(written) = file.written(&self.outbox)
            && let Err(error) = self.outbox.commit(&written)
        {
            tracing::error!(%error, file = file.ino.file.0, "written bytes could not be kept");
        }
        self.outbox.closed(file.ino.location, file.ino.file, file.flags.may_change());
    }
}

impl RemoteFile {
    /// What was written to this version, by whatever handle.
    fn written(&self, outbox: &Outbox) -> Option<Arc<Written>> {
        if let Some(written) = self.written.get() {
            return Some(Arc::clone(written));
        }
        let RemoteIno { location, file, .. } = self.ino;
        let written = outbox.written(location, file, self.generation)?;
        Some(Arc::clone(self.written.get_or_init(|| written)))
    }

    /// The same, for a change.
    fn writing(&self, outbox: &Outbox) -> FsResult<Arc<Written>> {
        if !self.flags.may_change() {
            return Err(FsError::new(Kind::BadHandle, "change a file open for reading"));
        }
        if let Some(written) = self.written(outbox) {
            return Ok(written);
        }
        let written = outbox.writing(self.ino.location, self.generation, &self.base().row)?;
        Ok(Arc::clone(self.written.get_or_init(|| written)))
    }

    /// Which file it is, in whatever version.
    pub fn ino(&self) -> RemoteIno {
        self.ino
    }

    /// Of the version that is open.
    pub fn generation(&self) -> u64 {
        self.generation.into()
    }

    /// Whether its close has something to make durable.
    pub fn may_change(&self) -> bool {
        self.flags.may_change()
    }

    /// As `stat` shows it.
    pub fn entry(&self, outbox: &Outbox) -> Arc<Entry> {
        let entry = Arc::clone(&self.base().entry);
        match self.written(outbox) {
            Some(written) => Arc::new(as_written(&entry, &written)),
            None => entry,
        }
    }

    fn size(&self, outbox: &Outbox) -> u64 {
        // Brings it up to date, if the version has grown.
        drop(self.reader(outbox));
        self.written(outbox).map_or_else(|| self.base().entry.attr.size, |written| written.size())
    }

    fn base(&self) -> MutexGuard<'_, Base> {
        lock(&self.base)
    }

    /// The reader of the version, as long as that is now.
    fn reader(&self, outbox: &Outbox) -> Option<Arc<Reader>> {
        let mut base = self.base();
        let times = self.latest.times();
        // Who writes has written over what was there when it began.
        if base.times != times && !self.flags.may_change() {
            if let Some(Grown { entry, row }) = self.latest.get()
                && (row.attr.size > base.row.attr.size || entry.attr.size > base.entry.attr.size)
                && let Ok(reader) = self.open_version(outbox, &row)
            {
                let reader = Some(Arc::new(reader));
                let before = std::mem::replace(&mut *base, Base { entry, row, reader, times });
                // Else a log that is followed would fill the cache with its former states.
                before.reader.inspect(|before| before.discard_if_gone());
            }
            base.times = times;
        }
        base.reader.clone()
    }

    fn open_version(&self, outbox: &Outbox, row: &Entry) -> FsResult<Reader> {
        let reader = outbox.open_version(self.ino.location, row)?;
        Ok(if self.is_exact { reader.exactly() } else { reader })
    }

    pub fn try_read(&self, outbox: &Outbox, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        match (self.written(outbox), self.reader(outbox)) {
            (Some(written), _) => written.try_read(outbox, offset, len),
            (None, Some(reader)) => reader.try_read(offset, self.within(offset, len)),
            (None, None) => Some(Ok(Bytes::new())),
        }
    }

    pub async fn read(&self, outbox: &Outbox, offset: u64, len: usize) -> FsResult<Bytes> {
        if let Some(written) = self.written(outbox) {
            return written.read(outbox, offset, len).await;
        }
        let Some(mut reader) = self.reader(outbox) else { return Ok(Bytes::new()) };
        let len = self.within(offset, len);
        let mut read = reader.read(offset, len).await;
        for _ in 0..RENEWALS {
            match read {
                Err(error) if error.kind() == Kind::Stale => {
                    reader = self.renewed(outbox, &reader).await.ok_or(error)?;
                    read = reader.read(offset, len).await;
                }
                read => return read,
            }
        }
        read
    }

    /// How much of this is to be read: for who writes, the file ends where it ended, also when its
    /// bytes are read from a longer version.
    fn within(&self, offset: u64, len: usize) -> usize {
        if !self.flags.may_change() {
            return len;
        }
        let left = self.base().row.attr.size.saturating_sub(offset);
        len.min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    /// Another reader than this one, which reads what is there no more.
    async fn renewed(&self, outbox: &Outbox, failed: &Arc<Reader>) -> Option<Arc<Reader>> {
        // Who else reads through this handle may have gone on already.
        let now = self.reader(outbox).filter(|now| !Arc::ptr_eq(now, failed));
        match now {
            Some(now) => Some(now),
            None => self.renew(outbox).await,
        }
    }

    /// Goes on with the same bytes under the stamp that they have at their owner now.
    async fn renew(&self, outbox: &Outbox) -> Option<Arc<Reader>> {
        let (row, times) = {
            let base = self.base();
            (Arc::clone(&base.row), [base.row.attr.mtime, base.entry.attr.mtime])
        };
        let row = outbox.restamped(self.ino.location, &row, times).await?;
        let reader = Arc::new(self.open_version(outbox, &row).ok()?);
        let mut base = self.base();
        // Who writes has written over the row that it began with, whatever its bytes are read from.
        if self.flags.may_change() {
            base.reader = Some(Arc::clone(&reader));
        } else if base.row.attr.size <= row.attr.size {
            (base.row, base.reader) = (row, Some(Arc::clone(&reader)));
        }
        Some(reader)
    }

    pub fn write(&self, outbox: &Outbox, offset: u64, bytes: &[u8]) -> FsResult<usize> {
        if !self.flags.write {
            return Err(FsError::new(Kind::BadHandle, "write to a file open for reading"));
        }
        let written = self.writing(outbox)?;
        let offset = if self.flags.append { Offset::End } else { Offset::At(offset) };
        let done = outbox.write(&written, offset, bytes)?;
        if self.flags.sync || self.flags.data_sync {
            outbox.fsync(&written)?;
        }
        Ok(done)
    }

    pub fn set_size(&self, outbox: &Outbox, size: u64) -> FsResult<()> {
        let written = self.writing(outbox)?;
        outbox.set_size(&written, size)
    }

    /// Whether making it durable may take long.
    pub fn may_flush_long(&self, outbox: &Outbox) -> bool {
        self.written(outbox).is_some_and(|w| w.size() > LONG_BYTES && w.is_dirty())
    }

    /// A program closed one of its descriptors.
    pub fn flush(&self, outbox: &Outbox) -> FsResult<()> {
        match self.written(outbox) {
            Some(written) if self.flags.may_change() => outbox.flush(&written),
            _ => Ok(()),
        }
    }

    /// Also through a handle that only reads, as POSIX has it.
    pub fn fsync(&self, outbox: &Outbox) -> FsResult<()> {
        match self.written(outbox) {
            Some(written) => outbox.fsync(&written),
            None => outbox.sync(),
        }
    }

    /// Whether what is written through it is to be with its owner when the call returns.
    pub fn waits_for_owner(&self) -> bool {
        self.flags.may_change() && (self.flags.sync || self.flags.data_sync)
    }

    /// Waits until the owner has what was made durable here.
    pub async fn arrived(&self, outbox: &Outbox, gives_up: impl Fn() -> bool) -> FsResult<()> {
        match self.written(outbox) {
            Some(written) => outbox.arrived(&written, gives_up).await,
            None => Ok(()),
        }
    }

    /// Space is not reserved at an owner that may be offline; the size is as asked.
    pub fn fallocate(
        &self,
        outbox: &Outbox,
        offset: u64,
        len: u64,
        mode: FallocateMode,
    ) -> FsResult<()> {
        let end = offset.checked_add(len).filter(|_| len > 0);
        let end = end.ok_or_else(|| FsError::new(Kind::Invalid, "fallocate"))?;
        let written = self.writing(outbox)?;
        match mode {
            FallocateMode::Allocate { keep_size: true } => Ok(()),
            FallocateMode::Allocate { keep_size: false } if end <= written.size() => Ok(()),
            FallocateMode::Allocate { keep_size: false } => outbox.set_size(&written, end),
            FallocateMode::PunchHole => outbox.zero(&written, offset..end, true),
            FallocateMode::ZeroRange { keep_size } => outbox.zero(&written, offset..end, keep_size),
        }
    }

    /// Where the owner has holes is not known here: everything is data, the end is a hole.
    pub fn seek(&self, outbox: &Outbox, offset: u64, whence: Whence) -> FsResult<u64> {
        let size = self.size(outbox);
        match whence {
            _ if offset >= size => Err(FsError::new(Kind::NoSuchAddress, "seek beyond the end")),
            Whence::Data => Ok(offset),
            Whence::Hole => Ok(size),
        }
    }
}
