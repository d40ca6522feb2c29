//! One range of a version, from the first holder that has it right.
//!
//! Holders are asked in this order: this device's own locations, the owner, the
//! other devices whose locations have the same content. What comes for a known
//! content id is checked before it leaves here; a holder whose bytes are wrong
//! is reported and not asked again for this version.

use super::manifest::verify;
use super::window::Link;
use super::{Content, lock};
use crate::error::{FsError, Kind};
use crate::index::IndexError;
use crate::model::{ContentId, DeviceId, FileId, LocationId};
use crate::source::{FetchError, Fetched, MAX_FETCH_BYTES, Version};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};

/// How many holders are considered: a common small file may be in thousands of places.
const MAX_HOLDERS: usize = 32;
/// How many of them are one other device's: one that lists the bytes often but is silent must
/// not crowd out those that answer.
const MAX_HOLDERS_EACH: usize = 2;
/// A holder is given this long while there is another to try.
const PATIENCE: Duration = Duration::from_secs(2);
/// A holder whose disk or program fails is asked again for this long.
const FAILED_PATIENCE: Duration = Duration::from_secs(1);
/// How long the holders found in the index are not looked up again.
const LOOK_UP_AFTER: Duration = Duration::from_secs(1);
/// Pauses between two rounds.
const PAUSES: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(20)..=Duration::from_millis(500);
/// Up to here a range is hashed where it arrived; more would hold up that thread's other tasks.
const HASH_HERE_BYTES: usize = 128 << 10;

/// Why no holder gave a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// None could be reached.
    HostDown,
    /// The version exists nowhere any more.
    Stale,
    /// Those that have it refuse.
    Refused,
    /// The bytes are wrong everywhere, or the holders failed.
    Io,
    /// Not a failure of holders: reading ahead had no room, or the program stops.
    Postponed,
}

impl From<Failure> for FsError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::HostDown => Self::new(Kind::HostDown, "no holder of the bytes is reachable"),
            Failure::Stale => Self::new(Kind::Stale, "this version exists nowhere any more"),
            Failure::Refused => Self::new(Kind::AccessDenied, "the holders of the bytes refuse"),
            Failure::Io => Self::new(Kind::Io, "no holder could give the right bytes"),
            Failure::Postponed => Self::new(Kind::Io, "the read was given up"),
        }
    }
}

#[derive(Clone, Debug)]
struct Holder {
    device: DeviceId,
    version: Version,
    /// A handle was opened on it; the others have the same content, says the index.
    opened: bool,
}

impl Holder {
    fn id(&self) -> (DeviceId, LocationId, FileId) {
        (self.device, self.version.location, self.version.file)
    }
}

/// Gets ranges of one version.
pub(super) struct Fetcher {
    content: Arc<Content>,
    id: Option<ContentId>,
    size: u64,
    /// As opened, with their owners.
    versions: Mutex<Vec<Holder>>,
    /// The result of the last look-up.
    holders: Mutex<Option<(Instant, Vec<Holder>)>>,
    liars: Mutex<HashSet<(DeviceId, LocationId, FileId)>>,
    link: Mutex<Link>,
    under_way_bytes: AtomicU64,
    /// Another device has given some of it.
    is_from_afar: AtomicBool,
    progress: Mutex<Instant>,
}

/// A range and the right to hold it in memory, or why there is none.
type Answered = Result<(Fetched, Option<OwnedSemaphorePermit>), FetchError>;

/// What became of a question.
enum Answer {
    Right(Bytes),
    Wrong(&'static str),
    Refusal(FetchError),
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
    pub(super) fn new(content: Arc<Content>, id: Option<ContentId>, size: u64) -> Self {
        Self {
            content,
            id,
            size,
            versions: Mutex::default(),
            holders: Mutex::default(),
            liars: Mutex::default(),
            link: Mutex::default(),
            under_way_bytes: AtomicU64::new(0),
            is_from_afar: AtomicBool::new(false),
            progress: Mutex::new(Instant::now()),
        }
    }

    /// A place where the version was opened.
    pub(super) fn add_version(&self, owner: DeviceId, version: Version) {
        let mut versions = lock(&self.versions);
        let new = Holder { device: owner, version, opened: true };
        let is_new =
            !versions.iter().any(|known| known.device == owner && known.version == new.version);
        if is_new && versions.len() < MAX_HOLDERS {
            versions.push(new);
            lock(&self.holders).take();
        }
    }

    /// A place where the version was opened, for messages and for the index.
    pub(super) fn a_version(&self) -> Option<Version> {
        lock(&self.versions).first().map(|holder| holder.version.clone())
    }

    /// Whether another device has given some of it.
    pub(super) fn is_from_afar(&self) -> bool {
        self.is_from_afar.load(Ordering::Relaxed)
    }

    pub(super) fn link(&self) -> Link {
        *lock(&self.link)
    }

    /// The bytes of a fetchable range, right ones. `ahead`: nobody waits for them yet.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        range: Range<u64>,
        ahead: bool,
    ) -> Result<Bytes, Failure> {
        let len = range.end - range.start;
        let under_way = self.under_way_bytes.fetch_add(len, Ordering::Relaxed) + len;
        let _less = Less(&self.under_way_bytes, len);
        self.content.flying.fetch_add(1, Ordering::Relaxed);
        let _landed = Less(&self.content.flying, 1);
        let started = Instant::now();
        let bytes = self.ask_holders(range, ahead, started).await?;
        lock(&self.link).note(under_way, started.elapsed());
        *lock(&self.progress) = Instant::now();
        self.content.cache.count_fetched(bytes.len());
        Ok(bytes)
    }

    async fn ask_holders(
        self: &Arc<Self>,
        range: Range<u64>,
        ahead: bool,
        started: Instant,
    ) -> Result<Bytes, Failure> {
        let mut left = self.holders().await?;
        let mut heard = Heard::default();
        let mut pause = *PAUSES.start();
        loop {
            heard.unreachable = false;
            let mut again = Vec::new();
            let count = left.len();
            for (n, holder) in left.into_iter().enumerate() {
                if !self.may_answer(&holder) {
                    heard.unreachable = true;
                    again.push(holder);
                    continue;
                }
                let patience = (n + 1 < count).then_some(PATIENCE);
                let asked = Instant::now();
                match self.ask(&holder, &range, ahead, started, patience).await? {
                    Answer::Right(bytes) => {
                        if holder.device != self.content.index.me() {
                            self.is_from_afar.store(true, Ordering::Relaxed);
                        }
                        return Ok(bytes);
                    }
                    Answer::Wrong(what) => {
                        heard.wrong = true;
                        self.report(&holder, &range, what);
                    }
                    Answer::Refusal(FetchError::Stale) => heard.stale |= holder.opened,
                    Answer::Refusal(FetchError::Refused) => heard.refused = true,
                    Answer::Refusal(FetchError::Unreachable) => {
                        heard.unreachable = true;
                        // A silent one costs its patience each time it is asked.
                        if holder.opened || asked.elapsed() < PATIENCE {
                            again.push(holder);
                        }
                    }
                    Answer::Refusal(FetchError::Failed(why)) => {
                        tracing::debug!(device = %holder.device, "a range could not be had: {why}");
                        if started.elapsed() < FAILED_PATIENCE {
                            again.push(holder);
                        }
                    }
                }
            }
            let hope = again.iter().any(|holder| self.may_answer(holder));
            if ahead || !hope || Instant::now() + pause >= self.deadline(started) {
                return Err(heard.failure());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*PAUSES.end());
            left = again;
        }
    }

    /// Who may have the bytes, the nearest first.
    async fn holders(self: &Arc<Self>) -> Result<Vec<Holder>, Failure> {
        let known = lock(&self.holders).clone();
        let known = known.filter(|(at, _)| at.elapsed() < LOOK_UP_AFTER);
        let mut holders = match known {
            Some((_, holders)) => holders,
            None => {
                let this = self.clone();
                let found = self.content.runtime.spawn_blocking(move || this.look_up()).await;
                let found = found.map_err(|_| Failure::Postponed)?;
                *lock(&self.holders) = Some((Instant::now(), found.clone()));
                found
            }
        };
        let liars = lock(&self.liars);
        holders.retain(|holder| !liars.contains(&holder.id()));
        Ok(holders)
    }

    /// Blocks on the index.
    fn look_up(&self) -> Vec<Holder> {
        let me = self.content.index.me();
        let mut holders = lock(&self.versions).clone();
        match self.id.map(|id| self.indexed_holders(id)) {
            Some(Ok(indexed)) => holders.extend(indexed),
            Some(Err(e)) => tracing::warn!("holders could not be looked up: {e}"),
            None => {}
        }
        let mut seen = HashSet::new();
        holders.retain(|holder| seen.insert((holder.id(), holder.version.stamp)));
        // This device's own, the owners as opened, then the others; of each device one before
        // another one of any, so that a silent device costs its patience once.
        let mut of_device: HashMap<DeviceId, usize> = HashMap::new();
        let mut place = |holder: &Holder| {
            let count = of_device.entry(holder.device).or_default();
            *count += 1;
            (holder.device != me, *count)
        };
        let mut placed: Vec<_> = holders.into_iter().map(|h| (place(&h), h)).collect();
        placed.sort_by_key(|(place, _)| *place);
        let mut holders: Vec<_> = placed.into_iter().map(|(_, holder)| holder).collect();
        holders.truncate(MAX_HOLDERS);
        holders
    }

    fn indexed_holders(&self, id: ContentId) -> Result<Vec<Holder>, IndexError> {
        let index = &self.content.index;
        let view = index.view()?;
        let mut holders = Vec::new();
        let mut of_device: HashMap<DeviceId, usize> = HashMap::new();
        for (no, file) in view.holders(id)? {
            let Some(location) = index.location(no) else { continue };
            let count = of_device.entry(location.owner).or_default();
            *count += 1;
            if *count > MAX_HOLDERS_EACH && location.owner != index.me() {
                continue;
            }
            let Some(node) = view.node(no, file)? else { continue };
            let entry = node.entry;
            if entry.content == Some(id) && entry.attr.size == self.size {
                let (location, device) = (location.id, location.owner);
                let version = Version { location, file, stamp: entry.stamp(), content: Some(id) };
                holders.push(Holder { device, version, opened: false });
            }
        }
        Ok(holders)
    }

    fn may_answer(&self, holder: &Holder) -> bool {
        holder.device == self.content.index.me() || self.content.source.is_reachable(holder.device)
    }

    /// A read is given up when nothing at all has come for the configured time.
    fn deadline(&self, started: Instant) -> Instant {
        started.max(*lock(&self.progress)) + self.content.config.read_deadline
    }

    async fn ask(
        self: &Arc<Self>,
        holder: &Holder,
        range: &Range<u64>,
        ahead: bool,
        started: Instant,
        patience: Option<Duration>,
    ) -> Result<Answer, Failure> {
        let answered = if holder.device == self.content.index.me() {
            self.read_own(holder.version.clone(), range.clone()).await
        } else {
            self.ask_remote(holder, range, ahead, started, patience).await?
        };
        match answered {
            Ok((fetched, _permit)) => self.check(fetched, range.clone()).await,
            Err(refusal) => Ok(Answer::Refusal(refusal)),
        }
    }

    async fn read_own(self: &Arc<Self>, version: Version, range: Range<u64>) -> Answered {
        let content = self.content.clone();
        let read = move || content.own.read(content.index.me(), &version, range);
        let read = self.content.runtime.spawn_blocking(read).await;
        let fetched = read.unwrap_or_else(|e| Err(FetchError::Failed(e.to_string())))?;
        Ok((fetched, None))
    }

    async fn ask_remote(
        &self,
        holder: &Holder,
        range: &Range<u64>,
        ahead: bool,
        started: Instant,
        patience: Option<Duration>,
    ) -> Result<Answered, Failure> {
        let under_way = self.content.under_way_from(holder.device);
        let kib = (range.end - range.start).min(MAX_FETCH_BYTES).div_ceil(1024) as u32;
        let asked = Instant::now();
        let give_up = |this: &Self| match patience {
            Some(patience) => this.deadline(started).min(asked + patience),
            None => this.deadline(started),
        };
        let fetch = async {
            let permit = match ahead {
                true => under_way.try_acquire_many_owned(kib).map_err(|_| Failure::Postponed)?,
                false => {
                    let permit = under_way.acquire_many_owned(kib).await;
                    permit.map_err(|_| Failure::Postponed)?
                }
            };
            let fetched =
                self.content.source.fetch(holder.device, &holder.version, range.clone()).await;
            Ok(fetched.map(|fetched| (fetched, Some(permit))))
        };
        tokio::pin!(fetch);
        loop {
            let until = give_up(self);
            match timeout_at(until, &mut fetch).await {
                Ok(answered) => return answered,
                // Other ranges arrived meanwhile: the link is slow, not dead.
                Err(_) if give_up(self) > until => {}
                Err(_) => return Ok(Err(FetchError::Unreachable)),
            }
        }
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

    fn report(&self, holder: &Holder, range: &Range<u64>, what: &str) {
        lock(&self.liars).insert(holder.id());
        let what = format!("what came for the bytes {}..{} {what}", range.start, range.end);
        self.content.report(holder.device, &holder.version, what);
    }
}

struct Less<'a>(&'a AtomicU64, u64);

impl Drop for Less<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
