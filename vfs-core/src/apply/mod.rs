//! The owner's side of writing: operations of other devices, carried out on this device's disks.

mod receive;

use crate::content::{Manifests, OwnFiles};
use crate::error::FsError;
use crate::index::Index;
use crate::indexer::Indexer;
use crate::model::DeviceId;
use crate::ops::{Op, OpId, Outcome};
use std::path::Path;
use std::sync::Arc;

pub use receive::{Need, Receiving};

/// Who asks, by id and by the name that a conflict copy carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Writer {
    /// Taken from the connection.
    pub id: DeviceId,
    /// As the library has it.
    pub name: String,
}

/// Why the state of applying could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The disk with the daemon's data failed.
    #[error(transparent)]
    Disk(#[from] FsError),
    /// It was written by a newer program.
    #[error("{0} was written by a newer version of this program")]
    NewerFormat(std::path::PathBuf),
}

/// Applies operations of other devices to this device's own locations. Calls block on the disk.
pub struct Applier {}

impl Applier {
    /// Opens the state in `dir` and ends what a crash cut off. To be called before the indexer
    /// is told to watch any location.
    pub fn open(
        _dir: &Path,
        _index: Index,
        _indexer: Arc<Indexer>,
        _own: Arc<OwnFiles>,
        _manifests: Arc<Manifests>,
    ) -> Result<Arc<Self>, ApplyError> {
        unimplemented!()
    }

    /// What of an operation's bytes must travel; asked again after a reconnect, it goes on
    /// where it was. An operation that is refused anyway needs nothing.
    pub fn need(&self, _writer: DeviceId, _id: OpId, _op: &Op) -> Need {
        unimplemented!()
    }

    /// Carries out operations in their order and remembers the outcomes; all is durable when it
    /// returns. One that was applied before is answered as then.
    pub fn apply(
        &self,
        _writer: &Writer,
        _ops: Vec<(OpId, Op, Option<Receiving>)>,
    ) -> Vec<Outcome> {
        unimplemented!()
    }

    /// The writer has noted the outcomes of all its operations below `no`.
    pub fn forget_below(&self, _writer: DeviceId, _epoch: u64, _no: u64) {
        unimplemented!()
    }
}
