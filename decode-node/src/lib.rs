//! The decode node: takes the KV of prompts from prefill nodes, or computes short prompts itself,
//! and generates tokens.
//!
//! ```text
//! Decode command with a prefill node → the engine reserves blocks, the endpoint expects their KV,
//!                                      and when all of it is verified the sequence runs
//! Decode command without one         → the engine computes the prompt and generates
//! ```

use std::sync::Arc;

use baton_engine::{BlockLease, EngineEvent, Kind, Submission};
use baton_kvtransfer::{
    BlockSink, FirstToken, Incoming, Reason, ReceiveError, ReceiveHandle, Room, Timing,
};
use baton_node::hub::{Event, Input, JobKind, Refusal};
use baton_node::node::Node;
use baton_node::streams::StreamId;
use baton_proto::hash::BlockHash;
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, NodeEvent, Peer, Retry};

/// How far a job is.
pub enum Phase {
    /// In the engine's queue; its KV is to come.
    Reserving(Expected),
    /// Its KV is coming.
    Receiving(Arc<ReceiveHandle>),
    /// The engine has all it needs.
    Running,
}

/// The KV that a job waits for.
pub struct Expected {
    from: Peer,
    hashes: Vec<BlockHash>,
    blocks: u32,
}

/// How a transfer ends.
pub type Outcome = Result<FirstToken, ReceiveError>;

struct LeaseSink(Arc<BlockLease>);

impl BlockSink for LeaseSink {
    fn write(&self, layer: u32, ordinal: u32, offset: usize, bytes: &[u8]) {
        self.0.write(layer as usize, ordinal as usize, offset, bytes);
    }
}

/// Serves `node` until it has drained.
pub async fn serve(node: &mut Node<Phase, Outcome>) {
    let mut decode = Decode { node };
    while let Some(input) = decode.node.hub.next().await {
        decode.handle(input);
    }
}

struct Decode<'a> {
    node: &'a mut Node<Phase, Outcome>,
}

impl Decode<'_> {
    fn handle(&mut self, input: Input<Phase, Outcome>) {
        match input {
            Input::Begin { stream, job, kind: JobKind::Decode(prefill) } => {
                self.begin(stream, *job, prefill);
            }
            Input::Begin { stream, job, kind: JobKind::Prefill(_) } => {
                let refusal = Refusal::new("this is a decode node", Retry::OtherNode);
                self.node.hub.refuse(stream, job.id, refusal);
            }
            Input::Cancelled { id, job } => {
                if let Phase::Receiving(transfer) = job {
                    transfer.cancel();
                }
                self.node.engine.cancel(id);
            }
            Input::Engine(event) => self.engine_event(event),
            Input::Transfer { id, outcome: Ok(first) } => self.received(id, first),
            Input::Transfer { id, outcome: Err(error) } => self.transfer_failed(id, &error),
        }
    }

    fn begin(&mut self, stream: StreamId, job: Job, prefill: Option<Peer>) {
        let id = job.id;
        let (phase, kind) = match prefill {
            None => (Phase::Running, Kind::Local),
            Some(from) => (Phase::Reserving(self.expected(&job, from)), Kind::Import),
        };
        match self.node.engine.submit(Submission { job, kind, held: false }) {
            Ok(()) => self.node.hub.begin(stream, id, phase),
            Err(error) => {
                self.node.hub.refuse(stream, id, Refusal::new(&error, error.retry()));
            }
        }
    }

    fn expected(&self, job: &Job, from: Peer) -> Expected {
        let geometry = self.node.hello.geometry;
        let block_tokens = geometry.block_tokens as usize;
        Expected {
            from,
            hashes: self.node.hello.root.chain(job.salt, &job.tokens, block_tokens),
            blocks: geometry.blocks_for(job.tokens.len()) as u32,
        }
    }

    fn engine_event(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Admitted { id, lease, cached_tokens, queued } => {
                self.node.hub.tell(id, NodeEvent::Started { id, cached_tokens, queued });
                if let Some(lease) = lease {
                    self.receive(id, lease);
                }
            }
            EngineEvent::Tokens(tokens) => self.node.hub.tell_tokens(tokens),
            EngineEvent::PromptLogprobs { id, tokens } => {
                self.node.hub.tell(id, NodeEvent::PromptLogprobs { id, tokens });
            }
            EngineEvent::Failed { id, reason, retry } => {
                let job = self.node.hub.fail(id, Refusal { reason, retry });
                if let Some(Phase::Receiving(transfer)) = job {
                    transfer.cancel();
                }
            }
            // The coordinator knows it from the last token's finish.
            EngineEvent::Ended { id } => {
                self.node.hub.end(id);
            }
            // Only prefill nodes export.
            EngineEvent::KvReady { .. } => {}
            // The hub keeps these.
            EngineEvent::CacheChanged { .. } | EngineEvent::Snapshot(_) => {}
        }
    }

    fn receive(&mut self, id: TransferId, lease: Arc<BlockLease>) {
        let Some(phase) = self.node.hub.job(id) else {
            return;
        };
        let Phase::Reserving(expected) = std::mem::replace(phase, Phase::Running) else {
            tracing::error!(%id, "admitted twice");
            return;
        };
        let incoming = Incoming {
            transfer: id,
            from: expected.from.node,
            epoch: expected.from.epoch,
            root: self.node.hello.root,
            geometry: self.node.hello.geometry,
            hashes: expected.hashes,
            blocks: expected.blocks,
            room: Some(Room { held: lease.held() as u32, sink: Arc::new(LeaseSink(lease)) }),
            lease: Timing::default().lease,
        };
        let transfer = Arc::new(self.node.endpoint.expect(incoming));
        *phase = Phase::Receiving(transfer.clone());
        let events = self.node.events.clone();
        tokio::spawn(async move {
            let outcome = transfer.outcome().await;
            // Without a hub the process is ending.
            let _ = events.send(Event::Transfer { id, outcome }).await;
        });
    }

    /// All KV is in place: the sequence joins the running batch, unless its first token ended it.
    fn received(&mut self, id: TransferId, first: FirstToken) {
        let Some(phase) = self.node.hub.job(id) else {
            return;
        };
        *phase = Phase::Running;
        let FirstToken { token, logprobs, finish } = first;
        self.node.engine.imported(id, baton_engine::FirstToken { token, logprobs, finish });
    }

    fn transfer_failed(&mut self, id: TransferId, error: &ReceiveError) {
        // Whose job was cancelled is not waiting for it; so the other end gave up, not the client.
        let retry = match error {
            ReceiveError::Cancelled | ReceiveError::Ended(Reason::Cancelled) => Retry::OtherNode,
            error => error.retry(),
        };
        if self.node.hub.fail(id, Refusal::new(error, retry)).is_some() {
            self.node.engine.cancel(id);
        }
    }
}
