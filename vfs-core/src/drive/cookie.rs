//! Cookies of listings that stream from the index.
//!
//! A kernel goes on at the cookie of the entry that a program consumed last:
//! in the middle of what a call gave, anywhere after `seekdir`, and, when it
//! drops a listing that it had kept, on a handle that never gave that cookie.
//! Meanwhile entries come and go, also the one that the cookie was given with.
//! What stayed must still come exactly once, so a cookie has to say which
//! entries are behind it, whatever has become of them:
//!
//! - A count does not: it shifts with every entry that goes.
//! - A file id does not: a renamed file has it elsewhere, a removed one nowhere,
//!   and hard links share it.
//! - A hash of the name would need an index in the order of hashes.
//! - The name itself does, but does not fit.
//!
//! So a cookie is a piece of the name, just enough to tell it from the next
//! one: names are cut into pieces of four bytes, and the piece in which an
//! entry and the one listed after it first differ is the low half of the cookie.
//! What both have before that piece, the stem, is the high half, as the number
//! that [`Stems`] gave it; without a stem it is 0.
//!
//! ```text
//! listed            stem        piece
//! img_0001.cr2      img_0001    .cr2
//! img_0001.jpg      img_        0001    (the next one is img_0002.cr2)
//! ```
//!
//! The listing goes on with the first name after all that begin with the stem
//! and the piece. Nothing that stayed is skipped by that: when the cookie was
//! given, the next entry was already beyond them, in the order of bytes. And
//! nothing is repeated, because what was listed is not beyond. It takes one
//! seek in the index, and of the handle nothing.
//!
//! Stems are few, as names in one directory are alike: 1,000,000 numbered files
//! have about a hundred. Their memory is bounded all the same: the oldest are
//! forgotten, each after at least [`Stems::MOST`]` / 2` others. A handle holds the
//! stems of its last call itself, so reading on never depends on that; and a
//! kernel lets go of listings from before the last [`Stems::epoch`], so what it
//! keeps leads somewhere. Whoever goes back to a forgotten place all the same is
//! told so: that is better than a wrong listing.

use crate::index::after_prefix;
use crate::model::Name;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of the name in a cookie.
const PIECE_BYTES: usize = 4;
const PIECE_BITS: u32 = 8 * PIECE_BYTES as u32;
/// Numbers of stems; a cookie is positive for those who take it for signed.
const NUMBERS: u64 = (1 << (63 - PIECE_BITS)) - 1;
/// Stems that a handle holds; more than any kernel asks for at once.
const HELD_MAX: usize = 1 << 16;

/// What names begin with, and what is in a cookie for it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Stem {
    number: u64,
    bytes: Arc<[u8]>,
}

/// The stems of cookies that were given lately, of all directories.
pub(super) struct Stems(Mutex<Table>);

struct Table {
    most: usize,
    /// In the order in which they were given out.
    given: VecDeque<Arc<[u8]>>,
    /// How many were forgotten: the place of the first of `given`.
    forgotten: u64,
    /// The latest place of each. Not hashed: nobody shall wait while half a million are rehashed.
    latest: BTreeMap<Arc<[u8]>, u64>,
}

impl Default for Stems {
    fn default() -> Self {
        Self::bounded(Self::MOST)
    }
}

impl Stems {
    /// About 64 MiB with names of usual length.
    pub const MOST: usize = 1 << 19;

    /// Grows with every `MOST / 4` stems: cookies of listings that were opened in this epoch are
    /// known for as many more.
    pub fn epoch(&self) -> u64 {
        let table = self.lock();
        table.end() / (table.most as u64 / 4)
    }

    fn bounded(most: usize) -> Self {
        let (given, forgotten, latest) = Default::default();
        Self(Mutex::new(Table { most, given, forgotten, latest }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // A panic while it is changed loses places at most, never mixes them up.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The place of the next one.
    fn end(&self) -> u64 {
        self.forgotten + self.given.len() as u64
    }

    /// The stem of these bytes, which stays known while `most / 2` others are given out.
    fn stem(&mut self, bytes: &[u8]) -> Stem {
        let end = self.end();
        let (bytes, place) = match self.latest.get_key_value(bytes) {
            Some((bytes, &place)) if end - place <= self.most as u64 / 2 => {
                return Stem { number: number(place), bytes: Arc::clone(bytes) };
            }
            Some((bytes, _)) => (Arc::clone(bytes), end),
            None => (Arc::from(bytes), end),
        };
        self.given.push_back(Arc::clone(&bytes));
        self.latest.insert(Arc::clone(&bytes), place);
        if self.given.len() > self.most {
            self.forget_first();
        }
        Stem { number: number(place), bytes }
    }

    fn forget_first(&mut self) {
        let Some(first) = self.given.pop_front() else { return };
        if self.latest.get(&first) == Some(&self.forgotten) {
            self.latest.remove(&first);
        }
        self.forgotten += 1;
    }

    fn numbered(&self, wanted: u64) -> Option<Stem> {
        let first = number(self.forgotten);
        let nth = (wanted + NUMBERS - first) % NUMBERS;
        let bytes = Arc::clone(self.given.get(usize::try_from(nth).ok()?)?);
        Some(Stem { number: wanted, bytes })
    }
}

/// The number of a place: from 1 on, and around when all were used.
fn number(place: u64) -> u64 {
    place % NUMBERS + 1
}

/// The stems of the last call on one handle.
#[derive(Default)]
pub(super) struct Held(Mutex<Vec<Stem>>);

impl Held {
    fn lock(&self) -> MutexGuard<'_, Vec<Stem>> {
        // Replaced whole, so a panic elsewhere leaves it right.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a listing goes on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// With the first name that is not below these bytes.
    From(Vec<u8>),
    End,
}

/// One call on a handle.
pub(super) struct Call<'a> {
    stems: &'a Stems,
    held: Vec<Stem>,
    /// Neighbours often share one.
    last: Option<Stem>,
}

impl<'a> Call<'a> {
    /// Where the listing goes on after this cookie; `None` when that was forgotten. Cookies of
    /// `.` and `..` are below those of all names, whose first byte is not NUL.
    pub fn begin(stems: &'a Stems, held: &Held, cookie: u64) -> Option<(Self, Place)> {
        let mut call = Self { stems, held: Vec::new(), last: None };
        let mut name = Vec::new();
        let wanted = cookie >> PIECE_BITS;
        if wanted != 0 {
            let stem = held.lock().iter().find(|s| s.number == wanted).cloned();
            let stem = match stem {
                Some(stem) => stem,
                None if wanted <= NUMBERS => stems.lock().numbered(wanted)?,
                None => return None,
            };
            name.extend_from_slice(&stem.bytes);
            call.held.push(stem);
        }
        let piece = &cookie.to_be_bytes()[size_of::<u64>() - PIECE_BYTES..];
        Some((call, place_after(name, piece)))
    }

    /// The cookie of an entry, with `next` listed after it.
    pub fn cookie(&mut self, name: &Name, next: Option<&Name>) -> u64 {
        let name = name.as_bytes();
        let (stem, rest) = name.split_at(stem_len(name, next.map_or(&[], Name::as_bytes)));
        let mut piece = [0; PIECE_BYTES];
        let len = rest.len().min(PIECE_BYTES);
        piece[..len].copy_from_slice(&rest[..len]);
        self.number(stem) << PIECE_BITS | u64::from(u32::from_be_bytes(piece))
    }

    fn number(&mut self, stem: &[u8]) -> u64 {
        if stem.is_empty() {
            return 0;
        }
        if let Some(last) = self.last.as_ref().filter(|last| *last.bytes == *stem) {
            return last.number;
        }
        let stem = self.stems.lock().stem(stem);
        if self.held.len() < HELD_MAX {
            self.held.push(stem.clone());
        }
        self.last.insert(stem).number
    }

    /// The call is answered: the handle can go on from each of its cookies.
    pub fn end(self, held: &Held) {
        *held.lock() = self.held;
    }
}

/// How much of a name comes before the first piece in which it differs from another.
fn stem_len(name: &[u8], other: &[u8]) -> usize {
    let common = name.iter().zip(other).take_while(|(a, b)| a == b).count();
    common - common % PIECE_BYTES
}

/// After all names that begin with this stem and piece; a piece that the name did not fill is
/// its end, and the place is after this name alone.
fn place_after(mut stem: Vec<u8>, piece: &[u8]) -> Place {
    let len = piece.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
    stem.extend_from_slice(&piece[..len]);
    if len < PIECE_BYTES {
        // Names have no NUL: this is the first that can follow.
        stem.push(0);
        return Place::From(stem);
    }
    after_prefix(&stem).map_or(Place::End, Place::From)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(bytes: impl AsRef<[u8]>) -> Name {
        Name::new(bytes.as_ref()).unwrap()
    }

    /// A cookie as one handle gives it, and where it leads another one.
    fn given(stems: &Stems, held: &Held, of: &Name, next: Option<&Name>) -> u64 {
        let (mut call, _) = Call::begin(stems, held, 0).unwrap();
        let cookie = call.cookie(of, next);
        call.end(held);
        cookie
    }

    fn place(stems: &Stems, held: &Held, cookie: u64) -> Option<Place> {
        Call::begin(stems, held, cookie).map(|(_, place)| place)
    }

    /// Names that are alike for long, and have the first and the last byte there is.
    fn names() -> impl Strategy<Value = std::collections::BTreeSet<Vec<u8>>> {
        let byte = prop::sample::select(vec![1, b'a', b'b', u8::MAX]);
        prop::collection::btree_set(prop::collection::vec(byte, 1..14), 2..60)
    }

    proptest! {
        /// That is all that is needed: what was listed is before it, what was not is not.
        #[test]
        fn a_cookie_leads_between_its_entry_and_the_next(names in names()) {
            let stems = Stems::default();
            let names: Vec<_> = names.iter().map(name).collect();
            let mut cookies = std::collections::HashSet::new();
            for (at, of) in names.iter().enumerate() {
                let next = names.get(at + 1);
                let cookie = given(&stems, &Held::default(), of, next);
                prop_assert!(cookie > 2 && i64::try_from(cookie).is_ok());
                prop_assert!(cookies.insert(cookie), "twice {cookie:#x}");
                match place(&stems, &Held::default(), cookie) {
                    Some(Place::From(from)) => {
                        prop_assert!(of.as_bytes() < &from[..]);
                        prop_assert!(next.is_none_or(|next| &from[..] <= next.as_bytes()));
                    }
                    Some(Place::End) => prop_assert!(next.is_none()),
                    None => prop_assert!(false, "forgotten"),
                }
            }
        }
    }

    #[test]
    fn the_dots_lead_to_the_first_name_there_can_be() {
        for cookie in 0..=2 {
            let place = place(&Stems::default(), &Held::default(), cookie);
            assert!(matches!(place, Some(Place::From(from)) if from < vec![1]));
        }
    }

    #[test]
    fn stems_are_few_and_bounded_and_a_handle_holds_its_last_ones() {
        const MOST: usize = 64;
        let stems = Stems::bounded(MOST);
        let (held, other) = (Held::default(), Held::default());
        let pair = |n: u64| [name(format!("{n:08}.a")), name(format!("{n:08}.b"))];
        let [of, next] = pair(0);
        let first = given(&stems, &held, &of, Some(&next));
        let exact = place(&stems, &held, first);
        assert!(exact.is_some());
        for n in 1..=MOST as u64 / 2 {
            let [of, next] = pair(n);
            given(&stems, &other, &of, Some(&next));
            assert_eq!(place(&stems, &other, first), exact, "after {n} others");
        }
        for n in 100..10_000 {
            let [of, next] = pair(n);
            given(&stems, &other, &of, Some(&next));
        }
        let table = stems.lock();
        assert!(table.given.len() <= MOST && table.latest.len() <= MOST);
        drop(table);
        assert_eq!(place(&stems, &other, first), None, "forgotten is not wrong");
        assert_eq!(place(&stems, &held, first), exact);
    }

    #[test]
    fn a_stem_that_is_used_again_stays() {
        let stems = Stems::bounded(8);
        let often = name("often.a");
        let mut cookies = Vec::new();
        for n in 0..100 {
            cookies.push(given(&stems, &Held::default(), &often, Some(&name("often.b"))));
            let [of, next] = ["a", "b"].map(|end| name(format!("{n:08}.{end}")));
            given(&stems, &Held::default(), &of, Some(&next));
            assert!(place(&stems, &Held::default(), *cookies.last().unwrap()).is_some());
        }
        cookies.dedup();
        assert!(cookies.len() < 50, "it is not given anew each time");
    }

    #[test]
    fn what_was_listed_in_an_epoch_is_known_in_it_and_for_a_while() {
        const MOST: usize = 64;
        let stems = Stems::bounded(MOST);
        let give = |n: u64| {
            let [of, next] = ["a", "b"].map(|end| name(format!("{n:08}.{end}")));
            given(&stems, &Held::default(), &of, Some(&next))
        };
        for n in 0..1_000 {
            // The oldest that is still given as it is.
            let kept = give(n);
            for more in 1..MOST as u64 / 2 {
                give((n + 1) * 1_000_000_000 + more);
            }
            assert_eq!(give(n), kept);
            let epoch = stems.epoch();
            let mut more = (n + 1) * 1_000_000;
            while stems.epoch() == epoch {
                give(more);
                more += 1;
            }
            for _ in 1..MOST / 4 {
                give(more);
                more += 1;
            }
            assert!(place(&stems, &Held::default(), kept).is_some(), "in round {n}");
        }
    }

    #[test]
    fn numbers_go_around_and_cookies_that_nobody_gave_lead_nowhere() {
        let stems = Stems::bounded(8);
        stems.lock().forgotten = NUMBERS - 3;
        for n in 0..20 {
            let [of, next] = ["a", "b"].map(|end| name(format!("{n:08}.{end}")));
            let cookie = given(&stems, &Held::default(), &of, Some(&next));
            assert!(i64::try_from(cookie).is_ok());
            let Some(Place::From(from)) = place(&stems, &Held::default(), cookie) else {
                panic!("the {n}th is forgotten");
            };
            assert!(of.as_bytes() < &from[..] && &from[..] <= next.as_bytes());
        }
        for cookie in [u64::MAX, 1 << 63, 1000 << PIECE_BITS] {
            assert_eq!(place(&stems, &Held::default(), cookie), None);
        }
    }
}
