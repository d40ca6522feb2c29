//! `sd location`: add, list, remove and rescan folders of this device.

use super::Context;
use crate::args::LocationCommand;
use crate::control::{Event, NewLocation, Request, WirePath};
use crate::failure::Outcome;
use crate::output::{Columns, printable, size};
use crate::paths;
use crate::reply::{LocationReply, LocationStatus, Status};

pub fn run(context: &Context, command: LocationCommand) -> Outcome<()> {
    match command {
        LocationCommand::Add { path, name, read_only, share_with, wait } => {
            let path = WirePath::from(&*paths::folder(&path)?);
            add(context, NewLocation { path, name, read_only, share_with, wait })
        }
        LocationCommand::List => list(context),
        LocationCommand::Remove { name, yes } => remove(context, &name, yes),
        LocationCommand::Rescan { name, wait } => rescan(context, name, wait),
    }
}

fn add(context: &Context, location: NewLocation) -> Outcome<()> {
    let waited = location.wait;
    let reply = with_progress(context, &Request::LocationAdd(location))?;
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!("{} is now {}", printable(&reply.path), reply.address));
    told(context, &reply, waited);
    Ok(())
}

fn rescan(context: &Context, name: String, wait: bool) -> Outcome<()> {
    let reply = with_progress(context, &Request::LocationRescan { name, wait })?;
    context.out.report(&reply, |_| String::new())?;
    told(context, &reply, wait);
    Ok(())
}

fn told(context: &Context, reply: &LocationReply, waited: bool) {
    match waited {
        true => context.out.note(format_args!(
            "{} entries, {} files, {}",
            reply.entries,
            reply.files,
            size(reply.bytes)
        )),
        false => context.out.note("scanning in the background; `sd status` shows how far it is"),
    }
}

fn with_progress(context: &Context, request: &Request) -> Outcome<LocationReply> {
    let client = context.client()?;
    let bar = context.out.spinner();
    let reply = client.call(request, |event| match event {
        Event::Progress(progress) => {
            bar.set_message(format!(
                "{}: {} entries, {} directories to go",
                progress.what, progress.entries, progress.directories_waiting
            ));
            Ok(None)
        }
        event => super::unexpected(event),
    });
    bar.finish_and_clear();
    reply
}

fn list(context: &Context) -> Outcome<()> {
    let status: Status = context.call(&Request::Status)?;
    super::status::require_library(&status)?;
    let document = serde_json::json!({ "locations": status.locations });
    context.out.report(&document, |_| table(&status.locations))
}

/// The locations as a table, here and in `sd status`.
pub fn table(locations: &[LocationStatus]) -> String {
    let head = ["location", "entries", "size", "hashed", "state", "folder"];
    let mut table = Columns::new(&head).right(&[1, 2, 3]);
    for location in locations {
        let hashed = match location.files {
            0 => "-".into(),
            files => format!("{}%", location.hashed_files.min(files) * 100 / files),
        };
        table.row([
            format!("{}/{}", location.device, location.name),
            location.entries.to_string(),
            size(location.bytes),
            hashed,
            state_words(location),
            location.path.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

fn state_words(location: &LocationStatus) -> String {
    let mut words = location.state.clone();
    if location.read_only {
        words += ", read-only";
    }
    if location.watch.as_ref().is_some_and(|w| w != "watching") {
        words += ", not fully watched";
    }
    words
}

fn remove(context: &Context, name: &str, yes: bool) -> Outcome<()> {
    let request = |dry_run| Request::LocationRemove { name: name.to_owned(), dry_run };
    let plan: LocationReply = context.call(&request(true))?;
    let what = format!(
        "takes the location “{}” ({}, {} entries) out of the library; its files stay where they are, and what other devices have \
         written to it and not delivered stays with them, to be exported there",
        plan.name,
        printable(&plan.path),
        plan.entries
    );
    context.out.confirm(&what, &format!("Remove “{name}”?"), yes)?;
    let reply: LocationReply = context.call(&request(false))?;
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!("“{name}” is no longer a location"));
    Ok(())
}
