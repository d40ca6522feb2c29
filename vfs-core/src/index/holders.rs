//! Who has which bytes, of rows that came in large numbers.
//!
//! Keys of Content begin with a hash, so each new one is on another page of its table. A new
//! device gets a million rows in batches of some thousands, and would write most of those pages
//! again for each batch. So the rows of all batches but the last come without their keys in
//! Content, and the place in the log from which on they are missing is noted. When the replica
//! is whole they are written in the order of Content, so that each page is written once. As there
//! may be more than fit into memory, that takes several passes over the rows, each for the keys
//! that come next. It is done on a thread of its own: until then, the bytes are found at the
//! rows' owner only.

use super::key::{self, ContentKey};
use super::read;
use super::row::{State, decode, encode};
use super::store::{Snapshot, Table};
use super::tx::{Place, REPLICA_NAMES, Tx};
use super::{Index, IndexError, Inner};
use crate::model::{LocationNo, Seq};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Keys that one pass notes; it has twice as many in memory, 10 MiB.
pub(super) const PASS_KEYS: usize = if cfg!(test) { 64 } else { 1 << 17 };
/// Keys noted in one commit: other writers wait for it, some hundredths of a second.
const COMMIT_KEYS: usize = if cfg!(test) { 16 } else { 1 << 14 };

/// Where it stands with one location; in Meta for as long as keys may be missing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Unlisted {
    /// Rows that are above this place in the log may be missing in Content.
    after: Seq,
    /// Those up to this place are being listed; none yet where it is the same.
    upto: Seq,
    /// They are, up to this key of Content.
    listed: Vec<u8>,
}

impl Unlisted {
    fn after(after: Seq) -> Self {
        Self { after, upto: after, listed: Vec::new() }
    }

    fn load(from: &dyn Snapshot, no: LocationNo) -> Result<Option<Self>, IndexError> {
        let stored = from.get(Table::Meta, &key::unlisted(no))?;
        stored.map(|stored| decode(&stored, "from where on holders are not listed")).transpose()
    }

    fn store(&self, tx: &mut Tx<'_>, no: LocationNo) {
        tx.batch.put(Table::Meta, key::unlisted(no), encode(self));
    }
}

/// Has the rows of this transaction, whose numbers are all above `head`, listed later.
pub(super) fn put_off(tx: &mut Tx<'_>, no: LocationNo, head: Seq) -> Result<(), IndexError> {
    tx.is_unlisted = true;
    if Unlisted::load(tx, no)?.is_none() {
        Unlisted::after(head).store(tx, no);
    }
    Ok(())
}

/// Has every row above a number looked at again.
pub(super) fn list_again(tx: &mut Tx<'_>, no: LocationNo, after: Seq) {
    Unlisted::after(after).store(tx, no);
}

/// The locations that a thread is to list, one after the other.
#[derive(Default)]
pub(super) struct Listing(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    locations: BTreeSet<LocationNo>,
    has_thread: bool,
}

impl Listing {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a thread is needed for it.
    fn add(&self, no: LocationNo) -> bool {
        let mut waiting = self.lock();
        waiting.locations.insert(no);
        !std::mem::replace(&mut waiting.has_thread, true)
    }

    /// The next one, for the thread, which ends when there is none.
    fn next(&self) -> Option<LocationNo> {
        let mut waiting = self.lock();
        let next = waiting.locations.pop_first();
        waiting.has_thread = next.is_some();
        next
    }
}

impl Index {
    /// Lists what was put off: at once if that is little, else on a thread.
    pub(super) fn list_holders(&self, no: LocationNo) -> Result<(), IndexError> {
        let Some(unlisted) = Unlisted::load(&*self.store().snapshot()?, no)? else { return Ok(()) };
        let is_little = self.head(no).0.saturating_sub(unlisted.after.0) <= COMMIT_KEYS as u64;
        if is_little && !self.list_pass(no)? {
            return Ok(());
        }
        if !self.0.listing.add(no) {
            return Ok(());
        }
        let index = Arc::downgrade(&self.0);
        let spawned = std::thread::Builder::new()
            .name("index-holders".into())
            .spawn(move || list_waiting(&index));
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot note now who has which bytes");
            self.0.listing.lock().has_thread = false;
        }
        Ok(())
    }

    /// One pass over the rows; whether another is needed.
    fn list_pass(&self, no: LocationNo) -> Result<bool, IndexError> {
        match Pass::begin(self, no)? {
            Some((pass, keys)) => self.finish_pass(no, pass, &keys),
            None => Ok(false),
        }
    }

    fn finish_pass(
        &self,
        no: LocationNo,
        mut pass: Pass,
        keys: &[ContentKey],
    ) -> Result<bool, IndexError> {
        let mut commits = keys.chunks(COMMIT_KEYS).peekable();
        loop {
            let some = commits.next().unwrap_or_default();
            let is_end = commits.peek().is_none();
            let is_listed = self.write(|tx| match self.location(no) {
                Some(_) => pass.list(tx, no, some, is_end),
                None => Ok(true),
            })?;
            if is_listed || is_end || !pass.goes_on {
                return Ok(!is_listed);
            }
        }
    }
}

/// Ends early when the index is closed, which it does not keep open between two passes.
fn list_waiting(index: &Weak<Inner>) {
    while let Some(index) = index.upgrade().map(Index) {
        let Some(no) = index.0.listing.next() else { return };
        match index.list_pass(no) {
            Ok(true) => drop(index.0.listing.add(no)),
            Ok(false) => {}
            // It is tried again when the next rows come, or at the next start.
            Err(error) => tracing::warn!(?no, %error, "cannot note who has which bytes"),
        }
    }
}

/// One pass: the keys that come next of the rows that are not listed.
struct Pass {
    /// What the rows were when the keys were read.
    state: State,
    /// As it is stored.
    unlisted: Unlisted,
    /// The last place in the log of the rows that are looked at.
    upto: Seq,
    /// The keys are all that are left of those rows.
    has_all: bool,
    /// Nobody began anew meanwhile.
    goes_on: bool,
}

impl Pass {
    /// Reads the keys; `None`: nothing is missing.
    fn begin(index: &Index, no: LocationNo) -> Result<Option<(Self, Vec<ContentKey>)>, IndexError> {
        let snapshot = index.store().snapshot()?;
        let Some(unlisted) = Unlisted::load(&*snapshot, no)? else { return Ok(None) };
        let Some(state) = snapshot.get(Table::Meta, &key::state(no))? else { return Ok(None) };
        let state: State = decode(&state, "a location's state")?;
        let upto = if unlisted.upto > unlisted.after { unlisted.upto } else { state.head };
        let mut keys = NextKeys { listed: unlisted.listed.clone(), keys: Vec::new(), all: true };
        read::log_range(&*snapshot, no, unlisted.after, upto, &mut |seq, parent, name| {
            let row = read::row(&*snapshot, no, parent, name.as_bytes())?;
            let entry = row.filter(|row| row.seq == seq).map(|row| row.entry);
            if let Some((content, file)) = entry.and_then(|e| Some((e.content?, e.file_id))) {
                keys.add(key::content(content, no, file));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        let (keys, has_all) = keys.sorted();
        Ok(Some((Self { state, unlisted, upto, has_all, goes_on: true }, keys)))
    }

    /// Puts some keys into a commit, the last ones of the pass or not; whether all rows are
    /// listed with it.
    fn list(
        &mut self,
        tx: &mut Tx<'_>,
        no: LocationNo,
        keys: &[ContentKey],
        is_end: bool,
    ) -> Result<bool, IndexError> {
        let state = tx.state(no)?.clone();
        if Unlisted::load(tx, no)?.as_ref() != Some(&self.unlisted)
            || state.log_id != self.state.log_id
        {
            self.goes_on = false;
            return Ok(false);
        }
        // No row changes without its location's state.
        let is_unchanged = state == self.state;
        for key in keys {
            if is_unchanged || is_held(tx, no, key)? {
                tx.batch.put(Table::Content, *key, []);
            }
        }
        let is_over = is_end && self.has_all;
        if is_over && self.upto == state.head {
            tx.batch.delete(Table::Meta, key::unlisted(no));
            return Ok(true);
        }
        match (is_over, keys.last()) {
            (true, _) => self.unlisted = Unlisted::after(self.upto),
            (false, Some(last)) => {
                (self.unlisted.upto, self.unlisted.listed) = (self.upto, last.to_vec());
            }
            (false, None) => {}
        }
        self.unlisted.store(tx, no);
        Ok(false)
    }
}

/// The keys after `listed` that come first, in bounded memory.
struct NextKeys {
    listed: Vec<u8>,
    keys: Vec<ContentKey>,
    /// There were no more than are here.
    all: bool,
}

impl NextKeys {
    fn add(&mut self, key: ContentKey) {
        if key.as_slice() > self.listed.as_slice() {
            self.keys.push(key);
            if self.keys.len() == 2 * PASS_KEYS {
                self.leave_out_last();
            }
        }
    }

    fn leave_out_last(&mut self) {
        if self.keys.len() > PASS_KEYS {
            self.keys.select_nth_unstable(PASS_KEYS);
            self.keys.truncate(PASS_KEYS);
            self.all = false;
        }
    }

    fn sorted(mut self) -> (Vec<ContentKey>, bool) {
        self.leave_out_last();
        self.keys.sort_unstable();
        // Names of one file.
        self.keys.dedup();
        (self.keys, self.all)
    }
}

/// Whether the file still has the bytes.
fn is_held(tx: &Tx<'_>, no: LocationNo, key: &ContentKey) -> Result<bool, IndexError> {
    let (content, file) = key::split_content(key);
    for (parent, name) in read::names(tx, no, file, REPLICA_NAMES)? {
        let row = tx.row(Place { no, parent, name: &name })?;
        if row.is_some_and(|row| row.entry.content == Some(content)) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_invariants, hashed_row, log_row, replica};
    use super::*;
    use crate::index::LogRow;
    use crate::model::FileId;

    /// Between the reading of the keys and their commit the owner's rows change.
    #[test]
    fn holders_of_rows_that_change_meanwhile_are_noted_as_they_are_then() {
        let f = replica();
        let rows: Vec<_> = (1..=20).map(hashed_row).collect();
        f.index.apply_replica_part(f.no, 9, rows, Seq(20)).unwrap();
        let (pass, keys) = Pass::begin(&f.index, f.no).unwrap().unwrap();
        assert_eq!(keys.len(), 20);
        let other = hashed_row(40).entry;
        let changes = [
            log_row(21, FileId::ROOT, "1", None),
            log_row(22, FileId::ROOT, "2", other),
            log_row(23, FileId::ROOT, "another name", hashed_row(3).entry),
            log_row(24, FileId::ROOT, "3", None),
        ];
        f.index.apply_replica_part(f.no, 9, changes.into(), Seq(24)).unwrap();
        assert!(f.index.finish_pass(f.no, pass, &keys).unwrap(), "rows have come since");
        while f.index.list_pass(f.no).unwrap() {}
        check_invariants(&f.index, f.no);
    }

    /// It is not the rows of the log before that are noted.
    #[test]
    fn a_pass_over_a_log_that_begins_anew_ends() {
        let f = replica();
        f.index.apply_replica_part(f.no, 9, vec![hashed_row(1)], Seq(1)).unwrap();
        let (pass, keys) = Pass::begin(&f.index, f.no).unwrap().unwrap();
        f.index.reset_replica(f.no, 10).unwrap();
        let other = LogRow { seq: Seq(1), ..hashed_row(2) };
        f.index.apply_replica_part(f.no, 10, vec![other], Seq(1)).unwrap();
        assert!(f.index.finish_pass(f.no, pass, &keys).unwrap());
        assert!(!f.index.list_pass(f.no).unwrap());
        check_invariants(&f.index, f.no);
    }
}
