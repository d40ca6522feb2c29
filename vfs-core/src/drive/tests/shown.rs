use super::*;

fn bench() -> Bench {
    let bench = Bench::new();
    bench.replicate(vec![
        (1, "dir", remote_entry(2, FileType::Directory, 0)),
        (2, "below", remote_entry(3, FileType::File, 5)),
        (1, "file", remote_entry(4, FileType::File, 7)),
    ]);
    bench.put("own", b"text");
    wait_until("the own file is indexed", || bench.index.counts(bench.own).files == 1);
    bench
}

fn texts(shown: &[Shown]) -> Vec<String> {
    let text = |shown: &Shown| {
        shown.path.iter().map(|name| name.display().into_owned()).collect::<Vec<_>>().join("/")
    };
    shown.iter().map(text).collect()
}

#[test]
fn what_is_shown_is_what_a_lookup_gives_and_counts_as_none() {
    let bench = bench();
    let shown = bench.drive.shown(100);
    let mut paths = texts(&shown);
    paths.sort();
    let theirs = ["there/theirs/dir", "there/theirs/dir/below", "there/theirs/file"];
    assert_eq!(paths, [&["here/mine/own"][..], &theirs].concat());
    assert!(bench.drive.own.table.is_empty(), "no kernel holds anything");
    for Shown { path, found } in shown {
        let names: Vec<_> = path.iter().map(|n| n.display().into_owned()).collect();
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        assert_eq!(bench.lookup(&names).unwrap(), found, "{names:?}");
    }
}

#[test]
fn of_a_large_location_the_top_is_shown() {
    let bench = bench();
    let mut paths = texts(&bench.drive.shown(2));
    paths.sort();
    assert_eq!(paths, ["here/mine/own", "there/theirs/dir", "there/theirs/file"]);
}

#[test]
fn what_is_shown_again_is_told_as_a_change() {
    let bench = bench();
    let dir = bench.ino(&["there", "theirs", "dir"]);
    let below = bench.ino(&["there", "theirs", "dir", "below"]);
    let mut changes = bench.drive.subscribe();
    let path = ["there", "theirs", "dir", "below"].map(|n| Name::new(n.as_bytes()).unwrap());
    assert!(bench.drive.show_again(&path).unwrap());
    let told = bench.told_until(&mut changes, &Invalidation::Attributes(below));
    let entry = Invalidation::Entry { parent: dir, name: path[3].clone() };
    assert!(told.contains(&entry) && told.contains(&Invalidation::Directory(dir)), "{told:?}");
    assert!(!bench.drive.show_again(&path[..2]).unwrap(), "no entry of a location");
}
