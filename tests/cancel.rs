//! A client that goes away in any phase frees what its request held.

use std::time::{Duration, Instant};

use baton_proto::wire::v1::{GenerateRequest, GetStatusRequest};
use baton_tests::{Chance, TestCluster, is_idle, request};

fn long(seed: u64) -> GenerateRequest {
    request(Chance(seed).tokens(4000), 2000)
}

/// Drops requests after a delay that sweeps over their life, and waits for all blocks each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_everything() {
    let (cluster, _folder) = TestCluster::start_slow(1, 1, 800).await;
    let mut slowest = Duration::ZERO;
    for round in 0..12_u64 {
        // One request is computed, the others queue behind it.
        let mut streams = Vec::new();
        for request in 0..3 {
            streams.push(cluster.generate(long(10 * round + request)).await.unwrap());
        }
        // Where in their life the requests are when the client leaves: sweeps from queued over
        // prefilling and transferring to decoding.
        match round {
            0 => {}
            1..8 => tokio::time::sleep(Duration::from_millis(150 * round)).await,
            // Round 8 and later: the first token is here, so its KV is on its way or has landed.
            _ => {
                for _ in 0..=(round - 8) * 2 {
                    streams[0].message().await.unwrap().expect("a token");
                }
            }
        }
        let left = Instant::now();
        drop(streams);
        cluster.idle().await;
        slowest = slowest.max(left.elapsed());
    }
    println!("slowest return of all blocks, as the coordinator saw it: {slowest:?}");
    let answer = cluster.complete(request(Chance(7).tokens(50), 3)).await.unwrap();
    assert_eq!(answer.tokens.len(), 3, "the cluster serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_ends_a_request_and_frees_everything() {
    let (cluster, _folder) = TestCluster::start_slow(1, 1, 800).await;
    // Nothing is refused on a guess: the nodes' speed is measured first. What is in time follows from it, so
    // that it does not matter how fast this machine is.
    let twice = async |prompt: usize, output: u32| {
        let begun = Instant::now();
        for chance in 2..8 {
            cluster
                .complete(request(Chance(chance + prompt as u64).tokens(prompt), output))
                .await
                .unwrap();
        }
        Some((begun.elapsed() / 3).as_millis() as u32)
    };
    // Hopeless from the start: its prompt alone is eight times as long.
    let wanted = GenerateRequest { deadline_ms: twice(500, 2).await, ..long(1) };
    let error = cluster.complete(wanted).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
    assert!(error.metadata().contains_key("retry-after-ms"), "{error:?}");
    // Its first token comes in time; its output is forty times as long.
    let wanted = request(Chance(1).tokens(100), 2000);
    let wanted = GenerateRequest { deadline_ms: twice(101, 50).await, ..wanted };
    let error = cluster.complete(wanted).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
    assert!(cluster.idle().await.iter().all(is_idle));
    let status = cluster.operator().get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.requests_active, 0);
}
