//! Two things that files of the cache and own files share: a whole read, a whole replacement.

use bytes::Bytes;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

/// The bytes of a range, all of them; [`io::ErrorKind::UnexpectedEof`] when the file is shorter.
/// The caller bounds the range.
pub(crate) fn read_range(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let len = (range.end - range.start) as usize;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = range.start + bytes.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    bytes.truncate(len);
    Ok(bytes.into())
}

/// Writes a file under `temporary` and gives it its name, so that a reader of the name
/// sees the old bytes or the new ones. Makes missing directories.
pub(super) fn replace(temporary: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let written = create(temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| rename(temporary, path));
    if written.is_err() {
        // The name may not even exist, and temporary names are cleared at the next start.
        let _ = fs::remove_file(temporary);
    }
    written
}

/// Creates a file for reading and writing, with the directories above it.
pub(super) fn create(path: &Path) -> io::Result<File> {
    let open = || File::options().read(true).write(true).create(true).truncate(true).open(path);
    with_parent(path, open)
}

/// Renames, with the directories above the new name.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    with_parent(to, || fs::rename(from, to))
}

fn with_parent<T>(path: &Path, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    match (attempt(), path.parent()) {
        (Err(e), Some(parent)) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(parent)?;
            attempt()
        }
        (result, _) => result,
    }
}
