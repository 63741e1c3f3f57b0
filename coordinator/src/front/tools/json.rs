//! JSON read byte by byte: what each byte does, and the first one that cannot be.

/// Containers within each other; deeper ones count as wrong.
const MAX_DEPTH: usize = 64;

/// What a byte of JSON does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    /// Goes on with what has begun, or separates.
    GoOn,
    BeginObject,
    EndObject,
    BeginArray,
    EndArray,
    /// The quote before a key of an object.
    BeginKey,
    EndKey,
    /// The quote before a string that is a value.
    BeginString,
    EndString,
    /// First byte of a number, `true`, `false` or `null`.
    BeginScalar,
}

/// Reads one JSON value.
#[derive(Clone, Debug)]
pub(super) struct Scanner {
    /// The containers around the next byte: true for an object.
    objects: Vec<bool>,
    expect: Expect,
}

#[derive(Clone, Copy, Debug)]
enum Expect {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    Text { key: bool },
    Escape { key: bool },
    Hex { key: bool, left: u8 },
    Number(Number),
    Literal(&'static [u8]),
}

/// The part of a number that was read last.
#[derive(Clone, Copy, Debug)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl Number {
    fn next(self, byte: u8) -> Option<Self> {
        Some(match (self, byte) {
            (Self::Minus, b'0') => Self::Zero,
            (Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Self::Integer,
            (Self::Zero | Self::Integer, b'.') => Self::Point,
            (Self::Point | Self::Fraction, b'0'..=b'9') => Self::Fraction,
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Self::E,
            (Self::E, b'+' | b'-') => Self::Sign,
            (Self::E | Self::Sign | Self::Exponent, b'0'..=b'9') => Self::Exponent,
            _ => return None,
        })
    }

    fn may_end(self) -> bool {
        matches!(self, Self::Zero | Self::Integer | Self::Fraction | Self::Exponent)
    }
}

impl Scanner {
    pub(super) fn new() -> Self {
        Self { objects: Vec::new(), expect: Expect::Value }
    }

    /// Containers that are open.
    pub(super) fn depth(&self) -> usize {
        self.objects.len()
    }

    /// Takes the next byte; `None` if no JSON goes on with it.
    pub(super) fn step(&mut self, byte: u8) -> Option<Does> {
        match self.expect {
            Expect::Text { key } => self.in_text(byte, key),
            Expect::Escape { key } => match byte {
                b'u' => self.go_on(Expect::Hex { key, left: 4 }),
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => {
                    self.go_on(Expect::Text { key })
                }
                _ => None,
            },
            Expect::Hex { key, left } if byte.is_ascii_hexdigit() => self.go_on(match left {
                1 => Expect::Text { key },
                _ => Expect::Hex { key, left: left - 1 },
            }),
            Expect::Number(part) => match part.next(byte) {
                Some(next) => self.go_on(Expect::Number(next)),
                None if part.may_end() => {
                    self.expect = Expect::CommaOrEnd;
                    self.step(byte)
                }
                None => None,
            },
            Expect::Literal([next, rest @ ..]) if *next == byte => self.go_on(match rest {
                [] => Expect::CommaOrEnd,
                rest => Expect::Literal(rest),
            }),
            Expect::Hex { .. } | Expect::Literal(_) => None,
            _ if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') => Some(Does::GoOn),
            Expect::Value | Expect::ValueOrEnd => self.value(byte),
            Expect::Key | Expect::KeyOrEnd if byte == b'"' => {
                self.go_on(Expect::Text { key: true })?;
                Some(Does::BeginKey)
            }
            Expect::KeyOrEnd if byte == b'}' => self.end(true),
            Expect::Colon if byte == b':' => self.go_on(Expect::Value),
            Expect::CommaOrEnd => match (byte, self.objects.last()?) {
                (b',', true) => self.go_on(Expect::Key),
                (b',', false) => self.go_on(Expect::Value),
                (b'}', true) => self.end(true),
                (b']', false) => self.end(false),
                _ => None,
            },
            Expect::Key | Expect::KeyOrEnd | Expect::Colon => None,
        }
    }

    fn go_on(&mut self, expect: Expect) -> Option<Does> {
        self.expect = expect;
        Some(Does::GoOn)
    }

    fn in_text(&mut self, byte: u8, key: bool) -> Option<Does> {
        match byte {
            b'"' if key => {
                self.expect = Expect::Colon;
                Some(Does::EndKey)
            }
            b'"' => {
                self.expect = Expect::CommaOrEnd;
                Some(Does::EndString)
            }
            b'\\' => self.go_on(Expect::Escape { key }),
            0..0x20 => None,
            _ => Some(Does::GoOn),
        }
    }

    fn value(&mut self, byte: u8) -> Option<Does> {
        let (expect, does) = match byte {
            b'{' => return self.begin(true),
            b'[' => return self.begin(false),
            b']' if matches!(self.expect, Expect::ValueOrEnd) => return self.end(false),
            b'"' => (Expect::Text { key: false }, Does::BeginString),
            b'-' => (Expect::Number(Number::Minus), Does::BeginScalar),
            b'0' => (Expect::Number(Number::Zero), Does::BeginScalar),
            b'1'..=b'9' => (Expect::Number(Number::Integer), Does::BeginScalar),
            b't' => (Expect::Literal(b"rue"), Does::BeginScalar),
            b'f' => (Expect::Literal(b"alse"), Does::BeginScalar),
            b'n' => (Expect::Literal(b"ull"), Does::BeginScalar),
            _ => return None,
        };
        self.expect = expect;
        Some(does)
    }

    fn begin(&mut self, object: bool) -> Option<Does> {
        if self.objects.len() == MAX_DEPTH {
            return None;
        }
        self.objects.push(object);
        self.expect = if object { Expect::KeyOrEnd } else { Expect::ValueOrEnd };
        Some(if object { Does::BeginObject } else { Does::BeginArray })
    }

    fn end(&mut self, object: bool) -> Option<Does> {
        self.objects.pop();
        self.expect = Expect::CommaOrEnd;
        Some(if object { Does::EndObject } else { Does::EndArray })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// `Ok` if a whole container was read, else how many bytes could be.
    fn scan(text: &str) -> Result<(), usize> {
        let mut scanner = Scanner::new();
        for (at, byte) in text.bytes().enumerate() {
            scanner.step(byte).ok_or(at)?;
            if scanner.depth() == 0 && at + 1 == text.len() {
                return Ok(());
            }
        }
        Err(text.len())
    }

    /// The same by serde_json, which is asked about every beginning of the text.
    fn brute_force(text: &str) -> Result<(), usize> {
        let fits = |end: &usize| match serde_json::from_slice::<Value>(&text.as_bytes()[..*end]) {
            Ok(_) => true,
            Err(error) => error.is_eof(),
        };
        let wrong = (1..=text.len()).find(|end| !fits(end));
        match wrong {
            Some(end) => Err(end - 1),
            None if serde_json::from_str::<Value>(text).is_ok() => Ok(()),
            None => Err(text.len()),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_serde_json(
            parts in proptest::collection::vec(
                prop_oneof![
                    Just("{"), Just("}"), Just("["), Just("]"), Just(","), Just(":"), Just("\""),
                    Just("\"a\":"), Just("\"é\""), Just("\\n"), Just("\\u00e9"), Just("\\"),
                    Just("-"), Just("0"), Just("12"), Just("."), Just("e"), Just("+"), Just("true"),
                    Just("null"), Just("fals"), Just(" "), Just("\n"), Just("x"), Just("{}"),
                ],
                0..12,
            ),
        ) {
            let text = format!("[{}", parts.concat());
            prop_assert_eq!(scan(&text), brute_force(&text), "{}", text);
        }
    }

    #[test]
    fn takes_json_and_nothing_else() {
        let whole = r#"{"a": [1, -0.5e+3, true, null, {}, []], "b\u00e9\\\"": "x"}"#;
        assert_eq!(scan(whole), Ok(()));
        for (wrong, at) in [("[01]", 2), ("[1,]", 3), ("{a}", 1), ("[\"\n\"]", 2), ("[1}", 2)] {
            assert_eq!(scan(wrong), Err(at), "{wrong}");
        }
        assert_eq!(scan(&"[".repeat(1000)), Err(MAX_DEPTH));
    }
}
