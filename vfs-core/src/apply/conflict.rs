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

#[cfg(test)]
mod tests {
    use super::*;

    const DIRS: [Dir; 2] = [Dir::There, Dir::Gone];
    const THERE: [There; 2] = [There::Yes, There::No];
    const NAMES: [AtName; 3] = [AtName::Free, AtName::Alike, AtName::Other];
    const TARGETS: [Target; 4] = [Target::Free, Target::Itself, Target::AsSeen, Target::Other];
    const VICTIMS: [Victim; 4] = [Victim::Nothing, Victim::AsSeen, Victim::Changed, Victim::Other];
    const VERSIONS: [Version; 4] = [Version::Base, Version::Equal, Version::Changed, Version::Gone];

    fn all() -> Vec<Meeting> {
        let mut all = Vec::new();
        for dir in DIRS {
            all.extend(NAMES.map(|at| Meeting::Create { dir, at }));
            for file in THERE {
                all.extend(NAMES.map(|at| Meeting::Link { file, dir, at }));
                all.extend(TARGETS.map(|at_to| Meeting::Rename { at_from: file, dir, at_to }));
            }
        }
        for whole in [false, true] {
            all.extend(VERSIONS.map(|file| Meeting::Write { file, whole }));
        }
        for at_from in THERE {
            all.extend(TARGETS.map(|at_to| Meeting::Exchange { at_from, at_to }));
        }
        all.extend(VICTIMS.map(|at| Meeting::Unlink { at }));
        all.extend(VICTIMS.map(|at| Meeting::Rmdir { at }));
        all.extend(THERE.map(|file| Meeting::Attributes { file }));
        all
    }

    /// Whether something that the writer had not seen is where it is to be carried out.
    fn meets_a_change(meeting: Meeting) -> bool {
        match meeting {
            Meeting::Create { dir, at } => dir == Dir::Gone || at == AtName::Other,
            Meeting::Write { file, .. } => matches!(file, Version::Changed | Version::Gone),
            Meeting::Link { file, dir, at } => {
                file == There::No || dir == Dir::Gone || at == AtName::Other
            }
            Meeting::Rename { at_from, dir, at_to } => {
                at_from == There::No || dir == Dir::Gone || at_to == Target::Other
            }
            Meeting::Exchange { at_from, at_to } => {
                at_from == There::No || matches!(at_to, Target::Other | Target::Free)
            }
            Meeting::Unlink { at } | Meeting::Rmdir { at } => {
                matches!(at, Victim::Changed | Victim::Other)
            }
            Meeting::Attributes { file } => file == There::No,
        }
    }

    #[test]
    fn nothing_is_carried_out_on_what_its_writer_had_not_seen() {
        for meeting in all() {
            let decision = decide(meeting);
            assert!(decision != Decision::Do || !meets_a_change(meeting), "{meeting:?}");
        }
    }

    #[test]
    fn bytes_that_cannot_be_put_in_place_are_kept_or_asked_for() {
        for meeting in all().into_iter().filter(|m| meets_a_change(*m)) {
            let decision = decide(meeting);
            let kept = match meeting {
                Meeting::Create { .. } => decision == Decision::Beside,
                Meeting::Write { whole: true, .. } => {
                    matches!(decision, Decision::Beside | Decision::Again)
                }
                Meeting::Write { whole: false, .. } => decision == Decision::NeedsWhole,
                // Nothing of the writer's is lost when a name stays as the owner has it.
                _ => matches!(decision, Decision::Beside | Decision::Stands(_) | Decision::Done),
            };
            assert!(kept, "{meeting:?}: {decision:?}");
        }
    }

    #[test]
    fn what_is_done_is_not_done_again() {
        let done = [
            Meeting::Create { dir: Dir::There, at: AtName::Alike },
            Meeting::Write { file: Version::Equal, whole: false },
            Meeting::Link { file: There::Yes, dir: Dir::There, at: AtName::Alike },
            Meeting::Rename { at_from: There::No, dir: Dir::There, at_to: Target::Itself },
            Meeting::Exchange { at_from: There::No, at_to: Target::Itself },
            Meeting::Unlink { at: Victim::Nothing },
            Meeting::Rmdir { at: Victim::Nothing },
        ];
        for meeting in done {
            assert_eq!(decide(meeting), Decision::Done, "{meeting:?}");
        }
    }
}
