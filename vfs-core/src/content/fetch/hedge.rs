//! Another holder is asked besides one that is late while somebody waits: whoever is first wins.

use super::holders::Holder;
use super::request::Answer;
use super::round::Round;
use super::{Ask, Failure, Fetcher};
use crate::content::choice::late_after;
use crate::content::lock;
use bytes::Bytes;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How often it is looked whether somebody waits for a late flight by now.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One of several holders that are asked for the same range.
struct Racer<'a> {
    holder: Holder,
    asked: Instant,
    /// What was under way from it then, with this range.
    under_way_bytes: u64,
    answer: Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send + 'a>>,
}

impl Fetcher {
    /// Asks a holder, and another one besides when it is late and somebody waits. None: those that
    /// were asked gave no right bytes, which is noted.
    pub(super) async fn ask_with_another(
        self: &Arc<Self>,
        first: Holder,
        round: &mut Round,
        ask: &Ask<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        let has_another = AtomicBool::new(self.has_another(round));
        let asked = Instant::now();
        let rtt = self.rtt(first.device);
        let (late, under_way_bytes) = {
            let pace = lock(&first.supply.pace);
            let expected = pace.expected(ask.len(), rtt, asked);
            (late_after(expected), pace.under_way_bytes() + ask.len())
        };
        let asking = self.ask(&first, ask, &has_another);
        tokio::pin!(asking);
        if let Some(answer) = until_late(asking.as_mut(), late, ask).await {
            return Ok(match answer? {
                Answer::Right(bytes) => Some(bytes),
                answer => {
                    self.note(first.clone(), answer, round, ask);
                    None
                }
            });
        }
        let holder = first.clone();
        let first = Racer { holder, asked, under_way_bytes, answer: Box::pin(asking) };
        self.race(first, round, ask, &has_another).await
    }

    /// Asks another holder beside one that is late, and the next when one of the two fails, so that
    /// two are asked for as long as there are so many. The first right bytes are enough; what is
    /// not answered then is cancelled.
    async fn race<'a>(
        self: &'a Arc<Self>,
        first: Racer<'a>,
        round: &mut Round,
        ask: &'a Ask<'_>,
        has_another: &'a AtomicBool,
    ) -> Result<Option<Bytes>, Failure> {
        let mut lenders = self.lenders.subscribe();
        let mut racers = vec![first];
        loop {
            lenders.mark_unchanged();
            self.join_lenders(round);
            self.start_another(&mut racers, round, ask, has_another);
            if racers.is_empty() {
                return Ok(None);
            }
            let is_alone = racers.len() == 1;
            let (racer, answer) = tokio::select! {
                answered = first_of(&mut racers) => answered,
                _ = lenders.changed(), if is_alone => continue,
            };
            match answer {
                Ok(Answer::Right(bytes)) => {
                    overtake(&racers, racer.asked);
                    return Ok(Some(bytes));
                }
                Ok(answer) => self.note(racer.holder, answer, round, ask),
                Err(failure) if racers.is_empty() => return Err(failure),
                // There is no room for its answer now.
                Err(_) => round.again.push(racer.holder),
            }
        }
    }

    /// Asks another holder, unless two are asked. With none known, who lends it is asked for.
    fn start_another<'a>(
        self: &'a Arc<Self>,
        racers: &mut Vec<Racer<'a>>,
        round: &mut Round,
        ask: &'a Ask<'_>,
        has_another: &'a AtomicBool,
    ) {
        if racers.len() < 2 {
            let late: Vec<_> = racers.iter().map(|racer| racer.holder.device).collect();
            match self.take_next(round, ask, &late) {
                Some(holder) => {
                    tracing::debug!(?late, asked = %holder.device, "another holder is asked");
                    racers.push(self.racer(holder, ask, has_another));
                }
                None => self.ask_for_lenders(),
            }
        }
        has_another.store(racers.len() > 1 || self.has_another(round), Ordering::Relaxed);
    }

    fn racer<'a>(
        self: &'a Arc<Self>,
        holder: Holder,
        ask: &'a Ask<'_>,
        has_another: &'a AtomicBool,
    ) -> Racer<'a> {
        let under_way_bytes = lock(&holder.supply.pace).under_way_bytes() + ask.len();
        let asked = holder.clone();
        let answer = Box::pin(async move { self.ask(&asked, ask, has_another).await });
        Racer { holder, asked: Instant::now(), under_way_bytes, answer }
    }
}

/// The first answer, with its racer, which is out of the race.
async fn first_of<'a>(racers: &mut Vec<Racer<'a>>) -> (Racer<'a>, Result<Answer, Failure>) {
    let (n, answer) = std::future::poll_fn(|cx| {
        for (n, racer) in racers.iter_mut().enumerate() {
            if let Poll::Ready(answer) = racer.answer.as_mut().poll(cx) {
                return Poll::Ready((n, answer));
            }
        }
        Poll::Pending
    })
    .await;
    (racers.remove(n), answer)
}

/// Notes that these were asked earlier than the one that was first.
fn overtake(slower: &[Racer<'_>], asked: Instant) {
    let now = Instant::now();
    for racer in slower.iter().filter(|racer| racer.asked < asked) {
        lock(&racer.holder.supply.pace).overtaken(racer.under_way_bytes, racer.asked, now);
    }
}

/// The answer, unless it is late and somebody waits for it.
async fn until_late<T>(
    mut asking: Pin<&mut impl Future<Output = T>>,
    late: Duration,
    ask: &Ask<'_>,
) -> Option<T> {
    let mut wait = late;
    loop {
        if let Ok(answer) = timeout(wait, &mut asking).await {
            return Some(answer);
        }
        if ask.is_waited_for() {
            return None;
        }
        wait = LOOK_EVERY;
    }
}
