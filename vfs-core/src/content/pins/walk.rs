//! All files below a file or folder of the index, a page at a time: what a walk remembers is a
//! place in each directory that it is in.

use crate::index::{IndexError, View};
use crate::model::{Entry, FileId, FileType, LocationNo};
use std::ops::ControlFlow;

/// Rows that are looked at in one step.
const PAGE: usize = 1024;
/// Deeper than any path that is followed.
const DEPTH_MAX: usize = 4096;
/// Names of one file that are followed upwards.
const NAMES_TRIED: usize = 16;

/// A walk.
pub(super) struct Walk {
    no: LocationNo,
    start: FileId,
    /// It is one file, not visited yet.
    single: Option<Entry>,
    levels: Vec<Level>,
}

struct Level {
    dir: FileId,
    /// Names below these bytes are done.
    from: Vec<u8>,
}

impl Walk {
    /// From a file, or from a folder downwards.
    pub fn begin(no: LocationNo, entry: &Entry) -> Self {
        let start = entry.file_id;
        let is_dir = entry.attr.file_type == FileType::Directory;
        let levels = is_dir.then(|| Level { dir: start, from: Vec::new() });
        Self {
            no,
            start,
            single: (!is_dir).then(|| entry.clone()),
            levels: levels.into_iter().collect(),
        }
    }

    /// Visits the regular files of the next page; `false` at the end.
    pub fn step(
        &mut self,
        view: &View<'_>,
        visit: &mut dyn FnMut(&Entry),
    ) -> Result<bool, IndexError> {
        if let Some(entry) = self.single.take() {
            visit_file(&entry, visit);
        }
        let mut left = PAGE;
        while left > 0 {
            let Some(level) = self.levels.last_mut() else { return Ok(false) };
            let mut below = None;
            let mut is_cut = false;
            let dir = level.dir;
            let from = std::mem::take(&mut level.from);
            view.children_from(self.no, dir, &from, &mut |name, entry| {
                left = left.saturating_sub(1);
                visit_file(entry, visit);
                if entry.attr.file_type == FileType::Directory {
                    below = Some(entry.file_id);
                }
                is_cut = below.is_some() || left == 0;
                if is_cut {
                    // Names have no NUL: these are the first bytes after it.
                    level.from = [name.as_bytes(), &[0]].concat();
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })?;
            match below {
                Some(below) if self.may_enter(view, dir, below)? => {
                    self.levels.push(Level { dir: below, from: Vec::new() });
                }
                None if !is_cut => drop(self.levels.pop()),
                _ => {}
            }
        }
        Ok(true)
    }

    /// A directory has one name. A bad peer's may have more, or be in itself: each is entered by
    /// one of them.
    fn may_enter(&self, view: &View<'_>, dir: FileId, below: FileId) -> Result<bool, IndexError> {
        let is_known_here = view.names(self.no, below, 1)?.first().is_some_and(|n| n.0 == dir);
        Ok(below != self.start && is_known_here && self.levels.len() < DEPTH_MAX)
    }
}

fn visit_file(entry: &Entry, visit: &mut dyn FnMut(&Entry)) {
    if entry.attr.file_type == FileType::File {
        visit(entry);
    }
}

/// The nearest of a file and the folders above it of which `is_it` says something.
pub(super) fn first_above<T>(
    view: &View<'_>,
    no: LocationNo,
    file: FileId,
    is_it: impl Fn(FileId) -> Option<T>,
) -> Result<Option<T>, IndexError> {
    if let Some(found) = is_it(file) {
        return Ok(Some(found));
    }
    for (dir, _) in view.names(no, file, NAMES_TRIED)? {
        let (mut at, mut depth) = (dir, 0);
        loop {
            if let Some(found) = is_it(at) {
                return Ok(Some(found));
            }
            depth += 1;
            match view.names(no, at, 1)?.pop() {
                Some((up, _)) if at != FileId::ROOT && depth < DEPTH_MAX => at = up,
                _ => break,
            }
        }
    }
    Ok(None)
}
