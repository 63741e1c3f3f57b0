use super::*;

const LINES: &str = r#"
{"timestamp": 3000, "input_length": 1024, "output_length": 5, "hash_ids": [7, 9], "model": "m"}
{"timestamp": 0, "input_length": 600, "output_length": 0, "hash_ids": [7, 8]}
{"timestamp": 3000, "input_length": 10, "output_length": 2}
"#;

fn problem(text: &str) -> (usize, String) {
    Trace::parse(text, 512).unwrap_err()
}

#[test]
fn json_lines_are_sorted_and_their_blocks_named() {
    let trace = Trace::parse(LINES, 512).unwrap();
    let seen: Vec<_> = trace.requests.iter().map(|r| (r.arrival_ms, r.input_tokens)).collect();
    assert_eq!(seen, [(0.0, 600), (3000.0, 1024), (3000.0, 10)]);
    let [early, late, alone] = &trace.requests[..] else { panic!() };
    assert_eq!((early.blocks[0], trace.unique_blocks), (late.blocks[0], 3));
    assert_ne!(early.blocks[1], late.blocks[1]);
    assert!(alone.blocks.is_empty());
    assert_eq!((early.output_tokens, early.full_blocks(512).len()), (1, 1));
    assert_eq!(late.full_blocks(512).len(), 2);
}

#[test]
fn arrivals_are_spread_over_the_tick_and_scaled() {
    let mut trace = Trace::parse(LINES, 512).unwrap();
    trace.spread();
    trace.scale(2.0);
    let times: Vec<f64> = trace.requests.iter().map(|r| r.arrival_ms).collect();
    assert_eq!(times, [0.0, 1500.0, 2250.0]);
}

#[test]
fn azure_tables_are_read() {
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
                2023-12-31 23:59:59.5,4808,10\n2024-01-01 00:00:01.0000000,3180,8\n";
    let trace = Trace::parse(text, 512).unwrap();
    assert_eq!(trace.requests[1].arrival_ms, 1500.0);
    assert_eq!((trace.requests[0].input_tokens, trace.requests[1].output_tokens), (4808, 8));
    let leap = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
                2024-02-28T12:00:00Z,1,1\n2024-03-01T12:00:00+00:00,1,1\n";
    let trace = Trace::parse(leap, 512).unwrap();
    assert_eq!(trace.requests[1].arrival_ms, 2.0 * 86_400_000.0);
}

#[test]
fn malformed_lines_are_named() {
    let line = |fields: &str| format!("{}{{{fields}}}\n", "\n");
    for (fields, expected) in [
        (r#""timestamp": 0, "input_length": 5"#, "missing field `output_length`"),
        (r#""timestamp": -1, "input_length": 5, "output_length": 5"#, "timestamp: -1"),
        (r#""timestamp": 0, "input_length": 0, "output_length": 5"#, "input_length: 0 is not"),
        (r#""timestamp": 0, "input_length": 5, "output_length": 99999999"#, "output_length: 9"),
        (r#""timestamp": 0, "input_length": "a", "output_length": 5"#, "invalid type"),
        (
            r#""timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2, 3]"#,
            "hash_ids: 3 ids, and 600 tokens are 2 blocks of 512",
        ),
    ] {
        let (at, problem) = problem(&line(fields));
        assert!(at == 2 && problem.contains(expected), "{at}: {problem}");
    }
    let (at, text) = problem("TIMESTAMP,ContextTokens\n");
    assert!(at == 1 && text.contains("GeneratedTokens"), "{text}");
    let head = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
    for (row, expected) in [
        ("2023-11-16 18:17:03,1", "GeneratedTokens: there is no such cell"),
        ("2023-11-16 18:17:03,many,1", "ContextTokens: `many`"),
        ("2023-13-16 18:17:03,1,1", "TIMESTAMP: `2023-13-16"),
        ("yesterday,1,1", "TIMESTAMP: `yesterday`"),
    ] {
        let (at, problem) = problem(&format!("{head}{row}\n"));
        assert!(at == 2 && problem.contains(expected), "{at}: {problem}");
    }
}

#[test]
fn an_id_stands_for_one_prefix() {
    let text = r#"{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}
{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [3, 2]}"#;
    let (at, problem) = problem(text);
    assert_eq!(at, 2);
    assert!(problem.starts_with("hash_ids[1]: 2 follows 3 here and 1 before"), "{problem}");
}

#[test]
fn files_that_are_no_traces_are_refused() {
    let missing = Trace::read(Path::new("no/such/trace.jsonl"), 512).unwrap_err();
    assert!(missing.to_string().starts_with("no/such/trace.jsonl: "), "{missing}");
    assert_eq!(Trace::parse("", 512).unwrap().requests, []);
}
