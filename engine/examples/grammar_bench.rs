//! What structured output costs: compiling a grammar, computing masks, and a step with and without.
//!
//! `cargo run --release -p baton-engine --example grammar_bench`

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use baton_engine::model::{LoadFormat, LoadOptions, Model};
use baton_engine::{Engine, EngineConfig, EngineEvent, HostExecutor, Kind, Submission};
use baton_grammar::{Ends, Grammars, Vocabulary};
use baton_proto::grammar::Grammar;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::Job;
use baton_proto::sampling::SamplingParams;
use serde_json::json;

type Failure = Box<dyn std::error::Error>;

const SCHEMA: &str = r#"{"type": "object", "required": ["name", "tags", "address", "score"],
    "properties": {
        "name": {"type": "string"},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {"type": "object", "required": ["street", "zip"], "properties": {
            "street": {"type": "string", "maxLength": 100}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}}}"#;
const TEXT: &str = r#"{"name": "Ada Lovelace, countess of many things", "tags": ["red", "blue", "green"],
    "address": {"street": "12 St James's Square, London, second floor", "zip": "12345"}, "score": 17.25}"#;

fn main() -> Result<(), Failure> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo");
    let file = std::fs::read_to_string(demo.join("tokenizer.json"))?;
    let known = Vocabulary::parse(&file)?;
    masks("2,048 tokens of the demo model", &known)?;
    masks("152,000 made-up tokens", &Vocabulary::parse(&made_up(152_000))?)?;
    let grammars = Arc::new(Grammars::new(&known, known.bytes().len()));
    for batch in [1, 16] {
        let free = step(&demo, &grammars, batch, None)?;
        let bound = step(&demo, &grammars, batch, Some(Grammar::Regex("(?s:.*)".into())))?;
        let schema =
            Some(Grammar::JsonSchema(json!({"type": "array", "minItems": 1000}).to_string()));
        let schema = step(&demo, &grammars, batch, schema)?;
        println!(
            "step of {batch:>2}: {free:.2?}; with a regular expression {bound:.2?}, JSON {schema:.2?}"
        );
    }
    Ok(())
}

/// Bytes, then words of one to eight letters with or without a blank before them.
fn made_up(tokens: u32) -> String {
    let mut vocab: serde_json::Map<_, _> =
        (0..256).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    let mut state = 1_u64;
    while vocab.len() < tokens as usize {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = state >> 16;
        let letter =
            |i: u64| char::from(b"etaoinshrdlucmfwypvbgkqjxz"[(bits >> (5 * i)) as usize % 26]);
        let blank = if bits & 1 == 0 { "▁" } else { "" };
        let word: String = (0..1 + (bits >> 40) % 8).map(letter).collect();
        let id = vocab.len();
        vocab.entry(format!("{blank}{word}")).or_insert(id.into());
    }
    json!({"decoder": {"type": "ByteFallback"}, "model": {"vocab": vocab}}).to_string()
}

/// Times a document, cut into its longest tokens, token by token.
fn masks(name: &str, vocabulary: &Vocabulary) -> Result<(), Failure> {
    let began = Instant::now();
    let grammars = Grammars::new(vocabulary, vocabulary.bytes().len());
    let loaded = began.elapsed();
    let grammar = Arc::new(Grammar::JsonSchema(SCHEMA.to_owned()));
    let began = Instant::now();
    let mut guide = grammars.guide(&grammar)?;
    let compiled = began.elapsed();
    let (mut rest, mut times) = (TEXT.as_bytes(), Vec::new());
    let ends = Ends { eos: &[0], stop: &[], early: false };
    while !rest.is_empty() {
        let fits = |(_, bytes): &(usize, &Vec<u8>)| !bytes.is_empty() && rest.starts_with(bytes);
        let fitting = vocabulary.bytes().iter().enumerate().filter(fits);
        let (token, bytes) = fitting.max_by_key(|(_, b)| b.len()).ok_or("a byte has no token")?;
        let began = Instant::now();
        guide.accept(&[token as u32])?;
        guide.mask(ends)?;
        times.push(began.elapsed());
        rest = &rest[bytes.len()..];
    }
    times.sort_unstable();
    let mean = times.iter().sum::<Duration>() / times.len() as u32;
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!(
        "{name}: vocabulary {loaded:.1?}, grammar {compiled:.1?}, {} masks: mean {mean:.1?}, median {:.1?}, p95 {:.1?}, worst {:.1?}",
        times.len(),
        at(50),
        at(95),
        at(100)
    );
    Ok(())
}

/// Time per step of `batch` sequences of 200 tokens each.
fn step(
    demo: &Path,
    grammars: &Arc<Grammars>,
    batch: u64,
    grammar: Option<Grammar>,
) -> Result<Duration, Failure> {
    const TOKENS: u32 = 200;
    let options = LoadOptions {
        dir: demo,
        format: LoadFormat::Dummy { seed: 7 },
        threads: 2,
        max_model_len: None,
        kv_dtype: None,
        on_progress: &mut |_| {},
    };
    let device = Box::new(HostExecutor::new(Model::load(options)?));
    let config = EngineConfig {
        block_tokens: 16,
        kv_blocks: 1000,
        max_batch_tokens: 256,
        max_sequences: 64,
        max_waiting: 64,
    };
    let (sink, events) = channel();
    let sink = Box::new(move |event| drop(sink.send(event)));
    let engine = Engine::start(config, device, Some(grammars.clone()), sink);
    let grammar = grammar.map(Arc::new);
    for n in 0..batch {
        let sampling = SamplingParams {
            max_tokens: TOKENS,
            min_tokens: TOKENS,
            seed: n,
            eos_token_ids: vec![2, 0],
            grammar: grammar.clone(),
            ..SamplingParams::default()
        };
        let id = TransferId { request: RequestId(n.into()), attempt: 1 };
        let (tokens, salt) = ([300, n as u32].into(), CacheSalt::default());
        let job = Job { id, tokens, prompt_tokens: 2, sampling, salt, deadline: None, trace: None };
        engine.submit(Submission { job, kind: Kind::Local, held: false })?;
    }
    let (mut left, mut first, mut last) = (batch, None, 0);
    for event in &events {
        match event {
            EngineEvent::Tokens(tokens) => {
                last = tokens.iter().map(|token| token.position).max().unwrap_or(last);
                if last >= 10 {
                    first.get_or_insert((Instant::now(), last));
                }
            }
            EngineEvent::Failed { reason, .. } => return Err(reason.into()),
            EngineEvent::Ended { .. } => {
                left -= 1;
                if left == 0 {
                    break;
                }
            }
            _ => {}
        }
    }
    let (began, from) = first.ok_or("nothing was generated")?;
    Ok(began.elapsed() / (last - from))
}
