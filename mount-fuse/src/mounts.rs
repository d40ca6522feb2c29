//! What is mounted where, as `/proc/self/mountinfo` tells it.
//!
//! Reading that file never touches a mount, which is the point: a `stat` of a
//! mount point whose daemon is frozen or dead blocks or fails. Everything here
//! compares text and asks no file system.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The type under which the kernel lists this drive's mounts: `fuse` with our subtype.
pub(crate) const FS_TYPE: &str = "fuse.sd";
/// The source under which the kernel lists this drive's mounts.
pub(crate) const SOURCE: &str = "spacedrive";

/// The number of a mounted file system, `major:minor`; names its directories in `/sys`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceNo {
    /// 0 for every FUSE mount.
    pub major: u32,
    /// Also the name of the connection in `/sys/fs/fuse/connections`.
    pub minor: u32,
}

impl fmt::Display for DeviceNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// One mount of this process's mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Where, as an absolute path without symbolic links.
    pub mountpoint: PathBuf,
    /// The file system's number.
    pub device: DeviceNo,
    /// `fuse.sd` for ours.
    pub fs_type: String,
    /// What was mounted.
    pub source: OsString,
    /// Nothing can be written through it.
    pub read_only: bool,
    /// Its own number, and that of the mount on whose directory it is.
    pub(crate) id: u64,
    pub(crate) parent: u64,
    /// Which directory of the file system is shown.
    pub(crate) root: PathBuf,
}

impl MountInfo {
    /// Whether it is a mount of this drive, of any daemon, living or dead.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }
}

/// The mounts of this drive, of any daemon, living or dead; empty where there is no `/proc`.
pub fn mounts() -> Vec<MountInfo> {
    all().into_iter().filter(MountInfo::is_ours).collect()
}

/// Every mount, the ones mounted later last.
pub(crate) fn all() -> Vec<MountInfo> {
    std::fs::read("/proc/self/mountinfo")
        .map(|text| parse(&text))
        .inspect_err(|error| tracing::warn!(%error, "cannot read /proc/self/mountinfo"))
        .unwrap_or_default()
}

/// The topmost mount on exactly this path.
pub(crate) fn on(mountpoint: &Path) -> Option<MountInfo> {
    all().into_iter().rfind(|m| m.mountpoint == mountpoint)
}

/// The path as mountinfo would spell it, found without touching what may be mounted there:
/// only the directory above it is resolved.
pub(crate) fn spelled(path: &Path) -> std::io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    if all().iter().any(|m| m.mountpoint == absolute) {
        return Ok(absolute);
    }
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => absolute.canonicalize(),
    }
}

pub(crate) fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|&b| b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
/// (`proc_pid_mountinfo(5)`); the optional fields before `-` vary in number.
fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&b| b == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = parse_device(fields.next()?)?;
    let root = PathBuf::from(unescape(fields.next()?));
    let mountpoint = PathBuf::from(unescape(fields.next()?));
    let options = fields.next()?;
    let mut after_dash = fields.skip_while(|f| *f != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(after_dash.next()?).into_owned();
    let source = unescape(after_dash.next()?);
    let read_only = options.split(|&b| b == b',').any(|o| o == b"ro");
    Some(MountInfo { mountpoint, device, fs_type, source, read_only, id, parent, root })
}

fn parse_device(field: &[u8]) -> Option<DeviceNo> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    Some(DeviceNo { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// The kernel writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match octal_escape(rest) {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

fn octal_escape(text: &[u8]) -> Option<u8> {
    let [b'\\', digits @ ..] = text.get(..4)? else { return None };
    digits.iter().try_fold(0u8, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
        _ => None,
    })
}

/// A process that keeps a mount busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command name.
    pub command: String,
}

/// The processes that have something below `mountpoint` open, mapped, or as their working or
/// root directory, as far as this user may see. The links in `/proc` are compared as text;
/// nothing is opened, so a mount whose daemon does not answer cannot block this.
pub(crate) fn holders(mountpoint: &Path) -> Vec<Holder> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found: Vec<_> = processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| holds(pid, mountpoint))
        .map(|pid| Holder { pid, command: command_of(pid) })
        .collect();
    found.sort_by_key(|holder| holder.pid);
    found
}

fn command_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .map(|name| name.trim_end().to_owned())
        .unwrap_or_default()
}

fn holds(pid: u32, mountpoint: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let is_below =
        |link: &Path| std::fs::read_link(link).is_ok_and(|target| below(&target, mountpoint));
    ["cwd", "root", "exe"].iter().any(|link| is_below(&process.join(link)))
        || std::fs::read_dir(process.join("fd"))
            .is_ok_and(|fds| fds.flatten().any(|fd| is_below(&fd.path())))
        || std::fs::read(process.join("maps")).is_ok_and(|maps| maps_below(&maps, mountpoint))
}

/// `Path::starts_with` compares components; ` (deleted)` after an open file's name is harmless
/// to it, except right after the mount point itself, which cannot be deleted.
fn below(path: &Path, mountpoint: &Path) -> bool {
    path.starts_with(mountpoint)
}

/// The sixth field of a line of `/proc/PID/maps` is a path, with newlines as `\012`.
fn maps_below(maps: &[u8], mountpoint: &Path) -> bool {
    maps.split(|&b| b == b'\n')
        .filter_map(|line| line.iter().position(|&b| b == b'/').map(|at| &line[at..]))
        .any(|path| below(Path::new(OsStr::from_bytes(path)), mountpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_any_shape_are_parsed() {
        let text = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            36 35 98:0 /sub /mnt/a\\040b\\134\\012 ro,noatime master:1 shared:2 - fuse.sd spacedrive rw,user_id=0\n\
            not a mount line\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].fs_type, "proc");
        assert!(!mounts[0].is_ours() && !mounts[0].read_only);
        assert_eq!(
            mounts[1],
            MountInfo {
                mountpoint: PathBuf::from("/mnt/a b\\\n"),
                device: DeviceNo { major: 98, minor: 0 },
                fs_type: "fuse.sd".into(),
                source: "spacedrive".into(),
                read_only: true,
                id: 36,
                parent: 35,
                root: "/sub".into(),
            }
        );
        assert!(mounts[1].is_ours());
    }

    #[test]
    fn an_escape_that_is_none_stays() {
        assert_eq!(unescape(b"a\\9b\\04"), "a\\9b\\04");
        assert_eq!(unescape(b"\\777"), "\\777");
        assert_eq!(unescape(b"\\040"), " ");
    }

    #[test]
    fn this_process_holds_its_working_directory() {
        let here = std::env::current_dir().unwrap();
        assert!(holders(&here).iter().any(|h| h.pid == std::process::id()));
        assert!(!holds(std::process::id(), Path::new("/nonexistent/mount")));
    }

    #[test]
    fn maps_are_compared_by_component() {
        let maps = b"7f00-7f01 r--p 00000000 fe:00 12  /mnt/drive/a b.so\n7f02-7f03 rw-p 0 0:0 0\n";
        assert!(maps_below(maps, Path::new("/mnt/drive")));
        assert!(!maps_below(maps, Path::new("/mnt/driv")));
    }
}
