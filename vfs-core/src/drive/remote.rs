//! Operations on replicas: everything but bytes is answered from the index, at once.
//!
//! Nothing here waits for a network except [`RemoteFile::read`], and nothing is
//! changed: other devices' locations are read-only. A number is turned into a
//! row by its file id; the only state is what is open, because a program may go
//! on asking about an open file whose row is another version by now, or gone.

use super::inode::RemoteIno;
use super::links::{self, ForeignSymlinks};
use super::types::{Found, InodeNo, Io, Statfs, Whence};
use crate::content::{Content, Reader};
use crate::error::{FsError, FsResult, Kind};
use crate::index::{Counts, Index, Node};
use crate::model::{Attr, Entry, FileId, FileType, Location, LocationNo};
use crate::source::Version;
use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use std::sync::Arc;
use std::time::Duration;

/// How long a kernel may keep what it knows: every change is told explicitly.
pub(super) const VALID_FOR: Duration = Duration::from_secs(3600);

const BLOCK_BYTES: u32 = 4096;

/// Operations on other devices' locations.
pub(super) struct Remote {
    pub index: Index,
    pub content: Arc<Content>,
    pub uid: u32,
    pub gid: u32,
    pub symlinks: ForeignSymlinks,
    /// The versions that are open, the last one pinned last. A number has a few bits of the
    /// generation only, so it may stand for several of them.
    pinned: DashMap<RemoteIno, Vec<Pin>>,
}

/// A version that so many handles have open.
struct Pin {
    entry: Arc<Entry>,
    handles: usize,
}

/// An open file of another device, at the version that it was opened with.
pub(super) struct RemoteFile {
    ino: RemoteIno,
    entry: Arc<Entry>,
    reader: Reader,
}

pub(super) fn read_only() -> FsError {
    FsError::new(Kind::ReadOnly, "change another device's location")
}

fn stale(attempted: &'static str) -> FsError {
    FsError::new(Kind::Stale, attempted)
}

impl Remote {
    pub fn new(
        index: Index,
        content: Arc<Content>,
        (uid, gid): (u32, u32),
        symlinks: ForeignSymlinks,
    ) -> Self {
        Self { index, content, uid, gid, symlinks, pinned: DashMap::new() }
    }

    /// The entry as its owner has it, as the mounting user's own.
    pub fn found(&self, ino: RemoteIno, entry: &Entry) -> Found {
        let generation = match entry.attr.file_type {
            FileType::File => entry.generation.into(),
            _ => 0,
        };
        let attr = Attr { uid: self.uid, gid: self.gid, ..entry.attr };
        Found { ino: ino.no(), generation, attr, atime: attr.mtime, valid_for: VALID_FOR }
    }

    pub fn location(&self, no: LocationNo) -> FsResult<Arc<Location>> {
        self.index.location(no).ok_or_else(|| stale("use a location that was removed"))
    }

    /// The row of an inode, at the version that its number stands for.
    pub fn node(&self, ino: RemoteIno) -> FsResult<Node> {
        self.location(ino.location)?;
        let node = self.index.view()?.node(ino.location, ino.file)?;
        node.filter(|n| ino.is_version_of(&n.entry))
            .ok_or_else(|| stale("use a file that has another version by now"))
    }

    pub fn lookup(&self, parent: RemoteIno, name: &[u8]) -> FsResult<Found> {
        // Without it, what is not found would be remembered of a location that is gone.
        self.location(parent.location)?;
        let entry = self.index.view()?.entry(parent.location, parent.file, name)?;
        let entry = entry.ok_or_else(|| FsError::new(Kind::NotFound, "look up a name"))?;
        Ok(self.found(parent.child(&entry), &entry))
    }

    /// The attributes; `None` for a location's folder whose row has not come yet.
    pub fn getattr(&self, ino: RemoteIno, open: Option<&RemoteFile>) -> FsResult<Option<Found>> {
        if let Some(open) = open {
            return Ok(Some(self.found(ino, &open.entry)));
        }
        Ok(self.entry(ino)?.map(|entry| self.found(ino, &entry)))
    }

    /// The row or the open version; `None` for a location's folder whose row has not come yet.
    pub fn entry(&self, ino: RemoteIno) -> FsResult<Option<Arc<Entry>>> {
        match self.node(ino) {
            Ok(node) => Ok(Some(Arc::new(node.entry))),
            Err(e) if e.kind() == Kind::Stale => match self.pinned(ino) {
                Some(entry) => Ok(Some(entry)),
                None if ino.file == FileId::ROOT => self.location(ino.location).map(|_| None),
                None => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// The version of an open file: a kernel asks by number also for `fstat`.
    fn pinned(&self, ino: RemoteIno) -> Option<Arc<Entry>> {
        self.pinned.get(&ino).and_then(|pins| pins.last().map(|pin| Arc::clone(&pin.entry)))
    }

    pub fn readlink(&self, ino: RemoteIno) -> FsResult<Vec<u8>> {
        let target = self.node(ino)?.entry.target;
        let target = target.ok_or_else(|| FsError::new(Kind::Invalid, "read no link"))?;
        let is_shown = match self.symlinks {
            ForeignSymlinks::AsIs => true,
            ForeignSymlinks::Contained => links::is_contained(&target, ino.depth()),
        };
        match is_shown {
            true => Ok(target.into()),
            false => Err(FsError::new(Kind::NotPermitted, "follow a link out of its location")),
        }
    }

    pub fn open(&self, ino: RemoteIno) -> FsResult<(RemoteFile, Io)> {
        let entry = Arc::new(self.node(ino)?.entry);
        match entry.attr.file_type {
            FileType::File => {}
            FileType::Directory => return Err(super::handle::is_a_directory()),
            FileType::Symlink => return Err(FsError::new(Kind::Loop, "open a symbolic link")),
            _ => return Err(FsError::new(Kind::NotPermitted, "open a special file")),
        }
        let reader = self.content.open(ino.location, &entry)?;
        let io = match reader.complete_file() {
            Some(file) => Io::Backing(file),
            None => Io::Calls { keep_cache: true },
        };
        self.pin(ino, &entry);
        Ok((RemoteFile { ino, entry, reader }, io))
    }

    fn pin(&self, ino: RemoteIno, entry: &Arc<Entry>) {
        let mut pins = self.pinned.entry(ino).or_default();
        match pins.iter_mut().find(|pin| pin.entry.generation == entry.generation) {
            Some(pin) => pin.handles += 1,
            None => pins.push(Pin { entry: Arc::clone(entry), handles: 1 }),
        }
    }

    pub fn release(&self, file: &RemoteFile) {
        if let Slot::Occupied(mut pins) = self.pinned.entry(file.ino) {
            let pinned = |pin: &&mut Pin| pin.entry.generation == file.entry.generation;
            pins.get_mut().iter_mut().filter(pinned).for_each(|pin| pin.handles -= 1);
            pins.get_mut().retain(|pin| pin.handles > 0);
            if pins.get().is_empty() {
                pins.remove();
            }
        }
    }

    /// From what the replica knows; the owner's free space is not this device's to give away.
    pub fn statfs<'a>(&self, locations: impl IntoIterator<Item = &'a Arc<Location>>) -> Statfs {
        let (mut bytes, mut files) = (0_u64, 0_u64);
        for location in locations {
            let Counts { bytes: b, entries, .. } = self.index.counts(location.no);
            bytes = bytes.saturating_add(b);
            files = files.saturating_add(entries);
        }
        Statfs {
            block_bytes: BLOCK_BYTES,
            // Programs that divide by these, or skip empty file systems, see a small one.
            blocks: bytes.div_ceil(BLOCK_BYTES.into()).max(1),
            blocks_free: 0,
            blocks_available: 0,
            files: files.max(1),
            files_free: 0,
            name_max: 255,
        }
    }

    /// Whether the bytes of a file are here: `cached`, `partial` or `remote`.
    pub fn state(&self, location: &Location, entry: &Entry) -> &'static str {
        let version = Version {
            location: location.id,
            file: entry.file_id,
            stamp: entry.stamp(),
            content: entry.content,
        };
        match self.content.cache().cached_bytes(&version) {
            n if n >= entry.attr.size => "cached",
            0 => "remote",
            _ => "partial",
        }
    }
}

impl RemoteFile {
    /// Of the version that is open.
    pub fn generation(&self) -> u64 {
        self.entry.generation.into()
    }

    pub fn try_read(&self, offset: u64, len: usize) -> Option<FsResult<Bytes>> {
        self.reader.try_read(offset, len)
    }

    pub async fn read(&self, offset: u64, len: usize) -> FsResult<Bytes> {
        self.reader.read(offset, len).await
    }

    /// Where the owner has holes is not known here: everything is data, the end is a hole.
    pub fn seek(&self, offset: u64, whence: Whence) -> FsResult<u64> {
        match whence {
            _ if offset >= self.entry.attr.size => {
                Err(FsError::new(Kind::NoSuchAddress, "seek beyond the end"))
            }
            Whence::Data => Ok(offset),
            Whence::Hole => Ok(self.entry.attr.size),
        }
    }
}

/// The directory above a remote one: of a location's folder, its device's.
pub(super) fn parent_of(ino: RemoteIno, node: &Node, location: &Location) -> InodeNo {
    if ino.file == FileId::ROOT {
        return InodeNo::of_device(location.owner);
    }
    RemoteIno { file: node.parent, tag: ino.tag.saturating_sub(1), ..ino }.no()
}
