//! The owner's side: what its disk has, compared with the rows.
//!
//! Everything comes down to [`settle`]: one name, as it is now. A name that goes
//! makes its file an orphan if it was the last one; a name that appears is first
//! looked for by its inode among the files that are known, so that a file keeps
//! its id and its hash over a rename, in whatever order the two ends of the rename
//! are seen.

use super::key;
use super::read;
use super::row::{Orphan, Row, decode, encode};
use super::store::Table;
use super::tx::{NAMES_ALIKE, Place, Tx};
use super::{Index, IndexError, Observed, ROOT_PARENT};
use crate::model::{Attr, ContentId, Entry, FileId, FileType, LocationNo, Name, Seq, Stamp};
use std::ops::ControlFlow;

/// Names of one listing that are written in one commit: bounds the memory of a commit, and
/// how long other writers wait.
const COMMIT_NAMES: usize = 4096;

/// The subdirectories of a directory.
type Subdirectories = Vec<(Name, FileId)>;

impl Index {
    /// The location's own folder, as it is now.
    pub fn observe_root(&self, no: LocationNo, root: &Observed) -> Result<(), IndexError> {
        self.own_location(no)?;
        if root.attr.file_type != FileType::Directory {
            return Err(IndexError::InvalidRow("the root is not a directory"));
        }
        let name = root_name();
        self.write(|tx| {
            let place = Place { no, parent: ROOT_PARENT, name: &name };
            let old = tx.row(place)?;
            let (generation, content) = (1, None);
            let entry = entry_of(FileId::ROOT, generation, content, root.clone())?;
            if old.as_ref().is_none_or(|o| o.entry != entry) {
                let seq = tx.next_seq(no)?;
                tx.put_row(place, old.as_ref(), entry, seq)?;
            }
            Ok(())
        })
    }

    /// A directory's whole listing, as it is now; returns its subdirectories, by name.
    ///
    /// Names that are as before cost no write. A huge directory is written in several
    /// commits.
    pub fn observe_directory(
        &self,
        no: LocationNo,
        dir: FileId,
        listing: Vec<Observed>,
    ) -> Result<Vec<(Name, FileId)>, IndexError> {
        let observed = self.observe_directories(no, vec![(dir, listing)])?.pop().flatten();
        observed.ok_or(IndexError::NoSuchDirectory(no, dir))
    }

    /// The same for several directories with few commits, of which each costs more than
    /// the rows of a small directory. For one without a name (any more): `None`.
    pub fn observe_directories(
        &self,
        no: LocationNo,
        listings: Vec<(FileId, Vec<Observed>)>,
    ) -> Result<Vec<Option<Subdirectories>>, IndexError> {
        self.own_location(no)?;
        let (mut found, mut names) = (Vec::new(), Vec::new());
        for (at, (dir, listing)) in listings.into_iter().enumerate() {
            let Comparison { directories, gone, new } = self.compare(no, dir, listing)?;
            found.push(Some(directories));
            // What is gone comes first: what appears may be the same file under another name.
            let gone = gone.into_iter().map(move |name| (at, dir, name, None));
            let new = new.into_iter().map(move |o| (at, dir, o.name.clone(), Some(o)));
            names.push(gone.chain(new));
        }
        // One by one: of a huge directory there is no second copy.
        let mut names = names.into_iter().flatten().peekable();
        while names.peek().is_some() {
            self.write(|tx| {
                let mut checked = None;
                for (at, dir, name, now) in names.by_ref().take(COMMIT_NAMES) {
                    if checked.replace(at) != Some(at) && !tx.has_name(no, dir)? {
                        found[at] = None;
                    }
                    let Some(directories) = &mut found[at] else { continue };
                    let entry = settle(tx, Place { no, parent: dir, name: &name }, now, None)?;
                    directories.extend(entry.filter(is_directory).map(|e| (name, e.file_id)));
                }
                Ok(())
            })?;
        }
        found.iter_mut().flatten().for_each(|directories| directories.sort());
        Ok(found)
    }

    /// One pass over the rows of a directory and its listing, both in the order of names.
    fn compare(
        &self,
        no: LocationNo,
        dir: FileId,
        mut listing: Vec<Observed>,
    ) -> Result<Comparison, IndexError> {
        listing.sort_by(|a, b| a.name.cmp(&b.name));
        listing.dedup_by(|a, b| a.name == b.name);
        let (mut directories, mut gone) = (Vec::new(), Vec::new());
        let (mut at, mut is_new) = (0, vec![true; listing.len()]);
        let snapshot = self.store().snapshot()?;
        read::scan_prefix(&*snapshot, Table::Entries, &key::entry(no, dir, b""), &mut |k, v| {
            let name = key::entry_name(k).ok_or(IndexError::DamagedRow("a name"))?;
            at += listing[at..].iter().take_while(|o| o.name < name).count();
            let Some(now) = listing.get(at).filter(|o| o.name == name) else {
                gone.push(name);
                return Ok(ControlFlow::Continue(()));
            };
            let Row { entry, .. } = decode(v, "an entry")?;
            is_new[at] = !is_unchanged(&entry, now);
            if !is_new[at] && is_directory(&entry) {
                directories.push((name, entry.file_id));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        let mut is_new = is_new.into_iter();
        listing.retain(|_| is_new.next().unwrap_or(true));
        Ok(Comparison { directories, gone, new: listing })
    }

    /// One name of a directory, as it is now; `None`: it is gone.
    pub fn observe_entry(
        &self,
        no: LocationNo,
        dir: FileId,
        name: &Name,
        now: Option<Observed>,
    ) -> Result<Option<Entry>, IndexError> {
        self.observe_entry_read(no, dir, name, now, None)
    }

    /// The same of a name whose file was read, and may have grown: it is the same version then.
    pub fn observe_entry_read(
        &self,
        no: LocationNo,
        dir: FileId,
        name: &Name,
        now: Option<Observed>,
        read: Option<BytesRead>,
    ) -> Result<Option<Entry>, IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            check_directory(tx, no, dir)?;
            settle(tx, Place { no, parent: dir, name }, now, read.as_ref())
        })
    }

    /// Several names as they are now, in this order, in one commit: for what belongs together.
    /// Gives the rows, and the number that a replica with all of them has reached. A name in a
    /// directory that is gone is passed over.
    pub fn observe_entries(
        &self,
        no: LocationNo,
        sightings: Vec<Sighting>,
    ) -> Result<(Vec<Option<Entry>>, Seq), IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            let mut found = Vec::with_capacity(sightings.len());
            for sighting in sightings {
                found.push(sight(tx, no, sighting)?);
            }
            Ok((found, tx.state(no)?.head))
        })
    }

    /// Whether a file has this id, or had it and may appear again.
    pub fn is_file_known(&self, no: LocationNo, file: FileId) -> Result<bool, IndexError> {
        self.own_location(no)?;
        let snapshot = self.store().snapshot()?;
        Ok(read::has_name(&*snapshot, no, file)? || read::orphan(&*snapshot, no, file)?.is_some())
    }

    /// Records the hash of a version; `false`: the row is another version by now.
    pub fn set_content(
        &self,
        no: LocationNo,
        file: FileId,
        stamp: &Stamp,
        content: ContentId,
    ) -> Result<bool, IndexError> {
        let set = self.set_contents(no, &[(file, *stamp, content)])?;
        Ok(set == [true])
    }

    /// The same for several files in one commit, which costs more than the rows.
    pub fn set_contents(
        &self,
        no: LocationNo,
        hashed: &[(FileId, Stamp, ContentId)],
    ) -> Result<Vec<bool>, IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            let set = hashed.iter();
            set.map(|(file, stamp, content)| set_content(tx, no, *file, stamp, *content)).collect()
        })
    }

    /// The next files to hash, newest first; they stay queued until [`Self::set_content`]
    /// or [`Self::skip_unhashed`].
    pub fn next_unhashed(&self, no: LocationNo, limit: usize) -> Result<Vec<FileId>, IndexError> {
        let snapshot = self.store().snapshot()?;
        let keys = read::keys(&*snapshot, Table::Unhashed, &key::location(no), limit)?;
        let file = |k: &Vec<u8>| key::last_file(k).ok_or(IndexError::DamagedRow("a queued file"));
        keys.iter().map(file).collect()
    }

    /// Queues a hashed file again, whose bytes may have changed without a trace in its row; `false`:
    /// it is not hashed.
    pub fn hash_again(&self, no: LocationNo, file: FileId) -> Result<bool, IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            let entry = named_entry(tx, no, file)?.filter(|e| e.content.is_some());
            if let Some(entry) = &entry {
                tx.enqueue(no, entry);
            }
            Ok(entry.is_some())
        })
    }

    /// Takes a file that cannot be hashed now off the queue, until it changes.
    pub fn skip_unhashed(&self, no: LocationNo, file: FileId) -> Result<(), IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            if let Some(entry) = named_entry(tx, no, file)? {
                tx.dequeue(no, &entry);
            }
            Ok(())
        })
    }
}

/// A name that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sighting {
    /// The directory.
    pub dir: FileId,
    /// The name in it.
    pub name: Name,
    /// What it has now; `None`: nothing.
    pub now: Option<Observed>,
    /// The hash of the version with this stamp, where it is known.
    pub content: Option<(Stamp, ContentId)>,
}

/// What was read of a file that was seen to be larger than its row says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BytesRead {
    /// Of the file as it was seen; all bytes of this size were read.
    pub stamp: Stamp,
    /// The hash of all of them.
    pub content: ContentId,
    /// How many bytes it had according to its row, and the hash of so many of those that were read.
    pub began: (u64, ContentId),
    /// No later change of its bytes can have left the stamp as it is; else it is hashed again.
    pub is_settled: bool,
}

impl BytesRead {
    /// Whether the file of this row has only grown: what it had is what was read first. Nothing
    /// need be known of a file that had no bytes.
    fn is_growth_of(&self, old: &Entry) -> bool {
        let (size, content) = self.began;
        size == old.attr.size
            && size < self.stamp.size
            && old.content.map_or(size == 0, |known| known == content)
    }
}

struct Comparison {
    /// Directories that are as before.
    directories: Vec<(Name, FileId)>,
    gone: Vec<Name>,
    /// Appeared or changed.
    new: Vec<Observed>,
}

/// The name of a location's own folder below [`ROOT_PARENT`].
pub(super) fn root_name() -> Name {
    Name::new(&b"root"[..]).expect("a valid name")
}

pub(super) fn is_directory(entry: &Entry) -> bool {
    entry.attr.file_type == FileType::Directory
}

fn check_directory(tx: &Tx<'_>, no: LocationNo, dir: FileId) -> Result<(), IndexError> {
    if tx.has_name(no, dir)? { Ok(()) } else { Err(IndexError::NoSuchDirectory(no, dir)) }
}

impl Observed {
    /// Whether this is the file of the row, changed or not.
    pub fn is_of(&self, entry: &Entry) -> bool {
        is_same_file(entry, self)
    }

    /// The stamp of its bytes.
    pub fn stamp(&self) -> Stamp {
        let Attr { size, mtime, ctime, .. } = self.attr;
        Stamp { disk_ino: self.disk_ino, size, mtime, ctime }
    }
}

/// Whether what the disk has is the file of this row, changed or not. An inode number is
/// used again after its file is gone; its type and its birth tell.
pub(super) fn is_same_file(entry: &Entry, now: &Observed) -> bool {
    entry.disk_ino == now.disk_ino
        && entry.attr.file_type == now.attr.file_type
        && entry.attr.btime == now.attr.btime
}

fn is_unchanged(entry: &Entry, now: &Observed) -> bool {
    is_same_file(entry, now) && entry.attr == now.attr && entry.target == now.target
}

/// A row that every replica will accept; what the disk says beyond that is cut to it.
fn entry_of(
    file_id: FileId,
    generation: u32,
    content: Option<ContentId>,
    now: Observed,
) -> Result<Entry, IndexError> {
    let Observed { mut attr, disk_ino, target, .. } = now;
    attr.perm &= 0o7777;
    attr.size = attr.size.min(i64::MAX as u64);
    let target = target.filter(|_| attr.file_type == FileType::Symlink);
    let entry = Entry { file_id, disk_ino, generation, attr, content, target };
    let valid = entry.is_valid();
    valid.then_some(entry).ok_or(IndexError::InvalidRow("attributes that no file can have"))
}

/// What the row of this file becomes, and whether its bytes must be hashed (again).
fn next_version(
    old: &Entry,
    now: Observed,
    read: Option<&BytesRead>,
) -> Result<(Entry, bool), IndexError> {
    let stamp = old.stamp();
    let read = read.filter(|read| read.stamp == now.stamp());
    let new = entry_of(old.file_id, old.generation, old.content, now)?;
    let is_file = new.attr.file_type == FileType::File;
    let was_written = (new.attr.size, new.attr.mtime) != (stamp.size, stamp.mtime);
    // Without a hash nobody could tell two versions under one number apart later.
    let may_be_other = old.content.is_none() && new.attr.ctime != stamp.ctime;
    let new_bytes = is_file && (was_written || may_be_other);
    if let Some(read) = read.filter(|_| new_bytes) {
        let is_other = !read.is_growth_of(old);
        let generation = old.generation.wrapping_add(u32::from(is_other));
        let entry = Entry { generation, content: Some(read.content), ..new };
        return Ok((entry, !read.is_settled));
    }
    if new_bytes || new.target != old.target {
        let generation = old.generation.wrapping_add(1);
        return Ok((Entry { generation, content: None, ..new }, is_file));
    }
    // Bytes can change with size and mtime put back; the ctime then still tells.
    let touched = is_file && new.attr.ctime != stamp.ctime;
    Ok((new, touched))
}

/// Makes a name what it is now; returns its row.
fn settle(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    now: Option<Observed>,
    read: Option<&BytesRead>,
) -> Result<Option<Entry>, IndexError> {
    let old = tx.row(place)?;
    let now = now.filter(|_| !tx.is_hidden(place.no, place.name));
    match (old, now) {
        (None, None) => Ok(None),
        (Some(old), None) => vanish(tx, place, &old).map(|()| None),
        (Some(old), Some(now)) if is_same_file(&old.entry, &now) => {
            update(tx, place, old, now, read).map(Some)
        }
        (Some(old), Some(now)) if is_next_of(tx, place.no, &old.entry, &now) => {
            replace(tx, place, old, now).map(Some)
        }
        (old, Some(now)) => {
            if let Some(old) = old {
                vanish(tx, place, &old)?;
            }
            appear(tx, place, now).map(Some)
        }
    }
}

fn vanish(tx: &mut Tx<'_>, place: Place<'_>, old: &Row) -> Result<(), IndexError> {
    let seq = tx.next_seq(place.no)?;
    tx.remove_row(place, old, seq)?;
    let file = old.entry.file_id;
    if !tx.has_name(place.no, file)? {
        let orphan = encode(&Orphan::Lost(old.entry.clone()));
        tx.batch.put(Table::Orphans, key::file(place.no, file), orphan);
    }
    Ok(())
}

fn update(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    old: Row,
    now: Observed,
    read: Option<&BytesRead>,
) -> Result<Entry, IndexError> {
    let (entry, hash) = next_version(&old.entry, now, read)?;
    if entry == old.entry {
        return Ok(entry);
    }
    let seq = tx.next_seq(place.no)?;
    tx.put_row(place, Some(&old), entry.clone(), seq)?;
    if old.entry.attr.nlink > 1 || entry.attr.nlink > 1 {
        update_other_names(tx, place, &entry)?;
    }
    if hash {
        tx.enqueue(place.no, &entry);
    } else if entry.content != old.entry.content {
        tx.dequeue(place.no, &entry);
    }
    Ok(entry)
}

/// All names of a file have the same row: its generation is part of its inode number.
fn update_other_names(tx: &mut Tx<'_>, this: Place<'_>, entry: &Entry) -> Result<(), IndexError> {
    if is_directory(entry) {
        return Ok(());
    }
    for (parent, name) in read::names(tx, this.no, entry.file_id, NAMES_ALIKE)? {
        let place = Place { no: this.no, parent, name: &name };
        let old = tx.row(place)?.ok_or(IndexError::DamagedRow("a name without a row"))?;
        if old.entry != *entry {
            let seq = tx.next_seq(this.no)?;
            tx.put_row(place, Some(&old), entry.clone(), seq)?;
        }
    }
    Ok(())
}

/// Whether this device itself put these bytes in the place of the file's last ones.
fn is_next_of(tx: &Tx<'_>, no: LocationNo, old: &Entry, now: &Observed) -> bool {
    old.attr.file_type == FileType::File
        && now.attr.file_type == FileType::File
        && tx.expected(no, now.disk_ino) == Some(old.file_id)
}

/// The next version of a file is another inode, as after an atomic save, with the same id.
fn replace(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    old: Row,
    now: Observed,
) -> Result<Entry, IndexError> {
    let no = place.no;
    let generation = old.entry.generation.wrapping_add(1);
    let entry = entry_of(old.entry.file_id, generation, None, now)?;
    if read::file_on_disk(tx, no, old.entry.disk_ino)? == Some(entry.file_id) {
        tx.batch.delete(Table::Disk, key::disk(no, old.entry.disk_ino));
    }
    let id = key::file_value(entry.file_id);
    tx.batch.put(Table::Disk, key::disk(no, entry.disk_ino), id);
    let seq = tx.next_seq(no)?;
    tx.put_row(place, Some(&old), entry.clone(), seq)?;
    tx.enqueue(no, &entry);
    Ok(entry)
}

fn appear(tx: &mut Tx<'_>, place: Place<'_>, now: Observed) -> Result<Entry, IndexError> {
    let known = known_file(tx, place.no, &now)?;
    let expected = tx.expected(place.no, now.disk_ino);
    match known {
        Some(known) if expected.is_none_or(|id| id == known.file_id) => link(tx, place, known, now),
        _ => create(tx, place, now, expected),
    }
}

fn create(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    now: Observed,
    expected: Option<FileId>,
) -> Result<Entry, IndexError> {
    let file = match expected {
        Some(id) if is_free(tx, place.no, id)? => id,
        _ => tx.next_file(place.no)?,
    };
    let entry = entry_of(file, 1, None, now)?;
    let seq = tx.next_seq(place.no)?;
    tx.put_row(place, None, entry.clone(), seq)?;
    tx.batch.put(Table::Disk, key::disk(place.no, entry.disk_ino), key::file_value(file));
    tx.enqueue(place.no, &entry);
    Ok(entry)
}

/// Whether no file has, or may yet get back, this id.
fn is_free(tx: &Tx<'_>, no: LocationNo, file: FileId) -> Result<bool, IndexError> {
    Ok(!tx.has_name(no, file)? && read::orphan(tx, no, file)?.is_none())
}

/// A file that is known gets one more name, or its name elsewhere: a rename or a hard link.
fn link(
    tx: &mut Tx<'_>,
    place: Place<'_>,
    known: Entry,
    now: Observed,
) -> Result<Entry, IndexError> {
    let no = place.no;
    let (entry, hash) = next_version(&known, now, None)?;
    if is_directory(&entry) {
        // It has one name only: the other is where it was before.
        for (parent, name) in read::names(tx, no, entry.file_id, NAMES_ALIKE)? {
            let before = Place { no, parent, name: &name };
            if let Some(old) = tx.row(before)? {
                let seq = tx.next_seq(no)?;
                tx.remove_row(before, &old, seq)?;
            }
        }
    }
    tx.batch.delete(Table::Orphans, key::file(no, entry.file_id));
    let seq = tx.next_seq(no)?;
    tx.put_row(place, None, entry.clone(), seq)?;
    update_other_names(tx, place, &entry)?;
    if hash || entry.content.is_none() {
        tx.enqueue(no, &entry);
    }
    Ok(entry)
}

/// The last row of the file that the disk has here, if it is one that we know.
fn known_file(tx: &Tx<'_>, no: LocationNo, now: &Observed) -> Result<Option<Entry>, IndexError> {
    let Some(file) = read::file_on_disk(tx, no, now.disk_ino)? else { return Ok(None) };
    let known = match named_entry(tx, no, file)? {
        Some(entry) => Some(entry),
        None => match read::orphan(tx, no, file)? {
            Some(Orphan::Lost(entry)) => Some(entry),
            Some(Orphan::Doomed) | None => None,
        },
    };
    Ok(known.filter(|entry| is_same_file(entry, now)))
}

/// The row of any one name of a file.
fn named_entry(tx: &Tx<'_>, no: LocationNo, file: FileId) -> Result<Option<Entry>, IndexError> {
    let names = read::names(tx, no, file, 1)?;
    let Some((parent, name)) = names.first() else { return Ok(None) };
    Ok(tx.row(Place { no, parent: *parent, name })?.map(|row| row.entry))
}

fn sight(tx: &mut Tx<'_>, no: LocationNo, sighting: Sighting) -> Result<Option<Entry>, IndexError> {
    let Sighting { dir, name, now, content } = sighting;
    if !tx.has_name(no, dir)? {
        return Ok(None);
    }
    let place = Place { no, parent: dir, name: &name };
    let entry = settle(tx, place, now, None)?;
    if let (Some(entry), Some((stamp, content))) = (&entry, content) {
        set_content(tx, no, entry.file_id, &stamp, content)?;
        return Ok(tx.row(place)?.map(|row| row.entry));
    }
    Ok(entry)
}

fn set_content(
    tx: &mut Tx<'_>,
    no: LocationNo,
    file: FileId,
    stamp: &Stamp,
    content: ContentId,
) -> Result<bool, IndexError> {
    let Some(old) = named_entry(tx, no, file)? else { return Ok(false) };
    if old.stamp() != *stamp || old.attr.file_type != FileType::File {
        return Ok(false);
    }
    let other_bytes = old.content.is_some_and(|known| known != content);
    let generation = old.generation.wrapping_add(u32::from(other_bytes));
    tx.dequeue(no, &old);
    let entry = Entry { generation, content: Some(content), ..old };
    for (parent, name) in read::names(tx, no, file, NAMES_ALIKE)? {
        let place = Place { no, parent, name: &name };
        let old = tx.row(place)?.ok_or(IndexError::DamagedRow("a name without a row"))?;
        if old.entry != entry {
            let seq = tx.next_seq(no)?;
            tx.put_row(place, Some(&old), entry.clone(), seq)?;
        }
    }
    Ok(true)
}
