//! The mount survives its daemon, and an ordinary user can have one.

use e2e::device::{detach_mounts_below, is_mounted};
use e2e::wait::{wait_until, within};
use e2e::{Lab, Need};
use rustix::io::Errno;
use std::fs;
use std::os::unix::fs::PermissionsExt;
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

fn shell(device: &e2e::Device, script: &str) -> e2e::proc::Finished {
    let mut sh = device.command("sh");
    sh.args(["-c", script]).current_dir(device.mountpoint().parent().unwrap());
    e2e::proc::run(&mut sh, Duration::from_secs(20))
}

#[track_caller]
fn run(device: &e2e::Device, script: &str) {
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
