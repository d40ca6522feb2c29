//! Which holder to ask: pure decisions from what was measured of each device.
//!
//! Every flight goes to the holder that is expected to have delivered it first, so that flights
//! spread over several of them in proportion to what they bring. A device that stayed silent
//! comes last for a while. One of which nothing is known gets no large flight while there is a
//! measured one: what it can do is found out beside, with a range that nobody waits for.

use std::time::Duration;
use tokio::time::Instant;

/// What was measured so long ago is not believed any more.
const MEASURED_FOR: Duration = Duration::from_secs(120);
/// Less under way tells little of a rate: it came as fast as this, or faster.
const TELLING_BYTES: u64 = 256 << 10;
/// Up to here a request is small, and the round trip counts.
const SMALL_BYTES: u64 = 64 << 10;
/// What a device is taken to bring, of which nothing is known, for a small request.
const ASSUMED_RATE: f64 = (16 << 20) as f64;
/// Differences below this are none, for small requests and devices not measured.
const STEP: Duration = Duration::from_millis(5);
/// A device that is asked for something and has not answered anything for so long is silent, if
/// another one has answered instead.
const SILENCE: Duration = Duration::from_millis(500);
/// How long a device that stayed silent comes last, the first time; each time twice as long.
const SILENT_FOR: Duration = Duration::from_secs(2);
const MAX_DOUBLINGS: u32 = 5;
/// A device is tried beside no more often.
const PROBED_EVERY: Duration = Duration::from_secs(10);
/// A flight that takes so many times as long as expected is late, but not before this.
const LATE_TIMES: u32 = 3;
const LATE: Duration = Duration::from_millis(250);
/// The same, with nothing known of the device.
const LATE_UNMEASURED: Duration = Duration::from_secs(1);

/// What is known of one device as a holder.
#[derive(Debug, Default, Clone)]
pub(super) struct Pace {
    /// Bytes per second, and when that was measured last.
    rate: Option<(f64, Instant)>,
    under_way_bytes: u64,
    /// When it last answered anything.
    heard: Option<Instant>,
    /// How often in a row it stayed silent, and until when it comes last for that.
    silences: u32,
    silent_until: Option<Instant>,
    probed: Option<Instant>,
}

/// How bytes came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Landed {
    /// All that was under way when they were asked for, with them.
    pub under_way_bytes: u64,
    /// From then on.
    pub took: Duration,
    /// The round trip in that.
    pub rtt: Duration,
}

/// The place of a holder in the order of asking: the least is the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// This device itself.
    Own,
    /// Expected to be done after this time.
    Expected(Duration),
    /// Nothing is known but the round trip.
    Unknown(Duration),
    /// It has to read the whole file first; its round trip.
    Unready(Duration),
    /// It stayed silent.
    Silent(u32),
}

impl Pace {
    /// A request begins; gives what is under way with it.
    pub(super) fn begin(&mut self, bytes: u64) -> u64 {
        self.under_way_bytes += bytes;
        self.under_way_bytes
    }

    /// A request is over, whatever became of it.
    pub(super) fn end(&mut self, bytes: u64) {
        self.under_way_bytes = self.under_way_bytes.saturating_sub(bytes);
    }

    /// The device answered.
    pub(super) fn heard(&mut self, now: Instant) {
        (self.heard, self.silences, self.silent_until) = (Some(now), 0, None);
    }

    /// It answered with right bytes. All that was under way when the request began has come by now.
    pub(super) fn landed(&mut self, landed: Landed, now: Instant) {
        let Landed { under_way_bytes, took, rtt } = landed;
        self.heard(now);
        let took = took.saturating_sub(rtt).max(took / 8).max(Duration::from_micros(1));
        let sample = under_way_bytes as f64 / took.as_secs_f64();
        let known = self.measured(now);
        let rate = match known {
            _ if under_way_bytes < TELLING_BYTES => known.filter(|rate| *rate >= sample),
            None => Some(sample),
            Some(rate) => Some(rate + (sample - rate) / 4.0),
        };
        if let Some(rate) = rate {
            self.rate = Some((rate, now));
        }
    }

    /// Another holder was faster, although it was asked later. What was under way has not come
    /// in this time.
    pub(super) fn overtaken(&mut self, under_way_bytes: u64, asked: Instant, now: Instant) {
        let heard_lately = now.checked_sub(SILENCE).is_none_or(|then| self.heard_since(then));
        match self.heard_since(asked) && heard_lately {
            false => self.stayed_silent(now),
            true => {
                let most = under_way_bytes as f64 / (now - asked).as_secs_f64().max(1e-6);
                let rate = self.measured(now).map_or(most, |rate| rate.min(most));
                self.rate = Some((rate, now));
            }
        }
    }

    /// It did not answer in time, cannot be reached, or its bytes are wrong.
    pub(super) fn stayed_silent(&mut self, now: Instant) {
        // Requests that were under way together fail together, and count once.
        if self.silent_until.is_none_or(|until| until <= now) {
            self.silent_until = Some(now + SILENT_FOR * 2u32.pow(self.silences.min(MAX_DOUBLINGS)));
            self.silences += 1;
        }
        self.rate = None;
    }

    /// All that is under way from it.
    pub(super) fn under_way_bytes(&self) -> u64 {
        self.under_way_bytes
    }

    /// When it last answered.
    pub(super) fn last_heard(&self) -> Option<Instant> {
        self.heard
    }

    fn heard_since(&self, then: Instant) -> bool {
        self.heard.is_some_and(|heard| heard >= then)
    }

    fn is_silent(&self, now: Instant) -> bool {
        self.silent_until.is_some_and(|until| now < until)
    }

    fn measured(&self, now: Instant) -> Option<f64> {
        self.rate.filter(|(_, at)| now.duration_since(*at) < MEASURED_FOR).map(|(rate, _)| rate)
    }

    /// How long a request that begins now will take, if that is known.
    pub(super) fn expected(&self, bytes: u64, rtt: Duration, now: Instant) -> Option<Duration> {
        self.measured(now).map(|rate| rtt + self.time_for(bytes, rate))
    }

    fn time_for(&self, bytes: u64, rate: f64) -> Duration {
        let bytes = (self.under_way_bytes + bytes) as f64;
        // A rate may be anything above zero.
        Duration::try_from_secs_f64(bytes / rate).unwrap_or(Duration::MAX / 4)
    }

    /// Its place for a request of so many bytes.
    pub(super) fn rank(&self, bytes: u64, rtt: Duration, now: Instant) -> Rank {
        if self.is_silent(now) {
            return Rank::Silent(self.silences);
        }
        let expected = self.expected(bytes, rtt, now);
        match expected {
            _ if bytes <= SMALL_BYTES && self.silences == 0 => {
                let assumed = || rtt + Duration::from_secs_f64(bytes as f64 / ASSUMED_RATE);
                Rank::Expected(in_steps(expected.unwrap_or_else(assumed)))
            }
            Some(expected) => Rank::Expected(expected),
            None => Rank::Unknown(in_steps(rtt)),
        }
    }

    /// Whether it is to be found out now what the device can do; if so, that is noted.
    pub(super) fn may_probe(&mut self, now: Instant) -> bool {
        let is_probed = self.probed.is_some_and(|at| now.duration_since(at) < PROBED_EVERY);
        let may = !is_probed && self.measured(now).is_none() && !self.is_silent(now);
        if may {
            self.probed = Some(now);
        }
        may
    }
}

/// After which time a request is late, of which it is known or not how long it should take.
pub(super) fn late_after(expected: Option<Duration>) -> Duration {
    expected.map_or(LATE_UNMEASURED, |expected| expected.saturating_mul(LATE_TIMES).max(LATE))
}

fn in_steps(time: Duration) -> Duration {
    let steps = time.as_millis() / STEP.as_millis();
    STEP.saturating_mul(u32::try_from(steps).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const LAN: Duration = Duration::from_micros(300);
    const FAR: Duration = Duration::from_millis(40);

    /// What it shows, the bytes, each holder's pace and round trip, and the one that is asked.
    type Case = (&'static str, u64, Vec<(Pace, Duration)>, usize);

    /// A device that was measured to bring so many MiB a second.
    fn measured(mib: f64, now: Instant) -> Pace {
        let mut pace = Pace::default();
        pace.landed(landed(MIB, Duration::from_secs_f64(1.0 / mib), Duration::ZERO), now);
        pace
    }

    fn landed(under_way_bytes: u64, took: Duration, rtt: Duration) -> Landed {
        Landed { under_way_bytes, took, rtt }
    }

    fn silent(times: u32, now: Instant) -> Pace {
        let mut pace = Pace::default();
        for _ in 0..times {
            pace.silent_until = None;
            pace.stayed_silent(now);
        }
        pace
    }

    #[test]
    fn the_first_to_be_asked_is_the_first_to_be_done() {
        let now = Instant::now();
        let fast = || measured(100.0, now);
        let slow = || measured(10.0, now);
        let busy = |mib: u64| {
            let mut pace = fast();
            pace.begin(mib * MIB);
            pace
        };
        let unknown = Pace::default;
        let begun = || {
            let mut pace = unknown();
            pace.begin(SMALL_BYTES);
            pace
        };
        let table: [Case; 12] = [
            ("fast before slow", MIB, vec![(slow(), LAN), (fast(), LAN)], 1),
            ("slow and idle before fast and busy", MIB, vec![(busy(20), LAN), (slow(), LAN)], 1),
            ("fast and busy before slow and idle", MIB, vec![(busy(5), LAN), (slow(), LAN)], 0),
            ("measured before unknown", MIB, vec![(unknown(), LAN), (slow(), FAR)], 1),
            ("near before far, unknown", MIB, vec![(unknown(), FAR), (unknown(), LAN)], 1),
            ("in their order, if alike", MIB, vec![(unknown(), LAN), (unknown(), LAN)], 0),
            ("near before far, small", 4096, vec![(fast(), FAR), (unknown(), LAN)], 1),
            ("in their order, small", 4096, vec![(slow(), LAN), (fast(), LAN)], 0),
            ("anything before silent", MIB, vec![(silent(1, now), LAN), (unknown(), FAR)], 1),
            ("the less silent one", MIB, vec![(silent(2, now), LAN), (silent(1, now), FAR)], 1),
            (
                "what begins a large read stays",
                2 * SMALL_BYTES,
                vec![(begun(), LAN), (unknown(), LAN)],
                0,
            ),
            ("a round trip counts", MIB, vec![(fast(), FAR), (measured(50.0, now), LAN)], 1),
        ];
        for (what, bytes, holders, first) in table {
            let ranks: Vec<_> =
                holders.iter().map(|(pace, rtt)| pace.rank(bytes, *rtt, now)).collect();
            let least = (0..ranks.len()).min_by_key(|n| ranks[*n]).unwrap();
            assert_eq!(least, first, "{what}: {ranks:?}");
        }
    }

    #[test]
    fn flights_spread_in_proportion_to_what_the_holders_bring() {
        let now = Instant::now();
        let mut holders = [measured(10.0, now), measured(30.0, now), measured(0.1, now)];
        let mut flights = [0; 3];
        for _ in 0..40 {
            let next = (0..3).min_by_key(|n| holders[*n].rank(MIB, LAN, now)).unwrap();
            holders[next].begin(MIB);
            flights[next] += 1;
        }
        assert_eq!(flights, [10, 30, 0]);
    }

    #[test]
    fn a_silent_device_comes_last_for_a_while_and_twice_as_long_each_time() {
        let start = Instant::now();
        let mut pace = measured(10.0, start);
        let mut now = start;
        for seconds in [2, 4, 8, 16, 32, 64, 64] {
            pace.stayed_silent(now);
            pace.stayed_silent(now + Duration::from_millis(1));
            let until = now + Duration::from_secs(seconds);
            let before = until - Duration::from_millis(1);
            assert!(matches!(pace.rank(MIB, LAN, before), Rank::Silent(_)));
            assert!(!pace.may_probe(before));
            assert_eq!(pace.rank(MIB, LAN, until), Rank::Unknown(Duration::ZERO));
            assert_eq!(pace.rank(4096, LAN, until), Rank::Unknown(Duration::ZERO));
            assert!(pace.clone().may_probe(until));
            now = until;
        }
        pace.landed(landed(MIB, Duration::from_millis(100), LAN), now);
        assert!(matches!(pace.rank(MIB, LAN, now), Rank::Expected(_)), "it is believed again");
        pace.stayed_silent(now);
        let until = now + Duration::from_secs(2);
        assert_eq!(pace.rank(MIB, LAN, until), Rank::Unknown(Duration::ZERO));
    }

    #[test]
    fn who_was_overtaken_is_slower_than_was_thought_or_silent() {
        let now = Instant::now();
        let asked = now - Duration::from_secs(1);
        let mut slow = measured(100.0, now);
        slow.overtaken(MIB, asked, now);
        assert_eq!(slow.measured(now), Some(MIB as f64));
        let mut silent = measured(100.0, asked - Duration::from_secs(1));
        silent.overtaken(MIB, asked, now);
        assert!(matches!(silent.rank(MIB, LAN, now), Rank::Silent(1)));
    }

    #[test]
    fn little_bytes_do_not_make_a_link_slow() {
        let now = Instant::now();
        let mut pace = measured(100.0, now);
        pace.landed(landed(4096, Duration::from_millis(4), LAN), now);
        assert_eq!(pace.measured(now), Some(100.0 * MIB as f64));
        let mut unknown = Pace::default();
        unknown.landed(landed(4096, Duration::from_millis(4), LAN), now);
        assert_eq!(unknown.measured(now), None);
    }

    #[test]
    fn a_flight_is_late_after_three_times_what_was_expected() {
        let ms = Duration::from_millis;
        for (expected, late) in [(Some(1), 250), (Some(84), 252), (Some(2000), 6000), (None, 1000)]
        {
            assert_eq!(late_after(expected.map(ms)), ms(late));
        }
        assert_eq!(late_after(Some(Duration::MAX)), Duration::MAX);
    }

    #[test]
    fn what_was_measured_long_ago_is_found_out_anew_and_not_all_the_time() {
        let now = Instant::now();
        let mut pace = measured(10.0, now);
        assert!(!pace.may_probe(now));
        let later = now + MEASURED_FOR;
        assert_eq!(pace.rank(MIB, LAN, later), Rank::Unknown(Duration::ZERO));
        assert!(pace.may_probe(later) && !pace.may_probe(later));
        assert!(pace.may_probe(later + PROBED_EVERY));
    }
}
