//! `sd status`: what every part says of itself.

use super::members::device_name;
use super::parts::Daemon;
use crate::failure::Failure;
use crate::reply::{
    CacheStatus, DaemonStatus, DeviceStatus, DeviceTraffic, HydrationStatus, IndexStatus,
    IntegrityReport, LibraryName, LocationStatus, MemoryStatus, NetworkStatus, PathStatus, Problem,
    ReplicaStatus, Status,
};
use sync::PeerStatus;
use vfs_core::content::Report;
use vfs_core::indexer::{State, Watch};
use vfs_core::library::Member;
use vfs_core::model::{Location, Time};
use vfs_core::path::SdPath;

/// Less than this free on the data directory's disk is a problem.
const LOW_DISK_BYTES: u64 = 100 << 20;

impl Daemon {
    pub fn status(&self) -> Status {
        let (library, me) = self.membership().ok().unzip();
        let peers = self.node.peers();
        let locations = self.location_status(&peers);
        let mounts = self.mounts.status();
        let reports: Vec<_> = self.content.reports().iter().map(|r| self.report(r)).collect();
        let mut status = Status {
            device: me.as_ref().map(device_name),
            library: library.map(|l| LibraryName { id: l.id, name: l.name }),
            devices: self.device_status(&peers),
            locations,
            mounts,
            cache: self.cache_status(),
            pinned: self.pinned_status(),
            pending: self.pending_status(),
            conflicts: self.outbox.conflicts().len() as u64,
            journal: self.journal_status(),
            network: self.network_status(&peers),
            reports,
            hydration: self.hydration_status(),
            memory: MemoryStatus { rss_bytes: rss_bytes() },
            index: self.index_status(),
            daemon: self.daemon_status(),
            problems: Vec::new(),
        };
        status.problems = self.problems(&status);
        status
    }

    fn device_status(&self, peers: &[PeerStatus]) -> Vec<DeviceStatus> {
        let mut members: Vec<Member> = self.library.with(|s| s.active().cloned().collect());
        members.sort_by(|a, b| a.name.cmp(&b.name));
        members.iter().map(|member| self.one_device(member, peers)).collect()
    }

    fn one_device(&self, member: &Member, peers: &[PeerStatus]) -> DeviceStatus {
        let this_device = member.id == self.me;
        let peer = peers.iter().find(|p| p.id == member.id);
        let path = peer.and_then(|p| p.path.as_ref()).map(|path| PathStatus {
            direct: path.direct,
            rtt_ms: path.rtt.as_secs_f64() * 1000.0,
            address: path.address.clone(),
        });
        let last_seen_ms = peer.and_then(|p| p.last_seen_ms).max(member.last_seen_ms);
        let replicas = peer.map(|p| p.replicas.as_slice()).unwrap_or_default();
        DeviceStatus {
            name: member.name.clone(),
            id: member.id.to_string(),
            this_device,
            online: this_device || peer.is_some_and(|p| p.online),
            path,
            last_seen: last_seen_ms.and_then(rfc3339_ms),
            replicas: replicas
                .iter()
                .map(|replica| ReplicaStatus {
                    location: self
                        .index
                        .location_by_id(replica.location)
                        .map_or_else(|| replica.location.to_string(), |l| l.name.clone()),
                    applied: replica.applied.0,
                    head: replica.head.map(|seq| seq.0),
                })
                .collect(),
            last_error: peer.and_then(|p| p.last_error.clone()),
        }
    }

    fn location_status(&self, peers: &[PeerStatus]) -> Vec<LocationStatus> {
        let mut all: Vec<_> =
            self.index.locations().iter().map(|l| self.one_location(l, peers)).collect();
        all.sort_by(|a, b| (&a.device, &a.name).cmp(&(&b.device, &b.name)));
        all
    }

    fn one_location(&self, location: &Location, peers: &[PeerStatus]) -> LocationStatus {
        let counts = self.index.counts(location.no);
        let device = self.name_of(location.owner);
        let own = location.owner == self.me;
        let condition = match own {
            true => self.own_condition(location),
            false => replica_condition(location, peers),
        };
        let address = SdPath::File {
            device: device.clone(),
            location: Some(location.name.clone()),
            path: Vec::new(),
        };
        let names = |ids: &Vec<_>| ids.iter().map(|id| self.name_of(*id)).collect::<Vec<String>>();
        LocationStatus {
            device,
            name: location.name.clone(),
            address: address.to_string(),
            own,
            path: self.folder(location).map(|r| r.display().to_string()),
            read_only: location.read_only,
            shared_with: location.shared_with.as_ref().map(names),
            entries: counts.entries,
            files: counts.files,
            bytes: counts.bytes,
            indexed: condition.indexed,
            hashed_files: counts.hashed_files,
            hashed_bytes: counts.hashed_bytes,
            state: condition.state.into(),
            state_reason: condition.reason,
            watch: condition.watch,
        }
    }

    fn own_condition(&self, location: &Location) -> Condition {
        let progress = self.indexer.progress(location.no);
        let (state, reason) = match progress.state {
            State::Scanning => ("scanning", None),
            State::Hashing => ("hashing", None),
            State::Idle => ("idle", None),
            State::Offline(why) => ("offline", Some(why)),
        };
        let watch = match progress.watch {
            Watch::Watching => "watching".into(),
            Watch::Degraded(why) => why,
        };
        Condition { state, reason, indexed: progress.indexed, watch: Some(watch) }
    }

    /// What the cache says of itself.
    pub fn cache_status(&self) -> CacheStatus {
        let stats = self.cache.stats();
        CacheStatus {
            bytes: stats.bytes,
            limit_bytes: stats.limit_bytes,
            pinned_bytes: stats.held_bytes,
            min_free_bytes: stats.min_free_bytes,
            files: stats.files,
            hit_bytes: stats.hits_bytes,
            fetched_bytes: stats.fetched_bytes,
            evicted_bytes: stats.evicted_bytes,
            problem: stats.problem,
        }
    }

    fn network_status(&self, peers: &[PeerStatus]) -> NetworkStatus {
        NetworkStatus {
            addresses: self.node.addresses().iter().map(ToString::to_string).collect(),
            bytes_in: peers.iter().map(|p| p.bytes_in).sum(),
            bytes_out: peers.iter().map(|p| p.bytes_out).sum(),
            devices: peers
                .iter()
                .map(|p| DeviceTraffic {
                    device: self.name_of(p.id),
                    bytes_in: p.bytes_in,
                    bytes_out: p.bytes_out,
                })
                .collect(),
        }
    }

    fn report(&self, report: &Report) -> IntegrityReport {
        let location = self.index.location_by_id(report.location);
        IntegrityReport {
            at: rfc3339(report.at),
            device: self.name_of(report.device),
            location: location.map_or_else(|| report.location.to_string(), |l| l.name.clone()),
            path: report.path.clone(),
            what: report.what.clone(),
        }
    }

    fn hydration_status(&self) -> Vec<HydrationStatus> {
        let guarded = self.content.hydration().guarded().into_iter();
        let status = guarded.map(|one| HydrationStatus {
            program: one.program,
            purpose: one.purpose.as_str().into(),
            refused: one.refused,
            exact: one.exact,
            last_at: rfc3339(one.last),
        });
        status.collect()
    }

    fn index_status(&self) -> IndexStatus {
        let locations = self.index.locations();
        IndexStatus {
            bytes: self.index.size_bytes(),
            entries: locations.iter().map(|l| self.index.counts(l.no).entries).sum(),
            set_aside: self.set_aside.as_ref().map(|p| p.display().to_string()),
        }
    }

    fn daemon_status(&self) -> DaemonStatus {
        DaemonStatus {
            running: true,
            pid: Some(std::process::id()),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            started_at: Some(rfc3339(self.started)),
            data_dir: self.dir.path().display().to_string(),
        }
    }

    /// Why this device is no member, when it was one.
    fn removed(&self) -> Option<Failure> {
        let was_member = self.library.with(|state| state.library.is_some());
        self.membership().err().filter(|_| was_member)
    }

    fn problems(&self, status: &Status) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut add = |code: &str, message: String, hint: &str| {
            problems.push(Problem { code: code.into(), message, hint: hint.into() });
        };
        if let (None, Some(failure)) = (&status.library, self.removed()) {
            add("removed", failure.message, &failure.hint.unwrap_or_default());
        }
        if let Some(path) = &status.index.set_aside {
            add(
                "index_set_aside",
                format!("the index was damaged and was set aside as {path}; it is being rebuilt"),
                "nothing is lost; remove that file when nobody wants to look into it",
            );
        }
        if self.index.has_failed() {
            add(
                "index_disk",
                "the disk with the index fails; what needs it waits or is refused".into(),
                "see the log and the disk's health; it is used again as soon as it works",
            );
        }
        if let Some(why) = self.applying.obstacle() {
            add(
                "writes_refused",
                format!("other devices cannot write to this one: {why}"),
                "look at the disk with the data directory; what they wrote waits with them",
            );
        }
        for location in status.locations.iter().filter(|l| l.own) {
            if let Some(why) = &location.state_reason {
                add(
                    "location_offline",
                    format!("the location “{}” is offline: {why}", location.name),
                    "connect its disk; until then it is listed and cannot be read",
                );
            }
            if let Some(why) = location.watch.as_ref().filter(|w| *w != "watching") {
                add(
                    "watch_degraded",
                    format!("changes in “{}” are seen late: {why}", location.name),
                    "raise that limit; else rescans find them, now by: sd location rescan NAME",
                );
            }
        }
        for mount in status.mounts.iter().filter(|m| !m.alive) {
            add(
                "mount_dead",
                format!("the mount on {} is no longer served", mount.mountpoint),
                "sd mount makes it alive again",
            );
        }
        if let Some(why) = &status.cache.problem {
            add(
                "cache_disk",
                format!("the cache cannot keep anything: {why}"),
                "free some space on its disk; reading goes on without it",
            );
        }
        if let Some(path) = self.pins.file().damaged() {
            add(
                "pins_damaged",
                format!("the list of pins is damaged: {}", path.display()),
                "nothing that is cached goes until something is pinned, and the daemon started, \
                 again: sd pin ADDRESS",
            );
        }
        if let Some((message, hint)) = self.pins_without_room() {
            add("pins_full", message, &hint);
        }
        for report in &status.reports {
            add(
                "integrity",
                format!(
                    "“{}” gave wrong bytes of {}/{}: {}",
                    report.device, report.location, report.path, report.what
                ),
                "they were not delivered; check that device's disk and memory",
            );
        }
        problems.extend(writing_problems(status));
        let mut add = |code: &str, message: String, hint: &str| {
            problems.push(Problem { code: code.into(), message, hint: hint.into() });
        };
        if let Ok(disk) = rustix::fs::statvfs(self.dir.path()) {
            let free = disk.f_bavail * disk.f_frsize;
            if free < LOW_DISK_BYTES {
                add(
                    "disk_low",
                    format!("{free} bytes are free on the disk of {}", self.dir.path().display()),
                    "free some space there, or lower cache.limit",
                );
            }
        }
        problems
    }
}

/// What of writing to other devices a person should look at.
fn writing_problems(status: &Status) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut add = |code: &str, message: String, hint: String| {
        problems.push(Problem { code: code.into(), message, hint });
    };
    for waits in &status.pending.devices {
        let (device, operations) = (&waits.device, waits.count.operations);
        let export = format!("sd pending export '{device}' DIR --forget");
        match (waits.member, waits.blocked) {
            (false, _) => add(
                "pending_orphaned",
                format!(
                    "{operations} changes wait for “{device}”, which was removed from the library"
                ),
                format!("their bytes are kept; to have them as files: {export}"),
            ),
            (true, 0) => {}
            (true, blocked) => add(
                "pending_blocked",
                format!("{blocked} changes cannot be made on “{device}” as they stand"),
                format!("`sd pending` says why; to have their bytes as files: {export}"),
            ),
        }
    }
    for path in &status.journal.set_aside {
        add(
            "journal_damaged",
            format!("a part of the journal of pending writes was damaged and is set aside: {path}"),
            "everything else is delivered; check this disk, and what was written last to other \
             devices; then remove that file"
                .into(),
        );
    }
    for what in &status.journal.lost {
        add(
            "pending_damaged",
            format!("a pending write could not be taken up: {what}"),
            "`sd pending` lists what waits; write that file again".into(),
        );
    }
    problems
}

pub(super) struct Condition {
    state: &'static str,
    reason: Option<String>,
    pub(super) indexed: bool,
    watch: Option<String>,
}

/// Of another device's location: whether its owner is online, and whether every change that
/// the owner told of is here.
pub(super) fn replica_condition(location: &Location, peers: &[PeerStatus]) -> Condition {
    let peer = peers.iter().find(|p| p.id == location.owner);
    let replica = peer.and_then(|p| p.replicas.iter().find(|r| r.location == location.id));
    let state = match peer.is_some_and(|p| p.online) {
        true => "online",
        false => "offline",
    };
    let indexed = replica.is_some_and(|r| r.head.is_some_and(|head| r.applied >= head));
    Condition { state, reason: None, indexed, watch: None }
}

/// Resident memory of this process; 0 where `/proc` does not tell.
fn rss_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// A time as RFC 3339, in UTC, with all its nanoseconds; one out of range is the nearest.
pub fn rfc3339(time: Time) -> String {
    let secs =
        time.secs.clamp(jiff::Timestamp::MIN.as_second() + 1, jiff::Timestamp::MAX.as_second() - 1);
    let nanos = i32::try_from(time.nanos.min(999_999_999)).unwrap_or(0);
    // Whole seconds are rounded down in `Time`, and jiff adds the nanoseconds.
    jiff::Timestamp::new(secs, 0)
        .and_then(|t| t.checked_add(jiff::SignedDuration::from_nanos(nanos.into())))
        .map_or_else(|_| String::new(), |t| t.to_string())
}

fn rfc3339_ms(ms: u64) -> Option<String> {
    let ms = i64::try_from(ms).ok()?;
    jiff::Timestamp::from_millisecond(ms).ok().map(|t| t.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_time_of_a_peer_is_printed() {
        assert_eq!(rfc3339(Time { secs: 1, nanos: 5 }), "1970-01-01T00:00:01.000000005Z");
        assert_eq!(
            rfc3339(Time { secs: -1, nanos: 999_999_999 }),
            "1969-12-31T23:59:59.999999999Z"
        );
        for secs in [i64::MIN, i64::MAX] {
            assert!(!rfc3339(Time { secs, nanos: 999_999_999 }).is_empty());
        }
    }
}
