//! Any order of what coordinators, the engine's real scheduler and the endpoint say.

use proptest::prelude::*;

use super::*;

mod judge;
mod operations;
mod world;

use operations::operation;
use world::World;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn whatever_happens_every_job_ends_once_and_every_block_comes_back(
        ops in prop::collection::vec(operation(), 1..150),
    ) {
        let mut world = World::new();
        for op in ops {
            world.apply(op);
        }
        world.settle();
        world.judge();
    }
}
