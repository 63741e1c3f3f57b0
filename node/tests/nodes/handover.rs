//! Two nodes over real sockets, one of either role: what a coordinator
//! sees of jobs that succeed, are cancelled, fail or are abandoned.

use std::collections::HashMap;
use std::sync::Arc;

use crate::support::{
    POISON, Pair, cancel, expected, hand_over, id, job, patiently, peer, started,
};
use baton_node::Event;
use baton_proto::ids::Epoch;
use baton_proto::message::{Command, Job, NodeEvent, NodeFinish, Retry};

#[tokio::test(flavor = "multi_thread")]
async fn a_handed_over_sequence_is_the_one_computed_in_one_place() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    // 1 token in the last block, a full last block, more than one chunk, and that once more: the
    // decode node then holds all full blocks.
    let cases = [(1, 1, 5, 2), (2, 2, 8, 2), (3, 3, 41, 11), (4, 3, 41, 1)];
    for (request, seed, length, moved) in cases {
        let job = job(id(request), seed, length, 12);
        hand_over(&prefill, &decode, &job).await;
        let first = prefill.token(job.id).await;
        assert!(first.prefill.is_some(), "it says how long the prompt took");
        let mut tokens = vec![first];
        tokens.extend(decode.rest(job.id).await);
        let ids: Vec<_> = tokens.iter().map(|token| token.token).collect();
        assert_eq!(ids, expected(&job));
        assert!(tokens.iter().map(|token| token.position).eq(0..12));
        assert_eq!(tokens[11].finish, Some(NodeFinish::Length));
        match prefill.next().await {
            NodeEvent::Transferred { id, blocks, .. } => assert_eq!((id, blocks), (job.id, moved)),
            other => panic!("expected the end of the transfer, not {other:?}"),
        }
        pair.idle().await;
        prefill.idle().await;
        decode.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_also_computes_prompts_itself() {
    let mut pair = Pair::start().await;
    let (_prefill, mut decode) = pair.streams().await;
    let job = job(id(1), 1, 41, 12);
    decode.command(Command::Decode { job: job.clone(), prefill: None, pull: None }).await;
    let ids: Vec<_> = decode.rest(job.id).await.iter().map(|token| token.token).collect();
    assert_eq!(ids, expected(&job));
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_do_not_mix() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let length = |n| 9 + 3 * n as usize;
    let jobs: Vec<_> = (0..6).map(|n| job(id(n), n as u32, length(n), 30)).collect();
    for job in &jobs {
        hand_over(&prefill, &decode, job).await;
    }
    let mut got = HashMap::<_, Vec<_>>::new();
    let mut transferred = 0;
    while transferred < jobs.len() {
        match prefill.next().await {
            NodeEvent::Tokens(tokens) => {
                tokens.into_iter().for_each(|t| got.entry(t.id).or_default().push(t.token));
            }
            NodeEvent::Transferred { .. } => transferred += 1,
            NodeEvent::Started { .. } => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    let mut finished = 0;
    while finished < jobs.len() {
        if let NodeEvent::Tokens(tokens) = decode.next().await {
            for token in tokens {
                finished += usize::from(token.finish.is_some());
                got.entry(token.id).or_default().push(token.token);
            }
        }
    }
    for job in &jobs {
        assert_eq!(got[&job.id], expected(job));
    }
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_ends_with_its_first_token_frees_everything() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let job = job(id(1), 1, 20, 1);
    hand_over(&prefill, &decode, &job).await;
    let first = prefill.token(job.id).await;
    assert_eq!((first.position, first.finish), (0, Some(NodeFinish::Length)));
    assert!(matches!(prefill.next().await, NodeEvent::Transferred { .. }));
    pair.idle().await;
    // `idle` panics if the decode node says that the job failed.
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_in_any_phase_frees_both_nodes() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    for phase in 0..5 {
        let job = job(id(phase), phase as u32, 200, 100);
        hand_over(&prefill, &decode, &job).await;
        match phase {
            // In the queues.
            0 => {}
            // Being computed.
            1 => started(&mut prefill, job.id).await,
            // Blocks reserved at the other end.
            2 => started(&mut decode, job.id).await,
            // On its way.
            3 => drop(prefill.token(job.id).await),
            // Decoding.
            _ => drop(decode.token(job.id).await),
        }
        cancel(&prefill, &decode, job.id).await;
        pair.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_whose_peer_has_given_up_says_that_another_may_do_better() {
    let mut pair = Pair::start().await;
    let (mut prefill, decode) = pair.streams().await;
    let job = job(id(1), 1, 200, 100);
    let from = Some(peer(&prefill, "prefill-0"));
    decode.command(Command::Decode { job: job.clone(), prefill: from, pull: None }).await;
    pair.decode.expects(1).await;
    decode.command(Command::Cancel(job.id)).await;
    pair.decode.idle().await;
    let to = peer(&decode, "decode-0");
    prefill.command(Command::Prefill { job: job.clone(), decode: to, pull: None }).await;
    let (retry, _) = prefill.failure(job.id).await;
    assert_eq!(retry, Retry::OtherNode);
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_fails_says_so_once_and_frees_everything() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let job = job(id(1), 1, 40, 10);
    // The prefill node is to find an earlier life of the decode node.
    let mut to = peer(&decode, "decode-0");
    to.epoch = Epoch(6);
    prefill.command(Command::Prefill { job: job.clone(), decode: to, pull: None }).await;
    let from = Some(peer(&prefill, "prefill-0"));
    decode.command(Command::Decode { job: job.clone(), prefill: from, pull: None }).await;
    let (retry, reason) = prefill.failure(job.id).await;
    assert_eq!(retry, Retry::OtherNode);
    assert!(reason.contains("epoch 7, not 6"), "{reason}");
    pair.prefill.idle().await;
    // The decode node still waits for an offer; a coordinator ends that.
    pair.decode.expects(1).await;
    decode.command(Command::Cancel(job.id)).await;
    pair.idle().await;
    // `idle` panics if either says it again.
    prefill.idle().await;
    decode.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_goes_away_takes_its_jobs_along() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let (long, queued) = (job(id(1), 1, 40, 400), job(id(2), 2, 200, 100));
    hand_over(&prefill, &decode, &long).await;
    decode.token(long.id).await;
    hand_over(&prefill, &decode, &queued).await;
    started(&mut prefill, queued.id).await;
    drop((prefill, decode));
    pair.idle().await;
    // The nodes come back, say what they hold, and work.
    let (mut prefill, mut decode) = pair.streams().await;
    for node in [&mut prefill, &mut decode] {
        loop {
            match node.any().await {
                NodeEvent::Snapshot { sequence, hashes, .. } => {
                    assert_eq!(sequence, 0);
                    assert!(!hashes.is_empty(), "the prompt's blocks stay cached");
                    break;
                }
                NodeEvent::Report(_) => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    let job = job(id(3), 3, 10, 5);
    hand_over(&prefill, &decode, &job).await;
    prefill.token(job.id).await;
    assert_eq!(decode.rest(job.id).await.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_is_refused_once_with_a_reason() {
    let mut pair = Pair::start().await;
    let (mut prefill, decode) = pair.streams().await;
    let peer = peer(&decode, "decode-0");
    let mut bad = job(id(1), 1, 5, 5);
    Arc::make_mut(&mut bad.tokens)[2] = prefill.hello.vocab_size;
    let commands = [
        (
            Command::Prefill { job: bad, decode: peer.clone(), pull: None },
            Retry::Never,
            "outside the vocab",
        ),
        (
            Command::Prefill { job: job(id(2), 1, 100_000, 5), decode: peer.clone(), pull: None },
            Retry::Never,
            "tokens",
        ),
    ];
    for (command, expected, why) in commands {
        prefill.command(command).await;
        match prefill.next().await {
            NodeEvent::Failed { reason, retry, .. } => {
                assert!(reason.contains(why), "{reason}");
                assert_eq!(retry, expected);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_node_finishes_what_runs_and_takes_nothing_new() {
    let mut pair = Pair::start().await;
    let (_prefill, mut decode) = pair.streams().await;
    let running = job(id(1), 1, 10, 800);
    decode.command(Command::Decode { job: running.clone(), prefill: None, pull: None }).await;
    let first = decode.token(running.id).await;
    pair.decode.events.send(Event::Leave).await.expect("serving");
    loop {
        if let NodeEvent::Report(report) = decode.any().await
            && report.draining
        {
            break;
        }
    }
    let late = job(id(2), 2, 10, 5);
    decode.command(Command::Decode { job: late.clone(), prefill: None, pull: None }).await;
    let (mut last, mut refused) = (first, false);
    while last.finish.is_none() {
        match decode.next().await {
            NodeEvent::Tokens(mut tokens) => last = tokens.remove(0),
            NodeEvent::Failed { id, retry, .. } => {
                assert_eq!((id, retry), (late.id, Retry::OtherNode));
                refused = true;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(last.position, 799, "every token was told before the node left");
    assert!(refused, "while the other one still ran");
    patiently("the node ends", pair.decode.serving).await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_engine_fails_leaves_after_its_jobs_have() {
    let mut pair = Pair::start().await;
    let (_prefill, mut decode) = pair.streams().await;
    let mut poison = job(id(1), 1, 10, 50);
    Arc::make_mut(&mut poison.tokens)[0] = POISON;
    decode.command(Command::Decode { job: poison.clone(), prefill: None, pull: None }).await;
    assert_eq!(decode.failure(poison.id).await.0, Retry::OtherNode);
    patiently("the node ends", pair.decode.serving).await.expect("no panic");
}

/// Two coordinators, each of which reached one node first: there are blocks for one of the two jobs
/// on each node, and neither job may keep those of one node while it waits for the other.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_come_to_full_nodes_in_opposite_orders_both_end() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let (a, b) = (job(id(1), 1, 600, 5), job(id(2), 2, 600, 5));
    let (from, to) = (peer(&prefill, "prefill-0"), peer(&decode, "decode-0"));
    let first = |job: &Job| Command::Prefill { job: job.clone(), decode: to.clone(), pull: None };
    let second = |job: &Job| {
        let prefill = Some(from.clone());
        Command::Decode { job: job.clone(), prefill, pull: None }
    };
    prefill.command(first(&a)).await;
    decode.command(second(&b)).await;
    started(&mut prefill, a.id).await;
    pair.decode.expects(1).await;
    prefill.command(first(&b)).await;
    decode.command(second(&a)).await;
    let mut got = HashMap::<_, Vec<_>>::new();
    for job in [&a, &b] {
        let token = prefill.token(job.id).await.token;
        got.insert(job.id, vec![token]);
    }
    let mut finished = 0;
    while finished < 2 {
        if let NodeEvent::Tokens(tokens) = decode.next().await {
            for token in tokens {
                finished += usize::from(token.finish.is_some());
                got.entry(token.id).or_default().push(token.token);
            }
        }
    }
    assert_eq!((&got[&a.id], &got[&b.id]), (&expected(&a), &expected(&b)));
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_reports_what_waits_for_a_prefill() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    let job = job(id(1), 1, 41, 12);
    let from = Some(peer(&prefill, "prefill-0"));
    decode.command(Command::Decode { job: job.clone(), prefill: from, pull: None }).await;
    loop {
        if let NodeEvent::Report(report) = decode.any().await
            && (report.waiting, report.waiting_blocks) == (1, 11)
        {
            assert_eq!(report.blocks.leased, 0, "nothing is held for what has not begun");
            break;
        }
    }
    let to = peer(&decode, "decode-0");
    prefill.command(Command::Prefill { job: job.clone(), decode: to, pull: None }).await;
    let mut tokens = vec![prefill.token(job.id).await.token];
    tokens.extend(decode.rest(job.id).await.iter().map(|token| token.token));
    assert_eq!(tokens, expected(&job));
    let waiting = decode.idle().await.waiting_blocks;
    assert_eq!(waiting, 0);
    pair.idle().await;
}
