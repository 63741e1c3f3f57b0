//! The dashboard and the alerts ask for metrics that a cluster really exports.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use baton_cli::launcher::ClusterOptions;
use baton_tests::{Chance, TestCluster, options, request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Made by the database itself, of counters and histograms that are checked without it.
const SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];
/// Come into being with what they count, which does not happen here.
const EVENTUAL: [&str; 1] = ["baton_requests_rejected_total"];

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
