//! The tools of a request, as OpenAI describes them.

use serde_json::{Map, Value, json};

use crate::front::refusal::Refusal;

/// Most tools of one request.
const MAX_TOOLS: usize = 128;
/// Longest name of a tool, in bytes.
const MAX_NAME_BYTES: usize = 64;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tool {
    /// Of letters, digits, `_`, `-` and `.`.
    pub(crate) name: String,
    /// JSON schema of the arguments, an object. A tool without one takes none.
    pub(crate) parameters: Option<Value>,
    /// The arguments must follow the schema.
    pub(crate) strict: bool,
    /// What the model is told.
    function: Map<String, Value>,
}

/// The tools of a list. `read` makes one of an entry; a refusal names `field` and what is wrong
/// below it.
pub(crate) fn tools(
    list: &Value,
    field: &str,
    read: impl Fn(&Value, &str) -> Result<Tool, Refusal>,
) -> Result<Vec<Tool>, Refusal> {
    let Value::Array(list) = list else {
        return Err(wrong(field, "no list"));
    };
    if list.len() > MAX_TOOLS {
        let number = format!("a list of {}; it must be one of at most {MAX_TOOLS}", list.len());
        return Err(wrong(field, &number));
    }
    let mut tools: Vec<Tool> = Vec::new();
    for (index, entry) in list.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let tool = read(entry, &field)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return Err(wrong(&field, &format!("named {:?}, as one before it is", tool.name)));
        }
        tools.push(tool);
    }
    Ok(tools)
}

/// The tool that an entry `{"type": "function", "function": {…}}` describes.
pub(crate) fn nested(entry: &Value, field: &str) -> Result<Tool, Refusal> {
    if entry["type"] != "function" {
        return Err(wrong(&format!("{field}.type"), "not \"function\""));
    }
    let field = format!("{field}.function");
    let function = entry["function"].as_object().ok_or_else(|| wrong(&field, "no object"))?;
    Tool::new(function, &field)
}

impl Tool {
    /// From `{"name", "description", "parameters", "strict"}`. The model is told of further keys.
    pub(crate) fn new(function: &Map<String, Value>, field: &str) -> Result<Self, Refusal> {
        let get = |key: &str| function.get(key).unwrap_or(&Value::Null);
        let of_name = |c: u8| c.is_ascii_alphanumeric() || b"_-.".contains(&c);
        let name = get("name")
            .as_str()
            .filter(|name| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(of_name));
        let name = name.ok_or_else(|| {
            let limit = format!("not 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' and '.'");
            wrong(&format!("{field}.name"), &limit)
        })?;
        let description = get("description");
        if !description.is_null() && !description.is_string() {
            return Err(wrong(&format!("{field}.description"), "no text"));
        }
        let parameters = Some(get("parameters")).filter(|schema| !schema.is_null());
        if parameters.is_some_and(|schema| !schema.is_object()) {
            let what = "no JSON schema, which is an object";
            return Err(wrong(&format!("{field}.parameters"), what));
        }
        let strict = match get("strict") {
            Value::Null => false,
            Value::Bool(strict) => *strict,
            _ => return Err(wrong(&format!("{field}.strict"), "neither true nor false")),
        };
        let (name, parameters) = (name.to_owned(), parameters.cloned());
        let mut function = function.clone();
        // Says how arguments are to be generated, not what the tool is.
        function.shift_remove("strict");
        Ok(Self { name, parameters, strict, function })
    }

    /// As chat templates want it.
    pub(crate) fn described(&self) -> Value {
        json!({"type": "function", "function": self.function})
    }
}

fn wrong(field: &str, what: &str) -> Refusal {
    Refusal::wrong(field, format!("{field} is {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_wrong() {
        let function = |function: Value| json!([{"type": "function", "function": function}]);
        let good = json!({"type": "function", "function": {"name": "f"}});
        for (list, field) in [
            (json!({}), "tools is"),
            (json!([{"type": "custom"}]), "tools[0].type is"),
            (json!([{"type": "function"}]), "tools[0].function is"),
            (function(json!({})), "tools[0].function.name is"),
            (function(json!({"name": "é"})), "tools[0].function.name is"),
            (function(json!({"name": "f".repeat(65)})), "tools[0].function.name is"),
            (function(json!({"name": "f", "description": 1})), "tools[0].function.description is"),
            (function(json!({"name": "f", "parameters": []})), "tools[0].function.parameters is"),
            (function(json!({"name": "f", "strict": 1})), "tools[0].function.strict is"),
            (json!([good, good]), "tools[1] is named"),
            (Value::Array(vec![good; 129]), "tools is a list of 129"),
        ] {
            let refusal = tools(&list, "tools", nested).unwrap_err().to_string();
            assert!(refusal.starts_with(field), "{refusal}");
        }
        let described = function(json!({"name": "f", "parameters": {"type": "object"}, "x": 1}));
        let tool = &tools(&described, "tools", nested).unwrap()[0];
        assert_eq!(tool.parameters, Some(json!({"type": "object"})));
    }
}
