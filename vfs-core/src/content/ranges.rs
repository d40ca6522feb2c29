//! A set of group numbers as disjoint ranges: which groups of a file are here.
//!
//! Ranges, not a bitmap: a file is read in runs, and its size comes from a peer,
//! so nothing may be allocated for groups that are not here.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint, not touching, never empty ranges: start to end.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct RangeSet {
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds a range; gives how many numbers are new.
    pub(crate) fn insert(&mut self, range: Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let new = self.missing(range.clone()).map(|r| r.end - r.start).sum();
        let Range { mut start, mut end } = range;
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back() {
            if to < start {
                break;
            }
            self.ranges.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.ranges.insert(start, end);
        new
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: Range<u64>) {
        let parts: Vec<_> = self.present(range.clone()).collect();
        for part in parts {
            let around = self.around(part.start).expect("it is in the set");
            self.ranges.remove(&around.start);
            for rest in [around.start..part.start, part.end..around.end] {
                if !rest.is_empty() {
                    self.ranges.insert(rest.start, rest.end);
                }
            }
        }
    }

    /// Whether every number of the range is in the set.
    pub(crate) fn contains(&self, range: &Range<u64>) -> bool {
        range.is_empty()
            || self.ranges.range(..=range.start).next_back().is_some_and(|(_, &to)| to >= range.end)
    }

    /// The parts of the range that are not in the set, in order.
    pub(crate) fn missing(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.ranges.range(..range.start).next_back().map(|(_, &to)| to);
        let mut at = before.map_or(range.start, |to| to.clamp(range.start, range.end));
        let mut present = self.ranges.range(range.start..range.end);
        std::iter::from_fn(move || {
            while at < range.end {
                let (from, to) = present.next().map_or((range.end, range.end), |(&f, &t)| (f, t));
                let gap = at..from;
                at = to;
                if !gap.is_empty() {
                    return Some(gap);
                }
            }
            None
        })
    }

    /// The ranges, in order.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(&from, &to)| from..to)
    }

    /// The range that has this number.
    pub(crate) fn around(&self, at: u64) -> Option<Range<u64>> {
        let (&from, &to) = self.ranges.range(..=at).next_back()?;
        (at < to).then_some(from..to)
    }

    /// The parts of the range that are in the set, in order.
    pub(crate) fn present(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.around(range.start).map_or(range.start, |around| around.start);
        let found = self.ranges.range(first..range.end.max(first));
        let parts = found.map(move |(&from, &to)| from.max(range.start)..to.min(range.end));
        parts.filter(|part| !part.is_empty())
    }

    /// The end of the last range.
    pub(crate) fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(_, &to)| to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn is_a_set(ops in prop::collection::vec((0..64u64, 0..16u64), 0..40), (at, len) in (0..64u64, 0..20u64), gone in (0..64u64, 0..20u64)) {
            let mut set = RangeSet::default();
            let mut model = [false; 100];
            for (start, len) in ops {
                let added = set.insert(start..start + len);
                let slice = &mut model[start as usize..(start + len) as usize];
                prop_assert_eq!(added, slice.iter().filter(|present| !**present).count() as u64);
                slice.fill(true);
            }
            let asked = at..at + len;
            set.remove(gone.0..gone.0 + gone.1);
            model[gone.0 as usize..(gone.0 + gone.1) as usize].fill(false);
            let missing: Vec<u64> = set.missing(asked.clone()).flatten().collect();
            let expected: Vec<u64> = asked.clone().filter(|n| !model[*n as usize]).collect();
            prop_assert_eq!(set.contains(&asked), expected.is_empty());
            prop_assert_eq!(missing, expected);
            let present: Vec<u64> = set.present(asked.clone()).flatten().collect();
            let expected: Vec<u64> = asked.clone().filter(|n| model[*n as usize]).collect();
            prop_assert_eq!(present, expected);
            prop_assert_eq!(set.around(at).is_some_and(|r| r.contains(&at)), model[at as usize]);
            let ranges: Vec<_> = set.iter().collect();
            prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start));
        }
    }
}
