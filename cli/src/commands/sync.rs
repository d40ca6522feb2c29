//! `sd sync`: waits until writes to other devices' files have reached their owners.

use super::waiting::Waiting;
use super::{Context, pending};
use crate::args::SyncArgs;
use crate::control::{Event, Request};
use crate::failure::{Code, Failure, Outcome};
use crate::output::size;
use crate::paths;
use crate::reply::SyncReply;

pub fn run(context: &Context, args: &SyncArgs) -> Outcome<()> {
    let target = args.address.as_deref().map(|a| paths::target(Some(a))).transpose()?;
    let timeout_ms = args.timeout.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    let client = context.client()?;
    let mut shown = Waiting::begin(&context.out);
    let reply: SyncReply =
        client.call(&Request::Sync { target, timeout_ms }, |event| match event {
            Event::Draining(left) => {
                let words = format!("{} changes, {} to go", left.operations, size(left.bytes));
                shown.show(words, left.offline);
                Ok(None)
            }
            event => super::unexpected(event),
        })?;
    drop(shown);
    context.out.report(&reply, |reply| match reply.reached {
        true => String::new(),
        false => pending::table(&reply.pending),
    })?;
    match reply.reached {
        true => Ok(()),
        false => Err(unreached(&reply)),
    }
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
