use std::convert::Infallible;

use proptest::prelude::*;

use super::*;
use crate::device::A800X8_70B;
use crate::replay::{Disturbance, PolicyKind, Settings, replay};
use crate::trace::{Request, Trace};

/// The best pair by looking at all of them, and how many there are.
fn exhaustive(
    most: usize,
    prices: Prices,
    meets: impl Fn(usize, usize) -> bool,
) -> [Option<f64>; 2] {
    let all = (0..=most).flat_map(|p| (1..=most).map(move |d| (p, d)));
    let met: Vec<_> = all.filter(|&(p, d)| meets(p, d)).collect();
    let least = |cost: &dyn Fn(usize, usize) -> f64| {
        met.iter().map(|&(p, d)| cost(p, d)).min_by(f64::total_cmp)
    };
    [least(&|p, d| (p + d) as f64), least(&|p, d| prices.of(p, d))]
}

fn found(plan: &Plan, prices: Prices) -> [Option<f64>; 2] {
    [
        plan.smallest.map(|trial| (trial.prefill + trial.decode) as f64),
        plan.cheapest.map(|trial| prices.of(trial.prefill, trial.decode)),
    ]
}

proptest! {
    #[test]
    fn as_good_as_looking_at_every_pair(
        most in 1_usize..20,
        // Decode nodes needed with 0, 1, 2, … prefill nodes: never more with more of them.
        mut needed in prop::collection::vec(1_usize..25, 21),
        (prefill, decode) in (0.1..5.0_f64, 0.1..5.0_f64),
    ) {
        needed.sort_unstable_by(|a, b| b.cmp(a));
        let meets = |p: usize, d: usize| d >= needed[p];
        let prices = Prices { prefill, decode };
        let mut count = 0;
        let plan = search(0, most, prices, |p, d| {
            count += 1;
            let times = Trial { prefill: p, decode: d, ttft_ms: 0.0, tpot_ms: 0.0, rejected: 0, meets: meets(p, d) };
            Ok::<_, Infallible>(times)
        }).unwrap();
        prop_assert_eq!(found(&plan, prices), exhaustive(most, prices, meets));
        prop_assert_eq!(count, plan.trials.len());
        let nodes = plan.smallest.map_or(1, |trial| trial.prefill + trial.decode);
        prop_assert!(count <= 2 * most + 16, "{count} trials for {most}");
        let even = Prices { prefill: 1.0, decode: 1.0 };
        let plan = search(0, most, even, |p, d| {
            let times = Trial { prefill: p, decode: d, ttft_ms: 0.0, tpot_ms: 0.0, rejected: 0, meets: meets(p, d) };
            Ok::<_, Infallible>(times)
        }).unwrap();
        let far = plan.trials.iter().filter(|trial| trial.prefill.max(trial.decode) > 4 * nodes);
        prop_assert!(plan.smallest.is_none() || far.count() == 0);
    }
}

#[test]
fn a_small_trace_is_planned_as_by_trying_everything() {
    let request = |at: u32| Request {
        arrival_ms: f64::from(at) * 400.0,
        input_tokens: 6000 + at % 7 * 1000,
        output_tokens: 60 + at % 5 * 40,
        blocks: Box::default(),
    };
    let trace =
        Trace { block_tokens: 512, requests: (0..60).map(request).collect(), unique_blocks: 0 };
    let targets = Targets { ttft_ms: 3000.0, tpot_ms: 20.5, percentile: Percentile::P90 };
    let prices = Prices { prefill: 1.0, decode: 3.0 };
    let trial = |prefill_nodes, decode_nodes| {
        let settings = Settings {
            prefill_nodes,
            decode_nodes,
            cache_blocks: 10_000,
            prefill_cost: A800X8_70B.prefill_cost,
            decode_cost: A800X8_70B.decode_cost,
            link: None,
            deadline_ms: None,
            disturbance: Disturbance::default(),
            report_ms: 1000.0,
            seed: 1,
        };
        let outcome = replay(&settings, &trace, &mut *PolicyKind::RoundRobin.build(1))?;
        Ok(targets.judge(prefill_nodes, decode_nodes, &outcome.summary(&settings, &trace)))
    };
    let plan = search(1, 6, prices, trial).unwrap();
    let all = exhaustive(6, prices, |p, d| {
        if p == 0 {
            return false;
        }
        let trial: Result<Trial, crate::replay::Stuck> = trial(p, d);
        trial.unwrap().meets
    });
    assert_eq!(found(&plan, prices), all);
    assert!(plan.smallest.is_some_and(|trial| trial.prefill > 1) && plan.trials.len() < 42);
}
