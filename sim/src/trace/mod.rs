//! Requests that a service once received: when, how long, and which prefixes they shared.
//!
//! - JSON lines as Mooncake published them, one request per line:
//!   `{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 14, 15]}`.
//!   `timestamp` is in milliseconds, lengths are in tokens. `hash_ids` names the blocks of the
//!   prompt, the last one possibly partial; an id stands for the whole prefix that ends with its
//!   block. A log of one's own needs no more than these fields; others are ignored, and without
//!   `hash_ids` nothing is shared.
//! - Comma-separated values as Azure published them, with the columns `TIMESTAMP`, `ContextTokens`
//!   and `GeneratedTokens`. Nothing is known of prefixes, so nothing is shared.
//!
//! Sources: <https://github.com/kvcache-ai/Mooncake> (FAST'25 release) and
//! <https://github.com/Azure/AzurePublicDataset>.

mod azure;
mod mooncake;

use std::path::Path;

/// Tokens of a prompt or an answer, at most: a larger figure is a mistake in the trace.
const MOST_TOKENS: u32 = 16 << 20;
/// Size of a trace file, at most.
const MOST_BYTES: u64 = 4 << 30;

/// What arrived, ordered by time.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Tokens per block of `Request::blocks`.
    pub block_tokens: u32,
    /// The requests, by arrival.
    pub requests: Vec<Request>,
    /// How many different blocks there are: names are smaller than this.
    pub unique_blocks: u32,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// When it came, from the beginning of the trace.
    pub arrival_ms: f64,
    /// Length of its prompt, at least 1.
    pub input_tokens: u32,
    /// Length of its answer, at least 1.
    pub output_tokens: u32,
    /// Names of the prompt's blocks, the last one possibly partial. A name stands for the whole
    /// prefix that ends with its block. Empty: no other request shares any.
    pub blocks: Box<[u32]>,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Unreadable {
        /// Its name.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than traces are.
    #[error("{file}: {bytes} bytes, and at most {MOST_BYTES} are read")]
    TooLarge {
        /// Its name.
        file: String,
        /// Its size.
        bytes: u64,
    },
    /// There is no request in it.
    #[error("{file}: there is no request in it")]
    Empty {
        /// Its name.
        file: String,
    },
    /// A line is not what it should be.
    #[error("{file}, line {line}: {problem}")]
    Line {
        /// The file's name.
        file: String,
        /// Its number, from 1.
        line: usize,
        /// What is wrong, naming the field.
        problem: String,
    },
}

/// A line's number, from 1, and what is wrong with it.
type Malformed = (usize, String);

impl Request {
    /// Blocks that the prompt fills; only these can be shared.
    #[must_use]
    pub fn full_blocks(&self, block_tokens: u32) -> &[u32] {
        let full = (self.input_tokens / block_tokens) as usize;
        &self.blocks[..full.min(self.blocks.len())]
    }
}

impl Trace {
    /// Reads a trace, in the form that its first line shows.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, has no request, or has a malformed line.
    pub fn read(file: &Path, block_tokens: u32) -> Result<Self, TraceError> {
        let name = file.display().to_string();
        let unreadable = |source| TraceError::Unreadable { file: name.clone(), source };
        let bytes = std::fs::metadata(file).map_err(unreadable)?.len();
        if bytes > MOST_BYTES {
            return Err(TraceError::TooLarge { file: name, bytes });
        }
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        let trace = Self::parse(&text, block_tokens)
            .map_err(|(line, problem)| TraceError::Line { file: name.clone(), line, problem })?;
        if trace.requests.is_empty() {
            return Err(TraceError::Empty { file: name });
        }
        Ok(trace)
    }

    fn parse(text: &str, block_tokens: u32) -> Result<Self, Malformed> {
        let first = text.trim_start_matches('\u{feff}').trim_start();
        let (mut requests, unique_blocks) = if first.is_empty() || first.starts_with('{') {
            mooncake::parse(text, block_tokens)?
        } else {
            (azure::parse(text)?, 0)
        };
        requests.sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
        let start = requests.first().map_or(0.0, |first| first.arrival_ms);
        requests.iter_mut().for_each(|request| request.arrival_ms -= start);
        Ok(Self { block_tokens, requests, unique_blocks })
    }

    /// Spreads arrivals with the same coarse timestamp evenly over the time until the next possible
    /// one. The smallest difference between two timestamps is taken as the clock's tick.
    pub fn spread(&mut self) {
        let pairs = self.requests.windows(2).map(|pair| pair[1].arrival_ms - pair[0].arrival_ms);
        let tick = pairs.filter(|&gap| gap > 0.0).fold(f64::INFINITY, f64::min);
        if tick.is_finite() {
            let same = |a: &Request, b: &Request| a.arrival_ms == b.arrival_ms;
            for group in self.requests.chunk_by_mut(same) {
                let step = tick / group.len() as f64;
                for (at, request) in group.iter_mut().enumerate() {
                    request.arrival_ms += step * at as f64;
                }
            }
        }
    }

    /// Makes everything arrive `factor` times faster; `factor` is positive.
    pub fn scale(&mut self, factor: f64) {
        self.requests.iter_mut().for_each(|request| request.arrival_ms /= factor);
    }
}

/// A length in tokens that can be right.
fn length(field: &str, tokens: u64) -> Result<u32, String> {
    match u32::try_from(tokens) {
        Ok(tokens @ 1..=MOST_TOKENS) => Ok(tokens),
        _ => Err(format!("{field}: {tokens} is not between 1 and {MOST_TOKENS}")),
    }
}

#[cfg(test)]
mod tests;
