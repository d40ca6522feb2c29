//! Only the writer changes things: the drive, the owner's folder and the model are one.

use super::link::{Ending, Wire, deliver, replicate};
use super::model::{Answer, Body, How, Model, one};
use super::owner::Owner;
use super::steps::{At, SLOTS, Step, Where};
use super::tree::{self, Tree, What};
use super::writer::{WRITE, Writer, caller};
use super::{Checked, explore, holds, steps};
use crate::drive::{HandleId, OpenFlags, RenameFlags, SetAttr, TimeOrNow};
use crate::error::{FsResult, Kind};
use crate::model::Time;
use crate::outbox::Lane;
use std::sync::Arc;

/// Rounds after which everything that can be done is done.
const ROUNDS: usize = 40;

/// Both devices, and the connection.
pub(super) struct World {
    pub writer: Writer,
    pub owner: Owner,
    pub wire: Arc<Wire>,
    _dir: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        // What is synced there is synced at once; nothing here is about the power.
        let memory = std::path::Path::new("/dev/shm");
        let builder = tempfile::Builder::new();
        let dir = match memory.is_dir() {
            true => builder.tempdir_in(memory).unwrap(),
            false => builder.tempdir().unwrap(),
        };
        let wire = Arc::new(Wire::default());
        let owner = Owner::new(dir.path().join("owner"));
        let writer = Writer::new(dir.path().join("writer"), Arc::clone(&wire));
        wire.connect(&owner);
        while replicate(&writer, &owner, 1 << 20).unwrap() {}
        wire.heard(&owner);
        Self { writer, owner, wire, _dir: dir }
    }

    /// Whether the step was one of those between the two.
    pub fn between(&mut self, step: &Step) -> Result<bool, String> {
        let Self { writer, owner, wire, .. } = self;
        match step {
            Step::Deliver(lane, max_ops, ending) if wire.is_online() => {
                deliver(writer, owner, *lane, *max_ops, *ending)?;
            }
            Step::Rows(max_bytes) if wire.is_online() => {
                replicate(writer, owner, *max_bytes)?;
            }
            Step::Deliver(..) | Step::Rows(_) => {}
            Step::Tend => writer.tend(),
            Step::Cut => {
                wire.cut();
                writer.outbox().connection_lost(super::OWNER);
            }
            Step::Connect => wire.connect(owner),
            Step::RestartWriter => writer.restart(),
            Step::RestartOwner => {
                let was_online = wire.is_online();
                wire.cut();
                writer.outbox().connection_lost(super::OWNER);
                owner.stop();
                owner.open();
                if was_online {
                    wire.connect(owner);
                }
            }
            _ => return Ok(false),
        }
        wire.heard(owner);
        Ok(true)
    }

    /// Everything that can reach the other side does.
    pub fn settle(&mut self) -> Checked {
        self.wire.connect(&self.owner);
        let Self { writer, owner, wire, .. } = self;
        for _ in 0..ROUNDS {
            while deliver(writer, owner, Lane::Small, 100, Ending::Well)? > 0 {}
            while deliver(writer, owner, Lane::Bulk, 1, Ending::Well)? > 0 {}
            owner.observe();
            while replicate(writer, owner, 1 << 20)? {}
            wire.heard(owner);
            writer.tend();
            let is_even = wire.head_of_owner() == Some(writer.index.head(writer.no));
            if writer.outbox().is_quiet() && is_even {
                return Ok(());
            }
        }
        Err(format!("it never comes to rest: {:?}", writer.outbox().pending()))
    }

    fn lookup_dir(&self, at: &[&str]) -> FsResult<crate::drive::InodeNo> {
        self.writer.dir(&at[..at.len() - 1])
    }
}

/// An open handle, and its file in the model.
#[derive(Clone, Copy)]
struct Slot {
    handle: HandleId,
    no: u64,
}

struct Run {
    world: World,
    model: Model,
    slots: [Option<Slot>; SLOTS],
}

fn bytes_of(tag: u8, len: usize) -> Vec<u8> {
    vec![tag; len]
}

/// The drive answers as the model.
fn same<T>(what: &Step, expected: &Answer<T>, given: FsResult<()>) -> Checked {
    let said = given.as_ref().map_err(|e| e.kind());
    match (expected, said) {
        (Ok(_), Ok(())) => Ok(()),
        (Err(kinds), Err(kind)) if kinds.contains(&kind) => Ok(()),
        (expected, said) => Err(format!(
            "{what:?} gives {said:?}, expected {:?}",
            expected.as_ref().map(|_| ()).map_err(Clone::clone)
        )),
    }
}

impl Run {
    fn new() -> Self {
        Self { world: World::new(), model: Model::new(), slots: [None; SLOTS] }
    }

    fn step(&mut self, step: &Step) -> Checked {
        match step {
            Step::Quiet => return self.quiet(),
            Step::RestartWriter => self.restart_writer()?,
            _ if self.world.between(step)? => self.world.owner.hash(),
            _ => self.write(step)?,
        }
        self.look(false)
    }

    fn write(&mut self, step: &Step) -> Checked {
        let expected = match step {
            Step::Open(slot, at) => return self.open(*slot, at, step),
            Step::Put(slot, offset, tag, len) => return self.put(*slot, *offset, *tag, *len),
            Step::Fsync(slot) => return self.fsync(*slot),
            Step::Close(slot) => return self.close(*slot),
            _ => self.in_model(step),
        };
        same(step, &expected, self.in_drive(step))
    }

    fn in_model(&mut self, step: &Step) -> Answer<()> {
        let model = &mut self.model;
        match step {
            Step::Make(at, tag, len) => {
                model.make(at, Body::File(bytes_of(*tag, *len)), 0o644).map(drop)
            }
            Step::Write(at, whence, tag, len) => {
                let no = model.file(at)?;
                if *whence == Where::Anew {
                    model.bytes(no).clear();
                }
                let offset = match whence {
                    Where::Anew => 0,
                    Where::End => model.bytes(no).len(),
                    Where::Offset(offset) => *offset as usize,
                };
                model.write(no, offset, &bytes_of(*tag, *len));
                model.nodes.get_mut(&no).unwrap().is_dirty = false;
                Ok(())
            }
            Step::Resize(at, size) => {
                let no = model.file(at)?;
                model.bytes(no).resize(*size as usize, 0);
                model.write(no, 0, &[]);
                // A program that has it open will commit it.
                model.nodes.get_mut(&no).unwrap().is_dirty |=
                    self.slots.iter().flatten().any(|slot| slot.no == no);
                Ok(())
            }
            Step::Mkdir(at) => model.make_dir(at).map(drop),
            Step::Rmdir(at) => model.rmdir(at),
            Step::Unlink(at) => model.unlink(at),
            Step::Rename(from, to) => model.rename(from, to, How::Replace),
            Step::RenameNoReplace(from, to) => model.rename(from, to, How::NoReplace),
            Step::Exchange(from, to) => model.rename(from, to, How::Exchange),
            Step::Link(from, to) => model.link(from, to),
            Step::Symlink(at, target) => {
                model.make(at, Body::Link((*target).to_owned()), 0o777).map(drop)
            }
            Step::Chmod(at, perm) => {
                let no = model.find(at)?;
                let node = model.nodes.get_mut(&no).unwrap();
                if matches!(node.body, Body::Link(_)) {
                    return one(Kind::NotSupported);
                }
                node.perm = *perm;
                Ok(())
            }
            Step::Touch(at, secs) => {
                let no = model.find(at)?;
                let node = model.nodes.get_mut(&no).unwrap();
                node.mtime = Some(Time { secs: *secs, nanos: 5 });
                Ok(())
            }
            other => panic!("{other:?} is no change of files"),
        }
    }

    fn in_drive(&self, step: &Step) -> FsResult<()> {
        in_drive(&self.world, step).map(drop)
    }

    fn open(&mut self, slot: usize, at: &At, step: &Step) -> Checked {
        if self.slots[slot].is_some() {
            return Ok(());
        }
        let expected = self.model.file(at);
        let writer = &self.world.writer;
        let opened = writer.lookup(at).and_then(|found| writer.drive().open(found.ino, WRITE));
        if let (Ok(no), Ok(opened)) = (&expected, &opened) {
            self.slots[slot] = Some(Slot { handle: opened.handle, no: *no });
        }
        same(step, &expected, opened.map(drop))
    }

    fn put(&mut self, slot: usize, offset: u64, tag: u8, len: usize) -> Checked {
        let Some(Slot { handle, no }) = self.slots[slot] else { return Ok(()) };
        let bytes = bytes_of(tag, len);
        self.model.write(no, offset as usize, &bytes);
        self.model.nodes.get_mut(&no).unwrap().is_dirty = true;
        let writer = &self.world.writer;
        writer.drive().write(handle, offset, &bytes).map_err(|e| format!("write: {e}"))?;
        self.read_slot(slot)
    }

    /// An open file reads as what it is, whether or not it has a name.
    fn read_slot(&mut self, slot: usize) -> Checked {
        let Some(Slot { handle, no }) = self.slots[slot] else { return Ok(()) };
        let writer = &self.world.writer;
        match writer.read(handle) {
            Ok(read) if read == *self.model.bytes(no) => Ok(()),
            Ok(read) => Err(format!(
                "an open file reads as {} and is {}",
                tree::short(&read),
                tree::short(self.model.bytes(no))
            )),
            Err(e) if writer.may_lack(e.kind()) => Ok(()),
            Err(e) => Err(format!("an open file cannot be read: {e}")),
        }
    }

    fn fsync(&mut self, slot: usize) -> Checked {
        let Some(Slot { handle, no }) = self.slots[slot] else { return Ok(()) };
        self.model.nodes.get_mut(&no).unwrap().is_dirty = false;
        let drive = self.world.writer.drive();
        drive.fsync(handle, false).map_err(|e| format!("fsync: {e}"))
    }

    fn close(&mut self, slot: usize) -> Checked {
        let Some(Slot { handle, no }) = self.slots[slot].take() else { return Ok(()) };
        self.model.nodes.get_mut(&no).unwrap().is_dirty = false;
        let drive = self.world.writer.drive();
        let flushed = drive.flush(handle).map_err(|e| format!("close: {e}"));
        drive.release(handle);
        flushed
    }

    /// What no close or fsync returned for may be lost, and nothing else.
    fn restart_writer(&mut self) -> Checked {
        self.slots = [None; SLOTS];
        self.world.between(&Step::RestartWriter)?;
        let seen = self.world.writer.tree()?;
        for (path, no) in self.model.paths() {
            let node = self.model.nodes.get_mut(&no).unwrap();
            node.ino = None;
            if !std::mem::take(&mut node.is_dirty) {
                continue;
            }
            node.mtime = None;
            if let Some(What::File(Ok(bytes))) = seen.get(&path).map(|s| &s.what) {
                *self.model.bytes(no) = bytes.clone();
            }
        }
        Ok(())
    }

    /// The drive shows what the model has.
    fn look(&mut self, is_quiet: bool) -> Checked {
        let writer = &self.world.writer;
        let mut seen = writer.tree()?;
        let expected = self.model.learn(&seen);
        for (path, file) in &mut seen {
            let lacks = matches!(file.what, What::File(Err(why)) if writer.may_lack(why));
            if let (Some(expected), true) = (expected.get(path), lacks && !is_quiet) {
                file.what = expected.what.clone();
            }
        }
        told("the drive and the model", &seen, &expected)?;
        for (path, file) in seen.iter().filter(|(_, s)| matches!(s.what, What::File(_))) {
            if expected[path].ino != file.ino {
                return Err(format!(
                    "{path} has another inode number: {:x}, it was {:x}",
                    file.ino, expected[path].ino
                ));
            }
        }
        (0..SLOTS).try_for_each(|slot| self.read_slot(slot))
    }

    /// Everything arrives, and is the same everywhere.
    fn quiet(&mut self) -> Checked {
        (0..SLOTS).try_for_each(|slot| self.fsync(slot))?;
        self.look(false)?;
        self.world.settle()?;
        let conflicts = self.world.writer.outbox().conflicts();
        if !conflicts.is_empty() {
            return Err(format!("nothing met anything, but: {conflicts:?}"));
        }
        self.look(true)?;
        let expected = self.model.learn(&Tree::new());
        told("the owner's folder and the model", &self.world.owner.tree(), &expected)
    }
}

pub(super) fn told(what: &str, left: &Tree, right: &Tree) -> Checked {
    match &tree::differences(left, right)[..] {
        [] => Ok(()),
        different => Err(format!("{what} differ: {}", different.join("; "))),
    }
}

/// What a program does, through the drive.
pub(super) fn in_drive(world: &World, step: &Step) -> FsResult<()> {
    let writer = &world.writer;
    let drive = writer.drive();
    let last = |at: &At| at.last().unwrap().as_bytes();
    match step {
        Step::Make(at, tag, len) => {
            let dir = world.lookup_dir(at)?;
            let flags = OpenFlags { exclusive: true, ..WRITE };
            let opened = drive.create(&caller(), dir, last(at), 0o644, flags)?.1;
            write_and_close(world, opened.handle, 0, &bytes_of(*tag, *len))
        }
        Step::Write(at, whence, tag, len) => {
            let (truncate, append) = (*whence == Where::Anew, *whence == Where::End);
            let flags = OpenFlags { truncate, append, ..WRITE };
            let opened = drive.open(writer.lookup(at)?.ino, flags)?;
            let offset = if let Where::Offset(offset) = whence { *offset } else { 0 };
            write_and_close(world, opened.handle, offset, &bytes_of(*tag, *len))
        }
        Step::Resize(at, size) => {
            let set = SetAttr { size: Some(*size), ..SetAttr::default() };
            drive.setattr(&caller(), writer.lookup(at)?.ino, None, set).map(drop)
        }
        Step::Mkdir(at) => drive.mkdir(&caller(), world.lookup_dir(at)?, last(at), 0o755).map(drop),
        Step::Rmdir(at) => drive.rmdir(world.lookup_dir(at)?, last(at)),
        Step::Unlink(at) => drive.unlink(world.lookup_dir(at)?, last(at)),
        Step::Rename(from, to) => rename(world, from, to, RenameFlags::default()),
        Step::RenameNoReplace(from, to) => {
            rename(world, from, to, RenameFlags { no_replace: true, exchange: false })
        }
        Step::Exchange(from, to) => {
            rename(world, from, to, RenameFlags { no_replace: false, exchange: true })
        }
        Step::Link(from, to) => {
            let ino = writer.lookup(from)?.ino;
            drive.link(ino, world.lookup_dir(to)?, last(to)).map(drop)
        }
        Step::Symlink(at, target) => {
            let dir = world.lookup_dir(at)?;
            drive.symlink(&caller(), dir, last(at), target.as_bytes()).map(drop)
        }
        Step::Chmod(at, perm) => {
            let set = SetAttr { perm: Some(*perm), ..SetAttr::default() };
            drive.setattr(&caller(), writer.lookup(at)?.ino, None, set).map(drop)
        }
        Step::Touch(at, secs) => {
            let time = TimeOrNow::At(Time { secs: *secs, nanos: 5 });
            let set = SetAttr { mtime: Some(time), ..SetAttr::default() };
            drive.setattr(&caller(), writer.lookup(at)?.ino, None, set).map(drop)
        }
        other => panic!("{other:?} is no change of files"),
    }
}

fn rename(world: &World, from: &At, to: &At, flags: RenameFlags) -> FsResult<()> {
    let (from_dir, to_dir) = (world.lookup_dir(from)?, world.lookup_dir(to)?);
    let (name, new_name) = (from.last().unwrap(), to.last().unwrap());
    world.writer.drive().rename(from_dir, name.as_bytes(), to_dir, new_name.as_bytes(), flags)
}

fn write_and_close(world: &World, handle: HandleId, offset: u64, bytes: &[u8]) -> FsResult<()> {
    let drive = world.writer.drive();
    let written = match bytes {
        [] => Ok(0),
        bytes => drive.write(handle, offset, bytes),
    };
    let flushed = drive.flush(handle);
    drive.release(handle);
    written.and(flushed)
}

pub(super) fn run(history: &[Step]) -> Checked {
    let mut run = Run::new();
    for (n, step) in history.iter().chain([&Step::Quiet]).enumerate() {
        run.step(step).map_err(|why| format!("at step {n}, {step:?}: {why}"))?;
    }
    Ok(())
}

#[test]
fn the_drive_the_owners_folder_and_a_model_are_one() {
    explore("pure", 100, steps::pure, run);
}

#[test]
fn a_full_directory_renamed_to_itself_stays() {
    let history = [
        Step::Mkdir(vec!["d"]),
        Step::Make(vec!["d", "a"], b'1', 4),
        Step::Rename(vec!["d"], vec!["d"]),
    ];
    holds(run, &history);
}

/// The row of a directory comes again behind those of what was put into it: a replica that has
/// come half the way has neither.
#[test]
fn what_was_delivered_is_shown_from_here_until_all_rows_came() {
    let history = [
        Step::Mkdir(vec!["d"]),
        Step::Make(vec!["d", "c"], b'1', 3),
        Step::Deliver(Lane::Small, 100, Ending::Well),
        Step::Rows(1),
        Step::Tend,
        Step::RestartWriter,
    ];
    holds(run, &history);
}

#[test]
fn a_write_of_nothing_changes_no_time_and_the_same_size_does() {
    let history = [
        Step::Make(vec!["a"], b'1', 10),
        Step::Open(2, vec!["a"]),
        Step::Put(2, 0, b'2', 0),
        Step::Quiet,
        Step::Resize(vec!["a"], 10),
    ];
    holds(run, &history);
}

/// The second version was delivered, too, but the answer was lost: nobody but this device has
/// what it was written over.
#[test]
fn what_was_written_here_twice_is_read_here_after_a_restart() {
    let history = [
        Step::Make(vec!["a"], b'1', 16),
        Step::Deliver(Lane::Small, 1, Ending::Well),
        Step::Write(vec!["a"], Where::Offset(0), b'2', 5),
        Step::Deliver(Lane::Small, 1, Ending::Half(0)),
        Step::RestartWriter,
        Step::Rows(1 << 20),
    ];
    holds(run, &history);
}
