//! `sd sync`: waits until writes to other devices' files have reached their owners.

use super::{Context, pending};
use crate::args::SyncArgs;
use crate::control::{Draining, Event, Request};
use crate::failure::{Code, Failure, Outcome};
use crate::output::{printable, size};
use crate::paths;
use crate::reply::SyncReply;

pub fn run(context: &Context, args: &SyncArgs) -> Outcome<()> {
    let target = args.address.as_deref().map(|a| paths::target(Some(a))).transpose()?;
    let timeout_ms = args.timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    let client = context.client()?;
    let bar = context.out.spinner();
    let mut told = Vec::new();
    let reply = client.call::<SyncReply>(&Request::Sync { target, timeout_ms }, |event| {
        match event {
            Event::Draining(left) => {
                bar.set_message(words(&left));
                // Once a device, so that a wait without an end is understood in a log as well.
                for device in left.offline {
                    if told.contains(&device) {
                        continue;
                    }
                    bar.suspend(|| {
                        context.out.note(format_args!("waiting for “{}”", printable(&device)));
                    });
                    told.push(device);
                }
            }
            event => return super::unexpected(event),
        }
        Ok(None)
    });
    bar.finish_and_clear();
    let reply = reply?;
    context.out.report(&reply, |reply| match reply.reached {
        true => String::new(),
        false => pending::table(&reply.pending),
    })?;
    match reply.reached {
        true => Ok(()),
        false => Err(unreached(&reply)),
    }
}

fn words(left: &Draining) -> String {
    let mut words = format!("{} changes, {} to go", left.operations, size(left.bytes));
    if !left.offline.is_empty() {
        let names: Vec<_> = left.offline.iter().map(|n| format!("“{}”", printable(n))).collect();
        words += &format!("; {} cannot be reached", names.join(", "));
    }
    words
}

fn unreached(reply: &SyncReply) -> Failure {
    let message = format!(
        "{} changes ({}) have not reached their owner",
        reply.left.operations,
        size(reply.left.bytes)
    );
    let is_final = |state: &str| matches!(state, "blocked" | "orphaned");
    Failure::new(Code::Unreachable, message).hint(
        match reply.pending.iter().all(|p| is_final(&p.state)) {
            true => "no owner takes them as they stand: `sd pending export` gives their bytes",
            false => "they stay safe here and are delivered as soon as that is possible",
        },
    )
}
