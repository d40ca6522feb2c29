//! What this device must show already although the owner has not said so yet.
//!
//! Every operation that waits for its owner, or whose result has not come back
//! as rows of the index, changes what programs see: names that are there or
//! gone, attributes, bytes. [`Overlay`] is the sum of these changes, each with
//! the number of the operation that made it; [`Merged`] lays it over the index.
//!
//! It is a pure function of the operations in their order ([`Overlay::apply`]),
//! so it needs no place on a disk: it is made anew from the journal. An operation
//! whose result is in the index takes its changes away again, but only those
//! that no later operation has replaced ([`Overlay::retire`]).

mod ids;
mod view;

#[cfg(test)]
mod tests;

pub use view::Merged;

use crate::model::{Attr, Entry, FileId, FileType, LocationNo, Name, Time};
use crate::ops::{Change, New, Place};
use ids::Ids;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The generation that an owner's index gives to a new file, so that its inode number is the
/// same before and after it was delivered.
pub const FIRST_GENERATION: u32 = 1;

/// Bytes as they are being written: what `stat` shows of them, shared with whoever writes.
#[derive(Debug)]
pub struct Live {
    size: AtomicU64,
    times: Mutex<(Time, Time)>,
}

impl Live {
    /// Bytes of this size, last changed then.
    pub fn new(size: u64, mtime: Time) -> Arc<Self> {
        Arc::new(Self { size: AtomicU64::new(size), times: Mutex::new((mtime, mtime)) })
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Last change of the bytes.
    pub fn mtime(&self) -> Time {
        self.times().0
    }

    /// Last change of bytes or times.
    pub fn ctime(&self) -> Time {
        self.times().1
    }

    fn times(&self) -> (Time, Time) {
        *self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes changed now.
    pub fn changed(&self, size: u64) {
        self.size.store(size, Ordering::Release);
        let now = Time::now();
        *self.times.lock().unwrap_or_else(PoisonError::into_inner) = (now, now);
    }

    /// Somebody set the time of the last change.
    pub fn set_mtime(&self, mtime: Time, now: Time) {
        *self.times.lock().unwrap_or_else(PoisonError::into_inner) = (mtime, now);
    }
}

/// New bytes, and the generation under which this device shows them.
#[derive(Clone, Debug)]
pub struct Bytes {
    /// Their size and times.
    pub live: Arc<Live>,
    /// That of the version that they were written over.
    pub generation: u32,
}

/// An operation to be shown.
#[derive(Debug)]
pub struct Shown<'a> {
    /// Its number.
    pub no: u64,
    /// When it was asked for.
    pub at: Time,
    /// What was asked for.
    pub change: &'a Change,
    /// Of an operation on bytes.
    pub bytes: Option<Bytes>,
    /// What it moves or removes is a directory.
    pub is_directory: bool,
    /// Under which generation this device shows the file; 0: the operation makes no version.
    pub generation: u32,
}

/// The number that stands for bytes that no operation carries yet: after every operation.
const UNCOMMITTED: u64 = u64::MAX;

/// Values, each with the operation that set it; the last one is shown. The earlier ones are
/// shown again when the last operation comes to nothing.
#[derive(Debug)]
struct Stack<T>(Vec<(u64, T)>);

impl<T> Default for Stack<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Stack<T> {
    fn top(&self) -> Option<&T> {
        self.0.last().map(|(_, value)| value)
    }

    fn set(&mut self, by: u64, value: T) {
        self.retire(by);
        self.0.push((by, value));
    }

    fn retire(&mut self, by: u64) {
        self.0.retain(|(n, _)| *n != by);
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An extended attribute's; `None`: it was removed.
type Value = Option<Box<[u8]>>;

/// What is shown of one file beside, or instead of, its row.
#[derive(Debug, Default)]
struct Patch {
    made: Stack<Entry>,
    bytes: Stack<Bytes>,
    perm: Stack<u16>,
    mtime: Stack<Time>,
    /// With this time of the last change, set here, a row is no other version of the bytes than
    /// the one of this generation.
    frozen: Stack<(Time, u32)>,
    atime: Stack<Time>,
    /// The last change of attributes.
    ctime: Option<(u64, Time)>,
    /// The last change of a directory's listing.
    listing: Option<(u64, Time)>,
    links: Stack<i64>,
    xattrs: BTreeMap<Box<[u8]>, Stack<Value>>,
}

/// Bytes of ours that have become a version of the owner: it is shown under the number that
/// the file had here before, so that no program sees the inode change under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    /// The owner's generation.
    generation: u32,
    shown: u32,
}

/// What is shown of one location.
#[derive(Debug, Default)]
struct Local {
    /// What names refer to; `None`: it is gone.
    names: HashMap<FileId, BTreeMap<Name, Stack<Option<FileId>>>>,
    /// Where a file is present in `names`.
    places: HashMap<FileId, Vec<Place>>,
    files: HashMap<FileId, Patch>,
    kept: HashMap<FileId, Kept>,
    ids: Ids,
}

/// What this device shows that the index does not have yet.
#[derive(Debug, Default)]
pub struct Overlay {
    locations: HashMap<LocationNo, Local>,
}

impl Overlay {
    /// Shows what an operation does; to be called in the order of their numbers. A content that
    /// is given again replaces the one before.
    pub fn apply(&mut self, location: LocationNo, shown: Shown<'_>) {
        self.locations.entry(location).or_default().apply(shown);
    }

    /// The result of an operation is in the index, or never will be: what it showed goes.
    pub fn retire(&mut self, location: LocationNo, no: u64, change: &Change) {
        self.change(location, |local| local.retire(no, change));
    }

    /// Shows bytes that no operation carries yet.
    pub fn show_uncommitted(&mut self, location: LocationNo, file: FileId, bytes: Bytes) {
        let local = self.locations.entry(location).or_default();
        local.files.entry(local.ids.now(file)).or_default().bytes.set(UNCOMMITTED, bytes);
    }

    /// Bytes that no operation carried never will be.
    pub fn hide_uncommitted(&mut self, location: LocationNo, file: FileId) {
        self.change(location, |local| {
            local.patch(local.ids.now(file), |patch| patch.bytes.retire(UNCOMMITTED));
        });
    }

    fn change(&mut self, location: LocationNo, change: impl FnOnce(&mut Local)) {
        let Some(local) = self.locations.get_mut(&location) else { return };
        change(local);
        if local.is_empty() {
            self.locations.remove(&location);
        }
    }

    /// Shows these operations of a location, in the order of their numbers, and no other ones.
    /// Bytes that no operation carries yet stay, as do the numbers that are kept.
    pub fn replace<'a>(&mut self, location: LocationNo, all: impl Iterator<Item = Shown<'a>>) {
        let Local { files, kept, ids, .. } = self.locations.remove(&location).unwrap_or_default();
        let mut local = Local { kept, ids, ..Local::default() };
        all.for_each(|shown| local.apply(shown));
        for (file, patch) in files {
            let uncommitted = patch.bytes.0.into_iter().find(|(by, _)| *by == UNCOMMITTED);
            if let Some((_, bytes)) = uncommitted {
                let file = local.ids.now(file);
                local.files.entry(file).or_default().bytes.set(UNCOMMITTED, bytes);
            }
        }
        if !local.is_empty() {
            self.locations.insert(location, local);
        }
    }

    /// Forgets what is shown of a location.
    pub fn clear(&mut self, location: LocationNo) {
        self.locations.remove(&location);
    }

    /// The owner's generation of a file is a version that was written here, and is shown under
    /// this generation from now on.
    pub fn keep(&mut self, location: LocationNo, file: FileId, generation: u32, shown: u32) {
        let local = self.locations.entry(location).or_default();
        match generation == shown {
            true => drop(local.kept.remove(&file)),
            false => drop(local.kept.insert(file, Kept { generation, shown })),
        }
    }

    /// The owner calls a file by another id than this device did, to whose programs it remains
    /// the same. What is shown of it moves with [`Self::replace`].
    pub fn rename_file(&mut self, location: LocationNo, old: FileId, new: FileId) {
        self.locations.entry(location).or_default().ids.rename(old, new);
    }

    /// What the owner calls the file that this device once called so.
    pub fn now(&self, location: LocationNo, file: FileId) -> FileId {
        self.locations.get(&location).map_or(file, |local| local.ids.now(file))
    }

    /// What this device called the file first; by this its programs know it.
    pub fn first(&self, location: LocationNo, file: FileId) -> FileId {
        self.locations.get(&location).map_or(file, |local| local.ids.first(file))
    }

    /// Whether a name is shown from here, so that a change of its row changes nothing of it.
    /// Bytes that are shown of a file say nothing of its names: one may have come, or come back,
    /// that no kernel knows.
    pub fn covers(&self, location: LocationNo, dir: FileId, name: &Name) -> bool {
        let local = self.locations.get(&location);
        local.is_some_and(|local| local.name(local.ids.now(dir), name.as_bytes()).is_some())
    }

    /// Whether these bytes of a file are among those that are shown last.
    pub fn shows(&self, location: LocationNo, file: FileId, live: &Arc<Live>) -> bool {
        let top = self.patch(location, file).and_then(|patch| patch.bytes.0.last());
        top.is_some_and(|(by, bytes)| *by == UNCOMMITTED && Arc::ptr_eq(&bytes.live, live))
    }

    /// The bytes of a file that are shown.
    pub fn bytes(&self, location: LocationNo, file: FileId) -> Option<Bytes> {
        self.patch(location, file)?.bytes.top().cloned()
    }

    /// What was set, or removed (`Some(None)`), of a file's extended attributes.
    pub fn xattr(
        &self,
        location: LocationNo,
        file: FileId,
        name: &[u8],
    ) -> Option<Option<Box<[u8]>>> {
        self.patch(location, file)?.xattrs.get(name)?.top().cloned()
    }

    /// The names of extended attributes that were set (`true`) or removed.
    pub fn xattrs(&self, location: LocationNo, file: FileId) -> Vec<(Box<[u8]>, bool)> {
        let Some(patch) = self.patch(location, file) else { return Vec::new() };
        let shown = patch.xattrs.iter().filter_map(|(n, v)| Some((n.clone(), v.top()?.is_some())));
        shown.collect()
    }

    /// The last access that was set.
    pub fn atime(&self, location: LocationNo, file: FileId) -> Option<Time> {
        self.patch(location, file)?.atime.top().copied()
    }

    fn patch(&self, location: LocationNo, file: FileId) -> Option<&Patch> {
        let local = self.locations.get(&location)?;
        local.files.get(&local.ids.now(file))
    }
}

impl Local {
    fn is_empty(&self) -> bool {
        let Self { names, files, kept, ids, places: _ } = self;
        names.is_empty() && files.is_empty() && kept.is_empty() && ids.is_empty()
    }

    fn apply(&mut self, shown: Shown<'_>) {
        let Shown { no, at: when, change, bytes, is_directory, generation } = shown;
        let file = change.file();
        let patch = self.files.entry(file).or_default();
        patch.ctime = Some((no, when));
        if let Some(bytes) = bytes {
            patch.bytes.retire(UNCOMMITTED);
            patch.bytes.set(no, bytes);
        }
        match change {
            Change::Create { what, perm, mtime, .. } => {
                patch.made.set(no, made(file, what, *perm, *mtime));
            }
            Change::SetAttr { perm, atime, mtime, .. } => {
                patch.set_attributes(no, when, (*perm, *atime, *mtime));
                if let Some(mtime) = mtime.filter(|_| generation != 0) {
                    patch.frozen.set(no, (mtime, generation));
                }
            }
            Change::Xattr { name, value, .. } => {
                patch.xattrs.entry(name.clone()).or_default().set(no, value.clone());
            }
            Change::Write { .. }
            | Change::Link { .. }
            | Change::Rename { .. }
            | Change::Unlink { .. }
            | Change::Rmdir { .. } => {}
        }
        self.apply_to_names(no, when, change, is_directory);
    }

    fn apply_to_names(&mut self, no: u64, when: Time, change: &Change, is_directory: bool) {
        match change {
            Change::Create { at, file, what, .. } => {
                self.point(no, at, Some(*file));
                self.list(no, when, at.dir, i64::from(matches!(what, New::Directory)));
            }
            Change::Link { at, file } => {
                self.point(no, at, Some(*file));
                self.list(no, when, at.dir, 0);
                self.link(no, *file, 1);
            }
            Change::Rename { file, from, to, replaced, exchange } => {
                let replaced = replaced.as_ref().map(|(file, _)| *file);
                self.point(no, from, replaced.filter(|_| *exchange));
                self.point(no, to, Some(*file));
                let moved = is_directory && from.dir != to.dir && !exchange;
                self.list(no, when, from.dir, -i64::from(moved));
                self.list(no, when, to.dir, i64::from(moved));
                if let Some(replaced) = replaced.filter(|_| !exchange) {
                    self.link(no, replaced, -1);
                }
            }
            Change::Unlink { at, file, .. } => {
                self.point(no, at, None);
                self.list(no, when, at.dir, 0);
                self.link(no, *file, -1);
            }
            Change::Rmdir { at, .. } => {
                self.point(no, at, None);
                self.list(no, when, at.dir, -1);
            }
            Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => {}
        }
    }

    fn point(&mut self, by: u64, at: &Place, file: Option<FileId>) {
        self.with_name(at, |shown| shown.set(by, file));
    }

    /// Changes what a name refers to, and where the files are present with it.
    fn with_name(&mut self, at: &Place, change: impl FnOnce(&mut Stack<Option<FileId>>)) {
        let names = self.names.entry(at.dir).or_default();
        let shown = names.entry(at.name.clone()).or_default();
        let before = shown.top().copied().flatten();
        change(shown);
        let after = shown.top().copied().flatten();
        if shown.is_empty() {
            names.remove(&at.name);
            if names.is_empty() {
                self.names.remove(&at.dir);
            }
        }
        if before == after {
            return;
        }
        if let Some(file) = before
            && let Some(places) = self.places.get_mut(&file)
        {
            places.retain(|place| place != at);
            if places.is_empty() {
                self.places.remove(&file);
            }
        }
        if let Some(file) = after {
            self.places.entry(file).or_default().push(at.clone());
        }
    }

    /// The listing of a directory changed, and by how many its subdirectories.
    fn list(&mut self, no: u64, when: Time, dir: FileId, directories: i64) {
        let patch = self.files.entry(dir).or_default();
        patch.listing = Some((no, when));
        if directories != 0 {
            patch.links.set(no, directories);
        }
    }

    fn link(&mut self, no: u64, file: FileId, more: i64) {
        self.files.entry(file).or_default().links.set(no, more);
    }

    fn retire(&mut self, no: u64, change: &Change) {
        let (names, files) = touched(change);
        for at in names {
            self.with_name(at, |shown| shown.retire(no));
        }
        for file in files {
            self.patch(file, |patch| patch.retire(no));
        }
    }

    fn patch(&mut self, file: FileId, change: impl FnOnce(&mut Patch)) {
        let Some(patch) = self.files.get_mut(&file) else { return };
        change(patch);
        if patch.is_empty() {
            self.files.remove(&file);
        }
    }

    /// What a name refers to here (`Some(None)`: it is gone), if it is shown from here.
    fn name(&self, dir: FileId, name: &[u8]) -> Option<Option<FileId>> {
        self.names.get(&dir)?.get(name)?.top().copied()
    }

    fn made(&self, file: FileId) -> Option<Entry> {
        self.files.get(&file)?.made.top().cloned()
    }

    /// The row, or what was made, as it is shown.
    fn patched(&self, mut entry: Entry) -> Entry {
        if let Some(kept) = self.kept.get(&entry.file_id)
            && kept.generation == entry.generation
        {
            entry.generation = kept.shown;
        }
        if let Some(patch) = self.files.get(&entry.file_id) {
            patch.put_on(&mut entry);
        }
        entry
    }
}

/// The names and the files that an operation changes how they are shown.
fn touched(change: &Change) -> (Vec<&Place>, Vec<FileId>) {
    let file = change.file();
    match change {
        Change::Create { at, .. }
        | Change::Link { at, .. }
        | Change::Unlink { at, .. }
        | Change::Rmdir { at, .. } => (vec![at], vec![file, at.dir]),
        Change::Rename { from, to, replaced, .. } => {
            let replaced = replaced.iter().map(|(file, _)| *file);
            (vec![from, to], [file, from.dir, to.dir].into_iter().chain(replaced).collect())
        }
        Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => {
            (Vec::new(), vec![file])
        }
    }
}

impl Patch {
    fn set_attributes(
        &mut self,
        no: u64,
        when: Time,
        (perm, atime, mtime): (Option<u16>, Option<Time>, Option<Time>),
    ) {
        if let Some(perm) = perm {
            self.perm.set(no, perm);
        }
        if let Some(atime) = atime {
            self.atime.set(no, atime);
        }
        if let Some(mtime) = mtime {
            self.mtime.set(no, mtime);
            if let Some(bytes) = self.bytes.top() {
                bytes.live.set_mtime(mtime, when);
            }
        }
    }

    fn retire(&mut self, no: u64) {
        self.made.retire(no);
        self.bytes.retire(no);
        self.perm.retire(no);
        self.mtime.retire(no);
        self.frozen.retire(no);
        self.atime.retire(no);
        self.ctime.take_if(|(n, _)| *n == no);
        self.listing.take_if(|(n, _)| *n == no);
        self.links.retire(no);
        self.xattrs.retain(|_, value| {
            value.retire(no);
            !value.is_empty()
        });
    }

    fn is_empty(&self) -> bool {
        let Self { made, bytes, perm, mtime, frozen, atime, ctime, listing, links, xattrs } = self;
        made.is_empty()
            && bytes.is_empty()
            && perm.is_empty()
            && mtime.is_empty()
            && frozen.is_empty()
            && atime.is_empty()
            && ctime.is_none()
            && listing.is_none()
            && links.is_empty()
            && xattrs.is_empty()
    }

    fn put_on(&self, entry: &mut Entry) {
        let attr = &mut entry.attr;
        if let Some((mtime, generation)) = self.frozen.top()
            && *mtime == attr.mtime
        {
            entry.generation = *generation;
        }
        if let Some((_, listed)) = self.listing {
            attr.mtime = attr.mtime.max(listed);
            attr.ctime = attr.ctime.max(listed);
        }
        if let Some((_, changed)) = self.ctime {
            attr.ctime = attr.ctime.max(changed);
        }
        if let Some(perm) = self.perm.top() {
            attr.perm = *perm;
        }
        if let Some(mtime) = self.mtime.top() {
            attr.mtime = *mtime;
        }
        let links: i64 = self.links.0.iter().map(|(_, n)| n).sum();
        attr.nlink = u32::try_from(i64::from(attr.nlink).saturating_add(links)).unwrap_or(0);
        if let Some(Bytes { live, generation }) = self.bytes.top() {
            attr.size = live.size();
            attr.blocks = attr.size.div_ceil(512);
            attr.mtime = live.mtime();
            attr.ctime = attr.ctime.max(live.ctime());
            entry.content = None;
            entry.generation = *generation;
        }
    }
}

/// The row of something that was just made.
fn made(file: FileId, what: &New, perm: u16, mtime: Time) -> Entry {
    let (file_type, size, target) = match what {
        New::File(content) => (FileType::File, content.size, None),
        New::Directory => (FileType::Directory, 0, None),
        New::Symlink(target) => (FileType::Symlink, target.len() as u64, Some(target.clone())),
        New::Fifo => (FileType::Fifo, 0, None),
    };
    let mtime = match what {
        New::File(content) => content.mtime,
        _ => mtime,
    };
    let attr = Attr {
        file_type,
        perm,
        uid: 0,
        gid: 0,
        nlink: if file_type == FileType::Directory { 2 } else { 1 },
        size,
        blocks: size.div_ceil(512),
        mtime,
        ctime: mtime,
        btime: Some(mtime),
        rdev: 0,
    };
    Entry { file_id: file, disk_ino: 0, generation: FIRST_GENERATION, attr, content: None, target }
}

/// The row of an empty regular file that was just made.
pub(crate) fn new_file_row(file: FileId, mtime: Time) -> Entry {
    let content = crate::ops::NewContent {
        size: 0,
        mtime,
        kept_bytes: 0,
        extents: Vec::new(),
        digest: [0; 32],
        whole: None,
        inline: None,
    };
    made(file, &New::File(content), 0o600, mtime)
}
