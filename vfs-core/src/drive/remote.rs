//! Operations on other devices' locations: everything but bytes is answered at once, from the
//! index and from what was changed here.
//!
//! | module | what it is |
//! |---|---|
//! | `file` | open files: bytes, from the base and from what was written |
//! | `growth` | open files that become longer |
//! | `names`, `attributes` | changes, which the outbox accepts |
//!
//! Nothing here waits for a network except [`RemoteFile::read`]. A number is turned
//! into a row by its file id; the only state is what is open, because a program
//! may go on asking about an open file whose row is another version by now, or gone.

mod attributes;
mod file;
mod growth;
mod names;

use super::inode::RemoteIno;
use super::links::{self, ForeignSymlinks};
use super::types::{Found, InodeNo, Statfs};
use crate::content::Content;
use crate::error::{FsError, FsResult, Kind};
use crate::index::{Counts, Index, Node};
use crate::model::{Attr, Entry, FileId, FileType, Location, LocationNo};
use crate::outbox::Outbox;
use crate::source::Version;
use dashmap::DashMap;
use growth::{Growing, Latest};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(super) use file::RemoteFile;

/// How long a kernel may keep what it knows: every change is told explicitly.
pub(super) const VALID_FOR: Duration = Duration::from_secs(3600);

const BLOCK_BYTES: u32 = 4096;

/// Operations on other devices' locations.
pub(super) struct Remote {
    pub index: Index,
    pub content: Arc<Content>,
    pub outbox: Arc<Outbox>,
    pub uid: u32,
    pub gid: u32,
    pub symlinks: ForeignSymlinks,
    /// Nothing is changed through this drive.
    pub read_only: bool,
    /// The versions that are open, the last one pinned last. A number has a few bits of the
    /// generation only, so it may stand for several of them.
    pinned: DashMap<RemoteIno, Vec<Pin>>,
    pub growing: Arc<Growing>,
}

/// A version that so many handles have open.
struct Pin {
    handles: usize,
    /// Those that a kernel may read by itself, from the cache's file.
    backed: usize,
    entry: Arc<Entry>,
    latest: Arc<Latest>,
}

/// What is held under these locks is replaced whole, so a panic elsewhere is no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn read_only() -> FsError {
    FsError::new(Kind::ReadOnly, "change what is no file of a location")
}

fn stale(attempted: &'static str) -> FsError {
    FsError::new(Kind::Stale, attempted)
}

impl Remote {
    pub fn new(
        index: Index,
        content: Arc<Content>,
        outbox: Arc<Outbox>,
        (uid, gid): (u32, u32),
        (symlinks, read_only): (ForeignSymlinks, bool),
    ) -> Self {
        outbox.attach(&content);
        let (written, of) = (Arc::downgrade(&outbox), &content);
        of.attach(Box::new(move |location, file| {
            written.upgrade().is_some_and(|outbox| outbox.has_bytes(location, file))
        }));
        let (pinned, growing) = (DashMap::new(), Arc::new(Growing::default()));
        index.feed().add_witness(&growing);
        Self { index, content, outbox, uid, gid, symlinks, read_only, pinned, growing }
    }

    /// The entry as its owner has it, as the mounting user's own.
    pub fn found(&self, ino: RemoteIno, entry: &Entry) -> Found {
        let generation = match entry.attr.file_type {
            FileType::File => entry.generation.into(),
            _ => 0,
        };
        let shown = self.growing.shown(ino.location, entry);
        let attr = Attr { uid: self.uid, gid: self.gid, ..shown };
        let atime = self.outbox.view().atime(ino.location, ino.file).unwrap_or(attr.mtime);
        Found { ino: ino.no(), generation, attr, atime, valid_for: VALID_FOR }
    }

    /// The number of an entry of this directory.
    pub fn child(&self, parent: RemoteIno, entry: &Entry) -> RemoteIno {
        let child = parent.child(entry);
        RemoteIno { file: self.outbox.view().first(child.location, child.file), ..child }
    }

    /// The directory above a remote one: of a location's folder, its device's.
    pub fn parent_of(&self, ino: RemoteIno, node: &Node, location: &Location) -> InodeNo {
        if ino.file == FileId::ROOT {
            return InodeNo::of_device(location.owner);
        }
        let file = self.outbox.view().first(ino.location, node.parent);
        RemoteIno { file, tag: ino.tag.saturating_sub(1), ..ino }.no()
    }

    pub fn location(&self, no: LocationNo) -> FsResult<Arc<Location>> {
        self.index.location(no).ok_or_else(|| stale("use a location that was removed"))
    }

    /// The row of an inode, at the version that its number stands for.
    pub fn node(&self, ino: RemoteIno) -> FsResult<Node> {
        self.location(ino.location)?;
        let node = self.outbox.view().node(ino.location, ino.file)?;
        node.filter(|n| ino.is_version_of(&n.entry))
            .ok_or_else(|| stale("use a file that has another version by now"))
    }

    pub fn lookup(&self, parent: RemoteIno, name: &[u8]) -> FsResult<Found> {
        // Without it, what is not found would be remembered of a location that is gone.
        self.location(parent.location)?;
        let entry = self.outbox.view().entry(parent.location, parent.file, name)?;
        let entry = entry.ok_or_else(|| FsError::new(Kind::NotFound, "look up a name"))?;
        Ok(self.found(self.child(parent, &entry), &entry))
    }

    /// The attributes; `None` for a location's folder whose row has not come yet.
    pub fn getattr(&self, ino: RemoteIno, open: Option<&RemoteFile>) -> FsResult<Option<Found>> {
        match (self.entry(ino), open) {
            (Ok(entry), _) => Ok(entry.map(|entry| self.found(ino, &entry))),
            // The handle is from before the kernel gave the last lookup back.
            (Err(_), Some(open)) => Ok(Some(self.found(ino, &open.entry(&self.outbox)))),
            (Err(error), None) => Err(error),
        }
    }

    /// The row or the open version; `None` for a location's folder whose row has not come yet.
    pub fn entry(&self, ino: RemoteIno) -> FsResult<Option<Arc<Entry>>> {
        match self.node(ino) {
            Ok(node) => Ok(Some(Arc::new(node.entry))),
            Err(e) if e.kind() == Kind::Stale => match self.pinned(ino)? {
                Some(entry) => Ok(Some(entry)),
                None if ino.file == FileId::ROOT => self.location(ino.location).map(|_| None),
                None => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    /// The version of an open file: a kernel asks by number also for `fstat`.
    fn pinned(&self, ino: RemoteIno) -> FsResult<Option<Arc<Entry>>> {
        let last = self.pinned.get(&ino).and_then(|p| p.last().map(|pin| Arc::clone(&pin.entry)));
        let Some(pinned) = last else { return Ok(None) };
        let written = self.outbox.written(ino.location, ino.file, pinned.generation);
        let mut entry = match written {
            Some(written) => file::as_written(&pinned, &written),
            None => (*pinned).clone(),
        };
        if self.outbox.view().names(ino.location, ino.file)?.is_empty() {
            entry.attr.nlink = 0;
        }
        Ok(Some(Arc::new(entry)))
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

    /// What the index knows to be there; free is what can be accepted here.
    pub fn statfs<'a>(&self, locations: impl IntoIterator<Item = &'a Arc<Location>>) -> Statfs {
        let (mut bytes, mut files, mut is_writable) = (0_u64, 0_u64, false);
        for location in locations {
            let Counts { bytes: b, entries, .. } = self.index.counts(location.no);
            bytes = bytes.saturating_add(b);
            files = files.saturating_add(entries);
            is_writable |= !location.read_only && location.owner != self.index.me();
        }
        let free = match is_writable && !self.read_only {
            true => self.outbox.free_bytes() / u64::from(BLOCK_BYTES),
            false => 0,
        };
        let files_free = if free > 0 { u64::from(u32::MAX) } else { 0 };
        Statfs {
            block_bytes: BLOCK_BYTES,
            // Programs that divide by these, or skip empty file systems, see a small one.
            blocks: bytes.div_ceil(BLOCK_BYTES.into()).saturating_add(free).max(1),
            blocks_free: free,
            blocks_available: free,
            files: files.saturating_add(files_free).max(1),
            files_free,
            name_max: 255,
        }
    }

    /// Whether the bytes of a file are here: `pending`, `cached`, `partial` or `remote`.
    pub fn state(&self, location: &Location, entry: &Entry) -> &'static str {
        if self.outbox.has_bytes(location.no, entry.file_id) {
            return "pending";
        }
        let version = Version::of(location.id, entry);
        match self.content.cache().cached_bytes(&version) {
            n if n >= entry.attr.size => "cached",
            0 => "remote",
            _ => "partial",
        }
    }
}
