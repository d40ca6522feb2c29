//! The owner frozen, killed, or behind a dead link: browsing goes on, reads fail in time.

use e2e::wait::{wait_until, within};
use e2e::{Device, Lab, Need, files, proc};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The read deadline of the design, and what a busy machine may add to it.
const READ_DEADLINE: Duration = Duration::from_millis(10_500);
/// "At once", for a tree of some thousand names.
const AT_ONCE: Duration = Duration::from_secs(3);

/// A link that can be cut, a tree of real files whose small ones were not read yet.
fn browsing_reader() -> Option<(Lab, Device, Device, Vec<String>)> {
    let lab = Lab::emulated(&[Need::Fuse], &[])?;
    let source = lab.folder("source");
    let headers = source.join("include");
    proc::run(Command::new("cp").arg("-a").arg("/usr/include").arg(&headers), AT_ONCE * 10).ok();
    for n in 0..4 {
        files::random_file(&source.join(format!("unread-{n}")), 1 << 20, n);
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let expected = files::listing(&source);
    Some((lab, owner, reader, expected))
}

#[track_caller]
fn assert_browsable(reader: &Device, expected: &[String]) {
    // Names and attributes must come from the replica, not from what the kernel remembers.
    files::drop_kernel_caches();
    let mounted = reader.at("owner/files");
    let listed = within("find -ls of the tree", AT_ONCE, move || files::listing(&mounted)).0;
    files::assert_same_listing(expected, &listed);
}

#[track_caller]
fn assert_host_down(reader: &Device, file: &str) -> Duration {
    let path = reader.at("owner/files").join(file);
    let (read, took) = within("an uncached read", READ_DEADLINE, move || fs::read(path));
    let error = read.expect_err("a read of a file that nobody can send");
    assert_eq!(error.raw_os_error(), Some(Errno::HOSTDOWN.raw_os_error()), "{error}");
    took
}

#[test]
fn a_frozen_owner() {
    let Some((_lab, owner, reader, expected)) = browsing_reader() else { return };
    owner.freeze();
    assert_browsable(&reader, &expected);
    assert_host_down(&reader, "unread-0");
    owner.thaw();
    assert_readable_again(&reader, "unread-1");
}

#[test]
fn a_killed_owner() {
    let Some((_lab, mut owner, reader, expected)) = browsing_reader() else { return };
    owner.kill();
    assert_browsable(&reader, &expected);
    assert_host_down(&reader, "unread-0");
    wait_until("the owner to be known as offline", Duration::from_secs(20), || {
        !reader.sees_online("owner")
    });
    let took = assert_host_down(&reader, "unread-1");
    assert!(took < Duration::from_secs(1), "known to be offline, and still it took {took:?}");
    owner.start();
    assert_readable_again(&reader, "unread-2");
}

#[test]
fn a_cut_link() {
    let Some((lab, _owner, reader, expected)) = browsing_reader() else { return };
    lab.link().cut();
    assert_browsable(&reader, &expected);
    assert_host_down(&reader, "unread-0");
    lab.link().restore();
    assert_readable_again(&reader, "unread-1");
}

#[test]
fn a_reader_restarted_while_the_owner_is_gone_still_browses() {
    let Some((_lab, mut owner, mut reader, expected)) = browsing_reader() else { return };
    reader.stop();
    owner.kill();
    reader.start();
    reader.mount();
    assert_browsable(&reader, &expected);
    assert_host_down(&reader, "unread-0");
}

#[track_caller]
fn assert_readable_again(reader: &Device, file: &str) {
    let path = reader.at("owner/files").join(file);
    wait_until(format!("{file} to be readable again"), Duration::from_secs(30), || {
        let path = path.clone();
        within("a read", READ_DEADLINE, move || fs::read(path)).0.is_ok()
    });
}

#[test]
fn kill_9_of_a_blocked_reader_takes_effect_at_once() {
    let Some((_lab, owner, reader, _)) = browsing_reader() else { return };
    owner.freeze();
    let path = reader.at("owner/files/unread-0");
    let mut cat = proc::spawn(Command::new("cat").arg(&path).stdout(std::process::Stdio::null()));
    wait_until("cat to wait for the mount", Duration::from_secs(5), || {
        is_waiting_in_fuse(cat.id())
    });
    cat.kill().unwrap();
    let (ended, _) = within("the end of cat", Duration::from_secs(1), move || cat.wait());
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended.unwrap()), Some(9));
}

/// Whether the kernel has the process wait for an answer of a mount.
fn is_waiting_in_fuse(pid: u32) -> bool {
    let read = |name: &str| -> io::Result<String> {
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join(name))
    };
    let state = read("stat").unwrap_or_default();
    let sleeping = state
        .rsplit(')')
        .next()
        .is_some_and(|rest| matches!(rest.trim().chars().next(), Some('D' | 'S')));
    // A kernel without this file's content still tells the state; cat sleeps nowhere else.
    let place = read("wchan").unwrap_or_default();
    let opened = fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| fds.flatten().count() > 3);
    sleeping
        && opened
        && (place == "0" || place.is_empty() || place.contains("fuse") || place.contains("folio"))
}
