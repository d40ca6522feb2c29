//! The disk as the journal sees it: a directory of files with fixed sizes.
//!
//! A seam, because what a journal promises is about failures: the suite puts a disk behind it
//! that loses or tears what was not synced.

use rustix::fs::{FallocateFlags, FlockOperation, IFlags, OFlags};
use rustix::io::Errno;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory of log files.
pub(super) trait LogDisk: Debug + Send + Sync {
    /// The names in it.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes a file of so many zeros, all of which have their place on the disk; or none.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn LogFile>>;
    /// Opens a file.
    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>>;
    /// Renames a file; the new name is free.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Keeps bytes that mean nothing any more, for a person to look at; gives where.
    fn set_aside(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf>;
    /// Another value after each start of the machine.
    fn boot(&self) -> [u8; 16];
}

/// An open log file.
pub(super) trait LogFile: Debug + Send + Sync {
    /// Its bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills the buffer.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all bytes, within its size.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the operating system, locked against other processes.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    handle: File,
    boot: [u8; 16],
    _lock: File,
}

impl Directory {
    /// Opens a directory, which is made if need be; [`io::ErrorKind::WouldBlock`] when another
    /// process has it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        let handle = File::open(path)?;
        let lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.join("lock"))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        overwrite_in_place(&handle);
        Ok(Self { path: path.to_owned(), handle, boot: boot_id(), _lock: lock })
    }
}

/// Where a file system copies on write (btrfs), files made here are written in place instead:
/// their records have checksums of their own, and an overwrite then never needs new space.
/// Elsewhere this means nothing and may fail.
fn overwrite_in_place(directory: &File) {
    if let Ok(flags) = rustix::fs::ioctl_getflags(directory) {
        let _ = rustix::fs::ioctl_setflags(directory, flags | IFlags::NOCOW);
    }
}

fn boot_id() -> [u8; 16] {
    let text = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(&text).as_bytes()[..16]);
    id
}

impl LogDisk for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?.map(|e| Ok(e?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn LogFile>> {
        let path = self.path.join(name);
        let open = rustix::fs::open(
            &path,
            OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC,
            0o600.into(),
        );
        let file = File::from(open?);
        let zeroed = allocate(&file, bytes).and_then(|()| write_zeros(&file, bytes));
        if let Err(e) = zeroed {
            let _ = fs::remove_file(&path);
            return Err(e);
        }
        Ok(Arc::new(file))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(File::options().read(true).write(true).open(self.path.join(name))?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    fn set_aside(&self, name: &str, bytes: &[u8]) -> io::Result<PathBuf> {
        let path = self.path.join("damaged").join(name);
        fs::create_dir_all(self.path.join("damaged"))?;
        fs::write(&path, bytes)?;
        Ok(path)
    }

    fn boot(&self) -> [u8; 16] {
        self.boot
    }
}

/// Fails before anything is written when the disk has not enough space.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Writes the zeros: space that is only allocated still changes its state at the first write,
/// which makes each sync of it a commit of the file system's own journal, twice as slow.
fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let mut at = 0;
    while at < bytes {
        let part = zeros.len().min((bytes - at) as usize);
        file.write_all_at(&zeros[..part], at)?;
        at += part as u64;
    }
    file.sync_all()
}

impl LogFile for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
