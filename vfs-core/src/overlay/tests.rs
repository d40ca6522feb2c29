use super::*;
use crate::ops::NewContent;

const L: LocationNo = LocationNo(3);

fn name(text: &str) -> Name {
    Name::new(text.as_bytes()).unwrap()
}

fn place(dir: u64, text: &str) -> Place {
    Place { dir: FileId(dir), name: name(text) }
}

fn unlink(file: u64, dir: u64, text: &str) -> Change {
    Change::Unlink { file: FileId(file), at: place(dir, text), base: None }
}

fn rename(file: u64, from: Place, to: Place) -> Change {
    Change::Rename { file: FileId(file), from, to, replaced: None, exchange: false }
}

fn chmod(file: u64, perm: u16) -> Change {
    let (file, perm) = (FileId(file), Some(perm));
    Change::SetAttr { file, base: None, perm, uid: None, gid: None, atime: None, mtime: None }
}

fn apply(overlay: &mut Overlay, no: u64, change: &Change) {
    let at = Time { secs: no as i64, nanos: 0 };
    overlay.apply(L, Shown { no, at, change, bytes: None, is_directory: false, generation: 0 });
}

fn shown(overlay: &Overlay, dir: u64, text: &str) -> Option<Option<FileId>> {
    overlay.locations.get(&L)?.name(FileId(dir), text.as_bytes())
}

fn file() -> Entry {
    new_file_row(FileId(7), Time::default())
}

#[test]
fn an_operation_takes_back_only_what_no_later_one_replaced() {
    let mut overlay = Overlay::default();
    let moved = rename(7, place(1, "a"), place(1, "b"));
    let back = rename(7, place(1, "b"), place(1, "a"));
    apply(&mut overlay, 1, &moved);
    apply(&mut overlay, 2, &back);
    assert_eq!(shown(&overlay, 1, "a"), Some(Some(FileId(7))));
    assert_eq!(shown(&overlay, 1, "b"), Some(None));
    overlay.retire(L, 1, &moved);
    assert_eq!(shown(&overlay, 1, "a"), Some(Some(FileId(7))));
    overlay.retire(L, 2, &back);
    assert!(overlay.locations.is_empty(), "{overlay:?}");
}

#[test]
fn what_came_to_nothing_shows_the_earlier_again() {
    let mut overlay = Overlay::default();
    let (first, second) = (chmod(7, 0o600), chmod(7, 0o644));
    apply(&mut overlay, 1, &first);
    apply(&mut overlay, 2, &second);
    let perm = |o: &Overlay| o.locations[&L].patched(file()).attr.perm;
    assert_eq!(perm(&overlay), 0o644);
    overlay.retire(L, 2, &second);
    assert_eq!(perm(&overlay), 0o600);
    let gone = unlink(7, 1, "a");
    apply(&mut overlay, 3, &gone);
    assert_eq!(overlay.locations[&L].patched(file()).attr.nlink, 0);
    overlay.retire(L, 3, &gone);
    overlay.retire(L, 1, &first);
    assert!(overlay.locations.is_empty(), "{overlay:?}");
}

#[test]
fn bytes_that_no_operation_carries_outlast_those_that_one_does() {
    let mut overlay = Overlay::default();
    let content = NewContent {
        size: 4,
        mtime: Time::default(),
        kept_bytes: 0,
        extents: Vec::new(),
        digest: [0; 32],
        whole: None,
        inline: None,
    };
    let base = crate::ops::Base::After(1);
    let write = Change::Write { file: FileId(7), base, content, path: vec![name("a")] };
    let live = Live::new(4, Time::default());
    let bytes = Bytes { live: Arc::clone(&live), generation: 9 };
    overlay.show_uncommitted(L, FileId(7), bytes.clone());
    let at = Time::default();
    let (is_directory, generation) = (false, 9);
    let op =
        Shown { no: 5, at, change: &write, bytes: Some(bytes.clone()), is_directory, generation };
    overlay.apply(L, op);
    overlay.show_uncommitted(L, FileId(7), bytes);
    overlay.retire(L, 5, &write);
    live.changed(6);
    let entry = overlay.locations[&L].patched(file());
    assert_eq!((entry.attr.size, entry.generation), (6, 9));
    overlay.hide_uncommitted(L, FileId(7));
    assert!(overlay.locations.is_empty(), "{overlay:?}");
}

#[test]
fn a_version_of_ours_keeps_its_number_and_others_do_not() {
    let mut overlay = Overlay::default();
    overlay.keep(L, FileId(7), 5, 4);
    let generation =
        |g| overlay.locations[&L].patched(Entry { generation: g, ..file() }).generation;
    assert_eq!((generation(5), generation(6)), (4, 6));
}
