//! `baton bench place` as a process, on a made-up trace.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// Twenty prompts of five conversations that share their first block.
fn trace(folder: &Path) -> PathBuf {
    let line = |at: usize| {
        let (conversation, blocks) = (at % 5, 2 + at / 5);
        let ids: Vec<usize> =
            (0..blocks).map(|i| if i == 0 { 0 } else { conversation * 100 + i }).collect();
        format!(
            "{{\"timestamp\": {at}, \"input_length\": {}, \"output_length\": 1, \
             \"hash_ids\": {ids:?}}}\n",
            blocks * 512
        )
    };
    let file = folder.join("trace.jsonl");
    std::fs::write(&file, (0..20).map(line).collect::<String>()).expect("written");
    file
}

fn place(arguments: &str) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["bench", "place", "--trace"])
        .arg(trace(folder.path()))
        .args(arguments.split_whitespace())
        .output()
        .expect("it runs")
}

fn figures(arguments: &str) -> Value {
    let output = place(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn decisions_are_made_while_caches_turn_over() {
    let figures = figures(
        "--nodes 8 --blocks 8000 --events 1000 --rate 50 --seconds 1 --churn-hours 0.001 --json",
    );
    for key in ["decisions_per_second", "rate_kept", "resident_bytes", "after_churn_bytes"] {
        assert!(figures[key].as_f64().unwrap() > 0.0, "{key}: {figures}");
    }
    for key in ["p50", "p99", "p999"] {
        assert!(figures["response_us"][key].as_f64().unwrap() > 0.0, "{key}: {figures}");
    }
    assert_eq!((figures["pairs"].as_u64(), figures["failed"].as_u64()), (Some(8000), Some(0)));
    assert_eq!(figures["churn_events"], 3600);
}

#[test]
fn a_whole_coordinator_answers() {
    let figures =
        figures("--end-to-end --nodes 2 --concurrency 2 --prompt-tokens 40 --seconds 1 --json");
    assert!(figures["requests_per_second"].as_f64().unwrap() > 0.0, "{figures}");
    assert!(figures["first_token_us"]["p50"].as_f64().unwrap() > 0.0, "{figures}");
}

#[test]
fn a_cache_that_holds_no_prompt_is_refused() {
    let output = place("--nodes 8 --blocks 80");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--blocks must be at least"));
}
