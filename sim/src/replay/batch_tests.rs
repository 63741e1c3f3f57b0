use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const DECODE: DecodeCost = DecodeCost { step_ms: 18.0, sequence_ms: 0.5, kv_token_ms: 0.001 };
const PREFILL: PrefillCost = PrefillCost { start_ms: 20.0, token_ms: 0.1, square_ms: 1e-5 };

/// One thing to join: when, prompt tokens, tokens to decode, and whether the prompt is computed here.
type Arrival = (f64, u32, u32, bool);

fn joining(request: usize, (_, tokens, remaining, local): Arrival) -> Joining {
    if local {
        Joining::Prompt(Prompt { request, done: 0, total: tokens, remaining })
    } else {
        Joining::Sequence(Sequence { request, tokens, remaining: remaining.max(1) })
    }
}

/// When each sequence ends, from the batch's events.
fn by_events(arrivals: &[Arrival]) -> BTreeMap<usize, f64> {
    let mut batch = Batch::new(DECODE, PREFILL);
    let mut ends = BTreeMap::new();
    let mut rest = arrivals.iter().copied().enumerate().peekable();
    loop {
        let change = batch.next_change_ms();
        match (rest.peek(), change) {
            (Some(&(_, (ms, ..))), None) => join(&mut batch, &mut rest, ms),
            (Some(&(_, (ms, ..))), Some(change)) if ms < change => join(&mut batch, &mut rest, ms),
            (_, Some(change)) => {
                let finished = batch.change(change);
                let prompt = finished.prompt.filter(|&request| arrivals[request].2 == 0);
                ends.extend(finished.sequences.into_iter().chain(prompt).map(|r| (r, change)));
            }
            (None, None) => break,
        }
    }
    assert_eq!((batch.sequences(), batch.kv_tokens(), batch.prompt_tokens()), (0, 0, 0));
    ends
}

fn join(batch: &mut Batch, rest: &mut impl Iterator<Item = (usize, Arrival)>, ms: f64) {
    if let Some((request, arrival)) = rest.next() {
        batch.join(ms, joining(request, arrival));
    }
}

/// The same, one step after the other.
fn step_by_step(arrivals: &[Arrival]) -> BTreeMap<usize, f64> {
    let mut now: f64 = 0.0;
    let mut ends = BTreeMap::new();
    let mut rest = arrivals.iter().copied().enumerate().peekable();
    let mut running: Vec<(usize, u32, u32)> = Vec::new();
    let mut prompts: VecDeque<(usize, u32, u32, u32)> = VecDeque::new();
    loop {
        if running.is_empty() && prompts.is_empty() {
            let Some((_, (ms, ..))) = rest.peek() else { break };
            now = now.max(*ms);
        }
        while let Some((request, (_, tokens, remaining, local))) =
            rest.next_if(|(_, (ms, ..))| *ms <= now)
        {
            if local {
                prompts.push_back((request, 0, tokens, remaining));
            } else {
                running.push((request, tokens, remaining.max(1)));
            }
        }
        let chunk = prompts.front().map_or(0.0, |&(_, done, total, _)| {
            PREFILL.compute_ms(total.min(done + CHUNK_TOKENS), done)
        });
        let kv: u64 = running.iter().map(|&(_, tokens, _)| u64::from(tokens)).sum();
        now += DECODE.ms(running.len() as u64, kv, chunk);
        for (request, tokens, remaining) in &mut running {
            (*tokens, *remaining) = (*tokens + 1, *remaining - 1);
            if *remaining == 0 {
                ends.insert(*request, now);
            }
        }
        running.retain(|&(.., remaining)| remaining > 0);
        if let Some(prompt) = prompts.front_mut() {
            prompt.1 = prompt.2.min(prompt.1 + CHUNK_TOKENS);
            if prompt.1 == prompt.2 {
                let (request, _, total, remaining) = *prompt;
                prompts.pop_front();
                if remaining == 0 {
                    ends.insert(request, now);
                } else {
                    running.push((request, total, remaining));
                }
            }
        }
    }
    ends
}

proptest! {
    #[test]
    fn steps_in_closed_form_are_steps_one_by_one(
        arrivals in prop::collection::vec(
            (0.0..300.0_f64, 1_u32..3000, 0_u32..60, any::<bool>()), 1..20,
        ),
    ) {
        // Gaps to times.
        let mut ms = 0.0;
        let arrivals: Vec<Arrival> = arrivals
            .into_iter()
            .map(|(gap, tokens, remaining, local)| {
                ms += gap;
                (ms, tokens, remaining, local)
            })
            .collect();
        let (fast, slow) = (by_events(&arrivals), step_by_step(&arrivals));
        prop_assert_eq!(fast.len(), arrivals.len());
        for (request, end) in &slow {
            prop_assert!((fast[request] - end).abs() < 1e-3, "{request}: {} and {end}", fast[request]);
        }
    }
}
