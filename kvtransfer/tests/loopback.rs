//! Two real endpoints over loopback: what arrives, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::sync::Arc;

use baton_kvtransfer::{Endpoint, Incoming, Reason, ReceiveError, Room, SendError, SendHandle};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, TransferId};
use common::{BLOCKS, EPOCH, GEOMETRY, Pair, Pool, bind, first_token, transfer};

/// Reports everything ready and the prompt finished.
fn produce(send: &SendHandle) {
    for layer in 0..GEOMETRY.layers {
        send.ready(layer, 0..BLOCKS);
    }
    send.finish(first_token());
}

/// A whole transfer from `p0` to `d0`, which must arrive.
async fn passes(pair: &Pair, id: TransferId) {
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(id, 0, &sink));
    let send = pair.prefill.send(pair.outgoing(id, &source));
    produce(&send);
    assert_eq!(receive.outcome().await, Ok(first_token()));
    send.outcome().await.unwrap();
    sink.assert_holds(&source, 0);
}

#[tokio::test]
async fn everything_arrives_layer_by_layer() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(transfer(1), 0, &sink));
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    for chunk in [0..7, 7..15, 15..BLOCKS] {
        for layer in 0..GEOMETRY.layers {
            send.ready(layer, chunk.clone());
        }
    }
    send.finish(first_token());
    assert_eq!(receive.outcome().await, Ok(first_token()));
    let sent = send.outcome().await.unwrap();
    let bytes = u64::from(BLOCKS) * GEOMETRY.block_bytes() as u64;
    assert_eq!((sent.blocks, sent.bytes), (BLOCKS, bytes));
    sink.assert_holds(&source, 0);
    assert_eq!(pair.prefill.transfers(), (0, 0));
    assert_eq!(pair.decode.transfers(), (0, 0));
}

#[tokio::test]
async fn the_order_of_the_owners_does_not_matter() {
    let pair = Pair::new();
    passes(&pair, transfer(1)).await;
    // The connection is up, so the offer of 2 is there before that of 3, which passes.
    let (source, sink) = (Pool::source(), Pool::sink());
    let send = pair.prefill.send(pair.outgoing(transfer(2), &source));
    produce(&send);
    passes(&pair, transfer(3)).await;
    let receive = pair.decode.expect(pair.incoming(transfer(2), 0, &sink));
    assert_eq!(receive.outcome().await, Ok(first_token()));
    send.outcome().await.unwrap();
    sink.assert_holds(&source, 0);
}

#[tokio::test]
async fn a_held_prefix_is_not_sent() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(transfer(1), 13, &sink));
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    produce(&send);
    receive.outcome().await.unwrap();
    let sent = send.outcome().await.unwrap();
    let bytes = u64::from(BLOCKS - 13) * GEOMETRY.block_bytes() as u64;
    assert_eq!((sent.blocks, sent.bytes), (BLOCKS - 13, bytes));
    sink.assert_holds(&source, 13);
}

#[tokio::test]
async fn nothing_is_sent_to_who_holds_everything() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(transfer(1), BLOCKS, &sink));
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    produce(&send);
    assert_eq!(receive.outcome().await, Ok(first_token()));
    let sent = send.outcome().await.unwrap();
    assert_eq!((sent.blocks, sent.bytes), (0, 0));
    assert!(sent.hidden.is_zero());
    sink.assert_holds(&source, BLOCKS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_transfers_share_a_connection() {
    let pair = Pair::new();
    // Twice as many as streams may be open at once.
    let source = Pool::source();
    let transfers: Vec<_> = (0..512)
        .map(|n| {
            let sink = Pool::sink();
            let receive = pair.decode.expect(pair.incoming(transfer(n), 18, &sink));
            let send = pair.prefill.send(pair.outgoing(transfer(n), &source));
            (sink, receive, send)
        })
        .collect();
    for (_, _, send) in &transfers {
        produce(send);
    }
    for (sink, receive, send) in transfers {
        receive.outcome().await.unwrap();
        send.outcome().await.unwrap();
        sink.assert_holds(&source, 18);
    }
    assert_eq!(pair.prefill.transfers(), (0, 0));
    assert_eq!(pair.decode.transfers(), (0, 0));
}

/// Both ends' errors when the receiver expects something else than is offered.
async fn mismatch(change: impl FnOnce(&mut Incoming)) -> Reason {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let mut incoming = pair.incoming(transfer(1), 0, &sink);
    change(&mut incoming);
    let receive = pair.decode.expect(incoming);
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    produce(&send);
    let Err(ReceiveError::Mismatch(reason)) = receive.outcome().await else {
        panic!("expected a mismatch");
    };
    assert_eq!(send.outcome().await, Err(SendError::Refused(reason)));
    sink.assert_holds(&source, BLOCKS);
    reason
}

#[tokio::test]
async fn another_layout_model_or_content_is_refused() {
    assert_eq!(mismatch(|i| i.root = ModelRoot([4; 16])).await, Reason::Model);
    assert_eq!(mismatch(|i| i.geometry.kv_heads = 4).await, Reason::Geometry);
    assert_eq!(mismatch(|i| i.blocks -= 1).await, Reason::Blocks);
    let other = |i: &mut Incoming| i.hashes[3] = BlockHash([0; 16]);
    assert_eq!(mismatch(other).await, Reason::Hashes);
}

#[tokio::test]
async fn impossible_transfers_fail_at_once() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let mut outgoing = pair.outgoing(transfer(1), &source);
    outgoing.blocks = 0;
    let sent = pair.prefill.send(outgoing).outcome().await;
    assert!(matches!(sent, Err(SendError::Invalid(_))));
    let incoming = pair.incoming(transfer(1), BLOCKS + 1, &sink);
    let received = pair.decode.expect(incoming).outcome().await;
    assert!(matches!(received, Err(ReceiveError::Invalid(_))));
    let _first = pair.decode.expect(pair.incoming(transfer(2), 0, &sink));
    let second = pair.decode.expect(pair.incoming(transfer(2), 0, &sink));
    assert_eq!(second.outcome().await, Err(ReceiveError::Busy));
}

#[tokio::test]
async fn who_answers_must_be_the_node_that_was_named() {
    let pair = Pair::new();
    let source = Pool::source();
    let mut outgoing = pair.outgoing(transfer(1), &source);
    outgoing.peer.node = "d1".parse().unwrap();
    let sent = pair.prefill.send(outgoing).outcome().await;
    assert!(matches!(sent, Err(SendError::WrongPeer(_))), "{sent:?}");

    let stranger = bind(&common::Ca::new().node("p0"), EPOCH);
    let sent = stranger.send(pair.outgoing(transfer(1), &source));
    let sent = sent.outcome().await;
    assert!(matches!(sent, Err(SendError::WrongPeer(_))), "{sent:?}");

    let coordinator = bind(&pair.ca.coordinator("c0"), EPOCH);
    let sent = coordinator.send(pair.outgoing(transfer(1), &source));
    let sent = sent.outcome().await;
    assert!(matches!(sent, Err(SendError::Unreachable(_))), "{sent:?}");
    passes(&pair, transfer(2)).await;
}

#[tokio::test]
async fn only_the_expected_node_may_send() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let receive = pair.decode.expect(pair.incoming(transfer(1), 0, &sink));
    let other = bind(&pair.ca.node("p1"), EPOCH);
    let stolen = other.send(pair.outgoing(transfer(1), &Pool::sink()));
    produce(&stolen);
    assert_eq!(stolen.outcome().await, Err(SendError::Refused(Reason::Sender)));
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    produce(&send);
    assert_eq!(receive.outcome().await, Ok(first_token()));
    sink.assert_holds(&source, 0);
}

#[tokio::test]
async fn another_epoch_of_the_receiver_is_refused() {
    let pair = Pair::new();
    let mut outgoing = pair.outgoing(transfer(1), &Pool::source());
    outgoing.peer.epoch = Epoch(8);
    let error = SendError::WrongEpoch { expected: 8, theirs: EPOCH.0 };
    assert_eq!(pair.prefill.send(outgoing).outcome().await, Err(error));
}

#[tokio::test]
async fn an_older_life_of_the_sender_is_void() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    passes(&pair, transfer(1)).await;
    // Expected from the next life, offered by this one.
    let mut incoming = pair.incoming(transfer(2), 0, &sink);
    incoming.epoch = Epoch(8);
    let next = pair.decode.expect(incoming);
    let send = pair.prefill.send(pair.outgoing(transfer(2), &source));
    assert_eq!(send.outcome().await, Err(SendError::Refused(Reason::Epoch)));

    // The next life connects: what this one had promised ends, and it may not come back.
    let promised = pair.decode.expect(pair.incoming(transfer(3), 0, &sink));
    let reborn: Endpoint = bind(&pair.ca.node("p0"), Epoch(8));
    let send = reborn.send(pair.outgoing(transfer(2), &source));
    produce(&send);
    assert_eq!(next.outcome().await, Ok(first_token()));
    assert_eq!(promised.outcome().await, Err(ReceiveError::Ended(Reason::Epoch)));
    let late = pair.prefill.send(pair.outgoing(transfer(4), &source));
    assert_eq!(late.outcome().await, Err(SendError::Refused(Reason::Epoch)));
    assert_eq!(Arc::strong_count(&sink), 1);
}

#[tokio::test]
async fn a_peer_that_is_not_there_is_noticed() {
    let pair = Pair::new();
    let mut outgoing = pair.outgoing(transfer(1), &Pool::source());
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    outgoing.peer.kv_address = free.local_addr().unwrap().to_string();
    drop(free);
    let sent = pair.prefill.send(outgoing).outcome().await;
    let Err(SendError::Unreachable(why)) = sent else {
        panic!("{sent:?}");
    };
    assert!(why.contains("nothing listens"), "{why}");
}

#[tokio::test]
async fn room_may_be_found_after_the_offer() {
    let pair = Pair::new();
    let (source, sink) = (Pool::source(), Pool::sink());
    let incoming = Incoming { room: None, ..pair.incoming(transfer(1), 0, &sink) };
    let receive = pair.decode.expect(incoming);
    let send = pair.prefill.send(pair.outgoing(transfer(1), &source));
    produce(&send);
    receive.offered().await;
    receive.reserve(Room { held: 3, sink: sink.clone() });
    assert_eq!(receive.outcome().await, Ok(first_token()));
    assert_eq!(send.outcome().await.unwrap().blocks, BLOCKS - 3);
    sink.assert_holds(&source, 3);
    assert_eq!(Arc::strong_count(&sink), 1);
}
