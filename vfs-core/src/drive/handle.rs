//! Open files and directories.

use super::readdir::OpenDir;
use super::remote::RemoteFile;
use super::types::{HandleId, OpenFlags};
use crate::error::{FsError, FsResult, Kind};
use dashmap::DashMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open file of an own location.
#[derive(Debug)]
pub(super) struct OwnFile {
    pub file: Arc<File>,
    pub flags: OpenFlags,
    /// Closing it may tell that its disk refused bytes.
    pub reports_at_close: bool,
}

impl OwnFile {
    /// Whether each close of a descriptor is to be passed on to the disk's file system.
    pub fn is_flushed(&self) -> bool {
        self.reports_at_close && self.flags.may_change()
    }

    /// Does what closing one of several descriptors does, and says what that says.
    pub fn flush(&self) -> FsResult<()> {
        let descriptor = self.file.try_clone().map_err(|e| FsError::os("duplicate a handle", e))?;
        // Dropped, it would be closed as well, and the error be lost.
        nix::unistd::close(descriptor)
            .map_err(|e| FsError::os("close", std::io::Error::from_raw_os_error(e as i32)))
    }
}

/// What a handle stands for.
pub(super) enum Handle {
    Own(OwnFile),
    Remote(RemoteFile),
    Dir(OpenDir),
}

/// Every open file and directory.
#[derive(Default)]
pub(super) struct Handles {
    open: DashMap<HandleId, Arc<Handle>>,
    last: AtomicU64,
}

impl Handles {
    pub fn add(&self, handle: Handle) -> HandleId {
        let id = HandleId(self.last.fetch_add(1, Ordering::Relaxed) + 1);
        self.open.insert(id, Arc::new(handle));
        id
    }

    pub fn get(&self, id: HandleId) -> FsResult<Arc<Handle>> {
        let handle = self.open.get(&id).map(|h| Arc::clone(&h));
        handle.ok_or_else(|| FsError::new(Kind::BadHandle, "use a handle that is not open"))
    }

    pub fn remove(&self, id: HandleId) -> Option<Arc<Handle>> {
        self.open.remove(&id).map(|(_, handle)| handle)
    }
}

impl Handle {
    /// An own file.
    pub fn own(&self) -> FsResult<&OwnFile> {
        match self {
            Self::Own(file) => Ok(file),
            Self::Remote(_) => Err(FsError::new(Kind::BadHandle, "change a file open for reading")),
            Self::Dir(_) => Err(is_a_directory()),
        }
    }

    pub fn dir(&self) -> FsResult<&OpenDir> {
        match self {
            Self::Dir(dir) => Ok(dir),
            _ => Err(FsError::new(Kind::NotADirectory, "list a file")),
        }
    }
}

pub(super) fn is_a_directory() -> FsError {
    FsError::new(Kind::IsADirectory, "use a directory as a file")
}
