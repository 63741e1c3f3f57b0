//! Requests as samplers meet them, and what the CPU makes of them.

use baton_engine::Sample;
use baton_engine::sampler::Sampler;
use baton_proto::sampling::SamplingParams;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

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
    pub(crate) fn number(&mut self) -> f32 {
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
        // Without filters a token is drawn in another way.
        let (plain, filtered) = (self.below(3) == 0, self.below(3) > 0);
        let adjusted = |value: f32, random: &mut Self| {
            if plain || random.below(2) == 0 { value } else { value + random.number().abs() * 0.2 }
        };
        SamplingParams {
            temperature: self.one_of(&[0.0, 0.0, 0.3, 1.0, 1.0, 1.7]),
            top_k: if filtered { self.one_of(&[0, 0, 1, 2, 40, 3000]) } else { 0 },
            top_p: if filtered { self.one_of(&[1.0, 1.0, 0.9, 0.5, 1e-6, 0.999]) } else { 1.0 },
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
pub(crate) struct Row {
    pub(crate) logits: Vec<f32>,
    pub(crate) params: SamplingParams,
    pub(crate) prompt: Vec<u32>,
    pub(crate) output: Vec<u32>,
    /// Whether each token is allowed, if a grammar says so.
    pub(crate) allowed: Option<Vec<bool>>,
}

impl Row {
    pub(crate) fn new(random: &mut Random, vocab: usize) -> Self {
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
    pub(crate) fn expected(&self, sampler: &mut Sampler) -> u32 {
        let mut logits = self.logits.clone();
        for (logit, allowed) in logits.iter_mut().zip(self.allowed.iter().flatten()) {
            *logit = if *allowed { *logit } else { f32::NEG_INFINITY };
        }
        let Self { params, prompt, output, .. } = self;
        sampler.sample(&logits, &Sample { params, prompt, output, pending: 0, allowed: None }).token
    }
}
