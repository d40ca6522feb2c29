//! `sd daemon`: run it in the foreground, stop it, look whether it runs.

use super::Context;
use crate::args::DaemonCommand;
use crate::control::{Client, Request};
use crate::daemon::arenas;
use crate::data_dir::{DataDir, await_end};
use crate::failure::{Code, Failure, Outcome};
use crate::reply::{DaemonStatus, PendingCount, Status, Stopped};
use std::time::{Duration, Instant};

/// How long a daemon may take to unmount, flush and end.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How long `sd daemon status` waits for an answer.
const STATUS_PATIENCE: Duration = Duration::from_secs(10);

pub fn run(context: &Context, command: DaemonCommand) -> Outcome<()> {
    if let DaemonCommand::Run { .. } = command
        && let Err(e) = arenas::take_few()
    {
        context.out.warn(format_args!("the daemon will use more memory than it needs: {e}"));
    }
    match command {
        DaemonCommand::Run { background: true } => {
            crate::daemon::run_in_background(&context.located()?, &context.global.set)
        }
        DaemonCommand::Run { background: false } => {
            let dir = context.data_dir()?;
            let config = context.config(&dir)?;
            crate::daemon::run(&dir, &config, crate::daemon::LogTo::Stderr, || Ok(()))
        }
        DaemonCommand::Guard => crate::daemon::guard::run(),
        DaemonCommand::Events => {
            mount_fuse::run_helper().map_err(|e| Failure::io("cannot tell of changes", e))
        }
        DaemonCommand::Stop { force } => stop(context, force),
        DaemonCommand::Status => status(context),
    }
}

fn stop(context: &Context, force: bool) -> Outcome<()> {
    let Some(client) = context.running_client()? else {
        context.out.note("no daemon runs");
        return context.out.report(
            &Stopped { pid: None, remains: vec![], pending: PendingCount::default() },
            |_| String::new(),
        );
    };
    let reply: Stopped = client.call(&Request::Stop { force }, super::unexpected)?;
    wait_for_end(&context.located()?)?;
    if let Some(pid) = reply.pid {
        // Its disk can be unmounted only then.
        await_end(pid, STOP_PATIENCE);
    }
    for left in &reply.remains {
        context.out.warn(left);
    }
    context.out.report(&reply, |_| String::new())?;
    context.out.note("the daemon has stopped");
    super::pending::tell_what_waits(
        context.out,
        reply.pending,
        "they stay on this disk and are delivered when the daemon runs again",
    );
    Ok(())
}

fn wait_for_end(dir: &DataDir) -> Outcome<()> {
    let deadline = Instant::now() + STOP_PATIENCE;
    while let Some(pid) = dir.daemon_pid()? {
        if Instant::now() > deadline {
            return Err(Failure::new(
                Code::Busy,
                format!("the daemon (process {pid}) has not ended yet"),
            )
            .hint(format!("look into sd.log; `kill {pid}` asks it again")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn status(context: &Context) -> Outcome<()> {
    let dir = context.located()?;
    let reply = match context.running_client()? {
        Some(client) => asked(client)?,
        None => DaemonStatus {
            running: false,
            pid: None,
            version: None,
            started_at: None,
            data_dir: dir.path().display().to_string(),
        },
    };
    context.out.report(&reply, |reply| match reply.pid {
        Some(pid) => format!("running, process {pid}, data in {}", reply.data_dir),
        None => String::new(),
    })?;
    match reply.running {
        true => Ok(()),
        false => Err(Failure::new(
            Code::NoDaemon,
            format!("no daemon runs on {}", dir.path().display()),
        )
        .hint("any command that needs it starts it; `sd daemon run` runs it in the foreground")),
    }
}

fn asked(client: Client) -> Outcome<DaemonStatus> {
    client.limit_wait(STATUS_PATIENCE)?;
    let status: Status = client.call(&Request::Status, super::unexpected)?;
    Ok(status.daemon)
}
