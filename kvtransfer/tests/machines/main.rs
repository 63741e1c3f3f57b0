//! `Sender` against `Receiver` without I/O, in virtual time, under every fault that a network
//! and two owners can come up with: whatever happens, both end, and what is visible is right.
#![allow(clippy::unwrap_used, reason = "a test")]

mod lies;
mod world;

use std::time::Duration;

use baton_kvtransfer::frame::Frame;
use baton_kvtransfer::limits::MAX_RETRIES;
use baton_kvtransfer::{ReceiveError, SendError, Timing, Transport};
use proptest::collection::vec;
use proptest::prelude::*;
use world::{LAYERS, LEASE, Sink, Step, World};

/// What owners and a connection do.
fn steps(blocks: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..LAYERS, 0..blocks, 0..=blocks)
            .prop_map(|(layer, from, to)| Step::Ready { layer, from, to }),
        1 => Just(Step::Finish),
        8 => Just(Step::Send),
        8 => Just(Step::ToReceiver(0)),
        8 => Just(Step::ToSender(0)),
        8 => Just(Step::Payload),
        1 => Just(Step::Corrupt),
        1 => Just(Step::Cut),
        2 => Just(Step::SenderNotices),
        2 => Just(Step::ReceiverNotices),
        3 => Just(Step::Connect),
        1 => Just(Step::Reserve),
        6 => Just(Step::Applied),
        1 => Just(Step::Unreadable),
        1 => Just(Step::Unable),
    ]
}

/// The same with cancels, waits, and what QUIC makes impossible.
fn steps_with_faults(blocks: u32) -> impl Strategy<Value = Step> {
    let faults = prop_oneof![
        (1usize..4).prop_map(Step::ToReceiver),
        (1usize..4).prop_map(Step::ToSender),
        Just(Step::DropToReceiver),
        Just(Step::DropToSender),
        Just(Step::RepeatToReceiver),
        Just(Step::RepeatToSender),
        Just(Step::RepeatPayload),
        (0u64..3000).prop_map(Step::Wait),
        Just(Step::CancelSender),
        Just(Step::CancelReceiver),
    ];
    prop_oneof![15 => steps(blocks), 1 => faults]
}

/// Blocks, how many of them are held, what the sink is; and what happens.
fn worlds<S: Strategy<Value = Step>>(
    steps: impl Fn(u32) -> S + Copy,
) -> impl Strategy<Value = ((u32, u32, Sink), Vec<Step>)> {
    let sinks = prop_oneof![
        Just(Sink::InPlace),
        Just(Sink::Staged),
        Just(Sink::Direct),
        Just(Sink::Channel),
    ];
    let worlds =
        (1u32..9, sinks).prop_flat_map(|(blocks, sink)| (Just(blocks), 0..=blocks, Just(sink)));
    worlds.prop_flat_map(move |world| (Just(world), vec(steps(world.0), 0..150)))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn whatever_happens_both_end(((blocks, held, sink), steps) in worlds(steps_with_faults)) {
        let mut world = World::with_sink(blocks, held, sink);
        for step in steps {
            world.apply(step);
        }
        prop_assert!(world.settle());
        world.assert_nothing_is_left();
    }

    /// Cuts, damage within the limit, and any interleaving of what QUIC keeps in order.
    #[test]
    fn what_quic_can_do_is_survived(((blocks, held, sink), steps) in worlds(steps)) {
        let mut world = World::with_sink(blocks, held, sink);
        for step in steps {
            // A connection that is lost is noticed before anything else is sent over the next.
            if matches!(step, Step::Connect) && !world.up {
                world.apply(Step::SenderNotices);
                world.apply(Step::ReceiverNotices);
                world.to_receiver.clear();
                world.to_sender.clear();
                world.payload.clear();
            }
            if matches!(step, Step::Cut) && world.links > 10 {
                continue;
            }
            world.apply(step);
        }
        if !world.up {
            world.to_receiver.clear();
            world.to_sender.clear();
            world.payload.clear();
        }
        prop_assert!(world.settle());
        prop_assert!(world.sender.outcome().unwrap().is_ok(), "{:?}", world.sender.outcome());
        world.assert_nothing_is_left();
    }
}

/// Both ends after the offer and the grant.
fn granted(blocks: u32, held: u32) -> World {
    let mut world = World::new(blocks, held);
    world.apply(Step::Reserve);
    world.apply(Step::Connect);
    world.apply(Step::ToReceiver(0));
    world.apply(Step::ToSender(0));
    world
}

fn ready_all(world: &mut World) {
    for layer in 0..LAYERS {
        let to = world.blocks;
        world.apply(Step::Ready { layer, from: 0, to });
    }
}

#[test]
fn contiguous_blocks_go_in_one_unit() {
    let mut world = granted(8, 2);
    for from in [2, 4, 6] {
        world.apply(Step::Ready { layer: 1, from, to: from + 2 });
    }
    world.apply(Step::Send);
    assert_eq!(world.payload.len(), 1);
    let run = world.payload[0].header.pieces.run;
    assert_eq!((run.first, run.count), (2, 6));
}

#[test]
fn a_damaged_unit_is_sent_again_and_then_given_up() {
    let mut world = granted(4, 0);
    world.apply(Step::Ready { layer: 0, from: 0, to: 4 });
    for _ in 0..=MAX_RETRIES {
        world.apply(Step::Send);
        world.payload[0].bytes[5] ^= 1;
        while !world.payload.is_empty() {
            world.apply(Step::Payload);
        }
        world.apply(Step::ToSender(0));
    }
    assert_eq!(world.receiver.outcome(), Some(&Err(ReceiveError::Corrupt)));
    let refused = SendError::Refused(baton_kvtransfer::Reason::Corrupt);
    assert_eq!(world.sender.outcome(), Some(&Err(refused)));
    assert!(world.landed.is_empty());
}

#[test]
fn a_reconnect_sends_only_what_has_not_landed() {
    let mut world = granted(8, 0);
    world.apply(Step::Ready { layer: 0, from: 0, to: 8 });
    world.apply(Step::Send);
    while !world.payload.is_empty() {
        world.apply(Step::Payload);
    }
    ready_all(&mut world);
    world.apply(Step::Send);
    for step in [Step::Cut, Step::SenderNotices, Step::ReceiverNotices, Step::Connect] {
        world.apply(step);
    }
    assert!(world.settle());
    assert_eq!(world.sent, 16, "layers 1 and 2, and not layer 0 again");
    assert!(world.sender.outcome().unwrap().is_ok());
}

#[test]
fn a_lost_acknowledgement_is_repeated() {
    let mut world = granted(2, 0);
    ready_all(&mut world);
    world.apply(Step::Finish);
    while world.receiver.outcome().is_none() {
        for step in [Step::Send, Step::Payload, Step::ToReceiver(0)] {
            world.apply(step);
        }
    }
    world.to_sender.clear();
    for step in [Step::Cut, Step::SenderNotices, Step::Connect] {
        world.apply(step);
    }
    world.apply(Step::ToReceiver(0));
    world.apply(Step::ToSender(0));
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!((sent.blocks, sent.bytes), (2, 6 * 8));
}

#[test]
fn complete_means_applied() {
    let mut world = World::with_sink(2, 0, Sink::Staged);
    for step in [Step::Reserve, Step::Connect, Step::ToReceiver(0), Step::ToSender(0)] {
        world.apply(step);
    }
    ready_all(&mut world);
    world.apply(Step::Finish);
    while world.applying.len() < LAYERS as usize {
        for step in [Step::Send, Step::Payload, Step::ToReceiver(0)] {
            world.apply(step);
        }
    }
    // A lost connection does not take back what is on its way into the blocks.
    for step in [Step::Cut, Step::SenderNotices, Step::ReceiverNotices, Step::Connect] {
        world.apply(step);
    }
    assert_eq!(world.receiver.outcome(), None, "everything is verified and nothing applied");
    assert!(world.settle());
    assert_eq!(world.sent, 0, "nor is it sent again");
    assert!(world.sender.outcome().unwrap().is_ok());
}

/// Both ends on one machine, granted, with everything ready and the prompt finished.
fn direct(blocks: u32, held: u32) -> World {
    all_sent(blocks, held, Sink::Direct)
}

/// Granted, with everything ready and the prompt finished.
fn all_sent(blocks: u32, held: u32, sink: Sink) -> World {
    let mut world = World::with_sink(blocks, held, sink);
    for step in [Step::Reserve, Step::Connect, Step::ToReceiver(0), Step::ToSender(0)] {
        world.apply(step);
    }
    ready_all(&mut world);
    world.apply(Step::Finish);
    world.apply(Step::ToReceiver(0));
    for _ in 0..LAYERS {
        world.apply(Step::Send);
        world.apply(Step::Payload);
    }
    world
}

#[test]
fn what_was_copied_counts_when_the_sender_has_held_it() {
    let mut world = direct(4, 1);
    (0..LAYERS).for_each(|_| world.apply(Step::Applied));
    assert_eq!(world.receiver.outcome(), None, "everything was copied and nothing confirmed");
    world.apply(Step::ToSender(0));
    assert_eq!(world.receiver.outcome(), None);
    world.apply(Step::ToReceiver(0));
    assert!(world.visible);
    world.apply(Step::ToSender(0));
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!((sent.transport, sent.blocks), (Transport::Ipc, 3));
    world.assert_nothing_is_left();
}

#[test]
fn blocks_that_a_sender_gave_away_are_never_visible() {
    let mut world = direct(4, 0);
    world.apply(Step::Applied);
    world.apply(Step::CancelSender);
    (1..LAYERS).for_each(|_| world.apply(Step::Applied));
    // Its question arrives before the sender's farewell.
    world.apply(Step::ToSender(0));
    assert_eq!(world.receiver.outcome(), None);
    assert!(world.settle());
    assert!(!world.visible);
}

#[test]
fn who_cannot_read_the_senders_memory_gets_the_bytes() {
    let mut world = direct(4, 0);
    world.apply(Step::Applied);
    world.apply(Step::Unreadable);
    assert!(world.to_sender.is_empty(), "one copy has not ended");
    world.apply(Step::Unreadable);
    assert_eq!(world.to_sender.len(), 1);
    assert!(world.settle());
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!(sent.transport, Transport::Quic);
    assert_eq!(world.sent, 2 * world.wanted(), "also what was copied");
}

#[test]
fn parcels_need_no_confirmation() {
    let mut world = all_sent(4, 1, Sink::Channel);
    assert!(!world.visible, "announced is not arrived");
    (0..LAYERS).for_each(|_| world.apply(Step::Applied));
    assert!(world.visible);
    assert!(world.settle());
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!((sent.transport, sent.blocks), (Transport::Nccl, 3));
}

#[test]
fn parcels_that_do_not_come_are_made_good_over_the_network() {
    let mut world = all_sent(4, 0, Sink::Channel);
    world.apply(Step::Applied);
    world.apply(Step::Unreadable);
    assert!(world.to_sender.is_empty(), "one may still come");
    world.apply(Step::Applied);
    assert!(world.settle());
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!(sent.transport, Transport::Quic);
    assert_eq!(world.sent, 2 * world.wanted(), "also what had come");
}

#[test]
fn a_sender_whose_channel_breaks_asks_for_another_way() {
    let mut world = World::with_sink(4, 0, Sink::Channel);
    for step in [Step::Reserve, Step::Connect, Step::ToReceiver(0), Step::ToSender(0)] {
        world.apply(step);
    }
    world.apply(Step::Ready { layer: 0, from: 0, to: 4 });
    world.apply(Step::Send);
    world.apply(Step::Unable);
    ready_all(&mut world);
    world.apply(Step::Finish);
    assert_eq!(world.sender.poll_unit(world.now), None, "it waits for the other way");
    assert!(world.settle());
    assert_eq!(world.sender.outcome().unwrap().as_ref().unwrap().transport, Transport::Quic);
}

#[test]
fn nothing_is_announced_twice() {
    let mut world = World::with_sink(4, 0, Sink::Channel);
    for step in [Step::Reserve, Step::Connect, Step::ToReceiver(0), Step::ToSender(0)] {
        world.apply(step);
    }
    world.apply(Step::Ready { layer: 0, from: 0, to: 4 });
    for step in [Step::Send, Step::RepeatPayload, Step::Payload, Step::Payload] {
        world.apply(step);
    }
    assert!(matches!(world.receiver.outcome(), Some(Err(ReceiveError::Protocol(_)))));
}

#[test]
fn what_could_not_be_read_is_not_tried_again_over_the_next_connection() {
    let mut world = direct(2, 0);
    (0..LAYERS).for_each(|_| world.apply(Step::Unreadable));
    for step in [Step::Cut, Step::SenderNotices, Step::ReceiverNotices, Step::Connect] {
        world.apply(step);
    }
    assert!(world.settle());
    assert_eq!(world.sender.outcome().unwrap().as_ref().unwrap().transport, Transport::Quic);
}

#[test]
fn questions_and_answers_come_at_their_time_or_end_the_transfer() {
    let id = world::manifest(1).transfer;
    let mut world = direct(2, 0);
    world.receiver.handle_frame(world.now, world.links, Frame::Held(id));
    assert!(matches!(world.receiver.outcome(), Some(Err(ReceiveError::Protocol(_)))));
    for mut world in [granted(2, 0), World::with_sink(2, 0, Sink::Direct)] {
        for step in [Step::Reserve, Step::Connect, Step::ToReceiver(0), Step::ToSender(0)] {
            world.apply(step);
        }
        world.sender.handle_frame(world.now, world.links, Frame::Read(id));
        assert!(matches!(world.sender.outcome(), Some(Err(SendError::Protocol(_)))));
    }
}

#[test]
fn copies_over_a_lost_connection_do_not_count() {
    let mut world = direct(2, 0);
    (1..LAYERS).for_each(|_| world.apply(Step::Applied));
    for step in [Step::Cut, Step::SenderNotices, Step::ReceiverNotices, Step::Connect] {
        world.apply(step);
    }
    world.apply(Step::ToReceiver(0));
    let frames =
        |world: &World| world.to_sender.iter().map(|f| f.1.to_string()).collect::<Vec<_>>();
    assert_eq!(frames(&world), ["heartbeat"], "a late copy must not overtake the next");
    world.apply(Step::Applied);
    assert_eq!(frames(&world), ["heartbeat", "grant"]);
    assert!(world.settle());
    assert_eq!(world.sent, world.wanted());
    assert!(world.sender.outcome().unwrap().is_ok());
}

#[test]
fn hidden_and_exposed_meet_at_finish() {
    let mut world = granted(1, 0);
    ready_all(&mut world);
    world.apply(Step::Send);
    world.apply(Step::Wait(70));
    world.apply(Step::Finish);
    world.apply(Step::Wait(30));
    assert!(world.settle());
    let sent = world.sender.outcome().unwrap().as_ref().unwrap();
    assert_eq!(sent.hidden, Duration::from_millis(70));
    assert_eq!(sent.exposed, Duration::from_millis(30));
}

#[test]
fn silence_ends_the_wait_of_each_side() {
    let mut world = granted(1, 0);
    let end = world.now + LEASE + Duration::from_millis(1);
    world.now = end;
    world.sender.handle_timeout(end);
    world.receiver.handle_timeout(end);
    assert!(matches!(world.sender.outcome(), Some(Err(SendError::Timeout(_)))));
    assert!(matches!(world.receiver.outcome(), Some(Err(ReceiveError::Timeout(_)))));
}

#[test]
fn heartbeats_keep_a_slow_prompt_alive() {
    let mut world = granted(1, 0);
    talk_on(&mut world, 40);
    assert!(world.sender.outcome().is_none() && world.receiver.outcome().is_none());
    assert!(world.settle());
    assert!(world.sender.outcome().unwrap().is_ok());
}

/// Both ends hear each other at so many deadlines.
fn talk_on(world: &mut World, times: u32) {
    for _ in 0..times {
        world.sleep();
        while !world.to_receiver.is_empty() {
            world.apply(Step::ToReceiver(0));
        }
        while !world.to_sender.is_empty() {
            world.apply(Step::ToSender(0));
        }
    }
}

#[test]
fn an_offer_waits_for_a_receiver_without_room_for_longer_than_for_none() {
    let mut world = World::new(3, 1);
    let begun = world.now;
    ready_all(&mut world);
    world.apply(Step::Finish);
    world.apply(Step::Connect);
    world.apply(Step::ToReceiver(0));
    assert!(world.receiver.offered());
    while world.now - begun < Timing::default().begin * 2 {
        talk_on(&mut world, 1);
        assert_eq!((world.sender.outcome(), world.receiver.outcome()), (None, None));
    }
    assert_eq!(world.sender.poll_unit(world.now), None, "nothing was granted");
    world.apply(Step::Reserve);
    assert!(world.settle());
    assert!(world.sender.outcome().unwrap().is_ok());
}

#[test]
fn an_offer_that_nobody_answers_is_given_up() {
    let mut world = World::new(1, 0);
    world.apply(Step::Connect);
    world.to_receiver.clear();
    while world.sender.outcome().is_none() {
        world.to_receiver.clear();
        world.sleep();
    }
    assert!(matches!(world.sender.outcome(), Some(Err(SendError::Timeout(_)))));
}

#[test]
fn a_receiver_without_room_can_be_cancelled_and_frees_its_sender() {
    let mut world = World::new(1, 0);
    world.apply(Step::Connect);
    world.apply(Step::ToReceiver(0));
    world.apply(Step::CancelReceiver);
    while !world.to_sender.is_empty() {
        world.apply(Step::ToSender(0));
    }
    let refused = SendError::Refused(baton_kvtransfer::Reason::Cancelled);
    assert_eq!(world.sender.outcome(), Some(&Err(refused)));
}
