//! Own locations: add, remove, rescan.

use super::members::check;
use super::parts::{Daemon, blocking, index_failure, library_failure};
use super::serve::Link;
use crate::control::{Event, NewLocation, Progress};
use crate::failure::{Code, Failure, Outcome, nearest};
use crate::paths::{self, drive_around, drive_below, inside_drive};
use crate::reply::LocationReply;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use vfs_core::indexer::State;
use vfs_core::library::OwnLocation;
use vfs_core::model::{DeviceId, Location, LocationId, LocationNo};
use vfs_core::path::SdPath;

/// How often a waiting command hears how far the scan is.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_millis(100);

impl Daemon {
    pub async fn add_location(
        self: &Arc<Self>,
        new: NewLocation,
        link: &Link,
    ) -> Outcome<LocationReply> {
        let wait = new.wait;
        let daemon = Arc::clone(self);
        let location = blocking(move || daemon.register(new)).await?;
        if wait {
            self.wait_indexed(&location, link).await?;
        }
        self.location_reply(&location)
    }

    fn register(&self, new: NewLocation) -> Outcome<Arc<Location>> {
        self.membership()?;
        let root: PathBuf = new.path.into();
        self.check_folder(&root)?;
        if let Some(name) = &new.name {
            check(name, "location")?;
        }
        let shared_with = self.shares(&new.share_with)?;
        let id = LocationId::new(self.me, rand::random());
        let added = self.library.update(|state| {
            let name = free_name(new.name.as_deref(), &root, &state.locations)?;
            let read_only = new.read_only;
            let (root, root_id) = (root.clone(), None);
            let location = OwnLocation { id, name, root, read_only, shared_with, root_id };
            state.locations.push(location.clone());
            Ok::<_, Failure>(location)
        });
        let added = added.map_err(library_failure)??;
        let location = self.put_location(&added)?;
        self.watch(&added, location.no);
        self.node.locations_changed();
        Ok(location)
    }

    fn shares(&self, names: &[String]) -> Outcome<Option<Vec<DeviceId>>> {
        if names.is_empty() {
            return Ok(None);
        }
        names.iter().map(|n| self.member_named(n).map(|m| m.id)).collect::<Outcome<_>>().map(Some)
    }

    /// Compares paths as text: nothing here touches a mount.
    fn check_folder(&self, root: &Path) -> Outcome<()> {
        let shown = root.display();
        let refuse = |message: String, hint: &str| {
            Err(Failure::new(Code::Invalid, message).hint(hint.to_owned()))
        };
        if let Some(mountpoint) = drive_around(root) {
            return Err(inside_drive(root, &mountpoint));
        }
        if let Some(mountpoint) = drive_below(root) {
            return refuse(
                format!("{shown} contains the drive mounted on {}", mountpoint.display()),
                "add its folders one by one, or mount the drive elsewhere",
            );
        }
        check_overlap(root, &self.folders())?;
        if root.starts_with(self.dir.path()) {
            return refuse(
                format!("{shown} is inside sd's own data directory"),
                "choose a folder with files of yours",
            );
        }
        if self.dir.path().starts_with(root) {
            return refuse(
                format!("{shown} contains sd's own data directory {}", self.dir.path().display()),
                "add its folders one by one, or move the data directory with --data-dir",
            );
        }
        Ok(())
    }

    pub fn remove_location(&self, name: &str, dry_run: bool) -> Outcome<LocationReply> {
        let location = self.own_location(name)?;
        let reply = self.location_reply(&location)?;
        if dry_run {
            return Ok(reply);
        }
        let removed = self.library.update(|s| s.locations.retain(|l| l.id != location.id));
        removed.map_err(library_failure)?;
        self.indexer.forget(location.no);
        self.index.remove_location(location.no).map_err(index_failure)?;
        self.node.locations_changed();
        Ok(reply)
    }

    pub async fn rescan_location(
        &self,
        name: &str,
        wait: bool,
        link: &Link,
    ) -> Outcome<LocationReply> {
        let location = self.own_location(name)?;
        let (indexer, no) = (Arc::clone(&self.indexer), location.no);
        blocking(move || {
            indexer.rescan(no);
            Ok(())
        })
        .await?;
        if wait {
            self.wait_indexed(&location, link).await?;
        }
        self.location_reply(&location)
    }

    async fn wait_indexed(&self, location: &Location, link: &Link) -> Outcome<()> {
        loop {
            let progress = self.indexer.progress(location.no);
            if let State::Offline(why) = &progress.state {
                return Err(offline(location, why));
            }
            if progress.indexed && progress.state != State::Scanning {
                return Ok(());
            }
            if self.index.location(location.no).is_none() {
                return Err(Failure::new(
                    Code::NotFound,
                    format!("the location “{}” was removed meanwhile", location.name),
                ));
            }
            let event = Progress {
                what: format!("scanning {}", location.name),
                entries: self.index.counts(location.no).entries,
                directories_waiting: progress.directories_waiting,
            };
            link.send(Event::Progress(event)).await?;
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    }

    /// This device's location of this name.
    fn own_location(&self, name: &str) -> Outcome<Arc<Location>> {
        self.membership()?;
        let all = self.index.locations();
        let own: Vec<_> = all.iter().filter(|l| l.owner == self.me).collect();
        match own.iter().find(|l| l.name == name) {
            Some(location) => Ok(Arc::clone(location)),
            None => {
                let others = all.iter().find(|l| l.owner != self.me && l.name == name);
                Err(unknown_location(
                    name,
                    own.iter().map(|l| l.name.as_str()),
                    others.map(|l| self.name_of(l.owner)),
                ))
            }
        }
    }

    fn location_reply(&self, location: &Location) -> Outcome<LocationReply> {
        let (_, me) = self.membership()?;
        let counts = self.index.counts(location.no);
        let address =
            SdPath::File { device: me.name, location: Some(location.name.clone()), path: vec![] };
        Ok(LocationReply {
            name: location.name.clone(),
            path: self.folder(location).map(|r| r.display().to_string()).unwrap_or_default(),
            address: address.to_string(),
            entries: counts.entries,
            files: counts.files,
            bytes: counts.bytes,
            indexed: self.is_indexed(location.no),
        })
    }

    pub fn is_indexed(&self, location: LocationNo) -> bool {
        self.indexer.progress(location).indexed
    }
}

fn check_overlap(root: &Path, locations: &[OwnLocation]) -> Outcome<()> {
    for other in locations {
        let described = format!("the location “{}” ({})", other.name, other.root.display());
        let shown = root.display();
        if root == other.root {
            return Err(Failure::new(Code::Exists, format!("{shown} is already {described}"))
                .hint("there is nothing to do; `sd location list` shows it"));
        }
        if root.starts_with(&other.root) {
            return Err(Failure::new(Code::Invalid, format!("{shown} is inside {described}"))
                .hint("the library sees it already, as a folder of that location"));
        }
        if other.root.starts_with(root) {
            return Err(Failure::new(Code::Invalid, format!("{shown} contains {described}"))
                .hint(format!("remove that one first: sd location remove {}", other.name)));
        }
    }
    Ok(())
}

/// The name asked for, when it is free; else the folder's, with a suffix when that is taken.
fn free_name(asked: Option<&str>, root: &Path, locations: &[OwnLocation]) -> Outcome<String> {
    let taken = |name: &str| locations.iter().find(|l| l.name == name);
    if let Some(name) = asked {
        return match taken(name) {
            None => Ok(name.to_owned()),
            Some(other) => Err(Failure::new(
                Code::Exists,
                format!("{} is already called “{name}”", other.root.display()),
            )
            .hint("choose another --name")),
        };
    }
    let base = paths::label(root.file_name().unwrap_or_default(), "folder");
    let candidates =
        std::iter::once(base.clone()).chain((2..).map(|number| format!("{base}-{number}")));
    Ok(candidates.into_iter().find(|name| taken(name).is_none()).unwrap_or(base))
}

fn offline(location: &Location, why: &str) -> Failure {
    Failure::new(Code::Io, format!("the location “{}” is offline: {why}", location.name))
        .hint("connect the disk it is on; it is indexed as soon as it is there")
}

/// The failure for a location name that does not exist.
pub fn unknown_location<'a>(
    name: &str,
    known: impl IntoIterator<Item = &'a str>,
    other_owner: Option<String>,
) -> Failure {
    if let Some(owner) = other_owner {
        return Failure::new(
            Code::NotFound,
            format!("“{name}” is a location of “{owner}”, not of this device"),
        )
        .hint(format!("do it on “{owner}”"));
    }
    let failure = Failure::new(Code::NotFound, format!("no location is called “{name}”"));
    match nearest(name, known) {
        Some(near) => {
            failure.hint(format!("did you mean “{near}”? `sd location list` shows them all"))
        }
        None => failure.hint("`sd location list` shows them all"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(name: &str, root: &str) -> OwnLocation {
        OwnLocation {
            id: LocationId([0; 16]),
            name: name.into(),
            root: root.into(),
            read_only: false,
            shared_with: None,
            root_id: None,
        }
    }

    #[test]
    fn a_taken_default_name_gets_a_suffix_and_a_taken_asked_one_is_refused() {
        let taken = [own("a", "/x/a"), own("a-2", "/y/a")];
        assert_eq!(free_name(None, Path::new("/z/a"), &taken).unwrap(), "a-3");
        assert_eq!(free_name(Some("a"), Path::new("/z/b"), &taken).unwrap_err().code, Code::Exists);
        assert_eq!(free_name(None, Path::new("/"), &taken).unwrap(), "folder");
    }

    #[test]
    fn locations_do_not_overlap_but_may_stand_side_by_side() {
        let there = [own("a", "/x/a")];
        for root in ["/x/a", "/x/a/b", "/x", "/"] {
            assert!(check_overlap(Path::new(root), &there).is_err(), "{root}");
        }
        assert!(check_overlap(Path::new("/x/ab"), &there).is_ok());
    }
}
