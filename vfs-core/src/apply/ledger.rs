//! What must survive a crash: outcomes given, ids taken for others, names that may be left over.
//!
//! One redb file, `apply/ledger.redb`; every commit is durable when it returns. A damaged one
//! is set aside and begun anew: what was applied is then recognised by what the disk has. When
//! its disk failed it is opened anew: a commit that failed may be there then, as after a crash.

use super::ApplyError;
use crate::error::{FsError, FsResult, Kind};
use crate::local::check_room;
use crate::model::{DeviceId, FileId, LocationId, Name, Stamp, Time};
use crate::ops::{Applied, OpId};
use crate::reopening::{Opener, RedbFile, opener};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::ops::Range;
use std::path::{Path, PathBuf};

type Bytes = &'static [u8];

const META: TableDefinition<'static, &str, u32> = TableDefinition::new("meta");
/// [`op_key`] → [`Applied`].
const OUTCOMES: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("outcomes");
/// Location, writer, the file as the writer names it → the file.
const ALIASES: TableDefinition<'static, Bytes, u64> = TableDefinition::new("aliases");
/// [`op_key`] → [`Intent`].
const INTENTS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("intents");

/// The version of these tables' form.
const FORMAT: u32 = 1;
const CACHE_BYTES: usize = 4 << 20;

/// Outcomes that the writer has noted are kept this long, in operations: a later one may still
/// refer to what an earlier one left.
const KEPT_OPS: u64 = 4096;

/// What is about to be done to the disk by one operation, noted before it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Intent {
    pub location: LocationId,
    /// The directory, and its path then.
    pub dir: FileId,
    pub path: Vec<Name>,
    /// The name there whose file is changed.
    pub target: Name,
    pub step: Step,
}

/// The kinds of what a crash may interrupt.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) enum Step {
    /// New bytes are put under `hidden`, for a disk that has no files without names.
    Bytes { hidden: Name, old: Option<Stamp> },
    /// New bytes are put under `hidden` and swap places with the target.
    Swap { hidden: Name, file: FileId, new_ino: u64, old: Stamp },
    /// The target is moved to `hidden`, looked at once more, and removed.
    Remove { hidden: Name },
    /// Bytes of `source` (in the folder of redo files) are written into the target.
    Redo { redo: Redo },
}

impl Step {
    /// The name that nobody is to see.
    pub fn hidden(&self) -> Option<&Name> {
        match self {
            Self::Bytes { hidden, .. } | Self::Swap { hidden, .. } | Self::Remove { hidden } => {
                Some(hidden)
            }
            Self::Redo { .. } => None,
        }
    }
}

/// A change of a file in place, that is done again from its start after a crash.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Redo {
    /// Name of the file with the bytes, one extent after the other.
    pub source: String,
    pub disk_ino: u64,
    pub size: u64,
    pub kept_bytes: u64,
    pub extents: Vec<Range<u64>>,
    pub mtime: Time,
}

/// One commit.
#[derive(Default)]
pub(super) struct Entry {
    pub outcomes: Vec<(OpId, Applied)>,
    pub aliases: Vec<(Named, FileId)>,
    pub begun: Vec<(OpId, Intent)>,
    pub ended: Vec<OpId>,
}

/// A file as a writer names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Named {
    pub location: LocationId,
    pub writer: DeviceId,
    pub file: FileId,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
            && self.aliases.is_empty()
            && self.begun.is_empty()
            && self.ended.is_empty()
    }
}

/// The open file.
pub(super) struct Ledger {
    file: RedbFile,
    path: PathBuf,
}

impl Ledger {
    pub fn open(dir: &Path) -> Result<Self, ApplyError> {
        let path = dir.join("ledger.redb");
        Self::open_by(&path, || opener(&path, CACHE_BYTES))
    }

    fn open_by(path: &Path, opener: impl Fn() -> Opener) -> Result<Self, ApplyError> {
        match Self::try_open(path, opener()) {
            Err(Unopened::Damaged(why)) => {
                let aside = free_name(path);
                tracing::error!(
                    path = %path.display(), aside = %aside.display(),
                    "the record of applied operations is damaged and was set aside: {why}"
                );
                std::fs::rename(path, &aside)
                    .map_err(|e| FsError::os("set a damaged file aside", e))?;
                Self::try_open(path, opener()).map_err(|e| e.into_error(path))
            }
            opened => opened.map_err(|e| e.into_error(path)),
        }
    }

    fn try_open(path: &Path, opener: Opener) -> Result<Self, Unopened> {
        let file = RedbFile::open(path, opener).map_err(Unopened::from_redb)?;
        let format = file.with(prepare).map_err(Unopened::from_redb)?;
        if format > FORMAT {
            Err(Unopened::Newer)
        } else {
            Ok(Self { file, path: path.to_owned() })
        }
    }

    /// Whether its disk failed and was not found to work since.
    pub fn has_failed(&self) -> bool {
        self.file.has_failed()
    }

    /// What was answered to an operation.
    pub fn outcome(&self, op: &OpId) -> FsResult<Option<Applied>> {
        self.get(OUTCOMES, &op_key(op))
    }

    /// The file that a writer means.
    pub fn file(&self, named: &Named) -> FsResult<FileId> {
        let read = |db: &Database| {
            let table = db.begin_read()?.open_table(ALIASES)?;
            Ok(table.get(alias_key(named).as_slice())?.map(|v| FileId(v.value())))
        };
        Ok(self.file.with(read).map_err(failed)?.unwrap_or(named.file))
    }

    /// What was begun and not ended.
    pub fn intents(&self) -> FsResult<Vec<(OpId, Intent)>> {
        let read = |db: &Database| {
            let table = db.begin_read()?.open_table(INTENTS)?;
            let mut found = Vec::new();
            for row in table.iter()? {
                let (key, value) = row?;
                found.push((key.value().to_vec(), value.value().to_vec()));
            }
            Ok(found)
        };
        let rows = self.file.with(read).map_err(failed)?;
        // What cannot be understood is of no use; the files it named stay where they are.
        let parse = |(key, value): (Vec<u8>, Vec<u8>)| Some((split_op(&key)?, decode(&value)?));
        Ok(rows.into_iter().filter_map(parse).collect())
    }

    pub fn commit(&self, entry: Entry) -> FsResult<()> {
        if entry.is_empty() {
            return Ok(());
        }
        let write = |db: &Database| {
            let mut transaction = db.begin_write()?;
            transaction.set_quick_repair(true);
            {
                let mut outcomes = transaction.open_table(OUTCOMES)?;
                for (op, applied) in &entry.outcomes {
                    outcomes.insert(op_key(op).as_slice(), encode(applied).as_slice())?;
                }
                let mut aliases = transaction.open_table(ALIASES)?;
                for (named, file) in &entry.aliases {
                    aliases.insert(alias_key(named).as_slice(), file.0)?;
                }
                let mut intents = transaction.open_table(INTENTS)?;
                for (op, intent) in &entry.begun {
                    intents.insert(op_key(op).as_slice(), encode(intent).as_slice())?;
                }
                for op in &entry.ended {
                    intents.remove(op_key(op).as_slice())?;
                }
            }
            Ok(transaction.commit()?)
        };
        self.write(write)
    }

    /// Drops outcomes that will not be asked for again.
    pub fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64) -> FsResult<()> {
        let first = |epoch, no| op_key(&OpId { writer, epoch, no });
        let after = epoch.checked_add(1).map_or(first(u64::MAX, u64::MAX), |after| first(after, 0));
        // Also those of other epochs: the journal that they were of is lost.
        let ranges = [
            first(0, 0)..first(epoch, 0),
            first(epoch, 0)..first(epoch, no.saturating_sub(KEPT_OPS)),
            after..first(u64::MAX, u64::MAX),
        ];
        let write = |db: &Database| {
            let mut transaction = db.begin_write()?;
            // With the next durable one: nothing relies on it.
            transaction.set_durability(redb::Durability::None)?;
            {
                let mut outcomes = transaction.open_table(OUTCOMES)?;
                for range in ranges {
                    if range.start < range.end {
                        let range = range.start.as_slice()..range.end.as_slice();
                        outcomes.retain_in::<&[u8], _>(range, |_, _| false)?;
                    }
                }
            }
            Ok(transaction.commit()?)
        };
        self.write(write)
    }

    fn write(&self, write: impl FnOnce(&Database) -> Result<(), redb::Error>) -> FsResult<()> {
        // A full disk is no failure of it.
        check_room(&self.path).map_err(|e| failed(e.into()))?;
        self.file.with(write).map_err(failed)
    }

    fn get<T: DeserializeOwned>(
        &self,
        table: TableDefinition<'static, Bytes, Bytes>,
        key: &[u8],
    ) -> FsResult<Option<T>> {
        let read = |db: &Database| {
            let table = db.begin_read()?.open_table(table)?;
            Ok(table.get(key)?.map(|v| v.value().to_vec()))
        };
        Ok(self.file.with(read).map_err(failed)?.and_then(|bytes| decode(&bytes)))
    }
}

/// Why a file was not opened.
enum Unopened {
    Newer,
    Damaged(String),
    Failed(redb::Error),
}

impl Unopened {
    fn from_redb(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
                Self::Damaged(e.to_string())
            }
            redb::Error::Corrupted(_)
            | redb::Error::UpgradeRequired(_)
            | redb::Error::TableTypeMismatch { .. } => Self::Damaged(error.to_string()),
            other => Self::Failed(other),
        }
    }

    fn into_error(self, path: &Path) -> ApplyError {
        match self {
            Self::Newer => ApplyError::NewerFormat(path.to_owned()),
            Self::Damaged(why) => FsError::caused(Kind::Io, "open the ledger", why).into(),
            Self::Failed(e) => failed(e).into(),
        }
    }
}

/// Makes the tables; gives the format.
/// Its form; a new one gets its tables. One that has a form is not written to: that may take
/// space, which a full disk has not.
fn prepare(db: &Database) -> Result<u32, redb::Error> {
    let known = match db.begin_read()?.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => None,
        meta => meta?.get("format")?.map(|v| v.value()),
    };
    if let Some(format) = known {
        return Ok(format);
    }
    let mut transaction = db.begin_write()?;
    transaction.set_quick_repair(true);
    transaction.open_table(META)?.insert("format", FORMAT)?;
    transaction.open_table(OUTCOMES)?;
    transaction.open_table(ALIASES)?;
    transaction.open_table(INTENTS)?;
    transaction.commit()?;
    Ok(FORMAT)
}

fn free_name(path: &Path) -> PathBuf {
    let candidates = (1u32..).map(|n| path.with_extension(format!("damaged-{n}")));
    let mut free = candidates.filter(|p| !p.exists());
    free.next().expect("the numbers do not end")
}

fn op_key(op: &OpId) -> Vec<u8> {
    [op.writer.0.as_slice(), &op.epoch.to_be_bytes(), &op.no.to_be_bytes()].concat()
}

fn split_op(key: &[u8]) -> Option<OpId> {
    let (writer, rest) = key.split_first_chunk::<32>()?;
    let (epoch, no) = rest.split_first_chunk::<8>()?;
    let no: [u8; 8] = no.try_into().ok()?;
    let (epoch, no) = (u64::from_be_bytes(*epoch), u64::from_be_bytes(no));
    Some(OpId { writer: DeviceId(*writer), epoch, no })
}

fn alias_key(named: &Named) -> Vec<u8> {
    let file = named.file.0.to_be_bytes();
    [named.location.0.as_slice(), &named.writer.0, &file].concat()
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_allocvec(value).expect("every type here is of a form that postcard knows")
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}

fn failed(error: redb::Error) -> FsError {
    let kind = match &error {
        redb::Error::Io(e) => Kind::of_os(e),
        _ => Kind::Io,
    };
    FsError::caused(kind, "the record of applied operations", error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Seq;

    const WRITER: DeviceId = DeviceId([7; 32]);

    fn outcome(no: u64) -> Applied {
        Applied { file: Some(FileId(no)), version: None, seq: Seq(no), log_id: 1, conflict: None }
    }

    #[test]
    fn a_disk_that_failed_is_used_again_when_it_works_and_no_answer_is_lost() {
        for calls in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("ledger.redb");
            let disk = crate::reopening::failing::Disk::default();
            let ledger = Ledger::open_by(&path, || disk.opener(&path)).unwrap();
            let id = |no| OpId { writer: WRITER, epoch: 1, no };
            let answer = |no| {
                let outcomes = vec![(id(no), outcome(no))];
                ledger.commit(Entry { outcomes, ..Entry::default() })
            };
            answer(1).unwrap();
            disk.fail_after(calls);
            let second = answer(2);
            disk.fail_after(0);
            assert!(answer(3).is_err());
            assert_eq!(answer(4).unwrap_err().kind(), Kind::Io, "also after redb gave up");
            disk.work();
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while let Err(error) = answer(5) {
                assert!(std::time::Instant::now() < deadline, "{error}");
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            for no in [1, 5] {
                assert_eq!(ledger.outcome(&id(no)).unwrap(), Some(outcome(no)));
            }
            if second.is_ok() {
                assert_eq!(ledger.outcome(&id(2)).unwrap(), Some(outcome(2)));
                assert!(calls > 2);
                break;
            }
        }
    }

    #[test]
    fn what_may_still_be_asked_for_is_kept_when_older_answers_go() {
        for epoch in [1, 7 << 40, u64::MAX - 1, u64::MAX] {
            let dir = tempfile::tempdir().unwrap();
            let ledger = Ledger::open(dir.path()).unwrap();
            let id = |no| OpId { writer: WRITER, epoch, no };
            let other = OpId { writer: WRITER, epoch: epoch ^ 2, no: 1 };
            let stranger = OpId { writer: DeviceId([8; 32]), epoch: 3, no: 1 };
            let others = vec![(other, outcome(1)), (stranger, outcome(1))];
            ledger.commit(Entry { outcomes: others, ..Entry::default() }).unwrap();
            let mut last = 0;
            for settled in [1024, 4096, 5000, 9000] {
                for no in (last + 1..=settled + 100).step_by(100) {
                    let outcomes = (no..no + 100).map(|no| (id(no), outcome(no))).collect();
                    ledger.commit(Entry { outcomes, ..Entry::default() }).unwrap();
                    last = no + 99;
                }
                ledger.forget_below(WRITER, epoch, settled).unwrap();
                let kept = (1..=last).filter(|no| ledger.outcome(&id(*no)).unwrap().is_some());
                let first = settled.saturating_sub(KEPT_OPS).max(1);
                assert!(kept.eq(first..=last), "epoch {epoch}, settled {settled}");
                assert_eq!(ledger.outcome(&other).unwrap(), None, "of a journal that is lost");
                assert!(ledger.outcome(&stranger).unwrap().is_some());
            }
        }
    }
}
