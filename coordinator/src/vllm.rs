//! What the coordinator counts under vLLM's names, which llm-d's endpoint picker and dashboards made for
//! vLLM read: to them the cluster is one engine for each model, whose name is the label `model_name`.
//! Times are of requests as their clients see them, the KV cache is that of the decode nodes.

use std::time::Duration;

use baton_proto::ids::Role;
use baton_proto::message::NodeFinish;
use metrics::{Counter, Histogram, counter, gauge, histogram};

use crate::control::Load;
use crate::core::{NodeView, Summary, Timings, Update};
use crate::metrics::{FIRST_TOKEN, PER_TOKEN, REQUEST};

const TIME_TO_FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN_LATENCY: &str = "vllm:inter_token_latency_seconds";
const TIME_PER_OUTPUT_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
const END_TO_END: &str = "vllm:e2e_request_latency_seconds";
const QUEUE: &str = "vllm:request_queue_time_seconds";
const PREFILL: &str = "vllm:request_prefill_time_seconds";
const DECODE: &str = "vllm:request_decode_time_seconds";
const INFERENCE: &str = "vllm:request_inference_time_seconds";

/// Histograms and the upper bounds of their buckets, in seconds.
pub(crate) const HISTOGRAMS: [(&str, &[f64]); 8] = [
    (TIME_TO_FIRST_TOKEN, &FIRST_TOKEN),
    (INTER_TOKEN_LATENCY, &PER_TOKEN),
    (TIME_PER_OUTPUT_TOKEN, &PER_TOKEN),
    (END_TO_END, &REQUEST),
    (QUEUE, &FIRST_TOKEN),
    (PREFILL, &FIRST_TOKEN),
    (DECODE, &REQUEST),
    (INFERENCE, &REQUEST),
];

/// What is counted of one model.
#[derive(Debug)]
pub(crate) struct Vllm {
    stop: Counter,
    length: Counter,
    abort: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    first_token: Histogram,
    inter_token: Histogram,
    per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
}

impl Vllm {
    /// Of `model`; everything is shown from now on.
    pub(crate) fn new(model: &str) -> Self {
        let name = || ("model_name", model.to_owned());
        let ended = |reason: &str| {
            let labels = [name(), ("finished_reason", reason.to_owned())];
            counter!("vllm:request_success_total", &labels)
        };
        let times = |what: &'static str| histogram!(what, &[name()]);
        Self {
            stop: ended("stop"),
            length: ended("length"),
            abort: ended("abort"),
            prompt_tokens: counter!("vllm:prompt_tokens_total", &[name()]),
            generation_tokens: counter!("vllm:generation_tokens_total", &[name()]),
            prefix_queries: counter!("vllm:prefix_cache_queries_total", &[name()]),
            prefix_hits: counter!("vllm:prefix_cache_hits_total", &[name()]),
            first_token: times(TIME_TO_FIRST_TOKEN),
            inter_token: times(INTER_TOKEN_LATENCY),
            per_token: times(TIME_PER_OUTPUT_TOKEN),
            end_to_end: times(END_TO_END),
            queue: times(QUEUE),
            prefill: times(PREFILL),
            decode: times(DECODE),
            inference: times(INFERENCE),
        }
    }

    /// News of a request. `gap`: since each of its tokens' previous one, unless these are its first.
    pub(crate) fn update(&self, update: &Update, gap: Option<Duration>) {
        match update {
            Update::Tokens(tokens) => {
                if let Some(gap) = gap {
                    self.inter_token.record_many(gap.as_secs_f64(), tokens.len());
                }
                self.generation_tokens.increment(tokens.len() as u64);
            }
            Update::PromptLogprobs(_) | Update::Embedding(_) => {}
            Update::Done(summary) => self.done(summary),
            Update::Failed(_) => self.abort.increment(1),
        }
    }

    fn done(&self, summary: &Summary) {
        let ended =
            if summary.finish == Some(NodeFinish::Length) { &self.length } else { &self.stop };
        ended.increment(1);
        let usage = summary.usage;
        self.prompt_tokens.increment(usage.prompt_tokens.into());
        self.prefix_queries.increment(usage.prompt_tokens.into());
        self.prefix_hits.increment(usage.cached_tokens.into());
        // An embedding has no tokens.
        if usage.completion_tokens > 0 {
            self.times(&summary.timings, usage.completion_tokens);
        }
    }

    fn times(&self, times: &Timings, output_tokens: u32) {
        let Timings { queue, first_token, total, .. } = *times;
        let decode = total.saturating_sub(first_token);
        // Clocks of several machines may make the queue longer than the whole.
        self.queue.record(queue.min(first_token));
        self.prefill.record(first_token.saturating_sub(queue));
        self.decode.record(decode);
        self.inference.record(total.saturating_sub(queue));
        self.first_token.record(first_token);
        self.end_to_end.record(total);
        if output_tokens > 1 {
            self.per_token.record(decode / (output_tokens - 1));
        }
    }
}

/// What is there now of one model.
pub(crate) fn gauges(model: &str, load: Load, nodes: &[NodeView]) {
    let name = || ("model_name", model.to_owned());
    gauge!("vllm:num_requests_running", &[name()]).set(load.running as f64);
    gauge!("vllm:num_requests_waiting", &[name()]).set(load.waiting as f64);
    let decodes = |node: &&NodeView| node.hello.role == Role::Decode && node.hello.model == model;
    let nodes: Vec<_> = nodes.iter().filter(decodes).collect();
    let blocks: u64 = nodes.iter().map(|node| node.hello.total_blocks).sum();
    let Some(first) = nodes.first().filter(|_| blocks > 0) else { return };
    let used = |node: &&NodeView| node.report.blocks.active + node.report.blocks.leased;
    let used: u64 = nodes.iter().map(used).sum();
    gauge!("vllm:kv_cache_usage_perc", &[name()]).set(used as f64 / blocks as f64);
    let block_size = ("block_size", first.hello.geometry.block_tokens.to_string());
    let sizes = [name(), block_size, ("num_gpu_blocks", blocks.to_string())];
    gauge!("vllm:cache_config_info", &sizes).set(1.0);
}
