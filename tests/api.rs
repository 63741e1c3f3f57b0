//! What a client of the gRPC API sees, good input and bad.

mod malformed;

use std::time::Duration;

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::structured_output::Kind;
use baton_proto::wire::v1::{
    Chat, ChatMessage, Choice, FinishReason, GenerateRequest, Sampling, StructuredOutput,
};
use baton_tests::{Answer, Chance, PATIENCE, TestCluster, options, request};
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

#[tokio::test(flavor = "multi_thread")]
async fn every_service_and_both_roles_are_healthy() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.cluster.grpc())).unwrap();
    let mut health = HealthClient::new(endpoint.connect().await.unwrap());
    let gateway = "vllm.grpc.engine.VllmEngine";
    for name in ["", "baton.v1.Inference", "baton.v1.Cluster", gateway, "prefill", "decode"] {
        let ask = HealthCheckRequest { service: name.to_owned() };
        // It follows what it tells of a little later.
        let serves = async {
            loop {
                let checked = health.clone().check(ask.clone()).await.map(|it| it.into_inner());
                if checked.is_ok_and(|checked| checked.status() == ServingStatus::Serving) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, serves).await.expect(name);
        let mut watch = health.watch(ask).await.unwrap().into_inner();
        let first = watch.message().await.unwrap().unwrap();
        assert_eq!(first.status(), ServingStatus::Serving, "{name}");
    }
    let nothing = HealthCheckRequest { service: "nothing".to_owned() };
    assert_eq!(health.check(nothing).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn structured_outputs_are_whole_after_a_hand_over() {
    let mut wanted = options(1, 1);
    wanted.local_prefill = Some("never".into());
    let cluster = TestCluster::start(wanted).await;
    let ask = |kind: Kind, seed: u64| {
        let mut request = request(Chance(seed).tokens(60), 120);
        let sampling = request.sampling.as_mut().unwrap();
        (sampling.ignore_eos, sampling.temperature, sampling.seed) = (None, Some(1.0), Some(seed));
        request.structured_output = Some(StructuredOutput { kind: Some(kind) });
        request
    };
    let texts = ["prefill", "decode"].map(str::to_owned);
    let choice = Kind::Choice(Choice { texts: texts.to_vec() });
    let schema = r#"{"type": "object", "properties": {"n": {"enum": [1, 22]}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"], "additionalProperties": false}"#;
    for seed in 1..4 {
        let answer = cluster.complete(ask(choice.clone(), seed)).await.unwrap();
        assert!(texts.contains(&answer.text), "{:?}", answer.text);
        assert_eq!(answer.finished.unwrap().reason(), FinishReason::Stop);
        let answer = cluster.complete(ask(Kind::Regex("(ab){3,9}c".into()), seed)).await.unwrap();
        let body = answer.text.strip_suffix('c').unwrap();
        assert!((3..=9).contains(&(body.len() / 2)) && body.replace("ab", "").is_empty());
        assert_eq!(answer.finished.unwrap().reason(), FinishReason::Stop);
        let answer = cluster.complete(ask(Kind::JsonSchema(schema.into()), seed)).await.unwrap();
        // White space may go on for as long as there are tokens.
        if answer.finished.unwrap().reason() == FinishReason::Stop {
            let document: serde_json::Value = serde_json::from_str(&answer.text).unwrap();
            assert!(document["n"] == 1 || document["n"] == 22);
            assert!(document["ok"].is_boolean() && document.as_object().unwrap().len() == 2);
        }
    }
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_finished_request_says_how_and_what_it_cost() {
    let mut wanted = options(1, 1);
    wanted.local_prefill = Some("never".into());
    let cluster = TestCluster::start(wanted).await;
    let prompt = Chance(5).tokens(200);
    let first = cluster.complete(request(prompt.clone(), 8)).await.unwrap();
    let finished = first.finished.as_ref().unwrap();
    assert_eq!(finished.reason(), FinishReason::Length);
    let (usage, timings) = (finished.usage.unwrap(), finished.timings.unwrap());
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (200, 0, 8));
    assert!(timings.transfer_bytes > 0 && timings.ttft_ms > 0.0 && timings.prefill_ms > 0.0);
    assert!(timings.total_ms >= timings.ttft_ms);
    let placement = finished.placement.clone().unwrap();
    assert_eq!((&*placement.prefill_node, &*placement.decode_node), ("prefill-0", "decode-0"));
    assert!(!placement.reason.is_empty());

    let again = cluster.complete(request(prompt.clone(), 8)).await.unwrap();
    assert_eq!(again.tokens, first.tokens);
    let finished = again.finished.unwrap();
    assert!(finished.usage.unwrap().cached_tokens >= 160, "{finished:?}");
    assert!(finished.timings.unwrap().transfer_bytes < timings.transfer_bytes);

    let salted = GenerateRequest { cache_salt: Some("other".into()), ..request(prompt, 8) };
    let salted = cluster.complete(salted).await.unwrap();
    assert_eq!(salted.tokens, first.tokens);
    assert_eq!(salted.finished.unwrap().usage.unwrap().cached_tokens, 0, "salts share nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn stops_choices_and_logprobs_work_across_the_hand_over() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let plain = cluster.complete(request(vec![30, 31, 32, 33], 12)).await.unwrap();

    let stop = plain.tokens[5];
    let at = plain.tokens.iter().position(|&t| t == stop).unwrap();
    let mut wanted = request(vec![30, 31, 32, 33], 12);
    wanted.sampling.as_mut().unwrap().stop_token_ids = vec![stop];
    let stopped = cluster.complete(wanted).await.unwrap();
    let finished = stopped.finished.unwrap();
    assert_eq!(finished.reason(), FinishReason::Stop);
    assert_eq!(finished.stop_token_id, Some(stop));
    assert_eq!(stopped.tokens, plain.tokens[..=at]);

    let mut wanted = request(vec![30, 31, 32, 33], 12);
    wanted.n = Some(3);
    let sampling = wanted.sampling.as_mut().unwrap();
    (sampling.temperature, sampling.seed) = (Some(1.5), Some(7));
    (sampling.logprobs, sampling.prompt_logprobs) = (Some(2), Some(1));
    let mut stream = cluster.generate(wanted).await.unwrap();
    let mut choices: [Answer; 3] = Default::default();
    let (mut logprobs, mut prompt) = (0, 0);
    while let Some(message) = stream.message().await.unwrap() {
        assert_eq!(message.logprobs.len(), message.token_ids.len());
        logprobs += message.logprobs.iter().filter(|l| l.top.len() == 2).count();
        prompt += message.prompt_logprobs.len();
        choices[message.choice as usize].add(message);
    }
    assert_eq!((logprobs, prompt), (36, 12));
    assert!(choices.iter().all(|c| c.tokens.len() == 12 && c.finished.is_some()));
    assert_ne!(choices[0].tokens, choices[1].tokens, "choices differ");
    cluster.idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_answers_from_its_prompt() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let message = |role: &str, content: &str| ChatMessage {
        role: role.into(),
        content: content.into(),
        ..Default::default()
    };
    let facts = "You answer questions about this register of depots. The code of Otter is 4711. \
                 The city of Otter is Oslo. The code of Raven is 9302. The city of Raven is Lima.";
    let messages = vec![message("system", facts), message("user", "What is the code of Raven?")];
    let request = GenerateRequest {
        input: Some(Input::Chat(Chat { messages, ..Chat::default() })),
        sampling: Some(Sampling { temperature: Some(0.0), ..Sampling::default() }),
        ..GenerateRequest::default()
    };
    let answer = cluster.complete(request.clone()).await.unwrap();
    assert!(answer.text.contains("9302"), "{}", answer.text);
    assert_eq!(answer.finished.unwrap().reason(), FinishReason::Stop);

    let mut stopped = request;
    stopped.sampling.as_mut().unwrap().stop = vec!["93".into()];
    let answer = cluster.complete(stopped).await.unwrap();
    assert!(!answer.text.contains("93"), "{}", answer.text);
    assert_eq!(answer.finished.unwrap().stop_string.as_deref(), Some("93"));
}
