//! The dashboard and the alerts ask for metrics that a cluster really exports, and so do gateways that
//! know vLLM's names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use baton_cli::launcher::ClusterOptions;
use baton_tests::{Chance, PATIENCE, TestCluster, options, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Made by the database itself, of counters and histograms that are checked without it.
const SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];
/// Come into being with what they count, which does not happen here; or not always: where the machine is
/// busy, all tokens of a short answer may come at once.
const EVENTUAL: [&str; 2] = ["baton_requests_rejected_total", "baton_inter_token_latency_seconds"];
/// What llm-d's endpoint picker and dashboards made for vLLM read, and nothing else has vLLM's names.
/// Counters and gauges, with their labels beside `model_name`.
const VLLM: [(&str, &[&str]); 9] = [
    ("vllm:num_requests_running", &[]),
    ("vllm:num_requests_waiting", &[]),
    ("vllm:kv_cache_usage_perc", &[]),
    ("vllm:cache_config_info", &["block_size", "num_gpu_blocks"]),
    ("vllm:prefix_cache_queries_total", &[]),
    ("vllm:prefix_cache_hits_total", &[]),
    ("vllm:prompt_tokens_total", &[]),
    ("vllm:generation_tokens_total", &[]),
    ("vllm:request_success_total", &["finished_reason"]),
];
const VLLM_HISTOGRAMS: [&str; 8] = [
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
];
/// Where the values of labels are named.
const SOURCES: [&str; 5] = [
    "coordinator/src/metrics.rs",
    "coordinator/src/decision.rs",
    "node/src/metrics.rs",
    "engine/src/step/meters.rs",
    "proto/src/ids.rs",
];

/// Words that begin with `baton_`.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':');
    let words = text.split(word).filter(|word| word.starts_with("baton_"));
    words.map(ToOwned::to_owned).collect()
}

async fn scrape(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// All that series whose names begin so have, one value each.
fn sum_of(text: &str, series: &str) -> f64 {
    let lines = text.lines().filter(|line| line.starts_with(series));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

fn assert_phases_add_up(text: &str) {
    let phases = sum_of(text, "baton_request_phase_seconds_sum{");
    let requests = sum_of(text, "baton_request_seconds_sum");
    assert!(requests > 0.0 && (phases / requests - 1.0).abs() < 1e-6, "{phases} of {requests} s");
    // A transfer is reported a little later, and not waited for long.
    for term in ["queue", "prefill", "first_token"] {
        let count = format!("baton_prediction_ratio_count{{term=\"{term}\"}}");
        assert_eq!(sum_of(text, &count), 1.0, "{term}");
    }
}

/// Labels of one series.
type Labels = BTreeMap<String, String>;

/// Series by their name: labels and value.
fn series(text: &str) -> BTreeMap<String, Vec<(Labels, f64)>> {
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for line in text.lines().filter(|line| line.contains(' ') && !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let Ok(value) = value.parse() else { continue };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let labels = labels.trim_end_matches('}').split("\",").filter_map(|label| {
            let (label, value) = label.split_once("=\"")?;
            Some((label.to_owned(), value.trim_end_matches('"').to_owned()))
        });
        all.entry(name.to_owned()).or_default().push((labels.collect(), value));
    }
    all
}

/// `label="value"` and `label=~"one|other"` in queries, as `(label, value)`.
fn asked_values(text: &str) -> BTreeSet<(String, String)> {
    let text = text.replace("\\\"", "\"");
    let mut asked = BTreeSet::new();
    for (at, _) in text.match_indices("=\"").chain(text.match_indices("=~\"")) {
        let before = text[..at].rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next();
        let values = text[at..].split('"').nth(1).unwrap();
        for value in values.split('|') {
            asked.insert((before.unwrap().to_owned(), value.to_owned()));
        }
    }
    asked
}

#[test]
fn values_are_found_in_queries() {
    let asked = asked_values(r#"a{x="1", y=~"2|3"} + "expr": "b{z=\"4\"}""#);
    let asked: Vec<_> = asked.iter().map(|(label, value)| format!("{label}={value}")).collect();
    assert_eq!(asked, ["x=1", "y=2", "y=3", "z=4"]);
}

#[test]
fn values_that_dashboard_and_alerts_ask_for_are_in_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |file: &str| std::fs::read_to_string(root.join(file)).unwrap();
    let code = SOURCES.map(read).concat();
    let asked =
        asked_values(&(read("deploy/grafana/baton.json") + &read("deploy/prometheus/alerts.yml")));
    // Of the scrape's configuration, beside which this stands.
    let scraped = read("deploy/prometheus/prometheus.yml");
    assert!(asked.len() > 8, "{asked:?}");
    for (label, value) in asked {
        let known = match &*label {
            "job" => scraped.contains(&format!("job_name: {value}")),
            _ => code.contains(&format!("\"{value}\"")),
        };
        assert!(known, "{label}={value:?} is asked for, and nobody says that");
    }
}

#[tokio::test]
async fn gateways_and_dashboards_find_vllms_names() {
    let never = ClusterOptions { local_prefill: Some("never".into()), ..options(1, 1) };
    let cluster = TestCluster::start(never).await;
    for _ in 0..2 {
        cluster.complete(request(Chance(1).tokens(200), 8)).await.unwrap();
    }
    cluster.idle().await;
    // Gauges are set every second.
    let looking = async {
        loop {
            let shown = series(&scrape(cluster.cluster.http()).await);
            if shown.contains_key("vllm:cache_config_info") {
                return shown;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let shown = tokio::time::timeout(PATIENCE, looking).await.unwrap();
    let histograms =
        VLLM_HISTOGRAMS.iter().flat_map(|name| SUFFIXES.map(|end| format!("{name}{end}")));
    let wanted = VLLM.iter().map(|(name, _)| (*name).to_owned()).chain(histograms);
    let of_vllm = shown.keys().filter(|name| name.starts_with("vllm:")).cloned();
    assert_eq!(of_vllm.collect::<BTreeSet<_>>(), wanted.collect::<BTreeSet<_>>());
    for (name, labels) in VLLM {
        for (found, _) in &shown[name] {
            assert_eq!(found["model_name"], "demo", "{name}");
            let others: Vec<_> = found.keys().filter(|label| *label != "model_name").collect();
            assert_eq!(others, labels, "{name}");
        }
    }
    let value = |name: &str| {
        let [(labels, value)] = &shown[name][..] else { panic!("{name}: {:?}", shown[name]) };
        assert_eq!(labels["model_name"], "demo", "{name}");
        *value
    };
    for name in VLLM_HISTOGRAMS.iter().filter(|name| !name.contains("inter_token")) {
        assert_eq!(value(&format!("{name}_count")), 2.0, "{name}");
    }
    // Tokens that come with a request's first one have no gap.
    let gaps = value("vllm:inter_token_latency_seconds_count");
    assert!(gaps <= 14.0, "{gaps}");
    assert_eq!(
        (value("vllm:prompt_tokens_total"), value("vllm:generation_tokens_total")),
        (400.0, 16.0)
    );
    assert_eq!(value("vllm:prefix_cache_queries_total"), 400.0);
    let hits = value("vllm:prefix_cache_hits_total");
    assert!(
        (100.0..200.0).contains(&hits),
        "the second prompt was cached, but its last block: {hits}"
    );
    let parts = ["queue", "prefill", "decode"].iter();
    let parts =
        parts.map(|part| value(&format!("vllm:request_{part}_time_seconds_sum"))).sum::<f64>();
    let whole = value("vllm:e2e_request_latency_seconds_sum");
    assert!((parts / whole - 1.0).abs() < 1e-6, "{parts} of {whole} s");
    for (labels, count) in &shown["vllm:request_success_total"] {
        let wanted = if labels["finished_reason"] == "length" { 2.0 } else { 0.0 };
        assert_eq!(*count, wanted, "{labels:?}");
    }
    let [(sizes, _)] = &shown["vllm:cache_config_info"][..] else { panic!("several sizes") };
    let nodes = cluster.nodes().await;
    let decode = nodes.iter().find(|node| node.role == "decode").unwrap().kv_blocks.unwrap();
    assert_eq!(sizes["num_gpu_blocks"], decode.total.to_string());
    assert_eq!(sizes["block_size"], decode.block_tokens.to_string());
}

#[tokio::test]
async fn every_daemon_says_when_its_certificate_expires_and_nodes_have_states() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let addresses = cluster.cluster.metrics().iter().copied().chain([cluster.cluster.http()]);
    for address in addresses {
        let looking = async {
            loop {
                let shown = series(&scrape(address).await);
                if let Some(found) = shown.get("baton_tls_certificate_expiry_timestamp_seconds") {
                    return found.clone();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, looking).await.unwrap();
        let [(labels, expires)] = &found[..] else { panic!("{found:?}") };
        assert_eq!(labels["certificate"], "member");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(*expires > now && *expires < now + 20.0 * 366.0 * 86400.0, "{expires} at {now}");
    }
    let looking = async {
        loop {
            let shown = series(&scrape(cluster.cluster.http()).await);
            let states = shown.get("baton_nodes").cloned().unwrap_or_default();
            let of = |role: &str, state: &str| {
                let found = states.iter().find(|(l, _)| l["role"] == role && l["state"] == state);
                found.map(|(_, count)| *count)
            };
            if ["prefill", "decode"].iter().all(|role| of(role, "up") == Some(1.0)) {
                return (of("decode", "draining"), of("decode", "silent"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let others = tokio::time::timeout(PATIENCE, looking).await.unwrap();
    assert_eq!(others, (Some(0.0), Some(0.0)));
}

#[tokio::test]
async fn what_dashboard_and_alerts_ask_for_is_exported() {
    let never = ClusterOptions { local_prefill: Some("never".into()), ..options(1, 1) };
    let cluster = TestCluster::start(never).await;
    cluster.complete(request(Chance(1).tokens(200), 8)).await.unwrap();
    cluster.idle().await;
    let mut exported = names(&scrape(cluster.cluster.http()).await);
    for &address in cluster.cluster.metrics() {
        exported.extend(names(&scrape(address).await));
    }
    assert_phases_add_up(&scrape(cluster.cluster.http()).await);
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    for file in ["grafana/baton.json", "prometheus/alerts.yml"] {
        let asked = names(&std::fs::read_to_string(deploy.join(file)).unwrap());
        assert!(asked.len() > 5, "{file} asks for little");
        for name in asked {
            let base = SUFFIXES.iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
            let known = exported.contains(&name) || exported.contains(base);
            assert!(
                known || EVENTUAL.contains(&base),
                "{file} asks for {name}, which nobody exports"
            );
        }
    }
}
