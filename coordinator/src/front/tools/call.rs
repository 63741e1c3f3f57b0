//! One call of a tool: an object with a name and arguments, read as it comes.

use serde_json::{Map, Value};

use super::json::{Does, Scanner};

/// A call whose name and arguments are not known after so many bytes is none.
const MAX_UNDECIDED_BYTES: usize = 64 << 10;

/// Reads `{"name": …, "arguments": {…}}`. `parameters` means the same as `arguments`, both may be
/// missing, keys may come in any order, and further ones are passed over.
#[derive(Clone, Debug)]
pub(super) struct CallReader {
    json: Scanner,
    /// All that was read.
    raw: String,
    /// Where in `raw` the key or the value that is being read begins.
    start: usize,
    /// Of the object's value that is being read.
    key: Key,
    name: Option<String>,
    arguments: Arguments,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Key {
    Name,
    Arguments,
    Other,
}

#[derive(Clone, Debug)]
enum Arguments {
    Missing,
    /// Not an object.
    Wrong,
    /// Read before the call's name was known.
    Whole(String),
    /// Told to the caller up to this byte of `raw`.
    Told(usize),
    /// Told to their end.
    ToldWhole,
}

/// What follows from a piece of text.
#[derive(Debug, PartialEq)]
pub(super) enum Read {
    /// The call goes on after the piece.
    More,
    /// The call ends after so many bytes of the piece.
    Whole(usize),
    /// After so many bytes of the piece there can be no call any more.
    Wrong(usize),
}

/// What a piece of text tells about the call.
#[derive(Debug, Default, PartialEq)]
pub(super) struct News {
    /// The call's name, once.
    pub name: Option<String>,
    /// What follows of its arguments.
    pub arguments: String,
}

impl CallReader {
    /// A call whose object is yet to come.
    pub(super) fn new() -> Self {
        Self {
            json: Scanner::new(),
            raw: String::new(),
            start: 0,
            key: Key::Other,
            name: None,
            arguments: Arguments::Missing,
        }
    }

    /// All that was read.
    pub(super) fn into_raw(self) -> String {
        self.raw
    }

    /// Whether the caller knows of the call.
    pub(super) fn is_told(&self) -> bool {
        matches!(self.arguments, Arguments::Told(_) | Arguments::ToldWhole)
    }

    /// Whether nothing of the call is missing except closing brackets.
    pub(super) fn has_arguments(&self) -> bool {
        matches!(self.arguments, Arguments::ToldWhole)
    }

    /// Takes the next piece. `is_tool` says of a name whether it can be meant.
    pub(super) fn push(
        &mut self,
        piece: &str,
        is_tool: impl Fn(&str) -> bool,
        news: &mut News,
    ) -> Read {
        let before = self.raw.len();
        self.raw.push_str(piece);
        for at in before..self.raw.len() {
            let does = self.json.step(self.raw.as_bytes()[at]);
            let fits = does.is_some_and(|does| self.observe(at, does, &is_tool, news));
            let undecided = !self.is_told() && at >= MAX_UNDECIDED_BYTES;
            if !fits || undecided {
                self.raw.truncate(at);
                self.tell(at, news);
                return Read::Wrong(at - before);
            }
            if self.json.depth() == 0 && does == Some(Does::EndObject) {
                self.raw.truncate(at + 1);
                return Read::Whole(at + 1 - before);
            }
        }
        self.tell(self.raw.len(), news);
        Read::More
    }

    /// Takes note of what the byte at `at` does; false if it makes the call wrong.
    fn observe(
        &mut self,
        at: usize,
        does: Does,
        is_tool: impl Fn(&str) -> bool,
        news: &mut News,
    ) -> bool {
        match (self.json.depth(), does) {
            (0, Does::EndObject) => return self.end(is_tool, news),
            (0, Does::GoOn) => {}
            (0, _) | (1, Does::BeginArray) => return false,
            (1, Does::BeginKey | Does::BeginString) => self.start = at,
            (1, Does::EndKey) => {
                self.key = match self.text(at).as_deref() {
                    Some("name") => Key::Name,
                    Some("arguments" | "parameters") => Key::Arguments,
                    _ => Key::Other,
                };
            }
            (depth, does) => match self.key {
                Key::Name => self.observe_name(at, depth, does),
                Key::Arguments => return self.observe_arguments(at, depth, does, is_tool, news),
                Key::Other => {}
            },
        }
        true
    }

    fn observe_name(&mut self, at: usize, depth: usize, does: Does) {
        match (depth, does) {
            (1, Does::EndString) => self.name = self.text(at),
            (1, Does::BeginScalar) | (2, Does::BeginArray | Does::BeginObject) => self.name = None,
            _ => {}
        }
    }

    fn observe_arguments(
        &mut self,
        at: usize,
        depth: usize,
        does: Does,
        is_tool: impl Fn(&str) -> bool,
        news: &mut News,
    ) -> bool {
        match (&self.arguments, depth, does) {
            (Arguments::Told(_), 1, Does::EndObject) => {
                self.tell(at + 1, news);
                self.arguments = Arguments::ToldWhole;
            }
            (Arguments::Told(_) | Arguments::ToldWhole, ..) => {}
            (_, 2, Does::BeginObject) => match &self.name {
                Some(name) if is_tool(name) => {
                    news.name = Some(name.clone());
                    self.arguments = Arguments::Told(at);
                }
                Some(_) => return false,
                None => self.start = at,
            },
            (_, 1, Does::EndObject) => {
                self.arguments = Arguments::Whole(self.raw[self.start..=at].to_owned());
            }
            // Some models write the object as a string.
            (_, 1, Does::EndString) => {
                let object = self.text(at).filter(|text| is_object(text));
                self.arguments = object.map_or(Arguments::Wrong, Arguments::Whole);
            }
            (_, 1, Does::BeginScalar) | (_, 2, Does::BeginArray) => {
                self.arguments = Arguments::Wrong;
            }
            _ => {}
        }
        true
    }

    /// The object has ended; false if it is no call.
    fn end(&mut self, is_tool: impl Fn(&str) -> bool, news: &mut News) -> bool {
        let arguments = match &mut self.arguments {
            Arguments::ToldWhole => return true,
            Arguments::Wrong | Arguments::Told(_) => return false,
            Arguments::Missing => "{}".to_owned(),
            Arguments::Whole(arguments) => std::mem::take(arguments),
        };
        let Some(name) = self.name.take().filter(|name| is_tool(name)) else {
            return false;
        };
        *news = News { name: Some(name), arguments };
        self.arguments = Arguments::ToldWhole;
        true
    }

    /// The string that began at `start` and ends with the quote at `end`; `None` if it is no text.
    fn text(&self, end: usize) -> Option<String> {
        serde_json::from_str(&self.raw[self.start..=end]).ok()
    }

    /// Tells of the arguments up to a byte of `raw`.
    fn tell(&mut self, to: usize, news: &mut News) {
        if let Arguments::Told(from) = &mut self.arguments {
            news.arguments.push_str(&self.raw[*from..to]);
            *from = to;
        }
    }
}

fn is_object(text: &str) -> bool {
    serde_json::from_str::<Map<String, Value>>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Read, News) {
        let (mut reader, mut news) = (CallReader::new(), News::default());
        let read = reader.push(text, |name| name != "unknown", &mut news);
        (read, news)
    }

    fn call(name: &str, arguments: &str) -> News {
        News { name: Some(name.to_owned()), arguments: arguments.to_owned() }
    }

    #[test]
    fn takes_keys_in_any_order_and_arguments_of_either_name() {
        for (text, arguments) in [
            (r#" {"name": "f", "arguments": {"a": [1, {}]}}"#, r#"{"a": [1, {}]}"#),
            (r#"{"parameters": {"a": 1}, "type": "function", "name": "f"}"#, r#"{"a": 1}"#),
            (r#"{"name": "f", "arguments": "{\"a\": 1}"}"#, r#"{"a": 1}"#),
            (r#"{"name": "f"}"#, "{}"),
        ] {
            assert_eq!(read(text), (Read::Whole(text.len()), call("f", arguments)), "{text}");
        }
    }

    #[test]
    fn knows_what_is_no_call() {
        for (text, at) in [
            ("[]", 0),
            ("1", 0),
            (r#"{"name": 1, "arguments": {}}"#, 27),
            (r#"{"arguments": {}}"#, 16),
            (r#"{"name": "f", "arguments": []}"#, 29),
            (r#"{"name": "f", "arguments": "[]"}"#, 31),
            (r#"{"name": "unknown", "arguments": {}}"#, 33),
            (r#"{"name": g}"#, 9),
        ] {
            assert_eq!(read(text), (Read::Wrong(at), News::default()), "{text}");
        }
    }

    #[test]
    fn arguments_are_told_as_they_come() {
        let (mut reader, mut news) = (CallReader::new(), News::default());
        let mut push = |piece: &str| {
            let read = reader.push(piece, |_| true, &mut news);
            (read, std::mem::take(&mut news), reader.is_told(), reader.has_arguments())
        };
        let nothing = News::default();
        let more = |arguments: &str| News { arguments: arguments.to_owned(), ..News::default() };
        assert_eq!(push(r#"{"name": "f", "#), (Read::More, nothing, false, false));
        assert_eq!(push(r#""arguments": {"a"#), (Read::More, call("f", r#"{"a"#), true, false));
        assert_eq!(push(r#"": "é"#), (Read::More, more(r#"": "é"#), true, false));
        assert_eq!(push(r#""}, "#), (Read::More, more(r#""}"#), true, true));
        assert_eq!(push("x"), (Read::Wrong(0), News::default(), true, true));
    }

    #[test]
    fn does_not_hold_back_text_without_limit() {
        let mut reader = CallReader::new();
        let mut news = News::default();
        assert_eq!(reader.push(r#"{"name": ""#, |_| true, &mut news), Read::More);
        let read = reader.push(&"f".repeat(2 * MAX_UNDECIDED_BYTES), |_| true, &mut news);
        assert_eq!(read, Read::Wrong(MAX_UNDECIDED_BYTES - 10));
        assert_eq!(reader.into_raw().len(), MAX_UNDECIDED_BYTES);
    }
}
