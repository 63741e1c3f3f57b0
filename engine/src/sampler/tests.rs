use proptest::prelude::*;

use super::*;

/// Probabilities by the definitions, in double precision and with full sorts.
fn naive(logits: &[f32], params: &SamplingParams, prompt: &[u32], output: &[u32]) -> Vec<f64> {
    let mut l: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    for &(token, bias) in &params.logit_bias {
        l[token as usize] += f64::from(bias);
    }
    if output.len() < params.min_tokens as usize {
        for &token in params.eos_token_ids.iter().chain(&params.stop_token_ids) {
            l[token as usize] = f64::NEG_INFINITY;
        }
    }
    for (token, logit) in (0..).zip(&mut l) {
        if prompt.contains(&token) || output.contains(&token) {
            let penalty = f64::from(params.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
        let count = output.iter().filter(|other| **other == token).count() as f64;
        *logit -= f64::from(params.frequency_penalty) * count;
        *logit -= f64::from(params.presence_penalty) * count.min(1.0);
    }
    let mut order: Vec<usize> = (0..l.len()).collect();
    order.sort_by(|&a, &b| l[b].total_cmp(&l[a]).then(a.cmp(&b)));
    if params.temperature == 0.0 {
        return (0..l.len()).map(|token| f64::from(u8::from(token == order[0]))).collect();
    }
    let max = l[order[0]];
    let weight = |t: usize| ((l[t] - max) / f64::from(params.temperature)).exp();
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let total: f64 = order.iter().map(|&t| weight(t)).sum();
    let (mut sum, mut kept) = (0.0, Vec::new());
    for &t in &order {
        if sum < f64::from(params.top_p) * total && weight(t) >= f64::from(params.min_p) {
            kept.push(t);
        }
        sum += weight(t);
    }
    let total: f64 = kept.iter().map(|&t| weight(t)).sum();
    (0..l.len()).map(|t| if kept.contains(&t) { weight(t) / total } else { 0.0 }).collect()
}

fn of<'a>(params: &'a SamplingParams, prompt: &'a [u32], output: &'a [u32]) -> Sample<'a> {
    Sample { params, prompt, output, pending: 0, allowed: None }
}

/// What the sampler would draw from.
fn probabilities(logits: &[f32], params: &SamplingParams, prompt: &[u32], out: &[u32]) -> Vec<f64> {
    let mut sampler = Sampler::new(logits.len());
    let token = sampler.sample(logits, &of(params, prompt, out)).token as usize;
    assert!(sampler.counts.iter().all(|&count| count == 0), "nothing stays");
    if params.temperature < MIN_TEMPERATURE {
        return (0..logits.len()).map(|other| f64::from(u8::from(other == token))).collect();
    }
    assert!(sampler.weights[token] > 0.0, "a possible token is drawn");
    let total: f64 = sampler.weights.iter().map(|&weight| f64::from(weight)).sum();
    sampler.weights.iter().map(|&weight| f64::from(weight) / total).collect()
}

/// 16 tokens, none equal, from 4 down.
fn logits() -> Vec<f32> {
    (0..16).map(|i| 4.0 - 0.5 * (i * 7 % 16) as f32).collect()
}

fn close(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
}

#[test]
fn every_parameter_does_what_its_definition_says() {
    type Change = fn(&mut SamplingParams);
    let cases: [(&str, Change); 14] = [
        ("default", |_| {}),
        ("greedy", |p| p.temperature = 0.0),
        ("temperature", |p| p.temperature = 0.3),
        ("top_k", |p| p.top_k = 3),
        ("top_k 1", |p| p.top_k = 1),
        ("top_k of fewer tokens", |p| (p.top_k, p.temperature) = (99, 0.9)),
        ("top_p", |p| p.top_p = 0.6),
        ("tiny top_p", |p| p.top_p = 1e-6),
        ("min_p", |p| p.min_p = 0.2),
        ("repetition", |p| p.repetition_penalty = 1.7),
        ("presence", |p| p.presence_penalty = 1.5),
        ("frequency", |p| p.frequency_penalty = 0.7),
        ("bias", |p| p.logit_bias = vec![(3, 5.0), (0, -100.0)]),
        ("min_tokens", |p| {
            (p.min_tokens, p.eos_token_ids, p.stop_token_ids) = (4, vec![0], vec![7])
        }),
    ];
    let (prompt, output) = ([0, 1, 2, 2], [5, 7, 5]);
    let plain = naive(&logits(), &SamplingParams::default(), &prompt, &output);
    for (name, change) in cases {
        let mut params = SamplingParams::default();
        change(&mut params);
        let expected = naive(&logits(), &params, &prompt, &output);
        assert!(close(&probabilities(&logits(), &params, &prompt, &output), &expected), "{name}");
        assert_eq!(close(&plain, &expected), name == "default", "{name} changes something");
    }
}

#[test]
fn min_tokens_lets_a_stop_token_come_when_they_are_there() {
    let params = SamplingParams {
        temperature: 0.0,
        min_tokens: 2,
        eos_token_ids: vec![0],
        logit_bias: vec![(0, 100.0)],
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(16);
    let mut token = |output: &[u32]| sampler.sample(&logits(), &of(&params, &[9], output)).token;
    assert!(token(&[1]) != 0 && token(&[1, 1]) == 0);
}

#[test]
fn masks_forbid_whatever_else_is_wanted() {
    let params = SamplingParams {
        temperature: 0.0,
        min_tokens: 9,
        eos_token_ids: vec![7],
        logit_bias: vec![(0, 100.0), (3, 1.0)],
        repetition_penalty: 1.5,
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    let sampled = |allowed: &[u32]| {
        let mask = TokenMask::of(allowed, 16);
        let sample = Sample { allowed: Some(&mask), ..of(&params, &[9], &[1]) };
        Sampler::new(16).sample(&logits(), &sample)
    };
    assert_eq!(sampled(&[3, 12]).token, 3);
    assert_eq!(sampled(&[12]).token, 12);
    assert_eq!(sampled(&[7]).token, 7, "the mask has seen to min_tokens");
    let free = Sampler::new(16).sample(&logits(), &of(&params, &[9], &[1]));
    let top = |sampled: Sampled| sampled.logprobs.unwrap().top;
    assert_eq!(top(sampled(&[12])), top(free), "what is told is the model's own");
}

prop_compose! {
    fn any_params()(
        temperature in prop_oneof![Just(0.0_f32), 0.1..2.0_f32],
        top_k in 0..20_u32,
        top_p in prop_oneof![Just(1.0_f32), 0.05..1.0_f32],
        min_p in prop_oneof![Just(0.0_f32), 0.0..0.5_f32],
        penalties in (0.5..2.0_f32, -2.0..2.0_f32, -2.0..2.0_f32),
        min_tokens in 0..4_u32,
        seed in any::<u64>(),
    ) -> SamplingParams {
        SamplingParams {
            temperature, top_k, top_p, min_p, min_tokens, seed,
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            frequency_penalty: penalties.2,
            max_tokens: 9,
            eos_token_ids: vec![2],
            ..SamplingParams::default()
        }
    }
}

proptest! {
    #[test]
    fn all_together_agree_with_the_naive_sampler(
        params in any_params(),
        logits in prop::collection::vec(-8.0..8.0_f32, 300),
        prompt in prop::collection::vec(0..300_u32, 1..20),
        output in prop::collection::vec(0..300_u32, 0..20),
    ) {
        let expected = naive(&logits, &params, &prompt, &output);
        let got = probabilities(&logits, &params, &prompt, &output);
        // Where a threshold falls between two nearly equal values, single and double precision
        // may differ by one token.
        let kept = |p: &[f64]| p.iter().filter(|p| **p > 0.0).count();
        let differ = kept(&expected).abs_diff(kept(&got));
        prop_assert!(close(&got, &expected) || differ == 1, "{:?} {:?}", expected, got);
    }

    #[test]
    fn exp_is_accurate(x in -86.9..0.0_f32) {
        let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
        prop_assert!((got / want - 1.0).abs() < 3e-7, "{x}: {got} {want}");
    }
}

#[test]
fn exp_at_its_edges() {
    assert_eq!(
        (exp(0.0), exp(-100.0), exp(f32::NEG_INFINITY), exp(f32::NAN)),
        (1.0, 0.0, 0.0, 0.0)
    );
}

#[test]
fn draws_follow_the_probabilities() {
    // Chi-square with 15 degrees of freedom: above 37.7 once in a thousand seeds.
    let params = SamplingParams { seed: 42, temperature: 1.3, ..SamplingParams::default() };
    let expected = naive(&logits(), &params, &[], &[]);
    let mut sampler = Sampler::new(16);
    let mut chi_square = |draw: &mut dyn FnMut(&mut Sampler, u32) -> u32| -> f64 {
        let mut counts = [0.0; 16];
        let draws = 20_000;
        for i in 0..draws {
            counts[draw(&mut sampler, i) as usize] += 1.0;
        }
        let wanted = expected.iter().map(|p| p * f64::from(draws));
        wanted.zip(counts).map(|(want, count): (f64, f64)| (count - want).powi(2) / want).sum()
    };
    let by_position = chi_square(&mut |sampler, i| sampler.choose(&logits(), &params, i as usize));
    let by_seed = chi_square(&mut |sampler, i| {
        let params = SamplingParams { seed: u64::from(i), ..params.clone() };
        sampler.choose(&logits(), &params, 0)
    });
    assert!(by_position < 37.7 && by_seed < 37.7, "{by_position} {by_seed}");
}

#[test]
fn the_same_seed_and_position_give_the_same_token() {
    let params = SamplingParams { seed: 7, ..SamplingParams::default() };
    let tokens = |params: &SamplingParams| -> Vec<u32> {
        (0..50).map(|i| Sampler::new(16).choose(&logits(), params, i)).collect()
    };
    assert_eq!(tokens(&params), tokens(&params));
    assert_ne!(tokens(&params), tokens(&SamplingParams { seed: 8, ..params.clone() }));
    // What other builds and machines must draw, too.
    let random: Vec<f64> = (0..3).map(|position| uniform(7, position)).collect();
    assert_eq!(tokens(&params)[..6], PINNED_TOKENS);
    assert_eq!(random, PINNED_RANDOM);
}

const PINNED_TOKENS: [u32; 6] = [5, 0, 14, 14, 7, 0];
// Computed apart from this code, in integers of any size.
const PINNED_RANDOM: [f64; 3] = [0.5243459416779314, 0.30213903321684277, 0.9409962312900013];

#[test]
fn greedy_takes_the_lowest_of_equal_tokens() {
    let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let sample = |logits: &[f32]| Sampler::new(4).sample(logits, &of(&params, &[], &[])).token;
    assert_eq!(sample(&[1.0, 2.0, 2.0, 0.0]), 1);
    assert_eq!(sample(&[f32::NAN, -3.0, f32::NEG_INFINITY, -2.0]), 3);
}

#[test]
fn logprobs_are_those_of_the_model() {
    // Penalties and filters change the token and not what is told of it.
    let params = SamplingParams {
        logprobs: Some(3),
        logit_bias: vec![(1, 50.0)],
        temperature: 0.5,
        top_k: 1,
        ..SamplingParams::default()
    };
    let logits = [0.5, -2.0, 3.0, 0.5, 1.0_f32];
    let sampled = Sampler::new(5).sample(&logits, &of(&params, &[], &[]));
    assert_eq!(sampled.token, 1);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let want = |token: usize| (f64::from(logits[token]) - sum.ln()) as f32;
    let Logprobs { logprob, top } = sampled.logprobs.unwrap();
    assert!((logprob - want(1)).abs() < 1e-6);
    assert_eq!(top.iter().map(|entry| entry.0).collect::<Vec<_>>(), [2, 4, 0], "ties by id");
    assert!(top.iter().all(|&(token, value)| (value - want(token as usize)).abs() < 1e-6));
    let none = SamplingParams { logprobs: Some(0), ..params };
    let sampled = Sampler::new(5).sample(&logits, &of(&none, &[], &[]));
    assert_eq!(sampled.logprobs.unwrap().top, []);
}
