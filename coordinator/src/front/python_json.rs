//! JSON as Python's `json.dumps` writes it: models were trained on prompts that contain it.

use std::fmt::Write;

use serde_json::Value;

/// Arguments of `json.dumps`.
#[derive(Clone, Debug, Default)]
pub(super) struct Style {
    /// Escape everything outside ASCII.
    pub ascii: bool,
    /// Objects in the order of their keys.
    pub sort_keys: bool,
    /// One element per line, indented by this.
    pub indent: Option<usize>,
    /// Between elements and after a key; by default `", "` (`","` with indent) and `": "`.
    pub separators: Option<[String; 2]>,
}

/// Writes a value.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write_value(value, style, 0, &mut out);
    out
}

fn write_value(value: &Value, style: &Style, depth: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) if number.is_f64() => {
            write_float(number.as_f64().expect("is_f64"), out);
        }
        Value::Number(number) => write!(out, "{number}").expect("a string takes all"),
        Value::String(text) => write_string(text, style.ascii, out),
        Value::Array(values) => {
            let items = values.iter().map(|value| (None, value));
            write_items('[', items.collect(), ']', style, depth, out);
        }
        Value::Object(map) => {
            let mut items: Vec<_> = map.iter().map(|(key, value)| (Some(key), value)).collect();
            if style.sort_keys {
                items.sort_by_key(|(key, _)| *key);
            }
            write_items('{', items, '}', style, depth, out);
        }
    }
}

fn write_items(
    open: char,
    items: Vec<(Option<&String>, &Value)>,
    close: char,
    style: &Style,
    depth: usize,
    out: &mut String,
) {
    let default = if style.indent.is_some() { [",", ": "] } else { [", ", ": "] };
    let [between, after_key] = match &style.separators {
        Some([between, after_key]) => [between.as_str(), after_key.as_str()],
        None => default,
    };
    let new_line = |depth: usize, out: &mut String| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for (index, (key, value)) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(between);
        }
        new_line(depth + 1, out);
        if let Some(key) = key {
            write_string(key, style.ascii, out);
            out.push_str(after_key);
        }
        write_value(value, style, depth + 1, out);
    }
    if !items.is_empty() {
        new_line(depth, out);
    }
    out.push(close);
}

fn write_string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && !(' '..='~').contains(&c)) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}").expect("a string takes all");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr`: the shortest digits, with an exponent outside of 1e-4 to 1e16.
fn write_float(value: f64, out: &mut String) {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("{:e} writes an exponent");
    let exponent: i32 = exponent.parse().expect("{:e} writes a number after the e");
    let written = if value == 0.0 || (-4..16).contains(&exponent) {
        write!(out, "{value:?}")
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.abs())
    };
    written.expect("a string takes all");
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn writes_what_python_writes() {
        let value = json!({"b": [1, -2, 1.0, 0.1, 1e16, 1e-5, 123456789.125, 1.5e300], "a": {}});
        let plain = r#"{"b": [1, -2, 1.0, 0.1, 1e+16, 1e-05, 123456789.125, 1.5e+300], "a": {}}"#;
        assert_eq!(dumps(&value, &Style::default()), plain);
        let indented = Style { indent: Some(2), sort_keys: true, ..Style::default() };
        let value = json!({"b": [1, {"x": null}], "a": []});
        let expected =
            "{\n  \"a\": [],\n  \"b\": [\n    1,\n    {\n      \"x\": null\n    }\n  ]\n}";
        assert_eq!(dumps(&value, &indented), expected);
        let tight = Style { separators: Some([",".into(), ":".into()]), ..Style::default() };
        assert_eq!(dumps(&value, &tight), r#"{"b":[1,{"x":null}],"a":[]}"#);
    }

    #[test]
    fn escapes_what_python_escapes() {
        let text = json!("\"\\/\n\u{8}\u{1}\u{7f}é🚚<&'");
        let loose = "\"\\\"\\\\/\\n\\b\\u0001\u{7f}é🚚<&'\"";
        assert_eq!(dumps(&text, &Style::default()), loose);
        let ascii = Style { ascii: true, ..Style::default() };
        let strict = r#""\"\\/\n\b\u0001\u007f\u00e9\ud83d\ude9a<&'""#;
        assert_eq!(dumps(&text, &ascii), strict);
    }
}
