//! Tokens that devices sample, against the CPU's sampler: the same logits and parameters give the
//! same token and log-probabilities.
#![expect(clippy::unwrap_used, reason = "tests")]

use baton_engine::sampler::{Sampler, logprobs};
use baton_kernels::cuda::{Buffer, DeviceSampler, Element, MAX_TOP, NO_LOGPROBS, Stream, testing};
use baton_kernels::cuda::{SamplingInputs, SamplingOutputs, SamplingRow};
use baton_proto::sampling::SamplingParams;

const HISTORY_STRIDE: usize = 64;
const UNTOUCHED: u32 = 0xdead_beef;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// Of zero mean and unit variance.
    fn number(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| (self.bits() >> 11) as f64 / (1_u64 << 53) as f64).sum();
        ((sum - 2.0) * 3.0_f64.sqrt()) as f32
    }

    fn tokens(&mut self, most: usize, vocab: usize) -> Vec<u32> {
        let end = vocab.min(40);
        (0..self.below(most + 1)).map(|_| (self.below(end) * (vocab / end)) as u32).collect()
    }

    /// Logits of one of the kinds that samplers meet, or that break them.
    fn logits(&mut self, vocab: usize) -> Vec<f32> {
        let kind = self.below(8);
        let mut logits: Vec<f32> = (0..vocab).map(|_| self.number() * 3.0).collect();
        let at = self.below(vocab);
        match kind {
            // Nearly flat: filters keep more than a list has room for.
            0 => logits.iter_mut().for_each(|x| *x *= 0.05),
            // Many equal ones.
            1 => logits.iter_mut().for_each(|x| *x = (*x * 2.0).round() / 2.0),
            // All equal, but for their sign where they are zero.
            2 => logits.iter_mut().for_each(|x| *x = if *x > 0.0 { 0.0 } else { -0.0 }),
            3 => logits[at] = 30.0,
            // The lowest of a few numbers among what is none.
            4 => logits.iter_mut().enumerate().for_each(|(i, x)| match i % 5 {
                0 => *x = f32::NAN,
                1 | 2 => *x = f32::NEG_INFINITY,
                _ => {}
            }),
            5 => logits.iter_mut().for_each(|x| *x = *x * 0.01 - 40.0),
            _ => {}
        }
        logits
    }

    fn params(&mut self, vocab: usize) -> SamplingParams {
        let mut biased = self.tokens(9, vocab);
        biased.sort_unstable();
        biased.dedup();
        let plain = self.below(3) == 0;
        let adjusted = |value: f32, random: &mut Self| {
            if plain || random.below(2) == 0 { value } else { value + random.number().abs() * 0.2 }
        };
        SamplingParams {
            temperature: self.one_of(&[0.0, 0.0, 0.3, 1.0, 1.0, 1.7]),
            top_k: self.one_of(&[0, 0, 1, 2, 40, 3000]),
            top_p: self.one_of(&[1.0, 1.0, 0.9, 0.5, 1e-6, 0.999]),
            min_p: self.one_of(&[0.0, 0.0, 0.1, 1.0]),
            repetition_penalty: adjusted(1.0, self),
            presence_penalty: adjusted(0.0, self),
            frequency_penalty: adjusted(0.0, self),
            logit_bias: if plain {
                Vec::new()
            } else {
                biased.into_iter().map(|token| (token, self.number() * 4.0)).collect()
            },
            seed: self.bits(),
            min_tokens: self.one_of(&[0, 0, 5]),
            eos_token_ids: self.tokens(2, vocab),
            stop_token_ids: self.tokens(3, vocab),
            logprobs: self.one_of(&[None, Some(0), Some(3), Some(20)]),
            ..SamplingParams::default()
        }
    }
}

/// A row of a batch.
struct Row {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    /// Whether each token is allowed, if a grammar says so.
    allowed: Option<Vec<bool>>,
}

impl Row {
    fn new(random: &mut Random, vocab: usize) -> Self {
        let constrained = random.below(4) == 0;
        // Of one token in `of`.
        let of = random.one_of(&[2, 50]);
        Self {
            logits: random.logits(vocab),
            params: random.params(vocab),
            prompt: std::iter::once(1).chain(random.tokens(30, vocab)).collect(),
            output: random.tokens(20, vocab),
            allowed: constrained.then(|| (0..vocab).map(|_| random.below(of) == 0).collect()),
        }
    }

    /// The CPU's token.
    fn expected(&self, sampler: &mut Sampler) -> u32 {
        let mut logits = self.logits.clone();
        for (logit, allowed) in logits.iter_mut().zip(self.allowed.iter().flatten()) {
            *logit = if *allowed { *logit } else { f32::NEG_INFINITY };
        }
        sampler.sample(&logits, &self.params, &self.prompt, &self.output).token
    }
}

/// What a batch is to the device.
#[derive(Default)]
struct Batch {
    logits: Vec<f32>,
    params: Vec<SamplingRow>,
    lengths: Vec<u32>,
    histories: Vec<u32>,
    ends: Vec<u32>,
    biases: (Vec<u32>, Vec<f32>),
    allowed: Vec<u32>,
}

impl Batch {
    fn of(rows: &[Row], vocab: usize) -> Self {
        let mut batch = Self::default();
        // Histories are in another order than rows.
        let histories = rows.iter().rev();
        for Row { prompt, output, .. } in histories {
            let tokens = prompt.iter().chain(output).copied().chain(std::iter::repeat(UNTOUCHED));
            batch.histories.extend(tokens.take(HISTORY_STRIDE));
        }
        for (i, row) in rows.iter().enumerate() {
            batch.push(row, (rows.len() - 1 - i) as u32, vocab);
        }
        batch
    }

    fn push(&mut self, row: &Row, history: u32, vocab: usize) {
        let Row { params, prompt, output, .. } = row;
        self.logits.extend_from_slice(&row.logits);
        // What pads rows must not be sampled.
        self.logits.resize(self.logits.len().next_multiple_of(4), f32::INFINITY);
        assert!(self.logits.len().is_multiple_of(DeviceSampler::stride(vocab)));
        self.lengths.push((prompt.len() + output.len()) as u32);
        let (ends_start, biases_start) = (self.ends.len() as u32, self.biases.0.len() as u32);
        self.ends.extend(params.eos_token_ids.iter().chain(&params.stop_token_ids));
        self.biases.0.extend(params.logit_bias.iter().map(|bias| bias.0));
        self.biases.1.extend(params.logit_bias.iter().map(|bias| bias.1));
        let allowed = row.allowed.clone().unwrap_or_else(|| vec![false; vocab]);
        self.allowed.extend(allowed.chunks(32).map(|word| {
            word.iter().enumerate().fold(0, |bits, (i, allowed)| bits | u32::from(*allowed) << i)
        }));
        self.params.push(SamplingRow {
            seed: params.seed,
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            top_k: params.top_k,
            min_tokens: params.min_tokens,
            history,
            prompt_tokens: prompt.len() as u32,
            ends_start,
            ends_count: self.ends.len() as u32 - ends_start,
            biases_start,
            biases_count: params.logit_bias.len() as u32,
            logprobs: params.logprobs.unwrap_or(NO_LOGPROBS),
            constrained: u32::from(row.allowed.is_some()),
        });
    }

    fn run(&self, stream: &Stream, sampler: &mut DeviceSampler, all_greedy: bool) -> Sampled {
        let rows = self.params.len();
        let (logits, params) = (upload(stream, &self.logits), upload(stream, &self.params));
        let (lengths, ends) = (upload(stream, &self.lengths), upload(stream, &self.ends));
        let histories = upload(stream, &self.histories);
        let biases = (upload(stream, &self.biases.0), upload(stream, &self.biases.1));
        let allowed = upload(stream, &self.allowed);
        let inputs = SamplingInputs {
            logits: logits.all(),
            params: params.all(),
            lengths: lengths.all(),
            histories: histories.all(),
            history_stride: HISTORY_STRIDE,
            ends: ends.all(),
            biases: (biases.0.all(), biases.1.all()),
            allowed: allowed.all(),
        };
        let tokens = upload(stream, &vec![UNTOUCHED; rows]);
        let of_tokens = upload(stream, &vec![f32::NAN; rows]);
        let top_tokens = upload(stream, &vec![UNTOUCHED; rows * MAX_TOP]);
        let of_top = upload(stream, &vec![f32::NAN; rows * MAX_TOP]);
        let outputs = SamplingOutputs {
            tokens: tokens.all(),
            logprobs: of_tokens.all(),
            top_tokens: top_tokens.all(),
            top_logprobs: of_top.all(),
        };
        sampler.sample(stream, &inputs, &outputs, all_greedy).unwrap();
        Sampled {
            tokens: stream.read(tokens.all()).unwrap(),
            logprobs: stream.read(of_tokens.all()).unwrap(),
            top_tokens: stream.read(top_tokens.all()).unwrap(),
            top_logprobs: stream.read(of_top.all()).unwrap(),
        }
    }
}

fn upload<T: Element>(stream: &Stream, contents: &[T]) -> Buffer<T> {
    stream.buffer(contents).unwrap()
}

/// What the device gave.
struct Sampled {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<f32>,
}

impl Sampled {
    fn check(&self, row: usize, of: &Row, sampler: &mut Sampler) {
        let what = format!("row {row} of {} logits, {:?}", of.logits.len(), of.params);
        let token = of.expected(sampler);
        assert_eq!(self.tokens[row], token, "{what}");
        let Some(wanted) = of.params.logprobs else {
            assert!(self.logprobs[row].is_nan() && self.top_tokens[row * MAX_TOP] == UNTOUCHED);
            return;
        };
        // The CPU's list of alternatives does not expect NaN.
        let none = |logit: &f32| if logit.is_nan() { f32::NEG_INFINITY } else { *logit };
        let logits: Vec<f32> = of.logits.iter().map(none).collect();
        let expected = logprobs(&logits, token, wanted as usize);
        let nan = of.logits[token as usize].is_nan();
        let logprob = if nan { f32::NAN } else { expected.logprob };
        assert!(near(self.logprobs[row], logprob), "{what}");
        let top_tokens = &self.top_tokens[row * MAX_TOP..][..MAX_TOP];
        let top_logprobs = &self.top_logprobs[row * MAX_TOP..][..MAX_TOP];
        assert!(top_tokens[wanted as usize..].iter().all(|token| *token == UNTOUCHED), "{what}");
        for (i, (token, logprob)) in expected.top.into_iter().enumerate() {
            if logprob > f32::NEG_INFINITY {
                assert_eq!(top_tokens[i], token, "alternative {i} of {what}");
                assert!(near(top_logprobs[i], logprob), "alternative {i} of {what}");
            }
        }
    }
}

fn near(found: f32, expected: f32) -> bool {
    let equal = found == expected || found.is_nan() && expected.is_nan();
    equal || (found - expected).abs() <= 2e-6 * expected.abs().max(1.0)
}

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
