//! Remote directories, listed as a kernel does: it asks for more than it hands
//! out, goes on at the last entry that the program took, and takes a cookie to a
//! handle that never gave it when it drops a listing that it had kept.

use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::{BTreeMap, BTreeSet};

/// The entries that a program was given, and where it stands.
struct Program<'a> {
    drive: &'a Drive,
    dir: InodeNo,
    handle: HandleId,
    cookie: u64,
    seen: Vec<String>,
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        self.drive.releasedir(self.handle);
    }
}

impl<'a> Program<'a> {
    fn at(drive: &'a Drive, dir: InodeNo, cookie: u64) -> Self {
        Self { drive, dir, handle: drive.opendir(dir).unwrap(), cookie, seen: Vec::new() }
    }

    /// One call with room for `room` entries, of which the program takes `taken`.
    fn read(&mut self, room: usize, taken: usize) -> usize {
        let mut given = Vec::new();
        self.drive
            .readdir(self.handle, self.cookie, Detail::Attributes, &mut |item| {
                if given.len() == room {
                    return ControlFlow::Break(());
                }
                let name = String::from_utf8(item.name.to_vec()).unwrap();
                given.push((name, item.next_cookie));
                ControlFlow::Continue(())
            })
            .unwrap();
        given.truncate(taken);
        let count = given.len();
        for (name, cookie) in given {
            self.cookie = cookie;
            self.seen.push(name);
        }
        count
    }

    fn read_on(&mut self) {
        while self.read(100, 70) > 0 {}
    }

    /// Goes on as the kernel does with another handle of the same directory.
    fn change_handle(&mut self) {
        self.drive.releasedir(self.handle);
        self.handle = self.drive.opendir(self.dir).unwrap();
    }
}

/// Every entry and its cookie, `.` and `..` left out.
fn cookies(bench: &Bench, dir: InodeNo) -> Vec<(String, u64)> {
    let mut program = Program::at(&bench.drive, dir, 0);
    let mut all = Vec::new();
    while program.read(100, 1) > 0 {
        all.push((program.seen.last().unwrap().clone(), program.cookie));
    }
    all.split_off(2)
}

/// What a handle that gave nothing yet lists after this cookie.
fn after(bench: &Bench, dir: InodeNo, cookie: u64) -> Vec<String> {
    let mut program = Program::at(&bench.drive, dir, cookie);
    program.read_on();
    std::mem::take(&mut program.seen)
}

/// Numbered without leading zeros: their order is not that of the numbers.
fn many(count: u64) -> BTreeMap<String, Entry> {
    let entry = |n| remote_entry(100 + n, FileType::File, n);
    (0..count).map(|n| (format!("entry-{n}"), entry(n))).collect()
}

fn bench_with(entries: &BTreeMap<String, Entry>) -> Bench {
    let bench = Bench::new();
    change(&bench, entries.iter().map(|(name, entry)| (&name[..], Some(entry.clone()))));
    bench
}

fn change<'a>(bench: &Bench, changes: impl IntoIterator<Item = (&'a str, Option<Entry>)>) {
    bench.replicate_changes(changes.into_iter().map(|(name, to)| (1, name, to)).collect());
}

#[test]
fn a_large_directory_streams_completely_in_pieces_of_any_size() {
    let entries = many(2_000);
    let bench = bench_with(&entries);
    for step in [1, 7, 1000, 5000] {
        let listed = bench.list(bench.theirs(), Detail::Attributes, step);
        let names: Vec<_> = listed.into_iter().skip(2).map(|(name, _)| name).collect();
        assert!(names.iter().eq(entries.keys()), "{step} at a time");
    }
}

#[test]
fn a_listing_can_go_back_to_any_place() {
    let bench = bench_with(&many(1_000));
    let dir = bench.theirs();
    let all = cookies(&bench, dir);
    let mut program = Program::at(&bench.drive, dir, 0);
    program.read_on();
    for (at, (_, cookie)) in all.iter().enumerate().rev().step_by(37) {
        (program.cookie, program.seen) = (*cookie, Vec::new());
        program.read_on();
        assert!(program.seen.iter().eq(all[at + 1..].iter().map(|(name, _)| name)), "from {at}");
    }
    for (cookie, dots) in [(0, 2), (1, 1), (2, 0)] {
        assert_eq!(after(&bench, dir, cookie).len(), all.len() + dots, "from {cookie}");
    }
}

#[test]
fn in_the_middle_of_what_a_call_gave_changes_do_no_harm() {
    let entries = many(1_000);
    let bench = bench_with(&entries);
    let mut program = Program::at(&bench.drive, bench.theirs(), 0);
    for _ in 0..3 {
        program.read(100, 60);
    }
    let gone: Vec<_> = program.seen[2..].iter().step_by(2).cloned().collect();
    change(&bench, gone.iter().map(|name| (&name[..], None)));
    let new: Vec<_> = (0..50).map(|n| format!("a-new-{n}")).collect();
    change(&bench, new.iter().map(|n| (&n[..], Some(remote_entry(9_000, FileType::File, 1)))));
    program.read_on();
    assert!(program.seen[2..].iter().eq(entries.keys()), "what stayed comes exactly once");
}

#[test]
fn another_handle_goes_on_after_changes() {
    let entries = many(5_000);
    let bench = bench_with(&entries);
    let dir = bench.theirs();
    let before = cookies(&bench, dir);
    let gone: BTreeSet<_> = (0..5_000).step_by(3).map(|n| format!("entry-{n}")).collect();
    change(&bench, gone.iter().map(|name| (&name[..], None)));
    let new: Vec<_> = (0..100).map(|n| format!("b-new-{n}")).collect();
    change(&bench, new.iter().map(|n| (&n[..], Some(remote_entry(9_000, FileType::File, 1)))));
    for (at, (name, cookie)) in before.iter().enumerate().step_by(61) {
        let stayed = before[at + 1..].iter().map(|(n, _)| n).filter(|n| !gone.contains(*n));
        assert!(after(&bench, dir, *cookie).iter().eq(stayed), "after {name}");
    }
}

#[test]
fn the_entry_of_a_cookie_may_be_removed_replaced_and_renamed() {
    let entries = many(300);
    let bench = bench_with(&entries);
    let dir = bench.theirs();
    let before = cookies(&bench, dir);
    let at = 150;
    let (name, cookie) = &before[at];
    let stayed: Vec<_> = before[at + 1..].iter().map(|(name, _)| name.clone()).collect();
    let moved = |to| [(&name[..], None), (to, Some(entries[name].clone()))];
    for to in ["a-first", "zz-last"] {
        change(&bench, moved(to));
        let mut seen = after(&bench, dir, *cookie);
        seen.retain(|name| name != to);
        assert_eq!(seen, stayed, "renamed to {to}");
        change(&bench, [(to, None)]);
        assert_eq!(after(&bench, dir, *cookie), stayed, "removed");
    }
    change(&bench, [(&name[..], Some(remote_entry(9_000, FileType::Directory, 0)))]);
    assert_eq!(after(&bench, dir, *cookie), stayed, "replaced");
    let all: Vec<_> = entries.keys().map(|name| (&name[..], None)).collect();
    change(&bench, all);
    assert_eq!(after(&bench, dir, *cookie), [""; 0], "all removed");
}

#[test]
fn hard_links_are_entries_of_their_own() {
    let link = remote_entry(100, FileType::File, 1);
    let entries = (0..500).map(|n| (format!("link-to-a-file-{n:03}"), link.clone())).collect();
    let bench = bench_with(&entries);
    let dir = bench.theirs();
    let before = cookies(&bench, dir);
    assert_eq!(before.iter().map(|(_, cookie)| cookie).collect::<BTreeSet<_>>().len(), 500);
    for (at, (name, cookie)) in before.iter().enumerate().step_by(50) {
        change(&bench, [(&name[..], None)]);
        let rest = after(&bench, dir, *cookie);
        assert!(rest.iter().eq(before[at + 1..].iter().map(|(name, _)| name)), "after {name}");
    }
}

#[test]
fn a_place_that_nobody_gave_is_refused() {
    let bench = bench_with(&many(10));
    let handle = bench.drive.opendir(bench.theirs()).unwrap();
    let list = |cookie| {
        bench.drive.readdir(handle, cookie, Detail::Names, &mut |_| ControlFlow::Continue(()))
    };
    for cookie in [u64::MAX, i64::MAX as u64, 1_000_000 << 32] {
        assert_eq!(kind(list(cookie)), Kind::Stale);
    }
    bench.drive.releasedir(handle);
}

/// What happens between two calls.
#[derive(Clone, Debug)]
struct Step {
    room: usize,
    taken: usize,
    removed: Vec<String>,
    added: Vec<String>,
    other_handle: bool,
}

fn some_names(count: usize) -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec("(same-|[ab]){1,6}", 0..count)
}

fn step() -> impl Strategy<Value = Step> {
    let calls = (1..12_usize, 1..12_usize, any::<bool>());
    (calls, some_names(4), some_names(4)).prop_map(|((room, taken, other), removed, added)| Step {
        room,
        taken: taken.min(room),
        removed,
        added,
        other_handle: other,
    })
}

#[test]
fn whatever_comes_and_goes_what_stays_is_listed_once() {
    let bench = Bench::new();
    let next = std::cell::Cell::new(1_000);
    let new_id = || next.replace(next.get() + 1);
    let cases = (some_names(80), prop::collection::vec(step(), 1..40));
    let config = Config { cases: 128, ..Config::default() };
    let listed = TestRunner::new(config).run(&cases, |(names, steps)| {
        let dir = new_id();
        let put = |names: &[String], to: &dyn Fn() -> Option<Entry>| {
            let rows = names.iter().map(|name| (dir, &name[..], to()));
            bench.replicate_changes(rows.collect());
        };
        let file = || Some(remote_entry(new_id(), FileType::File, 1));
        let dir_name = format!("dir-{dir}");
        bench.replicate(vec![(1, &dir_name, remote_entry(dir, FileType::Directory, 0))]);
        put(&names, &file);
        let mut stayed: BTreeSet<_> = names.into_iter().collect();
        let at = bench.ino(&["there", "theirs", &dir_name]);
        let mut program = Program::at(&bench.drive, at, 0);
        for step in steps {
            program.read(step.room, step.taken);
            put(&step.removed, &|| None);
            put(&step.added, &file);
            stayed.retain(|name| !step.removed.contains(name));
            if step.other_handle {
                program.change_handle();
            }
        }
        program.read_on();
        for name in &stayed {
            let times = program.seen.iter().filter(|seen| *seen == name).count();
            prop_assert_eq!(times, 1, "{} in {:?}", name, program.seen);
        }
        Ok(())
    });
    listed.unwrap();
}
