//! Random life on a disk, seen by an index in random order, followed by a replica.
//!
//! The model is the disk itself: after a whole scan the index must say what the disk
//! has, files must have kept their ids, and a replica that applied the log in pieces,
//! with reopenings in between, must have the same rows.

use super::disk_model::{Disk, Kind, ROOT_INO};
use super::key;
use super::store::Table;
use super::tests::{ID, ME, PEER, check_invariants, dump, location, name, open};
use super::*;
use crate::model::{ContentId, FileType, Time};
use proptest::prelude::*;
use proptest::sample::Index as Pick;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use tempfile::TempDir;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

#[derive(Clone, Debug)]
enum Act {
    Create(Pick, u8, Kind),
    Write(Pick),
    Touch(Pick),
    Rename(Pick, Pick, u8),
    Link(Pick, Pick, u8),
    Remove(Pick),
    /// The index sees one directory's listing.
    List(Pick),
    /// The index sees one name.
    See(Pick, u8),
    Hash,
    /// The index sees everything, and sweeps.
    Scan,
    /// The replica gets a batch of about this many bytes.
    Replicate(u16),
    ReopenOwner,
    ReopenReplica,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let pick = any::<Pick>;
    let text = 0..NAMES.len() as u8;
    let kind = prop_oneof![Just(Kind::File), Just(Kind::Directory), Just(Kind::Symlink)];
    let act = prop_oneof![
        8 => (pick(), text.clone(), kind).prop_map(|(d, n, k)| Act::Create(d, n, k)),
        3 => pick().prop_map(Act::Write),
        1 => pick().prop_map(Act::Touch),
        5 => (pick(), pick(), text.clone()).prop_map(|(f, d, n)| Act::Rename(f, d, n)),
        2 => (pick(), pick(), text.clone()).prop_map(|(f, d, n)| Act::Link(f, d, n)),
        3 => pick().prop_map(Act::Remove),
        8 => pick().prop_map(Act::List),
        4 => (pick(), text).prop_map(|(d, n)| Act::See(d, n)),
        3 => Just(Act::Hash),
        2 => Just(Act::Scan),
        6 => (1..2000u16).prop_map(Act::Replicate),
        1 => Just(Act::ReopenOwner),
        1 => Just(Act::ReopenReplica),
    ];
    prop::collection::vec(act, 1..80)
}

struct World {
    disk: Disk,
    folders: [TempDir; 2],
    owner: Index,
    replica: Index,
    /// The owner's number of the location, and the replica's.
    no: LocationNo,
    copy: LocationNo,
    /// Of each inode (with its birth): the id that its file had after the last whole scan.
    ids: BTreeMap<(u64, Option<Time>), FileId>,
}

impl World {
    fn new() -> Self {
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let [owner, replica] = [(0, ME), (1, PEER)].map(|(n, me)| open(folders[n].path(), me));
        let no = owner.put_location(location(ME)).unwrap().no;
        let copy = replica.put_location(location(ME)).unwrap().no;
        let disk = Disk::new();
        owner.observe_root(no, &disk.inodes[&ROOT_INO]).unwrap();
        Self { disk, folders, owner, replica, no, copy, ids: BTreeMap::new() }
    }

    fn act(&mut self, act: &Act) {
        let dirs = self.disk.directories();
        let at: Vec<_> = self.disk.names.keys().cloned().collect();
        let text = |n: &u8| name(NAMES[usize::from(*n)]);
        match act {
            Act::Create(d, n, kind) => self.disk.create(*d.get(&dirs), text(n), *kind),
            Act::List(d) => self.list(*d.get(&dirs)),
            Act::See(d, n) => self.see(*d.get(&dirs), &text(n)),
            Act::Hash => self.hash(),
            Act::Scan => self.scan(),
            Act::Replicate(bytes) => drop(self.replicate(usize::from(*bytes))),
            Act::ReopenOwner => self.reopen_owner(),
            Act::ReopenReplica => self.reopen_replica(),
            _ if at.is_empty() => {}
            Act::Write(f) => self.disk.write(self.disk.names[f.get(&at)]),
            Act::Touch(f) => {
                let now = self.disk.tick();
                let ino = self.disk.names[f.get(&at)];
                self.disk.inodes.get_mut(&ino).unwrap().attr.ctime = now;
            }
            Act::Rename(f, d, n) => self.disk.rename(f.get(&at), (*d.get(&dirs), text(n))),
            Act::Link(f, d, n) => self.disk.link(f.get(&at), (*d.get(&dirs), text(n))),
            Act::Remove(f) => self.disk.remove(f.get(&at)),
        }
    }

    /// The id of a directory of the disk, when the index knows it under the path it has now.
    fn known(&self, dir: u64) -> Option<FileId> {
        let mut path = Vec::new();
        let mut at = dir;
        while at != ROOT_INO {
            let (parent, text) = self.disk.names.iter().find(|(_, ino)| **ino == at)?.0;
            path.push(text.clone());
            at = *parent;
        }
        path.reverse();
        let found = self.owner.view().unwrap().resolve(self.no, &path).unwrap()?;
        let same = found.disk_ino == dir && found.attr.btime == self.disk.inodes[&dir].attr.btime;
        same.then_some(found.file_id)
    }

    fn list(&self, dir: u64) {
        if let Some(id) = self.known(dir) {
            self.owner.observe_directory(self.no, id, self.disk.listing(dir)).unwrap();
        }
    }

    fn see(&self, dir: u64, text: &Name) {
        if let Some(id) = self.known(dir) {
            let ino = self.disk.names.get(&(dir, text.clone()));
            let now = ino.map(|ino| self.disk.see(*ino, text));
            self.owner.observe_entry(self.no, id, text, now).unwrap();
        }
    }

    /// Hashes what is queued; the bytes of a file are told by its inode and mtime.
    fn hash(&self) {
        for file in self.owner.next_unhashed(self.no, 3).unwrap() {
            let node = self.owner.view().unwrap().node(self.no, file).unwrap().unwrap();
            let stamp = node.entry.stamp();
            let content = ContentId::of(format!("{} {:?}", stamp.disk_ino, stamp.mtime).as_bytes());
            assert!(self.owner.set_content(self.no, file, &stamp, content).unwrap());
        }
    }

    fn scan(&mut self) {
        self.owner.observe_root(self.no, &self.disk.inodes[&ROOT_INO]).unwrap();
        let mut ids = BTreeMap::new();
        let mut waiting = vec![(ROOT_INO, FileId::ROOT)];
        while let Some((ino, id)) = waiting.pop() {
            let listing = self.disk.listing(ino);
            let dirs = self.owner.observe_directory(self.no, id, listing.clone()).unwrap();
            let dirs: BTreeMap<_, _> = dirs.into_iter().collect();
            for now in listing {
                let row = self.owner.view().unwrap().entry(self.no, id, now.name.as_bytes());
                let row = row.unwrap().expect("it was in the listing");
                assert_eq!((row.attr, row.disk_ino), (now.attr, now.disk_ino), "{:?}", now.name);
                ids.insert((now.disk_ino, now.attr.btime), row.file_id);
                if now.attr.file_type == FileType::Directory {
                    assert_eq!(dirs[&now.name], row.file_id);
                    waiting.push((now.disk_ino, row.file_id));
                }
            }
        }
        for (file, id) in &ids {
            let before = self.ids.get(file).unwrap_or(id);
            assert_eq!(before, id, "inode {} has another id than before", file.0);
        }
        self.ids = ids;
        while self.owner.sweep_orphans(7).unwrap() > 0 {}
        check_invariants(&self.owner, self.no);
        let names = self.disk.names.len();
        assert_eq!(self.owner.counts(self.no).entries, names as u64, "only what the disk has");
    }

    /// Applies one batch; `false` when there was nothing more.
    fn replicate(&mut self, bytes: usize) -> bool {
        let after = self.replica.head(self.copy);
        let view = self.owner.view().unwrap();
        let (rows, upto) = view.log_after(self.no, after, bytes).unwrap();
        let log_id = self.owner.log_id(self.no);
        self.replica.apply_replica(self.copy, log_id, rows, upto).unwrap();
        check_invariants(&self.replica, self.copy);
        upto > after
    }

    fn converge(&mut self) {
        while self.replicate(700) {}
        check_invariants(&self.replica, self.copy);
        use Table::{Content, Entries, Log, Nodes, Tombstones};
        for table in [Entries, Nodes, Log, Tombstones, Content] {
            let rows = |index, no: LocationNo| {
                // Both have numbers of their own for the location.
                let at = if table == Content { 32..34 } else { 0..2 };
                let mut rows = dump(index, table, b"");
                for (key, _) in &mut rows {
                    assert_eq!(key.drain(at.clone()).collect::<Vec<_>>(), key::location(no));
                }
                rows
            };
            let (owner, replica) = (rows(&self.owner, self.no), rows(&self.replica, self.copy));
            assert_eq!(replica, owner, "{table:?}");
        }
        assert_eq!(self.replica.counts(self.copy), self.owner.counts(self.no));
        assert_eq!(dump(&self.replica, Table::Orphans, b""), []);
        assert_eq!(tree(&self.replica, self.copy), tree(&self.owner, self.no));
    }

    fn reopen_owner(&mut self) {
        // Nothing may be open of the old one when the new one begins.
        self.owner = open(tempfile::tempdir().unwrap().path(), ME);
        self.owner = open(self.folders[0].path(), ME);
    }

    fn reopen_replica(&mut self) {
        self.replica = open(tempfile::tempdir().unwrap().path(), PEER);
        self.replica = open(self.folders[1].path(), PEER);
    }
}

fn tree(index: &Index, no: LocationNo) -> BTreeMap<Vec<Name>, Entry> {
    let view = index.view().unwrap();
    let mut found = BTreeMap::new();
    let mut waiting = vec![(Vec::new(), FileId::ROOT)];
    while let Some((path, dir)) = waiting.pop() {
        view.children(no, dir, None, &mut |text, entry| {
            let path = [path.as_slice(), std::slice::from_ref(text)].concat();
            if entry.attr.file_type == FileType::Directory {
                waiting.push((path.clone(), entry.file_id));
            }
            found.insert(path, entry.clone());
            ControlFlow::Continue(())
        })
        .unwrap();
    }
    for (path, entry) in &found {
        assert_eq!(view.resolve(no, path).unwrap().as_ref(), Some(entry));
        let some_path = view.path(no, entry.file_id).unwrap().expect("a path");
        assert_eq!(found[&some_path].file_id, entry.file_id);
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn an_index_says_what_the_disk_has_and_its_replica_says_the_same(acts in acts()) {
        let mut world = World::new();
        assert_eq!(world.owner.location_by_id(ID).unwrap().no, world.no);
        for act in &acts {
            world.act(act);
        }
        check_invariants(&world.owner, world.no);
        world.scan();
        world.converge();
    }
}
