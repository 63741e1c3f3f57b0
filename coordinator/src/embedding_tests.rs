//! The life of requests whose prompts are embedded.

use baton_proto::embedding::Pooling;
use baton_proto::message::Retry;

use super::*;

fn embedded(attempt: u32, values: Vec<f32>) -> NodeEvent {
    NodeEvent::Embedded { id: id(attempt), values, prefill: Duration::from_millis(7) }
}

/// A request that a node has begun to embed.
fn begun() -> World {
    let mut world = World::new();
    world.script.next = [Some((None, "p")), Some((None, "q"))].into();
    world.arrive(REQUEST, |new| new.embed = Some(Pooling::Last)).unwrap();
    assert_eq!(world.sent_words(), ["embed p"]);
    world
}

fn told(world: &mut World) -> Vec<Update> {
    let updates = std::mem::take(&mut world.out).into_iter();
    updates
        .filter_map(|action| match action {
            Action::Update { update, .. } => Some(update),
            Action::Send { .. } => None,
        })
        .collect()
}

#[test]
fn an_embedding_ends_its_request() {
    let mut world = begun();
    let queued = Duration::from_millis(2);
    world.hear("p", NodeEvent::Started { id: id(1), cached_tokens: 4, queued });
    world.now += Duration::from_millis(10);
    world.hear("p", embedded(1, vec![1.0; 4]));
    assert_eq!(world.sent_words(), Vec::<String>::new(), "the node ended it by itself");
    let updates = told(&mut world);
    let [Update::Embedding(values), Update::Done(summary)] = &updates[..] else {
        panic!("{updates:?}")
    };
    assert_eq!((&values[..], summary.finish), (&[1.0; 4][..], None));
    let usage = summary.usage;
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (5, 4, 0));
    let ms = Duration::from_millis;
    let t = summary.timings;
    assert_eq!((t.queue, t.prefill, t.total), (ms(2), ms(7), ms(10)));
    assert!(world.script.open.is_empty() && world.requests.is_empty());
    world.hear("p", embedded(1, vec![1.0; 4]));
    assert!(told(&mut world).is_empty(), "it has ended");
}

#[test]
fn a_lost_or_failing_node_costs_another_attempt() {
    for loss in [true, false] {
        let mut world = begun();
        if loss {
            world.lose("p");
        } else {
            world.hear("p", failed(1, Retry::OtherNode));
        }
        assert_eq!(world.sent(), [("q".to_owned(), "embed", vec![1, 2, 3, 4, 5])]);
        world.hear("p", embedded(1, vec![1.0; 4]));
        assert!(told(&mut world).is_empty(), "an earlier attempt is void");
        world.hear("q", embedded(2, vec![2.0; 4]));
        let updates = told(&mut world);
        assert!(
            matches!(&updates[..], [Update::Embedding(values), Update::Done(_)] if *values == [2.0; 4])
        );
    }
}

#[test]
fn a_vector_of_another_size_is_nobodys() {
    let mut world = begun();
    world.hear("p", embedded(1, vec![1.0; 3]));
    assert_eq!(world.sent_words(), ["cancel p", "embed q"]);
    assert!(told(&mut world).is_empty());
}

#[test]
fn who_asks_for_tokens_gets_no_embedding() {
    let mut world = World::new();
    world.arrive(REQUEST, |_| {}).unwrap();
    world.sent();
    world.hear("p", embedded(1, vec![1.0; 4]));
    assert!(told(&mut world).is_empty() && world.sent().is_empty());
}

#[test]
fn one_that_is_cancelled_or_late_stops_its_node() {
    let mut world = begun();
    world.act(|requests, cx| requests.cancel(REQUEST, cx));
    assert_eq!(world.sent_words(), ["cancel p"]);
    let mut world = World::new();
    world.script.next = [Some((None, "p"))].into();
    let deadline = Duration::from_millis(50);
    let change = |new: &mut NewRequest| {
        (new.embed, new.deadline) = (Some(Pooling::Mean), Some(deadline));
    };
    world.arrive(REQUEST, change).unwrap();
    world.sent();
    world.wait(deadline);
    assert_eq!(world.sent_words(), ["cancel p"]);
    let late = Update::Failed(RequestError::DeadlineExceeded);
    assert_eq!(told(&mut world), [late]);
}
