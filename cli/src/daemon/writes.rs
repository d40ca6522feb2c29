//! What waits for other devices: `sd pending`, `sd pending export`, `sd sync`.
//!
//! A write that no owner will take, because its owner or its location was
//! removed or because it was refused, stays until a person has its bytes as
//! files and gives it up.

use super::locations::unknown_location;
use super::parts::Daemon;
use super::report::rfc3339;
use super::serve::Link;
use crate::control::{Draining, Event, Target};
use crate::failure::{Code, Failure, Outcome};
use crate::paths::{drive_around, inside_drive};
use crate::reply::{
    DeviceName, DevicePending, ExportReply, ExportedFile, JournalStatus, PendingCount,
    PendingReply, PendingStatus, PendingWrite, SyncReply,
};
use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;
use vfs_core::model::{DeviceId, LocationId, LocationNo, Name};
use vfs_core::outbox::{Exported, Pending, PendingState};
use vfs_core::path::SdPath;

/// How often a waiting command hears how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// Writes told in one event.
const PAGE: usize = 500;
/// Writes told one by one when a sync ends without them.
const TOLD: usize = 1000;
/// The list of what was exported, beside the files.
const LIST: &str = "pending.json";

/// Which writes are meant.
enum Which {
    All,
    Of(Vec<DeviceId>),
    Below { owners: Vec<DeviceId>, location: String, path: Vec<Name> },
}

/// Who is a member and who can be reached, at one moment.
struct Members {
    active: HashSet<DeviceId>,
    online: HashSet<DeviceId>,
}

impl Daemon {
    /// Sends every write that waits, the oldest first; the answer is their number.
    pub fn pending(&self, link: &Link) -> Outcome<PendingReply> {
        let all = self.outbox.pending();
        let members = self.members();
        for page in all.chunks(PAGE) {
            let rows = page.iter().map(|p| self.row(p, &members)).collect();
            link.blocking_send(Event::Pending(rows))?;
        }
        Ok(PendingReply { count: count(&all), pending: Vec::new() })
    }

    /// What waits, in numbers.
    pub fn pending_count(&self) -> PendingCount {
        let (operations, bytes) = self.outbox.backlog();
        PendingCount { operations: operations as u64, bytes }
    }

    /// What waits for one device.
    pub fn pending_for(&self, owner: DeviceId) -> PendingCount {
        let backlogs = self.outbox.backlogs();
        let its = backlogs.iter().find(|b| b.owner == owner);
        its.map_or_else(PendingCount::default, |b| PendingCount {
            operations: b.operations,
            bytes: b.bytes,
        })
    }

    /// What waits of a place and all below it.
    pub fn pending_below(&self, location: LocationNo, path: &[Name]) -> PendingCount {
        let its = |p: &Pending| p.location == Some(location) && p.path.starts_with(path);
        count(&self.outbox.pending().into_iter().filter(its).collect::<Vec<_>>())
    }

    pub fn pending_status(&self) -> PendingStatus {
        let members = self.members();
        let backlogs = self.outbox.backlogs();
        let devices = backlogs.iter().map(|b| DevicePending {
            device: self.name_of(b.owner),
            count: PendingCount { operations: b.operations, bytes: b.bytes },
            blocked: b.stuck,
            member: members.active.contains(&b.owner),
        });
        PendingStatus {
            count: PendingCount {
                operations: backlogs.iter().map(|b| b.operations).sum(),
                bytes: backlogs.iter().map(|b| b.bytes).sum(),
            },
            blocked: backlogs.iter().map(|b| b.stuck).sum(),
            since: backlogs.iter().map(|b| b.since).min().map(rfc3339),
            devices: devices.collect(),
        }
    }

    pub fn journal_status(&self) -> JournalStatus {
        let usage = self.outbox.usage();
        let found = &self.outbox_report;
        JournalStatus {
            bytes: usage.journal_bytes,
            staged_bytes: usage.staged_bytes,
            torn_tail: found.torn_tail,
            set_aside: self.damaged_parts(),
            lost: found.lost.clone(),
            orphan_bytes: found.orphan_bytes,
        }
    }

    /// What was set aside at this start, and at earlier ones as long as nobody removed it.
    fn damaged_parts(&self) -> Vec<String> {
        let earlier = fs::read_dir(self.dir.outbox().join("journal/damaged"));
        let earlier = earlier.into_iter().flatten().flatten().map(|entry| entry.path());
        let all: BTreeSet<PathBuf> =
            self.outbox_report.set_aside.iter().cloned().chain(earlier).collect();
        all.iter().filter(|p| p.exists()).map(|p| p.display().to_string()).collect()
    }

    fn members(&self) -> Members {
        let peers = self.node.peers();
        Members {
            active: self.library.with(|state| state.active().map(|m| m.id).collect()),
            online: peers.iter().filter(|p| p.online).map(|p| p.id).collect(),
        }
    }

    /// Whether no owner will ever take it as it stands.
    fn is_hopeless(&self, pending: &Pending, members: &Members) -> bool {
        pending.stuck || orphaned(pending, members)
    }

    fn row(&self, pending: &Pending, members: &Members) -> PendingWrite {
        let owner = self.name_of(pending.owner);
        let (state, reason) = state_words(pending, &owner, members);
        let address = (!orphaned(pending, members))
            .then(|| self.address_in(&owner, pending.location_id, &pending.path))
            .flatten();
        PendingWrite {
            id: pending.no,
            location: self.location_label(pending.location_id),
            address: address.map(|a| a.to_string()),
            path: display(&pending.path),
            what: pending.what.clone(),
            bytes: pending.bytes,
            since: rfc3339(pending.since),
            attempts: pending.attempts,
            state: state.into(),
            reason,
            owner: DeviceName { id: pending.owner.to_string(), name: owner },
        }
    }

    /// A location's name; its id when it was removed.
    pub fn location_label(&self, id: LocationId) -> String {
        self.index.location_by_id(id).map_or_else(|| id.to_string(), |l| l.name.clone())
    }

    /// The address of a path in a location that is there.
    pub fn address_in(&self, owner: &str, id: LocationId, path: &[Name]) -> Option<SdPath> {
        let location = self.index.location_by_id(id)?;
        Some(SdPath::File {
            device: owner.to_owned(),
            location: Some(location.name.clone()),
            path: path.to_vec(),
        })
    }

    /// Waits until what is pending now has reached its owners, or cannot any more.
    pub async fn sync(
        &self,
        target: Option<&Target>,
        timeout: Option<Duration>,
        link: &Link,
    ) -> Outcome<SyncReply> {
        self.membership()?;
        let which = target.map_or(Ok(Which::All), |t| self.below(t))?;
        self.outbox.try_again();
        let waits: BTreeSet<u64> = self.matching(&which).iter().map(|p| p.no).collect();
        let mut reached = pin!(self.outbox.reached(waits.clone()));
        let mut timed_out = pin!(async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        });
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = &mut reached => break,
                () = &mut timed_out => break,
                _ = ticks.tick() => {
                    let (left, members) = (self.outbox.left(&waits), self.members());
                    if left.iter().all(|p| self.is_hopeless(p, &members)) {
                        break;
                    }
                    link.send(Event::Draining(self.draining(&left, &members))).await?;
                }
            }
        }
        let left = self.outbox.left(&waits);
        let members = self.members();
        Ok(SyncReply {
            reached: left.is_empty(),
            left: count(&left),
            pending: left.iter().take(TOLD).map(|p| self.row(p, &members)).collect(),
        })
    }

    fn draining(&self, left: &[Pending], members: &Members) -> Draining {
        let PendingCount { operations, bytes } = count(left);
        let away: BTreeSet<DeviceId> =
            left.iter().map(|p| p.owner).filter(|o| !members.online.contains(o)).collect();
        let offline = away.into_iter().map(|owner| self.name_of(owner)).collect();
        Draining { operations, bytes, offline }
    }

    /// The writes below an address of this library; what was removed is not in it.
    fn below(&self, target: &Target) -> Outcome<Which> {
        let (device, location, path) = match self.parse(target)? {
            SdPath::Root => return Ok(Which::All),
            SdPath::Content(_) => return Err(no_place()),
            SdPath::File { device, location, path } => (device, location, path),
        };
        let owners = vec![self.member_named(&device)?.id];
        let Some(location) = location else { return Ok(Which::Of(owners)) };
        let its = self.locations_named(&device);
        match its.iter().any(|l| l.name == location) {
            true => Ok(Which::Below { owners, location, path }),
            false => Err(unknown_location(&location, its.iter().map(|l| l.name.as_str()), None)),
        }
    }

    /// The writes that a person named for export: those of removed devices and locations too.
    fn exportable(&self, of: &str) -> Outcome<Vec<Pending>> {
        let which = match of.starts_with("sd://") {
            true => match of.parse() {
                Ok(SdPath::Root) => Which::All,
                Ok(SdPath::Content(_)) => return Err(no_place()),
                Ok(SdPath::File { device, location: None, .. }) => {
                    Which::Of(self.owners_named(&device)?)
                }
                Ok(SdPath::File { device, location: Some(location), path }) => {
                    Which::Below { owners: self.owners_named(&device)?, location, path }
                }
                Err(e) => {
                    return Err(Failure::new(
                        Code::Usage,
                        format!("“{of}” is not an address: {e}"),
                    )
                    .hint("as sd://DEVICE/LOCATION/PATH, or just the device's name"));
                }
            },
            false => Which::Of(self.owners_named(of)?),
        };
        let found = self.matching(&which);
        match found.is_empty() {
            false => Ok(found),
            true => Err(Failure::new(Code::NotFound, format!("nothing waits for “{of}”"))
                .hint("`sd pending` shows what waits, and for whom")),
        }
    }

    /// Devices of this name or id, those that were removed included.
    fn owners_named(&self, name: &str) -> Outcome<Vec<DeviceId>> {
        let waiting = self.outbox.owners();
        let found: Vec<_> = self.library.with(|state| {
            let named = state.members.iter().filter(|m| m.name == name).map(|m| m.id);
            let by_id = waiting.iter().copied().filter(|id| id.to_string() == name);
            named.chain(by_id).collect()
        });
        match found.is_empty() {
            false => Ok(found),
            // Words the failure, with the nearest name.
            true => self.member_named(name).map(|m| vec![m.id]),
        }
    }

    fn matching(&self, which: &Which) -> Vec<Pending> {
        let mut all = self.outbox.pending();
        match which {
            Which::All => {}
            Which::Of(owners) => all.retain(|p| owners.contains(&p.owner)),
            Which::Below { owners, location, path } => all.retain(|p| {
                owners.contains(&p.owner)
                    && p.path.starts_with(path)
                    && self.location_label(p.location_id) == *location
            }),
        }
        all
    }

    /// Writes what waits into a folder, as files; nothing that is there is replaced.
    pub fn export(&self, of: &str, to: &Path, forget: bool, dry_run: bool) -> Outcome<ExportReply> {
        if let Some(mountpoint) = drive_around(to) {
            return Err(inside_drive(to, &mountpoint));
        }
        let found = self.exportable(of)?;
        let members = self.members();
        let hopeless: Vec<u64> = found
            .iter()
            .filter(|p| forget && self.is_hopeless(p, &members))
            .map(|p| p.no)
            .collect();
        let mut reply = ExportReply {
            count: count(&found),
            dir: to.display().to_string(),
            files: Vec::new(),
            forgotten: hopeless.len() as u64,
        };
        if dry_run {
            return Ok(reply);
        }
        make_dir(to)?;
        reply.files = self.export_all(&found, to)?;
        let rows: Vec<_> = found.iter().map(|p| self.row(p, &members)).collect();
        let list = serde_json::to_vec_pretty(&serde_json::json!({ "pending": rows }))
            .map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
        let (mut file, path) = create(&to.join(LIST))?;
        file.write_all(&list).and_then(|()| file.sync_all()).map_err(|e| unwritten(&path, e))?;
        sync_dir(to)?;
        if !hopeless.is_empty() {
            let forgotten = self.outbox.forget(&hopeless).map_err(|e| {
                Failure::new(Code::Io, format!("exported, but cannot be given up: {e}"))
                    .hint("they still wait; free some space on the data directory's disk")
            })?;
            reply.forgotten = forgotten as u64;
        }
        Ok(reply)
    }

    fn export_all(&self, found: &[Pending], to: &Path) -> Outcome<Vec<ExportedFile>> {
        let (mut files, mut links) = (Vec::new(), Vec::new());
        // The newest of a path has its name; an older one gets a number.
        for pending in found.iter().rev() {
            let path = self.place_of(pending, to);
            match self.outbox.makes(pending.no) {
                Some(Exported::File) => files.push(self.export_file(pending.no, &path)?),
                Some(Exported::Directory) => make_dir(&path)?,
                Some(Exported::Symlink(target)) => links.push((path, target)),
                Some(Exported::Nothing) | None => {}
            }
        }
        // Last, so that nothing is written through one.
        for (path, target) in links {
            use std::os::unix::ffi::OsStrExt;
            make_parent(&path)?;
            let target = std::ffi::OsStr::from_bytes(&target).to_owned();
            let made = unused(&path, |p| std::os::unix::fs::symlink(&target, p));
            let (_, path) = made.map_err(|e| unwritten(&path, e))?;
            files.push(ExportedFile { path: path.display().to_string(), missing_bytes: 0 });
        }
        Ok(files)
    }

    fn place_of(&self, pending: &Pending, to: &Path) -> PathBuf {
        let mut path = to.join(self.name_of(pending.owner));
        path.push(self.location_label(pending.location_id));
        path.extend(pending.path.iter().map(AsRef::<std::ffi::OsStr>::as_ref));
        path
    }

    fn export_file(&self, no: u64, path: &Path) -> Outcome<ExportedFile> {
        make_parent(path)?;
        let (file, path) = create(path)?;
        let missing = self.runtime.block_on(self.outbox.export(no, &file)).map_err(|e| {
            // An unfinished file is no export.
            let _ = fs::remove_file(&path);
            Failure::new(Code::Io, format!("cannot export to {}: {e}", path.display()))
                .hint("it still waits; free some space there, or choose another folder")
        })?;
        file.sync_all().map_err(|e| unwritten(&path, e))?;
        let missing_bytes = missing.iter().map(|r| r.end - r.start).sum();
        Ok(ExportedFile { path: path.display().to_string(), missing_bytes })
    }
}

/// Its owner, or its location, was removed.
fn orphaned(pending: &Pending, members: &Members) -> bool {
    pending.location.is_none() || !members.active.contains(&pending.owner)
}

fn state_words(
    pending: &Pending,
    owner: &str,
    members: &Members,
) -> (&'static str, Option<String>) {
    if !members.active.contains(&pending.owner) {
        return ("orphaned", Some(format!("“{owner}” was removed from the library")));
    }
    if pending.location.is_none() {
        return ("orphaned", Some("the location was removed".into()));
    }
    match &pending.state {
        PendingState::Blocked(why) if pending.stuck => ("blocked", Some(why.clone())),
        PendingState::Blocked(why) => ("retrying", Some(why.clone())),
        PendingState::Sent => ("sent", Some(format!("“{owner}” has not answered yet"))),
        PendingState::Held => ("held", Some("it is still being written".into())),
        PendingState::Waiting if members.online.contains(&pending.owner) => ("waiting", None),
        PendingState::Waiting => ("waiting", Some(format!("“{owner}” is offline"))),
    }
}

fn count(of: &[Pending]) -> PendingCount {
    PendingCount { operations: of.len() as u64, bytes: of.iter().map(|p| p.bytes).sum() }
}

/// A path below a location's folder, for people.
pub fn display(path: &[Name]) -> String {
    path.iter().map(|name| name.display()).collect::<Vec<_>>().join("/")
}

fn no_place() -> Failure {
    Failure::new(Code::Usage, "a content has no owner that it could wait for")
        .hint("give a device, a location or a path: sd://DEVICE/LOCATION/PATH")
}

fn make_dir(path: &Path) -> Outcome<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|e| Failure::io(format!("cannot create {}", path.display()), e))
}

fn make_parent(path: &Path) -> Outcome<()> {
    path.parent().map_or(Ok(()), make_dir)
}

/// Creates a file of this name, or of the next that is free.
pub fn create(path: &Path) -> Outcome<(File, PathBuf)> {
    let made = unused(path, |path| {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
    });
    made.map_err(|e| unwritten(path, e))
}

/// Does it under this name, or under the same with the first number that is free.
fn unused<T>(
    path: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    let mut candidate = path.to_owned();
    for number in 2.. {
        match make(&candidate) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|made| (made, candidate)),
        }
        let mut name = OsString::from(path.file_stem().unwrap_or_default());
        name.push(format!(" ({number})"));
        if let Some(extension) = path.extension() {
            name.push(".");
            name.push(extension);
        }
        candidate.set_file_name(name);
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn unwritten(path: &Path, error: io::Error) -> Failure {
    let failure = Failure::io(format!("cannot write {}", path.display()), error);
    match failure.hint {
        Some(_) => failure,
        None => failure.hint("choose another folder; what waits was not touched"),
    }
}

/// So that what is given up afterwards has a name that survives a power failure.
fn sync_dir(path: &Path) -> Outcome<()> {
    let synced = File::open(path).and_then(|dir| rustix::fs::syncfs(&dir).map_err(Into::into));
    synced.map_err(|e| unwritten(path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let names: Vec<_> = (0..3).map(|_| create(&path).unwrap().1).collect();
        let expected = ["a.tar", "a (2).tar", "a (3).tar"].map(|name| dir.path().join(name));
        assert_eq!(names, expected);
    }
}
