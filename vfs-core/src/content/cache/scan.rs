//! What lies in the cache's directory at the start.

use super::rows::Row;
use super::{Form, Key, kept_bytes};
use crate::model::ContentId;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A file found at start.
pub(super) struct Found {
    pub key: Key,
    pub row: Row,
    pub used: SystemTime,
}

pub(super) fn scan_directory(
    directory: &Path,
    form: Form,
    key: &dyn Fn(ContentId) -> Key,
    found: &mut Vec<Found>,
) -> io::Result<()> {
    for file in fs::read_dir(directory)? {
        let file = file?;
        let name = file.file_name();
        let name = name.to_str().unwrap_or_default();
        let metadata = file.metadata()?;
        let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
        let form = match (extension, form) {
            ("", form) => form,
            // Its map is looked for when it is opened.
            ("part", Form::Whole) => Form::Part,
            ("map", Form::Whole) if file.path().with_extension("part").exists() => continue,
            _ => {
                fs::remove_file(file.path())?;
                continue;
            }
        };
        let Some(id) = ContentId::from_hex(stem) else { continue };
        let bytes = match form {
            Form::Part => metadata.blocks() * 512,
            _ => kept_bytes(metadata.len()),
        };
        found.push(Found {
            key: key(id),
            row: Row { bytes, form, round: 0 },
            used: metadata.modified()?,
        });
    }
    Ok(())
}

pub(super) fn subdirectories(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Which key a file of this directory of the cache belongs to, by its name.
pub(super) fn key_of(class: &str, name: &str) -> Option<Key> {
    let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
    let id = ContentId::from_hex(stem).filter(|_| matches!(extension, "" | "part" | "map"))?;
    match class {
        "stamped" => Some(Key::Stamped(id.0)),
        "content" => Some(Key::Content(id)),
        _ => class.strip_prefix("suspect-").map(|_| Key::Content(id)),
    }
}
