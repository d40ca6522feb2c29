//! `sd library`: create it, show it.

use super::Context;
use crate::args::LibraryCommand;
use crate::control::Request;
use crate::failure::{Code, Outcome};
use crate::output::Columns;
use crate::reply::{Libraries, LibraryReply};

pub fn run(context: &Context, command: LibraryCommand) -> Outcome<()> {
    match command {
        LibraryCommand::Create { name, device_name } => create(context, name, device_name),
        LibraryCommand::List => list(context),
        LibraryCommand::Info => info(context),
    }
}

fn create(context: &Context, name: String, device_name: Option<String>) -> Outcome<()> {
    let reply: LibraryReply = context.call(&Request::LibraryCreate { name, device_name })?;
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!(
        "created the library “{}”; this device is “{}”",
        reply.name, reply.device.name
    ));
    context.out.hint("`sd location add FOLDER` shares a folder, `sd device invite` adds a device");
    Ok(())
}

fn list(context: &Context) -> Outcome<()> {
    let libraries = match context.call::<LibraryReply>(&Request::LibraryInfo) {
        Ok(library) => vec![library],
        Err(failure) if failure.code == Code::NoLibrary => {
            if let Some(hint) = &failure.hint {
                context.out.hint(hint);
            }
            Vec::new()
        }
        Err(failure) => return Err(failure),
    };
    context.out.report(&Libraries { libraries }, |reply| {
        let mut table = Columns::new(&["name", "devices", "this device", "id"]).right(&[1]);
        for library in &reply.libraries {
            let devices = library.devices.len().to_string();
            table.row([&library.name, &devices, &library.device.name, &library.id]);
        }
        table.to_string()
    })
}

fn info(context: &Context) -> Outcome<()> {
    let reply: LibraryReply = context.call(&Request::LibraryInfo)?;
    context.out.report(&reply, |reply| {
        let mut text = format!(
            "library      {}\nid           {}\nthis device  {}\n\n",
            reply.name, reply.id, reply.device.name
        );
        let mut table = Columns::new(&["device", "id"]);
        for device in &reply.devices {
            table.row([&device.name, &device.id]);
        }
        text += &table.to_string();
        text
    })
}
