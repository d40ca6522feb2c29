//! One test at a time has the machine, and says what it needs of it.

use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a test needs that not every machine gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The user is root.
    Root,
    /// `/dev/fuse` and `fusermount3`.
    Fuse,
    /// Network namespaces with a link: root, `/dev/net/tun`, a C compiler, `nsenter`.
    Namespaces,
    /// The same, with `ip` and `tc`.
    Rates,
    /// Loop devices and `mkfs.ext4`.
    LoopDevices,
    /// Btrfs in a loop device.
    Btrfs,
    /// A file manager, its thumbnailer, a session bus, and a screen that nobody sees.
    FileManager,
}

impl Need {
    fn missing(self) -> Option<String> {
        match self {
            Self::Root => (!rustix::process::geteuid().is_root()).then(|| "not root".into()),
            Self::Fuse => missing_path("/dev/fuse").or_else(|| missing_program("fusermount3")),
            Self::Namespaces => Self::Root
                .missing()
                .or_else(|| missing_path("/dev/net/tun"))
                .or_else(|| missing_program("cc"))
                .or_else(|| missing_program("nsenter")),
            Self::Rates => Self::Namespaces
                .missing()
                .or_else(|| missing_program("ip"))
                .or_else(|| missing_program("tc")),
            Self::LoopDevices => Self::Root
                .missing()
                .or_else(|| missing_path("/dev/loop-control"))
                .or_else(|| missing_program("mkfs.ext4")),
            Self::Btrfs => Self::LoopDevices
                .missing()
                .or_else(|| missing_program("mkfs.btrfs"))
                .or_else(|| missing_file_system("btrfs")),
            Self::FileManager => missing_program("thunar")
                .or_else(|| missing_program("Xvfb"))
                .or_else(|| missing_program("dbus-run-session"))
                .or_else(|| missing_path(TUMBLER))
                .map(|what| format!("{what}: scripts/setup --test installs it")),
        }
    }
}

/// By which a session bus starts the thumbnailer of Xfce.
const TUMBLER: &str = "/usr/share/dbus-1/services/org.xfce.Tumbler.Thumbnailer1.service";

/// Also one that the kernel would load when it is mounted.
fn missing_file_system(name: &str) -> Option<String> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let loads = || {
        let modprobe = std::process::Command::new("modprobe").args(["-q", name]).status();
        modprobe.is_ok_and(|status| status.success())
    };
    let is_known = known.lines().any(|line| line.trim_start_matches("nodev").trim() == name);
    (!is_known && !loads()).then(|| format!("no {name} in the kernel"))
}

fn missing_path(path: &str) -> Option<String> {
    (!Path::new(path).exists()).then(|| format!("no {path}"))
}

fn missing_program(name: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(system).any(|dir| dir.join(name).exists());
    (!found).then(|| format!("no {name}"))
}

/// The right to use the machine; given back when dropped.
#[derive(Debug)]
pub struct Machine {
    _lock: File,
}

/// Waits for the machine. `None`, with a line that says why, when it lacks something and
/// `SD_TEST_REQUIRE=all` does not forbid that.
pub fn machine(needs: &[Need]) -> Option<Machine> {
    if let Some(reason) = needs.iter().find_map(|need| need.missing()) {
        let required = std::env::var("SD_TEST_REQUIRE").is_ok_and(|v| v == "all");
        assert!(!required, "this test cannot run here: {reason}");
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        eprintln!("skipped {test}: {reason}");
        if let Some(list) = std::env::var_os("SD_TEST_SKIPPED") {
            let list = File::options().append(true).open(list);
            list.and_then(|mut list| writeln!(list, "{test}: {reason}")).expect("the list");
        }
        return None;
    }
    let lock = lock_file();
    flock(&lock, FlockOperation::LockExclusive).expect("the machine's lock");
    Some(Machine { _lock: lock })
}

/// The machine, if nobody else has it.
pub fn machine_if_free() -> Option<Machine> {
    let lock = lock_file();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(Machine { _lock: lock })
}

fn lock_file() -> File {
    File::create(work_dir().join("sd-e2e.lock")).expect("the lock file")
}

/// Where tests keep their files: on a disk, not in memory, for the 10 GiB file and for xattrs.
pub fn work_dir() -> PathBuf {
    std::env::var_os("SD_TEST_DIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Whether the longer versions of tests were asked for (`scripts/test --long`).
pub fn long() -> bool {
    std::env::var_os("SD_TEST_LONG").is_some()
}
