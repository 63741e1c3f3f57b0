//! The served models: for each name, how text becomes tokens and back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use baton_grammar::{Grammars, Vocabulary, VocabularyError};
use serde_json::Value;

use super::chat::ChatTemplate;
use super::defaults::Defaults;
use super::text::Tokenizer;

/// What the front needs of a checkpoint: no weights.
pub struct ServedModel {
    /// Its name, the same as on its nodes.
    pub name: String,
    /// Between text and tokens.
    pub tokenizer: Arc<Tokenizer>,
    /// Between conversations and text, if the checkpoint has a template.
    pub chat: Option<ChatTemplate>,
    /// What the checkpoint says about sampling.
    pub defaults: Defaults,
    /// Compiles grammars, or why it cannot.
    pub grammars: Result<Arc<Grammars>, VocabularyError>,
}

/// A file of a model's folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", path.display())]
pub struct ModelFileError {
    path: PathBuf,
    what: String,
}

impl ModelFileError {
    pub(super) fn new(path: &Path, what: impl ToString) -> Self {
        Self { path: path.to_owned(), what: what.to_string() }
    }
}

/// No served model has the name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownModel {
    /// A name that is not served.
    #[error("model {name:?} is not served here; served: {served}")]
    NotServed {
        /// The name.
        name: String,
        /// Those that are.
        served: String,
    },
    /// None was named, and there are several.
    #[error("model is empty; name one of: {served}")]
    Ambiguous {
        /// Those that are served.
        served: String,
    },
}

/// All served models, by name.
#[derive(Default)]
pub struct Models(BTreeMap<String, Arc<ServedModel>>);

impl Models {
    /// Reads the folders of the served models, each under its name.
    pub fn load<'a>(
        folders: impl IntoIterator<Item = (&'a str, &'a Path)>,
    ) -> Result<Self, ModelFileError> {
        let load = |(name, dir)| Ok((String::from(name), Arc::new(ServedModel::load(name, dir)?)));
        folders.into_iter().map(load).collect::<Result<_, _>>().map(Self)
    }

    /// The model of that name; an empty name means the only one.
    pub fn get(&self, name: &str) -> Result<&Arc<ServedModel>, UnknownModel> {
        let served = || self.0.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.0.first_key_value() {
            Some((_, model)) if name.is_empty() && self.0.len() == 1 => Ok(model),
            Some(_) if name.is_empty() => Err(UnknownModel::Ambiguous { served: served() }),
            _ => self.0.get(name).ok_or_else(|| UnknownModel::NotServed {
                name: name.chars().take(80).collect(),
                served: served(),
            }),
        }
    }
}

impl ServedModel {
    /// Reads what is needed from a checkpoint's folder.
    pub fn load(name: &str, dir: &Path) -> Result<Self, ModelFileError> {
        let path = dir.join("tokenizer.json");
        let tokenizer = Arc::new(Tokenizer::load(&path)?);
        let vocabulary = Vocabulary::parse(&read_text(&path)?.unwrap_or_default());
        Ok(Self {
            name: name.to_owned(),
            tokenizer,
            grammars: vocabulary.map(|known| Arc::new(Grammars::new(&known, known.bytes().len()))),
            chat: ChatTemplate::load(dir)?,
            defaults: Defaults::load(dir)?,
        })
    }
}

/// The file's text; `None` if there is no such file.
pub(super) fn read_text(path: &Path) -> Result<Option<String>, ModelFileError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ModelFileError::new(path, error)),
    }
}

/// The same, as JSON.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, ModelFileError> {
    read_text(path)?
        .map(|text| serde_json::from_str(&text).map_err(|e| ModelFileError::new(path, e)))
        .transpose()
}
