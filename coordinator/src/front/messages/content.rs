//! The messages of a conversation, which are made of blocks.

use baton_proto::wire::v1::ChatMessage;
use serde_json::{Value, json};

use crate::front::openai::error::ApiError;
use crate::front::openai::fields::Fields;

/// Takes `system` and `messages`.
pub(super) fn take(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(said("system", texts("system", system)?));
    }
    let list = fields.list("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    for (at, value) in list.into_iter().enumerate() {
        message(Fields::new(&format!("messages[{at}]"), value)?, &mut messages)?;
    }
    match messages.last() {
        Some(last) if last.role == "assistant" && last.tool_calls.is_some() => {
            let what = "messages ends with a call of a tool; it must end with the result";
            Err(ApiError::invalid("messages", what))
        }
        Some(last) if last.role != "system" => Ok(messages),
        _ => Err(ApiError::invalid("messages", "messages is empty")),
    }
}

fn said(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() }
}

/// What a message is made of.
#[derive(Default)]
struct Blocks {
    texts: Vec<String>,
    /// Calls of tools, as OpenAI describes them.
    calls: Vec<Value>,
    /// What tools answered.
    results: Vec<ChatMessage>,
}

fn message(mut fields: Fields, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let role_name = fields.name("role");
    let role = fields.required("role")?;
    let name = fields.name("content");
    let blocks = match fields.take("content") {
        None => return Err(ApiError::missing(&name)),
        Some(Value::String(text)) => Blocks { texts: vec![text], ..Blocks::default() },
        Some(Value::Array(list)) if list.is_empty() => {
            return Err(ApiError::invalid(&name, format!("{name} is empty")));
        }
        Some(Value::Array(list)) => blocks(&name, &role, list)?,
        Some(other) => return Err(ApiError::value(&name, other, "a string or a list of blocks")),
    };
    fields.finish()?;
    match role.as_str() {
        "user" => {
            messages.extend(blocks.results);
            if !blocks.texts.is_empty() {
                messages.push(said("user", blocks.texts.join("\n")));
            }
        }
        "assistant" => {
            let tool_calls = (!blocks.calls.is_empty()).then(|| json!(blocks.calls).to_string());
            let said = said("assistant", blocks.texts.join("\n"));
            messages.push(ChatMessage { tool_calls, ..said });
        }
        _ => return Err(ApiError::value(&role_name, json!(role), "user or assistant")),
    }
    Ok(())
}

fn blocks(name: &str, role: &str, list: Vec<Value>) -> Result<Blocks, ApiError> {
    let mut blocks = Blocks::default();
    for (at, value) in list.into_iter().enumerate() {
        let mut block = Fields::new(&format!("{name}[{at}]"), value)?;
        let type_name = block.name("type");
        let kind = block.required("type")?;
        // A hint where caching pays; here it always does.
        block.take("cache_control");
        match (kind.as_str(), role) {
            ("text", _) => blocks.texts.push(block.required("text")?),
            ("tool_use", "assistant") => blocks.calls.push(call(&mut block)?),
            ("tool_result", "user") => blocks.results.push(result(&mut block)?),
            _ => {
                let why = format!(" as {kind:.40?} in a message of {role:.40?}");
                return Err(ApiError::unsupported(&type_name, &why));
            }
        }
        block.finish()?;
    }
    Ok(blocks)
}

fn call(block: &mut Fields) -> Result<Value, ApiError> {
    let (id, name) = (block.required("id")?, block.required("name")?);
    let input_name = block.name("input");
    let input = block.take("input").ok_or_else(|| ApiError::missing(&input_name))?;
    if !input.is_object() {
        return Err(ApiError::value(&input_name, input, "an object"));
    }
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input}}))
}

fn result(block: &mut Fields) -> Result<ChatMessage, ApiError> {
    let id = block.required("tool_use_id")?;
    let name = block.name("content");
    let content = block.take("content").map(|content| texts(&name, content)).transpose()?;
    let content = content.unwrap_or_default();
    // Templates have no other place to say so.
    let failed = block.bool("is_error")?.unwrap_or(false);
    let content = if failed { format!("Error: {content}") } else { content };
    Ok(ChatMessage { tool_call_id: Some(id), ..said("tool", content) })
}

/// A string, or blocks of text, one to a line.
fn texts(name: &str, value: Value) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(list) => Ok(blocks(name, "system", list)?.texts.join("\n")),
        other => Err(ApiError::value(name, other, "a string or a list of blocks of text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Vec<ChatMessage>, ApiError> {
        take(&mut Fields::new("", body).unwrap())
    }

    #[test]
    fn blocks_become_messages() {
        let messages = read(json!({
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": [
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "find", "input": {"a": 1}},
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Oslo"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "none", "is_error": true},
                    {"type": "text", "text": "Well?"},
                ]},
            ],
        }))
        .unwrap();
        let said: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        let expected = [
            ("system", "s"),
            ("user", "Where?"),
            ("assistant", "I look."),
            ("tool", "Oslo"),
            ("tool", "Error: none"),
            ("user", "Well?"),
        ];
        assert_eq!(said, expected);
        let calls =
            r#"[{"id":"t1","type":"function","function":{"name":"find","arguments":{"a":1}}}]"#;
        assert_eq!(messages[2].tool_calls.as_deref(), Some(calls));
        assert_eq!(messages[3].tool_call_id.as_deref(), Some("t1"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let user = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
        let assistant =
            |block: Value| json!({"messages": [{"role": "assistant", "content": [block]}]});
        for (body, param) in [
            (json!({}), "messages"),
            (json!({"messages": []}), "messages"),
            (
                assistant(json!({"type": "tool_use", "id": "t", "name": "f", "input": {}})),
                "messages",
            ),
            (json!({"messages": [{"role": "system", "content": "x"}]}), "messages[0].role"),
            (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
            (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content"),
            (user(json!({"text": "x"})), "messages[0].content[0].type"),
            (user(json!({"type": "image", "source": {}})), "messages[0].content[0].type"),
            (user(json!({"type": "tool_use"})), "messages[0].content[0].type"),
            (user(json!({"type": "tool_result"})), "messages[0].content[0].tool_use_id"),
            (user(json!({"type": "text", "text": "x", "y": 1})), "messages[0].content[0].y"),
            (
                assistant(json!({"type": "tool_use", "id": "t", "name": "f", "input": "x"})),
                "messages[0].content[0].input",
            ),
            (json!({"system": 5, "messages": []}), "system"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {}", error.message);
        }
    }
}
