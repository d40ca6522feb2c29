//! Extended attributes of what is not on this disk: `user.spacedrive.*`.
//!
//! The owner's own attributes are not replicated. Linux lets nobody read
//! `user.*` of symbolic links and special files, so those have none.

use crate::error::{FsError, FsResult, Kind};
use crate::model::{Entry, FileType};

/// The name of the device.
pub(super) const DEVICE: &str = "user.spacedrive.device";
/// The name of the location.
pub(super) const LOCATION: &str = "user.spacedrive.location";
/// BLAKE3 of the bytes in hexadecimal; absent until the owner has hashed them.
pub(super) const CONTENT: &str = "user.spacedrive.content";
/// Whether the bytes are here: `cached`, `partial` or `remote`.
pub(super) const STATE: &str = "user.spacedrive.state";

/// Attributes as names and values; few, so a list.
#[derive(Debug, Default)]
pub(super) struct Attributes(Vec<(&'static str, String)>);

impl Attributes {
    pub fn of_device(device: String) -> Self {
        Self(vec![(DEVICE, device)])
    }

    pub fn of_entry(
        entry: Option<&Entry>,
        (device, location): (String, String),
        state: impl FnOnce(&Entry) -> &'static str,
    ) -> Self {
        let file_type = entry.map_or(FileType::Directory, |e| e.attr.file_type);
        if !matches!(file_type, FileType::File | FileType::Directory) {
            return Self::default();
        }
        let mut all = vec![(DEVICE, device), (LOCATION, location)];
        if let Some(entry) = entry.filter(|_| file_type == FileType::File) {
            all.extend(entry.content.map(|c| (CONTENT, c.to_string())));
            all.push((STATE, state(entry).to_owned()));
        }
        Self(all)
    }

    pub fn get(self, name: &[u8]) -> FsResult<Vec<u8>> {
        let found = self.0.into_iter().find(|(n, _)| n.as_bytes() == name);
        found
            .map(|(_, value)| value.into_bytes())
            .ok_or_else(|| FsError::new(Kind::NoAttribute, "getxattr"))
    }

    pub fn list(self) -> Vec<u8> {
        self.0.iter().flat_map(|(name, _)| name.bytes().chain([0])).collect()
    }
}
