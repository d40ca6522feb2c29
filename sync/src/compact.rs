//! Compacting logs, now and then: of own locations up to where every member has come, of replicas
//! but for the last changes ([`vfs_core::index::Index::compactable`]).

use crate::node::Shared;
use crate::pass_on::at_the_disk;
use crate::presence::now_ms;
use std::sync::Arc;
use std::time::Duration;
use vfs_core::index::{Index, Seen};
use vfs_core::model::{DeviceId, LocationNo, Seq};

/// How often it is looked whether there is anything to compact. A look costs nothing.
const EVERY: Duration = Duration::from_secs(600);
/// Places of the log that a member may have been sent since it was last noted.
const NOTE_EVERY: u64 = 10_000;

/// Looks after all locations.
pub(crate) async fn keep(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(EVERY).await;
        for location in shared.index.locations() {
            let follows = {
                let (shared, location) = (shared.clone(), location.clone());
                move |member| shared.is_peer(member) && location.is_shared_with(member)
            };
            let no = location.no;
            let compact = move |index: &Index| match index.compactable(no, follows, now_ms())? {
                Some(upto) => index.compact(no, upto),
                None => Ok(0),
            };
            match at_the_disk(&shared.index, compact).await {
                Ok(0) => {}
                Ok(dropped) => tracing::info!(location = no.0, dropped, "compacted the log"),
                Err(error) => tracing::warn!(location = no.0, %error, "the log is not compacted"),
            }
        }
    }
}

/// Notes how far a member that follows an own location has come.
pub(crate) struct Note {
    member: DeviceId,
    no: LocationNo,
    noted: Option<Seq>,
}

impl Note {
    pub(crate) fn of(member: DeviceId, no: LocationNo) -> Self {
        Self { member, no, noted: None }
    }

    /// The member has all that comes before a place, or will ask for it again.
    pub(crate) fn note(&mut self, index: &Index, upto: Seq) {
        let is_near = |noted: Seq| (noted.0..noted.0.saturating_add(NOTE_EVERY)).contains(&upto.0);
        if self.noted.is_some_and(is_near) {
            return;
        }
        self.noted = Some(upto);
        let seen = Seen { upto, at_ms: now_ms() };
        if let Err(error) = index.note_seen(self.no, self.member, seen) {
            tracing::debug!(%error, "how far a member is could not be noted");
        }
    }
}
