//! Taking others' writes, as soon as there is a place to note what was done.
//!
//! A daemon whose data disk is full still shows and serves files; who writes to it is told to
//! ask again, as with a full disk of a location.

use crate::failure::{Code, Failure, Outcome};
use std::sync::{Arc, Mutex, PoisonError};
use sync::{Applies, Arrived, Receive};
use vfs_core::apply::{Applier, ApplyError, Writer};
use vfs_core::error::{FsError, Kind};
use vfs_core::model::DeviceId;
use vfs_core::ops::{Obstacle, Op, OpId, Outcome as Applied};

type Open = Box<dyn Fn() -> Result<Arc<Applier>, ApplyError> + Send + Sync>;

/// An [`Applier`], opened when its disk lets it be.
pub struct Applying {
    open: Open,
    opened: Mutex<Result<Arc<Applier>, FsError>>,
}

impl Applying {
    /// Opens it now if possible; only a form that this program does not know is an error.
    pub fn begin(open: Open) -> Outcome<Self> {
        let opened = match open() {
            Ok(applier) => Ok(applier),
            Err(ApplyError::Disk(error)) => {
                tracing::error!("writes of other devices have to wait: {error}");
                Err(error)
            }
            Err(newer @ ApplyError::NewerFormat(_)) => {
                return Err(Failure::new(Code::Version, newer.to_string())
                    .hint("install the newer sd that wrote it"));
            }
        };
        Ok(Self { open, opened: Mutex::new(opened) })
    }

    /// Why writes of other devices have to wait, if they have to.
    pub fn obstacle(&self) -> Option<String> {
        match self.applier() {
            Ok(applier) => applier.has_failed().then(|| "the disk fails".into()),
            Err(Obstacle::Failed(why)) => Some(why),
            Err(_) => Some("the disk is full".into()),
        }
    }

    fn applier(&self) -> Result<Arc<Applier>, Obstacle> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.is_err() {
            *opened = (self.open)().map_err(|error| match error {
                ApplyError::Disk(error) => error,
                ApplyError::NewerFormat(_) => FsError::new(Kind::Io, error.to_string()),
            });
        }
        match &*opened {
            Ok(applier) => Ok(Arc::clone(applier)),
            Err(error) if error.kind() == Kind::NoSpace => Err(Obstacle::NoSpace),
            Err(error) => Err(Obstacle::Failed(error.to_string())),
        }
    }
}

impl Applies for Applying {
    fn need(&self, writer: DeviceId, id: OpId, op: &Op) -> Option<Box<dyn Receive>> {
        Applies::need(&*self.applier().ok()?, writer, id, op)
    }

    fn apply(&self, writer: &Writer, ops: Vec<Arrived>) -> Vec<Applied> {
        match self.applier() {
            Ok(applier) => Applies::apply(&*applier, writer, ops),
            Err(obstacle) => ops.iter().map(|_| Applied::Later(obstacle.clone())).collect(),
        }
    }

    fn forget_below(&self, writer: DeviceId, epoch: u64, no: u64) {
        // What is not forgotten now is forgotten with what is settled next.
        if let Ok(applier) = self.applier() {
            applier.forget_below(writer, epoch, no);
        }
    }
}
