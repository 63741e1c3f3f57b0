//! Clients that let the model call tools.

use baton_proto::grammar::Grammar;
use baton_proto::message::NodeFinish;
use serde_json::{Value, json};

use super::tests::{post, says_plainly};
use crate::core::Update;
use crate::front::fixtures::{Play, Played, output, start, start_with_tools, tokenizer};

const CHAT: &str = "/v1/chat/completions";
const CALLS: &str = "Ok.\n<tool_call>\n{\"name\": \"find\", \"arguments\": {\"city\": \"Oslo\"}}\n\
                     </tool_call>\n<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>";

/// Says this and does not end.
pub(crate) fn says_on(text: &str) -> Vec<Update> {
    let mut updates = says_plainly(text);
    updates.pop();
    for update in &mut updates {
        if let Update::Tokens(tokens) = update {
            tokens.iter_mut().for_each(|token| token.finish = None);
        }
    }
    updates
}

async fn played(text: &'static str) -> Played {
    start_with_tools(move |_| Play::Accept(says_plainly(text))).await
}

fn body(more: Value) -> Value {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
    let mut body = json!({
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [tool("find"), tool("now")],
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn prompt(played: &Played) -> String {
    tokenizer().decode(&played.asked()[0].tokens)
}

/// What a client puts together of a stream: text, calls, and why it ended.
fn joined(events: &[Value]) -> (String, Vec<(String, String)>, Value) {
    let (mut text, mut calls, mut reason) = (String::new(), Vec::new(), Value::Null);
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        text += choice["delta"]["content"].as_str().unwrap_or_default();
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let function = &call["function"];
            if let Some(name) = function["name"].as_str() {
                assert_eq!(call["index"], calls.len());
                assert!(call["id"].as_str().unwrap().len() <= 40);
                calls.push((name.to_owned(), String::new()));
            }
            assert_eq!(call["index"], calls.len() - 1);
            calls.last_mut().unwrap().1 += function["arguments"].as_str().unwrap();
        }
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (text, calls, reason)
}

#[tokio::test]
async fn calls_come_whole_and_in_parts() {
    let played = start_with_tools(|_| {
        let mut updates = says_on(CALLS);
        updates.push(Update::Tokens(vec![output(0, Some(NodeFinish::EndOfSequence))]));
        Play::Accept(updates)
    })
    .await;
    let whole = post(&played, CHAT, &body(json!({}))).await.json();
    assert_eq!(prompt(&played), "<tool_call>find,now,u:Hi;");
    let choice = &whole["choices"][0];
    let message = &choice["message"];
    assert_eq!(
        (&message["content"], &choice["finish_reason"]),
        (&json!("Ok."), &json!("tool_calls"))
    );
    let find = json!({"name": "find", "arguments": "{\"city\": \"Oslo\"}"});
    assert_eq!(message["tool_calls"][0]["function"], find);
    assert_eq!(message["tool_calls"][1]["function"], json!({"name": "now", "arguments": "{}"}));
    assert_ne!(message["tool_calls"][0]["id"], message["tool_calls"][1]["id"]);

    let events = post(&played, CHAT, &body(json!({"stream": true}))).await.events();
    let calls = [("find", "{\"city\": \"Oslo\"}"), ("now", "{}")];
    let calls: Vec<_> =
        calls.map(|(name, arguments)| (name.to_owned(), arguments.to_owned())).into();
    assert_eq!(joined(&events), ("Ok.".to_owned(), calls, json!("tool_calls")));
    let parts = events.iter().filter(|e| !e["choices"][0]["delta"]["tool_calls"].is_null());
    assert!(parts.count() > 4, "arguments come as they are generated");
}

#[tokio::test]
async fn a_call_that_breaks_off_is_text_and_ends_with_the_length() {
    let cut_off = "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"ci";
    let played = played(cut_off).await;
    let whole = post(&played, CHAT, &body(json!({}))).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["content"], cut_off);
    assert!(choice["message"].get("tool_calls").is_none());
    assert_eq!(choice["finish_reason"], "length");
    let events = post(&played, CHAT, &body(json!({"stream": true}))).await.events();
    let (text, calls, reason) = joined(&events);
    assert_eq!((text.as_str(), reason), ("", json!("length")));
    assert_eq!(calls, [("find".to_owned(), "{\"ci".to_owned())]);
}

#[tokio::test]
async fn without_parallel_calls_the_first_is_the_last() {
    let played = start_with_tools(|_| Play::UntilStopped(says_on(CALLS))).await;
    let whole = post(&played, CHAT, &body(json!({"parallel_tool_calls": false}))).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(choice["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn no_choice_means_no_tools() {
    let played = played("<tool_call>{\"name\": \"now\"}</tool_call>").await;
    let whole = post(&played, CHAT, &body(json!({"tool_choice": "none"}))).await.json();
    assert_eq!(prompt(&played), "u:Hi;");
    let content = &whole["choices"][0]["message"]["content"];
    assert_eq!(content, "<tool_call>{\"name\": \"now\"}</tool_call>");
}

#[tokio::test]
async fn a_forced_call_is_the_whole_output_of_any_model() {
    let call = "{\"name\": \"now\", \"arguments\": {}}";
    let plain = start(move |_| Play::Accept(says_plainly(call))).await;
    let named = json!({"type": "function", "function": {"name": "now"}});
    for choice in [named, json!("required")] {
        let whole = post(&plain, CHAT, &body(json!({"tool_choice": choice}))).await.json();
        let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(*call, json!({"name": "now", "arguments": "{}"}), "{whole}");
    }
    let schema = |at: usize| match plain.asked()[at].sampling.grammar.as_deref() {
        Some(Grammar::JsonSchema(schema)) => serde_json::from_str::<Value>(schema).unwrap(),
        other => panic!("{other:?} is no schema"),
    };
    assert_eq!(schema(0)["anyOf"].as_array().unwrap().len(), 1);
    assert_eq!(schema(1)["anyOf"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn calls_and_their_results_go_to_the_template() {
    let played = played("Oslo.").await;
    let call = json!({"id": "c", "type": "function", "function": {"name": "find", "arguments": "{\"a\":1}"}});
    let messages = json!([
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "Oslo"}]},
    ]);
    let answer = post(&played, CHAT, &json!({"messages": messages})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(prompt(&played), "u:Where?;a:!{\"a\": 1};t:Oslo;");
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let played = played("x").await;
    let with = |tool: Value| json!({"tools": [{"type": "function", "function": tool}]});
    let call = json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]);
    for (more, param) in [
        (with(json!({"name": "f", "strict": true})), "tools[0].strict"),
        (with(json!({"name": "f f"})), "tools[0].function.name"),
        (
            json!({"chat_template_kwargs": {"chat_template": "x"}}),
            "chat_template_kwargs.chat_template",
        ),
        (json!({"chat_template_kwargs": 1}), "chat_template_kwargs"),
        (json!({"messages": call}), "messages[0].tool_calls[0].function.arguments"),
    ] {
        let answer = post(&played, CHAT, &body(more.clone())).await;
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    let plain = start(|_| Play::Accept(says_plainly("x"))).await;
    let answer = post(&plain, CHAT, &body(json!({}))).await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status, error["param"].as_str()), (400, Some("tools")), "{error}");
}
