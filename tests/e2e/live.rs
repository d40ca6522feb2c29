//! What the owner changes shows in the reader's mount, kernel caches included.

use e2e::wait::wait_until;
use e2e::{Device, Lab, Need};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The design promises 1 s on a LAN; the test machine is shared by two daemons and this.
const SEEN: Duration = Duration::from_secs(5);

struct Pair {
    _lab: Lab,
    _owner: Device,
    _reader: Device,
    theirs: PathBuf,
    ours: PathBuf,
}

fn pair() -> Option<Pair> {
    let lab = Lab::lan(&[Need::Fuse])?;
    let theirs = lab.folder("source");
    fs::create_dir(theirs.join("dir")).unwrap();
    fs::write(theirs.join("dir/first"), "one").unwrap();
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    // Now the kernel has every name, attribute and byte.
    assert_eq!(fs::read_to_string(ours.join("dir/first")).unwrap(), "one");
    assert!(!ours.join("dir/second").exists());
    assert_eq!(names(&ours.join("dir")), ["first"]);
    Some(Pair { _lab: lab, _owner: owner, _reader: reader, theirs, ours })
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_new_file_appears_where_its_absence_was_cached() {
    let Some(pair) = pair() else { return };
    fs::write(pair.theirs.join("dir/second"), "two").unwrap();
    wait_until("the new file", SEEN, || {
        fs::read_to_string(pair.ours.join("dir/second")).is_ok_and(|text| text == "two")
    });
    assert_eq!(names(&pair.ours.join("dir")), ["first", "second"]);
}

#[test]
fn an_overwritten_file_shows_its_new_bytes_and_size() {
    let Some(pair) = pair() else { return };
    fs::write(pair.theirs.join("dir/first"), "another text").unwrap();
    let path = pair.ours.join("dir/first");
    wait_until("the new bytes", SEEN, || {
        fs::read_to_string(&path).is_ok_and(|text| text == "another text")
    });
    assert_eq!(fs::metadata(&path).unwrap().len(), 12);
}

#[test]
fn bytes_changed_in_place_with_equal_size_are_seen() {
    let Some(pair) = pair() else { return };
    let theirs = fs::File::options().write(true).open(pair.theirs.join("dir/first")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&theirs, b"two", 0).unwrap();
    let path = pair.ours.join("dir/first");
    wait_until("the new bytes", SEEN, || fs::read_to_string(&path).is_ok_and(|text| text == "two"));
}

#[test]
fn an_atomic_save_is_seen() {
    let Some(pair) = pair() else { return };
    fs::write(pair.theirs.join("dir/.first.tmp"), "saved").unwrap();
    fs::rename(pair.theirs.join("dir/.first.tmp"), pair.theirs.join("dir/first")).unwrap();
    wait_until("the saved file", SEEN, || {
        fs::read_to_string(pair.ours.join("dir/first")).is_ok_and(|text| text == "saved")
    });
    wait_until("the temporary name to go", SEEN, || names(&pair.ours.join("dir")) == ["first"]);
}

#[test]
fn a_growing_file_can_be_followed() {
    let Some(pair) = pair() else { return };
    let mut log = fs::File::options().append(true).open(pair.theirs.join("dir/first")).unwrap();
    let path = pair.ours.join("dir/first");
    let mut expected = "one".to_owned();
    for n in 0..5 {
        let line = format!("\nline {n}");
        std::io::Write::write_all(&mut log, line.as_bytes()).unwrap();
        expected += &line;
        wait_until(&line, SEEN, || fs::read_to_string(&path).is_ok_and(|text| text == expected));
    }
}

#[test]
fn renames_of_files_and_directories_are_seen() {
    let Some(pair) = pair() else { return };
    fs::rename(pair.theirs.join("dir/first"), pair.theirs.join("dir/renamed")).unwrap();
    wait_until("the file's new name", SEEN, || names(&pair.ours.join("dir")) == ["renamed"]);
    fs::rename(pair.theirs.join("dir"), pair.theirs.join("folder")).unwrap();
    wait_until("the folder's new name", SEEN, || names(&pair.ours) == ["folder"]);
    assert_eq!(fs::read_to_string(pair.ours.join("folder/renamed")).unwrap(), "one");
    assert!(!pair.ours.join("dir/renamed").exists());
}

#[test]
fn deletions_are_seen() {
    let Some(pair) = pair() else { return };
    fs::remove_file(pair.theirs.join("dir/first")).unwrap();
    wait_until("the file to go", SEEN, || !pair.ours.join("dir/first").exists());
    assert!(names(&pair.ours.join("dir")).is_empty());
    fs::remove_dir(pair.theirs.join("dir")).unwrap();
    wait_until("the folder to go", SEEN, || names(&pair.ours).is_empty());
}

#[test]
fn a_changed_mode_and_time_are_seen() {
    let Some(pair) = pair() else { return };
    let theirs = pair.theirs.join("dir/first");
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o640)).unwrap();
    let file = fs::File::options().write(true).open(&theirs).unwrap();
    let long_ago = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(long_ago).unwrap();
    wait_until("the new mode and time", SEEN, || {
        fs::metadata(pair.ours.join("dir/first")).is_ok_and(|now| {
            now.permissions().mode() & 0o7777 == 0o640 && now.modified().unwrap() == long_ago
        })
    });
}

#[test]
fn a_whole_tree_that_appears_at_once_is_seen() {
    let Some(pair) = pair() else { return };
    for n in 0..20 {
        let deep = pair.theirs.join(format!("new/{n}/deep/er"));
        fs::create_dir_all(&deep).unwrap();
        (0..20).for_each(|m| fs::write(deep.join(format!("{m}")), format!("{n} {m}")).unwrap());
    }
    let expected = e2e::files::listing(&pair.theirs);
    wait_until("the whole tree", SEEN * 2, || e2e::files::listing(&pair.ours) == expected);
    e2e::files::assert_same_bytes(&pair.theirs, &pair.ours);
}
