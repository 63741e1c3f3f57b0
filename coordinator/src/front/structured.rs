//! Structured output: from what a client asks to a grammar that nodes can follow.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use baton_proto::grammar::Grammar;
use baton_proto::wire::v1::StructuredOutput;
use baton_proto::wire::v1::structured_output::Kind;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::models::ServedModel;
use super::refusal::Refusal;
use crate::core::SubmitError;

pub(crate) mod json;

const FIELD: &str = "structured_output";
/// How long a grammar may take to compile. Real ones take milliseconds.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(5);
/// Grammars that are compiled at a time, those that take too long included; further ones wait.
const MAX_COMPILING: usize = 4;
/// When to come back if that takes too long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What the output has to follow.
///
/// # Errors
/// If nothing is asked for.
pub(crate) fn grammar(output: StructuredOutput) -> Result<Arc<Grammar>, Refusal> {
    Ok(Arc::new(match output.kind {
        Some(Kind::JsonSchema(schema)) => Grammar::JsonSchema(schema),
        Some(Kind::JsonObject(_)) => Grammar::JsonObject,
        Some(Kind::Regex(regex)) => Grammar::Regex(regex),
        Some(Kind::Choice(choice)) => Grammar::Choice(choice.texts),
        Some(Kind::Lark(lark)) => Grammar::Lark(lark),
        None => {
            let limit = "one of json_schema, json_object, regex, choice and lark";
            return Err(Refusal::field(FIELD, "empty", limit));
        }
    }))
}

/// Finds out whether nodes could follow a grammar. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    places: Arc<Semaphore>,
}

impl Default for Compiler {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_COMPILING)) }
    }
}

impl Compiler {
    /// Compiles a grammar of legal size, as nodes will.
    ///
    /// # Errors
    /// If they could not.
    pub(crate) async fn check(
        &self,
        grammar: &Arc<Grammar>,
        model: &ServedModel,
    ) -> Result<(), Refusal> {
        let refused = |why: &dyn Display| Refusal::wrong(FIELD, format!("{FIELD}: {why}"));
        let grammars = model.grammars.as_ref().map_err(|error| refused(error))?;
        if grammars.keeps(grammar) {
            return Ok(());
        }
        let place = timeout(COMPILE_TIMEOUT, self.places.clone().acquire_owned()).await;
        let place = place.map_err(|_| SubmitError::Overloaded { retry_after: RETRY_AFTER })?;
        let place = place.expect("nobody closes it");
        let (tell, told) = oneshot::channel();
        let (grammars, grammar) = (grammars.clone(), grammar.clone());
        // Compiling cannot be stopped. A thread that takes too long goes on in its place.
        std::thread::spawn(move || {
            // Nobody may be waiting any more.
            let _ = tell.send(grammars.guide(&grammar).map(drop));
            drop(place);
        });
        match timeout(COMPILE_TIMEOUT, told).await {
            Ok(Ok(compiled)) => compiled.map_err(|error| refused(&error)),
            Ok(Err(_)) => Err(Refusal::Internal),
            Err(_) => {
                Err(refused(&format_args!("it takes more than {COMPILE_TIMEOUT:?} to compile")))
            }
        }
    }
}
