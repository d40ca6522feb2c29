//! What can go wrong between devices; only the command line words hints.

use crate::wire::WireError;
use std::net::SocketAddr;
use vfs_core::library::LibraryError;

/// Why an operation that involves other devices failed.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// No socket could be opened at these addresses.
    #[error("cannot listen on {addresses:?}: {reason}")]
    Bind {
        /// What was asked for.
        addresses: Vec<SocketAddr>,
        /// What the system or the network library said.
        reason: String,
    },
    /// The setting `network.relay` is not a URL of a relay.
    #[error("“{url}” is not the address of a relay: {reason}")]
    Relay {
        /// What was configured.
        url: String,
        /// What the parser said.
        reason: String,
    },
    /// The library file could not be read or written.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// This device has no library, or was removed from it.
    #[error("this device is not a member of a library")]
    NoLibrary,
    /// This device already is a member of the ticket's library.
    #[error("this device already is a member of the library “{library}”")]
    AlreadyMember {
        /// The library's name.
        library: String,
    },
    /// This device is a member of another library than the ticket's.
    #[error("this device is in the library “{library}”, and the ticket is for another one")]
    OtherLibrary {
        /// This device's library.
        library: String,
    },
    /// The text is not a ticket: characters are missing or changed.
    #[error("this is not a ticket, or it was mistyped")]
    Mistyped,
    /// The ticket was made by a newer program.
    #[error("the ticket has format {found}; this program knows {known} and older")]
    NewerTicket {
        /// The ticket's format.
        found: u8,
        /// The newest known here.
        known: u8,
    },
    /// The invitation's time is over, or it was withdrawn.
    #[error("the invitation has expired")]
    Expired,
    /// Another device used the ticket.
    #[error("the ticket was already used")]
    Used,
    /// The inviting device does not know the ticket's secret: it is a forgery.
    #[error("the inviting device does not accept this ticket")]
    WrongSecret,
    /// A member has this name.
    #[error("another device of the library is called “{name}”")]
    NameTaken {
        /// The name asked for.
        name: String,
    },
    /// The name cannot be a device's.
    #[error("“{name}” cannot be the name of a device: {reason}")]
    BadName {
        /// The name asked for.
        name: String,
        /// The rule it breaks.
        reason: vfs_core::path::LabelError,
    },
    /// The other device did not answer.
    #[error("the device cannot be reached at {addresses:?}")]
    NotReachable {
        /// Where it was tried.
        addresses: Vec<SocketAddr>,
    },
    /// The other device speaks other versions of the protocol.
    #[error(
        "the other device speaks protocol {oldest} to {newest}, this one {ours_oldest} to {ours_newest}: update the older one"
    )]
    Version {
        /// The oldest version it speaks.
        oldest: u16,
        /// The newest version it speaks.
        newest: u16,
        /// The oldest version this program speaks.
        ours_oldest: u16,
        /// The newest version this program speaks.
        ours_newest: u16,
    },
    /// The other device is busy with too many attempts to pair.
    #[error("the device refuses more attempts for now")]
    TooManyAttempts,
    /// No invitation has this number.
    #[error("there is no such invitation")]
    NoInvitation,
    /// No member has this id.
    #[error("there is no such device in the library")]
    NoDevice,
    /// A device does not remove itself.
    #[error("a device cannot remove itself; remove it from another one")]
    RemoveSelf,
    /// The record of a device could not be overruled.
    #[error("the device could not be removed: this device's clock is wrong")]
    NotRemoved,
    /// The library has as many devices as it may.
    #[error("the library is full")]
    LibraryFull,
    /// The other device broke the protocol.
    #[error("the other device broke the protocol: {0}")]
    Protocol(String),
    /// The index could not be read or written.
    #[error("index: {0}")]
    Index(String),
    /// The connection broke off.
    #[error("the connection broke off: {0}")]
    Lost(String),
    /// The node was shut down.
    #[error("the network is shut down")]
    Closed,
}

impl From<WireError> for SyncError {
    fn from(e: WireError) -> Self {
        match e {
            WireError::Lost(reason) => Self::Lost(reason),
            breach => Self::Protocol(breach.to_string()),
        }
    }
}
