//! What holders can do of which nothing is known, found out beside a large read.

use super::holders::Holder;
use super::request::Answer;
use super::{Fetcher, RangeRequest};
use crate::content::lock;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::time::Instant;

/// A file of this size may be worth being read from several holders.
const LARGE_BYTES: u64 = 16 << 20;
/// How often holders are looked for that are not known.
const LOOK_FOR_MORE_EVERY: Duration = Duration::from_secs(5);
/// What is read from a holder to find out what it can do.
const PROBE_BYTES: u64 = 256 << 10;

impl Fetcher {
    /// While a large file is read in its order: finds out who else has it, and what those can do
    /// of whom nothing is known, with a range that nobody waits for.
    pub(super) fn look_for_more(self: &Arc<Self>, request: &RangeRequest<'_>) {
        if !request.ahead
            || self.size < LARGE_BYTES
            || request.len() < PROBE_BYTES
            || self.id.is_none()
        {
            return;
        }
        let now = Instant::now();
        {
            let mut looked = lock(&self.looked);
            if looked.is_some_and(|at| now - at < LOOK_FOR_MORE_EVERY) {
                return;
            }
            *looked = Some(now);
        }
        let (fetcher, start) = (Arc::downgrade(self), request.range.start);
        self.content.runtime.spawn(async move {
            let Some(fetcher) = fetcher.upgrade() else { return };
            fetcher.find_lenders(now + LOOK_FOR_MORE_EVERY).await;
            let mut holders = fetcher.holders().await.unwrap_or_default();
            // One that has to read its whole file for the first range is asked for that if no other
            // lends it, and one only.
            let mut may_wait =
                !holders.iter().any(|holder| holder.is_lender() && holder.is_ready());
            let mut is_worth_it =
                |holder: &Holder| holder.is_ready() || std::mem::replace(&mut may_wait, false);
            holders.retain(|holder| fetcher.is_other(holder) && is_worth_it(holder));
            for holder in holders {
                fetcher.probe(&holder, start..start + PROBE_BYTES).await;
            }
        });
    }

    fn is_other(&self, holder: &Holder) -> bool {
        holder.device != self.content.index.me() && self.may_answer(holder)
    }

    async fn probe(self: &Arc<Self>, holder: &Holder, range: Range<u64>) {
        let may_probe = lock(&holder.supply.pace).may_probe(Instant::now());
        if !may_probe && holder.is_ready() {
            return;
        }
        // What is read is not wanted: these bytes come from elsewhere.
        let wanted = AtomicBool::new(false);
        let request = RangeRequest::new(range, true, &wanted);
        request.set_has_another(true);
        let answer = self.ask_remote(holder, &request).await;
        if let Ok(Answer::Wrong(what)) = answer {
            self.report(holder, &request.range, what);
            self.forget_lender(holder);
        }
    }
}
