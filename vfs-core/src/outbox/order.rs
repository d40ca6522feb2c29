//! Which operation must wait for which.
//!
//! Two operations depend on each other when one changes a name or a file that
//! the other uses; the later one is not sent before the earlier one is settled.
//! Everything else may travel and be applied in any order, so an operation that
//! its owner cannot carry out now holds up only itself and what builds on it.
//!
//! Kept up as operations come and go, so that finding the next one to send
//! takes the same time however many wait.

use crate::model::{FileId, LocationId, Name};
use crate::ops::{Change, Place};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

/// What operations may meet at.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Object {
    File(LocationId, FileId),
    Name(LocationId, FileId, Name),
}

/// The unsettled operations that used an object.
#[derive(Default, Debug)]
struct Users {
    /// Those that change it.
    changed: BTreeSet<u64>,
    /// Those that use it, since the last that changed it, and do not change it.
    used: BTreeSet<u64>,
}

#[derive(Default, Debug)]
struct Links {
    waits_for: HashSet<u64>,
    needed_by: BTreeSet<u64>,
    changes: Vec<Object>,
    uses: Vec<Object>,
}

/// The unsettled operations and what they wait for.
#[derive(Default, Debug)]
pub(super) struct Order {
    objects: HashMap<Object, Users>,
    ops: BTreeMap<u64, Links>,
}

impl Order {
    /// Another operation, with the largest number so far.
    pub fn add(&mut self, no: u64, location: LocationId, change: &Change) {
        let (changes, uses) = objects(location, change);
        let mut waits_for = HashSet::new();
        for object in &uses {
            let users = self.objects.entry(object.clone()).or_default();
            waits_for.extend(users.changed.last());
            users.used.insert(no);
        }
        for object in &changes {
            let users = self.objects.entry(object.clone()).or_default();
            waits_for.extend(users.changed.last());
            waits_for.extend(std::mem::take(&mut users.used));
            users.changed.insert(no);
        }
        waits_for.remove(&no);
        for earlier in &waits_for {
            if let Some(links) = self.ops.get_mut(earlier) {
                links.needed_by.insert(no);
            }
        }
        self.ops.insert(no, Links { waits_for, needed_by: BTreeSet::new(), changes, uses });
    }

    /// The operation is settled; gives those that wait for none any more. One that is taken back
    /// before its turn leaves what it waited for to those that waited for it.
    pub fn remove(&mut self, no: u64) -> Vec<u64> {
        let Some(links) = self.ops.remove(&no) else { return Vec::new() };
        for object in links.changes.iter().chain(&links.uses) {
            self.let_go(no, object);
        }
        for earlier in &links.waits_for {
            if let Some(earlier) = self.ops.get_mut(earlier) {
                earlier.needed_by.remove(&no);
                earlier.needed_by.extend(&links.needed_by);
            }
        }
        let mut free = Vec::new();
        for later in links.needed_by {
            let Some(waiting) = self.ops.get_mut(&later) else { continue };
            waiting.waits_for.remove(&no);
            waiting.waits_for.extend(&links.waits_for);
            if waiting.waits_for.is_empty() {
                free.push(later);
            }
        }
        free
    }

    /// The file of these operations has another id from now on. What comes later names it so,
    /// and waits for them all the same.
    pub fn rename(&mut self, of: &[u64], location: LocationId, old: FileId, new: FileId) {
        let renamed = |object: &Object| match object {
            Object::File(l, file) if (*l, *file) == (location, old) => {
                Some(Object::File(location, new))
            }
            Object::Name(l, dir, name) if (*l, *dir) == (location, old) => {
                Some(Object::Name(location, new, name.clone()))
            }
            _ => None,
        };
        for no in of {
            let Some(links) = self.ops.get_mut(no) else { continue };
            // In place: an owner may rename a file as often as it likes.
            let mut gone = Vec::new();
            for object in links.changes.iter_mut().chain(&mut links.uses) {
                if let Some(new) = renamed(object) {
                    gone.push(std::mem::replace(object, new));
                }
            }
            for object in &links.changes {
                self.objects.entry(object.clone()).or_default().changed.insert(*no);
            }
            for object in &links.uses {
                self.objects.entry(object.clone()).or_default().used.insert(*no);
            }
            for object in gone {
                self.let_go(*no, &object);
            }
        }
    }

    fn let_go(&mut self, no: u64, object: &Object) {
        let Some(users) = self.objects.get_mut(object) else { return };
        users.used.remove(&no);
        users.changed.remove(&no);
        if users.used.is_empty() && users.changed.is_empty() {
            self.objects.remove(object);
        }
    }

    /// Whether it waits for no other.
    pub fn is_free(&self, no: u64) -> bool {
        self.ops.get(&no).is_some_and(|links| links.waits_for.is_empty())
    }

    /// Whether another waits for it.
    pub fn is_needed(&self, no: u64) -> bool {
        self.ops.get(&no).is_some_and(|links| !links.needed_by.is_empty())
    }

    /// Those that wait for it.
    pub fn needed_by(&self, no: u64) -> Vec<u64> {
        self.ops.get(&no).map_or_else(Vec::new, |links| links.needed_by.iter().copied().collect())
    }

    /// Those that it waits for.
    pub fn waits_for(&self, no: u64) -> impl Iterator<Item = u64> + '_ {
        self.ops.get(&no).into_iter().flat_map(|links| links.waits_for.iter().copied())
    }

    /// The unsettled operations after this one that change a file.
    pub fn changes_after(&self, no: u64, location: LocationId, file: FileId) -> Vec<u64> {
        let users = self.objects.get(&Object::File(location, file));
        users.map_or_else(Vec::new, |users| users.changed.range(no + 1..).copied().collect())
    }

    /// The last unsettled operation that changed a file.
    pub fn last_change(&self, location: LocationId, file: FileId) -> Option<u64> {
        self.objects.get(&Object::File(location, file))?.changed.last().copied()
    }
}

/// What an operation changes, and what it only relies on.
fn objects(location: LocationId, change: &Change) -> (Vec<Object>, Vec<Object>) {
    let file = |file: FileId| Object::File(location, file);
    let name = |at: &Place| Object::Name(location, at.dir, at.name.clone());
    let this = file(change.file());
    match change {
        Change::Create { at, .. }
        | Change::Link { at, .. }
        | Change::Unlink { at, .. }
        | Change::Rmdir { at, .. } => (vec![this, name(at)], vec![file(at.dir)]),
        Change::Rename { from, to, replaced, .. } => {
            let mut changes = vec![this, name(from), name(to)];
            changes.extend(replaced.iter().map(|(f, _)| file(*f)));
            let mut uses = vec![file(from.dir)];
            if to.dir != from.dir {
                uses.push(file(to.dir));
            }
            (changes, uses)
        }
        Change::Write { .. } | Change::SetAttr { .. } | Change::Xattr { .. } => {
            (vec![this], Vec::new())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Time;
    use crate::ops::New;

    const L: LocationId = LocationId([1; 16]);

    fn place(dir: u64, name: &str) -> Place {
        Place { dir: FileId(dir), name: Name::new(name.as_bytes()).unwrap() }
    }

    fn make(file: u64, dir: u64, name: &str) -> Change {
        let (at, what, mtime) = (place(dir, name), New::Directory, Time::default());
        Change::Create { at, file: FileId(file), what, perm: 0o755, mtime }
    }

    fn remove(file: u64, dir: u64, name: &str) -> Change {
        Change::Unlink { file: FileId(file), at: place(dir, name), base: None }
    }

    fn order(changes: &[Change]) -> Order {
        let mut order = Order::default();
        changes.iter().zip(1..).for_each(|(change, no)| order.add(no, L, change));
        order
    }

    #[test]
    fn what_is_beside_each_other_is_free() {
        let order = order(&[make(10, 1, "a"), make(11, 1, "b"), remove(5, 1, "c")]);
        assert!((1..=3).all(|no| order.is_free(no) && !order.is_needed(no)));
    }

    #[test]
    fn children_wait_for_their_directory_and_its_removal_for_them() {
        let rmdir = Change::Rmdir { file: FileId(10), at: place(1, "a") };
        let mut order = order(&[make(10, 1, "a"), make(11, 10, "x"), make(12, 10, "y"), rmdir]);
        assert!(order.is_free(1) && !order.is_free(2) && !order.is_free(4));
        assert_eq!(order.remove(1), [2, 3]);
        assert_eq!(order.remove(3), [0; 0]);
        assert_eq!(order.remove(2), [4]);
        assert_eq!(order.remove(4), [0; 0]);
        assert!(order.objects.is_empty() && order.ops.is_empty());
    }

    #[test]
    fn one_name_is_one_thing_after_the_other() {
        let order = order(&[remove(5, 1, "a"), make(10, 1, "a"), make(11, 2, "a")]);
        assert!(!order.is_free(2) && order.is_free(3));
    }

    #[test]
    fn one_taken_back_from_the_middle_frees_nobody_too_early() {
        let mut order = order(&[make(10, 1, "a"), remove(10, 1, "a"), make(11, 1, "a")]);
        assert_eq!(order.remove(2), [0; 0]);
        assert!(!order.is_free(3));
        assert_eq!(order.remove(1), [3]);
    }

    #[test]
    fn what_names_a_file_by_its_new_id_waits_for_what_named_it_by_the_old_one() {
        let mut order = order(&[make(9, 1, "a"), remove(9, 1, "a")]);
        order.rename(&[1, 2], L, FileId(9), FileId(5));
        order.add(3, L, &remove(5, 1, "b"));
        assert_eq!(order.waits_for(3).collect::<Vec<_>>(), [2]);
        order.remove(1);
        order.remove(2);
        assert!(order.is_free(3));
        order.remove(3);
        assert!(order.objects.is_empty());
    }

    #[test]
    fn however_often_a_directory_is_renamed_an_operation_is_about_as_much() {
        let mut order = order(&[make(9, 1, "a"), make(10, 9, "x"), remove(10, 9, "x")]);
        for n in 0..200 {
            let (old, new) = if n % 2 == 0 { (9, 5) } else { (5, 9) };
            order.rename(&[1, 2, 3], L, FileId(old), FileId(new));
        }
        assert!(order.ops.values().all(|links| links.changes.len() + links.uses.len() <= 3));
        assert!(order.waits_for(3).collect::<BTreeSet<_>>().into_iter().eq([1, 2]));
        (1..=3).for_each(|no| drop(order.remove(no)));
        assert!(order.objects.is_empty());
    }
}
