//! Two endpoints on loopback, blocks in memory, and a path between them that can be cut.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_identity::{ClusterCa, Identity, Part};
use baton_kvtransfer::frame::LayerRun;
use baton_kvtransfer::{
    BlockSink, BlockSource, Endpoint, FirstToken, Incoming, Outgoing, Place, Room, Soon, Timing,
    at_hand,
};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{CacheSalt, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, RequestId, TransferId};
use baton_proto::message::{Logprobs, NodeFinish, Peer};
use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::watch;

pub const GEOMETRY: KvGeometry =
    KvGeometry { layers: 3, kv_heads: 2, head_dim: 32, dtype: KvDtype::Bf16, block_tokens: 16 };
pub const BLOCKS: u32 = 20;
/// The epochs of the two nodes of a [`Pair`].
pub const EPOCH: Epoch = Epoch(7);

/// Short waits, so that a test of one ends soon; long enough for a busy machine.
pub fn timing() -> Timing {
    Timing {
        lease: Duration::from_secs(5),
        idle: Duration::from_millis(600),
        reconnect: Duration::from_secs(20),
        channel: Duration::from_millis(50),
        ..Timing::default()
    }
}

pub struct Ca(ClusterCa, tempfile::TempDir);

impl Ca {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self(ClusterCa::create(&dir.path().join("ca")).unwrap(), dir)
    }

    pub fn node(&self, name: &str) -> Identity {
        self.identity(Part::Node, name)
    }

    pub fn coordinator(&self, name: &str) -> Identity {
        self.identity(Part::Coordinator, name)
    }

    /// Issued at the first call, the same afterwards.
    fn identity(&self, part: Part, name: &str) -> Identity {
        let dir = self.1.path().join(name);
        let node: NodeId = name.parse().unwrap();
        if !dir.exists() {
            self.0.issue(part, &node, &[], &dir).unwrap();
        }
        Identity::load(&dir).unwrap()
    }
}

pub fn bind(identity: &Identity, epoch: Epoch) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), identity, epoch, timing()).unwrap()
}

/// A sending endpoint `p0` and a receiving endpoint `d0`.
pub struct Pair {
    pub ca: Ca,
    pub prefill: Endpoint,
    pub decode: Endpoint,
}

impl Pair {
    pub fn new() -> Self {
        let ca = Ca::new();
        Self { prefill: bind(&ca.node("p0"), EPOCH), decode: bind(&ca.node("d0"), EPOCH), ca }
    }

    pub fn outgoing(&self, transfer: TransferId, source: &Arc<Pool>) -> Outgoing {
        Outgoing {
            transfer,
            peer: Peer {
                node: "d0".parse().unwrap(),
                epoch: EPOCH,
                kv_address: self.decode.local_addr().to_string(),
            },
            root: root(),
            geometry: GEOMETRY,
            hashes: root().chain(CacheSalt::default(), &tokens(), 16),
            blocks: BLOCKS,
            source: source.clone(),
        }
    }

    pub fn incoming(&self, transfer: TransferId, held: u32, sink: &Arc<Pool>) -> Incoming {
        Incoming {
            transfer,
            from: "p0".parse().unwrap(),
            epoch: EPOCH,
            root: root(),
            geometry: GEOMETRY,
            hashes: root().chain(CacheSalt::default(), &tokens(), 16),
            blocks: BLOCKS,
            room: Some(Room { held, sink: sink.clone() }),
            lease: Duration::from_secs(5),
        }
    }
}

pub fn root() -> ModelRoot {
    ModelRoot([3; 16])
}

/// The last block is partial.
fn tokens() -> Vec<u32> {
    (0..BLOCKS * 16 - 5).collect()
}

pub fn transfer(request: u128) -> TransferId {
    TransferId { request: RequestId(request), attempt: 1 }
}

pub fn first_token() -> FirstToken {
    FirstToken {
        token: 42,
        logprobs: Some(Logprobs { logprob: -0.5, top: vec![(42, -0.5), (7, -1.25)] }),
        finish: Some(NodeFinish::StopToken(42)),
    }
}

/// Blocks in memory; those of a source are filled with bytes that tell piece and offset.
pub struct Pool(Vec<Mutex<Vec<u8>>>);

impl Pool {
    pub fn source() -> Arc<Self> {
        Self::of(|layer, ordinal| {
            let start = layer as usize * 89 + ordinal as usize * 31;
            let byte = |at: usize| (start + at * 7 + at / 256) as u8;
            (0..GEOMETRY.piece_bytes()).map(byte).collect()
        })
    }

    pub fn sink() -> Arc<Self> {
        Self::of(|_, _| vec![0xEE; GEOMETRY.piece_bytes()])
    }

    fn of(piece: impl Fn(u32, u32) -> Vec<u8>) -> Arc<Self> {
        let pieces =
            (0..GEOMETRY.layers * BLOCKS).map(|n| Mutex::new(piece(n / BLOCKS, n % BLOCKS)));
        Arc::new(Self(pieces.collect()))
    }

    pub fn bytes(&self, layer: u32, ordinal: u32) -> Vec<u8> {
        self.at(layer, ordinal).lock().unwrap().clone()
    }

    /// Asserts that blocks `from..` equal those of `other`, and the earlier ones were not touched.
    pub fn assert_holds(&self, other: &Self, from: u32) {
        for layer in 0..GEOMETRY.layers {
            for ordinal in 0..BLOCKS {
                let piece = self.bytes(layer, ordinal);
                if ordinal >= from {
                    assert!(piece == other.bytes(layer, ordinal), "piece {layer}/{ordinal}");
                } else {
                    assert!(piece == vec![0xEE; GEOMETRY.piece_bytes()], "piece {layer}/{ordinal}");
                }
            }
        }
    }

    pub fn write(&self, layer: u32, ordinal: u32, piece: &[u8]) {
        self.at(layer, ordinal).lock().unwrap().copy_from_slice(piece);
    }

    fn at(&self, layer: u32, ordinal: u32) -> &Mutex<Vec<u8>> {
        &self.0[(layer * BLOCKS + ordinal) as usize]
    }
}

impl BlockSource for Pool {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        at_hand(run.range().map(|ordinal| self.bytes(layer, ordinal).into()).collect())
    }
}

impl BlockSink for Pool {
    fn place(self: Arc<Self>, LayerRun { layer, .. }: LayerRun) -> Soon<Box<dyn Place>> {
        at_hand(Box::new(InPlace { pool: self, layer, written: None }))
    }
}

/// One layer of a pool.
struct InPlace {
    pool: Arc<Pool>,
    layer: u32,
    written: Option<Arc<Watched>>,
}

impl Place for InPlace {
    fn write(&mut self, ordinal: u32, piece: &[u8]) {
        self.pool.write(self.layer, ordinal, piece);
        if let Some(watched) = &self.written {
            watched.written.send_modify(|written| *written += piece.len());
        }
    }

    fn apply(self: Box<Self>) -> Soon<()> {
        at_hand(())
    }
}

/// A source whose bytes keep it alive, like those of a real pool, and that can be watched.
pub struct Counted {
    pub pool: Arc<Pool>,
    /// Pieces taken so far.
    pub taken: watch::Sender<usize>,
}

impl Counted {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { pool: Pool::source(), taken: watch::Sender::new(0) })
    }
}

impl Counted {
    /// Waits until so many pieces have been taken.
    pub async fn wait_for(&self, pieces: usize) {
        let mut taken = self.taken.subscribe();
        taken.wait_for(|taken| *taken >= pieces).await.unwrap();
    }
}

/// A sink that can be watched.
pub struct Watched {
    pub pool: Arc<Pool>,
    /// Bytes written so far.
    written: watch::Sender<usize>,
}

impl Watched {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { pool: Pool::sink(), written: watch::Sender::new(0) })
    }

    /// Waits until so many bytes have been written.
    pub async fn wait_for(&self, bytes: usize) {
        let mut written = self.written.subscribe();
        written.wait_for(|written| *written >= bytes).await.unwrap();
    }
}

impl BlockSink for Watched {
    fn place(self: Arc<Self>, LayerRun { layer, .. }: LayerRun) -> Soon<Box<dyn Place>> {
        at_hand(Box::new(InPlace { pool: self.pool.clone(), layer, written: Some(self) }))
    }
}

/// A [`Counted`] source as a transfer sees it.
pub struct Leased(pub Arc<Counted>);

struct Held {
    bytes: Vec<u8>,
    _lease: Arc<Counted>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl BlockSource for Leased {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        self.0.taken.send_modify(|taken| *taken += run.count as usize);
        let held =
            |ordinal| Held { bytes: self.0.pool.bytes(layer, ordinal), _lease: self.0.clone() };
        at_hand(run.range().map(|ordinal| Bytes::from_owner(held(ordinal))).collect())
    }
}

/// Carries datagrams between one client and `target`, until it is cut.
pub struct Path {
    pub address: SocketAddr,
    cut: Arc<AtomicBool>,
    /// Attempts to connect while it was cut.
    dials: watch::Receiver<usize>,
}

impl Path {
    pub async fn new(target: SocketAddr) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        back.connect(target).await.unwrap();
        let client = Arc::new(Mutex::new(None));
        let (dialled, dials) = watch::channel(0);
        let path = Self { address: front.local_addr().unwrap(), cut: Arc::default(), dials };
        let (f, b, c, cut) = (front.clone(), back.clone(), client.clone(), path.cut.clone());
        tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 16];
            while let Ok((length, from)) = f.recv_from(&mut buffer).await {
                *c.lock().unwrap() = Some(from);
                if !cut.load(Ordering::Relaxed) {
                    let _ = b.send(&buffer[..length]).await;
                } else if buffer[0] & 0xF0 == 0xC0 {
                    // RFC 9000, section 17.2.2: an Initial packet.
                    dialled.send_modify(|dials| *dials += 1);
                }
            }
        });
        let cut = path.cut.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length) = back.recv(&mut buffer).await {
                let to = *client.lock().unwrap();
                if let (Some(to), false) = (to, cut.load(Ordering::Relaxed)) {
                    let _ = front.send_to(&buffer[..length], to).await;
                }
            }
        });
        path
    }

    pub fn cut(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    pub fn mend(&self) {
        self.cut.store(false, Ordering::Relaxed);
    }

    /// Waits until somebody tries to connect through the cut path.
    pub async fn wait_for_dial(&self) {
        self.dials.clone().wait_for(|dials| *dials > 0).await.unwrap();
    }
}
