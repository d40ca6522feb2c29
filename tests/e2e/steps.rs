//! The daemons die at each named step of the write path, by themselves, as from `kill -9`: what
//! was acknowledged is there. The rest is as in [`crate::kills`].

use crate::kills::{Known, RECOVERY, Writer, check, lab_with_two, seed};
use e2e::{Device, Need};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Of the device that is written on: accepting, making durable, noting answers, letting go.
const READERS: [&str; 14] = [
    "outbox::accept",
    "outbox::accepted",
    "staging::file",
    "staging::sync",
    "staging::synced",
    "journal::sync",
    "journal::synced",
    "journal::segment",
    "journal::segment-named",
    "outbox::answered",
    "outbox::answer-noted",
    "outbox::retire",
    "outbox::checkpoint",
    "outbox::checkpointed",
];

/// Of the device that is written to. Those of disks without the newer calls are stepped through
/// by the unit tests alone.
const OWNERS: [&str; 13] = [
    "apply::link",
    "apply::linked",
    "apply::exchange",
    "apply::exchanged",
    "apply::swapped",
    "apply::aside",
    "apply::rename",
    "apply::renamed",
    "apply::in-place-noted",
    "apply::in-place",
    "apply::in-place-extent",
    "apply::done",
    "apply::noted",
];

/// How long it may take until a step is come to: a checkpoint needs 16 MiB of journal.
const REACHED: Duration = Duration::from_secs(60);

#[test]
fn what_was_acknowledged_survives_a_death_at_each_step_of_writing() {
    let Some((lab, mut owner, mut reader)) = lab_with_two(&[Need::Fuse]) else { return };
    let mut random = StdRng::seed_from_u64(seed());
    let theirs = lab.folder("source");
    let outside = lab.folder("outside");
    let known = Arc::new(Mutex::new(Known::default()));
    let steps = READERS.map(|step| (step, true)).into_iter();
    let only = std::env::var("SD_TEST_STEP").ok();
    let wanted = |(step, _): &(&str, bool)| only.as_ref().is_none_or(|only| only == step);
    for (step, is_readers) in steps.chain(OWNERS.map(|step| (step, false))).filter(wanted) {
        let times = random.random_range(1..4);
        println!("{step}={times}");
        if step.starts_with("apply::in-place") {
            give_second_names(&theirs, &outside);
        }
        let dying = if is_readers { &mut reader } else { &mut owner };
        dying.stop();
        dying.start_to_die_at(step, times);
        if is_readers {
            reader.mount();
        }
        reader.wait_online("owner");
        let writer = Writer::start(reader.at("owner/files"), known.clone(), random.random());
        let dying = if is_readers { &mut reader } else { &mut owner };
        dying.wait_death(REACHED);
        dying.start();
        let known = writer.stop();
        if is_readers {
            reader.mount();
        }
        check(&owner, &reader, &theirs, &known, format!("{step}={times}"));
    }
    wait_for_no_leftovers(&owner, &theirs);
}

/// A file with another name, outside of the location, is written in place.
fn give_second_names(folder: &Path, outside: &Path) {
    fs::remove_dir_all(outside).expect("an own folder");
    fs::create_dir(outside).expect("an own folder");
    for entry in fs::read_dir(folder).expect("the owner's folder") {
        let entry = entry.expect("an entry");
        fs::hard_link(entry.path(), outside.join(entry.file_name())).expect("a second name");
    }
}

/// No temporary name and no redo file remains.
fn wait_for_no_leftovers(owner: &Device, folder: &Path) {
    let left = |dir: &Path| fs::read_dir(dir).map_or(0, Iterator::count);
    let hidden = fs::read_dir(folder).expect("the owner's folder").filter(|entry| {
        let name = entry.as_ref().expect("an entry").file_name();
        name.to_string_lossy().contains(".spacedrive-")
    });
    assert_eq!(hidden.count(), 0);
    for dir in ["spare", "redo"] {
        let dir = owner.data_dir().join("apply").join(dir);
        e2e::wait::wait_until(dir.display(), RECOVERY, || left(&dir) == 0);
    }
}
