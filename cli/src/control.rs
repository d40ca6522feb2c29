//! The control protocol between `sd` the command and `sd` the daemon.
//!
//! Over the Unix socket of the data directory; one request a connection. Each
//! message is one line of JSON: the command sends an [`Envelope`], the daemon
//! answers any number of [`Event`]s, the last of which is `result` or `error`.
//! Only [`Event::Confirm`] is answered, by one [`Answer`]. Closing the
//! connection cancels the request. Lines are bounded on both sides.

use crate::args::Keep;
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use crate::reply::{Item, PendingWrite, Tally};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Grows when a message changes its meaning; unequal versions refuse each other.
pub const VERSION: u32 = 1;
/// The longest request, in bytes.
pub const MAX_REQUEST_BYTES: u64 = 256 << 10;
/// The longest event, in bytes.
const MAX_EVENT_BYTES: u64 = 16 << 20;

/// One request and the version that the sender speaks.
#[derive(Serialize, Deserialize, Debug)]
pub struct Envelope<R> {
    pub version: u32,
    pub request: R,
}

/// What a command asks of the daemon.
#[derive(Serialize, Deserialize, Debug)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    LibraryCreate {
        name: String,
        device_name: Option<String>,
    },
    LibraryInfo,
    Invite {
        expires_s: u64,
        wait: bool,
    },
    Join {
        ticket: String,
        device_name: Option<String>,
    },
    DeviceRename {
        old: Option<String>,
        new: String,
    },
    DeviceRemove {
        device: String,
        dry_run: bool,
    },
    LocationAdd(NewLocation),
    LocationRemove {
        name: String,
        dry_run: bool,
    },
    LocationRescan {
        name: String,
        wait: bool,
    },
    Mount {
        mountpoint: Option<WirePath>,
        home: Option<WirePath>,
        read_only: bool,
        allow_other: bool,
    },
    Unmount {
        mountpoint: Option<WirePath>,
        force: bool,
    },
    Status,
    List {
        target: Target,
        recursive: bool,
    },
    Tree {
        target: Target,
        levels: Option<u32>,
    },
    Info {
        target: Target,
    },
    Sync {
        target: Option<Target>,
        timeout_ms: Option<u64>,
    },
    Pending,
    PendingExport {
        of: String,
        to: WirePath,
        forget: bool,
        dry_run: bool,
    },
    Conflicts,
    ConflictsResolve {
        ids: Vec<u64>,
        keep: Keep,
        export: Option<WirePath>,
        dry_run: bool,
    },
    Pin {
        targets: Vec<Target>,
    },
    /// Everything that is pinned.
    Pins,
    /// Of these; of none: of all.
    PinWait {
        targets: Vec<Target>,
        timeout_ms: Option<u64>,
    },
    Unpin {
        targets: Vec<Target>,
    },
    Evict {
        targets: Vec<Target>,
        dry_run: bool,
    },
    CacheClear {
        dry_run: bool,
    },
    CacheLimit {
        bytes: Option<u64>,
    },
    Check {
        repair: bool,
        quick: bool,
    },
    /// A part of what a mount shows.
    Shown {
        mountpoint: WirePath,
    },
    /// Has kernels look up entries of it again.
    ShowAgain {
        mountpoint: WirePath,
        paths: Vec<WirePath>,
    },
    /// Understood in every version, so that an old daemon can be replaced.
    Stop {
        force: bool,
    },
}

/// A location to add.
#[derive(Serialize, Deserialize, Debug)]
pub struct NewLocation {
    /// Absolute, without symlinks.
    pub path: WirePath,
    pub name: Option<String>,
    pub read_only: bool,
    pub share_with: Vec<String>,
    pub wait: bool,
}

/// What a person gave as an address.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// `sd://…`
    Address(String),
    /// A path of this machine, absolute, its parent without symlinks.
    Path(WirePath),
}

/// A path that is not always UTF-8, in JSON.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[serde(untagged)]
pub enum WirePath {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        match path.to_str() {
            Some(text) => Self::Text(text.to_owned()),
            None => Self::Bytes(path.as_os_str().as_bytes().to_vec()),
        }
    }
}

impl From<WirePath> for PathBuf {
    fn from(path: WirePath) -> Self {
        match path {
            WirePath::Text(text) => text.into(),
            WirePath::Bytes(bytes) => OsString::from_vec(bytes).into(),
        }
    }
}

/// What the daemon sends back.
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// How far a long request is.
    Progress(Progress),
    /// A ticket, before the wait for its use begins.
    Invitation { ticket: String, expires_at: String },
    /// A device showed the ticket; it joins when its person agrees to the code.
    Asked { code: String, device: String },
    /// A part of a long listing.
    Items(Vec<Item>),
    /// A part of a long list of writes that wait.
    Pending(Vec<PendingWrite>),
    /// What a request waits for.
    Draining(Draining),
    /// How much of what is pinned is here.
    Pinning(Pinning),
    /// Waits for an [`Answer`]: join this library?
    Confirm { code: String, library: String, inviter: String },
    /// Done.
    Result(serde_json::Value),
    /// Failed.
    Error(Failure),
}

/// How far indexing is.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Progress {
    pub what: String,
    pub entries: u64,
    pub directories_waiting: u64,
}

/// Writes that have not reached their owners.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Draining {
    pub operations: u64,
    pub bytes: u64,
    /// Owners that cannot be reached now.
    pub offline: Vec<String>,
}

/// Pinned content that comes.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Pinning {
    pub tally: Tally,
    /// Owners that cannot be reached now, and have the rest.
    pub offline: Vec<String>,
}

/// The answer to [`Event::Confirm`].
#[derive(Serialize, Deserialize, Debug)]
pub struct Answer {
    pub yes: bool,
}

/// A connection to the daemon, for one request.
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; `None` when no daemon listens.
    pub fn connect(dir: &DataDir) -> Outcome<Option<Self>> {
        let address = match dir.socket() {
            Ok(address) => address,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::io("cannot reach the daemon's socket", e)),
        };
        match UnixStream::connect(&address.path) {
            Ok(stream) => Ok(Some(Self { stream: BufReader::new(stream) })),
            Err(e) => match e.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                _ => Err(Failure::io("cannot reach the daemon's socket", e)),
            },
        }
    }

    /// Sends a request; `watch` sees every event before the last and may answer.
    pub fn call<T: DeserializeOwned>(
        mut self,
        request: &Request,
        mut watch: impl FnMut(Event) -> Outcome<Option<Answer>>,
    ) -> Outcome<T> {
        // A daemon that refuses the request has answered before it was all written.
        let sent = self.send(&Envelope { version: VERSION, request });
        loop {
            match self.receive() {
                Ok(Event::Result(value)) => return serde_json::from_value(value).map_err(garbled),
                Ok(Event::Error(failure)) => return Err(failure),
                Ok(event) => {
                    if let Some(answer) = watch(event)? {
                        self.send(&answer)?;
                    }
                }
                Err(failure) => return sent.and(Err(failure)),
            }
        }
    }

    /// Gives up on an answer that takes longer than this.
    pub fn limit_wait(&self, limit: Duration) -> Outcome<()> {
        self.stream
            .get_ref()
            .set_read_timeout(Some(limit))
            .map_err(|e| Failure::io("cannot set up the daemon's socket", e))
    }

    fn send(&mut self, message: &impl Serialize) -> Outcome<()> {
        let mut line = serde_json::to_vec(message).map_err(garbled)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(lost)
    }

    fn receive(&mut self) -> Outcome<Event> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.stream).take(MAX_EVENT_BYTES);
        bounded.read_until(b'\n', &mut line).map_err(lost)?;
        match line.last() {
            Some(b'\n') => serde_json::from_slice(&line).map_err(garbled),
            _ => Err(lost(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn lost(error: io::Error) -> Failure {
    let why = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "does not answer",
        _ => "went away before it answered",
    };
    Failure::new(Code::NoDaemon, format!("the daemon {why}"))
        .hint("its log, sd.log in the data directory, says why; the next command starts it again")
}

fn garbled(error: serde_json::Error) -> Failure {
    Failure::new(Code::Version, format!("the daemon's answer was not understood: {error}"))
        .hint("`sd daemon stop`, then try again: the running daemon may be another version")
}
