//! A node's metrics, for Prometheus. Durations are seconds, sizes bytes.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::header;
use axum::routing::get;
use baton_engine::EngineInfo;
use baton_kvtransfer::{SendError, Sent};
use baton_proto::ids::Role;
use baton_proto::message::Report;
use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

/// Upper bounds of buckets for steps and transfers, from a GPU's decode step to a CPU's long prompt.
const SECONDS: [f64; 18] = [
    0.0001, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 5.0,
];
const BYTES: [f64; 10] = [
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
    17_179_869_184.0,
];
const TOKENS: [f64; 15] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
    16384.0,
];
/// How often samples of histograms are merged; without it they would pile up until scraped.
const UPKEEP: Duration = Duration::from_secs(5);

/// Lets the process count, and gives what shows the counts.
pub(crate) fn install() -> Result<PrometheusHandle, BuildError> {
    let suffix = |end: &str| Matcher::Suffix(end.to_owned());
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(suffix("_seconds"), &SECONDS)?
        .set_buckets_for_metric(suffix("_bytes"), &BYTES)?
        .set_buckets_for_metric(suffix("_tokens"), &TOKENS)?
        .install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_gauge!("baton_node_kv_blocks", "Blocks of the KV pool by state");
    describe_gauge!("baton_node_kv_blocks_waiting", "Blocks that waiting sequences will need");
    describe_gauge!("baton_node_decode_role", "1 for a decode node, 0 for a prefill node");
    describe_gauge!("baton_node_draining", "1 while the node takes nothing new");
    describe_gauge!("baton_node_sequences_waiting", "Sequences not yet started");
    describe_gauge!("baton_node_sequences_running", "Sequences started");
    describe_gauge!("baton_node_queued_tokens", "Prompt tokens not yet computed");
    describe_gauge!("baton_node_prefill_tokens_per_second", "Prefill speed; 0 until measured");
    describe_gauge!("baton_node_decode_step_seconds", "Decode step; 0 until measured");
    describe_gauge!(
        "baton_tls_certificate_expiry_timestamp_seconds",
        "When a certificate expires, as seconds since 1970"
    );
    describe_gauge!("baton_build_info", "1; the version is a label");
    describe_counter!("baton_node_kv_sent_bytes_total", Unit::Bytes, "KV that arrived elsewhere");
    describe_counter!("baton_node_kv_transfers_total", "KV transfers from here, by outcome");
    describe_histogram!("baton_node_kv_transfer_hidden_seconds", "Before the prompt was computed");
    describe_histogram!("baton_node_kv_transfer_exposed_seconds", "After it");
    describe_histogram!("baton_node_kv_transfer_bytes", "Payload of a KV transfer");
    describe_counter!("baton_node_prefix_cache_queried_tokens_total", "Tokens of prompts");
    describe_counter!("baton_node_prefix_cache_hit_tokens_total", "Of these, found in the cache");
    describe_counter!("baton_node_evictions_total", "Blocks dropped from the prefix cache");
    describe_counter!("baton_node_preemptions_total", "Sequences that gave their blocks back");
    describe_histogram!("baton_node_step_seconds", "Steps of the engine, by what they computed");
    describe_histogram!("baton_node_step_tokens", "Tokens computed in one step");
}

/// Answers every request on `listener`, after `refresh` has set the gauges.
pub(crate) async fn serve(
    listener: TcpListener,
    handle: PrometheusHandle,
    refresh: impl Fn() + Clone + Send + Sync + 'static,
) -> io::Result<()> {
    let shown = handle.clone();
    let render = move || async move {
        refresh();
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], shown.render())
    };
    let router = Router::new().route("/", get(render.clone())).route("/metrics", get(render));
    let upkeep = async {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            handle.run_upkeep();
        }
    };
    tokio::select! {
        served = axum::serve(listener, router).into_future() => served,
        () = upkeep => unreachable!("it goes on for ever"),
    }
}

/// What the node is told to coordinators. The names of vLLM are those that gateways and dashboards
/// made for it read.
pub(crate) fn report(report: &Report, engine: &EngineInfo, model: &str) {
    let blocks = report.blocks;
    let states = [
        ("free", blocks.free),
        ("active", blocks.active),
        ("cached", blocks.cached),
        ("leased", blocks.leased),
    ];
    for (state, count) in states {
        gauge!("baton_node_kv_blocks", "state" => state).set(count as f64);
    }
    let flag = |set: bool| f64::from(u8::from(set));
    gauge!("baton_node_kv_blocks_waiting").set(report.waiting_blocks as f64);
    gauge!("baton_node_decode_role").set(flag(report.role == Role::Decode));
    gauge!("baton_node_draining").set(flag(report.draining));
    gauge!("baton_node_sequences_waiting").set(report.waiting);
    gauge!("baton_node_sequences_running").set(report.running);
    gauge!("baton_node_queued_tokens").set(report.queued_tokens as f64);
    gauge!("baton_node_prefill_tokens_per_second").set(report.prefill_tokens_per_second);
    gauge!("baton_node_decode_step_seconds").set(report.decode_step_ms / 1e3);

    let name = || ("model_name", model.to_owned());
    gauge!("vllm:num_requests_waiting", &[name()]).set(report.waiting);
    gauge!("vllm:num_requests_running", &[name()]).set(report.running);
    let used = (blocks.active + blocks.leased) as f64 / engine.kv_blocks.max(1) as f64;
    gauge!("vllm:kv_cache_usage_perc", &[name()]).set(used);
    let block_tokens = engine.geometry.block_tokens.to_string();
    let sizes =
        [name(), ("block_size", block_tokens), ("num_gpu_blocks", engine.kv_blocks.to_string())];
    gauge!("vllm:cache_config_info", &sizes).set(1.0);
}

/// What is the same for all work: when the node's certificate expires, and what the node is.
pub(crate) fn process(expires: SystemTime) {
    let expires = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
    gauge!("baton_tls_certificate_expiry_timestamp_seconds", "certificate" => "member")
        .set(expires.as_secs_f64());
    gauge!("baton_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
}

/// A prompt of so many tokens is looked up in the prefix cache.
pub(crate) fn queried(tokens: usize) {
    counter!("baton_node_prefix_cache_queried_tokens_total").increment(tokens as u64);
}

/// So many tokens of a prompt were found there.
pub(crate) fn hit(tokens: u32) {
    counter!("baton_node_prefix_cache_hit_tokens_total").increment(tokens.into());
}

/// So many blocks were dropped from the prefix cache.
pub(crate) fn evicted(blocks: usize) {
    counter!("baton_node_evictions_total").increment(blocks as u64);
}

/// A KV transfer from here is over.
pub(crate) fn sent(outcome: &Result<Sent, SendError>) {
    let Ok(sent) = outcome else {
        return counter!("baton_node_kv_transfers_total", "outcome" => "failed").increment(1);
    };
    let transport = sent.transport.name();
    counter!("baton_node_kv_transfers_total", "outcome" => "done").increment(1);
    counter!("baton_node_kv_sent_bytes_total", "transport" => transport).increment(sent.bytes);
    histogram!("baton_node_kv_transfer_bytes").record(sent.bytes as f64);
    histogram!("baton_node_kv_transfer_hidden_seconds").record(sent.hidden);
    histogram!("baton_node_kv_transfer_exposed_seconds").record(sent.exposed);
}

#[cfg(test)]
mod tests {
    use baton_kvtransfer::Transport;
    use baton_proto::geometry::{KvDtype, KvGeometry};
    use baton_proto::hash::ModelRoot;
    use baton_proto::message::BlockCounts;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    const ENGINE: EngineInfo = EngineInfo {
        root: ModelRoot([0; 16]),
        geometry: KvGeometry {
            layers: 1,
            kv_heads: 1,
            head_dim: 64,
            dtype: KvDtype::Bf16,
            block_tokens: 16,
        },
        vocab_size: 9,
        hidden_size: 4,
        max_model_len: 99,
        kv_blocks: 18,
    };

    #[tokio::test]
    async fn a_scrape_shows_what_holds_at_its_moment() {
        let handle = install().expect("the only recorder of this process");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let blocks = BlockCounts { free: 3, active: 4, cached: 5, leased: 6 };
        let refresh =
            move || report(&Report { running: 7, blocks, ..Report::default() }, &ENGINE, "m");
        let server = tokio::spawn(serve(listener, handle, refresh));
        let times = (Duration::from_millis(3), Duration::from_micros(200));
        let transport = Transport::Quic;
        sent(&Ok(Sent { hidden: times.0, exposed: times.1, bytes: 9, blocks: 1, transport }));

        let mut stream = TcpStream::connect(address).await.expect("listening");
        let request = b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("open");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        for line in [
            "baton_node_kv_blocks{state=\"leased\"} 6",
            "baton_node_sequences_running 7",
            "baton_node_kv_sent_bytes_total{transport=\"quic\"} 9",
            "baton_node_kv_transfer_hidden_seconds_bucket{le=\"0.003\"} 1",
            "baton_node_kv_transfer_exposed_seconds_bucket{le=\"0.0001\"} 0",
            "vllm:num_requests_running{model_name=\"m\"} 7",
            "vllm:cache_config_info{model_name=\"m\",block_size=\"16\",num_gpu_blocks=\"18\"} 1",
        ] {
            assert!(text.contains(&format!("\n{line}\n")), "{line} is not in\n{text}");
        }
        server.abort();
    }
}
