//! From what a gateway asks of an engine to the one kind of request. What cannot be served is refused by its name.

use baton_proto::wire::engine::generate_request::Input;
use baton_proto::wire::engine::sampling_params::Constraint;
use baton_proto::wire::engine::{GenerateRequest, SamplingParams};
use baton_proto::wire::v1;
use baton_proto::wire::v1::structured_output::Kind;

use crate::front::refusal::Refusal;

/// Reads a request.
pub(super) fn read(request: GenerateRequest) -> Result<v1::GenerateRequest, Refusal> {
    let given = [
        ("kv_transfer_params", request.kv_transfer_params.is_some()),
        ("kv_transfer_params_json", request.kv_transfer_params_json.is_some()),
        ("mm_inputs", request.mm_inputs.is_some()),
        ("extra_mm_inputs", !request.extra_mm_inputs.is_empty()),
        ("media_refs", request.media_refs.is_some()),
    ];
    if let Some((field, _)) = given.into_iter().find(|(_, given)| *given) {
        return Err(not_served(field));
    }
    if let Some(rank) = request.data_parallel_rank.filter(|&rank| rank != 0) {
        return Err(Refusal::field("data_parallel_rank", rank, "0: there is one rank"));
    }
    let mut params = request.sampling_params.unwrap_or_default();
    let constraint = params.constraint.take();
    let input = request.input.map(|input| match input {
        Input::Tokenized(prompt) => {
            v1::generate_request::Input::TokenIds(v1::TokenIds { ids: prompt.input_ids })
        }
        Input::Text(text) => v1::generate_request::Input::Prompt(text),
    });
    Ok(v1::GenerateRequest {
        request_id: request.request_id,
        input,
        n: Some(params.n).filter(|&n| n > 0),
        structured_output: constraint.map(structured_output).transpose()?.flatten(),
        sampling: Some(sampling(params)?),
        ..v1::GenerateRequest::default()
    })
}

fn not_served(field: &str) -> Refusal {
    Refusal::wrong(field, format!("{field} is not supported"))
}

fn sampling(params: SamplingParams) -> Result<v1::Sampling, Refusal> {
    if params.truncate_prompt_tokens.is_some() {
        return Err(not_served("truncate_prompt_tokens"));
    }
    // As vLLM reads a value that is not there.
    let or_one = |value: f32| if value == 0.0 { 1.0 } else { value };
    Ok(v1::Sampling {
        temperature: params.temperature,
        top_k: Some(params.top_k),
        top_p: Some(or_one(params.top_p)),
        min_p: Some(params.min_p),
        repetition_penalty: Some(or_one(params.repetition_penalty)),
        presence_penalty: Some(params.presence_penalty),
        frequency_penalty: Some(params.frequency_penalty),
        logit_bias: params.logit_bias.into_iter().map(bias).collect::<Result<_, _>>()?,
        seed: params.seed.filter(|&seed| seed != -1).map(|seed| i64::from(seed) as u64),
        max_tokens: params.max_tokens,
        min_tokens: Some(params.min_tokens),
        ignore_eos: Some(params.ignore_eos),
        stop: params.stop,
        stop_token_ids: params.stop_token_ids,
        logprobs: alternatives("logprobs", params.logprobs)?,
        prompt_logprobs: alternatives("prompt_logprobs", params.prompt_logprobs)?,
        skip_special_tokens: Some(params.skip_special_tokens),
        include_stop_string: Some(params.include_stop_str_in_output),
    })
}

fn bias((id, bias): (i32, f32)) -> Result<(u32, f32), Refusal> {
    let wrong = || Refusal::wrong("logit_bias", format!("logit_bias has {id}, no token id"));
    u32::try_from(id).map(|id| (id, bias)).map_err(|_| wrong())
}

/// Of a token; -1, all of the vocabulary, is too many.
fn alternatives(field: &str, given: Option<i32>) -> Result<Option<u32>, Refusal> {
    let limit = format!("from 0 to {}", baton_proto::sampling::MAX_LOGPROBS);
    let count = |given| u32::try_from(given).map_err(|_| Refusal::field(field, given, &limit));
    given.map(count).transpose()
}

fn structured_output(constraint: Constraint) -> Result<Option<v1::StructuredOutput>, Refusal> {
    let kind = match constraint {
        Constraint::JsonSchema(schema) => Kind::JsonSchema(schema),
        Constraint::Regex(regex) => Kind::Regex(regex),
        Constraint::Grammar(lark) => Kind::Lark(lark),
        Constraint::StructuralTag(_) => return Err(not_served("structural_tag")),
        Constraint::JsonObject(false) => return Ok(None),
        Constraint::JsonObject(true) => Kind::JsonObject(v1::JsonObject {}),
        Constraint::Choice(choice) => Kind::Choice(v1::Choice { texts: choice.choices }),
    };
    Ok(Some(v1::StructuredOutput { kind: Some(kind) }))
}

#[cfg(test)]
mod tests {
    use baton_proto::wire::engine::{NotServed, TokenizedInput};

    use super::*;

    fn request(change: impl FnOnce(&mut GenerateRequest, &mut SamplingParams)) -> GenerateRequest {
        let input = TokenizedInput { original_text: "ignored".into(), input_ids: vec![1, 2] };
        let input = Some(Input::Tokenized(input));
        let mut request = GenerateRequest { input, ..GenerateRequest::default() };
        let mut params = SamplingParams::default();
        change(&mut request, &mut params);
        request.sampling_params = Some(params);
        request
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let nothing = || Some(NotServed {});
        for (request, named) in [
            (request(|r, _| r.kv_transfer_params = nothing()), "kv_transfer_params"),
            (request(|r, _| r.mm_inputs = nothing()), "mm_inputs"),
            (request(|r, _| r.media_refs = nothing()), "media_refs"),
            (request(|r, _| r.extra_mm_inputs = vec![NotServed {}]), "extra_mm_inputs"),
            (
                request(|r, _| r.kv_transfer_params_json = Some("{}".into())),
                "kv_transfer_params_json",
            ),
            (request(|r, _| r.data_parallel_rank = Some(1)), "data_parallel_rank"),
            (request(|_, p| p.truncate_prompt_tokens = Some(-1)), "truncate_prompt_tokens"),
            (request(|_, p| p.logprobs = Some(-1)), "logprobs"),
            (request(|_, p| p.prompt_logprobs = Some(-1)), "prompt_logprobs"),
            (request(|_, p| p.logit_bias = [(-5, 1.0)].into()), "logit_bias"),
            (
                request(|_, p| p.constraint = Some(Constraint::StructuralTag("{}".into()))),
                "structural_tag",
            ),
        ] {
            match read(request).unwrap_err() {
                Refusal::Field { field, message } => {
                    assert_eq!(field, named);
                    assert!(message.contains(named), "{message}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn zeros_mean_what_they_mean_to_vllm() {
        let read = read(request(|r, p| {
            (r.request_id, r.data_parallel_rank) = ("a".into(), Some(0));
            (p.seed, p.constraint) = (Some(-1), Some(Constraint::JsonObject(false)));
        }))
        .unwrap();
        let ids = v1::TokenIds { ids: vec![1, 2] };
        assert_eq!(read.input, Some(v1::generate_request::Input::TokenIds(ids)));
        assert_eq!((&*read.request_id, read.n, read.structured_output), ("a", None, None));
        let sampling = read.sampling.unwrap();
        assert_eq!((sampling.top_p, sampling.repetition_penalty), (Some(1.0), Some(1.0)));
        assert_eq!((sampling.temperature, sampling.max_tokens, sampling.seed), (None, None, None));
        assert_eq!((sampling.top_k, sampling.logprobs), (Some(0), None));
    }
}
