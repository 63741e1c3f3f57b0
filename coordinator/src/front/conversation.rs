//! From the conversation of a request to what chat templates read.

use std::collections::HashMap;
use std::time::SystemTime;

use baton_proto::wire::v1::{Chat, ChatMessage};
use serde_json::{Map, Value as Json, json};

use super::chat::{ChatTemplate, Conversation};
use super::continued;
use super::refusal::Refusal;
use super::tools::definition::{self, Tool};

/// Most calls of one message.
const MAX_CALLS: usize = 128;
/// Most messages: each takes far more memory than its bytes in a request.
const MAX_MESSAGES: usize = 1 << 14;

/// What a template gets from elsewhere, or what only says how it is used.
const RESERVED_KWARGS: [&str; 8] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
    "raise_exception",
    "strftime_now",
];

/// The text of a conversation.
pub(super) fn render(
    chat: &Chat,
    template: &ChatTemplate,
    now: SystemTime,
) -> Result<String, Refusal> {
    let tools = chat.tools.as_deref().map(tools).transpose()?.flatten();
    if tools.is_some() && !template.knows_tools() {
        return Err(wrong("chat.tools", "given, but the model's chat template knows no tools"));
    }
    let kwargs = chat.template_kwargs.as_deref().map(kwargs).transpose()?.unwrap_or_default();
    let goes_on = chat.continue_final_message.unwrap_or(false);
    let begins = chat.add_generation_prompt.unwrap_or(!goes_on);
    if goes_on && begins {
        let what = "true; it must be false with continue_final_message";
        return Err(wrong("chat.add_generation_prompt", what));
    }
    let mut messages = messages(&chat.messages)?;
    let last = format!("chat.messages[{}]", chat.messages.len().saturating_sub(1));
    let continued = chat.messages.last().filter(|_| goes_on);
    if let Some(message) = continued {
        continued::mark(&mut messages, &last, &message.content)?;
    }
    let text = template.render(&Conversation {
        messages: &messages,
        tools: tools.as_ref(),
        add_generation_prompt: begins,
        kwargs: &kwargs,
        now,
    })?;
    if continued.is_some() { continued::cut(text, &last) } else { Ok(text) }
}

/// `None` for an empty list: templates take that for tools.
fn tools(text: &str) -> Result<Option<Json>, Refusal> {
    let tools = parse(text, "chat.tools")?;
    let tools = definition::tools(&tools, "chat.tools", definition::nested)?;
    let described: Vec<_> = tools.iter().map(Tool::described).collect();
    Ok(Some(described.into()).filter(|_| !tools.is_empty()))
}

fn kwargs(text: &str) -> Result<Map<String, Json>, Refusal> {
    let Json::Object(kwargs) = parse(text, "chat.template_kwargs")? else {
        return Err(wrong("chat.template_kwargs", "no JSON object"));
    };
    match RESERVED_KWARGS.iter().find(|name| kwargs.contains_key(**name)) {
        Some(name) => {
            Err(wrong(&format!("chat.template_kwargs.{name}"), "not for a request to set"))
        }
        None => Ok(kwargs),
    }
}

fn messages(messages: &[ChatMessage]) -> Result<Json, Refusal> {
    let mut callers = HashMap::new();
    if messages.len() > MAX_MESSAGES {
        let number =
            format!("a list of {}; it must be one of at most {MAX_MESSAGES}", messages.len());
        return Err(Refusal::wrong("chat.messages", format!("chat.messages is {number}")));
    }
    let all = messages.iter().enumerate();
    all.map(|(index, message)| {
        let field = format!("chat.messages[{index}]");
        let mut out = json!({"role": message.role, "content": message.content});
        let made = message.tool_calls.as_deref().map(|text| calls(text, &field)).transpose()?;
        if let Some(calls) = made.filter(|calls| !calls.is_empty()) {
            for call in &calls {
                let name = call["function"]["name"].clone();
                call["id"].as_str().map(|id| callers.insert(id.to_owned(), name));
            }
            out["tool_calls"] = calls.into();
        }
        if let Some(id) = &message.tool_call_id {
            out["tool_call_id"] = id.as_str().into();
        }
        // Clients name the call alone; some templates want the tool.
        let called = message.tool_call_id.as_ref().and_then(|id| callers.get(id));
        match (&message.name, called) {
            (Some(name), _) => out["name"] = name.as_str().into(),
            (None, Some(name)) => out["name"] = name.clone(),
            (None, None) => {}
        }
        Ok(out)
    })
    .collect()
}

/// Calls as templates want them: with arguments that are an object.
fn calls(text: &str, message: &str) -> Result<Vec<Json>, Refusal> {
    let field = format!("{message}.tool_calls");
    let Json::Array(calls) = parse(text, &field)? else {
        return Err(wrong(&field, "no JSON list"));
    };
    if calls.len() > MAX_CALLS {
        let number = format!("a list of {}; it must be one of at most {MAX_CALLS}", calls.len());
        return Err(wrong(&field, &number));
    }
    calls
        .iter()
        .enumerate()
        .map(|(index, call)| {
            let field = format!("{field}[{index}]");
            let kind = &call["type"];
            if !kind.is_null() && kind != "function" {
                return Err(wrong(&format!("{field}.type"), "not \"function\""));
            }
            let function = &call["function"];
            let name = function["name"].as_str().filter(|name| !name.is_empty());
            let name = name.ok_or_else(|| wrong(&format!("{field}.function.name"), "no name"))?;
            let arguments = match &function["arguments"] {
                Json::Null => Some(Map::new()),
                Json::String(text) if text.trim().is_empty() => Some(Map::new()),
                Json::String(text) => serde_json::from_str(text).ok(),
                Json::Object(arguments) => Some(arguments.clone()),
                _ => None,
            };
            let arguments = arguments
                .ok_or_else(|| wrong(&format!("{field}.function.arguments"), "no JSON object"))?;
            let mut out =
                json!({"type": "function", "function": {"name": name, "arguments": arguments}});
            if let Some(id) = call["id"].as_str() {
                out["id"] = id.into();
            }
            Ok(out)
        })
        .collect()
}

fn parse(text: &str, field: &str) -> Result<Json, Refusal> {
    serde_json::from_str(text).map_err(|error| wrong(field, &format!("no JSON: {error}")))
}

fn wrong(field: &str, what: &str) -> Refusal {
    Refusal::wrong(field, format!("{field} is {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::front::fixtures::golden_text;

    /// As clients send it: arguments as text, results without the tool's name.
    fn as_sent(messages: &Json) -> Vec<ChatMessage> {
        let text = |value: &Json| value.as_str().map(str::to_owned);
        let message = |message: &Json| {
            let mut calls = message["tool_calls"].clone();
            for call in calls.as_array_mut().into_iter().flatten() {
                call["function"]["arguments"] = call["function"]["arguments"].to_string().into();
            }
            ChatMessage {
                role: text(&message["role"]).unwrap(),
                content: text(&message["content"]).unwrap(),
                tool_calls: (!calls.is_null()).then(|| calls.to_string()),
                tool_call_id: text(&message["tool_call_id"]),
                name: None,
            }
        };
        messages.as_array().unwrap().iter().map(message).collect()
    }

    #[test]
    fn what_clients_send_is_rendered_as_transformers_does() {
        let mut compared = 0;
        for set in golden_text("templates.json").as_array().unwrap() {
            let mut tokens = set.as_object().unwrap().clone();
            tokens.retain(|key, value| key.ends_with("_token") && !value.is_null());
            let template = ChatTemplate::new(&set["template"], tokens).unwrap();
            for case in set["cases"].as_array().unwrap() {
                let titles = ["two calls at once", "system and question"];
                if !titles.contains(&case["title"].as_str().unwrap()) {
                    continue;
                }
                let sent = |value: &Json| (!value.is_null()).then(|| value.to_string());
                let rendered = render(
                    &Chat {
                        messages: as_sent(&case["messages"]),
                        add_generation_prompt: case["add_generation_prompt"].as_bool(),
                        tools: sent(&case["tools"]),
                        template_kwargs: sent(&case["kwargs"]),
                        continue_final_message: None,
                    },
                    &template,
                    SystemTime::UNIX_EPOCH,
                );
                match case["rendered"].as_str() {
                    Some(_) if !case["tools"].is_null() && !template.knows_tools() => {
                        assert!(rendered.unwrap_err().to_string().contains("chat.tools"));
                    }
                    Some(expected) => assert_eq!(rendered.unwrap(), expected, "{}", set["name"]),
                    None => assert!(rendered.is_err()),
                }
                compared += 1;
            }
        }
        assert!(compared > 50);
    }

    #[test]
    fn names_what_is_wrong() {
        let template = ChatTemplate::new(&"{{ tools }}{{ messages }}".into(), Map::new()).unwrap();
        let refusal =
            |chat: Chat| render(&chat, &template, SystemTime::UNIX_EPOCH).unwrap_err().to_string();
        let with_calls = |calls: &str| Chat {
            messages: vec![ChatMessage {
                tool_calls: Some(calls.to_owned()),
                ..Default::default()
            }],
            ..Chat::default()
        };
        for (calls, field) in [
            ("{", "chat.messages[0].tool_calls "),
            ("{}", "chat.messages[0].tool_calls "),
            ("[1]", "chat.messages[0].tool_calls[0].function.name "),
            (r#"[{"type": "x"}]"#, "chat.messages[0].tool_calls[0].type "),
            (r#"[{"function": {"name": "f", "arguments": "[]"}}]"#, "[0].function.arguments "),
        ] {
            let refusal = refusal(with_calls(calls));
            assert!(refusal.contains(field), "{refusal}");
        }
        for kwargs in ["[]", r#"{"chat_template": "x"}"#] {
            let template_kwargs = Some(kwargs.to_owned());
            let refusal = refusal(Chat { template_kwargs, ..Chat::default() });
            assert!(refusal.starts_with("chat.template_kwargs"), "{refusal}");
        }
        for tools in ["{}", "[1]", r#"[{"type": "function"}]"#] {
            let tools = Some(tools.to_owned());
            let refusal = refusal(Chat { tools, ..Chat::default() });
            assert!(refusal.starts_with("chat.tools"), "{refusal}");
        }
    }

    #[test]
    fn tools_come_without_what_is_not_for_the_model() {
        let template = ChatTemplate::new(&"{{ tools | tojson }}".into(), Map::new()).unwrap();
        let tools = r#"[{"type": "function", "function": {"name": "f", "strict": true, "x": 1}}]"#;
        let chat = Chat { tools: Some(tools.to_owned()), ..Chat::default() };
        let expected = r#"[{"type": "function", "function": {"name": "f", "x": 1}}]"#;
        assert_eq!(render(&chat, &template, SystemTime::UNIX_EPOCH).unwrap(), expected);
    }
}
