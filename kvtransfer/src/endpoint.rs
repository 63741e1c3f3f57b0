//! A node's end of all its transfers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_identity::Identity;
use baton_proto::ids::{Epoch, NodeId, TransferId};
use dashmap::DashMap;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::accept;
use crate::channel::Channels;
use crate::dial::Dialer;
use crate::direct::{Direct, Host, HostMark, SharedMemory, Transport};
use crate::inbox::Inbox;
use crate::limits::{DIRECT_PAUSE, MAX_DESCRIPTION_BYTES, Timing};
use crate::link::{CloseCode, Link};
use crate::receive::{Inbound, Incoming, ReceiveHandle};
use crate::send::{Outbound, Outgoing, SendHandle, Sent};
use crate::sender::LinkId;
use crate::transport;

/// How long [`Endpoint::close`] waits for peers to take note.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// The endpoint could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be bound.
    #[error("cannot listen for KV transfers on {address}: {error}")]
    Socket {
        /// The address asked for.
        address: SocketAddr,
        /// Why not.
        error: std::io::Error,
    },
}

/// Sends and receives the transfers of one node. Cheap to clone; when the last clone is dropped,
/// it closes as by [`close`](Self::close), without waiting.
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<Shared>,
    _closes: Arc<ClosesOnDrop>,
}

struct ClosesOnDrop(Arc<Shared>);

impl Drop for ClosesOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Endpoint {
    /// Listens on `listen` as `identity`, in life `epoch` of the node. Must be called in a tokio
    /// runtime, which then runs the transfers; the other methods may be called from any thread.
    pub fn bind(
        listen: SocketAddr,
        identity: &Identity,
        epoch: Epoch,
        timing: Timing,
    ) -> Result<Self, BindError> {
        let socket_error = |error| BindError::Socket { address: listen, error };
        let (quic, client) = transport::bind(listen, identity, &timing).map_err(socket_error)?;
        let address = quic.local_addr().map_err(socket_error)?;
        let shared = Arc::new(Shared {
            quic,
            client,
            address,
            epoch,
            timing,
            runtime: Handle::current(),
            last_link: AtomicU64::new(0),
            inbox: Mutex::new(Inbox::new(timing.begin)),
            inbound_links: Mutex::default(),
            outbound: DashMap::new(),
            dialers: Mutex::default(),
            direct: OnceLock::new(),
            channels: OnceLock::new(),
            host: OnceLock::new(),
            avoided: Mutex::default(),
            sent: Default::default(),
            last_transport: AtomicU8::new(u8::MAX),
        });
        shared.runtime.spawn(accept::accept_links(shared.clone()));
        Ok(Self { _closes: Arc::new(ClosesOnDrop(shared.clone())), shared })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.address
    }

    /// Lets transfers with nodes on this machine spare the network, from the next connection on.
    /// Once only.
    pub fn share(&self, memory: Arc<dyn Direct>) {
        if let Some(host) = Host::new()
            && self.shared.direct.set(memory).is_ok()
        {
            let _ = self.shared.host.set(host);
        }
    }

    /// Lets transfers go through channels between devices, from the next connection on. Once only.
    pub fn open_channels(&self, channels: Arc<dyn Channels>) {
        let _ = self.shared.channels.set(channels);
    }

    /// How payload may travel, best first.
    #[must_use]
    pub fn transports(&self) -> Vec<Transport> {
        let has = |way: &Transport| match way {
            Transport::Quic => true,
            Transport::Nccl => self.shared.channels.get().is_some(),
            Transport::Ipc => self.shared.direct.get().is_some(),
        };
        Transport::ALL.into_iter().filter(has).collect()
    }

    /// Channels that are up: `(to receivers, from senders)`.
    #[must_use]
    pub fn channels(&self) -> (usize, usize) {
        let to = lock(&self.shared.dialers).values().filter(|dialer| dialer.has_channel()).count();
        let from = lock(&self.shared.inbound_links).values().filter(|link| link.delivers()).count();
        (to, from)
    }

    /// Starts to send. Never blocks; what cannot be sent fails through the handle.
    pub fn send(&self, outgoing: Outgoing) -> SendHandle {
        SendHandle::start(&self.shared, outgoing)
    }

    /// Starts to receive. Never blocks; the offer may have come already.
    pub fn expect(&self, incoming: Incoming) -> ReceiveHandle {
        ReceiveHandle::start(&self.shared, incoming)
    }

    /// Bytes that have arrived at receivers, by how they travelled.
    #[must_use]
    pub fn sent_bytes(&self) -> Vec<(Transport, u64)> {
        let sent = |way: Transport| self.shared.sent[way as usize].load(Ordering::Relaxed);
        Transport::ALL.into_iter().map(|way| (way, sent(way))).collect()
    }

    /// How the payload travelled that has arrived last.
    #[must_use]
    pub fn last_transport(&self) -> Option<Transport> {
        Transport::from_code(self.shared.last_transport.load(Ordering::Relaxed)).ok()
    }

    /// Transfers under way: `(outgoing, incoming)`.
    #[must_use]
    pub fn transfers(&self) -> (usize, usize) {
        (self.shared.outbound.len(), lock(&self.shared.inbox).len())
    }

    /// Cancels every transfer and closes every connection; returns when peers have been told, or
    /// after a short wait.
    pub async fn close(&self) {
        self.shared.stop();
        let _ = timeout(CLOSE_WAIT, self.shared.quic.wait_idle()).await;
    }
}

/// What all transfers and connections of an endpoint share.
pub(crate) struct Shared {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) client: quinn::ClientConfig,
    address: SocketAddr,
    pub(crate) epoch: Epoch,
    pub(crate) timing: Timing,
    pub(crate) runtime: Handle,
    last_link: AtomicU64,
    pub(crate) inbox: Mutex<Inbox<Arc<Inbound>, Arc<Link>>>,
    /// The one connection that each sender may have here.
    pub(crate) inbound_links: Mutex<HashMap<NodeId, Arc<Link>>>,
    /// Looked up by every control frame of every link.
    pub(crate) outbound: DashMap<TransferId, Arc<Outbound>>,
    /// The one connection to each receiver.
    pub(crate) dialers: Mutex<HashMap<NodeId, Arc<Dialer>>>,
    /// This node's memory.
    pub(crate) direct: OnceLock<Arc<dyn Direct>>,
    host: OnceLock<Host>,
    /// Makes channels between devices.
    pub(crate) channels: OnceLock<Arc<dyn Channels>>,
    /// Ways to peers that failed, and until when they are left alone.
    avoided: Mutex<HashMap<(NodeId, Transport), Instant>>,
    /// Bytes that have arrived, by transport.
    sent: [AtomicU64; Transport::ALL.len()],
    /// Of the last of them; no transport's code before.
    last_transport: AtomicU8,
}

impl Shared {
    pub(crate) fn next_link(&self) -> LinkId {
        self.last_link.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// What a peer on this machine needs to read this node's memory.
    pub(crate) fn described(&self) -> Option<(HostMark, SharedMemory)> {
        let memory = self.direct.get()?.shared();
        let fits = memory.description.len() <= MAX_DESCRIPTION_BYTES;
        self.host.get().filter(|_| fits).map(|host| (host.mark, memory))
    }

    /// How payload from the peer had best travel.
    pub(crate) fn best(&self, link: &Link) -> Transport {
        if link.remote.is_some() && !self.avoids(&link.peer, Transport::Ipc) {
            Transport::Ipc
        } else if link.delivers() {
            Transport::Nccl
        } else {
            Transport::Quic
        }
    }

    pub(crate) fn count(&self, sent: &Sent) {
        if sent.bytes > 0 {
            self.sent[sent.transport as usize].fetch_add(sent.bytes, Ordering::Relaxed);
            self.last_transport.store(sent.transport as u8, Ordering::Relaxed);
        }
    }

    /// Payload from or to a peer cannot travel this way.
    pub(crate) fn avoid(&self, peer: NodeId, way: Transport) {
        let now = Instant::now();
        let mut avoided = lock(&self.avoided);
        avoided.retain(|_, until| *until > now);
        avoided.insert((peer, way), now + DIRECT_PAUSE);
    }

    pub(crate) fn avoids(&self, peer: &NodeId, way: Transport) -> bool {
        let avoided = lock(&self.avoided);
        avoided.get(&(peer.clone(), way)).is_some_and(|until| *until > Instant::now())
    }

    fn stop(&self) {
        let outbound: Vec<_> = self.outbound.iter().map(|transfer| transfer.clone()).collect();
        for transfer in outbound {
            transfer.input(|sender, _| sender.cancel());
        }
        let inbound = lock(&self.inbox).all();
        for transfer in inbound {
            transfer.input(self, |receiver, _| receiver.cancel());
        }
        let code = quinn::VarInt::from_u32(CloseCode::Stopping as u32);
        self.quic.close(code, &[]);
    }
}

/// No code panics while it holds one of this crate's locks and has broken an invariant; a panic
/// in an owner's source or sink must not take the other transfers down.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
