//! Two people change the same: both versions are there afterwards, byte for byte.

use e2e::wait::wait_until;
use e2e::{Device, Lab, Need};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

/// A pair whose link can be cut, so that neither sees what the other does meanwhile.
struct Apart {
    lab: Lab,
    owner: Device,
    reader: Device,
    theirs: PathBuf,
    ours: PathBuf,
}

fn apart() -> Option<Apart> {
    let lab = Lab::emulated(&[Need::Fuse], &[])?;
    let theirs = lab.folder("source");
    for name in ["both.tar.gz", "edited", "deleted", "renamed", "same"] {
        fs::write(theirs.join(name), format!("{name} as it was")).unwrap();
    }
    for name in ["emptied", "filled"] {
        fs::create_dir(theirs.join(name)).unwrap();
    }
    let (owner, reader) = lab.owner_and_reader(&theirs);
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    for entry in fs::read_dir(&ours).unwrap().flatten().filter(|e| e.path().is_file()) {
        fs::read(entry.path()).unwrap();
    }
    lab.link().cut();
    wait_until("the owner to be known as gone", DEADLINE, || !reader.sees_online("owner"));
    Some(Apart { lab, owner, reader, theirs, ours })
}

/// The one name in a folder that is a conflict copy of `name`.
#[track_caller]
fn conflict_copy(folder: &Path, before: &str, after: &str) -> PathBuf {
    let begins = format!("{before} (conflicted copy from reader ");
    let entries = fs::read_dir(folder).unwrap().flatten();
    let found: Vec<PathBuf> = entries
        .filter(|e| {
            let name = e.file_name().into_string().unwrap();
            name.starts_with(&begins) && name.ends_with(&format!("){after}"))
        })
        .map(|e| e.path())
        .collect();
    assert_eq!(
        found.len(),
        1,
        "conflict copies of {before}{after} in {}: {found:?}",
        folder.display()
    );
    found[0].clone()
}

#[test]
fn after_a_reconnect_both_versions_are_there() {
    let Some(apart) = apart() else { return };
    let Apart { lab, owner, reader, theirs, ours } = &apart;
    // Each pair of lines: the owner, then the reader.
    fs::write(theirs.join("both.tar.gz"), "the owner's").unwrap();
    fs::write(ours.join("both.tar.gz"), "the reader's").unwrap();
    fs::remove_file(theirs.join("edited")).unwrap();
    fs::write(ours.join("edited"), "edited while it was deleted").unwrap();
    fs::write(theirs.join("deleted"), "edited at the owner").unwrap();
    fs::remove_file(ours.join("deleted")).unwrap();
    fs::rename(theirs.join("renamed"), theirs.join("renamed there")).unwrap();
    fs::write(ours.join("renamed"), "edited here").unwrap();
    fs::write(theirs.join("same"), "the same new bytes").unwrap();
    fs::write(ours.join("same"), "the same new bytes").unwrap();
    fs::write(theirs.join("created"), "there").unwrap();
    fs::write(ours.join("created"), "here").unwrap();
    fs::create_dir(theirs.join("made")).unwrap();
    fs::write(theirs.join("made/there"), "").unwrap();
    fs::create_dir(ours.join("made")).unwrap();
    fs::write(ours.join("made/here"), "").unwrap();
    fs::write(theirs.join("filled/new"), "").unwrap();
    fs::remove_dir(ours.join("filled")).unwrap();
    for name in ["both.tar.gz", "same", "created"] {
        owner.sd(&["info", theirs.join(name).to_str().unwrap()]).ok();
    }
    lab.link().restore();
    reader.wait_online("owner");
    reader.sd(&["sync", "--timeout", "60s"]).ok();

    let read = |path: PathBuf| fs::read_to_string(path).unwrap();
    assert_eq!(read(theirs.join("both.tar.gz")), "the owner's");
    assert_eq!(read(conflict_copy(theirs, "both", ".tar.gz")), "the reader's");
    assert_eq!(read(theirs.join("edited")), "edited while it was deleted");
    assert_eq!(read(theirs.join("deleted")), "edited at the owner");
    assert_eq!(read(theirs.join("renamed there")), "edited here");
    assert!(!theirs.join("renamed").exists());
    assert_eq!(read(theirs.join("same")), "the same new bytes");
    assert_eq!(read(theirs.join("created")), "there");
    assert_eq!(read(conflict_copy(theirs, "created", "")), "here");
    assert!(theirs.join("made/there").exists() && theirs.join("made/here").exists());
    assert!(theirs.join("filled/new").exists());
    let conflicted = fs::read_dir(theirs).unwrap().flatten();
    let copies = conflicted.filter(|e| e.file_name().to_string_lossy().contains("conflicted copy"));
    assert_eq!(copies.count(), 2, "equal bytes are no conflict, nor are equal directories");
    // The reader shows what the owner has, and says what it met.
    e2e::files::assert_same_listing(&e2e::files::listing(theirs), &settled_listing(theirs, ours));
    let listed = reader.json(&["conflicts"]);
    let listed = listed["conflicts"].as_array().unwrap();
    assert!(listed.len() >= 4, "{listed:?}");
}

fn settled_listing(theirs: &Path, ours: &Path) -> Vec<String> {
    let expected = e2e::files::listing(theirs);
    wait_until("the rows to come back", DEADLINE, || e2e::files::listing(ours) == expected);
    e2e::files::listing(ours)
}
