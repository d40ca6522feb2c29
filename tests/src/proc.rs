//! Running programs: with a deadline, and never outliving the test.

use rustix::process::{Pid, Signal};
use std::fmt::Debug;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a finished program left.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained about.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Finished {
    /// Its output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The same, if it exited with 0; panics with its complaint otherwise.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "{}\n{}\n{}", self.status, self.text(), self.stderr);
        self
    }
}

/// Runs a program to its end; panics when that does not come before the deadline.
#[track_caller]
pub fn run(command: &mut Command, deadline: Duration) -> Finished {
    let began = Instant::now();
    let shown = format!("{command:?}");
    let mut child =
        spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let status = loop {
        if let Some(status) = child.try_wait().expect("waiting for a child") {
            break status;
        }
        if began.elapsed() > deadline {
            let _ = child.kill();
            let complaint = stderr.join().unwrap_or_default();
            panic!("{shown} ran longer than {deadline:?}\n{}", String::from_utf8_lossy(&complaint));
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let took = began.elapsed();
    let stdout = stdout.join().unwrap_or_default();
    let stderr = String::from_utf8_lossy(&stderr.join().unwrap_or_default()).into_owned();
    Finished { status, stdout, stderr, took }
}

/// [`run`] of a program by name, with arguments.
#[track_caller]
pub fn run_args<S: AsRef<std::ffi::OsStr> + Debug>(
    program: &str,
    args: &[S],
    deadline: Duration,
) -> Finished {
    run(Command::new(program).args(args), deadline)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Starts a program that the kernel kills when the thread that started it ends, however it ends.
#[track_caller]
pub fn spawn(command: &mut Command) -> Child {
    let die_with_us = || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        Ok(())
    };
    // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
    unsafe { command.pre_exec(die_with_us) };
    command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Sends a signal to a child that has not been waited for.
#[track_caller]
pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_child(child);
    rustix::process::kill_process(pid, signal).expect("signalling a child");
}
