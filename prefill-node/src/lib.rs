//! The prefill node: computes prompts and streams their KV to decode nodes while it does.
//!
//! ```text
//! Prefill command → the engine computes and the endpoint offers the block hashes, at once
//! layer computed  → its blocks leave
//! first token     → to the coordinator, and to the decode node with the end of the transfer
//! all arrived     → Transferred to the coordinator; the job is over
//! ```

use std::sync::{Arc, OnceLock};

use baton_engine::{BlockLease, EngineEvent, Kind, Submission};
use baton_kvtransfer::{BlockSource, FirstToken, Outgoing, Reason, SendError, SendHandle, Sent};
use baton_node::hub::{Event, Input, JobKind, Refusal};
use baton_node::node::Node;
use baton_node::streams::StreamId;
use baton_proto::ids::TransferId;
use baton_proto::message::{Job, NodeEvent, Peer, Retry, TokenEvent};
use bytes::Bytes;

/// A job's transfer and the blocks that it sends.
pub struct Sending {
    transfer: Arc<SendHandle>,
    source: Arc<LateSource>,
}

/// How a transfer ends.
pub type Outcome = Result<Sent, SendError>;

/// The blocks of a job, once the engine has admitted it: offering them needs only their hashes.
#[derive(Default)]
struct LateSource(OnceLock<Arc<BlockLease>>);

impl BlockSource for LateSource {
    fn piece(&self, layer: u32, ordinal: u32) -> Bytes {
        let lease = self.0.get().expect("a piece is ready only after its job was admitted");
        Bytes::from_owner(lease.piece(layer as usize, ordinal as usize))
    }
}

/// Serves `node` until it has drained.
pub async fn serve(node: &mut Node<Sending, Outcome>) {
    let mut prefill = Prefill { node };
    while let Some(input) = prefill.node.hub.next().await {
        prefill.handle(input);
    }
}

struct Prefill<'a> {
    node: &'a mut Node<Sending, Outcome>,
}

impl Prefill<'_> {
    fn handle(&mut self, input: Input<Sending, Outcome>) {
        match input {
            Input::Begin { stream, job, kind: JobKind::Prefill(decode) } => {
                self.begin(stream, *job, decode);
            }
            Input::Begin { stream, job, kind: JobKind::Decode(_) } => {
                let refusal = Refusal::new("this is a prefill node", Retry::OtherNode);
                self.node.hub.refuse(stream, job.id, refusal);
            }
            Input::Cancelled { id, job } => {
                job.transfer.cancel();
                self.node.engine.cancel(id);
            }
            Input::Engine(event) => self.engine_event(event),
            Input::Transfer { id, outcome: Ok(sent) } => self.transferred(id, sent),
            Input::Transfer { id, outcome: Err(error) } => self.transfer_failed(id, &error),
        }
    }

    fn begin(&mut self, stream: StreamId, job: Job, decode: Peer) {
        let hello = &self.node.hello;
        let (id, geometry) = (job.id, hello.geometry);
        let source = Arc::new(LateSource::default());
        let outgoing = Outgoing {
            transfer: id,
            peer: decode,
            root: hello.root,
            geometry,
            hashes: hello.root.chain(job.salt, &job.tokens, geometry.block_tokens as usize),
            blocks: geometry.blocks_for(job.tokens.len()) as u32,
            source: source.clone(),
        };
        if let Err(error) =
            self.node.engine.submit(Submission { job, kind: Kind::Export, held: false })
        {
            return self.node.hub.refuse(stream, id, Refusal::new(&error, error.retry()));
        }
        let transfer = Arc::new(self.node.endpoint.send(outgoing));
        self.node.hub.begin(stream, id, Sending { transfer: transfer.clone(), source });
        let events = self.node.events.clone();
        tokio::spawn(async move {
            let outcome = transfer.outcome().await;
            // Without a hub the process is ending.
            let _ = events.send(Event::Transfer { id, outcome }).await;
        });
    }

    fn engine_event(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Admitted { id, lease, cached_tokens, queued } => {
                self.node.hub.tell(id, NodeEvent::Started { id, cached_tokens, queued });
                if let Some(lease) = lease {
                    self.admitted(id, lease);
                }
            }
            EngineEvent::KvReady { id, layer, blocks } => {
                if let Some(job) = self.node.hub.job(id) {
                    job.transfer.ready(layer as u32, blocks.start as u32..blocks.end as u32);
                }
            }
            EngineEvent::Tokens(tokens) => self.first_tokens(tokens),
            EngineEvent::PromptLogprobs { id, tokens } => {
                self.node.hub.tell(id, NodeEvent::PromptLogprobs { id, tokens });
            }
            EngineEvent::Failed { id, reason, retry } => {
                if let Some(job) = self.node.hub.fail(id, Refusal { reason, retry }) {
                    job.transfer.cancel();
                }
            }
            // The transfer outlives the sequence, and its end is the job's.
            EngineEvent::Ended { .. } => {}
            // The hub keeps these.
            EngineEvent::CacheChanged { .. } | EngineEvent::Snapshot(_) => {}
        }
    }

    fn admitted(&mut self, id: TransferId, lease: Arc<BlockLease>) {
        let Some(job) = self.node.hub.job(id) else {
            return;
        };
        let cached = 0..lease.ready_blocks() as u32;
        if job.source.0.set(lease).is_err() {
            tracing::error!(%id, "admitted twice");
            return;
        }
        if !cached.is_empty() {
            for layer in 0..self.node.hello.geometry.layers {
                job.transfer.ready(layer, cached.clone());
            }
        }
    }

    /// To the client first: the decode node's copy waits for the rest of the KV anyway.
    fn first_tokens(&mut self, tokens: Vec<TokenEvent>) {
        self.node.hub.tell_tokens(tokens.clone());
        for TokenEvent { id, token, logprobs, finish, .. } in tokens {
            if let Some(job) = self.node.hub.job(id) {
                job.transfer.finish(FirstToken { token, logprobs, finish });
            }
        }
    }

    fn transferred(&mut self, id: TransferId, sent: Sent) {
        let Sent { hidden, exposed, bytes, blocks } = sent;
        self.node.hub.tell(id, NodeEvent::Transferred { id, hidden, exposed, bytes, blocks });
        self.node.hub.end(id);
    }

    fn transfer_failed(&mut self, id: TransferId, error: &SendError) {
        // Whose job was cancelled is not waiting for it; so the other end gave up, not the client.
        let retry = match error {
            SendError::Cancelled | SendError::Refused(Reason::Cancelled) => Retry::OtherNode,
            error => error.retry(),
        };
        if self.node.hub.fail(id, Refusal::new(error, retry)).is_some() {
            self.node.engine.cancel(id);
        }
    }
}
