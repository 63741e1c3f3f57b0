//! Ends whose blocks are not at hand: copies that take as long as the test wants.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;

use baton_kvtransfer::frame::LayerRun;
use baton_kvtransfer::limits::{MAX_PAYLOAD_STREAMS, STAGED_UNITS};
use baton_kvtransfer::{
    BlockSink, BlockSource, MemoryLost, Place, Reason, ReceiveError, ReceiveHandle, Room,
    SendError, SendHandle, Soon,
};
use baton_proto::ids::TransferId;
use bytes::Bytes;
use common::{BLOCKS, GEOMETRY, Pair, Pool, first_token, transfer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Copies wait for permits; a closed semaphore is a device that has failed.
struct Copies {
    permits: Semaphore,
    asked: watch::Sender<usize>,
}

impl Copies {
    fn new(permits: usize) -> Arc<Self> {
        Arc::new(Self { permits: Semaphore::new(permits), asked: watch::Sender::new(0) })
    }

    async fn one(&self) -> Result<(), MemoryLost> {
        self.permits.acquire().await.map_err(|_| MemoryLost)?.forget();
        Ok(())
    }

    fn ask(&self) {
        self.asked.send_modify(|asked| *asked += 1);
    }

    /// Waits until so many copies were asked for.
    async fn wait_asked(&self, copies: usize) {
        self.asked.subscribe().wait_for(|asked| *asked >= copies).await.unwrap();
    }
}

struct StagedSource {
    pool: Arc<Pool>,
    reads: Arc<Copies>,
}

/// A source of a ring of slots, which what is read occupies until it is dropped.
struct RingSource {
    pool: Arc<Pool>,
    ring: Arc<Semaphore>,
}

struct InSlot {
    bytes: Vec<u8>,
    _slot: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for InSlot {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl BlockSource for RingSource {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        let (pool, ring) = (self.pool.clone(), self.ring.clone());
        Box::pin(async move {
            let slot = ring.acquire_owned().await.map_err(|_| MemoryLost)?;
            let pieces = run.range().map(|ordinal| pool.bytes(layer, ordinal));
            let bytes = pieces.collect::<Vec<_>>().concat();
            Ok(vec![Bytes::from_owner(InSlot { bytes, _slot: slot })])
        })
    }
}

impl BlockSource for StagedSource {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        self.reads.ask();
        let (pool, reads) = (self.pool.clone(), self.reads.clone());
        Box::pin(async move {
            reads.one().await?;
            let pieces = run.range().map(|ordinal| pool.bytes(layer, ordinal));
            Ok(vec![Bytes::from(pieces.collect::<Vec<_>>().concat())])
        })
    }
}

struct StagedSink {
    pool: Arc<Pool>,
    slots: Arc<Copies>,
    writes: Arc<Copies>,
}

impl StagedSink {
    fn new(slots: usize, writes: usize) -> Arc<Self> {
        let (slots, writes) = (Copies::new(slots), Copies::new(writes));
        Arc::new(Self { pool: Pool::sink(), slots, writes })
    }
}

impl BlockSink for StagedSink {
    fn place(self: Arc<Self>, pieces: LayerRun) -> Soon<Box<dyn Place>> {
        self.slots.ask();
        Box::pin(async move {
            self.slots.one().await?;
            Ok(Box::new(StagedPlace { sink: self, pieces, written: Vec::new() }) as Box<dyn Place>)
        })
    }
}

struct StagedPlace {
    sink: Arc<StagedSink>,
    pieces: LayerRun,
    written: Vec<(u32, Vec<u8>)>,
}

impl Place for StagedPlace {
    fn write(&mut self, ordinal: u32, piece: &[u8]) {
        assert!(self.pieces.run.range().contains(&ordinal));
        self.written.push((ordinal, piece.to_vec()));
    }

    fn apply(self: Box<Self>) -> Soon<()> {
        self.sink.writes.ask();
        Box::pin(async move {
            self.sink.writes.one().await?;
            for (ordinal, piece) in &self.written {
                self.sink.pool.write(self.pieces.layer, *ordinal, piece);
            }
            self.sink.slots.permits.add_permits(1);
            Ok(())
        })
    }
}

/// A transfer between staged ends, everything ready at once.
fn begin(
    pair: &Pair,
    id: TransferId,
    reads: &Arc<Copies>,
    sink: &Arc<StagedSink>,
) -> (Arc<Pool>, SendHandle, ReceiveHandle) {
    let pool = Pool::source();
    let mut incoming = pair.incoming(id, 0, &sink.pool);
    incoming.room = Some(Room { held: 0, sink: sink.clone() });
    let receive = pair.decode.expect(incoming);
    let mut outgoing = pair.outgoing(id, &pool);
    outgoing.source = Arc::new(StagedSource { pool: pool.clone(), reads: reads.clone() });
    let send = pair.prefill.send(outgoing);
    for layer in 0..GEOMETRY.layers {
        send.ready(layer, 0..BLOCKS);
    }
    send.finish(first_token());
    (pool, send, receive)
}

/// Whether something is still pending after everything else that could run has run.
async fn is_pending<T>(future: impl Future<Output = T>) -> bool {
    let mut future = std::pin::pin!(future);
    for _ in 0..100 {
        tokio::select! {
            biased;
            _ = &mut future => return false,
            () = tokio::task::yield_now() => {}
        }
    }
    true
}

const MANY: usize = 1 << 20;
const LAYERS: usize = GEOMETRY.layers as usize;

#[tokio::test]
async fn complete_means_applied() {
    let pair = Pair::new();
    let (reads, sink) = (Copies::new(MANY), StagedSink::new(MANY, 0));
    let (source, send, receive) = begin(&pair, transfer(1), &reads, &sink);
    sink.writes.permits.add_permits(LAYERS - 1);
    sink.writes.wait_asked(LAYERS).await;
    assert!(is_pending(receive.outcome()).await, "one unit is not in the blocks");
    assert!(is_pending(send.outcome()).await);
    sink.writes.permits.add_permits(1);
    assert_eq!(receive.outcome().await, Ok(first_token()));
    assert_eq!(send.outcome().await.unwrap().blocks, BLOCKS);
    sink.pool.assert_holds(&source, 0);
    assert_eq!(Arc::strong_count(&sink), 1, "it was released before");
}

#[tokio::test]
async fn units_are_read_ahead_and_not_without_bound() {
    let pair = Pair::new();
    let (reads, sink) = (Copies::new(0), StagedSink::new(1, MANY));
    let ids: Vec<_> = (1..4).map(transfer).collect();
    let transfers: Vec<_> = ids.iter().map(|id| begin(&pair, *id, &reads, &sink)).collect();
    reads.wait_asked(ids.len() * STAGED_UNITS.min(LAYERS)).await;
    reads.permits.add_permits(MANY);
    for (source, send, receive) in transfers {
        assert_eq!(receive.outcome().await, Ok(first_token()));
        send.outcome().await.unwrap();
        sink.pool.assert_holds(&source, 0);
    }
    assert_eq!(*reads.asked.borrow(), ids.len() * LAYERS, "each unit is read once");
}

#[tokio::test]
async fn who_waits_for_a_slot_holds_nobody_up() {
    let pair = Pair::new();
    let (reads, full) = (Copies::new(MANY), StagedSink::new(0, MANY));
    let (source, _send, receive) = begin(&pair, transfer(1), &reads, &full);
    full.slots.wait_asked(1).await;
    let free = StagedSink::new(1, MANY);
    let (_, send, other) = begin(&pair, transfer(2), &reads, &free);
    assert_eq!(other.outcome().await, Ok(first_token()));
    send.outcome().await.unwrap();
    assert!(is_pending(receive.outcome()).await);
    full.slots.permits.add_permits(1);
    assert_eq!(receive.outcome().await, Ok(first_token()));
    full.pool.assert_holds(&source, 0);
}

/// Neither slots nor streams are enough for all, at either end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_that_wait_for_a_stream_keep_no_slot_from_those_that_have_one() {
    let pair = Pair::new();
    let ring = Arc::new(Semaphore::new(MAX_PAYLOAD_STREAMS as usize / 2));
    let sink = StagedSink::new(4, MANY);
    let transfers: Vec<_> = (0..3 * MAX_PAYLOAD_STREAMS)
        .map(|n| {
            let mut incoming = pair.incoming(transfer(n.into()), 0, &sink.pool);
            incoming.room = Some(Room { held: 0, sink: sink.clone() });
            let receive = pair.decode.expect(incoming);
            let pool = Pool::source();
            let mut outgoing = pair.outgoing(transfer(n.into()), &pool);
            outgoing.source = Arc::new(RingSource { pool, ring: ring.clone() });
            let send = pair.prefill.send(outgoing);
            for layer in 0..GEOMETRY.layers {
                send.ready(layer, 0..BLOCKS);
            }
            (send, receive)
        })
        .collect();
    for (send, _) in &transfers {
        send.finish(first_token());
    }
    for (send, receive) in transfers {
        assert_eq!(receive.outcome().await, Ok(first_token()));
        assert_eq!(send.outcome().await.unwrap().blocks, BLOCKS);
    }
    sink.pool.assert_holds(&Pool::source(), 0);
}

#[tokio::test]
async fn a_cancel_leaves_late_copies_alone() {
    let pair = Pair::new();
    let (reads, sink) = (Copies::new(MANY), StagedSink::new(MANY, 0));
    let (_, send, receive) = begin(&pair, transfer(1), &reads, &sink);
    sink.writes.wait_asked(1).await;
    receive.cancel();
    assert_eq!(receive.outcome().await, Err(ReceiveError::Cancelled));
    assert_eq!(send.outcome().await, Err(SendError::Refused(Reason::Cancelled)));
    assert!(Arc::strong_count(&sink) > 1, "the copies keep what they write to");
    sink.writes.permits.add_permits(MANY);
    while Arc::strong_count(&sink) > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(pair.decode.transfers(), (0, 0));
}

#[tokio::test]
async fn a_slot_that_comes_too_late_goes_back() {
    let pair = Pair::new();
    let (reads, sink) = (Copies::new(MANY), StagedSink::new(0, MANY));
    let (_, _send, receive) = begin(&pair, transfer(1), &reads, &sink);
    sink.slots.wait_asked(1).await;
    receive.cancel();
    sink.slots.permits.add_permits(1);
    assert_eq!(receive.outcome().await, Err(ReceiveError::Cancelled));
    while Arc::strong_count(&sink) > 1 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn memory_that_fails_ends_the_transfer_at_both_ends() {
    let pair = Pair::new();
    for n in 0..3 {
        let (reads, sink) = (Copies::new(MANY), StagedSink::new(MANY, MANY));
        [&reads, &sink.slots, &sink.writes][n].permits.close();
        let (_, send, receive) = begin(&pair, transfer(n as u128), &reads, &sink);
        let (sent, received) = (send.outcome().await, receive.outcome().await);
        match n {
            0 => {
                assert_eq!(sent, Err(SendError::Memory(MemoryLost)));
                assert_eq!(received, Err(ReceiveError::Ended(Reason::Memory)));
            }
            _ => {
                assert_eq!(sent, Err(SendError::Refused(Reason::Memory)));
                assert_eq!(received, Err(ReceiveError::Memory(MemoryLost)));
            }
        }
    }
    assert_eq!((pair.prefill.transfers(), pair.decode.transfers()), ((0, 0), (0, 0)));
}
