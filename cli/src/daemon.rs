//! The daemon: starting it, running it, stopping it in good order.
//!
//! One process serves one data directory, held by a lock that the kernel
//! releases however it ends. One runtime thread carries the network and the
//! control socket ([`runtime`]); whatever may block on a disk goes to
//! `spawn_blocking`, and the kernel's requests are served by threads of
//! `mount-fuse`.

mod applying;
pub mod arenas;
mod browse;
mod check;
mod conflicts;
pub mod guard;
mod handle;
mod inherited;
mod locations;
mod log;
mod members;
mod mounts;
mod parts;
mod pins;
mod report;
mod serve;
mod writes;

pub use mounts::{failure as mount_failure, recorded as recorded_mounts};
pub use pins::room_words;

use crate::config::Config;
use crate::control::Client;
use crate::data_dir::{DaemonLock, DataDir};
use crate::failure::{Code, Failure, Outcome};
use parts::Daemon;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// How long a daemon that another command is starting may take.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// How long work in progress may hold up the end.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Every open file of a mount, cached file and connection takes a descriptor.
const WANTED_FILES: u64 = 1 << 20;

/// What a daemon in the background tells the command that started it, on its stdout.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Started {
    Ready,
    Failed(Failure),
}

/// Starts the daemon in the background and waits until it answers.
pub fn start(dir: &DataDir, set: &[String]) -> Outcome<Client> {
    let mut child = spawn(dir, set)?;
    match hear(&mut child) {
        Some(Started::Failed(failure)) if failure.code != Code::Busy => return Err(failure),
        None => return Err(silent(dir, &mut child)),
        // Busy: another command was quicker, and its daemon will answer.
        Some(_) => {}
    }
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        if let Some(client) = Client::connect(dir)? {
            return Ok(client);
        }
        if Instant::now() > deadline {
            return Err(Failure::new(Code::NoDaemon, "the daemon does not answer")
                .hint(format!("look into {}; `sd daemon stop` ends it", dir.log().display())));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn spawn(dir: &DataDir, set: &[String]) -> Outcome<Child> {
    let program = std::env::current_exe().map_err(|e| Failure::io("cannot find sd itself", e))?;
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(dir.log());
    let log = log.map_err(|e| Failure::io(format!("cannot write {}", dir.log().display()), e))?;
    Command::new(program)
        .arg("--data-dir")
        .arg(dir.path())
        .args(set.iter().flat_map(|s| ["--set", s]))
        .args(["daemon", "run", "--background"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .map_err(|e| Failure::io("cannot start the daemon", e))
}

fn hear(child: &mut Child) -> Option<Started> {
    let mut line = String::new();
    let stdout = child.stdout.take()?;
    BufReader::new(stdout.take(64 << 10)).read_line(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

fn silent(dir: &DataDir, child: &mut Child) -> Failure {
    let ended = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
    Failure::new(Code::NoDaemon, format!("the daemon ended while it started ({ended})"))
        .hint(format!("{} says why; `sd daemon run` shows it here", dir.log().display()))
}

/// The started side of [`start`].
pub fn run_in_background(dir: &DataDir, set: &[String]) -> Outcome<()> {
    inherited::close();
    // Fails for the leader of a process group, which has left its terminal already.
    let _ = rustix::process::setsid();
    let result = dir.clone().prepare().and_then(|dir| {
        let config = Config::load(&dir.config(), set)?;
        // So that no disk is kept busy by a working directory.
        std::env::set_current_dir("/").map_err(|e| Failure::io("cannot leave this folder", e))?;
        run(&dir, &config, LogTo::File, || tell(&Started::Ready))
    });
    if let Err(failure) = &result {
        tell(&Started::Failed(failure.clone()))?;
    }
    result
}

fn tell(started: &Started) -> Outcome<()> {
    let line =
        serde_json::to_string(started).map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
    let mut out = io::stdout().lock();
    // The command that started this may have been interrupted; the daemon is wanted all the same.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    Ok(())
}

/// Where the log goes.
#[derive(Clone, Copy)]
pub enum LogTo {
    Stderr,
    File,
}

/// Runs the daemon until it is told to stop; `ready` is called when it answers.
pub fn run(
    dir: &DataDir,
    config: &Config,
    log: LogTo,
    ready: impl FnOnce() -> Outcome<()>,
) -> Outcome<()> {
    let lock = take_lock(dir)?;
    log::start(dir, config.log_filter(), log)?;
    raise_file_limit();
    let runtime = runtime().map_err(|e| Failure::io("cannot start the runtime", e))?;
    let result = runtime.block_on(serve(dir, config, ready));
    runtime.shutdown_timeout(END_PATIENCE);
    drop::<DaemonLock>(lock);
    result
}

fn take_lock(dir: &DataDir) -> Outcome<DaemonLock> {
    dir.lock()?.map_err(|pid| {
        let who = pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"));
        Failure::new(
            Code::Busy,
            format!("a daemon ({who}) already serves {}", dir.path().display()),
        )
        .hint("use it, or end it with `sd daemon stop`; another --data-dir is another device")
    })
}

/// One thread: half the latency of several, measured with two processors, because a
/// request to a peer then crosses no thread border on its way from socket to socket.
fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(64)
        .thread_name("sd-blocking")
        .build()
}

fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(WANTED_FILES, |most| most.min(WANTED_FILES));
    if current.is_some_and(|now| now < wanted) {
        let limit = Rlimit { current: Some(wanted), maximum };
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "cannot raise the limit of open files");
        }
    }
}

async fn serve(dir: &DataDir, config: &Config, ready: impl FnOnce() -> Outcome<()>) -> Outcome<()> {
    let daemon = Daemon::open(dir, config).await?;
    daemon.guard.start();
    let listener = serve::bind(dir)?;
    daemon.revive_mounts().await;
    let serving = tokio::spawn(serve::accept(Arc::clone(&daemon), listener));
    tracing::info!(pid = std::process::id(), data_dir = %dir.path().display(), "ready");
    ready()?;
    let stopped = tokio::select! {
        signal = stop_signal() => signal.map_err(|e| Failure::io("cannot wait for signals", e)),
        () = daemon.stop_requested() => Ok(()),
    };
    tracing::info!("stopping");
    daemon.close().await;
    serving.abort();
    // A socket that nobody listens on is harmless, and replaced by the next daemon.
    let _ = std::fs::remove_file(dir.path().join("sock"));
    tracing::info!("stopped");
    stopped
}

/// Waits for SIGTERM or SIGINT.
pub async fn stop_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
