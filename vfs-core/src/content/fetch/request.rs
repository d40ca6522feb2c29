//! One request to one holder, and the check of what comes.

use super::hedge::LOOK_EVERY;
use super::holders::{Holder, Place};
use super::supply::UnderWay;
use super::{Failure, Fetcher, RangeRequest};
use crate::content::choice::{Landed, late_after};
use crate::content::lock;
use crate::content::manifest::verify;
use crate::source::{FetchError, Fetched, MAX_FETCH_BYTES, Version};
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

/// A holder may be silent for so long while there is another to try; twice as long if it answers
/// other requests meanwhile, or longer if the bytes are known to take that.
const PATIENCE: Duration = Duration::from_secs(2);
/// But not longer than this, however slow it is known to be.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// Up to here a range is hashed where it arrived; more would hold up that thread's other tasks.
const HASH_HERE_BYTES: usize = 128 << 10;

/// A range, how it came, and the right to hold it in memory; or why there is none.
type Answered = Result<(Fetched, Landed, OwnedSemaphorePermit), FetchError>;

/// What became of a question.
pub(super) enum Answer {
    Right(Bytes),
    Wrong(&'static str),
    Refusal(FetchError),
}

impl Fetcher {
    pub(super) async fn ask(
        self: &Arc<Self>,
        holder: &Holder,
        request: &RangeRequest<'_>,
    ) -> Result<Answer, Failure> {
        let own = holder.version().filter(|_| holder.device == self.content.index.me());
        if let Some(version) = own {
            let fetched = self.read_own(version.clone(), request).await;
            match &fetched {
                Err(FetchError::Unreachable) => {
                    lock(&holder.supply.pace).stayed_silent(Instant::now());
                }
                _ => lock(&holder.supply.pace).heard(Instant::now()),
            }
            return match fetched {
                Ok(fetched) => self.check(fetched, request.range.clone()).await,
                Err(refusal) => Ok(Answer::Refusal(refusal)),
            };
        }
        let answer = self.ask_remote(holder, request).await?;
        if matches!(answer, Answer::Right(_)) {
            self.is_from_afar.store(true, Ordering::Relaxed);
        }
        Ok(answer)
    }

    /// A disk that hangs takes no more than its share of the threads, and no longer than the
    /// deadline of who waits for it.
    async fn read_own(
        self: &Arc<Self>,
        version: Version,
        request: &RangeRequest<'_>,
    ) -> Result<Fetched, FetchError> {
        let (content, range) = (self.content.clone(), request.range.clone());
        let deadline = self.deadline(request.started);
        let turn = timeout_at(deadline, content.own_reads.clone().acquire_owned()).await;
        // Others hold them up: that says nothing of this disk.
        let Ok(turn) = turn else { return Err(FetchError::NotNow) };
        let read = async {
            let read = move || {
                // Whatever becomes of who waits: the thread is taken for as long as this runs.
                let _turn = turn;
                content.own.read(content.index.me(), &version, range)
            };
            let read = self.content.runtime.spawn_blocking(read).await;
            read.unwrap_or_else(|e| Err(FetchError::Failed(e.to_string())))
        };
        let read = timeout_at(deadline, read).await;
        read.unwrap_or(Err(FetchError::Unreachable))
    }

    /// Asks another device, checks what comes, and notes what that says of the device.
    pub(super) async fn ask_remote(
        self: &Arc<Self>,
        holder: &Holder,
        request: &RangeRequest<'_>,
    ) -> Result<Answer, Failure> {
        let answered = self.request_in_time(holder, request).await?;
        let answer = match answered {
            Ok((fetched, landed, _permit)) => {
                let answer = self.check(fetched, request.range.clone()).await?;
                if matches!(answer, Answer::Right(_)) {
                    lock(&holder.supply.pace).landed(landed, Instant::now());
                    if !holder.is_ready() {
                        self.note_ready(holder.device, true);
                    }
                    return Ok(answer);
                }
                answer
            }
            Err(refusal) => Answer::Refusal(refusal),
        };
        let mut pace = lock(&holder.supply.pace);
        match &answer {
            // Wrong bytes are worth as little as none.
            Answer::Wrong(_) | Answer::Refusal(FetchError::Unreachable) => {
                pace.stayed_silent(Instant::now());
            }
            _ => pace.heard(Instant::now()),
        }
        drop(pace);
        Ok(answer)
    }

    /// A request that is given up when it takes too long, which is sooner while there is another
    /// holder: that may change meanwhile.
    async fn request_in_time(
        &self,
        holder: &Holder,
        request: &RangeRequest<'_>,
    ) -> Result<Answered, Failure> {
        let asked = Instant::now();
        let give_up = || {
            let deadline = self.deadline(request.started);
            match request.has_another() {
                true => deadline.min(self.lose_patience(holder, request.len(), asked)),
                // Other ranges may arrive meanwhile: the link is slow then, not dead.
                false => deadline,
            }
        };
        let answer = self.request(holder, request);
        tokio::pin!(answer);
        loop {
            let until = give_up().min(Instant::now() + LOOK_EVERY);
            match timeout_at(until, &mut answer).await {
                Ok(answered) => return answered,
                Err(_) if Instant::now() < give_up() => {}
                Err(_) => return Ok(Err(FetchError::Unreachable)),
            }
        }
    }

    /// When a device is not waited for any more that did not answer while there is another.
    fn lose_patience(&self, holder: &Holder, bytes: u64, asked: Instant) -> Instant {
        let now = Instant::now();
        let rtt = self.rtt(holder.device);
        let pace = lock(&holder.supply.pace);
        // A device that answers other requests meanwhile is slow, not silent, but a file may be out
        // of its reach.
        let heard = pace.last_heard().map_or(asked, |at| at.max(asked));
        let most = (2 * PATIENCE).max(late_after(pace.expected(bytes, rtt, now)));
        (asked + most.min(MOST_PATIENCE)).min(heard + PATIENCE)
    }

    /// The request itself, when there is room for its answer.
    async fn request(
        &self,
        holder: &Holder,
        request: &RangeRequest<'_>,
    ) -> Result<Answered, Failure> {
        let kib = request.len().min(MAX_FETCH_BYTES).div_ceil(1024) as u32;
        let room = holder.supply.room.clone();
        let permit = match request.ahead {
            true => room.try_acquire_many_owned(kib).map_err(|_| Failure::Postponed)?,
            false => room.acquire_many_owned(kib).await.map_err(|_| Failure::Postponed)?,
        };
        let under_way = UnderWay::begin(&holder.supply.pace, request.len());
        let source = &self.content.source;
        let (device, range) = (holder.device, request.range.clone());
        let fetched = match &holder.at {
            Place::Location { version, .. } => source.fetch(device, version, range).await,
            Place::Cache { wanted, .. } => source.borrow(device, *wanted, range).await,
        };
        Ok(fetched.map(|fetched| (fetched, under_way.landed(self.rtt(device)), permit)))
    }

    async fn check(
        self: &Arc<Self>,
        fetched: Fetched,
        range: Range<u64>,
    ) -> Result<Answer, Failure> {
        if fetched.bytes.len() as u64 != range.end - range.start {
            return Ok(Answer::Wrong("has another length than asked for"));
        }
        let Some(id) = self.id else { return Ok(Answer::Right(fetched.bytes)) };
        let size = self.size;
        let bytes = fetched.bytes.clone();
        let check = move || verify(id, size, range, &fetched.bytes, &fetched.proof);
        let right = match bytes.len() <= HASH_HERE_BYTES {
            true => check(),
            false => {
                let checked = self.content.runtime.spawn_blocking(check).await;
                checked.map_err(|_| Failure::Postponed)?
            }
        };
        Ok(match right {
            true => Answer::Right(bytes),
            false => Answer::Wrong("does not have the content id of the file"),
        })
    }
}
