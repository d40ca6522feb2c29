//! A disk as its owner's programs leave it: inodes that are used again, hard links, renames.

use super::Observed;
use super::tests::{name, observed};
use crate::model::{FileType, Name, Time};
use std::collections::BTreeMap;

pub(super) const ROOT_INO: u64 = 1;

/// What is created.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
}

/// A disk: inodes, and the names in each directory.
pub(super) struct Disk {
    pub(super) inodes: BTreeMap<u64, Observed>,
    pub(super) names: BTreeMap<(u64, Name), u64>,
    clock: i64,
}

impl Disk {
    pub(super) fn new() -> Self {
        let root = observed("root", ROOT_INO, FileType::Directory);
        Self { inodes: [(ROOT_INO, root)].into(), names: BTreeMap::new(), clock: 0 }
    }

    pub(super) fn tick(&mut self) -> Time {
        self.clock += 1;
        Time { secs: 1_800_000_000 + self.clock, nanos: 1 }
    }

    pub(super) fn directories(&self) -> Vec<u64> {
        let is_dir = |o: &&Observed| o.attr.file_type == FileType::Directory;
        self.inodes.values().filter(is_dir).map(|o| o.disk_ino).collect()
    }

    pub(super) fn listing(&self, dir: u64) -> Vec<Observed> {
        let named = self.names.range((dir, name("\u{1}"))..).take_while(|((d, _), _)| *d == dir);
        named.map(|((_, n), ino)| self.see(*ino, n)).collect()
    }

    pub(super) fn see(&self, ino: u64, text: &Name) -> Observed {
        Observed { name: text.clone(), ..self.inodes[&ino].clone() }
    }

    /// As a disk does, gives the lowest free number: inodes are used again.
    pub(super) fn create(&mut self, dir: u64, text: Name, kind: Kind) {
        let file_type = match kind {
            Kind::File => FileType::File,
            Kind::Directory => FileType::Directory,
            Kind::Symlink => FileType::Symlink,
        };
        let ino = (ROOT_INO..).find(|n| !self.inodes.contains_key(n)).unwrap();
        let mut new = observed("x", ino, file_type);
        let now = self.tick();
        (new.attr.mtime, new.attr.ctime, new.attr.btime) = (now, now, Some(now));
        if self.names.contains_key(&(dir, text.clone())) {
            return;
        }
        self.inodes.insert(ino, new);
        self.names.insert((dir, text), ino);
    }

    pub(super) fn is_dir(&self, ino: u64) -> bool {
        self.inodes[&ino].attr.file_type == FileType::Directory
    }

    pub(super) fn is_below(&self, mut dir: u64, top: u64) -> bool {
        while dir != top {
            match self.names.iter().find(|(_, ino)| **ino == dir) {
                Some(((parent, _), _)) => dir = *parent,
                None => return false,
            }
        }
        true
    }

    pub(super) fn remove(&mut self, at: &(u64, Name)) {
        let Some(ino) = self.names.remove(at) else { return };
        if self.is_dir(ino) {
            let below: Vec<_> = self.names.keys().filter(|(d, _)| *d == ino).cloned().collect();
            below.iter().for_each(|at| self.remove(at));
        }
        let now = self.tick();
        let node = self.inodes.get_mut(&ino).unwrap();
        node.attr.nlink -= 1;
        node.attr.ctime = now;
        if node.attr.nlink == 0 {
            self.inodes.remove(&ino);
        }
    }

    pub(super) fn rename(&mut self, from: &(u64, Name), to: (u64, Name)) {
        let ino = self.names[from];
        if *from == to || self.names.get(&to) == Some(&ino) || self.is_below(to.0, ino) {
            return;
        }
        // What is replaced goes, unless the file to move is in it.
        if let Some(old) = self.names.get(&to)
            && self.is_below(from.0, *old)
        {
            return;
        }
        self.remove(&to);
        self.names.remove(from);
        self.names.insert(to, ino);
        let now = self.tick();
        self.inodes.get_mut(&ino).unwrap().attr.ctime = now;
    }

    pub(super) fn link(&mut self, from: &(u64, Name), to: (u64, Name)) {
        let ino = self.names[from];
        if self.is_dir(ino) || self.names.contains_key(&to) {
            return;
        }
        self.names.insert(to, ino);
        let now = self.tick();
        let attr = &mut self.inodes.get_mut(&ino).unwrap().attr;
        attr.nlink += 1;
        attr.ctime = now;
    }

    pub(super) fn write(&mut self, ino: u64) {
        let now = self.tick();
        let attr = &mut self.inodes.get_mut(&ino).unwrap().attr;
        (attr.mtime, attr.ctime) = (now, now);
    }
}
