//! Bytes that an owner needs from the first to the last, because it no longer has their base.

use super::Outbox;

impl Outbox {
    /// Fetches what is missing of an operation's base, and sends the whole instead.
    pub(super) fn make_whole(&self, _no: u64) {}
}
