//! One range of a version, from the first holder that has it right.
//!
//! Holders are this device's own locations, the owner, other devices whose locations
//! have the same content, and, when none of these answers or much is read, devices
//! that have it in their cache, which are asked for that. Which of them is asked first
//! is decided for each range ([`super::choice`]). One that is late while somebody waits
//! is not left: another is asked besides, and whoever is first wins. What comes for a
//! known content id is checked before it leaves here; a holder whose bytes are wrong is
//! reported and not asked again for this version.

use super::choice::{Pace, Rank, late_after};
use super::manifest::verify;
use super::window::Link;
use super::{Content, lock};
use crate::error::{FsError, Kind};
use crate::index::IndexError;
use crate::model::{ContentId, DeviceId, FileId, LocationId};
use crate::source::{FetchError, Fetched, MAX_FETCH_BYTES, Version, Wanted};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

/// How many holders are considered: a common small file may be in thousands of places.
const MAX_HOLDERS: usize = 32;
/// How many of them are one other device's: one that lists the bytes often but is silent must
/// not crowd out those that answer.
const MAX_HOLDERS_EACH: usize = 2;
/// A holder may be silent for so long while there is another to try.
const PATIENCE: Duration = Duration::from_secs(2);
/// A holder whose disk or program fails is asked again for this long.
const FAILED_PATIENCE: Duration = Duration::from_secs(1);
/// How long the holders found in the index are not looked up again.
const LOOK_UP_AFTER: Duration = Duration::from_secs(1);
/// How long devices may take to say what they have in their caches, and how long the others may
/// take after the first one that has it.
const LENDERS_ANSWER: Duration = Duration::from_secs(1);
const LENDERS_AFTER_FIRST: Duration = Duration::from_millis(50);
/// How long it is believed that nobody has it, and that those have it who said so.
const NOT_LENT_FOR: Duration = Duration::from_secs(3);
const LENT_FOR: Duration = Duration::from_secs(30);
/// How many devices are asked.
const MAX_LENDERS: usize = 16;
/// How often it is looked whether somebody waits for a late flight by now.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A file of this size may be worth being read from several holders.
const LARGE_BYTES: u64 = 16 << 20;
/// How often holders are looked for that are not known.
const LOOK_FOR_MORE_EVERY: Duration = Duration::from_secs(5);
/// What is read from a holder to find out what it can do.
const PROBE_BYTES: u64 = 256 << 10;
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

#[derive(Clone)]
struct Holder {
    device: DeviceId,
    version: Version,
    /// A handle was opened on it; the others have the same content, says the index.
    opened: bool,
    /// In its cache, says the device; `version` is where this device knows it from.
    lends: bool,
    supply: Arc<Supply>,
    /// The round trip to it when it was looked up; none, if that is not known.
    rtt: Duration,
}

/// How a holder is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    Opened,
    Indexed,
    Lender,
}

/// What tells a holder from the others: the file, and whether that is in a location.
type HolderId = (DeviceId, LocationId, FileId, bool);

impl Holder {
    fn id(&self) -> HolderId {
        (self.device, self.version.location, self.version.file, self.lends)
    }
}

/// A device as a holder, of whatever file.
pub(super) struct Supply {
    /// Room for what is under way from it, in KiB.
    room: Arc<Semaphore>,
    pace: Mutex<Pace>,
}

impl Supply {
    pub(super) fn new(room_kib: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(room_kib)), pace: Mutex::default() }
    }
}

/// What is asked for.
pub(super) struct Ask<'a> {
    range: Range<u64>,
    /// It was planned before anybody read it.
    ahead: bool,
    started: Instant,
    waited_for: &'a (dyn Fn() -> bool + Send + Sync),
}

impl<'a> Ask<'a> {
    /// Begins now; `waited_for` says whether somebody waits for it by now.
    pub(super) fn new(
        range: Range<u64>,
        ahead: bool,
        waited_for: &'a (dyn Fn() -> bool + Send + Sync),
    ) -> Self {
        Self { range, ahead, started: Instant::now(), waited_for }
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn is_waited_for(&self) -> bool {
        !self.ahead || (self.waited_for)()
    }
}

/// Where a flight stands with its holders.
struct Round {
    /// Not asked in this round.
    left: Vec<Holder>,
    /// To be asked again in the next one.
    again: Vec<Holder>,
    /// Those that lend it are among them.
    has_lenders: bool,
    heard: Heard,
}

impl Round {
    fn of(left: Vec<Holder>) -> Self {
        Self { left, again: Vec::new(), has_lenders: false, heard: Heard::default() }
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
    /// Who has it in a cache, by the last question, which one at a time asks.
    lent: Mutex<Option<(Instant, Vec<Holder>)>>,
    asking: tokio::sync::Mutex<()>,
    /// When it was last looked for more holders of a large file.
    looked: Mutex<Option<Instant>>,
    liars: Mutex<HashSet<HolderId>>,
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
            lent: Mutex::default(),
            asking: Default::default(),
            looked: Mutex::default(),
            liars: Mutex::default(),
            link: Mutex::default(),
            under_way_bytes: AtomicU64::new(0),
            is_from_afar: AtomicBool::new(false),
            progress: Mutex::new(Instant::now()),
        }
    }

    /// A place where the version was opened.
    pub(super) fn add_version(&self, owner: DeviceId, version: Version) {
        let new = self.holder(owner, version, Is::Opened);
        let mut versions = lock(&self.versions);
        let is_new =
            !versions.iter().any(|known| known.device == owner && known.version == new.version);
        if is_new && versions.len() < MAX_HOLDERS {
            versions.push(new);
            lock(&self.holders).take();
        }
    }

    fn holder(&self, device: DeviceId, version: Version, is: Is) -> Holder {
        let rtt = self.content.source.rtt(device).unwrap_or_default();
        let supply = self.content.supply_of(device);
        Holder { device, version, opened: is == Is::Opened, lends: is == Is::Lender, supply, rtt }
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

    /// The bytes of a fetchable range, right ones.
    pub(super) async fn fetch(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Bytes, Failure> {
        let len = ask.len();
        let under_way = self.under_way_bytes.fetch_add(len, Ordering::Relaxed) + len;
        let _less = Less(&self.under_way_bytes, len);
        self.content.flying.fetch_add(1, Ordering::Relaxed);
        let _landed = Less(&self.content.flying, 1);
        let bytes = self.ask_holders(ask).await?;
        lock(&self.link).note(under_way, ask.started.elapsed());
        *lock(&self.progress) = Instant::now();
        self.content.cache.count_fetched(bytes.len());
        self.look_for_more(ask);
        Ok(bytes)
    }

    async fn ask_holders(self: &Arc<Self>, ask: &Ask<'_>) -> Result<Bytes, Failure> {
        let mut round = Round::of(self.holders().await?);
        if !round.left.iter().any(|holder| self.may_answer(holder)) {
            self.add_lenders(&mut round, ask).await;
        }
        let mut pause = *PAUSES.start();
        loop {
            round.heard.unreachable = false;
            while let Some(holder) = self.take_next(&mut round, ask, None) {
                for (other, answer) in self.ask_with_another(&holder, &mut round, ask).await? {
                    match answer {
                        Answer::Right(bytes) => return Ok(bytes),
                        answer => {
                            let holder = other.unwrap_or_else(|| holder.clone());
                            self.note(holder, answer, &mut round, ask);
                        }
                    }
                }
            }
            round.heard.unreachable |= !round.left.is_empty();
            round.left.append(&mut round.again);
            self.add_lenders(&mut round, ask).await;
            let hope = round.left.iter().any(|holder| self.may_answer(holder));
            if ask.ahead || !hope || Instant::now() + pause >= self.deadline(ask.started) {
                return Err(round.heard.failure());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*PAUSES.end());
        }
    }

    /// Takes the holder out that is the next to be asked, by what is known now; beside one that is
    /// `late` it is on another device, and none that was silent itself.
    fn take_next(
        &self,
        round: &mut Round,
        ask: &Ask<'_>,
        late: Option<DeviceId>,
    ) -> Option<Holder> {
        let now = Instant::now();
        let may_be_asked =
            |(_, holder): &(usize, &Holder)| Some(holder.device) != late && self.may_answer(holder);
        let ranked = round.left.iter().enumerate().filter(may_be_asked);
        let ranked = ranked.map(|(n, holder)| (self.rank(holder, ask.len(), now), n));
        let (rank, n) = ranked.min()?;
        let is_useful = late.is_none() || !matches!(rank, Rank::Silent(_));
        is_useful.then(|| round.left.remove(n))
    }

    fn rank(&self, holder: &Holder, bytes: u64, now: Instant) -> Rank {
        match holder.device == self.content.index.me() {
            true => Rank::Own,
            false => lock(&holder.supply.pace).rank(bytes, holder.rtt, now),
        }
    }

    /// Asks a holder, and another one besides when it is late and somebody waits. The first right
    /// bytes are enough; the request that is not answered then is cancelled. Gives the answers, of
    /// the other one with its name.
    async fn ask_with_another(
        self: &Arc<Self>,
        first: &Holder,
        round: &mut Round,
        ask: &Ask<'_>,
    ) -> Result<Vec<(Option<Holder>, Answer)>, Failure> {
        let asked = Instant::now();
        let patience = self.patience(round);
        let (late, under_way) = {
            let pace = lock(&first.supply.pace);
            let expected = pace.expected(ask.len(), first.rtt, asked);
            (late_after(expected), pace.under_way_bytes() + ask.len())
        };
        let asking = self.ask(first, ask, patience);
        tokio::pin!(asking);
        if let Some(answer) = until_late(asking.as_mut(), late, ask).await {
            return Ok(vec![(None, answer?)]);
        }
        let other = match self.take_next(round, ask, Some(first.device)) {
            Some(other) => other,
            None => {
                tokio::select! {
                    answer = &mut asking => return Ok(vec![(None, answer?)]),
                    () = self.add_lenders(round, ask) => {}
                }
                match self.take_next(round, ask, Some(first.device)) {
                    Some(other) => other,
                    None => return Ok(vec![(None, asking.await?)]),
                }
            }
        };
        tracing::debug!(late = %first.device, asked = %other.device, "another holder is asked");
        let beside = self.ask(&other, ask, patience);
        tokio::pin!(beside);
        tokio::select! {
            answer = &mut asking => match answer? {
                right @ Answer::Right(_) => Ok(vec![(None, right)]),
                not => Ok(vec![(None, not), (Some(other.clone()), beside.await?)]),
            },
            answer = &mut beside => match answer {
                Ok(right @ Answer::Right(_)) => {
                    lock(&first.supply.pace).overtaken(under_way, asked, Instant::now());
                    Ok(vec![(Some(other.clone()), right)])
                }
                Ok(not) => Ok(vec![(Some(other.clone()), not), (None, asking.await?)]),
                // There is no room for its answer now.
                Err(_) => Ok(vec![(None, asking.await?)]),
            },
        }
    }

    /// How long a silent holder is waited for; without another one until the deadline.
    fn patience(&self, round: &Round) -> Option<Duration> {
        round.left.iter().any(|holder| self.may_answer(holder)).then_some(PATIENCE)
    }

    /// What came of a question that brought no bytes.
    fn note(&self, holder: Holder, answer: Answer, round: &mut Round, ask: &Ask<'_>) {
        let heard = &mut round.heard;
        match answer {
            Answer::Right(_) => {}
            Answer::Wrong(what) => {
                heard.wrong = true;
                self.report(&holder, &ask.range, what);
            }
            Answer::Refusal(FetchError::Stale | FetchError::Refused) if holder.lends => {
                self.forget_lender(holder.device);
            }
            Answer::Refusal(FetchError::Stale) => heard.stale |= holder.opened,
            Answer::Refusal(FetchError::Refused) => heard.refused = true,
            Answer::Refusal(FetchError::Unreachable) => {
                heard.unreachable = true;
                round.again.push(holder);
            }
            Answer::Refusal(FetchError::Failed(why)) => {
                tracing::debug!(device = %holder.device, "a range could not be had: {why}");
                if ask.started.elapsed() < FAILED_PATIENCE {
                    round.again.push(holder);
                }
            }
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
        if let Some((_, lenders)) = &*lock(&self.lent) {
            holders.extend(lenders.iter().cloned());
        }
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
                holders.push(self.holder(device, version, Is::Indexed));
            }
        }
        Ok(holders)
    }

    /// Has those asked besides that have it in a cache; once in a flight.
    async fn add_lenders(&self, round: &mut Round, ask: &Ask<'_>) {
        if ask.ahead && !ask.is_waited_for() || std::mem::replace(&mut round.has_lenders, true) {
            return;
        }
        let liars = |lender: &Holder| lock(&self.liars).contains(&lender.id());
        for lender in self.lenders().await {
            let is_known = round.left.iter().any(|known| known.id() == lender.id());
            if !is_known && !liars(&lender) {
                round.left.push(lender);
            }
        }
    }

    /// Who has it in a cache, as they say, or said a short time ago.
    async fn lenders(&self) -> Vec<Holder> {
        let Some(version) = self.a_version().filter(|version| version.content.is_some()) else {
            return Vec::new();
        };
        let _asking = self.asking.lock().await;
        if let Some((at, lenders)) = &*lock(&self.lent)
            && at.elapsed() < if lenders.is_empty() { NOT_LENT_FOR } else { LENT_FOR }
        {
            return lenders.clone();
        }
        let lenders = self.ask_for_lenders().await.into_iter();
        let lenders = lenders.map(|device| self.holder(device, version.clone(), Is::Lender));
        let lenders: Vec<_> = lenders.collect();
        *lock(&self.lent) = Some((Instant::now(), lenders.clone()));
        lenders
    }

    /// It has it no more.
    fn forget_lender(&self, device: DeviceId) {
        if let Some((_, lenders)) = &mut *lock(&self.lent) {
            lenders.retain(|lender| lender.device != device);
        }
    }

    /// Asks the connected devices, all at once. The first that have it are enough.
    async fn ask_for_lenders(&self) -> Vec<DeviceId> {
        let Some(content) = self.id else { return Vec::new() };
        let wanted = Wanted { content, size: self.size };
        let mut asked = JoinSet::new();
        for device in self.content.source.lenders().into_iter().take(MAX_LENDERS) {
            let source = self.content.source.clone();
            asked.spawn(async move {
                let lent = source.lends(device, &[wanted]).await.unwrap_or_default();
                // Parts are not asked for yet.
                (device, lent.first().is_some_and(|ranges| ranges.contains(&(0..wanted.size))))
            });
        }
        let mut lenders = Vec::new();
        let mut until = Instant::now() + LENDERS_ANSWER;
        while let Ok(Some(answered)) = timeout_at(until, asked.join_next()).await {
            let Ok((device, true)) = answered else { continue };
            lenders.push(device);
            until = until.min(Instant::now() + LENDERS_AFTER_FIRST);
        }
        lenders
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
        ask: &Ask<'_>,
        patience: Option<Duration>,
    ) -> Result<Answer, Failure> {
        let answered = if holder.device == self.content.index.me() {
            self.read_own(holder.version.clone(), ask.range.clone()).await
        } else {
            self.ask_remote(holder, ask, patience).await?
        };
        match answered {
            Ok((fetched, _permit)) => {
                let answer = self.check(fetched, ask.range.clone()).await?;
                if matches!(answer, Answer::Right(_)) && holder.device != self.content.index.me() {
                    self.is_from_afar.store(true, Ordering::Relaxed);
                }
                Ok(answer)
            }
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
        ask: &Ask<'_>,
        patience: Option<Duration>,
    ) -> Result<Answered, Failure> {
        let asked = Instant::now();
        let give_up = |this: &Self| {
            let deadline = this.deadline(ask.started);
            // A device that answers other requests meanwhile is slow, not silent.
            let heard = lock(&holder.supply.pace).last_heard().map_or(asked, |at| at.max(asked));
            patience.map_or(deadline, |patience| deadline.min(heard + patience))
        };
        let request = self.request(holder, ask);
        tokio::pin!(request);
        let answered = loop {
            let until = give_up(self);
            match timeout_at(until, &mut request).await {
                Ok(answered) => break answered?,
                // Other ranges arrived meanwhile: the link is slow, not dead.
                Err(_) if give_up(self) > until => {}
                Err(_) => break Err(FetchError::Unreachable),
            }
        };
        let mut pace = lock(&holder.supply.pace);
        match &answered {
            Ok(_) => {}
            Err(FetchError::Unreachable) => pace.stayed_silent(Instant::now()),
            Err(_) => pace.heard(Instant::now()),
        }
        drop(pace);
        Ok(answered)
    }

    /// The request itself, when there is room for its answer.
    async fn request(&self, holder: &Holder, ask: &Ask<'_>) -> Result<Answered, Failure> {
        let kib = ask.len().min(MAX_FETCH_BYTES).div_ceil(1024) as u32;
        let room = holder.supply.room.clone();
        let permit = match ask.ahead {
            true => room.try_acquire_many_owned(kib).map_err(|_| Failure::Postponed)?,
            false => room.acquire_many_owned(kib).await.map_err(|_| Failure::Postponed)?,
        };
        let under_way = UnderWay::begin(&holder.supply.pace, ask.len());
        let source = &self.content.source;
        let fetched = match self.id.filter(|_| holder.lends) {
            Some(content) => {
                let wanted = Wanted { content, size: self.size };
                source.borrow(holder.device, wanted, ask.range.clone()).await
            }
            None => source.fetch(holder.device, &holder.version, ask.range.clone()).await,
        };
        if fetched.is_ok() {
            under_way.landed(holder.rtt);
        }
        Ok(fetched.map(|fetched| (fetched, Some(permit))))
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

    /// While a large file is read in its order: finds out who else has it, and what those can do
    /// of whom nothing is known, with a range that nobody waits for.
    fn look_for_more(self: &Arc<Self>, ask: &Ask<'_>) {
        if !ask.ahead || self.size < LARGE_BYTES || ask.len() < PROBE_BYTES || self.id.is_none() {
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
        let (fetcher, start) = (Arc::downgrade(self), ask.range.start);
        self.content.runtime.spawn(async move {
            let Some(fetcher) = fetcher.upgrade() else { return };
            // Of the answer only the holders count, which are remembered.
            let _ = fetcher.lenders().await;
            for holder in fetcher.holders().await.unwrap_or_default() {
                fetcher.probe(&holder, start..start + PROBE_BYTES).await;
            }
        });
    }

    async fn probe(&self, holder: &Holder, range: Range<u64>) {
        let is_other = holder.device != self.content.index.me() && self.may_answer(holder);
        if !is_other || !lock(&holder.supply.pace).may_probe(Instant::now()) {
            return;
        }
        // What is read is not wanted: its bytes come from elsewhere, and are not checked here.
        let ask = Ask::new(range, true, &|| false);
        let _ = self.ask_remote(holder, &ask, Some(PATIENCE)).await;
    }

    fn report(&self, holder: &Holder, range: &Range<u64>, what: &str) {
        lock(&self.liars).insert(holder.id());
        let what = format!("what came for the bytes {}..{} {what}", range.start, range.end);
        self.content.report(holder.device, &holder.version, what);
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

/// Bytes that are under way from a device.
struct UnderWay<'a> {
    pace: &'a Mutex<Pace>,
    bytes: u64,
    with_others: u64,
    begun: Instant,
}

impl<'a> UnderWay<'a> {
    fn begin(pace: &'a Mutex<Pace>, bytes: u64) -> Self {
        let with_others = lock(pace).begin(bytes);
        Self { pace, bytes, with_others, begun: Instant::now() }
    }

    fn landed(&self, rtt: Duration) {
        let now = Instant::now();
        lock(self.pace).landed(self.with_others, now - self.begun, rtt, now);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        lock(self.pace).end(self.bytes);
    }
}

struct Less<'a>(&'a AtomicU64, u64);

impl Drop for Less<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
