//! `sd conflicts`: changes that met others', and what is to become of them.

use super::Context;
use crate::args::{ConflictsArgs, ConflictsCommand, Keep};
use crate::control::{Request, WirePath};
use crate::failure::Outcome;
use crate::output::{Columns, ago, printable};
use crate::paths;
use crate::reply::{ConflictItem, Conflicts, ResolveReply};

pub fn run(context: &Context, args: ConflictsArgs) -> Outcome<()> {
    match args.command {
        None | Some(ConflictsCommand::List) => list(context),
        Some(ConflictsCommand::Resolve { ids, keep, export, yes, .. }) => {
            let export = export.as_deref().map(paths::spelled).transpose()?;
            let export = export.as_deref().map(WirePath::from);
            resolve(context, &ids, keep.unwrap_or(Keep::Both), export.as_ref(), yes)
        }
    }
}

fn list(context: &Context) -> Outcome<()> {
    let reply: Conflicts = context.call(&Request::Conflicts)?;
    context.out.report(&reply, |reply| match reply.conflicts.is_empty() {
        true => String::new(),
        false => table(&reply.conflicts),
    })?;
    match reply.conflicts.is_empty() {
        true => context.out.note("no conflicts"),
        false => context.out.hint("`sd conflicts resolve ID --keep both|mine|theirs`"),
    }
    Ok(())
}

fn table(conflicts: &[ConflictItem]) -> String {
    let mut table = Columns::new(&["id", "when", "what", "path", "what became of it"]).right(&[0]);
    for conflict in conflicts {
        table.row([
            conflict.id.to_string(),
            ago(&conflict.at),
            conflict.what.clone(),
            conflict.address.clone().unwrap_or_else(|| conflict.path.clone()),
            ended_words(conflict),
        ]);
    }
    table.to_string()
}

fn ended_words(conflict: &ConflictItem) -> String {
    let place = conflict.kept_as.as_deref().unwrap_or("?");
    match conflict.ended.as_str() {
        "kept_as" => format!("yours is {place}"),
        "made_again" => format!("it was deleted there; yours is {place}"),
        _ => format!("not done: {}", conflict.reason.as_deref().unwrap_or("the owner's stands")),
    }
}

fn resolve(
    context: &Context,
    ids: &[u64],
    keep: Keep,
    export: Option<&WirePath>,
    yes: bool,
) -> Outcome<()> {
    let request = |dry_run| Request::ConflictsResolve {
        ids: ids.to_vec(),
        keep,
        export: export.cloned(),
        dry_run,
    };
    if keep != Keep::Both {
        let plan: ResolveReply = context.call(&request(true))?;
        let what: Vec<_> =
            plan.resolved.iter().map(|r| format!("{}: {}", r.id, printable(&r.what))).collect();
        context.out.confirm(&what.join("\n"), "Do that?", yes)?;
    }
    let reply: ResolveReply = context.call(&request(false))?;
    context.out.report(&reply, |reply| {
        let exported = reply.resolved.iter().flat_map(|r| &r.exported);
        exported.map(|path| format!("{}\n", printable(path))).collect()
    })?;
    for done in &reply.resolved {
        context.out.note(format_args!("{}: {}", done.id, printable(&done.what)));
    }
    Ok(())
}
