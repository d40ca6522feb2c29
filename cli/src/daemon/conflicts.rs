//! Changes that met others', and what a person decides about them.
//!
//! No bytes are lost when two changes meet: what this device wrote is beside
//! the owner's, or there again. What is decided here is carried out through
//! the drive, as if the person had renamed or deleted the file there: so it is
//! delivered, and meets other changes, like everything else.

use super::parts::Daemon;
use super::report::rfc3339;
use super::writes::{create, display};
use crate::args::Keep;
use crate::failure::{Code, Failure, Outcome};
use crate::paths::{drive_around, inside_drive};
use crate::reply::{ConflictItem, Conflicts, DeviceName, ResolveReply, ResolvedConflict};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vfs_core::drive::{Drive, Found, InodeNo, OpenFlags, RenameFlags};
use vfs_core::error::{FsError, Kind};
use vfs_core::model::{FileType, Name};
use vfs_core::ops::Conflict;
use vfs_core::outbox::ConflictRecord;
use vfs_core::path::SdPath;

/// Copied at a time.
const STEP_BYTES: usize = 1 << 20;
/// How long the owner's version may take to be seen here, after the conflict was learned.
const SEEN_PATIENCE: Duration = Duration::from_secs(10);
const SEEN_EVERY: Duration = Duration::from_millis(20);

/// What is done about one conflict.
enum Act {
    /// Nothing but marking it.
    Mark(&'static str),
    /// The copy takes the name.
    Replace { copy: SdPath, original: SdPath },
    /// This device's version goes.
    Remove { copy: SdPath },
}

impl Act {
    fn words(&self) -> String {
        match self {
            Self::Mark(what) => (*what).to_owned(),
            Self::Replace { copy, original } => format!("{copy} replaces {original}"),
            Self::Remove { copy } => format!("{copy} is removed"),
        }
    }
}

impl Daemon {
    pub fn conflicts(&self) -> Conflicts {
        let all = self.outbox.conflicts();
        Conflicts { conflicts: all.iter().map(|c| self.conflict(c)).collect() }
    }

    fn conflict(&self, met: &ConflictRecord) -> ConflictItem {
        let owner = self.name_of(met.owner);
        let address = |path: &[Name]| {
            self.address_in(&owner, met.location, path).map(|address| address.to_string())
        };
        let or_path = |path: &[Name]| address(path).unwrap_or_else(|| display(path));
        let (ended, kept_as, reason) = match &met.ended {
            Conflict::KeptAs(path) => ("kept_as", Some(or_path(path)), None),
            Conflict::MadeAgain(path) => ("made_again", Some(or_path(path)), None),
            Conflict::OwnerStands(why) => ("owner_stands", None, Some(why.clone())),
        };
        ConflictItem {
            id: met.id,
            at: rfc3339(met.at),
            location: self.location_label(met.location),
            address: address(&met.path),
            path: display(&met.path),
            what: met.what.clone(),
            ended: ended.into(),
            kept_as,
            reason,
            owner: DeviceName { id: met.owner.to_string(), name: owner },
        }
    }

    /// Says what becomes of each, or does it: first the copies, then the decision, then the mark.
    pub fn resolve_conflicts(
        &self,
        ids: &[u64],
        keep: Keep,
        export: Option<&Path>,
        dry_run: bool,
    ) -> Outcome<ResolveReply> {
        if let Some((to, mountpoint)) = export.and_then(|to| Some((to, drive_around(to)?))) {
            return Err(inside_drive(to, &mountpoint));
        }
        let all = self.outbox.conflicts();
        let met: Vec<_> = ids
            .iter()
            .map(|id| all.iter().find(|c| c.id == *id).ok_or_else(|| unknown(*id)))
            .collect::<Outcome<_>>()?;
        let acts: Vec<_> = met.iter().map(|c| self.act(c, keep)).collect::<Outcome<_>>()?;
        let drive = self.drive(false);
        let mut resolved = Vec::new();
        for (met, act) in met.into_iter().zip(acts) {
            let mut exported = Vec::new();
            if !dry_run && (export.is_some() || !matches!(act, Act::Mark(_))) {
                self.wait_seen(met)?;
            }
            if !dry_run {
                if let Some(to) = export {
                    exported = self.export_versions(&drive, met, to)?;
                }
                carry_out(&drive, &act)?;
                self.outbox.resolve(met.id).map_err(|e| {
                    Failure::new(Code::Io, format!("conflict {} cannot be marked: {e}", met.id))
                        .hint("free some space on the data directory's disk, then try again")
                })?;
            }
            let (id, path) = (met.id, display(&met.path));
            resolved.push(ResolvedConflict { id, path, what: act.words(), exported });
        }
        Ok(ResolveReply { resolved })
    }

    /// Until then both names may show this device's version, and a change of either would be
    /// one of a version that the owner does not have there.
    fn wait_seen(&self, met: &ConflictRecord) -> Outcome<()> {
        let deadline = Instant::now() + SEEN_PATIENCE;
        while !self.outbox.is_seen(met.id) {
            if Instant::now() > deadline {
                return Err(Failure::new(
                    Code::Unreachable,
                    format!(
                        "the version of “{}” is not known here yet (conflict {})",
                        self.name_of(met.owner),
                        met.id
                    ),
                )
                .hint("try again when that device is online"));
            }
            std::thread::sleep(SEEN_EVERY);
        }
        Ok(())
    }

    fn act(&self, met: &ConflictRecord, keep: Keep) -> Outcome<Act> {
        let owner = self.name_of(met.owner);
        let address = |path: &[Name]| {
            self.address_in(&owner, met.location, path).ok_or_else(|| {
                Failure::new(
                    Code::NotFound,
                    format!("the location of conflict {} was removed", met.id),
                )
                .hint(format!(
                    "nothing can be changed there: sd conflicts resolve {} --done",
                    met.id
                ))
            })
        };
        Ok(match (keep, &met.ended) {
            (Keep::Both, _) => Act::Mark("both versions stay as they are"),
            (Keep::Mine, Conflict::KeptAs(copy)) => {
                Act::Replace { copy: address(copy)?, original: address(&met.path)? }
            }
            (Keep::Mine, Conflict::MadeAgain(_)) => Act::Mark("it stays as it was made again"),
            (Keep::Theirs, Conflict::KeptAs(copy) | Conflict::MadeAgain(copy)) => {
                Act::Remove { copy: address(copy)? }
            }
            (Keep::Theirs, Conflict::OwnerStands(_)) => Act::Mark("the owner's stays as it is"),
            (Keep::Mine, Conflict::OwnerStands(why)) => {
                return Err(Failure::new(
                    Code::Invalid,
                    format!("conflict {}: the {} was not carried out: {why}", met.id, met.what),
                )
                .hint(format!(
                    "do it again in the drive if it is still wanted, then: \
                     sd conflicts resolve {} --done",
                    met.id
                )));
            }
        })
    }

    fn export_versions(
        &self,
        drive: &Arc<Drive>,
        met: &ConflictRecord,
        to: &Path,
    ) -> Outcome<Vec<String>> {
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(to);
        made.map_err(|e| Failure::io(format!("cannot create {}", to.display()), e))?;
        let owner = self.name_of(met.owner);
        let mut paths = vec![&met.path];
        match &met.ended {
            Conflict::KeptAs(copy) => paths.push(copy),
            Conflict::MadeAgain(copy) if *copy != met.path => paths.push(copy),
            _ => {}
        }
        let mut exported = Vec::new();
        for path in paths {
            let Some(address) = self.address_in(&owner, met.location, path) else { continue };
            let Some(found) = look_up(drive, &address)? else { continue };
            if found.attr.file_type == FileType::File {
                let name = path.last().map_or_else(|| "file".into(), |n| n.display());
                let name = std::ffi::OsStr::from_bytes(
                    path.last().map_or(name.as_bytes(), |n| n.as_bytes()),
                );
                let (file, made) = create(&to.join(name))?;
                self.copy(drive, &found, &address, &file).inspect_err(|_| {
                    // An unfinished file is no export.
                    let _ = fs::remove_file(&made);
                })?;
                exported.push(made.display().to_string());
            }
        }
        Ok(exported)
    }

    fn copy(&self, drive: &Arc<Drive>, from: &Found, address: &SdPath, to: &File) -> Outcome<()> {
        let unread = |e: FsError| failed(format!("read {address}"), &e);
        let opened = drive.open(from.ino, OpenFlags::READ).map_err(unread)?;
        let copied = (|| {
            let mut at = 0;
            loop {
                let read = self.runtime.block_on(drive.read(opened.handle, at, STEP_BYTES));
                let bytes = read.map_err(unread)?;
                if bytes.is_empty() {
                    return to.sync_all().map_err(|e| Failure::io("cannot export", e));
                }
                to.write_all_at(&bytes, at).map_err(|e| Failure::io("cannot export", e))?;
                at += bytes.len() as u64;
            }
        })();
        drive.release(opened.handle);
        copied
    }
}

fn carry_out(drive: &Arc<Drive>, act: &Act) -> Outcome<()> {
    match act {
        Act::Mark(_) => Ok(()),
        Act::Replace { copy, original } => {
            let ((from, name), (to, new)) = (parent_of(drive, copy)?, parent_of(drive, original)?);
            // Else a copy that has not arrived here yet would be “not found” without its name.
            look_up(drive, copy)?.ok_or_else(|| no_copy(copy))?;
            drive
                .rename(from, &name, to, &new, RenameFlags::default())
                .map_err(|e| failed(format!("rename {copy}"), &e))
        }
        Act::Remove { copy } => {
            let (parent, name) = parent_of(drive, copy)?;
            let found = look_up(drive, copy)?.ok_or_else(|| no_copy(copy))?;
            let removed = match found.attr.file_type {
                FileType::Directory => drive.rmdir(parent, &name),
                _ => drive.unlink(parent, &name),
            };
            removed.map_err(|e| failed(format!("remove {copy}"), &e))
        }
    }
}

/// The names of an address in the drive, from its top.
fn names(address: &SdPath) -> Vec<Vec<u8>> {
    let SdPath::File { device, location, path } = address else { return Vec::new() };
    let top = [Some(device), location.as_ref()].into_iter().flatten();
    top.map(|name| name.clone().into_bytes())
        .chain(path.iter().map(|name| name.as_bytes().to_vec()))
        .collect()
}

fn walk(drive: &Drive, names: &[Vec<u8>]) -> Result<Option<Found>, FsError> {
    let (mut at, mut found) = (InodeNo::ROOT, None);
    for name in names {
        let next = match drive.lookup(at, name) {
            Ok(next) => next,
            Err(e) if e.kind() == Kind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        at = next.ino;
        found = Some(next);
    }
    Ok(found)
}

fn look_up(drive: &Drive, address: &SdPath) -> Outcome<Option<Found>> {
    walk(drive, &names(address)).map_err(|e| failed(format!("look for {address}"), &e))
}

fn parent_of(drive: &Drive, address: &SdPath) -> Outcome<(InodeNo, Vec<u8>)> {
    let mut names = names(address);
    let name = names.pop().unwrap_or_default();
    let parent = walk(drive, &names).map_err(|e| failed(format!("look for {address}"), &e))?;
    parent.map(|found| (found.ino, name)).ok_or_else(|| no_copy(address))
}

fn no_copy(address: &SdPath) -> Failure {
    Failure::new(Code::NotFound, format!("{address} is not there"))
        .hint("it was moved or removed meanwhile, or is still to come; --done marks the conflict")
}

fn unknown(id: u64) -> Failure {
    Failure::new(Code::NotFound, format!("there is no conflict {id}"))
        .hint("`sd conflicts` lists those that nobody has dealt with")
}

fn failed(what: String, error: &FsError) -> Failure {
    Failure::new(Code::Io, format!("cannot {what}: {error}"))
        .hint("the conflict stays as it is; try again, or decide it in the drive itself")
}
