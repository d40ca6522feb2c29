//! What becomes of an operation that meets a change its writer had not seen.
//!
//! A pure function: [`decide`] takes what was found and says what to do; it is the table in
//! `docs/SEMANTICS.md`, row by row. Whatever it says, no bytes are lost: it never lets an
//! operation remove or replace what its writer did not know.

/// An operation, with what the owner's disk has where it is to be carried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meeting {
    /// Something new, in a directory that may be gone.
    Create { dir: Dir, at: AtName },
    /// New bytes; `whole`: nothing of an earlier version is needed.
    Write { file: Version, whole: bool },
    /// Another name for a file.
    Link { file: There, dir: Dir, at: AtName },
    /// Another place for a file or directory.
    Rename { at_from: There, dir: Dir, at_to: Target },
    /// The two swap places.
    Exchange { at_from: There, at_to: Target },
    /// A name that is to go.
    Unlink { at: Victim },
    /// A directory that is to go.
    Rmdir { at: Victim },
    /// Attributes.
    Attributes { file: There },
}

/// The directory in which something is to appear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dir {
    /// It is there.
    There,
    /// The owner deleted it.
    Gone,
}

/// Whether a file is where the writer saw it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum There {
    /// It is.
    Yes,
    /// It is elsewhere, or deleted.
    No,
}

/// What has the name under which something is to appear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AtName {
    /// Nothing.
    Free,
    /// The same: equal bytes, an equal link, two directories, the very file.
    Alike,
    /// Something else.
    Other,
}

/// What the file is compared with the version that the writer changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Version {
    /// That version.
    Base,
    /// It has the new bytes already.
    Equal,
    /// Another version.
    Changed,
    /// It was deleted.
    Gone,
}

/// What is where a file is to be moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Target {
    /// Nothing.
    Free,
    /// The moved file already.
    Itself,
    /// What the writer saw there, unchanged.
    AsSeen,
    /// That, changed; or something else.
    Other,
}

/// What has a name that is to go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Victim {
    /// Nothing any more.
    Nothing,
    /// What the writer saw: this version; of a directory, empty.
    AsSeen,
    /// That, changed; of a directory, not empty.
    Changed,
    /// Another one.
    Other,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Decision {
    /// Carry it out.
    Do,
    /// There is nothing left to do: it is so already.
    Done,
    /// Carry it out beside what is there, under the name of a conflict copy.
    Beside,
    /// Make the file again, where the writer had it.
    Again,
    /// What the owner did stands, for this reason.
    Stands(&'static str),
    /// The writer must send all bytes.
    NeedsWhole,
}

const DELETED: &str = "it was deleted on its device";
const DELETED_OR_MOVED: &str = "it was moved or deleted on its device";
const CHANGED: &str = "it was changed on its device";
const REPLACED: &str = "something else has this name on its device";
const DIR_DELETED: &str = "the folder was deleted on its device";
const NOT_EMPTY: &str = "the folder has new entries on its device";

/// What to do when these meet.
pub(super) fn decide(meeting: Meeting) -> Decision {
    use Decision::{Again, Beside, Do, Done, NeedsWhole, Stands};
    match meeting {
        Meeting::Create { dir: Dir::Gone, .. } => Beside,
        Meeting::Create { at: AtName::Free, .. } => Do,
        Meeting::Create { at: AtName::Alike, .. } => Done,
        Meeting::Create { at: AtName::Other, .. } => Beside,

        Meeting::Write { file: Version::Equal, .. } => Done,
        Meeting::Write { file: Version::Base, .. } => Do,
        Meeting::Write { whole: false, .. } => NeedsWhole,
        Meeting::Write { file: Version::Changed, .. } => Beside,
        Meeting::Write { file: Version::Gone, .. } => Again,

        Meeting::Link { at: AtName::Alike, .. } => Done,
        Meeting::Link { file: There::No, .. } => Stands(DELETED),
        Meeting::Link { dir: Dir::Gone, .. } => Stands(DIR_DELETED),
        Meeting::Link { at: AtName::Free, .. } => Do,
        Meeting::Link { at: AtName::Other, .. } => Beside,

        Meeting::Rename { at_to: Target::Itself, at_from: There::No, .. } => Done,
        Meeting::Rename { at_from: There::No, .. } => Stands(DELETED_OR_MOVED),
        Meeting::Rename { dir: Dir::Gone, .. } => Stands(DIR_DELETED),
        Meeting::Rename { at_to: Target::Itself | Target::Free | Target::AsSeen, .. } => Do,
        Meeting::Rename { at_to: Target::Other, .. } => Beside,

        Meeting::Exchange { at_to: Target::Itself, at_from: There::No } => Done,
        Meeting::Exchange { at_from: There::No, .. } => Stands(DELETED_OR_MOVED),
        Meeting::Exchange { at_to: Target::AsSeen, .. } => Do,
        Meeting::Exchange { .. } => Stands(REPLACED),

        Meeting::Unlink { at: Victim::Nothing } | Meeting::Rmdir { at: Victim::Nothing } => Done,
        Meeting::Unlink { at: Victim::AsSeen } | Meeting::Rmdir { at: Victim::AsSeen } => Do,
        Meeting::Unlink { at: Victim::Changed } => Stands(CHANGED),
        Meeting::Rmdir { at: Victim::Changed } => Stands(NOT_EMPTY),
        Meeting::Unlink { at: Victim::Other } | Meeting::Rmdir { at: Victim::Other } => {
            Stands(REPLACED)
        }

        Meeting::Attributes { file: There::Yes } => Do,
        Meeting::Attributes { file: There::No } => Stands(DELETED),
    }
}
