//! One device: a data directory, its daemon, its mount.

use crate::proc::{self, Finished};
use crate::wait::{wait_for, wait_until};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a command may take that has no reason to take long.
const COMMAND: Duration = Duration::from_secs(60);
/// How long scanning, hashing or replicating the largest tree of a test may take.
const CATCH_UP: Duration = Duration::from_secs(300);

/// One device. Its daemon ends, and its mounts are gone, when this is dropped.
#[derive(Debug)]
pub struct Device {
    name: String,
    home: PathBuf,
    namespace: Option<String>,
    daemon: Option<Child>,
    user: Option<u32>,
}

impl Device {
    /// A device that keeps everything below `home`; `namespace` is a network namespace's name.
    pub fn new(name: &str, home: PathBuf, namespace: Option<String>) -> Self {
        Self { name: name.to_owned(), home, namespace, daemon: None, user: None }
    }

    /// Everything of this device runs as this user; to be called before it is started.
    pub fn run_as(&mut self, uid: u32) {
        let owner = Some(uid);
        std::os::unix::fs::chown(&self.home, owner, owner).expect("giving the folder away");
        self.user = Some(uid);
    }

    /// The program under test: `SD_BIN`, or what cargo built beside this test.
    pub fn program() -> PathBuf {
        if let Some(path) = std::env::var_os("SD_BIN") {
            return path.into();
        }
        let test = std::env::current_exe().expect("the path of this program");
        let mut directories = test.ancestors().skip(1).map(|dir| dir.join("sd"));
        directories.find(|path| path.is_file()).unwrap_or_else(|| {
            panic!("no sd beside {}: run `cargo build -p cli`, or set SD_BIN", test.display())
        })
    }

    /// Its name in the library, and of its folder.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its `SD_DATA_DIR`.
    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    /// Where [`Device::mount`] mounts.
    pub fn mountpoint(&self) -> PathBuf {
        self.home.join("drive")
    }

    /// A path in this device's mount: `device/location/…`.
    pub fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.mountpoint().join(path)
    }

    /// The daemon's process id.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("a running daemon").id()
    }

    /// `program` as this device's user, in its network namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut words: Vec<std::ffi::OsString> = Vec::new();
        if let Some(namespace) = &self.namespace {
            words.extend(["nsenter".into(), format!("--net=/run/netns/{namespace}").into()]);
        }
        if let Some(uid) = self.user {
            let ids = [format!("--reuid={uid}"), format!("--regid={uid}")];
            words.push("setpriv".into());
            words.extend(ids.map(Into::into));
            words.push("--clear-groups".into());
        }
        words.push(program.as_ref().into());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env("SD_DATA_DIR", self.data_dir())
            .env("HOME", &self.home)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs `sd` with these arguments.
    #[track_caller]
    pub fn sd(&self, args: &[impl AsRef<std::ffi::OsStr>]) -> Finished {
        proc::run(self.command(Self::program()).args(args), COMMAND)
    }

    /// Runs `sd … --json`, which must succeed, and gives its document.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let finished = self.sd(&[args, &["--json"]].concat()).ok();
        serde_json::from_slice(&finished.stdout)
            .unwrap_or_else(|e| panic!("sd {args:?} --json: {e}\n{}", finished.text()))
    }

    /// `sd status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.json(&["status"])
    }

    /// Runs `sd`, which must fail with this exit code and say why; gives what it said.
    #[track_caller]
    pub fn fails(
        &self,
        code: i32,
        args: &[impl AsRef<std::ffi::OsStr> + std::fmt::Debug],
    ) -> String {
        let finished = self.sd(args);
        let shown = || format!("sd {args:?}\nout: {}\nerr: {}", finished.text(), finished.stderr);
        assert_eq!(finished.status.code(), Some(code), "{}", shown());
        assert!(finished.stdout.is_empty(), "an error belongs on stderr: {}", shown());
        assert!(!finished.stderr.contains("panicked"), "{}", shown());
        assert!(finished.stderr.trim().len() > 10, "an error says what is wrong: {}", shown());
        finished.stderr
    }

    /// Starts the daemon and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        self.start_with(&[]);
    }

    /// As [`Device::start`]; the daemon dies when it comes to this step so many times.
    #[track_caller]
    pub fn start_to_die_at(&mut self, step: &str, times: u32) {
        self.start_with(&[("SD_FAIL_POINTS", &format!("{step}={times}"))]);
    }

    /// Waits until the daemon was killed, if only by itself.
    #[track_caller]
    pub fn wait_death(&mut self, patience: Duration) {
        let mut daemon = self.daemon.take().expect("a running daemon");
        let status = wait_for("the daemon's death", patience, || {
            daemon.try_wait().expect("waiting for the daemon")
        });
        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()), "{status}");
    }

    #[track_caller]
    fn start_with(&mut self, variables: &[(&str, &str)]) {
        let mut command = self.command(Self::program());
        command.args(["daemon", "run"]).envs(variables.iter().copied());
        self.start_command(command);
    }

    /// As [`Device::start`]; the daemon inherits from its parent that the end of a child is ignored.
    #[track_caller]
    pub fn start_without_child_signals(&mut self) {
        let mut command = self.command("env");
        command.arg("--ignore-signal=CHLD").arg(Self::program()).args(["daemon", "run"]);
        self.start_command(command);
    }

    /// As [`Device::start`]; the daemon can watch only so many directories. Its user namespace has
    /// a limit of its own, so that no other program meets it.
    #[track_caller]
    pub fn start_with_watches(&mut self, most: u32) {
        let mut command = self.command("unshare");
        let limit = format!("echo {most} >/proc/sys/user/max_inotify_watches");
        command.args(["--user", "--map-root-user", "sh", "-c"]);
        command.arg(format!("{limit} && exec \"$0\" daemon run")).arg(Self::program());
        self.start_command(command);
    }

    #[track_caller]
    fn start_command(&mut self, mut command: Command) {
        assert!(self.daemon.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.home.join("daemon.out"));
        let log = log.expect("a file for the daemon's output");
        command.stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.daemon = Some(proc::spawn(&mut command));
        wait_until(format!("the daemon of {}", self.name), Duration::from_secs(20), || {
            let daemon = self.daemon.as_mut().expect("just started");
            let ended = daemon.try_wait().expect("waiting for the daemon");
            assert!(ended.is_none(), "the daemon ended: {ended:?}");
            // Asking with the command line would start a second daemon.
            std::os::unix::net::UnixStream::connect(self.data_dir().join("sock")).is_ok()
        });
    }

    /// `sd daemon stop`, and waits for the end.
    #[track_caller]
    pub fn stop(&mut self) {
        self.sd(&["daemon", "stop"]).ok();
        let mut daemon = self.daemon.take().expect("a running daemon");
        let status = wait_for("the daemon to stop", Duration::from_secs(20), || {
            daemon.try_wait().expect("waiting for the daemon")
        });
        assert!(status.success(), "the daemon of {} ended with {status}", self.name);
    }

    /// `kill -9`.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().expect("a running daemon");
        proc::signal(&daemon, Signal::KILL);
        daemon.wait().expect("waiting for the daemon");
    }

    /// SIGSTOP: the daemon is there and does nothing.
    #[track_caller]
    pub fn freeze(&self) {
        proc::signal(self.daemon.as_ref().expect("a running daemon"), Signal::STOP);
    }

    /// SIGCONT.
    #[track_caller]
    pub fn thaw(&self) {
        proc::signal(self.daemon.as_ref().expect("a running daemon"), Signal::CONT);
    }

    /// Joins the library of another device, and waits until each sees the other online.
    #[track_caller]
    pub fn join(&self, inviter: &Self) {
        let ticket = inviter.invite();
        self.sd(&["device", "join", &ticket, "--device-name", &self.name, "--yes"]).ok();
        self.wait_online(inviter.name());
        inviter.wait_online(self.name());
    }

    /// A ticket to join this device's library.
    #[track_caller]
    pub fn invite(&self) -> String {
        let printed = self.sd(&["device", "invite", "--detach"]).ok().text();
        let ticket = printed.strip_suffix('\n').expect("a line");
        assert!(!ticket.is_empty() && !ticket.contains(char::is_whitespace), "{printed:?}");
        ticket.to_owned()
    }

    /// The lines of the daemon's log that have these words.
    #[track_caller]
    pub fn logged(&self, words: &str) -> Vec<String> {
        let log = std::fs::read(self.home.join("daemon.out")).expect("the daemon's log");
        let log = String::from_utf8_lossy(&log);
        log.lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
    }

    /// How long the last first scan of a location took, by the daemon's log.
    #[track_caller]
    pub fn last_scan(&self) -> Option<Duration> {
        let line = self.logged(" scanned ").pop()?;
        let took = line.split("took=").nth(1)?.split_whitespace().next()?;
        let seconds = match took.strip_suffix("ms") {
            Some(ms) => ms.parse::<f64>().ok()? / 1000.0,
            None => took.strip_suffix('s')?.parse().ok()?,
        };
        Some(Duration::from_secs_f64(seconds))
    }

    /// Waits until this device sees the other one online.
    #[track_caller]
    pub fn wait_online(&self, other: &str) {
        wait_until(format!("{} to see {other}", self.name), Duration::from_secs(20), || {
            self.sees_online(other)
        });
    }

    /// Whether this device sees the other one online.
    #[track_caller]
    pub fn sees_online(&self, other: &str) -> bool {
        self.device_row(other).is_some_and(|row| row["online"] == true)
    }

    /// What `sd status --json` says of a device.
    #[track_caller]
    pub fn device_row(&self, name: &str) -> Option<Value> {
        row(&self.status()["devices"], |row| row["name"] == name)
    }

    /// What `sd status --json` says of a location.
    #[track_caller]
    pub fn location_row(&self, device: &str, name: &str) -> Option<Value> {
        row(&self.status()["locations"], |row| row["name"] == name && row["device"] == device)
    }

    /// Shares a folder; it is scanned and hashed on return.
    #[track_caller]
    pub fn share(&self, folder: &Path, name: &str) {
        self.add_location(folder, name);
        self.wait_indexed(name);
        self.wait_hashed(name);
    }

    /// Shares a folder; on return it is registered, not more.
    #[track_caller]
    pub fn add_location(&self, folder: &Path, name: &str) {
        let folder = folder.to_str().expect("a folder whose name is text");
        self.sd(&["location", "add", folder, "--name", name]).ok();
    }

    /// Waits until an own location was scanned as a whole.
    #[track_caller]
    pub fn wait_indexed(&self, name: &str) {
        wait_until(format!("the scan of {name}"), CATCH_UP, || {
            let row = self.location_row(&self.name, name);
            row.is_some_and(|row| row["indexed"] == true)
        });
    }

    /// Waits until every file of an own location was hashed.
    #[track_caller]
    pub fn wait_hashed(&self, name: &str) {
        wait_until(format!("the hashes of {name}"), CATCH_UP, || {
            let row = self.location_row(&self.name, name).expect("the location");
            row["hashed_files"] == row["files"]
        });
    }

    /// Mounts the drive.
    #[track_caller]
    pub fn mount(&self) -> PathBuf {
        let mountpoint = self.mountpoint();
        // Once it is there it may be a mount at any moment: a daemon revives what the last one left.
        match std::fs::create_dir(&mountpoint) {
            Ok(()) => {
                std::os::unix::fs::chown(&mountpoint, self.user, self.user).expect("its owner");
            }
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists),
        }
        self.sd(&["mount".as_ref(), mountpoint.as_os_str()]).ok();
        assert!(is_mounted(&mountpoint), "sd mount returned, and nothing is mounted");
        mountpoint
    }

    /// Waits until this device's copy of the other's index is as new as the original.
    #[track_caller]
    pub fn wait_replicated(&self, owner: &Self, location: &str) {
        wait_until(format!("the rows of {location}"), CATCH_UP, || {
            let theirs = owner.location_row(owner.name(), location).expect("the location");
            let ours = self.location_row(owner.name(), location);
            ours.is_some_and(|ours| {
                ["entries", "hashed_files"].iter().all(|field| ours[*field] == theirs[*field])
            })
        });
    }

    /// Bytes of files received from other devices since the daemon started.
    #[track_caller]
    pub fn content_bytes_in(&self) -> u64 {
        number(&self.status()["network"]["bytes_in"])
    }

    /// Bytes of files sent to other devices since the daemon started.
    #[track_caller]
    pub fn content_bytes_out(&self) -> u64 {
        number(&self.status()["network"]["bytes_out"])
    }

    /// Bytes that the daemon's `read` calls returned, of files and of sockets.
    #[track_caller]
    pub fn bytes_read_by_daemon(&self) -> u64 {
        let io = std::fs::read_to_string(format!("/proc/{}/io", self.pid())).expect("proc");
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("rchar");
        line.parse().expect("a number")
    }

    /// Peak and present resident memory of the daemon, in bytes.
    #[track_caller]
    pub fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("proc");
        let kib = |field: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field");
            line.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        (kib("VmHWM:") * 1024, kib("VmRSS:") * 1024)
    }

    /// How long the daemon's threads have run.
    pub fn processor_time(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("proc");
        let of_task = |task: std::fs::DirEntry| {
            // One that has ended meanwhile has none.
            let times = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let nanos = times.split_whitespace().next().and_then(|n| n.parse().ok());
            Duration::from_nanos(nanos.unwrap_or(0))
        };
        tasks.filter_map(Result::ok).map(of_task).sum()
    }

    fn print_logs(&self) {
        for path in [self.home.join("daemon.out"), self.data_dir().join("sd.log")] {
            let Ok(log) = std::fs::read(&path) else { continue };
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            let shown = std::env::var("SD_TEST_LOG_LINES").ok().and_then(|n| n.parse().ok());
            let last = &lines[lines.len().saturating_sub(shown.unwrap_or(80))..];
            eprintln!("---- {} of {}\n{}", path.display(), self.name, last.join("\n"));
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if let Some(mut daemon) = self.daemon.take() {
            // Works on a frozen daemon too.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        detach_mounts_below(&self.home);
    }
}

#[track_caller]
fn row(rows: &Value, is_it: impl Fn(&Value) -> bool) -> Option<Value> {
    let rows = rows.as_array().unwrap_or_else(|| panic!("not a list: {rows}"));
    rows.iter().find(|row| is_it(row)).cloned()
}

#[track_caller]
fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"))
}

/// Mount points at or below a folder, deepest first; asked without touching any of them.
fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let points = table.split(|b| *b == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let mut below: Vec<PathBuf> =
        points.map(unescape).filter(|point| point.starts_with(folder)).collect();
    below.sort_by_key(|path| std::cmp::Reverse(path.as_os_str().len()));
    below
}

/// `\040` and the like in `/proc/self/mountinfo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// Whether this very path is a mount point; a dead one counts.
pub fn is_mounted(path: &Path) -> bool {
    mounts_below(path)
        .iter()
        .any(|point| point.as_os_str().as_bytes() == path.as_os_str().as_bytes())
}

/// Whether anything is mounted at or below a folder.
pub fn has_mounts_below(folder: &Path) -> bool {
    !mounts_below(folder).is_empty()
}

/// Detaches everything mounted at or below a folder, in use or not.
pub fn detach_mounts_below(folder: &Path) {
    for point in mounts_below(folder) {
        let mut umount = Command::new("umount");
        umount.arg("-l").arg(&point);
        if !umount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            let _ = Command::new("fusermount3").arg("-uz").arg(&point).status();
        }
    }
}
