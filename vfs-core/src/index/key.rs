//! Keys: big-endian numbers and names, so that byte order is the order we scan in.
//!
//! A location number takes 2 bytes, a file id 5 (ids are below 2^40), a sequence
//! number 8. A name is always last, so it needs no length.

use crate::model::{ContentId, DeviceId, FileId, LocationId, LocationNo, Name, Seq};

const FILE_BYTES: usize = 5;
const LOCATION_BYTES: usize = 2;

/// The key of a location, and the prefix of all its keys in most tables.
pub(super) fn location(no: LocationNo) -> [u8; LOCATION_BYTES] {
    no.0.to_be_bytes()
}

fn file_bytes(file: FileId) -> [u8; FILE_BYTES] {
    let [_, _, _, id @ ..] = file.0.to_be_bytes();
    id
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(parts.iter().map(|p| p.len()).sum());
    for part in parts {
        key.extend_from_slice(part);
    }
    key
}

/// Entries, Tombstones: the row of a name; with an empty name, the prefix of a directory.
pub(super) fn entry(no: LocationNo, parent: FileId, name: &[u8]) -> Vec<u8> {
    join(&[&location(no), &file_bytes(parent), name])
}

/// Nodes: one name of a file.
pub(super) fn node(no: LocationNo, file: FileId, parent: FileId, name: &[u8]) -> Vec<u8> {
    join(&[&location(no), &file_bytes(file), &file_bytes(parent), name])
}

/// Orphans: a file; in Nodes, the prefix of its names.
pub(super) fn file(no: LocationNo, file: FileId) -> Vec<u8> {
    join(&[&location(no), &file_bytes(file)])
}

/// Log: a change.
pub(super) fn log(no: LocationNo, seq: Seq) -> Vec<u8> {
    join(&[&location(no), &seq.0.to_be_bytes()])
}

/// Disk: an inode of the owner's disk.
pub(super) fn disk(no: LocationNo, ino: u64) -> Vec<u8> {
    join(&[&location(no), &ino.to_be_bytes()])
}

const CONTENT_BYTES: usize = 32;

/// A key of Content.
pub(super) type ContentKey = [u8; CONTENT_BYTES + LOCATION_BYTES + FILE_BYTES];

/// Content: a file that has these bytes.
/// What the keys begin with of one location's files that have these bytes.
pub(super) fn content_in(content: ContentId, no: LocationNo) -> Vec<u8> {
    [&content.0[..], &location(no)].concat()
}

pub(super) fn content(content: ContentId, no: LocationNo, file: FileId) -> ContentKey {
    let mut key = [0; CONTENT_BYTES + LOCATION_BYTES + FILE_BYTES];
    let (id, rest) = key.split_at_mut(CONTENT_BYTES);
    id.copy_from_slice(&content.0);
    rest[..LOCATION_BYTES].copy_from_slice(&location(no));
    rest[LOCATION_BYTES..].copy_from_slice(&file_bytes(file));
    key
}

/// The content id and the file of a key of Content.
pub(super) fn split_content(key: &ContentKey) -> (ContentId, FileId) {
    let (content, file) = (key.first_chunk(), last_file(key));
    (ContentId(*content.expect("longer")), file.expect("longer"))
}

/// Unhashed: a file to hash; the latest change of bytes comes first.
pub(super) fn unhashed(no: LocationNo, mtime_secs: i64, file: FileId) -> Vec<u8> {
    // Flipping the sign bit makes signed numbers sort as unsigned ones; `!` reverses them.
    let newest_first = !(mtime_secs as u64 ^ (1 << 63));
    join(&[&location(no), &newest_first.to_be_bytes(), &file_bytes(file)])
}

/// Meta: the state of a location.
pub(super) fn state(no: LocationNo) -> Vec<u8> {
    join(&[b"state", &location(no)])
}

/// Meta: where a replica was last as its owner's whole log was.
pub(super) fn whole(no: LocationNo) -> Vec<u8> {
    join(&[b"whole", &location(no)])
}

/// Meta: up to where a replica has rows beyond its head.
pub(super) fn beyond(no: LocationNo) -> Vec<u8> {
    join(&[b"beyond", &location(no)])
}

/// Meta: from where on Content lacks the rows of a replica.
pub(super) fn unlisted(no: LocationNo) -> Vec<u8> {
    join(&[b"unlisted", &location(no)])
}

/// Meta: what the rows of a location add up to.
pub(super) fn sum(no: LocationNo) -> Vec<u8> {
    join(&[b"total", &location(no)])
}

/// Meta: what the owner signed of a replica's rows.
pub(super) fn statement(no: LocationNo) -> Vec<u8> {
    join(&[b"signed", &location(no)])
}

/// Meta: the place below which a location's log has no tombstones.
pub(super) fn floor(no: LocationNo) -> Vec<u8> {
    join(&[b"floor", &location(no)])
}

/// Meta: how far a member has come in an own location.
pub(super) fn seen(no: LocationNo, member: DeviceId) -> Vec<u8> {
    join(&[&seen_of(no), &member.0])
}

/// The prefix of [`seen`].
pub(super) fn seen_of(no: LocationNo) -> Vec<u8> {
    join(&[b"seen", &location(no)])
}

/// Meta: everything that is true of a replica's rows as they are, and goes with them.
pub(super) fn about_rows(no: LocationNo) -> [Vec<u8>; 6] {
    [whole(no), beyond(no), unlisted(no), sum(no), statement(no), floor(no)]
}

/// Meta: a location that its owner does not announce any more.
pub(super) fn withdrawn(id: LocationId) -> Vec<u8> {
    join(&[b"withdrawn", &id.0])
}

/// Meta: who may see another device's location, by the newest word of its owner.
pub(super) fn sharing(id: LocationId) -> Vec<u8> {
    join(&[b"sharing", &id.0])
}

/// Meta: how many numbers a device's locations were given.
pub(super) fn given(owner: DeviceId) -> Vec<u8> {
    join(&[b"given", &owner.0])
}

/// A parent and a name, as the end of a Nodes key and the value of a Log row have them.
pub(super) fn parent_and_name(parent: FileId, name: &[u8]) -> Vec<u8> {
    join(&[&file_bytes(parent), name])
}

/// Reads [`parent_and_name`].
pub(super) fn split_parent_and_name(bytes: &[u8]) -> Option<(FileId, Name)> {
    let (parent, name) = bytes.split_at_checked(FILE_BYTES)?;
    Some((split_file(parent)?, Name::new(name)?))
}

/// Reads a file id that is all there is.
pub(super) fn split_file(bytes: &[u8]) -> Option<FileId> {
    let id: [u8; FILE_BYTES] = bytes.try_into().ok()?;
    Some(FileId(id.iter().fold(0, |n, b| n << 8 | u64::from(*b))))
}

/// A file id as a value.
pub(super) fn file_value(file: FileId) -> [u8; FILE_BYTES] {
    file_bytes(file)
}

/// Reads the file id at the end of a key.
pub(super) fn last_file(key: &[u8]) -> Option<FileId> {
    split_file(key.get(key.len().checked_sub(FILE_BYTES)?..)?)
}

/// The name at the end of an Entries key.
pub(super) fn entry_name(key: &[u8]) -> Option<Name> {
    Name::new(key.get(LOCATION_BYTES + FILE_BYTES..)?)
}

/// The parent in an Entries key.
pub(super) fn entry_parent(key: &[u8]) -> Option<FileId> {
    split_file(key.get(LOCATION_BYTES..LOCATION_BYTES + FILE_BYTES)?)
}

/// The parent and name at the end of a Nodes key.
pub(super) fn node_name(key: &[u8]) -> Option<(FileId, Name)> {
    split_parent_and_name(key.get(LOCATION_BYTES + FILE_BYTES..)?)
}

/// The location at the front of a key.
pub(super) fn first_location(key: &[u8]) -> Option<LocationNo> {
    Some(LocationNo(u16::from_be_bytes(*key.first_chunk()?)))
}

/// The location in a Content key.
pub(super) fn content_location(key: &[u8]) -> Option<LocationNo> {
    first_location(key.get(CONTENT_BYTES..)?)
}

/// The sequence number of a Log key.
pub(super) fn log_seq(key: &[u8]) -> Option<Seq> {
    Some(Seq(u64::from_be_bytes(key.get(LOCATION_BYTES..)?.try_into().ok()?)))
}

/// The first key after every key that begins with these bytes; `None`: the table's end.
pub(crate) fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|b| *b != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_give_back_what_they_were_made_of() {
        let (no, parent, id) = (LocationNo(258), FileId(77), FileId(FileId::LIMIT - 1));
        let name = Name::new(&b"\xff\n"[..]).unwrap();
        assert_eq!(entry_name(&entry(no, parent, name.as_bytes())), Some(name.clone()));
        assert_eq!(entry_parent(&entry(no, parent, b"x")), Some(parent));
        assert_eq!(node_name(&node(no, id, parent, name.as_bytes())), Some((parent, name)));
        assert_eq!(last_file(&unhashed(no, -5, id)), Some(id));
        assert_eq!(log_seq(&log(no, Seq(u64::MAX))), Some(Seq(u64::MAX)));
        let held = content(ContentId([9; 32]), no, id);
        assert_eq!(content_location(&held), Some(no));
        assert_eq!(split_content(&held), (ContentId([9; 32]), id));
        assert_eq!(first_location(&file(no, id)), Some(no));
        assert_eq!(split_parent_and_name(b"abcd"), None);
    }

    #[test]
    fn the_newest_file_is_hashed_first() {
        let times = [i64::MAX, 5, 0, -1, i64::MIN];
        let keys = times.map(|t| unhashed(LocationNo(1), t, FileId(1)));
        assert!(keys.is_sorted());
    }

    #[test]
    fn the_end_of_a_prefix_is_after_all_its_keys() {
        assert_eq!(after_prefix(&[1, 255, 255]), Some(vec![2]));
        assert_eq!(after_prefix(&[255, 255]), None);
        assert_eq!(after_prefix(&[1, 2]), Some(vec![1, 3]));
    }
}
