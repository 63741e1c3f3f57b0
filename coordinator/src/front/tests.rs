//! Clients of `baton.v1.Inference`, before a front whose core is played by the test.

use std::sync::Arc;
use std::time::Duration;

use baton_proto::grammar::Grammar;
use baton_proto::ids::RequestId;
use baton_proto::message::{Logprobs, NodeFinish};
use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::inference_client::InferenceClient;
use baton_proto::wire::v1::structured_output::Kind;
use baton_proto::wire::v1::{
    Chat, ChatMessage, Choice as WireChoice, DetokenizeRequest, FinishReason, GenerateRequest,
    GenerateResponse, JsonObject, Sampling, StructuredOutput, TokenIds, TokenizeRequest,
    tokenize_request,
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::fixtures::{MAX_MODEL_LEN, Play, Played, done, output, start, start_with, tokenizer};
use crate::aliases::Alias;
use crate::core::{RequestError, SubmitError, Update};

fn prompt(text: &str) -> GenerateRequest {
    GenerateRequest { input: Some(Input::Prompt(text.into())), ..GenerateRequest::default() }
}

fn tokens(ids: Vec<u32>) -> GenerateRequest {
    let input = Some(Input::TokenIds(TokenIds { ids }));
    GenerateRequest { input, ..GenerateRequest::default() }
}

fn sampled(sampling: Sampling) -> GenerateRequest {
    GenerateRequest { sampling: Some(sampling), ..prompt("Hello") }
}

async fn all(played: &Played, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
    let mut client = InferenceClient::new(played.channel());
    let mut stream = client.generate(request).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

fn text_of(messages: &[GenerateResponse]) -> String {
    messages.iter().map(|message| message.text.as_str()).collect()
}

/// One token per update, the last with `finish`.
fn says(text: &str, finish: Option<NodeFinish>) -> Vec<Update> {
    let ids = tokenizer().encode(text, false).unwrap();
    let last = ids.len() - 1;
    let finish = |i| if i == last { finish } else { None };
    ids.iter().enumerate().map(|(i, &id)| Update::Tokens(vec![output(id, finish(i))])).collect()
}

#[tokio::test]
async fn bad_requests_are_refused_by_field_and_limit() {
    let played = start(|_| panic!("nothing of this reaches the core")).await;
    let with = |change: fn(&mut GenerateRequest)| {
        let mut request = prompt("Hello");
        change(&mut request);
        request
    };
    let no_messages = Chat::default();
    let cases = [
        (GenerateRequest::default(), "one of prompt, token_ids and chat is required"),
        (prompt(""), "prompt is empty"),
        (tokens(vec![]), "token_ids is empty"),
        (tokens(vec![1, 2048]), "2048; it must be ids below the vocabulary size (2048)"),
        (
            tokens(vec![1; 64]),
            "maximum context length is 64 tokens, so a prompt may have 63; this one has 64",
        ),
        (with(|r| r.n = Some(0)), "n is 0; it must be from 1 to 16"),
        (with(|r| r.n = Some(17)), "n is 17; it must be from 1 to 16"),
        (with(|r| r.deadline_ms = Some(0)), "deadline_ms is 0"),
        (with(|r| r.cache_salt = Some("x".repeat(257))), "cache_salt's length is 257"),
        (
            GenerateRequest { input: Some(Input::Chat(no_messages)), ..prompt("") },
            "chat.messages is empty",
        ),
        (
            sampled(Sampling { temperature: Some(2.5), ..Sampling::default() }),
            "temperature is 2.5; it must be from 0 to 2",
        ),
        (
            sampled(Sampling { stop: vec!["x".into(); 17], ..Sampling::default() }),
            "the number of stop strings is 17; it must be at most 16",
        ),
        (
            sampled(Sampling { stop: vec![String::new()], ..Sampling::default() }),
            "a stop string is 0 bytes; it must be from 1 to 256",
        ),
        (
            sampled(Sampling { max_tokens: Some(3), min_tokens: Some(4), ..Sampling::default() }),
            "min_tokens is 4; it must be at most max_tokens (3)",
        ),
    ];
    for (request, message) in cases {
        let status = all(&played, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(message), "{message:?} is not in {status:?}");
        let violations = status.get_details_bad_request().expect("it names a field");
        let field = &violations.field_violations[0].field;
        let name = field.rsplit('.').next().unwrap();
        assert!(status.message().contains(name), "{field}: {status:?}");
    }
    let unknown = GenerateRequest { model: "gpt".into(), ..prompt("Hello") };
    let status = all(&played, unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(status.message(), "model \"gpt\" is not served here; served: demo");
    assert_eq!(status.get_details_resource_info().unwrap().resource_name, "gpt");
    let long = all(&played, tokens(vec![1; 70])).await.unwrap_err();
    let info = long.get_details_error_info().unwrap();
    assert_eq!(info.reason, "CONTEXT_LENGTH_EXCEEDED");
    assert_eq!((&*info.metadata["max"], &*info.metadata["got"]), ("63", "70"));
}

fn structured(kind: Kind) -> GenerateRequest {
    GenerateRequest {
        structured_output: Some(StructuredOutput { kind: Some(kind) }),
        ..prompt("Hello")
    }
}

#[tokio::test]
async fn grammars_are_compiled_before_anything_is_placed() {
    let played = start(|_| panic!("nothing of this reaches the core")).await;
    let ignores = Sampling { ignore_eos: Some(true), ..Sampling::default() };
    let ignores =
        GenerateRequest { sampling: Some(ignores), ..structured(Kind::JsonObject(JsonObject {})) };
    let empty = StructuredOutput { kind: None };
    let cases = [
        (ignores, "ignore_eos is true; it must be false with structured_output"),
        (
            GenerateRequest { structured_output: Some(empty), ..prompt("Hello") },
            "structured_output is empty; it must be one of json_schema",
        ),
        (structured(Kind::JsonSchema("{".into())), "structured_output: the schema is no JSON"),
        (structured(Kind::JsonSchema(r#"{"not": {}}"#.into())), "structured_output: "),
        (structured(Kind::Regex("(".into())), "structured_output: "),
        (structured(Kind::Lark("start: missing".into())), "missing"),
        (structured(Kind::Choice(WireChoice { texts: vec![] })), "a choice of 0"),
        (structured(Kind::Regex("x".repeat(70_000))), "structured_output is 70000 bytes long"),
    ];
    for (request, message) in cases {
        let status = all(&played, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(message), "{message:?} is not in {status:?}");
    }
}

#[tokio::test]
async fn choices_of_a_request_share_its_grammar() {
    let played = start(|_| Play::Accept(says("{}", Some(NodeFinish::EndOfSequence)))).await;
    let schema = r#"{"type": "object"}"#;
    let request = GenerateRequest { n: Some(2), ..structured(Kind::JsonSchema(schema.into())) };
    all(&played, request).await.unwrap();
    let grammars: Vec<_> =
        played.asked().into_iter().map(|asked| asked.sampling.grammar.unwrap()).collect();
    assert_eq!(*grammars[0], Grammar::JsonSchema(schema.into()));
    assert!(Arc::ptr_eq(&grammars[0], &grammars[1]));
}

#[tokio::test]
async fn what_the_request_leaves_open_comes_from_the_checkpoint() {
    let played = start(|_| Play::Accept(says("ok", Some(NodeFinish::Length)))).await;
    all(&played, prompt("Hello there")).await.unwrap();
    let asked = played.asked().remove(0);
    let expected = tokenizer().encode("Hello there", true).unwrap();
    assert_eq!((asked.model.as_str(), &*asked.tokens), ("demo", &*expected));
    let sampling = &asked.sampling;
    assert_eq!(sampling.temperature, 0.0, "the demo checkpoint says not to sample");
    assert_eq!(sampling.eos_token_ids, [2, 0]);
    assert_eq!(sampling.max_tokens, MAX_MODEL_LEN - expected.len() as u32);
    assert_eq!((asked.deadline, asked.salt.0), (None, None));

    let given = Sampling {
        temperature: Some(0.5),
        ignore_eos: Some(true),
        max_tokens: Some(1_000_000),
        seed: Some(u64::MAX),
        logit_bias: [(9, 1.0), (3, -1.0)].into(),
        ..Sampling::default()
    };
    let request = GenerateRequest { n: Some(2), cache_salt: Some("a".into()), ..sampled(given) };
    let messages = all(&played, request).await.unwrap();
    let asked = played.asked();
    let [first, second] = &asked[1..] else { panic!("{asked:?}") };
    assert_eq!((first.sampling.temperature, first.sampling.eos_token_ids.len()), (0.5, 0));
    assert!(first.sampling.max_tokens < MAX_MODEL_LEN, "no more than fits");
    assert_eq!(first.sampling.logit_bias, [(3, -1.0), (9, 1.0)]);
    assert_eq!((first.sampling.seed, second.sampling.seed), (u64::MAX, 0), "seeds follow on");
    assert_ne!(first.id, second.id);
    assert!(first.salt.0.is_some());
    for choice in 0..2 {
        let of: Vec<_> = messages.iter().filter(|m| m.choice == choice).cloned().collect();
        assert_eq!(text_of(&of), "ok");
        assert_eq!(of.iter().filter(|m| m.finished.is_some()).count(), 1);
    }
}

#[tokio::test]
async fn tokens_become_text_and_the_end_tells_all() {
    let said = "Oslo 🚚 is";
    let played = start(move |_| {
        let logprobs = Logprobs { logprob: -0.5, top: vec![(7, -0.5), (8, -1.0)] };
        let mut updates = vec![Update::PromptLogprobs(vec![(11, logprobs.clone())])];
        updates.extend(says(said, None));
        let mut last = output(2, Some(NodeFinish::StopToken(2)));
        last.logprobs = Some(logprobs);
        updates.push(Update::Tokens(vec![last]));
        updates.push(done(Some(NodeFinish::StopToken(2))));
        Play::Accept(updates)
    })
    .await;
    let messages = all(&played, tokens(vec![10, 11])).await.unwrap();
    assert_eq!(text_of(&messages), said);
    let mut ids: Vec<u32> = messages.iter().flat_map(|m| m.token_ids.clone()).collect();
    assert_eq!(ids.pop(), Some(2), "the stop token is given as a token and not as text");
    assert_eq!(ids, tokenizer().encode(said, false).unwrap());
    let prompt: Vec<_> = messages.iter().flat_map(|m| m.prompt_logprobs.clone()).collect();
    assert_eq!(
        prompt.iter().map(|p| (p.token_id, p.top.len())).collect::<Vec<_>>(),
        [(10, 0), (11, 2)]
    );
    let logprobs: Vec<_> = messages.iter().flat_map(|m| m.logprobs.clone()).collect();
    assert_eq!((logprobs.len(), logprobs[0].token_id, logprobs[0].top[1].token_id), (1, 2, 8));

    let finished = messages.last().unwrap().finished.clone().unwrap();
    assert_eq!((finished.reason(), finished.stop_token_id), (FinishReason::Stop, Some(2)));
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens), (2, 1));
    assert_eq!(usage.completion_tokens as usize, ids.len() + 1);
    assert_eq!(finished.timings.unwrap().ttft_ms, 3.0);
    let placement = finished.placement.unwrap();
    assert_eq!((placement.prefill_node.as_str(), placement.decode_node.as_str()), ("p0", "d0"));
}

#[tokio::test]
async fn a_stop_string_ends_the_request_and_is_never_seen() {
    let played = start(|_| Play::UntilStopped(says("The code is 4712. END more", None))).await;
    let stop = vec!["nothing".to_owned(), " END".to_owned()];
    let sampling = Sampling { stop, ..Sampling::default() };
    let messages = all(&played, sampled(sampling)).await.unwrap();
    assert_eq!(text_of(&messages), "The code is 4712.");
    let finished = messages.last().unwrap().finished.clone().unwrap();
    assert_eq!(finished.reason(), FinishReason::Stop);
    assert_eq!(finished.stop_string.as_deref(), Some(" END"));
    let given: usize = messages.iter().map(|message| message.token_ids.len()).sum();
    assert_eq!(finished.usage.unwrap().completion_tokens as usize, given);
    let whole = tokenizer().encode("The code is 4712. END more", false).unwrap().len();
    assert!(given < whole, "tokens after the stop string are not the client's");
}

#[tokio::test]
async fn what_ends_the_output_is_text_if_asked_for() {
    let played = start(|_| Play::UntilStopped(says("The code is 4712. END more", None))).await;
    let sampling = Sampling {
        stop: vec![" END".to_owned()],
        include_stop_string: Some(true),
        ..Sampling::default()
    };
    let messages = all(&played, sampled(sampling)).await.unwrap();
    assert_eq!(text_of(&messages), "The code is 4712. END");

    let end = tokenizer().encode("<|im_end|>", false).unwrap();
    let [end] = end[..] else { panic!("{end:?} is one special token") };
    let script = move |_: &_| {
        let mut updates = says("ok", None);
        updates.push(Update::Tokens(vec![output(end, Some(NodeFinish::StopToken(end)))]));
        Play::Accept(updates)
    };
    let played = start(script).await;
    for (include, skip, text) in [
        (None, None, "ok"),
        (Some(true), None, "ok"),
        (None, Some(false), "ok"),
        (Some(true), Some(false), "ok<|im_end|>"),
    ] {
        let sampling = Sampling {
            include_stop_string: include,
            skip_special_tokens: skip,
            ..Sampling::default()
        };
        let messages = all(&played, sampled(sampling)).await.unwrap();
        assert_eq!(text_of(&messages), text, "{include:?} {skip:?}");
    }
}

#[tokio::test]
async fn min_tokens_delays_stop_strings_too() {
    let text = "END and END";
    let played = start(|_| Play::UntilStopped(says(text, None))).await;
    let count = tokenizer().encode(text, false).unwrap().len() as u32;
    let sampling =
        Sampling { stop: vec!["END".into()], min_tokens: Some(count), ..Sampling::default() };
    let messages = all(&played, sampled(sampling)).await.unwrap();
    assert_eq!(text_of(&messages), "END and ");
}

#[tokio::test]
async fn an_alias_is_served_by_one_of_its_models_which_the_end_names() {
    let alias = Alias {
        name: "chat".to_owned(),
        models: vec!["large".to_owned(), "small".to_owned()],
        prices: vec![1.0, 2.0],
        target_ttft_ms: 100.0,
    };
    let play = |_: &_| Play::Accept(says("ok", Some(NodeFinish::Length)));
    let played = start_with(&["large", "small"], vec![alias], play).await;
    let served = async || {
        let request = GenerateRequest { model: "chat".into(), ..tokens(vec![10, 11]) };
        let last = all(&played, request).await.unwrap().pop().unwrap();
        let model = last.finished.unwrap().model;
        assert_eq!(played.asked().pop().unwrap().model, model);
        model
    };
    assert_eq!(served().await, "large", "the first if none is ready");
    played.set_queue("small", 0.0);
    assert_eq!(served().await, "small");
    played.set_queue("large", 0.0);
    assert_eq!(served().await, "large", "it is cheaper");
    played.set_queue("large", 200.0);
    assert_eq!(served().await, "small", "it is in time");
    let named = GenerateRequest { model: "large".into(), ..prompt("Hello") };
    let last = all(&played, named).await.unwrap().pop().unwrap();
    assert_eq!(last.finished.unwrap().model, "large");
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    let played = start(|_| Play::Silence(says("Hello", None))).await;
    let mut client = InferenceClient::new(played.channel());
    let request = GenerateRequest { n: Some(2), ..prompt("Hello") };
    let mut stream = client.generate(request).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    drop(stream);
    let mut dropped: Vec<RequestId> = vec![played.dropped().await, played.dropped().await];
    let mut asked: Vec<RequestId> = played.asked().iter().map(|request| request.id).collect();
    dropped.sort();
    asked.sort();
    assert_eq!(dropped, asked);
}

#[tokio::test]
async fn the_earlier_deadline_counts() {
    let played = start(|_| Play::Accept(says("ok", Some(NodeFinish::Length)))).await;
    let mut client = InferenceClient::new(played.channel());
    for (own, grpc) in [(60_000, 30_000), (30_000, 60_000)] {
        let inner = GenerateRequest { deadline_ms: Some(own), ..prompt("Hello") };
        let mut request = Request::new(inner);
        request.set_timeout(Duration::from_millis(grpc));
        client.generate(request).await.unwrap().into_inner().message().await.unwrap();
        let deadline = played.asked().pop().unwrap().deadline.unwrap();
        assert!(deadline <= Duration::from_secs(30) && deadline > Duration::from_secs(10));
    }
}

#[tokio::test]
async fn failures_of_the_core_have_their_codes() {
    let refusals = [
        (SubmitError::NoNodes("demo".into()), Code::Unavailable),
        (SubmitError::Overloaded { retry_after: Duration::from_secs(1) }, Code::ResourceExhausted),
        (SubmitError::ShuttingDown, Code::Unavailable),
    ];
    for (refusal, code) in refusals {
        let played = start(move |_| Play::Refuse(refusal.clone())).await;
        let status = all(&played, prompt("Hello")).await.unwrap_err();
        assert_eq!(status.code(), code);
        assert_eq!(status.metadata().get("retry-after-ms").unwrap(), "1000");
        let retry = status.get_details_retry_info().expect("trying again may help");
        assert_eq!(retry.retry_delay, Some(Duration::from_secs(1)));
    }
    let failures = [
        (RequestError::DeadlineExceeded, Code::DeadlineExceeded),
        (RequestError::Cancelled, Code::Cancelled),
        (RequestError::NoNodes { waited: Duration::from_secs(5) }, Code::Unavailable),
        (RequestError::ShuttingDown, Code::Unavailable),
        (RequestError::Exhausted { attempts: 3, reason: "x".into() }, Code::Aborted),
        (RequestError::Rejected("too few blocks".into()), Code::FailedPrecondition),
    ];
    for (failure, code) in failures {
        let played = start(move |_| Play::Accept(vec![Update::Failed(failure.clone())])).await;
        let status = all(&played, prompt("Hello")).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        let again = status.get_details_retry_info().is_some();
        assert_eq!(again, code == Code::Unavailable, "{status:?}");
    }
}

#[tokio::test]
async fn who_lost_its_nodes_is_told_how_far_it_came_and_not_to_come_back() {
    let failures = [
        (RequestError::Exhausted { attempts: 3, reason: "x".into() }, "NODE_LOST"),
        (RequestError::NoNodes { waited: Duration::from_secs(5) }, "NODE_LOST"),
        (RequestError::ShuttingDown, "SHUTTING_DOWN"),
    ];
    for (failure, reason) in failures {
        let played = start(move |_| {
            let mut updates = says("Hello you", None);
            updates.push(Update::Failed(failure.clone()));
            Play::Accept(updates)
        });
        let played = played.await;
        let mut client = InferenceClient::new(played.channel());
        let mut stream = client.generate(prompt("Hello")).await.unwrap().into_inner();
        let mut tokens = 0;
        let status = loop {
            match stream.message().await {
                Ok(message) => tokens += message.expect("a stream that fails").token_ids.len(),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        let info = status.get_details_error_info().unwrap();
        assert_eq!((&*info.reason, &*info.domain), (reason, "baton"));
        assert!(tokens > 0 && info.metadata["tokens_emitted"] == tokens.to_string(), "{info:?}");
        assert!(status.get_details_retry_info().is_none(), "{status:?}");
        assert!(!status.metadata().contains_key("retry-after-ms"), "{status:?}");
    }
}

#[tokio::test]
async fn tokens_are_those_that_generation_computes_with() {
    let played = start(|_| Play::Accept(says("ok", Some(NodeFinish::Length)))).await;
    let mut client = InferenceClient::new(played.channel());
    let messages =
        vec![ChatMessage { role: "user".into(), content: "Hello".into(), ..Default::default() }];
    let chat = Chat { messages, ..Chat::default() };
    let inputs = [
        (tokenize_request::Input::Prompt("Hello".into()), Input::Prompt("Hello".into())),
        (tokenize_request::Input::Chat(chat.clone()), Input::Chat(chat)),
    ];
    for (asked, generated) in inputs {
        let request = TokenizeRequest { input: Some(asked), ..TokenizeRequest::default() };
        let told = client.tokenize(request).await.unwrap().into_inner();
        assert_eq!((told.model.as_str(), told.max_model_len), ("demo", MAX_MODEL_LEN));
        all(&played, GenerateRequest { input: Some(generated), ..prompt("") }).await.unwrap();
        assert_eq!(told.token_ids, &*played.asked().last().unwrap().tokens);
        for skip in [None, Some(false)] {
            let token_ids = told.token_ids.clone();
            let request =
                DetokenizeRequest { token_ids, skip_special_tokens: skip, ..Default::default() };
            let text = client.detokenize(request).await.unwrap().into_inner().text;
            assert!(text.contains("Hello"), "{text:?}");
            let again = tokenizer().encode(&text, false).unwrap();
            assert_eq!(again == told.token_ids, skip == Some(false) || !text.contains('\n'));
        }
    }
    let empty = client.tokenize(TokenizeRequest::default()).await.unwrap_err();
    assert_eq!(empty.get_details_bad_request().unwrap().field_violations[0].field, "prompt");
    let request = DetokenizeRequest { token_ids: vec![2048], ..Default::default() };
    assert_eq!(client.detokenize(request).await.unwrap_err().code(), Code::InvalidArgument);
}
