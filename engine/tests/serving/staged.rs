//! Leases of blocks that lie in a device's memory: who waits for what, and who keeps what.

use std::sync::Arc;
use std::task::{Context, Waker};

use baton_engine::testing::delayed::{Clocks, NOT_YET};
use baton_engine::{BlockLease, FirstToken, Kind, MemoryLost, PeerKv, SharedKv, Soon};
use baton_proto::message::Job;

use crate::support::{Node, ahead, expected, hand_over, id, job, prompt, wait};

/// Of the fake model in blocks of 4 tokens.
const PIECE: usize = 64;

/// A node whose blocks are read and written through `slots` slots of two pieces each way.
fn staged(slots: usize) -> (Clocks, Node) {
    Node::staged((slots, 2 * PIECE))
}

fn is_ready<T>(soon: &mut Soon<T>) -> bool {
    soon.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

/// An export whose prompt is computed: 5 blocks, all of them complete.
fn exported(node: &Node) -> (Job, Arc<BlockLease>) {
    let job = job(1, prompt(1, 18), 1);
    node.submit(&job, Kind::Export);
    let lease = node.admitted(job.id).0.expect("an export has a lease");
    node.tokens();
    (job, lease)
}

/// The lease of an import of 5 blocks.
fn imported(node: &Node) -> Arc<BlockLease> {
    node.submit(&job(1, prompt(1, 18), 4), Kind::Import);
    node.admitted(id(1)).0.expect("an import has a lease")
}

#[test]
fn what_goes_through_staging_changes_no_token() {
    let ((a, from), (b, to)) = (staged(1), staged(3));
    a.run();
    b.run();
    for (request, length) in [(1, 30), (2, 7), (3, 90)] {
        let job = job(request, prompt(request, length), 9);
        let (held, tokens) = hand_over(&from, &to, &job, &mut |_| {});
        assert_eq!((held, tokens), (0, expected(&job)));
    }
    from.idle();
    to.idle();
}

#[test]
fn what_goes_through_staging_changes_no_token_when_devices_run_ahead() {
    ahead(what_goes_through_staging_changes_no_token);
}

#[test]
fn a_read_ends_with_its_copy_and_the_ring_is_its_bound() {
    let (clocks, node) = staged(2);
    let (_, lease) = exported(&node);
    let mut reads: Vec<_> = (0..3).map(|layer| lease.read(layer, 1..3)).collect();
    // The second one begins when the first has ended, or before.
    clocks.out.wait_begun(1);
    assert!(reads.iter_mut().all(|read| !is_ready(read)), "no copy has ended");
    clocks.out.allow(2);
    let first = wait(reads.remove(0)).unwrap();
    let second = wait(reads.remove(0)).unwrap();
    assert_eq!(first[0].as_ref().len(), 2 * PIECE);
    assert!(first[0].as_ref().iter().any(|&byte| byte != NOT_YET));
    assert_ne!(first[0].as_ref(), second[0].as_ref());
    assert_eq!(clocks.out.begun(), 2, "both slots are in use");
    drop(second);
    clocks.out.wait_begun(3);
    clocks.out.allow(1);
    assert_ne!(first[0].as_ref(), wait(reads.remove(0)).unwrap()[0].as_ref());
}

#[test]
fn a_read_that_nobody_waits_for_takes_no_slot() {
    let (clocks, node) = staged(1);
    let (_, lease) = exported(&node);
    let kept = lease.read(0, 0..1);
    drop(lease.read(1, 0..1));
    let last = lease.read(2, 0..1);
    clocks.run();
    drop(wait(kept).unwrap());
    assert!(wait(last).is_ok());
    assert_eq!(clocks.out.begun(), 2);
}

#[test]
fn a_source_keeps_its_blocks_until_its_copies_have_ended() {
    let (clocks, node) = staged(2);
    let (export, lease) = exported(&node);
    let read = lease.read(0, 0..2);
    clocks.out.wait_begun(1);
    drop((read, lease));
    node.engine.cancel(export.id);
    // The engine has heard all of that when it answers.
    node.submit(&job(2, prompt(2, 8), 1), Kind::Local);
    node.tokens();
    assert_eq!(node.engine.report().blocks.leased, 5, "the device still reads");
    clocks.run();
    node.eventually(|report| report.blocks.leased == 0);
}

#[test]
fn a_cancelled_import_keeps_its_blocks_until_its_copies_have_ended() {
    let (clocks, node) = staged(2);
    let lease = imported(&node);
    let mut place = wait(lease.place(1, 2..4)).unwrap();
    place.write(2, 0, &[7; PIECE]);
    let mut applied = place.apply();
    clocks.into.wait_begun(1);
    assert!(!is_ready(&mut applied));
    drop(applied);
    drop(lease);
    node.engine.cancel(id(1));
    node.submit(&job(2, prompt(2, 8), 1), Kind::Local);
    node.tokens();
    assert_eq!(node.engine.report().blocks.leased, 5, "the device still writes");
    clocks.run();
    node.eventually(|report| report.blocks.leased == 0);
    node.eventually(|report| report.blocks.active == 0);
}

#[test]
fn places_wait_for_slots_and_a_dropped_one_gives_its_back() {
    let (clocks, node) = staged(1);
    let lease = imported(&node);
    let place = wait(lease.place(0, 0..2)).unwrap();
    let mut next = lease.place(0, 2..4);
    assert!(!is_ready(&mut next));
    drop(place);
    let mut place = wait(next).unwrap();
    place.write(3, 0, &[1; PIECE]);
    let (applied, mut waits) = (place.apply(), lease.place(1, 0..2));
    clocks.into.wait_begun(1);
    assert!(!is_ready(&mut waits), "the slot is the copy's");
    clocks.into.allow(1);
    wait(applied).unwrap();
    assert!(wait(waits).is_ok());
}

#[test]
fn only_what_was_written_is_applied_and_nothing_once_the_sequence_runs() {
    let ((a, from), (b, to)) = (staged(2), staged(2));
    a.run();
    b.run();
    let import = job(1, prompt(1, 18), 6);
    let mut late = None;
    let (_, tokens) =
        crate::support::hand_over_with(&from, &to, &import, &mut |_| {}, &mut |lease| {
            // Written nowhere: a place of two blocks of which none was touched.
            wait(wait(lease.place(0, 0..2)).unwrap().apply()).unwrap();
            late = Some(lease.clone());
        });
    let late = late.unwrap();
    let mut place = wait(late.place(0, 0..1)).unwrap();
    place.write(0, 0, &[0xff; PIECE]);
    wait(place.apply()).unwrap();
    drop(late);
    to.ended(import.id);
    assert_eq!(tokens, expected(&import));
    let again = job(2, prompt(1, 18), 6);
    to.submit(&again, Kind::Local);
    assert_eq!(to.until_ended(1)[&again.id], expected(&again), "what is cached is intact");
}

/// Two nodes of one machine: the first has exported, the second opened its cache.
fn neighbours() -> ([Clocks; 2], [Node; 2], Arc<BlockLease>, PeerKv) {
    let ((a, from), (b, to)) = (staged(1), staged(1));
    let (_, export) = exported(&from);
    let shared = from.engine.memory().shared().expect("it can be opened");
    let peer =
        wait(to.engine.memory().open(shared)).expect("the device lives").expect("it is open");
    ([a, b], [from, to], export, peer)
}

#[test]
fn a_neighbours_blocks_are_copied_without_a_slot() {
    let ([a, b], [from, to], export, peer) = neighbours();
    b.into.allow(3);
    let import = job(1, prompt(1, 18), 4);
    to.submit(&import, Kind::Import);
    let lease = to.admitted(import.id).0.unwrap();
    for layer in 0..3 {
        let copied = lease.copy_from(&peer, layer, 0..5, export.block_ids(0..5).to_vec());
        assert_eq!(wait(copied), Ok(true));
    }
    drop((lease, export));
    from.ended(import.id);
    let first = expected(&import)[0];
    to.engine.imported(import.id, FirstToken { token: first, logprobs: None, finish: None });
    assert_eq!(to.until_ended(1)[&import.id], expected(&import)[1..]);
    assert_eq!((a.out.begun(), b.into.begun()), (0, 3));
}

#[test]
fn a_copy_from_a_neighbour_keeps_the_lease_and_what_is_not_there_is_not_copied() {
    let ([_, b], [_from, to], export, peer) = neighbours();
    let lease = imported(&to);
    let theirs = export.block_ids(0..2).to_vec();
    let outside = lease.copy_from(&peer, 0, 0..2, vec![0, peer.blocks]);
    assert_eq!(wait(outside), Ok(false));
    assert_eq!(wait(lease.copy_from(&peer, 0, 0..2, vec![0])), Ok(false));
    let mut copied = lease.copy_from(&peer, 0, 0..2, theirs.clone());
    b.into.wait_begun(1);
    assert!(!is_ready(&mut copied));
    drop((copied, lease));
    to.engine.cancel(id(1));
    to.submit(&job(2, prompt(2, 8), 1), Kind::Local);
    to.tokens();
    assert_eq!(to.engine.report().blocks.leased, 5, "the device still copies");
    b.run();
    to.eventually(|report| report.blocks.leased == 0);
    let gone = SharedKv { blocks: 1, description: vec![7; 8] };
    assert!(wait(to.engine.memory().open(gone)).unwrap().is_none());
}

#[test]
fn a_failed_device_fails_every_copy_and_nobody_waits_for_ever() {
    let (clocks, node) = staged(1);
    let (_, lease) = exported(&node);
    let (begun, queued) = (lease.read(0, 0..1), lease.read(1, 0..1));
    clocks.out.wait_begun(1);
    clocks.out.fail();
    assert_eq!(wait(begun).err(), Some(MemoryLost));
    assert_eq!(wait(queued).err(), Some(MemoryLost));
    assert_eq!(wait(lease.read(2, 0..1)).err(), Some(MemoryLost));
}
