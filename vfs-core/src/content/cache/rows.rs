//! What the cache keeps of each file: what may be evicted, in the order of its last use, and
//! what is *held*, because it is pinned.
//!
//! Which rows are held is known to nobody but the rounds of whoever holds them: each round
//! marks what it wants with its number, and in the end what has an older mark is let go. So a
//! row needs no list of its holders, and what was forgotten by everybody is held no longer.

use super::{Form, Key};
use lru::LruCache;
use std::collections::HashMap;

/// What is kept of one file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// On disk.
    pub bytes: u64,
    /// How it lies there.
    pub form: Form,
    /// The last round that held it; 0: it may be evicted.
    pub round: u32,
}

/// All rows.
#[derive(Debug)]
pub(super) struct Rows {
    /// Least recently opened last.
    loose: LruCache<Key, Row>,
    held: HashMap<Key, Row>,
    held_bytes: u64,
    round: u32,
}

impl Default for Rows {
    fn default() -> Self {
        Self { loose: LruCache::unbounded(), held: HashMap::new(), held_bytes: 0, round: 1 }
    }
}

impl Rows {
    /// The number of this round.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Bytes that are held.
    pub fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub fn len(&self) -> usize {
        self.loose.len() + self.held.len()
    }

    pub fn contains(&self, key: &Key) -> bool {
        self.loose.contains(key) || self.held.contains_key(key)
    }

    /// The row, which was just used.
    pub fn get(&mut self, key: &Key) -> Option<&Row> {
        self.loose.get(key).or_else(|| self.held.get(key))
    }

    pub fn peek(&self, key: &Key) -> Option<&Row> {
        self.loose.peek(key).or_else(|| self.held.get(key))
    }

    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.loose.iter().map(|(key, _)| key).chain(self.held.keys())
    }

    /// What may be evicted, the longest unused first.
    pub fn loose(&self) -> impl Iterator<Item = (&Key, &Row)> {
        self.loose.iter().rev()
    }

    /// Puts a row; gives the one that was there.
    pub fn push(&mut self, key: Key, row: Row) -> Option<Row> {
        let old = self.pop(&key);
        if row.round == 0 {
            self.loose.push(key, row);
        } else {
            self.held_bytes += row.bytes;
            self.held.insert(key, row);
        }
        old
    }

    pub fn pop(&mut self, key: &Key) -> Option<Row> {
        if let Some(row) = self.held.remove(key) {
            self.held_bytes -= row.bytes;
            return Some(row);
        }
        self.loose.pop(key)
    }

    /// More bytes of a file are kept.
    pub fn add(&mut self, key: Key, bytes: u64) {
        match self.held.get_mut(&key) {
            Some(row) => {
                row.bytes += bytes;
                self.held_bytes += bytes;
            }
            None => {
                let new = || Row { bytes: 0, form: Form::Part, round: 0 };
                self.loose.get_or_insert_mut(key, new).bytes += bytes;
            }
        }
    }

    /// Fewer bytes of a file are kept; gives by how many.
    pub fn take(&mut self, key: &Key, bytes: u64) -> u64 {
        let is_held = self.held.contains_key(key);
        // The row may have been dropped meanwhile, with all its bytes.
        let Some(row) = self.peek_mut(key) else { return 0 };
        let bytes = bytes.min(row.bytes);
        row.bytes -= bytes;
        if is_held {
            self.held_bytes -= bytes;
        }
        bytes
    }

    pub fn set_form(&mut self, key: &Key, form: Form) {
        if let Some(row) = self.peek_mut(key) {
            row.form = form;
        }
    }

    fn peek_mut(&mut self, key: &Key) -> Option<&mut Row> {
        match self.held.get_mut(key) {
            Some(row) => Some(row),
            None => self.loose.peek_mut(key),
        }
    }

    /// Holds a row until a later round ends without it; gives the row.
    pub fn hold(&mut self, key: &Key) -> Option<Row> {
        if let Some(row) = self.held.get_mut(key) {
            row.round = self.round;
            return Some(*row);
        }
        let row = Row { round: self.round, ..self.loose.pop(key)? };
        self.push(*key, row);
        Some(row)
    }

    /// Begins a round.
    pub fn begin_round(&mut self) {
        self.round += 1;
    }

    /// Lets go of what no call since the round began held.
    pub fn end_round(&mut self) {
        let round = self.round;
        for (key, row) in self.held.extract_if(|_, row| row.round != round) {
            self.held_bytes -= row.bytes;
            self.loose.push(key, Row { round: 0, ..row });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        Key::Stamped([n; 32])
    }

    #[test]
    fn what_a_round_does_not_hold_is_let_go_at_its_end_and_not_before() {
        let mut rows = Rows::default();
        (1..4).for_each(|n| rows.add(key(n), 100));
        assert!(rows.hold(&key(9)).is_none());
        (1..3).for_each(|n| assert_eq!(rows.hold(&key(n)).unwrap().bytes, 100));
        rows.begin_round();
        rows.hold(&key(2));
        assert_eq!((rows.held_bytes(), rows.loose().count()), (200, 1));
        rows.end_round();
        assert_eq!((rows.held_bytes(), rows.loose().count(), rows.len()), (100, 2, 3));
    }

    #[test]
    fn held_bytes_are_those_of_the_held_rows_whatever_happens_to_them() {
        let mut rows = Rows::default();
        rows.add(key(1), 100);
        rows.hold(&key(1));
        rows.add(key(1), 50);
        assert_eq!((rows.take(&key(1), 30), rows.held_bytes()), (30, 120));
        assert_eq!(rows.take(&key(7), 30), 0);
        rows.set_form(&key(1), Form::Whole);
        let row = rows.pop(&key(1)).unwrap();
        assert_eq!((row.bytes, row.form, rows.held_bytes()), (120, Form::Whole, 0));
        // A file that gets the name of its content stays held.
        rows.push(key(2), row);
        assert_eq!((rows.held_bytes(), rows.loose().count()), (120, 0));
    }
}
