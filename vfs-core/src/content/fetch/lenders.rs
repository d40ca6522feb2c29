//! Who has the bytes in a cache. Nobody announces that: it is asked for when it is needed, of the
//! devices that are connected, and what they say is believed for a while.

use super::Fetcher;
use super::holders::{Holder, Place};
use crate::content::lock;
use crate::model::DeviceId;
use crate::source::{ContentSource, Wanted};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

/// How long devices may take to say what they have in their caches, and how long the others may
/// take after the first one that has it.
const LENDERS_ANSWER: Duration = Duration::from_secs(1);
const LENDERS_AFTER_FIRST: Duration = Duration::from_millis(50);
/// For how long a read waits for them when there is nobody else.
const LENDERS_HOPE: Duration = Duration::from_secs(2);
/// How much longer those are listened to that have not said it by then, while nobody waits for it.
const LENDERS_LAST: Duration = Duration::from_secs(3);
/// How long it is believed that nobody has it, and that those have it who said so.
const NOT_LENT_FOR: Duration = Duration::from_secs(3);
const LENT_FOR: Duration = Duration::from_secs(30);
/// How many devices are asked together.
const MAX_LENDERS: usize = 16;

/// Who has it in a cache, by the last question for that.
#[derive(Default)]
pub(super) struct Lenders {
    pub(super) holders: Vec<Holder>,
    /// When it was asked; none if what was said is not enough any more.
    asked: Option<Instant>,
    /// When the last answer had come, or was not waited for any more.
    closed: Option<Instant>,
    /// The number of the question.
    question: u64,
    /// More answers may come.
    is_open: bool,
    /// Who said that it has it, and gave nothing or something else.
    failed: Vec<(DeviceId, Instant)>,
}

impl Lenders {
    fn is_known(&self, now: Instant) -> bool {
        let believed_for = if self.holders.is_empty() { NOT_LENT_FOR } else { LENT_FOR };
        let said = self.asked.map(|asked| self.closed.map_or(asked, |closed| closed.max(asked)));
        said.is_some_and(|said| self.is_open || now - said < believed_for)
    }

    /// Begins a question; gives its number.
    fn begin(&mut self, now: Instant) -> u64 {
        self.failed.retain(|(_, at)| now - *at < LENT_FOR);
        self.holders.clear();
        (self.asked, self.is_open) = (Some(now), true);
        self.question += 1;
        self.question
    }

    /// `false`: it was not known to have it.
    fn fail(&mut self, device: DeviceId) -> bool {
        let known = self.holders.len();
        self.holders.retain(|lender| lender.device != device);
        let was_known = self.holders.len() < known;
        if was_known {
            self.failed.push((device, Instant::now()));
            // Others may have it that were not waited for.
            self.asked = None;
        }
        was_known
    }
}

impl Fetcher {
    /// Waits for the first that say they have it in a cache, unless that is known, but not longer
    /// than this. Others may be added later.
    pub(super) async fn find_lenders(self: &Arc<Self>, at_most_until: Instant) {
        let mut lenders = self.lenders.subscribe();
        self.ask_for_lenders();
        let asked = lenders.borrow().asked;
        let until = (asked.unwrap_or_else(Instant::now) + LENDERS_ANSWER).min(at_most_until);
        let some = lenders.wait_for(|lenders| !lenders.is_open || !lenders.holders.is_empty());
        if timeout_at(until, some).await.is_ok() {
            let all = lenders.wait_for(|lenders| !lenders.is_open);
            drop(timeout(LENDERS_AFTER_FIRST, all).await);
        }
    }

    /// Has the connected devices asked, unless it is known who has it.
    pub(super) fn ask_for_lenders(self: &Arc<Self>) {
        let Some(content) = self.id else { return };
        let mut begun = None;
        self.lenders.send_if_modified(|lenders| {
            let now = Instant::now();
            if !lenders.is_known(now) {
                let failed: Vec<_> = lenders.failed.iter().map(|(device, _)| *device).collect();
                begun = Some((lenders.begin(now), failed));
            }
            begun.is_some()
        });
        let Some((number, failed)) = begun else { return };
        let source = self.content.source.clone();
        let mut devices = source.lenders();
        {
            let liars = lock(&self.liars);
            devices.retain(|device| !failed.contains(device) && !liars.contains(&(*device, None)));
        }
        let wanted = Wanted { content, size: self.size };
        let fetcher = Arc::downgrade(self);
        let question = Question { fetcher, source, wanted, number };
        // With nobody to ask, it ends here.
        if !devices.is_empty() {
            self.content.runtime.spawn(question.ask(devices));
        }
    }

    /// It does not have it any more, or not right: also others are asked for, next time.
    pub(super) fn forget_lender(&self, holder: &Holder) {
        if holder.is_lender() {
            self.lenders.send_if_modified(|lenders| lenders.fail(holder.device));
        }
    }

    /// It has proved a range, so that its tree is there; or it has said that it is not.
    pub(super) fn note_ready(&self, device: DeviceId, is_ready: bool) {
        self.lenders.send_if_modified(|lenders| {
            let known = lenders.holders.iter_mut().find(|lender| lender.device == device);
            known.is_some_and(|lender| lender.set_ready(is_ready))
        });
    }

    /// Whether more may say soon that they have it.
    pub(super) fn is_asking(&self) -> bool {
        let lenders = self.lenders.borrow();
        let is_new = lenders.asked.is_some_and(|asked| asked.elapsed() < LENDERS_HOPE);
        lenders.is_open && is_new
    }

    /// Of these devices those that may see a location in which this one knows the content. Blocks
    /// on the index.
    fn who_may_know(&self, mut devices: Vec<DeviceId>) -> Result<Vec<DeviceId>, String> {
        let index = &self.content.index;
        let opened = lock(&self.versions).clone();
        let opened = opened.iter().filter_map(|holder| holder.version());
        let mut locations: Vec<_> =
            opened.filter_map(|version| index.location_by_id(version.location)).collect();
        if let Some(content) = self.id {
            let holders = index.view().and_then(|view| view.holders(content));
            let holders = holders.map_err(|e| e.to_string())?;
            locations.extend(holders.iter().filter_map(|(no, _)| index.location(*no)));
        }
        locations.sort_by_key(|location| location.no.0);
        locations.dedup_by_key(|location| location.no);
        devices.retain(|device| {
            locations.iter().any(|location| index.may_know(location, *device).unwrap_or(false))
        });
        Ok(devices)
    }
}

/// A question for who has a content in its cache. It goes on while nobody waits for it.
struct Question {
    fetcher: Weak<Fetcher>,
    source: Arc<dyn ContentSource>,
    wanted: Wanted,
    number: u64,
}

impl Question {
    /// Asks some of the devices at a time. Also when some have it: one that only says so must not
    /// keep the others from being found.
    async fn ask(self, devices: Vec<DeviceId>) {
        let mut asked = JoinSet::new();
        for some in self.who_may_know(devices).await.chunks(MAX_LENDERS) {
            for device in some {
                asked.spawn(lends(self.source.clone(), *device, self.wanted));
            }
            self.hear(&mut asked, LENDERS_ANSWER).await;
        }
        self.hear(&mut asked, LENDERS_LAST).await;
    }

    /// Who is asked learns that somebody reads this content.
    async fn who_may_know(&self, devices: Vec<DeviceId>) -> Vec<DeviceId> {
        let Some(fetcher) = self.fetcher.upgrade() else { return Vec::new() };
        let runtime = fetcher.content.runtime.clone();
        let may_know = runtime.spawn_blocking(move || fetcher.who_may_know(devices)).await;
        may_know.unwrap_or_else(|e| Err(e.to_string())).unwrap_or_else(|error| {
            tracing::warn!(error, "cannot find out who may know of a content");
            Vec::new()
        })
    }

    async fn hear(&self, asked: &mut JoinSet<(DeviceId, Option<bool>)>, time: Duration) {
        let until = Instant::now() + time;
        while let Ok(Some(answered)) = timeout_at(until, asked.join_next()).await {
            let Ok((device, Some(is_ready))) = answered else { continue };
            let Some(fetcher) = self.fetcher.upgrade() else { break };
            let lender = fetcher.holder(device, Place::Cache { wanted: self.wanted, is_ready });
            self.tell(&fetcher, |lenders| lenders.holders.push(lender));
        }
    }

    /// What is heard of an earlier question counts no more.
    fn tell(&self, fetcher: &Fetcher, change: impl FnOnce(&mut Lenders)) {
        fetcher.lenders.send_if_modified(|lenders| {
            let is_last = lenders.question == self.number;
            if is_last {
                change(lenders);
            }
            is_last
        });
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Some(fetcher) = self.fetcher.upgrade() {
            let closed = Some(Instant::now());
            self.tell(&fetcher, |lenders| (lenders.is_open, lenders.closed) = (false, closed));
        }
    }
}

/// Whether a device lends all of a content, and is ready for it. Parts are not asked for yet.
async fn lends(
    source: Arc<dyn ContentSource>,
    device: DeviceId,
    wanted: Wanted,
) -> (DeviceId, Option<bool>) {
    let lent = source.lends(device, &[wanted]).await.unwrap_or_default();
    let whole = lent.first().filter(|lent| lent.ranges.contains(&(0..wanted.size)));
    (device, whole.map(|lent| lent.is_ready))
}
