//! `sd ls`, `sd tree`, `sd info`: answered from the index.
//!
//! Works with the owner offline, and shows what this device has written and its owner
//! has not taken yet. A directory of this device that the scan has
//! not reached yet is scanned first. Listings are read in pages, so that a slow
//! reader (a pager) holds neither memory nor a snapshot of the store.

use super::locations::unknown_location;
use super::members::device_name;
use super::parts::{Daemon, index_failure};
use super::report::rfc3339;
use super::serve::Link;
use crate::control::{Event, Target};
use crate::failure::{Code, Failure, Outcome};
use crate::reply::{Holder, InfoReply, Item, PendingCount};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use vfs_core::model::{ContentId, Entry, FileId, FileType, Location, LocationNo, Name};
use vfs_core::path::SdPath;
use vfs_core::source::Version;

/// Entries read with one snapshot and sent in one event.
const PAGE: usize = 500;
/// Deeper than any path that a kernel takes; ends a cycle that a bad peer made up.
const MAX_DEPTH: u32 = 2048;

/// What an address names.
enum Place {
    Root,
    Device { name: String },
    Entry { location: Arc<Location>, path: Vec<Name>, entry: Entry },
    Content(ContentId),
}

/// A directory whose entries are being read, page by page.
struct Directory {
    location: LocationNo,
    id: FileId,
    address: SdPath,
    depth: u32,
}

impl Daemon {
    /// Sends the entries of a directory, or of all below it; or the one file itself.
    pub fn list(&self, target: &Target, recursive: bool, link: &Link) -> Outcome<Value> {
        let address = self.parse(target)?;
        match self.find(&address)? {
            Place::Root => {
                self.send(link, self.devices())?;
                if recursive {
                    self.list_below_devices(self.member_names(), 1, link)?;
                }
            }
            Place::Device { name } => {
                self.send(link, self.locations_of(&name, 1))?;
                if recursive {
                    self.list_locations(&name, 1, link)?;
                }
            }
            Place::Entry { location, entry, .. } if is_directory(&entry) => {
                let start = directory(&location, &entry, &address, 0);
                self.list_directories(start, recursive, link)?;
            }
            Place::Entry { entry, .. } => self.send(link, vec![item(&address, &entry, 1, true)])?,
            Place::Content(id) => {
                let items = self.holder_entries(id)?;
                let last = items.len();
                let items = items.into_iter().enumerate();
                let items = items.map(|(i, (at, e))| item(&at, &e, 1, i + 1 == last));
                self.send(link, items.collect())?;
            }
        }
        Ok(json!({ "address": address.to_string() }))
    }

    fn list_below_devices(&self, names: Vec<String>, depth: u32, link: &Link) -> Outcome<()> {
        for name in names {
            self.send(link, self.locations_of(&name, depth + 1))?;
            self.list_locations(&name, depth + 1, link)?;
        }
        Ok(())
    }

    fn list_locations(&self, device: &str, depth: u32, link: &Link) -> Outcome<()> {
        for location in self.locations_named(device) {
            let address = location_address(device, &location.name);
            let start = Directory { location: location.no, id: FileId::ROOT, address, depth };
            self.list_directories(start, true, link)?;
        }
        Ok(())
    }

    /// All of a directory, then each of its directories in turn, as `ls -R`.
    fn list_directories(&self, start: Directory, recursive: bool, link: &Link) -> Outcome<()> {
        let mut waiting = vec![start];
        while let Some(here) = waiting.pop() {
            let mut below = Vec::new();
            self.each_page(&here, |page, at_end| {
                let items = page.iter().enumerate().map(|(i, (name, entry))| {
                    let last = at_end && i + 1 == page.len();
                    item(&here.address.child(name), entry, here.depth + 1, last)
                });
                let items = items.collect();
                if recursive && here.depth < MAX_DEPTH {
                    below.extend(page.iter().filter(|(_, e)| is_directory(e)).map(|(n, e)| {
                        let (location, depth) = (here.location, here.depth + 1);
                        Directory { location, id: e.file_id, address: here.address.child(n), depth }
                    }));
                }
                self.send(link, items)
            })?;
            waiting.extend(below.into_iter().rev());
        }
        Ok(())
    }

    /// Sends everything below an address, each directory followed by what is in it.
    pub fn tree(&self, target: &Target, levels: Option<u32>, link: &Link) -> Outcome<Value> {
        let address = self.parse(target)?;
        let levels = levels.unwrap_or(MAX_DEPTH).min(MAX_DEPTH);
        let mut branch = Branch { daemon: self, link, levels, waiting: Vec::new() };
        match self.find(&address)? {
            Place::Root => {
                for mut device in self.devices() {
                    device.depth = 1;
                    let name = device.name.clone();
                    branch.put(device)?;
                    branch.device(&name, 1)?;
                }
            }
            Place::Device { name } => branch.device(&name, 0)?,
            Place::Entry { location, entry, .. } if is_directory(&entry) => {
                branch.directory(&directory(&location, &entry, &address, 0))?;
            }
            Place::Entry { .. } | Place::Content(_) => {
                return Err(Failure::new(Code::Invalid, format!("{address} is not a directory"))
                    .hint("`sd info` shows a file"));
            }
        }
        branch.flush()?;
        Ok(json!({ "address": address.to_string() }))
    }

    pub fn info(&self, target: &Target) -> Outcome<InfoReply> {
        let address = self.parse(target)?;
        match self.find(&address)? {
            Place::Root => Ok(bare_info(&address, "/", "library")),
            Place::Device { name } => {
                let member = self.member_named(&name)?;
                Ok(InfoReply {
                    owner: Some(device_name(&member)),
                    online: Some(self.is_online(&member.id)),
                    ..bare_info(&address, &name, "device")
                })
            }
            Place::Content(id) => {
                let holders = self.holders(id)?;
                let any = self.holder_entries(id)?.into_iter().next();
                Ok(InfoReply {
                    size: any.map(|(_, entry)| entry.attr.size),
                    content: Some(id.to_string()),
                    holders,
                    ..bare_info(&address, &id.to_string(), "file")
                })
            }
            Place::Entry { location, path, entry } => {
                self.entry_info(&address, &location, &path, &entry)
            }
        }
    }

    fn entry_info(
        &self,
        address: &SdPath,
        location: &Location,
        path: &[Name],
        entry: &Entry,
    ) -> Outcome<InfoReply> {
        let own = location.owner == self.me;
        let member = self.library.with(|s| s.member(location.owner).map(device_name));
        let local_path = self.folder(location).map(|mut local| {
            path.iter().for_each(|name| local.push(AsRef::<std::ffi::OsStr>::as_ref(name)));
            local.display().to_string()
        });
        let name = path.last().map_or(location.name.clone(), |n| n.display().into_owned());
        let is_file = entry.attr.file_type == FileType::File;
        let version = Version::of(location.id, entry);
        let attr = &entry.attr;
        Ok(InfoReply {
            owner: member,
            online: Some(own || self.is_online(&location.owner)),
            location: Some(location.name.clone()),
            local_path,
            size: Some(attr.size),
            blocks: Some(attr.blocks),
            mode: Some(octal(attr.perm)),
            uid: Some(attr.uid),
            gid: Some(attr.gid),
            nlink: Some(attr.nlink),
            mtime: Some(rfc3339(attr.mtime)),
            ctime: Some(rfc3339(attr.ctime)),
            btime: attr.btime.map(rfc3339),
            target: target_of(entry),
            content: entry.content.map(|id| id.to_string()),
            pending: self.pending_below(location.no, path),
            cached_bytes: (is_file && !own).then(|| self.cache.cached_bytes(&version)),
            pinned: self.pin_above(location.no, entry.file_id)?,
            holders: entry.content.map_or(Ok(Vec::new()), |id| self.holders(id))?,
            ..bare_info(address, &name, kind_of(attr.file_type))
        })
    }

    fn is_online(&self, device: &vfs_core::model::DeviceId) -> bool {
        *device == self.me || self.node.peers().iter().any(|p| p.id == *device && p.online)
    }

    fn holders(&self, id: ContentId) -> Outcome<Vec<Holder>> {
        let entries = self.holder_entries(id)?;
        Ok(entries
            .into_iter()
            .filter_map(|(address, _)| match &address {
                SdPath::File { device, location: Some(location), .. } => Some(Holder {
                    device: device.clone(),
                    location: location.clone(),
                    address: address.to_string(),
                    online: self.member_named(device).is_ok_and(|m| self.is_online(&m.id)),
                }),
                _ => None,
            })
            .collect())
    }

    /// Every file known to have this content.
    fn holder_entries(&self, id: ContentId) -> Outcome<Vec<(SdPath, Entry)>> {
        let view = self.index.view().map_err(index_failure)?;
        let mut found = Vec::new();
        for (no, file) in view.holders(id).map_err(index_failure)? {
            let node = view.node(no, file).map_err(index_failure)?;
            let path = view.path(no, file).map_err(index_failure)?;
            let location = self.index.location(no);
            if let (Some(node), Some(path), Some(location)) = (node, path, location) {
                let address = SdPath::File {
                    device: self.name_of(location.owner),
                    location: Some(location.name.clone()),
                    path,
                };
                found.push((address, node.entry));
            }
        }
        Ok(found)
    }

    /// Reads a directory page by page; `visit` also learns which page is the last.
    fn each_page(
        &self,
        directory: &Directory,
        mut visit: impl FnMut(&[(Name, Entry)], bool) -> Outcome<()>,
    ) -> Outcome<()> {
        self.scan_if_own(directory.location, directory.id, &directory.address);
        let mut after: Option<Name> = None;
        loop {
            let mut page = Vec::with_capacity(PAGE);
            // One more than a page tells whether there is another.
            self.children(directory, after.as_ref(), &mut |n, e| {
                page.push((n.clone(), e.clone()));
                match page.len() > PAGE {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })?;
            let at_end = page.len() <= PAGE;
            page.truncate(PAGE);
            visit(&page, at_end)?;
            match (at_end, page.pop()) {
                (false, Some((name, _))) => after = Some(name),
                _ => return Ok(()),
            }
        }
    }

    /// What a mount shows in a directory, from the name after this one.
    fn children(
        &self,
        directory: &Directory,
        after: Option<&Name>,
        visit: &mut dyn FnMut(&Name, &Entry) -> ControlFlow<()>,
    ) -> Outcome<()> {
        // The first bytes after this name: names have no NUL.
        let from = after.map_or_else(Vec::new, |after| [after.as_bytes(), &[0]].concat());
        let view = self.outbox.view();
        view.children_from(directory.location, directory.id, &from, visit).map_err(index_failure)
    }

    fn scan_if_own(&self, no: LocationNo, dir: FileId, address: &SdPath) {
        let own = self.index.location(no).is_some_and(|l| l.owner == self.me);
        if own && let Err(error) = self.indexer.scan_now(no, dir) {
            // What was known before is still shown, as for a device that is offline.
            tracing::debug!(%error, %address, "cannot scan");
        }
    }

    fn send(&self, link: &Link, items: Vec<Item>) -> Outcome<()> {
        match items.is_empty() {
            true => Ok(()),
            false => link.blocking_send(Event::Items(items)),
        }
    }

    fn member_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.library.with(|s| s.active().map(|m| m.name.clone()).collect());
        names.sort();
        names
    }

    fn devices(&self) -> Vec<Item> {
        let names = self.member_names();
        let last = names.len();
        let named = names.into_iter().enumerate();
        named.map(|(i, name)| device_item(name, i + 1 == last)).collect()
    }

    pub fn locations_named(&self, device: &str) -> Vec<Arc<Location>> {
        let Ok(member) = self.member_named(device) else { return Vec::new() };
        let mut its: Vec<_> =
            self.index.locations().into_iter().filter(|l| l.owner == member.id).collect();
        its.sort_by(|a, b| a.name.cmp(&b.name));
        its
    }

    fn locations_of(&self, device: &str, depth: u32) -> Vec<Item> {
        let its = self.locations_named(device);
        let last = its.len();
        let numbered = its.iter().enumerate();
        numbered.map(|(i, l)| location_item(device, &l.name, depth, i + 1 == last)).collect()
    }

    /// The address that a person meant.
    pub fn parse(&self, target: &Target) -> Outcome<SdPath> {
        self.membership()?;
        match target {
            Target::Address(text) => text.parse().map_err(|e| {
                Failure::new(Code::Usage, format!("“{text}” is not an address: {e}"))
                    .hint("as sd://DEVICE/LOCATION/PATH; `sd ls` shows the devices")
            }),
            Target::Path(path) => self.address_of(&PathBuf::from(path.clone())),
        }
    }

    /// A path inside a mount of this device, or inside one of its locations.
    fn address_of(&self, path: &Path) -> Outcome<SdPath> {
        let points = self.mounts.points();
        if let Some(below) = points.iter().find_map(|m| path.strip_prefix(m).ok()) {
            return address_in_drive(path, below);
        }
        let (_, me) = self.membership()?;
        let locations = self.folders();
        let found = locations.iter().find_map(|l| Some((l, path.strip_prefix(&l.root).ok()?)));
        let Some((location, below)) = found else {
            return Err(Failure::new(
                Code::NotFound,
                format!(
                    "{} is neither in a mount nor in a location of this device",
                    path.display()
                ),
            )
            .hint("give an address (`sd ls` shows the devices), or add it: sd location add"));
        };
        Ok(SdPath::File {
            device: me.name,
            location: Some(location.name.clone()),
            path: names(path, below)?,
        })
    }

    fn find(&self, address: &SdPath) -> Outcome<Place> {
        let (device, location, path) = match address {
            SdPath::Root => return Ok(Place::Root),
            SdPath::Content(id) => return Ok(Place::Content(*id)),
            SdPath::File { device, location, path } => (device, location, path),
        };
        let member = self.member_named(device)?;
        let Some(location) = location else {
            return Ok(Place::Device { name: member.name });
        };
        let its = self.locations_named(device);
        let Some(found) = its.iter().find(|l| l.name == *location) else {
            return Err(unknown_location(location, its.iter().map(|l| l.name.as_str()), None));
        };
        let entry = self.resolve(found, path, address)?;
        Ok(Place::Entry { location: Arc::clone(found), path: path.clone(), entry })
    }

    /// The file or folder that an address names, as its owner calls it.
    pub fn entry_of(&self, target: &Target) -> Outcome<(SdPath, Arc<Location>, FileId)> {
        let address = self.parse(target)?;
        match self.find(&address)? {
            Place::Entry { location, entry, .. } => {
                let file = self.outbox.view().now(location.no, entry.file_id);
                Ok((address, location, file))
            }
            Place::Root | Place::Device { .. } => {
                Err(Failure::new(Code::Invalid, format!("{address} is not a location"))
                    .hint("give its locations one by one: sd://DEVICE/LOCATION"))
            }
            Place::Content(_) => {
                Err(Failure::new(Code::Invalid, format!("{address} names bytes, not a file"))
                    .hint("give the address of a file that has them; `sd info` shows which do"))
            }
        }
    }

    fn resolve(&self, location: &Location, path: &[Name], address: &SdPath) -> Outcome<Entry> {
        // A location just added has no row before its first scan.
        self.scan_if_own(location.no, FileId::ROOT, address);
        let top = self.entry_at(location, &[])?;
        let mut known = top.ok_or_else(|| nothing_known(address))?;
        for depth in 0..path.len() {
            if is_directory(&known) {
                self.scan_if_own(location.no, known.file_id, address);
            }
            let below = self.entry_at(location, &path[..=depth])?;
            known = below.ok_or_else(|| self.no_such_entry(location, path, address))?;
        }
        Ok(known)
    }

    fn entry_at(&self, location: &Location, path: &[Name]) -> Outcome<Option<Entry>> {
        let view = self.outbox.view();
        let top = view.node(location.no, FileId::ROOT).map_err(index_failure)?;
        let mut found = top.map(|node| node.entry);
        for name in path {
            let Some(dir) = found else { return Ok(None) };
            let below = view.entry(location.no, dir.file_id, name.as_bytes());
            found = below.map_err(index_failure)?;
        }
        Ok(found)
    }

    /// Says how far the path leads.
    fn no_such_entry(&self, location: &Location, path: &[Name], address: &SdPath) -> Failure {
        let failure = Failure::new(Code::NotFound, format!("{address} does not exist"));
        let known = (0..path.len())
            .rev()
            .find(|n| matches!(self.entry_at(location, &path[..*n]), Ok(Some(_))));
        let device = self.name_of(location.owner);
        let mut parent = location_address(&device, &location.name);
        path[..known.unwrap_or(0)].iter().for_each(|name| parent = parent.child(name));
        failure.hint(format!("look what is there: sd ls '{parent}'"))
    }
}

/// Writes a tree: items are sent in pages, not one by one.
struct Branch<'a> {
    daemon: &'a Daemon,
    link: &'a Link,
    levels: u32,
    waiting: Vec<Item>,
}

impl Branch<'_> {
    fn put(&mut self, item: Item) -> Outcome<()> {
        self.waiting.push(item);
        match self.waiting.len() >= PAGE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Outcome<()> {
        self.daemon.send(self.link, std::mem::take(&mut self.waiting))
    }

    fn device(&mut self, name: &str, depth: u32) -> Outcome<()> {
        if depth >= self.levels {
            return Ok(());
        }
        let locations = self.daemon.locations_named(name);
        for (i, location) in locations.iter().enumerate() {
            let last = i + 1 == locations.len();
            self.put(location_item(name, &location.name, depth + 1, last))?;
            let address = location_address(name, &location.name);
            self.directory(&Directory {
                location: location.no,
                id: FileId::ROOT,
                address,
                depth: depth + 1,
            })?;
        }
        Ok(())
    }

    /// Depth first, with the state of each level on the heap: a path may be long.
    fn directory(&mut self, start: &Directory) -> Outcome<()> {
        let mut open = Vec::new();
        open.extend(self.level(start)?);
        while let Some(level) = open.last_mut() {
            let Some((name, entry, last)) = level.next(self.daemon)? else {
                open.pop();
                continue;
            };
            let here = &level.directory;
            let address = here.address.child(&name);
            let depth = here.depth + 1;
            let below = Directory {
                location: here.location,
                id: entry.file_id,
                address: address.clone(),
                depth,
            };
            self.put(item(&address, &entry, depth, last))?;
            if is_directory(&entry) {
                open.extend(self.level(&below)?);
            }
        }
        Ok(())
    }

    fn level(&self, directory: &Directory) -> Outcome<Option<Level>> {
        if directory.depth >= self.levels {
            return Ok(None);
        }
        self.daemon.scan_if_own(directory.location, directory.id, &directory.address);
        Ok(Some(Level {
            directory: Directory {
                location: directory.location,
                id: directory.id,
                address: directory.address.clone(),
                depth: directory.depth,
            },
            page: Vec::new().into_iter(),
            after: None,
            more: true,
        }))
    }
}

/// A directory half read: the rest of a page, and where the next one begins.
struct Level {
    directory: Directory,
    page: std::vec::IntoIter<(Name, Entry)>,
    after: Option<Name>,
    more: bool,
}

impl Level {
    fn next(&mut self, daemon: &Daemon) -> Outcome<Option<(Name, Entry, bool)>> {
        if self.page.as_slice().is_empty() && self.more {
            self.read(daemon)?;
        }
        let Some((name, entry)) = self.page.next() else { return Ok(None) };
        if self.page.as_slice().is_empty() && self.more {
            self.read(daemon)?;
        }
        let last = self.page.as_slice().is_empty();
        Ok(Some((name, entry, last)))
    }

    fn read(&mut self, daemon: &Daemon) -> Outcome<()> {
        let mut page = Vec::new();
        daemon.children(&self.directory, self.after.as_ref(), &mut |name, entry| {
            page.push((name.clone(), entry.clone()));
            match page.len() >= PAGE {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        self.more = page.len() >= PAGE;
        self.after = page.last().map(|(name, _)| name.clone());
        self.page = page.into_iter();
        Ok(())
    }
}

fn nothing_known(address: &SdPath) -> Failure {
    Failure::new(Code::NotFound, format!("nothing is known of {address} yet"))
        .hint("its first scan, or the first contact with its device, is still to come")
}

fn address_in_drive(path: &Path, below: &Path) -> Outcome<SdPath> {
    let mut parts = names(path, below)?.into_iter();
    let mut text = || {
        let Some(name) = parts.next() else { return Ok(None) };
        String::from_utf8(name.as_bytes().to_vec()).map(Some).map_err(|_| {
            Failure::new(Code::NotFound, format!("{} does not exist", path.display()))
                .hint("names of devices and locations are UTF-8")
        })
    };
    let Some(device) = text()? else { return Ok(SdPath::Root) };
    let location = text()?;
    Ok(SdPath::File { device, location, path: parts.collect() })
}

fn names(whole: &Path, below: &Path) -> Outcome<Vec<Name>> {
    use std::os::unix::ffi::OsStrExt;
    below
        .components()
        .map(|part| {
            Name::new(part.as_os_str().as_bytes()).ok_or_else(|| {
                Failure::new(Code::Invalid, format!("{} is not a path", whole.display()))
            })
        })
        .collect()
}

fn is_directory(entry: &Entry) -> bool {
    entry.attr.file_type == FileType::Directory
}

fn directory(location: &Location, entry: &Entry, address: &SdPath, depth: u32) -> Directory {
    Directory { location: location.no, id: entry.file_id, address: address.clone(), depth }
}

fn location_address(device: &str, location: &str) -> SdPath {
    SdPath::File { device: device.into(), location: Some(location.into()), path: Vec::new() }
}

fn kind_of(file_type: FileType) -> &'static str {
    match file_type {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharDevice => "char_device",
        FileType::BlockDevice => "block_device",
    }
}

fn octal(perm: u16) -> String {
    format!("{perm:04o}")
}

fn target_of(entry: &Entry) -> Option<String> {
    entry.target.as_ref().map(|t| String::from_utf8_lossy(t).into_owned())
}

fn item(address: &SdPath, entry: &Entry, depth: u32, last: bool) -> Item {
    let name = match address {
        SdPath::File { path, location, device } => path.last().map_or_else(
            || location.clone().unwrap_or_else(|| device.clone()),
            |name| name.display().into_owned(),
        ),
        other => other.to_string(),
    };
    Item {
        address: address.to_string(),
        name,
        kind: kind_of(entry.attr.file_type).into(),
        size: Some(entry.attr.size),
        mode: Some(octal(entry.attr.perm)),
        mtime: Some(rfc3339(entry.attr.mtime)),
        content: entry.content.map(|id| id.to_string()),
        target: target_of(entry),
        depth,
        last,
    }
}

fn device_item(name: String, last: bool) -> Item {
    let address = SdPath::File { device: name.clone(), location: None, path: Vec::new() };
    named_item(&address, name, "device", 1, last)
}

fn location_item(device: &str, name: &str, depth: u32, last: bool) -> Item {
    named_item(&location_address(device, name), name.to_owned(), "location", depth, last)
}

fn named_item(address: &SdPath, name: String, kind: &str, depth: u32, last: bool) -> Item {
    Item {
        address: address.to_string(),
        name,
        kind: kind.into(),
        size: None,
        mode: None,
        mtime: None,
        content: None,
        target: None,
        depth,
        last,
    }
}

fn bare_info(address: &SdPath, name: &str, kind: &str) -> InfoReply {
    InfoReply {
        address: address.to_string(),
        name: name.to_owned(),
        kind: kind.into(),
        owner: None,
        online: None,
        location: None,
        local_path: None,
        size: None,
        blocks: None,
        mode: None,
        uid: None,
        gid: None,
        nlink: None,
        mtime: None,
        ctime: None,
        btime: None,
        target: None,
        content: None,
        cached_bytes: None,
        pinned: None,
        pending: PendingCount::default(),
        holders: Vec::new(),
    }
}
