//! `find -ls` of remote trees of several shapes, on fresh mounts: a walk costs a few requests for
//! each directory, so how many files those have decides what it takes.

use crate::{Row, fresh_mount, lab_on, side_by_side, walk};
use anyhow::Result;
use e2e::files;
use std::fs::{self, File};
use std::path::Path;

const FILES: usize = 20_000;
const MUST: f64 = 1.3;

struct Shape {
    name: &'static str,
    make: fn(&Path) -> Result<()>,
    work: &'static str,
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "large",
        make: |tree| flat_directories(tree, 20),
        work: "find -ls, 1,000 files in each of 20 directories, LAN",
    },
    Shape {
        name: "medium",
        make: |tree| flat_directories(tree, 200),
        work: "find -ls, 100 files in each of 200 directories, LAN",
    },
    Shape {
        name: "small",
        make: |tree| flat_directories(tree, 1000),
        work: "find -ls, 20 files in each of 1,000 directories, LAN",
    },
    Shape {
        name: "sources",
        make: |tree| {
            files::real_tree(tree, FILES);
            Ok(())
        },
        work: "find -ls, a tree of sources with 5 in each, LAN",
    },
];

/// What is compared: the native file system and the drive, in seconds.
type Pair = (f64, f64);

/// The rows of this part.
pub fn walks() -> Result<Vec<Row>> {
    let near = measure(&[])?;
    let far = measure(&["--delay", "40"])?;
    let row = |work: &str, reference, (native, drive): Pair, must| Row {
        work: work.into(),
        unit: "s",
        reference: Some((reference, native)),
        drive,
        must,
    };
    let rows = |((shape, near), far): ((&Shape, Walks), Walks)| {
        [
            row(shape.work, "native, cold", near.fresh, Some(MUST)),
            row("the same at 80 ms", "native, cold", far.fresh, Some(MUST)),
            // The budgets speak of a fresh mount only.
            row("the same again, LAN", "native, warm", near.again, None),
        ]
    };
    Ok(SHAPES.iter().zip(near).zip(far).flat_map(rows).collect())
}

struct Walks {
    /// Nothing of the tree is in the kernel's caches.
    fresh: Pair,
    /// What the walk before left there, is.
    again: Pair,
}

/// For each shape.
fn measure(link: &[&str]) -> Result<Vec<Walks>> {
    let lab = lab_on(link)?;
    let source = lab.folder("source");
    for shape in &SHAPES {
        (shape.make)(&lab.folder(&format!("source/{}", shape.name)))?;
    }
    let (owner, reader) = lab.owner_and_reader(&source);
    reader.wait_replicated(&owner, "files");
    let of_shape = |shape: &Shape| {
        let [native, remote] = [source.join(shape.name), reader.at("owner/files").join(shape.name)];
        let fresh = side_by_side(
            || {
                files::drop_kernel_caches();
                walk(&native)
            },
            || {
                fresh_mount(&reader);
                walk(&remote)
            },
        )?;
        // The last fresh mount dropped what the kernel knew of the native tree.
        walk(&native)?;
        Ok(Walks { fresh, again: side_by_side(|| walk(&native), || walk(&remote))? })
    };
    SHAPES.iter().map(of_shape).collect()
}

/// [`FILES`] empty ones, as many in each of so many directories.
pub fn flat_directories(tree: &Path, count: usize) -> Result<()> {
    for directory in 0..count {
        let directory = tree.join(format!("{}/{directory}", directory / 100));
        fs::create_dir_all(&directory)?;
        for file in 0..FILES / count {
            File::create(directory.join(format!("file-{file}")))?;
        }
    }
    Ok(())
}
