//! Which program a request comes from, from `/proc`.
//!
//! A name of a thread is cut, and chosen by the program; so the program's file tells first, then
//! the name of the process, then the same of those that started it. A sandbox around a program
//! (bubblewrap) is none of these: it has become the program, or started it.
//!
//! A program's command line is not read, but of KDE's workers, which have nothing else that
//! tells them apart: reading it waits for the program's memory, and that program may be waiting
//! for this daemon. So it is read by a thread of its own, for which nobody waits long.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;
use vfs_core::hydration::Program;

/// Threads that are remembered; more than open files at once on any desktop.
const KNOWN_MAX: usize = 256;
/// How far up it is looked who started a program: a thumbnailer starts a sandbox, that a shell,
/// and that the program that reads.
const ANCESTORS: usize = 3;
/// KDE's processes that do the work of a library, which is their first argument.
const KDE_WORKERS: [&str; 2] = ["kioworker", "kioslave5"];
/// How long to wait for a command line.
const COMMAND_LINE_PATIENCE: Duration = Duration::from_millis(20);

/// One program in one thread, as long as it does not become another.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Run {
    thread: u32,
    /// In ticks since the boot: numbers of threads are used again.
    started: u64,
    /// Changes when the process becomes another program.
    name: String,
}

/// The programs of the last requests.
#[derive(Default)]
pub(crate) struct Programs {
    known: Mutex<HashMap<Run, Arc<Program>>>,
}

impl Programs {
    /// The program of this thread; `None` for the kernel itself, and for one that is gone or
    /// belongs to another PID namespace.
    pub(crate) fn of(&self, thread: u32) -> Option<Arc<Program>> {
        if thread == 0 {
            return None;
        }
        let stat = fs::read(format!("/proc/{thread}/stat")).ok()?;
        let run = parse_stat(thread, &String::from_utf8_lossy(&stat))?;
        // A panic leaves the map as it was.
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(program) = known().get(&run) {
            return Some(Arc::clone(program));
        }
        let (names, is_certain) = names_of(thread)?;
        let program = Arc::new(Program::new(names));
        if is_certain {
            let mut known = known();
            if known.len() == KNOWN_MAX {
                known.clear();
            }
            known.insert(run, Arc::clone(&program));
        }
        Some(program)
    }
}

/// Of `/proc/THREAD/stat`. The name, in parentheses, may have any character.
fn parse_stat(thread: u32, stat: &str) -> Option<Run> {
    let (head, tail) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    // The 22nd field, and the 20th after the name.
    let started = tail.split_ascii_whitespace().nth(19)?.parse().ok()?;
    Some(Run { thread, started, name })
}

/// What `/proc/PID/status` says of a process.
struct Status {
    name: String,
    process: u32,
    parent: u32,
}

impl Status {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read(format!("/proc/{pid}/status")).ok()?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.trim().to_owned())
        };
        let number = |name| field(name)?.parse().ok();
        Some(Self { name: field("Name:")?, process: number("Tgid:")?, parent: number("PPid:")? })
    }
}

/// All names of a program, and whether they are all that there are.
fn names_of(thread: u32) -> Option<(Vec<String>, bool)> {
    let of_thread = Status::of(thread)?;
    let mut at = match of_thread.process {
        process if process == thread => Some(of_thread),
        process => Status::of(process),
    };
    let (mut names, mut is_certain) = (Vec::new(), true);
    for _ in 0..=ANCESTORS {
        let Some(status) = at.filter(|status| status.process > 1) else { break };
        let own = [file_name(status.process), Some(status.name)];
        for name in own.into_iter().flatten() {
            if KDE_WORKERS.contains(&name.as_str()) {
                let library = library_of(status.process);
                is_certain &= library.is_some();
                names.extend(library);
            }
            if !names.contains(&name) {
                names.push(name);
            }
        }
        at = Status::of(status.parent);
    }
    Some((names, is_certain))
}

/// The name of the file that a process runs; not told of other users' processes. Of a script it is
/// the interpreter's, and the process has the script's.
fn file_name(process: u32) -> Option<String> {
    let path = fs::read_link(format!("/proc/{process}/exe")).ok()?;
    let name = path.file_name()?.to_string_lossy().into_owned();
    // A program that was upgraded while it runs.
    Some(name.strip_suffix(" (deleted)").map(str::to_owned).unwrap_or(name))
}

/// The library for which one of KDE's workers works, as `thumbnail.so`.
fn library_of(process: u32) -> Option<String> {
    let (tell, told) = mpsc::sync_channel(1);
    let read = move || {
        let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        // Nobody waits any more.
        let _ = tell.send(library_in(&line));
    };
    std::thread::Builder::new().name("fuse-program".into()).spawn(read).ok()?;
    told.recv_timeout(COMMAND_LINE_PATIENCE).ok()?
}

fn library_in(command_line: &[u8]) -> Option<String> {
    let library = command_line.split(|byte| *byte == 0).nth(1)?;
    let library = String::from_utf8_lossy(library).into_owned();
    Some(Path::new(&library).file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    /// A process that waits, and ends with the test.
    struct Waiting(Child);

    impl Waiting {
        fn new(command: &mut Command) -> Self {
            Self(command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn copy_of_cat(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        fs::copy("/bin/cat", &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// The names of a process, once it has become the program that is started.
    fn names(pid: u32, known: &str) -> Vec<String> {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let names = names_of(pid).map(|(names, _)| names).unwrap_or_default();
            if names.iter().any(|name| name == known) || std::time::Instant::now() > deadline {
                return names;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_program_has_the_whole_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let name = "a-program-with-a-name-that-the-kernel-cuts";
        let program = Waiting::new(&mut Command::new(copy_of_cat(dir.path(), name)));
        // The kernel sets that name last.
        assert_eq!(names(program.0.id(), &name[..15])[..2], [name, &name[..15]]);
    }

    #[test]
    fn a_script_has_its_own_name_and_its_interpreters() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script-backup");
        // `read` waits within the shell.
        fs::write(&script, "#!/bin/sh\nread line\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let program = Waiting::new(&mut Command::new(&script));
        let names = names(program.0.id(), "script-backup");
        assert_eq!(names[1], "script-backup", "{names:?}");
    }

    #[test]
    fn who_started_a_program_is_told_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let (name, starter) = ("reads-for-another", "starter-of-it");
        copy_of_cat(dir.path(), name);
        let script = dir.path().join(starter);
        fs::write(&script, format!("#!/bin/sh\necho $$\n{}/{name}\ntrue\n", dir.path().display()))
            .unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let started = Waiting::new(&mut Command::new(&script));
        let children = format!("/proc/{0}/task/{0}/children", started.0.id());
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let child = loop {
            let text = fs::read_to_string(&children).unwrap_or_default();
            if let Some(child) = text.split_whitespace().next() {
                break child.parse().unwrap();
            }
            assert!(std::time::Instant::now() < deadline, "no child");
        };
        let names = names(child, name);
        let place = |of: &str| names.iter().position(|name| name == of);
        assert!(place(name) < place(starter) && place(name).is_some(), "{names:?}");
    }

    #[test]
    fn a_thread_is_of_its_process_and_known_the_second_time() {
        let programs = Programs::default();
        let of_thread = std::thread::Builder::new().name("another-name".into());
        let check = move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
            let first = programs.of(thread).unwrap();
            assert!(Arc::ptr_eq(&first, &programs.of(thread).unwrap()));
            let own = std::env::current_exe().unwrap();
            let own = own.file_name().unwrap().to_string_lossy().into_owned();
            assert_eq!(names_of(thread).unwrap().0[0], own);
            // As when the process becomes another program.
            fs::write(format!("/proc/self/task/{thread}/comm"), "other").unwrap();
            assert!(!Arc::ptr_eq(&first, &programs.of(thread).unwrap()));
        };
        of_thread.spawn(check).unwrap().join().unwrap();
    }

    #[test]
    fn the_kernel_and_who_is_gone_are_nobody() {
        let programs = Programs::default();
        assert!(programs.of(0).is_none());
        assert!(programs.of(u32::MAX).is_none());
        let mut gone = Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        assert!(programs.of(gone.id()).is_none());
    }

    #[test]
    fn a_name_may_have_any_character() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        let run = parse_stat(9, &format!("9 (a) (b c) {tail}")).unwrap();
        assert_eq!((run.name.as_str(), run.started), ("a) (b c", 4711));
        assert!(parse_stat(9, "9 (cut").is_none());
    }

    #[test]
    fn kdes_workers_are_told_apart_by_their_library() {
        let line =
            b"/usr/libexec/kf6/kioworker\0/usr/lib/qt6/plugins/kf6/kio/thumbnail.so\0thumbnail\0";
        assert_eq!(library_in(line).as_deref(), Some("thumbnail.so"));
        assert_eq!(library_in(b"kioworker\0"), None);
        let dir = tempfile::tempdir().unwrap();
        let (worker, library) =
            (copy_of_cat(dir.path(), KDE_WORKERS[0]), dir.path().join("thumbnail.so"));
        assert!(Command::new("mkfifo").arg(&library).status().unwrap().success());
        let one = Waiting::new(Command::new(&worker).arg(&library));
        assert_eq!(names(one.0.id(), "thumbnail.so")[..2], ["thumbnail.so", KDE_WORKERS[0]]);
    }
}
