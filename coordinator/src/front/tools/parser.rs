//! From the text of one output to plain text and calls of tools, as it comes.
//!
//! The outcome does not depend on how the text is cut into pieces. What turns out to be no call is
//! plain text, and so is everything behind the byte at which a call whose name was told breaks off.
//! White space around a call is part of the format.

use super::ToolFormat;
use super::call::{CallReader, News, Read};

/// What JSON takes for white space.
const WHITE: [char; 4] = [' ', '\t', '\r', '\n'];

/// What became known of an output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Plain text.
    Text(String),
    /// Call number `index` begins.
    Call {
        /// Counts from 0.
        index: u32,
        /// The tool's name.
        name: String,
    },
    /// The text of the call's arguments, a JSON object, goes on.
    Arguments {
        /// Which call's.
        index: u32,
        /// What follows.
        text: String,
    },
    /// The call breaks off within its arguments.
    Broken {
        /// Which one.
        index: u32,
        /// All of the call as the model wrote it.
        raw: String,
    },
}

/// Looks for calls in a text that arrives in pieces.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// Names of the tools that the model was told of.
    names: Vec<String>,
    most_calls: u32,
    state: State,
    /// Text that is not decided.
    held: String,
    /// A call needs no mark here: nothing but calls came before.
    bare: bool,
    /// Nothing but white space came since the last call.
    after_call: bool,
    /// Calls that were told.
    told: u32,
    /// Those of them that were whole.
    whole: u32,
}

#[derive(Clone, Debug)]
enum State {
    Text,
    Call {
        /// What came before the call's object: white space and a mark.
        lead: String,
        /// The call is marked, so that it may be of any name.
        marked: bool,
        reader: CallReader,
    },
    /// Behind a call's object, before the mark that ends the call.
    End,
}

impl ToolParser {
    /// A parser of an output of a model that was told of tools with these names. Behind
    /// `most_calls` calls everything is plain text.
    #[must_use]
    pub fn new(format: ToolFormat, names: Vec<String>, most_calls: u32) -> Self {
        Self {
            format,
            names,
            most_calls,
            state: State::Text,
            held: String::new(),
            bare: format == ToolFormat::Llama3,
            after_call: false,
            told: 0,
            whole: 0,
        }
    }

    /// How many whole calls there were.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.whole
    }

    /// Takes the next piece of text and appends what became known.
    pub fn push(&mut self, piece: &str, out: &mut Vec<Piece>) {
        self.held.push_str(piece);
        while self.advance(out) {}
    }

    /// Ends the output: what was held back is known now.
    pub fn finish(&mut self, out: &mut Vec<Piece>) {
        loop {
            while self.advance(out) {}
            match self.state {
                State::Call { .. } => self.give_up(out),
                State::Text if !(self.after_call && self.held.trim_matches(WHITE).is_empty()) => {
                    let rest = std::mem::take(&mut self.held);
                    return self.text(&rest, out);
                }
                State::Text | State::End => return self.held.clear(),
            }
        }
    }

    /// Makes of `held` what can be made; true if there may be more.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match self.state {
            State::Text => self.look_for_call(out),
            State::Call { .. } => self.read_call(out),
            State::End => self.look_for_end(),
        }
    }

    fn look_for_call(&mut self, out: &mut Vec<Piece>) -> bool {
        let found = if self.told < self.most_calls { self.find_call() } else { None };
        let Some((start, end, marked)) = found else {
            let free = self.held.len() - self.undecided();
            let text: String = self.held.drain(..free).collect();
            self.text(&text, out);
            return false;
        };
        let rest = self.held.split_off(end);
        let lead = self.held.split_off(start);
        let text = std::mem::replace(&mut self.held, rest);
        self.text(&text, out);
        self.state = State::Call { lead, marked, reader: CallReader::new() };
        true
    }

    /// Where in `held` the white space before a call begins, where the call's object does, and
    /// whether there is a mark between the two.
    fn find_call(&self) -> Option<(usize, usize, bool)> {
        if self.bare && self.object_or_nothing().starts_with('{') {
            return Some((0, self.held.len() - self.object_or_nothing().len(), false));
        }
        let at = self.held.find(self.format.mark())?;
        let start = self.held[..at].trim_end_matches(WHITE).len();
        Some((start, at + self.format.mark().len(), true))
    }

    /// `held` without what may stand before a call that is not marked.
    fn object_or_nothing(&self) -> &str {
        let rest = self.held.trim_start_matches(WHITE);
        match rest.strip_prefix(';') {
            Some(behind) if self.after_call => behind.trim_start_matches(WHITE),
            _ => rest,
        }
    }

    /// Length of the end of `held` with which a call may begin.
    fn undecided(&self) -> usize {
        if self.told >= self.most_calls {
            return 0;
        }
        if self.bare && self.object_or_nothing().is_empty() {
            return self.held.len();
        }
        let mark = self.format.mark();
        let begins = |length: &usize| self.held.ends_with(&mark[..*length]);
        let length = (1..mark.len()).rev().find(begins).unwrap_or(0);
        let before = &self.held[..self.held.len() - length];
        self.held.len() - before.trim_end_matches(WHITE).len()
    }

    fn read_call(&mut self, out: &mut Vec<Piece>) -> bool {
        let State::Call { reader, marked, .. } = &mut self.state else {
            unreachable!("called while a call is read");
        };
        let piece = std::mem::take(&mut self.held);
        let (names, mut news) = (&self.names, News::default());
        let is_tool = |name: &str| {
            if *marked { !name.is_empty() } else { names.iter().any(|known| known == name) }
        };
        let read = reader.push(&piece, is_tool, &mut news);
        if let Some(name) = news.name {
            out.push(Piece::Call { index: self.told, name });
            self.told += 1;
        }
        if !news.arguments.is_empty() {
            out.push(Piece::Arguments { index: self.told - 1, text: news.arguments });
        }
        match read {
            Read::More => return false,
            Read::Whole(length) => {
                self.held.push_str(&piece[length..]);
                self.end_call();
            }
            Read::Wrong(length) => {
                self.held.push_str(&piece[length..]);
                self.give_up(out);
            }
        }
        true
    }

    fn end_call(&mut self) {
        self.whole += 1;
        self.after_call = true;
        self.bare = self.format == ToolFormat::Llama3;
        let marked = self.format.end_mark().is_some();
        self.state = if marked { State::End } else { State::Text };
    }

    /// The call that is being read does not go on.
    fn give_up(&mut self, out: &mut Vec<Piece>) {
        let State::Call { lead, reader, .. } = std::mem::replace(&mut self.state, State::Text)
        else {
            unreachable!("called while a call is read");
        };
        if reader.has_arguments() {
            return self.end_call();
        }
        self.bare = false;
        self.after_call = false;
        if reader.is_told() {
            let raw = lead + &reader.into_raw();
            return out.push(Piece::Broken { index: self.told - 1, raw });
        }
        self.text(&lead, out);
        self.held.insert_str(0, &reader.into_raw());
    }

    fn look_for_end(&mut self) -> bool {
        let mark = self.format.end_mark().expect("a call of this format has an end");
        let rest = self.held.trim_start_matches(WHITE);
        if let Some(behind) = rest.strip_prefix(mark) {
            self.held = behind.to_owned();
        } else if mark.starts_with(rest) {
            return false;
        }
        self.state = State::Text;
        true
    }

    fn text(&mut self, text: &str, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        if !text.trim_matches(WHITE).is_empty() {
            self.bare = false;
            self.after_call = false;
        }
        match out.last_mut() {
            Some(Piece::Text(before)) => before.push_str(text),
            _ => out.push(Piece::Text(text.to_owned())),
        }
    }
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
