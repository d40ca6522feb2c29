//! The hash tree of a file: what lets any range be checked against the content id.
//!
//! The tree is BLAKE3's own, cut at *groups* of [`GROUP_BYTES`]: a group is a
//! complete subtree of 64 chunks, so its chaining value is a node of the tree
//! that yields the content id, and nothing but `blake3` is needed to check it.
//! A range is proved by the chaining values of the maximal subtrees outside it,
//! in pre-order; whoever has the bytes of the range merges both into the root.
//!
//! Level 0 has one value per group; level `k + 1` merges pairs of level `k`,
//! and an odd last node moves up unchanged, which is exactly BLAKE3's
//! left-balanced tree. A manifest keeps at most [`MAX_LEAVES`] nodes of its
//! lowest level, whatever the file's size: below that level, only met in files
//! above 8 GiB, whoever proves a range hashes the neighbours from the file.
//!
//! Everything here is pure but [`Manifest::of_file`] and [`Manifest::of_grown_file`], which read
//! one file.

use crate::model::ContentId;
use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// The unit of verification, of fetching and of the cache's maps
/// (the figures behind it: `docs/decisions/0002-range-unit.md`).
pub const GROUP_BYTES: u64 = 64 << 10;

/// The most nodes a manifest keeps of its lowest level: 4 MiB of chaining values.
pub const MAX_LEAVES: u64 = 1 << 17;

/// A node of the tree.
pub type ChainingValue = [u8; 32];

/// How much one call of `read` asks for while hashing: fits into a core's own cache.
const READ_BYTES: u64 = 256 << 10;
/// What one thread takes at a time from a file that several threads hash.
const SHARE_BYTES: u64 = 4 << 20;
/// Below this a second thread costs more than it saves.
const PARALLEL_FROM_BYTES: u64 = 8 << 20;
/// More threads than this only fight for the disk and take the machine from its user.
const MAX_THREADS: u64 = 8;

/// The chaining values of a file's tree, from its lowest kept level up to below the root.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    content: ContentId,
    size: u64,
    /// The lowest kept level: 0 unless the file has more than `MAX_LEAVES` groups.
    base: u32,
    /// `levels[k]` is level `base + k`; the last one has two nodes. Empty for a single node.
    levels: Vec<Vec<ChainingValue>>,
}

/// Why stored bytes are not a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A newer program wrote it.
    #[error("the manifest has format {0}; this program knows {FORMAT}")]
    Newer(u8),
    /// It is cut, altered, or something else.
    #[error("the manifest is damaged")]
    Damaged,
}

/// The version of the stored form.
const FORMAT: u8 = 1;
const MAGIC: &[u8; 7] = b"sd-tree";
const HEADER_BYTES: usize = 7 + 1 + 8 + 8 + 32 + 32;

impl Manifest {
    /// Hashes an open file of which `size` bytes are expected, on several threads
    /// when it is large. `None` when `cancel` became true or the file is shorter.
    pub fn of_file(
        file: &File,
        size: u64,
        cancel: &AtomicBool,
    ) -> io::Result<Option<(ContentId, Self)>> {
        Self::of_file_with(file, size, cancel, MAX_LEAVES)
    }

    /// As [`Self::of_file`], with the content id of the first `begun` bytes of the same reading;
    /// these are at most `size`. It uses no further thread, and ends when `is_over` says so.
    pub fn of_grown_file(
        file: &File,
        size: u64,
        begun: u64,
        is_over: &IsOver<'_>,
    ) -> io::Result<Option<(ContentId, Self)>> {
        if groups_of(size) <= 1 {
            let bytes = read_small_file(file, size, is_over)?;
            let ids = |bytes: Vec<u8>| {
                (ContentId::of(&bytes[..begun as usize]), Self::of_bytes(&bytes).1)
            };
            return Ok(bytes.map(ids));
        }
        let base = base_level(groups_of(size), MAX_LEAVES);
        let hashed = hash_leaves(file, size, (GROUP_BYTES << base, 1), begun, is_over)?;
        Ok(hashed.map(|Leaves { leaves, begun: end }| {
            let before = begun.saturating_sub(1) / (GROUP_BYTES << base);
            let begun = Self::id_of_beginning(begun, base, &leaves[..before as usize], end);
            (begun, Self::from_leaves(size, base, leaves))
        }))
    }

    /// Of whole leaves and of what follows them, if anything is there at all.
    fn id_of_beginning(
        size: u64,
        base: u32,
        before: &[ChainingValue],
        end: Option<Box<Hasher>>,
    ) -> ContentId {
        match end {
            None => ContentId::of(&[]),
            Some(end) if before.is_empty() => ContentId(*end.finalize().as_bytes()),
            Some(end) => {
                let leaves = [before, &[end.finalize_non_root()]].concat();
                Self::from_leaves(size, base, leaves).content
            }
        }
    }

    fn of_file_with(
        file: &File,
        size: u64,
        cancel: &AtomicBool,
        max_leaves: u64,
    ) -> io::Result<Option<(ContentId, Self)>> {
        let is_over = &|| cancel.load(Ordering::Relaxed);
        let base = base_level(groups_of(size), max_leaves);
        if groups_of(size) >> base <= 1 && base == 0 {
            let bytes = read_small_file(file, size, is_over)?;
            return Ok(bytes.map(|bytes| Self::of_bytes(&bytes)));
        }
        let threads = threads_for(size);
        let hashed = hash_leaves(file, size, (GROUP_BYTES << base, threads), 0, is_over)?;
        Ok(hashed.map(|Leaves { leaves, .. }| {
            let manifest = Self::from_leaves(size, base, leaves);
            (manifest.content, manifest)
        }))
    }

    /// The content id and tree of bytes in memory.
    pub fn of_bytes(bytes: &[u8]) -> (ContentId, Self) {
        let size = bytes.len() as u64;
        if groups_of(size) <= 1 {
            let content = ContentId::of(bytes);
            return (content, Self { content, size, base: 0, levels: vec![] });
        }
        let base = base_level(groups_of(size), MAX_LEAVES);
        let unit = GROUP_BYTES << base;
        let leaves = bytes.chunks(unit as usize).zip(0..);
        let leaves = leaves.map(|(bytes, n)| hash_subtree(n * unit, bytes)).collect();
        let manifest = Self::from_leaves(size, base, leaves);
        (manifest.content, manifest)
    }

    /// Of two leaves or more.
    fn from_leaves(size: u64, base: u32, leaves: Vec<ChainingValue>) -> Self {
        let mut levels = vec![leaves];
        while let Some(level) = levels.last().filter(|level| level.len() > 2) {
            levels.push(merged_pairs(level));
        }
        let top = &levels[levels.len() - 1];
        let content = ContentId(*merge_subtrees_root(&top[0], &top[1], Mode::Hash).as_bytes());
        Self { content, size, base, levels }
    }

    /// The BLAKE3 of all bytes.
    pub fn content(&self) -> ContentId {
        self.content
    }

    /// The file's bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// About how much memory this takes, in bytes.
    pub fn memory_bytes(&self) -> usize {
        128 + self.levels.iter().map(|level| level.len() * 32).sum::<usize>()
    }

    /// Whether every proof can be had without the file's bytes, as for all files up to 8 GiB.
    pub fn is_whole(&self) -> bool {
        self.base == 0
    }

    /// What proves `range` (widened to whole groups) of a manifest that [is whole](Self::is_whole):
    /// for others, nodes below the kept levels are missing and this is `None`.
    pub fn proof(&self, range: Range<u64>) -> Option<Vec<ChainingValue>> {
        self.proof_with(range, &mut |_| Err(io::ErrorKind::Unsupported.into())).ok()
    }

    /// As [`Self::proof`], for any manifest: `read` gives bytes of the file near the range,
    /// at most 1 MiB in one call.
    pub fn proof_with(
        &self,
        range: Range<u64>,
        read: &mut dyn FnMut(Range<u64>) -> io::Result<Vec<u8>>,
    ) -> io::Result<Vec<ChainingValue>> {
        let mut proof = Vec::new();
        let end = range.end.min(self.size);
        if range.start < end && groups_of(self.size) > 1 {
            let wanted = range.start / GROUP_BYTES..end.div_ceil(GROUP_BYTES);
            self.prove(0..groups_of(self.size), &wanted, read, &mut proof)?;
        }
        Ok(proof)
    }

    fn prove(
        &self,
        subtree: Range<u64>,
        wanted: &Range<u64>,
        read: &mut dyn FnMut(Range<u64>) -> io::Result<Vec<u8>>,
        proof: &mut Vec<ChainingValue>,
    ) -> io::Result<()> {
        if !overlap(&subtree, wanted) {
            proof.push(self.node(subtree, read)?);
        } else if !contains(wanted, &subtree) {
            let (left, right) = children(subtree);
            self.prove(left, wanted, read, proof)?;
            self.prove(right, wanted, read, proof)?;
        }
        Ok(())
    }

    /// The chaining value of a subtree, given as its groups; never the root.
    fn node(
        &self,
        subtree: Range<u64>,
        read: &mut dyn FnMut(Range<u64>) -> io::Result<Vec<u8>>,
    ) -> io::Result<ChainingValue> {
        let level = level_of(&subtree);
        if level >= self.base {
            let kept = &self.levels[(level - self.base) as usize];
            return Ok(kept[(subtree.start >> level) as usize]);
        }
        let bytes = subtree.start * GROUP_BYTES..(subtree.end * GROUP_BYTES).min(self.size);
        if bytes.end - bytes.start > 1 << 20 {
            let (left, right) = children(subtree);
            let (left, right) = (self.node(left, read)?, self.node(right, read)?);
            return Ok(merge_subtrees_non_root(&left, &right, Mode::Hash));
        }
        Ok(hash_subtree(bytes.start, &read(bytes)?))
    }

    /// The stored form: a header and the lowest kept level, from which the rest follows.
    pub fn to_bytes(&self) -> Vec<u8> {
        let leaves = self.levels.first().map_or(&[][..], |leaves| leaves);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 32 * leaves.len());
        bytes.extend_from_slice(MAGIC);
        bytes.push(FORMAT);
        bytes.extend_from_slice(&(GROUP_BYTES << self.base).to_le_bytes());
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.content.0);
        // The root vouches for the leaves, but not for the last few bits of the size.
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(check.as_bytes());
        bytes.extend(leaves.iter().flatten());
        bytes
    }

    /// From the stored form. The header has a checksum, and the root of the leaves must be the
    /// content id, so that no altered byte goes unnoticed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ManifestError> {
        let (header, leaves) =
            bytes.split_at_checked(HEADER_BYTES).ok_or(ManifestError::Damaged)?;
        if &header[..7] != MAGIC {
            return Err(ManifestError::Damaged);
        }
        if header[7] > FORMAT {
            return Err(ManifestError::Newer(header[7]));
        }
        let (fields, check) = header.split_last_chunk::<32>().ok_or(ManifestError::Damaged)?;
        if blake3::hash(fields) != *check {
            return Err(ManifestError::Damaged);
        }
        let number = |at: usize| fields[at..at + 8].try_into().map(u64::from_le_bytes);
        let (Ok(unit), Ok(size)) = (number(8), number(16)) else {
            return Err(ManifestError::Damaged);
        };
        let content: [u8; 32] = fields[24..].try_into().map_err(|_| ManifestError::Damaged)?;
        Self::from_parts(unit, size, ContentId(content), leaves).ok_or(ManifestError::Damaged)
    }

    fn from_parts(unit: u64, size: u64, content: ContentId, leaves: &[u8]) -> Option<Self> {
        let base = (unit / GROUP_BYTES).checked_ilog2()?;
        if unit != GROUP_BYTES.checked_shl(base)? {
            return None;
        }
        let (leaves, rest) = leaves.as_chunks::<32>();
        if groups_of(size) <= 1 {
            let empty = leaves.is_empty() && rest.is_empty() && base == 0;
            return empty.then_some(Self { content, size, base, levels: vec![] });
        }
        if !rest.is_empty() || leaves.len() < 2 || leaves.len() as u64 != size.div_ceil(unit) {
            return None;
        }
        let manifest = Self::from_leaves(size, base, leaves.to_vec());
        (manifest.content == content).then_some(manifest)
    }
}

/// Whether `bytes` are what the file `content` of `size` bytes has at `range`, which begins
/// at a group and ends at one or at the end of the file. Takes hostile input.
pub fn verify(
    content: ContentId,
    size: u64,
    range: Range<u64>,
    bytes: &[u8],
    proof: &[ChainingValue],
) -> bool {
    if !is_fetchable(&range, size) || bytes.len() as u64 != range.end - range.start {
        return false;
    }
    if range == (0..size) {
        return proof.is_empty() && ContentId::of(bytes) == content;
    }
    let wanted = range.start / GROUP_BYTES..range.end.div_ceil(GROUP_BYTES);
    let mut check = Check { wanted, start: range.start, bytes, proof: proof.iter() };
    let (left, right) = children(0..groups_of(size));
    let (Some(left), Some(right)) = (check.node(left), check.node(right)) else {
        return false;
    };
    check.proof.next().is_none()
        && *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes() == content.0
}

/// Whether a range may be asked for: on group borders (or the file's end), not empty unless
/// the file is, within the file.
pub fn is_fetchable(range: &Range<u64>, size: u64) -> bool {
    let within = range.start < range.end || *range == (0..0) && size == 0;
    within
        && range.end <= size
        && range.start.is_multiple_of(GROUP_BYTES)
        && (range.end.is_multiple_of(GROUP_BYTES) || range.end == size)
}

/// How many groups a file has.
pub fn groups_of(size: u64) -> u64 {
    size.div_ceil(GROUP_BYTES)
}

struct Check<'a> {
    wanted: Range<u64>,
    start: u64,
    bytes: &'a [u8],
    proof: std::slice::Iter<'a, ChainingValue>,
}

impl Check<'_> {
    /// The chaining value of a subtree from the bytes and the proof; `None` when that ends early.
    fn node(&mut self, subtree: Range<u64>) -> Option<ChainingValue> {
        if !overlap(&subtree, &self.wanted) {
            return self.proof.next().copied();
        }
        if contains(&self.wanted, &subtree) {
            let from = subtree.start * GROUP_BYTES;
            let end = self.bytes.len().min((subtree.end * GROUP_BYTES - self.start) as usize);
            return Some(hash_subtree(from, &self.bytes[(from - self.start) as usize..end]));
        }
        let (left, right) = children(subtree);
        let (left, right) = (self.node(left)?, self.node(right)?);
        Some(merge_subtrees_non_root(&left, &right, Mode::Hash))
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn contains(outer: &Range<u64>, inner: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// The two halves of a subtree of two groups or more: the left one is the largest power of
/// two that leaves something to the right (BLAKE3 paper, 2.1).
fn children(subtree: Range<u64>) -> (Range<u64>, Range<u64>) {
    let middle = subtree.start + (1 << (level_of(&subtree) - 1));
    (subtree.start..middle, middle..subtree.end)
}

/// The lowest level at which a subtree is one node.
fn level_of(subtree: &Range<u64>) -> u32 {
    (subtree.end - subtree.start).next_power_of_two().ilog2()
}

fn base_level(groups: u64, max_leaves: u64) -> u32 {
    groups.div_ceil(max_leaves).max(1).next_power_of_two().ilog2()
}

fn merged_pairs(level: &[ChainingValue]) -> Vec<ChainingValue> {
    let merged = level.chunks(2).map(|pair| match pair {
        [left, right] => merge_subtrees_non_root(left, right, Mode::Hash),
        odd => odd[0],
    });
    merged.collect()
}

/// The chaining value of the subtree that begins at byte `offset` of a larger file.
fn hash_subtree(offset: u64, bytes: &[u8]) -> ChainingValue {
    Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
}

/// All bytes of a file of at most one group; `None` when cancelled or the file is shorter.
fn read_small_file(file: &File, size: u64, is_over: &IsOver<'_>) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; size as usize];
    let is_whole = !is_over() && read_fully(file, &mut bytes, 0)?;
    Ok(is_whole.then_some(bytes))
}

/// Whether reading is to end unfinished; asked again and again.
type IsOver<'a> = dyn Fn() -> bool + Sync + 'a;

/// The chaining values of a file's units, and what came of the last one of its beginning.
struct Leaves {
    leaves: Vec<ChainingValue>,
    /// Of the unit in which the beginning ends, as far as it goes.
    begun: Option<Box<Hasher>>,
}

/// The chaining values of a file's units, of whose first `begun` bytes the hash is also wanted;
/// `None` when cancelled or the file is shorter.
///
/// The threads are the file's own, not a pool's, so that they inherit the caller's CPU and
/// I/O priority: an indexer that is nice stays nice.
fn hash_leaves(
    file: &File,
    size: u64,
    (unit, threads): (u64, u64),
    begun: u64,
    is_over: &IsOver<'_>,
) -> io::Result<Option<Leaves>> {
    let mut leaves = vec![[0; 32]; size.div_ceil(unit) as usize];
    let share = (SHARE_BYTES / unit).max(1) as usize;
    let shares = Mutex::new(leaves.chunks_mut(share).zip((0..).step_by(share)));
    let end = Mutex::new(None);
    let work = || -> io::Result<bool> {
        let mut buffer = vec![0; READ_BYTES as usize];
        loop {
            let next = shares.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((leaves, first)) = next else { return Ok(true) };
            for (leaf, n) in leaves.iter_mut().zip(first as u64..) {
                let unit = n * unit..((n + 1) * unit).min(size);
                let hashed = hash_unit(file, unit, begun, &mut buffer, is_over)?;
                let Some((value, at_end)) = hashed else { return Ok(false) };
                *leaf = value;
                if at_end.is_some() {
                    *end.lock().unwrap_or_else(PoisonError::into_inner) = at_end;
                }
            }
        }
    };
    let whole = std::thread::scope(|scope| -> io::Result<bool> {
        let helpers = (1..threads).map(|_| scope.spawn(work)).collect::<Vec<_>>();
        let mut whole = work()?;
        for helper in helpers {
            whole &= helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(whole)
    })?;
    let begun = end.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(whole.then_some(Leaves { leaves, begun }))
}

fn threads_for(size: u64) -> u64 {
    if size < PARALLEL_FROM_BYTES {
        return 1;
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    cores.min(size / SHARE_BYTES).clamp(1, MAX_THREADS)
}

/// The chaining value of a unit, and the hasher as it was after `begun` bytes of the file, if they
/// end in this unit.
fn hash_unit(
    file: &File,
    unit: Range<u64>,
    begun: u64,
    buffer: &mut [u8],
    is_over: &IsOver<'_>,
) -> io::Result<Option<(ChainingValue, Option<Box<Hasher>>)>> {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(unit.start);
    let (mut at, mut at_end) = (unit.start, None);
    while at < unit.end {
        let stop = if at < begun { unit.end.min(begun) } else { unit.end };
        let part = &mut buffer[..(stop - at).min(READ_BYTES) as usize];
        if is_over() || !read_fully(file, part, at)? {
            return Ok(None);
        }
        hasher.update(part);
        at += part.len() as u64;
        if at == begun {
            at_end = Some(Box::new(hasher.clone()));
        }
    }
    Ok(Some((hasher.finalize_non_root(), at_end)))
}

/// Fills the buffer; `false` when the file ends before.
fn read_fully(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(buffer, offset) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn bytes_of(size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let mut reader = Hasher::new().update(&size.to_le_bytes()).finalize_xof();
        reader.fill(&mut bytes);
        bytes
    }

    /// Sizes around chunk and group borders, up to some forty groups.
    fn sizes() -> impl Strategy<Value = usize> {
        let group = GROUP_BYTES as usize;
        (0..40usize, -2..=2isize, prop::sample::select(vec![1usize, 1024, group])).prop_map(
            move |(n, off, unit)| {
                (n * group.min(unit * 64)).saturating_add_signed(off * unit as isize / 2)
            },
        )
    }

    fn aligned(range: Range<usize>, size: u64) -> Range<u64> {
        let start = range.start as u64 / GROUP_BYTES * GROUP_BYTES;
        let end = (range.end as u64).div_ceil(GROUP_BYTES) * GROUP_BYTES;
        start..end.min(size)
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..Default::default() })]

        #[test]
        fn any_range_is_proved_and_any_flip_is_seen(
            size in sizes(), at in any::<prop::sample::Index>(), len in 0..1usize << 20,
            flip in any::<prop::sample::Index>(), leaves in prop::sample::select(vec![2u64, 3, 5, MAX_LEAVES]),
        ) {
            let mut bytes = bytes_of(size);
            let never = AtomicBool::new(false);
            let file = file_of(&bytes);
            let (content, manifest) =
                Manifest::of_file_with(&file, size as u64, &never, leaves).unwrap().unwrap();
            prop_assert_eq!(content, ContentId::of(&bytes));
            prop_assert_eq!(content, Manifest::of_bytes(&bytes).0);
            prop_assert_eq!(&Manifest::from_bytes(&manifest.to_bytes()).unwrap(), &manifest);

            if size == 0 {
                prop_assert!(verify(content, 0, 0..0, &[], &[]));
                return Ok(());
            }
            let start = at.index(size);
            let range = aligned(start..(start + len + 1).min(size), size as u64);
            let all = bytes.clone();
            let mut proof = manifest.proof_with(range.clone(), &mut |r| {
                Ok(all[r.start as usize..r.end as usize].to_vec())
            }).unwrap();
            let part = range.start as usize..range.end as usize;
            prop_assert!(verify(content, size as u64, range.clone(), &bytes[part.clone()], &proof));

            let mut longer = proof.clone();
            longer.push([0; 32]);
            prop_assert!(!verify(content, size as u64, range.clone(), &bytes[part.clone()], &longer));
            prop_assert!(!verify(content, size as u64 + 1, range.clone(), &bytes[part.clone()], &proof)
                || range.end != size as u64);
            if let Some(shorter) = proof.len().checked_sub(1) {
                prop_assert!(!verify(content, size as u64, range.clone(), &bytes[part.clone()], &proof[..shorter]));
                let n = flip.index(proof.len() * 256);
                proof[n / 256][n / 8 % 32] ^= 1 << (n % 8);
                prop_assert!(!verify(content, size as u64, range.clone(), &bytes[part.clone()], &proof));
                proof[n / 256][n / 8 % 32] ^= 1 << (n % 8);
            }
            let n = flip.index(part.len() * 8);
            bytes[part.start + n / 8] ^= 1 << (n % 8);
            prop_assert!(!verify(content, size as u64, range, &bytes[part], &proof));
        }

        #[test]
        fn hostile_input_never_panics(
            size in any::<u64>(), start in any::<u64>(), len in 0..3 * GROUP_BYTES,
            proof in prop::collection::vec(any::<[u8; 32]>(), 0..70), group in any::<bool>(),
        ) {
            let start = if group { start / GROUP_BYTES * GROUP_BYTES } else { start };
            let bytes = vec![0; len as usize];
            let end = start.saturating_add(len);
            prop_assert!(!verify(ContentId([1; 32]), size, start..end, &bytes, &proof));
        }

        #[test]
        fn an_altered_stored_form_is_refused(n in any::<prop::sample::Index>()) {
            let (_, manifest) = Manifest::of_bytes(&bytes_of(5 * GROUP_BYTES as usize));
            let mut stored = manifest.to_bytes();
            let n = n.index(stored.len() * 8);
            stored[n / 8] ^= 1 << (n % 8);
            prop_assert!(Manifest::from_bytes(&stored).is_err());
            prop_assert!(Manifest::from_bytes(&stored[..n / 8]).is_err());
        }
    }

    #[test]
    fn a_grown_file_has_the_id_of_how_it_began_and_its_own() {
        let group = GROUP_BYTES as usize;
        let never = &|| false;
        for size in [1, 1000, group, group + 1, 3 * group, 5 * group + 7, (9 << 20) + 3] {
            let bytes = bytes_of(size);
            let file = file_of(&bytes);
            let borders = [0, 1, 1024, 1025, READ_BYTES as usize, group, 2 * group, 4 * group];
            let around = borders.into_iter().flat_map(|at| [at.saturating_sub(1), at, at + 1]);
            for begun in around.chain([size / 2, size - 1, size]).filter(|at| *at <= size) {
                let grown = Manifest::of_grown_file(&file, size as u64, begun as u64, never);
                let (id, manifest) = grown.unwrap().unwrap();
                assert_eq!(id, ContentId::of(&bytes[..begun]), "{begun} of {size}");
                assert_eq!(manifest, Manifest::of_bytes(&bytes).1, "{begun} of {size}");
            }
            let longer = Manifest::of_grown_file(&file, size as u64 + 1, 1, never).unwrap();
            assert_eq!(longer, None);
        }
    }

    #[test]
    fn several_threads_give_the_same_tree_as_one() {
        let bytes = bytes_of(33 << 20);
        let never = AtomicBool::new(false);
        let of_file =
            Manifest::of_file(&file_of(&bytes), bytes.len() as u64, &never).unwrap().unwrap();
        assert_eq!(of_file, Manifest::of_bytes(&bytes));
        assert_eq!(of_file.0, ContentId::of(&bytes));
    }

    #[test]
    fn a_cancelled_or_shrunken_file_has_no_hash() {
        let bytes = bytes_of(3 << 20);
        let file = file_of(&bytes);
        let size = bytes.len() as u64;
        assert_eq!(Manifest::of_file(&file, size, &AtomicBool::new(true)).unwrap(), None);
        assert_eq!(Manifest::of_file(&file, size + 1, &AtomicBool::new(false)).unwrap(), None);
        let small = file_of(b"abc");
        assert_eq!(Manifest::of_file(&small, 4, &AtomicBool::new(false)).unwrap(), None);
    }

    #[test]
    fn the_tree_of_a_huge_file_stays_small() {
        assert_eq!(base_level(groups_of(8 << 30), MAX_LEAVES), 0);
        assert_eq!(base_level(groups_of((8 << 30) + 1), MAX_LEAVES), 1);
        assert_eq!(base_level(groups_of(1 << 40), MAX_LEAVES), 7);
        assert_eq!(base_level(0, MAX_LEAVES), 0);
    }
}
