//! `sd`: the command line and the daemon of one mounted drive over every device.
//!
//! | module | what it is |
//! |---|---|
//! | [`args`] | the command line as typed; help, man pages, completions |
//! | [`config`] | every configuration key, its default, where its value comes from |
//! | [`data_dir`] | the directory that holds everything of one device |
//! | [`commands`] | one file a command: asks the daemon, words the answer |
//! | [`control`], [`reply`] | the protocol between the two, and the documents of `--json` |
//! | [`daemon`] | wires index, indexer, network, cache and mounts together |
//! | [`failure`], [`output`] | errors with hints; the only place that prints |
#![forbid(unsafe_code)]

mod args;
mod commands;
mod config;
mod control;
mod daemon;
mod data_dir;
mod failure;
mod output;
mod paths;
mod reply;

use clap::Parser;
use clap::error::ErrorKind;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.global.json;
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::failure(&failure, json);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Help and version were asked for and are data; everything else is wrong usage.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed stream leaves nowhere to say so.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => ExitCode::from(2),
    }
}
