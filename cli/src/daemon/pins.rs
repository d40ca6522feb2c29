//! `sd pin`, `sd unpin`, `sd evict`.

use super::parts::{Daemon, blocking, index_failure, pin_failure};
use super::report::rfc3339;
use super::serve::Link;
use crate::control::{Event, Pinning, Target};
use crate::failure::{Code, Failure, Outcome};
use crate::output::{size, size_above};
use crate::reply::{Cleared, DeviceName, PinItem, PinnedStatus, PinsReply, Tally, UnpinReply};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use vfs_core::content::pins::{Pin, PinError, Pinned, Standing};
use vfs_core::model::{FileId, LocationId, LocationNo};
use vfs_core::path::SdPath;

/// How often a waiting command hears how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

impl Daemon {
    /// Pins what these name; answers how much that is, and what of it is here.
    pub fn pin(&self, targets: &[Target]) -> Outcome<PinsReply> {
        let named: Vec<_> = targets.iter().map(|t| self.entry_of(t)).collect::<Outcome<_>>()?;
        let own = named.iter().find(|(_, location, _)| location.owner == self.me);
        if let Some((address, ..)) = own {
            return Err(own_failure(address));
        }
        for (address, location, file) in &named {
            self.pins.pin(location.no, *file).map_err(|e| unpinnable(address, e))?;
        }
        self.pins.catch_up().map_err(index_failure)?;
        Ok(self.reply(|pin| {
            named.iter().any(|(_, location, file)| (location.id, *file) == (pin.location, pin.file))
        }))
    }

    /// Everything that is pinned.
    pub fn list_pins(&self) -> Outcome<PinsReply> {
        self.membership()?;
        Ok(self.reply(|_| true))
    }

    fn reply(&self, is_meant: impl Fn(&Pin) -> bool) -> PinsReply {
        let pins = self.pins.list();
        let excess = self.pins.excess();
        PinsReply {
            pins: pins.iter().filter(|p| is_meant(&p.pin)).map(|p| self.pin_item(p)).collect(),
            over_limit_bytes: excess.of_limit_bytes,
            over_disk_bytes: excess.of_disk_bytes,
            limit_bytes: self.cache.stats().limit_bytes,
        }
    }

    fn pin_item(&self, pinned: &Pinned) -> PinItem {
        let pin = &pinned.pin;
        let owner = self.name_of(pin.owner);
        let (state, reason) = standing_words(&pinned.standing, &owner);
        let path: Vec<_> = pin.path.iter().map(|name| name.display()).collect();
        PinItem {
            address: self.pin_address(pin).to_string(),
            owner: DeviceName { id: pin.owner.to_string(), name: owner },
            location: pin.location_name.clone(),
            path: path.join("/"),
            since: rfc3339(pin.since),
            tally: tally(&pinned.tally),
            state: state.into(),
            reason,
        }
    }

    /// Where a pin is, or was last.
    fn pin_address(&self, pin: &Pin) -> SdPath {
        let location = self.index.location_by_id(pin.location);
        SdPath::File {
            device: self.name_of(pin.owner),
            location: Some(location.map_or_else(|| pin.location_name.clone(), |l| l.name.clone())),
            path: pin.path.clone(),
        }
    }

    /// The address of the pin that a file is under.
    pub fn pin_above(&self, no: LocationNo, file: FileId) -> Outcome<Option<String>> {
        let file = self.outbox.view().now(no, file);
        let pin = self.pins.covering(no, file).map_err(index_failure)?;
        Ok(pin.map(|pin| self.pin_address(&pin).to_string()))
    }

    pub fn pinned_status(&self) -> PinnedStatus {
        let (pins, total) = self.pins.total();
        PinnedStatus { pins: pins as u64, tally: tally(&total) }
    }

    /// What a person is told of pinned content that does not fit.
    pub fn pins_without_room(&self) -> Option<(String, String)> {
        let is_stuck = |p: &Pinned| matches!(p.standing, Standing::CacheFull | Standing::DiskFull);
        if !self.pins.list().iter().any(is_stuck) {
            return None;
        }
        let excess = self.pins.excess();
        let limit = self.cache.stats().limit_bytes;
        room_words(excess.of_limit_bytes, excess.of_disk_bytes, limit)
    }

    /// Waits until all of these is here, or more cannot come.
    pub async fn wait_pinned(
        self: &Arc<Self>,
        targets: Vec<Target>,
        timeout: Option<Duration>,
        link: &Link,
    ) -> Outcome<PinsReply> {
        let daemon = Arc::clone(self);
        let keys = blocking(move || daemon.pin_keys(&targets)).await?;
        let is_meant =
            |pin: &Pin| keys.as_ref().is_none_or(|k| k.contains(&(pin.location, pin.file)));
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let mut pins = self.pins.list();
            pins.retain(|p| is_meant(&p.pin));
            let is_over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if is_over || !pins.iter().any(|p| p.standing.is_hopeful()) {
                return Ok(self.reply(is_meant));
            }
            link.send(Event::Pinning(self.pinning(&pins))).await?;
            let pause = deadline.map_or(PROGRESS_EVERY, |d| PROGRESS_EVERY.min(d - Instant::now()));
            let _ = tokio::time::timeout(pause, self.pins.progressed()).await;
        }
    }

    fn pinning(&self, pins: &[Pinned]) -> Pinning {
        let mut sum = Tally::default();
        for Pinned { tally, .. } in pins {
            sum.files += tally.files;
            sum.bytes += tally.bytes;
            sum.here_files += tally.here_files;
            sum.here_bytes += tally.here_bytes;
        }
        let offline = pins.iter().filter(|p| p.standing == Standing::Offline);
        let offline: BTreeSet<_> = offline.map(|p| self.name_of(p.pin.owner)).collect();
        Pinning { tally: sum, offline: offline.into_iter().collect() }
    }

    /// `None`: all.
    fn pin_keys(&self, targets: &[Target]) -> Outcome<Option<Vec<(LocationId, FileId)>>> {
        self.membership()?;
        if targets.is_empty() {
            return Ok(None);
        }
        targets.iter().map(|target| self.pin_named(target)).collect::<Outcome<_>>().map(Some)
    }

    /// The pin of this address, also of what is not there any more.
    fn pin_named(&self, target: &Target) -> Outcome<(LocationId, FileId)> {
        let address = self.parse(target)?;
        let pins = self.pins.file().pins();
        let named = self.entry_of(target);
        let key = named.as_ref().ok().map(|(_, location, file)| (location.id, *file));
        let found = pins.iter().find(|pin| key == Some((pin.location, pin.file)));
        let found = found.or_else(|| pins.iter().find(|pin| self.pin_address(pin) == address));
        if let Some(pin) = found {
            return Ok((pin.location, pin.file));
        }
        let (_, location, file) = named?;
        let failure = Failure::new(Code::NotFound, format!("{address} is not pinned"));
        Err(failure.hint(match self.pin_above(location.no, file)? {
            Some(above) => format!("it is kept with a folder above it: '{above}'"),
            None => "`sd pin` lists what is".into(),
        }))
    }

    /// Takes pins back.
    pub fn unpin(&self, targets: &[Target]) -> Outcome<UnpinReply> {
        let keys = self.pin_keys(targets)?.unwrap_or_default();
        let pins = self.pins.file().pins();
        let its = pins.iter().filter(|pin| keys.contains(&(pin.location, pin.file)));
        let unpinned = its.map(|pin| self.pin_address(pin).to_string()).collect();
        for (location, file) in keys {
            self.pins.unpin(location, file).map_err(pin_failure)?;
        }
        self.pins.catch_up().map_err(index_failure)?;
        Ok(UnpinReply { unpinned })
    }

    /// Gives back what is cached below these, or says how much that would be.
    pub fn evict(&self, targets: &[Target], dry_run: bool) -> Outcome<Cleared> {
        let named: Vec<_> = targets.iter().map(|t| self.entry_of(t)).collect::<Outcome<_>>()?;
        let own = named.iter().find(|(_, location, _)| location.owner == self.me);
        if let Some((address, ..)) = own {
            return Err(Failure::new(
                Code::Invalid,
                format!("{address} is on this device's own disk: nothing of it is cached"),
            )
            .hint("what is cached are other devices' files"));
        }
        let mut cleared = Cleared::default();
        for (_, location, file) in &named {
            let one = self.pins.evict(location.no, *file, dry_run).map_err(index_failure)?;
            cleared.freed_bytes += one.freed_bytes;
            cleared.pinned_bytes += one.pinned_bytes;
            cleared.open_bytes += one.open_bytes;
        }
        if let ([(address, location, file)], 0) = (&named[..], cleared.freed_bytes)
            && let Some(above) = self.pin_above(location.no, *file)?
        {
            return Err(Failure::new(Code::Refused, format!("{address} is pinned and stays here"))
                .hint(format!("first: sd unpin '{above}'")));
        }
        Ok(cleared)
    }
}

fn tally(tally: &vfs_core::content::pins::Tally) -> Tally {
    Tally {
        files: tally.files,
        bytes: tally.bytes,
        here_files: tally.here_files,
        here_bytes: tally.here_bytes,
    }
}

fn own_failure(address: &SdPath) -> Failure {
    Failure::new(
        Code::Invalid,
        format!("{address} is on this device's own disk: it is here anyway"),
    )
    .hint("pin it on the device that is to have a copy")
}

fn unpinnable(address: &SdPath, error: PinError) -> Failure {
    match error {
        PinError::Own => own_failure(address),
        PinError::NotThere => {
            Failure::new(Code::NotFound, format!("{address} is not with its owner yet"))
                .hint("its bytes are here until it is; `sd sync` waits for that, then pin it")
        }
        PinError::NoContent => {
            Failure::new(Code::Invalid, format!("{address} has no content to keep"))
                .hint("pin a file, a folder or a location")
        }
        PinError::TooMany => Failure::new(Code::Invalid, format!("{address}: {error}"))
            .hint("pin a folder above them, and unpin those"),
        error => pin_failure(error),
    }
}

fn standing_words(standing: &Standing, owner: &str) -> (&'static str, Option<String>) {
    match standing {
        Standing::Here => ("here", None),
        Standing::Fetching => ("fetching", None),
        Standing::Offline => ("offline", Some(format!("“{owner}” cannot be reached"))),
        Standing::CacheFull => ("cache_full", Some("the limit of the cache".into())),
        Standing::DiskFull => ("disk_full", Some("the disk of the cache is full".into())),
        Standing::Failed(why) => ("failed", Some(why.clone())),
        Standing::Unknown => {
            ("unknown", Some(format!("the list of files of “{owner}” is not here yet")))
        }
        Standing::Gone => ("gone", Some(format!("“{owner}” has it no more"))),
    }
}

/// By how much too much is pinned, and what to do.
pub fn room_words(over_limit: u64, over_disk: u64, limit: u64) -> Option<(String, String)> {
    if over_disk > 0 {
        let message = format!(
            "{} of what is pinned do not fit on the disk of the cache; what fits is kept",
            size(over_disk)
        );
        return Some((message, "free some space there, or unpin something: sd unpin".into()));
    }
    (over_limit > 0).then(|| {
        let message = format!(
            "{} of what is pinned do not fit into the {} of the cache; what fits is kept",
            size(over_limit),
            size(limit)
        );
        (message, format!("to make room: sd cache limit {}", size_above(limit + over_limit)))
    })
}
