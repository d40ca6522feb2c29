//! Programs that read files for nobody who waits for them, by their names.
//!
//! File managers are not among them: the same program opens a file to copy it. Nor are
//! glycin's loaders, which get an open file from the program that shows the image.

use std::collections::HashMap;
use std::fmt;

/// What a program reads files for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Small images of them.
    Thumbnails,
    /// Finding them by what is in them.
    Indexing,
    /// A copy of everything in another place.
    Backup,
}

impl Purpose {
    /// As it is written in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Thumbnails => "thumbnails",
            Self::Indexing => "indexing",
            Self::Backup => "backup",
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The names of a program that opens a file: its own first, then those of the programs that
/// started it, the nearest first, because thumbnailers and indexers have others do their work.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Program {
    names: Vec<String>,
}

impl Program {
    /// A program of these names.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self { names: names.into_iter().collect() }
    }
}

/// A kernel keeps so many bytes of the name of a thread (`TASK_COMM_LEN`, less the NUL).
const COMM_BYTES: usize = 15;

/// What the programs of several desktops for one format have in common.
const THUMBNAILER: &str = "-thumbnailer";

/// Thumbnailers of a name that does not end as most do, or that are scripts: of these a kernel
/// tells only how the name begins.
const THUMBNAILERS: &[&str] = &[
    "tumblerd",
    // KDE's: a library that KIO's worker loads, by which the mount names the worker.
    "thumbnail.so",
    "ffmpegthumbnailer",
    "gdk-pixbuf-thumbnailer",
    "gnome-thumbnail-font",
    "mate-thumbnail-font",
    "cinnamon-thumbnail-font",
    "xapp-appimage-thumbnailer",
    "xapp-epub-thumbnailer",
    "xapp-mp3-thumbnailer",
    "xapp-raw-thumbnailer",
    "xapp-vorbiscomment-thumbnailer",
];

const INDEXERS: &[&str] = &[
    "tracker-miner-fs",
    "tracker-miner-fs-3",
    "tracker-extract",
    "tracker-extract-3",
    "localsearch",
    "localsearch-3",
    "localsearch-extractor-3",
    "baloo_file",
    "baloo_file_extractor",
    "recollindex",
    // These read names only, today.
    "updatedb",
    "updatedb.findutils",
    "updatedb.mlocate",
    "updatedb.plocate",
];

const BACKUPS: &[&str] = &[
    "backintime",
    "bacula-fd",
    "bareos-fd",
    "borg",
    "borgbackup",
    "borgmatic",
    "bup",
    "deja-dup",
    "duplicacy",
    "duplicati-cli",
    "duplicity",
    "kopia",
    "proxmox-backup-client",
    "rdiff-backup",
    "restic",
    "rsnapshot",
    "rustic",
    "tarsnap",
    "timeshift",
    "urbackupclientbackend",
    "vorta",
];

/// The programs that are known, by what they are for; besides these, all whose names end with
/// `-thumbnailer`.
pub const KNOWN: [(Purpose, &[&str]); 3] = [
    (Purpose::Thumbnails, THUMBNAILERS),
    (Purpose::Indexing, INDEXERS),
    (Purpose::Backup, BACKUPS),
];

/// Purposes by names.
#[derive(Debug)]
pub(super) struct Table {
    by_name: HashMap<String, Option<Purpose>>,
    /// Names that are longer than a kernel keeps, by as much as it keeps.
    by_comm: HashMap<String, String>,
}

impl Table {
    /// The known programs, and `more`, which has the last word.
    pub(super) fn new(more: &[(String, Option<Purpose>)]) -> Self {
        let known = KNOWN
            .iter()
            .flat_map(|(purpose, names)| names.iter().map(|n| ((*n).to_owned(), Some(*purpose))));
        let by_name: HashMap<_, _> = known.chain(more.iter().cloned()).collect();
        let long = by_name.keys().filter(|name| name.len() > COMM_BYTES);
        let by_comm = long.filter_map(|n| Some((n.get(..COMM_BYTES)?.to_owned(), n.clone())));
        Self { by_comm: by_comm.collect(), by_name }
    }

    /// The purpose of a program, and the name that tells it.
    pub(super) fn find(&self, program: &Program) -> Option<(&str, Purpose)> {
        let (name, purpose) = program.names.iter().find_map(|name| self.of(name))?;
        Some((name, purpose?))
    }

    /// What a name tells: `Some(None)` that its program is none of these, whoever started it.
    fn of(&self, name: &str) -> Option<(&str, Option<Purpose>)> {
        let whole = || self.by_name.get_key_value(self.by_comm.get(name)?);
        if let Some((name, purpose)) = self.by_name.get_key_value(name).or_else(whole) {
            return Some((name, *purpose));
        }
        name.ends_with(THUMBNAILER)
            .then_some((THUMBNAILER_OF_SOME_FORMAT, Some(Purpose::Thumbnails)))
    }
}

/// Under which programs of one format are told together: their names are not known before, and
/// anybody can make as many as they like.
const THUMBNAILER_OF_SOME_FORMAT: &str = "*-thumbnailer";

#[cfg(test)]
mod tests {
    use super::*;

    fn purpose(table: &Table, names: &[&str]) -> Option<Purpose> {
        let program = Program::new(names.iter().map(|name| (*name).to_owned()));
        table.find(&program).map(|(_, purpose)| purpose)
    }

    #[test]
    fn every_known_program_is_found_by_its_name_and_by_what_a_kernel_keeps_of_it() {
        let table = Table::new(&[]);
        for (of, names) in KNOWN {
            for name in names {
                assert_eq!(purpose(&table, &[name]), Some(of), "{name}");
                let comm = &name[..name.len().min(COMM_BYTES)];
                assert_eq!(purpose(&table, &[comm]), Some(of), "{comm}");
            }
        }
    }

    #[test]
    fn thumbnailers_of_all_formats_are_known() {
        let table = Table::new(&[]);
        for format in ["evince", "totem-video", "glycin", "heif", "gsf-office", "of-tomorrow"] {
            let name = format!("{format}-thumbnailer");
            assert_eq!(purpose(&table, &[&name]), Some(Purpose::Thumbnails), "{name}");
        }
        assert_eq!(purpose(&table, &["-thumbnailer-settings"]), None);
    }

    #[test]
    fn who_works_for_a_known_program_is_taken_for_it_and_its_own_name_goes_first() {
        let table = Table::new(&[]);
        assert_eq!(purpose(&table, &["convert", "sh", "tumblerd"]), Some(Purpose::Thumbnails));
        assert_eq!(purpose(&table, &["tumblerd", "restic"]), Some(Purpose::Thumbnails));
        assert_eq!(purpose(&table, &["cp", "bash", "thunar"]), None);
    }

    #[test]
    fn settings_add_programs_move_them_and_take_them_out() {
        let more = [
            ("photo-wall".to_owned(), Some(Purpose::Thumbnails)),
            ("a-very-long-name-of-a-backup".to_owned(), Some(Purpose::Backup)),
            ("restic".to_owned(), Some(Purpose::Indexing)),
            ("tumblerd".to_owned(), None),
            ("heif-thumbnailer".to_owned(), None),
        ];
        let table = Table::new(&more);
        assert_eq!(purpose(&table, &["photo-wall"]), Some(Purpose::Thumbnails));
        assert_eq!(purpose(&table, &["a-very-long-nam"]), Some(Purpose::Backup));
        assert_eq!(purpose(&table, &["restic"]), Some(Purpose::Indexing));
        assert_eq!(purpose(&table, &["heif-thumbnailer"]), None);
        // Nor is it taken for who started it.
        assert_eq!(purpose(&table, &["tumblerd", "borg"]), None);
        assert_eq!(purpose(&table, &["convert", "tumblerd", "borg"]), None);
    }
}
