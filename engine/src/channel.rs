//! [`NcclChannels`]: pieces of the KV cache from this node's GPUs to those of another one, or from
//! there, without passing through the host.
//!
//! A channel goes one way and belongs to a thread, since NCCL's calls may wait. Pieces are copied to
//! a parcel, memory that is the channel's own, and sent from there, or received there and copied out
//! of it. So the channel never touches a block: whoever holds blocks waits for copies alone, which
//! end by themselves, and a channel that hangs keeps nothing but its parcels.
//!
//! A channel has a [lane](lanes) for each pair of devices that have heads in common, and a parcel a
//! part for each lane. It is one: a lane that breaks breaks all of it. One thread queues everything of
//! a channel in the order of parcels and lanes, which is the same at both ends, so that what one end
//! waits for is never behind what the other one waits for.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::cuda::{Abort, Communicator, Nccl, PieceShare, UniqueId};
use tokio::sync::oneshot;

use crate::gpu::{Unavailable, find_nccl};
use crate::memory::{KvMemory, MemoryLost, Soon};
use crate::staging::DeviceKv;

mod lanes;
mod owner;
mod parcel;

use lanes::{Invitation, accept, lanes};
use owner::{Request, Terms};
use parcel::Ring;
pub use parcel::{Parcel, Part};

/// What both ends of a channel join by. Of a peer it may be anything.
pub type ChannelName = Vec<u8>;

/// Most bytes of a parcel, unless one piece is larger.
pub const PARCEL_BYTES: usize = 4 << 20;
/// Parcels of a channel that are packed, on their way or unpacked at a time.
const PARCELS: usize = 4;
/// Most lanes of an engine for each of its devices, with those that are being joined and those that do
/// not end, as the library hangs: all of a device's hold [`PARCELS`] of as many channels at most, beside
/// what the library takes.
const MAX_LANES: usize = 32;
/// How long the library may take to be rid of a name that is not used.
const RELEASE: Duration = Duration::from_secs(5);

/// Why this engine's memory has no channels. Displayed on one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoChannels {
    /// It is memory of the host.
    #[error("the KV cache is not in the memory of GPUs")]
    Memory,
    /// NCCL is not here.
    #[error(transparent)]
    Library(#[from] Unavailable),
}

/// Makes channels from and to the KV cache of one GPU or several.
#[derive(Clone)]
pub struct NcclChannels {
    nccl: Arc<Nccl>,
    devices: Arc<[Arc<DeviceKv>]>,
    /// Lanes of channels that have a thread.
    taken: Arc<AtomicUsize>,
}

impl NcclChannels {
    /// Of an engine's memory. The library is looked for in `folders` first.
    ///
    /// # Errors
    /// If it is not there, or the memory is not GPUs'.
    pub fn of(memory: &KvMemory, folders: &[PathBuf]) -> Result<Self, NoChannels> {
        let devices = match memory {
            KvMemory::Device(staging) => staging.devices(),
            KvMemory::Host(_) => return Err(NoChannels::Memory),
        };
        if devices.is_empty() {
            return Err(NoChannels::Memory);
        }
        Ok(Self { nccl: find_nccl(folders)?, devices, taken: Arc::default() })
    }

    /// How many devices have the cache's heads.
    #[must_use]
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// A name for a new channel from a node with so many devices to this one, or why there can be
    /// none.
    #[must_use]
    pub fn name(&self, senders: usize) -> Soon<Result<ChannelName, String>> {
        let (reply, name) = oneshot::channel();
        let channels = self.clone();
        // It looks at the network the first time.
        spawn(move || {
            if let Err(Ok(unused)) = reply.send(channels.new_name(senders)) {
                channels.release(&unused.names);
            }
        });
        let encoded = |name: Result<Invitation, _>| name.map(|invitation| invitation.encode());
        Box::pin(async move { name.await.map(encoded).map_err(|_| MemoryLost) })
    }

    fn new_name(&self, senders: usize) -> Result<Invitation, String> {
        let mut names = Vec::new();
        for _ in lanes(&self.shares(), senders)? {
            match self.nccl.unique_id() {
                Ok(name) => names.push(name),
                Err(error) => {
                    self.release(&names);
                    return Err(error.to_string());
                }
            }
        }
        Ok(Invitation { devices: [self.devices(), senders], names })
    }

    /// Names that this end made and that nobody will join by: the library waits for that forever.
    fn release(&self, names: &[UniqueId]) {
        let (device, deadline) = (self.devices[0].device(), Instant::now() + RELEASE);
        let release = |name| Communicator::release(&self.nccl, device, name, deadline);
        std::thread::scope(|scope| {
            for name in names {
                scope.spawn(move || release(name));
            }
        });
    }

    fn shares(&self) -> Vec<PieceShare> {
        self.devices.iter().map(|kv| kv.share).collect()
    }

    /// Joins a channel as the end that named it, which receives, or as the other one. Done when both
    /// have joined, or after `join`, or if the library refuses, with its reason.
    #[must_use]
    pub fn join(
        &self,
        name: ChannelName,
        receives: bool,
        join: Duration,
        patience: Duration,
    ) -> Soon<Result<NcclChannel, String>> {
        let (reply, joined) = oneshot::channel();
        let (channels, deadline) = (self.clone(), Instant::now() + join);
        match accept(&self.shares(), &name, receives) {
            Ok((lanes, names)) => {
                let terms = Terms { lanes, names, receives, deadline, patience };
                spawn(move || owner::run(&channels, &terms, reply));
            }
            Err(reason) => drop(reply.send(Err(reason))),
        }
        Box::pin(async { joined.await.map_err(|_| MemoryLost) })
    }

    /// Counts a channel's lanes, until what it gives is dropped.
    fn count(&self, lanes: usize) -> Result<Counted, String> {
        let most = MAX_LANES * self.devices();
        let counted = Counted::some_more(&self.taken, lanes, most);
        counted.ok_or_else(|| format!("{lanes} more lanes than there are would exceed {most}"))
    }
}

/// Some lanes, until it is dropped.
struct Counted(Arc<AtomicUsize>, usize);

impl Counted {
    /// None if there would be more than `most`.
    fn some_more(taken: &Arc<AtomicUsize>, lanes: usize, most: usize) -> Option<Self> {
        let more = |taken: usize| Some(taken + lanes).filter(|all| *all <= most);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(taken.clone(), lanes))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new()
        .name("kv-nccl".to_owned())
        .spawn(work)
        .expect("the operating system has a thread for a channel");
}

/// One end of a channel. Dropping it closes the channel.
pub struct NcclChannel {
    requests: Sender<Request>,
    ring: Arc<Ring>,
    state: Arc<State>,
}

/// What the channel's thread and its handle share.
struct State {
    patience: Duration,
    closed: AtomicBool,
    /// Since when the thread is at it; `None` if nothing is to be done.
    busy: Mutex<Option<Instant>>,
    /// Of each lane.
    aborts: Vec<Abort>,
}

impl NcclChannel {
    /// Sends a parcel, after those before. False: the channel is broken.
    #[must_use]
    pub fn send(&self, parcel: Parcel) -> Soon<bool> {
        let (reply, sent) = oneshot::channel();
        let _ = self.requests.send(Request::Send(parcel, reply));
        Box::pin(async { Ok(sent.await.is_ok()) })
    }

    /// Receives the next parcel, of so many bytes. `None`: the channel is broken.
    #[must_use]
    pub fn receive(&self, bytes: usize) -> Soon<Option<Parcel>> {
        let (reply, received) = oneshot::channel();
        let _ = self.requests.send(Request::Receive(bytes, reply));
        Box::pin(async { Ok(received.await.ok()) })
    }

    /// Whether the library does not come back from a call.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        let patience = 2 * self.state.patience;
        self.state.busy().is_some_and(|since| since.elapsed() > patience)
    }

    /// Ends it, wherever it is, without waiting.
    pub fn close(&self) {
        let stuck = self.is_stuck();
        self.state.close();
        let _ = self.requests.send(Request::Look);
        if stuck {
            // Each may hang, too.
            self.state.aborts.iter().cloned().for_each(|abort| spawn(move || abort.abort()));
        }
    }

    /// An empty parcel, once there is one: in the order in which they were asked for, so that who
    /// has some and waits for others has the first ones. `None` if none is as large.
    pub(crate) fn room(&self, bytes: usize) -> Option<oneshot::Receiver<Parcel>> {
        self.ring.room(bytes)
    }
}

impl Drop for NcclChannel {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    fn busy(&self) -> MutexGuard<'_, Option<Instant>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_bounded() {
        let taken = Arc::default();
        let more = |lanes| Counted::some_more(&taken, lanes, 10);
        let mut all: Vec<_> = std::iter::from_fn(|| more(4)).collect();
        assert_eq!(all.len(), 2);
        all.extend(more(2));
        assert!(more(1).is_none());
        all.remove(0);
        assert!(more(5).is_none() && more(4).is_some());
        drop(all);
        assert_eq!(taken.load(Ordering::Relaxed), 0);
    }
}
