//! Another holder is asked besides one that is late while somebody waits: whoever is first wins.

use super::holders::Holder;
use super::request::Answer;
use super::round::Round;
use super::{Failure, Fetcher, RangeRequest};
use crate::content::choice::late_after;
use crate::content::lock;
use bytes::Bytes;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How often it is looked whether somebody waits for a late flight by now, and whether there is
/// another holder by now.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How soon one that could not give it is asked again, beside one that is late.
const AGAIN: Duration = Duration::from_millis(500);

/// A holder that is asked for the range, perhaps beside another one.
struct Attempt<'a> {
    holder: Holder,
    asked: Instant,
    /// After so long it is late.
    late: Duration,
    /// What was under way from it when it was asked, with this range.
    under_way_bytes: u64,
    /// It could not give it a moment ago: whoever is asked beside it is not given up for it.
    is_again: bool,
    answer: Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send + 'a>>,
}

impl Fetcher {
    /// Asks a holder, and another one besides when it is late and somebody waits. None: those that
    /// were asked gave no right bytes, which is noted.
    pub(super) async fn ask_with_another(
        self: &Arc<Self>,
        first: Holder,
        round: &mut Round,
        request: &RangeRequest<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        request.set_has_another(self.has_another(round));
        let mut first = self.attempt(first, request);
        match until_late(&mut first.answer, first.late, request).await {
            None => self.hedge(first, round, request).await,
            Some(Ok(Answer::Right(bytes))) => Ok(Some(bytes)),
            Some(Ok(answer)) => {
                self.note(first.holder, answer, round, request);
                Ok(None)
            }
            Some(Err(failure)) => Err(failure),
        }
    }

    fn attempt<'a>(
        self: &'a Arc<Self>,
        holder: Holder,
        request: &'a RangeRequest<'_>,
    ) -> Attempt<'a> {
        let (asked, rtt) = (Instant::now(), self.rtt(holder.device));
        let (late, under_way_bytes) = {
            let pace = lock(&holder.supply.pace);
            let expected = pace.expected(request.len(), rtt, asked);
            // One that is known to be slow may hang all the same: there is time to ask another.
            let most = self.content.config.read_deadline / 2;
            (late_after(expected).min(most), pace.under_way_bytes() + request.len())
        };
        let to = holder.clone();
        let answer = Box::pin(async move { self.ask(&to, request).await });
        Attempt { holder, asked, late, under_way_bytes, is_again: false, answer }
    }

    /// Asks another holder beside one that is late, and the next when one of the two fails, so that
    /// two are asked for as long as there are so many. The first right bytes are enough; what is
    /// not answered then is cancelled.
    async fn hedge<'a>(
        self: &'a Arc<Self>,
        first: Attempt<'a>,
        round: &mut Round,
        request: &'a RangeRequest<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        let mut lenders = self.lenders.subscribe();
        let mut attempts = vec![first];
        loop {
            lenders.mark_unchanged();
            self.join_lenders(round);
            self.start_another(&mut attempts, round, request);
            if attempts.is_empty() {
                return Ok(None);
            }
            let is_alone = attempts.len() == 1;
            let (attempt, answer) = tokio::select! {
                answered = first_of(&mut attempts) => answered,
                _ = lenders.changed(), if is_alone => continue,
                () = sleep(AGAIN), if is_alone && !round.again.is_empty() => {
                    self.ask_again(&mut attempts, round, request);
                    continue;
                }
            };
            match answer {
                Ok(Answer::Right(bytes)) => {
                    overtake(&attempts, attempt.asked);
                    return Ok(Some(bytes));
                }
                Ok(answer) => self.note(attempt.holder, answer, round, request),
                Err(failure) if attempts.is_empty() => return Err(failure),
                // There is no room for its answer now.
                Err(_) => round.again.push(attempt.holder),
            }
        }
    }

    /// Asks another holder, unless two are asked. With none known, who lends it is asked for.
    fn start_another<'a>(
        self: &'a Arc<Self>,
        attempts: &mut Vec<Attempt<'a>>,
        round: &mut Round,
        request: &'a RangeRequest<'_>,
    ) {
        if attempts.len() < 2 {
            let late: Vec<_> = attempts.iter().map(|attempt| attempt.holder.device).collect();
            match self.take_next(round, request, &late) {
                Some(holder) => {
                    tracing::debug!(?late, asked = %holder.device, "another holder is asked");
                    attempts.push(self.attempt(holder, request));
                }
                None => self.ask_for_lenders(),
            }
        }
        let asked_first = attempts.iter().filter(|attempt| !attempt.is_again).count();
        request.set_has_another(asked_first > 1 || self.has_another(round));
    }

    /// Asks one again beside the one that is late.
    fn ask_again<'a>(
        self: &'a Arc<Self>,
        attempts: &mut Vec<Attempt<'a>>,
        round: &mut Round,
        request: &'a RangeRequest<'_>,
    ) {
        let late = attempts[0].holder.device;
        if let Some(holder) = self.take_again(round, late) {
            attempts.push(Attempt { is_again: true, ..self.attempt(holder, request) });
        }
    }
}

/// The first answer, with its attempt, which is over.
async fn first_of<'a>(attempts: &mut Vec<Attempt<'a>>) -> (Attempt<'a>, Result<Answer, Failure>) {
    let (n, answer) = std::future::poll_fn(|cx| {
        for (n, attempt) in attempts.iter_mut().enumerate() {
            if let Poll::Ready(answer) = attempt.answer.as_mut().poll(cx) {
                return Poll::Ready((n, answer));
            }
        }
        Poll::Pending
    })
    .await;
    (attempts.remove(n), answer)
}

/// Notes that these were asked earlier than the one that was first.
fn overtake(slower: &[Attempt<'_>], asked: Instant) {
    let now = Instant::now();
    for attempt in slower.iter().filter(|attempt| attempt.asked < asked) {
        lock(&attempt.holder.supply.pace).overtaken(attempt.under_way_bytes, attempt.asked, now);
    }
}

/// The answer, unless it is late and somebody waits for it.
async fn until_late<T>(
    answer: &mut (impl Future<Output = T> + Unpin),
    late: Duration,
    request: &RangeRequest<'_>,
) -> Option<T> {
    let mut wait = late;
    loop {
        if let Ok(answer) = timeout(wait, &mut *answer).await {
            return Some(answer);
        }
        if request.is_wanted() {
            return None;
        }
        wait = LOOK_EVERY;
    }
}
