//! Two devices on this machine: tickets, names, codes, removal.

mod common;

use common::Device;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

fn invite(device: &Device) -> String {
    device.ok(&["device", "invite", "--detach"]).trim_end().to_owned()
}

#[test]
fn both_sides_show_the_same_code_and_the_ticket_stands_alone_on_stdout() {
    let (laptop, nas) = (Device::with_library("laptop"), Device::new());
    let mut invite = laptop.command();
    invite.args(["device", "invite"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut invite = invite.spawn().unwrap();
    let mut stdout = BufReader::new(invite.stdout.take().unwrap());
    let mut ticket = String::new();
    stdout.read_line(&mut ticket).unwrap();

    let join = ["device", "join", ticket.trim(), "--device-name", "nas", "--yes"];
    let joined = nas.json(&join);
    assert!(invite.wait().unwrap().success());
    let mut said = String::new();
    invite.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let code = joined["code"].as_str().unwrap();
    assert!(said.contains(code) && said.contains("nas"), "{said}");
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "the ticket stands alone");

    for device in [&laptop, &nas] {
        let listed = device.json(&["device", "list"]);
        let names: Vec<_> =
            listed["devices"].as_array().unwrap().iter().map(|d| &d["name"]).collect();
        assert_eq!(names, ["laptop", "nas"]);
    }
    laptop.fails(1, &["device", "remove", "nas"], &["--yes", "removes"]);
    laptop.ok(&["device", "remove", "nas", "--yes"]);
    assert_eq!(laptop.json(&["device", "list"])["devices"].as_array().unwrap().len(), 1);
}

#[test]
fn a_ticket_that_is_no_good_is_refused_with_the_reason() {
    let laptop = Device::with_library("laptop");
    let join = |device: &Device, ticket: &str, words: &[&str]| {
        device.fails(1, &["device", "join", ticket, "--device-name", "nas", "--yes"], words);
    };
    let ticket = invite(&laptop);

    let nas = Device::new();
    join(&nas, "nonsense", &["not a ticket"]);
    let swapped: String = ticket.chars().rev().collect();
    join(&nas, &swapped, &["not a ticket"]);
    join(&nas, &ticket[..ticket.len() - 4], &["not a ticket"]);

    nas.ok(&["device", "join", &ticket, "--device-name", "nas", "--yes"]);
    join(&Device::new(), &ticket, &["used"]);

    let stranger = Device::with_library("stranger");
    join(&stranger, &invite(&laptop), &["another one", "data-dir"]);
    join(&nas, &invite(&laptop), &["already"]);

    let short = laptop.ok(&["device", "invite", "--detach", "--expires", "1s"]);
    // Not a wait for something to happen: the ticket must be older than it may become.
    std::thread::sleep(std::time::Duration::from_millis(2200));
    join(&Device::new(), short.trim(), &["expired", "invite"]);
}

#[test]
fn a_waiting_invitation_that_is_interrupted_is_withdrawn() {
    let laptop = Device::with_library("laptop");
    let mut invite = laptop.command();
    let mut invite = invite
        .args(["device", "invite"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut ticket = String::new();
    BufReader::new(invite.stdout.take().unwrap()).read_line(&mut ticket).unwrap();
    let pid = rustix::process::Pid::from_child(&invite);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(!invite.wait().unwrap().success());

    // The daemon notices the closed connection before it serves the next one.
    laptop.ok(&["status"]);
    let join = ["device", "join", ticket.trim(), "--device-name", "nas", "--yes"];
    Device::new().fails(1, &join, &["expired"]);
}

#[test]
fn a_name_that_is_taken_or_no_name_is_refused() {
    let (laptop, nas) = (Device::with_library("laptop"), Device::new());
    let ticket = invite(&laptop);
    let join = |name: &str, words: &[&str]| {
        nas.fails(1, &["device", "join", &ticket, "--device-name", name, "--yes"], words);
    };
    join("content", &["content"]);
    join("a/b", &["a/b"]);
    join("laptop", &["laptop", "--device-name"]);
    let fresh = invite(&laptop);
    nas.ok(&["device", "join", &fresh, "--device-name", "nas", "--yes"]);
    laptop.fails(1, &["device", "rename", "nas"], &["another device"]);
    laptop.ok(&["device", "rename", "portable"]);
    assert_eq!(laptop.json(&["status"])["device"]["name"], "portable");
}
