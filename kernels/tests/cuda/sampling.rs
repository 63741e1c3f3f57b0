//! What sampling finds in a row of logits. Its semantics are checked where they are defined: against
//! the engine's sampler on the CPU.

use baton_kernels::cuda::{
    Buffer, DeviceSampler, MAX_TOP, SamplingInputs, SamplingOutputs, SamplingRow, Stream, testing,
};

use crate::support::Random;

/// The token of each greedy row, which a mask of words allows if there is one, and the likeliest of
/// all tokens, in order.
fn likeliest(
    stream: &Stream,
    (logits, allowed): (&[f32], &[u32]),
    vocab: usize,
    count: usize,
) -> (Vec<u32>, Vec<Vec<u32>>) {
    let device = stream.device();
    let rows = logits.len() / vocab;
    let row = SamplingRow {
        temperature: 0.0,
        logprobs: count as u32,
        constrained: u32::from(!allowed.is_empty()),
        ..SamplingRow::default()
    };
    let mut sampler = DeviceSampler::new(stream, rows, vocab).unwrap();
    let none = Buffer::<u32>::new(device, 0).unwrap();
    let (there, params) =
        (stream.buffer(logits).unwrap(), stream.buffer(&vec![row; rows]).unwrap());
    let allowed = stream.buffer(allowed).unwrap();
    let lengths = stream.buffer(&vec![1_u32; rows]).unwrap();
    let inputs = SamplingInputs {
        logits: there.all(),
        params: params.all(),
        lengths: lengths.all(),
        histories: none.all(),
        history_stride: 1,
        ends: none.all(),
        biases: (none.all(), none.all().cast()),
        allowed: allowed.all(),
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
    let found = found.chunks(MAX_TOP).map(|row| row[..count].to_vec()).collect();
    (stream.read(tokens.all()).unwrap(), found)
}

#[test]
fn alternatives_are_the_likeliest_in_order() {
    testing::schedules(|stream| {
        let mut random = Random::new(37);
        // One tile, and two.
        for vocab in [200_usize, 5000] {
            let logits: Vec<f32> = (0..2 * vocab).map(|_| random.number()).collect();
            let words = vocab.div_ceil(32);
            let mask: Vec<u32> = (0..2 * words).map(|_| random.bits() as u32).collect();
            let (free, found) = likeliest(stream, (&logits, &[]), vocab, 7);
            let (masked, unmasked) = likeliest(stream, (&logits, &mask), vocab, 7);
            assert_eq!(found, unmasked, "alternatives are of all tokens");
            for (i, row) in logits.chunks(vocab).enumerate() {
                let mut order: Vec<u32> = (0..vocab as u32).collect();
                order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
                assert_eq!((free[i], &found[i][..]), (order[0], &order[..7]));
                let word = |token: u32| mask[i * words + token as usize / 32];
                order.retain(|token| word(*token) >> (token % 32) & 1 == 1);
                assert_eq!(masked[i], order[0]);
            }
        }
    });
}
