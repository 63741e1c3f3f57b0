//! From the name in a request to the model that serves it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use baton_proto::wire::v1::GenerateRequest;
use baton_proto::wire::v1::generate_request::Input;

use super::models::{Models, ServedModel};
use super::prepare::text_bytes;
use super::refusal::Refusal;
use crate::aliases::Alias;
use crate::core::Core;

/// Bytes of text per token, about.
const TOKEN_BYTES: usize = 4;
/// Nothing was chosen yet.
const NONE: usize = usize::MAX;

/// All aliases, with what each chose last.
pub(super) struct Aliases(Vec<Known>);

struct Known {
    alias: Alias,
    models: Vec<Arc<ServedModel>>,
    /// Token ids mean the same to all models.
    one_vocabulary: bool,
    /// Requests that arrive together may overwrite each other's choice, which is as good.
    last: AtomicUsize,
}

impl Aliases {
    /// Every model of an alias is one of `models`.
    pub(super) fn new(aliases: Vec<Alias>, models: &Models) -> Self {
        let known = |alias: Alias| {
            let served = |name: &String| models.get(name).cloned();
            let models: Vec<_> = alias.models.iter().filter_map(|name| served(name).ok()).collect();
            let one_vocabulary =
                models.windows(2).all(|two| two[0].tokenizer.agrees_with(&two[1].tokenizer));
            Known { alias, models, one_vocabulary, last: NONE.into() }
        };
        Self(aliases.into_iter().map(known).collect())
    }

    /// Each alias with the names of its models.
    pub(super) fn names(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.0.iter().map(|known| (known.alias.name.as_str(), known.alias.models.as_slice()))
    }

    /// The model that serves a request, if it names an alias.
    pub(super) async fn resolve(
        &self,
        request: &GenerateRequest,
        core: &Core,
    ) -> Result<Option<Arc<ServedModel>>, Refusal> {
        let Some(known) = self.0.iter().find(|known| known.alias.name == request.model) else {
            return Ok(None);
        };
        if matches!(request.input, Some(Input::TokenIds(_))) && !known.one_vocabulary {
            let alias = &known.alias;
            let what = format!(
                "token_ids cannot be used with {:?}: its models ({}) have different vocabularies",
                alias.name,
                alias.models.join(", ")
            );
            return Err(Refusal::wrong("token_ids", what));
        }
        let tokens = about_tokens(request.input.as_ref());
        let estimates = core.estimates(known.alias.models.clone(), tokens).await;
        let last = Some(known.last.load(Ordering::Relaxed)).filter(|&last| last != NONE);
        let chosen = known.alias.choose(&estimates, last);
        known.last.store(chosen, Ordering::Relaxed);
        Ok(known.models.get(chosen).cloned())
    }
}

/// Tokens of a prompt that nobody has tokenized yet.
fn about_tokens(input: Option<&Input>) -> usize {
    match input {
        Some(Input::TokenIds(tokens)) => tokens.ids.len(),
        input => text_bytes(input).div_ceil(TOKEN_BYTES).max(1),
    }
}
