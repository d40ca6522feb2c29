//! Changes of names: what programs ask for, checked against what they see.
//!
//! The checks give a program the error that its call would have met on the
//! owner's disk, as far as this device can know. What has changed there in the
//! meantime is the owner's to decide ([`crate::ops::Conflict`]).

use super::record::content;
use super::written::Written;
use super::{NewBytes, NewOp, Outbox, State};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, FileId, FileType, LocationNo, Name, TARGET_MAX, Time};
use crate::ops::{Base, Change, DRAWN_FILE_ID, MAX_DEPTH, New, Place};
use crate::overlay::{self, FIRST_GENERATION, Live};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// What is made under a new name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Made<'a> {
    /// A regular file, empty at first; one that is opened at once waits for its first close.
    File {
        /// It is being opened.
        is_open: bool,
    },
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Symlink(&'a [u8]),
    /// A FIFO.
    Fifo,
}

/// How a rename treats what is at its target.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MoveFlags {
    /// It must not be there.
    pub no_replace: bool,
    /// It comes to where the other was.
    pub exchange: bool,
}

fn not_found() -> FsError {
    FsError::new(Kind::NotFound, "use a name that is not there")
}

impl Outbox {
    /// What a name refers to, for a change.
    fn present(&self, no: LocationNo, dir: FileId, name: &Name) -> FsResult<Entry> {
        self.view().entry(no, dir, name.as_bytes())?.ok_or_else(not_found)
    }

    /// The path of a name in a directory that is there.
    fn path_in(&self, no: LocationNo, dir: FileId, name: &Name) -> FsResult<Vec<Name>> {
        let view = self.view();
        match view.node(no, dir)? {
            Some(node) if node.entry.attr.file_type != FileType::Directory => {
                return Err(FsError::new(Kind::NotADirectory, "use a file as a directory"));
            }
            Some(_) => {}
            // A location's folder whose row has not come yet.
            None if dir == FileId::ROOT => {}
            None => return Err(not_found()),
        }
        let mut path = view.path(no, dir)?.ok_or_else(not_found)?;
        if path.len() >= MAX_DEPTH {
            return Err(FsError::new(Kind::NameTooLong, "make a path this deep"));
        }
        path.push(name.clone());
        Ok(path)
    }

    /// Makes something under a name that is free.
    pub(crate) fn make(
        &self,
        no: LocationNo,
        (dir, name): (FileId, &Name),
        made: Made<'_>,
        perm: u16,
    ) -> FsResult<(Entry, Option<Arc<Written>>)> {
        let location = self.writable(no)?;
        if let Made::Symlink(target) = made {
            check_target(target)?;
        }
        let mut state = self.state();
        let path = self.path_in(no, dir, name)?;
        if self.view().entry(no, dir, name.as_bytes())?.is_some() {
            return Err(FsError::new(Kind::Exists, "make a name that is there"));
        }
        let file = self.draw_file(no)?;
        let now = Time::now();
        let what = match made {
            Made::File { .. } => New::File(content(None, now)),
            Made::Directory => New::Directory,
            Made::Symlink(target) => New::Symlink(target.into()),
            Made::Fifo => New::Fifo,
        };
        let at = Place { dir, name: name.clone() };
        let change = Change::Create { at, file, what, perm, mtime: now };
        let written = match made {
            Made::File { .. } => Some(self.new_file(no, file, now)?),
            _ => None,
        };
        let bytes = written.as_ref().map(|w| NewBytes {
            bytes: w.bytes(),
            snapshot: None,
            fill: Vec::new(),
        });
        let is_held = made == Made::File { is_open: true };
        let op = NewOp {
            location,
            change,
            is_directory: made == Made::Directory,
            path,
            bytes,
            is_held,
            generation: None,
        };
        let accepted = match self.accept(&mut state, op) {
            Ok(accepted) => accepted,
            Err(error) => {
                written.inspect(|w| self.staging.remove(w.draft.id()));
                return Err(error);
            }
        };
        if let Some(written) = &written {
            self.register(&mut state, written, accepted);
        }
        drop(state);
        Ok((self.present(no, dir, name)?, written))
    }

    /// The bytes of a file that is being made: none yet.
    fn new_file(&self, no: LocationNo, file: FileId, now: Time) -> FsResult<Arc<Written>> {
        let draft = self.staging.create(0)?;
        let shown = overlay::Bytes { live: Live::new(0, now), generation: FIRST_GENERATION };
        let under = Entry { generation: FIRST_GENERATION, ..overlay::new_file_row(file, now) };
        // The number of the operation is known when it is accepted.
        Ok(Written::new((no, file), (draft, shown), Base::After(0), Arc::new(under)))
    }

    /// Not locked by anyone else yet, so the order of locks is kept.
    fn register(&self, state: &mut State, written: &Arc<Written>, no: u64) {
        let mut writing = written.lock();
        writing.op = Some(no);
        written.build_on(no);
        state.drafts.hold(&written.draft);
        let mut open = self.files.entry((written.location, written.file())).or_default();
        open.written = Some(Arc::clone(written));
    }

    /// An id that nothing in the location has.
    fn draw_file(&self, no: LocationNo) -> FsResult<FileId> {
        loop {
            let file = FileId(DRAWN_FILE_ID | (random() & (DRAWN_FILE_ID - 1)));
            if self.view().node(no, file)?.is_none() {
                return Ok(file);
            }
        }
    }

    /// Gives a file another name.
    pub(crate) fn link(
        &self,
        no: LocationNo,
        file: FileId,
        (dir, name): (FileId, &Name),
    ) -> FsResult<Entry> {
        let location = self.writable(no)?;
        let mut state = self.state();
        let path = self.path_in(no, dir, name)?;
        let linked = self.view().node(no, file)?.ok_or_else(not_found)?.entry;
        if linked.attr.file_type == FileType::Directory {
            return Err(FsError::new(Kind::NotPermitted, "link a directory"));
        }
        if self.view().entry(no, dir, name.as_bytes())?.is_some() {
            return Err(FsError::new(Kind::Exists, "link to a name that is there"));
        }
        let change = Change::Link { file, at: Place { dir, name: name.clone() } };
        self.accept_name(&mut state, (location, path), change, false)?;
        drop(state);
        self.present(no, dir, name)
    }

    fn accept_name(
        &self,
        state: &mut State,
        (location, path): (Arc<crate::model::Location>, Vec<Name>),
        change: Change,
        is_directory: bool,
    ) -> FsResult<u64> {
        let op = NewOp {
            location,
            change,
            is_directory,
            path,
            bytes: None,
            is_held: false,
            generation: None,
        };
        self.accept(state, op)
    }

    /// Takes a name from anything but a directory.
    pub(crate) fn unlink(&self, no: LocationNo, (dir, name): (FileId, &Name)) -> FsResult<()> {
        let location = self.writable(no)?;
        let mut state = self.state();
        let dir = self.now(no, dir);
        let path = self.path_in(no, dir, name)?;
        let entry = self.present(no, dir, name)?;
        if entry.attr.file_type == FileType::Directory {
            return Err(FsError::new(Kind::IsADirectory, "unlink a directory"));
        }
        let file = entry.file_id;
        let at = Place { dir, name: name.clone() };
        if !self.take_back(&mut state, location.id, file, &at)? {
            let base = self.base_of(&state, no, location.id, &entry);
            let change = Change::Unlink { file, at, base };
            self.accept_name(&mut state, (location, path), change, false)?;
        }
        self.unnamed(no, file)?;
        self.let_go_if_unused(&mut state, no, file);
        Ok(())
    }

    /// Deletes a file that was made here and that its owner never heard of: neither ever will.
    fn take_back(
        &self,
        state: &mut State,
        location: crate::model::LocationId,
        file: FileId,
        at: &Place,
    ) -> FsResult<bool> {
        let Some(made) = state.order.last_change(location, file) else { return Ok(false) };
        let Some(op) = state.ops.get(&made) else { return Ok(false) };
        let is_its_name = matches!(&op.record.change, Change::Create { at: a, file: f, .. } if a == at && *f == file);
        if !is_its_name || !op.is_here_only() || state.order.is_needed(made) {
            return Ok(false);
        }
        self.drop_op(state, made)?;
        Ok(true)
    }

    /// Removes an empty directory.
    pub(crate) fn rmdir(&self, no: LocationNo, (dir, name): (FileId, &Name)) -> FsResult<()> {
        let location = self.writable(no)?;
        let mut state = self.state();
        let path = self.path_in(no, dir, name)?;
        let entry = self.present(no, dir, name)?;
        self.check_removable(no, &entry)?;
        let change = Change::Rmdir { file: entry.file_id, at: Place { dir, name: name.clone() } };
        self.accept_name(&mut state, (location, path), change, true)?;
        Ok(())
    }

    fn check_removable(&self, no: LocationNo, dir: &Entry) -> FsResult<()> {
        if dir.attr.file_type != FileType::Directory {
            return Err(FsError::new(Kind::NotADirectory, "remove a file as a directory"));
        }
        match self.view().is_empty(no, dir.file_id)? {
            true => Ok(()),
            false => Err(FsError::new(Kind::NotEmpty, "remove a directory")),
        }
    }

    /// Renames within a location.
    pub(crate) fn rename(
        &self,
        no: LocationNo,
        (from_dir, from): (FileId, &Name),
        (to_dir, to): (FileId, &Name),
        flags: MoveFlags,
    ) -> FsResult<()> {
        let location = self.writable(no)?;
        let mut state = self.state();
        let (from_dir, to_dir) = (self.now(no, from_dir), self.now(no, to_dir));
        self.path_in(no, from_dir, from)?;
        let path = self.path_in(no, to_dir, to)?;
        let moved = self.present(no, from_dir, from)?;
        let target = self.view().entry(no, to_dir, to.as_bytes())?;
        self.check_rename(no, (&moved, from_dir), (target.as_ref(), to_dir), flags)?;
        if target.as_ref().is_some_and(|t| t.file_id == moved.file_id) {
            // Two names of one file: nothing happens, says POSIX.
            return Ok(());
        }
        let replaced = target.map(|t| {
            let base = self.base_of(&state, no, location.id, &t);
            (t.file_id, base)
        });
        let gone = replaced.as_ref().map(|(file, _)| *file).filter(|_| !flags.exchange);
        let change = Change::Rename {
            file: moved.file_id,
            from: Place { dir: from_dir, name: from.clone() },
            to: Place { dir: to_dir, name: to.clone() },
            replaced,
            exchange: flags.exchange,
        };
        let is_directory = moved.attr.file_type == FileType::Directory;
        self.accept_name(&mut state, (location, path), change, is_directory)?;
        if let Some(gone) = gone {
            self.unnamed(no, gone)?;
            self.let_go_if_unused(&mut state, no, gone);
        }
        Ok(())
    }

    fn check_rename(
        &self,
        no: LocationNo,
        (moved, from_dir): (&Entry, FileId),
        (target, to_dir): (Option<&Entry>, FileId),
        flags: MoveFlags,
    ) -> FsResult<()> {
        let is_directory = |e: &Entry| e.attr.file_type == FileType::Directory;
        if is_directory(moved) {
            self.check_not_beneath(no, moved.file_id, to_dir)?;
        }
        let Some(target) = target else {
            return if flags.exchange { Err(not_found()) } else { Ok(()) };
        };
        if flags.no_replace {
            return Err(FsError::new(Kind::Exists, "rename to a name that is there"));
        }
        if target.file_id == moved.file_id {
            return Ok(());
        }
        if flags.exchange {
            return match is_directory(target) {
                true => self.check_not_beneath(no, target.file_id, from_dir),
                false => Ok(()),
            };
        }
        match (is_directory(moved), is_directory(target)) {
            (true, true) => self.check_removable(no, target),
            (true, false) => Err(FsError::new(Kind::NotADirectory, "rename a directory to a file")),
            (false, true) => Err(FsError::new(Kind::IsADirectory, "rename a file to a directory")),
            (false, false) => Ok(()),
        }
    }

    /// A directory cannot go into itself.
    fn check_not_beneath(&self, no: LocationNo, moved: FileId, mut dir: FileId) -> FsResult<()> {
        for _ in 0..=MAX_DEPTH {
            if dir == moved {
                return Err(FsError::new(Kind::Invalid, "move a directory into itself"));
            }
            if dir == FileId::ROOT {
                return Ok(());
            }
            dir = self.view().node(no, dir)?.ok_or_else(not_found)?.parent;
        }
        Err(FsError::new(Kind::Loop, "move into a directory this deep"))
    }

    /// The version of a regular file that this device sees.
    pub(super) fn base_of(
        &self,
        state: &State,
        no: LocationNo,
        location: crate::model::LocationId,
        entry: &Entry,
    ) -> Option<Base> {
        if entry.attr.file_type != FileType::File {
            return None;
        }
        state.base(location, entry.file_id).or_else(|| self.row_base(no, entry.file_id))
    }
}

fn check_target(target: &[u8]) -> FsResult<()> {
    match target.len() {
        0 => Err(FsError::new(Kind::NotFound, "link to nothing")),
        n if n > TARGET_MAX => Err(FsError::new(Kind::NameTooLong, "link to a path this long")),
        _ if target.contains(&0) => Err(FsError::new(Kind::Invalid, "link to a path with a NUL")),
        _ => Ok(()),
    }
}

/// The keys of a [`RandomState`] come from the system's randomness.
pub(super) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u128(std::time::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos()));
    hasher.finish()
}
