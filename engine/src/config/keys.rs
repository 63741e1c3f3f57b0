//! Typed reading of one JSON object of a `config.json`. A key that is `null` counts as absent, as
//! it does for transformers.

use serde_json::{Map, Value};

use super::ConfigError;

/// An object of the file, and where it is: an empty prefix, or `rope_scaling.` and the like.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    prefix: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    pub(crate) fn of(value: &'a Value, prefix: &'a str) -> Result<Self, ConfigError> {
        let name = prefix.trim_end_matches('.');
        let object = value.as_object().ok_or_else(|| ConfigError::Invalid {
            key: if name.is_empty() { "the file" } else { name }.to_owned(),
            value: shown(value),
            expected: "an object".to_owned(),
        })?;
        Ok(Self { prefix, object })
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The key is there and says `null`; where the default is not "none", that differs from absence.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.object.get(key).is_some_and(Value::is_null)
    }

    pub(crate) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing(format!("{}{key}", self.prefix))
    }

    /// `key` has a value of the wrong kind, or out of range.
    pub(crate) fn invalid(&self, key: &str, expected: &str) -> ConfigError {
        ConfigError::Invalid {
            key: format!("{}{key}", self.prefix),
            value: self.object.get(key).map_or("absent".to_owned(), shown),
            expected: expected.to_owned(),
        }
    }

    /// `key` has a good value that this program does not serve.
    pub(crate) fn unsupported(&self, key: &str, supported: &str) -> ConfigError {
        ConfigError::Unsupported {
            key: format!("{}{key}", self.prefix),
            value: self.object.get(key).map_or("absent".to_owned(), shown),
            supported: supported.to_owned(),
        }
    }

    /// A size from 1 to `most`.
    pub(crate) fn size(&self, key: &str, most: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .map(|n| n as usize)
            .filter(|n| (1..=most).contains(n))
            .map(Some)
            .ok_or_else(|| self.invalid(key, &format!("a whole number from 1 to {most}")))
    }

    pub(crate) fn required_size(&self, key: &str, most: usize) -> Result<usize, ConfigError> {
        self.size(key, most)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number above zero.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .filter(|n| n.is_finite() && *n > 0.0)
            .map(Some)
            .ok_or_else(|| self.invalid(key, "a number above 0"))
    }

    pub(crate) fn required_positive(&self, key: &str) -> Result<f64, ConfigError> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        self.get(key).map_or(Ok(default), |value| {
            value.as_bool().ok_or_else(|| self.invalid(key, "true or false"))
        })
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.get(key)
            .map(|value| value.as_str().ok_or_else(|| self.invalid(key, "a string")))
            .transpose()
    }

    /// One token id or a list of them; absent is an empty list.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let ids = value.as_array().map_or(std::slice::from_ref(value), |list| list);
        ids.iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<_>>()
            .ok_or_else(|| self.invalid(key, "a token id or a list of token ids"))
    }

    /// Refuses any value of `key` but an absent one and `neutral`.
    pub(crate) fn only(&self, key: &str, neutral: &Value) -> Result<(), ConfigError> {
        let same = |value: &Value| match (value.as_f64(), neutral.as_f64()) {
            (Some(a), Some(b)) => a == b,
            _ => value == neutral,
        };
        match self.get(key) {
            Some(value) if !same(value) => Err(self.unsupported(key, &neutral.to_string())),
            _ => Ok(()),
        }
    }
}

/// A value on one line, cut where it is long.
fn shown(value: &Value) -> String {
    const MOST: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
