//! Stop strings: an incremental matcher over the text of one output.
//!
//! Text leaves the matcher only when it cannot be part of a stop string any more, so a client
//! never sees the beginning of one. The outcome does not depend on how the text is cut into
//! pieces: the occurrence that ends first wins, the longest of those.

/// Looks for stop strings in a text that arrives in pieces.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// The end of the text so far: the longest one with which a stop string may begin.
    held: String,
}

/// A stop string was found; the text before it is what [`StopMatcher::push`] has given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Index of the stop string.
    pub stop: usize,
}

impl StopMatcher {
    /// A matcher for `stops`, none of them empty.
    #[must_use]
    pub fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// The stop strings.
    #[must_use]
    pub fn stops(&self) -> &[String] {
        &self.stops
    }

    /// Takes the next piece and appends to `out` what can no longer belong to a stop string.
    /// Occurrences that end in a piece with `may_stop == false` are ordinary text. Nothing may be
    /// pushed after a match.
    pub fn push(&mut self, piece: &str, may_stop: bool, out: &mut String) -> Option<Stopped> {
        if self.stops.is_empty() {
            out.push_str(piece);
            return None;
        }
        let before = self.held.len();
        self.held.push_str(piece);
        if may_stop && let Some((start, stop)) = self.first_match(before) {
            out.push_str(&self.held[..start]);
            self.held.clear();
            return Some(Stopped { stop });
        }
        let keep = self.longest_beginning();
        let free = self.held.len() - keep;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
        None
    }

    /// Ends the text: what was held back is ordinary text.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// `(start, index)` of the occurrence in `held` that ends first, after the byte `before`.
    fn first_match(&self, before: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize, usize)> = None;
        for (index, stop) in self.stops.iter().enumerate() {
            let mut from = (before + 1).saturating_sub(stop.len());
            while !self.held.is_char_boundary(from) {
                from += 1;
            }
            let Some(offset) = self.held[from..].find(stop.as_str()) else {
                continue;
            };
            let start = from + offset;
            let end = start + stop.len();
            if best.is_none_or(|(e, s, _)| (end, start) < (e, s)) {
                best = Some((end, start, index));
            }
        }
        best.map(|(_, start, index)| (start, index))
    }

    /// Length of the longest end of `held` that is the beginning of a stop string, not all of it.
    fn longest_beginning(&self) -> usize {
        let text = self.held.as_bytes();
        let longest_stop = self.stops.iter().map(String::len).max().unwrap_or(0);
        let most = text.len().min(longest_stop.saturating_sub(1));
        let begins = |length: usize| {
            let end = &text[text.len() - length..];
            let mut stops = self.stops.iter();
            stops.any(|stop| stop.len() > length && stop.as_bytes().starts_with(end))
        };
        (1..=most).rev().find(|&length| begins(length)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The whole text at once, looked through byte by byte.
    fn brute_force(stops: &[String], pieces: &[(String, bool)]) -> (String, Option<usize>) {
        let mut text = String::new();
        for (piece, may_stop) in pieces {
            let before = text.len();
            text.push_str(piece);
            for end in before + 1..=text.len() {
                let ending = |stop: &&String| text.as_bytes()[..end].ends_with(stop.as_bytes());
                let longest = stops.iter().filter(ending).max_by_key(|stop| stop.len());
                if let Some(stop) = longest.filter(|_| *may_stop) {
                    let index = stops.iter().position(|other| other == stop);
                    return (text[..end - stop.len()].to_owned(), index);
                }
            }
        }
        (text, None)
    }

    fn run(stops: &[String], pieces: &[(String, bool)]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut out = String::new();
        for (piece, may_stop) in pieces {
            if let Some(stopped) = matcher.push(piece, *may_stop, &mut out) {
                return (out, Some(stopped.stop));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    proptest! {
        #[test]
        fn agrees_with_brute_force(
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            texts in proptest::collection::vec("[abcé]{0,5}", 0..8),
            min_pieces in 0usize..4,
        ) {
            let pieces: Vec<_> =
                texts.into_iter().enumerate().map(|(i, t)| (t, i >= min_pieces)).collect();
            prop_assert_eq!(run(&stops, &pieces), brute_force(&stops, &pieces));
        }

        #[test]
        fn never_takes_back_what_it_gave(
            stops in proptest::collection::vec("[ab]{1,4}", 1..4),
            text in "[abc]{0,20}",
        ) {
            let pieces: Vec<_> = text.chars().map(|c| (c.to_string(), true)).collect();
            let (whole, _) = brute_force(&stops, &pieces);
            let mut matcher = StopMatcher::new(stops.clone());
            let mut out = String::new();
            for (piece, _) in &pieces {
                let stopped = matcher.push(piece, true, &mut out).is_some();
                prop_assert!(whole.starts_with(&out), "{out:?} is not the start of {whole:?}");
                if stopped { break; }
            }
        }
    }

    #[test]
    fn holds_back_only_what_may_become_a_stop_string() {
        let mut matcher = StopMatcher::new(vec!["\n\nUser:".into()]);
        let mut out = String::new();
        assert_eq!(matcher.push("Oslo.\n\nUs", true, &mut out), None);
        assert_eq!(out, "Oslo.");
        assert_eq!(matcher.push("eful", true, &mut out), None);
        assert_eq!(out, "Oslo.\n\nUseful");
        assert_eq!(matcher.push("\n\nUser: hi", true, &mut out), Some(Stopped { stop: 0 }));
        assert_eq!(out, "Oslo.\n\nUseful");
    }
}
