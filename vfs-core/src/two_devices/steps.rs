//! What may happen. A step means something whatever went before it, so that any part of a
//! history is a history.

use super::link::Ending;
use crate::outbox::Lane;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// A path below the location's folder.
pub(super) type At = Vec<&'static str>;

/// Open files at once.
pub(super) const SLOTS: usize = 3;

/// Where bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Where {
    /// The file is opened with `O_TRUNC`.
    Anew,
    /// `O_APPEND`.
    End,
    Offset(u64),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Makes a file, writes, closes. The bytes are so many of one that tells the write.
    Make(At, u8, usize),
    /// Opens, writes, closes.
    Write(At, Where, u8, usize),
    Resize(At, u64),
    Mkdir(At),
    Rmdir(At),
    Unlink(At),
    Rename(At, At),
    RenameNoReplace(At, At),
    Exchange(At, At),
    Link(At, At),
    Symlink(At, &'static str),
    Chmod(At, u16),
    Touch(At, i64),
    /// A handle for reading and writing that stays open.
    Open(usize, At),
    Put(usize, u64, u8, usize),
    Fsync(usize),
    Close(usize),
    /// A batch of at most so many operations.
    Deliver(Lane, usize, Ending),
    /// About so many bytes of rows reach the replica.
    Rows(usize),
    /// What happens at the writer by itself.
    Tend,
    Cut,
    Connect,
    RestartWriter,
    RestartOwner,
    /// Everything is delivered, and looked at.
    Quiet,
    /// A program of the owner.
    Theirs(Theirs),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Theirs {
    /// Writes a new file and renames it over the old one.
    Save(At, u8, usize),
    /// Truncates and writes.
    Write(At, u8, usize),
    Append(At, u8, usize),
    Unlink(At),
    Rename(At, At),
    Mkdir(At),
    RemoveAll(At),
    Chmod(At, u16),
    /// The indexer has seen everything.
    Observed,
}

const FILES: [&str; 3] = ["a", "b", "c"];
const DIRS: [&str; 2] = ["d", "e"];

struct Draw(StdRng, u8);

impl Draw {
    fn any<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.0.random_range(0..of.len())].clone()
    }

    fn parent(&mut self) -> At {
        self.any(&[vec![], vec![], vec!["d"], vec!["d"], vec!["e"], vec!["d", "e"], vec!["e", "d"]])
    }

    fn file(&mut self) -> At {
        let mut at = self.parent();
        at.push(self.any(&FILES));
        at
    }

    fn dir(&mut self) -> At {
        let mut at = self.any(&[vec![], vec![], vec!["d"], vec!["e"]]);
        at.push(self.any(&DIRS));
        at
    }

    /// Mostly a file.
    fn place(&mut self) -> At {
        match self.0.random_range(0..4) {
            0 => self.dir(),
            _ => self.file(),
        }
    }

    /// Another letter each time, so that bytes tell who wrote them when.
    fn tag(&mut self) -> u8 {
        const TAGS: &[u8] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        self.1 = self.1.wrapping_add(1);
        TAGS[usize::from(self.1) % TAGS.len()]
    }

    /// Small ones travel inside of operations, large ones are pulled.
    fn len(&mut self) -> usize {
        match self.0.random_range(0..12) {
            0 => 70_000,
            1 => 9_000,
            2 => 0,
            _ => self.0.random_range(1..20),
        }
    }

    fn offset(&mut self) -> u64 {
        self.any(&[0, 0, 3, 5, 10, 30, 5_000, 66_000])
    }

    fn whence(&mut self) -> Where {
        match self.0.random_range(0..4) {
            0 => Where::Anew,
            1 => Where::End,
            _ => Where::Offset(self.offset()),
        }
    }

    fn slot(&mut self) -> usize {
        self.0.random_range(0..SLOTS)
    }

    fn write(&mut self) -> Step {
        match self.0.random_range(0..30) {
            0..5 => Step::Make(self.file(), self.tag(), self.len()),
            5..10 => Step::Write(self.file(), self.whence(), self.tag(), self.len()),
            10 => Step::Resize(self.file(), self.offset()),
            11..13 => Step::Mkdir(self.dir()),
            13 => Step::Rmdir(self.dir()),
            14..16 => Step::Unlink(self.file()),
            16..19 => Step::Rename(self.place(), self.place()),
            19 => Step::Rename(self.dir(), self.dir()),
            20 => Step::RenameNoReplace(self.place(), self.place()),
            21 => Step::Exchange(self.place(), self.place()),
            22 => Step::Link(self.file(), self.file()),
            23 => Step::Symlink(self.file(), self.any(&["a", "x/y"])),
            24 => Step::Chmod(self.place(), self.any(&[0o600, 0o755, 0o700])),
            25 => Step::Touch(self.file(), self.0.random_range(1..1_000_000)),
            26 => Step::Open(self.slot(), self.file()),
            27..29 => Step::Put(self.slot(), self.offset(), self.tag(), self.len()),
            _ => match self.0.random_range(0..2) {
                0 => Step::Fsync(self.slot()),
                _ => Step::Close(self.slot()),
            },
        }
    }

    fn between(&mut self) -> Step {
        let ops = self.any(&[1, 2, 3, 100]);
        match self.0.random_range(0..16) {
            0..3 => Step::Deliver(Lane::Small, ops, Ending::Well),
            3 => Step::Deliver(Lane::Bulk, 1, Ending::Well),
            4 => Step::Deliver(Lane::Small, ops, Ending::Unheard(self.any(&[0, 1, 2, 100]))),
            5 => Step::Deliver(Lane::Bulk, 1, Ending::Unheard(self.any(&[0, 1]))),
            6 => Step::Deliver(Lane::Small, ops, Ending::Half(self.any(&[0, 1, 2]))),
            7..10 => Step::Rows(self.any(&[1, 1 << 20])),
            10..12 => Step::Tend,
            12 => self.any(&[Step::Cut, Step::Connect]),
            13 => Step::RestartWriter,
            14 => self.any(&[Step::Tend, Step::Tend, Step::RestartOwner]),
            _ => self.any(&[Step::Rows(1 << 20), Step::Quiet]),
        }
    }

    /// Both write to one file that both have seen.
    fn clash(&mut self) -> Vec<Step> {
        let at = vec![self.any(&FILES)];
        let mine = Step::Write(at.clone(), self.whence(), self.tag(), self.len());
        let theirs = Step::Theirs(Theirs::Save(at.clone(), self.tag(), self.len()));
        let made = Step::Make(at, self.tag(), self.len());
        vec![made, Step::Quiet, mine, theirs]
    }

    fn theirs(&mut self) -> Theirs {
        match self.0.random_range(0..12) {
            0..3 => Theirs::Save(self.file(), self.tag(), self.len()),
            3..5 => Theirs::Write(self.file(), self.tag(), self.len()),
            5 => Theirs::Append(self.file(), self.tag(), self.len()),
            6 => Theirs::Unlink(self.file()),
            7 => Theirs::Rename(self.place(), self.place()),
            8 => Theirs::Mkdir(self.dir()),
            9 => Theirs::RemoveAll(self.dir()),
            10 => Theirs::Chmod(self.place(), self.any(&[0o600, 0o755])),
            _ => Theirs::Observed,
        }
    }
}

fn begin(seed: u64) -> Draw {
    Draw(StdRng::seed_from_u64(seed), 0)
}

/// Only the writer changes things.
pub(super) fn pure(seed: u64, steps: usize) -> Vec<Step> {
    let mut draw = begin(seed);
    let mut step = |_| match draw.0.random_range(0..10) {
        0..6 => draw.write(),
        _ => draw.between(),
    };
    (0..steps).map(&mut step).collect()
}

/// The owner's programs change things too.
pub(super) fn meeting(seed: u64, steps: usize) -> Vec<Step> {
    let mut draw = begin(seed);
    let mut history = Vec::new();
    while history.len() < steps {
        match draw.0.random_range(0..10) {
            0..3 => history.push(draw.write()),
            3 => history.extend(draw.clash()),
            4..6 => history.push(Step::Theirs(draw.theirs())),
            _ => history.push(draw.between()),
        }
    }
    history
}
