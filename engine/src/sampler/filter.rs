//! Which tokens may be drawn: top-k, top-p and min-p.

use std::cmp::Ordering;

use baton_proto::sampling::SamplingParams;

/// How many of the likeliest tokens are looked at first for top-p.
const FIRST_SORTED: usize = 64;

/// Memory of the filters.
#[derive(Debug, Default)]
pub(super) struct Filter {
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    weight: f32,
    token: u32,
}

/// Likeliest first, the lower id first among equals.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

impl Filter {
    /// Sets the weights of the tokens to 0 that may not be drawn. The likeliest token's weight is
    /// 1 before and after.
    pub(super) fn apply(&mut self, logits: &[f32], weights: &mut [f32], params: &SamplingParams) {
        if let Some(last) = self.last_kept(logits, weights, params) {
            for (token, (&logit, weight)) in (0_u32..).zip(logits.iter().zip(&mut *weights)) {
                let candidate = Candidate { logit, weight: 0.0, token };
                if *weight > 0.0 && order(&candidate, &last) == Ordering::Greater {
                    *weight = 0.0;
                }
            }
        }
        if params.min_p > 0.0 {
            for weight in weights {
                *weight = if *weight < params.min_p { 0.0 } else { *weight };
            }
        }
    }

    /// The least likely token that top-k and top-p keep; `None` if they keep all.
    fn last_kept(
        &mut self,
        logits: &[f32],
        weights: &[f32],
        params: &SamplingParams,
    ) -> Option<Candidate> {
        let (k, p) = (params.top_k as usize, f64::from(params.top_p));
        if k == 0 && p >= 1.0 {
            return None;
        }
        self.candidates.clear();
        let all = (0_u32..).zip(logits.iter().zip(weights));
        let possible = all.filter(|(_, (_, weight))| **weight > 0.0);
        self.candidates.extend(possible.map(|(token, (&logit, &weight))| Candidate {
            logit,
            weight,
            token,
        }));
        let cut = k > 0 && k < self.candidates.len();
        if cut {
            self.candidates.select_nth_unstable_by(k - 1, order);
            self.candidates.truncate(k);
            // Sorted for a sum in an order that no library's selection decides.
            self.candidates.sort_unstable_by(order);
        }
        if p < 1.0 { self.nucleus(p) } else { self.candidates.last().copied().filter(|_| cut) }
    }

    /// The candidate with which the likeliest ones together reach `p` of the candidates' weight.
    /// Sorts no more of them than needed.
    fn nucleus(&mut self, p: f64) -> Option<Candidate> {
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        let (mut sum, mut rest, mut next) = (0.0, &mut self.candidates[..], FIRST_SORTED);
        while !rest.is_empty() {
            if next < rest.len() {
                rest.select_nth_unstable_by(next - 1, order);
            }
            let (sorted, later) = rest.split_at_mut(next.min(rest.len()));
            sorted.sort_unstable_by(order);
            for candidate in sorted {
                sum += f64::from(candidate.weight);
                if sum >= p * total {
                    return Some(*candidate);
                }
            }
            (rest, next) = (later, next * 4);
        }
        None
    }
}
