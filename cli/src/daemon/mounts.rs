//! Mounts of this device: making, unmounting, and mending what a crash left.
//!
//! What is mounted is recorded in `mounts.json`, so that the next daemon finds
//! the dead mounts of one that was killed, and makes them alive again. A record
//! without a dead mount (after a reboot, or `umount`) is dropped.

use super::parts::{Daemon, blocking};
use crate::commands::not_mounted;
use crate::control::WirePath;
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use crate::paths::drive_around;
use crate::reply::{MountReply, MountStatus, Shown, UnmountReply};
use mount_fuse::{Events, HelperCommand, Mount, MountError, MountInfo, MountOptions, Passthrough};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vfs_core::drive::{Drive, DriveConfig, ForeignSymlinks, Shown as Entry};
use vfs_core::model::{FileType, Name};

/// Where the drive is mounted when nobody says where, if this user may write there.
const USUAL: &str = "/mnt/spacedrive";

/// Entries of each location, and of all, that are compared with what a kernel shows.
const SHOWN_OF_EACH: usize = 500;
const SHOWN: usize = 5_000;
/// Longer paths are left out, so that all of it fits into one answer.
const SHOWN_BYTES: usize = 512;

/// The mounts of this daemon. Taken for the whole of making or ending one, so that
/// two requests for one mount point follow each other.
#[derive(Default)]
pub struct Mounts(Mutex<Vec<Mounted>>);

struct Mounted {
    mount: Mount,
    drive: Arc<Drive>,
    read_only: bool,
    allow_other: bool,
    /// It replaced a dead mount, and nobody was told yet.
    mended: bool,
}

/// A mount as it is written down.
pub struct Recorded {
    pub mountpoint: PathBuf,
    read_only: bool,
    allow_other: bool,
}

#[derive(Serialize, Deserialize)]
struct Row {
    mountpoint: WirePath,
    read_only: bool,
    allow_other: bool,
}

/// What `mounts.json` says; nothing when it cannot be read, since it only helps to mend.
pub fn recorded(dir: &DataDir) -> Vec<Recorded> {
    let rows: Vec<Row> = fs::read(dir.mounts())
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    rows.into_iter()
        .map(|Row { mountpoint, read_only, allow_other }| Recorded {
            mountpoint: mountpoint.into(),
            read_only,
            allow_other,
        })
        .collect()
}

impl Mounts {
    fn lock(&self) -> MutexGuard<'_, Vec<Mounted>> {
        // Every change of the list is one push or remove, so it is whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where this daemon's drive is mounted and served.
    pub fn points(&self) -> Vec<PathBuf> {
        self.lock().iter().map(|m| m.mount.mountpoint().to_owned()).collect()
    }

    /// For `sd status`.
    pub fn status(&self) -> Vec<MountStatus> {
        self.lock().iter().map(status_of).collect()
    }
}

fn status_of(mounted: &Mounted) -> MountStatus {
    MountStatus {
        mountpoint: mounted.mount.mountpoint().display().to_string(),
        read_only: mounted.read_only,
        allow_other: mounted.allow_other,
        passthrough: match mounted.mount.passthrough() {
            Passthrough::Active => "active".into(),
            Passthrough::Unavailable(why) => why,
        },
        events: match mounted.mount.events() {
            Events::ToldToOwn if mounted.allow_other => "this user's programs only".into(),
            Events::Told | Events::ToldToOwn => "active".into(),
            Events::Failing(why) => why,
            Events::Off => "off".into(),
        },
        alive: mounted.mount.is_alive(),
    }
}

impl Daemon {
    pub fn mount(
        &self,
        asked: Option<PathBuf>,
        home: Option<PathBuf>,
        read_only: bool,
        allow_other: bool,
    ) -> Outcome<MountReply> {
        self.membership()?;
        let path = asked.map_or_else(|| usual_mountpoint(home), Ok)?;
        let mut mounts = self.mounts.lock();
        mounts.retain(|m| m.mount.is_alive());
        if let Some(there) = mounts.iter_mut().find(|m| m.mount.mountpoint() == path) {
            if there.read_only != read_only || there.allow_other != allow_other {
                return Err(other_options(&path));
            }
            let mended = std::mem::take(&mut there.mended);
            return Ok(MountReply { mount: status_of(there), mended, already: !mended });
        }
        self.check_mountpoint(&path)?;
        let mended = mount_fuse::mend(&path).map_err(|e| failure(&e))?;
        let mounted = self.make(&path, read_only, allow_other)?;
        let mount = status_of(&mounted);
        mounts.push(mounted);
        self.record(&mounts);
        Ok(MountReply { mount, mended, already: false })
    }

    fn make(&self, path: &Path, read_only: bool, allow_other: bool) -> Outcome<Mounted> {
        let default = MountOptions::default();
        let options = MountOptions {
            read_only,
            allow_other,
            threads: self.config.count("mount.threads").unwrap_or(default.threads),
            passthrough: self.config.passthrough(),
            helper: self.config.tells_events().then(|| HelperCommand {
                program: "/proc/self/exe".into(),
                arguments: ["daemon", "events"].map(Into::into).into(),
            }),
        };
        let drive = self.drive(read_only);
        let mount = mount_fuse::mount(Arc::clone(&drive), path, options, self.runtime.clone())
            .map_err(|e| failure(&e))?;
        Ok(Mounted { mount, drive, read_only, allow_other, mended: false })
    }

    /// Some of what a mount shows now; asked of its drive, not of the kernel.
    pub fn shown(&self, mountpoint: &Path) -> Outcome<Vec<Shown>> {
        let all = self.drive_on(mountpoint)?.shown(SHOWN_OF_EACH);
        let fits = |shown: &Entry| {
            shown.path.iter().map(|n| n.as_bytes().len()).sum::<usize>() < SHOWN_BYTES
        };
        Ok(all.iter().filter(|shown| fits(shown)).take(SHOWN).map(shown_of).collect())
    }

    /// Has kernels look up these entries of a mount again.
    pub fn show_again(&self, mountpoint: &Path, paths: Vec<WirePath>) -> Outcome<()> {
        let drive = self.drive_on(mountpoint)?;
        for path in paths {
            let path = PathBuf::from(path);
            let names: Option<Vec<_>> =
                path.iter().map(|name| Name::new(name.as_bytes())).collect();
            if let Some(Err(error)) = names.map(|names| drive.show_again(&names)) {
                tracing::debug!(%error, path = %path.display(), "cannot be shown again");
            }
        }
        Ok(())
    }

    fn drive_on(&self, mountpoint: &Path) -> Outcome<Arc<Drive>> {
        let mounts = self.mounts.lock();
        let on = mounts.iter().find(|m| m.mount.mountpoint() == mountpoint && m.mount.is_alive());
        on.map(|m| Arc::clone(&m.drive)).ok_or_else(|| not_mounted(Some(mountpoint)))
    }

    /// What a mount shows.
    pub fn drive(&self, read_only: bool) -> Arc<Drive> {
        let config = DriveConfig {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            read_only,
            foreign_symlinks: match self.config.shows_foreign_symlinks() {
                true => ForeignSymlinks::AsIs,
                false => ForeignSymlinks::Contained,
            },
        };
        Drive::new(
            self.index.clone(),
            Arc::clone(&self.indexer),
            Arc::clone(&self.content),
            Arc::clone(&self.library),
            Arc::clone(&self.outbox),
            Arc::clone(&self.locks),
            config,
        )
    }

    /// A mount point inside a location would make the drive contain itself.
    fn check_mountpoint(&self, path: &Path) -> Outcome<()> {
        if path.starts_with(self.dir.path()) {
            return Err(Failure::new(
                Code::Invalid,
                format!("{} is inside sd's own data directory", path.display()),
            )
            .hint("choose an empty directory elsewhere"));
        }
        if let Some(around) = drive_around(path).filter(|around| around != path) {
            return Err(Failure::new(
                Code::Invalid,
                format!("{} is inside the drive mounted on {}", path.display(), around.display()),
            )
            .hint("choose an empty directory elsewhere"));
        }
        let locations = self.folders();
        let inside = |l: &&vfs_core::library::OwnLocation| path.starts_with(&l.root);
        match locations.iter().find(inside) {
            Some(location) => Err(Failure::new(
                Code::Invalid,
                format!(
                    "{} is inside the location “{}” ({})",
                    path.display(),
                    location.name,
                    location.root.display()
                ),
            )
            .hint("choose an empty directory outside of every location")),
            None => Ok(()),
        }
    }

    pub fn unmount(&self, asked: Option<PathBuf>, force: bool) -> Outcome<UnmountReply> {
        let mut mounts = self.mounts.lock();
        mounts.retain(|m| m.mount.is_alive());
        let path = match asked {
            Some(path) => path,
            None => only(&mounts)?,
        };
        match mounts.iter().position(|m| m.mount.mountpoint() == path) {
            Some(at) => {
                mounts[at].mount.unmount(force).map_err(|e| failure(&e))?;
                mounts.remove(at);
                self.record(&mounts);
            }
            None if mount_fuse::mend(&path).map_err(|e| failure(&e))? => self.record(&mounts),
            None => return Err(not_mounted(Some(&path))),
        }
        drop(mounts);
        let (mountpoint, pending) = (path.display().to_string(), self.pending_count());
        Ok(UnmountReply { mountpoint, pending })
    }

    /// Unmounts everything; a mount in use is detached and its users are named.
    pub async fn unmount_all(self: &Arc<Self>) -> Vec<String> {
        let daemon = Arc::clone(self);
        let unmounted = blocking(move || {
            let mut mounts = daemon.mounts.lock();
            // Dropping a mount that is in use detaches it.
            let remains =
                mounts.drain(..).filter_map(|m| m.mount.unmount(false).err()).map(|e| remains(&e));
            let remains = remains.collect();
            daemon.record(&mounts);
            Ok(remains)
        });
        unmounted.await.unwrap_or_else(|failure| vec![failure.message])
    }

    /// Unmounts everything, or stops at the first that is in use.
    pub async fn unmount_idle(self: &Arc<Self>) -> Outcome<()> {
        let daemon = Arc::clone(self);
        blocking(move || {
            let mut mounts = daemon.mounts.lock();
            while let Some(last) = mounts.last() {
                last.mount.unmount(false).map_err(|e| {
                    let failure = failure(&e);
                    match failure.code {
                        Code::Busy => {
                            failure.hint("end those programs, or detach it: sd daemon stop --force")
                        }
                        _ => failure,
                    }
                })?;
                mounts.pop();
                daemon.record(&mounts);
            }
            Ok(())
        })
        .await
    }

    /// Mounts again what a daemon before this one left dead.
    pub async fn revive_mounts(self: &Arc<Self>) {
        let daemon = Arc::clone(self);
        let revived = blocking(move || {
            daemon.mend_recorded();
            Ok(())
        });
        if let Err(failure) = revived.await {
            tracing::error!(%failure, "mending mounts");
        }
    }

    /// Makes recorded mounts that are dead alive again; says what was done.
    pub fn mend_recorded(&self) -> Vec<String> {
        let mut mounts = self.mounts.lock();
        mounts.retain(|m| m.mount.is_alive());
        let mut done = Vec::new();
        for record in recorded(&self.dir) {
            let path = &record.mountpoint;
            if !mount_fuse::is_dead(path) {
                continue;
            }
            let revived = mount_fuse::mend(path)
                .map_err(|e| failure(&e))
                .and_then(|_| self.make(path, record.read_only, record.allow_other));
            match revived {
                Ok(mounted) => {
                    tracing::info!(mountpoint = %path.display(), "mended a dead mount");
                    done.push(format!("mounted the drive on {} again", path.display()));
                    mounts.push(Mounted { mended: true, ..mounted });
                }
                Err(failure) => {
                    tracing::warn!(%failure, mountpoint = %path.display(), "cannot mend a dead mount");
                }
            }
        }
        self.record(&mounts);
        done
    }

    fn record(&self, mounts: &[Mounted]) {
        let served = |m: &MountInfo| mounts.iter().any(|o| o.mount.mountpoint() == m.mountpoint);
        let there = mount_fuse::mounts().into_iter().filter(served).map(|m| m.device);
        self.guard.watch(&there.collect::<Vec<_>>());
        let rows: Vec<_> = mounts
            .iter()
            .map(|m| Row {
                mountpoint: m.mount.mountpoint().into(),
                read_only: m.read_only,
                allow_other: m.allow_other,
            })
            .collect();
        let written = serde_json::to_vec(&rows)
            .map_err(std::io::Error::from)
            .and_then(|bytes| self.dir.write_private("mounts.json", &bytes));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write down what is mounted; a crash would leave it dead");
        }
    }
}

fn shown_of(entry: &Entry) -> Shown {
    let path: PathBuf = entry.path.iter().map(|name| OsStr::from_bytes(name.as_bytes())).collect();
    let attr = &entry.found.attr;
    Shown {
        path: WirePath::from(&*path),
        ino: entry.found.ino.0,
        file_type: type_of(attr.file_type),
        size: attr.size,
        mtime: (attr.mtime.secs, attr.mtime.nanos),
    }
}

/// As in `st_mode`.
fn type_of(file_type: FileType) -> u32 {
    use rustix::fs::FileType as Raw;
    let raw = match file_type {
        FileType::File => Raw::RegularFile,
        FileType::Directory => Raw::Directory,
        FileType::Symlink => Raw::Symlink,
        FileType::Fifo => Raw::Fifo,
        FileType::Socket => Raw::Socket,
        FileType::CharDevice => Raw::CharacterDevice,
        FileType::BlockDevice => Raw::BlockDevice,
    };
    raw.as_raw_mode()
}

fn only(mounts: &[Mounted]) -> Outcome<PathBuf> {
    match mounts {
        [] => Err(not_mounted(None)),
        [one] => Ok(one.mount.mountpoint().to_owned()),
        several => {
            let points: Vec<_> =
                several.iter().map(|m| m.mount.mountpoint().display().to_string()).collect();
            Err(Failure::new(
                Code::Usage,
                format!("the drive is mounted on {}", points.join(" and on ")),
            )
            .hint("say which: sd unmount MOUNTPOINT"))
        }
    }
}

/// `/mnt/spacedrive` where it is there or can be made, else `~/Spacedrive`.
fn usual_mountpoint(home: Option<PathBuf>) -> Outcome<PathBuf> {
    let usual = Path::new(USUAL);
    // A mount there, dead or alive, is dealt with by its own rules, without touching it.
    let mounted = mount_fuse::mounts().iter().any(|m| m.mountpoint == usual);
    if mounted || usable(usual) {
        return Ok(usual.to_owned());
    }
    let Some(home) = home else {
        return Err(Failure::new(Code::Io, format!("cannot write to {USUAL}"))
            .hint("say where: sd mount MOUNTPOINT"));
    };
    let path = home.join("Spacedrive");
    if mount_fuse::mounts().iter().any(|m| m.mountpoint == path) {
        return Ok(path);
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&path)
        .map_err(|e| Failure::io(format!("cannot create {}", path.display()), e))?;
    path.canonicalize().map_err(|e| Failure::io(format!("cannot use {}", path.display()), e))
}

fn usable(path: &Path) -> bool {
    // Others than its user need to pass through it when `--allow-other` is wanted.
    let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(path).is_ok();
    made && rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}

fn other_options(path: &Path) -> Failure {
    Failure::new(
        Code::Exists,
        format!("the drive is already mounted on {} with other options", path.display()),
    )
    .hint(format!("unmount it first: sd unmount {}", path.display()))
}

fn remains(error: &MountError) -> String {
    format!("{}; it was detached and ends with them", failure(error).message)
}

/// Words why a mount could not be made or ended.
pub fn failure(error: &MountError) -> Failure {
    let text = error.to_string();
    let worded = |code, hint: String| Failure::new(code, text.clone()).hint(hint);
    match error {
        MountError::Missing { path } => {
            worded(Code::NotFound, format!("create it: mkdir -p {}", path.display()))
        }
        MountError::NotADirectory { .. } => {
            worded(Code::Invalid, "choose an empty directory".into())
        }
        MountError::NotEmpty { .. } => {
            worded(Code::Invalid, "choose an empty directory: a mount hides what is in it".into())
        }
        MountError::AlreadyMounted { .. } => worded(
            Code::Busy,
            "another daemon serves it; choose another directory, or unmount it there".into(),
        ),
        MountError::Occupied { .. } => {
            worded(Code::Busy, "choose an empty directory that nothing is mounted on".into())
        }
        MountError::Dead { path } => {
            worded(Code::Busy, format!("detach it: sd unmount --force {}", path.display()))
        }
        MountError::NotMounted { path } => not_mounted(Some(path)),
        MountError::Busy { path, holders } => {
            let users: Vec<_> =
                holders.iter().map(|h| format!("{} (process {})", h.command, h.pid)).collect();
            let by = match users.as_slice() {
                [] => "by a process that this user cannot see".to_owned(),
                users => format!("by {}", users.join(", ")),
            };
            Failure::new(Code::Busy, format!("{text} {by}"))
                .hint(format!("end those programs, or: sd unmount --force {}", path.display()))
        }
        MountError::NoFuse { source } => {
            let text = Failure::io(&text, std::io::Error::from(source.kind())).message;
            Failure::new(Code::Io, text).hint(match source.kind() {
                std::io::ErrorKind::PermissionDenied => {
                    "only root may use it here; usually everybody may: chmod 666 /dev/fuse"
                }
                _ => "load it: modprobe fuse; a container needs --device /dev/fuse",
            })
        }
        MountError::NoHelper => {
            worded(Code::NotFound, "install it: the package is called fuse3".into())
        }
        MountError::AllowOtherForbidden => worded(
            Code::Refused,
            "have root add the line user_allow_other to /etc/fuse.conf, or leave --allow-other out"
                .into(),
        ),
        MountError::Helper { .. } => {
            worded(Code::Io, "try another directory; /etc/fuse.conf may limit mounts".into())
        }
        MountError::Os { source, .. } => {
            let os = source.raw_os_error().map(std::io::Error::from_raw_os_error);
            Failure::io(text, os.unwrap_or_else(|| source.kind().into()))
        }
    }
}
