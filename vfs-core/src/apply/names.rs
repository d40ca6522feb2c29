//! Names of conflict copies, and of what is hidden for a moment.

use crate::model::{NAME_MAX, Name, Time};
use std::hash::{BuildHasher, Hasher, RandomState};

/// The longest ending that is kept as one, with its dots.
const ENDING_MAX: usize = 24;
/// The longest part of a device's name in a file name, in bytes.
const DEVICE_MAX: usize = 64;

/// The `nth` name for a copy of `name` beside it, from 1:
/// `name (conflicted copy from DEVICE 2026-11-21 14.03.22).ext`.
pub(super) fn conflict_name(name: &Name, device: &str, at: Time, nth: u32) -> Name {
    let bytes = name.as_bytes();
    let (stem, ending) = bytes.split_at(ending_start(bytes));
    let device: String = device.chars().filter(|c| !matches!(c, '/' | '\0')).collect();
    let device = cut(device.as_bytes(), DEVICE_MAX);
    let number = if nth > 1 { format!(" {nth}") } else { String::new() };
    let when = local_time(at);
    let mark =
        [b" (conflicted copy from ", device, format!(" {when}{number})").as_bytes()].concat();
    let stem = cut(stem, NAME_MAX - mark.len() - ending.len());
    Name::new([stem, &mark, ending].concat()).expect("made of names, and short enough")
}

/// Where the ending begins: `.ext`, or `.tar.gz` and its like. A name that begins with its only
/// dot has none.
fn ending_start(name: &[u8]) -> usize {
    let dot = |upto: usize| name[..upto].iter().rposition(|b| *b == b'.').filter(|at| *at > 0);
    let is_ending = |part: &[u8]| part.len() > 1 && part[1..].iter().all(u8::is_ascii_alphanumeric);
    let Some(last) = dot(name.len()).filter(|at| is_ending(&name[*at..])) else {
        return name.len();
    };
    let start = match dot(last) {
        Some(before) if name[before..last].eq_ignore_ascii_case(b".tar") => before,
        _ => last,
    };
    if name.len() - start <= ENDING_MAX { start } else { name.len() }
}

/// At most `max` bytes of the front; of a text no part of a character.
fn cut(bytes: &[u8], max: usize) -> &[u8] {
    if bytes.len() <= max {
        return bytes;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => &bytes[..text.floor_char_boundary(max)],
        Err(_) => &bytes[..max],
    }
}

/// By the owner's clock and time zone: people look for it by when they worked.
fn local_time(at: Time) -> String {
    let nanos = i32::try_from(at.nanos).unwrap_or(0);
    let timestamp = jiff::Timestamp::new(at.secs, nanos).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    timestamp.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H.%M.%S").to_string()
}

/// A name that nobody has: for an entry that is hidden, and gone in a moment.
pub(super) fn hidden_name() -> Name {
    // The keys of a `RandomState` come from the system's randomness, with a count.
    let random = || RandomState::new().build_hasher().finish();
    let name = format!(".spacedrive-{:016x}{:016x}.tmp", random(), random());
    Name::new(name.into_bytes()).expect("hexadecimal digits are a name")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &[u8]) -> Name {
        Name::new(text).unwrap()
    }

    fn conflicted(text: &str) -> String {
        let noon = Time { secs: 1_795_269_802, nanos: 5 };
        let made = conflict_name(&name(text.as_bytes()), "laptop", noon, 1);
        let when = local_time(noon);
        made.display().replace(&when, "WHEN")
    }

    #[test]
    fn the_ending_stays_at_the_end() {
        assert_eq!(conflicted("a.txt"), "a (conflicted copy from laptop WHEN).txt");
        assert_eq!(conflicted("a.b.txt"), "a.b (conflicted copy from laptop WHEN).txt");
        assert_eq!(conflicted("a.tar.gz"), "a (conflicted copy from laptop WHEN).tar.gz");
        assert_eq!(conflicted(".bashrc"), ".bashrc (conflicted copy from laptop WHEN)");
        assert_eq!(conflicted(".tar.gz"), ".tar (conflicted copy from laptop WHEN).gz");
        assert_eq!(conflicted("Makefile"), "Makefile (conflicted copy from laptop WHEN)");
        assert_eq!(conflicted("end."), "end. (conflicted copy from laptop WHEN)");
        let sentence = "Mr. Smith goes";
        assert_eq!(conflicted(sentence), format!("{sentence} (conflicted copy from laptop WHEN)"));
    }

    #[test]
    fn the_time_is_written_as_people_write_it() {
        let when = local_time(Time { secs: 1_795_269_802, nanos: 0 });
        let digits =
            |range: std::ops::Range<usize>| when[range].bytes().all(|b| b.is_ascii_digit());
        assert!(digits(0..4) && digits(5..7) && digits(8..10) && digits(11..13), "{when}");
        assert_eq!((when.len(), &when[13..14], &when[16..17]), (19, ".", "."));
        assert_eq!(local_time(Time { secs: i64::MAX, nanos: 0 }).len(), 19, "out of range");
    }

    #[test]
    fn a_copy_has_a_name_of_at_most_255_bytes_and_whole_characters() {
        let at = Time::default();
        for unit in ["x", "é", "日", "🙂"] {
            for ending in ["", ".jpeg", ".tar.zst"] {
                let stem = unit.repeat((NAME_MAX - ending.len()) / unit.len());
                let long = name(format!("{stem}{ending}").as_bytes());
                let made = conflict_name(&long, &"d".repeat(300), at, 4_000_000_000);
                let text = std::str::from_utf8(made.as_bytes()).expect("whole characters");
                assert!(made.as_bytes().len() > NAME_MAX - 4, "{}", text.len());
                assert!(text.ends_with(ending) && text.starts_with(unit), "{text}");
            }
        }
        let bytes = conflict_name(&name(&[0xff; 255]), "d", at, 1);
        assert_eq!(bytes.as_bytes().len(), NAME_MAX);
    }

    #[test]
    fn copies_are_numbered_and_a_devices_name_cannot_lead_elsewhere() {
        let made = conflict_name(&name(b"a.txt"), "../..//x", Time::default(), 2);
        assert!(made.display().contains("copy from ....x "), "{made:?}");
        assert!(made.display().ends_with(" 2).txt"), "{made:?}");
        assert_ne!(hidden_name(), hidden_name());
    }
}
