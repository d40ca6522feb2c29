//! Which inodes of a mount programs watch, from `/proc`.
//!
//! The kernel tells no file system that it is watched, but shows each program's watches in
//! `/proc/PID/fdinfo`. Only what this user may see is found: the own programs, or for root all
//! of this PID namespace. Nothing of the mount is touched, so this waits for no daemon.

use crate::mounts::DeviceNo;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use vfs_core::drive::InodeNo;

/// More than any program's watches by the kernel's own limit on most machines; each takes memory.
const WATCHED_MAX: usize = 1 << 18;

/// The watched inodes of the file system of this number.
pub(crate) fn watched(device: DeviceNo) -> HashSet<InodeNo> {
    let mut found = HashSet::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return found };
    let me = std::process::id();
    let pids = processes.filter_map(|p| p.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // This daemon watches disks, perhaps with very many watches.
    for pid in pids.filter(|pid| *pid != me) {
        of_process(&Path::new("/proc").join(pid.to_string()), device, &mut found);
    }
    found
}

fn of_process(process: &Path, device: DeviceNo, found: &mut HashSet<InodeNo>) {
    let Ok(descriptors) = std::fs::read_dir(process.join("fd")) else { return };
    for descriptor in descriptors.flatten() {
        let Ok(target) = std::fs::read_link(descriptor.path()) else { continue };
        let target = target.as_os_str().as_encoded_bytes();
        if matches!(target, b"anon_inode:inotify" | b"anon_inode:[fanotify]")
            && let Ok(text) = File::open(process.join("fdinfo").join(descriptor.file_name()))
        {
            let room = WATCHED_MAX.saturating_sub(found.len());
            found.extend(in_fdinfo(BufReader::new(text), device).take(room));
        }
    }
}

/// `inotify wd:1 ino:9e7e sdev:800013 mask:800afce …` and `fanotify ino:4f969 sdev:800013 …`
/// (`proc_pid_fdinfo(5)`), all in hexadecimal.
fn in_fdinfo(text: impl BufRead, device: DeviceNo) -> impl Iterator<Item = InodeNo> {
    let device = u64::from(device.major) << 20 | u64::from(device.minor);
    text.split(b'\n').map_while(Result::ok).filter_map(move |line| {
        let line = std::str::from_utf8(&line).ok()?;
        let mut words = line.split(' ');
        matches!(words.next(), Some("inotify" | "fanotify")).then_some(())?;
        let field = |key: &str| {
            let value = line.split(' ').find_map(|word| word.strip_prefix(key))?;
            u64::from_str_radix(value, 16).ok()
        };
        (field("sdev:")? == device).then_some(InodeNo(field("ino:")?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_of_one_file_system_are_found() {
        let text = b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t58\n\
            inotify wd:2 ino:7ed sdev:2b mask:fce ignored_mask:0 fhandle-bytes:8\n\
            inotify wd:1 ino:9 sdev:2c mask:fce ignored_mask:0\n\
            fanotify flags:10 event-flags:0\n\
            fanotify ino:800000000000004d sdev:2b mflags:0 mask:3b ignored_mask:0\n\
            inotify wd:x\n";
        let found: Vec<_> = in_fdinfo(&text[..], DeviceNo { major: 0, minor: 43 }).collect();
        assert_eq!(found, [InodeNo(0x7ed), InodeNo(0x8000_0000_0000_004d)]);
        assert_eq!(in_fdinfo(&text[..], DeviceNo { major: 8, minor: 43 }).count(), 0);
    }
}
