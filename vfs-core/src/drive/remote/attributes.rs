//! Changes of attributes in other devices' locations.

use super::{Remote, RemoteFile};
use crate::drive::inode::RemoteIno;
use crate::drive::types::{Found, OpenFlags, SetAttr, TimeOrNow, XattrMode};
use crate::error::{FsError, FsResult, Kind};
use crate::model::Time;
use crate::outbox::Attributes;

const WRITE: OpenFlags = OpenFlags { read: false, write: true, ..OpenFlags::READ };

impl Remote {
    pub fn setattr(
        &self,
        ino: RemoteIno,
        open: Option<&RemoteFile>,
        set: &SetAttr,
    ) -> FsResult<Option<Found>> {
        self.check_writable(ino.location)?;
        self.check_owner(set)?;
        if let Some(size) = set.size {
            self.set_size(ino, open, size)?;
        }
        let at = |time| match time {
            TimeOrNow::Now => Time::now(),
            TimeOrNow::At(time) => time,
        };
        let SetAttr { perm, atime, mtime, .. } = *set;
        let (atime, mtime) = (atime.map(at), mtime.map(at));
        // What was deleted while it was open has nobody to tell.
        let is_there = self.node(ino).is_ok();
        let attributes = Attributes { perm, uid: None, gid: None, atime, mtime };
        if is_there || open.is_none() {
            self.node(ino)?;
            self.outbox.set_attributes(ino.location, ino.file, attributes)?;
        }
        self.getattr(ino, open)
    }

    /// Everything is shown as the mounting user's, and stays so.
    fn check_owner(&self, set: &SetAttr) -> FsResult<()> {
        let is_same = |new: Option<u32>, shown| new.is_none_or(|n| n == shown || n == u32::MAX);
        match is_same(set.uid, self.uid) && is_same(set.gid, self.gid) {
            true => Ok(()),
            false => Err(FsError::new(Kind::NotPermitted, "give away another device's file")),
        }
    }

    fn set_size(&self, ino: RemoteIno, open: Option<&RemoteFile>, size: u64) -> FsResult<()> {
        if let Some(open) = open {
            return open.set_size(&self.outbox, size);
        }
        let (file, _) = self.open(ino, WRITE)?;
        let is_set = file.set_size(&self.outbox, size);
        // Commits, unless a program writes the file: then its close does.
        self.release(&file);
        is_set
    }

    /// A value that was set here; `None`: nothing is known of this name.
    pub fn xattr(&self, ino: RemoteIno, name: &[u8]) -> Option<FsResult<Vec<u8>>> {
        let value = self.outbox.view().xattr(ino.location, ino.file, name)?;
        let missing = || FsError::new(Kind::NoAttribute, "getxattr");
        Some(value.map(Vec::from).ok_or_else(missing))
    }

    /// Names that were set here, each ended by a NUL.
    pub fn xattrs(&self, ino: RemoteIno) -> Vec<u8> {
        let all = self.outbox.view().xattrs(ino.location, ino.file);
        let set = all.into_iter().filter(|(_, is_set)| *is_set);
        set.flat_map(|(name, _)| name.into_iter().chain([0])).collect()
    }

    pub fn set_xattr(
        &self,
        ino: RemoteIno,
        name: &[u8],
        value: &[u8],
        mode: XattrMode,
    ) -> FsResult<()> {
        self.check_writable(ino.location)?;
        let is_known = matches!(self.xattr(ino, name), Some(Ok(_)));
        match mode {
            XattrMode::Create if is_known => {
                return Err(FsError::new(Kind::Exists, "create an attribute"));
            }
            XattrMode::Replace if !is_known => {
                return Err(FsError::new(Kind::NoAttribute, "replace an attribute"));
            }
            _ => {}
        }
        self.outbox.set_xattr(ino.location, ino.file, name, Some(value))
    }

    pub fn remove_xattr(&self, ino: RemoteIno, name: &[u8]) -> FsResult<()> {
        self.check_writable(ino.location)?;
        if !matches!(self.xattr(ino, name), Some(Ok(_))) {
            return Err(FsError::new(Kind::NoAttribute, "removexattr"));
        }
        self.outbox.set_xattr(ino.location, ino.file, name, None)
    }
}
