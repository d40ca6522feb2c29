//! What the kernel shows through a mount, beside what the drive says at the same time.
//!
//! A kernel answers from what it remembers, for up to an hour, so long as nothing was told to it.
//! Whatever of that is not so any more is a bug of the drive or of the kernel. It is looked at
//! from this process, as any program would: the daemon never asks its own mounts.

use crate::commands::Context;
use crate::control::{Request, WirePath};
use crate::failure::Outcome;
use crate::output::printable;
use crate::reply::{Check, MountStatus, Shown};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A kernel is told of a change within a second; what it shows otherwise for longer stays so.
const SETTLE: Duration = Duration::from_millis(2500);
/// How long a mount may take for all of it.
const PATIENCE: Duration = Duration::from_secs(60);
/// Paths that are named, of however many differ.
const EXAMPLES: usize = 5;
/// Entries of which the kernel is told again at once.
const TOLD_AT_ONCE: usize = 32;

/// Compares each mount; has what the kernel should forget told to it, if that is wanted.
pub fn compare(context: &Context, mounts: &[MountStatus], repair: bool) -> Vec<Check> {
    let alive = mounts.iter().filter(|mount| mount.alive);
    alive.map(|mount| one(context, &mount.mountpoint, repair)).collect()
}

fn one(context: &Context, mountpoint: &str, repair: bool) -> Check {
    let found = examine(context, mountpoint, repair);
    let (result, message, hint) = found.unwrap_or_else(|failure| {
        let hint = failure.hint.unwrap_or_else(|| "see the log".into());
        ("problem", failure.message, Some(hint))
    });
    Check { name: format!("kernel {mountpoint}"), result: result.into(), message, hint }
}

type Found = (&'static str, String, Option<String>);

fn examine(context: &Context, mountpoint: &str, repair: bool) -> Outcome<Found> {
    let Some((looked, stale)) = look_twice(context, mountpoint)? else {
        let hint = "see what the daemon is doing: its log is sd.log in the data directory";
        return Ok(("problem", "the mount does not answer".into(), Some(hint.into())));
    };
    if stale.is_empty() {
        return Ok(("ok", format!("{looked} entries are shown as they are"), None));
    }
    let message = words(&stale);
    if !repair {
        let hint = "`sd doctor --repair` has the kernel forget them";
        return Ok(("problem", message, Some(hint.into())));
    }
    for some in stale.chunks(TOLD_AT_ONCE) {
        let paths = some.iter().map(|stale| stale.shown.path.clone()).collect();
        let mountpoint = WirePath::from(Path::new(mountpoint));
        context.call::<()>(&Request::ShowAgain { mountpoint, paths })?;
    }
    match look_twice(context, mountpoint)? {
        Some((_, left)) if left.is_empty() => {
            Ok(("mended", format!("{message}; the kernel forgot them"), None))
        }
        _ => Ok(("problem", message, Some("unmount the drive and mount it again".into()))),
    }
}

/// How many entries were looked at, and those that stay different; `None`: no answer.
fn look_twice(context: &Context, mountpoint: &str) -> Outcome<Option<(usize, Vec<Stale>)>> {
    let Some((looked, first)) = look(context, mountpoint)? else { return Ok(None) };
    if first.is_empty() {
        return Ok(Some((looked, first)));
    }
    // It may just change; what is the same on both sides then does not.
    thread::sleep(SETTLE);
    let Some((_, second)) = look(context, mountpoint)? else { return Ok(None) };
    let still = second.into_iter().filter(|stale| first.contains(stale)).collect();
    Ok(Some((looked, still)))
}

fn look(context: &Context, mountpoint: &str) -> Outcome<Option<(usize, Vec<Stale>)>> {
    let root = PathBuf::from(mountpoint);
    let request = Request::Shown { mountpoint: WirePath::from(&*root) };
    let shown: Vec<Shown> = context.call(&request)?;
    let (done, looked) = mpsc::channel();
    // Beside this thread, because the mount may not answer at all.
    thread::spawn(move || {
        let count = shown.len();
        let device = root.symlink_metadata().map_or(0, |metadata| metadata.dev());
        let stale = |shown| Stale::of((&root, device), shown);
        let stale = shown.into_iter().filter_map(stale).collect();
        // Too late for whoever asked.
        let _ = done.send((count, stale));
    });
    Ok(looked.recv_timeout(PATIENCE).ok())
}

/// An entry that the kernel shows as something else.
#[derive(Debug, PartialEq, Eq)]
struct Stale {
    shown: Shown,
    /// `None`: it is not there.
    seen: Option<Seen>,
}

/// What a program sees.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    ino: u64,
    file_type: u32,
    size: u64,
    mtime: (i64, u32),
}

impl Stale {
    fn of((root, device): (&Path, u64), shown: Shown) -> Option<Self> {
        let path = root.join(PathBuf::from(shown.path.clone()));
        let seen = match path.symlink_metadata() {
            // Something is mounted there, or above.
            Ok(metadata) if metadata.dev() != device => return None,
            Ok(metadata) => Some(Seen::of(&metadata)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            // Whatever is in the way, it is not what the kernel remembers.
            Err(_) => return None,
        };
        let Shown { ino, file_type, size, mtime, .. } = shown;
        let is_so = seen == Some(Seen { ino, file_type, size, mtime });
        (!is_so).then_some(Self { shown, seen })
    }
}

impl Seen {
    fn of(metadata: &std::fs::Metadata) -> Self {
        const TYPE: u32 = 0o170_000;
        Self {
            ino: metadata.ino(),
            file_type: metadata.mode() & TYPE,
            size: metadata.size(),
            mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
        }
    }
}

fn words(stale: &[Stale]) -> String {
    let path = |stale: &Stale| {
        let path = PathBuf::from(stale.shown.path.clone());
        printable(&path.display().to_string()).into_owned()
    };
    let examples: Vec<_> = stale.iter().take(EXAMPLES).map(path).collect();
    format!("{} entries are shown as they were: {}", stale.len(), examples.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// What the drive would say of an entry that is shown as it is.
    fn shown(root: &Path, path: &str) -> Shown {
        let Seen { ino, file_type, size, mtime } =
            Seen::of(&root.join(path).symlink_metadata().unwrap());
        Shown { path: WirePath::from(Path::new(path)), ino, file_type, size, mtime }
    }

    #[test]
    fn what_is_shown_otherwise_than_the_drive_says_is_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        fs::write(dir.path().join("dir/file"), "four").unwrap();
        let device = dir.path().symlink_metadata().unwrap().dev();
        let stale = |shown| Stale::of((dir.path(), device), shown);
        let (folder, file) = (shown(dir.path(), "dir"), shown(dir.path(), "dir/file"));
        assert!(stale(folder.clone()).is_none() && stale(file.clone()).is_none());
        for other in [
            Shown { size: 5, ..file.clone() },
            Shown { ino: file.ino + 1, ..file.clone() },
            Shown { file_type: folder.file_type, ..file.clone() },
            Shown { mtime: (file.mtime.0, file.mtime.1 ^ 1), ..file.clone() },
        ] {
            let seen = stale(other).unwrap().seen.unwrap();
            assert_eq!((seen.ino, seen.size), (file.ino, 4));
        }
        let gone = Shown { path: WirePath::from(Path::new("dir/gone")), ..file.clone() };
        let gone = stale(gone).unwrap();
        assert!(gone.seen.is_none());
        assert_eq!(words(&[gone]), "1 entries are shown as they were: dir/gone");
        let mounted = Stale::of((dir.path(), device + 1), Shown { size: 5, ..file });
        assert!(mounted.is_none(), "of another file system nothing is known");
    }
}
