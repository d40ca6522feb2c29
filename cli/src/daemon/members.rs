//! The library and its devices: create, invite, join, rename, remove.

use super::parts::{Daemon, library_failure};
use super::serve::Link;
use crate::commands::no_library;
use crate::control::Event;
use crate::failure::{Code, Failure, Outcome, nearest};
use crate::paths;
use crate::reply::{DeviceName, DeviceReply, Invited, JoinReply, JoinedReply, LibraryReply};
use std::ffi::OsStr;
use std::time::Duration;
use sync::{Node, SyncError};
use vfs_core::changes::Change;
use vfs_core::library::{LibraryInfo, Member, State};
use vfs_core::model::DeviceId;
use vfs_core::path::check_label;

impl Daemon {
    /// The library and this device in it.
    pub fn membership(&self) -> Outcome<(LibraryInfo, Member)> {
        self.library.with(|state| {
            let library = state.library.clone().ok_or_else(no_library)?;
            match state.member(self.me) {
                Some(me) => Ok((library, me.clone())),
                None => Err(Failure::new(
                    Code::NoLibrary,
                    format!("this device was removed from the library “{}”", library.name),
                )
                .hint("join again with a new ticket: sd device join TICKET")),
            }
        })
    }

    pub fn library_info(&self) -> Outcome<LibraryReply> {
        let (library, me) = self.membership()?;
        let devices = self.library.with(|state| state.active().map(device_name).collect());
        let device = device_name(&me);
        Ok(LibraryReply { id: library.id, name: library.name, device, devices })
    }

    pub fn create_library(&self, name: &str, device_name: Option<&str>) -> Outcome<LibraryReply> {
        check(name, "library")?;
        let device = asked_or_host_name(device_name)?;
        let (me, id) = (self.me, hex(&rand::random::<[u8; 16]>()));
        let created = self.library.update(|state| {
            if let Some(library) = &state.library {
                return Err(already_in(&library.name));
            }
            state.library = Some(LibraryInfo { id, name: name.to_owned() });
            let stamp = state.next_stamp();
            state.merge(Member {
                id: me,
                name: device,
                life: state.life_of(me),
                stamp,
                removed: false,
                addresses: Vec::new(),
                last_seen_ms: None,
            });
            Ok(())
        });
        created.map_err(library_failure)??;
        self.members_changed();
        self.library_info()
    }

    /// Tells mounts and peers.
    fn members_changed(&self) {
        self.index.feed().publish(vec![Change::Devices]);
        self.node.members_changed();
    }

    pub async fn invite(&self, valid_for: Duration, wait: bool, link: &Link) -> Outcome<Invited> {
        self.membership()?;
        let invitation = self.node.invite(valid_for).await?;
        let ticket = invitation.ticket;
        let expires_at = super::report::rfc3339(invitation.expires.into());
        let event = Event::Invitation { ticket: ticket.clone(), expires_at: expires_at.clone() };
        link.send(event).await?;
        if !wait {
            return Ok(Invited { ticket, expires_at, joined: None });
        }
        let _withdraws = Withdraws { node: &self.node, invitation: invitation.id };
        let asked = self.node.asked(invitation.id).await?;
        link.send(Event::Asked { code: asked.code, device: asked.name }).await?;
        let joined = self.node.joined(invitation.id).await?;
        let device = DeviceName { id: joined.device.to_string(), name: joined.name };
        let joined = Some(JoinedReply { device, code: joined.code });
        Ok(Invited { ticket, expires_at, joined })
    }

    pub async fn join(
        &self,
        ticket: &str,
        device_name: Option<&str>,
        link: &mut Link,
    ) -> Outcome<JoinReply> {
        let name = asked_or_host_name(device_name)?;
        let pending = self.node.join(ticket, &name).await?;
        let (code, inviter) = (pending.code.clone(), pending.inviter.clone());
        let library = pending.library.name.clone();
        let event = Event::Confirm {
            code: code.clone(),
            library: library.clone(),
            inviter: inviter.clone(),
        };
        link.send(event).await?;
        if !link.answer().await?.yes {
            return Err(Failure::new(Code::Refused, "not confirmed: nothing was changed"));
        }
        self.node.confirm(pending).await?;
        self.index.feed().publish(vec![Change::Devices]);
        let device = DeviceName { id: self.me.to_string(), name };
        Ok(JoinReply { library, device, inviter, code })
    }

    pub fn rename_device(&self, old: Option<&str>, new: &str) -> Outcome<DeviceReply> {
        let (_, me) = self.membership()?;
        let member = old.map_or(Ok(me), |old| self.member_named(old))?;
        check(new, "device")?;
        let taken = self.library.with(|s| s.member_named(new).is_some_and(|m| m.id != member.id));
        if taken {
            return Err(name_taken(new));
        }
        let renamed = self.library.update(|state| {
            let stamp = state.next_stamp();
            state.merge(Member { name: new.to_owned(), stamp, ..member.clone() });
        });
        renamed.map_err(library_failure)?;
        self.members_changed();
        Ok(self.device_reply(&Member { name: new.to_owned(), ..member }))
    }

    pub async fn remove_device(&self, name: &str, dry_run: bool) -> Outcome<DeviceReply> {
        self.membership()?;
        let member = self.member_named(name)?;
        if member.id == self.me {
            return Err(failure(SyncError::RemoveSelf));
        }
        let reply = self.device_reply(&member);
        if !dry_run {
            self.node.remove_device(member.id).await?;
            self.index.feed().publish(vec![Change::Devices]);
        }
        Ok(reply)
    }

    fn device_reply(&self, member: &Member) -> DeviceReply {
        let locations = self.index.locations();
        let its = locations.iter().filter(|l| l.owner == member.id);
        DeviceReply {
            device: device_name(member),
            locations: its.map(|l| l.name.clone()).collect(),
            pending: self.pending_for(member.id),
        }
    }

    /// The member with this name.
    pub fn member_named(&self, name: &str) -> Outcome<Member> {
        self.library.with(|state| {
            state.member_named(name).cloned().ok_or_else(|| unknown_device(name, state))
        })
    }

    /// What to call a device in a message or a path.
    pub fn name_of(&self, id: DeviceId) -> String {
        self.library.with(|state| {
            let known = state.members.iter().find(|m| m.id == id);
            known.map_or_else(|| id.to_string(), |m| m.name.clone())
        })
    }
}

/// Whoever waits for the join and goes away takes the ticket along.
struct Withdraws<'a> {
    node: &'a Node,
    invitation: u64,
}

impl Drop for Withdraws<'_> {
    fn drop(&mut self) {
        self.node.withdraw(self.invitation);
    }
}

pub fn device_name(member: &Member) -> DeviceName {
    DeviceName { id: member.id.to_string(), name: member.name.clone() }
}

fn unknown_device(name: &str, state: &State) -> Failure {
    let failure = Failure::new(Code::NotFound, format!("no device is called “{name}”"));
    match nearest(name, state.active().map(|m| m.name.as_str())) {
        Some(near) => {
            failure.hint(format!("did you mean “{near}”? `sd device list` shows them all"))
        }
        None => failure.hint("`sd device list` shows them all"),
    }
}

/// Checks a name that a person gave.
pub fn check(name: &str, what: &str) -> Outcome<()> {
    check_label(name).map_err(|rule| {
        Failure::new(Code::Invalid, format!("“{name}” cannot be the name of a {what}: {rule}"))
            .hint("choose another name")
    })
}

fn asked_or_host_name(asked: Option<&str>) -> Outcome<String> {
    match asked {
        Some(name) => check(name, "device").map(|()| name.to_owned()),
        None => {
            let system = rustix::system::uname();
            let host = system.nodename().to_string_lossy();
            Ok(paths::label(OsStr::new(&*host), "device"))
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    data_encoding::HEXLOWER.encode(bytes)
}

fn already_in(library: &str) -> Failure {
    Failure::new(Code::Exists, format!("this device is already in the library “{library}”"))
        .hint("a data directory is one device of one library; another --data-dir is another device")
}

fn name_taken(name: &str) -> Failure {
    Failure::new(Code::Exists, format!("another device of the library is called “{name}”"))
        .hint("choose another name, with --device-name when joining")
}

/// Words what the network says.
pub fn failure(error: SyncError) -> Failure {
    let text = error.to_string();
    let worded = |code, hint: &str| Failure::new(code, text.clone()).hint(hint);
    const NEW_TICKET: &str = "make a new ticket on a device of the library: sd device invite";
    match error {
        SyncError::Bind { .. } => worded(
            Code::Busy,
            "another program uses that port, or the address is not this machine's: \
             sd config set network.bind ADDRESS:PORT",
        ),
        SyncError::Relay { .. } => {
            worded(Code::Invalid, "correct it: sd config set network.relay URL")
        }
        SyncError::Library(error) => library_failure(error),
        SyncError::NoLibrary => no_library(),
        SyncError::AlreadyMember { .. } => worded(Code::Exists, "there is nothing to do"),
        SyncError::OtherLibrary { library } => {
            let failure = already_in(&library);
            Failure { message: format!("{text}: {}", failure.message), ..failure }
        }
        SyncError::Mistyped => worded(Code::Invalid, "copy the whole ticket, one word, once more"),
        SyncError::NewerTicket { .. } | SyncError::Version { .. } => {
            worded(Code::Version, "install the same version of sd on both devices")
        }
        SyncError::Expired | SyncError::Used | SyncError::WrongSecret => {
            worded(Code::Expired, NEW_TICKET)
        }
        SyncError::NameTaken { name } => name_taken(&name),
        SyncError::BadName { .. } => worded(Code::Invalid, "choose another one with --device-name"),
        SyncError::NotReachable { .. } => worded(
            Code::Unreachable,
            "is that device running and on the same network? `sd daemon status` there tells",
        ),
        SyncError::TooManyAttempts => worded(Code::Refused, "wait a minute, then try again"),
        SyncError::NoInvitation => worded(Code::NotFound, NEW_TICKET),
        SyncError::NoDevice => worded(Code::NotFound, "`sd device list` shows them all"),
        SyncError::RemoveSelf => {
            worded(Code::Refused, "remove it on another device of the library")
        }
        SyncError::NotRemoved => worded(Code::Refused, "set the clock, then try again"),
        SyncError::LibraryFull => worded(Code::Refused, "remove a device that is no longer used"),
        SyncError::Lost(_) => worded(Code::Unreachable, "try again"),
        SyncError::Protocol(_) | SyncError::Index(_) | SyncError::Closed => {
            worded(Code::Internal, "try again; sd.log in the data directory has more")
        }
    }
}
