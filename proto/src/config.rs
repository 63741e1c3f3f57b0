//! Configuration files: TOML in which every key must be known.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Most bytes of a configuration file.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// A configuration file cannot be used. Trying again does not help.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is too large to be one.
    #[error("{0}: larger than {MAX_CONFIG_BYTES} bytes")]
    TooLarge(PathBuf),
    /// A key that does not exist.
    #[error("{path}:{line}:{column}: unknown key `{key}`{}", did_you_mean(.nearest))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Character in that line, from 1.
        column: usize,
        /// The key as written.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{path}:{line}:{column}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Character in that line, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest.as_ref().map(|key| format!("; did you mean `{key}`?")).unwrap_or_default()
}

/// Reads a configuration file. `T` (and every table in it) must be
/// `#[serde(deny_unknown_fields)]`.
pub fn load_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_CONFIG_BYTES {
        return Err(ConfigError::TooLarge(path.to_owned()));
    }
    parse_toml(&std::fs::read_to_string(path).map_err(read)?, path)
}

/// Parses the text of a configuration file; `path` only names it in errors.
pub fn parse_toml<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| explain(text, path.to_owned(), &error))
}

/// serde names the given field first, then the known ones, each in backquotes.
fn explain(text: &str, path: PathBuf, error: &toml::de::Error) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..start).unwrap_or_default();
    let line = 1 + before.matches('\n').count();
    let column = 1 + before.rsplit('\n').next().unwrap_or_default().chars().count();
    let message = error.message();
    let mut quoted = message.split('`').skip(1).step_by(2);
    match quoted.next() {
        Some(key) if message.starts_with("unknown field") => {
            let nearest = nearest(key, quoted).map(str::to_owned);
            ConfigError::UnknownKey { path, line, column, key: key.to_owned(), nearest }
        }
        _ => ConfigError::Invalid { path, line, column, message: message.to_owned() },
    }
}

/// The known word that looks most like `given`, if one looks like it at all.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (given.chars().count() / 3).max(2);
    known
        .into_iter()
        .map(|word| (distance(given, word), word))
        .filter(|&(distance, _)| distance <= limit)
        .min()
        .map(|(_, word)| word)
}

/// Levenshtein distance: fewest insertions, removals and replacements of characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, &cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        #[serde(rename = "cluster_listen")]
        _cluster_listen: Option<String>,
        #[serde(rename = "grpc")]
        _grpc: Option<u16>,
    }

    fn message(text: &str) -> String {
        parse_toml::<Sample>(text, Path::new("c.toml")).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_name() {
        assert_eq!(
            message("grpc = 1\nclusterlisten = 'x'\n"),
            "c.toml:2:1: unknown key `clusterlisten`; did you mean `cluster_listen`?"
        );
        assert_eq!(message("colour = 1\n"), "c.toml:1:1: unknown key `colour`");
    }

    #[test]
    fn a_wrong_type_names_its_line() {
        assert!(message("\n\ngrpc = 'x'\n").starts_with("c.toml:3:8: invalid type"));
    }

    #[test]
    fn distances_are_levenshtein() {
        for (a, b, want) in [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0)] {
            assert_eq!(distance(a, b), want);
            assert_eq!(distance(b, a), want);
        }
    }
}
