//! Requests of the gRPC API that are wrong in one field each: the answer names it, and the next one is served.

use baton_proto::wire::v1::generate_request::Input;
use baton_proto::wire::v1::structured_output::Kind;
use baton_proto::wire::v1::{
    Chat, ChatMessage, Choice, DetokenizeRequest, EmbedInput, EmbedRequest, GenerateRequest,
    Sampling, StructuredOutput, TokenIds, TokenizeRequest, embed_input, tokenize_request,
};
use baton_tests::{TestCluster, options, request};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A field, how to set it, and values that it must not have.
type Wrong<V> = (&'static str, fn(&mut GenerateRequest, V), &'static [V]);

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;
const MAX: u32 = u32::MAX;
/// No id of the bundled model's vocabulary.
const NO_ID: u32 = 1 << 30;

const FLOATS: [Wrong<f32>; 7] = [
    ("temperature", |r, x| s(r).temperature = Some(x), &[-1.0, -0.1, 2.1, 1e30, NAN, INF, -INF]),
    ("top_p", |r, x| s(r).top_p = Some(x), &[0.0, -0.5, 1.01, 2.0, 1e30, NAN, INF]),
    ("min_p", |r, x| s(r).min_p = Some(x), &[-0.1, 1.1, 2.0, NAN, INF]),
    ("repetition_penalty", |r, x| s(r).repetition_penalty = Some(x), &[0.0, -1.0, NAN, INF, -INF]),
    ("presence_penalty", |r, x| s(r).presence_penalty = Some(x), &[-2.1, 2.1, 100.0, NAN, INF]),
    ("frequency_penalty", |r, x| s(r).frequency_penalty = Some(x), &[-2.1, 2.1, NAN, INF, -INF]),
    ("logit_bias", |r, x| s(r).logit_bias = [(1, x)].into(), &[100.1, -100.1, 1e30, NAN, INF]),
];

const NUMBERS: [Wrong<u32>; 19] = [
    ("max_tokens", |r, n| s(r).max_tokens = Some(n), &[0]),
    ("min_tokens", |r, n| s(r).min_tokens = Some(n), &[5, 6, 100, MAX]),
    ("logprobs", |r, n| s(r).logprobs = Some(n), &[21, 22, 100, MAX]),
    ("prompt_logprobs", |r, n| s(r).prompt_logprobs = Some(n), &[21, 22, 100, MAX]),
    ("logit_bias", |r, id| s(r).logit_bias = [(id, 1.0)].into(), &[NO_ID, MAX]),
    ("logit_bias", |r, n| s(r).logit_bias = (0..n).map(|id| (id, 1.0)).collect(), &[1025, 5000]),
    ("stop_token_ids", |r, id| s(r).stop_token_ids = vec![20, id], &[NO_ID, MAX]),
    ("stop_token_ids", |r, n| s(r).stop_token_ids = vec![20; n as usize], &[65, 66, 10_000]),
    ("stop", |r, n| s(r).stop = vec!["x".into(); n as usize], &[17, 18, 1000]),
    ("stop", |r, n| s(r).stop = vec!["x".repeat(n as usize)], &[0, 257, 10_000]),
    ("n", |r, n| r.n = Some(n), &[0, 17, 18, 1000, MAX]),
    ("deadline_ms", |r, ms| r.deadline_ms = Some(ms), &[0]),
    ("tenant", |r, n| r.tenant = "x".repeat(n as usize), &[257, 10_000]),
    ("cache_salt", |r, n| r.cache_salt = Some("x".repeat(n as usize)), &[257, 10_000]),
    ("request_id", |r, n| r.request_id = "x".repeat(n as usize), &[257, 10_000]),
    ("token_ids", |r, id| r.input = ids(vec![1, id]), &[NO_ID, MAX]),
    ("token_ids", |r, n| r.input = ids(vec![20; n as usize]), &[0]),
    ("prompt", |r, n| r.input = ids(vec![20; n as usize]), &[5000, 100_000]),
    ("prompt", |r, n| r.input = Some(Input::Prompt("word ".repeat(n as usize))), &[0, 20_000]),
];

const TEXTS: [Wrong<&str>; 8] = [
    ("priority", |r, name| r.priority = name.into(), &["high", "BATCH", "batch ", " ", "0"]),
    ("model", |r, name| r.model = name.into(), &["gpt", " ", "Demo", "demo ", "demo/../x", "\0"]),
    ("tools", |r, text| chat(r).tools = Some(text.into()), &["{", "1", "[1]", "[{}]"]),
    ("template_kwargs", |r, t| chat(r).template_kwargs = Some(t.into()), &["{", "1", "[]"]),
    ("tool_calls", |r, t| chat(r).messages[0].tool_calls = Some(t.into()), &["{", "1", "[{}]"]),
    ("structured_output", |r, t| follow(r, Kind::JsonSchema(t.into())), &["{", "1", "[]", "null"]),
    ("structured_output", |r, t| follow(r, Kind::Regex(t.into())), &["(", "[", "*"]),
    ("structured_output", |r, t| follow(r, Kind::Lark(t.into())), &["", "start: nothing", "start"]),
];

const OTHERS: [Wrong<()>; 6] = [
    ("prompt", |r, ()| r.input = None, &[()]),
    ("messages", |r, ()| chat(r).messages.clear(), &[()]),
    ("structured_output", |r, ()| r.structured_output = Some(StructuredOutput::default()), &[()]),
    ("structured_output", |r, ()| follow(r, Kind::Choice(Choice::default())), &[()]),
    (
        "ignore_eos",
        |r, ()| {
            follow(r, Kind::Regex("a".into()));
            s(r).ignore_eos = Some(true);
        },
        &[()],
    ),
    (
        "add_generation_prompt",
        |r, ()| {
            let chat = chat(r);
            (chat.add_generation_prompt, chat.continue_final_message) = (Some(true), Some(true));
        },
        &[()],
    ),
];

fn s(request: &mut GenerateRequest) -> &mut Sampling {
    request.sampling.get_or_insert_default()
}

fn ids(ids: Vec<u32>) -> Option<Input> {
    Some(Input::TokenIds(TokenIds { ids }))
}

/// Makes it a request with a conversation of one message.
fn chat(request: &mut GenerateRequest) -> &mut Chat {
    let message = ChatMessage { role: "user".into(), ..ChatMessage::default() };
    request.input = Some(Input::Chat(Chat { messages: vec![message], ..Chat::default() }));
    let Some(Input::Chat(chat)) = &mut request.input else { unreachable!("it was made one") };
    chat
}

fn follow(request: &mut GenerateRequest, kind: Kind) {
    s(request).ignore_eos = None;
    request.structured_output = Some(StructuredOutput { kind: Some(kind) });
}

/// Requests, each with the field that is wrong in it.
fn each<V: Copy>(table: &[Wrong<V>]) -> Vec<(&'static str, GenerateRequest)> {
    let mut wrong = Vec::new();
    for &(field, set, values) in table {
        for &value in values {
            let mut request = request(vec![20, 21, 22], 4);
            set(&mut request, value);
            wrong.push((field, request));
        }
    }
    wrong
}

/// The answer has the code for this field, and details that name it; so does the message, for people.
fn assert_names(field: &str, error: &Status, request: &dyn std::fmt::Debug) {
    let shown: String = format!("{request:?}").chars().take(300).collect();
    let expected = if field == "model" { Code::NotFound } else { Code::InvalidArgument };
    assert_eq!(error.code(), expected, "{field}: {error:?} for {shown}");
    let details = error.get_error_details();
    let violations = details.bad_request().into_iter().flat_map(|bad| &bad.field_violations);
    let mut named: Vec<_> = violations.map(|violation| violation.field.as_str()).collect();
    named.extend(details.resource_info().map(|resource| resource.resource_type.as_str()));
    assert!(named.iter().any(|name| name.contains(field)), "{named:?}, not {field}, for {shown}");
    assert!(!error.message().is_empty());
}

async fn assert_serves(cluster: &TestCluster) {
    assert_eq!(cluster.complete(request(vec![20], 4)).await.unwrap().tokens.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_wrong_generations_are_refused_by_field_and_disturb_nothing() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let tables = [each(&FLOATS), each(&NUMBERS), each(&TEXTS), each(&OTHERS)];
    assert!(tables.iter().flatten().count() >= 100);
    for table in tables {
        for (field, request) in table {
            let error = cluster.complete(request.clone()).await.expect_err(field);
            assert_names(field, &error, &request);
        }
        assert_serves(&cluster).await;
    }
    cluster.idle().await;
}

fn embedding(text: &str) -> EmbedRequest {
    let input = Some(embed_input::Input::Text(text.into()));
    EmbedRequest { inputs: vec![EmbedInput { input }], ..EmbedRequest::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_embeddings_and_texts_are_refused_by_field() {
    let cluster = TestCluster::start(options(0, 1)).await;
    let mut client = cluster.inference();
    let of_ids = |ids| {
        let input = Some(embed_input::Input::TokenIds(TokenIds { ids }));
        EmbedRequest { inputs: vec![EmbedInput { input }], ..EmbedRequest::default() }
    };
    let long = || "x".repeat(257);
    for (field, wrong) in [
        ("inputs", EmbedRequest::default()),
        ("inputs", EmbedRequest { inputs: vec![EmbedInput::default()], ..Default::default() }),
        (
            "inputs",
            EmbedRequest { inputs: vec![EmbedInput::default(); 2049], ..Default::default() },
        ),
        ("inputs[0]", embedding("")),
        ("inputs[0]", of_ids(Vec::new())),
        ("inputs[0]", of_ids(vec![5, NO_ID])),
        ("prompt", of_ids(vec![20; 5000])),
        ("prompt", embedding(&"word ".repeat(20_000))),
        ("pooling", EmbedRequest { pooling: 3, ..embedding("a") }),
        ("pooling", EmbedRequest { pooling: -1, ..embedding("a") }),
        ("deadline_ms", EmbedRequest { deadline_ms: Some(0), ..embedding("a") }),
        ("priority", EmbedRequest { priority: "high".into(), ..embedding("a") }),
        ("tenant", EmbedRequest { tenant: long(), ..embedding("a") }),
        ("cache_salt", EmbedRequest { cache_salt: Some(long()), ..embedding("a") }),
        ("model", EmbedRequest { model: "gpt".into(), ..embedding("a") }),
    ] {
        assert_names(field, &client.embed(wrong.clone()).await.unwrap_err(), &wrong);
    }
    let vectors = client.embed(embedding("a")).await.unwrap().into_inner().embeddings;
    assert_eq!(vectors.len(), 1);
    assert!(!vectors[0].values.is_empty());

    let prompt = |text: &str| Some(tokenize_request::Input::Prompt(text.into()));
    for (field, model, input) in [
        ("prompt", "", None),
        ("prompt", "", prompt("")),
        ("messages", "", Some(tokenize_request::Input::Chat(Chat::default()))),
        ("model", "gpt", prompt("a")),
    ] {
        let wrong = TokenizeRequest { model: model.into(), input };
        assert_names(field, &client.tokenize(wrong.clone()).await.unwrap_err(), &wrong);
    }
    let token_ids = vec![20, NO_ID];
    let wrong = DetokenizeRequest { token_ids, ..DetokenizeRequest::default() };
    assert_names("token_ids", &client.detokenize(wrong.clone()).await.unwrap_err(), &wrong);
    assert_serves(&cluster).await;
}
