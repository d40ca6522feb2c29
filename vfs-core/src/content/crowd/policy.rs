//! Which files are fetched before they are asked for: pure decisions, for all walks at once.
//!
//! A *walk* is a program, or a thread of one, that reads small files in the order of a tree.
//! Each one begins with a read that had to come from the network, and knows which files would
//! follow it, its *guesses*. So long as what is read next is among the first of these, the
//! walk goes on; after a few steps its window opens, and guesses are fetched. The window
//! doubles while these are opened, shrinks when one is passed over, and closes when more were
//! fetched in vain than were used. Then, or when a walk just ends, the next one in its place
//! needs as many more steps as files were fetched for nothing. So what is wasted stays below
//! what was read in order, whatever a program does.
//!
//! A walk is known by its guesses alone: several programs in one directory are told apart, and
//! random reads, which are nobody's guess, fetch nothing.

use super::order::{Found, Place, Reach, Tree, search};
use crate::index::IndexError;
use crate::model::{Entry, FileId, LocationNo, Name};
use dashmap::DashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A file of a location.
pub(super) type FileKey = (LocationNo, FileId);

/// Walks that are known at once: the threads of a few programs.
const MAX_WALKS: usize = 16;
/// Reads in order before anything is fetched ahead. Of two neighbours nothing follows yet: a
/// person looks at two notes, a program at a file and its lock.
const STEPS: usize = 3;
/// How many wanted files may be passed over from one step to the next.
const GAP: usize = 3;
/// The first window, in files.
const FIRST_WINDOW: usize = 4;
/// The widest window: at 20 ms, 5,000 files in 0.4 s, more than a daemon fetches.
const MAX_WINDOW: usize = 256;
/// The most that may be fetched, or under way, and not opened yet, of all walks.
pub(super) const MAX_AHEAD_BYTES: u64 = 8 << 20;
/// Of a walk that has read little not more than this is fetched, and of others not more than twice
/// what they have read.
const FIRST_BYTES: u64 = 64 << 10;
/// A guess is given up when the reader is so many files beyond it: threads that share a
/// directory open its files a little out of order.
const DISORDER: u64 = 16;
/// The next read comes within this time, or it belongs to no walk.
const PAUSE: Duration = Duration::from_secs(5);

/// The files that are guesses of some walk, to be asked without waiting for a decision.
#[derive(Default)]
pub(super) struct Guessed(DashMap<FileKey, usize>);

impl Guessed {
    pub fn contains(&self, file: FileKey) -> bool {
        self.0.contains_key(&file)
    }

    fn add(&self, file: FileKey) {
        *self.0.entry(file).or_default() += 1;
    }

    fn remove(&self, file: FileKey) {
        self.0.remove_if_mut(&file, |_, walks| {
            *walks -= 1;
            *walks == 0
        });
    }
}

/// All walks.
pub(super) struct Walks {
    walks: Vec<Walk>,
    next_no: u64,
    guessed: Arc<Guessed>,
}

/// What a plan may do.
pub(super) struct Means<'a> {
    pub tree: &'a dyn Tree,
    /// Whether a file is worth fetching: small, and not here.
    pub wanted: &'a dyn Fn(&Entry) -> bool,
    /// The most bytes ahead of all walks.
    pub max_bytes: u64,
}

struct Guess {
    seq: u64,
    found: Found,
    /// It was handed out to be fetched.
    is_sent: bool,
}

impl Guess {
    /// What it takes of a cache with blocks of 4 KiB.
    fn bytes(&self) -> u64 {
        self.found.entry.attr.size.next_multiple_of(4096)
    }
}

struct Walk {
    no: u64,
    location: LocationNo,
    guessed: Arc<Guessed>,
    /// In the order in which they are expected, but for what comes after a first descent.
    guesses: VecDeque<Guess>,
    next_seq: u64,
    /// The guess furthest on that was right.
    furthest: u64,
    /// Where the search for guesses goes on.
    place: Place,
    /// The last file that was read, and its directory.
    last: FileId,
    dir: FileId,
    /// The highest directory that the reader was seen to have gone on in after one below it.
    top: FileId,
    /// The reader was seen to go into another directory.
    descends: bool,
    /// Reads in order so far.
    steps: usize,
    /// What was read in order, since it began.
    read_bytes: u64,
    /// Files that may be fetched and not opened; 0 while it is not clear that it is a walk.
    window: usize,
    /// Of what was fetched: opened since the window grew last; opened, and not, since it opened.
    grown_by: usize,
    used: usize,
    wasted: usize,
    /// Steps that it needs on top of the others, for what was fetched in vain.
    penalty: usize,
    began: Instant,
    used_at: Instant,
}

impl Walks {
    pub fn new(guessed: Arc<Guessed>) -> Self {
        Self { walks: Vec::new(), next_no: 0, guessed }
    }

    /// A guess was opened, or read; gives its walk, which may want a plan.
    pub fn opened(&mut self, file: FileKey, now: Instant) -> Option<usize> {
        self.end_idle(now);
        let is_of = |walk: &Walk| walk.guess(file).is_some();
        let best = (0..self.walks.len()).filter(|at| is_of(&self.walks[*at]));
        let best = best.max_by_key(|at| self.walks[*at].steps)?;
        let stale = self.unread_of_others(best);
        self.walks[best].step(file, stale, now);
        // Threads that began side by side in one directory go on as one walk.
        let no = self.walks[best].no;
        self.walks.retain(|walk| walk.no == no || walk.window > 0 || !is_of(walk));
        self.walks.iter().position(|walk| walk.no == no)
    }

    /// A small file was read that was not here; gives its walk, which wants a plan.
    pub fn missed(
        &mut self,
        file: FileKey,
        (dir, name): (FileId, &Name),
        now: Instant,
    ) -> Option<usize> {
        if let Some(walk) = self.opened(file, now) {
            return Some(walk);
        }
        if self.walks.iter().any(|walk| (walk.location, walk.last) == file) {
            return None;
        }
        if self.walks.len() == MAX_WALKS {
            let idle = (0..MAX_WALKS).min_by_key(|at| self.walks[*at].used_at)?;
            self.walks.remove(idle);
        }
        self.next_no += 1;
        let guessed = self.guessed.clone();
        self.walks.push(Walk::begin(self.next_no, file, (dir, name), guessed, now));
        Some(self.walks.len() - 1)
    }

    /// Keeps the guesses of a walk filled; gives those that are to be fetched now.
    pub fn plan(&mut self, walk: usize, means: &Means<'_>) -> Result<Vec<Found>, IndexError> {
        let others = self.walks.iter().enumerate().filter(|(at, _)| *at != walk);
        let taken: u64 = others.map(|(_, other)| other.unread_bytes()).sum();
        let max_bytes = means.max_bytes.saturating_sub(taken);
        self.walks[walk].plan(&Means { max_bytes, ..*means })
    }

    /// Nobody gives the files of this location now.
    pub fn failed(&mut self, location: LocationNo) {
        self.walks.retain(|walk| walk.location != location);
    }

    fn end_idle(&mut self, now: Instant) {
        // Walks that fetched something are remembered, for whoever comes after them.
        for walk in &mut self.walks {
            if now.duration_since(walk.used_at) > PAUSE && walk.window > 0 {
                walk.steps = 0;
                walk.window = 0;
            }
        }
        let is_idle = |walk: &Walk| now.duration_since(walk.used_at) > PAUSE;
        self.walks.retain(|walk| !is_idle(walk) || walk.unread() > 0);
    }

    /// Files that were fetched in the directory of a walk for others, and that nobody opened
    /// since it began.
    fn unread_of_others(&self, walk: usize) -> usize {
        let walk = &self.walks[walk];
        let others = self.walks.iter().filter(|other| {
            (other.location, other.dir) == (walk.location, walk.dir) && other.used_at < walk.began
        });
        others.map(Walk::unread).sum()
    }
}

impl Walk {
    fn begin(
        no: u64,
        (location, file): FileKey,
        (dir, name): (FileId, &Name),
        guessed: Arc<Guessed>,
        now: Instant,
    ) -> Self {
        Self {
            no,
            location,
            guessed,
            guesses: VecDeque::new(),
            next_seq: 1,
            furthest: 0,
            place: Place::after(dir, name, dir),
            last: file,
            dir,
            top: dir,
            descends: false,
            steps: 1,
            read_bytes: 0,
            window: 0,
            grown_by: 0,
            used: 0,
            wasted: 0,
            penalty: 0,
            began: now,
            used_at: now,
        }
    }

    fn guess(&self, (location, file): FileKey) -> Option<usize> {
        let is_it = |guess: &Guess| guess.found.entry.file_id == file;
        (location == self.location).then(|| self.guesses.iter().position(is_it)).flatten()
    }

    /// Files that were fetched and not opened.
    fn unread(&self) -> usize {
        self.guesses.iter().filter(|guess| guess.is_sent).count()
    }

    fn unread_bytes(&self) -> u64 {
        self.guesses.iter().filter(|guess| guess.is_sent).map(Guess::bytes).sum()
    }

    /// A guess was right. `stale`: what others fetched here in vain.
    fn step(&mut self, file: FileKey, stale: usize, now: Instant) {
        let Some(guess) = self.guess(file).and_then(|at| self.take(at)) else { return };
        self.steps += 1;
        self.read_bytes += guess.bytes();
        self.last = file.1;
        self.used_at = now;
        if guess.seq > self.furthest {
            self.furthest = guess.seq;
            self.go_to(&guess.found);
        }
        if guess.is_sent {
            self.used += 1;
            self.grown_by += 1;
        }
        self.pass();
        if self.window == 0 && self.steps >= STEPS + self.penalty + stale {
            (self.window, self.grown_by, self.used, self.wasted) = (FIRST_WINDOW, 0, 0, 0);
        } else if self.window > 0 && self.grown_by * 2 >= self.window {
            (self.window, self.grown_by) = ((self.window * 2).min(MAX_WINDOW), 0);
        }
    }

    /// The reader is in this directory now.
    fn go_to(&mut self, found: &Found) {
        let climbed = found.top != self.top;
        if found.dir != self.dir && !climbed && !self.descends {
            // Only the first file below was a guess: the others come before what was guessed
            // to follow it, and that comes again after them.
            self.place = Place::after(found.dir, &found.name, found.top);
            self.forget_guesses();
        }
        self.descends |= found.dir != self.dir;
        (self.dir, self.top) = (found.dir, found.top);
    }

    /// Gives up what lies behind.
    fn pass(&mut self) {
        let mut wasted = 0;
        while self.guesses.front().is_some_and(|guess| guess.seq + DISORDER < self.furthest) {
            wasted += usize::from(self.take(0).is_some_and(|guess| guess.is_sent));
        }
        if wasted == 0 {
            return;
        }
        self.wasted += wasted;
        self.window = (self.window / 2).max(FIRST_WINDOW);
        self.grown_by = 0;
        if self.wasted > self.used + FIRST_WINDOW {
            self.penalty += self.wasted;
            (self.window, self.steps) = (0, 0);
        }
    }

    fn plan(&mut self, means: &Means<'_>) -> Result<Vec<Found>, IndexError> {
        let ahead = self.guesses.iter().filter(|guess| guess.seq > self.furthest);
        let (ahead, sent) = (ahead.clone().count(), ahead.filter(|guess| guess.is_sent).count());
        // In batches, so that a search is paid for by several files.
        if self.window > 0 && sent * 2 > self.window {
            return Ok(Vec::new());
        }
        let files = self.window.max(GAP).saturating_sub(ahead);
        if files > 0 {
            let beyond = self.guesses.iter().filter(|guess| guess.found.top != self.top).count();
            let beyond = GAP.saturating_sub(beyond);
            let reach = Reach { files, top: self.top, descends: self.descends, beyond };
            let found = search(means.tree, &mut self.place, &reach, means.wanted)?;
            found.into_iter().for_each(|found| self.add(found));
        }
        Ok(self.send(sent, means))
    }

    /// The guesses that are to be fetched now, as far as it is clear that the reader goes there.
    fn send(&mut self, ahead: usize, means: &Means<'_>) -> Vec<Found> {
        let mut bytes = self.unread_bytes();
        let most = means.max_bytes.min((2 * self.read_bytes).max(FIRST_BYTES));
        let (dir, top, descends, furthest) = (self.dir, self.top, self.descends, self.furthest);
        let clear = |found: &Found| found.top == top && (descends || found.dir == dir);
        let is_next =
            |guess: &&mut Guess| !guess.is_sent && guess.seq > furthest && clear(&guess.found);
        let mut sent = Vec::new();
        for guess in self.guesses.iter_mut().filter(is_next) {
            bytes += guess.bytes();
            if ahead + sent.len() >= self.window || bytes > most {
                break;
            }
            // It may have come meanwhile by another way.
            guess.is_sent = (means.wanted)(&guess.found.entry);
            if guess.is_sent {
                sent.push(guess.found.clone());
            }
        }
        sent
    }

    fn add(&mut self, found: Found) {
        self.guessed.add((self.location, found.entry.file_id));
        self.guesses.push_back(Guess { seq: self.next_seq, found, is_sent: false });
        self.next_seq += 1;
    }

    fn take(&mut self, at: usize) -> Option<Guess> {
        let guess = self.guesses.remove(at)?;
        self.guessed.remove((self.location, guess.found.entry.file_id));
        Some(guess)
    }

    fn forget_guesses(&mut self) {
        while self.take(0).is_some() {}
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        self.forget_guesses();
    }
}
