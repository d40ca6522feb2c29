//! What this mount and this kernel agreed on at the beginning, and what turned out since.

use crate::notify::has_epochs;
use crate::session::Passthrough;
use fuser::{InitFlags, KernelConfig, Version};
use rustix::io::Errno;
use rustix::thread::CapabilitySet;
use std::io;
use std::sync::{OnceLock, RwLock};
use std::time::Duration;

/// The longest request, in bytes: one round trip to the daemon moves this much.
pub(crate) const MAX_WRITE_BYTES: u32 = 1 << 20;
/// Requests that the kernel sends without a program waiting for each: read-ahead above all.
const MAX_BACKGROUND: u16 = 64;
/// Where it begins to hold more of them back.
const CONGESTION: u16 = 48;
/// How deep file systems may be stacked: a backing file may itself lie on overlayfs, as in a
/// container; the price is that no overlayfs can be put on top of the drive.
const STACK_DEPTH: u32 = 2;
/// How long a kernel that cannot be told "everything may have changed" may believe what it knows.
const MAX_VALID_WITHOUT_EPOCHS: Duration = Duration::from_secs(30);

/// Shared by the adapter, which finds it out, and the mount, which tells it.
pub(crate) struct Negotiated {
    passthrough: RwLock<Passthrough>,
    abi: OnceLock<Version>,
    strips_set_id_bits: bool,
}

impl Negotiated {
    pub(crate) fn new(passthrough_wanted: bool) -> Self {
        let passthrough = match passthrough_wanted {
            true => Passthrough::Active,
            false => Passthrough::Unavailable("turned off".into()),
        };
        Self {
            passthrough: RwLock::new(passthrough),
            abi: OnceLock::new(),
            strips_set_id_bits: has_capability(CapabilitySet::FSETID),
        }
    }

    /// Answers the kernel's first request.
    pub(crate) fn init(&self, config: &mut KernelConfig) -> io::Result<()> {
        self.abi.get_or_init(|| config.kernel_abi());
        self.check_passthrough(config.capabilities());
        let mut wanted = wanted_always();
        if self.passthrough() == Passthrough::Active {
            wanted |= InitFlags::FUSE_PASSTHROUGH;
        }
        config
            .add_capabilities(wanted & config.capabilities())
            .map_err(|missing| io::Error::other(format!("the kernel lacks {missing:?}")))?;
        let out_of_range = |nearest| io::Error::other(format!("the kernel allows {nearest}"));
        config.set_max_write(MAX_WRITE_BYTES).map_err(out_of_range)?;
        // The kernel offers what its own read-ahead is; more is set through the bdi.
        if let Err(largest) = config.set_max_readahead(MAX_WRITE_BYTES) {
            config.set_max_readahead(largest).map_err(out_of_range)?;
        }
        config.set_max_background(MAX_BACKGROUND).map_err(|n| out_of_range(n.into()))?;
        config.set_congestion_threshold(CONGESTION).map_err(|n| out_of_range(n.into()))?;
        if self.passthrough() == Passthrough::Active {
            config.set_max_stack_depth(STACK_DEPTH).map_err(out_of_range)?;
        }
        Ok(())
    }

    fn check_passthrough(&self, offered: InitFlags) {
        if !offered.contains(InitFlags::FUSE_PASSTHROUGH) {
            self.give_up_passthrough("the kernel has none (6.9 is the first)");
        } else if !has_capability(CapabilitySet::SYS_ADMIN) {
            self.give_up_passthrough("the daemon has no right to it (CAP_SYS_ADMIN)");
        }
    }

    fn give_up_passthrough(&self, reason: &str) {
        let mut state = self.passthrough.write().unwrap_or_else(|e| e.into_inner());
        if *state == Passthrough::Active {
            tracing::info!(reason, "no passthrough");
            *state = Passthrough::Unavailable(reason.to_owned());
        }
    }

    pub(crate) fn passthrough(&self) -> Passthrough {
        self.passthrough.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Whether it is worth asking the kernel for a backing id.
    pub(crate) fn may_pass_through(&self) -> bool {
        *self.passthrough.read().unwrap_or_else(|e| e.into_inner()) == Passthrough::Active
    }

    /// The kernel refused a backing id; what concerns one file only, such as a backing file on
    /// too many stacked file systems, does not end it for the others.
    pub(crate) fn refused_passthrough(&self, error: &io::Error) {
        match Errno::from_io_error(error) {
            Some(Errno::PERM) => {
                self.give_up_passthrough("the daemon has no right to it (CAP_SYS_ADMIN)");
            }
            Some(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => {
                self.give_up_passthrough("the kernel refused it");
            }
            _ => tracing::debug!(%error, "a file cannot be passed through"),
        }
    }

    /// The kernel's version of the protocol.
    pub(crate) fn abi(&self) -> Version {
        self.abi.get().copied().unwrap_or(Version(7, 0))
    }

    /// How long the kernel may believe an answer: as long as the drive says, where it can be
    /// told later that everything may have changed.
    pub(crate) fn valid_for(&self, drive_says: Duration) -> Duration {
        match has_epochs(self.abi()) {
            true => drive_says,
            false => drive_says.min(MAX_VALID_WITHOUT_EPOCHS),
        }
    }

    /// Whether the kernel drops the pages of other handles, and of mappings, that are written to
    /// past them: from 6.6, the first that speaks this version.
    pub(crate) fn drops_written_pages(&self) -> bool {
        let Version(major, minor) = self.abi();
        (major, minor) >= (7, 39)
    }

    /// Whether set-id bits of a changed file must be taken off by the adapter: with
    /// `HANDLE_KILLPRIV_V2` the kernel leaves it to the daemon, whose own writes have that
    /// effect unless it has CAP_FSETID.
    pub(crate) fn strips_set_id_bits(&self) -> bool {
        self.strips_set_id_bits
    }
}

/// Not among them, on purpose: `WRITEBACK_CACHE`, which excludes passthrough and would hold
/// writes back from the drive; `DONT_MASK`, so that the kernel applies the umask.
fn wanted_always() -> InitFlags {
    // Listings with attributes when somebody asks for attributes: `ls -l` in one round trip per
    // hundred entries.
    InitFlags::FUSE_DO_READDIRPLUS
        | InitFlags::FUSE_READDIRPLUS_AUTO
        | InitFlags::FUSE_PARALLEL_DIROPS
        | InitFlags::FUSE_CACHE_SYMLINKS
        | InitFlags::FUSE_ASYNC_DIO
        // `open(O_TRUNC)` is one request instead of two.
        | InitFlags::FUSE_ATOMIC_O_TRUNC
        // Pages of a file that changed on disk go when its new mtime is seen.
        | InitFlags::FUSE_AUTO_INVAL_DATA
        // Locks are the drive's: they hold also against programs beside this mount, and on
        // other devices.
        | InitFlags::FUSE_POSIX_LOCKS
        | InitFlags::FUSE_FLOCK_LOCKS
        // Without it, every write asks for the extended attribute `security.capability` first.
        | InitFlags::FUSE_HANDLE_KILLPRIV_V2
}

fn has_capability(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}
