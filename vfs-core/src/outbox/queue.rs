//! The operations in memory: what waits, what was sent, what is done but not seen yet.

use super::order::Order;
use super::record::OpRecord;
use super::{ConflictRecord, Lane};
use crate::error::Kind;
use crate::journal::Lsn;
use crate::model::{ContentId, DeviceId, FileId, LocationId, LocationNo};
use crate::ops::{Base, Change, INLINE_MAX_BYTES, New, Place};
use crate::overlay;
use crate::staging::{Draft, DraftId, Snapshot, Staging};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// An operation that its owner has not settled.
pub(super) struct Queued {
    pub record: OpRecord,
    pub bytes: Option<OpBytes>,
    /// Of its last record in the journal.
    pub lsn: Lsn,
    pub progress: Progress,
    pub attempts: u32,
    /// Its owner may have applied it: it must stay as it is for ever. True also after a restart.
    pub may_be_sent: bool,
    /// Of the staged bytes, once computed.
    pub digest: Option<([u8; 32], Option<ContentId>)>,
    /// The last obstacle.
    pub obstacle: Option<String>,
    /// The same for who waits until it has arrived; `HostDown`: the location's disk is away.
    pub answered: Option<Kind>,
    /// Its last record was damaged.
    pub is_damaged: bool,
    /// What its writer is yet to be told of that, at the next `fsync` or `close`.
    pub late: Option<Kind>,
}

/// The bytes of an operation.
#[derive(Clone)]
pub(super) struct OpBytes {
    pub draft: Arc<Draft>,
    pub shown: overlay::Bytes,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// A new file that is still being written; it goes at this time at the latest.
    Held(Instant),
    /// Not before this time.
    Waiting(Option<Instant>),
    Sent,
    /// Never as it stands.
    Blocked,
}

/// An operation that is done, until the index shows it.
pub(super) struct Retiring {
    pub record: OpRecord,
    pub bytes: Option<OpBytes>,
    pub applied: crate::ops::Applied,
    /// The id of the file's bytes, when they are whole.
    pub whole: Option<ContentId>,
    pub settled: Instant,
    /// When the index had its rows.
    pub reached: Option<Instant>,
}

/// Everything that waits.
pub(super) struct State {
    pub epoch: u64,
    pub next_no: u64,
    pub ops: BTreeMap<u64, Queued>,
    /// The same by owner.
    pub owed: HashMap<DeviceId, BTreeSet<u64>>,
    pub order: Order,
    /// Waiting, and for no other operation; in order.
    pub ready: HashMap<DeviceId, BTreeSet<u64>>,
    pub retiring: BTreeMap<u64, Retiring>,
    /// Settled, but the journal may not have it on the disk yet.
    pub noted: BTreeMap<u64, (DeviceId, Lsn)>,
    pub conflicts: BTreeMap<u64, ConflictRecord>,
    pub drafts: Drafts,
    /// Where each location was last seen in the index.
    pub locations: HashMap<LocationId, LocationNo>,
    /// The last version of a file that an operation of this device made.
    pub versions: HashMap<(LocationId, FileId), (u64, Base)>,
    /// Operations that another was sent instead of, and which; for who waits for them.
    pub stand_ins: HashMap<u64, u64>,
    /// Conflict copies, and the files that programs wrote to when they came to be.
    pub copies: HashMap<(LocationId, FileId), FileId>,
    /// Operations that were sent and name an earlier one as their base: its owner must remember
    /// that one's outcome until they are settled.
    pub relied_on: BTreeMap<u64, u64>,
    /// The unsettled operations that make versions of a file.
    pub versioning: HashMap<(LocationId, FileId), BTreeSet<u64>>,
    /// The last record.
    pub last: Lsn,
    /// A record came after what the journal has on the disk.
    pub unsynced: bool,
    /// How long the journal was after its last checkpoint.
    pub checkpoint_bytes: u64,
}

/// Drafts with how many need each.
pub(super) struct Drafts {
    pub staging: Arc<Staging>,
    uses: HashMap<DraftId, usize>,
}

impl Drafts {
    pub fn new(staging: Arc<Staging>) -> Self {
        Self { staging, uses: HashMap::new() }
    }

    pub fn hold(&mut self, draft: &Draft) {
        *self.uses.entry(draft.id()).or_default() += 1;
    }

    pub fn needed(&self) -> impl Iterator<Item = DraftId> + '_ {
        self.uses.keys().copied()
    }

    pub fn let_go(&mut self, draft: &Draft) {
        let Some(uses) = self.uses.get_mut(&draft.id()) else { return };
        *uses -= 1;
        if *uses == 0 {
            self.uses.remove(&draft.id());
            self.staging.remove(draft.id());
        }
    }
}

impl Progress {
    pub fn is_sent(self) -> bool {
        self == Self::Sent
    }
}

impl Queued {
    pub fn lane(&self) -> Lane {
        match self.record.snapshot.as_ref().map_or(0, written_bytes) {
            n if n <= INLINE_MAX_BYTES => Lane::Small,
            _ => Lane::Bulk,
        }
    }

    /// Whether its owner refused it, and may take it another time.
    pub fn may_be_tried_again(&self) -> bool {
        let has_its_bytes = self.bytes.is_some() || self.record.snapshot.is_none();
        let is_for_good = self.answered == Some(Kind::FileTooLarge);
        self.progress == Progress::Blocked && has_its_bytes && !is_for_good && !self.is_damaged
    }

    /// Whether it may still be changed, or taken back.
    pub fn is_here_only(&self) -> bool {
        !self.may_be_sent && matches!(self.progress, Progress::Held(_) | Progress::Waiting(_))
    }
}

pub(super) fn written_bytes(snapshot: &Snapshot) -> u64 {
    snapshot.extents.iter().map(|e| e.len).sum()
}

impl State {
    pub fn new(staging: Arc<Staging>) -> Self {
        Self {
            epoch: 0,
            next_no: 1,
            ops: BTreeMap::new(),
            owed: HashMap::new(),
            order: Order::default(),
            ready: HashMap::new(),
            retiring: BTreeMap::new(),
            noted: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            drafts: Drafts::new(staging),
            locations: HashMap::new(),
            versions: HashMap::new(),
            stand_ins: HashMap::new(),
            copies: HashMap::new(),
            relied_on: BTreeMap::new(),
            versioning: HashMap::new(),
            last: Lsn(0),
            unsynced: false,
            checkpoint_bytes: 0,
        }
    }

    /// The operation, or the one that was sent instead, while it waits.
    pub fn waiting(&self, mut no: u64) -> Option<u64> {
        while !self.ops.contains_key(&no) {
            no = *self.stand_ins.get(&no)?;
        }
        Some(no)
    }

    /// Puts an operation where [`super::Outbox::take`] looks, or takes it away from there.
    pub fn place(&mut self, no: u64) {
        let Some(op) = self.ops.get(&no) else { return };
        let is_ready = matches!(op.progress, Progress::Waiting(_)) && self.may_go(op);
        let ready = self.ready.entry(op.record.owner).or_default();
        match is_ready {
            true => drop(ready.insert(no)),
            false => drop(ready.remove(&no)),
        }
    }

    /// Whether an operation waits for none, or only for such as go before it in the same stream:
    /// its owner sees to it that what builds on one that could not be carried out is not either.
    fn may_go(&self, op: &Queued) -> bool {
        let goes_before = |no| {
            self.ops.get(&no).is_some_and(|earlier| {
                earlier.progress == Progress::Sent && earlier.lane() == Lane::Small
            })
        };
        match op.lane() {
            Lane::Small => self.order.waits_for(op.record.no).all(goes_before),
            Lane::Bulk => self.order.is_free(op.record.no),
        }
    }

    /// An operation is sent now.
    pub fn sent(&mut self, no: u64) {
        self.set(no, Progress::Sent);
        let Some(op) = self.ops.get_mut(&no) else { return };
        op.may_be_sent = true;
        op.attempts = op.attempts.saturating_add(1);
        for base in bases_mut(&mut op.record.change) {
            if let Base::After(earlier) = base {
                self.relied_on.insert(no, *earlier);
            }
        }
    }

    /// Every operation for this owner with a smaller number is settled, and its outcome is of no
    /// use to the owner any more.
    pub fn settled_below(&self, owner: DeviceId) -> u64 {
        let owed = self.owed.get(&owner);
        let waiting = owed.and_then(|owed| owed.first().copied());
        let noted = self.noted.iter().find(|(_, (o, _))| *o == owner).map(|(no, _)| *no);
        let is_owed = |no: &u64| owed.is_some_and(|owed| owed.contains(no));
        let relied = self.relied_on.iter().filter(|(no, _)| is_owed(no)).map(|(_, on)| *on).min();
        let first = waiting.into_iter().chain(noted).chain(relied).min();
        first.unwrap_or(self.next_no)
    }

    /// An operation has come this far; so may have those that wait for it.
    pub fn set(&mut self, no: u64, progress: Progress) {
        let Some(op) = self.ops.get_mut(&no) else { return };
        let before = std::mem::replace(&mut op.progress, progress);
        self.place(no);
        if before.is_sent() != progress.is_sent() {
            for later in self.order.needed_by(no) {
                self.place(later);
            }
        }
    }

    pub fn add(&mut self, op: Queued) {
        let (no, record) = (op.record.no, &op.record);
        self.order.add(no, record.location, &record.change);
        if let Some(bytes) = &op.bytes {
            self.drafts.hold(&bytes.draft);
        }
        self.owed.entry(record.owner).or_default().insert(no);
        if makes_version(&record.change) {
            let file = (record.location, record.change.file());
            self.versioning.entry(file).or_default().insert(no);
        }
        self.ops.insert(no, op);
        self.place(no);
    }

    /// Takes an operation out of the queue; whoever waited for it no longer does. Its draft
    /// stays held.
    pub fn remove(&mut self, no: u64) -> Option<Queued> {
        let op = self.ops.remove(&no)?;
        self.relied_on.remove(&no);
        if let Some(ready) = self.ready.get_mut(&op.record.owner) {
            ready.remove(&no);
        }
        if let Some(owed) = self.owed.get_mut(&op.record.owner) {
            owed.remove(&no);
            if owed.is_empty() {
                self.owed.remove(&op.record.owner);
            }
        }
        let file = (op.record.location, op.record.change.file());
        self.is_no_version(file, no);
        let later = self.order.needed_by(no);
        self.order.remove(no);
        for no in later {
            self.place(no);
        }
        Some(op)
    }

    /// The operation's bytes are needed no more.
    pub fn let_go(&mut self, record: &OpRecord, bytes: Option<&OpBytes>) {
        let Some(OpBytes { draft, .. }) = bytes else { return };
        if let Some(snapshot) = &record.snapshot {
            draft.release(snapshot);
        }
        self.drafts.let_go(draft);
    }

    /// The version of a file that this device sees, when it made it itself.
    pub fn base(&self, location: LocationId, file: FileId) -> Option<Base> {
        if let Some(no) = self.versioning.get(&(location, file)).and_then(|all| all.last()) {
            return Some(Base::After(*no));
        }
        self.versions.get(&(location, file)).map(|(_, base)| base.clone())
    }

    /// The version that an operation left is known: those that build on it say so.
    pub fn rebase(
        &mut self,
        no: u64,
        (location, file): (LocationId, FileId),
        seen: &Base,
        only_writes: bool,
    ) {
        let after = Base::After(no);
        // Not only those that wait for it: one that sets a time may stand between.
        for later in self.order.changes_after(no, location, file) {
            let Some(op) = self.ops.get_mut(&later) else { continue };
            let is_write = matches!(op.record.change, Change::Write { .. });
            if only_writes && !is_write {
                continue;
            }
            for base in bases_mut(&mut op.record.change) {
                if *base == after {
                    *base = seen.clone();
                }
            }
        }
    }

    /// The owner calls a file by another id than this device did.
    pub fn rename_file(&mut self, location: LocationId, old: FileId, new: FileId, how: Renamed) {
        let (mut renamed, mut versions) = (Vec::new(), Vec::new());
        for (no, op) in self.ops.iter_mut().filter(|(_, op)| op.record.location == location) {
            let change = &mut op.record.change;
            if how == Renamed::InWrites && !matches!(change, Change::Write { .. }) {
                continue;
            }
            if makes_version(change) && change.file() == old {
                versions.push(*no);
            }
            if rename(change, old, new) {
                renamed.push(*no);
            }
        }
        self.order.rename(&renamed, location, old, new);
        versions.iter().for_each(|no| self.is_no_version((location, old), *no));
        if !versions.is_empty() {
            self.versioning.entry((location, new)).or_default().extend(versions);
        }
        if let Some(version) = self.versions.remove(&(location, old)) {
            self.versions.insert((location, new), version);
        }
        match how {
            Renamed::InWrites => {
                let home = self.home(location, old);
                self.copies.insert((location, new), home);
            }
            Renamed::Everywhere => {
                if let Some(home) = self.copies.remove(&(location, old)) {
                    self.copies.insert((location, new), home);
                }
                let homes = self.copies.iter_mut().filter(|((l, _), _)| *l == location);
                homes.filter(|(_, home)| **home == old).for_each(|(_, home)| *home = new);
                let done = self.retiring.values_mut().map(|done| &mut done.record);
                done.filter(|record| record.location == location).for_each(|record| {
                    rename(&mut record.change, old, new);
                });
            }
        }
    }

    /// The file that programs had open when this one, perhaps a copy of it, came to be.
    pub fn home(&self, location: LocationId, file: FileId) -> FileId {
        self.copies.get(&(location, file)).copied().unwrap_or(file)
    }

    fn is_no_version(&mut self, file: (LocationId, FileId), no: u64) {
        if let Some(versioning) = self.versioning.get_mut(&file) {
            versioning.remove(&no);
            if versioning.is_empty() {
                self.versioning.remove(&file);
            }
        }
    }
}

/// Whether an operation leaves a file with bytes that this device knows. One that sets attributes
/// changes the stamp, too, but of whatever bytes the owner has by then: the owner knows its
/// stamps before and after, and takes the earlier one for the later.
pub(super) fn makes_version(change: &Change) -> bool {
    match change {
        Change::Create { what, .. } => matches!(what, New::File(_)),
        Change::Write { .. } => true,
        Change::SetAttr { .. }
        | Change::Xattr { .. }
        | Change::Link { .. }
        | Change::Rename { .. }
        | Change::Unlink { .. }
        | Change::Rmdir { .. } => false,
    }
}

/// Which operations follow a file to its new id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Renamed {
    /// All: the file is the same.
    Everywhere,
    /// Those that write: the bytes went into a copy, the name stayed with the owner's file.
    InWrites,
}

fn bases_mut(change: &mut Change) -> Vec<&mut Base> {
    match change {
        Change::Write { base, .. } => vec![base],
        Change::Unlink { base, .. } | Change::SetAttr { base, .. } => base.iter_mut().collect(),
        Change::Rename { replaced: Some((_, base)), .. } => base.iter_mut().collect(),
        _ => Vec::new(),
    }
}

/// Calls a file by another id; whether the change is about it.
pub(super) fn rename(change: &mut Change, old: FileId, new: FileId) -> bool {
    let mut names = files_mut(change);
    names.retain(|file| **file == old);
    names.iter_mut().for_each(|file| **file = new);
    !names.is_empty()
}

/// The files that a change names.
pub(super) fn files_mut(change: &mut Change) -> Vec<&mut FileId> {
    fn dir(at: &mut Place) -> &mut FileId {
        &mut at.dir
    }
    match change {
        Change::Create { at, file, .. }
        | Change::Link { file, at }
        | Change::Unlink { file, at, .. }
        | Change::Rmdir { file, at } => vec![file, dir(at)],
        Change::Rename { file, from, to, replaced, .. } => {
            let mut files = vec![file, dir(from), dir(to)];
            files.extend(replaced.iter_mut().map(|(f, _)| f));
            files
        }
        Change::Write { file, .. } | Change::SetAttr { file, .. } | Change::Xattr { file, .. } => {
            vec![file]
        }
    }
}
