//! Locks across the network: asked for at the owner, answered as the owner.
//!
//! A request is one stream. A device's requests are worked off in the order of their coming, so
//! that a lock that was late does not overtake the unlock that followed it.

use crate::node::Shared;
use crate::presence::{Link, Peer, reply};
use crate::wire::{LOCKS, Refusal, Request, Response, WireError};
use iroh::endpoint::SendStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use vfs_core::locks::{Action, Coordinator, LockAnswer, LockRequest};
use vfs_core::model::DeviceId;
use vfs_core::source::{BoxFuture, FetchError};

/// How long a program waits for an owner's answer before its lock is one of this device only.
const ANSWER: Duration = Duration::from_secs(3);
/// How often it is looked which connections are over and which files were replaced.
const TEND_EVERY: Duration = Duration::from_secs(1);

/// [`Coordinator`] over the connections of a node.
pub(crate) struct Owners(pub(crate) Arc<Shared>);

impl Owners {
    fn link(&self, owner: DeviceId) -> Option<Arc<Link>> {
        let peer = self.0.peer(owner).filter(|_| self.0.is_peer(owner))?;
        peer.link_since(LOCKS)
    }

    async fn ask_now(&self, owner: DeviceId, request: LockRequest) -> Option<LockAnswer> {
        let link = self.link(owner)?;
        match timeout(ANSWER, link.ask(&Request::Lock(request))).await {
            Ok(Ok(Response::Lock(answer))) => is_sound(&answer).then_some(answer),
            // Of what is not there nothing is locked.
            Ok(Ok(Response::Refused(Refusal::NotShared | Refusal::Stale)))
                if request.action == Action::Clear =>
            {
                Some(LockAnswer::Free)
            }
            Ok(answer) => {
                tracing::debug!(%owner, ?answer, "a lock holds on this device only");
                None
            }
            Err(_) => None,
        }
    }
}

impl Coordinator for Owners {
    fn connection(&self, owner: DeviceId) -> Option<u64> {
        self.link(owner).map(|link| link.no)
    }

    fn ask(&self, owner: DeviceId, request: LockRequest) -> BoxFuture<'_, Option<LockAnswer>> {
        Box::pin(self.ask_now(owner, request))
    }
}

fn is_sound(answer: &LockAnswer) -> bool {
    match answer {
        LockAnswer::Taken { span, .. } => span.is_valid(),
        LockAnswer::Free | LockAnswer::TooMany => true,
    }
}

/// Answers a peer.
pub(crate) async fn serve(
    shared: &Arc<Shared>,
    peer: &Arc<Peer>,
    link: &Arc<Link>,
    request: LockRequest,
    send: &mut SendStream,
) -> Result<(), WireError> {
    if !request.span.is_valid() {
        return reply(send, &Response::Refused(Refusal::Malformed)).await;
    }
    let _turn = link.locking.lock().await;
    let (locks, device, connection) = (shared.locks.clone(), peer.id, link.no);
    let work = move || locks.answer(device, connection, &request);
    let answer = match tokio::task::spawn_blocking(work).await {
        Ok(Ok(answer)) => Response::Lock(answer),
        Ok(Err(FetchError::Refused)) => Response::Refused(Refusal::NotShared),
        Ok(Err(FetchError::Stale)) => Response::Refused(Refusal::Stale),
        Ok(Err(FetchError::Unreachable | FetchError::NotNow)) => {
            Response::Refused(Refusal::Offline)
        }
        Ok(Err(FetchError::Failed(error))) => {
            tracing::warn!(error, "a peer's lock failed");
            Response::Refused(Refusal::Failed)
        }
        Err(_) => Response::Refused(Refusal::Failed),
    };
    reply(send, &answer).await
}

/// Ends what peers that are gone left locked.
pub(crate) async fn keep(shared: Arc<Shared>) {
    loop {
        sleep(TEND_EVERY).await;
        if shared.locks.is_empty() {
            continue;
        }
        let shared = shared.clone();
        let tend = move || {
            shared.locks.tend(|device, connection| {
                let peer = shared.peer(device).filter(|_| shared.is_peer(device));
                let link = peer.filter(|p| p.is_online()).and_then(|p| p.link());
                link.is_some_and(|link| link.no == connection)
            });
        };
        // A panic there is traced by the runtime, and the next round comes.
        let _ = tokio::task::spawn_blocking(tend).await;
    }
}
