//! The drive's words in the kernel's: attributes, times, errors, flags.

use fuser::{Errno, FileAttr, INodeNo};
use rustix::fs::{FallocateFlags, OFlags, XattrFlags};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use vfs_core::drive::{
    FallocateMode, Found, InodeNo, OpenFlags, RenameFlags, TimeOrNow, Whence, XattrMode,
};
use vfs_core::error::{FsError, Kind};
use vfs_core::model::{FileType, Time};

/// What `st_blksize` says of a directory, in bytes: glibc asks for as much of a listing at once, and
/// from Linux 6.16 on so does the kernel (before, one page). The kernel asks for attributes with the
/// first part of a listing only, and for those of each further name when a program wants them. So
/// the first part holds more than a thousand names, and not so many that a program waits long for
/// the first of a million.
const LISTED_AT_ONCE: u32 = 256 << 10;

/// What a program sees of a failure. A kind that the kernel's callers do not expect of the
/// operation is traced, with its cause.
pub(crate) fn errno(operation: &'static str, error: &FsError) -> Errno {
    match error.kind() {
        Kind::Io | Kind::OutOfMemory | Kind::TooManyOpenFiles | Kind::Overflow | Kind::NoSpace => {
            tracing::warn!(operation, error = error as &dyn std::error::Error, "failed");
        }
        Kind::HostDown | Kind::Stale => tracing::info!(operation, %error, "failed"),
        _ => tracing::trace!(operation, %error, "refused"),
    }
    errno_of(error.kind())
}

fn errno_of(kind: Kind) -> Errno {
    match kind {
        Kind::NotFound => Errno::ENOENT,
        Kind::Exists => Errno::EEXIST,
        Kind::NotADirectory => Errno::ENOTDIR,
        Kind::IsADirectory => Errno::EISDIR,
        Kind::NotEmpty => Errno::ENOTEMPTY,
        Kind::AccessDenied => Errno::EACCES,
        Kind::NotPermitted => Errno::EPERM,
        Kind::ReadOnly => Errno::EROFS,
        Kind::CrossDevice => Errno::EXDEV,
        Kind::Invalid => Errno::EINVAL,
        Kind::NameTooLong => Errno::ENAMETOOLONG,
        Kind::Loop => Errno::ELOOP,
        Kind::BadHandle => Errno::EBADF,
        Kind::Stale => Errno::ESTALE,
        Kind::HostDown => Errno::EHOSTDOWN,
        Kind::Io => Errno::EIO,
        Kind::NoSpace => Errno::ENOSPC,
        Kind::QuotaExceeded => Errno::EDQUOT,
        Kind::FileTooLarge => Errno::EFBIG,
        Kind::TooManyOpenFiles => Errno::EMFILE,
        Kind::TooManyLinks => Errno::EMLINK,
        Kind::Busy => Errno::EBUSY,
        Kind::TextBusy => Errno::ETXTBSY,
        Kind::NoSuchAddress => Errno::ENXIO,
        Kind::NoAttribute => Errno::ENODATA,
        Kind::Range => Errno::ERANGE,
        Kind::NotSupported => Errno::EOPNOTSUPP,
        // ENOSYS makes the kernel never ask again, for the life of the mount; only the
        // adapter itself may decide that.
        Kind::NotImplemented => Errno::EOPNOTSUPP,
        Kind::Interrupted => Errno::EINTR,
        Kind::WouldBlock => Errno::EAGAIN,
        Kind::NoLocks => Errno::ENOLCK,
        Kind::OutOfMemory => Errno::ENOMEM,
        Kind::Overflow => Errno::EOVERFLOW,
    }
}

pub(crate) fn file_type(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::File => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Socket => fuser::FileType::Socket,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
    }
}

/// The attributes of a file, under its number.
pub(crate) fn attr(found: &Found) -> FileAttr {
    let attr = &found.attr;
    FileAttr {
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(found.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        perm: attr.perm,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: kernel_rdev(attr.rdev),
        ..bare(found.ino, attr.file_type)
    }
}

/// Number and type, and nothing else.
pub(crate) fn bare(ino: InodeNo, file_type_of_it: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino.0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(file_type_of_it),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: if file_type_of_it == FileType::Directory { LISTED_AT_ONCE } else { 4096 },
        flags: 0,
    }
}

/// What a lookup answers for a name that does not exist: inode 0, for the kernel to remember.
pub(crate) fn negative() -> FileAttr {
    bare(InodeNo(0), FileType::File)
}

/// A time out of the range of [`SystemTime`], which only a broken peer sends, is 1970.
fn system_time(time: Time) -> SystemTime {
    let whole = match u64::try_from(time.secs) {
        Ok(secs) => UNIX_EPOCH.checked_add(Duration::from_secs(secs)),
        Err(_) => UNIX_EPOCH.checked_sub(Duration::from_secs(time.secs.unsigned_abs())),
    };
    whole.and_then(|t| t.checked_add(Duration::from_nanos(time.nanos.into()))).unwrap_or(UNIX_EPOCH)
}

/// A time as the kernel sent it.
///
/// `fuser` 0.18 turns the kernel's `(-2 s, 800 ms)` into 2.8 s before 1970, where 1.2 s is
/// meant; so what it gives before 1970 is taken apart as it was put together.
fn time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time { secs: after.as_secs() as i64, nanos: after.subsec_nanos() },
        Err(error) => {
            let before = error.duration();
            Time {
                secs: 0i64.saturating_sub_unsigned(before.as_secs()),
                nanos: before.subsec_nanos(),
            }
        }
    }
}

/// A device number as `stat` has it, in the 32 bits that FUSE carries
/// (`new_encode_dev` of the kernel: 12 bits of major, 20 of minor).
fn kernel_rdev(dev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

/// The reverse of [`kernel_rdev`].
pub(crate) fn stat_rdev(dev: u32) -> u64 {
    rustix::fs::makedev((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

/// Permission, set-id and sticky bits of a mode.
pub(crate) fn perm(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

/// The type that `mknod` is asked for; `None` for what it cannot make.
pub(crate) fn type_of_mode(mode: u32) -> Option<FileType> {
    match rustix::fs::FileType::from_raw_mode(mode) {
        rustix::fs::FileType::RegularFile => Some(FileType::File),
        rustix::fs::FileType::Fifo => Some(FileType::Fifo),
        rustix::fs::FileType::Socket => Some(FileType::Socket),
        rustix::fs::FileType::CharacterDevice => Some(FileType::CharDevice),
        rustix::fs::FileType::BlockDevice => Some(FileType::BlockDevice),
        _ => None,
    }
}

/// `open(2)` flags; what concerns only the kernel is left out.
pub(crate) fn open_flags(flags: i32) -> OpenFlags {
    // <asm-generic/fcntl.h>; `OFlags` takes O_DSYNC for O_SYNC, which includes it.
    const O_DSYNC: u32 = 0o10_000;
    const O_SYNC: u32 = 0o4_010_000;
    let bits = flags as u32;
    let flags = OFlags::from_bits_retain(bits);
    let access = flags & OFlags::RWMODE;
    OpenFlags {
        read: access != OFlags::WRONLY,
        write: access != OFlags::RDONLY,
        append: flags.contains(OFlags::APPEND),
        truncate: flags.contains(OFlags::TRUNC),
        exclusive: flags.contains(OFlags::EXCL),
        direct: flags.contains(OFlags::DIRECT),
        sync: bits & O_SYNC == O_SYNC,
        data_sync: bits & O_DSYNC != 0,
    }
}

/// `None` for what no drive can do (`RENAME_WHITEOUT`).
pub(crate) fn rename_flags(flags: fuser::RenameFlags) -> Option<RenameFlags> {
    let known = fuser::RenameFlags::RENAME_NOREPLACE | fuser::RenameFlags::RENAME_EXCHANGE;
    known.contains(flags).then(|| RenameFlags {
        no_replace: flags.contains(fuser::RenameFlags::RENAME_NOREPLACE),
        exchange: flags.contains(fuser::RenameFlags::RENAME_EXCHANGE),
    })
}

/// `None` for what is no mode of `setxattr`.
pub(crate) fn xattr_mode(flags: i32) -> Option<XattrMode> {
    match XattrFlags::from_bits_retain(flags as u32) {
        flags if flags.is_empty() => Some(XattrMode::Any),
        XattrFlags::CREATE => Some(XattrMode::Create),
        XattrFlags::REPLACE => Some(XattrMode::Replace),
        _ => None,
    }
}

/// `None` for modes that move other bytes, such as `FALLOC_FL_COLLAPSE_RANGE`.
pub(crate) fn fallocate_mode(mode: i32) -> Option<FallocateMode> {
    let mode = FallocateFlags::from_bits_retain(mode as u32);
    let keep_size = mode.contains(FallocateFlags::KEEP_SIZE);
    match mode - FallocateFlags::KEEP_SIZE {
        rest if rest.is_empty() => Some(FallocateMode::Allocate { keep_size }),
        FallocateFlags::PUNCH_HOLE if keep_size => Some(FallocateMode::PunchHole),
        FallocateFlags::ZERO_RANGE => Some(FallocateMode::ZeroRange { keep_size }),
        _ => None,
    }
}

/// `None` for positions that the kernel computes by itself.
pub(crate) fn whence(whence: i32) -> Option<Whence> {
    // <linux/fs.h>; not named by any crate in use here.
    const SEEK_DATA: i32 = 3;
    const SEEK_HOLE: i32 = 4;
    match whence {
        SEEK_DATA => Some(Whence::Data),
        SEEK_HOLE => Some(Whence::Hole),
        _ => None,
    }
}

/// A time that the kernel asks to set.
pub(crate) fn time_or_now(asked: fuser::TimeOrNow) -> TimeOrNow {
    match asked {
        fuser::TimeOrNow::Now => TimeOrNow::Now,
        fuser::TimeOrNow::SpecificTime(at) => TimeOrNow::At(time(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive() {
        for (major, minor) in [(0, 0), (8, 1), (254, 0), (0xfff, 0xf_ffff), (10, 0x1_2345)] {
            let dev = rustix::fs::makedev(major, minor);
            assert_eq!(stat_rdev(kernel_rdev(dev)), dev, "{major}:{minor}");
        }
    }

    #[test]
    fn times_before_1970_are_told_right() {
        let time = Time { secs: -2, nanos: 800_000_000 };
        assert_eq!(system_time(time), UNIX_EPOCH - Duration::from_millis(1200));
        assert_eq!(system_time(Time { secs: i64::MAX, nanos: 999_999_999 }), {
            UNIX_EPOCH + Duration::new(i64::MAX as u64, 999_999_999)
        });
    }

    #[test]
    fn times_from_the_kernel_are_taken_apart_as_fuser_put_them_together() {
        let sent = |secs: i64, nanos| match u64::try_from(secs) {
            Ok(secs) => UNIX_EPOCH + Duration::new(secs, nanos),
            Err(_) => UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos),
        };
        for (secs, nanos) in [(-2, 800_000_000), (-1, 0), (0, 1), (7, 999_999_999)] {
            assert_eq!(time(sent(secs, nanos)), Time { secs, nanos });
        }
    }

    #[test]
    fn flags_keep_their_meaning() {
        let flags = open_flags((OFlags::RDWR | OFlags::APPEND).bits() as i32 | 0o4_010_000);
        assert!(flags.read && flags.write && flags.append && flags.sync && flags.data_sync);
        assert!(!open_flags(0o10_000).sync && open_flags(0o10_000).data_sync);
        assert_eq!(open_flags(0), OpenFlags::READ);
        assert!(!open_flags(OFlags::WRONLY.bits() as i32).read);
        assert_eq!(rename_flags(fuser::RenameFlags::RENAME_WHITEOUT), None);
        assert_eq!(xattr_mode(3), None);
        assert_eq!(xattr_mode(1), Some(XattrMode::Create));
        assert_eq!(fallocate_mode(3), Some(FallocateMode::PunchHole));
        assert_eq!(fallocate_mode(2), None);
        assert_eq!(fallocate_mode(8), None);
        assert_eq!(whence(2), None);
    }

    #[test]
    fn a_missing_system_call_does_not_silence_the_kernel() {
        assert_eq!(errno_of(Kind::NotImplemented).code(), Errno::EOPNOTSUPP.code());
    }

    #[test]
    fn the_network_is_told_apart_from_the_disk() {
        let down = FsError::new(Kind::HostDown, "read");
        assert_eq!(errno("read", &down).code(), Errno::EHOSTDOWN.code());
    }
}
