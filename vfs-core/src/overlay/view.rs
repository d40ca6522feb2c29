//! The index with the overlay on it: what programs of this device see.

use super::{Local, Overlay};
use crate::index::{Index, IndexError, Node, ROOT_PARENT, View};
use crate::model::{Entry, FileId, LocationNo, Name, Time};
use std::iter::Peekable;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// The longest path that is followed, in names; a cycle of two devices' renames ends here.
const DEPTH_MAX: usize = 4096;
/// Names of one file that are looked at in the index.
const NAMES_TRIED: usize = 64;

/// What a visitor of a listing gets.
type Visit<'a> = dyn FnMut(&Name, &Entry) -> ControlFlow<()> + 'a;

/// The index as this device shows it; a location without an overlay costs one look.
#[derive(Clone, Copy)]
pub struct Merged<'a> {
    index: &'a Index,
    overlay: &'a RwLock<Overlay>,
}

impl<'a> Merged<'a> {
    /// Lays the overlay on the index.
    pub fn new(index: &'a Index, overlay: &'a RwLock<Overlay>) -> Self {
        Self { index, overlay }
    }

    /// Held for the time of one look: an overlay goes only after its rows came, so a state of
    /// the index that is taken under this lock has the one or the other.
    fn lock(&self) -> RwLockReadGuard<'a, Overlay> {
        self.overlay.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn look<R>(
        &self,
        no: LocationNo,
        look: impl FnOnce(Option<&Local>, &View<'_>) -> Result<R, IndexError>,
    ) -> Result<R, IndexError> {
        let overlay = self.lock();
        look(overlay.locations.get(&no), &self.index.view()?)
    }

    /// What a name refers to.
    pub fn entry(
        &self,
        no: LocationNo,
        parent: FileId,
        name: &[u8],
    ) -> Result<Option<Entry>, IndexError> {
        self.look(no, |local, view| {
            let Some(local) = local else { return view.entry(no, parent, name) };
            let parent = local.ids.now(parent);
            match local.name(parent, name) {
                Some(None) => Ok(None),
                Some(Some(file)) => local.entry_of(view, no, file),
                None => Ok(view.entry(no, parent, name)?.map(|e| local.patched(e))),
            }
        })
    }

    /// A file, with any one of its names.
    pub fn node(&self, no: LocationNo, file: FileId) -> Result<Option<Node>, IndexError> {
        self.look(no, |local, view| match local {
            Some(local) => local.node(view, no, local.ids.now(file)),
            None => view.node(no, file),
        })
    }

    /// A file as it is shown, and its owner's row at that moment; `None` without a row.
    pub fn shown_and_row(
        &self,
        no: LocationNo,
        file: FileId,
    ) -> Result<Option<(Entry, Entry)>, IndexError> {
        self.look(no, |local, view| {
            let file = local.map_or(file, |local| local.ids.now(file));
            let Some(row) = view.node(no, file)? else { return Ok(None) };
            let row = row.entry;
            let shown = local.map_or_else(|| row.clone(), |local| local.patched(row.clone()));
            Ok(Some((shown, row)))
        })
    }

    /// The names of a file, at most a few dozen.
    pub fn names(&self, no: LocationNo, file: FileId) -> Result<Vec<(FileId, Name)>, IndexError> {
        self.look(no, |local, view| match local {
            Some(local) => local.names(view, no, local.ids.now(file)),
            None => view.names(no, file, NAMES_TRIED),
        })
    }

    /// The path of a file below the location's folder, whose own path is empty; `None` when
    /// it has no name that leads there.
    pub fn path(&self, no: LocationNo, file: FileId) -> Result<Option<Vec<Name>>, IndexError> {
        self.look(no, |local, view| {
            let Some(local) = local else { return view.path(no, file) };
            let (mut path, mut at) = (Vec::new(), local.ids.now(file));
            while at != FileId::ROOT {
                let found = local.names(view, no, at)?.into_iter().next();
                let Some((parent, name)) = found else { return Ok(None) };
                if path.len() == DEPTH_MAX {
                    return Ok(None);
                }
                path.push(name);
                at = parent;
            }
            path.reverse();
            Ok(Some(path))
        })
    }

    /// What the owner calls the file that this device once called so.
    pub fn now(&self, no: LocationNo, file: FileId) -> FileId {
        self.lock().now(no, file)
    }

    /// What this device called the file first; its inode number is made of it.
    pub fn first(&self, no: LocationNo, file: FileId) -> FileId {
        self.lock().first(no, file)
    }

    /// The last access that was set here.
    pub fn atime(&self, no: LocationNo, file: FileId) -> Option<Time> {
        self.lock().atime(no, file)
    }

    /// An extended attribute that was set here, or removed (`Some(None)`).
    pub fn xattr(&self, no: LocationNo, file: FileId, name: &[u8]) -> Option<Option<Box<[u8]>>> {
        self.lock().xattr(no, file, name)
    }

    /// The names of extended attributes that were set here (`true`) or removed.
    pub fn xattrs(&self, no: LocationNo, file: FileId) -> Vec<(Box<[u8]>, bool)> {
        self.lock().xattrs(no, file)
    }

    /// Whether a change of this name's row changes nothing of what is shown.
    pub fn covers(&self, no: LocationNo, dir: FileId, name: &Name) -> bool {
        self.lock().covers(no, dir, name)
    }

    /// The entries of a directory whose names are not below these bytes, in byte order.
    pub fn children_from(
        &self,
        no: LocationNo,
        parent: FileId,
        from: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), IndexError> {
        let own = self.lock().locations.get(&no).map(|local| {
            let parent = local.ids.now(parent);
            (parent, local.names_from(parent, from))
        });
        let view = self.index.view()?;
        let Some((parent, own)) = own else { return view.children_from(no, parent, from, visit) };
        // Not under the lock: a listing may be long, and the visitor's time is not ours.
        let mut own = own.into_iter().peekable();
        let mut flow = ControlFlow::Continue(());
        let mut failure = None;
        view.children_from(no, parent, from, &mut |name, entry| {
            flow = self.own_before(&view, no, &mut own, Some(name), visit, &mut failure);
            if flow.is_continue() {
                flow = match own.next_if(|(n, _)| n == name) {
                    Some((_, file)) => self.own(&view, no, name, file, visit, &mut failure),
                    None => visit(name, &self.patched(no, entry)),
                };
            }
            flow
        })?;
        if flow.is_continue() {
            // Nothing is left to be stopped.
            let _ = self.own_before(&view, no, &mut own, None, visit, &mut failure);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Whether a directory has no entries.
    pub fn is_empty(&self, no: LocationNo, dir: FileId) -> Result<bool, IndexError> {
        let mut is_empty = true;
        self.children_from(no, dir, b"", &mut |_, _| {
            is_empty = false;
            ControlFlow::Break(())
        })?;
        Ok(is_empty)
    }

    /// Shows the overlay's names that come before this one of the index.
    fn own_before(
        &self,
        view: &View<'_>,
        no: LocationNo,
        own: &mut Peekable<impl Iterator<Item = (Name, Option<FileId>)>>,
        before: Option<&Name>,
        visit: &mut Visit<'_>,
        failure: &mut Option<IndexError>,
    ) -> ControlFlow<()> {
        while let Some((name, file)) = own.next_if(|(n, _)| before.is_none_or(|b| n < b)) {
            self.own(view, no, &name, file, visit, failure)?;
        }
        ControlFlow::Continue(())
    }

    fn own(
        &self,
        view: &View<'_>,
        no: LocationNo,
        name: &Name,
        file: Option<FileId>,
        visit: &mut Visit<'_>,
        failure: &mut Option<IndexError>,
    ) -> ControlFlow<()> {
        let Some(file) = file else { return ControlFlow::Continue(()) };
        let entry = match self.lock().locations.get(&no) {
            Some(local) => local.entry_of(view, no, file),
            None => view.node(no, file).map(|node| node.map(|n| n.entry)),
        };
        match entry {
            Ok(Some(entry)) => visit(name, &entry),
            Ok(None) => ControlFlow::Continue(()),
            Err(error) => {
                *failure = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    fn patched(&self, no: LocationNo, entry: &Entry) -> Entry {
        match self.lock().locations.get(&no) {
            Some(local) => local.patched(entry.clone()),
            None => entry.clone(),
        }
    }
}

impl Local {
    fn entry_of(
        &self,
        view: &View<'_>,
        no: LocationNo,
        file: FileId,
    ) -> Result<Option<Entry>, IndexError> {
        let entry = match self.made(file) {
            Some(entry) => Some(entry),
            None => view.node(no, file)?.map(|node| node.entry),
        };
        Ok(entry.map(|entry| self.patched(entry)))
    }

    /// Names of a file: those shown here, then those of the index that are not hidden here.
    fn names(
        &self,
        view: &View<'_>,
        no: LocationNo,
        file: FileId,
    ) -> Result<Vec<(FileId, Name)>, IndexError> {
        let own = self.places.get(&file).into_iter().flatten();
        let mut names: Vec<_> = own.map(|p| (p.dir, p.name.clone())).collect();
        for (dir, name) in view.names(no, file, NAMES_TRIED)? {
            if dir == ROOT_PARENT || self.name(dir, name.as_bytes()).is_none() {
                names.push((dir, name));
            }
        }
        Ok(names)
    }

    fn node(
        &self,
        view: &View<'_>,
        no: LocationNo,
        file: FileId,
    ) -> Result<Option<Node>, IndexError> {
        let Some((parent, name)) = self.names(view, no, file)?.into_iter().next() else {
            return Ok(None);
        };
        let entry = self.entry_of(view, no, file)?;
        Ok(entry.map(|entry| Node { parent, name, entry }))
    }

    fn names_from(&self, dir: FileId, from: &[u8]) -> Vec<(Name, Option<FileId>)> {
        let Some(names) = self.names.get(&dir) else { return Vec::new() };
        let range = names.range::<[u8], _>((Bound::Included(from), Bound::Unbounded));
        range.filter_map(|(name, shown)| Some((name.clone(), *shown.top()?))).collect()
    }
}
