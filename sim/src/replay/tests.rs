//! Whole replays: figures worked out by hand, and what holds for any policy.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::run::play;
use super::*;
use crate::trace::{Request, Trace};

const BLOCK: u32 = 100;

fn request(arrival_ms: f64, input_tokens: u32, output_tokens: u32, blocks: &[u32]) -> Request {
    Request { arrival_ms, input_tokens, output_tokens, blocks: blocks.into() }
}

fn trace(requests: Vec<Request>) -> Trace {
    Trace { block_tokens: BLOCK, requests, unique_blocks: 1000 }
}

/// A token takes 1 ms to compute, a step 10 ms and 1 ms per sequence.
fn settings(prefill_nodes: usize, decode_nodes: usize) -> Settings {
    Settings {
        prefill_nodes,
        decode_nodes,
        cache_blocks: 100,
        prefill_cost: PrefillCost { start_ms: 20.0, token_ms: 1.0, square_ms: 0.0 },
        decode_cost: DecodeCost { step_ms: 10.0, sequence_ms: 1.0, kv_token_ms: 0.0 },
        link: None,
        deadline_ms: None,
        disturbance: Disturbance::default(),
        report_ms: 1000.0,
        seed: 1,
    }
}

/// Sends request `i` where the `i`-th entry says, at once, and writes down what it hears.
struct Scripted {
    script: Vec<Dispatch>,
    arrived: VecDeque<usize>,
    heard: Vec<(f64, Node, News)>,
}

impl Scripted {
    fn new(script: &[(Option<usize>, Option<usize>)]) -> Self {
        let dispatch =
            |(request, &(prefill, decode))| Dispatch { request, prefill, decode, pull: None };
        let script = script.iter().enumerate().map(dispatch).collect();
        Self { script, arrived: VecDeque::new(), heard: Vec::new() }
    }
}

impl Policy for Scripted {
    fn arrive(&mut self, _: f64, request: usize, _: &Cluster<'_>) -> Admission {
        self.arrived.push_back(request);
        Admission::Taken
    }

    fn next(&mut self, _: f64, _: &Cluster<'_>) -> Option<Decision> {
        Some(Decision::Dispatch(self.script[self.arrived.pop_front()?]))
    }

    fn heard(&mut self, now_ms: f64, node: Node, news: &News) {
        self.heard.push((now_ms, node, news.clone()));
    }
}

fn times(outcome: &Outcome) -> Vec<(f64, f64)> {
    let times = |record: &Record| (record.first_token_ms.unwrap(), record.end_ms.unwrap());
    outcome.records.iter().map(times).collect()
}

#[test]
fn prefills_queue_and_reuse_what_is_cached() {
    let trace = trace(vec![
        request(0.0, 250, 5, &[0, 1, 2]),   // 20 + 250
        request(100.0, 300, 5, &[0, 1, 3]), // from 270: 20 + 100
        request(150.0, 200, 5, &[0, 1]),    // from 390: 20 + 1, for one token is always computed
        request(160.0, 50, 5, &[9]),        // on the other node: 20 + 50
    ]);
    let mut policy =
        Scripted::new(&[(Some(0), None), (Some(0), None), (Some(0), None), (Some(1), None)]);
    let settings = settings(2, 0);
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    let expected = [270.0, 390.0, 411.0, 230.0];
    assert_eq!(times(&outcome), expected.map(|ms| (ms, ms)));
    let summary = outcome.summary(&settings, &trace);
    assert_eq!((summary.completed, summary.rejected), (4, 0));
    assert_eq!(summary.hit_blocks_ratio, 4.0 / 9.0);
    assert_eq!(summary.hit_tokens_ratio, 399.0 / 800.0);
    assert_eq!(summary.ttft_ms.mean, (270.0 + 290.0 + 261.0 + 70.0) / 4.0);
    assert_eq!(summary.tpot_ms, Distribution::default());
}

#[test]
fn slow_nodes_are_slow() {
    let trace = trace(vec![request(0.0, 50, 5, &[]), request(0.0, 50, 5, &[])]);
    let mut settings = settings(2, 0);
    (settings.disturbance.slow_nodes, settings.disturbance.slow_factor) = (1, 3.0);
    let mut policy = Scripted::new(&[(Some(0), None), (Some(1), None)]);
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(times(&outcome), [(70.0, 70.0), (210.0, 210.0)]);
}

#[test]
fn sequences_join_between_steps() {
    let trace = trace(vec![
        request(0.0, 80, 4, &[]),  // first token at 100; steps end at 111, 122, 134
        request(15.0, 80, 3, &[]), // first token at 115; steps from 122 end at 134, 145
        request(17.0, 80, 1, &[]), // one token, which is the first
    ]);
    let mut policy = Scripted::new(&[(Some(0), Some(0)), (Some(1), Some(0)), (Some(2), Some(0))]);
    let settings = settings(3, 1);
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(times(&outcome), [(100.0, 134.0), (115.0, 145.0), (117.0, 117.0)]);
    let summary = outcome.summary(&settings, &trace);
    assert_eq!(summary.tpot_ms.mean, (34.0 / 3.0 + 15.0) / 2.0);
    assert_eq!((summary.remote_ratio, summary.kv_moved_ratio), (1.0, 1.0));
}

#[test]
fn a_decode_node_computes_prompts_in_chunks() {
    let trace = trace(vec![
        // Chunks of 512, 512 and 5 tokens, the last hidden by the step: 512, 1024, 1034.
        request(0.0, 1029, 2, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        // Waits for room until the first has ended at 1045, and finds ten blocks: 29 tokens.
        request(1.0, 1029, 2, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]),
    ]);
    let mut policy = Scripted::new(&[(None, Some(0)), (None, Some(0))]);
    let mut settings = settings(0, 1);
    settings.cache_blocks = 15; // one at a time
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(times(&outcome), [(1034.0, 1045.0), (1074.0, 1085.0)]);
    assert_eq!(outcome.records[1].cached_tokens, 1000);
    assert_eq!(outcome.summary(&settings, &trace).remote_ratio, 0.0);
}

#[test]
fn a_hand_over_that_prefill_does_not_hide_delays_the_second_token() {
    let trace = trace(vec![request(0.0, 80, 2, &[]), request(1000.0, 80, 2, &[])]);
    let mut policy = Scripted::new(&[(Some(0), Some(0)), (Some(0), Some(0))]);
    let mut settings = settings(1, 1);
    // 8e6 bytes, at 1e5 per ms as long as 80 ms, then at 4e4 as long as 200.
    settings.link = Some(Link { gbps: 0.8, bytes_per_token: 1e5 });
    let fast = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(times(&fast)[0], (100.0, 111.0));
    settings.link = Some(Link { gbps: 0.32, bytes_per_token: 1e5 });
    let mut policy = Scripted::new(&[(Some(0), Some(0)), (Some(0), Some(0))]);
    let slow = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(times(&slow), [(100.0, 211.0), (1100.0, 1211.0)]);
    let arrived = (
        Node::Decode(0),
        News::Transferred { request: 0, from: Node::Prefill(0), tokens: 80, ms: 200.0 },
    );
    assert!(
        policy
            .heard
            .iter()
            .any(|(ms, node, news)| (*ms, (*node, news.clone())) == (200.0, arrived.clone()))
    );
}

#[test]
fn a_pulled_prefix_is_not_computed() {
    let trace = trace(vec![
        request(0.0, 400, 1, &[0, 1, 2, 3]), // 420
        request(500.0, 500, 1, &[0, 1, 2, 3, 4]),
        request(500.0, 300, 1, &[0, 1, 7]), // behind it: 20 + 100
    ]);
    let mut policy = Scripted::new(&[(Some(0), None), (Some(1), None), (Some(1), None)]);
    policy.script[1].pull = Some((Node::Prefill(0), 3));
    let mut settings = settings(2, 0);
    settings.link = Some(Link { gbps: 0.8, bytes_per_token: 1e4 }); // 300 tokens: 30 ms
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    // 500 + 30 + 20 + 200
    assert_eq!(times(&outcome)[1..], [(750.0, 750.0), (870.0, 870.0)]);
    assert_eq!(outcome.records[1].pulled_tokens, 300);
    assert_eq!(outcome.summary(&settings, &trace).pulled_ratio, Some(300.0 / 1200.0));
}

#[test]
fn news_of_caches_is_late_and_that_of_requests_is_not() {
    let trace = trace(vec![request(0.0, 100, 1, &[0]), request(900.0, 100, 1, &[1])]);
    let mut policy = Scripted::new(&[(Some(0), None), (Some(0), None)]);
    let mut settings = settings(1, 0);
    settings.disturbance.event_lag_ms = 50.0;
    replay(&settings, &trace, &mut policy).unwrap();
    let first: Vec<_> = policy.heard.iter().take(3).map(|(ms, _, news)| (*ms, news)).collect();
    let stored = News::Cache(Changes { stored: vec![0], evicted: vec![] });
    let done = News::PrefillDone { request: 0, cached_tokens: 0, service_ms: 120.0 };
    assert_eq!(first, [(120.0, &done), (120.0, &News::Ended { request: 0 }), (170.0, &stored)]);
}

#[test]
fn what_no_node_can_hold_is_refused() {
    let trace = trace(vec![request(0.0, 200, 50, &[0, 1]), request(0.0, 200, 101, &[0, 1])]);
    let mut settings = settings(1, 1);
    settings.cache_blocks = 3;
    let mut policy = Scripted::new(&[(Some(0), Some(0)), (Some(0), Some(0))]);
    let outcome = replay(&settings, &trace, &mut policy).unwrap();
    assert_eq!(outcome.records.iter().map(|r| r.refused).collect::<Vec<_>>(), [false, true]);
    assert_eq!(outcome.summary(&settings, &trace).rejected, 1);
}

#[test]
fn a_policy_that_never_decides_is_named() {
    struct Idle;
    impl Policy for Idle {
        fn arrive(&mut self, _: f64, _: usize, _: &Cluster<'_>) -> Admission {
            Admission::Taken
        }
        fn next(&mut self, _: f64, _: &Cluster<'_>) -> Option<Decision> {
            None
        }
    }
    let trace = trace(vec![request(0.0, 200, 50, &[]), request(5.0, 200, 50, &[])]);
    assert_eq!(replay(&settings(1, 0), &trace, &mut Idle).unwrap_err().0, 2);
}

/// Holds requests for a while, places them anywhere, pulls from anywhere, refuses some.
struct Erratic {
    random: fastrand::Rng,
    held: Vec<usize>,
    wake_ms: Option<f64>,
}

impl Policy for Erratic {
    fn arrive(&mut self, now_ms: f64, request: usize, _: &Cluster<'_>) -> Admission {
        if self.random.u8(..10) == 0 {
            return Admission::Refused;
        }
        self.held.push(request);
        self.wake_ms = Some(now_ms + 200.0 * self.random.f64());
        Admission::Taken
    }

    fn next(&mut self, now_ms: f64, cluster: &Cluster<'_>) -> Option<Decision> {
        if self.wake_ms.is_some_and(|wake_ms| wake_ms > now_ms) {
            return None;
        }
        let Some(request) = self.held.pop() else {
            self.wake_ms = None;
            return None;
        };
        if self.random.u8(..10) == 0 {
            return Some(Decision::Refuse(request));
        }
        let (p, d) = (cluster.settings().prefill_nodes, cluster.settings().decode_nodes);
        let local = d > 0 && (p == 0 || self.random.bool());
        let nodes: Vec<Node> = cluster.nodes().collect();
        let source = nodes[self.random.usize(..nodes.len())];
        Some(Decision::Dispatch(Dispatch {
            request,
            prefill: (!local).then(|| self.random.usize(..p)),
            decode: (d > 0).then(|| self.random.usize(..d)),
            pull: self.random.bool().then(|| (source, self.random.usize(..8))),
        }))
    }

    fn wake(&self) -> Option<f64> {
        self.wake_ms
    }
}

/// Block `c * 10 + i` is the i-th of conversation `c`.
fn any_request() -> impl Strategy<Value = (f64, u32, u32, u32)> {
    (0.0..100.0_f64, 1_u32..900, 1_u32..200, 0_u32..6)
}

proptest! {
    #[test]
    fn every_request_ends_once_and_gives_back_what_it_used(
        requests in prop::collection::vec(any_request(), 1..60),
        (prefill, decode) in (0_usize..4, 0_usize..4),
        cache_blocks in 12_usize..40,
        (gbps, lag, noise, seed) in (0.01..1.0_f64, 0.0..500.0_f64, 0.0..1.0_f64, any::<u64>()),
    ) {
        prop_assume!(prefill + decode > 0);
        let mut now = 0.0;
        let requests = requests.into_iter().map(|(gap, input, output, conversation)| {
            now += gap;
            let blocks: Vec<u32> = (0..input.div_ceil(BLOCK)).map(|i| conversation * 10 + i).collect();
            request(now, input, output, &blocks)
        });
        let trace = trace(requests.collect());
        let mut settings = settings(prefill, decode);
        settings.cache_blocks = cache_blocks;
        settings.link = (seed % 3 > 0).then_some(Link { gbps, bytes_per_token: 1e5 });
        settings.disturbance.event_lag_ms = lag;
        settings.disturbance.noise = noise;
        settings.seed = seed;
        let policy = || Erratic { random: fastrand::Rng::with_seed(seed), held: vec![], wake_ms: None };
        let cluster = play(&settings, &trace, &mut policy()).unwrap();
        for node in &cluster.prefill {
            prop_assert!(node.cache.used() <= cache_blocks && node.cache.active() == 0);
            prop_assert!(node.queue.is_empty() && node.queued_tokens == 0);
            prop_assert!(node.queued_ms.abs() < 1e-6);
        }
        for node in &cluster.decode {
            prop_assert!(node.cache.used() <= cache_blocks && node.cache.active() == 0);
            prop_assert!(node.waiting.is_empty());
            prop_assert_eq!((node.promised_tokens, node.waiting_tokens), (0, 0));
        }
        let records: Vec<Record> = cluster.jobs.into_iter().map(|job| job.record).collect();
        for record in &records {
            prop_assert_eq!(record.refused, record.end_ms.is_none());
            prop_assert_eq!(record.first_token_ms.is_some(), record.end_ms.is_some());
            if let (Some(first), Some(end)) = (record.first_token_ms, record.end_ms) {
                prop_assert!(record.arrival_ms < first && first <= end);
            }
        }
        let again = replay(&settings, &trace, &mut policy()).unwrap();
        prop_assert_eq!(records, again.records);
    }

    #[test]
    fn the_baselines_decide_about_everything(
        requests in prop::collection::vec(any_request(), 1..60),
        seed in any::<u64>(),
        decode in 0_usize..3,
    ) {
        use PolicyKind as P;
        let requests = requests.into_iter().enumerate().map(|(at, (_, input, output, conversation))| {
            let blocks: Vec<u32> = (0..input.div_ceil(BLOCK)).map(|i| conversation * 10 + i).collect();
            request(at as f64 * 30.0, input, output, &blocks)
        });
        let trace = trace(requests.collect());
        let mut settings = settings(3, decode);
        settings.seed = seed;
        for kind in [P::Random, P::RoundRobin, P::LeastLoaded, P::Session, P::Prefix, P::Sticky, P::MinTtft] {
            let summary = replay(&settings, &trace, &mut *kind.build(seed)).unwrap().summary(&settings, &trace);
            prop_assert_eq!(summary.completed, trace.requests.len());
        }
    }
}
