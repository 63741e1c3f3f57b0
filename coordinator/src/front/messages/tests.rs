//! Clients of Anthropic's API.

use serde_json::{Value, json};

use crate::core::{SubmitError, Update};
use crate::front::fixtures::{Play, Played, start_with_tools, tokenizer};
use crate::front::openai::tests::{Answer, post, says_plainly};
use crate::front::openai::tools_tests::says_on;

const PATH: &str = "/v1/messages";
const CALL: &str =
    "Ok.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

async fn played(text: &'static str) -> Played {
    start_with_tools(move |_| Play::Accept(says_plainly(text))).await
}

fn body(more: Value) -> Value {
    let mut body = json!({
        "model": "demo",
        "max_tokens": 9,
        "system": "s",
        "messages": [{"role": "user", "content": "Hi"}],
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!({"tools": [{"name": "find", "input_schema": {"type": "object"}}]})
}

/// Events of a stream, each with its name checked against its type.
fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap();
        let json: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), json["type"].as_str());
        json
    };
    answer.body.split_terminator("\n\n").map(event).collect()
}

#[tokio::test]
async fn a_message_has_anthropics_shape() {
    let played = played("Hello you").await;
    let answer = post(&played, PATH, &body(json!({"temperature": 0.5, "top_k": 3}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut message = answer.json();
    assert!(message["id"].take().as_str().unwrap().starts_with("msg_"));
    let asked = &played.asked()[0];
    assert_eq!(tokenizer().decode(&asked.tokens), "s:s;u:Hi;");
    assert_eq!((asked.sampling.max_tokens, asked.sampling.top_k), (9, 3));
    let expected = json!({
        "id": null,
        "type": "message",
        "role": "assistant",
        "model": "demo",
        "content": [{"type": "text", "text": "Hello you"}],
        "stop_reason": "max_tokens",
        "stop_sequence": null,
        "usage": {
            // Of the two prompt tokens that the played core counts, one was cached.
            "input_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 1,
            "output_tokens": tokenizer().encode("Hello you", false).unwrap().len(),
        },
    });
    assert_eq!(message, expected);
}

#[tokio::test]
async fn calls_are_blocks_of_a_message() {
    let played = played(CALL).await;
    let message = post(&played, PATH, &body(tools())).await.json();
    assert_eq!(message["content"][0], json!({"type": "text", "text": "Ok."}));
    let call = &message["content"][1];
    let (name, input) = (&call["name"], &call["input"]);
    assert_eq!((name, input), (&json!("find"), &json!({"city": "Oslo"})));
    assert!(call["id"].as_str().unwrap().starts_with("toolu_"));
    let prompt = tokenizer().decode(&played.asked()[0].tokens);
    assert_eq!(prompt, "<tool_call>find,s:s;u:Hi;");
}

#[tokio::test]
async fn a_stream_tells_blocks_in_turn() {
    let played = played(CALL).await;
    let mut more = tools();
    more["stream"] = true.into();
    let answer = post(&played, PATH, &body(more)).await;
    let events = events(&answer);
    let start = &events[0]["message"];
    assert_eq!((&events[0]["type"], &start["content"]), (&json!("message_start"), &json!([])));
    assert_eq!(start["usage"]["input_tokens"], played.asked()[0].tokens.len());
    let (mut text, mut input, mut kinds) = (String::new(), String::new(), Vec::new());
    for event in &events {
        text += event["delta"]["text"].as_str().unwrap_or_default();
        input += event["delta"]["partial_json"].as_str().unwrap_or_default();
        let kind = (event["type"].as_str().unwrap(), event["index"].as_u64());
        if kinds.last() != Some(&kind) {
            kinds.push(kind);
        }
    }
    assert_eq!((text.as_str(), input.as_str()), ("Ok.", "{\"city\": \"Oslo\"}"));
    let block = |index| {
        ["content_block_start", "content_block_delta", "content_block_stop"]
            .map(|kind| (kind, Some(index)))
    };
    let expected = [
        &[("message_start", None)][..],
        &block(0),
        &block(1),
        &[("message_delta", None), ("message_stop", None)],
    ];
    assert_eq!(kinds, expected.concat());
    let delta = &events[events.len() - 2];
    assert_eq!(delta["delta"], json!({"stop_reason": "max_tokens", "stop_sequence": null}));
    assert!(delta["usage"]["output_tokens"].as_u64() > Some(9));
}

#[tokio::test]
async fn a_stop_sequence_is_named() {
    let played = start_with_tools(|_| Play::UntilStopped(says_on("One. Two."))).await;
    let message = post(&played, PATH, &body(json!({"stop_sequences": [". T"]}))).await.json();
    assert_eq!(message["content"][0]["text"], "One");
    assert_eq!(
        (&message["stop_reason"], &message["stop_sequence"]),
        (&json!("stop_sequence"), &json!(". T"))
    );
}

#[tokio::test]
async fn tokens_are_counted_without_an_answer() {
    let played = played("x").await;
    let mut body = body(tools());
    body.as_object_mut().unwrap().shift_remove("max_tokens");
    let count = post(&played, "/v1/messages/count_tokens", &body).await.json();
    let prompt = tokenizer().encode("<tool_call>find,s:s;u:Hi;", false).unwrap();
    assert_eq!(count, json!({"input_tokens": prompt.len()}));
    assert!(played.asked().is_empty());
}

#[tokio::test]
async fn errors_have_anthropics_shape() {
    let played = played("x").await;
    for (more, kind, said) in [
        (json!({"max_tokens": null}), "invalid_request_error", "max_tokens"),
        (json!({"messages": []}), "invalid_request_error", "messages"),
        (json!({"thinking": {"type": "enabled"}}), "invalid_request_error", "thinking"),
        (json!({"tools": [{"name": "f"}]}), "invalid_request_error", "tools[0].input_schema"),
        (json!({"tools": [{"type": "web_search", "name": "f"}]}), "invalid_request_error", "type"),
        (json!({"tool_choice": {"type": "any"}}), "invalid_request_error", "tool_choice"),
        (json!({"tool_choice": {}}), "invalid_request_error", "tool_choice.type"),
        (json!({"mood": 1}), "invalid_request_error", "mood"),
        (json!({"model": "other"}), "not_found_error", "other"),
    ] {
        let answer = post(&played, PATH, &body(more)).await;
        let json = answer.json();
        let message = json["error"]["message"].as_str().unwrap();
        assert!((400..500).contains(&answer.status) && message.contains(said), "{json}");
        assert_eq!((&json["type"], &json["error"]["type"]), (&json!("error"), &json!(kind)));
    }
    let wait = std::time::Duration::from_millis(1500);
    let busy =
        start_with_tools(move |_| Play::Refuse(SubmitError::Overloaded { retry_after: wait }));
    let answer = post(&busy.await, PATH, &body(json!({}))).await;
    assert_eq!((answer.status, answer.header("retry-after")), (529, Some("2")));
    assert_eq!(answer.json()["error"]["type"], "overloaded_error");
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_an_error() {
    let played = start_with_tools(|_| {
        let mut updates = says_plainly("Hello you");
        *updates.last_mut().unwrap() = Update::Failed(crate::core::RequestError::DeadlineExceeded);
        Play::Accept(updates)
    })
    .await;
    let answer = post(&played, PATH, &body(json!({"stream": true}))).await;
    let events = events(&answer);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("timeout_error")));
    assert!(events.iter().all(|event| event["type"] != "message_stop"));
}
