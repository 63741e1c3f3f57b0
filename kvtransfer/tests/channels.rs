//! Payload through channels between devices, and over the network when they break. The channels
//! here are queues of this process.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use baton_kvtransfer::frame::{Frame, Hello, LayerRun, Manifest, Offer, Run};
use baton_kvtransfer::{
    BlockSink, BlockSource, Channel, ChannelEnd, ChannelName, Channels, Endpoint, Incoming, Parcel,
    Place, ReceiveHandle, Room, SendHandle, Sent, Soon, Transport, at_hand,
};
use baton_proto::ids::TransferId;
use bytes::Bytes;
use common::{BLOCKS, EPOCH, GEOMETRY, Pair, Pool, first_token, root, transfer};
use quinn::crypto::rustls::QuicClientConfig;
use tokio::sync::{oneshot, watch};

const PIECES: usize = (GEOMETRY.layers * BLOCKS) as usize;

// === channels ===

/// What two ends share.
#[derive(Default)]
struct Middle {
    /// Ends that have joined.
    joined: watch::Sender<usize>,
    state: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    sent: VecDeque<Vec<u8>>,
    waiting: VecDeque<oneshot::Sender<Parcel>>,
    arrived: usize,
}

fn middle(name: ChannelName) -> Arc<Middle> {
    static ALL: OnceLock<Mutex<HashMap<ChannelName, Arc<Middle>>>> = OnceLock::new();
    ALL.get_or_init(Mutex::default).lock().unwrap().entry(name).or_default().clone()
}

/// What is wrong with a node's channels.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Fault {
    None,
    /// They are not joined.
    Refuses,
    /// Nothing arrives after so many parcels, and whoever waits is told.
    Breaks(usize),
    /// The same, and nobody is told.
    Hangs(usize),
    /// Nothing can be packed.
    PacksNothing,
}

struct Maker {
    fault: Fault,
    joins: AtomicUsize,
    /// Channels that were closed.
    closed: Arc<watch::Sender<usize>>,
}

impl Maker {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Self { fault, joins: AtomicUsize::new(0), closed: Arc::default() })
    }
}

impl Channels for Maker {
    fn devices(&self) -> u8 {
        2
    }

    fn name(&self, senders: u8) -> Soon<Result<ChannelName, String>> {
        static LAST: AtomicU8 = AtomicU8::new(0);
        assert_eq!(senders, 2, "what the sender said");
        at_hand(Ok(vec![LAST.fetch_add(1, Ordering::Relaxed) + 1]))
    }

    fn join(
        &self,
        name: ChannelName,
        _: ChannelEnd,
        _: Duration,
        _: Duration,
    ) -> Soon<Result<Arc<dyn Channel>, String>> {
        self.joins.fetch_add(1, Ordering::Relaxed);
        if self.fault == Fault::Refuses {
            return at_hand(Err("the same device".to_owned()));
        }
        let (middle, fault, closed) = (middle(name), self.fault, self.closed.clone());
        let stuck = AtomicBool::new(false);
        Box::pin(async move {
            middle.joined.send_modify(|joined| *joined += 1);
            middle.joined.subscribe().wait_for(|joined| *joined == 2).await.unwrap();
            Ok(Ok(Arc::new(End { middle, fault, closed, stuck }) as Arc<dyn Channel>))
        })
    }
}

struct End {
    middle: Arc<Middle>,
    fault: Fault,
    closed: Arc<watch::Sender<usize>>,
    stuck: AtomicBool,
}

impl End {
    /// Whether the next parcel gets no further.
    fn fails(&self, queue: &mut Queue) -> Option<bool> {
        match self.fault {
            Fault::Breaks(after) if queue.arrived >= after => Some(true),
            Fault::Hangs(after) if queue.arrived >= after => {
                self.stuck.store(true, Ordering::Relaxed);
                Some(false)
            }
            _ => None,
        }
    }
}

impl Channel for End {
    fn send(&self, parcel: Parcel) -> Soon<bool> {
        let bytes = *parcel.downcast::<Vec<u8>>().unwrap();
        let mut queue = self.middle.state.lock().unwrap();
        if let Some(told) = self.fails(&mut queue) {
            return if told { at_hand(false) } else { Box::pin(std::future::pending()) };
        }
        match queue.waiting.pop_front() {
            Some(waiting) => drop(waiting.send(Box::new(bytes))),
            None => queue.sent.push_back(bytes),
        }
        queue.arrived += 1;
        at_hand(true)
    }

    fn receive(&self, bytes: usize) -> Soon<Option<Parcel>> {
        let mut queue = self.middle.state.lock().unwrap();
        if let Some(told) = self.fails(&mut queue) {
            return if told { at_hand(None) } else { Box::pin(std::future::pending()) };
        }
        if let Some(sent) = queue.sent.pop_front() {
            assert_eq!(sent.len(), bytes, "both ends speak of the same parcel");
            return at_hand(Some(Box::new(sent)));
        }
        let (give, given) = oneshot::channel();
        queue.waiting.push_back(give);
        Box::pin(async { Ok(given.await.ok()) })
    }

    fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.closed.send_modify(|closed| *closed += 1);
        self.middle.state.lock().unwrap().waiting.clear();
    }
}

// === transfers ===

/// Counts what is read, and what is packed.
struct Source {
    pool: Arc<Pool>,
    fault: Fault,
    reads: AtomicUsize,
    packed: watch::Sender<usize>,
}

impl BlockSource for Source {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        self.reads.fetch_add(run.count as usize, Ordering::Relaxed);
        at_hand(run.range().map(|ordinal| self.pool.bytes(layer, ordinal).into()).collect())
    }

    fn pack(&self, _: &dyn Channel, LayerRun { layer, run }: LayerRun) -> Soon<Option<Parcel>> {
        self.packed.send_modify(|packed| *packed += run.count as usize);
        if self.fault == Fault::PacksNothing {
            return at_hand(None);
        }
        let bytes: Vec<u8> =
            run.range().flat_map(|ordinal| self.pool.bytes(layer, ordinal)).collect();
        at_hand(Some(Box::new(bytes)))
    }
}

struct Sink(Arc<Pool>);

impl BlockSink for Sink {
    fn place(self: Arc<Self>, pieces: LayerRun) -> Soon<Box<dyn Place>> {
        self.0.clone().place(pieces)
    }

    fn unpack(self: Arc<Self>, LayerRun { layer, run }: LayerRun, parcel: Parcel) -> Soon<bool> {
        let bytes = parcel.downcast::<Vec<u8>>().unwrap();
        for (ordinal, piece) in run.range().zip(bytes.chunks(GEOMETRY.piece_bytes())) {
            self.0.write(layer, ordinal, piece);
        }
        at_hand(true)
    }
}

/// Two nodes with channels, or without.
struct World {
    pair: Pair,
    makers: [Arc<Maker>; 2],
}

impl World {
    /// Of the sender and of the receiver.
    fn new(faults: [Fault; 2]) -> Self {
        let (pair, makers) = (Pair::new(), faults.map(Maker::new));
        pair.prefill.open_channels(makers[0].clone());
        pair.decode.open_channels(makers[1].clone());
        Self { pair, makers }
    }

    /// The same, once a first transfer has brought the channel up.
    async fn connected(faults: [Fault; 2]) -> Self {
        let world = Self::new(faults);
        world.begin(transfer(1000)).arrives().await;
        while (world.pair.prefill.channels().0, world.pair.decode.channels().1) != (1, 1) {
            tokio::task::yield_now().await;
        }
        world
    }

    fn begin(&self, id: TransferId) -> Moved {
        let moved = self.granted(id);
        (0..GEOMETRY.layers).for_each(|layer| moved.send.ready(layer, 0..BLOCKS));
        moved.send.finish(first_token());
        moved
    }

    /// Nothing is ready yet.
    fn granted(&self, id: TransferId) -> Moved {
        let sink = Arc::new(Sink(Pool::sink()));
        let mut incoming = self.pair.incoming(id, 0, &sink.0);
        incoming.room = Some(Room { held: 0, sink: sink.clone() });
        let receive = self.pair.decode.expect(incoming);
        let source = Arc::new(Source {
            pool: Pool::source(),
            fault: self.makers[0].fault,
            reads: AtomicUsize::new(0),
            packed: watch::Sender::new(0),
        });
        let mut outgoing = self.pair.outgoing(id, &source.pool);
        outgoing.source = source.clone();
        let send = self.pair.prefill.send(outgoing);
        Moved { source, sink, send, receive }
    }
}

struct Moved {
    source: Arc<Source>,
    sink: Arc<Sink>,
    send: SendHandle,
    receive: ReceiveHandle,
}

impl Moved {
    async fn arrives(&self) -> Sent {
        assert_eq!(self.receive.outcome().await, Ok(first_token()));
        let sent = self.send.outcome().await.unwrap();
        self.sink.0.assert_holds(&self.source.pool, 0);
        assert_eq!(Arc::strong_count(&self.sink), 1, "nobody writes any more");
        sent
    }

    fn reads(&self) -> usize {
        self.source.reads.load(Ordering::Relaxed)
    }
}

#[tokio::test]
async fn payload_goes_from_device_to_device() {
    let world = World::connected([Fault::None; 2]).await;
    let ways = [Transport::Nccl, Transport::Quic];
    assert_eq!(world.pair.prefill.transports(), ways);
    let all: Vec<_> = (1..6).map(|id| world.begin(transfer(id))).collect();
    for moved in &all {
        let sent = moved.arrives().await;
        assert_eq!((sent.transport, moved.reads()), (Transport::Nccl, 0));
    }
    assert_eq!(world.pair.prefill.last_transport(), Some(Transport::Nccl));
    for maker in &world.makers {
        assert_eq!(maker.joins.load(Ordering::Relaxed), 1, "one channel for all transfers");
    }
}

#[tokio::test]
async fn a_channel_that_is_refused_is_not_asked_for_again_at_once() {
    for faults in [[Fault::Refuses, Fault::None], [Fault::None, Fault::Refuses]] {
        let world = World::new(faults);
        for id in 1..4 {
            assert_eq!(world.begin(transfer(id)).arrives().await.transport, Transport::Quic);
        }
        assert_eq!((world.pair.prefill.channels(), world.pair.decode.channels()), ((0, 0), (0, 0)));
    }
}

#[tokio::test]
async fn who_makes_no_channels_gets_and_sends_bytes() {
    for side in [0, 1] {
        let pair = Pair::new();
        let maker = Maker::new(Fault::None);
        let with = if side == 0 { &pair.prefill } else { &pair.decode };
        with.open_channels(maker.clone());
        let world = World { pair, makers: [maker.clone(), maker.clone()] };
        assert_eq!(world.begin(transfer(1)).arrives().await.transport, Transport::Quic);
        assert_eq!(maker.joins.load(Ordering::Relaxed), 0);
    }
}

#[tokio::test]
async fn a_channel_that_breaks_is_made_good_over_the_network() {
    let breaks = [Fault::Breaks(0), Fault::Breaks(2), Fault::Hangs(0), Fault::Hangs(2)];
    let at_either_end =
        breaks.into_iter().flat_map(|fault| [[fault, Fault::None], [Fault::None, fault]]);
    for faults in at_either_end.chain([[Fault::PacksNothing, Fault::None]]) {
        let world = World::connected(faults).await;
        for id in 1..4 {
            let moved = world.begin(transfer(id));
            let sent = moved.arrives().await;
            assert_eq!((sent.transport, moved.reads()), (Transport::Quic, PIECES), "{faults:?}");
        }
    }
}

#[tokio::test]
async fn all_transfers_of_a_channel_that_breaks_go_on() {
    let world = World::connected([Fault::None, Fault::Breaks(3)]).await;
    let all: Vec<_> = (1..20).map(|id| world.begin(transfer(id))).collect();
    for moved in &all {
        moved.arrives().await;
    }
}

#[tokio::test]
async fn a_cancel_lets_go_of_blocks_whose_parcels_do_not_come() {
    let world = World::connected([Fault::Hangs(0), Fault::None]).await;
    let moved = world.granted(transfer(1));
    moved.send.ready(0, 0..BLOCKS);
    moved.source.packed.subscribe().wait_for(|packed| *packed > 0).await.unwrap();
    moved.receive.cancel();
    assert!(moved.receive.outcome().await.is_err());
    assert_eq!(Arc::strong_count(&moved.sink), 1);
    assert!(moved.send.outcome().await.is_err());
    assert_eq!(Arc::strong_count(&moved.source), 1);
    assert_eq!(world.begin(transfer(2)).arrives().await.transport, Transport::Quic);
}

#[tokio::test]
async fn the_channel_of_a_peer_that_stops_is_closed() {
    let world = World::connected([Fault::None; 2]).await;
    let moved = world.granted(transfer(1));
    moved.send.ready(0, 0..BLOCKS);
    moved.source.packed.subscribe().wait_for(|packed| *packed > 0).await.unwrap();
    world.pair.prefill.close().await;
    assert!(moved.receive.outcome().await.is_err());
    assert_eq!(Arc::strong_count(&moved.sink), 1);
    world.makers[1].closed.subscribe().wait_for(|closed| *closed > 0).await.unwrap();
    assert_eq!(world.pair.decode.channels(), (0, 0));
}

// === peers that do not keep to the rules ===

/// The protocol's close code for what it does not allow.
const PROTOCOL: u64 = 2;
/// Bytes of a piece of `GEOMETRY`.
const PIECE: u32 = 4096;

/// A member of the cluster, `p9`, with a channel to `d0` and transfer 1 granted: blocks 10 and up.
struct Hostile {
    connection: quinn::Connection,
    control: quinn::SendStream,
    replies: quinn::RecvStream,
}

impl Hostile {
    async fn connect(pair: &Pair) -> Self {
        let tls = pair.ca.node("p9").rustls_client(&[b"baton-kv/1"]);
        let tls = QuicClientConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(tls));
        let connecting =
            endpoint.connect_with(config, pair.decode.local_addr(), "d0.node.baton").unwrap();
        let connection = connecting.await.unwrap();
        let (control, replies) = connection.open_bi().await.unwrap();
        let mut hostile = Self { connection, control, replies };
        hostile.say(&Frame::Hello(Hello { devices: 2, ..Hello::new(EPOCH) })).await;
        assert!(matches!(hostile.hear().await, Frame::Hello(_)));
        hostile
    }

    /// Joins the channel, and is granted transfer 1 through it.
    async fn join(&mut self, decode: &Endpoint, channels: usize) {
        let Frame::Invite(name) = self.hear().await else { panic!("no invitation") };
        middle(name).joined.send_modify(|joined| *joined += 1);
        self.say(&Frame::Joined).await;
        while decode.channels().1 != channels {
            tokio::task::yield_now().await;
        }
        assert_eq!(self.granted().await, Transport::Nccl);
    }

    /// Offers transfer 1. How it is to travel.
    async fn granted(&mut self) -> Transport {
        self.say(&Frame::Offer(Offer {
            manifest: Manifest {
                transfer: transfer(1),
                root: root(),
                geometry: GEOMETRY,
                blocks: BLOCKS,
                hashes: Vec::new(),
            },
            lease: Duration::from_secs(5),
        }))
        .await;
        let Frame::Grant(grant) = self.hear().await else { panic!("no grant") };
        grant.transport
    }

    async fn say(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        // It may be closed already.
        let _ = self.control.write_all(&bytes).await;
    }

    async fn hear(&mut self) -> Frame {
        let mut length = [0; 4];
        self.replies.read_exact(&mut length).await.unwrap();
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.replies.read_exact(&mut body).await.unwrap();
        Frame::decode(&body).unwrap()
    }

    async fn closed(&self) -> u64 {
        match self.connection.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("{other}"),
        }
    }
}

/// Transfer 1, whose blocks below 10 are held.
fn expect_hostile(world: &World, pool: &Arc<Pool>) -> ReceiveHandle {
    world.pair.decode.expect(Incoming {
        from: "p9".parse().unwrap(),
        hashes: Vec::new(),
        ..world.pair.incoming(transfer(1), 10, pool)
    })
}

fn announce(layer: u32, first: u32, count: u32, bytes: u32) -> Frame {
    Frame::Announce(transfer(1), LayerRun { layer, run: Run { first, count } }, bytes)
}

#[tokio::test]
async fn announcements_of_what_was_not_granted_close_one_connection() {
    let twice = vec![announce(0, 10, 2, 2 * PIECE), announce(0, 11, 2, 2 * PIECE)];
    for frames in [
        vec![announce(0, 9, 1, PIECE)],
        vec![announce(0, BLOCKS - 1, 2, 2 * PIECE)],
        vec![announce(GEOMETRY.layers, 10, 1, PIECE)],
        vec![announce(0, 10, 2, PIECE)],
        vec![announce(0, 10, 1, u32::MAX)],
        twice,
        vec![Frame::Joined],
        vec![Frame::Invite(vec![7; 128])],
    ] {
        let world = World::connected([Fault::None; 2]).await;
        let pool = Pool::sink();
        let receive = expect_hostile(&world, &pool);
        let mut hostile = Hostile::connect(&world.pair).await;
        // Beside the honest one's.
        hostile.join(&world.pair.decode, 2).await;
        for frame in &frames {
            hostile.say(frame).await;
        }
        assert_eq!(hostile.closed().await, PROTOCOL, "{frames:?}");
        drop(receive);
        let sent = world.begin(transfer(2)).arrives().await;
        assert_eq!(sent.transport, Transport::Nccl, "others do not notice");
        pool.assert_holds(&Pool::source(), BLOCKS);
    }
}

#[tokio::test]
async fn nothing_is_announced_or_joined_without_a_channel() {
    for frame in [announce(0, 10, 1, PIECE), Frame::Joined, Frame::Invite(vec![7; 128])] {
        let world = World::new([Fault::None, Fault::Refuses]);
        let mut hostile = Hostile::connect(&world.pair).await;
        hostile.say(&frame).await;
        let joined_early = frame == Frame::Joined;
        if joined_early {
            // Whether or not it was invited by then: once is enough.
            hostile.say(&frame).await;
        }
        assert_eq!(hostile.closed().await, PROTOCOL, "{frame:?}");
        assert_eq!(world.begin(transfer(2)).arrives().await.transport, Transport::Quic);
    }
}

/// The library would go on joining for each of its connections.
#[tokio::test]
async fn who_leaves_while_a_channel_is_joined_is_not_invited_again_at_once() {
    let world = World::new([Fault::None; 2]);
    let pool = Pool::sink();
    let _receive = expect_hostile(&world, &pool);
    let mut hostile = Hostile::connect(&world.pair).await;
    let Frame::Invite(name) = hostile.hear().await else { panic!("no invitation") };
    hostile.connection.close(0_u32.into(), &[]);
    let middle = middle(name);
    while Arc::strong_count(&middle) > 2 {
        tokio::task::yield_now().await; // until nobody joins it any more
    }
    let mut again = Hostile::connect(&world.pair).await;
    assert_eq!(again.granted().await, Transport::Quic);
    assert_eq!(world.makers[1].joins.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn announcements_are_bounded() {
    let world = World::new([Fault::None; 2]);
    let mut hostile = Hostile::connect(&world.pair).await;
    let pool = Pool::sink();
    let _receive = expect_hostile(&world, &pool);
    hostile.join(&world.pair.decode, 1).await;
    // Of a transfer that nobody knows, so that they are to be received and dropped.
    let unknown = Frame::Announce(
        transfer(77),
        LayerRun { layer: 0, run: Run { first: 0, count: 1 } },
        PIECE,
    );
    for _ in 0..=baton_kvtransfer::limits::MAX_EXPECTED {
        hostile.say(&unknown).await;
    }
    assert_eq!(hostile.closed().await, PROTOCOL);
}

#[test]
fn names_that_are_too_long_are_no_frame() {
    let most = baton_kvtransfer::limits::MAX_CHANNEL_NAME_BYTES;
    for (length, legal) in [(most, true), (most + 1, false)] {
        let mut body = vec![11];
        body.extend((length as u32).to_le_bytes());
        body.extend(vec![1; length]);
        assert_eq!(Frame::decode(&body).is_ok(), legal, "{length}");
    }
}
