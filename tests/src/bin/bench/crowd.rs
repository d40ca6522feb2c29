//! `tar` of many small remote files, none of which is here: each costs a round trip to whoever
//! fetches them one by one.

use crate::{LONG, ROUNDS, Row, forget_content, lab_on, median_of};
use anyhow::Result;
use e2e::disk::MemoryDisk;
use e2e::{files, proc};
use std::fs;
use std::path::Path;
use std::process::Command;

const DIRECTORIES: usize = 50;
const FILES_EACH: usize = 100;

/// The rows of this part.
pub fn crowd() -> Result<Vec<Row>> {
    Ok(vec![
        Row {
            work: "tar of 5,000 uncached files of 4 KiB, 20 ms".into(),
            unit: "s",
            reference: None,
            drive: tar_of_all(&["--delay", "10"])?,
            must: Some(10.0),
        },
        Row {
            work: "the same, LAN".into(),
            unit: "s",
            reference: None,
            drive: tar_of_all(&[])?,
            must: None,
        },
    ])
}

fn tar_of_all(link: &[&str]) -> Result<f64> {
    let lab = lab_on(link)?;
    let source = lab.folder("source");
    // Devices that are far from each other have a disk each.
    let _owners = [MemoryDisk::mount(&source), MemoryDisk::mount(&lab.folder("owner"))];
    small_trees(&source)?;
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let archive = lab.dir().join("all.tar");
    median_of(ROUNDS, |_| {
        forget_content(&reader);
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&archive).arg("-C").arg(reader.at("owner/files")).arg(".");
        Ok(proc::run(&mut tar, LONG).ok().took.as_secs_f64())
    })
}

/// A directory beside the other, with files that no other has.
pub fn small_trees(folder: &Path) -> Result<()> {
    (0..DIRECTORIES).try_for_each(|n| small_files(&folder.join(format!("{n}")), n as u64))
}

fn small_files(directory: &Path, seed: u64) -> Result<()> {
    fs::create_dir(directory)?;
    for n in 0..FILES_EACH {
        let bytes = files::random_bytes(4 << 10, seed << 32 | n as u64);
        fs::write(directory.join(format!("{n}")), bytes)?;
    }
    Ok(())
}
