//! An engine's memory as transfers see it.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::channel::{self, NcclChannel, NcclChannels};
use baton_engine::{BlockLease, KvMemory, PeerKv, SharedKv};
use baton_kvtransfer::frame::{LayerRun, Run};
use baton_kvtransfer::{
    BlockSink, BlockSource, Channel, ChannelEnd, ChannelName, Channels, Direct, MemoryLost, Parcel,
    Place, Remote, SharedMemory, Soon, at_hand,
};
use bytes::Bytes;

// A unit has to fit a slot.
const _: () = assert!(baton_engine::staging::UNIT_BYTES >= baton_kvtransfer::limits::UNIT_BYTES);

// A parcel, too.
const _: () = assert!(channel::PARCEL_BYTES >= baton_kvtransfer::limits::PARCEL_BYTES);

/// The KV cache, for nodes of the same machine.
pub(crate) struct EngineMemory {
    shared: SharedKv,
    memory: KvMemory,
}

impl EngineMemory {
    /// `None` if other processes cannot open it.
    pub(crate) fn of(memory: &KvMemory) -> Option<Self> {
        Some(Self { shared: memory.shared()?, memory: memory.clone() })
    }
}

impl Direct for EngineMemory {
    fn shared(&self) -> SharedMemory {
        let SharedKv { blocks, description } = self.shared.clone();
        SharedMemory { blocks, description }
    }

    fn open(&self, SharedMemory { blocks, description }: SharedMemory) -> Soon<Option<Remote>> {
        let opened = self.memory.open(SharedKv { blocks, description });
        Box::pin(async {
            let peer = opened.await.map_err(|_| MemoryLost)?;
            Ok(peer.map(|peer| Arc::new(peer) as Remote))
        })
    }
}

/// Channels between the KV cache and those of other nodes.
pub(crate) struct EngineChannels(pub(crate) NcclChannels);

impl Channels for EngineChannels {
    fn devices(&self) -> u8 {
        // Of more than that no names are made.
        u8::try_from(self.0.devices()).unwrap_or(u8::MAX)
    }

    fn name(&self, senders: u8) -> Soon<Result<ChannelName, String>> {
        let name = self.0.name(senders.into());
        Box::pin(async { name.await.map_err(|_| MemoryLost) })
    }

    fn join(
        &self,
        name: ChannelName,
        end: ChannelEnd,
        join: Duration,
        patience: Duration,
    ) -> Soon<Result<Arc<dyn Channel>, String>> {
        let joined = self.0.join(name, end == ChannelEnd::Receiving, join, patience);
        Box::pin(async {
            let joined = joined.await.map_err(|_| MemoryLost)?;
            Ok(joined.map(|channel| Arc::new(EngineChannel(channel)) as Arc<dyn Channel>))
        })
    }
}

struct EngineChannel(NcclChannel);

impl Channel for EngineChannel {
    fn send(&self, parcel: Parcel) -> Soon<bool> {
        match parcel.downcast::<channel::Parcel>() {
            Ok(parcel) => {
                let sent = self.0.send(*parcel);
                Box::pin(async { sent.await.map_err(|_| MemoryLost) })
            }
            Err(_) => at_hand(false),
        }
    }

    fn receive(&self, bytes: usize) -> Soon<Option<Parcel>> {
        let received = self.0.receive(bytes);
        Box::pin(async {
            let parcel = received.await.map_err(|_| MemoryLost)?;
            Ok(parcel.map(|parcel| Box::new(parcel) as Parcel))
        })
    }

    fn is_stuck(&self) -> bool {
        self.0.is_stuck()
    }

    fn close(&self) {
        self.0.close();
    }
}

/// The blocks of an export or of a served prefix.
pub(crate) struct LeaseSource(pub(crate) Arc<BlockLease>);

impl BlockSource for LeaseSource {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        let read = self.0.read(layer as usize, ordinals(run));
        Box::pin(async {
            let pieces = read.await.map_err(|_| MemoryLost)?;
            Ok(pieces.into_iter().map(Bytes::from_owner).collect())
        })
    }

    fn references(&self, run: Run) -> Option<Vec<u32>> {
        Some(self.0.block_ids(ordinals(run)).to_vec())
    }

    fn pack(
        &self,
        channel: &dyn Channel,
        LayerRun { layer, run }: LayerRun,
    ) -> Soon<Option<Parcel>> {
        let channel: &dyn Any = channel;
        let Some(EngineChannel(channel)) = channel.downcast_ref() else { return at_hand(None) };
        let packed = self.0.pack(channel, layer as usize, ordinals(run));
        Box::pin(async {
            let parcel = packed.await.map_err(|_| MemoryLost)?;
            Ok(parcel.map(|parcel| Box::new(parcel) as Parcel))
        })
    }
}

/// The blocks of an import or of a fetched prefix.
pub(crate) struct LeaseSink(pub(crate) Arc<BlockLease>);

impl BlockSink for LeaseSink {
    fn place(self: Arc<Self>, LayerRun { layer, run }: LayerRun) -> Soon<Box<dyn Place>> {
        let place = self.0.place(layer as usize, ordinals(run));
        Box::pin(async {
            let place = place.await.map_err(|_| MemoryLost)?;
            Ok(Box::new(LeasePlace(place)) as Box<dyn Place>)
        })
    }

    fn copy(
        self: Arc<Self>,
        from: &Remote,
        LayerRun { layer, run }: LayerRun,
        blocks: Vec<u32>,
    ) -> Soon<bool> {
        let Some(peer) = from.downcast_ref::<PeerKv>() else { return at_hand(false) };
        let copied = self.0.copy_from(peer, layer as usize, ordinals(run), blocks);
        Box::pin(async { copied.await.map_err(|_| MemoryLost) })
    }

    fn unpack(self: Arc<Self>, LayerRun { layer, run }: LayerRun, parcel: Parcel) -> Soon<bool> {
        let Ok(parcel) = parcel.downcast::<channel::Parcel>() else { return at_hand(false) };
        let unpacked = self.0.unpack(layer as usize, ordinals(run), *parcel);
        Box::pin(async { unpacked.await.map_err(|_| MemoryLost) })
    }
}

/// Where a unit goes.
struct LeasePlace(baton_engine::Place);

impl Place for LeasePlace {
    fn write(&mut self, ordinal: u32, piece: &[u8]) {
        self.0.write(ordinal as usize, 0, piece);
    }

    fn apply(self: Box<Self>) -> Soon<()> {
        let applied = self.0.apply();
        Box::pin(async { applied.await.map_err(|_| MemoryLost) })
    }
}

fn ordinals(run: Run) -> Range<usize> {
    run.first as usize..(run.first + run.count) as usize
}
