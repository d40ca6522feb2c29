//! `sd device`: invite and join, list, rename, remove.

use super::Context;
use crate::args::DeviceCommand;
use crate::control::{Answer, Event, Request};
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Columns, Output, ago, printable};
use crate::reply::{DeviceReply, DeviceStatus, Invited, JoinReply, PathStatus, Status};
use std::io::IsTerminal;
use std::time::Duration;

pub fn run(context: &Context, command: DeviceCommand) -> Outcome<()> {
    match command {
        DeviceCommand::Invite { expires, detach } => invite(context, expires, detach),
        DeviceCommand::Join { ticket, device_name, yes } => join(context, ticket, device_name, yes),
        DeviceCommand::List => list(context),
        DeviceCommand::Rename { names } => rename(context, names),
        DeviceCommand::Remove { device, yes } => remove(context, device, yes),
    }
}

/// The ticket goes to stdout at once, alone; with `--json` the document comes at the end,
/// and the ticket of a waiting invitation is told on stderr.
fn invite(context: &Context, expires: Duration, detach: bool) -> Outcome<()> {
    let request = Request::Invite { expires_s: expires.as_secs().max(1), wait: !detach };
    let out = context.out;
    let reply: Invited = context.client()?.call(&request, |event| {
        match event {
            Event::Invitation { ticket, expires_at } => {
                match out.json {
                    true if !detach => out.note(&ticket),
                    true => {}
                    false => out.data(&ticket)?,
                }
                if !detach {
                    waiting(out, &expires_at);
                }
            }
            Event::Asked { code, device } => out.note(format_args!(
                "“{}” is joining, code {code}: compare it with the one shown there",
                printable(&device)
            )),
            event => return super::unexpected(event),
        }
        Ok(None)
    })?;
    if out.json {
        return out.json_line(&reply);
    }
    if let Some(joined) = &reply.joined {
        out.note(format_args!(
            "“{}” has joined, code {}",
            printable(&joined.device.name),
            joined.code
        ));
    }
    Ok(())
}

fn waiting(out: Output, expires_at: &str) {
    out.note(format_args!(
        "on the other device: sd device join TICKET; good once, until {}; Ctrl-C withdraws it",
        crate::output::local_time(expires_at)
    ));
}

fn join(context: &Context, ticket: String, device_name: Option<String>, yes: bool) -> Outcome<()> {
    let out = context.out;
    let asked_on_terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if !yes && !asked_on_terminal {
        return Err(Failure::new(Code::Refused, "not confirmed: this is not a terminal")
            .hint("add --yes to join without comparing the codes"));
    }
    let request = Request::Join { ticket: ticket.trim().to_owned(), device_name };
    let reply: JoinReply = context.client()?.call(&request, |event| match event {
        Event::Confirm { code, library, inviter } => {
            let what = format!(
                "joining the library “{}” of “{}”, code {code}",
                printable(&library),
                printable(&inviter)
            );
            let confirmed = out.confirm(&what, "Does the other device show the same code?", yes);
            confirmed.map(|()| Some(Answer { yes: true }))
        }
        event => super::unexpected(event),
    })?;
    out.report(&reply, |_| String::new())?;
    out.note(format_args!(
        "joined the library “{}”; this device is “{}”",
        printable(&reply.library),
        reply.device.name
    ));
    out.hint("`sd mount` mounts the drive");
    Ok(())
}

fn list(context: &Context) -> Outcome<()> {
    let status: Status = context.call(&Request::Status)?;
    super::status::require_library(&status)?;
    context
        .out
        .report(&serde_json::json!({ "devices": status.devices }), |_| table(&status.devices))
}

/// The members as a table, here and in `sd status`.
pub fn table(devices: &[DeviceStatus]) -> String {
    let mut table = Columns::new(&["device", "state", "path", "rtt", "last seen"]).right(&[3]);
    for device in devices {
        let state = match (device.this_device, device.online) {
            (true, _) => "this device",
            (_, true) => "online",
            _ => "offline",
        };
        let (path, rtt) = device.path.as_ref().map_or_else(Default::default, path_words);
        let last_seen = match (&device.last_seen, device.this_device || device.online) {
            (_, true) => "now".into(),
            (Some(time), _) => ago(time),
            (None, _) => "never".into(),
        };
        table.row([&device.name, state, &path, &rtt, &last_seen]);
    }
    table.to_string()
}

fn path_words(path: &PathStatus) -> (String, String) {
    let kind = if path.direct { "direct" } else { "relayed" };
    (format!("{kind} {}", path.address), format!("{:.1} ms", path.rtt_ms))
}

fn rename(context: &Context, names: Vec<String>) -> Outcome<()> {
    let mut names = names.into_iter().rev();
    let new = names.next().unwrap_or_default();
    let reply: DeviceReply = context.call(&Request::DeviceRename { old: names.next(), new })?;
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!("the device is now “{}”", reply.device.name));
    Ok(())
}

fn remove(context: &Context, device: String, yes: bool) -> Outcome<()> {
    let request = |dry_run| Request::DeviceRemove { device: device.clone(), dry_run };
    let plan: DeviceReply = context.call(&request(true))?;
    let name = printable(&plan.device.name).into_owned();
    let what = match plan.locations.as_slice() {
        [] => format!("removes “{name}” from the library; it gets nothing any more"),
        locations => format!(
            "removes “{name}” from the library, with its locations {}; \
             it gets nothing any more, and its files stay on it",
            locations.iter().map(|l| format!("“{}”", printable(l))).collect::<Vec<_>>().join(", ")
        ),
    };
    let what = match plan.pending.operations {
        0 => what,
        _ => format!(
            "{what}\n{} for it and will not be delivered: they stay on this device, and \
             `sd pending export '{name}' DIR` gives their bytes as files",
            super::pending::count_words(plan.pending)
        ),
    };
    context.out.confirm(&what, &format!("Remove “{name}”?"), yes)?;
    let reply: DeviceReply = context.call(&request(false))?;
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!("“{name}” is removed"));
    if reply.pending.operations > 0 {
        context.out.warn(format_args!("{} for it", super::pending::count_words(reply.pending)));
        context.out.hint(format_args!("keep their bytes: sd pending export '{name}' DIR"));
    }
    Ok(())
}
