//! Who holds which bytes of one file: the rules of POSIX record locks, and nothing else.
//!
//! A lock of `flock` is one of the whole file, whose holder is an open file instead of a process.

use serde::{Deserialize, Serialize};

/// Who holds a lock: the kernel's number of a process's files, or of one open file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Holder(pub u64);

/// With whom a lock may be shared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub enum Mode {
    /// With others that share it.
    Shared,
    /// With nobody.
    Exclusive,
}

/// Bytes from the first to the last, both included.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Span {
    first: u64,
    last: u64,
}

impl Span {
    /// The last byte that a file can have.
    const END: u64 = i64::MAX as u64;
    /// Every byte there is or will be.
    pub const ALL: Self = Self { first: 0, last: Self::END };

    /// `None` for what is no range of a file.
    pub fn new(first: u64, last: u64) -> Option<Self> {
        (first <= last && last <= Self::END).then_some(Self { first, last })
    }

    /// The first byte.
    pub fn first(self) -> u64 {
        self.first
    }

    /// The last one.
    pub fn last(self) -> u64 {
        self.last
    }

    /// Whether it is what [`Span::new`] makes: it may have come over a network.
    pub fn is_valid(self) -> bool {
        Self::new(self.first, self.last).is_some()
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// One lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Whose it is.
    pub holder: Holder,
    /// The holder's process, 0 when it is none of this device.
    pub pid: u32,
    /// Which bytes.
    pub span: Span,
    /// With whom it may be shared.
    pub mode: Mode,
}

/// The locks of one file. No two of a holder overlap, and none of one mode touch.
#[derive(Clone, Default, Debug)]
pub struct Table {
    held: Vec<Held>,
}

impl Table {
    /// A lock that keeps this one from being given.
    pub fn conflict(&self, holder: Holder, span: Span, mode: Mode) -> Option<Held> {
        let excludes = |h: &Held| mode == Mode::Exclusive || h.mode == Mode::Exclusive;
        self.held
            .iter()
            .find(|h| h.holder != holder && h.span.overlaps(span) && excludes(h))
            .copied()
    }

    /// Gives a holder these bytes in this mode, instead of what it had of them.
    pub fn set(&mut self, new: Held) {
        self.clear(new.holder, new.span);
        let mut merged = new;
        self.held.retain(|h| {
            let same = h.holder == new.holder && h.mode == new.mode;
            let touches = h.span.last.checked_add(1) == Some(new.span.first)
                || new.span.last.checked_add(1) == Some(h.span.first);
            if same && touches {
                merged.span.first = merged.span.first.min(h.span.first);
                merged.span.last = merged.span.last.max(h.span.last);
            }
            !(same && touches)
        });
        self.held.push(merged);
    }

    /// Takes these bytes from a holder.
    pub fn clear(&mut self, holder: Holder, span: Span) {
        let mut left = Vec::new();
        self.held.retain(|h| {
            let is_cut = h.holder == holder && h.span.overlaps(span);
            if is_cut {
                left.extend(remains(h, span));
            }
            !is_cut
        });
        self.held.append(&mut left);
    }

    /// What a holder has.
    pub fn of(&self, holder: Holder) -> impl Iterator<Item = &Held> {
        self.held.iter().filter(move |h| h.holder == holder)
    }

    /// All there are.
    pub fn iter(&self) -> impl Iterator<Item = &Held> {
        self.held.iter()
    }

    /// Whether a holder has anything.
    pub fn holds(&self, holder: Holder) -> bool {
        self.of(holder).next().is_some()
    }

    /// Whether nobody has anything.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// What is left of a lock on both sides of a hole.
fn remains(held: &Held, hole: Span) -> impl Iterator<Item = Held> {
    let before = hole.first.checked_sub(1).and_then(|last| Span::new(held.span.first, last));
    let after = hole.last.checked_add(1).and_then(|first| Span::new(first, held.span.last));
    [before, after].into_iter().flatten().map({
        let held = *held;
        move |span| Held { span, ..held }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: u64 = 16;

    /// For each byte, who has it how: what the table means, without its ranges.
    #[derive(Default)]
    struct Model {
        bytes: [Vec<(Holder, Mode)>; BYTES as usize],
    }

    impl Model {
        fn excluded(&self, holder: Holder, span: Span, mode: Mode) -> bool {
            (span.first..=span.last).any(|at| {
                self.bytes[at as usize].iter().any(|(other, theirs)| {
                    *other != holder && (mode == Mode::Exclusive || *theirs == Mode::Exclusive)
                })
            })
        }

        fn set(&mut self, holder: Holder, span: Span, mode: Option<Mode>) {
            for at in span.first..=span.last {
                self.bytes[at as usize].retain(|(other, _)| *other != holder);
                self.bytes[at as usize].extend(mode.map(|mode| (holder, mode)));
            }
        }
    }

    fn span() -> impl Strategy<Value = Span> {
        (0..BYTES, 0..BYTES).prop_map(|(a, b)| Span::new(a.min(b), a.max(b)).unwrap())
    }

    fn mode() -> impl Strategy<Value = Option<Mode>> {
        prop_oneof![Just(None), Just(Some(Mode::Shared)), Just(Some(Mode::Exclusive))]
    }

    fn assert_tidy(table: &Table) {
        for (n, a) in table.held.iter().enumerate() {
            for b in table.held[n + 1..].iter().filter(|b| b.holder == a.holder) {
                assert!(!a.span.overlaps(b.span), "{a:?} and {b:?}");
                let touch = a.span.last + 1 == b.span.first || b.span.last + 1 == a.span.first;
                assert!(!(touch && a.mode == b.mode), "{a:?} and {b:?} are one");
            }
        }
    }

    proptest! {
        #[test]
        fn the_table_is_as_if_each_byte_had_its_own_lock(
            steps in prop::collection::vec((0..4_u64, span(), mode()), 1..60),
        ) {
            let (mut table, mut model) = (Table::default(), Model::default());
            for (holder, span, mode) in steps {
                let holder = Holder(holder);
                match mode {
                    None => {
                        table.clear(holder, span);
                        model.set(holder, span, None);
                    }
                    Some(mode) => {
                        let conflict = table.conflict(holder, span, mode);
                        prop_assert_eq!(conflict.is_some(), model.excluded(holder, span, mode));
                        if conflict.is_none() {
                            table.set(Held { holder, pid: 0, span, mode });
                            model.set(holder, span, Some(mode));
                        }
                    }
                }
                assert_tidy(&table);
                for at in 0..BYTES {
                    let here = Span::new(at, at).unwrap();
                    for holder in (0..4).map(Holder) {
                        let has = table.of(holder).find(|h| h.span.overlaps(here)).map(|h| h.mode);
                        let byte = &model.bytes[at as usize];
                        let should = byte.iter().find(|(h, _)| *h == holder).map(|(_, m)| *m);
                        prop_assert_eq!(has, should, "byte {} of {:?}", at, holder);
                    }
                }
            }
        }
    }

    #[test]
    fn the_ends_of_a_file_do_not_overflow() {
        assert_eq!(Span::new(0, u64::MAX), None);
        assert_eq!(Span::new(2, 1), None);
        let mut table = Table::default();
        let held = Held { holder: Holder(1), pid: 7, span: Span::ALL, mode: Mode::Shared };
        table.set(held);
        table.set(held);
        assert_eq!(table.held, [held]);
        table.clear(Holder(1), Span::new(0, 0).unwrap());
        assert_eq!(table.held[0].span.first(), 1);
        table.clear(Holder(1), Span::ALL);
        assert!(table.is_empty());
    }
}
