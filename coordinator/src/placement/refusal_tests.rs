//! Refusing what would be late, while predictions are young enough.

use std::sync::Arc;

use baton_proto::hash::CacheSalt;
use baton_proto::ids::Epoch;

use super::*;
use crate::core::ModelInfo;
use crate::index::Index;
use crate::requests::{Answer, Placer, Wanted};
use crate::testing::{GEOMETRY, hello, node};

/// A decode node `d` and a request that has to begin within a second.
struct World {
    placement: Placement,
    start: Instant,
    requests: u128,
}

impl World {
    fn new() -> Self {
        let start = Instant::now();
        let options = Options { most_wait: Some(Duration::from_secs(1)), ..Options::default() };
        let mut placement = Placement::new(Index::new(100), options, start);
        placement.join(&node("d"), &hello(Role::Decode, 1), start);
        Self { placement, start, requests: 0 }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    /// A request of 100 tokens arrives, `seconds` after the start.
    fn arrive(&mut self, seconds: u64) -> (TransferId, Answer) {
        self.requests += 1;
        let id = TransferId { request: RequestId(self.requests), attempt: 1 };
        let hello = hello(Role::Decode, 1);
        let model = ModelInfo {
            name: hello.model,
            root: hello.root,
            geometry: GEOMETRY,
            max_model_len: hello.max_model_len,
            vocab_size: hello.vocab_size,
            hidden_size: 4,
        };
        let tokens: Vec<u32> = (0..100).map(|token| token + 7 * self.requests as u32).collect();
        let chain = Arc::new(model.root.chain(CacheSalt::default(), &tokens, 4));
        let now = self.at(seconds);
        let wanted = Wanted {
            id,
            model: &model,
            tokens: tokens.len(),
            longest: 200,
            embeds: false,
            chain: &chain,
            avoid: &[],
            standing: Standing::default(),
            arrived: now,
            deadline: None,
            arrives: true,
        };
        (id, self.placement.place(&wanted, now))
    }

    /// The node has served the request, whose prompt took so long.
    fn serve(&mut self, id: TransferId, took: Duration, seconds: u64) {
        let (d, now) = (node("d"), self.at(seconds));
        self.placement.prefilled(&d, id, took, now);
        self.placement.ended(&d, id, now);
    }
}

#[test]
fn a_node_that_was_slow_once_is_tried_again() {
    let mut world = World::new();
    for seconds in [0, 10, 20] {
        let (slow, answer) = world.arrive(seconds);
        assert!(matches!(answer, Answer::Go(placed) if placed.decode.epoch == Epoch(1)));
        world.serve(slow, Duration::from_secs(5), seconds + 6);
    }
    assert!(matches!(world.arrive(27).1, Answer::TooLate { .. }), "it would take too long");
    // Nobody measures a node that gets nothing: what is known of it is old by now.
    let (again, answer) = world.arrive(40);
    assert!(matches!(answer, Answer::Go(_)));
    assert!(matches!(world.arrive(40).1, Answer::TooLate { .. }), "one request can tell");
    world.serve(again, Duration::from_millis(10), 41);
    let served = (42..102).filter(|&seconds| match world.arrive(seconds) {
        (id, Answer::Go(_)) => {
            world.serve(id, Duration::from_millis(10), seconds);
            true
        }
        _ => false,
    });
    assert!(served.count() > 30, "it is fast again");
}
