//! Two real endpoints over loopback: what arrives, and what both ends let go of.

mod common;

use std::sync::Arc;
use std::time::Duration;

use baton_kvtransfer::{BlockSink, Reason, ReceiveError, SendError, SendHandle};
use common::{BLOCKS, EPOCH, GEOMETRY, Pair, Path, Pool, first_token, transfer};

fn all_ready(handle: &SendHandle) {
    for layer in 0..GEOMETRY.layers {
        handle.ready(layer, 0..BLOCKS);
    }
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
    assert_eq!(sent.blocks, BLOCKS);
    assert_eq!(sent.bytes, u64::from(BLOCKS) * GEOMETRY.block_bytes() as u64);
    sink.assert_holds(&source, 0);
    assert_eq!(pair.prefill.transfers(), (0, 0));
    assert_eq!(pair.decode.transfers(), (0, 0));
}
