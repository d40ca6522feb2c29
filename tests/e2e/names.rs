//! Odd names and odd files in a location: listed right everywhere, and nothing hangs.

use e2e::wait::{wait_until, within};
use e2e::{Lab, Need, files};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(5);

fn odd_names() -> Vec<Vec<u8>> {
    vec![
        b"not utf-8 \xff\xfe".to_vec(),
        vec![b'n'; 255],
        "ü".repeat(127).into_bytes(),
        b"two\nlines".to_vec(),
        b"back\\slash".to_vec(),
        b"\\134".to_vec(),
        b"100%25".to_vec(),
        b" leading and trailing ".to_vec(),
        b"-rf".to_vec(),
        b"*?[]{}$`'\"".to_vec(),
        b"bell\x07 and escape\x1b[31m".to_vec(),
        b"CON".to_vec(),
        b"...".to_vec(),
        "composed é".into(),
        "decomposed e\u{301}".into(),
    ]
}

fn odd_files(folder: &Path) {
    fs::write(folder.join("empty"), "").unwrap();
    let sparse = fs::File::create(folder.join("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    sparse.write_all_at(b"in the middle", 20 << 20).unwrap();
    symlink("loop-b", folder.join("loop-a")).unwrap();
    symlink("loop-a", folder.join("loop-b")).unwrap();
    symlink("/does/not/exist", folder.join("dangling")).unwrap();
    symlink(OsStr::from_bytes(&[b'x'; 4095]), folder.join("long-target")).unwrap();
    symlink("../../../../../../etc", folder.join("outside")).unwrap();
    fs::hard_link(folder.join("sparse"), folder.join("sparse-again")).unwrap();
    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        mknodat(CWD, folder.join(name), kind, Mode::from_raw_mode(0o640), 0).unwrap();
    }
    fs::create_dir(folder.join("no-access")).unwrap();
}

#[test]
fn odd_names_and_files_are_listed_right_and_nothing_hangs() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    for (number, name) in odd_names().iter().enumerate() {
        fs::write(source.join(OsStr::from_bytes(name)), format!("{number}")).unwrap();
    }
    let deep = source.join(OsStr::from_bytes(&[b'd'; 255]));
    fs::create_dir(&deep).unwrap();
    fs::write(deep.join("inside"), "a directory with a long name").unwrap();
    odd_files(&source);
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let mounted = reader.at("owner/files");

    // A link of another device that leads out of its location is listed and not followed.
    for name in ["outside", "dangling"] {
        assert!(fs::symlink_metadata(mounted.join(name)).unwrap().file_type().is_symlink());
        let refused = fs::read_link(mounted.join(name)).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        fs::remove_file(source.join(name)).unwrap();
    }
    wait_until("the links to go", SOON, || fs::symlink_metadata(mounted.join("outside")).is_err());
    files::assert_same_listing(&files::listing(&source), &files::listing(&mounted));
    for (number, name) in odd_names().iter().enumerate() {
        let text = fs::read_to_string(mounted.join(OsStr::from_bytes(name))).unwrap();
        assert_eq!(text, format!("{number}"), "{}", String::from_utf8_lossy(name));
    }
    assert_eq!(fs::read(mounted.join("empty")).unwrap(), b"");
    assert_eq!(
        files::hash_file(&mounted.join("sparse")).unwrap(),
        files::hash_file(&source.join("sparse")).unwrap()
    );
    let loops = fs::metadata(mounted.join("loop-a")).unwrap_err();
    assert_eq!(loops.raw_os_error(), Some(Errno::LOOP.raw_os_error()));
    let [one, other] = ["sparse", "sparse-again"].map(|n| fs::metadata(mounted.join(n)).unwrap());
    assert_eq!(one.ino(), other.ino(), "two names of one file");
    assert_eq!(one.nlink(), 2);

    assert!(fs::symlink_metadata(mounted.join("fifo")).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(mounted.join("socket")).unwrap().file_type().is_socket());
    // A FIFO of another device is the local kernel's: opening it without waiting is harmless.
    let fifo = mounted.join("fifo");
    within("opening a FIFO without waiting", SOON, move || {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
        drop(rustix::fs::open(fifo, flags, Mode::empty()));
    });
    let socket = mounted.join("socket");
    within("connecting to a socket", SOON, move || {
        std::os::unix::net::UnixStream::connect(socket).expect_err("nobody listens there");
    });
    // The command line lists all of it too, on one line each.
    let listed = reader.json(&["ls", "sd://owner/files"]);
    let entries = listed.as_array().or_else(|| listed["entries"].as_array()).expect("a list");
    assert_eq!(entries.len(), fs::read_dir(&source).unwrap().count());
}

#[test]
fn a_directory_of_100_000_entries_is_the_same_at_the_reader() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    fs::create_dir(source.join("many")).unwrap();
    for n in 0..100_000 {
        fs::File::create(source.join(format!("many/entry-{n}"))).unwrap();
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let mounted = reader.at("owner/files");
    let (ours, _) = within("listing 100,000 entries", Duration::from_secs(30), {
        let mounted = mounted.clone();
        move || files::listing(&mounted)
    });
    files::assert_same_listing(&files::listing(&source), &ours);

    // Entries come and go while it is being listed, from what the kernel kept of the first time:
    // those that stayed come exactly once.
    let mut reading = fs::read_dir(mounted.join("many")).unwrap();
    let mut seen: Vec<_> = reading.by_ref().take(1000).map(|e| e.unwrap().file_name()).collect();
    (0..100).for_each(|n| fs::remove_file(source.join(format!("many/entry-{n}"))).unwrap());
    (0..100).for_each(|n| drop(fs::File::create(source.join(format!("many/new-{n}"))).unwrap()));
    wait_until("the changes", SOON * 2, || {
        mounted.join("many/new-99").exists() && !mounted.join("many/entry-99").exists()
    });
    seen.extend(reading.map(|entry| entry.unwrap().file_name()));
    let gone: BTreeSet<_> = (0..100).map(|n| OsString::from(format!("entry-{n}"))).collect();
    let is_of_all_time =
        |name: &OsString| name.as_encoded_bytes().starts_with(b"entry-") && !gone.contains(name);
    seen.retain(is_of_all_time);
    assert_eq!(seen.len(), 99_900, "each once, none left out");
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 99_900, "none twice");
    // And the next listing is right.
    let expected = files::listing(&source);
    wait_until("the same listing again", SOON * 4, || files::listing(&mounted) == expected);
}

/// Another device's files cannot be changed yet, and every way to try says so.
#[test]
fn a_read_only_location_is_not_changed_from_afar() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    fs::write(source.join("file"), "text").unwrap();
    fs::create_dir(source.join("dir")).unwrap();
    let [owner, reader] = lab.two_devices(["owner", "reader"]);
    owner.sd(&["library", "create", "home", "--device-name", "owner"]).ok();
    let folder = source.to_str().unwrap();
    owner.sd(&["location", "add", folder, "--name", "files", "--read-only", "--wait"]).ok();
    reader.join(&owner);
    reader.mount();
    reader.wait_replicated(&owner, "files");
    let ours = reader.at("owner/files");
    let attempts: [(&str, std::io::Result<()>); 12] = [
        ("create", fs::File::create(ours.join("new")).map(drop)),
        ("write", fs::File::options().write(true).open(ours.join("file")).map(drop)),
        ("append", fs::File::options().append(true).open(ours.join("file")).map(drop)),
        (
            "truncate",
            rustix::fs::open(
                ours.join("file"),
                rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::TRUNC,
                Mode::empty(),
            )
            .map(drop)
            .map_err(Into::into),
        ),
        ("unlink", fs::remove_file(ours.join("file"))),
        ("rename", fs::rename(ours.join("file"), ours.join("other"))),
        ("mkdir", fs::create_dir(ours.join("new"))),
        ("rmdir", fs::remove_dir(ours.join("dir"))),
        ("symlink", symlink("file", ours.join("link"))),
        ("link", fs::hard_link(ours.join("file"), ours.join("link"))),
        (
            "chmod",
            fs::set_permissions(
                ours.join("file"),
                std::os::unix::fs::PermissionsExt::from_mode(0o600),
            ),
        ),
        (
            "setxattr",
            rustix::fs::setxattr(
                ours.join("file"),
                "user.x",
                b"1",
                rustix::fs::XattrFlags::empty(),
            )
            .map_err(Into::into),
        ),
    ];
    for (what, result) in attempts {
        let error = result.expect_err(what);
        assert_eq!(error.raw_os_error(), Some(Errno::ROFS.raw_os_error()), "{what}: {error}");
    }
    assert_eq!(fs::read_to_string(source.join("file")).unwrap(), "text");
    assert_eq!(fs::read_dir(&source).unwrap().count(), 2);
    // Nor can anything be made above the locations.
    for place in [reader.mountpoint(), reader.at("owner"), reader.at("reader")] {
        fs::create_dir(place.join("new")).expect_err("a directory above the locations");
    }
}
