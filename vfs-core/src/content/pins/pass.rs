//! A pass: what the pins mean in one state of the index, and what of it is here.

use super::walk::Walk;
use super::{Found, Pin, PinError, PinKey, Pins, Progress, Tally};
use crate::content::lock;
use crate::index::{IndexError, View};
use crate::model::{Entry, LocationId, LocationNo, Seq};
use crate::source::Version;
use std::collections::HashMap;
use std::sync::MutexGuard;

/// What a pin names now, and what is to be noted of it.
struct Resolved {
    found: Found,
    entry: Option<Entry>,
    pin: Pin,
    /// Nothing of its location is missing that is on its way.
    is_certain: bool,
}

/// Where the replicas of pinned locations were whole.
type Wholes = HashMap<LocationNo, (u64, Seq)>;

impl Pins {
    /// Goes through all pins. Reads the index in one state, so that a file that moves meanwhile is
    /// not overlooked.
    pub(super) fn pass(&self) -> Result<(), IndexError> {
        self.pass_holding(&lock(&self.passing))
    }

    pub(super) fn pass_holding(&self, _passing: &MutexGuard<'_, ()>) -> Result<(), IndexError> {
        let news = {
            let mut state = lock(&self.state);
            state.is_dirty = false;
            state.news
        };
        let result = self.pass_once();
        {
            let mut state = lock(&self.state);
            match &result {
                Ok(()) => state.passed_news = news,
                Err(_) => state.is_dirty = true,
            }
        }
        self.passed.notify_waiters();
        result
    }

    fn pass_once(&self) -> Result<(), IndexError> {
        let cache = &self.content.cache;
        cache.begin_round();
        let pins = self.file.pins();
        // Before the view is made, and again after it: it shows the replica in between.
        let wholes = self.wholes(&pins);
        let view = self.content.index.view()?;
        let mut progress = HashMap::new();
        let mut renamed: Vec<(PinKey, Pin)> = Vec::new();
        let mut are_certain = true;
        for pin in pins {
            let resolved = self.resolve(&view, &pin, &wholes)?;
            are_certain &= resolved.is_certain;
            let tally = match (resolved.found, &resolved.entry) {
                (Found::There(no), Some(entry)) => self.tally(&view, no, pin.location, entry)?,
                _ => self.last_tally(&pin, resolved.found),
            };
            let new = Progress { found: resolved.found, tally, obstacle: None };
            progress.insert(resolved.pin.key(), (pin.key(), new));
            if resolved.pin != pin {
                renamed.push((pin.key(), resolved.pin));
            }
        }
        drop(view);
        let is_known = |p: &(PinKey, Progress)| p.1.found != Found::Unknown;
        let are_known = progress.values().all(is_known) && self.file.damaged().is_none();
        {
            let mut state = lock(&self.state);
            state.passes += 1;
            let old = std::mem::take(&mut state.progress);
            // What fetching met meanwhile is not forgotten.
            let kept = progress.into_iter().map(|(key, (old_key, new))| {
                let obstacle = old.get(&old_key).and_then(|p| p.obstacle.clone());
                (key, Progress { obstacle, ..new })
            });
            state.progress = kept.collect();
        }
        if !renamed.is_empty() {
            self.note(&renamed);
        }
        if are_known && are_certain {
            cache.end_round();
        }
        Ok(())
    }

    fn note(&self, renamed: &[(PinKey, Pin)]) {
        // The next pass finds them as this one did.
        if let Err(PinError::Io { path, source }) = self.file.replace(renamed) {
            tracing::warn!(path = %path.display(), "what pins name now could not be noted: {source}");
        }
    }

    fn last_tally(&self, pin: &Pin, found: Found) -> Tally {
        let last = lock(&self.state).progress.get(&pin.key()).map(|p| p.tally);
        last.filter(|_| found == Found::Unknown).unwrap_or_default()
    }

    fn wholes(&self, pins: &[Pin]) -> Wholes {
        let index = &self.content.index;
        let locations = pins.iter().filter_map(|pin| index.location_by_id(pin.location));
        locations.filter_map(|location| Some((location.no, self.whole(location.no)?))).collect()
    }

    /// The log and the last change of a replica in which no row is missing.
    fn whole(&self, no: LocationNo) -> Option<(u64, Seq)> {
        let index = &self.content.index;
        let (log_id, head) = (index.log_id(no), index.head(no));
        index.has_all(no, log_id, head).then_some((log_id, head))
    }

    /// While rows are on their way, what has moved may be nowhere, and another may have its name.
    /// So then a pin is found by its id or not at all, and nothing of it is let go.
    fn resolve(&self, view: &View<'_>, pin: &Pin, wholes: &Wholes) -> Result<Resolved, IndexError> {
        let index = &self.content.index;
        let Some(location) = index.location_by_id(pin.location) else {
            // One that was lost with the index comes again; one that was there was removed.
            let gone = pin.gone || lock(&self.state).seen.contains(&pin.location);
            let found = if gone { Found::Gone } else { Found::Unknown };
            let pin = Pin { gone, ..pin.clone() };
            return Ok(Resolved { found, entry: None, pin, is_certain: true });
        };
        lock(&self.state).seen.insert(pin.location);
        let no = location.no;
        let mut now = Pin { gone: false, location_name: location.name.clone(), ..pin.clone() };
        if !index.was_whole(no) {
            let found = Found::Unknown;
            return Ok(Resolved { found, entry: None, pin: now, is_certain: false });
        }
        let whole = self.whole(no);
        let is_certain = whole.is_some() && wholes.get(&no).copied() == whole;
        let log_id = index.log_id(no);
        let node = match log_id == pin.log_id {
            true => view.node(no, pin.file)?.map(|node| node.entry),
            false => None,
        };
        // An owner that lost its index gives other ids; and what was replaced under its name is
        // what was meant.
        let entry = match node {
            Some(entry) => Some(entry),
            None if is_certain => view.resolve(no, &pin.path)?,
            None => None,
        };
        let Some(entry) = entry else {
            let found = if is_certain { Found::Gone } else { Found::Unknown };
            return Ok(Resolved { found, entry: None, pin: now, is_certain });
        };
        if !is_certain {
            return Ok(Resolved {
                found: Found::There(no),
                entry: Some(entry),
                pin: now,
                is_certain,
            });
        }
        (now.log_id, now.file) = (log_id, entry.file_id);
        if let Some(path) = view.path(no, entry.file_id)? {
            now.path = path;
        }
        Ok(Resolved { found: Found::There(no), entry: Some(entry), pin: now, is_certain })
    }

    /// Counts the files below an entry, and has the cache hold what is here of them.
    fn tally(
        &self,
        view: &View<'_>,
        no: LocationNo,
        location: LocationId,
        entry: &Entry,
    ) -> Result<Tally, IndexError> {
        let mut tally = Tally::default();
        let mut walk = Walk::begin(no, entry);
        while walk.step(view, &mut |entry| {
            let size = entry.attr.size;
            tally.files += 1;
            tally.bytes += size;
            if size == 0 {
                tally.here_files += 1;
                return;
            }
            let kept = self.content.cache.hold(&Version::of(location, entry));
            tally.here_files += u64::from(kept.is_whole);
            tally.here_bytes += kept.bytes;
        })? {}
        Ok(tally)
    }
}
