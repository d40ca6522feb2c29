//! One file a command: checks what was typed, asks the daemon, words the answer.

mod cache;
mod config;
mod conflicts;
mod daemon;
mod device;
mod doctor;
mod generate;
mod info;
mod library;
mod list;
mod location;
mod mount;
mod pending;
mod pin;
mod status;
mod sync;
mod waiting;

pub use mount::not_mounted;
pub use status::no_library;

use crate::args::{Cli, Command, Global};
use crate::config::Config;
use crate::control::{Answer, Client, Event, Request};
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use crate::output::Output;
use rustix::fs::Mode;
use serde::de::DeserializeOwned;

/// Runs what was typed.
pub fn run(cli: Cli) -> Outcome<()> {
    let context = Context { out: Output { json: cli.global.json }, global: cli.global };
    match cli.command {
        Command::Completions { shell } => return generate::completions(&context, shell),
        Command::Man { dir } => return generate::man(&dir),
        _ => {}
    }
    // Whatever this process and the daemon create is private.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    match cli.command {
        Command::Library(command) => library::run(&context, command),
        Command::Device(command) => device::run(&context, command),
        Command::Location(command) => location::run(&context, command),
        Command::Mount(args) => mount::mount(&context, &args),
        Command::Unmount(args) => mount::unmount(&context, &args),
        Command::Status(args) => status::run(&context, &args),
        Command::Ls(args) => list::ls(&context, &args),
        Command::Tree(args) => list::tree(&context, &args),
        Command::Info(args) => info::run(&context, &args),
        Command::Sync(args) => sync::run(&context, &args),
        Command::Pending(args) => pending::run(&context, args),
        Command::Conflicts(args) => conflicts::run(&context, args),
        Command::Pin(args) => pin::pin(&context, &args),
        Command::Unpin(args) => pin::unpin(&context, &args),
        Command::Evict(args) => pin::evict(&context, &args),
        Command::Cache(command) => cache::run(&context, command),
        Command::Daemon(command) => daemon::run(&context, command),
        Command::Config(command) => config::run(&context, command),
        Command::Doctor(args) => doctor::run(&context, &args),
        Command::Completions { .. } | Command::Man { .. } => Ok(()),
    }
}

/// What every command has at hand.
pub struct Context {
    pub global: Global,
    pub out: Output,
}

impl Context {
    /// The data directory, as it is.
    pub fn located(&self) -> Outcome<DataDir> {
        DataDir::locate(self.global.data_dir.as_deref())
    }

    /// The data directory, created and checked.
    pub fn data_dir(&self) -> Outcome<DataDir> {
        self.located()?.prepare()
    }

    /// File, environment and flags.
    pub fn config(&self, dir: &DataDir) -> Outcome<Config> {
        Config::load(&dir.config(), &self.global.set)
    }

    /// A connection to the daemon, which is started when none runs.
    pub fn client(&self) -> Outcome<Client> {
        let dir = self.data_dir()?;
        // So that a mistake is told here, and not by a daemon that ends at once.
        self.config(&dir)?;
        match Client::connect(&dir)? {
            Some(client) => {
                if !self.global.set.is_empty() {
                    self.out.warn("the daemon runs already: --set acts when it is started again");
                }
                Ok(client)
            }
            None => crate::daemon::start(&dir, &self.global.set),
        }
    }

    /// A connection to the daemon, if one runs.
    pub fn running_client(&self) -> Outcome<Option<Client>> {
        let dir = self.located()?;
        match dir.path().join("format").exists() {
            true => Client::connect(&dir.prepare()?),
            false => Ok(None),
        }
    }

    /// Asks the daemon something that has one answer.
    pub fn call<T: DeserializeOwned>(&self, request: &Request) -> Outcome<T> {
        self.client()?.call(request, unexpected)
    }
}

/// For requests whose only event is the last.
pub fn unexpected(event: Event) -> Outcome<Option<Answer>> {
    match event {
        Event::Progress(_) => Ok(None),
        event => Err(Failure::new(Code::Internal, format!("the daemon sent {event:?}"))),
    }
}
