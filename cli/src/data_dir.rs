//! The data directory: everything of one device, private to its user.
//!
//! Owns the layout (names below, modes 0700 and 0600, the `format` file) and
//! the way to a Unix socket inside it, whose path may be longer than the 108
//! bytes that a socket address holds.

use crate::failure::{Code, Failure, Outcome};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The version of the layout; a directory with a higher one is refused.
pub const FORMAT: u32 = 1;

/// The longest path that a socket address holds, with its terminator.
const SUN_PATH_BYTES: usize = 108;

/// How long the lock may be held by someone who only looks ([`DataDir::daemon_pid`]).
const LOCK_PATIENCE: Duration = Duration::from_millis(200);

/// How long a daemon that gave up the lock may take to be gone.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// A data directory.
#[derive(Clone, Debug)]
pub struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// The directory asked for, else the platform's usual one; nothing is created.
    pub fn locate(asked: Option<&Path>) -> Outcome<Self> {
        let path = match asked {
            Some(path) if path.as_os_str().is_empty() => {
                return Err(Failure::new(Code::Usage, "the data directory has an empty name")
                    .hint("give --data-dir DIR, or unset SD_DATA_DIR"));
            }
            Some(path) => std::path::absolute(path)
                .map_err(|e| Failure::io(format!("cannot use {}", path.display()), e))?,
            None => directories::ProjectDirs::from("", "", "spacedrive")
                .map(|dirs| dirs.data_dir().to_owned())
                .ok_or_else(|| {
                    Failure::new(Code::Io, "this user has no home directory to keep data in")
                        .hint("give --data-dir DIR")
                })?,
        };
        // Canonical where it exists, so that every later comparison of paths is one of equals.
        Ok(Self { path: fs::canonicalize(&path).unwrap_or(path) })
    }

    /// Creates what is missing of it and checks its format.
    pub fn prepare(mut self) -> Outcome<Self> {
        let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path);
        created.map_err(|e| self.unusable(e))?;
        self.path = fs::canonicalize(&self.path).map_err(|e| self.unusable(e))?;
        self.check_format()?;
        let mode = fs::metadata(&self.path).map_err(|e| self.unusable(e))?.permissions().mode();
        if mode & 0o077 != 0 {
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(&self.path, private).map_err(|e| self.unusable(e))?;
        }
        Ok(self)
    }

    /// Refuses a directory that a newer program made; writes the format of a new one.
    fn check_format(&self) -> Outcome<()> {
        let file = self.path.join("format");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.refuse_foreign()?;
                return self
                    .write_private("format", format!("{FORMAT}\n").as_bytes())
                    .map_err(|e| self.unusable(e));
            }
            Err(e) => return Err(self.unusable(e)),
        };
        match text.trim().parse::<u32>() {
            Ok(found) if found <= FORMAT => Ok(()),
            Ok(found) => Err(Failure::new(
                Code::Version,
                format!(
                    "{} has format {found}; this sd knows {FORMAT} and older",
                    self.path.display()
                ),
            )
            .hint("install the newer sd that wrote it, or choose another --data-dir")),
            Err(_) => Err(Failure::new(Code::Invalid, format!("{} is damaged", file.display()))
                .hint(format!("if this is a data directory of sd, write {FORMAT} into it"))),
        }
    }

    /// A directory full of something else is most likely a mistyped `--data-dir`.
    fn refuse_foreign(&self) -> Outcome<()> {
        let mut entries = fs::read_dir(&self.path).map_err(|e| self.unusable(e))?;
        let ours = |name: &str| {
            ["format", "config.toml", "library.json", "identity.key", "lost+found"].contains(&name)
                || name.starts_with("format.new-")
        };
        match entries.any(|e| e.is_ok_and(|e| !e.file_name().to_str().is_some_and(ours))) {
            true => Err(Failure::new(
                Code::Invalid,
                format!("{} has files in it that are not sd's", self.path.display()),
            )
            .hint("choose an empty or a new directory as --data-dir")),
            false => Ok(()),
        }
    }

    fn unusable(&self, error: io::Error) -> Failure {
        let failure =
            Failure::io(format!("cannot use the data directory {}", self.path.display()), error);
        match failure.hint {
            Some(_) => failure,
            None => failure.hint("choose a directory that this user can make, with --data-dir"),
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn identity(&self) -> PathBuf {
        self.path.join("identity.key")
    }

    pub fn library(&self) -> PathBuf {
        self.path.join("library.json")
    }

    pub fn pins(&self) -> PathBuf {
        self.path.join("pins.json")
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("config.toml")
    }

    pub fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    pub fn manifests(&self) -> PathBuf {
        self.path.join("manifests")
    }

    pub fn lent(&self) -> PathBuf {
        self.path.join("lent")
    }

    pub fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }

    /// Writes that wait for their owners: the journal and the staged bytes.
    pub fn outbox(&self) -> PathBuf {
        self.path.join("outbox")
    }

    /// What others' writes to own locations need across a crash.
    pub fn apply(&self) -> PathBuf {
        self.path.join("apply")
    }

    pub fn log(&self) -> PathBuf {
        self.path.join("sd.log")
    }

    /// What is mounted, so that a crash can be mended.
    pub fn mounts(&self) -> PathBuf {
        self.path.join("mounts.json")
    }

    /// A directory of this name, created when missing.
    pub fn subdirectory(&self, path: PathBuf) -> Outcome<PathBuf> {
        let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        created.map_err(|e| Failure::io(format!("cannot create {}", path.display()), e))?;
        Ok(path)
    }

    /// Replaces a small file durably and atomically, mode 0600.
    pub fn write_private(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        // Two commands may prepare a new directory at the same time.
        let temporary = self.path.join(format!("{name}.new-{}", std::process::id()));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, self.path.join(name))?;
        File::open(&self.path)?.sync_all()
    }

    /// An address for the control socket that fits, whatever the directory's path.
    pub fn socket(&self) -> io::Result<SocketAddress> {
        let path = self.path.join("sock");
        if path.as_os_str().len() < SUN_PATH_BYTES {
            return Ok(SocketAddress { path, _directory: None });
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.path, flags, Mode::empty())?;
        let path = format!("/proc/self/fd/{}/sock", directory.as_raw_fd()).into();
        Ok(SocketAddress { path, _directory: Some(directory) })
    }

    /// Takes the lock that says "a daemon serves this directory"; `Err(pid)` when one does.
    pub fn lock(&self) -> Outcome<Result<DaemonLock, Option<u32>>> {
        let file = self.lock_file()?;
        let patience = Instant::now() + LOCK_PATIENCE;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return DaemonLock::take(file).map(Ok).map_err(|e| self.unusable(e)),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() > patience => {
                    return Ok(Err(read_pid(&file)));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(LOCK_PATIENCE / 20),
                Err(e) => return Err(self.unusable(e.into())),
            }
        }
    }

    /// The process that serves this directory, if one does.
    pub fn daemon_pid(&self) -> Outcome<Option<u32>> {
        let path = self.path.join("daemon.lock");
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(self.unusable(e)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(read_pid(&file)),
            Err(e) => Err(self.unusable(e.into())),
        }
    }

    fn lock_file(&self) -> Outcome<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.path.join("daemon.lock"))
            .map_err(|e| self.unusable(e))
    }
}

/// A path that fits into a socket address, and the descriptor that it may go through.
pub struct SocketAddress {
    pub path: PathBuf,
    _directory: Option<OwnedFd>,
}

/// Held as long as the daemon lives; the kernel releases it, however the daemon ends.
#[derive(Debug)]
pub struct DaemonLock {
    _file: File,
}

impl DaemonLock {
    /// The stores have locks of their own, which the kernel releases one after another when a
    /// process ends: who held this lock before may be among the living for a moment yet.
    fn take(mut file: File) -> io::Result<Self> {
        if let Some(pid) = read_pid(&file).filter(|pid| is_like_this(*pid)) {
            await_end(pid, END_PATIENCE);
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { _file: file })
    }
}

/// Waits until a process is gone, but no longer than this: its number may be another's by now.
pub fn await_end(pid: u32, patience: Duration) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    let Some(pid) = pid.filter(|pid| *pid != rustix::process::getpid()) else { return };
    // That fails for one that is gone.
    let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else {
        return;
    };
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    let _ = rustix::event::poll(&mut ended, patience.try_into().ok().as_ref());
}

/// Whether a process runs this program: after the machine's restart a number is another's.
fn is_like_this(pid: u32) -> bool {
    let name = |of: &str| fs::read(format!("/proc/{of}/comm")).ok();
    name(&pid.to_string()).is_some_and(|other| name("self").is_some_and(|own| own == other))
}

fn read_pid(mut file: &File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn prepared(path: &Path) -> DataDir {
        DataDir::locate(Some(path)).unwrap().prepare().unwrap()
    }

    #[test]
    fn it_is_private_and_remembers_its_format() {
        let dir = tempfile::tempdir().unwrap();
        let data = prepared(&dir.path().join("a/b"));
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(data.path()), 0o700);
        assert_eq!(mode(&data.path().join("format")), 0o600);
        prepared(data.path());
    }

    #[test]
    fn a_newer_and_a_foreign_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = prepared(&dir.path().join("d"));
        fs::write(data.path().join("format"), "2\n").unwrap();
        assert_eq!(data.clone().prepare().unwrap_err().code, Code::Version);

        let foreign = DataDir::locate(Some(dir.path())).unwrap();
        assert_eq!(foreign.prepare().unwrap_err().code, Code::Invalid);
    }

    #[test]
    fn one_lock_and_the_loser_learns_the_pid() {
        let dir = tempfile::tempdir().unwrap();
        let data = prepared(dir.path());
        assert_eq!(data.daemon_pid().unwrap(), None);
        let held = data.lock().unwrap().unwrap();
        assert_eq!(data.lock().unwrap().unwrap_err(), Some(std::process::id()));
        assert_eq!(data.daemon_pid().unwrap(), Some(std::process::id()));
        drop(held);
        assert!(data.lock().unwrap().is_ok());
    }

    #[test]
    fn a_socket_works_below_a_path_longer_than_an_address() {
        let dir = tempfile::tempdir().unwrap();
        let data = prepared(&dir.path().join("x".repeat(120)).join("y".repeat(120)));
        let _listener = UnixListener::bind(&data.socket().unwrap().path).unwrap();
        UnixStream::connect(&data.socket().unwrap().path).unwrap();
    }
}
