//! Where everything is printed: data to stdout, the rest to stderr.
//!
//! Colour only where the stream is a terminal and `NO_COLOR` is not set
//! (`anstream` decides). Nothing outside this module writes to either stream.

use crate::failure::{Code, Failure, Outcome};
use anstream::ColorChoice;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;
use vfs_core::path::misleads;

const RED: &str = "\x1b[1;31m";
const YELLOW: &str = "\x1b[1;33m";
const BLUE: &str = "\x1b[1;34m";
const RESET: &str = "\x1b[0m";

/// How a command prints.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// A report: the document itself with `--json`, else what `text` makes of it.
    pub fn report<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Outcome<()> {
        match self.json {
            true => self.json_line(value),
            false => self.data(&text(value)),
        }
    }

    /// One JSON document on stdout: indented on a terminal, else on one line.
    pub fn json_line<T: Serialize>(&self, value: &T) -> Outcome<()> {
        let text = match io::stdout().is_terminal() {
            true => serde_json::to_string_pretty(value),
            false => serde_json::to_string(value),
        };
        self.data(&text.map_err(|e| Failure::new(Code::Internal, e.to_string()))?)
    }

    /// Text on stdout; a line end is added where it has none.
    pub fn data(&self, text: &str) -> Outcome<()> {
        if text.is_empty() {
            return Ok(());
        }
        let end = if text.ends_with('\n') { "" } else { "\n" };
        self.raw(format!("{text}{end}").as_bytes())
    }

    /// Bytes on stdout, as they are.
    pub fn raw(&self, bytes: &[u8]) -> Outcome<()> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(stdout_failed)
    }

    /// What is going on, for a person.
    pub fn note(&self, text: impl Display) {
        say(format_args!("{text}"));
    }

    /// What may be wrong, for a person.
    pub fn warn(&self, text: impl Display) {
        say(format_args!("{YELLOW}warning:{RESET} {text}"));
    }

    /// What to do next.
    pub fn hint(&self, text: impl Display) {
        say(format_args!("{BLUE}hint:{RESET} {text}"));
    }

    /// Asks before something that cannot be undone; `what` says what will happen.
    pub fn confirm(&self, what: &str, question: &str, yes: bool) -> Outcome<()> {
        self.note(what);
        if yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return Err(Failure::new(Code::Refused, "not confirmed: this is not a terminal")
                .hint("add --yes to do it without being asked"));
        }
        match ask(question)? {
            true => Ok(()),
            false => Err(Failure::new(Code::Refused, "not confirmed: nothing was changed")),
        }
    }

    /// A line that shows how far something is; silent where stderr is no terminal.
    pub fn spinner(&self) -> ProgressBar {
        let target = match plain() {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template"));
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }
}

/// Whether stderr is to stay free of control sequences.
fn plain() -> bool {
    !io::stderr().is_terminal()
        || matches!(anstream::AutoStream::choice(&io::stderr()), ColorChoice::Never)
}

fn say(text: std::fmt::Arguments<'_>) {
    // A closed stderr leaves nowhere to say so.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

fn ask(question: &str) -> Outcome<bool> {
    let mut err = anstream::stderr().lock();
    let _ = write!(err, "{question} [y/N] ").and_then(|()| err.flush());
    drop(err);
    let mut line = String::new();
    io::stdin().read_line(&mut line).map_err(|e| Failure::io("cannot read the answer", e))?;
    Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes"))
}

const STDOUT_CLOSED: &str = "stdout was closed";

fn stdout_failed(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(Code::Io, STDOUT_CLOSED),
        _ => Failure::io("cannot write to stdout", error),
    }
}

/// The failure itself, its hint, and with `--json` the same as a document on stderr.
pub fn failure(failure: &Failure, json: bool) {
    if failure.message == STDOUT_CLOSED {
        return;
    }
    if json {
        let document = serde_json::json!({ "error": failure });
        return say(format_args!("{document}"));
    }
    failure_lines(failure).iter().for_each(|line| say(format_args!("{line}")));
}

/// Both lines may quote names and reasons that come from other devices.
fn failure_lines(failure: &Failure) -> Vec<String> {
    let line = |label, text: &str| format!("{label}{RESET} {}", printable(text));
    let mut lines = vec![line(format!("{RED}error:"), &failure.message)];
    lines.extend(failure.hint.as_ref().map(|hint| line(format!("{BLUE}hint:"), hint)));
    lines
}

/// A table without borders, for people and for `awk`.
pub struct Columns(Table);

impl Columns {
    pub fn new(head: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(head.iter().map(|h| h.to_uppercase()));
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        Self(table)
    }

    /// Numbers in these columns stand at the right.
    pub fn right(mut self, columns: &[usize]) -> Self {
        for index in columns {
            if let Some(column) = self.0.column_mut(*index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        self
    }

    pub fn row<T: Display>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.0.add_row(cells.into_iter().map(|c| printable(&c.to_string()).into_owned()));
    }
}

impl Display for Columns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for line in self.0.lines() {
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Names from other devices must not steer this terminal, nor look like other names.
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.chars().any(misleads) {
        false => text.into(),
        true => text.chars().map(|c| if misleads(c) { '?' } else { c }).collect::<String>().into(),
    }
}

/// Bytes for people, in binary units.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1023.95 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A whole number of a unit that is not below this, as settings take it.
pub fn size_above(bytes: u64) -> String {
    match bytes {
        0..0x4000_0000 => format!("{}MiB", bytes.div_ceil(1 << 20)),
        _ => format!("{}GiB", bytes.div_ceil(1 << 30)),
    }
}

/// How long ago, for people; the text itself when it is not a time.
pub fn ago(rfc3339: &str) -> String {
    let Ok(then) = rfc3339.parse::<jiff::Timestamp>() else { return rfc3339.to_owned() };
    let seconds = jiff::Timestamp::now().as_second() - then.as_second();
    match seconds {
        ..5 => "now".into(),
        5..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Local time to the minute, for people.
pub fn local_time(rfc3339: &str) -> String {
    match rfc3339.parse::<jiff::Timestamp>() {
        Ok(time) => {
            time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M").to_string()
        }
        Err(_) => rfc3339.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_round_up_to_the_next_unit() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size((1 << 20) - 1), "1.0 MiB");
        assert_eq!(size(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn control_characters_are_not_printed() {
        assert_eq!(printable("a\x1b[2Jb\nc"), "a?[2Jb?c");
        assert_eq!(printable("a\u{202e}gpj.exe\u{200b}"), "a?gpj.exe?");
        assert!(matches!(printable("plain ä"), Cow::Borrowed(_)));
    }

    #[test]
    fn a_failure_that_quotes_another_device_does_not_steer_the_terminal() {
        let failure = Failure::new(Code::Io, "no “\x1b[2J\u{202e}”").hint("ask “\x07”");
        let lines = failure_lines(&failure);
        assert!(lines[0].ends_with(" no “?[2J?”"), "{lines:?}");
        assert!(lines[1].ends_with(" ask “?”"), "{lines:?}");
    }
}
