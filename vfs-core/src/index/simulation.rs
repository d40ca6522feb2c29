//! Five devices, their disks, their links, and everything that happens to them, from one seed.
//!
//! Each device has a location with a disk on which programs work, and replicas of the four others.
//! Links come and go, so do devices; power fails and takes what was not durable; an index is
//! lost; clocks jump by a day; devices pass replicas on, and sometimes lie. Whatever the order: in
//! the end all devices have the same rows, and no replica that its owner's statement vouches for
//! was ever anything else than what its owner had.
//!
//! `SD_TEST_SEEDS=10000` runs so many seeds, `SD_TEST_SEED=17` one of them, and tells its steps.

use super::disk_model::{Disk, Kind, ROOT_INO};
use super::key;
use super::locations::draw_log_ids_from;
use super::mem::MemStore;
use super::relay::{Attested, Signed, Spool, Statement, Wanted};
use super::store::Table;
use super::sweep::gone_name;
use super::tests::{check_invariants, dump, name};
use super::*;
use crate::library::{Member, State as Library};
use crate::model::ContentId;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

const DEVICES: usize = 5;
const STEPS: usize = 250;
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const DAY_MS: i64 = 24 * 3600 * 1000;
const NOON_MS: i64 = 1_800_000_000_000;

/// The rows of a location without the number that each device has for it.
type Rows = Vec<(Table, Vec<u8>, Vec<u8>)>;

struct Device {
    id: DeviceId,
    location: LocationId,
    store: MemStore,
    /// `None`: it is switched off.
    index: Option<Index>,
    disk: Disk,
    clock_ms: i64,
    library: Library,
}

struct World {
    rng: StdRng,
    devices: Vec<Device>,
    links: [[bool; DEVICES]; DEVICES],
    /// What each statement said in full.
    stated: BTreeMap<(LocationId, u64, Seq), Rows>,
    is_told: bool,
}

impl World {
    fn new(seed: u64, is_told: bool) -> Self {
        draw_log_ids_from(seed);
        let mut world = Self {
            rng: StdRng::seed_from_u64(seed),
            devices: (0..DEVICES).map(Device::new).collect(),
            links: [[true; DEVICES]; DEVICES],
            stated: BTreeMap::new(),
            is_told,
        };
        for at in 0..DEVICES {
            world.devices[at].start();
        }
        world
    }

    fn tell(&self, what: impl FnOnce() -> String) {
        if self.is_told {
            eprintln!("{}", what());
        }
    }

    fn pick(&mut self) -> usize {
        self.rng.random_range(0..DEVICES)
    }

    fn pick_pair(&mut self) -> (usize, usize) {
        let one = self.pick();
        (one, (one + self.rng.random_range(1..DEVICES)) % DEVICES)
    }

    fn is_linked(&self, one: usize, other: usize) -> bool {
        let is_up = |at: usize| self.devices[at].index.is_some();
        one != other && self.links[one.min(other)][one.max(other)] && is_up(one) && is_up(other)
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..34 => self.work(),
            34..42 => self.observe(),
            42..46 => self.hash(),
            46..62 => self.follow(),
            62..72 => self.state(),
            72..84 => self.pass_on(),
            84..88 => self.switch_link(),
            88..91 => self.cut_off(),
            91..94 => self.switch_device(),
            94..95 => self.lose_index(),
            95..96 => self.jump(),
            96..97 => self.compact(),
            _ => self.gossip(),
        }
    }

    /// A program does something on a disk.
    fn work(&mut self) {
        let at = self.pick();
        let rng = &mut self.rng;
        let disk = &mut self.devices[at].disk;
        let dirs = disk.directories();
        let dir = *dirs.choose(rng).expect("the root is always there");
        let text = name(NAMES.choose(rng).expect("not empty"));
        let names: Vec<_> = disk.names.keys().cloned().collect();
        let file = names.choose(rng).cloned();
        match (rng.random_range(0..12), file) {
            (0..5, _) | (_, None) => {
                let kind =
                    [Kind::File, Kind::File, Kind::Directory, Kind::Directory, Kind::Symlink];
                disk.create(dir, text, *kind.choose(rng).expect("not empty"));
            }
            (5..7, Some(file)) => disk.write(disk.names[&file]),
            (7..9, Some(file)) => disk.rename(&file, (dir, text)),
            (9, Some(file)) => disk.link(&file, (dir, text)),
            (_, Some(file)) => disk.remove(&file),
        }
    }

    fn observe(&mut self) {
        let at = self.pick();
        // A sweep that has not ended yet: rows that nothing leads to any more.
        let is_cut_short = self.rng.random_bool(0.3);
        self.devices[at].scan(if is_cut_short { 1 } else { usize::MAX });
    }

    fn hash(&mut self) {
        let at = self.pick();
        self.devices[at].hash();
    }

    /// A device takes some rows of another's location from itself.
    fn follow(&mut self) {
        let (reader, owner) = self.pick_pair();
        let bytes = self.rng.random_range(1..1200);
        if self.is_linked(reader, owner) {
            self.tell(|| format!("{reader} follows {owner}"));
            self.take_rows(reader, owner, bytes);
        }
    }

    /// `false`: there was nothing new.
    fn take_rows(&mut self, reader: usize, owner: usize, bytes: usize) -> bool {
        let (from, to) = (self.devices[owner].index(), self.devices[reader].index());
        let at_owner = from.location_by_id(self.devices[owner].location).unwrap().no;
        let mut here = self.devices[reader].replica_of(&self.devices[owner]);
        let (log_id, head) = (from.log_id(at_owner), to.head(here));
        let view = from.view().unwrap();
        let begin = view.resume_at(at_owner, to.log_id(here), head).unwrap();
        let after = begin.after;
        assert_eq!(begin.log_id, log_id);
        let is_anew = (log_id, after) != (to.log_id(here), head);
        if is_anew {
            here = to.restart_replica(here, log_id).unwrap();
        }
        // Of a log with a floor, what was cut off on the way up to there is begun again.
        let bytes = if begin.floor > after { usize::MAX } else { bytes };
        let (rows, upto) = view.log_after(at_owner, after, bytes).unwrap();
        let is_whole = upto == from.head(at_owner);
        match is_whole {
            true => to.apply_replica(here, log_id, rows, upto).unwrap(),
            false => to.apply_replica_part(here, log_id, rows, upto).unwrap(),
        }
        check(to, here);
        is_anew || upto > after
    }

    /// An owner states what its location is, and those who can hear it compare.
    fn state(&mut self) {
        let owner = self.pick();
        if let Some(signed) = self.stated_by(owner) {
            for reader in 0..DEVICES {
                if self.is_linked(reader, owner) && self.rng.random_bool(0.8) {
                    self.attest(reader, owner, &signed);
                }
            }
        }
    }

    fn stated_by(&mut self, owner: usize) -> Option<Signed> {
        let device = &self.devices[owner];
        let index = device.index.as_ref()?;
        let no = index.location_by_id(device.location).unwrap().no;
        let statement = index.state_of(no, device.clock_ms as u64).unwrap()?;
        let log = statement.log;
        assert_eq!(log.rows, dump(index, Table::Entries, &key::location(no)).len() as u64);
        let stated = rows_of(index, no);
        let before =
            self.stated.entry((statement.location, log.log_id, log.head)).or_insert(stated.clone());
        assert_eq!(*before, stated, "one number stands for two states");
        Some(sign(device.id, statement))
    }

    fn attest(&self, reader: usize, owner: usize, signed: &Signed) {
        let here = self.devices[reader].replica_of(&self.devices[owner]);
        let attested = self.devices[reader].index().attest(here, signed).unwrap();
        assert_ne!(attested, Attested::Differs, "{reader} has other rows than {owner} sent");
        self.tell(|| format!("{reader} compares itself with {owner}: {attested:?}"));
    }

    /// A device drops tombstones of any location, whoever may still need them.
    fn compact(&mut self) {
        let at = self.pick();
        let Some(index) = &self.devices[at].index else { return };
        let locations = index.locations();
        let location = locations.choose(&mut self.rng).expect("its own at least");
        let upto = Seq(self.rng.random_range(0..=index.head(location.no).0 + 1));
        let dropped = index.compact(location.no, upto).unwrap();
        check(index, location.no);
        let left = dump(index, Table::Tombstones, &key::location(location.no));
        let is_right = |seq: &Vec<u8>| u64::from_be_bytes(seq[..].try_into().unwrap()) > upto.0;
        assert!(left.iter().all(|(_, seq)| is_right(seq)));
        self.tell(|| format!("{at} compacts {:?} to {upto:?}: {dropped}", location.owner.0[0]));
    }

    /// A device takes from another what that one has of a third.
    fn pass_on(&mut self) {
        let (reader, relay) = self.pick_pair();
        let owner = self.pick();
        if self.is_linked(reader, relay) && owner != reader && owner != relay {
            let lie = self.rng.random_bool(0.2).then(|| self.rng.random_range(0..4));
            self.relay(reader, relay, owner, lie);
        }
    }

    /// `false`: there was nothing to take.
    fn relay(&mut self, reader: usize, relay: usize, owner: usize, lie: Option<u8>) -> bool {
        let is_far_behind = self.rng.random_bool(0.3);
        let there = self.devices[relay].replica_of(&self.devices[owner]);
        let view = self.devices[relay].index().view().unwrap();
        let Some(signed) = view.attested(there).unwrap() else { return false };
        assert!(is_signed(self.devices[owner].id, &signed));
        let to = self.devices[reader].index();
        let wanted = to.wants(&signed.statement).unwrap();
        let here = self.devices[reader].replica_of(&self.devices[owner]);
        let after = match wanted {
            Wanted::Nothing => return false,
            Wanted::After(_, after) if !is_far_behind => Some(after),
            Wanted::After(..) | Wanted::All => None,
        };
        let log_id = signed.statement.log.log_id;
        // It may have dropped what belongs in between.
        let after =
            after.filter(|after| view.resume_at(there, log_id, *after).unwrap().after == *after);
        let mut lots = lots_after(&view, there, after.unwrap_or_default());
        let lie = lie.and_then(|how| falsify(&mut lots, how));
        let before = rows_of(to, here);
        let is_whole = after.is_none_or(|after| to.has_all(here, log_id, after));
        let taken = match after {
            None => take_whole(to, here, &signed, &lots),
            Some(_) => to.apply_stated(here, lots.concat(), &signed).unwrap_or(false),
        };
        if !is_whole && !taken && lie.is_none() {
            // Rows before these were missing: nobody can tell from a head which.
            assert_eq!(rows_of(to, here), before);
            assert!(take_whole(to, here, &signed, &lots_after(&view, there, Seq(0))));
            self.check_attested(reader, owner);
            return true;
        }
        self.tell(|| format!("{reader} takes {owner} from {relay}: {wanted:?}, {lie:?}: {taken}"));
        match lie {
            None => assert!(taken, "the truth is taken"),
            Some(Lie::Changed) => assert!(!taken, "a lie is refused"),
            // Nobody vouches for tombstones, and a row that is left out may be there already. What
            // comes of it is as stated, or refused.
            Some(Lie::Tombstone | Lie::LeftOut) => {}
        }
        let here = self.devices[reader].replica_of(&self.devices[owner]);
        match taken {
            true => self.check_attested(reader, owner),
            false => assert_eq!(rows_of(to, here), before, "what was refused left something"),
        }
        check(to, here);
        taken
    }

    /// What a replica shows under a statement is what the owner had then.
    fn check_attested(&self, reader: usize, owner: usize) {
        let index = self.devices[reader].index();
        let here = self.devices[reader].replica_of(&self.devices[owner]);
        let signed = index.view().unwrap().attested(here).unwrap().expect("just attested");
        let log = signed.statement.log;
        let stated = &self.stated[&(signed.statement.location, log.log_id, log.head)];
        assert_eq!(rows_of(index, here), *stated, "{reader} shows what {owner} never had");
    }

    fn switch_link(&mut self) {
        let (one, other) = self.pick_pair();
        let link = &mut self.links[one.min(other)][one.max(other)];
        *link = !*link;
    }

    /// Off, in good order or by a power cut, or on again.
    fn switch_device(&mut self) {
        let at = self.pick();
        let is_cut = self.rng.random_bool(0.5);
        let device = &mut self.devices[at];
        match device.index.take() {
            // An index that is closed writes what is left, which a crash takes.
            Some(_) if is_cut => device.store = device.store.after_crash(),
            Some(_) => {}
            None => device.start(),
        }
        let is_up = self.devices[at].index.is_some();
        self.tell(|| format!("{at} is up: {is_up}, cut: {is_cut}"));
    }

    /// The disk of an index broke; the location's own is all right.
    fn lose_index(&mut self) {
        let at = self.pick();
        let device = &mut self.devices[at];
        device.index = None;
        device.store = MemStore::default();
        device.start();
        self.tell(|| format!("{at} lost its index"));
    }

    /// A device was about to take a whole log, and got no further than its beginning.
    fn cut_off(&mut self) {
        let (reader, owner) = self.pick_pair();
        if self.devices[reader].index.is_none() {
            return;
        }
        if self.is_linked(reader, owner) {
            self.take_rows(reader, owner, 1);
        }
        let here = self.devices[reader].replica_of(&self.devices[owner]);
        let index = self.devices[reader].index();
        if let log_id @ 1.. = index.log_id(here) {
            let head = index.head(here);
            let from = index.rewind(here, log_id).unwrap();
            index.digest(here).unwrap();
            let attested = index.view().unwrap().attested(here).unwrap();
            assert!(from == head || attested.is_none(), "it has rows of later");
        }
    }

    fn jump(&mut self) {
        let at = self.pick();
        let by = if self.rng.random_bool(0.5) { DAY_MS / 2 } else { -DAY_MS / 2 };
        self.devices[at].clock_ms = NOON_MS + by;
    }

    /// A device takes another name, or tells one that it is linked with all it knows of members.
    fn gossip(&mut self) {
        let (from, to) = self.pick_pair();
        if self.rng.random_bool(0.5) {
            let text = format!("name {}", self.rng.random_range(0..1000));
            self.devices[from].rename(text);
        } else if self.is_linked(from, to) {
            self.tell_members(from, to);
        }
    }

    fn tell_members(&mut self, from: usize, to: usize) -> bool {
        let records = self.devices[from].library.members.clone();
        let now = self.devices[to].clock_ms as u64;
        let to = &mut self.devices[to].library;
        // Each of them, whatever became of the one before.
        records.into_iter().map(|record| to.merge_at(record, now)).filter(|news| *news).count() > 0
    }

    /// Everything that can be heard is heard, until there is nothing new.
    fn settle(&mut self) {
        for device in self.devices.iter_mut().filter(|d| d.index.is_some()) {
            device.scan(usize::MAX);
            device.hash();
        }
        loop {
            let mut is_news = false;
            for one in 0..DEVICES {
                for other in (0..DEVICES).filter(|other| *other != one) {
                    if self.is_linked(one, other) {
                        while self.take_rows(one, other, 700) {
                            is_news = true;
                        }
                        is_news |= self.tell_members(one, other);
                    }
                }
            }
            for owner in 0..DEVICES {
                let Some(signed) = self.stated_by(owner) else { continue };
                for reader in (0..DEVICES).filter(|reader| *reader != owner) {
                    if self.is_linked(reader, owner) {
                        self.attest(reader, owner, &signed);
                        self.check_attested(reader, owner);
                    }
                }
            }
            is_news |= self.pass_everything_on();
            if !is_news {
                return;
            }
        }
    }

    fn pass_everything_on(&mut self) -> bool {
        let mut is_news = false;
        for reader in 0..DEVICES {
            for relay in 0..DEVICES {
                for owner in (0..DEVICES).filter(|owner| ![reader, relay].contains(owner)) {
                    let is_away = !self.is_linked(reader, owner);
                    if is_away && self.is_linked(reader, relay) {
                        is_news |= self.relay(reader, relay, owner, None);
                    }
                }
            }
        }
        is_news
    }

    /// One device never comes back: the others agree on the newest of it that can be proved.
    fn end_without(&mut self, away: usize) {
        self.links = [[true; DEVICES]; DEVICES];
        self.devices[away].index = None;
        for at in (0..DEVICES).filter(|at| *at != away) {
            self.devices[at].start();
        }
        self.settle();
        let others = (0..DEVICES).filter(|at| *at != away);
        let proved = others.clone().filter_map(|at| {
            let here = self.devices[at].replica_of(&self.devices[away]);
            let view = self.devices[at].index().view().unwrap();
            view.attested(here).unwrap().map(|signed| (at, signed.statement.log))
        });
        let proved: Vec<_> = proved.collect();
        for (at, log) in &proved {
            self.check_attested(*at, away);
            let best = proved.iter().filter(|(_, other)| other.log_id == log.log_id);
            let best = best.map(|(_, other)| other.head).max();
            assert_eq!(best, Some(log.head), "{at} is behind others that it can hear");
        }
    }

    /// All are back: everybody has what every owner has.
    fn end_with_all(&mut self) {
        self.links = [[true; DEVICES]; DEVICES];
        for at in 0..DEVICES {
            self.devices[at].start();
        }
        self.settle();
        for owner in 0..DEVICES {
            let of = &self.devices[owner];
            let no = of.index().location_by_id(of.location).unwrap().no;
            assert_eq!(of.index().counts(no).entries, of.disk.names.len() as u64);
            for reader in (0..DEVICES).filter(|reader| *reader != owner) {
                let index = self.devices[reader].index();
                let here = self.devices[reader].replica_of(of);
                assert_eq!(rows_of(index, here), rows_of(of.index(), no), "{reader} of {owner}");
                assert_eq!(index.counts(here), of.index().counts(no));
            }
        }
        let names = |device: &Device| {
            let members = device.library.members.iter();
            members.map(|m| (m.id, m.name.clone())).collect::<BTreeMap<_, _>>()
        };
        let first = names(&self.devices[0]);
        assert!(self.devices.iter().all(|device| names(device) == first));
    }
}

impl Device {
    fn new(at: usize) -> Self {
        let id = DeviceId([at as u8 + 1; 32]);
        let mut device = Self {
            id,
            location: LocationId::new(id, [0; 8]),
            store: MemStore::default(),
            index: None,
            disk: Disk::new(),
            clock_ms: NOON_MS,
            library: Library::default(),
        };
        device.rename(format!("device {at}"));
        device
    }

    fn index(&self) -> &Index {
        self.index.as_ref().expect("it is up")
    }

    fn start(&mut self) {
        if self.index.is_some() {
            return;
        }
        let index = Index::open(Arc::new(self.store.clone()), self.id).unwrap();
        let no = index.put_location(location(self.id, self.location)).unwrap().no;
        index.observe_root(no, &self.disk.inodes[&ROOT_INO]).unwrap();
        self.index = Some(index);
    }

    fn replica_of(&self, owner: &Device) -> LocationNo {
        let index = self.index();
        let known = index.location_by_id(owner.location);
        let put = || index.put_location(location(owner.id, owner.location)).unwrap();
        known.unwrap_or_else(put).no
    }

    fn scan(&mut self, swept: usize) {
        let Some(index) = &self.index else { return };
        let no = index.location_by_id(self.location).unwrap().no;
        let mut waiting = vec![(ROOT_INO, FileId::ROOT)];
        while let Some((ino, id)) = waiting.pop() {
            let listing = self.disk.listing(ino);
            for (text, id) in index.observe_directory(no, id, listing.clone()).unwrap() {
                let dir = listing.iter().find(|now| now.name == text).expect("it was listed");
                waiting.push((dir.disk_ino, id));
            }
        }
        index.sweep_orphans(swept).unwrap();
    }

    fn hash(&mut self) {
        let Some(index) = &self.index else { return };
        let no = index.location_by_id(self.location).unwrap().no;
        for file in index.next_unhashed(no, 3).unwrap() {
            let Some(node) = index.view().unwrap().node(no, file).unwrap() else { continue };
            let stamp = node.entry.stamp();
            let content = ContentId::of(format!("{stamp:?}").as_bytes());
            index.set_content(no, file, &stamp, content).unwrap();
        }
    }

    fn rename(&mut self, text: String) {
        let now = self.clock_ms as u64;
        let (id, name, stamp) = (self.id, text, self.library.stamp_at(now));
        let (life, removed, addresses, last_seen_ms) = (0, false, vec![], None);
        let record = Member { id, name, life, stamp, removed, addresses, last_seen_ms };
        assert!(self.library.merge_at(record, now));
    }
}

fn location(owner: DeviceId, id: LocationId) -> NewLocation {
    let (root, read_only, shared_with) = (None, false, None);
    NewLocation { id, owner, name: "files".into(), root, read_only, shared_with }
}

/// Stands for an Ed25519 signature.
fn sign(owner: DeviceId, statement: Statement) -> Signed {
    let signature = [*blake3::keyed_hash(&owner.0, &statement.to_bytes()).as_bytes(), [0; 32]];
    Signed { statement, signature }
}

fn is_signed(owner: DeviceId, signed: &Signed) -> bool {
    sign(owner, signed.statement.clone()) == *signed
}

fn rows_of(index: &Index, no: LocationNo) -> Rows {
    let tables = [Table::Entries, Table::Nodes];
    let rows = tables.into_iter().flat_map(|table| {
        let rows = dump(index, table, &key::location(no)).into_iter();
        rows.map(move |(key, value)| (table, key[2..].to_vec(), value))
    });
    rows.collect()
}

/// Who has which bytes is noted later where rows come in parts.
fn check(index: &Index, no: LocationNo) {
    if dump(index, Table::Meta, b"unlisted").is_empty() {
        check_invariants(index, no);
    }
}

fn lots_after(view: &View<'_>, no: LocationNo, after: Seq) -> Vec<Vec<LogRow>> {
    let (mut lots, mut sent) = (Vec::new(), after);
    loop {
        let (rows, upto) = view.log_after(no, sent, 700).unwrap();
        if upto == sent {
            return lots;
        }
        lots.push(rows);
        sent = upto;
    }
}

fn take_whole(index: &Index, no: LocationNo, signed: &Signed, lots: &[Vec<LogRow>]) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = Spool::create(&folder.path().join("spool"), signed.clone()).unwrap();
    if lots.iter().any(|rows| spool.push(rows).is_err()) {
        return false;
    }
    let Ok(spooled) = spool.finish() else { return false };
    index.apply_spooled(no, spooled).unwrap();
    true
}

/// What of the rows that are passed on is not so.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Changed,
    LeftOut,
    Tombstone,
}

/// Changes what is passed on; `None`: there is nothing that could be changed so.
fn falsify(lots: &mut [Vec<LogRow>], how: u8) -> Option<Lie> {
    let rows = lots.iter_mut().find(|rows| !rows.is_empty())?;
    let row = rows.first_mut().expect("not empty");
    let lie = match (&row.entry, how) {
        (None, _) => Lie::Tombstone,
        (Some(_), 0) => Lie::LeftOut,
        (Some(_), _) => Lie::Changed,
    };
    match (how, lie) {
        (0, _) => drop(rows.remove(0)),
        (1, _) => row.name = name("never there"),
        (2, Lie::Changed) => row.entry = None,
        // As if a directory of this location were gone for good.
        (2, Lie::Tombstone) => {
            (row.parent, row.name) =
                (ROOT_PARENT, gone_name(FileId(FileId::ROOT.0 + row.seq.0 % 8)));
        }
        _ => row.seq = Seq(row.seq.0 - 1),
    }
    Some(lie)
}

fn run(seed: u64, is_told: bool) {
    let mut world = World::new(seed, is_told);
    for _ in 0..STEPS {
        world.step();
    }
    if seed.is_multiple_of(2) {
        let away = world.pick();
        world.end_without(away);
    }
    world.end_with_all();
}

#[test]
fn five_devices_agree_in_the_end_whatever_happened() {
    let number = |variable| std::env::var(variable).ok().and_then(|n: String| n.parse().ok());
    if let Some(seed) = number("SD_TEST_SEED") {
        return run(seed, true);
    }
    for seed in 0..number("SD_TEST_SEEDS").unwrap_or(300) {
        let ran = std::panic::catch_unwind(|| run(seed, false));
        assert!(ran.is_ok(), "seed {seed} fails; SD_TEST_SEED={seed} tells its steps");
    }
}
