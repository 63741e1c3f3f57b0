//! Attention against its formula.

use baton_kernels::cuda::{
    Buffer, DecodePlan, DecodeScratch, DeviceError, HeadShape, KvElements, Stream, Target,
    decode_attention, decode_workers, prefill_attention, prefill_tiles, split_runs, testing,
};
use half::bf16;

use crate::attention_case::{Case, Setup, Uploaded};
use crate::support::Random;

const BF16: KvElements = KvElements::Bf16;
const E4M3: KvElements = KvElements::E4m3 { k_scale: 0.75, v_scale: 1.25 };

fn shape(kv_heads: usize, group: usize, head_dim: usize) -> HeadShape {
    HeadShape { heads: kv_heads * group, kv_heads, head_dim }
}

fn pick<T: Copy>(random: &mut Random, values: &[T]) -> T {
    values[random.below(values.len())]
}

fn prefill(stream: &Stream, case: &Case, there: &Uploaded) -> Vec<bf16> {
    let tiles = stream.buffer(&prefill_tiles(&case.setup.runs, &case.setup.shape)).unwrap();
    prefill_attention(stream, there.out.all(), &case.input(there), tiles.all()).unwrap();
    stream.read(there.out.all()).unwrap()
}

fn check_prefill(stream: &Stream, random: &mut Random, setup: Setup) {
    let case = Case::new(random, setup);
    case.check(&prefill(stream, &case, &case.upload(stream)));
}

/// Hopper's kernels are not on other devices.
fn has_prefill() -> bool {
    testing::test_device().is_some_and(|there| there.device.target() == Target::Hopper)
}

/// Runs a plan twice: the second time finds what the first one left in scratch.
fn check_plan(stream: &Stream, case: &Case, workers: usize) {
    let Setup { runs, shape, window, .. } = &case.setup;
    let plan = DecodePlan::new(runs, shape, *window, workers);
    let scratch = DecodeScratch::new(stream, plan.items().len() / 8, shape).unwrap();
    let items = stream.buffer(plan.items()).unwrap();
    let shares = stream.buffer(plan.shares()).unwrap();
    let results = [0, 1].map(|_| {
        let there = case.upload(stream);
        let plan = (items.all(), shares.all());
        decode_attention(stream, there.out.all(), &case.input(&there), plan, &scratch).unwrap();
        stream.read(there.out.all()).unwrap()
    });
    case.check(&results[0]);
    let bits = results.map(|out| out.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
    assert!(bits[0] == bits[1], "equal plans give equal bits");
}

fn check_decode(stream: &Stream, random: &mut Random, setup: Setup, workers: usize) {
    check_plan(stream, &Case::new(random, setup), workers);
}

#[test]
fn chunks_attend_to_what_came_before() {
    if !has_prefill() {
        return;
    }
    testing::schedules(|stream| {
        let mut random = Random::new(7);
        for (head_dim, block_tokens, group, lengths) in [
            // Every block size, a chunk that begins inside a block, keys that end inside one.
            (128, 16, 4, &[(70, 0), (35, 93)][..]),
            (128, 32, 1, &[(130, 40), (3, 380)]),
            (128, 64, 8, &[(17, 100), (1, 0), (40, 216)]),
            // Rows that do not fill a tile, as the group is no power of two.
            (64, 16, 7, &[(40, 131)]),
            // Enough tiles for blocks to take several, of several key tiles each.
            (64, 64, 2, &[(300, 300), (64, 64)]),
            // Ends at the end of a block, and of a key tile; begins one before it.
            (64, 32, 4, &[(32, 224), (128, 0), (2, 126)]),
        ] {
            let shape = shape(2, group, head_dim);
            let runs = Setup::runs(lengths);
            let setup = Setup { shape, elements: BF16, block_tokens, window: 0, runs };
            check_prefill(stream, &mut random, setup);
        }
    });
}

/// Lanes that have nothing to copy must not fall behind.
#[test]
fn a_warp_that_copies_stays_together() {
    if !has_prefill() {
        return;
    }
    testing::stragglers(|stream| {
        let mut random = Random::new(12);
        // Several tiles for each block, of several key tiles each.
        let runs = Setup::runs(&[(300, 300), (64, 64)]);
        let setup =
            Setup { shape: shape(2, 2, 64), elements: BF16, block_tokens: 64, window: 0, runs };
        check_prefill(stream, &mut random, setup);
    });
}

#[test]
fn chunks_of_random_shapes() {
    if !has_prefill() {
        return;
    }
    testing::schedules(|stream| {
        let mut random = Random::new(11);
        for _ in 0..5 {
            let group = pick(&mut random, &[1, 2, 3, 4, 5, 8, 16]);
            let shape = shape(1 + random.below(3), group, pick(&mut random, &[64, 128]));
            let lengths: Vec<_> = (0..1 + random.below(3))
                .map(|_| (1 + random.below(280 / group), random.below(2) * random.below(400)))
                .collect();
            let setup = Setup {
                shape,
                elements: BF16,
                block_tokens: pick(&mut random, &[16, 32, 64]),
                window: random.below(2) * (1 + random.below(300)),
                runs: Setup::runs(&lengths),
            };
            check_prefill(stream, &mut random, setup);
        }
    });
}

/// Windows within a tile, of several tiles, that begin at their ends, that hide a tile's first key from
/// a last row only (row 311), and that hide nothing.
#[test]
fn chunks_see_their_window_only() {
    if !has_prefill() {
        return;
    }
    testing::schedules(|stream| {
        let mut random = Random::new(13);
        for window in [1, 55, 100, 128, 129, 257, 1 << 20] {
            let (shape, runs) = (shape(1, 4, 64), Setup::runs(&[(70, 280), (33, 0)]));
            let setup = Setup { shape, elements: BF16, block_tokens: 16, window, runs };
            check_prefill(stream, &mut random, setup);
        }
    });
}

#[test]
fn single_rows_attend_to_what_came_before() {
    testing::schedules(|stream| {
        let mut random = Random::new(17);
        for elements in [BF16, E4M3] {
            for (head_dim, block_tokens, group, workers, lengths) in [
                // One worker that takes everything, and one for every piece of it.
                (128, 16, 4, 1, &[(1, 0), (1, 300), (1, 63), (1, 64), (1, 15), (1, 14)][..]),
                (128, 64, 8, 40, &[(1, 1000), (1, 129), (1, 5)]),
                // Several tokens of a sequence, and several parts of one that end within another.
                (64, 32, 2, 5, &[(11, 500), (3, 0), (1, 640)]),
                (64, 16, 16, 3, &[(2, 127), (1, 400)]),
                (128, 32, 5, 2, &[(4, 60), (1, 200)]),
            ] {
                let shape = shape(2, group, head_dim);
                let runs = Setup::runs(lengths);
                let setup = Setup { shape, elements, block_tokens, window: 0, runs };
                check_decode(stream, &mut random, setup, workers);
            }
        }
    });
}

/// More parts than there is room for at once where they are added up, and a warp that falls behind.
#[test]
fn a_long_sequence_is_added_up_from_many_parts() {
    let check = |stream: &Stream| {
        for (head_dim, elements, parts) in [(128, E4M3, 9), (64, BF16, 66)] {
            let (shape, runs) = (shape(1, 3, head_dim), Setup::runs(&[(1, parts * 128 - 30)]));
            let setup = Setup { shape, elements, block_tokens: 64, window: 0, runs };
            check_decode(stream, &mut Random::new(20), setup, parts);
        }
    };
    testing::schedules(check);
    testing::stragglers(check);
}

/// Windows that begin inside, at and one before the end of the 16 keys that are read at once.
#[test]
fn single_rows_see_their_window_only() {
    testing::schedules(|stream| {
        let mut random = Random::new(18);
        for window in [1, 12, 13, 44, 200, 1 << 20] {
            let (shape, runs) = (shape(1, 4, 64), Setup::runs(&[(1, 300), (4, 100), (1, 3)]));
            let setup = Setup { shape, elements: BF16, block_tokens: 16, window, runs };
            check_decode(stream, &mut random, setup, 2);
        }
    });
}

#[test]
fn single_rows_of_random_shapes() {
    testing::schedules(|stream| {
        let mut random = Random::new(19);
        for _ in 0..5 {
            let group = pick(&mut random, &[1, 2, 3, 4, 7, 8, 16]);
            let lengths: Vec<_> = (0..1 + random.below(5))
                .map(|_| (1 + random.below(2) * random.below(6), random.below(450)))
                .collect();
            let setup = Setup {
                shape: shape(1 + random.below(3), group, pick(&mut random, &[64, 128])),
                elements: pick(&mut random, &[BF16, E4M3]),
                block_tokens: pick(&mut random, &[16, 32, 64]),
                window: random.below(2) * (1 + random.below(300)),
                runs: Setup::runs(&lengths),
            };
            let workers = 1 + random.below(9);
            check_decode(stream, &mut random, setup, workers);
        }
    });
}

/// Scores that grow and grow, so that sums have to be rescaled, and shrink, so that they must not.
#[test]
fn greater_scores_come_late_or_early() {
    testing::schedules(|stream| {
        for sign in [1.0, -1.0] {
            let setup = Setup {
                shape: shape(1, 2, 64),
                elements: BF16,
                block_tokens: 16,
                window: 0,
                runs: Setup::runs(&[(1, 400), (3, 200)]),
            };
            let mut case = Case::new(&mut Random::new(23), setup);
            case.slope(sign * 0.05);
            if has_prefill() {
                case.check(&prefill(stream, &case, &case.upload(stream)));
            }
            check_plan(stream, &case, 3);
        }
    });
}

/// A captured launch follows its buffers: longer sequences, other shares, rows that are gone.
#[test]
fn captured_steps_follow_their_plan() {
    let Some(stream) = testing::test_stream() else { return };
    let shape = shape(2, 4, 128);
    let workers = decode_workers(stream.device(), &shape);
    let most = DecodePlan::most_items(4, workers);
    let scratch = DecodeScratch::new(&stream, most, &shape).unwrap();
    let items = Buffer::<u32>::new(stream.device(), most * 8).unwrap();
    let shares = Buffer::<u32>::new(stream.device(), workers + 1).unwrap();
    let all = Setup::runs(&[(1, 500), (1, 90), (1, 300), (1, 7)]);
    let setup = Setup { shape, elements: BF16, block_tokens: 16, window: 0, runs: all.clone() };
    let mut case = Case::new(&mut Random::new(29), setup);
    let there = case.upload(&stream);
    let step = (items.all(), shares.all());
    let launch = |stream: &Stream| {
        decode_attention(stream, there.out.all(), &case.input(&there), step, &scratch)
    };
    let graph = stream.capture(launch).unwrap();
    for kept in [&[0, 1, 2, 3][..], &[2], &[], &[3, 0]] {
        case.setup.runs = kept.iter().map(|&i| all[i]).collect();
        let plan = DecodePlan::new(&case.setup.runs, &shape, 0, workers);
        stream.write(plan.items(), items.slice(0..plan.items().len())).unwrap();
        stream.write(plan.shares(), shares.all()).unwrap();
        stream.write(&vec![bf16::NAN; there.out.len()], there.out.all()).unwrap();
        stream.replay(&graph).unwrap();
        case.check(&stream.read(there.out.all()).unwrap());
    }
}

#[test]
fn what_has_no_kernel_is_refused() {
    let Some(stream) = testing::test_stream() else { return };
    let mut random = Random::new(31);
    let runs = Setup::runs(&[(1, 20)]);
    let setup = Setup { shape: shape(1, 1, 32), elements: E4M3, block_tokens: 16, window: 0, runs };
    let case = Case::new(&mut random, setup);
    let there = case.upload(&stream);
    let shape = &case.setup.shape;
    let tiles = stream.buffer(&prefill_tiles(&case.setup.runs, shape)).unwrap();
    let result = prefill_attention(&stream, there.out.all(), &case.input(&there), tiles.all());
    assert!(matches!(result, Err(DeviceError::Unsupported(_))), "{result:?}");
    let plan = DecodePlan::new(&case.setup.runs, shape, 0, 1);
    let scratch = DecodeScratch::new(&stream, 1, shape).unwrap();
    let items = stream.buffer(plan.items()).unwrap();
    let shares = stream.buffer(plan.shares()).unwrap();
    let plan = (items.all(), shares.all());
    let result = decode_attention(&stream, there.out.all(), &case.input(&there), plan, &scratch);
    assert!(matches!(result, Err(DeviceError::Unsupported(_))), "{result:?}");
    let prefers = |rows| {
        let runs = Setup::runs(&[(rows, 0)]);
        !split_runs(stream.device(), shape, &runs).1.is_empty()
    };
    assert!(!prefers(1));
    assert_eq!(prefers(1 << 14), has_prefill());
}
