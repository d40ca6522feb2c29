//! Programs of the owner change things, too: whatever meets, no bytes are lost, and in the end
//! both devices show the same.
//!
//! A version is what a file was when a close or fsync returned, or when a program of the owner had
//! written it. It may go only when somebody wrote over it, or deleted it, who had seen it.

use super::pure::{World, in_drive, told};
use super::steps::{At, SLOTS, Step, Theirs, Where};
use super::tree::{self, Tree, What};
use super::writer::WRITE;
use super::{Checked, explore, holds, steps};
use crate::drive::{HandleId, InodeNo};
use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

type Bytes = Vec<u8>;

/// Conflicts in all histories: without any they would show nothing.
static MET: AtomicUsize = AtomicUsize::new(0);

/// All versions.
#[derive(Default)]
struct Versions {
    all: Vec<(Bytes, String)>,
    /// Those that somebody saw who replaced or deleted them.
    seen: BTreeSet<Bytes>,
}

impl Versions {
    fn made(&mut self, bytes: Bytes, by: &impl std::fmt::Debug) {
        self.all.push((bytes, format!("{by:?}")));
    }

    fn saw(&mut self, bytes: impl IntoIterator<Item = Bytes>) {
        self.seen.extend(bytes);
    }

    /// Those that are nowhere.
    fn lost(&self, there: &Tree) -> Vec<String> {
        let is_there = |bytes: &Bytes| {
            there.values().any(|s| matches!(&s.what, What::File(Ok(b)) if b == bytes))
        };
        let is_lost =
            |bytes: &Bytes| !bytes.is_empty() && !self.seen.contains(bytes) && !is_there(bytes);
        let lost = self.all.iter().filter(|(bytes, _)| is_lost(bytes));
        lost.map(|(bytes, by)| format!("{} of {by}", tree::short(bytes))).collect()
    }
}

struct Run {
    world: World,
    versions: Versions,
    slots: [Option<(HandleId, InodeNo)>; SLOTS],
}

impl Run {
    fn new() -> Self {
        Self { world: World::new(), versions: Versions::default(), slots: [None; SLOTS] }
    }

    fn step(&mut self, step: &Step) -> Checked {
        match step {
            Step::Quiet => self.quiet(),
            Step::Theirs(theirs) => self.theirs(theirs),
            Step::RestartWriter => {
                self.slots = [None; SLOTS];
                self.world.between(step).map(drop)
            }
            _ if self.world.between(step)? => Ok(()),
            _ => self.write(step),
        }
    }

    fn folder(&self, at: &At) -> PathBuf {
        at.iter().fold(self.world.owner.folder.clone(), |dir, name| dir.join(name))
    }

    /// The bytes that the writer's programs see at a path.
    fn seen(&self, at: &At) -> Option<Bytes> {
        let writer = &self.world.writer;
        writer.read_file(writer.lookup(at).ok()?.ino).ok()
    }

    fn write(&mut self, step: &Step) -> Checked {
        match step {
            Step::Make(at, tag, len) => {
                if in_drive(&self.world, step).is_ok() {
                    self.is_shown(at, &vec![*tag; *len])?;
                    self.versions.made(vec![*tag; *len], step);
                }
                Ok(())
            }
            Step::Write(at, whence, tag, len) => self.write_at(step, at, *whence, *tag, *len),
            Step::Resize(at, size) => {
                let Some(before) = self.seen(at) else { return Ok(()) };
                let mut after = before.clone();
                after.resize(*size as usize, 0);
                self.replaced(step, at, before, after)
            }
            Step::Unlink(at) | Step::Rename(_, at) => {
                let before = self.seen(at);
                let is_itself = matches!(step, Step::Rename(from, to)
                    if self.ino(from).is_some() && self.ino(from) == self.ino(to));
                if in_drive(&self.world, step).is_ok() && !is_itself {
                    self.versions.saw(before);
                }
                Ok(())
            }
            Step::Open(slot, at) => {
                let writer = &self.world.writer;
                if self.slots[*slot].is_none()
                    && let Ok(found) = writer.lookup(at)
                {
                    let opened = writer.drive().open(found.ino, WRITE);
                    self.slots[*slot] = opened.ok().map(|opened| (opened.handle, found.ino));
                }
                Ok(())
            }
            Step::Put(slot, offset, tag, len) => {
                self.put(step, *slot, *offset as usize, *tag, *len)
            }
            Step::Fsync(slot) => self.fsync(*slot, step),
            Step::Close(slot) => {
                self.fsync(*slot, step)?;
                if let Some((handle, _)) = self.slots[*slot].take() {
                    let drive = self.world.writer.drive();
                    drive.flush(handle).map_err(|e| e.to_string())?;
                    drive.release(handle);
                }
                Ok(())
            }
            // Whether it can be done depends on what has come from the owner.
            _ => in_drive(&self.world, step).map(drop).or(Ok(())),
        }
    }

    fn ino(&self, at: &At) -> Option<u64> {
        Some(self.world.writer.lookup(at).ok()?.ino.0)
    }

    fn write_at(&mut self, step: &Step, at: &At, whence: Where, tag: u8, len: usize) -> Checked {
        let Some(before) = self.seen(at) else { return Ok(()) };
        let mut after = before.clone();
        let offset = match whence {
            Where::Anew => {
                after.clear();
                0
            }
            Where::End => before.len(),
            Where::Offset(offset) => offset as usize,
        };
        if len > 0 {
            after.resize(after.len().max(offset + len), 0);
            after[offset..offset + len].fill(tag);
        }
        self.replaced(step, at, before, after)
    }

    /// A program saw these bytes and makes those of them.
    fn replaced(&mut self, step: &Step, at: &At, before: Bytes, after: Bytes) -> Checked {
        in_drive(&self.world, step).map_err(|e| format!("it cannot be written: {e}"))?;
        self.is_shown(at, &after)?;
        self.versions.saw([before].into_iter().filter(|before| *before != after));
        self.versions.made(after, step);
        Ok(())
    }

    fn is_shown(&self, at: &At, bytes: &Bytes) -> Checked {
        match self.seen(at) {
            Some(seen) if seen == *bytes => Ok(()),
            other => Err(format!(
                "it was written as {} and reads as {:?}",
                tree::short(bytes),
                other.as_deref().map(tree::short)
            )),
        }
    }

    fn put(&mut self, step: &Step, slot: usize, offset: usize, tag: u8, len: usize) -> Checked {
        let Some((handle, _)) = self.slots[slot].filter(|_| len > 0) else { return Ok(()) };
        let writer = &self.world.writer;
        let Ok(before) = writer.read(handle) else { return Ok(()) };
        let written = writer.drive().write(handle, offset as u64, &vec![tag; len]);
        written.map_err(|e| format!("write: {e}"))?;
        let mut after = before.clone();
        after.resize(after.len().max(offset + len), 0);
        after[offset..offset + len].fill(tag);
        let read = writer.read(handle).map_err(|e| format!("read what was written: {e}"))?;
        if read != after {
            let (read, after) = (tree::short(&read), tree::short(&after));
            return Err(format!("{step:?}: it reads as {read} and is {after}"));
        }
        self.versions.saw([before]);
        Ok(())
    }

    fn fsync(&mut self, slot: usize, step: &Step) -> Checked {
        let Some((handle, ino)) = &self.slots[slot] else { return Ok(()) };
        let writer = &self.world.writer;
        let read = writer.read(*handle);
        writer.drive().fsync(*handle, false).map_err(|e| format!("fsync: {e}"))?;
        // What was deleted while it was open goes with its last handle.
        if let (Ok(read), true) = (read, self.has_name(*ino, *handle)) {
            self.versions.made(read, step);
        }
        Ok(())
    }

    /// Whether some path leads to what is open.
    fn has_name(&self, ino: InodeNo, handle: HandleId) -> bool {
        let open = self.world.writer.drive().getattr(ino, Some(handle));
        open.is_ok_and(|found| found.attr.nlink > 0)
    }

    fn theirs(&mut self, theirs: &Theirs) -> Checked {
        // What cannot be done is not done, as with any program.
        let _ = self.try_theirs(theirs);
        Ok(())
    }

    fn try_theirs(&mut self, theirs: &Theirs) -> std::io::Result<()> {
        match theirs {
            Theirs::Save(at, tag, len) => {
                let path = self.folder(at);
                let other = path.with_file_name("saving");
                if path.is_dir() {
                    return Ok(());
                }
                let before = std::fs::read(&path).ok();
                std::fs::write(&other, vec![*tag; *len])?;
                std::fs::rename(&other, &path)?;
                self.versions.saw(before);
                self.versions.made(vec![*tag; *len], theirs);
            }
            Theirs::Write(at, tag, len) => {
                let path = self.folder(at);
                let before = std::fs::read(&path).ok();
                std::fs::write(&path, vec![*tag; *len])?;
                self.versions.saw(before);
                self.versions.made(vec![*tag; *len], theirs);
            }
            Theirs::Append(at, tag, len) => {
                let path = self.folder(at);
                let before = std::fs::read(&path)?;
                let mut file = std::fs::File::options().append(true).open(&path)?;
                file.write_all(&vec![*tag; *len])?;
                let after = [before.clone(), vec![*tag; *len]].concat();
                self.versions.saw([before].into_iter().filter(|before| *before != after));
                self.versions.made(after, theirs);
            }
            Theirs::Unlink(at) => {
                let before = std::fs::read(self.folder(at)).ok();
                std::fs::remove_file(self.folder(at))?;
                self.versions.saw(before);
            }
            Theirs::Rename(from, to) => {
                let (from, to) = (self.folder(from), self.folder(to));
                let before = std::fs::read(&to).ok();
                std::fs::rename(from, to)?;
                self.versions.saw(before);
            }
            Theirs::Mkdir(at) => std::fs::create_dir(self.folder(at))?,
            Theirs::RemoveAll(at) => {
                let there = tree::of_disk_below(&self.folder(at))?;
                std::fs::remove_dir_all(self.folder(at))?;
                self.versions.saw(there.into_values().filter_map(|s| match s.what {
                    What::File(Ok(bytes)) => Some(bytes),
                    _ => None,
                }));
            }
            Theirs::Chmod(at, perm) => {
                let mode = std::fs::Permissions::from_mode(u32::from(*perm));
                std::fs::set_permissions(self.folder(at), mode)?;
            }
            Theirs::Observed => self.world.owner.observe(),
        }
        Ok(())
    }

    fn quiet(&mut self) -> Checked {
        (0..SLOTS).try_for_each(|slot| self.write(&Step::Fsync(slot)))?;
        self.world.settle()?;
        let there = self.world.owner.tree();
        let hidden: Vec<_> = there.keys().filter(|path| path.contains(".spacedrive-")).collect();
        if !hidden.is_empty() {
            return Err(format!("names of ours are left: {hidden:?}"));
        }
        let lost = self.versions.lost(&there);
        if !lost.is_empty() {
            return Err(format!("lost: {}; there is {there:?}", lost.join("; ")));
        }
        MET.fetch_add(self.world.writer.outbox().conflicts().len(), Ordering::Relaxed);
        told("the drive and the owner's folder", &self.world.writer.tree()?, &there)
    }
}

fn run(history: &[Step]) -> Checked {
    let mut run = Run::new();
    for (n, step) in history.iter().chain([&Step::Quiet]).enumerate() {
        run.step(step).map_err(|why| format!("at step {n}, {step:?}: {why}"))?;
    }
    Ok(())
}

#[test]
fn no_bytes_are_lost_whatever_meets() {
    explore("meeting", 40, steps::meeting, run);
    let met = MET.load(Ordering::Relaxed);
    assert!(met > 0 || std::env::var_os("SD_TEST_SEED").is_some(), "nothing ever met");
    println!("{met} conflicts");
}

#[test]
fn a_conflict_that_was_seen_is_not_shown_again_after_a_restart() {
    let history = [
        Step::Make(vec!["b"], b'A', 9),
        Step::Quiet,
        Step::Write(vec!["b"], Where::Anew, b'8', 7),
        Step::Theirs(Theirs::Save(vec!["b"], b'9', 70_000)),
        Step::Quiet,
        Step::RestartWriter,
    ];
    holds(run, &history);
}
