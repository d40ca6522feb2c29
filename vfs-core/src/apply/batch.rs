//! Operations that came together: carried out in their order, made durable together.
//!
//! New bytes cost a wait for the disk. So the files of operations that do not depend on each
//! other are prepared first, written back together, and only then get their names; everything
//! else is carried out as it comes. What is about to be done and could be left half done by a
//! crash is noted in the ledger first, what was done is looked at by the indexer at once, and
//! the answers are noted at the end, after every directory is durable.
//!
//! An operation that was done and not answered is delivered again after a crash, and recognised
//! by what the disk has. That works only as long as nothing was done over it: so the answers
//! before an operation on the same file or name are noted first ([`Batch::settle_before`]).

use super::body::{Body, Verified, copy_data};
use super::compare::{Known, Meant};
use super::create::{Making, SET_ID};
use super::ledger::{Entry, Intent, Step};
use super::names::hidden_name;
use super::receive::Receiving;
use super::site::{Dir, Fail, Site};
use super::write::Writing;
use super::{Applier, Writer, lock};
use crate::error::{FsError, FsResult};
use crate::indexer::Look;
use crate::model::{ContentId, FileId, LocationId, LocationNo, Name, Stamp, Time};
use crate::ops::{
    Applied, Base, Change, Conflict, New, NewContent, Obstacle, Op, OpId, Outcome, Place, Refusal,
};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Operations that are prepared together; each holds a file open.
const MAX_PENDING: usize = 128;

/// Prepared bytes: all that the extents hold, verified.
pub(super) struct Ready {
    source: Source,
    verified: Arc<Verified>,
}

enum Source {
    Own(Body),
    Received(Receiving),
}

impl Ready {
    pub fn own(body: Body, verified: Verified) -> Self {
        Self { source: Source::Own(body), verified: Arc::new(verified) }
    }

    pub fn received(receiving: Receiving, verified: Arc<Verified>) -> Self {
        Self { source: Source::Received(receiving), verified }
    }

    pub fn body(&self) -> &Body {
        match &self.source {
            Source::Own(body) => body,
            Source::Received(receiving) => receiving.body(),
        }
    }

    pub fn content(&self) -> Option<ContentId> {
        match &*self.verified {
            Verified::Whole(id, _) => Some(*id),
            _ => None,
        }
    }

    /// The attributes of a new file.
    pub fn dress(&self, perm: u16, mtime: Time) -> FsResult<()> {
        let file = &self.body().file;
        rustix::fs::fchmod(file, super::mode(perm & !SET_ID))
            .map_err(|e| FsError::os("set permissions", e))?;
        super::body::set_times(file.as_fd(), None, Some(mtime))
            .map_err(|e| FsError::os("set the time", e))
    }

    /// Bytes and attributes, to another file.
    pub fn copy_to(&self, to: &std::fs::File) -> FsResult<()> {
        let from = &self.body().file;
        let seen = from.metadata().map_err(|e| FsError::os("stat new bytes", e))?;
        copy_data(from, to, 0..seen.len())?;
        to.set_len(seen.len()).map_err(|e| FsError::os("set the size", e))?;
        super::attr::copy_attributes(from, to)
    }
}

/// What was done, and where the indexer is to look.
#[derive(Default)]
pub(super) struct Done {
    pub file: Option<FileId>,
    pub version: Option<Stamp>,
    pub conflict: Option<Conflict>,
    /// It was found, not made.
    pub was_there: bool,
    pub looks: Vec<Look>,
    /// The look whose row is the file's.
    pub main: Option<usize>,
    /// Directories that are to be durable.
    pub dirs: Vec<(FileId, std::io::Result<OwnedFd>)>,
    /// Inodes whose ids were decided here, until they have rows.
    pub expected: Vec<(LocationNo, u64)>,
    /// Names that are gone again.
    pub hidden: Vec<Name>,
}

/// Why an operation was not carried out whose file ids are of a log that was lost.
const LISTED_ANEW: &str =
    "its device had to list its files anew and cannot tell which one is meant";

/// Whether nothing but the id says which file is meant: no name that it has, no version.
fn says_file_by_id_alone(change: &Change) -> bool {
    matches!(change, Change::SetAttr { .. } | Change::Xattr { .. } | Change::Link { .. })
}

impl Done {
    /// Nothing was changed.
    pub fn nothing(file: Option<FileId>) -> Self {
        Self { file, ..Self::default() }
    }

    /// The owner's change stands.
    pub fn stands(file: FileId, why: &str) -> Self {
        Self::nothing(Some(file)).met(Some(Conflict::OwnerStands(why.to_owned())))
    }

    /// The file is at this place now.
    pub fn at(dir: &Dir, name: Name) -> Self {
        let look = Look { dir: dir.id, name, content: None };
        Self { looks: vec![look], main: Some(0), ..Self::default() }.syncing(dir)
    }

    /// The file is at this place now, with these bytes.
    pub fn of(dir: &Dir, name: Name, stamp: Stamp, ready: &Ready) -> Self {
        let mut done = Self { version: Some(stamp), ..Self::at(dir, name) };
        done.looks[0].content = ready.content().map(|id| (stamp, id));
        done
    }

    /// One more name that changed.
    pub fn and(mut self, dir: &Dir, name: Name) -> Self {
        self.looks.push(Look { dir: dir.id, name, content: None });
        self.syncing(dir)
    }

    fn syncing(mut self, dir: &Dir) -> Self {
        self.dirs.push((dir.id, dir.fd.try_clone()));
        self
    }

    pub fn met(mut self, conflict: Option<Conflict>) -> Self {
        self.conflict = conflict.or(self.conflict);
        self
    }

    pub fn expecting(mut self, no: LocationNo, disk_ino: u64) -> Self {
        self.expected.push((no, disk_ino));
        self
    }

    pub fn revealing(mut self, hidden: Name) -> Self {
        self.hidden.push(hidden);
        self
    }
}

/// An operation with its place in the batch.
struct Item {
    slot: usize,
    id: OpId,
    op: Op,
}

/// An operation whose bytes are prepared.
struct Pending<'a> {
    item: Item,
    site: Rc<Site<'a>>,
    work: Prepared,
}

/// What is prepared.
enum Prepared {
    Create(Ready),
    Write(Box<Writing>),
}

impl Prepared {
    fn ready(&self) -> &Ready {
        match self {
            Self::Create(ready) => ready,
            Self::Write(writing) => &writing.ready,
        }
    }
}

/// What two operations must not both be about, to be prepared together.
#[derive(PartialEq, Eq, Hash)]
enum Touch {
    Name(LocationId, Place),
    File(LocationId, FileId),
}

/// Operations of one writer under way.
pub(super) struct Batch<'a> {
    applier: &'a Applier,
    writer: &'a Writer,
    sites: HashMap<LocationId, Rc<Site<'a>>>,
    outcomes: Vec<Option<Outcome>>,
    pending: Vec<Pending<'a>>,
    /// Removals that were carried out, and are looked at together.
    unobserved: Vec<(Item, Rc<Site<'a>>, Done)>,
    touched: HashSet<Touch>,
    /// What operations were about whose answers are not noted yet.
    unsettled: HashSet<Touch>,
    /// Names under which what is removed is looked at once more.
    asides: HashMap<OpId, Name>,
    /// Answers of this batch, which later operations of it may refer to.
    applied: HashMap<u64, Applied>,
    /// Where in `outcomes` they are.
    new: Vec<usize>,
    dirs: HashMap<(LocationNo, FileId), OwnedFd>,
    /// Why a directory cannot be made durable.
    unsynced: Option<FsError>,
    /// Names that were hidden for this batch.
    hidden: Vec<(LocationNo, Name)>,
    entry: Entry,
    /// Notes of removals, which end with the batch: some are carried out only then.
    removals: Vec<OpId>,
}

impl<'a> Batch<'a> {
    pub fn new(applier: &'a Applier, writer: &'a Writer, len: usize) -> Self {
        Self {
            applier,
            writer,
            sites: HashMap::new(),
            outcomes: vec![None; len],
            pending: Vec::new(),
            unobserved: Vec::new(),
            touched: HashSet::new(),
            unsettled: HashSet::new(),
            asides: HashMap::new(),
            applied: HashMap::new(),
            new: Vec::new(),
            dirs: HashMap::new(),
            unsynced: None,
            hidden: Vec::new(),
            entry: Entry::default(),
            removals: Vec::new(),
        }
    }

    pub fn run(mut self, ops: Vec<(OpId, Op, Option<Receiving>)>) -> Vec<Outcome> {
        if let Err(e) = self.note_removals(&ops) {
            return vec![Fail::from(e).into_outcome(); ops.len()];
        }
        for (slot, (id, op, receiving)) in ops.into_iter().enumerate() {
            let item = Item { slot, id, op };
            let (id, op) = (item.id, item.op.clone());
            if let Err(fail) = self.add(item, receiving) {
                self.fail(slot, &id, &op, fail);
            }
        }
        self.flush();
        self.entry.ended.append(&mut self.removals);
        self.end()
    }

    /// Notes the answers of this batch when one of them is about what this operation changes.
    fn settle_before(&mut self, site: &Site<'a>, op: &Op) -> Result<(), Fail> {
        let concerns = site.concerns(op)?;
        // Attributes over new bytes or a new file hide neither.
        let hides = !matches!(op.change, Change::SetAttr { .. } | Change::Xattr { .. });
        if hides && concerns.iter().any(|concern| self.unsettled.contains(concern)) {
            self.flush();
            let durable = self.make_durable();
            self.unsettled.clear();
            if let Err(e) = durable {
                self.answer_later(&e);
                return Err(e.into());
            }
        }
        self.unsettled.extend(concerns);
        Ok(())
    }

    /// Done, but not surely for ever: asked again, it is recognised.
    fn answer_later(&mut self, why: &FsError) {
        for slot in std::mem::take(&mut self.new) {
            let e = FsError::new(why.kind(), why.to_string());
            self.outcomes[slot] = Some(Fail::from(e).into_later());
        }
    }

    /// One commit for all of them, before the first.
    fn note_removals(&mut self, ops: &[(OpId, Op, Option<Receiving>)]) -> FsResult<()> {
        let mut begun = Vec::new();
        for (id, op, _) in ops {
            let Change::Unlink { at, base: Some(_), .. } = &op.change else { continue };
            let Ok(site) = self.site(op.location) else { continue };
            let hidden = hidden_name();
            self.asides.insert(*id, hidden.clone());
            let step = Step::Remove { hidden };
            begun.push((*id, site.intent(at, step)?));
        }
        for (_, intent) in &begun {
            self.hide(intent);
        }
        self.removals.extend(begun.iter().map(|(id, _)| *id));
        self.applier.ledger.commit(Entry { begun, ..Entry::default() })
    }

    fn hide(&mut self, intent: &Intent) {
        super::recover::hide(&self.applier.index, intent);
        let location = self.applier.index.location_by_id(intent.location);
        let hidden = intent.step.hidden().cloned();
        self.hidden.extend(location.map(|l| l.no).zip(hidden));
    }

    fn site(&mut self, location: LocationId) -> Result<Rc<Site<'a>>, Fail> {
        if let Some(site) = self.sites.get(&location) {
            return Ok(site.clone());
        }
        let site = Rc::new(Site::open(self.applier, self.writer, location)?);
        self.sites.insert(location, site.clone());
        Ok(site)
    }

    fn add(&mut self, item: Item, receiving: Option<Receiving>) -> Result<(), Fail> {
        let Item { slot, id, op } = &item;
        if !op.is_valid() || op.no != id.no || id.writer != self.writer.id {
            return Err(Fail::Refused(Refusal::Malformed));
        }
        if let Some(applied) = self.applier.ledger.outcome(id)? {
            self.outcomes[*slot] = Some(Outcome::Applied(applied));
            return Ok(());
        }
        self.applier.waiting.done(id);
        let site = self.site(op.location)?;
        self.applier.finish_redo(&site, id)?;
        self.settle_before(&site, op)?;
        let touches = site.touches(op)?;
        let is_alone = touches.is_none();
        let touches = touches.unwrap_or_default();
        let is_full = self.pending.len() >= MAX_PENDING;
        if is_alone || is_full || touches.iter().any(|touch| self.touched.contains(touch)) {
            self.flush();
        }
        if let Some(outcome) = self.applier.waiting.outcome(id, op) {
            self.applier.waiting.note(id, op, &outcome);
            self.outcomes[*slot] = Some(outcome);
            return Ok(());
        }
        let Some(work) = self.prepare(&site, &item, receiving)? else {
            let done = self.carry_out(&site, &item)?;
            match item.op.change {
                Change::Unlink { .. } => {
                    self.touched.extend(touches);
                    self.unobserved.push((item, site, done));
                }
                _ => self.observe(vec![(item, site, done)]),
            }
            return Ok(());
        };
        self.touched.extend(touches);
        self.pending.push(Pending { item, site, work });
        Ok(())
    }

    /// The bytes of an operation that has some; `None`: it has none, or needs none any more.
    fn prepare(
        &mut self,
        site: &Site<'a>,
        item: &Item,
        receiving: Option<Receiving>,
    ) -> Result<Option<Prepared>, Fail> {
        match &item.op.change {
            Change::Create { at, what: New::File(content), perm, mtime: _, .. } => {
                let dir = site.dir(at.dir)?;
                let dir = match dir {
                    Some(dir) => dir,
                    None => site.top()?,
                };
                let ready = site.ready(item.id, content, Some(&dir), receiving)?;
                ready.body().complete(content, None)?;
                ready.dress(*perm, content.mtime)?;
                ready.body().start_writing();
                Ok(Some(Prepared::Create(ready)))
            }
            Change::Write { file, base, content, path } => {
                let (file, base) = self.base(site, item.id, *file, base)?;
                let writing = site.prepare_write(item.id, file, base, content, path, receiving)?;
                Ok(writing.map(|w| Prepared::Write(Box::new(w))))
            }
            _ => Ok(None),
        }
    }

    /// The file and version that a change is based on.
    fn base(
        &self,
        site: &Site<'a>,
        id: OpId,
        file: FileId,
        base: &Base,
    ) -> FsResult<(FileId, Option<Known>)> {
        let no = match base {
            Base::Seen { stamp, content } => {
                let known = Known { stamp: *stamp, content: *content };
                return Ok((site.means(file)?, Some(known)));
            }
            Base::After(no) => *no,
        };
        let applied = match self.applied.get(&no) {
            Some(applied) => Some(applied.clone()),
            None => self.applier.ledger.outcome(&OpId { no, ..id })?,
        };
        let applied_file = applied.as_ref().and_then(|a| a.file);
        let known = applied.and_then(|a| a.version).map(|stamp| Known { stamp, content: None });
        Ok((applied_file.map_or_else(|| site.means(file), Ok)?, known))
    }

    /// The file and version that are to go.
    fn meant(
        &self,
        site: &Site<'a>,
        id: OpId,
        named: FileId,
        base: Option<&Base>,
    ) -> FsResult<(FileId, Meant)> {
        let Some(base) = base else { return Ok((site.means(named)?, Meant::Any)) };
        let (file, known) = self.base(site, id, named, base)?;
        Ok((file, known.map_or(Meant::Unknown, Meant::Version)))
    }

    fn carry_out(&mut self, site: &Site<'a>, item: &Item) -> Result<Done, Fail> {
        let file = |named: FileId| site.means(named);
        if says_file_by_id_alone(&item.op.change)
            && item.op.log_id != self.applier.index.log_id(site.no())
        {
            return Ok(Done::stands(item.op.change.file(), LISTED_ANEW));
        }
        match &item.op.change {
            Change::Create { at, file, what, perm, mtime } => {
                let new = Making { file: Some(*file), what, perm: *perm, mtime: *mtime };
                site.create(at, &new, None)
            }
            Change::Write { file, base, content, .. } => {
                let (file, base) = self.base(site, item.id, *file, base)?;
                site.is_written(file, base, content)
            }
            Change::Link { file: named, at } => site.link(file(*named)?, at),
            Change::Rename { file: named, from, to, replaced, exchange: false } => {
                let replaced = match replaced {
                    None => None,
                    Some((named, base)) => {
                        Some(self.meant(site, item.id, *named, base.as_ref())?)
                    }
                };
                site.rename(file(*named)?, from, to, replaced)
            }
            Change::Rename { file: named, from, to, replaced, exchange: true } => {
                let other = replaced.as_ref().ok_or(Fail::Refused(Refusal::Malformed))?.0;
                site.exchange(file(*named)?, file(other)?, from, to)
            }
            Change::Unlink { file: named, at, base } => {
                let (file, meant) = self.meant(site, item.id, *named, base.as_ref())?;
                site.unlink(file, at, meant, self.asides.get(&item.id))
            }
            Change::Rmdir { file: named, at } => site.rmdir(file(*named)?, at),
            Change::SetAttr { file: named, base, perm, uid, gid, atime, mtime } => {
                let (file, meant) = self.meant(site, item.id, *named, base.as_ref())?;
                let set = super::attr::Set {
                    perm: *perm,
                    uid: *uid,
                    gid: *gid,
                    atime: *atime,
                    mtime: *mtime,
                };
                site.set_attr(file, &set, &meant)
            }
            Change::Xattr { file: named, name, value } => {
                site.set_xattr(file(*named)?, name, value.as_deref())
            }
        }
    }

    /// Everything prepared gets its name.
    fn flush(&mut self) {
        self.touched.clear();
        let pending = std::mem::take(&mut self.pending);
        let mut done = std::mem::take(&mut self.unobserved);
        if pending.is_empty() {
            return self.observe(done);
        }
        let synced: Vec<_> = pending.iter().map(|p| p.work.ready().body().sync()).collect();
        let noted = self.note_swaps(&pending);
        for (Pending { item, site, work }, synced) in pending.into_iter().zip(synced) {
            let noted = noted.as_ref().map_err(|e| FsError::new(e.kind(), e.to_string()));
            if work.ready().body().is_spent() {
                self.applier.receptions.remove(&item.id);
            }
            let finished = synced
                .and(noted.map(|_| ()))
                .map_err(Fail::from)
                .and_then(|()| self.finish(&site, &item, work));
            match finished {
                Ok(work) => done.push((item, site, work)),
                Err(fail) => self.fail(item.slot, &item.id, &item.op, fail),
            }
        }
        self.observe(done);
    }

    fn note_swaps(&mut self, pending: &[Pending<'a>]) -> FsResult<()> {
        let mut begun = Vec::new();
        for Pending { item, site, work } in pending {
            let Prepared::Write(writing) = work else { continue };
            if let Some(intent) = site.write_intent(writing)? {
                self.hide(&intent);
                begun.push((item.id, intent));
            }
        }
        self.entry.ended.extend(begun.iter().map(|(id, _)| *id));
        self.applier.ledger.commit(Entry { begun, ..Entry::default() })
    }

    fn finish(&mut self, site: &Site<'a>, item: &Item, work: Prepared) -> Result<Done, Fail> {
        self.store_manifest(work.ready());
        let done = match (&work, &item.op.change) {
            (Prepared::Create(ready), Change::Create { at, file, what, perm, mtime }) => {
                let mtime = content_time(what, *mtime);
                let new = Making { file: Some(*file), what, perm: *perm, mtime };
                site.create(at, &new, Some(ready))
            }
            (Prepared::Write(writing), Change::Write { content, .. }) => {
                site.write(item.id, writing, content)
            }
            _ => unreachable!("prepared as what it is"),
        };
        if done.is_ok() || work.ready().body().is_spent() {
            // It is its owner's file now, and not for new bytes any more.
            self.applier.receptions.remove(&item.id);
        }
        done
    }

    /// Before the index says that the file has this content.
    fn store_manifest(&self, ready: &Ready) {
        if let Verified::Whole(content, manifest) = &*ready.verified
            && let Err(e) = self.applier.manifests.put(manifest)
        {
            // It is made again from the file when it is asked for.
            tracing::warn!(%content, "a hash tree could not be stored: {e}");
        }
    }

    /// The indexer looks at what was done, and the answers are complete.
    fn observe(&mut self, done: Vec<(Item, Rc<Site<'a>>, Done)>) {
        let mut by_location: HashMap<LocationNo, Vec<(Item, Rc<Site<'a>>, Done)>> = HashMap::new();
        for item in done {
            by_location.entry(item.1.no()).or_default().push(item);
        }
        for (no, mut group) in by_location {
            let looks: Vec<_> = group.iter().flat_map(|(.., d)| d.looks.clone()).collect();
            let hidden: Vec<_> = group.iter().flat_map(|(.., d)| d.hidden.clone()).collect();
            let reveal = || hidden.iter().for_each(|name| self.applier.index.unhide(no, name));
            let seen = self.applier.indexer.look_now(no, &looks, reveal);
            let mut first = 0;
            for (item, site, done) in &mut group {
                let rows = first..first + done.looks.len();
                first = rows.end;
                match &seen {
                    Ok((found, seq)) => {
                        let row = done.main.and_then(|main| found[rows][main].as_ref());
                        let file = row.map(|row| row.file_id).or(done.file);
                        let applied = Applied {
                            file,
                            version: done.version,
                            seq: *seq,
                            log_id: self.applier.index.log_id(no),
                            conflict: done.conflict.take(),
                        };
                        for (no, ino) in &done.expected {
                            self.applier.index.unexpect(*no, *ino);
                        }
                        self.answer(item, site, applied);
                    }
                    Err(e) => {
                        let e = FsError::new(e.kind(), e.to_string());
                        self.outcomes[item.slot] = Some(Fail::from(e).into_later());
                    }
                }
                for (dir, fd) in done.dirs.drain(..) {
                    match fd {
                        Ok(fd) => drop(self.dirs.entry((no, dir)).or_insert(fd)),
                        Err(e) => self.unsynced = Some(FsError::os("keep a directory open", e)),
                    }
                }
            }
        }
    }

    fn fail(&mut self, slot: usize, id: &OpId, op: &Op, fail: Fail) {
        let outcome = fail.into_outcome();
        tracing::debug!(op = op.no, change = ?op.change, ?outcome, "not applied");
        self.applier.waiting.note(id, op, &outcome);
        self.outcomes[slot] = Some(outcome);
    }

    fn answer(&mut self, item: &Item, site: &Site<'a>, applied: Applied) {
        let named = item.op.change.file();
        if let Some(conflict) = &applied.conflict {
            tracing::info!(op = item.op.no, file = named.0, ?conflict, "a change met another");
        }
        if let Some(file) = applied.file.filter(|file| *file != named)
            && is_alias(&item.op.change, applied.conflict.as_ref())
        {
            self.entry.aliases.push((site.named(named), file));
            lock(&self.applier.aliases).insert(site.named(named), file);
        }
        tracing::debug!(op = item.op.no, change = ?item.op.change, file = ?applied.file, "applied");
        self.applied.insert(item.id.no, applied.clone());
        self.entry.outcomes.push((item.id, applied.clone()));
        self.outcomes[item.slot] = Some(Outcome::Applied(applied));
        self.new.push(item.slot);
        self.applier.receptions.remove(&item.id);
        self.applier.waiting.done(&item.id);
    }

    fn end(mut self) -> Vec<Outcome> {
        let durable = self.make_durable();
        if let Err(e) = durable {
            self.answer_later(&e);
        }
        // Those of operations that failed; the others are seen already, while nobody looked.
        self.hidden.iter().for_each(|(no, name)| self.applier.index.unhide(*no, name));
        let outcomes = self.outcomes.into_iter();
        outcomes.map(|o| o.expect("each operation was answered")).collect()
    }

    fn make_durable(&mut self) -> FsResult<()> {
        super::fail_point("apply::done");
        if let Some(e) = self.unsynced.take() {
            return Err(e);
        }
        for dir in self.dirs.values() {
            rustix::fs::fsync(dir).map_err(|e| FsError::os("make a directory durable", e))?;
        }
        if !self.new.is_empty() {
            self.applier.index.flush()?;
        }
        let redone = std::mem::take(&mut *lock(&self.applier.redone));
        self.entry.ended.extend(redone.iter().map(|(id, _)| *id));
        self.entry.ended.append(&mut lock(&self.applier.leftovers));
        self.applier.ledger.commit(std::mem::take(&mut self.entry))?;
        super::fail_point("apply::noted");
        lock(&self.applier.aliases).clear();
        redone.into_iter().for_each(|(_, path)| super::recover::remove_redo(path));
        self.dirs.clear();
        self.new.clear();
        Ok(())
    }
}

/// Whether later operations of the writer that name this file mean the one it became.
fn is_alias(change: &Change, conflict: Option<&Conflict>) -> bool {
    match change {
        Change::Create { .. } => true,
        Change::Write { .. } => matches!(conflict, Some(Conflict::MadeAgain(_))),
        _ => false,
    }
}

fn content_time(what: &New, mtime: Time) -> Time {
    match what {
        New::File(NewContent { mtime, .. }) => *mtime,
        _ => mtime,
    }
}

impl Fail {
    /// The change was made, and it is not known whether it will last.
    fn into_later(self) -> Outcome {
        match self.into_outcome() {
            Outcome::Refused(why) => Outcome::Later(Obstacle::Failed(format!("{why:?}"))),
            other => other,
        }
    }
}

impl Site<'_> {
    /// What the operation is about, if it may be prepared along with others; `None`: it is
    /// carried out alone.
    fn touches(&self, op: &Op) -> FsResult<Option<Vec<Touch>>> {
        let location = self.location.id;
        Ok(match &op.change {
            Change::Create { at, file, .. } => {
                let at = Place { dir: self.means(at.dir)?, name: at.name.clone() };
                Some(vec![Touch::Name(location, at), Touch::File(location, *file)])
            }
            Change::Unlink { file, at, .. } => {
                let at = Place { dir: self.means(at.dir)?, name: at.name.clone() };
                let file = [*file, self.means(*file)?].map(|file| Touch::File(location, file));
                Some(file.into_iter().chain([Touch::Name(location, at)]).collect())
            }
            Change::Write { file, .. } => {
                Some(vec![Touch::File(location, *file), Touch::File(location, self.means(*file)?)])
            }
            _ => None,
        })
    }

    /// Names and files of which the operation changes what one before it did.
    fn concerns(&self, op: &Op) -> FsResult<Vec<Touch>> {
        let location = self.location.id;
        let name = |at: &Place| -> FsResult<Touch> {
            let at = Place { dir: self.means(at.dir)?, name: at.name.clone() };
            Ok(Touch::Name(location, at))
        };
        // By both ids that it may be known by: the one that was drawn may not be noted yet.
        let file = |named: FileId| -> FsResult<[Touch; 2]> {
            Ok([named, self.means(named)?].map(|file| Touch::File(location, file)))
        };
        let mut concerns = Vec::from(file(op.change.file())?);
        match &op.change {
            Change::Create { at, .. }
            | Change::Link { at, .. }
            | Change::Unlink { at, .. }
            | Change::Rmdir { at, .. } => concerns.push(name(at)?),
            Change::Rename { from, to, replaced, .. } => {
                concerns.extend([name(from)?, name(to)?]);
                if let Some((other, _)) = replaced {
                    concerns.extend(file(*other)?);
                }
            }
            Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => {}
        }
        Ok(concerns)
    }

    /// A note of what is about to be done at this place.
    pub fn intent(&self, at: &Place, step: Step) -> FsResult<Intent> {
        let dir = self.means(at.dir)?;
        let path = self.applier.index.view()?.path(self.no(), dir)?.unwrap_or_default();
        let target = at.name.clone();
        Ok(Intent { location: self.location.id, dir, path, target, step })
    }
}
