//! `baton plan` as a process, on a made-up trace.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// Forty requests of ten conversations that share their first block.
fn trace(folder: &Path) -> PathBuf {
    let line = |at: usize| {
        let (tick, conversation, turn) = (at / 4 * 3000, at % 10, at / 10);
        let blocks = 4 + 2 * turn;
        let ids: Vec<usize> =
            (0..blocks).map(|i| if i == 0 { 0 } else { conversation * 100 + i }).collect();
        let (input, output) = (blocks * 512 - 10, 20 + at);
        format!(
            "{{\"timestamp\": {tick}, \"input_length\": {input}, \"output_length\": {output}, \
             \"hash_ids\": {ids:?}}}\n"
        )
    };
    let file = folder.join("trace.jsonl");
    std::fs::write(&file, (0..40).map(line).collect::<String>()).expect("writable");
    file
}

fn plan(file: &Path, arguments: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_baton"))
        .args(["plan", "--trace"])
        .arg(file)
        .args(arguments.split_whitespace())
        .output()
        .expect("it was built with this test")
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn a_replay_prints_its_figures() {
    let folder = tempfile::tempdir().unwrap();
    let file = trace(folder.path());
    let usual = "--replay --prefill 2 --decode 1 --policy prefix --scale 2 --cache-blocks 500 \
                 --block-tokens 512 --prefill-cost 20,0.1,0.000001 --decode-cost 18,0.1,0.000029 \
                 --seed 3 --spread --json";
    let figures = json(&plan(&file, usual));
    let expected = [
        "requests",
        "completed",
        "rejected",
        "hit_blocks_ratio",
        "hit_tokens_ratio",
        "ttft_ms",
        "tpot_ms",
        "remote_ratio",
        "kv_moved_ratio",
        "wall_seconds",
        // With links, which clusters with decode nodes have.
        "pulled_ratio",
    ];
    assert_eq!(keys(&figures), expected);
    assert_eq!(keys(&figures["ttft_ms"]), ["mean", "p50", "p90", "p99"]);
    assert_eq!(keys(&figures["tpot_ms"]), ["mean", "p50", "p99"]);
    assert_eq!((&figures["requests"], &figures["completed"]), (&40.into(), &40.into()));
    assert!(figures["ttft_ms"]["mean"].as_f64() > Some(100.0));
    assert!(figures["hit_blocks_ratio"].as_f64() > Some(0.3));
    let without = |mut figures: Value| {
        figures["wall_seconds"] = Value::Null;
        figures
    };
    let again = json(&plan(&file, usual));
    assert_eq!(without(again), without(figures));

    let disturbed = "--replay --prefill 2 --decode 0 --policy session --slow-nodes 1 --noise 0.5 \
                     --slow-factor 3 --event-lag-ms 100 --deadline-ms 2000 --link-gbps 400 \
                     --kv-bytes-per-token 327680 --json";
    let figures = json(&plan(&file, disturbed));
    assert_eq!(keys(&figures)[10..], ["pulled_ratio", "met_deadline"]);
    let table = plan(&file, "--replay --prefill 1 --decode 1 --policy random");
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("40 completed") && text.contains("time per output token"), "{text}");
}

#[test]
fn the_smallest_cluster_is_found_and_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let (file, picture) = (trace(folder.path()), folder.path().join("plan.svg"));
    let arguments = format!(
        "--ttft-ms 1000 --tpot-ms 30 --percentile 90 --policy min-ttft --scale 4 --spread \
         --max-nodes 6 --decode-price 2 --json --svg {}",
        picture.display()
    );
    let answer = json(&plan(&file, &arguments));
    let smallest = &answer["smallest"];
    assert!(smallest["ttft_ms"].as_f64() <= Some(1000.0), "{answer}");
    let count = |key: &str| smallest[key].as_u64().unwrap();
    assert_eq!(smallest["price"].as_f64(), Some((count("prefill") + 2 * count("decode")) as f64));
    let svg = std::fs::read_to_string(picture).unwrap();
    assert!(svg.starts_with("<svg ") && (svg.contains(">smallest<") || svg.contains(">best<")));

    let hopeless = plan(&file, "--ttft-ms 1 --tpot-ms 1 --policy random --max-nodes 2");
    assert_eq!(hopeless.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&hopeless.stderr).contains("--max-nodes"));
}

#[test]
fn mistakes_are_named_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = trace(folder.path());
    let broken = folder.path().join("broken.jsonl");
    std::fs::write(&broken, "{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 1}\n")
        .unwrap();
    for (file, arguments, code, part) in [
        (&file, "--replay --prefill 2", 2, "--decode"),
        (&file, "--replay --prefill 0 --decode 0", 2, "both 0"),
        (&file, "--replay --prefill 1 --decode 5000", 2, "4096"),
        (&file, "--replay --prefill 1 --decode 1 --prefill-cost 1,2", 2, "a_ms,b_ms,c_ms"),
        (&file, "--replay --prefill 1 --decode 1 --scale 0", 2, "0.000001 and 1000000"),
        (&file, "", 2, "--ttft-ms"),
        (&broken, "--replay --prefill 1 --decode 1", 1, "line 1: input_length: 0 is not between 1"),
    ] {
        let output = plan(file, arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {text}");
        assert!(text.contains(part), "{arguments}: {text}");
        assert!(code == 2 || text.lines().count() == 1, "{text}");
    }
}
