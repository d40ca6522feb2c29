//! Which programs do not pull in a library.
//!
//! A thumbnailer reads a whole photo for an icon of it, an indexer every file that it finds.
//! From another device that is the whole library over the network, for nobody who waits for it.
//! So a program that is known by its name ([`programs`]) gets less than others: by its
//! [`Purpose`], and by the [`Mode`] that is set for that.
//!
//! Decided once, when a file is opened, and never later: a read that failed in the middle would
//! leave half an image as the thumbnail of a photo, and kill a program that has mapped the file.
//! Files whose bytes are all here are never asked about, nor are those of this device, nor files
//! that are opened to be changed. What a mount does not know is who opens; it gives names
//! ([`Program`]), and finds them only when they are asked for.

mod programs;

pub use programs::{KNOWN, Program, Purpose};

use crate::model::Time;
use programs::Table;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The largest file that [`Mode::Small`] opens, in bytes that are not here: icons, screenshots
/// and pictures of web pages are smaller, and what cameras make is larger.
const SMALL_BYTES: u64 = 256 << 10;

/// What programs of one purpose get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// As every other program.
    Whole,
    /// What they read and nothing else: nothing is fetched ahead of them.
    Exact,
    /// Small files, exactly; others cannot be opened.
    Small,
    /// No bytes: files cannot be opened unless they are here.
    Refuse,
}

impl Mode {
    fn access(self, missing_bytes: impl FnOnce() -> u64) -> Access {
        if self == Self::Whole {
            return Access::Whole;
        }
        match (self, missing_bytes()) {
            (_, 0) => Access::Whole,
            (Self::Refuse, _) => Access::Refused,
            (Self::Small, missing) if missing > SMALL_BYTES => Access::Refused,
            _ => Access::Exact,
        }
    }
}

/// What each purpose gets.
#[derive(Clone, Debug)]
pub struct HydrationConfig {
    /// Of programs that make thumbnails.
    pub thumbnails: Mode,
    /// Of programs that index the contents of files.
    pub indexing: Mode,
    /// Of programs that copy everything to another place.
    pub backup: Mode,
    /// More programs than are known, or another purpose of those; `None` is none of these.
    pub programs: Vec<(String, Option<Purpose>)>,
}

impl Default for HydrationConfig {
    /// A photo without a thumbnail has an icon, and a file without its words in an index still
    /// has its name there; but a backup that leaves out files is found to be none when it is
    /// needed, so these get what they read.
    fn default() -> Self {
        Self {
            thumbnails: Mode::Small,
            indexing: Mode::Refuse,
            backup: Mode::Exact,
            programs: Vec::new(),
        }
    }
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// What is likely to be read next is fetched ahead.
    Whole,
    /// Only what is read is fetched.
    Exact,
    /// Not at all.
    Refused,
}

/// What one program was kept from, since the daemon started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Guarded {
    /// By the name under which it is known.
    pub program: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Files that it could not open.
    pub refused: u64,
    /// Files that it opened and of which only what it read was fetched.
    pub exact: u64,
    /// The last time.
    pub last: Time,
}

/// Decides who gets what, and remembers whom it kept from something.
#[derive(Debug)]
pub struct Hydration {
    config: HydrationConfig,
    table: Table,
    /// By the name under which a program is known, so there are no more than the table has.
    guarded: Mutex<BTreeMap<String, Guarded>>,
}

impl Hydration {
    pub(crate) fn new(config: HydrationConfig) -> Self {
        let table = Table::new(&config.programs);
        Self { config, table, guarded: Mutex::default() }
    }

    /// Whether every program gets everything, so that nobody needs to ask who it is.
    pub fn is_off(&self) -> bool {
        let HydrationConfig { thumbnails, indexing, backup, .. } = self.config;
        [thumbnails, indexing, backup] == [Mode::Whole; 3]
    }

    fn mode(&self, purpose: Purpose) -> Mode {
        match purpose {
            Purpose::Thumbnails => self.config.thumbnails,
            Purpose::Indexing => self.config.indexing,
            Purpose::Backup => self.config.backup,
        }
    }

    /// How this program opens a file of which so many bytes are not here, which is looked up only
    /// if it matters.
    pub fn access(&self, program: &Program, missing_bytes: impl FnOnce() -> u64) -> Access {
        let Some((name, purpose)) = self.table.find(program) else { return Access::Whole };
        let access = self.mode(purpose).access(missing_bytes);
        if access != Access::Whole {
            self.note(name, purpose, access);
        }
        access
    }

    fn note(&self, program: &str, purpose: Purpose, access: Access) {
        // Each change is of one number, so it is whole after a panic.
        let mut guarded = self.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            tracing::info!(program, %purpose, ?access, "gets less of other devices' files");
            let (refused, exact, last) = (0, 0, Time::now());
            Guarded { program: program.to_owned(), purpose, refused, exact, last }
        };
        let one = guarded.entry(program.to_owned()).or_insert_with(new);
        match access {
            Access::Refused => one.refused += 1,
            Access::Exact | Access::Whole => one.exact += 1,
        }
        one.last = Time::now();
    }

    /// Whom it kept from something, by name.
    pub fn guarded(&self) -> Vec<Guarded> {
        let guarded = self.guarded.lock().unwrap_or_else(PoisonError::into_inner);
        guarded.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHOTO: u64 = 4 << 20;
    const ICON: u64 = 20 << 10;

    fn named(names: &[&str]) -> Program {
        Program::new(names.iter().map(|name| (*name).to_owned()))
    }

    fn default() -> Hydration {
        Hydration::new(HydrationConfig::default())
    }

    fn with(purpose: &str, mode: Mode) -> Hydration {
        let mut config = HydrationConfig::default();
        match purpose {
            "thumbnails" => config.thumbnails = mode,
            "indexing" => config.indexing = mode,
            _ => config.backup = mode,
        }
        Hydration::new(config)
    }

    #[test]
    fn a_thumbnailer_gets_small_files_and_no_photo() {
        let hydration = default();
        let tumbler = named(&["tumblerd"]);
        assert_eq!(hydration.access(&tumbler, || PHOTO), Access::Refused);
        assert_eq!(hydration.access(&tumbler, || ICON), Access::Exact);
        assert_eq!(hydration.access(&tumbler, || SMALL_BYTES), Access::Exact);
        assert_eq!(hydration.access(&tumbler, || SMALL_BYTES + 1), Access::Refused);
    }

    #[test]
    fn an_indexer_gets_no_bytes_and_a_backup_all_that_it_reads() {
        let hydration = default();
        assert_eq!(hydration.access(&named(&["baloo_file_extractor"]), || ICON), Access::Refused);
        assert_eq!(hydration.access(&named(&["restic"]), || PHOTO), Access::Exact);
    }

    #[test]
    fn other_programs_are_not_touched_and_not_noted() {
        let hydration = default();
        for name in ["cat", "thunar", "rsync", "gimp", "", "restic-not", "x"] {
            assert_eq!(hydration.access(&named(&[name]), || PHOTO), Access::Whole, "{name}");
        }
        assert_eq!(hydration.access(&Program::default(), || PHOTO), Access::Whole);
        assert!(hydration.guarded().is_empty());
    }

    #[test]
    fn every_mode_holds_for_every_purpose() {
        let programs =
            [("thumbnails", "tumblerd"), ("indexing", "updatedb"), ("backup", "duplicity")];
        for (purpose, name) in programs {
            let access = |mode, bytes| with(purpose, mode).access(&named(&[name]), || bytes);
            assert_eq!(access(Mode::Whole, PHOTO), Access::Whole, "{name}");
            assert_eq!(access(Mode::Exact, PHOTO), Access::Exact, "{name}");
            assert_eq!(access(Mode::Small, PHOTO), Access::Refused, "{name}");
            assert_eq!(access(Mode::Small, ICON), Access::Exact, "{name}");
            assert_eq!(access(Mode::Refuse, ICON), Access::Refused, "{name}");
        }
    }

    #[test]
    fn whom_it_kept_from_something_is_told() {
        let hydration = default();
        for bytes in [PHOTO, PHOTO, ICON] {
            hydration.access(&named(&["tumblerd"]), || bytes);
        }
        hydration.access(&named(&["cp", "rsnapshot"]), || PHOTO);
        let told = hydration.guarded();
        let told: Vec<_> =
            told.iter().map(|g| (&g.program[..], g.purpose, g.refused, g.exact)).collect();
        assert_eq!(
            told,
            [("rsnapshot", Purpose::Backup, 0, 1), ("tumblerd", Purpose::Thumbnails, 2, 1)]
        );
    }

    #[test]
    fn it_is_off_when_every_purpose_gets_everything() {
        assert!(!default().is_off());
        let (thumbnails, indexing, backup) = (Mode::Whole, Mode::Whole, Mode::Whole);
        let config = HydrationConfig { thumbnails, indexing, backup, ..HydrationConfig::default() };
        assert!(Hydration::new(config).is_off());
    }
}
