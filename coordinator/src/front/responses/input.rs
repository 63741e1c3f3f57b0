//! The items of an input.

use baton_proto::wire::v1::ChatMessage;
use serde_json::{Map, Value, json};

use crate::front::openai::error::ApiError;
use crate::front::openai::fields::Fields;

/// Who may speak. Templates know no `developer`: it is OpenAI's newer name of `system`.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Takes `instructions` and `input`.
pub(super) fn take(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let instructions = fields.string("instructions")?.map(|text| said("system", text));
    let mut turns = Vec::new();
    match fields.take("input") {
        None => return Err(ApiError::missing("input")),
        Some(Value::String(text)) => turns.push(said("user", text).into()),
        Some(Value::Array(items)) => {
            for (at, value) in items.into_iter().enumerate() {
                item(Fields::new(&format!("input[{at}]"), value)?, &mut turns)?;
            }
        }
        Some(other) => return Err(ApiError::value("input", other, "a string or a list of items")),
    }
    if turns.is_empty() {
        return Err(ApiError::invalid("input", "input is empty"));
    }
    Ok(instructions.into_iter().chain(turns.into_iter().map(Turn::into_message)).collect())
}

/// A message, and the calls that belong to it: they are items of their own.
struct Turn {
    message: ChatMessage,
    calls: Vec<Value>,
}

impl From<ChatMessage> for Turn {
    fn from(message: ChatMessage) -> Self {
        Self { message, calls: Vec::new() }
    }
}

impl Turn {
    fn into_message(self) -> ChatMessage {
        let tool_calls = (!self.calls.is_empty()).then(|| Value::from(self.calls).to_string());
        ChatMessage { tool_calls, ..self.message }
    }
}

fn said(role: &str, content: String) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content, ..ChatMessage::default() }
}

fn item(mut fields: Fields, turns: &mut Vec<Turn>) -> Result<(), ApiError> {
    let type_name = fields.name("type");
    let kind = fields.string("type")?;
    // Items of a response come back as input: how they were named and ended does not matter.
    fields.take("id");
    fields.take("status");
    match kind.as_deref() {
        None | Some("message") => turns.push(message(&mut fields)?.into()),
        Some("function_call") => call(&mut fields, turns)?,
        Some("function_call_output") => {
            let id = fields.required("call_id")?;
            let content = content(&mut fields, "output")?;
            let result = ChatMessage { tool_call_id: Some(id), ..said("tool", content) };
            turns.push(result.into());
        }
        Some(other) => {
            return Err(ApiError::unsupported(&type_name, &format!(" as {other:.40?}")));
        }
    }
    fields.finish()
}

fn message(fields: &mut Fields) -> Result<ChatMessage, ApiError> {
    let name = fields.name("role");
    let role = fields.required("role")?;
    if !ROLES.contains(&role.as_str()) {
        return Err(ApiError::value(&name, json!(role), &ROLES.join(", ")));
    }
    let role = if role == "developer" { "system" } else { &role };
    Ok(said(role, content(fields, "content")?))
}

/// A call belongs to what the assistant said just before.
fn call(fields: &mut Fields, turns: &mut Vec<Turn>) -> Result<(), ApiError> {
    let (id, name) = (fields.required("call_id")?, fields.required("name")?);
    let arguments = fields.required("arguments")?;
    if serde_json::from_str::<Map<String, Value>>(&arguments).is_err() {
        return Err(ApiError::value(&fields.name("arguments"), arguments, "a JSON object as text"));
    }
    let call =
        json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    match turns.last_mut().filter(|turn| turn.message.role == "assistant") {
        Some(turn) => turn.calls.push(call),
        None => {
            let message = said("assistant", String::new());
            turns.push(Turn { message, calls: vec![call] });
        }
    }
    Ok(())
}

fn content(fields: &mut Fields, key: &str) -> Result<String, ApiError> {
    fields.texts(key, text_part)?.ok_or_else(|| ApiError::missing(&fields.name(key)))
}

fn text_part(mut part: Fields) -> Result<String, ApiError> {
    let name = part.name("type");
    let kind = part.required("type")?;
    if !["input_text", "output_text"].contains(&kind.as_str()) {
        return Err(ApiError::unsupported(&name, &format!(" as {kind:.40?}")));
    }
    let text = part.required("text")?;
    part.only("annotations", &[json!([])])?;
    part.only("logprobs", &[json!([])])?;
    part.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Vec<ChatMessage>, ApiError> {
        take(&mut Fields::new("", body).unwrap())
    }

    #[test]
    fn items_become_messages() {
        let call = |id: &str| {
            json!({"type": "function_call", "id": "fc_1", "call_id": id, "name": "find",
                   "arguments": "{\"a\": 1}", "status": "completed"})
        };
        let messages = read(json!({"instructions": "s", "input": [
            {"role": "developer", "content": "d"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [
                {"type": "output_text", "text": "a", "annotations": [], "logprobs": []}]},
            call("c1"), call("c2"),
            {"type": "function_call_output", "call_id": "c1", "output": "Oslo"},
        ]}))
        .unwrap();
        let said: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        let expected =
            [("system", "s"), ("system", "d"), ("user", "u"), ("assistant", "a"), ("tool", "Oslo")];
        assert_eq!(said, expected);
        let calls: Value = serde_json::from_str(messages[3].tool_calls.as_ref().unwrap()).unwrap();
        assert_eq!((&calls[0]["id"], &calls[1]["id"]), (&json!("c1"), &json!("c2")));
        assert_eq!(calls[1]["function"], json!({"name": "find", "arguments": "{\"a\": 1}"}));
        assert_eq!(messages[4].tool_call_id.as_deref(), Some("c1"));
        assert_eq!(read(json!({"input": "hi"})).unwrap(), [said_by_user("hi")]);
    }

    fn said_by_user(text: &str) -> ChatMessage {
        said("user", text.to_owned())
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (input, param) in [
            (json!(null), "input"),
            (json!([]), "input"),
            (json!(5), "input"),
            (json!([{"type": "reasoning", "summary": []}]), "input[0].type"),
            (json!([{"content": "x"}]), "input[0].role"),
            (json!([{"role": "tool", "content": "x"}]), "input[0].role"),
            (json!([{"role": "user"}]), "input[0].content"),
            (
                json!([{"role": "user", "content": [{"type": "input_image"}]}]),
                "input[0].content[0].type",
            ),
            (json!([{"type": "function_call", "call_id": "c"}]), "input[0].name"),
            (json!([{"type": "function_call_output", "call_id": "c"}]), "input[0].output"),
            (json!([{"role": "user", "content": "x", "y": 1}]), "input[0].y"),
        ] {
            let error = read(json!({"input": input})).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        }
    }
}
