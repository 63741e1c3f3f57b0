//! HTTP clients of a front whose core is played by the test.

use baton_proto::message::{Logprobs, NodeFinish};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::aliases::Alias;
use crate::core::Update;
use crate::front::fixtures::{
    MAX_MODEL_LEN, Play, Played, done, output, start, start_with, tokenizer,
};

/// What a server answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{} is no JSON", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The events of a stream; JSON as such, and other data as a string.
    pub(crate) fn events(&self) -> Vec<Value> {
        let events = self.body.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        let data = events.map(|event| event.strip_prefix("data: ").expect("an event has data"));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into())).collect()
    }
}

pub(crate) async fn send(played: &Played, request: &str) -> Answer {
    let mut stream = TcpStream::connect(played.http).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    Answer {
        status: head[9..12].parse().unwrap(),
        head: head.to_owned(),
        body: if chunked { joined(body) } else { body.to_owned() },
    }
}

/// The body of a chunked response, which must have come to its end.
fn joined(mut chunks: &str) -> String {
    let mut body = String::new();
    loop {
        let (length, rest) = chunks.split_once("\r\n").expect("a chunk has a length");
        let length = usize::from_str_radix(length, 16).unwrap();
        body += &rest[..length];
        chunks = &rest[length + 2..];
        if length == 0 {
            return body;
        }
    }
}

pub(super) async fn get(played: &Played, path: &str) -> Answer {
    send(played, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
}

pub(super) async fn post_text(played: &Played, path: &str, body: &str) -> Answer {
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\nx-request-id: mine-1\r\n\r\n{body}"
    );
    send(played, &request).await
}

pub(crate) async fn post(played: &Played, path: &str, body: &Value) -> Answer {
    post_text(played, path, &body.to_string()).await
}

pub(super) const CHAT: &str = "/v1/chat/completions";
pub(super) const TEXT: &str = "/v1/completions";

/// A conversation with `more` parameters.
pub(super) fn chat(more: Value) -> Value {
    let mut body = json!({"model": "demo", "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// One token per update with some log-probability, and the end.
fn says(text: &str) -> Vec<Update> {
    let ids = tokenizer().encode(text, false).unwrap();
    let last = ids.len() - 1;
    let token = |(at, &id): (usize, &u32)| {
        let mut token = output(id, (at == last).then_some(NodeFinish::Length));
        token.logprobs = Some(Logprobs { logprob: -0.5, top: vec![(id, -0.5), (7, -1.0)] });
        Update::Tokens(vec![token])
    };
    let mut updates: Vec<_> = ids.iter().enumerate().map(token).collect();
    updates.push(done(Some(NodeFinish::Length)));
    updates
}

/// Says this without log-probabilities.
pub(crate) fn says_plainly(text: &str) -> Vec<Update> {
    let mut updates = says(text);
    for update in &mut updates {
        if let Update::Tokens(tokens) = update {
            tokens.iter_mut().for_each(|token| token.logprobs = None);
        }
    }
    updates
}

/// The same with what differs from run to run taken out.
fn settled(mut json: Value) -> Value {
    for (key, kind) in [("id", "chatcmpl-"), ("id", "cmpl-")] {
        if json[key].as_str().is_some_and(|id| id.starts_with(kind) && id.len() > 20) {
            json[key] = kind.into();
        }
    }
    if json["created"].as_u64().is_some_and(|created| created > 1_700_000_000) {
        json["created"] = "now".into();
    }
    json
}

#[tokio::test]
async fn a_chat_completion_has_openais_shape() {
    let played = start(|_| Play::Accept(says_plainly("Hello you"))).await;
    let answer = post(&played, CHAT, &chat(json!({}))).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("mine-1")));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let prompt = played.asked()[0].tokens.len();
    let completion = tokenizer().encode("Hello you", false).unwrap().len();
    let expected = json!({
        "id": "chatcmpl-",
        "object": "chat.completion",
        "created": "now",
        "model": "demo",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "Hello you", "refusal": null},
            "logprobs": null,
            "finish_reason": "length",
            "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    });
    assert_eq!(settled(answer.json()), expected);
}

#[tokio::test]
async fn a_chat_stream_has_openais_shape() {
    let played = start(|_| Play::Accept(says_plainly("Oslo 🚚"))).await;
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = post(&played, CHAT, &chat(options)).await;
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events: Vec<Value> = answer.events().into_iter().map(settled).collect();
    let chunk = |choices: Value, usage: Value| {
        json!({"id": "chatcmpl-", "object": "chat.completion.chunk", "created": "now",
            "model": "demo", "choices": choices, "usage": usage})
    };
    let part = |delta: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
    let first = part(json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0], chunk(first, Value::Null));
    let [.., end, usage, last] = &events[..] else { panic!("{events:?}") };
    let ended = json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": "length",
        "stop_reason": null}]);
    assert_eq!(*end, chunk(ended, Value::Null));
    let (used, spent) = (&usage["usage"], tokenizer().encode("Oslo 🚚", false).unwrap().len());
    assert_eq!((&usage["choices"], &used["completion_tokens"]), (&json!([]), &json!(spent)));
    assert_eq!(*last, "[DONE]");
    let mut text = String::new();
    for event in &events[1..events.len() - 3] {
        let content = event["choices"][0]["delta"]["content"].as_str().unwrap();
        assert!(!content.is_empty(), "a part of a character is no part of the stream");
        assert_eq!(*event, chunk(part(json!({"content": content})), Value::Null));
        text += content;
    }
    assert_eq!(text, "Oslo 🚚");

    let plain = post(&played, CHAT, &chat(json!({"stream": true}))).await.events();
    assert_eq!(plain.len(), events.len() - 1, "nobody asked for what was used");
    assert!(plain.iter().all(|event| event.get("usage").is_none()));
    let always = json!({"include_usage": true, "continuous_usage_stats": true});
    let always = chat(json!({"stream": true, "stream_options": always}));
    let always = post(&played, CHAT, &always).await.events();
    let counts: Vec<_> =
        always.iter().filter_map(|e| e["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(counts.len(), always.len() - 1);
    assert!(counts.is_sorted() && counts.last() == Some(&(spent as u64)), "{counts:?}");
}

#[tokio::test]
async fn logprobs_and_token_ids_come_whole_and_in_parts() {
    let played = start(|_| Play::Accept(says("Hi 🚚"))).await;
    let ids = tokenizer().encode("Hi 🚚", false).unwrap();
    let more = json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true, "n": 2});
    let whole = post(&played, CHAT, &chat(more.clone())).await.json();
    assert_eq!(played.asked()[0].sampling.logprobs, Some(2));
    let prompt = json!(played.asked()[0].tokens.to_vec());
    assert_eq!(whole["prompt_token_ids"], prompt);
    let (mut contents, mut tokens) = (vec![Vec::new(); 2], vec![Vec::new(); 2]);
    let mut streamed = more;
    streamed["stream"] = true.into();
    for event in post(&played, CHAT, &chat(streamed)).await.events() {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap_or_default() as usize;
        if choice["delta"]["role"] == "assistant" {
            assert_eq!(event["prompt_token_ids"], prompt);
        }
        let part = choice["logprobs"]["content"].as_array();
        contents[index].extend(part.into_iter().flatten().cloned());
        tokens[index].extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
    }
    for index in 0..2 {
        let choice = &whole["choices"][index];
        assert_eq!((&choice["index"], &choice["token_ids"]), (&json!(index), &json!(ids)));
        assert_eq!(choice["logprobs"]["content"], json!(contents[index]));
        assert_eq!(json!(tokens[index]), json!(ids));
        let first = &choice["logprobs"]["content"][0];
        assert_eq!((&first["token"], &first["bytes"]), (&json!("H"), &json!([72])));
        assert_eq!(first["top_logprobs"][1]["logprob"], -1.0);
    }
}

/// Log-probabilities of every prompt token, after the first output token.
fn echoes(tokens: &[u32]) -> Vec<Update> {
    let logprobs = |&id: &u32| (id, Logprobs { logprob: -0.25, top: vec![(id, -0.25)] });
    let mut updates = says("!");
    updates.insert(1, Update::PromptLogprobs(tokens[1..].iter().map(logprobs).collect()));
    updates
}

#[tokio::test]
async fn echo_gives_the_prompt_and_its_logprobs() {
    let played = start(|request| Play::Accept(echoes(&request.tokens))).await;
    let tokenizer = tokenizer();
    let prompts: Vec<_> =
        ["Oslo is", "🚚 no"].iter().map(|text| tokenizer.encode(text, false).unwrap()).collect();
    // As lm-eval asks.
    let body = json!({"model": "demo", "prompt": prompts, "echo": true, "max_tokens": 1,
        "logprobs": 1, "temperature": 0, "seed": 1234});
    let whole = post(&played, TEXT, &body).await.json();
    assert_eq!(played.asked()[0].sampling.prompt_logprobs, Some(1));
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let events = post(&played, TEXT, &streamed).await.events();
    for (index, (ids, text)) in prompts.iter().zip(["Oslo is!", "🚚 no!"]).enumerate() {
        let choice = &whole["choices"][index];
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!(text)));
        let logprobs = &choice["logprobs"];
        let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
        for list in lists {
            assert_eq!(logprobs[list].as_array().unwrap().len(), ids.len() + 1, "{list}");
            let parts = events.iter().filter(|event| event["choices"][0]["index"] == index);
            let parts = parts.filter_map(|event| event["choices"][0]["logprobs"][list].as_array());
            assert_eq!(json!(parts.flatten().collect::<Vec<_>>()), logprobs[list], "{list}");
        }
        let given = &logprobs["token_logprobs"];
        assert_eq!(
            (&given[0], &given[1], &given[ids.len()]),
            (&Value::Null, &json!(-0.25), &json!(-0.5))
        );
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        let parts = events.iter().filter(|event| event["choices"][0]["index"] == index);
        let parts: String = parts.map(|e| e["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(parts, text);
    }

    let nothing = json!({"prompt": "Oslo is", "echo": true, "max_tokens": 0, "logprobs": 0});
    let nothing = post(&played, TEXT, &nothing).await.json();
    assert_eq!(nothing["choices"][0]["text"], "Oslo is");
    assert_eq!(nothing["usage"]["completion_tokens"], 0);
    let tokens = nothing["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), prompts[0].len());
}

#[tokio::test]
async fn every_prompt_gets_its_completions() {
    let played = start(|request| {
        Play::Accept(says_plainly(if request.tokens.len() > 2 { "long" } else { "short" }))
    })
    .await;
    let body = json!({"prompt": [[5, 6], [5, 6, 7]], "n": 2, "return_token_ids": true});
    let whole = post(&played, TEXT, &body).await.json();
    let choices = whole["choices"].as_array().unwrap();
    let said: Vec<_> = choices.iter().map(|c| (c["index"].as_u64(), c["text"].as_str())).collect();
    let expected = [(0, "short"), (1, "short"), (2, "long"), (3, "long")];
    assert_eq!(said, expected.map(|(index, text)| (Some(index), Some(text))));
    assert_eq!(choices[3]["prompt_token_ids"], json!([5, 6, 7]));
    assert_eq!(choices[3]["logprobs"], Value::Null);
    assert_eq!(whole["usage"]["prompt_tokens"], 5, "each prompt counts once");
    assert_eq!(whole["object"], "text_completion");

    let before = played.asked().len();
    let bad = post(&played, TEXT, &json!({"prompt": [[5, 6], [5, 2048]]})).await;
    assert_eq!((bad.status, &bad.json()["error"]["param"]), (400, &json!("prompt")));
    assert_eq!(played.asked().len(), before, "all prompts are served or none");
}

#[tokio::test]
async fn a_stop_string_is_told() {
    let text = says_plainly("The code is 4712. END more");
    let played = start(move |_| {
        let mut updates = text.clone();
        updates.pop();
        Play::UntilStopped(updates)
    })
    .await;
    let body = json!({"prompt": "What?", "stop": " END", "max_tokens": 20});
    let choice = post(&played, TEXT, &body).await.json()["choices"][0].clone();
    assert_eq!(
        (&choice["text"], &choice["stop_reason"]),
        (&json!("The code is 4712."), &json!(" END"))
    );
    assert_eq!(choice["finish_reason"], "stop");
}

#[tokio::test]
async fn a_client_that_leaves_cancels() {
    for stream in [false, true] {
        let played = start(|_| {
            let mut updates = says_plainly("Hello");
            updates.truncate(1);
            Play::Silence(updates)
        })
        .await;
        let body = chat(json!({"stream": stream})).to_string();
        let mut client = TcpStream::connect(played.http).await.unwrap();
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        client.write_all(request.as_bytes()).await.unwrap();
        if stream {
            let mut some = [0; 64];
            assert!(client.read(&mut some).await.unwrap() > 0);
        } else {
            played.asked_for(1).await;
        }
        drop(client);
        assert_eq!(played.dropped().await, played.asked()[0].id, "stream: {stream}");
    }
}

#[tokio::test]
async fn models_and_aliases_are_listed_while_they_are_served() {
    let alias = Alias {
        name: "org/chat".to_owned(),
        models: vec!["demo".to_owned()],
        prices: vec![1.0],
        target_ttft_ms: 100.0,
    };
    let played = start_with(&["demo"], vec![alias], |_| panic!("no request")).await;
    let list = get(&played, "/v1/models").await.json();
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str()).collect();
    assert_eq!((ids, &list["object"]), (vec![Some("demo"), Some("org/chat")], &json!("list")));
    for (path, id) in [("/v1/models/demo", "demo"), ("/v1/models/org/chat", "org/chat")] {
        let model = get(&played, path).await.json();
        assert_eq!((&model["id"], &model["root"]), (&json!(id), &json!("demo")));
        assert_eq!(
            (&model["object"], &model["max_model_len"]),
            (&json!("model"), &json!(MAX_MODEL_LEN))
        );
    }
    let missing = get(&played, "/v1/models/gpt").await;
    assert_eq!(
        (missing.status, &missing.json()["error"]["code"]),
        (404, &json!("model_not_found"))
    );
    played.set_ready(false);
    assert_eq!(get(&played, "/v1/models").await.json()["data"], json!([]));
    assert_eq!(get(&played, "/v1/models/demo").await.status, 404);
}

#[tokio::test]
async fn text_becomes_tokens_and_text_again() {
    let played = start(|_| panic!("no request")).await;
    let tokenizer = tokenizer();
    let text = "Oslo is 🚚";
    let ids = tokenizer.encode(text, true).unwrap();
    let body = json!({"model": "demo", "prompt": text, "return_token_strs": true});
    let answer = post(&played, "/tokenize", &body).await.json();
    assert_eq!((&answer["tokens"], &answer["count"]), (&json!(ids), &json!(ids.len())));
    assert_eq!(answer["max_model_len"], MAX_MODEL_LEN);
    let strings = answer["token_strs"].as_array().unwrap().iter();
    let first: String = strings.take(4).map(|string| string.as_str().unwrap()).collect();
    assert!(text.starts_with(&first), "{first}");
    let back = post(&played, "/detokenize", &json!({"tokens": ids})).await.json();
    assert_eq!(back, json!({ "prompt": text }));
    let answer = post(&played, "/tokenize", &chat(json!({}))).await.json();
    let tokens: Vec<u32> = serde_json::from_value(answer["tokens"].clone()).unwrap();
    let rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(tokenizer.decode_with_special(&tokens), rendered);
    assert_eq!(answer["token_strs"], Value::Null);
    for (path, body, param) in [
        ("/tokenize", json!({}), "messages"),
        ("/tokenize", json!({"prompt": 5}), "prompt"),
        ("/detokenize", json!({"tokens": [2048]}), "tokens"),
        ("/detokenize", json!({"tokens": "x"}), "tokens"),
    ] {
        let answer = post(&played, path, &body).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)));
    }
}

#[tokio::test]
async fn metrics_answer_to_head() {
    let played = start(|_| panic!("no request")).await;
    let request = "HEAD /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = send(&played, request).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
}
