//! Whatever bytes arrive, every decoder ends without a panic and within its memory.

use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use sync::wire::*;
use vfs_core::index::LogRow;
use vfs_core::library::{LibraryInfo, Stamp as ClockStamp};
use vfs_core::model::{
    Attr, ContentId, DeviceId, Entry, FileId, FileType, LocationId, Name, Seq, Stamp, Time,
};
use vfs_core::source::Version;

/// Counts the bytes that this thread holds, and their peak.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(change: isize) {
    // A thread that ends has no counters any more; nobody asks for them then.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call is passed on unchanged to the system's allocator; the counters are
// plain thread-local cells with constant initialisers, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: `ptr` came from `System.alloc` with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were held at once during `work`, beyond those held before.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.get();
    PEAK.set(before);
    work();
    (PEAK.get() - before).max(0) as usize
}

fn decode_everything(bytes: &[u8]) {
    let _ = decode::<Request>(bytes);
    let _ = decode::<Response>(bytes);
    let _ = decode::<PairRequest>(bytes);
    let _ = decode::<PairResponse>(bytes);
    let _ = decode::<MemberList>(bytes);
    let _ = decode::<MemberRecord>(bytes);
    let _ = decode::<LocationList>(bytes);
    let _ = decode::<Rows>(bytes);
}

/// What one message may take in memory: the elements that its collections are bound to,
/// and serde's own cautious reservations of 1 MiB.
const REQUEST_MEMORY: usize = 4 << 20;
const FRAME_MEMORY: usize = 16 << 20;

fn entry() -> Entry {
    let time = Time { secs: 1_700_000_000, nanos: 1 };
    Entry {
        file_id: FileId(9),
        disk_ino: 77,
        generation: 3,
        attr: Attr {
            file_type: FileType::File,
            perm: 0o644,
            uid: 1000,
            gid: 1000,
            nlink: 1,
            size: 4096,
            blocks: 8,
            mtime: time,
            ctime: time,
            btime: Some(time),
            rdev: 0,
        },
        content: Some(ContentId([5; 32])),
        target: None,
    }
}

fn samples() -> Vec<Vec<u8>> {
    let time = Time { secs: 1, nanos: 2 };
    let version = Version {
        location: LocationId([1; 16]),
        file: FileId(2),
        stamp: Stamp { disk_ino: 3, size: 4, mtime: time, ctime: time },
        content: Some(ContentId([6; 32])),
    };
    let hello = Hello {
        oldest: 1,
        newest: 1,
        library: "00ff".into(),
        session: 7,
        addresses: vec!["127.0.0.1:1".parse().unwrap(), "[::1]:2".parse().unwrap()],
    };
    let record = MemberRecord {
        id: DeviceId([8; 32]),
        name: "laptop".into(),
        life: 2,
        stamp: ClockStamp::default(),
        removed: false,
        addresses: hello.addresses.clone(),
    };
    let row = |seq| LogRow {
        seq: Seq(seq),
        parent: FileId::ROOT,
        name: Name::new(&b"name"[..]).unwrap(),
        entry: (seq % 2 == 0).then(entry),
    };
    let bytes = |m: Result<Vec<u8>, WireError>, header: usize| m.unwrap()[header..].to_vec();
    let fetch = Fetch { version: (&version).into(), offset: 0, len: 4096 };
    let follow = Follow { location: LocationId([1; 16]), log_id: 3, after: Seq(4) };
    let knock = Knock {
        ticket: [1; 16],
        name: "laptop".into(),
        nonce: [2; 32],
        proof: [3; 32],
        addresses: hello.addresses.clone(),
    };
    let library = LibraryInfo { id: "00ff".into(), name: "home".into() };
    let welcome = PairResponse::Welcome { library, inviter: "desk".into(), nonce: [4; 32] };
    let members = MemberList(vec![record.clone(), record.clone()]);
    let announced = Announced { id: LocationId([1; 16]), name: "photos".into(), read_only: false };
    vec![
        bytes(encode_request(1, &Request::Hello(hello.clone())), 6),
        bytes(encode_request(1, &Request::Fetch(fetch)), 6),
        bytes(encode_request(1, &Request::Rows(follow)), 6),
        bytes(encode_request(1, &PairRequest::Knock(knock)), 6),
        bytes(encode_frame(&Response::Hello(hello)), 4),
        bytes(encode_frame(&Response::Fetched { proof: vec![[1; 32]; 4] }), 4),
        bytes(encode_frame(&welcome), 4),
        bytes(encode_frame(&PairResponse::Admitted(members.clone())), 4),
        bytes(encode_frame(&members), 4),
        bytes(encode_frame(&record), 4),
        bytes(encode_frame(&LocationList(vec![announced])), 4),
        bytes(
            encode_frame(&Rows { rows: (0..9).map(row).collect(), upto: Seq(9), head: Seq(9) }),
            4,
        ),
    ]
}

fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let parts = (
        0..samples().len(),
        prop::collection::vec(change, 0..6),
        any::<prop::sample::Index>(),
        any::<bool>(),
    );
    parts.prop_map(|(which, changes, cut, is_cut)| {
        let mut bytes = samples().swap_remove(which);
        for (at, to) in changes {
            let at = at.index(bytes.len());
            bytes[at] = to;
        }
        if is_cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic_nor_fill_the_memory(
        bytes in prop::collection::vec(any::<u8>(), 0..MAX_REQUEST),
    ) {
        let peak = peak_of(|| decode_everything(&bytes));
        prop_assert!(peak <= REQUEST_MEMORY, "{peak} bytes");
    }

    #[test]
    fn mutated_and_cut_messages_never_panic_nor_fill_the_memory(bytes in mutated()) {
        let peak = peak_of(|| decode_everything(&bytes));
        prop_assert!(peak <= REQUEST_MEMORY, "{peak} bytes");
    }
}

#[test]
fn every_message_is_read_as_it_was_written() {
    let all = samples();
    assert!(matches!(decode(&all[0]), Ok(Request::Hello(_))));
    assert!(matches!(decode(&all[1]), Ok(Request::Fetch(f)) if f.len == 4096));
    assert!(matches!(decode(&all[5]), Ok(Response::Fetched { proof }) if proof.len() == 4));
    let Rows { rows, upto, .. } = decode(&all[11]).unwrap();
    assert_eq!((rows.len(), upto), (9, Seq(9)));
    assert_eq!(rows[2].entry, Some(entry()));
}

#[test]
fn what_follows_a_message_is_not_ignored() {
    let mut bytes = samples().swap_remove(1);
    bytes.push(0);
    assert!(decode::<Request>(&bytes).is_err());
}

#[test]
fn a_frame_of_the_smallest_elements_stays_within_its_memory() {
    // One tombstone in a few bytes, as many as fit: the count ends it, not the memory.
    let tombstone =
        LogRow { seq: Seq(1), parent: FileId(1), name: Name::new(&b"a"[..]).unwrap(), entry: None };
    let one = postcard::to_stdvec(&tombstone).unwrap();
    let count = MAX_FRAME / one.len();
    let mut bytes = postcard::to_stdvec(&count).unwrap();
    bytes.extend(one.repeat(count));
    bytes.extend([1, 1]);
    let peak = peak_of(|| assert!(decode::<Rows>(&bytes).is_err()));
    assert!(peak <= FRAME_MEMORY, "{peak} bytes");
}

#[test]
fn a_claimed_length_is_not_believed() {
    // Rows: 2^60 of them, and nothing more.
    let bytes = postcard::to_stdvec(&(1u64 << 60)).unwrap();
    let peak = peak_of(|| assert!(decode::<Rows>(&bytes).is_err()));
    assert!(peak <= REQUEST_MEMORY, "{peak} bytes");
}

#[test]
fn one_element_more_than_the_bound_is_refused() {
    let address = "127.0.0.1:1".parse().unwrap();
    let record = |n| MemberRecord {
        id: DeviceId([8; 32]),
        name: "laptop".into(),
        life: 2,
        stamp: ClockStamp::default(),
        removed: false,
        addresses: vec![address; n],
    };
    let encoded = |n| postcard::to_stdvec(&record(n)).unwrap();
    assert!(decode::<MemberRecord>(&encoded(MAX_ADDRESSES)).is_ok());
    assert!(decode::<MemberRecord>(&encoded(MAX_ADDRESSES + 1)).is_err());
}

#[test]
fn a_request_beyond_its_bound_is_not_sent() {
    let long = PairRequest::Knock(Knock {
        ticket: [0; 16],
        name: "x".repeat(MAX_REQUEST),
        nonce: [0; 32],
        proof: [0; 32],
        addresses: vec![],
    });
    assert!(matches!(encode_request(1, &long), Err(WireError::TooLong { .. })));
}

#[test]
fn the_common_version_is_the_newest_that_both_speak() {
    assert_eq!(common_version(OLDEST, NEWEST), Some(NEWEST));
    assert_eq!(common_version(NEWEST, u16::MAX), Some(NEWEST));
    assert_eq!(common_version(NEWEST + 1, u16::MAX), None);
    assert_eq!(common_version(0, OLDEST - 1), None);
}
