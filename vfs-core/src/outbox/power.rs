//! The power goes: the journal's disk and the staged bytes lose, or tear, what was not synced.
//!
//! Every moment of a history is gone through. What is found afterwards is delivered to the owner
//! as it was at that moment; it must then have one of the states that programs saw, none older
//! than the last one whose `close` or `fsync` had returned, and nothing of two states at once.

use super::*;
use crate::index::{LogRow, NewLocation, ROOT_PARENT, open_store};
use crate::journal::sim::{Kept, SimDisk};
use crate::model::{Attr, ContentId, FileType, LocationId, Seq, Stamp};
use crate::ops::{Applied, Base, NewContent, Op, Outcome};
use crate::staging::OnDisk;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

const OWNER: DeviceId = DeviceId([2; 32]);
const LOCATION: LocationId = LocationId([2; 16]);
const LOG: u64 = 7;
const ROOT: FileId = FileId::ROOT;
/// Small, so that a few records fill one.
const SEGMENT: u64 = 16 << 10;
const OLD: &[u8] = b"the old bytes of the owner's file";

/// Names with their bytes.
type Files = BTreeMap<Name, Vec<u8>>;

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn row(id: FileId, file_type: FileType, size: u64) -> Entry {
    let time = Time { secs: 1_700_000_000, nanos: 0 };
    let attr = Attr {
        file_type,
        perm: 0o755,
        uid: 0,
        gid: 0,
        nlink: 1,
        size,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: None,
        rdev: 0,
    };
    Entry { file_id: id, disk_ino: id.0, generation: 1, attr, content: None, target: None }
}

/// The replica: a folder with one file.
fn replica(dir: &std::path::Path) -> (Index, LocationNo) {
    let store = open_store(&dir.join("index")).unwrap().store;
    let index = Index::open(store, DeviceId([1; 32])).unwrap();
    let location = NewLocation {
        id: LOCATION,
        owner: OWNER,
        name: "theirs".into(),
        root: None,
        read_only: false,
        shared_with: None,
    };
    let no = index.put_location(location).unwrap().no;
    let row = |seq, parent, text: &str, entry| LogRow {
        seq: Seq(seq),
        parent,
        name: name(text),
        entry: Some(entry),
    };
    let rows = vec![
        row(1, ROOT_PARENT, "root", self::row(ROOT, FileType::Directory, 0)),
        row(2, ROOT, "old", self::row(FileId(10), FileType::File, OLD.len() as u64)),
    ];
    index.apply_replica(no, LOG, rows, Seq(2)).unwrap();
    (index, no)
}

fn open(
    disk: &SimDisk,
    dir: &std::path::Path,
    index: &Index,
    memory_bytes: u64,
) -> (Arc<Outbox>, Report) {
    let hold_back = std::time::Duration::from_secs(1 << 20);
    let config =
        OutboxConfig { min_free_bytes: 0, memory_bytes, hold_back, ..OutboxConfig::default() };
    let opened = Outbox::open_with(dir, index.clone(), config, |visit| {
        Journal::open_sim(disk, SEGMENT, visit)
    });
    opened.unwrap()
}

/// What the owner has, and what it was sent.
#[derive(Clone)]
struct Owner {
    names: BTreeMap<Name, FileId>,
    bytes: BTreeMap<FileId, Vec<u8>>,
    sent: BTreeMap<u64, Op>,
}

impl Owner {
    fn new() -> Self {
        let names = BTreeMap::from([(name("old"), FileId(10))]);
        let bytes = BTreeMap::from([(FileId(10), OLD.to_vec())]);
        Self { names, bytes, sent: BTreeMap::new() }
    }

    fn files(&self) -> Files {
        self.names.iter().map(|(name, file)| (name.clone(), self.bytes[file].clone())).collect()
    }

    /// Applies an operation once; it must be the same each time.
    fn take(&mut self, outbox: &Outbox, mut op: Op) -> Result<Outcome, String> {
        let no = op.no;
        let bytes = match op.change.content() {
            Some(content) => bytes_of(outbox, no, content)?,
            None => Vec::new(),
        };
        // Which version it builds on is told as it is known by then.
        for base in bases(&mut op.change) {
            *base = Base::After(0);
        }
        match self.sent.get(&no) {
            Some(before) if *before != op => {
                return Err(format!("{no} was {before:?} and is {op:?}"));
            }
            Some(_) => {}
            None => {
                self.carry_out(&op.change, bytes)?;
                self.sent.insert(no, op);
            }
        }
        let version = Stamp {
            disk_ino: 10,
            size: 0,
            mtime: Time { secs: no as i64, nanos: 0 },
            ctime: Time::default(),
        };
        let (file, conflict) = (None, None);
        let version = Some(version);
        Ok(Outcome::Applied(Applied { file, version, seq: Seq(1 << 20), log_id: LOG, conflict }))
    }

    fn carry_out(&mut self, change: &Change, bytes: Vec<u8>) -> Result<(), String> {
        match change {
            Change::Create { at, file, what: crate::ops::New::File(content), .. } => {
                self.names.insert(at.name.clone(), *file);
                self.bytes.insert(*file, laid_over(&[], content, &bytes));
            }
            Change::Write { file, content, .. } => {
                let before = self.bytes.get(file).ok_or_else(|| format!("no {file:?}"))?;
                let after = laid_over(before, content, &bytes);
                self.bytes.insert(*file, after);
            }
            Change::Rename { file, from, to, .. } => {
                self.names.remove(&from.name);
                self.names.insert(to.name.clone(), *file);
            }
            Change::Unlink { at, .. } => drop(self.names.remove(&at.name)),
            other => return Err(format!("{other:?} was never asked for")),
        }
        Ok(())
    }
}

fn bases(change: &mut Change) -> Vec<&mut Base> {
    match change {
        Change::Write { base, .. } => vec![base],
        Change::Unlink { base, .. } => base.iter_mut().collect(),
        Change::Rename { replaced: Some((_, base)), .. } => base.iter_mut().collect(),
        _ => Vec::new(),
    }
}

fn bytes_of(outbox: &Outbox, no: u64, content: &NewContent) -> Result<Vec<u8>, String> {
    let read = |e: &std::ops::Range<u64>| outbox.read(OWNER, no, e.clone());
    let parts: Result<Vec<_>, _> = content.extents.iter().map(read).collect();
    let bytes = parts.map_err(|e| format!("staged bytes of {no}: {e}"))?.concat();
    match content.digest == *blake3::hash(&bytes).as_bytes() {
        true => Ok(bytes),
        false => Err(format!("{no} has other bytes than it says")),
    }
}

fn laid_over(before: &[u8], content: &NewContent, bytes: &[u8]) -> Vec<u8> {
    let mut after = before[..content.kept_bytes as usize].to_vec();
    after.resize(content.size as usize, 0);
    let mut rest = bytes;
    for extent in &content.extents {
        let (these, others) = rest.split_at((extent.end - extent.start) as usize);
        after[extent.start as usize..extent.end as usize].copy_from_slice(these);
        rest = others;
    }
    if content.is_whole() {
        assert!(content.whole.is_none_or(|id| id == ContentId::of(&after)));
    }
    after
}

/// Everything there was, moment by moment.
struct History {
    /// What drafts may have in memory.
    memory_bytes: u64,
    disk: SimDisk,
    _dir: tempfile::TempDir,
    index: Index,
    no: LocationNo,
    outbox: Arc<Outbox>,
    owner: Owner,
    files: Files,
    /// The drafts' files before each change of the journal's disk.
    staged: Arc<Mutex<BTreeMap<usize, Vec<OnDisk>>>>,
    /// What programs saw, since how many changes.
    states: Vec<(usize, Files)>,
    /// How many changes there were when a state was known to be durable.
    acknowledged: Vec<(usize, usize)>,
    /// What the owner had, since how many changes.
    owners: Vec<(usize, Owner)>,
    /// For who reads of a failure.
    said: Vec<String>,
}

impl History {
    fn new(memory_bytes: u64) -> Self {
        let dir = in_memory();
        let (index, no) = replica(dir.path());
        let disk = SimDisk::default();
        let outbox = open(&disk, dir.path(), &index, memory_bytes).0;
        let staged = Arc::<Mutex<BTreeMap<usize, Vec<OnDisk>>>>::default();
        let (to, staging) = (Arc::clone(&staged), Arc::clone(&outbox.staging));
        let drafts = dir.path().join("staging");
        disk.watch(move |changes| {
            let mut staged = to.lock().unwrap();
            let mut now = staging.on_disk();
            // Of a draft that nobody has any more the file stays for a while, as it was.
            let before = staged.last_key_value().map(|(_, files)| &files[..]).unwrap_or_default();
            let is_left = |old: &&OnDisk| {
                now.iter().all(|file| file.draft != old.draft) && path_in(&drafts, old).exists()
            };
            let left: Vec<_> = before.iter().filter(is_left).cloned().collect();
            now.extend(left);
            staged.insert(changes, now);
        });
        let (owner, start) = (Owner::new(), disk.changes());
        let files = owner.files();
        let states = vec![(start, files.clone())];
        let (acknowledged, owners) = (vec![(start, 0)], vec![(start, owner.clone())]);
        Self {
            memory_bytes,
            disk,
            _dir: dir,
            index,
            no,
            outbox,
            owner,
            files,
            staged,
            states,
            acknowledged,
            owners,
            said: Vec::new(),
        }
    }

    /// Something is being accepted: the state after it may be found from now on.
    fn begin(&mut self, change: impl FnOnce(&mut Files)) {
        change(&mut self.files);
        self.states.push((self.disk.changes(), self.files.clone()));
    }

    fn say(&mut self, what: String) {
        self.said.push(format!("    {}: {what}\n", self.disk.changes()));
    }

    fn acknowledge(&mut self) {
        self.acknowledged.push((self.disk.changes(), self.states.len() - 1));
    }

    fn written(&self, name: &Name) -> Arc<Written> {
        let entry = self.outbox.view().entry(self.no, ROOT, name.as_bytes()).unwrap().unwrap();
        match self.outbox.written(self.no, entry.file_id, entry.generation) {
            Some(written) => written,
            None => self.outbox.writing(self.no, entry.generation, &Arc::new(entry)).unwrap(),
        }
    }

    /// A program closes the file, or the daemon accepts what it wrote without waiting.
    fn commit(&mut self, written: &Written, wait: bool) {
        if wait {
            self.outbox.flush(written).unwrap();
            self.acknowledge();
        } else {
            self.outbox.commit(written).unwrap();
        }
    }

    fn make(&mut self, name: &Name, bytes: &[u8], wait: bool) {
        self.say(format!("make {:?}", (name, bytes.len(), wait)));
        if self.files.contains_key(name) {
            return;
        }
        self.begin(|files| drop(files.insert(name.clone(), Vec::new())));
        let made = Made::File { is_open: true };
        let written = self.outbox.make(self.no, (ROOT, name), made, 0o644).unwrap().1.unwrap();
        self.outbox.write(&written, Offset::At(0), bytes).unwrap();
        self.begin(|files| drop(files.insert(name.clone(), bytes.to_vec())));
        self.commit(&written, wait);
    }

    fn write(&mut self, name: &Name, offset: usize, bytes: &[u8], wait: bool) {
        self.say(format!("write {:?}", (name, offset, bytes.len(), wait)));
        if !self.files.contains_key(name) {
            return;
        }
        let written = self.written(name);
        self.outbox.write(&written, Offset::At(offset as u64), bytes).unwrap();
        self.begin(|files| {
            let file = files.get_mut(name).unwrap();
            file.resize(file.len().max(offset + bytes.len()), 0);
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
        });
        self.commit(&written, wait);
    }

    fn cut(&mut self, name: &Name, size: usize, wait: bool) {
        self.say(format!("cut {:?}", (name, size, wait)));
        if !self.files.contains_key(name) {
            return;
        }
        let written = self.written(name);
        self.outbox.set_size(&written, size as u64).unwrap();
        self.begin(|files| files.get_mut(name).unwrap().resize(size, 0));
        self.commit(&written, wait);
    }

    fn rename(&mut self, from: &Name, to: &Name) {
        self.say(format!("rename {:?}", (from, to)));
        if from == to || !self.files.contains_key(from) {
            return;
        }
        self.begin(|files| {
            let file = files.remove(from).unwrap();
            files.insert(to.clone(), file);
        });
        let (from, to) = ((ROOT, from), (ROOT, to));
        self.outbox.rename(self.no, from, to, MoveFlags::default()).unwrap();
    }

    fn unlink(&mut self, name: &Name) {
        self.say(format!("unlink {name:?}"));
        if !self.files.contains_key(name) {
            return;
        }
        self.begin(|files| drop(files.remove(name)));
        self.outbox.unlink(self.no, (ROOT, name)).unwrap();
    }

    /// The owner does some operations, and some of its answers come back.
    fn deliver(&mut self, lane: Lane, count: usize, heard: usize) {
        self.say(format!("deliver {:?}", (lane, count, heard)));
        self.outbox.sync().unwrap();
        self.acknowledge();
        let ops = self.outbox.take(OWNER, lane, count, 1 << 20);
        let mut outcomes = Vec::new();
        for op in ops {
            let no = op.no;
            outcomes.push((no, self.owner.take(&self.outbox, op).unwrap()));
        }
        self.owners.push((self.disk.changes(), self.owner.clone()));
        for (no, outcome) in outcomes.into_iter().take(heard) {
            self.outbox.settle(OWNER, no, outcome);
        }
        self.outbox.connection_lost(OWNER);
    }

    /// The drafts' directory after a power failure.
    fn staged_after(&self, changes: usize, draw: &mut StdRng) -> tempfile::TempDir {
        let dir = in_memory();
        let staged = self.staged.lock().unwrap();
        for file in &staged[&changes] {
            if file.is_unnamed && draw.random() {
                continue;
            }
            let path = path_in(&dir.path().join("staging"), file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, torn(file, draw)).unwrap();
        }
        dir
    }

    /// What comes of it when the power goes after so many changes.
    fn after(&self, changes: usize, kept: Kept, seed: u64) -> Result<(), String> {
        let mut draw = StdRng::seed_from_u64(seed);
        let dir = self.staged_after(changes, &mut draw);
        let disk = self.disk.after(changes, kept);
        let (outbox, report) = open(&disk, dir.path(), &self.index, self.memory_bytes);
        if !report.lost.is_empty() || !report.set_aside.is_empty() {
            return Err(format!("{report:?}"));
        }
        let mut owner = last(&self.owners, changes).clone();
        loop {
            outbox.sync().map_err(|e| e.to_string())?;
            let mut ops = outbox.take(OWNER, Lane::Small, 1, 1 << 20);
            ops.extend(outbox.take(OWNER, Lane::Bulk, 1, 1 << 20));
            if ops.is_empty() {
                break;
            }
            for op in ops {
                let no = op.no;
                let outcome = owner.take(&outbox, op)?;
                outbox.settle(OWNER, no, outcome);
            }
        }
        if !outbox.pending().is_empty() {
            return Err(format!("it stays: {:?}", outbox.pending()));
        }
        let found = owner.files();
        let oldest = *last(&self.acknowledged, changes);
        let mut allowed = self.states.iter().enumerate();
        match allowed.any(|(n, (since, s))| n >= oldest && *since <= changes && *s == found) {
            true => Ok(()),
            false => {
                Err(format!("{} is no state since {}", said(&found), said(&self.states[oldest].1)))
            }
        }
    }
}

/// Nothing here is about how the real disk syncs.
fn in_memory() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

fn path_in(staging: &std::path::Path, file: &OnDisk) -> PathBuf {
    let hex = format!("{:016x}", file.draft.0);
    staging.join(&hex[..2]).join(hex)
}

/// The last one that was there after so many changes.
fn last<T>(of: &[(usize, T)], changes: usize) -> &T {
    &of.iter().rev().find(|(since, _)| *since <= changes).unwrap_or(&of[0]).1
}

fn said(files: &Files) -> String {
    let file = |(name, bytes): (&Name, &Vec<u8>)| {
        let runs = bytes.chunk_by(|a, b| a == b).map(|r| format!("{}×{}", r.len(), r[0]));
        format!("{}: {}", name.display(), runs.collect::<Vec<_>>().join(" "))
    };
    files.iter().map(file).collect::<Vec<_>>().join("; ")
}

/// Of what was not synced some sectors reached the disk, some did not; perhaps not the length.
fn torn(file: &OnDisk, draw: &mut StdRng) -> Vec<u8> {
    let mut bytes = file.bytes.clone();
    for range in &file.volatile {
        for start in (range.start..range.end).step_by(512) {
            let end = range.end.min(start + 512);
            if draw.random() {
                bytes[start as usize..end as usize].fill(if draw.random() { 0 } else { 0xee });
            }
        }
    }
    if let Some(end) = file.volatile.last()
        && end.end == bytes.len() as u64
        && draw.random()
    {
        bytes.truncate(end.start as usize);
    }
    bytes
}

fn history(seed: u64, steps: usize) -> History {
    // Every draft has a file, some have, only long ones have.
    let mut history = History::new([0, 3000, 1 << 20][seed as usize % 3]);
    let mut draw = StdRng::seed_from_u64(seed);
    let names = ["old", "a", "b", "c"].map(name);
    for n in 0..steps {
        let any = |draw: &mut StdRng| names[draw.random_range(0..names.len())].clone();
        let (one, other, wait) = (any(&mut draw), any(&mut draw), draw.random());
        let tag = b'A' + (n % 60) as u8;
        let len = match draw.random_range(0..10) {
            0 => 70_000,
            1 => 5_000,
            _ => draw.random_range(1..600),
        };
        let offset = [0, 0, 10, 700, 6_000][draw.random_range(0..5_usize)];
        match draw.random_range(0..16) {
            0..4 => history.make(&one, &vec![tag; len], wait),
            4..9 => history.write(&one, offset, &vec![tag; len], wait),
            9 => history.cut(&one, offset, wait),
            10 => history.rename(&one, &other),
            11 => history.unlink(&one),
            12 | 13 => {
                history.deliver(Lane::Small, draw.random_range(1..5), draw.random_range(0..4))
            }
            14 => history.deliver(Lane::Bulk, 1, draw.random_range(0..2)),
            _ => history.outbox.checkpoint().unwrap(),
        }
    }
    history.outbox.sync().unwrap();
    history
}

#[test]
fn an_fsync_of_a_file_that_is_durable_makes_other_changes_durable() {
    survives(185, 25);
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Goes through every moment of a history.
fn survives(seed: u64, steps: usize) {
    let history = history(seed, steps);
    let start = history.states[0].0;
    for changes in start..history.disk.changes() {
        let drawn = seed ^ (changes as u64) << 8;
        let kept = [Kept::Nothing, Kept::All, Kept::Some(drawn), Kept::Some(drawn + 1)];
        for (n, kept) in kept.into_iter().enumerate() {
            if let Err(why) = history.after(changes, kept, drawn + n as u64) {
                panic!(
                    "SD_TEST_SEED={seed} SD_TEST_STEPS={steps}: the power goes after {changes} \
                     changes, {kept:?} of the unsynced is kept: {why}\n{}",
                    history.said.concat()
                );
            }
        }
    }
}

#[test]
fn what_was_acknowledged_survives_a_power_failure_at_any_moment() {
    let long = if std::env::var_os("SD_TEST_LONG").is_some() { 50 } else { 1 };
    let steps = number("SD_TEST_STEPS", 20) as usize;
    match number("SD_TEST_SEED", u64::MAX) {
        u64::MAX => (0..40 * long).for_each(|seed| survives(seed, steps)),
        seed => survives(seed, steps),
    }
}
