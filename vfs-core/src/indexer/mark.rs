//! Events of a whole file system, by a fanotify mark.
//!
//! A watch for each directory keeps the directory's inode in the kernel's memory, about 1 KiB, and
//! counts against a limit that all programs share. A mark costs nothing for each directory and has
//! no limit, but tells of everything on the file system, also of what lies outside the location,
//! and needs `CAP_SYS_ADMIN`. So it is for locations of very many directories.
//!
//! An event names its directory by a file handle. Its form belongs to the file system: those whose
//! handles hold the inode number at a known place are marked, others are not.

use nix::libc;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// Room for the events of one `read`; one takes 24 bytes, a handle of at most 128 and a name.
const BUFFER_BYTES: usize = 64 << 10;

/// As for the watch of one directory. Without events of directories themselves, `FAN_ONDIR`,
/// folders would be made unseen.
const EVENTS: MaskFlags = MaskFlags::FAN_CREATE
    .union(MaskFlags::FAN_DELETE)
    .union(MaskFlags::FAN_MOVED_FROM)
    .union(MaskFlags::FAN_MOVED_TO)
    .union(MaskFlags::FAN_MODIFY)
    .union(MaskFlags::FAN_CLOSE_WRITE)
    .union(MaskFlags::FAN_ATTRIB)
    .union(MaskFlags::FAN_MOVE_SELF)
    .union(MaskFlags::FAN_ONDIR);

/// `f_type` of ext4, XFS, Btrfs and F2FS (linux/magic.h).
const KNOWN_FILE_SYSTEMS: [rustix::fs::FsWord; 4] = [0xEF53, 0x5846_5342, 0x9123_683E, 0xF2F5_2010];

/// Buffers read at once: other watches have events, too.
const BUFFERS: usize = 4;

/// A mark, until it is dropped.
pub(super) struct Mark {
    group: Fanotify,
    device: rustix::fs::Dev,
}

/// What happened in a directory, several things at once where the kernel merged them.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Marked<'a> {
    /// To what has the name; without one, to the directory itself.
    At { mask: MaskFlags, directory_ino: u64, name: Option<&'a [u8]> },
    /// The kernel dropped events, or one cannot be understood.
    Overflow,
}

impl Mark {
    /// Marks the file system of an open directory; events are read from now on.
    pub fn set(dir: BorrowedFd<'_>) -> io::Result<Self> {
        let file_system = rustix::fs::fstatfs(dir)?.f_type;
        if !KNOWN_FILE_SYSTEMS.contains(&file_system) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let names = InitFlags::from_bits_retain(libc::FAN_REPORT_DIR_FID | libc::FAN_REPORT_NAME);
        let group = Fanotify::init(
            InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK | names,
            EventFFlags::empty(),
        )?;
        let add = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM;
        group.mark(add, EVENTS, dir, None::<&std::path::Path>)?;
        Ok(Self { group, device: rustix::fs::fstat(dir)?.st_dev })
    }

    /// Whether the inode numbers of a directory's events are its own. Subvolumes of Btrfs have
    /// numbers of their own on one file system.
    pub fn covers(&self, dir: BorrowedFd<'_>) -> bool {
        rustix::fs::fstat(dir).is_ok_and(|stat| stat.st_dev == self.device)
    }

    /// Gives events that wait, not without end.
    pub fn read(&self, found: &mut dyn FnMut(Marked<'_>)) -> io::Result<()> {
        let mut buffer = [0; BUFFER_BYTES];
        for _ in 0..BUFFERS {
            match rustix::io::read(&self.group, &mut buffer) {
                Ok(0) | Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Ok(count) => parse(&buffer[..count], found),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Mark {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }
}

/// `struct fanotify_event_metadata`, one after the other, each with its records (fanotify(7)).
fn parse(mut events: &[u8], found: &mut dyn FnMut(Marked<'_>)) {
    while let Some(length) = u32_at(events, 0)
        && let Some((event, rest)) = events.split_at_checked(length as usize)
        && let (Some(metadata), Some(mask)) = (u16_at(event, 6), u64_at(event, 8))
    {
        let mask = MaskFlags::from_bits_retain(mask);
        let record = event.get(metadata.into()..).and_then(place);
        match record.map(directory_and_name) {
            _ if mask.contains(MaskFlags::FAN_Q_OVERFLOW) => found(Marked::Overflow),
            Some(Some((directory_ino, name))) => found(Marked::At { mask, directory_ino, name }),
            Some(None) => found(Marked::Overflow),
            // Of a file that the kernel knows by its inode only; a watch of its directory would
            // not tell of it either.
            None => {}
        }
        events = rest;
    }
}

/// The first record that says where.
fn place(mut records: &[u8]) -> Option<&[u8]> {
    loop {
        let (kind, length) = (*records.first()?, u16_at(records, 2)?);
        let (record, rest) = records.split_at_checked(length.max(4).into())?;
        if [libc::FAN_EVENT_INFO_TYPE_DFID_NAME, libc::FAN_EVENT_INFO_TYPE_DFID].contains(&kind) {
            return Some(record.get(12..).unwrap_or_default());
        }
        records = rest;
    }
}

/// `struct file_handle` and what follows it.
fn directory_and_name(record: &[u8]) -> Option<(u64, Option<&[u8]>)> {
    let (length, kind) = (u32_at(record, 0)? as usize, u32_at(record, 4)?);
    let (handle, name) = record.get(8..)?.split_at_checked(length)?;
    let name = name.split(|byte| *byte == 0).next();
    // The directory itself is called "." here.
    let name = name.filter(|name| !matches!(*name, b"" | b"."));
    Some((inode_of(kind, handle)?, name))
}

/// The inode number in a handle (linux/exportfs.h: `enum fid_type`).
fn inode_of(kind: u32, handle: &[u8]) -> Option<u64> {
    match (kind, handle.len()) {
        // FILEID_INO32_GEN
        (0x01, 8) => u32_at(handle, 0).map(Into::into),
        // FILEID_INO64_GEN
        (0x81, 12..) => u64_at(handle, 0),
        // FILEID_BTRFS_WITHOUT_PARENT
        (0x4d, 20) => u64_at(handle, 0),
        _ => None,
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An event as the kernel writes it: of an ext4 directory with this inode, and a name.
    fn event(mask: MaskFlags, ino: u32, name: &[u8]) -> Vec<u8> {
        let mut record = vec![libc::FAN_EVENT_INFO_TYPE_DFID_NAME, 0, 0, 0];
        record.extend([0; 8]);
        record.extend(8u32.to_ne_bytes());
        record.extend(1u32.to_ne_bytes());
        record.extend(ino.to_ne_bytes());
        record.extend(77u32.to_ne_bytes());
        record.extend(name);
        record.resize(record.len().next_multiple_of(4) + 4, 0);
        let length = record.len() as u16;
        record[2..4].copy_from_slice(&length.to_ne_bytes());
        let mut event = (24 + u32::from(length)).to_ne_bytes().to_vec();
        event.extend([3, 0, 24, 0]);
        event.extend(mask.bits().to_ne_bytes());
        event.extend([0xff; 8]);
        event.extend(record);
        event
    }

    fn parsed(events: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        parse(events, &mut |marked| found.push(format!("{marked:?}")));
        found
    }

    #[test]
    fn events_name_their_directory_and_what_is_in_it() {
        let mut events = event(MaskFlags::FAN_CREATE, 12, b"name");
        events.extend(event(MaskFlags::FAN_ATTRIB | MaskFlags::FAN_ONDIR, 13, b"."));
        let mut overflow = event(MaskFlags::FAN_Q_OVERFLOW, 0, b"")[..24].to_vec();
        overflow[0] = 24;
        events.extend(overflow);
        let mut found = Vec::new();
        parse(&events, &mut |marked| match marked {
            Marked::At { directory_ino, name, .. } => {
                found.push((directory_ino, name.map(<[u8]>::to_vec)));
            }
            Marked::Overflow => found.push((0, None)),
        });
        assert_eq!(found, [(12, Some(b"name".to_vec())), (13, None), (0, None)]);
    }

    #[test]
    fn what_is_cut_off_or_nonsense_ends_the_reading() {
        let whole = event(MaskFlags::FAN_CREATE, 12, b"name");
        assert_eq!(parsed(&whole).len(), 1);
        for cut in 0..whole.len() {
            assert!(parsed(&whole[..cut]).is_empty(), "{cut}");
        }
        for at in 0..whole.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut changed = whole.clone();
                changed[at] = value;
                parsed(&changed);
            }
        }
    }

    #[test]
    fn a_file_system_whose_handles_are_not_known_is_not_marked() {
        let dir = std::fs::File::open("/proc").unwrap();
        assert_eq!(Mark::set(dir.as_fd()).err().unwrap().kind(), io::ErrorKind::Unsupported);
    }
}
