//! Both APIs' embeddings, with a core that is played by the test.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use baton_proto::embedding::Pooling;
use baton_proto::wire::v1;
use baton_proto::wire::v1::embed_input::Input;
use baton_proto::wire::v1::inference_client::InferenceClient;
use baton_proto::wire::v1::{EmbedInput, EmbedRequest, TokenIds};
use metrics_exporter_prometheus::PrometheusBuilder;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;

use super::embed::MAX_INPUTS;
use super::fixtures::{MAX_MODEL_LEN, Play, start, start_with, tokenizer};
use super::openai::tests::{post, send};
use crate::aliases::Alias;
use crate::core::{NewRequest, RequestError, SubmitError, Update};

const PATH: &str = "/v1/embeddings";
/// Longer than anything here takes.
const WAIT: Duration = Duration::from_secs(60);

/// The embedding of a prompt is 3 and 4 times its first token.
fn play(request: &NewRequest) -> Play {
    let first = request.tokens[0] as f32;
    Play::Accept(vec![Update::Embedding(vec![3.0 * first, 4.0 * first])])
}

fn ids(ids: &[u32]) -> EmbedInput {
    EmbedInput { input: Some(Input::TokenIds(TokenIds { ids: ids.to_vec() })) }
}

fn text(text: &str) -> EmbedInput {
    EmbedInput { input: Some(Input::Text(text.to_owned())) }
}

#[tokio::test]
async fn each_input_is_a_request_and_has_its_vector_in_its_place() {
    let played = start(play).await;
    let mut client = InferenceClient::new(played.channel());
    // More than are placed at a time.
    let inputs: Vec<_> = (1..=70).map(|n| ids(&[n, 5])).chain([text("Hello")]).collect();
    let request = EmbedRequest { inputs, normalize: Some(false), ..EmbedRequest::default() };
    let response = client.embed(request).await.unwrap().into_inner();
    let hello = tokenizer().encode("Hello", true).unwrap();
    let firsts = (1..=70).chain([hello[0]]).map(|first| first as f32);
    let expected: Vec<_> = firsts.map(|first| vec![3.0 * first, 4.0 * first]).collect();
    let values: Vec<_> = response.embeddings.iter().map(|e| e.values.clone()).collect();
    assert_eq!(values, expected);
    let usage = response.usage.unwrap();
    assert_eq!(
        (usage.prompt_tokens, usage.completion_tokens),
        (2 * 71, 0),
        "2 are played for each"
    );
    let asked = played.asked();
    assert!(asked.iter().all(|request| request.embed == Some(Pooling::Last)));
    let named: Vec<_> = asked.iter().map(|request| request.id.to_string()).collect();
    assert!(response.embeddings.iter().all(|e| named.contains(&e.request_id)));
    assert!(asked.iter().any(|request| *request.tokens == hello[..]), "as the model wants a text");
}

#[tokio::test]
async fn vectors_are_as_long_as_one_unless_told_otherwise() {
    let played = start(play).await;
    let mut client = InferenceClient::new(played.channel());
    let pooling = v1::Pooling::Mean.into();
    let request = EmbedRequest { inputs: vec![ids(&[7])], pooling, ..EmbedRequest::default() };
    let response = client.embed(request).await.unwrap().into_inner();
    assert_eq!(response.embeddings[0].values, [0.6, 0.8]);
    assert_eq!(played.asked()[0].embed, Some(Pooling::Mean));
}

#[tokio::test]
async fn what_is_wrong_is_named_and_nothing_is_begun() {
    let played = start(play).await;
    let mut client = InferenceClient::new(played.channel());
    let with = |inputs: Vec<EmbedInput>| EmbedRequest { inputs, ..EmbedRequest::default() };
    let long = vec![5; MAX_MODEL_LEN as usize];
    for (request, what) in [
        (with(Vec::new()), "there are 0 inputs; there must be from 1 to 2048"),
        (
            with(vec![ids(&[1]); MAX_INPUTS + 1]),
            "there are 2049 inputs; there must be from 1 to 2048",
        ),
        // 4 Mi numbers, in vectors of 4096.
        (with(vec![ids(&[1]); 1025]), "there are 1025 inputs; there must be at most 1024"),
        (with(vec![ids(&[1]), EmbedInput::default()]), "input 1 is empty"),
        (with(vec![ids(&[])]), "input 0 is empty"),
        (with(vec![text("")]), "input 0 is empty"),
        (
            with(vec![ids(&[2048])]),
            "an id in input 0 is 2048; it must be below the vocabulary size",
        ),
        (with(vec![ids(&long)]), "this model's maximum context length is"),
        (EmbedRequest { pooling: 9, ..with(vec![ids(&[1])]) }, "pooling is 9"),
        (EmbedRequest { deadline_ms: Some(0), ..with(vec![ids(&[1])]) }, "deadline_ms is 0"),
        (EmbedRequest { priority: "x".into(), ..with(vec![ids(&[1])]) }, "priority is \"x\""),
    ] {
        let status = client.embed(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(what), "{}", status.message());
    }
    let unknown = EmbedRequest { model: "gpt-17".into(), ..with(vec![ids(&[1])]) };
    assert_eq!(client.embed(unknown).await.unwrap_err().code(), Code::NotFound);
    assert!(played.asked().is_empty());
}

#[tokio::test]
async fn one_that_fails_or_is_refused_fails_all_and_stops_the_others() {
    for refused in [false, true] {
        let asked = AtomicUsize::new(0);
        let played = start(move |_| match (asked.fetch_add(1, Ordering::Relaxed), refused) {
            (2, false) => Play::Accept(vec![Update::Failed(RequestError::Rejected("no".into()))]),
            (2, true) => Play::Refuse(SubmitError::ShuttingDown),
            _ => Play::Silence(Vec::new()),
        })
        .await;
        let mut client = InferenceClient::new(played.channel());
        let inputs = vec![ids(&[1]), ids(&[2]), ids(&[3])];
        let failed = client.embed(EmbedRequest { inputs, ..EmbedRequest::default() }).await;
        let code = if refused { Code::Unavailable } else { Code::FailedPrecondition };
        assert_eq!(failed.unwrap_err().code(), code);
        let stopped = [played.dropped().await, played.dropped().await];
        assert_ne!(stopped[0], stopped[1], "two others ran");
    }
}

#[tokio::test]
async fn a_client_that_leaves_stops_all() {
    let played = start(|_| Play::Silence(Vec::new())).await;
    let mut client = InferenceClient::new(played.channel());
    let inputs = vec![ids(&[1]), ids(&[2])];
    let call = tokio::spawn(async move {
        client.embed(EmbedRequest { inputs, ..EmbedRequest::default() }).await
    });
    played.asked_for(2).await;
    call.abort();
    let stopped = [played.dropped().await, played.dropped().await];
    assert_ne!(stopped[0], stopped[1]);
}

#[tokio::test]
async fn http_answers_with_numbers_or_with_their_bytes() {
    let played = start(play).await;
    let answer = post(&played, PATH, &json!({"model": "demo", "input": [[7], [9, 1]]})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body = answer.json();
    assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!("demo")));
    assert_eq!(body["usage"]["prompt_tokens"], 4);
    assert_eq!(body["usage"]["total_tokens"], 4);
    for index in [0, 1] {
        let item = &body["data"][index];
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(index)));
        let values: Vec<f32> = serde_json::from_value(item["embedding"].clone()).unwrap();
        assert_eq!(values, [0.6, 0.8]);
    }
    assert!(answer.body.contains("\"embedding\":[0.6,0.8]"), "no more digits than there are");
    let ask = json!({"input": [7], "encoding_format": "base64", "normalize": false});
    let body = post(&played, PATH, &ask).await.json();
    let bytes = STANDARD.decode(body["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let values = bytes.as_chunks().0.iter().copied().map(f32::from_le_bytes);
    assert_eq!(values.collect::<Vec<_>>(), [21.0, 28.0]);
}

#[tokio::test]
async fn http_names_its_own_parameter() {
    let played = start(play).await;
    let long = vec![5; MAX_MODEL_LEN as usize];
    for (body, status, code, param) in [
        (json!({"input": [5000]}), 400, "invalid_value", json!("input[0]")),
        (json!({"input": vec!["a"; 1025]}), 400, "invalid_value", json!("input")),
        (json!({"input": long}), 400, "context_length_exceeded", json!("input")),
        (json!({"input": "a", "dimensions": 3}), 400, "unsupported_parameter", json!("dimensions")),
        (json!({"input": "a", "model": "x"}), 404, "model_not_found", json!("model")),
    ] {
        let answer = post(&played, PATH, &body).await;
        let error = &answer.json()["error"];
        let given = (answer.status, &error["code"], &error["param"]);
        assert_eq!(given, (status, &json!(code), &param), "{}", answer.body);
    }
    assert!(played.asked().is_empty());
}

#[tokio::test]
async fn several_models_behind_one_name_would_mix_their_vectors() {
    let alias = |name: &str, models: &[&str]| {
        let models = models.iter().map(|model| String::from(*model)).collect();
        Alias { name: name.to_owned(), prices: vec![1.0; 2], models, target_ttft_ms: 100.0 }
    };
    let aliases = vec![alias("two", &["a", "b"]), alias("one", &["b"])];
    let played = start_with(&["a", "b"], aliases, play).await;
    let mut client = InferenceClient::new(played.channel());
    let mut ask = async |model: &str| {
        let model = model.to_owned();
        client.embed(EmbedRequest { model, inputs: vec![ids(&[1])], ..Default::default() }).await
    };
    let refused = ask("two").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("several models (a, b)"), "{refused:?}");
    assert!(played.asked().is_empty());
    assert_eq!(ask("one").await.unwrap().into_inner().model, "b");
}

#[tokio::test]
async fn one_that_is_sent_again_is_not_computed_twice_at_a_time() {
    let played = start(|_| Play::Silence(Vec::new())).await;
    let body = json!({"input": [[7], [9]]}).to_string();
    let length = body.len();
    let request = format!(
        "POST {PATH} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nx-request-id: e-1\r\nidempotency-key: e-1\r\n\r\n{body}"
    );
    let mut first = TcpStream::connect(played.http).await.unwrap();
    first.write_all(request.as_bytes()).await.unwrap();
    played.asked_for(2).await;
    let again = send(&played, &request).await;
    assert_eq!((again.status, &again.json()["error"]["code"]), (409, &json!("duplicate_request")));
    assert_eq!(played.asked().len(), 2);
    drop(first);
    let stopped = [played.dropped().await, played.dropped().await];
    assert_ne!(stopped[0], stopped[1]);
}

/// The first try of the 40th input is refused, when others have their vectors.
fn refuses_once(wait: Duration) -> impl Fn(&NewRequest) -> Play + Send + 'static {
    let refused = AtomicBool::new(false);
    move |request| match request.tokens[0] == 40 && !refused.swap(true, Ordering::Relaxed) {
        true => Play::Refuse(SubmitError::Overloaded { retry_after: wait }),
        false => play(request),
    }
}

#[tokio::test]
async fn a_cluster_that_is_full_for_a_moment_does_not_cost_what_is_done() {
    let played = start(refuses_once(Duration::from_millis(1))).await;
    let mut client = InferenceClient::new(played.channel());
    let inputs: Vec<_> = (1..=70).map(|n| ids(&[n])).collect();
    let response = client.embed(EmbedRequest { inputs, ..Default::default() }).await.unwrap();
    assert!(response.into_inner().embeddings.iter().all(|each| each.values == [0.6, 0.8]));
    assert_eq!(played.asked().len(), 71);
}

#[tokio::test]
async fn who_would_wait_in_vain_does_not() {
    let hour = Duration::from_secs(3600);
    let all: Vec<_> = (1..=70).map(|n| ids(&[n])).collect();
    // Of the first nothing is done before it; the second has no time.
    for (inputs, deadline_ms) in [(vec![ids(&[40])], None), (all, Some(60_000))] {
        let played = start(refuses_once(hour)).await;
        let mut client = InferenceClient::new(played.channel());
        let asking = client.embed(EmbedRequest { inputs, deadline_ms, ..Default::default() });
        let refused = timeout(WAIT, asking).await.expect("at once").unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    }
}

#[test]
fn what_is_refused_later_is_counted_too() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let shown = recorder.handle();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let played = start(|_| Play::Refuse(SubmitError::NoNodes("demo".into()))).await;
            let mut client = InferenceClient::new(played.channel());
            let asking = EmbedRequest { inputs: vec![ids(&[1])], ..Default::default() };
            client.embed(asking).await.unwrap_err();
        });
    });
    let line = "baton_refused_requests_total{code=\"Unavailable\"} 1";
    assert!(shown.render().contains(line), "{}", shown.render());
}
