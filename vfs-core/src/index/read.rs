//! Typed reads, the same for a view and for a transaction in the making.

use super::IndexError;
use super::key;
use super::row::{Orphan, Row, decode};
use super::store::{Snapshot, StoreError, Table};
use crate::model::{FileId, LocationNo, Name, Seq};
use std::ops::ControlFlow;

/// The row of a name.
pub(super) fn row(
    from: &dyn Snapshot,
    no: LocationNo,
    parent: FileId,
    name: &[u8],
) -> Result<Option<Row>, IndexError> {
    let value = from.get(Table::Entries, &key::entry(no, parent, name))?;
    value.map(|v| decode(&v, "an entry")).transpose()
}

/// At most `limit` names of a file.
pub(super) fn names(
    from: &dyn Snapshot,
    no: LocationNo,
    file: FileId,
    limit: usize,
) -> Result<Vec<(FileId, Name)>, IndexError> {
    let mut found = Vec::new();
    scan_prefix(from, Table::Nodes, &key::file(no, file), &mut |key, _| {
        found.push(key::node_name(key).ok_or(IndexError::DamagedRow("a name of a file"))?);
        Ok(if found.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(found)
}

/// Whether a file has a name.
pub(super) fn has_name(
    from: &dyn Snapshot,
    no: LocationNo,
    file: FileId,
) -> Result<bool, IndexError> {
    Ok(!names(from, no, file, 1)?.is_empty())
}

/// The file that had this inode of the owner's disk when last seen.
pub(super) fn file_on_disk(
    from: &dyn Snapshot,
    no: LocationNo,
    ino: u64,
) -> Result<Option<FileId>, IndexError> {
    let Some(value) = from.get(Table::Disk, &key::disk(no, ino))? else { return Ok(None) };
    key::split_file(&value).map(Some).ok_or(IndexError::DamagedRow("an inode"))
}

/// A number that is noted in Meta; 0, if none is.
pub(super) fn noted(from: &dyn Snapshot, key: &[u8]) -> Result<Seq, IndexError> {
    let Some(value) = from.get(Table::Meta, key)? else { return Ok(Seq(0)) };
    let value = value.try_into().map_err(|_| IndexError::DamagedRow("a number"))?;
    Ok(Seq(u64::from_be_bytes(value)))
}

/// What is known of a file without a name.
pub(super) fn orphan(
    from: &dyn Snapshot,
    no: LocationNo,
    file: FileId,
) -> Result<Option<Orphan>, IndexError> {
    let value = from.get(Table::Orphans, &key::file(no, file))?;
    value.map(|v| decode(&v, "an orphan")).transpose()
}

/// Sees a key and its value, and says whether to go on.
type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, IndexError>;

/// Visits the keys that begin with `prefix`, until `visit` breaks or fails.
pub(super) fn scan_prefix(
    from: &dyn Snapshot,
    table: Table,
    prefix: &[u8],
    visit: Visit<'_>,
) -> Result<(), IndexError> {
    scan_range(from, table, prefix, key::after_prefix(prefix).as_deref(), visit)
}

/// Visits the keys of a range, until `visit` breaks or fails.
pub(super) fn scan_range(
    from: &dyn Snapshot,
    table: Table,
    start: &[u8],
    end: Option<&[u8]>,
    visit: Visit<'_>,
) -> Result<(), IndexError> {
    let mut outcome = Ok(());
    let scanned: Result<(), StoreError> =
        from.scan(table, start, end, &mut |key, value| match visit(key, value) {
            Ok(flow) => flow,
            Err(error) => {
                outcome = Err(error);
                ControlFlow::Break(())
            }
        });
    scanned?;
    outcome
}

/// Sees a change: its place in the log, the directory and the name.
type VisitChange<'a> = &'a mut dyn FnMut(Seq, FileId, Name) -> Result<ControlFlow<()>, IndexError>;

/// Visits the log after a place, up to another.
pub(super) fn log_range(
    from: &dyn Snapshot,
    no: LocationNo,
    after: Seq,
    upto: Seq,
    visit: VisitChange<'_>,
) -> Result<(), IndexError> {
    let Some(first) = after.0.checked_add(1) else { return Ok(()) };
    let end = match upto.0.checked_add(1) {
        Some(end) => Some(key::log(no, Seq(end))),
        None => key::after_prefix(&key::location(no)),
    };
    scan_range(from, Table::Log, &key::log(no, Seq(first)), end.as_deref(), &mut |k, value| {
        let seq = key::log_seq(k).ok_or(IndexError::DamagedRow("a change"))?;
        let place = key::split_parent_and_name(value);
        let (parent, name) = place.ok_or(IndexError::DamagedRow("a change"))?;
        visit(seq, parent, name)
    })
}

/// At most `limit` changes after a place, up to another.
pub(super) fn log_places(
    from: &dyn Snapshot,
    no: LocationNo,
    after: Seq,
    upto: Seq,
    limit: usize,
) -> Result<Vec<(Seq, FileId, Name)>, IndexError> {
    let mut found = Vec::new();
    log_range(from, no, after, upto, &mut |seq, parent, name| {
        found.push((seq, parent, name));
        Ok(if found.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(found)
}

/// At most `limit` keys that begin with `prefix`.
pub(super) fn keys(
    from: &dyn Snapshot,
    table: Table,
    prefix: &[u8],
    limit: usize,
) -> Result<Vec<Vec<u8>>, IndexError> {
    let mut found = Vec::new();
    if limit == 0 {
        return Ok(found);
    }
    scan_prefix(from, table, prefix, &mut |key, _| {
        found.push(key.to_vec());
        Ok(if found.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    Ok(found)
}
