//! What each byte of a draft is: written, the base's, or zero. Pure; no bytes here.

use super::{Extent, Snapshot};
use std::collections::BTreeMap;
use std::ops::Range;

/// One state of a file.
///
/// Below `kept`, what no extent covers is the base's; above it, zero. So `kept` is never above
/// the size, and no clean extent is above `kept`.
#[derive(Clone, Debug, Default)]
pub(super) struct Map {
    pub size: u64,
    pub kept: u64,
    extents: BTreeMap<u64, Stored>,
}

/// Where the bytes of an extent are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stored {
    pub len: u64,
    pub stored_at: u64,
    /// The base has the same bytes there.
    pub clean: bool,
}

/// What a range is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// In the draft's own file, from there on.
    Stored(u64),
    /// The base's.
    Base,
    /// Zero.
    Zero,
}

impl Map {
    /// A file whose bytes are all the base's.
    pub(super) fn new(base_size: u64) -> Self {
        Self { size: base_size, kept: base_size, extents: BTreeMap::new() }
    }

    /// The state that a snapshot is of.
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let stored =
            |e: &Extent| (e.at, Stored { len: e.len, stored_at: e.stored_at, clean: false });
        let extents = snapshot.extents.iter().map(stored).collect();
        Self { size: snapshot.size, kept: snapshot.kept_bytes, extents }
    }

    /// The state that a snapshot is of, which was made of this one. What the snapshot leaves to
    /// its base was written before, where it was: that need not be fetched.
    pub(super) fn after(before: &Self, snapshot: &Snapshot) -> Self {
        let mut map = Self { size: snapshot.size, kept: snapshot.kept_bytes, ..before.clone() };
        map.drop_range(snapshot.kept_bytes..u64::MAX);
        map.extents.values_mut().for_each(|stored| stored.clean = true);
        for (at, stored) in Self::of(snapshot).extents {
            map.drop_range(at..at + stored.len);
            map.extents.insert(at, stored);
        }
        map
    }

    /// The extents that meet a range, whole.
    pub(super) fn meeting(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Stored)> + '_ {
        let before = self.extents.range(..range.start).next_back();
        let before = before.filter(|(at, stored)| **at + stored.len > range.start);
        let from = before.map_or(range.start, |(at, _)| *at);
        self.extents.range(from..range.end.max(from)).map(|(at, stored)| (*at, *stored))
    }

    /// What a range is, in order and without a gap, up to the size.
    pub(super) fn parts(&self, range: Range<u64>) -> Vec<(Range<u64>, Part)> {
        let range = range.start..range.end.min(self.size);
        let mut parts = Vec::new();
        let mut at = range.start;
        for (start, stored) in self.meeting(range.clone()) {
            let from = start.max(range.start);
            self.gap(at..from, &mut parts);
            at = (start + stored.len).min(range.end);
            parts.push((from..at, Part::Stored(stored.stored_at + (from - start))));
        }
        self.gap(at..range.end, &mut parts);
        parts
    }

    fn gap(&self, gap: Range<u64>, parts: &mut Vec<(Range<u64>, Part)>) {
        let border = self.kept.clamp(gap.start, gap.end.max(gap.start));
        if gap.start < border {
            parts.push((gap.start..border, Part::Base));
        }
        if border < gap.end {
            parts.push((border..gap.end, Part::Zero));
        }
    }

    /// Takes a range out of the extents; gives where its bytes were.
    pub(super) fn drop_range(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut dropped = Vec::new();
        if range.is_empty() {
            return dropped;
        }
        let meeting: Vec<_> = self.meeting(range.clone()).collect();
        for (at, stored) in meeting {
            let end = at + stored.len;
            let (from, to) = (at.max(range.start), end.min(range.end));
            self.extents.remove(&at);
            if at < from {
                self.extents.insert(at, Stored { len: from - at, ..stored });
            }
            if to < end {
                let rest =
                    Stored { len: end - to, stored_at: stored.stored_at + (to - at), ..stored };
                self.extents.insert(to, rest);
            }
            dropped.push(stored.stored_at + (from - at)..stored.stored_at + (to - at));
        }
        dropped
    }

    /// Puts bytes where no extent is. Joins neighbours that are neighbours in storage too, unless
    /// what comes before `border` there is joined with what comes after it.
    pub(super) fn insert(&mut self, at: u64, mut stored: Stored, border: u64) {
        let joins = |a: &Stored, b: &Stored| {
            a.clean == b.clean
                && a.stored_at + a.len == b.stored_at
                && (a.stored_at < border) == (b.stored_at < border)
        };
        let end = at + stored.len;
        self.size = self.size.max(end);
        if let Some(next) = self.extents.get(&end).copied().filter(|next| joins(&stored, next)) {
            self.extents.remove(&end);
            stored.len += next.len;
        }
        if let Some((before_at, before)) = self.extents.range_mut(..at).next_back()
            && before_at + before.len == at
            && joins(before, &stored)
        {
            before.len += stored.len;
            return;
        }
        self.extents.insert(at, stored);
    }

    /// Cuts the file, or lengthens it with zeros; gives where bytes were that it has no more.
    pub(super) fn set_size(&mut self, size: u64) -> Vec<Range<u64>> {
        let dropped = self.drop_range(size..self.size.max(size));
        self.size = size;
        self.kept = self.kept.min(size);
        dropped
    }

    /// What has to be stored as zeros for a range to be zero: only there the base shows.
    pub(super) fn needs_zeros(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.min(self.size);
        if end >= self.kept { range.start..range.start } else { range.start..end }
    }

    /// Makes a range zero, within the size and but for [`Map::needs_zeros`].
    pub(super) fn zero(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let end = range.end.min(self.size);
        if range.start >= end {
            return Vec::new();
        }
        if end >= self.kept {
            self.kept = self.kept.min(range.start);
        }
        self.drop_range(range.start..end)
    }

    /// What differs from the base, as few extents as possible.
    pub(super) fn dirty(&self) -> Vec<Extent> {
        let mut dirty = Vec::<Extent>::new();
        for (&at, stored) in self.extents.iter().filter(|(_, stored)| !stored.clean) {
            match dirty.last_mut() {
                Some(e) if e.at + e.len == at && e.stored_at + e.len == stored.stored_at => {
                    e.len += stored.len;
                }
                _ => dirty.push(Extent { at, len: stored.len, stored_at: stored.stored_at }),
            }
        }
        dirty
    }

    /// No base is known to have any of it.
    pub(super) fn extents_are_dirty(&mut self) {
        self.extents.values_mut().for_each(|stored| stored.clean = false);
    }

    /// All stored ranges.
    pub(super) fn stored(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.extents.values().map(|stored| stored.stored_at..stored.stored_at + stored.len)
    }

    /// Makes a snapshot, from which this state came, the base: what is the same becomes clean.
    /// What is told as a difference from it must be right as well when one of the `later`
    /// snapshots has become the base in the meantime.
    pub(super) fn rebase(&mut self, snapshot: &Snapshot, later: &[Snapshot]) {
        let bases = later.iter().chain([snapshot]);
        let kept = bases.map(|base| self.same_below(base)).min().unwrap_or(0);
        let mut extents: Vec<(u64, Stored)> = Vec::with_capacity(self.extents.len());
        let mut push = |at: u64, stored: Stored| match extents.last_mut() {
            Some((before_at, before))
                if *before_at + before.len == at
                    && before.stored_at + before.len == stored.stored_at
                    && before.clean == stored.clean =>
            {
                before.len += stored.len;
            }
            _ => extents.push((at, stored)),
        };
        for (&at, stored) in &self.extents {
            let end = at + stored.len;
            let mut from = at;
            let mut cut = |to: u64, clean: bool| {
                if from < to {
                    let stored_at = stored.stored_at + (from - at);
                    push(from, Stored { len: to - from, stored_at, clean });
                    from = to;
                }
            };
            let below = end.min(kept.max(at));
            for same in meeting(&snapshot.extents, at..below) {
                // The same bytes: the same place in the file is the same place in storage.
                if same.stored_at.wrapping_sub(same.at) == stored.stored_at.wrapping_sub(at) {
                    cut(same.at.clamp(at, below), stored.clean);
                    cut((same.at + same.len).clamp(at, below), true);
                }
            }
            cut(below, stored.clean);
            cut(end, false);
        }
        self.extents = extents.into_iter().collect();
        self.kept = kept;
    }

    /// Up to where nothing but an extent tells this state from a snapshot it came from: the first
    /// place that is zero here and was not there. What is the base's here is the snapshot's too,
    /// by what [`Map::rebase`] promises of later snapshots.
    fn same_below(&self, snapshot: &Snapshot) -> u64 {
        let limit = self.size.min(snapshot.size);
        let parts = self.parts(0..limit).into_iter();
        for (zeros, _) in parts.filter(|(_, part)| *part == Part::Zero) {
            if zeros.start < snapshot.kept_bytes {
                return zeros.start;
            }
            if let Some(written) = meeting(&snapshot.extents, zeros.clone()).next() {
                return written.at.max(zeros.start);
            }
        }
        limit
    }
}

/// The extents of a snapshot that meet a range, whole.
pub(super) fn meeting(extents: &[Extent], range: Range<u64>) -> impl Iterator<Item = &Extent> {
    let first = extents.partition_point(|e| e.at + e.len <= range.start);
    extents[first..].iter().take_while(move |e| e.at < range.end)
}
