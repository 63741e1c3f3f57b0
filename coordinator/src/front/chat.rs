//! Chat templates: from a conversation to a prompt, as transformers renders them.
//!
//! A template is Jinja source in `chat_template.jinja`, or in `chat_template.json` or
//! `tokenizer_config.json` under `chat_template`: one text, or a list of named ones. What
//! transformers puts into the environment is there: `raise_exception`, `strftime_now`, a `tojson`
//! like Python's, the names of the special tokens, and Python's methods of strings and mappings.

use std::path::Path;
use std::time::SystemTime;

use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};
use serde_json::{Map, Value as Json};

use super::models::{ModelFileError, read_json, read_text};
use super::tools::ToolFormat;
use super::{python_json, strftime};

/// A model's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// Names of special tokens and their texts, such as `bos_token`.
    special_tokens: Map<String, Json>,
    knows_tools: bool,
    tool_format: Option<ToolFormat>,
}

/// A conversation to render.
pub struct Conversation<'a> {
    /// A list of `{"role": …, "content": …}`.
    pub messages: &'a Json,
    /// Descriptions of functions that the model may call, if any.
    pub tools: Option<&'a Json>,
    /// The prompt ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further names that some templates know, such as `enable_thinking`; they go before special
    /// tokens.
    pub kwargs: &'a Map<String, Json>,
    /// Some templates tell the model the date.
    pub now: SystemTime,
}

/// The template does not accept the conversation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the chat template refuses the conversation: {0}")]
pub struct ChatError(pub String);

/// Instructions of one rendering: some hundred for each of the most messages that there may be. It takes
/// about a second.
const MAX_STEPS: u64 = 10_000_000;
const NAME: &str = "chat_template";
/// Used without and with tools, where a model has several templates.
const NAMES: [&str; 2] = ["default", "tool_use"];

impl ChatTemplate {
    /// Reads the template of a model's folder; `None` if it has none.
    pub fn load(dir: &Path) -> Result<Option<Self>, ModelFileError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or(Json::Null);
        let special_tokens = special_tokens(&config);
        for file in ["chat_template.jinja", "chat_template.json"] {
            let path = dir.join(file);
            let Some(text) = read_text(&path)? else {
                continue;
            };
            let source = if file.ends_with(".json") {
                let json: Json =
                    serde_json::from_str(&text).map_err(|e| ModelFileError::new(&path, e))?;
                json[NAME].clone()
            } else {
                text.into()
            };
            return Self::new(&source, special_tokens)
                .map(Some)
                .map_err(|e| ModelFileError::new(&path, e));
        }
        if config[NAME].is_null() {
            return Ok(None);
        }
        Self::new(&config[NAME], special_tokens)
            .map(Some)
            .map_err(|e| ModelFileError::new(&config_path, e))
    }

    /// Compiles `source`: a text, or a list of `{"name": …, "template": …}`.
    pub fn new(source: &Json, special_tokens: Map<String, Json>) -> Result<Self, ChatError> {
        let mut environment = environment();
        let mut for_tools = "";
        let mut add = |name: &str, source: &Json| {
            let source = source
                .as_str()
                .ok_or_else(|| ChatError(format!("template {name:?} is no text")))?;
            environment
                .add_template_owned(name.to_owned(), without_generation_tags(source))
                .map_err(|e| ChatError(format!("template {name:?}: {e}")))
        };
        match source {
            Json::Array(named) => {
                for entry in named {
                    let name = entry["name"].as_str().unwrap_or_default();
                    add(name, &entry["template"])?;
                    if name == NAMES[1] || for_tools.is_empty() {
                        for_tools = entry["template"].as_str().unwrap_or_default();
                    }
                }
            }
            text => {
                add(NAMES[0], text)?;
                for_tools = text.as_str().unwrap_or_default();
            }
        }
        if environment.get_template(NAMES[0]).is_err() {
            return Err(ChatError("there is no template named default".to_owned()));
        }
        let knows_tools = for_tools.contains("tools");
        let tool_format = ToolFormat::of_template(for_tools);
        Ok(Self { environment, special_tokens, knows_tools, tool_format })
    }

    /// Whether the template tells the model of tools.
    #[must_use]
    pub fn knows_tools(&self) -> bool {
        self.knows_tools
    }

    /// How the template teaches the model to call tools; `None` if it does not, or in a way that is
    /// not known here.
    #[must_use]
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.tool_format
    }

    /// The prompt of a conversation.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, ChatError> {
        let name = NAMES[usize::from(conversation.tools.is_some())];
        let template = self
            .environment
            .get_template(name)
            .or_else(|_| self.environment.get_template(NAMES[0]))
            .expect("a chat template has a default");
        let now = conversation.now;
        let own = context! {
            messages => conversation.messages,
            tools => conversation.tools,
            documents => conversation.kwargs.get("documents"),
            add_generation_prompt => conversation.add_generation_prompt,
            strftime_now => Value::from_function(move |format: &str| strftime::utc(format, now)),
        };
        let kwargs = Value::from_serialize(conversation.kwargs);
        let tokens = Value::from_serialize(&self.special_tokens);
        template.render(context! { ..own, ..kwargs, ..tokens }).map_err(|error| {
            // The innermost cause says what is wrong: what the template raised, most often.
            let detail = error.detail().map(str::to_owned);
            ChatError(detail.unwrap_or_else(|| error.to_string()))
        })
    }
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", tojson);
    // Python cannot iterate over None; templates ask that of tools.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment
}

/// `json.dumps` with the arguments that transformers lets templates give.
fn tojson(value: &Value, indent: Option<Value>, options: Kwargs) -> Result<String, Error> {
    let invalid = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, e.to_string());
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?,
    };
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = python_json::Style {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent: match indent {
            Some(indent) if !indent.is_none() => Some(usize::try_from(indent)?),
            _ => None,
        },
        separators: separators.and_then(|both| <[String; 2]>::try_from(both).ok()),
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(invalid)?;
    Ok(python_json::dumps(&json, &style))
}

/// `{% generation %}` marks text for training and means nothing here; as a condition that always
/// holds it keeps the tag's effect on white space.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let (before, tag) = (&rest[..start], &rest[start..start + length]);
        out.push_str(before);
        match tag[2..].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

/// `bos_token` and the like: a text, or an object with the text as `content`.
fn special_tokens(config: &Json) -> Map<String, Json> {
    let mut tokens = Map::new();
    for (key, value) in config.as_object().into_iter().flatten() {
        let text = value.as_str().or_else(|| value["content"].as_str());
        if let (true, Some(text)) = (key.ends_with("_token"), text) {
            tokens.insert(key.clone(), text.into());
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::front::fixtures::golden_text;

    fn ask(tools: Option<&Json>) -> Result<String, ChatError> {
        let source = json!([
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | tojson }}"},
        ]);
        render(&source, &json!([]), tools)
    }

    fn render(source: &Json, messages: &Json, tools: Option<&Json>) -> Result<String, ChatError> {
        ChatTemplate::new(source, Map::new())?.render(&Conversation {
            messages,
            tools,
            add_generation_prompt: true,
            kwargs: &Map::new(),
            now: SystemTime::UNIX_EPOCH,
        })
    }

    #[test]
    fn renders_what_transformers_renders() {
        let templates = golden_text("templates.json");
        let mut cases = 0;
        for set in templates.as_array().unwrap() {
            let mut tokens = set.as_object().unwrap().clone();
            tokens.retain(|key, value| key.ends_with("_token") && !value.is_null());
            let template = ChatTemplate::new(&set["template"], tokens).unwrap();
            for case in set["cases"].as_array().unwrap() {
                let rendered = template.render(&Conversation {
                    messages: &case["messages"],
                    tools: Some(&case["tools"]).filter(|tools| !tools.is_null()),
                    add_generation_prompt: case["add_generation_prompt"] == true,
                    kwargs: case["kwargs"].as_object().unwrap_or(&Map::new()),
                    now: SystemTime::UNIX_EPOCH,
                });
                let expected = match case["error"].as_str() {
                    Some(message) => Err(ChatError(message.to_owned())),
                    None => Ok(case["rendered"].as_str().unwrap().to_owned()),
                };
                assert_eq!(rendered, expected, "{} of {}", case["title"], set["name"]);
                cases += 1;
            }
        }
        assert!(cases > 250, "the fixture has only {cases} cases");
    }

    #[test]
    fn the_tools_template_serves_conversations_with_tools() {
        assert_eq!(ask(None).unwrap(), "plain");
        let tools = json!([{"name": "f<>&'", "x": [1, 2.0, null, "ü"]}]);
        let expected = r#"[{"name": "f<>&'", "x": [1, 2.0, null, "ü"]}]"#;
        assert_eq!(ask(Some(&tools)).unwrap(), expected);
    }

    #[test]
    fn knows_the_functions_that_templates_use() {
        let dated = json!("{{ strftime_now('%d %b %Y') }}");
        assert_eq!(render(&dated, &json!([]), None).unwrap(), "01 Jan 1970");
        let tagged = json!("a\n  {%- generation -%}\n b {% endgeneration %}\nc");
        assert_eq!(render(&tagged, &json!([]), None).unwrap(), "ab c");
        let raising = json!("{{ raise_exception('roles must alternate') }}");
        let error = render(&raising, &json!([]), None).unwrap_err();
        assert_eq!(error.0, "roles must alternate");
    }

    #[test]
    fn a_template_does_not_run_for_ever() {
        let endless =
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        let error = render(&json!(endless), &json!([]), None).unwrap_err();
        assert!(error.0.contains("fuel"), "{error}");
    }

    #[test]
    fn finds_the_template_and_names_a_broken_one() {
        let dir = TempDir::new().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert!(ChatTemplate::load(dir.path()).unwrap().is_none());
        let render = || {
            let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
            template.render(&Conversation {
                messages: &json!([]),
                tools: None,
                add_generation_prompt: true,
                kwargs: &Map::new(),
                now: SystemTime::UNIX_EPOCH,
            })
        };
        let config = json!({"chat_template": "{{ bos_token }}1", "bos_token": {"content": "<s>"}});
        write("tokenizer_config.json", &config.to_string());
        assert_eq!(render().unwrap(), "<s>1");
        write("chat_template.json", r#"{"chat_template": "{{ bos_token }}2"}"#);
        assert_eq!(render().unwrap(), "<s>2");
        write("chat_template.jinja", "{{ bos_token }}3");
        assert_eq!(render().unwrap(), "<s>3");
        write("chat_template.jinja", "{% if %}");
        let error = ChatTemplate::load(dir.path()).err().unwrap().to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
    }
}
