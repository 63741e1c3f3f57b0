//! Placement as a whole, as requests see it.

use std::sync::Arc;

use baton_proto::message::BlockCounts;

use super::*;
use crate::core::ModelInfo;
use crate::decision::{MOST_LEFT_OUT, Why};
use crate::requests::{Answer, Placer, Wanted};
use crate::testing::{GEOMETRY, hello, node};

struct World {
    placement: Placement,
    model: ModelInfo,
    now: Instant,
}

impl World {
    fn new(nodes: &[(&str, Role)]) -> Self {
        let (now, first) = (Instant::now(), hello(Role::Decode, 1));
        let placement = Placement::new(Index::new(1 << 12), Options::default(), now);
        let model = ModelInfo {
            name: first.model,
            root: first.root,
            geometry: GEOMETRY,
            max_model_len: first.max_model_len,
            vocab_size: first.vocab_size,
            hidden_size: 4,
        };
        let mut world = Self { placement, model, now };
        nodes.iter().for_each(|(name, role)| {
            world.placement.join(&node(name), &hello(*role, 1), now);
        });
        world
    }

    fn wait(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
    }

    fn place(&mut self, n: u128, deadline: Option<Duration>) -> Answer {
        self.place_as(n, deadline, false)
    }

    fn place_as(&mut self, n: u128, deadline: Option<Duration>, embeds: bool) -> Answer {
        let nothing = Arc::default();
        let wanted = Wanted {
            id: id(n),
            model: &self.model,
            tokens: 400,
            longest: 500,
            embeds,
            chain: &nothing,
            avoid: &[],
            standing: Standing::default(),
            arrived: self.now,
            deadline: deadline.map(|left| self.now + left),
            arrives: true,
        };
        self.placement.place(&wanted, self.now)
    }

    fn go(&mut self, n: u128) -> Placed {
        match self.place(n, None) {
            Answer::Go(placed) => placed,
            other => panic!("{other:?}"),
        }
    }

    fn end(&mut self, n: u128, placed: &Placed, took: u64) {
        let took = Duration::from_millis(took);
        let computing = placed.prefill.as_ref().unwrap_or(&placed.decode);
        self.placement.prefilled(&computing.node, id(n), took, self.now);
        for peer in placed.prefill.iter().chain([&placed.decode]) {
            self.placement.ended(&peer.node, id(n), self.now);
        }
    }

    fn report(&mut self, name: &str, role: Role, draining: bool, free: u64) {
        let blocks = BlockCounts { free, ..BlockCounts::default() };
        let report = Report { role, draining, blocks, ..Report::default() };
        self.placement.report(&node(name), &report, true, self.now);
    }
}

fn id(n: u128) -> TransferId {
    TransferId { request: RequestId(n), attempt: 1 }
}

#[test]
fn idle_nodes_take_at_once_and_nothing_is_left_behind() {
    let mut world = World::new(&[("p", Role::Prefill), ("d", Role::Decode)]);
    for n in 0..3 {
        let placed = world.go(n);
        assert!(!world.placement.is_idle());
        world.end(n, &placed, 50);
        assert!(world.placement.is_idle());
    }
}

#[test]
fn a_draining_node_gets_nothing() {
    let mut world = World::new(&[("d", Role::Decode), ("e", Role::Decode)]);
    world.report("d", Role::Decode, true, 1024);
    for n in 0..4 {
        let placed = world.go(n);
        assert_eq!(placed.decode.node, node("e"));
        world.end(n, &placed, 50);
    }
    world.report("e", Role::Decode, true, 1024);
    assert!(matches!(world.place(9, None), Answer::NoNodes(_)));
}

#[test]
fn who_is_left_out_is_named_with_the_reason() {
    let mut world =
        World::new(&[("p", Role::Prefill), ("d", Role::Decode), ("full", Role::Decode)]);
    let now = world.now;
    let other = Hello { root: ModelRoot([9; 16]), ..hello(Role::Decode, 1) };
    world.placement.join(&node("other"), &other, now);
    let small = Hello { max_model_len: 400, ..hello(Role::Prefill, 1) };
    world.placement.join(&node("small"), &small, now);
    for n in 0..MOST_LEFT_OUT {
        let name = format!("drained-{n}");
        world.placement.join(&node(&name), &hello(Role::Prefill, 1), now);
        world.report(&name, Role::Prefill, true, 1024);
    }
    world.wait(1000);
    world.report("full", Role::Decode, false, 3);
    world.report("d", Role::Decode, false, 1024);
    (0..5).for_each(|_| world.placement.failed(&node("p"), world.now));

    let decision = world.go(1).decision;
    let found: Vec<_> = decision.left_out.iter().map(|(id, why)| (id.as_str(), *why)).collect();
    let wanted = [("full", Why::Full), ("p", Why::Failing), ("small", Why::TooSmall)];
    assert_eq!(found[..3], wanted);
    assert!(found[3..].iter().all(|(_, why)| *why == Why::Draining), "{found:?}");
    assert_eq!((found.len(), decision.more_left_out), (MOST_LEFT_OUT, 3));
    assert_eq!((decision.prefill_nodes, decision.of_other_models), (0, 1));

    // Where nobody is left, that is all that there is to say.
    world.report("d", Role::Decode, true, 1024);
    world.placement.leave(&node("full"));
    let Answer::NoNodes(decision) = world.place(2, None) else { panic!("somebody takes it") };
    assert!(decision.considered.is_empty());
    assert!(decision.left_out.contains(&(node("d"), Why::Draining)), "{decision:?}");
}

#[test]
fn nothing_is_refused_before_speeds_are_known() {
    let mut world = World::new(&[("d", Role::Decode)]);
    for n in 0..3 {
        let placed = match world.place(n, Some(Duration::from_millis(1))) {
            Answer::Go(placed) => placed,
            other => panic!("{other:?}"),
        };
        world.end(n, &placed, 500);
    }
    let hopeless = world.place(9, Some(Duration::from_millis(1)));
    assert!(matches!(hopeless, Answer::TooLate { .. }), "{hopeless:?}");
    assert!(world.placement.is_idle());
}

#[test]
fn who_waits_for_a_node_that_dies_is_placed_again() {
    let mut world = World::new(&[("d", Role::Decode)]);
    let mut held = 0;
    for n in 0..12 {
        held += usize::from(matches!(world.place(n, None), Answer::Held(_)));
    }
    assert!(held > 0);
    world.placement.leave(&node("d"));
    let mut again = 0;
    while let Some(turn) = world.placement.next(world.now) {
        assert!(matches!(turn, Turn::Again(_)), "{turn:?}");
        again += 1;
    }
    assert_eq!((again, world.placement.waiting()), (held, 0));
}

#[test]
fn decode_nodes_without_room_get_nothing_while_others_have_some() {
    let mut world = World::new(&[("d", Role::Decode), ("e", Role::Decode)]);
    world.wait(1000);
    world.report("d", Role::Decode, false, 3);
    world.report("e", Role::Decode, false, 1024);
    assert_eq!(world.go(1).decode.node, node("e"));
}

#[test]
fn a_key_that_is_used_again_has_no_old_transfers() {
    let mut world = World::new(&[("p", Role::Prefill), ("d", Role::Decode)]);
    let placed = world.go(1);
    world.placement.leave(&node("d"));
    world.placement.join(&node("other"), &hello(Role::Decode, 1), world.now);
    world.end(1, &placed, 50);
    let incoming = world.placement.nodes.iter().flatten().map(|node| node.incoming);
    assert_eq!(incoming.sum::<u32>(), 0);
    assert!(world.placement.is_idle());
}

#[test]
fn a_decode_node_that_answers_again_is_trusted_again() {
    let mut world = World::new(&[("p", Role::Prefill), ("d", Role::Decode)]);
    (0..5).for_each(|_| world.placement.failed(&node("d"), world.now));
    assert!(matches!(world.place(1, None), Answer::NoNodes(_)));
    world.wait(1001);
    world.go(2);
    let (root, now) = (world.model.root, world.now);
    world.placement.answered(&node("d"), root, 9, now);
    assert!(!matches!(world.place(3, None), Answer::NoNodes(_)));
}

/// Who computes a prompt: `p0` or `p1`, idle and equal but for their prices.
fn computes(prices: [f64; 2], offered_ms: f64) -> NodeId {
    let mut world = World::new(&[("d", Role::Decode)]);
    world.placement.options.local_prefill = LocalPrefill::Never;
    for (name, price) in ["p0", "p1"].into_iter().zip(prices) {
        let hello = Hello { price, ..hello(Role::Prefill, 1) };
        world.placement.join(&node(name), &hello, world.now);
    }
    world.placement.pools.get_mut(&world.model.root).unwrap().offer(offered_ms, 0.0);
    world.go(1).prefill.unwrap().node
}

#[test]
fn under_load_the_cheaper_of_two_equal_nodes_computes() {
    assert_eq!(computes([1.0, 1.0], 5000.0), node("p0"), "ties go to the first");
    assert_eq!(computes([4.0, 1.0], 5000.0), node("p1"));
    assert_eq!(computes([0.5, 1.0], 5000.0), node("p0"));
    assert_eq!(computes([4.0, 1.0], 0.0), node("p0"), "nobody else needs the time of idle nodes");
}

#[test]
fn those_who_are_due_first_are_placed_anew_wherever_they_wait() {
    let names = ["a", "b", "c", "d", "e"].map(|name| (name, Role::Decode));
    let mut placement = World::new(&names).placement;
    let mut all = Vec::new();
    for n in 0..200_u32 {
        // Most wait for the same node.
        let at = (n % 9 % 5) as usize;
        let due = f64::from(n.wrapping_mul(2_654_435_761) >> 24);
        let entry = Entry {
            request: RequestId(n.into()),
            class: Class::ALL[n as usize % 2],
            tenant: TenantId::default(),
            arrived: 0.0,
            due,
            deadline: f64::INFINITY,
            ms: 1.0,
            retry_at: 0.0,
        };
        placement.nodes[at].as_mut().unwrap().queue.insert(entry);
        placement.awaited.insert(NodeKey(at as u32));
        all.push(entry);
    }
    all.sort_by(Entry::order);
    assert_eq!(placement.first_due(), all[..REBALANCED]);
}

#[test]
fn a_prompt_is_embedded_by_one_prefill_node_or_else_by_any() {
    let embed = |world: &mut World, n| match world.place_as(n, None, true) {
        Answer::Go(placed) => placed,
        other => panic!("{other:?}"),
    };
    let mut world = World::new(&[("d", Role::Decode), ("p", Role::Prefill), ("q", Role::Prefill)]);
    let first = embed(&mut world, 1);
    assert_eq!((first.prefill, first.pull), (None, None));
    assert_eq!(first.decode.node, node("p"));
    let second = embed(&mut world, 2);
    assert_eq!(second.decode.node, node("q"), "p has work");
    let reason = second.decision.reason();
    assert!(reason.ends_with("cached on q"), "{reason}");
    for (n, name) in [(1, "p"), (2, "q")] {
        world.placement.ended(&node(name), id(n), world.now);
    }
    assert!(world.placement.is_idle());
    for name in ["p", "q"] {
        world.report(name, Role::Prefill, true, 1024);
    }
    assert_eq!(embed(&mut world, 3).decode.node, node("d"));
    let mut alone = World::new(&[("p", Role::Prefill)]);
    assert!(matches!(alone.place(1, None), Answer::NoNodes(_)), "nobody could generate");
    assert_eq!(embed(&mut alone, 2).decode.node, node("p"));
}
