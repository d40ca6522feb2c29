//! Listing directories: of the upper levels, of own locations, of remote ones.

use super::cookie::{Call, Held, Place};
use super::handle::Handle;
use super::inode::{Class, RemoteIno};
use super::own::Seen;
use super::readdir::{
    self, DirKind, OpenDir, OwnDirHandle, OwnEntry, RemoteDir, Snapshot, TopEntry,
};
use super::types::{Detail, DirItem, HandleId, InodeNo};
use super::{Drive, sync};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, FileType, LocationNo, Name};
use std::ops::ControlFlow;
use std::os::fd::AsFd;

impl Drive {
    /// Opens a directory for [`Drive::readdir`].
    pub fn opendir(&self, ino: InodeNo) -> FsResult<HandleId> {
        let (parent, kind) = match ino.class() {
            Class::Root => (InodeNo::ROOT, DirKind::Top(Snapshot::default())),
            Class::Device => {
                self.top.getattr_device(ino)?;
                (InodeNo::ROOT, DirKind::Top(Snapshot::default()))
            }
            Class::Own(location) => self.open_own_dir(location, ino)?,
            Class::Remote(remote) => self.open_remote_dir(remote)?,
        };
        Ok(self.handles.add(Handle::Dir(OpenDir { ino, parent, kind })))
    }

    fn open_own_dir(&self, location: LocationNo, ino: InodeNo) -> FsResult<(InodeNo, DirKind)> {
        let fd = self.own.open_dir(location, ino)?;
        let parent = match self.own.table.get(ino).and_then(|n| n.places().pop()) {
            Some(place) => place.parent,
            None => InodeNo::of_device(self.own.index.me()),
        };
        Ok((parent, DirKind::Own(OwnDirHandle { location, fd, entries: Snapshot::default() })))
    }

    fn open_remote_dir(&self, ino: RemoteIno) -> FsResult<(InodeNo, DirKind)> {
        let location = self.remote.location(ino.location)?;
        let kind = DirKind::Remote(RemoteDir { ino, held: Held::default() });
        match self.remote.node(ino) {
            Ok(node) if node.entry.attr.file_type != FileType::Directory => {
                Err(FsError::new(Kind::NotADirectory, "list a file"))
            }
            Ok(node) => Ok((self.remote.parent_of(ino, &node, &location), kind)),
            // Its first rows have not come yet: an empty directory.
            Err(_) if ino == RemoteIno::root(ino.location) => {
                Ok((InodeNo::of_device(location.owner), kind))
            }
            Err(e) => Err(e),
        }
    }

    /// Shows the entries after `cookie` (0: from the beginning) until there are no more or the
    /// visitor answers `Break`, by which it says that it did not take the item.
    pub fn readdir(
        &self,
        handle: HandleId,
        cookie: u64,
        detail: Detail,
        visit: &mut dyn FnMut(DirItem<'_>) -> ControlFlow<()>,
    ) -> FsResult<()> {
        let handle = self.handles.get(handle)?;
        let dir = handle.dir()?;
        if readdir::dots(dir, cookie, visit).is_break() {
            return Ok(());
        }
        let listing = Listing { dir, cookie, detail };
        match &dir.kind {
            DirKind::Top(entries) => self.list_top(&listing, entries, visit),
            DirKind::Own(own) => self.list_own(&listing, own, visit),
            DirKind::Remote(remote) => self.list_remote(&listing, remote, visit),
        }
    }

    fn list_top(
        &self,
        listing: &Listing<'_>,
        entries: &Snapshot<TopEntry>,
        visit: &mut readdir::Visit<'_>,
    ) -> FsResult<()> {
        let entries = entries.at(listing.is_rewind(), || {
            let named = match listing.dir.ino {
                InodeNo::ROOT => self.top.devices(),
                device => self.top.locations(device)?,
            };
            Ok(named.into_iter().map(|(name, ino)| TopEntry { name, ino }).collect())
        })?;
        for (next_cookie, entry) in readdir::after(&entries, listing.cookie) {
            // One that was removed since the snapshot is left out.
            let Ok(found) = self.found_top(entry.ino) else { continue };
            let item = DirItem {
                name: entry.name.as_bytes(),
                ino: entry.ino,
                file_type: FileType::Directory,
                next_cookie,
                found: listing.wants_attributes().then_some(found),
            };
            if visit(item).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn list_own(
        &self,
        listing: &Listing<'_>,
        own: &OwnDirHandle,
        visit: &mut readdir::Visit<'_>,
    ) -> FsResult<()> {
        let Some(fd) = &own.fd else { return Ok(()) };
        let entries = own.entries.at(listing.is_rewind(), || readdir::read_disk(fd))?;
        for (next_cookie, entry) in readdir::after(&entries, listing.cookie) {
            // There for a moment, while a change of another device is applied.
            if self.own.index.is_hidden(own.location, &entry.name) {
                continue;
            }
            let shown = match (listing.detail, entry.file_type) {
                (Detail::Names, Some(file_type)) => {
                    self.show_name(own, entry, file_type, next_cookie, visit)
                }
                _ => self.show_own(listing, own, entry, next_cookie, visit)?,
            };
            if shown.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn show_name(
        &self,
        own: &OwnDirHandle,
        entry: &OwnEntry,
        file_type: FileType,
        next_cookie: u64,
        visit: &mut readdir::Visit<'_>,
    ) -> ControlFlow<()> {
        visit(DirItem {
            name: entry.name.as_bytes(),
            ino: self.own.table.number(own.location, entry.disk_ino),
            file_type,
            next_cookie,
            found: None,
        })
    }

    fn show_own(
        &self,
        listing: &Listing<'_>,
        own: &OwnDirHandle,
        entry: &OwnEntry,
        next_cookie: u64,
        visit: &mut readdir::Visit<'_>,
    ) -> FsResult<ControlFlow<()>> {
        let Some(fd) = &own.fd else { return Ok(ControlFlow::Continue(())) };
        let seen = match Seen::listed(fd.as_fd(), &entry.name, entry.file_type) {
            Ok(seen) => seen,
            // It vanished since the listing was read.
            Err(e) if e.kind() == Kind::NotFound => return Ok(ControlFlow::Continue(())),
            Err(e) => return Err(e),
        };
        if listing.detail == Detail::Names {
            return Ok(self.show_name(own, entry, seen.attr.file_type, next_cookie, visit));
        }
        let found = self.own.count(listing.dir.ino, own.location, &entry.name, &seen);
        let shown = visit(DirItem {
            name: entry.name.as_bytes(),
            ino: found.ino,
            file_type: seen.attr.file_type,
            next_cookie,
            found: Some(found),
        });
        if shown.is_break() {
            self.own.table.forget(found.ino, 1);
        }
        Ok(shown)
    }

    fn list_remote(
        &self,
        listing: &Listing<'_>,
        remote: &RemoteDir,
        visit: &mut readdir::Visit<'_>,
    ) -> FsResult<()> {
        let begun = Call::begin(&self.stems, &remote.held, listing.cookie);
        let (mut call, place) = begun
            .ok_or_else(|| FsError::new(Kind::Stale, "go on from a place that was forgotten"))?;
        let Place::From(from) = place else { return Ok(()) };
        let RemoteIno { location, file, .. } = remote.ino;
        // Each is shown when the next one is known: its cookie leads between the two.
        let mut waiting: Option<(Name, Entry)> = None;
        let mut flow = ControlFlow::Continue(());
        self.remote.outbox.view().children_from(location, file, &from, &mut |name, entry| {
            if let Some((shown, its)) = waiting.replace((name.clone(), entry.clone())) {
                let cookie = call.cookie(&shown, Some(name));
                flow = self.show_remote(listing, remote, (&shown, &its), cookie, visit);
            }
            flow
        })?;
        if let (Some((shown, its)), true) = (waiting, flow.is_continue()) {
            let cookie = call.cookie(&shown, None);
            // Nothing is left to be stopped.
            let _ = self.show_remote(listing, remote, (&shown, &its), cookie, visit);
        }
        call.end(&remote.held);
        Ok(())
    }

    fn show_remote(
        &self,
        listing: &Listing<'_>,
        remote: &RemoteDir,
        (name, entry): (&Name, &Entry),
        next_cookie: u64,
        visit: &mut readdir::Visit<'_>,
    ) -> ControlFlow<()> {
        let ino = self.remote.child(remote.ino, entry);
        visit(DirItem {
            name: name.as_bytes(),
            ino: ino.no(),
            file_type: entry.attr.file_type,
            next_cookie,
            found: listing.wants_attributes().then(|| self.remote.found(ino, entry)),
        })
    }

    /// Makes the names of an open directory durable.
    pub fn fsyncdir(&self, handle: HandleId, data_only: bool) -> FsResult<()> {
        match &self.handles.get(handle)?.dir()?.kind {
            DirKind::Own(OwnDirHandle { fd: Some(fd), .. }) => sync(fd, data_only),
            DirKind::Remote(_) => self.remote.outbox.sync(),
            DirKind::Own(_) | DirKind::Top(_) => Ok(()),
        }
    }

    /// The directory was closed.
    pub fn releasedir(&self, handle: HandleId) {
        self.handles.remove(handle);
    }
}

/// One `readdir` call.
struct Listing<'a> {
    dir: &'a OpenDir,
    /// After which entry it goes on.
    cookie: u64,
    detail: Detail,
}

impl Listing<'_> {
    fn is_rewind(&self) -> bool {
        self.cookie == 0
    }

    fn wants_attributes(&self) -> bool {
        self.detail == Detail::Attributes
    }
}
