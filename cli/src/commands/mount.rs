//! `sd mount`, `sd unmount`.

use super::Context;
use crate::args::{MountArgs, UnmountArgs};
use crate::control::{Request, WirePath};
use crate::failure::{Code, Failure, Outcome};
use crate::output::Output;
use crate::paths;
use crate::reply::{MountReply, MountStatus, PendingCount, UnmountReply};
use std::path::{Path, PathBuf};

pub fn mount(context: &Context, args: &MountArgs) -> Outcome<()> {
    let given = args.mountpoint.as_deref().map(paths::spelled).transpose()?;
    let home = directories::BaseDirs::new().map(|dirs| dirs.home_dir().to_owned());
    let request = Request::Mount {
        mountpoint: given.as_deref().map(WirePath::from),
        home: home.as_deref().map(WirePath::from),
        read_only: args.read_only,
        allow_other: args.allow_other,
    };
    let reply: MountReply = context.call(&request)?;
    told(context.out, &reply);
    context.out.report(&reply, |reply| reply.mount.mountpoint.clone())?;
    match args.foreground {
        true => stay(context, PathBuf::from(&reply.mount.mountpoint)),
        false => Ok(()),
    }
}

fn told(out: Output, reply: &MountReply) {
    let MountStatus { mountpoint, passthrough, .. } = &reply.mount;
    if reply.mended {
        out.note(format_args!("mended the dead mount on {mountpoint}"));
    }
    if reply.already {
        out.note("it is mounted already");
    }
    if passthrough != "active" {
        out.note(format_args!("local files go through the daemon: {passthrough}"));
    }
}

/// Until interrupted; then unmounts.
fn stay(context: &Context, mountpoint: PathBuf) -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::io("cannot wait for signals", e))?;
    runtime
        .block_on(crate::daemon::stop_signal())
        .map_err(|e| Failure::io("cannot wait for signals", e))?;
    let request = Request::Unmount { mountpoint: Some(WirePath::from(&*mountpoint)), force: false };
    context.call::<UnmountReply>(&request).map(drop)
}

pub fn unmount(context: &Context, args: &UnmountArgs) -> Outcome<()> {
    let mountpoint = args.mountpoint.as_deref().map(paths::spelled).transpose()?;
    let reply = match context.running_client()? {
        Some(client) => {
            let mountpoint = mountpoint.as_deref().map(WirePath::from);
            client.call(&Request::Unmount { mountpoint, force: args.force }, super::unexpected)?
        }
        None => detach_dead(context, mountpoint)?,
    };
    context.out.report(&reply, |_| String::new())?;
    context.out.note(format_args!("unmounted {}", reply.mountpoint));
    super::pending::tell_what_waits(
        context.out,
        reply.pending,
        "the daemon goes on delivering them without the mount",
    );
    Ok(())
}

/// Without a daemon only the remains of one can be there.
fn detach_dead(context: &Context, mountpoint: Option<PathBuf>) -> Outcome<UnmountReply> {
    let dir = context.located()?;
    let recorded = || crate::daemon::recorded_mounts(&dir).into_iter().map(|r| r.mountpoint);
    let candidates: Vec<PathBuf> = mountpoint.map_or_else(|| recorded().collect(), |m| vec![m]);
    for path in &candidates {
        if mount_fuse::mend(path).map_err(|e| crate::daemon::mount_failure(&e))? {
            let mountpoint = path.display().to_string();
            return Ok(UnmountReply { mountpoint, pending: PendingCount::default() });
        }
    }
    Err(not_mounted(candidates.first().map(PathBuf::as_path)))
}

/// The failure for a mount point with no drive of this device.
pub fn not_mounted(path: Option<&Path>) -> Failure {
    match path {
        Some(path) => Failure::new(
            Code::NotFound,
            format!("no drive of this device is mounted on {}", path.display()),
        )
        .hint("`sd status` shows where it is mounted"),
        None => {
            Failure::new(Code::NotFound, "the drive is not mounted").hint("`sd mount` mounts it")
        }
    }
}
