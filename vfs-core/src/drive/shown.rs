//! What a kernel that asks now is told, for whoever doubts what it keeps.
//!
//! A part of each location, from its folder down, as that is what programs look at first. The
//! names are the index's, and the answers those that [`Drive::lookup`] gives; so it is not the
//! index that is doubted here, but what a kernel remembers of earlier answers.

use super::types::{Found, InodeNo};
use super::{Class, Drive};
use crate::changes::Change;
use crate::error::FsResult;
use crate::model::{FileId, FileType, LocationNo, Name};
use std::collections::VecDeque;
use std::ops::ControlFlow;

/// An entry as it is shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shown {
    /// Where, from the root of the drive.
    pub path: Vec<Name>,
    /// What a lookup gives.
    pub found: Found,
}

/// A directory that was found.
struct Directory {
    path: Vec<Name>,
    ino: InodeNo,
    location: LocationNo,
    file: FileId,
}

impl Drive {
    /// At most so many entries of each location, those near its folder first. What changes
    /// meanwhile, or is away with its disk, is left out.
    pub fn shown(&self, of_each: usize) -> Vec<Shown> {
        let mut shown = Vec::new();
        for (device, ino) in self.top.devices() {
            for (location, ino) in self.top.locations(ino).unwrap_or_default() {
                let path = vec![device.clone(), location];
                let Some(location) = location_of(ino) else { continue };
                let folder = Directory { path, ino, location, file: FileId::ROOT };
                shown.extend(self.shown_below(folder, of_each));
            }
        }
        shown
    }

    fn shown_below(&self, folder: Directory, most: usize) -> Vec<Shown> {
        let (mut shown, mut waiting) = (Vec::new(), VecDeque::from([folder]));
        while let Some(dir) = waiting.pop_front().filter(|_| shown.len() < most) {
            let names = self.some_names(&dir, most - shown.len()).unwrap_or_default();
            for (name, file) in names {
                let Ok(found) = self.lookup(dir.ino, name.as_bytes()) else { continue };
                // An own directory that no kernel holds is not known any more after this, and not
                // entered: what is below it no kernel can remember either.
                self.forget(found.ino, 1);
                let path: Vec<_> = dir.path.iter().chain([&name]).cloned().collect();
                if found.attr.file_type == FileType::Directory {
                    let (path, ino, location) = (path.clone(), found.ino, dir.location);
                    waiting.push_back(Directory { path, ino, location, file });
                }
                shown.push(Shown { path, found });
            }
        }
        shown
    }

    fn some_names(&self, dir: &Directory, most: usize) -> FsResult<Vec<(Name, FileId)>> {
        let mut names = Vec::new();
        self.remote.index.view()?.children(dir.location, dir.file, None, &mut |name, entry| {
            names.push((name.clone(), entry.file_id));
            match names.len() < most {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        Ok(names)
    }

    /// Has every kernel look up an entry again; what it is shown as does not change. `false`:
    /// there is none at this path.
    pub fn show_again(&self, path: &[Name]) -> FsResult<bool> {
        let [device, location, dirs @ .., name] = path else { return Ok(false) };
        let device = self.top.device_named(device.as_bytes())?;
        let folder = self.top.location_named(device, location.as_bytes())?;
        let Some(location) = location_of(folder) else { return Ok(false) };
        let index = &self.remote.index;
        let view = index.view()?;
        let Some(dir) = view.resolve(location, dirs)? else { return Ok(false) };
        let mut changes = vec![Change::Entry {
            location,
            parent: dir.file_id,
            name: name.clone(),
            was: None,
            now: None,
        }];
        if let Some(entry) = view.entry(location, dir.file_id, name.as_bytes())? {
            let (file, generation) = (entry.file_id, entry.generation);
            changes.push(Change::Attributes {
                location,
                file,
                generation,
                noticed: None,
                grew: None,
            });
        }
        index.feed().publish(changes);
        Ok(true)
    }
}

fn location_of(folder: InodeNo) -> Option<LocationNo> {
    match folder.class() {
        Class::Own(location) => Some(location),
        Class::Remote(remote) => Some(remote.location),
        Class::Root | Class::Device => None,
    }
}
