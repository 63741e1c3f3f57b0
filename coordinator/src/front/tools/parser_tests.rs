use proptest::prelude::*;
use serde_json::{Map, Value};

use super::*;
use crate::front::tools::{Answer, Part};

const HERMES: ToolFormat = ToolFormat::Hermes;
const LLAMA: ToolFormat = ToolFormat::Llama3;

/// A call, or text between calls.
#[derive(Debug, PartialEq)]
enum Seen {
    Text(String),
    Whole(String, String),
    Broken(String, String),
}

fn names() -> Vec<String> {
    vec!["f".to_owned(), "find".to_owned()]
}

/// What the parser makes of the pieces.
fn parse(format: ToolFormat, pieces: &[&str]) -> Vec<Piece> {
    let mut parser = ToolParser::new(format, names(), u32::MAX);
    let mut out = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut out);
    }
    parser.finish(&mut out);
    let broken = out.iter().filter(|piece| matches!(piece, Piece::Broken { .. })).count();
    let begun = out.iter().filter(|piece| matches!(piece, Piece::Call { .. })).count();
    assert_eq!(parser.calls() as usize, begun - broken);
    out
}

/// Pieces without the cuts between them.
fn joined(pieces: Vec<Piece>) -> Vec<Seen> {
    let mut parts: Vec<Seen> = Vec::new();
    let mut calls = 0;
    for piece in pieces {
        match (piece, parts.last_mut()) {
            (Piece::Text(text), Some(Seen::Text(before))) => before.push_str(&text),
            (Piece::Text(text), _) => parts.push(Seen::Text(text)),
            (Piece::Call { index, name }, _) => {
                assert_eq!(index, calls);
                calls += 1;
                parts.push(Seen::Whole(name, String::new()));
            }
            (Piece::Arguments { index, text }, Some(Seen::Whole(_, before))) => {
                assert_eq!(index + 1, calls);
                before.push_str(&text);
            }
            (Piece::Broken { index, .. }, Some(Seen::Whole(name, arguments))) => {
                assert_eq!(index + 1, calls);
                let (name, arguments) = (std::mem::take(name), std::mem::take(arguments));
                *parts.last_mut().unwrap() = Seen::Broken(name, arguments);
            }
            (piece, last) => panic!("{piece:?} after {last:?}"),
        }
    }
    parts
}

/// What a call at the beginning of `text` is, and how long.
enum Verdict {
    Whole(String, String, usize),
    Broken(String, String, usize),
    Malformed,
}

fn object(text: &str) -> Option<Map<String, Value>> {
    serde_json::from_str(text).ok()
}

fn argument_of(call: &Map<String, Value>) -> Option<&Value> {
    call.get("arguments").or_else(|| call.get("parameters"))
}

/// The object that begins at `start`.
fn object_at(text: &str, start: usize) -> Option<String> {
    let ends = start + 1..=text.len();
    let mut ends = ends.filter(|&end| text.is_char_boundary(end));
    ends.find_map(|end| object(&text[start..end]).map(|_| text[start..end].to_owned()))
}

/// By asking serde_json about every beginning of the text.
fn judge(text: &str, marked: bool) -> Verdict {
    let may_be = |call: &Map<String, Value>| {
        let name = call.get("name")?.as_str()?.to_owned();
        let known = if marked { !name.is_empty() } else { names().contains(&name) };
        Some((name, known))
    };
    if !text.trim_start_matches(WHITE).is_empty()
        && !text.trim_start_matches(WHITE).starts_with('{')
    {
        return Verdict::Malformed;
    }
    let mut told: Option<(String, usize)> = None;
    let mut unnamed = None;
    let mut end = text.len();
    for length in 1..=text.len() {
        let beginning = &text.as_bytes()[..length];
        // Where the value of the arguments begins.
        if beginning.ends_with(b"{")
            && let Some(call) = object(&format!("{}\"@@\"}}", &text[..length - 1]))
            && argument_of(&call) == Some(&"@@".into())
            && told.is_none()
        {
            match may_be(&call) {
                Some((name, true)) => told = Some((name, length - 1)),
                Some((_, false)) => return Verdict::Malformed,
                None => unnamed = Some(length - 1),
            }
        }
        match serde_json::from_slice::<Value>(beginning) {
            Ok(Value::Object(call)) if told.is_none() => {
                let arguments = match argument_of(&call) {
                    None => Some("{}".to_owned()),
                    Some(Value::Object(_)) => object_at(text, unnamed.unwrap()),
                    Some(Value::String(text)) => object(text).map(|_| text.clone()),
                    Some(_) => None,
                };
                return match (may_be(&call), arguments) {
                    (Some((name, true)), Some(arguments)) => {
                        Verdict::Whole(name, arguments, length)
                    }
                    _ => Verdict::Malformed,
                };
            }
            Ok(_) => {
                end = length;
                break;
            }
            Err(error) if error.is_eof() => {}
            Err(_) => {
                end = length - 1;
                break;
            }
        }
    }
    match told {
        None => Verdict::Malformed,
        Some((name, start)) => match object_at(&text[..end], start) {
            Some(arguments) => Verdict::Whole(name, arguments, end),
            None => Verdict::Broken(name, text[start..end].to_owned(), end),
        },
    }
}

/// Where a call begins in `text`: the white space before it, its object, whether it is marked.
fn start(format: ToolFormat, text: &str, bare: bool, after: bool) -> Option<(usize, usize, bool)> {
    let object = text.trim_start_matches(WHITE);
    let object = match object.strip_prefix(';') {
        Some(behind) if after => behind.trim_start_matches(WHITE),
        _ => object,
    };
    if bare && object.starts_with('{') {
        return Some((0, text.len() - object.len(), false));
    }
    let (before, behind) = text.split_once(format.mark())?;
    Some((before.trim_end_matches(WHITE).len(), text.len() - behind.len(), true))
}

/// The whole text at once, looked through byte by byte.
fn brute_force(format: ToolFormat, mut text: &str) -> Vec<Seen> {
    let mut parts = vec![Seen::Text(String::new())];
    let (mut bare, mut after) = (format == LLAMA, false);
    let plain = |parts: &mut Vec<Seen>, text: &str| match parts.last_mut() {
        Some(Seen::Text(before)) => before.push_str(text),
        _ => parts.push(Seen::Text(text.to_owned())),
    };
    while let Some((before, begin, marked)) = start(format, text, bare, after) {
        let verdict = judge(&text[begin..], marked);
        let length = match &verdict {
            Verdict::Malformed => {
                plain(&mut parts, &text[..begin]);
                0
            }
            Verdict::Whole(.., length) | Verdict::Broken(.., length) => {
                plain(&mut parts, &text[..before]);
                *length
            }
        };
        text = &text[begin + length..];
        (bare, after) = (false, false);
        match verdict {
            Verdict::Malformed => {}
            Verdict::Broken(name, arguments, _) => parts.push(Seen::Broken(name, arguments)),
            Verdict::Whole(name, arguments, _) => {
                parts.push(Seen::Whole(name, arguments));
                (bare, after) = (format == LLAMA, true);
                let rest = text.trim_start_matches(WHITE);
                match format.end_mark() {
                    Some(mark) if mark.starts_with(rest) => text = "",
                    Some(mark) => text = rest.strip_prefix(mark).unwrap_or(text),
                    None => {}
                }
            }
        }
    }
    if !(after && text.trim_matches(WHITE).is_empty()) {
        plain(&mut parts, text);
    }
    parts.retain(|part| *part != Seen::Text(String::new()));
    parts
}

/// Cuts a text at these places, each modulo its length.
fn cut<'a>(text: &'a str, places: &[usize]) -> Vec<&'a str> {
    let mut cuts: Vec<usize> = places.iter().map(|place| place % (text.len() + 1)).collect();
    cuts.extend([0, text.len()]);
    cuts.retain(|&at| text.is_char_boundary(at));
    cuts.sort_unstable();
    cuts.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
}

/// Texts that are calls, nearly calls, and other things.
fn output(arguments: &'static str) -> impl Strategy<Value = String> {
    let call = move |name: &str, value: &str| {
        format!("{{\"name\": \"{name}\", \"{arguments}\": {value}}}")
    };
    let whole = prop_oneof![
        Just(call("f", r#"{"a": [1, {"b": "}"}], "é": "\n"}"#)),
        Just(call("find", "{}")),
        Just(call("g", r#"{"name": "f"}"#)),
        Just(call("f", r#""{\"a\": 1}""#)),
        Just(call("f", "[1]")),
        Just(format!(r#" {{"{arguments}": {{"x": {{}}}}, "type": "function", "name": "f"}}"#)),
        Just(r#"{"name": "f"}"#.to_owned()),
        Just(r#"{"a": 1}"#.to_owned()),
    ];
    let marked = (whole.clone(), 0usize..80, any::<bool>()).prop_map(|(call, keep, all)| {
        let mut keep = if all { call.len() } else { keep.min(call.len()) };
        while !call.is_char_boundary(keep) {
            keep += 1;
        }
        format!("<tool_call>\n{}", &call[..keep])
    });
    let part = prop_oneof![
        3 => marked,
        3 => whole,
        3 => Just("</tool_call>".to_owned()),
        2 => Just("<|python_tag|>".to_owned()),
        1 => "[ \n;{}\",:a<é]{1,3}",
        1 => Just("<tool_ca".to_owned()),
        1 => Just("\n</tool_".to_owned()),
        1 => Just("\n".to_owned()),
        1 => Just("; ".to_owned()),
        1 => Just("Let me see.".to_owned()),
    ];
    proptest::collection::vec(part, 0..7).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn hermes_agrees_with_brute_force(
        text in output("arguments"),
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
    ) {
        let pieces = cut(&text, &cuts);
        prop_assert_eq!(joined(parse(HERMES, &pieces)), brute_force(HERMES, &text), "{:?}", text);
    }

    #[test]
    fn llama_agrees_with_brute_force(
        text in output("parameters"),
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
    ) {
        let text = text.replace("<tool_call>\n", "");
        let pieces = cut(&text, &cuts);
        prop_assert_eq!(joined(parse(LLAMA, &pieces)), brute_force(LLAMA, &text), "{:?}", text);
    }

    #[test]
    fn nothing_is_lost_where_there_is_no_call(text in "[ab<é \n{}\":;tool_c>/]{0,40}") {
        for format in [HERMES, LLAMA] {
            let pieces: Vec<String> = text.chars().map(String::from).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let mut answer = Answer::default();
            parse(format, &pieces).into_iter().for_each(|piece| answer.add(piece));
            prop_assert_eq!(&answer.text(), &text);
        }
    }
}

fn text(text: &str) -> Piece {
    Piece::Text(text.to_owned())
}

fn call(index: u32, name: &str) -> Piece {
    Piece::Call { index, name: name.to_owned() }
}

fn arguments(index: u32, text: &str) -> Piece {
    Piece::Arguments { index, text: text.to_owned() }
}

#[test]
fn hermes_calls_come_as_they_are_written() {
    let mut parser = ToolParser::new(HERMES, Vec::new(), u32::MAX);
    let mut push = |piece: &str| {
        let mut out = Vec::new();
        parser.push(piece, &mut out);
        out
    };
    assert_eq!(push("Let me see.\n<tool_"), [text("Let me see.")]);
    assert_eq!(push("call>\n{\"name\": \"find\", "), []);
    assert_eq!(push("\"arguments\": {\"city\""), [call(0, "find"), arguments(0, "{\"city\"")]);
    assert_eq!(push(": \"Oslo\"}"), [arguments(0, ": \"Oslo\"}")]);
    assert_eq!(push("}\n</tool_call>\n"), []);
    let second = push("<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call> done");
    assert_eq!(second, [call(1, "f"), arguments(1, "{}"), text(" done")]);
    assert_eq!(parser.calls(), 2);
}

#[test]
fn llama_calls_are_the_whole_output_or_marked() {
    let both = r#"{"name": "f", "parameters": {}}; {"name": "find", "parameters": {"a": 1}}"#;
    let expected =
        vec![call(0, "f"), arguments(0, "{}"), call(1, "find"), arguments(1, "{\"a\": 1}")];
    assert_eq!(parse(LLAMA, &[both]), expected);
    let marked = "Sure. <|python_tag|>{\"name\": \"other\", \"parameters\": {}}";
    let expected = vec![text("Sure."), call(0, "other"), arguments(0, "{}")];
    assert_eq!(parse(LLAMA, &[marked]), expected);
    for plain in [
        r#"Sure: {"name": "f", "parameters": {}}"#,
        r#"{"name": "Kestrel", "city": "Oslo"}"#,
        "<|python_tag|>print(1)",
    ] {
        assert_eq!(parse(LLAMA, &[plain]), [text(plain)]);
    }
}

#[test]
fn a_call_that_breaks_off_is_text_of_the_whole_answer() {
    let cut_off = "Ok.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": ";
    let wrong = format!("{cut_off}oops}}}}\n</tool_call>");
    for written in [cut_off, &wrong] {
        let mut answer = Answer::default();
        parse(HERMES, &[written]).into_iter().for_each(|piece| answer.add(piece));
        assert_eq!(answer.parts, [Part::Text(written.to_owned())]);
    }
    let streamed = parse(HERMES, &[&wrong]);
    assert_eq!(streamed[1..3], [call(0, "f"), arguments(0, "{\"a\": ")]);
    assert_eq!(streamed[4..], [text("oops}}\n</tool_call>")]);
}

#[test]
fn a_forgotten_bracket_or_end_does_not_spoil_a_call() {
    let written = "<tool_call>{\"name\": \"f\", \"arguments\": {}";
    for end in ["", "}", "</tool_call>", "}\n", "}\n</tool_ca"] {
        let expected = vec![call(0, "f"), arguments(0, "{}")];
        assert_eq!(parse(HERMES, &[written, end]), expected, "{end:?}");
    }
}

#[test]
fn behind_the_last_call_that_is_allowed_everything_is_text() {
    let mut parser = ToolParser::new(HERMES, Vec::new(), 1);
    let one = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let mut out = Vec::new();
    parser.push(&one.repeat(2), &mut out);
    parser.finish(&mut out);
    assert_eq!(out, [call(0, "f"), arguments(0, "{}"), text(one)]);
}
