//! Nodes whose KV is in the memory of devices: the same tokens, whichever way it travels.

use baton_kvtransfer::Transport;
use baton_proto::message::NodeEvent;

use crate::support::{Pair, cancel, expected, hand_over, id, job};

/// Hands some jobs over; says how many bytes travelled by reference, and as bytes.
async fn moved(pair: &mut Pair) -> [u64; 2] {
    let (mut prefill, mut decode) = pair.streams().await;
    for (request, length) in [(1, 5), (2, 41), (3, 200)] {
        let job = job(id(request), request as u32, length, 12);
        hand_over(&prefill, &decode, &job).await;
        let mut tokens = vec![prefill.token(job.id).await];
        tokens.extend(decode.rest(job.id).await);
        let tokens: Vec<_> = tokens.iter().map(|token| token.token).collect();
        assert_eq!(tokens, expected(&job));
        assert!(matches!(prefill.next().await, NodeEvent::Transferred { .. }));
    }
    for request in 4..12 {
        let job = job(id(request), request as u32, 150, 50);
        hand_over(&prefill, &decode, &job).await;
        if request % 2 == 0 {
            prefill.token(job.id).await;
        }
        cancel(&prefill, &decode, job.id).await;
    }
    pair.idle().await;
    let sent = pair.prefill.endpoint.sent_bytes();
    [Transport::Ipc, Transport::Quic]
        .map(|way| sent.iter().find(|(w, _)| *w == way).map_or(0, |s| s.1))
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_copy_from_device_to_device() {
    let mut pair = Pair::on_devices(true).await;
    let [by_reference, bytes] = moved(&mut pair).await;
    assert!(by_reference > 0);
    assert_eq!(bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_that_cannot_reach_each_other_stage_and_lose_no_job() {
    let mut pair = Pair::on_devices(false).await;
    let [by_reference, bytes] = moved(&mut pair).await;
    assert_eq!(by_reference, 0);
    assert!(bytes > 0);
}
