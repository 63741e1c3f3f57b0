//! Angles, and queries, keys and values on their way to attention, in double precision.

use baton_kernels::cuda::{
    HeadShape, KvElements, NO_POSITION, PagedKv, RowPlaces, Stream, Turning, testing,
};
use baton_kernels::cuda::{rope_angles, turn_and_store};
use half::bf16;

use crate::support::{Random, assert_nearest_e4m3, assert_rounded, read, upload};

const EPS: f32 = 1e-6;

fn frequencies(pairs: usize) -> Vec<f32> {
    (0..pairs).map(|i| 1e6_f64.powf(-(i as f64) / pairs as f64) as f32).collect()
}

#[test]
fn angles_are_exact_at_far_positions() {
    testing::schedules(|stream| {
        for (pairs, scale) in [(64, 1.0), (32, 1.1386), (200, 0.7)] {
            let positions = [0, 1, 17, 4095, 131_071, NO_POSITION, 1_048_575, 16_777_215];
            let frequencies = frequencies(pairs);
            let rows = positions.len();
            let table = || upload(stream, &vec![f32::NAN; rows * pairs]);
            let (cos, sin) = (table(), table());
            let (on_device, turns) = (upload(stream, &positions), upload(stream, &frequencies));
            rope_angles(stream, (cos.all(), sin.all()), on_device.all(), turns.all(), scale)
                .unwrap();
            let (cos, sin) = (read(stream, &cos), read(stream, &sin));
            for i in 0..rows * pairs {
                let position = positions[i / pairs];
                if position == NO_POSITION {
                    assert!(cos[i].is_nan() && sin[i].is_nan(), "nothing for rows of padding");
                    continue;
                }
                // What is said of one angle only holds if this is the model's: in f32.
                let angle = f64::from(position as f32 * frequencies[i % pairs]);
                for (got, want) in [(cos[i], angle.cos()), (sin[i], angle.sin())] {
                    let error = (f64::from(got) - want * f64::from(scale)).abs();
                    assert!(error < 1.5e-7, "position {position}, pair {}: {error:e}", i % pairs);
                }
            }
        }
    });
}

/// A step of several sequences.
struct Case {
    shape: HeadShape,
    block_tokens: usize,
    max_blocks: usize,
    positions: Vec<u32>,
    sequences: Vec<u32>,
    tables: Vec<u32>,
    qkv: Vec<bf16>,
    norms: Option<(Vec<bf16>, Vec<bf16>)>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Case {
    /// A chunk of one sequence that crosses blocks, a padding row, and two rows that decode.
    fn new(shape: HeadShape, block_tokens: usize, normed: bool) -> Self {
        let start = block_tokens as u32 - 1;
        let positions = vec![start, start + 1, start + 2, NO_POSITION, 0, 3 * start];
        Self::of(shape, block_tokens, normed, (positions, vec![1, 1, 1, 0, 2, 0]))
    }

    /// Rows of which no two are of the same place.
    fn random(random: &mut Random) -> Self {
        let (group, kv_heads) = (1 + random.below(8), 1 + random.below(6));
        let shape =
            HeadShape { heads: kv_heads * group, kv_heads, head_dim: [64, 128][random.below(2)] };
        let block_tokens = [16, 32, 64][random.below(3)];
        let places = random.permutation(9 * block_tokens);
        let rows = 1 + random.below(12);
        let place = |place: &u32| (place / 3, place % 3);
        let places = places[..rows].iter().map(place).unzip();
        Self::of(shape, block_tokens, random.below(2) == 0, places)
    }

    /// Rows by their positions and sequences.
    fn of(
        shape: HeadShape,
        block_tokens: usize,
        normed: bool,
        (positions, sequences): (Vec<u32>, Vec<u32>),
    ) -> Self {
        let mut random = Random::new(shape.row() as u64);
        let (max_blocks, pairs) = (3, shape.head_dim / 2);
        let norms = [(); 2].map(|()| random.sized(shape.head_dim, 1.5));
        let norms = normed.then(|| (norms[0].clone(), norms[1].clone()));
        let angles: Vec<f64> =
            (0..positions.len() * pairs).map(|_| f64::from(random.number()) * 3.0).collect();
        Self {
            shape,
            block_tokens,
            max_blocks,
            tables: random.permutation(3 * max_blocks + 2)[..3 * max_blocks].to_vec(),
            qkv: random.sized(positions.len() * shape.row(), 3.0),
            cos: angles.iter().map(|angle| angle.cos() as f32).collect(),
            sin: angles.iter().map(|angle| angle.sin() as f32).collect(),
            positions,
            sequences,
            norms,
        }
    }

    fn pool_elements(&self) -> usize {
        let Self { shape, block_tokens, .. } = self;
        (3 * self.max_blocks + 2) * 2 * shape.kv_heads * block_tokens * shape.head_dim
    }

    /// Gives `qkv` and the pool.
    fn run(&self, stream: &Stream, elements: KvElements) -> (Vec<bf16>, Vec<u8>) {
        let qkv = upload(stream, &self.qkv);
        let pieces = upload(stream, &vec![0xff_u8; self.pool_elements() * elements.bytes()]);
        let (cos, sin) = (upload(stream, &self.cos), upload(stream, &self.sin));
        let norms = self.norms.as_ref().map(|(q, k)| (upload(stream, q), upload(stream, k)));
        let (positions, sequences) =
            (upload(stream, &self.positions), upload(stream, &self.sequences));
        let tables = upload(stream, &self.tables);
        let turning = Turning {
            angles: (cos.all(), sin.all()),
            norms: norms.as_ref().map(|(q, k)| (q.all(), k.all())),
            epsilon: EPS,
        };
        let places = RowPlaces { positions: positions.all(), sequences: sequences.all() };
        let kv = PagedKv {
            pieces: pieces.all(),
            elements,
            block_tokens: self.block_tokens,
            block_tables: tables.all(),
            max_blocks: self.max_blocks,
        };
        turn_and_store(stream, qkv.all(), self.shape, &turning, &places, &kv).unwrap();
        (read(stream, &qkv), read(stream, &pieces))
    }

    /// Head `head` of row `row`, normalised and turned.
    fn turned(&self, row: usize, head: usize) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let start = row * self.shape.row() + head * head_dim;
        let mut x: Vec<f64> = self.qkv[start..][..head_dim].iter().map(|x| x.to_f64()).collect();
        if head >= heads + kv_heads {
            return x;
        }
        if let Some((q, k)) = &self.norms {
            let weight = if head < heads { q } else { k };
            let mean = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
            x.iter_mut().zip(weight).for_each(|(x, weight)| *x *= factor * weight.to_f64());
        }
        let half = head_dim / 2;
        for i in 0..half {
            let (cos, sin) = (self.cos[row * half + i], self.sin[row * half + i]);
            let (cos, sin, a, b) = (f64::from(cos), f64::from(sin), x[i], x[half + i]);
            (x[i], x[half + i]) = (a * cos - b * sin, b * cos + a * sin);
        }
        x
    }

    /// Offset in the pool, in elements, of a key or value head of a row.
    fn place(&self, row: usize, kv_head: usize) -> usize {
        let (position, slots) = (self.positions[row] as usize, self.block_tokens);
        let block = self.tables[self.sequences[row] as usize * self.max_blocks + position / slots];
        let head = block as usize * 2 * self.shape.kv_heads + kv_head;
        (head * slots + position % slots) * self.shape.head_dim
    }

    fn check(&self, stream: &Stream, elements: KvElements) {
        let HeadShape { heads, kv_heads, head_dim } = self.shape;
        let (qkv, pool) = self.run(stream, elements);
        let mut written = vec![false; self.pool_elements()];
        for (row, position) in self.positions.iter().enumerate() {
            let start = row * self.shape.row();
            let end = start + self.shape.row();
            let kept = if *position == NO_POSITION { start } else { start + heads * head_dim };
            assert_eq!(qkv[kept..end], self.qkv[kept..end], "k and v stay");
            if *position == NO_POSITION {
                continue;
            }
            for head in 0..heads + 2 * kv_heads {
                for (i, want) in self.turned(row, head).into_iter().enumerate() {
                    let what = || format!("{:?} row {row} head {head} element {i}", self.shape);
                    if head < heads {
                        assert_rounded(qkv[start + head * head_dim + i], want, 2e-6, what);
                        continue;
                    }
                    let at = self.place(row, head - heads) + i;
                    written[at] = true;
                    assert_kept(&pool, at, elements, head < heads + kv_heads, want, what);
                }
            }
        }
        let untouched = written.iter().zip(pool.chunks(elements.bytes()));
        let mut untouched = untouched.filter(|(written, _)| !**written);
        assert!(untouched.all(|(_, bytes)| bytes.iter().all(|byte| *byte == 0xff)));
    }
}

/// Asserts that element `at` of the pool is `want`.
fn assert_kept(
    pool: &[u8],
    at: usize,
    elements: KvElements,
    is_k: bool,
    want: f64,
    what: impl Fn() -> String,
) {
    match elements {
        KvElements::Bf16 => {
            let got = bf16::from_le_bytes([pool[2 * at], pool[2 * at + 1]]);
            assert_rounded(got, want, 2e-6, what);
        }
        KvElements::E4m3 { k_scale, v_scale } => {
            let scale = f64::from(if is_k { k_scale } else { v_scale });
            assert_nearest_e4m3(pool[at], want / scale, 1e-6, what);
        }
    }
}

#[test]
fn queries_turn_and_keys_and_values_are_kept() {
    let shapes = [(4, 2, 128), (3, 1, 64), (2, 1, 256), (32, 8, 64), (28, 4, 128)];
    // Values up to 3: some keys are beyond 448 times their scale.
    let e4m3 = KvElements::E4m3 { k_scale: 0.005, v_scale: 0.25 };
    testing::schedules(|stream| {
        for (i, (heads, kv_heads, head_dim)) in shapes.into_iter().enumerate() {
            let shape = HeadShape { heads, kv_heads, head_dim };
            for elements in [KvElements::Bf16, e4m3] {
                Case::new(shape, [16, 32, 64][i % 3], i % 2 == 0).check(stream, elements);
            }
        }
        let mut random = Random::new(5);
        for elements in [KvElements::Bf16, e4m3, KvElements::Bf16, e4m3] {
            Case::random(&mut random).check(stream, elements);
        }
    });
}
