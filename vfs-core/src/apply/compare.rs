//! Whether a file has these bytes: the version that a writer saw, or the one it made.

use super::body::{digest_of, is_one_piece};
use super::conflict::Version;
use super::lock;
use super::site::{Found, Site};
use crate::content::Manifest;
use crate::error::{FsError, FsResult};
use crate::index::Observed;
use crate::local::stamp_of;
use crate::model::{ContentId, FileType, LocationNo, Stamp};
use crate::ops::NewContent;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// What is read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A version that a writer changed, as far as it is known here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Known {
    pub stamp: Stamp,
    pub content: Option<ContentId>,
}

/// Which version of a file its writer means to replace or remove.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Meant {
    /// It has no versions: not a regular file.
    Any,
    /// This one.
    Version(Known),
    /// One that nobody knows any more.
    Unknown,
}

impl Site<'_> {
    /// What the file is now, compared with the version that was changed and the new one.
    pub fn version(
        &self,
        found: &Found,
        base: Option<&Known>,
        new: &NewContent,
    ) -> FsResult<Version> {
        if let Some(base) = base
            && self.is_version(found, base)?
        {
            return Ok(Version::Base);
        }
        let has = self.has_bytes(found, new)?;
        Ok(if has { Version::Equal } else { Version::Changed })
    }

    /// Whether a file is the version that is meant.
    pub fn is_meant(&self, found: &Found, meant: &Meant) -> FsResult<bool> {
        match meant {
            _ if found.seen.attr.file_type != FileType::File => Ok(true),
            Meant::Any => Ok(true),
            Meant::Version(known) => self.is_version(found, known),
            Meant::Unknown => Ok(false),
        }
    }

    /// Whether a file still is this version. The time of the last change of attributes may
    /// differ: a chmod or a rename changes no bytes. Where the bytes' id is known it decides.
    pub fn is_version(&self, found: &Found, known: &Known) -> FsResult<bool> {
        let now = found.seen.stamp();
        let was = self.applier.touched.before(self.no(), now);
        if now == known.stamp || was.is_some_and(|was| is_unwritten_since(&was, &known.stamp)) {
            return Ok(true);
        }
        let is_it = match known.content {
            None => Ok(is_unwritten(&found.seen, &known.stamp)),
            Some(_) if now.size != known.stamp.size => Ok(false),
            Some(content) => Ok(self.content_of(found)? == Some(content)),
        };
        if matches!(is_it, Ok(false)) {
            tracing::debug!(?now, ?was, ?known, "another version than was meant");
        }
        is_it
    }

    /// The id of a file's bytes, read now; `None` when they change meanwhile.
    pub fn content_of(&self, found: &Found) -> FsResult<Option<ContentId>> {
        let hashed = self.opened(found, |file| {
            Manifest::of_file(file, found.seen.attr.size, &AtomicBool::new(false))
                .map_err(|e| FsError::os("hash a file", e))
        })?;
        Ok(hashed.flatten().map(|(id, _)| id))
    }

    /// Whether a file already has the bytes of a change.
    pub fn has_bytes(&self, found: &Found, new: &NewContent) -> FsResult<bool> {
        let seen = &found.seen.attr;
        if seen.file_type != FileType::File || seen.size != new.size {
            return Ok(false);
        }
        // The bytes that stay of a base are not known here; the writer's time tells.
        if !new.is_whole() && seen.mtime != new.mtime {
            return Ok(false);
        }
        let has = self.opened(found, |file| {
            let written = digest_of(file, new)? == new.digest;
            Ok(written && (is_one_piece(new) || !new.is_whole() || has_holes(file, new)?))
        })?;
        Ok(has.unwrap_or(false))
    }

    /// Looks into a file; `None` when it changed meanwhile, or is not there.
    fn opened<R>(
        &self,
        found: &Found,
        look: impl FnOnce(&File) -> FsResult<R>,
    ) -> FsResult<Option<R>> {
        let Some(file) = self.open_file(found)? else { return Ok(None) };
        let before = stamp_of(&file)?;
        if before.size != found.seen.attr.size {
            return Ok(None);
        }
        let result = look(&file)?;
        Ok((stamp_of(&file)? == before).then_some(result))
    }
}

/// Whether size and time of the last change of the bytes are the same, of the same inode.
pub(super) fn is_unwritten(seen: &Observed, stamp: &Stamp) -> bool {
    is_unwritten_since(&seen.stamp(), stamp)
}

fn is_unwritten_since(now: &Stamp, then: &Stamp) -> bool {
    (now.disk_ino, now.size, now.mtime) == (then.disk_ino, then.size, then.mtime)
}

/// Files whose times were set here, which changed no bytes: what they are, and were before.
#[derive(Default)]
pub(super) struct Touched(Mutex<HashMap<(LocationNo, u64), (Stamp, Stamp)>>);

/// How many are remembered; of a forgotten one the next change may be a conflict.
const TOUCHED_MAX: usize = 100_000;

impl Touched {
    /// The stamp of these bytes changed from `before` to `after`.
    pub fn note(&self, no: LocationNo, before: Stamp, after: Stamp) {
        if is_unwritten_since(&after, &before) {
            return;
        }
        let first = self.before(no, before).unwrap_or(before);
        let mut touched = lock(&self.0);
        if touched.len() >= TOUCHED_MAX {
            touched.clear();
        }
        touched.insert((no, before.disk_ino), (first, after));
    }

    /// The stamp that these bytes had before it was changed here.
    pub fn before(&self, no: LocationNo, now: Stamp) -> Option<Stamp> {
        let known = lock(&self.0).get(&(no, now.disk_ino)).copied();
        known.filter(|(_, after)| is_unwritten_since(&now, after)).map(|(before, _)| before)
    }
}

/// Whether what no extent covers is zero.
fn has_holes(file: &File, new: &NewContent) -> FsResult<bool> {
    let starts = new.extents.iter().map(|e| e.end);
    let ends = new.extents.iter().map(|e| e.start).chain([new.size]);
    for gap in std::iter::once(0).chain(starts).zip(ends) {
        if !is_zero(file, gap.0..gap.1)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_zero(file: &File, range: Range<u64>) -> FsResult<bool> {
    let mut buffer = vec![0; CHUNK_BYTES.min((range.end - range.start) as usize)];
    let mut at = range.start;
    while at < range.end {
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) if data >= range.end => return Ok(true),
            Ok(data) => at = data,
            Err(rustix::io::Errno::NXIO) => return Ok(true),
            Err(e) => return Err(FsError::os("look for data", e)),
        }
        let len = (range.end - at).min(CHUNK_BYTES as u64) as usize;
        file.read_exact_at(&mut buffer[..len], at).map_err(|e| FsError::os("read a file", e))?;
        if buffer[..len].iter().any(|b| *b != 0) {
            return Ok(false);
        }
        at += len as u64;
    }
    Ok(true)
}
