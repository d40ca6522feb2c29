//! `sd info`: what is known of one file, from the index.

use super::Context;
use crate::args::InfoArgs;
use crate::control::Request;
use crate::failure::Outcome;
use crate::output::{local_time, printable, size};
use crate::paths;
use crate::reply::InfoReply;

pub fn run(context: &Context, args: &InfoArgs) -> Outcome<()> {
    let target = paths::target(Some(&args.address))?;
    let reply: InfoReply = context.call(&Request::Info { target })?;
    context.out.report(&reply, text)
}

fn text(info: &InfoReply) -> String {
    let mut lines = Vec::new();
    let mut line = |label: &str, value: Option<String>| {
        lines.extend(value.map(|value| format!("{label:<10}{}\n", printable(&value))));
    };
    line("address", Some(info.address.clone()));
    line("type", Some(info.kind.clone()));
    line("target", info.target.clone());
    line("owner", info.owner.as_ref().map(|o| format!("{}{}", o.name, online_words(info.online))));
    line("on disk", info.local_path.clone());
    line("size", info.size.map(|bytes| format!("{} ({bytes} bytes)", size(bytes))));
    line("mode", info.mode.clone());
    line("ids", info.uid.zip(info.gid).map(|(uid, gid)| format!("uid {uid}, gid {gid}")));
    line("links", info.nlink.filter(|n| *n > 1).map(|n| n.to_string()));
    line("modified", info.mtime.as_deref().map(local_time));
    line("changed", info.ctime.as_deref().map(local_time));
    line("born", info.btime.as_deref().map(local_time));
    line("content", content_words(info));
    line("cached", info.cached_bytes.zip(info.size).map(|(c, s)| cached_words(c, s)));
    line("pinned", info.pinned.as_ref().map(|by| pinned_words(by, &info.address)));
    let waits = (info.pending.operations > 0).then(|| super::pending::count_words(info.pending));
    line("pending", waits);
    for holder in &info.holders {
        line("held as", Some(format!("{}{}", holder.address, online_words(Some(holder.online)))));
    }
    lines.concat()
}

fn online_words(online: Option<bool>) -> &'static str {
    match online {
        Some(false) => " (offline)",
        _ => "",
    }
}

fn content_words(info: &InfoReply) -> Option<String> {
    match (&info.content, info.kind.as_str()) {
        (Some(id), _) => Some(id.clone()),
        (None, "file") => Some("not hashed yet".into()),
        _ => None,
    }
}

fn pinned_words(by: &str, address: &str) -> String {
    match by == address {
        true => "yes".into(),
        false => format!("with {by}"),
    }
}

fn cached_words(cached: u64, size_bytes: u64) -> String {
    match cached {
        0 => "nothing".into(),
        all if all >= size_bytes => "all of it".into(),
        part => format!("{} of {}", size(part), size(size_bytes)),
    }
}
