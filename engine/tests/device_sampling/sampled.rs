//! What devices sample, compared with the CPU.

use baton_engine::sampler::{Sampler, logprobs};
use baton_kernels::cuda::MAX_TOP;

use crate::batch::UNTOUCHED;
use crate::rows::Row;

/// What the device gave.
pub(crate) struct Sampled {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<f32>,
    pub(crate) top_tokens: Vec<u32>,
    pub(crate) top_logprobs: Vec<f32>,
}

impl Sampled {
    pub(crate) fn check(&self, row: usize, of: &Row, sampler: &mut Sampler) {
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

pub(crate) fn near(found: f32, expected: f32) -> bool {
    let equal = found == expected || found.is_nan() && expected.is_nan();
    equal || (found - expected).abs() <= 2e-6 * expected.abs().max(1.0)
}
