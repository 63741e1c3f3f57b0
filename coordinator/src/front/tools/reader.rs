//! Reads an output in which there may be calls of tools, or which is text.

use baton_proto::wire::v1::GenerateResponse;

use super::{Answer, Piece, ToolParser};

/// Reads one output of a request.
#[derive(Clone, Debug, Default)]
pub(crate) struct OutputReader(Option<ToolParser>);

impl OutputReader {
    /// Looks for calls with `parser`; by default the whole output is text.
    pub(crate) fn new(parser: ToolParser) -> Self {
        Self(Some(parser))
    }

    /// What became known with the next message of the output.
    pub(crate) fn take(&mut self, message: &GenerateResponse) -> Vec<Piece> {
        let mut pieces = self.push(&message.text);
        if message.finished.is_some() {
            pieces.extend(self.finish());
        }
        pieces
    }

    fn push(&mut self, text: &str) -> Vec<Piece> {
        match &mut self.0 {
            Some(parser) => {
                let mut pieces = Vec::new();
                parser.push(text, &mut pieces);
                pieces
            }
            None if text.is_empty() => Vec::new(),
            None => vec![Piece::Text(text.to_owned())],
        }
    }

    fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if let Some(parser) = &mut self.0 {
            parser.finish(&mut pieces);
        }
        pieces
    }

    /// How many whole calls there were.
    pub(crate) fn calls(&self) -> u32 {
        self.0.as_ref().map_or(0, ToolParser::calls)
    }

    /// Reads a whole output.
    pub(crate) fn read(mut self, text: &str) -> Answer {
        let mut answer = Answer::default();
        for piece in self.push(text).into_iter().chain(self.finish()) {
            answer.add(piece);
        }
        answer
    }
}
