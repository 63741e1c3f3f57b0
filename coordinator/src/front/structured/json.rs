//! Structured output as OpenAI's and vLLM's JSON ask for it.

use baton_proto::wire::v1::structured_output::Kind;
use baton_proto::wire::v1::{Choice, JsonObject, StructuredOutput};
use serde_json::{Map, Value};

use crate::front::refusal::Refusal;

/// OpenAI's `response_format`; `None` if it may be any text. A schema is followed exactly, whether
/// `strict` or not.
///
/// # Errors
/// If it is malformed or asks for what is not served.
pub(crate) fn response_format(format: &Value) -> Result<Option<StructuredOutput>, Refusal> {
    let fields = object("response_format", format, &["type", "json_schema"])?;
    let kind = match format["type"].as_str() {
        Some("text") => return Ok(None),
        Some("json_object") => Kind::JsonObject(JsonObject {}),
        Some("json_schema") => {
            let (name, known) = ("response_format.json_schema", ["name", "description", "strict"]);
            let given = fields.get("json_schema").unwrap_or(&Value::Null);
            let given = object(name, given, &[&known[..], &["schema"]].concat())?;
            // OpenAI takes a missing schema for any JSON.
            Kind::JsonSchema(given.get("schema").map_or_else(|| "{}".to_owned(), Value::to_string))
        }
        _ => {
            let limit = "\"text\", \"json_object\" or \"json_schema\"";
            return Err(Refusal::field("response_format.type", &format["type"], limit));
        }
    };
    Ok(Some(StructuredOutput { kind: Some(kind) }))
}

/// vLLM's `structured_outputs`.
///
/// # Errors
/// If it is malformed, or asks for none, for several or for what is not served.
pub(crate) fn structured_outputs(wanted: &Value) -> Result<StructuredOutput, Refusal> {
    const NAME: &str = "structured_outputs";
    let known = ["json", "json_object", "regex", "choice", "grammar"];
    let fields = object(NAME, wanted, &known)?;
    let given: Vec<_> = fields.iter().filter(|(_, value)| !value.is_null()).collect();
    let [(key, value)] = given[..] else {
        return Err(Refusal::field(NAME, wanted, &format!("one of {}", known.join(", "))));
    };
    let field = format!("{NAME}.{key}");
    let text = || value.as_str().map(str::to_owned);
    let kind = match key.as_str() {
        // A schema, or one as text.
        "json" => Some(Kind::JsonSchema(text().unwrap_or_else(|| value.to_string()))),
        "json_object" => (*value == Value::Bool(true)).then_some(Kind::JsonObject(JsonObject {})),
        "regex" => text().map(Kind::Regex),
        "grammar" => text().map(Kind::Lark),
        _ => texts(value).map(|texts| Kind::Choice(Choice { texts })),
    };
    let limit = match key.as_str() {
        "json_object" => "true",
        "choice" => "a list of strings",
        _ => "a string",
    };
    let kind = kind.ok_or_else(|| Refusal::field(&field, value, limit))?;
    Ok(StructuredOutput { kind: Some(kind) })
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned)).collect()
}

/// An object without other fields than those that are served.
fn object<'a>(
    name: &str,
    value: &'a Value,
    known: &[&str],
) -> Result<&'a Map<String, Value>, Refusal> {
    let fields = value.as_object().ok_or_else(|| Refusal::field(name, value, "an object"))?;
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => {
            let field = format!("{name}.{key}");
            Err(Refusal::wrong(&field, format!("{field} is not supported")))
        }
        None => Ok(fields),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kind(output: StructuredOutput) -> Kind {
        output.kind.unwrap()
    }

    #[test]
    fn openais_formats_are_read() {
        let read = |format: Value| response_format(&format).unwrap().map(kind);
        assert_eq!(read(json!({"type": "text"})), None);
        let object = Some(Kind::JsonObject(JsonObject {}));
        assert_eq!(read(json!({"type": "json_object"})), object);
        let schema = json!({"name": "x", "strict": true, "schema": {"type": "null"}});
        let read = read(json!({"type": "json_schema", "json_schema": schema}));
        assert_eq!(read, Some(Kind::JsonSchema(r#"{"type":"null"}"#.into())));
    }

    #[test]
    fn vllms_are_read() {
        let read = |wanted: Value| kind(structured_outputs(&wanted).unwrap());
        let schema = Kind::JsonSchema("{}".into());
        assert_eq!(read(json!({"json": {}})), schema);
        assert_eq!(read(json!({"json": "{}", "regex": null})), schema);
        assert_eq!(read(json!({"json_object": true})), Kind::JsonObject(JsonObject {}));
        assert_eq!(read(json!({"regex": "a+"})), Kind::Regex("a+".into()));
        assert_eq!(read(json!({"grammar": "start: \"a\""})), Kind::Lark("start: \"a\"".into()));
        let texts = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(read(json!({"choice": ["a", "b"]})), Kind::Choice(Choice { texts }));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let format = |format: Value| response_format(&format).unwrap_err().to_string();
        let outputs = |wanted: Value| structured_outputs(&wanted).unwrap_err().to_string();
        for (error, said) in [
            (format(json!("json")), "response_format is \"json\"; it must be an object"),
            (format(json!({"type": "structural_tag"})), "response_format.type is"),
            (format(json!({"type": "json_schema"})), "response_format.json_schema is null"),
            (
                format(json!({"type": "json_schema", "json_schema": {"x": 1}})),
                "response_format.json_schema.x is not supported",
            ),
            (outputs(json!({})), "it must be one of json, json_object, regex"),
            (outputs(json!({"regex": "a", "choice": ["a"]})), "it must be one of json"),
            (outputs(json!({"structural_tag": "{}"})), "structured_outputs.structural_tag is not"),
            (
                outputs(json!({"choice": [1]})),
                "structured_outputs.choice is [1]; it must be a list",
            ),
            (outputs(json!({"regex": 1})), "structured_outputs.regex is 1; it must be a string"),
        ] {
            assert!(error.contains(said), "{said:?} is not in {error:?}");
        }
    }
}
