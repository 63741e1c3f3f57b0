//! `generation_config.json`, of which an engine needs one thing: where a sequence ends.

use serde_json::Value;

use crate::config::{ConfigError, Keys};

/// The end-of-sequence tokens of a parsed `generation_config.json`; empty if it names none.
pub fn eos_token_ids(generation_config: &Value) -> Result<Vec<u32>, ConfigError> {
    Keys::of(generation_config, "")?.token_ids("eos_token_id")
}
