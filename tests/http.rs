//! The HTTP API of a real cluster says what the gRPC API says.

use baton_proto::wire::v1::GenerateRequest;
use baton_proto::wire::v1::generate_request::Input;
use baton_tests::{TestCluster, options, request};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn send(cluster: &TestCluster, path: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(cluster.cluster.http()).await.unwrap();
    let request = format!(
        "POST {path} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// Status and body. HTTP/1.0 has no chunks, so a stream is its events.
async fn post_text(cluster: &TestCluster, path: &str, body: &str) -> (u16, String) {
    let mut stream = send(cluster, path, body).await;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

async fn post(cluster: &TestCluster, path: &str, body: &Value) -> (u16, String) {
    post_text(cluster, path, &body.to_string()).await
}

async fn json_of(cluster: &TestCluster, path: &str, body: &Value) -> Value {
    let (status, body) = post(cluster, path, body).await;
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_apis_give_the_same_tokens_and_logprobs() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let ids: Vec<u32> = (30..60).collect();
    let mut wanted = request(ids.clone(), 6);
    let sampling = wanted.sampling.as_mut().unwrap();
    (sampling.logprobs, sampling.prompt_logprobs) = (Some(1), Some(1));
    let mut stream = cluster.generate(wanted).await.unwrap();
    let (mut text, mut tokens) = (String::new(), Vec::new());
    let (mut prompt, mut output) = (Vec::new(), Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        text += &message.text;
        tokens.extend(message.token_ids);
        prompt.extend(message.prompt_logprobs.iter().map(|token| token.logprob));
        output.extend(message.logprobs.iter().map(|token| token.logprob));
    }

    let body = json!({"prompt": [ids], "max_tokens": 6, "temperature": 0, "ignore_eos": true,
        "echo": true, "logprobs": 1, "return_token_ids": true});
    let whole = json_of(&cluster, "/v1/completions", &body).await;
    let choice = &whole["choices"][0];
    assert_eq!(choice["token_ids"], json!(tokens));
    assert_eq!(choice["prompt_token_ids"], json!(ids));
    assert!(choice["text"].as_str().unwrap().ends_with(text.as_str()), "{choice}");
    let logprobs: Vec<Option<f32>> =
        serde_json::from_value(choice["logprobs"]["token_logprobs"].clone()).unwrap();
    assert_eq!(logprobs[0], None);
    let expected: Vec<f32> = prompt[1..].iter().chain(output.iter()).copied().collect();
    let given: Vec<f32> = logprobs[1..].iter().map(|logprob| logprob.unwrap()).collect();
    assert_eq!(given, expected);

    let mut streamed = body;
    streamed["stream"] = true.into();
    let (_, events) = post(&cluster, "/v1/completions", &streamed).await;
    let events: Vec<&str> = events.split_terminator("\n\n").collect();
    assert_eq!(events.last(), Some(&"data: [DONE]"));
    let parts = events[..events.len() - 1].iter().map(|event| {
        let part: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        part["choices"][0]["text"].as_str().unwrap().to_owned()
    });
    assert_eq!(parts.collect::<String>(), choice["text"].as_str().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_is_answered_and_a_client_that_leaves_frees_everything() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let facts = "You answer questions about this register of depots. The code of Otter is 4711. \
                 The city of Otter is Oslo. The code of Raven is 9302. The city of Raven is Lima.";
    let messages = json!([{"role": "system", "content": facts},
        {"role": "user", "content": [{"type": "text", "text": "What is the code of Raven?"}]}]);
    let ask = json!({"messages": messages, "temperature": 0});
    let answer = json_of(&cluster, "/v1/chat/completions", &ask).await;
    let choice = &answer["choices"][0];
    assert!(choice["message"]["content"].as_str().unwrap().contains("9302"), "{choice}");
    assert_eq!(choice["finish_reason"], "stop");
    let rendered = json_of(&cluster, "/tokenize", &json!({"messages": messages})).await;
    assert_eq!(answer["usage"]["prompt_tokens"], rendered["count"]);

    let endless = json!({"prompt": [20, 21, 22], "max_tokens": 3000, "ignore_eos": true,
        "stream": true});
    let mut stream = send(&cluster, "/v1/completions", &endless.to_string()).await;
    let mut some = [0; 256];
    assert!(stream.read(&mut some).await.unwrap() > 0);
    drop(stream);
    cluster.idle().await;

    let too_long = GenerateRequest {
        input: Some(Input::Prompt("word ".repeat(20_000))),
        ..GenerateRequest::default()
    };
    let status = cluster.complete(too_long).await.unwrap_err();
    let body = json!({"prompt": "word ".repeat(20_000)});
    let (code, body) = post(&cluster, "/v1/completions", &body).await;
    let error: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &error["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert_eq!(error["error"]["message"], status.message());
}

/// A hundred requests that are wrong in one way, and the parameter that each must name.
fn wrong_in_one_way(kind: usize, at: usize) -> (&'static str, String, Option<&'static str>) {
    let chat = |more: &str| {
        format!(r#"{{"messages": [{{"role": "user", "content": "Hello there"}}], {more}}}"#)
    };
    let (chats, texts) = ("/v1/chat/completions", "/v1/completions");
    match kind {
        // Cut off somewhere.
        0 => (chats, chat(r#""n": 1, "temperature": 0.5, "stop": ["x"]"#)[..at].to_owned(), None),
        1 => (chats, chat(&format!(r#""unknown_{at}": {at}"#)), Some("unknown_")),
        2 => (chats, chat(&format!(r#""temperature": {}"#, 3 + at)), Some("temperature")),
        3 => (texts, format!(r#"{{"prompt": [[1, {}]]}}"#, 5000 + at), Some("prompt")),
        4 => {
            (texts, format!(r#"{{"prompt": "a", "max_tokens": -{}}}"#, 1 + at), Some("max_tokens"))
        }
        5 => (texts, "[".repeat(65 + at * at), None),
        _ => (texts, format!(r#"{{"prompt": "a", "model": "m{at}"}}"#), Some("model")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_by_name_and_disturb_nothing() {
    let cluster = TestCluster::start(options(1, 1)).await;
    let good = json!({"prompt": [20, 21], "max_tokens": 2, "ignore_eos": true});
    for kind in 0..=6 {
        for at in 0..100 {
            let (path, body, param) = wrong_in_one_way(kind, at);
            let (status, answer) = post_text(&cluster, path, &body).await;
            let error: Value = serde_json::from_str(&answer).unwrap();
            let expected = if kind == 6 { 404 } else { 400 };
            assert_eq!(status, expected, "{body}: {answer}");
            let named = error["error"]["param"].as_str();
            assert_eq!(named.is_some(), param.is_some(), "{body}: {answer}");
            assert!(named.unwrap_or("").starts_with(param.unwrap_or("")), "{body}: {answer}");
        }
        json_of(&cluster, "/v1/completions", &good).await;
    }
    cluster.idle().await;
}
