//! A disk that forgets: what was not synced is lost, or torn, when the power goes.
//!
//! It keeps every change since it was made, so that a test can go through all moments at which
//! the power may go ([`SimDisk::after`]), and choose for each what of the unsynced reached the disk.

use super::disk::{LogDisk, LogFile};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// What a disk writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// A disk; clones are the same one.
#[derive(Clone, Debug, Default)]
pub(crate) struct SimDisk {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    watcher: Watcher,
}

/// Sees every moment at which the power may go: called before each change.
#[derive(Default)]
struct Watcher(Mutex<Option<Watch>>);

type Watch = Box<dyn FnMut(usize) + Send>;

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    files: Vec<Vec<u8>>,
    names: BTreeMap<String, usize>,
    changes: Vec<Change>,
    aside: BTreeMap<String, Vec<u8>>,
    boot: u8,
    /// The most bytes of all files together.
    capacity: Option<u64>,
    fails_to_sync: bool,
    holds_syncs: bool,
    syncs_held: usize,
}

#[derive(Clone, Debug)]
enum Change {
    Create(String, usize, u64),
    Write(usize, u64, Vec<u8>),
    Sync(usize),
    Rename(String, String),
    Remove(String),
    SyncNames,
}

/// How much of the unsynced reached the disk when the power went. Sectors do so in any order,
/// changes of names in theirs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kept {
    Nothing,
    All,
    /// The first so many sectors, and changes of names.
    First(usize),
    /// All but one sector; all changes of names.
    AllBut(usize),
    /// All sectors, no changes of names.
    Sectors,
    /// Drawn by this number.
    Some(u64),
}

impl Kept {
    fn sector(self, n: usize) -> bool {
        match self {
            Self::Nothing => false,
            Self::All | Self::Sectors => true,
            Self::First(count) => n < count,
            Self::AllBut(lost) => n != lost,
            Self::Some(seed) => draw(seed, n) & 1 == 0,
        }
    }

    fn names(self, of: usize) -> usize {
        match self {
            Self::Nothing | Self::Sectors => 0,
            Self::All | Self::AllBut(_) => of,
            Self::First(count) => count.min(of),
            Self::Some(seed) => draw(seed, usize::MAX) as usize % (of + 1),
        }
    }
}

fn draw(seed: u64, n: usize) -> u8 {
    blake3::hash(&[seed.to_le_bytes(), (n as u64).to_le_bytes()].concat()).as_bytes()[0]
}

impl SimDisk {
    /// With room for so many bytes.
    pub(super) fn with_capacity(bytes: u64) -> Self {
        let disk = Self::default();
        disk.set_capacity(bytes);
        disk
    }

    pub(super) fn set_capacity(&self, bytes: u64) {
        self.lock().capacity = Some(bytes);
    }

    pub(super) fn fail_syncs(&self, fail: bool) {
        self.lock().fails_to_sync = fail;
    }

    /// Syncs do not return until they are let go.
    pub(super) fn hold_syncs(&self, hold: bool) {
        self.lock().holds_syncs = hold;
        self.shared.changed.notify_all();
    }

    /// Waits until a sync is being held.
    pub(super) fn wait_for_held_sync(&self) {
        let mut state = self.lock();
        while state.syncs_held == 0 {
            state = self.shared.changed.wait(state).unwrap();
        }
    }

    /// From now on this is called before each change, with the number of those before.
    pub(crate) fn watch(&self, watch: impl FnMut(usize) + Send + 'static) {
        *self.shared.watcher.0.lock().unwrap() = Some(Box::new(watch));
    }

    fn about_to_change(&self) {
        let changes = self.changes();
        if let Some(watch) = &mut *self.shared.watcher.0.lock().unwrap() {
            watch(changes);
        }
    }

    /// How many changes it has seen.
    pub(crate) fn changes(&self) -> usize {
        self.lock().changes.len()
    }

    /// How many times a file was synced.
    pub(super) fn syncs(&self) -> usize {
        self.lock().changes.iter().filter(|c| matches!(c, Change::Sync(_))).count()
    }

    /// How many sectors were unsynced after so many changes.
    pub(super) fn unsynced(&self, changes: usize) -> usize {
        let state = self.lock();
        split(&state.changes[..changes]).1.len()
    }

    /// The disk as a machine finds it whose power went after so many changes.
    pub(crate) fn after(&self, changes: usize, kept: Kept) -> Self {
        let old = self.lock();
        let (mut files, sectors, mut names, renames) = split(&old.changes[..changes]);
        for (n, (file, at, bytes)) in sectors.into_iter().enumerate() {
            if kept.sector(n) {
                files[file][at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        let count = kept.names(renames.len());
        for change in &renames[..count] {
            rename(&mut names, change);
        }
        Self::of(files, names, old.boot + 1, old.capacity)
    }

    /// The disk as the next process finds it.
    pub(super) fn after_kill(&self) -> Self {
        let old = self.lock();
        Self::of(old.files.clone(), old.names.clone(), old.boot, old.capacity)
    }

    fn of(
        files: Vec<Vec<u8>>,
        names: BTreeMap<String, usize>,
        boot: u8,
        capacity: Option<u64>,
    ) -> Self {
        let mut changes = Vec::new();
        for (n, bytes) in files.iter().enumerate() {
            let name = names.iter().find(|(_, file)| **file == n).map(|(name, _)| name.clone());
            changes.push(Change::Create(name.unwrap_or_default(), n, bytes.len() as u64));
            changes.push(Change::Write(n, 0, bytes.clone()));
            changes.push(Change::Sync(n));
        }
        changes.push(Change::Remove(String::new()));
        changes.push(Change::SyncNames);
        let state = State { files, names, changes, boot, capacity, ..State::default() };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), ..Shared::default() }) }
    }

    /// Names and sizes of its files.
    pub(super) fn files(&self) -> Vec<(String, u64)> {
        let state = self.lock();
        state.names.iter().map(|(name, &n)| (name.clone(), state.files[n].len() as u64)).collect()
    }

    /// Flips one bit.
    pub(super) fn flip(&self, name: &str, at: u64, bit: u8) {
        let mut state = self.lock();
        let file = state.names[name];
        state.files[file][at as usize] ^= 1 << bit;
    }

    /// What was set aside.
    pub(super) fn aside(&self, name: &str) -> Option<Vec<u8>> {
        self.lock().aside.get(name).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }
}

type Sectors = Vec<(usize, usize, Vec<u8>)>;

/// Durable bytes, unsynced sectors, durable names, unsynced changes of names.
fn split(changes: &[Change]) -> (Vec<Vec<u8>>, Sectors, BTreeMap<String, usize>, Vec<Change>) {
    let (mut files, mut sectors, mut names, mut renames) =
        (Vec::<Vec<u8>>::new(), Sectors::new(), BTreeMap::new(), Vec::new());
    for change in changes {
        match change {
            Change::Create(_, file, bytes) => {
                files.resize_with(files.len().max(file + 1), Vec::new);
                files[*file] = vec![0; *bytes as usize];
                renames.push(change.clone());
            }
            Change::Write(file, at, bytes) => {
                let (mut at, mut rest) = (*at as usize, &bytes[..]);
                while !rest.is_empty() {
                    let part = rest.len().min(SECTOR_BYTES - at % SECTOR_BYTES);
                    sectors.push((*file, at, rest[..part].to_vec()));
                    (at, rest) = (at + part, &rest[part..]);
                }
            }
            Change::Sync(synced) => sectors.retain(|(file, at, bytes)| {
                if file == synced {
                    files[*file][*at..at + bytes.len()].copy_from_slice(bytes);
                }
                file != synced
            }),
            Change::SyncNames => renames.drain(..).for_each(|change| rename(&mut names, &change)),
            Change::Rename(..) | Change::Remove(_) => renames.push(change.clone()),
        }
    }
    (files, sectors, names, renames)
}

fn rename(names: &mut BTreeMap<String, usize>, change: &Change) {
    match change {
        Change::Create(name, file, _) => {
            names.insert(name.clone(), *file);
        }
        Change::Rename(from, to) => {
            let file = names.remove(from).expect("the name is there");
            names.insert(to.clone(), file);
        }
        Change::Remove(name) => {
            names.remove(name);
        }
        Change::Write(..) | Change::Sync(_) | Change::SyncNames => {}
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: usize,
}

impl LogDisk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().names.keys().cloned().collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn LogFile>> {
        self.about_to_change();
        let mut state = self.lock();
        let used: u64 = state.names.values().map(|&file| state.files[file].len() as u64).sum();
        if state.capacity.is_some_and(|capacity| used + bytes > capacity) {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        let file = state.files.len();
        state.files.push(vec![0; bytes as usize]);
        state.names.insert(name.to_owned(), file);
        state.changes.push(Change::Create(name.to_owned(), file, bytes));
        Ok(Arc::new(SimFile { disk: self.clone(), file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        let file = *self.lock().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.about_to_change();
        let mut state = self.lock();
        let file = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        assert_eq!(state.names.insert(to.to_owned(), file), None, "{to} was free");
        state.changes.push(Change::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.about_to_change();
        let mut state = self.lock();
        state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.changes.push(Change::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.about_to_change();
        self.lock().changes.push(Change::SyncNames);
        Ok(())
    }

    fn set_aside(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
        self.lock().aside.insert(name.to_owned(), bytes.to_owned());
        Ok(name.into())
    }

    fn boot(&self) -> [u8; 16] {
        [self.lock().boot; 16]
    }
}

impl LogFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.lock().files[self.file].len() as u64)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.disk.lock();
        bytes.copy_from_slice(&state.files[self.file][offset as usize..][..bytes.len()]);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.about_to_change();
        let mut state = self.disk.lock();
        let file = &mut state.files[self.file];
        file[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        state.changes.push(Change::Write(self.file, offset, bytes.to_owned()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.about_to_change();
        let mut state = self.disk.lock();
        // What it covers is what was written before it began.
        let covered = state.changes.len();
        state.syncs_held += 1;
        self.disk.shared.changed.notify_all();
        while state.holds_syncs {
            state = self.disk.shared.changed.wait(state).unwrap();
        }
        state.syncs_held -= 1;
        if state.fails_to_sync {
            return Err(io::Error::other("the disk failed"));
        }
        state.changes.insert(covered, Change::Sync(self.file));
        Ok(())
    }
}
