//! Mounts come and go: what is refused, who is named, what is mended, and as whom.

use crate::common::{Rig, Standing, can_mount, drive, eventually, has_program, open_to_all};
use mount_fuse::{MountError, MountOptions, is_dead, mend, mounts};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// With these set, the test `serve` of this program is a daemon over `SD_TEST_DISK`.
const SERVE_ON: &str = "SD_TEST_SERVE_ON";
const SERVE_DISK: &str = "SD_TEST_SERVE_DISK";
const SERVE_DATA: &str = "SD_TEST_SERVE_DATA";
/// Set: without passthrough.
const SERVE_CALLS: &str = "SD_TEST_SERVE_CALLS";

/// Not a test: the daemon of [`spawn_daemon`], which this program starts as another process.
#[test]
fn serve() {
    let Some(mountpoint) = std::env::var_os(SERVE_ON) else { return };
    let of = |name| std::path::PathBuf::from(std::env::var_os(name).unwrap());
    let runtime = crate::common::runtime();
    let (drive, _parts) = drive::drive_over(&of(SERVE_DISK), &of(SERVE_DATA), runtime.handle());
    let passthrough = std::env::var_os(SERVE_CALLS).is_none();
    let options = MountOptions { passthrough, ..MountOptions::default() };
    let handle = runtime.handle().clone();
    let mount = mount_fuse::mount(drive, Path::new(&mountpoint), options, handle).unwrap();
    println!("\nmounted {:?}", mount.passthrough());
    // Until its input is closed.
    let _ = std::io::stdin().read_line(&mut String::new());
    mount.unmount(false).unwrap();
    println!("\nunmounted");
}

struct Daemon {
    child: Child,
    /// What it said when it was ready.
    ready: String,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn_daemon(wrapper: &[&str], mountpoint: &Path, disk: &Path, data: &Path) -> Daemon {
    let this = std::env::current_exe().unwrap();
    let mut words = wrapper.iter().map(std::ffi::OsStr::new).chain([this.as_os_str()]);
    let mut child = Command::new(words.next().unwrap())
        .args(words)
        .args(["--exact", "session::serve", "--nocapture", "--test-threads=1"])
        .env(SERVE_ON, mountpoint)
        .env(SERVE_DISK, disk)
        .env(SERVE_DATA, data)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
    let ready = lines.find_map(|line| line.ok().filter(|l| l.starts_with("mounted")));
    Daemon { ready: ready.expect("the daemon mounts"), child }
}

fn is_mounted(mountpoint: &Path) -> bool {
    mounts().iter().any(|m| m.mountpoint == mountpoint)
}

#[test]
fn a_mount_is_listed_and_goes_with_unmount() {
    if !can_mount("a_mount_is_listed_and_goes_with_unmount") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let at = rig.mount.mountpoint().to_owned();
    let info = mounts().into_iter().find(|m| m.mountpoint == at).expect("listed");
    assert_eq!((info.fs_type.as_str(), info.source.to_str()), ("fuse.sd", Some("spacedrive")));
    assert!(info.is_ours() && !info.read_only && !is_dead(&at));
    assert!(rig.mount.is_alive());
    rig.mount.unmount(false).unwrap();
    assert!(!is_mounted(&at) && !rig.mount.is_alive());
    rig.mount.unmount(false).expect("a second time changes nothing");
}

#[test]
fn a_dropped_mount_is_gone() {
    if !can_mount("a_dropped_mount_is_gone") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let at = rig.mount.mountpoint().to_owned();
    drop(rig);
    assert!(!is_mounted(&at));
}

#[test]
fn a_bad_mount_point_is_told_by_kind() {
    if !can_mount("a_bad_mount_point_is_told_by_kind") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let dir = open_to_all();
    let runtime = crate::common::runtime();
    let attempt = |path: &Path| {
        let (drive, _parts) =
            drive::drive_over(rig.disk.path(), open_to_all().path(), runtime.handle());
        let handle = runtime.handle().clone();
        mount_fuse::mount(drive, path, MountOptions::default(), handle).unwrap_err()
    };
    let missing = attempt(&dir.path().join("none"));
    assert!(matches!(missing, MountError::Missing { .. }), "{missing:?}");
    fs::write(dir.path().join("file"), b"").unwrap();
    let file = attempt(&dir.path().join("file"));
    assert!(matches!(file, MountError::NotADirectory { .. }), "{file:?}");
    let full = attempt(dir.path());
    assert!(matches!(full, MountError::NotEmpty { .. }), "{full:?}");
    let twice = attempt(rig.mount.mountpoint());
    assert!(matches!(twice, MountError::AlreadyMounted { .. }), "{twice:?}");
    assert!(!mend(rig.mount.mountpoint()).unwrap(), "a living mount is left alone");
    assert!(rig.mount.is_alive() && is_mounted(rig.mount.mountpoint()));
    assert!(!mend(dir.path()).unwrap() && !mend(&dir.path().join("none")).unwrap());
}

#[test]
fn a_symbolic_link_leads_to_the_mount_point() {
    if !can_mount("a_symbolic_link_leads_to_the_mount_point") {
        return;
    }
    let dir = open_to_all();
    fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let (disk, data, runtime) = (open_to_all(), open_to_all(), crate::common::runtime());
    let (drive, _parts) = drive::drive_over(disk.path(), data.path(), runtime.handle());
    let options = MountOptions::default();
    let handle = runtime.handle().clone();
    let mount = mount_fuse::mount(drive, &dir.path().join("link"), options, handle).unwrap();
    assert_eq!(mount.mountpoint(), dir.path().join("real").canonicalize().unwrap());
    mount.unmount(false).unwrap();
}

#[test]
fn a_busy_mount_names_its_holders_and_goes_on() {
    for rig in Rig::both("a_busy_mount_names_its_holders_and_goes_on") {
        fs::write(rig.path("a"), b"content").unwrap();
        let holder = Standing::in_directory(&rig.folder());
        let open = File::open(rig.path("a")).unwrap();
        let busy = rig.mount.unmount(false).unwrap_err();
        let MountError::Busy { holders, .. } = &busy else { panic!("{busy:?}") };
        for pid in [holder.0.id(), std::process::id()] {
            assert!(holders.iter().any(|h| h.pid == pid && !h.command.is_empty()), "{holders:?}");
        }
        assert_eq!(fs::read(rig.path("a")).unwrap(), b"content");

        rig.mount.unmount(true).unwrap();
        assert!(!is_mounted(rig.mount.mountpoint()));
        eventually("the session ends", || !rig.mount.is_alive());
        drop(open);
    }
}

#[test]
fn what_another_process_unmounts_is_noticed() {
    if !can_mount("what_another_process_unmounts_is_noticed") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let unmounted = Command::new("umount").arg(rig.mount.mountpoint()).status().unwrap();
    assert!(unmounted.success());
    eventually("the session ends", || !rig.mount.is_alive());
}

#[test]
fn a_broken_connection_is_noticed_and_cleared_away() {
    if !can_mount("a_broken_connection_is_noticed_and_cleared_away") {
        return;
    }
    let rig = Rig::with_passthrough(true);
    let at = rig.mount.mountpoint().to_owned();
    fs::write(rig.path("a"), b"content").unwrap();
    let open = File::open(rig.path("a")).unwrap();
    // Forced on a mount in use, this breaks the connection and leaves the mount.
    let forced = rustix::mount::unmount(&at, rustix::mount::UnmountFlags::FORCE);
    assert_eq!(forced, Err(rustix::io::Errno::BUSY));
    eventually("the session ends", || !rig.mount.is_alive());
    assert!(is_mounted(&at) && is_dead(&at));
    rig.mount.unmount(false).unwrap();
    assert!(!is_mounted(&at));
    drop(open);
}

#[test]
fn a_mount_whose_daemon_was_killed_is_mended() {
    if can_mount("a_mount_whose_daemon_was_killed_is_mended") {
        mend_after_kill(&["env"]);
        mend_after_kill(&["env", "SD_TEST_SERVE_CALLS=1"]);
    }
}

fn mend_after_kill(daemon: &[&str]) {
    let [mountpoint, disk, data] = std::array::from_fn(|_| open_to_all());
    let at = mountpoint.path().canonicalize().unwrap();
    let mut daemon = spawn_daemon(daemon, &at, disk.path(), data.path());
    fs::write(drive::own_folder(&at).join("a"), b"content").unwrap();
    assert_eq!(fs::read(disk.path().join("a")).unwrap(), b"content");
    let open = File::open(drive::own_folder(&at).join("a")).unwrap();
    assert!(!is_dead(&at));

    // A frozen daemon is not a dead one.
    let pid = Pid::from_child(&daemon.child);
    kill_process(pid, Signal::STOP).unwrap();
    assert!(!is_dead(&at) && !mend(&at).unwrap());
    kill_process(pid, Signal::CONT).unwrap();

    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    eventually("the kernel notices", || is_dead(&at));
    assert!(is_mounted(&at));
    let runtime = crate::common::runtime();
    let again = || {
        let (drive, parts) = drive::drive_over(disk.path(), data.path(), runtime.handle());
        let options = MountOptions::default();
        let handle = runtime.handle().clone();
        mount_fuse::mount(drive, &at, options, handle).map(|mount| (mount, parts))
    };
    let dead = again().map(drop).unwrap_err();
    assert!(matches!(dead, MountError::Dead { .. }), "{dead:?}");
    assert!(mend(&at).unwrap());
    assert!(!is_mounted(&at) && !mend(&at).unwrap());

    let (mount, _parts) = again().unwrap();
    assert_eq!(fs::read(drive::own_folder(&at).join("a")).unwrap(), b"content");
    // Open from before: fails, or reads the backing file, but never hangs.
    let _ = open.read_at(&mut [0; 7], 0);
    mount.unmount(false).unwrap();
}

/// `/dev/fuse` with the mode that udev gives it; a container without udev may keep it to root.
struct DeviceForAll(fs::Permissions);

impl DeviceForAll {
    fn new() -> Self {
        let before = fs::metadata("/dev/fuse").unwrap().permissions();
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        Self(before)
    }
}

impl Drop for DeviceForAll {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
}

#[test]
fn an_ordinary_user_mounts_through_fusermount3() {
    let test = "an_ordinary_user_mounts_through_fusermount3";
    if !can_mount(test) || !has_program(test, "fusermount3") || !has_program(test, "setpriv") {
        return;
    }
    let _device = DeviceForAll::new();
    let [mountpoint, disk, data] = std::array::from_fn(|_| open_to_all());
    for dir in [&mountpoint, &disk, &data] {
        std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    }
    let at = mountpoint.path().canonicalize().unwrap();
    let as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let mut daemon = spawn_daemon(&as_user, &at, disk.path(), data.path());
    assert!(daemon.ready.contains("Unavailable"), "{}", daemon.ready);
    let info = mounts().into_iter().find(|m| m.mountpoint == at).unwrap();
    assert_eq!((info.fs_type.as_str(), info.source.to_str()), ("fuse.sd", Some("spacedrive")));
    let shell = |script: &str| {
        let output = Command::new(as_user[0])
            .args(&as_user[1..])
            .args(["sh", "-ec", script])
            .current_dir("/")
            .env("F", drive::own_folder(&at))
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    shell("echo one > $F/a; mv $F/a $F/b; mkdir $F/d; cp $F/b $F/d/c");
    assert_eq!(fs::read(disk.path().join("d/c")).unwrap(), b"one\n");
    assert_eq!(shell("cat $F/d/c; ls $F"), "one\nb\nd\n");
    // The kernel keeps even root out.
    assert!(fs::read_dir(&at).is_err());

    drop(daemon.child.stdin.take());
    assert!(daemon.child.wait().unwrap().success(), "it unmounts");
    assert!(!is_mounted(&at));
}
