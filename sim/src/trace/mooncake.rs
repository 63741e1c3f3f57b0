//! JSON lines.

use std::collections::HashMap;

use serde::Deserialize;

use super::{Malformed, Request, length};

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Gives ids small names, and checks that an id always follows the same one.
#[derive(Default)]
struct Names {
    /// Name and parent of an id.
    known: HashMap<u64, (u32, Option<u64>)>,
}

/// All requests, and the number of different blocks.
pub(super) fn parse(text: &str, block_tokens: u32) -> Result<(Vec<Request>, u32), Malformed> {
    let mut names = Names::default();
    let mut requests = Vec::new();
    for (at, text) in text.lines().enumerate() {
        if !text.trim().is_empty() {
            let request = request(text, block_tokens, &mut names);
            requests.push(request.map_err(|problem| (at + 1, problem))?);
        }
    }
    Ok((requests, names.known.len() as u32))
}

fn request(text: &str, block_tokens: u32, names: &mut Names) -> Result<Request, String> {
    let line: Line = serde_json::from_str(text).map_err(|error| {
        // The position in the line helps, the line number would always be 1.
        error.to_string().replace(" at line 1 column", " at column")
    })?;
    if !(line.timestamp.is_finite() && line.timestamp >= 0.0) {
        return Err(format!("timestamp: {} is not 0 or more", line.timestamp));
    }
    let input_tokens = length("input_length", line.input_length)?;
    // A request that was cancelled before its first token still had its prompt computed.
    let output_tokens = length("output_length", line.output_length.max(1))?;
    let blocks = input_tokens.div_ceil(block_tokens) as usize;
    let full = (input_tokens / block_tokens) as usize;
    let given = line.hash_ids.len();
    if given != 0 && given != blocks && given != full {
        return Err(format!(
            "hash_ids: {given} ids, and {input_tokens} tokens are {blocks} blocks of {block_tokens}"
        ));
    }
    let blocks = names.name_all(&line.hash_ids)?;
    Ok(Request { arrival_ms: line.timestamp, input_tokens, output_tokens, blocks })
}

impl Names {
    fn name_all(&mut self, ids: &[u64]) -> Result<Box<[u32]>, String> {
        let mut parent = None;
        let mut names = Vec::with_capacity(ids.len());
        for (at, &id) in ids.iter().enumerate() {
            let next = u32::try_from(self.known.len()).map_err(|_| "hash_ids: too many ids")?;
            let &mut (name, usual) = self.known.entry(id).or_insert((next, parent));
            if usual != parent {
                return Err(format!(
                    "hash_ids[{at}]: {id} follows {} here and {} before; an id stands for a whole \
                     prefix",
                    shown(parent),
                    shown(usual)
                ));
            }
            names.push(name);
            parent = Some(id);
        }
        Ok(names.into())
    }
}

fn shown(parent: Option<u64>) -> String {
    parent.map_or("nothing".to_owned(), |id| id.to_string())
}
