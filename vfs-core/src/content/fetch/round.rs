//! One holder after the other, in the order of what is known of them then, until one has given
//! the range; and all of them again while there is hope.

use super::holders::Holder;
use super::request::Answer;
use super::{Failure, Fetcher, RangeRequest};
use crate::content::choice::Rank;
use crate::content::lock;
use crate::model::DeviceId;
use crate::source::FetchError;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A holder whose disk or program fails is asked again for this long.
const FAILED_PATIENCE: Duration = Duration::from_secs(1);
/// Pauses between two rounds.
const PAUSES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(20)..=Duration::from_millis(500);

/// Where a flight stands with its holders.
pub(super) struct Round {
    /// Not asked in this round.
    left: Vec<Holder>,
    /// To be asked again in the next one.
    pub(super) again: Vec<Holder>,
    /// Those that lend it and were ever among them.
    lenders: Vec<DeviceId>,
    heard: Heard,
}

impl Round {
    fn of(left: Vec<Holder>) -> Self {
        let lenders = left.iter().filter(|holder| holder.is_lender()).map(|l| l.device).collect();
        Self { left, again: Vec::new(), lenders, heard: Heard::default() }
    }
}

/// What was heard from all holders so far.
#[derive(Default)]
struct Heard {
    wrong: bool,
    stale: bool,
    unreachable: bool,
    refused: bool,
}

impl Heard {
    fn failure(&self) -> Failure {
        match self {
            Self { wrong: true, .. } => Failure::Io,
            Self { stale: true, .. } => Failure::Stale,
            Self { unreachable: true, .. } => Failure::HostDown,
            Self { refused: true, .. } => Failure::Refused,
            _ => Failure::Io,
        }
    }
}

impl Fetcher {
    pub(super) async fn ask_holders(
        self: &Arc<Self>,
        request: &RangeRequest<'_>,
    ) -> Result<Bytes, Failure> {
        let mut round = Round::of(self.holders().await?);
        if !self.has_another(&round) {
            self.add_lenders(&mut round, request).await;
        }
        let mut pause = *PAUSES.start();
        loop {
            round.heard.unreachable = false;
            while let Some(holder) = self.take_next(&mut round, request, &[]) {
                if let Some(bytes) = self.ask_with_another(holder, &mut round, request).await? {
                    return Ok(bytes);
                }
            }
            round.heard.unreachable |= !round.left.is_empty();
            round.left.append(&mut round.again);
            self.add_lenders(&mut round, request).await;
            let hope = self.has_another(&round) || self.is_asking();
            if request.ahead || !hope || Instant::now() + pause >= self.deadline(request.started) {
                return Err(round.heard.failure());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*PAUSES.end());
        }
    }

    /// Takes the holder out that is the next to be asked, by what is known now; beside those that
    /// are `late` it is on another device, and none that was silent itself.
    pub(super) fn take_next(
        &self,
        round: &mut Round,
        request: &RangeRequest<'_>,
        late: &[DeviceId],
    ) -> Option<Holder> {
        let now = Instant::now();
        let may_be_asked = |(_, holder): &(usize, &Holder)| {
            !late.contains(&holder.device) && self.may_answer(holder)
        };
        let ranked = round.left.iter().enumerate().filter(may_be_asked);
        let ranked = ranked.map(|(n, holder)| (self.rank(holder, request.len(), now), n));
        let (rank, n) = ranked.min()?;
        let is_useful = late.is_empty() || !matches!(rank, Rank::Silent(_));
        is_useful.then(|| round.left.remove(n))
    }

    fn rank(&self, holder: &Holder, bytes: u64, now: Instant) -> Rank {
        let rtt = self.rtt(holder.device);
        match lock(&holder.supply.pace).rank(bytes, rtt, now) {
            // Unless its disk hangs.
            Rank::Expected(_) | Rank::Unknown(_) if holder.device == self.content.index.me() => {
                Rank::Own
            }
            Rank::Expected(_) | Rank::Unknown(_) if !holder.is_ready() => Rank::Unready(rtt),
            rank => rank,
        }
    }

    /// Whether there is one to ask that was not asked in this round.
    pub(super) fn has_another(&self, round: &Round) -> bool {
        round.left.iter().any(|holder| self.may_answer(holder))
    }

    /// Takes one out that could not give it a moment ago, and is on another device.
    pub(super) fn take_again(&self, round: &mut Round, late: DeviceId) -> Option<Holder> {
        let may_be_asked = |holder: &Holder| holder.device != late && self.may_answer(holder);
        let at = round.again.iter().position(may_be_asked)?;
        Some(round.again.remove(at))
    }

    /// What came of a question that brought no bytes.
    pub(super) fn note(
        &self,
        mut holder: Holder,
        answer: Answer,
        round: &mut Round,
        request: &RangeRequest<'_>,
    ) {
        let heard = &mut round.heard;
        match answer {
            Answer::Right(_) => {}
            Answer::Wrong(what) => {
                heard.wrong = true;
                self.report(&holder, &request.range, what);
                self.forget_lender(&holder);
            }
            Answer::Refusal(FetchError::Stale | FetchError::Refused) if holder.is_lender() => {
                self.forget_lender(&holder);
            }
            Answer::Refusal(FetchError::Stale) => heard.stale |= holder.is_opened(),
            Answer::Refusal(FetchError::Refused) => heard.refused = true,
            Answer::Refusal(refusal @ (FetchError::Unreachable | FetchError::NotNow)) => {
                heard.unreachable = true;
                if matches!(refusal, FetchError::NotNow) && holder.set_ready(false) {
                    self.note_ready(holder.device, false);
                }
                round.again.push(holder);
            }
            Answer::Refusal(FetchError::Failed(why)) => {
                tracing::debug!(device = %holder.device, "a range could not be had: {why}");
                self.forget_lender(&holder);
                if request.started.elapsed() < FAILED_PATIENCE {
                    round.again.push(holder);
                }
            }
        }
    }

    /// Has those asked besides that have it in a cache.
    async fn add_lenders(self: &Arc<Self>, round: &mut Round, request: &RangeRequest<'_>) {
        if request.is_wanted() {
            self.find_lenders(self.deadline(request.started)).await;
            self.join_lenders(round);
        }
    }

    /// Those that are known by now.
    pub(super) fn join_lenders(&self, round: &mut Round) {
        let liars = lock(&self.liars);
        for lender in &self.lenders.borrow().holders {
            if !round.lenders.contains(&lender.device) && !liars.contains(&lender.id()) {
                round.lenders.push(lender.device);
                round.left.push(lender.clone());
            }
        }
    }
}
