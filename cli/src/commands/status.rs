//! `sd status`: everything at a glance.

use super::{Context, device, location, pin};
use crate::args::StatusArgs;
use crate::control::Request;
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Columns, ago, printable, size};
use crate::reply::{PinnedStatus, Status};
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(1);

pub fn run(context: &Context, args: &StatusArgs) -> Outcome<()> {
    loop {
        let status: Status = context.call(&Request::Status)?;
        match context.out.json {
            // One document a line while watching.
            true if args.watch => {
                let line = serde_json::to_string(&status)
                    .map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
                context.out.data(&line)?;
            }
            true => context.out.json_line(&status)?,
            false => {
                if args.watch && std::io::stdout().is_terminal() {
                    context.out.raw(b"\x1b[H\x1b[2J")?;
                }
                context.out.data(&text(&status))?;
            }
        }
        if !args.watch {
            return Ok(());
        }
        std::thread::sleep(EVERY);
    }
}

/// For lists that are empty without a library.
pub fn require_library(status: &Status) -> Outcome<()> {
    match status.library {
        Some(_) => Ok(()),
        None => Err(match status.problems.iter().find(|p| p.code == "removed") {
            Some(removed) => Failure::new(Code::NoLibrary, &removed.message).hint(&removed.hint),
            None => no_library(),
        }),
    }
}

/// The failure of whatever needs a library before there is one.
pub fn no_library() -> Failure {
    Failure::new(Code::NoLibrary, "this device is in no library yet")
        .hint("`sd library create NAME` makes one; `sd device join TICKET` joins another device's")
}

fn text(status: &Status) -> String {
    let mut text = String::new();
    match (&status.library, &status.device) {
        (Some(library), Some(device)) => {
            let _ = writeln!(text, "{} on {}\n", printable(&library.name), printable(&device.name));
        }
        _ if require_library(status).is_err_and(|f| f.message != no_library().message) => {}
        _ => text += "in no library yet: `sd library create NAME` or `sd device join TICKET`\n\n",
    }
    if !status.devices.is_empty() {
        let _ = writeln!(text, "{}", device::table(&status.devices));
    }
    if !status.locations.is_empty() {
        let _ = writeln!(text, "{}", location::table(&status.locations));
    }
    text += &mounts(status);
    text += &figures(status);
    text += &writes(status);
    text += &hydration(status);
    for problem in &status.problems {
        let _ = writeln!(
            text,
            "\nproblem: {}\n   hint: {}",
            printable(&problem.message),
            printable(&problem.hint)
        );
    }
    text
}

fn mounts(status: &Status) -> String {
    if status.mounts.is_empty() {
        return "not mounted\n\n".into();
    }
    let mut table = Columns::new(&["mounted on", "state", "passthrough", "events"]);
    for mount in &status.mounts {
        let state = match (mount.alive, mount.read_only) {
            (false, _) => "dead",
            (_, true) => "read-only",
            _ => "ready",
        };
        table.row([&mount.mountpoint, state, &mount.passthrough, &mount.events]);
    }
    format!("{table}\n")
}

fn writes(status: &Status) -> String {
    let waits = match status.pending.count.operations {
        0 => "nothing".into(),
        _ => {
            let devices = status.pending.devices.iter().map(|d| printable(&d.device).into_owned());
            let oldest = status.pending.since.as_deref().map(ago).unwrap_or_default();
            let devices = devices.collect::<Vec<_>>().join(", ");
            let count = status.pending.count;
            format!(
                "{} changes, {}, for {devices}, the oldest {oldest}",
                count.operations,
                size(count.bytes)
            )
        }
    };
    let mut text = format!("pending  {waits}\n");
    if status.conflicts > 0 {
        let _ = writeln!(text, "conflicts {}: `sd conflicts` lists them", status.conflicts);
    }
    text
}

/// Who wonders why a photo has no thumbnail looks here.
fn hydration(status: &Status) -> String {
    let mut text = String::new();
    for one in &status.hydration {
        let (refused, exact) = match (one.refused, one.exact) {
            (0, exact) => (String::new(), format!("{exact} opens got only what was read")),
            (refused, 0) => (format!("{refused} opens of files were refused"), String::new()),
            (refused, exact) => (
                format!("{refused} opens were refused, "),
                format!("{exact} got only what was read"),
            ),
        };
        let _ = writeln!(
            text,
            "{}: {refused}{exact}, last {}; `hydrate.{}` in the configuration sets it",
            printable(&one.program),
            ago(&one.last_at),
            one.purpose
        );
    }
    text
}

fn pinned(pinned: &PinnedStatus) -> String {
    match pinned.pins {
        0 => String::new(),
        _ => format!("pinned   {}\n", pin::words(&pinned.tally)),
    }
}

fn figures(status: &Status) -> String {
    format!(
        "cache    {} of {}\n{}network  {} received, {} sent since the start\nmemory   {}, index {} on disk\n",
        size(status.cache.bytes),
        size(status.cache.limit_bytes),
        pinned(&status.pinned),
        size(status.network.bytes_in),
        size(status.network.bytes_out),
        size(status.memory.rss_bytes),
        size(status.index.bytes),
    )
}
