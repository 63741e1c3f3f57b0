//! The engine as its users see it, with a model whose tokens depend on every KV byte it reads.

mod embedding;
mod grammar;
mod staged;
mod support;

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc;
use std::time::Duration;

use baton_engine::testing::FakeModel;
use baton_engine::{Engine, EngineConfig, EngineEvent, FirstToken, Kind, Submission, SubmitError};
use baton_proto::message::{BlockCounts, Job, NodeFinish, Retry};
use baton_proto::sampling::SamplingParams;
use support::{Node, config, expected, hand_over, id, job, prompt};

/// The same with devices that run ahead of the engine.
mod ahead {
    macro_rules! run_ahead {
        ($($test:ident),* $(,)?) => {
            $(#[test] fn $test() { super::support::ahead(super::$test); })*
        };
    }

    run_ahead!(
        tokens_are_the_models_whatever_runs_along_and_however_prompts_are_cut,
        cached_prefixes_change_no_token,
        preempted_sequences_give_the_same_tokens,
        a_sequence_goes_on_with_copied_blocks_as_if_computed_there,
        a_lease_writes_only_its_own_blocks_and_only_before_they_run,
        a_step_whose_jobs_are_all_cancelled_is_abandoned_between_layers,
        deadlines_pass_while_nothing_else_happens,
        prompt_logprobs_do_not_depend_on_chunks_and_read_no_cache,
        cache_events_add_up_to_the_snapshot,
        a_sampled_sequence_is_the_same_after_a_hand_over,
        a_first_token_that_ends_the_sequence_ends_the_import,
        jobs_of_a_broken_engine_fail_and_new_ones_are_refused,
        jobs_of_a_failed_device_fail_and_say_why,
        jobs_of_a_dropped_engine_fail,
    );
}

#[test]
fn tokens_are_the_models_whatever_runs_along_and_however_prompts_are_cut() {
    for (max_batch_tokens, max_sequences) in [(1, 1), (3, 8), (17, 8), (512, 8)] {
        let node = Node::start(EngineConfig { max_batch_tokens, max_sequences, ..config() });
        let jobs: Vec<Job> = (1..9).map(|n| job(n, prompt(n, 5 * n as usize), 12)).collect();
        for job in &jobs {
            node.submit(job, Kind::Local);
        }
        for (id, tokens) in node.until_ended(jobs.len()) {
            let job = &jobs[id.request.0 as usize - 1];
            assert_eq!(tokens, expected(job), "{id} with {max_batch_tokens} tokens a step");
        }
        node.idle();
    }
}

#[test]
fn cached_prefixes_change_no_token() {
    let node = Node::start(config());
    let first = job(1, prompt(1, 30), 10);
    let longer = [first.tokens.to_vec(), expected(&first), prompt(2, 9)].concat();
    for (job, cached) in
        [(first.clone(), 0), (job(2, longer, 10), 36), (job(3, first.tokens.to_vec(), 4), 28)]
    {
        node.submit(&job, Kind::Local);
        assert_eq!(node.admitted(job.id).1, cached);
        assert_eq!(node.until_ended(1)[&job.id], expected(&job));
    }
    node.idle();
}

#[test]
fn preempted_sequences_give_the_same_tokens() {
    // Each needs 8 blocks in the end.
    let node = Node::start(EngineConfig { kv_blocks: 18, ..config() });
    let jobs: Vec<Job> = (1..6).map(|n| job(n, prompt(n, 9), 23)).collect();
    for job in &jobs {
        node.submit(job, Kind::Local);
    }
    for (id, tokens) in node.until_ended(jobs.len()) {
        assert_eq!(tokens, expected(&jobs[id.request.0 as usize - 1]));
    }
    node.idle();
}

#[test]
fn a_sequence_goes_on_with_copied_blocks_as_if_computed_there() {
    // Chunks that end within blocks.
    let prefill = Node::start(EngineConfig { max_batch_tokens: 7, ..config() });
    let decode = Node::start(config());
    // A partial, a full and a single last block; the last two find blocks at both ends.
    for (n, length, held) in [(1, 13, 0), (2, 16, 0), (3, 1, 0), (4, 40, 0)] {
        let job = job(n, prompt(n, length), 9);
        assert_eq!(hand_over(&prefill, &decode, &job, &mut |_| {}), (held, expected(&job)));
    }
    let again = job(5, prompt(4, 40), 9);
    assert_eq!(hand_over(&prefill, &decode, &again, &mut |_| {}), (9, expected(&again)));
    prefill.idle();
    decode.idle();
}

#[test]
fn a_single_wrong_byte_would_be_seen() {
    let (prefill, decode) = (Node::start(config()), Node::start(config()));
    let job = job(1, prompt(1, 22), 9);
    let mut pieces = 0;
    let (_, tokens) = hand_over(&prefill, &decode, &job, &mut |bytes| {
        pieces += 1;
        if pieces == 8 {
            bytes[17] ^= 1;
        }
    });
    assert_ne!(tokens, expected(&job));
}

#[test]
fn a_lease_writes_only_its_own_blocks_and_only_before_they_run() {
    let node = Node::start(config());
    let warm = job(1, prompt(1, 18), 2);
    node.submit(&warm, Kind::Local);
    node.until_ended(1);
    let import = job(2, prompt(1, 18), 6);
    let source = Node::start(config());
    let mut late = None;
    let (held, tokens) =
        support::hand_over_with(&source, &node, &import, &mut |_| {}, &mut |lease| {
            for ordinal in 0..lease.held() {
                support::write(lease, 0, ordinal, &[0xff; 16]);
            }
            late = Some(lease.clone());
        });
    assert_eq!((held, tokens), (4, expected(&import)));
    let late = late.unwrap();
    for layer in 0..3 {
        for ordinal in 0..late.blocks() {
            support::write(&late, layer, ordinal, &[0xff; 16]);
        }
    }
    // The request is over and the lease is not.
    assert_eq!(node.engine.report().blocks.leased, 5);
    drop(late);
    node.ended(import.id);
    let again = job(3, prompt(1, 18), 6);
    node.submit(&again, Kind::Local);
    assert_eq!(node.until_ended(1)[&again.id], expected(&again), "what is cached is intact");
    node.idle();
}

#[test]
#[should_panic(expected = "is not complete")]
fn a_piece_cannot_be_read_before_it_is_complete() {
    let (permits, node) = Node::gated(config());
    node.submit(&job(1, prompt(1, 9), 1), Kind::Export);
    let lease = node.admitted(id(1)).0.unwrap();
    let read = std::panic::catch_unwind(AssertUnwindSafe(|| drop(lease.read(0, 0..1))));
    drop(permits);
    std::panic::resume_unwind(read.err().unwrap());
}

#[test]
fn a_cancel_in_any_phase_frees_everything_and_is_told_once() {
    let (permits, node) = Node::gated(EngineConfig { kv_blocks: 16, ..config() });
    let step = || permits.send(()).unwrap();
    // In the queue: there is no room beside a reserved import.
    node.submit(&job(1, prompt(1, 40), 2), Kind::Import);
    let lease = node.admitted(id(1)).0.unwrap();
    node.submit(&job(2, prompt(2, 40), 2), Kind::Local);
    node.engine.cancel(id(2));
    node.ended(id(2));
    // Reserved, and the lease is out.
    node.engine.cancel(id(1));
    support::write(&lease, 0, 0, &[1]);
    drop(lease);
    node.ended(id(1));
    node.idle();
    // In the middle of a prompt: the first step knows no speed and takes 64 tokens or less.
    let node_of = |kind| {
        node.submit(&job(3, prompt(3, 38), 9), kind);
        node.admitted(id(3)).0
    };
    drop(node_of(Kind::Local));
    node.engine.cancel(id(3));
    step();
    node.ended(id(3));
    node.idle();
    // Generating.
    drop(node_of(Kind::Local));
    step();
    step();
    node.tokens();
    node.engine.cancel(id(3));
    step();
    node.ended(id(3));
    node.idle();
    // An export that was computed but not fetched.
    let lease = node_of(Kind::Export);
    step();
    node.tokens();
    assert_eq!(node.engine.report().blocks.active, 0);
    assert_eq!(node.engine.report().blocks.leased, 10);
    node.engine.cancel(id(3));
    drop(lease);
    node.ended(id(3));
    node.idle();
    node.engine.cancel(id(77));
}

#[test]
fn a_step_whose_jobs_are_all_cancelled_is_abandoned_between_layers() {
    let (permits, node) = Node::gated(config());
    node.submit(&job(1, prompt(1, 40), 2), Kind::Export);
    let lease = node.admitted(id(1)).0;
    // The step has begun and waits for its permit.
    node.engine.cancel(id(1));
    permits.send(()).unwrap();
    drop(lease);
    let mut layers = Vec::new();
    loop {
        match node.next() {
            EngineEvent::KvReady { layer, .. } => layers.push(layer),
            EngineEvent::Ended { .. } => break,
            EngineEvent::Tokens(_) => panic!("nobody wants a token"),
            _ => {}
        }
    }
    assert!(layers.len() <= 1, "layers {layers:?} were computed after the cancel");
    // A device that runs ahead is told after the job's end is.
    node.eventually(|report| report.blocks.active == 0);
    node.idle();
    // Nothing of it is cached, and the next job is served.
    node.submit(&job(2, prompt(1, 40), 2), Kind::Local);
    assert_eq!(node.admitted(id(2)).1, 0);
    drop(permits);
    node.ended(id(2));
}

#[test]
fn deadlines_pass_while_nothing_else_happens() {
    let node = Node::start(config());
    let deadline = Some(Duration::from_millis(20));
    node.submit(&Job { deadline, ..job(1, prompt(1, 9), 9) }, Kind::Import);
    let lease = node.admitted(id(1)).0;
    match node.next() {
        EngineEvent::Failed { reason, retry: Retry::Never, .. } => assert_eq!(reason, "deadline"),
        other => panic!("unexpected {other:?}"),
    }
    drop(lease);
    node.eventually(|report| report.blocks.leased == 0);
    node.idle();
}

#[test]
fn prompt_logprobs_do_not_depend_on_chunks_and_read_no_cache() {
    let tokens = prompt(1, 21);
    let sampling = SamplingParams {
        prompt_logprobs: Some(2),
        temperature: 0.0,
        max_tokens: 2,
        ..SamplingParams::default()
    };
    let mut seen = Vec::new();
    for (max_batch_tokens, kind) in [(5, Kind::Local), (64, Kind::Export), (64, Kind::Local)] {
        let node = Node::start(EngineConfig { max_batch_tokens, ..config() });
        for n in 1..=2 {
            let job = Job { sampling: sampling.clone(), ..job(n, tokens.clone(), 2) };
            node.submit(&job, kind);
            let (lease, cached) = node.admitted(job.id);
            assert_eq!(cached, 0);
            drop(lease);
            seen.push(node.prompt_logprobs());
            node.until_ended(1);
        }
        node.idle();
    }
    assert!(seen.iter().all(|other| *other == seen[0]));
    let told: Vec<u32> = seen[0].iter().map(|(token, _)| *token).collect();
    assert_eq!(told, tokens[1..]);
    for (token, logprobs) in &seen[0] {
        assert_eq!(logprobs.top.len(), 2);
        assert!(logprobs.top[0].1 >= logprobs.logprob && logprobs.logprob < 0.0);
        let own = logprobs.top.iter().find(|(other, _)| other == token);
        assert!(own.is_none_or(|(_, logprob)| *logprob == logprobs.logprob));
    }
}

#[test]
fn cache_events_add_up_to_the_snapshot() {
    let node = Node::start(EngineConfig { kv_blocks: 14, ..config() });
    let mut held = BTreeSet::new();
    for n in 1..20 {
        node.submit(&job(n, prompt(n % 7, 5 + 2 * n as usize), 3), Kind::Local);
        let mut ended = false;
        while !ended {
            match node.next() {
                EngineEvent::CacheChanged { stored, removed } => {
                    assert!(stored.into_iter().all(|hash| held.insert(hash)));
                    assert!(removed.iter().all(|hash| held.remove(hash)));
                }
                EngineEvent::Ended { .. } => ended = true,
                _ => {}
            }
        }
    }
    node.engine.snapshot();
    let EngineEvent::Snapshot(hashes) = node.next() else { panic!("no snapshot") };
    assert_eq!(hashes, held.into_iter().collect::<Vec<_>>());
    assert!(hashes.len() > 8);
    let BlockCounts { free, cached, .. } = node.engine.report().blocks;
    assert_eq!((free + cached, cached), (14, hashes.len() as u64));
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let (_permits, node) = Node::gated(EngineConfig { kv_blocks: 10, max_waiting: 2, ..config() });
    let refused = |job: Job| {
        node.engine.submit(Submission { job, kind: Kind::Local, held: false }).unwrap_err()
    };
    assert_eq!(node.engine.info().max_model_len, 40, "no longer than the cache");
    let too_long = SubmitError::TooLong { tokens: 40, limit: 40 };
    assert_eq!(refused(job(1, prompt(1, 40), 1)), too_long);
    let outside = refused(job(1, vec![3, 128], 1));
    assert_eq!(outside.to_string(), "invalid job: token 128 is outside the vocabulary of 128");
    assert_eq!(outside.retry(), Retry::Never);
    assert!(matches!(refused(job(1, vec![], 1)), SubmitError::Invalid(_)));
    let done = Job { prompt_tokens: 1, ..job(1, prompt(1, 3), 2) };
    assert!(matches!(refused(done), SubmitError::Invalid(_)));
    node.submit(&job(1, prompt(1, 30), 9), Kind::Local);
    node.admitted(id(1));
    assert_eq!(refused(job(1, prompt(1, 3), 1)), SubmitError::Duplicate(id(1)));
    for n in 2..4 {
        node.submit(&job(n, prompt(1, 3), 1), Kind::Local);
    }
    let full = refused(job(4, prompt(1, 3), 1));
    assert_eq!((&full, full.retry()), (&SubmitError::Full(2), Retry::OtherNode));
}

#[test]
fn a_sampled_sequence_is_the_same_after_a_hand_over() {
    let sampling = SamplingParams {
        temperature: 1.1,
        top_p: 0.9,
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        seed: 11,
        max_tokens: 12,
        logprobs: Some(3),
        ..SamplingParams::default()
    };
    let job = |n| Job { sampling: sampling.clone(), ..job(n, prompt(1, 18), 12) };
    let (prefill, decode) = (Node::start(config()), Node::start(config()));
    decode.submit(&job(1), Kind::Local);
    let local = decode.until_ended(1).remove(&id(1)).unwrap();
    let (_, moved) = hand_over(&prefill, &decode, &job(2), &mut |_| {});
    assert_eq!(local, moved);
    // A second attempt that begins with what the first one emitted.
    let retried = Job { tokens: [prompt(1, 18), local[..5].to_vec()].concat().into(), ..job(3) };
    prefill.submit(&retried, Kind::Local);
    assert_eq!(prefill.until_ended(1)[&id(3)], local[5..]);
    let greedy = expected(&support::job(4, prompt(1, 18), 12));
    assert_ne!(local, greedy, "the parameters do something");
}

#[test]
fn a_first_token_that_ends_the_sequence_ends_the_import() {
    let node = Node::start(config());
    node.submit(&job(1, prompt(1, 9), 5), Kind::Import);
    drop(node.admitted(id(1)));
    let finish = Some(NodeFinish::EndOfSequence);
    node.engine.imported(id(1), FirstToken { token: 3, logprobs: None, finish });
    assert!(node.until_ended(1)[&id(1)].is_empty());
    node.idle();
}

#[test]
fn jobs_of_a_broken_engine_fail_and_new_ones_are_refused() {
    let (sink, events) = mpsc::channel();
    let model = FakeModel::new(128, 200).on_step(Box::new(|_| panic!("the device is on fire")));
    let sink = Box::new(move |event| drop(sink.send(event)));
    let engine = Engine::start(config(), support::device(model), None, sink);
    let submission =
        |n| Submission { job: job(n, prompt(1, 9), 5), kind: Kind::Local, held: false };
    let submit = |n| engine.submit(submission(n));
    submit(1).unwrap();
    let failed =
        |event: &EngineEvent| matches!(event, EngineEvent::Failed { retry: Retry::OtherNode, .. });
    assert!(events.iter().any(|event| failed(&event)));
    assert!(events.iter().next().is_none(), "the thread has ended");
    assert_eq!(submit(2), Err(SubmitError::Draining));
}

#[test]
fn jobs_of_a_failed_device_fail_and_say_why() {
    let (sink, events) = mpsc::channel();
    let device = support::Failing::new(support::device(FakeModel::new(128, 200)), 3);
    let sink = Box::new(move |event| drop(sink.send(event)));
    let engine = Engine::start(config(), Box::new(device), None, sink);
    for n in [1, 2] {
        let job = job(n, prompt(n, 9), 50);
        engine.submit(Submission { job, kind: Kind::Local, held: false }).unwrap();
    }
    let failed = events.iter().filter_map(|event| match event {
        EngineEvent::Failed { id, reason, retry } => Some((id, reason, retry)),
        _ => None,
    });
    let reason = "the device failed: it fell off the bus";
    let expected = [1, 2].map(|n| (id(n), reason.to_owned(), Retry::OtherNode));
    assert_eq!(failed.collect::<Vec<_>>(), expected, "once each, and then nothing");
}

#[test]
fn jobs_of_a_dropped_engine_fail() {
    let node = Node::start(config());
    node.submit(&job(1, prompt(1, 9), 5), Kind::Import);
    let lease = node.admitted(id(1)).0;
    let Node { engine, events } = node;
    drop(engine);
    let last = events.iter().last().unwrap();
    assert!(matches!(last, EngineEvent::Failed { retry: Retry::OtherNode, .. }));
    drop(lease);
}
