//! How much to ask for, and how far ahead: pure decisions of the read plan.

use super::manifest::GROUP_BYTES;
use crate::source::MAX_FETCH_BYTES;
use std::ops::Range;
use std::time::Duration;

/// The window with which a sequential reader starts, and the least request for it.
const FIRST_WINDOW_BYTES: u64 = 128 << 10;
/// A request of a reader whose link is not known yet.
const FIRST_REQUEST_BYTES: u64 = 256 << 10;
/// How far out of order the kernel's own parallel reads may come.
const DISORDER_BYTES: u64 = 1 << 20;
/// On a slow link one request shall not take longer, so that progress is seen and a read
/// for another place does not wait for long.
const REQUEST_TIME: Duration = Duration::from_millis(500);
/// On a slow link no more than this is under way ahead of a reader.
const IN_FLIGHT_TIME: Duration = Duration::from_secs(2);

/// The access pattern of one handle.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    /// Where a sequential reader goes on; `None` before its first read.
    next: Option<u64>,
    /// How far ahead to fetch; 0 for a lone or random read.
    window: u64,
    /// The window doubles when the reader has come here.
    grow_at: u64,
}

impl Pattern {
    /// Takes a read into account. The window opens with the second of two adjoining reads and
    /// doubles whenever half of it was consumed; any other read closes it.
    pub(super) fn note(&mut self, read: Range<u64>, max_window: u64) {
        let Some(next) = self.next else {
            self.next = Some(read.end);
            return;
        };
        let disorder = self.window.min(DISORDER_BYTES);
        if read.start + disorder < next || read.start > next + self.window {
            *self = Self { next: Some(read.end), ..Self::default() };
            return;
        }
        let next = next.max(read.end);
        self.next = Some(next);
        if self.window == 0 || next >= self.grow_at {
            self.window = (self.window * 2).max(FIRST_WINDOW_BYTES).min(max_window);
            self.grow_at = next + self.window / 2;
        }
    }

    /// Nobody answers: ask only for what is read.
    pub(super) fn close(&mut self) {
        self.window = 0;
    }

    /// What should be fetched before it is asked for.
    pub(super) fn ahead(&self, size: u64, max_window: u64) -> Range<u64> {
        let next = self.next.unwrap_or(0).min(size);
        next..next.saturating_add(self.window.min(max_window)).min(size)
    }

    /// The length of a request for this handle.
    pub(super) fn request_bytes(&self, link: &Link) -> u64 {
        let wanted = match self.window {
            0 => link.rate.map_or(FIRST_REQUEST_BYTES, |_| MAX_FETCH_BYTES),
            window => (window / 4).max(FIRST_WINDOW_BYTES),
        };
        let wanted = wanted.min(link.bytes_in(REQUEST_TIME)).min(MAX_FETCH_BYTES);
        (wanted / GROUP_BYTES * GROUP_BYTES).max(GROUP_BYTES)
    }
}

/// What is known of the link to the holders of a file.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(super) struct Link {
    /// Bytes per second, once measured.
    rate: Option<f64>,
}

impl Link {
    /// Takes an answered request into account: requests are answered one after the other, so
    /// all that was under way when it began has come by its end.
    pub(super) fn note(&mut self, under_way_bytes: u64, took: Duration) {
        let sample = under_way_bytes as f64 / took.as_secs_f64().max(1e-6);
        self.rate = Some(self.rate.map_or(sample, |rate| rate + (sample - rate) / 4.0));
    }

    /// What comes in this time, if something is known.
    pub(super) fn known_bytes_in(&self, time: Duration) -> Option<u64> {
        self.rate.map(|rate| (rate * time.as_secs_f64()) as u64)
    }

    /// The same; without limit while nothing is known.
    fn bytes_in(&self, time: Duration) -> u64 {
        self.known_bytes_in(time).unwrap_or(u64::MAX)
    }

    /// The most that may be under way ahead of readers.
    pub(super) fn in_flight_bytes(&self) -> u64 {
        self.bytes_in(IN_FLIGHT_TIME).max(FIRST_WINDOW_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 16 << 20;
    const STEP: u64 = 128 << 10;

    fn window_after(reads: &[Range<u64>]) -> u64 {
        let mut pattern = Pattern::default();
        reads.iter().for_each(|read| pattern.note(read.clone(), MAX));
        pattern.window
    }

    #[test]
    fn a_lone_read_asks_for_nothing_more() {
        assert_eq!(window_after(&[0..4096]), 0);
        assert_eq!(window_after(&[1 << 30..(1 << 30) + 4096]), 0);
    }

    #[test]
    fn a_sequential_reader_gets_a_growing_window_up_to_the_most() {
        let mut pattern = Pattern::default();
        let mut windows = Vec::new();
        for n in 0..400 {
            pattern.note(n * STEP..(n + 1) * STEP, MAX);
            windows.push(pattern.window);
        }
        assert_eq!(windows[..4], [0, STEP, 2 * STEP, 4 * STEP]);
        assert!(windows.is_sorted());
        assert_eq!(windows[399], MAX);
        assert_eq!(pattern.ahead(401 * STEP, MAX), 400 * STEP..401 * STEP);
    }

    #[test]
    fn small_sequential_reads_do_not_blow_the_window_up() {
        let reads: Vec<_> = (0..32u64).map(|n| n * 4096..(n + 1) * 4096).collect();
        assert_eq!(window_after(&reads), 2 * FIRST_WINDOW_BYTES);
    }

    #[test]
    fn a_jump_closes_the_window() {
        let streaming = [0..STEP, STEP..2 * STEP, 2 * STEP..3 * STEP, 3 * STEP..4 * STEP];
        assert!(window_after(&streaming) > 0);
        let far = 1 << 30;
        assert_eq!(window_after(&[&streaming[..], &[far..far + STEP]].concat()), 0);
        assert_eq!(
            window_after(&[&streaming[..], &[0..STEP / 2]].concat()),
            window_after(&streaming)
        );
        let long: Vec<_> = (0..64).map(|n| n * STEP..(n + 1) * STEP).collect();
        assert_eq!(window_after(&[&long[..], &[0..STEP]].concat()), 0);
    }

    #[test]
    fn parallel_reads_out_of_order_are_still_sequential() {
        let reads: Vec<_> = [0, 1, 2, 4, 3, 6, 5, 7, 9, 8].map(|n| n * STEP..(n + 1) * STEP).into();
        assert!(window_after(&reads) >= 4 * STEP);
    }

    #[test]
    fn requests_are_small_on_a_slow_link_and_large_on_a_fast_one() {
        let (mut slow, mut fast) = (Link::default(), Link::default());
        slow.note(128 << 10, Duration::from_secs(1));
        fast.note(1 << 20, Duration::from_millis(2));
        let streaming = Pattern { next: Some(0), window: MAX, grow_at: 0 };
        assert_eq!(streaming.request_bytes(&slow), GROUP_BYTES);
        assert_eq!(slow.in_flight_bytes(), 256 << 10);
        assert_eq!(streaming.request_bytes(&fast), MAX_FETCH_BYTES);
        assert!(fast.in_flight_bytes() > MAX);
    }
}
