//! Whatever bytes arrive, every decoder ends without a panic and within its memory.

use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use sync::wire::*;
use vfs_core::index::{LogDigest, LogRow, Signed, Statement};
use vfs_core::library::{LibraryInfo, Stamp as ClockStamp};
use vfs_core::locks::{Action, Holder, LockAnswer, LockRequest, Mode, Span};
use vfs_core::model::{
    Attr, ContentId, DeviceId, Entry, FileId, FileType, LocationId, Name, Seq, Stamp, Time,
};
use vfs_core::ops::{
    Applied, Base, Change, Conflict, DRAWN_FILE_ID, MAX_EXTENTS, New, NewContent, Obstacle, Op,
    Outcome, Place,
};
use vfs_core::source::{Lent, Version, Wanted};

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
    let _ = decode::<StatementList>(bytes);
    let _ = decode::<Operations>(bytes);
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

fn content() -> NewContent {
    NewContent {
        size: 4096,
        mtime: Time { secs: 1, nanos: 2 },
        kept_bytes: 0,
        extents: vec![0..10, 20..24],
        digest: [3; 32],
        whole: None,
        inline: Some(vec![7; 14].into()),
    }
}

/// One of every kind.
fn operations() -> Vec<Op> {
    let name = |n: &[u8]| Name::new(n).unwrap();
    let at = || Place { dir: FileId::ROOT, name: name(b"name") };
    let file = FileId(DRAWN_FILE_ID | 5);
    let mtime = Time { secs: 1, nanos: 2 };
    let stamp = Stamp { disk_ino: 3, size: 4, mtime, ctime: mtime };
    let base = Base::Seen { stamp, content: Some(ContentId([6; 32])) };
    let link = New::Symlink(b"target"[..].into());
    let to = Place { dir: file, name: name(b"other") };
    let replaced = Some((FileId(9), Some(base.clone())));
    let changes = vec![
        Change::Create { at: at(), file, what: New::File(content()), perm: 0o644, mtime },
        Change::Create { at: at(), file, what: link, perm: 0o777, mtime },
        Change::Write { file, base: base.clone(), content: content(), path: vec![name(b"a")] },
        Change::Link { file, at: at() },
        Change::Rename { file, from: at(), to, replaced, exchange: false },
        Change::Unlink { file, at: at(), base: Some(base) },
        Change::Rmdir { file, at: at() },
        Change::SetAttr {
            file,
            base: None,
            perm: Some(0),
            uid: Some(1),
            gid: None,
            atime: None,
            mtime: None,
        },
        Change::Xattr { file, name: b"user.x"[..].into(), value: Some(b"y"[..].into()) },
    ];
    let op =
        |(n, change)| Op { no: n as u64 + 1, location: LocationId([1; 16]), log_id: 1, change };
    changes.into_iter().enumerate().map(op).collect()
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
    let deliver = Deliver { epoch: 5, session: 6, bulk: true };
    let staged = Staged { epoch: 5, no: 7, ranges: vec![0..1000, 2000..3000] };
    let kept = Conflict::KeptAs(vec![Name::new(&b"name"[..]).unwrap()]);
    let applied =
        Applied { file: None, version: None, seq: Seq(1), log_id: 2, conflict: Some(kept) };
    let later = Outcome::Later(Obstacle::Failed("why".into()));
    let outcomes = Response::Outcomes(vec![(7, Outcome::Applied(applied)), (8, later)]);
    let operations = Operations::Whole { settled_below: 3, ops: operations() };
    let (span, mode) = (Span::new(5, 9).unwrap(), Mode::Exclusive);
    let lock = LockRequest {
        location: LocationId([1; 16]),
        file: FileId(2),
        holder: Holder(3),
        span,
        action: Action::Set(mode),
    };
    let taken = LockAnswer::Taken { span, mode };
    let wanted = Wanted { content: ContentId([6; 32]), size: u64::MAX };
    let part = Operations::Part { bytes: vec![1; 100].into(), rest: 5 };
    let lent = Lent { ranges: vec![0..9; 64], is_ready: true };
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
        bytes(encode_frame(&operations), 4),
        bytes(encode_frame(&part), 4),
        bytes(encode_frame(&outcomes), 4),
        bytes(encode_request(2, &Request::Deliver(deliver)), 6),
        bytes(encode_request(2, &Request::Staged(staged)), 6),
        bytes(encode_request(2, &Request::Lock(lock)), 6),
        bytes(encode_frame(&Response::Lock(taken)), 4),
        bytes(encode_request(3, &Request::PassOn(PassOn { follow, head: Seq(9) })), 6),
        bytes(encode_frame(&StatementList(vec![signed()])), 4),
        bytes(encode_request(5, &Request::Lends(vec![wanted; 64])), 6),
        bytes(encode_request(5, &Request::Borrow(Borrow { wanted, offset: 5, len: 4096 })), 6),
        bytes(encode_frame(&Response::Lends(vec![lent; 64])), 4),
    ]
}

fn signed() -> Signed {
    let statement = Statement {
        location: LocationId([1; 16]),
        name: "photos".into(),
        read_only: true,
        shared_with: Some(vec![DeviceId([1; 32]), DeviceId([2; 32])]),
        log: LogDigest { log_id: 1, head: Seq(9), rows: 7, digest: [3; 32] },
        made_ms: 5,
    };
    Signed { statement, signature: [[4; 32], [5; 32]] }
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
    let Operations::Whole { settled_below: 3, ops } = decode(&all[12]).unwrap() else { panic!() };
    assert_eq!(ops, operations());
    assert!(ops.iter().all(Op::is_valid));
    assert!(matches!(decode(&all[14]), Ok(Response::Outcomes(o)) if o.len() == 2));
    assert!(matches!(decode(&all[16]), Ok(Request::Staged(s)) if s.ranges.len() == 2));
    assert!(matches!(decode(&all[17]), Ok(Request::Lock(l)) if l.holder == Holder(3)));
    assert!(matches!(decode(&all[18]), Ok(Response::Lock(LockAnswer::Taken { .. }))));
    assert!(matches!(decode(&all[19]), Ok(Request::PassOn(p)) if p.head == Seq(9)));
    assert!(matches!(decode(&all[20]), Ok(StatementList(list)) if list == [signed()]));
    assert!(matches!(decode(&all[21]), Ok(Request::Lends(wanted)) if wanted.len() == 64));
    assert!(matches!(decode(&all[22]), Ok(Request::Borrow(b)) if b.len == 4096));
    assert!(matches!(decode(&all[23]), Ok(Response::Lends(lent)) if lent.len() == 64));
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

/// An operation whose extents are these bytes, as they would be on the wire.
fn with_extents(count: usize, bytes: &[u8]) -> Vec<u8> {
    // Found by its place: a write without extents, and one with a single one.
    let write = |extents| {
        let content = NewContent { extents, inline: None, ..content() };
        let base = Base::After(1);
        let change = Change::Write { file: FileId(5), base, content, path: vec![] };
        let op = Op { no: 1, location: LocationId([1; 16]), log_id: 1, change };
        postcard::to_stdvec(&Operations::Whole { settled_below: 0, ops: vec![op] }).unwrap()
    };
    let (none, one) = (write(vec![]), write(vec![1..2]));
    let at = none.iter().zip(&one).position(|(a, b)| a != b).unwrap();
    [&none[..at], &postcard::to_stdvec(&count).unwrap(), bytes, &none[at + 1..]].concat()
}

#[test]
fn an_operation_of_the_smallest_extents_stays_within_its_memory() {
    let count = MAX_FRAME / 2 - 100;
    let bytes = with_extents(count, &vec![0; 2 * count]);
    assert!(bytes.len() <= MAX_FRAME);
    let peak = peak_of(|| assert!(decode::<Operations>(&bytes).is_ok()));
    assert!(peak <= FRAME_MEMORY, "{peak} bytes");
    let too_many = MAX_EXTENTS + 1;
    let bytes = with_extents(too_many, &vec![0; 2 * too_many]);
    assert!(decode::<Operations>(&bytes).is_err());
    let claimed = with_extents(1 << 40, &[]);
    let peak = peak_of(|| assert!(decode::<Operations>(&claimed).is_err()));
    assert!(peak <= REQUEST_MEMORY, "{peak} bytes");
}

#[test]
fn more_operations_than_the_bound_are_refused() {
    let op = operations().pop().unwrap();
    let frame = |n| Operations::Whole { settled_below: 0, ops: vec![op.clone(); n] };
    let bytes = |n| postcard::to_stdvec(&frame(n)).unwrap();
    assert!(decode::<Operations>(&bytes(MAX_OPS)).is_ok());
    assert!(decode::<Operations>(&bytes(MAX_OPS + 1)).is_err());
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
