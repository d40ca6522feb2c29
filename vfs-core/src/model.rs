//! Ids, names, attributes and versions: the nouns that every module shares.
//!
//! Newtypes keep numbers apart that must not mix. Everything here may arrive
//! from a peer; [`Name::new`] is the only way to make a name, so that a name
//! in hand is always one safe path component.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A device: its Iroh endpoint id, an Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceId(pub [u8; 32]);

/// A location: 64 bits that are its owner's ([`LocationId::belongs_to`]), then 64 random ones,
/// drawn when it is added.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LocationId(pub [u8; 16]);

/// BLAKE3 of all bytes of a file, as `b3sum` prints it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContentId(pub [u8; 32]);

/// The number this device's store gave to a location; never reused, below
/// [`LocationNo::LIMIT`], and different on each device. Own locations and replicas have each
/// a half of the numbers, so that peers cannot use up this device's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct LocationNo(pub u16);

impl LocationNo {
    /// One above the largest number: 14 bits, so that an inode number holds it.
    pub const LIMIT: u16 = 1 << 14;
    /// The first number of own locations; replicas have those below.
    pub const FIRST_OWN: u16 = Self::LIMIT / 2;

    /// Whether it is an own location's.
    pub fn is_own(self) -> bool {
        self.0 >= Self::FIRST_OWN
    }
}

impl LocationId {
    /// A location of this device, told from its others by `random`.
    pub fn new(owner: DeviceId, random: [u8; 8]) -> Self {
        let mut id = [0; 16];
        let (of_owner, rest) = id.split_at_mut(8);
        of_owner.copy_from_slice(&Self::mark(owner));
        rest.copy_from_slice(&random);
        Self(id)
    }

    /// Whether this device may have such a location: no other may announce it.
    pub fn belongs_to(self, owner: DeviceId) -> bool {
        self.0.starts_with(&Self::mark(owner))
    }

    fn mark(owner: DeviceId) -> [u8; 8] {
        let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(&owner.0).as_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

/// A file of one location, stable over renames and restarts; given by the owner.
/// Below 2^40, so that an inode number holds it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct FileId(pub u64);

impl FileId {
    /// The location's own folder.
    pub const ROOT: Self = Self(1);
    /// One above the largest id.
    pub const LIMIT: u64 = 1 << 40;
}

/// The owner's number of a change within one location; grows by one a change, from 1.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Seq(pub u64);

macro_rules! hex_display {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($t))
            }
        }
    )*};
}
hex_display!(DeviceId, LocationId, ContentId);

impl ContentId {
    /// The id of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// From 64 hexadecimal digits, as `b3sum` prints them.
    pub fn from_hex(hex: &str) -> Option<Self> {
        blake3::Hash::from_hex(hex).ok().map(|h| Self(*h.as_bytes()))
    }
}

/// The longest name, in bytes (`NAME_MAX` of every Linux file system).
pub const NAME_MAX: usize = 255;
/// The longest symlink target, in bytes (`PATH_MAX` less the terminator).
pub const TARGET_MAX: usize = 4095;

/// The largest file that may grow as the version that it is: its owner reads all of it to be sure
/// that its bytes are as before. A larger one becomes another version, so a kernel may be given
/// its bytes for good.
pub const MAX_GROWTH_BYTES: u64 = 64 << 20;

/// One path component, as bytes: 1 to 255 of them, no `/`, no NUL, not `.` or `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

impl Name {
    /// The name, or `None` when the bytes are not one.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Option<Self> {
        let bytes = bytes.into();
        Self::is_valid(&bytes).then_some(Self(bytes))
    }

    /// Whether these bytes are a name.
    pub fn is_valid(bytes: &[u8]) -> bool {
        !matches!(bytes, b"" | b"." | b"..")
            && bytes.len() <= NAME_MAX
            && !bytes.iter().any(|b| matches!(b, b'/' | 0))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// For messages: what is not UTF-8 is replaced.
    pub fn display(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<std::ffi::OsStr> for Name {
    fn as_ref(&self) -> &std::ffi::OsStr {
        std::os::unix::ffi::OsStrExt::from_bytes(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.display())
    }
}

impl Serialize for Name {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = <Box<[u8]>>::deserialize(d)?;
        Self::new(bytes).ok_or_else(|| serde::de::Error::custom("not a file name"))
    }
}

/// What an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum FileType {
    /// A regular file, the only type whose bytes are ever read remotely.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO: listed, never opened remotely.
    Fifo,
    /// A socket: listed, never opened remotely.
    Socket,
    /// A character device: listed, never opened remotely.
    CharDevice,
    /// A block device: listed, never opened remotely.
    BlockDevice,
}

/// Seconds since 1970 (may be negative) and nanoseconds below 10^9, as `struct timespec`.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub secs: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

impl Time {
    /// The wall clock now.
    pub fn now() -> Self {
        Self::from(std::time::SystemTime::now())
    }
}

impl From<std::time::SystemTime> for Time {
    fn from(t: std::time::SystemTime) -> Self {
        match t.duration_since(std::time::UNIX_EPOCH) {
            Ok(d) => Self { secs: d.as_secs() as i64, nanos: d.subsec_nanos() },
            Err(e) => {
                let before = e.duration();
                let (secs, nanos) = (-(before.as_secs() as i64), before.subsec_nanos());
                match nanos {
                    0 => Self { secs, nanos },
                    n => Self { secs: secs - 1, nanos: 1_000_000_000 - n },
                }
            }
        }
    }
}

/// `stat` data of an entry, as the owner's kernel gives it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Attr {
    /// What it is.
    pub file_type: FileType,
    /// Permission, set-id and sticky bits: `mode & 0o7777`.
    pub perm: u16,
    /// The owner's numeric user id.
    pub uid: u32,
    /// The owner's numeric group id.
    pub gid: u32,
    /// Number of hard links.
    pub nlink: u32,
    /// Bytes; for a symlink the length of its target.
    pub size: u64,
    /// 512-byte blocks on the owner's disk.
    pub blocks: u64,
    /// Last change of the bytes.
    pub mtime: Time,
    /// Last change of bytes or attributes.
    pub ctime: Time,
    /// Birth, where the owner's file system knows it.
    pub btime: Option<Time>,
    /// Device number of a device file, 0 otherwise.
    pub rdev: u64,
}

/// The owner's stamp of a file's bytes: what tells two versions apart before they are hashed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Stamp {
    /// `st_ino` on the owner's disk.
    pub disk_ino: u64,
    /// Bytes.
    pub size: u64,
    /// Last change of the bytes.
    pub mtime: Time,
    /// Last change of bytes or attributes.
    pub ctime: Time,
}

/// One row of the index: a name in a directory and what it refers to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Stable id; two names of one file (hard links) share it.
    pub file_id: FileId,
    /// `st_ino` on the owner's disk.
    pub disk_ino: u64,
    /// Grows with every new version of the bytes, unless they surely are those of the one before
    /// and some more: then the file is larger than it was, and its content is known.
    pub generation: u32,
    /// `stat` data.
    pub attr: Attr,
    /// Of a regular file, once hashed.
    pub content: Option<ContentId>,
    /// Of a symlink: its target, 1 to [`TARGET_MAX`] bytes without NUL.
    pub target: Option<Box<[u8]>>,
}

impl Entry {
    /// The stamp of the entry's bytes.
    pub fn stamp(&self) -> Stamp {
        let Attr { size, mtime, ctime, .. } = self.attr;
        Stamp { disk_ino: self.disk_ino, size, mtime, ctime }
    }

    /// Whether its bytes are known to be this content.
    pub fn has(&self, content: ContentId, size: u64) -> bool {
        self.content == Some(content) && self.attr.size == size
    }

    /// Whether its bytes are those of an earlier row of the same file, and more.
    pub fn is_grown(&self, before: &Self) -> bool {
        let is_same = (self.file_id, self.disk_ino) == (before.file_id, before.disk_ino);
        is_same
            && self.generation == before.generation
            && self.content.is_some()
            && self.attr.size > before.attr.size
    }

    /// Whether a row from a peer keeps every bound that this crate relies on.
    pub fn is_valid(&self) -> bool {
        // A kernel ends a target at a NUL, so its text would not be what this device judged.
        let is_target = |t: &[u8]| (1..=TARGET_MAX).contains(&t.len()) && !t.contains(&0);
        (1..FileId::LIMIT).contains(&self.file_id.0)
            && self.attr.perm & !0o7777 == 0
            && self.attr.mtime.nanos < 1_000_000_000
            && self.attr.ctime.nanos < 1_000_000_000
            && self.attr.btime.is_none_or(|t| t.nanos < 1_000_000_000)
            && i64::try_from(self.attr.size).is_ok()
            && self.target.as_deref().is_none_or(is_target)
            && (self.target.is_some() == (self.attr.file_type == FileType::Symlink))
            && (self.content.is_none() || self.attr.file_type == FileType::File)
    }
}

/// A folder of one device that the library may see.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Location {
    /// This device's number for it.
    pub no: LocationNo,
    /// The same on every device.
    pub id: LocationId,
    /// The device whose disk it is on.
    pub owner: DeviceId,
    /// Unique among the owner's locations; a directory name in the mount.
    pub name: String,
    /// The folder, when this device is the owner.
    pub root: Option<std::path::PathBuf>,
    /// Nobody may write to it through the drive, its owner included.
    pub read_only: bool,
    /// The devices that may see it; `None` is all members.
    pub shared_with: Option<Vec<DeviceId>>,
}

impl Location {
    /// Whether its owner lets another device see it.
    pub fn is_shared_with(&self, device: DeviceId) -> bool {
        includes(&self.shared_with, device)
    }
}

/// Whether a device is among those that may see a location; `None` is all members.
pub(crate) fn includes(shared_with: &Option<Vec<DeviceId>>, device: DeviceId) -> bool {
    shared_with.as_ref().is_none_or(|with| with.contains(&device))
}
