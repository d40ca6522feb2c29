//! Completions and man pages, from the definition of the command line.

use super::Context;
use crate::args::Cli;
use crate::failure::{Failure, Outcome};
use clap::CommandFactory;
use std::path::Path;

pub fn completions(context: &Context, shell: clap_complete::Shell) -> Outcome<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "sd", &mut script);
    context.out.raw(&script)
}

pub fn man(dir: &Path) -> Outcome<()> {
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|e| Failure::io(format!("cannot write man pages into {}", dir.display()), e))
}
