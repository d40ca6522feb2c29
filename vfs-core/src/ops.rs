//! Changes that one device asks the owner of a location to make: the vocabulary of writing.
//!
//! A writer numbers its operations, keeps them in its journal and sends them in
//! order; the owner applies each once and answers with an [`Outcome`]. Files are
//! named by their id and not by their path, so that an operation still means the
//! same after the owner renamed something. What arrives here comes from a peer:
//! [`Op::is_valid`] holds the bounds that everything else relies on.

use crate::model::{
    ContentId, DeviceId, FileId, LocationId, NAME_MAX, Name, Seq, Stamp, TARGET_MAX, Time,
};
use bytes::Bytes;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// The most bytes that travel and are journaled inside an operation; longer content is staged
/// at the writer and pulled by the owner.
pub const INLINE_MAX_BYTES: u64 = 64 << 10;
/// The most ranges of one change of content.
pub const MAX_EXTENTS: usize = 1 << 20;
/// The longest extended attribute, in bytes (`XATTR_SIZE_MAX` of Linux).
pub const XATTR_MAX_BYTES: usize = 64 << 10;
/// The deepest path that is told along with a change, in names.
pub const MAX_DEPTH: usize = 1024;
/// Ids that writers draw for the files they make have this bit set; owners count below it.
pub const DRAWN_FILE_ID: u64 = 1 << 39;

/// An operation of one writer, for ever: it is applied once, however often it is delivered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct OpId {
    /// Who made it; taken from the connection, never believed from a message.
    pub writer: DeviceId,
    /// Drawn when the writer's journal was made, so that a lost journal repeats no number.
    pub epoch: u64,
    /// Grows by one an operation, from 1.
    pub no: u64,
}

/// The version of a file that a writer saw when it changed it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Base {
    /// As the owner's row had it.
    Seen {
        /// The owner's stamp of its bytes.
        stamp: Stamp,
        /// The id of its bytes, where they were hashed.
        content: Option<ContentId>,
    },
    /// As this writer's own earlier operation left it; the writer does not know the stamp yet.
    After(u64),
}

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Place {
    /// The directory; an id that the writer drew is understood by the owner.
    pub dir: FileId,
    /// The name in it.
    pub name: Name,
}

/// What is made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum New {
    /// A regular file with these bytes.
    File(NewContent),
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Symlink(Box<[u8]>),
    /// A FIFO.
    Fifo,
}

/// New bytes of a file: what of its base stays, and what is written over it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewContent {
    /// Bytes of the file then.
    pub size: u64,
    /// The writer's time of its last change of the bytes.
    pub mtime: Time,
    /// Below this, what no extent covers is the base's; above it zero. 0: nothing stays.
    pub kept_bytes: u64,
    /// Written ranges: in order, disjoint, not empty, none beyond `size`, at most [`MAX_EXTENTS`].
    #[serde(deserialize_with = "bounded::<_, _, MAX_EXTENTS>")]
    pub extents: Vec<Range<u64>>,
    /// BLAKE3 of the extents' bytes, one after the other.
    pub digest: [u8; 32],
    /// The id of all bytes of the file then, when the writer could tell.
    pub whole: Option<ContentId>,
    /// The extents' bytes, one after the other, when they are few ([`INLINE_MAX_BYTES`]).
    pub inline: Option<Bytes>,
}

/// Short, for logs: lengths in place of bytes.
impl fmt::Debug for NewContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewContent")
            .field("size", &self.size)
            .field("mtime", &self.mtime)
            .field("kept_bytes", &self.kept_bytes)
            .field("extents", &self.extents.len())
            .field("written_bytes", &self.written_bytes())
            .field("whole", &self.whole)
            .field("inline_bytes", &self.inline.as_ref().map(Bytes::len))
            .finish_non_exhaustive()
    }
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Change {
    /// Makes something under a name that the writer saw free.
    Create {
        /// Where.
        at: Place,
        /// The id that the writer drew ([`DRAWN_FILE_ID`]); the owner takes it unless it is taken.
        file: FileId,
        /// What.
        what: New,
        /// Permission bits, the writer's umask applied.
        perm: u16,
        /// Last change of its bytes, for what is not a regular file.
        mtime: Time,
    },
    /// New bytes of a regular file.
    Write {
        /// Which.
        file: FileId,
        /// The version that was changed.
        base: Base,
        /// To what.
        content: NewContent,
        /// Where it was for the writer: there it is made again if the owner deleted it.
        #[serde(deserialize_with = "bounded::<_, _, MAX_DEPTH>")]
        path: Vec<Name>,
    },
    /// Another name for a file.
    Link {
        /// Which.
        file: FileId,
        /// The name.
        at: Place,
    },
    /// Another place for a file or directory.
    Rename {
        /// Which.
        file: FileId,
        /// Where it was.
        from: Place,
        /// Where it goes.
        to: Place,
        /// What was there and goes away, or comes to `from` with `exchange`.
        replaced: Option<(FileId, Option<Base>)>,
        /// The two swap places.
        exchange: bool,
    },
    /// Takes a name from anything but a directory.
    Unlink {
        /// Which.
        file: FileId,
        /// The name.
        at: Place,
        /// Of a regular file: the version that the writer saw.
        base: Option<Base>,
    },
    /// Removes an empty directory.
    Rmdir {
        /// Which.
        file: FileId,
        /// Its name.
        at: Place,
    },
    /// Attributes; `None` stays.
    SetAttr {
        /// Of which.
        file: FileId,
        /// Of a regular file: the version that the writer saw. They are set whatever version
        /// there is; the outcome names the version if it still has the bytes of this one.
        base: Option<Base>,
        /// Permission bits.
        perm: Option<u16>,
        /// Owner's numeric user id, as the owner knows it.
        uid: Option<u32>,
        /// Owner's numeric group id.
        gid: Option<u32>,
        /// Last access.
        atime: Option<Time>,
        /// Last change of the bytes.
        mtime: Option<Time>,
    },
    /// Sets an extended attribute, or removes it.
    Xattr {
        /// Of which.
        file: FileId,
        /// Its name, in the `user.` namespace.
        name: Box<[u8]>,
        /// Its value; `None` removes it.
        value: Option<Box<[u8]>>,
    },
}

/// An operation as it travels and as it is applied.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Op {
    /// The number; with the connection's device and the stream's epoch an [`OpId`].
    pub no: u64,
    /// In which location.
    pub location: LocationId,
    /// The location's log as its writer knew it: file ids mean nothing in another.
    pub log_id: u64,
    /// What is asked for.
    pub change: Change,
}

/// What became of an operation.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// It is done, durably; also when there was nothing left to do.
    Applied(Applied),
    /// It was not done, and never will be as it stands; nothing was changed.
    Refused(Refusal),
    /// Not now; the writer asks again.
    Later(Obstacle),
}

/// How it was done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Applied {
    /// The file's id at the owner; another than the one drawn when that was taken, and another
    /// than the one named when a copy was kept or the file was made again.
    pub file: Option<FileId>,
    /// The file's version then.
    pub version: Option<Stamp>,
    /// A replica that has reached this number shows the change.
    pub seq: Seq,
    /// Of the log that `seq` belongs to.
    pub log_id: u64,
    /// It met a change that the writer had not seen.
    pub conflict: Option<Conflict>,
}

/// How a meeting of two changes ended; in no case are bytes lost.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Conflict {
    /// The writer's bytes, directory or link are beside the owner's, under this path.
    KeptAs(#[serde(deserialize_with = "bounded::<_, _, MAX_DEPTH>")] Vec<Name>),
    /// The owner had deleted it; the writer's bytes are there again, under this path.
    MadeAgain(#[serde(deserialize_with = "bounded::<_, _, MAX_DEPTH>")] Vec<Name>),
    /// The owner's change stands and the writer's (a delete, rename or attribute) was not
    /// carried out, for this reason.
    OwnerStands(String),
}

/// Why never.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// The location is read-only, or not shared with the writer.
    ReadOnly,
    /// The user that runs the owner's daemon may not do it.
    Permission,
    /// The owner no longer has the base of a partial change: the whole new content is needed.
    NeedsWhole,
    /// The operation is out of bounds or means nothing.
    Malformed,
    /// Its file system cannot do it, for this reason.
    Impossible(String),
}

/// Why not now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Obstacle {
    /// The owner's disk, or its quota, is full.
    NoSpace,
    /// The location's disk is not there.
    Offline,
    /// Its disk or its daemon failed, for this reason.
    Failed(String),
    /// The writer did not give the bytes.
    NoBytes,
}

impl NewContent {
    /// All bytes written, in order; how many the extents hold.
    pub fn written_bytes(&self) -> u64 {
        self.extents.iter().map(|e| e.end - e.start).sum()
    }

    /// Whether no byte of an earlier version is needed.
    pub fn is_whole(&self) -> bool {
        self.kept_bytes == 0
    }

    fn is_valid(&self) -> bool {
        let in_order = self.extents.windows(2).all(|w| w[0].end <= w[1].start);
        let within = self.extents.iter().all(|e| e.start < e.end && e.end <= self.size);
        i64::try_from(self.size).is_ok()
            && self.kept_bytes <= self.size
            && self.mtime.nanos < 1_000_000_000
            && self.extents.len() <= MAX_EXTENTS
            && in_order
            && within
            && self.inline.as_ref().is_none_or(|b| {
                b.len() as u64 <= INLINE_MAX_BYTES && b.len() as u64 == self.written_bytes()
            })
    }
}

impl Op {
    /// Whether an operation from a peer keeps every bound that this crate relies on.
    pub fn is_valid(&self) -> bool {
        let id = |f: &FileId| (1..FileId::LIMIT).contains(&f.0);
        let place = |p: &Place| id(&p.dir);
        let time = |t: &Time| t.nanos < 1_000_000_000;
        let times = |t: &Option<Time>| t.as_ref().is_none_or(time);
        let bits = |p: u16| p & !0o7777 == 0;
        let valid = match &self.change {
            Change::Create { at, file, what, perm, mtime } => {
                let what = match what {
                    New::File(content) => content.is_valid() && content.is_whole(),
                    New::Symlink(target) => {
                        (1..=TARGET_MAX).contains(&target.len()) && !target.contains(&0)
                    }
                    New::Directory | New::Fifo => true,
                };
                place(at)
                    && id(file)
                    && file.0 & DRAWN_FILE_ID != 0
                    && what
                    && bits(*perm)
                    && time(mtime)
            }
            Change::Write { file, content, path, .. } => {
                id(file) && content.is_valid() && (1..=MAX_DEPTH).contains(&path.len())
            }
            Change::Link { file, at }
            | Change::Unlink { file, at, .. }
            | Change::Rmdir { file, at } => id(file) && place(at),
            Change::Rename { file, from, to, replaced, exchange } => {
                let replaced_id = replaced.as_ref().is_none_or(|(f, _)| id(f) && f != file);
                id(file)
                    && place(from)
                    && place(to)
                    && from != to
                    && replaced_id
                    && (!exchange || replaced.is_some())
            }
            Change::SetAttr { file, perm, atime, mtime, .. } => {
                id(file) && perm.is_none_or(bits) && times(atime) && times(mtime)
            }
            Change::Xattr { file, name, value } => {
                id(file)
                    && name.starts_with(b"user.")
                    && name.len() <= NAME_MAX
                    && !name.contains(&0)
                    && value.as_ref().is_none_or(|v| v.len() <= XATTR_MAX_BYTES)
            }
        };
        self.no > 0 && valid
    }
}

impl Change {
    /// The content that travels along.
    pub fn content(&self) -> Option<&NewContent> {
        match self {
            Self::Create { what: New::File(content), .. } | Self::Write { content, .. } => {
                Some(content)
            }
            _ => None,
        }
    }

    /// The file that it is about.
    pub fn file(&self) -> FileId {
        match self {
            Self::Create { file, .. }
            | Self::Write { file, .. }
            | Self::Link { file, .. }
            | Self::Rename { file, .. }
            | Self::Unlink { file, .. }
            | Self::Rmdir { file, .. }
            | Self::SetAttr { file, .. }
            | Self::Xattr { file, .. } => *file,
        }
    }
}

/// For `deserialize_with`: a `Vec` that ends in an error, not in memory, when there are more
/// than `MAX` elements.
pub fn bounded<'de, D, T, const MAX: usize>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Elements<T, const MAX: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Elements<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            // No allocation ahead: the count is the sender's claim.
            let mut all = Vec::new();
            while let Some(element) = seq.next_element()? {
                if all.len() == MAX {
                    return Err(A::Error::custom("too many elements"));
                }
                all.push(element);
            }
            Ok(all)
        }
    }
    from.deserialize_seq(Elements::<T, MAX>(PhantomData))
}
