//! The choice against trying everything, and what it must do in plain cases.

use proptest::prelude::*;

use super::*;
use crate::testing::node;

const DEMAND: Demand =
    Demand { tokens: 1000, token_bytes: 1000, blocks: 63, local_prefill: LocalPrefill::Auto };

fn idle(node: &NodeId) -> Candidate<'_> {
    Candidate {
        node,
        cached_tokens: 0,
        queued_tokens: 0,
        sequences: 0,
        tokens_per_second: 5000.0,
        step_ms: 10.0,
        room: 1000,
        total_blocks: 1000,
    }
}

fn names() -> Vec<NodeId> {
    (0..8).map(|n| node(&format!("n{n}"))).collect()
}

#[test]
fn a_long_prompt_goes_to_a_prefill_node_and_a_cached_one_does_not() {
    let names = names();
    let (p, mut d) = ([idle(&names[0])], [idle(&names[1])]);
    let choice = choose(DEMAND, &p, &d).unwrap();
    assert_eq!((choice.prefill, choice.decode, choice.runners_up), (Some(0), 0, 1));
    assert!(choice.reason.starts_with("remote: "), "{}", choice.reason);
    assert!(choice.reason.contains("0% cached on n0; local would be "), "{}", choice.reason);

    d[0].cached_tokens = 992;
    let choice = choose(DEMAND, &p, &d).unwrap();
    assert_eq!(choice.prefill, None);
    assert!(choice.reason.contains("99% cached on n1; remote would be "), "{}", choice.reason);
}

#[test]
fn without_prefill_nodes_the_decode_node_does_all() {
    let names = names();
    let choice = choose(DEMAND, &[], &[idle(&names[1])]).unwrap();
    assert_eq!(choice.prefill, None);
    assert!(choice.reason.ends_with("no prefill node is free"), "{}", choice.reason);
    assert_eq!(choose(DEMAND, &[idle(&names[0])], &[]), None);
}

#[test]
fn the_cached_prefix_draws_until_its_node_is_too_busy() {
    let names = names();
    let (mut p, mut d) = ([idle(&names[0]), idle(&names[1])], [idle(&names[2])]);
    d[0].sequences = 10;
    p[1].cached_tokens = 800;
    assert_eq!(choose(DEMAND, &p, &d).unwrap().prefill, Some(1));
    p[1].queued_tokens = 5000;
    assert_eq!(choose(DEMAND, &p, &d).unwrap().prefill, Some(0));
}

#[test]
fn equal_nodes_take_turns_as_their_queues_grow() {
    let names = names();
    let (mut p, d) = ([idle(&names[0]), idle(&names[1])], [idle(&names[2])]);
    assert_eq!(choose(DEMAND, &p, &d).unwrap().prefill, Some(0));
    p[0].queued_tokens = 1000;
    assert_eq!(choose(DEMAND, &p, &d).unwrap().prefill, Some(1));
}

#[test]
fn a_decode_node_without_room_is_taken_only_if_none_has_any() {
    let names = names();
    let mut d = [idle(&names[0]), idle(&names[1])];
    (d[0].room, d[1].sequences) = (62, 100);
    assert_eq!(choose(DEMAND, &[], &d).unwrap().decode, 1);
    d[1].room = 10;
    assert_eq!(choose(DEMAND, &[], &d).unwrap().decode, 0);
}

fn candidate() -> impl Strategy<Value = (usize, u64, u32, f64, f64, u64)> {
    (0..1200_usize, 0..5000_u64, 0..40_u32, 0.0..9000.0, 0.0..50.0, 0..1000_u64)
}

proptest! {
    #[test]
    fn no_pair_and_no_local_is_cheaper(
        prefill in proptest::collection::vec(candidate(), 0..4),
        decode in proptest::collection::vec(candidate(), 1..5),
    ) {
        let names = names();
        let make = |raw: &[(usize, u64, u32, f64, f64, u64)], first: usize| {
            let one = |(at, &(cached_tokens, queued_tokens, sequences, speed, step_ms, room))| {
                let node: &NodeId = &names[first + at];
                Candidate { cached_tokens, queued_tokens, sequences, step_ms, room,
                    tokens_per_second: speed, ..idle(node) }
            };
            raw.iter().enumerate().map(one).collect::<Vec<_>>()
        };
        let (p, d) = (make(&prefill, 0), make(&decode, 4));
        let choice = choose(DEMAND, &p, &d).unwrap();
        prop_assert_eq!(choice.runners_up + 1, d.len() * (p.len() + 1));
        let view = View::new(DEMAND, &p, &d);
        let any_fits = d.iter().any(|d| view.fits(d));
        let total = |pair: (Option<usize>, usize)| match pair {
            (Some(a), b) => add(view.remote_prefill(&p[a]), view.receiving(&d[b])).total(),
            (None, b) => view.local(&d[b]).total(),
        };
        let chosen = total((choice.prefill, choice.decode));
        prop_assert!((chosen - choice.cost.total()).abs() < 1e-6);
        prop_assert!(chosen.is_finite());
        for b in (0..d.len()).filter(|&b| !any_fits || view.fits(&d[b])) {
            for a in (0..p.len()).map(Some).chain([None]) {
                prop_assert!(chosen <= total((a, b)) + 1e-6);
            }
        }
        prop_assert!(!any_fits || view.fits(&d[choice.decode]));
    }
}

#[test]
fn local_prefill_can_be_forbidden() {
    let names = [node("p"), node("d")];
    let demand = Demand { tokens: 1, local_prefill: LocalPrefill::Never, ..DEMAND };
    let (p, d) = ([idle(&names[0])], [idle(&names[1])]);
    assert_eq!(
        choose(Demand { local_prefill: LocalPrefill::Auto, ..demand }, &p, &d).unwrap().prefill,
        None
    );
    assert_eq!(choose(demand, &p, &d).unwrap().prefill, Some(0));
    assert_eq!(choose(demand, &[], &d).unwrap().prefill, None);
}
