//! Embeddings: what is pooled, and that nothing else comes of them.

use super::device::pool;
use super::*;

/// What the fake device's hidden states of `tokens` come to.
pub(super) fn expected(tokens: &[u32], pooling: Pooling) -> Vec<f32> {
    let first = match pooling {
        Pooling::Last => tokens.len() - 1,
        Pooling::Mean => 0,
    };
    let rows = (tokens.len() - first) as f64;
    pool(first..tokens.len(), tokens).into_iter().map(|sum| (sum / rows) as f32).collect()
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i + 3) % 8).collect()
}

#[test]
fn a_prompt_is_pooled_however_it_is_cut() {
    for pooling in [Pooling::Last, Pooling::Mean] {
        for (tokens, depth) in [(1, 1), (1, 2), (3, 3), (10, 2)] {
            let mut rig = Rig::deep(limits(), depth, true);
            rig.scheduler.set_prefill_limit(tokens);
            rig.add(job(1, prompt(23), 9), Kind::Embed(pooling));
            rig.run();
            assert_eq!(rig.embeddings(id(1)), [expected(&prompt(23), pooling)], "{tokens} a step");
            assert_eq!((rig.tokens(id(1)).len(), rig.ends(id(1))), (0, 1));
            let chunks = rig.steps.iter().flat_map(|plan| &plan.chunks);
            assert!(chunks.clone().all(|chunk| !chunk.samples && !chunk.decode));
            assert_eq!(chunks.map(|chunk| chunk.tokens).sum::<usize>(), 23);
        }
    }
}

#[test]
fn only_the_last_token_may_lack_for_the_last_and_none_for_the_mean() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(16), 1), Kind::Embed(Pooling::Last));
    rig.run();
    for (n, pooling, computed) in [(2, Pooling::Last, 4), (3, Pooling::Mean, 16)] {
        let before = rig.steps.len();
        rig.add(job(n, prompt(16), 1), Kind::Embed(pooling));
        rig.run();
        let tokens: usize = rig.steps[before..].iter().map(Plan::tokens).sum();
        assert_eq!(tokens, computed, "its last block is computed, or all are");
        assert_eq!(rig.embeddings(id(n)), [expected(&prompt(16), pooling)]);
    }
}

#[test]
fn a_mean_that_was_preempted_begins_anew() {
    // Each of two has 5 blocks in the end; the prompt that arrives last has 5, too.
    let mut rig = Rig::new(Limits { kv_blocks: 11, max_batch_tokens: 6, ..limits() });
    rig.add(job(1, prompt(4), 16), Kind::Local);
    rig.add(job(2, [prompt(4), vec![1]].concat(), 15), Kind::Local);
    for _ in 0..4 {
        rig.step();
    }
    rig.scheduler.set_prefill_limit(1);
    let tokens = vec![5; 20];
    rig.add(job(3, tokens.clone(), 1), Kind::Embed(Pooling::Mean));
    rig.run();
    assert!(
        rig.steps.iter().any(|plan| plan.preempted.contains(&id(3))),
        "it gave its blocks back"
    );
    assert_eq!(rig.embeddings(id(3)), [expected(&tokens, Pooling::Mean)]);
}

/// How an embedding fails whose second chunk of three has this sum.
fn failure(pooled: Vec<f64>) -> Retry {
    let mut rig = Rig::new(limits());
    rig.scheduler.set_prefill_limit(1);
    rig.add(job(1, prompt(3), 1), Kind::Embed(Pooling::Mean));
    for pooled in [vec![0.5, 0.5], pooled, vec![0.5, 0.5]] {
        let plan = rig.scheduler.plan(rig.now);
        if plan.chunks.is_empty() {
            break;
        }
        let outcome = Outcome {
            sampled: vec![None],
            prompt_logprobs: vec![Vec::new()],
            pooled: vec![pooled],
            took: Duration::from_millis(1),
        };
        rig.scheduler.complete(&plan, outcome);
        rig.scheduler.check();
        rig.see();
    }
    assert!(rig.embeddings(id(1)).is_empty());
    let mut failures = rig.events.iter().filter_map(|event| match event {
        Event::Failed { retry, .. } => Some(*retry),
        _ => None,
    });
    failures.next().expect("it fails")
}

#[test]
fn what_is_not_finite_is_no_embedding() {
    assert_eq!(failure(vec![1.0, f64::INFINITY]), Retry::Never);
}

#[test]
fn one_without_memory_for_hidden_states_fails_alone() {
    assert_eq!(failure(Vec::new()), Retry::OtherNode);
}
