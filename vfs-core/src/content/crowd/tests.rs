//! Programs that read in some order, and what is fetched ahead of them. Everything arrives at
//! once here, so that a miss is a file that nobody fetched in time.

use super::order::{Tree, Visit};
use super::policy::{FileKey, Guessed, MAX_AHEAD_BYTES, Means, Walks};
use crate::index::IndexError;
use crate::model::{Attr, Entry, FileId, FileType, LocationNo, Name, Time};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LOCATION: LocationNo = LocationNo(3);
const KIB: u64 = 1 << 10;

/// A tree and a reader's cache.
struct World {
    children: HashMap<FileId, BTreeMap<Name, Entry>>,
    places: HashMap<FileId, (FileId, Name)>,
    here: RefCell<HashSet<FileId>>,
    guessed: Arc<Guessed>,
    walks: Walks,
    now: Instant,
    fetched: Vec<Entry>,
    unread: HashSet<FileId>,
    most_unread: u64,
    misses: usize,
}

impl Tree for World {
    fn children_from(
        &self,
        dir: FileId,
        from: &[u8],
        visit: &mut Visit<'_>,
    ) -> Result<(), IndexError> {
        let Some(children) = self.children.get(&dir) else { return Ok(()) };
        for (name, entry) in children.range::<[u8], _>((Bound::Included(from), Bound::Unbounded)) {
            if visit(name, entry).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn place_of(&self, file: FileId) -> Result<Option<(FileId, Name)>, IndexError> {
        Ok(self.places.get(&file).cloned())
    }
}

impl World {
    fn new() -> Self {
        let guessed = Arc::new(Guessed::default());
        Self {
            children: HashMap::from([(FileId::ROOT, BTreeMap::new())]),
            places: HashMap::new(),
            here: RefCell::default(),
            walks: Walks::new(guessed.clone()),
            guessed,
            now: Instant::now(),
            fetched: Vec::new(),
            unread: HashSet::new(),
            most_unread: 0,
            misses: 0,
        }
    }

    /// Files of 4 KiB at these paths.
    fn with(paths: impl IntoIterator<Item = String>) -> Self {
        let mut world = Self::new();
        paths.into_iter().for_each(|path| world.add(&path, 4 * KIB));
        world
    }

    fn add(&mut self, path: &str, size: u64) {
        let names: Vec<&str> = path.split('/').collect();
        let mut dir = FileId::ROOT;
        for (depth, name) in names.iter().enumerate() {
            let file_type = match depth + 1 == names.len() {
                true => FileType::File,
                false => FileType::Directory,
            };
            let name = Name::new(name.as_bytes()).unwrap();
            let file = FileId(2 + self.places.len() as u64);
            let children = self.children.entry(dir).or_default();
            let entry = children.entry(name.clone()).or_insert_with(|| {
                let size = if file_type == FileType::File { size } else { 0 };
                entry(file, file_type, size)
            });
            let file = entry.file_id;
            self.places.insert(file, (dir, name));
            dir = file;
        }
    }

    fn find(&self, path: &str) -> Entry {
        let mut at = FileId::ROOT;
        let mut found = None;
        for name in path.split('/') {
            let entry = self.children[&at][name.as_bytes()].clone();
            at = entry.file_id;
            found = Some(entry);
        }
        found.unwrap()
    }

    /// A program opens the file and reads it, shortly after what it read before.
    fn read(&mut self, path: &str) {
        self.now += Duration::from_millis(20);
        let file = self.find(path).file_id;
        let key: FileKey = (LOCATION, file);
        self.unread.remove(&file);
        let is_here = !self.here.borrow_mut().insert(file);
        let walk = match is_here {
            true if self.guessed.contains(key) => self.walks.opened(key, self.now),
            true => None,
            false => {
                self.misses += 1;
                let (dir, name) = self.places[&file].clone();
                self.walks.missed(key, (dir, &name), self.now)
            }
        };
        if let Some(walk) = walk {
            self.plan(walk);
        }
    }

    fn plan(&mut self, walk: usize) {
        let mut walks = std::mem::replace(&mut self.walks, Walks::new(Arc::default()));
        let wanted = |entry: &Entry| {
            super::is_small(entry.attr.size) && !self.here.borrow().contains(&entry.file_id)
        };
        let means = Means { tree: self, wanted: &wanted, max_bytes: MAX_AHEAD_BYTES };
        let found = walks.plan(walk, &means).unwrap();
        self.walks = walks;
        for found in found {
            assert!(self.here.borrow_mut().insert(found.entry.file_id), "fetched twice");
            self.unread.insert(found.entry.file_id);
            self.fetched.push(found.entry);
        }
        let sizes = self.fetched.iter().filter(|e| self.unread.contains(&e.file_id));
        self.most_unread = self.most_unread.max(sizes.map(|e| e.attr.size).sum());
    }

    fn read_all(&mut self, paths: impl IntoIterator<Item = String>) {
        paths.into_iter().for_each(|path| self.read(&path));
    }

    /// All paths, depth first, in the order of listings.
    fn depth_first(&self, dir: FileId, above: &str) -> Vec<String> {
        let Some(children) = self.children.get(&dir) else { return vec![] };
        let paths = children.iter().map(|(name, entry)| {
            let path = format!("{above}{}", name.display());
            match entry.attr.file_type {
                FileType::Directory => self.depth_first(entry.file_id, &format!("{path}/")),
                _ => vec![path],
            }
        });
        paths.flatten().collect()
    }
}

fn entry(file_id: FileId, file_type: FileType, size: u64) -> Entry {
    let time = Time { secs: 1_700_000_000, nanos: 0 };
    let attr = Attr {
        file_type,
        perm: 0o644,
        uid: 1,
        gid: 1,
        nlink: 1,
        size,
        blocks: 0,
        mtime: time,
        ctime: time,
        btime: None,
        rdev: 0,
    };
    Entry { file_id, disk_ino: file_id.0, generation: 1, attr, content: None, target: None }
}

fn files(dir: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{dir}/{n:05}")).collect()
}

/// The same numbers in every run.
fn shuffled(mut paths: Vec<String>) -> Vec<String> {
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    for n in (1..paths.len()).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        paths.swap(n, (random >> 33) as usize % (n + 1));
    }
    paths
}

#[test]
fn a_lone_read_and_two_neighbours_fetch_nothing() {
    let mut world = World::with(files("a", 1000));
    world.read("a/00500");
    world.read("a/00501");
    world.read("a/00100");
    world.read("a/00101");
    assert_eq!(world.fetched.len(), 0);
}

#[test]
fn who_reads_all_files_of_a_directory_waits_for_the_first_three() {
    let mut world = World::with(files("a", 5000));
    world.read_all(files("a", 5000));
    assert_eq!((world.misses, world.fetched.len()), (3, 4997));
}

#[test]
fn the_window_grows_with_what_is_opened_up_to_a_bound() {
    let mut world = World::with(files("a", 5000));
    let mut most = Vec::new();
    for path in files("a", 5000) {
        world.read(&path);
        most.push(world.unread.len());
    }
    assert_eq!(most[..3], [0, 0, 4]);
    assert!(most[..20].iter().all(|unread| *unread <= 32), "{:?}", &most[..20]);
    assert_eq!(most.iter().max(), Some(&256));
}

#[test]
fn no_more_bytes_than_the_bound_are_ahead() {
    let mut world = World::new();
    files("a", 500).iter().for_each(|path| world.add(path, 256 * KIB));
    world.read_all(files("a", 500));
    assert_eq!(world.misses, 3);
    assert_eq!(world.most_unread, MAX_AHEAD_BYTES);
}

#[test]
fn random_reads_fetch_nothing() {
    let mut world = World::with(files("a", 5000));
    world.read_all(shuffled(files("a", 5000)).into_iter().take(2000));
    assert_eq!(world.fetched.len(), 0);
}

#[test]
fn whoever_stops_after_a_few_again_and_again_wastes_little() {
    let mut world = World::with(files("a", 5000));
    let mut paths = files("a", 5000).into_iter();
    for _ in 0..50 {
        world.read_all(paths.by_ref().take(3));
        // Elsewhere in the directory.
        paths.nth(70);
    }
    // What was fetched in vain is forgotten when sixteen others have begun.
    assert!(world.fetched.len() <= 20, "{} files were fetched in vain", world.fetched.len());
}

#[test]
fn a_window_closes_over_files_that_are_passed_over() {
    let mut world = World::with(files("a", 5000));
    let paths = files("a", 5000);
    world.read_all(paths[..200].iter().cloned());
    let fetched = world.fetched.len();
    // From here on one in nine.
    world.read_all(paths[200..].iter().step_by(9).cloned());
    let more = world.fetched.len() - fetched;
    assert!(more < 60, "{more} more were fetched");
}

#[test]
fn every_second_file_costs_no_more_in_vain_than_it_uses() {
    let mut world = World::with(files("a", 4000));
    world.read_all(files("a", 4000).into_iter().step_by(2));
    assert!(world.misses < 700, "{} misses", world.misses);
    assert!(world.unread.len() <= 2000 - world.misses + 16, "{} in vain", world.unread.len());
}

#[test]
fn large_files_and_files_that_are_here_are_passed_over() {
    let mut world = World::new();
    let paths = files("a", 900);
    for (n, path) in paths.iter().enumerate() {
        world.add(path, [4 * KIB, 0, 300 * KIB][n % 3]);
    }
    let here = world.find("a/00300").file_id;
    world.here.borrow_mut().insert(here);
    world.read_all(paths.into_iter().step_by(3));
    assert_eq!((world.misses, world.fetched.len()), (3, 296));
    assert!(world.fetched.iter().all(|entry| entry.attr.size == 4 * KIB));
}

#[test]
fn a_folder_of_photos_is_not_hydrated() {
    let mut world = World::new();
    files("a", 500).iter().for_each(|path| world.add(path, 3 << 20));
    world.read_all(files("a", 500));
    assert_eq!(world.fetched.len(), 0);
}

#[test]
fn two_readers_of_one_directory_are_told_apart() {
    let mut world = World::with(files("a", 2000));
    let (first, second) = (files("a", 2000), files("a", 2000).split_off(1000));
    for (first, second) in first.iter().zip(&second) {
        world.read(first);
        world.read(second);
    }
    assert_eq!((world.misses, world.fetched.len()), (6, 1994));
}

#[test]
fn threads_with_a_directory_each_are_all_followed() {
    let dirs: Vec<String> = (0..8).map(|n| format!("dir-{n}")).collect();
    let mut world = World::with(dirs.iter().flat_map(|dir| files(dir, 200)));
    for n in 0..200 {
        dirs.iter().for_each(|dir| world.read(&format!("{dir}/{n:05}")));
    }
    assert_eq!((world.misses, world.fetched.len()), (24, 1576));
}

#[test]
fn threads_that_share_a_directory_are_one_walk() {
    let mut world = World::with(files("a", 1000));
    for few in files("a", 1000).chunks(4) {
        [2, 0, 3, 1].into_iter().for_each(|n| world.read(&few[n]));
    }
    assert!(world.misses <= 6, "{} misses", world.misses);
}

#[test]
fn tar_is_followed_through_a_deep_tree() {
    let mut paths = Vec::new();
    for a in 0..10 {
        paths.extend(files(&format!("top/{a}"), 7));
        for b in 0..10 {
            paths.extend(files(&format!("top/{a}/dir-{b}"), 5));
            paths.extend(files(&format!("top/{a}/dir-{b}/deeper/still"), 3));
        }
    }
    let mut world = World::with(paths.clone());
    let order = world.depth_first(FileId::ROOT, "");
    assert_eq!(order.len(), paths.len());
    world.read_all(order);
    // Two for the first directory's neighbours each, one for each level.
    assert!(world.misses <= 10, "{} misses of {}", world.misses, paths.len());
    assert_eq!(world.fetched.len() + world.misses, paths.len());
}

#[test]
fn tar_is_followed_through_directories_beside_each_other() {
    let mut world = World::with((0..50).flat_map(|n| files(&format!("all/{n:02}"), 100)));
    let order = world.depth_first(FileId::ROOT, "");
    world.read_all(order);
    // Three, and the first one that is beyond the first directory.
    assert_eq!((world.misses, world.fetched.len()), (4, 4996));
}

#[test]
fn who_takes_the_files_of_a_directory_before_its_subdirectories_is_followed() {
    let mut world = World::new();
    let dirs: Vec<String> = (0..20).map(|n| format!("all/{n:02}")).collect();
    let mut order = Vec::new();
    for dir in &dirs {
        // Subdirectories are in the middle.
        let above = [files(&format!("{dir}/"), 20), files(&format!("{dir}/z"), 20)].concat();
        let above = above.into_iter().map(|path| path.replace("//", "/").replace("/z/", "/z-"));
        order.extend(above);
        order.extend(files(&format!("{dir}/b"), 30));
    }
    order.iter().for_each(|path| world.add(path, 4 * KIB));
    world.read_all(order.clone());
    assert!(world.misses < order.len() / 5, "{} misses of {}", world.misses, order.len());
}

#[test]
fn who_reads_one_directory_does_not_get_its_neighbours_nor_what_is_below() {
    let below = [files("a/0-below", 50), files("a/00020-below", 500)].concat();
    let mut world = World::with([below, files("a", 50), files("b", 50)].concat());
    world.read_all(files("a", 50));
    assert_eq!((world.misses, world.fetched.len(), world.unread.len()), (3, 47, 0));
}

#[test]
fn who_leaves_a_tree_gets_nothing_above_it() {
    let mut paths: Vec<String> =
        (0..20).flat_map(|n| files(&format!("home/x/{n:02}"), 10)).collect();
    paths.extend(files("home/y", 1000));
    let mut world = World::with(paths);
    world.read_all((0..20).flat_map(|n| files(&format!("home/x/{n:02}"), 10)));
    let y: HashSet<FileId> =
        files("home/y", 1000).iter().map(|path| world.find(path).file_id).collect();
    assert_eq!(world.fetched.iter().filter(|entry| y.contains(&entry.file_id)).count(), 0);
    assert!(world.fetched.len() > 150);
}

#[test]
fn what_is_read_now_and_then_is_no_walk() {
    let mut world = World::with(files("a", 100));
    for path in files("a", 100) {
        world.now += Duration::from_secs(6);
        world.read(&path);
    }
    assert_eq!(world.fetched.len(), 0);
}

#[test]
fn a_location_that_failed_has_no_walks_any_more() {
    let mut world = World::with(files("a", 100));
    world.read_all(files("a", 5));
    let fetched = world.fetched.len();
    world.walks.failed(LOCATION);
    let next = world.find("a/00020").file_id;
    assert!(!world.guessed.contains((LOCATION, next)));
    world.read("a/00020");
    world.read("a/00021");
    assert_eq!(world.fetched.len(), fetched);
}

#[test]
fn a_cycle_in_the_rows_ends_a_search() {
    let mut world = World::with(files("a/b", 10));
    let (a, b) = (world.find("a"), world.find("a/b"));
    let back = Name::new(b"zzz".as_slice()).unwrap();
    world.children.get_mut(&b.file_id).unwrap().insert(back.clone(), a.clone());
    world.places.insert(a.file_id, (b.file_id, back));
    world.read_all(files("a/b", 10));
    assert_eq!(world.misses, 3);
}
