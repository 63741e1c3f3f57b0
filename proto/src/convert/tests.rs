//! Messages survive the wire, and bad ones are refused by name.

use std::time::Duration;

use super::*;
use crate::hash::CacheSalt;
use crate::message::{Command, Job, Logprobs, NodeEvent, NodeFinish, Report, Retry, TokenEvent};
use crate::sampling::SamplingParams;
use crate::wire::node::from_node::Message as Up;

fn job() -> Job {
    Job {
        id: TransferId { request: RequestId(1 << 100), attempt: 3 },
        tokens: vec![5, 6, 7],
        prompt_tokens: 2,
        sampling: SamplingParams {
            logit_bias: vec![(3, -1.5)],
            logprobs: Some(2),
            eos_token_ids: vec![9],
            ..SamplingParams::default()
        },
        salt: CacheSalt::from_text("tenant"),
        deadline: Some(Duration::from_millis(1500)),
    }
}

fn peer() -> Peer {
    let node = "decode-0".parse().unwrap();
    Peer { node, epoch: Epoch(7), kv_address: "127.0.0.1:1".into() }
}

#[test]
fn commands_survive_the_wire() {
    let commands = [
        Command::Prefill { job: job(), decode: peer() },
        Command::Decode { job: job(), prefill: Some(peer()) },
        Command::Decode { job: Job { deadline: None, ..job() }, prefill: None },
        Command::Cancel(job().id),
        Command::SendSnapshot,
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
        NodeEvent::Transferred {
            id,
            hidden: Duration::from_millis(8),
            exposed: Duration::from_millis(1),
            bytes: 1 << 40,
            blocks: 3,
        },
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
