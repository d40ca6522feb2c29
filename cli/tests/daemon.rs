//! The daemon: one a data directory, started by whoever comes first, refused data directories.

mod common;

use common::{Device, stderr, text};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn starters_that_race_get_one_daemon() {
    let device = Device::new();
    let status = || {
        let mut command = device.command();
        command.args(["status", "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let racing: Vec<Child> = (0..5).map(|_| status()).collect();
    let pids: Vec<Value> = racing
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            let status: Value = serde_json::from_slice(&output.stdout).unwrap();
            status["daemon"]["pid"].clone()
        })
        .collect();
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
}

#[test]
fn a_second_daemon_is_refused_with_the_pid_of_the_first() {
    let device = Device::new();
    let pid = device.json(&["status"])["daemon"]["pid"].to_string();
    device.fails(1, &["daemon", "run"], &[&pid, "daemon stop"]);
    assert_eq!(device.json(&["daemon", "status"])["pid"].to_string(), pid);
}

#[test]
fn stopping_ends_it_and_asking_does_not_start_it() {
    let device = Device::new();
    assert_eq!(device.run(&["daemon", "status"]).status.code(), Some(1));
    assert!(!device.data().join("daemon.lock").exists());
    device.ok(&["daemon", "stop"]);
    device.ok(&["status"]);
    assert_eq!(device.json(&["daemon", "status"])["running"], true);
    device.ok(&["daemon", "stop"]);
    assert_eq!(device.run(&["daemon", "status"]).status.code(), Some(1));
    assert!(!device.data().join("sock").exists());
}

#[test]
fn what_the_starter_had_open_is_not_kept_open() {
    let device = Device::new();
    let lock = device.folder("script").join("lock");
    fs::write(&lock, "").unwrap();
    let status = device
        .command_by(&["sh", "-c", "exec 7<\"$0\"; exec \"$@\"", text(&lock)])
        .args(["status", "--json"])
        .output()
        .unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    let open = fs::read_dir(format!("/proc/{}/fd", status["daemon"]["pid"])).unwrap();
    let open: Vec<_> = open.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).collect();
    assert!(open.contains(&device.data().join("sd.log")), "{open:?}");
    assert!(!open.contains(&lock), "{open:?}");
}

#[test]
fn sigterm_is_a_clean_end() {
    let device = Device::new();
    let mut daemon =
        device.command().args(["daemon", "run"]).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the daemon", || device.run(&["daemon", "status"]).status.success());
    let pid = rustix::process::Pid::from_child(&daemon);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
}

#[test]
fn what_was_made_is_there_after_kill_9() {
    let device = Device::with_library("laptop");
    let folder = device.folder("photos");
    fs::write(folder.join("a"), "x").unwrap();
    device.ok(&["location", "add", text(&folder), "--wait"]);
    let before = device.json(&["status"]);
    let pid = before["daemon"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    wait_until("the end", || rustix::process::test_kill_process(pid).is_err());
    let after = device.json(&["status"]);
    assert_eq!(after["device"], before["device"]);
    assert_eq!(after["locations"][0]["name"], "photos");
    wait_until("the scan", || device.json(&["status"])["locations"][0]["indexed"] == true);
    assert_eq!(device.ok(&["ls", "sd://laptop/photos"]), "a\n");
}

#[test]
fn a_newer_data_directory_is_refused_and_left_alone() {
    let device = Device::new();
    fs::create_dir_all(device.data()).unwrap();
    fs::write(device.data().join("format"), "2\n").unwrap();
    for args in [&["status"][..], &["daemon", "run"], &["library", "create", "x"]] {
        device.fails(1, args, &["format 2", "newer sd"]);
    }
    assert_eq!(fs::read_dir(device.data()).unwrap().count(), 1);
}

#[test]
fn a_directory_of_something_else_is_not_taken_for_a_data_directory() {
    let device = Device::new();
    let folder = device.folder("data");
    fs::write(folder.join("thesis.tex"), "x").unwrap();
    device.fails(1, &["status"], &["not sd's"]);
    assert_eq!(fs::read_dir(folder).unwrap().count(), 1);
}

#[test]
fn a_path_longer_than_a_socket_address_works() {
    let device = Device::below(format!("{}/{}", "x".repeat(150), "y".repeat(150)));
    device.ok(&["library", "create", "home"]);
    assert_eq!(device.json(&["daemon", "status"])["running"], true);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_told_apart() {
    let device = Device::new();
    device.fails(1, &["--data-dir", "/proc/sd", "status"], &["/proc/sd"]);
    let file = device.folder("x").join("file");
    fs::write(&file, "x").unwrap();
    let below = file.join("data");
    device.fails(1, &["--data-dir", text(&below), "status"], &[text(&below)]);
    device.fails(2, &["--data-dir", "", "status"], &["--data-dir"]);
}

#[test]
fn a_damaged_identity_or_library_is_named_and_not_replaced() {
    for name in ["identity.key", "library.json"] {
        let device = Device::with_library("laptop");
        device.ok(&["daemon", "stop"]);
        fs::write(device.data().join(name), "broken").unwrap();
        device.fails(1, &["status"], &[name, "damaged", "backup"]);
        assert_eq!(fs::read_to_string(device.data().join(name)).unwrap(), "broken");
    }
}

#[test]
fn a_corrupt_index_is_set_aside_reported_and_rebuilt() {
    let device = Device::with_library("laptop");
    let folder = device.folder("photos");
    fs::write(folder.join("a"), "x").unwrap();
    device.ok(&["location", "add", text(&folder), "--wait"]);
    device.ok(&["daemon", "stop"]);
    for file in fs::read_dir(device.data().join("index")).unwrap() {
        let path = file.unwrap().path();
        fs::write(&path, vec![0x5a; 64 << 10]).unwrap();
    }
    let status = device.json(&["status"]);
    assert_eq!(status["problems"][0]["code"], "index_set_aside", "{status}");
    wait_until("the rebuilding", || device.json(&["status"])["locations"][0]["indexed"] == true);
    assert_eq!(device.ok(&["ls", "sd://laptop/photos"]), "a\n");
    let doctor = device.run(&["doctor", "--json"]);
    let diagnosis: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    assert_eq!((diagnosis["ok"].clone(), doctor.status.code()), (false.into(), Some(1)));
}

/// Says something on the control socket, and hears all of the answer.
fn speak(device: &Device, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(device.data().join("sock")).unwrap();
    // A refusal may come, and the connection end, before all was said.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn the_control_socket_survives_what_it_does_not_understand() {
    let device = Device::new();
    device.ok(&["status"]);
    for nonsense in
        [&b"\n"[..], b"{}\n", b"\xff\xfe\n", b"[]\n", b"{\"version\":1,\"request\":3}\n"]
    {
        let answer = speak(&device, nonsense);
        assert!(answer.is_empty() || answer.contains("error"), "{answer}");
    }
    speak(&device, &vec![b'x'; 4 << 20]);
    let other = speak(&device, b"{\"version\":99,\"request\":{\"op\":\"status\"}}\n");
    assert!(other.is_empty() || other.contains("version"), "{other}");
    device.ok(&["status"]);
}

#[test]
fn another_version_is_told_so_and_may_stop_the_daemon() {
    let device = Device::new();
    device.ok(&["status"]);
    let ask = |line: &[u8]| {
        let mut stream = UnixStream::connect(device.data().join("sock")).unwrap();
        stream.write_all(line).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    };
    let refused = ask(b"{\"version\":99,\"request\":{\"op\":\"status\"}}\n");
    assert!(refused.contains("daemon stop"), "{refused}");
    let stopped = ask(b"{\"version\":99,\"request\":{\"op\":\"stop\",\"force\":false}}\n");
    assert!(stopped.contains("result"), "{stopped}");
    wait_until("the end", || !device.run(&["daemon", "status"]).status.success());
}
