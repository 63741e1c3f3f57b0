//! Single courses of events; random ones are in `tests/simulation`.

use std::collections::VecDeque;

use baton_proto::hash::{CacheSalt, ModelRoot};
use baton_proto::ids::{Epoch, NodeId, Role};
use baton_proto::message::{Job, Logprobs, NodeFinish, Peer, Retry, TokenEvent};
use baton_proto::sampling::SamplingParams;

use super::*;
use crate::decision::{Considered, Decision};
use crate::placement::cost::Cost;
use crate::testing::{hello, node};

#[path = "pull_tests.rs"]
mod pulls;

const REQUEST: RequestId = RequestId(7);

/// Gives the nodes of a list; an empty one, `p` and `d` for ever.
#[derive(Default)]
struct Script {
    next: VecDeque<Option<(Option<&'static str>, &'static str)>>,
    /// Promises not yet ended.
    open: Vec<(NodeId, TransferId)>,
    avoided: Vec<NodeRef>,
    /// Every attempt is held, and this is what its turn brings.
    held: Option<Placed>,
    holds: bool,
    /// From whom every attempt fetches a prefix.
    source: Option<&'static str>,
    /// Requests that were answered.
    answers: usize,
}

fn decision(prefill: Option<&Peer>, decode: &Peer) -> Decision {
    let considered = Considered {
        prefill: prefill.map(|peer| peer.node.clone()),
        decode: decode.node.clone(),
        pull: None,
        cached: 0,
        cost: Cost::default(),
    };
    Decision { prefill_nodes: 1, decode_nodes: 1, considered: vec![considered], ..nowhere() }
}

fn nowhere() -> Decision {
    Decision {
        at: Instant::now(),
        tokens: 5,
        prefill_nodes: 0,
        decode_nodes: 0,
        considered: Vec::new(),
        left_out: Vec::new(),
        more_left_out: 0,
        of_other_models: 0,
    }
}

impl Placer for Script {
    fn place(&mut self, wanted: &Wanted<'_>, _: Instant) -> Answer {
        self.avoided = wanted.avoid.to_vec();
        let next = self.next.pop_front().unwrap_or(Some((Some("p"), "d")));
        let Some((prefill, decode)) = next else { return Answer::NoNodes(nowhere()) };
        let peer = |name: &str| Peer {
            node: node(name),
            epoch: Epoch(1),
            kv_address: "127.0.0.1:1".to_owned(),
        };
        self.open.extend(prefill.into_iter().chain([decode]).map(|name| (node(name), wanted.id)));
        let (prefill, decode) = (prefill.map(peer), peer(decode));
        let pull = self.source.map(|name| (peer(name), 4));
        let decision = decision(prefill.as_ref(), &decode);
        let placed = Placed { prefill, decode, pull, decision };
        if self.holds {
            let decision = placed.decision.clone();
            self.held = Some(placed);
            return Answer::Held(decision);
        }
        Answer::Go(placed)
    }

    fn withdraw(&mut self, _: RequestId) {}
    fn started(&mut self, _: &NodeId, _: TransferId, _: usize) {}
    fn prefilled(&mut self, _: &NodeId, _: TransferId, _: Duration, _: Instant) {}
    fn handed_over(&mut self, _: TransferId, _: Duration, _: u64, _: Instant) {}
    fn pulled(&mut self, _: TransferId, _: usize, _: Duration, _: Instant) {}
    fn failed(&mut self, _: &NodeId, _: Instant) {}
    fn answered(&mut self, _: &NodeId, _: ModelRoot, _: usize, _: Instant) {
        self.answers += 1;
    }

    fn ended(&mut self, node: &NodeId, id: TransferId, _: Instant) {
        let before = self.open.len();
        self.open.retain(|open| *open != (node.clone(), id));
        assert_eq!(self.open.len() + 1, before, "a node's part ends once");
    }
}

struct World {
    requests: Requests,
    script: Script,
    now: Instant,
    events: Events,
    out: Vec<Action>,
}

fn life(name: &str) -> NodeRef {
    NodeRef { node: node(name), epoch: Epoch(1) }
}

fn id(attempt: u32) -> TransferId {
    TransferId { request: REQUEST, attempt }
}

fn token(attempt: u32, position: u32, token: u32, finish: Option<NodeFinish>) -> NodeEvent {
    let logprobs = None;
    let prefill = (position == 0).then_some(Duration::from_millis(9));
    let id = id(attempt);
    NodeEvent::Tokens(vec![TokenEvent { id, position, token, logprobs, finish, prefill }])
}

fn failed(attempt: u32, retry: Retry) -> NodeEvent {
    NodeEvent::Failed { id: id(attempt), reason: "broken".to_owned(), retry }
}

fn transferred(attempt: u32) -> NodeEvent {
    let (hidden, exposed) = (Duration::from_millis(2), Duration::from_millis(3));
    NodeEvent::Transferred { id: id(attempt), hidden, exposed, bytes: 64, blocks: 1 }
}

impl World {
    fn new() -> Self {
        let requests = Requests::new(Limits { requests: 2, tokens: 20 });
        let events = Events::default();
        Self { requests, script: Script::default(), now: Instant::now(), events, out: Vec::new() }
    }

    fn act<T>(&mut self, act: impl FnOnce(&mut Requests, &mut Context<'_>) -> T) -> T {
        let placer = &mut self.script;
        act(
            &mut self.requests,
            &mut Context { now: self.now, placer, events: &mut self.events, out: &mut self.out },
        )
    }

    fn arrive(
        &mut self,
        id: RequestId,
        change: impl FnOnce(&mut NewRequest),
    ) -> Result<(), SubmitError> {
        let hello = hello(Role::Decode, 1);
        let model = ModelInfo {
            name: hello.model.clone(),
            root: hello.root,
            geometry: hello.geometry,
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            hidden_size: 4,
        };
        let sampling = SamplingParams { max_tokens: 4, ..SamplingParams::default() };
        let (tokens, salt) = (vec![1, 2, 3, 4, 5], CacheSalt::default());
        let mut new = NewRequest {
            id,
            model: hello.model,
            tokens: tokens.into(),
            embed: None,
            sampling,
            salt,
            standing: Default::default(),
            tenant: Default::default(),
            deadline: None,
            trace: None,
        };
        change(&mut new);
        let chain = model.root.chain(new.salt, &new.tokens, 4);
        let now = self.now;
        self.act(|requests, cx| requests.arrive(new, Arc::new(chain), model, now, cx))
    }

    fn hear(&mut self, from: &str, event: NodeEvent) {
        self.act(|requests, cx| requests.event(&life(from), event, cx));
    }

    fn lose(&mut self, name: &str) {
        self.act(|requests, cx| requests.node_lost(&life(name), cx));
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        self.act(Requests::handle_timeout);
    }

    /// What was sent since the last call: node, command in a word, tokens.
    fn sent(&mut self) -> Vec<(String, &'static str, Vec<u32>)> {
        let sends = std::mem::take(&mut self.out).into_iter().filter_map(|action| match action {
            Action::Send { to, command } => Some((to.node.to_string(), command)),
            update @ Action::Update { .. } => {
                self.out.push(update);
                None
            }
        });
        sends
            .map(|(to, command)| match command {
                Command::Prefill { job, .. } => (to, "prefill", job.tokens.to_vec()),
                Command::Decode { job, prefill: Some(_), .. } => {
                    (to, "reserve", job.tokens.to_vec())
                }
                Command::Decode { job, prefill: None, .. } => (to, "decode", job.tokens.to_vec()),
                Command::Embed { job, .. } => (to, "embed", job.tokens.to_vec()),
                Command::Serve { tokens, .. } => (to, "serve", tokens),
                Command::Cancel(id) if id.is_pull() => (to, "cancel-pull", Vec::new()),
                Command::Cancel(_) => (to, "cancel", Vec::new()),
                Command::SendSnapshot => (to, "snapshot", Vec::new()),
                other => panic!("unexpected {other:?}"),
            })
            .collect()
    }

    fn sent_words(&mut self) -> Vec<String> {
        self.sent().into_iter().map(|(to, word, _)| format!("{word} {to}")).collect()
    }

    fn jobs(&self) -> Vec<Job> {
        let jobs = self.out.iter().filter_map(|action| match action {
            Action::Send { command: Command::Decode { job, .. }, .. } => Some(job.clone()),
            _ => None,
        });
        jobs.collect()
    }

    /// Tokens told to the client since the last call, and how it ended.
    fn told(&mut self) -> (Vec<u32>, Option<Update>) {
        let (mut tokens, mut end) = (Vec::new(), None);
        for action in std::mem::take(&mut self.out) {
            let Action::Update { update, .. } = action else { continue };
            assert!(end.is_none(), "told after the end");
            match update {
                Update::Tokens(more) => tokens.extend(more.iter().map(|token| token.token)),
                Update::PromptLogprobs(_) => {}
                last => end = Some(last),
            }
        }
        (tokens, end)
    }
}

#[test]
fn the_usual_course() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    assert_eq!(world.sent_words(), ["prefill p", "reserve d"]);
    let queued = Duration::from_millis(1);
    world.hear("p", NodeEvent::Started { id: id(1), cached_tokens: 4, queued });
    world.hear("d", NodeEvent::Started { id: id(1), cached_tokens: 0, queued: Duration::ZERO });
    world.now += Duration::from_millis(10);
    world.hear("p", token(1, 0, 10, None));
    world.hear("p", transferred(1));
    world.hear("d", token(1, 1, 11, None));
    world.hear("d", token(1, 1, 11, None));
    world.now += Duration::from_millis(10);
    world.hear("d", token(1, 2, 12, Some(NodeFinish::EndOfSequence)));
    assert_eq!(world.sent_words(), Vec::<String>::new(), "nobody is left to be told");
    let (tokens, Some(Update::Done(summary))) = world.told() else { panic!("not done") };
    assert_eq!(tokens, [10, 11, 12]);
    assert_eq!(summary.finish, Some(NodeFinish::EndOfSequence));
    let usage = summary.usage;
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (5, 4, 3));
    let ms = Duration::from_millis;
    let t = summary.timings;
    assert_eq!((t.queue, t.prefill, t.first_token, t.total), (ms(1), ms(9), ms(10), ms(20)));
    assert_eq!((t.transfer_hidden, t.transfer_exposed, t.transfer_bytes), (ms(2), ms(3), 64));
    assert_eq!(summary.placement.attempts, 1);
    assert!(world.script.open.is_empty() && world.requests.is_empty());
    assert_eq!(world.requests.poll_timeout(), None);
}

#[test]
fn a_first_token_that_is_the_last_cancels_the_rest() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.sent();
    world.hear("p", token(1, 0, 10, Some(NodeFinish::StopToken(10))));
    assert_eq!(world.sent_words(), ["cancel d", "cancel p"]);
    assert!(matches!(world.told(), (tokens, Some(Update::Done(_))) if tokens == [10]));
}

#[test]
fn the_end_waits_a_moment_for_the_report_of_the_transfer() {
    for report in [true, false] {
        let mut world = World::new();
        world.arrive(REQUEST, |_| {}).unwrap();
        world.hear("p", token(1, 0, 10, None));
        world.hear("d", token(1, 1, 11, Some(NodeFinish::EndOfSequence)));
        world.sent();
        assert!(matches!(world.told(), (tokens, None) if tokens == [10, 11]));
        if report {
            world.hear("p", transferred(1));
            assert!(world.sent().is_empty());
        } else {
            world.wait(Duration::from_millis(100));
            assert_eq!(world.sent_words(), ["cancel p"]);
        }
        let (_, Some(Update::Done(summary))) = world.told() else { panic!("not done") };
        assert_eq!(summary.timings.transfer_bytes, if report { 64 } else { 0 });
    }
}

#[test]
fn a_lost_first_token_is_computed_again_though_the_decode_node_goes_on() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.hear("d", token(1, 1, 11, None));
    assert!(world.told().0.is_empty(), "the second token waits for the first");
    world.lose("p");
    assert_eq!(world.sent_words(), ["cancel d", "prefill p", "reserve d"]);
    world.hear("d", token(1, 2, 12, None));
    world.hear("d", token(2, 1, 11, None));
    world.hear("p", token(2, 0, 10, None));
    assert_eq!(world.told().0, [10, 11]);
}

#[test]
fn a_prefill_node_that_is_done_can_be_lost() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.hear("p", token(1, 0, 10, None));
    world.hear("d", token(1, 1, 11, None));
    world.sent();
    world.lose("p");
    assert!(world.sent().is_empty());
    world.hear("d", token(1, 2, 12, Some(NodeFinish::EndOfSequence)));
    assert!(matches!(world.told(), (tokens, Some(Update::Done(_))) if tokens == [10, 11, 12]));
}

#[test]
fn a_dead_decode_node_costs_no_token() {
    let mut world = World::new();
    world.script.next = [Some((Some("p"), "d")), None, Some((None, "e"))].into();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.hear("p", token(1, 0, 10, None));
    world.hear("p", transferred(1));
    world.hear("d", token(1, 1, 11, None));
    world.sent();
    world.lose("d");
    assert!(world.sent().is_empty(), "no node is there");
    world.act(Requests::node_joined);
    assert_eq!(world.jobs()[0].prompt_tokens, 5);
    let tokens = vec![1, 2, 3, 4, 5, 10, 11];
    assert_eq!(world.sent(), [("e".to_owned(), "decode", tokens)]);
    world.hear("e", token(2, 2, 12, Some(NodeFinish::EndOfSequence)));
    let (tokens, Some(Update::Done(summary))) = world.told() else { panic!("not done") };
    assert_eq!(tokens, [10, 11, 12]);
    assert_eq!((summary.placement.attempts, summary.placement.prefill), (2, None));
    let Totals { finished, failed, retried, .. } = world.requests.totals();
    assert_eq!((finished, failed, retried), (1, 0, 1));
}

#[test]
fn the_first_attempt_of_a_request_that_was_held_repeats_nothing() {
    let mut world = World::new();
    world.script.holds = true;
    world.arrive(REQUEST, |_| {}).unwrap();
    assert!(world.sent().is_empty());
    let placed = world.script.held.take().expect("it is held");
    world.act(|requests, cx| requests.turn(REQUEST, placed, cx));
    assert_eq!(world.sent_words(), ["prefill p", "reserve d"]);
    assert_eq!(world.requests.totals(), Totals::default());
}

#[test]
fn attempts_that_fail_without_a_token_are_counted_and_elsewhere() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.sent();
    for attempt in 1..MAX_FRUITLESS_ATTEMPTS {
        world.hear("d", failed(attempt, Retry::OtherNode));
        assert_eq!(world.script.avoided, [life("d")]);
        assert_eq!(world.sent_words(), ["cancel p", "prefill p", "reserve d"]);
    }
    world.hear("d", failed(MAX_FRUITLESS_ATTEMPTS, Retry::OtherNode));
    let error = RequestError::Exhausted {
        attempts: MAX_FRUITLESS_ATTEMPTS,
        reason: "d: broken".to_owned(),
    };
    assert_eq!(world.told(), (Vec::new(), Some(Update::Failed(error))));
    assert!(world.script.open.is_empty());
}

#[test]
fn a_failure_that_would_repeat_ends_the_request() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.hear("p", failed(1, Retry::Never));
    world.sent();
    let error = RequestError::Rejected("p: broken".to_owned());
    assert_eq!(world.told(), (Vec::new(), Some(Update::Failed(error))));
}

#[test]
fn a_full_node_is_asked_again_until_time_is_over() {
    let mut world = World::new();
    world.script.next = [Some((None, "d"))].into();
    world.arrive(REQUEST, |_| {}).unwrap();
    let start = world.now;
    for attempt in 1..1000 {
        // Elsewhere there is none; after a pause the same node is taken again, and is full again.
        world.script.next = [None, None, Some((None, "d"))].into();
        world.hear("d", failed(attempt, Retry::SameNode));
        let Some(due) = world.requests.poll_timeout() else { break };
        world.wait(due - world.now);
        assert_eq!(world.jobs().last().map(|job| job.id.attempt), Some(attempt + 1));
    }
    assert!(world.now - start >= NODE_WAIT);
    assert!(matches!(world.told().1, Some(Update::Failed(RequestError::Exhausted { .. }))));
}

#[test]
fn time_on_nodes_is_not_time_without() {
    let mut world = World::new();
    world.script.next = [Some((Some("p"), "d")), Some((Some("p"), "d")), None, None].into();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.lose("p");
    // The prompt is long.
    world.now += 2 * NODE_WAIT;
    world.lose("p");
    let due = world.requests.poll_timeout().unwrap();
    world.wait(due - world.now);
    assert_eq!(world.told(), (Vec::new(), None));
    world.act(Requests::node_joined);
    assert_eq!(world.jobs().last().map(|job| job.id.attempt), Some(3));
    // Then without any node.
    world.script.next = vec![None; 1000].into();
    world.lose("p");
    let start = world.now;
    while let Some(due) = world.requests.poll_timeout() {
        world.wait(due - world.now);
    }
    assert!(world.now - start <= NODE_WAIT + Duration::from_secs(1));
    assert!(matches!(world.told().1, Some(Update::Failed(RequestError::NoNodes { .. }))));
}

#[test]
fn a_deadline_ends_everything() {
    let mut world = World::new();
    let deadline = Duration::from_secs(1);
    world.arrive(REQUEST, |new| new.deadline = Some(deadline)).unwrap();
    assert_eq!(world.jobs()[0].deadline, Some(deadline));
    world.sent();
    world.hear("p", token(1, 0, 10, None));
    assert_eq!(world.requests.poll_timeout(), Some(world.now + deadline));
    world.wait(deadline);
    assert_eq!(world.sent_words(), ["cancel d", "cancel p"]);
    let error = Update::Failed(RequestError::DeadlineExceeded);
    assert_eq!(world.told(), (vec![10], Some(error)));
    assert_eq!(world.requests.poll_timeout(), None);
}

#[test]
fn nodes_that_break_the_rules_lose_the_attempt() {
    let cases = [
        ("p", token(1, 1, 10, None)),
        ("p", token(1, 0, 1000, None)),
        ("d", token(1, 2, 10, None)),
        ("d", token(1, 4, 10, None)),
        ("p", NodeEvent::PromptLogprobs { id: id(1), tokens: Vec::new() }),
    ];
    for (from, event) in cases {
        let mut world = World::new();
        world.arrive(REQUEST, |new| new.sampling.prompt_logprobs = Some(0)).unwrap();
        world.sent();
        world.hear(from, event.clone());
        let words = ["cancel d", "cancel p", "prefill p", "reserve d"];
        assert_eq!(world.sent_words(), words, "{event:?}");
        assert!(world.told().0.is_empty());
    }
}

#[test]
fn what_nodes_say_after_the_last_token_changes_nothing() {
    let late = [
        ("p", token(1, 1, 10, None)),
        ("d", token(1, 2, 1000, None)),
        ("p", NodeEvent::PromptLogprobs { id: id(1), tokens: Vec::new() }),
    ];
    for (from, event) in late {
        let mut world = World::new();
        world.arrive(REQUEST, |new| new.sampling.prompt_logprobs = Some(0)).unwrap();
        world.hear("p", token(1, 0, 10, None));
        world.hear("d", token(1, 1, 11, Some(NodeFinish::EndOfSequence)));
        world.sent();
        world.hear(from, event.clone());
        assert!(world.sent().is_empty(), "{event:?}");
        world.hear("p", transferred(1));
        assert!(matches!(world.told(), (tokens, Some(Update::Done(_))) if tokens == [10, 11]));
    }
}

#[test]
fn log_probabilities_of_the_prompt_come_once() {
    let mut world = World::new();
    world.arrive(REQUEST, |new| new.sampling.prompt_logprobs = Some(0)).unwrap();
    let one = |token| (token, Logprobs { logprob: -1.0, top: Vec::new() });
    let event =
        |attempt| NodeEvent::PromptLogprobs { id: id(attempt), tokens: (2..=5).map(one).collect() };
    world.hear("p", event(1));
    world.lose("p");
    assert_eq!(world.jobs()[1].sampling.prompt_logprobs, None);
    world.hear("p", event(2));
    let sent = |action: &&Action| {
        matches!(action, Action::Update { update: Update::PromptLogprobs(_), .. })
    };
    assert_eq!(world.out.iter().filter(sent).count(), 1);
}

#[test]
fn what_is_held_is_bounded() {
    let mut world = World::new();
    world.arrive(RequestId(1), |_| {}).unwrap();
    assert_eq!(world.arrive(RequestId(1), |_| {}), Err(SubmitError::DuplicateId(RequestId(1))));
    let overloaded = Err(SubmitError::Overloaded { retry_after: RETRY_AFTER });
    assert_eq!(world.arrive(RequestId(2), |new| new.tokens = [1; 16].into()), overloaded);
    world.arrive(RequestId(2), |_| {}).unwrap();
    assert_eq!(world.arrive(RequestId(3), |_| {}), overloaded);
    world.act(|requests, cx| requests.cancel(RequestId(1), cx));
    world.arrive(RequestId(3), |_| {}).unwrap();
    world.act(Requests::shut_down);
    assert_eq!((world.requests.len(), world.requests.tokens), (0, 0));
    assert!(world.script.open.is_empty());
}

#[test]
fn without_nodes_nothing_is_kept() {
    let mut world = World::new();
    world.script.next = [None].into();
    assert_eq!(world.arrive(REQUEST, |_| {}), Err(SubmitError::NoNodes("demo".to_owned())));
    assert!(world.requests.is_empty() && world.out.is_empty());
}

#[path = "embedding_tests.rs"]
mod embedding_tests;
