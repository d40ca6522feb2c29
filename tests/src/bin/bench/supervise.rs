//! The measuring is done by a process of its own, so that Ctrl-C ends it wherever it is, and what
//! it leaves is removed all the same. What it started is killed by the kernel along with it.

use anyhow::Result;
use e2e::{lab, proc};
use rustix::process::Signal;
use std::process::{Child, Command, ExitCode, ExitStatus};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// The first argument of the process that measures.
pub const WORKER: &str = "work";

const POLL: Duration = Duration::from_millis(20);
/// What a shell says of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Measures what is asked for.
#[tokio::main(flavor = "current_thread")]
pub async fn run(args: &[&str]) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut command = Command::new(std::env::current_exe()?);
    let mut worker = proc::spawn(command.arg(WORKER).args(args));
    let status = tokio::select! {
        status = ended(&mut worker) => status?,
        _ = interrupt.recv() => stopped(&mut worker)?,
        _ = terminate.recv() => stopped(&mut worker)?,
        _ = hangup.recv() => stopped(&mut worker)?,
    };
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if code.is_none() {
        eprintln!("stopped; removing what was started");
        lab::remove_what_was_killed();
    }
    Ok(code.unwrap_or(INTERRUPTED).into())
}

fn stopped(worker: &mut Child) -> Result<ExitStatus> {
    proc::signal(worker, Signal::KILL);
    Ok(worker.wait()?)
}

async fn ended(worker: &mut Child) -> Result<ExitStatus> {
    loop {
        if let Some(status) = worker.try_wait()? {
            return Ok(status);
        }
        tokio::time::sleep(POLL).await;
    }
}
