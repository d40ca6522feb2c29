//! Which calls tell the programs that watch of which changes.
use super::*;

/// The peer's folder with a file `a`, a file `b` and a directory `dir`.
fn bench() -> Bench {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "a", remote_entry(10, FileType::File, 1)),
        (1, "b", remote_entry(11, FileType::File, 1)),
        (1, "dir", remote_entry(12, FileType::Directory, 0)),
    ]);
    bench
}

/// A directory, a name in it and what it has now.
type Row<'a> = (u64, &'a str, Option<Entry>);

/// What is told of these rows to who watches these.
fn told(bench: &Bench, watched: &[InodeNo], rows: Vec<Row<'_>>) -> Vec<Event> {
    let (mut pending, mut changes) = (Pending::default(), bench.drive.subscribe());
    bench.replicate_changes(rows);
    let Some(crate::changes::Next::Batch(batch)) = changes.blocking_next() else { panic!() };
    pending.add(&batch);
    bench.drive.events(pending.take(), &watched.iter().copied().collect())
}

/// As text, with the ghosts named by whether they are nobody's.
fn words(events: &[Event]) -> Vec<String> {
    let place = |p: &Place| format!("{}/{}", String::from_utf8_lossy(&p.path), p.name.display());
    let ghost = |found: &Found| match found.ino.0 < 256 {
        true => "nobody's".to_owned(),
        false => format!("{:x}", found.ino.0),
    };
    let word = |event: &Event| match event {
        Event::Created(at) => format!("created {}", place(at)),
        Event::Deleted(at, was) => format!("deleted {} {}", place(at), ghost(was)),
        Event::Moved(from, to, over) => {
            let over = over.as_ref().map_or("nothing".to_owned(), ghost);
            format!("moved {} {} over {over}", place(from), place(to))
        }
        Event::Modified(at) => format!("modified {}", place(at)),
        Event::Touched(at) => format!("touched {}", place(at)),
        Event::Directory { path, .. } => format!("directory {}", String::from_utf8_lossy(path)),
    };
    events.iter().map(word).collect()
}

fn changed(id: u64, generation: u32, change: impl Fn(&mut Attr)) -> Option<Entry> {
    let mut entry = remote_entry(id, FileType::File, 1);
    change(&mut entry.attr);
    Some(Entry { generation, ..entry })
}

#[test]
fn each_kind_of_change_has_its_event() {
    let generation = remote_entry(10, FileType::File, 1).generation;
    let same = |_: &mut Attr| {};
    let cases: Vec<(Vec<Row<'_>>, &[&str])> = vec![
        (vec![(1, "new", changed(20, 1, same))], &["created there/theirs/new"]),
        (vec![(1, "a", None)], &["deleted there/theirs/a nobody's"]),
        (vec![(1, "a", changed(10, generation + 1, same))], &["modified there/theirs/a"]),
        (vec![(1, "a", changed(10, generation, |a| a.size = 9))], &["modified there/theirs/a"]),
        (vec![(1, "a", changed(10, generation, |a| a.perm = 0o600))], &["touched there/theirs/a"]),
        (vec![(1, "a", changed(10, generation, |a| a.blocks = 9))], &[]),
        (
            vec![(1, "a", None), (12, "c", changed(10, generation, same))],
            &["moved there/theirs/a there/theirs/dir/c over nothing"],
        ),
        (
            vec![(1, "a", None), (1, "b", changed(10, generation, same))],
            &["moved there/theirs/a there/theirs/b over nobody's"],
        ),
        (
            vec![(1, "a", changed(20, 1, same)), (1, "c", changed(10, generation, same))],
            &["moved there/theirs/a there/theirs/c over nothing", "created there/theirs/a"],
        ),
        (
            vec![(1, "a", Some(remote_entry(20, FileType::Directory, 0)))],
            &["deleted there/theirs/a nobody's", "created there/theirs/a"],
        ),
    ];
    for (rows, expected) in cases {
        let bench = bench();
        let told = told(&bench, &[bench.theirs()], rows);
        assert_eq!(words(&told), expected);
    }
}

#[test]
fn who_does_not_watch_is_told_nothing() {
    let bench = bench();
    let dir = bench.ino(&["there", "theirs", "dir"]);
    let rows = || vec![(1, "new", changed(20, 1, |_| {})), (1, "a", None)];
    assert_eq!(told(&bench, &[], rows()), []);
    assert_eq!(told(&bench, &[dir], rows()), []);
    let inside = told(&bench, &[dir], vec![(12, "in", changed(21, 1, |_| {}))]);
    assert_eq!(words(&inside), ["created there/theirs/dir/in"]);
}

#[test]
fn who_has_a_file_open_sees_it_at_its_end_as_before() {
    let bench = bench();
    let file = bench.ino(&["there", "theirs", "a"]);
    let before = bench.drive.getattr(file, None).unwrap();
    let opened = bench.drive.open(file, OpenFlags::READ).unwrap();
    let told = told(&bench, &[file], vec![(1, "a", None)]);
    let [Event::Deleted(_, ghost)] = &told[..] else { panic!("{told:?}") };
    assert_eq!((ghost.ino, ghost.generation, ghost.attr), (file, before.generation, before.attr));
    assert_eq!(ghost.valid_for, Duration::ZERO);
    bench.drive.release(opened.handle);
}

#[test]
fn who_watches_a_file_hears_of_its_end_and_no_other_file_is_taken_for_it() {
    let bench = bench();
    let file = bench.ino(&["there", "theirs", "a"]);
    let generation = remote_entry(10, FileType::File, 1).generation;
    let replaced = told(&bench, &[file], vec![(1, "a", changed(10, generation + 1, |_| {}))]);
    let dead = format!("deleted there/theirs/a {:x}", file.0);
    assert_eq!(words(&replaced), [dead.as_str(), "created there/theirs/a"]);
    // Its second name goes; the first one still leads to it.
    let file = bench.ino(&["there", "theirs", "b"]);
    bench.replicate(vec![(12, "b", remote_entry(11, FileType::File, 1))]);
    let gone = told(&bench, &[file], vec![(1, "b", None)]);
    assert_eq!(words(&gone), ["deleted there/theirs/b nobody's"]);
}

#[test]
fn what_this_device_shows_as_its_own_change_is_not_told_again() {
    let bench = bench();
    let theirs = bench.theirs();
    bench.drive.unlink(theirs, b"a").unwrap();
    assert_eq!(told(&bench, &[theirs], vec![(1, "a", None)]), []);
}

#[test]
fn what_comes_and_goes_meanwhile_is_told_as_what_became_of_it() {
    let brief = |id| Some((&remote_entry(id, FileType::File, 1)).into());
    let bench = bench();
    let change = |name: &str, was, now| Change::Entry {
        location: bench.remote,
        parent: FileId::ROOT,
        name: Name::new(name.as_bytes()).unwrap(),
        was,
        now,
    };
    let mut pending = Pending::default();
    pending.add(&[
        change("tmp", None, brief(20)),
        change("tmp", brief(20), None),
        change("x", None, brief(21)),
        change("x", brief(21), None),
        change("a", brief(10), brief(21)),
    ]);
    let told = bench.drive.events(pending.take(), &HashSet::from([bench.theirs()]));
    assert_eq!(words(&told), ["modified there/theirs/a"]);
    assert!(pending.is_empty());
}

#[test]
fn too_many_changes_are_told_by_their_directory_in_bounded_memory() {
    let bench = bench();
    let now = Some((&remote_entry(20, FileType::File, 1)).into());
    let flood = |parents: u64, names: u64| {
        let mut pending = Pending::default();
        for n in 0..names {
            let (location, parent) = (bench.remote, FileId(1 + 11 * (n % parents)));
            let name = Name::new(n.to_string().into_bytes()).unwrap();
            pending.add(&[Change::Entry { location, parent, name, was: None, now }]);
        }
        pending.take()
    };
    let dir = bench.ino(&["there", "theirs", "dir"]);
    let watched = HashSet::from([bench.theirs(), dir]);
    let mut told = words(&bench.drive.events(flood(2, 100_000), &watched));
    told.sort();
    assert_eq!(told, ["directory there/theirs", "directory there/theirs/dir"]);
    let mut told = words(&bench.drive.events(flood(100_000, 100_000), &watched));
    told.sort();
    assert_eq!(told, ["directory there/theirs", "directory there/theirs/dir"]);
}
