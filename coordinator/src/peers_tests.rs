use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, Role};
use baton_proto::message::Command;
use baton_proto::sampling::SamplingParams;
use proptest::prelude::*;

use super::*;
use crate::cluster::LinkId;
use crate::control::{Control, Options};
use crate::core::NewRequest;
use crate::placement::LocalPrefill;
use crate::requests::{Action, Limits};
use crate::testing::{hello, node};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn load(tokens: u64) -> SharedLoad {
    SharedLoad { prefill_ms: tokens as f64, tokens, blocks: tokens, sequences: 1 }
}

fn share(sequence: u64, name: &str, epoch: u64, promises: &[(u64, u64)]) -> Share {
    let promise = |&(age, tokens)| Promise { age: ms(age), load: load(tokens) };
    let promises = promises.iter().map(promise).collect();
    Share {
        sequence,
        nodes: vec![NodePromises { node: node(name), epoch: Epoch(epoch), promises }],
    }
}

fn tokens(shares: &Shares, name: &str) -> u64 {
    shares.load(&node(name)).tokens
}

#[test]
fn only_what_the_last_report_cannot_show_counts() {
    let (mut shares, start) = (Shares::default(), Instant::now() + ms(1000));
    shares.joined(&node("p"), Epoch(1));
    assert!(shares.heard(&node("c"), share(1, "p", 1, &[(10, 5), (100, 7)]), start));
    assert_eq!(tokens(&shares, "p"), 12, "nothing was reported yet");
    // This report shows what was sent until 70 ms ago.
    shares.reported(&node("p"), start - ms(20));
    assert_eq!(tokens(&shares, "p"), 5);
    shares.reported(&node("p"), start + REPORT_LAG);
    assert_eq!(shares.load(&node("p")), SharedLoad::default());
}

#[test]
fn a_later_share_replaces_an_earlier_one_and_not_the_other_way_round() {
    let (mut shares, now) = (Shares::default(), Instant::now() + ms(1000));
    shares.joined(&node("p"), Epoch(1));
    shares.joined(&node("q"), Epoch(1));
    assert!(shares.heard(&node("c"), share(2, "p", 1, &[(0, 5)]), now));
    assert!(shares.heard(&node("c2"), share(1, "p", 1, &[(0, 1)]), now));
    assert!(!shares.heard(&node("c"), share(1, "p", 1, &[(0, 9)]), now));
    assert_eq!(tokens(&shares, "p"), 6);
    assert!(shares.heard(&node("c"), share(3, "q", 1, &[(0, 5)]), now));
    assert_eq!((tokens(&shares, "p"), tokens(&shares, "q")), (1, 5));
}

#[test]
fn what_is_said_of_another_life_of_a_node_does_not_count() {
    let (mut shares, now) = (Shares::default(), Instant::now() + ms(1000));
    shares.joined(&node("p"), Epoch(1));
    shares.heard(&node("c"), share(1, "p", 1, &[(0, 5)]), now);
    shares.left(&node("p"));
    assert_eq!(tokens(&shares, "p"), 0);
    shares.joined(&node("p"), Epoch(2));
    assert_eq!(tokens(&shares, "p"), 0);
    shares.heard(&node("c"), share(2, "p", 2, &[(0, 3)]), now);
    assert_eq!(tokens(&shares, "p"), 3);
}

#[test]
fn a_silent_coordinator_is_forgotten_and_may_start_anew() {
    let (mut shares, now) = (Shares::default(), Instant::now() + ms(1000));
    shares.joined(&node("p"), Epoch(1));
    shares.heard(&node("c"), share(7, "p", 1, &[(0, 5)]), now);
    let due = shares.poll_timeout().unwrap();
    shares.expire(due - ms(1));
    assert_eq!(tokens(&shares, "p"), 5);
    shares.expire(due);
    assert_eq!(tokens(&shares, "p"), 0);
    assert_eq!((shares.peers().count(), shares.poll_timeout()), (0, None));
    // Its next life counts from 1 again.
    assert!(shares.heard(&node("c"), share(1, "p", 1, &[(0, 4)]), due));
    assert_eq!(tokens(&shares, "p"), 4);
}

#[test]
fn only_so_many_coordinators_are_listened_to() {
    let (mut shares, now) = (Shares::default(), Instant::now());
    for peer in 0..MAX_PEERS {
        assert!(shares.heard(
            &node(&format!("c{peer}")),
            Share { sequence: 1, nodes: vec![] },
            now
        ));
    }
    let another = Share { sequence: 1, nodes: vec![] };
    assert!(!shares.heard(&node("d"), another.clone(), now));
    assert!(shares.heard(&node("d"), another, now + SILENCE));
}

/// Two coordinators of the same nodes, one of which sends a request.
#[test]
fn a_coordinator_spares_the_node_that_another_one_uses() {
    let now = Instant::now() + ms(1000);
    let limits = Limits { requests: 10, tokens: 100_000 };
    let options = Options {
        limits,
        index_blocks: 100,
        placement: crate::placement::Options {
            local_prefill: LocalPrefill::Never,
            ..Default::default()
        },
    };
    let mut controls = [Control::new(options, now), Control::new(options, now)];
    let mut out = Vec::new();
    for control in &mut controls {
        let nodes = [("d", Role::Decode), ("p-1", Role::Prefill), ("p-2", Role::Prefill)];
        for (link, (name, role)) in (1..).map(LinkId).zip(nodes) {
            control.join(&node(name), hello(role, 1), link, now, &mut out).unwrap();
        }
    }
    let mut prefill_node = |control: &mut Control, id| {
        let request = NewRequest {
            id: RequestId(id),
            model: "demo".to_owned(),
            tokens: vec![1; 2000].into(),
            embed: None,
            sampling: SamplingParams { max_tokens: 3, ..SamplingParams::default() },
            salt: CacheSalt::default(),
            standing: Default::default(),
            tenant: Default::default(),
            deadline: None,
            trace: None,
        };
        control.submit(request, Vec::new(), now, now, &mut out).unwrap();
        let sent = out.drain(..).find_map(|action| match action {
            Action::Send { to, command: Command::Prefill { .. } } => Some(to.node),
            _ => None,
        });
        sent.unwrap()
    };
    let [here, there] = &mut controls;
    let first = prefill_node(here, 1);
    there.heard(&node("c"), here.share(now), now);
    assert_ne!(prefill_node(there, 2), first);
}

proptest! {
    /// What arrives at another coordinator is what was promised: nothing is lost in the grouping,
    /// and nothing becomes older by it.
    #[test]
    fn shares_are_bounded_and_lose_nothing(
        promised in prop::collection::vec((0_u64..3, 0_u64..2000, 1_u64..1000), 0..200),
    ) {
        let (mut here, mut there) = (Shares::default(), Shares::default());
        let names = ["a", "b", "c"].map(node);
        let now = Instant::now() + ms(10_000);
        let own = promised.iter().map(|&(at, age, tokens)| Own {
            node: &names[at as usize], epoch: Epoch(1), sent: now - ms(age), load: load(tokens),
        });
        let share = here.share(own, now);
        for told in &share.nodes {
            prop_assert!(told.promises.len() <= MAX_PROMISES);
            prop_assert!(told.promises.is_sorted_by_key(|promise| promise.age));
        }
        names.iter().for_each(|name| there.joined(name, Epoch(1)));
        there.heard(&node("c"), share, now);
        // A report from before all that is told apart by its age.
        let told_apart = GROUP * (MAX_PROMISES as u32 - 1);
        for cut in [None, Some(ms(40)), Some(told_apart)] {
            for (index, name) in names.iter().enumerate() {
                let of = promised.iter().filter(|(at, ..)| *at == index as u64);
                let sum = |most: Duration| {
                    of.clone().filter(|(_, age, _)| ms(*age) < most).map(|(.., t)| t).sum::<u64>()
                };
                let Some(cut) = cut else {
                    prop_assert_eq!(there.load(name).tokens, sum(Duration::MAX));
                    continue;
                };
                there.reported(name, now + REPORT_LAG - cut);
                let found = there.load(name).tokens;
                prop_assert!(found >= sum(cut), "{} of {}", found, sum(cut));
                let most = if cut < told_apart { cut + GROUP } else { Duration::MAX };
                prop_assert!(found <= sum(most), "{} above {}", found, sum(most));
            }
        }
    }

    /// Another coordinator's work on a node is in the node's report, or in what the coordinator
    /// tells, or, for a moment, in both; never in neither.
    #[test]
    fn told_work_is_never_missed_and_counted_twice_for_a_moment_only(
        work in prop::collection::vec((0_u64..2000, 0_u64..50, 1_u64..100), 1..60),
        phase in 0_u64..100,
        delays in prop::collection::vec(0_u64..50, 48),
    ) {
        let work = work.into_iter().map(|(sent, way, tokens)| Work { sent, way, tokens });
        follow(&work.collect::<Vec<_>>(), phase, &delays)?;
    }
}

/// Work that another coordinator gives a node. Times are milliseconds.
struct Work {
    sent: u64,
    /// How long it takes to the node.
    way: u64,
    tokens: u64,
}

/// How long the other coordinator tells of its work.
const TOLD_FOR: u64 = 300;
/// A share that takes longer is lost.
const LATEST: u64 = 40;

/// Follows one node that reports every 100 ms and another coordinator that shares every 50 ms, and
/// compares what is believed of the node with what is so.
fn follow(work: &[Work], phase: u64, delays: &[u64]) -> Result<(), TestCaseError> {
    let (mut there, mut here) = (Shares::default(), Shares::default());
    let (p, start) = (node("p"), Instant::now() + ms(1000));
    let sum = |picked: &dyn Fn(&Work) -> bool| {
        work.iter().filter(|work| picked(work)).map(|work| work.tokens).sum::<u64>()
    };
    here.joined(&p, Epoch(1));
    let (mut reported_at, mut told, mut under_way) = (None, None, Vec::new());
    for now in 0..2400 {
        if now % 100 == phase {
            reported_at = Some(now);
            here.reported(&p, start + ms(now));
        }
        if now % 50 == 0 {
            let recent = work.iter().filter(|w| w.sent <= now && w.sent + TOLD_FOR > now);
            let own = recent.map(|w| {
                let (sent, load) = (start + ms(w.sent), load(w.tokens));
                Own { node: &p, epoch: Epoch(1), sent, load }
            });
            let delay = delays[now as usize / 50];
            let share = there.share(own, start + ms(now));
            under_way.extend((delay <= LATEST).then_some((now + delay, now, share)));
        }
        under_way.retain(|(arrives, sent, share)| {
            if *arrives == now && here.heard(&node("c"), share.clone(), start + ms(now)) {
                told = Some(*sent);
            }
            *arrives > now
        });
        here.expire(start + ms(now));

        let shown = |w: &Work| reported_at.is_some_and(|at| w.sent + w.way <= at);
        let believed = sum(&shown) + here.load(&p).tokens;
        let least = sum(&|w| {
            let was_told = told.is_some_and(|told| w.sent <= told) && w.sent + TOLD_FOR > now;
            was_told || shown(w)
        });
        prop_assert!(believed >= least, "{} of {} at {}", believed, least, now);
        // Of shown work only that counts again which is too young for a report to show it surely.
        let young = REPORT_LAG.as_millis() as u64 + GROUP.as_millis() as u64 + LATEST + 1;
        let twice = |w: &Work| shown(w) && reported_at.is_some_and(|at| w.sent + young > at);
        let most = sum(&|w| w.sent <= now) + sum(&twice);
        prop_assert!(believed <= most, "{} of {} at {}", believed, most, now);
    }
    Ok(())
}
