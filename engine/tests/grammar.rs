//! JSON schemas by the hundred, followed by a model of random weights: what is finished is valid,
//! by a validator that knows nothing of how it was made.
#![expect(clippy::unwrap_used, reason = "tests")]

#[path = "grammar/schemas.rs"]
mod schemas;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use baton_engine::model::{LoadFormat, LoadOptions, Model};
use baton_engine::testing::Ahead;
use baton_engine::{
    Engine, EngineConfig, EngineEvent, Executor, HostExecutor, Kind, Submission, SubmitError,
};
use baton_grammar::{Grammars, Vocabulary};
use baton_proto::grammar::Grammar;
use baton_proto::hash::CacheSalt;
use baton_proto::ids::{RequestId, TransferId};
use baton_proto::message::{Job, NodeFinish};
use baton_proto::sampling::SamplingParams;
use serde_json::Value;

/// Schemas that documents are drawn under.
const SCHEMAS: u64 = 260;
/// Of them, documents that have to be finished; the others are cut by their length.
const FINISHED: usize = 200;
const MAX_TOKENS: u32 = 250;
/// End-of-sequence tokens of the demo model.
const EOS: [u32; 2] = [2, 0];

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo")
}

/// The demo model's shape with weights drawn at random.
fn model() -> Model {
    let options = LoadOptions {
        dir: &demo(),
        format: LoadFormat::Dummy { seed: 7 },
        threads: 2,
        max_model_len: None,
        kv_dtype: None,
        on_progress: &mut |_| {},
    };
    Model::load(options).unwrap()
}

struct Node {
    engine: Engine,
    events: Receiver<EngineEvent>,
    vocabulary: Vocabulary,
}

impl Node {
    fn start(device: Box<dyn Executor>) -> Self {
        let file = std::fs::read_to_string(demo().join("tokenizer.json")).unwrap();
        let vocabulary = Vocabulary::parse(&file).unwrap();
        let grammars = Arc::new(Grammars::new(&vocabulary, device.vocab_size()));
        let config = EngineConfig {
            block_tokens: 16,
            kv_blocks: 1000,
            max_batch_tokens: 256,
            max_sequences: 48,
            max_waiting: 1000,
        };
        let (sink, events) = channel();
        let sink = Box::new(move |event| drop(sink.send(event)));
        Self { engine: Engine::start(config, device, Some(grammars), sink), events, vocabulary }
    }

    fn submit(&self, n: u64, grammar: Grammar) -> Result<(), SubmitError> {
        let sampling = SamplingParams {
            temperature: 1.0,
            seed: n,
            max_tokens: MAX_TOKENS,
            eos_token_ids: EOS.to_vec(),
            grammar: Some(Arc::new(grammar)),
            ..SamplingParams::default()
        };
        let tokens: Arc<[u32]> = [300 + n as u32 % 100, 500].into();
        let (prompt_tokens, salt) = (tokens.len(), CacheSalt::default());
        let job =
            Job { id: id(n), tokens, prompt_tokens, sampling, salt, deadline: None, trace: None };
        self.engine.submit(Submission { job, kind: Kind::Local, held: false })
    }

    /// Text and finish of each job.
    fn documents(&self, jobs: usize) -> HashMap<TransferId, (String, NodeFinish)> {
        let (mut bytes, mut done) = (HashMap::new(), HashMap::new());
        for event in &self.events {
            match event {
                EngineEvent::Tokens(tokens) => {
                    for token in tokens {
                        let text: &mut Vec<u8> = bytes.entry(token.id).or_default();
                        text.extend(&self.vocabulary.bytes()[token.token as usize]);
                        if let Some(finish) = token.finish {
                            let text = String::from_utf8_lossy(text).into_owned();
                            done.insert(token.id, (text, finish));
                        }
                    }
                }
                EngineEvent::Failed { id, reason, .. } => panic!("{id} failed: {reason}"),
                _ => {}
            }
            if done.len() == jobs {
                break;
            }
        }
        done
    }
}

fn id(n: u64) -> TransferId {
    TransferId { request: RequestId(n.into()), attempt: 1 }
}

#[test]
fn every_finished_document_is_valid_under_its_schema() {
    let devices: [Box<dyn Executor>; 2] =
        [Box::new(HostExecutor::new(model())), Box::new(Ahead::new(model()))];
    let mut all = Vec::new();
    for device in devices {
        let node = Node::start(device);
        for n in 0..SCHEMAS {
            node.submit(n, Grammar::JsonSchema(schemas::schema(n).to_string())).unwrap();
        }
        let documents = node.documents(SCHEMAS as usize);
        let finished = (0..SCHEMAS).filter(|n| judge(&schemas::schema(*n), &documents[&id(*n)]));
        let finished = finished.count();
        assert!(finished >= FINISHED, "{finished} of {SCHEMAS} came to their end");
        assert!(finished < SCHEMAS as usize, "some are cut, or that is not tested");
        all.push(documents);
    }
    assert!(all[0] == all[1], "running ahead changes nothing");
}

/// Whether a document was finished.
fn judge(schema: &Value, (text, finish): &(String, NodeFinish)) -> bool {
    match finish {
        NodeFinish::EndOfSequence => {
            let document: Value = serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{error}: {text:?} of {schema}"));
            let validator = jsonschema::validator_for(schema).unwrap();
            let errors: Vec<_> = validator.iter_errors(&document).map(|e| e.to_string()).collect();
            assert!(errors.is_empty(), "{errors:?}: {document} of {schema}");
            true
        }
        NodeFinish::Length => false,
        NodeFinish::StopToken(token) => panic!("nobody asked to stop at {token}"),
    }
}

#[test]
fn objects_are_objects() {
    let node = Node::start(Box::new(HostExecutor::new(model())));
    for n in 0..40 {
        node.submit(n, Grammar::JsonObject).unwrap();
    }
    for (text, finish) in node.documents(40).into_values() {
        assert!(text.starts_with('{'));
        if finish == NodeFinish::EndOfSequence {
            assert!(serde_json::from_str::<Value>(&text).unwrap().is_object());
        }
    }
}
