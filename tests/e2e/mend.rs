//! The mount survives its daemon, and an ordinary user can have one.

use e2e::device::{detach_mounts_below, is_mounted};
use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need};
use rustix::io::Errno;
use rustix::process::Signal;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::Duration;

/// Any user that is not root; the numeric id needs no account.
const SOMEBODY: u32 = 65_534;

#[test]
fn a_mount_whose_daemon_was_killed_is_mended_by_sd_mount() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let folder = lab.folder("location");
    fs::write(folder.join("file"), "text").unwrap();
    let mut device = lab.device("solo");
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    device.share(&folder, "files");
    device.mount();
    let path = device.at("solo/files/file");
    assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    // Somebody sits in the mount, so that it cannot simply be unmounted.
    let inside = fs::File::open(device.at("solo/files")).unwrap();

    device.kill();
    assert!(is_mounted(&device.mountpoint()), "the kernel keeps the dead mount");
    let dead = path.clone();
    let (stat, _) =
        within("stat in a dead mount", Duration::from_secs(5), move || fs::metadata(dead));
    assert_eq!(stat.unwrap_err().raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));

    device.start();
    device.mount();
    assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    drop(inside);
    device.stop();
    assert!(!is_mounted(&device.mountpoint()), "a clean stop unmounts");
}

/// The daemon lives here, which shows that it was the guard who gave the mount up, and not the
/// kernel, which sees the daemon's end by itself in most cases.
#[test]
fn the_guard_gives_up_what_a_daemon_left_that_was_killed() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::Root]) else { return };
    let device = lab.device("solo");
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    let mountpoint = device.mount();
    let mounted = mount_fuse::mounts().into_iter().find(|m| m.mountpoint == mountpoint);
    let minor = mounted.expect("in the list of mounts").device.minor;
    let mut command = device.command(Device::program());
    command.args(["daemon", "guard"]).stdin(Stdio::piped());
    // The kernel tells a child of the end of the thread that made it, whose pipe stays open.
    let (ends, told_to_end) = std::sync::mpsc::channel::<()>();
    let (give, given) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        give.send(command.spawn().expect("the guard")).expect("a test that waits");
        let _ = told_to_end.recv();
    });
    let mut guard = given.recv().expect("a thread that lives");
    let mut pipe = guard.stdin.take().expect("a pipe");
    writeln!(pipe, "{minor}").expect("a guard that reads");
    wait_until("the guard is ready", Duration::from_secs(20), || {
        let status = fs::read_to_string(format!("/proc/{}/status", guard.id())).expect("proc");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("a mask");
        let caught = u64::from_str_radix(caught.trim(), 16).expect("a mask");
        caught & 1 << (Signal::USR1.as_raw() - 1) != 0
    });
    assert!(fs::read_dir(&mountpoint).is_ok(), "it is served until then");
    drop(ends);
    thread.join().expect("a thread that ends");
    assert!(guard.wait().expect("the guard").success());
    let given_up = fs::read_dir(&mountpoint).map(drop).unwrap_err();
    assert_eq!(given_up.raw_os_error(), Some(Errno::NOTCONN.raw_os_error()));
    assert!(is_mounted(&mountpoint), "nobody writes below it by mistake");
    device.mount();
    assert!(fs::read_dir(&mountpoint).is_ok(), "made alive again");
    drop(pipe);
}

#[test]
fn unmounting_names_who_is_in_the_way_and_can_be_forced() {
    let Some(lab) = Lab::local(&[Need::Fuse]) else { return };
    let folder = lab.folder("location");
    fs::write(folder.join("file"), "text").unwrap();
    let device = lab.device("solo");
    device.sd(&["library", "create", "home", "--device-name", "solo"]).ok();
    device.share(&folder, "files");
    let mountpoint = device.mount();
    let held = fs::File::open(device.at("solo/files/file")).unwrap();
    let mountpoint_arg = mountpoint.to_str().unwrap();
    let message = device.fails(1, &["unmount", mountpoint_arg]);
    let me = std::process::id().to_string();
    assert!(message.contains(&me), "the message names the process {me}: {message}");
    assert!(is_mounted(&mountpoint));
    device.sd(&["unmount", mountpoint_arg, "--force"]).ok();
    assert!(!is_mounted(&mountpoint));
    drop(held);
    device.mount();
    device.sd(&["unmount", mountpoint_arg]).ok();
    assert!(!is_mounted(&mountpoint));
}

#[test]
fn an_ordinary_user_mounts_reads_and_writes() {
    let Some(lab) = Lab::local(&[Need::Fuse, Need::Root]) else { return };
    let _device_file = DeviceFileForAll::new();
    let folder = lab.folder("location");
    std::os::unix::fs::chown(&folder, Some(SOMEBODY), Some(SOMEBODY)).unwrap();
    let mut device = lab.stopped_device("user");
    device.run_as(SOMEBODY);
    device.start();
    device.sd(&["library", "create", "home", "--device-name", "user"]).ok();
    device.add_location(&folder, "files");
    device.mount();
    run(&device, "echo text > drive/user/files/file && cat drive/user/files/file | grep -qx text");
    assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "text\n");
    run(&device, "mkdir drive/user/files/d && mv drive/user/files/file drive/user/files/d/moved");
    assert_eq!(fs::read_to_string(folder.join("d/moved")).unwrap(), "text\n");
    let mounts = device.status()["mounts"].clone();
    assert!(mounts[0]["passthrough"].is_string(), "status tells how files are read: {mounts}");

    device.kill();
    wait_until("the mount to be dead", Duration::from_secs(5), || {
        shell(&device, "ls drive").status.code() != Some(0)
    });
    device.start();
    device.mount();
    run(&device, "grep -qx text drive/user/files/d/moved");
    device.stop();
    detach_mounts_below(&device.mountpoint());
}

fn shell(device: &Device, script: &str) -> e2e::proc::Finished {
    let mut sh = device.command("sh");
    sh.args(["-c", script]).current_dir(device.mountpoint().parent().unwrap());
    e2e::proc::run(&mut sh, Duration::from_secs(20))
}

#[track_caller]
fn run(device: &Device, script: &str) {
    shell(device, script).ok();
}

/// Distributions let every user open `/dev/fuse`; a bare machine may not, so the test does.
struct DeviceFileForAll(fs::Permissions);

impl DeviceFileForAll {
    fn new() -> Self {
        let before = fs::metadata("/dev/fuse").unwrap().permissions();
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        Self(before)
    }
}

impl Drop for DeviceFileForAll {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
}
