//! An attempt that fetches a prefix, and what becomes of it when that fails.

use super::*;

/// A request runs on `p` and `d`, and `p` fetches a prefix from `q`.
fn pulling() -> World {
    let mut world = World::new();
    world.script.source = Some("q");
    world.arrive(REQUEST, |_| {}).unwrap();
    assert_eq!(world.sent_words(), ["serve q", "prefill p", "reserve d"]);
    world
}

fn cannot_serve(attempt: u32) -> NodeEvent {
    let (id, reason) = (id(attempt).pull(), "draining".to_owned());
    NodeEvent::Failed { id, reason, retry: Retry::OtherNode }
}

/// Nobody but the pair has to do with the request any more.
fn ends_without_its_source(world: &mut World) {
    world.act(|requests, cx| requests.cancel(REQUEST, cx));
    assert_eq!(world.sent_words(), ["cancel d", "cancel p"]);
}

#[test]
fn who_waits_for_a_prefix_that_does_not_come_is_told_so() {
    let mut world = pulling();
    world.hear("q", cannot_serve(1));
    assert_eq!(world.sent_words(), ["cancel-pull p"]);
    world.hear("q", cannot_serve(1));
    assert!(world.sent().is_empty(), "once");
    ends_without_its_source(&mut world);
}

#[test]
fn a_lost_source_ends_the_pull_and_is_told_nothing() {
    let mut world = pulling();
    world.lose("q");
    assert_eq!(world.sent_words(), ["cancel-pull p"]);
    ends_without_its_source(&mut world);
}

#[test]
fn a_source_that_is_the_decode_node_as_well_costs_the_attempt() {
    let mut world = World::new();
    world.script.source = Some("d");
    world.arrive(REQUEST, |_| {}).unwrap();
    world.sent();
    world.script.source = None;
    world.lose("d");
    assert_eq!(world.sent_words(), ["cancel-pull p", "cancel p", "prefill p", "reserve d"]);
}

#[test]
fn only_the_source_of_this_attempt_can_fail_its_pull() {
    let mut world = pulling();
    world.hear("d", cannot_serve(1));
    world.hear("q", cannot_serve(2));
    assert!(world.sent().is_empty());
    let took = Duration::from_millis(1);
    world.hear("p", NodeEvent::Pulled { id: id(1), tokens: 4, took });
    world.hear("q", cannot_serve(1));
    world.lose("q");
    assert!(world.sent().is_empty(), "it is over");
    ends_without_its_source(&mut world);
}
