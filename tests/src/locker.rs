//! A program that locks a file when told to, and says what came of it.

use crate::proc;
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

/// How long an answer may take that does not wait for a lock.
const ANSWER: Duration = Duration::from_secs(20);

/// One command a line: `flock|record ex|sh|un now|wait [start length]`, `owner start length` for
/// who keeps bytes from being locked, `close`, `fork` a child that has the file open, `reap` it.
const SCRIPT: &str = r#"
import fcntl, os, struct, sys
children = []
def fork():
    ends, keep = os.pipe()
    if os.fork() == 0:
        os.close(keep)
        os.read(ends, 1)
        os._exit(0)
    os.close(ends)
    children.append(keep)
try:
    fd = os.open(sys.argv[1], os.O_RDWR)
except OSError:
    fd = os.open(sys.argv[1], os.O_RDONLY)
modes = {"ex": fcntl.LOCK_EX, "sh": fcntl.LOCK_SH, "un": fcntl.LOCK_UN}
def run(words):
    if words[0] == "close":
        os.close(fd)
        return "yes"
    if words[0] == "fork":
        fork()
        return "yes"
    if words[0] == "reap":
        os.close(children.pop())
        os.wait()
        return "yes"
    if words[0] == "owner":
        ask = struct.pack("hhqqi", fcntl.F_WRLCK, 0, int(words[1]), int(words[2]), 0)
        kind, _, start, length, pid = struct.unpack("hhqqi", fcntl.fcntl(fd, fcntl.F_GETLK, ask))
        return "free" if kind == fcntl.F_UNLCK else f"{start} {length} {pid}"
    mode = modes[words[1]]
    if words[1] != "un" and words[2] == "now":
        mode |= fcntl.LOCK_NB
    try:
        if words[0] == "flock":
            fcntl.flock(fd, mode)
        else:
            start, length = (int(words[3]), int(words[4])) if len(words) > 3 else (0, 0)
            fcntl.lockf(fd, mode, length, start)
        return "yes"
    except BlockingIOError:
        return "no"
    except OSError as error:
        return str(error)
print("ready", flush=True)
for line in sys.stdin:
    print(run(line.split()), flush=True)
"#;

/// Such a program; killed when dropped.
#[derive(Debug)]
pub struct Locker {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
}

impl Locker {
    /// One that has the file open, for writing where it may.
    #[track_caller]
    pub fn of(path: &Path) -> Self {
        let mut command = Command::new("python3");
        command.args(["-c", SCRIPT]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = proc::spawn(&mut command);
        let commands = child.stdin.take().expect("a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (to, answers) = mpsc::channel();
        std::thread::spawn(move || {
            // Nobody listens any more once the test is over.
            stdout.lines().map_while(Result::ok).try_for_each(|line| to.send(line))
        });
        let locker = Self { child, commands, answers };
        assert_eq!(locker.answer(ANSWER), "ready");
        locker
    }

    /// The process, which is the program itself.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it to do something that may wait.
    #[track_caller]
    pub fn tell(&mut self, command: &str) {
        writeln!(self.commands, "{command}").expect("a program that listens");
    }

    /// What it said last.
    #[track_caller]
    pub fn answer(&self, deadline: Duration) -> String {
        self.answers.recv_timeout(deadline).expect("an answer in time")
    }

    /// Whether it has said nothing more.
    pub fn is_silent(&self) -> bool {
        self.answers.try_recv().is_err()
    }

    /// Tells it to do something that does not wait; what came of it.
    #[track_caller]
    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answer(ANSWER)
    }

    /// The same; whether it was given.
    #[track_caller]
    pub fn gets(&mut self, command: &str) -> bool {
        match self.ask(command).as_str() {
            "yes" => true,
            "no" => false,
            other => panic!("{command}: {other}"),
        }
    }

    /// Sends a signal, and waits until it has ended.
    #[track_caller]
    pub fn end(&mut self, signal: Signal, deadline: Duration) {
        proc::signal(&self.child, signal);
        let child = &mut self.child;
        crate::wait::wait_until("the program to end", deadline, || {
            child.try_wait().expect("waiting for a child").is_some()
        });
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
