//! Comparing the rows of a location with its disk, without changing either.
//!
//! For whoever doubts the index: every directory is read again, in the memory of one of them and
//! of the numbers of those that wait. Rows follow a disk that is written to a little later, so
//! each difference is looked at twice, with some time between in which everything was applied
//! that was noted until the first look. Only what is still exactly the same then, row and disk,
//! is a difference.

use super::place::{Place, lock};
use super::scan::is_gone;
use super::{Core, Indexer};
use crate::error::{FsResult, Kind};
use crate::index::{Difference, Differences, Differs};
use crate::local::{Listing, Root, list_dir};
use crate::model::{FileId, LocationNo, Name};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The least time between two looks: an event is noted, and due, long before.
const SETTLE: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 2000 });
/// How long what was noted may take to be applied; beyond that nothing can be told.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked whether it was.
const POLL: Duration = Duration::from_millis(20);
/// Differences that wait for their second look at once: about 1 MiB. What a directory has more of
/// them is not counted.
const DOUBTS: usize = 65_536;
/// Paths that are named, of however many differ.
const EXAMPLES: usize = 5;
/// Directories that are noted as differing.
const DIRECTORIES: usize = 1024;

/// What a comparison found so far.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Compared {
    /// Entries of the disk that were looked at.
    pub entries: u64,
    /// Entries of the disk that have no row.
    pub unindexed: u64,
    /// Rows that say something else than the disk.
    pub changed: u64,
    /// Rows of which the disk has nothing.
    pub vanished: u64,
    /// There are more of these.
    pub has_more: bool,
    /// Differences that may be none: the indexer was not done with what it had to look at.
    pub undecided: u64,
    /// Directories that could not be read; their rows are neither right nor wrong.
    pub unread: u64,
    /// Those of them that this user may not read.
    pub forbidden: u64,
    /// Some of what differs or could not be read, by their paths.
    pub examples: Vec<Vec<Name>>,
    /// Directories with differences; as many as are noted.
    pub directories: Vec<FileId>,
}

impl Compared {
    /// How many entries are surely not as the index has them.
    pub fn differences(&self) -> u64 {
        self.unindexed + self.changed + self.vanished
    }

    fn add(&mut self, path: &[Name], found: &Difference) {
        *match found.how {
            Differs::Unindexed => &mut self.unindexed,
            Differs::Changed => &mut self.changed,
            Differs::Vanished => &mut self.vanished,
        } += 1;
        self.name(path, Some(&found.name));
    }

    fn name(&mut self, path: &[Name], name: Option<&Name>) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(path.iter().chain(name).cloned().collect());
        }
    }

    fn note(&mut self, dir: FileId) {
        match self.directories.len() < DIRECTORIES {
            true => self.directories.push(dir),
            false => self.has_more = true,
        }
    }
}

/// Hears how far a comparison is, and says whether to go on.
pub type Hear<'a> = &'a mut dyn FnMut(&Compared) -> ControlFlow<()>;

impl Indexer {
    /// Compares every row of the location with its disk. `hear` may end it: the result is then of
    /// what was compared.
    ///
    /// # Errors
    /// The location is offline, or went so.
    pub fn compare(&self, location: LocationNo, hear: Hear<'_>) -> FsResult<Compared> {
        let place = self.core.known_place(location)?;
        let root = self.core.open(&place, false)?;
        let mut comparison = Comparison::new(&self.core, &place, root, hear);
        comparison.run()?;
        Ok(comparison.compared)
    }

    /// Lists these directories again, soon; with [`Compared::has_more`] the whole location.
    pub fn follow_up(&self, location: LocationNo, compared: &Compared) {
        if compared.has_more {
            return self.rescan(location);
        }
        if let Some(place) = self.core.place(location) {
            compared.directories.iter().for_each(|dir| self.core.list_again(&place, *dir));
        }
    }
}

/// A directory in which something differed at the first look.
struct Doubt {
    dir: FileId,
    marks: HashSet<u64>,
}

struct Comparison<'a> {
    core: &'a Core,
    place: &'a Place,
    root: Arc<Root>,
    compared: Compared,
    doubts: Vec<Doubt>,
    /// Marks in them.
    doubted: usize,
    hear: Hear<'a>,
    is_ended: bool,
}

impl<'a> Comparison<'a> {
    fn new(core: &'a Core, place: &'a Place, root: Arc<Root>, hear: Hear<'a>) -> Self {
        let (compared, doubts, doubted, is_ended) = Default::default();
        Self { core, place, root, compared, doubts, doubted, hear, is_ended }
    }

    fn run(&mut self) -> FsResult<()> {
        let mut waiting = vec![FileId::ROOT];
        while let Some(dir) = waiting.pop().filter(|_| !self.is_ended) {
            waiting.extend(self.first_look(dir)?);
            if self.doubted >= DOUBTS {
                self.second_looks()?;
            }
            self.tell();
        }
        self.second_looks()
    }

    fn tell(&mut self) {
        self.is_ended |= (self.hear)(&self.compared).is_break()
            || self.core.is_stopping()
            || self.place.forgotten.load(Ordering::Acquire);
    }

    /// Gives the subdirectories.
    fn first_look(&mut self, dir: FileId) -> FsResult<Vec<FileId>> {
        let Some((path, looked)) = self.look(dir)? else { return Ok(Vec::new()) };
        let Differences { directories, found } = match looked {
            Ok((entries, differences)) => {
                self.compared.entries += entries;
                differences
            }
            Err(e) => {
                self.compared.unread += 1;
                self.compared.forbidden += u64::from(e.kind() == Kind::AccessDenied);
                self.compared.name(&path, None);
                return Ok(Vec::new());
            }
        };
        if !found.is_empty() {
            let room = DOUBTS.saturating_sub(self.doubted).max(1);
            self.compared.has_more |= found.len() > room;
            let marks: HashSet<_> = found.iter().take(room).map(|found| found.mark).collect();
            self.doubted += marks.len();
            self.doubts.push(Doubt { dir, marks });
        }
        Ok(directories)
    }

    fn second_looks(&mut self) -> FsResult<()> {
        let doubts = std::mem::take(&mut self.doubts);
        self.doubted = 0;
        if doubts.is_empty() || self.is_ended {
            return Ok(());
        }
        if !self.wait_for_the_indexer() {
            self.compared.undecided += doubts.iter().map(|d| d.marks.len() as u64).sum::<u64>();
            return Ok(());
        }
        for Doubt { dir, marks } in doubts {
            let Some((path, Ok((_, Differences { found, .. })))) = self.look(dir)? else {
                continue;
            };
            let mut still = found.iter().filter(|found| marks.contains(&found.mark)).peekable();
            if still.peek().is_some() {
                self.compared.note(dir);
            }
            still.for_each(|found| self.compared.add(&path, found));
            self.tell();
        }
        Ok(())
    }

    /// Until all is applied that was noted before; `false`: that takes too long.
    fn wait_for_the_indexer(&mut self) -> bool {
        let settled = Instant::now() + SETTLE;
        self.wait(settled, |_| false);
        let mark = lock(&self.core.hints).mark();
        let deadline = Instant::now() + PATIENCE;
        self.wait(deadline, |this| {
            lock(&this.core.hints).is_applied(mark) && !this.place.is_scanning()
        })
    }

    fn wait(&mut self, deadline: Instant, is_over: impl Fn(&Self) -> bool) -> bool {
        while !is_over(self) {
            if Instant::now() >= deadline || self.is_ended {
                return false;
            }
            std::thread::sleep(POLL);
            self.tell();
        }
        true
    }

    /// A directory's path, and what differs in it; nothing of one that is not there, which is a
    /// difference of the one above it, if it is one.
    fn look(&self, dir: FileId) -> FsResult<Option<(Vec<Name>, FsResult<Looked>)>> {
        // Nobody is between a look at it and its record.
        let _order = self.place.order(dir);
        let Some(path) = self.core.index.view()?.path(self.place.no, dir)? else { return Ok(None) };
        let looked = self.list(dir, &path);
        // Without the folder nothing can be told.
        self.place.confirm(&self.root)?;
        match looked {
            Ok(None) => Ok(None),
            Err(e) if is_gone(&e) => Ok(None),
            Ok(Some(listing)) => {
                let entries = listing.entries.len() as u64;
                let found = self.core.index.differences(self.place.no, dir, listing.entries)?;
                Ok(Some((path, Ok((entries, found)))))
            }
            Err(e) => Ok(Some((path, Err(e)))),
        }
    }

    fn list(&self, dir: FileId, path: &[Name]) -> FsResult<Option<Listing>> {
        let open = match self.root.open_dir(path) {
            // Something is mounted over it: what is below is not the location's.
            Err(e) if e.kind() == Kind::CrossDevice => return Ok(None),
            opened => opened?,
        };
        let listing = list_dir(open.as_fd())?;
        let known = self.core.index.view()?.node(self.place.no, dir)?;
        let is_known = known.is_some_and(|known| known.entry.disk_ino == listing.own_ino);
        Ok((dir == FileId::ROOT || is_known).then_some(listing))
    }
}

/// How many entries a directory has, and which of them differ.
type Looked = (u64, Differences);
