//! What `sd doctor` compares while the drive works: the index with itself, with this device's
//! disks and with the owners of its replicas, and kept bytes with their ids.
//!
//! On a thread of its own and of low priority, one at a time. Everything is mended by the way on
//! which it came: rows by a scan or from their owner, bytes by being fetched again.

use super::locations::PROGRESS_EVERY;
use super::parts::{Daemon, index_failure};
use super::report::replica_condition;
use super::serve::Link;
use crate::control::{Event, Progress};
use crate::failure::{Code, Failure, Outcome};
use crate::output::size;
use crate::reply::Check;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use vfs_core::content::{Audited, Thorough};
use vfs_core::index::{Attested, Fault, IndexError, StoreError, Unlike};
use vfs_core::indexer::{Compared, State};
use vfs_core::model::{FileId, Location, LocationId, Name};

/// As low as hashing.
const NICE: i32 = 10;
/// How long a replica and what its owner says of it may take to be of one moment.
const MEETING: Duration = Duration::from_secs(10);
/// How long a replica may take to begin to come again.
const FETCHING: Duration = Duration::from_secs(60);
/// However much comes.
const FETCHING_AT_LAST: Duration = Duration::from_secs(1800);

/// What is asked of a check.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// What is wrong is mended.
    pub repair: bool,
    /// Kept bytes are not read.
    pub quick: bool,
}

/// Whether a check is under way.
#[derive(Default)]
pub struct Checking(AtomicBool);

impl Daemon {
    /// Checks everything; ends early when the command goes away.
    pub async fn check(self: Arc<Self>, asked: Asked, link: Link) -> Outcome<Vec<Check>> {
        if self.checking.0.swap(true, Ordering::AcqRel) {
            return Err(Failure::new(Code::Busy, "another `sd doctor` is checking this device")
                .hint("wait for its end"));
        }
        let ended = Ended(Arc::clone(&self));
        let (found, outcome) = oneshot::channel();
        let work = move || {
            if let Err(error) = rustix::process::nice(NICE) {
                tracing::debug!(%error, "the priority of a check stays");
            }
            let told = Told { link, at: Instant::now(), is_gone: false };
            let checks = Examination { daemon: &ended.0, asked, told, checks: Vec::new() }.run();
            // Before the answer: whoever has it may ask again.
            drop(ended);
            // Whoever asked may be gone.
            let _ = found.send(checks);
        };
        std::thread::Builder::new()
            .name("sd-doctor".into())
            .spawn(work)
            .map_err(|e| Failure::io("cannot start a check", e))?;
        outcome.await.map_err(|_| Failure::new(Code::Internal, "a bug: the check ended early"))
    }
}

/// Lets the next check begin when it is dropped.
struct Ended(Arc<Daemon>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.checking.0.store(false, Ordering::Release);
    }
}

/// Tells the command how far it is, and hears when nobody waits any more.
struct Told {
    link: Link,
    at: Instant,
    is_gone: bool,
}

impl Told {
    fn hear(&mut self, what: &str, entries: u64) -> ControlFlow<()> {
        if self.at.elapsed() >= PROGRESS_EVERY {
            self.at = Instant::now();
            let progress = Progress { what: what.to_owned(), entries, directories_waiting: 0 };
            // Not waited for: whoever looks on may have stopped the command for a while.
            self.is_gone |= !self.link.tell(Event::Progress(progress));
        }
        if self.is_gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

struct Examination<'a> {
    daemon: &'a Daemon,
    asked: Asked,
    told: Told,
    checks: Vec<Check>,
}

/// How something was found to be.
enum Finding {
    Fine(String),
    Note(String),
    Problem(String, String),
    Mended(String),
}

use Finding::{Fine, Mended, Note, Problem};

impl Examination<'_> {
    fn run(mut self) -> Vec<Check> {
        if self.asked.repair {
            let mended = self.daemon.mend_recorded();
            mended.into_iter().for_each(|what| self.add("mounts".into(), Mended(what)));
        }
        let locations = self.daemon.index.locations();
        let (own, replicas): (Vec<_>, Vec<_>) =
            locations.into_iter().partition(|l| l.owner == self.daemon.me);
        for location in own {
            self.check("index", &location, Self::own_rows);
            self.check("disk", &location, Self::disk);
        }
        for location in replicas {
            self.check("index", &location, Self::replica_rows);
            self.check("owner", &location, Self::owner);
        }
        let cache = self.cache();
        self.add("cache".into(), cache);
        let manifests = self.manifests();
        self.add("manifests".into(), manifests);
        self.checks
    }

    /// What comes of looking at a location, which may have another number than it had.
    fn check(
        &mut self,
        what: &str,
        location: &Location,
        look: fn(&mut Self, &Location) -> Outcome<Finding>,
    ) {
        let Some(now) = self.daemon.index.location_by_id(location.id) else { return };
        if self.told.is_gone {
            return;
        }
        let finding = look(self, &now).unwrap_or_else(|failure| {
            let hint = failure.hint.unwrap_or_else(|| "see the log".into());
            Problem(failure.message, hint)
        });
        let owner = self.daemon.name_of(location.owner);
        self.add(format!("{what} {owner}/{}", location.name), finding);
    }

    fn add(&mut self, name: String, finding: Finding) {
        let (result, message, hint) = match finding {
            Fine(message) => ("ok", message, None),
            Note(message) => ("note", message, None),
            Problem(message, hint) => ("problem", message, Some(hint)),
            Mended(message) => ("mended", message, None),
        };
        self.checks.push(Check { name, result: result.into(), message, hint });
    }

    /// What is wrong with the rows of a location in themselves; `None`: nothing, of so many.
    fn rows(&mut self, location: &Location) -> Outcome<Result<u64, String>> {
        let (index, told) = (&self.daemon.index, &mut self.told);
        let what = format!("checking the rows of {}", location.name);
        let audited = index.audit(location.no, &mut |rows| told.hear(&what, rows));
        let Some(audit) = audited.map_err(audit_failure)? else { return Ok(Ok(0)) };
        let faults = audit.faults.iter().map(|(fault, times)| fault_words(*fault, *times));
        let faults: Vec<_> = faults.collect();
        Ok(if faults.is_empty() { Ok(audit.rows) } else { Err(faults.join(", ")) })
    }

    fn own_rows(&mut self, location: &Location) -> Outcome<Finding> {
        let faults = match self.rows(location)? {
            Ok(rows) => return Ok(Fine(format!("{rows} rows are whole"))),
            Err(faults) => faults,
        };
        if !self.asked.repair {
            let hint = "`sd doctor --repair` has its index made again from the disk";
            return Ok(Problem(faults, hint.into()));
        }
        if self.daemon.indexer.root(location.no).is_err() {
            // Until its disk is back, these rows are all there is to be browsed.
            let hint = "connect its disk, then have its index made again: `sd doctor --repair`";
            return Ok(Problem(faults, hint.into()));
        }
        self.daemon.begin_anew(location)?;
        self.wait_for_scan(location)?;
        Ok(Mended(format!("{faults}; the index was made again from the disk")))
    }

    fn replica_rows(&mut self, location: &Location) -> Outcome<Finding> {
        match self.rows(location)? {
            Ok(rows) => Ok(Fine(format!("{rows} rows are whole"))),
            Err(faults) => self.fetch_anew(location, faults),
        }
    }

    /// Mends a replica, if that is wanted.
    fn fetch_anew(&mut self, location: &Location, faults: String) -> Outcome<Finding> {
        let (daemon, owner) = (self.daemon, self.daemon.name_of(location.owner));
        // What is here goes only if the owner has just shown that it can send all of it.
        let unlike = self.unlike(location);
        let can_send = unlike.is_some();
        let faults = match unlike.filter(|unlike| unlike.rows > 0) {
            Some(unlike) => format!("{faults}; {}", self.unlike_words(location, &unlike)),
            None => faults,
        };
        if !self.asked.repair {
            let hint = format!("`sd doctor --repair` fetches it again from “{owner}”");
            return Ok(Problem(faults, hint));
        }
        if !can_send || !daemon.node.fetch_anew(location.id).map_err(index_failure)? {
            let hint = format!("`sd doctor --repair` fetches it again when “{owner}” is online");
            return Ok(Problem(faults, hint));
        }
        Ok(match self.wait_for_replica(location.id) {
            true => Mended(format!("{faults}; it was fetched again")),
            false => Note(format!("{faults}; it is being fetched again")),
        })
    }

    /// Which rows of a replica are not its owner's, if that can be said.
    fn unlike(&mut self, location: &Location) -> Option<Unlike> {
        let _ = self.told.hear(&format!("asking for the rows of {}", location.name), 0);
        let compared = self.daemon.runtime.block_on(self.daemon.node.compare(location.id));
        compared
            .inspect_err(|why| tracing::debug!(why, "it is not known where a replica differs"))
            .ok()
    }

    fn unlike_words(&self, location: &Location, unlike: &Unlike) -> String {
        let Ok(view) = self.daemon.index.view() else {
            return format!("{} differ from their owner's", unlike.rows);
        };
        let path = |(dir, name): &(FileId, Name)| {
            let mut path = view.path(location.no, *dir).ok()??;
            path.push(name.clone());
            Some(path)
        };
        let paths: Vec<_> = unlike.examples.iter().filter_map(path).collect();
        format!("{} differ from their owner's: {}", unlike.rows, joined(&paths))
    }

    /// Until every row that the owner told of is here; `false`: that takes too long.
    fn wait_for_replica(&mut self, id: LocationId) -> bool {
        let (mut deadline, mut head) = (Instant::now() + FETCHING, None);
        let at_last = Instant::now() + FETCHING_AT_LAST;
        while Instant::now() < deadline.min(at_last) && !self.told.is_gone {
            let Some(location) = self.daemon.index.location_by_id(id) else { return false };
            let peers = self.daemon.node.peers();
            if replica_condition(&location, &peers).indexed && self.meets(&location) {
                return true;
            }
            let now = self.daemon.index.head(location.no);
            if head.replace(now) != Some(now) {
                deadline = Instant::now() + FETCHING;
            }
            let entries = self.daemon.index.counts(location.no).entries;
            let _ = self.told.hear(&format!("fetching {}", location.name), entries);
            std::thread::sleep(PROGRESS_EVERY);
        }
        false
    }

    /// Whether a replica is as its owner states it to be now.
    fn meets(&self, location: &Location) -> bool {
        let signed = self.daemon.node.stated(location.id);
        let attested = signed.map(|signed| self.daemon.index.attest(location.no, &signed));
        matches!(attested, Some(Ok(Attested::Same)))
    }

    fn owner(&mut self, location: &Location) -> Outcome<Finding> {
        let deadline = Instant::now() + MEETING;
        let what = format!("comparing {} with its owner", location.name);
        loop {
            let index = &self.daemon.index;
            let (signed, is_there) = match self.daemon.node.stated(location.id) {
                Some(signed) => (Some(signed), true),
                None => (index.last_statement(location.no).map_err(index_failure)?, false),
            };
            let Some(signed) = signed else {
                return Ok(Note(not_compared("it cannot be reached, and has stated nothing")));
            };
            match index.attest(location.no, &signed).map_err(index_failure)? {
                Attested::Same if is_there => {
                    let rows = signed.statement.log.rows;
                    return Ok(Fine(format!("its {rows} rows add up to what is here")));
                }
                Attested::Same => {
                    return Ok(Fine("the rows add up to what it stated before it went".into()));
                }
                Attested::Differs => {
                    let faults = "the rows are not those of their owner".to_owned();
                    return self.fetch_anew(location, faults);
                }
                Attested::Elsewhere if !is_there => {
                    return Ok(Note(not_compared("it cannot be reached, and has changed since")));
                }
                Attested::Elsewhere => {}
            }
            if Instant::now() >= deadline || self.told.hear(&what, 0).is_break() {
                return Ok(Note(not_compared("it changes, or its rows are still coming")));
            }
            std::thread::sleep(PROGRESS_EVERY);
        }
    }

    fn disk(&mut self, location: &Location) -> Outcome<Finding> {
        let indexer = &self.daemon.indexer;
        let progress = indexer.progress(location.no);
        if let State::Offline(why) = progress.state {
            return Ok(Note(format!("not compared, because it is offline: {why}")));
        }
        if !progress.indexed {
            return Ok(Note("not compared, because it is being scanned".into()));
        }
        let found = self.compare(location)?;
        if found.differences() > 0 && self.asked.repair {
            indexer.follow_up(location.no, &found);
            self.wait_for_scan(location)?;
            let left = self.compare(location)?;
            return Ok(match left.differences() {
                0 => Mended(format!("{}; scanned again", difference_words(&found))),
                _ => Problem(difference_words(&left), "scan it again: sd location rescan".into()),
            });
        }
        Ok(disk_finding(&found))
    }

    fn compare(&mut self, location: &Location) -> Outcome<Compared> {
        let (indexer, told) = (&self.daemon.indexer, &mut self.told);
        let what = format!("comparing {} with the disk", location.name);
        let hear = &mut |so_far: &Compared| told.hear(&what, so_far.entries);
        indexer.compare(location.no, hear).map_err(|e| {
            Failure::new(Code::Io, format!("cannot be compared: {e}")).hint("check its disk")
        })
    }

    fn wait_for_scan(&mut self, location: &Location) -> Outcome<()> {
        let what = format!("scanning {}", location.name);
        loop {
            let Some(now) = self.daemon.index.location_by_id(location.id) else { return Ok(()) };
            let progress = self.daemon.indexer.progress(now.no);
            match progress.state {
                State::Offline(why) => {
                    return Err(Failure::new(Code::Io, format!("went offline: {why}"))
                        .hint("connect its disk, then try again"));
                }
                State::Hashing | State::Idle if progress.indexed => return Ok(()),
                _ => {}
            }
            let entries = self.daemon.index.counts(now.no).entries;
            if self.told.hear(&what, entries).is_break() {
                return Ok(());
            }
            std::thread::sleep(PROGRESS_EVERY);
        }
    }

    fn cache(&mut self) -> Finding {
        let how = Thorough { hashes: !self.asked.quick, mends: self.asked.repair };
        let told = &mut self.told;
        let found = self
            .daemon
            .cache
            .audit(how, &mut |so_far| told.hear("checking the cache", so_far.files));
        cache_finding(&found, how)
    }

    fn manifests(&mut self) -> Finding {
        let (repair, told) = (self.asked.repair, &mut self.told);
        let audited = self
            .daemon
            .manifests
            .audit(repair, &mut |files| told.hear("checking the manifests", files));
        match audited {
            Err(e) => Problem(format!("cannot be read: {e}"), "check this disk".into()),
            Ok((files, 0)) => Fine(format!("{files} files are whole")),
            Ok((files, damaged)) if repair => Mended(format!(
                "{damaged} of {files} were damaged; they are made again when needed"
            )),
            Ok((files, damaged)) => Problem(
                format!("{damaged} of {files} are damaged"),
                "`sd doctor --repair` removes them, to be made again".into(),
            ),
        }
    }
}

impl Daemon {
    /// Has the index of an own location made again from its disk, while everything else goes on.
    fn begin_anew(&self, location: &Location) -> Outcome<()> {
        let own = self.library.with(|s| s.locations.iter().find(|l| l.id == location.id).cloned());
        let Some(own) = own else { return Ok(()) };
        tracing::warn!(location = location.name, "its rows are damaged, and are made again");
        self.indexer.forget(location.no);
        let renewed = self.index.renew_own(location.no);
        // Under whichever number it has, it is to be followed on.
        if let Some(now) = self.index.location_by_id(location.id) {
            self.watch(&own, now.no);
        }
        self.node.locations_changed();
        renewed.map(drop).map_err(index_failure)
    }
}

fn not_compared(why: &str) -> String {
    format!("not compared with its owner: {why}")
}

fn audit_failure(error: IndexError) -> Failure {
    match error {
        IndexError::Store(StoreError::Corrupt { .. }) => Failure::new(Code::Io, error.to_string())
            .hint(
                "it is set aside and made again when the daemon starts next: sd daemon stop, then \
                 sd mount",
            ),
        error => index_failure(error),
    }
}

fn fault_words(fault: Fault, times: u64) -> String {
    match fault {
        Fault::Unreadable => format!("{times} rows cannot be understood"),
        Fault::Astray => format!("{times} rows are in no directory"),
        Fault::Unlisted => format!("{times} rows are not led to"),
        Fault::Extra => format!("{times} notes are of no row"),
        Fault::Counts => "the rows are not as many as was counted".into(),
        Fault::Sum => "the rows do not add up to what was kept of them".into(),
    }
}

fn disk_finding(found: &Compared) -> Finding {
    let words = difference_words(found);
    if found.differences() > 0 {
        return Problem(words, "`sd doctor --repair` scans these folders again".into());
    }
    if found.unread > found.forbidden {
        return Problem(words, "look at the rights of these folders, and at the disk".into());
    }
    match found.undecided + found.forbidden {
        0 => Fine(words),
        _ => Note(words),
    }
}

fn difference_words(found: &Compared) -> String {
    let Compared { entries, unindexed, changed, vanished, undecided, unread, .. } = found;
    let at_least = if found.has_more { "at least " } else { "" };
    let mut words = match found.differences() {
        0 => vec![format!("{entries} entries are as the index has them")],
        _ => [
            (*unindexed, "are not in the index"),
            (*changed, "are in the index as they were"),
            (*vanished, "are in the index and gone"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{at_least}{count} {what}"))
        .collect(),
    };
    if *undecided > 0 {
        words.push(format!("{undecided} changed while they were looked at"));
    }
    if *unread > 0 {
        words.push(format!("{unread} folders cannot be read"));
    }
    match found.examples.is_empty() {
        true => words.join(", "),
        false => format!("{}: {}", words.join(", "), joined(&found.examples)),
    }
}

/// Paths, for people.
fn joined(paths: &[Vec<Name>]) -> String {
    let path = |names: &Vec<Name>| {
        names.iter().map(|name| name.display().into_owned()).collect::<Vec<_>>().join("/")
    };
    paths.iter().map(path).collect::<Vec<_>>().join(", ")
}

fn cache_finding(found: &Audited, how: Thorough) -> Finding {
    let Audited { files, bytes, damaged, missing, unread, unproved, strays, mended } = *found;
    let faults = [
        (damaged, "are not what their ids say"),
        (missing, "are noted and not there"),
        (strays, "are files that nothing needs"),
        (unread, "cannot be read"),
    ];
    let faults = faults.into_iter().filter(|(count, _)| *count > 0);
    let faults: Vec<_> = faults.map(|(count, what)| format!("{count} {what}")).collect();
    match (faults.is_empty(), how.mends) {
        (true, _) if !how.hashes => Fine(format!("{files} files are there; not read, as asked")),
        (true, _) if unproved > 0 => Fine(format!(
            "{} of {files} files are what their ids say ({}); the others are not complete, or have \
             no id",
            files - unproved,
            size(bytes)
        )),
        (true, _) => Fine(format!("{files} files are what their ids say ({})", size(bytes))),
        (false, true) if mended == found.faults() && unread == 0 => Mended(format!(
            "{}; removed, to be fetched again when they are read",
            faults.join(", ")
        )),
        (false, true) => Problem(faults.join(", "), "check the disk of the cache".into()),
        (false, false) => {
            let hint = "`sd doctor --repair` removes them, to be fetched again when they are read";
            Problem(faults.join(", "), hint.into())
        }
    }
}
