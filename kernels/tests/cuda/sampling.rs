//! What sampling finds in a row of logits. Its semantics are checked where they are defined: against
//! the engine's sampler on the CPU.

use baton_kernels::cuda::{
    Buffer, DeviceSampler, MAX_TOP, SamplingInputs, SamplingOutputs, SamplingRow, Stream, testing,
};

use crate::support::Random;

/// The likeliest tokens of each row, in order.
fn likeliest(stream: &Stream, logits: &[f32], vocab: usize, count: usize) -> Vec<Vec<u32>> {
    let device = stream.device();
    let rows = logits.len() / vocab;
    let row = SamplingRow { temperature: 0.0, logprobs: count as u32, ..SamplingRow::default() };
    let mut sampler = DeviceSampler::new(stream, rows, vocab).unwrap();
    let none = Buffer::<u32>::new(device, 0).unwrap();
    let (there, params) =
        (stream.buffer(logits).unwrap(), stream.buffer(&vec![row; rows]).unwrap());
    let lengths = stream.buffer(&vec![1_u32; rows]).unwrap();
    let inputs = SamplingInputs {
        logits: there.all(),
        params: params.all(),
        lengths: lengths.all(),
        histories: none.all(),
        history_stride: 1,
        ends: none.all(),
        biases: (none.all(), none.all().cast()),
        allowed: none.all(),
    };
    let tokens = stream.buffer(&vec![u32::MAX; rows]).unwrap();
    let top_tokens = stream.buffer(&vec![u32::MAX; rows * MAX_TOP]).unwrap();
    let logprobs = Buffer::<f32>::new(device, rows * (1 + MAX_TOP)).unwrap();
    let outputs = SamplingOutputs {
        tokens: tokens.all(),
        logprobs: logprobs.slice(0..rows),
        top_tokens: top_tokens.all(),
        top_logprobs: logprobs.slice(rows..rows * (1 + MAX_TOP)),
    };
    sampler.sample(stream, &inputs, &outputs, true).unwrap();
    let found = stream.read(top_tokens.all()).unwrap();
    let found: Vec<_> = found.chunks(MAX_TOP).map(|row| row[..count].to_vec()).collect();
    let first: Vec<_> = found.iter().map(|row| row[0]).collect();
    assert_eq!(stream.read(tokens.all()).unwrap(), first, "greedy rows take the likeliest");
    found
}

#[test]
fn alternatives_are_the_likeliest_in_order() {
    testing::schedules(|stream| {
        let mut random = Random::new(37);
        // One tile, and two.
        for vocab in [200, 5000] {
            let logits: Vec<f32> = (0..2 * vocab).map(|_| random.number()).collect();
            let found = likeliest(stream, &logits, vocab, 7);
            for (row, found) in logits.chunks(vocab).zip(found) {
                let mut order: Vec<u32> = (0..vocab as u32).collect();
                order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
                assert_eq!(found, order[..7]);
            }
        }
    });
}
