//! Files that grow: a log to which lines are appended stays the version that it is.
//!
//! A row may keep its generation only if its file surely begins with the bytes
//! that it had. So a file that has grown is read right when that is seen, all
//! of it, and the hash of its beginning is compared with the row's. What
//! cannot be proved is another version, as every other change of bytes is.
//!
//! Such reading may hold up whoever waits for other changes, so the thread that
//! follows them takes its time for it: see [`Duty`].

use super::Core;
use super::hash::unsettled;
use super::place::{Place, lock};
use crate::content::Manifest;
use crate::error::{FsError, FsResult};
use crate::index::{BytesRead, Observed};
use crate::local::{observe_file, open_file_at, stamp_of};
use crate::model::{ContentId, Entry, FileId, FileType, MAX_GROWTH_BYTES, Name, Time};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// A file that was seen while it was empty is taken for one that grows up to this size: a larger
/// one was rather written at once, and is hashed when it is left alone.
const FROM_NOTHING_BYTES: u64 = 1 << 20;
/// A file that still is not hashed this long after its birth is hashed when it grows, although
/// nothing is proved by that: one that is never left alone would never be hashed otherwise.
const UNHASHED_FOR: Duration = Duration::from_secs(5);
/// A few ticks of the kernel's clock of file times, the longest of which is 10 ms: after it, every
/// change shows in the stamp.
const TICK: Duration = Duration::from_millis(20);
/// The rest after each reading, by its own length: at most a quarter of the time goes to it.
const REST: u32 = 3;
/// The longest that a change waits for its reading; then it is another version, unread.
const PATIENCE: Duration = Duration::from_millis(500);
/// The longest that a reading takes, as from a slow disk; so its rest is shorter than that.
const READING: Duration = Duration::from_millis(150);
/// Up to here a file is read without waiting for the rest after a larger one: most logs are.
const SMALL_BYTES: u64 = 1 << 20;
/// How long the hash tree of a state is kept that a file has left: readers ask for it until they
/// know of the next one.
pub(super) const FORMER_FOR: Duration = match cfg!(test) {
    true => Duration::from_millis(300),
    false => Duration::from_secs(30),
};

/// When the thread that follows changes may read a file again.
#[derive(Default)]
pub(super) struct Duty {
    rests_until: Option<Instant>,
}

/// The same of small files and of larger ones.
#[derive(Default)]
pub(super) struct Duties {
    small: Duty,
    large: Duty,
}

impl Duties {
    #[cfg(test)]
    pub fn rest_for_long(&mut self) {
        let hour = Duration::from_secs(3600);
        self.small.rest(hour, Instant::now());
        self.large.rest(hour, Instant::now());
    }

    fn of(&mut self, size: u64) -> &mut Duty {
        match size <= SMALL_BYTES {
            true => &mut self.small,
            false => &mut self.large,
        }
    }
}

/// Hash trees of states that files have left, the oldest first.
pub(super) type Former = VecDeque<(Instant, ContentId)>;

/// Whether to read a file that has grown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Turn {
    Now,
    Later(Instant),
    Never,
}

impl Duty {
    /// For a change that was noted at a time.
    pub fn turn(&self, noted: Instant, now: Instant) -> Turn {
        match self.rests_until.filter(|until| *until > now) {
            None => Turn::Now,
            Some(_) if now >= noted + PATIENCE => Turn::Never,
            Some(until) => Turn::Later(until.min(noted + PATIENCE)),
        }
    }

    pub fn rest(&mut self, took: Duration, now: Instant) {
        self.rests_until = Some(now + took * REST);
    }
}

/// A file that has grown and is to be read: what its row was, and what was found.
pub(super) struct Growing {
    old: Entry,
    found: Observed,
}

impl Core {
    /// What was found under a name, if it is to be read; else it is given back.
    pub(super) fn growing(
        &self,
        place: &Place,
        dir: FileId,
        found: Observed,
    ) -> FsResult<Result<Growing, Observed>> {
        let may_have_grown = found.attr.file_type == FileType::File && found.attr.size > 0;
        if !may_have_grown || found.attr.size > MAX_GROWTH_BYTES {
            return Ok(Err(found));
        }
        let old = self.index.view()?.entry(place.no, dir, found.name.as_bytes())?;
        Ok(match old.filter(|old| is_to_be_read(old, &found)) {
            Some(old) => Ok(Growing { old, found }),
            None => Err(found),
        })
    }

    /// Reads a file that may have grown, and tells the index what its name has. Needs the
    /// directory's order.
    pub(super) fn grew(
        &self,
        place: &Place,
        open: BorrowedFd<'_>,
        dir: FileId,
        growing: Growing,
    ) -> FsResult<()> {
        let read = self.read(open, &growing);
        self.tell_growth(place, dir, growing, read)
    }

    /// The same as far as it is this thread's turn to read; gives when to look again if it is not
    /// yet.
    pub(super) fn grew_in_turn(
        &self,
        place: &Place,
        open: BorrowedFd<'_>,
        dir: FileId,
        growing: Growing,
        noted: Instant,
    ) -> FsResult<Option<Instant>> {
        let began = Instant::now();
        let size = growing.found.attr.size;
        let turn = lock(&self.duties).of(size).turn(noted, began);
        let read = match turn {
            Turn::Later(due) => return Ok(Some(due)),
            Turn::Never => None,
            Turn::Now => {
                let read = self.read(open, &growing);
                lock(&self.duties).of(size).rest(began.elapsed(), Instant::now());
                read
            }
        };
        self.tell_growth(place, dir, growing, read).map(|()| None)
    }

    fn tell_growth(
        &self,
        place: &Place,
        dir: FileId,
        Growing { old, found }: Growing,
        read: Option<(Observed, BytesRead)>,
    ) -> FsResult<()> {
        let (found, read) = match read {
            Some((found, read)) => (found, Some(read)),
            None => (found, None),
        };
        let name = found.name.clone();
        let new = self.appeared(place, dir, &name, found, read)?;
        let now = new.and_then(|new| new.content);
        if let Some(former) = old.content.filter(|former| now != Some(*former)) {
            self.drop_manifest(former);
        }
        Ok(())
    }

    /// A state that a file has left costs no room for long: of a log, each line would leave one.
    /// Where another file has the same content, the tree is computed again when it is needed.
    pub(super) fn drop_manifest(&self, former: ContentId) {
        let now = Instant::now();
        let mut all = lock(&self.former);
        all.push_back((now, former));
        let count = all.iter().take_while(|(left, _)| now - *left > FORMER_FOR).count();
        let old: Vec<_> = all.drain(..count).collect();
        drop(all);
        for (_, content) in old {
            if let Err(e) = self.manifests.remove(content) {
                tracing::warn!(%content, "a hash tree could not be removed: {e}");
            }
        }
    }

    /// What can be told of a file that is larger than its row says; what cannot be read is another
    /// version.
    fn read(&self, dir: BorrowedFd<'_>, growing: &Growing) -> Option<(Observed, BytesRead)> {
        let Growing { old, found } = growing;
        let read = self.read_grown(dir, old, &found.name);
        read.inspect_err(|e| tracing::debug!(file = old.file_id.0, "not read: {e}")).ok().flatten()
    }

    /// `None` if it is not larger any more, or changes in a way that nothing can be told.
    fn read_grown(
        &self,
        dir: BorrowedFd<'_>,
        old: &Entry,
        name: &Name,
    ) -> FsResult<Option<(Observed, BytesRead)>> {
        let unread = |e| FsError::os("hash a file", e);
        let file = open_file_at(dir, name)?;
        // Of the open file: what is read is what is seen.
        let found = observe_file(&file, name.clone())?;
        if !is_to_be_read(old, &found) {
            return Ok(None);
        }
        let stamp = found.stamp();
        // Told before the reading: a change that leaves no trace can then only have come earlier.
        let is_settled = unsettled(&stamp, TICK).is_none();
        let (size, begun) = (stamp.size, old.attr.size);
        let until = Instant::now() + READING;
        let is_over = &|| self.is_stopping() || Instant::now() > until;
        let hashed = Manifest::of_grown_file(&file, size, begun, is_over).map_err(unread)?;
        let Some((beginning, manifest)) = hashed else { return Ok(None) };
        let is_calm = stamp_of(&file)? == stamp;
        if !is_calm && !is_still(&file, &manifest, is_over).map_err(unread)? {
            return Ok(None);
        }
        self.manifests.put(&manifest).map_err(|e| FsError::os("store a manifest", e))?;
        let (content, began) = (manifest.content(), (begun, beginning));
        let read = BytesRead { stamp, content, began, is_settled: is_calm && is_settled };
        Ok(Some((found, read)))
    }
}

/// Whether a file that changed while it was read has the same bytes again, and maybe more: then it
/// had just these between the two readings, and was only appended to.
fn is_still(
    file: &File,
    manifest: &Manifest,
    is_over: &(dyn Fn() -> bool + Sync),
) -> std::io::Result<bool> {
    let again = Manifest::of_grown_file(file, manifest.size(), 0, is_over)?;
    Ok(again.is_some_and(|(_, again)| again.content() == manifest.content()))
}

/// Whether a file shall be read because it is larger than its row says.
fn is_to_be_read(old: &Entry, now: &Observed) -> bool {
    let (was, is) = (old.attr.size, now.attr.size);
    let is_wanted = match old.content {
        Some(_) => true,
        None if was == 0 => is <= FROM_NOTHING_BYTES,
        None => old.attr.btime.is_some_and(is_long_ago),
    };
    let is_file = now.attr.file_type == FileType::File && now.is_of(old);
    is_wanted && is_file && is > was && is <= MAX_GROWTH_BYTES
}

fn is_long_ago(birth: Time) -> bool {
    let now = Time::now();
    (now.secs, now.nanos) >= (birth.secs.saturating_add(UNHASHED_FOR.as_secs() as i64), birth.nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_time_goes_to_reading_and_nothing_waits_for_long() {
        let (mut duty, start) = (Duty::default(), Instant::now());
        assert_eq!(duty.turn(start, start), Turn::Now);
        let ms = Duration::from_millis;
        duty.rest(ms(100), start);
        assert_eq!(duty.turn(start, start), Turn::Later(start + ms(300)));
        assert_eq!(duty.turn(start - ms(400), start), Turn::Later(start + ms(100)));
        assert_eq!(duty.turn(start - ms(500), start), Turn::Never);
        assert_eq!(duty.turn(start - ms(500), start + ms(300)), Turn::Now);
    }
}
