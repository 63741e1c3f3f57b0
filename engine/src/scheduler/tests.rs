use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use baton_proto::embedding::Pooling;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::RequestId;
use baton_proto::message::{BlockCounts, NodeFinish};
use baton_proto::sampling::SamplingParams;
use proptest::prelude::*;

use super::*;
use crate::forward::Wanted;
use crate::sampler::Sampled;

const BLOCK_TOKENS: usize = 4;

fn limits() -> Limits {
    Limits {
        block_tokens: BLOCK_TOKENS,
        kv_blocks: 12,
        max_batch_tokens: 10,
        max_sequences: 4,
        max_model_len: 40,
        vocab_size: 8,
    }
}

fn id(request: u128) -> TransferId {
    TransferId { request: RequestId(request), attempt: 1 }
}

fn job(request: u128, tokens: Vec<u32>, max_tokens: u32) -> Job {
    let sampling = SamplingParams { max_tokens, ..SamplingParams::default() };
    let prompt_tokens = tokens.len();
    let salt = CacheSalt::default();
    Job {
        id: id(request),
        tokens: tokens.into(),
        prompt_tokens,
        sampling,
        salt,
        deadline: None,
        trace: None,
    }
}

/// The token of a fake model: a function of what precedes it.
fn next_token(tokens: &[u32]) -> u32 {
    tokens.iter().fold(7, |state: u32, token| state.wrapping_mul(31).wrapping_add(*token)) / 3 % 8
}

/// A scheduler with a device whose memory holds tokens.
struct Rig {
    scheduler: Scheduler,
    device: Device,
    /// Steps that may be in flight at once.
    depth: usize,
    now: Instant,
    steps: Vec<Plan>,
    events: Vec<Event>,
    masks: Masks,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        Self::deep(limits, 1, false)
    }

    fn deep(limits: Limits, depth: usize, lazy: bool) -> Self {
        let device = Device::new(limits.kv_blocks, lazy);
        let scheduler = Scheduler::new(limits, ModelRoot([1; 16]));
        let (steps, events) = (Vec::new(), Vec::new());
        let masks = Masks::default();
        Self { scheduler, device, depth, now: Instant::now(), steps, events, masks }
    }

    fn add(&mut self, job: Job, kind: Kind) {
        self.scheduler.add(job, kind, self.now);
    }

    /// Launches the next step and ends the oldest one. False if there was nothing to do.
    fn step(&mut self) -> bool {
        let plan = self.scheduler.plan(self.now);
        self.scheduler.check();
        self.masks.check(&self.scheduler, &plan);
        self.see();
        let launches = !plan.chunks.is_empty();
        if launches {
            self.device.launch(&self.scheduler, &plan);
        }
        self.steps.push(plan);
        let flying = self.device.flying.len();
        if flying == self.depth || flying > 0 && !launches {
            self.finish();
        }
        self.see();
        flying > 0
    }

    fn see(&mut self) {
        let events = self.scheduler.take_events();
        for event in &events {
            let Event::Admitted { kind, lease, cached_blocks, .. } = event else { continue };
            if matches!(kind, Kind::Import | Kind::Fetch) {
                // A transfer may write at once, and anything.
                for position in cached_blocks * BLOCK_TOKENS..lease.len() * BLOCK_TOKENS {
                    *self.device.slot(lease, position) = GARBAGE;
                }
            }
        }
        self.events.extend(events);
    }

    fn finish(&mut self) {
        let (plan, (tokens, pooled)) = self.device.finish();
        let sampled = |token: Option<u32>| token.map(|token| Sampled { token, logprobs: None });
        let outcome = Outcome {
            sampled: tokens.into_iter().map(sampled).collect(),
            prompt_logprobs: vec![Vec::new(); plan.chunks.len()],
            pooled,
            took: Duration::from_millis(1),
        };
        self.scheduler.complete(&plan, outcome);
        self.scheduler.check();
    }

    fn run(&mut self) {
        let steps = (0..10_000).take_while(|_| self.step()).count();
        assert!(steps < 10_000, "it comes to an end");
    }

    fn tokens(&self, id: TransferId) -> Vec<u32> {
        let tokens = self.events.iter().filter_map(|event| match event {
            Event::Tokens(tokens) => Some(tokens),
            _ => None,
        });
        let tokens: Vec<_> = tokens.flatten().filter(|token| token.id == id).collect();
        assert!(tokens.iter().enumerate().all(|(i, token)| token.position as usize == i));
        tokens.iter().map(|token| token.token).collect()
    }

    fn embeddings(&self, id: TransferId) -> Vec<&[f32]> {
        let embedded = self.events.iter().filter_map(|event| match event {
            Event::Embedded { id: its, values, .. } if *its == id => Some(&values[..]),
            _ => None,
        });
        embedded.collect()
    }

    fn ends(&self, id: TransferId) -> usize {
        let ends = |event: &&Event| match event {
            Event::Ended { id: ended } | Event::Failed { id: ended, .. } => *ended == id,
            _ => false,
        };
        self.events.iter().filter(ends).count()
    }
}

mod device;
mod embed;
mod guided;
mod pull;
mod random;

use device::{Device, GARBAGE};
use guided::Masks;

fn continuation(tokens: &[u32], count: usize) -> Vec<u32> {
    let mut all = tokens.to_vec();
    for _ in 0..count {
        all.push(next_token(&all));
    }
    all.split_off(tokens.len())
}

fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (seed * 3 + i * i) % 8).collect()
}

#[test]
fn decode_goes_first_and_prompts_follow_in_chunks_within_the_budget() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(1, 3), 20), Kind::Local);
    rig.step();
    rig.add(job(2, prompt(2, 12), 2), Kind::Local);
    rig.add(job(3, prompt(3, 2), 2), Kind::Local);
    for _ in 0..2 {
        rig.step();
    }
    let chunks = |plan: &Plan| -> Vec<(u128, usize, usize, bool)> {
        let chunk = |c: &PlannedChunk| (c.id.request.0, c.start, c.tokens, c.samples);
        plan.chunks.iter().map(chunk).collect()
    };
    assert_eq!(chunks(&rig.steps[0]), [(1, 0, 3, true)]);
    assert_eq!(chunks(&rig.steps[1]), [(1, 3, 1, true), (2, 0, 9, false)]);
    let third = [(1, 4, 1, true), (2, 9, 3, true), (3, 0, 2, true)];
    assert_eq!(chunks(&rig.steps[2]), third);
}

#[test]
fn a_prefill_limit_only_makes_chunks_smaller() {
    let mut rig = Rig::new(limits());
    rig.scheduler.set_prefill_limit(5);
    rig.add(job(1, prompt(1, 12), 3), Kind::Local);
    rig.run();
    let sizes: Vec<usize> = rig.steps.iter().map(Plan::prefill_tokens).collect();
    assert_eq!(sizes, [5, 5, 2, 0, 0, 0]);
    assert_eq!(rig.tokens(id(1)), continuation(&prompt(1, 12), 3));
}

#[test]
fn a_second_prompt_computes_only_what_the_first_one_left_out() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(1, 8), 6), Kind::Local);
    rig.run();
    // The answer's blocks are cached as well; the last token is always computed.
    let mut longer = prompt(1, 8);
    longer.extend(rig.tokens(id(1)));
    assert_eq!(longer.len(), 14);
    rig.add(job(2, longer.clone(), 1), Kind::Local);
    rig.add(job(3, longer[..8].to_vec(), 1), Kind::Local);
    rig.run();
    let cached = |wanted| {
        let admitted = |event: &Event| match event {
            Event::Admitted { id, cached_blocks, .. } if *id == wanted => Some(*cached_blocks),
            _ => None,
        };
        rig.events.iter().find_map(admitted)
    };
    assert_eq!([1, 2, 3].map(|n| cached(id(n))), [Some(0), Some(3), Some(1)]);
    let other_salt = Job { salt: CacheSalt::from_text("x"), ..job(4, longer, 1) };
    rig.add(other_salt, Kind::Local);
    rig.run();
    assert_eq!(rig.steps.iter().rev().nth(1).map(Plan::tokens), Some(4), "14 in chunks of 10");
}

#[test]
fn preempted_sequences_emit_every_token_once() {
    // Three sequences that end with 7 blocks each, in a pool of 12.
    let mut rig = Rig::new(limits());
    for n in 1..=3 {
        rig.add(job(n.into(), prompt(n, 8), 20), Kind::Local);
    }
    rig.run();
    assert!(rig.steps.iter().any(|plan| plan.preempted.contains(&id(3))));
    assert!(!rig.steps.iter().any(|plan| plan.preempted.contains(&id(1))), "the first one never");
    for n in 1..=3_u32 {
        assert_eq!(rig.tokens(id(n.into())), continuation(&prompt(n, 8), 20));
        assert_eq!(rig.ends(id(n.into())), 1);
    }
}

#[test]
fn nobody_overtakes_who_waits_for_room() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(1, 24), 4), Kind::Local);
    rig.add(job(2, prompt(2, 32), 1), Kind::Import);
    rig.add(job(3, prompt(3, 1), 1), Kind::Import);
    rig.step();
    assert_eq!((rig.scheduler.admitted(), rig.scheduler.waiting()), (1, 2));
    while rig.ends(id(1)) == 0 {
        assert!(rig.step());
    }
    rig.step();
    assert_eq!((rig.scheduler.admitted(), rig.scheduler.waiting()), (2, 0));
}

#[test]
fn a_late_sequence_fails_and_frees_its_blocks() {
    let mut rig = Rig::new(limits());
    let late = |n, ms| Job { deadline: Some(Duration::from_millis(ms)), ..job(n, prompt(1, 9), 9) };
    rig.add(late(1, 50), Kind::Import);
    rig.add(late(2, 60), Kind::Local);
    rig.step();
    assert_eq!(rig.scheduler.next_deadline(), Some(rig.now + Duration::from_millis(50)));
    rig.now += Duration::from_millis(60);
    rig.step();
    for n in [1, 2] {
        let (reason, retry) = ("deadline".to_owned(), Retry::Never);
        assert!(rig.events.contains(&Event::Failed { id: id(n), reason, retry }));
    }
    // The lease of the import is still out.
    assert_eq!((rig.scheduler.blocks().active, rig.scheduler.blocks().leased), (0, 3));
    assert!(rig.scheduler.end_told(id(1)) && !rig.scheduler.knows(id(2)));
    rig.scheduler.lease_returned(id(1));
    assert_eq!(rig.scheduler.blocks().leased, 0);
    assert_eq!(rig.ends(id(1)), 1);
}

#[test]
fn an_import_is_cached_only_when_its_kv_has_come() {
    let first = FirstToken { token: 5, logprobs: None, finish: None };
    for complete in [false, true] {
        let mut rig = Rig::new(limits());
        rig.add(job(1, prompt(1, 9), 3), Kind::Import);
        assert!(!rig.step(), "there is nothing to compute");
        assert_eq!(rig.scheduler.blocks().leased, 3);
        if complete {
            rig.scheduler.imported(id(1), &first);
            assert_eq!(rig.scheduler.blocks().active, 3);
        }
        rig.scheduler.lease_returned(id(1));
        rig.scheduler.cancel(id(1));
        rig.step();
        assert_eq!(rig.ends(id(1)), 1);
        assert_eq!(rig.scheduler.cached_hashes().len(), if complete { 2 } else { 0 });
    }
}

#[test]
fn an_import_goes_on_after_its_first_token() {
    let mut rig = Rig::new(limits());
    let all = continuation(&prompt(1, 9), 3);
    rig.add(job(1, prompt(1, 9), 3), Kind::Import);
    rig.step();
    let Some(Event::Admitted { lease, .. }) = rig.events.first() else { panic!("no lease") };
    for (position, token) in prompt(1, 9).into_iter().enumerate() {
        *rig.device.slot(lease, position) = token;
    }
    rig.scheduler.imported(id(1), &FirstToken { token: all[0], logprobs: None, finish: None });
    rig.scheduler.lease_returned(id(1));
    rig.run();
    let Some(Event::Tokens(tokens)) = rig.events.iter().find(|e| matches!(e, Event::Tokens(_)))
    else {
        panic!("no tokens")
    };
    assert_eq!((tokens[0].position, tokens[0].token, tokens[0].prefill), (1, all[1], None));
    assert_eq!(rig.steps.iter().map(Plan::tokens).sum::<usize>(), 2);

    rig.add(job(2, prompt(2, 9), 3), Kind::Import);
    rig.step();
    rig.scheduler.imported(id(2), &FirstToken { token: 8, logprobs: None, finish: None });
    rig.step();
    assert!(matches!(rig.events.last(), Some(Event::Failed { retry: Retry::OtherNode, .. })));
}

#[test]
fn an_import_that_has_no_room_to_go_on_fails() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(1, 39), 9), Kind::Import);
    rig.step();
    rig.scheduler.imported(id(1), &FirstToken { token: 1, logprobs: None, finish: None });
    rig.scheduler.lease_returned(id(1));
    rig.step();
    assert!(matches!(rig.events.last(), Some(Event::Failed { retry: Retry::OtherNode, .. })));
    assert_eq!(rig.scheduler.blocks().active, 0);
}

#[test]
fn sequences_end_as_their_parameters_say() {
    let answer = continuation(&prompt(1, 5), 6);
    let end = answer[2];
    let place = answer.iter().position(|token| *token == end).unwrap();
    type Change = Box<dyn Fn(&mut SamplingParams)>;
    let cases: [(Change, usize, NodeFinish); 5] = [
        (Box::new(move |p| p.eos_token_ids = vec![end]), place + 1, NodeFinish::EndOfSequence),
        (Box::new(move |p| p.stop_token_ids = vec![end]), place + 1, NodeFinish::StopToken(end)),
        (
            Box::new(move |p| (p.eos_token_ids, p.min_tokens) = (vec![end], 9)),
            9,
            NodeFinish::Length,
        ),
        (Box::new(|p| p.max_tokens = 4), 4, NodeFinish::Length),
        (Box::new(|p| p.max_tokens = 100), 35, NodeFinish::Length),
    ];
    for (change, length, finish) in cases {
        let mut rig = Rig::new(limits());
        let mut job = job(1, prompt(1, 5), 9);
        change(&mut job.sampling);
        rig.add(job, Kind::Local);
        rig.run();
        assert_eq!(rig.tokens(id(1)).len(), length);
        let last = rig.events.iter().rev().find_map(|event| match event {
            Event::Tokens(tokens) => tokens.last(),
            _ => None,
        });
        assert_eq!(last.unwrap().finish, Some(finish));
    }
}

#[test]
fn a_second_attempt_continues_positions_and_counts() {
    let answer = continuation(&prompt(1, 5), 6);
    let mut tokens = prompt(1, 5);
    tokens.extend(&answer[..4]);
    let mut rig = Rig::new(limits());
    rig.add(Job { prompt_tokens: 5, ..job(1, tokens, 6) }, Kind::Local);
    rig.run();
    let told: Vec<(u32, u32)> = rig.events.iter().fold(Vec::new(), |mut all, event| {
        if let Event::Tokens(tokens) = event {
            all.extend(tokens.iter().map(|token| (token.position, token.token)));
        }
        all
    });
    assert_eq!(told, [(4, answer[4]), (5, answer[5])]);
}

/// A prompt of whole blocks, computed and cached.
fn cached_prompt(rig: &mut Rig, request: u128, blocks: usize) -> Vec<u32> {
    let tokens = prompt(1, blocks * BLOCK_TOKENS);
    rig.add(job(request, tokens.clone(), 1), Kind::Local);
    rig.run();
    rig.events.clear();
    tokens
}

fn failure(rig: &Rig) -> &str {
    match &rig.events[..] {
        [Event::Failed { reason, .. }] => reason,
        other => panic!("expected a failure, not {other:?}"),
    }
}

#[test]
fn a_cached_prefix_is_served_and_cannot_be_evicted_meanwhile() {
    let mut rig = Rig::new(limits());
    let tokens = cached_prompt(&mut rig, 1, 3);
    rig.add(job(2, tokens[..9].to_vec(), 1), Kind::Serve);
    rig.step();
    let Event::Admitted { kind: Kind::Serve, lease, cached_blocks: 2, .. } = &rig.events[0] else {
        panic!("{:?}", rig.events);
    };
    assert_eq!((lease.len(), rig.scheduler.blocks().leased), (2, 2), "full blocks only");
    // All other blocks are wanted elsewhere.
    rig.add(job(3, prompt(2, 38), 1), Kind::Local);
    rig.run();
    let ends = rig.ends(id(3));
    rig.scheduler.cancel(id(2));
    rig.scheduler.lease_returned(id(2));
    rig.run();
    assert_eq!((ends, rig.ends(id(3)), rig.ends(id(2))), (1, 1, 1));
}

#[test]
fn a_prompt_is_charged_its_share_of_the_steps() {
    let mut rig = Rig::new(limits());
    // Steps of 1 ms; the first one has the 8 tokens of one prompt and 2 of the other.
    rig.add(job(1, prompt(1, 8), 1), Kind::Local);
    rig.add(job(2, prompt(2, 4), 1), Kind::Export);
    rig.run();
    let took = |wanted: u128| {
        let tokens = rig.events.iter().filter_map(|event| match event {
            Event::Tokens(tokens) => Some(tokens),
            _ => None,
        });
        let mut tokens = tokens.flatten().filter(|token| token.id == id(wanted));
        tokens.next().and_then(|token| token.prefill).expect("told with the first token")
    };
    assert_eq!(took(1), Duration::from_micros(800));
    assert_eq!(took(2), Duration::from_micros(1200));
}

#[test]
fn a_block_replaced_by_an_equal_one_is_kept_for_the_step_that_reads_it() {
    let mut rig = Rig::deep(limits(), 2, true);
    // Both fit into one step, so neither finds the other's block in the cache.
    for n in [1, 2] {
        rig.add(job(n, prompt(1, 5), 5), Kind::Local);
    }
    rig.step();
    rig.step();
    assert_eq!(rig.scheduler.cached_hashes().len(), 1);
    rig.add(job(3, prompt(2, 24), 1), Kind::Import);
    rig.run();
    for n in [1, 2] {
        assert_eq!(rig.tokens(id(n)), continuation(&prompt(1, 5), 5));
    }
}
