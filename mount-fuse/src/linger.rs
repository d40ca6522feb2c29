//! Looking for the next request for a moment before sleeping.
//!
//! A program that walks a tree, or makes many files, sends one small request after the other and
//! waits for each answer. To wake the thread that sleeps in `read` takes longer than to answer, on
//! a virtual machine some times as long. So the thread that gave an answer looks for the next
//! request for [`MOMENT`] before it goes to sleep
//! (docs/decisions/0008-look-before-sleeping.md).
//!
//! It costs a processor's time:
//!
//! - One thread of a mount at most looks, and gives way to whatever else wants its processor.
//! - Only while requests follow each other quickly: one now and then costs nothing, several at once
//!   cost one moment after the last of them.
//! - Who has looked in vain twice in a row leaves out ever more answers before the next look.
//!
//! No request depends on it: the other threads sleep in `read` meanwhile and are woken as ever.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Long enough for a program to wake, to do what it does between two requests of a walk, and to
/// send the next one.
const MOMENT: Duration = Duration::from_micros(400);
/// Requests that follow the last answer within this time come from such a program: a moment, and
/// the time in which threads that sleep are woken.
const QUICK: Duration = Duration::from_micros(600);
/// Twice as many answers are left out with each look in vain, so many times.
const DOUBLED_AT_MOST: u32 = 8;

/// When the threads of one mount look before they sleep.
pub(crate) struct Linger<D> {
    /// The kernel's end of the mount; `None` where nobody looks: the program that is to send the
    /// next request would have no processor, or nobody would sleep in `read` meanwhile.
    device: Option<D>,
    began: Instant,
    /// When the last answer was given, in nanoseconds since then.
    answered: AtomicU64,
    /// Locked by the thread that looks.
    pace: Mutex<Pace>,
}

impl<D: AsFd> Linger<D> {
    /// For a mount with so many serving threads.
    pub(crate) fn new(device: D, threads: usize) -> Self {
        let has_processors = thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        Self {
            device: (has_processors && threads > 1).then_some(device),
            began: Instant::now(),
            answered: AtomicU64::new(0),
            pace: Mutex::default(),
        }
    }

    /// To be held while a request is served, until it is answered. Not by what waits for a lock or
    /// a disk: nothing follows it quickly.
    pub(crate) fn serve(&self) -> Serving<'_, D> {
        let answered = Duration::from_nanos(self.answered.load(Ordering::Relaxed));
        let is_quick = self.began.elapsed().saturating_sub(answered) < QUICK;
        Serving { linger: self, is_quick }
    }

    fn end(&self, is_quick: bool) {
        let Some(device) = &self.device else { return };
        let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.answered.store(now, Ordering::Relaxed);
        // Another thread is looking, or has panicked while it was.
        let Ok(mut pace) = self.pace.try_lock() else { return };
        if is_quick && pace.is_due() {
            pace.looked(has_request(device));
        }
    }
}

/// A request is being served.
pub(crate) struct Serving<'a, D: AsFd> {
    linger: &'a Linger<D>,
    /// It came soon after the last answer.
    is_quick: bool,
}

impl<D: AsFd> Drop for Serving<'_, D> {
    fn drop(&mut self) {
        self.linger.end(self.is_quick);
    }
}

/// Whether there is something to read within a moment; the end of the mount is.
fn has_request(device: &impl AsFd) -> bool {
    let until = Instant::now() + MOMENT;
    loop {
        match poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&Timespec::default())) {
            Ok(0) if Instant::now() < until => thread::yield_now(),
            Ok(0) => return false,
            // What is wrong with it, `read` will tell.
            Ok(_) | Err(_) => return true,
        }
    }
}

/// How often it is worth looking.
#[derive(Default)]
struct Pace {
    /// Looks in vain since the last one that was not.
    in_vain: u32,
    /// Quick answers that are still left out.
    left_out: u32,
}

impl Pace {
    /// Whether to look after this answer.
    fn is_due(&mut self) -> bool {
        let is_due = self.left_out == 0;
        self.left_out = self.left_out.saturating_sub(1);
        is_due
    }

    /// The first look in vain is forgiven: a program works between two requests now and then.
    fn looked(&mut self, found: bool) {
        self.in_vain = if found { 0 } else { (self.in_vain + 1).min(DOUBLED_AT_MOST) };
        self.left_out = (1_u32 << self.in_vain).saturating_sub(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read, Write};

    /// A mount on a machine of several processors, whatever this one has.
    fn over(device: PipeReader) -> Linger<PipeReader> {
        Linger { device: Some(device), ..Linger::new(std::io::pipe().unwrap().0, 2) }
    }

    /// Serves a request that came soon after the last answer, and says how long it took.
    fn serve_quickly(linger: &Linger<PipeReader>) -> Duration {
        let began = Instant::now();
        drop(Serving { linger, is_quick: true });
        began.elapsed()
    }

    fn in_vain(linger: &Linger<PipeReader>) -> u32 {
        linger.pace.lock().unwrap().in_vain
    }

    #[test]
    fn a_request_that_comes_within_a_moment_is_found() {
        let (device, mut kernel) = std::io::pipe().unwrap();
        let linger = over(device);
        assert!(serve_quickly(&linger) >= MOMENT);
        assert_eq!(in_vain(&linger), 1);
        kernel.write_all(b"request").unwrap();
        serve_quickly(&linger);
        assert_eq!(in_vain(&linger), 0);
        // It is left to who reads.
        let mut request = [0; 7];
        linger.device.as_ref().unwrap().read_exact(&mut request).unwrap();
        assert_eq!(&request, b"request");
    }

    #[test]
    fn nobody_looks_after_a_request_that_came_alone() {
        let (device, _kernel) = std::io::pipe().unwrap();
        let linger = over(device);
        thread::sleep(QUICK);
        drop(linger.serve());
        assert_eq!(in_vain(&linger), 0);
        let quick = (0..1000).any(|_| {
            drop(linger.serve());
            in_vain(&linger) > 0
        });
        assert!(quick, "the next ones come soon");
    }

    #[test]
    fn one_thread_looks_at_a_time() {
        let (device, _kernel) = std::io::pipe().unwrap();
        let linger = over(device);
        let looking = linger.pace.lock().unwrap();
        serve_quickly(&linger);
        drop(looking);
        assert_eq!(in_vain(&linger), 0);
    }

    #[test]
    fn the_end_of_the_mount_is_not_waited_for() {
        let (device, kernel) = std::io::pipe().unwrap();
        let linger = over(device);
        drop(kernel);
        serve_quickly(&linger);
        assert_eq!(in_vain(&linger), 0);
    }

    #[test]
    fn who_looks_in_vain_looks_ever_more_seldom() {
        let mut pace = Pace::default();
        let looks_of = |pace: &mut Pace, answers: u32| {
            let due = (0..answers).filter(|_| {
                let is_due = pace.is_due();
                if is_due {
                    pace.looked(false);
                }
                is_due
            });
            due.count()
        };
        assert_eq!(looks_of(&mut pace, 2), 2);
        assert_eq!(looks_of(&mut pace, 10), 2);
        looks_of(&mut pace, 1_000);
        assert!(looks_of(&mut pace, 10_000) <= 40, "one of 255");
        pace.left_out = 0;
        pace.looked(true);
        assert!(pace.is_due() && pace.is_due());
    }
}
