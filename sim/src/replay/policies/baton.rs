//! The coordinator's own placement, told what it would hear from real nodes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_coordinator::core::ModelInfo;
use baton_coordinator::index::{Index, Tier};
use baton_coordinator::placement::{LocalPrefill, Options, Placement, Standing, Turn};
use baton_coordinator::requests::{Answer, Placed, Placer, Wanted};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, RequestId, Role, TransferId};
use baton_proto::message::{BlockCounts, Hello, Peer, Report};

use super::{Admission, Cluster, Decision, Dispatch, Policy};
use crate::origin::origin;
use crate::replay::{Changes, Link, News, Node};

/// Blocks in the index, more than any modelled cluster holds.
const INDEX_BLOCKS: usize = 1 << 24;
/// Bytes of KV per token where no link is modelled: nothing is worth moving or saving.
const NO_LINK_BYTES: f64 = 4.0;

/// See the module's description.
pub(super) struct Baton {
    state: Option<State>,
    ready: VecDeque<Decision>,
}

struct State {
    placement: Placement,
    origin: Instant,
    model: ModelInfo,
    /// Names of nodes, and back.
    names: BTreeMap<Node, NodeId>,
    nodes: BTreeMap<NodeId, Node>,
    capacity: u64,
    /// Cache events heard of each node.
    heard: BTreeMap<Node, u64>,
    running: BTreeMap<usize, Running>,
}

/// A request that was dispatched.
#[derive(Clone, Copy)]
struct Running {
    prefill: Option<Node>,
    decode: Node,
    output: u32,
    prefilled_ms: Option<f64>,
    landed: bool,
    prefill_ended: bool,
}

impl Baton {
    pub(super) fn new() -> Self {
        Self { state: None, ready: VecDeque::new() }
    }
}

impl Policy for Baton {
    fn arrive(&mut self, now_ms: f64, request: usize, cluster: &Cluster<'_>) -> Admission {
        let state = self.state.get_or_insert_with(|| State::new(cluster));
        match state.place(now_ms, request, true, cluster) {
            Answer::Go(placed) => {
                self.ready.push_back(state.dispatch(request, &placed, cluster));
                Admission::Taken
            }
            Answer::Held(_) => Admission::Taken,
            Answer::NoNodes(_) | Answer::TooLate { .. } => Admission::Refused,
        }
    }

    fn next(&mut self, now_ms: f64, cluster: &Cluster<'_>) -> Option<Decision> {
        if let Some(ready) = self.ready.pop_front() {
            return Some(ready);
        }
        let state = self.state.as_mut()?;
        loop {
            match state.placement.next(state.at(now_ms))? {
                Turn::Go(id, placed) => {
                    return Some(state.dispatch(id.0 as usize, &placed, cluster));
                }
                Turn::Again(id) => {
                    let request = id.0 as usize;
                    match state.place(now_ms, request, false, cluster) {
                        Answer::Go(placed) => {
                            return Some(state.dispatch(request, &placed, cluster));
                        }
                        Answer::Held(_) => {}
                        Answer::NoNodes(_) | Answer::TooLate { .. } => {
                            return Some(Decision::Refuse(request));
                        }
                    }
                }
            }
        }
    }

    fn heard(&mut self, now_ms: f64, node: Node, news: &News) {
        if let Some(state) = &mut self.state {
            state.heard(now_ms, node, news);
        }
    }

    fn wake(&self) -> Option<f64> {
        let state = self.state.as_ref()?;
        let at = state.placement.poll_timeout()?;
        Some(at.saturating_duration_since(state.origin).as_secs_f64() * 1000.0)
    }
}

impl State {
    fn new(cluster: &Cluster<'_>) -> Self {
        let settings = cluster.settings();
        let bytes =
            settings.link.map_or(NO_LINK_BYTES, |Link { bytes_per_token, .. }| bytes_per_token);
        let block_tokens = cluster.block_tokens();
        // One layer of one head with 2-byte elements, for keys and values.
        let head_dim = (bytes / 4.0).round().max(1.0) as u32;
        let geometry =
            KvGeometry { layers: 1, kv_heads: 1, head_dim, dtype: KvDtype::Bf16, block_tokens };
        let root = ModelRoot::new(&[0; 32], &geometry);
        let model = ModelInfo {
            name: "modelled".to_owned(),
            root,
            geometry,
            max_model_len: u32::MAX,
            vocab_size: 1,
            hidden_size: 4,
        };
        // Without decode nodes an ideal one stands for them.
        let ideal = settings.decode_nodes == 0;
        let local_prefill = if ideal { LocalPrefill::Never } else { LocalPrefill::Auto };
        let origin = origin();
        let pulls = settings.link.is_some();
        let options = Options { local_prefill, pulls, most_wait: None };
        let mut state = Self {
            placement: Placement::new(Index::new(INDEX_BLOCKS), options, origin),
            origin,
            model,
            names: BTreeMap::new(),
            nodes: BTreeMap::new(),
            capacity: settings.cache_blocks as u64,
            heard: BTreeMap::new(),
            running: BTreeMap::new(),
        };
        cluster.nodes().for_each(|node| state.join(node, settings.cache_blocks as u64));
        if ideal {
            state.join(Node::Decode(0), u64::from(u32::MAX));
        }
        state
    }

    fn join(&mut self, node: Node, total_blocks: u64) {
        let (role, number) = match node {
            Node::Prefill(at) => (Role::Prefill, at),
            Node::Decode(at) => (Role::Decode, at),
        };
        // Padded, so that names are in the order of numbers.
        let name = format!("{}-{number:06}", role.as_str());
        let name: NodeId = name.parse().expect("letters, digits and a dash make a name");
        let hello = Hello {
            role,
            epoch: Epoch(1),
            model: self.model.name.clone(),
            root: self.model.root,
            geometry: self.model.geometry,
            max_model_len: u32::MAX,
            vocab_size: 1,
            hidden_size: 4,
            total_blocks,
            kv_address: name.to_string(),
            transports: Vec::new(),
            price: 1.0,
        };
        self.placement.join(&name, &hello, self.origin);
        if let Some(key) = self.placement.key(&name) {
            self.placement.index.snapshot(key, 0, Tier::Device, &[], true);
        }
        self.names.insert(node, name.clone());
        self.nodes.insert(name, node);
    }

    fn at(&self, now_ms: f64) -> Instant {
        self.origin + Duration::from_secs_f64(now_ms / 1000.0)
    }

    fn place(
        &mut self,
        now_ms: f64,
        request: usize,
        arrives: bool,
        cluster: &Cluster<'_>,
    ) -> Answer {
        let (now, asked) = (self.at(now_ms), cluster.request(request));
        let chain = Arc::new(hashes(cluster.full_blocks(request)));
        let deadline = cluster.settings().deadline_ms.map(|ms| asked.arrival_ms + ms);
        let wanted = Wanted {
            id: id(request),
            model: &self.model,
            tokens: asked.input_tokens as usize,
            longest: u32::MAX as usize,
            embeds: false,
            chain: &chain,
            avoid: &[],
            standing: Standing::default(),
            arrived: self.at(asked.arrival_ms),
            deadline: deadline.map(|at| self.at(at)),
            arrives,
        };
        self.placement.place(&wanted, now)
    }

    fn dispatch(&mut self, request: usize, placed: &Placed, cluster: &Cluster<'_>) -> Decision {
        let named = |peer: &Peer| self.nodes[&peer.node];
        let prefill = placed.prefill.as_ref().map(named);
        let decode = named(&placed.decode);
        let number = |node: Node| match node {
            Node::Prefill(at) | Node::Decode(at) => at,
        };
        let block_tokens = cluster.block_tokens() as usize;
        let pull = placed.pull.as_ref();
        let output = cluster.request(request).output_tokens;
        let running = Running {
            prefill,
            decode,
            output,
            prefilled_ms: None,
            landed: false,
            prefill_ended: prefill.is_none(),
        };
        self.running.insert(request, running);
        Decision::Dispatch(Dispatch {
            request,
            prefill: prefill.map(number),
            decode: (cluster.settings().decode_nodes > 0).then(|| number(decode)),
            pull: pull.map(|(peer, tokens)| (named(peer), tokens / block_tokens)),
        })
    }

    fn heard(&mut self, now_ms: f64, node: Node, news: &News) {
        match *news {
            News::PrefillDone { request, cached_tokens, service_ms } => {
                self.prefilled(now_ms, node, request, cached_tokens, service_ms);
            }
            News::Transferred { request, tokens, ms, .. } => {
                self.transferred(now_ms, node, request, tokens, ms);
            }
            News::Ended { request } => self.ended(now_ms, request),
            News::Cache(ref changes) => self.cache_changed(node, changes),
            News::Report { queued_tokens, sequences, kv_tokens: _, step_ms, active_blocks } => {
                let active = active_blocks as u64;
                let free = self.capacity.saturating_sub(active);
                let report = Report {
                    role: if matches!(node, Node::Prefill(_)) {
                        Role::Prefill
                    } else {
                        Role::Decode
                    },
                    running: sequences as u32,
                    queued_tokens,
                    blocks: BlockCounts { free, active, ..BlockCounts::default() },
                    decode_step_ms: step_ms,
                    ..Report::default()
                };
                let at = self.at(now_ms);
                self.placement.report(&self.names[&node], &report, true, at);
            }
        }
    }

    fn prefilled(&mut self, now_ms: f64, node: Node, request: usize, cached: u32, ms: f64) {
        let (at, took) = (self.at(now_ms), Duration::from_secs_f64(ms / 1000.0));
        let name = &self.names[&node];
        self.placement.started(name, id(request), cached as usize);
        self.placement.prefilled(name, id(request), took, at);
        if let Some(running) = self.running.get_mut(&request) {
            running.prefilled_ms = Some(now_ms);
            if running.landed {
                self.end_prefill(now_ms, request);
            }
        }
    }

    fn transferred(&mut self, now_ms: f64, to: Node, request: usize, tokens: u32, ms: f64) {
        let Some(running) = self.running.get_mut(&request) else { return };
        if matches!(to, Node::Prefill(_)) || running.prefill.is_none() {
            let took = Duration::from_secs_f64(ms / 1000.0);
            return self.placement.pulled(id(request), tokens as usize, took, self.at(now_ms));
        }
        // A hand-over that is done before the prefill exposes nothing.
        running.landed = true;
        let prefilled_ms = running.prefilled_ms;
        let exposed_ms = prefilled_ms.map_or(0.0, |at| (now_ms - at).max(0.0));
        let exposed = Duration::from_secs_f64(exposed_ms / 1000.0);
        let bytes = u64::from(tokens) * self.model.geometry.token_bytes() as u64;
        self.placement.handed_over(id(request), exposed, bytes, self.at(now_ms));
        if prefilled_ms.is_some() {
            self.end_prefill(now_ms, request);
        }
    }

    fn end_prefill(&mut self, now_ms: f64, request: usize) {
        let at = self.at(now_ms);
        let Some(running) = self.running.get_mut(&request) else { return };
        if !std::mem::replace(&mut running.prefill_ended, true)
            && let Some(prefill) = running.prefill
        {
            self.placement.ended(&self.names[&prefill], id(request), at);
        }
    }

    fn ended(&mut self, now_ms: f64, request: usize) {
        self.end_prefill(now_ms, request);
        let Some(running) = self.running.remove(&request) else { return };
        let at = self.at(now_ms);
        self.placement.ended(&self.names[&running.decode], id(request), at);
        let by = &self.names[&running.decode];
        self.placement.answered(by, self.model.root, running.output as usize, at);
    }

    fn cache_changed(&mut self, node: Node, changes: &Changes) {
        let sequence = self.heard.entry(node).or_default();
        *sequence += 1;
        let (stored, evicted) = (hashes(&changes.stored), hashes(&changes.evicted));
        if let Some(key) = self.placement.key(&self.names[&node]) {
            // Events come in order here, so no snapshot is ever needed.
            let _ = self.placement.index.event(key, *sequence, Tier::Device, &stored, &evicted);
        }
    }
}

fn id(request: usize) -> TransferId {
    TransferId { request: RequestId(request as u128), attempt: 1 }
}

/// Hashes for names of blocks, as evenly spread as real ones: the finalizer of SplitMix64.
fn hashes(blocks: &[u32]) -> Vec<BlockHash> {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let hash = |&block: &u32| {
        let z = (u64::from(block) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&mix(z).to_le_bytes());
        bytes[8..].copy_from_slice(&mix(!z).to_le_bytes());
        BlockHash(bytes)
    };
    blocks.iter().map(hash).collect()
}
