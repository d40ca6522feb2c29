//! What a kernel must drop after a change of the index.
//!
//! Numbers of remote entries are computed, so a change is turned into its
//! invalidation without knowing what any kernel holds; naming something that
//! it does not hold is harmless. Only for own locations the table of inodes is
//! asked, which also keeps a first scan from flooding a kernel.

use super::inode::RemoteIno;
use super::own::Own;
use super::remote::Remote;
use super::top::Top;
use super::types::{InodeNo, Invalidation};
use crate::changes::Change;
use crate::error::FsResult;
use crate::model::{FileId, LocationNo, Name};
use crate::overlay::Merged;
use std::collections::HashSet;

/// The changes of one commit, being turned into invalidations.
pub(super) struct Translation<'a> {
    pub top: &'a Top,
    pub own: &'a Own,
    pub remote: &'a Remote,
    /// Looked up once: changes of one directory come together.
    last_directory: Option<(LocationNo, FileId, InodeNo)>,
    directories: HashSet<InodeNo>,
    has_growth: bool,
    out: Vec<Invalidation>,
}

impl<'a> Translation<'a> {
    pub fn new(top: &'a Top, own: &'a Own, remote: &'a Remote) -> Self {
        let (last_directory, directories, has_growth, out) = Default::default();
        Self { top, own, remote, last_directory, directories, has_growth, out }
    }

    /// What to drop after these changes; everything when the index cannot be read.
    pub fn of(mut self, changes: &[Change]) -> Vec<Invalidation> {
        match changes.iter().try_for_each(|c| self.add(c)) {
            Ok(()) => self.out,
            Err(error) => {
                tracing::warn!(%error, "changes could not be told to the mount one by one");
                vec![Invalidation::Everything]
            }
        }
    }

    fn add(&mut self, change: &Change) -> FsResult<()> {
        match change {
            Change::Entry { location, parent, name, .. } => self.entry(*location, *parent, name),
            Change::Attributes { location, file, grew, .. } => {
                if grew.is_some() && self.remote.growing.has((*location, *file)) {
                    // Of which its attributes are a part.
                    self.growth();
                    return Ok(());
                }
                self.attributes(*location, *file)
            }
            // Devices come and go with members, locations with either.
            Change::Locations | Change::Devices => {
                self.directory(InodeNo::ROOT);
                for (_, device) in self.top.devices() {
                    self.directory(device);
                }
                Ok(())
            }
            Change::Reset => {
                self.out.push(Invalidation::Everything);
                Ok(())
            }
        }
    }

    fn growth(&mut self) {
        if !std::mem::replace(&mut self.has_growth, true) {
            self.out.push(Invalidation::Growth);
        }
    }

    fn directory(&mut self, ino: InodeNo) {
        if self.directories.insert(ino) {
            self.out.push(Invalidation::Directory(ino));
        }
    }

    fn is_own(&self, location: LocationNo) -> bool {
        let me = self.own.index.me();
        self.own.index.location(location).is_some_and(|l| l.owner == me)
    }

    fn entry(&mut self, location: LocationNo, parent: FileId, name: &Name) -> FsResult<()> {
        if parent == crate::index::ROOT_PARENT {
            return self.attributes(location, FileId::ROOT);
        }
        let is_own = self.is_own(location);
        if is_own && self.own.table.is_empty() && parent != FileId::ROOT {
            return Ok(());
        }
        // The owner's echo of what this device did: its kernel knows it already, and what is
        // shown stays as it is until the overlay goes.
        if !is_own && self.remote.outbox.view().covers(location, parent, name) {
            return Ok(());
        }
        let Some(dir) = self.directory_ino(location, parent, is_own)? else { return Ok(()) };
        match self.own_file_still_there(location, parent, (dir, name), is_own)? {
            Some(file) => self.out.push(Invalidation::Content(file)),
            None => self.out.push(Invalidation::Entry { parent: dir, name: name.clone() }),
        }
        self.directory(dir);
        Ok(())
    }

    /// A file that a kernel knows under this name, when it is still there: to drop the name would
    /// take the ground from under a program that stands in that directory. The index, which has
    /// just looked, is asked and not the disk, which may be a dead network's.
    fn own_file_still_there(
        &self,
        location: LocationNo,
        parent: FileId,
        (dir, name): (InodeNo, &Name),
        is_own: bool,
    ) -> FsResult<Option<InodeNo>> {
        if !is_own {
            return Ok(None);
        }
        let entry = self.own.index.view()?.entry(location, parent, name.as_bytes())?;
        Ok(entry.and_then(|entry| self.own.known_at(location, dir, name, &entry)))
    }

    fn attributes(&mut self, location: LocationNo, file: FileId) -> FsResult<()> {
        if self.is_own(location) {
            return self.own_attributes(location, file);
        }
        let view = self.remote.outbox.view();
        let Some(node) = view.node(location, file)? else { return Ok(()) };
        let depth = match node.parent {
            crate::index::ROOT_PARENT => return self.remote_root(location),
            parent => depth_of(view, location, parent)?,
        };
        let ino = RemoteIno::at_depth(location, depth, &node.entry);
        let ino = RemoteIno { file: view.first(location, ino.file), ..ino }.no();
        self.out.push(Invalidation::Attributes(ino));
        Ok(())
    }

    fn remote_root(&mut self, location: LocationNo) -> FsResult<()> {
        self.out.push(Invalidation::Attributes(RemoteIno::root(location).no()));
        Ok(())
    }

    fn own_attributes(&mut self, location: LocationNo, file: FileId) -> FsResult<()> {
        if let Some(ino) = self.own_ino(location, file)? {
            self.out.push(Invalidation::Attributes(ino));
        }
        Ok(())
    }

    /// The number by which a kernel may hold a directory; `None` when it holds it not.
    fn directory_ino(
        &mut self,
        location: LocationNo,
        dir: FileId,
        is_own: bool,
    ) -> FsResult<Option<InodeNo>> {
        if let Some((l, d, ino)) = self.last_directory
            && (l, d) == (location, dir)
        {
            return Ok(Some(ino));
        }
        let ino = match is_own {
            true => self.own_ino(location, dir)?,
            false => Some(self.remote_directory(location, dir)?),
        };
        self.last_directory = ino.map(|ino| (location, dir, ino));
        Ok(ino)
    }

    fn remote_directory(&self, location: LocationNo, dir: FileId) -> FsResult<InodeNo> {
        if dir == FileId::ROOT {
            return Ok(RemoteIno::root(location).no());
        }
        let depth = depth_of(self.remote.outbox.view(), location, dir)?;
        let view = self.remote.outbox.view();
        Ok(RemoteIno::directory(location, depth, view.first(location, dir)).no())
    }

    fn own_ino(&self, location: LocationNo, file: FileId) -> FsResult<Option<InodeNo>> {
        if file == FileId::ROOT {
            return Ok(Some(InodeNo::own_root(location)));
        }
        if self.own.table.is_empty() {
            return Ok(None);
        }
        let node = self.own.index.view()?.node(location, file)?;
        let held = node.and_then(|n| self.own.table.of_disk(location, n.entry.disk_ino));
        Ok(held.map(|h| h.no))
    }
}

/// How deep a directory lies below its location's folder; 0 when it lost its name, for then no
/// kernel can reach it either.
fn depth_of(view: Merged<'_>, location: LocationNo, dir: FileId) -> FsResult<usize> {
    Ok(view.path(location, dir)?.map_or(0, |path| path.len()))
}
