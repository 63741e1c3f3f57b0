//! A trace served by a whole cluster: the same figures as a replay, from the real machines.

use std::time::Duration;

use baton_coordinator::control::Options;
use baton_coordinator::requests::Limits as RequestLimits;
use baton_engine::EngineInfo;
use baton_engine::scheduler::Limits;
use baton_kvtransfer::Timing;
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::ModelRoot;
use baton_proto::ids::Role;
use baton_proto::sampling::SamplingParams;

use super::client::{Client, Plan, Question};
use super::log::{Log, Logging};
use super::memory::{HIDDEN_SIZE, Oracle, made_up_tokens};
use super::net::{Net, Quality};
use super::node::NodeSpec;
use super::{Device, Meddling, World};
use crate::replay::{Outcome, Record, Settings};
use crate::trace::{Request, Trace};

/// Layers of the modelled model: KV leaves in as many parts.
const LAYERS: u32 = 4;
/// KV heads of the modelled model.
const KV_HEADS: u32 = 8;
/// One way between two machines of a data centre.
const LATENCY: Duration = Duration::from_micros(100);
/// Token ids are below this.
const VOCAB: u32 = 128_000;
/// For the nodes to join before the first request comes.
const WARM_UP: Duration = Duration::from_secs(1);
/// With the last request served, nothing of the trace may last longer than this.
const MOST_TIME: Duration = Duration::from_secs(14 * 24 * 3600);
/// Speed of links of which none is given.
const FAST_GBPS: f64 = 1e6;

/// A cluster that cannot serve the trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Without decode nodes nothing is generated.
    #[error("a whole cluster needs at least one decode node")]
    NoDecodeNode,
    /// Nodes are as fast as they should be, and requests wait as long as it takes.
    #[error("a whole cluster plays neither deadlines nor disturbances")]
    Disturbed,
    /// A request that no node has room for.
    #[error("request {request} has {tokens} tokens, and a node has room for {room}")]
    NoRoom {
        /// Its number in the trace, from 0.
        request: usize,
        /// Prompt and answer.
        tokens: usize,
        /// Tokens of a node's KV cache.
        room: usize,
    },
}

/// Serves `trace` with every real machine. Prompts are made of the trace's block names; every
/// answer is compared with what a sequence without a cluster gives.
///
/// # Panics
/// If an answer is wrong, or a machine contradicts itself.
pub fn replay_trace(settings: &Settings, trace: &Trace) -> Result<Outcome, TraceError> {
    if settings.decode_nodes == 0 {
        return Err(TraceError::NoDecodeNode);
    }
    if settings.deadline_ms.is_some() || settings.disturbance.is_any() {
        return Err(TraceError::Disturbed);
    }
    let room = settings.cache_blocks * trace.block_tokens as usize;
    for (request, asked) in trace.requests.iter().enumerate() {
        let tokens = asked.input_tokens as usize + asked.output_tokens as usize;
        if tokens > room {
            return Err(TraceError::NoRoom { request, tokens, room });
        }
    }
    let mut world = world(settings, trace.block_tokens, room);
    let start = world.net.now() + WARM_UP;
    let mut coming = trace.requests.iter().peekable();
    while coming.peek().is_some() || world.open > 0 {
        // Not all prompts at once: together they are far larger than the cluster's own state.
        let soon = world.net.now() + WARM_UP;
        let at = |asked: &&Request| start + Duration::from_secs_f64(asked.arrival_ms / 1e3);
        while let Some(asked) = coming.next_if(|asked| at(asked) <= soon) {
            let oracle = Oracle::new(LAYERS as usize, trace.block_tokens as usize, VOCAB);
            let question = question(asked, trace.block_tokens);
            world.add_client(at(&asked), Client::new(question, oracle, room, at(&asked)));
        }
        assert!(world.net.timeline.elapsed() < MOST_TIME, "not done in time: {}", world.left());
        assert!(world.step(), "nothing is to come: {}", world.left());
    }
    let token_bytes = geometry(settings, trace.block_tokens).token_bytes() as u64;
    let pairs = world.clients.iter().zip(&trace.requests);
    let records = pairs
        .map(|(client, asked)| record(client, asked.arrival_ms, trace.block_tokens, token_bytes));
    Ok(Outcome { records: records.collect() })
}

fn record(client: &Client, arrival_ms: f64, block_tokens: u32, token_bytes: u64) -> Record {
    let ms = |since: Option<Duration>| Some(arrival_ms + since?.as_secs_f64() * 1e3);
    let summary = client.summary.as_ref().expect("every request of a trace is served");
    // The last block travels whole.
    let moved = (summary.timings.transfer_bytes / token_bytes) as u32;
    let cached_tokens = summary.usage.cached_tokens;
    Record {
        arrival_ms,
        refused: false,
        remote: summary.placement.prefill.is_some(),
        cached_blocks: cached_tokens / block_tokens,
        cached_tokens,
        pulled_tokens: client.pulled_tokens.min(cached_tokens),
        moved_tokens: moved.min(summary.usage.prompt_tokens),
        first_token_ms: ms(client.first_token),
        end_ms: ms(client.last_token),
    }
}

fn geometry(settings: &Settings, block_tokens: u32) -> KvGeometry {
    let bytes = settings.link.map_or(f64::from(1 << 17), |link| link.bytes_per_token);
    let dtype = KvDtype::Bf16;
    let one = 2 * LAYERS * KV_HEADS * dtype.bytes() as u32;
    let head_dim = ((bytes / f64::from(one)).round() as u32).max(1);
    KvGeometry { layers: LAYERS, kv_heads: KV_HEADS, head_dim, dtype, block_tokens }
}

fn world(settings: &Settings, block_tokens: u32, room: usize) -> World {
    let geometry = geometry(settings, block_tokens);
    let gbps = settings.link.map_or(FAST_GBPS, |link| link.gbps);
    let quality = Quality {
        latency: LATENCY,
        jitter: Duration::ZERO,
        bytes_per_second: gbps * 1e9 / 8.0,
        damage: 0.0,
        neighbours: false,
        copy: Duration::ZERO,
        unreadable: 0.0,
    };
    let (kv_blocks, vocab_size) = (settings.cache_blocks, VOCAB as usize);
    let info = EngineInfo {
        root: ModelRoot::new(&[7; 32], &geometry),
        geometry,
        vocab_size,
        hidden_size: HIDDEN_SIZE,
        max_model_len: room,
        kv_blocks,
    };
    let limits = Limits {
        block_tokens: block_tokens as usize,
        kv_blocks,
        max_batch_tokens: 8192,
        max_sequences: 1024,
        max_model_len: room,
        vocab_size,
    };
    let spec = |role| NodeSpec {
        role,
        info,
        limits: limits.clone(),
        max_waiting: 2048,
        device: Device { prefill: settings.prefill_cost, decode: settings.decode_cost },
        timing: Timing::default(),
        report: Duration::from_secs_f64(settings.report_ms / 1e3),
        watched: false,
    };
    let roles = std::iter::repeat_n(Role::Prefill, settings.prefill_nodes)
        .chain(std::iter::repeat_n(Role::Decode, settings.decode_nodes));
    let options = Options {
        limits: RequestLimits { requests: 1 << 20, tokens: usize::MAX },
        index_blocks: 1 << 22,
        placement: Default::default(),
    };
    let net = Net::new(settings.seed, quality, Log::new(Logging::Off));
    let mut world = World::new(net, roles.map(spec).collect(), vec![options], Meddling::default());
    world.forgets = true;
    world
}

fn question(asked: &Request, block_tokens: u32) -> Question {
    let mut left = asked.input_tokens as usize;
    let mut prompt = Vec::with_capacity(left);
    for &name in &asked.blocks {
        let count = left.min(block_tokens as usize);
        prompt.extend(made_up_tokens(u64::from(name), count, VOCAB));
        left -= count;
    }
    // What nobody shares begins with the time of its arrival.
    prompt.extend(made_up_tokens(asked.arrival_ms.to_bits(), left, VOCAB));
    let sampling = SamplingParams { max_tokens: asked.output_tokens, ..SamplingParams::default() };
    let (standing, embed, deadline) = Default::default();
    Question { prompt, sampling, embed, standing, deadline, plan: Plan::Stay }
}
