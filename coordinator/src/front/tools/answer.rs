//! A whole output: texts and calls in their order.

use super::Piece;

/// A whole call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The tool's name.
    pub name: String,
    /// A JSON object.
    pub arguments: String,
}

/// A part of a whole output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Plain text, not empty.
    Text(String),
    /// A whole call.
    Call(ToolCall),
}

/// A whole output. A call that broke off is text in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// In their order; texts are not neighbours.
    pub parts: Vec<Part>,
}

impl Answer {
    /// Takes the next piece.
    pub fn add(&mut self, piece: Piece) {
        match (piece, self.parts.last_mut()) {
            (Piece::Text(text), Some(Part::Text(before))) => before.push_str(&text),
            (Piece::Text(text), _) => self.parts.push(Part::Text(text)),
            (Piece::Call { name, .. }, _) => {
                self.parts.push(Part::Call(ToolCall { name, arguments: String::new() }));
            }
            (Piece::Arguments { text, .. }, Some(Part::Call(call))) => {
                call.arguments.push_str(&text);
            }
            (Piece::Broken { raw, .. }, Some(Part::Call(_))) => {
                self.parts.pop();
                self.add(Piece::Text(raw));
            }
            (Piece::Arguments { .. } | Piece::Broken { .. }, _) => {
                unreachable!("a call is the last part while it is read")
            }
        }
    }

    /// All plain text.
    #[must_use]
    pub fn text(&self) -> String {
        let text = |part: &Part| match part {
            Part::Text(text) => Some(text.clone()),
            Part::Call(_) => None,
        };
        self.parts.iter().filter_map(text).collect()
    }

    /// The calls.
    pub fn calls(&self) -> impl Iterator<Item = &ToolCall> {
        self.parts.iter().filter_map(|part| match part {
            Part::Text(_) => None,
            Part::Call(call) => Some(call),
        })
    }
}
