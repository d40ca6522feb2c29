//! What to send, and what becomes of the answers.

use super::queue::{
    OpBytes, Progress, Queued, Renamed, Retiring, makes_version, rename, written_bytes,
};
use super::record::{OpRecord, Record, content_mut, word};
use super::{ConflictRecord, Lane, Outbox, State, Written};
use crate::error::{FsError, FsResult, Kind};
use crate::failpoint::fail_point;
use crate::journal::Lsn;
use crate::model::{Attr, ContentId, DeviceId, Entry, FileId, FileType, LocationNo, Stamp, Time};
use crate::ops::{Applied, Base, Change, Conflict, NewContent, Obstacle, Op, Outcome, Refusal};
use crate::staging::{Draft, Extent, Snapshot};
use bytes::{Bytes, BytesMut};
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an operation waits after its owner could not carry it out: doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// An operation that was picked to be sent, and its bytes.
struct Picked {
    op: Op,
    bytes: Option<OpBytes>,
    snapshot: Option<Snapshot>,
    digest: Option<([u8; 32], Option<ContentId>)>,
    lane: Lane,
}

/// Of an answer that could not be noted.
pub(super) const NEVER: Lsn = Lsn(u64::MAX);

impl Outbox {
    /// Every operation for this owner with a smaller number is settled and noted as such.
    pub fn settled_below(&self, owner: DeviceId) -> u64 {
        let durable = self.journal.durable();
        let mut state = self.state();
        state.noted.retain(|_, (_, lsn)| *lsn > durable);
        state.settled_below(owner)
    }

    /// What to send next; it counts as sent from now on. May read staged bytes: not for a
    /// runtime's thread.
    ///
    /// In [`Lane::Small`] operations come in order, bytes inside, about `max_bytes` of them. In
    /// [`Lane::Bulk`] at most one comes. None depends on an unsettled one, but for those that were
    /// given to [`Lane::Small`] before; all are durable here.
    pub fn take(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Op> {
        let max_ops = if lane == Lane::Bulk { max_ops.min(1) } else { max_ops };
        let mut picked = self.pick(owner, lane, max_ops, max_bytes).into_iter();
        let mut ops = Vec::new();
        while let Some(next) = picked.next() {
            match self.complete(next) {
                Some(op) => ops.push(op),
                None => {
                    self.put_back(picked.map(|later| later.op.no));
                    break;
                }
            }
        }
        ops
    }

    /// What was to go behind an operation that cannot go may build on it, and is looked at anew.
    fn put_back(&self, picked: impl Iterator<Item = u64>) {
        let mut state = self.state();
        for no in picked {
            state.set(no, Progress::Waiting(None));
        }
        drop(state);
        self.tick();
    }

    fn pick(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Picked> {
        let (durable, now) = (self.journal.durable(), Instant::now());
        let mut state = self.state();
        let (mut picked, mut bytes, mut after) = (Vec::new(), 0, 0);
        while picked.len() < max_ops && bytes < max_bytes {
            // What is sent may let others go, with larger numbers.
            let next = state.ready.get(&owner).and_then(|ready| ready.range(after..).next());
            let Some(no) = next.copied() else { break };
            after = no + 1;
            let Some(op) = state.ops.get(&no) else { continue };
            let is_due =
                matches!(op.progress, Progress::Waiting(at) if at.is_none_or(|at| at <= now));
            if !is_due || op.lsn > durable || op.lane() != lane {
                continue;
            }
            bytes += op.record.snapshot.as_ref().map_or(0, written_bytes) as usize + 256;
            tracing::trace!(no, change = ?op.record.change, "taken");
            picked.push(Picked::of(op));
            state.sent(no);
        }
        picked
    }

    /// Adds what is only in staging.
    fn complete(&self, mut picked: Picked) -> Option<Op> {
        let no = picked.op.no;
        let Some(content) = content_mut(&mut picked.op.change) else { return Some(picked.op) };
        let completed = match (&picked.bytes, &picked.snapshot) {
            (Some(bytes), Some(snapshot)) => {
                fill_in(content, bytes, snapshot, picked.digest, picked.lane == Lane::Small)
            }
            (_, None) => {
                fill_in_nothing(content);
                Ok(())
            }
            (None, Some(_)) => Err(FsError::new(Kind::Io, "read staged bytes")),
        };
        if let Err(error) = completed {
            tracing::error!(no, %error, "staged bytes cannot be read");
            let why = format!("its bytes cannot be read on this device: {error}");
            self.block(no, why, Some(Kind::Io));
            return None;
        }
        if content.extents.len() > self.config.max_ranges {
            // As a whole file it has one part, unless there are holes.
            let goes_whole =
                content.kept_bytes > 0 && matches!(picked.op.change, Change::Write { .. });
            let why = "it was written in more parts than one message can name";
            self.block(no, why.into(), (!goes_whole).then_some(Kind::FileTooLarge));
            if goes_whole {
                self.tender.needs_whole(no);
            }
            return None;
        }
        if let (None, Some(content)) = (picked.digest, picked.op.change.content())
            && let Some(op) = self.state().ops.get_mut(&no)
        {
            op.digest = Some((content.digest, content.whole));
        }
        Some(picked.op)
    }

    fn block(&self, no: u64, why: String, answered: Option<Kind>) {
        let mut state = self.state();
        if let Some(op) = state.ops.get_mut(&no) {
            op.obstacle = Some(why);
            op.answered = answered;
            state.set(no, Progress::Blocked);
        }
        drop(state);
        self.settled.send_modify(|n| *n = n.wrapping_add(1));
    }

    /// Staged bytes of an operation for this owner, as far as the operation says that it has them.
    pub fn read(&self, owner: DeviceId, no: u64, range: Range<u64>) -> FsResult<Bytes> {
        let (draft, snapshot) = {
            let state = self.state();
            let op = state.ops.get(&no).filter(|op| op.record.owner == owner);
            let found = op.and_then(|op| Some((op.bytes.as_ref()?, op.record.snapshot.as_ref()?)));
            let (bytes, snapshot) =
                found.ok_or_else(|| FsError::new(Kind::NotFound, "read staged bytes"))?;
            (bytes.draft.clone(), snapshot.clone())
        };
        read_written(&draft, &snapshot, range)
    }

    /// What was sent to this owner and not settled is to be sent again, and what it refused.
    pub fn connection_lost(&self, owner: DeviceId) {
        let mut state = self.state();
        let owed = state.owed.get(&owner).into_iter().flatten().copied();
        let owed: Vec<_> = owed.filter_map(|no| Some((no, state.ops.get(&no)?))).collect();
        let goes_again = owed.into_iter().filter_map(|(no, op)| {
            let is_sent = op.progress == Progress::Sent;
            // What it refused it may take by the time that it is back; after a pause, as it may
            // break off each time.
            let later = || Some(Instant::now() + pause(op.attempts));
            (is_sent || op.may_be_tried_again()).then(|| (no, if is_sent { None } else { later() }))
        });
        for (no, when) in goes_again.collect::<Vec<_>>() {
            state.set(no, Progress::Waiting(when));
        }
        drop(state);
        self.tick();
    }

    /// What waits because of an obstacle goes now: somebody may have removed it.
    pub fn try_again(&self) {
        let mut state = self.state();
        let waits = |op: &Queued| matches!(op.progress, Progress::Waiting(Some(_)));
        let goes = state.ops.iter().filter(|(_, op)| waits(op) || op.may_be_tried_again());
        for no in goes.map(|(no, _)| *no).collect::<Vec<_>>() {
            state.set(no, Progress::Waiting(None));
        }
        drop(state);
        self.tick();
    }

    /// The owner's answer. In the journal when it returns, but for [`Outcome::Later`].
    pub fn settle(&self, owner: DeviceId, no: u64, outcome: Outcome) {
        let mut state = self.state();
        tracing::trace!(no, ?outcome, "answered");
        let Some(op) = state.ops.get_mut(&no).filter(|op| op.record.owner == owner) else {
            // Answered twice, or never asked by this device.
            return;
        };
        let progress = match &outcome {
            Outcome::Later(obstacle) => {
                op.obstacle = Some(word_obstacle(obstacle));
                op.late = (*obstacle == Obstacle::NoSpace).then_some(Kind::NoSpace);
                op.answered = not_now(obstacle);
                Some(Progress::Waiting(Some(Instant::now() + pause(op.attempts))))
            }
            Outcome::Refused(refusal) if op.bytes.is_some() || makes(&op.record.change) => {
                op.obstacle = Some(word_refusal(refusal));
                op.late = late(refusal);
                op.answered = op.late;
                Some(Progress::Blocked)
            }
            Outcome::Refused(_) | Outcome::Applied(_) => None,
        };
        if let Some(progress) = progress {
            state.set(no, progress);
            if outcome == Outcome::Refused(Refusal::NeedsWhole) {
                self.tender.needs_whole(no);
            }
        } else {
            self.done(&mut state, no, &outcome);
        }
        let may_go = state.ready.get(&owner).is_some_and(|ready| !ready.is_empty());
        drop(state);
        if may_go {
            self.tick();
        }
        self.settled.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn done(&self, state: &mut State, no: u64, outcome: &Outcome) {
        let at = Time::now();
        fail_point("outbox::answered");
        let noted =
            self.note_reserved(state, &Record::Settled { no, at, outcome: Cow::Borrowed(outcome) });
        fail_point("outbox::answer-noted");
        match noted {
            Ok(lsn) => {
                let owner = state.ops.get(&no).map(|op| op.record.owner);
                state.noted.extend(owner.map(|owner| (no, (owner, lsn))));
            }
            // The owner still remembers; after a restart it is asked again, and answers the same.
            Err(error) => {
                tracing::warn!(no, %error, "an answer could not be noted");
                let owner = state.ops.get(&no).map(|op| op.record.owner);
                state.noted.extend(owner.map(|owner| (no, (owner, NEVER))));
            }
        }
        self.settled(state, no, outcome, at);
    }

    /// What an answer changes in memory; the same when it is read from the journal.
    pub(super) fn settled(&self, state: &mut State, no: u64, outcome: &Outcome, at: Time) {
        match outcome {
            Outcome::Applied(applied) => self.applied(state, no, applied, at),
            Outcome::Refused(refusal) => {
                let Some(op) = state.remove(no) else { return };
                let why = Conflict::OwnerStands(word_refusal(refusal));
                self.met(state, &op, no, why, at);
                self.unshow(state, op);
            }
            Outcome::Later(_) => {}
        }
    }

    fn applied(&self, state: &mut State, no: u64, applied: &Applied, at: Time) {
        let Some(op) = state.ops.get(&no) else { return };
        let (location, file) = (op.record.location, op.record.change.file());
        let before = state.versions.get(&(location, file)).map(|(_, base)| base.clone());
        let content = match (op.digest, &before) {
            (Some((_, whole)), _) => whole,
            // Attributes change no bytes.
            (None, Some(Base::Seen { content, .. })) => *content,
            (None, _) => None,
        };
        let version = applied.version.map(|stamp| Base::Seen { stamp, content });
        let version = version.or(before).filter(|_| makes_version(&op.record.change));
        let no_of = state.locations.get(&location).copied();
        let op_draft = op.bytes.as_ref().map(|bytes| Arc::clone(&bytes.draft));
        let home = state.home(location, file);
        let renaming = renaming(state, &op.record, applied);
        let (elsewhere, how) = renaming.unzip();
        if let Some(version) = &version {
            // What else builds on bytes in a copy goes on naming the operation: the owner knows
            // that the copy is meant.
            let only_writes = how == Some(Renamed::InWrites);
            state.rebase(no, (location, file), version, only_writes);
            if state.versions.get(&(location, file)).is_none_or(|(n, _)| *n < no) {
                state.versions.insert((location, file), (no, version.clone()));
            }
        }
        if let (Some(version), Some(no_of)) = (&version, no_of) {
            self.learned(no_of, home, no, version, elsewhere);
            if matches!(applied.conflict, Some(Conflict::KeptAs(_))) {
                self.step_aside(no_of, home, op_draft.as_ref(), elsewhere);
            }
        }
        let Some(op) = state.remove(no) else { return };
        if let (Some(bytes), Some(snapshot)) = (&op.bytes, &op.record.snapshot) {
            bytes.draft.delivered(snapshot);
        }
        if let Some(conflict) = &applied.conflict {
            self.met(state, &op, no, conflict.clone(), at);
        }
        let Queued { mut record, bytes, digest, .. } = op;
        if let Some((new, how)) = renaming {
            state.rename_file(location, file, new, how);
            if how == Renamed::Everywhere {
                rename(&mut record.change, file, new);
            }
        }
        let (applied, whole) = (applied.clone(), digest.and_then(|(_, whole)| whole));
        let (settled, reached) = (Instant::now(), None);
        state.retiring.insert(no, Retiring { record, bytes, applied, whole, settled, reached });
        if let Some((new, how)) = renaming {
            let renamed = (how == Renamed::Everywhere).then_some((file, new));
            self.show_again(state, location, renamed);
        }
        self.tender.wake();
    }

    /// Who writes the file goes on from its new version.
    pub(super) fn learned(
        &self,
        location: LocationNo,
        file: FileId,
        no: u64,
        version: &Base,
        elsewhere: Option<FileId>,
    ) {
        let Some(open) = self.files.get(&(location, file)) else { return };
        let Base::Seen { stamp, content } = version else { return };
        for written in open.written.iter().chain(&open.older) {
            if written.learned(no, version, elsewhere) {
                let row = version_row(written.target(), written.generation(), stamp, *content);
                written.rest_on(row);
            }
        }
    }

    /// Programs go on with a file that its owner calls otherwise, and is shown so by now.
    pub(super) fn renamed(&self, location: LocationNo, old: FileId, new: FileId) {
        let Some((_, open)) = self.files.remove(&(location, old)) else { return };
        open.written.iter().chain(&open.older).for_each(|written| written.renamed(new));
        let mut there = self.files.entry((location, new)).or_default();
        there.handles += open.handles;
        there.writers += open.writers;
        there.older.extend(open.older);
        if let Some(written) = open.written {
            let other = there.written.replace(written);
            there.older.extend(other);
        }
    }

    /// Who has the file open goes on in the copy that its owner made of these bytes; whoever
    /// opens it from now on gets the owner's.
    fn step_aside(
        &self,
        location: LocationNo,
        file: FileId,
        draft: Option<&Arc<Draft>>,
        copy: Option<FileId>,
    ) {
        let Some(mut open) = self.files.get_mut(&(location, file)) else { return };
        let is_it = |w: &mut Arc<Written>| draft.is_some_and(|draft| Arc::ptr_eq(&w.draft, draft));
        let aside = open.written.take_if(is_it);
        open.older.extend(aside);
        // Whatever they build on by now: it went into the copy, too.
        if let Some(copy) = copy {
            let its = open.older.iter_mut().filter_map(|w| is_it(w).then_some(w));
            its.for_each(|written| written.goes_to(copy));
        }
    }

    /// Keeps for people that two changes met.
    fn met(&self, state: &mut State, op: &Queued, id: u64, ended: Conflict, at: Time) {
        let record = &op.record;
        let conflict = ConflictRecord {
            id,
            at,
            owner: record.owner,
            location: record.location,
            path: record.path.clone(),
            what: word(&record.change).to_owned(),
            ended,
        };
        state.conflicts.insert(id, conflict);
    }

    /// An operation came to nothing: what it showed goes at once.
    pub(super) fn unshow(&self, state: &mut State, op: Queued) {
        let Queued { record, bytes, .. } = op;
        if let Some(no_of) = state.locations.get(&record.location).copied() {
            self.overlay().retire(no_of, record.no, &record.change);
            self.publish(super::tend::changes_of(no_of, &record.change));
            state.let_go(&record, bytes.as_ref());
            self.let_go_if_unused(state, no_of, record.change.file());
        } else {
            state.let_go(&record, bytes.as_ref());
        }
    }
}

impl Picked {
    fn of(op: &Queued) -> Self {
        let record = &op.record;
        let (location, change) = (record.location, record.change.clone());
        Self {
            op: Op { no: record.no, location, log_id: record.log_id, change },
            bytes: op.bytes.clone(),
            snapshot: record.snapshot.clone(),
            digest: op.digest,
            lane: op.lane(),
        }
    }
}

/// The other id by which the owner answered, and which operations follow the file there; `None`:
/// it is the same, or that of another file.
fn renaming(state: &State, of: &OpRecord, applied: &Applied) -> Option<(FileId, Renamed)> {
    let how = match (&of.change, &applied.conflict) {
        (Change::Create { .. }, _) => Renamed::Everywhere,
        (Change::Write { .. }, Some(Conflict::KeptAs(_))) => Renamed::InWrites,
        (Change::Write { .. }, _) => Renamed::Everywhere,
        _ => return None,
    };
    let (old, new) = (of.change.file(), applied.file?);
    // What followed bytes into a copy is answered with the copy, which is another file here.
    let is_copy = state.home(of.location, new) == state.home(of.location, old);
    let is_other = old != new && !is_copy && old != FileId::ROOT && new != FileId::ROOT;
    is_other.then_some((new, how))
}

/// Whether other operations may build on what this one makes.
fn makes(change: &Change) -> bool {
    matches!(change, Change::Create { .. })
}

fn fill_in(
    content: &mut NewContent,
    bytes: &OpBytes,
    snapshot: &Snapshot,
    digest: Option<([u8; 32], Option<ContentId>)>,
    is_inline: bool,
) -> FsResult<()> {
    let failed = |e| FsError::os("read staged bytes", e);
    content.extents = joined(&snapshot.extents);
    (content.digest, content.whole) = match digest {
        Some(known) => known,
        None => {
            let needed = Snapshot { kept_bytes: content.kept_bytes, ..snapshot.clone() };
            bytes.draft.digest(&needed).map_err(failed)?
        }
    };
    if is_inline {
        let mut inline = BytesMut::new();
        for extent in &content.extents {
            inline.extend_from_slice(&read_written(&bytes.draft, snapshot, extent.clone())?);
        }
        content.inline = Some(inline.freeze());
    }
    Ok(())
}

/// What was written, as few ranges as possible: one after the other in the file are one, wherever
/// their bytes are.
fn joined(extents: &[Extent]) -> Vec<Range<u64>> {
    let mut ranges = Vec::<Range<u64>>::new();
    for extent in extents {
        let end = extent.at + extent.len;
        match ranges.last_mut().filter(|last| last.end == extent.at) {
            Some(last) => last.end = end,
            None => ranges.push(extent.at..end),
        }
    }
    ranges
}

/// Bytes of a range that was written from its first to its last.
fn read_written(draft: &Draft, snapshot: &Snapshot, range: Range<u64>) -> FsResult<Bytes> {
    let failed = |e| FsError::os("read staged bytes", e);
    let beyond = || FsError::new(Kind::Invalid, "read staged bytes");
    // There may be a million extents, and a request for each few of them.
    let first = snapshot.extents.partition_point(|e| e.at + e.len <= range.start);
    let mut extents = snapshot.extents[first..].iter();
    let (mut at, mut parts) = (range.start, Vec::new());
    while at < range.end {
        let extent = extents.next().filter(|e| e.at <= at).ok_or_else(beyond)?;
        let end = range.end.min(extent.at + extent.len);
        parts.push(draft.snapshot_read(snapshot, at..end).map_err(failed)?);
        at = end;
    }
    match parts.len() {
        0 => Err(beyond()),
        1 => Ok(parts.swap_remove(0)),
        _ => Ok(parts.concat().into()),
    }
}

/// The content of an empty file.
fn fill_in_nothing(content: &mut NewContent) {
    content.digest = *blake3::hash(&[]).as_bytes();
    content.whole = Some(ContentId::of(&[]));
    content.inline = Some(Bytes::new());
}

fn pause(attempts: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << attempts.saturating_sub(1).min(10));
    doubled.min(LONGEST_PAUSE)
}

/// The row of a version that is known by its stamp alone: enough to read its bytes.
pub(super) fn version_row(
    file: FileId,
    generation: u32,
    stamp: &Stamp,
    content: Option<ContentId>,
) -> Entry {
    let Stamp { disk_ino, size, mtime, ctime } = *stamp;
    let attr = Attr {
        file_type: FileType::File,
        perm: 0o600,
        uid: 0,
        gid: 0,
        nlink: 1,
        size,
        blocks: size.div_ceil(512),
        mtime,
        ctime,
        btime: None,
        rdev: 0,
    };
    Entry { file_id: file, disk_ino, generation, attr, content, target: None }
}

/// What a program that still has the file open is told at its next `fsync` or `close`.
fn late(refusal: &Refusal) -> Option<Kind> {
    match refusal {
        Refusal::ReadOnly => Some(Kind::ReadOnly),
        Refusal::Permission => Some(Kind::AccessDenied),
        Refusal::Malformed | Refusal::Impossible(_) => Some(Kind::Io),
        // It goes as a whole.
        Refusal::NeedsWhole => None,
    }
}

/// What a program is told that waits until its owner has it.
fn not_now(obstacle: &Obstacle) -> Option<Kind> {
    match obstacle {
        Obstacle::NoSpace => Some(Kind::NoSpace),
        Obstacle::Offline => Some(Kind::HostDown),
        Obstacle::Failed(_) => Some(Kind::Io),
        // They are sent again.
        Obstacle::NoBytes => None,
    }
}

pub(super) fn word_obstacle(obstacle: &Obstacle) -> String {
    match obstacle {
        Obstacle::NoSpace => "the owner's disk, or its quota, is full".into(),
        Obstacle::Offline => "the location's disk is not connected".into(),
        Obstacle::Failed(why) => format!("the owner failed: {why}"),
        Obstacle::NoBytes => "the owner did not get the bytes".into(),
    }
}

pub(super) fn word_refusal(refusal: &Refusal) -> String {
    match refusal {
        Refusal::ReadOnly => "the location is read-only, or not shared with this device".into(),
        Refusal::Permission => "the owner's user may not do it".into(),
        Refusal::NeedsWhole => "the owner no longer has the version that was changed".into(),
        Refusal::Malformed => "the owner does not understand it".into(),
        Refusal::Impossible(why) => format!("the owner's file system cannot do it: {why}"),
    }
}
