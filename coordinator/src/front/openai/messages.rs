//! The messages of a conversation.

use baton_proto::wire::v1::{Chat, ChatMessage};
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Who may speak. Templates know no `developer`: it is OpenAI's newer name of `system`.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Takes a conversation: `messages`, and how the template is used.
pub(super) fn conversation(fields: &mut Fields) -> Result<Chat, ApiError> {
    Ok(Chat {
        messages: take(fields)?,
        add_generation_prompt: fields.bool("add_generation_prompt")?,
        continue_final_message: fields.bool("continue_final_message")?,
        template_kwargs: fields.take("chat_template_kwargs").map(|kwargs| kwargs.to_string()),
        ..Chat::default()
    })
}

/// Takes `messages`, of which there is at least one.
pub(crate) fn take(fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
    let messages = fields.list("messages")?.ok_or_else(|| ApiError::missing("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty"));
    }
    let one = |(at, value)| message(Fields::new(&format!("messages[{at}]"), value)?);
    messages.into_iter().enumerate().map(one).collect()
}

fn message(mut fields: Fields) -> Result<ChatMessage, ApiError> {
    let name = fields.name("role");
    let role = fields.required("role")?;
    if !ROLES.contains(&role.as_str()) {
        return Err(ApiError::value(&name, json!(role), &ROLES.join(", ")));
    }
    let tool_calls = match role.as_str() {
        "assistant" => fields.list("tool_calls")?.filter(|calls| !calls.is_empty()),
        _ => None,
    };
    let tool_call_id = if role == "tool" { Some(fields.required("tool_call_id")?) } else { None };
    let content = match fields.texts("content", text_part)? {
        None if tool_calls.is_none() => return Err(ApiError::missing(&fields.name("content"))),
        content => content.unwrap_or_default(),
    };
    let speaker = fields.string("name")?;
    fields.finish()?;
    let role = if role == "developer" { "system".to_owned() } else { role };
    let tool_calls = tool_calls.map(|calls| Value::from(calls).to_string());
    Ok(ChatMessage { role, content, tool_calls, tool_call_id, name: speaker })
}

fn text_part(mut part: Fields) -> Result<String, ApiError> {
    let type_name = part.name("type");
    let kind = part.required("type")?;
    if kind != "text" {
        return Err(ApiError::unsupported(
            &type_name,
            &format!(" as {kind:.40?}: only \"text\" is"),
        ));
    }
    let text = part.required("text")?;
    part.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(messages: Value) -> Result<Vec<ChatMessage>, ApiError> {
        take(&mut Fields::new("", json!({"messages": messages})).unwrap())
    }

    #[test]
    fn content_is_text_or_parts_of_text() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let messages = read(json!([
            {"role": "developer", "content": "s"},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "", "refusal": null, "tool_calls": null},
        ]))
        .unwrap();
        let said: Vec<_> = messages.iter().map(|m| (m.role.as_str(), m.content.as_str())).collect();
        assert_eq!(said, [("system", "s"), ("user", "a\nb"), ("assistant", "")]);
    }

    #[test]
    fn calls_and_results_keep_what_belongs_to_them() {
        let call =
            json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let messages = read(json!([
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "x", "name": "f"},
        ]))
        .unwrap();
        assert_eq!(messages[0].tool_calls, Some(json!([call]).to_string()));
        assert_eq!(messages[1].tool_call_id.as_deref(), Some("c"));
        assert_eq!(messages[1].name.as_deref(), Some("f"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let user = |content: Value| json!([{"role": "user", "content": content}]);
        for (messages, param) in [
            (json!(null), "messages"),
            (json!("hi"), "messages"),
            (json!([]), "messages"),
            (json!(["hi"]), "messages[0]"),
            (json!([{"content": "x"}]), "messages[0].role"),
            (json!([{"role": "owner", "content": "x"}]), "messages[0].role"),
            (json!([{"role": 1, "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (user(json!(5)), "messages[0].content"),
            (user(json!(["x"])), "messages[0].content[0]"),
            (user(json!([{"type": "image_url", "image_url": {}}])), "messages[0].content[0].type"),
            (user(json!([{"type": "text"}])), "messages[0].content[0].text"),
            (user(json!([{"type": "text", "text": "x", "y": 1}])), "messages[0].content[0].y"),
            (json!([{"role": "user", "content": "x", "mood": "good"}]), "messages[0].mood"),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
            (
                json!([{"role": "user", "content": "x", "tool_calls": [1]}]),
                "messages[0].tool_calls",
            ),
            (json!([{"role": "assistant", "tool_calls": 1}]), "messages[0].tool_calls"),
            (json!([{"role": "assistant", "tool_calls": []}]), "messages[0].content"),
        ] {
            let error = read(messages.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}: {}", error.message);
        }
    }
}
