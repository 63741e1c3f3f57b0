//! Pieces of the pool to a contiguous buffer and back, byte by byte.

use baton_kernels::cuda::{PieceShare, gather_blocks, scatter_blocks, testing};

use crate::support::{Random, read, upload};

const UNTOUCHED: u8 = 0xee;

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.bits() as u8).collect()
}

/// Where in a full piece, and in the pool's piece, byte `i` of the pool's piece lies.
fn place(share: PieceShare, i: usize) -> usize {
    let half = share.heads * share.head_bytes;
    i / half * share.kv_heads * share.head_bytes + share.first_head * share.head_bytes + i % half
}

fn shares() -> Vec<(PieceShare, usize)> {
    let share = |kv_heads, first_head, heads, head_bytes| PieceShare {
        kv_heads,
        first_head,
        heads,
        head_bytes,
    };
    vec![
        (share(1, 0, 1, 16), 1),
        (share(8, 0, 8, 16 * 64 * 2), 3),
        (share(4, 1, 2, 48), 7),
        (share(8, 7, 1, 64 * 128 * 2), 2),
        (share(3, 0, 2, 16 * 400), 4),
    ]
}

#[test]
fn gathering_takes_the_pools_part_and_nothing_else() {
    testing::schedules(|stream| {
        for (share, count) in shares() {
            let (own, full) = (share.own_bytes(), share.piece_bytes());
            let pool = bytes(1, (count + 3) * own);
            let blocks = &Random::new(2).permutation(count + 3)[..count];
            let buffer = upload(stream, &vec![UNTOUCHED; count * full]);
            let (on_device, list) = (upload(stream, &pool), upload(stream, blocks));
            gather_blocks(stream, buffer.all(), on_device.all(), list.all(), share).unwrap();
            let mut want = vec![UNTOUCHED; count * full];
            for (at, block) in blocks.iter().enumerate() {
                for i in 0..own {
                    want[at * full + place(share, i)] = pool[*block as usize * own + i];
                }
            }
            assert!(read(stream, &buffer) == want, "{share:?}");
        }
    });
}

#[test]
fn scattering_writes_the_listed_blocks_and_nothing_else() {
    testing::schedules(|stream| {
        for (share, count) in shares() {
            let (own, full) = (share.own_bytes(), share.piece_bytes());
            let buffer = bytes(3, count * full);
            let blocks = &Random::new(4).permutation(count + 3)[..count];
            let pool = upload(stream, &vec![UNTOUCHED; (count + 3) * own]);
            let (on_device, list) = (upload(stream, &buffer), upload(stream, blocks));
            scatter_blocks(stream, pool.all(), on_device.all(), list.all(), share).unwrap();
            let mut want = vec![UNTOUCHED; (count + 3) * own];
            for (at, block) in blocks.iter().enumerate() {
                for i in 0..own {
                    want[*block as usize * own + i] = buffer[at * full + place(share, i)];
                }
            }
            assert!(read(stream, &pool) == want, "{share:?}");
        }
    });
}

/// Two nodes with half of the heads each put a piece together that one with all of them reads.
#[test]
fn shards_make_the_piece_of_a_whole_node() {
    testing::schedules(|stream| {
        let whole = PieceShare { kv_heads: 4, first_head: 0, heads: 4, head_bytes: 32 };
        let halves = [0, 2].map(|first_head| PieceShare { first_head, heads: 2, ..whole });
        let (list, count) = (upload(stream, &[1_u32, 0]), 2);
        let pieces = bytes(5, count * whole.piece_bytes());
        let full = upload(stream, &pieces);
        let joined = upload(stream, &vec![UNTOUCHED; pieces.len()]);
        for share in halves {
            let pool = upload(stream, &vec![UNTOUCHED; count * share.own_bytes()]);
            scatter_blocks(stream, pool.all(), full.all(), list.all(), share).unwrap();
            gather_blocks(stream, joined.all(), pool.all(), list.all(), share).unwrap();
        }
        assert_eq!(read(stream, &joined), pieces);
    });
}
