//! Prefixes that are served and fetched.

use super::*;

/// Blocks that a job found in the cache when it was admitted.
fn cached_at_admission(rig: &Rig, id: TransferId) -> Option<usize> {
    rig.events.iter().find_map(|event| match event {
        Event::Admitted { id: admitted, cached_blocks, .. } if *admitted == id => {
            Some(*cached_blocks)
        }
        _ => None,
    })
}

#[test]
fn what_is_not_cached_is_not_served() {
    let mut rig = Rig::new(limits());
    let tokens = cached_prompt(&mut rig, 1, 2);
    rig.add(job(2, [&tokens[..], &[1; 4]].concat(), 1), Kind::Serve);
    rig.step();
    assert_eq!(failure(&rig), "2 of 3 blocks are cached");
    rig.events.clear();
    rig.add(job(3, tokens[..3].to_vec(), 1), Kind::Serve);
    rig.step();
    assert_eq!(failure(&rig), "0 of 0 blocks are cached", "a part of a block is not cached");
    assert_eq!(rig.scheduler.blocks().leased, 0);
}

#[test]
fn a_fetched_prefix_is_found_by_the_job_that_waited_for_it() {
    let mut rig = Rig::new(limits());
    let tokens = prompt(1, 14);
    rig.add(job(1, tokens[..12].to_vec(), 1), Kind::Fetch);
    rig.add(job(2, tokens, 1), Kind::Local);
    rig.scheduler.hold(id(2));
    rig.add(job(3, prompt(2, 5), 1), Kind::Local);
    rig.run();
    assert_eq!((rig.ends(id(3)), rig.ends(id(2))), (1, 0), "who is held is overtaken");
    assert_eq!((rig.scheduler.waiting(), rig.scheduler.blocks().leased), (1, 3));
    // The lease comes back before the end of the transfer is heard of.
    rig.scheduler.lease_returned(id(1));
    rig.step();
    assert_eq!((rig.ends(id(1)), rig.scheduler.blocks().leased), (0, 3));
    rig.scheduler.fetched(id(1));
    rig.scheduler.release(id(2));
    rig.run();
    let cached = cached_at_admission(&rig, id(2));
    assert_eq!((cached, rig.ends(id(1)), rig.ends(id(2))), (Some(3), 1, 1));
}

#[test]
fn who_needs_the_blocks_of_a_fetch_waits_for_it_and_others_do_not() {
    for arrives in [true, false] {
        let mut rig = Rig::new(limits());
        rig.add(job(1, prompt(1, 12), 1), Kind::Fetch);
        rig.add(job(2, prompt(1, 14), 1), Kind::Local);
        rig.add(job(3, prompt(2, 6), 1), Kind::Local);
        rig.run();
        assert_eq!((rig.ends(id(2)), rig.ends(id(3))), (0, 1));
        assert_eq!(rig.scheduler.waiting(), 1);
        if arrives {
            rig.scheduler.fetched(id(1));
        } else {
            rig.scheduler.cancel(id(1));
        }
        rig.scheduler.check();
        rig.scheduler.lease_returned(id(1));
        rig.run();
        let cached = cached_at_admission(&rig, id(2));
        assert_eq!(cached, Some(if arrives { 3 } else { 0 }));
        assert_eq!(rig.ends(id(2)), 1);
    }
}

#[test]
fn a_fetch_that_comes_to_nothing_leaves_nothing() {
    let mut rig = Rig::new(limits());
    rig.add(job(1, prompt(1, 12), 1), Kind::Fetch);
    rig.step();
    rig.scheduler.cancel(id(1));
    rig.scheduler.lease_returned(id(1));
    rig.scheduler.fetched(id(1));
    rig.step();
    assert_eq!((rig.ends(id(1)), rig.scheduler.cached_hashes().len()), (1, 0));
    assert_eq!(rig.scheduler.blocks().free, limits().kv_blocks as u64);
}

#[test]
fn a_fetch_waits_for_nothing() {
    let mut rig = Rig::new(limits());
    let tokens = cached_prompt(&mut rig, 1, 2);
    rig.add(job(2, tokens, 1), Kind::Fetch);
    rig.step();
    assert_eq!(failure(&rig), "nothing is missing");
    rig.events.clear();
    rig.add(job(3, prompt(2, 40), 1), Kind::Import);
    rig.step();
    rig.events.clear();
    rig.add(job(4, prompt(3, 8), 1), Kind::Fetch);
    rig.step();
    assert_eq!(failure(&rig), "there is no room for 2 blocks");
}

#[test]
fn an_equal_block_computed_during_a_fetch_is_kept_once() {
    let mut rig = Rig::new(limits());
    let tokens = prompt(1, 12);
    rig.scheduler.set_prefill_limit(2);
    rig.add(job(2, tokens[..6].to_vec(), 1), Kind::Local);
    rig.step();
    rig.add(job(1, tokens.clone(), 1), Kind::Fetch);
    rig.run();
    rig.scheduler.fetched(id(1));
    rig.scheduler.check();
    rig.scheduler.lease_returned(id(1));
    rig.step();
    let counts = rig.scheduler.blocks();
    assert_eq!((counts.cached, counts.free), (3, limits().kv_blocks as u64 - 3));
}
