//! Tokens that devices sample, against the CPU's sampler: the same logits and parameters give the
//! same token and log-probabilities.
#![expect(clippy::unwrap_used, reason = "tests")]

mod batch;
mod rows;
mod sampled;

use baton_engine::sampler::Sampler;
use baton_kernels::cuda::{DeviceError, DeviceSampler, Histories, RowProgress, advance, testing};
use baton_proto::sampling::SamplingParams;

use batch::{Batch, HISTORY_STRIDE, There, UNTOUCHED, upload};
use rows::{Random, Row};

#[test]
fn devices_sample_what_the_cpu_does() {
    // One tile and less, one token more than a list holds, a last tile of one token, the largest.
    let cases = [(7, 60, 2), (1000, 24, 1), (4097, 24, 2), (20_481, 16, 1), (262_144, 3, 1)];
    testing::schedules(|stream| {
        for (vocab, count, batches) in cases {
            let (mut random, mut cpu) = (Random(vocab as u64), Sampler::new(vocab));
            let mut sampler = DeviceSampler::new(stream, count, vocab).unwrap();
            for _ in 0..batches {
                let rows: Vec<Row> = (0..count).map(|_| Row::new(&mut random, vocab)).collect();
                let sampled = Batch::of(&rows, vocab).run(stream, &mut sampler, false);
                for (i, row) in rows.iter().enumerate() {
                    sampled.check(i, row, &mut cpu);
                }
            }
        }
    });
}

/// Most of the weight is of tokens that a row's list of the likeliest does not have, and a filter
/// keeps some that it has; many tokens are just as likely as the filter asks for.
#[test]
fn filters_are_exact_at_their_edges() {
    testing::schedules(|stream| {
        let (vocab, mut random) = (9000, Random(3));
        let rows: Vec<Row> = (0..16)
            .map(|i| {
                let logits = (0..vocab).map(|_| random.number());
                let steps = if i % 2 == 0 { 4.0 } else { 1e6 };
                let mut row = Row::new(&mut Random(i), vocab);
                row.allowed = None;
                row.logits = logits.map(|x| (x.min(2.5) * steps).round() / steps).collect();
                row.params = SamplingParams { seed: i, ..SamplingParams::default() };
                match i % 4 {
                    0 => (row.params.top_k, row.params.min_p) = (40, 1.0),
                    1 => row.params.top_p = 0.02 + i as f32 * 1e-3,
                    2 => row.params.min_p = 1.0,
                    _ => (row.params.top_k, row.params.top_p) = (40, 0.5),
                }
                row
            })
            .collect();
        let mut sampler = DeviceSampler::new(stream, rows.len(), vocab).unwrap();
        let sampled = Batch::of(&rows, vocab).run(stream, &mut sampler, false);
        let mut cpu = Sampler::new(vocab);
        rows.iter().enumerate().for_each(|(i, row)| sampled.check(i, row, &mut cpu));
    });
}

#[test]
fn rows_that_pad_a_batch_are_left_alone() {
    testing::schedules(|stream| {
        let (vocab, mut random) = (300, Random(5));
        let mut rows: Vec<Row> = (0..4).map(|_| Row::new(&mut random, vocab)).collect();
        rows.iter_mut().for_each(|row| row.params.temperature = 0.0);
        rows[2].params.temperature = 1.0;
        let mut batch = Batch::of(&rows, vocab);
        batch.lengths[1] = 0;
        let mut sampler = DeviceSampler::new(stream, 4, vocab).unwrap();
        let mut cpu = Sampler::new(vocab);
        let sampled = batch.run(stream, &mut sampler, true);
        let untouched: Vec<bool> = sampled.tokens.iter().map(|t| *t == UNTOUCHED).collect();
        assert_eq!(untouched, [false, true, true, false], "padding, and not greedy");
        for i in [0, 3] {
            sampled.check(i, &rows[i], &mut cpu);
        }
        assert_eq!(batch.run(stream, &mut sampler, false).tokens[1], UNTOUCHED);
    });
}

/// Sampling and `advance` in one graph, replayed: the output grows on the device alone.
#[test]
fn graphs_decode_without_the_host() {
    testing::schedules(|stream| {
        let (vocab, count, mut random) = (500, 6, Random(9));
        let mut rows: Vec<Row> = (0..count).map(|_| Row::new(&mut random, vocab)).collect();
        rows.iter_mut().for_each(|row| row.params.frequency_penalty = 1.5);
        let there = There::new(stream, &Batch::of(&rows, vocab));
        let of_rows: Vec<u32> = (0..count as u32).rev().collect();
        let (of_rows, positions) = (upload(stream, &of_rows), upload(stream, &vec![0; count]));
        let (tokens, stride) = (there.histories.all(), HISTORY_STRIDE);
        let progress = RowProgress {
            positions: positions.all(),
            lengths: there.lengths.all(),
            histories: Some(Histories { tokens, stride, rows: of_rows.all() }),
        };
        let mut sampler = DeviceSampler::new(stream, count, vocab).unwrap();
        let graph = stream.capture::<DeviceError>(|stream| {
            sampler.sample(stream, &there.inputs(), &there.outputs(), false)?;
            advance(stream, &progress, there.tokens.all())
        });
        let (graph, mut cpu) = (graph.unwrap(), Sampler::new(vocab));
        for _ in 0..4 {
            stream.replay(&graph).unwrap();
            let (sampled, positions) =
                (there.sampled(stream), stream.read(positions.all()).unwrap());
            for (i, row) in rows.iter_mut().enumerate() {
                sampled.check(i, row, &mut cpu);
                assert_eq!(positions[i] as usize, row.prompt.len() + row.output.len());
                row.output.push(sampled.tokens[i]);
            }
        }
    });
}
