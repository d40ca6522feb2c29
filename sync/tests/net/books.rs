//! An outbox and an applier that keep all in memory, do as the test says, and tell what they saw.

use crate::device::PATIENCE;
use bytes::Bytes;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use sync::accept::{Arrived, Receive};
use sync::{Applies, Outgoing};
use tokio::sync::watch;
use vfs_core::apply::Writer;
use vfs_core::error::{FsError, FsResult, Kind};
use vfs_core::model::{DeviceId, FileId, LocationId, Name, Seq, Time};
use vfs_core::ops::{
    Applied, Change, DRAWN_FILE_ID, New, NewContent, Obstacle, Op, OpId, Outcome, Place,
};
use vfs_core::outbox::Lane;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The writer's side.
pub struct Out {
    pub epoch: u64,
    changed: watch::Sender<u64>,
    letters: Mutex<BTreeMap<u64, Letter>>,
    pub location: LocationId,
    pub owner: DeviceId,
}

struct Letter {
    op: Op,
    owner: DeviceId,
    lane: Lane,
    /// All bytes of the file, when they are pulled.
    bytes: Bytes,
    is_sent: bool,
    times_sent: u32,
    outcomes: Vec<Outcome>,
    bytes_read: u64,
}

impl Letter {
    fn is_open(&self) -> bool {
        !matches!(self.outcomes.last(), Some(Outcome::Applied(_) | Outcome::Refused(_)))
    }
}

impl Out {
    pub fn new(owner: DeviceId, location: LocationId) -> Arc<Self> {
        let changed = watch::Sender::new(0);
        let letters = Mutex::default();
        Arc::new(Self { epoch: rand::random(), changed, letters, location, owner })
    }

    /// Puts in any change; gives its number.
    pub fn put(&self, change: Change, lane: Lane, bytes: Bytes) -> u64 {
        let mut letters = lock(&self.letters);
        let no = letters.len() as u64 + 1;
        let op = Op { no, location: self.location, log_id: 1, change };
        let (is_sent, times_sent, outcomes, bytes_read) = (false, 0, vec![], 0);
        let owner = self.owner;
        let letter = Letter { op, owner, lane, bytes, is_sent, times_sent, outcomes, bytes_read };
        letters.insert(no, letter);
        drop(letters);
        self.changed.send_modify(|n| *n += 1);
        no
    }

    /// A new file in this directory, with its bytes inside.
    pub fn create_in(&self, dir: FileId, name: &str, bytes: &[u8]) -> u64 {
        let inline = Some(Bytes::copy_from_slice(bytes));
        self.put(create(dir, name, content(bytes, inline)), Lane::Small, Bytes::new())
    }

    pub fn create(&self, name: &str, bytes: &[u8]) -> u64 {
        self.create_in(FileId::ROOT, name, bytes)
    }

    /// A new file whose bytes are pulled.
    pub fn create_large(&self, name: &str, bytes: Bytes) -> u64 {
        self.put(create(FileId::ROOT, name, content(&bytes, None)), Lane::Bulk, bytes)
    }

    pub fn mkdir(&self, name: &str) -> (u64, FileId) {
        let (at, file) = (place(FileId::ROOT, name), drawn());
        let (what, perm, mtime) = (New::Directory, 0o755, Time::now());
        let change = Change::Create { at, file, what, perm, mtime };
        (self.put(change, Lane::Small, Bytes::new()), file)
    }

    pub fn op(&self, no: u64) -> Op {
        lock(&self.letters)[&no].op.clone()
    }

    pub fn outcomes(&self, no: u64) -> Vec<Outcome> {
        lock(&self.letters)[&no].outcomes.clone()
    }

    pub fn outcome(&self, no: u64) -> Option<Outcome> {
        self.outcomes(no).pop()
    }

    pub fn times_sent(&self, no: u64) -> u32 {
        lock(&self.letters)[&no].times_sent
    }

    pub fn bytes_read(&self, no: u64) -> u64 {
        lock(&self.letters)[&no].bytes_read
    }

    pub fn open(&self) -> usize {
        lock(&self.letters).values().filter(|l| l.is_open()).count()
    }

    /// Sends again what was answered `Later`.
    pub fn try_again(&self) {
        self.connection_lost(self.owner);
        self.changed.send_modify(|n| *n += 1);
    }
}

impl Outgoing for Out {
    fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn owners(&self) -> Vec<DeviceId> {
        match self.open() {
            0 => vec![],
            _ => vec![self.owner],
        }
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn settled_below(&self, _: DeviceId) -> u64 {
        let letters = lock(&self.letters);
        let open = letters.values().find(|l| l.is_open()).map(|l| l.op.no);
        open.unwrap_or(letters.len() as u64 + 1)
    }

    fn take(&self, owner: DeviceId, lane: Lane, max_ops: usize, max_bytes: usize) -> Vec<Op> {
        let (mut taken, mut bytes) = (vec![], 0);
        for letter in lock(&self.letters).values_mut() {
            let is_next = letter.is_open() && !letter.is_sent && letter.lane == lane;
            if !is_next || letter.owner != owner {
                continue;
            }
            bytes += postcard::to_stdvec(&letter.op).unwrap().len();
            if taken.len() == max_ops || bytes > max_bytes && !taken.is_empty() {
                break;
            }
            letter.is_sent = true;
            letter.times_sent += 1;
            taken.push(letter.op.clone());
        }
        taken
    }

    fn read(&self, owner: DeviceId, no: u64, range: Range<u64>) -> FsResult<Bytes> {
        let mut letters = lock(&self.letters);
        let letter = letters.get_mut(&no).filter(|l| l.owner == owner && l.is_sent);
        let letter = letter.ok_or(FsError::from(Kind::NotFound))?;
        let content = letter.op.change.content().ok_or(FsError::from(Kind::Invalid))?;
        let is_within =
            content.extents.iter().any(|e| e.start <= range.start && range.end <= e.end);
        if !is_within {
            return Err(Kind::Invalid.into());
        }
        letter.bytes_read += range.end - range.start;
        Ok(letter.bytes.slice(range.start as usize..range.end as usize))
    }

    fn settle(&self, _: DeviceId, no: u64, outcome: Outcome) {
        lock(&self.letters).get_mut(&no).unwrap().outcomes.push(outcome);
        self.changed.send_modify(|n| *n += 1);
    }

    fn connection_lost(&self, owner: DeviceId) {
        for letter in lock(&self.letters).values_mut().filter(|l| l.owner == owner) {
            letter.is_sent = false;
        }
    }

    fn is_awaited(&self) -> bool {
        true
    }
}

pub fn drawn() -> FileId {
    FileId(DRAWN_FILE_ID | rand::random_range(0..DRAWN_FILE_ID))
}

pub fn name(name: &str) -> Name {
    Name::new(name.as_bytes()).unwrap()
}

pub fn place(dir: FileId, n: &str) -> Place {
    Place { dir, name: name(n) }
}

pub fn content(bytes: &[u8], inline: Option<Bytes>) -> NewContent {
    let size = bytes.len() as u64;
    NewContent {
        size,
        mtime: Time::now(),
        kept_bytes: 0,
        extents: if size > 0 { vec![0..size] } else { vec![] },
        digest: *blake3::hash(bytes).as_bytes(),
        whole: None,
        inline,
    }
}

pub fn create(dir: FileId, name: &str, content: NewContent) -> Change {
    let mtime = content.mtime;
    let (at, file, what) = (place(dir, name), drawn(), New::File(content));
    Change::Create { at, file, what, perm: 0o644, mtime }
}

/// The owner's side.
#[derive(Default)]
pub struct In {
    seen: Mutex<Seen>,
    released: Condvar,
}

/// Bytes that came, by their place in the file.
type Parts = Arc<Mutex<BTreeMap<u64, Vec<u8>>>>;

#[derive(Default)]
struct Seen {
    /// Operations in the order in which they were carried out, with the bytes that came.
    done: Vec<(OpId, Op, Option<Vec<u8>>)>,
    remembered: HashMap<OpId, Outcome>,
    places: HashMap<OpId, Parts>,
    obstacles: HashMap<u64, Obstacle>,
    is_stuck: bool,
    wants_no_bytes: bool,
    entered: u32,
    forgotten_below: u64,
    writers: Vec<String>,
}

impl In {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Operations carried out, by number, in order.
    pub fn done(&self) -> Vec<u64> {
        lock(&self.seen).done.iter().map(|(id, ..)| id.no).collect()
    }

    pub fn done_ops(&self) -> Vec<(OpId, Op)> {
        lock(&self.seen).done.iter().map(|(id, op, _)| (*id, op.clone())).collect()
    }

    pub fn bytes_of(&self, no: u64) -> Option<Vec<u8>> {
        let seen = lock(&self.seen);
        seen.done.iter().find(|(id, ..)| id.no == no).and_then(|(.., bytes)| bytes.clone())
    }

    pub fn received(&self) -> u64 {
        let seen = lock(&self.seen);
        let all =
            seen.places.values().flat_map(|p| lock(p).values().map(Vec::len).collect::<Vec<_>>());
        all.sum::<usize>() as u64
    }

    pub fn forgotten_below(&self) -> u64 {
        lock(&self.seen).forgotten_below
    }

    pub fn writers(&self) -> Vec<String> {
        lock(&self.seen).writers.clone()
    }

    /// From now on this operation meets the obstacle; `None` removes it.
    pub fn obstruct(&self, no: u64, obstacle: Option<Obstacle>) {
        let obstacles = &mut lock(&self.seen).obstacles;
        match obstacle {
            Some(obstacle) => drop(obstacles.insert(no, obstacle)),
            None => drop(obstacles.remove(&no)),
        }
    }

    /// From now on carrying out waits until it is released.
    pub fn stick(&self, is_stuck: bool) {
        lock(&self.seen).is_stuck = is_stuck;
        self.released.notify_all();
    }

    /// From now on no bytes are asked for.
    pub fn want_no_bytes(&self) {
        lock(&self.seen).wants_no_bytes = true;
    }

    /// How often carrying out was asked for.
    pub fn entered(&self) -> u32 {
        lock(&self.seen).entered
    }
}

struct Parcel {
    content: NewContent,
    bytes: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
}

impl Receive for Parcel {
    fn wanted(&self) -> Vec<Range<u64>> {
        let have = lock(&self.bytes);
        let mut wanted = vec![];
        for extent in &self.content.extents {
            let mut from = extent.start;
            for (start, bytes) in have.range(extent.start..extent.end) {
                if from < *start {
                    wanted.push(from..*start);
                }
                from = start + bytes.len() as u64;
            }
            if from < extent.end {
                wanted.push(from..extent.end);
            }
        }
        wanted
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> FsResult<()> {
        lock(&self.bytes).insert(offset, bytes.to_vec());
        Ok(())
    }

    fn finish(&self) -> FsResult<()> {
        let mut bytes = lock(&self.bytes);
        let mut hasher = blake3::Hasher::new();
        for part in bytes.values() {
            hasher.update(part);
        }
        if *hasher.finalize().as_bytes() == self.content.digest {
            return Ok(());
        }
        bytes.clear();
        Err(Kind::Io.into())
    }
}

impl Applies for In {
    fn need(&self, writer: DeviceId, id: OpId, op: &Op) -> Option<Box<dyn Receive>> {
        assert_eq!(writer, id.writer);
        let mut seen = lock(&self.seen);
        let content =
            op.change.content().filter(|c| c.inline.is_none() && !c.extents.is_empty())?;
        if seen.wants_no_bytes || seen.remembered.contains_key(&id) {
            return None;
        }
        let bytes = seen.places.entry(id).or_default().clone();
        Some(Box::new(Parcel { content: content.clone(), bytes }))
    }

    fn apply(&self, writer: &Writer, ops: Vec<Arrived>) -> Vec<Outcome> {
        let mut seen = lock(&self.seen);
        seen.entered += 1;
        // A test that failed must still be able to end.
        let waited = self.released.wait_timeout_while(seen, PATIENCE, |seen| seen.is_stuck);
        let mut seen = waited.unwrap_or_else(PoisonError::into_inner).0;
        seen.writers.push(writer.name.clone());
        ops.into_iter().map(|(id, op, received)| seen.apply(id, op, received)).collect()
    }

    fn forget_below(&self, _: DeviceId, _: u64, no: u64) {
        let mut seen = lock(&self.seen);
        seen.forgotten_below = seen.forgotten_below.max(no);
        seen.remembered.retain(|id, _| id.no >= no);
    }
}

impl Seen {
    fn apply(&mut self, id: OpId, op: Op, received: Option<Box<dyn Receive>>) -> Outcome {
        if let Some(outcome) = self.remembered.get(&id) {
            return outcome.clone();
        }
        if let Some(obstacle) = self.obstacles.get(&id.no) {
            return Outcome::Later(obstacle.clone());
        }
        let bytes = received.map(|_| lock(&self.places[&id]).values().flatten().copied().collect());
        let (file, seq) = (Some(op.change.file()), Seq(self.done.len() as u64 + 1));
        self.done.push((id, op, bytes));
        let applied = Applied { file, version: None, seq, log_id: 1, conflict: None };
        self.remembered.insert(id, Outcome::Applied(applied.clone()));
        Outcome::Applied(applied)
    }
}
