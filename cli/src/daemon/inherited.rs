//! Descriptors that whoever started the daemon had open.

use std::fs;
use std::os::fd::RawFd;

/// Closes all but standard input, output and error. A daemon in the background lives on when the
/// script that needed it has ended: with the script's lock, its pipe or a file on a disk that is
/// to be unmounted still open, others would wait for that for ever.
///
/// To be called before this process opens anything.
pub fn close() {
    for descriptor in open().into_iter().filter(|number| *number > 2) {
        // That of the listing is closed by now.
        let _ = nix::unistd::close(descriptor);
    }
}

fn open() -> Vec<RawFd> {
    let Ok(listed) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    listed.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
