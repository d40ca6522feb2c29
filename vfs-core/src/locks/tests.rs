//! Programs of one device, the disk's kernel beneath them, and owners that come and go.

use super::*;
use crate::source::BoxFuture;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const OWNER: DeviceId = DeviceId([7; 32]);

/// An owner that keeps a table of its own.
#[derive(Default)]
struct Owner {
    connection: AtomicU64,
    table: StdMutex<Table>,
    asked: AtomicU64,
}

impl Owner {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap()
    }

    fn answer(&self, request: LockRequest) -> LockAnswer {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let LockRequest { holder, span, .. } = request;
        let mut table = self.table();
        match request.action {
            Action::Clear => table.clear(holder, span),
            Action::Set(mode) | Action::Test(mode) => {
                if let Some(taken) = table.conflict(holder, span, mode) {
                    return LockAnswer::Taken { span: taken.span, mode: taken.mode };
                }
                if let Action::Set(mode) = request.action {
                    table.set(Held { holder, pid: 0, span, mode });
                }
            }
        }
        LockAnswer::Free
    }
}

impl Coordinator for Owner {
    fn connection(&self, _: DeviceId) -> Option<u64> {
        Some(self.connection.load(Ordering::Relaxed)).filter(|no| *no > 0)
    }

    fn ask(&self, owner: DeviceId, request: LockRequest) -> BoxFuture<'_, Option<LockAnswer>> {
        Box::pin(async move { self.connection(owner).map(|_| self.answer(request)) })
    }
}

fn remote() -> Place {
    Place::Remote { owner: OWNER, location: LocationId([1; 16]), file: FileId(2) }
}

fn own(file: &tempfile::NamedTempFile) -> Place {
    let stat = rustix::fs::fstat(file.as_file()).unwrap();
    let source = Arc::new(file.reopen().unwrap());
    Place::Own { device: stat.st_dev, inode: stat.st_ino, source, writes: true }
}

fn ask(holder: u64, (first, last): (u64, u64), mode: Option<Mode>) -> Ask {
    let span = Span::new(first, last).unwrap();
    Ask { holder: Holder(holder), pid: holder as u32, span, mode }
}

fn whole(holder: u64, mode: Option<Mode>) -> Ask {
    Ask { span: Span::ALL, ..ask(holder, (0, 0), mode) }
}

const EXCLUSIVE: Option<Mode> = Some(Mode::Exclusive);
const SHARED: Option<Mode> = Some(Mode::Shared);

async fn is_given(locks: &Locks, place: &Place, ask: Ask) -> bool {
    locks.set(place, ask).await.unwrap().is_none()
}

fn beside(file: &tempfile::NamedTempFile) -> DiskLock {
    DiskLock::new(file.reopen().unwrap())
}

#[tokio::test]
async fn programs_of_a_device_exclude_each_other_and_programs_beside_the_drive() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let (locks, place) = (Locks::default(), own(&disk));
    assert!(is_given(&locks, &place, ask(1, (0, 9), EXCLUSIVE)).await);
    assert!(!is_given(&locks, &place, ask(2, (9, 20), SHARED)).await);
    assert!(is_given(&locks, &place, ask(2, (10, 20), SHARED)).await);
    assert!(!is_given(&locks, &place, whole(2, SHARED)).await, "flock and fcntl meet");
    disk.as_file().try_lock().expect("flock beside bytes that are locked, as on any disk");
    let mut beside = beside(&disk);
    assert!(!beside.set(Span::new(5, 5).unwrap(), SHARED).unwrap());
    assert!(beside.set(Span::new(30, 30).unwrap(), EXCLUSIVE).unwrap());
    assert!(!is_given(&locks, &place, ask(1, (25, 35), SHARED)).await);
    let seen = locks.test(&place, ask(1, (25, 35), None), Mode::Shared).await.unwrap().unwrap();
    assert_eq!((seen.span, seen.mode), (Span::new(30, 30).unwrap(), Mode::Exclusive));
    let seen = locks.test(&place, ask(3, (0, 50), None), Mode::Exclusive).await.unwrap().unwrap();
    assert_eq!(seen.pid, 1, "a process of this device by its number");
    locks.clear(&place, Holder(1)).await;
    assert!(beside.set(Span::new(5, 5).unwrap(), SHARED).unwrap());
    locks.clear(&place, Holder(2)).await;
    locks.sweep();
    assert!(!locks.knows(&place), "nothing stays of what was given back");
}

#[tokio::test]
async fn a_lock_of_the_whole_file_is_one_of_both_families_on_the_disk() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let (locks, place) = (Locks::default(), own(&disk));
    let byte = Span::new(7, 7).unwrap();
    let mut records = beside(&disk);
    assert!(is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    assert!(disk.as_file().try_lock_shared().is_err() && !records.set(byte, SHARED).unwrap());
    assert!(is_given(&locks, &place, whole(1, SHARED)).await);
    assert!(records.set(byte, SHARED).unwrap());
    disk.as_file().try_lock_shared().unwrap();
    // What is not given leaves what was there, whichever of the two stands in the way.
    let keeps_both = || disk.reopen().unwrap().try_lock().is_err();
    assert!(!is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    assert!(records.set(byte, None).unwrap());
    assert!(!is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    disk.as_file().unlock().unwrap();
    assert!(keeps_both() && !records.set(byte, EXCLUSIVE).unwrap());
    assert!(records.set(byte, SHARED).unwrap());
    assert!(!is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    assert!(keeps_both() && records.set(byte, None).unwrap());
    // Who gives a part back has not locked the whole any more.
    assert!(is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    assert!(is_given(&locks, &place, ask(1, (0, 9), None)).await);
    disk.as_file().try_lock().unwrap();
    assert!(records.set(byte, EXCLUSIVE).unwrap());
    assert!(!records.set(Span::new(10, 10).unwrap(), SHARED).unwrap());
    assert!(is_given(&locks, &place, whole(1, None)).await);
    assert!(records.set(Span::ALL, SHARED).is_ok_and(|given| !given), "there is the flock");
    disk.as_file().unlock().unwrap();
    assert!(records.set(Span::ALL, EXCLUSIVE).unwrap());
}

#[tokio::test]
async fn who_only_reads_can_have_the_whole_file_alone_and_write_later() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let (locks, place) = (Locks::default(), own(&disk));
    let reads = match place.clone() {
        Place::Own { device, inode, source, .. } => {
            Place::Own { device, inode, source, writes: false }
        }
        remote => remote,
    };
    assert!(is_given(&locks, &reads, whole(1, EXCLUSIVE)).await);
    assert!(disk.as_file().try_lock_shared().is_err());
    assert!(!beside(&disk).set(Span::new(0, 0).unwrap(), EXCLUSIVE).unwrap());
    locks.clear(&reads, Holder(1)).await;
    // A process that shares bytes, opens the file once more, and wants them alone.
    assert!(is_given(&locks, &reads, ask(1, (0, 9), SHARED)).await);
    assert!(is_given(&locks, &place, ask(1, (5, 9), EXCLUSIVE)).await);
    assert!(!beside(&disk).set(Span::new(5, 5).unwrap(), SHARED).unwrap());
    assert!(!beside(&disk).set(Span::new(0, 0).unwrap(), EXCLUSIVE).unwrap());
    assert!(beside(&disk).set(Span::new(0, 0).unwrap(), SHARED).unwrap());
}

#[tokio::test]
async fn who_waits_is_woken_or_gives_up() {
    let disk = tempfile::NamedTempFile::new().unwrap();
    let (locks, place) = (Arc::new(Locks::default()), own(&disk));
    assert!(is_given(&locks, &place, whole(1, EXCLUSIVE)).await);
    let waiting = {
        let (locks, place) = (Arc::clone(&locks), place.clone());
        tokio::spawn(async move { locks.wait(&place, whole(2, EXCLUSIVE), || false).await })
    };
    let signalled = AtomicBool::new(false);
    let given_up =
        locks.wait(&place, whole(3, EXCLUSIVE), || signalled.swap(true, Ordering::AcqRel));
    assert_eq!(given_up.await.unwrap_err().kind(), ErrorKind::Interrupted);
    assert!(!waiting.is_finished());
    locks.clear(&place, Holder(1)).await;
    timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap().unwrap();
    assert!(!is_given(&locks, &place, whole(1, SHARED)).await);
}

#[tokio::test]
async fn local_conflicts_need_no_round_trip_and_others_are_the_owners_to_tell() {
    let (locks, owner) = (Locks::default(), Arc::new(Owner::default()));
    locks.attach(Arc::clone(&owner) as _);
    owner.connection.store(1, Ordering::Relaxed);
    let elsewhere = Held {
        holder: Holder(99),
        pid: 0,
        span: Span::new(100, 200).unwrap(),
        mode: Mode::Exclusive,
    };
    owner.table().set(elsewhere);
    assert!(is_given(&locks, &remote(), ask(1, (0, 9), EXCLUSIVE)).await);
    assert!(!is_given(&locks, &remote(), ask(1, (150, 150), SHARED)).await);
    let asked = owner.asked.load(Ordering::Relaxed);
    assert!(!is_given(&locks, &remote(), ask(2, (0, 0), SHARED)).await);
    assert_eq!(owner.asked.load(Ordering::Relaxed), asked);
    assert!(is_given(&locks, &remote(), ask(2, (0, 0), None)).await);
    locks.clear(&remote(), Holder(2)).await;
    assert_eq!(owner.asked.load(Ordering::Relaxed), asked, "nothing is held, nothing is asked");
    locks.clear(&remote(), Holder(1)).await;
    locks.sweep();
    assert!(!owner.table().holds(Holder(1)) && !locks.knows(&remote()));
}

#[tokio::test]
async fn an_owner_that_comes_back_is_asked_again_for_what_is_held() {
    let (locks, owner) = (Arc::new(Locks::default()), Arc::new(Owner::default()));
    locks.attach(Arc::clone(&owner) as _);
    assert!(is_given(&locks, &remote(), ask(1, (0, 9), EXCLUSIVE)).await, "offline: local");
    assert!(!is_given(&locks, &remote(), ask(2, (0, 0), SHARED)).await);
    let tending = tokio::spawn(Arc::clone(&locks).tend());
    owner.connection.store(1, Ordering::Relaxed);
    let holds = || owner.table().holds(Holder(1));
    eventually(holds).await;
    // It lost its table, and is back under another connection.
    *owner.table() = Table::default();
    owner.connection.store(2, Ordering::Relaxed);
    eventually(holds).await;
    // Given back while it was away: what it believes to be held is not asked for again.
    owner.connection.store(0, Ordering::Relaxed);
    locks.clear(&remote(), Holder(1)).await;
    eventually(|| !locks.knows(&remote())).await;
    tending.abort();
}

async fn eventually(holds: impl Fn() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), waiting).await.expect("the condition");
}

#[test]
fn between_the_locks_of_a_holder_are_gaps() {
    let held = |first, last| Held {
        holder: Holder(1),
        pid: 0,
        span: Span::new(first, last).unwrap(),
        mode: Mode::Shared,
    };
    let gaps = |held: &[Held]| gaps(held).map(|s| (s.first(), s.last())).collect::<Vec<_>>();
    let end = Span::ALL.last();
    assert_eq!(gaps(&[]), []);
    assert_eq!(gaps(&[held(0, end)]), []);
    assert_eq!(gaps(&[held(5, 9), held(0, 2)]), [(3, 4), (10, end)]);
}
