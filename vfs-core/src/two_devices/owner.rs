//! The device that has the folder.

use super::tree::{self, Tree, What};
use super::{DEADLINE, LOCATION, OWNER};
use crate::apply::{Applier, Writer as Asker};
use crate::content::{Manifests, OwnFiles};
use crate::index::{Index, NewLocation, open_store};
use crate::indexer::{Indexer, IndexerConfig};
use crate::model::{LocationNo, Name, Time};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What ends with the process.
pub(super) struct Running {
    pub index: Index,
    indexer: Arc<Indexer>,
    pub applier: Arc<Applier>,
    pub files: Arc<OwnFiles>,
    pub no: LocationNo,
}

pub(super) struct Owner {
    running: Option<Running>,
    pub folder: PathBuf,
    dir: PathBuf,
    pub asker: Asker,
}

impl Owner {
    pub fn new(dir: PathBuf) -> Self {
        let folder = dir.join("folder");
        std::fs::create_dir_all(&folder).unwrap();
        let asker = Asker { id: super::WRITER, name: "laptop".into() };
        let mut owner = Self { running: None, folder, dir, asker };
        owner.open();
        owner
    }

    pub fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    /// The process ends without any warning; whoever else has its parts has let go of them.
    pub fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.indexer.stop();
        }
    }

    pub fn open(&mut self) {
        let store = self.open_store();
        let index = Index::open(store, OWNER).unwrap();
        let location = NewLocation {
            id: LOCATION,
            owner: OWNER,
            name: "theirs".into(),
            root: Some(self.folder.clone()),
            read_only: false,
            shared_with: None,
        };
        let no = index.put_location(location).unwrap().no;
        let manifests = Arc::new(Manifests::open(&self.dir.join("manifests")).unwrap());
        let config = IndexerConfig {
            settle: Duration::from_millis(5),
            root_check: Duration::from_millis(50),
            ..IndexerConfig::default()
        };
        let indexer = Indexer::start(index.clone(), Arc::clone(&manifests), config);
        let applied = self.dir.join("apply");
        let parts = (index.clone(), Arc::clone(&indexer), Arc::clone(&manifests));
        let applier = Applier::open(&applied, parts.0, parts.1, parts.2).unwrap();
        let files = Arc::new(OwnFiles::new(index.clone(), Arc::clone(&indexer), manifests));
        indexer.watch(no);
        self.running = Some(Running { index, indexer, applier, files, no });
        self.until("a whole scan", |r| r.indexer.progress(r.no).indexed);
    }

    fn open_store(&self) -> Arc<dyn crate::index::Store> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match open_store(&self.dir.join("index")) {
                Ok(opened) => {
                    assert!(opened.set_aside.is_none(), "the index was damaged");
                    return opened.store;
                }
                // A task of a read that nobody waits for any more has the last one still.
                Err(error) => {
                    assert!(Instant::now() < deadline, "{error}");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    fn until(&self, what: &str, done: impl Fn(&Running) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self.running()) {
            assert!(Instant::now() < deadline, "no {what} in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Every file is hashed. Not waited for, a version of more than 64 KiB that this device wrote
    /// is `ESTALE` to it for the milliseconds until its owner has hashed it: a gap that is known.
    pub fn hash(&self) {
        let is_hashed = |r: &Running| r.index.next_unhashed(r.no, 1).unwrap().is_empty();
        self.until("hashes", is_hashed);
    }

    pub fn tree(&self) -> Tree {
        tree::of_disk(&self.folder)
    }

    /// The index is what the disk is, and knows the bytes.
    pub fn observe(&self) {
        self.until("index of what is there", |running| self.is_observed(running));
    }

    fn is_observed(&self, running: &Running) -> bool {
        let Running { index, no, .. } = running;
        let view = index.view().unwrap();
        let tree = self.tree();
        let all = tree.iter().all(|(path, seen)| {
            let names: Vec<_> = path.split('/').map(|n| Name::new(n.as_bytes()).unwrap()).collect();
            let Ok(meta) = std::fs::symlink_metadata(self.folder.join(path)) else { return false };
            let ctime = Time { secs: meta.ctime(), nanos: meta.ctime_nsec() as u32 };
            let row = view.resolve(*no, &names).unwrap();
            row.is_some_and(|row| {
                let stamp = (row.disk_ino, row.attr.ctime, row.attr.size, row.attr.nlink);
                let is_dir = seen.what == What::Dir;
                let nlink = if is_dir { row.attr.nlink } else { meta.nlink() as u32 };
                let size = if is_dir { row.attr.size } else { meta.size() };
                stamp == (meta.ino(), ctime, size, nlink)
            })
        });
        all && index.counts(*no).entries == tree.len() as u64
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.stop();
    }
}
