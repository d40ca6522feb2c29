//! What commands report: the stable shapes behind `--json` (`docs/JSON.md`).
//!
//! The daemon fills them, the command prints them, as a table or as they are.
//! A field once published keeps its name and meaning.

use crate::control::WirePath;
use serde::{Deserialize, Serialize};

/// `sd library list`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Libraries {
    pub libraries: Vec<LibraryReply>,
}

/// `sd library create`, `sd library info`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct LibraryReply {
    pub id: String,
    pub name: String,
    pub device: DeviceName,
    pub devices: Vec<DeviceName>,
}

/// A device, by name and key.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DeviceName {
    pub id: String,
    pub name: String,
}

/// `sd device invite`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Invited {
    pub ticket: String,
    pub expires_at: String,
    /// The device that joined; absent with `--detach`.
    pub joined: Option<JoinedReply>,
}

/// A device that joined by an invitation of this one.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct JoinedReply {
    pub device: DeviceName,
    pub code: String,
}

/// `sd device join`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct JoinReply {
    pub library: String,
    pub device: DeviceName,
    pub inviter: String,
    pub code: String,
}

/// `sd device rename`, `sd device remove`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DeviceReply {
    pub device: DeviceName,
    /// Its locations, which others no longer see after a removal.
    pub locations: Vec<String>,
    /// What this device has written to it and it has not taken.
    pub pending: PendingCount,
}

/// `sd location add`, `remove`, `rescan`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct LocationReply {
    pub name: String,
    pub path: String,
    pub address: String,
    pub entries: u64,
    pub files: u64,
    pub bytes: u64,
    pub indexed: bool,
}

/// `sd mount`, and one of `sd status`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct MountStatus {
    pub mountpoint: String,
    pub read_only: bool,
    pub allow_other: bool,
    /// `active`, or why the kernel does not read local files by itself.
    pub passthrough: String,
    /// `active`, `off`, which programs alone are told of changes that they watch for, or why none.
    pub events: String,
    pub alive: bool,
}

/// `sd mount`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct MountReply {
    #[serde(flatten)]
    pub mount: MountStatus,
    /// A dead mount was there and was mended.
    pub mended: bool,
    /// It was mounted already.
    pub already: bool,
}

/// `sd unmount`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct UnmountReply {
    pub mountpoint: String,
    /// What has not reached its owner; it is delivered without a mount as well.
    pub pending: PendingCount,
}

/// Writes to other devices' files that have not reached their owners.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PendingCount {
    pub operations: u64,
    /// Written bytes that travel.
    pub bytes: u64,
}

/// One such write, or another change.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PendingWrite {
    pub id: u64,
    pub owner: DeviceName,
    pub location: String,
    /// Null once the location, or its owner, was removed.
    pub address: Option<String>,
    /// Below the location's folder, for people.
    pub path: String,
    /// `create`, `write`, `mkdir`, `symlink`, `link`, `rename`, `exchange`, `delete`, `rmdir`,
    /// `attributes`, `attribute`.
    pub what: String,
    pub bytes: u64,
    pub since: String,
    pub attempts: u32,
    /// `waiting`, `sent`, `held`, `retrying`, `blocked`, `orphaned`.
    pub state: String,
    pub reason: Option<String>,
}

/// `sd pending`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PendingReply {
    #[serde(flatten)]
    pub count: PendingCount,
    #[serde(default)]
    pub pending: Vec<PendingWrite>,
}

/// `sd pending export`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ExportReply {
    /// What was exported, or would be.
    #[serde(flatten)]
    pub count: PendingCount,
    pub dir: String,
    pub files: Vec<ExportedFile>,
    /// Those that no owner will take any more: given up, where that was asked for.
    pub forgotten: u64,
}

/// A file that was exported.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ExportedFile {
    pub path: String,
    /// Bytes that were not written here, and that nobody could give: holes.
    pub missing_bytes: u64,
}

/// `sd sync`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct SyncReply {
    pub reached: bool,
    /// What did not reach its owner.
    #[serde(flatten)]
    pub left: PendingCount,
    /// The same one by one; the first thousand.
    pub pending: Vec<PendingWrite>,
}

/// `sd conflicts`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Conflicts {
    pub conflicts: Vec<ConflictItem>,
}

/// A change of this device that met another.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ConflictItem {
    pub id: u64,
    pub at: String,
    pub owner: DeviceName,
    pub location: String,
    /// Null once the location, or its owner, was removed.
    pub address: Option<String>,
    pub path: String,
    pub what: String,
    /// `kept_as`, `made_again`, `owner_stands`.
    pub ended: String,
    /// Where the version of this device is now.
    pub kept_as: Option<String>,
    pub reason: Option<String>,
}

/// `sd conflicts resolve`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ResolveReply {
    pub resolved: Vec<ResolvedConflict>,
}

/// A conflict that was dealt with, or would be.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ResolvedConflict {
    pub id: u64,
    pub path: String,
    /// What becomes of it, in words.
    pub what: String,
    pub exported: Vec<String>,
}

/// `sd status`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Status {
    pub device: Option<DeviceName>,
    pub library: Option<LibraryName>,
    pub devices: Vec<DeviceStatus>,
    pub locations: Vec<LocationStatus>,
    pub mounts: Vec<MountStatus>,
    pub cache: CacheStatus,
    pub pinned: PinnedStatus,
    pub pending: PendingStatus,
    /// Conflicts that nobody has dealt with.
    pub conflicts: u64,
    pub journal: JournalStatus,
    pub network: NetworkStatus,
    pub reports: Vec<IntegrityReport>,
    /// Programs that get less of other devices' files than they ask for.
    #[serde(default)]
    pub hydration: Vec<HydrationStatus>,
    pub memory: MemoryStatus,
    pub index: IndexStatus,
    pub daemon: DaemonStatus,
    pub problems: Vec<Problem>,
}

/// A program that got less of other devices' files than it asked for.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct HydrationStatus {
    pub program: String,
    /// `thumbnails`, `indexing` or `backup`.
    pub purpose: String,
    /// How often it could not open a file, since the daemon started.
    pub refused: u64,
    /// How often it opened one of which only what it reads is fetched.
    pub exact: u64,
    /// RFC 3339.
    pub last_at: String,
}

/// The library's id and name.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct LibraryName {
    pub id: String,
    pub name: String,
}

/// A member of the library.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DeviceStatus {
    pub name: String,
    pub id: String,
    pub this_device: bool,
    pub online: bool,
    pub path: Option<PathStatus>,
    /// RFC 3339; null when never.
    pub last_seen: Option<String>,
    /// How far each replica of its locations is.
    pub replicas: Vec<ReplicaStatus>,
    pub last_error: Option<String>,
}

/// How a device is reached.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PathStatus {
    pub direct: bool,
    pub rtt_ms: f64,
    pub address: String,
}

/// How far this device's copy of a location's index is.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ReplicaStatus {
    pub location: String,
    pub applied: u64,
    pub head: Option<u64>,
}

/// A location of any device.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct LocationStatus {
    pub device: String,
    pub name: String,
    pub address: String,
    pub own: bool,
    pub path: Option<String>,
    pub read_only: bool,
    pub shared_with: Option<Vec<String>>,
    pub entries: u64,
    pub files: u64,
    pub bytes: u64,
    pub indexed: bool,
    pub hashed_files: u64,
    pub hashed_bytes: u64,
    /// `scanning`, `hashing`, `idle`, `offline`; of another device `online`, `offline`.
    pub state: String,
    /// Why it is offline, where that is known.
    pub state_reason: Option<String>,
    /// `watching`, or why changes are found later; null for other devices' locations.
    pub watch: Option<String>,
}

/// The content cache.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct CacheStatus {
    pub bytes: u64,
    pub limit_bytes: u64,
    /// Of `bytes`: pinned, so that they are not evicted.
    pub pinned_bytes: u64,
    /// What is left free on its disk.
    pub min_free_bytes: u64,
    pub files: u64,
    pub hit_bytes: u64,
    pub fetched_bytes: u64,
    pub evicted_bytes: u64,
    /// Why nothing can be kept, when its disk fails.
    pub problem: Option<String>,
}

/// `sd cache clear`, `sd evict`
#[derive(Serialize, Deserialize, Debug, Clone, Default)]
pub struct Cleared {
    pub freed_bytes: u64,
    /// What stays because it is pinned.
    pub pinned_bytes: u64,
    /// What stays because programs have it open.
    pub open_bytes: u64,
}

/// Files and bytes, and how much of them is here.
#[derive(Serialize, Deserialize, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub files: u64,
    pub bytes: u64,
    pub here_files: u64,
    pub here_bytes: u64,
}

/// What is pinned, in `sd status`
#[derive(Serialize, Deserialize, Debug, Clone, Default)]
pub struct PinnedStatus {
    pub pins: u64,
    #[serde(flatten)]
    pub tally: Tally,
}

/// `sd pin`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PinsReply {
    /// Those that were asked for, or all.
    pub pins: Vec<PinItem>,
    /// How much more is pinned than the limit of the cache lets stay here.
    pub over_limit_bytes: u64,
    /// How much more is pinned than the disk has space for.
    pub over_disk_bytes: u64,
    pub limit_bytes: u64,
}

/// A file or folder whose content is to be here.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PinItem {
    pub address: String,
    pub owner: DeviceName,
    pub location: String,
    /// Below the location's folder, for people.
    pub path: String,
    pub since: String,
    #[serde(flatten)]
    pub tally: Tally,
    /// `here`, `fetching`, `offline`, `cache_full`, `disk_full`, `failed`, `unknown`, `gone`.
    pub state: String,
    /// What keeps the rest from coming.
    pub reason: Option<String>,
}

/// `sd unpin`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct UnpinReply {
    /// The addresses of the pins that are gone.
    pub unpinned: Vec<String>,
}

/// Content bytes that crossed the network since the daemon started.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct NetworkStatus {
    pub addresses: Vec<String>,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub devices: Vec<DeviceTraffic>,
}

/// Content bytes exchanged with one device.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DeviceTraffic {
    pub device: String,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// Bytes that a device sent and that were not what they claimed to be.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct IntegrityReport {
    pub at: String,
    pub device: String,
    pub location: String,
    pub path: String,
    pub what: String,
}

/// What waits for other devices.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct PendingStatus {
    #[serde(flatten)]
    pub count: PendingCount,
    /// Those that will not go by themselves any more.
    pub blocked: u64,
    /// When the oldest was asked for.
    pub since: Option<String>,
    pub devices: Vec<DevicePending>,
}

/// What waits for one device.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DevicePending {
    pub device: String,
    #[serde(flatten)]
    pub count: PendingCount,
    pub blocked: u64,
    /// It is a member of the library.
    pub member: bool,
}

/// Where what waits is kept, and what was found there when the daemon started.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct JournalStatus {
    pub bytes: u64,
    pub staged_bytes: u64,
    /// Its last record was not whole, and had never been acknowledged.
    pub torn_tail: bool,
    /// Damaged parts, set aside.
    pub set_aside: Vec<String>,
    /// What could not be taken up, in words.
    pub lost: Vec<String>,
    /// Staged bytes that nothing needed any more, given back.
    pub orphan_bytes: u64,
}

/// Of the daemon.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct MemoryStatus {
    pub rss_bytes: u64,
}

/// Of the index on disk.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct IndexStatus {
    pub bytes: u64,
    pub entries: u64,
    /// Where a corrupt index was set aside when the daemon started.
    pub set_aside: Option<String>,
}

/// The daemon itself.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct DaemonStatus {
    pub running: bool,
    pub pid: Option<u32>,
    pub version: Option<String>,
    pub started_at: Option<String>,
    pub data_dir: String,
}

/// Something that a person should look at.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Problem {
    pub code: String,
    pub message: String,
    pub hint: String,
}

/// A thing in a listing.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Item {
    /// Exact, whatever bytes the name has.
    pub address: String,
    /// For people: bytes that are not UTF-8 are replaced.
    pub name: String,
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `char_device`, `block_device`,
    /// `device`, `location`.
    #[serde(rename = "type")]
    pub kind: String,
    pub size: Option<u64>,
    /// Octal permission bits.
    pub mode: Option<String>,
    pub mtime: Option<String>,
    pub content: Option<String>,
    pub target: Option<String>,
    /// Levels below the address listed, from 1.
    pub depth: u32,
    /// It is the last one of its directory.
    pub last: bool,
}

/// `sd info`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct InfoReply {
    pub address: String,
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub owner: Option<DeviceName>,
    pub online: Option<bool>,
    pub location: Option<String>,
    /// The file on this device's own disk, when it owns it.
    pub local_path: Option<String>,
    pub size: Option<u64>,
    pub blocks: Option<u64>,
    pub mode: Option<String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub nlink: Option<u32>,
    pub mtime: Option<String>,
    pub ctime: Option<String>,
    pub btime: Option<String>,
    pub target: Option<String>,
    pub content: Option<String>,
    pub cached_bytes: Option<u64>,
    /// The pin that it is under: its own address, or that of a folder above it.
    pub pinned: Option<String>,
    /// What waits for its owner, of it and, for a directory, of all below it.
    pub pending: PendingCount,
    /// Where the same content is, this file included.
    pub holders: Vec<Holder>,
}

/// A file with some content.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Holder {
    pub device: String,
    pub location: String,
    pub address: String,
    pub online: bool,
}

/// `sd daemon stop`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Stopped {
    /// The process that ended; null when none ran.
    pub pid: Option<u32>,
    /// What it could not do before it ended.
    pub remains: Vec<String>,
    /// What has not reached its owner; it is delivered when the daemon runs again.
    #[serde(default)]
    pub pending: PendingCount,
}

/// `sd doctor`
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Diagnosis {
    pub ok: bool,
    pub checks: Vec<Check>,
}

/// One thing looked at.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Check {
    pub name: String,
    /// `ok`, `note`, `problem`, `mended`.
    pub result: String,
    pub message: String,
    pub hint: Option<String>,
}

/// An entry as a mount shows it to a kernel that asks now.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Below the mount point.
    pub path: WirePath,
    pub ino: u64,
    /// As in `st_mode`.
    pub file_type: u32,
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
}

/// One key of `sd config list`.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct ConfigKey {
    pub key: String,
    pub value: String,
    pub source: String,
    pub default: String,
    pub variable: String,
    pub description: String,
}
