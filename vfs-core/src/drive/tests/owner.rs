//! An owner that exists in memory: it applies operations as the ones on real disks do, as far
//! as these tests go, and replicates its rows. What conflicts really become is tested with the
//! applier.

use super::*;
use crate::index::LogRow;
use crate::ops::{
    Applied, Base, Change, Conflict, New, NewContent, Obstacle, Op, Outcome, Place, Refusal,
};
use crate::outbox::Lane;
use std::collections::BTreeMap;

/// What the owner has.
#[derive(Default)]
pub(super) struct Owner {
    pub files: BTreeMap<FileId, Kept>,
    pub names: BTreeMap<(FileId, Name), FileId>,
    pub applied: BTreeMap<u64, Outcome>,
    /// What it refuses, with this.
    pub refuses: Option<Refusal>,
    /// What it cannot do now, for this reason.
    pub obstacle: Option<Obstacle>,
    /// The stamps that a file's bytes had before its attributes were set.
    was: BTreeMap<FileId, Vec<crate::model::Stamp>>,
    rows: Vec<(FileId, Name, Option<FileId>)>,
    ticks: i64,
}

/// A file of the owner.
#[derive(Clone)]
pub(super) struct Kept {
    pub entry: Entry,
    pub bytes: Vec<u8>,
}

pub(super) fn place(dir: FileId, name: &str) -> (FileId, Name) {
    (dir, Name::new(name.as_bytes()).unwrap())
}

impl Owner {
    /// A file that the owner's programs made.
    pub fn put(&mut self, dir: FileId, name: &str, id: u64, bytes: &[u8]) {
        let entry = Entry {
            content: Some(ContentId::of(bytes)),
            ..remote_entry(id, FileType::File, bytes.len() as u64)
        };
        self.add(place(dir, name), Kept { entry, bytes: bytes.to_vec() });
    }

    /// A directory that the owner's programs made.
    pub fn put_dir(&mut self, dir: FileId, name: &str, id: u64) {
        let entry = remote_entry(id, FileType::Directory, 0);
        self.add(place(dir, name), Kept { entry, bytes: Vec::new() });
    }

    /// The owner's programs write to a file.
    pub fn overwrite(&mut self, id: FileId, bytes: &[u8]) {
        let now = self.tick();
        self.was.remove(&id);
        let file = self.files.get_mut(&id).unwrap();
        file.bytes = bytes.to_vec();
        let entry = &mut file.entry;
        entry.generation += 1;
        entry.content = Some(ContentId::of(bytes));
        (entry.attr.size, entry.attr.mtime, entry.attr.ctime) = (bytes.len() as u64, now, now);
        self.told_again(id);
    }

    fn add(&mut self, at: (FileId, Name), file: Kept) {
        let id = file.entry.file_id;
        self.files.insert(id, file);
        self.point(at, Some(id));
    }

    fn point(&mut self, at: (FileId, Name), to: Option<FileId>) {
        match to {
            Some(id) => drop(self.names.insert(at.clone(), id)),
            None => drop(self.names.remove(&at)),
        }
        self.rows.push((at.0, at.1, to));
    }

    fn told_again(&mut self, id: FileId) {
        let named = self.names.iter().filter(|(_, file)| **file == id);
        let rows: Vec<_> =
            named.map(|((dir, name), file)| (*dir, name.clone(), Some(*file))).collect();
        self.rows.extend(rows);
    }

    fn tick(&mut self) -> Time {
        self.ticks += 1;
        Time { secs: 1_800_000_000 + self.ticks, nanos: 7 }
    }

    pub fn file(&self, dir: FileId, name: &str) -> Option<&Kept> {
        self.files.get(self.names.get(&place(dir, name))?)
    }

    pub fn bytes_at(&self, name: &str) -> Option<&[u8]> {
        self.file(FileId::ROOT, name).map(|f| &f.bytes[..])
    }

    pub fn names_in(&self, dir: FileId) -> Vec<String> {
        let names = self.names.keys().filter(|(d, _)| *d == dir);
        names.map(|(_, name)| name.display().into_owned()).collect()
    }

    fn version(&self, id: FileId) -> Option<crate::model::Stamp> {
        self.files.get(&id).map(|f| f.entry.stamp())
    }

    fn is_base(&self, id: FileId, base: &Base) -> bool {
        let stamp = match base {
            Base::Seen { stamp, .. } => Some(*stamp),
            Base::After(no) => match self.applied.get(no) {
                Some(Outcome::Applied(applied)) => applied.version,
                _ => None,
            },
        };
        let was = |stamp| self.was.get(&id).is_some_and(|was| was.contains(&stamp));
        stamp.is_some_and(|stamp| self.version(id) == Some(stamp) || was(stamp))
    }

    /// Carries out an operation once.
    pub fn apply(&mut self, op: &Op, bytes: Vec<u8>) -> Outcome {
        assert!(op.is_valid(), "{op:?}");
        if let Some(known) = self.applied.get(&op.no) {
            return known.clone();
        }
        if let Some(obstacle) = &self.obstacle {
            return Outcome::Later(obstacle.clone());
        }
        if let Some(refusal) = &self.refuses {
            return Outcome::Refused(refusal.clone());
        }
        let is_known = match &op.change {
            Change::SetAttr { file, base: Some(base), .. } => self.is_base(*file, base),
            Change::SetAttr { .. } | Change::Xattr { .. } => false,
            _ => true,
        };
        let (file, conflict) = self.carry_out(&op.change, bytes);
        let outcome = Outcome::Applied(Applied {
            file: Some(file),
            version: self.version(file).filter(|_| is_known),
            seq: Seq(0),
            log_id: LOG,
            conflict,
        });
        self.applied.insert(op.no, outcome.clone());
        outcome
    }

    fn carry_out(&mut self, change: &Change, bytes: Vec<u8>) -> (FileId, Option<Conflict>) {
        let now = self.tick();
        let at = |p: &Place| (p.dir, p.name.clone());
        match change {
            Change::Create { at: place, file, what, perm, mtime } => {
                let (file_type, target) = match what {
                    New::File(_) => (FileType::File, None),
                    New::Directory => (FileType::Directory, None),
                    New::Symlink(target) => (FileType::Symlink, Some(target.clone())),
                    New::Fifo => (FileType::Fifo, None),
                };
                let mut entry = remote_entry(file.0, file_type, bytes.len() as u64);
                entry.target = target;
                entry.attr.perm = *perm;
                entry.attr.ctime = now;
                entry.attr.mtime = match what {
                    New::File(content) => content.mtime,
                    _ => *mtime,
                };
                self.add(at(place), Kept { entry, bytes });
                (*file, None)
            }
            Change::Write { file, base, content, path } => {
                if self.is_base(*file, base) {
                    self.write(*file, content, bytes, now);
                    return (*file, None);
                }
                let name = format!("{} (copy)", path.last().unwrap().display());
                let copy = FileId(900 + self.files.len() as u64);
                let mut entry = remote_entry(copy.0, FileType::File, bytes.len() as u64);
                entry.attr.ctime = now;
                self.add(place(FileId::ROOT, &name), Kept { entry, bytes });
                let kept = vec![Name::new(name.into_bytes()).unwrap()];
                (copy, Some(Conflict::KeptAs(kept)))
            }
            Change::Link { file, at: place } => {
                self.files.get_mut(file).unwrap().entry.attr.nlink += 1;
                self.point(at(place), Some(*file));
                (*file, None)
            }
            Change::Rename { file, from, to, replaced, exchange } => {
                let back = replaced.as_ref().map(|(f, _)| *f).filter(|_| *exchange);
                self.point(at(from), back);
                self.point(at(to), Some(*file));
                (*file, None)
            }
            Change::Unlink { file, at: place, base } => {
                if base.as_ref().is_some_and(|base| !self.is_base(*file, base)) {
                    let why = Conflict::OwnerStands("it was changed".into());
                    return (*file, Some(why));
                }
                self.point(at(place), None);
                (*file, None)
            }
            Change::Rmdir { file, at: place } => {
                assert!(self.names_in(*file).is_empty());
                self.point(at(place), None);
                (*file, None)
            }
            Change::SetAttr { file, perm, mtime, .. } => {
                let was = self.version(*file);
                self.was.entry(*file).or_default().extend(was);
                let entry = &mut self.files.get_mut(file).unwrap().entry;
                // An indexer takes another time for other bytes.
                entry.generation += u32::from(mtime.is_some());
                let attr = &mut entry.attr;
                attr.perm = perm.unwrap_or(attr.perm);
                attr.mtime = mtime.unwrap_or(attr.mtime);
                attr.ctime = now;
                self.told_again(*file);
                (*file, None)
            }
            Change::Xattr { file, .. } => (*file, None),
        }
    }

    fn write(&mut self, id: FileId, content: &NewContent, bytes: Vec<u8>, now: Time) {
        self.was.remove(&id);
        let file = self.files.get_mut(&id).unwrap();
        let mut all = file.bytes[..content.kept_bytes as usize].to_vec();
        all.resize(content.size as usize, 0);
        let mut rest = &bytes[..];
        for extent in &content.extents {
            let (these, others) = rest.split_at((extent.end - extent.start) as usize);
            all[extent.start as usize..extent.end as usize].copy_from_slice(these);
            rest = others;
        }
        file.bytes = all;
        let entry = &mut file.entry;
        entry.generation += 1;
        entry.content = Some(ContentId::of(&file.bytes));
        entry.attr.size = content.size;
        (entry.attr.mtime, entry.attr.ctime) = (content.mtime, now);
        self.told_again(id);
    }
}

const LOG: u64 = 77;

impl Bench {
    /// The owner's rows since the last time reach the replica.
    pub fn owner_tells(&self, owner: &mut Owner) {
        let rows = std::mem::take(&mut owner.rows);
        for (id, file) in &owner.files {
            self.peer.files.lock().unwrap().insert(*id, file.bytes.clone());
        }
        let Seq(head) = self.index.head(self.remote);
        let upto = Seq(head + 1 + rows.len() as u64);
        let root = remote_entry(1, FileType::Directory, 0);
        let mut all = vec![(ROOT_PARENT, Name::new(&b"root"[..]).unwrap(), Some(root))];
        for (dir, name, file) in rows {
            let entry = file.and_then(|f| owner.files.get(&f)).map(|f| f.entry.clone());
            // Only the last row of a place is in a log.
            all.retain(|(d, n, _)| (*d, n) != (dir, &name));
            all.push((dir, name, entry));
        }
        let rows: Vec<_> = all
            .into_iter()
            .zip(head + 1..)
            .map(|((parent, name, entry), seq)| LogRow { seq: Seq(seq), parent, name, entry })
            .collect();
        if head == 0 {
            self.index.reset_replica(self.remote, LOG).unwrap();
        }
        self.index.apply_replica(self.remote, LOG, rows, upto).unwrap();
    }

    /// What is due reaches the owner, and its answers come back; its rows do not. How many.
    pub fn deliver(&self, owner: &mut Owner) -> usize {
        let mut count = 0;
        loop {
            self.outbox.sync().unwrap();
            let mut ops = self.outbox.take(PEER, Lane::Small, 256, 1 << 20);
            ops.extend(self.outbox.take(PEER, Lane::Bulk, 1, 1 << 20));
            if ops.is_empty() {
                return count;
            }
            let mut progress = false;
            for op in ops {
                let bytes = self.bytes_of(&op);
                let outcome = owner.apply(&op, bytes);
                progress |= !matches!(outcome, Outcome::Later(_));
                let head = self.index.head(self.remote).0 + owner.rows.len() as u64 + 1;
                let outcome = match outcome {
                    Outcome::Applied(applied) => {
                        Outcome::Applied(Applied { seq: Seq(head), ..applied })
                    }
                    other => other,
                };
                self.outbox.settle(PEER, op.no, outcome);
                count += 1;
            }
            if !progress {
                return count;
            }
        }
    }

    fn bytes_of(&self, op: &Op) -> Vec<u8> {
        let Some(content) = op.change.content() else { return Vec::new() };
        let bytes = match &content.inline {
            Some(bytes) => bytes.to_vec(),
            None => content
                .extents
                .iter()
                .flat_map(|e| self.outbox.read(PEER, op.no, e.clone()).unwrap())
                .collect(),
        };
        assert_eq!(content.digest, *blake3::hash(&bytes).as_bytes());
        if content.is_whole() {
            let mut all = vec![0; content.size as usize];
            let mut rest = &bytes[..];
            for e in &content.extents {
                let (these, others) = rest.split_at((e.end - e.start) as usize);
                all[e.start as usize..e.end as usize].copy_from_slice(these);
                rest = others;
            }
            assert!(content.whole.is_none_or(|id| id == ContentId::of(&all)));
            if matches!(op.change, Change::Create { .. }) {
                return all;
            }
        }
        bytes
    }
}
