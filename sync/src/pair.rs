//! Pairing: a single-use ticket, a proof of its secret, a code that both sides show.
//!
//! The inviting side owns [`Invitations`], in memory only: a restart withdraws them.
//! The channel is authenticated on both ends by endpoint ids, and the ticket names the
//! inviting one; the secret proves the joining one. The code lets two persons see that
//! the device that asks is the device in front of them. It is a hash over both ids, the
//! secret and a nonce of each side, and the inviting side draws its nonce last, so
//! neither side can search for a code.

use crate::error::SyncError;
use crate::node::{Invitation, Joined, Shared};
use crate::wire::{
    self, ALPN_PAIR, Knock, MAX_ADDRESSES, MAX_MEMBERS, MemberList, MemberRecord, NEWEST, OLDEST,
    PairRefusal, PairRequest, PairResponse, WireError, close,
};
use data_encoding::BASE32_NOPAD;
use iroh::endpoint::{Connection, RecvStream, SendStream};
use iroh::{EndpointAddr, PublicKey, RelayUrl, TransportAddr};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use vfs_core::library::{LibraryInfo, Member, State};
use vfs_core::model::DeviceId;
use vfs_core::path::check_label;

/// What every ticket begins with, its format included.
const PREFIX: &str = "sd1";
const TICKET_FORMAT: u8 = 1;
const CHECKSUM_BYTES: usize = 4;
/// The longest ticket looked at, in characters.
const MAX_TICKET: usize = 2048;

/// How long the inviting device may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long to try to reach it.
const REACH: Duration = Duration::from_secs(8);
/// Wrong secrets after which an invitation is withdrawn.
const MAX_WRONG: u32 = 5;
/// Connections that may wait to pair at once.
const MAX_PAIRING: usize = 8;
/// How long a wrong knock waits for its answer, so that trying is slow.
const WRONG_DELAY: Duration = Duration::from_secs(1);
/// How long an invitation that is over is remembered, to say why it is refused.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// What the inviting person hands over.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// The inviting device.
    pub inviter: DeviceId,
    /// What proves the ticket.
    pub secret: [u8; 16],
    /// Seconds since 1970 from when on it is refused.
    pub expires: u64,
    /// Where the inviting device listens.
    pub addresses: Vec<SocketAddr>,
    /// Its relay, when it has one.
    pub relay: Option<String>,
}

impl Ticket {
    /// The text form: letters and digits only.
    pub fn to_text(&self) -> String {
        let mut bytes = vec![TICKET_FORMAT];
        bytes.extend(postcard::to_stdvec(self).unwrap_or_default());
        bytes.extend_from_slice(&checksum(&bytes));
        PREFIX.to_owned() + &BASE32_NOPAD.encode(&bytes).to_lowercase()
    }

    /// From its text form; white space, as line breaks make it, and case do not matter.
    pub fn from_text(text: &str) -> Result<Self, SyncError> {
        if text.len() > MAX_TICKET {
            return Err(SyncError::Mistyped);
        }
        let text: String = text.split_whitespace().collect();
        let rest = text
            .get(..PREFIX.len())
            .filter(|p| p.eq_ignore_ascii_case(PREFIX))
            .map(|_| text[PREFIX.len()..].to_uppercase())
            .ok_or(SyncError::Mistyped)?;
        let bytes = BASE32_NOPAD.decode(rest.as_bytes()).map_err(|_| SyncError::Mistyped)?;
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(SyncError::Mistyped)?;
        if *sum != checksum(body) {
            return Err(SyncError::Mistyped);
        }
        match body.split_first() {
            Some((&TICKET_FORMAT, rest)) => wire::decode(rest).map_err(|_| SyncError::Mistyped),
            Some((&found, _)) if found > TICKET_FORMAT => {
                Err(SyncError::NewerTicket { found, known: TICKET_FORMAT })
            }
            _ => Err(SyncError::Mistyped),
        }
    }

    fn is_expired(&self) -> bool {
        SystemTime::now() >= UNIX_EPOCH + Duration::from_secs(self.expires.min(1 << 40))
    }

    fn endpoint(&self) -> Result<EndpointAddr, SyncError> {
        let key = PublicKey::from_bytes(&self.inviter.0).map_err(|_| SyncError::Mistyped)?;
        let direct = self.addresses.iter().take(MAX_ADDRESSES).copied().map(TransportAddr::Ip);
        let relay = self.relay.as_ref().and_then(|r| r.parse::<RelayUrl>().ok());
        Ok(EndpointAddr::new(key).with_addrs(direct.chain(relay.map(TransportAddr::Relay))))
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECKSUM_BYTES]);
    sum
}

/// Names a ticket without giving its secret away.
fn tag(secret: &[u8; 16]) -> [u8; 16] {
    let mut tag = [0; 16];
    let key = blake3::derive_key("spacedrive 2026 pairing ticket tag", secret);
    tag.copy_from_slice(&key[..16]);
    tag
}

/// What both sides know once the knock was answered.
struct Transcript<'a> {
    secret: &'a [u8; 16],
    inviter: DeviceId,
    joiner: DeviceId,
    name: &'a str,
}

impl Transcript<'_> {
    fn keyed(&self, purpose: &str, nonces: &[&[u8; 32]]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&blake3::derive_key(purpose, self.secret));
        hasher.update(&self.inviter.0).update(&self.joiner.0);
        for nonce in nonces {
            hasher.update(*nonce);
        }
        hasher.update(self.name.as_bytes());
        hasher.finalize()
    }

    fn proof(&self, nonce: &[u8; 32]) -> blake3::Hash {
        self.keyed("spacedrive 2026 pairing proof", &[nonce])
    }

    /// Six digits; the last of 2^32 possible values favour some codes by less than one in 4,000.
    fn code(&self, theirs: &[u8; 32], ours: &[u8; 32]) -> String {
        let hash = self.keyed("spacedrive 2026 pairing code", &[theirs, ours]);
        let [a, b, c, d, ..] = *hash.as_bytes();
        let number = u32::from_le_bytes([a, b, c, d]) % 1_000_000;
        format!("{:03} {:03}", number / 1000, number % 1000)
    }
}

/// How far an invitation got.
#[derive(Clone, Debug)]
enum Stage {
    Open,
    Asked(Joined),
    Joined(Joined),
    Withdrawn,
}

struct Invite {
    id: u64,
    secret: [u8; 16],
    until: Instant,
    wrong: u32,
    stage: watch::Sender<Stage>,
}

impl Invite {
    fn is_over(&self) -> bool {
        Instant::now() >= self.until || matches!(*self.stage.borrow(), Stage::Withdrawn)
    }
}

impl Drop for Invite {
    fn drop(&mut self) {
        self.secret.fill(0);
    }
}

/// The invitations of this node.
pub(crate) struct Invitations {
    open: Mutex<HashMap<[u8; 16], Invite>>,
    slots: Semaphore,
}

impl Default for Invitations {
    fn default() -> Self {
        Self { open: Mutex::default(), slots: Semaphore::new(MAX_PAIRING) }
    }
}

impl Invitations {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 16], Invite>> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn add(&self, secret: [u8; 16], valid_for: Duration) -> u64 {
        let mut open = self.lock();
        open.retain(|_, i| i.until.elapsed() < REMEMBERED);
        let id = rand::random();
        let until = Instant::now() + valid_for;
        let stage = watch::Sender::new(Stage::Open);
        open.insert(tag(&secret), Invite { id, secret, until, wrong: 0, stage });
        id
    }

    fn watch(&self, id: u64) -> Result<(watch::Receiver<Stage>, Instant), SyncError> {
        let open = self.lock();
        let invite = open.values().find(|i| i.id == id).ok_or(SyncError::NoInvitation)?;
        Ok((invite.stage.subscribe(), invite.until))
    }

    async fn wait(
        &self,
        id: u64,
        arrived: impl Fn(&Stage) -> Option<Joined>,
    ) -> Result<Joined, SyncError> {
        let (mut stage, until) = self.watch(id)?;
        let reached = stage.wait_for(|s| arrived(s).is_some() || matches!(s, Stage::Withdrawn));
        match tokio::time::timeout_at(until.into(), reached).await {
            Ok(Ok(stage)) => arrived(&stage).ok_or(SyncError::Expired),
            _ => Err(SyncError::Expired),
        }
    }

    /// Checks a knock; on success the ticket belongs to this joiner alone.
    fn claim(
        &self,
        me: DeviceId,
        joiner: DeviceId,
        knock: &Knock,
        nonce: &[u8; 32],
        may_join: impl FnOnce() -> Result<(), PairRefusal>,
    ) -> Result<Joined, PairRefusal> {
        let mut open = self.lock();
        let invite = open.get_mut(&knock.ticket).ok_or(PairRefusal::Expired)?;
        let transcript =
            Transcript { secret: &invite.secret, inviter: me, joiner, name: &knock.name };
        // `blake3::Hash` compares in constant time.
        if transcript.proof(&knock.nonce) != blake3::Hash::from_bytes(knock.proof) {
            invite.wrong += 1;
            if invite.wrong >= MAX_WRONG {
                invite.stage.send_replace(Stage::Withdrawn);
            }
            return Err(PairRefusal::WrongSecret);
        }
        if matches!(&*invite.stage.borrow(), Stage::Joined(_))
            || matches!(&*invite.stage.borrow(), Stage::Asked(j) if j.device != joiner)
        {
            return Err(PairRefusal::Used);
        }
        if invite.is_over() {
            return Err(PairRefusal::Expired);
        }
        // A name that is taken does not use the ticket up.
        may_join()?;
        let code = transcript.code(&knock.nonce, nonce);
        let joined = Joined { device: joiner, name: knock.name.clone(), code };
        invite.stage.send_replace(Stage::Asked(joined.clone()));
        Ok(joined)
    }

    /// How long the invitation still lasts.
    fn left(&self, ticket: &[u8; 16]) -> Duration {
        let until = self.lock().get(ticket).map(|i| i.until);
        until.map_or(Duration::ZERO, |u| u.saturating_duration_since(Instant::now()))
    }

    /// The joiner's person agreed: `Ok` once, before the invitation is over.
    fn use_up(&self, ticket: &[u8; 16], joined: &Joined) -> Result<(), PairRefusal> {
        let open = self.lock();
        let invite = open.get(ticket).ok_or(PairRefusal::Expired)?;
        if invite.is_over() {
            return Err(PairRefusal::Expired);
        }
        let is_asked = matches!(&*invite.stage.borrow(), Stage::Asked(j) if j == joined);
        if is_asked { Ok(()) } else { Err(PairRefusal::Used) }
    }

    /// Ends an invitation that nobody has used yet.
    pub(crate) fn withdraw(&self, id: u64) {
        if let Some(invite) = self.lock().values().find(|i| i.id == id) {
            invite.stage.send_if_modified(|stage| {
                let unused = !matches!(stage, Stage::Joined(_));
                if unused {
                    *stage = Stage::Withdrawn;
                }
                unused
            });
        }
    }

    fn done(&self, ticket: &[u8; 16], joined: Joined) {
        if let Some(invite) = self.lock().get_mut(ticket) {
            invite.stage.send_replace(Stage::Joined(joined));
        }
    }
}

/// Makes a ticket for this device's library.
pub(crate) fn invite(shared: &Shared, valid_for: Duration) -> Result<Invitation, SyncError> {
    if !shared.library.with(|s| s.library.is_some() && s.member(shared.me).is_some()) {
        return Err(SyncError::NoLibrary);
    }
    let secret: [u8; 16] = rand::random();
    let expires = SystemTime::now() + valid_for;
    let ticket = Ticket {
        inviter: shared.me,
        secret,
        expires: expires.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        addresses: shared.addresses(),
        relay: shared.relay.as_ref().map(ToString::to_string),
    };
    let id = shared.invitations.add(secret, valid_for);
    Ok(Invitation { id, ticket: ticket.to_text(), expires })
}

/// Waits for a device to show the ticket.
pub(crate) async fn asked(shared: &Shared, id: u64) -> Result<Joined, SyncError> {
    let any = |stage: &Stage| match stage {
        Stage::Asked(j) | Stage::Joined(j) => Some(j.clone()),
        _ => None,
    };
    shared.invitations.wait(id, any).await
}

/// Waits for a device to be admitted.
pub(crate) async fn joined(shared: &Shared, id: u64) -> Result<Joined, SyncError> {
    let admitted = |stage: &Stage| match stage {
        Stage::Joined(j) => Some(j.clone()),
        _ => None,
    };
    shared.invitations.wait(id, admitted).await
}

/// Serves one connection of a device that wants to join.
pub(crate) async fn serve(shared: &Shared, connection: Connection) {
    let Ok(_slot) = shared.invitations.slots.try_acquire() else {
        return connection.close(close::BUSY.into(), b"busy");
    };
    if let Err(error) = converse(shared, &connection).await {
        tracing::debug!(%error, "pairing");
    }
    // The joiner closes once it has the answer; closing first could overtake it.
    let _ = timeout(ANSWER, connection.closed()).await;
    connection.close(close::PAIRED.into(), b"");
}

async fn converse(shared: &Shared, connection: &Connection) -> Result<(), WireError> {
    let joiner = DeviceId(*connection.remote_id().as_bytes());
    let (mut send, mut recv) = within(ANSWER, async { Ok(connection.accept_bi().await?) }).await?;
    let knock = match within(ANSWER, wire::receive_request(&mut recv)).await {
        Ok(PairRequest::Knock(knock)) => knock,
        Ok(_) => return refuse(&mut send, PairRefusal::Malformed).await,
        Err(WireError::Version(_)) => {
            let range = PairRefusal::Version { oldest: OLDEST, newest: NEWEST };
            return refuse(&mut send, range).await;
        }
        Err(e) if e.is_breach() => return refuse(&mut send, PairRefusal::Malformed).await,
        Err(e) => return Err(e),
    };
    let nonce: [u8; 32] = rand::random();
    let (welcome, joined) = match welcome(shared, joiner, &knock, nonce) {
        Ok(welcome) => welcome,
        Err(refusal) => {
            if matches!(refusal, PairRefusal::WrongSecret | PairRefusal::Expired) {
                tokio::time::sleep(WRONG_DELAY).await;
            }
            return refuse(&mut send, refusal).await;
        }
    };
    wire::send_frame(&mut send, &welcome).await?;
    let left = shared.invitations.left(&knock.ticket);
    match timeout(left, wire::receive_frame(&mut recv)).await {
        Ok(answer) => match answer? {
            PairRequest::Confirm => {}
            PairRequest::Knock(_) => return refuse(&mut send, PairRefusal::Malformed).await,
        },
        Err(_) => return refuse(&mut send, PairRefusal::Expired).await,
    }
    match admit(shared, &knock, joined).await {
        Ok(list) => {
            wire::send_frame(&mut send, &PairResponse::Admitted(list)).await?;
            let _ = send.finish();
            shared.members_changed();
            Ok(())
        }
        Err(refusal) => refuse(&mut send, refusal).await,
    }
}

async fn refuse(send: &mut SendStream, refusal: PairRefusal) -> Result<(), WireError> {
    wire::send_frame(send, &PairResponse::Refused(refusal)).await?;
    let _ = send.finish();
    Ok(())
}

/// Decides about a knock: the proof first, so that nothing is told without it.
fn welcome(
    shared: &Shared,
    joiner: DeviceId,
    knock: &Knock,
    nonce: [u8; 32],
) -> Result<(PairResponse, Joined), PairRefusal> {
    let state = shared.library.state();
    let library = state.library.clone().ok_or(PairRefusal::Expired)?;
    let inviter = state.member(shared.me).ok_or(PairRefusal::Expired)?.name.clone();
    let joined = shared
        .invitations
        .claim(shared.me, joiner, knock, &nonce, || may_have_name(&state, joiner, &knock.name))?;
    Ok((PairResponse::Welcome { library, inviter, nonce }, joined))
}

fn may_have_name(state: &State, joiner: DeviceId, name: &str) -> Result<(), PairRefusal> {
    if check_label(name).is_err() {
        return Err(PairRefusal::BadName);
    }
    if state.member_named(name).is_some_and(|m| m.id != joiner) {
        return Err(PairRefusal::NameTaken);
    }
    if state.member(joiner).is_none() && state.active().count() >= MAX_MEMBERS {
        return Err(PairRefusal::LibraryFull);
    }
    Ok(())
}

/// Makes the joiner a member, durably, and lists all members.
async fn admit(shared: &Shared, knock: &Knock, joined: Joined) -> Result<MemberList, PairRefusal> {
    shared.invitations.use_up(&knock.ticket, &joined)?;
    let (device, name) = (joined.device, joined.name.clone());
    let addresses = crate::members::plausible(&knock.addresses);
    let me = shared.me;
    let admitted = shared
        .update_library(move |state| {
            if state.member(me).is_none() {
                return Err(PairRefusal::Expired);
            }
            may_have_name(state, device, &name)?;
            crate::members::make_room(state, device);
            let stamp = state.next_stamp();
            let life = state.life_of(device);
            state.merge(Member {
                id: device,
                name,
                life,
                stamp,
                removed: false,
                addresses,
                last_seen_ms: None,
            });
            Ok(MemberList(state.members.iter().map(MemberRecord::from).collect()))
        })
        .await
        .map_err(|_| PairRefusal::Failed)??;
    shared.invitations.done(&knock.ticket, joined);
    Ok(admitted)
}

/// A joining device's side after the knock was answered.
pub(crate) struct Waiting {
    pub(crate) library: LibraryInfo,
    pub(crate) inviter: String,
    pub(crate) code: String,
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    name: String,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.connection.close(close::PAIRED.into(), b"");
    }
}

/// Contacts the inviting device and proves the ticket.
pub(crate) async fn join(shared: &Shared, text: &str, name: &str) -> Result<Waiting, SyncError> {
    let ticket = Ticket::from_text(text)?;
    check_label(name).map_err(|reason| SyncError::BadName { name: name.to_owned(), reason })?;
    may_join(shared, &ticket)?;
    let reached = timeout(REACH, shared.endpoint.connect(ticket.endpoint()?, ALPN_PAIR)).await;
    let connection = match reached {
        Ok(Ok(connection)) => connection,
        _ if ticket.is_expired() => return Err(SyncError::Expired),
        _ => return Err(SyncError::NotReachable { addresses: ticket.addresses }),
    };
    match knock(shared, &ticket, name, &connection).await {
        Err(SyncError::Protocol(reason)) => {
            let closed = connection.close_reason();
            connection.close(close::PAIRED.into(), b"");
            match closed.as_ref().and_then(crate::presence::close_code) {
                Some(close::BUSY) => Err(SyncError::TooManyAttempts),
                _ => Err(SyncError::Protocol(reason)),
            }
        }
        answer => answer,
    }
}

fn may_join(shared: &Shared, ticket: &Ticket) -> Result<(), SyncError> {
    shared.library.with(|state| {
        let Some(library) = state.library.as_ref().filter(|_| state.member(shared.me).is_some())
        else {
            return Ok(());
        };
        let library = library.name.clone();
        match state.member(ticket.inviter) {
            Some(_) => Err(SyncError::AlreadyMember { library }),
            None => Err(SyncError::OtherLibrary { library }),
        }
    })
}

async fn knock(
    shared: &Shared,
    ticket: &Ticket,
    name: &str,
    connection: &Connection,
) -> Result<Waiting, SyncError> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(WireError::from)?;
    let transcript =
        Transcript { secret: &ticket.secret, inviter: ticket.inviter, joiner: shared.me, name };
    let nonce: [u8; 32] = rand::random();
    let request = PairRequest::Knock(Knock {
        ticket: tag(&ticket.secret),
        name: name.to_owned(),
        nonce,
        proof: *transcript.proof(&nonce).as_bytes(),
        addresses: shared.addresses(),
    });
    wire::send_request(&mut send, OLDEST, &request).await?;
    match within(ANSWER, wire::receive_frame(&mut recv)).await? {
        PairResponse::Welcome { library, inviter, nonce: theirs } => {
            check_welcome(&library, &inviter)?;
            let code = transcript.code(&nonce, &theirs);
            let (connection, name) = (connection.clone(), name.to_owned());
            Ok(Waiting { library, inviter, code, connection, send, recv, name })
        }
        PairResponse::Refused(refusal) => {
            connection.close(close::PAIRED.into(), b"");
            Err(refused(refusal, name))
        }
        PairResponse::Admitted(_) => Err(SyncError::Protocol("admitted too early".into())),
    }
}

/// The texts will be shown and stored: they keep the rules of labels.
fn check_welcome(library: &LibraryInfo, inviter: &str) -> Result<(), SyncError> {
    let is_id = library.id.len() <= 64 && library.id.chars().all(|c| c.is_ascii_alphanumeric());
    let is_name = library.name.len() <= wire::MAX_LABEL
        && !library.name.chars().any(char::is_control)
        && check_label(inviter).is_ok();
    if is_id && is_name { Ok(()) } else { Err(SyncError::Protocol("names out of bounds".into())) }
}

/// The joining person agreed: asks to be admitted, and takes the members over.
pub(crate) async fn confirm(shared: &Shared, mut waiting: Waiting) -> Result<(), SyncError> {
    // The other side may have ended the stream with an answer already: that one counts.
    let sent = wire::send_frame(&mut waiting.send, &PairRequest::Confirm).await;
    let answer = match within(ANSWER, wire::receive_frame(&mut waiting.recv)).await {
        Ok(answer) => answer,
        Err(_) if is_over(&waiting.connection) => return Err(SyncError::Expired),
        Err(error) => return Err(sent.err().unwrap_or(error).into()),
    };
    match answer {
        PairResponse::Admitted(list) => {
            let (me, library) = (shared.me, waiting.library.clone());
            shared.update_library(move |state| take_over(state, me, library, list)).await??;
            shared.members_changed();
            Ok(())
        }
        PairResponse::Refused(refusal) => Err(refused(refusal, &waiting.name)),
        PairResponse::Welcome { .. } => Err(SyncError::Protocol("welcomed twice".into())),
    }
}

/// Whether the inviting side ended the pairing, which it does when the time is over.
fn is_over(connection: &Connection) -> bool {
    let closed = connection.close_reason();
    closed.as_ref().and_then(crate::presence::close_code) == Some(close::PAIRED)
}

fn take_over(
    state: &mut State,
    me: DeviceId,
    library: LibraryInfo,
    list: MemberList,
) -> Result<(), SyncError> {
    let mut next = state.clone();
    next.library = Some(library);
    next.members.clear();
    for record in list.0 {
        if crate::members::is_acceptable(&record) {
            next.merge(record.into());
        }
    }
    if next.member(me).is_none() {
        return Err(SyncError::Protocol(
            "this device is not in its list of members; are both clocks right?".into(),
        ));
    }
    *state = next;
    Ok(())
}

fn refused(refusal: PairRefusal, name: &str) -> SyncError {
    let name = name.to_owned();
    match refusal {
        PairRefusal::Version { oldest, newest } => {
            SyncError::Version { oldest, newest, ours_oldest: OLDEST, ours_newest: NEWEST }
        }
        PairRefusal::Malformed => SyncError::Protocol("it did not understand this one".into()),
        PairRefusal::Expired => SyncError::Expired,
        PairRefusal::Used => SyncError::Used,
        PairRefusal::WrongSecret => SyncError::WrongSecret,
        PairRefusal::NameTaken => SyncError::NameTaken { name },
        PairRefusal::BadName => {
            SyncError::BadName { name, reason: vfs_core::path::LabelError::Form }
        }
        PairRefusal::LibraryFull => SyncError::LibraryFull,
        PairRefusal::Failed => SyncError::Protocol("it could not store the new member".into()),
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, WireError>>,
) -> Result<T, WireError> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(WireError::Lost("no answer in time".into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket() -> Ticket {
        Ticket {
            inviter: DeviceId([3; 32]),
            secret: [7; 16],
            expires: 1_800_000_000,
            addresses: vec!["192.168.1.5:40000".parse().unwrap(), "[::1]:1".parse().unwrap()],
            relay: None,
        }
    }

    #[test]
    fn a_ticket_survives_its_text_form_case_and_line_breaks() {
        let text = ticket().to_text();
        assert!(text.starts_with("sd1"));
        assert_eq!(Ticket::from_text(&text).unwrap(), ticket());
        let (a, b) = text.split_at(40);
        let folded = format!("  {}\n{b}\n", a.to_uppercase());
        assert_eq!(Ticket::from_text(&folded).unwrap(), ticket());
    }

    #[test]
    fn any_one_wrong_missing_or_doubled_character_is_told() {
        let text = ticket().to_text();
        for i in 0..text.len() {
            let other = if &text[i..=i] == "q" { "r" } else { "q" };
            let tail = &text[i + 1..];
            for wrong in [
                format!("{}{other}{tail}", &text[..i]),
                format!("{}{tail}", &text[..i]),
                format!("{}{}{tail}", &text[..=i], &text[i..=i]),
            ] {
                if wrong != text {
                    assert!(
                        matches!(Ticket::from_text(&wrong), Err(SyncError::Mistyped)),
                        "{wrong}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_ticket_of_a_later_format_is_told() {
        let mut bytes = vec![TICKET_FORMAT + 1, 1, 2, 3];
        bytes.extend_from_slice(&checksum(&bytes));
        let text = format!("sd1{}", BASE32_NOPAD.encode(&bytes));
        assert!(matches!(Ticket::from_text(&text), Err(SyncError::NewerTicket { found: 2, .. })));
    }

    #[test]
    fn the_code_depends_on_everything_both_sides_know() {
        let base = Transcript {
            secret: &[1; 16],
            inviter: DeviceId([2; 32]),
            joiner: DeviceId([3; 32]),
            name: "a",
        };
        let (x, y) = ([4; 32], [5; 32]);
        let code = base.code(&x, &y);
        assert_eq!(code, base.code(&x, &y));
        let others = [
            Transcript { secret: &[9; 16], ..base }.code(&x, &y),
            Transcript { joiner: DeviceId([9; 32]), ..base }.code(&x, &y),
            Transcript { inviter: DeviceId([9; 32]), ..base }.code(&x, &y),
            Transcript { name: "b", ..base }.code(&x, &y),
            base.code(&y, &x),
        ];
        assert!(others.iter().all(|o| *o != code));
    }

    proptest! {
        #[test]
        fn no_text_makes_a_ticket_panic(text in "\\PC{0,200}") {
            let _ = Ticket::from_text(&text);
            let _ = Ticket::from_text(&format!("sd1{text}"));
        }
    }
}
