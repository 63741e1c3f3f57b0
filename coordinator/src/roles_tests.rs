use baton_proto::message::{BlockCounts, Command, NodeEvent, Report};
use proptest::prelude::*;

use super::*;
use crate::cluster::LinkId;
use crate::control::{Control, Options};
use crate::requests::{Action, Limits};
use crate::testing::{hello, node};

/// A model's nodes under a load, as a fluid: prompts come as work per second, sequences as shares of
/// one decode node's memory.
struct World {
    roles: Vec<Role>,
    /// Seconds of prefill that wait, over all prefill nodes.
    queue_s: f64,
    now: Instant,
    controller: Roles,
    moves: usize,
    last_move: Option<Instant>,
}

impl World {
    fn new(prefill: usize, decode: usize) -> Self {
        let now = Instant::now();
        let mut roles = vec![Role::Prefill; prefill];
        roles.resize(prefill + decode, Role::Decode);
        let controller = Roles::new(node("c"), now);
        Self { roles, queue_s: 0.0, now, controller, moves: 0, last_move: None }
    }

    fn count(&self, role: Role) -> usize {
        self.roles.iter().filter(|&&r| r == role).count()
    }

    /// One second with `prefill` nodes' worth of prompts and `decode` nodes' worth of sequences.
    /// `noise`, from 0 to 1, disturbs what is seen.
    fn second(&mut self, prefill: f64, decode: f64, noise: f64) {
        let (p, d) = (self.count(Role::Prefill) as f64, self.count(Role::Decode) as f64);
        self.queue_s = (self.queue_s + prefill - p).max(0.0);
        let busy = if self.queue_s > 0.0 { 1.0 } else { prefill / p };
        let pressures = (busy + self.queue_s / p, (decode / d).min(1.0));
        let seen = |(index, &role): (usize, &Role)| {
            let pressure = if role == Role::Prefill { pressures.0 } else { pressures.1 };
            let pressure = pressure * (0.9 + 0.2 * noise);
            let sequences = index as u32 % 3;
            Seen { node: node(&format!("n-{index}")), role, pressure, sequences }
        };
        let nodes: Vec<Seen> = self.roles.iter().enumerate().map(seen).collect();
        let root = hello(Role::Prefill, 1).root;
        self.now += INTERVAL;
        let nodes = BTreeMap::from([(root, nodes)]);
        for (name, role) in self.controller.observe(&nodes, true, self.now) {
            let index: usize = name.as_str()[2..].parse().unwrap();
            assert_ne!(self.roles[index], role, "a move changes something");
            let paused = self.last_move.map(|last| self.now - last);
            assert!(paused.is_none_or(|paused| paused >= LEAST_PAUSE));
            self.roles[index] = role;
            (self.moves, self.last_move) = (self.moves + 1, Some(self.now));
        }
        assert!(self.count(Role::Prefill) > 0 && self.count(Role::Decode) > 0);
    }
}

proptest! {
    /// Under constant load no move is undone, and none overloads the role that gives the node.
    #[test]
    fn constant_load_undoes_no_move(
        prefill in 1_usize..12,
        decode in 1_usize..12,
        prompts in 0.0_f64..10.0,
        sequences in 0.0_f64..10.0,
        seed in any::<u64>(),
    ) {
        let mut world = World::new(prefill, decode);
        let mut state = seed;
        let mut chance = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let mut seen = vec![prefill];
        for _ in 0..2000 {
            world.second(prompts, sequences, chance());
            seen.push(world.count(Role::Prefill));
        }
        let (first, last) = (prefill, *seen.last().unwrap());
        let one_way = seen.is_sorted() || seen.iter().rev().is_sorted();
        prop_assert!(one_way, "{seen:?}");
        let pressure = |role| match role {
            Role::Prefill => prompts / world.count(Role::Prefill) as f64,
            Role::Decode => sequences / world.count(Role::Decode) as f64,
        };
        if first != last {
            let giver = if last > first { Role::Decode } else { Role::Prefill };
            prop_assert!(pressure(giver) < HIGH, "{giver} at {}", pressure(giver));
        }
    }

    /// Whatever happens, each role keeps a node, moves keep their pause, and what is drained is left
    /// alone (the callers name no draining node). The asserts are in the model.
    #[test]
    fn wild_loads_keep_the_rules(
        loads in prop::collection::vec((0.0_f64..20.0, 0.0_f64..20.0, 0.0_f64..1.0), 600),
        prefill in 1_usize..6,
        decode in 1_usize..6,
    ) {
        let mut world = World::new(prefill, decode);
        for (index, _) in loads.iter().enumerate() {
            let (prompts, sequences, noise) = loads[index / 50 * 50];
            world.second(prompts, sequences, noise);
        }
    }
}

#[test]
fn nodes_follow_a_shift_of_load() {
    let mut world = World::new(4, 4);
    for _ in 0..300 {
        world.second(2.0, 2.0, 0.5);
    }
    assert_eq!(world.moves, 0, "nobody is pressed");
    // Long prompts, short answers: six nodes' worth of prefill.
    for _ in 0..600 {
        world.second(5.5, 0.8, 0.5);
    }
    assert!(world.count(Role::Prefill) >= 6, "{:?}", world.roles);
    assert!(world.queue_s < 1.0, "the queue of {} s is worked off", world.queue_s);
    // And the other way round.
    for _ in 0..600 {
        world.second(0.8, 4.2, 0.5);
    }
    assert!(world.count(Role::Decode) >= 5, "{:?}", world.roles);
}

#[test]
fn the_least_loaded_node_moves_and_only_the_first_coordinator_decides() {
    let now = Instant::now();
    let seen = |name: &str, role, pressure, sequences| Seen {
        node: node(name),
        role,
        pressure,
        sequences,
    };
    let root = hello(Role::Prefill, 1).root;
    let nodes = BTreeMap::from([(
        root,
        vec![
            seen("d-1", Role::Decode, 0.1, 4),
            seen("d-2", Role::Decode, 0.3, 2),
            seen("d-3", Role::Decode, 0.2, 2),
            seen("p-1", Role::Prefill, 3.0, 9),
        ],
    )]);
    for (decides, moved) in [(true, vec![(node("d-3"), Role::Prefill)]), (false, vec![])] {
        let mut roles = Roles::new(node("c"), now);
        assert_eq!(roles.observe(&nodes, decides, now), []);
        assert_eq!(roles.observe(&nodes, decides, now + LEAST_PAUSE), moved);
    }
}

#[test]
fn pressure_is_read_from_reports() {
    let member = |role, report: Report| {
        let (link, heard) = (LinkId(1), Instant::now());
        Seen::new(&node("n"), &Member { hello: hello(role, 1), link, report, heard }).pressure
    };
    assert_eq!(member(Role::Prefill, Report::default()), 0.0);
    let busy = Report {
        running: 1,
        queued_tokens: 500,
        prefill_tokens_per_second: 1000.0,
        ..Report::default()
    };
    assert_eq!(member(Role::Prefill, busy), 1.5);
    let blocks = BlockCounts { free: 512, active: 256, cached: 128, leased: 128 };
    let idle = Report { blocks, decode_step_ms: 45.0, ..Report::default() };
    assert_eq!(member(Role::Decode, idle.clone()), 0.375);
    assert_eq!(member(Role::Decode, Report { running: 1, ..idle }), 0.9);
}

/// The controller inside a coordinator: reports in, one order out.
#[test]
fn a_coordinator_moves_a_node_when_prompts_pile_up() {
    let mut now = Instant::now();
    let limits = Limits { requests: 1, tokens: 1 };
    let options = Options { limits, index_blocks: 1, placement: Default::default() };
    let mut control = Control::new(options, now);
    control.adjust_roles(node("c"), now);
    let nodes = [("d-1", Role::Decode), ("d-2", Role::Decode), ("p", Role::Prefill)];
    let mut out = Vec::new();
    for (link, (name, role)) in (1..).map(LinkId).zip(nodes) {
        control.join(&node(name), hello(role, 1), link, now, &mut out).unwrap();
    }
    let ends = now + 2 * LEAST_PAUSE;
    while now < ends {
        for (link, (name, role)) in (1..).map(LinkId).zip(nodes) {
            let (running, queued_tokens) = if name == "p" { (1, 100_000) } else { (0, 0) };
            let report = Report { role, running, queued_tokens, ..Report::default() };
            control.event(&node(name), link, NodeEvent::Report(report), now, &mut out);
        }
        now = control.poll_timeout().expect("the controller looks again");
        control.handle_timeout(now, &mut out);
        if !out.is_empty() {
            break;
        }
    }
    let [Action::Send { to, command }] = &out[..] else { panic!("{out:?}") };
    assert_eq!((&to.node, command), (&node("d-1"), &Command::SetRole(Role::Prefill)));
}
