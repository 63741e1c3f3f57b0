//! Nodes of one machine: payload by reference, and back to bytes when that does not work.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use baton_kvtransfer::frame::{LayerRun, Run};
use baton_kvtransfer::{
    BlockSink, BlockSource, Direct, Place, ReceiveHandle, Remote, Room, SendError, SendHandle,
    Sent, SharedMemory, Soon, Transport, at_hand,
};
use baton_proto::ids::TransferId;
use bytes::Bytes;
use common::{BLOCKS, GEOMETRY, Pair, Pool, first_token, transfer};
use tokio::sync::{Semaphore, watch};

/// What "handles" open, as a driver knows them.
fn driver() -> &'static Mutex<HashMap<u64, Arc<Pool>>> {
    static DRIVER: OnceLock<Mutex<HashMap<u64, Arc<Pool>>>> = OnceLock::new();
    DRIVER.get_or_init(Mutex::default)
}

/// The memory of a node.
struct Memory {
    handle: u64,
    opens: AtomicBool,
}

impl Memory {
    fn new(pool: &Arc<Pool>) -> Arc<Self> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let handle = LAST.fetch_add(1, Ordering::Relaxed);
        driver().lock().unwrap().insert(handle, pool.clone());
        Arc::new(Self { handle, opens: AtomicBool::new(true) })
    }
}

impl Direct for Memory {
    fn shared(&self) -> SharedMemory {
        SharedMemory { blocks: BLOCKS, description: self.handle.to_le_bytes().to_vec() }
    }

    fn open(&self, shared: SharedMemory) -> Soon<Option<Remote>> {
        let handle = u64::from_le_bytes(shared.description.try_into().unwrap());
        let pool = driver().lock().unwrap().get(&handle).cloned();
        at_hand(pool.filter(|_| self.opens.load(Ordering::Relaxed)).map(|pool| pool as Remote))
    }
}

/// Block `n` of the sequence is block `BLOCKS - 1 - n` of the memory, plus `wrong`.
struct Source {
    pool: Arc<Pool>,
    wrong: u32,
    reads: watch::Sender<usize>,
}

impl BlockSource for Source {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        self.reads.send_modify(|reads| *reads += run.count as usize);
        let piece = |ordinal| self.pool.bytes(layer, BLOCKS - 1 - ordinal).into();
        at_hand(run.range().map(piece).collect())
    }

    fn references(&self, run: Run) -> Option<Vec<u32>> {
        Some(run.range().map(|ordinal| BLOCKS - 1 - ordinal + self.wrong).collect())
    }
}

/// Copies wait for permits; a closed semaphore is memory that cannot be read.
struct Sink {
    pool: Arc<Pool>,
    permits: Semaphore,
    asked: watch::Sender<usize>,
}

impl BlockSink for Sink {
    fn place(self: Arc<Self>, pieces: LayerRun) -> Soon<Box<dyn Place>> {
        self.pool.clone().place(pieces)
    }

    fn copy(self: Arc<Self>, from: &Remote, pieces: LayerRun, blocks: Vec<u32>) -> Soon<bool> {
        let from = from.clone().downcast::<Pool>().unwrap();
        self.asked.send_modify(|asked| *asked += 1);
        Box::pin(async move {
            let Ok(permit) = self.permits.acquire().await else { return Ok(false) };
            permit.forget();
            for (ordinal, block) in pieces.run.range().zip(blocks) {
                let piece = from.bytes(pieces.layer, block);
                self.pool.write(pieces.layer, ordinal, &piece);
            }
            Ok(true)
        })
    }
}

struct Machine {
    pair: Pair,
    /// Of the sender.
    pool: Arc<Pool>,
    memories: [Arc<Memory>; 2],
}

impl Machine {
    fn new() -> Self {
        let (pair, pool) = (Pair::new(), Pool::source());
        let memories = [Memory::new(&pool), Memory::new(&Pool::sink())];
        pair.prefill.share(memories[0].clone());
        pair.decode.share(memories[1].clone());
        Self { pair, pool, memories }
    }

    fn begin(&self, id: TransferId, permits: usize, wrong: u32) -> Transfer {
        let (permits, asked) = (Semaphore::new(permits), watch::Sender::new(0));
        let sink = Arc::new(Sink { pool: Pool::sink(), permits, asked });
        let reads = watch::Sender::new(0);
        let source = Arc::new(Source { pool: self.pool.clone(), wrong, reads });
        let mut incoming = self.pair.incoming(id, 0, &sink.pool);
        incoming.room = Some(Room { held: 0, sink: sink.clone() });
        let receive = self.pair.decode.expect(incoming);
        let mut outgoing = self.pair.outgoing(id, &self.pool);
        outgoing.source = source.clone();
        let send = self.pair.prefill.send(outgoing);
        for layer in 0..GEOMETRY.layers {
            send.ready(layer, 0..BLOCKS);
        }
        send.finish(first_token());
        Transfer { source, sink, send, receive }
    }

    /// The transfer arrives whole.
    async fn arrives(&self, transfer: &Transfer) -> Sent {
        assert_eq!(transfer.receive.outcome().await, Ok(first_token()));
        let sent = transfer.send.outcome().await.unwrap();
        for layer in 0..GEOMETRY.layers {
            for ordinal in 0..BLOCKS {
                let theirs = self.pool.bytes(layer, BLOCKS - 1 - ordinal);
                assert!(transfer.sink.pool.bytes(layer, ordinal) == theirs, "{layer}/{ordinal}");
            }
        }
        assert_eq!(Arc::strong_count(&transfer.sink), 1, "nobody copies any more");
        sent
    }
}

struct Transfer {
    source: Arc<Source>,
    sink: Arc<Sink>,
    send: SendHandle,
    receive: ReceiveHandle,
}

impl Transfer {
    fn reads(&self) -> usize {
        *self.source.reads.borrow()
    }
}

const MANY: usize = 1000;
const PIECES: usize = (GEOMETRY.layers * BLOCKS) as usize;

#[tokio::test]
async fn nodes_of_one_machine_copy_from_memory_to_memory() {
    let machine = Machine::new();
    assert_eq!(machine.pair.prefill.transports(), [Transport::Ipc, Transport::Quic]);
    for id in 1..4 {
        let moved = machine.begin(transfer(id), MANY, 0);
        let sent = machine.arrives(&moved).await;
        assert_eq!((sent.transport, moved.reads()), (Transport::Ipc, 0), "not a byte was read");
        assert_eq!(sent.bytes, u64::from(BLOCKS) * GEOMETRY.block_bytes() as u64);
    }
    let bytes = 3 * u64::from(BLOCKS) * GEOMETRY.block_bytes() as u64;
    let sent = machine.pair.prefill.sent_bytes();
    assert_eq!(sent, [(Transport::Ipc, bytes), (Transport::Nccl, 0), (Transport::Quic, 0)]);
    assert_eq!(machine.pair.prefill.last_transport(), Some(Transport::Ipc));
    assert_eq!(machine.pair.decode.last_transport(), None, "it has sent nothing");
}

#[tokio::test]
async fn memory_that_cannot_be_opened_is_no_reason_to_fail() {
    let machine = Machine::new();
    machine.memories[1].opens.store(false, Ordering::Relaxed);
    let moved = machine.begin(transfer(1), MANY, 0);
    let sent = machine.arrives(&moved).await;
    assert_eq!((sent.transport, moved.reads()), (Transport::Quic, PIECES));
}

#[tokio::test]
async fn who_shares_nothing_gets_and_sends_bytes() {
    for sharing in [None, Some(0), Some(1)] {
        let (pair, pool) = (Pair::new(), Pool::source());
        let memories = [Memory::new(&pool), Memory::new(&pool)];
        match sharing {
            Some(0) => pair.prefill.share(memories[0].clone()),
            Some(_) => pair.decode.share(memories[1].clone()),
            None => {}
        }
        let machine = Machine { pair, pool, memories };
        let moved = machine.begin(transfer(1), MANY, 0);
        assert_eq!(machine.arrives(&moved).await.transport, Transport::Quic);
    }
}

#[tokio::test]
async fn a_copy_that_fails_is_made_good_over_the_network() {
    let machine = Machine::new();
    let moved = machine.begin(transfer(1), 1, 0);
    let copies = GEOMETRY.layers as usize;
    moved.sink.asked.subscribe().wait_for(|asked| *asked == copies).await.unwrap();
    moved.sink.permits.close();
    let sent = machine.arrives(&moved).await;
    assert_eq!((sent.transport, moved.reads()), (Transport::Quic, PIECES));
    let next = machine.begin(transfer(2), MANY, 0);
    let sent = machine.arrives(&next).await;
    assert_eq!(sent.transport, Transport::Quic, "it is not tried again at once");
}

#[tokio::test]
async fn references_outside_of_the_memory_are_not_followed() {
    let machine = Machine::new();
    let moved = machine.begin(transfer(1), MANY, BLOCKS);
    let sent = moved.send.outcome().await;
    assert!(matches!(sent, Err(SendError::Unreachable(_))), "{sent:?}");
    assert_eq!(*moved.sink.asked.borrow(), 0);
    moved.receive.cancel();
    let _ = moved.receive.outcome().await;
}

#[tokio::test]
async fn a_cancel_waits_for_no_copy_and_copies_keep_what_they_write_to() {
    let machine = Machine::new();
    let moved = machine.begin(transfer(1), 0, 0);
    moved.sink.asked.subscribe().wait_for(|asked| *asked > 0).await.unwrap();
    moved.send.cancel();
    assert!(moved.receive.outcome().await.is_err());
    assert!(Arc::strong_count(&moved.sink) > 1);
    moved.sink.permits.add_permits(MANY);
    while Arc::strong_count(&moved.sink) > 1 {
        tokio::task::yield_now().await;
    }
}
