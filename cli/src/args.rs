//! The command line as typed: help, man pages and completions come from here.
//!
//! What a value means (a name, an address, a size) is checked where it is used;
//! here stands only what `sd` accepts and what its help says.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

/// One mounted drive over every device you own.
#[derive(Parser, Debug)]
#[command(
    name = "sd",
    version,
    about,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.\n\
                  An ADDRESS is sd://DEVICE/LOCATION/PATH, sd://content/BLAKE3, a path inside a mount, \
                  or a local path inside one of this device's locations."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Args, Debug, Clone, Default)]
pub struct Global {
    /// Where everything of this device is kept; two directories are two devices
    #[arg(long, global = true, env = "SD_DATA_DIR", value_name = "DIR", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Set a configuration key for this command and for a daemon that it starts
    #[arg(long, global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Create or show the library: the set of devices that trust each other
    #[command(subcommand)]
    Library(LibraryCommand),
    /// Invite, join, list, rename and remove devices
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Add, list, remove and rescan folders of this device that the library can see
    #[command(subcommand)]
    Location(LocationCommand),
    /// Mount the drive
    Mount(MountArgs),
    /// Unmount the drive
    Unmount(UnmountArgs),
    /// Show devices, locations, mounts, cache and problems
    Status(StatusArgs),
    /// List a directory from the index, also of a device that is offline
    Ls(LsArgs),
    /// Show a directory and all below it, from the index
    Tree(TreeArgs),
    /// Show what is known of one file or directory, and who holds its content
    Info(InfoArgs),
    /// Wait until writes to other devices' files have reached their owners
    Sync(SyncArgs),
    /// Show which writes wait for which device, and why; export them
    Pending(PendingArgs),
    /// Show changes that met others', and say what is to become of them
    Conflicts(ConflictsArgs),
    /// Keep files and folders of other devices on this one; without an address, list what is kept
    Pin(PinArgs),
    /// No longer keep what was pinned; what is here of it goes when the cache needs room
    Unpin(UnpinArgs),
    /// Give back the space of what is cached of a file, or of all below a folder
    Evict(EvictArgs),
    /// Show, clear or limit the content cache
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Run, stop or look at this device's daemon
    #[command(subcommand)]
    Daemon(DaemonCommand),
    /// Get, set or list configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Check this device: index against disks and owners, kept bytes, daemon, mounts
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages into a directory
    #[command(hide = true)]
    Man {
        /// An existing directory
        dir: PathBuf,
    },
}

#[derive(Subcommand, Debug)]
pub enum LibraryCommand {
    /// Create a library with this device as its first member
    Create {
        /// What you call it
        name: String,
        /// What this device is called in it [default: the host name]
        #[arg(long, value_name = "NAME")]
        device_name: Option<String>,
    },
    /// List the libraries of this device
    List,
    /// Show the library and its members
    Info,
}

#[derive(Subcommand, Debug)]
pub enum DeviceCommand {
    /// Print a single-use ticket for one more device, and wait until it has joined
    Invite {
        /// How long the ticket is good for
        #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
        expires: Duration,
        /// Do not wait for the join
        #[arg(long)]
        detach: bool,
    },
    /// Join the library of the device that printed this ticket
    Join {
        /// The ticket, from `sd device invite`
        ticket: String,
        /// What this device is called in the library [default: the host name]
        #[arg(long, value_name = "NAME")]
        device_name: Option<String>,
        /// Do not ask whether the codes are equal
        #[arg(long)]
        yes: bool,
    },
    /// List the members: online or when last seen, path, round-trip time
    List,
    /// Give a device another name
    #[command(override_usage = "sd device rename [OLD] <NEW>")]
    Rename {
        /// The new name of this device; or the device's old name and its new one
        #[arg(value_name = "NAME", num_args = 1..=2, required = true)]
        names: Vec<String>,
    },
    /// Remove a device from the library: it gets nothing any more, at once
    Remove {
        /// Its name
        device: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Subcommand, Debug)]
pub enum LocationCommand {
    /// Let the library see a folder of this device; indexing goes on in the background
    Add {
        /// The folder
        path: PathBuf,
        /// Its name in the drive [default: the folder's own]
        #[arg(long)]
        name: Option<String>,
        /// Nobody may write to it through the drive
        #[arg(long)]
        read_only: bool,
        /// Only these devices may see it [default: all]
        #[arg(long, value_name = "DEVICE", num_args = 1.., value_delimiter = ',')]
        share_with: Vec<String>,
        /// Wait until it is indexed
        #[arg(long)]
        wait: bool,
    },
    /// List the locations of all devices
    List,
    /// Take a location of this device out of the library; its files stay where they are
    Remove {
        /// Its name
        name: String,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Compare a location of this device with the disk again
    Rescan {
        /// Its name
        name: String,
        /// Wait until it is indexed
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Args, Debug)]
pub struct MountArgs {
    /// An empty directory [default: /mnt/spacedrive where writable, else ~/Spacedrive]
    pub mountpoint: Option<PathBuf>,
    /// Nobody can write through this mount
    #[arg(long)]
    pub read_only: bool,
    /// Other users of this machine may use it
    #[arg(long)]
    pub allow_other: bool,
    /// Stay until interrupted, then unmount
    #[arg(long)]
    pub foreground: bool,
}

#[derive(Args, Debug)]
pub struct UnmountArgs {
    /// Where it is mounted [default: the only mount]
    pub mountpoint: Option<PathBuf>,
    /// Detach it although programs still use it
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Show it again every second, until interrupted
    #[arg(long)]
    pub watch: bool,
}

#[derive(Args, Debug)]
pub struct LsArgs {
    /// What to list [default: all devices]
    pub address: Option<PathBuf>,
    /// Mode, size and time too
    #[arg(short, long)]
    pub long: bool,
    /// Everything below it
    #[arg(short = 'R', long)]
    pub recursive: bool,
}

#[derive(Args, Debug)]
pub struct TreeArgs {
    /// Where to begin [default: all devices]
    pub address: Option<PathBuf>,
    /// How many levels to show
    #[arg(short = 'L', long, value_name = "LEVELS", value_parser = clap::value_parser!(u32).range(1..))]
    pub level: Option<u32>,
}

#[derive(Args, Debug)]
pub struct InfoArgs {
    /// The file or directory
    pub address: PathBuf,
}

#[derive(Args, Debug)]
pub struct PinArgs {
    /// Files, folders or locations of other devices
    #[arg(value_name = "ADDRESS")]
    pub addresses: Vec<PathBuf>,
    /// Wait until all of it is here; without an address, all that is pinned
    #[arg(long)]
    pub wait: bool,
    /// Give up waiting after this time, such as 30s; without it the wait has no end
    #[arg(long, value_name = "DURATION", value_parser = duration, requires = "wait")]
    pub timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub struct UnpinArgs {
    /// What was pinned, as `sd pin` lists it
    #[arg(value_name = "ADDRESS", required = true)]
    pub addresses: Vec<PathBuf>,
}

#[derive(Args, Debug)]
pub struct EvictArgs {
    /// Files, folders or locations of other devices
    #[arg(value_name = "ADDRESS", required = true)]
    pub addresses: Vec<PathBuf>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

#[derive(Args, Debug)]
pub struct SyncArgs {
    /// Only what is below it [default: everything]
    pub address: Option<PathBuf>,
    /// Give up after this time, such as 30s; without it the wait has no end
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
}

#[derive(Args, Debug)]
pub struct PendingArgs {
    #[command(subcommand)]
    pub command: Option<PendingCommand>,
}

#[derive(Subcommand, Debug)]
pub enum PendingCommand {
    /// Write what waits into a folder of this device, as files
    Export {
        /// Whose: a device, also one that was removed, or sd://DEVICE/LOCATION/PATH
        #[arg(value_name = "OWNER")]
        of: String,
        /// The folder; it is made if need be, and nothing in it is replaced
        dir: PathBuf,
        /// Then give up those that no owner will take any more
        #[arg(long)]
        forget: bool,
        /// Do not ask
        #[arg(long, requires = "forget")]
        yes: bool,
    },
}

#[derive(Args, Debug)]
pub struct ConflictsArgs {
    #[command(subcommand)]
    pub command: Option<ConflictsCommand>,
}

#[derive(Subcommand, Debug)]
pub enum ConflictsCommand {
    /// List those that nobody has dealt with
    List,
    /// Deal with some: both versions stay unless you say otherwise
    #[command(group = clap::ArgGroup::new("how").required(true).multiple(true))]
    Resolve {
        /// Their numbers, from `sd conflicts`
        #[arg(value_name = "ID", required = true)]
        ids: Vec<u64>,
        /// Mark them as dealt with; nothing is changed
        #[arg(long, group = "how", conflicts_with = "keep")]
        done: bool,
        /// What stays: both versions; the one written here; or the one of the owner
        #[arg(long, group = "how", value_name = "WHICH")]
        keep: Option<Keep>,
        /// First copy both versions into this folder of this device
        #[arg(long, group = "how", value_name = "DIR")]
        export: Option<PathBuf>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

/// Which version of a conflict stays.
#[derive(
    clap::ValueEnum, serde::Serialize, serde::Deserialize, Clone, Copy, PartialEq, Eq, Debug,
)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// Both, as they are
    Both,
    /// The one written on this device takes the name
    Mine,
    /// The one of the owner; the one written on this device is removed
    Theirs,
}

#[derive(Subcommand, Debug)]
pub enum CacheCommand {
    /// Show how much is cached and how well it serves
    Stats,
    /// Give back all space; files are fetched again when read
    Clear {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Show the limit, or change it now and for later starts
    Limit {
        /// Such as 20GiB
        #[arg(value_name = "SIZE")]
        size: Option<String>,
    },
}

#[derive(Subcommand, Debug)]
pub enum DaemonCommand {
    /// Run the daemon in the foreground
    Run {
        /// Leave the terminal and log to the data directory; used when a command starts it
        #[arg(long, hide = true)]
        background: bool,
    },
    /// Ends the daemon's mounts when it was killed; the daemon starts it
    #[command(hide = true)]
    Guard,
    /// Makes calls through a mount for the sake of their events; the daemon starts it
    #[command(hide = true)]
    Events,
    /// Stop it cleanly: unmount, flush
    Stop {
        /// Detach mounts that programs still use
        #[arg(long)]
        force: bool,
    },
    /// Show whether it runs; exit 1 when it does not
    Status,
}

#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Print the value of a key
    Get {
        /// Such as cache.limit
        key: String,
    },
    /// Write a value into the configuration file; --unset removes it
    Set {
        /// Such as cache.limit
        key: String,
        /// The value
        #[arg(required_unless_present = "unset")]
        value: Option<String>,
        /// Back to the default
        #[arg(long, conflicts_with = "value")]
        unset: bool,
    },
    /// List every key: value, where it comes from, default, meaning
    List,
}

#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Mend what is wrong: scan again, fetch again, remove damaged copies
    #[arg(long)]
    pub repair: bool,
    /// Do not read every byte that is kept of other devices' files
    #[arg(long)]
    pub quick: bool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = crate::config::parse_duration(text)?;
    match duration.is_zero() {
        true => Err("must be longer than nothing".into()),
        false => Ok(duration),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
