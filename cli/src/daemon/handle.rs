//! One request, one function.

use super::check::Asked;
use super::parts::index_failure;
use super::parts::{Daemon, blocking};
use super::serve::Link;
use crate::control::Request;
use crate::failure::{Code, Failure, Outcome};
use crate::reply::{CacheStatus, Cleared, Stopped};
use serde::Serialize;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Answers a request; events on the way go through `link`.
pub async fn handle(daemon: Arc<Daemon>, request: Request, mut link: Link) -> Outcome<Value> {
    match request {
        Request::LibraryCreate { name, device_name } => {
            document(blocking(move || daemon.create_library(&name, device_name.as_deref())).await?)
        }
        Request::LibraryInfo => document(daemon.library_info()?),
        Request::Invite { expires_s, wait } => {
            document(daemon.invite(Duration::from_secs(expires_s), wait, &link).await?)
        }
        Request::Join { ticket, device_name } => {
            document(daemon.join(&ticket, device_name.as_deref(), &mut link).await?)
        }
        Request::DeviceRename { old, new } => {
            document(blocking(move || daemon.rename_device(old.as_deref(), &new)).await?)
        }
        Request::DeviceRemove { device, dry_run } => {
            document(daemon.remove_device(&device, dry_run).await?)
        }
        Request::LocationAdd(new) => document(daemon.add_location(new, &link).await?),
        Request::LocationRemove { name, dry_run } => {
            document(blocking(move || daemon.remove_location(&name, dry_run)).await?)
        }
        Request::LocationRescan { name, wait } => {
            document(daemon.rescan_location(&name, wait, &link).await?)
        }
        Request::Mount { mountpoint, home, read_only, allow_other } => {
            let (mountpoint, home) = (mountpoint.map(Into::into), home.map(Into::into));
            let mounted = move || daemon.mount(mountpoint, home, read_only, allow_other);
            document(blocking(mounted).await?)
        }
        Request::Unmount { mountpoint, force } => {
            let mountpoint = mountpoint.map(Into::into);
            document(blocking(move || daemon.unmount(mountpoint, force)).await?)
        }
        Request::Status => document(blocking(move || Ok(daemon.status())).await?),
        Request::List { target, recursive } => {
            document(blocking(move || daemon.list(&target, recursive, &link)).await?)
        }
        Request::Tree { target, levels } => {
            document(blocking(move || daemon.tree(&target, levels, &link)).await?)
        }
        Request::Info { target } => document(blocking(move || daemon.info(&target)).await?),
        Request::Sync { target, timeout_ms } => {
            let timeout = timeout_ms.map(Duration::from_millis);
            document(daemon.sync(target.as_ref(), timeout, &link).await?)
        }
        Request::Pending => document(blocking(move || daemon.pending(&link)).await?),
        Request::PendingExport { of, to, forget, dry_run } => {
            let to = PathBuf::from(to);
            document(blocking(move || daemon.export(&of, &to, forget, dry_run)).await?)
        }
        Request::Conflicts => document(blocking(move || Ok(daemon.conflicts())).await?),
        Request::ConflictsResolve { ids, keep, export, dry_run } => {
            let export = export.map(PathBuf::from);
            let resolved = move || daemon.resolve_conflicts(&ids, keep, export.as_deref(), dry_run);
            document(blocking(resolved).await?)
        }
        Request::Pin { targets } => document(blocking(move || daemon.pin(&targets)).await?),
        Request::Pins => document(blocking(move || daemon.list_pins()).await?),
        Request::PinWait { targets, timeout_ms } => {
            let timeout = timeout_ms.map(Duration::from_millis);
            document(daemon.wait_pinned(targets, timeout, &link).await?)
        }
        Request::Unpin { targets } => document(blocking(move || daemon.unpin(&targets)).await?),
        Request::Evict { targets, dry_run } => {
            document(blocking(move || daemon.evict(&targets, dry_run)).await?)
        }
        Request::CacheClear { dry_run } => {
            document(blocking(move || daemon.clear_cache(dry_run)).await?)
        }
        Request::CacheLimit { bytes } => {
            document(blocking(move || Ok(daemon.limit_cache(bytes))).await?)
        }
        Request::Check { repair, quick } => {
            document(daemon.check(Asked { repair, quick }, link).await?)
        }
        Request::Shown { mountpoint } => {
            document(blocking(move || daemon.shown(&PathBuf::from(mountpoint))).await?)
        }
        Request::ShowAgain { mountpoint, paths } => {
            let told = move || daemon.show_again(&PathBuf::from(mountpoint), paths);
            document(blocking(told).await?)
        }
        Request::Stop { force } => document(daemon.stop(force).await?),
    }
}

fn document(reply: impl Serialize) -> Outcome<Value> {
    serde_json::to_value(reply).map_err(|e| Failure::new(Code::Internal, e.to_string()))
}

impl Daemon {
    fn clear_cache(&self, dry_run: bool) -> Outcome<Cleared> {
        self.pins.catch_up().map_err(index_failure)?;
        let freed_bytes = match dry_run {
            true => self.cache.clearable_bytes(),
            false => self.cache.clear(),
        };
        let stats = self.cache.stats();
        let kept = if dry_run { freed_bytes } else { 0 } + stats.held_bytes;
        Ok(Cleared {
            freed_bytes,
            pinned_bytes: stats.held_bytes,
            open_bytes: stats.bytes.saturating_sub(kept),
        })
    }

    fn limit_cache(&self, bytes: Option<u64>) -> CacheStatus {
        if let Some(bytes) = bytes {
            self.cache.set_limit(bytes);
            self.pins.try_again();
        }
        self.cache_status()
    }

    /// Stops unless a mount is in use; `force` detaches such a mount.
    async fn stop(self: &Arc<Self>, force: bool) -> Outcome<Stopped> {
        let remains = match force {
            true => self.unmount_all().await,
            false => {
                self.unmount_idle().await?;
                Vec::new()
            }
        };
        let pending = self.pending_count();
        self.request_stop();
        Ok(Stopped { pid: Some(std::process::id()), remains, pending })
    }
}
