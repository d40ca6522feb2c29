//! What was compared with other programs: as a table for the terminal and for `docs/bench`, where
//! the raw figures and a plot are kept beside it.

use crate::compare::{self, DRIVE};
use crate::peers::KINDS;
use crate::{ROUNDS, plot};
use anyhow::{Context, Result};
use e2e::{Device, proc};
use serde::{Deserialize, Serialize};
use std::fs;
use std::ops::Not;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// One line of the table.
#[derive(Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// By which it is asked for again.
    pub part: String,
    /// The link, in words.
    pub link: String,
    pub work: String,
    pub unit: String,
    /// When and where.
    pub measured: String,
    pub systems: Vec<Outcome>,
}

/// One cell of the table.
#[derive(Clone, Serialize, Deserialize)]
pub struct Outcome {
    pub system: String,
    pub runs: Vec<Figure>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_measured: Option<String>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Figure {
    pub value: f64,
    /// It was not waited for any longer.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub at_least: bool,
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self { value, at_least: false }
    }
}

impl Figure {
    /// With three significant digits.
    pub fn short(&self) -> String {
        let digits = match self.value {
            v if v >= 100.0 => 0,
            v if v >= 10.0 => 1,
            _ => 2,
        };
        format!("{}{:.digits$}", if self.at_least { "> " } else { "" }, self.value)
    }

    pub fn told(&self, unit: &str) -> String {
        format!("{} {unit}", self.short())
    }
}

impl Outcome {
    /// The median, where there is one.
    pub fn figure(&self) -> Option<Figure> {
        let mut runs = self.runs.clone();
        runs.sort_by(|a, b| a.value.total_cmp(&b.value));
        runs.get(runs.len() / 2).copied()
    }

    fn cell(&self) -> String {
        self.figure().map_or_else(|| "not measured".to_owned(), |figure| figure.short())
    }
}

impl Comparison {
    pub fn more_is_better(&self) -> bool {
        self.unit.ends_with("/s")
    }

    fn cells(&self, columns: &[String]) -> Vec<String> {
        let cell = |system: &String| {
            let outcome = self.systems.iter().find(|outcome| outcome.system == *system);
            outcome.map_or_else(String::new, Outcome::cell)
        };
        let mut cells = vec![self.work.clone(), self.link.clone(), self.unit.clone()];
        cells.extend(columns.iter().map(cell));
        cells
    }
}

/// The lines of a Markdown table that is also one in a terminal.
pub fn table(rows: &[Comparison]) -> String {
    let mut columns: Vec<String> = vec![];
    for outcome in rows.iter().flat_map(|row| &row.systems) {
        if !columns.contains(&outcome.system) {
            columns.push(outcome.system.clone());
        }
    }
    let mut lines = vec![["work", "link", "unit"].map(str::to_owned).to_vec()];
    lines[0].extend(columns.clone());
    lines.extend(rows.iter().map(|row| row.cells(&columns)));
    let width = |n: usize| lines.iter().map(|line| line[n].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let rule = widths.iter().enumerate().map(|(n, width)| match n {
        0..=2 => "-".repeat(*width),
        _ => format!("{}:", "-".repeat(width - 1)),
    });
    lines.insert(1, rule.collect());
    let padded = |line: &Vec<String>| {
        let cells = line.iter().zip(&widths).enumerate().map(|(n, (cell, width))| match n {
            0..=2 => format!(" {cell:<width$} |"),
            _ => format!(" {cell:>width$} |"),
        });
        format!("|{}\n", cells.collect::<String>())
    };
    lines.iter().map(padded).collect()
}

/// Each system that could not be measured somewhere, and why, once.
pub fn reasons(rows: &[Comparison]) -> Vec<String> {
    let mut reasons = vec![];
    for row in rows {
        for outcome in &row.systems {
            let Some(reason) = &outcome.not_measured else { continue };
            let line = format!("{}, {}: not measured: {reason}", outcome.system, row.part);
            if !reasons.contains(&line) {
                reasons.push(line);
            }
        }
    }
    reasons
}

/// What `docs/bench/peers.json` keeps.
#[derive(Serialize, Deserialize, Default)]
struct Kept {
    rows: Vec<Comparison>,
    /// How each system was run, in the words of the document.
    systems: Vec<String>,
}

impl Kept {
    fn replace(&mut self, new: &[Comparison]) {
        self.rows.retain(|row| new.iter().all(|other| other.part != row.part));
        self.rows.extend_from_slice(new);
        let parts = compare::parts();
        self.rows.sort_by_key(|row| parts.iter().position(|part| *part == row.part));
    }
}

/// Writes the figures, the table and the plot into a folder. Rows that were not measured this time
/// stay as they are there, each with its own date.
pub fn write(new: &[Comparison], folder: &Path) -> Result<()> {
    let raw = folder.join("peers.json");
    let mut kept: Kept = match fs::read(&raw) {
        Ok(json) => serde_json::from_slice(&json)
            .with_context(|| format!("{} is damaged; remove it", raw.display()))?,
        Err(_) => Kept::default(),
    };
    kept.replace(new);
    kept.systems = systems();
    fs::create_dir_all(folder)?;
    fs::write(&raw, serde_json::to_string_pretty(&kept)? + "\n")?;
    fs::write(folder.join("peers.md"), document(&kept))?;
    fs::write(folder.join("peers.svg"), plot::svg(&kept.rows))?;
    eprintln!("written: peers.md, peers.svg and peers.json in {}", folder.display());
    Ok(())
}

fn document(kept: &Kept) -> String {
    let mut measured: Vec<&str> = kept.rows.iter().map(|row| row.measured.as_str()).collect();
    measured.dedup();
    let reasons: String = reasons(&kept.rows).iter().map(|line| format!("- {line}\n")).collect();
    let systems: String = kept.systems.iter().map(|line| format!("- {line}\n")).collect();
    format!(
        "# Beside other programs\n\n\
        Written by `scripts/bench --quick peers --write`. Measured {}. Both devices share that \
        machine, in two network namespaces; with 20 ms between them the owner's files are in \
        memory, on the LAN on the disk that both share. Medians of {ROUNDS} runs, in turns, each \
        with a fresh mount, an empty cache and nothing in the kernel's. Look at the ratios, the \
        machine is noisy.\n\n\
        {}{reasons}\n\
        `>`: it was not waited for any longer. Reading and writing of many small files ends after \
        {} s; the figures are those of the files that were done by then. A close makes a file \
        durable on the drive; the \
        others do not promise that.\n\n\
        ![The same as bars](peers.svg)\n\n\
        {systems}\nEvery figure of every run is in [peers.json](peers.json).\n",
        measured.join("; "),
        table(&kept.rows),
        compare::STOP_AFTER.as_secs(),
    )
}

fn systems() -> Vec<String> {
    let drive = said(Command::new(Device::program()).arg("--version"));
    let mut lines = vec![format!("{DRIVE}: {drive}, with its defaults.")];
    lines.extend(KINDS.iter().map(|kind| {
        let version = kind.version().unwrap_or_else(|reason| format!("{reason:#}"));
        format!("{}: {}; {version}.", kind.name, kind.what)
    }));
    lines
}

/// The day and the machine, in words.
pub fn today_and_here() -> String {
    let date = said(Command::new("date").arg("+%-d %B %Y").env("LC_ALL", "C"));
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let machine = match cpuinfo.contains(" hypervisor") {
        true => "a virtual machine",
        false => "a machine",
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let model = after(&cpuinfo, "model name").unwrap_or("unknown");
    let kib = read("/proc/meminfo");
    let kib = after(&kib, "MemTotal").and_then(|kib| kib.split(' ').next()?.parse::<f64>().ok());
    let gib = kib.unwrap_or(0.0) / f64::from(1 << 20);
    let release = read("/etc/os-release");
    let system = after(&release, "PRETTY_NAME").unwrap_or("Linux").trim_matches('"');
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel: Vec<&str> = kernel.split('.').take(2).collect();
    format!(
        "on {date}, on {machine} with {processors} processors ({model}), {gib:.0} GiB of memory, \
        {system}, kernel {}",
        kernel.join(".")
    )
}

/// The value of a field in a file of `field: value` or `field=value`.
fn after<'a>(text: &'a str, field: &str) -> Option<&'a str> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(rest.trim_start_matches([' ', '\t', ':', '=']).trim_end())
}

fn said(command: &mut Command) -> String {
    proc::run(command, Duration::from_secs(10)).text().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Comparison {
        let outcome = |system: &str, runs: &[f64]| Outcome {
            system: system.to_owned(),
            runs: runs.iter().map(|run| Figure::from(*run)).collect(),
            not_measured: runs.is_empty().then(|| "no <program> here".to_owned()),
        };
        Comparison {
            part: "peers-lan-read".to_owned(),
            link: "LAN".to_owned(),
            work: "read".to_owned(),
            unit: "MiB/s".to_owned(),
            measured: "today".to_owned(),
            systems: vec![outcome(DRIVE, &[30.0, 1000.0, 20.0]), outcome("other", &[])],
        }
    }

    #[test]
    fn a_cell_is_the_median_and_what_is_missing_is_said() {
        let table = table(&[row()]);
        assert!(table.ends_with("| read | LAN  | MiB/s |      30.0 | not measured |\n"), "{table}");
        assert_eq!(
            reasons(&[row(), row()]),
            ["other, peers-lan-read: not measured: no <program> here"]
        );
    }

    #[test]
    fn a_median_that_was_not_waited_for_says_so() {
        let mut row = row();
        row.systems[0].runs[0].at_least = true;
        assert_eq!(row.systems[0].cell(), "> 30.0");
    }

    #[test]
    fn what_is_measured_again_replaces_its_own_rows_alone() {
        let (far, mut again) = (Comparison { part: "peers-far-read".to_owned(), ..row() }, row());
        let mut kept = Kept { rows: vec![far, row()], systems: vec![] };
        again.systems[0].runs.clear();
        kept.replace(&[again]);
        let runs: Vec<_> =
            kept.rows.iter().map(|row| (row.part.as_str(), row.systems[0].runs.len())).collect();
        assert_eq!(runs, [("peers-lan-read", 0), ("peers-far-read", 3)]);
    }

    #[test]
    fn the_fastest_has_the_longest_bar() {
        let mut row = row();
        row.unit = "ms".to_owned();
        row.systems[1].runs = vec![15.0.into()];
        let picture = plot::svg(&[row]);
        let lengths = picture.lines().filter_map(|line| line.split("' height='13'").next());
        let lengths: Vec<&str> = lengths
            .filter_map(|line| line.split("width='").nth(1))
            .filter(|w| w.contains('.'))
            .collect();
        assert_eq!(lengths, ["115.0", "230.0"]);
    }
}
