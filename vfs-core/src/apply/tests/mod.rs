//! Two devices, of which one is only its operations: an owner with real folders on real disks.

mod crash;
mod disks;
mod kinds;
mod receiving;
mod table;

use super::*;
use crate::index::{NewLocation, open_store};
use crate::indexer::IndexerConfig;
use crate::model::{ContentId, Entry as Row, LocationId, LocationNo, Name, Stamp, Time};
use crate::ops::{Applied, Conflict, DRAWN_FILE_ID, INLINE_MAX_BYTES, Obstacle, Place, Refusal};
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

const OWNER: DeviceId = DeviceId([1; 32]);
const LAPTOP: DeviceId = DeviceId([2; 32]);
const LOCATION: LocationId = LocationId([7; 16]);
const EPOCH: u64 = 99;
const DEADLINE: Duration = Duration::from_secs(60);
/// When the writer wrote: long ago, so that no clock gives it by chance.
const THEN: Time = Time { secs: 1_500_000_000, nanos: 123_456_789 };

type Hook = Box<dyn FnMut()>;

thread_local! {
    /// What happens at which step on this thread, once.
    static HOOKS: RefCell<Vec<(&'static str, Hook)>> = const { RefCell::new(Vec::new()) };
}

/// Runs the hook of a step, if a test has set one.
pub(super) fn fail_point(step: &'static str) {
    let take = |hooks: &RefCell<Vec<(&'static str, Hook)>>| {
        let mut hooks = hooks.borrow_mut();
        let at = hooks.iter().position(|(of, _)| *of == step)?;
        Some(hooks.remove(at).1)
    };
    if let Some(mut hook) = HOOKS.with(take) {
        hook();
    }
}

thread_local! {
    /// What the disks of this thread lack.
    static LACKING: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

/// Whether the disk is to be one without this.
pub(super) fn lacks(what: &'static str) -> bool {
    LACKING.with(|lacking| lacking.borrow().contains(&what))
}

/// Runs a test on disks that lack something.
fn without(what: &[&'static str], test: impl FnOnce()) {
    LACKING.with(|lacking| *lacking.borrow_mut() = what.to_vec());
    test();
    LACKING.with(|lacking| lacking.borrow_mut().clear());
}

/// Lets something happen at a step, once.
fn at_step(step: &'static str, hook: impl FnMut() + 'static) {
    HOOKS.with(|hooks| hooks.borrow_mut().push((step, Box::new(hook))));
}

/// Whether every hook that was set has run.
fn all_steps_came() -> bool {
    HOOKS.with(|hooks| hooks.borrow().is_empty())
}

/// The owner, with one location, and the state of the writer.
struct World {
    base: tempfile::TempDir,
    folder: PathBuf,
    index: Index,
    indexer: Arc<Indexer>,
    applier: Arc<Applier>,
    no: LocationNo,
    next_op: u64,
    next_file: u64,
    writer: Writer,
}

fn quick() -> IndexerConfig {
    IndexerConfig {
        settle: Duration::from_millis(30),
        root_check: Duration::from_millis(50),
        ..IndexerConfig::default()
    }
}

impl World {
    fn new() -> Self {
        Self::with(&[])
    }

    /// With these files: name and bytes; a name that ends with `/` is a directory.
    fn with(files: &[(&str, &str)]) -> Self {
        let base = tempfile::tempdir().unwrap();
        let folder = base.path().join("folder");
        std::fs::create_dir(&folder).unwrap();
        Self::on(base, folder, files)
    }

    fn on(base: tempfile::TempDir, folder: PathBuf, files: &[(&str, &str)]) -> Self {
        for (name, bytes) in files {
            let path = folder.join(name);
            match name.strip_suffix('/') {
                Some(_) => std::fs::create_dir_all(path).unwrap(),
                None => std::fs::write(path, bytes).unwrap(),
            }
        }
        Self::open(base, folder, 1, 1)
    }

    fn open(base: tempfile::TempDir, folder: PathBuf, next_op: u64, next_file: u64) -> Self {
        let store = open_store(&base.path().join("index")).unwrap().store;
        let index = Index::open(store, OWNER).unwrap();
        let location = NewLocation {
            id: LOCATION,
            owner: OWNER,
            name: "folder".into(),
            root: Some(folder.clone()),
            read_only: false,
            shared_with: None,
        };
        let no = index.put_location(location).unwrap().no;
        let manifests = Arc::new(Manifests::open(&base.path().join("manifests")).unwrap());
        let indexer = Indexer::start(index.clone(), manifests.clone(), quick());
        let dir = base.path().join("apply");
        let applier = Applier::open(&dir, index.clone(), indexer.clone(), manifests).unwrap();
        let writer = Writer { id: LAPTOP, name: "laptop".into() };
        let world = Self { base, folder, index, indexer, applier, no, next_op, next_file, writer };
        world.indexer.watch(no);
        world.until("a whole scan", |w| w.indexer.progress(w.no).indexed);
        world
    }

    /// Everything is begun anew on the same disks, as after a crash. `lost`: the index, too.
    fn restart(self, lost: bool) -> Self {
        let Self { base, folder, index, indexer, applier, next_op, next_file, .. } = self;
        indexer.stop();
        drop((applier, indexer, index));
        if lost {
            std::fs::remove_dir_all(base.path().join("index")).unwrap();
        }
        Self::open(base, folder, next_op, next_file)
    }

    fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what} in time");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.join(path)
    }

    fn read(&self, path: &str) -> String {
        let bytes = std::fs::read(self.path(path));
        String::from_utf8_lossy(&bytes.unwrap_or_else(|e| panic!("{path}: {e}"))).into_owned()
    }

    fn exists(&self, path: &str) -> bool {
        std::fs::symlink_metadata(self.path(path)).is_ok()
    }

    /// All paths of the folder, sorted; directories end with `/`.
    fn tree(&self) -> Vec<String> {
        fn walk(at: &Path, prefix: &str, found: &mut BTreeSet<String>) {
            for entry in std::fs::read_dir(at).unwrap() {
                let entry = entry.unwrap();
                let name =
                    format!("{prefix}{}", String::from_utf8_lossy(entry.file_name().as_bytes()));
                if entry.file_type().unwrap().is_dir() {
                    walk(&entry.path(), &format!("{name}/"), found);
                    found.insert(format!("{name}/"));
                } else {
                    found.insert(name);
                }
            }
        }
        let mut found = BTreeSet::new();
        walk(&self.folder, "", &mut found);
        found.into_iter().collect()
    }

    /// The one conflict copy in the folder, with its bytes.
    fn copy(&self) -> (String, String) {
        let mut copies: Vec<_> = self
            .tree()
            .into_iter()
            .filter(|n| n.contains("(conflicted copy from laptop "))
            .collect();
        assert_eq!(copies.len(), 1, "{:?}", self.tree());
        let name = copies.remove(0);
        let bytes = if name.ends_with('/') { String::new() } else { self.read(&name) };
        (name, bytes)
    }

    fn row(&self, path: &str) -> Option<Row> {
        let names: Vec<_> = path.split('/').map(name).collect();
        self.index.view().unwrap().resolve(self.no, &names).unwrap()
    }

    /// The row of a path as soon as it is that of the disk.
    fn settled(&self, path: &str) -> Row {
        let is_settled = |w: &Self| {
            let Ok(meta) = std::fs::symlink_metadata(w.path(path)) else { return false };
            w.row(path).is_some_and(|row| {
                let ctime = Time { secs: meta.ctime(), nanos: meta.ctime_nsec() as u32 };
                row.disk_ino == meta.ino()
                    && row.attr.ctime == ctime
                    && row.attr.size == meta.size()
            })
        };
        self.until(path, is_settled);
        self.row(path).unwrap()
    }

    fn id(&self, path: &str) -> FileId {
        if path.is_empty() { FileId::ROOT } else { self.settled(path).file_id }
    }

    /// The version of a file that the writer sees.
    fn seen(&self, path: &str) -> Base {
        let row = self.settled(path);
        Base::Seen { stamp: row.stamp(), content: row.content }
    }

    fn place(&self, dir: &str, file: &str) -> Place {
        Place { dir: self.id(dir), name: name(file) }
    }

    fn draw(&mut self) -> FileId {
        self.next_file += 1;
        FileId(DRAWN_FILE_ID | self.next_file)
    }

    fn op(&mut self, change: Change) -> (OpId, Op) {
        let no = self.next_op;
        self.next_op += 1;
        let id = OpId { writer: LAPTOP, epoch: EPOCH, no };
        let log_id = self.index.log_id(self.no);
        (id, Op { no, location: LOCATION, log_id, change })
    }

    fn deliver(&self, id: OpId, op: &Op) -> Outcome {
        self.applier.apply(&self.writer, vec![(id, op.clone(), None)]).remove(0)
    }

    /// Delivers an operation, and once more: the answer must be the same.
    fn apply(&mut self, change: Change) -> Outcome {
        let (id, op) = self.op(change);
        let outcome = self.deliver(id, &op);
        assert!(all_steps_came());
        if let Outcome::Applied(_) = outcome {
            let tree = self.tree();
            assert_eq!(self.deliver(id, &op), outcome, "delivered twice");
            assert_eq!(self.tree(), tree, "delivered twice");
        }
        self.assert_clean();
        outcome
    }

    fn applied(&mut self, change: Change) -> Applied {
        match self.apply(change) {
            Outcome::Applied(applied) => applied,
            other => panic!("{other:?}"),
        }
    }

    /// Delivers an operation that meets no change.
    fn done(&mut self, change: Change) -> Applied {
        let applied = self.applied(change);
        assert_eq!(applied.conflict, None);
        applied
    }

    /// Nothing hidden is left in the folder, and no row of it in the index.
    fn assert_clean(&self) {
        let left: Vec<_> = self.tree().into_iter().filter(|n| n.contains(".spacedrive-")).collect();
        assert!(left.is_empty(), "{left:?}");
        let redo: Vec<_> =
            std::fs::read_dir(self.base.path().join("apply/redo")).unwrap().collect();
        assert!(redo.is_empty(), "{redo:?}");
        assert_eq!(self.applier.ledger.intents().unwrap(), []);
    }

    /// The index is what the disk is, and stays so.
    fn assert_indexed(&self) {
        for path in self.tree() {
            let path = path.trim_end_matches('/');
            self.settled(path);
        }
        let count = self.tree().len() as u64;
        self.until("the right number of rows", |w| w.index.counts(w.no).entries == count);
    }

    fn create(&mut self, dir: &str, file: &str, bytes: &str) -> Change {
        let what = New::File(whole(bytes.as_bytes()));
        self.make(dir, file, what)
    }

    fn make(&mut self, dir: &str, file: &str, what: New) -> Change {
        let (at, file) = (self.place(dir, file), self.draw());
        Change::Create { at, file, what, perm: 0o640, mtime: THEN }
    }

    fn overwrite(&self, path: &str, base: Base, bytes: &str) -> Change {
        self.change(path, base, whole(bytes.as_bytes()))
    }

    fn change(&self, path: &str, base: Base, content: NewContent) -> Change {
        let names = path.split('/').map(name).collect();
        Change::Write { file: self.id(path), base, content, path: names }
    }

    fn rename(&self, from: &str, to: &str) -> Change {
        let replaced = self.exists(to).then(|| {
            let row = self.settled(to);
            let base = Base::Seen { stamp: row.stamp(), content: row.content };
            let is_file = row.attr.file_type == crate::model::FileType::File;
            (row.file_id, is_file.then_some(base))
        });
        let (from_place, to) = (self.split(from), self.split(to));
        Change::Rename { file: self.id(from), from: from_place, to, replaced, exchange: false }
    }

    fn unlink(&self, path: &str) -> Change {
        let base = Some(self.seen(path));
        Change::Unlink { file: self.id(path), at: self.split(path), base }
    }

    fn split(&self, path: &str) -> Place {
        match path.rsplit_once('/') {
            Some((dir, file)) => self.place(dir, file),
            None => self.place("", path),
        }
    }
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

/// All bytes of a file, travelling along if they are few.
fn whole(bytes: &[u8]) -> NewContent {
    let extents = if bytes.is_empty() { vec![] } else { vec![0..bytes.len() as u64] };
    NewContent {
        size: bytes.len() as u64,
        mtime: THEN,
        kept_bytes: 0,
        extents,
        digest: *blake3::hash(bytes).as_bytes(),
        whole: Some(ContentId::of(bytes)),
        inline: (bytes.len() as u64 <= INLINE_MAX_BYTES).then(|| Bytes::copy_from_slice(bytes)),
    }
}

/// Parts of a file of `base` bytes, which becomes `size` bytes long.
fn parts(base: u64, size: u64, written: &[(u64, &[u8])]) -> NewContent {
    let extents: Vec<Range<u64>> =
        written.iter().map(|(at, b)| *at..*at + b.len() as u64).collect();
    let bytes: Vec<u8> = written.iter().flat_map(|(_, b)| b.to_vec()).collect();
    NewContent {
        size,
        mtime: THEN,
        kept_bytes: base.min(size),
        extents,
        digest: *blake3::hash(&bytes).as_bytes(),
        whole: None,
        inline: Some(bytes.into()),
    }
}

fn stamp_at(path: &Path) -> Stamp {
    crate::local::stamp_of(&File::open(path).unwrap()).unwrap()
}

fn kept_as(applied: &Applied) -> String {
    match &applied.conflict {
        Some(Conflict::KeptAs(path)) => join(path),
        other => panic!("{other:?}"),
    }
}

fn join(path: &[Name]) -> String {
    path.iter().map(|n| n.display().into_owned()).collect::<Vec<_>>().join("/")
}

fn assert_stands(applied: &Applied) {
    assert!(matches!(applied.conflict, Some(Conflict::OwnerStands(_))), "{applied:?}");
}
