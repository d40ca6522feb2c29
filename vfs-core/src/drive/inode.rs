//! Inode numbers, and the table of this device's own inodes.
//!
//! | bits | what |
//! |---|---|
//! | `1` | the root |
//! | 62 set, the rest of the device's key | a device's directory |
//! | 48–61 location, 8–47 file id, 0–7 tag | an entry of another device's location |
//! | 63 set, 49–62 location, 0–48 the disk's inode number | an entry of an own location |
//!
//! Numbers of the first three classes are computed, never stored: a million
//! remote entries that a kernel knows cost nothing here, and they are the same
//! after a restart. The tag makes two things true by construction:
//!
//! - Of a regular file it is the low byte of the generation: another version of
//!   the bytes is another inode, so pages of two versions never meet.
//! - Of a directory it is the depth below the location's folder, of a symbolic
//!   link the depth of its directory: a number with the depth `n` is only ever
//!   found below one with `n - 1`, so whatever a peer moves where, a kernel that
//!   follows a link stands at the depth that the link was checked for
//!   ([`super::links`]).
//!
//! An own inode is known by where it was last seen, so [`OwnTable`] remembers
//! each one that a kernel holds, until the last `forget`. Lock order: the shard
//! of `by_identity`, then that of `by_no`, then a node's `places`.

use super::types::InodeNo;
use crate::changes::Brief;
use crate::model::{DeviceId, Entry, FileId, FileType, LocationNo, Name, Time};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry as Slot;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

const OWN: u64 = 1 << 63;
const DEVICE: u64 = 1 << 62;
const LOCATION_BITS: u32 = 14;
const LOCATION_MASK: u64 = (1 << LOCATION_BITS) - 1;
const FILE_BITS: u32 = 40;
const TAG_BITS: u32 = 8;
/// Bits of an own number below the location.
const OWN_BITS: u32 = 63 - LOCATION_BITS;
/// Set when the disk's number did not fit or was taken, and a hash stands in for it.
const HASHED: u64 = 1 << (OWN_BITS - 1);

/// What an inode number says about itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// The directory of all devices.
    Root,
    /// A device's directory.
    Device,
    /// A directory or file of an own location, live from the disk.
    Own(LocationNo),
    /// An entry of another device's location.
    Remote(RemoteIno),
}

/// The parts of a remote entry's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct RemoteIno {
    pub location: LocationNo,
    pub file: FileId,
    pub tag: u8,
}

impl RemoteIno {
    /// A location's own folder.
    pub fn root(location: LocationNo) -> Self {
        Self { location, file: FileId::ROOT, tag: 0 }
    }

    /// A directory that lies `depth` levels below the location's folder.
    pub fn directory(location: LocationNo, depth: usize, file: FileId) -> Self {
        Self { location, file, tag: u8::try_from(depth).unwrap_or(u8::MAX) }
    }

    /// An entry of a directory that lies `depth` levels below the location's folder.
    pub fn at_depth(location: LocationNo, depth: usize, entry: &Entry) -> Self {
        Self::of_brief(location, depth, &Brief::from(entry))
    }

    /// As [`RemoteIno::at_depth`], of what a change says of an entry.
    pub fn of_brief(location: LocationNo, depth: usize, entry: &Brief) -> Self {
        let byte = |depth| u8::try_from(depth).unwrap_or(u8::MAX);
        let tag = match entry.file_type {
            FileType::File => entry.generation.to_le_bytes()[0],
            FileType::Directory => byte(depth + 1),
            FileType::Symlink => byte(depth),
            FileType::Fifo | FileType::Socket | FileType::CharDevice | FileType::BlockDevice => 0,
        };
        Self { location, file: entry.file, tag }
    }

    /// An entry of this directory.
    pub fn child(self, entry: &Entry) -> Self {
        Self::at_depth(self.location, self.tag.into(), entry)
    }

    /// Of a directory or link: how deep below the location's folder it, or its directory, lies
    /// at least.
    pub fn depth(self) -> usize {
        self.tag.into()
    }

    /// Whether the entry is still the version that this number stands for.
    pub fn is_version_of(self, entry: &Entry) -> bool {
        entry.attr.file_type != FileType::File || self.is_generation(entry.generation)
    }

    /// Of a regular file: whether its number stands for this generation.
    pub fn is_generation(self, generation: u32) -> bool {
        self.tag == generation.to_le_bytes()[0]
    }

    pub fn no(self) -> InodeNo {
        let location = u64::from(self.location.0) & LOCATION_MASK;
        let file = self.file.0 & (FileId::LIMIT - 1);
        InodeNo(location << (FILE_BITS + TAG_BITS) | file << TAG_BITS | u64::from(self.tag))
    }
}

impl InodeNo {
    pub(super) fn class(self) -> Class {
        match self.0 {
            1 => Class::Root,
            n if n & OWN != 0 => Class::Own(location_in(n >> OWN_BITS)),
            n if n & DEVICE != 0 => Class::Device,
            n => Class::Remote(RemoteIno {
                location: location_in(n >> (FILE_BITS + TAG_BITS)),
                file: FileId(n >> TAG_BITS & (FileId::LIMIT - 1)),
                tag: n.to_le_bytes()[0],
            }),
        }
    }

    /// The directory of a device: the first bits of its key, which nobody can choose freely.
    pub(super) fn of_device(device: DeviceId) -> Self {
        let mut first = [0; 8];
        first.copy_from_slice(&device.0[..8]);
        Self(u64::from_be_bytes(first) & !(OWN | DEVICE) | DEVICE)
    }

    /// The folder of an own location.
    pub(super) fn own_root(location: LocationNo) -> Self {
        Self(OWN | (u64::from(location.0) & LOCATION_MASK) << OWN_BITS)
    }

    /// A number that no file has: no entry has the file id 0, and 1 is the root.
    pub(super) fn of_nothing(count: u64) -> Self {
        Self(2 + count % 254)
    }

    /// The number of an own inode: the disk's where it fits, else the `attempt`th stand-in.
    fn own(location: LocationNo, disk_ino: u64, attempt: u64) -> Self {
        let low = match attempt {
            0 if (1..HASHED).contains(&disk_ino) => disk_ino,
            _ => HASHED | hash(disk_ino, attempt) & (HASHED - 1),
        };
        Self(Self::own_root(location).0 | low)
    }
}

fn location_in(bits: u64) -> LocationNo {
    LocationNo((bits & LOCATION_MASK) as u16)
}

fn hash(disk_ino: u64, attempt: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&disk_ino.to_le_bytes()).update(&attempt.to_le_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// What tells an own inode from every other, also from one that gets its number later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Identity {
    pub disk_ino: u64,
    pub btime: Option<Time>,
    pub file_type: FileType,
}

/// A name under which an inode was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub parent: InodeNo,
    pub name: Name,
}

/// How many names of one inode are remembered; a program that uses more of a
/// file's hard links at once makes the kernel look some of them up again.
const PLACES_MAX: usize = 16;

/// An own inode that a kernel holds.
#[derive(Debug)]
pub(super) struct OwnNode {
    pub no: InodeNo,
    pub location: LocationNo,
    pub identity: Identity,
    /// Most recently seen last; never empty for long: it begins with one, and
    /// an inode without a name is reachable only by its open files.
    places: Mutex<Vec<Place>>,
    lookups: AtomicU64,
    open_files: Mutex<Vec<Weak<File>>>,
}

impl OwnNode {
    /// Where it may be, the likeliest first.
    pub fn places(&self) -> Vec<Place> {
        lock(&self.places).iter().rev().cloned().collect()
    }

    /// It was seen here. A directory has one place, so the others are past.
    pub fn seen_at(&self, place: Place) {
        let mut places = lock(&self.places);
        if self.identity.file_type == FileType::Directory {
            places.clear();
        }
        if places.last() == Some(&place) {
            return;
        }
        places.retain(|p| *p != place);
        if places.len() == PLACES_MAX {
            places.remove(0);
        }
        places.push(place);
    }

    /// It is no longer here.
    pub fn gone_from(&self, place: &Place) {
        lock(&self.places).retain(|p| p != place);
    }

    /// It is open: as long as it is, it can be reached without a name.
    pub fn opened(&self, file: &Arc<File>) {
        let mut open = lock(&self.open_files);
        open.retain(|f| f.strong_count() > 0);
        open.push(Arc::downgrade(file));
    }

    /// One of its open files.
    pub fn open_file(&self) -> Option<Arc<File>> {
        lock(&self.open_files).iter().find_map(Weak::upgrade)
    }
}

/// What is held under these locks is whole after every statement, so a panic elsewhere is no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every own inode that a kernel holds.
#[derive(Debug, Default)]
pub(super) struct OwnTable {
    by_no: DashMap<InodeNo, Arc<OwnNode>>,
    by_identity: DashMap<(LocationNo, u64), InodeNo>,
}

impl OwnTable {
    /// The inode of this number.
    pub fn get(&self, no: InodeNo) -> Option<Arc<OwnNode>> {
        self.by_no.get(&no).map(|n| Arc::clone(&n))
    }

    /// The inode that has this disk's number now, when a kernel holds it.
    pub fn of_disk(&self, location: LocationNo, disk_ino: u64) -> Option<Arc<OwnNode>> {
        let no = *self.by_identity.get(&(location, disk_ino))?;
        self.get(no)
    }

    /// Whether no kernel holds anything.
    pub fn is_empty(&self) -> bool {
        self.by_no.is_empty()
    }

    /// How many inodes a kernel holds.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_no.len()
    }

    /// The number that a lookup would give, without counting one: for plain listings.
    pub fn number(&self, location: LocationNo, disk_ino: u64) -> InodeNo {
        let known = self.by_identity.get(&(location, disk_ino));
        known.map_or_else(|| InodeNo::own(location, disk_ino, 0), |no| *no)
    }

    /// The inode seen at this place, with one more lookup.
    pub fn look_up(&self, location: LocationNo, identity: Identity, place: Place) -> Arc<OwnNode> {
        let mut slot = match self.by_identity.entry((location, identity.disk_ino)) {
            Slot::Vacant(slot) => {
                let node = self.add(location, identity, place);
                slot.insert(node.no);
                return node;
            }
            Slot::Occupied(slot) => slot,
        };
        if let Some(node) = self.get(*slot.get()).filter(|n| n.identity == identity) {
            node.lookups.fetch_add(1, Ordering::Relaxed);
            node.seen_at(place);
            return node;
        }
        let node = self.add(location, identity, place);
        slot.insert(node.no);
        node
    }

    fn add(&self, location: LocationNo, identity: Identity, place: Place) -> Arc<OwnNode> {
        let mut attempt = 0;
        loop {
            let no = InodeNo::own(location, identity.disk_ino, attempt);
            if let Slot::Vacant(slot) = self.by_no.entry(no) {
                let node = Arc::new(OwnNode {
                    no,
                    location,
                    identity,
                    places: Mutex::new(vec![place]),
                    lookups: AtomicU64::new(1),
                    open_files: Mutex::default(),
                });
                slot.insert(Arc::clone(&node));
                return node;
            }
            attempt += 1;
        }
    }

    /// The kernel lets go of `lookups`; with the last one the inode is dropped.
    pub fn forget(&self, no: InodeNo, lookups: u64) {
        let Some(node) = self.get(no) else { return };
        // Taken also when vacant: no lookup of this file may come between count and removal.
        let slot = self.by_identity.entry((node.location, node.identity.disk_ino));
        let before = node.lookups.load(Ordering::Relaxed);
        node.lookups.store(before.saturating_sub(lookups), Ordering::Relaxed);
        if before > lookups {
            return;
        }
        if let Slot::Occupied(slot) = slot
            && *slot.get() == no
        {
            slot.remove();
        }
        self.by_no.remove(&no);
    }

    /// Its last name went: whatever gets its disk's number next is another inode.
    pub fn lost_last_name(&self, node: &OwnNode) {
        let key = (node.location, node.identity.disk_ino);
        self.by_identity.remove_if(&key, |_, no| *no == node.no);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Attr;

    const LOCATION: LocationNo = LocationNo(LocationNo::LIMIT - 1);

    fn identity(disk_ino: u64, secs: i64) -> Identity {
        let btime = Some(Time { secs, nanos: 0 });
        Identity { disk_ino, btime, file_type: FileType::File }
    }

    fn place(name: &str) -> Place {
        Place { parent: InodeNo::own_root(LOCATION), name: Name::new(name.as_bytes()).unwrap() }
    }

    #[test]
    fn every_number_tells_its_class() {
        let remote = RemoteIno { location: LOCATION, file: FileId(FileId::LIMIT - 1), tag: 255 };
        assert_eq!(remote.no().class(), Class::Remote(remote));
        let first = RemoteIno::root(LocationNo(0));
        assert_eq!(first.no().class(), Class::Remote(first));
        assert_eq!(InodeNo::ROOT.class(), Class::Root);
        for count in 0..1000 {
            let Class::Remote(nothing) = InodeNo::of_nothing(count).class() else { panic!() };
            assert_eq!(nothing.file, crate::index::ROOT_PARENT, "of no entry");
        }
        assert_eq!(InodeNo::of_device(DeviceId([255; 32])).class(), Class::Device);
        assert_eq!(InodeNo::of_device(DeviceId([0; 32])).class(), Class::Device);
        assert_eq!(InodeNo::own_root(LOCATION).class(), Class::Own(LOCATION));
        for disk_ino in [1, HASHED - 1, HASHED, u64::MAX] {
            let no = InodeNo::own(LOCATION, disk_ino, 0);
            assert_eq!(no.class(), Class::Own(LOCATION));
            assert_ne!(no, InodeNo::own_root(LOCATION));
        }
    }

    fn entry(file_type: FileType, generation: u32) -> Entry {
        let attr = Attr {
            file_type,
            perm: 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size: 0,
            blocks: 0,
            mtime: Time::default(),
            ctime: Time::default(),
            btime: None,
            rdev: 0,
        };
        let file_id = FileId(7);
        Entry { file_id, disk_ino: 1, generation, attr, content: None, target: None }
    }

    #[test]
    fn versions_of_a_file_are_different_inodes() {
        let dir = RemoteIno::root(LOCATION);
        let no = |t, generation| dir.child(&entry(t, generation)).no();
        assert_ne!(no(FileType::File, 1), no(FileType::File, 2));
        assert_eq!(no(FileType::Directory, 1), no(FileType::Directory, 2));
        assert_eq!(no(FileType::Symlink, 1), no(FileType::Symlink, 2));
        assert!(dir.child(&entry(FileType::File, 1)).is_version_of(&entry(FileType::File, 1)));
        assert!(!dir.child(&entry(FileType::File, 1)).is_version_of(&entry(FileType::File, 2)));
    }

    #[test]
    fn directories_and_links_know_their_depth() {
        let mut dir = RemoteIno::root(LOCATION);
        assert_eq!(dir.child(&entry(FileType::Symlink, 0)).depth(), 0);
        for depth in 1..300 {
            dir = dir.child(&entry(FileType::Directory, 0));
            assert_eq!(dir.depth(), depth.min(255), "never more than the truth");
            assert_eq!(dir.child(&entry(FileType::Symlink, 0)).depth(), dir.depth());
        }
    }

    #[test]
    fn an_inode_lives_until_the_last_forget() {
        let table = OwnTable::default();
        let node = table.look_up(LOCATION, identity(9, 1), place("a"));
        assert_eq!(table.look_up(LOCATION, identity(9, 1), place("b")).no, node.no);
        assert_eq!(node.places(), [place("b"), place("a")]);
        table.forget(node.no, 1);
        assert!(table.get(node.no).is_some());
        table.forget(node.no, 5);
        assert!(table.is_empty() && table.of_disk(LOCATION, 9).is_none());
    }

    #[test]
    fn a_reused_disk_number_is_another_inode() {
        let table = OwnTable::default();
        let old = table.look_up(LOCATION, identity(9, 1), place("a"));
        let new = table.look_up(LOCATION, identity(9, 2), place("a"));
        assert_ne!(old.no, new.no);
        assert_eq!(table.of_disk(LOCATION, 9).unwrap().no, new.no);
        table.forget(old.no, 1);
        assert_eq!(table.of_disk(LOCATION, 9).unwrap().no, new.no, "the new one stays");
        table.forget(new.no, 1);
        assert_eq!(table.look_up(LOCATION, identity(9, 3), place("a")).no, old.no);
    }

    #[test]
    fn without_birth_times_the_last_unlink_tells_them_apart() {
        let table = OwnTable::default();
        let unborn = Identity { btime: None, ..identity(9, 0) };
        let old = table.look_up(LOCATION, unborn, place("a"));
        table.lost_last_name(&old);
        assert_ne!(table.look_up(LOCATION, unborn, place("a")).no, old.no);
    }
}
