//! A mounted drive over a temporary folder, for tests that need the kernel.

pub mod drive;

use mount_fuse::{Mount, MountOptions, Passthrough};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a loaded machine.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Whether this process can mount. When not, it says so loudly, and fails where CI promised
/// that everything runs (`SD_TEST_REQUIRE=all`).
pub fn can_mount(test: &str) -> bool {
    let missing = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !Path::new("/dev/fuse").exists() {
        "/dev/fuse"
    } else {
        return true;
    };
    skipped(test, missing)
}

/// Whether a program is installed; as [`can_mount`].
pub fn has_program(test: &str, program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    found || skipped(test, program)
}

/// Says so past the test program's capture, which hides what a passing test prints.
pub fn skipped(test: &str, missing: &str) -> bool {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: it needs {missing}");
    if let Some(list) = std::env::var_os("SD_TEST_SKIPPED") {
        let list = File::options().append(true).open(list);
        list.and_then(|mut list| writeln!(list, "{test}: it needs {missing}")).unwrap();
    }
    let required = std::env::var("SD_TEST_REQUIRE").is_ok_and(|value| value == "all");
    assert!(!required, "{test} must run here, and it needs {missing}");
    false
}

/// Waits for a condition, and fails when it does not come.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The runtime for the drive's reads.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A drive with one own location, mounted.
pub struct Rig {
    // Fields are dropped in this order: the mount first.
    pub mount: Mount,
    pub parts: drive::Parts,
    pub disk: TempDir,
    _data: TempDir,
    _mountpoint: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Rig {
    /// One with the kernel's passthrough and one without: both must behave alike.
    pub fn both(test: &str) -> Vec<Rig> {
        match can_mount(test) {
            true => [true, false].map(Rig::with_passthrough).into(),
            false => Vec::new(),
        }
    }

    pub fn with_passthrough(passthrough: bool) -> Rig {
        Rig::with_options(MountOptions { passthrough, ..MountOptions::default() })
    }

    pub fn with_options(options: MountOptions) -> Rig {
        let [disk, data, mountpoint] = std::array::from_fn(|_| open_to_all());
        let runtime = runtime();
        let (drive, parts) = drive::drive_over(disk.path(), data.path(), runtime.handle());
        let mount =
            mount_fuse::mount(drive, mountpoint.path(), options, runtime.handle().clone()).unwrap();
        Rig { mount, parts, disk, _data: data, _mountpoint: mountpoint, _runtime: runtime }
    }

    /// The location's folder, through the mount.
    pub fn folder(&self) -> PathBuf {
        drive::own_folder(self.mount.mountpoint())
    }

    /// A path through the mount.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// The same on the disk.
    pub fn disk_path(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }

    pub fn is_passthrough(&self) -> bool {
        self.mount.passthrough() == Passthrough::Active
    }
}

/// A directory that other users may enter, for tests with other users.
pub fn open_to_all() -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = TempDir::new().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

/// Opens for reading and writing, without truncating.
pub fn open_rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// A process that stands in a directory and does not outlive its test.
pub struct Standing(pub Child);

impl Standing {
    pub fn in_directory(dir: &Path) -> Self {
        Self(Command::new("sleep").arg("1000").current_dir(dir).spawn().unwrap())
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
