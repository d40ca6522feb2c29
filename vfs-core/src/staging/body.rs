//! Where the bytes of a draft are: in memory while they are few, then in its file.
//!
//! Most files are small, and are with their owners a moment after they were written: a file made
//! and removed again for each of them would cost more than all the rest of writing it. A crash
//! takes what is in memory; what was committed is in the caller's journal as well.

use super::DraftId;
use super::store::{Store, bytes_on_disk};
use crate::content::disk::read_range;
use crate::content::ranges::RangeSet;
use crate::failpoint::fail_point;
use bytes::Bytes;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A draft with more bytes has a file.
pub(super) const MOST_IN_MEMORY: u64 = 64 << 10;
/// Space is given back in units of this.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// The bytes of a draft, from 0 to where the last ones were added.
#[derive(Debug)]
pub(super) struct Body {
    store: Arc<Store>,
    id: DraftId,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// Within what all drafts may have there.
    Memory { bytes: Vec<u8>, claimed_bytes: u64 },
    /// Whether its name is durable.
    File { is_named: bool },
    /// The draft was removed.
    Nowhere,
}

impl Body {
    /// No bytes yet.
    pub(super) fn new(store: Arc<Store>, id: DraftId) -> Self {
        Self { store, id, place: Place::Memory { bytes: Vec::new(), claimed_bytes: 0 } }
    }

    /// What an earlier run has left in the file.
    pub(super) fn in_file(store: Arc<Store>, id: DraftId) -> Self {
        Self { store, id, place: Place::File { is_named: false } }
    }

    pub(super) fn is_in_memory(&self) -> bool {
        matches!(self.place, Place::Memory { .. })
    }

    pub(super) fn is_in_file(&self) -> bool {
        matches!(self.place, Place::File { .. })
    }

    /// Whether a crash of the machine may take the file's name.
    pub(super) fn is_unnamed(&self) -> bool {
        !matches!(self.place, Place::File { is_named: true })
    }

    /// The file's name is durable.
    pub(super) fn named(&mut self) {
        if let Place::File { is_named } = &mut self.place {
            *is_named = true;
        }
    }

    /// Where the last byte ends.
    pub(super) fn len(&self) -> io::Result<u64> {
        match &self.place {
            Place::Memory { bytes, .. } => Ok(bytes.len() as u64),
            _ => Ok(self.file()?.metadata()?.len()),
        }
    }

    /// Bytes that it takes.
    pub(super) fn used_bytes(&self) -> io::Result<u64> {
        match &self.place {
            Place::Memory { bytes, .. } => Ok(bytes.len() as u64),
            _ => bytes_on_disk(&*self.file()?),
        }
    }

    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        match &self.place {
            Place::Memory { bytes, .. } => {
                let bytes = bytes.get(range.start as usize..range.end as usize);
                bytes.map(Bytes::copy_from_slice).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
            _ => read_range(&*self.file()?, range),
        }
    }

    /// Makes room up to `end`: in memory, or else by going into the file, where what was `freed`
    /// takes no space. A failure leaves everything where it is.
    pub(super) fn reserve(&mut self, end: u64, freed: &RangeSet) -> io::Result<()> {
        match self.reserve_memory(end) {
            true => Ok(()),
            false => self.move_to_file(freed).map(drop),
        }
    }

    fn reserve_memory(&mut self, end: u64) -> bool {
        let Place::Memory { bytes, claimed_bytes } = &mut self.place else { return false };
        if end > MOST_IN_MEMORY {
            return false;
        }
        if end > *claimed_bytes {
            // Doubled, so that a file written in small pieces is not copied with each of them.
            let capacity = end.max(2 * *claimed_bytes).min(MOST_IN_MEMORY);
            if !self.store.claim_memory(capacity - *claimed_bytes) {
                return false;
            }
            *claimed_bytes = capacity;
            bytes.reserve_exact(capacity as usize - bytes.len());
        }
        true
    }

    /// Writes all bytes, within what was reserved.
    pub(super) fn write(&mut self, new: &[u8], at: u64) -> io::Result<()> {
        match &mut self.place {
            Place::Memory { bytes, .. } => {
                let range = at as usize..at as usize + new.len();
                if bytes.len() < range.end {
                    bytes.resize(range.end, 0);
                }
                bytes[range].copy_from_slice(new);
                Ok(())
            }
            _ => self.file()?.write_all_at(new, at),
        }
    }

    /// Lengthens it with zeros, within what was reserved; in a file they take no space.
    pub(super) fn lengthen(&mut self, end: u64) -> io::Result<()> {
        match &mut self.place {
            Place::Memory { bytes, .. } => {
                bytes.resize(end as usize, 0);
                Ok(())
            }
            _ => Ok(rustix::fs::ftruncate(&*self.file()?, end)?),
        }
    }

    /// Gives ranges back, which are among what was `freed`; gives how many bytes that makes.
    pub(super) fn free(&self, ranges: Vec<Range<u64>>, freed: &RangeSet) -> io::Result<u64> {
        if self.is_in_memory() {
            // They are overwritten by nothing; the whole goes soon, or into a file without them.
            return Ok(ranges.iter().map(|range| range.end - range.start).sum());
        }
        let file = self.file()?;
        let before = bytes_on_disk(&file)?;
        for range in ranges {
            // The blocks at its ends are freed with the last of their bytes.
            let Some(around) = freed.around(range.start) else { continue };
            let start = (range.start - range.start % BLOCK_BYTES)
                .max(around.start.next_multiple_of(BLOCK_BYTES));
            let end = around.end.min(range.end.next_multiple_of(BLOCK_BYTES));
            let end = end - end % BLOCK_BYTES;
            if start < end {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                // A file system that cannot do it keeps the space until the draft goes.
                let _ = rustix::fs::fallocate(&file, flags, start, end - start);
            }
        }
        Ok(before.saturating_sub(bytes_on_disk(&file)?))
    }

    /// The file, into which the bytes go when they are in memory.
    pub(super) fn move_to_file(&mut self, freed: &RangeSet) -> io::Result<Arc<File>> {
        let Place::Memory { bytes, claimed_bytes } = &self.place else { return self.file() };
        let file = self.store.make_file(self.id)?;
        fail_point("staging::file");
        if let Err(error) = write_but(&file, bytes, freed) {
            self.store.unlink(self.id);
            return Err(error);
        }
        self.store.give_back_memory(*claimed_bytes);
        self.place = Place::File { is_named: false };
        Ok(file)
    }

    fn file(&self) -> io::Result<Arc<File>> {
        match &self.place {
            Place::File { .. } => self.store.file(self.id),
            // Nobody asks for one of bytes in memory.
            _ => Err(io::Error::new(io::ErrorKind::NotFound, "a draft that was removed")),
        }
    }

    /// Ends it.
    pub(super) fn remove(&mut self) {
        match std::mem::replace(&mut self.place, Place::Nowhere) {
            Place::Memory { claimed_bytes, .. } => self.store.give_back_memory(claimed_bytes),
            Place::File { .. } => self.store.unlink(self.id),
            Place::Nowhere => {}
        }
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if let Place::Memory { claimed_bytes, .. } = &self.place {
            self.store.give_back_memory(*claimed_bytes);
        }
    }
}

/// Writes what is needed of some bytes, each to its place.
fn write_but(file: &File, bytes: &[u8], freed: &RangeSet) -> io::Result<()> {
    let len = bytes.len() as u64;
    for range in freed.missing(0..len) {
        file.write_all_at(&bytes[range.start as usize..range.end as usize], range.start)?;
    }
    Ok(rustix::fs::ftruncate(file, len)?)
}
