//! A large tree of real files looks the same through the reader's mount.

use e2e::{Lab, Need, files, machine};
use std::time::Duration;

#[test]
fn a_tree_of_20_000_real_files_is_the_same_in_the_readers_mount() {
    let Some(lab) = Lab::lan(&[Need::Fuse]) else { return };
    let source = lab.folder("source");
    files::real_tree(&source, if machine::long() { 30_000 } else { 20_000 });
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");

    let theirs = files::listing(&source);
    let mounted = reader.at("owner/files");
    let ours = e2e::wait::within("listing the mount", Duration::from_secs(60), {
        let mounted = mounted.clone();
        move || files::listing(&mounted)
    });
    files::assert_same_listing(&theirs, &ours.0);
    files::assert_same_bytes(&source, &mounted);
    files::assert_same_bytes(&source, &owner_mount(&owner));
}

/// The owner's own files through its own mount.
fn owner_mount(owner: &e2e::Device) -> std::path::PathBuf {
    owner.mount();
    owner.at("owner/files")
}
