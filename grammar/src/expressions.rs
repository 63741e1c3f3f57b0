//! What bounds the time and the stack that regular expressions and grammars cost, beyond their
//! length. Both counts are of signs wherever they stand, also escaped and quoted ones.

use serde_json::Value;

/// Deepest nesting of brackets, which compilers follow with their stack.
const MAX_NESTING: usize = 64;
/// Most signs of repetition. Time grows with their square: with as many it is about 0.1 s.
const MAX_REPETITIONS: usize = 1024;

/// Checks a regular expression or a grammar in Lark's syntax.
pub(crate) fn check(text: &str) -> Result<(), String> {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING {
        return Err(format!(
            "brackets are nested {deepest} deep; it must be at most {MAX_NESTING}"
        ));
    }
    check_repetitions(repetitions(text))
}

/// Checks the regular expressions of a JSON schema together.
pub(crate) fn check_patterns(schema: &Value) -> Result<(), String> {
    check_repetitions(of_patterns(schema)?)
}

fn check_repetitions(count: usize) -> Result<(), String> {
    if count <= MAX_REPETITIONS {
        return Ok(());
    }
    Err(format!("{count} repetitions (*, +, ?, {{}}, ~); it must be at most {MAX_REPETITIONS}"))
}

fn repetitions(text: &str) -> usize {
    text.bytes().filter(|byte| matches!(byte, b'*' | b'+' | b'?' | b'{' | b'~')).count()
}

/// A property may be called `pattern`, too; its schema is an object then.
fn of_patterns(schema: &Value) -> Result<usize, String> {
    let mut count = 0;
    match schema {
        Value::Array(all) => {
            for one in all {
                count += of_patterns(one)?;
            }
        }
        Value::Object(fields) => {
            for (name, value) in fields {
                match (name.as_str(), value) {
                    ("pattern", Value::String(pattern)) => {
                        check(pattern)?;
                        count += repetitions(pattern);
                    }
                    ("patternProperties", Value::Object(patterns)) => {
                        patterns.keys().try_for_each(|pattern| check(pattern))?;
                        count += patterns.keys().map(|key| repetitions(key)).sum::<usize>();
                        count += of_patterns(value)?;
                    }
                    _ => count += of_patterns(value)?,
                }
            }
        }
        _ => {}
    }
    Ok(count)
}
