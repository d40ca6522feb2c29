//! Bytes on their way from a writer, kept by the number of their operation.

use crate::error::FsResult;
use std::ops::Range;

/// What an operation needs before it can be applied.
#[derive(Debug)]
pub enum Need {
    /// No bytes from the writer; also when it will be refused, or cannot be applied now.
    Nothing,
    /// These.
    Bytes(Receiving),
}

/// The place for the bytes of one operation. Dropped, it keeps what it has for the next
/// connection; the [`Applier`](super::Applier) holds it until the operation is applied.
#[derive(Debug)]
pub struct Receiving {}

impl Receiving {
    /// Ranges of the file whose bytes are still missing, in order.
    pub fn wanted(&self) -> Vec<Range<u64>> {
        unimplemented!()
    }

    /// Bytes at this place of the file; what is outside of the operation's extents is refused.
    pub fn write(&self, _offset: u64, _bytes: &[u8]) -> FsResult<()> {
        unimplemented!()
    }

    /// Whether everything has come and is what the writer says it is. What is not is asked for
    /// again: [`Self::wanted`] then is everything.
    pub fn finish(&self) -> FsResult<()> {
        unimplemented!()
    }
}
