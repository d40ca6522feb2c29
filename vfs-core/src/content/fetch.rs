//! One range of a version, from the first holder that has it right.
//!
//! Holders are this device's own locations, the owner, other devices whose locations
//! have the same content, and, when none of these answers or much is read, devices
//! that have it in their cache, which are asked for that. Which of them is asked first
//! is decided for each range ([`super::choice`]). One that is late while somebody waits
//! is not left: another is asked besides, and whoever is first wins. What comes for a
//! known content id is checked before it leaves here; a holder whose bytes are wrong is
//! reported and not asked again for this version.

use super::choice::{Landed, Pace, Rank, late_after};
use super::manifest::verify;
use super::window::Link;
use super::{Content, lock};
use crate::error::{FsError, Kind};
use crate::index::IndexError;
use crate::model::{ContentId, DeviceId, FileId, LocationId};
use crate::source::{ContentSource, FetchError, Fetched, MAX_FETCH_BYTES, Version, Wanted};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

/// How many holders are considered: a common small file may be in thousands of places.
const MAX_HOLDERS: usize = 32;
/// How many of them are one other device's: one that lists the bytes often but is silent must
/// not crowd out those that answer.
const MAX_HOLDERS_EACH: usize = 2;
/// A holder may be silent for so long while there is another to try; twice as long if it answers
/// other requests meanwhile, or longer if the bytes are known to take that.
const PATIENCE: Duration = Duration::from_secs(2);
/// But not longer than this, however slow it is known to be.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
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
/// How many devices are asked together.
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
    /// It can give a range without reading all of the file first.
    is_ready: bool,
    supply: Arc<Supply>,
    /// The round trip to it when it was looked up; none, if that is not known.
    rtt: Duration,
}

/// How a holder is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Is {
    Opened,
    Indexed,
    Lender { is_ready: bool },
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

    /// Whether it comes last, as it brought nothing or nothing of use.
    #[cfg(test)]
    pub(super) fn is_silent(&self) -> bool {
        let rank = lock(&self.pace).rank(1, Duration::ZERO, Instant::now());
        matches!(rank, Rank::Silent(_))
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
    /// Those that lend it and were ever among them.
    lenders: Vec<HolderId>,
    heard: Heard,
}

impl Round {
    fn of(left: Vec<Holder>) -> Self {
        let lenders = left.iter().filter(|holder| holder.lends).map(Holder::id).collect();
        Self { left, again: Vec::new(), lenders, heard: Heard::default() }
    }
}

/// One of several holders that are asked for the same range.
struct Racer<'a> {
    holder: Holder,
    asked: Instant,
    /// What was under way from it then, with this range.
    under_way_bytes: u64,
    answer: Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send + 'a>>,
}

/// Who has it in a cache, by the last question for that.
#[derive(Default)]
struct Lenders {
    holders: Vec<Holder>,
    /// When it was asked; none if what was said is not enough any more.
    asked: Option<Instant>,
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
        self.asked.is_some_and(|asked| self.is_open || now - asked < believed_for)
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

/// Gets ranges of one version.
pub(super) struct Fetcher {
    content: Arc<Content>,
    id: Option<ContentId>,
    size: u64,
    /// As opened, with their owners.
    versions: Mutex<Vec<Holder>>,
    /// The result of the last look-up.
    holders: Mutex<Option<(Instant, Vec<Holder>)>>,
    lenders: watch::Sender<Lenders>,
    /// When it was last looked for more holders of a large file.
    looked: Mutex<Option<Instant>>,
    liars: Mutex<HashSet<HolderId>>,
    link: Mutex<Link>,
    under_way_bytes: AtomicU64,
    /// Another device has given some of it.
    is_from_afar: AtomicBool,
    progress: Mutex<Instant>,
}

/// A range, how it came, and the right to hold it in memory; or why there is none.
type Answered = Result<(Fetched, Landed, OwnedSemaphorePermit), FetchError>;

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
            lenders: watch::Sender::default(),
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
        let lends = matches!(is, Is::Lender { .. });
        let is_ready = is != Is::Lender { is_ready: false };
        Holder { device, version, opened: is == Is::Opened, lends, is_ready, supply, rtt }
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
        if !self.has_another(&round) {
            self.add_lenders(&mut round, ask).await;
        }
        let mut pause = *PAUSES.start();
        loop {
            round.heard.unreachable = false;
            while let Some(holder) = self.take_next(&mut round, ask, &[]) {
                if let Some(bytes) = self.ask_with_another(holder, &mut round, ask).await? {
                    return Ok(bytes);
                }
            }
            round.heard.unreachable |= !round.left.is_empty();
            round.left.append(&mut round.again);
            self.add_lenders(&mut round, ask).await;
            let hope = self.has_another(&round);
            if ask.ahead || !hope || Instant::now() + pause >= self.deadline(ask.started) {
                return Err(round.heard.failure());
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(*PAUSES.end());
        }
    }

    /// Takes the holder out that is the next to be asked, by what is known now; beside those that
    /// are `late` it is on another device, and none that was silent itself.
    fn take_next(&self, round: &mut Round, ask: &Ask<'_>, late: &[DeviceId]) -> Option<Holder> {
        let now = Instant::now();
        let may_be_asked = |(_, holder): &(usize, &Holder)| {
            !late.contains(&holder.device) && self.may_answer(holder)
        };
        let ranked = round.left.iter().enumerate().filter(may_be_asked);
        let ranked = ranked.map(|(n, holder)| (self.rank(holder, ask.len(), now), n));
        let (rank, n) = ranked.min()?;
        let is_useful = late.is_empty() || !matches!(rank, Rank::Silent(_));
        is_useful.then(|| round.left.remove(n))
    }

    fn rank(&self, holder: &Holder, bytes: u64, now: Instant) -> Rank {
        if holder.device == self.content.index.me() {
            return Rank::Own;
        }
        match lock(&holder.supply.pace).rank(bytes, holder.rtt, now) {
            Rank::Expected(_) | Rank::Unknown(_) if !holder.is_ready => Rank::Unready(holder.rtt),
            rank => rank,
        }
    }

    /// Asks a holder, and another one besides when it is late and somebody waits. None: those that
    /// were asked gave no right bytes, which is noted.
    async fn ask_with_another(
        self: &Arc<Self>,
        first: Holder,
        round: &mut Round,
        ask: &Ask<'_>,
    ) -> Result<Option<Bytes>, Failure> {
        let has_another = AtomicBool::new(self.has_another(round));
        let asked = Instant::now();
        let (late, under_way_bytes) = {
            let pace = lock(&first.supply.pace);
            let expected = pace.expected(ask.len(), first.rtt, asked);
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

    /// Whether there is one to ask that was not asked in this round.
    fn has_another(&self, round: &Round) -> bool {
        round.left.iter().any(|holder| self.may_answer(holder))
    }

    /// What came of a question that brought no bytes.
    fn note(&self, holder: Holder, answer: Answer, round: &mut Round, ask: &Ask<'_>) {
        let heard = &mut round.heard;
        match answer {
            Answer::Right(_) => {}
            Answer::Wrong(what) => {
                heard.wrong = true;
                self.report(&holder, &ask.range, what);
                self.forget_lender(&holder);
            }
            Answer::Refusal(FetchError::Stale | FetchError::Refused) if holder.lends => {
                self.forget_lender(&holder);
            }
            Answer::Refusal(FetchError::Stale) => heard.stale |= holder.opened,
            Answer::Refusal(FetchError::Refused) => heard.refused = true,
            Answer::Refusal(FetchError::Unreachable | FetchError::NotNow) => {
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
        holders.extend(self.lenders.borrow().holders.iter().cloned());
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

    /// Has those asked besides that have it in a cache.
    async fn add_lenders(self: &Arc<Self>, round: &mut Round, ask: &Ask<'_>) {
        if !ask.ahead || ask.is_waited_for() {
            self.find_lenders().await;
            self.join_lenders(round);
        }
    }

    /// Those that are known by now.
    fn join_lenders(&self, round: &mut Round) {
        let liars = lock(&self.liars);
        for lender in &self.lenders.borrow().holders {
            let id = lender.id();
            if !round.lenders.contains(&id) && !liars.contains(&id) {
                round.lenders.push(id);
                round.left.push(lender.clone());
            }
        }
    }

    /// Waits for the first that say they have it in a cache, unless that is known. Others may be
    /// added later.
    async fn find_lenders(self: &Arc<Self>) {
        let mut lenders = self.lenders.subscribe();
        self.ask_for_lenders();
        let asked = lenders.borrow().asked;
        let until = asked.unwrap_or_else(Instant::now) + LENDERS_ANSWER;
        let some = lenders.wait_for(|lenders| !lenders.is_open || !lenders.holders.is_empty());
        if timeout_at(until, some).await.is_ok() {
            let all = lenders.wait_for(|lenders| !lenders.is_open);
            drop(timeout(LENDERS_AFTER_FIRST, all).await);
        }
    }

    /// Has the connected devices asked, unless it is known who has it.
    fn ask_for_lenders(self: &Arc<Self>) {
        let version = self.a_version().filter(|version| version.content.is_some());
        let Some((content, version)) = self.id.zip(version) else { return };
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
            let lied = |device| liars.iter().any(|(liar, .., lent)| *liar == device && *lent);
            devices.retain(|device| !failed.contains(device) && !lied(*device));
        }
        let wanted = Wanted { content, size: self.size };
        let fetcher = Arc::downgrade(self);
        let question = Question { fetcher, source, wanted, version, number };
        // With nobody to ask, it ends here.
        if !devices.is_empty() {
            self.content.runtime.spawn(question.ask(devices));
        }
    }

    /// It does not have it any more, or not right: also others are asked for, next time.
    fn forget_lender(&self, holder: &Holder) {
        if holder.lends {
            self.lenders.send_if_modified(|lenders| lenders.fail(holder.device));
        }
    }

    /// It has proved a range: its tree is there.
    fn note_ready(&self, device: DeviceId) {
        self.lenders.send_if_modified(|lenders| {
            let known = lenders.holders.iter_mut().find(|lender| lender.device == device);
            known.is_some_and(|lender| !std::mem::replace(&mut lender.is_ready, true))
        });
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
        has_another: &AtomicBool,
    ) -> Result<Answer, Failure> {
        if holder.device == self.content.index.me() {
            return match self.read_own(holder.version.clone(), ask.range.clone()).await {
                Ok(fetched) => self.check(fetched, ask.range.clone()).await,
                Err(refusal) => Ok(Answer::Refusal(refusal)),
            };
        }
        let answer = self.ask_remote(holder, ask, has_another).await?;
        if matches!(answer, Answer::Right(_)) {
            self.is_from_afar.store(true, Ordering::Relaxed);
        }
        Ok(answer)
    }

    async fn read_own(
        self: &Arc<Self>,
        version: Version,
        range: Range<u64>,
    ) -> Result<Fetched, FetchError> {
        let content = self.content.clone();
        let read = move || content.own.read(content.index.me(), &version, range);
        let read = self.content.runtime.spawn_blocking(read).await;
        read.unwrap_or_else(|e| Err(FetchError::Failed(e.to_string())))
    }

    /// Asks another device, checks what comes, and notes what that says of the device.
    async fn ask_remote(
        self: &Arc<Self>,
        holder: &Holder,
        ask: &Ask<'_>,
        has_another: &AtomicBool,
    ) -> Result<Answer, Failure> {
        let answered = self.request_in_time(holder, ask, has_another).await?;
        let answer = match answered {
            Ok((fetched, landed, _permit)) => {
                let answer = self.check(fetched, ask.range.clone()).await?;
                if matches!(answer, Answer::Right(_)) {
                    lock(&holder.supply.pace).landed(landed, Instant::now());
                    if !holder.is_ready {
                        self.note_ready(holder.device);
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
        ask: &Ask<'_>,
        has_another: &AtomicBool,
    ) -> Result<Answered, Failure> {
        let asked = Instant::now();
        let give_up = || {
            let deadline = self.deadline(ask.started);
            match has_another.load(Ordering::Relaxed) {
                true => deadline.min(lose_patience(holder, ask.len(), asked)),
                // Other ranges may arrive meanwhile: the link is slow then, not dead.
                false => deadline,
            }
        };
        let request = self.request(holder, ask);
        tokio::pin!(request);
        loop {
            let until = give_up().min(Instant::now() + LOOK_EVERY);
            match timeout_at(until, &mut request).await {
                Ok(answered) => return answered,
                Err(_) if Instant::now() < give_up() => {}
                Err(_) => return Ok(Err(FetchError::Unreachable)),
            }
        }
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
        Ok(fetched.map(|fetched| (fetched, under_way.landed(holder.rtt), permit)))
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
            fetcher.find_lenders().await;
            let mut holders = fetcher.holders().await.unwrap_or_default();
            // One that has to read its whole file for the first range is asked for that if no other
            // lends it, and one only.
            let mut may_wait = !holders.iter().any(|holder| holder.lends && holder.is_ready);
            let mut is_worth_it =
                |holder: &Holder| holder.is_ready || std::mem::replace(&mut may_wait, false);
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
        if !may_probe && holder.is_ready {
            return;
        }
        // What is read is not wanted: these bytes come from elsewhere.
        let ask = Ask::new(range, true, &|| false);
        let answer = self.ask_remote(holder, &ask, &AtomicBool::new(true)).await;
        if let Ok(Answer::Wrong(what)) = answer {
            self.report(holder, &ask.range, what);
            self.forget_lender(holder);
        }
    }

    fn report(&self, holder: &Holder, range: &Range<u64>, what: &str) {
        lock(&self.liars).insert(holder.id());
        let what = format!("what came for the bytes {}..{} {what}", range.start, range.end);
        self.content.report(holder.device, &holder.version, what);
    }
}

/// A question for who has a content in its cache. It goes on while nobody waits for it.
struct Question {
    fetcher: Weak<Fetcher>,
    source: Arc<dyn ContentSource>,
    wanted: Wanted,
    version: Version,
    number: u64,
}

impl Question {
    /// Asks some of the devices, and more of them while none has it.
    async fn ask(self, devices: Vec<DeviceId>) {
        let mut asked = JoinSet::new();
        let mut is_lent = false;
        for some in devices.chunks(MAX_LENDERS) {
            for device in some {
                asked.spawn(lends(self.source.clone(), *device, self.wanted));
            }
            is_lent |= self.hear(&mut asked, LENDERS_ANSWER).await;
            if is_lent {
                break;
            }
        }
        self.hear(&mut asked, NOT_LENT_FOR).await;
    }

    /// Whether one of them has it.
    async fn hear(&self, asked: &mut JoinSet<(DeviceId, Option<bool>)>, time: Duration) -> bool {
        let (mut is_lent, until) = (false, Instant::now() + time);
        while let Ok(Some(answered)) = timeout_at(until, asked.join_next()).await {
            let Ok((device, Some(is_ready))) = answered else { continue };
            is_lent = true;
            let Some(fetcher) = self.fetcher.upgrade() else { break };
            let lender = fetcher.holder(device, self.version.clone(), Is::Lender { is_ready });
            self.tell(&fetcher, |lenders| lenders.holders.push(lender));
        }
        is_lent
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
            self.tell(&fetcher, |lenders| lenders.is_open = false);
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

/// When a device is not waited for any more that did not answer while there is another.
fn lose_patience(holder: &Holder, bytes: u64, asked: Instant) -> Instant {
    let now = Instant::now();
    let pace = lock(&holder.supply.pace);
    // A device that answers other requests meanwhile is slow, not silent, but a file may be out of
    // its reach.
    let heard = pace.last_heard().map_or(asked, |at| at.max(asked));
    let most = (2 * PATIENCE).max(late_after(pace.expected(bytes, holder.rtt, now)));
    (asked + most.min(MOST_PATIENCE)).min(heard + PATIENCE)
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

    fn landed(&self, rtt: Duration) -> Landed {
        Landed { under_way_bytes: self.with_others, took: self.begun.elapsed(), rtt }
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
