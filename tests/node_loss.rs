//! A node that dies by SIGKILL costs a pause, never a token.

use std::sync::Arc;

use baton_tests::{Answer, Chance, TestCluster, options, request};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

const STREAMS: u64 = 16;
const TOKENS: u32 = 300;

fn prompt(stream: u64) -> Vec<u32> {
    Chance(stream).tokens(100 + 10 * stream as usize)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_survive_the_death_of_a_decode_and_a_prefill_node() {
    let reference = TestCluster::start(options(0, 1)).await;
    let mut expected = Vec::new();
    for stream in 0..STREAMS {
        let answer = reference.complete(request(prompt(stream), TOKENS)).await.unwrap();
        expected.push(answer.tokens);
    }
    reference.cluster.stop().await;

    let mut wanted = options(2, 2);
    wanted.local_prefill = Some("never".into());
    let cluster = Arc::new(TestCluster::start(wanted).await);
    let (progress, mut reports) = mpsc::channel(1024);
    let mut tasks = JoinSet::new();
    for stream in 0..STREAMS {
        let (cluster, progress) = (Arc::clone(&cluster), progress.clone());
        tasks.spawn(async move {
            let mut messages = cluster.generate(request(prompt(stream), TOKENS)).await.unwrap();
            let mut answer = Answer::default();
            while let Some(message) = messages.message().await.unwrap() {
                answer.add(message);
                // Nobody listens any more once both nodes are dead.
                let _ = progress.try_send(stream);
            }
            (stream, answer)
        });
    }
    drop(progress);
    wait_for(&mut reports, 200).await;
    cluster.cluster.kill("decode-0");
    wait_for(&mut reports, 400).await;
    cluster.cluster.kill("prefill-0");
    drop(reports);

    let mut retried = 0;
    for (stream, answer) in tasks.join_all().await {
        assert_eq!(answer.tokens, expected[stream as usize], "stream {stream}");
        let placement = answer.finished.unwrap().placement.unwrap();
        retried += u32::from(placement.attempts > 1);
    }
    assert!(retried > 0, "the death of a decode node touched no stream");
    let after = cluster.complete(request(prompt(99), 5)).await.unwrap();
    assert_eq!(after.tokens.len(), 5);
    assert_eq!(cluster.idle().await.len(), 2, "the dead nodes are gone");
}

/// Waits until the streams have said `count` things.
async fn wait_for(reports: &mut mpsc::Receiver<u64>, count: usize) {
    for _ in 0..count {
        reports.recv().await.expect("streams are still running");
    }
}
