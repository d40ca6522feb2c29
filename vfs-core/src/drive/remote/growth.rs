//! Other devices' files that grow while a kernel knows them (`tail -f`).
//!
//! What is appended to a file keeps its inode, so a kernel may have the page in which the file
//! ended, with zeros after that end. It must not learn the new size before it has let go of that
//! page. So:
//!
//! 1. Before a longer row can be seen, [`Growing`] notes what kernels were told of the file, and
//!    from then on shows its row with that size and those times.
//! 2. Who has the file open reads the longer version: what a kernel reads anew is no shorter.
//! 3. The kernel drops its pages from the old end on ([`Remote::grow`]).
//! 4. A call that had found such a page before it was dropped comes to its end.
//! 5. The size is shown, and the kernel is told that the attributes are others.
//!
//! The third step may wait for a page that a slow network is to fill. It is done for each file by
//! itself, and what grows meanwhile is done in the next round.
//!
//! A handle that writes stays at the version that it began with, as what it has written is laid
//! over that one. So a file that is written here does not grow: the longer version gets
//! another inode number, as any other version does.

use super::{Pin, Remote, lock};
use crate::changes::{Change, Grew, Witness};
use crate::drive::inode::RemoteIno;
use crate::drive::types::{InodeNo, KernelCache};
use crate::error::FsResult;
use crate::model::{Attr, ContentId, Entry, FileId, LocationNo, Stamp};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// How many of the last contents of a file are told from others: one is in the index, and one may
/// be about to be; what was read of the index before that is shown within moments.
const CONTENTS_KEPT: usize = 64;

/// A file, as its owner calls it.
type File = (LocationNo, FileId);

/// Files of which kernels know less than the index.
#[derive(Default)]
pub(in crate::drive) struct Growing {
    files: DashMap<File, Told>,
    /// How many kernels are told of growth. Without one there is nothing to wait for.
    listeners: AtomicUsize,
    serials: AtomicU64,
}

/// What kernels were told of a file.
struct Told {
    /// Tells it from what was noted of the same file before and after.
    serial: u64,
    generation: u32,
    stamp: Stamp,
    /// The contents that it has had since, or is about to have.
    since: Vec<ContentId>,
    /// A thread has kernels drop its pages.
    is_under_way: bool,
}

/// What was noted of a file when a thread took it up.
struct Begun {
    serial: u64,
    generation: u32,
    /// Bytes that kernels know of.
    size: u64,
}

impl Growing {
    /// One more kernel is told.
    pub fn listen(&self) {
        self.listeners.fetch_add(1, Ordering::AcqRel);
    }

    /// One less.
    pub fn unlisten(&self) {
        if self.listeners.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.files.clear();
        }
    }

    /// Whether no file is growing.
    pub fn is_idle(&self) -> bool {
        self.files.is_empty()
    }

    /// The attributes of an entry, as kernels may know them.
    pub fn shown(&self, location: LocationNo, entry: &Entry) -> Attr {
        match self.files.get(&(location, entry.file_id)) {
            Some(told) if told.has_come(entry) => {
                let Stamp { size, mtime, ctime, .. } = told.stamp;
                Attr { size, mtime, ctime, ..entry.attr }
            }
            _ => entry.attr,
        }
    }

    /// Whether kernels know less of the file than the index shows, or soon will.
    pub fn has(&self, file: File) -> bool {
        self.files.contains_key(&file)
    }

    /// Whether kernels know less of the file than this row.
    pub fn is_behind(&self, location: LocationNo, row: &Entry) -> bool {
        self.files.get(&(location, row.file_id)).is_some_and(|told| told.has_come(row))
    }

    /// Those that no thread has taken up.
    pub fn waiting(&self) -> Vec<File> {
        self.files.iter().filter(|told| !told.is_under_way).map(|told| *told.key()).collect()
    }

    fn coming(&self, file: File, generation: u32, grew: &Grew) {
        let new = || Told {
            serial: self.serials.fetch_add(1, Ordering::Relaxed),
            generation,
            stamp: grew.was,
            since: Vec::new(),
            is_under_way: false,
        };
        let mut told = self.files.entry(file).or_insert_with(new);
        if told.generation != generation {
            // The version before it can be seen no more.
            *told = new();
        }
        if told.since.len() == CONTENTS_KEPT {
            told.since.remove(0);
        }
        told.since.push(grew.content);
    }

    fn begin(&self, file: File) -> Option<Begun> {
        let mut told = self.files.get_mut(&file).filter(|told| !told.is_under_way)?;
        told.is_under_way = true;
        let Told { serial, generation, stamp, .. } = *told;
        Some(Begun { serial, generation, size: stamp.size })
    }

    fn end(&self, file: File, begun: &Begun) {
        if let Some(mut told) = self.files.get_mut(&file).filter(|t| t.serial == begun.serial) {
            told.is_under_way = false;
        }
    }

    /// Kernels may know the file as this row has it.
    fn told(&self, file: File, serial: u64, row: &Entry) {
        let Slot::Occupied(mut told) = self.files.entry(file) else { return };
        if told.get().serial == serial && told.get_mut().is_all_with(row) {
            told.remove();
        }
    }

    /// No kernel knows the version under the number that it has now, with this row.
    fn parted(&self, location: LocationNo, row: &Entry) {
        let Slot::Occupied(mut told) = self.files.entry((location, row.file_id)) else { return };
        if told.get().generation == row.generation && told.get_mut().is_all_with(row) {
            told.remove();
        }
    }

    /// What was noted is of no version that can be seen.
    fn forget(&self, file: File, begun: &Begun) {
        self.files.remove_if(&file, |_, told| told.serial == begun.serial);
    }
}

impl Told {
    /// Whether this row is longer than what kernels know.
    fn has_come(&self, row: &Entry) -> bool {
        row.content.is_some_and(|content| self.since.contains(&content))
    }

    /// Kernels may know this row; whether there is nothing more to tell.
    fn is_all_with(&mut self, row: &Entry) -> bool {
        if let Some(at) = self.since.iter().position(|since| Some(*since) == row.content) {
            self.since.drain(..=at);
            self.stamp = row.stamp();
        }
        self.since.is_empty()
    }
}

impl Witness for Growing {
    fn coming(&self, changes: &[Change]) {
        for change in changes {
            // Without a kernel there is nobody who would take it away again.
            if let Change::Attributes { location, file, generation, grew: Some(grew), .. } = change
                && !location.is_own()
                && self.listeners.load(Ordering::Acquire) > 0
            {
                self.coming((*location, *file), *generation, grew);
            }
        }
    }
}

/// What a version that is open has grown to, for all its handles.
#[derive(Default)]
pub(in crate::drive) struct Latest {
    /// How often it has grown.
    times: AtomicUsize,
    version: Mutex<Option<Grown>>,
}

/// A version that has grown: as it is shown, and its owner's row.
#[derive(Clone)]
pub(super) struct Grown {
    pub entry: Arc<Entry>,
    pub row: Arc<Entry>,
}

impl Latest {
    pub fn times(&self) -> usize {
        self.times.load(Ordering::Acquire)
    }

    pub fn get(&self) -> Option<Grown> {
        lock(&self.version).clone()
    }

    /// Takes what it has grown to, unless it has more already: who tells may be late.
    fn set(&self, grown: &Grown) {
        let mut version = lock(&self.version);
        if version.as_ref().is_none_or(|v| v.row.attr.size < grown.row.attr.size) {
            *version = Some(grown.clone());
            self.times.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Remote {
    /// Has a kernel know how far a file has grown, unless another thread does; gives its number, if
    /// there was something to tell.
    pub fn grow(&self, file: File, kernel: &dyn KernelCache) -> FsResult<Option<InodeNo>> {
        let mut told = None;
        while let Some(begun) = self.growing.begin(file) {
            let grown = self.grow_once(file, &begun, kernel);
            self.growing.end(file, &begun);
            told = grown?.or(told);
            // What came meanwhile, nobody else has taken up.
            let row = self.index.view()?.node(file.0, file.1)?;
            if !row.is_some_and(|row| self.growing.is_behind(file.0, &row.entry)) {
                break;
            }
        }
        Ok(told)
    }

    fn grow_once(
        &self,
        file: File,
        begun: &Begun,
        kernel: &dyn KernelCache,
    ) -> FsResult<Option<InodeNo>> {
        let (location, id) = file;
        let found = self.outbox.view().shown_and_row(location, id)?;
        // Else it is gone, or another version by now, under another number.
        let Some((shown, row)) = found.filter(|(_, row)| row.generation == begun.generation) else {
            self.growing.forget(file, begun);
            // A version with the same bytes may have been shown with what was held back.
            self.outbox.look_again(location, id)?;
            return Ok(None);
        };
        if !self.growing.is_behind(location, &row) {
            // It is about to be committed.
            return Ok(None);
        }
        let ino = self.number(location, &shown);
        if self.growing.listeners.load(Ordering::Acquire) > 1 || self.is_held(ino, file) {
            return self.part(location, &shown, &row).map(|()| None);
        }
        let grown = Grown { entry: Arc::new(shown), row: Arc::new(row) };
        self.let_pins_grow(ino, &grown);
        kernel.drop_pages_from(ino.no(), begun.size);
        kernel.wait_for_readers();
        self.show_pins_grown(ino, &grown);
        self.growing.told(file, begun.serial, &grown.row);
        kernel.expire_attributes(ino.no());
        Ok(Some(ino.no()))
    }

    fn number(&self, location: LocationNo, shown: &Entry) -> RemoteIno {
        let ino = RemoteIno::at_depth(location, 0, shown);
        RemoteIno { file: self.outbox.view().first(location, shown.file_id), ..ino }
    }

    /// Whether a handle of the file stays at its version whatever becomes of the file.
    fn is_held(&self, ino: RemoteIno, (location, file): File) -> bool {
        let pins = self.pinned.get(&ino);
        pins.is_some_and(|pins| pins.iter().any(|pin| pin.backed > 0))
            || self.outbox.is_written(location, file)
    }

    /// The version gets another number, which no kernel knows; who has it open keeps what it has.
    pub(super) fn part(&self, location: LocationNo, shown: &Entry, row: &Entry) -> FsResult<()> {
        self.outbox.renumber(location, shown)?;
        self.growing.parted(location, row);
        self.outbox.look_again(location, row.file_id)
    }

    /// The handles of a version read what it has become.
    pub(super) fn let_pins_grow(&self, ino: RemoteIno, grown: &Grown) {
        let pins = self.pinned.get(&ino);
        let same = |pin: &&Pin| pin.entry.generation == grown.entry.generation;
        pins.iter().flat_map(|pins| pins.iter().filter(same)).for_each(|pin| pin.latest.set(grown));
    }

    /// And what is open is shown so, when it is another version by then that has its names.
    pub(super) fn show_pins_grown(&self, ino: RemoteIno, grown: &Grown) {
        let Some(mut pins) = self.pinned.get_mut(&ino) else { return };
        let is_shorter = |pin: &&mut Pin| {
            pin.entry.generation == grown.entry.generation
                && pin.entry.attr.size < grown.entry.attr.size
        };
        for pin in pins.iter_mut().filter(is_shorter) {
            pin.entry = Arc::clone(&grown.entry);
        }
    }
}
