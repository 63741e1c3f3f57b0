//! Messages survive the wire, and bad ones are refused by name.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::embedding::{MAX_HIDDEN_SIZE, Pooling};
use crate::grammar::Grammar;
use crate::hash::{CacheSalt, ModelRoot};
use crate::message::{
    Command, Hello, Job, Logprobs, MAX_PRICE, NodeEvent, NodeFinish, Pull, Report, Retry,
    TokenEvent,
};
use crate::sampling::SamplingParams;
use crate::trace::TraceContext;
use crate::wire::node::from_node::Message as Up;

fn job() -> Job {
    Job {
        id: TransferId { request: RequestId(1 << 100), attempt: 3 },
        tokens: [5, 6, 7].into(),
        prompt_tokens: 2,
        sampling: SamplingParams {
            logit_bias: vec![(3, -1.5)],
            logprobs: Some(2),
            eos_token_ids: vec![9],
            ..SamplingParams::default()
        },
        salt: CacheSalt::from_text("tenant"),
        deadline: Some(Duration::from_millis(1500)),
        trace: Some(TraceContext { trace: 1 << 90, span: 7, sampled: true }),
    }
}

/// A job without output.
fn prompt() -> Job {
    Job { prompt_tokens: 3, ..job() }
}

fn guided(grammar: Grammar) -> Command {
    let sampling = SamplingParams { grammar: Some(Arc::new(grammar)), ..job().sampling };
    Command::Decode { job: Job { sampling, ..job() }, prefill: None, pull: None }
}

fn peer() -> Peer {
    let node = "decode-0".parse().unwrap();
    Peer { node, epoch: Epoch(7), kv_address: "127.0.0.1:1".into() }
}

fn pull() -> Pull {
    Pull { from: peer(), tokens: 2 }
}

#[test]
fn commands_survive_the_wire() {
    let commands = [
        Command::Prefill { job: job(), decode: peer(), pull: None },
        Command::Prefill { job: job(), decode: peer(), pull: Some(pull()) },
        Command::Decode { job: job(), prefill: Some(peer()), pull: None },
        Command::Decode { job: job(), prefill: None, pull: Some(pull()) },
        Command::Decode {
            job: Job { deadline: None, trace: None, ..job() },
            prefill: None,
            pull: None,
        },
        Command::Embed { job: prompt(), pooling: Pooling::Last },
        Command::Embed { job: prompt(), pooling: Pooling::Mean },
        Command::Serve { id: job().id.pull(), tokens: vec![5], salt: job().salt, to: peer() },
        Command::Serve { id: job().id.pull(), tokens: vec![5], salt: CacheSalt(None), to: peer() },
        guided(Grammar::JsonSchema("{}".into())),
        guided(Grammar::JsonObject),
        guided(Grammar::Regex("a+".into())),
        guided(Grammar::Choice(vec!["a".into(), "b".into()])),
        guided(Grammar::Lark("start: \"a\"".into())),
        Command::Cancel(job().id),
        Command::Cancel(job().id.pull()),
        Command::SendSnapshot,
        Command::SetRole(Role::Prefill),
        Command::SetRole(Role::Decode),
        Command::SetDraining(true),
        Command::SetDraining(false),
    ];
    for command in commands {
        let wire = wire::ToNode::from(command.clone());
        assert_eq!(Command::try_from(wire), Ok(command));
    }
}

#[test]
fn events_survive_the_wire() {
    let id = job().id;
    let logprobs = Logprobs { logprob: -0.5, top: vec![(1, -0.5), (2, -1.0)] };
    let token = TokenEvent {
        id,
        position: 4,
        token: 11,
        logprobs: Some(logprobs.clone()),
        finish: Some(NodeFinish::StopToken(11)),
        prefill: Some(Duration::from_millis(12)),
    };
    let hash = |n| BlockHash([n; 16]);
    let events = [
        NodeEvent::Report(Report { waiting: 1, decode_step_ms: 2.5, ..Report::default() }),
        NodeEvent::Report(Report {
            role: Role::Decode,
            draining: true,
            waiting_blocks: 9,
            kv_transport: "ipc".to_owned(),
            ..Report::default()
        }),
        NodeEvent::Cache { sequence: 1, stored: vec![hash(1), hash(2)], removed: vec![hash(3)] },
        NodeEvent::Snapshot { sequence: 9, hashes: vec![hash(4)], last: true },
        NodeEvent::Started { id, cached_tokens: 3, queued: Duration::from_millis(5) },
        NodeEvent::Tokens(vec![
            TokenEvent { finish: Some(NodeFinish::Length), ..token.clone() },
            TokenEvent { finish: Some(NodeFinish::EndOfSequence), ..token.clone() },
            TokenEvent { finish: None, logprobs: None, prefill: None, ..token.clone() },
            token,
        ]),
        NodeEvent::PromptLogprobs { id, tokens: vec![(8, logprobs)] },
        NodeEvent::Embedded { id, values: vec![0.5, -2.0], prefill: Duration::from_millis(9) },
        NodeEvent::Transferred {
            id,
            hidden: Duration::from_millis(8),
            exposed: Duration::from_millis(1),
            bytes: 1 << 40,
            blocks: 3,
        },
        NodeEvent::Pulled { id, tokens: 32, took: Duration::from_millis(7) },
        NodeEvent::Failed { id: id.pull(), reason: "not cached".into(), retry: Retry::Never },
        NodeEvent::Failed { id, reason: "gone".into(), retry: Retry::OtherNode },
    ];
    for event in events {
        let wire = wire::FromNode::from(event.clone());
        assert_eq!(NodeEvent::try_from(wire), Ok(event));
    }
}

#[test]
fn bad_messages_are_refused_by_name() {
    let mut bad = wire::Job::from(job());
    bad.prompt_tokens = 4;
    let error = Job::try_from(bad).unwrap_err();
    assert_eq!(error.to_string(), "invalid message: job.prompt_tokens is 4 of 3 tokens");
    let cache = wire::CacheEvents { sequence: 1, stored: vec![0; 17], removed: Vec::new() };
    let error = NodeEvent::try_from(wire::FromNode { message: Some(Up::Cache(cache)) });
    assert!(error.unwrap_err().to_string().contains("cache.stored"));
    assert!(NodeEvent::try_from(wire::FromNode { message: None }).is_err());
}

fn introduction(price: f64) -> Hello {
    let geometry =
        KvGeometry { layers: 2, kv_heads: 2, head_dim: 8, dtype: KvDtype::F32, block_tokens: 16 };
    Hello {
        role: Role::Prefill,
        epoch: Epoch(7),
        model: "demo".to_owned(),
        root: ModelRoot::new(&[1; 32], &geometry),
        geometry,
        max_model_len: 64,
        vocab_size: 1000,
        hidden_size: 16,
        total_blocks: 10,
        kv_address: "127.0.0.1:1".to_owned(),
        transports: vec!["quic".to_owned()],
        price,
    }
}

#[test]
fn an_introduction_survives_the_wire_and_its_price_is_checked() {
    let received = |price| Hello::try_from(wire::FromNode::from(introduction(price)));
    for price in [0.5, 1.0, MAX_PRICE] {
        assert_eq!(received(price), Ok(introduction(price)));
    }
    assert_eq!(received(0.0), Ok(introduction(1.0)), "of a node that says nothing");
    for wrong in [-1.0, 2.0 * MAX_PRICE, f64::INFINITY, f64::NAN] {
        let error = received(wrong).unwrap_err().to_string();
        assert!(error.contains("hello.price is"), "{error}");
    }
}

#[test]
fn an_embedding_has_a_size_and_finite_numbers() {
    let received = |values| {
        let embedded = wire::Embedded { id: Some(job().id.into()), values, prefill_ms: 1.0 };
        let message = wire::FromNode { message: Some(Up::Embedded(embedded)) };
        NodeEvent::try_from(message).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(received(vec![1.0; MAX_HIDDEN_SIZE as usize]), Ok(()));
    for (wrong, why) in [
        (Vec::new(), "embedded.values has 0; most are 65536"),
        (vec![1.0; MAX_HIDDEN_SIZE as usize + 1], "embedded.values has 65537; most are 65536"),
        (vec![1.0, f32::NAN], "embedded.values contains NaN"),
    ] {
        assert_eq!(received(wrong), Err(format!("invalid message: {why}")));
    }
    for hidden_size in [0, MAX_HIDDEN_SIZE + 1] {
        let hello = Hello { hidden_size, ..introduction(1.0) };
        let error = Hello::try_from(wire::FromNode::from(hello)).unwrap_err().to_string();
        assert!(error.contains("hello.hidden_size"), "{error}");
    }
}

#[test]
fn only_a_prompt_is_embedded() {
    use wire::to_node::Message as Down;
    let embed = |job: Job, pooling| Down::Embed(wire::Embed { job: Some(job.into()), pooling });
    assert!(refused(embed(job(), 0)).contains("embed.job has output"));
    assert!(refused(embed(prompt(), 2)).contains("embed.pooling is 2"));
}

fn refused(message: wire::to_node::Message) -> String {
    Command::try_from(wire::ToNode { message: Some(message) }).unwrap_err().to_string()
}

#[test]
fn a_pull_is_no_attempt_and_an_attempt_no_pull() {
    use wire::to_node::Message as Down;
    let id = job().id;
    assert!(
        !id.is_pull() && id.pull().is_pull() && id.pull() != id && id.pull().pull() == id.pull()
    );
    assert_eq!(id.pull().to_string(), format!("{id}/pull"));
    let named = |id: TransferId| wire::Job { id: Some(id.into()), ..wire::Job::from(job()) };
    let prefill =
        wire::Prefill { job: Some(named(id.pull())), decode: Some(peer().into()), pull: None };
    assert!(refused(Down::Prefill(prefill)).contains("a pull's, not an attempt's"));
    let serve = wire::Serve {
        id: Some(id.into()),
        tokens: vec![1],
        salt: Vec::new(),
        to: Some(peer().into()),
    };
    assert!(refused(Down::Serve(serve)).contains("an attempt's, not its pull's"));
}

#[test]
fn pulls_fit_their_jobs() {
    use wire::to_node::Message as Down;
    let decode = |tokens: u32, prefill: Option<wire::Peer>| {
        let pull = wire::Pull { from: Some(peer().into()), tokens };
        Down::Decode(wire::Decode { job: Some(job().into()), prefill, pull: Some(pull) })
    };
    assert!(refused(decode(4, None)).contains("pull.tokens is 4 of 3 tokens"));
    assert!(refused(decode(0, None)).contains("pull.tokens is 0 of 3 tokens"));
    assert!(refused(decode(2, Some(peer().into()))).contains("with a prefill node"));
    let set = wire::SetRole { role: "both".to_owned() };
    assert!(refused(Down::SetRole(set)).contains("set_role.role"));
}
