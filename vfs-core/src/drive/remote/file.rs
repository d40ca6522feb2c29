//! Open files of other devices.
//!
//! A handle is pinned to the version that it was opened with. When somebody on
//! this device writes to that version, all its handles read what was written
//! ([`Written`]), with the version below it.

use super::{Pin, Remote};
use crate::content::Reader;
use crate::drive::handle::is_a_directory;
use crate::drive::inode::RemoteIno;
use crate::drive::types::{FallocateMode, Io, OpenFlags, Whence};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, FileType};
use crate::outbox::{Offset, Outbox, Written};
use bytes::Bytes;
use dashmap::mapref::entry::Entry as Slot;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// An open file of another device, at the version that it was opened with.
pub(in crate::drive) struct RemoteFile {
    ino: RemoteIno,
    flags: OpenFlags,
    /// As it was shown when it was opened.
    entry: Arc<Entry>,
    /// The owner's version, which is read where nothing was written.
    row: Arc<Entry>,
    /// `None` for a file that its owner does not have yet.
    reader: Mutex<Option<Arc<Reader>>>,
    written: OnceLock<Arc<Written>>,
    /// A kernel may read the cache's file by itself.
    is_backed: bool,
}

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
        let (file, io) = self.opened(ino, entry, flags, written)?;
        if flags.truncate
            && let Err(error) = file.set_size(&self.outbox, 0)
        {
            self.release(&file);
            return Err(error);
        }
        Ok((file, io))
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
        self.opened(ino, Arc::new(entry), flags, Some(written))
    }

    fn opened(
        &self,
        ino: RemoteIno,
        entry: Arc<Entry>,
        flags: OpenFlags,
        written: Option<Arc<Written>>,
    ) -> FsResult<(RemoteFile, Io)> {
        let row = match &written {
            Some(written) => written.under(),
            None => self.row(ino)?.map_or_else(|| Arc::clone(&entry), Arc::new),
        };
        let reader = match &written {
            Some(_) => None,
            None => Some(self.content.open(ino.location, &row)?),
        };
        let backing = match (&reader, flags.may_change()) {
            (Some(reader), false) if !self.outbox.has_writer(ino.location, ino.file) => {
                reader.complete_file()
            }
            _ => None,
        };
        let is_backed = backing.is_some();
        self.pin(ino, &entry, is_backed);
        self.outbox.opened(ino.location, ino.file, flags.may_change());
        let written = written.map_or_else(OnceLock::new, OnceLock::from);
        let io = backing.map_or(Io::Calls { keep_cache: true }, Io::Backing);
        let reader = Mutex::new(reader.map(Arc::new));
        Ok((RemoteFile { ino, flags, entry, row, reader, written, is_backed }, io))
    }

    /// The owner's row, whatever is shown.
    fn row(&self, ino: RemoteIno) -> FsResult<Option<Entry>> {
        let file = self.outbox.view().now(ino.location, ino.file);
        Ok(self.index.view()?.node(ino.location, file)?.map(|node| node.entry))
    }

    fn pin(&self, ino: RemoteIno, entry: &Arc<Entry>, is_backed: bool) {
        let mut pins = self.pinned.entry(ino).or_default();
        let backed = usize::from(is_backed);
        match pins.iter_mut().find(|pin| pin.entry.generation == entry.generation) {
            Some(pin) => (pin.handles, pin.backed) = (pin.handles + 1, pin.backed + backed),
            None => pins.push(Pin { entry: Arc::clone(entry), handles: 1, backed }),
        }
    }

    pub fn release(&self, file: &RemoteFile) {
        if let Slot::Occupied(mut pins) = self.pinned.entry(file.ino) {
            let pinned = |pin: &&mut Pin| pin.entry.generation == file.entry.generation;
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
        let written = outbox.written(location, file, self.entry.generation)?;
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
        let written = outbox.writing(self.ino.location, self.entry.generation, &self.row)?;
        Ok(Arc::clone(self.written.get_or_init(|| written)))
    }

    /// Which file it is, in whatever version.
    pub fn ino(&self) -> RemoteIno {
        self.ino
    }

    /// Of the version that is open.
    pub fn generation(&self) -> u64 {
        self.entry.generation.into()
    }

    /// Whether its close has something to make durable.
    pub fn may_change(&self) -> bool {
        self.flags.may_change()
    }

    /// As `stat` shows it.
    pub fn entry(&self, outbox: &Outbox) -> Arc<Entry> {
        match self.written(outbox) {
            Some(written) => Arc::new(as_written(&self.entry, &written)),
            None => Arc::clone(&self.entry),
        }
    }

    fn size(&self, outbox: &Outbox) -> u64 {
        self.written(outbox).map_or(self.entry.attr.size, |written| written.size())
    }

    pub fn try_read(&self, outbox: &Outbox, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        match (self.written(outbox), self.reader()) {
            (Some(written), _) => written.try_read(outbox, offset, len),
            (None, Some(reader)) => reader.try_read(offset, len),
            (None, None) => Some(Ok(Bytes::new())),
        }
    }

    pub async fn read(&self, outbox: &Outbox, offset: u64, len: usize) -> FsResult<Bytes> {
        if let Some(written) = self.written(outbox) {
            return written.read(outbox, offset, len).await;
        }
        let Some(reader) = self.reader() else { return Ok(Bytes::new()) };
        match reader.read(offset, len).await {
            Err(error) if error.kind() == Kind::Stale => match self.renew(outbox).await {
                Some(reader) => reader.read(offset, len).await,
                None => Err(error),
            },
            read => read,
        }
    }

    fn reader(&self) -> Option<Arc<Reader>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes on with the same bytes under the stamp that they have at their owner now.
    async fn renew(&self, outbox: &Outbox) -> Option<Arc<Reader>> {
        let times = [self.row.attr.mtime, self.entry.attr.mtime];
        let row = outbox.restamped(self.ino.location, &self.row, times).await?;
        let reader = Arc::new(outbox.open_version(self.ino.location, &row).ok()?);
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&reader));
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
