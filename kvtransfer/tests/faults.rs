//! What breaks in the middle: connections, owners, nodes and hostile peers. Both ends let go of
//! their blocks, and everything else goes on.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use baton_kvtransfer::frame::{Frame, Hello, LayerRun, Manifest, Offer, Run, UnitHeader};
use baton_kvtransfer::limits::{MAX_PENDING_OFFERS_PER_PEER, UNIT_BYTES};
use baton_kvtransfer::{
    BlockSink, Endpoint, Incoming, MemoryLost, Place, Reason, ReceiveError, Room, SendError,
    SendHandle, Soon, Timing, Transport,
};
use baton_proto::ids::TransferId;
use common::{
    BLOCKS, Counted, EPOCH, GEOMETRY, Leased, Pair, Path, Pool, Watched, first_token, root,
    transfer,
};
use quinn::crypto::rustls::QuicClientConfig;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

const PIECES: usize = (GEOMETRY.layers * BLOCKS) as usize;

fn ready(send: &SendHandle, layers: std::ops::Range<u32>) {
    for layer in layers {
        send.ready(layer, 0..BLOCKS);
    }
}

/// A whole transfer from `p0` to `d0`, which must arrive.
async fn passes(pair: &Pair, id: TransferId) {
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(id, 0, &sink));
    let send = pair.prefill.send(pair.outgoing(id, &source));
    ready(&send, 0..GEOMETRY.layers);
    send.finish(first_token());
    assert_eq!(receive.outcome().await, Ok(first_token()));
    send.outcome().await.unwrap();
    sink.assert_holds(&source, 0);
}

/// Starts to send `source` along `path`.
fn send_along(pair: &Pair, path: &Path, source: &Arc<Counted>) -> SendHandle {
    let mut outgoing = pair.outgoing(transfer(1), &source.pool);
    outgoing.peer.kv_address = path.address.to_string();
    outgoing.source = Arc::new(Leased(source.clone()));
    pair.prefill.send(outgoing)
}

fn expect(pair: &Pair, sink: &Arc<Watched>) -> baton_kvtransfer::ReceiveHandle {
    let mut incoming = pair.incoming(transfer(1), 0, &sink.pool);
    incoming.room = Some(Room { held: 0, sink: sink.clone() });
    pair.decode.expect(incoming)
}

#[tokio::test]
async fn a_cut_connection_is_resumed_and_not_restarted() {
    let pair = Pair::new();
    let path = Path::new(pair.decode.local_addr()).await;
    let (source, sink) = (Counted::new(), Watched::new());
    let receive = expect(&pair, &sink);
    let send = send_along(&pair, &path, &source);
    ready(&send, 0..2);
    let landed = PIECES * 2 / 3;
    sink.wait_for(landed * GEOMETRY.piece_bytes()).await;

    path.cut();
    ready(&send, 2..3);
    send.finish(first_token());
    // The sender has noticed once it dials again.
    path.wait_for_dial().await;
    path.mend();
    assert_eq!(receive.outcome().await, Ok(first_token()));
    send.outcome().await.unwrap();
    sink.pool.assert_holds(&source.pool, 0);
    let (all, again) = (PIECES, PIECES - landed);
    assert!(*source.taken.borrow() <= all + again, "what had landed was sent again");
}

#[tokio::test]
async fn a_connection_that_stays_away_fails_the_sender_and_then_the_receiver() {
    let pair = Pair::new();
    let path = Path::new(pair.decode.local_addr()).await;
    let (source, sink) = (Counted::new(), Watched::new());
    let receive = {
        let mut incoming = pair.incoming(transfer(1), 0, &sink.pool);
        incoming.room = Some(Room { held: 0, sink: sink.clone() });
        incoming.lease = Duration::from_secs(2);
        pair.decode.expect(incoming)
    };
    let send = send_along(&pair, &path, &source);
    ready(&send, 0..1);
    sink.wait_for(GEOMETRY.piece_bytes()).await;
    path.cut();
    ready(&send, 1..2);
    assert!(matches!(receive.outcome().await, Err(ReceiveError::Timeout(_))));
    assert_eq!(Arc::strong_count(&sink), 1);
    assert!(matches!(send.outcome().await, Err(SendError::Unreachable(_))));
    assert_eq!(Arc::strong_count(&source), 1);
}

/// How far a transfer has come when it is cancelled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// The receiver cannot be reached.
    Unlinked,
    /// The receiver does not expect the transfer.
    Offered,
    /// Granted, nothing ready.
    Granted,
    /// Payload that the receiver will never see is on its way.
    InFlight,
    /// The same, and the prompt is finished.
    Finished,
}

const PHASES: [Phase; 5] =
    [Phase::Unlinked, Phase::Offered, Phase::Granted, Phase::InFlight, Phase::Finished];

/// Brings a transfer to `phase`. The receiver's handle is there in all but `Offered`.
async fn bring_to(
    phase: Phase,
    pair: &Pair,
    path: &Path,
    source: &Arc<Counted>,
    sink: &Arc<Watched>,
) -> (SendHandle, Option<baton_kvtransfer::ReceiveHandle>) {
    if phase == Phase::Unlinked {
        path.cut();
        let receive = expect(pair, sink);
        let send = send_along(pair, path, source);
        path.wait_for_dial().await;
        return (send, Some(receive));
    }
    if phase == Phase::Offered {
        return (send_along(pair, path, source), None);
    }
    let receive = expect(pair, sink);
    let send = send_along(pair, path, source);
    // A landed piece proves the grant.
    send.ready(0, 0..1);
    sink.wait_for(GEOMETRY.piece_bytes()).await;
    if phase != Phase::Granted {
        path.cut();
        ready(&send, 0..GEOMETRY.layers);
        source.wait_for(PIECES).await;
    }
    if phase == Phase::Finished {
        send.finish(first_token());
    }
    (send, Some(receive))
}

#[tokio::test]
async fn a_cancel_by_the_sender_frees_the_source_in_every_phase() {
    for phase in PHASES {
        let pair = Pair::new();
        let path = Path::new(pair.decode.local_addr()).await;
        let (source, sink) = (Counted::new(), Watched::new());
        let (send, receive) = bring_to(phase, &pair, &path, &source, &sink).await;
        send.cancel();
        assert_eq!(send.outcome().await, Err(SendError::Cancelled), "{phase:?}");
        assert_eq!(Arc::strong_count(&source), 1, "{phase:?}");
        assert_eq!(pair.prefill.transfers(), (0, 0));
        if let (Phase::Granted, Some(receive)) = (phase, receive) {
            let ended = ReceiveError::Ended(Reason::Cancelled);
            assert_eq!(receive.outcome().await, Err(ended));
            assert_eq!(Arc::strong_count(&sink), 1);
        }
    }
}

#[tokio::test]
async fn a_cancel_by_the_receiver_frees_the_sink_in_every_phase() {
    for phase in PHASES {
        let pair = Pair::new();
        let path = Path::new(pair.decode.local_addr()).await;
        let (source, sink) = (Counted::new(), Watched::new());
        let (send, receive) = bring_to(phase, &pair, &path, &source, &sink).await;
        let Some(receive) = receive else {
            continue;
        };
        receive.cancel();
        assert_eq!(receive.outcome().await, Err(ReceiveError::Cancelled), "{phase:?}");
        assert_eq!(Arc::strong_count(&sink), 1, "{phase:?}");
        assert_eq!(pair.decode.transfers(), (0, 0));
        path.mend();
        // Also a sender that was not connected at the time is told.
        let refused = SendError::Refused(Reason::Cancelled);
        assert_eq!(send.outcome().await, Err(refused), "{phase:?}");
        assert_eq!(Arc::strong_count(&source), 1, "{phase:?}");
    }
}

#[tokio::test]
async fn dropping_a_handle_cancels() {
    let pair = Pair::new();
    let path = Path::new(pair.decode.local_addr()).await;
    let (source, sink) = (Counted::new(), Watched::new());
    let (send, receive) = bring_to(Phase::Granted, &pair, &path, &source, &sink).await;
    drop(receive);
    let refused = SendError::Refused(Reason::Cancelled);
    assert_eq!(send.outcome().await, Err(refused));
    assert_eq!(Arc::strong_count(&sink), 1);

    let (source, sink) = (Counted::new(), Watched::new());
    let mut outgoing = pair.outgoing(transfer(2), &source.pool);
    outgoing.source = Arc::new(Leased(source.clone()));
    let mut incoming = pair.incoming(transfer(2), 0, &sink.pool);
    incoming.room = Some(Room { held: 0, sink: sink.clone() });
    let receive = pair.decode.expect(incoming);
    drop(pair.prefill.send(outgoing));
    assert!(receive_ends(&receive).await);
    passes(&pair, transfer(3)).await;
}

/// Its sender was gone before it had connected, so it may not have been told: then cancel.
async fn receive_ends(receive: &baton_kvtransfer::ReceiveHandle) -> bool {
    receive.cancel();
    receive.outcome().await.is_err()
}

#[tokio::test]
async fn a_node_that_stops_ends_its_transfers_at_the_other() {
    let pair = Pair::new();
    let path = Path::new(pair.decode.local_addr()).await;
    let (source, sink) = (Counted::new(), Watched::new());
    let (send, receive) = bring_to(Phase::Granted, &pair, &path, &source, &sink).await;
    pair.prefill.close().await;
    assert_eq!(send.outcome().await, Err(SendError::Cancelled));
    assert!(matches!(receive.unwrap().outcome().await, Err(ReceiveError::Ended(_))));
    assert_eq!(Arc::strong_count(&sink), 1);

    let pair = Pair::new();
    let path = Path::new(pair.decode.local_addr()).await;
    let (source, sink) = (Counted::new(), Watched::new());
    let (send, _receive) = bring_to(Phase::Granted, &pair, &path, &source, &sink).await;
    pair.decode.close().await;
    let sent = send.outcome().await;
    let told = matches!(sent, Err(SendError::Refused(_) | SendError::Unreachable(_)));
    assert!(told, "{sent:?}");
    assert_eq!(Arc::strong_count(&source), 1);
}

#[tokio::test]
async fn waits_that_nobody_ends_have_a_deadline() {
    let pair = Pair::new();
    let short = Duration::from_millis(50);
    let timing = Timing { begin: short, producer: short, ..common::timing() };
    let listen = "127.0.0.1:0".parse().unwrap();
    let hasty = Endpoint::bind(listen, &pair.ca.node("p1"), EPOCH, timing).unwrap();
    let send = hasty.send(pair.outgoing(transfer(1), &Pool::source()));
    assert!(matches!(send.outcome().await, Err(SendError::Timeout(_))));

    let sink = Pool::sink();
    let receive = hasty.expect(pair.incoming(transfer(2), 0, &sink));
    assert!(matches!(receive.outcome().await, Err(ReceiveError::Timeout(_))));
    assert_eq!(Arc::strong_count(&sink), 1);
}

/// A member of the cluster, `p9`, that speaks QUIC but not by the rules.
struct Hostile {
    connection: quinn::Connection,
    control: quinn::SendStream,
    replies: quinn::RecvStream,
}

impl Hostile {
    async fn connect(pair: &Pair, name: &str) -> Self {
        Self::connect_with(pair, name, quinn::TransportConfig::default()).await
    }

    async fn connect_with(pair: &Pair, name: &str, transport: quinn::TransportConfig) -> Self {
        let tls = pair.ca.node(name).rustls_client(&[b"baton-kv/1"]);
        let tls = QuicClientConfig::try_from(tls).unwrap();
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        let connecting =
            endpoint.connect_with(config, pair.decode.local_addr(), "d0.node.baton").unwrap();
        let connection = connecting.await.unwrap();
        let (control, replies) = connection.open_bi().await.unwrap();
        Self { connection, control, replies }
    }

    async fn say(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.control.write_all(&bytes).await.unwrap();
    }

    async fn hear(&mut self) -> Frame {
        let mut length = [0; 4];
        self.replies.read_exact(&mut length).await.unwrap();
        let mut body = vec![0; u32::from_le_bytes(length) as usize];
        self.replies.read_exact(&mut body).await.unwrap();
        Frame::decode(&body).unwrap()
    }

    async fn greet(&mut self) {
        self.say(&Frame::Hello(Hello::new(EPOCH))).await;
        assert_eq!(self.hear().await, Frame::Hello(Hello::new(EPOCH)));
    }

    fn offer(id: TransferId) -> Frame {
        Frame::Offer(Offer {
            manifest: Manifest {
                transfer: id,
                root: root(),
                geometry: GEOMETRY,
                blocks: BLOCKS,
                hashes: Vec::new(),
            },
            lease: Duration::from_secs(5),
        })
    }

    /// Waits until the other end closes, and returns its code.
    async fn closed(&self) -> u64 {
        match self.connection.closed().await {
            quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("{other}"),
        }
    }
}

/// Close codes.
const PROTOCOL: u64 = 2;
const VERSION: u64 = 4;

#[tokio::test]
async fn garbage_closes_only_its_own_connection() {
    let pair = Pair::new();
    let giant = (u32::MAX).to_le_bytes().to_vec();
    let unknown = [&5u32.to_le_bytes()[..], &[200, 1, 2, 3, 4]].concat();
    let mut second_hello = Vec::new();
    Frame::Hello(Hello::new(EPOCH)).encode(&mut second_hello);
    for garbage in [giant, unknown, second_hello] {
        let mut hostile = Hostile::connect(&pair, "p9").await;
        hostile.greet().await;
        hostile.control.write_all(&garbage).await.unwrap();
        assert_eq!(hostile.closed().await, PROTOCOL);
    }
    let mut hostile = Hostile::connect(&pair, "p9").await;
    hostile.say(&Hostile::offer(transfer(1))).await;
    assert_eq!(hostile.closed().await, PROTOCOL, "an offer before hello");
    let mut hostile = Hostile::connect(&pair, "p9").await;
    let hello = Hello { oldest: 77, newest: 78, ..Hello::new(EPOCH) };
    hostile.say(&Frame::Hello(hello)).await;
    assert_eq!(hostile.closed().await, VERSION, "no common version");
    passes(&pair, transfer(1)).await;
}

#[tokio::test]
async fn a_peer_that_nothing_can_be_said_to_is_not_waited_for() {
    let mut pair = Pair::new();
    let timing = Timing { message: Duration::from_secs(2), ..common::timing() };
    let listen = "127.0.0.1:0".parse().unwrap();
    pair.decode = Endpoint::bind(listen, &pair.ca.node("d0"), EPOCH, timing).unwrap();
    let mut deaf = quinn::TransportConfig::default();
    deaf.stream_receive_window(0u32.into());
    let mut hostile = Hostile::connect_with(&pair, "p9", deaf).await;
    hostile.say(&Frame::Hello(Hello::new(EPOCH))).await;
    let closed = tokio::time::timeout(20 * timing.message, hostile.closed()).await;
    assert!(closed.is_ok(), "it holds a place among the handshakes");
    passes(&pair, transfer(1)).await;
}

#[tokio::test]
async fn offers_that_nobody_expects_are_bounded() {
    let pair = Pair::new();
    let mut hostile = Hostile::connect(&pair, "p9").await;
    hostile.greet().await;
    for n in 0..=MAX_PENDING_OFFERS_PER_PEER {
        hostile.say(&Hostile::offer(transfer(n as u128))).await;
    }
    let last = transfer(MAX_PENDING_OFFERS_PER_PEER as u128);
    assert_eq!(hostile.hear().await, Frame::Cancel(last, Reason::Busy));
    passes(&pair, transfer(1)).await;
}

#[tokio::test]
async fn payload_that_was_not_granted_is_not_written() {
    let pair = Pair::new();
    let sink = Pool::sink();
    let mut hostile = Hostile::connect(&pair, "p9").await;
    hostile.greet().await;
    let receive = pair.decode.expect(Incoming {
        from: "p9".parse().unwrap(),
        hashes: Vec::new(),
        ..pair.incoming(transfer(1), 10, &sink)
    });
    hostile.say(&Hostile::offer(transfer(1))).await;
    assert!(matches!(hostile.hear().await, Frame::Grant(_)));
    let header = |id, first, length| UnitHeader {
        transfer: id,
        pieces: LayerRun { layer: 0, run: Run { first, count: 1 } },
        transport: Transport::Quic,
        length,
        checksum: 0,
    };
    // A transfer that does not exist, and one of somebody else: only the stream is stopped.
    let _of_p0 = pair.decode.expect(pair.incoming(transfer(2), 0, &sink));
    for id in [transfer(99), transfer(2)] {
        let mut stream = hostile.connection.open_uni().await.unwrap();
        stream.write_all(&header(id, 10, 4096).encode()).await.unwrap();
        assert!(stream.stopped().await.unwrap().is_some());
    }
    // A block that is not wanted.
    let mut stream = hostile.connection.open_uni().await.unwrap();
    stream.write_all(&header(transfer(1), 9, 4096).encode()).await.unwrap();
    stream.write_all(&[0; 4096]).await.unwrap();
    assert!(matches!(receive.outcome().await, Err(ReceiveError::Protocol(_))));
    let told = Frame::Cancel(transfer(1), Reason::Protocol);
    assert_eq!(hostile.hear().await, told);
    sink.assert_holds(&Pool::source(), BLOCKS);
    passes(&pair, transfer(3)).await;
}

/// A sink with as many places as the semaphore has permits.
struct Places(Arc<Pool>, Arc<Semaphore>);

struct OnePlace(Box<dyn Place>, OwnedSemaphorePermit);

impl BlockSink for Places {
    fn place(self: Arc<Self>, pieces: LayerRun) -> Soon<Box<dyn Place>> {
        Box::pin(async move {
            let place = self.0.clone().place(pieces).await?;
            let permit = self.1.clone().acquire_owned().await.map_err(|_| MemoryLost)?;
            Ok(Box::new(OnePlace(place, permit)) as Box<dyn Place>)
        })
    }
}

impl Place for OnePlace {
    fn write(&mut self, ordinal: u32, piece: &[u8]) {
        self.0.write(ordinal, piece);
    }

    fn apply(self: Box<Self>) -> Soon<()> {
        let Self(place, permit) = *self;
        drop(permit);
        place.apply()
    }
}

#[tokio::test]
async fn who_is_slow_to_send_keeps_no_place_from_others() {
    let pair = Pair::new();
    let (sink, one) = (Pool::sink(), Arc::new(Semaphore::new(1)));
    let room = || Some(Room { held: 0, sink: Arc::new(Places(sink.clone(), one.clone())) });
    let mut slow = Hostile::connect(&pair, "p9").await;
    slow.greet().await;
    let _of_slow = pair.decode.expect(Incoming {
        from: "p9".parse().unwrap(),
        hashes: Vec::new(),
        room: room(),
        ..pair.incoming(transfer(1), 0, &sink)
    });
    slow.say(&Hostile::offer(transfer(1))).await;
    assert!(matches!(slow.hear().await, Frame::Grant(_)));
    let pieces = LayerRun { layer: 0, run: Run { first: 0, count: 2 } };
    let unit = UnitHeader {
        transfer: transfer(1),
        pieces,
        transport: Transport::Quic,
        length: 2 * GEOMETRY.piece_bytes() as u32,
        checksum: 0,
    };
    let mut stream = slow.connection.open_uni().await.unwrap();
    stream.write_all(&unit.encode()).await.unwrap();
    stream.write_all(&[0; 100]).await.unwrap();

    let incoming = Incoming { room: room(), ..pair.incoming(transfer(2), 0, &sink) };
    let receive = pair.decode.expect(incoming);
    let source = Pool::source();
    let send = pair.prefill.send(pair.outgoing(transfer(2), &source));
    ready(&send, 0..GEOMETRY.layers);
    send.finish(first_token());
    assert_eq!(receive.outcome().await, Ok(first_token()));
    sink.assert_holds(&source, 0);
}

#[tokio::test]
async fn units_larger_than_agreed_close_their_connection() {
    let pair = Pair::new();
    let mut hostile = Hostile::connect(&pair, "p9").await;
    hostile.greet().await;
    let sink = Pool::sink();
    let _receive = pair.decode.expect(Incoming {
        from: "p9".parse().unwrap(),
        hashes: Vec::new(),
        ..pair.incoming(transfer(1), 0, &sink)
    });
    hostile.say(&Hostile::offer(transfer(1))).await;
    assert!(matches!(hostile.hear().await, Frame::Grant(_)));
    let unit = UnitHeader {
        transfer: transfer(1),
        pieces: LayerRun { layer: 0, run: Run { first: 0, count: 1 } },
        transport: Transport::Quic,
        length: UNIT_BYTES as u32 + 1,
        checksum: 0,
    };
    let mut stream = hostile.connection.open_uni().await.unwrap();
    stream.write_all(&unit.encode()).await.unwrap();
    assert_eq!(hostile.closed().await, PROTOCOL);
}

#[tokio::test]
async fn a_stream_of_bits_that_are_no_datagram_is_ignored() {
    let pair = Pair::new();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for length in [1, 20, 1200, 9000] {
        let noise: Vec<u8> = (0..length).map(|at| (at * 37 + 0xC3) as u8).collect();
        socket.send_to(&noise, pair.decode.local_addr()).unwrap();
    }
    passes(&pair, transfer(1)).await;
}
