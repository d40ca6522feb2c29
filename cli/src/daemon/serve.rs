//! The control socket: who may speak, one request a connection, bounds.

use super::handle::handle;
use super::parts::Daemon;
use crate::control::{Answer, Envelope, Event, MAX_REQUEST_BYTES, Request, VERSION};
use crate::data_dir::DataDir;
use crate::failure::{Code, Failure, Outcome};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// Requests served at the same time; more wait.
const MAX_CONNECTIONS: usize = 64;
/// How long a connection may take to say what it wants.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// Events that wait for a slow reader before the work itself waits.
const EVENTS_WAITING: usize = 8;

/// Listens on the data directory's socket; to be called with its lock held.
pub fn bind(dir: &DataDir) -> Outcome<UnixListener> {
    let bound = || -> io::Result<UnixListener> {
        let path = dir.path().join("sock");
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&dir.socket()?.path)?;
        // The directory is private, and so was the umask; this is the third lock on the door.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    bound().map_err(|e| Failure::io(format!("cannot listen in {}", dir.path().display()), e))
}

/// Serves connections until dropped.
pub async fn accept(daemon: Arc<Daemon>, listener: UnixListener) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let daemon = Arc::clone(&daemon);
                tokio::spawn(async move {
                    if let Err(error) = connection(daemon, stream).await {
                        tracing::debug!(%error, "control connection");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                // Out of descriptors: some are about to be given back.
                tracing::warn!(%error, "cannot accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(daemon: Arc<Daemon>, stream: UnixStream) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    if uid != rustix::process::geteuid().as_raw() && uid != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("uid {uid}")));
    }
    let (read, write) = stream.into_split();
    let mut read = BufReader::new(read);
    let (events, waiting) = mpsc::channel(EVENTS_WAITING);
    let writer = tokio::spawn(write_events(write, waiting));
    let outcome = match tokio::time::timeout(REQUEST_PATIENCE, request(&mut read)).await {
        Ok(Ok(request)) => answered(daemon, request, read, &events).await,
        Ok(Err(failure)) => Some(Err(failure)),
        Err(_) => None,
    };
    if let Some(outcome) = outcome {
        let last = outcome.map_or_else(Event::Error, Event::Result);
        // The command may be gone by now.
        let _ = events.send(last).await;
    }
    drop(events);
    writer.await?
}

/// The outcome, or `None` when the command went away first, which cancels the request.
async fn answered(
    daemon: Arc<Daemon>,
    request: Request,
    read: BufReader<OwnedReadHalf>,
    events: &mpsc::Sender<Event>,
) -> Option<Outcome<serde_json::Value>> {
    let (answer, answers) = mpsc::channel(1);
    let link = Link { events: events.clone(), answers };
    tokio::select! {
        outcome = handle(daemon, request, link) => Some(outcome),
        () = read_answers(read, answer) => None,
        () = events.closed() => None,
    }
}

async fn request(read: &mut BufReader<OwnedReadHalf>) -> Outcome<Request> {
    let line = line(read).await.map_err(|e| Failure::io("cannot read the request", e))?;
    let not_understood = |e: serde_json::Error| {
        Failure::new(Code::Version, format!("the daemon does not understand this request: {e}"))
            .hint("the daemon is another version: `sd daemon stop`, then try again")
    };
    let envelope: Envelope<serde_json::Value> =
        serde_json::from_slice(&line).map_err(not_understood)?;
    let is_stop = envelope.request["op"] == "stop";
    if envelope.version != VERSION && !is_stop {
        return Err(Failure::new(
            Code::Version,
            format!(
                "the running daemon speaks control version {VERSION}, this command {}",
                envelope.version
            ),
        )
        .hint("`sd daemon stop`, then try again"));
    }
    serde_json::from_value(envelope.request).map_err(not_understood)
}

async fn line(read: &mut BufReader<OwnedReadHalf>) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    read.take(MAX_REQUEST_BYTES).read_until(b'\n', &mut line).await?;
    match line.last() {
        Some(b'\n') => Ok(line),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Ends when the command closes the connection, or sends what is not an answer.
async fn read_answers(mut read: BufReader<OwnedReadHalf>, answers: mpsc::Sender<Answer>) {
    while let Ok(line) = line(&mut read).await {
        let Ok(answer) = serde_json::from_slice(&line) else { return };
        if answers.send(answer).await.is_err() {
            // Nothing was asked; only the end of the connection matters now.
            continue;
        }
    }
}

async fn write_events(
    mut write: OwnedWriteHalf,
    mut events: mpsc::Receiver<Event>,
) -> io::Result<()> {
    while let Some(event) = events.recv().await {
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        write.write_all(&line).await?;
    }
    Ok(())
}

/// A request's way back to its command.
pub struct Link {
    events: mpsc::Sender<Event>,
    answers: mpsc::Receiver<Answer>,
}

impl Link {
    /// Sends an event; waits while the command is slow.
    pub async fn send(&self, event: Event) -> Outcome<()> {
        self.events.send(event).await.map_err(|_| gone())
    }

    /// The same from a thread that may block.
    pub fn blocking_send(&self, event: Event) -> Outcome<()> {
        self.events.blocking_send(event).map_err(|_| gone())
    }

    /// Sends an event that may be left out, if there is room; `false`: the command went away.
    pub fn tell(&self, event: Event) -> bool {
        !matches!(self.events.try_send(event), Err(mpsc::error::TrySendError::Closed(_)))
    }

    /// The answer to [`Event::Confirm`].
    pub async fn answer(&mut self) -> Outcome<Answer> {
        self.answers.recv().await.ok_or_else(gone)
    }
}

fn gone() -> Failure {
    Failure::new(Code::Refused, "the command went away")
}
