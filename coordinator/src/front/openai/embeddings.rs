//! `/v1/embeddings`.

use axum::Extension;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use baton_proto::wire::v1::embed_input::Input;
use baton_proto::wire::v1::generate_request::Input as Prompt;
use baton_proto::wire::v1::{EmbedInput, EmbedRequest, EmbedResponse, Pooling};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::body::{Asked, Body};
use super::completions::several;
use super::error::ApiError;
use super::fields::Fields;
use super::sampling::{LABELS, cache_salt, priority};
use crate::front::Front;
use crate::front::door::Caller;
use crate::front::embed::MAX_INPUTS;
use crate::front::refusal::Refusal;

/// Makes vectors of texts.
pub(super) async fn create(
    State(front): State<Front>,
    Extension(caller): Extension<Caller>,
    Body((request, encoding)): Body<(EmbedRequest, Encoding)>,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let response = front.embeddings(&caller, request, None, arrived).await.map_err(error)?;
    // A large answer takes milliseconds to write.
    let written = tokio::task::spawn_blocking(move || reply(&response, encoding)).await;
    match written {
        Ok(Ok(body)) => Ok(([(CONTENT_TYPE, "application/json")], body).into_response()),
        _ => Err(ApiError::internal("the answer's writer stopped")),
    }
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Encoding {
    Float,
    /// Of the numbers' bytes, little-endian: what OpenAI's Python client asks for.
    Base64,
}

impl Asked for (EmbedRequest, Encoding) {
    fn parse(mut fields: Fields) -> Result<Self, ApiError> {
        let inputs = several(&mut fields, "input", MAX_INPUTS, &format!("at most {MAX_INPUTS}"))?;
        let encoding = match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(other) => {
                return Err(ApiError::value("encoding_format", other, "\"float\" or \"base64\""));
            }
        };
        let request = EmbedRequest {
            model: fields.string("model")?.unwrap_or_default(),
            inputs: inputs.into_iter().map(input).collect(),
            pooling: pooling(&mut fields)?.into(),
            normalize: fields.bool("normalize")?,
            deadline_ms: fields.count("deadline_ms", 1, u32::MAX)?,
            cache_salt: cache_salt(&mut fields)?,
            priority: priority(&mut fields)?,
            tenant: fields.string("tenant")?.unwrap_or_default(),
        };
        for label in LABELS {
            fields.take(label);
        }
        // Among what is left is `dimensions`: only models that were trained for it can leave some out.
        fields.finish()?;
        Ok((request, encoding))
    }
}

fn pooling(fields: &mut Fields) -> Result<Pooling, ApiError> {
    match fields.string("pooling")?.as_deref() {
        None => Ok(Pooling::Unspecified),
        Some("last") => Ok(Pooling::Last),
        Some("mean") => Ok(Pooling::Mean),
        Some(other) => Err(ApiError::value("pooling", other, "\"last\" or \"mean\"")),
    }
}

fn input(prompt: Prompt) -> EmbedInput {
    let input = match prompt {
        Prompt::Prompt(text) => Some(Input::Text(text)),
        Prompt::TokenIds(ids) => Some(Input::TokenIds(ids)),
        Prompt::Chat(_) => None,
    };
    EmbedInput { input }
}

/// The parameter is called `input` here.
fn error(refusal: Refusal) -> ApiError {
    let mut error = ApiError::from(refusal);
    error.param = error.param.map(|param| match param.strip_prefix("inputs") {
        Some(place) => format!("input{place}"),
        None if param == "prompt" => "input".to_owned(),
        None => param,
    });
    error
}

/// The answer's body. Numbers are written as they are: as values of JSON they would take many times
/// the memory, and all digits of double precision.
fn reply(response: &EmbedResponse, encoding: Encoding) -> serde_json::Result<Vec<u8>> {
    let items = response.embeddings.iter().enumerate().map(|(index, embedding)| Item {
        object: "embedding",
        index,
        embedding: Vector { values: &embedding.values, encoding },
    });
    let usage = response.usage.unwrap_or_default();
    serde_json::to_vec(&Reply {
        object: "list",
        data: items.collect(),
        model: &response.model,
        usage: json!({
            "prompt_tokens": usage.prompt_tokens,
            "total_tokens": usage.prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }),
    })
}

#[derive(Serialize)]
struct Reply<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: Value,
}

#[derive(Serialize)]
struct Item<'a> {
    object: &'static str,
    index: usize,
    embedding: Vector<'a>,
}

struct Vector<'a> {
    values: &'a [f32],
    encoding: Encoding,
}

impl Serialize for Vector<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.encoding {
            Encoding::Float => serializer.collect_seq(self.values),
            Encoding::Base64 => {
                let values = self.values.iter();
                let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
                serializer.serialize_str(&STANDARD.encode(bytes))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<(EmbedRequest, Encoding), ApiError> {
        Asked::parse(Fields::new("", body).unwrap())
    }

    #[test]
    fn an_input_has_four_forms_and_the_rest_its_defaults() {
        for (input, count) in
            [(json!("a"), 1), (json!(["a", "b"]), 2), (json!([1, 2]), 1), (json!([[1], [2]]), 2)]
        {
            let (request, encoding) = read(json!({"input": input, "user": "u"})).unwrap();
            assert_eq!((request.inputs.len(), encoding), (count, Encoding::Float));
            assert_eq!((request.pooling(), request.normalize), (Pooling::Unspecified, None));
        }
        let all = json!({"input": "a", "encoding_format": "base64", "pooling": "mean",
            "normalize": false, "deadline_ms": 5, "cache_salt": "s", "priority": -1, "tenant": "t"});
        let (request, encoding) = read(all).unwrap();
        assert_eq!((encoding, request.pooling()), (Encoding::Base64, Pooling::Mean));
        assert_eq!((request.normalize, request.deadline_ms), (Some(false), Some(5)));
        assert_eq!(request.priority, "interactive");
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        for (body, param) in [
            (json!({}), "input"),
            (json!({"input": []}), "input"),
            (json!({"input": ""}), "input"),
            (json!({"input": ["a", ""]}), "input[1]"),
            (json!({"input": ["a", [1]]}), "input[1]"),
            (json!({"input": vec!["a"; MAX_INPUTS + 1]}), "input"),
            (json!({"input": "a", "dimensions": 16}), "dimensions"),
            (json!({"input": "a", "encoding_format": "int8"}), "encoding_format"),
            (json!({"input": "a", "pooling": "cls"}), "pooling"),
            (json!({"input": "a", "truncate_prompt_tokens": 5}), "truncate_prompt_tokens"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        }
    }
}
