//! Paths as people type them, compared with mounts and locations as text.
//!
//! A path below a mount whose daemon is frozen would block whoever asks the
//! file system about it, so such questions are asked by the command, never by
//! the daemon, and only after the mount table was read.

use crate::control::{Target, WirePath};
use crate::failure::{Code, Failure, Outcome};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Absolute, with `.` and `..` taken away by text alone.
pub fn absolute(path: &Path) -> Outcome<PathBuf> {
    let absolute = std::path::absolute(path)
        .map_err(|e| Failure::io(format!("cannot use {}", path.display()), e))?;
    let mut plain = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    Ok(plain)
}

/// Absolute, with the symlinks of its parent resolved and the last component as it is.
pub fn spelled(path: &Path) -> Outcome<PathBuf> {
    let plain = absolute(path)?;
    if drive_around(&plain).is_some() {
        return Ok(plain);
    }
    Ok(match (plain.parent().map(fs::canonicalize), plain.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => plain,
    })
}

/// The mount of a drive, of whatever daemon, in which this path is.
pub fn drive_around(path: &Path) -> Option<PathBuf> {
    mount_fuse::mounts().into_iter().map(|m| m.mountpoint).find(|m| path.starts_with(m))
}

/// The mount of a drive below this path.
pub fn drive_below(path: &Path) -> Option<PathBuf> {
    mount_fuse::mounts().into_iter().map(|m| m.mountpoint).find(|m| m.starts_with(path))
}

/// What a person gave as an address: text that begins with `sd://`, or a path.
pub fn target(given: Option<&Path>) -> Outcome<Target> {
    let Some(given) = given else { return Ok(Target::Address("sd://".into())) };
    match given.to_str() {
        Some(text) if text.starts_with("sd://") => Ok(Target::Address(text.to_owned())),
        _ => Ok(Target::Path(WirePath::from(&*spelled(given)?))),
    }
}

/// The folder that is to become a location, canonical.
pub fn folder(given: &Path) -> Outcome<PathBuf> {
    let plain = absolute(given)?;
    if let Some(mountpoint) = drive_around(&plain) {
        return Err(inside_drive(&plain, &mountpoint));
    }
    let path = fs::canonicalize(&plain).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(Code::NotFound, format!("{} does not exist", plain.display()))
                .hint("check the spelling; a location is an existing folder of this device")
        }
        io::ErrorKind::NotADirectory => not_a_folder(&plain),
        _ => Failure::io(format!("cannot use {}", plain.display()), e),
    })?;
    if let Some(mountpoint) = drive_around(&path) {
        return Err(inside_drive(&path, &mountpoint));
    }
    match fs::read_dir(&path) {
        Ok(_) => Ok(path),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => Err(not_a_folder(&path)),
        Err(e) => Err(Failure::io(format!("cannot read the folder {}", path.display()), e)),
    }
}

fn not_a_folder(path: &Path) -> Failure {
    let failure =
        Failure::new(Code::Invalid, format!("{} is a file, not a folder", path.display()));
    match path.parent() {
        Some(parent) => failure
            .hint(format!("add the folder that it is in: sd location add {}", parent.display())),
        None => failure,
    }
}

/// The refusal of a location inside the drive itself.
pub fn inside_drive(path: &Path, mountpoint: &Path) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("{} is inside the drive mounted on {}", path.display(), mountpoint.display()),
    )
    .hint("add the folder where it really is, on the device that has it")
}

/// A name for a device or location made of any text: what names may not have is replaced.
pub fn label(text: &OsStr, otherwise: &str) -> String {
    let text = text.to_string_lossy();
    let cleaned: String =
        text.trim().chars().map(|c| if c.is_control() || c == '/' { '-' } else { c }).collect();
    // A name may have 64 characters, and a suffix may have to fit.
    let mut label: String = cleaned.chars().take(56).collect();
    while vfs_core::path::check_label(&label).is_err() {
        match label.as_str() {
            "content" => label.push_str("-1"),
            _ if label.is_empty() || label.chars().all(|c| c == '.') => label = otherwise.into(),
            _ => {
                label.pop();
            }
        }
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_a_label() {
        for (text, expected) in [
            ("Photos", "Photos"),
            ("a/b\nc", "a-b-c"),
            ("content", "content-1"),
            ("..", "folder"),
            ("", "folder"),
        ] {
            assert_eq!(label(OsStr::new(text), "folder"), expected);
        }
        for long in ["x".repeat(300), "€".repeat(300), "\u{10000}".repeat(300)] {
            assert!(vfs_core::path::check_label(&label(OsStr::new(&long), "f")).is_ok());
        }
    }

    #[test]
    fn dots_go_by_text_alone() {
        assert_eq!(absolute(Path::new("/a/./b/../c")).unwrap(), Path::new("/a/c"));
        assert_eq!(absolute(Path::new("/../x")).unwrap(), Path::new("/x"));
    }
}
