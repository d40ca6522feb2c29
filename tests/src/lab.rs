//! Two network namespaces and the link between them, and devices inside or outside of them.

use crate::device::Device;
use crate::machine::{Machine, Need, machine, work_dir};
use crate::proc;
use crate::wait::wait_until;
use std::fs::Permissions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// The prefix of everything that a test makes outside of its own process.
const PREFIX: &str = "sd-e2e-";

/// A test's part of the machine: a folder, perhaps a link, and the devices made of it.
#[derive(Debug)]
pub struct Lab {
    link: Option<Link>,
    dir: TempDir,
    _machine: Machine,
}

impl Lab {
    /// Devices that reach each other by this machine's own network; `None`: cannot run here.
    pub fn local(needs: &[Need]) -> Option<Self> {
        let machine = machine(needs)?;
        remove_leftovers();
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(work_dir());
        let dir = dir.expect("a work folder");
        // Tests of other users pass through it.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("the mode");
        Some(Self { link: None, dir, _machine: machine })
    }

    /// Two namespaces joined by a plain pair of interfaces, as fast as it gets.
    pub fn lan(needs: &[Need]) -> Option<Self> {
        Self::linked(needs, &["--veth"])
    }

    /// Two namespaces joined by an emulated link, which can be cut so that packets vanish
    /// silently; `options` as `netlab.c` lists them.
    pub fn emulated(needs: &[Need], options: &[&str]) -> Option<Self> {
        Self::linked(needs, options)
    }

    fn linked(needs: &[Need], options: &[&str]) -> Option<Self> {
        let needs = [needs, &[Need::Namespaces]].concat();
        let mut lab = Self::local(&needs)?;
        lab.link = Some(Link::up(options));
        Some(lab)
    }

    /// The link; panics in a lab that has none.
    #[track_caller]
    pub fn link(&self) -> &Link {
        self.link.as_ref().expect("a lab with a link")
    }

    /// A folder of the test's own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// An empty folder of this name.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    }

    /// A running device on this machine's own network.
    pub fn device(&self, name: &str) -> Device {
        let mut device = self.stopped_device(name);
        device.start();
        device
    }

    /// A device whose daemon does not run yet, on this machine's own network.
    pub fn stopped_device(&self, name: &str) -> Device {
        Device::new(name, self.folder(name), None)
    }

    /// Running devices at the two ends of the link.
    pub fn two_devices(&self, names: [&str; 2]) -> [Device; 2] {
        [(names[0], 0), (names[1], 1)].map(|(name, end)| {
            let mut device = self.stopped_device_at(end, name);
            device.start();
            device
        })
    }

    /// A device at one end of the link, 0 or 1, whose daemon does not run yet.
    pub fn stopped_device_at(&self, end: usize, name: &str) -> Device {
        Device::new(name, self.folder(name), Some(self.link().namespaces[end].clone()))
    }

    /// Two paired devices at the ends of the link: the first made the library, `files`, and shares
    /// it as the location `files`; the second has mounted the drive and knows every row.
    pub fn owner_and_reader(&self, files: &Path) -> (Device, Device) {
        let [owner, reader] = self.two_devices(["owner", "reader"]);
        owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
        owner.share(files, "files");
        reader.join(&owner);
        reader.mount();
        (owner, reader)
    }
}

/// Removes what is left of the lab of a process that was killed, unless somebody else has the
/// machine by now, who has done so: its mounts, its folder, its namespaces.
pub fn remove_what_was_killed() {
    let Some(_machine) = crate::machine::machine_if_free() else { return };
    // A lab's folder is there before its link. Without one, such a link is of somebody whose labs
    // are elsewhere.
    if remove_leftovers() == 0 {
        return;
    }
    for namespace in namespaces() {
        let path = Path::new("/run/netns").join(&namespace);
        let _ = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
        let _ = std::fs::remove_file(path);
        let _ = std::fs::remove_file(format!("/tmp/netlab.{namespace}.ctl"));
    }
}

/// Of the two ends of a link.
fn namespaces() -> [String; 2] {
    ["a", "b"].map(|end| format!("{PREFIX}{end}"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A folder with a mount in it must not be emptied: that would delete the files beneath.
        crate::device::detach_mounts_below(self.dir.path());
        if crate::device::has_mounts_below(self.dir.path()) {
            eprintln!("left behind, something is still mounted: {}", self.dir.path().display());
            self.dir.disable_cleanup(true);
        }
    }
}

/// What a test that was killed left behind; gives how many labs that were. Only the holder of the
/// machine may do this.
fn remove_leftovers() -> usize {
    let mut found = 0;
    let Ok(entries) = std::fs::read_dir(work_dir()) else { return found };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) || !path.is_dir() {
            continue;
        }
        found += 1;
        crate::device::detach_mounts_below(&path);
        if !crate::device::has_mounts_below(&path) {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
    found
}

/// The link between two network namespaces; gone with them when dropped.
#[derive(Debug)]
pub struct Link {
    emulator: Child,
    program: PathBuf,
    namespaces: [String; 2],
}

impl Link {
    /// Makes the namespaces and the link; `options` as `netlab.c` lists them.
    pub fn up(options: &[&str]) -> Self {
        let program = compiled();
        let namespaces = namespaces();
        let mut command = Command::new(&program);
        command.arg("up").arg("--ns").arg(namespaces.join(",")).arg("--replace").args(options);
        let mut emulator = proc::spawn(command.stdout(Stdio::piped()).stdin(Stdio::null()));
        let mut ready = String::new();
        let stdout = emulator.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut ready).expect("the emulator's answer");
        assert!(ready.starts_with("ready"), "the link did not come up: {ready}");
        Self { emulator, program, namespaces }
    }

    /// The names of the two namespaces, as `ip netns` knows them.
    pub fn namespaces(&self) -> &[String; 2] {
        &self.namespaces
    }

    /// From now on every packet vanishes.
    pub fn cut(&self) {
        self.control("down", "1");
    }

    /// Ends [`Link::cut`].
    pub fn restore(&self) {
        self.control("up", "0");
    }

    fn control(&self, word: &str, shown: &str) {
        let ends = self.namespaces.join(",");
        let args = ["ctl", "--ns", &ends, word];
        proc::run(Command::new(&self.program).args(args), Duration::from_secs(5)).ok();
        let stats = format!("/tmp/netlab.{}.stats", self.namespaces[0]);
        let expected = format!("{{\"down\":{shown}");
        wait_until(format!("the link to go {word}"), Duration::from_secs(5), || {
            let args = ["ctl", "--ns", &ends, "stats"];
            proc::run(Command::new(&self.program).args(args), Duration::from_secs(5)).ok();
            std::fs::read_to_string(&stats).is_ok_and(|s| s.starts_with(&expected))
        });
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        proc::signal(&self.emulator, rustix::process::Signal::TERM);
        let _ = self.emulator.wait();
        let _ = std::fs::remove_file(format!("/tmp/netlab.{}.stats", self.namespaces[0]));
    }
}

/// The emulator's program, compiled when its source is newer.
fn compiled() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("netlab/netlab.c");
    let program = Device::program().with_file_name("netlab");
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if modified(&program) < modified(&source) {
        let mut cc = Command::new("cc");
        cc.args(["-O2", "-Wall", "-o"]).arg(&program).arg(&source).arg("-lpthread");
        proc::run(&mut cc, Duration::from_secs(60)).ok();
    }
    program
}
