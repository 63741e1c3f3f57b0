//! Every fixture of `tests/golden` gives what transformers computes from it, however it is run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;

use baton_engine::Wanted;
use baton_engine::model::LoadFormat;
use baton_proto::geometry::KvDtype;

use common::{Expected, Numbers, Part, Runner, bits, golden, load, log_probabilities};

const TOLERANCE: f64 = 1e-3;

fn runner(dir: &Path, expected: &Expected, block_tokens: usize, threads: usize) -> Runner {
    let model = load(dir, LoadFormat::Safetensors, threads, Some(KvDtype::F32));
    Runner::new(model, block_tokens, expected.tokens(), 1)
}

#[test]
fn log_probabilities_and_greedy_tokens_are_those_of_transformers() {
    for dir in golden() {
        let expected = Expected::read(&dir);
        let mut run = runner(&dir, &expected, 16, 2);
        let rows = run.all_logits(&expected.prompt, &mut || usize::MAX);
        let mut worst = 0.0f64;
        for (row, theirs) in rows.iter().zip(expected.logprobs.chunks(run.vocab())) {
            for (ours, theirs) in log_probabilities(row).iter().zip(theirs) {
                worst = worst.max((ours - f64::from(*theirs)).abs());
            }
        }
        println!("{}: {worst:.1e}", dir.display());
        assert!(worst < TOLERANCE, "{}: off by {worst}", dir.display());
        assert_eq!(rows.len() * run.vocab(), expected.logprobs.len());
        let greedy = run.greedy(&expected.prompt, expected.greedy.len());
        assert_eq!(greedy, expected.greedy, "{}", dir.display());
    }
}

#[test]
fn the_same_bits_however_it_is_chunked_blocked_and_threaded() {
    let mut numbers = Numbers(1);
    for dir in golden() {
        let expected = Expected::read(&dir);
        let whole = runner(&dir, &expected, 16, 1).all_logits(&expected.prompt, &mut || usize::MAX);
        for (block_tokens, most, threads) in [(16, 1, 1), (16, 40, 2), (32, 7, 2), (64, 23, 3)] {
            let mut run = runner(&dir, &expected, block_tokens, threads);
            let rows = run.all_logits(&expected.prompt, &mut || 1 + numbers.below(most));
            assert!(
                bits(&rows) == bits(&whole),
                "{}: blocks of {block_tokens}, chunks up to {most}, {threads} threads",
                dir.display()
            );
        }
    }
}

#[test]
fn the_same_bits_whatever_else_is_in_the_batch() {
    let mut numbers = Numbers(2);
    for dir in golden() {
        let prompt = Expected::read(&dir).prompt;
        // In the checkpoint's own precision, so that 16-bit caches are compared too.
        let new = |sequences| {
            let model = load(&dir, LoadFormat::Safetensors, 2, None);
            Runner::new(model, 16, prompt.len(), sequences)
        };
        let alone = new(1).all_logits(&prompt, &mut || usize::MAX);
        let mut run = new(3);
        // Three sequences of the same tokens at different speeds: chunks beside single tokens.
        let (mut at, mut rows) = ([0; 3], vec![Vec::new(); 3]);
        while at.iter().any(|start| *start < prompt.len()) {
            let mut parts = Vec::new();
            for (sequence, start) in at.iter_mut().enumerate() {
                let most = [1, 9, 33][sequence];
                let end = prompt.len().min(*start + 1 + numbers.below(most));
                if *start < end {
                    let tokens = &prompt[*start..end];
                    parts.push(Part { sequence, tokens, start: *start, wanted: Wanted::All });
                    *start = end;
                }
            }
            let mut step = run.step(&parts).into_iter();
            for part in &parts {
                rows[part.sequence].extend(step.by_ref().take(part.tokens.len()));
            }
        }
        for rows in &rows {
            assert!(bits(rows) == bits(&alone), "{}", dir.display());
        }
    }
}

#[test]
fn wanting_fewer_rows_changes_none() {
    for dir in golden() {
        let expected = Expected::read(&dir);
        let mut run = runner(&dir, &expected, 16, 2);
        let all = run.all_logits(&expected.prompt, &mut || usize::MAX);
        let (first, rest) = expected.prompt.split_at(50);
        let step = |run: &mut Runner, tokens, start, wanted| {
            run.step(&[Part { sequence: 0, tokens, start, wanted }])
        };
        assert!(step(&mut run, first, 0, Wanted::None).is_empty());
        let last = step(&mut run, rest, first.len(), Wanted::Last);
        assert!(bits(&last) == bits(&all[all.len() - 1..]), "{}", dir.display());
    }
}
