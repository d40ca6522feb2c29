//! `find -ls` of remote trees of several shapes, on fresh mounts: a walk costs a few requests for
//! each directory, so how many files those have decides what it takes.

use crate::{Row, fresh_mount, lab_or_reason, side_by_side, walk};
use anyhow::Result;
use e2e::{Lab, Need, files};
use std::fs::{self, File};
use std::path::Path;

const FILES: usize = 20_000;
const MUST: f64 = 1.3;

struct Shape {
    name: &'static str,
    make: fn(&Path) -> Result<()>,
    /// What the rows say, on a LAN and far away.
    works: [&'static str; 2],
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "large",
        make: |tree| flat_directories(tree, 20),
        works: ["find -ls, 1,000 files in each of 20 directories, LAN", "the same at 80 ms"],
    },
    Shape {
        name: "medium",
        make: |tree| flat_directories(tree, 200),
        works: ["find -ls, 100 files in each of 200 directories, LAN", "the same at 80 ms"],
    },
    Shape {
        name: "small",
        make: |tree| flat_directories(tree, 1000),
        works: ["find -ls, 20 files in each of 1,000 directories, LAN", "the same at 80 ms"],
    },
    Shape {
        name: "sources",
        make: |tree| {
            files::real_tree(tree, FILES);
            Ok(())
        },
        works: ["find -ls, a tree of sources with 5 in each, LAN", "the same at 80 ms"],
    },
];

/// The rows of this part.
pub fn walks() -> Result<Vec<Row>> {
    let near = measure(&[])?;
    let far = measure(&["--delay", "40"])?;
    let row = |shape: usize, place: usize, (native, drive): (f64, f64)| Row {
        work: SHAPES[shape].works[place].into(),
        unit: "s",
        reference: Some(("native, cold", native)),
        drive,
        must: MUST,
    };
    let rows = |(n, (near, far))| [row(n, 0, near), row(n, 1, far)];
    Ok(near.into_iter().zip(far).enumerate().flat_map(rows).collect())
}

/// Seconds, native and through the drive, for each shape.
fn measure(link: &[&str]) -> Result<Vec<(f64, f64)>> {
    let needs = [Need::Root, Need::Fuse];
    let lab = lab_or_reason(match link {
        [] => Lab::lan(&needs),
        options => Lab::emulated(&needs, options),
    })?;
    let source = lab.folder("source");
    for shape in &SHAPES {
        (shape.make)(&lab.folder(&format!("source/{}", shape.name)))?;
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let of_shape = |shape: &Shape| {
        let [native, remote] = [source.join(shape.name), reader.at("owner/files").join(shape.name)];
        side_by_side(
            || {
                files::drop_kernel_caches();
                walk(&native)
            },
            || {
                fresh_mount(&reader);
                walk(&remote)
            },
        )
    };
    SHAPES.iter().map(of_shape).collect()
}

fn flat_directories(tree: &Path, count: usize) -> Result<()> {
    for directory in 0..count {
        let directory = tree.join(format!("{}/{directory}", directory / 100));
        fs::create_dir_all(&directory)?;
        for file in 0..FILES / count {
            File::create(directory.join(format!("file-{file}")))?;
        }
    }
    Ok(())
}
