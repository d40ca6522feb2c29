//! What answering with a range has in common, be it of an own file ([`super::serve`]) or of a
//! cached content ([`super::lend`]).

use super::disk::read_range;
use super::manifest::{ChainingValue, Manifest, is_fetchable};
use crate::source::{FetchError, MAX_FETCH_BYTES};
use bytes::Bytes;
use std::fs::File;
use std::io;
use std::ops::Range;

/// Refuses a range that is none to be asked for of a file of this size.
pub(super) fn check_range(range: &Range<u64>, size: u64) -> Result<(), FetchError> {
    match is_fetchable(range, size) && range.end - range.start <= MAX_FETCH_BYTES {
        true => Ok(()),
        false => Err(FetchError::Failed("the range is not one that may be asked for".into())),
    }
}

/// The bytes of a range, which the caller bounds.
pub(super) fn read(file: &File, range: Range<u64>) -> Result<Bytes, FetchError> {
    read_range(file, range).map_err(unreadable)
}

/// What proves a range of a file, by its tree and what of the file the tree has not kept.
pub(super) fn prove(
    tree: &Manifest,
    file: &File,
    range: Range<u64>,
) -> Result<Vec<ChainingValue>, FetchError> {
    let read = &mut |near| read_range(file, near).map(|bytes| bytes.to_vec());
    tree.proof_with(range, read).map_err(unreadable)
}

/// A file that ends early was cut while it was read.
pub(super) fn unreadable(error: io::Error) -> FetchError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => FetchError::Stale,
        _ => FetchError::Failed(error.to_string()),
    }
}
