//! Why a mount could not be made or taken away.

use crate::mounts::Holder;
use std::io;
use std::path::PathBuf;

/// A failed [`mount`](crate::mount), [`unmount`](crate::Mount::unmount) or [`mend`](crate::mend).
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point does not exist.
    #[error("{path} does not exist", path = .path.display())]
    Missing {
        /// The mount point.
        path: PathBuf,
    },
    /// The mount point is not a directory.
    #[error("{path} is not a directory", path = .path.display())]
    NotADirectory {
        /// The mount point.
        path: PathBuf,
    },
    /// The mount point has entries, which the mount would hide.
    #[error("{path} is not empty", path = .path.display())]
    NotEmpty {
        /// The mount point.
        path: PathBuf,
    },
    /// A drive is mounted there already, and its daemon lives.
    #[error("a drive is already mounted on {path}", path = .path.display())]
    AlreadyMounted {
        /// The mount point.
        path: PathBuf,
    },
    /// A drive is mounted there whose daemon is gone; [`mend`](crate::mend) detaches it.
    #[error("a dead drive is mounted on {path}", path = .path.display())]
    Dead {
        /// The mount point.
        path: PathBuf,
    },
    /// Something else is mounted there, which the drive would hide.
    #[error("{path} is the mount point of another file system ({fs_type})", path = .path.display())]
    Occupied {
        /// The mount point.
        path: PathBuf,
        /// What is mounted, as `tmpfs`.
        fs_type: String,
    },
    /// No drive is mounted there.
    #[error("no drive is mounted on {path}", path = .path.display())]
    NotMounted {
        /// The mount point.
        path: PathBuf,
    },
    /// Processes use the mount.
    #[error("{path} is in use", path = .path.display())]
    Busy {
        /// The mount point.
        path: PathBuf,
        /// The processes that hold it, as far as this user may see them.
        holders: Vec<Holder>,
    },
    /// `/dev/fuse` cannot be opened: the kernel has no FUSE, or the container withholds it.
    #[error("cannot open /dev/fuse")]
    NoFuse {
        /// What the system said.
        source: io::Error,
    },
    /// An ordinary user needs `fusermount3` (Debian: package `fuse3`) and it is not installed.
    #[error("fusermount3 is not installed")]
    NoHelper,
    /// `/etc/fuse.conf` lacks `user_allow_other`.
    #[error("ordinary users may not let others into a mount (user_allow_other in /etc/fuse.conf)")]
    AllowOtherForbidden,
    /// `fusermount3` refused.
    #[error("{message}")]
    Helper {
        /// Its own words.
        message: String,
    },
    /// The system refused.
    #[error("{attempted} {path}", path = .path.display())]
    Os {
        /// What was attempted.
        attempted: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl MountError {
    pub(crate) fn os(
        attempted: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Os { attempted, path: path.into(), source: source.into() }
    }
}
