//! Blocks of an e4m3 cache as bf16, number by number.

use baton_kernels::cuda::{HeadShape, KvElements, PagedKv, testing, widen_blocks};
use half::bf16;

use crate::support::{Random, assert_rounded, e4m3_to_f64, read, upload};

/// Every e4m3 number, NaNs included, in blocks of which some are listed.
fn check(shape: HeadShape, block_tokens: usize, count: usize, elements: KvElements) {
    let KvElements::E4m3 { k_scale, v_scale } = elements else { unreachable!() };
    testing::schedules(|stream| {
        let half = shape.kv_heads * block_tokens * shape.head_dim;
        let mut random = Random::new(11);
        let pool: Vec<u8> = (0..(count + 2) * 2 * half).map(|_| random.bits() as u8).collect();
        let blocks = &Random::new(12).permutation(count + 2)[..count];
        let (pieces, list) = (upload(stream, &pool), upload(stream, blocks));
        // More room than there is to write.
        let wide = upload(stream, &vec![bf16::MAX; (count + 1) * 2 * half]);
        let kv = PagedKv {
            pieces: pieces.all(),
            elements,
            block_tokens,
            block_tables: list.all(),
            max_blocks: 1,
        };
        let to = wide.slice(0..count * 2 * half);
        widen_blocks(stream, to, &kv, &shape, list.all()).unwrap();
        let (found, beyond) = (read(stream, &wide), count * 2 * half);
        assert!(found[beyond..].iter().all(|value| *value == bf16::MAX));
        for (at, found) in found[..beyond].iter().enumerate() {
            let (piece, i) = (at / (2 * half), at % (2 * half));
            let byte = pool[blocks[piece] as usize * 2 * half + i];
            let scale = f64::from(if i < half { k_scale } else { v_scale });
            let want = e4m3_to_f64(byte) * scale;
            if want.is_nan() || want == 0.0 {
                assert!(found.to_f64() == want || want.is_nan() && found.is_nan());
            } else if scale == 1.0 {
                assert_eq!(found.to_f64(), want, "{byte:#x} at {at}");
            } else {
                assert_rounded(*found, want, 1e-6 * want.abs(), || format!("{byte:#x} at {at}"));
            }
        }
    });
}

#[test]
fn listed_blocks_become_bf16_one_after_the_other() {
    let shape = |kv_heads, head_dim| HeadShape { heads: kv_heads, kv_heads, head_dim };
    let plain = KvElements::E4m3 { k_scale: 1.0, v_scale: 1.0 };
    let scaled = KvElements::E4m3 { k_scale: 0.3, v_scale: 7.0 };
    check(shape(1, 64), 16, 1, plain);
    check(shape(3, 128), 32, 5, plain);
    check(shape(8, 128), 64, 2, scaled);
}
