//! Prefixes that one node has computed and another fetches, with real engines and real sockets:
//! the tokens are those of a computation in one place, whatever becomes of the pull.

use crate::support::{BLOCK_TOKENS, Joined, Pair, demo_model, expected, id, job, peer};
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{Role, TransferId};
use baton_proto::message::{Command, Job, NodeEvent, Pull, Retry};

/// Lets a node compute `job`, and so cache its prompt.
async fn compute(node: &mut Joined, job: &Job) {
    node.command(Command::Decode { job: job.clone(), prefill: None, pull: None }).await;
    let tokens: Vec<_> = node.rest(job.id).await.iter().map(|token| token.token).collect();
    assert_eq!(tokens, expected(job));
}

/// The command to the node that has the leading `tokens` of `job`.
fn serve(job: &Job, tokens: usize, to: &Joined, name: &str) -> Command {
    let (tokens, to) = (job.tokens[..tokens].to_vec(), peer(to, name));
    Command::Serve { id: job.id.pull(), tokens, salt: job.salt, to }
}

fn pull(from: &Joined, name: &str, tokens: usize) -> Option<Pull> {
    Some(Pull { from: peer(from, name), tokens })
}

/// Skips to the start of `wanted`: how many tokens were pulled for it, and how many cached.
async fn pulled(node: &mut Joined, wanted: TransferId) -> (u32, u32) {
    let mut arrived = 0;
    loop {
        match node.next().await {
            NodeEvent::Pulled { id, tokens, .. } if id == wanted => arrived = tokens,
            NodeEvent::Started { id, cached_tokens, .. } if id == wanted => {
                return (arrived, cached_tokens);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Skips to the end of a pull at its source.
async fn served(node: &mut Joined, wanted: TransferId) -> u32 {
    loop {
        match node.next().await {
            NodeEvent::Transferred { id, blocks, .. } if id == wanted => return blocks,
            NodeEvent::Failed { reason, .. } => panic!("it failed: {reason}"),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_computed_on_one_node_is_pulled_by_another() {
    let mut pair = Pair::start().await;
    let (mut a, mut b) = pair.streams().await;
    compute(&mut a, &job(id(1), 1, 41, 3)).await;
    // The same prompt, longer by a turn.
    let longer = job(id(2), 1, 63, 12);
    b.command(Command::Decode {
        job: longer.clone(),
        prefill: None,
        pull: pull(&a, "prefill-0", 41),
    })
    .await;
    a.command(serve(&longer, 41, &b, "decode-0")).await;
    let whole = (41 / BLOCK_TOKENS * BLOCK_TOKENS) as u32;
    assert_eq!(pulled(&mut b, longer.id).await, (whole, whole));
    let tokens: Vec<_> = b.rest(longer.id).await.iter().map(|token| token.token).collect();
    assert_eq!(tokens, expected(&longer));
    assert_eq!(served(&mut a, longer.id.pull()).await, whole / BLOCK_TOKENS as u32);
    pair.idle().await;
    a.idle().await;
    b.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_goes_on_from_pulled_blocks_as_from_its_own() {
    let mut pair = Pair::with(demo_model).await;
    let (mut a, mut b) = pair.streams().await;
    let computed = job(id(1), 1, 150, 3);
    a.command(Command::Decode { job: computed.clone(), prefill: None, pull: None }).await;
    a.rest(computed.id).await;
    let turn = job(id(2), 1, 180, 12);
    let from = pull(&a, "prefill-0", 150);
    b.command(Command::Decode { job: turn.clone(), prefill: None, pull: from }).await;
    a.command(serve(&turn, 150, &b, "decode-0")).await;
    assert_eq!(pulled(&mut b, turn.id).await, (148, 148));
    let tokens: Vec<_> = b.rest(turn.id).await.iter().map(|token| token.token).collect();
    served(&mut a, turn.id.pull()).await;
    // The same in one place, and with nothing cached.
    let salt = CacheSalt::from_text("another");
    let alone = Job { id: id(3), salt, ..turn };
    a.command(Command::Decode { job: alone.clone(), prefill: None, pull: None }).await;
    assert_eq!(pulled(&mut a, alone.id).await, (0, 0));
    let expected: Vec<_> = a.rest(alone.id).await.iter().map(|token| token.token).collect();
    assert_eq!(tokens, expected);
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_is_the_source_for_the_prefill_of_the_next_turn() {
    let mut pair = Pair::start().await;
    let (mut prefill, mut decode) = pair.streams().await;
    compute(&mut decode, &job(id(1), 1, 40, 3)).await;
    let turn = job(id(2), 1, 70, 12);
    let from = Some(peer(&prefill, "prefill-0"));
    decode.command(Command::Decode { job: turn.clone(), prefill: from, pull: None }).await;
    decode.command(serve(&turn, 40, &prefill, "prefill-0")).await;
    prefill
        .command(Command::Prefill {
            job: turn.clone(),
            decode: peer(&decode, "decode-0"),
            pull: pull(&decode, "decode-0", 40),
        })
        .await;
    assert_eq!(pulled(&mut prefill, turn.id).await, (40, 40));
    let mut tokens = vec![prefill.token(turn.id).await.token];
    let rest = decode.rest(turn.id).await;
    tokens.extend(rest.iter().map(|token| token.token));
    assert_eq!(tokens, expected(&turn));
    // The decode node has the prefix: only what is new comes to it.
    let new = (70_usize.div_ceil(BLOCK_TOKENS) - 40 / BLOCK_TOKENS) as u32;
    assert_eq!(served(&mut prefill, turn.id).await, new);
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_source_does_not_have_is_computed() {
    let mut pair = Pair::start().await;
    let (mut a, mut b) = pair.streams().await;
    let job = job(id(1), 1, 41, 12);
    a.command(serve(&job, 20, &b, "decode-0")).await;
    let (retry, reason) = a.failure(job.id.pull()).await;
    assert_eq!((retry, &reason[..]), (Retry::OtherNode, "0 of 5 blocks are cached"));
    let pull = pull(&a, "prefill-0", 20);
    b.command(Command::Decode { job: job.clone(), prefill: None, pull }).await;
    // A coordinator that hears of the failure can end the wait.
    b.command(Command::Cancel(job.id.pull())).await;
    assert_eq!(pulled(&mut b, job.id).await, (0, 0));
    let tokens: Vec<_> = b.rest(job.id).await.iter().map(|token| token.token).collect();
    assert_eq!(tokens, expected(&job));
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_says_nothing_is_not_waited_for_for_long() {
    let mut pair = Pair::start().await;
    let (a, mut b) = pair.streams().await;
    let job = job(id(1), 1, 41, 12);
    let pull = pull(&a, "prefill-0", 20);
    b.command(Command::Decode { job: job.clone(), prefill: None, pull }).await;
    assert_eq!(pulled(&mut b, job.id).await, (0, 0));
    let tokens: Vec<_> = b.rest(job.id).await.iter().map(|token| token.token).collect();
    assert_eq!(tokens, expected(&job));
    pair.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_during_a_pull_frees_both_nodes() {
    let mut pair = Pair::start().await;
    let (mut a, b) = pair.streams().await;
    compute(&mut a, &job(id(1), 1, 200, 3)).await;
    for (request, source_first) in [(2, true), (3, false)] {
        let job = job(id(request), 1, 220, 12);
        let pull = pull(&a, "prefill-0", 200);
        b.command(Command::Decode { job: job.clone(), prefill: None, pull }).await;
        a.command(serve(&job, 200, &b, "decode-0")).await;
        if source_first {
            a.command(Command::Cancel(job.id.pull())).await;
        }
        b.command(Command::Cancel(job.id)).await;
        pair.idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_changes_its_role_and_its_mind_while_it_runs() {
    let mut pair = Pair::start().await;
    let (mut a, mut b) = pair.streams().await;
    let reports = async |node: &mut Joined, role: Role, draining: bool| loop {
        if let NodeEvent::Report(report) = node.any().await
            && (report.role, report.draining) == (role, draining)
        {
            return;
        }
    };
    a.command(Command::SetRole(Role::Decode)).await;
    b.command(Command::SetRole(Role::Prefill)).await;
    reports(&mut a, Role::Decode, false).await;
    reports(&mut b, Role::Prefill, false).await;
    // The other way round, then.
    let first = job(id(1), 1, 41, 12);
    let (from, to) = (Some(peer(&b, "decode-0")), peer(&a, "prefill-0"));
    a.command(Command::Decode { job: first.clone(), prefill: from, pull: None }).await;
    b.command(Command::Prefill { job: first.clone(), decode: to, pull: None }).await;
    let mut tokens = vec![b.token(first.id).await.token];
    tokens.extend(a.rest(first.id).await.iter().map(|token| token.token));
    assert_eq!(tokens, expected(&first));

    a.command(Command::SetDraining(true)).await;
    reports(&mut a, Role::Decode, true).await;
    let refused = job(id(2), 1, 10, 3);
    a.command(Command::Decode { job: refused.clone(), prefill: None, pull: None }).await;
    assert_eq!(a.failure(refused.id).await.0, Retry::OtherNode);
    a.command(Command::SetDraining(false)).await;
    reports(&mut a, Role::Decode, false).await;
    compute(&mut a, &job(id(3), 1, 10, 3)).await;
    pair.idle().await;
}
