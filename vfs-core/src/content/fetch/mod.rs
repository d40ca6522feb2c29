//! One range of a version, from the first holder that has it right.
//!
//! Holders are this device's own locations, the owner, other devices whose locations
//! have the same content, and devices that have it in their cache, which are asked for
//! that when none of these gives it, when one is late and no other is known, or when
//! much is read. Which of them is asked first is decided for each range
//! ([`super::choice`]). One that is late while somebody waits is not left: another is
//! asked besides, and whoever is first wins. One that stays silent is given up while
//! there is another. What comes for a known content id is checked before it leaves here;
//! a holder whose bytes are wrong is reported and not asked again for this version.
//!
//! | module | what it is |
//! |---|---|
//! | `holders` | who has the bytes in a location |
//! | `lenders` | who has them in a cache: asked for that, and remembered |
//! | `round` | one holder after the other, until one has given the range |
//! | `hedge` | another one is asked besides one that is late |
//! | `request` | one request to one holder, and the check of what comes |
//! | `probe` | what holders can do of which nothing is known |
//! | `supply` | a device as a holder: what is under way from it, how fast it is |
//!
//! **Locks**, in this order: `versions` before `holders`, `liars` before `lenders`; each of
//! the others alone. None is held across an await.

mod hedge;
mod holders;
mod lenders;
mod probe;
mod request;
mod round;
mod supply;

pub(super) use supply::Supply;

use super::window::Link;
use super::{Content, Counted, lock};
use crate::error::{FsError, Kind};
use crate::model::{ContentId, DeviceId};
use crate::source::Version;
use bytes::Bytes;
use holders::{Holder, HolderId, MAX_HOLDERS, Place};
use lenders::Lenders;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use tokio::time::Instant;

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

/// A range that is asked for, of whoever has it.
pub(super) struct RangeRequest<'a> {
    range: Range<u64>,
    /// It was planned before anybody read it.
    ahead: bool,
    started: Instant,
    /// Somebody waits for it.
    wanted: &'a AtomicBool,
    /// Somebody else than those that are asked may give it.
    has_another: AtomicBool,
}

impl<'a> RangeRequest<'a> {
    /// Begins now; `wanted` says whether somebody waits for it by now.
    pub(super) fn new(range: Range<u64>, ahead: bool, wanted: &'a AtomicBool) -> Self {
        Self { range, ahead, started: Instant::now(), wanted, has_another: AtomicBool::new(false) }
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn has_another(&self) -> bool {
        self.has_another.load(Ordering::Relaxed)
    }

    fn set_has_another(&self, has_another: bool) {
        self.has_another.store(has_another, Ordering::Relaxed);
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
        let new = self.holder(owner, Place::Location { version, is_opened: true });
        let mut versions = lock(&self.versions);
        let is_new =
            !versions.iter().any(|known| known.device == owner && known.version() == new.version());
        if is_new && versions.len() < MAX_HOLDERS {
            versions.push(new);
            lock(&self.holders).take();
        }
    }

    /// A place where the version was opened, for messages and for the index.
    pub(super) fn a_version(&self) -> Option<Version> {
        lock(&self.versions).first().and_then(|holder| holder.version().cloned())
    }

    /// Whether another device has given some of it.
    pub(super) fn is_from_afar(&self) -> bool {
        self.is_from_afar.load(Ordering::Relaxed)
    }

    pub(super) fn link(&self) -> Link {
        *lock(&self.link)
    }

    /// The bytes of a fetchable range, right ones.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        request: &RangeRequest<'_>,
    ) -> Result<Bytes, Failure> {
        let under_way = Counted::new(&self.under_way_bytes, request.len());
        let _flying = Counted::new(&self.content.flying, 1);
        let bytes = self.ask_holders(request).await?;
        lock(&self.link).note(under_way.with_it, request.started.elapsed());
        *lock(&self.progress) = Instant::now();
        self.content.cache.count_fetched(bytes.len());
        self.look_for_more(request);
        Ok(bytes)
    }

    fn may_answer(&self, holder: &Holder) -> bool {
        holder.device == self.content.index.me() || self.content.source.is_reachable(holder.device)
    }

    /// A read is given up when nothing at all has come for the configured time.
    fn deadline(&self, started: Instant) -> Instant {
        started.max(*lock(&self.progress)) + self.content.config.read_deadline
    }

    fn report(&self, holder: &Holder, range: &Range<u64>, what: &str) {
        lock(&self.liars).insert(holder.id());
        let what = format!("what came for the bytes {}..{} {what}", range.start, range.end);
        // A cache has no name for the file: it is told by the one under which it was opened.
        if let Some(version) = holder.version().cloned().or_else(|| self.a_version()) {
            self.content.report(holder.device, &version, what);
        }
    }
}
