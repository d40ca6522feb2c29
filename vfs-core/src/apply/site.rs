//! Where an operation takes place: its location, and files of it by their id, on the disk.
//!
//! Ids lead to names by the index, and the disk is asked whether the index is right; where
//! it lags behind, it is brought up to date first. Every step goes through [`Root`].

use super::{Applier, Writer};
use crate::error::{FsError, FsResult, Kind};
use crate::index::Observed;
use crate::local::{Root, ino_of, observe_at, stat_of};
use crate::model::{Entry, FileId, Location, LocationId, LocationNo, Name};
use crate::ops::{Obstacle, Outcome, Place, Refusal};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// How often the index is asked for a file that the disk does not have where it says; between
/// two times the watcher may see where it went.
const LOOKS: u32 = 5;
/// The pause after the second look; doubled each time.
const PAUSE: Duration = Duration::from_millis(15);
/// Names of a hard-linked file that are tried.
const NAMES_TRIED: usize = 64;

/// Why an operation was not carried out.
#[derive(Debug)]
pub(super) enum Fail {
    /// It never will be.
    Refused(Refusal),
    /// Not now.
    Later(Obstacle),
}

impl Fail {
    pub fn into_outcome(self) -> Outcome {
        match self {
            Self::Refused(why) => Outcome::Refused(why),
            Self::Later(why) => Outcome::Later(why),
        }
    }
}

impl From<FsError> for Fail {
    fn from(error: FsError) -> Self {
        match error.kind() {
            Kind::NoSpace | Kind::QuotaExceeded => Self::Later(Obstacle::NoSpace),
            // Of the disk, which may be mounted again; a location that is, is refused before.
            Kind::ReadOnly => {
                Self::Later(Obstacle::Failed("the disk is mounted read-only".to_owned()))
            }
            Kind::AccessDenied | Kind::NotPermitted => Self::Refused(Refusal::Permission),
            Kind::NameTooLong
            | Kind::FileTooLarge
            | Kind::TooManyLinks
            | Kind::NotSupported
            | Kind::NotImplemented
            | Kind::CrossDevice
            | Kind::Invalid => Self::Refused(Refusal::Impossible(error.to_string())),
            _ => Self::Later(Obstacle::Failed(error.to_string())),
        }
    }
}

impl From<crate::index::IndexError> for Fail {
    fn from(error: crate::index::IndexError) -> Self {
        FsError::from(error).into()
    }
}

/// A directory, open.
#[derive(Debug)]
pub(super) struct Dir {
    pub id: FileId,
    pub path: Vec<Name>,
    pub fd: OwnedFd,
}

impl Dir {
    /// What a name has now; `None`: nothing.
    pub fn look(&self, name: &Name) -> FsResult<Option<Observed>> {
        match observe_at(self.fd.as_fd(), name) {
            Ok(seen) => Ok(Some(seen)),
            Err(e) if e.kind() == Kind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The path of a name in it.
    pub fn path_of(&self, name: &Name) -> Vec<Name> {
        [self.path.as_slice(), std::slice::from_ref(name)].concat()
    }

    /// Makes its names durable.
    pub fn sync(&self) -> FsResult<()> {
        rustix::fs::fsync(&self.fd).map_err(|e| FsError::os("make a directory durable", e))
    }
}

/// A file at one of its names.
#[derive(Debug)]
pub(super) struct Found {
    pub dir: Dir,
    pub name: Name,
    pub seen: Observed,
}

/// A location of this device that the writer may write to, with its disk there.
pub(super) struct Site<'a> {
    pub applier: &'a Applier,
    pub writer: &'a Writer,
    pub location: Arc<Location>,
    pub root: Arc<Root>,
}

impl<'a> Site<'a> {
    pub fn open(
        applier: &'a Applier,
        writer: &'a Writer,
        location: LocationId,
    ) -> Result<Self, Fail> {
        let location = applier.index.location_by_id(location);
        let me = applier.index.me();
        let location =
            location.filter(|l| l.owner == me && !l.read_only && l.is_shared_with(writer.id));
        let location = location.ok_or(Fail::Refused(Refusal::ReadOnly))?;
        let root = applier.indexer.root(location.no).map_err(|_| Fail::Later(Obstacle::Offline))?;
        if !root.is_current().unwrap_or(false) {
            return Err(Fail::Later(Obstacle::Offline));
        }
        applier.recovery.recover_location(&location, &root);
        Ok(Self { applier, writer, location, root })
    }

    pub fn no(&self) -> LocationNo {
        self.location.no
    }

    /// The file that the writer means by this id.
    pub fn means(&self, file: FileId) -> FsResult<FileId> {
        let named = self.named(file);
        // Of this batch, not in the ledger yet.
        match super::lock(&self.applier.aliases).get(&named) {
            Some(file) => Ok(*file),
            None => self.applier.ledger.file(&named),
        }
    }

    pub fn named(&self, file: FileId) -> super::ledger::Named {
        super::ledger::Named { location: self.location.id, writer: self.writer.id, file }
    }

    /// A directory by the writer's id; `None`: it is deleted.
    pub fn dir(&self, named: FileId) -> Result<Option<Dir>, Fail> {
        let id = self.means(named)?;
        for look in 0..LOOKS {
            pause(look);
            match self.dir_now(id) {
                Ok(Some(dir)) => return Ok(Some(dir)),
                Ok(None) if !self.may_reappear(id)? => break,
                Ok(None) => self.look_again(id)?,
                Err(e) => return Err(e.into()),
            }
        }
        self.surely_gone().map(|()| None)
    }

    /// As the index has it now, if the disk has it there.
    pub fn dir_now(&self, id: FileId) -> FsResult<Option<Dir>> {
        let view = self.applier.index.view()?;
        let (Some(path), Some(node)) = (view.path(self.no(), id)?, view.node(self.no(), id)?)
        else {
            return Ok(None);
        };
        drop(view);
        let fd = match self.root.open_dir(&path) {
            Err(e) if is_elsewhere(&e) => return Ok(None),
            opened => opened?,
        };
        let known = id == FileId::ROOT || ino_of(&stat_of(fd.as_fd())?) == node.entry.disk_ino;
        Ok(known.then_some(Dir { id, path, fd }))
    }

    /// A file or directory by its id here, at `near` if it has that name; `None`: it is deleted.
    pub fn find(&self, id: FileId, near: Option<&Place>) -> Result<Option<Found>, Fail> {
        for look in 0..LOOKS {
            pause(look);
            if let Some(found) = self.find_now(id, near)? {
                return Ok(Some(found));
            }
            if !self.may_reappear(id)? {
                break;
            }
            self.look_again(id)?;
        }
        self.surely_gone().map(|()| None)
    }

    fn find_now(&self, id: FileId, near: Option<&Place>) -> FsResult<Option<Found>> {
        let near = near.map(|p| Ok::<_, FsError>((self.means(p.dir)?, p.name.clone())));
        let near = near.transpose()?;
        let mut names = self.applier.index.view()?.names(self.no(), id, NAMES_TRIED)?;
        // The asked name first, if it is one of them.
        names.sort_by_key(|place| Some(place) != near.as_ref());
        for (dir, name) in names {
            let entry = self.applier.index.view()?.entry(self.no(), dir, name.as_bytes())?;
            let Some(entry) = entry.filter(|e| e.file_id == id) else { continue };
            if let Some(found) = self.at(dir, &name, &entry)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn at(&self, dir: FileId, name: &Name, entry: &Entry) -> FsResult<Option<Found>> {
        let Some(dir) = self.dir_now(dir)? else { return Ok(None) };
        let seen = dir.look(name)?;
        let seen = seen.filter(|seen| seen.is_of(entry) || self.is_expected(seen, entry.file_id));
        Ok(seen.map(|seen| Found { dir, name: name.clone(), seen }))
    }

    fn is_expected(&self, seen: &Observed, id: FileId) -> bool {
        self.applier.index.expected(self.no(), seen.disk_ino) == Some(id)
    }

    /// The id of what a name has, as the index says after a look.
    pub fn id_at(&self, dir: &Dir, name: &Name, seen: &Observed) -> FsResult<Option<FileId>> {
        let row = || self.applier.index.view()?.entry(self.no(), dir.id, name.as_bytes());
        let is_row = |e: &Entry| seen.is_of(e);
        if let Some(entry) = row()?.filter(is_row) {
            return Ok(Some(entry.file_id));
        }
        self.applier.indexer.refresh(self.no(), dir.id, name)?;
        Ok(row()?.filter(is_row).map(|entry| entry.file_id))
    }

    fn may_reappear(&self, id: FileId) -> FsResult<bool> {
        Ok(self.applier.index.is_file_known(self.no(), id)?)
    }

    /// The index has it where the disk has not: its names, and the directories above it, are
    /// looked at again.
    fn look_again(&self, id: FileId) -> FsResult<()> {
        let mut up = id;
        for _ in 0..crate::ops::MAX_DEPTH {
            let Some(node) = self.applier.index.view()?.node(self.no(), up)? else { break };
            if up == FileId::ROOT {
                break;
            }
            if let Err(e) = self.applier.indexer.refresh(self.no(), node.parent, &node.name) {
                tracing::debug!("a name could not be looked at again: {e}");
            }
            up = node.parent;
        }
        Ok(())
    }

    /// Before the first whole scan, what is not in the index may be on the disk all the same.
    fn surely_gone(&self) -> Result<(), Fail> {
        match self.applier.indexer.progress(self.no()).indexed {
            true => Ok(()),
            false => Err(Fail::Later(Obstacle::Failed("the location is being scanned".to_owned()))),
        }
    }

    /// The file, open for reading, if it still is what was seen.
    pub fn open_file(&self, found: &Found) -> FsResult<Option<File>> {
        let open = match self.root.open_for_reading(&found.dir.path_of(&found.name)) {
            Err(e) if is_elsewhere(&e) => return Ok(None),
            opened => opened?,
        };
        let is_same = crate::local::stamp_of(&open)?.disk_ino == found.seen.disk_ino;
        Ok(is_same.then_some(open))
    }
}

fn pause(look: u32) {
    if look > 1 {
        std::thread::sleep(PAUSE * 2u32.pow(look - 2));
    }
}

/// Whether the failure says that what was asked for is not at this path.
pub(super) fn is_elsewhere(e: &FsError) -> bool {
    matches!(e.kind(), Kind::NotFound | Kind::NotADirectory | Kind::Loop | Kind::IsADirectory)
}
