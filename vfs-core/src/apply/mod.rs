//! The owner's side of writing: operations of other devices, carried out on this device's disks.
//!
//! | module | what it is |
//! |---|---|
//! | `batch` | operations that came together: in order, made durable together |
//! | `conflict` | what becomes of an operation that meets a change: a pure function |
//! | `site`, `compare` | files by their id on the disk; whether they are the version meant |
//! | `create`, `write`, `rename`, `remove`, `attr` | the kinds of changes |
//! | `body`, `receive` | new bytes before anyone sees them; bytes on their way |
//! | `redo` | changes in place, done again after a crash |
//! | `ledger`, `recover` | what must survive a crash, and what is done about it at the start |
//! | `waiting` | operations that wait for an earlier one |
//! | `names` | names of conflict copies, and hidden ones |
//!
//! **The owner's files come first.** A change becomes visible at once and whole, or not at
//! all; it is carried out only on the version that its writer saw; whatever else it meets is
//! kept. Everything happens beneath the location's folder ([`crate::local::Root`]), with the
//! rights of the user that runs the daemon.
//!
//! **Each operation is applied once**, however often it is delivered: answers are remembered
//! in the ledger. Between doing and remembering lies a crash; what was done is then recognised
//! by what the disk has. In the user's folders nothing is left behind: new bytes have no name
//! until they are whole, and the names that exist for a moment are noted before, hidden from
//! the index, and removed at the next start.
//!
//! Durability, in this order: new bytes; the note of what will be done; the names; their
//! directories; the index; the answers. An answer is given when all of it is on the disk.
//!
//! Locks: `applying` is held over a batch, before any other; the indexer's order of a
//! directory while it is looked at or written in place; all others for a moment.

mod attr;
mod batch;
mod body;
mod compare;
mod conflict;
mod create;
mod ledger;
mod names;
mod receive;
mod recover;
mod redo;
mod remove;
mod rename;
mod site;
mod waiting;
mod write;

use crate::content::Manifests;
use crate::error::{FsError, FsResult};
use crate::index::Index;
use crate::indexer::Indexer;
use crate::model::{DeviceId, FileId, Name};
use crate::ops::{Base, Change, New, NewContent, Op, OpId, Outcome};
use batch::Batch;
use compare::{Known, Touched};
use conflict::Version;
use ledger::{Entry, Intent, Ledger, Named};
use receive::Receptions;
use recover::Recovery;
use site::{Fail, Site};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use waiting::Waiting;

pub use receive::{Need, Receiving};

/// Answers are dropped when so many more are noted.
const FORGET_EVERY: u64 = 1024;

/// Who asks, by id and by the name that a conflict copy carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Writer {
    /// Taken from the connection.
    pub id: DeviceId,
    /// As the library has it.
    pub name: String,
}

/// Why the state of applying could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The disk with the daemon's data failed.
    #[error(transparent)]
    Disk(#[from] FsError),
    /// It was written by a newer program.
    #[error("{0} was written by a newer version of this program")]
    NewerFormat(PathBuf),
}

/// Applies operations of other devices to this device's own locations. Calls block on the disk.
pub struct Applier {
    index: Index,
    indexer: Arc<Indexer>,
    manifests: Arc<Manifests>,
    ledger: Arc<Ledger>,
    receptions: Receptions,
    waiting: Waiting,
    /// For bytes that have no place beside the file they are for.
    spare: PathBuf,
    /// For bytes that are about to be written in place.
    redo_dir: PathBuf,
    touched: Touched,
    /// Up to where answers were dropped, in steps.
    forgotten: Mutex<HashMap<DeviceId, (u64, u64)>>,
    /// One batch at a time: two writers may mean the same file.
    applying: Mutex<()>,
    /// Of the batch under way: not in the ledger yet.
    aliases: Mutex<HashMap<Named, FileId>>,
    /// Changes in place that were begun and not ended.
    redos: Mutex<HashMap<OpId, Intent>>,
    /// Those that ended: their notes and bytes go with the batch's answers.
    redone: Mutex<Vec<(OpId, PathBuf)>>,
    /// Notes that belong to no operation, to be ended with the batch.
    leftovers: Mutex<Vec<OpId>>,
    recovery: Arc<Recovery>,
}

impl Applier {
    /// Opens the state in `dir`, and has what a crash cut off ended in each location as soon as
    /// it is found. To be called before the indexer is told to watch any location.
    pub fn open(
        dir: &Path,
        index: Index,
        indexer: Arc<Indexer>,
        manifests: Arc<Manifests>,
    ) -> Result<Arc<Self>, ApplyError> {
        let (spare, redo_dir) = (dir.join("spare"), dir.join("redo"));
        for dir in [dir, &spare, &redo_dir] {
            std::fs::create_dir_all(dir).map_err(|e| FsError::os("make a folder", e))?;
        }
        let ledger = Arc::new(Ledger::open(dir)?);
        let recovery = Recovery::open(index.clone(), Arc::clone(&ledger), redo_dir.clone())?;
        let recovery = Arc::new(recovery);
        // Held weakly: the indexer may outlive what this opens.
        let found = Arc::downgrade(&recovery);
        indexer.before_scan(move |no, root| {
            if let Some(recovery) = found.upgrade() {
                recovery.found(no, root);
            }
        });
        Ok(Arc::new(Self {
            index,
            indexer,
            manifests,
            ledger,
            receptions: Receptions::default(),
            waiting: Waiting::default(),
            spare,
            redo_dir,
            touched: Touched::default(),
            forgotten: Mutex::default(),
            applying: Mutex::default(),
            aliases: Mutex::default(),
            redos: Mutex::default(),
            redone: Mutex::default(),
            leftovers: Mutex::default(),
            recovery,
        }))
    }

    /// Whether the disk of what is remembered of others' operations failed, so that they wait.
    pub fn has_failed(&self) -> bool {
        self.ledger.has_failed()
    }

    /// What of an operation's bytes must travel; asked again after a reconnect, it goes on
    /// where it was. An operation that is refused anyway needs nothing.
    pub fn need(&self, writer: DeviceId, id: OpId, op: &Op) -> Need {
        let Some(content) = op.change.content().filter(|_| op.is_valid() && id.writer == writer)
        else {
            return Need::Nothing;
        };
        if content.inline.is_some() || content.written_bytes() == 0 {
            return Need::Nothing;
        }
        if let Some(receiving) = self.receptions.get(&id, content) {
            let missing = receiving.wanted().iter().map(|r| r.end - r.start).sum();
            return match receiving.body().has_room(missing) {
                true => Need::Bytes(receiving),
                false => Need::Nothing,
            };
        }
        // What fails here fails again when it is applied, and is answered then.
        match self.receive(writer, id, op, content) {
            Ok(Some(receiving)) => {
                self.receptions.insert(id, receiving.clone());
                Need::Bytes(receiving)
            }
            Ok(None) => Need::Nothing,
            Err(fail) => {
                tracing::debug!(?fail, "bytes of an operation are not received");
                Need::Nothing
            }
        }
    }

    fn receive(
        &self,
        writer: DeviceId,
        id: OpId,
        op: &Op,
        content: &NewContent,
    ) -> Result<Option<Receiving>, Fail> {
        if self.ledger.outcome(&id)?.is_some() {
            return Ok(None);
        }
        let writer = Writer { id: writer, name: String::new() };
        let site = Site::open(self, &writer, op.location)?;
        let dir = match &op.change {
            Change::Create { at, what: New::File(_), .. } => site.dir(at.dir)?,
            Change::Write { file, base, .. } => {
                let found = site.find(site.means(*file)?, None)?;
                let version = match (&found, base) {
                    (None, _) => Version::Gone,
                    // What an operation before it leaves is not known yet.
                    (Some(_), Base::After(_)) => Version::Base,
                    (Some(found), Base::Seen { stamp, content: id }) => {
                        let known = Known { stamp: *stamp, content: *id };
                        site.version(found, Some(&known), content)?
                    }
                };
                let whole = content.is_whole();
                let meeting = conflict::Meeting::Write { file: version, whole };
                use conflict::Decision::{Done, NeedsWhole};
                if matches!(conflict::decide(meeting), Done | NeedsWhole) {
                    return Ok(None);
                }
                found.map(|found| found.dir)
            }
            _ => return Ok(None),
        };
        if site.copy_of(content)?.is_some() {
            return Ok(None);
        }
        let body = site.body(dir.as_ref())?;
        let has_room = body.has_room(content.written_bytes());
        Ok(has_room.then(|| Receiving::new(content.clone(), body)))
    }

    /// Carries out operations in their order and remembers the outcomes; all is durable when it
    /// returns. One that was applied before is answered as then.
    pub fn apply(&self, writer: &Writer, ops: Vec<(OpId, Op, Option<Receiving>)>) -> Vec<Outcome> {
        let _applying = lock(&self.applying);
        Batch::new(self, writer, ops.len()).run(ops)
    }

    /// The writer has noted the outcomes of all its operations below `no`.
    pub fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64) {
        self.receptions.forget_below(writer, epoch, no);
        self.waiting.forget_below(writer, epoch, no);
        let at = (epoch, no / FORGET_EVERY);
        if lock(&self.forgotten).insert(writer, at) == Some(at) {
            return;
        }
        if let Err(e) = self.ledger.forget_below(writer, epoch, no) {
            tracing::warn!("answers that nobody needs any more stay: {e}");
        }
    }

    /// Notes a hidden name that belongs to no operation's own note.
    fn note_leftover(&self, intent: Intent) -> FsResult<()> {
        use std::hash::{BuildHasher, Hasher};
        let no = std::collections::hash_map::RandomState::new().build_hasher().finish();
        let id = OpId { writer: self.index.me(), epoch: 0, no };
        self.ledger.commit(Entry { begun: vec![(id, intent)], ..Entry::default() })?;
        lock(&self.leftovers).push(id);
        Ok(())
    }
}

impl Site<'_> {
    /// A file of this device that has all bytes of a change, where the index knows one that the
    /// writer may read.
    fn copy_of(&self, content: &NewContent) -> FsResult<Option<File>> {
        let Some(id) =
            content.whole.filter(|id| body::is_one_piece(content) && id.0 == content.digest)
        else {
            return Ok(None);
        };
        let view = self.applier.index.view()?;
        for (no, file) in view.holders(id)? {
            let Some(location) = self.applier.index.location(no) else { continue };
            let readable = location.is_shared_with(self.writer.id);
            if location.owner != self.applier.index.me() || !readable {
                continue;
            }
            let (Some(node), Some(path)) = (view.node(no, file)?, view.path(no, file)?) else {
                continue;
            };
            let opened = self.applier.indexer.root(no).and_then(|r| r.open_for_reading(&path));
            let Ok(opened) = opened else { continue };
            let is_indexed = crate::local::stamp_of(&opened)? == node.entry.stamp();
            if is_indexed && node.entry.content == Some(id) && node.entry.attr.size == content.size
            {
                return Ok(Some(opened));
            }
        }
        Ok(None)
    }
}

/// Locks although a thread panicked with the lock: each update of these states is whole in itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn mode(perm: u16) -> rustix::fs::Mode {
    rustix::fs::Mode::from_raw_mode(u32::from(perm) & 0o7777)
}

/// Renames with flags; not every file system has them.
fn rename_with(
    (from, name): (&OwnedFd, &Name),
    (to, new): (&OwnedFd, &Name),
    flags: rustix::fs::RenameFlags,
) -> rustix::io::Result<()> {
    if lacks("renameat2") {
        return Err(rustix::io::Errno::INVAL);
    }
    rustix::fs::renameat_with(from, name.as_bytes(), to, new.as_bytes(), flags)
}

/// Whether a test wants the disk to be one that lacks this.
#[cfg(not(test))]
fn lacks(_what: &'static str) -> bool {
    false
}

#[cfg(not(test))]
use crate::failpoint::fail_point;
#[cfg(test)]
use tests::{fail_point, lacks};

#[cfg(test)]
mod tests;
