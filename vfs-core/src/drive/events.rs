//! What programs that watch a directory are told of changes made elsewhere.
//!
//! A kernel raises inotify's events for calls that go through it, and for nothing else. So a
//! mount has such a call made for each change that somebody watches for ([`Event`]), and
//! answers it with what is so already. Here is decided which calls.
//!
//! Changes are gathered per name ([`Pending`]), so that what is told is the way from what was
//! known to what is now: a file that came and went meanwhile is not told, one that lost a name
//! and got another moved. What is gathered is bounded: beyond that, a directory is told only
//! that something in it changed.
//!
//! A call for a name that is gone needs an inode ([`Event::Deleted`]). It is the one that had the
//! name only if a program watches that very inode, so that it hears of its end, and if it is
//! certainly no other's: the kernel takes what it is told is deleted for dead. Else it is
//! one that no file has.

use super::inode::{Class, RemoteIno};
use super::own::Own;
use super::remote::Remote;
use super::top::Top;
use super::types::{Found, InodeNo};
use crate::changes::{Brief, Change, Noticed, Touched};
use crate::error::{FsResult, Kind};
use crate::index::ROOT_PARENT;
use crate::model::{Attr, FileId, FileType, LocationNo, Name, Time};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How many changed names are gathered one by one.
const NAMES_MAX: usize = 16_384;
/// With how many of them nobody waits for more.
const NAMES_FULL: usize = 4096;
/// And how many directories in which more changed.
const DIRECTORIES_MAX: usize = 256;

/// `PATH_MAX`, less room for a name.
const PATH_BYTES_MAX: usize = 4096 - 256;

/// A directory of a location.
type Dir = (LocationNo, FileId);

/// Changes that nobody was told of yet, in bounded memory.
#[derive(Debug, Default)]
pub struct Pending(Backlog);

/// What changed in a while.
#[derive(Debug, Default)]
pub struct Backlog {
    names: Vec<Named>,
    at: HashMap<(Dir, Name), usize>,
    /// In these something changed that is not among `names`.
    coarse: HashSet<Dir>,
    /// Something changed anywhere.
    everything: bool,
}

/// A name of a directory, and what became of it.
type Named = (Dir, Name, Net);

/// What became of one name.
#[derive(Clone, Copy, Debug)]
struct Net {
    was: Option<Brief>,
    now: Option<Brief>,
    touched: Option<Touched>,
}

impl Pending {
    /// These changed, after all that was given before.
    pub fn add(&mut self, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Entry { location, parent, name, was, now } => {
                    let net = Net { was: *was, now: *now, touched: None };
                    match (was, now) {
                        (None, None) => self.0.add_coarse((*location, *parent)),
                        _ => self.0.add((*location, *parent), name, net),
                    }
                }
                Change::Attributes { location, noticed: Some(noticed), .. } => {
                    let Noticed { parent, name, file, touched } = noticed;
                    let (was, now) = (Some(*file), Some(*file));
                    let net = Net { was, now, touched: Some(*touched) };
                    self.0.add((*location, *parent), name, net);
                }
                Change::Attributes { .. } => {}
                Change::Locations | Change::Devices | Change::Reset => self.missed(),
            }
        }
    }

    /// It is not known what changed.
    pub fn missed(&mut self) {
        self.0 = Backlog::of_everything();
    }

    /// Whether it should be told now, before too much of it is told as one.
    pub fn is_full(&self) -> bool {
        self.0.names.len() >= NAMES_FULL
    }

    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Some of it is to be told again, before what was added since.
    pub fn put_back(&mut self, before: Backlog) {
        let since = std::mem::replace(&mut self.0, before);
        self.0.extend(&since);
    }

    /// All of it, which is told now.
    pub fn take(&mut self) -> Backlog {
        std::mem::take(&mut self.0)
    }
}

impl Backlog {
    /// Anything may have changed.
    pub fn of_everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.coarse.is_empty() && !self.everything
    }

    /// These changed, after all that is here.
    pub fn extend(&mut self, since: &Self) {
        for (dir, name, net) in &since.names {
            self.add(*dir, name, *net);
        }
        since.coarse.iter().for_each(|dir| self.add_coarse(*dir));
        if since.everything {
            *self = Self::of_everything();
        }
    }

    /// It was told once: what is told again is that there are more bytes.
    pub fn only_grown(&mut self) {
        for (_, _, net) in &mut self.names {
            (net.was, net.touched) = (net.now, Some(Touched::Bytes));
        }
    }

    /// Takes out the names of files that this holds for, and what is not of single names.
    pub(super) fn split_off(&mut self, is_later: impl Fn(LocationNo, FileId) -> bool) -> Self {
        let (mut now, mut later) = (Self::default(), Self::default());
        for (dir, name, net) in std::mem::take(&mut self.names) {
            let is_later = net.now.is_some_and(|file| is_later(dir.0, file.file));
            let part = if is_later { &mut later } else { &mut now };
            part.add(dir, &name, net);
        }
        (self.names, self.at) = (now.names, now.at);
        later.coarse = std::mem::take(&mut self.coarse);
        later.everything = std::mem::take(&mut self.everything);
        later
    }

    fn add(&mut self, dir: Dir, name: &Name, net: Net) {
        if self.everything || self.coarse.contains(&dir) {
            return;
        }
        if let Some(at) = self.at.get(&(dir, name.clone())) {
            let known = &mut self.names[*at].2;
            known.now = net.now;
            known.touched = known.touched.max(net.touched);
            return;
        }
        if self.names.len() == NAMES_MAX {
            self.fold();
            return self.add(dir, name, net);
        }
        self.at.insert((dir, name.clone()), self.names.len());
        self.names.push((dir, name.clone(), net));
    }

    fn add_coarse(&mut self, dir: Dir) {
        if !self.everything {
            self.coarse.insert(dir);
            self.limit();
        }
    }

    /// Too many names: their directories stand for them.
    fn fold(&mut self) {
        self.coarse.extend(self.names.drain(..).map(|(dir, ..)| dir));
        self.at.clear();
        self.limit();
    }

    fn limit(&mut self) {
        if self.coarse.len() > DIRECTORIES_MAX {
            *self = Self::of_everything();
        }
    }
}

/// A name of a directory, and how to get there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The directory.
    pub dir: InodeNo,
    /// The names from the root to it, joined by `/`.
    pub path: Arc<[u8]>,
    /// The name.
    pub name: Name,
}

/// The call that a mount has made, for the sake of its event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The name is made.
    Created(Place),
    /// The name is removed, as that of this inode.
    Deleted(Place, Found),
    /// The name is given to another place, where it replaces this inode.
    Moved(Place, Place, Option<Found>),
    /// The bytes change.
    Modified(Place),
    /// Mode or times change.
    Touched(Place),
    /// Mode or times of a directory change: something in it did.
    Directory {
        /// The directory.
        dir: InodeNo,
        /// The names from the root to it, joined by `/`.
        path: Arc<[u8]>,
    },
}

impl Event {
    /// Where in a directory it happens.
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        let (first, second) = match self {
            Self::Created(at) | Self::Deleted(at, _) => (Some(at), None),
            Self::Modified(at) | Self::Touched(at) => (Some(at), None),
            Self::Moved(from, to, _) => (Some(from), Some(to)),
            Self::Directory { .. } => (None, None),
        };
        first.into_iter().chain(second)
    }
}

/// Changes of one while, being turned into events.
pub(super) struct Translation<'a> {
    top: &'a Top,
    own: &'a Own,
    remote: &'a Remote,
    watched: &'a HashSet<InodeNo>,
    /// The others' files and directories that are watched, and the own locations with any.
    near: (HashSet<(LocationNo, FileId)>, HashSet<LocationNo>),
    directories: HashMap<Dir, Option<Directory>>,
    out: Vec<Event>,
}

/// A directory that a kernel can reach.
#[derive(Clone)]
struct Directory {
    ino: InodeNo,
    path: Arc<[u8]>,
    depth: usize,
    is_own: bool,
}

/// A name that changed, in a directory that can be reached.
struct Changed {
    location: LocationNo,
    dir: Directory,
    name: Name,
    net: Net,
    /// The numbers of what had and has the name.
    was: Option<InodeNo>,
    now: Option<InodeNo>,
}

/// The file that does not have this name any more.
fn lost(((location, _), _, net): &Named) -> Option<(LocationNo, FileId)> {
    let was = net.was.filter(|was| net.now.is_none_or(|now| now.file != was.file));
    was.map(|was| (*location, was.file))
}

/// The file that has this name now and did not have it.
fn gained(((location, _), _, net): &Named) -> Option<(LocationNo, FileId)> {
    let now = net.now.filter(|now| net.was.is_none_or(|was| was.file != now.file));
    now.map(|now| (*location, now.file))
}

impl Changed {
    fn place(&self) -> Place {
        let Directory { ino, path, .. } = &self.dir;
        Place { dir: *ino, path: Arc::clone(path), name: self.name.clone() }
    }
}

impl<'a> Translation<'a> {
    pub fn new(
        top: &'a Top,
        own: &'a Own,
        remote: &'a Remote,
        watched: &'a HashSet<InodeNo>,
    ) -> Self {
        let (mut files, mut locations) = (HashSet::new(), HashSet::new());
        for ino in watched {
            match ino.class() {
                Class::Remote(ino) => drop(files.insert((ino.location, ino.file))),
                Class::Own(location) => drop(locations.insert(location)),
                Class::Root | Class::Device => {}
            }
        }
        let near = (files, locations);
        Self { top, own, remote, watched, near, directories: HashMap::new(), out: Vec::new() }
    }

    /// The events; what the index cannot tell just now, every watched directory is told of.
    pub fn of(mut self, changed: Backlog) -> Vec<Event> {
        if self.watched.is_empty() {
            return Vec::new();
        }
        let told = match changed.everything {
            true => self.everything(),
            false => self.names(changed.names).and_then(|()| self.coarse(changed.coarse)),
        };
        if let Err(error) = told {
            tracing::warn!(%error, "changes could not be told to the programs that watch");
        }
        self.out
    }

    fn names(&mut self, names: Vec<Named>) -> FsResult<()> {
        let mut changed = Vec::new();
        let (mut gaining, mut losing) = (HashMap::new(), Vec::new());
        for named in self.audible(names) {
            let (lost, gained) = (lost(&named), gained(&named));
            let Some(change) = self.changed(named)? else { continue };
            gaining.extend(gained.map(|file| (file, changed.len())));
            losing.extend(lost.map(|file| (file, changed.len())));
            changed.push(change);
        }
        let mut moved_to = HashMap::new();
        let mut moved_from = HashSet::new();
        for (file, from) in losing {
            if let Some(&to) = gaining.get(&file)
                && (self.hears(&changed[from]) || self.hears(&changed[to]))
                && !moved_to.contains_key(&to)
            {
                moved_to.insert(to, from);
                moved_from.insert(from);
            }
        }
        for (at, change) in changed.iter().enumerate() {
            match moved_to.get(&at) {
                Some(&from) => self.moved(&changed[from], change),
                // Told with the place that it moved to.
                None if moved_from.contains(&at) => {}
                None if self.hears(change) => self.alone(change),
                None => {}
            }
        }
        Ok(())
    }

    /// Those that somebody may hear of, and the other halves of moves; for the rest, however much
    /// it is, the index is not asked.
    fn audible(&self, names: Vec<Named>) -> Vec<Named> {
        let near: Vec<bool> = names.iter().map(|named| self.is_near(named)).collect();
        let files_of = |named: &Named| lost(named).into_iter().chain(gained(named));
        let files: HashSet<_> = names
            .iter()
            .zip(&near)
            .filter(|(_, near)| **near)
            .flat_map(|(n, _)| files_of(n))
            .collect();
        let audible = names.into_iter().zip(near);
        audible
            .filter(|(named, near)| *near || files_of(named).any(|file| files.contains(&file)))
            .map(|(named, _)| named)
            .collect()
    }

    fn is_near(&self, ((location, parent), _, net): &Named) -> bool {
        let view = self.remote.outbox.view();
        let (files, locations) = &self.near;
        let is_watched = |file| files.contains(&(*location, view.first(*location, file)));
        let of_name = net.was.iter().chain(&net.now).map(|brief| brief.file);
        locations.contains(location) || of_name.chain([*parent]).any(is_watched)
    }

    fn hears(&self, change: &Changed) -> bool {
        let hears = |ino: &InodeNo| self.watched.contains(ino);
        hears(&change.dir.ino) || change.was.iter().chain(&change.now).any(hears)
    }

    fn changed(&mut self, (at, name, net): Named) -> FsResult<Option<Changed>> {
        let (location, parent) = at;
        let Some(dir) = self.directory(at)? else { return Ok(None) };
        // What a program did through the mount, its kernel has told already.
        if !dir.is_own && self.remote.outbox.view().covers(location, parent, &name) {
            return Ok(None);
        }
        let number = |brief: Option<Brief>| brief.and_then(|b| self.number(location, &dir, &b));
        let (was, now) = (number(net.was), number(net.now));
        Ok(Some(Changed { location, dir, name, net, was, now }))
    }

    /// A change that is no half of a move.
    fn alone(&mut self, change: &Changed) {
        let place = change.place();
        match (change.net.was, change.net.now) {
            (None, None) => {}
            (None, Some(_)) => {
                // Who watches the file itself has seen it before it was told.
                let is_watched = change.now.is_some_and(|ino| self.watched.contains(&ino));
                self.out.push(Event::Created(place.clone()));
                self.out.extend(is_watched.then_some(Event::Modified(place)));
            }
            (Some(was), None) => {
                let ghost = self.ghost(change, &was);
                self.out.push(Event::Deleted(place, ghost));
            }
            (Some(was), Some(now)) if self.is_another(change, &was, &now) => {
                let ghost = self.ghost(change, &was);
                self.out.push(Event::Deleted(place.clone(), ghost));
                self.out.push(Event::Created(place));
            }
            (Some(was), Some(now)) => {
                let is_new = (was.file, was.generation) != (now.file, now.generation);
                match is_new || change.net.touched == Some(Touched::Bytes) {
                    true => self.out.push(Event::Modified(place)),
                    false => self.out.push(Event::Touched(place)),
                }
            }
        }
    }

    /// Whether a name is told to have gone and come: it is of another type, or somebody watches
    /// the inode that had it and would hear of nothing else.
    fn is_another(&self, change: &Changed, was: &Brief, now: &Brief) -> bool {
        let is_watched = change.was.is_some_and(|ino| self.watched.contains(&ino));
        was.file_type != now.file_type || (change.was != change.now && is_watched)
    }

    fn moved(&mut self, from: &Changed, to: &Changed) {
        let over = to.net.was.map(|was| self.ghost(to, &was));
        // The kernel moves files over files and directories over directories.
        let type_of = |brief: Option<Brief>| brief.map(|b| b.file_type == FileType::Directory);
        let fits = type_of(to.net.was).is_none_or(|is| Some(is) == type_of(to.net.now));
        if let Some(ghost) = over.filter(|_| !fits) {
            self.out.push(Event::Deleted(to.place(), ghost));
        }
        let over = over.filter(|_| fits);
        self.out.push(Event::Moved(from.place(), to.place(), over));
        if from.net.now.is_some() {
            self.out.push(Event::Created(from.place()));
        }
    }

    fn coarse(&mut self, directories: HashSet<Dir>) -> FsResult<()> {
        for dir in directories {
            if let Some(Directory { ino, path, .. }) = self.directory(dir)?
                && self.watched.contains(&ino)
            {
                self.out.push(Event::Directory { dir: ino, path });
            }
        }
        Ok(())
    }

    /// Every directory that is watched, and can be named, is told that something changed.
    fn everything(&mut self) -> FsResult<()> {
        for &ino in self.watched {
            let dir = match ino.class() {
                Class::Remote(remote) => Some((remote.location, remote.file)),
                Class::Own(location) => self.own_directory(location, ino)?,
                Class::Root | Class::Device => None,
            };
            let Some(dir) = dir else { continue };
            if let Some(Directory { ino: now, path, .. }) = self.directory(dir)?
                && now == ino
            {
                self.out.push(Event::Directory { dir: ino, path });
            }
        }
        Ok(())
    }

    fn own_directory(&self, location: LocationNo, ino: InodeNo) -> FsResult<Option<Dir>> {
        if ino == InodeNo::own_root(location) {
            return Ok(Some((location, FileId::ROOT)));
        }
        let Some(node) = self.own.table.get(ino) else { return Ok(None) };
        let view = self.own.index.view()?;
        for place in node.places() {
            let parent = self.own_directory(location, place.parent)?;
            if let Some((_, parent)) = parent
                && let Some(entry) = view.entry(location, parent, place.name.as_bytes())?
            {
                return Ok(Some((location, entry.file_id)));
            }
        }
        Ok(None)
    }

    /// A directory as a kernel knows it; `None` when it cannot be reached, or is no directory.
    fn directory(&mut self, dir: Dir) -> FsResult<Option<Directory>> {
        if let Some(known) = self.directories.get(&dir) {
            return Ok(known.clone());
        }
        let found = self.find_directory(dir)?;
        self.directories.insert(dir, found.clone());
        Ok(found)
    }

    fn find_directory(&self, (location, file): Dir) -> FsResult<Option<Directory>> {
        if file == ROOT_PARENT {
            return Ok(None);
        }
        let Some(place) = self.own.index.location(location) else { return Ok(None) };
        let is_own = place.owner == self.own.index.me();
        let Some((way, folder)) = self.top.way_to(&place) else { return Ok(None) };
        let below = match is_own {
            true => self.own.index.view()?.path(location, file)?,
            false => self.remote.outbox.view().path(location, file)?,
        };
        let Some(below) = below else { return Ok(None) };
        let ino = match (file, is_own) {
            (FileId::ROOT, _) => folder,
            (_, false) => {
                let file = self.remote.outbox.view().first(location, file);
                RemoteIno::directory(location, below.len(), file).no()
            }
            (_, true) => {
                let node = self.own.index.view()?.node(location, file)?;
                let held = node.and_then(|n| self.own.table.of_disk(location, n.entry.disk_ino));
                let Some(held) = held else { return Ok(None) };
                held.no
            }
        };
        let names: Vec<_> = way.iter().chain(&below).map(Name::as_bytes).collect();
        // No call could name what is in it; and an owner chooses how long its paths are.
        if names.iter().map(|name| name.len() + 1).sum::<usize>() > PATH_BYTES_MAX {
            return Ok(None);
        }
        Ok(Some(Directory { ino, path: names.join(&b'/').into(), depth: below.len(), is_own }))
    }

    /// The number that a kernel knows an entry of this directory by.
    fn number(&self, location: LocationNo, dir: &Directory, entry: &Brief) -> Option<InodeNo> {
        if dir.is_own {
            return self.own.table.of_disk(location, entry.disk_ino).map(|node| node.no);
        }
        let ino = RemoteIno::of_brief(location, dir.depth, entry);
        Some(RemoteIno { file: self.remote.outbox.view().first(location, ino.file), ..ino }.no())
    }

    /// An inode for a name that is gone.
    fn ghost(&self, change: &Changed, was: &Brief) -> Found {
        static COUNT: AtomicU64 = AtomicU64::new(1);
        let heard = change.was.filter(|ino| self.watched.contains(ino));
        match heard.map(|ino| (ino, self.end_of(ino, was, change))) {
            // The kernel believes size and times, and may show them to who has the file open.
            Some((_, End::Open(found))) => {
                let attr = Attr { nlink: 1, ..found.attr };
                Found { attr, valid_for: Duration::ZERO, ..found }
            }
            Some((ino, End::Gone { generation })) => self.made_up(ino, generation, was),
            Some((_, End::Unknown)) | None => {
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                self.made_up(InodeNo::of_nothing(count), count, was)
            }
        }
    }

    /// An inode that nobody has open.
    fn made_up(&self, ino: InodeNo, generation: u64, was: &Brief) -> Found {
        let attr = Attr {
            file_type: was.file_type,
            perm: 0o600,
            uid: self.top.uid,
            gid: self.top.gid,
            nlink: 1,
            size: was.size,
            blocks: 0,
            mtime: Time::default(),
            ctime: Time::default(),
            btime: None,
            rdev: 0,
        };
        Found { ino, generation, attr, atime: Time::default(), valid_for: Duration::ZERO }
    }

    /// Whether no name leads to this inode any more. A directory may have moved without the index
    /// knowing where to yet, and the kernel would hold it for dead where it is now.
    fn end_of(&self, ino: InodeNo, was: &Brief, change: &Changed) -> End {
        match ino.class() {
            _ if was.file_type == FileType::Directory => End::Unknown,
            Class::Remote(remote) => match self.remote.node(remote) {
                Err(error) if error.kind() == Kind::Stale => self.end_of_remote(remote, was),
                _ => End::Unknown,
            },
            Class::Own(_) => match self.own.getattr(change.location, ino, None) {
                Ok(found) if found.attr.nlink == 0 => End::Open(found),
                _ => End::Unknown,
            },
            Class::Root | Class::Device => End::Unknown,
        }
    }

    fn end_of_remote(&self, ino: RemoteIno, was: &Brief) -> End {
        let is_versioned = was.file_type == FileType::File;
        match self.remote.getattr(ino, None) {
            Ok(Some(open)) => End::Open(open),
            _ => End::Gone { generation: if is_versioned { was.generation.into() } else { 0 } },
        }
    }
}

/// What is known of an inode whose name is gone.
enum End {
    /// It has no name; somebody may have it open, and sees this.
    Open(Found),
    /// It is no more.
    Gone { generation: u64 },
    /// It may have another name.
    Unknown,
}
