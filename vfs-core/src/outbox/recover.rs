//! Taking up the journal of the last run.

use super::deliver::version_row;
use super::names::random;
use super::queue::{OpBytes, Progress, Queued, State};
use super::record::{OpRecord, Record};
use super::tend::Tender;
use super::written::Written;
use super::{Outbox, OutboxConfig, OutboxError, Report};
use crate::error::Kind;
use crate::index::Index;
use crate::journal::{Journal, JournalError, Lsn, Recovered};
use crate::model::{LocationId, LocationNo};
use crate::ops::{Applied, Base, Change};
use crate::overlay::{self, FIRST_GENERATION, Live};
use crate::staging::Staging;
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The bytes of drafts that only the journal has.
type Fills = HashMap<u64, Vec<(u64, Bytes)>>;

/// More operations than one block of a disk has records of.
const LOST_AT_THE_END: u64 = 1 << 16;

/// Gets each record of the journal.
type Visit<'a> = dyn FnMut(Lsn, Vec<u8>) + 'a;

impl Outbox {
    /// Opens it and takes up what was pending; before anything is mounted.
    pub fn open(
        dir: &Path,
        index: Index,
        config: OutboxConfig,
    ) -> Result<(Arc<Self>, Report), OutboxError> {
        let (outbox, report) = Self::open_untended(dir, index, config)?;
        let failed = |e: std::io::Error| OutboxError::Io { path: dir.to_owned(), source: e.into() };
        Tender::start(&outbox).map_err(failed)?;
        Ok((outbox, report))
    }

    /// The same, but nothing happens by itself.
    pub(crate) fn open_untended(
        dir: &Path,
        index: Index,
        config: OutboxConfig,
    ) -> Result<(Arc<Self>, Report), OutboxError> {
        Self::open_with(dir, index, config, |visit| Journal::open_with(&dir.join("journal"), visit))
    }

    /// The same, over a journal that is wherever it is.
    pub(super) fn open_with(
        dir: &Path,
        index: Index,
        config: OutboxConfig,
        open_journal: impl FnOnce(&mut Visit<'_>) -> Result<(Journal, Recovered), JournalError>,
    ) -> Result<(Arc<Self>, Report), OutboxError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| OutboxError::Io {
            path: dir.to_owned(),
            source,
        };
        let mut records = Vec::new();
        let opened = open_journal(&mut |lsn, bytes| {
            records.push((lsn, Record::decode(&bytes)));
        });
        let (journal, recovered) = opened.map_err(|error| match error {
            JournalError::InUse { .. } => OutboxError::InUse { path: dir.to_owned() },
            JournalError::NewerFormat { .. } => OutboxError::NewerFormat { path: dir.to_owned() },
            error => failed(error.into()),
        })?;
        let staging = Staging::open(&dir.join("staging")).map_err(|e| failed(e.into()))?;
        staging.set_min_free_bytes(config.min_free_bytes);
        staging.set_memory_bytes(config.memory_bytes);
        staging.follow(journal.horizon());
        let outbox = Arc::new(Self {
            dir: dir.to_owned(),
            index,
            journal,
            state: Mutex::new(State::new(Arc::clone(&staging))),
            staging,
            config,
            overlay: Default::default(),
            files: Default::default(),
            content: Default::default(),
            changed: Default::default(),
            settled: Default::default(),
            tender: Arc::new(Tender::default()),
        });
        let report = outbox.take_up(records, &recovered).map_err(|e| failed(e.into()))?;
        Ok((outbox, report))
    }

    fn take_up(
        &self,
        records: Vec<(Lsn, Option<Record<'static>>)>,
        recovered: &Recovered,
    ) -> crate::error::FsResult<Report> {
        let mut report = Report {
            torn_tail: recovered.torn_tail,
            set_aside: recovered.damage.iter().map(|d| d.set_aside.clone()).collect(),
            ..Report::default()
        };
        let mut state = self.state();
        let mut fills = Fills::new();
        for (lsn, record) in records {
            match record {
                Some(record) => self.replay(&mut state, &mut fills, lsn, record),
                None => report.lost.push(format!("record {} is of no known form", lsn.0)),
            }
        }
        let damaged = recovered.damaged_tail.as_ref();
        if let Some(no) = damaged.and_then(|record| damaged_op(&state, record)) {
            self.note(&mut state, &Record::Damaged { no })?;
            block_damaged(&mut state, no);
        }
        let damaged_before = recovered.damage.len() > usize::from(damaged.is_some());
        // A number that was lost may have been sent: under another epoch it is nobody's.
        let is_another = state.epoch == 0 || damaged_before || !report.lost.is_empty();
        if is_another {
            state.epoch = random().max(1);
        }
        if recovered.torn_tail {
            // If they were damaged, not torn, they may have been sent.
            state.next_no += LOST_AT_THE_END;
        }
        if is_another || recovered.torn_tail {
            let begin = Record::Begin { epoch: state.epoch, next_no: state.next_no };
            let lsn = self.note(&mut state, &begin)?;
            self.journal.sync(lsn)?;
        }
        self.forget_seen(&mut state);
        self.restore_drafts(&mut state, &fills, &mut report);
        let needed: HashSet<_> = state.drafts.needed().collect();
        report.orphan_bytes = self.staging.remove_all_but(&needed)?;
        let mut all: Vec<_> = state.ops.values().map(|op| op.record.location).collect();
        all.extend(state.retiring.values().map(|done| done.record.location));
        // What was shown while records were read may have been forgotten since.
        all.extend(state.locations.keys());
        all.sort();
        all.dedup();
        for location in all {
            self.take_over(&mut state, location);
        }
        report.pending = state.ops.len();
        Ok(report)
    }

    fn replay(&self, state: &mut State, fills: &mut Fills, lsn: Lsn, record: Record<'static>) {
        state.last = state.last.max(lsn);
        match record {
            Record::Begin { epoch, next_no } => {
                state.epoch = epoch;
                state.next_no = state.next_no.max(next_no);
            }
            Record::Op(record) => replay_op(state, lsn, record.into_owned()),
            Record::Fill { draft, at, bytes } => {
                fills.entry(draft).or_default().push((at, bytes));
            }
            Record::Settled { no, at, outcome } => self.settled(state, no, &outcome, at),
            Record::Dropped { no } => drop(state.remove(no)),
            Record::Conflict(conflict) => {
                state.conflicts.insert(conflict.id, conflict.into_owned());
            }
            Record::Resolved { id } => drop(state.conflicts.remove(&id)),
            Record::Damaged { no } => block_damaged(state, no),
        }
    }

    /// What the index has shown before the restart needs nothing any more.
    fn forget_seen(&self, state: &mut State) {
        state.retiring.retain(|_, done| {
            let location = self.index.location_by_id(done.record.location);
            location
                .is_some_and(|l| !self.index.has_all(l.no, done.applied.log_id, done.applied.seq))
        });
        let State { versions, retiring, .. } = state;
        versions.retain(|_, (no, _)| retiring.contains_key(no));
    }

    fn restore_drafts(&self, state: &mut State, fills: &Fills, report: &mut Report) {
        let mut all: Vec<u64> = state.ops.keys().chain(state.retiring.keys()).copied().collect();
        all.sort_unstable();
        for no in all {
            let record = match (state.ops.get(&no), state.retiring.get(&no)) {
                (Some(op), _) => &op.record,
                (None, Some(done)) => &done.record,
                (None, None) => continue,
            };
            if record.change.content().is_none() {
                continue;
            }
            match self.restore(record, fills) {
                Ok(bytes) => {
                    state.drafts.hold(&bytes.draft);
                    if let Some(op) = state.ops.get_mut(&no) {
                        op.bytes = Some(bytes);
                    } else if let Some(done) = state.retiring.get_mut(&no) {
                        done.bytes = Some(bytes);
                    }
                }
                Err(error) => bytes_lost(state, no, &error, report),
            }
        }
    }

    fn restore(&self, record: &OpRecord, fills: &Fills) -> crate::error::FsResult<OpBytes> {
        let none = Vec::new();
        let draft = match &record.snapshot {
            Some(snapshot) => {
                let fill = fills.get(&snapshot.draft.0).unwrap_or(&none);
                self.staging.restore(snapshot, fill)?
            }
            None => self.staging.create(0)?,
        };
        let content = record.change.content();
        let mtime = content.map_or(record.at, |c| c.mtime);
        let size = record.snapshot.as_ref().map_or(0, |s| s.size);
        let generation = record.generation.max(FIRST_GENERATION);
        Ok(OpBytes { draft, shown: overlay::Bytes { live: Live::new(size, mtime), generation } })
    }

    /// Shows what waits for a location that nobody could use until now.
    pub(super) fn take_over(&self, state: &mut State, id: LocationId) {
        self.show_again(state, id, None);
        let Some(location) = state.locations.get(&id).copied() else { return };
        let waiting = state.ops.values().map(|op| (&op.record, op.bytes.as_ref(), None));
        let done = state.retiring.values();
        let done = done.map(|done| (&done.record, done.bytes.as_ref(), Some(&done.applied)));
        let mut all: Vec<_> = waiting
            .chain(done)
            .filter(|(record, ..)| record.location == id)
            .filter_map(|(record, bytes, done)| {
                Some((record.clone(), bytes?.clone(), done.cloned()))
            })
            .collect();
        all.sort_by_key(|(record, ..)| record.no);
        for (record, bytes, done) in &all {
            self.adopt_bytes(state, location, (record, bytes));
            // What it was based on, its owner may have no more.
            if let Some(Applied { version: Some(stamp), file: target, .. }) = done {
                let file = record.change.file();
                let version = Base::Seen { stamp: *stamp, content: None };
                let elsewhere = target.filter(|target| *target != file);
                self.learned(location, file, record.no, &version, elsewhere);
            }
        }
    }

    /// Programs that open the file go on with its draft.
    fn adopt_bytes(
        &self,
        state: &mut State,
        location: LocationNo,
        (record, bytes): (&OpRecord, &OpBytes),
    ) {
        let file = record.change.file();
        let mut open = self.files.entry((location, file)).or_default();
        let is_same = |w: &Arc<Written>| Arc::ptr_eq(&w.draft, &bytes.draft);
        let under = match (&record.change, &open.written) {
            (Change::Write { base: Base::Seen { stamp, content }, .. }, _) => {
                version_row(file, bytes.shown.generation, stamp, *content)
            }
            // Over an earlier operation that waits as well: what lies under that one.
            (Change::Write { .. }, Some(earlier)) if is_same(earlier) => (*earlier.under()).clone(),
            _ => overlay::new_file_row(file, record.at),
        };
        let parts = (Arc::clone(&bytes.draft), bytes.shown.clone());
        let written =
            Written::new((location, file), parts, Base::After(record.no), Arc::new(under));
        written.lock().op = Some(record.no);
        state.drafts.hold(&bytes.draft);
        if let Some(before) = open.written.replace(written) {
            state.drafts.let_go(&before.draft);
        }
    }
}

fn replay_op(state: &mut State, lsn: Lsn, record: OpRecord) {
    state.next_no = state.next_no.max(record.no + 1);
    if let Some(op) = state.ops.get_mut(&record.no) {
        (op.record, op.lsn) = (record, lsn);
        return;
    }
    state.add(Queued {
        record,
        bytes: None,
        lsn,
        progress: Progress::Waiting(None),
        attempts: 0,
        may_be_sent: true,
        digest: None,
        obstacle: None,
        answered: None,
        is_damaged: false,
        late: None,
    });
}

/// The last record is damaged: of which operation it was, as far as can be told. What the records
/// before say of it is not what a program was told; a new file would be there empty.
fn damaged_op(state: &State, record: &[u8]) -> Option<u64> {
    let told = match Record::decode(record) {
        Some(Record::Op(op)) => Some(op.no),
        _ => None,
    };
    let is_empty_file =
        |op: &Queued| op.record.snapshot.is_none() && op.record.change.content().is_some();
    let last = state.ops.iter().next_back().filter(|(_, op)| is_empty_file(op));
    told.filter(|no| state.ops.contains_key(no)).or(last.map(|(no, _)| *no))
}

fn block_damaged(state: &mut State, no: u64) {
    let Some(op) = state.ops.get_mut(&no) else { return };
    let why = "the last record of what was written is damaged";
    let path: Vec<_> = op.record.path.iter().map(|n| n.display()).collect();
    tracing::error!(no, path = path.join("/"), "{why}; it is not delivered");
    (op.obstacle, op.answered, op.is_damaged) = (Some(why.into()), Some(Kind::Io), true);
    state.set(no, Progress::Blocked);
}

fn bytes_lost(state: &mut State, no: u64, error: &crate::error::FsError, report: &mut Report) {
    // What was delivered is with its owner; only this device's view of it waits for the index.
    if state.retiring.remove(&no).is_some() {
        return;
    }
    let Some(op) = state.ops.get_mut(&no) else { return };
    let why = format!("its bytes cannot be read on this device: {error}");
    let path: Vec<_> = op.record.path.iter().map(|n| n.display()).collect();
    report.lost.push(format!("{}: {why}", path.join("/")));
    op.obstacle = Some(why);
    state.set(no, Progress::Blocked);
}
