//! `sd pending`: which writes wait for which device, and why; their export.

use super::Context;
use crate::args::{PendingArgs, PendingCommand};
use crate::control::{Event, Request, WirePath};
use crate::failure::Outcome;
use crate::output::{Columns, Output, ago, printable, size};
use crate::paths;
use crate::reply::{ExportReply, PendingCount, PendingReply, PendingWrite};
use std::path::Path;

pub fn run(context: &Context, args: PendingArgs) -> Outcome<()> {
    match args.command {
        None => list(context),
        Some(PendingCommand::Export { of, dir, forget, yes }) => {
            export(context, &of, &dir, forget, yes)
        }
    }
}

fn list(context: &Context) -> Outcome<()> {
    let mut pending = Vec::new();
    let reply: PendingReply = context.client()?.call(&Request::Pending, |event| match event {
        Event::Pending(page) => {
            pending.extend(page);
            Ok(None)
        }
        event => super::unexpected(event),
    })?;
    let reply = PendingReply { pending, ..reply };
    context.out.report(&reply, |reply| match reply.pending.is_empty() {
        true => String::new(),
        false => table(&reply.pending),
    })?;
    match reply.pending.is_empty() {
        true => context.out.note("nothing waits"),
        false => context.out.note(count_words(reply.count)),
    }
    Ok(())
}

/// Writes as a table, here and where a sync ends without them.
pub fn table(pending: &[PendingWrite]) -> String {
    let head = ["id", "for", "what", "path", "size", "since", "sent", "state", "why"];
    let mut table = Columns::new(&head).right(&[0, 4, 6]);
    for write in pending {
        table.row([
            write.id.to_string(),
            write.owner.name.clone(),
            write.what.clone(),
            format!("{}/{}", write.location, write.path),
            size(write.bytes),
            ago(&write.since),
            write.attempts.to_string(),
            write.state.clone(),
            write.reason.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

pub fn count_words(count: PendingCount) -> String {
    match count.operations {
        1 => format!("1 change waits, {}", size(count.bytes)),
        several => format!("{several} changes wait, {}", size(count.bytes)),
    }
}

/// Said when something ends while changes wait, so that nobody takes them for delivered or lost.
pub fn tell_what_waits(out: Output, count: PendingCount, until: &str) {
    if count.operations > 0 {
        out.note(format_args!("{} for other devices; {until}", count_words(count)));
        out.hint("`sd pending` lists them, `sd sync` waits for them");
    }
}

fn export(context: &Context, of: &str, dir: &Path, forget: bool, yes: bool) -> Outcome<()> {
    let to = paths::spelled(dir)?;
    let request = |dry_run| Request::PendingExport {
        of: of.to_owned(),
        to: WirePath::from(&*to),
        forget,
        dry_run,
    };
    if forget {
        let plan: ExportReply = context.call(&request(true))?;
        let what = format!(
            "writes {} changes ({}) into {} as files, then gives up {} of them that no owner will \
             take; no device gets those any more",
            plan.count.operations,
            size(plan.count.bytes),
            printable(&plan.dir),
            plan.forgotten
        );
        context.out.confirm(&what, "Give them up?", yes)?;
    }
    let reply: ExportReply = context.call(&request(false))?;
    context.out.report(&reply, |reply| {
        reply.files.iter().map(|file| format!("{}\n", printable(&file.path))).collect()
    })?;
    for file in reply.files.iter().filter(|file| file.missing_bytes > 0) {
        context.out.warn(format_args!(
            "{}: {} that were not written here cannot be had now, and are zero in it",
            printable(&file.path),
            size(file.missing_bytes)
        ));
    }
    context.out.note(format_args!(
        "{} files are in {}; pending.json there lists every change",
        reply.files.len(),
        printable(&reply.dir)
    ));
    match reply.forgotten {
        0 => context.out.note("they still wait: nothing was given up"),
        given_up => context.out.note(format_args!("{given_up} changes were given up")),
    }
    Ok(())
}
