//! The map of a part: which groups of it are here, as a file.

use crate::content::manifest::{GROUP_BYTES, groups_of};
use crate::content::ranges::RangeSet;

const MAP_MAGIC: &[u8; 8] = b"sd-map\0\x01";
const MAP_HEADER_BYTES: usize = 8 + 8 + 8;

/// Magic with version, size of the file, group size, the ranges, BLAKE3 of all that.
pub(super) fn encode_map(size: u64, present: &RangeSet) -> Vec<u8> {
    let mut map = Vec::with_capacity(MAP_HEADER_BYTES + present.iter().len() * 16 + 32);
    map.extend_from_slice(MAP_MAGIC);
    map.extend_from_slice(&size.to_le_bytes());
    map.extend_from_slice(&GROUP_BYTES.to_le_bytes());
    for range in present.iter() {
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&range.end.to_le_bytes());
    }
    let check = blake3::hash(&map);
    map.extend_from_slice(check.as_bytes());
    map
}

pub(super) fn decode_map(map: &[u8], size: u64) -> Option<RangeSet> {
    let (map, check) = map.split_last_chunk::<32>()?;
    if blake3::hash(map) != *check {
        return None;
    }
    let (header, ranges) = map.split_at_checked(MAP_HEADER_BYTES)?;
    let (ranges, rest) = ranges.as_chunks::<8>();
    let expected = encode_map(size, &RangeSet::default());
    if header != &expected[..MAP_HEADER_BYTES] || !rest.is_empty() {
        return None;
    }
    let (pairs, rest) = ranges.as_chunks::<2>();
    let mut present = RangeSet::default();
    for [start, end] in pairs {
        let range = u64::from_le_bytes(*start)..u64::from_le_bytes(*end);
        if range.is_empty() || range.end > groups_of(size) || range.start < present.end() {
            return None;
        }
        present.insert(range);
    }
    rest.is_empty().then_some(present)
}

/// How long the part must be at least for what its map says; `None`: it is no map.
pub(super) fn bytes_in_map(map: &[u8]) -> Option<u64> {
    let size = map.get(MAP_MAGIC.len()..MAP_MAGIC.len() + 8)?.try_into().ok()?;
    let size = u64::from_le_bytes(size);
    let groups = decode_map(map, size)?.end();
    Some(groups.saturating_mul(GROUP_BYTES).min(size))
}
