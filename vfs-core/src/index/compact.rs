//! Tombstones that nobody needs any more.
//!
//! A name that is gone keeps a place in the log, so that a replica which was away learns of it.
//! Once every member has seen that place it is dropped, up to a *floor* below which the log has
//! rows only. Whoever asks for what came after a place below the floor gets the log from its
//! beginning instead, for a replica that is emptied first: that is always right, so when to
//! compact is a matter of cost alone.

use super::key;
use super::read;
use super::row::{decode, encode};
use super::store::{Snapshot, Table};
use super::{Index, IndexError};
use crate::model::{DeviceId, LocationNo, Seq};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;

/// Fewer tombstones than this are not worth a look.
const FEW: u64 = 16_384;
/// Nor are fewer than this part of the entries.
const SHARE: u64 = 8;
/// A member that was not here for so long is not waited for: 30 days in milliseconds.
const AWAY_MS: u64 = 30 * 24 * 3600 * 1000;
/// A replica keeps the tombstones of so many last changes, for whom it is passed on to.
const PASSED_ON: u64 = 65_536;
/// Tombstones looked at in one commit.
const COMMIT_ROWS: usize = 4096;

/// How far a member had come when it was last heard of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Seen {
    /// It had everything up to here.
    pub upto: Seq,
    /// Milliseconds since 1970.
    pub at_ms: u64,
}

impl Index {
    /// Notes how far a member has come in an own location. One that begins anew, or only compares,
    /// is not waited for once more.
    pub fn note_seen(
        &self,
        no: LocationNo,
        member: DeviceId,
        seen: Seen,
    ) -> Result<(), IndexError> {
        self.own_location(no)?;
        self.write(|tx| {
            let key = key::seen(no, member);
            let known = tx.get(Table::Meta, &key)?;
            let known: Option<Seen> =
                known.map(|seen| decode(&seen, "how far a member is")).transpose()?;
            let upto = known.map_or(seen.upto, |known| seen.upto.max(known.upto));
            tx.batch.put(Table::Meta, key, encode(&Seen { upto, ..seen }));
            Ok(())
        })
    }

    /// Up to where tombstones of a location may go; `None`: there are too few to bother.
    /// `follows` says which members may see it.
    pub fn compactable(
        &self,
        no: LocationNo,
        follows: impl Fn(DeviceId) -> bool,
        now_ms: u64,
    ) -> Result<Option<Seq>, IndexError> {
        let location = self.location(no).ok_or(IndexError::NoSuchLocation(no))?;
        let Some(state) = self.memory().state(no) else { return Ok(None) };
        if state.tombstones < FEW.max(state.counts.entries / SHARE) {
            return Ok(None);
        }
        if location.owner != self.me() {
            return Ok(Some(Seq(state.head.0.saturating_sub(PASSED_ON))));
        }
        let mut upto = state.head;
        let snapshot = self.store().snapshot()?;
        let prefix = key::seen_of(no);
        read::scan_prefix(&*snapshot, Table::Meta, &prefix, &mut |key, value| {
            let seen: Seen = decode(value, "how far a member is")?;
            let member = key.get(prefix.len()..).and_then(|id| Some(DeviceId(id.try_into().ok()?)));
            let is_waited_for = now_ms.saturating_sub(seen.at_ms) < AWAY_MS;
            if is_waited_for && member.is_some_and(&follows) {
                upto = upto.min(seen.upto);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Some(upto))
    }

    /// Drops the tombstones up to a place; gives how many there were.
    pub fn compact(&self, no: LocationNo, upto: Seq) -> Result<u64, IndexError> {
        let mut next = Some(key::location(no).to_vec());
        let mut dropped = 0;
        while let Some(from) = next {
            next = self.write(|tx| {
                // No writer comes between the floor and the first that goes.
                let upto = upto.min(tx.state(no)?.head);
                let floor = floor(tx, no)?.max(upto);
                tx.batch.put(Table::Meta, key::floor(no), floor.0.to_be_bytes());
                let (places, next) = some_tombstones(tx, no, &from)?;
                for (key, seq) in places {
                    if Seq(u64::from_be_bytes(seq)) <= floor {
                        tx.erase_tombstone(no, key, &seq)?;
                        dropped += 1;
                    }
                }
                Ok(next)
            })?;
        }
        Ok(dropped)
    }
}

type Tombstone = (Vec<u8>, [u8; 8]);

/// Some tombstones from a key on, and the key after them if there are more.
fn some_tombstones(
    from: &dyn Snapshot,
    no: LocationNo,
    first: &[u8],
) -> Result<(Vec<Tombstone>, Option<Vec<u8>>), IndexError> {
    let (mut found, mut next) = (Vec::new(), None);
    let end = key::after_prefix(&key::location(no));
    read::scan_range(from, Table::Tombstones, first, end.as_deref(), &mut |key, value| {
        if found.len() == COMMIT_ROWS {
            next = Some(key.to_vec());
            return Ok(ControlFlow::Break(()));
        }
        let seq = value.try_into().map_err(|_| IndexError::DamagedRow("a tombstone"))?;
        found.push((key.to_vec(), seq));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((found, next))
}

/// The place below which the log of a location has no tombstones.
pub(super) fn floor(from: &dyn Snapshot, no: LocationNo) -> Result<Seq, IndexError> {
    read::noted(from, &key::floor(no))
}
