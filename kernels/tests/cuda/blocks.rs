//! Pieces of the pool to a contiguous buffer and back, byte by byte.

use baton_kernels::cuda::{PieceShare, Pieces, gather_blocks, scatter_blocks, testing};

use crate::support::{Random, read, upload};

const UNTOUCHED: u8 = 0xee;

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.bits() as u8).collect()
}

/// Where in pieces of `share` the byte lies which is byte `i` of a full piece, if they have its head.
fn place(share: PieceShare, i: usize) -> Option<usize> {
    let (half, head) = (i / (share.kv_heads * share.head_bytes), i / share.head_bytes);
    let head = (head % share.kv_heads).checked_sub(share.first_head)?;
    let at = (half * share.heads + head) * share.head_bytes + i % share.head_bytes;
    (head < share.heads).then_some(at)
}

/// A pool's heads, those of a buffer, and how many blocks.
fn shares() -> Vec<(PieceShare, PieceShare, usize)> {
    let share = |kv_heads, first_head, heads, head_bytes| PieceShare {
        kv_heads,
        first_head,
        heads,
        head_bytes,
    };
    let whole = [
        (share(1, 0, 1, 16), 1),
        (share(8, 0, 8, 16 * 64 * 2), 3),
        (share(4, 1, 2, 48), 7),
        (share(8, 7, 1, 64 * 128 * 2), 2),
        (share(3, 0, 2, 16 * 400), 4),
    ];
    let mut all: Vec<_> = whole.into_iter().map(|(own, n)| (own, own.whole(), n)).collect();
    all.extend([
        (share(4, 2, 2, 48), share(4, 2, 2, 48), 5),
        (share(8, 0, 8, 64), share(8, 6, 2, 64), 3),
        (share(8, 4, 4, 160), share(8, 5, 1, 160), 6),
        (share(6, 0, 3, 32), share(6, 2, 4, 32), 4),
    ]);
    all
}

#[test]
fn gathering_takes_the_heads_that_both_have_and_nothing_else() {
    testing::schedules(|stream| {
        for (own, theirs, count) in shares() {
            let pool = bytes(1, (count + 3) * own.own_bytes());
            let blocks = &Random::new(2).permutation(count + 3)[..count];
            let buffer = upload(stream, &vec![UNTOUCHED; count * theirs.own_bytes()]);
            let (on_device, list) = (upload(stream, &pool), upload(stream, blocks));
            let to = Pieces { memory: buffer.all(), share: theirs };
            let from = Pieces { memory: on_device.all(), share: own };
            gather_blocks(stream, to, from, list.all()).unwrap();
            let mut want = vec![UNTOUCHED; count * theirs.own_bytes()];
            for (at, block) in blocks.iter().enumerate() {
                for i in 0..own.piece_bytes() {
                    if let (Some(from), Some(to)) = (place(own, i), place(theirs, i)) {
                        let from = *block as usize * own.own_bytes() + from;
                        want[at * theirs.own_bytes() + to] = pool[from];
                    }
                }
            }
            assert!(read(stream, &buffer) == want, "{own:?} {theirs:?}");
        }
    });
}

#[test]
fn scattering_writes_those_of_the_listed_blocks_and_nothing_else() {
    testing::schedules(|stream| {
        for (own, theirs, count) in shares() {
            let buffer = bytes(3, count * theirs.own_bytes());
            let blocks = &Random::new(4).permutation(count + 3)[..count];
            let pool = upload(stream, &vec![UNTOUCHED; (count + 3) * own.own_bytes()]);
            let (on_device, list) = (upload(stream, &buffer), upload(stream, blocks));
            let to = Pieces { memory: pool.all(), share: own };
            let from = Pieces { memory: on_device.all(), share: theirs };
            scatter_blocks(stream, to, from, list.all()).unwrap();
            let mut want = vec![UNTOUCHED; (count + 3) * own.own_bytes()];
            for (at, block) in blocks.iter().enumerate() {
                for i in 0..own.piece_bytes() {
                    if let (Some(to), Some(from)) = (place(own, i), place(theirs, i)) {
                        let to = *block as usize * own.own_bytes() + to;
                        want[to] = buffer[at * theirs.own_bytes() + from];
                    }
                }
            }
            assert!(read(stream, &pool) == want, "{own:?} {theirs:?}");
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
            let pool = Pieces { memory: pool.all(), share };
            let all = |memory| Pieces { memory, share: whole };
            scatter_blocks(stream, pool, all(full.all()), list.all()).unwrap();
            gather_blocks(stream, all(joined.all()), pool, list.all()).unwrap();
        }
        assert_eq!(read(stream, &joined), pieces);
    });
}
