//! `sd cache`: how full it is, emptying it, its limit.

use super::{Context, pin};
use crate::args::CacheCommand;
use crate::config;
use crate::control::Request;
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Columns, size};
use crate::reply::{CacheStatus, Cleared};

pub fn run(context: &Context, command: CacheCommand) -> Outcome<()> {
    match command {
        CacheCommand::Stats => stats(context),
        CacheCommand::Clear { yes } => clear(context, yes),
        CacheCommand::Limit { size } => limit(context, size.as_deref()),
    }
}

fn stats(context: &Context) -> Outcome<()> {
    let reply: CacheStatus = context.call(&Request::CacheLimit { bytes: None })?;
    context.out.report(&reply, |reply| {
        let mut table = Columns::new(&["cache", ""]).right(&[1]);
        table.row(["kept", &size(reply.bytes)]);
        table.row(["limit", &size(reply.limit_bytes)]);
        table.row(["of it pinned", &size(reply.pinned_bytes)]);
        table.row(["left free on the disk", &size(reply.min_free_bytes)]);
        table.row(["files", &reply.files.to_string()]);
        table.row(["read from it", &size(reply.hit_bytes)]);
        table.row(["fetched", &size(reply.fetched_bytes)]);
        table.row(["given back", &size(reply.evicted_bytes)]);
        table.to_string()
    })
}

fn clear(context: &Context, yes: bool) -> Outcome<()> {
    let plan: Cleared = context.call(&Request::CacheClear { dry_run: true })?;
    let what = format!(
        "empties the cache ({}); other devices' files are fetched again when they are read",
        size(plan.freed_bytes)
    );
    context.out.confirm(&what, "Empty the cache?", yes)?;
    let reply: Cleared = context.call(&Request::CacheClear { dry_run: false })?;
    context.out.report(&reply, |_| String::new())?;
    pin::note_freed(context, &reply);
    Ok(())
}

fn limit(context: &Context, wanted: Option<&str>) -> Outcome<()> {
    let bytes = wanted.map(parse).transpose()?;
    let reply: CacheStatus = context.call(&Request::CacheLimit { bytes })?;
    if let Some(wanted) = wanted {
        config::write(&context.data_dir()?.config(), "cache.limit", Some(wanted.trim()))?;
    }
    if reply.pinned_bytes > reply.limit_bytes {
        context.out.warn(format_args!(
            "{} are pinned and stay; nothing else is kept until the limit is above that",
            size(reply.pinned_bytes)
        ));
        context.out.hint("`sd unpin` what need not be here always; `sd pin` lists it");
    }
    context.out.report(&reply, |reply| size(reply.limit_bytes))
}

fn parse(text: &str) -> Outcome<u64> {
    config::parse_size(text).map_err(|reason| {
        Failure::new(Code::Usage, format!("“{text}” {reason}"))
            .hint("give bytes, such as 500MB or 20GiB")
    })
}
