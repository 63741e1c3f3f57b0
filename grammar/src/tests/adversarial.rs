//! Grammars that are made to take long, or much stack.

use baton_proto::grammar::MAX_GRAMMAR_BYTES;

use super::*;

fn repeat(text: &str) -> String {
    text.repeat(MAX_GRAMMAR_BYTES / text.len())
}

fn nested(open: &str, middle: &str, close: &str) -> String {
    let depth = (MAX_GRAMMAR_BYTES - middle.len()) / (open.len() + close.len());
    format!("{}{middle}{}", open.repeat(depth), close.repeat(depth))
}

#[test]
fn they_end() {
    let schema = |text: String| Grammar::JsonSchema(text);
    let chain: Vec<String> = (0..20)
        .map(|n| {
            format!(
                r##""d{n}":{{"anyOf":[{{"$ref":"#/$defs/d{0}"}},{{"$ref":"#/$defs/d{0}"}}]}}"##,
                n + 1
            )
        })
        .collect();
    let all = [
        Grammar::Regex(nested("(", "a", ")")),
        Grammar::Regex(nested("(?:", "a", ")*")),
        Grammar::Regex(nested("[", "a", "]")),
        Grammar::Regex(repeat("a|")),
        Grammar::Regex(repeat("a*")),
        Grammar::Regex("(a|b)*c?".repeat(500)),
        Grammar::Regex("a*".repeat(1000)),
        Grammar::Regex("a?".repeat(1000)),
        Grammar::Regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}".to_owned()),
        Grammar::Regex("(a|aa|aaa)*b{5000}(c|d)*[e-z]{0,60000}".to_owned()),
        Grammar::Regex("(.*a){20}.*b(.*c){20}".to_owned()),
        Grammar::Regex(repeat("\\p{L}{0,100}")),
        Grammar::Regex(format!("{}a", repeat("(?i)"))),
        Grammar::Lark(format!("start: {}", nested("(", "\"a\"", ")").split_at(8).1)),
        Grammar::Lark(format!("start: {}\"a\"", repeat("~").split_at(8).1)),
        Grammar::Lark(format!("start: A\nA: {}", "B ".repeat(30_000))),
        Grammar::Lark("start: A\nA: /a/ & ~/(b|c)*d{900}/ & /([a-z]{0,50}x){90}/".to_owned()),
        Grammar::Lark("start: %json {\"type\": \"object\"} | @other".to_owned()),
        schema(nested(r#"{"items":"#, "{}", "}")),
        schema(nested("[", "", "]")),
        schema(format!(r##"{{"$defs":{{{},"d20":{{}}}},"$ref":"#/$defs/d0"}}"##, chain.join(","))),
        schema(json!({"allOf": vec![json!({"properties": {"a": {"pattern": "a.*b.*c"}}}); 900]}).to_string()),
        schema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000_000}).to_string()),
        schema(json!({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}}).to_string()),
        schema(json!({"type": "integer", "multipleOf": 999_983, "minimum": -1e300}).to_string()),
        schema(json!({"type": "string", "pattern": "(a{1,500}){1,500}", "format": "email"}).to_string()),
        schema(json!({"enum": (0..9000).map(|n| n.to_string()).collect::<Vec<_>>()}).to_string()),
        schema(json!({"properties": (0..1500).map(|n| (format!("property{n}"), json!({"type": "string"}))).collect::<serde_json::Map<_, _>>()}).to_string()),
        schema(r##"{"$ref":"#"}"##.to_owned()),
        schema(r##"{"allOf":[{"$ref":"#"}]}"##.to_owned()),
        Grammar::Choice((0..1024).map(|n| "a".repeat(n % 64)).collect()),
        Grammar::Choice(vec![repeat("\\")]),
    ];
    let shared = grammars();
    for grammar in all {
        let began = std::time::Instant::now();
        let name: String = format!("{grammar:?}").chars().take(90).collect();
        let grammar = Arc::new(grammar);
        let compiled = shared.guide(&grammar);
        let compile = began.elapsed();
        let outcome = compiled.and_then(|mut guide| {
            for _ in 0..20 {
                let mask = guide.mask(ENDS)?;
                let next = (0..VOCAB as u32).rev().filter(|token| *token != EOS);
                let Some(next) = { next }.find(|token| mask.allows(*token)) else { break };
                guide.accept(&[next])?;
            }
            Ok(())
        });
        println!("{compile:>9.1?} {:>9.1?} {outcome:?} {name}", began.elapsed() - compile);
    }
}
