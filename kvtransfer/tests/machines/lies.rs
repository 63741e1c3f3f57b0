//! Each machine against an end that says and sends anything that can be said.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use baton_kvtransfer::frame::{Frame, Grant, LayerRun, Offer, Run, UnitHeader};
use baton_kvtransfer::{Reason, Receiver, Sender, Timing, Transport};
use proptest::collection::vec;
use proptest::prelude::*;

use super::world::{LAYERS, first, geometry, manifest};

const BLOCKS: u32 = 8;
const HELD: u32 = 3;
const TIMING: Timing = Timing {
    lease: Duration::from_millis(40),
    begin: Duration::from_millis(50),
    producer: Duration::from_millis(60),
    complete: Duration::from_millis(70),
    reconnect: Duration::from_millis(80),
    message: Duration::from_millis(10),
    join: Duration::from_millis(10),
    channel: Duration::from_millis(10),
    idle: Duration::from_millis(10),
};

#[derive(Clone, Debug)]
enum Act {
    Says(Frame),
    Sends(UnitHeader, bool),
    Offers(Offer, Transport),
    Connect,
    Ready(u32, u32),
    Finish,
    Reserve,
    Applied,
    Wait(u64),
}

fn run() -> impl Strategy<Value = Run> {
    (0..BLOCKS + 2, 1..BLOCKS).prop_map(|(first, count)| Run { first, count })
}

fn pieces() -> impl Strategy<Value = LayerRun> {
    (0..LAYERS + 1, run()).prop_map(|(layer, run)| LayerRun { layer, run })
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::Quic), Just(Transport::Nccl), Just(Transport::Ipc)]
}

fn frame() -> impl Strategy<Value = Frame> {
    let id = manifest(1).transfer;
    let grant = (transport(), 0..100_u64, vec(run(), 0..4), vec(pieces(), 0..4));
    let grant = grant.prop_map(move |(transport, lease, wanted, landed)| {
        let lease = Duration::from_millis(lease);
        Frame::Grant(Grant { transfer: id, transport, lease, wanted, landed })
    });
    let all = Run { first: HELD, count: BLOCKS - HELD };
    let fair = transport().prop_map(move |transport| {
        let (wanted, landed) = (vec![all], Vec::new());
        Frame::Grant(Grant { transfer: id, transport, lease: TIMING.lease, wanted, landed })
    });
    prop_oneof![
        grant,
        fair,
        pieces().prop_map(move |at| Frame::Retry(id, at)),
        Just(Frame::Finish(id, first())),
        Just(Frame::Complete(id)),
        Just(Frame::Cancel(id, Reason::Busy)),
        Just(Frame::Heartbeat(id)),
        Just(Frame::Read(id)),
        Just(Frame::Held(id)),
        Just(Frame::Unable(id)),
    ]
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let bytes = geometry().piece_bytes() as u32;
    let unit = (pieces(), transport(), prop_oneof![Just(None), (0..200_u32).prop_map(Some)]);
    let unit = unit.prop_map(move |(pieces, transport, length)| {
        let piece = if transport == Transport::Ipc { 4 } else { bytes };
        let length = length.unwrap_or(pieces.run.count * piece);
        UnitHeader { transfer: manifest(1).transfer, pieces, transport, length, checksum: 0 }
    });
    let offer = (prop_oneof![9 => Just(BLOCKS), 1 => 1..20_u32], 0..100_u64, transport());
    let act = prop_oneof![
        6 => frame().prop_map(Act::Says),
        9 => (unit, prop::bool::weighted(0.9)).prop_map(|(unit, sound)| Act::Sends(unit, sound)),
        3 => offer.prop_map(|(blocks, lease, best)| {
            Act::Offers(Offer { manifest: manifest(blocks), lease: Duration::from_millis(lease) }, best)
        }),
        3 => Just(Act::Connect),
        4 => (0..LAYERS, 0..=BLOCKS).prop_map(|(layer, to)| Act::Ready(layer, to)),
        1 => Just(Act::Finish),
        2 => Just(Act::Reserve),
        6 => Just(Act::Applied),
        1 => (0..30_u64).prop_map(Act::Wait),
    ];
    vec(act, 0..100)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_sender_sends_what_is_ready_and_ends(acts in acts()) {
        let mut now = Instant::now();
        let mut sender = Sender::new(now, manifest(BLOCKS), TIMING).unwrap();
        let (mut link, mut ready) = (0, HashSet::new());
        for act in acts {
            match act {
                Act::Says(frame) => sender.handle_frame(now, link, frame),
                Act::Connect => {
                    link += 1;
                    sender.handle_connected(now, link);
                }
                Act::Ready(layer, to) => {
                    ready.extend((0..to).map(|ordinal| (layer, ordinal)));
                    sender.ready(now, layer, 0..to);
                }
                Act::Finish => sender.finish(now, first()),
                Act::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    sender.handle_timeout(now);
                }
                _ => {}
            }
            while let Some(LayerRun { layer, run }) = sender.poll_unit(now) {
                prop_assert!(run.range().all(|ordinal| ready.contains(&(layer, ordinal))));
            }
            while sender.poll_frame().is_some() {}
        }
        for _ in 0..10_000 {
            let Some(due) = sender.poll_timeout() else { break };
            now = now.max(due);
            sender.handle_timeout(now);
        }
        prop_assert!(sender.outcome().is_some());
    }

    #[test]
    fn a_receiver_lets_nothing_be_written_twice_or_elsewhere_and_ends(acts in acts()) {
        let mut now = Instant::now();
        let manifest = manifest(BLOCKS);
        let mut receiver = Receiver::new(now, manifest, None, TIMING.lease, &TIMING).unwrap();
        let (mut link, mut applying, mut landed) = (1, 0, HashSet::new());
        for act in acts {
            match act {
                Act::Says(frame) => receiver.handle_frame(now, link, frame),
                Act::Offers(offer, best) => receiver.handle_offer(now, link, &offer, best),
                Act::Connect => {
                    receiver.handle_disconnected(link);
                    link += 1;
                }
                Act::Sends(unit, sound) => {
                    let new = receiver.unit(now, link, &unit, u32::from(!sound));
                    let Ok(Some(new)) = new else { continue };
                    prop_assert!(sound);
                    applying += 1;
                    for ordinal in new.into_iter().flat_map(Run::range) {
                        prop_assert!((HELD..BLOCKS).contains(&ordinal));
                        prop_assert!(unit.pieces.run.range().contains(&ordinal));
                        let at = (link, unit.transport, unit.pieces.layer, ordinal);
                        prop_assert!(unit.pieces.layer < LAYERS && landed.insert(at));
                    }
                }
                Act::Reserve => receiver.reserve(now, HELD),
                Act::Applied if applying > 0 && receiver.outcome().is_none() => {
                    applying -= 1;
                    receiver.applied(now);
                }
                Act::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    receiver.handle_timeout(now);
                }
                _ => {}
            }
            while receiver.poll_frame().is_some() {}
            if let Some(Ok(_)) = receiver.outcome() {
                prop_assert_eq!(applying, 0, "complete means applied");
            }
        }
        for _ in 0..10_000 {
            let Some(due) = receiver.poll_timeout() else { break };
            now = now.max(due);
            receiver.handle_timeout(now);
        }
        prop_assert!(receiver.outcome().is_some());
    }
}
