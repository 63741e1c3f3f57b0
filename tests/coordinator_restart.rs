//! A coordinator that dies and comes back has its state back when the nodes have rejoined.

use std::net::SocketAddr;
use std::time::Duration;

use baton_proto::wire::v1::{GetCacheRequest, GetStatusRequest};
use baton_tests::{Chance, PATIENCE, TestCluster, daemons, model, options, request};
use tokio::process::{Child, Command};

/// The address `key=ADDR` of the coordinator's ready line.
fn address(cluster: &TestCluster, key: &str) -> SocketAddr {
    let log = std::fs::read_to_string(cluster.cluster.state().join("coordinator/log")).unwrap();
    let words = log.split_whitespace();
    let found = words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).next();
    found.expect("a ready line").parse().unwrap()
}

/// Starts the coordinator again, at the same addresses and with the same identity.
fn start_again(cluster: &TestCluster) -> Child {
    let state = cluster.cluster.state().join("coordinator");
    let mut command = Command::new(daemons().join("baton-coordinator"));
    for (flag, key) in [("--cluster-listen", "cluster"), ("--grpc", "grpc"), ("--http", "http")] {
        command.arg(flag).arg(address(cluster, key).to_string());
    }
    command.arg("--identity").arg(state.join("identity")).arg("--model").arg(model());
    let log = std::fs::File::create(state.join("log-2")).unwrap();
    command.stderr(log).stdout(std::process::Stdio::null()).kill_on_drop(true).spawn().unwrap()
}

/// What the coordinator believes the nodes to hold, once it serves again.
async fn cached_blocks(cluster: &TestCluster) -> Vec<(String, u64)> {
    let ready = async {
        loop {
            let status = cluster.operator().get_status(GetStatusRequest {}).await;
            let nodes = status.map(|s| s.into_inner());
            if nodes.is_ok_and(|s| s.ready && s.prefill_nodes == 1 && s.decode_nodes == 1) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.expect("the nodes rejoin");
    cluster.idle().await;
    let cache = cluster.operator().get_cache(GetCacheRequest::default()).await.unwrap();
    let mut nodes: Vec<_> =
        cache.into_inner().nodes.into_iter().map(|n| (n.id, n.blocks)).collect();
    nodes.sort();
    nodes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_coordinator_knows_what_the_nodes_hold() {
    let mut wanted = options(1, 1);
    wanted.local_prefill = Some("never".into());
    let cluster = TestCluster::start(wanted).await;
    let prompt = Chance(3).tokens(300);
    let first = cluster.complete(request(prompt.clone(), 20)).await.unwrap();
    let before = cached_blocks(&cluster).await;
    assert!(before.iter().all(|(_, blocks)| *blocks >= 18), "{before:?}");

    let mut running = cluster.generate(request(Chance(4).tokens(50), 3000)).await.unwrap();
    running.message().await.unwrap().expect("a token");
    assert!(cluster.cluster.kill("coordinator"));
    let broken = loop {
        match running.message().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(broken.is_err(), "a stream that lost its coordinator must not end as if complete");

    let _coordinator = start_again(&cluster);
    let after = cached_blocks(&cluster).await;
    for ((node, then), (_, now)) in before.iter().zip(&after) {
        assert!(now >= then, "{node} held {then} blocks, the new coordinator knows of {now}");
    }
    let again = cluster.complete(request(prompt, 20)).await.unwrap();
    assert_eq!(again.tokens, first.tokens);
    assert!(again.finished.unwrap().usage.unwrap().cached_tokens >= 288);
}
