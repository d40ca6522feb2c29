//! Two devices and what is promised of them, in random histories.
//!
//! | module | what it is |
//! |---|---|
//! | `writer` | the drive of the device that writes, over a replica |
//! | `owner` | the device that has the folder: index, indexer, applier |
//! | `link` | what sync does between the two, and how it fails |
//! | `tree` | files as a program, the disk or the model has them |
//! | `model` | what programs must see |
//! | `steps` | what may happen, drawn from a seed |
//! | `pure` | only the writer changes things: everything is as in the model |
//! | `meeting` | programs of the owner change things too: nothing is lost |
//!
//! All is real but the network, the kernel and the clock of the outbox, so that a history takes
//! milliseconds and is the same each time. A failure says the seed and the shortest history that
//! still fails. `SD_TEST_SEED` runs one seed, `SD_TEST_STEPS` sets how long histories are,
//! `SD_TEST_RUNS` how many, `SD_TEST_LONG` multiplies them.

mod link;
mod meeting;
mod model;
mod owner;
mod pure;
mod steps;
mod tree;
mod writer;

use crate::model::{DeviceId, LocationId};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use steps::Step;

const OWNER: DeviceId = DeviceId([2; 32]);
const WRITER: DeviceId = DeviceId([1; 32]);
const LOCATION: LocationId = LocationId([2; 16]);
const DEADLINE: Duration = Duration::from_secs(60);

/// Why a history is not as promised.
type Checked = Result<(), String>;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{variable}: {e}")))
}

/// Runs histories of many seeds.
fn explore(name: &str, runs: u64, draw: fn(u64, usize) -> Vec<Step>, run: fn(&[Step]) -> Checked) {
    let long = if std::env::var_os("SD_TEST_LONG").is_some() { 50 } else { 1 };
    let steps = number("SD_TEST_STEPS").unwrap_or(40) as usize;
    let seeds = match number("SD_TEST_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SD_TEST_RUNS").unwrap_or(runs * long),
    };
    let mut failures = Vec::new();
    for seed in seeds {
        let history = draw(seed, steps);
        let Err(why) = outcome(run, &history) else { continue };
        let (shortest, why) = shrunk(run, history, why);
        let listed: Vec<_> = shortest.iter().map(|step| format!("    {step:?},\n")).collect();
        failures.push(format!(
            "{name}: SD_TEST_SEED={seed} SD_TEST_STEPS={steps}: {why}\n{}",
            listed.concat()
        ));
        if failures.len() as u64 >= number("SD_TEST_FAILURES").unwrap_or(1) {
            break;
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Runs a history that once failed.
fn holds(run: fn(&[Step]) -> Checked, history: &[Step]) {
    if let Err(why) = outcome(run, history) {
        panic!("{why}");
    }
}

/// A panic of the product is a failure as any.
fn outcome(run: fn(&[Step]) -> Checked, history: &[Step]) -> Checked {
    catch_unwind(AssertUnwindSafe(|| run(history))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    })
}

/// Leaves out what the failure does not need.
fn shrunk(
    run: fn(&[Step]) -> Checked,
    mut history: Vec<Step>,
    mut why: String,
) -> (Vec<Step>, String) {
    let mut part = history.len() / 2;
    while part > 0 {
        let mut at = 0;
        let before = history.len();
        while at < history.len() {
            let mut shorter = history.clone();
            shorter.drain(at..(at + part).min(history.len()));
            match outcome(run, &shorter) {
                Err(still) => (history, why) = (shorter, still),
                Ok(()) => at += part,
            }
        }
        if history.len() == before || part > 1 {
            part /= 2;
        }
    }
    (history, why)
}
