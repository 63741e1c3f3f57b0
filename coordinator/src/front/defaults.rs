//! What a checkpoint says about sampling, for requests that do not say it themselves.

use std::path::Path;

use baton_proto::sampling::SamplingParams;
use serde_json::Value;

use super::models::{ModelFileError, read_json};

/// From `generation_config.json`; end-of-sequence tokens also from `config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// 0 if the checkpoint says not to sample.
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
}

const GENERATION_CONFIG: &str = "generation_config.json";
const CONFIG: &str = "config.json";

impl Defaults {
    /// Reads a model's folder. Without the files there are no defaults.
    pub fn load(dir: &Path) -> Result<Self, ModelFileError> {
        let path = dir.join(GENERATION_CONFIG);
        let generation = read_json(&path)?.unwrap_or(Value::Null);
        let fail = |what| ModelFileError::new(&path, what);
        let mut defaults = Self::parse(&generation).map_err(fail)?;
        if defaults.eos_token_ids.is_empty() {
            let path = dir.join(CONFIG);
            let config = read_json(&path)?.unwrap_or(Value::Null);
            defaults.eos_token_ids =
                eos_token_ids(&config).map_err(|what| ModelFileError::new(&path, what))?;
        }
        let unset = SamplingParams::default();
        let checked = SamplingParams {
            temperature: defaults.temperature.unwrap_or(unset.temperature),
            top_p: defaults.top_p.unwrap_or(unset.top_p),
            min_p: defaults.min_p.unwrap_or(unset.min_p),
            repetition_penalty: defaults.repetition_penalty.unwrap_or(unset.repetition_penalty),
            ..unset
        };
        // So that a request is never refused for what it did not say.
        checked.check(u32::MAX).map_err(|e| fail(e.to_string()))?;
        Ok(defaults)
    }

    fn parse(generation: &Value) -> Result<Self, String> {
        let number = |key: &str| match &generation[key] {
            Value::Null => Ok(None),
            value => value
                .as_f64()
                .map(|number| Some(number as f32))
                .ok_or_else(|| format!("{key} is {value}; it must be a number")),
        };
        let greedy = generation["do_sample"] == Value::Bool(false);
        Ok(Self {
            temperature: if greedy { Some(0.0) } else { number("temperature")? },
            top_k: token_count(generation, "top_k")?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            repetition_penalty: number("repetition_penalty")?,
            eos_token_ids: eos_token_ids(generation)?,
        })
    }
}

/// Some checkpoints say -1 for "all".
fn token_count(config: &Value, key: &str) -> Result<Option<u32>, String> {
    match config[key].as_i64() {
        None if config[key].is_null() => Ok(None),
        Some(-1) => Ok(Some(0)),
        number => number
            .and_then(|number| u32::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| format!("{key} is {}; it must be a whole number", config[key])),
    }
}

fn eos_token_ids(config: &Value) -> Result<Vec<u32>, String> {
    let value = &config["eos_token_id"];
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Value::Null => Some(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        one => id(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| format!("eos_token_id is {value}; it must be a token id or a list of them"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn load(generation: Option<Value>, config: Value) -> Result<Defaults, ModelFileError> {
        let dir = TempDir::new().unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join(GENERATION_CONFIG), generation.to_string()).unwrap();
        }
        std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
        Defaults::load(dir.path())
    }

    #[test]
    fn what_the_checkpoint_says_counts() {
        let generation = json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
            "repetition_penalty": 1.05, "eos_token_id": [7, 9]});
        let defaults = load(Some(generation), json!({"eos_token_id": 1})).unwrap();
        let expected = Defaults {
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: None,
            repetition_penalty: Some(1.05),
            eos_token_ids: vec![7, 9],
        };
        assert_eq!(defaults, expected);
    }

    #[test]
    fn without_sampling_it_is_greedy_whatever_the_temperature() {
        let generation = json!({"do_sample": false, "temperature": 0.7});
        let defaults = load(Some(generation), json!({})).unwrap();
        assert_eq!(defaults.temperature, Some(0.0));
    }

    #[test]
    fn end_of_sequence_falls_back_to_the_config() {
        let defaults = load(Some(json!({"top_k": -1})), json!({"eos_token_id": 3})).unwrap();
        assert_eq!((defaults.eos_token_ids, defaults.top_k), (vec![3], Some(0)));
        let defaults = load(None, json!({"eos_token_id": [3, 4]})).unwrap();
        assert_eq!(defaults.eos_token_ids, [3, 4]);
        assert_eq!(load(None, json!({})).unwrap(), Defaults::default());
    }

    #[test]
    fn nonsense_is_refused_by_file_and_key() {
        for (generation, said) in [
            (json!({"top_p": 1.5}), "top_p is 1.5"),
            (json!({"top_p": "high"}), "top_p is \"high\""),
            (json!({"eos_token_id": -4}), "eos_token_id is -4"),
            (json!({"top_k": 2.5}), "top_k is 2.5"),
        ] {
            let error = load(Some(generation), json!({})).unwrap_err().to_string();
            assert!(error.contains(GENERATION_CONFIG) && error.contains(said), "{error}");
        }
    }
}
