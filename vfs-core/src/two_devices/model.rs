//! A file system in memory, as simple as can be: what programs of the writer must see.

use super::steps::At;
use super::tree::{Seen, Tree, What};
use crate::error::Kind;
use crate::model::Time;
use std::collections::BTreeMap;

type No = u64;

const ROOT: No = 1;

#[derive(Clone, Debug)]
pub(super) enum Body {
    File(Vec<u8>),
    Dir(BTreeMap<&'static str, No>),
    Link(String),
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub body: Body,
    pub perm: u16,
    /// Learned from the first look after a change, and the same from then on.
    pub mtime: Option<Time>,
    /// Likewise, until the writer is restarted.
    pub ino: Option<u64>,
    /// What was written since the last close or fsync may be lost with the process.
    pub is_dirty: bool,
}

/// All files, also those that are only open.
pub(super) struct Model {
    pub nodes: BTreeMap<No, Node>,
    next: No,
}

/// What a call must answer: success, or one of these.
pub(super) type Answer<T> = Result<T, Vec<Kind>>;

pub(super) fn one<T>(kind: Kind) -> Answer<T> {
    Err(vec![kind])
}

/// How a rename treats its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum How {
    Replace,
    NoReplace,
    Exchange,
}

fn dir_node() -> Node {
    let body = Body::Dir(BTreeMap::new());
    Node { body, perm: 0o755, mtime: None, ino: None, is_dirty: false }
}

impl Model {
    pub fn new() -> Self {
        Self { nodes: BTreeMap::from([(ROOT, dir_node())]), next: ROOT + 1 }
    }

    fn entries(&self, dir: No) -> Answer<&BTreeMap<&'static str, No>> {
        match &self.nodes[&dir].body {
            Body::Dir(entries) => Ok(entries),
            // A kernel does not ask for a name in what is no directory.
            _ => Err(vec![Kind::NotADirectory, Kind::NotFound]),
        }
    }

    fn entries_mut(&mut self, dir: No) -> &mut BTreeMap<&'static str, No> {
        match &mut self.nodes.get_mut(&dir).unwrap().body {
            Body::Dir(entries) => entries,
            other => panic!("{other:?} is used as a directory"),
        }
    }

    pub fn find(&self, at: &[&str]) -> Answer<No> {
        at.iter().try_fold(ROOT, |dir, name| {
            self.entries(dir)?.get(name).copied().ok_or(vec![Kind::NotFound])
        })
    }

    /// The directory of a path, which must be there, and what has the path's name.
    pub fn place(&self, at: &[&'static str]) -> Answer<(No, &'static str, Option<No>)> {
        let (name, parent) = at.split_last().unwrap();
        let dir = self.find(parent)?;
        let there = self.entries(dir)?.get(name).copied();
        Ok((dir, name, there))
    }

    /// Of a regular file.
    pub fn file(&self, at: &[&str]) -> Answer<No> {
        let no = self.find(at)?;
        match &self.nodes[&no].body {
            Body::File(_) => Ok(no),
            Body::Dir(_) => one(Kind::IsADirectory),
            Body::Link(_) => one(Kind::Loop),
        }
    }

    pub fn make(&mut self, at: &At, body: Body, perm: u16) -> Answer<No> {
        let (dir, name, there) = self.place(at)?;
        if there.is_some() {
            return one(Kind::Exists);
        }
        let no = self.next;
        self.next += 1;
        self.nodes.insert(no, Node { body, perm, ..dir_node() });
        self.entries_mut(dir).insert(name, no);
        Ok(no)
    }

    pub fn make_dir(&mut self, at: &At) -> Answer<No> {
        self.make(at, Body::Dir(BTreeMap::new()), 0o755)
    }

    pub fn link(&mut self, from: &At, to: &At) -> Answer<()> {
        let no = self.find(from)?;
        let (dir, name, there) = self.place(to)?;
        if matches!(self.nodes[&no].body, Body::Dir(_)) {
            return Err(vec![Kind::NotPermitted, Kind::Exists]);
        }
        if there.is_some() {
            return one(Kind::Exists);
        }
        self.entries_mut(dir).insert(name, no);
        Ok(())
    }

    pub fn unlink(&mut self, at: &At) -> Answer<()> {
        let (dir, name, there) = self.place(at)?;
        let no = there.ok_or(vec![Kind::NotFound])?;
        if matches!(self.nodes[&no].body, Body::Dir(_)) {
            return one(Kind::IsADirectory);
        }
        self.entries_mut(dir).remove(name);
        Ok(())
    }

    pub fn rmdir(&mut self, at: &At) -> Answer<()> {
        let (dir, name, there) = self.place(at)?;
        let entries = self.entries(there.ok_or(vec![Kind::NotFound])?)?;
        if !entries.is_empty() {
            return one(Kind::NotEmpty);
        }
        self.entries_mut(dir).remove(name);
        Ok(())
    }

    pub fn rename(&mut self, from: &At, to: &At, how: How) -> Answer<()> {
        let (from_dir, from_name, moved) = self.place(from)?;
        let (to_dir, to_name, there) = self.place(to)?;
        let moved = moved.ok_or(vec![Kind::NotFound])?;
        let refused = self.refused(from, to, (moved, there), how);
        if !refused.is_empty() {
            return Err(refused);
        }
        if there == Some(moved) {
            return Ok(());
        }
        let back = there.filter(|_| how == How::Exchange);
        let entries = self.entries_mut(from_dir);
        entries.remove(from_name);
        entries.extend(back.map(|there| (from_name, there)));
        self.entries_mut(to_dir).insert(to_name, moved);
        Ok(())
    }

    /// Every reason there is; a kernel looks at them in an order of its own.
    fn refused(&self, from: &At, to: &At, files: (No, Option<No>), how: How) -> Vec<Kind> {
        let (moved, there) = files;
        let is_dir = |no: No| matches!(self.nodes[&no].body, Body::Dir(_));
        let below = |a: &At, b: &At| a.len() > b.len() && a.starts_with(b);
        let mut refused = Vec::new();
        let mut refuse = |is: bool, kind| refused.extend(is.then_some(kind));
        refuse(is_dir(moved) && below(to, from), Kind::Invalid);
        refuse(how == How::Exchange && below(from, to), Kind::Invalid);
        refuse(how == How::NoReplace && there.is_some(), Kind::Exists);
        refuse(how == How::Exchange && there.is_none(), Kind::NotFound);
        if let Some(there) = there.filter(|no| *no != moved && how != How::Exchange) {
            refuse(is_dir(moved) && !is_dir(there), Kind::NotADirectory);
            refuse(!is_dir(moved) && is_dir(there), Kind::IsADirectory);
            let is_full = self.entries(there).is_ok_and(|entries| !entries.is_empty());
            refuse(is_full, Kind::NotEmpty);
        }
        refused
    }

    pub fn bytes(&mut self, no: No) -> &mut Vec<u8> {
        match &mut self.nodes.get_mut(&no).unwrap().body {
            Body::File(bytes) => bytes,
            other => panic!("{other:?} is used as a file"),
        }
    }

    pub fn write(&mut self, no: No, offset: usize, new: &[u8]) {
        self.nodes.get_mut(&no).unwrap().mtime = None;
        if new.is_empty() {
            return;
        }
        let bytes = self.bytes(no);
        bytes.resize(bytes.len().max(offset + new.len()), 0);
        bytes[offset..offset + new.len()].copy_from_slice(new);
    }

    /// Every path with its file.
    pub fn paths(&self) -> Vec<(String, No)> {
        let mut paths = Vec::new();
        self.walk(ROOT, "", &mut paths);
        paths
    }

    fn walk(&self, dir: No, prefix: &str, paths: &mut Vec<(String, No)>) {
        let Body::Dir(entries) = &self.nodes[&dir].body else { return };
        for (name, no) in entries {
            let path = format!("{prefix}{name}");
            self.walk(*no, &format!("{path}/"), paths);
            paths.push((path, *no));
        }
    }

    /// As a program sees it; what is not known yet is as in the other tree, which is learned from.
    pub fn learn(&mut self, seen: &Tree) -> Tree {
        let paths = self.paths();
        let mut tree = Tree::new();
        for (path, no) in &paths {
            let nlink = paths.iter().filter(|(_, other)| other == no).count() as u32;
            let node = self.nodes.get_mut(no).unwrap();
            let there = seen.get(path);
            let mtime = node.mtime.or(there.map(|s| s.mtime)).unwrap_or_default();
            let ino = node.ino.or(there.map(|s| s.ino)).unwrap_or_default();
            let what = match &node.body {
                Body::File(bytes) => What::File(Ok(bytes.clone())),
                Body::Dir(_) => What::Dir,
                Body::Link(target) => What::Link(target.clone()),
            };
            if there.is_some() && matches!(node.body, Body::File(_)) {
                (node.mtime, node.ino) = (Some(mtime), Some(ino));
            }
            tree.insert(path.clone(), Seen { what, perm: node.perm, mtime, nlink, ino });
        }
        tree
    }
}
