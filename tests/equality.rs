//! Disaggregated = monolithic: the same requests give the same tokens however they are served.

use std::sync::Arc;

use baton_proto::wire::v1::GenerateRequest;
use baton_tests::{Chance, TestCluster, options, request};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const REQUESTS: usize = 200;
const CONCURRENT: usize = 24;

/// Mixed lengths, shared prefixes, greedy and seeded sampling.
fn requests() -> Vec<GenerateRequest> {
    let mut chance = Chance(42);
    let prefixes: Vec<Vec<u32>> =
        [0, 40, 150, 320].iter().map(|&length| chance.tokens(length)).collect();
    (0..REQUESTS)
        .map(|index| {
            let mut tokens = prefixes[chance.below(4) as usize].clone();
            let own = 1 + chance.below(if index % 10 == 0 { 400 } else { 60 }) as usize;
            tokens.extend(chance.tokens(own));
            let mut request = request(tokens, 1 + chance.below(32) as u32);
            let sampling = request.sampling.as_mut().unwrap();
            if index % 2 == 0 {
                sampling.temperature = Some(0.9);
                sampling.top_p = Some(0.95);
                sampling.top_k = Some(50);
                sampling.repetition_penalty = Some(1.1);
                sampling.presence_penalty = Some(0.2);
                sampling.seed = Some(index as u64);
            }
            request
        })
        .collect()
}

/// The tokens of every request, sent in an order that `seed` decides, and how many were handed over.
async fn serve(cluster: TestCluster, seed: u64) -> (Vec<Vec<u32>>, usize) {
    let cluster = Arc::new(cluster);
    let gate = Arc::new(Semaphore::new(CONCURRENT));
    let mut order: Vec<(usize, GenerateRequest)> = requests().into_iter().enumerate().collect();
    let mut chance = Chance(seed);
    for i in (1..order.len()).rev() {
        order.swap(i, chance.below(i as u64 + 1) as usize);
    }
    let mut tasks = JoinSet::new();
    for (index, request) in order {
        let (cluster, gate) = (Arc::clone(&cluster), Arc::clone(&gate));
        tasks.spawn(async move {
            let _turn = gate.acquire_owned().await.unwrap();
            let answer = cluster.complete(request).await.unwrap();
            let placement = answer.finished.unwrap().placement.unwrap();
            (index, answer.tokens, !placement.prefill_node.is_empty())
        });
    }
    let mut all = tasks.join_all().await;
    all.sort();
    cluster.idle().await;
    let cluster = Arc::into_inner(cluster).expect("all tasks ended");
    cluster.cluster.stop().await;
    let handed_over = all.iter().filter(|(_, _, remote)| *remote).count();
    (all.into_iter().map(|(_, tokens, _)| tokens).collect(), handed_over)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_of_serving_gives_the_same_tokens() {
    let (one, none) = serve(TestCluster::start(options(0, 1)).await, 1).await;
    let forced = |prefill, decode| {
        let mut options = options(prefill, decode);
        options.local_prefill = Some("never".into());
        options
    };
    let (pair, all_of_pair) = serve(TestCluster::start(forced(1, 1)).await, 2).await;
    let (four, all_of_four) = serve(TestCluster::start(forced(2, 2)).await, 3).await;
    let (free, _) = serve(TestCluster::start(options(2, 2)).await, 4).await;
    assert_eq!((none, all_of_pair, all_of_four), (0, REQUESTS, REQUESTS), "handed over");
    for (name, other) in [("1 + 1", &pair), ("2 + 2", &four), ("2 + 2, any placement", &free)] {
        for (index, (a, b)) in one.iter().zip(other).enumerate() {
            assert_eq!(a, b, "request {index} differs between one node and {name}");
        }
    }
}
