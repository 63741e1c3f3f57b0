//! The messages of a conversation.

use baton_proto::wire::v1::ChatMessage;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Who may speak. Templates know no `developer`: it is OpenAI's newer name of `system`.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

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
    let role = fields.string("role")?.ok_or_else(|| ApiError::missing(&name))?;
    if !ROLES.contains(&role.as_str()) {
        return Err(ApiError::value(&name, json!(role), &ROLES.join(", ")));
    }
    let content = content(&mut fields)?;
    fields.finish()?;
    let role = if role == "developer" { "system".to_owned() } else { role };
    Ok(ChatMessage { role, content, ..ChatMessage::default() })
}

/// A string, or parts that are texts, one to a line.
fn content(fields: &mut Fields) -> Result<String, ApiError> {
    let name = fields.name("content");
    match fields.take("content") {
        None => Err(ApiError::missing(&name)),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let one = |(at, part)| text_part(Fields::new(&format!("{name}[{at}]"), part)?);
            let texts: Vec<_> = parts.into_iter().enumerate().map(one).collect::<Result<_, _>>()?;
            Ok(texts.join("\n"))
        }
        Some(other) => Err(ApiError::value(&name, other, "a string or a list of parts")),
    }
}

fn text_part(mut part: Fields) -> Result<String, ApiError> {
    let (type_name, text_name) = (part.name("type"), part.name("text"));
    let kind = part.string("type")?.ok_or_else(|| ApiError::missing(&type_name))?;
    if kind != "text" {
        return Err(ApiError::unsupported(
            &type_name,
            &format!(" as {kind:.40?}: only \"text\" is"),
        ));
    }
    let text = part.string("text")?.ok_or_else(|| ApiError::missing(&text_name))?;
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
        ] {
            let error = read(messages.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}: {}", error.message);
        }
    }
}
