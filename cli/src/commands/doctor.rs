//! `sd doctor`: looks at everything that may be wrong on this device.

mod kernel;

use super::Context;
use crate::args::DoctorArgs;
use crate::control::{Event, Request};
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use crate::output::{Columns, size};
use crate::reply::{Check, Diagnosis, Status};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

pub fn run(context: &Context, args: &DoctorArgs) -> Outcome<()> {
    let mut checks = Checks::default();
    if let Some(dir) = checks.take("data directory", context.data_dir(), |dir| {
        format!("{} can be used", dir.path().display())
    }) {
        private(&mut checks, &dir);
        free_space(&mut checks, &dir);
        checks.take("configuration", context.config(&dir), |_| "every key is understood".into());
    }
    fuse(&mut checks);
    watches(&mut checks);
    // First, so that the daemon's own problems are those that are left.
    let compared = compare(context, args);
    let status = context.call::<Status>(&Request::Status);
    if let Some(status) = checks.take("daemon", status, running) {
        parts(&mut checks, &status);
        match compared {
            Ok(found) => checks.0.extend(found),
            Err(failure) => checks.add("check", "problem", failure.message, failure.hint),
        }
        checks.0.extend(kernel::compare(context, &status.mounts, args.repair));
    }
    checks.tell(context, args.repair)
}

/// What the daemon finds when it compares what it keeps, and mends.
fn compare(context: &Context, args: &DoctorArgs) -> Outcome<Vec<Check>> {
    let client = context.client()?;
    let bar = context.out.spinner();
    let request = Request::Check { repair: args.repair, quick: args.quick };
    let found = client.call(&request, |event| match event {
        Event::Progress(progress) => {
            bar.set_message(format!("{}: {}", progress.what, progress.entries));
            Ok(None)
        }
        event => super::unexpected(event),
    });
    bar.finish_and_clear();
    found
}

fn running(status: &Status) -> String {
    let version = status.daemon.version.as_deref().unwrap_or("?");
    format!("runs, version {version}, {} of memory", size(status.memory.rss_bytes))
}

/// The findings so far.
#[derive(Default)]
struct Checks(Vec<Check>);

impl Checks {
    fn add(&mut self, name: &str, result: &str, message: String, hint: Option<String>) {
        let (name, result) = (name.into(), result.into());
        self.0.push(Check { name, result, message, hint });
    }

    fn ok(&mut self, name: &str, message: impl Into<String>) {
        self.add(name, "ok", message.into(), None);
    }

    fn problem(&mut self, name: &str, message: impl Into<String>, hint: impl Into<String>) {
        self.add(name, "problem", message.into(), Some(hint.into()));
    }

    fn take<T>(
        &mut self,
        name: &str,
        outcome: Outcome<T>,
        words: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.ok(name, words(&value));
                Some(value)
            }
            Err(failure) => {
                self.add(name, "problem", failure.message, failure.hint);
                None
            }
        }
    }

    fn tell(self, context: &Context, repaired: bool) -> Outcome<()> {
        let problems = self.0.iter().filter(|c| c.result == "problem").count();
        let diagnosis = Diagnosis { ok: problems == 0, checks: self.0 };
        context.out.report(&diagnosis, |diagnosis| {
            let mut table = Columns::new(&["check", "result", ""]);
            for check in &diagnosis.checks {
                table.row([&check.name, &check.result, &check.message]);
            }
            table.to_string()
        })?;
        for check in diagnosis.checks.iter().filter(|c| c.result == "problem") {
            if let Some(hint) = &check.hint {
                context.out.hint(format_args!("{}: {hint}", check.name));
            }
        }
        match problems {
            0 => Ok(()),
            count => {
                let failure = Failure::new(Code::Invalid, format!("{count} problems were found"));
                Err(match repaired {
                    true => failure,
                    false => failure.hint("`sd doctor --repair` mends what can be mended"),
                })
            }
        }
    }
}

fn private(checks: &mut Checks, dir: &DataDir) {
    let open: Vec<_> =
        [dir.path().to_owned(), dir.identity(), dir.library(), dir.path().join("sock")]
            .into_iter()
            .filter(|path| mode(path).is_some_and(|mode| mode & 0o077 != 0))
            .map(|path| path.display().to_string())
            .collect();
    match open.as_slice() {
        [] => checks.ok("privacy", "only this user can read the data directory"),
        open => checks.problem(
            "privacy",
            format!("others may read {}", open.join(", ")),
            format!("chmod -R go= {}", dir.path().display()),
        ),
    }
}

fn mode(path: &Path) -> Option<u32> {
    fs::metadata(path).ok().map(|m| m.permissions().mode())
}

fn free_space(checks: &mut Checks, dir: &DataDir) {
    match rustix::fs::statvfs(dir.path()) {
        Ok(disk) => checks.ok("disk", format!("{} are free", size(disk.f_bavail * disk.f_frsize))),
        Err(e) => checks.problem("disk", format!("cannot be asked: {e}"), "check the disk"),
    }
}

fn fuse(checks: &mut Checks) {
    let helper = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| dir.join("fusermount3").is_file())
    });
    let device =
        rustix::fs::access("/dev/fuse", rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK);
    match (device, rustix::process::geteuid().is_root() || helper) {
        (Ok(()), true) => checks.ok("fuse", "the kernel and this user can mount"),
        (Ok(()), false) => checks.problem(
            "fuse",
            "fusermount3 is not installed, and this user is not root",
            "install the package fuse3",
        ),
        (Err(e), _) => checks.problem(
            "fuse",
            format!("/dev/fuse cannot be used: {e}"),
            "modprobe fuse, or chmod 666 /dev/fuse; a container needs --device /dev/fuse",
        ),
    }
}

fn watches(checks: &mut Checks) {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_user_watches");
    match limit.ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(limit) => checks.ok("watches", format!("{limit} directories can be watched")),
        None => checks.add("watches", "note", "the system does not tell its limit".into(), None),
    }
}

fn parts(checks: &mut Checks, status: &Status) {
    match &status.library {
        Some(library) => {
            checks.ok("library", format!("“{}”, {} devices", library.name, status.devices.len()))
        }
        None => {
            let failure = super::no_library();
            checks.add("library", "note", failure.message, failure.hint);
        }
    }
    checks.ok(
        "index",
        format!("{} entries, {} on disk", status.index.entries, size(status.index.bytes)),
    );
    writing(checks, status);
    let online = status.devices.iter().filter(|d| d.online).count();
    checks.ok("devices", format!("{online} of {} online", status.devices.len()));
    for problem in &status.problems {
        checks.problem(&problem.code, &problem.message, &problem.hint);
    }
}

/// What was damaged is among the status's problems.
fn writing(checks: &mut Checks, status: &Status) {
    let journal = &status.journal;
    let waits = status.pending.count;
    let on_disk = size(journal.bytes);
    match journal.torn_tail {
        false if journal.set_aside.is_empty() => {
            checks.ok("journal", format!("{} changes wait, {on_disk} on disk", waits.operations))
        }
        false => {}
        true => checks.add(
            "journal",
            "note",
            format!(
                "{} changes wait, {on_disk} on disk; its last record was cut off by a crash \
                 and had not been acknowledged",
                waits.operations
            ),
            None,
        ),
    }
    let staged = size(journal.staged_bytes);
    match journal.orphan_bytes {
        0 => checks.ok("staging", format!("{staged} of written bytes are kept")),
        orphans => checks.add(
            "staging",
            "mended",
            format!("{staged} are kept; {} that nothing needed were given back", size(orphans)),
            None,
        ),
    }
    match status.conflicts {
        0 => checks.ok("conflicts", "none"),
        several => {
            checks.add("conflicts", "note", format!("{several} to look at: `sd conflicts`"), None)
        }
    }
}
