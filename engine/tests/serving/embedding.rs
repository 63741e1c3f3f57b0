//! Embeddings, with a fake model whose hidden states depend on every KV byte before them.

use std::collections::BTreeMap;

use baton_engine::testing::FakeModel;
use baton_engine::{EngineConfig, EngineEvent, Kind, Submission, SubmitError};
use baton_proto::embedding::Pooling;
use baton_proto::ids::TransferId;
use baton_proto::message::Job;

use super::support::{self, Node, config, expected, job, prompt};

fn right(job: &Job, pooling: Pooling) -> Vec<f32> {
    FakeModel::new(128, 200).expect_embedding(&job.tokens, pooling)
}

#[test]
fn embeddings_are_the_models_whatever_runs_along() {
    // Some of them have to wait for blocks, and some have to give them back.
    for (max_batch_tokens, kv_blocks) in [(3, 100), (17, 30), (512, 22)] {
        let node = Node::start(EngineConfig { max_batch_tokens, kv_blocks, ..config() });
        let mut wanted: BTreeMap<TransferId, Vec<f32>> = BTreeMap::new();
        let mut jobs = Vec::new();
        for n in 1..9 {
            let pooling = if n % 2 == 0 { Pooling::Last } else { Pooling::Mean };
            let (generated, embedded) = (job(n, prompt(n, 30), 12), job(n + 10, prompt(n, 41), 1));
            node.submit(&generated, Kind::Local);
            node.submit(&embedded, Kind::Embed(pooling));
            wanted.insert(embedded.id, right(&embedded, pooling));
            jobs.push(generated);
        }
        let (mut ended, mut tokens) = (0, BTreeMap::<TransferId, Vec<u32>>::new());
        while ended < 2 * jobs.len() {
            match node.next() {
                EngineEvent::Embedded { id, values, .. } => {
                    assert_eq!(wanted.remove(&id), Some(values), "{id}");
                }
                EngineEvent::Tokens(more) => {
                    more.iter().for_each(|t| tokens.entry(t.id).or_default().push(t.token));
                }
                EngineEvent::Ended { .. } => ended += 1,
                EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
                _ => {}
            }
        }
        assert!(wanted.is_empty());
        assert!(
            jobs.iter().all(|job| tokens[&job.id] == expected(job)),
            "others are what they are"
        );
        node.idle();
    }
}

#[test]
fn embeddings_are_the_models_on_a_device_that_runs_ahead() {
    support::ahead(embeddings_are_the_models_whatever_runs_along);
}

#[test]
fn a_cancelled_embedding_is_over() {
    let (permits, node) = Node::gated(EngineConfig { max_batch_tokens: 4, ..config() });
    let job = job(1, prompt(1, 40), 1);
    node.submit(&job, Kind::Embed(Pooling::Mean));
    permits.send(()).unwrap();
    node.admitted(job.id);
    node.engine.cancel(job.id);
    drop(permits);
    loop {
        match node.next() {
            EngineEvent::Ended { id } if id == job.id => break,
            EngineEvent::Embedded { .. } => panic!("nobody wants it"),
            _ => {}
        }
    }
    node.idle();
}

#[test]
fn only_a_prompt_is_embedded() {
    let node = Node::start(config());
    let job = Job { prompt_tokens: 3, ..job(1, prompt(1, 4), 9) };
    let kind = Kind::Embed(Pooling::Last);
    let refused = node.engine.submit(Submission { job, kind, held: false });
    assert!(matches!(refused, Err(SubmitError::Invalid(what)) if what.contains("prompt")));
}
