//! A prefix that one node has computed and another needs is fetched, when that is cheaper than
//! computing it or than waiting for the node that has it.

use baton_proto::wire::v1::GenerateRequest;
use baton_tests::{Answer, Chance, TestCluster, request};

const PREFIX: usize = 1600;
const BURST: usize = 6;

/// All at once; their answers in order.
async fn together(cluster: &TestCluster, requests: Vec<GenerateRequest>) -> Vec<Answer> {
    let mut streams = Vec::new();
    for request in requests {
        streams.push(tokio::spawn(Answer::gather(cluster.generate(request).await.unwrap())));
    }
    let mut answers = Vec::new();
    for stream in streams {
        answers.push(stream.await.unwrap().unwrap());
    }
    answers
}

/// The prefill node of an answer, and the tokens that it did not compute.
fn computed_by(answer: &Answer) -> (String, u32) {
    let finished = answer.finished.clone().unwrap();
    let (placement, usage) = (finished.placement.unwrap(), finished.usage.unwrap());
    (placement.prefill_node, usage.cached_tokens)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_nodes_prefix_is_pulled_by_an_idle_one() {
    let (cluster, _folder) = TestCluster::start_slow(2, 1, 1200).await;
    // How fast the nodes are.
    let unrelated = (1..5).map(|seed| request(Chance(seed).tokens(300), 4)).collect();
    together(&cluster, unrelated).await;
    let prefix = Chance(7).tokens(PREFIX);
    let first = cluster.complete(request(prefix.clone(), 4)).await.unwrap();
    let (owner, cached) = computed_by(&first);
    assert_eq!(cached, 0);
    cluster.idle().await;

    let longer = |seed: usize| [&prefix[..], &Chance(100 + seed as u64).tokens(200)].concat();
    let burst = (0..BURST).map(|seed| request(longer(seed), 8)).collect();
    let answers = together(&cluster, burst).await;
    let placed: Vec<_> = answers.iter().map(computed_by).collect();
    println!("on {owner}, then {placed:?}");
    let pulled = |(node, cached): &(String, u32)| *node != owner && *cached as usize >= PREFIX - 64;
    assert!(placed.iter().any(pulled), "the prefix stays on {owner}: {placed:?}");
    for (seed, answer) in answers.iter().enumerate() {
        let alone = GenerateRequest {
            cache_salt: Some(format!("alone-{seed}")),
            ..request(longer(seed), 8)
        };
        let alone = cluster.complete(alone).await.unwrap();
        assert_eq!(answer.tokens, alone.tokens, "pulled blocks are those that were computed");
    }
    cluster.idle().await;
}
