//! `sd config`: works on the file, without a daemon.

use super::Context;
use crate::args::ConfigCommand;
use crate::config::{self, Source};
use crate::failure::Outcome;
use crate::output::Columns;
use crate::reply::ConfigKey;

pub fn run(context: &Context, command: ConfigCommand) -> Outcome<()> {
    match command {
        ConfigCommand::Get { key } => get(context, &key),
        ConfigCommand::Set { key, value, .. } => set(context, &key, value.as_deref()),
        ConfigCommand::List => list(context),
    }
}

fn get(context: &Context, key: &str) -> Outcome<()> {
    let config = context.config(&context.located()?)?;
    let value = config.get(key)?;
    context.out.report(&serde_json::json!({ "key": key, "value": value }), |_| format!("{value}\n"))
}

fn set(context: &Context, key: &str, value: Option<&str>) -> Outcome<()> {
    config::key(key)?;
    let dir = context.data_dir()?;
    config::write(&dir.config(), key, value)?;
    let config = context.config(&dir)?;
    let shadow = config.iter().find(|(k, ..)| k.name == key).map(|(_, _, source)| source);
    if shadow == Some(Source::Environment) {
        context.out.warn(format_args!("{} overrides it", config::variable_of(key)));
    }
    if dir.daemon_pid()?.is_some() {
        context.out.hint("it acts when the daemon is started again: sd daemon stop");
    }
    Ok(())
}

fn list(context: &Context) -> Outcome<()> {
    let config = context.config(&context.located()?)?;
    let keys: Vec<_> = config.iter().map(described).collect();
    context.out.report(&serde_json::json!({ "keys": keys }), |_| {
        let mut table = Columns::new(&["key", "value", "source", "default", "description"]);
        for key in &keys {
            table.row([&key.key, &key.value, &key.source, &key.default, &key.description]);
        }
        table.to_string()
    })
}

fn described((key, value, source): (&'static config::Key, &str, Source)) -> ConfigKey {
    ConfigKey {
        key: key.name.into(),
        value: value.into(),
        source: source.as_str().into(),
        default: key.default.into(),
        variable: config::variable_of(key.name),
        description: key.about.into(),
    }
}
