//! How much may be under way from one device for pins: what keeps the link busy, and no more, so
//! that what a program asks for is not behind much.

use crate::content::manifest::GROUP_BYTES;
use crate::content::window::Link;
use crate::content::{Content, lock};
use crate::source::MAX_FETCH_BYTES;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore};

/// No more is under way than comes in this time.
const IN_FLIGHT_TIME: Duration = Duration::from_millis(250);
/// The least that is under way, and what is on a link that is not known yet.
const LEAST_BYTES: u64 = 4 * GROUP_BYTES;
/// The most.
const MOST_BYTES: u64 = 8 << 20;
/// Programs that wait for bytes are looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Files at once. Small ones cost a round trip each; more than these make others wait.
pub(super) const FILES: u32 = 16;

/// What is under way from one device.
pub(super) struct Lane {
    /// One for each small file.
    pub places: Arc<Semaphore>,
    state: Mutex<State>,
    freed: Notify,
    /// Who is next.
    turn: tokio::sync::Mutex<()>,
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(FILES as usize)),
            state: Mutex::default(),
            freed: Notify::new(),
            turn: tokio::sync::Mutex::default(),
        }
    }
}

#[derive(Default)]
struct State {
    flying_bytes: u64,
    link: Link,
    /// What the fastest one took: on a link with long round trips more is under way.
    fastest: Option<Duration>,
}

impl State {
    fn most_bytes(&self) -> u64 {
        let time = IN_FLIGHT_TIME.max(2 * self.fastest.unwrap_or_default());
        let known = self.link.known_bytes_in(time).unwrap_or(LEAST_BYTES);
        known.clamp(LEAST_BYTES, MOST_BYTES)
    }
}

/// The right to have some bytes under way.
pub(super) struct Flight<'a> {
    lane: &'a Lane,
    bytes: u64,
    under_way_bytes: u64,
    began: Instant,
}

impl Flight<'_> {
    /// The bytes of a flight.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The longest request of it.
    pub fn request_bytes(&self) -> u64 {
        (self.bytes / 2 / GROUP_BYTES * GROUP_BYTES).clamp(GROUP_BYTES, MAX_FETCH_BYTES)
    }

    /// All of it came.
    pub fn landed(self) {
        let mut state = lock(&self.lane.state);
        let took = self.began.elapsed();
        state.link.note(self.under_way_bytes, took);
        state.fastest = Some(state.fastest.map_or(took, |fastest| fastest.min(took)));
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        lock(&self.lane.state).flying_bytes -= self.bytes;
        self.lane.freed.notify_one();
    }
}

impl Lane {
    /// Waits until some of `wanted` bytes may be fetched: until nobody else fetches anything, and
    /// what is under way for pins is little.
    pub async fn enter(&self, content: &Content, wanted: u64) -> Flight<'_> {
        let _turn = self.turn.lock().await;
        loop {
            if is_quiet(content)
                && let Some(flight) = self.try_enter(wanted)
            {
                return flight;
            }
            let _ = tokio::time::timeout(LOOK_EVERY, self.freed.notified()).await;
        }
    }

    fn try_enter(&self, wanted: u64) -> Option<Flight<'_>> {
        let mut state = lock(&self.state);
        let most = state.most_bytes();
        // Two at once, so that the link is not idle between them.
        let bytes = wanted.min((most / 2).max(GROUP_BYTES));
        if state.flying_bytes > 0 && state.flying_bytes + bytes > most {
            return None;
        }
        state.flying_bytes += bytes;
        let under_way_bytes = state.flying_bytes;
        Some(Flight { lane: self, bytes, under_way_bytes, began: Instant::now() })
    }
}

/// Whether no program, nor what is read ahead of one, waits for bytes.
fn is_quiet(content: &Content) -> bool {
    let flying = content.flying.load(Ordering::Relaxed);
    flying <= content.brought.load(Ordering::Relaxed)
}
