//! Changes of attributes.

use super::record::content_mut;
use super::{NewOp, Outbox, State};
use crate::error::{FsError, FsResult, Kind};
use crate::model::{FileId, FileType, LocationNo, NAME_MAX, Time};
use crate::ops::{Change, XATTR_MAX_BYTES};
use std::sync::Arc;

/// Attributes to set; `None` stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Attributes {
    pub perm: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<Time>,
    pub mtime: Option<Time>,
}

impl Outbox {
    /// Sets attributes of anything but a symbolic link's permissions.
    pub(crate) fn set_attributes(
        &self,
        no: LocationNo,
        file: FileId,
        set: Attributes,
    ) -> FsResult<()> {
        if set == Attributes::default() {
            return Ok(());
        }
        let location = self.writable(no)?;
        let mut state = self.state();
        let file = self.now(no, file);
        let node = self.view().node(no, file)?;
        let node = node.ok_or_else(|| FsError::new(Kind::Stale, "change a file that is gone"))?;
        if set.perm.is_some() && node.entry.attr.file_type == FileType::Symlink {
            return Err(FsError::new(Kind::NotSupported, "change the mode of a symbolic link"));
        }
        if self.joined(&mut state, location.id, file, &set)? {
            return Ok(());
        }
        let path = self.view().path(no, file)?.unwrap_or_default();
        let Attributes { perm, uid, gid, atime, mtime } = set;
        let base = self.base_of(&state, no, location.id, &node.entry);
        let change = Change::SetAttr { file, base, perm, uid, gid, atime, mtime };
        let is_file = node.entry.attr.file_type == FileType::File;
        let op = NewOp {
            location,
            change,
            is_directory: false,
            path,
            bytes: None,
            is_held: false,
            generation: is_file.then_some(node.entry.generation),
        };
        self.accept(&mut state, op)?;
        Ok(())
    }

    /// What was made here and not sent yet is made with these attributes from the beginning.
    fn joined(
        &self,
        state: &mut State,
        location: crate::model::LocationId,
        file: FileId,
        set: &Attributes,
    ) -> FsResult<bool> {
        let Attributes { perm, mtime: new_mtime, uid: None, gid: None, atime: None } = *set else {
            return Ok(false);
        };
        let Some(no) = state.order.last_change(location, file) else { return Ok(false) };
        let Some(op) = state.ops.get(&no) else { return Ok(false) };
        if !op.is_here_only() || state.order.is_needed(no) {
            return Ok(false);
        }
        let mut record = op.record.clone();
        match &mut record.change {
            Change::Create { perm: made_perm, mtime, file: made, .. } if *made == file => {
                *made_perm = perm.unwrap_or(*made_perm);
                *mtime = new_mtime.unwrap_or(*mtime);
            }
            Change::Write { .. } if perm.is_none() => {}
            _ => return Ok(false),
        }
        if let (Some(content), Some(mtime)) = (content_mut(&mut record.change), new_mtime) {
            content.mtime = mtime;
        }
        let bytes = op.bytes.clone();
        let lsn = self.note_op(state, &record, Vec::new())?;
        if let (Some(bytes), Some(mtime)) = (&bytes, new_mtime) {
            bytes.shown.live.set_mtime(mtime, Time::now());
        }
        if let Some(place) = self.index.location_by_id(location) {
            self.show(place.no, &record, bytes.as_ref());
        }
        if let Some(op) = state.ops.get_mut(&no) {
            (op.record, op.lsn) = (record, lsn);
        }
        Ok(true)
    }

    /// Sets an extended attribute of the `user.` namespace, or removes it.
    pub(crate) fn set_xattr(
        &self,
        no: LocationNo,
        file: FileId,
        name: &[u8],
        value: Option<&[u8]>,
    ) -> FsResult<()> {
        if !name.starts_with(b"user.") || name.starts_with(b"user.spacedrive.") {
            return Err(FsError::new(Kind::NotSupported, "set an attribute that is not user.*"));
        }
        if name.len() > NAME_MAX || value.is_some_and(|v| v.len() > XATTR_MAX_BYTES) {
            return Err(FsError::new(Kind::Range, "set an attribute this long"));
        }
        let location = self.writable(no)?;
        let mut state = self.state();
        let path = self.view().path(no, file)?;
        let path = path.ok_or_else(|| FsError::new(Kind::Stale, "change a file that is gone"))?;
        let change = Change::Xattr { file, name: name.into(), value: value.map(Into::into) };
        let op = NewOp {
            location: Arc::clone(&location),
            change,
            is_directory: false,
            path,
            bytes: None,
            is_held: false,
            generation: None,
        };
        self.accept(&mut state, op)?;
        Ok(())
    }
}
