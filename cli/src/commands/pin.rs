//! `sd pin`, `sd unpin`, `sd evict`: what of other devices' files is kept here.

use super::Context;
use super::waiting::Waiting;
use crate::args::{EvictArgs, PinArgs, UnpinArgs};
use crate::control::{Event, Request, Target};
use crate::daemon::room_words;
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Columns, printable, size};
use crate::paths;
use crate::reply::{Cleared, PinItem, PinsReply, Tally, UnpinReply};
use std::path::PathBuf;

pub fn pin(context: &Context, args: &PinArgs) -> Outcome<()> {
    let targets = || targets(&args.addresses);
    let reply: PinsReply = match args.addresses.is_empty() {
        true => context.call(&Request::Pins)?,
        false => context.call(&Request::Pin { targets: targets()? })?,
    };
    if let Some((message, hint)) =
        room_words(reply.over_limit_bytes, reply.over_disk_bytes, reply.limit_bytes)
    {
        context.out.warn(message);
        context.out.hint(hint);
    }
    if !args.wait {
        return context.out.report(&reply, |reply| table(&reply.pins));
    }
    let timeout_ms = args.timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    let reply = wait(context, &Request::PinWait { targets: targets()?, timeout_ms })?;
    context.out.report(&reply, |reply| table(&reply.pins))?;
    match reply.pins.iter().find(|pin| pin.state != "here") {
        None => Ok(()),
        Some(pin) => Err(incomplete(&reply, pin)),
    }
}

fn wait(context: &Context, request: &Request) -> Outcome<PinsReply> {
    let client = context.client()?;
    let mut shown = Waiting::begin(&context.out);
    client.call(request, |event| match event {
        Event::Pinning(pinning) => {
            shown.show(words(&pinning.tally), pinning.offline);
            Ok(None)
        }
        event => super::unexpected(event),
    })
}

pub fn unpin(context: &Context, args: &UnpinArgs) -> Outcome<()> {
    let targets = targets(&args.addresses)?;
    let reply: UnpinReply = context.call(&Request::Unpin { targets })?;
    context.out.report(&reply, |_| String::new())?;
    for address in &reply.unpinned {
        context.out.note(format_args!("{} is no longer kept", printable(address)));
    }
    Ok(())
}

pub fn evict(context: &Context, args: &EvictArgs) -> Outcome<()> {
    let evict = |dry_run| -> Outcome<Cleared> {
        context.call(&Request::Evict { targets: targets(&args.addresses)?, dry_run })
    };
    let plan = evict(true)?;
    let what = format!(
        "gives back {} of the cache; these files are fetched again when they are read",
        size(plan.freed_bytes)
    );
    context.out.confirm(&what, "Give that back?", args.yes)?;
    let reply = evict(false)?;
    context.out.report(&reply, |_| String::new())?;
    note_freed(context, &reply);
    Ok(())
}

/// What was given back, and what stays.
pub fn note_freed(context: &Context, cleared: &Cleared) {
    context.out.note(format_args!("gave back {}", size(cleared.freed_bytes)));
    if cleared.pinned_bytes > 0 {
        let pinned = size(cleared.pinned_bytes);
        context.out.note(format_args!("{pinned} stay because they are pinned: sd unpin"));
    }
    if cleared.open_bytes > 0 {
        let open = size(cleared.open_bytes);
        context.out.note(format_args!("{open} stay because programs have them open"));
    }
}

fn targets(addresses: &[PathBuf]) -> Outcome<Vec<Target>> {
    addresses.iter().map(|address| paths::target(Some(address))).collect()
}

/// How much is here, for people.
pub fn words(tally: &Tally) -> String {
    let Tally { files, bytes, here_files, here_bytes } = *tally;
    match here_files == files {
        true => format!("{}, {files} files, all here", size(bytes)),
        false => {
            format!("{} of {} here, {here_files} of {files} files", size(here_bytes), size(bytes))
        }
    }
}

fn table(pins: &[PinItem]) -> String {
    if pins.is_empty() {
        return String::new();
    }
    let mut table = Columns::new(&["address", "files", "size", "here", "state"]).right(&[1, 2, 3]);
    for pin in pins {
        let state = match &pin.reason {
            Some(reason) => format!("{}: {reason}", pin.state.replace('_', " ")),
            None => pin.state.clone(),
        };
        table.row([
            pin.address.clone(),
            pin.tally.files.to_string(),
            size(pin.tally.bytes),
            size(pin.tally.here_bytes),
            state,
        ]);
    }
    table.to_string()
}

fn incomplete(reply: &PinsReply, pin: &PinItem) -> Failure {
    let why = pin.reason.clone().unwrap_or_else(|| "it still comes".into());
    let message = format!("not all of {} is here: {why}", pin.address);
    let code = match pin.state.as_str() {
        "cache_full" | "disk_full" | "failed" => Code::Io,
        "gone" => Code::NotFound,
        _ => Code::Unreachable,
    };
    let room = room_words(reply.over_limit_bytes, reply.over_disk_bytes, reply.limit_bytes);
    Failure::new(code, message).hint(match (pin.state.as_str(), room) {
        ("cache_full" | "disk_full", Some((_, hint))) => hint,
        ("gone", _) => format!("to forget it: sd unpin '{}'", pin.address),
        _ => "it goes on by itself; `sd pin` shows how far it is".into(),
    })
}
