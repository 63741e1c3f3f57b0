//! Clients of the Responses API.

use serde_json::{Value, json};

use crate::core::Update;
use crate::front::fixtures::{Play, Played, start_with_tools, tokenizer};
use crate::front::openai::tests::{Answer, post, says_plainly};

const PATH: &str = "/v1/responses";
const CALL: &str =
    "Ok.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>";

async fn played(text: &'static str) -> Played {
    start_with_tools(move |_| Play::Accept(says_plainly(text))).await
}

fn body(more: Value) -> Value {
    let mut body = json!({"model": "demo", "input": "Hi"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!({"tools": [{"type": "function", "name": "find", "parameters": {"type": "object"}}]})
}

/// Events of a stream, each with its name and number checked.
fn events(answer: &Answer) -> Vec<Value> {
    let event = |(at, event): (usize, &str)| {
        let (name, data) = event.split_once('\n').unwrap();
        let json: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: "), json["type"].as_str());
        assert_eq!(json["sequence_number"], at);
        json
    };
    answer.body.split_terminator("\n\n").enumerate().map(event).collect()
}

#[tokio::test]
async fn a_response_has_openais_shape() {
    let played = played("Hello you").await;
    let more = json!({"instructions": "s", "max_output_tokens": 9, "store": false,
        "metadata": {"a": "b"}, "text": {"format": {"type": "text"}}});
    let answer = post(&played, PATH, &body(more)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let response = answer.json();
    assert_eq!(tokenizer().decode(&played.asked()[0].tokens), "s:s;u:Hi;");
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    for (key, value) in [
        ("object", json!("response")),
        ("status", json!("incomplete")),
        ("incomplete_details", json!({"reason": "max_output_tokens"})),
        ("error", Value::Null),
        ("model", json!("demo")),
        ("instructions", json!("s")),
        ("max_output_tokens", json!(9)),
        ("metadata", json!({"a": "b"})),
        ("store", json!(false)),
        ("tools", json!([])),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(true)),
    ] {
        assert_eq!(response[key], value, "{key}");
    }
    let mut item = response["output"][0].clone();
    assert!(item["id"].take().as_str().unwrap().starts_with("msg_"));
    let content =
        json!([{"type": "output_text", "text": "Hello you", "annotations": [], "logprobs": []}]);
    let expected = json!({"id": null, "type": "message", "status": "incomplete",
        "role": "assistant", "content": content});
    assert_eq!(item, expected);
    let spent = tokenizer().encode("Hello you", false).unwrap().len();
    let usage = json!({"input_tokens": 2, "input_tokens_details": {"cached_tokens": 1},
        "output_tokens": spent, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 2 + spent});
    assert_eq!(response["usage"], usage);
}

#[tokio::test]
async fn a_stream_tells_what_the_whole_response_says() {
    let played = played(CALL).await;
    let whole = post(&played, PATH, &body(tools())).await.json();
    let call = &whole["output"][1];
    assert_eq!(
        (&call["name"], &call["arguments"]),
        (&json!("find"), &json!("{\"city\": \"Oslo\"}"))
    );
    let mut more = tools();
    more["stream"] = true.into();
    let events = events(&post(&played, PATH, &body(more)).await);
    let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let (mut text, mut arguments) = (String::new(), String::new());
    for event in &events {
        let delta = event["delta"].as_str().unwrap_or_default();
        match event["type"].as_str().unwrap() {
            "response.output_text.delta" => text += delta,
            "response.function_call_arguments.delta" => arguments += delta,
            _ => {}
        }
    }
    assert_eq!((text.as_str(), arguments.as_str()), ("Ok.", "{\"city\": \"Oslo\"}"));
    let mut turns = kinds.clone();
    turns.dedup();
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.incomplete",
    ];
    assert_eq!(turns, expected);
    // Ids differ from request to request; the rest is the same.
    let without_ids = |output: &Value| {
        let mut output = output.clone();
        for item in output.as_array_mut().unwrap() {
            item["id"].take();
            item["call_id"].take();
            item["status"].take();
        }
        output
    };
    let last = &events.last().unwrap()["response"];
    assert_eq!(without_ids(&last["output"]), without_ids(&whole["output"]));
    assert_eq!(last["usage"], whole["usage"]);
}

#[tokio::test]
async fn a_turn_goes_on_with_what_the_response_said() {
    let played = played(CALL).await;
    let first = post(&played, PATH, &body(tools())).await.json();
    let mut input = vec![json!({"role": "user", "content": "Hi"})];
    input.extend(first["output"].as_array().unwrap().clone());
    let call_id = &first["output"][1]["call_id"];
    input.push(json!({"type": "function_call_output", "call_id": call_id, "output": "7"}));
    let answer = post(&played, PATH, &body(json!({"input": input}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let prompt = tokenizer().decode(&played.asked()[1].tokens);
    assert_eq!(prompt, "u:Hi;a:Ok.!{\"city\": \"Oslo\"};t:7;");
}

#[tokio::test]
async fn what_is_stored_or_unknown_is_refused_by_name() {
    let played = played("x").await;
    for (more, param) in [
        (json!({"store": true}), "store"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"background": true}), "background"),
        (json!({"include": ["reasoning.encrypted_content"]}), "include"),
        (json!({"reasoning": {"effort": "low"}}), "reasoning"),
        (json!({"text": {"format": {"type": "json_object"}}}), "text.format"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (json!({"tool_choice": {"type": "function", "name": "f"}}), "tool_choice"),
        (json!({"input": null}), "input"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"mood": 1}), "mood"),
    ] {
        let answer = post(&played, PATH, &body(more.clone())).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
}

#[tokio::test]
async fn a_stream_that_fails_ends_with_an_error() {
    let played = start_with_tools(|_| {
        let mut updates = says_plainly("Hello you");
        *updates.last_mut().unwrap() = Update::Failed(crate::core::RequestError::DeadlineExceeded);
        Play::Accept(updates)
    })
    .await;
    let events = events(&post(&played, PATH, &body(json!({"stream": true}))).await);
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["code"]), (&json!("error"), &json!("deadline_exceeded")));
    assert_eq!(last["error"]["message"], last["message"]);
}
