//! Which small files come after a place, for a program that goes through a tree depth first.
//!
//! The order is that of listings: the names of a directory in byte order, a subdirectory at
//! its own name. `tar`, `grep -r`, `find` and `git` go that way. Programs that sort by inode
//! number do so too, as far as an owner numbered the entries of a directory in one scan.

use crate::index::{IndexError, View};
use crate::model::{Entry, FileId, FileType, LocationNo, Name};
use std::ops::ControlFlow;

/// Rows that are looked at for one answer. Below, say, a million large films there may be
/// nothing to find, and the next answer goes on where this one stopped.
const MAX_LOOKED_AT: usize = 1024;

/// What a visitor of a listing gets.
pub(super) type Visit<'a> = dyn FnMut(&Name, &Entry) -> ControlFlow<()> + 'a;

/// The rows of one location.
pub(super) trait Tree {
    /// The entries of a directory whose names are not below these bytes, in byte order.
    fn children_from(
        &self,
        dir: FileId,
        from: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), IndexError>;

    /// The directory and the name of a file.
    fn place_of(&self, file: FileId) -> Result<Option<(FileId, Name)>, IndexError>;
}

/// The [`Tree`] that the index has.
pub(super) struct Rows<'a>(pub View<'a>, pub LocationNo);

impl Tree for Rows<'_> {
    fn children_from(
        &self,
        dir: FileId,
        from: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), IndexError> {
        self.0.children_from(self.1, dir, from, visit)
    }

    fn place_of(&self, file: FileId) -> Result<Option<(FileId, Name)>, IndexError> {
        Ok(self.0.names(self.1, file, 1)?.pop())
    }
}

/// Where a search goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub dir: FileId,
    /// Names below these bytes are done.
    pub from: Vec<u8>,
    /// The highest directory that the search has climbed to.
    pub top: FileId,
}

impl Place {
    /// Right after a name.
    pub fn after(dir: FileId, name: &Name, top: FileId) -> Self {
        // Names have no NUL: these are the first bytes after it.
        Self { dir, from: [name.as_bytes(), &[0]].concat(), top }
    }
}

/// A file that may be read next.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub entry: Entry,
    pub dir: FileId,
    pub name: Name,
    /// The highest directory that was climbed to on the way to it.
    pub top: FileId,
}

/// How far a search goes.
pub(super) struct Reach {
    /// Files, at most.
    pub files: usize,
    /// The highest directory that the reader is known to go on in.
    pub top: FileId,
    /// Whether the reader is known to go into subdirectories. Otherwise of each the first file
    /// only is found, in case it does, and then what comes after the subdirectory.
    pub descends: bool,
    /// Files beyond the top, and first files of subdirectories, at most each: whether the reader
    /// goes there is not known.
    pub beyond: usize,
}

impl Reach {
    /// Whoever goes on beyond the top goes into the directories there.
    fn enters_below(&self, top: FileId) -> bool {
        self.descends || top != self.top
    }
}

/// The files after a place that are `wanted`, in order; the place moves past them.
pub(super) fn search(
    tree: &dyn Tree,
    place: &mut Place,
    reach: &Reach,
    wanted: &dyn Fn(&Entry) -> bool,
) -> Result<Vec<Found>, IndexError> {
    let mut search = Search { tree, wanted, reach, found: Vec::new(), looked_at: 0 };
    let mut firsts = reach.beyond;
    while !search.is_done(place) {
        match search.next_subdirectory(place)? {
            Some(below) if reach.enters_below(place.top) => {
                *place = Place { dir: below, from: Vec::new(), top: place.top };
            }
            Some(below) if firsts > 0 => {
                firsts -= 1;
                let mut first = Place { dir: below, from: Vec::new(), top: place.top };
                search.take(&mut first, 1)?;
            }
            Some(_) => {}
            None if search.is_done(place) => {}
            None => match above(tree, place)? {
                Some(above) => *place = above,
                None => break,
            },
        }
        search.looked_at += 1;
    }
    Ok(search.found)
}

/// Right after the directory, in the one above it.
fn above(tree: &dyn Tree, place: &Place) -> Result<Option<Place>, IndexError> {
    if place.dir == FileId::ROOT {
        return Ok(None);
    }
    let Some((parent, name)) = tree.place_of(place.dir)? else { return Ok(None) };
    let top = if place.dir == place.top { parent } else { place.top };
    Ok(Some(Place::after(parent, &name, top)))
}

struct Search<'a> {
    tree: &'a dyn Tree,
    wanted: &'a dyn Fn(&Entry) -> bool,
    reach: &'a Reach,
    found: Vec<Found>,
    looked_at: usize,
}

impl Search<'_> {
    /// How many more files are asked for, below this top.
    fn left(&self, top: FileId) -> usize {
        let left = self.reach.files.saturating_sub(self.found.len());
        if top == self.reach.top {
            return left;
        }
        let beyond = self.found.iter().filter(|found| found.top != self.reach.top).count();
        left.min(self.reach.beyond.saturating_sub(beyond))
    }

    fn is_done(&self, place: &Place) -> bool {
        self.left(place.top) == 0 || self.looked_at >= MAX_LOOKED_AT
    }

    fn next_subdirectory(&mut self, place: &mut Place) -> Result<Option<FileId>, IndexError> {
        let most = self.left(place.top);
        self.take(place, most)
    }

    /// Takes files of the place's directory, up to its next subdirectory, which is given;
    /// `None`: there is none, or enough was found before it.
    fn take(&mut self, place: &mut Place, most: usize) -> Result<Option<FileId>, IndexError> {
        let (tree, dir, top) = (self.tree, place.dir, place.top);
        let from = std::mem::take(&mut place.from);
        let (mut last, mut subdirectory, mut taken) = (None, None, 0);
        tree.children_from(dir, &from, &mut |name, entry| {
            self.looked_at += 1;
            last = Some(name.clone());
            match entry.attr.file_type {
                FileType::Directory => subdirectory = Some(entry.file_id),
                FileType::File if (self.wanted)(entry) => {
                    taken += 1;
                    let (entry, name) = (entry.clone(), name.clone());
                    self.found.push(Found { entry, dir, name, top });
                }
                _ => {}
            }
            let goes_on = subdirectory.is_none() && taken < most && self.looked_at < MAX_LOOKED_AT;
            if goes_on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        *place = match last {
            Some(last) => Place::after(dir, &last, top),
            None => Place { dir, from, top },
        };
        Ok(subdirectory)
    }
}
