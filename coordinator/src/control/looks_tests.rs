//! What operators see of a coordinator whose nodes the test plays.

use std::time::Duration;

use baton_proto::ids::{NodeId, Role};
use baton_proto::message::{NodeFinish, TokenEvent};
use baton_proto::sampling::SamplingParams;

use super::*;
use crate::cluster::LinkId;
use crate::control::Options;
use crate::core::NewRequest;
use crate::history::{MOST_REFUSED, Stage};
use crate::requests::Limits;
use crate::testing::{hello, node};

const REQUESTS: usize = 20;

struct World {
    control: Control,
    now: Instant,
    out: Vec<Action>,
}

impl World {
    fn new(nodes: &[(&str, Role)]) -> Self {
        let now = Instant::now();
        let limits = Limits { requests: REQUESTS, tokens: 1 << 20 };
        let options = Options { limits, index_blocks: 100, placement: Default::default() };
        let mut world = Self { control: Control::new(options, now), now, out: Vec::new() };
        for (link, (name, role)) in (1..).zip(nodes) {
            let joined =
                world.control.join(&node(name), hello(*role, 1), LinkId(link), now, &mut world.out);
            joined.unwrap();
        }
        world
    }

    fn submit(&mut self, id: u128) -> bool {
        let request = NewRequest {
            id: RequestId(id),
            model: "demo".to_owned(),
            tokens: vec![1; 100].into(),
            embed: None,
            sampling: SamplingParams { max_tokens: 3, ..SamplingParams::default() },
            salt: Default::default(),
            standing: Default::default(),
            tenant: "acme".into(),
            deadline: None,
            trace: None,
        };
        self.control.submit(request, Vec::new(), self.now, self.now, &mut self.out).is_ok()
    }

    fn explain(&self, id: u128) -> Explained {
        let id = IdPrefix::parse(&RequestId(id).to_string()).unwrap();
        self.control.explain(id, self.now).unwrap()
    }

    fn token(&mut self, id: u128, position: u32, finish: Option<NodeFinish>) {
        let id = baton_proto::ids::TransferId { request: RequestId(id), attempt: 1 };
        let prefill = (position == 0).then_some(Duration::from_millis(9));
        let event = TokenEvent { id, position, token: 7, logprobs: None, finish, prefill };
        let event = baton_proto::message::NodeEvent::Tokens(vec![event]);
        self.control.event(&node("d"), LinkId(1), event, self.now, &mut self.out);
    }

    fn stages(&self) -> Vec<Stage> {
        let list = self.control.requests(false, 1000, self.now);
        list.requests.iter().map(|view| view.stage).collect()
    }
}

#[test]
fn who_waits_sees_for_whom_and_behind_how_many() {
    let mut world = World::new(&[("d", Role::Decode)]);
    (1..=10).for_each(|id| assert!(world.submit(id)));
    let stages = world.stages();
    let held = stages.iter().filter(|stage| **stage == Stage::Queued).count();
    assert!(held > 1 && stages.contains(&Stage::Prefill), "{stages:?}");

    let Explained { record, waits } = world.explain(10);
    let waits = waits.unwrap();
    assert_eq!((waits.node, waits.ahead, waits.behind), (node("d"), held - 1, 0));
    assert!(waits.ahead_ms > 0.0);
    let decision = record.decision.unwrap();
    assert_eq!((decision.tokens, decision.decode_nodes), (100, 1));
    assert_eq!(decision.chosen().unwrap().decode, node("d"));
    assert_eq!((record.view.stage, &*record.view.tenant), (Stage::Queued, "acme"));
    assert_eq!(world.explain(1).waits, None);
}

#[test]
fn a_request_is_remembered_as_it_ended() {
    let mut world = World::new(&[("d", Role::Decode)]);
    assert!(world.submit(1) && world.submit(2));
    world.token(1, 0, None);
    assert_eq!(world.stages(), [Stage::Decode, Stage::Prefill]);
    world.now += Duration::from_millis(30);
    world.token(1, 1, Some(NodeFinish::EndOfSequence));
    let record = world.explain(1).record;
    assert_eq!(record.view.stage, Stage::Finished);
    assert_eq!(record.view.usage.completion_tokens, 2);
    assert_eq!(record.view.decode, Some(node("d")));
    assert!(record.decision.is_some());
    let totals = world.control.pulse(world.now).totals;
    assert_eq!((totals.finished, totals.prompt_tokens, totals.generated_tokens), (1, 100, 2));

    // The node dies: the other one is tried again, and found failed when its time is over.
    world.control.leave(&node("d"), LinkId(1), world.now, &mut world.out);
    let record = world.explain(2).record;
    assert_eq!(record.view.stage, Stage::NoNodes);
    assert_eq!(record.failures, ["d was lost"]);
    while let Some(due) =
        world.control.poll_timeout().filter(|_| !world.control.requests.is_empty())
    {
        world.now = due;
        world.control.handle_timeout(due, &mut world.out);
    }
    assert_eq!(world.explain(2).record.view.stage, Stage::Failed);
    let told: Vec<_> = world.control.events_after(0, 99).into_iter().map(|e| e.what).collect();
    let left: NodeId = node("d");
    assert_eq!(told[1], Happening::Left(left));
    assert!(
        matches!(&told[2], Happening::Retried { attempt: 1, reason, .. } if reason == "d was lost")
    );
    assert!(matches!(&told[3], Happening::Failed { request: RequestId(2), .. }), "{told:?}");
}

#[test]
fn an_operator_ends_the_one_request_that_is_meant() {
    let mut world = World::new(&[("d", Role::Decode)]);
    let id = |n: u128| n << 120 | 5;
    assert!(world.submit(id(0x1a)) && world.submit(id(0x1b)));
    let (now, out) = (world.now, &mut Vec::new());
    let mut cancel =
        |prefix: &str| world.control.cancel_one(IdPrefix::parse(prefix).unwrap(), now, out);
    assert_eq!(cancel("1"), Err(FindError::Ambiguous));
    assert_eq!(cancel("2"), Err(FindError::Unknown));
    assert_eq!(cancel("1a"), Ok(RequestId(id(0x1a))));
    assert_eq!(cancel("1a"), Err(FindError::Ended(RequestId(id(0x1a)))));
    assert_eq!(cancel("1"), Ok(RequestId(id(0x1b))), "only one of them still runs");
    assert_eq!(world.stages(), [Stage::Cancelled; 2]);
}

#[test]
fn refusals_are_remembered_apart_and_told_as_one() {
    let mut world = World::new(&[("d", Role::Decode)]);
    (0..REQUESTS as u128).for_each(|id| assert!(world.submit(id)));
    (1000..3000).for_each(|id| assert!(!world.submit(id)));
    assert_eq!(world.stages().len(), REQUESTS + MOST_REFUSED);
    let record = world.explain(2999).record;
    assert_eq!(record.view.stage, Stage::Refused);
    assert!(record.view.error.unwrap().starts_with("too many requests"));
    assert_eq!(world.control.newest_event(), 2, "one joined, and refusals began");
    assert!(world.control.pulse(world.now).alerts.iter().any(|alert| alert.code == "REFUSING"));
}
