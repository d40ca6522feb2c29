//! Failures in POSIX terms.
//!
//! [`Kind`] is what a program sees; [`FsError`] adds what was attempted, on
//! which object, and the cause. Adapters map `Kind` in one exhaustive `match`,
//! so that a new kind does not compile until every mount answers it.

use std::borrow::Cow;
use std::fmt;
use std::io;

/// Result of an operation of the drive.
pub type FsResult<T> = Result<T, FsError>;

/// The POSIX meaning of a failure; named after the condition, not the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `ENOENT`
    NotFound,
    /// `EEXIST`
    Exists,
    /// `ENOTDIR`
    NotADirectory,
    /// `EISDIR`
    IsADirectory,
    /// `ENOTEMPTY`
    NotEmpty,
    /// `EACCES`
    AccessDenied,
    /// `EPERM`
    NotPermitted,
    /// `EROFS`: other devices' locations, and read-only mounts.
    ReadOnly,
    /// `EXDEV`: between locations, or across a mount point beneath one.
    CrossDevice,
    /// `EINVAL`
    Invalid,
    /// `ENAMETOOLONG`
    NameTooLong,
    /// `ELOOP`
    Loop,
    /// `EBADF`
    BadHandle,
    /// `ESTALE`: the pinned version exists nowhere any more.
    Stale,
    /// `EHOSTDOWN`: no holder of the bytes can be reached.
    HostDown,
    /// `EIO`: also bytes that no holder can serve intact.
    Io,
    /// `ENOSPC`
    NoSpace,
    /// `EDQUOT`
    QuotaExceeded,
    /// `EFBIG`
    FileTooLarge,
    /// `EMFILE` and `ENFILE`
    TooManyOpenFiles,
    /// `EMLINK`
    TooManyLinks,
    /// `EBUSY`
    Busy,
    /// `ETXTBSY`
    TextBusy,
    /// `ENXIO`: `SEEK_DATA`/`SEEK_HOLE` past the end; a FIFO without reader.
    NoSuchAddress,
    /// `ENODATA`: no such extended attribute.
    NoAttribute,
    /// `ERANGE`: the caller's buffer is too small.
    Range,
    /// `EOPNOTSUPP`
    NotSupported,
    /// `ENOSYS`
    NotImplemented,
    /// `EINTR`
    Interrupted,
    /// `EAGAIN`
    WouldBlock,
    /// `ENOLCK`: as many locks as there may be.
    NoLocks,
    /// `ENOMEM`
    OutOfMemory,
    /// `EOVERFLOW`
    Overflow,
}

/// A failed operation: what was attempted, the POSIX kind, the cause.
#[derive(Debug)]
pub struct FsError {
    kind: Kind,
    attempted: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl FsError {
    /// A failure without a deeper cause.
    pub fn new(kind: Kind, attempted: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, attempted: attempted.into(), source: None }
    }

    /// A failure caused by another error.
    pub fn caused(
        kind: Kind,
        attempted: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, attempted: attempted.into(), source: Some(source.into()) }
    }

    /// A failed call of the operating system.
    pub fn os(attempted: impl Into<Cow<'static, str>>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self::caused(Kind::of_os(&source), attempted, source)
    }

    /// What a program sees.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl From<Kind> for FsError {
    fn from(kind: Kind) -> Self {
        Self::new(kind, "")
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.attempted.is_empty() {
            write!(f, "{:?}", self.kind)?;
        } else {
            write!(f, "{}: {:?}", self.attempted, self.kind)?;
        }
        match &self.source {
            Some(source) => write!(f, " ({source})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for FsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl Kind {
    /// The kind of an operating system's error; what has no kind of its own is [`Kind::Io`].
    pub fn of_os(error: &io::Error) -> Self {
        use rustix::io::Errno;
        let Some(errno) = Errno::from_io_error(error) else {
            return Self::of_io_kind(error.kind());
        };
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::ISDIR => Self::IsADirectory,
            Errno::NOTEMPTY => Self::NotEmpty,
            Errno::ACCESS => Self::AccessDenied,
            Errno::PERM => Self::NotPermitted,
            Errno::ROFS => Self::ReadOnly,
            Errno::XDEV => Self::CrossDevice,
            Errno::INVAL => Self::Invalid,
            Errno::NAMETOOLONG => Self::NameTooLong,
            Errno::LOOP => Self::Loop,
            Errno::BADF => Self::BadHandle,
            Errno::STALE => Self::Stale,
            Errno::HOSTDOWN => Self::HostDown,
            Errno::NOSPC => Self::NoSpace,
            Errno::DQUOT => Self::QuotaExceeded,
            Errno::FBIG => Self::FileTooLarge,
            Errno::MFILE | Errno::NFILE => Self::TooManyOpenFiles,
            Errno::MLINK => Self::TooManyLinks,
            Errno::BUSY => Self::Busy,
            Errno::TXTBSY => Self::TextBusy,
            Errno::NXIO => Self::NoSuchAddress,
            Errno::NODATA => Self::NoAttribute,
            Errno::RANGE => Self::Range,
            Errno::OPNOTSUPP => Self::NotSupported,
            Errno::NOSYS => Self::NotImplemented,
            Errno::INTR => Self::Interrupted,
            Errno::AGAIN => Self::WouldBlock,
            Errno::NOLCK => Self::NoLocks,
            Errno::NOMEM => Self::OutOfMemory,
            Errno::OVERFLOW => Self::Overflow,
            _ => Self::Io,
        }
    }

    fn of_io_kind(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::AccessDenied,
            io::ErrorKind::StorageFull => Self::NoSpace,
            io::ErrorKind::InvalidInput => Self::Invalid,
            _ => Self::Io,
        }
    }
}
