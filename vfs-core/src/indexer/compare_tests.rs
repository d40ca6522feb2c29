//! Rows that are wrong although no event says so, and disks that change all the time.

use super::tests::{Device, populate, quick};
use super::*;
use crate::index::Observed;
use crate::local::Root;
use crate::model::Name;
use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

fn compare(device: &Device) -> Compared {
    device.indexer.compare(device.no, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn populated() -> Device {
    let device = Device::new(quick());
    populate(&device.at(""), 20, 10);
    std::os::unix::fs::symlink("nowhere", device.at("d1/link")).unwrap();
    device.start();
    device.hashes();
    device
}

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

/// What the disk has, to be told otherwise.
fn observed(device: &Device, dir: &str, text: &str) -> Observed {
    let root = Root::open(&device.at("")).unwrap();
    let dir: Vec<_> = dir.split('/').map(name).collect();
    root.observe(&dir, &name(text)).unwrap()
}

/// Has the index believe something that no disk said.
fn tell(device: &Device, dir: &str, text: &str, now: Option<Observed>) {
    let dir = device.entry(dir).unwrap().file_id;
    device.index.observe_entry(device.no, dir, &name(text), now).unwrap();
}

#[test]
fn rows_that_follow_the_disk_differ_in_nothing() {
    let device = populated();
    let compared = compare(&device);
    let entries = device.index.counts(device.no).entries;
    assert_eq!(compared, Compared { entries, ..Compared::default() });
}

#[test]
fn what_no_event_told_is_found_and_mended_by_the_next_scan() {
    let device = populated();
    let mut grown = observed(&device, "d1/e1", "f1");
    grown.attr.size += 1;
    tell(&device, "d1/e1", "f1", Some(grown));
    tell(&device, "d1/e1", "f2", None);
    let mut invented = observed(&device, "d2/e2", "f3");
    invented.disk_ino = 1 << 50;
    tell(&device, "d2/e2", "invented", Some(invented));
    let compared = compare(&device);
    let Compared { unindexed, changed, vanished, undecided, has_more, .. } = compared;
    assert_eq!((unindexed, changed, vanished, undecided, has_more), (1, 1, 1, 0, false));
    let mut examples = compared.examples.clone();
    examples.sort();
    let path = |names: [&str; 3]| names.map(name).to_vec();
    let expected = [["d1", "e1", "f1"], ["d1", "e1", "f2"], ["d2", "e2", "invented"]];
    assert_eq!(examples, expected.map(path));
    assert_eq!(compared.directories.len(), 2);
    device.indexer.follow_up(device.no, &compared);
    device.follows();
    assert_eq!(compare(&device).differences(), 0);
}

/// No event tells of a name that another one of the file went.
#[test]
fn a_hard_link_that_went_is_no_difference_of_the_other() {
    let device = Device::new(quick());
    populate(&device.at(""), 3, 3);
    fs::hard_link(device.at("d1/e1/f1"), device.at("d2/linked")).unwrap();
    device.start();
    device.hashes();
    fs::remove_file(device.at("d2/linked")).unwrap();
    device.until("the end of the link", || device.entry("d2/linked").is_none());
    assert_eq!(device.entry("d1/e1/f1").unwrap().attr.nlink, 2, "as before");
    assert_eq!(compare(&device).differences(), 0);
}

#[test]
fn what_changed_unwatched_is_found() {
    let device = Device::new(IndexerConfig {
        watch: false,
        rescan_after: Duration::from_secs(3600),
        ..quick()
    });
    populate(&device.at(""), 3, 3);
    device.start();
    // Whoever hashes a file that is gone sees that it is.
    device.hashes();
    fs::create_dir(device.at("d1/new")).unwrap();
    fs::write(device.at("d1/new/below"), "a directory without a row counts once").unwrap();
    fs::remove_file(device.at("d2/e2/f1")).unwrap();
    let Compared { unindexed, changed, vanished, .. } = compare(&device);
    assert_eq!((unindexed, vanished), (1, 1));
    assert_eq!(changed, 2, "the times of the two directories");
}

#[test]
fn a_busy_disk_gives_no_false_alarm() {
    let device = populated();
    let is_over = AtomicBool::new(false);
    let compared = std::thread::scope(|scope| {
        let (device, is_over) = (&device, &is_over);
        for writer in 0..3 {
            scope.spawn(move || {
                for round in 0_u64.. {
                    if is_over.load(Ordering::Relaxed) {
                        break;
                    }
                    work(device, writer, round);
                }
            });
        }
        let compared: Vec<_> = (0..5).map(|_| compare(device)).collect();
        is_over.store(true, Ordering::Relaxed);
        compared
    });
    for compared in compared {
        assert!(compared.entries > 100, "{compared:?}");
        assert_eq!((compared.differences(), compared.undecided), (0, 0), "{compared:?}");
    }
    device.follows();
}

/// What programs do: append, save atomically, make and remove, rename directories.
fn work(device: &Device, writer: u64, round: u64) {
    let at = |path: String| device.at(&path);
    let log = at(format!("d{writer}/log"));
    let mut log = fs::File::options().append(true).create(true).open(log).unwrap();
    log.write_all(b"line\n").unwrap();
    let (draft, saved) = (at(format!("d{writer}/draft")), at(format!("d{writer}/saved")));
    fs::write(&draft, round.to_string()).unwrap();
    fs::rename(&draft, &saved).unwrap();
    let dir = at(format!("d{writer}/dir{}", round % 3));
    fs::create_dir_all(dir.join("below")).unwrap();
    fs::write(dir.join("below/file"), "text").unwrap();
    let moved = at(format!("d{writer}/moved"));
    fs::rename(&dir, &moved).unwrap();
    fs::remove_dir_all(&moved).unwrap();
}

#[test]
fn a_location_that_goes_offline_meanwhile_is_not_compared() {
    let device = populated();
    let folder = device.at("");
    let away = folder.parent().unwrap().join("away");
    let compared = device.indexer.compare(device.no, &mut |so_far| {
        if so_far.entries > 0 && folder.exists() {
            fs::rename(&folder, &away).unwrap();
        }
        ControlFlow::Continue(())
    });
    assert!(compared.is_err(), "{compared:?}");
}

#[test]
fn whoever_listens_may_end_it() {
    let device = populated();
    let mut told = 0;
    let compared = device.indexer.compare(device.no, &mut |_| {
        told += 1;
        ControlFlow::Break(())
    });
    assert_eq!((compared.unwrap().differences(), told), (0, 1));
}
