//! Making, watching and taking away one mount.
//!
//! A [`Mount`] owns: the thread `sd-fuse`, in which `fuser`'s threads serve
//! the kernel; the last strong reference to the FUSE device outside of them,
//! which goes when that thread ends, so that the kernel then fails every
//! request instead of waiting; and the thread that sends invalidations.
//!
//! Nothing here ever asks a file system about a path at which a drive is
//! mounted, except [`is_dead`], which does it in a thread of its own and stops
//! waiting after a while.

use crate::adapter::Adapter;
use crate::attach::{self, Detach};
use crate::error::MountError;
use crate::events::{self, Teller};
use crate::growth::Grower;
use crate::helper::HelperCommand;
use crate::invalidate::Invalidator;
use crate::linger::Linger;
use crate::listings::Listings;
use crate::mounts::{self, DeviceNo, MountInfo};
use crate::negotiate::Negotiated;
use crate::notify::Kernel;
use crate::stage::Stage;
use rustix::io::Errno;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use vfs_core::drive::Drive;

/// How long a living daemon may take to answer before the question is given up.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the serving threads may take to end once the kernel has let go.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The kernel reads this much ahead of a sequential reader. Its own default is 128 KiB, too
/// little to keep a network busy; one request to the daemon carries at most 1 MiB.
const READ_AHEAD_KIB: u32 = 1024;

/// How the drive is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Other users may use it, within the files' permissions.
    pub allow_other: bool,
    /// Threads that serve the kernel. More than four gained nothing when measured: what waits
    /// for the network does not occupy one.
    pub threads: usize,
    /// Let the kernel read and write whole local files by itself, where it can.
    pub passthrough: bool,
    /// How to start what tells programs that watch of changes made elsewhere; without it they
    /// are not told. Needs a mount that can be written to.
    pub helper: Option<HelperCommand>,
}

/// Whether programs that watch are told of changes made elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Events {
    /// They are.
    Told,
    /// Those of the user who mounted are: it cannot be seen what others watch.
    ToldToOwn,
    /// They are not, for this reason; it is tried again.
    Failing(String),
    /// They are not: the mount is read-only, or it was not asked for.
    Off,
}

impl Default for MountOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        Self { read_only: false, allow_other: false, threads, passthrough: true, helper: None }
    }
}

/// Whether the kernel reads and writes whole local files by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Passthrough {
    /// It does.
    Active,
    /// The daemon does, for this reason; slower and equally correct.
    Unavailable(String),
}

/// Mounts the drive on an existing, empty directory, and returns when it can be used.
///
/// # Errors
/// What is wrong with the mount point, or why the system refused; nothing stays mounted then.
pub fn mount(
    drive: Arc<Drive>,
    mountpoint: &Path,
    options: MountOptions,
    runtime: tokio::runtime::Handle,
) -> Result<Mount, MountError> {
    let mountpoint = checked_mountpoint(mountpoint)?;
    let device = Arc::new(attach::attach(&mountpoint, &options)?);
    start(drive, &mountpoint, &options, runtime, device).inspect_err(|_| {
        if let Err(error) = attach::detach(&mountpoint, Detach::Lazily) {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot undo a failed mount");
        }
    })
}

/// The mount point as the kernel spells it, when a drive can be mounted on it.
fn checked_mountpoint(path: &Path) -> Result<PathBuf, MountError> {
    let spelled = mounts::spelled(path).map_err(|error| missing_or_os(path, error))?;
    if mounts::on(&spelled).is_some_and(|m| m.is_ours()) {
        return Err(match is_dead(&spelled) {
            true => MountError::Dead { path: spelled },
            false => MountError::AlreadyMounted { path: spelled },
        });
    }
    // The last component may be a symbolic link.
    let path = spelled.canonicalize().map_err(|error| missing_or_os(&spelled, error))?;
    if let Some(other) = mounts::on(&path) {
        return Err(MountError::Occupied { path, fs_type: other.fs_type });
    }
    let mut entries = std::fs::read_dir(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => MountError::NotADirectory { path: path.clone() },
        _ => MountError::os("cannot read the directory", &path, error),
    })?;
    match entries.next() {
        None => Ok(path),
        Some(_) => Err(MountError::NotEmpty { path }),
    }
}

fn missing_or_os(path: &Path, error: io::Error) -> MountError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => MountError::Missing { path },
        io::ErrorKind::NotADirectory => MountError::NotADirectory { path },
        _ => MountError::os("cannot resolve", path, error),
    }
}

fn start(
    drive: Arc<Drive>,
    mountpoint: &Path,
    options: &MountOptions,
    runtime: tokio::runtime::Handle,
    device: Arc<OwnedFd>,
) -> Result<Mount, MountError> {
    let failed = |error| MountError::os("cannot talk to the kernel about", mountpoint, error);
    let number = mounts::on(mountpoint).map(|info| info.device);
    let negotiated = Arc::new(Negotiated::new(options.passthrough));
    let listings = Arc::new(Listings::default());
    let tells = options.helper.is_some() && !options.read_only && number.is_some();
    let stage = Arc::new(Stage::new(tells));
    let adapter = Adapter::new(
        Arc::clone(&drive),
        runtime.clone(),
        Arc::clone(&negotiated),
        Arc::clone(&listings),
        Arc::clone(&stage),
        Linger::new(Arc::clone(&device), options.threads),
    );
    let session = fuser::Session::from_fd(
        adapter,
        device.try_clone().map_err(failed)?,
        // The kernel itself keeps strangers out. fuser's own check would also fail a
        // descriptor that its owner handed to a process of another user.
        fuser::SessionACL::All,
        session_config(options),
    )
    .map_err(failed)?;
    if let Some(number) = number {
        raise_read_ahead(number);
    }
    let kernel = || Kernel::new(Arc::downgrade(&device), negotiated.abi(), number);
    let told = (kernel(), kernel());
    let grower = Grower::new(&drive, kernel(), &runtime);
    let serving = Serving::start(session, device, mountpoint, number).map_err(failed)?;
    let teller = match (&options.helper, number) {
        (Some(command), Some(device)) if tells => {
            let (drive, kernel, command) = (Arc::clone(&drive), told.1, command.clone());
            let mountpoint = mountpoint.to_owned();
            let parts = events::Parts { drive, kernel, stage, mountpoint, device, command };
            Some(Teller::start(parts, &runtime).map_err(failed)?)
        }
        _ => None,
    };
    let invalidator =
        Invalidator::start(drive, told.0, grower, listings, number, &runtime).map_err(failed)?;
    Ok(Mount {
        mountpoint: mountpoint.to_owned(),
        number,
        negotiated,
        serving,
        _invalidator: invalidator,
        teller,
    })
}

fn session_config(options: &MountOptions) -> fuser::Config {
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.threads.max(1));
    // Each thread then has a queue of its own in the kernel; it takes opening the device once
    // per thread, which an ordinary user may not be allowed.
    config.clone_fd = attach::open_device().is_ok();
    config
}

/// Needs root; without it the kernel's default stays. Writing here does not touch the mount.
fn raise_read_ahead(device: DeviceNo) {
    let file = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&file, READ_AHEAD_KIB.to_string()) {
        tracing::debug!(%error, file, "read-ahead stays as it is");
    }
}

/// The thread in which `fuser` serves the kernel.
struct Serving {
    alive: Arc<AtomicBool>,
    ended: mpsc::Receiver<()>,
}

impl Serving {
    fn start(
        session: fuser::Session<Adapter>,
        device: Arc<OwnedFd>,
        mountpoint: &Path,
        number: Option<DeviceNo>,
    ) -> io::Result<Self> {
        let alive = Arc::new(AtomicBool::new(true));
        let (at_end, ended) = mpsc::sync_channel(1);
        let ending = Ending { alive: Arc::clone(&alive), _device: device, _ended: at_end };
        let mountpoint = mountpoint.to_owned();
        thread::Builder::new().name("sd-fuse".into()).spawn(move || {
            let _ending = ending;
            match session.run() {
                Ok(()) => tracing::debug!("unmounted"),
                Err(error) => {
                    tracing::error!(%error, "the mount's session failed");
                    // One of several threads may have failed; half a session is none.
                    match take_away(&mountpoint, number) {
                        Ok(()) | Err(MountError::NotMounted { .. }) => {}
                        Err(error) => tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "still mounted"
                        ),
                    }
                }
            }
        })?;
        Ok(Self { alive, ended })
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    /// Waits for the thread's end; false when it takes too long.
    fn wait(&self) -> bool {
        // Nothing is ever sent: the sender is dropped.
        self.ended.recv_timeout(END_TIMEOUT) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

/// Dropped at the end of the serving thread, in this order, also when it panics.
struct Ending {
    alive: Arc<AtomicBool>,
    _device: Arc<OwnedFd>,
    _ended: mpsc::SyncSender<()>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Release);
    }
}

/// A mounted drive. Dropping it unmounts, lazily if it must.
pub struct Mount {
    mountpoint: PathBuf,
    number: Option<DeviceNo>,
    negotiated: Arc<Negotiated>,
    serving: Serving,
    _invalidator: Invalidator,
    teller: Option<Teller>,
}

impl fmt::Debug for Mount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mount")
            .field("mountpoint", &self.mountpoint)
            .field("alive", &self.is_alive())
            .field("passthrough", &self.passthrough())
            .finish()
    }
}

impl Mount {
    /// Where, as an absolute path without symbolic links.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Whether the kernel reads and writes whole local files by itself, as far as known by now:
    /// some reasons against it only show when the first file is opened.
    pub fn passthrough(&self) -> Passthrough {
        self.negotiated.passthrough()
    }

    /// Whether programs that watch are told of changes made elsewhere.
    pub fn events(&self) -> Events {
        match self.teller.as_ref().map(Teller::trouble) {
            None => Events::Off,
            Some(Some(trouble)) => Events::Failing(trouble),
            Some(None) if rustix::process::geteuid().is_root() => Events::Told,
            Some(None) => Events::ToldToOwn,
        }
    }

    /// Whether the kernel is still served: false after anybody unmounted it, or after the
    /// session failed.
    pub fn is_alive(&self) -> bool {
        self.serving.is_alive()
    }

    /// Unmounts and waits until the kernel has let go.
    ///
    /// With `force` a mount in use is taken away too: every request in progress and every later
    /// one on files that are still open fails.
    ///
    /// # Errors
    /// [`MountError::Busy`] with the processes that hold it; the mount goes on then.
    pub fn unmount(&self, force: bool) -> Result<(), MountError> {
        let result = match (self.is_alive(), force) {
            // Nobody serves it; what is left of it, if anything, is dead.
            (false, _) => return mend(&self.mountpoint).map(drop),
            (true, true) => take_away(&self.mountpoint, self.number),
            (true, false) => {
                let _quiet = self.teller.as_ref().map(Teller::quiet);
                attach::detach(&self.mountpoint, Detach::WhenIdle)
            }
        };
        match result {
            Ok(()) => {
                if !self.serving.wait() {
                    tracing::warn!("unmounted, but a request is still being served");
                }
                Ok(())
            }
            // Somebody else unmounted it meanwhile.
            Err(MountError::NotMounted { .. }) => Ok(()),
            Err(MountError::Busy { path, .. }) => {
                let holders = mounts::holders(&path);
                Err(MountError::Busy { path, holders })
            }
            Err(error) => Err(error),
        }
    }
}

/// Breaks the connection, so that nothing waits for it any more, and detaches what remains.
fn take_away(mountpoint: &Path, number: Option<DeviceNo>) -> Result<(), MountError> {
    if number.is_some() && mounts::on(mountpoint).map(|on| on.device) != number {
        // Gone, or somebody else's is on top of it.
        return Err(MountError::NotMounted { path: mountpoint.to_owned() });
    }
    if let Some(number) = number
        && let Err(error) = attach::abort(mountpoint, number)
    {
        tracing::warn!(%error, "cannot break the connection; open files stay usable");
    }
    match attach::detach(mountpoint, Detach::Lazily) {
        // It was idle, and the forced abort has already unmounted it.
        Err(MountError::NotMounted { .. }) => Ok(()),
        result => result,
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let detached = match self.is_alive() {
            true => attach::detach(&self.mountpoint, Detach::Lazily),
            false => mend(&self.mountpoint).map(drop),
        };
        if let Err(error) = detached {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot unmount");
        }
    }
}

/// Detaches the mount of this drive that a killed daemon left behind, and says whether there
/// was one. A living one, also a frozen one, is left alone.
///
/// # Errors
/// Why the system refused to detach it.
pub fn mend(mountpoint: &Path) -> Result<bool, MountError> {
    let Some(dead) = dead_mount(mountpoint) else { return Ok(false) };
    attach::detach(&dead.mountpoint, Detach::Lazily)?;
    Ok(true)
}

/// Whether a mount of this drive is there whose daemon is gone.
pub fn is_dead(mountpoint: &Path) -> bool {
    dead_mount(mountpoint).is_some()
}

fn dead_mount(mountpoint: &Path) -> Option<MountInfo> {
    let spelled = mounts::spelled(mountpoint).ok()?;
    let mount = mounts::on(&spelled).filter(MountInfo::is_ours)?;
    answers_that_it_is_dead(&spelled).then_some(mount)
}

/// The kernel answers for a dead daemon at once; a living one may take its time, and a frozen
/// one never answers. So silence means alive. The question is asked in a thread of its own,
/// which ends when it is answered.
fn answers_that_it_is_dead(mountpoint: &Path) -> bool {
    let (answer, answered) = mpsc::channel();
    let path = mountpoint.to_owned();
    let asking = thread::Builder::new().name("sd-probe".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = answer.send(rustix::fs::statfs(&path).map(drop));
    });
    asking.is_ok()
        && matches!(
            answered.recv_timeout(PROBE_TIMEOUT),
            Ok(Err(Errno::NOTCONN | Errno::CONNABORTED | Errno::CONNREFUSED))
        )
}
