//! Structured output: from what a client asks to a grammar that nodes can follow.

use std::fmt::Display;
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_proto::grammar::Grammar;
use baton_proto::wire::v1::StructuredOutput;
use baton_proto::wire::v1::structured_output::Kind;

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

/// Compiles a grammar of legal size, as nodes will. Blocks for as long as that takes, or may take.
///
/// # Errors
/// If they could not.
pub(crate) fn check(grammar: &Arc<Grammar>, model: &ServedModel) -> Result<(), Refusal> {
    let refused = |why: &dyn Display| Refusal::wrong(FIELD, format!("{FIELD}: {why}"));
    let grammars = model.grammars.as_ref().map_err(|error| refused(error))?;
    if grammars.keeps(grammar) {
        return Ok(());
    }
    let place = Place::take().ok_or(SubmitError::Overloaded { retry_after: RETRY_AFTER })?;
    let (tell, told) = channel();
    let (grammars, grammar) = (grammars.clone(), grammar.clone());
    // Compiling cannot be stopped. A thread that takes too long goes on in its place.
    std::thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = tell.send(grammars.guide(&grammar).map(drop));
        drop(place);
    });
    match told.recv_timeout(COMPILE_TIMEOUT) {
        Ok(compiled) => compiled.map_err(|error| refused(&error)),
        Err(_) => Err(refused(&format_args!("it takes more than {COMPILE_TIMEOUT:?} to compile"))),
    }
}

/// One of the places for grammars that are compiled.
struct Place;

/// How many are taken.
static TAKEN: Mutex<usize> = Mutex::new(0);
static FREED: Condvar = Condvar::new();

impl Place {
    /// Waits for one, as long as a grammar may take.
    fn take() -> Option<Self> {
        let full = |taken: &mut usize| *taken >= MAX_COMPILING;
        let waited = FREED.wait_timeout_while(taken(), COMPILE_TIMEOUT, full);
        let (mut taken, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        (!waited.timed_out()).then(|| {
            *taken += 1;
            Self
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *taken() -= 1;
        FREED.notify_one();
    }
}

fn taken() -> MutexGuard<'static, usize> {
    // Nothing panics with the lock.
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}
