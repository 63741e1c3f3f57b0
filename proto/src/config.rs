//! Configuration files: TOML in which every key must be known.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Most bytes of a configuration file.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Characters of a wrong value that are shown.
const SHOWN_CHARS: usize = 60;

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
    let mut text = String::new();
    let read =
        File::open(path).and_then(|f| f.take(MAX_CONFIG_BYTES + 1).read_to_string(&mut text));
    match read {
        Ok(length) if length as u64 > MAX_CONFIG_BYTES => {
            Err(ConfigError::TooLarge(path.to_owned()))
        }
        Ok(_) => parse_toml(&text, path),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

/// Parses the text of a configuration file; `path` only names it in errors.
pub fn parse_toml<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| explain(text, path.to_owned(), error))
}

/// serde names the given field first, then the known ones, each in backquotes.
fn explain(text: &str, path: PathBuf, error: toml::de::Error) -> ConfigError {
    let span = error.span().unwrap_or_default();
    let before = text.get(..span.start).unwrap_or(text);
    let line = 1 + before.matches('\n').count();
    let column = 1 + before.rsplit('\n').next().unwrap_or_default().chars().count();
    let mut quoted = error.message().split('`').skip(1).step_by(2);
    match quoted.next() {
        Some(key) if error.message().starts_with("unknown field") => {
            let nearest = nearest(key, quoted).map(str::to_owned);
            ConfigError::UnknownKey { path, line, column, key: key.to_owned(), nearest }
        }
        _ => {
            let message = in_words(text.get(span).unwrap_or_default(), error);
            ConfigError::Invalid { path, line, column, message }
        }
    }
}

/// What is wrong with the value `written`: its key, what it is and what it must be, without Rust's
/// names of types.
fn in_words(written: &str, mut error: toml::de::Error) -> String {
    // Without its text an error shows the key instead: "MESSAGE\nin `a.b`".
    error.set_input(None);
    let shown = error.to_string();
    let Some((message, key)) = shown.trim_end().rsplit_once("\nin `") else {
        return format!("{} (text has quotes around it)", error.message());
    };
    let key = key.trim_end_matches('`');
    if let Some(field) = message.strip_prefix("missing field ") {
        return format!("{key} has no {field}");
    }
    let wanted = match message.split_once(", expected ") {
        Some((_, wanted)) => wanted,
        None if message == "invalid socket address syntax" => "socket address",
        None => return format!("{key}: {message}"),
    };
    let first_line: String = written.chars().take(SHOWN_CHARS).take_while(|&c| c != '\n').collect();
    let cut = if first_line.len() < written.len() { "…" } else { "" };
    format!("{key} is {first_line}{cut}; it must be {}", type_in_words(wanted))
}

fn type_in_words(wanted: &str) -> &str {
    match wanted {
        "u16" => "a whole number from 0 to 65535",
        "u32" => "a whole number from 0 to 4294967295",
        "u64" | "usize" => "a whole number from 0 on",
        "f64" => "a number",
        "a boolean" => "true or false",
        "a string" | "path string" => "a text in quotes",
        "a sequence" => "a list in brackets",
        "socket address" => "an IP address and a port, such as \"127.0.0.1:7401\"",
        other => other,
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
        #[serde(rename = "http")]
        _http: Option<std::net::SocketAddr>,
        #[serde(rename = "model")]
        _model: Option<Vec<PathBuf>>,
        #[serde(rename = "aliases")]
        _aliases: Option<Vec<Alias>>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Alias {
        #[serde(rename = "name")]
        _name: String,
        #[serde(rename = "share")]
        _share: Option<f64>,
        #[serde(rename = "when")]
        _when: Option<When>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum When {
        Auto,
        Never,
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
    fn a_wrong_value_is_named_with_its_place_and_what_it_must_be() {
        let cases = [
            ("\n\ngrpc = 'x'", "3:8: grpc is 'x'; it must be a whole number from 0 to 65535"),
            ("grpc = 65_536", "1:8: grpc is 65_536; it must be a whole number from 0 to 65535"),
            ("http = 'a:1'", "1:8: http is 'a:1'; it must be an IP address and a port, such as"),
            ("http = 7402", "1:8: http is 7402; it must be an IP address and a port, such as"),
            ("model = 'm'", "1:9: model is 'm'; it must be a list in brackets"),
            ("model = ['m', 1]", "1:15: model is 1; it must be a text in quotes"),
            ("grpc = [\n1]", "1:8: grpc is […; it must be a whole number"),
            ("[[aliases]]\nname = true", "2:8: aliases.name is true; it must be a text in quotes"),
            (
                "aliases = [{ name = 'a', share = '1' }]",
                "aliases.share is '1'; it must be a number",
            ),
            ("[[aliases]]\nshare = 1", "1:1: aliases has no `name`"),
            (
                "[[aliases]]\nname = 'a'\nwhen = 'now'",
                "3:8: aliases.when is 'now'; it must be `auto` or `never`",
            ),
            (
                "http = 127.0.0.1:1",
                "1:13: invalid float, expected nothing (text has quotes around it)",
            ),
        ];
        for (text, wanted) in cases {
            let message = message(text);
            assert!(message.contains(wanted), "{text:?}: {message}");
        }
    }

    #[test]
    fn no_more_than_the_limit_is_read() {
        let error = load_toml::<Sample>(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(error, ConfigError::TooLarge(_)), "{error}");
    }

    #[test]
    fn distances_are_levenshtein() {
        for (a, b, want) in [("", "abc", 3), ("kitten", "sitting", 3), ("same", "same", 0)] {
            assert_eq!(distance(a, b), want);
            assert_eq!(distance(b, a), want);
        }
    }
}
