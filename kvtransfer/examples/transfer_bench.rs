//! How fast blocks move between two endpoints on loopback, encrypted and verified, beside what
//! a plain copy and a plain blocking TCP stream do in the same run.
//!
//! ```text
//! cargo run --release -p baton-kvtransfer --example transfer_bench [MIB] [REPEATS]
//! ```

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use baton_identity::{ClusterCa, Identity, Part};
use baton_kvtransfer::frame::LayerRun;
use baton_kvtransfer::{
    BlockSink, BlockSource, Endpoint, FirstToken, Incoming, Outgoing, Place, ReceiveHandle, Room,
    SendHandle, Soon, Timing, at_hand,
};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::ModelRoot;
use baton_proto::ids::{Epoch, NodeId, RequestId, TransferId};
use baton_proto::message::Peer;
use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};

const LAYERS: u32 = 8;
const EPOCH: Epoch = Epoch(1);
const LOOPBACK: &str = "127.0.0.1:0";

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse());
    let (mib, repeats): (usize, usize) = (number(256)?, number(5)?);
    let nodes = Nodes::start()?;
    println!("{mib} MiB at a time, median of {repeats}, GB/s");
    println!("piece       memcpy      TCP  transfer  of memcpy   of TCP");
    for kib in [64, 256, 1024] {
        let memory = Memory::new(mib << 20, kib << 10);
        let speed = |run: &dyn Fn() -> Result<Duration, Failure>| {
            let times: Result<Vec<_>, _> = (0..repeats).map(|_| run()).collect();
            let mut times = times?;
            times.sort();
            let seconds = times[times.len() / 2].as_secs_f64();
            Ok::<f64, Failure>((mib << 20) as f64 / seconds / 1e9)
        };
        let copy = speed(&|| Ok(memory.copy()))?;
        let tcp = speed(&|| memory.over_tcp())?;
        let transfer = speed(&|| nodes.transfer(&memory))?;
        println!(
            "{kib:>4} KiB  {copy:>8.2} {tcp:>8.2}  {transfer:>8.2}  {:>7.0} %  {:>5.0} %",
            100.0 * transfer / copy,
            100.0 * transfer / tcp,
        );
    }
    Ok(())
}

/// A source in one stretch, and a sink of single pieces.
#[derive(Clone)]
struct Memory {
    source: Bytes,
    sink: Arc<Vec<Mutex<Vec<u8>>>>,
    piece: usize,
}

impl Memory {
    fn new(bytes: usize, piece: usize) -> Self {
        let source: Vec<u8> = (0..bytes).map(|at| (at * 7 + at / 4096) as u8).collect();
        let sink = (0..bytes / piece).map(|_| Mutex::new(vec![1; piece]));
        Self { source: source.into(), sink: Arc::new(sink.collect()), piece }
    }

    fn write(&self, index: usize, piece: &[u8]) {
        self.sink[index].lock().expect("no panics").copy_from_slice(piece);
    }

    fn blocks(&self) -> u32 {
        self.sink.len() as u32 / LAYERS
    }

    fn index(&self, layer: u32, ordinal: u32) -> usize {
        (layer * self.blocks() + ordinal) as usize
    }

    fn copy(&self) -> Duration {
        let start = Instant::now();
        for (index, part) in self.source.chunks(self.piece).enumerate() {
            self.write(index, part);
        }
        start.elapsed()
    }

    fn over_tcp(&self) -> Result<Duration, Failure> {
        let listener = TcpListener::bind(LOOPBACK)?;
        let address = listener.local_addr()?;
        let (source, piece) = (self.source.clone(), self.piece);
        let writer = std::thread::spawn(move || -> std::io::Result<()> {
            let mut stream = TcpStream::connect(address)?;
            let mut parts = source.chunks(piece);
            parts.try_for_each(|part| stream.write_all(part))
        });
        let (mut stream, _) = listener.accept()?;
        let start = Instant::now();
        for piece in &*self.sink {
            stream.read_exact(&mut piece.lock().expect("no panics"))?;
        }
        let took = start.elapsed();
        writer.join().expect("no panics")?;
        Ok(took)
    }

    fn holds_source(&self) -> bool {
        let mut parts = self.source.chunks(self.piece).zip(&*self.sink);
        parts.all(|(part, piece)| *piece.lock().expect("no panics") == part)
    }
}

impl BlockSource for Memory {
    fn read(&self, LayerRun { layer, run }: LayerRun) -> Soon<Vec<Bytes>> {
        let piece = |ordinal| {
            let start = self.index(layer, ordinal) * self.piece;
            self.source.slice(start..start + self.piece)
        };
        at_hand(run.range().map(piece).collect())
    }
}

impl BlockSink for Memory {
    fn place(self: Arc<Self>, LayerRun { layer, .. }: LayerRun) -> Soon<Box<dyn Place>> {
        at_hand(Box::new(InPlace { memory: self, layer }))
    }
}

struct InPlace {
    memory: Arc<Memory>,
    layer: u32,
}

impl Place for InPlace {
    fn write(&mut self, ordinal: u32, piece: &[u8]) {
        self.memory.write(self.memory.index(self.layer, ordinal), piece);
    }

    fn apply(self: Box<Self>) -> Soon<()> {
        at_hand(())
    }
}

/// A sending and a receiving node, each on a thread of its own.
struct Nodes {
    from: Endpoint,
    to: Endpoint,
    runtime: Runtime,
    transfers: AtomicU32,
}

impl Nodes {
    fn start() -> Result<Self, Failure> {
        let dir = tempfile::tempdir()?;
        let ca = ClusterCa::create(&dir.path().join("ca"))?;
        let node = |name: &str| -> Result<Endpoint, Failure> {
            let path = dir.path().join(name);
            ca.issue(Part::Node, &name.parse()?, &[], &path)?;
            Ok(endpoint(Identity::load(&path)?))
        };
        Ok(Self {
            from: node("p0")?,
            to: node("d0")?,
            runtime: Builder::new_current_thread().build()?,
            transfers: AtomicU32::new(0),
        })
    }

    fn transfer(&self, memory: &Memory) -> Result<Duration, Failure> {
        memory.sink.iter().for_each(|piece| piece.lock().expect("no panics").fill(1));
        let start = Instant::now();
        let (receive, send) = self.begin(memory);
        for layer in 0..LAYERS {
            send.ready(layer, 0..memory.blocks());
        }
        send.finish(FirstToken { token: 0, logprobs: None, finish: None });
        self.runtime.block_on(async {
            send.outcome().await?;
            receive.outcome().await?;
            Ok::<(), Failure>(())
        })?;
        let took = start.elapsed();
        assert!(memory.holds_source(), "what arrived is what was sent");
        Ok(took)
    }

    fn begin(&self, memory: &Memory) -> (ReceiveHandle, SendHandle) {
        let transfer = TransferId {
            request: RequestId(1),
            attempt: self.transfers.fetch_add(1, Ordering::Relaxed),
        };
        let geometry = KvGeometry {
            layers: LAYERS,
            kv_heads: 8,
            head_dim: 64,
            dtype: KvDtype::Bf16,
            block_tokens: memory.piece as u32 / 2048,
        };
        let (root, blocks) = (ModelRoot([1; 16]), memory.blocks());
        let receive = self.to.expect(Incoming {
            transfer,
            from: name("p0"),
            epoch: EPOCH,
            root,
            geometry,
            hashes: Vec::new(),
            blocks,
            room: Some(Room { held: 0, sink: Arc::new(memory.clone()) }),
            lease: Duration::from_secs(30),
        });
        let send = self.from.send(Outgoing {
            transfer,
            peer: Peer {
                node: name("d0"),
                epoch: EPOCH,
                kv_address: self.to.local_addr().to_string(),
            },
            root,
            geometry,
            hashes: Vec::new(),
            blocks,
            source: Arc::new(memory.clone()),
        });
        (receive, send)
    }
}

fn name(text: &str) -> NodeId {
    text.parse().expect("a node name")
}

/// An endpoint with a single-threaded runtime, as beside the thread of a device.
fn endpoint(identity: Identity) -> Endpoint {
    let (tell, endpoint) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let listen = LOOPBACK.parse().expect("an address");
            let bound = Endpoint::bind(listen, &identity, EPOCH, Timing::default());
            let _ = tell.send(bound.expect("a free port"));
            std::future::pending::<()>().await;
        });
    });
    endpoint.recv().expect("the endpoint has started")
}
