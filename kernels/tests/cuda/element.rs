//! `silu_mul` and `take_rows`.

use baton_kernels::cuda::{silu_mul, take_rows, testing};
use half::bf16;

use crate::support::{Random, assert_rounded, read, upload};

#[test]
fn gates_are_applied() {
    testing::schedules(|stream| {
        let shapes = [(1, 8), (3, 264), (2, 4096)].into_iter();
        for (rows, width) in shapes.chain(Random::new(2).shapes(6, 3000)) {
            let mut random = Random::new(width as u64);
            // Up to where e^-g overflows and underflows.
            let mut gate_up = random.sized(rows * 2 * width, 12.0);
            for (at, extreme) in gate_up.iter_mut().step_by(7).zip([-200.0, 200.0, -90.0, 0.0]) {
                *at = bf16::from_f32(extreme);
            }
            let out = upload(stream, &vec![bf16::NAN; rows * width]);
            silu_mul(stream, out.all(), upload(stream, &gate_up).all(), width).unwrap();
            for (i, got) in read(stream, &out).into_iter().enumerate() {
                let at = i / width * 2 * width + i % width;
                let (gate, up) = (gate_up[at].to_f64(), gate_up[at + width].to_f64());
                let want = gate / (1.0 + (-gate).exp()) * up;
                // Below the least normal number what is lost does not matter.
                let slack = want.abs() * 4e-6 + 1e-34;
                assert_rounded(got, want, slack, || format!("width {width}, element {i}"));
            }
        }
    });
}

#[test]
fn rows_are_taken_by_number() {
    testing::schedules(|stream| {
        let shapes = [(1, 8), (5, 520), (7, 4104)].into_iter();
        for (rows, width) in shapes.chain(Random::new(3).shapes(40, 2500)) {
            let mut random = Random::new(width as u64);
            let count = 3 + random.below(38);
            let table = random.sized(count * width, 1.0);
            let ids: Vec<u32> = (0..rows).map(|_| random.below(count) as u32).collect();
            let out = upload(stream, &vec![bf16::NAN; rows * width]);
            let (on_device, numbers) = (upload(stream, &table), upload(stream, &ids));
            take_rows(stream, out.all(), on_device.all(), numbers.all(), 0).unwrap();
            let row = |id: &u32| table[*id as usize * width..][..width].to_vec();
            let want: Vec<bf16> = ids.iter().flat_map(row).collect();
            assert_eq!(read(stream, &out), want);
        }
    });
}

#[test]
fn shards_of_a_vocabulary_add_up() {
    let (width, each) = (16, 5);
    testing::schedules(|stream| {
        let mut random = Random::new(1);
        let table = random.sized(2 * each * width, 1.0);
        let ids: Vec<u32> = vec![0, 4, 5, 9, 3, 10, u32::MAX];
        let shard = |first: usize| {
            let out = upload(stream, &vec![bf16::NAN; ids.len() * width]);
            let table = upload(stream, &table[first * width..][..each * width]);
            let ids = upload(stream, &ids);
            take_rows(stream, out.all(), table.all(), ids.all(), first as u32).unwrap();
            read(stream, &out)
        };
        let (low, high) = (shard(0), shard(each));
        for (i, (low, high)) in low.iter().zip(&high).enumerate() {
            let want = table.get(ids[i / width] as usize * width + i % width).copied();
            assert_eq!(low.to_f32() + high.to_f32(), want.unwrap_or_default().to_f32());
        }
    });
}
