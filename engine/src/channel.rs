//! [`NcclChannels`]: pieces of the KV cache from this GPU to that of another node, or from there,
//! without passing through the host.
//!
//! A channel goes one way and belongs to a thread, since NCCL's calls may wait. Pieces are copied to
//! a parcel, memory that is the channel's own, and sent from there, or received there and copied out
//! of it. So the channel never touches a block: whoever holds blocks waits for copies alone, which
//! end by themselves, and a channel that hangs keeps nothing but its parcels.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use baton_kernels::cuda::{Abort, Buffer, Device, DeviceError, Nccl};
use tokio::sync::oneshot;

use crate::gpu::{Unavailable, find_nccl};
use crate::memory::{KvMemory, MemoryLost, Soon};
use crate::staging::DeviceKv;

mod owner;

use owner::{Request, Terms};

/// What both ends of a channel join by.
pub type ChannelName = [u8; 128];

/// Most bytes of a parcel, unless one piece is larger.
pub const PARCEL_BYTES: usize = 4 << 20;
/// Parcels of a channel that are packed, on their way or unpacked at a time.
const PARCELS: usize = 4;
/// Most channels of an engine, with those that are being joined and those that do not end, as the
/// library hangs: each has [`PARCELS`] of the device's memory, beside what the library takes.
const MAX_CHANNELS: usize = 32;

/// Why this engine's memory has no channels. Displayed on one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoChannels {
    /// It is memory of the host, or several devices share it.
    #[error("the KV cache is not in the memory of one GPU")]
    Memory,
    /// NCCL is not here.
    #[error(transparent)]
    Library(#[from] Unavailable),
}

/// Makes channels from and to the KV cache of a GPU.
#[derive(Clone)]
pub struct NcclChannels {
    nccl: Arc<Nccl>,
    kv: Arc<DeviceKv>,
    /// Channels that have a thread.
    channels: Arc<AtomicUsize>,
}

impl NcclChannels {
    /// Of an engine's memory. The library is looked for in `folders` first.
    ///
    /// # Errors
    /// If it is not there, or the memory is not one GPU's.
    pub fn of(memory: &KvMemory, folders: &[PathBuf]) -> Result<Self, NoChannels> {
        let kv = match memory {
            KvMemory::Device(staging) => staging.cache().ok_or(NoChannels::Memory)?,
            KvMemory::Host(_) => return Err(NoChannels::Memory),
        };
        Ok(Self { nccl: find_nccl(folders)?, kv, channels: Arc::default() })
    }

    /// A name for a new channel, or why there can be none.
    #[must_use]
    pub fn name(&self) -> Soon<Result<ChannelName, String>> {
        let (reply, name) = oneshot::channel();
        let nccl = self.nccl.clone();
        // It looks at the network the first time.
        spawn(move || drop(reply.send(nccl.unique_id().map_err(|error| error.to_string()))));
        Box::pin(async { name.await.map_err(|_| MemoryLost) })
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
        if let Some(place) = Counted::one_more(&self.channels) {
            let (channels, deadline) = (self.clone(), Instant::now() + join);
            let terms = Terms { name, receives, deadline, patience };
            spawn(move || {
                owner::run(&channels, &terms, reply);
                drop(place);
            });
        } else {
            let _ =
                reply.send(Err(format!("there are {MAX_CHANNELS} channels, which is the most")));
        }
        Box::pin(async { joined.await.map_err(|_| MemoryLost) })
    }
}

/// One of the channels, until it is dropped.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    /// None if there are as many as there may be.
    fn one_more(channels: &Arc<AtomicUsize>) -> Option<Self> {
        let more = |channels| (channels < MAX_CHANNELS).then_some(channels + 1);
        channels.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Self(channels.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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
    abort: OnceLock<Abort>,
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
        if stuck && let Some(abort) = self.state.abort.get().cloned() {
            // May hang, too.
            spawn(move || abort.abort());
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

/// Memory of the device for some pieces, one after the other. Goes back to its channel when dropped.
pub struct Parcel {
    memory: Option<Buffer<u8>>,
    bytes: usize,
    ring: Arc<Ring>,
}

impl Parcel {
    /// Bytes of the pieces.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn memory(&self) -> &Buffer<u8> {
        self.memory.as_ref().expect("only dropping takes the memory")
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            Ring::give_back(&self.ring, memory);
        }
    }
}

/// The parcels of a channel.
struct Ring {
    parcel_bytes: usize,
    parcels: Mutex<Parcels>,
}

#[derive(Default)]
struct Parcels {
    free: Vec<Buffer<u8>>,
    /// Who waits for one, and for how many bytes.
    waiting: VecDeque<(usize, oneshot::Sender<Parcel>)>,
}

impl Ring {
    fn new(device: &Arc<Device>, piece_bytes: usize) -> Result<Arc<Self>, DeviceError> {
        let parcel_bytes = PARCEL_BYTES.max(piece_bytes);
        let free = (0..PARCELS).map(|_| Buffer::new(device, parcel_bytes));
        let free = free.collect::<Result<_, _>>()?;
        let parcels = Mutex::new(Parcels { free, waiting: VecDeque::new() });
        Ok(Arc::new(Self { parcel_bytes, parcels }))
    }

    fn parcels(&self) -> MutexGuard<'_, Parcels> {
        self.parcels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A parcel, if one is free.
    fn take(ring: &Arc<Self>, bytes: usize) -> Option<Parcel> {
        let memory = ring.parcels().free.pop()?;
        Some(Parcel { memory: Some(memory), bytes, ring: ring.clone() })
    }

    /// A parcel as soon as one is free; `None` if none is as large.
    fn room(self: &Arc<Self>, bytes: usize) -> Option<oneshot::Receiver<Parcel>> {
        let (give, given) = oneshot::channel();
        if bytes > self.parcel_bytes {
            return None;
        }
        let mut parcels = self.parcels();
        match parcels.free.pop() {
            Some(memory) => {
                drop(parcels);
                let _ = give.send(Parcel { memory: Some(memory), bytes, ring: self.clone() });
            }
            None => parcels.waiting.push_back((bytes, give)),
        }
        Some(given)
    }

    fn give_back(ring: &Arc<Self>, memory: Buffer<u8>) {
        let mut parcels = ring.parcels();
        // Who does not wait any more is passed over.
        while let Some((bytes, give)) = parcels.waiting.pop_front() {
            if !give.is_closed() {
                drop(parcels);
                let parcel = Parcel { memory: Some(memory), bytes, ring: ring.clone() };
                // If that was in vain it comes back here.
                let _ = give.send(parcel);
                return;
            }
        }
        parcels.free.push(memory);
    }
}

#[cfg(test)]
mod tests {
    use baton_kernels::cuda::testing;

    use super::*;

    #[test]
    fn channels_are_bounded() {
        let channels = Arc::default();
        let mut taken: Vec<_> = std::iter::from_fn(|| Counted::one_more(&channels)).collect();
        assert_eq!(taken.len(), MAX_CHANNELS);
        taken.pop();
        taken.extend(Counted::one_more(&channels));
        assert!(Counted::one_more(&channels).is_none());
        drop(taken);
        assert_eq!(channels.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn parcels_go_around() {
        let Some(device) = testing::test_device() else { return };
        let ring = Ring::new(&device.device, 1).unwrap();
        assert!(ring.room(PARCEL_BYTES + 1).is_none(), "more than one has");
        let mut taken: Vec<_> = (0..PARCELS).map(|_| Ring::take(&ring, 1).unwrap()).collect();
        assert!(Ring::take(&ring, 1).is_none());
        // Who waits for one gets it; who does not wait any more is passed over.
        let [mut first, gone, mut last] = [7, 8, 9].map(|bytes| ring.room(bytes).unwrap());
        drop(gone);
        assert!(first.try_recv().is_err());
        taken.pop();
        let parcel = first.try_recv().unwrap();
        assert!(last.try_recv().is_err());
        drop(parcel);
        assert_eq!(last.try_recv().unwrap().bytes(), 9);
        taken.clear();
        assert_eq!(ring.parcels().free.len(), PARCELS);
    }
}
