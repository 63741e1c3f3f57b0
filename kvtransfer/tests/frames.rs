//! The wire form: what is written is read back, and no bytes make the reader panic or believe.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use baton_kvtransfer::frame::{
    Frame, FrameError, Grant, Hello, LayerRun, Manifest, Offer, Run, UnitHeader, frame_length,
};
use baton_kvtransfer::limits::{MAX_BLOCKS, MAX_FRAME_BYTES, MAX_LAYERS};
use baton_kvtransfer::{FirstToken, Reason, SharedMemory, Transport};
use baton_proto::geometry::{KvDtype, KvGeometry};
use baton_proto::hash::{BlockHash, ModelRoot};
use baton_proto::ids::{Epoch, RequestId, TransferId};
use baton_proto::message::{Logprobs, NodeFinish};
use proptest::collection::vec;
use proptest::prelude::*;

fn transfers() -> impl Strategy<Value = TransferId> {
    (any::<u128>(), any::<u32>())
        .prop_map(|(request, attempt)| TransferId { request: RequestId(request), attempt })
}

fn runs() -> impl Strategy<Value = Run> {
    (0..MAX_BLOCKS)
        .prop_flat_map(|first| (1..=MAX_BLOCKS - first).prop_map(move |count| Run { first, count }))
}

fn layer_runs() -> impl Strategy<Value = LayerRun> {
    (0..MAX_LAYERS, runs()).prop_map(|(layer, run)| LayerRun { layer, run })
}

fn geometries() -> impl Strategy<Value = KvGeometry> {
    let dtypes = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Fp8];
    let dtype = prop::sample::select(dtypes.to_vec());
    (1..=MAX_LAYERS, 1u32..=64, 1u32..=512, dtype, 1u32..=128).prop_map(
        |(layers, kv_heads, head_dim, dtype, block_tokens)| KvGeometry {
            layers,
            kv_heads,
            head_dim,
            dtype,
            block_tokens,
        },
    )
}

fn offers() -> impl Strategy<Value = Frame> {
    let hashes = vec(any::<[u8; 16]>().prop_map(BlockHash), 0..40);
    (transfers(), any::<[u8; 16]>(), geometries(), 1..=MAX_BLOCKS, hashes, any::<u32>()).prop_map(
        |(transfer, root, geometry, blocks, hashes, lease)| {
            Frame::Offer(Offer {
                manifest: Manifest { transfer, root: ModelRoot(root), geometry, blocks, hashes },
                lease: Duration::from_millis(lease.into()),
            })
        },
    )
}

fn first_tokens() -> impl Strategy<Value = FirstToken> {
    let top = vec((any::<u32>(), -50f32..0.0), 0..=20);
    let logprobs = proptest::option::of((-50f32..0.0, top))
        .prop_map(|both| both.map(|(logprob, top)| Logprobs { logprob, top }));
    let finish = proptest::option::of(prop_oneof![
        Just(NodeFinish::EndOfSequence),
        Just(NodeFinish::Length),
        any::<u32>().prop_map(NodeFinish::StopToken),
    ]);
    (any::<u32>(), logprobs, finish).prop_map(|(token, logprobs, finish)| FirstToken {
        token,
        logprobs,
        finish,
    })
}

fn transports() -> impl Strategy<Value = Transport> {
    prop_oneof![Just(Transport::Quic), Just(Transport::Nccl), Just(Transport::Ipc)]
}

fn frames() -> impl Strategy<Value = Frame> {
    let shared = proptest::option::of((any::<[u8; 16]>(), any::<u32>(), vec(any::<u8>(), 0..99)));
    let hello = (any::<u32>(), any::<u32>(), any::<u64>(), shared, any::<u8>());
    let grant =
        (transfers(), any::<u32>(), vec(runs(), 0..20), vec(layer_runs(), 0..20), transports());
    prop_oneof![
        hello.prop_map(|(oldest, newest, epoch, shared, devices)| Frame::Hello(Hello {
            oldest,
            newest,
            epoch: Epoch(epoch),
            shared: shared.map(|(host, blocks, description)| {
                (host, SharedMemory { blocks, description })
            }),
            devices,
        })),
        offers(),
        grant.prop_map(|(transfer, lease, wanted, landed, transport)| Frame::Grant(Grant {
            transfer,
            transport,
            lease: Duration::from_millis(lease.into()),
            wanted,
            landed
        })),
        (transfers(), layer_runs()).prop_map(|(id, at)| Frame::Retry(id, at)),
        (transfers(), first_tokens()).prop_map(|(id, first)| Frame::Finish(id, first)),
        transfers().prop_map(Frame::Complete),
        (transfers(), 0u8..11).prop_map(|(id, code)| Frame::Cancel(id, reason(code))),
        transfers().prop_map(Frame::Heartbeat),
        transfers().prop_map(Frame::Read),
        transfers().prop_map(Frame::Held),
        vec(any::<u8>(), 0..300).prop_map(Frame::Invite),
        Just(Frame::Joined),
        (transfers(), layer_runs(), any::<u32>())
            .prop_map(|(id, at, bytes)| Frame::Announce(id, at, bytes)),
        transfers().prop_map(Frame::Unable),
    ]
}

fn reason(code: u8) -> Reason {
    let all = [
        Reason::Cancelled,
        Reason::Expired,
        Reason::Busy,
        Reason::Model,
        Reason::Geometry,
        Reason::Blocks,
        Reason::Hashes,
        Reason::Epoch,
        Reason::Sender,
        Reason::Corrupt,
        Reason::Protocol,
        Reason::Memory,
    ];
    all[usize::from(code)]
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    let (prefix, body) = bytes.split_first_chunk().unwrap();
    assert_eq!(frame_length(*prefix), Ok(body.len()));
    body.to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn frames_are_read_back(frame in frames()) {
        prop_assert_eq!(Frame::decode(&encoded(&frame)), Ok(frame));
    }

    #[test]
    fn a_frame_has_one_length(frame in frames(), cut in any::<prop::sample::Index>()) {
        let bytes = encoded(&frame);
        let cut = cut.index(bytes.len());
        prop_assert_eq!(Frame::decode(&bytes[..cut]), Err(FrameError::Truncated));
        let longer = [&bytes[..], &[0; 3]].concat();
        prop_assert_eq!(Frame::decode(&longer), Err(FrameError::Trailing(3)));
    }

    #[test]
    fn damaged_frames_are_errors_or_other_frames(
        frame in frames(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = encoded(&frame);
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(read) = Frame::decode(&bytes) {
            prop_assert_eq!(encoded(&read), bytes);
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in vec(any::<u8>(), 0..300)) {
        let _ = Frame::decode(&bytes);
    }

    #[test]
    fn unit_headers_are_read_back(
        transfer in transfers(),
        pieces in layer_runs(),
        transport in transports(),
        length in any::<u32>(),
        checksum in any::<u32>(),
    ) {
        let header = UnitHeader { transfer, pieces, transport, length, checksum };
        let bytes = header.encode().try_into().unwrap();
        prop_assert_eq!(UnitHeader::decode(&bytes), Ok(header));
    }

    #[test]
    fn any_unit_header_is_read_without_panic(bytes in any::<[u8; 32]>(), rest in any::<[u8; 9]>()) {
        let bytes = [&bytes[..], &rest].concat().try_into().unwrap();
        if let Ok(header) = UnitHeader::decode(&bytes) {
            prop_assert!(header.pieces.layer < MAX_LAYERS);
            prop_assert!(header.pieces.run.range().end <= MAX_BLOCKS);
        }
    }
}

#[test]
fn limits_are_errors_with_a_name() {
    assert_eq!(frame_length([0; 4]), Err(FrameError::Length(0)));
    let long = MAX_FRAME_BYTES as u32 + 1;
    assert_eq!(frame_length(long.to_le_bytes()), Err(FrameError::Length(long)));
    assert_eq!(Frame::decode(&[99]), Err(FrameError::UnknownKind(99)));
    let mut cancel =
        encoded(&Frame::Cancel(TransferId { request: RequestId(1), attempt: 1 }, Reason::Protocol));
    *cancel.last_mut().unwrap() = 12;
    let unknown = FrameError::UnknownCode { what: "reason", code: 12 };
    assert_eq!(Frame::decode(&cancel), Err(unknown));
}

#[test]
fn the_largest_offer_fits_a_frame() {
    let offer = Frame::Offer(Offer {
        manifest: Manifest {
            transfer: TransferId { request: RequestId(1), attempt: 1 },
            root: ModelRoot([0; 16]),
            geometry: KvGeometry {
                layers: 1,
                kv_heads: 1,
                head_dim: 1,
                dtype: KvDtype::F32,
                block_tokens: 16,
            },
            blocks: MAX_BLOCKS,
            hashes: vec![BlockHash([7; 16]); MAX_BLOCKS as usize],
        },
        lease: Duration::from_secs(1),
    });
    assert_eq!(Frame::decode(&encoded(&offer)), Ok(offer));
}

#[test]
fn versions_are_negotiated() {
    let hello = |oldest, newest| Hello { oldest, newest, ..Hello::new(Epoch(1)) };
    assert_eq!(hello(1, 4).common_version(), Some(4));
    assert_eq!(hello(4, 9).common_version(), Some(4), "a newer peer that still speaks ours");
    assert_eq!(hello(5, 9).common_version(), None);
    assert_eq!(hello(0, 3).common_version(), None);
}
