//! A failed command: what failed, on which object, why, and what to do next.
//!
//! The same value travels over the control socket, so that an error is worded
//! once, where it is known best.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;

/// What kind of failure it is; scripts may rely on it (`docs/JSON.md`).
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The command line is wrong.
    Usage,
    /// A name, address or path that does not exist.
    NotFound,
    /// A name or place that is taken.
    Exists,
    /// A value that cannot be used.
    Invalid,
    /// There is no library yet.
    NoLibrary,
    /// Not confirmed, or not allowed.
    Refused,
    /// Something uses it.
    Busy,
    /// A ticket that is no longer good.
    Expired,
    /// Another device cannot be reached.
    Unreachable,
    /// The daemon is not running, or did not answer.
    NoDaemon,
    /// Written, or spoken, by another version of this program.
    Version,
    /// The disk, or the operating system, failed.
    Io,
    /// A bug or an unexpected answer.
    Internal,
}

/// A failure, worded for a person.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Failure {
    pub code: Code,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Result of a command.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    /// Adds what to do next.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A failed call of the operating system.
    pub fn io(attempted: impl fmt::Display, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        let failure = Self::new(Code::Io, format!("{attempted}: {}", plain(&error)));
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                failure.hint("free some space on that disk, then try again")
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                failure.hint("make that file system writable, or choose another --data-dir")
            }
            io::ErrorKind::PermissionDenied => {
                failure.hint("run as the user that owns it, or choose another one")
            }
            _ => failure,
        }
    }

    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self.code {
            Code::Usage => 2,
            _ => 1,
        }
    }
}

/// The operating system's words without “(os error N)”.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// The candidate that was probably meant, if any is close.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let close = word.chars().count() / 3 + 1;
    candidates
        .into_iter()
        .map(|c| (distance(&word.to_lowercase(), &c.to_lowercase()), c))
        .filter(|(d, c)| *d <= close || c.to_lowercase().starts_with(&word.to_lowercase()))
        .min()
        .map(|(_, c)| c)
}

/// Levenshtein's distance, in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested_and_a_far_one_is_not() {
        let names = ["laptop", "nas", "desktop"];
        assert_eq!(nearest("lapotp", names), Some("laptop"));
        assert_eq!(nearest("desk", names), Some("desktop"));
        assert_eq!(nearest("zzzzzz", names), None);
    }
}
